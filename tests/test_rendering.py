"""Config generation: what containers are given; a golden file that changes is read like code."""

from __future__ import annotations

import base64
import io
import json
import re
import struct
import wave
import zlib
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pydantic
import pytest
import yaml
from builders import (
    GPU_0,
    GPU_1,
    SECRET_MARK,
    Golden,
    a_model,
    a_secret,
    a_site,
    a_state,
    on_gpus,
    some_secrets,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import llm_manager as lm

RECIPE = lm.PROGRAM.parent / "recipes" / "vllm.yaml"
OPTIONS = lm.parse_engine_options(RECIPE.read_text())
OWN = lm.OwnCertificate(certificate_path="/etc/ssl/our chain.pem", key_path="/etc/ssl/key/our.key")
ACME = lm.AcmeTls(email="it@example.org", directory_url="https://acme.example.org/directory")

CHAT = a_model(
    open_route=True,
    engine_arguments=("--max-model-len", "16384"),
    replicas=2,
    placement=on_gpus(GPU_0, GPU_1),
)
SMALL = a_model("embed", type="embedding", source=lm.LocalSource(path="/srv/models/bge m3"))
RANK = a_model("rank", type="rerank", served_model_name="BAAI/rank:v2")
FULL = a_state(
    CHAT,
    SMALL,
    RANK,
    direct_keys=(
        lm.DirectKey(name="everything", secret=a_secret("all-models")),
        lm.DirectKey(name="ada", secret=a_secret("ada"), models=(CHAT.name, RANK.name)),
        lm.DirectKey(name="fire", secret=a_secret("fire"), emergency=True),
    ),
    edge=lm.Edge(open_routes=True),
)
SERVED_BY_FULL = lm.served_models(FULL, FULL.models)


def edge_of(**changes: Any) -> lm.State:
    return replace(FULL, edge=replace(FULL.edge, **changes))


def caddyfile(state: lm.State, slot: lm.Slot, certificate: str = "") -> str:
    return lm.render_caddyfile(state, slot, lm.served_models(state, state.models), certificate)


def as_json(spec: lm.ContainerSpec) -> str:
    """A container as text to review; secrets print as stars."""
    return json.dumps(asdict(spec), indent=2, default=str) + "\n"


# --- golden files ------------------------------------------------------------------------


def test_the_gateways_configuration(golden: Golden) -> None:
    golden("litellm.yaml", lm.render_litellm_config(FULL, lm.served_models(FULL, FULL.models)))


LAB = lm.Provider(name="lab", kind="ollama", base_url="http://10.0.0.7:11434/")
CLOUD = lm.Provider(name="mistral", kind="cloud", api_key=lm.pydantic.SecretStr(SECRET_MARK))
ROUTES = (
    lm.Route(
        name="code", members=("chat", "lab/qwen3:8b"), weights=(3, 1), strategy="weighted",
        aliases=("gpt-4o", "o3"), fallbacks=("mistral/small", "rank"), context_fallbacks=("long",),
        timeout_seconds=30, retries=1, failures_allowed=3, cooldown_seconds=60,
        parallel=8, cache_seconds=600,
    ),
    lm.Route(name="long", members=("chat", "mistral/large"), strategy="in-order"),
    lm.Route(name="lab/*", members=("lab/*",), strategy="usage"),
    lm.Route(name="asleep", members=("stopped",), fallbacks=("long",)),
)  # fmt: skip


def test_the_gateways_configuration_with_routes(golden: Golden) -> None:
    state = replace(FULL, providers=(LAB, CLOUD), routes=ROUTES)
    served = lm.served_models(state, state.models)
    golden("litellm-routes.yaml", lm.render_litellm_config(state, served))
    golden("gateway-routes.json", as_json(lm.render_gateway(state, "b", served, a_site())))
    golden("cache.json", as_json(lm.render_cache(state)))


def test_the_caddyfile_with_caddys_own_authority(golden: Golden) -> None:
    golden("Caddyfile", caddyfile(FULL, "a"))


def test_the_caddyfile_with_a_certificate_of_our_own(golden: Golden) -> None:
    state = edge_of(hostnames=("llm.example.org", "10.1.2.3"), https_port=8443, tls=OWN)
    golden("Caddyfile.own-certificate", caddyfile(state, "b", "a certificate"))


def test_the_caddyfile_with_acme(golden: Golden) -> None:
    state = edge_of(hostnames=("llm.example.org",), tls=ACME)
    golden("Caddyfile.acme", caddyfile(state, "a"))


def test_an_engine_on_the_cpu(golden: Golden) -> None:
    (spec,) = lm.render_engines(FULL, SMALL, a_site())
    golden("engine-cpu.json", as_json(spec))


def test_an_engine_on_gpus(golden: Golden) -> None:
    golden("engine-gpu.json", as_json(lm.render_engines(FULL, CHAT, a_site())[1]))


def test_the_database(golden: Golden) -> None:
    golden("database.json", as_json(lm.render_database(FULL)))


def test_the_gateway(golden: Golden) -> None:
    golden(
        "gateway.json",
        as_json(lm.render_gateway(FULL, "a", lm.served_models(FULL, FULL.models), a_site())),
    )


def test_the_edge(golden: Golden) -> None:
    golden("edge.json", as_json(lm.render_edge(edge_of(tls=OWN), a_site())))


def test_the_systemd_unit(golden: Golden) -> None:
    template = lm.PROGRAM.with_name("llm-manager.service").read_text()
    text = lm.render_unit(
        template, python="/srv/llm/.venv/bin/python", program="/srv/llm/x.py", home="/srv/state"
    )
    golden("llm-manager.service", text)
    assert "/opt/llm-manager/.venv" not in text
    assert "/var/lib/llm-manager" not in text


# --- laws of every generated file ------------------------------------------------------------


SERVED = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,40}", fullmatch=True)
AWKWARD = st.sampled_from(["true", "null", "1.0", "1e3", "0x1", "yes", "2026-01-01", "1:30", "~"])


