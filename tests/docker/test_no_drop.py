"""No change drops a request of anybody else; a plain restart of LiteLLM, beside it, does."""

from __future__ import annotations

import io
import json
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import docker
import pytest
from installation import Install, Installation, built, slow_engine
from load import COLUMNS, Load, Outcome, Target, faults, summary
from pydantic import SecretStr

import llm_manager as lm

pytestmark = [pytest.mark.docker, pytest.mark.alone]

OTHER_LITELLM = f"llm-manager-litellm:{uuid.uuid4().hex[:8]}"


@pytest.fixture
def engine_image(docker_client: docker.DockerClient) -> Iterator[str]:
    with slow_engine(docker_client) as name:
        yield name


@pytest.fixture
def other_litellm(docker_client: docker.DockerClient) -> Iterator[None]:
    """The same program under another image, as a new version would be."""
    text = b'FROM llm-manager-test/litellm:latest\nLABEL version="another"\n'
    with built(docker_client, OTHER_LITELLM, fileobj=io.BytesIO(text)):
        yield


# --- what an operator may do while colleagues work ---

Change = Callable[[Installation], object]


def commands(*lines: str) -> Change:
    """Commands of the program, one after another."""
    return lambda here: [here.cli(*line.split()) for line in lines]


def made(change: lm.Change) -> Change:
    """What the console would start."""
    return lambda here: [*here.manager().start(change).follow()]


def route(**settings: object) -> Change:
    return made(lm.routing({"name": "chat", "members": ["chat"], **settings}))


ELSEWHERE = {"name": "elsewhere", "kind": "openai", "base_url": "http://elsewhere:9/v1"}
EVE = lm.DirectKey(name="eve", secret=SecretStr("sk-direct-of-eve"))
# A new feature of the gateway or the edge adds its line here.
CHANGES: tuple[tuple[str, Change], ...] = (
    ("another model is deployed", commands("deploy other")),
    ("a key is made", commands("key create Bob --model other")),
    ("that key is revoked", commands("key revoke Bob")),
    ("an alias is added", route(aliases=["talk"])),
    ("a fallback chain is added", route(aliases=["talk"], fallbacks=["other"])),
    ("the chain goes, the alias changes", route(aliases=["speak"])),
    ("the route goes", made(lm.unrouting("chat"))),
    ("a provider is added", made(lm.providing(ELSEWHERE))),
    ("the provider is removed", made(lm.unproviding("elsewhere"))),
    ("a direct key is added", made(lm.granting_direct(EVE))),
    ("a direct key is revoked", made(lm.revoking_direct("eve"))),
    ("the open routes are opened", commands("config set --open-routes yes", "apply")),
    ("the kill switch closes them", commands("config set --open-routes no", "apply")),
    ("a second replica is added", commands("model set chat --replicas 2", "deploy chat")),
    ("the other model is stopped", commands("stop other")),
    ("the other model is removed", commands("model remove other")),
    ("both replicas are replaced", commands("restart chat")),
    ("one replica is taken away", commands("model set chat --replicas 1", "deploy chat")),
    ("another host name", commands("config set --hostname localhost --hostname b.test", "apply")),
    ("LiteLLM's version", commands(f"image set litellm {OTHER_LITELLM}", "apply")),
)


@pytest.mark.usefixtures("other_litellm")
def test_no_change_drops_a_request_and_a_plain_restart_does(
    engine_image: str, install: Install, tmp_path: Path, show: Callable[[str], None]
) -> None:
    here = serving(install(), engine_image, tmp_path)
    results: dict[str, list[Outcome]] = {}
    baseline: list[Outcome] = []
    try:
        with Load(*ways_in(here, tmp_path)) as load:
            load.everyone_again()
            for title, change in CHANGES:
                with here.step(f"under load: {title}"):
                    results[title] = under(load, lambda change=change: change(here))
                assert not restarted(here), f"while {title}{restarted(here)}"
            baseline = under(load, lambda: docker_restart(here))
    finally:
        show(table(results, baseline))
    assert [fault for outcomes in results.values() for fault in faults(outcomes)] == []
    assert faults(baseline), "the load can see a dropped request"


def serving(here: Installation, image: str, folder: Path) -> Installation:
    weights = folder / "weights"
    weights.mkdir()
    (weights / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    for name in ("chat", "other"):
        here.cli("model", "add", name, "--path", str(weights), "--image", image,
                 "--open-route", "yes")  # fmt: skip
    here.cli("deploy", "chat")
    return here


def ways_in(here: Installation, folder: Path) -> tuple[Target, Target]:
    """A colleague's, by the gateway and straight to the engine."""
    authority = folder / "root.crt"
    authority.write_text(here.authority())
    key = here.create_key("Ada", "chat")
    direct = json.loads(here.cli("direct", "create", "ada", "--model", "chat", "--json"))["key"]
    return (
        Target(url=f"{here.base_url}/v1", key=key, model="chat", authority=authority),
        Target(url=f"{here.base_url}/models/chat/v1", key=direct, model="chat",
               authority=authority),
    )  # fmt: skip


def docker_restart(here: Installation) -> None:
    """What an operator without a second slot would do."""
    slots = [c for name, c in here.containers().items() if "litellm" in name]
    slots[0].restart(timeout=10)


def under(load: Load, change: Callable[[], object]) -> list[Outcome]:
    """What ended between a change's first moment and everybody's next whole answer."""
    begun = time.monotonic()
    change()
    until = load.everyone_again()
    return [outcome for outcome in tuple(load.outcomes) if begun <= outcome.ended <= until]


def restarted(here: Installation) -> str:
    """Which containers Docker had to start again, and their last words: nothing here stops one."""
    return "".join(
        f"\n  {name} was started again {times} times; it said: {here.logs()[name][-1500:]}"
        for name, container in here.containers().items()
        if (times := container.attrs["RestartCount"])
    )


def table(results: dict[str, list[Outcome]], baseline: Sequence[Outcome]) -> str:
    every = [outcome for outcomes in results.values() for outcome in outcomes]
    rows = {**results, "all changes": every, "baseline: docker restart": baseline}
    lines = [f"{title:36}{summary(outcomes)}" for title, outcomes in rows.items()]
    said = [f"  {title}: {fault}" for title, outcomes in {**results, "baseline": baseline}.items()
            for fault in faults(outcomes)]  # fmt: skip
    return "\n".join(["requests under change", f"{'':36}{COLUMNS}", *lines, *said])
