"""Circuits from LiteLLM's counters, the picture of the ways in, its forms, and a trial's hops."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from datetime import timedelta
from typing import Any

import pytest
from builders import (
    NOW,
    a_model,
    a_secret,
    a_site,
    a_state,
    an_observed,
    as_wished,
    but,
    ended,
    the,
)
from hypothesis import example, given
from hypothesis import strategies as st

import llm_manager as lm

# What LiteLLM 1.106.2 said of itself, after requests to upstreams that fail on command.
METRICS = """
# HELP litellm_deployment_state The state of the deployment
# TYPE litellm_deployment_state gauge
litellm_deployment_state{model_id="both@good/tiny"} 0.0
litellm_deployment_state{model_id="lone@bad/tiny"} 2.0
litellm_deployment_state{model_id="lone@llm-model-chat-0"} 1.0
litellm_deployment_cooled_down_total{api_base="http://bad:8000/v1",api_provider="openai",\
exception_status="401",litellm_model_name="lone",model_id="lone@bad/tiny"} 1.0
litellm_deployment_success_responses_total{model_id="both@good/tiny"} 1204.0
litellm_deployment_success_responses_created{model_id="both@good/tiny"} 1.795e+09
litellm_deployment_failure_responses_total{exception_class="Openai.InternalServerError",\
exception_status="500",model_id="lone@llm-model-chat-0"} 3.0
litellm_deployment_failure_responses_total{exception_class="Openai.Timeout",\
exception_status="408",model_id="lone@llm-model-chat-0"} 1.0
litellm_deployment_failure_responses_total{exception_class="RouterRateLimitError",\
exception_status="None",model_id=""} 8.0
litellm_deployment_successful_fallbacks_total{fallback_model="solo",requested_model="lone"} 2.0
litellm_cache_hits_metric_total{model_id="both@good/tiny"} 301.0
litellm_in_flight_requests 1.0
"""


def test_litellms_counters_are_read_by_deployment() -> None:
    figures = lm.parse_figures(METRICS)
    assert figures.fallbacks == {("lone", "solo"): 2}
    assert figures.deployments == {
        "both@good/tiny": lm.DeploymentFigures(successes=1204, cache_hits=301),
        "lone@bad/tiny": lm.DeploymentFigures(
            failing=True, cooldowns={"it refuses the key (401)": 1}
        ),
        "lone@llm-model-chat-0": lm.DeploymentFigures(
            failing=True,
            failures={
                "it fails, or cannot be reached (500)": 3, "it does not answer in time (408)": 1,
            },
        ),
    }  # fmt: skip


@pytest.mark.parametrize("text", ["", "no metrics here", "litellm_deployment_state{} 1.0"])
def test_what_is_no_counter_counts_nothing(text: str) -> None:
    assert lm.parse_figures(text) == lm.GatewayFigures()


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        ("429", "Openai.RateLimitError", "it is asked too much (429)"),
        ("418", "Openai.Teapot", "it fails (418)"),
        ("None", "Openai.APIConnectionError", "APIConnectionError"),
        ("None", "", "it fails"),
    ],
)
def test_a_failure_is_told_in_words(status: str, kind: str, words: str) -> None:
    assert lm.failure_reason(status, kind) == words


# --- what becomes of a deployment ---------------------------------------------------------------

BROKEN = "it fails, or cannot be reached (500)"


class Story:
    """LiteLLM's counters of one deployment, looked at as time goes by."""

    def __init__(self) -> None:
        self.breakers, self.now = lm.Breakers(), NOW
        self.figures = lm.DeploymentFigures()
        self.look(0)

    def look(self, seconds: float, gateway: str = "a") -> lm.Circuit | None:
        self.now += timedelta(seconds=seconds)
        figures = lm.GatewayFigures(deployments={"chat@x": self.figures} if self.said else {})
        self.breakers.feed(gateway, figures, {"chat": 10}, self.now)
        return self.breakers.circuits.get("chat@x")

    @property
    def said(self) -> bool:
        return self.figures != lm.DeploymentFigures()

    def answers(self, seconds: float = 2) -> lm.Circuit:
        self.figures = replace(self.figures, failing=False, successes=self.figures.successes + 1)
        return self._seen(seconds)

    def fails(self, seconds: float = 2, *, cooled: bool = False) -> lm.Circuit:
        self.figures = replace(
            self.figures,
            failing=True,
            failures={BROKEN: self.figures.failures.get(BROKEN, 0) + 1},
            cooldowns={BROKEN: self.figures.cooldowns.get(BROKEN, 0) + cooled},
        )
        return self._seen(seconds)

    def waits(self, seconds: float) -> lm.Circuit:
        return self._seen(seconds)

    def _seen(self, seconds: float) -> lm.Circuit:
        circuit = self.look(seconds)
        assert circuit is not None
        return circuit


