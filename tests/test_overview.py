"""The Overview: what needs the operator, what runs where, and the way to the first answer."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from builders import (
    GPU_0,
    GPU_1,
    NOW,
    a_model,
    a_site,
    a_snapshot,
    a_state,
    an_observed,
    as_wished,
    but,
    ended,
    on_gpus,
    on_slice,
    the,
)
from fakes import Server, until

import llm_manager as lm

CHAT = "llm-model-chat-0"
HOSTILE = "<img src=x>"


def a_job(**changes: Any) -> lm.JobView:
    given: dict[str, Any] = {
        "id": "1", "title": "Deploy chat", "started_at": NOW, "finished_at": None,
        "lines": ("one", "two"), "fault": None,
    }  # fmt: skip
    return lm.JobView(**given | changes)


class Shown(HTMLParser):
    """The tags of a picture with their attributes, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def buttons(self) -> list[tuple[str | None, str | None]]:
        return [(a["data-verb"], a["data-subject"]) for tag, a in self.tags if tag == "button"]


def is_down(snapshot: lm.Snapshot) -> lm.Snapshot:
    """The same, but the engine of `chat` ended."""
    assert snapshot.observed is not None
    observed = but(snapshot.observed, ended(the(snapshot.observed, CHAT)))
    return replace(snapshot, observed=observed)


# --- what needs the operator ------------------------------------------------------


def test_one_calm_line_says_what_it_means_that_all_is_well() -> None:
    chat, idle = a_model(), replace(a_model("idle"), wish="stopped")
    snapshot = a_snapshot(
        replace(a_state(chat, idle), endpoint="running"),
        zone=ZoneInfo("Europe/Berlin"),
        energy=lm.LiveEnergy(gpu_watts={"a": 300.0, "b": 150.0, "c": None}),
        health=lm.RouteHealth(
            loads={lm.ContainerName(CHAT): lm.EngineLoad(running=1, waiting=0, tokens=5)}
        ),
    )
    assert lm.attention(snapshot) == []
    shown = Shown(lm.matters_html(snapshot))
    assert shown.buttons == []
    for told in ("All is well", "1 of 1 models that should run are ready", "1 request running",
                 "450 W on 2 GPUs", "/v1 answers", "looked at 2026-"):  # fmt: skip
        assert told in shown.text
    assert re.search(r"CES?T$", shown.text)


@pytest.mark.parametrize(
    ("fates", "expected"),
    [({}, ("log", "chat")), ({"chat": "chat ended: no memory. Mend that."}, ("deploy", "chat"))],
)
def test_a_dead_model_has_one_button_the_log_until_its_cause_is_told(
    fates: dict[lm.ModelName, str], expected: tuple[str, str]
) -> None:
    shown = Shown(lm.matters_html(is_down(replace(a_snapshot(), fates=fates, plan=None))))
    assert shown.buttons == [expected]
    assert next(iter(fates.values()), "should run and does not") in shown.text


def test_the_worst_comes_first_and_the_plan_last() -> None:
    snapshot = is_down(a_snapshot())
    assert snapshot.state is not None
    assert snapshot.observed is not None
    snapshot = replace(
        snapshot,
        plan=lm.plan_state(snapshot.state, snapshot.observed, a_site()),
        energy=lm.LiveEnergy(trouble="Energy is not recorded."),
        hardware=lm.Hardware(lost=("GPU 3 does not answer.",)),
        disk_free_bytes=10**9,
        hung={lm.ModelName("chat"): "chat makes no token. Restart it."},
        alerts=(
            lm.Alert(name="DiskFull", state="firing", text="It is full.", since=NOW),
            lm.Alert(name="DiskFull", state="firing", text="So is that.", since=NOW),
            lm.Alert(name="Slow", state="pending", text="Not yet.", since=NOW),
        ),
    )
    matters = lm.attention(snapshot)
    assert [matter.button for matter in matters] == [
        "Open Hardware", "Show log", "Restart", "Open Monitoring", "Free space", "Open Energy",
        "Review and apply",
    ]  # fmt: skip
    assert "Alert DiskFull, 2 times: It is full." in [matter.text for matter in matters]
    assert Shown(lm.matters_html(snapshot)).buttons == [
        ("open", "hardware"), ("log", "chat"), ("restart", "chat"), ("open", "monitoring"),
        ("open", "library"), ("open", "energy"), ("apply", ""),
    ]  # fmt: skip


