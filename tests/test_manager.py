"""Manager: the use cases, over a simulated server and a real home directory."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from builders import GPU_0, GPU_1, NOW, SECRET_MARK, a_site, on_gpus
from fakes import Server, some_tools, until

import llm_manager as lm

L40S = lm.SimulatedCard("NVIDIA L40S", "Ada", 46068)
CHAT = {"name": "chat", "type": "chat", "source": {"kind": "hub", "repository": "a/b"}}


def serve(server: Server, *names: str) -> None:
    for name in names:
        server.manager.register(CHAT | {"name": name})
        server.do(lm.deploying(name))


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path)


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Server]:
    return lambda *cards: Server(tmp_path, lm.SimulatedGpus(cards))


# --- from registering to removing ---------------------------------------------------------------


def test_a_model_is_registered_deployed_stopped_and_removed(server: Server) -> None:
    model = server.manager.register(CHAT)
    assert model.wish == "stopped"
    assert server.world.containers == {}

    lines = server.do(lm.deploying("chat"))
    assert server.world.routed() == {"chat"}
    assert lines[-1] == "  llm-caddy is ready after 0 s"
    assert not server.manager.plan(lm.applying())

    server.do(lm.stopping("chat"))
    assert server.world.routed() == set()
    assert "llm-model-chat-0" not in server.world.containers
    assert server.manager.state().model("chat").wish == "stopped"

    server.do(lm.removing("chat"))
    assert server.manager.state().models == ()


def test_a_plan_changes_nothing(server: Server) -> None:
    server.manager.register(CHAT)
    before = server.store.config_path.read_text()
    assert server.manager.plan(lm.deploying("chat"))
    assert server.store.config_path.read_text() == before
    assert server.world.containers == {}


def test_a_revised_model_takes_effect_with_the_next_plan(server: Server) -> None:
    serve(server, "chat")
    server.manager.revise("chat", {"replicas": 2})
    assert server.world.running() >= {"llm-model-chat-0"}
    assert "create llm-model-chat-1" in str(server.manager.plan(lm.applying()))
    server.do(lm.applying())
    assert server.world.running() >= {"llm-model-chat-0", "llm-model-chat-1"}


def test_a_rollback_brings_the_earlier_state_back(server: Server) -> None:
    serve(server, "chat")
    server.manager.revise("chat", {"engine_arguments": ["--seed", "1"]})
    server.do(lm.applying())
    server.do(server.manager.returning(None))
    assert server.manager.state().model("chat").engine_arguments == ()
    assert server.world.routed() == {"chat"}
    first = server.manager.returning(1)
    assert first.edit(server.manager.state()).models == ()


def test_without_history_there_is_no_way_back(server: Server) -> None:
    with pytest.raises(lm.RefusedError, match="There is no version 0"):
        server.manager.returning(None)


def test_after_a_power_cut_everything_wished_comes_back(server: Server) -> None:
    serve(server, "chat", "other")
    for name in server.world.running():
        server.world.end(name, 137)
    server.do(lm.restoring())
    assert server.world.routed() == {"chat", "other"}
    assert not server.manager.plan(lm.applying())


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw",
    [
        CHAT | {"name": "Not A Name"},
        CHAT | {"type": "unknown"},
        CHAT | {"replicas": 0},
        CHAT | {"source": {"kind": "hub"}},
        CHAT | {"engine_arguments": ["--port", "1"]},
        {},
        CHAT,
    ],
    ids=["name", "type", "replicas", "source", "argument", "nothing", "taken"],
)
def test_bad_input_loses_nothing(server: Server, raw: dict[str, Any]) -> None:
    server.manager.register(CHAT)
    before = server.store.config_path.read_text()
    versions = server.store.versions()
    with pytest.raises(lm.RefusedError):
        server.manager.register(raw)
    assert server.store.config_path.read_text() == before
    assert server.store.versions() == versions


def test_an_earlier_version_tells_when_it_was_written(server: Server) -> None:
    written = server.store.config_path.stat().st_mtime
    server.manager.register(CHAT)
    assert [(number, at.timestamp()) for number, at in server.manager.versions()] == [
        (1, pytest.approx(written))
    ]


def test_a_bad_revision_changes_nothing(server: Server) -> None:
    server.manager.register(CHAT)
    before = server.manager.state()
    with pytest.raises(lm.RefusedError, match="replicas"):
        server.manager.revise("chat", {"replicas": 99})
    assert server.manager.state() == before


@pytest.mark.parametrize("make", [lm.deploying, lm.stopping, lm.restarting, lm.removing])
def test_a_change_of_an_unknown_model_starts_no_job_and_frees_the_lock(
    server: Server, make: Callable[[str], lm.Change]
) -> None:
    refusals = []  # kept: what a traceback holds is not freed by chance
    for _ in range(2):
        with pytest.raises(lm.RefusedError, match="no model called 'nobody'") as refused:
            server.manager.start(make("nobody"))
        refusals.append(refused)
    assert server.manager.jobs() == []


def everything_is_here(server: Server) -> None:
    """No image and no weights are to be fetched."""
    server.world.images |= {*asdict(server.manager.state().images).values()}
    server.world.weights["a/b"] = frozenset({"main"})


def test_a_second_change_is_refused_while_one_runs(server: Server) -> None:
    everything_is_here(server)
    server.manager.register(CHAT)
    gate, reached = threading.Event(), threading.Event()

    def wait_here() -> None:
        reached.set()
        assert gate.wait(5)

    server.trouble.watch = wait_here
    job = server.manager.start(lm.deploying("chat"))
    assert reached.wait(5)
    with pytest.raises(lm.BusyError, match="Deploy chat, since"):
        server.manager.start(lm.stopping("chat"))
    with pytest.raises(lm.BusyError):
        server.manager.register(CHAT | {"name": "other"})
    gate.set()
    list(job.follow())
    server.do(lm.stopping("chat"))


@contextlib.contextmanager
def fetching(server: Server, change: lm.Change) -> Iterator[lm.Job]:
    """A change whose weights are on their way for as long as the block lasts."""
    gate, reached = threading.Event(), threading.Event()

    def wait_here() -> None:
        reached.set()
        assert gate.wait(5)

    server.world.while_downloading = wait_here
    job = server.manager.start(change)
    assert reached.wait(5)
    try:
        yield job
    finally:
        gate.set()


def test_a_directory_whose_links_lead_out_of_it_is_refused(server: Server, tmp_path: Path) -> None:
    """As a snapshot of the hub's cache is: a container would see links to nowhere."""
    blob = tmp_path / "blobs" / "abc"
    blob.parent.mkdir()
    blob.write_text("{}")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "config.json").symlink_to(blob)
    local = {"source": {"kind": "local", "path": str(snapshot)}}
    with pytest.raises(lm.RefusedError, match=r"links that lead out of it, such as config\.json"):
        server.manager.register(CHAT | local)
    assert server.manager.state().models == ()


