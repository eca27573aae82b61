#!/usr/bin/env python3
"""LLM Manager: the operator console of a shared GPU server, in one file.

Outline (search for "§5"; tests/test_layout.py keeps it true):
  §1  Start-up           effects  its own virtual environment, before anything else
  §2  Foundations        pure     names, constants, errors
  §3  Data model         pure     config.json as typed dataclasses, its rules and migrations
  §4  Config generation  pure     containers, LiteLLM's YAML, the Caddyfile
  §5  Planning           pure     desired + observed -> Plan
  §6  Views              pure     what the operator reads
  §7  Adapters           effects  files, Docker, HTTP, NVML: the only doors out
  §8  Orchestration      effects  Plan -> world, undo, jobs
  §9  Manager            effects  the use cases; all that console and command line may call
  §10 Console            effects  one builder per tab, and who may open it
  §11 Main               effects  arguments, wiring, systemd
"""

from __future__ import annotations

import os
import subprocess
import sys
from hashlib import sha256
from importlib.util import LazyLoader, find_spec, module_from_spec
from pathlib import Path, PurePath
from types import ModuleType
from typing import Final

# =============================================================================
# §1 Start-up — effects: its own virtual environment, before anything else
# =============================================================================

# This comes first because the imports below it need what it installs.

PROGRAM: Final = Path(__file__).resolve()
REQUIREMENTS: Final = PROGRAM.with_name("requirements.txt")
ENVIRONMENT: Final = PROGRAM.with_name(".venv")
STAMP: Final = ENVIRONMENT / ".requirements.sha256"
# An upgraded distribution changes the Python under an environment, whose packages stay behind.
LIBRARY: Final = ENVIRONMENT / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}"
PACKAGES: Final = ("docker", "fastapi", "gradio", "httpx", "psycopg", "pydantic", "pynvml", "yaml")


def ensure_packages() -> None:
    """Return only where every package is present; else re-run in `.venv`, made when missing."""
    inside = Path(sys.prefix).resolve() == ENVIRONMENT.resolve()
    wanted = sha256(REQUIREMENTS.read_bytes()).hexdigest()
    complete = LIBRARY.is_dir() and STAMP.is_file() and STAMP.read_text().strip() == wanted
    if complete if inside else all(map(find_spec, PACKAGES)):
        return
    if not complete:
        _make_environment(wanted)
    python = str(ENVIRONMENT / "bin" / "python")
    os.execv(python, [python, str(PROGRAM), *sys.argv[1:]])  # noqa: S606 - our own interpreter


def _make_environment(stamp: str) -> None:
    if sys.version_info < (3, 11):  # noqa: UP036 - older ones get as far as here
        _give_up("This needs Python 3.11 or newer.", "Install it, then run this again with it.")
    _say(f"First start: installing {REQUIREMENTS.name} into {ENVIRONMENT} (about a minute) ...")
    if not (ENVIRONMENT / "bin" / "pip").exists() or not LIBRARY.is_dir():
        # Debian and Ubuntu ship python3 without the part that venv needs.
        if find_spec("ensurepip") is None:
            _install_ensurepip()
        _run_or_give_up([sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)])
    pip = str(ENVIRONMENT / "bin" / "pip")
    # Twice quiet: errors alone, no warnings about this machine's own pip settings.
    quiet = ["-qq", "--disable-pip-version-check"]
    _run_or_give_up([pip, "install", *quiet, "-r", str(REQUIREMENTS)])
    STAMP.write_text(stamp)
    _say("Installed.")


def _install_ensurepip() -> None:
    package = f"python{sys.version_info.major}.{sys.version_info.minor}-venv"
    if os.geteuid() != 0 or not Path("/usr/bin/apt-get").exists():
        _give_up("Python's venv module is not here.", f"Run: sudo apt-get install {package}")
    _say(f"Installing {package} with apt-get ...")
    _run_or_give_up(["apt-get", "-qq", "update"])
    _run_or_give_up(["apt-get", "-qq", "-y", "install", package])


def _run_or_give_up(command: list[str]) -> None:
    # Errors come on stderr; apt's progress on stdout would drown what we say.
    quiet = subprocess.DEVNULL
    if subprocess.run(command, stdin=quiet, stdout=quiet, check=False).returncode:  # noqa: S603
        _give_up(f"`{' '.join(command)}` failed.", "Mend what it says above, then run this again.")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201 - before logging and the console exist


def _give_up(fact: str, advice: str) -> None:
    _say(f"{fact} {advice}")
    raise SystemExit(1)


def lazy_module(name: str) -> ModuleType:
    """Import on first use: Gradio costs 2 s that `status` need not pay."""
    if name in sys.modules:
        return sys.modules[name]
    spec = find_spec(name)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(name)
    spec.loader = LazyLoader(spec.loader)
    module = module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    ensure_packages()

import argparse
import concurrent.futures
import contextlib
import difflib
import errno
import fcntl
import hmac
import html
import io
import itertools
import json
import logging
import re
import secrets
import shlex
import shutil
import socket
import tarfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from functools import partial
from getpass import getpass
from typing import TYPE_CHECKING, Annotated, Any, Literal, NewType, Protocol, TypeVar, assert_never
from urllib.parse import parse_qs

import docker
import docker.errors
import docker.types
import httpx
import pydantic
import requests.exceptions
import urllib3.exceptions
import yaml
from docker.models.containers import Container

if TYPE_CHECKING:
    import fastapi
    import gradio as gr
    import pynvml
    import uvicorn
else:
    fastapi, gr, pynvml, uvicorn = map(lazy_module, ("fastapi", "gradio", "pynvml", "uvicorn"))

# =============================================================================
# §2 Foundations — pure: names, constants, errors
# =============================================================================

ModelName = NewType("ModelName", str)
ContainerName = NewType("ContainerName", str)
GpuUuid = NewType("GpuUuid", str)
SpecHash = NewType("SpecHash", str)
Json = dict[str, Any]

CONSOLE_HOST: Final = "127.0.0.1"
CONSOLE_PORT: Final = 7860
ASIDE: Final = ".aside"
GENERATED_BANNER: Final = "# Generated by llm_manager; edits are overwritten.\n"
ENGINE_PORT: Final = 8000
GATEWAY_PORT: Final = 4000
HEALTH_PATH: Final = "/healthz"

LABEL_OWNER: Final = "managed-by"
OWNER: Final = "llm-manager"
LABEL_INSTANCE: Final = "llm-manager.instance"
LABEL_SPEC_HASH: Final = "llm-manager.spec-hash"
LABEL_ROLE: Final = "llm-manager.role"
LABEL_MODEL_NAME: Final = "model-name"
LABEL_MODEL_TYPE: Final = "model-type"
LABEL_SERVED_NAME: Final = "llm-manager.served-model-name"

# The first start migrates LiteLLM's database (213 migrations); a slow disk needs minutes.
DATABASE_START_SECONDS: Final = 300.0
GATEWAY_START_SECONDS: Final = 600.0
EDGE_START_SECONDS: Final = 60.0
ENGINE_START_SECONDS: Final = 3600.0  # a 400 GB model over a slow disk
SLOT_PAUSE_SECONDS: Final = 2.0
DRAIN_SECONDS: Final = 300

log = logging.getLogger("llm_manager")


class ManagerError(Exception):
    """A failure the operator can act on: one sentence of fact, one of advice."""

    def __init__(self, fact: str, *, advice: str) -> None:
        super().__init__(f"{fact} {advice}")
        self.fact = fact
        self.advice = advice


class StateUnreadableError(ManagerError):
    """The desired state exists but cannot be trusted; never treat it as empty."""


class RefusedError(ManagerError):
    """What was asked for breaks a rule; nothing was changed."""


class BusyError(ManagerError):
    """Another change is under way in this installation."""


class DockerAbsentError(ManagerError):
    """The Docker engine does not answer at all."""


class ContainerFailedError(ManagerError):
    """Docker refused a container, or it stopped before it was ready."""


class ContainerGoneError(ContainerFailedError):
    """The container that was meant is not there."""


class GatewayError(ManagerError):
    """LiteLLM's management API refused, or does not answer."""


class CancelledError(ManagerError):
    """The operator took the change back; it was undone."""


# =============================================================================
# §3 Data model — pure: config.json as typed dataclasses, its rules and migrations
# =============================================================================

SCHEMA_VERSION: Final = 1

ModelType = Literal[
    "chat", "vision", "embedding", "rerank", "speech-to-text", "text-to-speech", "image"
]
Wish = Literal["running", "stopped"]
SERVED_TYPES: Final[tuple[ModelType, ...]] = ("chat", "vision", "embedding", "rerank")


def _checked(pattern: str, rule: str, *, longest: int) -> pydantic.AfterValidator:
    """A text that matches the whole pattern; the fault repeats the rule in words."""
    compiled = re.compile(pattern)

    def check(text: str) -> str:
        if len(text) > longest or not compiled.fullmatch(text):
            raise ValueError(f"{text!r} must be {rule}, at most {longest} characters")
        return text

    return pydantic.AfterValidator(check)


# A model name becomes a container name, a DNS label, a path and a YAML value: 32 characters
# leave room in the 63 of a DNS label for prefix, "llm-model-" and the replica number.
NAME_RULE: Final = _checked(
    r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", "lower-case letters, digits and inner hyphens", longest=32
)
SERVED_NAME_RULE: Final = _checked(
    r"[A-Za-z0-9][A-Za-z0-9._:/-]*", "letters, digits and . _ : / -", longest=128
)
REPOSITORY_RULE: Final = _checked(
    r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", "a repository like Qwen/Qwen3-8B", longest=96
)
REVISION_RULE: Final = _checked(r"[A-Za-z0-9][\w./-]*", "a branch, tag or commit", longest=96)
IMAGE_RULE: Final = _checked(
    r"[a-z0-9][a-z0-9._/-]*(:\d+/[a-z0-9._/-]+)?(:[\w.-]+|@sha256:[0-9a-f]{64})",
    "a pinned image like vllm/vllm-openai:v0.30.0",
    longest=255,
)
HOSTNAME_RULE: Final = _checked(
    r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", "a lower-case host name or IPv4 address", longest=253
)
PATH_RULE: Final = _checked(
    r"/[^\x00-\x1f\x7f:,\"\\{}]*", "an absolute path without control characters or : , \" \\ { }",
    longest=1024,
)  # fmt: skip
URL_RULE: Final = _checked(
    r"https?://[^\s\x00-\x1f\x7f\"\\{}]+", "an http:// or https:// address", longest=512
)

Name = Annotated[str, NAME_RULE]
ImageRef = Annotated[str, IMAGE_RULE]
AbsolutePath = Annotated[str, PATH_RULE]
Port = Annotated[int, pydantic.Field(ge=1, le=65535)]
_strict = pydantic.with_config(pydantic.ConfigDict(extra="forbid"))


@_strict
@dataclass(frozen=True, kw_only=True, slots=True)
class HubSource:
    """Weights on the Hugging Face hub; no revision means the repository's default branch."""

    kind: Literal["hub"] = "hub"
    repository: Annotated[str, REPOSITORY_RULE]
    revision: Annotated[str, REVISION_RULE] | None = None


@_strict
@dataclass(frozen=True, kw_only=True, slots=True)
class LocalSource:
    """Weights in a directory of this server, mounted read-only into the engine."""

    kind: Literal["local"] = "local"
    path: AbsolutePath


@_strict
@dataclass(frozen=True, kw_only=True, slots=True)
class CpuPlacement:
    """On the processor. vLLM would take 92 % of all memory: the KV cache size is always set."""

    kind: Literal["cpu"] = "cpu"
    kv_cache_mib: Annotated[int, pydantic.Field(ge=16)] = 4096


@_strict
@dataclass(frozen=True, kw_only=True, slots=True)
class GpuPlacement:
    """On whole GPUs by UUID; several mean tensor parallelism."""

    kind: Literal["gpu"] = "gpu"
    gpu_uuids: Annotated[tuple[GpuUuid, ...], pydantic.Field(min_length=1)]
    memory_fraction: Annotated[float, pydantic.Field(gt=0, le=1)] | None = None


@_strict
@dataclass(frozen=True, kw_only=True, slots=True)
class MigPlacement:
    """On one MIG slice, by what survives a reboot; resolved to today's MIG UUID at start."""

    kind: Literal["mig"] = "mig"
    gpu_uuid: GpuUuid
    profile: str
    start: Annotated[int, pydantic.Field(ge=0)]


Source = Annotated[HubSource | LocalSource, pydantic.Discriminator("kind")]
Placement = Annotated[CpuPlacement | GpuPlacement | MigPlacement, pydantic.Discriminator("kind")]


@_strict
@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A registered model: what the operator deploys and stops."""

    name: Annotated[ModelName, NAME_RULE]
    type: ModelType
    source: Source
    served_model_name: Annotated[str, SERVED_NAME_RULE]
    engine_arguments: tuple[str, ...] = ()
    image: ImageRef | None = None
    recipe: Name | None = None
    replicas: Annotated[int, pydantic.Field(ge=1, le=16)] = 1
    placement: Placement = field(default_factory=CpuPlacement)
    host: Name = "local"
    wish: Wish = "stopped"


@_strict
@dataclass(frozen=True, kw_only=True, slots=True)
class Images:
    """The image of every component, pinned; changing one is a planned change."""

    # vLLM-Omni needs a vLLM of the same major.minor; both stay at the newest that agree.
    vllm: ImageRef = "vllm/vllm-openai:v0.30.0"
    vllm_cpu: ImageRef = "vllm/vllm-openai-cpu:v0.30.0-x86_64"
    vllm_omni: ImageRef = "vllm/vllm-omni:v0.30.0"
    # Versions below 1.103.1 have published holes; /health and fallbacks changed in 1.109.
    litellm: ImageRef = "ghcr.io/berriai/litellm:v1.109.1"
    caddy: ImageRef = "caddy:2.11.7-alpine"
    postgres: ImageRef = "postgres:16-alpine"
    redis: ImageRef = "redis:7-alpine"
    prometheus: ImageRef = "prom/prometheus:v3.5.0"
    grafana: ImageRef = "grafana/grafana:12.1.0"
    dcgm_exporter: ImageRef = "nvcr.io/nvidia/k8s/dcgm-exporter:4.5.3-4.8.2-ubuntu22.04"


ImageRole = Literal[
    "vllm", "vllm_cpu", "vllm_omni", "litellm", "caddy", "postgres",
    "redis", "prometheus", "grafana", "dcgm_exporter",
]  # fmt: skip


@_strict
@dataclass(frozen=True, kw_only=True, slots=True)
class Provider:
    """An OpenAI-compatible endpoint that runs elsewhere."""

    name: Name
    kind: Literal["openai", "ollama", "llama.cpp", "lm-studio", "exo", "cloud"]
    base_url: Annotated[str, URL_RULE] | None = None
    api_key: pydantic.SecretStr | None = None


@_strict
@dataclass(frozen=True, kw_only=True, slots=True)
class Route:
    """A public name and the models or providers' models that answer for it, in order."""

    name: Annotated[str, SERVED_NAME_RULE]
    members: tuple[str, ...]
    strategy: Literal["least-busy", "latency", "usage", "round-robin", "weighted"] = "least-busy"
    fallbacks: tuple[str, ...] = ()


@_strict
@dataclass(frozen=True, kw_only=True, slots=True)
class DirectKey:
    """A key for `/models/{name}/v1`, checked by Caddy; no models means all of them."""

    name: Name
    secret: pydantic.SecretStr
    models: tuple[ModelName, ...] = ()


@_strict
@dataclass(frozen=True, kw_only=True, slots=True)
class InternalTls:
    """Caddy's own authority; clients must trust its root certificate."""

    kind: Literal["internal"] = "internal"


@_strict
@dataclass(frozen=True, kw_only=True, slots=True)
class OwnCertificate:
    """A certificate chain and key in files of this server."""

    kind: Literal["own"] = "own"
    certificate_path: AbsolutePath
    key_path: AbsolutePath


@_strict
@dataclass(frozen=True, kw_only=True, slots=True)
class AcmeTls:
    """Let's Encrypt, or a company's ACME server; needs a public name and port 80 or 443."""

    kind: Literal["acme"] = "acme"
    email: Annotated[str, _checked(r"[\w.+-]+@[\w.-]+", "an e-mail address", longest=254)]
    directory_url: Annotated[str, URL_RULE] | None = None


Tls = Annotated[InternalTls | OwnCertificate | AcmeTls, pydantic.Discriminator("kind")]


@_strict
@dataclass(frozen=True, kw_only=True, slots=True)
class Edge:
    """The one published endpoint: its names, ports and certificate."""

    hostnames: Annotated[
        tuple[Annotated[str, HOSTNAME_RULE], ...], pydantic.Field(min_length=1)
    ] = ("localhost",)
    address: Annotated[str, _checked(r"[0-9a-f.:]+", "an IP address", longest=45)] = "0.0.0.0"  # noqa: S104
    https_port: Port = 443
    http_port: Port = 80
    tls: Tls = field(default_factory=InternalTls)
    open_routes: bool = False


@_strict
@dataclass(frozen=True, kw_only=True, slots=True)
class MigLayout:
    """The wished slices of one GPU: (profile, start) pairs."""

    gpu_uuid: GpuUuid
    slices: tuple[tuple[str, int], ...]


@_strict
@dataclass(frozen=True, kw_only=True, slots=True)
class Secrets:
    """Everything that must never print; made once, kept through every rollback."""

    master_key: pydantic.SecretStr
    salt_key: pydantic.SecretStr
    database_password: pydantic.SecretStr
    engine_key: pydantic.SecretStr
    console_key: pydantic.SecretStr
    hugging_face_token: pydantic.SecretStr | None = None


@_strict
@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """What the operator wants: the only source of truth, stored as config.json."""

    schema_version: Literal[1] = SCHEMA_VERSION
    instance: Annotated[str, _checked(r"[0-9a-f]+", "hexadecimal digits", longest=16)]
    name_prefix: Annotated[str, _checked(r"([a-z0-9]+-)?", "a prefix like a1b2-", longest=12)] = ""
    endpoint: Wish = "stopped"
    models: tuple[Model, ...] = ()
    images: Images = field(default_factory=Images)
    providers: tuple[Provider, ...] = ()
    routes: tuple[Route, ...] = ()
    direct_keys: tuple[DirectKey, ...] = ()
    edge: Edge = field(default_factory=Edge)
    mig_layouts: tuple[MigLayout, ...] = ()
    monitoring: bool = False
    hugging_face_home: AbsolutePath | None = None
    secrets: Secrets

    def model(self, name: str) -> Model:
        """The registered model of that name, or a refusal that lists what there is."""
        for model in self.models:
            if model.name == name:
                return model
        known = ", ".join(model.name for model in self.models) or "none yet"
        raise RefusedError(
            f"There is no model called {name!r}.", advice=f"Registered models: {known}."
        )

    def with_model(self, model: Model) -> State:
        """This state with the model added, or put in the place of its namesake."""
        if any(known.name == model.name for known in self.models):
            models = tuple(model if m.name == model.name else m for m in self.models)
        else:
            models = (*self.models, model)
        return replace(self, models=models)

    @property
    def wished_models(self) -> tuple[Model, ...]:
        return tuple(model for model in self.models if model.wish == "running")


_STATE: Final = pydantic.TypeAdapter(State)


def new_state(*, instance: str, name_prefix: str, token: Callable[[], str]) -> State:
    """The state of an installation that has done nothing yet, with fresh secrets."""
    # LiteLLM takes only a master key that begins with sk-.
    return State(
        instance=instance,
        name_prefix=name_prefix,
        secrets=Secrets(
            master_key=pydantic.SecretStr(f"sk-{token()}"),
            salt_key=pydantic.SecretStr(f"sk-salt-{token()}"),
            database_password=pydantic.SecretStr(token()),
            engine_key=pydantic.SecretStr(token()),
            console_key=pydantic.SecretStr(token()),
        ),
    )


def parse_state(text: str) -> State:
    """Stored JSON, of this version or an older one, to a State; every fault with its path."""
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise StateUnreadableError(
            f"config.json is not valid JSON: {error}.", advice=RESTORE_ADVICE
        ) from error
    if not isinstance(raw, dict) or not isinstance(raw.get("schema_version"), int):
        raise StateUnreadableError(
            "config.json holds no schema_version, so it is not a state of llm_manager.",
            advice=RESTORE_ADVICE,
        )
    try:
        state = _STATE.validate_python(migrate(raw))
    except pydantic.ValidationError as error:
        raise StateUnreadableError(
            f"config.json has {describe_faults(error, raw)}.", advice=RESTORE_ADVICE
        ) from None  # the original repeats the input, secrets included
    check_state(state)
    return state


RESTORE_ADVICE: Final = "Mend the file, or copy a version from history/ over it."


def render_state(state: State) -> str:
    """The JSON that parse_state reads back; the one text that holds the secrets in clear."""
    return json.dumps(asdict(state), indent=2, default=reveal) + "\n"


def reveal(value: object) -> str:
    """A secret's text, for the few places that must have it."""
    if isinstance(value, pydantic.SecretStr):
        return value.get_secret_value()
    raise TypeError(f"{type(value).__name__} does not belong in the state")


def describe_faults(error: pydantic.ValidationError, raw: object) -> str:
    """Every fault as `path: sentence`; list entries carry their name where they have one."""
    return "; ".join(
        f"{_fault_path(fault['loc'], raw)}: {fault['msg'].removeprefix('Value error, ')}"
        for fault in error.errors(include_url=False, include_input=False)
    )


def _fault_path(location: tuple[int | str, ...], raw: object) -> str:
    path, here = "", raw
    for part in location:
        match here:
            case dict() if part in here:
                here, path = here[part], f"{path}.{part}"
            case list() | tuple() if isinstance(part, int) and part < len(here):
                here = here[part]
                name = here.get("name") if isinstance(here, dict) else None
                path += f"[{part}]" + (f" ({name})" if name else "")
            case _ if part in {"hub", "local", "cpu", "gpu", "mig", "internal", "own", "acme"}:
                pass  # pydantic names the branch of a union; the operator's file does not
            case _:
                path = f"{path}.{part}"
    return path.lstrip(".") or "the whole file"


