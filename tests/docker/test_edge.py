"""The edge: a real Caddy with the generated Caddyfile, before upstreams that mirror requests."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import secrets
import ssl
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import docker
import httpx
import pytest
from builders import a_model, a_secret, a_state
from certificates import a_certificate
from docker.models.containers import Container
from fakes import until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from installation import CADDY, DOCKER_URL, free_ports, remove_labelled

import llm_manager as lm

pytestmark = pytest.mark.docker
BASE = "llm-manager-test/base:latest"
ADA, EVERY = a_secret("ada").get_secret_value(), a_secret("every").get_secret_value()
ENGINE_KEY = a_secret("engine").get_secret_value()
RIGHT = {"chat": ADA, "embed": EVERY, "voice": EVERY}
Headers = list[tuple[str, str]]


@dataclass
class Answer:
    """What came back, and what the upstream saw where one answered."""

    status: int
    headers: dict[str, str]
    body: bytes
    seen: dict[str, Any] = field(default_factory=dict)

    @property
    def sent(self) -> dict[str, str]:
        """The headers that the upstream got."""
        return dict(self.seen["headers"])


@dataclass
class Edge:
    """An edge and its upstreams, all of one installation."""

    client: docker.DockerClient
    store: lm.StateStore
    containers: lm.DockerContainers
    state: lm.State
    upstreams: dict[str, Container]
    tls: Path

    def served(self) -> tuple[lm.ServedModel, ...]:
        return lm.served_models(self.state, self.state.models)

    def load(self, **changes: Any) -> None:
        """As a plan does it: certificate, check, Caddyfile, reload."""
        self.state = replace(self.state, **changes)
        seen = lm.read_certificate(self.state.edge)
        assert seen is not None
        assert seen.fault == ""
        text = lm.render_caddyfile(self.state, "a", self.served(), seen.pem)
        self.store.write_generated(lm.CERTIFICATE, seen.pem)
        self.containers.check_caddyfile(self.spec(), text)
        self.store.write_generated(lm.CADDYFILE, text)
        if self.containers.look(lm.edge_name(self.state)) is None:
            self.containers.create(self.spec())
            assert until(lambda: self.loaded() == text)
        else:
            self.containers.reload_caddyfile(lm.edge_name(self.state))
        assert self.loaded() == text

    def loaded(self) -> str:
        with contextlib.suppress(OSError):
            answer = self.ask("GET", lm.HEALTH_PATH).body.decode()
            text = self.store.read_generated()[lm.CADDYFILE]
            return text if answer.endswith(lm.caddyfile_hash(text)) else ""
        return ""

    def spec(self) -> lm.ContainerSpec:
        site = lm.Site(
            generated=str(self.store.generated), hugging_face_home="/x", compile_caches="/x"
        )
        return lm.render_edge(self.state, site)

    def connect(self) -> http.client.HTTPSConnection:
        trust = ssl.create_default_context(cafile=str(self.tls / "fullchain.pem"))
        port = self.state.edge.https_port
        return http.client.HTTPSConnection("localhost", port, context=trust, timeout=30)

    def send(
        self, method: str, path: str, headers: Headers, body: bytes = b""
    ) -> tuple[http.client.HTTPSConnection, http.client.HTTPResponse]:
        """The request exactly as it is written here: no client of a library would send some."""
        connection = self.connect()
        connection.putrequest(method, path, skip_accept_encoding=True)
        chunked = ("Transfer-Encoding", "chunked") in headers
        for name, value in headers:
            connection.putheader(name, value)
        if body and not chunked:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders()
        with contextlib.suppress(ConnectionError):  # refused before all of it was read
            connection.send(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if chunked else body)
        return connection, connection.getresponse()

    def ask(
        self, method: str, path: str, key: str | None = None, headers: Headers | None = None,
        body: bytes = b"",
    ) -> Answer:  # fmt: skip
        given = [("Authorization", f"Bearer {key}")] if key is not None else []
        connection, response = self.send(method, path, [*given, *(headers or [])], body)
        with contextlib.closing(connection):
            content = response.read()
        answer = Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, content)
        if response.status == 200 and path != lm.HEALTH_PATH:
            answer.seen = json.loads(content)
        return answer

    def said(self) -> dict[str, str]:
        """The upstreams' logs: what reached them."""
        return {name: c.logs().decode() for name, c in self.upstreams.items()}


