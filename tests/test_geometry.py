"""§4 to §6: how cards are cut, who gets which GPU, and what the driver's own texts say.

What may stand is decided here a second time, from NVIDIA's rules and the rows of the recipe alone,
so that the planner is held against something that shares no line with it.
"""

from __future__ import annotations

import itertools
import re
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from builders import GPU_0, GPU_1, a_layout, a_model, a_state, on_gpus, on_slice
from hypothesis import given, settings
from hypothesis import strategies as st

import llm_manager as lm

RECIPE = Path(lm.PROGRAM).with_name("recipes") / "mig.yaml"
ROWS: Mapping[str, lm.Json] = {
    card["card"]: card for card in yaml.safe_load(RECIPE.read_text())["cards"]
}
GEOMETRIES = lm.parse_geometries(RECIPE.read_text())
CARDS = {geometry.card: geometry for geometry in GEOMETRIES.values()}
A30, A100, RTX = (CARDS[name] for name in ("A30", "A100 40 GB", "RTX PRO 6000 Blackwell"))
SEVEN = [geometry for geometry in CARDS.values() if geometry.compute_slices == 7]
Layout = frozenset[lm.Slice]

fewer = settings(max_examples=50)  # where one example is much work
every_card = pytest.mark.parametrize("card", CARDS)


# --- the oracle ------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """One profile at one of its starts, read off a row of the recipe."""

    profile: str
    start: int
    units: frozenset[int]
    compute: int
    most: int
    media: str

    @property
    def slice(self) -> lm.Slice:
        return self.profile, self.start


def cuts_in(row: lm.Json) -> tuple[Cut, ...]:
    return tuple(
        Cut(
            profile=name,
            start=start,
            units=frozenset(range(start, start + size)),
            compute=int(name[: name.index("g.")]),
            most=most,
            media=name[name.index("gb") + 2 :],
        )
        for name, _, most, _, _, size, starts in row["profiles"]
        for start in starts
    )


def stands(row: lm.Json, cuts: Sequence[Cut]) -> bool:
    """The rules of NVIDIA's guide and of nvml.h, each on its own."""
    units = [unit for cut in cuts for unit in cut.units]
    counts = Counter(cut.profile for cut in cuts)
    variants = [cut.media for cut in cuts]
    beside_all = [v for v in variants if v != "+me.all"]
    return (
        len(units) == len(set(units))
        and all(unit < row["memory_units"] for unit in units)
        and sum(cut.compute for cut in cuts) <= row["compute_slices"]
        and all(counts[cut.profile] <= cut.most for cut in cuts)
        and variants.count("+me") <= 1
        and ("+me.all" not in variants or (len(cuts) - len(beside_all) == 1
                                           and {*beside_all} <= {"-me"}))
    )  # fmt: skip


def layouts_in(row: lm.Json) -> frozenset[Layout]:
    """Cut after cut is taken or left; a set that breaks a rule stays broken whatever joins it."""
    cuts, found = cuts_in(row), set()

    def go_on(first: int, taken: tuple[Cut, ...], used: frozenset[int]) -> None:
        found.add(frozenset(cut.slice for cut in taken))
        for number in range(first, len(cuts)):
            cut = cuts[number]
            if used.isdisjoint(cut.units) and stands(row, (*taken, cut)):
                go_on(number + 1, (*taken, cut), used | cut.units)

    go_on(0, (), frozenset())
    return frozenset(found)


@cache
def every_cut(card: str) -> tuple[Cut, ...]:
    return cuts_in(ROWS[card])


@cache
def every_layout(card: str) -> frozenset[Layout]:
    return layouts_in(ROWS[card])


@cache
def layouts_by_names(card: str) -> Mapping[tuple[str, ...], tuple[Layout, ...]]:
    grouped: dict[tuple[str, ...], list[Layout]] = {}
    for layout in sorted(every_layout(card), key=sorted):
        grouped.setdefault(names_of(layout), []).append(layout)
    return {names: tuple(several) for names, several in sorted(grouped.items())}


def names_of(layout: Collection[lm.Slice]) -> tuple[str, ...]:
    return tuple(sorted(profile for profile, _ in layout))


@cache
def usable_mib(card: str, profile: str) -> int:
    """The published memory; of what nobody published, nine tenths of the decimal gigabytes."""
    (row,) = (row for row in ROWS[card]["profiles"] if row[0] == profile)
    if row[3] is not None:
        return int(row[3] * 1024)
    return CARDS[card].profile(profile).usable_mib


@cache
def units_of(card: str, profile: str) -> int:
    return next(len(cut.units) for cut in every_cut(card) if cut.profile == profile)


def plain(names: Collection[str]) -> bool:
    return not any(re.search(r"gb[+-]", name) for name in names)


def test_the_oracle_itself_agrees_with_trying_every_set_of_slices() -> None:
    row, cuts = ROWS["A30"], every_cut("A30")
    every_set = itertools.chain.from_iterable(
        itertools.combinations(cuts, count) for count in range(len(cuts) + 1)
    )
    tried = {frozenset(c.slice for c in chosen) for chosen in every_set if stands(row, chosen)}
    assert tried == every_layout("A30")


# --- every layout of every card ----------------------------------------------------


@every_card
def test_every_valid_layout_is_known_and_no_other(card: str) -> None:
    known = [(names, layout) for names, several in lm.layouts(CARDS[card]).items()
             for layout in several]  # fmt: skip
    assert len(known) == len({layout for _, layout in known})
    assert {layout for _, layout in known} == every_layout(card)
    assert all(names == names_of(layout) for names, layout in known)


@st.composite
def made_up_cards(draw: st.DrawFn) -> lm.Json:
    """Cards as a driver might tell of one day: every rule binds, and starts follow no pattern."""
    units = draw(st.integers(1, 6))
    profiles = []
    for number in range(draw(st.integers(1, 4))):
        size = draw(st.integers(1, units))
        starts = draw(st.sets(st.integers(0, units - size), min_size=1))
        variant = draw(st.sampled_from(["", "+me", "+me.all", "-me", "+gfx"]))
        name = f"{draw(st.integers(1, 4))}g.{number + 1}gb{variant}"
        profiles.append([name, number, draw(st.integers(1, 4)), size, None, size, sorted(starts)])
    return {"card": "made up", "devices": ["0000"], "memory_units": units,
            "compute_slices": draw(st.integers(1, 6)), "profiles": profiles}  # fmt: skip


def geometry_of(row: lm.Json) -> lm.MigGeometry:
    return lm.parse_geometries(yaml.safe_dump({"cards": [row]}))["0000"]


@fewer
@given(made_up_cards())
def test_the_rules_hold_on_cards_that_nobody_has_built(row: lm.Json) -> None:
    known = lm.layouts(geometry_of(row)).values()
    assert {*itertools.chain.from_iterable(known)} == layouts_in(row)


@fewer
@given(st.data(), made_up_cards())
def test_a_wish_on_such_a_card_is_held_exactly_or_refused(
    data: st.DataObject, row: lm.Json
) -> None:
    names = data.draw(st.lists(st.sampled_from([p[0] for p in row["profiles"]]), max_size=5))
    every = sorted(layouts_in(row), key=sorted)
    staying = data.draw(st.sampled_from(every))
    possible = [layout for layout in every
                if layout >= staying and names_of(layout) == tuple(sorted(names))]  # fmt: skip
    try:
        assert lm.choose_layout(geometry_of(row), names, staying=staying) in possible
    except lm.RefusedError:
        assert not possible


def test_there_are_as_many_layouts_as_counted_by_hand_before() -> None:
    """Printed for the reader: `pytest -s`."""
    counted = {"A30": (20, 76), "RTX PRO 6000 Blackwell": (115, 717)}
    lines = [f"{'card':<30} {'wishes':>7} {'layouts':>8} {'full':>5} {'cold':>9}"]
    for card, geometry in CARDS.items():
        start = time.perf_counter()
        known = lm.layouts.__wrapped__(geometry)
        spent = (time.perf_counter() - start) * 1000
        found = len(known), sum(map(len, known.values()))
        full = len(lm.full_layouts(geometry))
        lines.append(f"{card:<30} {found[0]:>7} {found[1]:>8} {full:>5} {spent:>6.1f} ms")
        assert found == counted.get(card, (128, 2319))
    print("", *lines, sep="\n")  # noqa: T201 - the table is for whoever asks for it


@every_card
def test_any_part_of_a_layout_is_a_layout_and_valid(card: str) -> None:
    for layout in every_layout(card):
        for gone in layout:
            assert layout - {gone} in every_layout(card)
        assert lm.is_valid(CARDS[card], layout)


@every_card
def test_those_offered_leave_no_room_for_another_plain_slice(card: str) -> None:
    largest = {
        names_of(layout)
        for layout in every_layout(card)
        if plain(names_of(layout))
        and not any(
            layout | {cut.slice} in every_layout(card)
            for cut in every_cut(card)
            if plain([cut.profile]) and cut.slice not in layout
        )
    }
    offered = lm.full_layouts(CARDS[card])
    assert {*offered} == largest
    assert len(offered) == len(largest)
    assert [len(names) for names in offered] == sorted(len(names) for names in offered)