def test_a_deployment_that_answers_is_active() -> None:
    story = Story()
    assert story.breakers.circuits == {}
    assert (story.answers().state, story.answers(600).state) == ("active", "active")


def test_one_failure_degrades_for_a_minute_although_it_serves_again() -> None:
    story = Story()
    story.answers()
    failed = story.fails()
    assert (failed.state, failed.reason, failed.since) == ("degraded", BROKEN, story.now)
    again = story.answers()
    assert (again.state, again.since) == ("degraded", failed.since)
    assert story.waits(61).state == "active"


def test_a_cool_down_ends_by_the_clock_and_the_next_success_closes_the_circuit() -> None:
    story = Story()
    story.answers()
    cooled = story.fails(cooled=True)
    assert (cooled.state, cooled.cooling_until) == ("cool-down", story.now + timedelta(seconds=10))
    assert story.waits(9).state == "cool-down"
    over = story.waits(1)
    assert (over.state, over.since) == ("unavailable", story.now)
    assert story.waits(3600).state == "unavailable", "nobody has seen it answer since"
    assert story.answers().state == "active"
    assert story.fails().state == "degraded", "its old cool-down is forgotten"


def test_a_success_that_ends_within_a_cool_down_does_not_end_it() -> None:
    story = Story()
    story.fails(cooled=True)
    assert story.answers().state == "cool-down"
    assert story.waits(9).state == "degraded"


def test_a_second_cool_down_begins_anew() -> None:
    story = Story()
    story.fails(cooled=True)
    again = story.fails(11, cooled=True)
    assert (again.state, again.since) == ("cool-down", story.now)


def test_who_is_never_left_out_is_unavailable_after_three_failures_in_a_row() -> None:
    story = Story()
    assert [story.fails().state for _ in range(3)] == ["degraded", "degraded", "unavailable"]
    story.answers()
    assert story.fails().state == "degraded"


def test_what_was_counted_before_the_first_look_is_no_news() -> None:
    breakers = lm.Breakers()
    figures = lm.parse_figures(METRICS)
    breakers.feed("a", figures, {}, NOW)
    states = {name: circuit.state for name, circuit in breakers.circuits.items()}
    assert states == {
        "both@good/tiny": "active", "lone@bad/tiny": "degraded",
        "lone@llm-model-chat-0": "degraded",
    }  # fmt: skip
    assert {circuit.since for circuit in breakers.circuits.values()} == {None}
    assert breakers.circuits["lone@llm-model-chat-0"].reason == BROKEN


def test_another_gateway_counts_from_nothing() -> None:
    story = Story()
    story.fails(cooled=True)
    story.figures = lm.DeploymentFigures(successes=1)
    circuit = story.look(2, gateway="b")
    assert circuit == lm.Circuit(state="active")


