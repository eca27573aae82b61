"""The stand-in for NVIDIA's library, asked through the real pynvml: it answers as the driver does.

What is expected here comes from NVIDIA's documentation and public transcripts of nvidia-smi, so
that the tests that use the stand-in stand on something.
"""

from __future__ import annotations

import ctypes
import inspect
import itertools
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nvml_standin
import pynvml as nvml
import pytest
from nvml_standin import FOREVER, Server, card, cards
from pynvml import (
    NVMLError_DriverNotLoaded,
    NVMLError_FunctionNotFound,
    NVMLError_GpuIsLost,
    NVMLError_InsufficientResources,
    NVMLError_InsufficientSize,
    NVMLError_InUse,
    NVMLError_InvalidArgument,
    NVMLError_LibRmVersionMismatch,
    NVMLError_NoPermission,
    NVMLError_NotFound,
    NVMLError_NotSupported,
    NVMLError_Uninitialized,
)

MIG_CARDS = [kind.name for kind in cards().values() if kind.profiles]
A100, A30, H200, PRO = "A100 40 GB", "A30", "H200 141 GB", "RTX PRO 6000 Blackwell"
P2P_READ = 0  # pynvml's NVML_P2P_CAPS_INDEX_READ is a tuple
PROGRAM = Path(__file__).parent.parent / "llm_manager.py"
Start = Callable[..., Server]