@settings(max_examples=40)
@given(SERVED | AWKWARD)
def test_no_served_name_can_break_the_yaml(name: str) -> None:
    model = a_model(served_model_name=name)
    state = a_state(model)
    text = lm.render_litellm_config(state, lm.served_models(state, [model]))
    (entry,) = yaml.safe_load(text)["model_list"]
    assert entry["model_name"] == name
    assert entry["litellm_params"]["model"] == f"hosted_vllm/{name}"


@settings(max_examples=15)
@given(st.permutations(FULL.models))
def test_the_order_of_models_changes_no_file(models: list[lm.Model]) -> None:
    state = replace(FULL, models=tuple(models))
    assert lm.render_litellm_config(
        state, lm.served_models(state, models)
    ) == lm.render_litellm_config(FULL, lm.served_models(FULL, FULL.models))
    one, other = (
        lm.render_gateway(s, "a", lm.served_models(s, s.models), a_site()) for s in (state, FULL)
    )
    assert one.hash == other.hash


def test_the_caddyfile_alone_holds_keys_and_only_those_it_compares_or_sends() -> None:
    secret = {key.secret.get_secret_value() for key in FULL.direct_keys}
    secret |= {lm.reveal(FULL.secrets.engine_key), lm.reveal(FULL.secrets.master_key)}
    for tls in (lm.InternalTls(), OWN, ACME):
        text = caddyfile(edge_of(tls=tls), "a", "a certificate")
        assert {*re.findall(rf"sk-{SECRET_MARK}[\w-]*", text)} == secret
        assert SECRET_MARK not in lm.mask_secrets(text)
    calm = replace(FULL, direct_keys=FULL.direct_keys[:2])
    assert lm.reveal(FULL.secrets.master_key) not in caddyfile(calm, "a")
    assert SECRET_MARK not in lm.render_caddyfile(calm, "a", ())


