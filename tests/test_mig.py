"""MIG: planning and transactions over simulated GPUs, whole servers, and many misfortunes."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from builders import GPU_0, GPU_1, a_layout, a_model, a_site, a_state, on_gpus, on_slice
from fakes import Crash, Server, Trouble, a_world, some_tools
from hypothesis import given, settings
from hypothesis import strategies as st

import llm_manager as lm

A100, H100 = lm.simulated_card("A100 40 GB"), lm.simulated_card("H100 80 GB")
GPU_2, GPU_3 = lm.simulated_uuid(2), lm.simulated_uuid(3)
CHAT = lm.ContainerName("llm-model-chat-0")
EMBED = lm.ContainerName("llm-model-embed-0")
OTHER = lm.ContainerName("llm-model-other-0")
BROKEN = "--broken"


# --- a transaction that is struck -----------------------------------------------------------


def a_failure() -> lm.ManagerError:
    return lm.HardwareError("The driver could not do that: no reason.", advice="Look.")


@dataclass(frozen=True)
class Story:
    """A change of the layout of GPU 0, beside others that it does not concern."""

    card: lm.SimulatedCard
    chat: lm.Placement
    slices: tuple[lm.Slice, ...]
    change: lm.Change
    embed: lm.Placement = field(default_factory=lm.CpuPlacement)
    uses_cdi: bool = False
    endpoint: lm.Wish = "stopped"  # where routes are not what it is about: it costs time

    def server(self, home: Path) -> Server:
        """It serves, and colleagues use other GPUs and slices without LLM Manager."""
        gpus = lm.SimulatedGpus([self.card, self.card, H100, H100])
        gpus.uses_cdi = self.uses_cdi
        gpus.set_mig_mode(GPU_2, enabled=True)
        gpus.create_slice(GPU_2, ("3g.40gb", 0))
        gpus.refresh_cdi()
        server = Server(home, gpus)
        server.world.broken.add(BROKEN)
        server.store.save(
            a_state(
                a_model("chat", placement=self.chat),
                a_model("embed", type="embedding", placement=self.embed),
                a_model("other", placement=on_gpus(GPU_1)),
                mig_layouts=(a_layout(*self.slices),) if self.slices else (),
                endpoint=self.endpoint,
            )
        )
        server.do(lm.applying())
        gpus.open(slice_uuid(gpus, 2, ("3g.40gb", 0)), "python", container_id="f" * 64)
        gpus.open(GPU_1, "jupyter")
        if ("2g.10gb", 0) in self.slices:
            gpus.open(slice_uuid(gpus, 0, ("2g.10gb", 0)), "python")
        return server


def slice_uuid(gpus: lm.SimulatedGpus, index: int, wanted: lm.Slice) -> str:
    uuid = gpus.gpus[index].slices[wanted]
    assert uuid is not None
    return uuid


TITLE = "Cut GPU 0"
STORIES = {
    "cut anew beside slices in use": Story(
        card=A100,
        chat=on_slice("2g.10gb", 2),
        embed=on_slice("3g.20gb", 4),
        slices=(("2g.10gb", 0), ("2g.10gb", 2), ("3g.20gb", 4)),
        change=lm.cutting(
            TITLE,
            {GPU_0: [("2g.10gb", 0), ("2g.10gb", 2), ("2g.10gb", 4), ("1g.5gb", 6)]},
            {"embed": on_slice("2g.10gb", 4)},
        ),
        uses_cdi=True,
        endpoint="running",
    ),
    "cut for the first time": Story(
        card=A100,
        chat=on_gpus(GPU_0),
        slices=(),
        change=lm.cutting(
            TITLE, {GPU_0: [("3g.20gb", 0), ("3g.20gb", 4)]}, {"chat": on_slice("3g.20gb", 4)}
        ),
    ),
    "whole again": Story(
        card=H100,
        chat=on_slice("3g.40gb", 0),
        slices=(("3g.40gb", 0), ("3g.40gb", 4)),
        change=lm.cutting(TITLE, {GPU_0: []}, {"chat": on_gpus(GPU_0)}),
        uses_cdi=True,
    ),
    "a model moves in": Story(
        card=H100,
        chat=on_slice("3g.40gb", 0),
        embed=on_gpus(GPU_3),
        slices=(("3g.40gb", 0),),
        change=lm.cutting(
            TITLE, {GPU_0: [("3g.40gb", 0), ("1g.10gb", 4)]}, {"embed": on_slice("1g.10gb", 4)}
        ),
    ),
    "a model moves out": Story(
        card=H100,
        chat=on_slice("3g.40gb", 0),
        embed=on_slice("3g.40gb", 4),
        slices=(("3g.40gb", 0), ("3g.40gb", 4)),
        change=lm.cutting(TITLE, {GPU_0: [("3g.40gb", 4)]}, {"chat": on_gpus(GPU_3)}),
    ),
}


@dataclass(frozen=True)
class Picture:
    """What a change that failed must leave as it was."""

    config: str
    containers: dict[str, tuple[str, bool]]
    cuts: list[tuple[bool, bool, frozenset[lm.Slice]]]
    foreign: frozenset[lm.GpuClient]


def picture(server: Server) -> Picture:
    return Picture(
        config=server.store.config_path.read_text(),
        containers={
            name: (replace(c.spec, devices=()).hash, c.running)
            for name, c in server.world.containers.items()
            if c.spec.role != "gateway"  # it may turn to its other slot and back
        },
        cuts=[(gpu.mig, gpu.pending, frozenset(gpu.slices)) for gpu in server.world.gpus.gpus],
        foreign=foreign_clients(server.world),
    )


def foreign_clients(world: lm.SimulatedHost) -> frozenset[lm.GpuClient]:
    ours = {c.container_id for c in world.containers.values()}
    clients = {client for gpu in world.gpus.gpus for client in gpu.seen_clients()}
    return frozenset(c for c in clients if c.container_id not in ours)


def neighbours(world: lm.SimulatedHost) -> tuple[object, ...]:
    """What no change of GPU 0 may touch at any moment."""
    untouched = [c for c in world.containers.values() if c.name in {OTHER, "llm-postgres"}]
    return (
        foreign_clients(world),
        [(gpu.mig, {**gpu.slices}) for gpu in world.gpus.gpus[1:]],
        [(c.name, c.container_id, c.running) for c in untouched],
    )


def watched(server: Server) -> list[str]:
    """Collects what happened to the neighbours, after every effect."""
    expected, found = neighbours(server.world), list[str]()

    def watch() -> None:
        now = neighbours(server.world)
        if now != expected:
            found.append(f"effect {server.trouble.count}: {now}, not {expected}")

    server.trouble.watch = watch
    return found


CDI_LEFT = "CDI specification:\n  refresh the CDI specification: it does not list today's slices"


def leftover(server: Server) -> str:
    """The plan that remains, as a new life of the manager sees it."""
    server.restart()
    return str(server.manager.plan(lm.applying()))


def fault_of(server: Server, change: lm.Change) -> lm.ManagerError | None:
    try:
        live(server, change)
    except lm.ManagerError as error:
        return error
    return None


def effects_of(change: lm.Change, first: Server, home: Path) -> int:
    server = first.twin(home)
    assert fault_of(server, change) is None
    count = server.trouble.count
    assert leftover(server) == ""
    return count


STRIKES = (Trouble(error=a_failure), Trouble(error=a_failure, after=True), Trouble(lie=True))


@pytest.mark.parametrize("name", STORIES)
def test_a_cut_that_fails_anywhere_leaves_the_layout_and_every_container_as_they_were(
    name: str, tmp_path: Path
) -> None:
    story = STORIES[name]
    first = story.server(tmp_path / "first")
    before, wrong = picture(first), list[str]()
    for at in range(1, effects_of(story.change, first, tmp_path / "smooth") + 1):
        for n, strike in enumerate(STRIKES):
            server = first.twin(tmp_path / f"{at}-{n}")
            server.restart(replace(strike, at=(at,)))
            touched = watched(server)
            fault, left = fault_of(server, story.change), leftover(server)
            if fault is None:
                # Docker may not go by the toolkit's list: that it is stale stays in the plan.
                assert strike.lie or left in {"", CDI_LEFT}
                continue
            if touched or left or picture(server) != before:
                wrong.append(f"{at} {n} {touched} {left} {server.manager.jobs()}")
    assert wrong == []


@pytest.mark.parametrize("name", STORIES)
def test_a_kill_at_any_moment_of_a_cut_is_healed_forward_by_the_next_apply(
    name: str, tmp_path: Path
) -> None:
    story = STORIES[name]
    first, wrong = story.server(tmp_path / "first"), list[str]()
    for at in range(1, effects_of(story.change, first, tmp_path / "smooth") + 1):
        for later in (False, True):
            server = first.twin(tmp_path / f"{at}-{later}")
            server.restart(Trouble(at=(at,), after=later))
            touched = watched(server)
            with pytest.raises(Crash):
                live(server, story.change)
            server.restart()
            touched += watched(server)
            fault, left = fault_of(server, lm.applying()), leftover(server)
            if touched or fault or left or not as_cut(server, story.change):
                wrong.append(f"{at} {later} {touched} {fault} {left}")
    assert wrong == []


def live(server: Server, change: lm.Change) -> None:
    """As `do`, and in this thread, so that it can be killed."""
    with server.store.lock(change.title):
        before = server.store.load()
        after = server.manager._saved(change)
        server.manager._work(change, before, after, lm.Control(lambda _: None))


def as_cut(server: Server, change: lm.Change) -> bool:
    """Whether GPU 0 is what the change wished."""
    (gpu, *_) = server.world.gpus.gpus
    wish = change.edit(server.store.load()).layout_of(GPU_0)
    return wish is not None and {*gpu.slices} == {*wish.slices} and gpu.mig == bool(wish.slices)


# --- what is planned ----------------------------------------------------------------------------

CUT = (("3g.20gb", 0), ("3g.20gb", 4))


def a_wish(*models: lm.Model, slices: tuple[lm.Slice, ...] = CUT) -> lm.State:
    """Models without an endpoint, and GPU 0 wished cut."""
    return a_state(*models, endpoint="stopped", mig_layouts=(a_layout(*slices),))


def settled(state: lm.State, *cards: lm.SimulatedCard) -> lm.SimulatedHost:
    world = a_world(gpus=lm.SimulatedGpus(cards or [A100]))
    world.broken.add(BROKEN)
    converge(state, world)
    assert plan_for(state, world) == ""
    return world


def converge(
    state: lm.State,
    world: lm.SimulatedHost,
    change: lm.Change | None = None,
    trouble: Trouble | None = None,
) -> list[str]:
    """What the job would say."""
    lines = list[str]()
    lm.converge(state, a_site(), some_tools(world, trouble), lm.Control(lines.append), change)
    return lines


def plan_for(state: lm.State, world: lm.SimulatedHost, **options: Any) -> str:
    return str(lm.plan_state(state, lm.observe(some_tools(world)), a_site(), **options))


def expect(text: str) -> str:
    return dedent(text).strip("\n")


def test_the_first_cut_of_an_idle_gpu_makes_every_slice_where_it_was_wished() -> None:
    world = settled(a_state(endpoint="stopped"))
    assert plan_for(a_wish(), world) == expect("""
        MIG layout of GPU 0:
          check that nobody else uses GPU 0: slices in use cannot be changed
          turn on MIG of GPU 0: it will be cut
          create the slice 3g.20gb at 0 of GPU 0: wished
          create the slice 3g.20gb at 4 of GPU 0: wished
          read back that GPU 0 has 3g.20gb at 0, 3g.20gb at 4: \