@given(st.lists(st.sampled_from(["answer", "fail", "cool", "wait"]), max_size=20))
def test_only_a_failure_makes_a_state_worse_and_it_always_has_its_reason(acts: list[str]) -> None:
    story = Story()
    story.answers()
    for act in acts:
        before = story.breakers.circuits["chat@x"].state
        circuit = (
            story.answers() if act == "answer" else story.waits(4) if act == "wait"
            else story.fails(cooled=act == "cool")
        )  # fmt: skip
        assert (circuit.state == "active") or circuit.reason == BROKEN
        if act in {"answer", "wait"} and before in {"active", "degraded"}:
            assert circuit.state in {"active", "degraded"}
        if act == "cool":
            assert circuit.state == "cool-down"


# --- the picture -------------------------------------------------------------------------------

REMOTE = lm.Provider(
    name="far", kind="openai", base_url="http://far:8000", api_key=a_secret("provider")
)


def a_route(name: str = "all", *members: str, **changes: Any) -> lm.Route:
    return lm.Route(name=name, members=members or ("chat", "far/big"), **changes)


def some_state(*routes: lm.Route, **changes: Any) -> lm.State:
    return a_state(a_model(), providers=(REMOTE,), routes=routes or (a_route(),), **changes)


def a_snapshot(state: lm.State | None = None, **changes: Any) -> lm.Snapshot:
    state = state or some_state()
    observed = as_wished(state)
    given: dict[str, Any] = {
        "taken_at": NOW + timedelta(minutes=3), "state": state, "observed": observed,
        "plan": lm.plan_state(state, observed, a_site()),
    }  # fmt: skip
    return lm.Snapshot(**given | changes)


def rows(snapshot: lm.Snapshot, way: str = "v1") -> list[tuple[str, str, str, str]]:
    """Public name, who answers, state, why: of one way in."""
    return [(n, leg, state, why) for w, n, _, leg, state, _, _, why in lm.route_rows(snapshot)
            if w == way]  # fmt: skip


def lane(snapshot: lm.Snapshot, name: str) -> lm.Lane:
    return next(lane for lane in lm.ways_in(snapshot)[0].lanes if lane.name == name)


def test_every_public_name_has_its_members_and_who_was_never_asked_is_not_said_to_work() -> None:
    assert rows(a_snapshot()) == [
        ("all", "chat-0", "active", ""),
        ("all", "far/big", "untried", ""),
        ("chat", "chat-0", "active", ""),
    ]
    assert all(len(row) == len(lm.ROUTE_HEADERS) for row in lm.route_rows(a_snapshot()))


def test_a_member_has_litellms_verdict_its_reason_and_what_is_left_of_its_cool_down() -> None:
    until = NOW + timedelta(minutes=3, seconds=7)
    circuits = {
        "all@far/big": lm.Circuit(state="cool-down", since=NOW, reason=BROKEN, cooling_until=until),
        "all@llm-model-chat-0": lm.Circuit(state="unavailable", since=NOW, reason=BROKEN),
    }
    snapshot = a_snapshot(health=lm.RouteHealth(circuits=circuits))
    assert rows(snapshot)[:2] == [
        ("all", "chat-0", "unavailable", f"{BROKEN}; the next request tries it again"),
        ("all", "far/big", "cool-down", f"{BROKEN}; left out for 7 s more"),
    ]


def test_a_container_that_is_down_counts_more_than_what_litellm_thinks() -> None:
    snapshot = a_snapshot()
    assert snapshot.observed is not None
    engine = the(snapshot.observed, "llm-model-chat-0")
    circuits = {"chat@llm-model-chat-0": lm.Circuit(state="active")}
    snapshot = replace(snapshot, health=lm.RouteHealth(circuits=circuits))

    def seen(*changed: lm.ObservedContainer, **without: str) -> tuple[str, str]:
        assert snapshot.observed is not None
        world = but(snapshot.observed, *changed, **without)
        return rows(replace(snapshot, observed=world))[-1][2:]

    assert seen(ended(engine, 1)) == ("unavailable", "its container ended with 1")
    assert seen(without=engine.name) == ("unavailable", "its container is not there")
    assert seen(replace(engine, ready=False)) == ("unavailable", "it is not ready")
    hung = replace(snapshot, hung={lm.ModelName("chat"): "it hangs"})
    assert rows(hung)[-1][2:] == ("unavailable", "it has requests and makes no token")


