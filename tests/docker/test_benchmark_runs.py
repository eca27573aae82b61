"""What an engine carries: a real one, one whose speed is known, and what ends a measurement."""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import quantiles
from typing import Any

import docker
import httpx
import pytest
from installation import Install, Installation, paced_engine
from paced_engine.vllm import FIRST_SECONDS, NEXT_SECONDS

import llm_manager as lm

pytestmark = pytest.mark.docker
CHAT = lm.ModelName("chat")
ENGINE = lm.ContainerName("llm-model-chat-0")
PROMPT, OUTPUT, REQUESTS, AT_ONCE = 100, 40, 40, 2


def serve_alone(here: Installation, weights: Path) -> Installation:
    """An engine alone: neither gateway nor database is between it and the load."""
    here.add("chat", weights)
    manager = here.manager()
    manager.save(lm.deploying("chat"))
    plan = manager.plan(lm.applying())
    with here.step("an engine alone"):
        for stage in (plan.foundation, *plan.models):
            lm.apply_stage(stage, manager._tools, lm.Control(print))
    return here


@pytest.fixture(scope="module")
def served(install_for_module: Install, tiny_models: Path) -> Installation:
    """A real engine."""
    return serve_alone(install_for_module("real"), tiny_models / "tiny-chat")


@pytest.fixture(scope="module")
def paced(
    install_for_module: Install, tiny_models: Path, docker_client: docker.DockerClient
) -> Iterator[Installation]:
    """An engine that makes each token when its time has come, whatever else this machine does."""
    with paced_engine(docker_client) as image:
        here = install_for_module("paced")
        here.cli("image", "set", "vllm_cpu", image)
        yield serve_alone(here, tiny_models / "tiny-chat")
        here.destroy()


def generating(here: Installation) -> list[str]:
    """Command lines of load generators in the engine's container."""
    running = here.container(ENGINE).top()["Processes"]
    return [row[-1] for row in running if "bench serve" in row[-1]]


def folders(here: Installation) -> list[str]:
    """What load generators write their results in."""
    listed = here.container(ENGINE).exec_run(["sh", "-c", "ls -d /tmp/tmp.*"])
    return listed.output.decode().split() if listed.exit_code == 0 else []


def until(holds: Callable[[], object]) -> None:
    """Wait for it, as long as a slow machine may take."""
    end = time.monotonic() + 180
    while not holds():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.1)


def independent_run(here: Installation, *options: str) -> dict[str, Any]:
    """vLLM's load generator past the program, as its documentation says; its whole result."""
    script = (
        "OPENAI_API_KEY=$VLLM_API_KEY vllm bench serve --backend openai --port 8000 --model chat "
        "--tokenizer /model --dataset-name random --ignore-eos --percentile-metrics ttft,itl,e2el "
        '--metric-percentiles 50,95,99 --save-result --result-filename /tmp/other.json "$@" '
        ">/tmp/other.log 2>&1; cat /tmp/other.json; rm /tmp/other.*"
    )
    ended = here.container(ENGINE).exec_run(["sh", "-c", script, "sh", *options])
    found: dict[str, Any] = json.loads(ended.output)
    return found


def counted(here: Installation) -> dict[str, float]:
    """What the engine itself says that it has read, made and finished."""
    container = here.container(ENGINE)
    (network,) = container.attrs["NetworkSettings"]["Networks"].values()
    told = httpx.get(f"http://{network['IPAddress']}:8000/metrics", trust_env=False).text
    names = ("prompt_tokens_total", "generation_tokens_total", "e2e_request_latency_seconds_count")
    return {
        name: sum(map(float, re.findall(rf"^vllm:{name}\{{.*\}} (\S+)$", told, re.MULTILINE)))
        for name in names
    }


# --- a real engine -----------------------------------------------------------------------