@pytest.fixture
def library(tool: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    tool("cc")
    return nvml_standin.library(tmp_path_factory.getbasetemp() / "nvml")


@pytest.fixture
def old_library(tool: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    tool("cc")
    return nvml_standin.library(tmp_path_factory.getbasetemp() / "old-nvml", old_driver=True)


@pytest.fixture
def start(library: Path, tmp_path: Path) -> Iterator[Start]:
    """Start a server with these cards, with pynvml on it until the test ends."""
    running: list[Server] = []

    def starting(*names: str, driver: Path = library, **options: Any) -> Server:
        server = Server(driver, tmp_path / "server", names, **options)
        server.activate()
        running.append(server)
        nvml.nvmlInit()
        return server

    yield starting
    for server in running:
        server.deactivate()


def gpu(number: int = 0) -> Any:
    return nvml.nvmlDeviceGetHandleByIndex(number)


def cut(server: Server, number: int = 0) -> Any:
    """Turn MIG mode on, and return the GPU's handle."""
    assert nvml.nvmlDeviceSetMigMode(gpu(number), 1) == nvml.NVML_SUCCESS
    assert server.mig(number) == (1, 1)
    return gpu(number)


def create(device: Any, kind: nvml_standin.ProfileKind, start: int | None = None) -> Any:
    """A GPU instance, where the driver wants it or where we do."""
    if start is None:
        return nvml.nvmlDeviceCreateGpuInstance(device, kind.driver_id)
    at = nvml.c_nvmlGpuInstancePlacement_t(start, kind.size)
    return nvml.nvmlDeviceCreateGpuInstanceWithPlacement(device, kind.driver_id, ctypes.byref(at))


def finish(instance: Any) -> Any:
    """One compute instance over all of a GPU instance, found as the manager must find it."""
    slices = {0: 1, 1: 2, 2: 3, 3: 4, 4: 7}
    for profile in reversed(slices):
        try:
            info = nvml.nvmlGpuInstanceGetComputeInstanceProfileInfo(instance, profile, 0)
        except NVMLError_NotSupported:
            continue
        return nvml.nvmlGpuInstanceCreateComputeInstance(instance, info.id)
    raise AssertionError


def identity(instance: Any) -> tuple[int, int]:
    """The id of a GPU instance, and where it starts."""
    info = nvml.nvmlGpuInstanceGetInfo(instance)
    return info.id, info.placement.start


def placements(device: Any, profile_id: int) -> list[tuple[int, int]]:
    """Both calls: how many there are, then which."""
    count = ctypes.c_uint()
    ask = nvml.nvmlDeviceGetGpuInstancePossiblePlacements
    ask(device, profile_id, None, ctypes.byref(count))
    found = (nvml.c_nvmlGpuInstancePlacement_t * count.value)()
    ask(device, profile_id, found, ctypes.byref(count))
    return [(at.start, at.size) for at in found]


def mig_devices(device: Any) -> dict[int, Any]:
    """By index, holes left out."""
    found = {}
    for index in range(nvml.nvmlDeviceGetMaxMigDeviceCount(device)):
        try:
            found[index] = nvml.nvmlDeviceGetMigDeviceHandleByIndex(device, index)
        except NVMLError_NotFound:
            continue
    return found


# --- the library itself ----------------------------------------------------------


def symbols_of(function: Callable[..., Any]) -> set[str]:
    """The C functions behind a function of pynvml."""
    source = inspect.getsource(function)
    found = set(re.findall(r'_nvmlGetFunctionPointer\("(\w+)"\)', source))
    others = set(re.findall(r"\b(nvml[A-Z]\w+)\(", source)) - {function.__name__}
    return found or set().union(*(symbols_of(getattr(nvml, other)) for other in others))


def test_every_function_of_nvml_that_the_manager_calls_is_there(library: Path) -> None:
    there = ctypes.CDLL(str(library))
    for name in {*re.findall(r"pynvml\.(nvml[A-Z]\w+)", PROGRAM.read_text()), "nvmlInit"}:
        symbols = symbols_of(getattr(nvml, name))
        assert symbols, name
        assert {symbol for symbol in symbols if not hasattr(there, symbol)} == set(), name


def test_without_a_server_there_is_no_driver(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(A100)
    nvml.nvmlShutdown()
    with pytest.raises(NVMLError_Uninitialized):
        nvml.nvmlDeviceGetCount()
    for path in (None, tmp_path / "absent", Path(__file__)):
        if path:
            monkeypatch.setenv("NVML_STANDIN", str(path))
        else:
            monkeypatch.delenv("NVML_STANDIN")
        with pytest.raises(NVMLError_DriverNotLoaded):
            nvml.nvmlInit()


def test_it_is_up_until_the_last_who_started_it_shuts_it_down(start: Start) -> None:
    start(A100)
    nvml.nvmlInit()
    nvml.nvmlShutdown()
    assert nvml.nvmlDeviceGetCount() == 1
    nvml.nvmlShutdown()
    with pytest.raises(NVMLError_Uninitialized):
        nvml.nvmlShutdown()


def test_an_upgraded_driver_starts_again_after_the_reboot(start: Start) -> None:
    server = start(A100)
    nvml.nvmlShutdown()
    server.mismatch()
    with pytest.raises(NVMLError_LibRmVersionMismatch):
        nvml.nvmlInit()
    server.reboot()
    nvml.nvmlInit()


def test_errors_have_the_driver_s_words(start: Start) -> None:
    start(A100)
    assert str(nvml.NVMLError(nvml.NVML_ERROR_IN_USE)) == "In use by another client"
    assert nvml.nvmlErrorString(nvml.NVML_ERROR_INSUFFICIENT_RESOURCES) == "Insufficient Resources"
    assert nvml.nvmlErrorString(12345) == "Unknown Error"


def test_the_process_gets_its_own_driver_back(library: Path, tmp_path: Path) -> None:
    before = nvml.nvmlLib
    server = Server(library, tmp_path / "server", [A100])
    server.activate()
    nvml.nvmlInit()
    server.deactivate()
    assert nvml.nvmlLib is before
    with Path("/proc/self/maps").open() as maps:  # a machine's own driver may be among them
        own = any("libnvidia-ml" in line and str(library) not in line for line in maps)
    if not own:
        with pytest.raises(OSError, match="libnvidia-ml"):
            ctypes.CDLL("libnvidia-ml.so.1")


OTHER_PROCESS = """
import ctypes
import pynvml as nvml
nvml.nvmlInit()
gpu = nvml.nvmlDeviceGetHandleByIndex(0)
print(nvml.nvmlDeviceGetUUID(gpu), flush=True)
while nvml.nvmlDeviceGetMigMode(gpu) == [0, 0]:
    pass
room, count = (nvml.c_nvmlGpuInstance_t * 8)(), ctypes.c_uint()
mine = 0
while mine < 200:
    try:
        instance = nvml.nvmlDeviceCreateGpuInstance(gpu, 0)
    except nvml.NVMLError_InsufficientResources:
        continue
    nvml.nvmlDeviceGetGpuInstances(gpu, 0, room, ctypes.byref(count))
    assert count.value == 1, "two have the whole GPU"
    nvml.nvmlGpuInstanceDestroy(instance)
    mine += 1
"""


def test_processes_share_a_server_and_never_have_the_same_slice(start: Start) -> None:
    server = start(A100)
    cut(server)
    command = [sys.executable, "-c", OTHER_PROCESS]
    others = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    try:
        for other in others:
            assert other.stdout is not None
            assert other.stdout.readline() == f"{server.uuid(0)}\n"
        cut(server)
        for other in others:
            other.communicate(timeout=60)
    finally:
        for other in others:
            other.kill()
    assert [other.returncode for other in others] == [0, 0, 0]
    assert server.slices(0) == set()


def test_an_ampere_card_changes_its_mode_only_while_no_other_process_looks(start: Start) -> None:
    server = start(A100, H200)
    command = [sys.executable, "-c", OTHER_PROCESS]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == f"{server.uuid(0)}\n"
        assert nvml.nvmlDeviceSetMigMode(gpu(), 1) == nvml.NVML_ERROR_IN_USE
        assert nvml.nvmlDeviceSetMigMode(gpu(1), 1) == nvml.NVML_SUCCESS
        other.kill()
    assert nvml.nvmlDeviceSetMigMode(gpu(), 1) == nvml.NVML_SUCCESS


def test_processes_are_as_busy_as_they_are_made(start: Start) -> None:
    server = start(A100)
    with pytest.raises(NVMLError_NotFound):
        nvml.nvmlDeviceGetProcessUtilization(gpu(), 0)
    server.add_process(0, 41)
    server.work(41, 60)
    (sample,) = nvml.nvmlDeviceGetProcessUtilization(gpu(), 0)
    assert (sample.pid, sample.smUtil) == (41, 60)
    server.remove_process(41)
    cut(server)
    with pytest.raises(NVMLError_NotSupported):
        nvml.nvmlDeviceGetProcessUtilization(gpu(), 0)


def test_gpm_tells_of_slices_from_hopper_on(start: Start) -> None:
    server = start(A100, H200)
    assert [nvml.nvmlGpmQueryDeviceSupport(gpu(n)).isSupportedDevice for n in (0, 1)] == [0, 1]
    server.carve(1, ("1g.18gb", 0))
    server.add_process(1, 41, slice=("1g.18gb", 0))
    server.work(41, 30)
    slice_ = nvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu(1), 0)
    instance = nvml.nvmlDeviceGetGpuInstanceId(slice_)
    samples = [nvml.nvmlGpmSampleAlloc() for _ in range(2)]
    for sample in samples:
        nvml.nvmlGpmMigSampleGet(gpu(1), instance, sample)
    asked = nvml.c_nvmlGpmMetricsGet_t(version=1, numMetrics=1)
    asked.sample1, asked.sample2 = samples
    asked.metrics[0].metricId = 2
    assert nvml.nvmlGpmMetricsGet(asked).metrics[0].value == 30
    for sample in samples:
        nvml.nvmlGpmSampleFree(sample)
    assert server.open_samples() == 0


def test_threads_share_it_as_well(start: Start) -> None:
    device, kind = cut(start(A100)), card(A100).profile("1g.5gb")
    made: list[tuple[int, int]] = []

    def fill() -> None:
        for _ in range(2000):
            assert nvml.nvmlDeviceGetMigMode(device) == [1, 1]
        while True:
            try:
                made.append(identity(create(device, kind)))
            except NVMLError_InsufficientResources:
                return

    threads = [threading.Thread(target=fill) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(start for _, start in made) == [*range(7)]


# --- what a GPU says of itself -----------------------------------------------------


@pytest.mark.parametrize("name", cards())
def test_a_card_says_what_it_is(start: Start, name: str) -> None:
    server, kind = start(name), card(name)
    device = gpu()
    pci = nvml.nvmlDeviceGetPciInfo(device)
    assert nvml.nvmlDeviceGetUUID(device) == server.uuid(0)
    assert nvml.nvmlDeviceGetName(device) == kind.product
    assert pci.pciDeviceId == (kind.device << 16 | 0x10DE)
    assert (pci.busId, pci.busIdLegacy) == ("00000000:17:00.0", "0000:17:00.0")
    assert nvml.nvmlDeviceGetArchitecture(device) == kind.architecture
    assert nvml.nvmlDeviceGetCudaComputeCapability(device) == kind.capability
    assert nvml.nvmlDeviceGetMemoryInfo(device).total == kind.memory_mib * 1024**2
    assert nvml.nvmlDeviceGetEnforcedPowerLimit(device) == kind.limit_w * 1000


def test_the_driver_says_what_it_is(start: Start) -> None:
    start(A100)
    assert nvml.nvmlSystemGetDriverVersion() == "580.95.05"
    assert nvml.nvmlSystemGetNVMLVersion() == "13.580.95.05"
    assert nvml.nvmlSystemGetCudaDriverVersion_v2() == 13000


def test_every_gpu_is_its_own(start: Start) -> None:
    server = start(A100, A100, H200)
    assert nvml.nvmlDeviceGetCount() == 3
    assert len({server.uuid(number) for number in range(3)}) == 3
    for number in range(3):
        device = nvml.nvmlDeviceGetHandleByUUID(server.uuid(number))
        assert nvml.nvmlDeviceGetIndex(device) == number
        assert nvml.nvmlDeviceGetMinorNumber(device) == number
    with pytest.raises(NVMLError_InvalidArgument):
        gpu(3)
    with pytest.raises(NVMLError_NotFound):
        nvml.nvmlDeviceGetHandleByUUID("GPU-00000000-0000-0000-0000-000000000000")


def test_only_a_gpu_that_is_a_numa_node_has_one(start: Start) -> None:
    start(A100, "GB200 186 GB")
    with pytest.raises(NVMLError_NotSupported):
        nvml.nvmlDeviceGetNumaNodeId(gpu(0))
    assert nvml.nvmlDeviceGetNumaNodeId(gpu(1)) == 1


def test_sensors_say_what_the_test_wants(start: Start) -> None:
    server, device = start(A100), gpu()
    server.set(0, power_mw=321000, temperature=77, utilization=90, memory_utilization=40)
    server.set(0, limit_mw=250000, persistence=0, corrected=5, uncorrected=2)
    assert nvml.nvmlDeviceGetPowerUsage(device) == 321000
    assert nvml.nvmlDeviceGetTemperature(device, nvml.NVML_TEMPERATURE_GPU) == 77
    assert nvml.nvmlDeviceGetTemperatureV(device, nvml.NVML_TEMPERATURE_GPU) == 77
    rates = nvml.nvmlDeviceGetUtilizationRates(device)
    assert (rates.gpu, rates.memory) == (90, 40)
    assert nvml.nvmlDeviceGetEnforcedPowerLimit(device) == 250000
    assert nvml.nvmlDeviceGetPowerManagementDefaultLimit(device) == 400000
    assert nvml.nvmlDeviceGetPowerManagementLimitConstraints(device) == [100000, 400000]
    assert nvml.nvmlDeviceGetPersistenceMode(device) == 0
    assert nvml.nvmlDeviceGetEccMode(device) == [1, 1]
    ecc = itertools.product((0, 1), (0, 1))  # uncorrected?, aggregate?
    assert [nvml.nvmlDeviceGetTotalEccErrors(device, *one) for one in ecc] == [5, 5, 2, 2]
    server.reboot()
    assert nvml.nvmlDeviceGetTotalEccErrors(device, 1, 0) == 0
    assert nvml.nvmlDeviceGetTotalEccErrors(device, 1, 1) == 2


def test_a_game_card_lacks_much(start: Start) -> None:
    start("RTX 4090", "RTX 4090")
    for function in (nvml.nvmlDeviceGetEccMode, nvml.nvmlDeviceGetMigMode):
        with pytest.raises(NVMLError_NotSupported):
            function(gpu())
    with pytest.raises(NVMLError_NotSupported):
        nvml.nvmlDeviceSetMigMode(gpu(), 1)
    with pytest.raises(NVMLError_NotSupported):
        nvml.nvmlDeviceGetNvLinkState(gpu(), 0)
    assert nvml.nvmlDeviceGetMaxMigDeviceCount(gpu()) == 0
    assert nvml.nvmlDeviceGetP2PStatus(gpu(0), gpu(1), P2P_READ) == 1


def test_energy_grows_with_power_and_time_and_begins_anew_at_a_boot(start: Start) -> None:
    server, device = start(A100), gpu()
    server.set(0, energy_uj=0, power_mw=300_000)
    server.advance(100)
    server.set(0, power_mw=100_000)
    server.advance(10)
    joules = nvml.nvmlDeviceGetTotalEnergyConsumption(device) / 1000
    assert 31_000 <= joules < 33_000  # a real second or a few pass as well
    server.reboot()
    assert nvml.nvmlDeviceGetTotalEnergyConsumption(device) < 3_000_000


def test_fields_answer_one_by_one(start: Start) -> None:
    server = start(A100, H200)
    for number in (0, 1):
        server.set(number, energy_uj=5_000_000, power_mw=0)
        server.set(number, power_mw=60_000)
    ids = [83, 185, 186, (186, 2), 9999]
    ampere, hopper = (nvml.nvmlDeviceGetFieldValues(gpu(number), ids) for number in (0, 1))
    assert [value.nvmlReturn for value in ampere] == [0, 3, 0, 3, 3]  # GA100 has no average
    assert [value.nvmlReturn for value in hopper] == [0, 0, 0, 3, 3]
    assert [value.fieldId for value in hopper] == [83, 185, 186, 186, 9999]
    assert hopper[0].valueType == nvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG
    assert 5000 <= hopper[0].value.ullVal < 300_000
    assert hopper[2].valueType == nvml.NVML_VALUE_TYPE_UNSIGNED_INT
    assert hopper[2].value.uiVal == 60_000
    server.set(1, counts_energy=0)
    assert nvml.nvmlDeviceGetFieldValues(gpu(1), [83])[0].nvmlReturn == 3
    with pytest.raises(NVMLError_NotSupported):
        nvml.nvmlDeviceGetTotalEnergyConsumption(gpu(1))


def test_memory_is_what_processes_leave(start: Start) -> None:
    server, device = start(A100), gpu()
    server.add_process(0, 10, used_mib=2048)
    plain = nvml.nvmlDeviceGetMemoryInfo(device)
    exact = nvml.nvmlDeviceGetMemoryInfo(device, version=nvml.nvmlMemory_v2)
    assert exact.used == 2048 * 1024**2
    assert plain.used == exact.used + exact.reserved
    assert plain.free == exact.free == plain.total - plain.used
    with pytest.raises(nvml.NVMLError) as error:
        nvml.nvmlDeviceGetMemoryInfo(device, version=nvml.nvmlMemory_v2 + 1)
    assert error.value.value == nvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH


def test_a_lost_gpu_answers_nothing_until_the_reboot(start: Start) -> None:
    server, device = start(A100, A100), gpu()
    server.lose(0)
    for asking in (
        lambda: nvml.nvmlDeviceGetMigMode(device),
        lambda: nvml.nvmlDeviceGetName(device),
        lambda: nvml.nvmlDeviceGetHandleByIndex(0),
        lambda: nvml.nvmlDeviceGetHandleByUUID(server.uuid(0)),
        lambda: nvml.nvmlDeviceGetTopologyCommonAncestor(gpu(1), device),
    ):
        with pytest.raises(NVMLError_GpuIsLost):
            asking()
    assert nvml.nvmlDeviceGetCount() == 2
    assert nvml.nvmlDeviceGetName(gpu(1)) == card(A100).product
    server.reboot()
    assert nvml.nvmlDeviceGetName(gpu(0)) == card(A100).product


# --- processes ---------------------------------------------------------------------


def test_processes_are_listed_by_what_they_do(start: Start) -> None:
    server, device = start(A100, A100), gpu()
    assert nvml.nvmlDeviceGetComputeRunningProcesses(device) == []
    server.add_process(0, 11, "python", used_mib=100)
    server.add_process(0, 12, "vllm")
    server.add_process(0, 13, "Xorg", graphics=True)
    server.add_process(0, 14, "dcgm", hidden=True)
    server.add_process(1, 15)
    computing = nvml.nvmlDeviceGetComputeRunningProcesses(device)
    assert [(p.pid, p.usedGpuMemory, p.gpuInstanceId) for p in computing] == [
        (11, 100 * 1024**2, 0xFFFFFFFF),
        (12, 1024 * 1024**2, 0xFFFFFFFF),
    ]
    assert [p.pid for p in nvml.nvmlDeviceGetGraphicsRunningProcesses(device)] == [13]
    assert nvml.nvmlSystemGetProcessName(13) == "Xorg"
    server.remove_process(12)
    assert [p.pid for p in nvml.nvmlDeviceGetComputeRunningProcesses(device)] == [11]


def test_too_small_an_array_of_processes_is_told_the_size(start: Start, library: Path) -> None:
    server, device = start(A100), gpu()
    for pid in (1, 2, 3):
        server.add_process(0, pid)
    count, room = ctypes.c_uint(2), (nvml.c_nvmlProcessInfo_t * 2)()
    function = nvml._nvmlGetFunctionPointer("nvmlDeviceGetComputeRunningProcesses_v3")
    answer = function(device, ctypes.byref(count), room)
    assert (answer, count.value) == (nvml.NVML_ERROR_INSUFFICIENT_SIZE, 3)


def test_a_process_in_a_slice_belongs_to_it_and_to_its_gpu(start: Start) -> None:
    server = start(A100)
    server.carve(0, ("3g.20gb", 4), ("1g.5gb", 0))
    server.add_process(0, 21, slice=("3g.20gb", 4), used_mib=4096)
    by_start = {
        nvml.nvmlDeviceGetGpuInstanceId(device): device for device in mig_devices(gpu()).values()
    }
    assert {*by_start} == {2, 7}
    (process,) = nvml.nvmlDeviceGetComputeRunningProcesses(by_start[2])
    assert (process.pid, process.gpuInstanceId, process.computeInstanceId) == (21, 2, 0)
    assert nvml.nvmlDeviceGetComputeRunningProcesses(by_start[7]) == []
    (process,) = nvml.nvmlDeviceGetComputeRunningProcesses(gpu())
    assert (process.pid, process.gpuInstanceId) == (21, 2)
    assert nvml.nvmlDeviceGetMemoryInfo(by_start[2]).used == 4096 * 1024**2
    assert nvml.nvmlDeviceGetMemoryInfo(by_start[7]).used == 0


# --- how GPUs are joined ------------------------------------------------------------


def links(number: int) -> list[tuple[int, str]]:
    """The type of the other end and its address, for every active link."""
    found = []
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        try:
            if not nvml.nvmlDeviceGetNvLinkState(gpu(number), link):
                continue
        except NVMLError_NotSupported:
            break
        pci = nvml.nvmlDeviceGetNvLinkRemotePciInfo(gpu(number), link)
        kind = nvml.nvmlDeviceGetNvLinkRemoteDeviceType(gpu(number), link)
        found.append((kind, pci.busId))
    return found


def test_gpus_without_nvlink_reach_each_other_over_pcie(start: Start) -> None:
    start(*[A100] * 5)
    assert links(0) == []
    assert nvml.nvmlDeviceGetTopologyCommonAncestor(gpu(0), gpu(0)) == 0
    assert nvml.nvmlDeviceGetTopologyCommonAncestor(gpu(0), gpu(1)) == 40
    assert nvml.nvmlDeviceGetTopologyCommonAncestor(gpu(0), gpu(4)) == 50
    assert nvml.nvmlDeviceGetP2PStatus(gpu(0), gpu(1), P2P_READ) == nvml.NVML_P2P_STATUS_OK
    status = nvml.nvmlDeviceGetP2PStatus(gpu(0), gpu(1), nvml.NVML_P2P_CAPS_INDEX_NVLINK)
    assert status == nvml.NVML_P2P_STATUS_NOT_SUPPORTED
    with pytest.raises(NVMLError_InvalidArgument):
        nvml.nvmlDeviceGetNvLinkState(gpu(), nvml.NVML_NVLINK_MAX_LINKS)


def test_a_bridge_ends_at_the_other_gpu(start: Start) -> None:
    start(A100, A100, A100, links={(0, 1): 4, (0, 2): 2})
    bus = [nvml.nvmlDeviceGetPciInfo(gpu(number)).busId for number in range(3)]
    assert links(0) == [(0, bus[1])] * 4 + [(0, bus[2])] * 2
    assert links(1) == [(0, bus[0])] * 4
    nvlink = nvml.NVML_P2P_CAPS_INDEX_NVLINK
    assert nvml.nvmlDeviceGetP2PStatus(gpu(0), gpu(1), nvlink) == nvml.NVML_P2P_STATUS_OK
    assert nvml.nvmlDeviceGetP2PStatus(gpu(1), gpu(2), nvlink) != nvml.NVML_P2P_STATUS_OK


def test_on_a_board_with_nvswitches_all_links_end_there(start: Start) -> None:
    pairs = itertools.combinations(range(4), 2)
    start(*[H200] * 4, links=dict.fromkeys(pairs, "switch"))
    gpus = {nvml.nvmlDeviceGetPciInfo(gpu(number)).busId for number in range(4)}
    found = links(0)
    assert len(found) == 18
    assert {kind for kind, _ in found} == {nvml.NVML_NVLINK_DEVICE_TYPE_SWITCH}
    assert not gpus & {address for _, address in found}
    nvlink = nvml.NVML_P2P_CAPS_INDEX_NVLINK
    assert nvml.nvmlDeviceGetP2PStatus(gpu(0), gpu(3), nvlink) == nvml.NVML_P2P_STATUS_OK


def test_a_cut_gpu_has_no_peers(start: Start) -> None:
    server = start(A100, A100, links={(0, 1): 12})
    server.connect(0, 1, ancestor=nvml.NVML_TOPOLOGY_SINGLE)
    cut(server, 1)
    for capability in range(5):
        status = nvml.nvmlDeviceGetP2PStatus(gpu(0), gpu(1), capability)
        assert status == nvml.NVML_P2P_STATUS_NOT_SUPPORTED
    assert nvml.nvmlDeviceGetTopologyCommonAncestor(gpu(0), gpu(1)) == nvml.NVML_TOPOLOGY_SINGLE


# --- MIG mode -----------------------------------------------------------------------


@pytest.mark.parametrize("name", [A100, H200])
def test_mig_mode_waits_until_nobody_uses_the_gpu(start: Start, name: str) -> None:
    server, device = start(name, name), gpu()
    server.add_process(0, 31, hidden=True)
    assert nvml.nvmlDeviceSetMigMode(device, 1) == nvml.NVML_ERROR_IN_USE  # and nothing is raised
    assert nvml.nvmlDeviceGetMigMode(device) == [0, 1]
    assert server.mig(0) == (0, 1)
    with pytest.raises(NVMLError_NotSupported):
        nvml.nvmlDeviceCreateGpuInstance(device, 0)
    server.remove_process(31)
    cut(server)
    assert server.mig(1) == (0, 0)


@pytest.mark.parametrize(("name", "kept"), [(A100, (1, 1)), (H200, (0, 0)), (PRO, (0, 0))])
def test_only_ampere_keeps_mig_mode_over_a_reboot(
    start: Start, name: str, kept: tuple[int, int]
) -> None:
    server = start(name)
    kind = card(name).profiles[0]
    device = cut(server)
    instance = create(device, kind)
    finish(instance)
    server.reboot()
    assert server.mig(0) == kept
    assert server.slices(0) == set()
    with pytest.raises(NVMLError_InvalidArgument):
        nvml.nvmlGpuInstanceGetInfo(instance)


def test_a_pending_mode_comes_with_the_reboot_on_ampere(start: Start) -> None:
    server = start(A100)
    server.add_process(0, 32)
    assert nvml.nvmlDeviceSetMigMode(gpu(), 1) == nvml.NVML_ERROR_IN_USE
    server.reboot()
    assert server.mig(0) == (1, 1)
    assert nvml.nvmlDeviceGetComputeRunningProcesses(gpu()) == []


def test_a_virtual_machine_must_reboot_for_it(start: Start) -> None:
    server = start(H200)
    server.set(0, passthrough=1)
    assert nvml.nvmlDeviceSetMigMode(gpu(), 1) == nvml.NVML_ERROR_RESET_REQUIRED
    assert server.mig(0) == (0, 1)
    server.reboot()
    assert server.mig(0) == (1, 1)


def test_mig_mode_stays_on_while_there_are_instances(start: Start) -> None:
    server = start(A100)
    device = cut(server)
    instance = create(device, card(A100).profile("7g.40gb"))
    assert nvml.nvmlDeviceSetMigMode(device, 0) == nvml.NVML_ERROR_IN_USE
    assert server.mig(0) == (1, 0)
    nvml.nvmlGpuInstanceDestroy(instance)
    assert nvml.nvmlDeviceSetMigMode(device, 0) == nvml.NVML_SUCCESS
    assert server.mig(0) == (0, 0)


def test_the_reset_for_mig_mode_empties_ampere_s_counters(start: Start) -> None:
    server = start(A100, H200)
    for number in (0, 1):
        server.set(number, energy_uj=10**12)
        cut(server, number)
    assert nvml.nvmlDeviceGetTotalEnergyConsumption(gpu(0)) < 10**8
    assert nvml.nvmlDeviceGetTotalEnergyConsumption(gpu(1)) >= 10**9


def test_a_cut_gpu_has_no_utilization(start: Start) -> None:
    device = cut(start(H200))
    with pytest.raises(NVMLError_NotSupported):
        nvml.nvmlDeviceGetUtilizationRates(device)
    assert nvml.nvmlDeviceGetPowerUsage(device) == 75000


# --- profiles -----------------------------------------------------------------------


def profiles(device: Any, version: int) -> dict[int, Any]:
    """By constant, until the driver knows no more of them."""
    found = {}
    for index in itertools.count():
        try:
            found[index] = nvml.nvmlDeviceGetGpuInstanceProfileInfo(device, index, version)
        except NVMLError_NotSupported:
            continue
        except NVMLError_InvalidArgument:
            return found
    raise AssertionError


@pytest.mark.parametrize("name", MIG_CARDS)
def test_profiles_and_starts_are_those_of_the_recipes(start: Start, name: str) -> None:
    server, kind = start(name), card(name)
    expected = {
        kind.index: (kind.driver_id, kind.slices, kind.most, kind.memory_mib, kind.multiprocessors)
        for kind in kind.profiles
    }

    def known(version: int) -> dict[int, tuple[int, ...]]:
        return {
            index: (
                info.id,
                info.sliceCount,
                info.instanceCount,
                info.memorySizeMB,
                info.multiprocessorCount,
            )
            for index, info in profiles(gpu(), version).items()
        }

    assert known(version=1) == expected
    assert known(version=2) == {}  # not while MIG mode is off
    for profile in kind.profiles:
        wanted = [(start, profile.size) for start in profile.starts]
        assert placements(gpu(), profile.driver_id) == wanted
    cut(server)
    assert known(version=1) == known(version=2) == expected
    names = {info.id: info.name for info in profiles(gpu(), 2).values()}
    assert names == {p.driver_id: f"MIG {p.name}" for p in kind.profiles}


def test_an_a100_s_second_1g_is_another_constant_than_its_first() -> None:
    assert card(A100).profile("1g.5gb").index == nvml.NVML_GPU_INSTANCE_PROFILE_1_SLICE
    assert card(A100).profile("1g.10gb").index == nvml.NVML_GPU_INSTANCE_PROFILE_1_SLICE_REV2
    assert card(PRO).profile("1g.24gb+me.all").index == 15
    assert card(PRO).profile("4g.96gb+gfx").index == nvml.NVML_GPU_INSTANCE_PROFILE_4_SLICE_GFX


def test_structures_of_another_version_are_refused(start: Start) -> None:
    device = cut(start(A100))
    info = nvml.c_nvmlGpuInstanceProfileInfo_v2_t()
    info.version = 0x03000098
    function = nvml._nvmlGetFunctionPointer("nvmlDeviceGetGpuInstanceProfileInfoV")
    answer = function(device, 0, ctypes.byref(info))
    assert answer == nvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH


def test_too_small_an_array_of_placements_is_told_the_size(start: Start) -> None:
    start(A100)
    count, room = ctypes.c_uint(3), (nvml.c_nvmlGpuInstancePlacement_t * 3)()
    with pytest.raises(NVMLError_InsufficientSize):
        nvml.nvmlDeviceGetGpuInstancePossiblePlacements(gpu(), 19, room, ctypes.byref(count))
    assert count.value == 7
    with pytest.raises(NVMLError_NotSupported):
        placements(gpu(), 65)


# --- GPU instances ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("profile_ids", "expected"),
    [  # each as a transcript has it: the driver's id and start for every instance
        ("19 14 5", [(13, 6), (5, 4), (1, 0)]),
        ("9 19 14 19", [(2, 4), (7, 0), (4, 2), (8, 1)]),
        ("19 19 19 19 19 19 19", [(13, 6), (11, 4), (12, 5), (7, 0), (8, 1), (9, 2), (10, 3)]),
        ("19 19 14 9", [(13, 6), (11, 4), (3, 0), None]),
    ],
)
def test_the_driver_places_as_on_a_real_a100(
    start: Start, profile_ids: str, expected: list[tuple[int, int] | None]
) -> None:
    device = cut(start(A100))
    found: list[tuple[int, int] | None] = []
    for profile_id in map(int, profile_ids.split()):
        try:
            found.append(identity(nvml.nvmlDeviceCreateGpuInstance(device, profile_id)))
        except NVMLError_InsufficientResources:
            found.append(None)
    assert found == expected


@pytest.mark.parametrize("name", MIG_CARDS)
def test_of_every_profile_there_are_as_many_as_the_recipe_says(start: Start, name: str) -> None:
    server, kind = start(name), card(name)
    device = cut(server)
    for profile in kind.profiles:
        for left in reversed(range(profile.most)):
            finish(create(device, profile))
            capacity = nvml.nvmlDeviceGetGpuInstanceRemainingCapacity(device, profile.driver_id)
            assert capacity == left, profile.name
        with pytest.raises(NVMLError_InsufficientResources):
            create(device, profile)
        assert len(server.devices(0)) == profile.most
        server.clear(0)


@pytest.mark.parametrize("name", [A100, A30, PRO])
def test_whatever_is_made_never_overlaps(start: Start, name: str) -> None:
    server, kind = start(name), card(name)
    device = cut(server)
    for first, second in itertools.product(kind.profiles, repeat=2):
        for at, then in itertools.product(first.starts, second.starts):
            create(device, first, at)
            apart = at + first.size <= then or then + second.size <= at
            try:
                create(device, second, then)
            except NVMLError_InsufficientResources:
                assert server.slices(0) == {(first.name, at)}
            else:
                assert apart
                assert server.slices(0) == {(first.name, at), (second.name, then)}
            server.clear(0)


def test_placed_by_hand_the_order_does_not_matter(start: Start) -> None:
    server = start(A100)
    device, profile = cut(server), card(A100).profile
    wanted = [("1g.5gb", 0), ("1g.5gb", 1), ("2g.10gb", 2), ("3g.20gb", 4)]
    for name, at in wanted:
        create(device, profile(name), at)
    assert server.slices(0) == {*wanted}


def test_a_3g_takes_half_of_the_memory_and_4g_and_3g_take_all(start: Start) -> None:
    server = start(A100)
    device, profile = cut(server), card(A100).profile
    create(device, profile("3g.20gb"), 4)
    remaining = nvml.nvmlDeviceGetGpuInstanceRemainingCapacity
    assert remaining(device, profile("1g.5gb").driver_id) == 4
    create(device, profile("4g.20gb"), 0)
    assert {remaining(device, kind.driver_id) for kind in card(A100).profiles} == {0}


@pytest.mark.parametrize(("start_at", "size"), [(1, 2), (7, 1), (0, 4), (6, 2)])
def test_a_placement_that_the_profile_does_not_have_is_no_argument(
    start: Start, start_at: int, size: int
) -> None:
    device = cut(start(A100))
    at = nvml.c_nvmlGpuInstancePlacement_t(start_at, size)
    with pytest.raises(NVMLError_InvalidArgument):
        nvml.nvmlDeviceCreateGpuInstanceWithPlacement(device, 14, ctypes.byref(at))


@pytest.mark.parametrize(
    ("name", "there", "wanted", "together"),
    [
        (A30, "1g.6gb+me", "2g.12gb+me", False),
        (A30, "1g.6gb+me", "2g.12gb", True),
        (PRO, "1g.24gb+me.all", "2g.48gb", False),
        (PRO, "1g.24gb", "2g.48gb+me.all", False),
        (PRO, "1g.24gb+me.all", "2g.48gb-me", True),
        (PRO, "1g.24gb-me", "2g.48gb+me.all", True),
        (PRO, "1g.24gb+me.all", "2g.48gb+me.all", False),
        (PRO, "1g.24gb+gfx", "2g.48gb-me", True),
    ],
)
def test_media_engines_are_not_given_out_twice(
    start: Start, name: str, there: str, wanted: str, together: bool
) -> None:
    server = start(name)
    device = cut(server)
    create(device, card(name).profile(there))
    if together:
        create(device, card(name).profile(wanted))
    else:
        with pytest.raises(NVMLError_InsufficientResources):
            create(device, card(name).profile(wanted))
    assert len(server.slices(0)) == 1 + together


def test_a_display_server_on_the_card_keeps_slices_away(start: Start) -> None:
    server = start(PRO)
    device = cut(server)
    server.add_process(0, 41, "Xorg", graphics=True)
    with pytest.raises(NVMLError_InUse):
        create(device, card(PRO).profile("1g.24gb"))
    server.remove_process(41)
    create(device, card(PRO).profile("1g.24gb"))


def test_instances_are_listed_by_profile(start: Start) -> None:
    server = start(A100)
    server.carve(0, ("1g.5gb", 0), ("1g.5gb", 3), ("3g.20gb", 4))
    found = {}
    for kind in card(A100).profiles:
        room, count = (nvml.c_nvmlGpuInstance_t * kind.most)(), ctypes.c_uint()
        nvml.nvmlDeviceGetGpuInstances(gpu(), kind.driver_id, room, ctypes.byref(count))
        found[kind.name] = [identity(room[k]) for k in range(count.value)]
    assert {name: those for name, those in found.items() if those} == {
        "1g.5gb": [(7, 0), (10, 3)],
        "3g.20gb": [(2, 4)],
    }
    info = nvml.nvmlGpuInstanceGetInfo(nvml.nvmlDeviceGetGpuInstanceById(gpu(), 2))
    assert nvml.nvmlDeviceGetUUID(info.device) == server.uuid(0)
    assert (info.profileId, info.placement.size) == (9, 4)
    with pytest.raises(NVMLError_NotFound):
        nvml.nvmlDeviceGetGpuInstanceById(gpu(), 1)


# --- compute instances and MIG devices ----------------------------------------------


def test_destroying_goes_from_the_inside_out(start: Start) -> None:
    server = start(A100)
    device = cut(server)
    instance = create(device, card(A100).profile("3g.20gb"), 4)
    compute = finish(instance)
    server.add_process(0, 51, slice=("3g.20gb", 4))
    with pytest.raises(NVMLError_InUse):
        nvml.nvmlComputeInstanceDestroy(compute)
    server.remove_process(51)
    with pytest.raises(NVMLError_InUse):
        nvml.nvmlGpuInstanceDestroy(instance)
    nvml.nvmlComputeInstanceDestroy(compute)
    assert server.slices(0) == {("3g.20gb", 4)}
    assert server.devices(0) == {}
    nvml.nvmlGpuInstanceDestroy(instance)
    assert server.slices(0) == set()
    for using, handle in (
        (nvml.nvmlComputeInstanceGetInfo, compute),
        (nvml.nvmlGpuInstanceGetInfo, instance),
        (nvml.nvmlGpuInstanceDestroy, instance),
    ):
        with pytest.raises(NVMLError_InvalidArgument):
            using(handle)


def compute_profiles(instance: Any) -> dict[int, tuple[str, int, int, int]]:
    """By id: name, slices, how many fit, multiprocessors."""
    found = {}
    for profile in range(nvml.NVML_COMPUTE_INSTANCE_PROFILE_COUNT):
        for version in (1, 2):
            try:
                info = nvml.nvmlGpuInstanceGetComputeInstanceProfileInfo(
                    instance, profile, 0, version
                )
            except NVMLError_NotSupported:
                continue
            name = info.name if version == 2 else ""
            sizes = info.sliceCount, info.instanceCount, info.multiprocessorCount
            found[info.id] = (name, *sizes)
    return found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("1g.5gb", {0: ("MIG 1g.5gb", 1, 1, 14)}),
        (
            "3g.20gb",
            {
                0: ("MIG 1c.3g.20gb", 1, 3, 14),
                1: ("MIG 2c.3g.20gb", 2, 1, 28),
                2: ("MIG 3g.20gb", 3, 1, 42),
            },
        ),
        (
            "4g.20gb",
            {
                0: ("MIG 1c.4g.20gb", 1, 4, 14),
                1: ("MIG 2c.4g.20gb", 2, 2, 28),
                3: ("MIG 4g.20gb", 4, 1, 56),
            },
        ),
    ],
)
def test_a_gpu_instance_offers_parts_of_itself(
    start: Start, name: str, expected: dict[int, tuple[str, int, int, int]]
) -> None:
    instance = create(cut(start(A100)), card(A100).profile(name))
    assert compute_profiles(instance) == expected