def test_no_secret_is_in_any_other_generated_file_or_printed_container() -> None:
    specs = [
        lm.render_database(FULL),
        lm.render_gateway(FULL, "a", lm.served_models(FULL, FULL.models), a_site()),
        lm.render_edge(FULL, a_site()),
        *(spec for model in FULL.models for spec in lm.render_engines(FULL, model, a_site())),
    ]
    own = edge_of(tls=OWN)
    pem = f"-----BEGIN PRIVATE KEY-----\n{SECRET_MARK}\n-----END PRIVATE KEY-----\n"
    seen = lm.Observed(certificate=lm.Certificate(pem=pem), files={lm.CERTIFICATE: pem})
    plans = [
        lm.plan_state(FULL, lm.Observed(), a_site()),
        lm.plan_state(FULL, lm.Observed(files={lm.CADDYFILE: caddyfile(FULL, "b")}), a_site()),
        lm.plan_state(own, lm.Observed(certificate=lm.Certificate(pem=pem)), a_site()),
    ]
    texts = [
        lm.render_litellm_config(FULL, lm.served_models(FULL, FULL.models)),
        *(form(spec) for spec in specs for form in (repr, str, as_json)),
        *("".join((*spec.command, *spec.labels.values(), spec.hash)) for spec in specs),
        *(form(plan) for plan in plans for form in (repr, str, lm.Plan.diff)),
        repr(seen),
    ]
    assert not [text for text in texts if SECRET_MARK in text]


def test_another_key_is_seen_in_the_diff_without_its_text() -> None:
    changed = lm.granting_direct(replace(FULL.direct_keys[0], secret=a_secret("new"))).edit(FULL)
    files = {lm.CADDYFILE: caddyfile(FULL, "a")}
    diff = lm.plan_state(changed, lm.Observed(files=files), a_site()).diff()
    lines = [line for line in diff.splitlines() if "vars {header.Authorization}" in line]
    assert {line[0] for line in lines} >= {"-", "+"}
    assert all(re.search(r"Bearer \([0-9a-f]{8}\)", line) for line in lines)


def test_content_logging_is_off_whatever_is_served() -> None:
    for models in ([], FULL.models):
        config = yaml.safe_load(lm.render_litellm_config(FULL, lm.served_models(FULL, models)))
        settings_of = config["litellm_settings"] | config["general_settings"]
        assert {
            key: settings_of[key]
            for key in (
                "turn_off_message_logging",
                "redact_messages_in_exceptions",
                "global_disable_no_log_param",
                "telemetry",
                "store_prompts_in_spend_logs",
                "spend_logs_metadata_fields",
                "disable_requester_ip_address_logging",
            )
        } == {
            "turn_off_message_logging": True,
            "redact_messages_in_exceptions": True,
            "global_disable_no_log_param": True,
            "telemetry": False,
            "store_prompts_in_spend_logs": False,
            "spend_logs_metadata_fields": {
                "exclude": ["spend_logs_metadata", "user_agent", "error_information"]
            },
            "disable_requester_ip_address_logging": True,
        }


def test_no_engine_reports_its_use_to_anybody() -> None:
    for model in FULL.models:
        for spec in lm.render_engines(FULL, model, a_site()):
            assert spec.environment["VLLM_NO_USAGE_STATS"] == "1"
            assert spec.environment["DO_NOT_TRACK"] == "1"
            assert spec.environment["HF_HUB_DISABLE_TELEMETRY"] == "1"


def test_local_weights_need_neither_hub_nor_token() -> None:
    (spec,) = lm.render_engines(FULL, SMALL, a_site())
    assert spec.environment["HF_HUB_OFFLINE"] == "1"
    assert "HF_TOKEN" not in spec.environment
    weights, compiled = spec.mounts
    assert (weights.source, weights.read_only) == ("/srv/models/bge m3", True)
    assert (compiled.target, compiled.read_only) == ("/compiled", False)


