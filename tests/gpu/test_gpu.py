"""A real NVIDIA GPU, held against nvidia-smi. Nothing here changes a mode, a layout or a clock."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import llm_manager as lm

pytestmark = pytest.mark.gpu


def smi(*fields: str) -> list[list[str]]:
    """What nvidia-smi answers for each GPU."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    return [[cell.strip() for cell in line.split(",")] for line in answer.stdout.splitlines()]


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> lm.Json:
    """The program's own answer, in its own process: this one may have a stand-in loaded."""
    home = tmp_path_factory.mktemp("home")
    answer = subprocess.run(
        [sys.executable, str(lm.PROGRAM), "gpu", "list", "--json"],
        capture_output=True, text=True, check=True,
        env={**os.environ, "LLM_MANAGER_HOME": str(home)},
    )  # fmt: skip
    return dict(json.loads(answer.stdout))


def column(facts: lm.Json, name: str) -> list[Any]:
    return [gpu[name] for gpu in facts["gpus"]]


def test_every_gpu_is_what_nvidia_smi_says(facts: lm.Json) -> None:
    fields = ("uuid", "name", "memory.total", "pci.bus_id", "compute_cap", "index")
    seen = list(zip(*smi(*fields), strict=True))
    assert column(facts, "uuid") == [*seen[0]]
    assert column(facts, "name") == [*seen[1]]
    # nvidia-smi leaves out what the driver keeps for itself; NVML's first structure does not.
    for ours, theirs in zip(column(facts, "memory_mib"), seen[2], strict=True):
        assert abs(ours - int(theirs)) <= 0.02 * int(theirs)
    assert [lm.short_bus_id(bus) for bus in column(facts, "pci_bus_id")] == [
        lm.short_bus_id(bus) for bus in seen[3]
    ]
    assert column(facts, "compute_capability") == [*seen[4]]
    assert [str(index) for index in column(facts, "index")] == [*seen[5]]


def test_the_driver_is_the_one_that_is_loaded(facts: lm.Json) -> None:
    ((version, *_), *_) = smi("driver_version")
    assert facts["driver_version"] == version
    assert facts["fault"] is None
    if facts["kernel_version"] is not None:
        assert facts["kernel_version"] == version


def test_power_and_its_limits_are_watts(facts: lm.Json) -> None:
    rows = smi("power.draw", "enforced.power.limit", "power.min_limit", "power.max_limit")
    for gpu, (draw, limit, least, most) in zip(facts["gpus"], rows, strict=True):
        if not limit.startswith("["):
            assert gpu["power_limit_w"] == pytest.approx(float(limit), abs=0.5)
            assert gpu["power_range_w"] == pytest.approx([float(least), float(most)], abs=0.5)
        if not draw.startswith("["):  # two readings of a moving value
            assert 0 < gpu["power_w"] < 1.5 * float(most)


def test_mig_modes_are_those_of_nvidia_smi(facts: lm.Json) -> None:
    modes = {"Enabled": True, "Disabled": False, "[N/A]": None}
    rows = smi("mig.mode.current", "mig.mode.pending")
    assert column(facts, "mig_enabled") == [modes[current] for current, _ in rows]
    assert column(facts, "mig_pending") == [modes[pending] for _, pending in rows]


def geometries() -> dict[str, lm.MigGeometry]:
    return lm.parse_geometries((lm.PROGRAM.parent / "recipes" / "mig.yaml").read_text())


def in_its_own_process(program: str) -> Any:
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True,
        cwd=Path(lm.PROGRAM).parent,
    )  # fmt: skip
    return json.loads(answer.stdout)


READ = """
import json, llm_manager as lm
driver = lm.NvmlGpus({}, lm.GpuSystem())
"""