def test_a_provider_that_litellm_leaves_out_is_named_once() -> None:
    provider = lm.Provider(name="lab", kind="ollama", base_url="http://lab:1234/v1")
    out = lm.Circuit(state="cool-down", reason="it refuses connections")
    health = lm.RouteHealth(
        circuits={"fast@lab/m": out, "slow@lab/m": out, "chat@llm-model-chat-0": out}
    )
    snapshot = a_snapshot(replace(a_state(a_model()), providers=(provider,)), health=health)
    told = [m.text for m in lm.attention(replace(snapshot, plan=None))]
    assert told == ["lab/m does not answer: it refuses connections."]


def test_of_very_many_matters_the_rest_is_counted() -> None:
    faults = tuple(lm.ManagerError(f"Fault {n}.", advice="Mend it.") for n in range(12))
    shown = Shown(lm.matters_html(a_snapshot(faults=faults)))
    assert len(shown.buttons) == lm.SHOWN_MATTERS
    assert "and 4 more" in shown.text


def test_hostile_names_stay_text_in_every_picture() -> None:
    state = a_state(a_model(placement=on_gpus(GPU_0)), a_model("small"))
    gpu = lm.Gpu(uuid=GPU_0, name=HOSTILE, memory_mib=81920, xids=(79,))
    snapshot = a_snapshot(
        state,
        hardware=lm.Hardware(gpus=(gpu,)),
        faults=(lm.ManagerError(HOSTILE, advice=HOSTILE),),
        jobs=(a_job(title=HOSTILE, lines=(HOSTILE,), progress=HOSTILE, done_part=0.5),),
        first_run=lm.FirstRun(),
    )
    for view in (lm.matters_html, lm.gpu_tiles_html, lm.jobs_html, lm.job_bar_html,
                 lm.first_run_html):  # fmt: skip
        shown = view(snapshot)
        assert shown
        assert "img" not in [tag for tag, _ in Shown(shown).tags], view


# --- GPUs and models ------------------------------------------------------------


def test_a_gpu_is_drawn_with_what_sits_on_it_and_told_in_words() -> None:
    gpus = lm.SimulatedGpus([lm.simulated_card("H100 80 GB")])
    gpus.set_mig_mode(GPU_0, enabled=True)
    wish = (("3g.40gb", 0), ("1g.10gb", 4))
    for place in wish:
        gpus.create_slice(GPU_0, place)
    state = replace(
        a_state(a_model(placement=on_slice("3g.40gb", 0)), a_model("small")),
        mig_layouts=(lm.MigLayout(gpu_uuid=GPU_0, slices=wish),),
    )
    read = gpus.read()
    (gpu,) = read.gpus
    gpu = replace(gpu, power_w=90.0, power_limit_w=700.0, memory_used_mib=40960, temperature_c=41)
    snapshot = a_snapshot(
        state, hardware=replace(read, gpus=(gpu,)), energy=lm.LiveEnergy(gpu_watts={GPU_0: 350.0})
    )
    shown = Shown(lm.gpu_tiles_html(snapshot))
    told = [a["aria-label"] or "" for _, a in shown.tags if a.get("role") == "img"]
    assert len(told) == 1
    for part in ("GPU 0, NVIDIA H100 80 GB", "memory 40.0 of", "power 350 W of 700 W", "41 °C",
                 "3g.40gb chat: ready", "1g.10gb empty"):  # fmt: skip
        assert part in told[0]
    widths = [a["style"] for _, a in shown.tags if "style" in a]
    assert "width:50.0%" in widths, "350 of 700 watts"
    assert "On the processor: 1 ✓ ready: small" in shown.text


def test_without_a_gpu_and_without_models_nothing_is_drawn() -> None:
    assert lm.gpu_tiles_html(a_snapshot(a_state())) == ""
    assert lm.gpu_tiles_html(a_snapshot(state=None, observed=None)) != HOSTILE


def test_what_is_being_deployed_is_drawn_as_pending_and_not_as_failed() -> None:
    read = lm.SimulatedGpus([lm.simulated_card("H100 80 GB")]).read()
    state = a_state(a_model(placement=on_gpus(GPU_0)), a_model("small"))
    down = a_snapshot(state, observed=an_observed(), hardware=read)
    assert "chat: failed" in Shown(lm.gpu_tiles_html(down)).text
    assert "1 ✕ failed: small" in Shown(lm.gpu_tiles_html(down)).text
    chat, small = state.models
    fetching = a_job(fetching=frozenset({lm.model_stage_title(chat)}))
    busy = Shown(lm.gpu_tiles_html(replace(down, jobs=(replace(fetching, kind="task"),)))).text
    assert "chat: pending" in busy
    assert "1 ✕ failed: small" in busy, "it fetches nothing"
    assert "1 ◌ pending: small" in Shown(lm.gpu_tiles_html(replace(down, jobs=(a_job(),)))).text
    hung = replace(a_snapshot(state, hardware=read), hung={small.name: "It hangs."})
    assert "1 ✕ hung: small" in Shown(lm.gpu_tiles_html(hung)).text