def test_a_stopped_model_is_stopped_and_its_route_says_who_stands_in() -> None:
    stopped = a_model(wish="stopped")
    state = some_state(a_route("all", "chat", fallbacks=("far/big",)))
    snapshot = a_snapshot(state.with_model(stopped))
    assert ("chat", "chat-0", "stopped", "") in rows(snapshot)
    found = lane(snapshot, "all")
    assert [leg.title for leg in found.legs] == ["far/big"]
    assert found.notes[0] == "none of its members is wished: far/big stands in"


def test_load_answers_fallbacks_and_cache_hits_are_on_the_picture() -> None:
    state = some_state(a_route(fallbacks=("chat",), cache_seconds=60, aliases=("gpt",)))
    name = lm.ContainerName("llm-model-chat-0")
    figures = lm.GatewayFigures(
        deployments={
            "all@far/big": lm.DeploymentFigures(successes=8, cache_hits=2, failures={BROKEN: 1})
        },
        fallbacks={("all", "chat"): 1, ("gpt", "chat"): 2, ("chat", "x"): 9},
    )
    loads = {name: lm.EngineLoad(running=2, waiting=1, tokens=0)}
    snapshot = a_snapshot(state, health=lm.RouteHealth(figures=figures, loads=loads))
    found = lane(snapshot, "all")
    assert found.notes == (
        "also gpt", "least busy", "then: chat", "fell back 3 times",
        "cache 1 min, 25% of 8 answers from it",
    )  # fmt: skip
    assert [leg.load for leg in found.legs] == ["2 running, 1 waiting", "8 answers · 1 failure"]


def test_every_limit_of_a_route_that_differs_from_the_usual_is_a_note() -> None:
    route = a_route(
        strategy="weighted", weights=(3, 1), context_fallbacks=("chat",), parallel=4,
        timeout_seconds=30,
    )  # fmt: skip
    assert lane(a_snapshot(some_state(route)), "all").notes == (
        "weighted 3:1", "if too long: chat", "4 at a time each", "timeout 30 s",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("edge", "opened", "verdict", "is_open"),
    [
        (True, True, "open", True),
        (False, True, "closed by the kill switch", False),
        (True, False, "no model is open", False),
    ],
)
def test_the_open_way_says_whether_and_why_it_is_closed(
    edge: bool, opened: bool, verdict: str, is_open: bool
) -> None:
    state = a_state(a_model(open_route=opened), edge=lm.Edge(open_routes=edge))
    way = lm.ways_in(a_snapshot(state))[2]
    assert (way.verdict, way.is_open) == (verdict, is_open)
    assert [lane.name for lane in way.lanes] == (["chat"] if opened else [])


def test_the_direct_way_is_closed_until_there_is_a_key() -> None:
    key = lm.DirectKey(name="lab", secret=a_secret("direct"))
    assert not lm.ways_in(a_snapshot())[1].is_open
    way = lm.ways_in(a_snapshot(some_state(direct_keys=(key,))))[1]
    assert (way.clients, way.is_open) == ("whoever has a direct key: lab", True)


def test_without_caddy_or_litellm_the_ways_say_so() -> None:
    snapshot = a_snapshot()
    assert snapshot.observed is not None
    caddy = but(snapshot.observed, without="llm-caddy")
    assert {w.verdict for w in lm.ways_in(replace(snapshot, observed=caddy))[:2]} == {
        "Caddy does not answer"
    }
    litellm = but(snapshot.observed, without="llm-litellm-a")
    gateway, direct, _ = lm.ways_in(replace(snapshot, observed=litellm))
    assert (gateway.verdict, gateway.is_open) == ("LiteLLM does not answer", False)
    assert "LiteLLM" not in direct.verdict


