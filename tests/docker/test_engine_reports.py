"""What a real engine tells about itself: its start, its memory, and that it hangs."""

from __future__ import annotations

import http.client
import json
import re
import resource
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from installation import Install, Installation

import llm_manager as lm

pytestmark = pytest.mark.docker
CHAT = lm.ModelName("chat")
ENGINE = lm.ContainerName("llm-model-chat-0")
AGE = r"(\d+ min ?)?(\d+ s)?"
LATER = rf"^  {AGE}: .*(, ready in about {AGE}|, longer than last time \(.+\))$"


@pytest.fixture(scope="module")
def served(install_for_module: Install, tiny_models: Path) -> Installation:
    """An installation that serves one chat model."""
    here = install_for_module()
    here.add("chat", tiny_models / "tiny-chat")
    with here.step("a first start"):
        said = here.cli("deploy", "chat")
    assert "llm-model-chat-0 is ready after" in said
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


HELLO = {"model": "chat", "messages": [{"role": "user", "content": "Hello?"}], "temperature": 0}


def leave(served: Installation, key: str) -> None:
    """Ask for a long answer, and be gone when the engine is at it."""
    manager = served.manager()
    seen = manager.observe().containers.values()
    (engine,) = [container for container in seen if container.role == "engine"]
    edge = http.client.HTTPSConnection("localhost", served.https_port, context=served.tls())
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    body = HELLO | {"max_tokens": 1000, "ignore_eos": True}
    edge.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    until(lambda: (load := manager.loads([engine])[engine.name]) and load.running)
    edge.close()


