"""Simulated NVIDIA GPUs: the `GpuDriver` protocol over state that outlives every reader.

What decides how a change of MIG ends is simulated as NVIDIA documents it: where slices may be, who
is in the way, what each architecture keeps over a reboot. Refusals are NVML's error numbers, put
into words by the product itself. The check of a layout shares nothing with the planner's.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Protocol

import pynvml

import llm_manager as lm

TABLES = Path(lm.PROGRAM).with_name("recipes") / "mig.yaml"
DRIVER = "580.95.05"
# The beginning of a card's name -> its architecture.
ARCHITECTURES = {
    "A100": "Ampere", "A30": "Ampere", "H100": "Hopper", "H200": "Hopper", "GH200": "Hopper",
    "B200": "Blackwell", "GB200": "Blackwell", "RTX PRO": "Blackwell",
}  # fmt: skip


@dataclass(frozen=True)
class Card:
    """A kind of GPU; without a geometry it cannot be cut."""

    name: str
    architecture: str
    memory_mib: int
    geometry: lm.MigGeometry | None = None
    pci_device: str | None = None

    @property
    def keeps_mode(self) -> bool:
        """Whether MIG mode is written into the card: Ampere keeps it, and needs a reset for it."""
        return self.architecture == "Ampere"


@cache
def tables() -> Mapping[str, lm.MigGeometry]:
    return lm.parse_geometries(TABLES.read_text())


def a_card(name: str) -> Card:
    """A card of `recipes/mig.yaml`, by what that calls it."""
    device, geometry = next(found for found in tables().items() if found[1].card == name)
    largest = max(geometry.profiles, key=lambda profile: profile.usable_mib)
    return Card(
        name=f"NVIDIA {name}",
        architecture=next(arch for start, arch in ARCHITECTURES.items() if name.startswith(start)),
        memory_mib=largest.usable_mib,
        geometry=geometry,
        pci_device=device,
    )


class Interference(Protocol):
    """What may happen to an effect; `around` yields whether the effect really takes place."""

    def alive(self) -> None: ...
    def around(self) -> contextlib.AbstractContextManager[bool]: ...


class NoInterference:
    def alive(self) -> None:
        """Nobody dies here."""

    def around(self) -> contextlib.AbstractContextManager[bool]:
        return contextlib.nullcontext(enter_result=True)


@dataclass
class SimulatedGpu:
    """One card in its place, with what the driver and the card remember."""

    card: Card
    index: int
    uuid: lm.GpuUuid
    mig: bool = False
    pending: bool = False
    lost: bool = False  # fallen off the bus
    used_mib: int | None = None
    slices: dict[lm.Slice, str | None] = field(default_factory=dict)  # UUID, once it is complete
    clients: list[tuple[str, lm.GpuClient]] = field(default_factory=list)  # with their device

    @property
    def devices(self) -> set[str]:
        """What a container could be given."""
        return {self.uuid, *filter(None, self.slices.values())}

    def seen_clients(self) -> tuple[lm.GpuClient, ...]:
        places = {device: place for place, device in self.slices.items()}
        return tuple(replace(c, slice=places.get(device)) for device, c in self.clients)

    def computing(self, place: lm.Slice | None = None) -> bool:
        """Whether somebody computes on a slice, or anywhere on the GPU."""
        return any(c.computes and place in {None, c.slice} for c in self.seen_clients())

    def view(self, *, is_root: bool) -> lm.Gpu:
        """This GPU as the driver shows it."""
        cuttable = self.card.geometry is not None
        return lm.Gpu(
            uuid=self.uuid,
            index=self.index,
            name=self.card.name,
            memory_mib=self.card.memory_mib,
            memory_used_mib=self.used_mib,
            architecture=self.card.architecture,
            pci_bus_id=f"00000000:{self.index + 1:02X}:00.0",
            pci_device=self.card.pci_device,
            mig_enabled=self.mig if cuttable else None,
            mig_pending=self.pending if cuttable else None,
            geometry=self.card.geometry,
            slices=self._seen_slices() if is_root or not self.mig else None,
            clients=self.seen_clients(),
        )

    def _seen_slices(self) -> tuple[lm.MigDevice, ...]:
        return tuple(
            lm.MigDevice(
                profile=name, start=start, uuid=device, memory_mib=self.profile(name).memory_mib
            )
            for (name, start), device in sorted(self.slices.items(), key=lambda s: s[0][1])
        )

    def refuse_unless(self, *, mig: bool) -> None:
        if self.card.geometry is None or self.mig != mig:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    def profile(self, name: str) -> lm.MigProfile:
        if self.card.geometry is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return self.card.geometry.profile(name)

    def fits(self, wanted: lm.Slice) -> bool:
        """As the driver decides it: a place of its own, compute and media engines that are left."""
        geometry, joining = self.card.geometry, self.profile(wanted[0])
        units = {*range(wanted[1], wanted[1] + joining.size)}
        compute, same, media = int(wanted[0][0]), 1, [wanted[0].partition("gb")[2]]
        for name, start in self.slices:
            units -= {*range(start, start + self.profile(name).size)}
            compute += int(name[0])
            same += name == wanted[0]
            media.append(name.partition("gb")[2])
        takes_all = "+me.all" in media and sum(variant != "-me" for variant in media) > 1
        return (
            geometry is not None
            and wanted[1] in joining.starts
            and len(units) == joining.size
            and compute <= geometry.compute_slices
            and same <= joining.most
            and media.count("+me") <= 1
            and not takes_all
        )


class SimulatedGpus:
    """The GPUs of one server; `around` of `trouble` surrounds every effect on them."""

    def __init__(self, cards: Sequence[Card] = ()) -> None:
        self.gpus = [SimulatedGpu(card, n, readable_uuid(n)) for n, card in enumerate(cards)]
        self.links: dict[frozenset[lm.GpuUuid], lm.Link] = {}
        self.stable_uuids = False  # whether a slice that is made again gets the UUID it had
        self.is_root = True
        self.fault: lm.ManagerError | None = None
        self.kernel_version = self.library_version = DRIVER if cards else None
        self.mig_manager = False
        self.uses_cdi = False
        self.listed: set[str] = {gpu.uuid for gpu in self.gpus}  # in the CDI specification
        self.trouble: Interference = NoInterference()
        self.looks: dict[lm.GpuUuid, lm.GpuLook] = {}  # what they tell a sampler
        self._numbers = 0
        self._lock = threading.RLock()

    def copy(self) -> SimulatedGpus:
        """The same GPUs once more, without the trouble."""
        twin = copy.copy(self)
        twin.gpus = [replace(g, slices={**g.slices}, clients=[*g.clients]) for g in self.gpus]
        twin.links, twin.listed = {**self.links}, {*self.listed}
        twin.trouble, twin._lock = NoInterference(), threading.RLock()
        return twin

    # --- what the manager asks and does -------------------------------------------------------

    def read(self, *, fresh: bool = False) -> lm.Hardware:  # noqa: ARG002 - it is always fresh
        self.trouble.alive()
        with self._lock:
            hardware = lm.Hardware(
                kernel_version=self.kernel_version,
                library_version=self.library_version,
                uses_cdi=self.uses_cdi,
                cdi_missing=frozenset(self._slice_uuids() - self.listed if self.uses_cdi else ()),
                mig_manager=self.mig_manager,
            )
            if self.fault is not None:
                return replace(hardware, fault=self.fault)
            return replace(
                hardware,
                gpus=tuple(g.view(is_root=self.is_root) for g in self.gpus if not g.lost),
                lost=tuple(
                    f"GPU {g.index} does not answer: GPU is lost." for g in self.gpus if g.lost
                ),
                links={pair: self._link(pair, link) for pair, link in self.links.items()},
                driver_version=self.kernel_version,
                cuda_version="13.0" if self.gpus else None,
            )

    def _link(self, pair: frozenset[lm.GpuUuid], link: lm.Link) -> lm.Link:
        """MIG takes peer access away, and leaves the bus."""
        cut = any(gpu.mig for gpu in self.gpus if gpu.uuid in pair)
        return lm.Link("NODE") if cut and link.lanes else link

    def set_mig_mode(self, gpu: lm.GpuUuid, *, enabled: bool) -> None:
        with self._effect(gpu, f"turn MIG {'on' if enabled else 'off'}") as changed:
            if changed is None:
                return
            changed.refuse_unless(mig=changed.mig)
            in_the_way = changed.computing() or (changed.card.keeps_mode and changed.clients)
            if changed.mig != enabled and (in_the_way or changed.slices):
                if changed.card.keeps_mode and not changed.slices:
                    changed.pending = enabled  # until somebody resets the card, or reboots
                raise pynvml.NVMLError(pynvml.NVML_ERROR_IN_USE)
            changed.mig = changed.pending = enabled

    def create_slice(self, gpu: lm.GpuUuid, wanted: lm.Slice) -> None:
        """Two effects, the GPU instance and its compute instance: one can be killed between.

        An instance that is there without is filled.
        """
        action = f"create {wanted[0]} at {wanted[1]}"
        known = self._gpu(gpu).slices
        was_there = wanted in known and known[wanted] is None
        with self._effect(gpu, action) as changed:
            if changed is not None and not was_there:
                changed.refuse_unless(mig=True)
                if not changed.fits(wanted):
                    raise pynvml.NVMLError(pynvml.NVML_ERROR_INSUFFICIENT_RESOURCES)
                changed.slices[wanted] = None
        try:
            with self._effect(gpu, action) as changed:
                if changed is not None:
                    if wanted not in changed.slices:
                        raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
                    changed.slices[wanted] = self._new_uuid(changed, wanted)
        except lm.ManagerError:
            if not was_there:
                self._gpu(gpu).slices.pop(wanted, None)
            raise

    def _new_uuid(self, gpu: SimulatedGpu, wanted: lm.Slice) -> str:
        age = 0 if self.stable_uuids else self._number()
        return f"MIG-{uuid.uuid5(uuid.NAMESPACE_OID, f'{gpu.uuid} {wanted} {age}')}"

    def destroy_slice(self, gpu: lm.GpuUuid, wanted: lm.Slice) -> None:
        """Two effects again: first its compute instance, which nobody may use, then the rest."""
        action = f"remove {wanted[0]} at {wanted[1]}"
        with self._effect(gpu, action) as changed:
            if changed is not None:
                changed.refuse_unless(mig=True)
                if wanted not in changed.slices:
                    return
                if changed.computing(wanted):
                    raise pynvml.NVMLError(pynvml.NVML_ERROR_IN_USE)
                changed.slices[wanted] = None
        with self._effect(gpu, action) as changed:
            if changed is not None:
                if changed.slices.get(wanted) is not None:
                    raise pynvml.NVMLError(pynvml.NVML_ERROR_IN_USE)
                changed.slices.pop(wanted, None)

    def look(
        self,
        shared: Mapping[lm.GpuUuid, Collection[str]],  # noqa: ARG002 - all is told
    ) -> Mapping[lm.GpuUuid, lm.GpuLook]:
        lost = {gpu.uuid for gpu in self.gpus if gpu.lost}
        return {uuid: look for uuid, look in self.looks.items() if uuid not in lost}

    def give_way(self) -> bool:
        return False

    def refresh_cdi(self) -> None:
        if self.uses_cdi:
            with self.trouble.around() as real:
                if real:
                    self.listed = self._devices()

    @contextlib.contextmanager
    def _effect(self, gpu: lm.GpuUuid, action: str) -> Iterator[SimulatedGpu | None]:
        """The card to change, or None where the driver will only say that it was done."""

        def clients() -> Sequence[lm.GpuClient]:
            return self._gpu(gpu).seen_clients()

        with self.trouble.around() as real, self._lock, lm.nvml_errors(action, clients):
            yield self._answering(gpu) if real else None

    def _answering(self, gpu: lm.GpuUuid) -> SimulatedGpu:
        """That card, if this user may change it and it answers."""
        if self.fault is not None:
            raise self.fault
        if not self.is_root:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NO_PERMISSION)
        found = self._gpu(gpu)
        if found.lost:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return found

    def _gpu(self, gpu: lm.GpuUuid) -> SimulatedGpu:
        for found in self.gpus:
            if found.uuid == gpu:
                return found
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)

    # --- what Docker and the container toolkit ask --------------------------------------------

    def why_not(self, device: str) -> str:
        """What the toolkit says against handing out a device; nothing where it can."""
        if self.fault is not None or self.kernel_version != self.library_version:
            return "nvidia-container-cli: nvml error: driver/library version mismatch"
        if self.uses_cdi and device not in self.listed:
            return f"CDI device injection failed: unresolvable CDI devices nvidia.com/gpu={device}"
        if device not in self._devices():
            return f"nvidia-container-cli: device error: {device}: unknown device"
        return ""

    def computes(self, device: str) -> bool:
        """Whether CUDA finds something on it: of a GPU that is cut, only the slices."""
        return device in self._devices() - {gpu.uuid for gpu in self.gpus if gpu.mig}

    def _devices(self) -> set[str]:
        return {device for gpu in self.gpus if not gpu.lost for device in gpu.devices}

    def _slice_uuids(self) -> set[str]:
        return self._devices() - {gpu.uuid for gpu in self.gpus}

    def memory_mib(self, device: str) -> int:
        """What a program on it can have; a slice of unknown size has none."""
        for gpu in self.gpus:
            for (profile, _), known in gpu.slices.items():
                if known == device:
                    return gpu.profile(profile).memory_mib or 0
            if gpu.uuid == device:
                return gpu.card.memory_mib
        return 0

    def exists(self, device: str) -> bool:
        return device in self._devices()

    # --- what happens to the server -----------------------------------------------------------

    def open(
        self, device: str, name: str, *, container_id: str | None = None, computes: bool = True
    ) -> None:
        """A process begins to use a GPU or a slice."""
        client = lm.GpuClient(
            pid=4000 + self._number(), name=name, container_id=container_id, computes=computes
        )
        for gpu in self.gpus:
            if device in gpu.devices:
                gpu.clients.append((device, client))

    def close(self, *, name: str | None = None, container_id: str | None = None) -> None:
        """The processes of that name, or of that container, end."""
        for gpu in self.gpus:
            gpu.clients = [
                (device, c)
                for device, c in gpu.clients
                if c.name != name and (container_id is None or c.container_id != container_id)
            ]

    def reboot(self) -> None:
        """Every slice is gone; MIG mode is kept in Ampere cards alone."""
        self.kernel_version = self.library_version
        for gpu in self.gpus:
            gpu.slices, gpu.clients = {}, []
            gpu.mig = gpu.pending = gpu.pending and gpu.card.keeps_mode
        self.listed = self._devices()

    def _number(self) -> int:
        with self._lock:
            self._numbers += 1
            return self._numbers


def readable_uuid(index: int) -> lm.GpuUuid:
    return lm.GpuUuid(f"GPU-{str((index + 1) % 10) * 8}-aaaa-bbbb-cccc-{index:012d}")