# --- what NVIDIA documents ---------------------------------------------------------

# Profile ids of `nvidia-smi mig -lgip`, the same on every card with seven compute slices; `1g*` is
# the 1g slice with twice the memory.
IDS = {"1g": 19, "1g+me": 20, "1g*": 15, "2g": 14, "3g": 9, "4g": 5, "7g": 0}
IDS_OF_FOUR = {"1g": 14, "1g+me": 21, "2g": 5, "2g+me": 6, "4g": 0, "1g+gfx": 47, "1g+me.all": 65,
               "1g-me": 67, "2g+gfx": 35, "2g+me.all": 64, "2g-me": 66, "4g+gfx": 32}  # fmt: skip

# The figure of combinations in NVIDIA's MIG User Guide (A100), along the memory axis; the list of
# known geometries in nebuly-ai/nos names the same multisets. 4g beside 3g since R510.
OF_SEVEN = """
    7g@0
    4g@0 3g@4
    4g@0 2g@4 1g@6
    4g@0 1g@4 1g@5 1g@6
    3g@0 3g@4
    3g@0 2g@4 1g@6
    3g@0 1g@4 1g@5 1g@6
    2g@0 2g@2 3g@4
    2g@0 1g@2 1g@3 3g@4
    1g@0 1g@1 2g@2 3g@4
    1g@0 1g@1 1g@2 1g@3 3g@4
    2g@0 2g@2 2g@4 1g@6
    2g@0 1g@2 1g@3 2g@4 1g@6
    1g@0 1g@1 2g@2 2g@4 1g@6
    2g@0 1g@2 1g@3 1g@4 1g@5 1g@6
    1g@0 1g@1 2g@2 1g@4 1g@5 1g@6
    1g@0 1g@1 1g@2 1g@3 2g@4 1g@6
    1g@0 1g@1 1g@2 1g@3 1g@4 1g@5 1g@6
"""
# One media engine for 1g slices, and 1g slices with twice the memory: -lgip and -lgipp since R525.
OF_SEVEN_SINCE_R525 = """
    1g+me@0 1g@1 1g@2 1g@3 1g@4 1g@5 1g@6
    1g*@0 1g*@2 1g*@4 1g*@6
    2g@0 2g@2 2g@4 1g*@6
    4g@0 1g*@4 1g*@6
"""
OF_A30 = """
    4g@0
    2g@0 2g@2
    2g@0 1g@2 1g@3
    1g@0 1g@1 2g@2
    1g@0 1g@1 1g@2 1g@3
    1g+me@0 1g@1 1g@2 1g@3
    2g+me@0 2g@2
"""
OF_RTX = """
    4g@0
    4g+gfx@0
    2g@0 2g@6
    2g+gfx@0 2g+gfx@6
    2g@0 1g@6 1g@9
    1g@0 1g@3 1g@6 1g@9
    1g+me@0 1g@3 1g@6 1g@9
    1g+gfx@0 1g+gfx@3 1g+gfx@6 1g+gfx@9
    1g-me@0 1g-me@3 1g-me@6 1g-me@9
    1g+me.all@0 1g-me@3 1g-me@6 1g-me@9
    2g+me.all@0 2g-me@6
    2g+me.all@0 1g-me@6 1g-me@9
"""


def documented(geometry: lm.MigGeometry) -> Iterator[list[lm.Slice]]:
    text = {"A30": OF_A30, RTX.card: OF_RTX}.get(geometry.card, OF_SEVEN + OF_SEVEN_SINCE_R525)
    for line in filter(None, map(str.strip, text.splitlines())):
        pairs = (part.split("@") for part in line.split())
        yield [(called(geometry, short), int(start)) for short, start in pairs]


def called(geometry: lm.MigGeometry, short: str) -> str:
    """A card's own name for `3g`, by the id that the driver has for it."""
    number = (IDS if geometry.compute_slices == 7 else IDS_OF_FOUR)[short]
    return next(p.name for p in geometry.profiles if p.driver_id == number)


def wish(geometry: lm.MigGeometry, shorts: str) -> list[str]:
    return [called(geometry, short) for short in shorts.split()]


@every_card
def test_every_documented_layout_is_valid_and_found(card: str) -> None:
    for slices in documented(CARDS[card]):
        assert lm.is_valid(CARDS[card], slices)
        names = [name for name, _ in slices]
        assert names_of(lm.choose_layout(CARDS[card], names)) == names_of(slices)
        assert lm.choose_layout(CARDS[card], names, existing=slices) == {*slices}


@pytest.mark.parametrize("geometry", SEVEN, ids=lambda geometry: geometry.card)
@pytest.mark.parametrize(
    ("short", "most"),
    [("1g", 7), ("1g+me", 1), ("1g*", 4), ("2g", 3), ("3g", 2), ("4g", 1), ("7g", 1)],
)
def test_of_each_profile_alone_exactly_as_many_fit_as_the_driver_says(
    geometry: lm.MigGeometry, short: str, most: int
) -> None:
    name = called(geometry, short)
    assert len(lm.choose_layout(geometry, [name] * most)) == most
    with pytest.raises(lm.RefusedError, match=re.escape(f"at most {most} of {name} fit")):
        lm.choose_layout(geometry, [name] * (most + 1))


# `all-balanced` of NVIDIA/mig-parted's config-default.yaml, by PCI device.
BALANCED: Mapping[str, Mapping[str, int]] = {
    "20B7": {"1g.6gb": 2, "2g.12gb": 1},
    "20B0 20B1 20F1 20F6": {"1g.5gb": 2, "2g.10gb": 1, "3g.20gb": 1},
    "2330 2331 2322 2324 20B2 20B5 20F3 20F5": {"1g.10gb": 2, "2g.20gb": 1, "3g.40gb": 1},
    "2321 233A": {"1g.12gb": 2, "2g.24gb": 1, "3g.47gb": 1},
    "2342 233D 2329": {"1g.12gb": 2, "2g.24gb": 1, "3g.48gb": 1},
    "2348": {"1g.18gb": 2, "2g.36gb": 1, "3g.72gb": 1},
    "2335 233B": {"1g.18gb": 2, "2g.35gb": 1, "3g.71gb": 1},
    "2901": {"1g.23gb": 2, "2g.45gb": 1, "3g.90gb": 1},
    "2941": {"1g.23gb": 2, "2g.47gb": 1, "3g.93gb": 1},
    "2BB5": {"1g.24gb": 2, "2g.48gb": 1},
}


@pytest.mark.parametrize("devices", BALANCED)
def test_mig_parted_s_balanced_layout_fits_every_device_that_it_is_for(devices: str) -> None:
    for device in devices.split():
        counts = BALANCED[devices]
        layout = lm.choose_layout(GEOMETRIES[device], [*Counter(counts).elements()])
        assert Counter(name for name, _ in layout) == counts


def test_mig_parted_s_file_asks_each_card_for_its_own_profiles() -> None:
    entries = [
        {
            "device-filter": [f"0x{d}10DE" for d in devices.split()],
            "devices": "all",
            "mig-enabled": True,
            "mig-devices": dict(counts),
        }
        for devices, counts in BALANCED.items()
    ]
    entries[0]["device-filter"] = "0x20B710DE"  # a single one stands there as text
    text = yaml.safe_dump({"version": "v1", "mig-configs": {"all-balanced": entries}})
    gpus = [a_gpu(i, pci_device=device) for i, device in enumerate(" ".join(BALANCED).split())]
    wishes = lm.parse_mig_parted(text, "all-balanced", gpus)
    assert len(wishes) == len(gpus)
    for gpu in gpus:
        lm.choose_layout(GEOMETRIES[gpu.pci_device or ""], wishes[gpu.uuid])


@pytest.mark.parametrize("geometry", SEVEN, ids=lambda geometry: geometry.card)
def test_the_driver_s_own_order_does_not_bind_the_planner(geometry: lm.MigGeometry) -> None:
    """`-cgi 19,19,14,9` is refused and `-cgi 9,19,14,19` is not; with starts both are the same."""
    refused, taken = wish(geometry, "1g 1g 2g 3g"), wish(geometry, "3g 1g 2g 1g")
    assert lm.choose_layout(geometry, refused) == lm.choose_layout(geometry, taken)


# Free/Total of a listing taken while one 3g was at 4: what else the driver would still make.
@pytest.mark.parametrize(("short", "free"), [("1g", 4), ("1g+me", 1), ("2g", 2), ("3g", 1)])
def test_beside_a_3g_in_the_upper_half_fits_what_the_driver_counted(short: str, free: int) -> None:
    there, name = ("3g.20gb", 4), called(A100, short)
    layout = lm.choose_layout(A100, [there[0], *[name] * free], staying=[there])
    assert layout > {there}
    with pytest.raises(lm.RefusedError):
        lm.choose_layout(A100, [there[0], *[name] * (free + 1)], staying=[there])