def test_every_token_of_the_engine_is_accounted_for_or_explained(  # noqa: PLR0915 - one account
    served: Installation,
) -> None:
    usage, key = served.manager().usage, served.create_key("Ada")
    ada = served.openai(key)

    def tally() -> lm.EngineTally:
        (found,) = usage.tallies()
        return found

    def counted_since(before: lm.EngineTally) -> tuple[int, int, int, int]:
        now = tally()
        return (
            now.counted - before.counted, now.accounted - before.accounted,
            now.broken_off - before.broken_off, now.guessed - before.guessed,
        )  # fmt: skip

    def ask(client: openai.OpenAI = ada, **more: Any) -> Any:
        return client.chat.completions.create(**HELLO | more)

    def counts() -> lm.EngineCounts:
        seen = served.manager().observe().containers.values()
        (load,) = served.manager().loads([c for c in seen if c.role == "engine"]).values()
        assert load is not None
        return load.used

    before, at_first = tally(), counts()
    assert (before.accounted, before.broken_off) == (0, 0)
    assert before.difference > 0, "it was seen to be ready"
    with served.step("whole answers are accounted for to the token"):
        said = ask().usage
        for _ in range(2):
            assert "".join(c.choices[0].delta.content or "" for c in ask(stream=True) if c.choices)
        *_, last = ask(stream=True, stream_options={"include_usage": True})
        assert last.usage.total_tokens == said.total_tokens
        for refused in ({"max_tokens": 10**6}, {"model": "no-such-model"}):
            with pytest.raises(openai.APIStatusError):
                ask(**refused)
        leave(served, key)  # the engine goes on to the end
        at_length = [{"role": "user", "content": "word " * 60}]
        _, again = [ask(messages=at_length, max_tokens=5).usage for _ in range(2)]
        cached = again.prompt_tokens_details.cached_tokens
        assert 0 < cached < again.prompt_tokens
        whole = 4 * said.total_tokens + said.prompt_tokens + 1000 + 2 * again.total_tokens
        until(lambda: counted_since(before) == (whole, whole, 0, 0), 120)
        since = counts().since(at_first)
        assert since.prompt + since.completion == whole
        assert (since.cached, since.requests) == (cached, 7)
    with served.step("streams that are broken off"):
        before = tally()
        for _ in range(2):
            with ask(stream=True, max_tokens=1000, extra_body={"ignore_eos": True}) as stream:
                next(iter(stream))
        until(lambda: counted_since(before)[2] == 2, 120)
        counted, accounted, _, guessed = counted_since(before)
        assert 0 < guessed == accounted
        assert 2 * said.prompt_tokens < counted < 1000, "it stopped when it noticed"
    with served.step("what comes past the gateway, and several answers"):
        before = tally()
        past = ask(served.openai(served.create_direct_key("past", "chat"), "/models/chat/v1")).usage
        several = ask(n=2, temperature=1).usage  # only sampled ones
        differs = past.total_tokens + several.prompt_tokens
        until(lambda: counted_since(before)[1] == several.total_tokens, 120)
        assert counted_since(before) == (
            several.total_tokens + differs, several.total_tokens, 0, 0
        )  # fmt: skip
    (row,) = json.loads(served.cli("usage", "--engines", "--json"))
    now = tally()
    assert row["accounted_for"] == f"{now.accounted:,}"
    used = {row["name"]: row for row in json.loads(served.cli("usage", "--json"))}["Ada"]
    assert (used["failures"], used["cached_tokens"]) == (2, cached)
    assert used["prompt_tokens"] + used["completion_tokens"] >= now.accounted


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def test_the_live_view_and_the_status_tell_what_the_engine_did(
    served: Installation, show: Callable[[str], None]
) -> None:
    ada = served.openai(served.create_key("Eve"))
    lookout = lm.Lookout(served.manager(), lm.RateWindow(seconds=3600))
    until(lambda: lookout.look().traffic is not None)  # LiteLLM tells, and the engine
    body = HELLO | {"messages": [{"role": "user", "content": "word " * 60}], "max_tokens": 20}
    said = [ada.chat.completions.create(**body).usage for _ in range(6)]
    until(lambda: (rise := lookout.look().traffic) and rise.total("successes") == len(said))
    last = lookout.look()
    assert last.observed is not None
    (engine,) = [seen for seen in last.observed.containers.values() if seen.role == "engine"]
    rise = lookout.window.rise([lm.run_key(engine)])
    assert rise is not None
    assert rise.total("generation_tokens_total") == sum(u.completion_tokens for u in said)
    assert rise.total("prompt_tokens_total") == sum(u.prompt_tokens for u in said)
    assert rise.total("request_success_total") == len(said)
    rates = last.rates[CHAT]
    assert rates == lm.engine_rates(rise)
    assert 0 < (rates.prefix_hit_part or 0) < 1, "all but the first began with the same blocks"
    assert (rates.first_token_p95 or 0) > 0
    began = cpu_seconds()
    for _ in range(5):
        lookout.look()
    show(f"top: {(cpu_seconds() - began) / 5 * 1000:.0f} ms of processor time a look")


def test_the_live_view_and_the_status_outlive_what_hangs(served: Installation) -> None:
    facts = json.loads(served.cli("status", "--json"))
    assert (facts["health"], facts["attention"], facts["job"]) == ("ok", [], None)
    assert facts["models"][0]["generated_tokens_per_second"] == 0
    assert re.search(r"^chat +ready +0 +0 +0 +0 ", served.cli("top"), re.MULTILINE)
    frozen = [each for name, each in served.containers().items()
              if name == ENGINE or (each.status == "running" and "litellm" in name)]  # fmt: skip
    assert len(frozen) == 2
    for container in frozen:
        container.pause()
    try:
        ill = json.loads(served.cli("status", "--json", status=lm.TO_DO))
        assert ill["models"][0]["phase"] == "failed", "what is frozen does not run"
        assert ill["models"][0]["requests_running"] is None
        assert ill["attention"]
        assert re.search(r"^chat +failed +- ", served.cli("top"), re.MULTILINE)
    finally:
        for container in frozen:
            container.unpause()
    until(lambda: served.run("status").returncode == lm.DONE)


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

    stalls, closed = lm.Stalls(pause=0.5, seconds=3, patience=3), threading.Event()
    pulse = lm.Pulse(manager, lambda: replace(snapshot), closed, stalls)
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
    closed.set()


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
