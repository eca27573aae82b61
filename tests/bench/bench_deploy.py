#!/usr/bin/env python3
"""What deploying through the manager costs over a plain `docker run` of the same engine.

    python tests/bench/bench_deploy.py [--rounds 3]      (two engine starts a round: about a minute)

Both sides start a new container of the same image with the same arguments and environment, and
are ready when the engine has answered the same request. They take turns, on the same machine.
The manager's time runs from the line `create …` of its job to its line `… is ready`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT.parent), str(ROOT), str(ROOT / "docker")]

import docker
import httpx
from installation import DOCKER_URL, Installation, copied_models

import llm_manager as lm

TARGET = 1.05
PLAIN = "llm-manager-bench-plain"


def say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - this is what it is for


def through_the_manager(here: Installation) -> tuple[float, float]:
    """Seconds to the ready engine, and of the whole command, gateway and edge included."""
    start = created = ready = time.monotonic()
    for line in here.lines("deploy", "chat"):
        if line.startswith("create ") and "llm-model-chat" in line:
            created = time.monotonic()
        if "llm-model-chat-0 is ready" in line:
            ready = time.monotonic()
    whole = time.monotonic() - start
    here.cli("stop", "chat")
    return ready - created, whole


def plainly(here: Installation) -> float:
    """The same container by hand: `docker run`, then ask until it answers."""
    state = here.state()
    site = lm.Site(generated="", hugging_face_home="", compile_caches="")
    spec = lm.render_engines(state, state.model("chat"), site)[0]
    options = ["--init", "--name", PLAIN, "--network", spec.network, "--shm-size"]
    options += [f"{spec.shm_mib}m", "--entrypoint", spec.entrypoint[0]]
    for name, value in spec.environment.items():
        options += ["--env", f"{name}={value if isinstance(value, str) else lm.reveal(value)}"]
    for mount in spec.mounts:
        options += ["--volume", f"{mount.source}:{mount.target}:ro"]
    start = time.monotonic()
    subprocess.run(
        ["docker", "run", "--detach", *options, spec.image, *spec.command],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    try:
        wait_for_an_answer(here.client.containers.get(PLAIN).attrs, key=spec.environment)
        return time.monotonic() - start
    finally:
        subprocess.run(["docker", "rm", "--force", PLAIN], check=True, stdout=subprocess.DEVNULL)


def wait_for_an_answer(attributes: lm.Json, *, key: object) -> None:
    (network,) = attributes["NetworkSettings"]["Networks"].values()
    asked = lm.readiness_request("chat", "chat")
    secret = key.get("VLLM_API_KEY") if isinstance(key, dict) else None
    headers = {"Authorization": f"Bearer {lm.reveal(secret)}"} if secret else {}
    address = f"http://{network['IPAddress']}:{lm.ENGINE_PORT}"
    with httpx.Client(base_url=address, headers=headers, timeout=300, trust_env=False) as engine:
        while True:
            try:
                if engine.post(asked.path, json=asked.fields).is_success:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.2)  # as often as the manager asks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    client = docker.DockerClient(base_url=DOCKER_URL, timeout=120)
    ready, whole, plain = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        here = Installation(client, Path(folder) / "home").prepare()
        try:
            weights = copied_models(client, Path(folder)) / "tiny-chat"
            here.add("chat", weights, more="--max-model-len 512")
            for number in range(rounds):
                seconds, everything = through_the_manager(here)
                ready.append(seconds)
                whole.append(everything)
                plain.append(plainly(here))
                say(f"round {number + 1}: manager {ready[-1]:.1f} s (whole deploy "
                    f"{whole[-1]:.1f} s), docker run {plain[-1]:.1f} s")  # fmt: skip
        finally:
            here.destroy()
    ratio = statistics.median(ready) / statistics.median(plain)
    medians = {"manager": ready, "whole deploy": whole, "docker run": plain}
    say(json.dumps({name: round(statistics.median(v), 2) for name, v in medians.items()}))
    say(f"ratio of medians {ratio:.3f}, target {TARGET}: {'ok' if ratio <= TARGET else 'MISSED'}")


if __name__ == "__main__":
    main()
