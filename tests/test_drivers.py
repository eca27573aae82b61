"""Drivers: the real adapter through the real pynvml, and the simulation, held to one contract.

The library under pynvml is the stand-in of tests/standin; what it answers comes from NVIDIA's
documentation and has tests of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import nvml_standin
import pynvml
import pytest
from builders import GPU_0

import llm_manager as lm

A100, H100 = "A100 40 GB", "H100 80 GB"
TABLES = lm.parse_geometries((lm.PROGRAM.parent / "recipes" / "mig.yaml").read_text())
Stand = Callable[..., nvml_standin.Server]


@pytest.fixture
def library(tool: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    tool("cc")
    return nvml_standin.library(tmp_path_factory.getbasetemp() / "nvml")


@pytest.fixture
def stand_in(library: Path, tmp_path: Path) -> Iterator[Stand]:
    """A server of these cards under this process's pynvml."""
    running: list[nvml_standin.Server] = []

    def make(*cards: str, driver: Path = library, **options: object) -> nvml_standin.Server:
        server = nvml_standin.Server(driver, tmp_path / "server", cards, **options)  # type: ignore[arg-type]
        server.activate()
        running.append(server)
        return server

    yield make
    for server in running:
        server.deactivate()


@dataclass
class Bench:
    """One kind of driver, and the hands that do to its server what a test needs."""

    driver: lm.GpuDriver
    add_process: Callable[[int, lm.Slice | None], None]
    reboot: Callable[[], None]
    lose: Callable[[int], None]
    demote: Callable[[], None]

    def gpu(self, index: int = 0) -> lm.Gpu:
        return next(g for g in self.driver.read(fresh=True).gpus if g.index == index)

    def cut(self, *slices: lm.Slice, index: int = 0) -> None:
        gpu = self.gpu(index)
        self.driver.set_mig_mode(gpu.uuid, enabled=True)
        for wanted in slices:
            self.driver.create_slice(gpu.uuid, wanted)


@pytest.fixture(params=["pynvml over the stand-in", "the simulation"])
def bench(request: pytest.FixtureRequest) -> Bench:
    """Two A100 and an H100, behind either driver."""
    if request.param == "the simulation":
        simulated = lm.SimulatedGpus(
            [lm.simulated_card(A100), lm.simulated_card(A100), lm.simulated_card(H100)]
        )

        def open_on(index: int, wanted: lm.Slice | None) -> None:
            gpu = simulated.gpus[index]
            simulated.open(gpu.uuid if wanted is None else str(gpu.slices[wanted]), "python3")

        def demote() -> None:
            simulated.is_root = False

        def lose(index: int) -> None:
            simulated.gpus[index].lost = True

        return Bench(simulated, open_on, simulated.reboot, lose, demote)
    server = request.getfixturevalue("stand_in")(A100, A100, H100)
    # A process that is really there, because its name is asked of the kernel.
    return Bench(
        nvml_gpus(),
        lambda index, wanted: server.add_process(index, os.getppid(), slice=wanted),
        server.reboot,
        server.lose,
        server.unprivileged,
    )


def nvml_gpus() -> lm.NvmlGpus:
    return lm.NvmlGpus(TABLES, lm.GpuSystem(), pause=0)


LAYOUT = {("1g.5gb", 0), ("2g.10gb", 2), ("3g.20gb", 4)}


def test_slices_are_where_they_were_asked_for_whatever_the_order(bench: Bench) -> None:
    bench.cut(("1g.5gb", 0), ("3g.20gb", 4), ("2g.10gb", 2))
    gpu = bench.gpu()
    assert gpu.layout == LAYOUT
    assert [device.start for device in gpu.slices or ()] == [0, 2, 4]
    uuids = {device.uuid for device in gpu.slices or ()}
    assert len(uuids) == 3
    assert all(uuid and uuid.startswith("MIG-") for uuid in uuids)
    assert (gpu.mig_enabled, gpu.mig_pending) == (True, True)
    assert bench.gpu(1).layout == frozenset()