def test_a_shared_cache_is_never_pruned_at_once(server: Server) -> None:
    shared = replace(server.store.load(), hugging_face_home="/data/hf")
    server.store.save(shared)
    with pytest.raises(lm.RefusedError, match="may hold what others downloaded"):
        server.manager.weights.orphans()


def test_other_models_are_changed_while_one_is_fetched(server: Server) -> None:
    serve(server, "other")
    del server.world.weights["a/b"]
    server.manager.register(CHAT)
    with fetching(server, lm.deploying("chat")) as job:
        snapshot = server.manager.snapshot()
        assert lm.running_job(snapshot) is None
        assert [row[2] for row in lm.model_rows(snapshot)] == ["ready", "pending"]
        assert lm.attention(snapshot) == []
        server.do(lm.stopping("other"))
        assert server.world.routed() == frozenset()
    list(job.follow())
    assert server.world.routed() == {"chat"}
    assert server.manager.state().model("other").wish == "stopped"


def test_a_deployment_that_is_cancelled_while_it_is_fetched_takes_back_its_own_wish_alone(
    server: Server,
) -> None:
    serve(server, "other")
    del server.world.weights["a/b"]
    server.manager.register(CHAT)
    with fetching(server, lm.deploying("chat")) as job:
        server.do(lm.stopping("other"))
        server.manager.cancel_job(job.id)
    with pytest.raises(lm.CancelledError):
        list(job.follow())
    wishes = {model.name: model.wish for model in server.manager.state().models}
    assert wishes == {"chat": "stopped", "other": "stopped"}


