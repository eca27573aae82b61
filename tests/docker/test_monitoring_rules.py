"""Alert rules and dashboard queries, judged and evaluated by the real promtool."""

from __future__ import annotations

import io
import json
import tarfile
import uuid
from pathlib import Path

import docker
import pytest
import yaml

import llm_manager as lm

pytestmark = pytest.mark.docker
PROMETHEUS = "llm-manager-test/prometheus:latest"
GPU = 'UUID="GPU-1", gpu="0"'

# By alert: series that make it fire, and the like that must not; values as promtool writes them.
FIRING = {
    "ModelDown": {'up{job="engine", model="chat", replica="0"}': "0x100"},
    "EngineHung": {
        'vllm:num_requests_running{model="chat", replica="0"}': "3x100",
        'vllm:iteration_tokens_total_count{model="chat", replica="0"}': "50x100",
    },
    "GatewayDown": {'up{job="gateway", slot="a"}': "0x100", 'up{job="gateway", slot="b"}': "0x100"},
    "ManagerDown": {'up{job="manager"}': "0x100"},
    "GpuHot": {f"llm_manager_gpu_temperature_celsius{{{GPU}}}": "91x100"},
    "DiskLow": {"llm_manager_disk_free_bytes": "5x100", "llm_manager_disk_size_bytes": "100x100"},
    "DatabaseGrowing": {
        "llm_manager_database_bytes": "1000+10x200",
        "llm_manager_database_free_bytes": "5000x200",
    },
    "CertificateExpiring": {"llm_manager_certificate_expiry_timestamp_seconds": "864000x100"},
}
QUIET = {
    "ModelDown": {
        'up{job="engine", model="chat", replica="0"}': "0x100",
        'up{job="engine", model="chat", replica="1"}': "1x100",  # one replica answers
        'up{job="engine", model="large", replica="0"}': "0x100",
        'llm_manager_model{model="large", phase="starting"}': "1x100",
        'llm_manager_model_loading{model="large"}': "1x100",
    },
    "EngineHung": {
        'vllm:num_requests_running{model="chat", replica="0"}': "3x100",
        'vllm:iteration_tokens_total_count{model="chat", replica="0"}': "50+9x100",
        'vllm:num_requests_running{model="idle", replica="0"}': "0x100",
        'vllm:iteration_tokens_total_count{model="idle", replica="0"}': "50x100",
        'llm_manager_model_hung{model="chat"}': "0x100",
    },
    # One slot is always empty.
    "GatewayDown": {'up{job="gateway", slot="a"}': "0x100", 'up{job="gateway", slot="b"}': "1x100"},
    "ManagerDown": {'up{job="manager"}': "1x100"},
    "GpuHot": {
        f"llm_manager_gpu_temperature_celsius{{{GPU}}}": "80x100",
        # A blank value of DCGM, and one that contradicts what NVML says of the same GPU.
        f"DCGM_FI_DEV_GPU_TEMP{{{GPU}}}": "9223372036854775794x100",
    },
    "DiskLow": {"llm_manager_disk_free_bytes": "50x100", "llm_manager_disk_size_bytes": "100x100"},
    "DatabaseGrowing": {
        "llm_manager_database_bytes": "1000x200",
        "llm_manager_database_free_bytes": "5000x200",
    },
    "CertificateExpiring": {"llm_manager_certificate_expiry_timestamp_seconds": "8640000x100"},
}
# Other ways to the same alert: what is known of a GPU through DCGM alone, the manager's look.
OTHERWISE = {
    # Its container runs, and should have answered long ago.
    "ModelDown": {
        'up{job="engine", model="chat", replica="0"}': "0x100",
        'llm_manager_model{model="chat", phase="starting"}': "1x100",
        'llm_manager_model_loading{model="chat"}': "0x100",
    },
    "EngineHung": {'llm_manager_model_hung{model="chat"}': "1x100"},
    "GpuHot": {f"DCGM_FI_DEV_GPU_TEMP{{{GPU}}}": "91x100"},
}


