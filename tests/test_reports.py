"""What engines tell about themselves: the figures and the progress in their logs, their load.

The logs under `logs/` are of vLLM 0.30 and vLLM-Omni 0.30 on the processor, shortened; that of two
GPUs is put together from the format strings of vLLM 0.30, for want of such a machine.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

import llm_manager as lm

LOGS = Path(__file__).parent / "logs"
CPU, GPUS, OMNI = (
    (LOGS / name).read_text() for name in ("vllm-cpu.log", "vllm-two-gpus.log", "vllm-omni.log")
)


def until(log: str, text: str) -> str:
    """The log as it stood when this had just been said."""
    before, said, _ = log.partition(text)
    assert said
    return before + said


# --- figures -------------------------------------------------------------------------


def test_an_engine_on_two_gpus_reports_per_gpu_the_most_it_uses_and_the_least_it_keeps() -> None:
    assert lm.parse_engine_report(GPUS) == lm.Measured(
        weights_mib=pytest.approx(30.6 * 1024),
        kv_cache_mib=pytest.approx(38.14 * 1024),
        kv_cache_tokens=312416,
        context=98304,
        concurrency=3.18,
        graphs_mib=pytest.approx(0.83 * 1024),
    )


def test_an_engine_on_the_processor_reports_its_cache_and_no_weights() -> None:
    assert lm.parse_engine_report(CPU) == lm.Measured(
        kv_cache_mib=pytest.approx(0.06 * 1024),
        kv_cache_tokens=131072,
        context=4096,
        concurrency=32.0,
    )


def test_an_image_model_has_weights_and_no_cache() -> None:
    assert lm.parse_engine_report(OMNI) == lm.Measured(weights_mib=pytest.approx(0.0013 * 1024))


@pytest.mark.parametrize(
    ("line", "figure"),
    [
        (
            "Initial free memory 70.1 GiB, reserved 8.0 GiB memory for KV Cache as specified by",
            {"kv_cache_mib": 8192.0},
        ),
        ("Auto set (1.5/23.5) GiB for KV cache on node 0, with 4.0 GiB", {"kv_cache_mib": 1536.0}),
        ("Auto-fit max_model_len: full model context length 8192 fits in", {"context": 8192}),
        ("Loading drafter weights took 1.5 GiB", {}),
        ("", {}),
    ],
)
def test_other_ways_to_say_it(line: str, figure: dict[str, float]) -> None:
    assert lm.parse_engine_report(f"(Worker_PP1_TP0 pid=7) INFO {line}\n") == lm.Measured(**figure)


# --- progress ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "phase"),
    [
        ("Using max model len", "starting"),
        ("Starting to load model", "loading weights"),
        ("| 3/4 [", "loading weights (3 of 4 shards)"),
        ("Model loading took", "warming up"),
        ("Dynamo bytecode", "compiling"),
        ("Compiling a graph", "compiling"),
        ("torch.compile took", "warming up"),
        ("GPU KV cache size: ", "warming up"),
        ("20/51 [", "capturing graphs (20 of 51)"),
        ("35/35 [", "capturing graphs (35 of 35)"),
        ("Graph capturing finished", "warming up"),
        ("init engine (", "ready soon"),
        ("Route: /health", "ready soon"),
    ],
)
def test_the_phase_is_that_of_the_last_telling_line(said: str, phase: str) -> None:
    assert lm.start_phase(until(GPUS, said)) == phase


def test_a_start_without_compiling_goes_through_these_phases() -> None:
    lines = CPU.splitlines(keepends=True)
    phases = [lm.start_phase("".join(lines[:n])) for n in range(1, len(lines) + 1)]
    assert [phase for phase, _ in itertools.groupby(phases)] == [
        None,
        "starting",
        "loading weights",
        "loading weights (0 of 1 shards)",
        "loading weights (1 of 1 shards)",
        "warming up",
        "ready soon",
    ]


def test_an_image_models_progress_bars_are_read_too() -> None:
    # Each bar goes back to the start of its line: the last piece counts.
    assert lm.start_phase(until(OMNI, "| 1/5 [")) == "loading weights (1 of 5 components)"
    assert lm.start_phase(until(OMNI, "36/36 [")) == "loading weights"
    assert lm.start_phase(until(OMNI, "dummy run to warm up the model")) == "warming up"
    assert lm.start_phase(OMNI) == "ready soon"


def test_a_line_of_progress_says_when_it_will_be_done_or_that_it_takes_longer() -> None:
    log = until(GPUS, "| 3/4 [")
    assert lm.starting_line(log, 34, None) == "  34 s: loading weights (3 of 4 shards)"
    assert lm.starting_line(log, 34, 54) == (
        "  34 s: loading weights (3 of 4 shards), ready in about 20 s"
    )
    assert lm.starting_line(log, 41, 38) == (
        "  41 s: loading weights (3 of 4 shards), longer than last time (38 s)"
    )


def test_where_nothing_is_recognised_the_last_line_is_shown() -> None:
    assert lm.starting_line("one\r\n  two  \n\n", 10, 30) == "  10 s: two, ready in about 20 s"
    assert lm.starting_line("", 10, None) == "  10 s: it has said nothing yet"
    assert len(lm.starting_line("x" * 999, 10, None)) < 140