def test_what_is_here_comes_back_before_what_must_be_fetched(server: Server) -> None:
    serve(server, "other")
    server.manager.register(CHAT | {"source": {"kind": "hub", "repository": "c/d"}})
    server.world.absent_weights.add("c/d")
    server.manager.save(lm.deploying("chat"))
    server.world.end(lm.ContainerName("llm-model-other-0"), 137)
    job = server.manager.start(lm.restoring())
    with pytest.raises(lm.ManagerError, match="c/d is not on"):
        list(job.follow())
    back = job.lines.index("  llm-model-other-0 is ready after 0 s")
    assert back < next(n for n, line in enumerate(job.lines) if line.startswith("download c/d"))
    assert server.world.routed() == {"other"}


def test_a_cancelled_deployment_is_undone_and_listed(server: Server) -> None:
    server.manager.register(CHAT)

    def cancel() -> None:
        server.manager.cancel_job(server.manager.jobs()[0].id)

    server.trouble.watch = cancel
    job = server.manager.start(lm.deploying("chat"))
    with pytest.raises(lm.CancelledError):
        list(job.follow())
    assert "llm-model-chat-0" not in server.world.containers
    assert server.manager.jobs()[0].fault is not None
    assert server.manager.state().model("chat").wish == "stopped"
    assert server.manager.state().endpoint == "stopped"


def test_jobs_are_listed_newest_first(server: Server) -> None:
    serve(server, "chat")
    server.do(lm.stopping("chat"))
    assert [job.title for job in server.manager.jobs()] == ["Stop chat", "Deploy chat"]


# --- tasks beside changes -----------------------------------------------------------------------


@contextlib.contextmanager
def a_task(server: Server, title: str = "Download a/b") -> Iterator[lm.Job]:
    """A task that waits until it is cancelled or the block ends."""
    gate = threading.Event()

    def work(control: lm.Control) -> None:
        control.report("begun")
        while not gate.wait(0.005):
            control.check()

    job = server.manager.start_task(title, work)
    try:
        yield job
    finally:
        gate.set()
        with contextlib.suppress(lm.CancelledError):
            list(job.follow())


def test_changes_go_on_beside_a_task(server: Server) -> None:
    with a_task(server) as task:
        serve(server, "chat")
        assert server.world.routed() == {"chat"}
        snapshot = server.manager.snapshot()
        assert [(job.kind, job.finished_at is None) for job in snapshot.jobs] == [
            ("change", False),
            ("task", True),
        ]
        assert lm.running_job(snapshot) is None
        assert task.finished_at is None


def test_a_task_does_not_run_twice_at_a_time(server: Server) -> None:
    with a_task(server):
        with pytest.raises(lm.BusyError, match="This is under way: Download a/b, since"):
            server.manager.start_task("Download a/b", lambda _: None)
        server.restart()  # another process of the same installation
        with pytest.raises(lm.BusyError, match="This is under way: Download a/b, since"):
            server.manager.start_task("Download a/b", lambda _: None)
        with a_task(server, "Download c/d"):
            pass
    list(server.manager.start_task("Download a/b", lambda _: None).follow())


def test_a_cancelled_task_says_so_and_withdraws_no_wish(server: Server) -> None:
    server.manager.register(CHAT)
    before = server.manager.state()
    with a_task(server) as task:
        server.manager.cancel_job(task.id)
        with pytest.raises(lm.CancelledError, match=r"It was cancelled\."):
            list(task.follow())
    assert server.manager.state() == before


