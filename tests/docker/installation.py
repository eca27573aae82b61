"""A whole installation of the program for one test: own home, ports, containers; real Docker."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import socket
import ssl
import subprocess
import sys
import tarfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import docker
import docker.errors
import httpx
import openai
import pytest
from docker.models.containers import Container
from upstreams import Upstream

import llm_manager
from llm_manager import LABEL_IMAGE_INSTANCE, LABEL_INSTANCE, Manager, State

PROGRAM = Path(llm_manager.__file__)
DOCKER_URL = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
CADDY, ENGINE = "llm-manager-test/caddy:latest", "llm-manager-test/engine:latest"
TEST_IMAGES = {
    "caddy": CADDY,
    "litellm": "llm-manager-test/litellm:latest",
    "postgres": "llm-manager-test/postgres:latest",
    "redis": "llm-manager-test/redis:latest",
    "vllm_cpu": ENGINE,
    "vllm_omni": ENGINE,
}
CHEAP = "--enforce-eager"  # a start takes about 35 s
PATIENCE = 900.0  # seconds for a command: no verdict, but a bound for what never ends


log = logging.getLogger("tests")


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on; held open together, so that they differ."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("0.0.0.0", 0))  # noqa: S104 - where Caddy will listen
        return [int(each.getsockname()[1]) for each in sockets]


@dataclass
class Installation:
    """What an operator has: a home directory, and the program that works on it."""

    client: docker.DockerClient
    home: Path
    https_port: int = 0
    http_port: int = 0
    variables: dict[str, str] = field(default_factory=dict)  # more of the program's environment
    timings: list[tuple[str, float]] = field(default_factory=list)

    def prepare(self) -> Installation:
        """Pin the test images and the ports, with the product's own commands."""
        self.https_port, self.http_port = free_ports(2)
        for role, image in TEST_IMAGES.items():
            self.cli("image", "set", role, image)
        self.cli(
            "config",
            "set",
            "--https-port",
            str(self.https_port),
            "--http-port",
            str(self.http_port),
        )
        return self

    @property
    def environment(self) -> dict[str, str]:
        own = {"LLM_MANAGER_HOME": str(self.home), "PYTHONUNBUFFERED": "1"}
        return os.environ | own | self.variables

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """The real program, to its end, whatever that is."""
        running = self.popen(*arguments, **variables)
        try:
            said, complained = running.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            running.kill()
            pytest.fail(f"`{' '.join(arguments)}` does not end:\n{running.communicate()[0]}")
        log.info("%s\n%s%s", " ".join(arguments), said, complained)  # pytest shows it on failure
        return subprocess.CompletedProcess(arguments, running.returncode, said, complained)

    def cli(self, *arguments: str, status: int = 0) -> str:
        """Its output, after it ended with this status."""
        ended = self.run(*arguments)
        assert ended.returncode == status, (
            f"`{' '.join(arguments)}` ended with {ended.returncode}\n{ended.stdout}{ended.stderr}"
        )
        return ended.stdout

    def popen(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        """The real program, while it runs."""
        return subprocess.Popen(
            [sys.executable, str(PROGRAM), *arguments],
            env=self.environment | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def lines(self, *arguments: str, **variables: str) -> Iterator[str]:
        """What it prints, line by line; its end must be a good one."""
        with self.popen(*arguments, **variables) as running:
            assert running.stdout is not None
            yield from running.stdout
            assert running.wait(60) == 0, running.stderr and running.stderr.read()

    def manager(self) -> Manager:
        """The same installation inside this process."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LLM_MANAGER_HOME", str(self.home))
            return llm_manager.open_manager()

    def add(self, name: str, path: Path, kind: str = "chat", more: str = "") -> None:
        """Register a model from one of the tiny directories."""
        where = ["--path", str(path), "--type", kind, "--cpu-kv-cache", "64"]
        # Omni's own pipelines run eagerly, and refuse to be told so.
        cheap = "" if kind in llm_manager.OMNI_TYPES else CHEAP
        self.cli("model", "add", name, *where, "--arguments", f"{cheap} {more}")

    def create_key(self, alias: str, *models: str) -> str:
        allowed = [part for model in models for part in ("--model", model)]
        return str(json.loads(self.cli("key", "create", alias, *allowed, "--json"))["key"])

    def create_direct_key(self, name: str, *models: str) -> str:
        allowed = [part for model in models for part in ("--model", model)]
        return str(json.loads(self.cli("direct", "create", name, *allowed, "--json"))["key"])

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Its time is listed at the end of the test run."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.timings.append((title, time.monotonic() - start))

    # --- what is there, past the program's own eyes ---

    def state(self) -> State:
        return llm_manager.parse_state((self.home / "config.json").read_text())

    def containers(self) -> dict[str, Container]:
        """All of this installation by their names without its prefix, stopped ones included."""
        state = self.state()
        found = self.client.containers.list(
            all=True, filters={"label": f"{LABEL_INSTANCE}={state.instance}"}, ignore_removed=True
        )
        return {str(c.name).removeprefix(state.name_prefix): c for c in found}

    def container(self, name: str) -> Container:
        return self.containers()[name]

    def logs(self) -> dict[str, str]:
        """The whole log of every container."""
        found = {}
        for name, container in self.containers().items():
            with contextlib.suppress(docker.errors.NotFound):  # it may go while we look
                found[name] = container.logs().decode(errors="replace")
        return found

    # --- what a colleague has ---

    @property
    def base_url(self) -> str:
        return f"https://localhost:{self.https_port}"

    def authority(self) -> str:
        """The certificate of this installation's own authority, as PEM."""
        return authority_of(self.container("llm-caddy"))

    def tls(self) -> ssl.SSLContext:
        """Trust in this installation's own authority, and in nothing else."""
        return ssl.create_default_context(cadata=self.authority())

    def http(self, key: str) -> httpx.Client:
        return httpx.Client(
            base_url=self.base_url,
            headers={"Authorization": f"Bearer {key}"},
            verify=self.tls(),
            timeout=60,
            trust_env=False,
        )

    def openai(self, key: str, way: str = "/v1") -> openai.OpenAI:
        """The client that colleagues use; no retry may hide a failed request."""
        return openai.OpenAI(
            base_url=f"{self.base_url}{way}",
            api_key=key,
            max_retries=0,
            http_client=httpx.Client(verify=self.tls(), timeout=60, trust_env=False),
        )

    # --- the end ---

    def destroy(self) -> None:
        """Remove exactly what carries this installation's label, even if the test broke it."""
        if (self.home / "config.json").exists():
            remove_labelled(self.client, self.state().instance)


def remove_labelled(client: docker.DockerClient, instance: str) -> None:
    """Containers, networks, volumes and built images of one installation; nothing else."""
    mine = {"label": f"{LABEL_INSTANCE}={instance}"}
    for container in client.containers.list(all=True, filters=mine, ignore_removed=True):
        with contextlib.suppress(docker.errors.NotFound):
            container.remove(force=True, v=True)
    for network in client.networks.list(filters=mine):
        network.remove()
    for volume in client.volumes.list(filters=mine):
        volume.remove(force=True)
    for image in client.images.list(filters={"label": f"{LABEL_IMAGE_INSTANCE}={instance}"}):
        client.images.remove(image.id, force=True)


Install = Callable[..., Installation]  # the fixtures `install` and `install_for_module`


def authority_of(caddy: Container) -> str:
    """The root certificate of a Caddy's own authority, as PEM."""
    chunks, _ = caddy.get_archive("/data/caddy/pki/authorities/local/root.crt")
    with tarfile.open(fileobj=io.BytesIO(b"".join(chunks))) as archive:
        member = archive.extractfile("root.crt")
        assert member is not None
        return member.read().decode()


@contextlib.contextmanager
def built(client: docker.DockerClient, name: str, **source: Any) -> Iterator[str]:
    """An image while it is needed; `source` as for the Docker SDK's build."""
    client.images.build(tag=name, rm=True, **source)
    try:
        yield name
    finally:
        client.images.remove(name, force=True)


def slow_engine(client: docker.DockerClient) -> contextlib.AbstractContextManager[str]:
    """The image of an engine that streams at a steady pace, and starts at once."""
    # A name of this run alone: others may use the same Docker engine.
    name = f"llm-manager-slow-engine:{uuid.uuid4().hex[:8]}"
    return built(client, name, path=str(Path(__file__).with_name("slow_engine")))


def paced_engine(client: docker.DockerClient) -> contextlib.AbstractContextManager[str]:
    """The image of an engine whose speed is known, with vLLM's own load generator."""
    name = f"llm-manager-paced-engine:{uuid.uuid4().hex[:8]}"
    return built(client, name, path=str(Path(__file__).with_name("paced_engine")))


def copied_models(client: docker.DockerClient, folder: Path) -> Path:
    """The tiny models as directories of this host, copied out of the image that made them."""
    container = client.containers.create(ENGINE, network_mode="none")
    try:
        chunks, _ = container.get_archive("/models")
        with (folder / "models.tar").open("wb") as file:
            file.writelines(chunks)
    finally:
        container.remove(v=True)
    with tarfile.open(folder / "models.tar") as archive:
        archive.extractall(folder, filter="data")
    return folder / "models"


@contextlib.contextmanager
def served_outside(install: Install) -> Iterator[Installation]:
    """An endpoint whose one model, `tiny`, is served outside of Docker."""
    with Upstream("host", 0) as server:
        threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
        made = install()
        made.cli("config", "set", "--hostname", "localhost", "--hostname", llm_manager.HOST_NAME)
        url = f"http://{llm_manager.HOST_NAME}:{server.server_port}"
        made.cli("provider", "add", "mine", "--kind", "lm-studio", "--url", url)
        made.cli("route", "set", "tiny", "--member", "mine/tiny")
        made.cli("apply")
        yield made
        server.shutdown()