def test_without_docker_nothing_is_invented() -> None:
    snapshot = a_snapshot(observed=None)
    assert rows(snapshot)[-1] == ("chat", "chat-0", "untried", "Docker does not answer")
    assert {way.verdict for way in lm.ways_in(snapshot)[:2]} == {"Docker does not answer"}


def test_without_a_state_there_is_no_picture() -> None:
    blind = replace(a_snapshot(), state=None)
    assert (lm.ways_in(blind), lm.route_rows(blind), lm.ways_html(blind)) == ((), [], "")


def test_the_picture_says_every_state_in_a_word_and_holds_no_secret() -> None:
    snapshot = a_snapshot(some_state(direct_keys=(lm.DirectKey(name="k", secret=a_secret("d")),)))
    shown = lm.ways_html(snapshot)
    for _, name, _, leg, state, *_ in lm.route_rows(snapshot):
        assert f"<b>{name}</b>" in shown
        assert f"<b>{leg}</b>" in shown
        assert f" {state}</span>" in shown
    assert "s3cr3t" not in shown
    assert set(lm.GLYPHS) == {
        "active",
        "degraded",
        "unavailable",
        "cool-down",
        "stopped",
        "untried",
    }


def test_no_text_of_the_picture_can_become_markup() -> None:
    hostile = "<img src=x>"
    circuits = {"all@far/big": lm.Circuit(state="degraded", reason=hostile)}
    shown = lm.ways_html(a_snapshot(health=lm.RouteHealth(circuits=circuits)))
    assert hostile not in shown
    assert {*re.findall(r"<(\w+)", shown)} == {
        "div", "span", "section", "code", "wbr", "b", "small", "ul", "li", "em",
    }  # fmt: skip


def test_from_the_ninth_name_on_members_that_need_no_words_share_a_line() -> None:
    routes = [a_route(f"team-{n}") for n in range(12)]
    circuits = {"team-3@far/big": lm.Circuit(state="degraded", reason=BROKEN)}
    snapshot = a_snapshot(some_state(*routes), health=lm.RouteHealth(circuits=circuits))
    shown = lm.ways_html(snapshot)
    assert shown.count("degraded</span><b>far/big</b>") == 1
    assert BROKEN in shown
    two = a_model(replicas=2)
    state = a_state(two, *(a_model(f"m{n}") for n in range(12)))
    assert "<b><bdi>chat-0</bdi>, <bdi>chat-1</bdi></b>" in lm.ways_html(a_snapshot(state))
    assert "<b>chat-0</b>" in lm.ways_html(a_snapshot(a_state(two)))


def test_among_many_names_trouble_is_first_and_what_is_well_shares_a_line() -> None:
    state = a_state(*(a_model(f"m{n}", wish="stopped" if n == 4 else "running") for n in range(60)))
    observed = as_wished(state)
    broken = but(observed, ended(the(observed, "llm-model-m9-0"), 1))
    shown = lm.ways_html(a_snapshot(state, observed=broken)).partition("<section")[2]
    names = re.findall(r'<div class="lane"><div><b>([^<]*)', shown)
    assert names[:2] == ["m9", "59 more"]
    assert "stopped</span><b>m4</b>" in shown
    assert "<b><bdi>m0</bdi>, <bdi>m1</bdi>, <bdi>m10</bdi>," in shown
    assert "60 names, none of which is reached this way now" in shown


def test_before_the_first_deployment_nothing_is_said_to_be_broken() -> None:
    ways = lm.ways_in(a_snapshot(a_state(endpoint="stopped"), observed=an_observed()))
    assert {way.verdict for way in ways[:2]} == {"it starts with the first deployment"}


def test_direct_keys_are_a_table_only_where_there_are_any() -> None:
    key = lm.DirectKey(name="lab", secret=a_secret("direct"))
    assert lm.direct_view(a_snapshot(a_state())) == {"value": [], "visible": False}
    assert lm.direct_view(a_snapshot(a_state(direct_keys=(key,))))["visible"]


