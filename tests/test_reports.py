"""What engines tell about themselves: the figures and the progress in their logs, their load.

The logs under `logs/` are of vLLM 0.30 and vLLM-Omni 0.30 on the processor, shortened; that of two
GPUs is put together from the format strings of vLLM 0.30, for want of such a machine.
"""

from __future__ import annotations

import itertools
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from builders import GPU_0, GPU_1, NOW, a_model, a_site, a_state, an_engine, on_gpus, on_slice, seen
from fakes import a_world, some_tools

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


# --- what is remembered ---------------------------------------------------------------

H100 = lm.simulated_card("H100 80 GB")
TWO_ALIKE = lm.SimulatedGpus([H100, H100]).read()
MIXED = lm.SimulatedGpus([H100, lm.simulated_card("A100 80 GB")]).read()


def key_of(hardware: lm.Hardware | None, image: str = "vllm:1", **changes: object) -> str:
    return lm.measurement_key(a_model(**changes), image, hardware)


def test_what_was_measured_holds_on_an_equal_gpu_and_on_no_other() -> None:
    first, second = ({"placement": on_gpus(gpu)} for gpu in (GPU_0, GPU_1))
    assert key_of(TWO_ALIKE, **first) == key_of(TWO_ALIKE, **second)
    assert key_of(MIXED, **first) != key_of(MIXED, **second)
    # Whose kind is not known is equal only to itself.
    assert key_of(None, **first) != key_of(None, **second)


def test_what_was_measured_holds_on_every_slice_of_a_profile() -> None:
    one, other = ({"placement": on_slice("3g.40gb", start)} for start in (0, 4))
    assert key_of(TWO_ALIKE, **one) == key_of(TWO_ALIKE, **other)
    assert key_of(TWO_ALIKE, **one) == key_of(
        TWO_ALIKE, placement=on_slice("3g.40gb", 0, gpu=GPU_1)
    )
    assert key_of(TWO_ALIKE, **one) != key_of(TWO_ALIKE, placement=on_slice("4g.40gb", 0))


def test_a_name_plays_no_part_and_all_that_costs_memory_does() -> None:
    on_one = {"placement": on_gpus(GPU_0)}
    alike = key_of(TWO_ALIKE, **on_one)
    assert key_of(TWO_ALIKE, name="other", served_model_name="x", replicas=2, **on_one) == alike
    source = lm.HubSource(repository="Qwen/Qwen3-0.6B", revision="abc")
    different = [
        key_of(TWO_ALIKE, "vllm:2", **on_one),
        key_of(TWO_ALIKE, placement=on_gpus(GPU_0, memory_fraction=0.4)),
        key_of(TWO_ALIKE, placement=on_gpus(GPU_0, GPU_1)),
        key_of(TWO_ALIKE, placement=lm.CpuPlacement()),
        key_of(TWO_ALIKE, source=source, **on_one),
        key_of(TWO_ALIKE, type="embedding", **on_one),
        key_of(TWO_ALIKE, engine_arguments=("--max-model-len", "512"), **on_one),
    ]
    assert len({alike, *different}) == 8


def started(world: lm.SimulatedHost, *models: lm.Model) -> dict[str, lm.Measured]:
    """What is remembered after these models were started."""
    control = lm.Control(lambda _: None)
    lm.converge(a_state(*models), a_site(), some_tools(world), control)
    return world.files.read_measured()


def test_a_start_is_remembered_with_the_engines_report_and_the_memory_that_was_used() -> None:
    world = a_world(gpus=lm.SimulatedGpus([H100]))
    world.says, world.start_seconds = GPUS, 25
    world.gpus.gpus[0].used_mib = 71234
    (measured,) = started(world, a_model(placement=on_gpus(GPU_0))).values()
    assert measured.weights_mib == pytest.approx(30.6 * 1024)
    assert measured.context == 98304
    assert measured.peak_mib == 71234
    assert measured.start_seconds == pytest.approx(25, abs=0.5)
    assert measured.taken_at is not None


def test_memory_that_is_shared_with_somebody_is_nobodys_measurement() -> None:
    world = a_world(gpus=lm.SimulatedGpus([H100]))
    world.gpus.gpus[0].used_mib = 71234
    world.gpus.open(GPU_0, "python3", container_id="f" * 64)
    (measured,) = started(world, a_model(placement=on_gpus(GPU_0))).values()
    assert measured.peak_mib is None


def test_a_start_that_was_not_seen_from_its_beginning_is_not_remembered() -> None:
    """The manager was away for most of it: what is left of the start is not its time."""
    world = a_world()
    world.start_seconds = 25
    name = lm.ContainerName("llm-model-chat-0")
    state = a_state(a_model(), endpoint="stopped")
    spec = an_engine(state)
    world.networks.add(spec.network)
    world.images.add(spec.image)
    some_tools(world).containers.create(spec)
    world.clock.now += 20
    started(world, a_model())
    assert world.containers[name].running
    assert name not in world.files.read_starts()
    assert world.files.read_measured() == {}


# --- load, and engines that hang ------------------------------------------------------

