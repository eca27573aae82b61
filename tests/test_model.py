"""Data model: config.json as typed values; what does not fit is refused with its path."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import pydantic
import pytest
from builders import SECRET_MARK, a_model, a_state, on_gpus, on_slice
from hypothesis import given, settings
from hypothesis import strategies as st

import llm_manager as lm

STATES = Path(__file__).parent / "states"
FULL = (STATES / f"v{lm.SCHEMA_VERSION}.json").read_text()


GONE = object()


def spoilt(*changes: tuple[str, Any]) -> str:
    """The full state with something wrong, by its path: `models.0.replicas`."""
    raw = json.loads(FULL)
    for path, value in changes:
        *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        here = raw
        for part in way:
            here = here[part]
        if value is GONE:
            del here[last]
        else:
            here[last] = value
    return json.dumps(raw)


def fault_of(text: str) -> str:
    with pytest.raises(lm.ManagerError) as raised:
        lm.parse_state(text)
    return raised.value.fact


# --- what is stored ----------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(STATES.glob("v*.json")), ids=lambda path: path.name)
def test_a_real_state_of_every_version_loads(path: Path) -> None:
    state = lm.parse_state(path.read_text())
    assert state.schema_version == lm.SCHEMA_VERSION
    assert [model.name for model in state.models] == ["chat", "eyes", "embed", "rank", "speak"]


def test_there_is_a_state_file_and_a_migration_for_every_version() -> None:
    versions = range(1, lm.SCHEMA_VERSION + 1)
    assert {path.name for path in STATES.iterdir()} == {f"v{n}.json" for n in versions}
    assert set(lm.MIGRATIONS) == set(versions[:-1])


def test_the_full_state_names_every_field_there_is() -> None:
    """A field that the file lacks would load from a default and prove nothing."""
    assert json.loads(lm.render_state(lm.parse_state(FULL))) == json.loads(FULL)


GPUS = st.sampled_from(["GPU-1", "GPU-2", "GPU-3"]).map(lm.GpuUuid)
NAMES = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?", fullmatch=True)
SERVED = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}", fullmatch=True)
PATHS = st.from_regex(r"/[^\x00-\x1f\x7f:,\"{}\\\ud800-\udfff]{1,40}", fullmatch=True)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
SECRETS = TEXTS.map(pydantic.SecretStr)
PLACEMENTS = st.one_of(
    st.builds(lm.CpuPlacement, kv_cache_mib=st.integers(16, 10**6)),
    st.builds(
        lm.GpuPlacement,
        gpu_uuids=st.lists(GPUS, min_size=1, unique=True).map(tuple),
        memory_fraction=st.none() | st.floats(0.01, 1),
    ),
    st.builds(lm.MigPlacement, gpu_uuid=GPUS, profile=TEXTS, start=st.integers(0, 7)),
)
SOURCES = st.one_of(
    st.builds(lm.HubSource, repository=st.just("Qwen/Qwen3-8B"), revision=st.none() | NAMES),
    st.builds(lm.LocalSource, path=PATHS),
)
MODELS = st.builds(
    lm.Model,
    name=NAMES.map(lm.ModelName),
    type=st.sampled_from(get_args(lm.ModelType)),
    source=SOURCES,
    served_model_name=SERVED,
    engine_arguments=st.lists(TEXTS, max_size=3).map(tuple),
    placement=PLACEMENTS,
    replicas=st.integers(1, 16),
    wish=st.sampled_from(["running", "stopped"]),
)
TLS = st.one_of(
    st.builds(lm.InternalTls),
    st.builds(lm.OwnCertificate, certificate_path=PATHS, key_path=PATHS),
    st.builds(lm.AcmeTls, email=st.just("it@example.org"), directory_url=st.none()),
)
EDGES = st.builds(
    lm.Edge,
    hostnames=st.lists(st.sampled_from(["a.org", "10.0.0.1"]), min_size=1).map(tuple),
    https_port=st.integers(1, 60000),
    http_port=st.integers(60001, 65535),
    tls=TLS,
)
FIELDS = st.fixed_dictionaries(
    {
        "instance": st.from_regex(r"[0-9a-f]{1,16}", fullmatch=True),
        "endpoint": st.sampled_from(["running", "stopped"]),
        "models": st.lists(
            MODELS, max_size=3, unique_by=(lambda m: m.name, lambda m: m.served_model_name)
        ).map(tuple),
        "edge": EDGES,
        "secrets": st.builds(
            lm.Secrets,
            master_key=SECRETS,
            salt_key=SECRETS,
            database_password=SECRETS,
            engine_key=SECRETS,
            console_key=SECRETS,
            hugging_face_token=st.none() | SECRETS,
        ),
    }
)


@settings(max_examples=30)
@given(FIELDS)
def test_what_is_rendered_is_read_back(fields: dict[str, Any]) -> None:
    state = a_state(**fields)
    assert lm.parse_state(lm.render_state(state)) == state


# --- what is refused -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        ("models.0.replicas", 0, "models[0] (chat).replicas: "),
        ("models.0.replicas", "many", "models[0] (chat).replicas: "),
        ("models.1.source.path", "srv", "models[1] (eyes).source.path: "),
        ("models.3.placement.start", "two", "models[3] (rank).placement.start: "),
        ("models.0.placement.gpu_uuids", [], "models[0] (chat).placement.gpu_uuids: "),
        ("models.2.placement.kind", "tpu", "models[2] (embed).placement: "),
        ("models.0.engine_arguments.1", 7, "models[0] (chat).engine_arguments[1]: "),
        ("models.0.wish", "paused", "models[0] (chat).wish: "),
        ("models.0.source", GONE, "models[0] (chat).source: "),
        ("models", {}, "models: "),
        ("edge.tls.email", "nobody", "edge.tls.email: "),
        ("edge.tls.kind", "internal", "edge.tls.email: Unexpected keyword argument"),
        ("edge.https_port", 70000, "edge.https_port: "),
        ("edge.hostnames", [], "edge.hostnames: "),
        ("mig_layouts.0.slices.1", ["1g.18gb", 2, 1], "mig_layouts[0].slices[1]"),
        ("secrets.salt_key", GONE, "secrets.salt_key: "),
        ("direct_keys.1.secret", 17, "direct_keys[1] (lab).secret: "),
        ("images.caddy", "caddy", "images.caddy: "),
        ("endpoint", "on", "endpoint: "),
        ("instance", "not hex", "instance: "),
        ("name_prefix", "no-dash", "name_prefix: "),
        ("models.0.wihs", "running", "models[0] (chat).wihs: Unexpected keyword argument"),
        ("models.0.source.branch", "x", "models[0] (chat).source.branch: Unexpected keyword"),
        ("colour", "red", "colour: Unexpected keyword argument"),
    ],
)
def test_a_fault_is_refused_with_its_path(path: str, value: object, fault: str) -> None:
    assert fault in fault_of(spoilt((path, value)))


def test_all_faults_come_at_once() -> None:
    fault = fault_of(spoilt(("models.0.replicas", 99), ("edge.http_port", 0), ("colour", "red")))
    assert all(path in fault for path in ("(chat).replicas", "edge.http_port", "colour"))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "not valid JSON"),
        (FULL[: len(FULL) // 2], "not valid JSON"),
        ("[]", "no schema_version"),
        ("null", "no schema_version"),
        ("{}", "no schema_version"),
        ('{"schema_version": "1"}', "no schema_version"),
        ('{"schema_version": null, "models": []}', "no schema_version"),
        ('{"schema_version": 99}', "is version 99; this program knows 1"),
        ('{"schema_version": 0}', "says version 0, which never was"),
        ('{"schema_version": -1}', "says version -1, which never was"),
        ('{"schema_version": 1}', "secrets: "),
    ],
)
def test_what_is_no_state_is_never_taken_for_an_empty_one(text: str, fault: str) -> None:
    with pytest.raises(lm.StateUnreadableError) as raised:
        lm.parse_state(text)
    assert fault in raised.value.fact
    assert "history/" in raised.value.advice


@given(st.integers(0, len(FULL) - 3))
def test_no_truncated_state_loads(length: int) -> None:
    with pytest.raises(lm.StateUnreadableError):
        lm.parse_state(FULL[:length])


BAD_NAMES = [
    "", "-", "-a", "a-", "A", "a_b", "a.b", "a b", "ä", "a\n", "a/b", "../a", "a:b", "a" * 33,
    "{a}", '"', "a\0", "$HOME", "*",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_breaks_containers_hosts_or_paths_is_refused(name: str) -> None:
    assert "lower-case letters" in fault_of(spoilt(("models.0.name", name)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("served_model_name", "a b"),
        ("served_model_name", "a\nb"),
        ("served_model_name", "-a"),
        ("served_model_name", "a'b"),
        ("served_model_name", "x" * 129),
        ("image", "vllm"),
        ("image", "vllm:"),
        ("image", "-v:1"),
        ("image", "VLLM/x:1"),
        ("image", "a:1 b"),
        ("image", "a:latest\n"),
    ],
)
def test_text_that_would_break_a_file_or_a_command_is_refused(field: str, value: str) -> None:
    assert f"models[0] (chat).{field}: " in fault_of(spoilt((f"models.0.{field}", value)))


@pytest.mark.parametrize("path", ["relative", "", "/a:b", "/a,b", "/a\nb", '/a"b', "/{a}"])
def test_a_path_that_would_break_a_mount_is_refused(path: str) -> None:
    assert "hugging_face_home: " in fault_of(spoilt(("hugging_face_home", path)))


@pytest.mark.parametrize(
    "hostname", ["", "LLM", "a b", "a\nb", "{env.HOME}", "*", "a/b", "a:80", "-a"]
)
def test_a_host_name_that_would_break_the_caddyfile_is_refused(hostname: str) -> None:
    assert "edge.hostnames[0]: " in fault_of(spoilt(("edge.hostnames.0", hostname)))


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        ("models.1.name", "chat", "the model name 'chat' is used twice"),
        ("models.1.served_model_name", "bge-m3", "the served model name 'bge-m3' is used twice"),
        ("providers.1.name", "laptop", "the provider 'laptop' is used twice"),
        ("direct_keys.1.name", "studio", "the direct key 'studio' is used twice"),
        ("edge.http_port", 8443, "HTTP and HTTPS cannot both use port 8443"),
    ],
)
def test_what_may_be_there_once_is_refused_twice(path: str, value: object, fault: str) -> None:
    assert fault in fault_of(spoilt((path, value)))


# --- secrets ---------------------------------------------------------------------------------


def test_no_secret_is_in_any_printed_form_of_a_state() -> None:
    state = lm.parse_state(FULL)
    shown = json.dumps(asdict(state), default=str)
    for text in (repr(state), str(state), f"{state}", shown, repr(asdict(state))):
        assert SECRET_MARK not in text
    assert lm.render_state(state).count(SECRET_MARK) == 11


@pytest.mark.parametrize(
    "path", ["providers.1.api_key", "direct_keys.0.secret", "secrets.salt_key"]
)
@pytest.mark.parametrize("wrong", [[SECRET_MARK], {"x": SECRET_MARK}], ids=["list", "object"])
def test_no_secret_is_in_the_error_about_it(path: str, wrong: object) -> None:
    with pytest.raises(lm.StateUnreadableError) as raised:
        lm.parse_state(spoilt((path, wrong)))
    assert path.rpartition(".")[2] in str(raised.value)
    assert SECRET_MARK not in str(raised.value)
    assert raised.value.__cause__ is None  # a traceback would print the input


def test_no_secret_is_in_the_error_about_a_truncated_file() -> None:
    for length in range(len(FULL) - 400, len(FULL) - 2, 7):
        assert SECRET_MARK not in fault_of(FULL[:length])


def test_a_new_installation_draws_every_secret_anew() -> None:
    drawn = iter(f"token{n}" for n in range(9))
    state = lm.new_state(instance="ab12", name_prefix="", token=lambda: next(drawn))
    values = [lm.reveal(v) for v in asdict(state.secrets).values() if v is not None]
    assert len(set(values)) == len(values) == 5
    assert values[0].startswith("sk-")  # LiteLLM takes no other
    assert lm.parse_state(lm.render_state(state)) == state


def test_only_secrets_are_revealed() -> None:
    with pytest.raises(TypeError, match="Path does not belong"):
        lm.reveal(Path())


# --- migrations ---------------------------------------------------------------------------------


def add_replicas(raw: lm.Json) -> lm.Json:
    return raw | {"models": [{"replicas": 1} | model for model in raw["models"]]}


def rename_alias(raw: lm.Json) -> lm.Json:
    models = [{**m, "served": m["alias"]} for m in raw["models"]]
    return raw | {"models": [{k: v for k, v in m.items() if k != "alias"} for m in models]}


STEPS = {1: add_replicas, 2: rename_alias}


def test_an_old_state_takes_every_step_in_order_and_is_not_changed_itself() -> None:
    old = {"schema_version": 1, "models": [{"alias": "q"}]}
    before = copy.deepcopy(old)
    new = lm.migrate(old, migrations=STEPS, target=3)
    assert new == {"schema_version": 3, "models": [{"served": "q", "replicas": 1}]}
    assert old == before


def test_a_state_of_the_middle_takes_only_the_later_steps() -> None:
    raw = {"schema_version": 2, "models": [{"alias": "q", "replicas": 4}]}
    new = lm.migrate(raw, migrations=STEPS, target=3)
    assert new["models"] == [{"served": "q", "replicas": 4}]


def test_a_state_of_today_takes_no_step() -> None:
    raw = json.loads(FULL)
    assert lm.migrate(raw, migrations=STEPS, target=1) == raw


# --- a model as typed ---------------------------------------------------------------------------


def test_what_is_typed_becomes_a_model_with_defaults() -> None:
    raw = {"name": "chat", "type": "chat", "source": {"kind": "hub", "repository": "a/b"}}
    model = lm.parse_model(raw, a_state(), {})
    assert model == lm.Model(
        name=lm.ModelName("chat"),
        type="chat",
        source=lm.HubSource(repository="a/b"),
        served_model_name="chat",
    )
    assert model.wish == "stopped"


def test_a_typed_model_is_refused_with_all_its_faults() -> None:
    with pytest.raises(lm.RefusedError) as raised:
        lm.parse_model({"name": "Chat", "type": "talk"}, a_state(), {})
    fact = raised.value.fact
    assert fact.startswith("This model cannot be registered: ")
    assert all(path in fact for path in ("name: ", "type: ", "source: "))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (
            {"placement": on_slice("1g.10gb", 0), "replicas": 2},
            "cannot run several replicas on a GPU or slice whose memory they do not share",
        ),
        (
            {"placement": on_gpus(), "replicas": 2},
            "cannot run several replicas on a GPU or slice whose memory they do not share",
        ),
        ({"host": "second"}, "cannot reach the host 'second' yet"),
    ],
)
def test_what_this_version_cannot_do_is_said_before_anything_starts(
    changes: dict[str, Any], fault: str
) -> None:
    with pytest.raises(lm.RefusedError, match=fault):
        lm.check_model(a_model(**changes), a_state(), {})


def test_a_new_model_goes_to_a_gpu_that_no_model_has() -> None:
    gpus = [lm.GpuUuid("G0"), lm.GpuUuid("G1")]
    two = lm.Hardware(gpus=tuple(lm.Gpu(uuid=uuid) for uuid in gpus))
    on_first = a_model("first", placement=on_gpus(gpus[0]))
    on_second = a_model("second", placement=on_gpus(gpus[1]))
    assert lm.default_placement(two, []) == on_gpus(gpus[0])
    assert lm.default_placement(two, [on_first]) == on_gpus(gpus[1])
    assert lm.default_placement(two, [on_first, on_second]) == on_gpus(gpus[0])
    assert lm.default_placement(lm.Hardware(), [on_first]) == lm.CpuPlacement()