def test_only_the_edge_publishes_ports_and_only_where_it_is_told() -> None:
    edge = lm.render_edge(edge_of(address="10.0.0.5", https_port=8443), a_site())
    assert [(p.address, p.host_port) for p in edge.ports] == [("10.0.0.5", 8443), ("10.0.0.5", 80)]
    others = [
        lm.render_database(FULL),
        lm.render_gateway(FULL, "a", lm.served_models(FULL, FULL.models), a_site()),
        *lm.render_engines(FULL, CHAT, a_site()),
    ]
    assert not [spec for spec in others if spec.ports]


def test_every_name_of_an_installation_carries_its_prefix() -> None:
    state = replace(FULL, name_prefix="a1b2-", monitoring=True)
    names = [
        *(lm.monitor_name(state, role) for role in lm.monitor_roles(state, None)),
        lm.network_name(state),
        *lm.volume_names(state),
        lm.database_name(state),
        lm.edge_name(state),
        *(lm.gateway_name(state, slot) for slot in lm.SLOTS),
        *lm.replica_names(state, CHAT),
    ]
    assert all(name.startswith("a1b2-llm-") for name in names)
    text = lm.render_litellm_config(state, lm.served_models(state, state.models)) + caddyfile(
        state, "a"
    )
    for spec in (lm.render_database(state), lm.render_edge(state, a_site())):
        text += as_json(spec)
    assert "//llm-" not in text
    assert '"llm-' not in text
    assert " llm-" not in text.replace(" llm-manager", "")


def test_the_longest_names_fit_into_a_dns_label() -> None:
    state = replace(FULL, name_prefix="a" * 11 + "-")
    longest = lm.replica_names(state, a_model("x" * 32, replicas=16))[-1]
    assert len(longest) <= 63


def test_replicas_of_two_models_never_share_a_name() -> None:
    names = [
        name
        for model in ("chat", "chat-1", "chat-1-0", "chat-0")
        for name in lm.replica_names(FULL, a_model(model, replicas=16))
    ]
    assert len(names) == len(set(names))


# --- the Caddyfile ----------------------------------------------------------------------------


@pytest.mark.parametrize("slot", lm.SLOTS)
def test_the_health_path_tells_slot_and_content(slot: lm.Slot) -> None:
    text = caddyfile(FULL, slot)
    assert text.count(f'respond "ok {slot} {lm.caddyfile_hash(text)}" 200') == 2
    assert lm._HASH_MARK not in text


def test_every_change_of_the_caddyfile_changes_its_hash() -> None:
    states = [FULL, edge_of(https_port=8443), edge_of(tls=OWN), edge_of(hostnames=("x.org",))]
    texts = [caddyfile(state, slot) for state in states for slot in lm.SLOTS]
    assert len({lm.caddyfile_hash(text) for text in texts}) == len(texts)
    assert all(len(lm.caddyfile_hash(text)) == 12 for text in texts)


def test_a_text_without_a_hash_has_none() -> None:
    assert lm.caddyfile_hash("") == ""
    assert lm.caddyfile_hash('respond "ok c 0123456789ab"') == ""


STRANGE = [*map(chr, range(0x20)), "\\", "\x7f", "\x85", "\u2028", "%", "$", "`", "'", "#", "é"]


def accepted_edges() -> list[lm.Edge]:
    """Every edge with a strange character in it that the state would store."""
    forms: list[Callable[[str], lm.Json]] = [
        lambda c: {"kind": "own", "certificate_path": f"/c/{c}x", "key_path": "/k/y"},
        lambda c: {"kind": "acme", "email": f"a{c}b@example.org"},
        lambda c: {"kind": "acme", "email": "a@b.c", "directory_url": f"https://x/{c}"},
    ]
    edges = []
    for tls in (form(c) for form in forms for c in STRANGE):
        try:
            edges.append(lm.parse_edge({"tls": tls}))
        except lm.RefusedError:
            continue
    return edges