def test_beside_a_3g_in_the_lower_half_fits_one_1g_fewer() -> None:
    """The listing says 3/7: 1g cannot start at 7."""
    there = ("3g.20gb", 0)
    assert len(lm.choose_layout(A100, ["3g.20gb", *["1g.5gb"] * 3], staying=[there])) == 4
    with pytest.raises(lm.RefusedError, match=r"it would fit if 3g\.20gb at 0 could move"):
        lm.choose_layout(A100, ["3g.20gb", *["1g.5gb"] * 4], staying=[there])


FORBIDDEN = [
    ("3g 3g 3g", "at most 2 of {3g} fit"),
    ("4g 4g", "at most 1 of {4g} fit"),
    ("7g 7g", "at most 1 of {7g} fit"),
    ("4g 3g 1g", "that is 8 compute slices, and it has 7"),
    ("7g 1g", "that is 8 compute slices, and it has 7"),
    ("4g 2g 2g", "that is 8 compute slices, and it has 7"),
    ("3g 1g 1g 1g 1g 1g", "that is 8 compute slices, and it has 7"),
    ("1g 1g 1g 1g 1g 1g 1g 1g+me", "that is 8 compute slices, and it has 7"),
    ("1g 1g 1g 1g 1g 1g 1g 1g", "at most 7 of {1g} fit"),
    ("2g 2g 2g 2g", "at most 3 of {2g} fit"),
    ("1g* 1g* 1g* 1g* 1g*", "at most 4 of {1g*} fit"),
    ("1g+me 1g+me", "at most 1 of {1g+me} fit"),
    ("3g 3g 1g", "that is 9 memory slices, and it has 8"),
    ("1g* 1g* 1g* 1g* 1g", "that is 9 memory slices, and it has 8"),
    ("4g 1g* 1g* 1g", "that is 9 memory slices, and it has 8"),
]


@pytest.mark.parametrize("geometry", SEVEN, ids=lambda geometry: geometry.card)
@pytest.mark.parametrize(("shorts", "reason"), FORBIDDEN)
def test_what_nvidia_forbids_is_refused_with_the_reason(
    geometry: lm.MigGeometry, shorts: str, reason: str
) -> None:
    names = wish(geometry, shorts)
    with pytest.raises(lm.RefusedError) as caught:
        lm.choose_layout(geometry, names)
    said = re.sub(r"\{(.+?)\}", lambda found: called(geometry, found[1]), reason)
    asked = lm.format_profiles(names)
    assert caught.value.fact == f"{geometry.card} cannot hold {asked}: {said}."
    check_nearest(geometry, names, caught.value)


@pytest.mark.parametrize(
    ("geometry", "shorts", "reason", "nearest"),
    [
        (A30, "4g 1g", "that is 5 compute slices, and it has 4", "4g.24gb"),
        (A30, "2g 2g 2g", "at most 2 of 2g.12gb fit", "2x 2g.12gb"),
        (A30, "1g 1g 1g 1g 1g", "at most 4 of 1g.6gb fit", "4x 1g.6gb"),
        (A30, "2g 1g 1g 1g", "that is 5 compute slices, and it has 4", "2g.12gb + 2x 1g.6gb"),
        (A30, "2g+me 1g+me", "its media engines go to one slice only", "2g.12gb + 1g.6gb+me"),
        (RTX, "2g 2g 2g", "at most 2 of 2g.48gb fit", "2x 2g.48gb"),
        (RTX, "4g 1g-me", "that is 5 compute slices, and it has 4", "4g.96gb"),
        (RTX, "1g 1g 1g 1g 1g", "at most 4 of 1g.24gb fit", "4x 1g.24gb"),
        (RTX, "1g+me.all 1g+me.all", "at most 1 of 1g.24gb+me.all fit",
         "1g.24gb+me.all + 1g.24gb-me"),
        (RTX, "1g+me.all 2g+me.all", "its media engines go to one slice only",
         "2g.48gb+me.all + 1g.24gb-me"),
        (RTX, "1g+me.all 1g", "its media engines go to one slice only",
         "1g.24gb+me.all + 1g.24gb-me"),
        (RTX, "2g+me.all 1g+me", "its media engines go to one slice only",
         "2g.48gb+me.all + 1g.24gb-me"),
        (A100, "4g 4g", "at most 1 of 4g.20gb fit", "4g.20gb + 3g.20gb"),
        (A100, "3g 3g 1g", "that is 9 memory slices, and it has 8", "2x 3g.20gb"),
        (A100, "1g+me 1g+me", "at most 1 of 1g.5gb+me fit", "1g.5gb + 1g.5gb+me"),
    ],
)  # fmt: skip
def test_a_refusal_names_what_comes_nearest(
    geometry: lm.MigGeometry, shorts: str, reason: str, nearest: str
) -> None:
    names = wish(geometry, shorts)
    with pytest.raises(lm.RefusedError) as caught:
        lm.choose_layout(geometry, names)
    assert caught.value.fact.endswith(f": {reason}.")
    assert caught.value.advice == f"The nearest that fits: {nearest}."
    check_nearest(geometry, names, caught.value)


def test_starts_that_cannot_meet_are_a_reason_of_their_own() -> None:
    """No card of the table has such starts; a driver may tell of one."""

    def profile(name: str, size: int, *starts: int) -> lm.MigProfile:
        return lm.MigProfile(name=name, driver_id=0, most=2, memory_mib=size * 1024,
                             multiprocessors=None, size=size, starts=starts)  # fmt: skip

    profiles = profile("2g.2gb", 2, 1), profile("1g.1gb", 1, 1, 2)
    odd = lm.MigGeometry(card="odd", compute_slices=4, memory_units=4, profiles=profiles)
    with pytest.raises(lm.RefusedError) as caught:
        lm.choose_layout(odd, ["2g.2gb", "1g.1gb"])
    assert str(caught.value) == (
        "odd cannot hold 2g.2gb + 1g.1gb: their allowed places overlap. "
        "The nearest that fits: 2g.2gb."
    )


def test_a_profile_of_another_card_is_refused_with_those_there_are() -> None:
    with pytest.raises(lm.RefusedError) as caught:
        lm.choose_layout(A100, ["3g.20gb", "1g.6gb"])
    assert caught.value.fact == "A100 40 GB has no MIG profile '1g.6gb'."
    assert caught.value.advice.startswith("Did you mean 1g.5gb? It has 1g.5gb, 1g.5gb+me, ")
    with pytest.raises(lm.RefusedError) as caught:
        A30.profile("everything")
    assert caught.value.advice.startswith("It has 1g.6gb, ")


def test_an_early_driver_s_name_for_a_slice_of_gb200_is_refused() -> None:
    """mig-parted's first file for it had 1g.24gb; the driver of production boards says 1g.23gb."""
    with pytest.raises(lm.RefusedError, match=r"no MIG profile '1g\.24gb'.*It has 1g\.23gb, "):
        lm.choose_layout(CARDS["GB200 186 GB"], ["1g.24gb"])


# --- laws of choosing --------------------------------------------------------------

cards = st.sampled_from([*CARDS])
# Few cards differ in shape; the rest only in names.
shapes = st.sampled_from(["A30", "A100 40 GB", "B200 180 GB", "RTX PRO 6000 Blackwell"])


@st.composite
def layouts_of_a_card(draw: st.DrawFn) -> tuple[str, Layout]:
    card = draw(cards)
    several = draw(st.sampled_from([*layouts_by_names(card).values()]))
    return card, draw(st.sampled_from(several))


def profiles_of(card: str) -> st.SearchStrategy[str]:
    return st.sampled_from([row[0] for row in ROWS[card]["profiles"]])


def some_of(slices: Collection[lm.Slice]) -> st.SearchStrategy[Layout]:
    return st.sets(st.sampled_from(sorted(slices))).map(frozenset) if slices else st.just(
        frozenset())  # fmt: skip


def cuts_of(card: str, layout: Collection[lm.Slice]) -> list[Cut]:
    """The layout as cuts; a slice at a start that its profile does not have is found nowhere."""
    known = {cut.slice: cut for cut in every_cut(card)}
    return [known[wanted] for wanted in layout]


@fewer
@given(layouts_of_a_card(), st.randoms(use_true_random=False))
def test_a_chosen_layout_is_what_was_wished_and_nothing_overlaps(
    given_card: tuple[str, Layout], chance: Any
) -> None:
    card, layout = given_card
    names = [*names_of(layout)]
    chance.shuffle(names)
    chosen = lm.choose_layout(CARDS[card], names)
    assert Counter(name for name, _ in chosen) == Counter(names)
    assert stands(ROWS[card], cuts_of(card, chosen))


@fewer
@given(st.data(), shapes)
def test_the_order_of_a_wish_never_matters(data: st.DataObject, card: str) -> None:
    names = data.draw(st.lists(profiles_of(card), max_size=7))
    other = data.draw(st.permutations(names))
    assert chosen_or_refused(card, names) == chosen_or_refused(card, other)


def chosen_or_refused(card: str, names: Sequence[str]) -> Layout | str:
    try:
        return lm.choose_layout(CARDS[card], names)
    except lm.RefusedError as refused:
        return refused.advice