def test_a_gpu_instance_can_be_shared_by_compute_instances(start: Start) -> None:
    server = start(A100)
    instance = create(cut(server), card(A100).profile("3g.20gb"))
    two = nvml.nvmlGpuInstanceCreateComputeInstance(instance, 1)
    one = nvml.nvmlGpuInstanceCreateComputeInstance(instance, 0)
    with pytest.raises(NVMLError_InsufficientResources):
        nvml.nvmlGpuInstanceCreateComputeInstance(instance, 0)
    found = [nvml.nvmlComputeInstanceGetInfo(compute) for compute in (two, one)]
    assert [(i.id, i.profileId, i.placement.start, i.placement.size) for i in found] == [
        (0, 1, 0, 2),
        (1, 0, 2, 1),
    ]
    room, count = (nvml.c_nvmlComputeInstance_t * 3)(), ctypes.c_uint()
    nvml.nvmlGpuInstanceGetComputeInstances(instance, 0, room, ctypes.byref(count))
    assert [nvml.nvmlComputeInstanceGetInfo(room[k]).id for k in range(count.value)] == [1]
    same = nvml.nvmlGpuInstanceGetComputeInstanceById(instance, 1)
    assert nvml.nvmlComputeInstanceGetInfo(same).placement.start == 2
    devices = {nvml.nvmlDeviceGetName(device) for device in mig_devices(gpu()).values()}
    product = card(A100).product
    assert devices == {f"{product} MIG 2c.3g.20gb", f"{product} MIG 1c.3g.20gb"}
    assert server.devices(0) == {}  # none of them has all of it