the driver's word alone is not believed
    """)
    assert plan_for(a_state(endpoint="stopped"), world) == ""


def test_a_new_cut_keeps_the_slices_that_stay_and_stops_only_who_is_on_a_slice_that_goes() -> None:
    before = a_wish(
        a_model("chat", placement=on_slice("3g.20gb", 0)),
        a_model("embed", placement=on_slice("3g.20gb", 4)),
    )
    after = a_wish(
        a_model("chat", placement=on_slice("3g.20gb", 0)),
        a_model("embed", placement=on_slice("2g.10gb", 4)),
        slices=(("3g.20gb", 0), ("2g.10gb", 4), ("1g.5gb", 6)),
    )
    world = settled(before)
    chat = world.containers[CHAT].container_id
    assert plan_for(after, world) == expect("""
        MIG layout of GPU 0:
          check that nobody else uses GPU 0: slices in use cannot be changed
          stop llm-model-embed-0: its slice goes
          remove the slice 3g.20gb at 4 of GPU 0: not in the wished layout
          create the slice 2g.10gb at 4 of GPU 0: wished
          create the slice 1g.5gb at 6 of GPU 0: wished
          read back that GPU 0 has 3g.20gb at 0, 2g.10gb at 4, 1g.5gb at 6: \
the driver's word alone is not believed
        model embed:
          set aside llm-model-embed-0: it was made for another GPU or slice
          create llm-model-embed-0 from vllm/vllm-openai:v0.30.0: \
