"""A server that is only simulated, with a home directory of its own, and what can strike at it.

The simulated adapters are the product's, as `demo` shows them; the docker tests hold the real ones
to the same promises. Nothing here counts calls for a test to assert on; what a test looks at is the
world that is left behind.
"""

from __future__ import annotations

import contextlib
import copy
import shutil
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from builders import SECRET_MARK, STORED, a_site
from pydantic import SecretStr

import llm_manager as lm


class Crash(BaseException):
    """The manager is killed here, as with kill -9: nothing of it runs any more."""


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


def a_world(
    files: lm.Files | None = None, gpus: lm.SimulatedGpus | None = None
) -> lm.SimulatedHost:
    """A server with Docker and nothing in it but the weights of a model."""
    return lm.SimulatedHost(
        files if files is not None else FakeFiles(), gpus or lm.SimulatedGpus(), weights={**STORED}
    )


def some_tools(world: lm.SimulatedHost, trouble: Trouble | None = None) -> lm.Tools:
    """Doors into the world for one life of the manager; trouble strikes on all of them."""
    trouble = trouble or Trouble()
    if isinstance(world.files, FakeFiles):
        world.files.trouble = trouble
    return lm.simulated_tools(world, trouble)


def copy_of(world: lm.SimulatedHost, files: lm.Files | None = None) -> lm.SimulatedHost:
    """The same server once more, with files of its own."""
    if files is None:
        files = FakeFiles()
        files.generated |= world.files.read_generated()
    return replace(
        world,
        files=files,
        gpus=gpus_like(world.gpus),
        clock=lm.SimulatedClock(),
        containers={n: replace(c, log=[*c.log]) for n, c in world.containers.items()},
        images={*world.images},
        built={**world.built},
        networks={*world.networks},
        weights={**world.weights},
        volumes={*world.volumes},
        dumps={**world.dumps},
        migrations={**world.migrations},
        broken={*world.broken},
        deaf={*world.deaf},
        blind={*world.blind},
        needs={**world.needs},
    )


def gpus_like(gpus: lm.SimulatedGpus) -> lm.SimulatedGpus:
    """The same GPUs once more, without the trouble."""
    twin = copy.copy(gpus)
    twin.gpus = [replace(g, slices={**g.slices}, clients=[*g.clients]) for g in gpus.gpus]
    twin.links, twin.listed = {**gpus.links}, {*gpus.listed}
    twin.trouble, twin._lock = lm.NoInterference(), threading.RLock()
    return twin


class FakeGateway(lm.SimulatedGateway):
    """LiteLLM's keys and groups for one server, whose trouble can be ordered."""

    def __init__(
        self, server: Server, made: Callable[[str], None] = lambda _: None, *, refuses: str = ""
    ) -> None:
        super().__init__()
        self.made = made  # called with the name of each new key
        self.refuses = refuses  # a key of that name
        self.absent_for = 0  # requests that are not answered
        self.loses_answer_of = ""  # a key of that name is made, and nobody hears of it
        server.manager.keys.gateway = lambda _: self  # type: ignore[method-assign,assignment,return-value]

    def _answer(self) -> None:
        if self.absent_for:
            self.absent_for -= 1
            raise lm.GatewayError("LiteLLM does not answer.", advice="Look at the Overview.")

    def create_key(self, request: lm.Json) -> SecretStr:
        alias = request["key_alias"]
        if alias == self.refuses:
            raise lm.GatewayError("LiteLLM refuses that: it is there.", advice="Correct it.")
        secret = super().create_key({"key": f"sk-{SECRET_MARK}-{len(self.keys)}", **request})
        self.made(alias)
        if alias == self.loses_answer_of:
            raise lm.GatewayError("LiteLLM does not answer.", advice="Look at the Overview.")
        return secret


class Server:
    """A manager with a real home directory, and the simulated world that it manages."""

    def __init__(self, home: Path, gpus: lm.SimulatedGpus | None = None) -> None:
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
        twin.world = copy_of(self.world, twin.store)
        twin.restart()
        return twin

    def do(self, change: lm.Change) -> list[str]:
        """A change from its start to its end."""
        return list(self.manager.start(change).follow())


def until(holds: Callable[[], bool]) -> bool:
    """Whether another thread makes it true; it has five seconds, and needs none of them."""
    never = threading.Event()
    return any(holds() or never.wait(0.005) for _ in range(1000))
