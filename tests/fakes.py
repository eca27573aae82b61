"""A simulated server: stateful stand-ins for Docker, the probes, the home directory and time.

The docker tests hold the real adapters to the same promises. Nothing here counts calls for a
test to assert on; what a test looks at is the world that is left behind.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import shutil
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, replace
from datetime import datetime, timedelta
from hashlib import sha256
from pathlib import Path

import yaml
from builders import SECRET_MARK, STORED, a_site
from fake_gpus import SimulatedGpus
from pydantic import SecretStr

import llm_manager as lm

# The fake clock begins now: an observation carries the real time beside the simulated starts.
EPOCH = lm.utc_now()


class Crash(BaseException):
    """The manager is killed here, as with kill -9: nothing of it runs any more."""


class FakeClock:
    """Time that passes only when somebody sleeps."""

    def __init__(self, pace: float = 1.0) -> None:
        self.now = 0.0
        self.pace = pace  # a long wait in few looks

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds * self.pace

    def utc_now(self) -> datetime:
        return EPOCH + timedelta(seconds=self.now)


@dataclass
class Trouble:
    """Strikes at some of the effects on the world, counted from 1: just before, or just after.

    With `lie` the driver says that it did what it did not do. `watch` is called after every
    effect: what must hold all the time is checked there.
    """

    at: Collection[int] = ()
    after: bool = False
    lie: bool = False
    error: Callable[[], BaseException] = Crash
    watch: Callable[[], None] = lambda: None
    count: int = 0
    dead: bool = False
    lock: threading.RLock = field(default_factory=threading.RLock)

    @contextlib.contextmanager
    def around(self) -> Iterator[bool]:
        """Surround one effect, which takes place unless it is a lie; effects never overlap."""
        with self.lock:
            self.alive()
            self.count += 1
            strikes = self.count in self.at
            if strikes and not self.after and not self.lie:
                self._strike()
            yield not (strikes and self.lie)
            self.watch()
            if strikes and self.after and not self.lie:
                self._strike()

    def alive(self) -> None:
        if self.dead:
            raise Crash

    def _strike(self) -> None:
        error = self.error()
        self.dead = isinstance(error, Crash)
        raise error


class FakeFiles:
    """The generated files and kept logs, in memory."""

    def __init__(self) -> None:
        self.generated: dict[str, str] = {}
        self.kept: dict[str, str] = {}
        self.starts: dict[str, float] = {}
        self.measured: dict[str, lm.Measured] = {}
        self.trouble = Trouble()

    def read_generated(self) -> dict[str, str]:
        self.trouble.alive()
        return dict(sorted(self.generated.items()))

    def write_generated(self, path: str, text: str | None) -> None:
        with self.trouble.around():
            if text is None:
                self.generated.pop(path, None)
            else:
                self.generated[path] = text

    def keep_log(self, name: lm.ContainerName, text: str) -> None:
        if not self.trouble.dead:
            self.kept[name] = text

    def read_starts(self) -> dict[str, float]:
        return {**self.starts}

    def note_start(self, name: lm.ContainerName, seconds: float) -> None:
        if not self.trouble.dead:
            self.starts[name] = seconds

    def make_folder(self, path: str) -> None:
        """In memory, every folder is there."""

    def read_measured(self) -> dict[str, lm.Measured]:
        return {**self.measured}

    def note_measured(self, key: str, measured: lm.Measured) -> None:
        if not self.trouble.dead:
            self.measured[key] = measured


# Docker gives every container an id of 64 hexadecimal digits, and none twice.
IDS = (f"{number:064x}" for number in itertools.count(1))


@dataclass
class FakeContainer:
    """A container as Docker holds it, with what its program read when it started."""

    name: lm.ContainerName
    spec: lm.ContainerSpec
    running: bool = False
    exit_code: int | None = None
    started_at: float = 0.0
    loaded: str = ""
    log: list[str] = field(default_factory=list)
    runs_from: int = 0  # the line of its log where its last run begins
    container_id: str = field(default_factory=lambda: next(IDS))


@dataclass
class World:
    """What Docker has: it outlives every connection, and so every crash of the manager."""

    files: lm.Files
    gpus: SimulatedGpus = field(default_factory=SimulatedGpus)
    clock: FakeClock = field(default_factory=FakeClock)
    containers: dict[lm.ContainerName, FakeContainer] = field(default_factory=dict)
    images: set[str] = field(default_factory=set)
    built: dict[str, dict[str, str]] = field(default_factory=dict)  # labels, by image
    networks: set[str] = field(default_factory=set)
    volumes: set[str] = field(default_factory=set)
    absent_images: set[str] = field(default_factory=set)  # no registry has these
    broken: set[str] = field(default_factory=set)  # an image or argument; such engines exit
    deaf: set[str] = field(default_factory=set)  # containers that miss their health checks
    blind: set[str] = field(default_factory=set)  # that lost their GPU, as by a daemon-reload
    foreign_devices: dict[str, frozenset[str]] = field(default_factory=dict)
    weights: dict[str, frozenset[str]] = field(default_factory=lambda: {**STORED})
    absent_weights: set[str] = field(default_factory=set)  # the hub does not have these
    while_downloading: Callable[[], None] = lambda: None
    repositories: dict[str, lm.RepositoryFacts] = field(default_factory=dict)  # it tells of these
    needs: dict[str, int] = field(default_factory=dict)  # MiB of a GPU, by container
    rejected: str = "\0"  # Caddy rejects a Caddyfile with this in it
    start_seconds: float = 0.0
    says: str = ""  # what every container says when it starts
    docker_answers: bool = True
    loads: dict[str, lm.EngineLoad] = field(default_factory=dict)  # of engines, by container
    hung: set[str] = field(default_factory=set)  # engines that answer no request
    figures: dict[str, lm.GatewayFigures] = field(default_factory=dict)  # of gateways
    watched: lm.Watched | None = None  # what Prometheus sees
    tables: str = "tables, keys"  # LiteLLM's database: its tables, then what is in them
    loaded_dump: str | None = None  # the database beside it that a dump was loaded into
    former: str | None = None  # the one that was LiteLLM's before
    dumps: dict[str, str] = field(default_factory=dict)  # the tables, by file
    migrations: dict[str, str] = field(default_factory=dict)  # the tables of a LiteLLM, by image

    def boot(self, container: FakeContainer) -> None:
        """Start it: it reads its files now, and ends at once if it is broken."""
        spec = container.spec
        self._refuse_to_start(container)
        self.blind.discard(container.name)
        container.running, container.exit_code = True, None
        container.started_at = self.clock.now
        container.loaded = self.file_of(spec)
        container.runs_from = len(container.log)
        container.log += [f"{container.name} starts", *self.says.splitlines()]
        if spec.image in self.migrations:
            self.tables = self.migrations[spec.image]
        program = "dcgm-exporter" if spec.devices == lm.ALL_GPUS else "VLLM::EngineCore"
        for device in self.devices_of(spec):
            self.gpus.open(device, program, container_id=container.container_id)
        if self.is_broken(spec) or self.finds_its_volume_taken(container):
            container.log.append("ValueError: The model does not fit.")
            self.end(container.name, 1)
        elif spec.devices != lm.ALL_GPUS and not all(map(self.gpus.computes, spec.devices)):
            container.log.append("RuntimeError: No CUDA GPUs are available.")
            self.end(container.name, 1)
        elif self.is_too_large(container):
            container.log.append("ValueError: No available memory for the cache blocks.")
            self.end(container.name, 1)

    def devices_of(self, spec: lm.ContainerSpec) -> Collection[str]:
        """What is visible inside; who has all GPUs has their slices, too."""
        if spec.devices != lm.ALL_GPUS:
            return spec.devices
        return {device for gpu in self.gpus.gpus for device in gpu.devices}

    def is_too_large(self, container: FakeContainer) -> bool:
        needed = self.needs.get(container.name, 0)
        devices = self.devices_of(container.spec)
        return any(self.gpus.memory_mib(device) < needed for device in devices)

    def _refuse_to_start(self, container: FakeContainer) -> None:
        """What Docker, the kernel and the container toolkit would say."""
        spec = container.spec
        for other in self.containers.values():
            if other.running and other is not container and {*other.spec.ports} & {*spec.ports}:
                raise lm.ContainerFailedError(
                    f"Docker could not start {container.name}: a port it publishes is taken.",
                    advice="Free the port.",
                )
        if spec.network not in self.networks:
            raise lm.ContainerFailedError(
                f"Docker could not start {container.name}: network {spec.network} not found.",
                advice="Apply the plan.",
            )
        for said in filter(None, map(self.gpus.why_not, self.devices_of(spec))):
            raise lm._docker_fault(f"start {container.name}", said)

    def finds_its_volume_taken(self, container: FakeContainer) -> bool:
        """Two servers on one database would destroy it; PostgreSQL refuses by its lock file."""
        return container.spec.role == "database" and any(
            other.running and other is not container and other.spec.role == "database"
            for other in self.containers.values()
        )

    def is_broken(self, spec: lm.ContainerSpec) -> bool:
        return bool(self.broken & {spec.image, *spec.command})

    def end(self, name: str, exit_code: int = 0) -> None:
        container = self.containers[lm.ContainerName(name)]
        container.running, container.exit_code = False, exit_code
        self.gpus.close(container_id=container.container_id)

    def reboot(self) -> None:
        """The server is switched off and on; Docker starts again what it may."""
        again = [c for c in self.containers.values() if c.running and c.spec.restart != "no"]
        for name in self.running():
            self.end(name, 137)
        self.gpus.reboot()
        for container in again:
            with contextlib.suppress(lm.ContainerFailedError):
                self.boot(container)

    def file_of(self, spec: lm.ContainerSpec) -> str:
        paths = {"edge": lm.CADDYFILE, "gateway": f"litellm-{spec.name[-1]}/config.yaml"}
        return self.files.read_generated().get(paths.get(spec.role, ""), "")

    def answers(self, container: FakeContainer) -> bool:
        """Whether its program does its work now."""
        if not container.running or container.name in self.deaf:
            return False
        if self.clock.now - container.started_at < self.start_seconds:
            return False
        match container.spec.role:
            case "gateway":
                return bool(container.loaded) and any(
                    other.spec.role == "database" and other.running
                    for other in self.containers.values()
                )
            case "edge":
                return lm.caddyfile_hash(container.loaded) != ""
            case _:
                return True

    def routed(self) -> set[str]:
        """The names that a client gets an answer for, through the edge and its gateway."""
        edges = [c for c in self.containers.values() if c.spec.role == "edge" and self.answers(c)]
        found: set[str] = set()
        for edge in edges:
            for gateway in self.containers.values():
                if f"reverse_proxy {gateway.name}:" in edge.loaded and self.answers(gateway):
                    found |= {name for name, replica in entries_of(gateway.loaded)
                              if self.serves(replica)}  # fmt: skip
        return found

    def serves(self, replica: str) -> bool:
        container = self.containers.get(lm.ContainerName(replica))
        return container is not None and self.answers(container)

    def instance(self) -> str:
        """Which installation builds here."""
        return self.files.load().instance if isinstance(self.files, lm.StateStore) else ""

    def copy(self) -> World:
        """The same server once more, with files of its own in memory."""
        files = FakeFiles()
        files.generated |= self.files.read_generated()
        return replace(
            self,
            files=files,
            gpus=self.gpus.copy(),
            clock=FakeClock(),
            containers={n: replace(c, log=[*c.log]) for n, c in self.containers.items()},
            images={*self.images},
            built={**self.built},
            networks={*self.networks},
            weights={**self.weights},
            volumes={*self.volumes},
            dumps={**self.dumps},
            migrations={**self.migrations},
            broken={*self.broken},
            deaf={*self.deaf},
            blind={*self.blind},
            needs={**self.needs},
        )

    def running(self) -> set[str]:
        return {c.name for c in self.containers.values() if c.running}


def entries_of(litellm_config: str) -> set[tuple[str, str]]:
    """(served name, replica) of every entry."""
    loaded = yaml.load(litellm_config, FAST_LOADER)  # noqa: S506 - it is the safe one, in C
    listed = (loaded or {}).get("model_list", [])
    ids = [(entry["model_name"], entry["model_info"]["id"]) for entry in listed]
    return {(name, deployment.partition("@")[2]) for name, deployment in ids}


FAST_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class FakeContainers:
    """The `Containers` protocol over a world; every single effect can be struck by trouble."""

    def __init__(self, world: World, trouble: Trouble | None = None) -> None:
        self.world = world
        self.trouble = trouble or Trouble()

    def observe(self) -> lm.Observed:
        self._connected()
        world = self.world
        return lm.Observed(
            containers={name: self._seen(c) for name, c in world.containers.items()},
            images=frozenset(world.images),
            networks=frozenset(world.networks),
            volumes=frozenset(world.volumes),
        )

    def look(self, name: lm.ContainerName) -> lm.ObservedContainer | None:
        self._connected()
        container = self.world.containers.get(name)
        return None if container is None else self._seen(container)

    def _seen(self, container: FakeContainer) -> lm.ObservedContainer:
        spec, world = container.spec, self.world
        healthy = "healthy" if world.answers(container) else "starting"
        return lm.ObservedContainer(
            name=container.name,
            role=spec.role,
            spec_hash=spec.hash,
            running=container.running,
            address="172.20.0.9" if container.running else None,
            image=spec.image,
            exit_code=None if container.running else container.exit_code,
            started_at=EPOCH + timedelta(seconds=container.started_at)
            if container.running
            else None,
            model_name=spec.labels.get(lm.LABEL_MODEL_NAME),
            model_type=spec.labels.get(lm.LABEL_MODEL_TYPE),
            served_model_name=spec.labels.get(lm.LABEL_SERVED_NAME),
            docker_health=healthy if spec.healthcheck and container.running else None,
            container_id=container.container_id,
            devices=spec.devices,
        )

    def _connected(self) -> None:
        self.trouble.alive()
        if not self.world.docker_answers:
            raise lm.DockerAbsentError("Docker does not answer.", advice="Start it.")

    @contextlib.contextmanager
    def _effect(self) -> Iterator[None]:
        self._connected()
        with self.trouble.around():
            yield

    def _known(self, name: lm.ContainerName) -> FakeContainer:
        self._connected()
        if name not in self.world.containers:
            raise lm.ContainerGoneError(f"{name} is gone.", advice="Apply the plan.")
        return self.world.containers[name]

    def pull(self, image: str, report: Callable[[lm.Json], None]) -> None:
        self._connected()
        if image in self.world.images:
            return
        with self._effect():
            if image in self.world.absent_images:
                raise lm.ContainerFailedError(
                    f"Docker could not pull {image}: there is no such image.",
                    advice="Correct the image's name, or log in to its registry.",
                )
            for done in (10, 100):
                detail = {"current": done, "total": 100}
                report({"status": "Downloading", "id": "layer", "progressDetail": detail})
            self.world.images.add(image)

    def create_network(self, name: str) -> None:
        with self._effect():
            self.world.networks.add(name)

    def create_volume(self, name: str) -> None:
        with self._effect():
            self.world.volumes.add(name)

    def create(self, spec: lm.ContainerSpec) -> None:
        with self._effect():
            self._refuse_impossible(spec)
            self.world.containers[spec.name] = FakeContainer(spec.name, spec)
        self.start(spec.name)

    def _refuse_impossible(self, spec: lm.ContainerSpec) -> None:
        if spec.name in self.world.containers:
            raise lm.ContainerFailedError(
                f"Docker could not start {spec.name}: another container has its name.",
                advice="Give one of them a home of its own.",
            )
        if spec.image not in self.world.images:
            raise lm.ContainerFailedError(
                f"Docker could not start {spec.name}: there is no such image.",
                advice="Correct the image's name, or log in to its registry.",
            )

    def start(self, name: lm.ContainerName) -> None:
        container = self._known(name)
        with self._effect():
            if not container.running:
                self.world.boot(container)

    def stop(self, name: lm.ContainerName, seconds: int) -> None:  # noqa: ARG002
        container = self._known(name)
        with self._effect():
            if container.running:
                self.world.end(name, 0)

    def _rename(self, name: lm.ContainerName, new: lm.ContainerName) -> None:
        container = self._known(name)
        with self._effect():
            if new in self.world.containers:
                raise lm.ContainerFailedError(
                    f"Docker could not rename {name}: another container has its name.",
                    advice="Give one of them a home of its own.",
                )
            del self.world.containers[name]
            container.name = new
            self.world.containers[new] = container

    def set_aside(self, name: lm.ContainerName, seconds: int) -> None:
        self.stop(name, seconds)
        self._rename(name, lm.aside(name))

    def bring_back(self, name: lm.ContainerName) -> None:
        self._rename(lm.aside(name), name)
        self.start(name)

    def remove(self, name: lm.ContainerName, seconds: int) -> None:
        if name in self.world.containers:
            self.stop(name, seconds)
        with self._effect():
            self.world.containers.pop(name, None)

    def check_caddyfile(self, spec: lm.ContainerSpec, text: str) -> None:  # noqa: ARG002
        with self._effect():
            if self.world.rejected in text:
                raise lm.ContainerFailedError(
                    "Caddy rejects the generated Caddyfile: unrecognized directive.",
                    advice="What ran before still runs. Correct the HTTPS settings.",
                )

    def check_files(
        self,
        spec: lm.ContainerSpec,  # noqa: ARG002
        command: Sequence[str],
        texts: Mapping[str, str],
    ) -> None:
        with self._effect():
            if any(self.world.rejected in text for text in texts.values()):
                raise lm.ContainerFailedError(
                    f"{command[0]} rejects what was generated: unknown field.",
                    advice="What ran before still runs.",
                )

    def reload_caddyfile(self, name: lm.ContainerName) -> None:
        container = self._known(name)
        with self._effect():
            if not container.running:
                raise lm.ContainerFailedError(
                    f"Docker could not reload {name}: it is not running.", advice="Apply the plan."
                )
            container.loaded = self.world.file_of(container.spec)

    def logs(self, name: lm.ContainerName, tail: int, *, last_run: bool = False) -> str:
        container = self._known(name)
        return "\n".join(container.log[container.runs_from if last_run else 0 :][-tail:])

    def follow(self, name: lm.ContainerName) -> Iterator[str]:
        yield from self._known(name).log

    def visible_devices(self, seen: lm.ObservedContainer) -> frozenset[str] | None:
        container = self.world.containers.get(seen.name)
        if container is None or not container.running:
            return None
        if seen.name in self.world.blind:
            return frozenset()
        devices = self.world.devices_of(container.spec)
        return frozenset(filter(self.world.gpus.exists, devices))

    def foreign_devices(self) -> dict[str, frozenset[str]]:
        self._connected()
        return {**self.world.foreign_devices}

    def host_address(self) -> str:
        self._connected()
        return "127.0.0.1"


class FakeImages:
    """The `LocalImages` protocol over a world; a Dockerfile's `RUN exit N` fails as it would."""

    def __init__(self, world: World, trouble: Trouble) -> None:
        self.world = world
        self.trouble = trouble

    def build(
        self,
        image: str,
        dockerfile: str,
        labels: Mapping[str, str],
        report: Callable[[str], None],
        check: Callable[[], None],
    ) -> None:
        if image in self.world.images:
            return
        commands = [line for line in dockerfile.splitlines() if not line.startswith("#")]
        for number, command in enumerate(commands, 1):
            check()
            report(f"Step {number}/{len(commands)} : {command}\n ---> Running in 0123456789ab\n")
            if match := re.fullmatch(r"RUN exit (\d+)", command):
                said = f"The command '/bin/sh -c {command}' returned a non-zero code: {match[1]}"
                report(f"{said}\n")
                raise lm.ContainerFailedError(f"Docker could not build {image}.", advice="Look.")
        with self.trouble.around():
            self.world.images.add(image)
            self.world.built[image] = {**labels, lm.LABEL_IMAGE_INSTANCE: self.world.instance()}

    def observe(self) -> tuple[lm.ObservedImage, ...]:
        if not self.world.docker_answers:
            raise lm.DockerAbsentError("Docker does not answer.", advice="Start it.")
        return tuple(map(self._seen, sorted(self.world.images)))

    def _seen(self, image: str) -> lm.ObservedImage:
        base = lm.Images().vllm_cpu
        below = ("layer of a base",) if image in {base, *self.world.built} else ()
        users = [c.name for c in self.world.containers.values() if c.spec.image == image]
        return lm.ObservedImage(
            image_id=f"sha256:{sha256(image.encode()).hexdigest()}",
            tags=() if "@" in image else (image,),
            digests=(image,) if "@" in image else (),
            size_bytes=1000 + 24 * (image in self.world.built),
            created_at=EPOCH,
            layers=(*below, *((image,) if image != base else ())),
            labels=self.world.built.get(image, {}),
            used_by=tuple(users),
        )

    def remove(self, image: lm.ObservedImage) -> None:
        with self.trouble.around():
            self.world.images -= {*image.tags}