it was made for another GPU or slice
          wait until llm-model-embed-0 is ready: it starts
          discard llm-model-embed-0.aside: it was made for another GPU or slice
        Interrupted until its new container is ready, or for good: \
embed (its last start took 0 s).
    """)

    def watch() -> None:
        assert world.containers[CHAT].running

    converge(after, world, trouble=Trouble(watch=watch))
    assert world.containers[CHAT].container_id == chat
    assert plan_for(after, world) == ""


def test_a_cut_gpu_that_is_wished_whole_loses_its_slices_and_then_its_mode() -> None:
    world = settled(a_wish(a_model("chat", placement=on_slice("3g.20gb", 4))))
    whole = a_wish(a_model("chat", placement=on_gpus(GPU_0)), slices=())
    text, _, _ = plan_for(whole, world).partition("model chat:")
    assert text == expect("""
        MIG layout of GPU 0:
          check that nobody else uses GPU 0: slices in use cannot be changed
          stop llm-model-chat-0: GPU 0 changes its MIG mode
          remove the slice 3g.20gb at 0 of GPU 0: not in the wished layout
          remove the slice 3g.20gb at 4 of GPU 0: not in the wished layout
          turn off MIG of GPU 0: it is wished whole
          read back that GPU 0 has no slices: the driver's word alone is not believed
    """) + "\n"  # fmt: skip
    converge(whole, world)
    assert world.gpus.computes(GPU_0)
    assert CHAT in world.running()


def test_somebody_else_in_the_way_is_named_and_nothing_else_is_planned() -> None:
    world = settled(a_wish())
    after = a_wish(slices=(("3g.20gb", 0), ("2g.10gb", 4)))
    world.gpus.open(slice_uuid(world.gpus, 0, ("3g.20gb", 4)), "python")
    assert plan_for(after, world) == expect("""
        MIG layout of GPU 0:
          cannot be done: python (process 4003) uses GPU 0. \
Ask who runs it, or stop it yourself; LLM Manager ends only what is its own.
    """)
    before = world.gpus.read()
    with pytest.raises(lm.RefusedError, match=r"python \(process 4003\) uses GPU 0"):
        converge(after, world)
    assert world.gpus.read() == before


def test_who_uses_a_slice_that_stays_is_not_in_the_way() -> None:
    world = settled(a_wish())
    world.gpus.open(slice_uuid(world.gpus, 0, ("3g.20gb", 0)), "python")
    after = a_wish(slices=(("3g.20gb", 0), ("2g.10gb", 4)))
    assert "cannot be done" not in plan_for(after, world)
    converge(after, world)
    assert plan_for(after, world) == ""


def test_a_change_of_mode_stops_our_containers_of_that_gpu_alone() -> None:
    before = a_state(
        a_model("chat", placement=on_gpus(GPU_0)),
        a_model("other", placement=on_gpus(GPU_1)),
        endpoint="stopped",
    )
    world = settled(before, H100, H100)
    slices = (("3g.40gb", 0),)
    bound = before.with_model(a_model("chat", placement=on_slice("3g.40gb", 0)))
    after = replace(bound, mig_layouts=(a_layout(*slices),))
    text = plan_for(after, world)
    assert "stop llm-model-chat-0: GPU 0 changes its MIG mode" in text
    assert "llm-model-other" not in text


def test_a_layout_that_somebody_changed_by_hand_is_made_right() -> None:
    world = settled(a_wish())
    world.gpus.destroy_slice(GPU_0, ("3g.20gb", 4))
    world.gpus.create_slice(GPU_0, ("1g.5gb", 5))
    assert plan_for(a_wish(), world) == expect("""
        MIG layout of GPU 0:
          check that nobody else uses GPU 0: slices in use cannot be changed
          remove the slice 1g.5gb at 5 of GPU 0: not in the wished layout
          create the slice 3g.20gb at 4 of GPU 0: wished
          read back that GPU 0 has 3g.20gb at 0, 3g.20gb at 4: \
the driver's word alone is not believed
    """)
    converge(a_wish(), world)
    assert plan_for(a_wish(), world) == ""


def test_a_slice_without_its_compute_instance_is_filled() -> None:
    """Somebody's `nvidia-smi mig -cgi` without `-C`, or a kill between the two."""
    world = settled(a_wish())
    world.gpus.gpus[0].slices["3g.20gb", 4] = None
    assert "remove the slice" not in plan_for(a_wish(), world)
    assert "create the slice 3g.20gb at 4" in plan_for(a_wish(), world)
    converge(a_wish(), world)
    assert plan_for(a_wish(), world) == ""


def test_a_wished_layout_of_a_gpu_that_is_not_there_says_so() -> None:
    state = replace(a_wish(), mig_layouts=(a_layout(*CUT, gpu=GPU_2),))
    world = settled(a_state(endpoint="stopped"), A100, A100)
    world.gpus.gpus[1].lost = True
    assert plan_for(state, world) == expect(f"""
        MIG layout of {GPU_2}:
          cannot be done: {GPU_2}, which has a wished layout, is not in this server. \
GPU 1 does not answer: GPU is lost. \
Look at `nvidia-smi`; if it is gone for good: `mig forget`.
    """)


def test_a_broken_driver_is_told_in_the_place_of_the_layout() -> None:
    world = settled(a_wish())
    world.gpus.fault = lm.HardwareError("The driver is not loaded.", advice="Install it.")
    assert plan_for(a_wish(), world) == expect(f"""
        MIG layout of {GPU_0}:
          cannot be done: The driver is not loaded. Install it.
    """)


def test_slices_that_only_root_may_see_are_never_taken_for_none() -> None:
    world = settled(a_wish())
    world.gpus.is_root = False
    assert plan_for(a_wish(), world) == expect("""
        MIG layout of GPU 0:
          cannot be done: The driver does not show the slices of GPU 0. Run this as root.
    """)


