"""LiteLLM's own routing, with upstreams that fail on command: one LiteLLM serves all tests."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self

import docker
import httpx
import pytest
from docker.models.containers import Container

import llm_manager as lm

pytestmark = pytest.mark.docker
BASE, LITELLM = "llm-manager-test/base:latest", "llm-manager-test/litellm:latest"
REDIS, POSTGRES = "llm-manager-test/redis:latest", "llm-manager-test/postgres:latest"
MASTER_KEY, PASSWORD = "sk-the-master-key-of-a-test", "of-a-test"
UPSTREAMS = ("one", "two", "three")
COOLDOWN = 3


# --- the configuration ---


def route(name: str, *members: str, **settings: Any) -> lm.Route:
    """A route over upstreams, as `one` for the model of its own name there."""
    targets = [m if "/" in m else f"{m}/{name.removeprefix('lab/')}" for m in members]
    raw = {"name": name, "members": targets, "cooldown_seconds": COOLDOWN, **settings}
    return lm.parse_route(raw)


# Every feature, each in a route of its own: no test cools down another's replica.
ROUTES = (
    route("small", "two"),
    route("spare", "three"),
    route("busy", "one", "two"),
    route("spread", "one", "two", strategy="shuffle"),
    route("usage", "one", "two", strategy="usage"),
    route("latency", "one", "two", strategy="latency"),
    route("weighted", "one", "two", strategy="weighted", weights=[4, 1]),
    route("fragile", "one", "two", cooldown_seconds=10),
    route("hollow", "one", "two"),
    route("sloppy", "one", "two", cooldown_seconds=30),
    route("sloppy/*", "one", "two", cooldown_seconds=30),
    route("forgiven", "one", "two", failures_allowed=1, strategy="shuffle", retries=0),
    route("large", "one", fallbacks=["small", "spare"], aliases=["nickname"]),
    route("short", "one", context_fallbacks=["spare"]),
    route("lone", "one"),
    route("tried", "one", "three/cloud", strategy="in-order"),
    route("lab/*", "one"),
    route("lab/exact", "three"),
    route("reasoning", "one/member-a", "two/member-b"),
    route("code", "one/first", "two/second", strategy="in-order"),
    route("limited", "one", parallel=1, retries=0),
    route("spilling", "one", parallel=1, retries=0, fallbacks=["three/straight"]),
    route("cached", "one", cache_seconds=600),
    route("brief", "one", cache_seconds=1),
    route("hasty", "one", timeout_seconds=1, retries=0, fallbacks=["spare"]),
    route("patient", "one", retries=2),
    route("nowhere", "nowhere", fallbacks=["spare"]),
)


def state() -> lm.State:
    """An installation whose routes are these, over providers that are our upstreams."""
    made = lm.new_state(instance="a1b2c3", name_prefix="", token=lambda: MASTER_KEY[3:])
    providers = tuple(
        lm.Provider(name=name, kind="openai", base_url=f"http://{host}:8000")
        for name, host in [*zip(UPSTREAMS, UPSTREAMS, strict=True), ("nowhere", "no-such-host")]
    )
    wished = replace(made, providers=providers)
    for wanted in ROUTES:
        wished = lm.routing(asdict(wanted)).edit(wished)
    return wished


ENVIRONMENT = {
    "LITELLM_MASTER_KEY": MASTER_KEY,
    "LITELLM_MODE": "PRODUCTION",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_OFFLINE_MODE": "true",
    "DISABLE_AIOHTTP_TRANSPORT": "True",
    "DATABASE_URL": f"postgresql://litellm:{PASSWORD}@postgres:5432/litellm",
    "CACHE_URL": f"redis://:{PASSWORD}@redis:6379/0",
    "GRACEFUL_SHUTDOWN_TIMEOUT": "60",
    # A lone replica is retried with a pause, which is not what these tests are about.
    "INITIAL_RETRY_DELAY": "0.05",
    "MAX_RETRY_DELAY": "0.1",
    "JITTER": "0.05",
}


# --- what runs ---


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not in {seconds} s: {what}"
        time.sleep(0.05)


class Upstream:
    """One upstream, from outside."""

    def __init__(self, address: str) -> None:
        self._client = httpx.Client(base_url=f"http://{address}:8000", trust_env=False, timeout=10)

    def order(self, **behaviour: Any) -> None:
        self._client.post("/control", json=behaviour).raise_for_status()

    def seen(self) -> dict[str, Any]:
        return dict(self._client.get("/control").json())

    def is_up(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return self._client.get("/health").status_code == 200
        return False


class Lab:
    """LiteLLM and what it routes to, on a network of their own."""

    def __init__(self, client: docker.DockerClient, folder: Path) -> None:
        self._client = client
        self._name = f"llm-routing-test-{uuid.uuid4().hex[:8]}"
        self._network = client.networks.create(self._name)
        self._containers: dict[str, Container] = {}
        (folder / "config.yaml").write_text(lm.render_litellm_config(state(), ()))
        self._folder = folder

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for container in self._containers.values():
            container.remove(force=True, v=True)
        self._network.remove()

    def _start(self) -> None:
        script = str(Path(__file__).with_name("upstreams.py"))
        mounts = {script: {"bind": "/upstreams.py", "mode": "ro"}}
        for name in UPSTREAMS:
            self.run(name, BASE, ["python3", "/upstreams.py", name], volumes=mounts)
        self.run("redis", REDIS, ["--requirepass", PASSWORD, "--save", "", "--appendonly", "no"])
        database = {f"POSTGRES_{name}": "litellm" for name in ("USER", "DB")}
        self.run("postgres", POSTGRES, [], environment=database | {"POSTGRES_PASSWORD": PASSWORD})
        wait_until(self._has_database, "PostgreSQL answers")
        config = {str(self._folder): {"bind": "/etc/litellm", "mode": "ro"}}
        command = ["--config", "/etc/litellm/config.yaml", "--port", "4000"]
        self.run("litellm", LITELLM, command, volumes=config, environment=ENVIRONMENT)
        self.upstreams = {name: Upstream(self.address(name)) for name in UPSTREAMS}
        for name, upstream in self.upstreams.items():
            wait_until(upstream.is_up, f"upstream {name} answers", 30)
        self.wait_until_ready()

    def run(self, name: str, image: str, command: list[str], **more: Any) -> None:
        endpoint = self._client.api.create_endpoint_config(aliases=[name])
        container = self._client.containers.create(
            image, command, name=f"{self._name}-{name}", network=self._name,
            networking_config={self._name: endpoint}, **more,
        )  # fmt: skip
        self._containers[name] = container
        container.start()

    def container(self, name: str) -> Container:
        return self._containers[name]

    def address(self, name: str) -> str:
        container = self._containers[name]
        container.reload()
        return str(container.attrs["NetworkSettings"]["Networks"][self._name]["IPAddress"])

    def wait_until_ready(self) -> None:
        self.http = httpx.Client(
            base_url=f"http://{self.address('litellm')}:4000", timeout=60, trust_env=False,
            headers={"Authorization": f"Bearer {MASTER_KEY}"},
        )  # fmt: skip
        wait_until(self._is_ready, "LiteLLM answers", 240)

    def _has_database(self) -> bool:
        asked = ["pg_isready", "-q", "-h", "127.0.0.1", "-U", "litellm", "-d", "litellm"]
        return self._containers["postgres"].exec_run(asked).exit_code == 0

    def _is_ready(self) -> bool:
        container = self._containers["litellm"]
        container.reload()
        assert container.status != "exited", container.logs(tail=40).decode(errors="replace")
        with contextlib.suppress(httpx.TransportError):
            return self.http.get("/health/liveliness").status_code == 200
        return False

    # --- what a colleague does ---

    def ask(
        self, model: str, text: str = "a question", *, key: str = MASTER_KEY, **more: Any
    ) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": text}]}
        bearer = {"Authorization": f"Bearer {key}"}
        return self.http.post("/v1/chat/completions", json=body | more, headers=bearer)

    def key(self, *models: str) -> str:
        body = {"models": models, "key_alias": uuid.uuid4().hex, "key_type": "llm_api"}
        return str(self.http.post("/key/generate", json=body).raise_for_status().json()["key"])

    # --- what an operator sees ---

    def served(self) -> dict[str, int]:
        return {name: upstream.seen()["served"] for name, upstream in self.upstreams.items()}

    def in_flight(self) -> dict[str, int]:
        return {name: upstream.seen()["in_flight"] for name, upstream in self.upstreams.items()}

    def order(self, **behaviour: Any) -> None:
        """The same for all of them; by name alone, they are well."""
        for upstream in self.upstreams.values():
            upstream.order(**behaviour)

    def metric(self, name: str, **labels: str) -> float | None:
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        lines = self.http.get("/metrics/").text.splitlines()
        found = [
            float(line.rsplit(" ", 1)[1])
            for line in lines
            if line.startswith(name + "{") and all(label in line for label in wanted)
        ]
        return sum(found) if found else None


@pytest.fixture(scope="module")
def running(
    docker_client: docker.DockerClient, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Lab]:
    with Lab(docker_client, tmp_path_factory.mktemp("litellm")) as lab:
        yield lab


@pytest.fixture
def lab(running: Lab) -> Iterator[Lab]:
    """All upstreams are well, and none holds a request of an earlier test."""
    running.order()
    wait_until(lambda: not any(running.in_flight().values()), "earlier requests are over", 30)
    yield running
    running.order()


def replica(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return answer.headers["x-litellm-model-id"]


def said(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def fallbacks(answer: httpx.Response) -> int:
    return int(answer.headers["x-litellm-attempted-fallbacks"])


def retries(answer: httpx.Response) -> int:
    return int(answer.headers["x-litellm-attempted-retries"])


@contextlib.contextmanager
def held(lab: Lab, model: str, count: int) -> Iterator[list[Future[httpx.Response]]]:
    """So many requests wait at the upstreams, each sent when the one before had arrived."""
    lab.order(hold=True)
    with ThreadPoolExecutor(count) as pool:
        waiting = []
        try:
            for number in range(1, count + 1):
                waiting.append(pool.submit(lab.ask, model, f"question {number}"))
                wait_until(lambda: sum(lab.in_flight().values()) == number, "it arrived", 30)  # noqa: B023
            yield waiting
        finally:
            lab.order()
        for future in waiting:
            assert future.result(30).status_code == 200


# --- names ---


def test_the_list_shows_names_and_aliases_but_no_pattern(lab: Lab) -> None:
    names = {model["id"] for model in lab.http.get("/v1/models").json()["data"]}
    assert {"busy", "nickname", "reasoning", "code", "lab/exact"} <= names
    assert not [name for name in names if name.startswith("lab/") and name != "lab/exact"]
    assert len(names) < 40  # a pattern on the provider openai lists 190 names of OpenAI's


def test_an_alias_answers_with_its_own_name(lab: Lab) -> None:
    answer = lab.ask("nickname")
    assert said(answer) == "answer of one"
    assert answer.json()["model"] == "nickname"


def test_a_pattern_passes_any_name_on_and_an_exact_name_wins(lab: Lab) -> None:
    answer = lab.ask("lab/anything")
    assert said(answer) == "answer of one"
    assert answer.headers["x-litellm-model-name"].endswith("/anything")
    assert said(lab.ask("lab/exact")) == "answer of three"
    assert lab.ask("other/anything").status_code == 400


# --- keys ---


@pytest.mark.parametrize(
    ("allowed", "reached", "refused"),
    [
        ("large", ["large", "nickname"], ["spare", "reasoning", "large@one/large"]),
        ("nickname", ["nickname"], ["large"]),
        ("lab/*", ["lab/anything", "lab/exact"], ["spare"]),
        ("lab/exact", ["lab/exact"], ["lab/anything"]),
    ],
)
def test_a_key_reaches_what_it_names_and_the_aliases_of_that(
    lab: Lab, allowed: str, reached: list[str], refused: list[str]
) -> None:
    key = lab.key(allowed)
    answered = {name: lab.ask(name, key=key).status_code for name in (*reached, *refused)}
    assert answered == dict.fromkeys(reached, 200) | dict.fromkeys(refused, 403)


def test_a_chain_serves_a_key_that_names_its_first_model_alone(lab: Lab) -> None:
    lab.upstreams["one"].order(fail=500)
    key = lab.key("large")
    assert said(lab.ask("large", key=key)) == "answer of two"
    assert lab.ask("large", key=key, fallbacks=["lone"]).status_code == 403  # one of its own


# --- strategies ---


def test_least_busy_takes_the_replica_with_fewer_requests_in_flight(lab: Lab) -> None:
    with held(lab, "busy", 4):
        assert lab.in_flight() == {"one": 2, "two": 2, "three": 0}


def test_a_capability_spreads_its_load_over_different_models(lab: Lab) -> None:
    with held(lab, "reasoning", 4) as waiting:
        assert lab.in_flight() == {"one": 2, "two": 2, "three": 0}
    answers = [future.result() for future in waiting]
    assert {answer.json()["model"] for answer in answers} == {"reasoning"}
    names = {answer.headers["x-litellm-model-name"] for answer in answers}
    assert names == {"openai/member-a", "openai/member-b"}


def test_a_capability_with_priorities_leaves_the_first_only_when_it_fails(lab: Lab) -> None:
    assert {said(lab.ask("code")) for _ in range(4)} == {"answer of one"}
    lab.upstreams["one"].order(fail=500)
    assert {said(lab.ask("code")) for _ in range(3)} == {"answer of two"}


def test_weights_decide_how_often_a_replica_is_taken(lab: Lab) -> None:
    taken = Counter(replica(lab.ask("weighted")) for _ in range(40))
    assert taken["weighted@one/weighted"] > taken["weighted@two/weighted"] > 0  # 4 : 1


@pytest.mark.parametrize("model", ["spread", "usage"])
def test_a_pool_by_chance_or_by_usage_takes_all_its_replicas(lab: Lab, model: str) -> None:
    taken = Counter(replica(lab.ask(model)) for _ in range(24))
    assert set(taken) == {f"{model}@one/{model}", f"{model}@two/{model}"}


def test_a_pool_by_latency_prefers_the_faster_replica(lab: Lab) -> None:
    lab.upstreams["one"].order(delay=0.4)
    taken = Counter(replica(lab.ask("latency")) for _ in range(12))
    assert taken["latency@two/latency"] > taken["latency@one/latency"]


# --- fallbacks ---


@pytest.mark.parametrize("failure", [401, 404, 408, 429, 500, 502, 503, "drop"])
def test_a_fallback_answers_when_an_upstream_fails(lab: Lab, failure: int | str) -> None:
    wait_until(lambda: replica(lab.ask("large")) == "large@one/large", "its cool-down is over", 30)
    lab.upstreams["one"].order(fail=failure)
    answer = lab.ask("large")
    assert said(answer) == "answer of two"
    assert fallbacks(answer) == 1


def test_fallbacks_come_in_order(lab: Lab) -> None:
    for name in ("one", "two"):
        lab.upstreams[name].order(fail=503)
    assert said(lab.ask("large")) == "answer of three"
    assert lab.upstreams["two"].seen()["served"] > 0


def test_a_fallback_holds_for_streams_that_have_not_begun(lab: Lab) -> None:
    lab.upstreams["one"].order(fail=500)
    answer = lab.ask("large", stream=True)
    assert "two" in answer.text
    assert answer.text.rstrip().endswith("[DONE]")


def test_a_stream_that_breaks_ends_with_an_error_and_is_not_begun_again(lab: Lab) -> None:
    wait_until(lambda: replica(lab.ask("large")) == "large@one/large", "its cool-down is over", 30)
    lab.order()
    lab.upstreams["one"].order(fail="break")
    answer = lab.ask("large", stream=True)
    assert '"content":"answer "' in answer.text
    assert 'data: {"error"' in answer.text
    assert lab.served() == {"one": 1, "two": 0, "three": 0}


def test_an_unreachable_upstream_is_a_reason_to_fall_back(lab: Lab) -> None:
    assert said(lab.ask("nowhere")) == "answer of three"


def test_a_timeout_is_a_reason_to_fall_back(lab: Lab) -> None:
    lab.upstreams["one"].order(hold=True)
    assert said(lab.ask("hasty")) == "answer of three"


def test_a_clients_own_mistake_does_not_travel_down_the_chain(lab: Lab) -> None:
    lab.order()
    lab.upstreams["one"].order(fail=400)
    assert lab.ask("large").status_code == 400
    assert lab.served() == {"one": 1, "two": 0, "three": 0}


def test_a_client_can_refuse_fallbacks(lab: Lab) -> None:
    wait_until(lambda: replica(lab.ask("large")) == "large@one/large", "its cool-down is over", 30)
    lab.upstreams["one"].order(fail=500)
    assert lab.ask("large", disable_fallbacks=True).status_code == 500


def test_an_alias_falls_back_like_its_route(lab: Lab) -> None:
    lab.upstreams["one"].order(fail=500)
    assert said(lab.ask("nickname")) == "answer of two"


def test_a_context_too_long_has_a_chain_of_its_own(lab: Lab) -> None:
    lab.upstreams["one"].order(fail="context")
    assert said(lab.ask("short")) == "answer of three"
    answer = lab.ask("lone")
    assert answer.status_code == 400
    assert "maximum context length is 512 tokens" in answer.text


def test_a_provider_takes_over_from_a_local_model_of_the_same_name(lab: Lab) -> None:
    assert {replica(lab.ask("tried")) for _ in range(3)} == {"tried@one/tried"}
    lab.upstreams["one"].order(fail=503)
    answer = lab.ask("tried")
    assert replica(answer) == "tried@three/cloud"
    assert (retries(answer), fallbacks(answer)) == (1, 0)


# --- circuit breaker ---


def test_a_replica_that_fails_is_left_out_and_comes_back(lab: Lab) -> None:
    def is_left_out() -> bool:
        assert replica(lab.ask("fragile")) == "fragile@two/fragile"  # nobody is refused meanwhile
        labels = {"model_id": "fragile@one/fragile", "exception_status": "500"}
        return lab.metric("litellm_deployment_cooled_down_total", **labels) == 1

    one = {"model_id": "fragile@one/fragile"}
    lab.upstreams["one"].order(fail=500)
    wait_until(is_left_out, "it is left out", 30)
    assert lab.metric("litellm_deployment_state", **one) == 1
    before = lab.served()["one"]
    assert {replica(lab.ask("fragile")) for _ in range(4)} == {"fragile@two/fragile"}
    assert lab.served()["one"] == before
    lab.upstreams["one"].order()
    wait_until(lambda: replica(lab.ask("fragile")) == "fragile@one/fragile", "it is back", 30)
    wait_until(lambda: lab.metric("litellm_deployment_state", **one) == 0, "well", 10)


@pytest.mark.parametrize("model", ["sloppy", "sloppy/served-by-vllm"])
def test_what_a_client_does_wrong_takes_no_replica_from_the_others(lab: Lab, model: str) -> None:
    key = lab.key("sloppy", "sloppy/*")
    for wrong in WRONG:
        lab.order(delay=2 if "timeout" in str(wrong) else 0)
        for _ in range(3):
            assert lab.ask(model, key=key, **wrong).status_code >= 400
        lab.order()
        assert lab.ask(model).status_code == 200, wrong


# LiteLLM answers some of these with 500, and counts a failure of the replica.
WRONG: tuple[dict[str, Any], ...] = (
    {"messages": "a text"},
    {"messages": [{"role": "user", "content": 5}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    {"response_format": "a text"},
    {"extra_body": 3},
    {"headers": 3},
    {"timeout": "soon"},
    {"timeout": 0.2},
    {"stream_timeout": 0.2, "stream": True},
    {"custom_llm_provider": "anthropic"},
    {"mock_testing_fallbacks": True},
)


def test_a_failure_that_is_allowed_leaves_a_replica_in(lab: Lab) -> None:
    lab.upstreams["one"].order(fail=500)

    def failures() -> int:
        return [lab.ask("forgiven").status_code for _ in range(4)].count(500)

    seen = 0
    while (
        lab.metric("litellm_deployment_cooled_down_total", model_id="forgiven@one/forgiven") is None
    ):
        seen += failures()
        assert seen < 40
    assert seen > 1  # the first was forgiven


def test_a_pool_that_is_cooling_down_as_a_whole_says_when_to_come_again(lab: Lab) -> None:
    lab.order(fail=500)
    wait_until(lambda: lab.ask("hollow").status_code == 429, "both are left out", 30)
    answer = lab.ask("hollow")
    assert answer.status_code == 429
    assert 0 < int(answer.headers["retry-after"]) <= COOLDOWN


def test_a_lone_replica_without_a_chain_is_never_left_out(lab: Lab) -> None:
    lab.upstreams["one"].order(fail=500)
    assert [lab.ask("lone").status_code for _ in range(4)] == [500] * 4
    lab.order()
    assert said(lab.ask("lone")) == "answer of one"


def test_a_failed_request_is_tried_again(lab: Lab) -> None:
    lab.upstreams["one"].order(fail=500, times=2)
    answer = lab.ask("patient")
    assert said(answer) == "answer of one"
    assert retries(answer) == 2


def test_metrics_are_for_the_master_key_and_name_no_caller(lab: Lab) -> None:
    address = str(lab.http.base_url)
    for key in ("", "sk-of-somebody-else", lab.key("lone")):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        answer = httpx.get(f"{address}/metrics/", headers=headers, trust_env=False)
        assert answer.status_code == 401
    lab.ask("lone", user="ada@example.org")
    wait_until(
        lambda: bool(
            lab.metric("litellm_deployment_success_responses_total", model_id="lone@one/lone")
        ),
        "counted",
        10,
    )
    text = "".join(
        line for line in lab.http.get("/metrics/").text.splitlines() if line.startswith("litellm_")
    )
    assert "model_id" in text
    for caller in ("ada@example.org", "api_key", "user", "team", "client_ip"):
        assert caller not in text


# --- concurrency ---


def test_a_full_model_refuses_at_once(lab: Lab) -> None:
    with held(lab, "limited", 1):
        answer = lab.ask("limited")
        assert answer.status_code == 429
        assert "max_parallel_requests" in answer.text
        assert lab.served()["one"] == 1
    assert said(lab.ask("limited")) == "answer of one"  # a refusal is no failure of the replica


def test_a_full_model_spills_into_its_chain(lab: Lab) -> None:
    lab.upstreams["one"].order(hold=True)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lab.ask, "spilling")
        wait_until(lambda: lab.in_flight()["one"] == 1, "it arrived", 30)
        assert said(lab.ask("spilling")) == "answer of three"
        lab.order()
        assert said(waiting.result(30)) == "answer of one"


# --- cache ---


def test_only_the_chosen_models_are_cached(lab: Lab) -> None:
    text = uuid.uuid4().hex
    first, second = lab.ask("cached", text), lab.ask("cached", text)
    assert first.json()["id"] == second.json()["id"]
    assert "x-litellm-cache-key" not in first.headers
    assert second.headers["x-litellm-cache-key"].startswith("llm:")
    assert lab.served()["one"] == 1
    assert lab.ask("lone", text).json()["id"] != lab.ask("lone", text).json()["id"]
    wait_until(
        lambda: bool(lab.metric("litellm_cache_hits_metric_total", model_id="cached@one/cached")),
        "counted",
        10,
    )


def test_a_cached_answer_expires(lab: Lab) -> None:
    text = uuid.uuid4().hex
    first = lab.ask("brief", text).json()["id"]
    wait_until(lambda: lab.ask("brief", text).json()["id"] != first, "it is asked again", 30)


def test_a_stream_is_cached_too(lab: Lab) -> None:
    text = uuid.uuid4().hex
    first, second = (lab.ask("cached", text, stream=True) for _ in range(2))
    assert lab.served()["one"] == 1
    assert "x-litellm-cache-key" in second.headers
    assert first.text.count("data:") == second.text.count("data:")


def test_a_client_can_pass_the_cache(lab: Lab) -> None:
    text = uuid.uuid4().hex
    lab.ask("cached", text)
    assert "x-litellm-cache-key" not in lab.ask("cached", text, cache={"no-cache": True}).headers


def test_requests_go_on_while_the_cache_is_down(lab: Lab) -> None:
    text = uuid.uuid4().hex
    lab.container("redis").stop(timeout=5)
    try:
        assert [said(lab.ask(model, text)) for model in ("cached", "lone")] == ["answer of one"] * 2
        lab.upstreams["one"].order(fail=500)
        assert said(lab.ask("large", text)) == "answer of two"
    finally:
        lab.container("redis").start()
    lab.order()
    wait_until(lambda: "x-litellm-cache-key" in lab.ask("cached", text).headers, "hits again", 90)


# --- the end ---


def test_a_stopping_gateway_finishes_what_it_began(lab: Lab) -> None:
    lab.upstreams["one"].order(gap=0.5)
    lab.upstreams["three"].order(hold=True)
    with ThreadPoolExecutor(3) as pool:
        stream = pool.submit(lab.ask, "lone", stream=True)
        plain = pool.submit(lab.ask, "spare")
        wait_until(lambda: sum(lab.in_flight().values()) == 2, "both arrived", 30)
        stopping = pool.submit(lab.container("litellm").stop, timeout=60)
        wait_until(lambda: not accepts(lab), "nothing new is taken", 30)
        threading.Timer(1, lab.upstreams["three"].order).start()
        assert said(plain.result(60)) == "answer of three"
        assert stream.result(60).text.rstrip().endswith("[DONE]")
        stopping.result(90)
    lab.container("litellm").start()
    lab.wait_until_ready()


def accepts(lab: Lab) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{lab.http.base_url}/health/liveliness", trust_env=False).is_success
    return False