def test_compute_instances_count_from_zero_in_every_gpu_instance(start: Start) -> None:
    server = start(A100)
    server.carve(0, ("1g.5gb", 0), ("1g.5gb", 1), ("3g.20gb", 4))
    found = [
        (nvml.nvmlDeviceGetGpuInstanceId(device), nvml.nvmlDeviceGetComputeInstanceId(device))
        for device in mig_devices(gpu()).values()
    ]
    assert found == [(7, 0), (8, 0), (2, 0)]


def test_a_mig_device_describes_itself(start: Start) -> None:
    server = start(A100)
    assert mig_devices(gpu()) == {}
    server.carve(0, ("3g.20gb", 4))
    (device,) = mig_devices(gpu()).values()
    assert nvml.nvmlDeviceIsMigDeviceHandle(device).value == 1
    assert nvml.nvmlDeviceIsMigDeviceHandle(gpu()).value == 0
    assert nvml.nvmlDeviceGetName(device) == "NVIDIA A100-SXM4-40GB MIG 3g.20gb"
    assert nvml.nvmlDeviceGetMemoryInfo(device).total == 19968 * 1024**2
    attributes = nvml.nvmlDeviceGetAttributes(device)
    assert (attributes.multiprocessorCount, attributes.memorySizeMB) == (42, 19968)
    assert (attributes.gpuInstanceSliceCount, attributes.computeInstanceSliceCount) == (3, 3)
    parent = nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(device)
    assert nvml.nvmlDeviceGetUUID(parent) == server.uuid(0)
    for asking in (nvml.nvmlDeviceGetPowerUsage, nvml.nvmlDeviceGetTotalEnergyConsumption):
        with pytest.raises(NVMLError_InvalidArgument):  # these are the whole card's
            asking(device)


