"""Providers: what they have and why they cannot be asked, over real sockets on loopback."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from builders import SECRET_MARK, a_secret, a_site, a_state
from fakes import Server
from hypothesis import given
from hypothesis import strategies as st

import llm_manager as lm

MODELS = {"object": "list", "data": [{"id": "small"}, {"id": "org/Large-2:q4"}]}
Answer = tuple[int, dict[str, str], bytes]


@dataclass
class Asked:
    """A server of models as it is to answer, and what it was asked."""

    answers: dict[str, Answer] = field(default_factory=dict)
    headers: list[dict[str, str]] = field(default_factory=list)
    port: int = 0

    def says(self, path: str, body: Any, status: int = 200, **headers: str) -> None:
        text = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.answers[path] = (status, headers, text)


@pytest.fixture
def there() -> Iterator[Asked]:
    asked = Asked()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.headers.append({**self.headers, "path": self.path})
            status, headers, body = asked.answers.get(self.path, (404, {}, b"no"))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        asked.port = server.server_port
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield asked
        server.shutdown()


def a_provider(port: int, **changes: Any) -> lm.Provider:
    """One on this server, as the operator writes it."""
    given = {"name": "lab", "kind": "openai", "base_url": f"http://{lm.HOST_NAME}:{port}"}
    return lm.Provider(**given | changes)


def look(provider: lm.Provider) -> lm.ProviderHealth:
    return lm.HttpProviders().look(provider, "127.0.0.1")


def fault(provider: lm.Provider) -> str:
    with pytest.raises(lm.ProviderError) as raised:
        look(provider)
    assert raised.value.advice.endswith(".")
    assert SECRET_MARK not in str(raised.value)
    return raised.value.fact


# --- what they have -----------------------------------------------------------------------------


def test_the_models_of_a_provider_are_listed_with_its_key_and_its_own_name(there: Asked) -> None:
    there.says("/v1/models", MODELS)
    health = look(a_provider(there.port, api_key=a_secret("lab")))
    assert (health.verdict, health.models) == ("answers", ("org/Large-2:q4", "small"))
    assert health.latency_ms is not None
    assert health.latency_ms > 0
    (headers,) = there.headers
    assert headers["Authorization"] == f"Bearer {lm.reveal(a_secret('lab'))}"
    assert headers["Host"] == f"{lm.HOST_NAME}:{there.port}"


def test_a_provider_without_a_key_is_sent_none(there: Asked) -> None:
    there.says("/v1/models", MODELS)
    look(a_provider(there.port))
    assert "Authorization" not in there.headers[0]


def test_below_a_path_of_its_own_its_models_are_asked_for_there(there: Asked) -> None:
    there.says("/openai/models", MODELS)
    base = f"http://{lm.HOST_NAME}:{there.port}/openai"
    assert look(a_provider(there.port, base_url=base)).models == ("org/Large-2:q4", "small")


def test_ollama_is_asked_by_its_own_interface_and_else_as_the_others(there: Asked) -> None:
    there.says("/v1/models", MODELS)
    assert look(a_provider(there.port, kind="ollama")).models == ("org/Large-2:q4", "small")
    assert [headers["path"] for headers in there.headers] == ["/api/tags", "/v1/models"]
    there.says("/api/tags", {"models": [{"name": "llama3.2:latest", "model": "llama3.2:latest"}]})
    assert look(a_provider(there.port, kind="ollama")).models == ("llama3.2:latest",)


def test_models_that_no_route_could_name_are_left_out_and_counted(there: Asked) -> None:
    names = ["ok", "a b", "", "x*", "é", "q" * 300, "with/", "line\nbreak"]
    there.says("/v1/models", {"data": [{"id": name} for name in names]})
    health = look(a_provider(there.port))
    assert (health.models, health.unusable) == (("ok",), 7)


@given(st.lists(st.text(max_size=12), unique=True, max_size=20))
def test_every_model_that_is_listed_can_be_a_member_of_a_route(names: list[str]) -> None:
    body = json.dumps({"data": [{"id": name} for name in names]}).encode()
    health = lm.parse_listed(a_provider(1), "http://x/v1/models", body, 1.0)
    for model in health.models:
        lm.parse_route({"name": "r", "members": (f"lab/{model}",)})
    assert len(health.models) + health.unusable == len(names)
    assert health.models == tuple(sorted(health.models))


# --- why they cannot be asked -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "with_key", "said"),
    [
        (401, True, "refuses the key"),
        (403, True, "refuses the key"),
        (401, False, "asks for a key"),
        (404, True, "is not there"),
        (429, True, "is asked too often"),
        (503, True, "answers with 503"),
    ],
)
def test_a_refusal_is_told_in_words(there: Asked, status: int, with_key: bool, said: str) -> None:
    there.says("/v1/models", {"error": {"message": SECRET_MARK}}, status)
    key = {"api_key": a_secret("lab")} if with_key else {}
    assert said in fault(a_provider(there.port, **key))


def test_nobody_is_sent_elsewhere_with_the_key(there: Asked) -> None:
    there.says("/v1/models", b"", 302, Location=f"http://127.0.0.1:{there.port}/other")
    there.says("/other", MODELS)
    assert "sends elsewhere, to 127.0.0.1" in fault(a_provider(there.port, api_key=a_secret("lab")))
    assert [headers["path"] for headers in there.headers] == ["/v1/models"]


@pytest.mark.parametrize(
    "body",
    [b"<html>", b"", b"\xff", b"null", b"[]", b"{}", b'{"data": {}}', b'{"data": ["a"]}', b"7"],
)
def test_what_is_no_list_of_models_is_called_that(there: Asked, body: bytes) -> None:
    there.says("/v1/models", body)
    assert "not with a list of models" in fault(a_provider(there.port))


def test_an_answer_without_end_is_not_read_to_its_end(
    there: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm.HttpProviders, "MOST_BYTES", 1000)
    there.says("/v1/models", b" " * 100_000)
    assert "more than 1000 B" in fault(a_provider(there.port))


def test_a_port_where_nobody_listens_is_told_with_what_helps_by_kind() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound and not listening: refused, and nobody takes it
        port = held.getsockname()[1]
        with pytest.raises(lm.ProviderError, match=r"nobody listens there\. .+OLLAMA_HOST") as it:
            look(a_provider(port, kind="ollama"))
    assert it.value.__cause__ is not None


def test_a_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm.HttpProviders, "READ_SECONDS", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        assert "does not answer at" in fault(a_provider(silent.getsockname()[1]))


def test_tls_where_there_is_none_is_told_apart(there: Asked) -> None:
    base = f"https://{lm.HOST_NAME}:{there.port}"
    assert "does not speak TLS there" in fault(a_provider(there.port, base_url=base))


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("[Errno -2] Name or service not known", "its name does not resolve"),
        ("[Errno -3] Temporary failure in name resolution", "its name does not resolve"),
        (
            "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed (_ssl.c:1)",
            "its certificate is not trusted",
        ),
        ("[SSL: WRONG_VERSION_NUMBER] wrong version number (_ssl.c:1)", "does not speak TLS"),
        (
            "[SSL: TLSV1_ALERT_INTERNAL_ERROR] tlsv1 alert internal error (_ssl.c:1)",
            "has no certificate for that name",
        ),
        ("[Errno 111] Connection refused", "nobody listens there"),
        ("[Errno 113] No route to host", "there is no way to it"),
        ("[Errno 101] Network is unreachable", "there is no way to it"),
        ("Server disconnected without sending a response.", "does not speak HTTP"),
        ("something new", "cannot be reached at http"),
    ],
)
@pytest.mark.parametrize("kind", lm.PROVIDER_KINDS)
def test_what_a_connection_says_becomes_a_fact_and_an_advice(
    said: str, words: str, kind: lm.ProviderKind
) -> None:
    error = lm.connection_fault(a_provider(1, kind=kind), said)
    assert words in error.fact
    assert "{" not in str(error)


# --- many, side by side -------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path)


def provide(server: Server, *providers: lm.Provider) -> None:
    server.store.save(replace(server.store.load(), providers=providers))


def test_every_provider_is_looked_at_and_no_failure_hides_another(
    server: Server, there: Asked
) -> None:
    there.says("/v1/models", MODELS)
    cloud = lm.Provider(name="cloud", kind="cloud", vendor="mistral", api_key=a_secret("cloud"))
    lost = a_provider(there.port, name="lost", base_url=f"http://127.0.0.1:{there.port}/lost")
    provide(server, lost, a_provider(there.port), cloud)
    found = server.manager.providers.all()
    assert [(health.provider, health.verdict) for health in found] == [
        ("cloud", "unknown"),
        ("lab", "answers"),
        ("lost", "fails"),
    ]
    assert "cannot be listed" in found[0].fault
    assert "is not there" in found[2].fault
    assert server.manager.providers.look("lab").models == ("org/Large-2:q4", "small")


def test_no_provider_is_nobody_to_ask(server: Server) -> None:
    assert server.manager.providers.all() == []


def test_without_docker_only_a_provider_on_this_server_cannot_be_asked(
    server: Server, there: Asked
) -> None:
    there.says("/v1/models", MODELS)
    away = a_provider(there.port, name="away", base_url=f"http://127.0.0.1:{there.port}")
    provide(server, a_provider(there.port), away)
    server.world.docker_answers = False
    away_health, lab_health = server.manager.providers.all()
    assert away_health.verdict == "answers"
    assert lab_health.fault.startswith("Docker does not answer")


# --- the gateway's way to this server ------------------------------------------------------------


def test_only_a_used_provider_on_this_server_opens_the_gateways_way_to_it() -> None:
    def hosts(*members: str, **changes: Any) -> object:
        routes = (lm.Route(name="r", members=members),) if members else ()
        state = a_state(providers=(a_provider(80, **changes),), routes=routes)
        return lm.render_gateway(state, "a", (), a_site()).extra_hosts

    assert hosts("lab/small") == {"host.docker.internal": "host-gateway"}
    assert hosts() == {}
    assert hosts("lab/small", base_url="http://10.0.0.7") == {}


def test_docker_is_told_of_the_way_to_this_server() -> None:
    spec = lm.render_database(a_state())
    assert lm.docker_arguments(spec, {})["extra_hosts"] == {}
    hosts = {lm.HOST_NAME: "host-gateway"}
    assert lm.docker_arguments(replace(spec, extra_hosts=hosts), {})["extra_hosts"] == hosts
