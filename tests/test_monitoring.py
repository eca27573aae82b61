"""Monitoring as text and as plans: what is scraped, who is told, and what a change touches."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from builders import (
    GPU_0,
    GPU_1,
    SECRET_MARK,
    Golden,
    a_layout,
    a_model,
    a_secret,
    a_site,
    a_state,
    as_wished,
    but,
    ended,
    on_gpus,
    the,
)
from fakes import Server, Trouble
from starlette.testclient import TestClient

import llm_manager as lm

MAIL = lm.MailAlerts(
    to="team@example.org", sender="llm@example.org", server="mail.example.org:587",
    username="llm", password=a_secret("mail"),
)  # fmt: skip
TOLD = lm.MonitoringSettings(webhook=lm.pydantic.SecretStr("http://hook:1/x"), mail=MAIL)
ROLES: tuple[lm.MonitorRole, ...] = ("prometheus", "alertmanager", "grafana", "dcgm-exporter")
NO_GPU = lm.Hardware()
A_GPU = lm.Hardware(gpus=(lm.Gpu(uuid=GPU_0),))


@pytest.fixture
def server_of_one(tmp_path: Path) -> Server:
    """A server with one card, all of it watched."""
    server = Server(tmp_path, lm.SimulatedGpus([lm.simulated_card("A100 40 GB")]))
    server.do(lm.switching_monitoring(on=True))
    return server


def watched(*models: lm.Model, **changes: Any) -> lm.State:
    return a_state(*models, monitoring=True, **changes)


def plan(state: lm.State, observed: lm.Observed, **how: Any) -> lm.Plan:
    return lm.plan_state(state, observed, a_site(), **how)


def test_the_files_of_prometheus_and_alertmanager(golden: Golden) -> None:
    state = watched(a_model("chat", replicas=2, wish="running"), monitoring_settings=TOLD)
    golden("prometheus.yml", lm.mask_secrets(lm.render_prometheus(state)))
    golden("alertmanager.yml", lm.mask_secrets(lm.render_alertmanager(state)))
    golden("rules.yml", lm.render_rules())
    golden("engines.json", lm.render_engine_targets(state))
    golden("gateways.json", lm.render_gateway_targets(replace(state, endpoint="running")))


def test_the_dashboards(golden: Golden) -> None:
    files = ("llm-gpu.json", "llm-engines.json", "llm-gateway.json", "llm-energy.json")
    for name, board in zip(files, lm.BOARDS, strict=True):
        golden(name, lm.render_board(board))


def test_the_containers(golden: Golden) -> None:
    files = ("prometheus.json", "alertmanager.json", "grafana.json", "dcgm-exporter.json")
    for name, role in zip(files, ROLES, strict=True):
        spec = lm.render_monitor(watched(monitoring_settings=TOLD), role, a_site())
        golden(name, json.dumps(asdict(spec), indent=2, default=str) + "\n")


@pytest.mark.parametrize("role", ROLES)
def test_no_part_publishes_a_port_or_runs_with_roots_rights(role: lm.MonitorRole) -> None:
    spec = lm.render_monitor(watched(), role, a_site())
    assert not spec.ports
    arguments = lm.docker_arguments(spec, {})
    assert arguments["cap_drop"] == ["ALL"]
    assert arguments["mem_limit"]
    assert spec.read_only or role == "dcgm-exporter"


def test_every_panel_has_a_title_of_its_own_and_queries_with_letters() -> None:
    for board in lm.BOARDS:
        drawn = json.loads(lm.render_board(board))
        assert len({panel["title"] for panel in drawn["panels"]}) == len(board.panels)
        for panel, known in zip(drawn["panels"], board.panels, strict=True):
            assert [target["expr"] for target in panel["targets"]] == [q for q, _ in known.queries]
            assert [target["refId"] for target in panel["targets"]] == [*"ABCDEF"][
                : len(known.queries)
            ]


def test_every_replica_that_is_wished_is_scraped_and_no_other() -> None:
    state = watched(a_model("chat", replicas=2, wish="running"), a_model("off", wish="stopped"))
    targets = json.loads(lm.render_engine_targets(state))
    assert [(t["targets"], t["labels"]["replica"]) for t in targets] == [
        (["llm-model-chat-0:8000"], "0"),
        (["llm-model-chat-1:8000"], "1"),
    ]


def test_no_gateway_is_missed_where_none_is_wished() -> None:
    stopped, running = watched(endpoint="stopped"), watched(endpoint="running")
    assert json.loads(lm.render_gateway_targets(stopped)) == []
    stages = plan(running, as_wished(stopped, hardware=NO_GPU)).monitoring
    (write,) = [step for stage in stages for step in stage.steps]
    assert isinstance(write, lm.WriteFile)  # and Prometheus is not started again
    assert [t["labels"]["slot"] for t in json.loads(write.text)] == ["a", "b"]


def test_the_secrets_of_monitoring_are_never_shown() -> None:
    state = watched(monitoring_settings=TOLD, secrets=replace(
        a_state().secrets, master_key=lm.pydantic.SecretStr("sk-" + SECRET_MARK)
    ))  # fmt: skip
    observed = as_wished(state, hardware=NO_GPU)
    empty = replace(observed, files={})
    shown = str(plan(state, empty)) + plan(state, empty).diff()
    assert "prometheus.yml" in shown
    assert "fieldConfig" not in shown  # dashboards are written, and not shown
    for text in (shown, repr(state), json.dumps(asdict(state), default=str)):
        for secret in (SECRET_MARK, "http://hook:1/x", lm.metrics_token(state).get_secret_value()):
            assert secret not in text


def test_what_a_plan_writes_is_judged_before_anything_runs_on_it() -> None:
    state = watched(monitoring_settings=TOLD)
    stages = {stage.title: stage for stage in plan(state, lm.Observed(hardware=NO_GPU)).monitoring}
    for role in ("prometheus", "alertmanager"):
        kinds = [type(step) for step in stages[role].steps]
        check = kinds.index(lm.CheckFiles)
        assert kinds[:check] == [lm.PullImage]
        assert {*kinds[check + 1 :]} == {lm.WriteFile, lm.CreateContainer, lm.WaitReady}


def test_a_watched_server_needs_nothing() -> None:
    for hardware in (NO_GPU, A_GPU):
        state = watched(a_model("chat", wish="running"), monitoring_settings=TOLD)
        assert not plan(state, as_wished(state, hardware=hardware))


def test_nobody_is_told_and_no_gpu_is_watched_unless_it_is_so() -> None:
    assert lm.monitor_roles(watched(), NO_GPU) == ("prometheus", "grafana")
    assert "alertmanager" in lm.monitor_roles(watched(monitoring_settings=TOLD), NO_GPU)
    assert "dcgm-exporter" in lm.monitor_roles(watched(), A_GPU)
    assert "dcgm-exporter" in lm.monitor_roles(watched(), None)  # nobody looked: it stays
    assert lm.monitor_roles(a_state(), A_GPU) == ()


def test_a_new_model_is_scraped_without_a_restart_of_prometheus() -> None:
    before = watched(a_model("chat", wish="running"))
    after = before.with_model(a_model("more", wish="running"))
    (stage,) = [s for s in plan(after, as_wished(before, hardware=NO_GPU)).monitoring if s.steps]
    (write,) = stage.steps
    assert isinstance(write, lm.WriteFile)
    assert write.path == "prometheus/engines.json"


def test_another_retention_replaces_prometheus_alone_and_keeps_its_volume() -> None:
    before = watched()
    after = replace(before, monitoring_settings=lm.MonitoringSettings(retention_days=7))
    made = plan(after, as_wished(before, hardware=NO_GPU))
    assert {stage.title for stage in made.stages} == {"prometheus"}
    kinds = [type(step) for step in made.stages[0].steps]
    assert kinds[-4:] == [lm.SetAside, lm.CreateContainer, lm.WaitReady, lm.Discard]


def test_monitoring_off_removes_its_containers_and_what_they_read_but_no_volume() -> None:
    before = watched(monitoring_settings=TOLD)
    made = plan(replace(before, monitoring=False), as_wished(before, hardware=A_GPU))
    gone = {step.name for stage in made.stages for step in stage.steps
            if isinstance(step, lm.Discard)}  # fmt: skip
    assert gone == {lm.monitor_name(before, role) for role in ROLES}
    emptied = {step.path: step.text for stage in made.stages for step in stage.steps
               if isinstance(step, lm.WriteFile) and step.path.split("/")[0] in ROLES}  # fmt: skip
    assert emptied == {"prometheus/prometheus.yml": "", "alertmanager/alertmanager.yml": ""}


def test_alerts_off_leaves_no_address_or_password_behind() -> None:
    before = watched(monitoring_settings=TOLD)
    after = replace(before, monitoring_settings=lm.MonitoringSettings())
    made = plan(after, as_wished(before, hardware=NO_GPU))
    (stage,) = [stage for stage in made.monitoring if stage.title == "alertmanager"]
    assert [(s.path, s.text) for s in stage.steps if isinstance(s, lm.WriteFile)] == [
        ("alertmanager/alertmanager.yml", "")
    ]
    assert made.monitoring.index(stage) > 0  # after Prometheus, which told it until then
    assert not plan(after, as_wished(after, hardware=NO_GPU))


def test_the_exporter_steps_aside_for_a_cut_and_comes_back_after_it(server_of_one: Server) -> None:
    server = server_of_one
    exporter = lm.ContainerName(f"{server.manager.state().name_prefix}llm-dcgm-exporter")
    assert server.world.containers[exporter].running
    change = server.manager.cutting("0", "3g.20gb,3g.20gb")
    shown = str(server.manager.plan(change))
    assert re.search(rf"stop {exporter}: .*\n.*create the slice", shown, re.DOTALL)
    assert f"start {exporter}: it does not notice new slices" in shown
    server.do(change)
    container = server.world.containers[exporter]
    assert container.running
    assert container.log == [f"{exporter} starts"] * 2  # the same one, started again
    assert not server.manager.plan(lm.applying())


def test_two_cuts_take_turns_while_the_exporter_holds_both_cards() -> None:
    hardware = lm.Hardware(gpus=tuple(
        lm.Gpu(uuid=gpu, index=n, mig_enabled=False) for n, gpu in enumerate((GPU_0, GPU_1))
    ))  # fmt: skip
    layouts = tuple(a_layout(("3g.20gb", 0), gpu=gpu) for gpu in (GPU_0, GPU_1))
    for on, count in ((True, 1), (False, 2)):
        state = a_state(monitoring=on, mig_layouts=layouts)
        made = plan(state, as_wished(state, hardware=hardware))
        assert len(made.layouts) == 2
        assert len(lm.lanes(made.layouts)) == count


def test_between_a_drivers_upgrade_and_its_reboot_all_but_the_exporter_is_mended() -> None:
    hardware = replace(A_GPU, kernel_version="570.1", library_version="580.2")
    assert hardware.reboot_pending
    state = watched()
    seen = as_wished(state, hardware=hardware)
    down = but(seen, *(ended(c) for c in seen.containers.values() if c.role in ROLES))
    steps = {stage.title: stage.steps[0] for stage in plan(state, down).monitoring}
    assert isinstance(steps["dcgm-exporter"], lm.Refuse)
    assert isinstance(steps["prometheus"], lm.StartContainer)
    despite = {s.title: s.steps for s in plan(state, down, despite_driver=True).monitoring}
    assert isinstance(despite["dcgm-exporter"][0], lm.StartContainer)


def test_the_exporter_comes_back_where_a_cut_fails(server_of_one: Server) -> None:
    server = server_of_one
    exporter = lm.ContainerName(f"{server.manager.state().name_prefix}llm-dcgm-exporter")
    change = server.manager.cutting("0", "3g.20gb,3g.20gb")

    def refusal() -> lm.ManagerError:
        return lm.HardwareError("The driver refused.", advice="Try again.")

    server.restart(Trouble(at=(3,), error=refusal))  # after the stop, and the change of the mode
    with pytest.raises(lm.HardwareError):
        server.do(change)
    assert server.world.containers[exporter].running


def test_a_part_that_fails_keeps_no_other_from_running(server_of_one: Server) -> None:
    server = server_of_one
    state = server.manager.state()
    server.world.broken.add(state.images.grafana)
    server.world.end(f"{state.name_prefix}llm-grafana", 1)
    server.world.end(f"{state.name_prefix}llm-prometheus", 1)
    with pytest.raises(lm.ManagerError, match="llm-grafana"):
        server.do(lm.applying())
    assert server.world.containers[lm.ContainerName(f"{state.name_prefix}llm-prometheus")].running


def test_a_deployment_neither_waits_for_monitoring_nor_fails_with_it(server_of_one: Server) -> None:
    server = server_of_one
    state = server.manager.state()
    server.world.broken.add(state.images.grafana)
    server.world.end(f"{state.name_prefix}llm-grafana", 1)
    server.manager.save(lm.registering(a_model("chat")))
    before = [*server.world.containers[lm.ContainerName("llm-prometheus")].log]
    said = server.do(lm.deploying("chat"))
    assert not [line for line in said if "grafana" in line]
    assert "llm-model-chat-0" in server.store.read_generated()["prometheus/engines.json"]
    assert server.world.containers[lm.ContainerName("llm-prometheus")].log == before
    assert server.manager.plan(lm.applying())  # Grafana is still to be started
    with pytest.raises(lm.ManagerError, match="llm-grafana"):
        server.do(lm.switching_monitoring(on=True))


def test_prometheus_is_started_again_after_it_ended() -> None:
    state = watched()
    seen = as_wished(state, hardware=NO_GPU)
    stopped = ended(the(seen, "llm-prometheus"))
    steps = plan(state, but(seen, stopped)).stages[0].steps
    assert [type(step) for step in steps] == [lm.StartContainer, lm.WaitReady]


def test_a_cut_is_not_taken_back_because_it_is_not_watched(server_of_one: Server) -> None:
    server = server_of_one
    server.world.broken.add(server.manager.state().images.dcgm_exporter)
    said = server.do(server.manager.cutting("0", "3g.20gb,3g.20gb"))
    assert [line for line in said if line.startswith("dcgm-exporter failed:")]
    assert len(server.manager.hardware(fresh=True).gpus[0].layout) == 2


def test_the_text_format_escapes_what_must_be_escaped() -> None:
    text = lm.render_metrics([
        lm.Metric("a_total", "counter", "What.", (({"name": 'x"y\\z\n'}, 3), ({}, 0.5))),
        lm.Metric("absent", "gauge", "Nobody knows.", (({}, None),)),
    ])  # fmt: skip
    assert text == (
        "# HELP a_total What.\n# TYPE a_total counter\n"
        'a_total{name="x\\"y\\\\z\\n"} 3\na_total 0.5\n'
    )


def test_rules_and_targets_are_yaml_and_json_that_others_read() -> None:
    rules = yaml.safe_load(lm.render_rules())["groups"][0]["rules"]
    assert [rule["alert"] for rule in rules] == [rule.name for rule in lm.ALERT_RULES]


def test_an_alert_names_only_labels_that_its_query_leaves() -> None:
    for rule in lm.ALERT_RULES:
        left = {label for group in re.findall(r"by \(([^)]*)\)", rule.query)
                for label in group.split(", ")}  # fmt: skip
        assert {*re.findall(r"\$labels\.(\w+)", rule.text)} <= left, rule.name


@pytest.mark.parametrize("address", ["ftp://x", "http://a b", "javascript:1"])
def test_a_webhook_is_a_web_address(address: str) -> None:
    with pytest.raises(lm.InvalidError) as caught:
        lm.parse_monitoring({"webhook": address})
    assert address not in str(caught.value)


NOW = datetime(2026, 11, 22, 3, tzinfo=UTC)
A_DUMP = lm.Dump(file="litellm-20261122T020000Z.dump", size_bytes=1, taken_at=NOW)
BUSY_GPU = lm.Gpu(
    uuid=GPU_0, index=0, name="A100", memory_mib=40960, memory_used_mib=20480, temperature_c=61,
    utilisation_percent=50, power_w=250.0, power_limit_w=400.0, energy_j=1e9,
)  # fmt: skip


def a_snapshot() -> lm.Snapshot:
    """All that can be known: a model on a GPU, one that hangs, a database, a dump."""
    state = a_state(
        a_model("chat", wish="running", placement=on_gpus(GPU_0)), a_model("off"), monitoring=True
    )
    hardware = lm.Hardware(gpus=(BUSY_GPU,))
    observed = as_wished(
        state, hardware=hardware, certificate=lm.Certificate(pem="x", expires_at=NOW)
    )
    size = lm.DatabaseSize(
        database_bytes=5, spend_log_bytes=1, spend_log_rows=1, oldest_row_at=NOW, free_bytes=7
    )
    return lm.Snapshot(
        taken_at=NOW, shown_at=NOW, state=state, observed=observed,
        plan=plan(state, observed), hardware=hardware, database=size, dumps=(A_DUMP,),
        hung={lm.ModelName("chat"): "it hangs"},
    )  # fmt: skip


def test_the_managers_own_figures(golden: Golden) -> None:
    metrics = lm.manager_metrics(a_snapshot(), disk_free=100, disk_size=1000)
    golden("metrics.txt", lm.render_metrics(metrics))


@pytest.mark.parametrize(
    ("minutes", "last_start", "loading"),
    [(9, 20.0, True), (11, 20.0, False), (50, 1200.0, True), (61, 1200.0, False),
     (50, None, True), (61, None, False)],
)  # fmt: skip
def test_an_engine_that_does_not_answer_is_loading_for_a_while_only(
    minutes: int, last_start: float | None, *, loading: bool
) -> None:
    state = watched(a_model("chat", wish="running"))
    (name,) = lm.replica_names(state, state.model("chat"))
    seen = as_wished(state, hardware=NO_GPU, taken_at=NOW,
                     start_seconds={name: last_start} if last_start else {})  # fmt: skip
    silent = replace(the(seen, name), ready=False, started_at=NOW - timedelta(minutes=minutes))
    assert lm.may_be_loading(state, state.model("chat"), but(seen, silent)) == loading
    assert not lm.may_be_loading(state, state.model("chat"), but(seen, replace(silent, ready=True)))


def test_what_is_not_known_has_no_sample() -> None:
    nothing = lm.Snapshot(taken_at=NOW, state=None, observed=None, plan=None)
    shown = lm.render_metrics(lm.manager_metrics(nothing, 1, 2))
    assert {line.split("{")[0].split()[0] for line in shown.splitlines() if line[0] != "#"} == {
        "llm_manager_disk_free_bytes", "llm_manager_disk_size_bytes", "llm_manager_backups",
        "llm_manager_jobs", "llm_manager_seconds_since_look",
    }  # fmt: skip


def test_every_figure_that_a_query_names_is_one_that_the_manager_has() -> None:
    metrics = lm.manager_metrics(a_snapshot(), disk_free=100, disk_size=1000)
    known = {metric.name for metric in metrics if any(v is not None for _, v in metric.samples)}
    queries = [rule.query for rule in lm.ALERT_RULES]
    queries += [q for board in lm.BOARDS for panel in board.panels for q, _ in panel.queries]
    assert {name for query in queries for name in re.findall(r"llm_manager_\w+", query)} <= known


def test_what_prometheus_sees_is_read_as_it_says_it() -> None:
    targets = {"data": {"activeTargets": [
        {"labels": {"job": "engine", "instance": "a:8000"}, "health": "up", "lastError": ""},
        {"labels": {"job": "gpu", "instance": "g:9400"}, "health": "down", "lastError": "refused"},
        {"labels": {"job": "gpu", "instance": "h:9400"}, "health": "unknown", "lastError": ""},
    ]}}  # fmt: skip
    alerts = {"data": {"alerts": [
        {"labels": {"alertname": "GpuHot"}, "state": "pending", "annotations": {"summary": "90"},
         "activeAt": "2026-11-22T03:00:00.123456789Z", "value": "9e+01"},
        {"labels": {"alertname": "ModelDown"}, "state": "firing", "annotations": {},
         "activeAt": "2026-11-22T03:00:00Z", "value": "0"},
    ]}}  # fmt: skip
    seen = lm.parse_watched(targets, alerts)
    assert lm.watched_rows(seen) == [
        ["gpu", "g:9400", "down: refused"],
        ["gpu", "h:9400", "not asked yet"],
        ["engine", "a:8000", "up"],
    ]
    assert [row[:3] for row in lm.alert_rows(seen)] == [
        ["ModelDown", "firing", "2026-11-22 03:00 UTC"],
        ["GpuHot", "pending", "2026-11-22 03:00 UTC"],
    ]
    assert lm.alerts_text(seen) == "**1 alert firing**, 1 pending; 1 of 3 targets down."
    assert lm.alerts_text(replace(seen, alerts=(), targets=())) == (
        "**No alert firing**, 0 pending; none of 0 targets down."
    )


def test_the_figures_are_for_who_shows_a_token(server_of_one: Server) -> None:
    manager = server_of_one.manager
    token, secret = lm.new_admin_token("grafana")
    manager.save(lm.granting_token(token))
    client = TestClient(lm.build_metrics(manager, lm.Watch(manager, seconds=3600)))
    own = lm.metrics_token(manager.state()).get_secret_value()
    for shown in (own, secret.get_secret_value()):
        answer = client.get("/metrics", headers={"Authorization": f"Bearer {shown}"})
        assert answer.status_code == 200
        assert "llm_manager_disk_free_bytes" in answer.text
    master = manager.state().secrets.master_key.get_secret_value()
    for wrong in ("", "Bearer ", f"Bearer {master}", f"Basic {own}", "Bearer \xe9"):
        answer = client.get("/metrics", headers=[(b"authorization", wrong.encode("latin-1"))])
        assert answer.status_code == 401
        assert not answer.text
    assert client.get("/", headers={"Authorization": f"Bearer {own}"}).status_code == 404


def test_the_figures_have_an_address_only_while_monitoring_is_on(server_of_one: Server) -> None:
    manager = server_of_one.manager
    assert manager.monitoring.wished_address() == ("127.0.0.1", 7869)
    server_of_one.world.docker_answers = False
    assert manager.monitoring.wished_address() is None
    server_of_one.world.docker_answers = True
    manager.save(lm.switching_monitoring(on=False))
    assert manager.monitoring.wished_address() is None


def test_the_tab_says_who_is_told_and_what_runs() -> None:
    snapshot = a_snapshot()
    assert snapshot.state is not None
    assert "Alerts go to nobody" in lm.monitoring_text(snapshot)
    told = replace(snapshot, state=replace(snapshot.state, monitoring_settings=TOLD))
    assert "Alerts go to a webhook and mail" in lm.monitoring_text(told)
    assert [(row[0], row[2]) for row in lm.part_rows(told)] == [
        ("dcgm-exporter", "ready"), ("alertmanager", "not there"),
        ("prometheus", "ready"), ("grafana", "ready"),
    ]  # fmt: skip
    deployed = replace(snapshot, state=replace(snapshot.state, endpoint="running"))
    assert "once a model is deployed" not in lm.monitoring_text(deployed)
    stopped = replace(snapshot, state=replace(snapshot.state, endpoint="stopped"))
    assert "once a model is deployed" in lm.monitoring_text(stopped)
    off = replace(snapshot, state=replace(snapshot.state, monitoring=False))
    assert lm.monitoring_text(off) == lm.MONITORING_OFF
    assert [lm.while_monitored(off), lm.while_unmonitored(off)] == [
        {"visible": False}, {"visible": True},
    ]  # fmt: skip
    assert lm.part_rows(off) == []


def test_a_secret_that_is_left_empty_in_the_form_stays(server_of_one: Server) -> None:
    manager = server_of_one.manager
    manager.save(
        lm.switching_monitoring(changes={"webhook": "http://hook:1/x", "mail": asdict(MAIL)})
    )
    typed = [30, 10, 7869, True, "", True, MAIL.to, MAIL.sender, MAIL.server, MAIL.username, ""]
    changes = lm.monitoring_changes(manager, *typed, True)
    assert lm.monitor_roles(manager.save(lm.switching_monitoring(changes=changes)), NO_GPU)
    kept = manager.state().monitoring_settings
    assert kept == TOLD
    gone = lm.monitoring_changes(manager, 30, 10, 7869, False, "", False, *[""] * 5, True)
    assert not manager.save(lm.switching_monitoring(changes=gone)).monitoring_settings.alerts


@pytest.mark.parametrize(
    "secret", ["Tr0ub4dor&3", '"Tr0ub4dor&3', "xyzzy's # a 'plugh'", 'ab"cd ef']
)
def test_no_part_of_a_secret_shows_in_a_plan_whatever_its_signs(secret: str) -> None:
    lines = yaml.safe_dump({"smtp_auth_password": secret, "credentials": secret}, width=1000)
    lines += yaml.safe_dump([{"url": secret}])
    shown = lm.mask_secrets(lines)
    assert not any(part in shown for part in re.findall(r"\w{2,}", secret))