def test_what_the_state_accepts_can_be_rendered() -> None:
    """Else one bad path, once saved, would stop every later plan."""
    for edge in accepted_edges():
        caddyfile(replace(FULL, edge=edge), "a")


# --- containers -----------------------------------------------------------------------------------


def a_spec(**changes: Any) -> lm.ContainerSpec:
    return replace(lm.render_engines(FULL, CHAT, a_site())[0], **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"image": "x/y:2"},
        {"command": ("serve",)},
        {"entrypoint": ()},
        {"network": "other"},
        {"environment": {}},
        {"mounts": ()},
        {"ports": (lm.PublishedPort(address="0.0.0.0", host_port=1, container_port=1),)},  # noqa: S104
        {"labels": {"model-name": "other"}},
        {"extra_hosts": {"a": "host-gateway"}},
        {"devices": (GPU_1,)},
        {"shm_mib": 1},
        {"healthcheck": "true"},
        {"restart": "unless-stopped"},
        {"drop_capabilities": True},
        {"content_hash": "x"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_docker_is_told_changes_the_hash(changes: dict[str, Any]) -> None:
    assert a_spec(**changes).hash != a_spec().hash


@pytest.mark.parametrize(
    "changes",
    [
        {"start_seconds": 1.0},
        {"stop_seconds": 1},
        {"measurement_key": "x"},
        {"readiness": lm.DockerHealthy()},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_only_the_manager_uses_replaces_no_container(changes: dict[str, Any]) -> None:
    assert a_spec(**changes).hash == a_spec().hash


def test_the_order_of_an_environment_replaces_no_container() -> None:
    turned = dict(reversed(a_spec().environment.items()))
    assert a_spec(environment=turned).hash == a_spec().hash


def test_another_secret_is_another_container() -> None:
    for changed in ("master_key", "salt_key", "database_password", "engine_key"):
        secrets = some_secrets(**{changed: pydantic.SecretStr("sk-other")})
        state = replace(FULL, secrets=secrets)
        gateways = [
            lm.render_gateway(s, "a", lm.served_models(s, s.models), a_site())
            for s in (FULL, state)
        ]
        assert gateways[0].hash != gateways[1].hash


def test_what_is_routed_is_part_of_the_gateways_hash() -> None:
    few, all_of_them = (
        lm.render_gateway(FULL, "a", lm.served_models(FULL, models), a_site())
        for models in (FULL.models[:1], FULL.models)
    )
    assert few.hash != all_of_them.hash
    assert all_of_them.readiness == lm.GatewayServes(
        model_names=("BAAI/rank:v2", "chat", "embed"), master_key=FULL.secrets.master_key
    )


def test_the_image_of_a_model_is_the_first_that_applies() -> None:
    state = a_state().with_recipe_image(
        lm.RecipeImage(recipe="audio", device="gpu", image="llm-manager/audio:1")
    )
    images = state.images
    assert lm.engine_image(a_model(image="x/y:1", recipe="audio"), state) == "x/y:1"
    heard = a_model(recipe="audio", type="text-to-speech", placement=on_gpus())
    assert lm.engine_image(heard, state) == "llm-manager/audio:1"
    assert lm.engine_image(a_model(type="text-to-speech"), state) == images.vllm_omni
    assert lm.engine_image(a_model(placement=on_gpus()), state) == images.vllm
    assert lm.engine_image(a_model(), state) == images.vllm_cpu


def test_a_command_says_everything_that_the_model_wishes() -> None:
    model = a_model(
        source=lm.HubSource(repository="a/b", revision="main"),
        placement=on_gpus(GPU_0, GPU_1, memory_fraction=0.5),
        engine_arguments=("--seed", "1"),
    )
    command = " ".join(lm.engine_command(model))
    assert command == (
        "serve a/b --revision main --served-model-name chat --host 0.0.0.0 --port 8000 "
        "--tensor-parallel-size 2 --gpu-memory-utilization 0.5 --enable-prompt-tokens-details "
        "--seed 1"
    )
    pooling = lm.engine_command(a_model(type="rerank", placement=lm.CpuPlacement(kv_cache_mib=16)))
    assert " ".join(pooling[-4:]) == "--kv-cache-memory-bytes 16777216 --runner pooling"


# --- engine arguments ---------------------------------------------------------------------------


def check(*arguments: str, **changes: Any) -> None:
    lm.check_engine_arguments(a_model(engine_arguments=arguments, **changes), a_state(), OPTIONS)


def test_the_recipe_knows_the_options_of_the_pinned_images() -> None:
    pinned = lm.Images()
    assert set(OPTIONS) == {pinned.vllm, pinned.vllm_cpu, pinned.vllm_omni}
    assert OPTIONS[pinned.vllm] < OPTIONS[pinned.vllm_omni], "Omni takes all of vLLM's, and more"
    for known in OPTIONS.values():
        assert {"--max-model-len", "--no-enable-prefix-caching", "-tp"} <= known
        assert "--task" not in known


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--max-model-len", "8192"),
        ("--max-model-len=8192",),
        ("--max_model_len", "8192"),
        ("--no-enable-prefix-caching",),
        ("--hf-overrides.rope_scaling=x",),
        ("--seed", "-1"),
        ("--chat-template", "{% for m in messages %}"),
    ],
    ids=" ".join,
)
def test_what_the_engine_takes_passes(arguments: tuple[str, ...]) -> None:
    check(*arguments)


@pytest.mark.parametrize(
    ("arguments", "fact", "advice"),
    [
        (("--max-modl-len", "1"), "--max-modl-len is unknown to vllm/", "mean --max-model-len?"),
        (("--task", "embed"), "--task is unknown", ""),
        (("--zzzzzzzzzzzz",), "--zzzzzzzzzzzz is unknown", "Leave it out, or correct it."),
        (("--seed", "1", "--prot", "1"), "--prot is unknown", ""),
        (("--port", "1"), "--port is set by LLM Manager itself", "Leave it out."),
        (("--served_model_name=x",), "--served-model-name is set by LLM Manager", ""),
        (("--api-key", "x"), "--api-key is set by", ""),
        (("--enable-log-requests",), "--enable-log-requests is set by", ""),
        (("--enable_log_outputs=true",), "--enable-log-outputs is set by", ""),
        (("-tp", "2"), "-tp is set by", ""),
        (("--kv-cache-memory-bytes", "1"), "--kv-cache-memory-bytes is set by", ""),
        (("8192",), "begin with '8192', not an option", "Begin with an option"),
        (("--seed", "a\nb"), "holds control characters", "one option per line"),
        (("--seed\0",), "holds control characters", ""),
    ],
    ids=str,
)
def test_what_the_engine_would_refuse_later_is_refused_now(
    arguments: tuple[str, ...], fact: str, advice: str
) -> None:
    with pytest.raises(lm.RefusedError) as raised:
        check(*arguments)
    assert fact in raised.value.fact
    assert advice in raised.value.advice


def test_no_option_is_suggested_that_would_be_refused_next() -> None:
    with pytest.raises(lm.RefusedError) as raised:
        check("--prot", "1")
    assert "--port?" not in raised.value.advice


def test_the_memory_budget_is_the_operators_where_the_placement_has_none() -> None:
    check("--gpu-memory-utilization", "0.4", placement=on_gpus())
    with pytest.raises(lm.RefusedError, match="is set by LLM Manager"):
        check("--gpu-memory-utilization", "0.4", placement=on_gpus(memory_fraction=0.5))


def test_an_image_nobody_listed_takes_any_option_but_the_reserved() -> None:
    check("--anything", image="example/engine:v1")
    with pytest.raises(lm.RefusedError, match="is set by LLM Manager"):
        check("--port", "1", image="example/engine:v1")


def test_arguments_are_split_as_a_shell_would() -> None:
    assert lm.split_arguments("--a 'b c'\n--d \"e\"") == ["--a", "b c", "--d", "e"]
    assert lm.split_arguments("") == []
    with pytest.raises(lm.RefusedError, match="Close the quotation"):
        lm.split_arguments("--a 'b")


# --- readiness ------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", lm.MODEL_TYPES)
def test_every_type_has_a_real_request_and_a_route_of_its_own(model_type: lm.ModelType) -> None:
    request = lm.readiness_request(model_type, "qwen")
    assert request.path.startswith("/v1/")
    assert request.fields["model"] == "qwen"
    json.dumps(request.fields)
    assert model_type in lm.ROUTING


def test_a_readiness_request_is_of_its_own_kind_and_small() -> None:
    chat = lm.readiness_request("chat", "qwen")
    assert (chat.path, chat.fields["max_tokens"]) == ("/v1/chat/completions", 1)
    embedding = lm.readiness_request("embedding", "q")
    assert (embedding.path, embedding.fields) == ("/v1/embeddings", {"model": "q", "input": "yes"})
    rerank = lm.readiness_request("rerank", "q")
    assert (rerank.path, len(rerank.fields["documents"])) == ("/v1/rerank", 2)
    vision = lm.readiness_request("vision", "q").fields
    assert [part["type"] for part in vision["messages"][0]["content"]] == ["text", "image_url"]


def test_a_model_that_hears_is_sent_half_a_second_of_silence() -> None:
    audio = lm.readiness_request("speech-to-text", "q").audio
    assert audio is not None
    with wave.open(io.BytesIO(audio)) as sound:
        shape = sound.getnchannels(), sound.getsampwidth(), sound.getframerate()
        assert (shape, sound.getnframes()) == ((1, 2, 16_000), 8_000)


def png_pixels(png: bytes) -> tuple[int, int, bytes]:
    """Width, height and raw pixels of an 8-bit RGB picture; every checksum is checked."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    chunks: dict[bytes, bytes] = {}
    rest = png[8:]
    while rest:
        (length,) = struct.unpack(">I", rest[:4])
        kind, body, checksum = rest[4:8], rest[8 : 8 + length], rest[8 + length : 12 + length]
        assert zlib.crc32(kind + body) == struct.unpack(">I", checksum)[0]
        chunks[kind] = chunks.get(kind, b"") + body
        rest = rest[12 + length :]
    assert list(chunks)[-1] == b"IEND"
    width, height, depth, colour, *_ = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert (depth, colour) == (8, 2)
    rows = zlib.decompress(chunks[b"IDAT"])
    return width, height, unfiltered(rows, width * 3)


def unfiltered(rows: bytes, width: int) -> bytes:
    """PNG filters 0 (none), 1 (left), 2 (up) and 4 (Paeth) taken back."""
    done, above = b"", bytearray(width)
    for start in range(0, len(rows), width + 1):
        kind, line = rows[start], bytearray(rows[start + 1 : start + 1 + width])
        for i in range(width):
            left = line[i - 3] if i >= 3 else 0
            corner = above[i - 3] if i >= 3 else 0
            guess = {0: 0, 1: left, 2: above[i], 4: paeth(left, above[i], corner)}[kind]
            line[i] = (line[i] + guess) % 256
        done, above = done + bytes(line), line
    return done


def paeth(left: int, above: int, corner: int) -> int:
    guess = left + above - corner
    return min((left, above, corner), key=lambda value: abs(guess - value))


def test_the_picture_of_a_vision_request_is_a_white_28_by_28_png() -> None:
    vision = lm.readiness_request("vision", "q").fields
    url = vision["messages"][0]["content"][1]["image_url"]["url"]
    width, height, pixels = png_pixels(base64.b64decode(url.removeprefix("data:image/png;base64,")))
    assert (width, height) == (28, 28)
    assert pixels == b"\xff" * 28 * 28 * 3


def test_the_golden_files_are_all_in_use() -> None:
    text = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    golden = Path(__file__).parent / "golden"
    assert not [path.name for path in golden.iterdir() if f'"{path.name}"' not in text]
