"""Providers on this server and in containers: from discovery to an answer through the chain."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import docker
import openai
import pytest
from installation import Install, Installation
from upstreams import Upstream

import llm_manager as lm

pytestmark = pytest.mark.docker
BASE = "llm-manager-test/base:latest"
UPSTREAMS = Path(__file__).with_name("upstreams.py")


@pytest.fixture
def on_this_server() -> Iterator[Upstream]:
    """A server of models outside of Docker."""
    with Upstream("host", 0) as server:
        threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def in_a_container(docker_client: docker.DockerClient) -> Iterator[int]:
    """Another one, in a container of somebody else; the port that it publishes."""
    container = docker_client.containers.create(
        BASE,
        ["python3", "/upstreams.py", "lab"],
        ports={"8000/tcp": None},
        volumes={str(UPSTREAMS): {"bind": "/upstreams.py", "mode": "ro"}},
        init=True,
    )
    try:
        container.start()
        container.reload()
        yield int(container.ports["8000/tcp"][0]["HostPort"])
    finally:
        container.remove(force=True, v=True)


def ask(client: openai.OpenAI, model: str) -> str:
    reply = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "Hello?"}]
    )
    return reply.choices[0].message.content or ""


def ask_streamed(client: openai.OpenAI, model: str) -> str:
    stream = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "Hello?"}], stream=True
    )
    return "".join(c.choices[0].delta.content or "" for c in stream if c.choices)


def health(here: Installation, name: str) -> lm.ProviderHealth:
    return here.manager().providers.look(name)


def add(here: Installation, name: str, kind: str, url: str, key: str = "") -> None:
    key_file = here.home / "typed-key"
    key_file.write_text(key)
    here.cli("provider", "add", name, "--kind", kind, "--url", url, "--key-file", str(key_file))


def test_providers_are_discovered_and_answer_through_the_whole_chain(
    install: Install, on_this_server: Upstream, in_a_container: int
) -> None:
    here = install()
    here.cli("config", "set", "--hostname", "localhost", "--hostname", lm.HOST_NAME)
    add(here, "mine", "lm-studio", f"http://{lm.HOST_NAME}:{on_this_server.server_port}")
    add(here, "lab", "ollama", f"http://{lm.HOST_NAME}:{in_a_container}")
    with here.step("providers are asked for their models"):
        listed = json.loads(here.cli("provider", "list", "--json"))
        assert [(p["provider"], p["verdict"], p["models"]) for p in listed] == [
            ("lab", "answers", ["tiny:latest"]),
            ("mine", "answers", ["tiny"]),
        ]
        assert here.cli("provider", "models", "mine") == "mine/tiny\n"
    here.cli("route", "set", "tiny", "--member", "mine/tiny", "--alias", "small")
    here.cli("route", "set", "lab/*", "--member", "lab/*")
    with here.step("an endpoint without a model of its own"):
        here.cli("apply")
        assert here.cli("plan") == "Nothing to do.\n"
    with here.step("a colleague's key, and answers"):
        a_key_holds_for_an_alias_and_a_pattern(here)
    with here.step("a provider that asks for a key"):
        a_wrong_key_is_told_from_a_right_one(here)
        a_certificate_of_our_own_is_not_trusted(here)
    on_this_server.shutdown()
    on_this_server.server_close()
    assert "nobody listens there" in health(here, "mine").fault
    assert "nobody listens there" in here.cli("provider", "list", status=lm.FAILED)
    refused = here.run("provider", "remove", "mine")
    assert "no model or provider for 'mine/tiny'" in refused.stderr


def a_key_holds_for_an_alias_and_a_pattern(here: Installation) -> None:
    ada = here.openai(here.create_key("Ada", "small", "lab/*"))
    assert ask(ada, "small") == "answer of host"
    assert ask(ada, "lab/anything") == "answer of lab"
    assert ask_streamed(ada, "lab/anything") == "answer of lab"
    with pytest.raises(openai.APIStatusError) as refused:
        ask(ada, "tiny")
    assert refused.value.status_code in {401, 403}
    assert (
        "No model is served as large" in here.run("key", "create", "X", "--model", "large").stderr
    )


def a_wrong_key_is_told_from_a_right_one(here: Installation) -> None:
    """LiteLLM itself is a provider like any other, and a strict one."""
    seen = here.manager().observe().containers[lm.gateway_name(here.state(), "a")]
    url = f"http://{seen.address}:{lm.GATEWAY_PORT}"
    add(here, "strict", "openai", url, lm.reveal(here.state().secrets.master_key))
    assert "tiny" in health(here, "strict").models
    add(here, "strict", "openai", url, "sk-of-somebody-else")
    assert "refuses the key" in health(here, "strict").fault
    add(here, "strict", "openai", url)
    assert "asks for a key" in health(here, "strict").fault
    here.cli("provider", "remove", "strict")


def a_certificate_of_our_own_is_not_trusted(here: Installation) -> None:
    add(here, "edge", "openai", f"https://{lm.HOST_NAME}:{here.https_port}")
    assert "its certificate is not trusted" in health(here, "edge").fault
    here.cli("provider", "remove", "edge")
