"""Terminal: the live view, the facts for scripts, and the rates that both show."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from fcntl import ioctl
from pathlib import Path
from typing import Any

import pytest
import rich.console
from builders import (
    GPU_0,
    GPU_1,
    NOW,
    SECRET_MARK,
    Golden,
    a_model,
    a_secret,
    a_state,
    as_wished,
    but,
    ended,
    on_gpus,
    the,
)
from fakes import Server, until
from hypothesis import given
from hypothesis import strategies as st

import llm_manager as lm

CHAT, EMBED = lm.ContainerName("llm-model-chat-0"), lm.ContainerName("llm-model-embed-0")
GATEWAY = lm.ContainerName("llm-litellm-a")


# --- rates ---------------------------------------------------------------------------------------


def counts(**changes: float) -> lm.Counts:
    """What a busy engine has counted."""
    given: dict[str, float] = {
        "prompt_tokens_total": 1000, "generation_tokens_total": 300, "request_success_total": 4,
        "prefix_cache_queries_total": 1000, "prefix_cache_hits_total": 250,
    }  # fmt: skip
    return {(name, ""): value for name, value in (given | changes).items()}


def buckets(**found: float) -> lm.Counts:
    """`le_0_25=3`: three waits of at most 0.25 s."""
    return {
        ("time_to_first_token_seconds_bucket", name[3:].replace("_", ".").replace("Inf", "+Inf")): n
        for name, n in found.items()
    }


def window(*looks: tuple[float, Mapping[str, lm.Counts]], seconds: float = 10) -> lm.RateWindow:
    made = lm.RateWindow(seconds=seconds)
    for at, counted in looks:
        made.feed(at, counted)
    return made


def test_rates_are_what_was_counted_between_two_looks() -> None:
    later = counts(
        prompt_tokens_total=1400, generation_tokens_total=400, request_success_total=6,
        prefix_cache_queries_total=1400, prefix_cache_hits_total=550,
    )  # fmt: skip
    before, now = buckets(le_0_1=5, le_0_2=5, le_Inf=5), buckets(le_0_1=5, le_0_2=9, le_Inf=9)
    rise = window((5, {"a": {**counts(), **before}}), (9, {"a": {**later, **now}})).rise(["a"])
    assert lm.engine_rates(rise) == lm.EngineRates(
        prompt_tokens=100, generated_tokens=25, requests=0.5, prefix_hit_part=0.75,
        first_token_p95=pytest.approx(0.1 + 0.1 * 3.8 / 4),
    )  # fmt: skip


def test_replicas_are_added_up_and_one_that_says_nothing_is_left_out() -> None:
    both = window(
        (0, {"a": counts(), "b": counts(), "c": counts()}),
        (2, {"a": counts(prompt_tokens_total=1010), "b": counts(prompt_tokens_total=1030)}),
    )
    assert lm.engine_rates(both.rise(["a", "b", "c"])).prompt_tokens == 20
    assert both.rise(["c"]) is None
    assert lm.engine_rates(None) == lm.EngineRates()


def test_an_idle_engine_has_rates_of_nothing_and_no_hit_rate() -> None:
    idle = lm.engine_rates(window((0, {"a": counts()}), (2, {"a": counts()})).rise(["a"]))
    assert (idle.prompt_tokens, idle.generated_tokens, idle.requests) == (0, 0, 0)
    assert (idle.prefix_hit_part, idle.first_token_p95) == (None, None)


def test_a_counter_that_went_backwards_is_unknown_and_never_negative() -> None:
    reset = window((0, {"a": counts()}), (2, {"a": counts(generation_tokens_total=299)}))
    assert reset.rise(["a"]) is None
    gone = window((0, {"a": counts()}), (2, {"a": {("prompt_tokens_total", ""): 2000.0}}))
    assert gone.rise(["a"]) is None


def test_the_window_moves_on_with_the_looks() -> None:
    steps = window(
        *((float(at), {"a": counts(prompt_tokens_total=at * at)}) for at in range(0, 31, 2))
    )
    rise = steps.rise(["a"])
    assert rise is not None
    assert rise.seconds == 10
    assert rise.total("prompt_tokens_total") == 30**2 - 20**2
    rare = window((0, {"a": counts()}), (100, {"a": counts(prompt_tokens_total=1500)}))
    assert lm.engine_rates(rare.rise(["a"])).prompt_tokens == 5
    assert window((0, {"a": counts()})).rise(["a"]) is None
    assert lm.RateWindow().rise(["a"]) is None


# As Prometheus 3 computes them: its tests of histogram_quantile, and by hand.
KNOWN = [(0.1, 50.0), (0.2, 70.0), (1.0, 110.0), (math.inf, 110.0)]


@pytest.mark.parametrize(
    ("part", "seconds"), [(0.1, 0.022), (50 / 110, 0.1), (60 / 110, 0.15), (0.9, 0.78), (1.0, 1.0)]
)
def test_a_quantile_is_read_out_of_a_histogram(part: float, seconds: float) -> None:
    assert lm.histogram_quantile(part, reversed(KNOWN)) == pytest.approx(seconds)


def test_a_quantile_beyond_the_last_bound_is_that_bound() -> None:
    assert lm.histogram_quantile(0.95, [(1, 1), (5, 2), (math.inf, 100)]) == 5
    assert lm.histogram_quantile(0.5, [(-1, 9), (1, 9), (math.inf, 9)]) == -1


@pytest.mark.parametrize(
    "found",
    [[], [(math.inf, 3.0)], [(1.0, 3.0), (2.0, 4.0)], [(1.0, 0.0), (math.inf, 0.0)]],
    ids=["none", "one bucket", "without the last", "nothing counted"],
)
def test_no_quantile_is_made_up(found: list[tuple[float, float]]) -> None:
    assert lm.histogram_quantile(0.95, found) is None


@given(
    st.lists(st.floats(0.001, 9.99), min_size=1, max_size=50), st.sampled_from([0.5, 0.9, 0.95, 1])
)
def test_a_quantile_lies_in_the_bucket_of_its_value(waits: list[float], part: float) -> None:
    bounds = [0.01, 0.1, 0.5, 1, 2.5, 5, 10]
    found = [(bound, float(sum(w <= bound for w in waits))) for bound in [*bounds, math.inf]]
    value = sorted(waits)[math.ceil(part * len(waits) - 1e-9) - 1]
    above = next(bound for bound in bounds if value <= bound)
    quantile = lm.histogram_quantile(part, found)
    assert quantile is not None
    assert max((b for b in bounds if b < above), default=0) <= quantile <= above + 1e-9


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 1e6)), max_size=8), st.floats(0.01, 1))
def test_a_quantile_of_anything_is_within_the_bounds(
    found: list[tuple[float, float]], part: float
) -> None:
    quantile = lm.histogram_quantile(part, [*found, (math.inf, 5.0)])
    assert quantile is None or 0 <= quantile <= max((bound for bound, _ in found), default=0)


# --- the board -----------------------------------------------------------------------------------


def a_load(running: int, waiting: int = 0, cached: float = 0.0) -> lm.EngineLoad:
    return lm.EngineLoad(running=running, waiting=waiting, tokens=0, cached=cached)


def a_gpu(index: int, uuid: lm.GpuUuid, *clients: lm.GpuClient, **changes: Any) -> lm.Gpu:
    told: dict[str, Any] = {
        "uuid": uuid, "index": index, "name": "NVIDIA H100", "memory_mib": 81559,
        "memory_used_mib": 60000, "temperature_c": 64, "utilisation_percent": 97,
        "power_w": 412.4, "power_limit_w": 700.0, "clients": clients,
    }  # fmt: skip
    return lm.Gpu(**told | changes)


def a_busy_server(**changes: Any) -> lm.Snapshot:
    """Two models, one of which died; two GPUs, on one of which a stranger sits; a provider."""
    state = a_state(
        a_model(placement=on_gpus(GPU_0)), a_model("embed", type="embedding"),
        a_model("spare", wish="stopped"),
        providers=(lm.Provider(name="lab", kind="ollama", base_url="http://10.0.0.7:11434"),),
    )  # fmt: skip
    observed = as_wished(state)
    dead = ended(the(observed, EMBED))
    gpus = (
        a_gpu(0, GPU_0),
        a_gpu(1, GPU_1, lm.GpuClient(pid=4711, name="python"), power_w=None, memory_used_mib=None),
    )
    lab = lm.ProviderHealth(provider="lab", verdict="answers", models=("a",), latency_ms=12.3)
    figures = lm.DeploymentFigures(failures={lm.failure_reason("504"): 7})
    deploying = lm.AuditEntry(
        who="root", channel="console", what="Deploy embed", result="failed",
        started_at=NOW - timedelta(hours=1), fault="It was\x1b[2J killed.\nGive it more memory.",
    )  # fmt: skip
    job = lm.JobView(
        id="ab12", title="Download big", started_at=NOW - timedelta(seconds=50), finished_at=None,
        lines=(), fault=None, kind="task", progress="3 of 9 GiB",
    )  # fmt: skip
    told: dict[str, Any] = {
        "taken_at": NOW, "state": state, "observed": but(observed, dead), "plan": None,
        "hardware": lm.Hardware(gpus=gpus), "jobs": (job,), "providers": (lab,),
        "failed": (deploying,),
        "traffic": lm.Rise(seconds=10, counts={("successes", ""): 31, ("failures", "x"): 2}),
        "rates": {lm.ModelName("chat"): lm.EngineRates(
            prompt_tokens=12345, generated_tokens=341.6, requests=3.1, prefix_hit_part=0.42,
            first_token_p95=0.321)},
        "health": lm.RouteHealth(
            loads={CHAT: a_load(5, 2, 0.37)},
            figures=lm.GatewayFigures(deployments={"chat@llm-model-chat-0": figures})),
    }  # fmt: skip
    return lm.Snapshot(**told | changes)


def drawn(snapshot: lm.Snapshot, width: int, height: int, **console: Any) -> str:
    screen = rich.console.Console(
        file=io.StringIO(), width=width, height=height, force_terminal=True, legacy_windows=False,
        **{"no_color": True, "color_system": None} | console,
    )  # fmt: skip
    screen.print(lm.draw(lm.board(snapshot, width, height)))
    assert isinstance(screen.file, io.StringIO)
    return re.sub(r" +$", "", screen.file.getvalue(), flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("width", "height", "name"), [(80, 24, "top-80x24.txt"), (160, 50, "top-160x50.txt")]
)
def test_the_board_fits_its_terminal(golden: Golden, width: int, height: int, name: str) -> None:
    golden(name, drawn(a_busy_server(), width, height))


@given(width=st.integers(1, 200), height=st.integers(1, 60), models=st.integers(0, 40))
def test_no_line_is_too_long_and_none_is_too_many(width: int, height: int, models: int) -> None:
    state = a_state(*(a_model(f"model-{n}") for n in range(models)))
    crowded = replace(a_busy_server(), state=state, observed=as_wished(state))
    lines = drawn(crowded, width, height).splitlines()
    assert len(lines) <= height
    assert max(map(len, lines), default=0) <= width


def test_what_is_left_out_is_counted() -> None:
    state = a_state(*(a_model(f"model-{n:02}") for n in range(30)))
    shown = lm.board(replace(a_busy_server(), state=state), 80, 24)
    (models,) = [table for table in shown.tables if table.headers[0] == "Model"]
    named = [row[0] for row in models.rows]
    assert named[:2] == ["model-00", "model-01"]
    assert named[-1] == f"… {30 - len(named) + 1} more"
    assert {table.headers[0] for table in shown.tables} == {"When", "Model", "GPU", "Provider"}


@given(st.lists(st.integers(0, 30), max_size=6), st.integers(-3, 60))
def test_lines_are_shared_and_none_is_wasted(wanted: list[int], height: int) -> None:
    given = lm.share_lines(wanted, height)
    assert all(0 <= lines <= most for lines, most in zip(given, wanted, strict=True))
    assert sum(given) == min(max(height, 0), sum(wanted))


@given(st.text())
def test_no_text_steers_the_terminal(text: str) -> None:
    assert lm.one_line(text).isprintable()
    said = lm.AuditEntry(who="x", channel="API", what=text, started_at=NOW, result="failed")
    assert "\x1b" not in drawn(a_busy_server(failed=(said,)), 80, 24)


def test_colours_are_for_terminals_that_have_them() -> None:
    assert "\x1b[32mready" in drawn(
        a_busy_server(), 80, 24, no_color=False, color_system="standard"
    )


def test_a_healthy_server_shows_no_trouble() -> None:
    state = a_state(a_model())
    calm = lm.Snapshot(taken_at=NOW, state=state, observed=as_wished(state), plan=None)
    shown = lm.board(calm, 80, 24)
    assert shown.lines == (
        "1 of 1 models ready; https://localhost/v1 answers.",
        "- requests/s, - failed · tokens/s: - in, - out · 0 running, 0 waiting",
    )
    assert [table.headers[0] for table in shown.tables] == ["Model"]


def test_without_docker_the_board_says_so_in_one_line() -> None:
    absent = lm.DockerAbsentError("Docker does not answer.", advice="Start it.")
    state = a_state(a_model())
    shown = lm.board(
        lm.Snapshot(taken_at=NOW, state=state, observed=None, plan=None, faults=(absent,)), 80, 24
    )
    assert shown.lines[0] == "Docker does not answer."
    assert shown.tables[0].rows == [["now", "Docker does not answer. Start it."]]
    assert shown.tables[1].rows[0][:3] == ["chat", "unknown", "-"]


# --- facts for scripts ---------------------------------------------------------------------------

NUMBER, TEXT = (int, float, type(None)), (str,)
SCHEMA: dict[str, Any] = {
    "schema_version": int, "taken_at": TEXT, "health": TEXT, "summary": TEXT,
    "endpoint": {"url": TEXT, "wish": TEXT, "answers": (bool, type(None)),
                 "successes_per_second": NUMBER, "failures_per_second": NUMBER},
    "models": [{
        **dict.fromkeys(
            ("name", "type", "phase", "served_as", "source", "placement", "since"), TEXT),
        **dict.fromkeys(
            ("requests_running", "requests_waiting", "requests_per_second",
             "prompt_tokens_per_second", "generated_tokens_per_second", "kv_cache_part",
             "prefix_cache_hit_part", "time_to_first_token_p95_seconds"), NUMBER),
    }],
    "containers": [dict.fromkeys(("container", "part", "state", "image"), TEXT)],
    "gpus": [{
        **dict.fromkeys(("index", "memory_mib", "memory_used_mib", "utilisation_percent",
                         "temperature_c", "power_w", "power_limit_w"), NUMBER),
        "uuid": TEXT, "name": (str, type(None)), "models": [TEXT],
    }],
    "providers": [{"name": TEXT, "kind": TEXT, "health": TEXT, "latency_ms": NUMBER}],
    "job": {"id": TEXT, "title": TEXT, "kind": TEXT, "started_at": TEXT, "progress": TEXT,
            "done_part": NUMBER},
    "attention": [TEXT],
}  # fmt: skip


def check(schema: Any, facts: Any, where: str = "status") -> None:
    """The facts have exactly these keys, and their values are of these types."""
    match schema:
        case dict():
            assert set(facts) == set(schema), where
            for key, part in schema.items():
                check(part, facts[key], f"{where}.{key}")
        case [part]:
            for at, fact in enumerate(facts):
                check(part, fact, f"{where}[{at}]")
        case _:
            assert isinstance(facts, schema), (where, facts)


def names_in(schema: Any) -> set[str]:
    match schema:
        case dict():
            return set(schema).union(*map(names_in, schema.values()))
        case [part]:
            return names_in(part)
        case _:
            return set()


def test_the_status_is_as_its_schema_and_the_reference_names_all_of_it() -> None:
    facts = json.loads(json.dumps(lm.status_facts(a_busy_server())))
    check(SCHEMA, facts)
    assert facts["models"][0]["generated_tokens_per_second"] == 341.6
    assert facts["models"][0]["kv_cache_part"] == 0.37
    assert facts["gpus"][1]["power_w"] is None
    assert facts["endpoint"]["successes_per_second"] == 3.1
    assert (facts["job"]["title"], facts["job"]["progress"]) == ("Download big", "3 of 9 GiB")
    page = (lm.PROGRAM.parent / "docs" / "reference.md").read_text()
    part = page[page.index("`llm status --json` and") :].partition("\n## ")[0]
    assert names_in(SCHEMA) <= set(re.findall(r"`(\w+)`", part))


def test_a_status_of_which_nothing_is_known_is_as_its_schema_too() -> None:
    fault = lm.ManagerError("Nothing answers.", advice="Wait.")
    blind = lm.Snapshot(taken_at=NOW, state=None, observed=None, plan=None, faults=(fault,))
    facts = lm.status_facts(blind)
    check(
        SCHEMA | {"job": type(None), "endpoint": dict.fromkeys(SCHEMA["endpoint"], type(None))},
        facts,
    )
    assert (facts["health"], facts["attention"]) == ("broken", ["Nothing answers. Wait."])


def test_health_is_ok_attention_or_broken() -> None:
    state = a_state(a_model())
    calm = lm.Snapshot(taken_at=NOW, state=state, observed=as_wished(state), plan=None)
    assert lm.server_health(calm) == "ok"
    assert lm.server_health(a_busy_server()) == "attention"
    observed = as_wished(state)
    down = but(observed, ended(the(observed, "llm-caddy")))
    assert lm.server_health(replace(calm, observed=down)) == "broken"
    stopped = replace(state, endpoint="stopped")
    assert lm.endpoint_answers(replace(calm, state=stopped, observed=down)) is None


# --- a server that is looked at ------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Server:
    """One that serves a model."""
    made = Server(tmp_path)
    source = {"kind": "hub", "repository": "a/b"}
    made.manager.register({"name": "chat", "type": "chat", "source": source})
    made.do(lm.deploying("chat"))
    return made


def count(server: Server, tokens: int, failures: int) -> None:
    """The engine has made so many tokens, and the gateway has seen so many failures."""
    server.world.loads[CHAT] = lm.EngineLoad(
        running=1, waiting=0, tokens=tokens,
        counts={("generation_tokens_total", ""): float(tokens)},
    )  # fmt: skip
    figures = lm.DeploymentFigures(successes=tokens, failures={"it refuses": failures})
    server.world.figures[GATEWAY] = lm.GatewayFigures(deployments={"chat@x": figures})


def test_two_looks_make_a_rate(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm, "RATE_PAUSE", 0.0)
    lookout = lm.Lookout(server.manager)
    count(server, 100, 1)
    first = lookout.look()
    assert first.rates == {"chat": lm.EngineRates()}
    assert first.traffic is None
    count(server, 150, 3)
    second = lookout.look()
    made = second.rates[lm.ModelName("chat")].generated_tokens
    assert made is not None
    assert second.traffic is not None
    assert made == pytest.approx(50 / second.traffic.seconds)
    assert second.traffic.total("failures") == 2
    assert second.traffic.total("successes") == 50
    assert lm.Lookout(server.manager).once().rates[lm.ModelName("chat")].generated_tokens == 0


def test_the_console_knows_the_same_rates_until_nobody_tells_any_more(server: Server) -> None:
    count(server, 100, 1)
    watch = lm.Watch(server.manager, seconds=0.001, stalls=lm.Stalls(pause=0.001))

    def told(successes: float) -> bool:
        seen = watch.latest()
        made = seen.rates.get(lm.ModelName("chat"), lm.EngineRates()).generated_tokens
        total = seen.traffic and seen.traffic.total("successes")
        return total == successes and made is not None and (made > 0) == (successes > 0)

    assert until(lambda: told(0))
    count(server, 150, 1)
    assert until(lambda: told(50))
    server.world.loads.clear()
    server.world.figures.clear()
    assert until(lambda: watch.latest().traffic is None)
    assert until(lambda: watch.latest().rates[lm.ModelName("chat")] == lm.EngineRates())
    watch.close()


def test_a_restarted_engine_counts_anew(server: Server) -> None:
    lookout = lm.Lookout(server.manager)
    told = lm.EngineLoad(running=0, waiting=0, tokens=9, counts=counts())
    server.world.loads[CHAT] = told
    lookout.look()
    server.world.clock.sleep(5)
    server.do(lm.restarting("chat"))
    again = lookout.look()
    assert again.rates == {"chat": lm.EngineRates()}, "although its counters did not fall"
    assert lookout.look().rates[lm.ModelName("chat")].generated_tokens == 0


def test_what_failed_lately_is_shown(server: Server) -> None:
    with pytest.raises(lm.RefusedError):
        server.manager.start(lm.deploying("nobody"))
    (failed,) = lm.Lookout(server.manager).look().failed
    assert failed.what == "Deploy nobody"


def test_what_another_process_works_on_is_shown(server: Server) -> None:
    assert server.store.under_way() == ()
    script = (
        "import sys, pathlib, llm_manager as lm\n"
        "store = lm.StateStore(pathlib.Path(sys.argv[1]))\n"
        "end = store.acquire('Deploy big'), store.acquire('Download it', kind='task')\n"
        "print('held', flush=True); sys.stdin.read(); [release() for release in end]\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(server.store.home)],
        cwd=lm.PROGRAM.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as other:  # fmt: skip
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        server.store.audit.begin("Deploy big", "ab12")
        server.world.deaf.add(CHAT)
        server.world.containers[CHAT].log.append("INFO Starting to load model a/b")
        seen = lm.Lookout(server.manager).look()
        assert [(job.id, job.title, job.kind, job.progress) for job in seen.jobs] == [
            ("ab12", "Deploy big", "change", "chat: loading weights"),
            ("", "Download it", "task", ""),
        ]  # fmt: skip
        assert lm.status_facts(seen)["job"]["title"] == "Deploy big"
        watch = lm.Watch(server.manager, seconds=3600)
        going = [job.title for job in watch.latest().jobs if job.finished_at is None]
        assert going == ["Deploy big", "Download it"]
        watch.close()
        other.communicate("")
    assert server.store.under_way() == (), "although the files and their notes stay"


def test_what_hangs_is_left_behind_and_said(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = threading.Event()
    monkeypatch.setattr(lm, "STATUS_SECONDS", 0.05)
    monkeypatch.setattr(server.manager, "snapshot", never.wait)
    seen = lm.look_once(server.manager)
    never.set()
    assert lm.server_health(seen) == "broken"
    assert "something hangs" in lm.status_facts(seen)["attention"][0]
    assert lm.status_facts(seen)["models"][0]["phase"] == "unknown"


def test_a_look_that_fails_is_said_and_the_next_one_may_do(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = iter([ZeroDivisionError("by zero")])
    whole = server.manager.snapshot

    def snapshot() -> lm.Snapshot:
        for fault in faults:
            raise fault
        return whole()

    monkeypatch.setattr(server.manager, "snapshot", snapshot)
    with contextlib.closing(lm.LiveLook(server.manager, 0.2)) as look:
        assert until(lambda: look.fault == "The last look failed: by zero")
        assert look.shown() is None
        assert until(lambda: look.latest is not None)
    assert look.fault == ""


# --- the real program in a real terminal ---------------------------------------------------------

LEAVES = "\x1b[?1049l"  # the alternate screen
SHOWS_CURSOR = "\x1b[?25h"


class Terminal:
    """A pseudo-terminal with the program in it, on a server whose Docker does not answer."""

    def __init__(self, home: Path, *arguments: str, **variables: str) -> None:
        self.master, self.slave = pty.openpty()
        self.resize(80, 24)
        self.before = termios.tcgetattr(self.slave)
        self.said = ""
        environment = {k: v for k, v in os.environ.items() if k not in {"COLUMNS", "LINES"}} | {
            "LLM_MANAGER_HOME": str(home), "DOCKER_HOST": "unix:///nonexistent",
            "TERM": "xterm-256color",
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, str(lm.PROGRAM), "top", *arguments], env=environment | variables,
            stdin=self.slave, stdout=self.slave, stderr=self.slave, start_new_session=True,
        )  # fmt: skip

    def resize(self, width: int, height: int) -> None:
        ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def read(self, seconds: float) -> str:
        if select.select([self.master], [], [], seconds)[0]:
            self.said += os.read(self.master, 65536).decode(errors="replace")
        return self.said

    def until(self, text: str) -> str:
        give_up = time.monotonic() + 60
        while text not in self.read(0.2):
            assert self.process.poll() is None, self.said
            assert time.monotonic() < give_up, self.said
        return self.said

    def end(self) -> int:
        give_up = time.monotonic() + 60
        while self.process.poll() is None:
            self.read(0.1)
            assert time.monotonic() < give_up, self.said
        self.read(0.1)
        return self.process.returncode

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """One with a model that was never deployed."""
    store = lm.StateStore(tmp_path / "home")
    model = a_model(wish="stopped")
    store.save(lm.registering(model).edit(store.ensure(fixed_names=True)))
    return store.home


@pytest.mark.parametrize("ending", ["q", "\x03", signal.SIGTERM, signal.SIGHUP], ids=str)
def test_the_terminal_is_as_before_however_it_ends(home: Path, ending: str | int) -> None:
    terminal = Terminal(home, "--interval", "0.5")
    with contextlib.closing(terminal):
        terminal.until("Docker does not answer")
        assert termios.tcgetattr(terminal.slave) != terminal.before, "keys come one by one"
        if isinstance(ending, int):
            terminal.process.send_signal(ending)
        elif ending == "\x03":
            terminal.process.send_signal(signal.SIGINT)
        else:
            os.write(terminal.master, ending.encode())
        assert terminal.end() == lm.DONE
        assert termios.tcgetattr(terminal.slave) == terminal.before
        assert terminal.said.rindex(LEAVES) > terminal.said.rindex("quits")
        assert SHOWS_CURSOR in terminal.said[terminal.said.rindex("quits") :]
        assert "Traceback" not in terminal.said


def test_another_size_of_the_terminal_is_another_board(home: Path) -> None:
    terminal = Terminal(home)
    with contextlib.closing(terminal):
        assert "Placement" not in terminal.until("unknown")
        terminal.resize(160, 50)
        terminal.until("Placement")
        os.write(terminal.master, b"xq")
        assert terminal.end() == lm.DONE


def test_a_dumb_terminal_gets_plain_text_again_and_again(home: Path) -> None:
    terminal = Terminal(home, "--interval", "0.5", TERM="dumb")
    with contextlib.closing(terminal):
        terminal.until("Docker does not answer")
        terminal.said = terminal.said.partition("Docker does not answer")[2]
        terminal.until("Docker does not answer")
        os.write(terminal.master, b"q")
        assert terminal.end() == lm.DONE
        assert "\x1b" not in terminal.said


def test_no_color_is_no_colour(home: Path) -> None:
    terminal = Terminal(home, NO_COLOR="1")
    with contextlib.closing(terminal):
        terminal.until("Docker does not answer")
        os.write(terminal.master, b"Q")
        assert terminal.end() == lm.DONE
        assert not re.search(r"\x1b\[[\d;]*3\d", terminal.said)


@pytest.mark.parametrize("wrong", ["0", "0.1", "nan", "inf", "soon"])
def test_an_interval_that_makes_no_sense_is_refused(wrong: str) -> None:
    with pytest.raises(SystemExit) as ended_with:
        lm.build_parser().parse_args(["top", "--interval", wrong])
    assert ended_with.value.code == lm.WRONG_USAGE


# --- the log, for programs -----------------------------------------------------------------------


def logged(text: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in text.splitlines()]


class Recorded(logging.Handler):
    """What the journal would get of each record."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(lm.JsonLines())
        self.lines: list[dict[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(json.loads(self.format(record)))


@pytest.fixture
def journal() -> Iterator[list[dict[str, str]]]:
    handler, level = Recorded(), lm.log.level
    lm.log.addHandler(handler)
    lm.log.setLevel(logging.INFO)
    yield handler.lines
    lm.log.removeHandler(handler)
    lm.log.setLevel(level)


def test_a_line_tells_when_who_and_what(journal: list[dict[str, str]]) -> None:
    lm.log.warning("%d of\n%s", 3, "“x”")
    (line,) = journal
    assert datetime.fromisoformat(line.pop("ts")).tzinfo is UTC
    assert line == {"level": "WARNING", "logger": "llm_manager", "message": "3 of\n“x”"}


def test_a_line_of_a_job_tells_its_id_model_and_step(
    server: Server, journal: list[dict[str, str]]
) -> None:
    job = server.manager.start(lm.restarting("chat"))
    assert job.wait(10)
    assert {line["job"] for line in journal} == {job.id}
    (created,) = [line for line in journal if "create llm-model-chat-0" in line["message"]]
    assert (created["model"], created["step"]) == ("chat", "CreateContainer")
    assert lm.DOING.get() == {}


def test_an_exception_is_one_field_of_its_line(server: Server) -> None:
    def work(_: lm.Control) -> None:
        raise ZeroDivisionError("no\nhalves")

    handler = Recorded()
    lm.log.addHandler(handler)
    job = server.manager.start_task("Break", work)
    assert job.wait(10)
    lm.log.removeHandler(handler)
    (line,) = handler.lines
    assert (line["level"], line["job"], line["message"]) == ("ERROR", job.id, "job Break failed")
    assert line["exception"].startswith("Traceback")
    assert line["exception"].endswith("ZeroDivisionError: no\nhalves")


def test_no_secret_is_in_a_line(journal: list[dict[str, str]]) -> None:
    secret = f"sk-{SECRET_MARK}-0123456789abcdef"
    fault = ValueError(f"Authorization: Bearer {SECRET_MARK}", secret, a_secret("master"))
    lm.log.error("%s %s", secret, a_secret("master"), exc_info=fault)
    assert "Bearer" in journal[0]["exception"]
    assert SECRET_MARK not in json.dumps(journal)
    assert journal[0]["message"] == "sk-… **********"


def program(home: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k not in {"JOURNAL_STREAM", "LLM_MANAGER_LOG"}}
    own = {"LLM_MANAGER_HOME": str(home), "DOCKER_HOST": "unix:///nonexistent"}
    return subprocess.run(
        [sys.executable, str(lm.PROGRAM), *arguments],
        env=kept | own | variables, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "variables"),
    [(["--log-json", "plan"], {}), (["plan"], {"LLM_MANAGER_LOG": "json"})],
    ids=["by argument", "by environment"],
)
def test_a_failure_is_a_line_of_json_where_that_is_wished(
    home: Path, arguments: list[str], variables: dict[str, str]
) -> None:
    ended = program(home, *arguments, **variables)
    assert ended.returncode == lm.FAILED
    (line,) = logged(ended.stderr)
    assert (line["level"], line["logger"]) == ("ERROR", "llm_manager")
    assert line["message"].startswith("Docker does not answer")


def test_the_journal_gets_json_and_whoever_stands_beside_it_gets_sentences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LLM_MANAGER_LOG", raising=False)
    errors = os.fstat(2)
    monkeypatch.setenv("JOURNAL_STREAM", f"{errors.st_dev}:{errors.st_ino}")
    assert lm.is_json_wished()
    monkeypatch.setenv("LLM_MANAGER_LOG", "text")
    assert not lm.is_json_wished()
    monkeypatch.delenv("LLM_MANAGER_LOG")
    monkeypatch.setenv("JOURNAL_STREAM", f"{errors.st_dev}:{errors.st_ino + 1}")
    assert not lm.is_json_wished()
    assert program(tmp_path, "plan").stderr.startswith("Docker does not answer")


def test_the_console_writes_nothing_but_json(home: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with subprocess.Popen(
        [sys.executable, str(lm.PROGRAM), "--log-json", "serve", "--port", str(port)],
        env=os.environ | {"LLM_MANAGER_HOME": str(home), "DOCKER_HOST": "unix:///nonexistent"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as serving:  # fmt: skip
        assert serving.stderr is not None
        first = serving.stderr.readline()
        serving.send_signal(signal.SIGTERM)
        out, errors = serving.communicate(timeout=60)
    lines = logged(first + errors)
    assert lines[0]["message"].startswith(f"LLM Manager listens on 127.0.0.1:{port};")
    assert out == ""


def test_warnings_and_ends_of_threads_are_lines_of_json_as_well() -> None:
    script = (
        "import sys, threading, warnings, llm_manager as lm\n"
        "lm.set_up_logging(as_json=True)\n"
        "warnings.warn('old')\n"
        "thread = threading.Thread(target=lambda: 1 / 0, name='pulse')\n"
        "thread.start(); thread.join()\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=lm.PROGRAM.parent, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    warned, broken = logged(ended.stderr)
    assert (warned["logger"], "UserWarning: old" in warned["message"]) == ("py.warnings", True)
    assert broken["message"] == "the thread pulse ended"
    assert broken["exception"].endswith("ZeroDivisionError: division by zero")
