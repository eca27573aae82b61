"""The product's own story, end to end, on real containers with a real engine."""

from __future__ import annotations

import http.client
import threading
import time
import uuid
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import httpx
import openai
import pytest
from installation import Install, Installation

pytestmark = pytest.mark.docker
ANSWER = "Hello from a tiny model."
CANARY = f"canary-{uuid.uuid4().hex}"


def ask(client: openai.OpenAI, text: str = "Hello?") -> str:
    reply = client.chat.completions.create(
        model="chat", messages=[{"role": "user", "content": text}], temperature=0, max_tokens=20
    )
    return reply.choices[0].message.content or ""


def ask_streamed(client: openai.OpenAI, text: str = "Hello?") -> list[str]:
    stream = client.chat.completions.create(
        model="chat",
        messages=[{"role": "user", "content": text}],
        temperature=0,
        max_tokens=20,
        stream=True,
    )
    return [c.choices[0].delta.content for c in stream if c.choices and c.choices[0].delta.content]


class Hammer(threading.Thread):
    """A colleague who asks again and again, one plain request after one streamed."""

    def __init__(self, client: openai.OpenAI) -> None:
        super().__init__(name="hammer")
        self._client = client
        self._enough = threading.Event()
        self.pause = 4.0  # seconds: two cores must start an engine meanwhile
        self.answers = 0
        self.faults: list[str] = []

    def run(self) -> None:
        while not self._enough.wait(self.pause):
            try:
                replies = (ask(self._client), "".join(ask_streamed(self._client)))
            except (openai.OpenAIError, httpx.HTTPError) as error:
                self.faults.append(f"{datetime.now(UTC):%T} {type(error).__name__}: {error}")
            else:
                self.faults += [reply for reply in replies if reply != ANSWER]
                self.answers += 2

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        self.join()


def raw_status(installation: Installation, path: str, key: str) -> int:
    """The status of a path sent as it is: httpx would clean it."""
    edge = http.client.HTTPSConnection(
        "localhost", installation.https_port, context=installation.tls(), timeout=30
    )
    try:
        edge.request("GET", path, headers={"Authorization": f"Bearer {key}"})
        return edge.getresponse().status
    finally:
        edge.close()


def test_the_story_from_a_first_model_to_a_killed_server(  # noqa: PLR0915 - one story
    install: Install, tiny_models: Path
) -> None:
    here = install()
    with here.step("register and deploy a chat model"):
        the_first_model_is_deployed(here, tiny_models / "tiny-chat")
    with here.step("a colleague's key, and answers"):
        ada = here.create_key("Ada", "chat")
        answers_arrive_plain_and_streamed(here.openai(ada))
    with here.step("a direct key, straight to the engine"):
        past_the_gateway = a_way_past_the_gateway(here, ada)
    with here.step("what must be refused is refused"):
        only_valid_keys_pass(here)
        only_the_api_is_reachable(here, ada)
        leave_canaries(here, ada)
        said = here.logs()
    here.add("embed", tiny_models / "tiny-embed", "embedding")
    with here.step("a second model is deployed while the first is hammered"):
        no_request_is_dropped(here, ada, here.lines("deploy", "embed"))
        grace = here.create_key("Grace")
        assert embedding(here, grace)
    with here.step("the first is stopped, the second goes on"):
        here.cli("stop", "chat")
        it_is_gone(here.openai(ada))
        it_is_gone(past_the_gateway)
        assert embedding(here, grace)
        said |= {f"{name} later": text for name, text in here.logs().items()}
    with here.step("every container is killed; restore"):
        everything_comes_back(here)
        assert embedding(here, grace), "its key is from before: PostgreSQL kept it"
    with here.step("the first is started again"):
        here.cli("deploy", "chat")
        assert ask(here.openai(ada)) == ask(past_the_gateway) == ANSWER
        assert here.cli("plan") == "Nothing to do.\n"
    said |= {f"{name} last": text for name, text in here.logs().items()}
    nothing_private_was_written(here, said, keys=[ada, grace])


def the_first_model_is_deployed(here: Installation, weights: Path) -> None:
    here.add("chat", weights, more="--max-model-len 512")
    lines = here.cli("deploy", "chat").splitlines()
    assert any("is ready after" in line for line in lines)
    assert lines[-1].startswith("Done in")
    assert here.cli("plan") == "Nothing to do.\n"


def answers_arrive_plain_and_streamed(client: openai.OpenAI) -> None:
    chunks = ask_streamed(client)
    assert len(chunks) > 1
    assert "".join(chunks) == ask(client) == ANSWER


