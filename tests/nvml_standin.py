"""A server whose GPUs exist only in a file, behind a driver library that the real pynvml loads.

The library is compiled here from tests/standin/nvml.c; how the cards can be cut comes from
recipes/mig.yaml. What a test looks at is the hardware that is left behind: `slices`, `mig`.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pynvml
import yaml

HERE = Path(__file__).parent
SOURCE = HERE / "standin" / "nvml.c"
MIG_YAML = HERE.parent / "recipes" / "mig.yaml"

Slice = tuple[str, int]  # the profile's name, where it starts
Link = int | Literal["switch"]  # so many links of a bridge, or all of them to the NVSwitches
FOREVER = -1


# --- the cards -----------------------------------------------------------------


@dataclass(frozen=True)
class ProfileKind:
    """A kind of GPU instance, with both of its numbers: NVML's constant and the driver's id."""

    name: str
    index: int
    driver_id: int
    most: int
    memory_mib: int
    multiprocessors: int
    slices: int
    size: int
    starts: tuple[int, ...]

    @property
    def media(self) -> str:
        """Its suffix as nvml.c calls it."""
        for suffix, media in MEDIA.items():
            if self.name.endswith(suffix):
                return media
        return "PLAIN"


MEDIA = {"+me.all": "ALL_ME", "+me": "ONE_ME", "-me": "NO_ME", "+gfx": "GFX"}
# NVML_GPU_INSTANCE_PROFILE_*, by slices and suffix.
INDEXES = {
    "PLAIN": {1: 0, 2: 1, 3: 2, 4: 3, 7: 4},
    "ONE_ME": {1: 7, 2: 8},
    "GFX": {1: 10, 2: 11, 4: 12, 3: 17},
    "NO_ME": {1: 13, 2: 14},
    "ALL_ME": {1: 15, 2: 16},
}
SECOND_1G = 9  # 1_SLICE_REV2: a plain 1g with twice the memory


@dataclass(frozen=True)
class CardKind:
    """What every card of a kind has in common."""

    name: str
    device: int
    product: str
    architecture: int
    capability: tuple[int, int]
    memory_mib: int
    limit_w: int
    idle_w: int
    links: int
    ecc: bool = True
    p2p: bool = True
    is_numa_node: bool = False
    compute_slices: int = 0
    memory_units: int = 0
    profiles: tuple[ProfileKind, ...] = ()

    def profile(self, name: str) -> ProfileKind:
        return next(kind for kind in self.profiles if kind.name == name)


AMPERE, ADA, HOPPER, BLACKWELL = 7, 8, 9, 10
# What mig.yaml does not say: product, architecture, compute capability, MiB, watts at most and
# idle, NVLinks.
HARDWARE: dict[str, tuple[str, int, tuple[int, int], int, int, int, int]] = {
    "A30": ("NVIDIA A30", AMPERE, (8, 0), 24576, 165, 28, 4),
    "A100 40 GB": ("NVIDIA A100-SXM4-40GB", AMPERE, (8, 0), 40960, 400, 52, 12),
    "A100 80 GB": ("NVIDIA A100-SXM4-80GB", AMPERE, (8, 0), 81920, 400, 60, 12),
    "H100 80 GB": ("NVIDIA H100 80GB HBM3", HOPPER, (9, 0), 81559, 700, 70, 18),
    "H100 94 GB": ("NVIDIA H100 NVL", HOPPER, (9, 0), 95830, 400, 62, 18),
    "H100 96 GB, GH200 96 GB, H20": ("NVIDIA GH200 480GB", HOPPER, (9, 0), 97871, 900, 80, 18),
    "GH200 144 GB": ("NVIDIA GH200 144G HBM3e", HOPPER, (9, 0), 146831, 900, 85, 18),
    "H200 141 GB": ("NVIDIA H200", HOPPER, (9, 0), 143771, 700, 75, 18),
    "B200 180 GB": ("NVIDIA B200", BLACKWELL, (10, 0), 183359, 1000, 140, 18),
    "GB200 186 GB": ("NVIDIA GB200", BLACKWELL, (10, 0), 189471, 1200, 150, 18),
    "RTX PRO 6000 Blackwell": (
        "NVIDIA RTX PRO 6000 Blackwell Server Edition",
        BLACKWELL,
        (12, 0),
        97887,
        600,
        30,
        0,
    ),
}
GRACE = {"H100 96 GB, GH200 96 GB, H20", "GH200 144 GB", "GB200 186 GB"}
GEFORCE = CardKind(
    *("RTX 4090", 0x2684, "NVIDIA GeForce RTX 4090", ADA, (8, 9), 24564, 450, 20, 0),
    ecc=False,
    p2p=False,
)


@cache
def cards() -> dict[str, CardKind]:
    """Every card of recipes/mig.yaml, and one that cannot be cut."""
    document = yaml.safe_load(MIG_YAML.read_text())
    found = [_card(entry, document["columns"]) for entry in document["cards"]]
    return {kind.name: kind for kind in (*found, GEFORCE)}


def card(name: str) -> CardKind:
    """The kind with this name in recipes/mig.yaml, or "RTX 4090"."""
    return cards()[name]


def _card(entry: dict[str, Any], columns: Sequence[str]) -> CardKind:
    name = entry["card"]
    profiles: list[ProfileKind] = []
    for row in entry["profiles"]:
        profiles.append(_profile(dict(zip(columns, row, strict=True)), profiles))
    return CardKind(
        *(name, int(str(entry["devices"][0]), 16), *HARDWARE[name]),
        is_numa_node=name in GRACE,
        compute_slices=entry["compute_slices"],
        memory_units=entry["memory_units"],
        profiles=tuple(profiles),
    )


def _profile(row: dict[str, Any], before: Sequence[ProfileKind]) -> ProfileKind:
    """A profile; where nobody has published a figure, one of about the right size."""
    name = row["profile"]
    slices = int(name[: name.index("g")])
    gigabytes = int(name.split(".")[1].split("gb")[0])
    memory, processors = row["memory_gib"], row["multiprocessors"]
    kind = ProfileKind(
        name,
        0,
        row["driver_id"],
        row["most"],
        round(memory * 1024) if memory else gigabytes * 1000,
        processors or before[0].multiprocessors * slices,
        slices,
        row["size"],
        tuple(row["starts"]),
    )
    index = INDEXES[kind.media][slices]
    taken = any(other.index == index for other in before)
    return ProfileKind(**{**vars(kind), "index": SECOND_1G if taken else index})


# --- the library ---------------------------------------------------------------


def _tables() -> str:
    """tables.h: the cards, as nvml.c declares them."""
    entries = ",\n".join(map(_card_in_c, cards().values()))
    return f"static const Card CARDS[] = {{\n{entries}\n}};\n"


def _card_in_c(kind: CardKind) -> str:
    values = [
        *map(json.dumps, (kind.name, kind.product)),
        *(kind.device, kind.architecture, *kind.capability, kind.memory_mib),
        *(kind.limit_w * 1000, kind.idle_w * 1000, kind.links),
        *map(int, (kind.ecc, kind.p2p, kind.is_numa_node)),
        *(kind.compute_slices, kind.memory_units),
        f"{{{', '.join(map(_profile_in_c, kind.profiles)) or '{0}'}}}",
    ]
    return f"    {{{', '.join(map(str, values))}}}"


def _profile_in_c(kind: ProfileKind) -> str:
    values = [
        *(json.dumps(kind.name), kind.index, kind.driver_id, kind.most, kind.memory_mib),
        *(kind.multiprocessors, kind.slices, kind.size, kind.media, len(kind.starts)),
        f"{{{', '.join(map(str, kind.starts))}}}",
    ]
    return f"\n        {{{', '.join(map(str, values))}}}"


def library(folder: Path, *, old_driver: bool = False) -> Path:
    """Compile libnvidia-ml.so.1 into this folder, unless it is there; one folder for each driver.

    It has no soname: by that the C library would hand it to whoever asks this process for
    libnvidia-ml.so.1 later, a machine's own driver notwithstanding. LD_LIBRARY_PATH finds it by
    the name of its file.
    """
    options = ["-std=c11", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread"]
    options += ["-DOLD_DRIVER"] if old_driver else []
    tables, made, stamp = _tables(), folder / "libnvidia-ml.so.1", folder / "inputs.sha256"
    inputs = hashlib.sha256("\0".join([SOURCE.read_text(), tables, *options]).encode()).hexdigest()
    if made.exists() and stamp.exists() and stamp.read_text() == inputs:
        return made
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tables.h").write_text(tables)
    new = folder / "new.so"  # never write over a library that a process has mapped
    command = ["cc", *options, f"-I{folder}", "-o", str(new), str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    new.replace(made)
    stamp.write_text(inputs)
    return made


# --- the server ----------------------------------------------------------------


class Server:
    """A simulated server, and the hands of those who own it: everything but the driver's calls."""

    def __init__(
        self,
        library: Path,
        state_file: Path,
        cards: Sequence[str],
        *,
        links: Mapping[tuple[int, int], Link] | None = None,
        stable_uuids: bool = False,
    ) -> None:
        self.library = library
        self.state_file = state_file
        self._loaded = ctypes.CDLL(str(library))
        self._before: tuple[dict[str, str | None], Any, dict[str, Any], int] | None = None
        self._do("create")
        for number, name in enumerate(cards):
            unique = uuid.uuid5(uuid.NAMESPACE_URL, f"nvml-standin/{number}")
            self._do("add_gpu", name, f"GPU-{unique}")
        for (one, other), link in (links or {}).items():
            self.connect(one, other, links=link)
        self._set_server("stable_uuids", stable_uuids)

    def _do(self, action: str, *arguments: Any) -> int:
        """Call one of the library's own functions."""
        given = [str(self.state_file), *arguments]
        as_c = [argument.encode() if isinstance(argument, str) else argument for argument in given]
        answer = int(getattr(self._loaded, f"standin_{action}")(*as_c))
        if answer < 0:
            raise ValueError(f"{action} {arguments}: there is no such thing, or no room for it")
        return answer

    # --- whom it serves ---

    def environment(self) -> dict[str, str]:
        """What a program must find in its environment to be on this server."""
        return {"NVML_STANDIN": str(self.state_file), "LD_LIBRARY_PATH": str(self.library.parent)}

    def activate(self) -> None:
        """Put this process, and what it starts, on this server."""
        assert self._before is None, "it is active"
        pointers = pynvml._nvmlGetFunctionPointer_cache
        environment = {name: os.environ.get(name) for name in self.environment()}
        self._before = environment, pynvml.nvmlLib, {**pointers}, pynvml._nvmlLib_refcount
        os.environ.update(self.environment())
        pointers.clear()
        pynvml.nvmlLib, pynvml._nvmlLib_refcount = ctypes.CDLL(str(self.library)), 0

    def deactivate(self) -> None:
        """Leave this process as `activate` found it."""
        assert self._before is not None, "it is not active"
        while pynvml._nvmlLib_refcount:  # what a failed test has left open
            pynvml.nvmlShutdown()
        environment, pynvml.nvmlLib, pointers, pynvml._nvmlLib_refcount = self._before
        pynvml._nvmlGetFunctionPointer_cache.clear()
        pynvml._nvmlGetFunctionPointer_cache.update(pointers)
        for name, value in environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._before = None

    # --- what the hardware is ---

    def uuid(self, gpu: int) -> str:
        return f"GPU-{uuid.uuid5(uuid.NAMESPACE_URL, f'nvml-standin/{gpu}')}"

    def slices(self, gpu: int) -> set[Slice]:
        """Every GPU instance, whether or not a program could use it."""
        return {*self._slices(gpu)}

    def devices(self, gpu: int) -> dict[Slice, str]:
        """The UUIDs of the slices that one compute instance covers: what a program could use."""
        return {slice_: unique for slice_, unique in self._slices(gpu).items() if unique}

    def _slices(self, gpu: int) -> dict[Slice, str]:
        found: dict[Slice, str] = {}
        name, start, unique = (ctypes.create_string_buffer(96), ctypes.c_uint(),
                               ctypes.create_string_buffer(48))  # fmt: skip
        while True:
            try:
                self._do("slice", gpu, len(found), name, ctypes.byref(start), unique)
            except ValueError:
                return found
            found[name.value.decode(), start.value] = unique.value.decode()

    def mig(self, gpu: int) -> tuple[int, int]:
        """MIG mode: as it is, and as it is to be after the next reset."""
        return self.get(gpu, "mig_current"), self.get(gpu, "mig_pending")

    def get(self, gpu: int, name: str) -> int:
        """One of the figures that `set` sets."""
        value = ctypes.c_longlong()
        self._do("get", gpu, name, ctypes.byref(value))
        return value.value

    # --- what happens to it ---

    def set(self, gpu: int, **values: int) -> None:
        """Change what its sensors and switches say; nvml.c's `setting` lists the names."""
        for name, value in values.items():
            self._do("set", gpu, name, ctypes.c_longlong(value))

    def _set_server(self, name: str, value: int) -> None:
        self._do("set", -1, name, ctypes.c_longlong(value))

    def connect(
        self,
        one: int,
        other: int,
        *,
        links: Link | None = None,
        ancestor: int | None = None,
        p2p: int | None = None,
    ) -> None:
        """Join two GPUs: by NVLink, by what they share of PCIe, and what peer access answers."""
        number = -1 if links == "switch" else links
        for how, value in (("links", number), ("ancestor", ancestor), ("p2p", p2p)):
            if value is not None:
                self._do("join", one, other, how, value)

    def advance(self, seconds: float) -> None:
        """Let time pass for the energy counters."""
        now = ctypes.c_longlong()
        self._do("get", -1, "skipped_ms", ctypes.byref(now))
        self._set_server("skipped_ms", now.value + round(seconds * 1000))

    def freeze(self) -> None:
        """No time passes any more but by `advance`."""
        self._set_server("frozen_at_ms", time.monotonic_ns() // 10**6)

    def carve(self, gpu: int, *slices: Slice) -> None:
        """Somebody else makes these slices, each with a compute instance; MIG mode goes on."""
        for profile, start in slices:
            self._do("carve", gpu, profile, start)

    def clear(self, gpu: int) -> None:
        """Somebody else destroys all slices, which are idle; MIG mode stays."""
        self._do("clear", gpu)

    def add_process(  # noqa: PLR0913
        self,
        gpu: int,
        pid: int,
        name: str = "",
        graphics: bool = False,
        slice: Slice | None = None,  # noqa: A002
        *,
        used_mib: int = 1024,
        hidden: bool = False,
    ) -> None:
        """A process uses a GPU or a slice; a hidden one is a client, like a monitor, in no list."""
        profile, start = slice or (None, 0)
        used = ctypes.c_uint64(used_mib * 1024**2)
        self._do("run", gpu, pid, name, int(graphics), int(hidden), used, profile, start)

    def work(self, pid: int, percent: int) -> None:
        """A process keeps so much of its GPU's or slice's multiprocessors at work."""
        self._do("work", pid, percent)

    def open_samples(self) -> int:
        """How many of GPM's samples nobody has freed."""
        count = ctypes.c_longlong()
        self._do("get", -1, "gpm_samples", ctypes.byref(count))
        return count.value

    def remove_process(self, pid: int) -> None:
        self._do("end", pid)

    def reboot(self) -> None:
        """Slices and processes are gone, counters begin anew; Ampere alone keeps MIG mode."""
        self._do("reboot")

    def lose(self, gpu: int) -> None:
        """It falls off the bus, until the reboot."""
        self.set(gpu, lost=1)

    def mismatch(self, on: bool = True) -> None:
        """The driver was upgraded without a reboot: NVML does not start."""
        self._set_server("mismatch", on)

    def unprivileged(self, on: bool = True) -> None:
        """Whoever asks is not root."""
        self._set_server("unprivileged", on)

    def fail(self, symbol: str, code: int, *, after: int = 0, times: int = 1) -> None:
        """Answer this code to so many calls of a C function, after so many that go well."""
        if not hasattr(self._loaded, symbol):
            raise ValueError(f"{symbol}: this driver has no such function")
        self._do("fail", symbol, code, after, times)

    def lie(self, symbol: str, *, after: int = 0, times: int = 1) -> None:
        """Let calls of a C function say that they did what they did not."""
        self.fail(symbol, pynvml.NVML_SUCCESS, after=after, times=times)

    def mend(self) -> None:
        """Nothing that `fail` or `lie` asked for happens any more."""
        self._do("mend")