def test_a_destroyed_mig_device_leaves_a_hole(start: Start) -> None:
    server = start(A100)
    device, kind = cut(server), card(A100).profile("2g.10gb")
    computes = [finish(create(device, kind, at)) for at in kind.starts]
    assert nvml.nvmlDeviceGetMaxMigDeviceCount(device) == 7
    assert [*mig_devices(device)] == [0, 1, 2]
    nvml.nvmlComputeInstanceDestroy(computes[0])
    assert [*mig_devices(device)] == [1, 2]
    with pytest.raises(NVMLError_NotFound):
        nvml.nvmlDeviceGetMigDeviceHandleByIndex(device, 0)
    with pytest.raises(NVMLError_InvalidArgument):
        nvml.nvmlDeviceGetMigDeviceHandleByIndex(device, 7)


@pytest.mark.parametrize("stable", [False, True])
def test_a_slice_made_again_may_have_another_uuid(start: Start, stable: bool) -> None:
    server = start(A100, A100, stable_uuids=stable)
    wanted = ("3g.20gb", 4)
    server.carve(0, wanted, ("1g.5gb", 0))
    server.carve(1, wanted)
    first = server.devices(0)
    unique = first[wanted]
    assert re.fullmatch(
        r"MIG-[\da-f]{8}-[\da-f]{4}-5[\da-f]{3}-[89ab][\da-f]{3}-[\da-f]{12}", unique
    )
    assert len({*first.values(), *server.devices(1).values()}) == 3
    device = nvml.nvmlDeviceGetHandleByUUID(unique)
    legacy = nvml.nvmlDeviceGetHandleByUUID(f"MIG-{server.uuid(0)}/2/0")
    assert nvml.nvmlDeviceGetUUID(device) == nvml.nvmlDeviceGetUUID(legacy) == unique
    server.clear(0)
    with pytest.raises(NVMLError_NotFound):
        nvml.nvmlDeviceGetHandleByUUID(unique)
    server.carve(0, wanted)
    assert (server.devices(0)[wanted] == unique) is stable
    with pytest.raises(NVMLError_InvalidArgument):  # the handle was of the one that is gone
        nvml.nvmlDeviceGetUUID(device)


