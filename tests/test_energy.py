"""Joules from looks at GPUs: exact where a counter tells, honest where nobody does."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import pairwise

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
