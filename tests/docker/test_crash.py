"""The manager is killed at every step of a change; the next plan heals whatever that left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from installation import Install, Installation

import llm_manager

pytestmark = pytest.mark.docker
ENDPOINT = {"llm-postgres", "llm-caddy"}


def what(line: str) -> str:
    """A step without its cause: `create llm-caddy from …`; a retry may have another cause."""
    return line.split(": ", maxsplit=1)[0]


def killed_at_the_first_new_step(here: Installation, seen: set[str], *command: str) -> bool:
    """Run the program, and kill it the moment it begins a step that no run before began."""
    with here.popen(*command) as running:
        assert running.stdout is not None
        for line in running.stdout:
            if line.startswith((" ", "Done in")) or what(line) in seen:
                continue
            seen.add(what(line))
            running.kill()
            return True
        assert running.wait(60) == 0, running.stderr and running.stderr.read()
    return False


def through_every_kill(here: Installation, *command: str) -> int:
    """Kill one step later each time, until a run ends by itself; how often it was killed."""
    seen: set[str] = set()
    kills = 0
    while killed_at_the_first_new_step(here, seen, *command):
        kills += 1
        json.loads((here.home / "config.json").read_text())
        assert here.run("plan").returncode in {llm_manager.DONE, llm_manager.TO_DO}
        command = ("apply",)
    assert here.cli("plan") == "Nothing to do.\n"
    assert not [name for name in here.containers() if ".aside" in name or "-check-" in name]
    return kills


def volume_born(here: Installation) -> str:
    volume = here.client.volumes.get(f"{here.state().name_prefix}llm-postgres-data")
    return str(volume.attrs["CreatedAt"])


def test_a_manager_killed_at_every_step_is_healed_by_the_next(
    install: Install, tiny_models: Path
) -> None:
    here = install()
    here.add("chat", tiny_models / "tiny-chat", more="--max-model-len 512")
    with here.step("first deployment, killed at every step"):
        assert through_every_kill(here, "deploy", "chat") >= 10
        assert {*here.containers()} == ENDPOINT | {"llm-litellm-a", "llm-model-chat-0"}
    born, ada = volume_born(here), here.create_key("Ada", "chat")
    with here.step("changed engine arguments, killed at every step"):
        here.cli("model", "set", "chat", "--arguments", "--enforce-eager --max-model-len 256")
        assert through_every_kill(here, "apply") >= 4
        assert "256" in here.container("llm-model-chat-0").attrs["Config"]["Cmd"]
        assert here.http(ada).get("/v1/models").json()["data"][0]["id"] == "chat"
    with here.step("stop, killed at every step"):
        assert through_every_kill(here, "stop", "chat") >= 5
        assert {*here.containers()} == ENDPOINT | {"llm-litellm-b"}
    assert volume_born(here) == born, "PostgreSQL's volume was never made anew"
    assert [key["alias"] for key in json.loads(here.cli("key", "list", "--json"))] == ["Ada"]