def test_a_slice_that_is_gone_leaves_the_others_as_they_were(bench: Bench) -> None:
    bench.cut(*LAYOUT)
    before = {device.slice: device.uuid for device in bench.gpu().slices or ()}
    bench.driver.destroy_slice(bench.gpu().uuid, ("1g.5gb", 0))
    bench.driver.destroy_slice(bench.gpu().uuid, ("1g.5gb", 0))  # gone is gone
    after = {device.slice: device.uuid for device in bench.gpu().slices or ()}
    assert after == {place: uuid for place, uuid in before.items() if place != ("1g.5gb", 0)}
    bench.driver.create_slice(bench.gpu().uuid, ("1g.5gb", 1))
    assert bench.gpu().layout == LAYOUT - {("1g.5gb", 0)} | {("1g.5gb", 1)}


def test_a_slice_made_again_is_another_one(bench: Bench) -> None:
    bench.cut(("3g.20gb", 4))
    first = bench.gpu().device(("3g.20gb", 4))
    bench.driver.destroy_slice(bench.gpu().uuid, ("3g.20gb", 4))
    bench.driver.create_slice(bench.gpu().uuid, ("3g.20gb", 4))
    second = bench.gpu().device(("3g.20gb", 4))
    assert first is not None
    assert second is not None
    assert first.uuid != second.uuid


@pytest.mark.parametrize("wanted", [("4g.20gb", 0), ("3g.20gb", 0), ("1g.5gb", 4), ("1g.5gb", 7)])
def test_what_does_not_fit_is_refused_and_nothing_is_left_of_it(
    bench: Bench, wanted: lm.Slice
) -> None:
    bench.cut(*LAYOUT)
    with pytest.raises(lm.HardwareError, match="could not create"):
        bench.driver.create_slice(bench.gpu().uuid, wanted)
    assert bench.gpu().layout == LAYOUT


def test_whoever_uses_a_slice_is_named_and_keeps_it(bench: Bench) -> None:
    bench.cut(*LAYOUT)
    bench.add_process(0, ("2g.10gb", 2))
    gpu = bench.gpu()
    (client,) = [c for c in gpu.clients or () if c.computes]
    assert client.slice == ("2g.10gb", 2)
    with pytest.raises(lm.HardwareError, match=rf"\(process {client.pid}\) uses the GPU\."):
        bench.driver.destroy_slice(gpu.uuid, ("2g.10gb", 2))
    bench.driver.destroy_slice(gpu.uuid, ("1g.5gb", 0))  # its neighbour is free to go
    assert bench.gpu().layout == LAYOUT - {("1g.5gb", 0)}


@pytest.mark.parametrize("index", [1, 2])
def test_a_busy_gpu_keeps_its_mode_and_names_who_uses_it(bench: Bench, index: int) -> None:
    bench.add_process(index, None)
    with pytest.raises(lm.HardwareError, match=r"could not turn MIG on: .+ uses the GPU\."):
        bench.driver.set_mig_mode(bench.gpu(index).uuid, enabled=True)
    assert bench.gpu(index).mig_enabled is False


def test_a_reboot_takes_every_slice_and_the_mode_of_all_but_ampere(bench: Bench) -> None:
    bench.cut(*LAYOUT)
    bench.cut(("3g.40gb", 0), index=2)
    bench.reboot()
    ampere, hopper = bench.gpu(0), bench.gpu(2)
    assert (ampere.mig_enabled, ampere.layout) == (True, frozenset())
    assert (hopper.mig_enabled, hopper.layout) == (False, frozenset())


def test_a_lost_gpu_is_said_and_the_others_are_still_there(bench: Bench) -> None:
    bench.lose(1)
    hardware = bench.driver.read(fresh=True)
    assert [gpu.index for gpu in hardware.gpus] == [0, 2]
    (said,) = hardware.lost
    assert said.startswith("GPU 1 does not answer: ")


def test_without_root_slices_are_unknown_and_not_none(bench: Bench) -> None:
    bench.cut(*LAYOUT)
    bench.demote()
    assert bench.gpu().slices is None
    with pytest.raises(lm.HardwareError, match="this needs root"):
        bench.driver.create_slice(bench.gpu().uuid, ("1g.5gb", 1))


