"""Orchestration: a plan becomes the world; what fails is undone, and what is killed is healed."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
from builders import GPU_0, GPU_1, a_model, a_site, a_state, an_engine, on_gpus, only
from fakes import Crash, FakeFiles, Trouble, a_world, copy_of, some_tools

import llm_manager as lm

CHAT = lm.ContainerName("llm-model-chat-0")
OTHER = lm.ContainerName("llm-model-other-0")
BROKEN = "--broken"

TWO = a_state(a_model(), a_model("other"))
CHANGED = TWO.with_model(a_model(engine_arguments=("--max-model-len", "8192")))
BREAKING = TWO.with_model(a_model(engine_arguments=(BROKEN,)))


def a_failure() -> lm.ManagerError:
    return lm.ContainerFailedError("Docker could not do that: no reason.", advice="Look.")


@dataclass
class Outcome:
    """What one run of `converge` said and raised."""

    lines: list[str]
    error: BaseException | None


def run(
    state: lm.State,
    world: lm.SimulatedHost,
    trouble: Trouble | None = None,
    *,
    model: str | None = None,
    cancel_at: str = "nowhere",
    at_line: Callable[[str], object] = lambda _: None,
) -> Outcome:
    """Converge to the end, bitter or not; `cancel_at`: the operator cancels at this line."""
    outcome = Outcome([], None)

    def report(line: str) -> None:
        outcome.lines.append(line)
        at_line(line)
        if cancel_at in line:
            control.cancel()

    control = lm.Control(report)
    change = replace(lm.applying(), scope=only(model))
    try:
        lm.converge(state, a_site(), some_tools(world, trouble), control, change)
    except (lm.ManagerError, Crash) as error:
        outcome.error = error
    return outcome


def two_gpus() -> lm.SimulatedGpus:
    return lm.SimulatedGpus([lm.simulated_card("H100 80 GB")] * 2)


def a_server_with(state: lm.State) -> lm.SimulatedHost:
    world = a_world()
    world.broken.add(BROKEN)
    assert run(state, world).error is None
    return world


def plan_for(state: lm.State, world: lm.SimulatedHost) -> str:
    return str(lm.plan_state(state, lm.observe(some_tools(world)), a_site()))


def shape(world: lm.SimulatedHost) -> dict[str, tuple[str, bool]]:
    """Every container with its settings, and whether it runs."""
    return {name: (str(c.spec.hash), c.running) for name, c in world.containers.items()}


@pytest.fixture(scope="module")
def two_models() -> lm.SimulatedHost:
    """Copy it: every test has a server of its own."""
    return a_server_with(TWO)


# --- what works ----------------------------------------------------------------------


def test_a_first_deployment_ends_routed_and_with_nothing_left_to_do() -> None:
    world = a_server_with(TWO)
    assert world.routed() == {"chat", "other"}
    assert plan_for(TWO, world) == ""


def test_the_start_log_of_an_engine_is_kept(two_models: lm.SimulatedHost) -> None:
    world = copy_of(two_models)
    assert run(CHANGED, world).error is None
    assert isinstance(world.files, FakeFiles)
    assert set(world.files.kept) == {CHAT}


def test_a_slow_start_is_told_with_the_engines_last_line() -> None:
    world = a_world()
    world.start_seconds = 25
    outcome = run(a_state(a_model()), world)
    assert outcome.error is None
    assert "  10 s: llm-model-chat-0 starts" in outcome.lines
    assert "  llm-model-chat-0 is ready after 25 s" in outcome.lines
    again = run(a_state(a_model(engine_arguments=("--seed", "1"))), world)
    assert "  10 s: llm-model-chat-0 starts, ready in about 15 s" in again.lines


def test_an_engine_that_never_answers_is_given_up_and_removed() -> None:
    world = a_world()
    world.clock.pace = 500
    world.deaf.add(CHAT)
    outcome = run(a_state(a_model()), world)
    assert isinstance(outcome.error, lm.ContainerFailedError)
    assert outcome.error.fact == "llm-model-chat-0 was not ready after 1 h 1 min."
    assert CHAT not in world.containers


def test_fewer_replicas_leave_no_route_to_a_dead_one() -> None:
    world = a_server_with(a_state(a_model(replicas=2)))
    fewer = a_state(a_model())
    assert run(fewer, world).error is None
    assert plan_for(fewer, world) == ""
    loaded = [c.loaded for c in world.containers.values() if c.spec.role == "gateway"]
    assert ["llm-model-chat-1" in text for text in loaded] == [False]


REPLICAS = a_state(a_model(replicas=2))
NEWER = a_state(a_model(replicas=2, engine_arguments=("--seed", "1")))
SECOND = lm.ContainerName("llm-model-chat-1")


def replicas_routed(world: lm.SimulatedHost) -> set[str]:
    """What the gateway that the edge turns to would send requests to."""
    slot = lm.serving_slot(lm.observe(some_tools(world)))
    gateway = world.containers[lm.gateway_name(REPLICAS, slot or "a")]
    return {name for name in (CHAT, SECOND) if f"//{name}:" in gateway.loaded}


def test_replicas_are_replaced_one_at_a_time_after_the_gateway_has_turned_away() -> None:
    world = a_server_with(REPLICAS)
    routed: dict[str, set[str]] = {}
    outcome = run(NEWER, world, at_line=lambda said: routed.update({said: replicas_routed(world)}))
    away = {line: to for line, to in routed.items() if line.startswith("set aside")}
    assert outcome.error is None
    assert list(away.values()) == [{SECOND}, {CHAT}]
    assert replicas_routed(world) == {CHAT, SECOND}
    assert plan_for(NEWER, world) == ""


def test_a_replica_is_not_stopped_before_it_is_idle() -> None:
    world = a_server_with(REPLICAS)
    world.loads[CHAT] = lm.EngineLoad(running=1, waiting=0, tokens=1)
    begun, steps = world.clock.monotonic(), dict[str, float]()

    def note(line: str) -> None:
        steps[line.partition(":")[0]] = world.clock.monotonic() - begun

    run(NEWER, world, at_line=note)
    assert steps["set aside llm-model-chat-0"] >= lm.DRAIN_SECONDS
    assert steps["set aside llm-model-chat-1"] < 2 * lm.DRAIN_SECONDS, "that one was idle"


def test_a_failure_among_replicas_leaves_only_those_routed_that_answer() -> None:
    settled = a_server_with(REPLICAS)
    for at, later in strikes(NEWER, settled):
        world = copy_of(settled)
        run(NEWER, world, Trouble((at,), after=later, error=a_failure))
        assert world.routed() == {"chat"}, (at, later)
        assert all(map(world.serves, replicas_routed(world))), (at, later)
        run(NEWER, world)
        assert plan_for(NEWER, world) == "", (at, later)


def test_two_engines_on_two_gpus_are_both_made(two_models: lm.SimulatedHost) -> None:
    state = a_state(a_model(placement=on_gpus(GPU_0)), a_model("other", placement=on_gpus(GPU_1)))
    world = copy_of(two_models)
    world.gpus = two_gpus()
    assert run(state, world).error is None
    assert plan_for(state, world) == ""


@pytest.mark.parametrize(
    "after",
    [
        CHANGED,
        BREAKING,
        TWO.with_model(a_model(wish="stopped")),
        replace(TWO, models=TWO.models[1:]),
        TWO.with_model(a_model("third")),
        replace(TWO, images=replace(TWO.images, litellm="example/litellm:v2")),
        replace(TWO, edge=replace(TWO.edge, hostnames=("llm.example.org",))),
    ],
    ids=["changed", "failing", "stopped", "removed", "added", "gateway image", "hostname"],
)
def test_another_model_is_routed_at_every_moment_of_a_change(
    two_models: lm.SimulatedHost, after: lm.State
) -> None:
    world = copy_of(two_models)

    def watch() -> None:
        assert "other" in world.routed()

    run(after, world, Trouble(watch=watch))
    assert "other" in world.routed()


# --- what fails ------------------------------------------------------------------------


def test_a_failed_replacement_brings_the_old_container_back(two_models: lm.SimulatedHost) -> None:
    world = copy_of(two_models)
    before = shape(world)
    outcome = run(BREAKING, world, model="chat")
    assert str(outcome.error) == (
        "llm-model-chat-0 ended with status 1 before it was ready: "
        "ValueError: The model does not fit. Mend that, then deploy again; its whole log is kept."
    )
    assert shape(world) == before
    assert world.routed() == {"chat", "other"}


def test_what_fails_is_undone_newest_first(two_models: lm.SimulatedHost) -> None:
    outcome = run(BREAKING, copy_of(two_models), model="chat")
    image = TWO.images.vllm_cpu
    assert [line for line in outcome.lines if "undo" in line] == [
        f"undone: create llm-model-chat-0 from {image}: its settings changed",
        "undone: set aside llm-model-chat-0: its settings changed",
    ]


def test_an_undo_that_fails_is_reported_and_the_next_still_runs(
    two_models: lm.SimulatedHost,
) -> None:
    smooth = Trouble()
    run(BREAKING, copy_of(two_models), smooth, model="chat")
    # stop, rename, create, start; then the undo: stop, remove, rename, start
    assert smooth.count == 8
    world = copy_of(two_models)
    outcome = run(BREAKING, world, Trouble((3, 4), error=a_failure), model="chat")
    assert [line for line in outcome.lines if "undo" in line] == [
        f"could not undo create llm-model-chat-0 from {TWO.images.vllm_cpu}: its settings changed: "
        + str(a_failure()),
        "undone: set aside llm-model-chat-0: its settings changed",
    ]
    assert world.routed() == {"chat", "other"}


@pytest.mark.parametrize(("last", "kept"), [(2, False), (99, True)])
def test_a_container_that_cannot_be_taken_back_keeps_the_files_it_reads(
    two_models: lm.SimulatedHost, last: int, kept: bool
) -> None:
    """Docker restarts a gateway by itself; without its configuration it would never come up."""
    world = copy_of(two_models)
    tools = some_tools(world, Trouble(range(2, last + 1), error=a_failure))
    world.files.trouble = Trouble()  # type: ignore[attr-defined] - the disk is well
    spec = lm.render_gateway(TWO, "b", lm.served_models(TWO, TWO.models), a_site())
    steps = (
        lm.WriteFile("litellm-b/config.yaml", "new", None, "for it"),
        lm.CreateContainer(spec, "not there"),
    )
    with pytest.raises(lm.ManagerError):
        lm.apply_stage(lm.Stage(title="endpoint", steps=steps), tools, lm.Control(lambda _: None))
    assert (spec.name in world.containers) is kept
    assert ("litellm-b/config.yaml" in world.files.read_generated()) is kept


def test_a_stop_that_fails_half_way_leaves_the_model_running(two_models: lm.SimulatedHost) -> None:
    world = copy_of(two_models)
    before = shape(world)
    run(CHANGED, world, Trouble((1,), after=True, error=a_failure), model="chat")
    assert shape(world) == before


def test_one_model_that_fails_does_not_keep_the_others_from_serving() -> None:
    world = a_world()
    world.broken.add(BROKEN)
    outcome = run(BREAKING, world)
    assert isinstance(outcome.error, lm.ContainerFailedError)
    assert world.routed() == {"other"}
    assert any(line.startswith("model chat failed: ") for line in outcome.lines)


def test_every_failure_of_one_change_is_named() -> None:
    world = a_world()
    world.broken.add(BROKEN)
    both = BREAKING.with_model(a_model("other", engine_arguments=(BROKEN,)))
    error = run(both, world).error
    assert isinstance(error, lm.ManagerError)
    assert "llm-model-chat-0 ended" in error.fact
    assert "llm-model-other-0 ended" in error.fact
    assert error.advice == "Mend that, then deploy again; its whole log is kept."


def test_an_image_that_no_registry_has_interrupts_nothing(two_models: lm.SimulatedHost) -> None:
    world = copy_of(two_models)
    world.absent_images.add("example/none:v1")
    before = shape(world)
    error = run(TWO.with_model(a_model(image="example/none:v1")), world, model="chat").error
    assert isinstance(error, lm.ContainerFailedError)
    assert "could not pull example/none:v1" in error.fact
    assert shape(world) == before


def test_weights_that_the_hub_does_not_have_interrupt_nothing(two_models: lm.SimulatedHost) -> None:
    world = copy_of(two_models)
    world.absent_weights.add("acme/gone")
    moved = TWO.with_model(a_model(source=lm.HubSource(repository="acme/gone")))
    before = shape(world)
    assert "acme/gone is not on" in str(run(moved, world).error)
    assert shape(world) == before


def test_weights_are_fetched_once(two_models: lm.SimulatedHost) -> None:
    world = copy_of(two_models)
    moved = TWO.with_model(a_model(source=lm.HubSource(repository="acme/new")))
    said = run(moved, world).lines
    assert "download acme/new: not on this server" in said
    assert "  acme/new: 8 B of 8 B (100%), 1 of 1 files" in said
    assert plan_for(moved, world) == ""


def test_a_rejected_caddyfile_changes_nothing(two_models: lm.SimulatedHost) -> None:
    world = copy_of(two_models)
    world.rejected = "example.org"
    before, files = shape(world), world.files.read_generated()
    state = replace(TWO, edge=replace(TWO.edge, hostnames=("example.org",)))
    error = run(state, world).error
    assert isinstance(error, lm.ContainerFailedError)
    assert error.fact.startswith("Caddy rejects")
    assert shape(world) == before
    assert world.files.read_generated() == files
    assert world.routed() == {"chat", "other"}


def test_a_database_that_does_not_come_up_leaves_the_endpoint_alone() -> None:
    world = a_world()
    world.broken.add("postgres:99")
    state = replace(TWO, images=replace(TWO.images, postgres="postgres:99"))
    outcome = run(state, world)
    assert isinstance(outcome.error, lm.ContainerFailedError)
    assert world.running() == {CHAT, OTHER}


@pytest.mark.parametrize("images", [{"postgres": "postgres:99"}, {"litellm": "litellm:99"}])
def test_a_stopped_model_frees_its_gpu_even_while_the_endpoint_is_broken(
    two_models: lm.SimulatedHost, images: dict[str, str]
) -> None:
    world = copy_of(two_models)
    world.broken |= {*images.values()}
    stopped = TWO.with_model(a_model(wish="stopped"))
    outcome = run(replace(stopped, images=replace(TWO.images, **images)), world)
    assert outcome.error is not None
    assert CHAT not in world.containers
    assert {OTHER, "llm-postgres", "llm-litellm-a", "llm-caddy"} <= world.running()


def test_a_database_image_that_fails_brings_the_old_database_back(
    two_models: lm.SimulatedHost,
) -> None:
    world = copy_of(two_models)
    before = shape(world)
    world.broken.add("postgres:99")
    state = replace(TWO, images=replace(TWO.images, postgres="postgres:99"))
    assert run(state, world).error is not None
    assert shape(world) == before
    assert world.routed() == {"chat", "other"}


def test_a_second_replica_that_fails_brings_the_first_back_too() -> None:
    before = a_state(a_model(replicas=2))
    world = a_server_with(before)
    shaped = shape(world)
    second = lm.ContainerName("llm-model-chat-1")
    world.clock.pace = 500
    world.deaf.add(second)
    run(before.with_model(a_model(replicas=2, engine_arguments=("--seed", "1"))), world)
    world.deaf.clear()
    assert shape(world) == shaped


def effects_of(after: lm.State, world: lm.SimulatedHost) -> int:
    counted = Trouble()
    run(after, copy_of(world), counted)
    return counted.count


def strikes(after: lm.State, world: lm.SimulatedHost) -> Iterator[tuple[int, bool]]:
    """Every effect of a change, just before and just after it."""
    for at in range(1, effects_of(after, world) + 1):
        yield at, False
        yield at, True


@pytest.mark.parametrize(
    "after", [CHANGED, TWO.with_model(a_model("third"))], ids=["changed", "added"]
)
def test_a_failure_at_any_moment_drops_no_model_that_was_routed(
    two_models: lm.SimulatedHost, after: lm.State
) -> None:
    for at, later in strikes(after, two_models):
        world = copy_of(two_models)
        run(after, world, Trouble((at,), after=later, error=a_failure))
        assert world.routed() >= {"chat", "other"}, (at, later)
        run(after, world)
        assert plan_for(after, world) == "", (at, later)


# --- cancelling ------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["set aside llm-model-chat", "create llm-model-chat", "wait unti"])
def test_cancelling_undoes_what_was_begun(two_models: lm.SimulatedHost, line: str) -> None:
    world = copy_of(two_models)
    before = shape(world)
    outcome = run(CHANGED, world, model="chat", cancel_at=line)
    assert isinstance(outcome.error, lm.CancelledError)
    assert shape(world) == before
    assert world.routed() == {"chat", "other"}


def test_cancelling_among_replicas_leaves_both_routed() -> None:
    for line in ("turn the gateway away", "set aside", "create llm-model", "wait until llm-model"):
        world = a_server_with(REPLICAS)
        before = shape(world)
        outcome = run(NEWER, world, cancel_at=line)
        assert isinstance(outcome.error, lm.CancelledError)
        assert replicas_routed(world) == {CHAT, SECOND}, line
        engines = {name: c for name, c in shape(world).items() if name in before}
        assert engines[CHAT] == before[CHAT], line


def test_cancelling_while_the_old_ones_are_discarded_keeps_the_new_ones() -> None:
    world = a_server_with(a_state(a_model(replicas=2)))
    after = a_state(a_model(replicas=2, engine_arguments=("--seed", "1")))
    run(after, world, cancel_at="discard llm-model-chat-0.aside")
    assert {"llm-model-chat-0", "llm-model-chat-1"} <= world.running()


def test_a_pull_can_be_cancelled_between_its_events(two_models: lm.SimulatedHost) -> None:
    world = copy_of(two_models)
    before = shape(world)
    state = TWO.with_model(a_model(image="example/engine:v2"))
    outcome = run(state, world, model="chat", cancel_at="10 B of 100 B")
    assert isinstance(outcome.error, lm.CancelledError)
    assert shape(world) == before
    assert "example/engine:v2" not in world.images


def test_cancelling_stops_every_lane() -> None:
    state = a_state(a_model(placement=on_gpus(GPU_0)), a_model("other", placement=on_gpus(GPU_1)))
    world = a_world(gpus=two_gpus())
    world.start_seconds = 25
    outcome = run(state, world, cancel_at="wait until llm-model")
    assert isinstance(outcome.error, lm.CancelledError)
    assert not {CHAT, OTHER} & set(world.containers)


# --- kill -9 ---------------------------------------------------------------------------------

KILLED = {
    "first deployment": (a_state(endpoint="stopped"), a_state(a_model())),
    "changed": (TWO, CHANGED),
    "stopped": (TWO, TWO.with_model(a_model(wish="stopped"))),
    "removed": (TWO, replace(TWO, models=TWO.models[1:])),
    "two replicas": (a_state(a_model(replicas=2)), a_state(a_model(replicas=2, image="x/y:2"))),
    "https port": (TWO, replace(TWO, edge=replace(TWO.edge, https_port=8443))),
    "endpoint stopped": (a_state(), a_state(endpoint="stopped")),
    "database image": (TWO, replace(TWO, images=replace(TWO.images, postgres="postgres:16.9"))),
}


@pytest.mark.parametrize("story", KILLED)
def test_a_kill_at_any_moment_is_healed_by_the_next_plan(story: str) -> None:
    before, after = KILLED[story]
    settled = a_server_with(before)
    for at, later in strikes(after, settled):
        world = copy_of(settled)
        databases, volumes = len(databases_of(world)), set(world.volumes)
        assert isinstance(run(after, world, Trouble((at,), after=later)).error, Crash)
        assert len(databases_of(world)) >= databases, (at, later)
        assert world.volumes >= volumes, (at, later)
        assert run(after, world).error is None, (at, later)
        assert plan_for(after, world) == "", (at, later)
        assert len(databases_of(world)) >= databases, (at, later)


def databases_of(world: lm.SimulatedHost) -> list[str]:
    return [name for name, c in world.containers.items() if c.spec.role == "database"]


@pytest.mark.parametrize("story", ["changed", "database image"])
def test_after_a_kill_the_way_back_is_open_too(story: str) -> None:
    before, after = KILLED[story]
    settled = a_server_with(before)
    for at, later in strikes(after, settled):
        world = copy_of(settled)
        run(after, world, Trouble((at,), after=later))
        assert run(before, world).error is None, (at, later)
        assert plan_for(before, world) == "", (at, later)


# --- jobs --------------------------------------------------------------------------------------


def a_job(work: Callable[[lm.Control], None]) -> lm.Job:
    return lm.Job("Deploy chat").run(work, at_end=lambda: None)


def follow_to_the_end(job: lm.Job) -> None:
    with contextlib.suppress(lm.ManagerError):
        list(job.follow())


def test_the_log_of_a_job_survives_its_reader() -> None:
    gate = threading.Event()

    def work(control: lm.Control) -> None:
        control.report("one")
        assert gate.wait(5)
        control.report("two")

    job = a_job(work)
    reader = job.follow()
    assert next(reader) == "one"
    assert isinstance(reader, Iterator)
    reader.close()  # type: ignore[attr-defined]
    gate.set()
    assert list(job.follow()) == ["one", "two"]
    assert list(job.follow()) == ["one", "two"]


def test_a_job_that_fails_ends_and_tells_every_reader() -> None:
    def work(control: lm.Control) -> None:
        control.report("one")
        raise a_failure()

    job = a_job(work)
    for _ in range(2):
        with pytest.raises(lm.ContainerFailedError, match="no reason"):
            list(job.follow())
    assert job.view().lines == ("one",)
    assert job.view().fault == "Docker could not do that: no reason. Look."
    assert job.view().finished_at is not None


def test_a_job_with_a_bug_ends_with_a_fault_that_shows_no_internals() -> None:
    ended = list[str]()

    def work(_: lm.Control) -> None:
        raise KeyError("sk-internal")

    job = lm.Job("Deploy chat").run(work, at_end=lambda: ended.append("released"))
    reader = threading.Thread(target=lambda: follow_to_the_end(job), daemon=True)
    reader.start()
    reader.join(10)
    assert not reader.is_alive()
    assert job.view().fault == "Deploy chat failed. See the journal."
    assert job.view().finished_at is not None
    assert "sk-internal" not in str(job.view())
    assert ended == ["released"]


def test_what_a_job_held_is_free_before_it_is_called_finished() -> None:
    seen_at_release = list[bool]()
    job = lm.Job("Deploy chat")
    job.run(lambda _: None, at_end=lambda: seen_at_release.append(job.finished_at is None))
    list(job.follow())
    assert seen_at_release == [True]


def test_a_cancelled_job_ends_at_its_next_safe_point() -> None:
    begun, gate = threading.Event(), threading.Event()

    def work(control: lm.Control) -> None:
        begun.set()
        assert gate.wait(5)
        control.check()

    job = a_job(work)
    assert begun.wait(5)
    job.cancel()
    gate.set()
    with pytest.raises(lm.CancelledError):
        list(job.follow())


def test_readiness_is_asked_of_the_whole_question() -> None:
    """A gateway that runs with an older list of names is not ready for a newer one."""
    world = a_server_with(TWO)
    tools = some_tools(world)
    wanted = lm.render_gateway(
        TWO, "a", lm.served_models(TWO, (*TWO.models, a_model("third"))), a_site()
    )
    seen = tools.containers.look(wanted.name)
    assert seen is not None
    assert not tools.probes.is_ready(wanted, seen)
    assert an_engine(TWO).readiness == lm.EngineAnswers(
        model_type="chat", served_model_name="chat", engine_key=TWO.secrets.engine_key
    )
