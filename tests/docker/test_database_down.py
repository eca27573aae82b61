"""PostgreSQL is down: who says so, what still works, and what is there when it is back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from browsing import open_console
from consoles import serving
from installation import Install, Installation, served_outside
from playwright.sync_api import Page, expect
from test_routing import wait_until

import llm_manager as lm

pytestmark = pytest.mark.docker
LONGEST = 150  # seconds until LiteLLM knows no key any more, on a busy machine


@pytest.fixture(scope="module")
def here(install_for_module: Install) -> Iterator[Installation]:
    """An endpoint whose one model is served outside of Docker."""
    with served_outside(install_for_module) as made:
        yield made


def used(here: Installation) -> dict[str, list[int]]:
    """By key: requests, failures and tokens."""
    return {
        row["name"]: [row["requests"], row["failures"], row["completion_tokens"]]
        for row in json.loads(here.cli("usage", "--json"))
    }


@pytest.mark.browser
def test_a_key_for_emergencies_reaches_models_without_postgresql_and_nothing_is_lost(
    here: Installation, page: Page
) -> None:
    ada = here.openai(here.create_key("Ada"))
    with here.step("a key for emergencies"):
        made = json.loads(here.cli("direct", "create", "fire", "--emergency", "--json"))
    fire = here.openai(made["key"])
    assert (status(ada), status(fire)) == (200, 200)
    with serving(here) as url:  # whose start would have brought it back
        open_console(page, url)
        here.container("llm-postgres").stop()
        expect(page.get_by_text("PostgreSQL is down.").first).to_be_visible()
    assert (status(ada), status(fire)) == (200, 200), "it was used within the last minute"
    wait_until(lambda: status(ada) == 503, "LiteLLM forgets the key", LONGEST)
    assert [status(fire) for _ in range(3)] == [200] * 3
    assert [model.id for model in fire.models.list()] == ["tiny"]
    for command in (("key", "list"), ("key", "why", "Ada"), ("key", "create", "Bob"), ("usage",)):
        ended = here.run(*command)
        assert (ended.returncode, "PostgreSQL is down" in ended.stderr) == (lm.FAILED, True)
    assert "PostgreSQL is down." in here.cli("status", status=lm.TO_DO)
    with here.step("PostgreSQL is back"):
        here.cli("apply")
    assert "PostgreSQL is down" not in here.run("status").stdout
    wait_until(lambda: status(ada) == 200, "the key is let in again", 60)
    operators = "the operator, or a key for emergencies"
    wait_until(lambda: used(here).get(operators) == [5, 0, 15], "what was asked is counted", 90)
    requests, failures, tokens = used(here)["Ada"]
    assert tokens == 3 * (requests - failures) > 6
    here.cli("direct", "revoke", "fire")
    assert status(fire) == 401


def status(client: openai.OpenAI) -> int:
    """How the smallest request is answered."""
    wanted: Any = {"model": "tiny", "messages": [{"role": "user", "content": "Hello?"}]}
    try:
        answer = client.chat.completions.create(**wanted)
    except openai.APIStatusError as error:
        return error.status_code
    assert answer.choices[0].message.content == "answer of host"
    return 200
