"""The two proofs: what is tried and sent, what counts as right, and that a search finds."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from builders import NOW, a_model, a_secret, a_state
from hypothesis import given
from hypothesis import strategies as st

import llm_manager as lm

RUN = "0123456789abcdef01234567"
ADA, ALL = (
    lm.DirectKey(name="ada", secret=a_secret("ada"), models=(lm.ModelName("chat"),)),
    lm.DirectKey(name="all", secret=a_secret("all")),
)
BEN = lm.DirectKey(name="ben", secret=a_secret("ben"), models=(lm.ModelName("embed"),))


def a_server(*, open_routes: bool = True, **changes: object) -> lm.State:
    """A chat model with an open route and an embedding model, both running."""
    models = a_model("chat", open_route=True), a_model("embed", type="embedding")
    given = {"direct_keys": (ADA, ALL, BEN), "edge": lm.Edge(open_routes=open_routes)}
    return a_state(*models, **given | changes)


def tried(state: lm.State, way: str, path: str) -> dict[str, tuple[int, ...]]:
    """What should be answered on a path, by the key that is sent."""
    return {
        call.key: call.expected
        for call in lm.probe_requests(state)
        if (call.way, call.path) == (way, path) and not call.plain_http
    }


# --- the prober -----------------------------------------------------------------------------------


def test_every_public_name_is_asked_with_each_kind_of_key() -> None:
    route = lm.Route(name="smart", members=("chat",), aliases=("gpt",))
    pattern = lm.Route(name="lab/*", members=("lab/*",))
    provider = lm.Provider(name="lab", kind="openai", base_url="http://lab")
    state = a_server(routes=(route, pattern), providers=(provider,))
    asked = {
        (call.fields["model"], call.path, call.key, call.expected)
        for call in lm.probe_requests(state)
        if call.way == "/v1" and call.fields
    }
    chat, embeddings = "/v1/chat/completions", "/v1/embeddings"
    paths = {"smart": chat, "gpt": chat, "chat": chat, "embed": embeddings}
    keys = {lm.RIGHT: (200,), lm.WRONG: (401,), lm.NO_KEY: (401,), lm.REVOKED: (401,)}
    assert asked == {(n, p, k, e) for n, p in paths.items() for k, e in keys.items()}


def test_a_key_for_emergencies_opens_v1_too_and_other_direct_keys_do_not() -> None:
    keys = (a_server().direct_keys[0], lm.new_direct_key("fire", emergency=True))
    state = a_server(direct_keys=keys)
    listing = tried(state, "/v1", "/v1/models")
    assert (listing["direct key ada"], listing["direct key fire"]) == ((401,), (200,))
    assert tried(state, "/v1", "/v1/embeddings")["direct key fire"] == (200,)


def test_a_direct_route_takes_its_own_keys_and_no_others() -> None:
    own, other = "direct key ada", "direct key ben"
    assert tried(a_server(), "/models", "/models/chat/v1/chat/completions") == {
        own: (200,), "direct key all": (200,),
        other: (401,), lm.RIGHT: (401,), lm.WRONG: (401,), lm.NO_KEY: (401,),
    }  # fmt: skip
    assert tried(a_server(), "/models", "/models/chat/metrics") == {own: (404,)}


def test_a_model_that_is_stopped_has_no_way_to_it() -> None:
    state = a_state(a_model("chat", wish="stopped", open_route=True), direct_keys=(ADA,),
                    edge=lm.Edge(open_routes=True))  # fmt: skip
    chat = "/v1/chat/completions"
    assert tried(state, "/models", f"/models/chat{chat}")["direct key ada"] == (404,)
    assert {*tried(state, "/open", f"/open/chat{chat}").values()} == {(404,)}
    assert not tried(state, "/v1", chat)


@pytest.mark.parametrize(("on", "anybody", "nobody"), [(True, 200, 401), (False, 404, 404)])
def test_the_kill_switch_closes_every_open_route(on: bool, anybody: int, nobody: int) -> None:
    state = a_server(open_routes=on)
    chat = tried(state, "/open", "/open/chat/v1/chat/completions")
    assert chat == {lm.WRONG: (anybody,), lm.NO_KEY: (nobody,)}
    closed = tried(state, "/open", "/open/embed/v1/embeddings")
    assert {*closed.values()} == {(404,)}, "this model has no open route"


def test_what_must_not_be_reached_is_tried_with_the_right_key() -> None:
    refused = {call.path: call for call in lm.probe_requests(a_server()) if call.way == "elsewhere"}
    for path in ("/key/list", "/key/generate", "/metrics", "/ui", "/config/update", "//key/list",
                 "/v1/../key/list", "/v1/%2e%2e/key/list", "/sleep", "/prompts/test"):  # fmt: skip
        assert refused[path].key == lm.RIGHT
        assert refused[path].by_edge
        assert 404 in refused[path].expected


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        (lm.EdgeReply(status=404), True),
        (lm.EdgeReply(status=200), False),
        (lm.EdgeReply(status=404, by_edge=False), False),  # so the way is open
        (lm.EdgeReply(fault="no answer: refused"), False),
    ],
)
def test_a_refusal_counts_when_the_edge_itself_gives_it(reply: lm.EdgeReply, right: bool) -> None:
    request = lm.EdgeRequest(way="elsewhere", path="/metrics", expected=(404,), by_edge=True)
    assert lm.judge(request, reply).right is right


def test_http_leads_to_https_and_nowhere_else() -> None:
    request = lm.EdgeRequest(way="elsewhere", path="/", plain_http=True, expected=(308,))
    there = lm.EdgeReply(status=308, location="https://here/")
    assert lm.judge(request, there).right
    assert not lm.judge(request, replace(there, location="http://elsewhere/")).right


def test_the_edges_own_answers_are_told_from_what_it_passes_on() -> None:
    error = json.dumps({"error": {"message": "Not Found", "type": "invalid_request_error",
                                  "param": None, "code": "404"}})  # fmt: skip
    assert error in lm.render_caddyfile(a_server(), "a", []).replace(
        "{err.status_text}", "Not Found"
    ).replace("{err.status_code}", "404")
    assert lm.is_edges_own(404, error)
    assert lm.is_edges_own(404, "")
    assert lm.is_edges_own(200, "ok a 0123456789ab")
    assert not lm.is_edges_own(404, '{"detail":"Not Found"}')
    assert not lm.is_edges_own(401, error)


def test_a_result_is_green_only_when_all_was_as_it_should_be() -> None:
    request = lm.EdgeRequest(way="elsewhere", path="/metrics", expected=(404,), key=lm.RIGHT)
    good, bad = (lm.judge(request, lm.EdgeReply(status=s)) for s in (404, 200))
    green = lm.ProbeResult(taken_at=NOW, requests=(good,))
    red = lm.ProbeResult(taken_at=NOW, requests=(good, bad))
    assert (green.green, red.green) == (True, False)
    assert not lm.ProbeResult(taken_at=NOW, requests=()).green
    assert lm.probe_headline(green).startswith("Green, 2026-03-04 05:06 UTC: all 1 ")
    assert "1 of 2" in lm.probe_headline(red)
    assert "GET /metrics with right key" in lm.probe_headline(red)
    assert [row[0] for row in lm.probe_rows(red)] == ["WRONG", "ok"]
    assert all(len(row) == len(lm.PROBE_HEADERS) for row in lm.probe_rows(red))


# --- what is sent ---------------------------------------------------------------------------------


def test_what_was_never_proven_is_said_with_where_to_prove_it() -> None:
    assert "**Proofs**" in lm.proofs_text(None, PROOF)
    assert "never been tried" in lm.proofs_text(None, PROOF)
    green = lm.ProbeResult(taken_at=PROOF.taken_at, requests=())
    assert "**Proofs**" not in lm.proofs_text(green, PROOF)


def test_every_request_of_the_privacy_proof_carries_a_canary_of_its_own() -> None:
    calls = lm.canary_requests(a_server(), RUN)
    for number, call in enumerate(calls):
        sent = json.dumps([call.path, call.fields, str(call.content), {**call.headers}])
        assert f"{RUN}{number:03d}" in sent, call.what
        assert lm.CANARY not in sent
    assert len({call.what for call in calls}) == len(calls)


def test_each_way_and_kind_is_tried_plain_and_streamed() -> None:
    whats = {call.what for call in lm.canary_requests(a_server(), RUN)}
    for way in ("/v1", "/models", "/open"):
        assert {f"chat at {way}, {how}" for how in ("plain", "streamed", "broken off")} <= whats
    assert {"embedding at /v1, plain", "embedding at /models, plain"} <= whats
    assert "embedding at /open, plain" not in whats


@pytest.mark.parametrize("kind", lm.MODEL_TYPES)
def test_every_kind_of_model_can_be_asked_with_a_canary(kind: lm.ModelType) -> None:
    calls = lm.canary_requests(a_state(a_model("one", type=kind)), RUN)
    assert any(call.what == f"{kind} at /v1, plain" for call in calls)
    assert f"{RUN}000" in json.dumps(calls[0].fields)


# --- the search -----------------------------------------------------------------------------------

SENT = ["a plain prompt", "a broken body"]
KEY = "sk-a-key-of-twenty-letters"
WANTED = lm.wanted_texts(RUN, {"right key": KEY})


def found(*chunks: bytes) -> dict[str, str]:
    return lm.search(chunks, WANTED, SENT)[1]


@given(st.binary(max_size=300), st.binary(max_size=300), st.integers(0, 700), st.integers(0, 700))
def test_a_canary_is_found_wherever_chunks_are_cut(
    before: bytes, after: bytes, first: int, second: int
) -> None:
    text = before + f" {RUN}001 ".encode() + after
    one, two = sorted((first, second))
    chunks = [text[:one], text[one:two], text[two:]]
    size, seen = lm.search(chunks, WANTED, SENT)
    assert size == len(text)
    assert "canary: a broken body" in seen


@given(st.integers(0, 40), st.sampled_from([f"{RUN}000", KEY]))
def test_what_base64_hides_is_found_too(padding: int, hidden: str) -> None:
    coded = base64.b64encode(b"x" * padding + hidden.encode() + b" more")
    assert any("in base64" in what for what in found(coded))


def test_an_excerpt_shows_where_it_was_and_nothing_that_is_private() -> None:
    text = f"a request failed: {RUN}000 with Bearer {KEY} and sk-of-somebody-else".encode()
    seen = found(text)
    assert {*seen} == {"canary: a plain prompt", "right key"}
    for excerpt in seen.values():
        assert "•••" in excerpt
        assert RUN not in excerpt
        assert KEY[-8:] not in excerpt
        assert "somebody" not in excerpt
    assert "a request failed" in seen["canary: a plain prompt"]


def test_where_nothing_is_nothing_is_found() -> None:
    assert found(b"POST 200", RUN[:-1].encode(), KEY[:-1].encode()) == {}


def test_of_a_container_only_what_it_wrote_itself_is_read() -> None:
    changes = {"/etc": 0, "/etc/caddy": 1, "/tmp": 0, "/tmp/new": 1, "/tmp/new/deep": 1,  # noqa: S108
               "/tmp/old": 0, "/tmp/gone": 2, "/var": 1, "/var/lib": 1, "/var/lib/weights": 1,  # noqa: S108
               "/var/lib/weights/model": 1, "/var/lib/note": 1}  # fmt: skip
    read = lm.changed_paths(changes, mounted=["/etc/caddy", "/var/lib/weights"])
    assert read == ["/tmp/new", "/tmp/old", "/var/lib/note"]  # noqa: S108


# --- the verdict ----------------------------------------------------------------------------------

PLACE = lm.SearchedPlace(place="llm-caddy: log", size_bytes=10, control=True)
PROOF = lm.PrivacyProof(
    taken_at=NOW, seconds=9.0, images={}, findings=(), places=(PLACE,),
    sent=(lm.SentCanary(what="a plain prompt", answered=200),),
)  # fmt: skip
LEAK = lm.Finding(place="llm-caddy: log", what="canary: a plain prompt", excerpt="uri •••")


def test_a_proof_is_green_when_all_places_were_really_searched() -> None:
    assert PROOF.green
    assert lm.privacy_headline(PROOF).startswith("Green, 2026-03-04 05:06 UTC: of 1 marked")
    for doubtful in (
        replace(PLACE, control=False), replace(PLACE, size_bytes=0), replace(PLACE, fault="gone"),
    ):  # fmt: skip
        proof = replace(PROOF, places=(doubtful,))
        assert not proof.green
        assert "nothing is proven of llm-caddy: log" in lm.privacy_headline(proof)
    assert replace(PROOF, places=(replace(PLACE, control=None),)).green, "it was stopped"
    assert not replace(PROOF, places=()).green


def test_a_proof_whose_requests_did_not_arrive_proves_nothing() -> None:
    request = lm.EdgeRequest(way="/v1", path="/v1", what="a plain prompt", expected=(200,))
    for reply in (lm.EdgeReply(status=502), lm.EdgeReply(fault="no answer")):
        proof = replace(PROOF, sent=(lm.sent_canary(request, reply),))
        assert not proof.green
        assert proof.unproven == ("a plain prompt",)


def test_a_leak_is_red_and_says_where_and_what() -> None:
    proof = replace(PROOF, findings=(LEAK,))
    assert not proof.green
    assert "1 leaks, such as canary: a plain prompt in llm-caddy: log" in lm.privacy_headline(proof)
    assert lm.privacy_rows(proof) == [["llm-caddy: log", "10 B", "yes", "canary: a plain prompt"]]
    assert "uri •••" in lm.privacy_text(proof)


def test_what_a_route_keeps_by_choice_is_said_and_is_no_leak() -> None:
    kept = replace(LEAK, place="llm-redis: every value", kept=lm.why_kept("cache", LEAK.what, ()))
    proof = replace(PROOF, findings=(kept,))
    assert proof.green
    assert lm.KEPT_ANSWERS in lm.privacy_headline(proof)
    assert lm.privacy_rows(proof)[-1][-1] == f"1 times {lm.KEPT_ANSWERS}"
    assert not lm.why_kept("cache", "right key", ())
    labels = {"the label user"}
    assert lm.why_kept("database", "canary: the label user", labels) == lm.KEPT_LABELS
    assert not lm.why_kept("database", "canary: a plain prompt", labels)
    assert lm.why_kept("cache", "canary: the label user", labels) == lm.KEPT_LABELS
    assert not lm.why_kept("gateway", "canary: the label user", labels)


def test_the_newest_twenty_results_of_a_kind_are_kept(tmp_path: Path) -> None:
    files = lm.ProofFiles(tmp_path / "proofs")
    assert files.newest("probe") is None
    for second in range(25):
        files.keep("probe", NOW + timedelta(seconds=second), f"probe {second}")
    files.keep("privacy", NOW, "privacy")
    assert files.newest("probe") == "probe 24"
    assert files.newest("privacy") == "privacy"
    assert len([*(tmp_path / "proofs").iterdir()]) == lm.MOST_PROOFS + 1
