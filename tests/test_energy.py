"""Joules from looks at GPUs: exact where a counter tells, honest where nobody does."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import llm_manager as lm


def a_look(
    at: float, counter_mj: int | None = None, power_w: float | None = None
) -> lm.EnergyReading:
    return lm.EnergyReading(at=at, counter_mj=counter_mj, power_w=power_w)


def watts(at: float) -> float:
    """A load that comes and goes, smoothly."""
    return 250 + 150 * math.sin(at / 7) + 40 * math.sin(at / 1.9)


def joules(start: float, end: float) -> float:
    """The integral of `watts`."""

    def primitive(at: float) -> float:
        return 250 * at - 150 * 7 * math.cos(at / 7) - 40 * 1.9 * math.cos(at / 1.9)

    return primitive(end) - primitive(start)


def looks(*, counter: bool, seed: int) -> list[lm.EnergyReading]:
    """Ten minutes at about one a second; a reset at 200 s, and no look for 40 s."""
    chance, at, found = random.Random(seed), 0.0, []  # noqa: S311
    while at < 600:
        if not 300 < at < 340:
            since = 200 if at >= 200 else 0
            told = round(1000 * joules(since, at)) if counter else None
            found.append(a_look(at, told, watts(at)))
        at += chance.uniform(0.8, 1.2)
    return found


@pytest.mark.parametrize("counter", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_a_curve_with_jitter_a_reset_and_a_gap_is_integrated_within_one_percent(
    counter: bool, seed: int
) -> None:
    seen = looks(counter=counter, seed=seed)
    found = [lm.measure(a, b, 1.0) for a, b in pairwise(seen)]
    told = sum(each.energy_mj or 0 for each in found) / 1000
    unknown = [(a.at, b.at) for (a, b), each in zip(pairwise(seen), found, strict=True)
               if each.energy_mj is None]  # fmt: skip
    true = joules(0, seen[-1].at) - sum(joules(*gap) for gap in unknown)
    assert told == pytest.approx(true, rel=0.01)
    if counter:  # which knows what was taken while nobody looked
        assert unknown == []
    else:
        ((start, end),) = unknown
        assert (299 <= start <= 300, 340 <= end <= 341.2) == (True, True)


def test_what_lies_between_a_sleep_or_a_stop_is_never_guessed() -> None:
    before, after = a_look(0, 1000, 100), a_look(61, 9000, 100)
    assert lm.measure(before, after, 1.0) == lm.Interval(
        seconds=61, energy_mj=None, method="unmeasured"
    )


def test_a_counter_that_starts_anew_leaves_its_interval_to_power() -> None:
    before, after = a_look(0, 5000, 100), a_look(1, 20, 200)
    assert lm.measure(before, after, 1.0) == lm.Interval(
        seconds=1, energy_mj=150_000, method="power"
    )
    assert lm.measure(replace(before, power_w=None), after, 1.0).energy_mj is None


@given(
    st.integers(0, 10**12),
    st.dictionaries(st.text(max_size=3), st.floats(0, 1e9), min_size=1, max_size=12),
)
def test_parts_add_up_to_their_whole_whatever_the_weights(
    whole: int, weights: dict[str, float]
) -> None:
    parts = lm.split_energy(whole, weights)
    assert sum(parts.values()) == whole
    assert parts.keys() == weights.keys()
    total = math.fsum(weights.values())
    for who, part in parts.items():
        share = whole * (weights[who] / total if total else 1 / len(weights))
        assert abs(part - share) <= 1 + whole * 1e-9


@given(st.integers(0, 10**9), st.lists(st.floats(0, 100), min_size=2, max_size=6))
def test_who_takes_nothing_pays_nothing(whole: int, weights: list[float]) -> None:
    named = {str(n): weight for n, weight in enumerate(weights)} | {"idle": 0.0, "busy": 1.0}
    assert lm.split_energy(whole, named)["idle"] == 0


# --- whose it was -------------------------------------------------------------------

GPU = "GPU-1"
CHAT, EMBED = (
    lm.GpuTenant(model="chat", pids=frozenset({11, 12})),
    lm.GpuTenant(model="embed", replica=1, pids=frozenset({21})),
)
SLICES = (
    lm.GpuTenant(model="chat", part=3 / 7, device="MIG-3"),
    lm.GpuTenant(model="embed", part=1 / 7, device="MIG-1"),
)


def an_interval(energy_mj: int | None = 7000, seconds: float = 1.0) -> lm.Interval:
    return lm.Interval(seconds=seconds, energy_mj=energy_mj, method="counter")


def owners(
    *tenants: lm.GpuTenant, energy_mj: int | None = 7000, **known: Any
) -> dict[str, tuple[int | None, str]]:
    """Who took how much, by which method."""
    shares = lm.attribute(an_interval(energy_mj), 100.0, GPU, tenants, **known)
    assert len({share.model for share in shares}) == len(shares)
    return {share.model: (share.energy_mj, share.method) for share in shares}


def test_a_replica_with_a_gpu_to_itself_takes_all_of_it_measured() -> None:
    (share,) = lm.attribute(an_interval(), 100.0, GPU, [CHAT], {99: 50.0}, idle_w=3.0)
    assert share == lm.EnergyShare(
        gpu_uuid=GPU, start=100.0, seconds=1.0, model="chat", replica=0, energy_mj=7000,
        method="whole GPU",
    )  # fmt: skip
    assert share.measured


def test_without_a_tenant_all_of_it_is_idle_and_a_strangers_is_nobodys() -> None:
    assert owners() == {lm.NOBODY: (7000, "idle")}
    assert owners(lm.GpuTenant(model=lm.NOBODY, pids=frozenset({7}))) == {lm.NOBODY: (7000, "idle")}


def test_what_nobody_measured_is_one_share_without_millijoules() -> None:
    assert owners(CHAT, energy_mj=None) == {lm.NOBODY: (None, "idle")}


def test_a_shared_gpu_is_divided_by_what_its_processes_used_after_its_idle_power() -> None:
    busy = {11: 40.0, 12: 20.0, 21: 20.0}
    by_use = "process utilisation"
    assert owners(CHAT, EMBED, activities=busy) == {"chat": (5250, by_use), "embed": (1750, by_use)}
    assert owners(CHAT, EMBED, activities=busy, idle_w=3.0) == {
        "chat": (3000, by_use), "embed": (1000, by_use), lm.NOBODY: (3000, by_use),
    }  # fmt: skip
    stranger = lm.GpuTenant(model=lm.NOBODY, pids=frozenset({5}))
    assert owners(CHAT, stranger, activities={11: 30.0, 5: 10.0}) == {
        "chat": (5250, by_use), lm.NOBODY: (1750, by_use),
    }  # fmt: skip


@pytest.mark.parametrize("activities", [None, {}, {99: 80.0}])
def test_where_no_activity_is_known_it_is_divided_equally(
    activities: dict[int | str, float] | None,
) -> None:
    even = (3500, "equal split")
    assert owners(CHAT, EMBED, activities=activities) == {"chat": even, "embed": even}


def test_processes_that_nobody_may_see_are_not_taken_for_idle_ones() -> None:
    hidden, even = replace(CHAT, pids=frozenset()), (3500, "equal split")
    assert owners(hidden, EMBED, activities={21: 80.0}) == {"chat": even, "embed": even}


def test_slices_are_weighed_by_activity_times_size() -> None:
    activities = {"MIG-3": 50.0, "MIG-1": 100.0}
    by_activity = "MIG activity"
    assert owners(*SLICES, activities=activities, energy_mj=5000) == {
        "chat": (3000, by_activity), "embed": (2000, by_activity),
    }  # fmt: skip
    assert owners(*SLICES, activities=activities, energy_mj=7000, idle_w=2.0) == {
        "chat": (3000, by_activity), "embed": (2000, by_activity), lm.NOBODY: (2000, by_activity),
    }  # fmt: skip


@pytest.mark.parametrize("activities", [None, {"MIG-3": 50.0}, {"MIG-3": 0.0, "MIG-1": 0.0}])
def test_slices_of_unknown_activity_share_by_size_and_what_is_not_cut_is_nobodys(
    activities: dict[int | str, float] | None,
) -> None:
    assert owners(*SLICES, activities=activities) == {
        "chat": (3000, "equal split"),
        "embed": (1000, "equal split"),
        lm.NOBODY: (3000, "equal split"),
    }


def test_a_slice_of_the_whole_card_is_the_whole_card() -> None:
    alone = lm.GpuTenant(model="chat", part=7 / 7, device="MIG-7")
    assert owners(alone) == {"chat": (7000, "whole GPU")}


@st.composite
def tenancies(draw: st.DrawFn) -> dict[str, Any]:
    """Any crowd on a GPU, whole or cut, with any knowledge of what it did."""
    cut = draw(st.booleans())
    sizes = draw(st.lists(st.sampled_from([1, 2, 3]), max_size=2 if cut else 6))
    tenants = [
        lm.GpuTenant(
            model=draw(st.sampled_from(["chat", "embed", lm.NOBODY])), replica=n,
            part=size / 7 if cut else 1.0, device=f"MIG-{n}" if cut else "",
            pids=frozenset(draw(st.sets(st.integers(1, 9), max_size=3))),
        )
        for n, size in enumerate(sizes)
    ]  # fmt: skip
    percents = st.floats(0, 100)
    return {
        "tenants": tenants,
        "activities": draw(
            st.none()
            | st.dictionaries(st.integers(1, 9), percents)
            | st.fixed_dictionaries({f"MIG-{n}": percents for n in range(len(sizes))})
        ),
        "idle_w": draw(st.none() | st.floats(0, 1000)),
    }


@given(st.lists(st.tuples(st.integers(0, 10**6), st.floats(0.01, 60), tenancies()), max_size=8))
def test_the_shares_of_any_crowd_add_up_to_what_was_measured(
    intervals: list[tuple[int, float, dict[str, Any]]],
) -> None:
    shares = [
        share
        for energy_mj, seconds, who in intervals
        for share in lm.attribute(an_interval(energy_mj, seconds), 0.0, GPU, **who)
    ]
    measured = sum(energy_mj for energy_mj, _, _ in intervals)
    assert all(share.energy_mj is not None and share.energy_mj >= 0 for share in shares)
    assert sum(share.energy_mj or 0 for share in shares) == measured


@given(st.lists(st.tuples(st.floats(0.1, 5), st.floats(-7200, 7200)), min_size=1, max_size=40))
def test_intervals_follow_the_clock_and_small_steps_of_it_do_not_show(
    steps: list[tuple[float, float]],
) -> None:
    line, clock, end = lm.Timeline(), 1e9, -math.inf
    for seconds, jumped in steps:
        clock += seconds + jumped / len(steps)
        start = line.place(seconds, clock)
        assert abs(start + seconds - clock) <= lm.CLOCK_STEP_SECONDS
        if abs(end + seconds - clock) < lm.CLOCK_JITTER_SECONDS - 0.001:
            assert start == end
        end = start + seconds


def test_intervals_follow_each_other_without_a_crack_and_a_clock_set_forward_leaves_one() -> None:
    line = lm.Timeline()
    assert [line.place(1.0, at) for at in (11.0, 12.01, 12.99)] == [10.0, 11.0, 12.0]
    assert line.place(1.0, 100.0) == 99.0
    assert line.place(1.0, 96.0) == 100.0, "set back by a little: it goes on"
    assert line.place(1.0, 97.0 - 7200) == 96.0 - 7200, "set back by hours: it was wrong before"


def test_what_a_model_took_between_two_moments_has_its_part_of_looks_across_them() -> None:
    """Two seconds each of 10 J, from 12:00:00 on; the range begins and ends within one."""

    def line(second: int, model: str, gpu: str = "GPU-a", replica: int = 0) -> str:
        moment = f"2026-11-22 12:00:{second:02d}\x1e000"
        return lm.sample_line(moment, (gpu, model, replica, "whole GPU"), (10_000, 2000, 0))

    noon = lm.datetime(2026, 11, 22, 12, tzinfo=lm.UTC).timestamp()
    lines = "".join(line(s, "chat") for s in range(0, 10, 2)) + line(4, "other", "GPU-b")
    told = lines.encode()
    assert lm.energy_within(told, "chat", 0, noon + 1, noon + 7) == 30_000
    assert lm.energy_within(told, "chat", 0, noon + 1, noon + 12) is None, "not recorded yet"
    assert lm.energy_within(told, "other", 0, noon + 3, noon + 7) is None, "not all of it"
    partly = told + line(0, "chat", "GPU-b").encode()
    assert lm.energy_within(partly, "chat", 0, noon, noon + 8) is None
    two = told + b"".join(line(s, "chat", "GPU-b", replica=1).encode() for s in (2, 4))
    assert lm.energy_within(two, "chat", 0, noon + 2, noon + 6) == 20_000, "of the other, too"
    assert lm.energy_within(two, "chat", 1, noon + 2, noon + 5) == 15_000
    assert lm.energy_within(two, "chat", 0, noon, noon + 8) == 40_000, "the other was not there"