class FakeProbes:
    """The `Probes` protocol over a world: what answers is what the world says does."""

    def __init__(self, world: World) -> None:
        self.world = world

    def fill(self, observed: lm.Observed) -> lm.Observed:
        filled = {
            name: replace(seen, ready=self._answers(name)) if seen.running else seen
            for name, seen in observed.containers.items()
        }
        return replace(observed, containers=filled, edge=self._loaded())

    def _answers(self, name: lm.ContainerName) -> bool:
        container = self.world.containers.get(name)
        return container is not None and self.world.answers(container)

    def _loaded(self) -> lm.LoadedCaddyfile | None:
        for container in self.world.containers.values():
            if container.spec.role == "edge" and self.world.answers(container):
                slot: lm.Slot = "a" if "ok a " in container.loaded else "b"
                return lm.LoadedCaddyfile(slot, lm.caddyfile_hash(container.loaded))
        return None

    def is_ready(self, spec: lm.ContainerSpec, seen: lm.ObservedContainer) -> bool:
        container = self.world.containers[seen.name]
        if not self.world.answers(container):
            return False
        match spec.readiness:
            case lm.GatewayServes(model_names=names):
                return {name for name, _ in entries_of(container.loaded)} >= {*names}
            case _:
                return True

    def load(self, seen: lm.ObservedContainer) -> lm.EngineLoad | None:
        return self.world.loads.get(seen.name)

    def figures(self, seen: lm.ObservedContainer, key: SecretStr) -> lm.GatewayFigures | None:  # noqa: ARG002
        told = self.world.figures.get(seen.name)
        return replace(told) if told else None

    def watched(self, seen: lm.ObservedContainer) -> lm.Watched | None:
        empty = lm.Watched(targets=(), alerts=())
        return (self.world.watched or empty) if self._answers(seen.name) else None

    def answers(
        self,
        seen: lm.ObservedContainer,
        wanted: lm.EngineAnswers,
        seconds: float,  # noqa: ARG002
    ) -> bool:
        load = self.world.loads.get(seen.name)
        lm.readiness_request(wanted.model_type, wanted.served_model_name)
        if load is None or seen.name in self.world.hung:
            return False
        self.world.loads[seen.name] = replace(load, tokens=load.tokens + 3)
        return True


