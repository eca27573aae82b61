"""`demo` as a newcomer starts it: a process of its own."""

from __future__ import annotations

import contextlib
import os
import re
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import llm_manager as lm

PATIENCE = 120.0  # seconds until it listens


@dataclass
class Demo:
    """A running `demo`: its address with the token, its process, and what it said so far."""

    url: str
    process: subprocess.Popen[str]
    said: Path

    @property
    def origin(self) -> str:
        return self.url.partition("/?")[0]


@contextlib.contextmanager
def demonstrating(folder: Path) -> Iterator[Demo]:
    """The real program; Docker is out of its reach, and folder/tmp the only place to write to."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as probe:
        port = probe.getsockname()[1]
    said, place = folder / "said", folder / "tmp"
    place.mkdir(parents=True)
    hidden = {"DOCKER_HOST": "unix:///nonexistent.sock", "HOME": "/nonexistent"}
    with said.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, str(lm.PROGRAM), "demo", "--port", str(port)],
            env=os.environ | hidden | {"TMPDIR": str(place)},
            stdout=subprocess.PIPE, stderr=file, text=True,
        )  # fmt: skip
    try:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], PATIENCE)
        assert ready, "it says nothing"
        found = re.search(r"http://\S+", process.stdout.readline())
        assert found, said.read_text()
        yield Demo(found[0], process, said)
    finally:
        process.terminate()
        process.wait(30)
        print(said.read_text())  # noqa: T201 - shown where a test fails
