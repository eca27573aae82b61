"""Programs: whatever the REST API's own document allows or forbids, sent to it by Schemathesis."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
import uvicorn
from fakes import Server, until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import positive_data_acceptance
from test_api import CHAT, Program

import llm_manager as lm

# For each operation, of what is allowed and of what is not: the largest bodies have most ways.
EXAMPLES = {"GET": 6, "DELETE": 6, "POST": 12, "PUT": 12, "PATCH": 12}
LARGE, OF_LARGE = ("POST /api/v1/plan", "POST /api/v1/jobs", "POST /api/v1/models"), 30
# Names in a well-formed request may be anybody's: no schema says which are there. A 503 is judged
# by this test itself.
LEFT_OUT = [positive_data_acceptance, not_a_server_error]
KNOWN = ("chat", "lab", "smart", "Ada", "ML", "1")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """One with something of every kind, so that well-formed requests find what they name."""
    program = Program(Server(tmp_path_factory.mktemp("home")))
    manager = program.manager
    manager.register(CHAT)
    manager.save(lm.providing({"name": "lab", "kind": "openai", "base_url": "http://10.0.0.7"}))
    manager.save(lm.routing({"name": "smart", "members": ["chat", "lab/x"]}))
    manager.keys.set_group({"name": "ML"})
    manager.keys.create(lm.KeySettings(alias="Ada", group="ML"))
    manager.save(lm.granting_direct(lm.new_direct_key("lab")))
    manager.save(lm.pricing({"model": "chat", "prompt": 1.0, "completion": 2.0}))
    return program


@pytest.fixture(scope="module")
def address(program: Program) -> Iterator[str]:
    """Where it listens, as `serve` does."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        server = uvicorn.Server(uvicorn.Config(program.app, log_level="critical"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        assert until(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def token(program: Program) -> dict[str, str]:
    return {"Authorization": f"Bearer {program.secret}"}


@pytest.fixture(scope="module")
def schema(address: str, token: dict[str, str]) -> Any:
    found = schemathesis.openapi.from_url(f"{address}/api/v1/openapi.json", headers=token)
    # Every request shows the token: a case that is nonsense for the want of one would be none.
    found.config.generation.update(with_security_parameters=False)
    return found


OPERATIONS = {
    f"{method.upper()} {path}": operation
    for path, operations in (
        lm.build_api(None, None).openapi()["paths"].items()  # type: ignore[arg-type]
    )
    for method, operation in operations.items()
}
# Only what has a body or a query can be nonsense: any text may be a name.
CASES = [
    (name, mode)
    for name, operation in OPERATIONS.items()
    for mode in GenerationMode
    if mode is GenerationMode.POSITIVE
    or "requestBody" in operation
    or any(each["in"] == "query" for each in operation.get("parameters", ()))
]


def known_named(case: Any, name: str | None) -> None:
    """Put what is there in the place of an invented name, but for what is to be new."""
    if case.operation.label == "POST /api/v1/models":
        return
    for place in (case.path_parameters, case.body):
        if name and isinstance(place, dict) and isinstance(place.get("name"), str):
            place["name"] = name


@pytest.mark.parametrize(("operation", "mode"), CASES, ids=str)
def test_nothing_breaks_it_and_no_nonsense_is_accepted(
    schema: Any, token: dict[str, str], operation: str, mode: GenerationMode
) -> None:
    strategy = schema.find_operation_by_label(operation).as_strategy(generation_mode=mode)
    statuses = []

    @settings(
        max_examples=OF_LARGE if operation in LARGE else EXAMPLES[operation.split(maxsplit=1)[0]],
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[*HealthCheck],
    )
    @given(case=strategy, name=st.sampled_from([None, *KNOWN]))
    def send(case: Any, name: str | None) -> None:
        if mode is GenerationMode.POSITIVE:
            known_named(case, name)
        answer = case.call_and_validate(headers=token, excluded_checks=LEFT_OUT)
        # What was stopped or removed before does not answer, and that is said in words.
        assert answer.status_code < 500 or (
            answer.status_code == 503 and set(answer.json()) == {"fact", "advice"}
        )
        statuses.append(answer.status_code)

    send()
    assert statuses


@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_operation_does_anything_without_a_token(
    program: Program, address: str, operation: str
) -> None:
    before = program.manager.state(), len(program.manager.audit.entries())
    method, path = operation.replace("{", "").replace("}", "").split()
    for shown in ({}, {"Authorization": "Bearer admin-x"}):
        answer = httpx.request(method, address + path, json={}, headers=shown, trust_env=False)
        assert answer.status_code == 401
    assert before == (program.manager.state(), len(program.manager.audit.entries()))


def test_what_it_took_left_a_sound_state(program: Program, address: str) -> None:
    """The last: whatever was sent before, nothing is half made."""
    assert until(lambda: all(job.finished_at for job in program.manager.jobs()))
    state = program.server.store.load()
    assert lm.parse_state(lm.render_state(state)) == state
    assert {e.who for e in program.manager.audit.entries() if e.channel == "API"} <= {"ci"}
    assert httpx.get(f"{address}/api/v1/status", trust_env=False).status_code == 401
