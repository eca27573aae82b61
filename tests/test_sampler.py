"""The energy sampler over simulated GPUs that the real pynvml asks, and over a simulated server."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import nvml_standin
import pynvml
import pytest
from builders import NOW, a_state, an_observed
from fakes import Server, until

import llm_manager as lm

A100, H100, RTX = "A100 40 GB", "H100 80 GB", "RTX 4090"
TABLES = lm.parse_geometries((lm.PROGRAM.parent / "recipes" / "mig.yaml").read_text())
STATE = a_state()
Stand = Callable[..., nvml_standin.Server]


@dataclass
class Kept:
    """Records that stay in memory."""

    shares: list[lm.EnergyShare] = field(default_factory=list)
    rates: list[lm.EnergyRates] = field(default_factory=list)
    sessions: list[tuple[Any, ...]] = field(default_factory=list)
    fault: Exception | None = None
    trouble: lm.ManagerError | None = None
    closed: bool = False

    def close(self) -> None:
        self.closed = True

    def add(self, shares: Sequence[lm.EnergyShare], rates: lm.EnergyRates) -> None:
        if self.fault is not None:
            raise self.fault
        self.shares += shares
        self.rates.append(rates)

    def open_session(
        self, model: str, replica: int, container_id: str, gpu_uuids: Sequence[str], start: float
    ) -> None:
        self.sessions.append(("open", model, replica, container_id, tuple(gpu_uuids), start))

    def close_session(self, container_id: str, end: float) -> None:
        self.sessions.append(("close", container_id, end))

    def count_tokens(
        self, container_id: str, prompt: int, completion: int, cached: int, requests: int
    ) -> None:
        self.sessions.append(("count", container_id, prompt, completion, cached, requests))

    def taken(self) -> dict[tuple[str, str], int | None]:
        """Millijoules by model and method, of all that was added."""
        found: dict[tuple[str, str], int | None] = {}
        for share in self.shares:
            key = share.model, share.method
            known = found.get(key, 0)
            no = known is None or share.energy_mj is None
            found[key] = None if no else (known or 0) + (share.energy_mj or 0)
        return found


@dataclass
class Hands:
    """A sampler's meter on simulated GPUs, and a clock that only a test moves."""

    server: nvml_standin.Server
    driver: lm.NvmlGpus
    store: lm.StateStore
    at: float = 1000.0
    set_by: float = 1.7e9  # the wall clock's lead
    settings: lm.EnergySettings = field(default_factory=lm.EnergySettings)
    engines: dict[str, tuple[str, ...]] = field(default_factory=dict)  # model -> its devices

    def __post_init__(self) -> None:
        self.kept = Kept()
        self.restart()

    def restart(self) -> None:
        """Another life of the program."""
        self.meter = lm.EnergyMeter(self.driver, self.kept, self.store)

    def run(self, model: str, *devices: str) -> None:
        self.engines[model] = devices

    def snapshot(self) -> lm.Snapshot:
        """As the watch would have it, with our engines' processes known by their containers."""
        observed = an_observed(*(an_engine_on(m, *d) for m, d in self.engines.items()))
        hardware = self.driver.read(fresh=True)
        return lm.Snapshot(
            taken_at=NOW, state=STATE, observed=observed, plan=None, hardware=hardware
        )

    def look(self, seconds: float = 1.0, **clients: tuple[int, ...]) -> None:
        """Time passes, and the sampler looks."""
        seen = self.snapshot()
        gpus = tuple(replace(gpu, clients=the_clients(clients) or gpu.clients)
                     for gpu in seen.hardware.gpus)  # fmt: skip
        self.look_at(replace(seen, hardware=replace(seen.hardware, gpus=gpus)), seconds)

    def look_at(self, seen: lm.Snapshot, seconds: float = 1.0) -> None:
        self.server.advance(seconds)
        self.at += seconds
        self.meter.sample(seen, self.settings, self.at + self.set_by)


def the_clients(pids: Mapping[str, tuple[int, ...]]) -> tuple[lm.GpuClient, ...]:
    return tuple(
        lm.GpuClient(pid=pid, name="python3", container_id=f"id-{model}")
        for model, several in pids.items()
        for pid in several
    )


def an_engine_on(model: str, *devices: str, **changes: Any) -> lm.ObservedContainer:
    given: dict[str, Any] = {
        "name": lm.ContainerName(f"llm-model-{model}-0"), "role": "engine",
        "spec_hash": lm.SpecHash("x"), "running": True, "ready": True, "model_name": model,
        "container_id": f"id-{model}", "devices": devices, "started_at": NOW,
    }  # fmt: skip
    return lm.ObservedContainer(**given | changes)


