"""Fixtures of the tests on real Docker.

No `__init__.py` here: as a package, this folder would hide the Docker SDK from its tests.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import docker
import pytest
from installation import DOCKER_URL, Install, Installation, copied_models
from reporting import SHOWN, TIMINGS


@pytest.fixture(scope="session")
def docker_client() -> Iterator[docker.DockerClient]:
    client = docker.DockerClient(base_url=DOCKER_URL, timeout=120)
    yield client
    client.close()


@pytest.fixture(scope="session")
def tiny_models(
    docker_client: docker.DockerClient, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return copied_models(docker_client, tmp_path_factory.mktemp("weights"))


@pytest.fixture
def install(
    docker_client: docker.DockerClient, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Install]:
    """Makes installations that are gone after the test."""
    with installing(docker_client, tmp_path, request) as make:
        yield make


@pytest.fixture(scope="module")
def install_for_module(
    docker_client: docker.DockerClient,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Iterator[Install]:
    """The same for installations that the tests of one file share, because starts are dear."""
    folder = tmp_path_factory.mktemp("homes")
    with installing(docker_client, folder, request) as make:
        yield make


@pytest.fixture
def show(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Prints a measured result at the end of the test run, where it is seen."""
    return request.config.stash.setdefault(SHOWN, []).append


@contextlib.contextmanager
def installing(
    client: docker.DockerClient, folder: Path, request: pytest.FixtureRequest
) -> Iterator[Install]:
    made: list[Installation] = []

    def make(name: str = "home") -> Installation:
        made.append(Installation(client, folder / name))
        request.node.stash[INSTALLED] = made
        return made[-1].prepare()

    try:
        yield make
    finally:
        request.config.stash.setdefault(TIMINGS, []).extend(t for m in made for t in m.timings)
        for installation in made:
            installation.destroy()


INSTALLED = pytest.StashKey[list[Installation]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """A failed test shows what its containers said."""
    report = yield
    if report.failed:
        for node in item.listchain():
            for installation in node.stash.get(INSTALLED, []):
                attach_logs(report, installation)
    return report


def attach_logs(report: pytest.TestReport, installation: Installation) -> None:
    try:
        for name, text in installation.logs().items():
            report.sections.append((f"log of {name}", "\n".join(text.splitlines()[-40:])))
    except Exception as error:  # noqa: BLE001 - the test's own failure matters more
        report.sections.append(("container logs", f"could not be read: {error}"))
