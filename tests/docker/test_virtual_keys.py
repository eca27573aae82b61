"""Keys and groups on the real LiteLLM and PostgreSQL, measured from outside through Caddy."""

from __future__ import annotations

import csv
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import docker
import pytest
from installation import Install, Installation
from upstreams import Upstream

import llm_manager as lm

pytestmark = pytest.mark.docker
SOON = 60.0  # LiteLLM writes what was spent, and forgets cached keys, now and then


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with Upstream("host", 0) as server:
        threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def here(install_for_module: Install, upstream: Upstream) -> Installation:
    """An endpoint whose models are a provider's: no engine has to start."""
    here = install_for_module()
    url = f"http://{lm.HOST_NAME}:{upstream.server_port}"
    here.cli("provider", "add", "mine", "--kind", "openai", "--url", url)
    for name in ("tiny", "other"):
        here.cli("route", "set", name, "--member", f"mine/{name}")
    here.cli("apply")
    return here


@pytest.fixture(scope="module")
def keys(here: Installation) -> lm.Keys:
    return here.manager().keys


class Colleague:
    """Who has a key."""

    def __init__(self, here: Installation, secret: Any) -> None:
        self.secret = secret if isinstance(secret, str) else lm.reveal(secret)
        self._client = here.http(self.secret)

    def ask(self, model: str = "tiny") -> int:
        """The status of a request."""
        body = {"model": model, "messages": [{"role": "user", "content": "Hello?"}]}
        return self._client.post("/v1/chat/completions", json=body).status_code

    def soon(self, status: int) -> None:
        """What LiteLLM only sees after a while."""
        until(lambda: self.ask() == status, f"it answers {status}")


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline, f"not in {SOON} s: {what}"
        time.sleep(0.3)


@pytest.fixture
def colleague(here: Installation, keys: lm.Keys) -> Callable[..., Colleague]:
    def make(alias: str, **settings: Any) -> Colleague:
        raw = {"alias": alias, **settings}
        return Colleague(here, keys.create(lm.parse_key_settings(raw)))

    return make


Make = Callable[..., Colleague]


def test_a_key_answers_until_it_is_blocked_or_revoked(colleague: Make, keys: lm.Keys) -> None:
    ada = colleague("Ada")
    assert ada.ask() == 200
    keys.block("Ada")
    ada.soon(401)
    assert "blocked" in lm.diagnosis_text(keys.why(ada.secret, "tiny"))
    keys.block("Ada", blocked=False)
    ada.soon(200)
    keys.revoke("Ada")
    ada.soon(401)
    assert "No key is like that" in lm.diagnosis_text(keys.why(ada.secret, "tiny"))


def test_a_model_that_is_not_allowed_is_refused(colleague: Make, keys: lm.Keys) -> None:
    ada = colleague("Models", models=("tiny",))
    assert (ada.ask("tiny"), ada.ask("other")) == (200, 403)
    keys.edit("Models", {"models": ("other",)})
    ada.soon(403)
    assert ada.ask("other") == 200
    assert "allows only other: 403" in lm.diagnosis_text(keys.why("Models", "tiny"))


def test_a_key_expires_and_can_be_extended(colleague: Make, keys: lm.Keys) -> None:
    ada = colleague("Expiring", expires_at=lm.utc_now() + timedelta(seconds=8))
    assert ada.ask() == 200
    ada.soon(401)
    assert "expired" in lm.diagnosis_text(keys.why("Expiring", ""))
    keys.edit("Expiring", {"expires_at": None})
    ada.soon(200)


def test_requests_and_tokens_per_minute_are_limited(colleague: Make) -> None:
    for limit in ({"rpm_limit": 2}, {"tpm_limit": 5}):
        ada = colleague(f"Limited {limit}", **limit)
        statuses = [ada.ask() for _ in range(5)]
        assert statuses[0] == 200
        assert statuses[-1] == 429


def test_requests_at_a_time_are_limited(colleague: Make, upstream: Upstream) -> None:
    ada = colleague("Parallel", parallel=2)
    upstream.command({"hold": True})
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(ada.ask) for _ in range(6)]
        try:
            until(lambda: sum(each.done() for each in asked) == 4, "the others are refused")
        finally:
            upstream.command({})
        assert sorted(each.result() for each in asked) == [200] * 2 + [429] * 4
    assert ada.ask() == 200


def test_a_budget_of_tokens_is_used_up(colleague: Make, keys: lm.Keys) -> None:
    ada = colleague("Budget", budget=0.000001, period="day")
    assert ada.ask() == 200
    ada.soon(422)  # which clients do not try again, as they would a 429
    (key,) = [key for key in keys.all() if key.settings.alias == "Budget"]
    assert key.settings.period == "day"
    assert key.resets_at is not None
    until(lambda: "used up" in lm.diagnosis_text(keys.why("Budget", "")), "it is told")
    keys.edit("Budget", {"budget": 100.0})
    ada.soon(200)


