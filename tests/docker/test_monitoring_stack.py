"""The whole monitoring stack on real Docker: everything is scraped, and every query answers.

Grafana is in no registry that is reached here: a stand-in listens in its place, and what it would
read is held against golden files. There is no GPU either: `test_monitoring_rules` has its series.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
import httpx
import pytest
from installation import Install, Installation, built, free_ports

import llm_manager as lm

pytestmark = pytest.mark.docker
PROMETHEUS = "llm-manager-test/prometheus:latest"
GRAFANA_STAND_IN = """
FROM llm-manager-test/caddy:latest
LABEL stand-in="not Grafana: answers on its port"
RUN printf '{\\n persist_config off\\n admin off\\n}\\n' > /Caddyfile \\
 && printf ':3000 {\\n respond "stand-in for {uri}"\\n}\\n' >> /Caddyfile
CMD ["caddy", "run", "--config", "/Caddyfile", "--adapter", "caddyfile"]
"""
# Panels whose series need a GPU, the exporter, an event, or more time than a test has.
WITHOUT_DATA = {
    *(p.title for p in lm.BOARDS[0].panels),
    *(p.title for p in lm.BOARDS[3].panels),
    "Failures per second", "Left out for a while, per second", "Fallbacks per second",
    "Answers from the cache per second", "Prefix cache hits",
}  # fmt: skip


@dataclass
class Stack:
    """A watched installation, its console, and who is told of alerts."""

    installation: Installation
    manager: lm.Manager
    told: list[Any]

    def url(self, role: lm.MonitorRole, path: str) -> str:
        """Of Prometheus or Alertmanager, at its address on the bridge."""
        container = self.installation.container(f"llm-{role}")
        networks = container.attrs["NetworkSettings"]["Networks"].values()
        (address,) = (network["IPAddress"] for network in networks)
        return f"http://{address}:{lm.MONITOR_HEALTH[role].port}{path}"

    def ask(self, role: lm.MonitorRole, path: str, **parameters: Any) -> Any:
        url = self.url(role, path)
        return httpx.get(url, params=parameters, trust_env=False, timeout=30).json()

    def query(self, text: str) -> list[Any]:
        """The series of a query, which Prometheus must not refuse."""
        answer = self.ask("prometheus", "/api/v1/query", query=text)
        assert answer["status"] == "success", answer
        return list(answer["data"]["result"])

    def until(self, holds: Callable[[], Any], left: object = "") -> Any:
        """What it says when it first says something; the bound is no verdict. `left`: why not."""
        deadline = time.monotonic() + 180
        while not (said := holds()):
            assert time.monotonic() < deadline, f"it never was so: {left}"
            time.sleep(0.5)
        return said


@contextlib.contextmanager
def webhook(address: str) -> Iterator[tuple[str, list[Any]]]:
    """A server of one address that keeps what is posted to it."""
    told: list[Any] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer((address, 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://{address}:{server.server_port}/s3cr3t-hook", told
        server.shutdown()


@pytest.fixture(scope="module")
def stack(
    docker_client: docker.DockerClient, install_for_module: Install, tiny_models: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Stack]:  # fmt: skip
    installation = install_for_module("monitoring")
    context = tmp_path_factory.mktemp("grafana")
    (context / "Dockerfile").write_text(GRAFANA_STAND_IN)
    name = f"llm-manager-grafana-stand-in:{uuid.uuid4().hex[:8]}"
    host = docker_client.api.inspect_network("bridge")["IPAM"]["Config"][0]["Gateway"]
    console, figures = free_ports(2)
    with built(docker_client, name, path=str(context)), webhook(host) as (url, told):
        manager = installation.manager()
        for role, image in (("prometheus", PROMETHEUS), ("alertmanager", PROMETHEUS),
                            ("grafana", name)):  # fmt: skip
            manager.save(lm.pinning_image(role, image))
        manager.save(lm.switching_monitoring(changes={"metrics_port": figures, "webhook": url}))
        installation.cli("config", "set", "--monitoring", "on")
        installation.cli("apply")  # a deployment alone would not start it
        installation.add("chat", tiny_models / "tiny-chat")
        with installation.step("deploy a watched model"):
            installation.cli("deploy", "chat")
        serving = installation.popen("serve", "--port", str(console))
        try:
            yield Stack(installation, manager, told)
        finally:
            serving.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                serving.communicate(timeout=60)


def test_everything_is_scraped(stack: Stack) -> None:
    def seen() -> dict[str, bool | None] | None:
        watched = stack.manager.monitoring.look()
        up = {target.address: target.up for target in watched.targets}
        expected = {"llm-model-chat-0:8000", "llm-litellm-a:4000", "localhost:9090"}
        prefix = stack.manager.state().name_prefix
        named = {address.removeprefix(prefix) for address, is_up in up.items() if is_up}
        figures = f"{lm.HOST_NAME}:{stack.manager.state().monitoring_settings.metrics_port}"
        return up if named >= expected | {figures} else None

    stack.until(seen)
    assert '"up": true' in stack.installation.cli("monitoring", "show", "--json")


def test_every_query_of_every_dashboard_answers(stack: Stack) -> None:
    client = stack.installation.openai(stack.installation.create_key("ada"))
    without: set[str] = set()

    def answered() -> bool:
        # Every rate needs two scrapes, and something between them.
        client.chat.completions.create(
            model="chat", messages=[{"role": "user", "content": "hi"}], max_tokens=4
        )
        without.clear()
        without.update(
            panel.title
            for board in lm.BOARDS
            for panel in board.panels
            # Each is asked: Prometheus must refuse none.
            if not [
                s for text, _ in panel.queries for s in stack.query(text.replace(lm.RATE, "1m"))
            ]
        )
        return without <= WITHOUT_DATA

    stack.until(answered, without)


def test_every_rule_is_evaluated_and_nothing_is_wrong_with_a_sound_server(stack: Stack) -> None:
    def evaluated() -> list[Any] | None:
        groups = stack.ask("prometheus", "/api/v1/rules")["data"]["groups"]
        rules = [rule for group in groups for rule in group["rules"]]
        return rules if all(rule["health"] == "ok" for rule in rules) else None

    rules = stack.until(evaluated)
    assert {rule["name"] for rule in rules} == {rule.name for rule in lm.ALERT_RULES}
    alerts = stack.manager.monitoring.look().alerts
    assert not [alert for alert in alerts if alert.state == "firing"]


def test_the_operator_is_told_of_an_alert_that_is_one_however_often_it_is_sent(
    stack: Stack,
) -> None:
    (active,) = stack.ask("prometheus", "/api/v1/alertmanagers")["data"]["activeAlertmanagers"]
    assert active["url"].endswith("llm-alertmanager:9093/api/v2/alerts")
    # As Prometheus sends it, again and again while it holds.
    trial, url = {"labels": {"alertname": "Trial"}}, stack.url("alertmanager", "/api/v2/alerts")
    for _ in range(2):
        httpx.post(url, json=[trial], trust_env=False).raise_for_status()

    def told() -> bool:
        alerts = [alert for told in stack.told for alert in told["alerts"]]
        return "Trial" in {alert["labels"]["alertname"] for alert in alerts}

    stack.until(told, stack.told)
    assert len(stack.ask("alertmanager", "/api/v2/alerts", filter='alertname="Trial"')) == 1


def test_the_figures_are_refused_without_a_token(stack: Stack) -> None:
    address = stack.manager.monitoring.wished_address()
    assert address is not None
    with httpx.Client(trust_env=False) as client:
        answer = client.get(f"http://{address[0]}:{address[1]}/metrics")
    assert (answer.status_code, answer.text) == (401, "")


def test_grafanas_path_is_open_at_the_edge(stack: Stack) -> None:
    with stack.installation.http("nobody") as client:
        assert client.get("/grafana/").text == "stand-in for /grafana/"


def test_no_part_is_published_or_can_write_where_it_need_not(stack: Stack) -> None:
    for role in ("prometheus", "alertmanager", "grafana"):
        attributes = stack.installation.container(f"llm-{role}").attrs["HostConfig"]
        assert not attributes["PortBindings"]
        assert attributes["ReadonlyRootfs"]
        assert attributes["CapDrop"] == ["ALL"]


def test_nothing_is_left_to_do_and_no_secret_was_said(stack: Stack) -> None:
    assert "Nothing to do" in stack.installation.cli("plan")
    state = stack.manager.state()
    secrets = [lm.metrics_token(state), lm.grafana_password(state), state.secrets.master_key]
    logs = "".join(stack.installation.logs().values())
    for secret in (*(each.get_secret_value() for each in secrets), "s3cr3t-hook"):
        assert secret not in logs


def test_a_stopped_model_is_scraped_no_longer_and_its_series_stay(stack: Stack) -> None:
    before = stack.installation.container("llm-prometheus").id
    stack.installation.cli("stop", "chat")

    def gone() -> bool:
        return not [t for t in stack.manager.monitoring.look().targets if t.job == "engine"]

    stack.until(gone)
    assert stack.installation.container("llm-prometheus").id == before
    assert stack.query("last_over_time(vllm:prompt_tokens_total[1h])")


def test_switched_off_it_goes_and_its_data_stay(stack: Stack) -> None:
    stack.installation.cli("config", "set", "--monitoring", "off")
    stack.installation.cli("apply")
    left = stack.installation.containers()
    assert not {"llm-prometheus", "llm-grafana", "llm-alertmanager"} & left.keys()
    prefix = stack.manager.state().name_prefix
    assert stack.installation.client.volumes.get(f"{prefix}llm-prometheus-data")
