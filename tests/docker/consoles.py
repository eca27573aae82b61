"""The real console of an installation, as a process of its own."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import docker
from installation import Installation, free_ports

NOWHERE = "unix:///nonexistent.sock"


def without_docker(home: Path, **variables: str) -> Installation:
    """An installation that no Docker engine answers, and that nobody needs one for."""
    client = cast("docker.DockerClient", None)
    here = Installation(client, home, variables={"DOCKER_HOST": NOWHERE} | variables)
    here.cli("image", "list")  # its state is there from now on
    return here


@contextlib.contextmanager
def serving(here: Installation, **variables: str) -> Iterator[str]:
    """The real console of an installation, and its address with the token."""
    (port,) = free_ports(1)
    console = here.popen("serve", "--port", str(port), **variables)
    try:
        assert console.stdout is not None
        assert "listens on" in console.stdout.readline()
        yield here.cli("url", "--port", str(port)).strip()
    finally:
        console.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            console.wait(20)
        console.kill()
        if console.stderr is not None:
            print(console.stderr.read())  # noqa: T201 - shown where the test fails


def resident_mib(here: Installation) -> float:
    """The most memory that the console of an installation has had so far."""
    home = f"LLM_MANAGER_HOME={here.home}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it may end while we look
            is_ours = home in (process / "environ").read_bytes().split(b"\0")
            if is_ours and b"serve" in (process / "cmdline").read_bytes().split(b"\0"):
                status = (process / "status").read_text()
                (line,) = [line for line in status.splitlines() if line.startswith("VmHWM:")]
                return int(line.split()[1]) / 1024
    raise AssertionError("no console of this installation runs")