def test_models_are_rows_with_those_that_need_somebody_first() -> None:
    models = [a_model(f"m{n}") for n in range(60)]
    state = a_state(*models, replace(a_model("off"), wish="stopped"))
    observed = as_wished(state)
    observed = but(observed, ended(the(observed, "llm-model-m41-0")))
    rates = {lm.ModelName("m7"): lm.EngineRates(prompt_tokens=1234.0, generated_tokens=56.0)}
    snapshot = a_snapshot(
        state, observed=observed, rates=rates, hung={lm.ModelName("m7"): "It hangs."},
        energy=lm.LiveEnergy(model_watts={"m7": 80.4}),
        health=lm.RouteHealth(loads={
            lm.ContainerName("llm-model-m7-0"): lm.EngineLoad(
                running=3, waiting=2, tokens=9, cached=0.25)
        }),
    )  # fmt: skip
    rows = lm.live_rows(snapshot)
    assert len(rows) == 61
    assert all(len(row) == len(lm.LIVE_HEADERS) for row in rows)
    assert [row[0] for row in rows[:3]] == ["m41", "m7", "m0"]
    assert rows[-1][0] == "off"
    assert rows[1][2:8] == ["3", "2", "25%", "1.23 K", "56", "80 W"]
    words = [Shown(row[1]).text for row in (rows[0], rows[1], rows[2], rows[-1])]
    assert words == ["✕ failed", "✕ hung", "✓ ready", "■ stopped"]


def test_every_phase_has_a_sign_and_a_word_of_its_own() -> None:
    every = {Shown(lm.phase_html(phase)).text for phase in lm.PHASE_SIGNS}
    assert len(every) == len(lm.PHASE_SIGNS)
    assert {*lm.get_args(lm.Phase)} < {*lm.PHASE_SIGNS}


# --- jobs and changes -----------------------------------------------------------


def test_all_jobs_are_told_those_of_another_process_without_a_button() -> None:
    jobs = (
        a_job(id="b", title="Download a/b", kind="task", progress="3 of 4 GiB", done_part=0.75),
        a_job(id="", title="Deploy chat", lines=()),
        a_job(id="c", title="Done", finished_at=NOW),
    )
    shown = Shown(lm.jobs_html(a_snapshot(jobs=jobs)))
    assert shown.buttons == [("cancel", "b")]
    assert "3 of 4 GiB" in shown.text
    assert "Another process" in shown.text
    assert "Done" not in shown.text
    (bar,) = [a for _, a in shown.tags if a.get("role") == "progressbar"]
    assert bar["aria-valuenow"] == "75"
    assert "Nothing is under way" in lm.jobs_html(a_snapshot())
    assert lm.task_choices(a_snapshot(jobs=jobs))["choices"] == [("Download a/b", "b")]
    elsewhere = a_snapshot(jobs=(a_job(id="", kind="task"),))
    assert "Deploy chat" in lm.tasks_html(elsewhere)
    assert lm.task_choices(elsewhere) == {"choices": [], "visible": False}
    assert lm.task_cancel(elsewhere) == {"visible": False}


def test_the_time_of_a_job_goes_on_while_a_look_at_the_server_takes_long() -> None:
    snapshot = a_snapshot(jobs=(a_job(),), shown_at=NOW + timedelta(minutes=7))
    task = replace(snapshot, jobs=(a_job(kind="task"),))
    assert "7 min" in lm.job_title(snapshot)
    assert "7 min" in lm.jobs_html(snapshot)
    assert "7 min" in lm.tasks_html(task)


def test_a_button_never_becomes_another_one_under_the_finger() -> None:
    """Elements of other tags are replaced; all else is written anew in its place."""
    tags = []
    for job in (a_job(), a_job(finished_at=NOW), a_job(id="2")):
        shown = Shown(lm.job_bar_html(a_snapshot(jobs=(job,)))).tags
        tags.append(shown[[tag for tag, _ in shown].index("button") - 1][0])
    assert len({*tags}) == 3
    older, newer = a_job(id="1"), a_job(id="2", kind="task")
    shown = Shown(lm.jobs_html(a_snapshot(jobs=(newer, older))))
    assert shown.buttons == [("cancel", "1"), ("cancel", "2")]