# --- what goes wrong ----------------------------------------------------------------


def test_who_is_not_root_may_look_but_not_touch(start: Start) -> None:
    server = start(A100)
    server.carve(0, ("3g.20gb", 4))
    instance = nvml.nvmlDeviceGetGpuInstanceById(gpu(), 2)
    server.unprivileged()
    room, count = (nvml.c_nvmlGpuInstance_t * 7)(), ctypes.c_uint()
    for touching in (
        lambda: nvml.nvmlDeviceSetMigMode(gpu(), 0),
        lambda: nvml.nvmlDeviceCreateGpuInstance(gpu(), 19),
        lambda: create(gpu(), card(A100).profile("1g.5gb"), 0),
        lambda: nvml.nvmlGpuInstanceDestroy(instance),
        lambda: nvml.nvmlGpuInstanceCreateComputeInstance(instance, 0),
        lambda: nvml.nvmlDeviceGetGpuInstances(gpu(), 9, room, ctypes.byref(count)),
        lambda: nvml.nvmlDeviceGetGpuInstanceRemainingCapacity(gpu(), 9),
        lambda: placements(gpu(), 9),
        lambda: nvml.nvmlDeviceGetComputeRunningProcesses(gpu()),
        lambda: nvml.nvmlDeviceGetMemoryInfo(gpu()),
    ):
        with pytest.raises(NVMLError_NoPermission):
            touching()
    assert nvml.nvmlDeviceGetMigMode(gpu()) == [1, 1]
    assert profiles(gpu(), 2)
    (device,) = mig_devices(gpu()).values()
    assert nvml.nvmlDeviceGetUUID(device) == server.devices(0)["3g.20gb", 4]
    server.unprivileged(False)
    nvml.nvmlDeviceCreateGpuInstance(gpu(), 19)