# --- what only the real adapter does -------------------------------------------------------------


@pytest.mark.parametrize("card", [kind for kind in nvml_standin.cards().values() if kind.profiles])
def test_the_driver_tells_every_card_as_the_tables_have_it(
    stand_in: Stand, card: nvml_standin.CardKind
) -> None:
    stand_in(card.name)
    driver = lm.NvmlGpus({}, lm.GpuSystem())  # without tables: all of it is the driver's
    (gpu,) = driver.read().gpus
    driver.set_mig_mode(gpu.uuid, enabled=True)
    named = lm.NvmlGpus({}, lm.GpuSystem()).read().gpus[0].geometry
    table = TABLES[f"{card.device:04X}"]
    assert named is not None
    assert (named.compute_slices, named.memory_units) == (table.compute_slices, table.memory_units)
    told = {(p.name, p.driver_id, p.most, p.size, p.starts) for p in named.profiles}
    assert told == {(p.name, p.driver_id, p.most, p.size, p.starts) for p in table.profiles}
    # While MIG is off the driver tells no names: they are NVIDIA's all the same.
    assert gpu.geometry is not None
    assert {p.name for p in gpu.geometry.profiles} == {p.name for p in table.profiles}


def test_a_gpu_is_described_as_nvidia_smi_does(stand_in: Stand) -> None:
    stand_in("H100 80 GB")
    hardware = nvml_gpus().read()
    (gpu,) = hardware.gpus
    assert (gpu.name, gpu.architecture, gpu.compute_capability) == (
        "NVIDIA H100 80GB HBM3", "Hopper", "9.0",
    )  # fmt: skip
    assert gpu.pci_device == "2330"
    assert (gpu.memory_mib, gpu.power_limit_w, gpu.power_range_w) == (81559, 700.0, (175.0, 700.0))
    assert (hardware.driver_version, hardware.cuda_version) == ("580.95.05", "13.0")
    assert (gpu.mig_enabled, gpu.slices, gpu.clients) == (False, (), ())
    assert gpu.energy_j is not None


def test_what_a_card_cannot_tell_is_none_and_never_zero(stand_in: Stand) -> None:
    stand_in("RTX 4090")
    (gpu,) = nvml_gpus().read().gpus
    assert (gpu.mig_enabled, gpu.geometry) == (None, None)
    assert (gpu.ecc_enabled, gpu.ecc_uncorrected, gpu.numa_node) == (None, None, None)


def test_links_are_nvlink_before_pcie_and_gone_where_a_gpu_is_cut(stand_in: Stand) -> None:
    links: dict[tuple[int, int], nvml_standin.Link] = {(0, 1): 12, (2, 3): "switch"}
    stand_in(A100, A100, H100, H100, links=links)
    driver = nvml_gpus()
    assert lm.topology_rows(driver.read())[0][2] == "NV12"
    assert lm.topology_rows(driver.read())[2][4] == "NV18"
    assert {row[1] for row in lm.topology_rows(driver.read())[2:]} <= set(lm.LINK_MEANINGS)
    driver.set_mig_mode(driver.read().gpus[0].uuid, enabled=True)
    assert lm.topology_rows(driver.read())[0][2] in lm.LINK_MEANINGS


def test_an_old_driver_is_read_as_far_as_it_goes(
    stand_in: Stand, tool: Callable[[str], str], tmp_path: Path
) -> None:
    tool("cc")
    stand_in(A100, driver=nvml_standin.library(tmp_path / "old", old_driver=True))
    driver = nvml_gpus()
    hardware = driver.read()
    (gpu,) = hardware.gpus
    assert hardware.fault is None
    assert (hardware.cuda_version, gpu.numa_node) == (None, None)
    assert gpu.geometry is not None
    assert {p.name for p in gpu.geometry.profiles} == {p.name for p in TABLES["20B0"].profiles}
    driver.set_mig_mode(gpu.uuid, enabled=True)
    driver.create_slice(gpu.uuid, ("3g.20gb", 4))
    assert driver.read(fresh=True).gpus[0].layout == {("3g.20gb", 4)}


