"""The two proofs on a whole installation: green as it is, red when something is opened by hand."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from docker.models.containers import Container
from installation import Install, Installation

import llm_manager as lm

pytestmark = pytest.mark.docker
REDIS = "llm-manager-test/redis:latest"


@pytest.fixture(scope="module")
def here(install_for_module: Install, tiny_models: Path) -> Installation:
    """A chat model that is reached along every way, and a route that keeps answers."""
    here = install_for_module()
    here.cli("image", "set", "redis", REDIS)
    here.cli("config", "set", "--open-routes", "yes")
    here.add("chat", tiny_models / "tiny-chat", more="--max-model-len 512")
    here.cli("model", "set", "chat", "--open-route", "yes")
    kept = lm.Route(name="kept", members=("chat",), aliases=("again",), cache_seconds=300)
    here.manager().save(
        lm.Change(title="a route with a cache", edit=lambda s: replace(s, routes=(kept,)))
    )
    with here.step("deploy with direct and open routes, and a cache"):
        here.cli("deploy", "chat")
        here.cli("direct", "create", "ada", "--model", "chat")
        here.cli("direct", "create", "everything")
    return here


def proven(here: Installation, command: str, status: int) -> Any:
    with here.step(f"{command}, {'red' if status else 'green'}"):
        return json.loads(here.cli(command, "--json", status=status))


def test_every_route_answers_as_it_should(here: Installation) -> None:
    result = proven(here, "probe", lm.DONE)
    assert result["green"]
    tried = {(r["way"], r["path"], r["key"]): r["answered"] for r in result["requests"]}
    chat = "/v1/chat/completions"
    assert tried["/v1", chat, lm.RIGHT] == 200
    assert tried["/v1", chat, lm.REVOKED] == 401
    assert tried["/models", f"/models/chat{chat}", "direct key ada"] == 200
    assert tried["/models", f"/models/chat{chat}", lm.RIGHT] == 401
    assert tried["/open", f"/open/chat{chat}", lm.WRONG] == 200
    assert tried["/open", f"/open/chat{chat}", lm.NO_KEY] == 401
    assert tried["elsewhere", "/v1/../key/list", lm.RIGHT] == 400
    assert here.cli("probe", "--last").splitlines()[-1].startswith("Green, ")


def test_the_keys_of_a_proof_are_gone_after_it(here: Installation) -> None:
    assert json.loads(here.cli("key", "list", "--json")) == []


def test_a_path_that_somebody_opened_makes_the_prober_red(here: Installation) -> None:
    caddy = here.container("llm-caddy")
    text = (here.home / "generated" / lm.CADDYFILE).read_text()
    gateway = serving(here).name
    opened = f"route {{\nhandle /metrics* {{\nreverse_proxy {gateway}:4000\n}}\n"
    assert text.count("route {\n") == 1
    load(caddy, text.replace("route {\n", opened))
    try:
        result = proven(here, "probe", lm.TO_DO)
    finally:
        load(caddy, text)
    wrong = [r for r in result["requests"] if not r["right"]]
    assert [(r["method"], r["path"]) for r in wrong] == [("GET", "/metrics")]
    assert wrong[0]["answered_by"] == "behind Caddy"
    assert here.cli("probe", "--last", status=lm.TO_DO).splitlines()[-1].startswith("RED, ")


def serving(here: Installation) -> Container:
    """LiteLLM in the slot that serves: which one, depends on how many changes there were."""
    (found,) = (c for name, c in here.containers().items() if name.startswith("llm-litellm-"))
    return found


def load(caddy: Container, text: str) -> None:
    """Let Caddy run this configuration, past the manager."""
    caddy.put_archive("/tmp", lm._tar("opened", text))  # noqa: S108
    command = ["caddy", "reload", "--config", "/tmp/opened", "--adapter", "caddyfile"]  # noqa: S108
    assert caddy.exec_run(command).exit_code == 0
    caddy.exec_run(["rm", "/tmp/opened"])  # noqa: S108 - the privacy proof would find its keys


def test_a_canary_is_found_nowhere(here: Installation) -> None:
    proof = proven(here, "privacy", lm.DONE)
    places = {place["place"].split("llm-")[-1]: place for place in proof["places"]}
    gateway = str(serving(here).name).split("llm-")[-1]
    for place in ("caddy: log", f"{gateway}: log", "model-chat-0: log", "postgres: log",
                  "postgres: volume /var/lib/postgresql/data", "postgres: every row",
                  "caddy: volume /data", "redis: every value", "home"):  # fmt: skip
        assert places[place]["control"] is True, place
        assert places[place]["size_bytes"] > 0
    sent = {request["what"]: request["answered"] for request in proof["sent"]}
    for way in ("/v1", "/models", "/open"):
        assert {sent[f"chat at {way}, {how}"] for how in ("plain", "streamed", "broken off")} == {
            200
        }
    assert sent["a prompt too long"] == sent["a broken body"] == 400
    assert not any(c.exec_run(["ls", "/.privacy-proof"]).exit_code == 0
                   for c in here.containers().values()), "what was planted is gone"  # fmt: skip


def test_a_setting_that_stores_prompts_makes_the_proof_red(here: Installation) -> None:
    path = here.home / "generated" / f"litellm-{str(serving(here).name)[-1]}" / "config.yaml"
    text = path.read_text()
    config = yaml.safe_load(text)
    config["general_settings"]["store_prompts_in_spend_logs"] = True
    config["litellm_settings"]["turn_off_message_logging"] = False
    restart(here, path, yaml.safe_dump(config))
    try:
        proof = proven(here, "privacy", lm.TO_DO)
    finally:
        restart(here, path, text)
    leaks = {(f["place"].split(": ")[-1], f["what"]) for f in proof["findings"] if not f["kept"]}
    assert ("every row", "canary: chat at /v1, plain") in leaks
    assert not any(f["what"] == lm.RIGHT for f in proof["findings"])
    run = [f["excerpt"] for f in proof["findings"]]
    assert all("•••" in excerpt for excerpt in run)
    assert here.cli("privacy", "--last", status=lm.TO_DO).splitlines()[-1].startswith("RED, ")


def restart(here: Installation, path: Path, config: str) -> None:
    """LiteLLM with this configuration, past the manager."""
    path.write_text(config)
    serving(here).restart(timeout=1)
    until = time.monotonic() + 120
    while not any(c.role == "gateway" and c.ready
                  for c in here.manager().observe().containers.values()):  # fmt: skip
        assert time.monotonic() < until, "LiteLLM does not come back"
        time.sleep(1)