@fewer
@given(st.data(), layouts_of_a_card())
def test_what_stays_never_moves_whatever_is_wished_beside_it(
    data: st.DataObject, given_card: tuple[str, Layout]
) -> None:
    """Free any part of a layout and wish anew: the rest stays, or it is said that it cannot."""
    card, layout = given_card
    staying = data.draw(some_of(layout))
    more = data.draw(st.lists(profiles_of(card), max_size=4))
    names = [*names_of(staying), *more]
    possible = [found for found in layouts_by_names(card).get(tuple(sorted(names)), ())
                if found >= staying]  # fmt: skip
    try:
        chosen = lm.choose_layout(CARDS[card], names, existing=layout, staying=staying)
    except lm.RefusedError as refused:
        assert not possible
        check_nearest(CARDS[card], names, refused, staying)
    else:
        assert chosen in possible


@fewer
@given(layouts_of_a_card())
def test_what_is_there_and_wished_again_in_full_is_kept_exactly(
    given_card: tuple[str, Layout],
) -> None:
    card, layout = given_card
    assert lm.choose_layout(CARDS[card], names_of(layout), existing=layout) == layout


@fewer
@given(st.data(), layouts_of_a_card())
def test_of_what_is_there_as_much_stays_as_can_and_the_largest_room_is_left(
    data: st.DataObject, given_card: tuple[str, Layout]
) -> None:
    card, there = given_card
    names = data.draw(st.sampled_from([*layouts_by_names(card)]))
    possible = layouts_by_names(card)[names]
    chosen = lm.choose_layout(CARDS[card], names, existing=there)
    most = max(len(layout & there) for layout in possible)
    assert len(chosen & there) == most
    equals = [layout for layout in possible if len(layout & there) == most]
    assert largest_room(card, chosen) == max(largest_room(card, layout) for layout in equals)


@cache
def largest_room(card: str, layout: Layout) -> int:
    joining = [c for c in every_cut(card) if layout | {c.slice} in every_layout(card) - {layout}]
    return max((len(cut.units) for cut in joining), default=0)


@fewer
@given(st.data(), shapes)
def test_the_nearest_of_a_refusal_is_valid_and_nowhere_larger_than_the_wish(
    data: st.DataObject, card: str
) -> None:
    names = data.draw(st.lists(profiles_of(card), min_size=1, max_size=8))
    try:
        lm.choose_layout(CARDS[card], names)
    except lm.RefusedError as refused:
        assert tuple(sorted(names)) not in layouts_by_names(card)
        check_nearest(CARDS[card], names, refused)
    else:
        assert tuple(sorted(names)) in layouts_by_names(card)


def check_nearest(
    geometry: lm.MigGeometry,
    names: Sequence[str],
    refused: lm.RefusedError,
    staying: Layout = frozenset(),
) -> None:
    """It stands beside what stays, no slice is larger than one wished, and it is the most."""
    card = geometry.card
    possible = {
        near: sum(usable_mib(card, name) for name in near)
        for near, several in layouts_by_names(card).items()
        if no_larger(card, near, names) and any(layout >= staying for layout in several)
    }
    if refused.advice == "Free some first.":
        assert not any(possible)
        return
    nearest = read_profiles(refused.advice)
    assert possible[nearest] == max(possible.values())


def no_larger(card: str, near: Sequence[str], names: Sequence[str]) -> bool:
    """Whether every slice can stand for a different one of the wish, in memory and in compute."""
    size = {name: (usable_mib(card, name), int(name[0])) for name in {*near, *names}}
    stands_for: dict[int, int] = {}

    def finds(place: int, tried: set[int]) -> bool:
        memory, compute = size[near[place]]
        for number, name in enumerate(names):
            if number in tried or size[name][0] < memory or size[name][1] < compute:
                continue
            tried.add(number)
            if number not in stands_for or finds(stands_for[number], tried):
                stands_for[number] = place
                return True
        return False

    return all(finds(place, set()) for place in range(len(near)))


def read_profiles(advice: str) -> tuple[str, ...]:
    """The names in `The nearest that fits: 3g.20gb + 2x 1g.5gb.`"""
    listed = advice.removeprefix("The nearest that fits: ").removesuffix(".")
    parts = [part.rpartition("x ") for part in listed.split(" + ")]
    return tuple(sorted(name for count, _, name in parts for _ in range(int(count or 1))))


@given(st.data(), cards)
def test_a_set_of_slices_is_valid_exactly_if_it_stands(data: st.DataObject, card: str) -> None:
    slices = data.draw(st.lists(st.sampled_from([c.slice for c in every_cut(card)]), max_size=4))
    assert lm.is_valid(CARDS[card], slices) == stands(ROWS[card], cuts_of(card, slices))


def test_slices_out_of_place_are_not_valid() -> None:
    assert not lm.is_valid(A100, [("3g.20gb", 1)])
    assert not lm.is_valid(A100, [("1g.5gb", 7)])
    assert not lm.is_valid(A100, [("1g.6gb", 0)])
    assert not lm.is_valid(A100, [("1g.5gb", 0), ("1g.5gb", 0)])
    assert lm.is_valid(A100, [])


def test_an_empty_wish_is_the_empty_layout() -> None:
    assert lm.choose_layout(A100, []) == frozenset()


def test_slices_that_stay_but_are_wished_no_more_are_a_refusal() -> None:
    both = [("1g.5gb", 0), ("1g.5gb", 1)]
    with pytest.raises(lm.RefusedError, match=r"Free some first\."):
        lm.choose_layout(A100, ["1g.5gb"], staying=both)


# --- a slice for each need -----------------------------------------------------------

models = st.sampled_from(["chat", "embed", "rerank", "vision"])


@st.composite
def needs_of_a_card(draw: st.DrawFn) -> tuple[str, dict[str, int]]:
    """Needs at and around the sizes that there are."""
    card = draw(shapes)
    sizes = sorted({usable_mib(card, row[0]) for row in ROWS[card]["profiles"]})
    size = st.sampled_from(sizes).flatmap(lambda s: st.integers(s - 1, s + 1)) | st.integers(
        0, sizes[-1])  # fmt: skip
    return card, draw(st.dictionaries(models, size, min_size=1, max_size=4))


def cheapest(
    card: str, needs: Sequence[int], bound: Layout = frozenset()
) -> tuple[int, int] | None:
    """Every layout and every way to hand it out: the fewest units, then the most compute."""
    costs = []
    for layout in every_layout(card):
        rest = names_of(layout - bound)
        if layout < bound or len(rest) != len(needs) or not layout >= bound or not plain(rest):
            continue
        if any(
            all(usable_mib(card, name) >= need for name, need in zip(order, needs, strict=True))
            for order in itertools.permutations(rest)
        ):
            costs.append(cost(card, rest))
    return min(costs, default=None)


def cost(card: str, names: Collection[str]) -> tuple[int, int]:
    return sum(units_of(card, name) for name in names), -sum(int(name[0]) for name in names)


@fewer
@given(needs_of_a_card())
def test_each_model_gets_a_slice_that_holds_it_and_together_the_fewest_units(
    given_card: tuple[str, dict[str, int]],
) -> None:
    card, needs = given_card
    best = cheapest(card, [*needs.values()])
    try:
        slices = lm.slices_for_needs(CARDS[card], needs)
    except lm.RefusedError as refused:
        said = str(refused)
        assert best is None
        assert any(model in said for model in needs)
        return
    assert slices.keys() == needs.keys()
    assert all(usable_mib(card, slices[m][0]) >= needs[m] for m in needs)
    assert frozenset(slices.values()) in every_layout(card)
    assert cost(card, [name for name, _ in slices.values()]) == best


@fewer
@given(st.data(), needs_of_a_card())
def test_models_that_have_slices_keep_them(
    data: st.DataObject, given_card: tuple[str, dict[str, int]]
) -> None:
    card, needs = given_card
    several = data.draw(st.sampled_from([*layouts_by_names(card).values()]))
    there = data.draw(st.sampled_from(several))
    kept = sorted(data.draw(some_of(there)))[:3]
    bound = {f"old{number}": wanted for number, wanted in enumerate(kept)}
    best = cheapest(card, [*needs.values()], frozenset(kept))
    try:
        slices = lm.slices_for_needs(CARDS[card], needs, existing=there, bound=bound)
    except lm.RefusedError:
        assert best is None
        return
    assert {name: slices[name] for name in bound} == bound
    assert cost(card, [slices[model][0] for model in needs]) == best
    assert frozenset(slices.values()) in every_layout(card)


def test_the_largest_need_gets_the_largest_slice() -> None:
    slices = lm.slices_for_needs(A100, {"small": 3000, "large": 19000, "middle": 9000})
    assert {model: profile for model, (profile, _) in slices.items()} == {
        "small": "1g.5gb", "large": "4g.20gb", "middle": "2g.10gb",
    }  # fmt: skip


def test_slices_that_are_there_serve_again() -> None:
    needs, there = {"a": 19000, "b": 4000}, {("4g.20gb", 0), ("1g.5gb", 5)}
    slices = lm.slices_for_needs(A100, needs, existing=there)
    assert slices == {"a": ("4g.20gb", 0), "b": ("1g.5gb", 5)}