@pytest.mark.parametrize("symbol", [
    "nvmlDeviceCreateGpuInstanceWithPlacement", "nvmlGpuInstanceCreateComputeInstance",
])  # fmt: skip
def test_a_slice_that_could_not_be_made_whole_leaves_nothing(stand_in: Stand, symbol: str) -> None:
    server = stand_in(A100)
    driver = nvml_gpus()
    uuid = driver.read().gpus[0].uuid
    driver.set_mig_mode(uuid, enabled=True)
    server.fail(symbol, pynvml.NVML_ERROR_UNKNOWN)
    with pytest.raises(lm.HardwareError, match="could not create 3g"):
        driver.create_slice(uuid, ("3g.20gb", 4))
    assert server.slices(0) == set()


def test_an_instance_that_lost_its_compute_instance_is_filled_where_it_is(stand_in: Stand) -> None:
    server = stand_in(A100)
    driver = nvml_gpus()
    uuid = driver.read().gpus[0].uuid
    driver.set_mig_mode(uuid, enabled=True)
    driver.create_slice(uuid, ("3g.20gb", 4))
    server.fail("nvmlGpuInstanceDestroy", pynvml.NVML_ERROR_IN_USE, times=nvml_standin.FOREVER)
    with pytest.raises(lm.HardwareError, match="could not remove"):
        driver.destroy_slice(uuid, ("3g.20gb", 4))
    broken = driver.read(fresh=True).gpus[0].device(("3g.20gb", 4))
    assert broken is not None
    assert broken.uuid is None
    driver.create_slice(uuid, ("3g.20gb", 4))
    filled = driver.read(fresh=True).gpus[0].device(("3g.20gb", 4))
    assert filled is not None
    assert filled.uuid == server.devices(0)["3g.20gb", 4]


def test_an_instance_that_somebody_split_is_not_taken_for_whole(stand_in: Stand) -> None:
    stand_in(A100)
    driver = nvml_gpus()
    uuid = driver.read().gpus[0].uuid
    driver.set_mig_mode(uuid, enabled=True)
    driver.create_slice(uuid, ("3g.20gb", 4))
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    geometry = driver.read().gpus[0].geometry
    assert geometry is not None
    instance = lm._instance_at(handle, geometry.profile("3g.20gb"), 4)
    for compute in lm._compute_instances(instance):
        pynvml.nvmlComputeInstanceDestroy(compute)
    one_slice = pynvml.nvmlGpuInstanceGetComputeInstanceProfileInfo(instance, 0, 0)
    pynvml.nvmlGpuInstanceCreateComputeInstance(instance, one_slice.id)
    pynvml.nvmlShutdown()
    (split,) = driver.read(fresh=True).gpus[0].slices or ()
    assert (split.slice, split.uuid) == (("3g.20gb", 4), None)


def test_a_mode_that_only_says_it_changed_is_not_believed(stand_in: Stand) -> None:
    server = stand_in(A100)
    driver = nvml_gpus()
    server.lie("nvmlDeviceSetMigMode", times=nvml_standin.FOREVER)
    with pytest.raises(lm.HardwareError, match="could not turn MIG on"):
        driver.set_mig_mode(driver.read().gpus[0].uuid, enabled=True)
    assert server.mig(0) == (0, 0)


def test_who_is_in_the_way_for_a_moment_only_does_not_end_a_cut(stand_in: Stand) -> None:
    server = stand_in(A100)
    driver = nvml_gpus()
    server.lie("nvmlDeviceSetMigMode", times=2)
    driver.set_mig_mode(driver.read().gpus[0].uuid, enabled=True)
    assert server.mig(0) == (1, 1)


def test_a_monitor_keeps_an_ampere_card_pending_and_is_not_ended(stand_in: Stand) -> None:
    server = stand_in(A100)
    driver = nvml_gpus()
    server.add_process(0, os.getppid(), hidden=True)
    with pytest.raises(lm.HardwareError, match="somebody who does not show"):
        driver.set_mig_mode(driver.read().gpus[0].uuid, enabled=True)
    gpu = driver.read(fresh=True).gpus[0]
    assert (gpu.mig_enabled, gpu.mig_pending) == (False, True)
    assert "a reset is pending" in lm.mig_text(gpu)


