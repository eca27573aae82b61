"""Routes: who answers for a public name, what is refused, and what goes with what it names."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from builders import SECRET_MARK, a_model, a_secret, a_state, as_wished, but, ended, the
from fakes import Server
from hypothesis import given
from hypothesis import strategies as st

import llm_manager as lm

STATES = Path(__file__).parent / "states"
LAB = lm.Provider(name="lab", kind="ollama", base_url="http://10.0.0.7:11434")
CLOUD = lm.Provider(name="cloud", kind="cloud", vendor="mistral", api_key=a_secret("cloud"))
CHAT = a_model("chat", replicas=2)
BIG = a_model("big", served_model_name="Qwen/Big")
EMBED = a_model("embed", type="embedding")


def a_route(name: str, *members: str, **changes: Any) -> lm.Route:
    return lm.Route(name=name, members=members, **changes)


def a_routed_state(*routes: lm.Route, **changes: Any) -> lm.State:
    """Three models, of which `chat` has two replicas, and two providers."""
    given: dict[str, Any] = {"providers": (LAB, CLOUD), "routes": routes}
    return a_state(CHAT, BIG, EMBED, **given | changes)


def pools_of(state: lm.State, *, without: str = "") -> dict[str, lm.Pool]:
    """What is served while all models but one are."""
    models = [model for model in state.models if model.name != without]
    return {pool.route.name: pool for pool in lm.pools(state, lm.served_models(state, models))}


def targets(pool: lm.Pool) -> list[str]:
    return [deployment.target for deployment in pool.deployments]


# --- who answers ------------------------------------------------------------------------------


def test_a_model_without_a_route_is_a_pool_of_its_replicas_under_its_served_name() -> None:
    found = pools_of(a_routed_state())
    assert sorted(found) == ["Qwen/Big", "chat", "embed"]
    assert [d.deployment_id for d in found["chat"].deployments] == [
        "chat@llm-model-chat-0",
        "chat@llm-model-chat-1",
    ]
    assert {d.api_base for d in found["chat"].deployments} == {
        "http://llm-model-chat-0:8000/v1",
        "http://llm-model-chat-1:8000/v1",
    }


def test_a_model_and_a_providers_model_share_a_name() -> None:
    route = a_route("Qwen/Big", "big", "cloud/large")
    local, remote = pools_of(a_routed_state(route))["Qwen/Big"].deployments
    assert (local.model, local.api_key) == ("hosted_vllm/Qwen/Big", "os.environ/ENGINE_API_KEY")
    assert (remote.model, remote.api_base) == ("mistral/large", None)
    assert remote.api_key == "os.environ/PROVIDER_KEY_CLOUD"


def test_a_model_stays_callable_by_its_own_name_beside_a_route_of_another() -> None:
    found = pools_of(a_routed_state(a_route("reasoning", "chat", "big")))
    assert targets(found["reasoning"]) == ["chat", "chat", "big"]
    assert targets(found["Qwen/Big"]) == ["big"]


def test_a_pattern_asks_a_provider_for_whatever_is_named() -> None:
    (deployment,) = pools_of(a_routed_state(a_route("lab/*", "lab/*")))["lab/*"].deployments
    assert deployment.model == "hosted_vllm/*"
    assert deployment.api_base == "http://10.0.0.7:11434/v1"
    assert deployment.api_key == "none"


def test_a_route_whose_members_are_all_stopped_is_served_by_its_first_fallback_that_is() -> None:
    state = a_routed_state(a_route("smart", "big", fallbacks=("nobody", "chat", "cloud/large")))
    assert pools_of(state)["smart"].stand_in == ""
    pool = pools_of(state, without="big")["smart"]
    assert (pool.stand_in, targets(pool)) == ("chat", ["chat", "chat"])
    assert [d.deployment_id for d in pool.deployments] == [
        "smart@llm-model-chat-0",
        "smart@llm-model-chat-1",
    ]


def test_a_stand_in_is_found_along_the_fallbacks_of_a_fallback_and_no_circle_is_endless() -> None:
    first = a_route("first", "big", fallbacks=("second",))
    second = a_route("second", "big", fallbacks=("first", "lab/small"))
    found = pools_of(a_routed_state(first, second), without="big")
    assert (found["first"].stand_in, targets(found["first"])) == ("lab/small", ["lab/small"])
    circle = pools_of(a_routed_state(first, replace(second, fallbacks=("first",))), without="big")
    assert "first" not in circle


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("quick", "fast"), ("big", "Qwen/Big"), ("chat", "chat"), ("lab/small", "lab/small")],
)
def test_a_fallback_may_be_an_alias_a_model_or_a_providers_model(typed: str, meant: str) -> None:
    fast = a_route("fast", "chat", aliases=("quick",))
    smart = a_route("smart", "big", fallbacks=(typed,), context_fallbacks=(typed,))
    found = pools_of(a_routed_state(fast, smart))
    assert found["smart"].route.fallbacks == found["smart"].route.context_fallbacks == (meant,)
    assert meant in found, "LiteLLM falls back to names alone"


def test_a_public_name_is_not_taken_for_a_providers_model() -> None:
    lab_like = a_model("own", served_model_name="lab/small")
    state = a_routed_state(a_route("smart", "big", fallbacks=("lab/small",)))
    found = pools_of(state.with_model(lab_like))
    assert targets(found["lab/small"]) == ["own"]


def test_a_weight_is_the_members_share_however_many_replicas_it_has() -> None:
    route = a_route("mix", "chat", "lab/small", weights=(3, 1), strategy="weighted")
    weights = {
        d.deployment_id: d.weight for d in pools_of(a_routed_state(route))["mix"].deployments
    }
    assert list(weights.values()) == [3, 3, 2]


NAMES = st.sampled_from(["r1", "r2", "r3", "chat", "Qwen/Big"])
MEMBERS = st.sampled_from(["chat", "big", "lab/a", "lab/b", "cloud/c"])
ENDS = st.sampled_from(["r1", "r2", "r3", "alias-r1", "chat", "big", "lab/a", "lab/z"])


@st.composite
def some_routes(draw: st.DrawFn) -> tuple[lm.Route, ...]:
    routes = []
    for name in draw(st.lists(NAMES, unique=True, max_size=4)):
        members = tuple(draw(st.lists(MEMBERS, min_size=1, max_size=4, unique=True)))
        weights = tuple(draw(st.integers(1, 9)) for _ in members) if draw(st.booleans()) else ()
        routes.append(
            a_route(
                name, *members, weights=weights,
                strategy="weighted" if weights else "least-busy",
                aliases=(f"alias-{name}",) if name.startswith("r") else (),
                fallbacks=tuple(draw(st.lists(ENDS, max_size=3))),
            )
        )  # fmt: skip
    return tuple(routes)


@given(routes=some_routes(), up=st.sets(st.sampled_from(["chat", "big", "embed"])))
def test_every_pool_answers_and_every_deployment_is_told_apart(
    routes: tuple[lm.Route, ...], up: set[str]
) -> None:
    state = a_routed_state(*routes)
    served = lm.served_models(state, [model for model in state.models if model.name in up])
    found = lm.pools(state, served)
    assert [pool.route.name for pool in found] == sorted({pool.route.name for pool in found})
    assert all(pool.deployments for pool in found)
    ids = Counter(d.deployment_id for pool in found for d in pool.deployments)
    assert set(ids.values()) <= {1}
    for pool in found:
        assert all(d.target in pool.route.members for d in pool.deployments) != bool(pool.stand_in)
        if pool.route.weights and not pool.stand_in:
            assert_shares(pool)


def assert_shares(pool: lm.Pool) -> None:
    """Of the members that are served, each has its part of the whole."""
    wished = dict(zip(pool.route.members, pool.route.weights, strict=True))
    given = Counter[str]()
    for deployment in pool.deployments:
        given[deployment.target] += deployment.weight
    whole = sum(wished[target] for target in given)
    assert {t: Fraction(n, sum(given.values())) for t, n in given.items()} == {
        t: Fraction(wished[t], whole) for t in given
    }


def test_every_public_name_tells_who_serves_it_now_and_who_stands_in() -> None:
    state = a_routed_state(a_route("smart", "big", fallbacks=("chat",)), a_route("far", "lab/x"))

    def told(observed: lm.Observed) -> dict[str, tuple[list[str], str]]:
        facts = lm.pool_facts(state, lm.serving(state, observed))
        return {entry["name"]: (entry["served_by"], entry["stand_in"]) for entry in facts}

    observed = as_wished(state)
    assert told(observed) == {
        "Qwen/Big": (["big"], ""), "chat": (["chat"], ""), "embed": (["embed"], ""),
        "far": (["lab/x"], ""), "smart": (["big"], ""),
    }  # fmt: skip
    down = told(but(observed, ended(the(observed, "llm-model-big-0"))))
    assert (down["smart"], down["Qwen/Big"]) == ((["chat"], "chat"), ([], ""))
    served = lm.serving(state, but(observed, ended(the(observed, "llm-model-big-0"))))
    assert [row[-1] for row in lm.pool_rows(state, served)] == [
        "nobody", "chat", "embed", "lab/x", "chat stands in",
    ]  # fmt: skip


def test_the_providers_that_routes_use_are_known_with_their_keys_variables() -> None:
    unused = lm.Provider(name="spare-one", kind="exo", base_url="http://x")
    state = a_routed_state(
        a_route("smart", "chat", fallbacks=("cloud/large",)), providers=(LAB, CLOUD, unused)
    )
    assert lm.used_providers(state) == (CLOUD,)
    assert lm.key_variable(unused) == "PROVIDER_KEY_SPARE_ONE"


def test_a_request_may_name_routes_aliases_models_and_what_a_pattern_matches() -> None:
    state = a_routed_state(a_route("lab/*", "lab/*"), a_route("smart", "chat", aliases=("gpt-4",)))
    for name in ("lab/*", "lab/anything", "smart", "gpt-4", "chat", "Qwen/Big"):
        assert lm.is_public(name, state), name
    for name in ("big", "lab", "gpt-5", ""):
        assert not lm.is_public(name, state), name


# --- what is refused --------------------------------------------------------------------------


def check(state: lm.State) -> None:
    lm.check_state(state)
    lm.check_routes(state)


def refusal(state: lm.State) -> str:
    with pytest.raises(lm.RefusedError) as raised:
        check(state)
    return raised.value.fact


@pytest.mark.parametrize(
    ("route", "fault"),
    [
        (a_route("r", "gone"), "no model or provider for 'gone'"),
        (a_route("r", "gone/x"), "no model or provider for 'gone/x'"),
        (a_route("r", "lab/"), "no model or provider for 'lab/'"),
        (a_route("r", "chat", fallbacks=("gone",)), "nothing is called 'gone' to fall back to"),
        (a_route("r", "chat", context_fallbacks=("x/y",)), "nothing is called 'x/y' to fall"),
        (a_route("r", "chat", fallbacks=("r",)), "it falls back to itself"),
        (a_route("r", "chat", aliases=("a",), fallbacks=("a",)), "it falls back to itself as 'a'"),
        (a_route("Qwen/Big", "big", "lab/x", fallbacks=("big",)), "back to itself as 'big'"),
        (a_route("r", "chat", aliases=("r",)), "the public name 'r' is used twice"),
        (a_route("r", "chat", aliases=("Qwen/Big",)), "the public name 'Qwen/Big' is used twice"),
        (a_route("r", "chat", "chat"), "the member 'chat' is used twice"),
        (a_route("r", "chat", "embed"), "of different kinds: chat, embedding"),
        (a_route("Qwen/Big", "chat"), "the name of the model big, which is not among its members"),
        (a_route("r", "lab/*"), "a pattern like lab/* has a member like provider/*"),
        (a_route("lab/*", "lab/small"), "a pattern like lab/* has a member like provider/*"),
        (a_route("lab/*", "lab/*", aliases=("a",)), "a pattern has no aliases and no fallbacks"),
        (a_route("lab/*", "lab/*", fallbacks=("chat",)), "a pattern has no aliases and no fall"),
        (a_route("r", "chat", weights=(1,)), "weights and the strategy weighted belong together"),
        (a_route("r", "chat", strategy="weighted"), "weights and the strategy weighted belong"),
        (a_route("r", "chat", weights=(1, 2), strategy="weighted"), "members: 1, weights: 2"),
    ],
)  # fmt: skip
def test_a_route_that_cannot_be_served_is_refused_with_the_reason(
    route: lm.Route, fault: str
) -> None:
    said = refusal(a_routed_state(route))
    assert fault in said
    assert said.endswith(".")


def test_all_faults_of_all_routes_come_at_once() -> None:
    said = refusal(a_routed_state(a_route("r", "gone", "lost"), a_route("s", "away/x")))
    assert [name for name in ("gone", "lost", "away/x") if name in said] == [
        "gone",
        "lost",
        "away/x",
    ]


def test_an_old_fault_of_one_route_stops_no_change_of_another() -> None:
    broken = a_routed_state(a_route("r", "gone"))
    mended = replace(broken, routes=(*broken.routes, a_route("s", "chat")))
    lm.check_routes(mended, known=lm.route_faults(broken))


@pytest.mark.parametrize(
    ("raw", "fault"),
    [
        ({"members": ()}, "members"),
        ({"members": ("Chat",)}, "must be a model's name, or provider/model"),
        ({"name": "a b"}, "letters, digits"),
        ({"name": "*"}, "letters, digits"),
        ({"name": "a*b"}, "letters, digits"),
        ({"aliases": ("lab/*",)}, "letters, digits"),
        ({"strategy": "round-robin"}, "strategy"),
        ({"weights": (0,)}, "weights"),
        ({"timeout_seconds": 0}, "timeout_seconds"),
        ({"cache_seconds": 0}, "cache_seconds"),
        ({"speed": 1}, "speed"),
    ],
)
def test_what_is_typed_for_a_route_is_refused_with_the_field(raw: lm.Json, fault: str) -> None:
    with pytest.raises(lm.RefusedError, match=r"^This route cannot be used: ") as raised:
        lm.parse_route({"name": "r", "members": ("chat",)} | raw)
    assert fault in raised.value.fact


# --- what goes with what it names ---------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Server:
    server = Server(tmp_path)
    now = server.store.load()
    server.store.save(replace(a_routed_state(), instance=now.instance, secrets=now.secrets))
    return server


def save(server: Server, *changes: lm.Change) -> lm.State:
    for change in changes:
        server.manager.save(change)
    return server.manager.state()


def refused(server: Server, change: lm.Change) -> str:
    before = server.manager.state()
    with pytest.raises(lm.RefusedError) as raised:
        server.manager.save(change)
    assert server.manager.state() == before
    return raised.value.fact


def routed(name: str, *members: str, **more: Any) -> lm.Change:
    return lm.routing({"name": name, "members": members} | more)


def test_a_model_that_a_route_names_stays_until_the_route_does_not(server: Server) -> None:
    save(server, routed("smart", "big", "chat"))
    assert "The route smart cannot be served" in refused(server, lm.removing("big"))
    state = save(server, routed("smart", "chat"), lm.removing("big"))
    assert [model.name for model in state.models] == ["chat", "embed"]


def test_a_route_that_only_has_a_models_own_settings_goes_with_it(server: Server) -> None:
    state = save(server, routed("Qwen/Big", "big", parallel=4), lm.removing("big"))
    assert state.routes == ()


def test_a_direct_key_that_loses_its_only_model_goes_and_others_keep_the_rest(
    server: Server,
) -> None:
    keys = [
        lm.DirectKey(name=name, secret=a_secret(name), models=tuple(map(lm.ModelName, models)))
        for name, models in (("one", ["big"]), ("two", ["big", "chat"]), ("all", []))
    ]
    state = save(server, *map(lm.granting_direct, keys), lm.removing("big"))
    assert {key.name: key.models for key in state.direct_keys} == {"two": ("chat",), "all": ()}


def test_a_model_takes_no_new_name_while_a_route_falls_back_to_the_old(server: Server) -> None:
    save(server, routed("smart", "chat", fallbacks=("Qwen/Big",)))
    renamed = replace(server.manager.state().model("big"), served_model_name="Qwen/Bigger")
    change = lm.Change(title="Rename", edit=lambda state: state.with_model(renamed))
    assert "nothing is called 'Qwen/Big' to fall back to" in refused(server, change)


def test_no_model_takes_the_name_of_a_route_that_it_is_no_member_of(server: Server) -> None:
    save(server, routed("smart", "chat"))
    assert "bears the name of the model smart" in refused(server, lm.registering(a_model("smart")))


def test_a_route_is_replaced_by_its_namesake_and_removed(server: Server) -> None:
    state = save(server, routed("smart", "chat"), routed("smart", "big", retries=0))
    assert state.routes == (a_route("smart", "big", retries=0),)
    assert save(server, lm.unrouting("smart")).routes == ()
    assert "no route called 'smart'" in refused(server, lm.unrouting("smart"))


def test_a_route_to_a_provider_needs_no_deployment_to_be_served(server: Server) -> None:
    server.store.save(replace(server.store.load(), endpoint="stopped"))
    assert save(server, routed("fast", "chat")).endpoint == "stopped"
    assert save(server, routed("far", "lab/small")).endpoint == "running"


def test_a_route_or_alias_that_another_falls_back_to_stays(server: Server) -> None:
    save(server, routed("fast", "chat", aliases=["quick"]))
    save(server, routed("smart", "big", fallbacks=["fast"], context_fallbacks=["quick"]))
    said = refused(server, lm.unrouting("fast"))
    assert "'fast'" in said
    assert "'quick'" in said
    assert "'quick'" in refused(server, routed("fast", "chat"))


def test_a_route_in_a_models_place_goes_and_the_models_own_name_is_left(server: Server) -> None:
    save(server, routed("chat", "chat", "lab/small"), routed("smart", "big", fallbacks=["chat"]))
    assert save(server, lm.unrouting("chat")).routes[0].name == "smart"
    assert targets(pools_of(server.manager.state())["chat"]) == ["chat", "chat"]


def test_a_provider_that_a_route_names_stays(server: Server) -> None:
    save(server, routed("smart", "chat", fallbacks=["cloud/large"]))
    assert "'cloud/large'" in refused(server, lm.unproviding("cloud"))
    state = save(server, lm.unproviding("lab"))
    assert [provider.name for provider in state.providers] == ["cloud"]
    with pytest.raises(lm.RefusedError, match=r"no provider called 'lab'.+Providers: cloud"):
        server.manager.save(lm.unproviding("lab"))


# --- providers --------------------------------------------------------------------------------


def test_a_provider_keeps_its_key_unless_another_or_none_is_given(server: Server) -> None:
    raw = {"name": "lab", "kind": "openai", "base_url": "http://10.0.0.7"}

    def key() -> str | None:
        found = server.manager.state().provider("lab").api_key
        return found.get_secret_value() if found else None

    save(server, lm.providing(raw | {"api_key": "first"}), lm.providing(raw))
    assert key() == "first"
    save(server, lm.providing(raw | {"api_key": "second"}))
    assert key() == "second"
    save(server, lm.providing(raw | {"api_key": None}))
    assert key() is None


@pytest.mark.parametrize(
    ("raw", "fault"),
    [
        ({"base_url": None}, "of the kind ollama needs its address"),
        ({"base_url": "http://localhost:11434"}, "means the gateway's own container"),
        ({"base_url": "http://127.0.0.1"}, "means the gateway's own container"),
        ({"base_url": "http://127.1:80"}, "means the gateway's own container"),
        ({"base_url": "http://[::1]:11434"}, "means the gateway's own container"),
        ({"base_url": "http://0.0.0.0"}, "means the gateway's own container"),
        ({"base_url": "http://user:word@host"}, "holds a password"),
        ({"base_url": "http://host/v1?x=1"}, "is no server's address"),
        ({"base_url": "http://host:99999"}, "is no server's address"),
        ({"base_url": "http://host:port"}, "is no server's address"),
        ({"base_url": "http://[::1"}, "is no server's address"),
        ({"base_url": "http:///v1"}, "is no server's address"),
        ({"base_url": "ftp://host"}, "an http:// or https:// address"),
        ({"vendor": "openai"}, "of the kind ollama has no vendor"),
        ({"vendor": "a-b", "kind": "cloud"}, "LiteLLM's name of it"),
        ({"kind": "unheard-of"}, "kind"),
        ({"name": "Lab"}, "lower-case letters"),
    ],
)
def test_a_provider_that_the_gateway_could_not_use_is_refused(raw: lm.Json, fault: str) -> None:
    usual = {"name": "lab", "kind": "ollama", "base_url": "http://10.0.0.7:11434"}
    assert lm.parse_provider(usual) == LAB
    with pytest.raises(lm.RefusedError) as raised:
        lm.parse_provider(usual | raw)
    assert fault in raised.value.fact


@pytest.mark.parametrize("rest", ["\n", "\r\nX: y", " ", "é", "\x00", "x" * 1024])
def test_a_key_that_no_header_could_carry_is_refused_and_not_repeated(rest: str) -> None:
    with pytest.raises(lm.RefusedError, match="visible ASCII") as raised:
        lm.parse_provider({"name": "x", "kind": "cloud", "api_key": SECRET_MARK + rest})
    assert SECRET_MARK not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://h:1", "http://h:1/v1"),
        ("http://h:1/", "http://h:1/v1"),
        ("http://h:1/v1/", "http://h:1/v1"),
        ("https://h/openai/api", "https://h/openai/api"),
    ],
)
def test_v1_goes_without_saying_and_a_path_is_taken_as_it_is(url: str, base: str) -> None:
    assert lm.api_base(replace(LAB, base_url=url)) == base


def test_the_clouds_addresses_are_litellms_matter() -> None:
    assert lm.api_base(CLOUD) is None
    assert lm.vendor_of(CLOUD, "large") == "mistral"
    assert lm.vendor_of(replace(CLOUD, vendor=None), "*") == "cloud"


# --- states -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(STATES.glob("v*.json")), ids=lambda path: path.name)
def test_the_routes_of_a_real_state_of_every_version_can_be_served(path: Path) -> None:
    state = lm.parse_state(path.read_text())
    assert state.routes
    lm.check_routes(state)
    assert {route.name for route in state.routes} <= {*pools_of(state)}