def test_the_driver_tells_the_geometry_that_the_tables_have() -> None:
    told = in_its_own_process(
        READ + "print(json.dumps([[g.pci_device, g.geometry and [[p.name, p.driver_id, p.most, "
        "p.size, list(p.starts)] for p in g.geometry.profiles]] for g in driver.read().gpus]))"
    )
    compared = 0
    for device, profiles in told:
        table = geometries().get(device)
        if profiles and table:
            mine = {(p.name, p.driver_id, p.most, p.size, p.starts) for p in table.profiles}
            theirs = {(n, i, m, s, tuple(starts)) for n, i, m, s, starts in profiles}
            assert mine <= theirs
            compared += 1
    if not compared:
        pytest.skip("no GPU here tells how it can be cut, or none that the tables know")


def test_the_energy_counter_only_grows_and_at_the_rate_of_the_power() -> None:
    def energies() -> list[float | None]:
        return list(in_its_own_process(
            READ + "print(json.dumps([g.energy_j for g in driver.read().gpus]))"
        ))  # fmt: skip

    before, started = energies(), time.monotonic()
    time.sleep(3)  # the counter moves in steps of a tenth of a second
    after, seconds = energies(), time.monotonic() - started
    if None in before:
        pytest.skip("a GPU here has no energy counter")
    for one, other, (most,) in zip(before, after, smi("power.max_limit"), strict=True):
        assert one is not None
        assert other is not None
        assert 0 < other - one < 1.5 * float(most) * seconds


SAMPLED = (
    READ
    + """
import importlib.util, time
from dataclasses import replace
from itertools import pairwise
zeus = None
if importlib.util.find_spec("zeus"):
    from zeus.monitor import ZeusMonitor
    zeus = ZeusMonitor(approx_instant_energy=False)
looks = [driver.look({})]
if zeus:
    zeus.begin_window("all", sync_execution=False)
for _ in range(60):
    time.sleep(0.25)
    looks.append(driver.look({}))
theirs = zeus.end_window("all", sync_execution=False).gpu_energy if zeus else {}
found = []
for number, gpu in enumerate(looks[0]):
    seen = [look[gpu].reading for look in looks]
    found.append({
        "counter": [seen[0].counter_mj, seen[-1].counter_mj],
        "ours": [lm.measure(a, b, 0.25).energy_mj for a, b in pairwise(seen)],
        "by_power": [
            lm.measure(replace(a, counter_mj=None), replace(b, counter_mj=None), 0.25).energy_mj
            for a, b in pairwise(seen)
        ],
        "zeus_j": theirs.get(number),
    })
print(json.dumps(found))
"""
)


@pytest.fixture(scope="module")
def sampled() -> list[dict[str, Any]]:
    """Fifteen seconds of every GPU: by its counter, by its power, and by Zeus where that is."""
    return list(in_its_own_process(SAMPLED))


def test_the_samplers_joules_are_those_of_the_hardwares_counter(
    sampled: list[dict[str, Any]],
) -> None:
    for gpu in sampled:
        first, last = gpu["counter"]
        if first is None:
            pytest.skip("a GPU here has no energy counter")
        assert sum(gpu["ours"]) == last - first > 0
        # Its readings are averages of a second, or part-time ones: facts of the hardware.
        assert sum(gpu["by_power"]) == pytest.approx(last - first, rel=0.15)


def test_the_samplers_joules_are_those_of_zeus(sampled: list[dict[str, Any]]) -> None:
    for gpu in sampled:
        if gpu["zeus_j"] is None:
            pytest.skip("the package zeus is not installed: `pip install zeus`")
        assert sum(gpu["ours"]) / 1000 == pytest.approx(gpu["zeus_j"], rel=0.03)


def test_the_topology_is_the_matrix_of_nvidia_smi(facts: lm.Json) -> None:
    if len(facts["gpus"]) == 1:
        pytest.skip("one GPU has no links")
    answer = subprocess.run(
        ["nvidia-smi", "topo", "-m"], capture_output=True, text=True, check=True
    )
    rows = [line.split() for line in answer.stdout.splitlines() if line.startswith("GPU")]
    index = {gpu["uuid"]: gpu["index"] for gpu in facts["gpus"]}
    for link in facts["links"]:
        one, other = sorted(index[uuid] for uuid in link["gpus"])
        wanted = f"NV{link['lanes']}" if link["lanes"] else link["kind"]
        assert rows[one][1 + other] == wanted