def test_an_upgraded_driver_says_reboot(stand_in: Stand) -> None:
    stand_in(A100).mismatch()
    fault = nvml_gpus().read().fault
    assert fault is not None
    assert "newer than the loaded kernel module" in fault.fact
    assert "Reboot" in fault.advice


def test_a_server_without_a_driver_has_no_gpus_and_no_fault(tmp_path: Path) -> None:
    hardware = nothing_but(tmp_path).read()
    assert (hardware.gpus, hardware.fault) == ((), None)
    assert lm.driver_text(hardware).startswith("No NVIDIA GPU is in this server")


def test_a_gpu_without_a_driver_is_a_fault(tmp_path: Path) -> None:
    device = tmp_path / "sys/bus/pci/devices/0000:3b:00.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text("0x10de\n")
    (device / "class").write_text("0x030200\n")
    fault = nothing_but(tmp_path).read().fault
    assert fault is not None
    assert "its driver is not installed or not loaded" in fault.fact


def nothing_but(root: Path) -> lm.NvmlGpus:
    """The adapter on a machine without NVIDIA's library, which this one has or not."""
    system = lm.GpuSystem(root)
    program = "import pynvml\ntry: pynvml.nvmlInit()\nexcept pynvml.NVMLError as e: print(e.value)"
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True,
        cwd=lm.PROGRAM.parent,
    )  # fmt: skip
    if answer.stdout.strip() not in {"9", "12"}:
        pytest.skip("this machine has an NVIDIA driver")
    return lm.NvmlGpus(TABLES, system)


# --- what the system says ------------------------------------------------------------------------


def test_the_files_on_the_disk_are_compared_with_the_loaded_module(tmp_path: Path) -> None:
    libraries = tmp_path / "usr/lib/x86_64-linux-gnu"
    libraries.mkdir(parents=True)
    (libraries / "libnvidia-ml.so.560.35.03").touch()
    (libraries / "libnvidia-ml.so.1").symlink_to("libnvidia-ml.so.560.35.03")
    module = tmp_path / "sys/module/nvidia/version"
    module.parent.mkdir(parents=True)
    module.write_text("550.54.15\n")
    system = lm.GpuSystem(tmp_path)
    hardware = lm.Hardware(
        kernel_version=system.kernel_version(), library_version=system.library_version()
    )
    assert (hardware.kernel_version, hardware.library_version) == ("550.54.15", "560.35.03")
    assert hardware.reboot_pending
    assert "Reboot pending" in lm.driver_text(hardware)
    module.write_text("560.35.03\n")
    assert system.kernel_version() == system.library_version()


def test_the_kernels_log_tells_which_gpu_had_which_error(tmp_path: Path) -> None:
    log = tmp_path / "dev/kmsg"
    log.parent.mkdir()
    log.write_text(
        "6,1,2,-;NVRM: Xid (PCI:0000:3b:00): 79, pid=1, GPU has fallen off the bus.\n"
        "6,2,3,-;NVRM: Xid (PCI:0000:3b:00 GPU-I:05): 94, Contained memory error.\n"
        "6,3,4,-;usb 1-1: new device\n"
    )
    assert lm.GpuSystem(tmp_path).xids() == {"0000:3b:00": (79, 94)}
    assert lm.short_bus_id("00000000:3B:00.0") == "0000:3b:00"
    assert lm.GpuSystem(tmp_path / "elsewhere").xids() is None  # unknown, not none