def a_way_past_the_gateway(here: Installation, virtual_key: str) -> openai.OpenAI:
    client = here.openai(here.create_direct_key("lab", "chat"), "/models/chat/v1")
    answers_arrive_plain_and_streamed(client)
    assert ask(client, CANARY) == ANSWER
    with pytest.raises(openai.AuthenticationError):
        ask(here.openai(virtual_key, "/models/chat/v1"))
    return client


def it_is_gone(client: openai.OpenAI) -> None:
    with pytest.raises((openai.NotFoundError, openai.BadRequestError)):
        ask(client)


def no_request_is_dropped(here: Installation, key: str, change: Iterable[str]) -> None:
    with Hammer(here.openai(key)) as hammer:
        for line in change:
            if "litellm" in line:  # from here on the road to the model is rebuilt
                hammer.pause = 0.02
        time.sleep(2)
    assert hammer.faults == []
    assert hammer.answers > 50


def everything_comes_back(here: Installation) -> None:
    for container in here.containers().values():
        container.kill()
    here.cli("restore")
    assert here.cli("plan") == "Nothing to do.\n"
    assert "llm-model-chat-0" not in here.containers(), "what was stopped stays stopped"


def embedding(here: Installation, key: str) -> list[float]:
    text = f"{CANARY} embedded"
    return here.openai(key).embeddings.create(model="embed", input=text).data[0].embedding


def only_valid_keys_pass(here: Installation) -> None:
    with pytest.raises(openai.AuthenticationError):
        ask(here.openai(f"sk-{CANARY}"))
    bob = here.create_key("Bob")
    assert ask(here.openai(bob)) == ANSWER
    here.cli("key", "revoke", "Bob")
    with pytest.raises(openai.AuthenticationError):
        ask(here.openai(bob))


def only_the_api_is_reachable(here: Installation, key: str) -> None:
    assert raw_status(here, "/v1/models", key) == 200
    # Each of these exists on LiteLLM or on the engine behind it.
    for path in ("/", "/key/list", "/metrics", "/health", "/health/readiness", "/model/info", "/ui",
                 "/docs", "/openapi.json", "/chat/completions", "/spend/logs"):  # fmt: skip
        assert raw_status(here, path, key) == 404, path
    # Caddy matches a cleaned path and forwards the raw one.
    for path in ("/key/../v1/models", "/v1/../key/list", "/v1/%2e%2e/key/list", "/v1//../key/list",
                 "/v1/..%2fkey/list"):  # fmt: skip
        assert raw_status(here, path, key) == 400, path
    answer = httpx.get(f"http://localhost:{here.http_port}/v1/models?a=1", trust_env=False)
    assert answer.status_code == 308
    assert answer.headers["location"] == f"{here.base_url}/v1/models?a=1"


def leave_canaries(here: Installation, key: str) -> None:
    """Prompts in every way that could end up in a log: answered, streamed, refused."""
    client = here.openai(key)
    assert ask(client, CANARY) == ANSWER
    assert "".join(ask_streamed(client, CANARY)) == ANSWER
    with pytest.raises(openai.BadRequestError):
        ask(client, f"{CANARY} " * 100)  # more than the engine's context
    with pytest.raises(openai.APIStatusError):
        client.chat.completions.create(
            model="absent", messages=[{"role": "user", "content": CANARY}]
        )


def nothing_private_was_written(here: Installation, said: dict[str, str], keys: list[str]) -> None:
    """No prompt and no key in a log, a generated file or the database's own dump."""
    secrets = here.state().secrets
    passwords = [secrets.master_key, secrets.salt_key, secrets.database_password]
    private = [CANARY, *keys, *(secret.get_secret_value() for secret in passwords)]
    for path in here.home.rglob("*"):
        # config.json alone holds secrets; the hub's cache is not ours to write.
        if path.is_file() and path.name != "config.json":
            said[str(path.relative_to(here.home))] = path.read_text(errors="replace")
    dump = here.container("llm-postgres").exec_run(["pg_dump", "-U", "litellm", "litellm"])
    assert dump.exit_code == 0
    assert b"LiteLLM_SpendLogs" in dump.output
    said["database"] = dump.output.decode(errors="replace")
    # It is searched where requests leave traces.
    assert "uvicorn.access POST 200" in said["llm-litellm-a"]
    assert "POST /v1/chat/completions" in said["llm-model-chat-0"]
    found = {(place, text[:12]) for place, log in said.items() for text in private if text in log}
    assert not found