def test_a_call_fails_when_it_is_told_to(start: Start) -> None:
    server = start(A100)
    device, kind = cut(server), card(A100).profile("1g.5gb")
    server.fail("nvmlDeviceCreateGpuInstance", nvml.NVML_ERROR_UNKNOWN, after=1, times=2)
    outcomes = []
    for _ in range(5):
        try:
            create(device, kind)
            outcomes.append(0)
        except nvml.NVMLError as error:
            outcomes.append(error.value)
    assert outcomes == [0, 999, 999, 0, 0]
    assert len(server.slices(0)) == 3
    server.fail("nvmlDeviceGetMigMode", nvml.NVML_ERROR_TIMEOUT, times=FOREVER)
    for _ in range(3):
        with pytest.raises(nvml.NVMLError_Timeout):
            nvml.nvmlDeviceGetMigMode(device)
    server.mend()
    assert nvml.nvmlDeviceGetMigMode(device) == [1, 1]
    with pytest.raises(ValueError, match="no such function"):
        server.fail("nvmlDeviceCreateGpuInstances", 1)


def test_a_call_lies_when_it_is_told_to(start: Start) -> None:
    server = start(A100)
    server.lie("nvmlDeviceSetMigMode")
    assert nvml.nvmlDeviceSetMigMode(gpu(), 1) == nvml.NVML_SUCCESS
    assert server.mig(0) == (0, 0)
    device, kind = cut(server), card(A100).profile("3g.20gb")
    server.lie("nvmlDeviceCreateGpuInstanceWithPlacement")
    instance = create(device, kind, 4)
    assert server.slices(0) == set()
    with pytest.raises(NVMLError_InvalidArgument):
        nvml.nvmlGpuInstanceGetInfo(instance)
    instance = create(device, kind, 4)
    server.lie("nvmlGpuInstanceDestroy")
    nvml.nvmlGpuInstanceDestroy(instance)
    assert server.slices(0) == {("3g.20gb", 4)}