@pytest.fixture(scope="module")
def edge(
    docker_client: docker.DockerClient, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Edge]:
    instance = secrets.token_hex(3)
    store = lm.StateStore(tmp_path_factory.mktemp("edge"))
    store.generated.mkdir(parents=True)
    tls = a_certificate(store.home / "tls")
    state = an_edge_state(instance, tls)
    containers = lm.DockerContainers(DOCKER_URL, instance)
    containers.create_network(lm.network_name(state))
    for volume in lm.volume_names(replace(state, endpoint="running")):
        containers.create_volume(volume)
    names = [lm.gateway_name(state, "a"), *(f"{state.name_prefix}llm-model-{n}-0" for n in RIGHT)]
    upstreams = {}
    try:
        for name in names:
            upstreams[name] = a_mirror(docker_client, state, str(name))
        made = Edge(docker_client, store, containers, state, upstreams, tls)
        made.load()
        yield made
    finally:
        remove_labelled(docker_client, instance)


def an_edge_state(instance: str, tls: Path) -> lm.State:
    """Three models, of two kinds and one with two replicas; one key for all, one for chat."""
    https, http_port = free_ports(2)
    own = lm.OwnCertificate(
        certificate_path=str(tls / "fullchain.pem"), key_path=str(tls / "privkey.pem")
    )
    return a_state(
        a_model("chat", open_route=True, replicas=2),  # the second one is not there
        a_model("embed", type="embedding"),
        a_model("voice", type="text-to-speech", open_route=True),
        instance=instance,
        name_prefix=f"{instance}-",
        images=replace(lm.Images(), caddy=CADDY),
        direct_keys=(
            lm.DirectKey(name="ada", secret=a_secret("ada"), models=(lm.ModelName("chat"),)),
            lm.DirectKey(name="every", secret=a_secret("every")),
        ),
        edge=lm.Edge(
            https_port=https, http_port=http_port, tls=own, open_routes=True, max_request_mib=1
        ),
    )


def a_mirror(client: docker.DockerClient, state: lm.State, name: str) -> Container:
    script = (Path(__file__).parent / "mirror.py").read_bytes()
    container = client.containers.create(
        BASE,
        ["python3", "-u", "/mirror.py", name.removeprefix(state.name_prefix), "4000", "8000"],
        name=name,
        labels={lm.LABEL_INSTANCE: state.instance, lm.LABEL_OWNER: lm.OWNER},
        network=lm.network_name(state),
    )
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        entry = tarfile.TarInfo("mirror.py")
        entry.size = len(script)
        tar.addfile(entry, io.BytesIO(script))
    container.put_archive("/", packed.getvalue())
    container.start()
    return container


