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
from load import Load, Outcome, Target, faults, summary

import llm_manager as lm

pytestmark = pytest.mark.docker

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


def edge(**settings: object) -> Change:
    """An edit of the edge that has no command of its own."""

    def change(here: Installation) -> None:
        for _ in here.manager().start(lm.configuring_edge(settings)).follow():
            pass

    return change


# A new feature of the gateway or the edge adds its line here.
CHANGES: tuple[tuple[str, Change], ...] = (
    ("another model is deployed", commands("deploy other")),
    ("a key is made", commands("key create Bob --model other")),
    ("that key is revoked", commands("key revoke Bob")),
    ("a second replica is added", commands("model set chat --replicas 2", "deploy chat")),
    ("the other model is stopped", commands("stop other")),
    ("the other model is removed", commands("model remove other")),
    ("both replicas are replaced", commands("restart chat")),
    ("one replica is taken away", commands("model set chat --replicas 1", "deploy chat")),
    ("another host name", commands("config set --hostname localhost --hostname b.test", "apply")),
    ("the open routes are opened", edge(open_routes=True)),
    ("the open routes are closed", edge(open_routes=False)),
    ("LiteLLM's version", commands(f"image set litellm {OTHER_LITELLM}", "apply")),
)


@pytest.mark.usefixtures("other_litellm")
def test_no_change_drops_a_request_and_a_plain_restart_does(
    engine_image: str, install: Install, tmp_path: Path, show: Callable[[str], None]
) -> None:
    here = serving(install(), engine_image, tmp_path)
    results: dict[str, list[Outcome]] = {}
    with Load(colleague(here, tmp_path)) as load:
        load.everyone_again()
        for title, change in CHANGES:
            with here.step(f"under load: {title}"):
                results[title] = under(load, lambda change=change: change(here))
        baseline = under(load, lambda: docker_restart(here))
    show(table(results, baseline))
    assert [fault for outcomes in results.values() for fault in faults(outcomes)] == []
    assert faults(baseline), "the load can see a dropped request"


def serving(here: Installation, image: str, folder: Path) -> Installation:
    weights = folder / "weights"
    weights.mkdir()
    (weights / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    for name in ("chat", "other"):
        here.cli("model", "add", name, "--path", str(weights), "--image", image)
    here.cli("deploy", "chat")
    return here


def colleague(here: Installation, folder: Path) -> Target:
    authority = folder / "root.crt"
    authority.write_text(here.authority())
    key = here.create_key("Ada", "chat")
    return Target(url=f"{here.base_url}/v1", key=key, model="chat", authority=authority)


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


def table(results: dict[str, list[Outcome]], baseline: Sequence[Outcome]) -> str:
    head = f"{'':32} {'requests':>9} {'streams':>8} {'failed':>7} {'slowest plain':>10}"
    rows = [f"{title:32} {summary(outcomes)}" for title, outcomes in results.items()]
    every = [outcome for outcomes in results.values() for outcome in outcomes]
    total = f"{'all changes':32} {summary(every)}"
    plain = f"{'baseline: docker restart':32} {summary(baseline)}"
    said = [f"  {title}: {fault}" for title, outcomes in {**results, "baseline": baseline}.items()
            for fault in faults(outcomes)]  # fmt: skip
    return "\n".join(["requests under change", head, *rows, total, plain, *said])