def a_world(files: lm.Files | None = None, gpus: SimulatedGpus | None = None) -> World:
    """A server with Docker and nothing in it."""
    return World(files if files is not None else FakeFiles(), gpus or SimulatedGpus())


def some_tools(world: World, trouble: Trouble | None = None) -> lm.Tools:
    """Doors into the world for one life of the manager; trouble strikes on all of them."""
    trouble = trouble or Trouble()
    if isinstance(world.files, FakeFiles):
        world.files.trouble = trouble
    world.gpus.trouble = trouble
    containers = FakeContainers(world, trouble)
    images = FakeImages(world, trouble)
    return lm.Tools(
        containers, FakeProbes(world), world.files, world.clock, world.gpus,
        FakeWeights(world, trouble), images, FakeDatabase(world, trouble),
    )  # fmt: skip


class FakeDatabase:
    """The `Database` protocol over a world: a dump is broken where the world says so."""

    def __init__(self, world: World, trouble: Trouble) -> None:
        self.world = world
        self.trouble = trouble

    def dumps(self) -> list[lm.Dump]:
        return [
            lm.Dump(file=file, size_bytes=len(tables), taken_at=EPOCH)
            for file, tables in sorted(self.world.dumps.items(), reverse=True)
        ]

    def find(self, name: str) -> Path:
        for file in (name, f"{name}.dump"):
            if Path(file).name in self.world.dumps:
                return Path("/backups") / file
        raise lm.UnknownError(f"There is no dump {name!r}.", advice="See the list.")

    def drop_dump(self, dump: lm.Dump) -> None:
        with self.trouble.around():
            self.world.dumps.pop(dump.file, None)

    @contextlib.contextmanager
    def _running(self, server: lm.ContainerName) -> Iterator[None]:
        container = self.world.containers.get(server)
        if container is None or not container.running:
            raise lm.ContainerFailedError(f"{server} is not running.", advice="Apply the plan.")
        with self.trouble.around():
            yield

    def dump(self, server: lm.ContainerName, file: str, tell: Callable[[int], None]) -> int:
        with self._running(server):
            tell(len(self.world.tables))
            self.world.dumps[file] = self.world.tables
        return len(self.world.tables)

    def is_as_in(self, server: lm.ContainerName, path: Path) -> bool:
        with self._running(server):
            then, now = self.world.dumps[path.name], self.world.tables
            return then.partition(",")[0] == now.partition(",")[0]

    def load(self, server: lm.ContainerName, path: Path) -> None:
        with self._running(server):
            if path.name in self.world.broken:
                raise lm.RefusedError(f"{path.name} cannot be restored.", advice="Take another.")
            self.world.loaded_dump, self.world.former = self.world.dumps[path.name], None

    def turn(self, server: lm.ContainerName) -> None:
        world = self.world
        with self._running(server):
            if world.loaded_dump is None or world.former is not None:
                raise lm.ContainerFailedError("No database was loaded.", advice="Load one.")
            world.tables, world.former, world.loaded_dump = world.loaded_dump, world.tables, None

    def turn_back(self, server: lm.ContainerName) -> None:
        world = self.world
        with self._running(server):
            if world.former is not None:
                world.tables, world.former, world.loaded_dump = world.former, None, world.tables

    def drop_loaded(self, server: lm.ContainerName) -> None:
        with self._running(server):
            self.world.loaded_dump = None

    def drop_former(self, server: lm.ContainerName) -> None:
        with self._running(server):
            self.world.former = None

    def withhold_contents(self, server: lm.ContainerName) -> None:
        with self._running(server):
            pass  # its tables here have no rows of requests

    def size(self, server: lm.ContainerName) -> lm.DatabaseSize:
        with self._running(server):
            return lm.DatabaseSize(
                database_bytes=len(self.world.tables),
                spend_log_bytes=0,
                spend_log_rows=None,
                oldest_row_at=None,
                free_bytes=2**40,
            )


