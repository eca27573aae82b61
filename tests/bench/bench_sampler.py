#!/usr/bin/env python3
"""What the energy sampler costs at one look a second, for 8 and for 64 GPUs; run by hand.

    python tests/bench/bench_sampler.py [--seconds 20] [--gpus 8 64]

The GPUs are simulated in C behind the real pynvml, whose calls cost a file lock each; a driver's
cost a system call. Each loop is a process of its own, at the real pace: one that only sleeps, one
that reads two bare figures of each GPU, and the sampler with a tenant on each GPU, then with two,
whose processes it asks for as well. What the database takes is bench_energy.py's.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT.parent), str(ROOT)]

import nvml_standin
import pynvml

import llm_manager as lm

LOOPS = ("idle", "bare", "alone", "shared")
TITLES = {
    "idle": "a loop that sleeps", "bare": "two bare figures of each GPU",
    "alone": "the sampler, a tenant on each GPU", "shared": "the sampler, two on each GPU",
}  # fmt: skip
TARGET_PERCENT = 2.0  # of a core, for eight GPUs


def say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - this is what it is for


class Nowhere:
    """Records that keep only how much they were given."""

    trouble: lm.ManagerError | None = None

    def __init__(self) -> None:
        self.joules = 0.0

    def add(self, shares: Sequence[lm.EnergyShare], rates: lm.EnergyRates) -> None:  # noqa: ARG002
        self.joules += sum(share.energy_mj or 0 for share in shares) / 1000

    def open_session(self, *_: object) -> None: ...
    def close_session(self, *_: object) -> None: ...
    def count_tokens(self, *_: object) -> None: ...
    def close(self) -> None: ...


def a_snapshot(uuids: Sequence[str], tenants: int) -> lm.Snapshot:
    """So many engines on each GPU, each with a process of its own."""
    now = datetime.now(UTC)
    engines, gpus = [], []
    for index, uuid in enumerate(uuids):
        clients = []
        for number in range(tenants):
            name = f"m{index}x{number}"
            clients.append(lm.GpuClient(pid=pid_of(index, number), name="x", container_id=name))
            engines.append(
                lm.ObservedContainer(
                    name=lm.ContainerName(f"llm-model-{name}-0"), role="engine", running=True,
                    spec_hash=lm.SpecHash("x"), ready=True, model_name=name, container_id=name,
                    devices=(uuid,), started_at=now,
                )
            )  # fmt: skip
        gpus.append(lm.Gpu(uuid=lm.GpuUuid(uuid), index=index, clients=tuple(clients)))
    return lm.Snapshot(
        taken_at=now, state=None, plan=None, hardware=lm.Hardware(gpus=tuple(gpus)),
        observed=lm.Observed(containers={engine.name: engine for engine in engines}),
    )  # fmt: skip


def pid_of(gpu: int, number: int) -> int:
    return 10_000 + 10 * gpu + number


def look_of(loop: str, uuids: Sequence[str], home: Path) -> Callable[[], None]:
    """What a loop does once a second."""
    if loop == "idle":
        return lambda: None
    if loop == "bare":
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(n) for n in range(len(uuids))]

        def read() -> None:
            for handle in handles:
                pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
                pynvml.nvmlDeviceGetPowerUsage(handle)

        return read
    snapshot = a_snapshot(uuids, tenants=1 if loop == "alone" else 2)
    records = Nowhere()
    driver = lm.NvmlGpus({}, lm.GpuSystem(), turn=home / "turn")
    meter = lm.EnergyMeter(driver, records, lm.StateStore(home))
    sessions = lm.EngineSessions(records)

    def sample() -> None:
        now = time.time()
        meter.sample(snapshot, lm.EnergySettings(), now)
        sessions.follow(snapshot, {}, now)

    return sample


def measure(loop: str, count: int, seconds: int) -> lm.Json:
    """CPU seconds of this process while it looks at this pace, and what more it keeps in memory."""
    with tempfile.TemporaryDirectory() as folder:
        library = nvml_standin.library(Path(folder))
        server = nvml_standin.Server(library, Path(folder) / "server", ["H100 80 GB"] * count)
        server.activate()
        uuids = [server.uuid(n) for n in range(count)]
        for gpu in range(min(count, 32)):  # as many processes as the simulation has room for
            for number in range(2):
                server.add_process(gpu, pid_of(gpu, number))
                server.work(pid_of(gpu, number), 10 + 20 * number)
        look = look_of(loop, uuids, Path(folder))
        look()
        look()
        before = time.process_time()
        for _ in range(seconds):
            time.sleep(1)
            look()
        taken = time.process_time() - before
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        tracemalloc.start()
        for _ in range(20):
            look()
        kept = tracemalloc.get_traced_memory()[0]
        for _ in range(500):
            look()
        grown = tracemalloc.get_traced_memory()[0] - kept
        server.deactivate()
    return {"percent": 100 * taken / seconds, "resident_mib": resident, "grown_kib": grown / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--loop", choices=LOOPS, help="one loop, in this process, as JSON")
    arguments = parser.parse_args()
    if arguments.loop:
        say(json.dumps(measure(arguments.loop, arguments.gpus[0], arguments.seconds)))
        return
    for count in arguments.gpus:
        say(f"{count} GPUs, one look a second, for {arguments.seconds} s each:")
        base: dict[str, lm.Json] = {}
        for loop in LOOPS:
            command = [sys.executable, __file__, "--loop", loop, "--gpus", str(count)]
            command += ["--seconds", str(arguments.seconds)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = base[loop] = json.loads(done.stdout)
            ratio = found["percent"] / max(base.get("bare", found)["percent"], 0.001)
            more = found["resident_mib"] - base["idle"]["resident_mib"]
            verdict = "  TOO MUCH" if count <= 8 and found["percent"] > TARGET_PERCENT else ""
            against = "" if loop in {"idle", "bare"} else f" = {ratio:.1f} x bare"
            say(
                f"  {TITLES[loop]:36} {found['percent']:6.2f} % of a core{against:14}"
                f" {more:+6.1f} MiB beside the idle loop, {found['grown_kib']:+7.1f} KiB"
                f" in 500 more looks{verdict}"
            )


if __name__ == "__main__":
    main()