@pytest.fixture(autouse=True)
def as_it_was(edge: Edge, request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that changes what is served leaves it as it found it."""
    before = edge.state
    yield
    if edge.state != before:
        edge.load(**{f.name: getattr(before, f.name) for f in lm.fields(before)})


# --- what passes ----------------------------------------------------------------------------------

OPEN = {"chat", "voice"}
ALLOWED = [
    ("chat", "POST", "chat/completions"),
    ("chat", "POST", "completions"),
    ("chat", "POST", "responses"),
    ("chat", "GET", "models"),
    ("embed", "POST", "embeddings"),
    ("embed", "GET", "models"),
    ("voice", "POST", "audio/speech"),
    ("voice", "GET", "audio/voices"),
    ("voice", "GET", "models"),
]


@pytest.mark.parametrize(("model", "method", "path"), ALLOWED)
def test_the_paths_of_a_models_own_kind_reach_its_engine_with_the_engines_key(
    edge: Edge, model: str, method: str, path: str
) -> None:
    private: Headers = [("Cookie", "session=1"), ("X-Api-Key", "mine"), ("Api-Key", "mine")]
    ways = [("models", RIGHT[model])] + [("open", "whatever")] * (model in OPEN)
    for way, key in ways:
        answer = edge.ask(method, f"/{way}/{model}/v1/{path}?q=1", key, private)
        assert answer.status == 200
        assert (answer.seen["method"], answer.seen["path"]) == (method, f"/v1/{path}"), (
            "a query would be logged"
        )
        assert answer.seen["who"] == f"llm-model-{model}-0"
        assert answer.sent["authorization"] == f"Bearer {ENGINE_KEY}"
        assert not {"cookie", "x-api-key", "api-key"} & {*answer.sent}
        assert key not in json.dumps(answer.seen)


@pytest.mark.parametrize("path", [*lm.GATEWAY_PATHS, "models", "models/BAAI/rank:v2"])
def test_the_gateway_gets_the_clients_own_key_and_nothing_inside_comes_back(
    edge: Edge, path: str
) -> None:
    method = "GET" if path.startswith("models") else "POST"
    headers: Headers = [("Cookie", "grafana_session=1"), ("Litellm-Disable-Message-Redaction", "1")]
    answer = edge.ask(method, f"/v1/{path}", "sk-virtual", headers)
    assert answer.seen["who"] == "llm-litellm-a"
    assert answer.seen["path"] == f"/v1/{path}"
    assert answer.sent["authorization"] == "Bearer sk-virtual"
    assert not {name for name in answer.sent if name.startswith(("cookie", "litellm"))}
    told = {name for name in answer.headers if name.startswith(("x-litellm", "llm_provider"))}
    assert told == {"x-litellm-call-id", "x-litellm-model-id", "x-litellm-attempted-retries"}


# --- what does not --------------------------------------------------------------------------------

# An engine's own, LiteLLM's management, and every known way to write a path differently.
FORBIDDEN = [
    *(("GET", path) for path in (
        "/metrics", "/health", "/version", "/load", "/ping", "/docs", "/openapi.json",
        "/is_sleeping", "/v1/model/info", "/v1/files", "/v1/vector_stores", "/v1/mcp/server",
        "/v1/responses/resp_1", "/v1/chat/completions", "/v1", "/v1/", "/", "",
    )),
    *(("POST", path) for path in (
        "/invocations", "/sleep", "/wake_up", "/collective_rpc", "/tokenize", "/detokenize",
        "/pause", "/score", "/rerank", "/pooling", "/v1/pooling", "/inference/v1/generate",
        "/v1/load_lora_adapter", "/v1/omni/sleep", "/v1/models", "/v1/key/generate",
        "/v1/chat/completions/", "/v1/chat", "/v1/chat/completions/render",
        "/V1/chat/completions", "/v1/Chat/completions", "/v1/chat/completions%00",
        "/v1/../metrics", "/v1/chat/../completions", "/v1/./chat/completions",
        "/v1/%2e%2e/metrics", "/v1/%2E%2e/metrics", "/v1//chat/completions",
        "//v1/chat/completions",
        "/v1/chat%2fcompletions", "/v1/%63hat/completions", "/v1/chat\\completions",
        "/v1/chat/completions;x", "/v1/chat/completions#x", "/v1/chat%252fcompletions",
        "/..%2f..%2fv1/chat/completions", "/metrics/../v1/chat/completions",
    )),
    *((method, "/v1/chat/completions") for method in
      ("PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "post", "CONNECTED")),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), FORBIDDEN)
def test_everything_else_reaches_nobody_whatever_the_key(
    edge: Edge, method: str, path: str
) -> None:
    before = edge.said()
    for prefix, key in (("/models/chat", ADA), ("/open/chat", "x"), ("", "sk-virtual")):
        if not (prefix == "" and path == ""):
            answer = edge.ask(method, prefix + path, key)
            assert answer.status in {400, 404}, prefix
            assert answer.headers["x-content-type-options"] == "nosniff"
    assert edge.said() == before


@pytest.mark.parametrize(
    "path",
    [
        "/models/absent/v1/models", "/models/chat-1/v1/models", "/Models/chat/v1/models",
        "/models/CHAT/v1/models", "/models//chat/v1/models", "/models/chat/chat/v1/models",
        "/models/v1/models", "/models", "/open", "/grafana/", "/grafana/api/health", "/ui",
        "/models/../open/chat/v1/models", "/x/models/chat/v1/models", "/models/chat/v1/embeddings",
        "/open/embed/v1/models", "/models/chat@llm-model-embed-0:8000/v1/models",
    ],
)  # fmt: skip
def test_no_other_model_or_prefix_is_there(edge: Edge, path: str) -> None:
    before = edge.said()
    for method in ("GET", "POST"):
        assert edge.ask(method, path, EVERY).status in {400, 404}
    assert edge.said() == before


# --- keys -----------------------------------------------------------------------------------------

WRONG: list[Headers] = [
    [],
    [("Authorization", "")],
    [("Authorization", "Bearer")],
    [("Authorization", "Bearer ")],
    [("Authorization", "Bearer sk-wrong-key")],
    [("Authorization", f"bearer {ADA}")],
    [("Authorization", f"Bearer  {ADA}")],
    [("Authorization", f"Bearer {ADA} x")],
    [("Authorization", f"Bearer {ADA[:-1]}")],
    [("Authorization", f"Bearer {ADA}x")],
    [("Authorization", f"Bearer {ADA.upper()}")],
    [("Authorization", f"Basic {ADA}")],
    [("Authorization", ADA)],
    [("Authorization", "Bearer *")],
    [("Authorization", "Bearer sk-*")],
    [("Authorization", "*")],
    [("Authorization", "Bearer {env.HOME}")],
    [("Authorization", "{http.request.header.Authorization}")],
    [("Authorization", f"Bearer {ADA}"), ("Authorization", f"Bearer {ADA}")],
    [("Authorization", "Bearer x"), ("Authorization", f"Bearer {ADA}")],
    [("Authorization", f"Bearer {ADA},Bearer {ADA}")],
    [("Authorization", f"Bearer {ENGINE_KEY}")],
    [("X-Api-Key", ADA)],
    [("Cookie", f"Authorization=Bearer {ADA}")],
]


@pytest.mark.parametrize("headers", WRONG, ids=str)
def test_a_direct_route_takes_its_keys_letter_by_letter(edge: Edge, headers: Headers) -> None:
    before = edge.said()
    for method, path in (("POST", "chat/completions"), ("GET", "models")):
        answer = edge.ask(method, f"/models/chat/v1/{path}", headers=headers)
        assert answer.status == 401
        assert answer.headers["www-authenticate"] == "Bearer"
    assert edge.said() == before
    fault = json.loads(answer.body)["error"]
    assert (fault["message"], fault["code"]) == ("Unauthorized", "401")


def test_a_key_is_good_for_its_models_only_and_until_it_is_revoked(edge: Edge) -> None:
    assert edge.ask("GET", "/models/chat/v1/models", ADA).status == 200
    assert edge.ask("GET", "/models/embed/v1/models", ADA).status == 401
    for model in RIGHT:
        assert edge.ask("GET", f"/models/{model}/v1/models", EVERY).status == 200
    edge.load(direct_keys=lm.revoking_direct("every").edit(edge.state).direct_keys)
    assert edge.ask("GET", "/models/chat/v1/models", EVERY).status == 401
    assert edge.ask("GET", "/models/embed/v1/models", EVERY).status == 401, "without any key left"
    assert edge.ask("GET", "/models/chat/v1/models", ADA).status == 200


@pytest.mark.parametrize("headers", [*WRONG[:4], *WRONG[5:7], *WRONG[11:13], WRONG[-2]], ids=str)
def test_an_open_route_wants_a_bearer_that_is_not_empty(edge: Edge, headers: Headers) -> None:
    two_spaces = headers == WRONG[6]  # some key it is, and any is good
    answer = edge.ask("GET", "/open/chat/v1/models", headers=headers)
    assert answer.status == (200 if two_spaces else 401)


def test_the_kill_switch_closes_every_open_route_and_nothing_else(edge: Edge) -> None:
    edge.load(edge=replace(edge.state.edge, open_routes=False))
    for model in OPEN:
        assert edge.ask("GET", f"/open/{model}/v1/models", "any").status == 404
        assert edge.ask("GET", f"/models/{model}/v1/models", RIGHT[model]).status == 200
    assert edge.ask("GET", "/v1/models", "sk-virtual").status == 200


# --- sizes, streams, failures ---------------------------------------------------------------------

WAYS = [("/v1", "sk-virtual"), ("/models/chat/v1", ADA), ("/open/chat/v1", "x")]
MIB = 1024 * 1024


@pytest.mark.parametrize(("prefix", "key"), WAYS)
def test_who_is_told_to_wait_is_told_how_long(edge: Edge, prefix: str, key: str) -> None:
    path = f"{prefix}/chat/completions"
    busy, away, well = (edge.ask("POST", path, key, body=body) for body in (b"busy", b"away", b"-"))
    assert (busy.status, busy.headers.get("retry-after")) == (429, "5")
    assert (away.status, away.headers.get("retry-after")) == (503, "77")
    assert "retry-after" not in well.headers


@pytest.mark.parametrize("form", ["with its length", "chunked"])
@pytest.mark.parametrize(("prefix", "key"), WAYS)
def test_a_request_may_be_as_long_as_is_set_and_no_longer(
    edge: Edge, prefix: str, key: str, form: str
) -> None:
    headers: Headers = [("Transfer-Encoding", "chunked")] if form == "chunked" else []
    path = f"{prefix}/chat/completions"
    assert edge.ask("POST", path, key, headers, b" " * MIB).seen["size"] == MIB
    answer = edge.ask("POST", path, key, headers, b" " * (MIB + 1))
    assert answer.status == 413
    assert json.loads(answer.body)["error"]["code"] == "413"
    assert edge.ask("POST", path, key).status == 200, "nobody else is kept out for it"


@pytest.mark.parametrize(("prefix", "key"), WAYS)
def test_a_stream_is_passed_on_piece_by_piece_through_reloads_too(
    edge: Edge, prefix: str, key: str
) -> None:
    headers: Headers = [("Authorization", f"Bearer {key}")]
    connection, response = edge.send("POST", f"{prefix}/chat/completions", headers, b"hold")
    with contextlib.closing(connection):
        assert response.readline() == b"data: {}\n", "while the upstream holds the rest back"
        edge.load(edge=replace(edge.state.edge, max_request_mib=2))
        assert edge.ask("POST", f"{prefix}/chat/completions", key, body=b"release").status == 200
        assert response.read() == b"\ndata: {}\n\n"


@pytest.mark.parametrize(("prefix", "key"), WAYS)
def test_a_client_that_leaves_ends_the_upstreams_work(edge: Edge, prefix: str, key: str) -> None:
    def left() -> int:
        return sum(said.count("the client left") for said in edge.said().values())

    before = left()
    headers: Headers = [("Authorization", f"Bearer {key}")]
    connection, response = edge.send("POST", f"{prefix}/chat/completions", headers, b"drip")
    assert response.readline() == b"data: {}\n"
    assert left() == before
    response.close()
    connection.close()
    assert until(lambda: left() == before + 1)


def test_a_replica_that_is_not_there_costs_no_request(edge: Edge) -> None:
    """`chat` has two by its wish, and one that runs."""
    assert {edge.ask("POST", "/models/chat/v1/completions", ADA).status for _ in range(20)} == {200}


def test_a_request_that_reached_an_engine_is_not_sent_again(edge: Edge) -> None:
    name = f"{edge.state.name_prefix}llm-model-voice-0"
    before = edge.said()[name]
    answer = edge.ask("POST", "/models/voice/v1/audio/speech", EVERY, body=b"drop")
    assert answer.status == 502
    assert edge.said()[name].removeprefix(before) == "POST /v1/audio/speech\n"


def test_caddys_log_has_no_key_and_no_address_of_a_client(edge: Edge) -> None:
    def log() -> str:
        return edge.client.containers.get(lm.edge_name(edge.state)).logs().decode()

    private: Headers = [("X-Api-Key", "sk-canary-header"), ("Cookie", "canary-cookie")]
    private.append(("Authorization", f"Bearer {EVERY}"))
    path = "/models/voice/v1/audio/speech?canary=query"
    before = log().count("aborting with incomplete response")
    connection, response = edge.send("POST", path, private, b"drip")
    response.readline()
    response.close()
    connection.close()
    assert until(lambda: log().count("aborting with incomplete response") == before + 1)
    leaks = ("canary", EVERY, "client_ip")
    assert not [line for line in log().splitlines() if any(word in line for word in leaks)]


def test_every_answer_has_the_security_headers_and_none_names_the_server(edge: Edge) -> None:
    for path in ("/v1/models", "/models/chat/v1/models", "/nothing", "/x/../y", lm.HEALTH_PATH):
        headers = edge.ask("GET", path, "x").headers
        assert headers["strict-transport-security"] == "max-age=31536000"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["referrer-policy"] == "no-referrer"
        assert not {"server", "via", "alt-svc"} & {*headers}


def test_another_hosts_name_is_not_served_and_http_only_redirects(edge: Edge) -> None:
    connection = edge.connect()
    with contextlib.closing(connection):
        connection.request("GET", "/v1/models", headers={"Host": "other.example.org"})
        assert connection.getresponse().status == 404
    plain = http.client.HTTPConnection("localhost", edge.state.edge.http_port, timeout=30)
    with contextlib.closing(plain):
        plain.request("GET", "/v1/models")
        answer = plain.getresponse()
        assert answer.status == 308
        port = edge.state.edge.https_port
        assert answer.headers["Location"] == f"https://localhost:{port}/v1/models"


# --- certificates ---------------------------------------------------------------------------------


def test_a_renewed_certificate_is_served_and_a_running_stream_goes_on(edge: Edge) -> None:
    def shown() -> bytes:
        with contextlib.closing(edge.connect()) as connection:
            connection.connect()
            return connection.sock.getpeercert(binary_form=True) or b""

    before = shown()
    headers: Headers = [("Authorization", f"Bearer {ADA}")]
    connection, response = edge.send("POST", "/models/chat/v1/completions", headers, b"hold")
    with contextlib.closing(connection):
        assert response.readline() == b"data: {}\n"
        a_certificate(edge.tls)
        edge.load()
        renewed = shown()  # its client trusts the new one only
        assert renewed != before
        chain = (edge.tls / "fullchain.pem").read_text()
        assert renewed == ssl.PEM_cert_to_DER_cert(chain)
        assert edge.ask("POST", "/models/chat/v1/completions", ADA, body=b"release").status == 200
        assert response.read() == b"\ndata: {}\n\n"


# --- hostile input --------------------------------------------------------------------------------


class Adapter:
    """A Caddy that only translates."""

    def __init__(self, container: Container, address: str) -> None:
        self.container = container
        self._client = httpx.Client(base_url=f"http://{address}:2019", trust_env=False, timeout=30)

    def adapt(self, text: str) -> Any:
        answer = self._client.post(
            "/adapt", content=text, headers={"Content-Type": "text/caddyfile", "Host": "admin"}
        )
        assert answer.status_code == 200, answer.text
        return answer.json()["result"]

    def answers(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return self._client.get("/config/").status_code == 200
        return False


@pytest.fixture(scope="module")
def caddy(docker_client: docker.DockerClient) -> Iterator[Adapter]:
    container = docker_client.containers.run(
        CADDY,
        ["-c", "printf '{\\n admin :2019\\n}\\n' >/tmp/c; exec caddy run -c /tmp/c -a caddyfile"],
        entrypoint="sh",
        environment={"CANARY": "\n}\nexample.org {\n respond evil\n}\n"},
        detach=True,
    )
    try:
        container.reload()
        networks = container.attrs["NetworkSettings"]["Networks"].values()
        made = Adapter(container, next(network["IPAddress"] for network in networks))
        assert until(made.answers)
        yield made
    finally:
        container.remove(force=True, v=True)


def shape(value: object) -> object:
    """Structure without texts: whatever is written into a field must not change it."""
    match value:
        case dict():
            return {key: shape(inner) for key, inner in value.items()}
        case list():
            return [shape(inner) for inner in value]
        case str():
            return ""
        case _:
            return value


NASTY = st.lists(
    st.sampled_from(
        ['"', "{", "}", "\n", "\r", "`", "\\", "*", "#", "$", "%", " ", "'", "(", ")", ";", "@",
         "{env.CANARY}", "{$CANARY}", "{file./etc/passwd}", "{args[0]}", "{http.request.uri}",
         "<<X", "import", "||", "&&", "true", "a", "b.c", "-", "_", ".", "/", ":", "\u2028", "é",
         "\x00", "\x7f", "\t", "=", "?", "!", "[", "]", "^", "|", "+", "~", ",", "sk-"]
    ),
    max_size=6,
).map("".join)  # fmt: skip
FORMS = {
    "model name": (("models", 0, "name"), "a{}b"),
    "served name": (("models", 0, "served_model_name"), "a{}b"),
    "host name": (("edge", "hostnames", 0), "a{}b"),
    "key name": (("direct_keys", 0, "name"), "a{}b"),
    "key": (("direct_keys", 0, "secret"), "sk-abcdefgh{}"),
    "key's model": (("direct_keys", 0, "models", 0), "{}"),
    "engine key": (("secrets", "engine_key"), "k{}k"),
    "e-mail": (("edge", "tls", "email"), "a{}@example.org"),
    "ACME directory": (("edge", "tls", "directory_url"), "https://example.org/{}"),
    "certificate": (("edge", "tls", "certificate_path"), "/c/{}"),
    "private key": (("edge", "tls", "key_path"), "/c/{}"),
    "address": (("edge", "address"), "1{}"),
    "prefix": (("name_prefix",), "a{}-"),
}


def raw_state(form: str) -> dict[str, Any]:
    tls: dict[str, Any] = {"kind": "internal"}
    if form in {"e-mail", "ACME directory"}:
        tls = {"kind": "acme", "email": "a@example.org", "directory_url": "https://example.org/d"}
    if form in {"certificate", "private key"}:
        tls = {"kind": "own", "certificate_path": "/c/c.pem", "key_path": "/c/k.pem"}
    keys = (lm.DirectKey(name="k", secret=a_secret("k"), models=(lm.ModelName("chat"),)),
            lm.DirectKey(name="all", secret=a_secret("all")))  # fmt: skip
    state = a_state(a_model(open_route=True), direct_keys=keys, edge=lm.Edge(open_routes=True))
    raw: dict[str, Any] = json.loads(lm.render_state(state))
    raw["edge"]["tls"] = tls
    return raw


def rendered(raw: dict[str, Any]) -> str:
    """The Caddyfile of a stored state, or a ManagerError; the key's model is the model's name."""
    state = lm.parse_state(json.dumps(raw))
    return lm.render_caddyfile(state, "a", lm.served_models(state, state.models), "pem")


@pytest.mark.parametrize("form", FORMS)
def test_nothing_an_operator_can_type_breaks_out_of_its_place(caddy: Adapter, form: str) -> None:
    path, template = FORMS[form]
    plain = raw_state(form)
    if form == "key's model":
        plain["direct_keys"][0]["models"] = ["another"]
    if form == "model name":
        plain["direct_keys"][0]["models"] = []
    expected = shape(caddy.adapt(rendered(plain)))
    taken = []

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(NASTY)
    def hold(nasty: str) -> None:
        raw = json.loads(json.dumps(plain))
        *parents, last = path
        place: Any = raw
        for part in parents:
            place = place[part]
        place[last] = template.replace("{}", nasty)
        try:
            text = rendered(raw)
        except lm.ManagerError:
            return
        adapted = caddy.adapt(text)
        assert shape(adapted) == expected
        assert "evil" not in json.dumps(adapted)
        taken.append(text)

    hold()
    assert taken, "every example was refused: nothing was tried"
    if form not in {"certificate", "private key"}:
        check = caddy.container.exec_run(
            ["sh", "-c", "cat >/tmp/f <<'END-OF-FILE'\n" + taken[-1] + "END-OF-FILE\n"
             "caddy validate -c /tmp/f -a caddyfile"]
        )  # fmt: skip
        assert check.exit_code == 0, check.output