def test_a_gpu_that_cannot_be_cut_is_said_to_be_one() -> None:
    world = settled(a_state(endpoint="stopped"), lm.SimulatedCard("NVIDIA L40S", "Ada", 46068))
    assert plan_for(a_wish(), world) == expect("""
        MIG layout of GPU 0:
          cannot be done: GPU 0 (NVIDIA L40S) cannot be cut into MIG slices. Use it whole.
    """)
    assert plan_for(a_wish(slices=()), world) == ""


def test_a_layout_that_the_card_cannot_hold_is_refused_before_anything_is_touched() -> None:
    world = settled(a_state(endpoint="stopped"))
    assert plan_for(a_wish(slices=(("4g.20gb", 4),)), world) == expect("""
        MIG layout of GPU 0:
          cannot be done: GPU 0 cannot hold 4g.20gb at 4. `mig layouts` lists what it can.
    """)


def test_the_toolkits_list_is_refreshed_only_where_docker_uses_it() -> None:
    world = settled(a_state(endpoint="stopped"))
    assert "CDI" not in plan_for(a_wish(), world)
    world.gpus.uses_cdi = True
    (_, _, rest) = plan_for(a_wish(), world).partition("CDI specification:")
    assert rest == "\n  refresh the CDI specification: it does not list today's slices"
    converge(a_wish(), world)
    assert plan_for(a_wish(), world) == ""
    world.gpus.listed.clear()
    assert plan_for(a_wish(), world) == f"CDI specification:{rest}"


# --- who is in the way ------------------------------------------------------------------------


def test_a_monitor_that_keeps_an_ampere_card_from_its_reset_is_named_with_how_to_stop_it() -> None:
    world = settled(a_state(a_model("chat", placement=on_gpus(GPU_0)), endpoint="stopped"))
    world.gpus.open(GPU_0, "nv-hostengine", computes=False)
    after = a_wish(a_model("chat", placement=on_slice("3g.20gb", 0)))
    with pytest.raises(lm.HardwareError) as refused:
        converge(after, world)
    assert refused.value.fact == (
        "The driver could not turn MIG on: nv-hostengine (process 4002, NVIDIA DCGM) uses the GPU."
    )
    assert refused.value.advice == "Stop it yourself: `systemctl stop nvidia-dcgm`."
    assert (world.gpus.gpus[0].mig, world.gpus.gpus[0].pending) == (False, False)


def test_a_monitor_does_not_keep_a_hopper_card_from_being_cut() -> None:
    world = settled(a_state(endpoint="stopped"), H100)
    world.gpus.open(GPU_0, "nv-hostengine", computes=False)
    converge(a_wish(slices=(("3g.40gb", 0),)), world)
    assert {*world.gpus.gpus[0].slices} == {("3g.40gb", 0)}


def test_a_mode_that_somebody_left_pending_is_planned_back() -> None:
    """`nvidia-smi -mig 1` on a busy Ampere card says "All done." and takes effect at the reboot."""
    whole = a_wish(slices=())
    world = settled(whole)
    world.gpus.open(GPU_0, "nvidia-persistenced", computes=False)
    with pytest.raises(lm.HardwareError):
        world.gpus.set_mig_mode(GPU_0, enabled=True)
    assert "turn off MIG of GPU 0: the other mode waits for a reset" in plan_for(whole, world)
    converge(whole, world)
    assert not world.gpus.gpus[0].pending
    world.reboot()
    assert plan_for(whole, world) == ""


# --- the whole transaction ------------------------------------------------------------------


def a_server(home: Path, state: lm.State, *cards: lm.SimulatedCard) -> Server:
    """A server on which this state is already so."""
    server = Server(home, lm.SimulatedGpus(cards))
    server.world.broken.add(BROKEN)
    server.store.save(state)
    server.do(lm.applying())
    return server


def test_a_model_that_does_not_become_ready_on_its_new_slice_takes_all_of_it_back(
    tmp_path: Path,
) -> None:
    state = a_state(a_model("chat", placement=on_gpus(GPU_0)), a_model("other"))
    server = a_server(tmp_path, state, A100)
    server.world.needs[CHAT] = 16_000
    before = picture(server)
    change = lm.cutting(TITLE, {GPU_0: [("1g.5gb", 0)]}, {"chat": on_slice("1g.5gb", 0)})
    job = server.manager.start(change)
    with pytest.raises(lm.ContainerFailedError, match="No available memory for the cache blocks"):
        list(job.follow())
    assert "Taking all of it back: the layout and the containers from before." in job.view().lines
    assert picture(server) == before
    assert leftover(server) == ""
    assert server.world.routed() == {"chat", "other"}


def test_a_cancelled_cut_is_taken_back(tmp_path: Path) -> None:
    state = a_state(a_model("chat", placement=on_gpus(GPU_0)), endpoint="stopped")
    server = a_server(tmp_path, state, H100)
    before = picture(server)

    def cancel() -> None:
        if server.world.gpus.gpus[0].slices:
            server.manager.cancel_job(server.manager.jobs()[0].id)

    server.trouble.watch = cancel
    change = lm.cutting(TITLE, {GPU_0: [("3g.40gb", 0)]}, {"chat": on_slice("3g.40gb", 0)})
    with pytest.raises(lm.CancelledError):
        server.do(change)
    assert picture(server) == before
    assert leftover(server) == ""


@pytest.mark.parametrize("name", ["cut anew beside slices in use", "cut for the first time"])
def test_a_kill_while_a_cut_is_taken_back_is_healed_too(name: str, tmp_path: Path) -> None:
    story = STORIES[name]
    first, wrong = story.server(tmp_path / "first"), list[str]()
    failing = effects_of(story.change, first, tmp_path / "smooth")
    for at in range(failing + 1, 99):
        server = first.twin(tmp_path / str(at))
        errors = iter([a_failure(), Crash()])
        server.restart(Trouble(at=(failing, at), error=errors.__next__))
        touched = watched(server)
        try:
            live(server, story.change)
        except lm.ManagerError:
            break  # that was the last effect
        except Crash:
            pass
        server.restart()
        fault, left = fault_of(server, lm.applying()), leftover(server)
        if touched or fault or left:
            wrong.append(f"{at} {touched} {fault} {left}")
    assert wrong == []


def two_of_which_one_is_in_use(home: Path) -> tuple[Server, lm.Change]:
    state = a_state(a_model("chat", placement=on_gpus(GPU_0)), endpoint="stopped")
    server = a_server(home, state, A100, A100)
    server.world.gpus.open(GPU_1, "python")
    halves = dict.fromkeys((GPU_0, GPU_1), CUT)
    return server, lm.cutting(TITLE, halves, {"chat": on_slice("3g.20gb", 0)})