CHAT = lm.ContainerName("llm-model-chat-0")
METRICS = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a} 7"} 2.0
vllm:num_requests_running{engine="1",model_name="a} 7"} 1.0
vllm:num_requests_waiting{engine="0",model_name="m"} 4.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 4.0
vllm:prompt_tokens_total{engine="0",model_name="m"} 1.5e+06
vllm:prompt_tokens_created{engine="0",model_name="m"} 1.7952562138218098e+09
vllm:prompt_tokens_by_source_total{engine="0",model_name="m",source="local_compute"} 9.0
vllm:prompt_tokens_cached_total{engine="0",model_name="m"} 12.0
vllm:generation_tokens_total{engine="0",model_name="m"} 30.0
vllm:generation_tokens_total{engine="1",model_name="m"} 4.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.5
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.5",model_name="m"} 2.0
vllm:time_to_first_token_seconds_bucket{engine="1",le="0.5",model_name="m"} 3.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="+Inf",model_name="m"} 4.0
vllm:time_to_first_token_seconds_bucket{engine="1",le="+Inf",model_name="m"} 3.0
vllm:time_to_first_token_seconds_count{engine="1",model_name="m"} 3.0
vllm:request_success_total{engine="0",finished_reason="stop",model_name="m"} 6.0
vllm:request_success_total{engine="0",finished_reason="abort",model_name="m"} 1.0
"""


def test_the_load_is_summed_over_an_engines_ranks() -> None:
    load = lm.parse_load(METRICS)
    assert load is not None
    assert (load.running, load.waiting, load.tokens) == (3, 4, 1500034)
    assert (load.ranks, load.cached, load.kv_cache_part) == (2, 0.75, 0.375)
    wait, ended = "time_to_first_token_seconds_bucket", "request_success_total"
    assert load.counts == {
        ("prompt_tokens_cached_total", ""): 12, ("prompt_tokens_total", ""): 1.5e6,
        ("generation_tokens_total", ""): 34,
        (wait, "0.5"): 5, (wait, "+Inf"): 7, (ended, "stop"): 6, (ended, "abort"): 1,
    }  # fmt: skip
    assert load.used == lm.EngineCounts(prompt=1500000, completion=34, cached=12, requests=7)


def test_metrics_without_tokens_are_no_load() -> None:
    assert lm.parse_load(METRICS.replace("vllm:", "vllm_omni:")) is None
    assert lm.parse_load("") is None


def working(tokens: int, running: int = 1) -> dict[lm.ContainerName, lm.EngineLoad | None]:
    return {CHAT: lm.EngineLoad(running=running, waiting=0, tokens=tokens)}


def at(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


def test_an_engine_is_suspected_after_a_minute_of_work_without_a_token() -> None:
    stalls = lm.Stalls()
    assert stalls.suspects(working(5), at(0)) == []
    assert stalls.suspects(working(6), at(50)) == []
    assert stalls.suspects(working(6), at(109)) == []
    assert stalls.suspects(working(6), at(110)) == [CHAT]


@pytest.mark.parametrize("between", [working(9), working(5, running=0), {}])
def test_a_token_idleness_and_an_end_begin_the_minute_anew(
    between: dict[lm.ContainerName, lm.EngineLoad | None],
) -> None:
    stalls = lm.Stalls()
    for seconds, loads in ((0, working(5)), (59, between), (60, working(5)), (119, working(5))):
        assert stalls.suspects(loads, at(seconds)) == []
    assert stalls.suspects(working(5), at(120)) == [CHAT]


def test_an_engine_that_does_not_even_tell_its_load_is_not_forgotten() -> None:
    stalls = lm.Stalls()
    assert stalls.suspects({CHAT: None}, at(0)) == []
    assert stalls.suspects(working(5), at(10)) == []
    assert stalls.suspects({CHAT: None}, at(70)) == [CHAT]


def test_who_does_not_answer_is_hung_and_tried_no_more_until_it_makes_a_token() -> None:
    stalls = lm.Stalls()
    stalls.suspects(working(5), at(0))
    stalls.suspects(working(5), at(60))
    stalls.tried(CHAT, answered=False)
    assert stalls.suspects(working(5, running=3), at(130)) == []
    assert stalls.hung == {CHAT}
    engine = seen(an_engine(a_state(a_model())))
    assert stalls.report(engine, working(5, running=3)[CHAT], at(130)) == (
        "chat has 3 requests running and has made no token for 2 min, and does not answer a "
        "request of one token. Restart it; its log may say why."
    )
    assert stalls.report(engine, None, at(30)).startswith("chat has requests running and has made")
    stalls.suspects(working(6), at(135))
    assert stalls.hung == frozenset()
    assert stalls.suspects(working(6), at(195)) == [CHAT]


def test_who_answers_is_looked_at_afresh() -> None:
    stalls = lm.Stalls()
    stalls.suspects(working(5), at(0))
    stalls.suspects(working(5), at(60))
    stalls.tried(CHAT, answered=True)
    assert stalls.suspects(working(5), at(65)) == []
    assert stalls.suspects(working(5), at(125)) == [CHAT]
