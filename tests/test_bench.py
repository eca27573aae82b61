"""Benchmarks: loads, ladders, what load generators said, comparisons, and the job that measures."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from statistics import quantiles
from typing import Any

import pytest
from builders import GPU_0, NOW, a_model
from fakes import Server
from hypothesis import given
from hypothesis import strategies as st

import llm_manager as lm

CHAT = lm.ModelName("chat")
LOGS = Path(__file__).parent / "logs"
RECORDED = (LOGS / "vllm-bench.json").read_text()
EMBEDDING = (LOGS / "vllm-bench-embedding.json").read_text()


def a_rung(concurrency: int = 1, p95: float = 100.0, **changes: Any) -> lm.Rung:
    times = lm.Milliseconds(p50=p95 / 2, p95=p95, p99=2 * p95)
    made = lm.Rung(
        concurrency=concurrency, started_at=NOW, seconds=2.0, requests=10, failed=0,
        prompt_tokens=1000, output_tokens=400, ttft=times, inter_token=times, end_to_end=times,
    )  # fmt: skip
    return replace(made, **changes)


def a_result(*rungs: lm.Rung, **changes: Any) -> lm.Benchmark:
    made = lm.Benchmark(
        model=CHAT, type="chat", container="llm-model-chat-0", image="vllm/vllm-openai:v0.30.0",
        started_at=NOW, load=lm.LOADS["chat"], ladder=(1, 2), rungs=rungs,
    )  # fmt: skip
    return replace(made, **changes)


def a_wish(**changes: Any) -> lm.BenchmarkWish:
    return lm.BenchmarkWish(**{"models": (CHAT,), "ladder": (1, 2), **changes})


# --- what is asked ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "ladder"), [("1,2,4", (1, 2, 4)), (" 8, 2 2\t1 ", (1, 2, 8)), ("1024", (1024,))]
)
def test_a_ladder_is_climbed_upwards_each_rung_once(text: str, ladder: tuple[int, ...]) -> None:
    assert lm.parse_ladder(text) == ladder


@pytest.mark.parametrize(
    "text",
    ["", None, "0,1", "1,two", "-1", "1.5", "1025", ",".join(map(str, range(1, 14))), "1,", "²"],
)
def test_what_is_no_ladder_is_refused(text: str | None) -> None:
    with pytest.raises(lm.InvalidError, match="ladder"):
        lm.parse_ladder(text)


def test_each_client_sends_several_requests_and_no_rung_fewer_than_it_has_clients() -> None:
    assert [a_wish().requests_at(n) for n in (1, 4, 16)] == [32, 32, 128]
    assert [a_wish(requests=10).requests_at(n) for n in (1, 16)] == [10, 16]


def test_a_load_is_of_the_models_type_and_what_was_typed_is_exact() -> None:
    chat, embed = a_model(), a_model(type="embedding")
    assert lm.load_of(a_wish(), chat, None) == lm.LOADS["chat"]
    assert lm.load_of(a_wish(), embed, None) == lm.LOADS["embedding"]
    assert lm.load_of(a_wish(profile="document"), embed, None).output_tokens == 0
    typed = lm.load_of(a_wish(prompt_tokens=9), chat, None)
    assert typed == lm.Load(prompt_tokens=9, output_tokens=250, spread=0.0)


@pytest.mark.parametrize("kind", ["rerank", "speech-to-text", "text-to-speech", "image"])
def test_kinds_that_cannot_be_measured_are_refused(kind: str) -> None:
    with pytest.raises(lm.RefusedError, match=f"{kind} model, which cannot be measured"):
        lm.load_of(a_wish(), a_model(type=kind), None)


def test_a_load_that_makes_nothing_or_does_not_fit_the_context_is_refused() -> None:
    with pytest.raises(lm.RefusedError, match="makes no token"):
        lm.load_of(a_wish(profile="embedding"), a_model(), None)
    with pytest.raises(lm.RefusedError, match="up to 1275 tokens; the context of chat is 1274"):
        lm.load_of(a_wish(), a_model(), 1274)
    assert lm.load_of(a_wish(), a_model(), 1275)


# --- what is run, and what it says -----------------------------------------------------------


def command(model: lm.Model, **changes: Any) -> list[str]:
    load = lm.load_of(a_wish(), model, None)
    asked = {"prompts": 32, "weights": "/model", "seed": 1, **changes}
    return lm.load_command(model, load, 4, **asked)


def test_the_load_generator_gets_the_load_and_no_key() -> None:
    words = command(a_model())
    assert words[words.index("vllm") :][:3] == ["vllm", "bench", "serve"]
    given_options = dict(itertools.pairwise(words))
    assert given_options["--max-concurrency"] == "4"
    assert given_options["--num-prompts"] == "32"
    assert given_options["--random-input-len"] == "600"
    assert "--ignore-eos" in words
    assert not any("sk-" in word for word in words)
    assert "--ignore-eos" not in command(a_model(type="embedding"))


def test_the_load_generator_reads_prompts_as_its_engine_was_told_to() -> None:
    told = ("--tokenizer", "a/b", "--max-model-len", "8k", "--tokenizer_mode=mistral",
            "--trust-remote-code")  # fmt: skip
    words = command(a_model(engine_arguments=told))
    after = words[words.index("/model") + 1 :]
    assert after[:4] == ["--tokenizer", "a/b", "--tokenizer_mode=mistral", "--trust-remote-code"]
    assert "8k" not in words


def test_a_recorded_result_is_read_as_its_requests_say() -> None:
    raw = json.loads(RECORDED)
    rung = lm.parse_rung(f"Starting\nmore\n{RECORDED}", 2, NOW)
    assert (rung.requests, rung.failed, rung.concurrency) == (len(raw["ttfts"]), 0, 2)
    assert rung.output_tokens == sum(raw["output_lens"])
    assert rung.prompt_tokens == sum(raw["input_lens"])
    gaps = [gap for request in raw["itls"] for gap in request]
    for found, seconds in (
        (rung.ttft, raw["ttfts"]), (rung.inter_token, gaps), (rung.end_to_end, raw["latencies"]),
    ):  # fmt: skip
        assert found is not None
        cuts = quantiles(seconds, n=100, method="inclusive")
        expected = tuple(1000 * cuts[percent - 1] for percent in lm.PERCENTILES)
        assert (found.p50, found.p95, found.p99) == pytest.approx(expected)
    assert rung.output_tokens_per_second == pytest.approx(raw["output_throughput"])
    assert rung.tokens_per_second == pytest.approx(raw["total_token_throughput"])
    assert rung.requests_per_second == pytest.approx(raw["request_throughput"])
    # Completions have a gap before each token but the first.
    assert len(gaps) == rung.output_tokens - rung.requests


def test_an_embedding_has_no_first_token_and_its_whole_answer_counts_instead() -> None:
    rung = lm.parse_rung(EMBEDDING, 2, NOW)
    assert (rung.ttft, rung.inter_token, rung.output_tokens, rung.failed) == (None, None, 0, 0)
    assert rung.first_answer == rung.end_to_end
    assert rung.end_to_end.p50 == pytest.approx(97.78, abs=0.01)
    assert replace(rung, energy_mj=3_200_000).joules_per_token == 2


def test_failed_requests_are_counted_and_a_load_without_any_answer_says_why() -> None:
    raw = json.loads(RECORDED)
    some = lm.parse_rung(json.dumps(raw | {"completed": raw["num_prompts"] - 3}), 2, NOW)
    assert some.failed == 3
    none = json.dumps(raw | {"completed": 0, "errors": ["", "Traceback\nBad Request"]})
    with pytest.raises(lm.ContainerFailedError, match=r"none of 20 requests: Bad Request\."):
        lm.parse_rung(none, 2, NOW)


def test_of_the_details_only_the_last_errors_leave_the_container(tmp_path: Path) -> None:
    """The script itself, with a load generator that writes what a real one once wrote."""
    errors = ["", *map(str, range(9)), ""]
    whole = json.loads(RECORDED) | {"errors": errors}
    (tmp_path / "whole.json").write_text(json.dumps(whole))
    generator = ["sh", "-c", 'echo begins; cp "$0" result.json', str(tmp_path / "whole.json")]
    with subprocess.Popen(
        ["sh", "-c", lm.LOAD_SCRIPT, "benchmark", *generator],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "TMPDIR": str(tmp_path)},
    ) as running:  # fmt: skip
        assert running.stdout
        said = running.stdout.read().decode()
    assert running.returncode == 0
    kept = json.loads(said.splitlines()[-1])
    assert kept["errors"] == ["6", "7", "8"]
    assert not [
        name for name, value in kept.items() if isinstance(value, list) != (name == "errors")
    ]
    assert lm.parse_rung(said, 2, NOW) == lm.parse_rung(json.dumps(whole), 2, NOW)
    assert [path.name for path in tmp_path.iterdir()] == ["whole.json"]


@pytest.mark.parametrize("said", ["", "no figures", "[]", "{}", '{"completed": 1}', "null", "3"])
def test_anything_else_that_it_prints_is_no_result(said: str) -> None:
    with pytest.raises(lm.ContainerFailedError, match="no figures that this program knows"):
        lm.parse_rung(said, 1, NOW)


def test_joules_per_token_are_unknown_where_energy_is() -> None:
    assert a_rung().joules_per_token is None
    assert a_rung(energy_mj=800_000).joules_per_token == 2


# --- the largest concurrency -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "largest"), [(99, None), (100, 1), (250, 2), (300, 4), (9999, 4)]
)
def test_the_largest_concurrency_is_the_last_rung_within_the_limit(
    limit: float, largest: int | None
) -> None:
    rungs = [a_rung(4, 300), a_rung(1, 100), a_rung(2, 200)]
    assert lm.largest_within(rungs, limit) == largest


def test_a_rung_that_is_lucky_above_one_that_is_not_does_not_count() -> None:
    assert lm.largest_within([a_rung(1, 100), a_rung(2, 300), a_rung(4, 100)], 200) == 1
    assert lm.largest_within([a_rung(1, 100), a_rung(2, 100, failed=1)], 200) == 1
    assert lm.largest_within([], 200) is None


@given(st.lists(st.floats(1, 1000), min_size=1, max_size=8), st.floats(1, 1000))
def test_up_to_the_largest_concurrency_all_rungs_are_within(p95s: list[float], x: float) -> None:
    rungs = [a_rung(2**n, p95) for n, p95 in enumerate(p95s)]
    largest = lm.largest_within(rungs, x) or 0
    assert all(rung.ttft and rung.ttft.p95 <= x for rung in rungs if rung.concurrency <= largest)
    above = [rung for rung in rungs if rung.concurrency > largest]
    assert not above or above[0].first_answer.p95 > x


# --- what the operator reads ---------------------------------------------------------------


def test_benchmarks_stand_side_by_side_over_all_their_rungs() -> None:
    one = a_result(a_rung(1, 100), a_rung(2, 200))
    other = a_result(a_rung(2, 50, energy_mj=800_000), started_at=NOW + timedelta(hours=1))
    headers, rows = lm.comparison([one, other])
    assert headers == ["Figure", "At once", one.name, other.name]
    beside = {(figure, at): cells for figure, at, *cells in rows}
    assert beside["P95 TTFT (ms)", "1"] == ["100", ""]
    assert beside["P95 TTFT (ms)", "2"] == ["200", "50"]
    assert beside["Output tokens/s", "2"] == ["200", "200"]
    assert beside["J/token", "2"] == ["", "2"]
    assert lm.comparison([]) == (["Figure", "At once"], [])


def test_the_file_for_other_programs_has_each_rung_with_plain_figures() -> None:
    text = lm.benchmark_csv([a_result(a_rung(1, 1234.5), a_rung(2, 100, ttft=None, others=3))])
    first, second = csv.DictReader(io.StringIO(text))
    assert first["TTFT P95 (ms)"] == "1234.5"
    assert first["Output tokens/s"] == "200.0"
    found = [second[name] for name in ("At once", "TTFT P95 (ms)", "Others' requests")]
    assert found == ["2", "", "3"]


def test_all_facts_are_json_and_say_what_follows_from_them() -> None:
    (facts,) = json.loads(json.dumps(lm.benchmark_facts([a_result(a_rung())]), default=str))
    assert facts["name"] == f"{NOW:%Y%m%dT%H%M%S}-chat"
    assert facts["complete"] is False
    assert facts["rungs"][0]["output_tokens_per_second"] == 200


def test_what_a_model_carries_within_a_limit_is_one_sentence() -> None:
    whole = a_result(a_rung(1, 100), a_rung(2, 200))
    assert "2 or more requests at once" in lm.carrying_text([whole], 500)
    assert ": 1 requests at once" in lm.carrying_text([whole], 150)
    assert "no rung had its P95" in lm.carrying_text([whole], 50)


@pytest.mark.parametrize(
    ("figure", "shown"),
    [(1234.5, "1,234"), (99.99, "100"), (0.01234, "0.0123"), (7, "7"), (None, ""), (0.0, "0")],
)
def test_figures_have_three_digits(figure: float | None, shown: str) -> None:
    assert lm.format_measure(figure) == shown


def test_a_broken_off_benchmark_says_how_far_it_came() -> None:
    (row,) = lm.benchmark_list_rows([a_result(a_rung(), fault="It was cancelled.")])
    assert row[-1] == "1 of 2: It was cancelled."
    (row,) = lm.benchmark_list_rows([a_result(a_rung(), a_rung(2))])
    assert row[1:] == ["600 tokens in, 250 out, ± 50%", "1, 2", "complete"]


# --- the job -----------------------------------------------------------------------------------


class Generator:
    """Stands for containers' contents: load generators that end as told, and are remembered."""

    def __init__(self, *answers: str | Exception, begins: str = lm.LOAD_BEGINS) -> None:
        self.begins = begins
        self.answers = list(answers)
        self.asked: list[Sequence[str]] = []

    def attended(
        self, name: str, words: Sequence[str], check: Callable[[], None]
    ) -> Iterator[bytes]:
        assert name == "llm-model-chat-0"
        self.asked.append(words)
        check()
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        yield self.begins[:9].encode()  # a stream breaks anywhere
        yield f"{self.begins[9:]}...\n".encode()
        yield answer.encode()