def test_a_cut_of_two_gpus_of_which_one_is_in_use_changes_neither(tmp_path: Path) -> None:
    server, change = two_of_which_one_is_in_use(tmp_path)
    before = picture(server)
    with pytest.raises(lm.ManagerError, match=r"python \(process 4002\) uses GPU 1"):
        server.do(change)
    assert picture(server) == before
    assert leftover(server) == ""


def test_a_planned_refusal_stops_a_whole_change_before_anything_is_touched(tmp_path: Path) -> None:
    server, change = two_of_which_one_is_in_use(tmp_path)
    effects = server.trouble.count
    with pytest.raises(lm.ManagerError, match=r"python \(process 4002\) uses GPU 1"):
        server.do(change)
    assert server.trouble.count == effects


def test_somebody_who_comes_after_the_plan_is_seen_before_anything_is_stopped() -> None:
    world = settled(a_wish(a_model("chat", placement=on_slice("3g.20gb", 4))))
    after = a_wish(
        a_model("chat", placement=on_slice("2g.10gb", 4)), slices=(("2g.10gb", 0), ("2g.10gb", 4))
    )
    running = world.containers[CHAT].container_id
    device = slice_uuid(world.gpus, 0, ("3g.20gb", 0))

    def report(line: str) -> None:
        if line.startswith("check that nobody else"):
            world.gpus.open(device, "python")

    with pytest.raises(lm.ManagerError, match=r"python .* uses GPU 0"):
        lm.converge(after, a_site(), some_tools(world), lm.Control(report))
    assert {*world.gpus.gpus[0].slices} == {*CUT}
    assert world.containers[CHAT].container_id == running
    assert CHAT in world.running()


# --- what one fault must not cost others --------------------------------------------------------


def test_a_slice_that_cannot_be_had_keeps_no_model_from_one_that_is_there(tmp_path: Path) -> None:
    """A stranger computes on 2g at 4, where 3g at 4 is wished; chat is bound to 3g at 0."""
    gpus = lm.SimulatedGpus([A100])
    gpus.set_mig_mode(GPU_0, enabled=True)
    for wanted in (("3g.20gb", 0), ("2g.10gb", 4)):
        gpus.create_slice(GPU_0, wanted)
    gpus.open(slice_uuid(gpus, 0, ("2g.10gb", 4)), "python")
    server = Server(tmp_path, gpus)
    server.store.save(a_wish(a_model("chat", placement=on_slice("3g.20gb", 0))))
    fault = fault_of(server, lm.applying())
    assert fault is not None
    assert "python (process" in fault.fact
    assert CHAT in server.world.running()


def test_the_way_back_goes_as_far_as_it_can_and_the_first_fault_is_told(tmp_path: Path) -> None:
    """Another model of that GPU had no slice before: that is no reason to leave chat down."""
    gpus = lm.SimulatedGpus([A100])
    server = Server(tmp_path, gpus)
    chat = a_model("chat", placement=on_slice("3g.20gb", 4))
    server.store.save(a_wish(chat, slices=(("3g.20gb", 4),)))
    server.do(lm.applying())
    stale = a_model("stale", placement=on_slice("1g.5gb", 0))
    server.store.save(a_wish(chat, stale, slices=(("3g.20gb", 4),)))
    server.world.broken.add(BROKEN)
    moved = replace(chat, placement=on_slice("4g.20gb", 0), engine_arguments=(BROKEN,))

    def edit(state: lm.State) -> lm.State:
        return replace(
            state.with_model(moved), mig_layouts=(a_layout(("4g.20gb", 0), ("1g.5gb", 4)),)
        )

    change = lm.Change(title=TITLE, edit=edit, scope=lm.Scope(gpus=frozenset({GPU_0})), whole=True)
    server.store.save(
        replace(server.store.load(), models=(chat, replace(stale, placement=on_slice("1g.5gb", 4))))
    )
    fault = fault_of(server, change)
    assert fault is not None
    assert "before it was ready" in fault.fact
    assert CHAT in server.world.running()
    assert server.world.gpus.gpus[0].slices.keys() == {("3g.20gb", 4)}


def test_a_model_that_did_not_serve_before_does_not_take_a_cut_back(tmp_path: Path) -> None:
    server = Server(tmp_path, lm.SimulatedGpus([A100]))
    server.world.broken.add(BROKEN)
    bad = a_model("bad", placement=on_slice("3g.20gb", 0), engine_arguments=(BROKEN,))
    server.store.save(a_wish(bad))
    assert fault_of(server, lm.applying()) is not None
    wider = {GPU_0: [*CUT[:1], ("2g.10gb", 4)]}
    assert fault_of(server, lm.cutting(TITLE, wider)) is None
    assert {*server.world.gpus.gpus[0].slices} == {*CUT[:1], ("2g.10gb", 4)}


def test_giving_a_model_its_gpu_back_cuts_nothing(tmp_path: Path) -> None:
    """A colleague made a slice on the same card by hand; repair and restart are about chat only."""
    server = Server(tmp_path, lm.SimulatedGpus([A100]))
    server.store.save(a_wish(a_model("chat", placement=on_slice("3g.20gb", 0)), slices=CUT[:1]))
    server.do(lm.applying())
    server.world.gpus.create_slice(GPU_0, ("1g.5gb", 4))
    server.world.blind.add(CHAT)
    for change in (lm.repairing({lm.ModelName("chat")}), lm.restarting("chat")):
        assert "1g.5gb" not in str(server.manager.plan(change))
    server.do(lm.repairing({lm.ModelName("chat")}))
    assert ("1g.5gb", 4) in server.world.gpus.gpus[0].slices
    assert "remove the slice 1g.5gb at 4" in leftover(server), "the drift is still shown"


def test_an_idle_container_of_somebody_else_keeps_its_slice() -> None:
    world = settled(a_wish())
    world.foreign_devices["jupyter-anna"] = frozenset({slice_uuid(world.gpus, 0, CUT[0])})
    text = plan_for(a_wish(slices=CUT[1:]), world)
    assert "cannot be done: The container jupyter-anna was given what would go of GPU 0." in text
    assert plan_for(a_wish(slices=(*CUT[:1], ("2g.10gb", 4))), world).count("remove the slice") == 1