def promtool(client: docker.DockerClient, folder: Path, command: str) -> str:
    """What it says of the files of a folder; it must approve."""
    container = client.containers.create(
        PROMETHEUS, [f"promtool {command}"], entrypoint=["sh", "-c"], working_dir="/", user="0",
        name=f"llm-manager-promtool-{uuid.uuid4().hex[:8]}", network_mode="none",
    )  # fmt: skip
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for path in folder.iterdir():
            tar.add(path, path.name)
    try:
        container.put_archive("/", archive.getvalue())
        container.start()
        status = container.wait(timeout=120)["StatusCode"]
        said = str(container.logs().decode())
    finally:
        container.remove(force=True)
    assert status == 0, said
    return said


def a_case(alert: str, series: dict[str, str], *, fires: bool) -> dict[str, object]:
    """Whether one alert holds in the end, whatever its series' labels."""
    said = {"eval_time": "95m", "exp_samples": [{"labels": "{}", "value": int(fires)}]}
    query = f'count(ALERTS{{alertname="{alert}", alertstate="firing"}}) > bool 0 or vector(0)'
    return {
        "interval": "1m",
        "name": f"{alert} {'fires' if fires else 'is quiet'}",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [{"expr": query, **said}],
    }


@pytest.mark.parametrize("alert", [rule.name for rule in lm.ALERT_RULES])
def test_an_alert_fires_when_it_should_and_not_otherwise(
    docker_client: docker.DockerClient, tmp_path: Path, alert: str
) -> None:
    cases = [a_case(alert, FIRING[alert], fires=True), a_case(alert, QUIET[alert], fires=False)]
    if alert in OTHERWISE:
        cases.append(a_case(alert, OTHERWISE[alert], fires=True))
    tests = {"rule_files": ["rules.yml"], "evaluation_interval": "1m", "tests": cases}
    (tmp_path / "rules.yml").write_text(lm.render_rules())
    (tmp_path / "test.yml").write_text(yaml.safe_dump(tests))
    assert "SUCCESS" in promtool(docker_client, tmp_path, "test rules test.yml")


def test_a_hot_gpu_that_both_know_is_one_alert(
    docker_client: docker.DockerClient, tmp_path: Path
) -> None:
    series = FIRING["GpuHot"] | OTHERWISE["GpuHot"]
    case = a_case("GpuHot", series, fires=True)
    case["promql_expr_test"] = [
        {"expr": 'count(ALERTS{alertstate="firing"})', "eval_time": "95m",
         "exp_samples": [{"labels": "{}", "value": 1}]}
    ]  # fmt: skip
    tests = {"rule_files": ["rules.yml"], "evaluation_interval": "1m", "tests": [case]}
    (tmp_path / "rules.yml").write_text(lm.render_rules())
    (tmp_path / "test.yml").write_text(yaml.safe_dump(tests))
    promtool(docker_client, tmp_path, "test rules test.yml")