@pytest.fixture
def stand(
    tool: Callable[[str], str], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[..., Hands]]:  # fmt: skip
    """A sampler on these cards; the clock of its looks is the test's."""
    tool("cc")
    library = nvml_standin.library(tmp_path_factory.getbasetemp() / "nvml")
    made: list[Hands] = []

    def make(*cards: str) -> Hands:
        server = nvml_standin.Server(library, tmp_path / "server", cards)
        server.freeze()
        server.activate()
        driver = lm.NvmlGpus(TABLES, lm.GpuSystem(), pause=0.3, turn=tmp_path / "turn")
        store = lm.StateStore(tmp_path / "home")
        store.ensure(fixed_names=True)
        made.append(Hands(server, driver, store))
        monkeypatch.setattr(lm, "boot_seconds", lambda: made[-1].at)
        return made[-1]

    yield make
    for hands in made:
        hands.server.deactivate()


def millijoules(hands: Hands, gpu: int = 0) -> int:
    """The hardware's own counter, by a door of the simulation."""
    return hands.server.get(gpu, "energy_uj") // 1000


def test_what_a_gpu_takes_is_its_own_counters_difference_and_its_only_tenants(
    stand: Callable[..., Hands],
) -> None:
    hands = stand(H100, H100)
    one, two = hands.server.uuid(0), hands.server.uuid(1)
    hands.run("chat", one)
    hands.look()
    begun = [share.gpu_uuid for share in hands.kept.shares]
    first = millijoules(hands)
    for watts in (300_000, 650_000, 90_000):
        hands.server.set(0, power_mw=watts)
        hands.look(7.5)
    assert begun == []
    taken = hands.kept.taken()
    assert taken["chat", "whole GPU"] == millijoules(hands) - first == 7_800_000
    assert {share.gpu_uuid for share in hands.kept.shares if share.model == "chat"} == {one}
    assert {share.gpu_uuid for share in hands.kept.shares if not share.model} == {two}
    assert hands.meter.live.gpu_watts == {one: 90, two: 70}
    assert hands.meter.live.model_watts == {"chat": 90, lm.NOBODY: 70}


def test_a_model_over_several_gpus_takes_all_of_each(stand: Callable[..., Hands]) -> None:
    hands = stand(H100, H100)
    hands.run("chat", hands.server.uuid(0), hands.server.uuid(1))
    hands.look()
    hands.look()
    assert [(share.model, share.method) for share in hands.kept.shares] == [
        ("chat", "whole GPU")
    ] * 2


def test_without_a_counter_power_is_integrated_and_without_both_nothing_is_said(
    stand: Callable[..., Hands],
) -> None:
    hands = stand(RTX)
    hands.server.set(0, counts_energy=0, power_mw=100_000)
    hands.look()
    hands.server.set(0, power_mw=300_000)
    hands.look(2.0)
    assert hands.kept.taken() == {(lm.NOBODY, "idle"): 400_000}
    hands.look(5.0)  # longer than a few periods: nobody knows
    assert hands.kept.shares[-1].energy_mj is None
    assert hands.meter.live.gpu_watts == {hands.server.uuid(0): None}
    shares = len(hands.kept.shares)
    hands.server.fail("nvmlDeviceGetPowerUsage", pynvml.NVML_ERROR_NOT_SUPPORTED, times=-1)
    hands.server.fail("nvmlDeviceGetFieldValues", pynvml.NVML_ERROR_NOT_SUPPORTED, times=-1)
    hands.look()
    assert len(hands.kept.shares) == shares


def test_power_comes_from_its_field_where_the_function_has_none(
    stand: Callable[..., Hands],
) -> None:
    hands = stand(RTX)
    hands.server.set(0, counts_energy=0, power_mw=100_000)
    hands.server.fail("nvmlDeviceGetPowerUsage", pynvml.NVML_ERROR_NOT_SUPPORTED, times=-1)
    hands.look()
    hands.look()
    assert hands.kept.taken() == {(lm.NOBODY, "idle"): 100_000}


def test_a_counter_that_begins_anew_costs_no_joule_and_makes_none(
    stand: Callable[..., Hands],
) -> None:
    hands = stand(H100)
    hands.look()
    hands.look(30)
    before = hands.kept.taken()[lm.NOBODY, "idle"]
    hands.server.reboot()
    hands.look()
    after = hands.kept.taken()[lm.NOBODY, "idle"]
    assert (after or 0) - (before or 0) == 70_000  # a second at 70 W, by power


