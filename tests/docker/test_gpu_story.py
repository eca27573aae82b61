"""MIG on real containers: two simulated cards, and all else is real, the engine included.

The cards are those of nvml_standin.py; tests/standin/bin gives them to containers, as NVIDIA's
toolkit would. The engine computes on the processor. One installation is shared, because starts
are dear: every test leaves `chat` answering on a slice of GPU 0.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import docker
import nvml_standin
import openai
import pynvml
import pytest
from docker.models.containers import Container
from installation import CADDY, CHEAP, ENGINE, Install, Installation
from nvml_standin import Server, Slice
from test_story import ANSWER, Hammer, ask

from llm_manager import FAILED, TO_DO, MigPlacement

pytestmark = pytest.mark.docker
# On a GPU, vLLM would take what is free; the engine here would take that of the server's memory.
SMALL = f"{CHEAP} --kv-cache-memory-bytes 64M"
THIRD, WHOLE = ("3g.20gb", 4), ("7g.40gb", 0)
SMALL_ONES = {("1g.5gb", 0), ("1g.5gb", 1)}


@dataclass
class Lab:
    """An installation on a server with simulated GPUs, and a colleague."""

    here: Installation
    server: Server
    weights: Path
    key: str = ""

    @property
    def colleague(self) -> openai.OpenAI:
        return self.here.openai(self.key)

    @property
    def chat(self) -> Container:
        return self.here.container("llm-model-chat-0")

    @property
    def run(self) -> tuple[str, str]:
        """Which container serves `chat`, and since when: equal where nobody touched it."""
        attributes = self.chat.attrs
        return attributes["Id"], attributes["State"]["StartedAt"]

    def fails(self, *arguments: str) -> str:
        """What the program says when it cannot do this."""
        ended = self.here.run(*arguments)
        assert ended.returncode == FAILED
        assert "Traceback" not in ended.stderr
        return ended.stdout + ended.stderr

    def chat_is_on(self, wanted: Slice) -> None:
        """It answers colleagues, and has exactly the device that this slice is today."""
        uuid = self.server.devices(0)[wanted]
        assert self.here.cli("plan") == "Nothing to do.\n"
        placement = self.here.state().model("chat").placement
        assert placement == MigPlacement(
            gpu_uuid=self.server.uuid(0), profile=wanted[0], start=wanted[1]
        )
        settings = self.chat.attrs["HostConfig"]
        assert settings["DeviceRequests"] == [
            {"Driver": "", "Count": 0, "DeviceIDs": [uuid], "Capabilities": [["gpu"]],
             "Options": {}}
        ]  # fmt: skip
        assert settings["RestartPolicy"]["Name"] == "no", "dockerd would start it without its slice"
        listed = self.chat.exec_run(["nvidia-smi", "-L"]).output.decode()
        assert re.findall(r"UUID: (MIG-[^)]+)", listed) == [uuid]
        assert ask(self.colleague) == ANSWER


@pytest.fixture(scope="module")
def lab(
    simulated_gpus: None,
    install_for_module: Install,
    tiny_models: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Lab:
    """Two cut cards, and `chat` deployed on a slice of the first."""
    folder = tmp_path_factory.mktemp("gpus")
    library = nvml_standin.library(tmp_path_factory.getbasetemp() / "nvml")
    server = Server(library, folder / "server", ["A100 40 GB", "H100 80 GB"])
    weights = folder / "weights"
    shutil.copytree(tiny_models / "tiny-chat", weights / "chat")
    (weights / "gpus").write_text(f"{server.library}\n{server.state_file}\n")
    lab = Lab(install_for_module(), server, weights)
    lab.here.variables = server.environment()
    lab.here.cli("image", "set", "vllm", ENGINE)
    with lab.here.step("two cards are looked at and cut"):
        cards_are_cut(lab)
    with lab.here.step("a model is deployed on a slice"):
        lab.here.cli("model", "add", "chat", "--path", str(weights / "chat"), "--mig", THIRD[0],
                     "--arguments", f"{SMALL} --max-model-len 512")  # fmt: skip
        lab.here.cli("deploy", "chat")
        lab.key = lab.here.create_key("Ada", "chat")
        lab.chat_is_on(THIRD)
    return lab


def cards_are_cut(lab: Lab) -> None:
    here, server = lab.here, lab.server
    listed = here.cli("gpu", "list")
    assert "A100-SXM4-40GB" in listed
    assert "H100 80GB" in listed
    assert "3g.20gb, 3x 1g.5gb" in here.cli("mig", "layouts", "0").splitlines()
    planned = here.cli("mig", "plan", "0", "3g.20gb", "2x1g.5gb", status=TO_DO)
    assert planned.count("create the slice") == 3
    assert server.mig(0) == (0, 0), "a plan does nothing"
    here.cli("mig", "apply", "0", "3g.20gb", "2x1g.5gb")
    here.cli("mig", "apply", "1", "1g.10gb")
    assert server.slices(0) == {THIRD, *SMALL_ONES}
    assert {name for name, _ in server.slices(1)} == {"1g.10gb"}


@contextlib.contextmanager
def nothing_happens_to_chat(lab: Lab) -> Iterator[None]:
    """Its container is the same afterwards, and every request in between was answered."""
    before = lab.run
    hammer = Hammer(lab.colleague)
    hammer.pause = 0.2
    with hammer:
        until(lambda: hammer.answers > 0)
        yield
        answers = hammer.answers
        until(lambda: hammer.answers > answers)
    assert hammer.faults == []
    assert lab.run == before


def until(true: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 60
    while not true():
        assert time.monotonic() < give_up
        time.sleep(0.05)


def test_a_slice_in_use_stays_while_the_rest_of_its_card_is_cut_anew(lab: Lab) -> None:
    with lab.here.step("cut around a slice in use"), nothing_happens_to_chat(lab):
        lab.here.cli("mig", "apply", "0", "3g.20gb", "2g.10gb")
        cut = lab.server.slices(0)
        assert {name for name, _ in cut} == {"3g.20gb", "2g.10gb"}
        assert THIRD in cut
    with lab.here.step("a driver that lies about it"), nothing_happens_to_chat(lab):
        lab.server.lie("nvmlGpuInstanceDestroy")
        said = lab.fails("mig", "apply", "0", "3g.20gb", "2x1g.5gb")
        assert re.search("GPU 0 has|there is no room for it", said)
        assert lab.server.slices(0) == cut, "what the driver said was not believed, and all undone"
        assert lab.server.devices(0).keys() == cut
    with lab.here.step("killed in the middle of it"), nothing_happens_to_chat(lab):
        with lab.here.popen("mig", "apply", "0", "3g.20gb", "2x1g.5gb") as running:
            assert running.stdout is not None
            running.stdout.readline()
            running.kill()
        lab.here.cli("apply")
        assert lab.server.slices(0) == {THIRD, *SMALL_ONES}
    lab.chat_is_on(THIRD)


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """A process of somebody else."""
    with subprocess.Popen(["sleep", "infinity"]) as process:
        yield process
        process.kill()


@pytest.fixture
def strangers_container(lab: Lab, docker_client: docker.DockerClient) -> Iterator[Container]:
    """Somebody else's, given one of the small slices, on which nothing computes yet."""
    uuid = lab.server.devices(0)["1g.5gb", 0]
    request = docker.types.DeviceRequest(device_ids=[uuid], capabilities=[["gpu"]])
    mount = docker.types.Mount("/model", str(lab.weights / "chat"), type="bind", read_only=True)
    container = docker_client.containers.create(
        CADDY, ["infinity"], entrypoint=["sleep"], name=f"stranger-{uuid[-12:]}", mounts=[mount],
        device_requests=[request], network_mode="none", init=True,
    )  # fmt: skip
    try:
        container.start()
        yield container
    finally:
        container.remove(force=True)