# --- forms -------------------------------------------------------------------------------------


def test_a_route_goes_through_the_form_unchanged() -> None:
    route = a_route(
        aliases=("gpt", "default"), strategy="weighted", weights=(3, 1), fallbacks=("chat",),
        context_fallbacks=("chat",), timeout_seconds=30, retries=0, failures_allowed=2,
        cooldown_seconds=0, parallel=4, cache_seconds=60,
    )  # fmt: skip
    raw = lm.route_settings(route.name, *lm.route_fields(route))
    assert lm.parse_route(raw) == route


def test_an_untouched_form_gives_a_usual_route() -> None:
    raw = lm.route_settings(
        " all ", ["chat"], None, "least-busy", None, None, None, *lm.USUAL_LIMITS
    )
    assert lm.parse_route(raw) == a_route("all", "chat")


def test_a_form_with_nonsense_is_refused_with_every_fault() -> None:
    raw = lm.route_settings("", [], "a b", "least-busy", "x", [], [], *(0 for _ in lm.ROUTE_LIMITS))
    with pytest.raises(lm.RefusedError, match=r"name: .*members: .*weights.*timeout_seconds"):
        lm.parse_route(raw)


def test_a_provider_without_a_typed_key_keeps_the_one_it_has() -> None:
    state = some_state()
    raw = lm.provider_settings("far", "openai", " http://near:1 ", "", "")
    after = lm.providing(raw).edit(state)
    assert after.provider("far").base_url == "http://near:1"
    assert after.provider("far").api_key == REMOTE.api_key
    raw = lm.provider_settings("far", "openai", "http://near:1", None, "sk-new")
    key = lm.providing(raw).edit(state).provider("far").api_key
    assert key is not None
    assert key.get_secret_value() == "sk-new"


def test_providers_are_listed_before_they_are_asked_and_then_their_models() -> None:
    (row,) = lm.known_providers(a_snapshot())
    assert row == ["far", "openai", "http://far:8000", "set", "Not asked yet. ", ""]
    found = lm.ProviderHealth(provider="far", verdict="answers", models=("a", "b:7b"))
    assert lm.found_models([found]) == "far/a\nfar/b:7b"


def test_the_kill_switch_and_the_open_models_are_one_change_that_touches_no_engine() -> None:
    state = a_state(a_model(), a_model("other", open_route=True))
    change = lm.exposing(["chat"], {"open_routes": True, "max_request_mib": 8})
    after = change.edit(state)
    assert [m.name for m in after.models if m.open_route] == ["chat"]
    assert (after.edge.open_routes, after.edge.max_request_mib) == (True, 8)
    assert change.scope == lm.NO_MODELS
    assert asdict(after.secrets) == asdict(state.secrets)


# --- one request ---------------------------------------------------------------------------------


def headers(**changes: str) -> dict[str, str]:
    given = {
        "x-litellm-model-id": "all@far/big", "x-litellm-response-duration-ms": "40.25",
        "x-litellm-overhead-duration-ms": "10.25", "x-litellm-attempted-retries": "0",
        "x-litellm-attempted-fallbacks": "0",
    }  # fmt: skip
    return given | {f"x-litellm-{k.replace('_', '-')}": v for k, v in changes.items()}


def hops(reply: lm.EdgeReply, edge: float = 0.002) -> list[tuple[str, str, str]]:
    trial = lm.Trial(target="all", reply=reply, edge_seconds=edge)
    return [(hop, time, what) for hop, time, what in lm.hop_rows(trial)]


def answered(**changes: str) -> lm.EdgeReply:
    return lm.EdgeReply(
        status=200, by_edge=False, call_id="1", seconds=0.05, headers=headers(**changes)
    )