@pytest.fixture
def server(tmp_path: Path) -> Server:
    """It serves chat, on a GPU."""
    made = Server(tmp_path / "home", lm.SimulatedGpus([lm.SimulatedCard("H200", "Hopper", 143771)]))
    made.manager.register(
        {"name": "chat", "type": "chat", "source": {"kind": "local", "path": "/srv/chat"},
         "placement": {"kind": "gpu", "gpu_uuids": [GPU_0]}}
    )  # fmt: skip
    made.do(lm.deploying("chat"))
    return made


def generate(server: Server, *answers: str | Exception, **said: str) -> Generator:
    made = Generator(*answers, **said)
    server.manager._tools.containers.contents = made  # type: ignore[misc]
    return made


def test_each_rung_is_kept_with_the_energy_that_its_model_took_meanwhile(server: Server) -> None:
    generator = generate(server, RECORDED, RECORDED)
    asked = []

    def energy_between(*span: Any) -> int:
        asked.append(span)
        return 4_000

    server.manager.benchmarks._energy_between = energy_between
    lines = list(server.manager.benchmarks.start(a_wish()).follow())
    (result,) = server.manager.benchmarks.results()
    assert result.complete
    assert [rung.concurrency for rung in result.rungs] == [1, 2]
    assert result.rungs[0].joules_per_token == 4 / result.rungs[0].output_tokens
    name, replica, start, end = asked[0]
    lasted = timedelta(seconds=json.loads(RECORDED)["duration"])
    assert (name, replica, end - start) == (CHAT, 0, lasted)
    assert any("2 at once" in line and "J/token" in line for line in lines)
    seeds = {words[words.index("--seed") + 1] for words in generator.asked}
    assert len(seeds) == 2, "the prefix cache would have the prompts of the rung before"
    assert not server.store.measured()


