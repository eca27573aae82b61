"""Planning: what is decided, read as the text that the operator reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import timedelta
from textwrap import dedent

import pytest
from builders import (
    GPU_0,
    GPU_1,
    NOW,
    a_model,
    a_site,
    a_state,
    an_engine,
    an_observed,
    as_wished,
    but,
    ended,
    on_gpus,
    only,
    seen,
    set_aside,
    the,
)
from fakes import Crash, FakeFiles, Trouble, a_world, some_tools
from hypothesis import given, settings
from hypothesis import strategies as st

import llm_manager as lm

CHAT = "llm-model-chat-0"
WITH_ARGUMENT = ("--max-model-len", "8192")
CHANGED = a_state(a_model(engine_arguments=WITH_ARGUMENT))


def planned(
    state: lm.State, observed: lm.Observed, *, model: str | None = None, restart: str | None = None
) -> str:
    """The plan as text, ended by a line break like the expectations below."""
    plan = lm.plan_state(
        state,
        observed,
        a_site(),
        scope=only(model),
        restart=lm.ModelName(restart) if restart else None,
    )
    return f"{plan}\n"


def expect(text: str) -> str:
    return dedent(text).lstrip("\n")


# --- one story each ------------------------------------------------------------


def test_weights_are_downloaded_before_anything_is_stopped_for_them() -> None:
    state = a_state(a_model())
    newer = lm.HubSource(repository="Qwen/Qwen3-0.6B", revision="f" * 40)
    changed = state.with_model(a_model(source=newer))
    steps = lm.plan_state(changed, as_wished(state), a_site()).models[0].steps
    assert [type(step) for step in steps[:2]] == [lm.DownloadWeights, lm.SetAside]
    assert f"download Qwen/Qwen3-0.6B@{'f' * 12}: not on this server" in planned(
        changed, as_wished(state)
    )


def test_a_restore_replaces_nothing_that_serves() -> None:
    """The service restores at every start: an upgrade of the program must not restart models."""
    before, site = a_state(a_model(), a_model("other")), a_site()
    after = before.with_model(a_model(engine_arguments=("--max-model-len", "8192")))
    world = as_wished(before)
    assert not lm.plan_state(after, world, site, gentle=True)
    assert "its settings changed" in str(lm.plan_state(after, world, site))
    down = but(world, ended(the(world, CHAT)))
    assert "set aside llm-model-chat-0: its settings changed" in str(
        lm.plan_state(after, down, site, gentle=True)
    )


def test_weights_that_went_are_no_business_of_a_model_that_runs() -> None:
    state = a_state(a_model())
    assert planned(state, as_wished(state, weights={})) == "\n"


def test_the_first_deployment_makes_everything() -> None:
    assert planned(a_state(a_model()), lm.Observed()) == expect("""
        foundation:
          create network llm-network: the containers' own bridge
          create volume llm-postgres-data: what must outlive containers
          create volume llm-caddy-data: what must outlive containers
        database:
          pull image postgres:16-alpine: not on this server
          create llm-postgres from postgres:16-alpine: not there
          wait until llm-postgres is ready: it starts
        model chat:
          download Qwen/Qwen3-0.6B: not on this server
          pull image vllm/vllm-openai-cpu:v0.30.0-x86_64: not on this server
          create llm-model-chat-0 from vllm/vllm-openai-cpu:v0.30.0-x86_64: not there
          wait until llm-model-chat-0 is ready: it starts
        endpoint:
          pull image ghcr.io/berriai/litellm:v1.108.11: not on this server
          write litellm-a/config.yaml: what is routed changed
          create llm-litellm-a from ghcr.io/berriai/litellm:v1.108.11: not there
          wait until llm-litellm-a is ready: it starts
          let the database refuse what requests said: no prompt is ever stored
          pull image caddy:2.11.7-alpine: not on this server
          check and write caddy/Caddyfile: what is served changed
          create llm-caddy from caddy:2.11.7-alpine: not there
          wait until llm-caddy is ready: it starts
        """)


@pytest.mark.parametrize("slot", lm.SLOTS)
def test_there_is_nothing_to_do_where_all_is_as_wished(slot: lm.Slot) -> None:
    state = a_state(a_model(), a_model("embed", type="embedding", replicas=2))
    plan = lm.plan_state(state, as_wished(state, slot), a_site())
    assert not plan
    assert plan.stages == ()
    assert str(plan) == ""


def test_an_installation_that_never_did_anything_plans_nothing() -> None:
    assert not lm.plan_state(a_state(endpoint="stopped"), lm.Observed(), a_site())


def test_a_changed_argument_replaces_the_container_and_says_who_is_interrupted() -> None:
    assert planned(CHANGED, as_wished(a_state(a_model()))) == expect("""
        model chat:
          set aside llm-model-chat-0: its settings changed
          create llm-model-chat-0 from vllm/vllm-openai-cpu:v0.30.0-x86_64: its settings changed
          wait until llm-model-chat-0 is ready: it starts
          discard llm-model-chat-0.aside: its settings changed
        Interrupted until its new container is ready, or for good: chat.
        """)


def test_a_restart_replaces_a_container_that_needs_no_change() -> None:
    state = a_state(a_model(), a_model("other"))
    text = planned(state, as_wished(state), model="chat", restart="chat")
    assert "set aside llm-model-chat-0: a restart was asked for" in text
    assert "other" not in text


def test_a_missing_image_is_pulled_before_anything_is_set_aside() -> None:
    state = a_state(a_model(image="example/engine:v2"))
    assert planned(state, as_wished(a_state(a_model()))).splitlines()[1:3] == [
        "  pull image example/engine:v2: not on this server",
        "  set aside llm-model-chat-0: its settings changed",
    ]


def test_replicas_that_serve_are_replaced_in_turn_and_interrupt_nobody() -> None:
    state = a_state(a_model(replicas=2))
    text = planned(state, as_wished(state), model="chat", restart="chat")
    turns = [line.strip() for line in text.splitlines() if "chat" in line]
    assert [line.split(":")[0] for line in turns] == [
        step
        for name in ("llm-model-chat-0", "llm-model-chat-1")
        for step in (
            *(["model chat"] if name == CHAT else []),
            f"turn the gateway away from {name} and let it finish its requests",
            f"set aside {name}",
            f"create {name} from vllm/vllm-openai-cpu",
            f"wait until {name} is ready",
            f"discard {name}.aside",
        )
    ]


def test_a_replica_less_interrupts_nobody() -> None:
    fewer = a_state(a_model())
    text = planned(fewer, as_wished(a_state(a_model(replicas=2))), model="chat")
    assert "let llm-model-chat-1 finish its requests" in text
    assert "Interrupted" not in text


def test_a_stopped_model_loses_its_route_before_its_container() -> None:
    before = a_state(a_model(), a_model("other"))
    state = before.with_model(replace(before.model("chat"), wish="stopped"))
    assert planned(state, as_wished(before), model="chat") == expect("""
        endpoint:
          write litellm-b/config.yaml: what is routed changed
          create llm-litellm-b from ghcr.io/berriai/litellm:v1.108.11: what is routed changed
          wait until llm-litellm-b is ready: it starts
          let the database refuse what requests said: no prompt is ever stored
          check and load caddy/Caddyfile: what is served changed
        retirement:
          pause 2 s: the edge has just turned to the other slot
          discard llm-litellm-a: drained: its last requests finish first
          let llm-model-chat-0 finish its requests: nothing routes to it any more
          discard llm-model-chat-0: no longer wanted
        Interrupted until its new container is ready, or for good: chat.
        """)


def test_a_removed_model_goes_the_same_way() -> None:
    before = a_state(a_model(), a_model("other"))
    removed = lm.removing("chat").edit(before)
    stopped = lm.stopping("chat").edit(before)
    world = as_wished(before)
    assert planned(removed, world, model="chat") == planned(stopped, world, model="chat")


def test_a_container_that_ended_is_started_again() -> None:
    state = a_state(a_model())
    world = as_wished(state)
    assert planned(state, but(world, ended(the(world, CHAT), 137))) == expect("""
        model chat:
          start llm-model-chat-0: it ended with 137
          wait until llm-model-chat-0 is ready: it starts
        """)


def test_a_container_that_was_never_started_is_started() -> None:
    state = a_state(a_model())
    world = as_wished(state)
    text = planned(state, but(world, ended(the(world, CHAT), exit_code=None)))
    assert "start llm-model-chat-0: it stopped" in text


def test_a_running_container_that_does_not_answer_is_waited_for() -> None:
    state = a_state(a_model())
    world = as_wished(state)
    assert planned(state, but(world, replace(the(world, CHAT), ready=False))) == expect("""
        model chat:
          wait until llm-model-chat-0 is ready: it does not answer yet
        """)


def test_what_an_interrupted_change_set_aside_is_brought_back() -> None:
    state = a_state(a_model())
    world = as_wished(state)
    left = but(world, set_aside(the(world, CHAT)), without=CHAT)
    assert planned(state, left) == expect("""
        model chat:
          bring back llm-model-chat-0: an interrupted change set it aside
          wait until llm-model-chat-0 is ready: it starts
        """)


def test_what_is_left_aside_and_outdated_goes_only_after_the_new_one_is_ready() -> None:
    world = as_wished(a_state(a_model()))
    left = but(world, set_aside(the(world, CHAT)), without=CHAT)
    assert planned(CHANGED, left) == expect("""
        model chat:
          create llm-model-chat-0 from vllm/vllm-openai-cpu:v0.30.0-x86_64: not there
          wait until llm-model-chat-0 is ready: it starts
          discard llm-model-chat-0.aside: left by an interrupted change
        """)


def test_what_is_left_aside_of_a_finished_change_is_discarded() -> None:
    world = as_wished(CHANGED)
    left = set_aside(seen(an_engine(a_state(a_model()))))
    assert planned(CHANGED, but(world, left)) == expect("""
        model chat:
          discard llm-model-chat-0.aside: left by an interrupted change
        """)


def test_what_is_left_aside_makes_room_before_the_next_is_set_aside() -> None:
    world = as_wished(a_state(a_model()))
    left = set_aside(replace(the(world, CHAT), spec_hash=lm.SpecHash("0ld")))
    assert planned(CHANGED, but(world, left)).splitlines()[1:3] == [
        "  discard llm-model-chat-0.aside: left by an interrupted change",
        "  set aside llm-model-chat-0: its settings changed",
    ]


def test_an_interrupted_change_that_is_taken_back_brings_the_old_container_back() -> None:
    world = as_wished(CHANGED)
    left = set_aside(seen(an_engine(a_state(a_model()))))
    assert planned(a_state(a_model()), but(world, left)).splitlines()[1:4] == [
        "  discard llm-model-chat-0: the one set aside is wanted",
        "  bring back llm-model-chat-0: an interrupted change set it aside",
        "  wait until llm-model-chat-0 is ready: it starts",
    ]


def test_a_container_that_never_answers_is_replaced_after_its_time_to_start() -> None:
    state = a_state(a_model())
    world = as_wished(state)
    world = but(world, replace(the(world, CHAT), ready=False))
    limit = timedelta(seconds=an_engine(state).start_seconds)
    in_time = planned(state, replace(world, taken_at=NOW + limit))
    too_late = planned(state, replace(world, taken_at=NOW + limit + timedelta(seconds=1)))
    assert "wait until llm-model-chat-0 is ready: it does not answer yet" in in_time
    assert "set aside llm-model-chat-0: it runs, but has not answered" in too_late
    assert planned(state, replace(as_wished(state), taken_at=NOW + 9 * limit)) == "\n"


def test_what_is_left_aside_of_a_stopped_model_is_discarded() -> None:
    state = a_state(a_model(wish="stopped"))
    left = set_aside(seen(an_engine(state)))
    text = planned(state, but(as_wished(state), left))
    assert "discard llm-model-chat-0.aside: no longer wanted" in text
    assert "nterrupted until" not in text


def test_a_second_model_turns_the_gateway_to_its_other_slot() -> None:
    before = a_state(a_model())
    state = before.with_model(a_model("other"))
    assert planned(state, as_wished(before, "b"), model="other") == expect("""
        model other:
          create llm-model-other-0 from vllm/vllm-openai-cpu:v0.30.0-x86_64: not there
          wait until llm-model-other-0 is ready: it starts
        endpoint:
          write litellm-a/config.yaml: what is routed changed
          create llm-litellm-a from ghcr.io/berriai/litellm:v1.108.11: what is routed changed
          wait until llm-litellm-a is ready: it starts
          let the database refuse what requests said: no prompt is ever stored
          check and load caddy/Caddyfile: what is served changed
        retirement:
          pause 2 s: the edge has just turned to the other slot
          discard llm-litellm-b: drained: its last requests finish first
        """)


def test_a_route_turns_the_gateway_and_touches_nothing_else() -> None:
    before = a_state(a_model(), a_model("other"))
    route = lm.Route(name="code", members=("chat", "other"), aliases=("gpt-4o",))
    change = lm.routing(asdict(route))
    text = planned_change(change, before, as_wished(before))
    assert text == expect("""
        endpoint:
          write litellm-b/config.yaml: what is routed changed
          create llm-litellm-b from ghcr.io/berriai/litellm:v1.108.11: what is routed changed
          wait until llm-litellm-b is ready: it starts
          let the database refuse what requests said: no prompt is ever stored
          check and load caddy/Caddyfile: what is served changed
        retirement:
          pause 2 s: the edge has just turned to the other slot
          discard llm-litellm-a: drained: its last requests finish first
        """)


def test_the_difference_is_to_what_serves_and_not_to_what_served_before_it() -> None:
    before = a_state(a_model())
    world = as_wished(before, files=as_wished(before).files | {"litellm-b/config.yaml": "old\n"})
    route = lm.Route(name="code", members=("chat",))
    plan = lm.plan_state(lm.routing(asdict(route)).edit(before), world, a_site())
    added = [line for line in plan.diff().splitlines() if line.startswith("+- model_name")]
    assert added == ["+- model_name: code"]
    assert "-old" not in plan.diff()


def test_redis_runs_only_while_a_route_keeps_answers() -> None:
    plain = a_state(a_model())
    kept = replace(plain, routes=(lm.Route(name="chat", members=("chat",), cache_seconds=60),))
    coming = planned(kept, as_wished(plain))
    assert "create llm-redis from redis:7-alpine: not there" in coming
    assert coming.index("llm-redis") < coming.index("create llm-litellm-b")
    assert planned(kept, as_wished(kept)) == "\n"
    going = planned(plain, as_wished(kept))
    assert going.index("llm-litellm-b") < going.index("discard llm-redis: no longer wanted")


def test_the_key_of_a_provider_that_no_route_names_restarts_nothing() -> None:
    before = a_state(a_model())
    raw = {"name": "lab", "kind": "openai", "base_url": "http://10.0.0.7:1234", "api_key": "k"}
    assert planned_change(lm.providing(raw), before, as_wished(before)) == "\n"
    route = lm.Route(name="far", members=("lab/m",))
    state = replace(lm.providing(raw).edit(before), routes=(route,))
    again = lm.providing(raw | {"api_key": "k2"})
    assert "create llm-litellm-b" in planned_change(again, state, as_wished(state))


def planned_change(change: lm.Change, before: lm.State, observed: lm.Observed) -> str:
    return f"{lm.plan_state(change.edit(before), observed, a_site(), scope=change.scope)}\n"


def test_a_slot_with_an_older_configuration_is_cleared_first_and_rests() -> None:
    before = a_state(a_model())
    world = as_wished(before)
    older = seen(lm.render_gateway(before, "b", lm.served_models(before, []), a_site()))
    state = before.with_model(a_model("other"))
    endpoint = lm.plan_state(state, but(world, older), a_site()).endpoint
    assert [lm.describe(step) for step in endpoint.steps][:3] == [
        "discard llm-litellm-b: it holds an older configuration",
        "pause 2 s: the same slot starts again",
        "write litellm-b/config.yaml: what is routed changed",
    ]


def test_a_new_gateway_touches_neither_database_nor_edge_container() -> None:
    before = a_state(a_model())
    state = replace(before, images=replace(before.images, litellm="example/litellm:v2"))
    text = planned(state, as_wished(before))
    assert "llm-postgres" not in text
    assert "llm-caddy" not in text


def test_a_crash_between_writing_and_loading_the_caddyfile_is_healed() -> None:
    state = a_state(a_model())
    world = as_wished(state, "b")
    crashed = replace(world, edge=lm.LoadedCaddyfile("a", "0123456789ab"))
    assert planned(state, crashed) == expect("""
        endpoint:
          let the database refuse what requests said: no prompt is ever stored
          check and load caddy/Caddyfile: what is served changed
        """)


def test_a_deleted_generated_file_is_written_again() -> None:
    state = a_state(a_model())
    world = replace(as_wished(state), files={})
    assert planned(state, world) == expect("""
        endpoint:
          write litellm-a/config.yaml: what is routed changed
        """)


def test_other_https_settings_are_checked_and_loaded_without_a_new_container() -> None:
    before = a_state(a_model())
    state = replace(before, edge=replace(before.edge, hostnames=("llm.example.org",)))
    assert planned(state, as_wished(before)) == expect("""
        endpoint:
          check and load caddy/Caddyfile: what is served changed
        """)


def test_another_port_replaces_the_edge_with_the_checked_file() -> None:
    before = a_state(a_model())
    state = replace(before, edge=replace(before.edge, https_port=8443))
    assert planned(state, as_wished(before)) == expect("""
        endpoint:
          check and write caddy/Caddyfile: what is served changed
          set aside llm-caddy: its settings changed
          create llm-caddy from caddy:2.11.7-alpine: its settings changed
          wait until llm-caddy is ready: it starts
          discard llm-caddy.aside: its settings changed
        Interrupted until its new container is ready, or for good: chat.
        """)


def test_a_stopped_endpoint_stops_the_database_and_removes_the_rest() -> None:
    before = a_state()
    state = replace(before, endpoint="stopped")
    assert planned(state, as_wished(before)) == expect("""
        retirement:
          discard llm-caddy: no longer wanted
          pause 2 s: the edge has just turned to the other slot
          discard llm-litellm-a: drained: its last requests finish first
          stop llm-postgres: the endpoint is stopped
        """)


def test_a_stopped_database_of_a_stopped_endpoint_is_left_alone() -> None:
    state = a_state(endpoint="stopped")
    database = seen(lm.render_database(state))
    assert not lm.plan_state(state, an_observed(ended(database)), a_site())


# --- what one change reaches -----------------------------------------------------


def test_a_change_of_one_model_leaves_every_other_as_it_is() -> None:
    before = a_state(a_model(), a_model("other"), a_model("third"))
    world = as_wished(before)
    world = but(world, replace(the(world, "llm-model-other-0"), spec_hash=lm.SpecHash("0ld")))
    world = but(world, set_aside(the(world, "llm-model-third-0")))
    state = before.with_model(a_model(engine_arguments=WITH_ARGUMENT))
    text = planned(state, world, model="chat")
    assert "other" not in text
    assert "third" not in text
    assert "set aside llm-model-chat-0" in text


def test_a_change_of_one_model_removes_no_leftover_of_another() -> None:
    state = a_state(a_model(), a_model("other", wish="stopped"))
    world = but(as_wished(state), seen(an_engine(state, "other")))
    assert planned(state, world, model="chat") == "\n"
    assert "discard llm-model-other-0" in planned(state, world)


def test_an_engine_that_misses_one_health_check_keeps_its_route() -> None:
    state = a_state(a_model(), a_model("other"))
    world = as_wished(state)
    busy = but(world, replace(the(world, CHAT), ready=False))
    endpoint, _ = lm.plan_endpoint(state, busy, a_site())
    assert endpoint.steps == ()


def test_a_saved_but_unapplied_name_of_another_model_changes_no_route() -> None:
    before = a_state(a_model(), a_model("other"))
    state = before.with_model(a_model("other", served_model_name="renamed"))
    assert planned(state, as_wished(before), model="chat") == "\n"
    assert "renamed" in lm.plan_state(state, as_wished(before), a_site()).diff()


def test_an_engine_that_is_not_ready_and_not_routed_gets_no_route() -> None:
    before = a_state(a_model("other"))
    state = before.with_model(a_model())
    starting = but(as_wished(before), seen(an_engine(state), ready=False))
    endpoint, _ = lm.plan_endpoint(state, starting, a_site())
    assert endpoint.steps == ()


def test_an_engine_that_ended_loses_its_route() -> None:
    state = a_state(a_model(), a_model("other"))
    world = as_wished(state)
    endpoint, _ = lm.plan_endpoint(state, but(world, ended(the(world, CHAT))), a_site())
    (write,) = [step for step in endpoint.steps if isinstance(step, lm.WriteFile)]
    assert "llm-model-chat-0" not in write.text
    assert "llm-model-other-0" in write.text


def test_an_edge_that_misses_one_look_does_not_take_the_serving_gateway_away() -> None:
    before = a_state(a_model())
    blind = replace(as_wished(before), edge=None)
    state = before.with_model(a_model("other"))
    assert "discard llm-litellm-a: it holds an older configuration" not in planned(state, blind)


def test_a_model_without_an_endpoint_still_gets_its_network() -> None:
    state = a_state(a_model(), endpoint="stopped")
    assert "create network llm-network" in planned(state, lm.Observed())


def test_only_running_models_are_called_interrupted() -> None:
    before = a_state(a_model(), a_model("other"))
    world = as_wished(before)
    world = but(world, ended(the(world, "llm-model-other-0")))
    state = replace(before, models=())
    assert lm.plan_state(state, world, a_site()).interrupted == ("chat",)


def test_without_its_edge_every_running_model_is_interrupted() -> None:
    before = a_state(a_model(), a_model("other"))
    state = replace(before, edge=replace(before.edge, https_port=8443))
    plan = lm.plan_state(state, as_wished(before), a_site())
    assert plan.interrupted == ("chat", "other")


def test_the_diff_shows_what_changes_in_the_generated_files() -> None:
    before = a_state(a_model())
    state = before.with_model(a_model("other"))
    diff = lm.plan_state(state, as_wished(before), a_site()).diff()
    assert "+- model_name: other\n" in diff
    assert "-\t\t\t\treverse_proxy llm-litellm-a:4000 {\n" in diff
    assert "+\t\t\t\treverse_proxy llm-litellm-b:4000 {\n" in diff


def test_nothing_that_is_not_generated_enters_the_diff() -> None:
    plan = lm.plan_state(a_state(a_model()), lm.Observed(), a_site())
    assert {line for line in plan.diff().splitlines() if line.startswith("+++")} == {
        "+++ generated/litellm-a/config.yaml (new)",
        "+++ generated/caddy/Caddyfile (new)",
    }


# --- changes -----------------------------------------------------------------------


def test_deploying_wishes_the_model_and_the_endpoint() -> None:
    state = a_state(a_model(wish="stopped"), endpoint="stopped")
    after = lm.deploying("chat").edit(state)
    assert (after.model("chat").wish, after.endpoint) == ("running", "running")


@pytest.mark.parametrize("make", [lm.deploying, lm.stopping, lm.restarting, lm.removing])
def test_a_change_of_an_unknown_model_names_the_known_ones(
    make: Callable[[str], lm.Change],
) -> None:
    with pytest.raises(lm.RefusedError, match=r"no model called 'chta'\. Registered models: chat"):
        make("chta").edit(a_state(a_model()))


def test_a_stopped_model_is_not_restarted() -> None:
    with pytest.raises(lm.RefusedError, match="Deploy it instead"):
        lm.restarting("chat").edit(a_state(a_model(wish="stopped")))


def test_registering_a_known_name_is_refused() -> None:
    with pytest.raises(lm.RefusedError, match="called chat already"):
        lm.registering(a_model()).edit(a_state(a_model()))


def test_a_revised_model_keeps_its_place_in_the_list() -> None:
    state = a_state(a_model(), a_model("other"))
    after = lm.revising("chat", {"replicas": 2}, {}).edit(state)
    assert [model.name for model in after.models] == ["chat", "other"]
    assert after.model("chat").replicas == 2


def test_pinning_keeps_every_other_image() -> None:
    state = a_state()
    after = lm.pinning_image("caddy", "caddy:2.12.0").edit(state)
    assert after == replace(state, images=replace(state.images, caddy="caddy:2.12.0"))


# --- laws ------------------------------------------------------------------------------

RESOURCES = st.frozensets(st.sampled_from(["cpu", GPU_0, GPU_1, "gpu 2"]), max_size=3)


def a_stage(title: int, resources: frozenset[str]) -> lm.Stage:
    return lm.Stage(title=str(title), steps=(), resources=resources)


@given(st.lists(RESOURCES, max_size=8))
def test_stages_that_share_a_resource_run_in_one_lane_and_in_order(
    wanted: list[frozenset[str]],
) -> None:
    stages = [a_stage(n, resources) for n, resources in enumerate(wanted)]
    lanes = lm.lanes(stages)
    assert sorted(int(stage.title) for lane in lanes for stage in lane) == [*range(len(stages))]
    taken: set[str] = set()
    for lane in lanes:
        touched = frozenset().union(*(stage.resources for stage in lane))
        assert not touched & taken
        taken |= touched
    for one in stages:
        for other in stages:
            if one.resources & other.resources and int(one.title) < int(other.title):
                (lane,) = [lane for lane in lanes if one in lane]
                assert lane.index(one) < lane.index(other)


def test_models_on_different_gpus_start_side_by_side_and_all_on_the_cpu_in_turn() -> None:
    state = a_state(
        a_model("a", placement=on_gpus(GPU_0)),
        a_model("b", placement=on_gpus(GPU_1)),
        a_model("c", placement=on_gpus(GPU_0)),
        a_model("d"),
        a_model("e"),
    )
    stages = lm.plan_state(state, lm.Observed(), a_site()).models
    lanes = {
        tuple(stage.title.removeprefix("model ") for stage in lane) for lane in lm.lanes(stages)
    }
    assert lanes == {("a", "c"), ("b",), ("d", "e")}


def models_named(name: str) -> st.SearchStrategy[lm.Model]:
    """A model of that name in some of its possible forms."""
    return st.builds(
        a_model,
        st.just(name),
        engine_arguments=st.sampled_from([(), WITH_ARGUMENT]),
        placement=st.sampled_from([lm.CpuPlacement(), on_gpus(GPU_0), on_gpus(GPU_0, GPU_1)]),
        replicas=st.sampled_from([1, 2]),
        wish=st.sampled_from(["running", "stopped"]),
    )


@st.composite
def states(draw: st.DrawFn, endpoint: st.SearchStrategy[lm.Wish] | None = None) -> lm.State:
    names = draw(st.lists(st.sampled_from(["chat", "embed"]), unique=True))
    models = tuple(draw(models_named(name)) for name in names)
    images = draw(
        st.sampled_from(
            [
                lm.Images(),
                lm.Images(litellm="x/litellm:2", caddy="caddy:2.12"),
                lm.Images(postgres="postgres:16.9-alpine"),
            ]
        )
    )
    edge = draw(st.sampled_from([lm.Edge(), lm.Edge(hostnames=("llm.example.org",))]))
    wish = draw(endpoint or st.sampled_from(["running", "stopped"]))
    if any(model.wish == "running" for model in models):
        wish = "running"  # as `deploying` leaves it
    return a_state(*models, endpoint=wish, images=images, edge=edge)


def stop_something(draw: st.DrawFn, world: lm.SimulatedHost) -> None:
    if world.containers:
        world.end(draw(st.sampled_from(sorted(world.containers))), draw(st.sampled_from([0, 137])))


def remove_something(draw: st.DrawFn, world: lm.SimulatedHost) -> None:
    """Somebody typed `docker rm -f`."""
    if world.containers:
        del world.containers[draw(st.sampled_from(sorted(world.containers)))]


def leave_aside(draw: st.DrawFn, world: lm.SimulatedHost) -> None:
    """As a change that was killed between its steps: without the new container, or with it."""
    free = [n for n in sorted(world.containers) if lm.aside(n) not in world.containers]
    names = [n for n in free if world.containers[n].spec.role != "gateway" and "." not in n]
    if names:
        name = draw(st.sampled_from(names))
        spec = world.containers[name].spec
        world.containers[lm.aside(name)] = lm.SimulatedContainer(lm.aside(name), spec, exit_code=0)
        if draw(st.booleans()):
            del world.containers[name]


def delete_files(draw: st.DrawFn, world: lm.SimulatedHost) -> None:
    files = world.files
    assert isinstance(files, FakeFiles)
    if files.generated:
        del files.generated[draw(st.sampled_from(sorted(files.generated)))]


def lose_the_network(_: st.DrawFn, world: lm.SimulatedHost) -> None:
    """Docker refuses to remove a network while something runs on it."""
    if not world.running():
        world.networks.clear()


def stop_everything(_: st.DrawFn, world: lm.SimulatedHost) -> None:
    """The server was switched off."""
    for name in world.running():
        world.end(name, 137)


def lose_images(_: st.DrawFn, world: lm.SimulatedHost) -> None:
    world.images.clear()


def reload_something_old(_: st.DrawFn, world: lm.SimulatedHost) -> None:
    for container in world.containers.values():
        if container.spec.role == "edge":
            container.loaded = lm.render_caddyfile(a_state(instance="0"), "b", ())


DAMAGES = (
    stop_something, remove_something, leave_aside, delete_files, lose_the_network,
    stop_everything, lose_images, reload_something_old,
)  # fmt: skip


@st.composite
def worlds(draw: st.DrawFn) -> lm.SimulatedHost:
    """A server that has seen other states, killed changes and misfortune."""
    world = a_world(gpus=lm.SimulatedGpus([lm.simulated_card("H100 80 GB")] * 2))
    for state in draw(st.lists(states(), max_size=2)):
        killed_at = draw(st.sampled_from([0, 1, 2, 3, 5, 8, 11, 14, 17, 20, 25]))
        make_so(state, world, Trouble((killed_at,), after=draw(st.booleans())))
    for damage in draw(st.lists(st.sampled_from(DAMAGES), max_size=3)):
        damage(draw, world)
    return world


def make_so(state: lm.State, world: lm.SimulatedHost, trouble: Trouble | None = None) -> None:
    control = lm.Control(lambda _: None)
    try:
        lm.converge(state, a_site(), some_tools(world, trouble), control)
    except Crash:
        some_tools(world)  # the next life of the manager


def plan_for(state: lm.State, world: lm.SimulatedHost) -> lm.Plan:
    return lm.plan_state(state, lm.observe(some_tools(world)), a_site())


@settings(max_examples=60)
@given(states(), worlds())
def test_after_a_change_nothing_is_left_to_do(state: lm.State, world: lm.SimulatedHost) -> None:
    make_so(state, world)
    assert str(plan_for(state, world)) == ""
    assert world.routed() == {m.served_model_name for m in state.wished_models}


def databases_over(plan: lm.Plan, observed: lm.Observed) -> list[set[str]]:
    """The database containers there are, at first and after each step of the plan."""
    names = {str(name) for name, c in observed.containers.items() if c.role == "database"}
    history = [set(names)]
    for step in (step for stage in plan.stages for step in stage.steps):
        match step:
            case lm.CreateContainer(spec, _) if spec.role == "database":
                names.add(spec.name)
            case lm.SetAside(name, _, _) if name in names:
                names.symmetric_difference_update({name, lm.aside(name)})
            case lm.BringBack(name, _) if lm.aside(name) in names:
                names.symmetric_difference_update({name, lm.aside(name)})
            case lm.Discard(name, _, _):
                names.discard(name)
        history.append(set(names))
    return history


@settings(max_examples=60)
@given(states(), worlds(), st.sampled_from([None, "chat", "embed"]))
def test_no_plan_discards_the_database_or_leaves_none(
    state: lm.State, world: lm.SimulatedHost, model: str | None
) -> None:
    observed = lm.observe(some_tools(world))
    plan = lm.plan_state(state, observed, a_site(), scope=only(model))
    discarded = {
        step.name for stage in plan.stages for step in stage.steps if isinstance(step, lm.Discard)
    }
    assert lm.database_name(state) not in discarded
    if state.endpoint == "stopped":
        assert not {n for n in discarded if observed.containers[n].role == "database"}
    history = databases_over(plan, observed)
    assert all(history) or not history[0]


@settings(max_examples=30)
@given(states(), worlds())
def test_a_plan_is_the_same_for_the_same_world(state: lm.State, world: lm.SimulatedHost) -> None:
    assert str(plan_for(state, world)) == str(plan_for(state, world))


@settings(max_examples=30)
@given(states(), worlds())
def test_a_change_of_one_model_touches_no_container_of_another(
    state: lm.State, world: lm.SimulatedHost
) -> None:
    plan = lm.plan_state(state, lm.observe(some_tools(world)), a_site(), scope=only("chat"))
    text = "\n".join(lm.describe(step) for stage in plan.stages for step in stage.steps)
    assert "llm-model-embed" not in text