def is_refused(lab: Lab, name: str) -> None:
    """The small slices cannot be changed because of this; and nothing was."""
    before = lab.run
    assert name in lab.here.cli("mig", "plan", "0", "3g.20gb", "2g.10gb", status=TO_DO)
    assert name in lab.fails("mig", "apply", "0", "3g.20gb", "2g.10gb")
    assert lab.server.slices(0) == {THIRD, *SMALL_ONES}
    assert lab.run == before
    assert lab.here.cli("plan") == "Nothing to do.\n"


def test_a_foreign_process_is_named_and_left_alone(
    lab: Lab, stranger: subprocess.Popen[bytes]
) -> None:
    name = f"sleep (process {stranger.pid})"
    lab.server.add_process(0, stranger.pid, slice=("1g.5gb", 0))
    with lab.here.step("a foreign process is in the way"):
        is_refused(lab, name)
    assert stranger.poll() is None
    lab.server.remove_process(stranger.pid)
    # On a slice that stays, neither a stranger nor our own engine is in the way.
    lab.server.add_process(0, stranger.pid, slice=THIRD)
    assert name not in lab.here.cli("mig", "plan", "0", "3g.20gb", "2g.10gb", status=TO_DO)
    lab.server.remove_process(stranger.pid)
    engine = int(lab.chat.top()["Processes"][-1][1])
    lab.server.add_process(0, engine, slice=THIRD)
    planned = lab.here.cli("mig", "plan", "0", "chat=30", status=TO_DO)
    lab.server.remove_process(engine)
    assert f"stop {lab.chat.name}: its slice goes" in planned