def test_a_load_that_nobody_saw_begin_has_no_energy(server: Server) -> None:
    generate(server, RECORDED, begins="Off we go, in other words")
    server.manager.benchmarks._energy_between = lambda *_: 4_000
    list(server.manager.benchmarks.start(a_wish(ladder=(1,))).follow())
    (result,) = server.manager.benchmarks.results()
    assert [rung.energy_mj for rung in result.rungs] == [None]


def test_a_result_that_no_version_wrote_hides_no_other(server: Server) -> None:
    generate(server, RECORDED)
    list(server.manager.benchmarks.start(a_wish(ladder=(1,))).follow())
    (server.store.home / "benchmarks" / "20200101T000000-x.json").write_text("{")
    (kept,) = server.manager.benchmarks.results()
    assert server.manager.benchmarks.named([kept.name]) == [kept]
    with pytest.raises(lm.UnknownError, match="no benchmark 'x'"):
        server.manager.benchmarks.named(["x"])


def test_what_was_measured_before_a_fault_is_kept_with_it(server: Server) -> None:
    fault = lm.ContainerFailedError("sh ended.", advice="Look.")
    generate(server, RECORDED, fault)
    job = server.manager.benchmarks.start(a_wish())
    with pytest.raises(lm.ContainerFailedError, match="sh ended"):
        list(job.follow())
    (result,) = server.manager.benchmarks.results()
    assert (len(result.rungs), result.fault) == (1, str(fault))
    assert not server.store.measured()


