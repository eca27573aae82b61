"""What every test may use: golden files, and the marks that ask for Docker, a browser or a GPU."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import docker
import docker.errors
import pytest
from builders import Golden
from hypothesis import HealthCheck, settings

# No test asks the real hub, not even by mistake: this one refuses at once.
os.environ.setdefault("HF_ENDPOINT", "http://127.0.0.1:9")

pytest_plugins = ["browsing", "reporting"]
GOLDEN = Path(__file__).parent / "golden"
DOCKER_SOCKET = "unix:///var/run/docker.sock"

# Two busy cores are slow enough for Hypothesis's deadlines to lie, and a wall clock is no verdict.
settings.register_profile(
    "llm-manager", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("llm-manager")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """Compare text with tests/golden/<name>; the files keep their real extensions."""

    def check(name: str, text: str) -> None:
        if request.config.getoption("--update-golden"):
            (GOLDEN / name).write_text(text)
        assert text == (GOLDEN / name).read_text()

    return check


def listed(variable: str) -> frozenset[str]:
    """The words of one of the lists that tests/run hands over."""
    return frozenset(filter(None, os.environ.get(variable, "").replace(" ", "").split(",")))


@cache
def why_absent(kind: str) -> str | None:
    """Why what a mark asks for is not here; None where it is."""
    match kind:
        case "docker":
            without = listed("LLM_MANAGER_TESTS_WITHOUT") & {"docker", "images"}
            return f"this run has no {', '.join(without)}" if without else _why_no_engine()
        case "browser":
            found = any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
            return None if found else "no Chromium is installed"
        case "container toolkit":
            return why_absent("docker") or _why_no_toolkit()
        case "gpu" | "mig":
            return None if Path("/dev/nvidiactl").exists() else "no NVIDIA GPU"
        case _:  # a server program, such as promtool
            return None if shutil.which(kind) else f"{kind} is not installed"


def _why_no_engine() -> str | None:
    url = os.environ.get("DOCKER_HOST") or DOCKER_SOCKET
    try:
        client = docker.DockerClient(base_url=url, timeout=20)
        client.ping()
        client.close()
    except docker.errors.DockerException:
        return f"no Docker engine answers at {url}"
    return None


def _why_no_toolkit() -> str | None:
    """Whether the container toolkit of this Docker engine is the one in tests/standin/bin."""
    url = os.environ.get("DOCKER_HOST") or DOCKER_SOCKET
    with contextlib.closing(docker.DockerClient(base_url=url, timeout=60)) as client:
        # To NVIDIA's own, this would mean a container without a GPU.
        none = docker.types.DeviceRequest(device_ids=["none"], capabilities=[["gpu"]])
        container = client.containers.create(
            "llm-manager-test/base:latest", "true", device_requests=[none], network_mode="none"
        )
        try:
            container.start()
        except docker.errors.APIError as error:
            if "none: unknown device" in str(error.explanation):
                return None
        finally:
            container.remove(force=True)
    return "this Docker engine has no simulated GPUs (tests/run starts one that has)"


def need(kind: str, *, listed_as: str = "") -> None:
    """Skip where something is absent; fail where this run may not be without it."""
    reason = why_absent(kind)
    if reason is None:
        return
    if (listed_as or kind) in listed("LLM_MANAGER_TESTS_REQUIRE"):
        pytest.fail(f"{reason}, and LLM_MANAGER_TESTS_REQUIRE wants it", pytrace=False)
    pytest.skip(reason)


# What runs file by file on two processes ends soonest when no long file is left to the last.
LONGEST_FIRST = (
    "test_engines", "test_benchmark_runs", "test_engine_reports", "test_gpu_story",
    "test_library_story", "test_routing", "test_images", "test_fit_truth", "test_proofs",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {name: rank for rank, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    for kind in ("docker", "browser", "gpu", "mig"):
        if item.get_closest_marker(kind):
            need(kind)


@pytest.fixture(scope="session")
def simulated_gpus() -> None:
    """Programs and containers may use the GPUs of nvml_standin.py."""
    need("cc", listed_as="tools")
    need("container toolkit", listed_as="docker")


@pytest.fixture
def tool() -> Callable[[str], str]:
    """The path of a server program; the test is skipped where it is not installed."""

    def find(name: str) -> str:
        need(name, listed_as="tools")
        return shutil.which(name) or name

    return find
