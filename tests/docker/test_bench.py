"""What a real engine carries, against vLLM's own load generator run past the program."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from docker.models.containers import Container
from installation import Install, Installation

import llm_manager as lm

pytestmark = pytest.mark.docker
CHAT = lm.ModelName("chat")
PROMPT, OUTPUT, REQUESTS = 100, 40, 40
ASKED = ["--prompt-tokens", str(PROMPT), "--output-tokens", str(OUTPUT)]


@pytest.fixture(scope="module")
def served(install_for_module: Install, tiny_models: Path) -> Installation:
    """An engine alone: neither gateway nor database is between it and the load."""
    here = install_for_module()
    here.add("chat", tiny_models / "tiny-chat")
    manager = here.manager()
    manager.save(lm.deploying("chat"))
    plan = manager.plan(lm.applying())
    with here.step("an engine alone"):
        for stage in (plan.foundation, *plan.models):
            lm.apply_stage(stage, manager._tools, lm.Control(print))
    return here


@pytest.fixture
def engine(served: Installation) -> Container:
    return served.container("llm-model-chat-0")


def inside(engine: Container) -> set[str]:
    """Command lines of what runs in a container."""
    return {row[-1] for row in engine.top()["Processes"]}


def result_folders(engine: Container) -> list[str]:
    listed = engine.exec_run(["sh", "-c", "ls -d /tmp/tmp.* 2>/dev/null"])
    return listed.output.decode().split()


def until(found: Callable[[], bool]) -> None:
    """Wait for it, at most as long as a slow machine may take."""
    end = time.monotonic() + 120
    while not found():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.2)


def test_a_benchmark_is_measured_kept_and_shown(served: Installation, engine: Container) -> None:
    before = inside(engine), result_folders(engine)
    said = served.cli("bench", "chat", "--concurrency", "1,2", "--requests", "8", *ASKED, "--json")
    (result,) = json.loads(said)
    assert result["complete"]
    for rung, at_once in zip(result["rungs"], (1, 2), strict=True):
        assert (rung["concurrency"], rung["requests"], rung["failed"]) == (at_once, 8, 0)
        assert rung["prompt_tokens"] >= 8 * PROMPT
        assert rung["output_tokens"] == 8 * OUTPUT
        assert 0 < rung["ttft"]["p50"] <= rung["ttft"]["p95"] <= rung["ttft"]["p99"]
        assert rung["end_to_end"]["p50"] > rung["ttft"]["p50"] + rung["inter_token"]["p50"]
        assert (rung["others"], rung["energy_mj"]) == (0, None)
    assert (inside(engine), result_folders(engine)) == before, "something stayed in the container"
    assert result["name"] in served.cli("bench")
    assert "P95 TTFT (ms)" in served.cli("bench", "--show", result["name"])
