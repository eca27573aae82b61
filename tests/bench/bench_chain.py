#!/usr/bin/env python3
"""What each part of the way to an engine adds to a request's time.

    python tests/bench/bench_chain.py [--rounds 1000]      (about two minutes)

Four ways to one engine that answers at once, so that what is added shows: to the engine itself;
through a Caddy that does nothing else; by the direct route, where the edge checks key and path; and
through edge and LiteLLM. One client with a kept-alive connection for each way asks them in turn, in
one run, plain requests one at a time, at the containers' own addresses: no way has a proxy of
Docker's in it that another has not. All but the first are HTTPS.
"""

from __future__ import annotations

import argparse
import http.client
import json
import ssl
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT.parent), str(ROOT), str(ROOT / "docker")]

import docker
import docker.errors
from docker.models.containers import Container
from installation import CADDY, DOCKER_URL, Installation, authority_of, slow_engine

import llm_manager as lm

TARGET_MS = 1.0  # the direct route over the bare engine, at p50
PATH = "/v1/chat/completions"
# Caddy alone: TLS in front of the engine, as little as it can be.
CADDYFILE = """{
	admin off
	skip_install_trust
	default_sni localhost
}
https://localhost {
	tls internal
	reverse_proxy ENGINE {
		transport http {
			keepalive 4s
		}
	}
}
"""


def say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - this is what it is for


@dataclass
class Way:
    """One way to the engine, with a connection that is kept."""

    title: str
    connection: http.client.HTTPConnection
    path: str
    key: str

    def ask(self) -> float:
        """Milliseconds until the last byte of a whole answer."""
        body = json.dumps({"model": "chat", "max_tokens": 5,
                           "messages": [{"role": "user", "content": "Count."}]})  # fmt: skip
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json",
                   "Host": "localhost"}  # fmt: skip
        start = time.perf_counter()
        self.connection.request("POST", self.path, body, headers)
        answer = self.connection.getresponse()
        said = answer.read()
        taken = (time.perf_counter() - start) * 1000
        assert answer.status == http.client.OK, said
        assert json.loads(said)["choices"][0]["message"]["content"] == "w0 w1 w2 w3 w4"
        return taken


class AtAddress(http.client.HTTPSConnection):
    """HTTPS to a container's address, under the name that its certificate is for."""

    def connect(self) -> None:
        http.client.HTTPConnection.connect(self)
        self.sock = self._context.wrap_socket(self.sock, server_hostname="localhost")


def address_of(container: Container) -> str:
    container.reload()
    (network,) = container.attrs["NetworkSettings"]["Networks"].values()
    return str(network["IPAddress"])


@contextmanager
def plain_caddy(here: Installation, engine: str, folder: Path) -> Iterator[Container]:
    """A Caddy of the installation's image and network, which knows nothing of the installation."""
    folder.mkdir()
    (folder / "Caddyfile").write_text(CADDYFILE.replace("ENGINE", engine))
    caddy = here.client.containers.run(
        CADDY, detach=True, init=True, network=lm.network_name(here.state()),
        name=f"{here.state().name_prefix}bench-caddy",
        volumes={str(folder): {"bind": "/etc/caddy", "mode": "ro"}},
    )  # fmt: skip
    try:
        yield caddy
    finally:
        caddy.remove(force=True, v=True)


def measure(ways: list[Way], rounds: int) -> dict[str, list[float]]:
    """Each way once in every round, in an order that moves on."""
    for way in ways * 20:
        way.ask()
    taken: dict[str, list[float]] = {way.title: [] for way in ways}
    for number in range(rounds):
        turn = number % len(ways)
        for way in (*ways[turn:], *ways[:turn]):
            taken[way.title].append(way.ask())
    return taken


def ways_to(here: Installation, folder: Path, held: ExitStack) -> list[Way]:
    engine = here.container("llm-model-chat-0")
    caddy = held.enter_context(
        plain_caddy(here, f"{engine.name}:{lm.ENGINE_PORT}", folder / "caddy")
    )
    alone, whole = ssl.create_default_context(cadata=until_it_has(caddy)), here.tls()
    at, edge = address_of(caddy), address_of(here.container("llm-caddy"))
    bare = http.client.HTTPConnection(address_of(engine), lm.ENGINE_PORT, timeout=60)
    engine_key, key = lm.reveal(here.state().secrets.engine_key), here.create_key("Ada", "chat")
    direct = json.loads(here.cli("direct", "create", "ada", "--model", "chat", "--json"))["key"]
    return [
        Way("bare engine", bare, PATH, engine_key),
        Way("Caddy alone", AtAddress(at, 443, timeout=60, context=alone), PATH, engine_key),
        Way("direct route", AtAddress(edge, 443, timeout=60, context=whole), f"/models/chat{PATH}",
            direct),
        Way("whole chain", AtAddress(edge, 443, timeout=60, context=whole), PATH, key),
    ]  # fmt: skip


def until_it_has(caddy: Container) -> str:
    """The authority that a Caddy makes on its first start."""
    for _ in range(100):
        try:
            return authority_of(caddy)
        except docker.errors.NotFound:
            time.sleep(0.1)
    raise TimeoutError(caddy.logs().decode())


def report(taken: dict[str, list[float]]) -> None:
    rows = {title: (statistics.median(ms), statistics.quantiles(ms, n=100)[98])
            for title, ms in taken.items()}  # fmt: skip
    bare = rows["bare engine"]
    say(f"{'':14}{'p50 ms':>9}{'p99 ms':>9}{'p50 more':>10}{'p99 more':>10}{'p50 ratio':>11}")
    for title, (p50, p99) in rows.items():
        say(f"{title:14}{p50:9.2f}{p99:9.2f}{p50 - bare[0]:+10.2f}{p99 - bare[1]:+10.2f}"
            f"{p50 / bare[0]:11.1f}")  # fmt: skip
    more = rows["direct route"][0] - bare[0]
    say(f"direct route over the bare engine at p50: {more:+.2f} ms, target {TARGET_MS:g} ms: "
        f"{'ok' if more <= TARGET_MS else 'MISSED'}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1000)
    rounds = parser.parse_args().rounds
    client = docker.DockerClient(base_url=DOCKER_URL, timeout=120)
    with tempfile.TemporaryDirectory() as name, ExitStack() as held:
        folder = Path(name)
        image = held.enter_context(slow_engine(client))
        here = Installation(client, folder / "home").prepare()
        held.callback(here.destroy)
        here.cli("model", "add", "chat", "--path", name, "--image", image)
        here.cli("deploy", "chat")
        taken = measure(ways_to(here, folder, held), rounds)
    report(taken)


if __name__ == "__main__":
    main()