def test_a_lost_gpu_is_a_gap_and_the_others_go_on(stand: Callable[..., Hands]) -> None:
    hands = stand(H100, H100)
    hands.look()
    hands.server.lose(0)
    for _ in range(100):
        hands.look()
    lost = hands.server.uuid(0)
    assert {share.gpu_uuid for share in hands.kept.shares} == {hands.server.uuid(1)}
    assert hands.meter.live.gpu_watts[lost] is None
    hands.server.reboot()
    for _ in range(65):  # NVML is opened again after a minute at most
        hands.look()
    (gap, *later) = [share for share in hands.kept.shares if share.gpu_uuid == lost]
    assert gap.energy_mj is None
    assert gap.seconds >= 100
    assert later
    assert all(share.energy_mj is not None for share in later)


def test_a_driver_that_is_loaded_anew_is_found_again(stand: Callable[..., Hands]) -> None:
    hands = stand(H100)
    hands.look()
    hands.look()
    hands.server.fail("nvmlDeviceGetTotalEnergyConsumption", 9, times=-1)
    hands.server.fail("nvmlDeviceGetPowerUsage", 9, times=-1)
    hands.server.fail("nvmlDeviceGetFieldValues", 9, times=-1)
    hands.server.fail("nvmlInit_v2", pynvml.NVML_ERROR_DRIVER_NOT_LOADED, times=-1)
    for _ in range(70):
        hands.look()
    assert len(hands.kept.shares) == 1
    hands.server.mend()
    for _ in range(3):
        hands.look()
    assert [share.energy_mj is None for share in hands.kept.shares] == [False, True, False, False]


def test_a_server_that_slept_has_a_gap_of_that_length_and_no_joules_in_it(
    stand: Callable[..., Hands],
) -> None:
    hands = stand(H100)
    hands.look()
    hands.look(8 * 3600)
    (share,) = hands.kept.shares
    assert (share.energy_mj, share.seconds) == (None, 8 * 3600)


def test_a_clock_that_is_set_makes_no_record_negative_and_is_followed(
    stand: Callable[..., Hands],
) -> None:
    hands = stand(H100)
    for set_by in (0, 0, 3600, 0, -1800, 10, 0, 0):
        hands.set_by += set_by
        hands.look()
    shares = hands.kept.shares
    assert all(share.seconds == 1 for share in shares)
    begun = [round(share.start - shares[0].start) for share in shares]
    assert begun == [0, 3601, 3602, 1803, 1814, 1815, 1816]


def test_processes_that_share_a_gpu_are_weighed_by_what_they_used(
    stand: Callable[..., Hands],
) -> None:
    hands = stand(H100)
    gpu = hands.server.uuid(0)
    hands.look()
    hands.look()  # nobody is there: what it takes now is its idle power
    hands.run("chat", gpu)
    hands.run("embed", gpu)
    for pid, percent in ((41, 60), (42, 0), (43, 20)):
        hands.server.add_process(0, pid)
        hands.server.work(pid, percent)
    hands.server.set(0, power_mw=470_000)
    hands.kept.shares.clear()
    hands.look(10, chat=(41, 42), embed=(43,))
    taken = hands.kept.taken()
    assert taken["chat", "process utilisation"] == 3_000_000
    assert taken["embed", "process utilisation"] == 1_000_000
    assert taken[lm.NOBODY, "process utilisation"] == 700_000
    assert not any(share.measured for share in hands.kept.shares)


def test_what_a_gpu_takes_without_tenants_is_known_after_a_restart(
    stand: Callable[..., Hands],
) -> None:
    hands = stand(H100)
    hands.look()
    hands.server.set(0, power_mw=500_000)
    hands.run("chat", hands.server.uuid(0))
    hands.run("embed", hands.server.uuid(0))
    hands.look()
    hands.restart()
    hands.look()
    hands.kept.shares.clear()
    hands.look(10)
    taken = hands.kept.taken()
    assert taken[lm.NOBODY, "equal split"] == 700_000
    assert taken["chat", "equal split"] == 2_150_000


