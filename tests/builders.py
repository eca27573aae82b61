"""Small builders: everything has a sensible value, a test names only what it is about."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from pydantic import SecretStr

import llm_manager as lm

NOW = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)
GPU_0 = lm.GpuUuid("GPU-11111111-aaaa-bbbb-cccc-000000000000")
GPU_1 = lm.GpuUuid("GPU-22222222-aaaa-bbbb-cccc-000000000001")
# In every secret that these builders make, so that a leak is found.
SECRET_MARK = "s3cr3t"  # noqa: S105
# Weights that are on every simulated server: those of `a_model`.
STORED = {"Qwen/Qwen3-0.6B": frozenset({"main"})}
Golden = Callable[[str, str], None]  # the fixture of conftest.py: file name, text


def a_secret(what: str) -> SecretStr:
    return SecretStr(f"sk-{SECRET_MARK}-{what}")


def some_secrets(**changes: Any) -> lm.Secrets:
    made: dict[str, Any] = {
        "master_key": a_secret("master"),
        "salt_key": a_secret("salt"),
        "database_password": a_secret("database"),
        "engine_key": a_secret("engine"),
        "console_key": a_secret("console"),
        "hugging_face_token": a_secret("hub"),
    }
    return lm.Secrets(**made | changes)


def a_state(*models: lm.Model, **changes: Any) -> lm.State:
    """An installation whose endpoint is wished running, with these models."""
    given: dict[str, Any] = {
        "instance": "a1b2c3",
        "endpoint": "running",
        "models": models,
        "secrets": some_secrets(),
    }
    return lm.State(**given | changes)


def a_model(name: str = "chat", **changes: Any) -> lm.Model:
    """A chat model on the CPU, wished running."""
    given: dict[str, Any] = {
        "name": lm.ModelName(name),
        "type": "chat",
        "source": lm.HubSource(repository="Qwen/Qwen3-0.6B"),
        "served_model_name": name,
        "wish": "running",
    }
    return lm.Model(**given | changes)


def on_gpus(*uuids: lm.GpuUuid, memory_fraction: float | None = None) -> lm.GpuPlacement:
    return lm.GpuPlacement(gpu_uuids=uuids or (GPU_0,), memory_fraction=memory_fraction)


def on_slice(profile: str, start: int, gpu: lm.GpuUuid = GPU_0) -> lm.MigPlacement:
    return lm.MigPlacement(gpu_uuid=gpu, profile=profile, start=start)


def a_layout(*slices: lm.Slice, gpu: lm.GpuUuid = GPU_0) -> lm.MigLayout:
    """The wished slices of a GPU; none means MIG off."""
    return lm.MigLayout(gpu_uuid=gpu, slices=slices)


def only(name: str | None) -> lm.Scope:
    """A change of that model, or of everything."""
    return lm.Scope(models=frozenset({lm.ModelName(name)})) if name else lm.EVERYTHING


def a_site() -> lm.Site:
    return lm.Site(
        generated="/home/llm/generated",
        hugging_face_home="/home/llm/huggingface",
        compile_caches="/home/llm/compiled",
    )


def an_engine(state: lm.State, name: str = "chat", replica: int = 0) -> lm.ContainerSpec:
    return lm.render_engines(state, state.model(name), a_site())[replica]


def seen(spec: lm.ContainerSpec, **changes: Any) -> lm.ObservedContainer:
    """A container as it is observed while all is well with it."""
    given: dict[str, Any] = {
        "name": spec.name,
        "role": spec.role,
        "spec_hash": spec.hash,
        "running": True,
        "ready": True,
        "address": "172.20.0.9",
        "image": spec.image,
        "started_at": NOW,
        "model_name": spec.labels.get(lm.LABEL_MODEL_NAME),
        "model_type": spec.labels.get(lm.LABEL_MODEL_TYPE),
        "served_model_name": spec.labels.get(lm.LABEL_SERVED_NAME),
        "docker_health": "healthy" if spec.healthcheck else None,
        "devices": spec.devices,
    }
    return lm.ObservedContainer(**given | changes)


def ended(container: lm.ObservedContainer, exit_code: int | None = 0) -> lm.ObservedContainer:
    return replace(container, running=False, ready=None, exit_code=exit_code, started_at=None)


def an_observed(*containers: lm.ObservedContainer, **changes: Any) -> lm.Observed:
    """These containers on a server that has every image, the network and the volumes."""
    state = a_state()
    given: dict[str, Any] = {
        "containers": {container.name: container for container in containers},
        "images": frozenset(vars_of(state.images).values()),
        "networks": frozenset({lm.network_name(state)}),
        "volumes": frozenset(lm.volume_names(replace(state, endpoint="running", monitoring=True))),
        "weights": STORED,
    }
    return lm.Observed(**given | changes)


def vars_of(images: lm.Images) -> Mapping[str, str]:
    return {role: getattr(images, role) for role in images.__slots__}


def as_wished(state: lm.State, slot: lm.Slot = "a", **changes: Any) -> lm.Observed:
    """The world that this state asks for, all of it ready."""
    models, site = state.wished_models, a_site()
    specs = [spec for model in models for spec in lm.render_engines(state, model, site)]
    files: dict[str, str] = {}
    edge = None
    if state.endpoint == "running":
        gateway = lm.render_gateway(state, slot, lm.served_models(state, models), site)
        specs += [lm.render_database(state), gateway, lm.render_edge(state, site)]
        specs += [lm.render_cache(state)] if lm.uses_cache(state) else []
        seen_certificate = changes.get("certificate")
        pem = seen_certificate.pem if seen_certificate else ""
        text = lm.render_caddyfile(state, slot, lm.served_models(state, models), pem)
        files = {
            f"litellm-{slot}/config.yaml": lm.render_litellm_config(
                state, lm.served_models(state, models)
            ),
            lm.CADDYFILE: text,
            **({lm.CERTIFICATE: pem} if pem else {}),
        }
        edge = lm.LoadedCaddyfile(slot, lm.caddyfile_hash(text))
    for role in lm.monitor_roles(state, changes.get("hardware")):
        specs.append(lm.render_monitor(state, role, site))
        files |= lm.monitoring_files(state, role)
    given = {"files": files, "edge": edge} | changes
    return an_observed(*(seen(spec) for spec in specs), **given)


def but(observed: lm.Observed, *changed: lm.ObservedContainer, without: str = "") -> lm.Observed:
    """The same world with some containers changed or added, and one gone."""
    containers = {
        **{name: container for name, container in observed.containers.items() if name != without},
        **{container.name: container for container in changed},
    }
    return replace(observed, containers=containers)


def the(observed: lm.Observed, name: str) -> lm.ObservedContainer:
    return observed.containers[lm.ContainerName(name)]


def set_aside(container: lm.ObservedContainer) -> lm.ObservedContainer:
    return replace(ended(container), name=lm.aside(container.name))


def a_snapshot(state: lm.State | None = None, **changes: Any) -> lm.Snapshot:
    """All is well, and nothing runs but what should."""
    state = state or a_state(a_model())
    observed = as_wished(state)
    given: dict[str, Any] = {
        "taken_at": NOW + timedelta(minutes=3, seconds=20),
        "state": state,
        "observed": observed,
        "plan": lm.plan_state(state, observed, a_site()),
    }
    return lm.Snapshot(**given | changes)