def test_a_model_larger_than_every_slice_is_named_with_both_sizes() -> None:
    with pytest.raises(lm.RefusedError) as caught:
        lm.slices_for_needs(A30, {"chat": 30 * 1024, "embed": 1024})
    assert str(caught.value) == (
        "chat needs 30.0 GiB, and the largest slice of A30 has 23.4 GiB. Give it whole GPUs."
    )


def test_models_that_do_not_fit_together_are_named_with_what_would_do() -> None:
    with pytest.raises(lm.RefusedError) as caught:
        lm.slices_for_needs(A30, {"a": 20000, "b": 9000, "c": 3000})
    assert caught.value.fact == "A30 has no layout for a, b, c together."
    assert caught.value.advice == "Without a it would be 2g.12gb + 1g.6gb."


def test_where_bound_models_fill_the_card_it_says_so() -> None:
    with pytest.raises(lm.RefusedError) as caught:
        lm.slices_for_needs(A30, {"b": 5000}, bound={"a": ("4g.24gb", 0)})
    assert caught.value.fact == "A30 has no room beside 4g.24gb at 0."
    assert caught.value.advice == "Move one of them to another GPU first."


def test_a_bound_model_keeps_its_variant_but_nobody_is_given_one() -> None:
    slices = lm.slices_for_needs(RTX, {"b": 20000}, bound={"a": ("1g.24gb+gfx", 3)})
    assert slices["a"] == ("1g.24gb+gfx", 3)
    assert slices["b"][0] == "1g.24gb"


def test_beside_a_slice_with_all_media_engines_no_plain_one_is_given() -> None:
    with pytest.raises(lm.RefusedError, match="no room beside"):
        lm.slices_for_needs(RTX, {"b": 20000}, bound={"a": ("1g.24gb+me.all", 0)})


def test_two_models_bound_to_one_slice_by_hand_do_not_stop_a_third() -> None:
    bound = {"a": ("1g.5gb", 0), "b": ("1g.5gb", 0)}
    slices = lm.slices_for_needs(A100, {"c": 4000}, bound=bound)
    assert slices["c"] != ("1g.5gb", 0)
    assert {name: slices[name] for name in bound} == bound


# --- tables and names ----------------------------------------------------------------

# MiB of a whole card, as `nvidia-smi` lists them.
TOTALS = {
    "A30": 24576,
    "A100 40 GB": 40960,
    "A100 80 GB": 81920,
    "H100 80 GB": 81559,
    "H100 94 GB": 95830,
    "H100 96 GB, GH200 96 GB, H20": 97871,
    "H200 141 GB": 143771,
    "B200 180 GB": 183359,
    "GB200 186 GB": 189471,
    "RTX PRO 6000 Blackwell": 97887,
}


@pytest.mark.parametrize("card", TOTALS)
def test_the_name_of_every_profile_follows_from_its_numbers(card: str) -> None:
    """A name counts eighths of the card, so `1g.23gb` of a B200 has 20.5 GiB and not 23."""
    for profile in CARDS[card].profiles:
        if profile.memory_mib is not None:
            made = lm.profile_name(
                profile.compute_slices, profile.memory_mib, TOTALS[card], profile.variant
            )
            assert made == profile.name


def test_a_half_gigabyte_in_a_name_is_rounded_up_as_nvidia_does() -> None:
    """B300: four eighths of 269 are 134.5, and its profile is 3g.135gb."""
    assert lm.profile_name(3, 134 * 1024, 269 * 1024 - 500, "") == "3g.135gb"


@every_card
def test_a_row_of_the_recipe_is_consistent_in_itself(card: str) -> None:
    geometry = CARDS[card]
    assert ROWS[card]["devices"]
    assert len({p.name for p in geometry.profiles}) == len(geometry.profiles)
    assert len({p.driver_id for p in geometry.profiles}) == len(geometry.profiles)
    for profile in geometry.profiles:
        assert re.fullmatch(r"[12347]g\.\d+gb(\+me|\+me\.all|-me|\+gfx)?", profile.name)
        assert all(0 <= s <= geometry.memory_units - profile.size for s in profile.starts)
        assert profile.compute_slices <= geometry.compute_slices
        most = [profile.name] * profile.most
        assert tuple(most) in lm.layouts(geometry), "the driver's own count must be reachable"
    whole = max(geometry.profiles, key=lambda profile: profile.size)
    assert (whole.size, whole.compute_slices) == (geometry.memory_units, geometry.compute_slices)


def test_a_device_id_is_four_digits_and_of_one_card_only() -> None:
    """YAML would take an unquoted 2330 for a number."""
    devices = [device for row in ROWS.values() for device in row["devices"]]
    assert all(isinstance(d, str) and re.fullmatch(r"[0-9A-F]{4}", d) for d in devices)
    assert len(devices) == len({*devices})


@pytest.mark.parametrize(
    ("pci_device", "name", "card"),
    [
        ("20B7", "NVIDIA A30", "A30"),
        ("2331", "NVIDIA H100 PCIe", "H100 80 GB"),
        (None, "NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000 Blackwell"),
        ("2BB1", "NVIDIA RTX PRO 6000 Blackwell Max-Q", "RTX PRO 6000 Blackwell"),
        ("2684", "NVIDIA GeForce RTX 4090", None),
        (None, "NVIDIA A100-SXM4-40GB", None),
        (None, "NVIDIA T2330 of 2901", None),
        (None, None, None),
    ],
)
def test_a_card_s_table_is_found_by_its_device_or_by_its_name(
    pci_device: str | None, name: str | None, card: str | None
) -> None:
    found = lm.table_geometry(GEOMETRIES, pci_device, name)
    assert (found.card if found else None) == card


def test_memory_that_nobody_published_is_guessed_below_what_the_name_says() -> None:
    unknown = [p for geometry in CARDS.values() for p in geometry.profiles if p.memory_mib is None]
    for profile in unknown:
        named_gib = int(re.findall(r"(\d+)gb", profile.name)[0])
        assert profile.usable_mib < named_gib * 1024
    known = RTX.profile("1g.24gb-me")
    assert (known.usable_mib, known.variant) == (int(23.62 * 1024), "-me")


# --- what an operator types and reads ------------------------------------------------


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("3g.20gb, 2x 1g.5gb", ["3g.20gb", "1g.5gb", "1g.5gb"]),
        ("3g.20gb 1g.5gb 1g.5gb", ["3g.20gb", "1g.5gb", "1g.5gb"]),
        ("2x2g.10gb;1g.5gb+me", ["2g.10gb", "2g.10gb", "1g.5gb+me"]),
        ("2 \u00d7 1g.24gb-me, 3*1g.24gb+me.all", ["1g.24gb-me"] * 2 + ["1g.24gb+me.all"] * 3),
        ("0x 1g.5gb", []),
        (" ,; ", []),
        ("", []),
    ],
)
def test_a_wish_is_read_as_it_is_typed(text: str, names: list[str]) -> None:
    assert lm.parse_wish(text) == names


@fewer
@given(layouts_of_a_card(), st.sampled_from([", ", " ", ";", " + "]))
def test_a_wish_reads_what_is_written_for_the_operator(
    given_card: tuple[str, Layout], between: str
) -> None:
    names = names_of(given_card[1])
    text = lm.format_profiles(names).replace(" + ", between)
    assert sorted(lm.parse_wish(text)) == [*names]


@pytest.mark.parametrize("text", ["65x 1g.5gb", "1g.5gb " * 65, "9999999999x 1g.5gb"])
def test_a_wish_of_more_slices_than_any_card_has_is_refused(text: str) -> None:
    names = lm.parse_wish(text)
    assert len(names) <= 65  # nobody's typing error fills the memory
    with pytest.raises(lm.RefusedError, match=r"at most 7 of 1g\.5gb fit\. .*: 7x 1g\.5gb\."):
        lm.choose_layout(A100, names)


def test_needs_are_typed_in_gib() -> None:
    assert lm.parse_needs("chat=15, embed=3.5") == {"chat": 15360, "embed": 3584}
    assert lm.parse_needs(" chat=0.0001;embed=1 ") == {"chat": 1, "embed": 1024}


@pytest.mark.parametrize(
    "text", ["", "chat", "chat=", "chat=much", "chat=15GiB", "chat=1=2", "chat=nan", "chat=1e999"]
)
def test_needs_that_say_no_number_are_refused(text: str) -> None:
    with pytest.raises(lm.RefusedError, match="Write it in GiB"):
        lm.parse_needs(text)


def test_profiles_are_listed_from_the_largest_on() -> None:
    names = ["1g.5gb", "3g.20gb", "1g.10gb", "1g.5gb", "1g.5gb+me"]
    assert lm.format_profiles(names) == "3g.20gb + 1g.10gb + 2x 1g.5gb + 1g.5gb+me"
    assert lm.format_profiles([]) == ""


def test_slices_are_listed_along_the_card() -> None:
    assert lm.format_slices([("1g.5gb", 4), ("3g.20gb", 0)]) == "3g.20gb at 0, 1g.5gb at 4"
    assert lm.format_slices([]) == "no slices"


# --- placements ------------------------------------------------------------------------

HALVES = a_layout(("3g.20gb", 0), ("3g.20gb", 4))