def test_a_world_that_cannot_be_seen_is_taken_to_be_as_it_was(stand: Callable[..., Hands]) -> None:
    hands = stand(H100)
    hands.run("chat", hands.server.uuid(0))
    hands.look()
    unseen = replace(hands.snapshot(), observed=None)
    for blind in (unseen, replace(hands.snapshot(), hardware=lm.Hardware(fault=lm.ManagerError(
        "NVML is away.", advice="Wait.")))):  # fmt: skip
        hands.look_at(blind)
    assert hands.kept.taken().keys() == {("chat", "whole GPU")}
    assert hands.store.read_idle_watts() == {}


def test_who_may_not_see_the_slices_takes_no_load_for_the_idle_power(
    stand: Callable[..., Hands],
) -> None:
    hands = stand(A100)
    cut(hands, ("3g.20gb", 4))
    hands.server.unprivileged()
    hands.look()
    hands.look()
    assert hands.kept.shares
    assert hands.store.read_idle_watts() == {}


def test_a_display_server_is_no_stranger(stand: Callable[..., Hands]) -> None:
    hands = stand(RTX)
    hands.run("chat", hands.server.uuid(0))
    xorg = lm.GpuClient(pid=5, name="Xorg")
    seen = hands.snapshot()
    gpus = tuple(replace(gpu, clients=(xorg,)) for gpu in seen.hardware.gpus)
    for _ in range(2):
        hands.look_at(replace(seen, hardware=replace(seen.hardware, gpus=gpus)))
    assert hands.kept.taken().keys() == {("chat", "whole GPU")}


def test_a_stranger_on_the_gpu_makes_its_tenants_share_an_estimate(
    stand: Callable[..., Hands],
) -> None:
    hands = stand(H100)
    hands.run("chat", hands.server.uuid(0))
    for pid, percent in ((41, 30), (42, 10)):
        hands.server.add_process(0, pid)
        hands.server.work(pid, percent)
    hands.look(chat=(41,), other=(42,))
    hands.look(chat=(41,), other=(42,))
    taken = hands.kept.taken()
    chat, rest = taken["chat", "process utilisation"], taken[lm.NOBODY, "process utilisation"]
    assert chat == pytest.approx(3 * (rest or 0), abs=3)


def cut(hands: Hands, *slices: lm.Slice) -> dict[lm.Slice, str]:
    hands.server.carve(0, *slices)
    return hands.server.devices(0)


def test_slices_are_weighed_by_their_own_activity_and_size_where_the_gpu_tells_it(
    stand: Callable[..., Hands],
) -> None:
    hands = stand(H100)
    large, small = ("3g.40gb", 4), ("1g.10gb", 0)
    devices = cut(hands, large, small)
    hands.run("chat", devices[large])
    hands.run("embed", devices[small])
    for pid, place, percent in ((41, large, 50), (42, small, 100)):
        hands.server.add_process(0, pid, slice=place)
        hands.server.work(pid, percent)
    hands.look()
    hands.look()  # GPM tells of the time between two of its samples
    assert {share.method for share in hands.kept.shares} == {"MIG activity"}
    taken = hands.kept.taken()
    chat, embed = taken["chat", "MIG activity"], taken["embed", "MIG activity"]
    assert chat == pytest.approx(1.5 * (embed or 0), abs=3)
    hands.driver._meter.close()
    assert hands.server.open_samples() == 0


def test_an_ampere_cards_slices_share_by_size_and_the_rest_is_nobodys(
    stand: Callable[..., Hands],
) -> None:
    hands = stand(A100)
    place = ("3g.20gb", 4)
    hands.run("chat", cut(hands, place)[place])
    hands.look()
    hands.look()
    taken = hands.kept.taken()
    chat, rest = taken["chat", "equal split"], taken[lm.NOBODY, "equal split"]
    assert 4 * (chat or 0) == pytest.approx(3 * (rest or 0), abs=8)


SAMPLING = """
import sys, time, llm_manager as lm
driver = lm.NvmlGpus({}, lm.GpuSystem(), turn=lm.Path(sys.argv[1]))
while True:
    print(len(driver.look({})), flush=True)
    time.sleep(0.05)
"""