# Two GPUs, one cut into slices, whose rows repeat it; one model on each, and one on both.
GPU_SERIES = {
    'llm_manager_gpu_power_watts{UUID="GPU-1", gpu="0"}': "300x100",
    'llm_manager_gpu_power_watts{UUID="GPU-2", gpu="1"}': "100x100",
    'llm_manager_gpu_power_watts{UUID="GPU-3", gpu="2"}': "50x100",
    'llm_manager_replica_gpu{model="chat", replica="0", UUID="GPU-1"}': "1x100",
    'llm_manager_replica_gpu{model="chat", replica="1", UUID="GPU-2"}': "1x100",
    'llm_manager_replica_gpu{model="embed", replica="0", UUID="GPU-2"}': "1x100",
    'vllm:generation_tokens_total{model="chat", replica="0"}': "0+600x100",
    'DCGM_FI_DEV_MEMORY_TEMP{UUID="GPU-1", gpu="0"}': "9223372036854775794x100",
    'DCGM_FI_DEV_MEMORY_TEMP{UUID="GPU-2", gpu="1"}': "55x100",
    'DCGM_FI_DEV_SM_CLOCK{UUID="GPU-1", gpu="0", GPU_I_ID="1"}': "1400x100",
    'DCGM_FI_DEV_SM_CLOCK{UUID="GPU-1", gpu="0", GPU_I_ID="2"}': "1400x100",
    'DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION{UUID="GPU-1", GPU_I_ID="1"}': "0+18000000x100",
    'DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION{UUID="GPU-1", GPU_I_ID="2"}': "0+18000000x100",
    'llm_manager_gpu_energy_joules_total{UUID="GPU-1", gpu="0"}': "0+3600x2000",
}
SHOWN = {
    "Power by model": {'{model="chat"}': 350, '{model="embed"}': 50},
    "Joules per output token": {'{model="chat"}': 35},  # 350 W over 10 tokens a second
    "Power of GPUs that no model has": {'llm_manager_gpu_power_watts{UUID="GPU-3", gpu="2"}': 50},
    "Power of all GPUs": {"{}": 450},
    "Clocks": {'{UUID="GPU-1", gpu="0"}': 1400},
}


def panel(title: str) -> lm.Panel:
    return next(p for board in lm.BOARDS for p in board.panels if p.title == title)


def in_prometheus(query: str) -> str:
    """A panel's query with what Grafana puts in."""
    return query.replace(lm.RATE, "5m")


def test_panels_over_gpus_show_what_they_should(
    docker_client: docker.DockerClient, tmp_path: Path
) -> None:
    # Of each panel the first query; the stand-in for DCGM's series is promtool's.
    expected = [
        {"expr": in_prometheus(panel(title).queries[0][0]), "eval_time": "60m",
         "exp_samples": [{"labels": labels, "value": value} for labels, value in shown.items()]}
        for title, shown in SHOWN.items()
    ]  # fmt: skip
    expected.append({
        "expr": in_prometheus(panel("Temperature").queries[1][0]), "eval_time": "60m",
        "exp_samples": [{"labels": '{UUID="GPU-2", gpu="1"}', "value": 55}],
    })  # fmt: skip
    expected.append({
        "expr": in_prometheus(panel("Power by NVML's energy counter").queries[1][0]),
        "eval_time": "60m", "exp_samples": [{"labels": '{UUID="GPU-1"}', "value": 300}],
    })  # fmt: skip
    series = [{"series": name, "values": values} for name, values in GPU_SERIES.items()]
    case = {"interval": "1m", "input_series": series, "promql_expr_test": expected}
    (tmp_path / "test.yml").write_text(yaml.safe_dump({"rule_files": [], "tests": [case]}))
    promtool(docker_client, tmp_path, "test rules test.yml")


def test_the_generated_files_pass_promtool(
    docker_client: docker.DockerClient, tmp_path: Path
) -> None:
    golden = Path(lm.__file__).parent / "tests" / "golden"
    for name in ("prometheus.yml", "rules.yml", "engines.json", "gateways.json"):
        (tmp_path / name).write_text((golden / name).read_text())
    said = promtool(docker_client, tmp_path, "check config prometheus.yml")
    assert f"{len(lm.ALERT_RULES)} rules found" in said
    for name in ("engines.json", "gateways.json"):
        assert json.loads((tmp_path / name).read_text())


def test_the_managers_figures_are_what_prometheus_reads(
    docker_client: docker.DockerClient, tmp_path: Path
) -> None:
    golden = Path(lm.__file__).parent / "tests" / "golden" / "metrics.txt"
    (tmp_path / "metrics.txt").write_text(golden.read_text())
    promtool(docker_client, tmp_path, "check metrics < /metrics.txt")