# --- where a model goes -----------------------------------------------------------------------


def test_models_go_to_free_gpus_first(start: Callable[..., Server]) -> None:
    manager = start(L40S, L40S).manager
    placements = [manager.register(CHAT | {"name": name}).placement for name in ("a", "b", "c")]
    assert placements == [on_gpus(GPU_0), on_gpus(GPU_1), on_gpus(GPU_0)]


def test_without_a_gpu_a_model_goes_to_the_cpu(server: Server) -> None:
    assert server.manager.register(CHAT).placement == lm.CpuPlacement()


def test_where_the_operator_says_where_that_is_where(start: Callable[..., Server]) -> None:
    chosen = {"placement": {"kind": "cpu", "kv_cache_mib": 64}}
    model = start(L40S, L40S).manager.register(CHAT | chosen)
    assert model.placement == lm.CpuPlacement(kv_cache_mib=64)


# --- looking ------------------------------------------------------------


def test_a_snapshot_holds_everything_a_page_shows(server: Server) -> None:
    serve(server, "chat")
    snapshot = server.manager.snapshot()
    assert snapshot.faults == ()
    assert snapshot.state == server.manager.state()
    assert snapshot.observed is not None
    assert snapshot.plan is not None
    assert not snapshot.plan
    assert [job.title for job in snapshot.jobs] == ["Deploy chat"]
    assert SECRET_MARK not in repr(snapshot)


def test_a_snapshot_without_docker_holds_the_fault_and_the_state(server: Server) -> None:
    server.manager.register(CHAT)
    server.world.docker_answers = False
    snapshot = server.manager.snapshot()
    assert [fault.fact for fault in snapshot.faults] == ["Docker does not answer."]
    assert snapshot.state == server.manager.state()
    assert snapshot.observed is None
    assert snapshot.plan is None


def test_a_snapshot_of_an_unreadable_state_holds_the_fault(server: Server) -> None:
    server.store.config_path.write_text("{")
    snapshot = server.manager.snapshot()
    assert snapshot.state is None
    assert "not valid JSON" in str(snapshot.faults[0])


@pytest.mark.parametrize("text", ["", "[]", "model_list: [{}]", "{", "model_list: 7"])
def test_a_spoilt_generated_file_is_written_anew(server: Server, text: str) -> None:
    serve(server, "chat")
    server.store.write_generated("litellm-a/config.yaml", text)
    assert server.manager.snapshot().faults == ()
    server.do(lm.applying())
    assert not server.manager.plan(lm.applying())
    assert server.world.routed() == {"chat"}


def test_the_log_of_a_model_is_its_containers_or_what_was_kept(server: Server) -> None:
    serve(server, "chat")
    assert server.manager.logs.of("chat") == "llm-model-chat-0 starts"
    assert list(server.manager.logs.follow("chat")) == ["llm-model-chat-0 starts"]
    server.do(lm.stopping("chat"))
    assert server.manager.logs.of("chat") == "llm-model-chat-0 starts"


def test_what_an_engine_said_before_it_ended_is_kept_when_it_is_started_again(
    server: Server,
) -> None:
    serve(server, "chat")
    container = server.world.containers[lm.ContainerName("llm-model-chat-0")]
    container.log.append("RuntimeError: EngineCore died.")
    server.world.end(container.name, 0)
    server.do(lm.reviving(lm.ModelName("chat")))
    died = "llm-model-chat-0 starts\nRuntimeError: EngineCore died."
    assert server.store.kept_log(container.name) == "llm-model-chat-0 starts"
    assert server.manager.logs.of("chat", previous=True) == died


def test_the_log_of_a_failed_start_can_be_read_while_the_container_from_before_serves(
    server: Server,
) -> None:
    serve(server, "chat")
    server.world.broken.add("--nonsense")
    server.manager.revise("chat", {"engine_arguments": ["--nonsense"]})
    with pytest.raises(lm.ContainerFailedError):
        server.do(lm.applying())
    assert "ValueError" not in server.manager.logs.of("chat")
    assert "ValueError: The model does not fit." in server.manager.logs.of("chat", previous=True)