def test_nothing_is_cut_while_the_driver_waits_for_a_reboot() -> None:
    world = settled(a_wish(a_model("chat", placement=on_slice("3g.20gb", 0))))
    world.gpus.library_version = "999.1"
    text = plan_for(
        a_wish(a_model("chat", placement=on_slice("3g.20gb", 0)), slices=CUT[:1]), world
    )
    assert "remove the slice" not in text
    assert "cannot be done: The NVIDIA driver was upgraded to 999.1" in text


def test_a_roll_back_to_another_layout_is_all_or_nothing(tmp_path: Path) -> None:
    server = Server(tmp_path / "home", lm.SimulatedGpus([A100]))
    earlier = a_wish(a_model("chat", placement=on_slice("4g.20gb", 0)), slices=(("4g.20gb", 0),))
    server.store.save(earlier)
    later = a_wish(a_model("chat", placement=on_slice("3g.20gb", 0)))
    server.store.save(later)
    server.do(lm.applying())
    count = effects_of(lm.returning_to(1, earlier), server, tmp_path / "smooth")
    for at in range(1, count + 1):
        twin = server.twin(tmp_path / f"{at}")
        twin.restart(Trouble(at=(at,), error=a_failure))
        assert fault_of(twin, lm.returning_to(1, earlier)) is not None
        assert {*twin.world.gpus.gpus[0].slices} == {*CUT}
        assert CHAT in twin.world.running()
        assert leftover(twin) == ""


def test_a_slice_that_somebody_made_meanwhile_is_not_taken_back_with_ours() -> None:
    world = settled(a_wish(slices=CUT[:1]))
    made: list[str] = []

    def report(line: str) -> None:
        if line.startswith("create the slice 3g.20gb at 4") and not made:
            made.append(line)
            world.gpus.create_slice(GPU_0, ("3g.20gb", 4))

    with pytest.raises(lm.HardwareError, match="Somebody else made the slice 3g"):
        lm.converge(a_wish(), a_site(), some_tools(world), lm.Control(report))
    assert {*world.gpus.gpus[0].slices} == {*CUT}


def test_only_slices_that_can_be_seen_whole_are_kept() -> None:
    world = settled(a_wish())
    gpu = world.gpus.gpus[0]
    gpu.slices[CUT[1]] = None
    with pytest.raises(lm.RefusedError, match="split into compute instances"):
        lm.cutting_as_typed(a_wish(), world.gpus.read().gpus[0], "keep")
    gpu.slices.clear()
    with pytest.raises(lm.RefusedError, match="has no slices to keep"):
        lm.cutting_as_typed(a_wish(), world.gpus.read().gpus[0], "keep")


def test_slices_that_cannot_be_seen_are_never_wished_away(tmp_path: Path) -> None:
    """Without rights, a refused cut must not leave "MIG off" behind for one with rights."""
    gpus = lm.SimulatedGpus([A100])
    gpus.set_mig_mode(GPU_0, enabled=True)
    gpus.create_slice(GPU_0, CUT[0])
    server = Server(tmp_path, gpus)
    server.store.save(a_state(endpoint="stopped"))
    before = server.store.config_path.read_text()
    gpus.is_root = False
    with pytest.raises(lm.RefusedError, match="does not show the slices of GPU 0"):
        server.manager.cutting("0", "3g.20gb")
    assert fault_of(server, lm.cutting(TITLE, {GPU_0: [CUT[1]]})) is not None
    gpus.is_root = True
    assert server.store.config_path.read_text() == before
    assert leftover(server) == ""
    assert {*gpus.gpus[0].slices} == {CUT[0]}


def test_a_model_whose_slice_cannot_be_seen_is_left_as_it_runs() -> None:
    state = a_wish(a_model("chat", placement=on_slice("3g.20gb", 0)))
    world = settled(state)
    world.gpus.is_root = False
    assert "model chat" not in plan_for(state, world)


def test_a_new_model_avoids_gpus_that_strangers_use_and_never_falls_to_the_processor() -> None:
    gpus = lm.SimulatedGpus([A100, A100])
    gpus.open(GPU_0, "python")
    assert lm.default_placement(gpus.read(), []) == on_gpus(GPU_1)
    assert lm.choose_gpus(gpus.read(), 1).gpu_uuids == (GPU_1,)
    for uuid in (GPU_0, GPU_1):
        gpus.close(name="python")
        gpus.set_mig_mode(uuid, enabled=True)
    with pytest.raises(lm.RefusedError, match="Every GPU of this server is cut"):
        lm.default_placement(gpus.read(), [])


# --- after a reboot ---------------------------------------------------------------------------


def a_mixed_state(*more: lm.Model) -> lm.State:
    """A slice of an A100, one of an H100, and a model on the processor."""
    return a_state(
        a_model("chat", placement=on_slice("3g.20gb", 4)),
        a_model("embed", type="embedding", placement=on_slice("1g.10gb", 2, gpu=GPU_1)),
        *more,
        mig_layouts=(a_layout(*CUT), a_layout(("1g.10gb", 2), ("3g.40gb", 4), gpu=GPU_1)),
    )


def bound(world: lm.SimulatedHost) -> dict[str, tuple[str, ...]]:
    return {n: c.spec.devices for n, c in world.containers.items() if c.spec.devices}


def test_after_a_reboot_layouts_come_back_before_the_models_on_them(tmp_path: Path) -> None:
    server = a_server(tmp_path, a_mixed_state(), A100, H100)
    world, before = server.world, bound(server.world)
    world.reboot()
    assert [(gpu.mig, gpu.slices) for gpu in world.gpus.gpus] == [(True, {}), (False, {})]
    for name in world.running():  # nor did Docker start anything by itself
        world.end(name, 137)

    lines = server.do(lm.restoring())

    assert world.routed() == {"chat", "embed"}
    assert leftover(server) == ""
    assert bound(world).keys() == before.keys()
    assert all(bound(world)[name] != before[name] for name in before)
    order = [
        "read back that GPU 0 has 3g.20gb at 0, 3g.20gb at 4",
        "read back that GPU 1 has 1g.10gb at 2, 3g.40gb at 4",
        "wait until llm-postgres is ready",
        "wait until llm-model-chat-0 is ready",
        "wait until llm-litellm-b is ready",
        "wait until llm-caddy is ready",
    ]
    at = [next(n for n, line in enumerate(lines) if line.startswith(text)) for text in order]
    assert [*at[2:]] == sorted(at[2:])
    assert max(at[:2]) < at[2]
    assert lines.index("turn on MIG of GPU 1: it will be cut") < at[1]
    assert not [line for line in lines if line.startswith("turn on MIG of GPU 0")]