def check_state(state: State) -> None:
    """The rules that no single field can break; all faults in one refusal."""
    faults = [
        *_doubles("model name", [m.name for m in state.models]),
        *_doubles("served model name", [m.served_model_name for m in state.models]),
        *_doubles("provider", [p.name for p in state.providers]),
        *_doubles("direct key", [k.name for k in state.direct_keys]),
    ]
    if state.edge.https_port == state.edge.http_port:
        faults.append(f"HTTP and HTTPS cannot both use port {state.edge.http_port}")
    if faults:
        raise RefusedError(f"{'; '.join(faults)}.", advice="Change one of them.")


def _doubles(what: str, names: Sequence[str]) -> list[str]:
    return [f"the {what} {n!r} is used twice" for n in sorted({*names}) if names.count(n) > 1]


def migrate(
    raw: Json,
    *,
    migrations: Mapping[int, Callable[[Json], Json]] | None = None,
    target: int = SCHEMA_VERSION,
) -> Json:
    """Bring stored state to the target version; newer than this program is an error."""
    steps = MIGRATIONS if migrations is None else migrations
    version = raw["schema_version"]
    if version > target:
        raise StateUnreadableError(
            f"config.json is version {version}; this program knows {target}.",
            advice="Install the newer llm_manager, or copy an older version from history/.",
        )
    if version < 1:
        raise StateUnreadableError(
            f"config.json says version {version}, which never was.", advice=RESTORE_ADVICE
        )
    for old in range(version, target):
        raw = steps[old](raw) | {"schema_version": old + 1}
    return raw


# Frozen for ever: a step calls nothing of today's code. tests/states/ holds a file per version.
MIGRATIONS: Final[Mapping[int, Callable[[Json], Json]]] = {}


@dataclass(frozen=True, kw_only=True, slots=True)
class VirtualKey:
    """A colleague's key as LiteLLM knows it; its secret is known only at creation."""

    key_hash: str
    alias: str
    hint: str
    models: tuple[str, ...]
    expires_at: datetime | None
    rpm_limit: int | None
    tpm_limit: int | None
    blocked: bool
    created_at: datetime | None


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyRequest:
    """What the operator grants with a key; None is no limit."""

    alias: str
    models: tuple[str, ...] = ()
    days: int | None = None
    rpm_limit: int | None = None
    tpm_limit: int | None = None

    def __post_init__(self) -> None:
        longest = 100
        if not self.alias.strip() or len(self.alias) > longest or not self.alias.isprintable():
            raise RefusedError(
                f"A key needs a name of at most {longest} printable characters.",
                advice="Name the colleague it is for.",
            )
        limits = (self.days, self.rpm_limit, self.tpm_limit)
        if any(limit is not None and limit < 1 for limit in limits):
            raise RefusedError("A limit is below 1.", advice="Leave it empty for no limit.")

    def as_litellm(self) -> Json:
        """The body of `/key/generate`."""
        return {
            "key_alias": self.alias,
            "models": list(self.models),
            "duration": f"{self.days}d" if self.days else None,
            "rpm_limit": self.rpm_limit,
            "tpm_limit": self.tpm_limit,
        }


# =============================================================================
# §4 Config generation — pure: containers, LiteLLM's YAML, the Caddyfile
# =============================================================================


@dataclass(frozen=True, kw_only=True, slots=True)
class Mount:
    """A host path or one of our volumes, seen inside a container."""

    source: str
    target: str
    read_only: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedPort:
    address: str
    host_port: int
    container_port: int


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineAnswers:
    """Ready when it answered one request of its own kind; `/health` alone proves no weights."""

    model_type: ModelType
    served_model_name: str
    engine_key: pydantic.SecretStr


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayServes:
    """Ready when LiteLLM has its database and lists these names."""

    model_names: tuple[str, ...]
    master_key: pydantic.SecretStr


@dataclass(frozen=True, slots=True)
class EdgeAnswers:
    """Ready when Caddy answers on its health path."""


@dataclass(frozen=True, slots=True)
class DockerHealthy:
    """Ready when Docker's own health check says so."""


Readiness = EngineAnswers | GatewayServes | EdgeAnswers | DockerHealthy


@dataclass(frozen=True, kw_only=True, slots=True)
class ContainerSpec:
    """Everything Docker must know to run one container; equal hashes need no replacement."""

    name: ContainerName
    role: Literal["engine", "gateway", "edge", "database"]
    image: str
    network: str
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    environment: Mapping[str, str | pydantic.SecretStr] = field(default_factory=dict)
    mounts: tuple[Mount, ...] = ()
    ports: tuple[PublishedPort, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    gpu_uuids: tuple[GpuUuid, ...] = ()
    shm_mib: int = 64
    healthcheck: str | None = None
    restart: Literal["no", "unless-stopped"] = "unless-stopped"
    drop_capabilities: bool = False
    stop_seconds: int = 30
    content_hash: str = ""  # of files it reads only at start
    start_seconds: float = 60.0
    readiness: Readiness

    @property
    def hash(self) -> SpecHash:
        """Changes exactly when the container must be replaced."""
        ignored = {"start_seconds", "readiness", "stop_seconds"}
        canonical = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ignored}
        text = json.dumps(canonical, sort_keys=True, default=_canonical)
        return SpecHash(sha256(text.encode()).hexdigest()[:16])


def _canonical(value: object) -> object:
    return reveal(value) if isinstance(value, pydantic.SecretStr) else asdict(value)  # type: ignore[call-overload]


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """Where on this host an installation keeps what containers mount."""

    generated: str
    hugging_face_home: str


CADDYFILE: Final = "caddy/Caddyfile"
Slot = Literal["a", "b"]
SLOTS: Final[tuple[Slot, Slot]] = ("a", "b")


def network_name(state: State) -> str:
    return f"{state.name_prefix}llm-network"


def volume_names(state: State) -> tuple[str, ...]:
    return tuple(f"{state.name_prefix}llm-{role}-data" for role in ("postgres", "caddy"))


def database_name(state: State) -> ContainerName:
    return ContainerName(f"{state.name_prefix}llm-postgres")


def edge_name(state: State) -> ContainerName:
    return ContainerName(f"{state.name_prefix}llm-caddy")


def gateway_name(state: State, slot: Slot) -> ContainerName:
    return ContainerName(f"{state.name_prefix}llm-litellm-{slot}")


def replica_names(state: State, model: Model) -> tuple[ContainerName, ...]:
    """The engine containers of a model, one per replica."""
    return tuple(
        ContainerName(f"{state.name_prefix}llm-model-{model.name}-{n}")
        for n in range(model.replicas)
    )


# --- engines -----------------------------------------------------------------

EngineOptions = Mapping[str, frozenset[str]]  # image -> what its command line takes

# What the manager sets itself, and what would let prompts into a log.
RESERVED_OPTIONS: Final = frozenset({
    "--host", "--port", "--uds", "--model", "--served-model-name", "--api-key", "--config",
    "--revision", "--root-path", "--tensor-parallel-size", "-tp", "--ssl-keyfile",
    "--ssl-certfile", "--headless", "--grpc", "--runner",
    "--enable-log-requests", "--enable-log-outputs", "--otlp-traces-endpoint",
})  # fmt: skip


def parse_recipe_options(text: str) -> dict[str, frozenset[str]]:
    """The options a recipe lists for its images; switches get their `--no-` form too."""
    recipe = yaml.safe_load(text)
    listed = frozenset(recipe["options"].split())
    negated = frozenset(f"--no-{name[2:]}" for name in listed if name.startswith("--"))
    return dict.fromkeys(recipe["images"], listed | negated)


def check_engine_arguments(model: Model, images: Images, options: EngineOptions) -> None:
    """Refuse what the engine would refuse minutes later, and what the manager sets itself."""
    arguments = model.engine_arguments
    if any(not argument.isprintable() for argument in arguments):
        raise RefusedError(
            f"An engine argument of {model.name} holds control characters.",
            advice="Write one option per line, in plain text.",
        )
    if arguments and not arguments[0].startswith("-"):
        raise RefusedError(
            f"The engine arguments of {model.name} begin with {arguments[0]!r}, not an option.",
            advice="Begin with an option such as --max-model-len 8192.",
        )
    known = options.get(engine_image(model, images))
    for option in (_option_name(a) for a in arguments if re.match(r"--?[A-Za-z]", a)):
        if option in _reserved_options(model):
            raise RefusedError(
                f"The engine argument {option} is set by LLM Manager itself.",
                advice="Leave it out.",
            )
        if known is not None and option not in known:
            offered = sorted(known - _reserved_options(model))
            near = difflib.get_close_matches(option, offered, n=1)
            raise RefusedError(
                f"The engine argument {option} is unknown to {engine_image(model, images)}.",
                advice=f"Did you mean {near[0]}?" if near else "Leave it out, or correct it.",
            )


def _option_name(argument: str) -> str:
    """`--json.key=value` is the option `--json`; vLLM takes `_` for `-`."""
    return re.split(r"[=.]", argument, maxsplit=1)[0].replace("_", "-")


def _reserved_options(model: Model) -> frozenset[str]:
    match model.placement:
        case CpuPlacement():
            return RESERVED_OPTIONS | {"--kv-cache-memory-bytes"}
        case GpuPlacement(memory_fraction=float()):
            return RESERVED_OPTIONS | {"--gpu-memory-utilization"}
        case _:
            return RESERVED_OPTIONS


def parse_model(raw: Json, images: Images, options: EngineOptions) -> Model:
    """A model from what the operator typed; every fault at once, and nothing registered."""
    filled = {"served_model_name": raw.get("name"), **raw}
    model = _parsed(Model, filled, "This model cannot be registered")
    check_model(model, images, options)
    return model


def parse_edge(raw: Json) -> Edge:
    return _parsed(Edge, raw, "These HTTPS settings cannot be used")


def parse_images(raw: Json) -> Images:
    return _parsed(Images, raw, "That image cannot be pinned")


T = TypeVar("T")


def _parsed(kind: type[T], raw: Json, fact: str) -> T:
    try:
        return pydantic.TypeAdapter(kind).validate_python(raw)
    except pydantic.ValidationError as error:
        raise RefusedError(
            f"{fact}: {describe_faults(error, raw)}.", advice="Correct that and try again."
        ) from None


def check_model(model: Model, images: Images, options: EngineOptions) -> None:
    """What an engine would refuse minutes later is refused now."""
    unserved = (
        (model.type not in SERVED_TYPES, f"serve {model.type} models",
         f"It serves {', '.join(SERVED_TYPES)}."),
        (isinstance(model.placement, MigPlacement), "place a model on a MIG slice",
         "Choose whole GPUs or the CPU."),
        (model.host != "local", f"reach the host {model.host!r}", "Leave the host at `local`."),
        (_crowded(model), "run two replicas on a GPU whose memory they do not share out",
         "Give the placement a memory fraction below 0.5, or run one replica."),
        (model.recipe is not None, f"build the recipe {model.recipe!r}", "Name an image instead."),
    )  # fmt: skip
    for unable, what, advice in unserved:
        if unable:
            raise RefusedError(f"This version cannot {what} yet.", advice=advice)
    check_engine_arguments(model, images, options)


def _crowded(model: Model) -> bool:
    placement = model.placement
    if not isinstance(placement, GpuPlacement) or model.replicas == 1:
        return False
    return model.replicas * (placement.memory_fraction or 1.0) > 1