def test_a_result_stays_until_it_is_dismissed_and_a_change_is_shown_all_the_same() -> None:
    done = a_job(finished_at=NOW + timedelta(seconds=9))
    snapshot = a_snapshot(jobs=(done,))
    assert Shown(lm.job_bar_html(snapshot)).buttons == [("dismiss", "1")]
    assert lm.job_group(snapshot) == {"visible": True}
    dismissed = replace(snapshot, dismissed=frozenset({"1"}))
    assert lm.job_group(dismissed) == {"visible": False}
    assert lm.job_bar_html(dismissed) == ""
    again = replace(dismissed, jobs=(a_job(id="2"), done))
    assert Shown(lm.job_bar_html(again)).buttons == [("cancel", "2")]


def test_the_lines_unfold_by_themselves_only_where_a_job_failed() -> None:
    for changes, is_open in (
        ({}, False),
        ({"finished_at": NOW}, False),
        ({"finished_at": NOW, "fault": "No luck."}, True),
        ({"finished_at": NOW, "fault": "Cancelled.", "cancelled": True}, False),
    ):
        assert lm.job_fold(a_snapshot(jobs=(a_job(**changes),))) == {"open": is_open}


def test_the_last_changes_are_told_newest_first_in_the_readers_zone() -> None:
    first = lm.AuditEntry(who="ada", channel="API", what="Stop chat", started_at=NOW)
    begun = replace(first, what="Deploy chat", started_at=NOW + timedelta(minutes=1))
    fault = lm.ManagerError("No memory.", advice="Free some.")
    second = begun.ended(fault, NOW + timedelta(minutes=3))
    snapshot = a_snapshot(changes=(first, second), zone=ZoneInfo("Asia/Tokyo"))
    newer, older = lm.change_rows(snapshot)
    assert newer[1:] == ["Deploy chat", "ada, API", "failed in 2 min: No memory. Free some."]
    assert older[1:] == ["Stop chat", "ada, API", "under way, or broken off"]
    assert newer[0] == lm.format_time(second.started_at, ZoneInfo("Asia/Tokyo"))
    assert newer[0].endswith("JST")


# --- the first steps --------------------------------------------------------------


def now_of(snapshot: lm.Snapshot) -> tuple[int, Shown]:
    """Which step is the next, and the picture."""
    html = lm.first_run_html(snapshot)
    shown = Shown(html)
    looks = [a["class"] for tag, a in shown.tags if tag == "li"]
    return looks.index("now"), shown


def test_the_first_steps_are_ticked_off_as_they_are_done() -> None:
    started = {"first_run": lm.FirstRun(), "disk_free_bytes": 10**12}
    empty = a_snapshot(a_state(), observed=an_observed(), **started)
    step, shown = now_of(empty)
    assert step == 1
    assert ("pick", "Qwen/Qwen3-8B") not in shown.buttons, "too slow on a processor"
    assert ("pick", "Qwen/Qwen3-0.6B") in shown.buttons
    assert "models run on the processor" in shown.text

    registered = replace(a_state(a_model(wish="stopped")), endpoint="stopped")
    step, shown = now_of(replace(empty, state=registered))
    assert step == 2
    assert ("deploy", "chat") in shown.buttons

    running = replace(a_state(a_model()), endpoint="running")
    ready = replace(empty, state=running, observed=as_wished(running))
    step, shown = now_of(ready)
    assert step == 3
    assert ("open", "keys") in shown.buttons

    keyed = replace(ready, first_run=lm.FirstRun(has_key=True))
    step, shown = now_of(keyed)
    assert step == 4
    assert ("try", "chat") in shown.buttons
    assert "YOUR KEY" in shown.text

    counted = lm.GatewayFigures(deployments={"chat@x": lm.DeploymentFigures(successes=1)})
    done = replace(keyed, health=lm.RouteHealth(figures=counted))
    assert done.state is not None
    assert all(s.done for s in lm.first_steps(done, done.state, lm.FirstRun(has_key=True)))
    assert lm.first_run_html(replace(done, first_run=None)) == ""