def test_a_restore_ends_with_a_row_for_every_step(tmp_path: Path) -> None:
    broken = a_model("bad", engine_arguments=("--seed", "7"))
    server = a_server(tmp_path, a_mixed_state(broken), A100, H100)
    server.world.broken.add("7")
    server.world.reboot()
    job = server.manager.start(lm.restoring())
    with pytest.raises(lm.ContainerFailedError, match="llm-model-bad-0 ended with status 1"):
        list(job.follow())
    assert server.world.routed() == {"chat", "embed"}
    rows = [line.partition(": ")[::2] for line in job.view().lines[-9:]]
    assert [(step, re.split(" \\(|:", result)[0]) for step, result in rows] == [
        ("1 MIG layout of GPU 0", "as wished"),
        ("1 MIG layout of GPU 1", "as wished"),
        ("2 PostgreSQL", "ready"),
        ("3 chat", "ready"),
        ("3 embed", "ready"),
        ("3 bad", "failed"),
        ("4 LiteLLM", "ready"),
        ("5 Caddy", "ready"),
        ("6 monitoring", "off"),
    ]


def test_a_layout_that_cannot_come_back_stops_no_model_elsewhere(tmp_path: Path) -> None:
    server = a_server(tmp_path, a_mixed_state(), A100, H100)
    server.world.reboot()
    server.world.gpus.gpus[1].lost = True
    job = server.manager.start(lm.restoring())
    with pytest.raises(lm.ManagerError, match="is not in this server"):
        list(job.follow())
    assert server.world.routed() == {"chat"}


@pytest.mark.parametrize("stable", [True, False])
def test_a_container_is_made_anew_only_where_its_slice_has_another_uuid(
    tmp_path: Path, *, stable: bool
) -> None:
    server = Server(tmp_path, lm.SimulatedGpus([A100]))
    server.world.gpus.stable_uuids = stable
    server.store.save(a_wish(a_model("chat", placement=on_slice("3g.20gb", 4))))
    server.do(lm.applying())
    before = server.world.containers[CHAT].container_id
    server.world.reboot()
    server.do(lm.restoring())
    now = server.world.containers[CHAT]
    assert now.running
    assert (now.container_id == before) == stable
    assert leftover(server) == ""


class SeenStarting(lm.SimulatedClock):
    """Time that calls somebody while anybody waits."""

    look: Callable[[], None] = staticmethod(lambda: None)

    def sleep(self, seconds: float) -> None:
        self.look()
        super().sleep(seconds)


def a_restore_of_two(home: Path, first: lm.Placement, second: lm.Placement) -> Server:
    layouts = (a_layout(*CUT), a_layout(*CUT, gpu=GPU_1))
    models = (a_model("chat", placement=first), a_model("embed", placement=second))
    server = Server(home, lm.SimulatedGpus([A100, A100]))
    server.store.save(a_state(*models, endpoint="stopped", mig_layouts=layouts))
    server.do(lm.applying())
    server.world.reboot()
    server.world.clock = SeenStarting()
    server.world.start_seconds = 2
    server.restart()
    return server


def starting(world: lm.SimulatedHost) -> set[str]:
    return {n for n, c in [*world.containers.items()] if c.running and not world.answers(c)}


def test_starts_on_one_gpu_happen_one_after_the_other(tmp_path: Path) -> None:
    server = a_restore_of_two(tmp_path, on_slice("3g.20gb", 0), on_slice("3g.20gb", 4))
    together = list[set[str]]()
    assert isinstance(server.world.clock, SeenStarting)
    server.world.clock.look = lambda: together.append(starting(server.world))
    server.do(lm.restoring())
    assert {CHAT} in together
    assert {EMBED} in together
    assert {CHAT, EMBED} not in together


def test_starts_on_two_gpus_happen_side_by_side(tmp_path: Path) -> None:
    server = a_restore_of_two(tmp_path, on_slice("3g.20gb", 0), on_slice("3g.20gb", 0, gpu=GPU_1))
    both_wait = threading.Barrier(2)
    met = threading.Event()

    def look() -> None:
        if not met.is_set():
            both_wait.wait(5)
            met.set()

    assert isinstance(server.world.clock, SeenStarting)
    server.world.clock.look = look
    server.do(lm.restoring())
    assert met.is_set()
    assert {CHAT, EMBED} <= server.world.running()


# --- a driver that has trouble ----------------------------------------------------------------


def test_what_runs_is_left_alone_while_the_driver_cannot_be_read(tmp_path: Path) -> None:
    state = a_wish(a_model("chat", placement=on_slice("3g.20gb", 4)))
    server = a_server(tmp_path, state, A100)
    before = server.world.containers[CHAT].container_id
    server.world.gpus.fault = lm.HardwareError("The driver does not answer.", advice="Reboot.")
    text = str(server.manager.plan(lm.applying()))
    assert "chat" not in text
    with pytest.raises(lm.ManagerError, match="driver does not answer"):
        server.do(lm.applying())
    assert server.world.containers[CHAT].container_id == before
    assert CHAT in server.world.running()


def test_a_container_that_lost_its_gpu_is_planned_anew_and_no_other(tmp_path: Path) -> None:
    """A `systemctl daemon-reload` takes the GPU from what the toolkit's hook gave it."""
    state = a_wish(
        a_model("chat", placement=on_slice("3g.20gb", 0)),
        a_model("embed", placement=on_slice("3g.20gb", 4)),
    )
    server = a_server(tmp_path, state, A100)
    embed = server.world.containers[EMBED].container_id
    server.world.blind.add(CHAT)
    change = lm.repairing({lm.ModelName("chat")})
    assert "set aside llm-model-chat-0: it lost its GPU" in str(server.manager.plan(change))
    server.do(change)
    assert leftover(server) == ""
    assert server.world.containers[EMBED].container_id == embed
    assert server.world.blind == set()