def faults(*placed: lm.Model, layouts: tuple[lm.MigLayout, ...] = ()) -> list[str]:
    return lm.placement_faults(a_state(*placed, mig_layouts=layouts))


def test_a_model_alone_on_a_gpu_is_no_fault() -> None:
    assert faults(a_model(placement=on_gpus(GPU_0)), a_model("b", placement=on_gpus(GPU_1))) == []
    assert faults(a_model(), a_model("b")) == []  # on the processor there is room for many


def test_two_models_that_each_want_a_whole_gpu_are_a_fault() -> None:
    both = faults(a_model("a", placement=on_gpus(GPU_0, GPU_1)),
                  a_model("b", placement=on_gpus(GPU_1)))  # fmt: skip
    assert both == [f"a and b book 200 % of {GPU_1}"]


@pytest.mark.parametrize(
    ("shares", "booked"),
    [((0.5, 0.5), None), ((0.3, 0.3, 0.4), None), ((0.1,) * 10, None), ((0.6, 0.5), "110 %"),
     ((0.4, None), "140 %")],
)  # fmt: skip
def test_fractions_of_a_gpu_add_up_to_one_at_most(
    shares: tuple[float | None, ...], booked: str | None
) -> None:
    sharing = [a_model(f"m{number}", placement=on_gpus(memory_fraction=share))
               for number, share in enumerate(shares)]  # fmt: skip
    found = faults(*sharing)
    assert [fault.split(" book ")[1] for fault in found] == (
        [f"{booked} of {GPU_0}"] if booked else []
    )


def test_every_replica_takes_its_share() -> None:
    shared = a_model(placement=on_gpus(memory_fraction=0.4), replicas=2)
    assert faults(shared) == []
    assert faults(a_model(placement=on_gpus(memory_fraction=0.4), replicas=3)) != []
    doubled = a_model(placement=on_gpus(), replicas=2)
    assert faults(doubled) == [f"chat books 200 % of {GPU_0}"]
    assert [lm.gpu_share(shared), lm.gpu_share(doubled), lm.gpu_share(a_model())] == [0.8, 2, 1]


def test_who_is_wished_where_leaves_out_who_is_stopped() -> None:
    running, asleep = a_model("a", placement=on_gpus()), a_model("b", wish="stopped")
    assert lm.placements(a_state(running, asleep)) == {("a", on_gpus(), 1)}


def test_a_stopped_model_books_nothing() -> None:
    asleep = a_model("a", placement=on_gpus(), wish="stopped")
    assert faults(asleep, a_model("b", placement=on_gpus())) == []


def test_a_whole_gpu_and_its_slices_exclude_each_other() -> None:
    whole = a_model("a", placement=on_gpus(GPU_0))
    sliced = a_model("b", placement=on_slice("3g.20gb", 0))
    assert faults(whole, sliced, layouts=(HALVES,)) == [
        f"a wants the whole of {GPU_0}, which is cut into MIG slices"
    ]
    assert faults(whole, layouts=(a_layout(),)) == []  # MIG off is no cut


def test_a_slice_that_no_layout_has_is_a_fault() -> None:
    astray = a_model("b", placement=on_slice("3g.20gb", 2))
    assert faults(astray, layouts=(HALVES,)) == [
        f"b is bound to the slice 3g.20gb at 2 of {GPU_0}, which is not in that GPU's wished layout"
    ]
    assert faults(a_model("b", placement=on_slice("3g.20gb", 0))) != []
    elsewhere = a_model("b", placement=on_slice("3g.20gb", 0, gpu=GPU_1))
    assert faults(elsewhere, layouts=(HALVES,)) != []


def test_a_slice_has_room_for_one_model_and_its_neighbour_for_another() -> None:
    lower, upper = on_slice("3g.20gb", 0), on_slice("3g.20gb", 4)
    beside = a_model("a", placement=lower), a_model("b", placement=upper)
    assert faults(*beside, layouts=(HALVES,)) == []
    above = a_model("a", placement=lower), a_model("b", placement=lower)
    assert faults(*above, layouts=(HALVES,)) == [f"a and b book 200 % of 3g.20gb at 0 of {GPU_0}"]


def test_all_faults_are_refused_in_one_sentence_with_advice() -> None:
    state = a_state(
        a_model("a", placement=on_gpus(GPU_0)),
        a_model("b", placement=on_gpus(GPU_0)),
        a_model("c", placement=on_slice("1g.5gb", 0, gpu=GPU_1)),
    )
    with pytest.raises(lm.RefusedError) as caught:
        lm.check_placements(state, known=["d is of no concern"])
    assert "c is bound to the slice 1g.5gb at 0" in caught.value.fact
    assert "a and b book 200 %" in caught.value.fact
    assert caught.value.advice.startswith("Stop one, ")
    lm.check_placements(a_state(a_model()))
    lm.check_placements(state, known=lm.placement_faults(state))  # mended one after the other


def test_a_placement_says_on_which_gpus_it_is() -> None:
    assert lm.gpus_of(a_model(placement=on_gpus(GPU_0, GPU_1))) == {GPU_0, GPU_1}
    assert lm.gpus_of(a_model(placement=on_slice("1g.5gb", 3, gpu=GPU_1))) == {GPU_1}
    assert lm.gpus_of(a_model()) == frozenset()


# --- which GPUs --------------------------------------------------------------------------


def a_gpu(index: int, **changes: Any) -> lm.Gpu:
    """A GPU whose UUID begins with a letter of its own."""
    made: dict[str, Any] = {
        "uuid": lm.GpuUuid(f"GPU-{'abcdefghijklmnopqrstuvwxyz'[index]}0000000-0000-{index:04}"),
        "index": index,
        "name": "NVIDIA H100 80GB HBM3",
        "memory_mib": 81559,
    }
    return lm.Gpu(**made | changes)


def a_server(
    *gpus: lm.Gpu, links: Mapping[tuple[int, int], lm.Link] | None = None, **changes: Any
) -> lm.Hardware:
    joined = {frozenset({gpus[a].uuid, gpus[b].uuid}): link for (a, b), link in
              (links or {}).items()}  # fmt: skip
    return lm.Hardware(gpus=gpus, links=joined, **changes)


FOUR = [a_gpu(index) for index in range(4)]
BRIDGED = a_server(*FOUR, links={
    (0, 1): lm.Link("PHB"), (0, 2): lm.Link("SYS"), (0, 3): lm.Link("SYS"),
    (1, 2): lm.Link("SYS"), (1, 3): lm.Link("SYS"), (2, 3): lm.Link("NVLink", 12),
})  # fmt: skip


def indices(hardware: lm.Hardware, choice: lm.GpuChoice) -> list[int]:
    return [gpu.index for gpu in hardware.gpus if gpu.uuid in choice.gpu_uuids]


def test_two_gpus_on_a_bridge_are_preferred_and_the_reason_says_so() -> None:
    choice = lm.choose_gpus(BRIDGED, 2)
    assert indices(BRIDGED, choice) == [2, 3]
    assert choice.reason == "GPU 2 and GPU 3 are joined by a direct NVLink bridge"


def test_nvlink_that_is_taken_leaves_the_next_best() -> None:
    choice = lm.choose_gpus(BRIDGED, 2, taken=[FOUR[3].uuid])
    assert indices(BRIDGED, choice) == [0, 1]
    assert choice.reason == "GPU 0 and GPU 1 are joined by the processor's PCIe root"


def test_several_gpus_are_as_good_as_their_slowest_pair() -> None:
    choice = lm.choose_gpus(BRIDGED, 4)
    assert choice.reason == (
        "GPU 0 and GPU 1 and GPU 2 and GPU 3 are joined by the bus between processors"
    )


def test_one_gpu_is_the_first_that_is_free() -> None:
    choice = lm.choose_gpus(BRIDGED, 1, taken=[FOUR[0].uuid])
    assert (indices(BRIDGED, choice), choice.reason) == ([1], "GPU 1 is free")


def test_a_gpu_cut_by_mig_is_no_whole_gpu() -> None:
    server = a_server(a_gpu(0, mig_enabled=True), a_gpu(1, mig_enabled=False), a_gpu(2))
    assert indices(server, lm.choose_gpus(server, 2)) == [1, 2]
    with pytest.raises(lm.RefusedError) as caught:
        lm.choose_gpus(server, 3)
    assert caught.value.fact == "3 free GPUs of one kind are not here; free are GPU 1, GPU 2."


def test_different_kinds_are_never_mixed() -> None:
    server = a_server(
        a_gpu(0), a_gpu(1, name="NVIDIA A100 80GB PCIe"), a_gpu(2, memory_mib=95830), a_gpu(3),
        links={(0, 1): lm.Link("NVLink", 12), (0, 3): lm.Link("SYS")},
    )  # fmt: skip
    assert indices(server, lm.choose_gpus(server, 2)) == [0, 3]
    with pytest.raises(lm.RefusedError, match="3 free GPUs of one kind are not here"):
        lm.choose_gpus(server, 3)