def test_whoever_has_a_gpu_open_is_known_by_program_and_container(tmp_path: Path) -> None:
    container = "ab" * 32
    for pid, command, cgroup in (
        (11, "/usr/bin/nvidia-persistenced\0--verbose\0", "0::/system.slice"),
        (12, "python3\0train.py\0", f"0::/system.slice/docker-{container}.scope"),
        (13, f"py\x1b[31m\nthon3\0{lm.PROGRAM}\0serve\0", "0::/"),
    ):
        folder = tmp_path / f"proc/{pid}"
        (folder / "fd").mkdir(parents=True)
        (folder / "cmdline").write_text(command)
        (folder / "cgroup").write_text(cgroup)
        (folder / "fd/3").symlink_to("/dev/nvidia1")
        (folder / "fd/4").symlink_to("/dev/null")
    system = lm.GpuSystem(tmp_path)
    assert system.holders() == {1: [11, 12, 13]}
    daemon, training = system.client(11), system.client(12)
    assert daemon == lm.GpuClient(pid=11, name="nvidia-persistenced")
    assert training == lm.GpuClient(pid=12, name="python3", container_id=container)
    itself, gone = system.client(13), system.client(14)
    assert itself is not None
    assert (itself.name, itself.is_manager) == ("py??31m?thon3", True)
    assert gone is None
    assert daemon is not None
    said = lm.release_advice([daemon])
    assert said == "Stop it yourself: `systemctl stop nvidia-persistenced`."


def test_the_numa_node_is_that_of_the_slot(tmp_path: Path) -> None:
    for bus, node in (("0000:3b:00.0", "1"), ("0000:86:00.0", "-1")):
        (tmp_path / f"sys/bus/pci/devices/{bus}").mkdir(parents=True)
        (tmp_path / f"sys/bus/pci/devices/{bus}/numa_node").write_text(f"{node}\n")
    system = lm.GpuSystem(tmp_path)
    assert system.numa_node("00000000:3B:00.0") == 1
    assert system.numa_node("00000000:86:00.0") is None
    assert system.numa_node("00000000:AF:00.0") is None


def test_a_cdi_list_counts_only_where_it_lists_nvidias_devices(tmp_path: Path) -> None:
    folder = tmp_path / "var/run/cdi"
    folder.mkdir(parents=True)
    (folder / "other.yaml").write_text("kind: vendor.com/net\n")
    system = lm.GpuSystem(tmp_path)
    (folder / "management.yaml").write_text(f"kind: management.nvidia.com/gpu\n# {GPU_0}\n")
    assert system.cdi_text() == ""
    (folder / "nvidia.yaml").write_text(f"kind: nvidia.com/gpu\ndevices:\n- name: {GPU_0}\n")
    assert GPU_0 in system.cdi_text()
    assert system.cdi_missing([GPU_0]) == frozenset()
    assert system.cdi_missing([GPU_0, "MIG-1"]) == {"MIG-1"}
    by_index = "kind: nvidia.com/gpu\ndevices:\n- name: '0'\n"  # toolkits before 1.15
    (folder / "nvidia.yaml").write_text(by_index)
    assert system.cdi_missing([GPU_0]) == frozenset()


# --- the program on such a server ----------------------------------------------------------------


@pytest.fixture
def without_docker(stand_in: Stand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program is on a server of an A100 and an H100 whose Docker does not answer."""
    stand_in(A100, H100)
    monkeypatch.setenv("LLM_MANAGER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/no-docker.sock")


@pytest.mark.usefixtures("without_docker")
def test_the_real_program_finds_the_driver() -> None:
    listed = subprocess.run(
        [sys.executable, str(lm.PROGRAM), "gpu", "list"],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert "GPU 0  NVIDIA A100-SXM4-40GB" in listed.stdout


@pytest.mark.usefixtures("without_docker")
def test_the_command_line_shows_gpus_without_docker(capsys: pytest.CaptureFixture[str]) -> None:
    def told(*words: str) -> str:
        assert lm.main(words) == lm.DONE
        return capsys.readouterr().out

    facts = json.loads(told("gpu", "list", "--json"))
    assert [gpu["architecture"] for gpu in facts["gpus"]] == ["Ampere", "Hopper"]
    assert told("mig", "layouts", "0").splitlines()[:3] == ["keep", "7g.40gb", "2x 3g.20gb"]
    assert "GPU 1 (NVIDIA H100 80GB HBM3): MIG off" in told("mig", "show")
    # Nothing is cut while nobody can tell which containers use the GPU.
    assert lm.main(("mig", "apply", "0", "3g.20gb")) == lm.FAILED
    assert "Docker does not answer" in capsys.readouterr().err