@dataclass
class FakeShelf:
    """The cache of weights of a simulated server: names alone, no files."""

    world: World

    def stored(self) -> dict[str, frozenset[str]]:
        return {**self.world.weights}

    def commit(self, repository: str, revision: str | None = None) -> str | None:  # noqa: ARG002
        return None

    def inspect(self, repository: str, revision: str | None = None) -> lm.RepositoryFacts | None:
        here = (revision or "main") in self.world.weights.get(repository, ())
        return self.world.repositories.get(repository) if here else None

    def read(self) -> lm.WeightsCache:
        return lm.WeightsCache()

    def remove(self, removal: lm.Removal) -> None:
        self.world.weights.pop(removal.repository, None)


@dataclass
class FakeWeights:
    """A hub that has whatever is not absent; it can be asked for what it was given."""

    world: World
    trouble: Trouble

    @property
    def cache(self) -> FakeShelf:
        return FakeShelf(self.world)

    def _refuse(self, repository: str) -> None:
        if repository in self.world.absent_weights:
            raise lm.HubError("absent", lm.Wanted(endpoint="https://hub", repository=repository))

    def search(self, text: str, *, kind: lm.ModelType | None = None) -> Sequence[lm.RepositoryHit]:
        found = (facts for name, facts in self.world.repositories.items() if text in name)
        return [lm.RepositoryHit(repository=facts.repository) for facts in found
                if kind in {None, lm.guess_type(facts)}]  # fmt: skip

    def inspect(self, repository: str, revision: str | None = None) -> lm.RepositoryFacts:
        self._refuse(repository)
        return replace(self.world.repositories[repository], revision=revision)

    def resolve(self, repository: str, revision: str | None = None) -> str:
        self._refuse(repository)
        raise lm.HubError(
            "offline",
            lm.Wanted(endpoint="https://hub", repository=repository, revision=revision or ""),
        )

    def download(
        self, repository: str, revision: str | None = None, *,
        kind: lm.ModelType | None = None,  # noqa: ARG002
        on_progress: Callable[[lm.DownloadProgress], None], check: Callable[[], None],
    ) -> str:  # fmt: skip
        self._refuse(repository)
        self.world.while_downloading()
        check()
        with self.trouble.around():
            whole = self.world.weights.get(repository, frozenset())
            self.world.weights[repository] = whole | {revision or "main"}
        files = (lm.FileProgress(path="model.safetensors", bytes_done=8, bytes_total=8),)
        on_progress(lm.DownloadProgress(repository=repository, files=files))
        return "f" * 40