def test_one_good_pair_does_not_make_up_for_a_slow_one() -> None:
    even = {pair: lm.Link("PIX") for pair in itertools.combinations((1, 2, 3), 2)}
    server = a_server(*FOUR, links=even | {(0, 1): lm.Link("NVLink", 12), (0, 2): lm.Link("SYS"),
                                           (0, 3): lm.Link("SYS")})  # fmt: skip
    choice = lm.choose_gpus(server, 3)
    assert indices(server, choice) == [1, 2, 3]
    assert choice.reason == "GPU 1 and GPU 2 and GPU 3 are joined by one PCIe switch"


def test_links_that_nobody_knows_are_the_last_choice_and_said() -> None:
    server = a_server(*FOUR[:3], links={(1, 2): lm.Link("SYS")})
    assert indices(server, lm.choose_gpus(server, 2)) == [1, 2]
    blind = a_server(*FOUR[:2])
    assert lm.choose_gpus(blind, 2).reason == "GPU 0 and GPU 1; how they are joined is unknown"


def test_on_a_server_without_gpus_none_is_free() -> None:
    with pytest.raises(lm.RefusedError, match="free are none"):
        lm.choose_gpus(lm.Hardware(), 1)


links = st.none() | st.builds(
    lm.Link, st.sampled_from([*lm.LINK_MEANINGS]), st.integers(min_value=0, max_value=18)
)


@fewer
@given(st.lists(links, min_size=10, max_size=10), st.integers(1, 4), st.sets(st.integers(0, 4)))
def test_no_other_free_gpus_have_a_better_slowest_pair(
    joined: list[lm.Link | None], count: int, taken: set[int]
) -> None:
    gpus = [a_gpu(index) for index in range(5)]
    pairs = [*itertools.combinations(range(5), 2)]
    known = {pair: link for pair, link in zip(pairs, joined, strict=True) if link is not None}
    server = a_server(*gpus, links=known)
    free = [index for index in range(5) if index not in taken]
    if len(free) < count:
        with pytest.raises(lm.RefusedError):
            lm.choose_gpus(server, count, taken=[gpus[i].uuid for i in taken])
        return
    choice = lm.choose_gpus(server, count, taken=[gpus[index].uuid for index in taken])
    order = [*lm.LINK_MEANINGS]

    def slowest(group: Sequence[int]) -> tuple[int, int]:
        found = [known.get(pair) for pair in itertools.combinations(group, 2)]
        return max(((order.index(link.kind), -link.lanes) if link else (len(order), 0)
                    for link in found), default=(0, 0))  # fmt: skip

    chosen = indices(server, choice)
    assert {*chosen} <= {*free}
    assert slowest(chosen) == min(map(slowest, itertools.combinations(free, count)))


def test_more_lanes_are_the_better_link_and_show() -> None:
    assert lm.Link("NVLink", 12).rank < lm.Link("NVLink", 4).rank < lm.Link("PIX").rank
    assert [str(lm.Link("NVSwitch", 18)), str(lm.Link("PHB"))] == ["NV18", "PHB"]


# --- finding a GPU -----------------------------------------------------------------------


@pytest.mark.parametrize("text", ["2", "GPU-c0000000-0000-0002", "GPU-c0", "c0000000", "c"])
def test_a_gpu_is_meant_by_its_index_or_how_its_uuid_begins(text: str) -> None:
    assert BRIDGED.named(text).index == 2


@pytest.mark.parametrize("text", ["4", "", "GPU-", "z", "-1"])
def test_what_names_no_gpu_or_several_is_refused_with_those_there_are(text: str) -> None:
    with pytest.raises(lm.RefusedError) as caught:
        BRIDGED.named(text)
    assert f"is {text!r}" in caught.value.fact
    assert caught.value.advice.startswith("GPUs: 0 (GPU-a0000000…), 1 (GPU-b0000000…)")


def test_a_number_that_is_no_index_is_never_the_beginning_of_a_uuid() -> None:
    """The wrong card would be cut."""
    server = a_server(a_gpu(0, uuid=GPU_1), a_gpu(1))
    assert server.named("22222222").index == 0
    with pytest.raises(lm.RefusedError):
        server.named("2")


def test_on_a_server_with_one_gpu_no_name_still_names_none() -> None:
    for text in ("", "GPU-"):
        with pytest.raises(lm.RefusedError):
            a_server(a_gpu(0)).named(text)


def test_a_driver_that_does_not_answer_says_so_itself() -> None:
    broken = lm.HardwareError("The NVIDIA driver does not answer.", advice="Look at dmesg.")
    with pytest.raises(lm.HardwareError, match="does not answer"):
        lm.Hardware(fault=broken).named("0")
    with pytest.raises(lm.RefusedError, match="GPUs: none"):
        lm.Hardware().named("0")


def test_a_gpu_is_found_by_its_uuid_and_a_slice_by_its_place() -> None:
    device = lm.MigDevice(profile="1g.5gb", start=4, uuid="MIG-1")
    gpu = a_gpu(0, slices=(device,))
    server = a_server(gpu)
    assert server.gpu(gpu.uuid) == gpu
    assert server.gpu("GPU-none") is None
    assert (gpu.title, gpu.layout) == ("GPU 0", {("1g.5gb", 4)})
    assert gpu.device(("1g.5gb", 4)) == device
    assert gpu.device(("1g.5gb", 0)) is None
    hidden = a_gpu(1, slices=None)
    assert (hidden.layout, hidden.device(("1g.5gb", 4))) == (frozenset(), None)


def test_docker_is_asked_for_uuids_and_for_nothing_that_is_not_there() -> None:
    made = lm.MigDevice(profile="1g.5gb", start=4, uuid="MIG-1")
    halfway = lm.MigDevice(profile="1g.5gb", start=5, uuid=None)
    server = a_server(a_gpu(0, uuid=GPU_0, slices=(made, halfway)))
    assert lm.device_ids(on_gpus(GPU_0, GPU_1), server) == (GPU_0, GPU_1)
    assert lm.device_ids(lm.CpuPlacement(), server) == ()
    assert lm.device_ids(on_slice("1g.5gb", 4), server) == ("MIG-1",)
    absent = (f"absent: 1g.5gb at 5 of {GPU_0}",)
    assert lm.device_ids(on_slice("1g.5gb", 5), server) == absent
    assert lm.device_ids(on_slice("1g.5gb", 5), None) == absent
    assert lm.device_ids(on_slice("1g.5gb", 5), lm.Hardware()) == absent


@pytest.mark.parametrize(
    ("kernel", "library", "pending"),
    [("580.65", "580.95", True), ("580.95", "580.95", False), (None, "580.95", False),
     ("580.95", None, False), (None, None, False)],
)  # fmt: skip
def test_a_driver_upgraded_while_loaded_needs_a_reboot(
    kernel: str | None, library: str | None, pending: bool
) -> None:
    hardware = lm.Hardware(kernel_version=kernel, library_version=library)
    assert hardware.reboot_pending is pending


# --- what the driver's texts say -----------------------------------------------------------


def test_of_a_cut_gpu_its_mig_devices_are_visible() -> None:
    text = """\
GPU 0: NVIDIA RTX PRO 6000 Blackwell Server Edition (UUID: GPU-8b89b58e-1111-2222-3333-444455556666)
  MIG 1g.24gb     Device  0: (UUID: MIG-445da789-865d-5fd1-b2b6-32a48bf66c39)
  MIG 2g.48gb     Device  1: (UUID: MIG-0b1c2d3e-865d-5fd1-b2b6-32a48bf66c39)
"""
    assert lm.parse_visible_devices(text) == {
        "MIG-445da789-865d-5fd1-b2b6-32a48bf66c39", "MIG-0b1c2d3e-865d-5fd1-b2b6-32a48bf66c39",
    }  # fmt: skip


def test_whole_gpus_are_visible_by_their_own_uuids() -> None:
    text = (
        "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-9d699867-0000-7fc1-bd12-558372f8959a)\n"
        "GPU 1: A100-PCIE-40GB (UUID: GPU-a7449be4-0000-9501-f69d-1e5841e103ce)\n"
    )
    assert lm.parse_visible_devices(text) == {
        "GPU-9d699867-0000-7fc1-bd12-558372f8959a", "GPU-a7449be4-0000-9501-f69d-1e5841e103ce",
    }  # fmt: skip


def test_an_old_driver_s_mig_uuids_with_slashes_are_read_whole() -> None:
    text = (
        "GPU 0: A100-PCIE-40GB (UUID: GPU-a7449be4-0000-9501-f69d-1e5841e103ce)\n"
        "  MIG 3g.20gb Device 0: (UUID: MIG-GPU-a7449be4-0000-9501-f69d-1e5841e103ce/1/0)\n"
    )
    assert lm.parse_visible_devices(text) == {"MIG-GPU-a7449be4-0000-9501-f69d-1e5841e103ce/1/0"}


@pytest.mark.parametrize(
    "text", ["", "No devices found.", "Failed to initialize NVML: Unknown Error\n"]
)
def test_without_a_gpu_nothing_is_visible(text: str) -> None:
    assert lm.parse_visible_devices(text) == frozenset()