def test_a_foreign_container_keeps_its_idle_slice(lab: Lab, strangers_container: Container) -> None:
    with lab.here.step("a foreign container has a slice"):
        is_refused(lab, strangers_container.name)
    strangers_container.reload()
    assert strangers_container.status == "running"


def test_a_cut_that_fails_brings_back_the_layout_and_the_model(lab: Lab) -> None:
    with lab.here.step("cuts that would leave a model nowhere"):
        before = lab.run
        for wish in ("off", "7x1g.5gb"):
            assert "chat is bound to the slice 3g.20gb at 4" in lab.fails("mig", "apply", "0", wish)
        assert lab.run == before
    uuid = lab.server.devices(0)[THIRD]
    lab.server.fail(
        "nvmlDeviceCreateGpuInstanceWithPlacement", pynvml.NVML_ERROR_INSUFFICIENT_RESOURCES
    )
    with lab.here.step("a cut that fails, and the way back"):
        assert "there is no room for it" in lab.fails("mig", "apply", "0", "chat=30")
        assert lab.server.slices(0) == {THIRD, *SMALL_ONES}
        assert lab.server.devices(0)[THIRD] != uuid
        lab.chat_is_on(THIRD)


def test_a_model_moves_to_the_slice_that_it_needs(lab: Lab) -> None:
    with lab.here.step("a model moves to a larger slice"):
        lab.here.cli("mig", "apply", "0", "chat=30")
        assert lab.server.slices(0) == {WHOLE}
        lab.chat_is_on(WHOLE)


def test_a_container_that_lost_its_gpu_gets_a_new_one(lab: Lab) -> None:
    (slice_,) = lab.server.slices(0)
    before = lab.run
    lab.chat.exec_run(["touch", "/run/gpu-lost"])
    with lab.here.step("a container loses its GPU"):
        assert "it lost its GPU" in lab.here.cli("plan", status=TO_DO)
        lab.here.cli("apply")
        assert lab.run != before
        lab.chat_is_on(slice_)


def test_after_a_reboot_everything_that_can_come_back_does(lab: Lab) -> None:
    here, server = lab.here, lab.server
    (slice_,) = server.slices(0)
    where = str(lab.weights / "lost")
    here.cli("model", "add", "broken", "--path", where, "--mig", "1g.10gb", "--arguments", SMALL)
    assert "a path it mounts is not there" in lab.fails("deploy", "broken")
    with here.step("the driver is upgraded under its kernel module"), nothing_happens_to_chat(lab):
        server.mismatch()
        assert "newer than the loaded kernel module" in lab.fails("gpu", "list")
        assert "newer than the loaded kernel module" in lab.fails("apply")
    with here.step("a reboot, and what Docker alone makes of it"):
        for container in here.containers().values():
            container.kill()
        server.reboot()
        assert server.slices(0) == server.slices(1) == set()
        assert (server.mig(0), server.mig(1)) == ((1, 1), (0, 0)), "Hopper forgets MIG mode"
        with pytest.raises(docker.errors.APIError, match="unknown device"):
            lab.chat.start()
    with here.step("restore"):
        said = lab.fails("restore").splitlines()
    layouts_come_before_models(said)
    rows = [line for line in said if re.match(r"[1-6] ", line)]
    assert rows == sorted(rows, key=lambda row: row[0])
    for row in ("1 MIG layout of GPU 0: as wished", "1 MIG layout of GPU 1: as wished",
                "2 PostgreSQL: ready", "3 chat: ready", "3 broken: failed: Docker could not start",
                "4 LiteLLM: ready", "5 Caddy: ready"):  # fmt: skip
        assert [line for line in rows if line.startswith(row)], (row, said)
    here.cli("model", "remove", "broken")
    lab.chat_is_on(slice_)


def layouts_come_before_models(said: list[str]) -> None:
    cutting = [i for i, line in enumerate(said) if line.startswith(("turn on MIG", "create the"))]
    making = [i for i, line in enumerate(said) if re.match(r"create \S+-llm-model-", line)]
    assert len(cutting) == 3
    assert len(making) == 2
    assert max(cutting) < min(making)