@dataclass
class FakeGateway:
    """The keys and groups that LiteLLM would have, for one server."""

    server: InitVar[Server]
    keys: dict[str, lm.Json] = field(default_factory=dict)  # by their hashes
    groups: dict[str, lm.Json] = field(default_factory=dict)
    absent_for: int = 0  # requests that are not answered
    refuses: str = ""  # a key of that name
    loses_answer_of: str = ""  # a key of that name is made, and nobody hears of it
    made: Callable[[str], None] = lambda _: None  # called with the name of each new key

    def __post_init__(self, server: Server) -> None:
        server.manager.keys.gateway = lambda _: self  # type: ignore[method-assign,assignment,return-value]

    def _answer(self) -> None:
        if self.absent_for:
            self.absent_for -= 1
            raise lm.GatewayError("LiteLLM does not answer.", advice="Look at the Overview.")

    def list_keys(self) -> list[lm.VirtualKey]:
        self._answer()
        return [lm.read_key(entry) for entry in self.keys.values()]

    def create_key(self, body: lm.Json) -> SecretStr:
        self._answer()
        alias = body["key_alias"]
        if alias == self.refuses or any(k["key_alias"] == alias for k in self.keys.values()):
            raise lm.GatewayError("LiteLLM refuses that: it is there.", advice="Correct it.")
        secret = body.get("key") or f"sk-{SECRET_MARK}-{len(self.keys)}"
        token = sha256(secret.encode()).hexdigest()
        self.keys[token] = {"token": token, "key_name": "sk-..."}
        self._set(self.keys[token], body)
        self.made(alias)
        if alias == self.loses_answer_of:
            raise lm.GatewayError("LiteLLM does not answer.", advice="Look at the Overview.")
        return SecretStr(secret)

    def _set(self, entry: lm.Json, body: lm.Json) -> None:
        entry |= {name: value for name, value in body.items() if name != "key"}
        if "duration" in body:
            seconds = float((body["duration"] or "0").removesuffix("s"))
            ends = lm.utc_now() + timedelta(seconds=min(seconds, 1e9))
            entry["expires"] = ends.isoformat() if seconds else None

    def update_key(self, key_hash: str, body: lm.Json) -> None:
        self._answer()
        self._set(self.keys[key_hash], body)

    def block_key(self, key_hash: str, *, blocked: bool) -> None:
        self._answer()
        self.keys[key_hash]["blocked"] = blocked

    def delete_keys(self, hashes: Sequence[str]) -> None:
        self._answer()
        for key_hash in hashes:
            del self.keys[key_hash]

    def list_groups(self) -> list[lm.KnownGroup]:
        self._answer()
        return [lm.read_group(entry) for entry in self.groups.values()]

    def create_group(self, body: lm.Json) -> None:
        self._answer()
        self.groups[body["team_id"]] = dict(body)

    def update_group(self, body: lm.Json) -> None:
        self._answer()
        self.groups[body["team_id"]] |= body

    def block_group(self, name: str, *, blocked: bool) -> None:
        self._answer()
        self.groups[name]["blocked"] = blocked

    def delete_group(self, name: str) -> None:
        self._answer()
        del self.groups[name]