def test_a_log_is_searched_in_whatever_case_and_says_where(server: Server) -> None:
    serve(server, "chat")
    container = server.world.containers[lm.ContainerName("llm-model-chat-0")]
    container.log += ["INFO one", "ERROR two", "an error as well"]
    assert server.manager.logs.of("chat", search="Error") == "3: ERROR two\n4: an error as well"
    assert server.manager.logs.of("chat", search="[", tail=2) == "No line has '['."
    assert server.manager.logs.of("chat", tail=1) == "an error as well"


def test_the_doctor_finds_a_well_server_well(start: Callable[..., Server]) -> None:
    server = start(L40S, L40S)
    serve(server, "chat")
    checks = {check.name: check for check in server.manager.doctor()}
    assert {name for name, check in checks.items() if not check.ok} <= {"disk"}
    assert checks["llm-model-chat-0"].text == "ready"
    assert checks["driver"].text == "580.95.05"
    assert (checks["GPU 0"].text, checks["GPU 1"].text) == ("NVIDIA L40S", "NVIDIA L40S")


def test_the_doctor_names_what_is_not_ready_and_what_to_do(server: Server) -> None:
    serve(server, "chat")
    server.world.end("llm-model-chat-0", 137)
    (bad,) = [c for c in server.manager.doctor() if not c.ok and c.name.startswith("llm-")]
    assert (bad.name, bad.text, bad.advice) == (
        "llm-model-chat-0",
        "ended with 137",
        "Run `plan`, then `apply`.",
    )


def test_the_doctor_sees_the_rest_where_docker_does_not_answer(server: Server) -> None:
    server.world.docker_answers = False
    checks = {check.name: check.ok for check in server.manager.doctor()}
    assert checks["Docker"] is False
    assert {"disk", "driver"} <= set(checks)


def test_a_broken_driver_offers_no_gpu_and_the_doctor_says_why(
    start: Callable[..., Server],
) -> None:
    server = start(L40S)
    server.world.gpus.fault = lm.ManagerError("The driver does not answer.", advice="Reboot.")
    with pytest.raises(lm.ManagerError, match="driver does not answer"):
        server.manager.register(CHAT)  # not silently onto the CPU of a GPU server
    (driver,) = [check for check in server.manager.doctor() if check.name == "driver"]
    assert (driver.ok, driver.advice) == (False, "Reboot.")


def test_docker_coming_back_restores_what_was_wished(server: Server) -> None:
    serve(server, "chat")
    for name in server.world.running():
        server.world.end(name, 137)
    server.world.docker_answers = False
    manager = watched(server)
    watch = lm.Watch(manager, seconds=0.001)
    server.world.docker_answers = True
    assert until(lambda: server.world.routed() == {"chat"})
    watch.close()
    assert watch.latest().jobs[0].title == "Restore"


def test_a_container_that_lost_its_gpu_gets_it_back_by_itself_and_only_once(
    start: Callable[..., Server],
) -> None:
    server = start(L40S)
    serve(server, "chat")
    before = server.world.containers[lm.ContainerName("llm-model-chat-0")].container_id
    server.world.blind.add("llm-model-chat-0")
    manager = watched(server)
    watch = lm.Watch(manager, seconds=0.001)
    assert until(lambda: not server.world.blind and server.world.routed() == {"chat"})
    watch.close()
    assert server.world.containers[lm.ContainerName("llm-model-chat-0")].container_id != before
    assert [job.title for job in watch.latest().jobs] == ["Give chat its GPU back"]


def test_a_model_that_ends_in_service_is_started_again(server: Server) -> None:
    """vLLM ends with 0 when its engine dies, so that no restart policy of Docker helps."""
    serve(server, "chat")
    server.world.end("llm-model-chat-0", 0)
    manager = watched(server)
    watch = lm.Watch(manager, seconds=0.001, revivals=lm.Revivals(pauses=(0.0,)))
    assert until(lambda: server.world.routed() == {"chat"})
    assert until(lambda: watch.latest().fates == {})
    watch.close()
    assert [job.title for job in watch.latest().jobs] == ["Start chat again"]