def test_a_sampler_lets_go_of_the_gpus_while_another_process_changes_their_mode(
    stand: Callable[..., Hands], tmp_path: Path
) -> None:
    hands = stand(A100)  # whose mode needs a reset, and that needs every client gone
    command = [sys.executable, "-c", SAMPLING, str(tmp_path / "turn")]
    environment = {**os.environ, "PYTHONPATH": str(lm.PROGRAM.parent)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as sampler:
        try:
            assert sampler.stdout is not None
            assert sampler.stdout.readline() == "1\n"
            blunt = lm.NvmlGpus(TABLES, lm.GpuSystem(), pause=0)  # nobody hears of its turn
            with pytest.raises(lm.HardwareError, match="uses the GPU"):
                blunt.set_mig_mode(lm.GpuUuid(hands.server.uuid(0)), enabled=True)
            hands.driver.set_mig_mode(lm.GpuUuid(hands.server.uuid(0)), enabled=True)
            lines = iter(sampler.stdout.readline, "")
            assert "0\n" in lines  # it looked away
            assert "1\n" in lines  # and looks again
        finally:
            sampler.kill()
    assert hands.server.mig(0) == (1, 1)


def test_a_sampler_lets_go_between_its_looks_too(
    stand: Callable[..., Hands], tmp_path: Path
) -> None:
    hands = stand(A100)
    hands.look()
    assert (hands.driver.give_way(), pynvml._nvmlLib_refcount) == (False, 1)
    turn = lm.take_lock(tmp_path / "turn")
    assert turn is not None
    assert (hands.driver.give_way(), pynvml._nvmlLib_refcount) == (True, 0)
    turn.close()
    hands.look()
    assert pynvml._nvmlLib_refcount == 1


def test_this_processs_own_sampler_is_not_in_the_way_either(stand: Callable[..., Hands]) -> None:
    hands = stand(A100)
    hands.look()
    hands.driver.set_mig_mode(lm.GpuUuid(hands.server.uuid(0)), enabled=True)
    hands.look()
    hands.look()
    assert hands.server.mig(0) == (1, 1)
    assert hands.kept.shares


# --- sessions ----------------------------------------------------------------------

GPU = lm.Gpu(uuid=lm.GpuUuid("GPU-a"))
CHAT = lm.ContainerName("llm-model-chat-0")


def counted(prompt: int, completion: int, requests: int) -> Mapping[lm.ContainerName, Any]:
    counts = {
        ("prompt_tokens_total", ""): prompt, ("generation_tokens_total", ""): completion,
        ("prompt_tokens_cached_total", ""): 1, ("request_success_total", "stop"): requests,
    }  # fmt: skip
    load = lm.EngineLoad(running=0, waiting=0, tokens=prompt + completion, counts=counts)
    return {CHAT: load}


def seen(*engines: lm.ObservedContainer) -> lm.Snapshot:
    hardware = lm.Hardware(gpus=(GPU,))
    observed = an_observed(*engines)
    return lm.Snapshot(taken_at=NOW, state=STATE, observed=observed, plan=None, hardware=hardware)


def test_a_session_lasts_from_ready_to_the_end_with_all_that_its_engine_counted() -> None:
    kept = Kept()
    sessions, engine = lm.EngineSessions(kept), an_engine_on("chat", GPU.uuid)
    sessions.follow(seen(replace(engine, ready=False)), {}, 10)
    sessions.follow(seen(engine), {}, 20)
    sessions.follow(seen(engine), counted(100, 10, 3), 21)
    sessions.follow(seen(replace(engine, ready=False)), counted(300, 30, 5), 22)  # only busy
    sessions.follow(seen(), {CHAT: None}, 30)
    assert kept.sessions == [
        ("open", "chat", 0, "id-chat", ("GPU-a",), 20),
        ("count", "id-chat", 300, 30, 1, 5),
        ("close", "id-chat", 30),
    ]


def test_an_engine_that_served_before_anybody_looked_counts_from_then_on() -> None:
    kept = Kept()
    sessions, engine = lm.EngineSessions(kept), an_engine_on("chat", GPU.uuid)
    sessions.follow(seen(engine), counted(1000, 500, 70), 20)
    sessions.follow(seen(engine), counted(1100, 505, 71), 21)
    sessions.close(40)
    assert kept.sessions[1:] == [("count", "id-chat", 100, 5, 0, 1), ("close", "id-chat", 40)]


def test_an_engine_that_started_again_begins_another_session() -> None:
    kept = Kept()
    sessions, engine = lm.EngineSessions(kept), an_engine_on("chat", GPU.uuid)
    sessions.follow(seen(engine), {}, 20)
    again = replace(engine, started_at=NOW + timedelta(minutes=5))
    sessions.follow(seen(again), {}, 30)
    assert [(kind, *rest[-1:]) for kind, *rest in kept.sessions] == [
        ("open", 20), ("close", 30), ("open", 30)
    ]  # fmt: skip


def test_an_engine_that_is_set_aside_and_back_is_the_replica_it_was() -> None:
    names = "llm-model-chat-0", "a1b2-llm-model-my-chat-12.aside"
    assert [lm.replica_number(lm.ContainerName(name)) for name in names] == [0, 12]


def test_counters_that_began_anew_count_from_nothing() -> None:
    before = lm.EngineCounts(prompt=100, completion=50, cached=20, requests=9)
    after = replace(before, prompt=130, completion=51, requests=10)
    assert after.since(before) == lm.EngineCounts(prompt=30, completion=1, requests=1)
    anew = lm.EngineCounts(prompt=3, completion=2, requests=1)
    assert anew.since(before) == anew


def test_a_look_that_saw_no_containers_ends_nothing_and_a_model_without_gpu_has_no_session() -> (
    None
):
    kept = Kept()
    sessions, engine = lm.EngineSessions(kept), an_engine_on("chat", GPU.uuid)
    sessions.follow(seen(engine, an_engine_on("small")), {}, 20)
    sessions.follow(replace(seen(), observed=None), {}, 21)
    assert [kind for kind, *_ in kept.sessions] == ["open"]


# --- the thread --------------------------------------------------------------------


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Server, Kept]]:
    """A simulated server with one GPU that tells its energy, looked at very often."""
    gpus = lm.SimulatedGpus([lm.simulated_card(H100)])
    server, kept = Server(tmp_path / "home", gpus), Kept()
    server.manager.save(
        lm.setting_energy({"period_seconds": 0.5, "price_per_kwh": 0.3, "overhead": 1.2})
    )
    stop = threading.Event()

    def count() -> None:
        taken = 0
        while not stop.wait(0.01):
            taken += 700
            reading = lm.EnergyReading(at=lm.boot_seconds(), counter_mj=taken, power_w=70.0)
            gpus.looks[gpus.gpus[0].uuid] = lm.GpuLook(reading=reading)

    counting = threading.Thread(target=count, daemon=True)
    counting.start()
    yield server, kept
    stop.set()
    counting.join()