def test_the_time_of_a_request_is_shared_out_among_its_hops() -> None:
    caddy, litellm, member, whole = hops(answered())
    assert caddy[:2] == ("Caddy", "2.0 ms")
    assert litellm == ("LiteLLM", "18.0 ms", "")
    assert member == ("far/big", "30.0 ms", "")
    assert whole == ("all of it", "50.0 ms", "200 OK")


def test_retries_fallbacks_and_the_cache_are_told() -> None:
    told = hops(answered(attempted_retries="2", attempted_fallbacks="1"))
    assert told[1][2] == "after 2 retries and 1 fallbacks"
    assert hops(answered(cache_key="llm:1"))[2][2] == "not asked: LiteLLM's cache"


@pytest.mark.parametrize(
    ("model_id", "hop"),
    [
        ("chat@llm-model-chat-0", "chat-0"), ("chat@a1b2-llm-model-chat-0", "chat-0"),
        ("all@my-far/big@1", "my-far/big@1"), ("", "member"),
    ],
)  # fmt: skip
def test_a_hop_is_called_as_on_the_picture(model_id: str, hop: str) -> None:
    assert hops(answered(model_id=model_id))[2][0] == hop


def test_past_litellm_there_are_two_hops() -> None:
    reply = lm.EdgeReply(status=200, by_edge=False, seconds=0.01)
    assert [hop[:2] for hop in hops(reply)] == [
        ("Caddy", "2.0 ms"), ("engine", "8.0 ms"), ("all of it", "10.0 ms"),
    ]  # fmt: skip


def test_a_refusal_is_told_with_who_refused() -> None:
    assert lm.reply_text(lm.EdgeReply(status=529, by_edge=False)) == "529", "no status of HTTP"
    (_, last) = hops(lm.EdgeReply(status=401, by_edge=True, seconds=0.001))
    assert last[2] == "401 Unauthorized by Caddy"
    failed = hops(lm.EdgeReply(status=500, by_edge=False, call_id="1", seconds=0.01))
    assert failed[1][2] == "and whomever it asked: nobody answered"
    assert hops(lm.EdgeReply(fault="no answer: refused"))[-1][2] == "no answer: refused"


@given(st.floats(0, 10), st.floats(0, 10), st.text(), st.text())
@example(1, 1, "nan", "-5")
@example(1, 1, "inf", "1e9")
def test_no_headers_make_a_time_negative(total: float, edge: float, one: str, two: str) -> None:
    reply = replace(answered(response_duration_ms=one, overhead_duration_ms=two), seconds=total)
    assert not [hop for hop in hops(reply, edge) if hop[1].startswith("-") or "nan" in hop[1]]


def test_what_can_be_tried_follows_the_keys_and_the_switch() -> None:
    key = lm.DirectKey(name="lab", secret=a_secret("direct"), models=(lm.ModelName("chat"),))
    state = a_state(a_model(open_route=True), a_model("other"), direct_keys=(key,))
    assert lm.trial_targets(state) == ["chat", "other", "/models/chat"]
    state = replace(state, edge=lm.Edge(open_routes=True))
    assert lm.trial_targets(state)[-1] == "/open/chat"
    for target in lm.trial_targets(state):
        request, _ = lm.trial_request(state, target, "")
        assert request.path == (target if "/" in target else "") + "/v1/chat/completions"
    with pytest.raises(lm.RefusedError, match="No direct key opens other"):
        lm.trial_request(state, "/models/other", "")


def test_a_trial_carries_the_key_of_its_way_and_the_words_that_were_typed() -> None:
    key = lm.DirectKey(name="lab", secret=a_secret("direct"))
    state = some_state(direct_keys=(key,))
    request, bearer = lm.trial_request(state, "all", "why?")
    assert bearer == state.secrets.master_key
    assert request.fields is not None
    assert request.fields["messages"][0]["content"] == "why?"
    assert lm.trial_request(state, "/models/chat", "")[1] == key.secret
    assert lm.trial_request(state, "/open/chat", "")[1] != state.secrets.master_key
    assert lm.trial_request(state, "lab/any", "")[0].way == "/v1"