def test_a_model_that_ends_again_and_again_stays_down_with_its_reason(server: Server) -> None:
    serve(server, "chat")
    server.world.broken.add("--served-model-name")
    server.world.end("llm-model-chat-0", 1)
    manager = watched(server)
    watch = lm.Watch(manager, seconds=0.001, revivals=lm.Revivals(pauses=(0.0, 0.0)))
    stays_down = "chat ended 3 times within an hour and stays down: ValueError: The model does not"
    assert until(lambda: watch.latest().fates.get(lm.ModelName("chat"), "").startswith(stays_down))
    watch.close()
    assert len(watch.latest().jobs) == 2
    assert any(m.text.startswith(stays_down) for m in lm.attention(watch.latest()))


def test_the_cause_is_that_of_the_last_run_and_read_once_per_end(server: Server) -> None:
    serve(server, "chat")
    container = server.world.containers[lm.ContainerName("llm-model-chat-0")]
    container.log[:0] = ["ValueError: an earlier run's fault."]
    container.runs_from = 1
    container.log.append("RuntimeError: EngineCore died.")
    server.world.end(container.name, 0)
    manager = watched(server)
    watch = lm.Watch(manager, seconds=0.001, revivals=lm.Revivals(pauses=(3600.0,)))
    told = "chat ended: RuntimeError: EngineCore died. Mend that, then deploy again"
    assert until(lambda: watch.latest().fates.get(lm.ModelName("chat"), "").startswith(told))
    container.log.append("ValueError: another look would find this.")
    looks = manager.looks
    assert until(lambda: manager.looks > looks + 2)
    assert watch.latest().fates[lm.ModelName("chat")].startswith(told)
    watch.close()


def test_the_pauses_grow_and_an_hour_of_peace_forgets_them() -> None:
    chat = lm.ModelName("chat")
    revivals = lm.Revivals(pauses=(5.0, 60.0))
    assert revivals.due([chat], NOW) == []
    assert revivals.due([chat], NOW + timedelta(seconds=5)) == [chat]
    del revivals.waiting[chat]  # it was started, and ended again at once
    later = NOW + timedelta(seconds=10)
    assert revivals.due([chat], later) == []
    assert revivals.due([chat], later + timedelta(seconds=59)) == []
    assert revivals.due([chat], later + timedelta(seconds=60)) == [chat]
    assert "is started again at 05:07:17 UTC" in revivals.fate(chat, "It broke. Mend it.")
    assert revivals.due([], later) == []  # it serves
    tomorrow = NOW + timedelta(days=1)
    assert revivals.due([chat], tomorrow) == []
    assert revivals.due([chat], tomorrow + timedelta(seconds=5)) == [chat]


STALLS = {"pause": 0.001, "seconds": 0.0}
REPORT = (
    "chat has 2 requests running and has made no token for 0 s, and does not answer a request of "
    "one token. Restart it; its log may say why."
)


def test_an_engine_that_hangs_is_reported_and_not_restarted_until_it_makes_tokens_again(
    server: Server,
) -> None:
    serve(server, "chat")
    busy = lm.EngineLoad(running=2, waiting=1, tokens=70)
    server.world.loads["llm-model-chat-0"] = busy
    server.world.hung.add("llm-model-chat-0")
    manager = watched(server)
    watch = lm.Watch(manager, seconds=0.001, stalls=lm.Stalls(**STALLS))
    assert until(lambda: watch.latest().hung == {lm.ModelName("chat"): REPORT})
    assert lm.Attention(REPORT, "Models", "restart", "chat") in lm.attention(watch.latest())
    server.world.hung.clear()
    server.world.loads["llm-model-chat-0"] = replace(busy, tokens=71)
    assert until(lambda: watch.latest().hung == {})
    watch.close()
    assert watch.latest().jobs == ()