def test_a_model_that_is_not_ready_is_not_measured(server: Server) -> None:
    server.do(lm.stopping("chat"))
    with pytest.raises(lm.RefusedError, match="chat is not ready"):
        server.manager.benchmarks.start(a_wish())
    assert not server.store.measured()


def test_no_benchmark_begins_while_a_change_is_under_way(server: Server) -> None:
    with server.store.lock("something"), pytest.raises(lm.BusyError, match="something"):
        server.manager.benchmarks.start(a_wish())


def test_only_what_would_interrupt_a_measured_model_is_refused(server: Server) -> None:
    release = server.store.measure([CHAT])
    with pytest.raises(lm.BusyError, match="chat is being measured"):
        server.manager.start(lm.restarting("chat"))
    assert server.manager.state().model("chat").wish == "running"
    server.do(lm.applying())
    with pytest.raises(lm.BusyError, match="of chat"):
        server.store.measure([lm.ModelName("other")])
    release()
    server.do(lm.restarting("chat"))


def test_the_preview_says_whom_it_disturbs(server: Server) -> None:
    text = server.manager.benchmarks.preview(a_wish())
    assert "chat: 64 requests, 1, 2 at once; each has 600 tokens and makes 250" in text
    assert "Colleagues' requests make these figures worse" in text