def test_what_is_kept_is_what_the_load_generator_recorded_request_by_request(
    served: Installation, monkeypatch: pytest.MonkeyPatch, show: Callable[[str], None]
) -> None:
    manager, before = served.manager(), counted(served)
    copied = lm.LOAD_SCRIPT.replace("\ncd / ", "\ncp result.json /tmp/raw.json; cd / ")
    monkeypatch.setattr(lm, "LOAD_SCRIPT", copied)
    wish = lm.BenchmarkWish(
        models=(CHAT,), ladder=(AT_ONCE,), prompt_tokens=PROMPT, output_tokens=OUTPUT,
        requests=REQUESTS,
    )  # fmt: skip
    list(manager.benchmarks.start(wish).follow())
    (result,) = manager.benchmarks.results()
    (rung,) = result.rungs
    raw = json.loads(served.container(ENGINE).exec_run(["sh", "-c", "cat /tmp/raw.json"]).output)
    for figures, values in (
        (rung.ttft, raw["ttfts"]),
        (rung.inter_token, list(itertools.chain(*raw["itls"]))),
        (rung.end_to_end, raw["latencies"]),
    ):
        assert figures is not None
        cuts = quantiles((1000 * seconds for seconds in values), n=100, method="inclusive")
        assert (figures.p50, figures.p95, figures.p99) == pytest.approx(
            (cuts[49], cuts[94], cuts[98])
        )
    ends = map(sum, zip(raw["start_times"], raw["latencies"], strict=True))
    seconds = max(ends) - min(raw["start_times"])
    assert rung.requests_per_second == pytest.approx(REQUESTS / seconds, rel=0.05)
    assert rung.output_tokens_per_second == pytest.approx(REQUESTS * OUTPUT / seconds, rel=0.05)
    # The engine's own count has the requests that warmed it up, too: the first one, so many times.
    made = {name: after - before[name] for name, after in counted(served).items()}
    assert made["e2e_request_latency_seconds_count"] == REQUESTS + AT_ONCE
    assert made["generation_tokens_total"] == rung.output_tokens + AT_ONCE * OUTPUT
    warming = AT_ONCE * raw["input_lens"][0]
    assert made["prompt_tokens_total"] == rung.prompt_tokens + warming
    options = {"random-input-len": PROMPT, "random-output-len": OUTPUT, "num-prompts": REQUESTS,
               "max-concurrency": AT_ONCE, "num-warmups": AT_ONCE, "seed": 7}  # fmt: skip
    other = independent_run(served, *(f"--{name}={value}" for name, value in options.items()))
    ours = {"output_throughput": rung.output_tokens_per_second, "p50_e2el_ms": rung.end_to_end.p50}
    for name, figure in ours.items():
        ratio = figure / other[name]
        show(f"{name} beside an independent `vllm bench serve`, one run each: {ratio:.2f}")


def test_the_command_line_measures_keeps_and_shows(served: Installation) -> None:
    asked = ["--concurrency", "1,2", "--requests", "4", "--prompt-tokens", "50"]
    lines = served.popen("bench", "chat", *asked, "--output-tokens", "9", "--json")
    until(lambda: generating(served))
    key = served.state().secrets.engine_key.get_secret_value()
    assert not any(key in line for line in generating(served)), "others can see it"
    said, complained = lines.communicate(timeout=300)
    assert lines.returncode == 0, complained
    (result,) = json.loads(said)
    assert result["complete"]
    found = [(r["concurrency"], r["requests"], r["failed"]) for r in result["rungs"]]
    assert found == [(1, 4, 0), (2, 4, 0)]
    assert [rung["output_tokens"] for rung in result["rungs"]] == [36, 36]
    assert (folders(served), generating(served)) == ([], []), "something stayed in the container"
    assert result["name"] in served.cli("bench")
    beside = served.cli("bench", "--show", result["name"], "--within", "60000")
    assert "P95 TTFT (ms)" in beside
    assert f"{result['name']}: 2 or more requests at once" in beside


# --- one whose speed is known ----------------------------------------------------------------