def test_between_a_drivers_upgrade_and_its_reboot_no_gpu_container_is_made(tmp_path: Path) -> None:
    state = a_state(a_model("chat", placement=on_gpus(GPU_0)), a_model("other"))
    server = a_server(tmp_path, state, A100)
    server.world.gpus.library_version = "585.10.01"
    assert leftover(server) == ""  # what runs goes on
    server.world.end(CHAT, 137)
    assert str(server.manager.plan(lm.applying())).startswith(
        expect("""
            model chat:
              cannot be done: The NVIDIA driver was upgraded to 585.10.01 while 580.95.05 is \
loaded, so no new container would reach its GPU. Reboot; what runs goes on until then. \
`apply --despite-driver` tries all the same.
        """)
    )
    with pytest.raises(lm.RefusedError, match="was upgraded"):
        server.do(lm.applying())
    assert OTHER in server.world.running()
    despite = lm.applying(despite_driver=True)
    assert "start llm-model-chat-0" in str(server.manager.plan(despite))
    with pytest.raises(lm.ContainerFailedError, match="upgraded without a reboot"):
        server.do(despite)
    server.world.reboot()
    server.do(lm.restoring())
    assert server.world.routed() == {"chat", "other"}


# --- nobody is booked twice -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "fault"),
    [
        (on_gpus(GPU_0), on_gpus(GPU_0), "chat and embed book 200 % of GPU 0"),
        (
            on_gpus(GPU_0, memory_fraction=0.6),
            on_gpus(GPU_0, memory_fraction=0.5),
            "chat and embed book 110 % of GPU 0",
        ),
        (on_slice("3g.20gb", 0, gpu=GPU_1), on_gpus(GPU_1), "embed wants the whole of GPU 1"),
        (
            on_slice("3g.20gb", 0, gpu=GPU_1),
            on_slice("3g.20gb", 0, gpu=GPU_1),
            "chat and embed book 200 % of 3g.20gb at 0 of GPU 1",
        ),
        (
            lm.CpuPlacement(),
            on_slice("1g.5gb", 6, gpu=GPU_1),
            "embed is bound to the slice 1g.5gb at 6 of GPU 1",
        ),
    ],
)
def test_a_gpu_or_slice_is_never_booked_twice(
    tmp_path: Path, first: lm.Placement, second: lm.Placement, fault: str
) -> None:
    server = Server(tmp_path, lm.SimulatedGpus([A100, A100]))
    models = (a_model("chat", placement=first), a_model("embed", placement=second, wish="stopped"))
    state = a_state(*models, endpoint="stopped", mig_layouts=(a_layout(*CUT, gpu=GPU_1),))
    server.store.save(state)
    with pytest.raises(lm.RefusedError, match=fault):
        server.manager.plan(lm.deploying("embed"))
    with pytest.raises(lm.RefusedError, match=fault):
        server.manager.start(lm.deploying("embed"))
    assert server.manager.state() == state
    assert server.manager.jobs() == []


def test_a_cut_that_takes_a_models_slice_away_is_refused(tmp_path: Path) -> None:
    state = a_wish(a_model("chat", placement=on_slice("3g.20gb", 4)))
    server = a_server(tmp_path, state, A100)
    with pytest.raises(lm.RefusedError, match=r"chat is bound to the slice 3g\.20gb at 4"):
        server.manager.start(lm.cutting(TITLE, {GPU_0: [("3g.20gb", 0)]}))
    assert CHAT in server.world.running()


def test_a_double_booking_written_by_hand_can_be_mended_step_by_step(tmp_path: Path) -> None:
    server = Server(tmp_path, lm.SimulatedGpus([A100]))
    on_first = on_gpus(GPU_0)
    server.store.save(
        a_state(
            *(a_model(name, placement=on_first) for name in ("chat", "embed", "other")),
            endpoint="stopped",
        )
    )
    server.do(lm.stopping("other"))
    server.manager.save(lm.stopping("embed"))
    assert [m.name for m in server.manager.state().wished_models] == ["chat"]
    with pytest.raises(lm.RefusedError, match="chat and embed book"):
        server.manager.save(lm.deploying("embed"))


# --- the law ----------------------------------------------------------------------------------

CARDS = [lm.simulated_card("A30"), A100, H100, lm.simulated_card("RTX PRO 6000 Blackwell")]


@st.composite
def wishes(draw: st.DrawFn) -> tuple[lm.SimulatedCard, list[frozenset[lm.Slice]]]:
    card = draw(st.sampled_from(CARDS))
    assert card.geometry is not None
    every = [layout for several in lm.layouts(card.geometry).values() for layout in several]
    return card, draw(st.lists(st.sampled_from(every), min_size=1, max_size=4))


@settings(max_examples=40)
@given(wishes(), st.booleans())
def test_after_any_series_of_wishes_the_gpu_is_cut_exactly_so(
    wish: tuple[lm.SimulatedCard, list[frozenset[lm.Slice]]], rebooted: bool
) -> None:
    card, layouts = wish
    world = a_world(gpus=lm.SimulatedGpus([card]))
    for layout in layouts:
        state = a_wish(slices=tuple(layout))
        converge(state, world)
        assert {*world.gpus.gpus[0].slices} == layout
        assert world.gpus.gpus[0].mig == bool(layout)
        assert plan_for(state, world) == ""
        if rebooted:
            world.reboot()
            converge(state, world)
            assert plan_for(state, world) == ""


@settings(max_examples=60)
@given(st.data())
def test_the_simulated_driver_and_the_planner_agree_on_what_fits(data: st.DataObject) -> None:
    """They share the card's table and no rule."""
    card = data.draw(st.sampled_from(CARDS))
    assert card.geometry is not None
    starts = st.integers(0, card.geometry.memory_units)
    names = st.sampled_from([profile.name for profile in card.geometry.profiles])
    gpus = lm.SimulatedGpus([card])
    gpus.set_mig_mode(GPU_0, enabled=True)
    for wanted in data.draw(st.lists(st.tuples(names, starts), max_size=9)):
        joined = [*gpus.gpus[0].slices, wanted]
        if lm.is_valid(card.geometry, joined):
            gpus.create_slice(GPU_0, wanted)
        else:
            with pytest.raises(lm.HardwareError, match="there is no room for it"):
                gpus.create_slice(GPU_0, wanted)


def test_a_gpu_that_is_cut_is_joined_to_others_by_the_bus_alone() -> None:
    gpus, pair = lm.SimulatedGpus([H100, H100]), frozenset({GPU_0, GPU_1})
    gpus.links[pair] = lm.Link("NVSwitch", 18)
    assert str(gpus.read().links[pair]) == "NV18"
    gpus.set_mig_mode(GPU_0, enabled=True)
    assert str(gpus.read().links[pair]) == "NODE"
