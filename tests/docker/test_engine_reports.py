"""What a real engine tells about itself: its start, its memory, and that it hangs."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from installation import Install, Installation

import llm_manager as lm

pytestmark = pytest.mark.docker
CHAT = lm.ModelName("chat")
ENGINE = lm.ContainerName("llm-model-chat-0")
PHASE = r"^  \d+ s: (starting|loading weights.*|warming up|ready soon)$"
LATER = r"^  \d+ s: .*(, ready in about \d+ s|, longer than last time \(.+\))$"


@pytest.fixture(scope="module")
def served(install_for_module: Install, tiny_models: Path) -> Installation:
    """An installation that serves one chat model."""
    here = install_for_module()
    here.add("chat", tiny_models / "tiny-chat")
    with here.step("a first start"):
        said = here.cli("deploy", "chat")
    assert re.search(PHASE, said, re.MULTILINE), said
    return here


def test_what_the_engine_reported_is_remembered(served: Installation) -> None:
    log = served.container(ENGINE).logs().decode()
    tokens, context, concurrency = re.findall(
        r"CPU KV cache size: ([\d,]+) tokens, .* for ([\d,]+) tokens per request: ([\d.]+)x", log
    )[-1]
    manager = served.manager()
    measured = manager.weights.measured(manager.state().model("chat"))
    assert measured is not None
    assert f"{measured.kv_cache_tokens:,}" == tokens
    assert f"{measured.context:,}" == context
    assert f"{measured.concurrency:.2f}" == concurrency
    # The engine rounds 64 MiB to 0.06 GiB.
    assert measured.kv_cache_mib == pytest.approx(64, abs=6)
    assert measured.peak_mib is None, "there is no GPU"
    took = manager.observe().start_seconds[str(served.container(ENGINE).name)]
    assert measured.start_seconds == took


def test_the_next_start_says_when_it_will_be_done(served: Installation) -> None:
    with served.step("a restart with its time known"):
        said = served.cli("restart", "chat")
    assert re.search(LATER, said, re.MULTILINE), said


def signal_engine_core(served: Installation, signal: str) -> None:
    """To the process that computes; the one that speaks HTTP goes on."""
    script = f'for p in /proc/[0-9]*; do case "$(cat $p/comm)" in VLLM::EngineCor*) \
        kill -{signal} "${{p#/proc/}}"; echo found;; esac; done'
    found = served.container(ENGINE).exec_run(["sh", "-c", script])
    assert found.output.decode().split() == ["found"]


def until(true: Callable[[], object], seconds: float = 60) -> None:
    give_up = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < give_up
        time.sleep(0.1)


def test_an_engine_that_hangs_is_reported_and_the_report_goes_when_it_works_again(
    served: Installation,
) -> None:
    manager = served.manager()
    snapshot = manager.snapshot()
    assert snapshot.observed is not None
    (engine,) = [c for c in snapshot.observed.containers.values() if c.role == "engine"]
    key = lm.reveal(manager.state().secrets.engine_key)

    def long_request() -> int:
        body = {"model": "chat", "prompt": "a", "max_tokens": 3000, "ignore_eos": True}
        answer = httpx.post(
            f"http://{engine.address}:{lm.ENGINE_PORT}/v1/completions",
            json=body, headers={"Authorization": f"Bearer {key}"}, timeout=240, trust_env=False,
        )  # fmt: skip
        return int(answer.raise_for_status().json()["usage"]["completion_tokens"])

    def load() -> lm.EngineLoad:
        told = manager.loads([engine])[engine.name]
        assert told is not None
        return told

    looks = [snapshot]
    stalls = lm.Stalls(pause=0.5, seconds=3, patience=3)
    pulse = lm.Pulse(manager, lambda: replace(looks[0]), stalls)
    with served.step("an engine hangs, and works again"), ThreadPoolExecutor() as pool:
        before = load().tokens
        request = pool.submit(long_request)
        until(lambda: load().running and load().tokens > before)
        signal_engine_core(served, "STOP")
        try:
            until(lambda: CHAT in pulse.hung)
            assert re.fullmatch(
                r"chat has \d requests? running and has made no token for \d+ s, and does not "
                r"answer a request of one token\. Restart it; its log may say why\.",
                pulse.hung[CHAT],
            )
            container = served.container(ENGINE)
            assert (container.id, container.status) == (engine.container_id, "running")
        finally:
            signal_engine_core(served, "CONT")
        until(lambda: not pulse.hung)
        assert request.result() == 3000, "nothing of the request is lost"
    looks[0] = lm.Snapshot(taken_at=lm.utc_now(), state=None, observed=None, plan=None)


def test_what_an_engine_said_when_it_died_is_kept_beside_its_next_start(
    served: Installation,
) -> None:
    signal_engine_core(served, "KILL")
    until(lambda: served.container(ENGINE).status == "exited")
    why = served.manager().logs.why_ended("chat")
    assert why.startswith("it was killed, as the kernel does")
    with served.step("an engine that died is started again"):
        served.cli("apply")
    said = served.cli("logs", "chat", "--previous", "--search", "EXITED UNEXPECTEDLY")
    assert re.match(r"\d+: .*exited unexpectedly", said)
    log = served.home / "logs" / f"{served.container(ENGINE).name}.log"
    assert "Application startup complete" in log.read_text()
    assert "exited unexpectedly" not in log.read_text()