class Server:
    """A manager with a real home directory, and the simulated world that it manages."""

    def __init__(self, home: Path, gpus: SimulatedGpus | None = None) -> None:
        self.store = lm.StateStore(home)
        self.store.ensure(fixed_names=True)
        self.world = a_world(self.store, gpus)
        self.restart()

    def restart(self, trouble: Trouble | None = None) -> None:
        """Another life of the manager."""
        self.trouble = trouble or Trouble()
        tools = some_tools(self.world, self.trouble)
        self.manager = lm.Manager(
            self.store, tools, a_site(), engine_options={}, recipes=self.read_recipes
        )

    def read_recipes(self) -> lm.Recipes:
        """Those of the home directory; the shipped ones are not for a simulated server."""
        return lm.parse_recipes(lm.read_recipes(self.store.home / "recipes"))

    def twin(self, home: Path) -> Server:
        """The same server once more, with a home of its own."""
        shutil.copytree(self.store.home, home)
        twin = Server(home)
        twin.world = self.world.copy()
        twin.world.files = twin.store
        twin.restart()
        return twin

    def do(self, change: lm.Change) -> list[str]:
        """A change from its start to its end."""
        return list(self.manager.start(change).follow())


def until(holds: Callable[[], bool]) -> bool:
    """Whether another thread makes it true; it has five seconds, and needs none of them."""
    never = threading.Event()
    return any(holds() or never.wait(0.005) for _ in range(1000))