def test_figures_are_within_5_percent_of_the_truth_and_of_an_independent_run(
    paced: Installation, show: Callable[[str], None]
) -> None:
    made, sent, at_once = 3, 4, 2
    wish = ["--requests", str(sent), "--prompt-tokens", "20", "--output-tokens", str(made)]
    options = {"random-input-len": 20, "random-output-len": made, "num-prompts": sent,
               "max-concurrency": at_once, "num-warmups": at_once}  # fmt: skip
    whole = FIRST_SECONDS + (made - 1) * NEXT_SECONDS
    # Others may use this machine: a wrong figure is wrong each time, a disturbed one is not.
    least: dict[tuple[str, str], float] = {}
    for _ in range(3):
        said = paced.cli("bench", "chat", "--concurrency", str(at_once), *wish, "--json")
        (rung,) = json.loads(said)[0]["rungs"]
        other = independent_run(paced, *(f"--{name}={value}" for name, value in options.items()))
        figures = {
            "p50_ttft_ms": (rung["ttft"]["p50"], 1000 * FIRST_SECONDS),
            "p50_itl_ms": (rung["inter_token"]["p50"], 1000 * NEXT_SECONDS),
            "p50_e2el_ms": (rung["end_to_end"]["p50"], 1000 * whole),
            "request_throughput": (rung["requests_per_second"], at_once / whole),
            "output_throughput": (rung["output_tokens_per_second"], at_once * made / whole),
        }
        for name, (ours, truth) in figures.items():
            for beside, theirs in (("the truth", truth), ("`vllm bench serve`", other[name])):
                off = round(abs(1 - ours / theirs), 3)
                least[name, beside] = min(off, least.get((name, beside), off))
        show(f"how far figures are off: {least}")
        if max(least.values()) <= 0.05:
            return
    pytest.fail(f"each is at least so far off: {least}")


@contextmanager
def measuring(manager: lm.Manager, here: Installation, *ladder: int) -> Iterator[lm.Job]:
    """A measurement while its last rung is under way."""
    wish = lm.BenchmarkWish(
        models=(CHAT,), ladder=ladder, prompt_tokens=20, output_tokens=2, requests=16
    )
    job = manager.benchmarks.start(wish)
    until(lambda: f"{ladder[-1]} at once" in job.control.progress or job.finished_at)
    until(lambda: generating(here) or job.finished_at)
    assert not job.finished_at, job.fault
    yield job


def test_a_cancel_ends_the_load_keeps_what_was_measured_and_frees_the_model(
    paced: Installation,
) -> None:
    manager = paced.manager()
    known = manager.benchmarks.results()
    with measuring(manager, paced, 16, 1000) as job:
        for other in (lm.restarting("chat"), lm.stopping("chat"), lm.removing("chat")):
            with pytest.raises(lm.BusyError, match="chat is being measured"):
                manager.start(other)
        with pytest.raises(lm.BusyError, match="A benchmark is under way, of chat"):
            paced.manager().benchmarks.start(lm.BenchmarkWish(models=(CHAT,)))
        assert paced.state().model("chat").wish == "running"
        job.cancel()
        until(lambda: job.finished_at)
    assert isinstance(job.fault, lm.CancelledError)
    assert (folders(paced), generating(paced)) == ([], [])
    (kept,) = [result for result in manager.benchmarks.results() if result not in known]
    assert [rung.concurrency for rung in kept.rungs] == [16]
    assert "cancelled" in kept.fault
    assert not manager._store.measured()


def test_a_killed_program_leaves_no_load_behind(paced: Installation) -> None:
    program = paced.popen("bench", "chat", "--concurrency", "1000", "--output-tokens", "9")
    until(lambda: generating(paced) or program.poll() is not None)
    program.kill()
    program.communicate()
    until(lambda: not generating(paced))
    until(lambda: not folders(paced))
    assert not paced.manager()._store.measured()


def test_an_engine_that_ends_while_it_is_measured_is_named_as_the_reason(
    paced: Installation,
) -> None:
    manager = paced.manager()
    with measuring(manager, paced, 1000) as job:
        paced.container(ENGINE).kill()
        until(lambda: job.finished_at)
    assert "chat stopped while it was measured with 1000 at once" in str(job.fault)
    with pytest.raises(lm.RefusedError, match="chat is not ready"):
        manager.benchmarks.start(lm.BenchmarkWish(models=(CHAT,)))