def test_an_engine_that_answers_is_only_slow(server: Server) -> None:
    serve(server, "chat")
    server.world.loads["llm-model-chat-0"] = lm.EngineLoad(running=1, waiting=0, tokens=70)
    manager = watched(server)
    watch = lm.Watch(manager, seconds=0.001, stalls=lm.Stalls(**STALLS))
    assert until(lambda: server.world.loads["llm-model-chat-0"].tokens > 80), "it was tried"
    assert watch.latest().hung == {}
    watch.close()


def test_what_litellm_counts_and_what_engines_are_at_reach_the_page(server: Server) -> None:
    serve(server, "chat")
    load = lm.EngineLoad(running=1, waiting=0, tokens=70)
    server.world.loads["llm-model-chat-0"] = load
    name = "chat@llm-model-chat-0"
    failing = lm.DeploymentFigures(failing=True, failures={"it fails (500)": 1})
    manager = watched(server)
    watch = lm.Watch(manager, seconds=0.001, stalls=lm.Stalls(pause=0.001))

    def told(figures: lm.DeploymentFigures) -> lm.Circuit | None:
        every = lm.GatewayFigures(deployments={name: figures})
        server.world.figures = {f"llm-litellm-{slot}": every for slot in lm.SLOTS}
        assert until(lambda: watch.latest().health.figures == every)
        return watch.latest().health.circuits.get(name)

    assert told(lm.DeploymentFigures(successes=1)) == lm.Circuit(state="active")
    circuit = told(failing)
    assert circuit is not None
    assert (circuit.state, circuit.reason) == ("degraded", "it fails (500)")
    assert until(lambda: load in watch.latest().health.loads.values())
    watch.close()
    assert watch.latest().jobs == ()


def test_the_doctor_warns_of_whoever_would_undo_a_layout(start: Callable[..., Server]) -> None:
    server = start(lm.simulated_card("H100 80 GB"))
    server.world.gpus.mig_manager = True
    assert all(check.ok for check in server.manager.doctor() if "mig" in check.name)
    server.do(lm.cutting("Cut GPU 0", {GPU_0: [("3g.40gb", 0)]}))
    (bad,) = [check for check in server.manager.doctor() if "mig" in check.name]
    assert (bad.ok, bad.advice) == (False, "Run: systemctl disable --now nvidia-mig-manager")


def test_keys_need_an_endpoint_and_known_names(server: Server) -> None:
    with pytest.raises(lm.GatewayError, match="endpoint is not running"):
        server.manager.keys.all()
    with pytest.raises(lm.RefusedError, match="No model is served as gpt-9"):
        server.manager.keys.create(lm.KeySettings(alias="Ada", models=("gpt-9",)))


class Watched(lm.Manager):
    """Counts its looks, and fails at one of them."""

    looks = 0
    faulty_look = 0

    def snapshot(self) -> lm.Snapshot:
        self.looks += 1
        if self.looks == self.faulty_look:
            raise KeyError("a bug")
        return super().snapshot()


def watched(server: Server) -> Watched:
    return Watched(server.store, some_tools(server.world), a_site(), engine_options={})


def test_a_bug_in_one_look_does_not_end_the_watch(server: Server) -> None:
    """A page that stops changing would be taken for the truth."""
    manager = watched(server)
    manager.faulty_look = 2
    watch = lm.Watch(manager, seconds=0.001)
    assert until(lambda: manager.looks >= 3)
    watch.close()
    assert watch.latest().faults == ()


def test_what_the_operator_pins_is_what_is_planned(server: Server) -> None:
    serve(server, "chat")
    server.manager.save(lm.pinning_image("caddy", "caddy:2.12.0"))
    assert "create llm-caddy from caddy:2.12.0" in str(server.manager.plan(lm.applying()))
    with pytest.raises(lm.RefusedError, match=r"image.* pinned"):
        server.manager.save(lm.pinning_image("caddy", "caddy"))
    assert replace(server.manager.state().images, caddy="caddy:2.11.7-alpine") == lm.Images()