def split_arguments(text: str) -> list[str]:
    """Engine arguments as a shell would split them."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise RefusedError(
            f"The engine arguments cannot be read: {error}.", advice="Close the quotation."
        ) from error


def default_placement(
    gpu_uuids: Sequence[GpuUuid], models: Sequence[Model]
) -> CpuPlacement | GpuPlacement:
    """The first GPU that no model has, else the first GPU; the CPU where there is none."""
    taken = {
        gpu
        for model in models
        if isinstance(model.placement, GpuPlacement)
        for gpu in model.placement.gpu_uuids
    }
    free = [gpu for gpu in gpu_uuids if gpu not in taken]
    chosen = (free or list(gpu_uuids))[:1]
    return GpuPlacement(gpu_uuids=tuple(chosen)) if chosen else CpuPlacement()


def engine_image(model: Model, images: Images) -> str:
    """The image of a model, first that applies: its own, vLLM-Omni's, vLLM's for its device."""
    if model.image is not None:
        return model.image
    if model.type in {"text-to-speech", "image"}:
        return images.vllm_omni
    return images.vllm_cpu if isinstance(model.placement, CpuPlacement) else images.vllm


MODEL_MOUNT: Final = "/model"
CACHE_MOUNT: Final = "/root/.cache/huggingface"


def render_engines(state: State, model: Model, site: Site) -> tuple[ContainerSpec, ...]:
    """The engine containers of one model, one per replica."""
    gpu_uuids = model.placement.gpu_uuids if isinstance(model.placement, GpuPlacement) else ()
    return tuple(
        ContainerSpec(
            name=name,
            role="engine",
            image=engine_image(model, state.images),
            network=network_name(state),
            # Official images differ in entrypoint (vLLM-Omni's has none): always name both.
            entrypoint=("vllm",),
            command=engine_command(model),
            environment=engine_environment(state, model),
            mounts=(_weights_mount(model, site),),
            labels={
                LABEL_MODEL_NAME: model.name,
                LABEL_MODEL_TYPE: model.type,
                LABEL_SERVED_NAME: model.served_model_name,
            },
            gpu_uuids=gpu_uuids,
            # vLLM refuses Docker's 64 MiB; tensor parallelism shares tensors through it.
            shm_mib=8192 if gpu_uuids else 1024,
            # Docker would start it before MIG slices exist, and vLLM exits 0 when it dies.
            restart="no",
            start_seconds=ENGINE_START_SECONDS,
            readiness=EngineAnswers(
                model_type=model.type,
                served_model_name=model.served_model_name,
                engine_key=state.secrets.engine_key,
            ),
        )
        for name in replica_names(state, model)
    )


def engine_command(model: Model) -> tuple[str, ...]:
    """What follows `vllm`, complete and in a fixed order."""
    source = model.source
    revision = source.revision if isinstance(source, HubSource) else None
    return (
        "serve",
        source.repository if isinstance(source, HubSource) else MODEL_MOUNT,
        *(("--revision", revision) if revision else ()),
        *("--served-model-name", model.served_model_name),
        *("--host", "0.0.0.0", "--port", str(ENGINE_PORT)),  # noqa: S104 - inside its container
        *_placement_arguments(model.placement),
        *(("--runner", "pooling") if model.type in {"embedding", "rerank"} else ()),
        *model.engine_arguments,
    )


def _placement_arguments(placement: CpuPlacement | GpuPlacement | MigPlacement) -> tuple[str, ...]:
    match placement:
        case CpuPlacement(kv_cache_mib=mib):
            return ("--kv-cache-memory-bytes", str(mib * 1024 * 1024))
        case GpuPlacement(gpu_uuids=gpus, memory_fraction=fraction):
            parallel = ("--tensor-parallel-size", str(len(gpus))) if len(gpus) > 1 else ()
            budget = () if fraction is None else ("--gpu-memory-utilization", str(fraction))
            return (*parallel, *budget)
        case MigPlacement():
            return ()
        case _:
            assert_never(placement)


def engine_environment(state: State, model: Model) -> dict[str, str | pydantic.SecretStr]:
    """No telemetry, and the hub only where weights come from it."""
    environment: dict[str, str | pydantic.SecretStr] = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        # Any local user reaches the bridge: without a key they would get round keys and limits.
        "VLLM_API_KEY": state.secrets.engine_key,
    }
    if isinstance(model.placement, CpuPlacement):
        # vLLM (0.30) pins every engine of a server to the same first cores: on 2 of them a second
        # engine needed over 200 s to start beside a busy one, and 57 s without the pins.
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    if isinstance(model.source, LocalSource):
        return environment | {"HF_HUB_OFFLINE": "1"}
    if state.secrets.hugging_face_token is not None:
        environment["HF_TOKEN"] = state.secrets.hugging_face_token
    return environment


def _weights_mount(model: Model, site: Site) -> Mount:
    if isinstance(model.source, LocalSource):
        return Mount(source=model.source.path, target=MODEL_MOUNT)
    return Mount(source=site.hugging_face_home, target=CACHE_MOUNT, read_only=False)


# A 28 by 28 white PNG: the smallest image that patch-based vision models take.
_WHITE_PNG: Final = (
    "iVBORw0KGgoAAAANSUhEUgAAABwAAAAcCAIAAAD9b0jDAAAAIklEQVR42mP4TwPAMGroqKGjho4aOmroqKGjho4a"
    "OjIMBQDyYCdYB5gw6gAAAABJRU5ErkJggg=="
)


def readiness_request(model_type: ModelType, served_model_name: str) -> tuple[str, Json]:
    """Path and body of the smallest real request of a kind."""
    question: Json = {"role": "user", "content": "Say yes."}
    generate = {"model": served_model_name, "max_tokens": 1, "temperature": 0}
    match model_type:
        case "chat":
            return "/v1/chat/completions", generate | {"messages": [question]}
        case "vision":
            picture = {
                "type": "image_url",
                "image_url": {"url": f"data:image/png;base64,{_WHITE_PNG}"},
            }
            content = [{"type": "text", "text": "Say yes."}, picture]
            return "/v1/chat/completions", generate | {
                "messages": [{"role": "user", "content": content}]
            }
        case "embedding":
            return "/v1/embeddings", {"model": served_model_name, "input": "yes"}
        case "rerank":
            return "/v1/rerank", {
                "model": served_model_name, "query": "yes", "documents": ["yes", "no"],
            }  # fmt: skip
        case _:
            raise RefusedError(
                f"No readiness request is known for {model_type} models.",
                advice="This version cannot serve them.",
            )


# --- database, gateway, edge ---------------------------------------------------


def render_database(state: State) -> ContainerSpec:
    """PostgreSQL with LiteLLM's keys and usage; its volume outlives every container."""
    return ContainerSpec(
        name=database_name(state),
        role="database",
        image=state.images.postgres,
        network=network_name(state),
        environment={
            "POSTGRES_USER": "litellm",
            "POSTGRES_DB": "litellm",
            "POSTGRES_PASSWORD": state.secrets.database_password,
        },
        mounts=(
            Mount(
                source=f"{state.name_prefix}llm-postgres-data",
                target="/var/lib/postgresql/data",
                read_only=False,
            ),
        ),
        shm_mib=256,
        # Over TCP: while the first start initialises, the server listens on its socket only.
        healthcheck="pg_isready -q -h 127.0.0.1 -U litellm -d litellm",
        stop_seconds=120,
        start_seconds=DATABASE_START_SECONDS,
        readiness=DockerHealthy(),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """What the gateway routes: a public name and the replicas that answer to it."""

    served_model_name: str
    type: str
    replicas: tuple[ContainerName, ...]


def served_models(state: State, models: Sequence[Model]) -> tuple[ServedModel, ...]:
    """The models as they are once everything wished of them runs."""
    return tuple(
        ServedModel(
            served_model_name=model.served_model_name,
            type=model.type,
            replicas=replica_names(state, model),
        )
        for model in models
    )


def render_gateway(
    state: State, slot: Slot, served: Sequence[ServedModel], site: Site
) -> ContainerSpec:
    """LiteLLM in one of its two slots; a changed configuration is a new container."""
    database = database_name(state)
    password = state.secrets.database_password.get_secret_value()
    config = render_litellm_config(served)
    return ContainerSpec(
        name=gateway_name(state, slot),
        role="gateway",
        image=state.images.litellm,
        network=network_name(state),
        command=("--config", "/etc/litellm/config.yaml", "--port", str(GATEWAY_PORT)),
        environment={
            "LITELLM_MASTER_KEY": state.secrets.master_key,
            "LITELLM_SALT_KEY": state.secrets.salt_key,
            "ENGINE_API_KEY": state.secrets.engine_key,
            "DATABASE_URL": pydantic.SecretStr(
                f"postgresql://litellm:{password}@{database}:5432/litellm"
            ),
            "LITELLM_MODE": "PRODUCTION",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "LITELLM_OFFLINE_MODE": "true",
            "DISABLE_ADMIN_UI": "True",
            "NO_DOCS": "True",
            "NO_REDOC": "True",
            # With the default transport a killed engine makes one request hang its whole timeout.
            "DISABLE_AIOHTTP_TRANSPORT": "True",
        },
        mounts=(Mount(source=f"{site.generated}/litellm-{slot}", target="/etc/litellm"),),
        stop_seconds=DRAIN_SECONDS,
        content_hash=sha256(config.encode()).hexdigest()[:16],
        start_seconds=GATEWAY_START_SECONDS,
        readiness=GatewayServes(
            model_names=tuple(sorted(model.served_model_name for model in served)),
            master_key=state.secrets.master_key,
        ),
    )


def render_litellm_config(served: Sequence[ServedModel]) -> str:
    """LiteLLM's `config.yaml`: one entry per replica; no secret, no content logging."""
    config = {
        "model_list": [
            entry
            for model in sorted(served, key=lambda model: model.served_model_name)
            for entry in _model_entries(model)
        ],
        "router_settings": {
            "routing_strategy": "least-busy",
            # allowed_fails 1 would retry the same bad replica and then leave the group.
            "allowed_fails": 0,
            "num_retries": 2,
            "cooldown_time": 10,
            "timeout": 600,
        },
        "litellm_settings": {
            "turn_off_message_logging": True,
            "redact_messages_in_exceptions": True,
            # Without it a client's "no-log" removes its accounting row.
            "global_disable_no_log_param": True,
            "drop_params": True,
            "request_timeout": 600,
            "telemetry": False,
        },
        "general_settings": {
            "master_key": "os.environ/LITELLM_MASTER_KEY",
            "store_prompts_in_spend_logs": False,
            "disable_error_logs": True,
            "disable_requester_ip_address_logging": True,
        },
    }
    return GENERATED_BANNER + yaml.dump(config, Dumper=YAML_DUMPER, sort_keys=False)


# libyaml's dumper writes the same text six times faster; 200 models are a real size.
YAML_DUMPER: Final = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def _model_entries(model: ServedModel) -> list[Json]:
    modes = {"embedding": {"mode": "embedding"}, "rerank": {"mode": "rerank"}}
    return [
        {
            "model_name": model.served_model_name,
            "litellm_params": {
                "model": f"hosted_vllm/{model.served_model_name}",
                "api_base": f"http://{replica}:{ENGINE_PORT}/v1",
                "api_key": "os.environ/ENGINE_API_KEY",
            },
            "model_info": {"id": str(replica), **modes.get(model.type, {"mode": "chat"})},
        }
        for replica in model.replicas
    ]


def render_edge(state: State, site: Site) -> ContainerSpec:
    """Caddy: the only container with published ports."""
    edge = state.edge
    certificates: tuple[Mount, ...] = ()
    if isinstance(edge.tls, OwnCertificate):
        certificates = (
            Mount(source=str(PurePath(edge.tls.certificate_path).parent), target="/certificate"),
            Mount(source=str(PurePath(edge.tls.key_path).parent), target="/certificate-key"),
        )
    return ContainerSpec(
        name=edge_name(state),
        role="edge",
        image=state.images.caddy,
        network=network_name(state),
        command=("caddy", "run", "--config", "/etc/caddy/Caddyfile", "--adapter", "caddyfile"),
        mounts=(
            # The directory, not the file: a mounted file keeps its old inode after a replace.
            Mount(source=f"{site.generated}/caddy", target="/etc/caddy"),
            Mount(source=f"{state.name_prefix}llm-caddy-data", target="/data", read_only=False),
            *certificates,
        ),
        ports=(
            PublishedPort(address=edge.address, host_port=edge.https_port, container_port=443),
            PublishedPort(address=edge.address, host_port=edge.http_port, container_port=80),
        ),
        drop_capabilities=True,
        stop_seconds=DRAIN_SECONDS,
        start_seconds=EDGE_START_SECONDS,
        readiness=EdgeAnswers(),
    )


def render_caddyfile(state: State, slot: Slot) -> str:
    """The whole edge: HTTPS in front of one gateway slot, and 404 for all else.

    Its health path answers `ok SLOT HASH`, so that a look tells what Caddy has really loaded.
    """
    text = "\n".join(_caddyfile_lines(state, slot)) + "\n"
    return GENERATED_BANNER + text.replace(_HASH_MARK, sha256(text.encode()).hexdigest()[:12])


_HASH_MARK: Final = "CADDYFILE-HASH"


def caddyfile_hash(text: str) -> str:
    """The hash that a rendered Caddyfile carries."""
    found = re.search(r"ok [ab] ([0-9a-f]{12})", text)
    return found[1] if found else ""


def _caddyfile_lines(state: State, slot: Slot) -> list[str]:
    edge = state.edge
    health = [f"handle {HEALTH_PATH} {{", f'\trespond "ok {slot} {_HASH_MARK}" 200', "}"]
    https = "" if edge.https_port == 443 else f":{edge.https_port}"  # noqa: PLR2004 - HTTPS
    return [
        "{",
        "\tpersist_config off",
        "\tskip_install_trust",
        "\tauto_https disable_redirects",
        f"\tdefault_sni {_quote(edge.hostnames[0])}",
        f"\tgrace_period {DRAIN_SECONDS}s",
        *_acme_options(edge.tls),
        "\tservers {",
        "\t\ttimeouts {",
        "\t\t\tread_header 10s",
        "\t\t}",
        "\t}",
        "}",
        "",
        "http:// {",
        *(f"\t{line}" for line in health),
        "\thandle {",
        f"\t\tredir https://{{host}}{https}{{uri}} 308",
        "\t}",
        "}",
        "",
        " ".join(f"https://{name}" for name in edge.hostnames) + " {",
        *(f"\t{line}" for line in _tls_lines(edge.tls)),
        "\theader {",
        "\t\tX-Content-Type-Options nosniff",
        "\t\tStrict-Transport-Security max-age=31536000",
        "\t\t-Server",
        "\t}",
        # Caddy cleans a path for matching only and forwards it raw: /key/../v1/x would arrive.
        "\t@crooked expression `{uri}.matches('(?i)^[^?]*(\\\\.\\\\.|%2e|%2f|%5c|//)')`",
        "\thandle @crooked {",
        "\t\trespond 400",
        "\t}",
        *(f"\t{line}" for line in health),
        "\thandle /v1/* {",
        f"\t\treverse_proxy {gateway_name(state, slot)}:{GATEWAY_PORT} {{",
        "\t\t\ttransport http {",
        # uvicorn closes an idle connection after 5 s; reusing it later would be a 502.
        "\t\t\t\tkeepalive 4s",
        "\t\t\t}",
        "\t\t}",
        "\t}",
        "\thandle {",
        "\t\trespond 404",
        "\t}",
        "}",
    ]


def _acme_options(tls: InternalTls | OwnCertificate | AcmeTls) -> list[str]:
    if not isinstance(tls, AcmeTls):
        return []
    directory = [f"\tacme_ca {_quote(tls.directory_url)}"] if tls.directory_url else []
    return [f"\temail {_quote(tls.email)}", *directory]


def _tls_lines(tls: InternalTls | OwnCertificate | AcmeTls) -> list[str]:
    match tls:
        case InternalTls():
            return ["tls internal"]
        case OwnCertificate(certificate_path=certificate, key_path=key):
            chain, private = PurePath(certificate).name, PurePath(key).name
            return [
                f"tls {_quote(f'/certificate/{chain}')} {_quote(f'/certificate-key/{private}')}"
            ]
        case AcmeTls():
            return []
        case _:
            assert_never(tls)


def _quote(text: str) -> str:
    """One Caddyfile token: no quote, brace or line break can come out of it."""
    if re.search(r'["\\{}\x00-\x1f]', text):
        raise RefusedError(f"{text!r} cannot stand in a Caddyfile.", advice="Use plain characters.")
    return f'"{text}"'


def render_unit(template: str, *, python: str, program: str, home: str) -> str:
    """The systemd unit for this program and home, from the `llm-manager.service` beside it."""
    return (
        template.replace("/opt/llm-manager/.venv/bin/python", python)
        .replace("/opt/llm-manager/llm_manager.py", program)
        .replace("/opt/llm-manager", str(PurePath(program).parent))
        .replace("/var/lib/llm-manager", home)
    )


# =============================================================================
# §5 Planning — pure: desired + observed -> Plan
# =============================================================================


@dataclass(frozen=True, kw_only=True, slots=True)
class ObservedContainer:
    """What was seen of one of our containers; `ready` is None where nobody could ask."""

    name: ContainerName
    role: str
    spec_hash: SpecHash
    running: bool
    ready: bool | None = None
    address: str | None = None
    image: str = ""
    exit_code: int | None = None
    started_at: datetime | None = None
    model_name: str | None = None
    model_type: str | None = None
    served_model_name: str | None = None
    docker_health: str | None = None


@dataclass(frozen=True, slots=True)
class LoadedCaddyfile:
    """What the running Caddy says it serves: more than the file on the disk can tell."""

    slot: Slot
    config_hash: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Observed:
    """One look at the world; only what carries our labels is in it."""

    containers: Mapping[ContainerName, ObservedContainer] = field(default_factory=dict)
    images: frozenset[str] = frozenset()
    networks: frozenset[str] = frozenset()
    volumes: frozenset[str] = frozenset()
    files: Mapping[str, str] = field(default_factory=dict)
    edge: LoadedCaddyfile | None = None
    taken_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class PullImage:
    image: str
    cause: str


@dataclass(frozen=True, slots=True)
class CreateNetwork:
    name: str
    cause: str


@dataclass(frozen=True, slots=True)
class CreateVolume:
    name: str
    cause: str


@dataclass(frozen=True, slots=True)
class WriteFile:
    """A generated file, by its path under `generated/`; `before` is None where it is new."""

    path: str
    text: str
    before: str | None
    cause: str


@dataclass(frozen=True, slots=True)
class LoadCaddyfile:
    """Have Caddy check the text, write it, and reload Caddy where it runs."""

    spec: ContainerSpec
    text: str
    before: str | None
    reload: bool
    cause: str


@dataclass(frozen=True, slots=True)
class SetAside:
    """Stop a container and keep it under another name, so it can come back."""

    name: ContainerName
    stop_seconds: int
    cause: str


@dataclass(frozen=True, slots=True)
class BringBack:
    """Give a set-aside container its name again and start it."""

    name: ContainerName
    cause: str


@dataclass(frozen=True, slots=True)
class CreateContainer:
    spec: ContainerSpec
    cause: str


@dataclass(frozen=True, slots=True)
class StartContainer:
    name: ContainerName
    cause: str


@dataclass(frozen=True, slots=True)
class StopContainer:
    name: ContainerName
    stop_seconds: int
    cause: str


@dataclass(frozen=True, slots=True)
class WaitReady:
    spec: ContainerSpec
    cause: str


@dataclass(frozen=True, slots=True)
class Pause:
    seconds: float
    cause: str


@dataclass(frozen=True, slots=True)
class Discard:
    """Stop and remove a container, for good; its volumes stay."""

    name: ContainerName
    stop_seconds: int
    cause: str


Step = (
    PullImage
    | CreateNetwork
    | CreateVolume
    | WriteFile
    | LoadCaddyfile
    | SetAside
    | BringBack
    | CreateContainer
    | StartContainer
    | StopContainer
    | WaitReady
    | Pause
    | Discard
)


def describe(step: Step) -> str:  # noqa: C901, PLR0911, PLR0912 - one line per kind of step
    """One line for the log, the preview and the tests."""
    match step:
        case PullImage(image, cause):
            return f"pull image {image}: {cause}"
        case CreateNetwork(name, cause):
            return f"create network {name}: {cause}"
        case CreateVolume(name, cause):
            return f"create volume {name}: {cause}"
        case WriteFile(path, _, _, cause):
            return f"write {path}: {cause}"
        case LoadCaddyfile(_, _, _, reload, cause):
            return f"check and {'load' if reload else 'write'} caddy/Caddyfile: {cause}"
        case SetAside(name, _, cause):
            return f"set aside {name}: {cause}"
        case BringBack(name, cause):
            return f"bring back {name}: {cause}"
        case CreateContainer(spec, cause):
            return f"create {spec.name} from {spec.image}: {cause}"
        case StartContainer(name, cause):
            return f"start {name}: {cause}"
        case StopContainer(name, _, cause):
            return f"stop {name}: {cause}"
        case WaitReady(spec, cause):
            return f"wait until {spec.name} is ready: {cause}"
        case Pause(seconds, cause):
            return f"pause {seconds:g} s: {cause}"
        case Discard(name, _, cause):
            return f"discard {name}: {cause}"
        case _:
            assert_never(step)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """Steps that succeed or are undone together; `resources` may be used by one at a time."""

    title: str
    steps: tuple[Step, ...]
    resources: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Stages in the order of design §5; an empty plan means nothing to do."""

    foundation: Stage
    database: Stage
    models: tuple[Stage, ...]
    endpoint: Stage
    retirement: Stage
    interrupted: tuple[ModelName, ...] = ()

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Those that have something to do."""
        every = (self.foundation, self.database, *self.models, self.endpoint, self.retirement)
        return tuple(stage for stage in every if stage.steps)

    def __bool__(self) -> bool:
        return bool(self.stages)

    def __str__(self) -> str:
        lines = [
            line
            for stage in self.stages
            for line in (f"{stage.title}:", *(f"  {describe(step)}" for step in stage.steps))
        ]
        if self.interrupted:
            names = ", ".join(self.interrupted)
            lines.append(f"Interrupted until its new container is ready, or for good: {names}.")
        return "\n".join(lines)

    def diff(self) -> str:
        """What changes in the generated files; they hold no secrets."""
        steps = [step for stage in self.stages for step in stage.steps]
        return "".join(
            _unified(path, before, text)
            for path, before, text in (
                (step.path, step.before, step.text)
                if isinstance(step, WriteFile)
                else (CADDYFILE, step.before, step.text)
                for step in steps
                if isinstance(step, WriteFile | LoadCaddyfile)
            )
        )


def _unified(path: str, before: str | None, after: str) -> str:
    old, new = (before or "").splitlines(keepends=True), after.splitlines(keepends=True)
    return "".join(difflib.unified_diff(old, new, f"generated/{path}", f"generated/{path} (new)"))


def aside(name: ContainerName) -> ContainerName:
    return ContainerName(name + ASIDE)


def plan_state(
    state: State,
    observed: Observed,
    site: Site,
    *,
    only: ModelName | None = None,
    restart: ModelName | None = None,
) -> Plan:
    """Compare what is wished with what is; decide everything, do nothing.

    `only` leaves every other model as it is, `restart` replaces a model that needs no change.
    The endpoint's stage assumes that the models' stages succeed; `plan_endpoint` after they ran
    says what is true then.
    """
    in_scope = [m for m in state.wished_models if only in {None, m.name}]
    models = tuple(
        _plan_model(state, m, observed, site, "a restart was asked for" * (m.name == restart))
        for m in in_scope
    )
    endpoint, kept = plan_endpoint(state, observed, site, assumed=tuple(in_scope))
    retirement = plan_retirement(state, observed, kept, only)
    return Plan(
        foundation=_plan_foundation(state, observed),
        database=_plan_database(state, observed),
        models=models,
        endpoint=endpoint,
        retirement=retirement,
        interrupted=_interrupted((*models, endpoint, retirement), observed),
    )


def _plan_foundation(state: State, observed: Observed) -> Stage:
    steps: list[Step] = []
    network = network_name(state)
    if network not in observed.networks and (state.endpoint == "running" or state.wished_models):
        steps.append(CreateNetwork(network, "the containers' own bridge"))
    if state.endpoint == "running":
        steps += [
            CreateVolume(volume, "what must outlive containers")
            for volume in volume_names(state)
            if volume not in observed.volumes
        ]
    return Stage(title="foundation", steps=tuple(steps))


def _plan_database(state: State, observed: Observed) -> Stage:
    wished = state.endpoint == "running"
    steps = plan_container(render_database(state), observed).whole if wished else ()
    return Stage(title="database", steps=steps)


def _plan_model(
    state: State, model: Model, observed: Observed, site: Site, restart_cause: str
) -> Stage:
    placement = model.placement
    resources = placement.gpu_uuids if isinstance(placement, GpuPlacement) else ("cpu",)
    replacements = [
        plan_container(spec, observed, restart_cause) for spec in render_engines(state, model, site)
    ]
    # What cannot be undone comes last: a later replica may fail, and then all come back.
    steps = [step for replacement in replacements for step in replacement.steps]
    farewell = [step for replacement in replacements for step in replacement.farewell]
    return Stage(
        title=f"model {model.name}", steps=(*steps, *farewell), resources=frozenset(resources)
    )


@dataclass(frozen=True, slots=True)
class Replacement:
    """What puts one container in place, and what may go once all of its stage succeeded."""

    steps: tuple[Step, ...]
    farewell: tuple[Step, ...] = ()

    @property
    def whole(self) -> tuple[Step, ...]:
        return (*self.steps, *self.farewell)


def plan_container(
    wanted: ContainerSpec, observed: Observed, restart_cause: str = ""
) -> Replacement:
    """One container in place: the old one is set aside, and removed only after the new is ready."""
    seen = observed.containers.get(wanted.name)
    left = observed.containers.get(aside(wanted.name))
    drop_left: tuple[Step, ...] = ()
    if left is not None:
        drop_left = (Discard(left.name, wanted.stop_seconds, "left by an interrupted change"),)
    pull = _pull_if_absent(wanted, observed)
    if left is not None and left.spec_hash == wanted.hash and _may_go(seen, wanted):
        drop: tuple[Step, ...] = ()
        if seen is not None:
            drop = (Discard(seen.name, wanted.stop_seconds, "the one set aside is wanted"),)
        back = BringBack(wanted.name, "an interrupted change set it aside")
        return Replacement((*drop, back, WaitReady(wanted, "it starts")))
    if seen is None:
        return Replacement((*pull, *_create(wanted, "not there")), drop_left)
    stale = "its settings changed" if seen.spec_hash != wanted.hash else restart_cause
    if not stale and _hangs(wanted, seen, observed.taken_at):
        stale = "it runs, but has not answered for longer than it may take to start"
    if stale:
        away = SetAside(wanted.name, wanted.stop_seconds, stale)
        drop_old = Discard(aside(wanted.name), wanted.stop_seconds, stale)
        return Replacement((*drop_left, *pull, away, *_create(wanted, stale)), (drop_old,))
    if not seen.running:
        cause = "it stopped" if seen.exit_code is None else f"it ended with {seen.exit_code}"
        start = StartContainer(wanted.name, cause)
        return Replacement((start, WaitReady(wanted, "it starts")), drop_left)
    wait: tuple[Step, ...] = () if seen.ready else (WaitReady(wanted, "it does not answer yet"),)
    return Replacement(wait, drop_left)


def _may_go(seen: ObservedContainer | None, wanted: ContainerSpec) -> bool:
    """Whether a container can make way for one set aside; a database is never the one to go."""
    return seen is None or (seen.spec_hash != wanted.hash and wanted.role != "database")


def _hangs(wanted: ContainerSpec, seen: ObservedContainer, now: datetime | None) -> bool:
    if not seen.running or seen.ready or seen.started_at is None or now is None:
        return False
    return (now - seen.started_at).total_seconds() > wanted.start_seconds


def _pull_if_absent(wanted: ContainerSpec, observed: Observed) -> tuple[Step, ...]:
    """A step of its own, before anything is stopped for it."""
    if wanted.image in observed.images:
        return ()
    return (PullImage(wanted.image, "not on this server"),)


def _create(wanted: ContainerSpec, cause: str) -> list[Step]:
    return [CreateContainer(wanted, cause), WaitReady(wanted, "it starts")]


def plan_endpoint(
    state: State, observed: Observed, site: Site, *, assumed: Sequence[Model] = ()
) -> tuple[Stage, frozenset[ContainerName]]:
    """Gateway and edge for what is routable, and the containers of both that stay.

    Routable: `assumed`, or running and either ready or routed already. A busy engine that
    misses one health check must not lose its route.
    """
    if state.endpoint == "stopped":
        return Stage(title="endpoint", steps=()), frozenset()
    routed = routed_replicas(state, observed)
    served = [
        entry
        for model in state.wished_models
        for entry in (
            served_models(state, [model])
            if model in assumed
            else _serving_now(state, model, observed, routed)
        )
    ]
    slot, gateway_steps = _plan_gateway(state, served, observed, site)
    steps = (*gateway_steps, *_plan_edge(state, slot, observed, site))
    kept = frozenset({gateway_name(state, slot), edge_name(state)})
    return Stage(title="endpoint", steps=steps), kept


def _serving_now(
    state: State, model: Model, observed: Observed, routed: frozenset[str]
) -> list[ServedModel]:
    """A model as its replicas serve it, which a saved but unapplied wish must not change."""
    seen = [observed.containers.get(name) for name in replica_names(state, model)]
    able = [c for c in seen if c and c.running and (c.ready or c.name in routed)]
    by_name: dict[str, list[ObservedContainer]] = {}
    for container in able:
        name = container.served_model_name or model.served_model_name
        by_name.setdefault(name, []).append(container)
    return [
        ServedModel(
            served_model_name=name,
            type=containers[0].model_type or model.type,
            replicas=tuple(c.name for c in containers),
        )
        for name, containers in by_name.items()
    ]


def routed_replicas(state: State, observed: Observed) -> frozenset[str]:
    """The replicas that the serving gateway's configuration names."""
    slot = serving_slot(observed)
    if slot is None or gateway_name(state, slot) not in observed.containers:
        return frozenset()
    text = observed.files.get(f"litellm-{slot}/config.yaml", "")
    # Its own words, read back line by line: a damaged file names nobody, and is written anew.
    return frozenset(re.findall(r"^    id: (\S+)$", text, re.MULTILINE))


def serving_slot(observed: Observed) -> Slot | None:
    """What the running Caddy says; where it misses one look, what it was last told."""
    if observed.edge is not None:
        return observed.edge.slot
    match re.search(r"ok ([ab]) ", observed.files.get(CADDYFILE, "")):
        case None:
            return None
        case found:
            return "a" if found[1] == "a" else "b"


def _plan_gateway(
    state: State, served: Sequence[ServedModel], observed: Observed, site: Site
) -> tuple[Slot, list[Step]]:
    """The slot that shall serve, and how it gets there while the other goes on serving."""
    text = render_litellm_config(served)
    serving = serving_slot(observed)
    wanted = {slot: render_gateway(state, slot, served, site) for slot in SLOTS}
    slot = _right_slot(wanted, observed, serving)
    write = _write(f"litellm-{slot}/config.yaml", text, observed, "what is routed changed")
    seen = observed.containers.get(wanted[slot].name)
    if seen is not None and seen.spec_hash == wanted[slot].hash:
        return slot, [*write, *plan_container(wanted[slot], observed).whole]
    clear: list[Step] = []
    if seen is not None:
        clear = [
            Discard(seen.name, wanted[slot].stop_seconds, "it holds an older configuration"),
            Pause(SLOT_PAUSE_SECONDS, "the same slot starts again"),
        ]
    cause = "what is routed changed" if serving else "not there"
    pull = _pull_if_absent(wanted[slot], observed)
    return slot, [*pull, *clear, *write, *_create(wanted[slot], cause)]


def _right_slot(
    wanted: Mapping[Slot, ContainerSpec], observed: Observed, serving: Slot | None
) -> Slot:
    """A slot that already holds the wanted configuration, else the one that does not serve."""
    order: tuple[Slot, ...] = SLOTS if serving in {None, "a"} else ("b", "a")
    for slot in order:
        seen = observed.containers.get(wanted[slot].name)
        if seen is not None and seen.spec_hash == wanted[slot].hash:
            return slot
    return "b" if serving == "a" else "a"


def _plan_edge(state: State, slot: Slot, observed: Observed, site: Site) -> list[Step]:
    wanted, text = render_edge(state, site), render_caddyfile(state, slot)
    seen = observed.containers.get(wanted.name)
    before = observed.files.get(CADDYFILE)
    steps = list(plan_container(wanted, observed).whole)
    if seen is not None and seen.running and seen.spec_hash == wanted.hash:
        if observed.edge == LoadedCaddyfile(slot, caddyfile_hash(text)):
            return steps
        return [_load(wanted, text, before, reload=True), *steps]
    if before == text:
        return steps
    pulls = [step for step in steps if isinstance(step, PullImage)]
    others = [step for step in steps if not isinstance(step, PullImage)]
    return [*pulls, _load(wanted, text, before, reload=False), *others]


def _load(spec: ContainerSpec, text: str, before: str | None, *, reload: bool) -> LoadCaddyfile:
    cause = "what is served changed"
    return LoadCaddyfile(spec=spec, text=text, before=before, reload=reload, cause=cause)


def _write(path: str, text: str, observed: Observed, cause: str) -> list[Step]:
    before = observed.files.get(path)
    return [] if before == text else [WriteFile(path, text, before, cause)]


def plan_retirement(
    state: State, observed: Observed, kept: frozenset[ContainerName] | None, only: ModelName | None
) -> Stage:
    """What nobody wants any more goes last, after no request can reach it.

    `kept` names the gateway and edge that serve; None where turning to them failed, and then
    only engines go: a stopped model must free its GPU even while the endpoint is broken.
    """
    wanted = {*(kept or ())}
    if state.endpoint == "running":
        wanted.add(database_name(state))
    wanted |= {name for m in state.wished_models for name in replica_names(state, m)}
    steps: list[Step] = []
    for name, seen in sorted(observed.containers.items()):
        base = ContainerName(name.removesuffix(ASIDE))
        if base in wanted or (kept is None and seen.role != "engine"):
            continue
        if seen.model_name is not None and only not in {None, seen.model_name}:
            continue
        if seen.role == "database":
            # Data depend on it: it is stopped, never removed.
            steps += [StopContainer(name, 120, "the endpoint is stopped")] * seen.running
        elif seen.role == "gateway" and seen.running:
            steps += [
                Pause(SLOT_PAUSE_SECONDS, "the edge has just turned to the other slot"),
                Discard(name, DRAIN_SECONDS, "drained: its last requests finish first"),
            ]
        else:
            steps.append(Discard(name, 30, "no longer wanted"))
    return Stage(title="retirement", steps=tuple(steps))


def _interrupted(stages: Sequence[Stage], observed: Observed) -> tuple[ModelName, ...]:
    stopped = {
        step.name
        for stage in stages
        for step in stage.steps
        if isinstance(step, SetAside | StopContainer | Discard)
    }
    roles = {c.role for c in observed.containers.values() if c.name in stopped and c.running}
    names = {
        ModelName(seen.model_name)
        for seen in observed.containers.values()
        # Without the edge nobody is reached.
        if seen.model_name is not None
        and seen.running
        and (seen.name in stopped or "edge" in roles)
    }
    return tuple(sorted(names))


def lanes(stages: Sequence[Stage]) -> list[list[Stage]]:
    """Stages that share a resource go into one lane, in order; lanes may run side by side."""
    result: list[tuple[frozenset[str], list[Stage]]] = []
    for stage in stages:
        touching = [lane for lane in result if lane[0] & stage.resources]
        apart = [lane for lane in result if not lane[0] & stage.resources]
        resources = stage.resources.union(*(lane[0] for lane in touching))
        members = [member for lane in touching for member in lane[1]]
        result = [*apart, (resources, [*members, stage])]
    return [members for _, members in result]


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """What the operator asks for: an edit of the state, and how far acting on it reaches."""

    title: str
    edit: Callable[[State], State]
    only: ModelName | None = None
    restart: ModelName | None = None
    hint: str = ""  # what the operator does next


def deploying(name: str) -> Change:
    def edit(state: State) -> State:
        model = replace(state.model(name), wish="running")
        return replace(state.with_model(model), endpoint="running")

    hint = "Next: a key for a colleague, in the tab Keys."
    return Change(title=f"Deploy {name}", edit=edit, only=ModelName(name), hint=hint)


def stopping(name: str) -> Change:
    def edit(state: State) -> State:
        return state.with_model(replace(state.model(name), wish="stopped"))

    return Change(title=f"Stop {name}", edit=edit, only=ModelName(name))


def restarting(name: str) -> Change:
    def edit(state: State) -> State:
        if state.model(name).wish == "stopped":
            raise RefusedError(f"{name} is stopped.", advice="Deploy it instead.")
        return state

    wanted = ModelName(name)
    return Change(title=f"Restart {name}", edit=edit, only=wanted, restart=wanted)


def removing(name: str) -> Change:
    def edit(state: State) -> State:
        gone = state.model(name)
        return replace(state, models=tuple(m for m in state.models if m is not gone))

    return Change(title=f"Remove {name}", edit=edit, only=ModelName(name))


def registering(model: Model) -> Change:
    def edit(state: State) -> State:
        if any(known.name == model.name for known in state.models):
            raise RefusedError(
                f"There is a model called {model.name} already.",
                advice="Choose another name, or change that one with `model set`.",
            )
        return state.with_model(model)

    return Change(title=f"Register {model.name}", edit=edit)


def revising(name: str, changes: Json, options: EngineOptions) -> Change:
    """Some settings of a registered model, merged into what it is when the change is made."""

    def edit(state: State) -> State:
        raw = asdict(state.model(name)) | changes
        return state.with_model(parse_model(raw, state.images, options))

    return Change(title=f"Change {name}", edit=edit)


def configuring_edge(changes: Json) -> Change:
    def edit(state: State) -> State:
        return replace(state, edge=parse_edge(asdict(state.edge) | changes))

    return Change(title="Change HTTPS", edit=edit)


def setting_hub_token(token: str) -> Change:
    """For gated repositories; an empty token forgets it."""
    secret = pydantic.SecretStr(token) if token else None

    def edit(state: State) -> State:
        return replace(state, secrets=replace(state.secrets, hugging_face_token=secret))

    return Change(title="Set the Hugging Face token", edit=edit)


def pinning_image(role: str, image: str) -> Change:
    def edit(state: State) -> State:
        return replace(state, images=parse_images(asdict(state.images) | {role: image}))

    return Change(title=f"Pin the {role} image", edit=edit)


def returning_to(number: int, earlier: State) -> Change:
    return Change(title=f"Roll back to version {number}", edit=lambda _: earlier)


def applying() -> Change:
    """Do whatever is planned."""
    return Change(title="Apply the plan", edit=lambda state: state)


def restoring() -> Change:
    """The same machinery after a reboot: everything wished comes back."""
    return Change(title="Restore", edit=lambda state: state)


# =============================================================================
# §6 Views — pure: what the operator reads
# =============================================================================

Phase = Literal["stopped", "pending", "starting", "ready", "failed", "stopping"]


@dataclass(frozen=True, kw_only=True, slots=True)
class JobView:
    """A job as seen from outside, at one moment."""

    id: str
    title: str
    started_at: datetime
    finished_at: datetime | None
    lines: tuple[str, ...]
    fault: str | None
    hint: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """All that a page shows, taken once for every open tab."""

    taken_at: datetime
    state: State | None
    observed: Observed | None
    plan: Plan | None
    faults: tuple[ManagerError, ...] = ()
    jobs: tuple[JobView, ...] = ()

    @property
    def state_has_models(self) -> bool:
        return self.state is not None and bool(self.state.models)


def phase_of(state: State, model: Model, observed: Observed, busy: bool) -> Phase:
    """Where a model stands, in the words of the console; `busy`: a job is changing things."""
    seen = [observed.containers.get(name) for name in replica_names(state, model)]
    present = [container for container in seen if container is not None]
    if model.wish == "stopped":
        return "stopping" if present else "stopped"
    if len(present) == model.replicas and all(c.running and c.ready for c in present):
        return "ready"
    if any(c.running for c in present):
        return "starting"
    return "pending" if busy else "failed"


MODEL_HEADERS: Final = ("Name", "Type", "Phase", "Served as", "Source", "Placement", "Since")


def model_rows(snapshot: Snapshot) -> list[list[str]]:
    """One row per registered model, in the order of registration."""
    state, observed = snapshot.state, snapshot.observed
    if state is None:
        return []
    busy = any(job.finished_at is None for job in snapshot.jobs)
    return [
        [
            model.name,
            model.type,
            phase_of(state, model, observed, busy) if observed else "unknown",
            model.served_model_name,
            format_source(model.source),
            format_placement(model.placement),
            _running_since(state, model, observed, snapshot.taken_at),
        ]
        for model in state.models
    ]


def _running_since(state: State, model: Model, observed: Observed | None, now: datetime) -> str:
    seen = [observed.containers.get(n) for n in replica_names(state, model)] if observed else []
    starts = [c.started_at for c in seen if c is not None and c.running and c.started_at]
    if not starts:
        return ""
    seconds = (now - min(starts)).total_seconds()
    # Whole minutes from the first on: a table that changes every second is sent every second.
    return format_duration(seconds - seconds % 60 if seconds >= 60 else seconds)  # noqa: PLR2004


def format_source(source: HubSource | LocalSource) -> str:
    match source:
        case HubSource(repository=repository, revision=revision):
            return f"{repository}@{revision}" if revision else repository
        case LocalSource(path=path):
            return path
        case _:
            assert_never(source)


def format_placement(placement: CpuPlacement | GpuPlacement | MigPlacement) -> str:
    match placement:
        case CpuPlacement(kv_cache_mib=mib):
            return f"CPU, {mib} MiB KV cache"
        case GpuPlacement(gpu_uuids=uuids):
            return ", ".join(gpu[:12] for gpu in uuids)
        case MigPlacement(profile=profile, start=start):
            return f"MIG {profile} at {start}"
        case _:
            assert_never(placement)


def format_duration(seconds: float) -> str:
    """Two units at most: 9 s, 3 min 20 s, 5 h 2 min, 4 d 3 h."""
    whole = int(max(seconds, 0))
    for unit, size, lesser, lesser_size in (
        ("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1),
    ):  # fmt: skip
        if whole >= size:
            rest = whole % size // lesser_size
            return f"{whole // size} {unit}" + (f" {rest} {lesser}" if rest else "")
    return f"{whole} s"


COMPONENT_HEADERS: Final = ("Container", "Part", "State", "Image")
_PARTS: Final = {
    "database": "PostgreSQL: keys and usage",
    "gateway": "LiteLLM: the OpenAI API",
    "edge": "Caddy: HTTPS",
    "engine": "engine",
}


def component_rows(snapshot: Snapshot) -> list[list[str]]:
    """One row per container of this installation."""
    containers = snapshot.observed.containers if snapshot.observed else {}
    return [
        [c.name, _PARTS.get(c.role, c.role), format_container(c), c.image]
        for _, c in sorted(containers.items())
    ]


def format_container(seen: ObservedContainer) -> str:
    if not seen.running:
        return "stopped" if seen.exit_code is None else f"ended with {seen.exit_code}"
    return "ready" if seen.ready else "running, not ready"


def base_url(edge: Edge) -> str:
    """What a colleague puts into a client as its base URL."""
    port = "" if edge.https_port == 443 else f":{edge.https_port}"  # noqa: PLR2004 - HTTPS
    return f"https://{edge.hostnames[0]}{port}/v1"


def curl_example(edge: Edge, served_model_name: str, key: str) -> str:
    """A request that a colleague can paste; Caddy's own authority needs `-k` or its root."""
    insecure = "-k " if isinstance(edge.tls, InternalTls) else ""
    body = {"model": served_model_name, "messages": [{"role": "user", "content": "Hello"}]}
    return (
        f"curl {insecure}{base_url(edge)}/chat/completions \\\n"
        f"  -H 'Authorization: Bearer {key}' \\\n"
        "  -H 'Content-Type: application/json' \\\n"
        f"  -d '{json.dumps(body)}'"
    )


@dataclass(frozen=True, slots=True)
class Attention:
    """One thing that needs the operator, and where to act."""

    text: str
    tab: str


def attention(snapshot: Snapshot) -> list[Attention]:
    """What needs the operator now; empty when all is well."""
    found = [Attention(str(fault), "System") for fault in snapshot.faults]
    state, observed = snapshot.state, snapshot.observed
    if state is None or observed is None:
        return found
    busy = any(job.finished_at is None for job in snapshot.jobs)
    failed = [m for m in state.models if phase_of(state, m, observed, busy) == "failed"]
    found += [
        Attention(
            f"{m.name} should run and does not. Read its log, then deploy it again.", "Models"
        )
        for m in failed
    ]
    if snapshot.plan and not busy:
        count = sum(len(stage.steps) for stage in snapshot.plan.stages)
        found.append(
            Attention(
                f"{count} steps away from what is wished. Review and apply the plan.", "System"
            )
        )
    return found


def next_step(snapshot: Snapshot) -> Attention | None:
    """What a newcomer does next, until the first model serves."""
    state, observed = snapshot.state, snapshot.observed
    if state is None or observed is None or snapshot.faults:
        return None
    if not state.models:
        return Attention("Register your first model.", "Models")
    if not state.wished_models:
        return Attention(f"Deploy {state.models[0].name}.", "Models")
    return None


def summary_line(snapshot: Snapshot) -> str:
    """The whole server in one line."""
    state, observed = snapshot.state, snapshot.observed
    if state is None:
        return "The state cannot be read."
    if observed is None:
        return "Docker does not answer."
    busy = any(job.finished_at is None for job in snapshot.jobs)
    phases = [phase_of(state, model, observed, busy) for model in state.models]
    ready = f"{phases.count('ready')} of {len(phases)} models ready"
    if state.endpoint == "stopped":
        return f"{ready}; the endpoint starts with the first deployment."
    edge = observed.containers.get(edge_name(state))
    answers = "answers" if edge is not None and edge.ready else "does not answer"
    return f"{ready}; {base_url(state.edge)} {answers}."


def last_error_line(log_text: str) -> str | None:
    """The engine's own cause: vLLM's last lines only point upwards to it."""
    pattern = re.compile(r"(?:\b\w*(?:Error|Exception)\b: .+|vllm: error: .+|error: .+)$")
    lines = [m[0] for line in log_text.splitlines() if (m := pattern.search(line.strip()))]
    pointers = ("Engine core initialization failed", "WorkerProc initialization failed")
    causes = [line for line in lines if not any(pointer in line for pointer in pointers)]
    return causes[-1][:400] if causes else None


def format_size(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:  # noqa: PLR2004
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


@dataclass
class PullProgress:
    """Docker's pull stream, summed over layers; at most one line per step of ten percent."""

    image: str
    layers: dict[str, tuple[int, int]] = field(default_factory=dict)
    shown: int = -1

    def line(self, event: Json) -> str | None:
        """The next line worth showing, if this event brings one."""
        detail = event.get("progressDetail") or {}
        if event.get("status") == "Downloading" and detail.get("total"):
            self.layers[event.get("id", "")] = (detail.get("current", 0), detail["total"])
        done = sum(current for current, _ in self.layers.values())
        total = sum(size for _, size in self.layers.values())
        tenth = done * 10 // total if total else -1
        if tenth <= self.shown:
            return None
        self.shown = tenth
        return f"  {self.image}: {format_size(done)} of {format_size(total)}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One thing the doctor looked at."""

    name: str
    ok: bool
    text: str
    advice: str = ""


def check_rows(checks: Sequence[Check]) -> list[list[str]]:
    return [
        [check.name, "ok" if check.ok else "not ok", check.text, "" if check.ok else check.advice]
        for check in checks
    ]


KEY_HEADERS: Final = ("For", "Key", "Models", "Expires", "Requests/min", "Tokens/min", "Created")


def key_rows(keys: Sequence[VirtualKey]) -> list[list[str]]:
    """One row per key; an empty limit is none."""
    return [
        [
            key.alias,
            key.hint,
            ", ".join(key.models) or "all",
            format_day(key.expires_at) or "never",
            str(key.rpm_limit or "no limit"),
            str(key.tpm_limit or "no limit"),
            format_day(key.created_at),
        ]
        for key in keys
    ]


def format_day(moment: datetime | None) -> str:
    return f"{moment:%Y-%m-%d}" if moment else ""


def hand_out(state: State, request: KeyRequest, secret: str) -> str:
    """All that a colleague needs, ready to paste; the only text that ever shows the secret."""
    names = request.models or tuple(model.served_model_name for model in state.models)
    example = curl_example(state.edge, (names or ("MODEL",))[0], secret)
    return f"API key:   {secret}\nBase URL:  {base_url(state.edge)}\n\n{example}"


def status_facts(snapshot: Snapshot) -> Json:
    """What `status --json` prints: rows keyed by their headers, and what needs attention."""
    return {
        "summary": summary_line(snapshot),
        "models": _keyed(MODEL_HEADERS, model_rows(snapshot)),
        "containers": _keyed(COMPONENT_HEADERS, component_rows(snapshot)),
        "attention": [matter.text for matter in attention(snapshot)],
    }


def _keyed(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[Json]:
    keys = [header.lower().replace(" ", "_") for header in headers]
    return [dict(zip(keys, row, strict=True)) for row in rows]


def overview_text(snapshot: Snapshot) -> str:
    """What needs the operator, or the newcomer's next step; silent when all is well."""
    matters = attention(snapshot)
    if matters:
        return "\n".join(f"- ⚠️ {plain(m.text)} → tab **{m.tab}**" for m in matters)
    step = next_step(snapshot)
    return f"**Next:** {plain(step.text)} → tab **{step.tab}**" if step else ""


def plain(text: str) -> str:
    """User text that Markdown and HTML leave alone."""
    return re.sub(r"([\\`*_{}\[\]()#+!|<>~&])", r"\\\1", " ".join(text.split()))


def code_block(text: str) -> str:
    """Text in a Markdown fence that it cannot close."""
    return "~~~~~~\n" + text.replace("~~~~~~", "") + "\n~~~~~~"


def plan_markdown(title: str, plan: Plan) -> str:
    """A plan as the operator confirms it: what happens, then what changes in the files."""
    if not plan:
        return f"**{plain(title)}**: nothing to do but to write the wish down."
    diff = plan.diff()
    changed = f"\n\n**Generated files**\n{code_block(diff)}" if diff else ""
    return f"**{plain(title)}** would do this:\n{code_block(str(plan))}{changed}"


def pending_plan_text(snapshot: Snapshot) -> str:
    if snapshot.plan is None:
        return "It cannot be planned while the state or Docker cannot be read."
    if not snapshot.plan:
        return "Nothing: everything is as it is wished."
    return code_block(str(snapshot.plan))


def plan_button(snapshot: Snapshot) -> Json:
    return {"interactive": bool(snapshot.plan) and running_job(snapshot) is None}


def endpoint_text(snapshot: Snapshot) -> str:
    """Where colleagues find the service."""
    state = snapshot.state
    if state is None:
        return ""
    if state.endpoint == "stopped":
        return "Keys live in the endpoint's database. **Deploy a model first.**"
    return f"Base URL for colleagues: `{base_url(state.edge)}`"


def model_choices(snapshot: Snapshot) -> Json:
    names = [model.name for model in snapshot.state.models] if snapshot.state else []
    return {"choices": names} | ({"value": names[0]} if len(names) == 1 else {})


def served_choices(snapshot: Snapshot) -> Json:
    models = snapshot.state.models if snapshot.state else ()
    return {"choices": [model.served_model_name for model in models]}


def revoke_question(alias: str) -> str:
    return (
        f"**Revoke the key of {plain(alias)}?** Its requests are refused from then on; "
        "what it used stays accounted for."
    )


def running_job(snapshot: Snapshot) -> JobView | None:
    return next((job for job in snapshot.jobs if job.finished_at is None), None)


def job_group(snapshot: Snapshot) -> Json:
    return {"visible": bool(snapshot.jobs)}


def job_title(snapshot: Snapshot) -> str:
    """The newest job, how it stands, and what comes next."""
    if not snapshot.jobs:
        return ""
    job = snapshot.jobs[0]
    if job.finished_at is None:
        elapsed = format_duration((snapshot.taken_at - job.started_at).total_seconds())
        return f"**{plain(job.title)}** · running for {elapsed}"
    took = format_duration((job.finished_at - job.started_at).total_seconds())
    if job.fault:
        return f"**{plain(job.title)}** · failed after {took}: {plain(job.fault)}"
    return f"**{plain(job.title)}** · done in {took}. {job.hint}"


def job_log(snapshot: Snapshot) -> Json:
    """The newest job's lines, while they matter: it runs, or it failed."""
    if not snapshot.jobs:
        return {"visible": False}
    job = snapshot.jobs[0]
    matters = job.finished_at is None or job.fault is not None
    return {"value": "\n".join(job.lines), "visible": matters}


def job_cancel(snapshot: Snapshot) -> Json:
    return {"visible": running_job(snapshot) is not None}


ORIGINS: Final = ("Hugging Face hub", "a directory of this server")


def registration(  # noqa: PLR0913, PLR0917 - one argument per field of the form
    name: str | None, kind: str, origin: str, source: str | None, arguments: str | None,
    served: str | None, revision: str | None, image: str | None,
    kv_cache_mib: float | None, gpus: Sequence[str] | None, replicas: float | None,
) -> Json:  # fmt: skip
    """The form's fields in the shape of a stored model; what is not there is left to defaults.

    Gradio (6.31) sends None for a text field in an accordion that was never opened.
    """
    place = typed(source)
    hub = {"kind": "hub", "repository": place, "revision": typed(revision) or None}
    cpu = {"kind": "cpu"} | ({"kv_cache_mib": kv_cache_mib} if kv_cache_mib else {})
    return {
        "name": typed(name),
        "type": kind,
        "source": hub if origin == ORIGINS[0] else {"kind": "local", "path": place},
        "served_model_name": typed(served) or typed(name),
        "engine_arguments": split_arguments(typed(arguments)),
        "image": typed(image) or None,
        "replicas": replicas or 1,
    } | ({"placement": {"kind": "gpu", "gpu_uuids": list(gpus)}} if gpus else {"placement": cpu})


def typed(text: str | None) -> str:
    """What a text field holds, without the spaces around it."""
    return (text or "").strip()


def key_request(
    alias: str, models: Sequence[str], days: float | None, rpm: float | None, tpm: float | None
) -> KeyRequest:
    """The key form's fields; 0 or empty is no limit."""
    whole = [int(number or 0) or None for number in (days, rpm, tpm)]
    return KeyRequest(
        alias=typed(alias),
        models=tuple(models or ()),
        days=whole[0],
        rpm_limit=whole[1],
        tpm_limit=whole[2],
    )


TLS_CHOICES: Final = ("internal", "own", "acme")
TLS_DETAILS: Final = {
    "certificate_path": "Certificate file (own)",
    "key_path": "Key file (own)",
    "email": "E-mail (acme)",
    "directory_url": "Directory (acme; empty: Let's Encrypt)",
}


def tls_detail(key: str, edge: Edge) -> str:
    """One field of the stored TLS settings, empty where its kind has none."""
    return str(asdict(edge.tls).get(key) or "")


def tls_settings(kind: str, certificate: str, key: str, email: str, directory: str) -> Json:
    match kind:
        case "own":
            return {"kind": kind, "certificate_path": certificate, "key_path": key}
        case "acme":
            return {"kind": kind, "email": email, "directory_url": directory or None}
        case _:
            return {"kind": "internal"}


def edge_settings(  # noqa: PLR0913, PLR0917 - one argument per field of the form
    names: str, https_port: float, http_port: float, tls: str,
    certificate: str, key: str, email: str, directory: str,
) -> Json:  # fmt: skip
    """The endpoint form's fields in the shape of a stored edge."""
    return {
        "hostnames": re.split(r"[,\s]+", typed(names)),
        "https_port": https_port,
        "http_port": http_port,
        "tls": tls_settings(tls, typed(certificate), typed(key), typed(email), typed(directory)),
    }


# =============================================================================
# §7 Adapters — effects: files, Docker, HTTP, NVML: the only doors out
# =============================================================================


def utc_now() -> datetime:
    return datetime.now(UTC)


class Clock(Protocol):
    """Time, so that tests need not wait for it."""

    def utc_now(self) -> datetime: ...
    def monotonic(self) -> float: ...
    def sleep(self, seconds: float) -> None: ...


class SystemClock:
    def utc_now(self) -> datetime:
        return utc_now()

    def monotonic(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class StateStore:
    """The home directory: config.json, its history and lock, generated files, kept logs."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.config_path = home / "config.json"
        self.generated = home / "generated"

    def ensure(self, *, fixed_names: bool) -> State:
        """The stored state; a first one only where there never was any.

        Without `fixed_names` its containers carry a prefix, and live beside another installation.
        """
        with file_errors("open its home"):
            for path in (self.home, self.generated, self.home / "history", self.home / "logs"):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.home.chmod(0o700)
        if not self.config_path.exists() and not any((self.home / "history").iterdir()):
            with self.lock("create the first state"):
                if not self.config_path.exists():
                    instance = secrets.token_hex(3)
                    self._write_state(
                        new_state(
                            instance=instance,
                            name_prefix="" if fixed_names else f"{instance}-",
                            token=lambda: secrets.token_urlsafe(32),
                        )
                    )
        return self.load()

    def load(self) -> State:
        with file_errors("read config.json"):
            try:
                text = self.config_path.read_text()
            except FileNotFoundError:
                raise StateUnreadableError(
                    f"{self.config_path} is gone.", advice="Copy the newest one from history/."
                ) from None
            except UnicodeDecodeError:
                raise StateUnreadableError(
                    "config.json is not text.", advice=RESTORE_ADVICE
                ) from None
        return parse_state(text)

    def save(self, state: State) -> None:
        """Replace config.json; the version before, with its generated files, goes to history."""
        check_state(state)
        with file_errors("save the state"):
            self._archive()
        self._write_state(state)

    def _write_state(self, state: State) -> None:
        with file_errors("save the state"):
            write_atomic(self.config_path, render_state(state))

    def _archive(self) -> None:
        target = self.home / "history" / f"{(self.versions() or [0])[-1] + 1:06d}"
        working = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        try:
            working.mkdir(mode=0o700)
            shutil.copy2(self.config_path, working / "config.json")
            if self.generated.exists():
                shutil.copytree(self.generated, working / "generated")
            working.rename(target)
        except OSError:
            shutil.rmtree(working, ignore_errors=True)
            raise

    def versions(self) -> list[int]:
        """The numbers of the earlier versions, oldest first."""
        names = (path.name for path in (self.home / "history").iterdir())
        return sorted(int(name) for name in names if name.isdigit())

    def version(self, number: int) -> State:
        """An earlier state, with today's secrets: keys and database would not follow."""
        path = self.home / "history" / f"{number:06d}" / "config.json"
        if not path.exists():
            known = self.versions()
            raise RefusedError(
                f"There is no version {number}.",
                advice=f"There are {known[0]} to {known[-1]}." if known else "There is none yet.",
            )
        with file_errors("read the history"):
            return replace(parse_state(path.read_text()), secrets=self.load().secrets)

    @contextlib.contextmanager
    def lock(self, title: str) -> Iterator[None]:
        """Hold the one change of this installation; a second one is told what runs."""
        release = self.acquire(title)
        try:
            yield
        finally:
            release()

    def acquire(self, title: str) -> Callable[[], None]:
        """Take the lock and return its release; the kernel frees it if this process dies."""
        with file_errors("lock its home"):
            handle = open(  # noqa: SIM115 - it stays open as long as the lock is held
                self.home / "lock", "a+", encoding="utf-8", opener=_private_opener
            )
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.seek(0)
            holder = handle.read().strip() or "another change"
            handle.close()
            raise BusyError(
                f"Another change is under way: {holder}.",
                advice="Wait until it is done, or cancel it.",
            ) from None
        with contextlib.suppress(OSError):  # a note for the refused; a full disk must not stop us
            handle.truncate(0)
            handle.write(f"{title}, since {utc_now():%H:%M:%S} UTC, process {os.getpid()}")
            handle.flush()

        def release() -> None:
            handle.close()

        return release

    def read_generated(self) -> dict[str, str]:
        """Every generated file by its path under generated/."""
        with file_errors("read the generated files"):
            return {
                str(path.relative_to(self.generated)): path.read_text(errors="replace")
                for path in sorted(self.generated.rglob("*"))
                if path.is_file() and not path.name.startswith(".")
            }

    def write_generated(self, path: str, text: str | None) -> None:
        """Write one generated file atomically; None removes it."""
        target = self.generated / path
        with file_errors(f"write {path}"):
            if text is None:
                target.unlink(missing_ok=True)
                return
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomic(target, text)

    def keep_log(self, name: ContainerName, text: str) -> None:
        """The last start log of a replica, which survives its container."""
        with file_errors("keep a log"):
            write_atomic(self.home / "logs" / f"{name}.log", text)

    def kept_log(self, name: ContainerName) -> str:
        path = self.home / "logs" / f"{name}.log"
        with file_errors("read a log"):
            return path.read_text() if path.exists() else ""


def _private_opener(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def write_atomic(path: Path, text: str) -> None:
    """All or nothing, 0600, on the disk when it returns."""
    working = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(working, "w", encoding="utf-8", opener=_private_opener) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        working.replace(path)
    finally:
        working.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@contextlib.contextmanager
def file_errors(action: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise ManagerError(
                f"LLM Manager could not {action}: the disk is full; nothing was changed.",
                advice="Free some space, then try again.",
            ) from error
        where = f" ({error.filename})" if error.filename else ""
        raise ManagerError(
            f"LLM Manager could not {action}: {error.strerror or error}{where}.",
            advice="Check the owner and mode of LLM Manager's home directory.",
        ) from error


class Containers(Protocol):
    """What the manager needs from a container engine; touches only what it labelled."""

    def observe(self) -> Observed: ...
    def look(self, name: ContainerName) -> ObservedContainer | None: ...
    def pull(self, image: str, report: Callable[[Json], None]) -> None: ...
    def create_network(self, name: str) -> None: ...
    def create_volume(self, name: str) -> None: ...
    def create(self, spec: ContainerSpec) -> None: ...
    def start(self, name: ContainerName) -> None: ...
    def stop(self, name: ContainerName, seconds: int) -> None: ...
    def set_aside(self, name: ContainerName, seconds: int) -> None: ...
    def bring_back(self, name: ContainerName) -> None: ...
    def remove(self, name: ContainerName, seconds: int) -> None: ...
    def check_caddyfile(self, spec: ContainerSpec, text: str) -> None: ...
    def reload_caddyfile(self, name: ContainerName) -> None: ...
    def logs(self, name: ContainerName, tail: int) -> str: ...
    def follow(self, name: ContainerName) -> Iterator[str]: ...


class DockerContainers:
    """Containers through the Docker SDK."""

    def __init__(self, base_url: str, instance: str) -> None:
        self._base_url = base_url
        self._instance = instance
        self._client: docker.DockerClient | None = None
        self._labels = {LABEL_OWNER: OWNER, LABEL_INSTANCE: instance}
        self._filter: dict[str, str | list[str] | bool] = {
            "label": [f"{key}={value}" for key, value in self._labels.items()]
        }

    def _connected(self) -> docker.DockerClient:
        # Never from_env(): since 7.2 it follows the Docker CLI's context to another daemon.
        if self._client is None:
            self._client = docker.DockerClient(base_url=self._base_url, timeout=120)
        return self._client

    def observe(self) -> Observed:
        with docker_errors("look at its containers"):
            client = self._connected()
            found = client.containers.list(all=True, filters=self._filter, ignore_removed=True)
            images = client.api.images()
            networks = client.api.networks(filters=self._filter)
            volumes = client.api.volumes(filters=self._filter)["Volumes"] or []
        seen = [_observed(container.attrs) for container in found]
        return Observed(
            containers={container.name: container for container in seen},
            images=frozenset(
                name
                for image in images
                for name in (*(image["RepoTags"] or ()), *(image["RepoDigests"] or ()))
            ),
            networks=frozenset(network["Name"] for network in networks),
            volumes=frozenset(volume["Name"] for volume in volumes),
        )

    def look(self, name: ContainerName) -> ObservedContainer | None:
        try:
            with docker_errors(f"look at {name}"):
                return _observed(self._ours(name).attrs)
        except ContainerGoneError:
            return None

    def _ours(self, name: str) -> Container:
        """The container of that name, if it carries our labels."""
        container = self._connected().containers.get(name)
        if any(container.labels.get(key) != value for key, value in self._labels.items()):
            raise ContainerFailedError(
                f"The container {name} belongs to something else.",
                advice="Remove or rename it yourself; LLM Manager does not touch it.",
            )
        return container

    def pull(self, image: str, report: Callable[[Json], None]) -> None:
        """Pull with progress; `report` may raise to cancel. Present images are left alone."""
        with docker_errors(f"pull {image}"):
            client = self._connected()
            try:
                client.images.get(image)
            except docker.errors.ImageNotFound:
                # Not images.pull(): it throws the progress and the errors in the stream away.
                for event in client.api.pull(image, stream=True, decode=True):
                    if "error" in event:
                        raise docker.errors.APIError(
                            event["error"], explanation=event["error"]
                        ) from None
                    report(event)

    def create_network(self, name: str) -> None:
        with docker_errors(f"create the network {name}"):
            self._connected().networks.create(
                name, driver="bridge", labels=self._labels, check_duplicate=True
            )

    def create_volume(self, name: str) -> None:
        with docker_errors(f"create the volume {name}"):
            # Docker answers with an existing volume of that name, whoever made it.
            volume = self._connected().volumes.create(name, labels=self._labels)
        labels = volume.attrs.get("Labels") or {}
        if labels.get(LABEL_INSTANCE) != self._instance:
            raise ContainerFailedError(
                f"The volume {name} belongs to another installation.",
                advice="Bring that installation's home back, or move the volume out of the way.",
            )

    def create(self, spec: ContainerSpec) -> None:
        """Create and start. Never run(): that pulls a missing image without a word."""
        with docker_errors(f"start {spec.name}"):
            self._connected().containers.create(**docker_arguments(spec, self._labels)).start()

    def start(self, name: ContainerName) -> None:
        with docker_errors(f"start {name}"):
            self._ours(name).start()

    def stop(self, name: ContainerName, seconds: int) -> None:
        with docker_errors(f"stop {name}"):
            self._ours(name).stop(timeout=seconds)

    def set_aside(self, name: ContainerName, seconds: int) -> None:
        with docker_errors(f"set aside {name}"):
            container = self._ours(name)
            container.stop(timeout=seconds)
            container.rename(aside(name))

    def bring_back(self, name: ContainerName) -> None:
        with docker_errors(f"bring back {name}"):
            container = self._ours(aside(name))
            container.rename(name)
            container.start()

    def remove(self, name: ContainerName, seconds: int) -> None:
        """Stop it gently and remove it if it is there; volumes stay."""
        with contextlib.suppress(ContainerGoneError), docker_errors(f"remove {name}"):
            container = self._ours(name)
            container.stop(timeout=seconds)
            container.remove(force=True, v=False)

    def check_caddyfile(self, spec: ContainerSpec, text: str) -> None:
        """Let Caddy itself judge the text, in a container of its own that then goes away."""
        name = f"{spec.name}-check-{secrets.token_hex(3)}"
        with docker_errors("check the Caddyfile"):
            container = self._connected().containers.create(
                spec.image,
                ["caddy", "validate", "--config", "/tmp/Caddyfile", "--adapter", "caddyfile"],  # noqa: S108
                name=name,
                labels={**self._labels, LABEL_ROLE: "check", LABEL_SPEC_HASH: "check"},
                mounts=[_docker_mount(m) for m in spec.mounts if "certificate" in m.target],
                network_mode="none",
            )
            try:
                container.put_archive("/tmp", _tar("Caddyfile", text))  # noqa: S108
                container.start()
                status = container.wait(timeout=60)["StatusCode"]
                said = container.logs().decode(errors="replace")
            finally:
                container.remove(force=True, v=True)
        if status:
            raise ContainerFailedError(
                f"Caddy rejects the generated Caddyfile: {_last_line(said)}.",
                advice="What ran before still runs. Correct the HTTPS settings.",
            )

    def reload_caddyfile(self, name: ContainerName) -> None:
        command = ["caddy", "reload", "--config", "/etc/caddy/Caddyfile", "--adapter", "caddyfile"]
        with docker_errors(f"reload {name}"):
            result = self._ours(name).exec_run(command)
        if result.exit_code:
            said = result.output.decode() if isinstance(result.output, bytes) else ""
            raise ContainerFailedError(
                f"Caddy did not load its new configuration: {_last_line(said)}.",
                advice="What ran before still runs.",
            )

    def logs(self, name: ContainerName, tail: int) -> str:
        with docker_errors(f"read the log of {name}"):
            said = self._ours(name).logs(tail=tail, stream=False)
        return bytes(said).decode(errors="replace")

    def follow(self, name: ContainerName) -> Iterator[str]:
        """The log from its last lines on, line by line, until the container ends."""
        with docker_errors(f"follow the log of {name}"):
            chunks = self._ours(name).logs(stream=True, follow=True, tail=200)
            rest = b""
            for chunk in chunks:  # chunks, not lines: UTF-8 may be split
                *lines, rest = (rest + chunk).split(b"\n")
                yield from (line.decode(errors="replace") for line in lines)
            if rest:
                yield rest.decode(errors="replace")


def _observed(attributes: Json) -> ObservedContainer:
    """A container's inspection as values."""
    labels, state = attributes["Config"]["Labels"], attributes["State"]
    networks = attributes["NetworkSettings"]["Networks"].values()
    ended = state["Status"] == "exited"
    return ObservedContainer(
        name=ContainerName(attributes["Name"].removeprefix("/")),
        role=labels.get(LABEL_ROLE, ""),
        spec_hash=SpecHash(labels.get(LABEL_SPEC_HASH, "")),
        running=state["Status"] == "running",
        address=next((n["IPAddress"] for n in networks if n["IPAddress"]), None),
        image=attributes["Config"]["Image"],
        exit_code=state["ExitCode"] if ended else None,
        started_at=parse_docker_time(state["StartedAt"]) if state["Status"] == "running" else None,
        model_name=labels.get(LABEL_MODEL_NAME),
        model_type=labels.get(LABEL_MODEL_TYPE),
        served_model_name=labels.get(LABEL_SERVED_NAME),
        docker_health=(state.get("Health") or {}).get("Status"),
    )


def parse_docker_time(text: str) -> datetime:
    """Docker writes nanoseconds, Python reads microseconds."""
    return datetime.fromisoformat(re.sub(r"(\.\d{6})\d*", r"\1", text).replace("Z", "+00:00"))


def docker_arguments(spec: ContainerSpec, owner: Mapping[str, str]) -> Json:
    """A spec as the SDK's `containers.create` takes it."""
    arguments: Json = {
        "image": spec.image,
        "command": list(spec.command),
        "name": spec.name,
        "environment": {k: v if isinstance(v, str) else v.get_secret_value()
                        for k, v in spec.environment.items()},
        "network": spec.network,
        "labels": {
            **owner, **spec.labels,
            LABEL_ROLE: spec.role, LABEL_SPEC_HASH: spec.hash,
        },
        "mounts": [_docker_mount(mount) for mount in spec.mounts],
        "ports": {f"{p.container_port}/tcp": (p.address, p.host_port) for p in spec.ports},
        "restart_policy": {"Name": spec.restart},
        "shm_size": f"{spec.shm_mib}m",
        "init": True,
        "log_config": docker.types.LogConfig(
            type="json-file", config={"max-size": "50m", "max-file": "3"}
        ),
    }  # fmt: skip
    if spec.entrypoint:
        arguments["entrypoint"] = list(spec.entrypoint)
    if spec.gpu_uuids:
        arguments["device_requests"] = [
            docker.types.DeviceRequest(device_ids=list(spec.gpu_uuids), capabilities=[["gpu"]])
        ]
    if spec.healthcheck:
        second = 1_000_000_000
        arguments["healthcheck"] = {
            "test": ["CMD-SHELL", spec.healthcheck],
            "interval": 2 * second, "timeout": 5 * second, "retries": 5,
            "start_period": int(spec.start_seconds) * second,
        }  # fmt: skip
    if spec.drop_capabilities:
        # Root without DAC_OVERRIDE could not read our 0600 files of another owner.
        arguments |= {"cap_drop": ["ALL"], "cap_add": ["NET_BIND_SERVICE", "DAC_OVERRIDE"]}
    return arguments


def _docker_mount(mount: Mount) -> docker.types.Mount:
    return docker.types.Mount(
        target=mount.target,
        source=mount.source,
        type="bind" if mount.source.startswith("/") else "volume",
        read_only=mount.read_only,
    )


def _tar(name: str, text: str) -> bytes:
    content, archive = text.encode(), io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        entry = tarfile.TarInfo(name)
        entry.size, entry.mode = len(content), 0o600
        tar.addfile(entry, io.BytesIO(content))
    return archive.getvalue()


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1].strip()[:400].rstrip(".")


DOCKER_CAUSES: Final = (
    # what Docker says -> fact, advice
    (
        r"No such image|manifest unknown|repository does not exist|pull access denied",
        "there is no such image",
        "Correct the image's name, or log in to its registry.",
    ),
    (
        r"port is already allocated|address already in use",
        "a port it publishes is taken",
        "Free the port, or choose another one in the HTTPS settings.",
    ),
    (
        r"dial tcp|TLS handshake|no such host|Client\.Timeout|server misbehaving",
        "the registry cannot be reached",
        "Check this server's network, or load the image by hand.",
    ),
    (
        r"is already in use by container",
        "another container has its name",
        "Another installation uses the same names: give one of them a home of its own.",
    ),
    (
        r"could not select device driver",
        "the NVIDIA container toolkit is not set up",
        "Install nvidia-container-toolkit and restart Docker.",
    ),
    (r"no space left on device", "the disk is full", "Free some space, then try again."),
    (
        r"bind source path does not exist",
        "a path it mounts is not there",
        "Correct the path of the model or certificate.",
    ),
)


@contextlib.contextmanager
def docker_errors(action: str) -> Iterator[None]:
    """Turn every failure of the SDK into one sentence; the original stays as the cause."""
    try:
        yield
    except docker.errors.APIError as error:
        if "No such container" in str(error.explanation):
            raise ContainerGoneError(
                f"LLM Manager could not {action}: it is gone.", advice="Apply the plan."
            ) from error
        raise _docker_fault(action, str(error.explanation)) from error
    except (
        docker.errors.DockerException,
        requests.exceptions.RequestException,
        urllib3.exceptions.HTTPError,  # a broken stream of a pull or a log comes through bare
    ) as error:
        start = "Install or start it: `systemctl start docker`"
        advice = f"{start} (Debian, Ubuntu: `apt-get install docker.io`)."
        if "Permission denied" in str(error):
            advice = "Run this as root, or join its group: `usermod -aG docker USER`."
        raise DockerAbsentError(
            f"Docker does not answer, so LLM Manager could not {action}.", advice=advice
        ) from error


def _docker_fault(action: str, said: str) -> ContainerFailedError:
    for pattern, fact, advice in DOCKER_CAUSES:
        if re.search(pattern, said, re.IGNORECASE):
            return ContainerFailedError(f"Docker could not {action}: {fact}.", advice=advice)
    return ContainerFailedError(
        f"Docker could not {action}: {_last_line(said)}.",
        advice="`journalctl -u docker` has the engine's side.",
    )


class Probes(Protocol):
    """Questions to containers, by their address on the bridge."""

    def fill(self, observed: Observed) -> Observed: ...
    def is_ready(self, spec: ContainerSpec, seen: ObservedContainer) -> bool: ...


class HttpProbes:
    """Readiness over HTTP; no answer is an answer."""

    def __init__(self) -> None:
        # trust_env off: a proxy of this host must not see requests to the bridge.
        # No certificates are read: it speaks plain HTTP, and that costs every command 17 ms.
        self._client = httpx.Client(timeout=2, trust_env=False, verify=False)  # noqa: S501

    def fill(self, observed: Observed) -> Observed:
        """The same observation with `ready` asked of every running container, side by side."""
        names = list(observed.containers)
        with concurrent.futures.ThreadPoolExecutor(max_workers=max(len(names), 1)) as pool:
            seen = dict(
                zip(names, pool.map(self._asked, observed.containers.values()), strict=True)
            )
        edges = [c for c in seen.values() if c.role == "edge" and c.running]
        return replace(observed, containers=seen, edge=self._loaded(edges[0]) if edges else None)

    def _asked(self, seen: ObservedContainer) -> ObservedContainer:
        if not seen.running:
            return seen
        match seen.role:
            case "database":
                return replace(seen, ready=seen.docker_health == "healthy")
            case "engine":
                return replace(seen, ready=self._ok(seen, ENGINE_PORT, "/health") is not None)
            case "gateway":
                return replace(seen, ready=self._gateway_connected(seen))
            case "edge":
                return replace(seen, ready=self._loaded(seen) is not None)
            case _:
                return seen

    def is_ready(self, spec: ContainerSpec, seen: ObservedContainer) -> bool:
        """The full question, asked while starting."""
        match spec.readiness:
            case DockerHealthy():
                return seen.docker_health == "healthy"
            case EdgeAnswers():
                return self._loaded(seen) is not None
            case GatewayServes(model_names=names, master_key=key):
                return self._gateway_connected(seen) and self._gateway_lists(seen, names, key)
            case EngineAnswers() as wanted:
                healthy = self._ok(seen, ENGINE_PORT, "/health") is not None
                return healthy and self._engine_answers(seen, wanted)
            case _:
                assert_never(spec.readiness)

    def _ok(self, seen: ObservedContainer, port: int, path: str) -> httpx.Response | None:
        if seen.address is None:
            return None
        try:
            answer = self._client.get(f"http://{seen.address}:{port}{path}")
        except httpx.HTTPError:
            return None
        return answer if answer.status_code == httpx.codes.OK else None

    def _loaded(self, seen: ObservedContainer) -> LoadedCaddyfile | None:
        answer = self._ok(seen, 80, HEALTH_PATH)
        match answer.text.split() if answer is not None else []:
            case ["ok", ("a" | "b") as slot, config_hash]:
                return LoadedCaddyfile(slot, config_hash)
            case _:
                return None

    def _gateway_connected(self, seen: ObservedContainer) -> bool:
        answer = self._ok(seen, GATEWAY_PORT, "/health/readiness")
        return answer is not None and '"db":"connected"' in answer.text.replace(" ", "")

    def _gateway_lists(
        self, seen: ObservedContainer, names: Sequence[str], key: pydantic.SecretStr
    ) -> bool:
        try:
            answer = self._client.get(
                f"http://{seen.address}:{GATEWAY_PORT}/v1/models",
                headers={"Authorization": f"Bearer {key.get_secret_value()}"},
                timeout=10,
            )
            listed = {entry["id"] for entry in answer.raise_for_status().json()["data"]}
        except (httpx.HTTPError, ValueError, KeyError):
            return False
        return listed >= set(names)

    def _engine_answers(self, seen: ObservedContainer, wanted: EngineAnswers) -> bool:
        path, body = readiness_request(wanted.model_type, wanted.served_model_name)
        key = wanted.engine_key.get_secret_value()
        try:
            # The first request may compile kernels.
            answer = self._client.post(
                f"http://{seen.address}:{ENGINE_PORT}{path}",
                json=body,
                headers={"Authorization": f"Bearer {key}"},
                timeout=300,
            )
        except httpx.TimeoutException as error:
            raise ContainerFailedError(
                f"{seen.name} is up but did not answer its first request in 300 s.",
                advice="Its log says more; a smaller model or context starts faster.",
            ) from error
        except httpx.HTTPError:
            return False
        if answer.is_success:
            return True
        raise ContainerFailedError(
            f"{seen.name} is up but refuses a {wanted.model_type} request "
            f"with {answer.status_code}: {_last_line(answer.text)}.",
            advice="Check that the model's type is right.",
        )


class LiteLlmApi:
    """LiteLLM's management API, by its container's address and with the master key."""

    def __init__(self, address: str, master_key: pydantic.SecretStr) -> None:
        self._client = httpx.Client(
            base_url=f"http://{address}:{GATEWAY_PORT}",
            headers={"Authorization": f"Bearer {master_key.get_secret_value()}"},
            timeout=30,
            trust_env=False,
        )

    def create_key(self, request: Json) -> pydantic.SecretStr:
        """The new key's secret, which LiteLLM tells only now."""
        answer = self._call("POST", "/key/generate", json=request | {"key_type": "llm_api"})
        return pydantic.SecretStr(answer["key"])

    def list_keys(self) -> list[VirtualKey]:
        """Every key, page by page."""
        found: list[VirtualKey] = []
        page, pages = 1, 1
        while page <= pages:
            answer = self._call(
                "GET", "/key/list",
                params={"page": page, "size": 100, "return_full_object": "true"},
            )  # fmt: skip
            found += [_virtual_key(entry) for entry in answer["keys"]]
            page, pages = page + 1, answer["total_pages"]
        return sorted(found, key=lambda key: key.alias)

    def delete_key(self, key_hash: str) -> None:
        self._call("POST", "/key/delete", json={"keys": [key_hash]})

    def _call(self, method: str, path: str, **options: Any) -> Json:
        try:
            answer = self._client.request(method, path, **options)
        except httpx.HTTPError as error:
            raise GatewayError(
                "LiteLLM does not answer.",
                advice="Look at the Overview; apply the plan if it is stopped.",
            ) from error
        if answer.is_success:
            return dict(answer.json())
        raise GatewayError(
            f"LiteLLM refuses that: {_gateway_reason(answer)}.",
            advice="Correct it, or look at LiteLLM's log.",
        )


def _gateway_reason(answer: httpx.Response) -> str:
    try:
        fault = answer.json()
        detail = fault.get("error") or fault.get("detail") or fault
        text = detail.get("message", detail) if isinstance(detail, dict) else detail
        return re.sub(r"sk-[\w-]{8,}", "sk-…", str(text))[:300].rstrip(".")
    except ValueError:
        return f"status {answer.status_code}"


def _virtual_key(entry: Json) -> VirtualKey:
    def moment(text: str | None) -> datetime | None:
        return datetime.fromisoformat(text.replace("Z", "+00:00")) if text else None

    return VirtualKey(
        key_hash=entry["token"],
        alias=entry.get("key_alias") or "",
        hint=entry.get("key_name") or "",
        models=tuple(entry.get("models") or ()),
        expires_at=moment(entry.get("expires")),
        rpm_limit=entry.get("rpm_limit"),
        tpm_limit=entry.get("tpm_limit"),
        blocked=bool(entry.get("blocked")),
        created_at=moment(entry.get("created_at")),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """A GPU as the driver names it; None is unknown."""

    uuid: GpuUuid
    name: str | None
    memory_mib: int | None


def read_gpus() -> tuple[Gpu, ...]:
    """The GPUs of this server; empty only where there is no driver at all."""
    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
        return ()
    except pynvml.NVMLError as error:
        raise _driver_fault(error) from error
    try:
        return tuple(_read_gpu(index) for index in range(pynvml.nvmlDeviceGetCount()))
    except pynvml.NVMLError as error:
        raise _driver_fault(error) from error
    finally:
        pynvml.nvmlShutdown()


def _read_gpu(index: int) -> Gpu:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory_mib: int | None = None
    with contextlib.suppress(pynvml.NVMLError):  # "Not Supported" where memory is shared
        memory_mib = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total) // 1024**2
    return Gpu(
        uuid=GpuUuid(str(pynvml.nvmlDeviceGetUUID(handle))),
        name=str(pynvml.nvmlDeviceGetName(handle)),
        memory_mib=memory_mib,
    )


def _driver_fault(error: Exception) -> ManagerError:
    return ManagerError(
        f"The NVIDIA driver does not answer: {error}.",
        advice="Look at `nvidia-smi`; after a driver upgrade, reboot.",
    )


def port_is_free(address: str, port: int) -> bool:
    """Whether nobody listens there; without the right to bind, whether nobody answers."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except PermissionError:
            return probe.connect_ex((address, port)) != 0
        except OSError as error:
            return error.errno != errno.EADDRINUSE
    return True


def free_bytes(path: Path) -> int:
    return shutil.disk_usage(path).free


# =============================================================================
# §8 Orchestration — effects: Plan -> world, undo, jobs
# =============================================================================

Report = Callable[[str], None]


class Files(Protocol):
    """What applying needs from the home directory."""

    def read_generated(self) -> dict[str, str]: ...
    def write_generated(self, path: str, text: str | None) -> None: ...
    def keep_log(self, name: ContainerName, text: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Tools:
    """The doors that applying goes through."""

    containers: Containers
    probes: Probes
    files: Files
    clock: Clock


class Control:
    """How a running change tells of itself, and hears that it should stop."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        self._cancelled.set()

    def check(self) -> None:
        """Raise where the operator has cancelled; called only where undoing is safe."""
        if self._cancelled.is_set():
            raise CancelledError(
                "The change was cancelled, and its wish withdrawn.",
                advice="What it had finished before is in the plan, to be taken back.",
            )


def observe(tools: Tools) -> Observed:
    """One whole look at the world."""
    seen = replace(
        tools.containers.observe(),
        files=tools.files.read_generated(),
        taken_at=tools.clock.utc_now(),
    )
    return tools.probes.fill(seen)


def converge(
    state: State,
    site: Site,
    tools: Tools,
    control: Control,
    *,
    only: ModelName | None = None,
    restart: ModelName | None = None,
) -> None:
    """Make the world as wished; what fails is undone alone, reported, and raised at the end."""
    plan = plan_state(state, observe(tools), site, only=only, restart=restart)
    apply_stage(plan.foundation, tools, control)
    database = _attempt([plan.database], tools, control)
    with concurrent.futures.ThreadPoolExecutor(max_workers=len(plan.models) or 1) as pool:
        attempts = pool.map(lambda lane: _attempt(lane, tools, control), lanes(plan.models))
        faults = [*database, *(fault for faults in attempts for fault in faults)]
    if not database:
        faults += _turn_endpoint(state, site, tools, control, only)
    else:  # what is wished stopped must stop all the same
        faults += _attempt([plan_retirement(state, observe(tools), None, only)], tools, control)
    _raise_all(faults)


def _turn_endpoint(
    state: State, site: Site, tools: Tools, control: Control, only: ModelName | None
) -> list[ManagerError]:
    """Route what is ready now, then retire what nobody wants any more."""
    endpoint, kept = plan_endpoint(state, observe(tools), site)
    faults = _attempt([endpoint], tools, control)
    turned = kept if not faults else None
    retirement = plan_retirement(state, observe(tools), turned, only)
    return faults + _attempt([retirement], tools, control)


def _attempt(stages: Sequence[Stage], tools: Tools, control: Control) -> list[ManagerError]:
    """Apply stages that do not depend on each other; what failed comes back, already undone."""
    faults: list[ManagerError] = []
    for stage in stages:
        try:
            apply_stage(stage, tools, control)
        except CancelledError:
            raise
        except ManagerError as error:
            control.report(f"{stage.title} failed: {error}")
            faults.append(error)
    return faults


def _raise_all(faults: Sequence[ManagerError]) -> None:
    match faults:
        case []:
            return
        case [fault]:
            raise fault
        case _:
            facts = " ".join(fault.fact for fault in faults)
            advice = " ".join(dict.fromkeys(fault.advice for fault in faults))
            raise ManagerError(facts, advice=advice)


def apply_stage(stage: Stage, tools: Tools, control: Control) -> None:
    """Do each step in order; if one fails, undo newest first and let it raise."""
    attempted: list[Step] = []
    try:
        for step in stage.steps:
            control.check()
            control.report(describe(step))
            attempted.append(step)  # before the effect: a half-done step is undone too
            apply_step(step, tools, control)
    except Exception:
        # A Discard is the point of no return: what it made way for is ready, and stays.
        if not (attempted and isinstance(attempted[-1], Discard)):
            for step in reversed(attempted):
                undo_step(step, tools, control.report)
        raise


def apply_step(  # noqa: C901, PLR0912, PLR0915 - one line per kind of step
    step: Step, tools: Tools, control: Control
) -> None:
    """One step, one call."""
    containers = tools.containers
    match step:
        case PullImage(image, _):
            _pull(image, containers, control)
        case CreateNetwork(name, _):
            containers.create_network(name)
        case CreateVolume(name, _):
            containers.create_volume(name)
        case WriteFile(path, text, _, _):
            tools.files.write_generated(path, text)
        case LoadCaddyfile(spec, text, _, reload, _):
            containers.check_caddyfile(spec, text)
            tools.files.write_generated(CADDYFILE, text)
            if reload:
                containers.reload_caddyfile(spec.name)
        case SetAside(name, seconds, _):
            containers.set_aside(name, seconds)
        case BringBack(name, _):
            containers.bring_back(name)
        case CreateContainer(spec, _):
            containers.create(spec)
        case StartContainer(name, _):
            containers.start(name)
        case StopContainer(name, seconds, _):
            containers.stop(name, seconds)
        case WaitReady(spec, _):
            wait_until_ready(spec, tools, control)
        case Pause(seconds, _):
            tools.clock.sleep(seconds)
        case Discard(name, seconds, _):
            containers.remove(name, seconds)
        case _:
            assert_never(step)


def undo_step(step: Step, tools: Tools, report: Report) -> None:
    """Take back one attempted step; report trouble instead of raising it."""
    try:
        if _undo(step, tools):
            report(f"undone: {describe(step)}")
    except ManagerError as error:
        report(f"could not undo {describe(step)}: {error}")


def _undo(step: Step, tools: Tools) -> bool:
    """Whether there was anything to take back."""
    containers = tools.containers
    match step:
        case WriteFile(path, _, before, _):
            tools.files.write_generated(path, before)
        case LoadCaddyfile(spec, _, before, reload, _):
            tools.files.write_generated(CADDYFILE, before)
            if reload and before is not None:
                containers.reload_caddyfile(spec.name)
        case SetAside(name, _, _):
            _undo_set_aside(name, containers)
        case CreateContainer(spec, _):
            containers.remove(spec.name, spec.stop_seconds)
        case StartContainer(name, _):
            containers.stop(name, 30)
        case StopContainer(name, _, _):
            containers.start(name)
        case _:
            return False  # done for good, harmless to keep, or nothing was changed
    return True


def _undo_set_aside(name: ContainerName, containers: Containers) -> None:
    if containers.look(aside(name)) is not None:
        containers.bring_back(name)
    else:  # it failed before the rename
        containers.start(name)


def _pull(image: str, containers: Containers, control: Control) -> None:
    progress = PullProgress(image)

    def on_event(event: Json) -> None:
        control.check()
        line = progress.line(event)
        if line is not None:
            control.report(line)

    containers.pull(image, on_event)


def wait_until_ready(spec: ContainerSpec, tools: Tools, control: Control) -> None:
    """Until it answered a real request; keeps the start log whatever happens."""
    started = told = tools.clock.monotonic()
    try:
        while True:
            control.check()
            seen = tools.containers.look(spec.name)
            now = tools.clock.monotonic()
            if seen is None or not seen.running:
                raise _start_failure(spec, seen, tools)
            if tools.probes.is_ready(spec, seen):
                control.report(f"  {spec.name} is ready after {format_duration(now - started)}")
                return
            if now - started > spec.start_seconds:
                raise ContainerFailedError(
                    f"{spec.name} was not ready after {format_duration(now - started)}.",
                    advice="Its kept log says how far it came.",
                )
            if now - told >= STARTING_LINE_SECONDS:
                told = now
                last = _last_line(tools.containers.logs(spec.name, 1))
                control.report(f"  {format_duration(now - started)}: {last[:120]}")
            tools.clock.sleep(0.2)
    finally:
        _keep_log(spec, tools)


STARTING_LINE_SECONDS: Final = 10.0


def _keep_log(spec: ContainerSpec, tools: Tools) -> None:
    if spec.role != "engine":
        return
    with contextlib.suppress(ManagerError):
        tools.files.keep_log(spec.name, tools.containers.logs(spec.name, 5000))


def _start_failure(
    spec: ContainerSpec, seen: ObservedContainer | None, tools: Tools
) -> ContainerFailedError:
    if seen is None:
        return ContainerFailedError(
            f"{spec.name} disappeared while it started.", advice="Apply the plan again."
        )
    said = last_error_line(tools.containers.logs(spec.name, 2000))
    reason = (said or "no reason given").rstrip(".")
    status = "" if seen.exit_code is None else f" with status {seen.exit_code}"
    return ContainerFailedError(
        f"{spec.name} ended{status} before it was ready: {reason}.",
        advice="Mend that, then deploy again; its whole log is kept.",
    )


@dataclass(eq=False)
class Job:
    """One change in its own thread; its log outlives every browser tab."""

    title: str
    hint: str = ""
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:8])
    started_at: datetime = field(default_factory=utc_now)
    finished_at: datetime | None = None
    lines: list[str] = field(default_factory=list)
    fault: ManagerError | None = None
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _control: Control = field(init=False)

    def __post_init__(self) -> None:
        self._control = Control(self.report)

    def report(self, line: str) -> None:
        log.info("%s: %s", self.title, line)
        with self._changed:
            self.lines.append(line)
            self._changed.notify_all()

    def cancel(self) -> None:
        """Undo what is under way at the next safe point; a finished job stays as it is."""
        self._control.cancel()

    def run(self, work: Callable[[Control], None], *, at_end: Callable[[], None]) -> Job:
        threading.Thread(
            target=self._run, args=(work, at_end), name=self.title, daemon=True
        ).start()
        return self

    def _run(self, work: Callable[[Control], None], at_end: Callable[[], None]) -> None:
        try:
            work(self._control)
        except ManagerError as error:
            self.fault = error
        except Exception:  # boundary: a bug must not leave the job "running" for ever
            log.exception("job %s failed", self.title)
            self.fault = ManagerError(f"{self.title} failed.", advice="See the journal.")
        at_end()
        with self._changed:
            self.finished_at = utc_now()
            self._changed.notify_all()

    def follow(self) -> Iterator[str]:
        """Its lines from the first on, until it ends; safe to abandon. Raises what it raised."""
        shown, done = 0, False
        while not done:
            with self._changed:
                while len(self.lines) == shown and self.finished_at is None:
                    self._changed.wait()
                fresh, done = self.lines[shown:], self.finished_at is not None
                shown += len(fresh)
            yield from fresh
        if self.fault:
            raise self.fault

    def view(self) -> JobView:
        with self._changed:
            return JobView(
                id=self.id,
                title=self.title,
                started_at=self.started_at,
                finished_at=self.finished_at,
                lines=tuple(self.lines),
                fault=str(self.fault) if self.fault else None,
                hint=self.hint,
            )


# =============================================================================
# §9 Manager — effects: the use cases; all that console and command line may call
# =============================================================================


def container_checks(state: State, observed: Observed) -> list[Check]:
    """Docker answers, our containers are ready, and Caddy's ports are free where it is not up."""
    checks = [Check(name="Docker", ok=True, text="answers")]
    edge = observed.containers.get(edge_name(state))
    if edge is None or not edge.running:
        checks += [
            Check(
                name=f"port {port}",
                ok=free,
                text="is free for Caddy" if free else "is taken",
                advice="Free it, or choose another one with `config set`.",
            )
            for port in (state.edge.https_port, state.edge.http_port)
            for free in (port_is_free(state.edge.address, port),)
        ]
    checks += [
        Check(
            name=seen.name,
            ok=bool(seen.running and seen.ready),
            text=format_container(seen),
            advice="Run `plan`, then `apply`.",
        )
        for _, seen in sorted(observed.containers.items())
    ]
    return checks


LOW_DISK_BYTES: Final = 20 * 1024**3


def disk_check(home: Path) -> Check:
    free = free_bytes(home)
    return Check(
        name="disk",
        ok=free > LOW_DISK_BYTES,
        text=f"{format_size(free)} free",
        advice="Free some space: images and weights are large.",
    )


class Manager:
    """Every change of this installation, first as a plan, then as a job."""

    def __init__(
        self,
        store: StateStore,
        tools: Tools,
        site: Site,
        *,
        engine_options: EngineOptions,
        gpus: Callable[[], tuple[Gpu, ...]] = read_gpus,
    ) -> None:
        self._store = store
        self._tools = tools
        self._site = site
        self._options = engine_options
        self._gpus = gpus
        self._jobs: deque[Job] = deque(maxlen=50)

    @property
    def home(self) -> Path:
        return self._store.home

    def state(self) -> State:
        return self._store.load()

    def gpus(self) -> tuple[Gpu, ...]:
        """The GPUs to choose from; a broken driver offers none, and the doctor says why."""
        with contextlib.suppress(ManagerError):
            return self._gpus()
        return ()

    def observe(self) -> Observed:
        return observe(self._tools)

    def jobs(self) -> list[JobView]:
        """Newest first."""
        return [job.view() for job in reversed(list(self._jobs))]

    def cancel_job(self, job_id: str) -> None:
        for job in list(self._jobs):
            if job.id == job_id:
                job.cancel()

    def plan(self, change: Change) -> Plan:
        """What the change would do; nothing is saved."""
        state = change.edit(self._store.load())
        check_state(state)
        return plan_state(
            state, self.observe(), self._site, only=change.only, restart=change.restart
        )

    def save(self, change: Change) -> State:
        """Write the wish down without acting on it."""
        with self._store.lock(change.title):
            return self._saved(change)

    def _saved(self, change: Change) -> State:
        before = self._store.load()
        after = change.edit(before)
        if after != before:
            self._store.save(after)
        return after

    def start(self, change: Change) -> Job:
        """Save the wish and make it so, as a job; refused at once while another change runs."""
        release = self._store.acquire(change.title)
        try:
            before = self._store.load()
            state = self._saved(change)
        except BaseException:
            release()
            raise
        job = Job(change.title, change.hint)
        self._jobs.append(job)
        return job.run(lambda control: self._work(change, before, state, control), at_end=release)

    def _work(self, change: Change, before: State, after: State, control: Control) -> None:
        try:
            converge(
                after, self._site, self._tools, control, only=change.only, restart=change.restart
            )
        except CancelledError:
            if after != before:
                self._store.save(before)
            raise

    def register(self, raw: Json) -> Model:
        """A new model from what the operator typed; where it goes is chosen when not said."""
        state = self._store.load()
        chosen = asdict(default_placement([gpu.uuid for gpu in self._gpus()], state.models))
        model = parse_model({"placement": chosen} | raw, state.images, self._options)
        self.save(registering(model))
        return model

    def revise(self, name: str, changes: Json) -> Model:
        """A registered model with some settings changed; it takes effect with the next plan."""
        return self.save(revising(name, changes, self._options)).model(name)

    def returning(self, number: int | None) -> Change:
        """The change back to an earlier version; without a number, the one before this."""
        versions = self._store.versions()
        wanted = number if number is not None else (versions or [0])[-1]
        return returning_to(wanted, self._store.version(wanted))

    def log_of(self, name: str) -> str:
        """A model's log: the container's where there is one, else what was kept of it."""
        state = self._store.load()
        return "\n".join(
            self._replica_log(replica) for replica in replica_names(state, state.model(name))
        )

    def _replica_log(self, replica: ContainerName) -> str:
        if self._tools.containers.look(replica) is not None:
            return self._tools.containers.logs(replica, 2000)
        return self._store.kept_log(replica)

    def follow_log(self, name: str) -> Iterator[str]:
        state = self._store.load()
        return self._tools.containers.follow(replica_names(state, state.model(name))[0])

    def snapshot(self) -> Snapshot:
        """Everything a page shows; what cannot be read is a fault in it, not an exception."""
        state, observed, plan = None, None, None
        faults: list[ManagerError] = []
        try:
            state = self._store.load()
            observed = self.observe()
            plan = plan_state(state, observed, self._site)
        except ManagerError as error:
            faults.append(error)
        return Snapshot(
            taken_at=utc_now(),
            state=state,
            observed=observed,
            plan=plan,
            faults=tuple(faults),
            jobs=tuple(self.jobs()),
        )

    def doctor(self) -> list[Check]:
        """Everything this program needs from its server, each with a verdict."""
        state = self._store.load()
        try:
            docker_checks = container_checks(state, self.observe())
        except ManagerError as error:
            docker_checks = [Check(name="Docker", ok=False, text=error.fact, advice=error.advice)]
        return [*docker_checks, disk_check(self.home), self._gpu_check()]

    def _gpu_check(self) -> Check:
        try:
            names = ", ".join(gpu.name or gpu.uuid for gpu in self._gpus())
        except ManagerError as error:
            return Check(name="GPUs", ok=False, text=error.fact, advice=error.advice)
        return Check(name="GPUs", ok=True, text=names or "none; models run on the CPU")

    def create_key(self, request: KeyRequest) -> pydantic.SecretStr:
        """A new virtual key; this is the only time its secret is seen."""
        state = self._store.load()
        unknown = sorted({*request.models} - {model.served_model_name for model in state.models})
        if unknown:
            raise RefusedError(
                f"No model is served as {', '.join(unknown)}.",
                advice="Allow served names from `model list`, or none to allow all.",
            )
        api = self._gateway(state)
        if any(key.alias == request.alias for key in api.list_keys()):
            raise RefusedError(
                f"There is a key called {request.alias!r} already.",
                advice="Choose another name, or revoke that one first.",
            )
        return api.create_key(request.as_litellm())

    def list_keys(self) -> list[VirtualKey]:
        return self._gateway(self._store.load()).list_keys()

    def revoke_key(self, alias: str) -> None:
        """The key of that name stops working; what it used stays accounted for."""
        api = self._gateway(self._store.load())
        found = [key for key in api.list_keys() if alias in {key.alias, key.key_hash}]
        if not found:
            raise RefusedError(f"There is no key called {alias!r}.", advice="See `key list`.")
        api.delete_key(found[0].key_hash)

    def _gateway(self, state: State) -> LiteLlmApi:
        observed = self.observe()
        order = [observed.edge.slot] if observed.edge else SLOTS
        for slot in order:
            seen = observed.containers.get(gateway_name(state, slot))
            if seen is not None and seen.ready and seen.address is not None:
                return LiteLlmApi(seen.address, state.secrets.master_key)
        raise GatewayError(
            "The endpoint is not running, and keys live in its database.",
            advice="Deploy a model, or run `apply`, first.",
        )


class Watch:
    """One thread that takes the snapshot which every open tab reads."""

    def __init__(self, manager: Manager, seconds: float = 2.0) -> None:
        self._manager = manager
        self._seconds = seconds
        self._latest = manager.snapshot()
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def latest(self) -> Snapshot:
        """The last look at the world, with the jobs as they are now."""
        return replace(self._latest, jobs=tuple(self._manager.jobs()))

    def _run(self) -> None:
        while True:
            time.sleep(self._seconds)
            try:
                before, self._latest = self._latest, self._manager.snapshot()
                if before.observed is None and self._latest.observed is not None:
                    self._restore()
            except Exception:  # boundary: a bug in one look must not freeze every page for ever
                log.exception("snapshot failed")

    def _restore(self) -> None:
        """Docker is back: it starts no engine by itself, and nobody may be looking."""
        state = self._latest.state
        if state is not None and state.endpoint == "running" and self._latest.plan:
            with contextlib.suppress(BusyError):
                self._manager.start(restoring())


# =============================================================================
# §10 Console — effects: one builder per tab, and who may open it
# =============================================================================

LOOPBACK_HOSTS: Final = frozenset({"127.0.0.1", "localhost", "[::1]"})
SECURITY_HEADERS: Final = (
    (b"x-frame-options", b"DENY"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)


class Guard:
    """ASGI gate: only the operator's own browser passes, and only from this console's pages.

    Gradio trusts any Origin behind a foreign Host and hides handlers without closing them
    (6.31), so every request is judged here, before Gradio sees it.
    """

    def __init__(self, app: Any, key: pydantic.SecretStr, instance: str) -> None:
        self._app = app
        self._key = key.get_secret_value().encode()
        self._cookie = f"llm-manager-{instance}"

    async def __call__(self, scope: Json, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        refused = foreign_request(headers)
        if refused:
            answer = _plain(403, refused)
        elif scope["path"] == "/" and (token := _query_token(scope["query_string"])):
            answer = self._exchange(token)
        elif not self.admits(headers.get("cookie", "")):
            answer = _plain(401, "Open the address that `llm_manager.py url` prints.")
        else:
            await self._app(scope, receive, _with_headers(send))
            return
        await answer(scope, receive, _with_headers(send))

    def admits(self, cookies: str) -> bool:
        """Whether a Cookie header carries this console's session."""
        found = dict(part.strip().partition("=")[::2] for part in cookies.split(";"))
        shown = found.get(self._cookie, "").encode()
        return hmac.compare_digest(shown, self._session().encode())

    def _session(self) -> str:
        return hmac.new(self._key, b"console session", sha256).hexdigest()

    def _exchange(self, token: str) -> fastapi.Response:
        if not hmac.compare_digest(token.encode(), self._key):
            return _plain(401, "That token is wrong. `llm_manager.py url` prints the right one.")
        answer = fastapi.responses.RedirectResponse("/", status_code=303)
        month = 30 * 24 * 3600
        answer.set_cookie(
            self._cookie, self._session(), max_age=month, httponly=True, samesite="strict"
        )
        return answer


def foreign_request(headers: Mapping[str, str]) -> str:
    """Why a request does not come from this console's own pages; empty if it may."""
    host = headers.get("host", "")
    if re.sub(r":\d+$", "", host) not in LOOPBACK_HOSTS:
        return "This console answers on 127.0.0.1 only. Use an SSH tunnel."
    if headers.get("origin", f"http://{host}") != f"http://{host}":
        return "Another web page sent this request. Open the console itself."
    if headers.get("sec-fetch-site", "none") not in {"none", "same-origin"}:
        return "Another web page sent this request. Type the console's address instead."
    return ""


def _query_token(query: bytes) -> str:
    return parse_qs(query.decode("latin-1")).get("token", [""])[0]


def _plain(status: int, text: str) -> fastapi.Response:
    return fastapi.responses.PlainTextResponse(text + "\n", status_code=status)


def _with_headers(send: Any) -> Any:
    async def sending(message: Json) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), *SECURITY_HEADERS]
        await send(message)

    return sending


@contextlib.contextmanager
def shown_to_operator() -> Iterator[None]:
    """Show a ManagerError as one message; anything else is a bug and gets an id."""
    try:
        yield
    except ManagerError as error:
        raise gr.Error(html.escape(str(error)), duration=None, print_exception=False) from error
    except Exception as error:  # boundary: the page must say something, the journal the rest
        incident = uuid.uuid4().hex[:8]
        log.exception("incident %s", incident)
        raise gr.Error(f"Unexpected error {incident}. The journal has the details.") from error


PRIVATE: Final[Json] = {"api_visibility": "private"}
QUIET: Final[Json] = PRIVATE | {"show_progress": "hidden", "concurrency_limit": None}


View = Callable[[Snapshot], Any]


@dataclass(frozen=True, slots=True)
class Desk:
    """What every tab needs: the manager, the shared snapshot, and what follows it."""

    manager: Manager
    watch: Watch
    views: list[tuple[Any, View]] = field(default_factory=list)


def live(desk: Desk, component: Any, view: View) -> Any:
    """Keep a component equal to a view of the snapshot, from the next `wire_live` on."""
    desk.views.append((component, view))
    return component


def wire_live(desk: Desk, app: gr.Blocks) -> None:
    """One tick of the page refreshes all that is live; what did not change is not sent."""
    components = [component for component, _ in desk.views]

    def on_tick(shown: list[Any]) -> list[Any]:
        snapshot = desk.watch.latest()
        fresh = [view(snapshot) for _, view in desk.views]
        updates = [
            gr.skip() if new == old else _update(new)
            for new, old in zip(fresh, shown or [None] * len(fresh), strict=True)
        ]
        return [*updates, fresh]

    shown = gr.State(None)
    app.load(on_tick, shown, [*components, shown], **QUIET)
    gr.Timer(REFRESH_SECONDS).tick(on_tick, shown, [*components, shown], **QUIET)


REFRESH_SECONDS: Final = 1.5


def _update(fresh: Any) -> Any:
    """A dict is an update of properties, all else is the value."""
    return gr.update(**fresh) if isinstance(fresh, dict) else fresh


def table(headers: Sequence[str], widths: Sequence[str] | None = None) -> Any:
    return gr.Dataframe(
        headers=list(headers), interactive=False, wrap=True, buttons=[], type="array",
        column_widths=list(widths) if widths else None, show_label=False,
    )  # fmt: skip


def build_overview_tab(desk: Desk) -> None:
    """Is all well, and if not, what to do."""
    with gr.Tab("Overview"):
        live(desk, gr.Markdown(), overview_text)
        gr.Markdown("### Models")
        live(desk, table(MODEL_HEADERS), model_rows)
        gr.Markdown("### Containers")
        live(desk, table(COMPONENT_HEADERS), component_rows)


@dataclass(frozen=True, slots=True)
class PlanCard:
    """The place where a change is shown before it is done."""

    group: gr.Group
    text: gr.Markdown
    pending: gr.State


def build_plan_card(desk: Desk, changes: Mapping[str, Callable[[str], Change]]) -> PlanCard:
    """A hidden card that shows a plan and asks; `pending` holds (verb, subject)."""

    def on_confirm(pending: tuple[str, str]) -> tuple[Any, None]:
        with shown_to_operator():
            verb, subject = pending
            desk.manager.start(changes[verb](subject))
            return gr.update(visible=False), None

    with gr.Group(visible=False, elem_classes="plan-card") as group:
        text = gr.Markdown(padding=True)
        with gr.Row():
            confirm = gr.Button("Do it", variant="primary")
            leave = gr.Button("Not now")
    pending = gr.State(None)
    confirm.click(on_confirm, pending, [group, pending], concurrency_id="change", **PRIVATE)
    leave.click(lambda: (gr.update(visible=False), None), None, [group, pending], **PRIVATE)
    return PlanCard(group, text, pending)


def wire_plan(
    desk: Desk, button: gr.Button, subject: Any, card: PlanCard, verb: str,
    change: Callable[[str], Change],
) -> None:  # fmt: skip
    """A button that opens the card with the plan of its change."""

    def on_click(chosen: str | None) -> tuple[Any, Any, Any]:
        with shown_to_operator():
            if not chosen:
                raise RefusedError("Nothing is chosen yet.", advice="Choose one first.")
            wished = change(chosen)
            text = plan_markdown(wished.title, desk.manager.plan(wished))
            return gr.update(visible=True), text, (verb, chosen)

    outputs = [card.group, card.text, card.pending]
    button.click(on_click, subject, outputs, **PRIVATE)


MODEL_VERBS: Final[Mapping[str, tuple[str, Literal["primary", "secondary", "stop"]]]] = {
    "deploy": ("Deploy", "primary"),
    "stop": ("Stop", "secondary"),
    "restart": ("Restart", "secondary"),
    "remove": ("Remove", "stop"),
}


def build_models_tab(desk: Desk) -> None:
    """The registered models, what can be done with one, its log, and a form for a new one."""
    changes = {"deploy": deploying, "stop": stopping, "restart": restarting, "remove": removing}

    def on_select(event: gr.SelectData) -> str:
        return str(event.row_value[0])

    with gr.Tab("Models"):
        rows = live(desk, table(MODEL_HEADERS), model_rows)
        with gr.Row(elem_classes="actions"):
            chosen = gr.Dropdown(
                label="Model", info="choose here, or click a row above", scale=2, min_width=240
            )
            live(desk, chosen, model_choices)
            buttons = {
                verb: gr.Button(label, variant=variant, scale=0, min_width=110)
                for verb, (label, variant) in MODEL_VERBS.items()
            }
        card = build_plan_card(desk, changes)
        build_registration_form(desk, chosen)
        build_log_view(desk, chosen)
    rows.select(on_select, None, chosen, **PRIVATE)
    for verb, button in buttons.items():
        wire_plan(desk, button, chosen, card, verb, changes[verb])


def build_registration_form(desk: Desk, chosen: gr.Dropdown) -> None:
    """Register a model: the fields that matter first, the rest folded away."""

    def on_register(*values: Any) -> tuple[Any, str]:
        with shown_to_operator():
            model = desk.manager.register(registration(*values))
            names = [known.name for known in desk.manager.state().models]
            return (
                gr.Dropdown(choices=names, value=model.name),
                f"Registered **{model.name}**. Now press **Deploy** above.",
            )

    with gr.Accordion("Register a model", open=not desk.watch.latest().state_has_models):
        with gr.Row():
            name = gr.Textbox(
                label="Name", placeholder="chat", info="lower-case letters, digits, -"
            )
            kind = gr.Dropdown(list(SERVED_TYPES), value="chat", label="Type")
            origin = gr.Radio(
                list(ORIGINS), value=ORIGINS[0], label="Weights come from",
            )  # fmt: skip
        source = gr.Textbox(label="Repository or directory", placeholder="Qwen/Qwen3-8B")
        arguments = gr.Textbox(
            label="Engine arguments", lines=2, placeholder="--max-model-len 8192"
        )
        with gr.Accordion("More settings", open=False), gr.Row():
            served = gr.Textbox(label="Served as", info="what clients ask for; empty: the name")
            revision = gr.Textbox(label="Revision", info="branch, tag or commit; empty: default")
            image = gr.Textbox(label="Engine image", info="empty: the pinned vLLM image")
            kv_cache = gr.Number(4096, label="KV cache on the CPU (MiB)", precision=0, minimum=16)
            replicas = gr.Number(1, label="Replicas", precision=0, minimum=1, maximum=16)
        gpus = gr.CheckboxGroup(
            [(f"{gpu.name} {gpu.uuid}", gpu.uuid) for gpu in desk.manager.gpus()],
            label="GPUs", visible=bool(desk.manager.gpus()),
        )  # fmt: skip
        register = gr.Button("Register", variant="primary")
        said = gr.Markdown()
    inputs = [
        name,
        kind,
        origin,
        source,
        arguments,
        served,
        revision,
        image,
        kv_cache,
        gpus,
        replicas,
    ]
    register.click(on_register, inputs, [chosen, said], **PRIVATE)


def build_log_view(desk: Desk, chosen: gr.Dropdown) -> None:
    """The chosen model's log, live while it is opened; the last start's log when it is gone."""

    def on_show(name: str | None) -> str:
        with shown_to_operator():
            return desk.manager.log_of(name) if name else ""

    with gr.Accordion("Log", open=False):
        text = gr.Textbox(
            show_label=False, lines=16, max_lines=16, interactive=False, autoscroll=True,
            buttons=["copy"], placeholder="Choose a model above, then show its log.",
        )  # fmt: skip
        show = gr.Button("Show the log")
    show.click(on_show, chosen, text, **PRIVATE)


def build_keys_tab(desk: Desk) -> None:
    """A key per colleague: made, shown once, revoked."""

    def on_list() -> tuple[Any, Any]:
        # Opening a tab must not shout: without an endpoint there simply are no keys yet.
        keys: list[VirtualKey] = []
        with contextlib.suppress(ManagerError):
            keys = desk.manager.list_keys()
        return key_rows(keys), gr.Dropdown(choices=[key.alias for key in keys], value=None)

    with gr.Tab("Keys") as tab:
        live(desk, gr.Markdown(), endpoint_text)
        rows = table(KEY_HEADERS)
        secret = build_key_form(desk)
        chosen, revoked = build_revocation(desk)
    for changed in (tab.select, secret.change, revoked.change):
        changed(on_list, None, [rows, chosen], **QUIET)


def build_revocation(desk: Desk) -> tuple[gr.Dropdown, gr.Markdown]:
    """Choose a key, be asked, revoke it; the Markdown says which was revoked."""

    def on_revoke(alias: str | None) -> tuple[Any, str]:
        with shown_to_operator():
            if not alias:
                raise RefusedError("No key is chosen yet.", advice="Choose one first.")
            return gr.update(visible=True), revoke_question(alias)

    def on_confirm(alias: str) -> tuple[Any, str]:
        with shown_to_operator():
            desk.manager.revoke_key(alias)
            return gr.update(visible=False), f"Revoked the key of {plain(alias)}."

    with gr.Row(elem_classes="actions"):
        chosen = gr.Dropdown(label="Key to revoke", scale=3)
        revoke = gr.Button("Revoke", variant="stop", scale=0, min_width=110)
    with gr.Group(visible=False, elem_classes="plan-card") as sure:
        question = gr.Markdown(padding=True)
        with gr.Row():
            confirm = gr.Button("Revoke it", variant="stop")
            leave = gr.Button("Not now")
    said = gr.Markdown()
    revoke.click(on_revoke, chosen, [sure, question], **PRIVATE)
    confirm.click(on_confirm, chosen, [sure, said], **PRIVATE)
    leave.click(lambda: gr.update(visible=False), None, sure, **PRIVATE)
    return chosen, said


def build_key_form(desk: Desk) -> gr.Textbox:
    """The form for a new key and the place where its secret is shown once."""

    def on_create(
        alias: str, models: list[str], days: float | None, rpm: float | None, tpm: float | None
    ) -> tuple[Any, Any]:
        with shown_to_operator():
            request = key_request(alias, models, days, rpm, tpm)
            secret = desk.manager.create_key(request).get_secret_value()
            return gr.update(
                value=hand_out(desk.manager.state(), request, secret), visible=True
            ), ""

    with gr.Accordion("Create a key", open=True):
        with gr.Row():
            alias = gr.Textbox(label="For whom", placeholder="Ada Lovelace")
            models = live(
                desk,
                gr.Dropdown(label="Models", multiselect=True, info="none: all of them"),
                served_choices,
            )
        with gr.Row():
            days = gr.Number(0, label="Valid for (days)", precision=0, info="0: for ever")
            rpm = gr.Number(0, label="Requests per minute", precision=0, info="0: no limit")
            tpm = gr.Number(0, label="Tokens per minute", precision=0, info="0: no limit")
        create = gr.Button("Create key", variant="primary")
        secret = gr.Textbox(
            label="Hand this over now: it is shown only once", elem_id="new-key", lines=9,
            interactive=False, buttons=["copy"], visible=False,
        )  # fmt: skip
    create.click(on_create, [alias, models, days, rpm, tpm], [secret, alias], **PRIVATE)
    return secret


def build_system_tab(desk: Desk) -> None:
    """The plan, the server's health, the endpoint's settings, the way back."""
    with gr.Tab("System"):
        gr.Markdown("### What is planned")
        live(desk, gr.Markdown(), pending_plan_text)
        apply_button = gr.Button("Apply the plan", variant="primary")
        live(desk, apply_button, plan_button)
        changes = {"apply": lambda _: applying(), "roll back": _returning(desk)}
        card = build_plan_card(desk, changes)
        wire_plan(desk, apply_button, gr.State("now"), card, "apply", changes["apply"])
        build_doctor_view(desk)
        build_endpoint_form(desk)
        with gr.Accordion("Earlier versions", open=False), gr.Row(elem_classes="actions"):
            version = gr.Textbox(label="Version", placeholder="12", info="from history/", scale=3)
            back = gr.Button("Roll back", variant="stop", scale=0, min_width=110)
        wire_plan(desk, back, version, card, "roll back", changes["roll back"])


def _returning(desk: Desk) -> Callable[[str], Change]:
    def change(text: str) -> Change:
        if not text.strip().isdigit():
            raise RefusedError("A version is a number.", advice="history/ holds them.")
        return desk.manager.returning(int(text))

    return change


def build_doctor_view(desk: Desk) -> None:
    """Checks of everything this program needs from its server."""

    def on_check() -> list[list[str]]:
        with shown_to_operator():
            return check_rows(desk.manager.doctor())

    with gr.Accordion("Health of this server", open=False):
        check = gr.Button("Check now")
        rows = table(("Check", "Verdict", "Found", "Advice"))
    check.click(on_check, None, rows, **PRIVATE)


def build_endpoint_form(desk: Desk) -> None:
    """Names, ports and certificate of the HTTPS endpoint; saved as a wish, done by the plan."""

    def on_save(*values: Any) -> str:
        with shown_to_operator():
            desk.manager.save(configuring_edge(edge_settings(*values)))
            return "Saved. Review **What is planned** above, then apply it."

    def stored(component: Any, view: Callable[[Edge], Any]) -> Any:
        # Follows the stored state, which the command line may change; typing is left alone.
        return live(desk, component, lambda seen: seen.state and view(seen.state.edge))

    with gr.Accordion("HTTPS endpoint", open=False):
        with gr.Row():
            names = stored(gr.Textbox(label="Host names"), lambda edge: ", ".join(edge.hostnames))
            https = stored(gr.Number(label="HTTPS port", precision=0), lambda edge: edge.https_port)
            http = stored(gr.Number(label="HTTP port", precision=0), lambda edge: edge.http_port)
        with gr.Row():
            tls = gr.Dropdown(
                list(TLS_CHOICES), label="Certificate",
                info="internal: Caddy's own authority; own: files of this server; acme: by e-mail",
            )  # fmt: skip
            stored(tls, lambda edge: edge.tls.kind)
            details = [
                stored(gr.Textbox(label=label), partial(tls_detail, key))
                for key, label in TLS_DETAILS.items()
            ]
        save = gr.Button("Save")
        said = gr.Markdown()
    save.click(on_save, [names, https, http, tls, *details], said, **PRIVATE)


def build_job_panel(desk: Desk) -> None:
    """The newest job, on every tab; any page that opens later shows the same lines."""

    def on_cancel() -> None:
        for job in desk.watch.latest().jobs:
            if job.finished_at is None:
                desk.manager.cancel_job(job.id)

    with live(desk, gr.Group(visible=False, elem_id="job"), job_group):
        live(desk, gr.Markdown(padding=True), job_title)
        log_lines = gr.Textbox(
            label="Progress", lines=8, max_lines=12, interactive=False, buttons=["copy"]
        )
        live(desk, log_lines, job_log)
        cancel = live(desk, gr.Button("Cancel", size="sm"), job_cancel)
    cancel.click(on_cancel, None, None, **PRIVATE)


STYLE: Final = """
.gradio-container table td, .gradio-container table th { font-family: var(--font) !important; }
.plan-card { border: 2px solid var(--color-accent) !important; }
button.lg { align-self: flex-start; flex-grow: 0 !important; min-width: 130px; }
.actions { align-items: end; }
.actions button { max-height: 42px; }
.plan-card .row { padding: 12px; }
.plan-card pre { max-height: 32em; overflow: auto; white-space: pre-wrap; }
#job textarea, #new-key textarea, .log textarea { font-family: var(--font-mono); font-size: 12px; }
footer { display: none !important; }
"""
# Fonts of the operator's own machine: the console must not ask the internet for any.
FONTS: Final = ("system-ui", "sans-serif")
MONOSPACE_FONTS: Final = ("ui-monospace", "monospace")


def build_console(manager: Manager, watch: Watch) -> gr.Blocks:
    """The whole page."""
    app = gr.Blocks(title="LLM Manager", analytics_enabled=False, fill_width=True)
    with app:
        desk = Desk(manager, watch)
        gr.Markdown("# LLM Manager")
        live(desk, gr.Markdown(), summary_line)
        build_job_panel(desk)
        with gr.Tabs():
            build_overview_tab(desk)
            build_models_tab(desk)
            build_keys_tab(desk)
            build_system_tab(desk)
        wire_live(desk, app)
    return app


def build_app(manager: Manager, watch: Watch) -> Guard:
    """The console behind its guard, ready for uvicorn."""
    state = manager.state()
    app = fastapi.FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    guard = Guard(app, state.secrets.console_key, state.instance)

    def operator(request: fastapi.Request) -> str | None:
        return "operator" if guard.admits(request.headers.get("cookie", "")) else None

    gr.mount_gradio_app(
        app,
        build_console(manager, watch),
        path="/",
        auth_dependency=operator,
        app_kwargs={"openapi_url": None, "docs_url": None, "redoc_url": None},
        css=STYLE,
        theme=gr.themes.Default(primary_hue="blue", font=FONTS, font_mono=MONOSPACE_FONTS),
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        show_error=False,
        ssr_mode=False,
    )
    return guard


# =============================================================================
# §11 Main — effects: arguments, wiring, systemd
# =============================================================================

DONE, FAILED, WRONG_USAGE, TO_DO = range(4)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; exit status as in the README."""
    arguments = build_parser().parse_args(join_values(sys.argv[1:] if argv is None else argv))
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        return int(arguments.command(arguments))
    except ManagerError as error:
        _say(str(error))
        return FAILED
    except KeyboardInterrupt:
        _say("Interrupted. What was under way is healed by the next `apply`.")
        return FAILED
    except BrokenPipeError:
        # `status | head`: nobody reads on. The interpreter would complain when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Exception:  # boundary: one sentence for the operator, the traceback for the journal
        incident = uuid.uuid4().hex[:8]
        log.exception("incident %s", incident)
        _say(f"Unexpected error {incident}. Please report the traceback above.")
        return FAILED


def join_values(argv: Sequence[str]) -> list[str]:
    """`--arguments --x` as `--arguments=--x`: argparse takes no value that looks like an option."""
    result: list[str] = []
    for word in argv:
        if result and result[-1] == "--arguments":
            result[-1] = f"--arguments={word}"
        else:
            result.append(word)
    return result


def build_parser() -> argparse.ArgumentParser:
    """Every command; tests compare this with the README."""
    parser = argparse.ArgumentParser(
        prog="llm_manager.py", description="The operator console of a shared GPU server."
    )
    parser.set_defaults(command=command_serve, port=CONSOLE_PORT)
    commands = parser.add_subparsers(metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], int], text: str) -> Any:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        sub.add_argument("--json", action="store_true", help="print facts as JSON")
        return sub

    serve = add("serve", command_serve, "the console (the default); restores first")
    serve.add_argument("--port", type=int, default=CONSOLE_PORT)
    url = add("url", command_url, "the console's address with its access token")
    url.add_argument("--port", type=int, default=CONSOLE_PORT)
    add("status", command_status, "models and containers as they are")
    add("plan", command_plan, "what would be done; exit status 3 if anything")
    add("apply", _changes(lambda _m, _a: applying()), "do what is planned")
    add("restore", _changes(lambda _m, _a: restoring()), "bring everything back after a reboot")
    add("doctor", command_doctor, "check everything this needs from its server")
    rollback = add(
        "rollback", _changes(lambda m, a: m.returning(a.number)), "return to an earlier state"
    )
    rollback.add_argument("number", type=int, nargs="?", help="from history/; default: the last")
    rollback.add_argument("--plan", action="store_true", help="show the plan only")
    add_model_commands(commands, add)
    add_key_commands(commands)
    add_system_commands(commands, add)
    return parser


def add_model_commands(commands: Any, add: Callable[..., Any]) -> None:
    """`model …`, `deploy`, `stop`, `restart`, `logs`."""
    for make, name, text in (
        (deploying, "deploy", "start a model and route it"),
        (stopping, "stop", "stop a model"),
        (restarting, "restart", "replace a model's containers"),
    ):
        _add_named_change(add(name, command_serve, text), make)
    logs = add("logs", command_logs, "a model's log, or what was kept of its last start")
    logs.add_argument("name")
    logs.add_argument("-f", "--follow", action="store_true")
    group = commands.add_parser("model", help="register and change models").add_subparsers(
        required=True, metavar="COMMAND"
    )
    for verb, command in (("add", command_model_add), ("set", command_model_set)):
        sub = group.add_parser(verb)
        sub.set_defaults(command=command)
        sub.add_argument("name")
        _add_model_options(sub, required=verb == "add")
    for verb, command in (("list", command_model_list), ("show", command_model_show)):
        sub = group.add_parser(verb)
        sub.set_defaults(command=command)
        sub.add_argument("--json", action="store_true")
        if verb == "show":
            sub.add_argument("name")
    _add_named_change(group.add_parser("remove"), removing)


def _add_named_change(sub: argparse.ArgumentParser, make: Callable[[str], Change]) -> None:
    sub.add_argument("name")
    sub.add_argument("--plan", action="store_true", help="show the plan only")
    sub.set_defaults(command=_changes(lambda _, arguments: make(arguments.name)))


def _add_model_options(sub: argparse.ArgumentParser, *, required: bool) -> None:
    source = sub.add_mutually_exclusive_group(required=required)
    source.add_argument("--repository", help="on the Hugging Face hub")
    source.add_argument("--path", help="a directory of this server")
    sub.add_argument("--revision")
    sub.add_argument("--type", default="chat" if required else None)
    sub.add_argument("--served-as", help="what clients ask for; default: the name")
    sub.add_argument("--arguments", help='for the engine: "--max-model-len 8192"')
    sub.add_argument("--image", help="instead of the pinned engine image")
    sub.add_argument("--replicas", type=int)
    sub.add_argument("--gpu", action="append", metavar="UUID", help="repeat for several")
    sub.add_argument("--memory-fraction", type=float, help="of each GPU, at most 1")
    sub.add_argument("--cpu-kv-cache", type=int, metavar="MIB", help="place it on the CPU")
    sub.add_argument("--json", action="store_true")


def add_key_commands(commands: Any) -> None:
    """`key …`."""
    group = commands.add_parser("key", help="virtual keys for colleagues").add_subparsers(
        required=True, metavar="COMMAND"
    )
    create = group.add_parser("create")
    create.set_defaults(command=command_key_create)
    create.add_argument("name")
    create.add_argument("--model", action="append", default=[], help="served name; repeat")
    create.add_argument("--days", type=int)
    create.add_argument("--rpm", type=int)
    create.add_argument("--tpm", type=int)
    create.add_argument("--json", action="store_true")
    listing = group.add_parser("list")
    listing.set_defaults(command=command_key_list)
    listing.add_argument("--json", action="store_true")
    revoke = group.add_parser("revoke")
    revoke.set_defaults(command=command_key_revoke)
    revoke.add_argument("name")


def add_system_commands(commands: Any, add: Callable[..., Any]) -> None:
    """`config …`, `image …`, `install`."""
    config = commands.add_parser("config", help="the stored state").add_subparsers(
        required=True, metavar="COMMAND"
    )
    config.add_parser("show").set_defaults(command=command_config_show)
    config.add_parser("check").set_defaults(command=command_config_check)
    edge = config.add_parser("set", help="the HTTPS endpoint")
    edge.set_defaults(command=command_config_set)
    edge.add_argument("--hostname", action="append")
    edge.add_argument("--address", help="to listen on")
    edge.add_argument("--https-port", type=int)
    edge.add_argument("--http-port", type=int)
    edge.add_argument("--tls", choices=TLS_CHOICES)
    edge.add_argument("--certificate", default="")
    edge.add_argument("--key", default="")
    edge.add_argument("--email", default="")
    edge.add_argument("--acme-directory", default="", help="a company's own ACME server")
    token = config.add_parser("token", help="the Hugging Face token, from standard input")
    token.set_defaults(command=command_config_token)
    image = commands.add_parser("image", help="the pinned images").add_subparsers(
        required=True, metavar="COMMAND"
    )
    listing = image.add_parser("list")
    listing.set_defaults(command=command_image_list)
    listing.add_argument("--json", action="store_true")
    pin = image.add_parser("set")
    pin.set_defaults(command=command_image_set)
    pin.add_argument("role", choices=[f.name for f in fields(Images)])
    pin.add_argument("image")
    install = add("install", command_install, "install and start the systemd service")
    install.add_argument("--root", type=Path, default=Path("/"), help="for packagers")
    install.add_argument("--no-start", action="store_true")


def open_manager() -> Manager:
    """The installation of this environment, wired up."""
    store = StateStore(find_home())
    state = store.ensure(fixed_names=store.home == SYSTEM_HOME)
    cache = Path(state.hugging_face_home or store.home / "huggingface")
    with file_errors("make the weights' directory"):
        cache.mkdir(parents=True, exist_ok=True)
    docker_url = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
    tools = Tools(DockerContainers(docker_url, state.instance), HttpProbes(), store, SystemClock())
    recipe = (PROGRAM.parent / "recipes" / "vllm.yaml").read_text()
    return Manager(
        store,
        tools,
        Site(generated=str(store.generated), hugging_face_home=str(cache)),
        engine_options=parse_recipe_options(recipe),
    )


SYSTEM_HOME: Final = Path("/var/lib/llm-manager")


def find_home() -> Path:
    """`$LLM_MANAGER_HOME`, else the system's as root, else the user's own."""
    named = os.environ.get("LLM_MANAGER_HOME")
    if named:
        return Path(named).resolve()
    return SYSTEM_HOME if os.geteuid() == 0 else Path("~/.llm-manager").expanduser()


def out(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - the command line's one voice


def out_json(facts: object) -> None:
    out(json.dumps(facts, indent=2, default=str))


def _changes(
    make: Callable[[Manager, argparse.Namespace], Change],
) -> Callable[[argparse.Namespace], int]:
    """A command that shows or makes a change, following its job to the end."""

    def command(arguments: argparse.Namespace) -> int:
        manager = open_manager()
        change = make(manager, arguments)
        if getattr(arguments, "plan", False):
            plan = manager.plan(change)
            out(str(plan) or "Nothing to do.")
            return TO_DO if plan else DONE
        return follow(manager.start(change))

    return command


def follow(job: Job) -> int:
    """Print a job's lines; Ctrl-C cancels it, and waits until it is undone."""
    shown = 0
    while True:
        try:
            for line in itertools.islice(job.follow(), shown, None):
                shown += 1
                out(line)
        except KeyboardInterrupt:
            job.cancel()
            _say("Cancelling; what was begun is being undone ...")
        else:
            out(f"Done in {format_duration((utc_now() - job.started_at).total_seconds())}.")
            return DONE


def command_serve(arguments: argparse.Namespace) -> int:
    """Restore, then serve the console until told to stop."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    logging.getLogger("llm_manager").setLevel(logging.INFO)
    manager = open_manager()
    listener = listen(arguments.port)
    state = manager.state()
    if state.endpoint == "running":
        try:
            manager.start(restoring())
        except BusyError as error:
            _say(str(error))
    app = build_app(manager, Watch(manager))
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3)
    if sys.stdout.isatty():  # the journal must not hold the token
        out(f"LLM Manager: {console_url(state, arguments.port)}")
    else:
        out(f"LLM Manager listens on {CONSOLE_HOST}:{arguments.port}; `url` prints its address.")
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listener])
    # A job may wait an hour for an engine; systemd must not. The next plan heals it.
    logging.shutdown()
    os._exit(DONE)


def listen(port: int) -> socket.socket:
    """The console's socket, on loopback only; taken is said before anything else starts."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((CONSOLE_HOST, port))
    except OSError as error:
        listener.close()
        raise ManagerError(
            f"Port {port} of {CONSOLE_HOST} cannot be used: {error.strerror}.",
            advice="Is the console running already? Else choose another one: `serve --port 7861`.",
        ) from error
    return listener


def console_url(state: State, port: int) -> str:
    token = state.secrets.console_key.get_secret_value()
    return f"http://{CONSOLE_HOST}:{port}/?token={token}"


def command_url(arguments: argparse.Namespace) -> int:
    out(console_url(open_manager().state(), arguments.port))
    return DONE


def command_status(arguments: argparse.Namespace) -> int:
    snapshot = open_manager().snapshot()
    if arguments.json:
        out_json(status_facts(snapshot))
    else:
        out(summary_line(snapshot))
        out_table(MODEL_HEADERS, model_rows(snapshot))
        out_table(COMPONENT_HEADERS, component_rows(snapshot))
        for matter in attention(snapshot):
            out(f"! {matter.text}")
    return FAILED if snapshot.faults else DONE


def out_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as they need; nothing where there are no rows."""
    if not rows:
        return
    lines = [headers, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headers))]
    for line in lines:
        out("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def command_plan(arguments: argparse.Namespace) -> int:
    plan = open_manager().plan(applying())
    if arguments.json:
        out_json([{"stage": s.title, "steps": [describe(t) for t in s.steps]} for s in plan.stages])
    else:
        out(str(plan) or "Nothing to do.")
        if plan.diff():
            out(plan.diff())
    return TO_DO if plan else DONE


def command_doctor(arguments: argparse.Namespace) -> int:
    checks = open_manager().doctor()
    if arguments.json:
        out_json([asdict(check) for check in checks])
    else:
        out_table(("Check", "Verdict", "Found", "Advice"), check_rows(checks))
    return DONE if all(check.ok for check in checks) else TO_DO


def command_logs(arguments: argparse.Namespace) -> int:
    manager = open_manager()
    if not arguments.follow:
        out(manager.log_of(arguments.name))
        return DONE
    with contextlib.suppress(KeyboardInterrupt):
        for line in manager.follow_log(arguments.name):
            out(line)
    return DONE


def command_model_add(arguments: argparse.Namespace) -> int:
    model = open_manager().register(model_options(arguments) | {"name": arguments.name})
    out(f"Registered {model.name}. Next: llm_manager.py deploy {model.name}")
    return DONE


def command_model_set(arguments: argparse.Namespace) -> int:
    model = open_manager().revise(arguments.name, model_options(arguments))
    out(f"Saved {model.name}. Next: llm_manager.py plan")
    return DONE


def model_options(arguments: argparse.Namespace) -> Json:
    """What was given on the command line, in the shape of a stored model."""
    given: Json = {
        "type": arguments.type,
        "served_model_name": arguments.served_as,
        "engine_arguments": None
        if arguments.arguments is None
        else split_arguments(arguments.arguments),
        "image": arguments.image,
        "replicas": arguments.replicas,
    }
    if arguments.revision and not arguments.repository:
        raise RefusedError(
            "A revision was given without its repository.", advice="Add --repository."
        )
    if arguments.repository:
        revision = arguments.revision
        given["source"] = {
            "kind": "hub", "repository": arguments.repository, "revision": revision
        }  # fmt: skip
    if arguments.path:
        given["source"] = {"kind": "local", "path": arguments.path}
    if arguments.gpu:
        given["placement"] = {
            "kind": "gpu",
            "gpu_uuids": arguments.gpu,
            "memory_fraction": arguments.memory_fraction,
        }
    if arguments.cpu_kv_cache:
        given["placement"] = {"kind": "cpu", "kv_cache_mib": arguments.cpu_kv_cache}
    return {key: value for key, value in given.items() if value is not None}


def command_model_list(arguments: argparse.Namespace) -> int:
    snapshot = open_manager().snapshot()
    if arguments.json:
        out_json(status_facts(snapshot)["models"])
    else:
        out_table(MODEL_HEADERS, model_rows(snapshot))
    return DONE


def command_model_show(arguments: argparse.Namespace) -> int:
    manager = open_manager()
    state = manager.state()
    out_json(asdict(state.model(arguments.name)))
    return DONE


def command_key_create(arguments: argparse.Namespace) -> int:
    request = KeyRequest(
        alias=arguments.name,
        models=tuple(arguments.model),
        days=arguments.days,
        rpm_limit=arguments.rpm,
        tpm_limit=arguments.tpm,
    )
    manager = open_manager()
    secret = manager.create_key(request).get_secret_value()
    if arguments.json:
        out_json({"name": request.alias, "key": secret})
    else:
        out(hand_out(manager.state(), request, secret))
    return DONE


def command_key_list(arguments: argparse.Namespace) -> int:
    keys = open_manager().list_keys()
    if arguments.json:
        out_json([asdict(key) for key in keys])
    else:
        out_table(KEY_HEADERS, key_rows(keys))
    return DONE


def command_key_revoke(arguments: argparse.Namespace) -> int:
    open_manager().revoke_key(arguments.name)
    out(f"Revoked {arguments.name}.")
    return DONE


def command_config_show(_: argparse.Namespace) -> int:
    shown = asdict(open_manager().state())
    out_json(shown)  # a SecretStr prints as stars
    return DONE


def command_config_check(_: argparse.Namespace) -> int:
    manager = open_manager()
    out(f"{manager.home / 'config.json'} is sound: {len(manager.state().models)} models.")
    return DONE


def command_config_set(arguments: argparse.Namespace) -> int:
    given = {
        "hostnames": arguments.hostname,
        "address": arguments.address,
        "https_port": arguments.https_port,
        "http_port": arguments.http_port,
    }
    if arguments.tls:
        given["tls"] = tls_settings(
            arguments.tls,
            arguments.certificate,
            arguments.key,
            arguments.email,
            arguments.acme_directory,
        )
    changes = {key: value for key, value in given.items() if value is not None}
    open_manager().save(configuring_edge(changes))
    out("Saved. Next: llm_manager.py plan")
    return DONE


def command_config_token(_: argparse.Namespace) -> int:
    """Never an argument: those are visible to every user of the server."""
    token = getpass("Hugging Face token: ") if sys.stdin.isatty() else sys.stdin.readline()
    open_manager().save(setting_hub_token(token.strip()))
    out("Saved. Next: llm_manager.py plan")
    return DONE


def command_image_list(arguments: argparse.Namespace) -> int:
    manager = open_manager()
    pinned = asdict(manager.state().images)
    if arguments.json:
        out_json(pinned)
        return DONE
    present = manager.observe().images
    rows = [[k, v, "here" if v in present else "not pulled"] for k, v in pinned.items()]
    out_table(("Role", "Image", "On this server"), rows)
    return DONE


def command_image_set(arguments: argparse.Namespace) -> int:
    open_manager().save(pinning_image(arguments.role, arguments.image))
    out("Saved. Next: llm_manager.py plan")
    return DONE


def command_install(arguments: argparse.Namespace) -> int:
    """Write the unit, make the home, enable the service."""
    if os.geteuid() != 0:
        raise RefusedError(
            "Only root can install a system service.",
            advice="Run: sudo python3 llm_manager.py install",
        )
    template = PROGRAM.with_name("llm-manager.service").read_text()
    unit = arguments.root / "etc/systemd/system/llm-manager.service"
    home = find_home()
    with file_errors("write the systemd unit"):
        unit.parent.mkdir(parents=True, exist_ok=True)
        unit.write_text(render_unit(template, python=sys.executable,
                                    program=str(PROGRAM), home=str(home)))  # fmt: skip
    out(f"Wrote {unit}; state will live in {home}.")
    if arguments.no_start:
        return DONE
    for command in (["daemon-reload"], ["enable", "--now", "llm-manager.service"]):
        if subprocess.run(["systemctl", *command], check=False).returncode:  # noqa: S603, S607
            raise ManagerError(
                f"`systemctl {' '.join(command)}` failed.",
                advice="Read what it says above, mend that, then run `install` again.",
            )
    out("The console runs as a service. Its address: llm_manager.py url")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