def test_the_console_samples_with_the_rates_of_its_state(served: tuple[Server, Kept]) -> None:
    server, kept = served
    watch = lm.Watch(server.manager, seconds=0.05, records=lambda: kept)
    assert until(lambda: len(kept.shares) > 2)
    assert kept.rates[-1] == lm.EnergyRates(price_per_kwh=0.3, overhead=1.2)
    assert watch.latest().energy.gpu_watts.keys() == {server.world.gpus.gpus[0].uuid}
    server.manager.save(lm.setting_energy({"price_per_kwh": 0.5}))
    assert until(lambda: kept.rates[-1].price_per_kwh == 0.5)
    watch.close()


def test_of_two_consoles_one_samples_and_the_other_takes_over(
    served: tuple[Server, Kept], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, kept = served
    monkeypatch.setattr(lm, "TURN_SECONDS", 0.05)
    one = lm.Watch(server.manager, seconds=0.05, records=lambda: kept)
    assert until(lambda: bool(kept.shares))
    other = Kept()
    two = lm.Watch(server.manager, seconds=0.05, records=lambda: other)
    assert until(lambda: "Another LLM Manager" in two.latest().energy.trouble)
    assert other.shares == []
    one.close()
    assert kept.closed
    assert until(lambda: bool(other.shares))
    assert two.latest().energy.trouble == ""
    two.close()


def test_records_that_fail_are_said_on_the_page_once_in_the_log_and_are_taken_up_again(
    served: tuple[Server, Kept], caplog: pytest.LogCaptureFixture
) -> None:
    server, kept = served
    kept.fault = lm.ManagerError("The disk is full.", advice="Make room.")
    watch = lm.Watch(server.manager, seconds=0.05, records=lambda: kept)
    assert until(lambda: bool(watch.latest().energy.trouble))
    said = "Energy is not recorded: The disk is full. Make room."
    assert said in [matter.text for matter in lm.attention(watch.latest())]
    threading.Event().wait(0.3)  # some more looks
    kept.fault = None
    assert until(lambda: bool(kept.shares))
    assert until(lambda: watch.latest().energy.trouble == "")
    assert [r.message for r in caplog.records] == ["energy is not recorded"]
    kept.trouble = lm.ManagerError("What was recorded is damaged.", advice="It was set aside.")
    assert watch.latest().energy.trouble == str(kept.trouble)
    watch.close()