def test_another_secret_leaves_the_old_one_a_while(
    here: Installation, colleague: Make, keys: lm.Keys
) -> None:
    old = colleague("Rotated", rpm_limit=1000, email="ada@example.org")
    settings, secret = keys.rotate("Rotated", timedelta(seconds=10))
    new = Colleague(here, secret)
    assert (old.ask(), new.ask()) == (200, 200)
    assert (settings.rpm_limit, settings.email) == (1000, "ada@example.org")
    old.soon(401)
    assert new.ask() == 200
    _, secret = keys.rotate("Rotated", timedelta())
    new.soon(401)
    assert Colleague(here, secret).ask() == 200


def test_a_group_shares_its_limits_and_ends_at_once(colleague: Make, keys: lm.Keys) -> None:
    keys.set_group({"name": "ML", "models": ("tiny",), "rpm_limit": 4})
    ada, bob = (colleague(name, group="ML") for name in ("Ada of ML", "Bob of ML"))
    assert ada.ask("other") in {401, 403}
    statuses = [each.ask() for _ in range(4) for each in (ada, bob)]
    assert statuses[0] == 200
    assert statuses[-1] == 429
    keys.set_group({"name": "ML", "rpm_limit": None})
    ada.soon(200)
    keys.block_group("ML")
    ada.soon(401)
    bob.soon(401)
    assert "group ML is blocked" in lm.diagnosis_text(keys.why("Ada of ML", ""))
    keys.block_group("ML", blocked=False)
    ada.soon(200)
    assert keys.extend_group("ML", lm.utc_now() + timedelta(days=30)) == 2
    assert {k.settings.expires_at for k in keys.all() if k.settings.group == "ML"} != {None}
    assert keys.revoke_group("ML") == 2
    ada.soon(401)
    bob.soon(401)
    assert "ML" not in {group.settings.name for group in keys.groups()}


def test_a_list_becomes_keys_or_nothing(here: Installation, keys: lm.Keys, tmp_path: Path) -> None:
    here.cli("group", "set", "Course", "--budget", "1", "--period", "month")
    people = tmp_path / "people.csv"
    people.write_text("name,email,group\nEve,eve@example.org,\nMallory,no address,\n")
    before = {key.settings.alias for key in keys.all()}
    refused = here.run("key", "import", str(people), "--group", "Course")
    assert "line 3" in refused.stderr
    people.write_text("name,email,group\nEve,eve@example.org,\nTrent,,Nowhere\n")
    refused = here.run("key", "import", str(people), "--group", "Course")
    assert "no group called 'Nowhere'" in refused.stderr
    assert {key.settings.alias for key in keys.all()} == before
    people.write_text("name,email\nEve,eve@example.org\nTrent,\n")
    printed = here.cli("key", "import", str(people), "--group", "Course", "--days", "90")
    rows = list(csv.DictReader(io.StringIO(printed)))
    assert [(row["name"], row["group"]) for row in rows] == [("Eve", "Course"), ("Trent", "Course")]
    assert [Colleague(here, row["key"]).ask() for row in rows] == [200, 200]
    listed = json.loads(here.cli("key", "list", "--json"))
    assert [key["group"] for key in listed if key["alias"] == "Eve"] == ["Course"]
    assert "Eve" in here.cli("key", "why", "Eve", "--model", "tiny")


def test_when_litellm_is_restarted_in_the_middle_of_a_list_nobody_has_a_key(
    here: Installation, docker_client: docker.DockerClient
) -> None:
    manager = here.manager()
    people = "name\n" + "".join(f"Student {n}\n" for n in range(400))
    before = {key.key_hash for key in manager.keys.all()}
    job = manager.keys.create_many(people, {})
    until(lambda: job.view().done_part is not None and job.view().progress > "1", "some are made")
    seen = manager.observe()
    docker_client.containers.get(lm.gateway_name(here.state(), seen.edge.slot)).restart(timeout=1)
    with pytest.raises(lm.GatewayError, match="No key was made"):
        list(job.follow())
    assert {key.key_hash for key in manager.keys.all()} == before


def test_what_is_there_already_is_refused(colleague: Make, keys: lm.Keys) -> None:
    colleague("Twice")
    with pytest.raises(lm.RefusedError, match="already"):
        colleague("Twice")
    colleague("Once")
    with pytest.raises(lm.GatewayError, match="refuses"):
        keys.edit("Once", {"alias": "Twice"})
    with pytest.raises(lm.RefusedError, match="no group called"):
        keys.edit("Once", {"group": "Nowhere"})