def test_the_first_request_is_for_a_model_that_is_ready() -> None:
    state = replace(a_state(a_model("broken"), a_model("fine")), endpoint="running")
    observed = but(as_wished(state), ended(the(as_wished(state), "llm-model-broken-0")))
    snapshot = a_snapshot(state, observed=observed, first_run=lm.FirstRun(has_key=True))
    step, shown = now_of(snapshot)
    assert step == 4
    assert ("try", "fine") in shown.buttons
    assert '"model": "fine"' in shown.text


def test_the_suggestions_name_the_gpu_that_they_fit() -> None:
    gpus = tuple(
        lm.Gpu(uuid=uuid, index=index, memory_mib=mib)
        for index, (uuid, mib) in enumerate(((GPU_0, 8192), (GPU_1, 81559)))
    )
    hardware = lm.Hardware(gpus=gpus)
    _, shown = now_of(a_snapshot(a_state(), hardware=hardware, first_run=lm.FirstRun()))
    assert f"These fit {lm.short_title(gpus[1])}" in shown.text


@pytest.mark.parametrize(
    ("memory_mib", "first"),
    [(81559, "Qwen/Qwen3-32B"), (24564, "Qwen/Qwen3-8B"), (8192, "Qwen/Qwen3-0.6B"),
     (2048, "Qwen/Qwen3-0.6B"), (None, "Qwen/Qwen3-0.6B")],
)  # fmt: skip
def test_models_are_suggested_that_fit(memory_mib: int | None, first: str) -> None:
    gpus = (lm.Gpu(uuid=GPU_0, memory_mib=memory_mib),) if memory_mib else ()
    offered = lm.suggestions(lm.Hardware(gpus=gpus))
    assert offered[0].repository == first
    assert 2 <= len(offered) <= 3
    assert offered[-1].text == "an embedding model"


def test_the_first_steps_are_over_for_good_once_they_are_hidden(tmp_path: Path) -> None:
    server = Server(tmp_path)
    watch = lm.Watch(server.manager, seconds=0.05)
    assert watch.latest().first_run == lm.FirstRun()
    watch.newcomer.end()
    assert watch.latest().first_run is None
    watch.close()
    other = lm.Watch(server.manager, seconds=3600)
    assert other.latest().first_run is None
    other.close()


def test_who_runs_models_already_is_no_newcomer(tmp_path: Path) -> None:
    server = Server(tmp_path)
    server.store.save(replace(server.manager.state(), models=(a_model(),)))
    other = lm.Watch(server.manager, seconds=3600)
    assert other.latest().first_run is None
    other.close()


# --- what every page is told ------------------------------------------------------


def test_a_page_is_told_the_last_changes_and_what_other_processes_do(tmp_path: Path) -> None:
    server = Server(tmp_path)
    with server.manager.audit.noting("Create the key ada"):
        pass
    watch = lm.Watch(server.manager, seconds=0.05)
    seen = watch.latest()
    assert [entry.what for entry in seen.changes] == ["Create the key ada"]
    assert seen.first_run == lm.FirstRun(has_key=True)
    assert seen.disk_free_bytes
    with server.store.lock("Deploy chat"):
        told = server.manager.under_way()
        assert [job.title for job in told] == ["Deploy chat"]
        assert server.manager.under_way(elsewhere=True) == ()
    with server.manager.audit.noting("Stop chat"):
        pass
    assert until(lambda: watch.latest().changes[-1].what == "Stop chat")
    watch.close()


def test_dismissed_results_are_gone_on_every_page(tmp_path: Path) -> None:
    server = Server(tmp_path)
    watch = lm.Watch(server.manager, seconds=3600)
    job = server.manager.start_task("Count", lambda control: control.report("one"))
    assert job.wait(5)
    assert lm.shown_job(watch.latest()) is not None
    watch.dismiss(job.id)
    assert lm.shown_job(watch.latest()) is None


def test_who_dismisses_a_result_dismisses_none_that_came_after_it(tmp_path: Path) -> None:
    server = Server(tmp_path)
    watch = lm.Watch(server.manager, seconds=3600)
    jobs = []
    for number in range(3):
        jobs.append(server.manager.start_task(f"Count {number}", lambda _: None))
        assert jobs[-1].wait(5)
    watch.dismiss(jobs[1].id)
    shown = lm.shown_job(watch.latest())
    assert shown is not None
    assert shown.id == jobs[2].id
    assert watch.dismissed == {jobs[0].id, jobs[1].id}
    watch.dismiss("none")
    assert watch.dismissed == {jobs[0].id, jobs[1].id}