def test_what_does_not_exist_cannot_be_arranged(start: Start) -> None:
    server = start(A100)
    for arranging in (
        lambda: server.carve(0, ("9g.90gb", 0)),
        lambda: server.carve(0, ("3g.20gb", 2)),
        lambda: server.carve(1, ("3g.20gb", 0)),
        lambda: server.add_process(0, 61, slice=("3g.20gb", 0)),
        lambda: server.remove_process(61),
        lambda: server.set(0, colour=1),
        lambda: server.connect(0, 1, links=2),
    ):
        with pytest.raises(ValueError, match="no such thing"):
            arranging()
    with pytest.raises(KeyError):
        card("A200")


# --- an older driver ----------------------------------------------------------------


def test_an_old_driver_lacks_functions(start: Start, old_library: Path) -> None:
    server = start(A30, driver=old_library)
    device = cut(server)
    for newer in (
        lambda: nvml.nvmlDeviceGetGpuInstanceProfileInfo(device, 0),
        lambda: nvml.nvmlDeviceGetNumaNodeId(device),
        lambda: nvml.nvmlDeviceGetComputeRunningProcesses_v3(device),
        nvml.nvmlSystemGetCudaDriverVersion_v2,
    ):
        with pytest.raises(NVMLError_FunctionNotFound):
            newer()
    with pytest.raises(nvml.NVMLLibraryMismatchError) as error:  # the same without _v3
        nvml.nvmlDeviceGetComputeRunningProcesses(device)
    assert not isinstance(error.value, nvml.NVMLError)
    assert nvml.nvmlSystemGetDriverVersion() == "470.82.01"
    assert nvml.nvmlSystemGetCudaDriverVersion() == 11040
    assert nvml.nvmlDeviceGetComputeRunningProcesses_v2(device) == []
    assert nvml.nvmlDeviceGetGpuInstanceProfileInfo(device, 0, version=1).id == 14


def test_an_old_driver_knows_the_geometry_only_in_mig_mode(start: Start, old_library: Path) -> None:
    server = start(A30, driver=old_library)
    assert profiles(gpu(), 1) == {}
    with pytest.raises(NVMLError_NotSupported):
        placements(gpu(), 14)
    cut(server)
    assert {info.id for info in profiles(gpu(), 1).values()} == {14, 21, 5, 0}  # no 2g.12gb+me yet
    assert placements(gpu(), 5) == [(0, 2), (2, 2)]
    finish_by_number = nvml.nvmlGpuInstanceCreateComputeInstance
    finish_by_number(create(gpu(), card(A30).profile("2g.12gb"), 2), 1)
    assert [*server.devices(0)] == [("2g.12gb", 2)]