KERNEL_LOG = """\
[   12.3] NVRM: loading NVIDIA UNIX x86_64 Kernel Module  580.95.05
[ 4711.0] NVRM: Xid (PCI:0000:3b:00): 31, pid=2345, name=python3, Ch 00000030, intr 10000000.
[ 4712.5] NVRM: GPU at PCI:0000:3b:00: GPU-8b89b58e-1111-2222-3333-444455556666
[ 4713.5] NVRM: Xid (PCI:0000:3b:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.
[ 4714.0] nvidia-nvswitch0: SXid (PCI:0000:c3:00.0): 12028, Non-fatal, Link 32 egress error
[ 4715.0] NVRM: Xid (PCI:0008:01:00): 48, An uncorrectable double bit error has been detected
[ 4716.0] NVRM: Xid (PCI:0000:3b:00): 31, pid=2345, name=python3, Ch 00000030, intr 10000000.
"""  # noqa: E501


def test_the_kernel_s_xids_are_told_per_gpu_in_their_order() -> None:
    assert lm.parse_xids(KERNEL_LOG) == {"0000:3b:00": (31, 79, 31), "0008:01:00": (48,)}
    assert lm.parse_xids("") == {}


@pytest.mark.parametrize("part", ["GPU-I:05", "GPU-I:01 GPU-CI:02"])
def test_an_xid_of_a_slice_counts_for_its_gpu(part: str) -> None:
    line = f"NVRM: Xid (PCI:0000:01:00 {part}): 94, pid=7194, Contained: CE User Channel (0x9)."
    assert lm.parse_xids(line) == {"0000:01:00": (94,)}


@pytest.mark.parametrize(
    ("nvml", "kernel"),
    [
        ("00000000:3B:00.0", "0000:3b:00"),
        ("00000008:01:00.0", "0008:01:00"),
        ("0000:3b:00.0", "0000:3b:00"),
        ("0000:3b:00", "0000:3b:00"),
    ],
)
def test_nvml_and_the_kernel_name_one_bus(nvml: str, kernel: str) -> None:
    assert lm.short_bus_id(nvml) == kernel


# --- who else is there -----------------------------------------------------------------------


def test_a_known_service_is_described_and_how_it_is_stopped() -> None:
    clients = [
        lm.GpuClient(pid=7, name="nv-hostengine", computes=False),
        lm.GpuClient(pid=8, name="nv-hostengine", computes=False),
        lm.GpuClient(pid=9, name="python"),
    ]
    assert [lm.describe_client(client) for client in clients[1:]] == [
        "nv-hostengine (process 8, NVIDIA DCGM)", "python (process 9)",
    ]  # fmt: skip
    assert lm.release_advice(clients) == "Stop it yourself: `systemctl stop nvidia-dcgm`."


def test_a_process_of_somebody_else_is_left_to_them() -> None:
    advice = lm.release_advice([lm.GpuClient(pid=9, name="python")])
    assert advice.startswith("Ask who runs it")


def test_foreign_is_who_computes_and_is_none_of_ours() -> None:
    here, there = ("1g.5gb", 0), ("1g.5gb", 1)
    ours = lm.GpuClient(pid=1, name="vllm", container_id="c0ffee", slice=here)
    monitor = lm.GpuClient(pid=2, name="dcgm-exporter", computes=False)
    neighbour = lm.GpuClient(pid=3, name="python", slice=there)
    anywhere = lm.GpuClient(pid=4, name="python")
    gpu = a_gpu(0, clients=(ours, monitor, neighbour, anywhere))
    assert lm.foreign_clients(gpu, {"c0ffee"}, None) == [neighbour, anywhere]
    assert lm.foreign_clients(gpu, {"c0ffee"}, {here}) == [anywhere]
    assert lm.foreign_clients(gpu, (), {here}) == [ours, anywhere]
    assert lm.foreign_clients(a_gpu(0, clients=None), (), None) == []


# --- mig-parted's format -----------------------------------------------------------------------

SERVER = [a_gpu(0, pci_device="20B7"), a_gpu(1, pci_device="20B0"), a_gpu(2, pci_device=None)]


def parted(*entries: Any, label: str | None = None) -> dict[int, list[str]]:
    """The wishes of one configuration, by the index of the GPU."""
    text = yaml.safe_dump({"version": "v1", "mig-configs": {"mine": [*entries]}})
    wishes = lm.parse_mig_parted(text, label, SERVER)
    return {gpu.index: wishes[gpu.uuid] for gpu in SERVER if gpu.uuid in wishes}


def an_entry(**changes: Any) -> dict[str, Any]:
    made = {"devices": "all", "mig-enabled": True, "mig-devices": {"1g.5gb": 2}}
    return made | {name.replace("_", "-"): value for name, value in changes.items()}


@fewer
@given(st.lists(layouts_of_a_card(), max_size=3))
def test_layouts_come_back_from_mig_parted_s_format_in_number(
    drawn: list[tuple[str, Layout]],
) -> None:
    wanted = [layout for _, layout in drawn]
    text = lm.render_mig_parted(dict(enumerate(wanted)), "mine")
    wishes = lm.parse_mig_parted(text, None, SERVER)
    assert [sorted(wishes[gpu.uuid]) for gpu in SERVER[: len(wanted)]] == [
        [*names_of(layout)] for layout in wanted
    ]


def test_what_is_exported_is_what_mig_parted_reads() -> None:
    halves = frozenset({("3g.20gb", 4), ("3g.20gb", 0)})
    assert lm.render_mig_parted({1: halves, 0: frozenset()}, "now") == (
        "version: v1\nmig-configs:\n  now:\n"
        "  - devices:\n    - 0\n    mig-enabled: false\n"
        "  - devices:\n    - 1\n    mig-enabled: true\n    mig-devices:\n      3g.20gb: 2\n"
    )


def test_devices_are_all_or_those_of_the_list() -> None:
    two = ["1g.5gb", "1g.5gb"]
    assert parted(an_entry()) == {0: two, 1: two, 2: two}
    assert parted(an_entry(devices=[0, 2])) == {0: two, 2: two}
    assert parted(an_entry(devices=[7])) == {}
    assert parted() == {}


@pytest.mark.parametrize("devices", ["0x20B010DE", ["0x20b010de", "0x233010DE"]])
def test_a_filter_picks_cards_by_their_pci_device(devices: Any) -> None:
    assert parted(an_entry(device_filter=devices)) == {1: ["1g.5gb", "1g.5gb"]}
    assert parted(an_entry(device_filter=devices, devices=[0])) == {}


def test_mig_off_is_an_empty_wish_whatever_slices_are_listed() -> None:
    assert parted(an_entry(mig_enabled=False, devices=[1])) == {1: []}
    assert parted({"devices": [1], "mig-enabled": False}) == {1: []}


def test_a_later_entry_of_the_same_gpu_counts() -> None:
    assert parted(an_entry(), an_entry(devices=[0], mig_enabled=False))[0] == []


@pytest.mark.parametrize("counts", [{}, {"1g.5gb": 0}])
def test_mig_on_without_slices_is_refused(counts: Any) -> None:
    with pytest.raises(lm.RefusedError, match="enables MIG without any slices"):
        parted(an_entry(mig_devices=counts))


@pytest.mark.parametrize("text", ["", "[]", "a: 1", "mig-configs:", "mig-configs: 3", "{", "\0"])
def test_a_text_without_configurations_is_refused(text: str) -> None:
    with pytest.raises(lm.RefusedError, match="it has no `mig-configs`"):
        lm.parse_mig_parted(text, None, SERVER)


def test_one_of_several_labels_must_be_named() -> None:
    text = "mig-configs: {all-disabled: [{devices: all, mig-enabled: false}], other: []}"
    with pytest.raises(lm.RefusedError, match=r"The file has all-disabled, other\. .*--label"):
        lm.parse_mig_parted(text, None, SERVER)
    with pytest.raises(lm.RefusedError, match="The file has all-disabled, other"):
        lm.parse_mig_parted(text, "third", SERVER)
    assert len(lm.parse_mig_parted(text, "all-disabled", SERVER)) == 3
    assert lm.parse_mig_parted(text, "other", SERVER) == {}


@pytest.mark.parametrize(
    "entry",
    [
        {"mig-enabled": True},
        {"devices": "all"},
        {"devices": "all", "mig-enabled": True, "mig-devices": {"1g.5gb": "many"}},
        {"devices": "all", "mig-enabled": True, "mig-devices": {"1g.5gb": 1_000_000_000}},
        {"devices": "all", "mig-enabled": True, "mig-devices": {"1g.5gb": -1}},
        {"devices": "all", "mig-enabled": True, "mig-devices": None},
        {"devices": "all", "mig-enabled": True, "mig-devices": 7},
        "all",
        None,
    ],
)
def test_an_entry_that_is_none_is_refused(entry: Any) -> None:
    with pytest.raises(lm.RefusedError, match="Correct the file"):
        parted(entry)


@pytest.mark.parametrize(
    "changes",
    [{"devices": 0}, {"devices": "0"}, {"device_filter": 0x20B010DE}],
    ids=["a number", "a text", "an unquoted filter"],
)
def test_devices_of_another_kind_are_refused_too(changes: dict[str, Any]) -> None:
    with pytest.raises(lm.RefusedError):
        parted(an_entry(**changes))
