#!/usr/bin/env python3
"""LLM Manager: the operator console of a shared GPU server, in one file.

Outline (search for "§5"; tests/test_layout.py keeps it true):
  §1  Start-up           effects  its own virtual environment, before anything else
  §2  Foundations        pure     names, constants, errors
  §3  Data model         pure     config.json as typed dataclasses, its rules and migrations
  §4  Hardware           pure     GPUs as values: what they are, how they are joined, who holds them
  §5  MIG layouts        pure     every way to cut a card, and the one that serves a wish
  §6  Placement          pure     who gets which GPU or slice, and whether it is theirs alone
  §7  Memory fit         pure     what a model needs of a GPU, and what its engine reported
  §8  Weights            pure     repositories, what to fetch of them, and what is stored here
  §9  Routes             pure     public names, who answers for them, and how
  §10 Usage              pure     who used how much, and the queries that tell
  §11 Energy             pure     joules from looks at GPUs, and whose they are
  §12 Benchmark          pure     loads to offer, and what engines made of them
  §13 Config generation  pure     containers, LiteLLM's YAML, the Caddyfile
  §14 Monitoring         pure     scrape targets, dashboards and alerts
  §15 Steps              pure     what is observed, and all that can be done about it
  §16 Planning           pure     desired + observed -> Plan
  §17 Changes            pure     what an operator can ask for
  §18 Keys               pure     what a colleague may, groups, and many keys at once
  §19 Proofs             pure     what every way in should answer, and what must be found nowhere
  §20 Views              pure     what the operator reads
  §21 Hardware views     pure     GPUs, slices and restores as the operator sees them
  §22 Library views      pure     weights, fit and images as the operator sees them
  §23 Route views        pure     the ways in as the operator sees them
  §24 Usage views        pure     use as the operator sees it
  §25 Energy views       pure     energy and benchmarks as the operator sees them
  §26 Home               effects  time, and the state and files on the disk
  §27 Containers         effects  Docker
  §28 Images             effects  pulled, built from recipes, pruned
  §29 Requests           effects  HTTP to containers on the bridge, LiteLLM's management API
  §30 Database           effects  PostgreSQL
  §31 Energy records     effects  SQLite
  §32 Hub                effects  Hugging Face, downloads, and the cache on the disk
  §33 Drivers            effects  NVML, and what the system knows about GPUs
  §34 Orchestration      effects  Plan -> world, undo, jobs
  §35 Manager            effects  the use cases; all that console and command line may call
  §36 Programs           effects  the REST API, and who may use it
  §37 Terminal           effects  a live view for an SSH session
  §38 Console            effects  one builder per tab, and who may open it
  §39 Main               effects  arguments, wiring, systemd
"""

from __future__ import annotations

import os
import subprocess
import sys
from hashlib import sha256
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path, PurePath, PurePosixPath
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
PACKAGES: Final = (
    "docker", "fastapi", "gradio", "httpx", "huggingface_hub", "psycopg", "pydantic", "pynvml",
    "yaml",
)  # fmt: skip


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


class LazyModule(ModuleType):
    """Imported on first use: Gradio costs 2 s that `status` need not pay.

    Unlike the standard library's LazyLoader (3.11) it may be first used by two threads at once.
    """

    def __getattr__(self, name: str) -> object:
        return getattr(import_module(self.__name__), name)


if __name__ == "__main__":
    ensure_packages()

import argparse
import base64
import bisect
import calendar
import concurrent.futures
import contextlib
import contextvars
import csv
import ctypes
import difflib
import errno
import fcntl
import glob
import hmac
import html
import io
import itertools
import json
import logging
import math
import platform
import pwd
import re
import secrets
import shlex
import shutil
import signal
import socket
import ssl
import tarfile
import tempfile
import threading
import time
import uuid
import wave
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, date, datetime, timedelta
from functools import cache, partial, reduce
from getpass import getpass
from http import HTTPStatus
from typing import (
    IO,
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    NewType,
    Protocol,
    Required,
    Self,
    TypeVar,
    assert_never,
    cast,
    get_args,
)
from urllib.parse import parse_qs, quote, urlencode, urlsplit

import docker
import docker.errors
import docker.types
import httpx
import pydantic
import requests.exceptions
import urllib3.exceptions
import yaml
from docker.models.containers import Container
from typing_extensions import TypedDict

if TYPE_CHECKING:
    import fastapi
    import gradio as gr
    import httpx2
    import huggingface_hub
    import pandas as pd
    import psycopg
    import pynvml
    import uvicorn
else:
    fastapi, gr, httpx2, huggingface_hub, pd, psycopg, pynvml, uvicorn = map(
        LazyModule,
        ("fastapi", "gradio", "httpx2", "huggingface_hub", "pandas", "psycopg", "pynvml",
         "uvicorn"),
    )  # fmt: skip

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
HOST_NAME: Final = "host.docker.internal"  # this server, seen from a container

LABEL_OWNER: Final = "managed-by"
OWNER: Final = "llm-manager"
LABEL_INSTANCE: Final = "llm-manager.instance"
LABEL_SPEC_HASH: Final = "llm-manager.spec-hash"
LABEL_ROLE: Final = "llm-manager.role"
LABEL_MODEL_NAME: Final = "model-name"
LABEL_MODEL_TYPE: Final = "model-type"
LABEL_SERVED_NAME: Final = "llm-manager.served-model-name"
# Containers inherit their image's labels: an image must not carry those that make them ours.
LABEL_IMAGE_INSTANCE: Final = "llm-manager.image.instance"
LABEL_IMAGE_RECIPE: Final = "llm-manager.image.recipe"
LABEL_IMAGE_HASH: Final = "llm-manager.image.hash"

# The first start migrates LiteLLM's database (213 migrations); a slow disk needs minutes.
DATABASE_START_SECONDS: Final = 300.0
GATEWAY_START_SECONDS: Final = 600.0
EDGE_START_SECONDS: Final = 60.0
ENGINE_START_SECONDS: Final = 3600.0  # a 400 GB model over a slow disk
SLOT_PAUSE_SECONDS: Final = 2.0
DRAIN_SECONDS: Final = 300

# libyaml's dumper writes the same text six times faster; 200 models are a real size.
YAML_DUMPER: Final = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
YAML_LOADER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

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


class UnknownError(RefusedError):
    """There is nothing of the name that was given."""


class InvalidError(RefusedError):
    """What was typed is not what can be asked for, whatever else there is."""


class BusyError(ManagerError):
    """Another change is under way in this installation."""


class DockerAbsentError(ManagerError):
    """The Docker engine does not answer at all."""


class ContainerFailedError(ManagerError):
    """Docker refused a container, or it stopped before it was ready."""


class ContainerGoneError(ContainerFailedError):
    """The container that was meant is not there."""


class HardwareError(ManagerError):
    """The NVIDIA driver refused, or what it has is not what was asked for."""


class NotBegunError(HardwareError):
    """A step was refused before it had any effect: there is nothing of it to undo."""


class GatewayError(ManagerError):
    """LiteLLM's management API refused, or does not answer."""


class DatabaseError(ManagerError):
    """PostgreSQL does not answer, or not that."""


class ProviderError(ManagerError):
    """A provider does not answer, or not with its models."""


class CancelledError(ManagerError):
    """The operator took the change back; it was undone."""


def mask_secrets(text: str) -> str:
    """Generated text as it may be shown: a key's hash in its place, so that another one is seen."""

    def mask(found: re.Match[str]) -> str:
        return f"{found[1]}({sha256(found[2].encode()).hexdigest()[:8]})"

    text = re.sub(r"(Bearer )([^\s\"]+)", mask, text)
    pem = r"(?s)(-----BEGIN [A-Z ]*PRIVATE KEY-----)(.*?)(?=-----END|\Z)"
    return re.sub(pem, mask, text)


def hide_keys(text: str) -> str:
    """A text without the keys and tokens that somebody typed where a name was asked for."""
    return re.sub(r"\b(sk|admin)-[\w-]{16,}", r"\1-…", text)


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


def format_size(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:  # noqa: PLR2004
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


# =============================================================================
# §3 Data model — pure: config.json as typed dataclasses, its rules and migrations
# =============================================================================

SCHEMA_VERSION: Final = 1

ModelType = Literal[
    "chat", "vision", "embedding", "rerank", "speech-to-text", "text-to-speech", "image"
]
Wish = Literal["running", "stopped"]
MODEL_TYPES: Final[tuple[ModelType, ...]] = get_args(ModelType)
OMNI_TYPES: Final = frozenset[ModelType]({"text-to-speech", "image"})  # vLLM-Omni serves these
Device = Literal["gpu", "cpu"]


@dataclass(frozen=True, slots=True)
class _TextRule(pydantic.AfterValidator):
    """A validator that the REST API's document tells of."""

    pattern: str
    longest: int

    def __get_pydantic_json_schema__(self, schema: Any, handler: Callable[[Any], Json]) -> Json:
        return handler(schema) | {"pattern": f"^({self.pattern})$", "maxLength": self.longest}


def _checked(pattern: str, rule: str, *, longest: int) -> _TextRule:
    """A text that matches the whole pattern; the fault repeats the rule in words."""
    compiled = re.compile(pattern, re.ASCII)  # as in JSON Schema

    def check(text: str) -> str:
        if len(text) > longest or not compiled.fullmatch(text):
            raise ValueError(f"{text!r} must be {rule}, at most {longest} characters")
        return text

    return _TextRule(check, pattern, longest)


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
ROUTE_NAME_RULE: Final = _checked(
    r"[A-Za-z0-9][A-Za-z0-9._:/-]*\*?",
    "letters, digits and . _ : / -, with * at its end for a pattern", longest=128,
)  # fmt: skip
TARGET_RULE: Final = _checked(
    r"[a-z0-9-]+(/[A-Za-z0-9@._:/+-]*\*?)?", "a model's name, or provider/model", longest=192
)
FALLBACK_RULE: Final = _checked(
    r"[A-Za-z0-9][A-Za-z0-9@._:/+-]*",
    "a public name, a model's name, or provider/model",
    longest=192,
)
BEARER_RULE: Final = re.compile(r"sk-[A-Za-z0-9_-]{8,}")


def _bearer(secret: pydantic.SecretStr) -> pydantic.SecretStr:
    """Caddy compares it letter for letter: nothing in it may mean anything there."""
    if not BEARER_RULE.fullmatch(secret.get_secret_value()):
        raise ValueError("it must be sk- and 8 or more letters, digits, _ or -")
    return secret


HOSTNAME_RULE: Final = _checked(
    r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", "a lower-case host name or IPv4 address", longest=253
)
PATH_RULE: Final = _checked(
    r"/[^\x00-\x1f\x7f:,\"\\{}]+", "an absolute path without control characters or : , \" \\ { }",
    longest=1024,
)  # fmt: skip
URL_RULE: Final = _checked(
    r"https?://[^\s\x00-\x1f\x7f\"\\{}]+", "an http:// or https:// address", longest=512
)

Name = Annotated[str, NAME_RULE]
ImageRef = Annotated[str, IMAGE_RULE]
AbsolutePath = Annotated[str, PATH_RULE]
Port = Annotated[int, pydantic.Field(ge=1, le=65535)]


def _tell_kind(schema: Json) -> None:
    """What tells a union's members apart must be given, whatever else there is a default for."""
    if "kind" in schema["properties"]:
        schema["required"] = sorted({*schema.get("required", ()), "kind"})


_strict = pydantic.with_config(pydantic.ConfigDict(extra="forbid", json_schema_extra=_tell_kind))


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


def format_source(source: HubSource | LocalSource) -> str:
    match source:
        case HubSource(repository=repository, revision=revision):
            return f"{repository}@{revision[:12]}" if revision else repository
        case LocalSource(path=path):
            return path
        case _:
            assert_never(source)


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
    open_route: bool = False  # reachable at /open/{name}/v1 while the edge opens such routes
    wish: Wish = "stopped"


@_strict
@dataclass(frozen=True, kw_only=True, slots=True)
class Images:
    """The image of every component, pinned; changing one is a planned change."""

    # vLLM-Omni needs a vLLM of the same major.minor; both stay at the newest that agree.
    vllm: ImageRef = "vllm/vllm-openai:v0.30.0"
    vllm_cpu: ImageRef = "vllm/vllm-openai-cpu:v0.30.0-x86_64"
    vllm_omni: ImageRef = "vllm/vllm-omni:v0.30.0"
    # Its long-term line, and the one that our tests run on; below 1.103.1 there are known holes.
    litellm: ImageRef = "ghcr.io/berriai/litellm:v1.108.11"
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
class RecipeImage:
    """The image that serves a recipe on a device: changed by a successful build alone."""

    recipe: Name
    device: Device
    image: ImageRef


def _sendable(key: pydantic.SecretStr) -> pydantic.SecretStr:
    if not re.fullmatch(r"[!-~]{1,1024}", key.get_secret_value()):
        raise ValueError("a key is at most 1024 visible ASCII characters")
    return key


ProviderKind = Literal["openai", "ollama", "llama.cpp", "lm-studio", "exo", "cloud"]
PROVIDER_KINDS: Final[tuple[ProviderKind, ...]] = get_args(ProviderKind)


@_strict
@dataclass(frozen=True, kw_only=True, slots=True)
class Provider:
    """A server of models that runs elsewhere; a cloud is known to LiteLLM by its vendor's name.

    Its address may name this server itself: `host.docker.internal`.
    """

    name: Name
    kind: ProviderKind
    base_url: Annotated[str, URL_RULE] | None = None
    vendor: Annotated[str, _checked(r"[a-z0-9_]+", "LiteLLM's name of it", longest=40)] | None = (
        None
    )
    api_key: Annotated[pydantic.SecretStr, pydantic.AfterValidator(_sendable)] | None = None


Strategy = Literal["least-busy", "latency", "usage", "shuffle", "weighted", "in-order"]
STRATEGIES: Final[tuple[Strategy, ...]] = get_args(Strategy)
RouteName = Annotated[str, ROUTE_NAME_RULE]
# Of a route that says nothing else.
TIMEOUT_SECONDS: Final = 600
RETRIES: Final = 2
# allowed_fails 1 would make LiteLLM retry the same bad replica, and then leave the group.
FAILURES_ALLOWED: Final = 0
COOLDOWN_SECONDS: Final = 10


@_strict
@dataclass(frozen=True, kw_only=True, slots=True)
class Route:
    """A public name and who answers for it; one named as a model's own stands in its place.

    Members are models by name and providers' models as `provider/model`; a pattern such as `lab/*`
    has one like `provider/*`. Weights are the members' shares, however many replicas each has.
    Where all of a route fail, its fallbacks, which are public names or members, are tried in order;
    where a prompt is too long for them, its context fallbacks.
    """

    name: RouteName
    members: Annotated[tuple[Annotated[str, TARGET_RULE], ...], pydantic.Field(min_length=1)]
    weights: tuple[Annotated[int, pydantic.Field(ge=1, le=1000)], ...] = ()
    aliases: tuple[Annotated[str, SERVED_NAME_RULE], ...] = ()
    strategy: Strategy = "least-busy"
    fallbacks: tuple[Annotated[str, FALLBACK_RULE], ...] = ()
    context_fallbacks: tuple[Annotated[str, FALLBACK_RULE], ...] = ()
    timeout_seconds: Annotated[int, pydantic.Field(ge=1, le=3600)] = TIMEOUT_SECONDS
    retries: Annotated[int, pydantic.Field(ge=0, le=10)] = RETRIES
    # Of one member, within a cool-down.
    failures_allowed: Annotated[int, pydantic.Field(ge=0, le=1000)] = FAILURES_ALLOWED
    cooldown_seconds: Annotated[int, pydantic.Field(ge=0, le=3600)] = COOLDOWN_SECONDS
    parallel: Annotated[int, pydantic.Field(ge=1, le=10_000)] | None = None  # for each replica
    cache_seconds: Annotated[int, pydantic.Field(ge=1, le=30 * 86400)] | None = None


@_strict
@dataclass(frozen=True, kw_only=True, slots=True)
class DirectKey:
    """A key for `/models/{name}/v1`, checked by Caddy; no models means all of them.

    In an `emergency` it opens `/v1` too, as LiteLLM's master key, which needs no database.
    """

    name: Name
    secret: Annotated[pydantic.SecretStr, pydantic.AfterValidator(_bearer)]
    models: tuple[ModelName, ...] = ()
    emergency: bool = False

    def opens(self, model: ModelName) -> bool:
        return not self.models or model in self.models


@_strict
@dataclass(frozen=True, kw_only=True, slots=True)
class AdminToken:
    """What opens the REST API to a program; of its secret only the SHA-256 is known."""

    name: Name
    sha256: Annotated[str, _checked(r"[0-9a-f]{64}", "a SHA-256", longest=64)]


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
    open_routes: bool = False  # off closes every open route at once
    max_request_mib: Annotated[int, pydantic.Field(ge=1, le=4096)] = 64

    def opens(self, model: Model) -> bool:
        """Whether anybody may reach a model while it runs."""
        return self.open_routes and model.open_route


PriceOfMillion = Annotated[float, pydantic.Field(ge=0, le=1e9)]
ANY_MODEL: Final = "*"


@_strict
@dataclass(frozen=True, kw_only=True, slots=True)
class Price:
    """What a million tokens of a model cost, on statements alone."""

    model: Annotated[str, _checked(r"\S+", "a model's name, or * for all others", longest=256)]
    prompt: PriceOfMillion
    completion: PriceOfMillion


@_strict
@dataclass(frozen=True, kw_only=True, slots=True)
class Prices:
    """The operator's own price list."""

    currency: Annotated[str, _checked(r"[A-Z]{3}", "three letters such as EUR", longest=3)] = "EUR"
    models: tuple[Price, ...] = ()

    def cost(self, model: str, prompt_tokens: int, completion_tokens: int) -> float | None:
        """None where the model has no price."""
        known = {price.model: price for price in self.models}
        price = known.get(model) or known.get(ANY_MODEL)
        if price is None:
            return None
        return (prompt_tokens * price.prompt + completion_tokens * price.completion) / 1e6


@_strict
@dataclass(frozen=True, kw_only=True, slots=True)
class MigLayout:
    """The wished slices of one GPU as (profile, start); none means MIG off.

    A GPU without a layout is left as it is found.
    """

    gpu_uuid: GpuUuid
    slices: tuple[tuple[str, int], ...]


@_strict
@dataclass(frozen=True, kw_only=True, slots=True)
class Housekeeping:
    """How long LiteLLM's database keeps a row for every request, and how many dumps stay."""

    retention_days: Annotated[int, pydantic.Field(ge=1, le=3650)] | None = 90  # None: for ever
    dumps_kept: Annotated[int, pydantic.Field(ge=1, le=1000)] = 7  # of those nobody named


@_strict
@dataclass(frozen=True, kw_only=True, slots=True)
class EnergySettings:
    """How often GPUs are looked at, and what a kilowatt-hour is worth; None where nobody said.

    `overhead` is what the room takes for each kilowatt-hour of a GPU, itself included (PUE).
    """

    period_seconds: Annotated[float, pydantic.Field(ge=0.1, le=60)] = 1.0
    price_per_kwh: Annotated[float, pydantic.Field(ge=0, le=1000)] | None = None  # Prices.currency
    co2_grams_per_kwh: Annotated[float, pydantic.Field(ge=0, le=5000)] | None = None
    overhead: Annotated[float, pydantic.Field(ge=1, le=5)] = 1.0


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
    recipe_images: tuple[RecipeImage, ...] = ()
    providers: tuple[Provider, ...] = ()
    routes: tuple[Route, ...] = ()
    direct_keys: tuple[DirectKey, ...] = ()
    admin_tokens: tuple[AdminToken, ...] = ()
    edge: Edge = field(default_factory=Edge)
    mig_layouts: tuple[MigLayout, ...] = ()
    prices: Prices = field(default_factory=Prices)
    monitoring: bool = False
    housekeeping: Housekeeping = field(default_factory=Housekeeping)
    energy: EnergySettings = field(default_factory=EnergySettings)
    hugging_face_home: AbsolutePath | None = None
    secrets: Secrets

    def model(self, name: str) -> Model:
        """The registered model of that name, or a refusal that lists what there is."""
        for model in self.models:
            if model.name == name:
                return model
        known = ", ".join(model.name for model in self.models) or "none yet"
        raise UnknownError(
            f"There is no model called {name!r}.", advice=f"Registered models: {known}."
        )

    def provider(self, name: str) -> Provider:
        """The provider of that name, or a refusal that lists what there is."""
        for provider in self.providers:
            if provider.name == name:
                return provider
        known = ", ".join(provider.name for provider in self.providers) or "none yet"
        raise UnknownError(f"There is no provider called {name!r}.", advice=f"Providers: {known}.")

    def with_model(self, model: Model) -> State:
        """This state with the model added, or put in the place of its namesake."""
        if any(known.name == model.name for known in self.models):
            models = tuple(model if m.name == model.name else m for m in self.models)
        else:
            models = (*self.models, model)
        return replace(self, models=models)

    def recipe_image(self, recipe: str, device: Device) -> str | None:
        """The pinned image of a recipe; None before it was ever asked for."""
        pins = (p.image for p in self.recipe_images if (p.recipe, p.device) == (recipe, device))
        return next(pins, None)

    def with_recipe_image(self, pin: RecipeImage) -> State:
        others = (p for p in self.recipe_images if (p.recipe, p.device) != (pin.recipe, pin.device))
        return replace(self, recipe_images=(*others, pin))

    @property
    def wished_models(self) -> tuple[Model, ...]:
        return tuple(model for model in self.models if model.wish == "running")

    @property
    def wishes_anything(self) -> bool:
        """Whether there is anything to bring back after a reboot."""
        return self.endpoint == "running" or bool(self.mig_layouts) or bool(self.wished_models)

    def layout_of(self, gpu_uuid: str) -> MigLayout | None:
        return next((wish for wish in self.mig_layouts if wish.gpu_uuid == gpu_uuid), None)


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
        *_doubles("public name", public_names(state)),
        *(
            f"the route {route.name}: {fault}"
            for route in state.routes
            for fault in _misfits(route)
        ),
        *_doubles("direct key", [k.name for k in state.direct_keys]),
        *_doubles("admin token", [token.name for token in state.admin_tokens]),
        *_doubles("recipe image", [f"{p.recipe} ({p.device})" for p in state.recipe_images]),
        *_doubles("MIG layout", [layout.gpu_uuid for layout in state.mig_layouts]),
    ]
    if state.edge.https_port == state.edge.http_port:
        faults.append(f"HTTP and HTTPS cannot both use port {state.edge.http_port}")
    if faults:
        raise RefusedError(f"{'; '.join(faults)}.", advice="Change one of them.")


def public_names(state: State) -> list[str]:
    """What a request may name, patterns included; a route of a model's own name stands for it."""
    routed = [name for route in state.routes for name in (route.name, *route.aliases)]
    stood_for = {route.name for route in state.routes}
    return routed + [n for m in state.models if (n := m.served_model_name) not in stood_for]


def _misfits(route: Route) -> Iterator[str]:
    """What of a route does not fit together, whatever else there is."""
    pattern = route.name.endswith("*")
    if pattern != any(target.endswith("*") for target in route.members):
        yield "a pattern like lab/* has a member like provider/*, and nothing else has"
    if pattern and (route.aliases or route.fallbacks or route.context_fallbacks):
        # LiteLLM 1.109 looks for the fallbacks of the name that was requested, and finds none.
        yield "a pattern has no aliases and no fallbacks; give it members in order instead"
    if bool(route.weights) != (route.strategy == "weighted"):
        yield "weights and the strategy weighted belong together"
    elif route.weights and len(route.weights) != len(route.members):
        yield f"members: {len(route.members)}, weights: {len(route.weights)}"
    yield from _doubles("member", route.members)


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


# =============================================================================
# §4 Hardware — pure: GPUs as values: what they are, how they are joined, who holds them
# =============================================================================

ROUNDING: Final = 1e-6  # of memory fractions that add up
Slice = tuple[str, int]  # profile name and first unit: what a slice is after every reboot


@dataclass(frozen=True, kw_only=True, slots=True)
class MigProfile:
    """One way to cut: how large the slice is, and where on the memory axis it may begin."""

    name: str
    driver_id: int
    most: int
    memory_mib: int | None
    multiprocessors: int | None
    size: int
    starts: tuple[int, ...]

    @property
    def compute_slices(self) -> int:
        return int(self.name.partition("g")[0])

    @property
    def variant(self) -> str:
        """What follows the size: `+me`, `+me.all`, `-me`, `+gfx`, or nothing."""
        return re.sub(r"^\d+g\.\d+gb", "", self.name)

    @property
    def usable_mib(self) -> int:
        """Its memory; where nobody published it, what such slices have of their name's size."""
        if self.memory_mib is not None:
            return self.memory_mib
        large = 3  # compute slices from which on 97 % of the named GiB are there, else 88 %
        part = 0.97 if self.compute_slices >= large else 0.88
        return int(int(re.findall(r"(\d+)gb", self.name)[0]) * 1024 * part)


@dataclass(frozen=True, kw_only=True, slots=True)
class MigGeometry:
    """How one card can be cut; `memory_units` is the length of the axis that starts count on."""

    card: str
    compute_slices: int
    memory_units: int
    profiles: tuple[MigProfile, ...]

    def profile(self, name: str) -> MigProfile:
        """The profile of that name, or a refusal that lists what there is."""
        for profile in self.profiles:
            if profile.name == name:
                return profile
        names = [profile.name for profile in self.profiles]
        near = difflib.get_close_matches(name, names, n=1)
        meant = f"Did you mean {near[0]}? " if near else ""
        raise RefusedError(
            f"{self.card} has no MIG profile {name!r}.", advice=f"{meant}It has {', '.join(names)}."
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class MigDevice:
    """A slice as the driver has it now; without a UUID its compute instance is missing."""

    profile: str
    start: int
    uuid: str | None
    memory_mib: int | None = None

    @property
    def slice(self) -> Slice:
        return self.profile, self.start


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuClient:
    """Somebody who holds a GPU open: a process, and the container it runs in if any."""

    pid: int
    name: str
    container_id: str | None = None
    slice: Slice | None = None
    computes: bool = True  # False: it only has the device open, as monitors and daemons do
    is_manager: bool = False  # another LLM Manager, which looks at GPUs as this one does


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """A GPU at one moment; None is unknown, and never zero."""

    uuid: GpuUuid
    index: int = 0
    name: str | None = None
    memory_mib: int | None = None
    memory_used_mib: int | None = None
    architecture: str | None = None
    compute_capability: str | None = None
    pci_bus_id: str | None = None
    pci_device: str | None = None
    numa_node: int | None = None
    temperature_c: int | None = None
    utilisation_percent: int | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    power_range_w: tuple[float, float] | None = None
    energy_j: float | None = None
    ecc_enabled: bool | None = None
    ecc_uncorrected: int | None = None
    xids: tuple[int, ...] | None = None
    persistence: bool | None = None
    mig_enabled: bool | None = None  # None: this GPU cannot be cut
    mig_pending: bool | None = None
    geometry: MigGeometry | None = None
    slices: tuple[MigDevice, ...] | None = ()  # None: not allowed to see them
    clients: tuple[GpuClient, ...] | None = ()  # None: nobody could be asked

    @property
    def title(self) -> str:
        return f"GPU {self.index}"

    @property
    def layout(self) -> frozenset[Slice]:
        return frozenset(device.slice for device in self.slices or ())

    def is_cut_as(self, slices: Collection[Slice]) -> bool:
        """Whether it has exactly these slices, each whole, and the mode they need."""
        whole = all(device.uuid is not None for device in self.slices or ())
        return self.layout == {*slices} and whole and bool(self.mig_enabled) == bool(slices)

    def device(self, wanted: Slice) -> MigDevice | None:
        return next((d for d in self.slices or () if d.slice == wanted), None)


LinkKind = Literal["NVSwitch", "NVLink", "board", "PIX", "PXB", "PHB", "NODE", "SYS"]
# From the best joined to the worst, with what each means between two GPUs.
LINK_MEANINGS: Final[Mapping[LinkKind, str]] = {
    "NVSwitch": "NVLink through NVSwitch",
    "NVLink": "a direct NVLink bridge",
    "board": "one board",
    "PIX": "one PCIe switch",
    "PXB": "several PCIe switches",
    "PHB": "the processor's PCIe root",
    "NODE": "one NUMA node, two PCIe roots",
    "SYS": "the bus between processors",
}


@dataclass(frozen=True, slots=True)
class Link:
    """How two GPUs are joined; `lanes` counts active NVLinks."""

    kind: LinkKind
    lanes: int = 0

    @property
    def rank(self) -> tuple[int, int]:
        """Smaller is better joined."""
        return list(LINK_MEANINGS).index(self.kind), -self.lanes

    def __str__(self) -> str:
        return f"NV{self.lanes}" if self.kind in {"NVLink", "NVSwitch"} else self.kind


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """One look at the GPUs; `fault` says why there is nothing to see where that is so."""

    gpus: tuple[Gpu, ...] = ()
    links: Mapping[frozenset[GpuUuid], Link] = field(default_factory=dict)
    lost: tuple[str, ...] = ()
    driver_version: str | None = None
    cuda_version: str | None = None
    kernel_version: str | None = None  # of the loaded module
    library_version: str | None = None  # of the files that a container started now would get
    fault: ManagerError | None = None
    uses_cdi: bool = False  # the container toolkit keeps a list of devices for Docker
    cdi_missing: frozenset[str] = frozenset()  # today's slices that are not in it
    mig_manager: bool = False  # NVIDIA's own service, which cuts GPUs at boot

    @property
    def reboot_pending(self) -> bool:
        """Whether the driver was upgraded under the running kernel module."""
        known = self.kernel_version is not None and self.library_version is not None
        return known and self.kernel_version != self.library_version

    def gpu(self, gpu_uuid: str) -> Gpu | None:
        return next((gpu for gpu in self.gpus if gpu.uuid == gpu_uuid), None)

    def named(self, text: str) -> Gpu:
        """The GPU meant by its index, its UUID or the beginning of it."""
        digits = 8  # shorter numbers are indices, and a UUID's first part is not shorter
        for gpu in self.gpus:
            if text in {str(gpu.index), gpu.uuid}:
                return gpu
        start = text.removeprefix("GPU-")
        found = [gpu for gpu in self.gpus if gpu.uuid.removeprefix("GPU-").startswith(start)]
        if len(found) == 1 and start and not (start.isdigit() and len(start) < digits):
            return found[0]
        if self.fault is not None:
            raise self.fault
        known = ", ".join(f"{gpu.index} ({gpu.uuid[:12]}…)" for gpu in self.gpus) or "none"
        raise RefusedError(f"No GPU, or more than one, is {text!r}.", advice=f"GPUs: {known}.")


def parse_geometries(text: str) -> dict[str, MigGeometry]:
    """The tables of `recipes/mig.yaml`, by PCI device id and by part of a product's name."""
    tables = yaml.load(text, YAML_LOADER)  # noqa: S506 - the safe one, in C
    found: dict[str, MigGeometry] = {}
    for card in tables["cards"]:
        geometry = MigGeometry(
            card=card["card"],
            compute_slices=card["compute_slices"],
            memory_units=card["memory_units"],
            profiles=tuple(_profile_of(row) for row in card["profiles"]),
        )
        found |= dict.fromkeys([*card["devices"], *card.get("names", ())], geometry)
    return found


def _profile_of(row: Sequence[Any]) -> MigProfile:
    name, driver_id, most, memory_gib, multiprocessors, size, starts = row
    return MigProfile(
        name=name,
        driver_id=driver_id,
        most=most,
        memory_mib=None if memory_gib is None else int(memory_gib * 1024),
        multiprocessors=multiprocessors,
        size=size,
        starts=tuple(starts),
    )


def table_geometry(
    geometries: Mapping[str, MigGeometry], pci_device: str | None, name: str | None
) -> MigGeometry | None:
    """A card's table, for where its driver does not tell."""
    if pci_device is not None and pci_device in geometries:
        return geometries[pci_device]
    parts = [part for part in geometries if " " in part and part in (name or "")]
    return geometries[parts[0]] if parts else None


def profile_name(compute_slices: int, memory_mib: int, total_mib: int, variant: str) -> str:
    """The name NVIDIA gives a profile: its memory in eighths of the card's, in whole gigabytes.

    For drivers (before R530) that tell a profile's numbers and not its name.
    """
    eighths = -(-memory_mib * 8 // total_mib)
    gigabytes = -(-total_mib // 1024)
    return f"{compute_slices}g.{(eighths * gigabytes + 4) // 8}gb{variant}"


# NVML's numbers for profiles (nvml.h, NVML_GPU_INSTANCE_PROFILE_*) that mean a variant.
PROFILE_VARIANTS: Final[Mapping[int, str]] = {
    7: "+me", 8: "+me", 10: "+gfx", 11: "+gfx", 12: "+gfx", 13: "-me", 14: "-me",
    15: "+me.all", 16: "+me.all", 17: "+gfx",
}  # fmt: skip


def parse_visible_devices(text: str) -> frozenset[str]:
    """The UUIDs in what `nvidia-smi -L` prints; beside MIG devices no GPU counts.

    A container of ours has either whole GPUs or one slice, and then its card is listed as well.
    """
    migs = re.findall(r"\(UUID: (MIG-[^)\s]+)\)", text)
    return frozenset(migs or re.findall(r"\(UUID: (GPU-[^)\s]+)\)", text))


def parse_xids(kernel_log: str) -> dict[str, tuple[int, ...]]:
    """The driver's error numbers in a kernel log by PCI bus id, in the order they came."""
    found: dict[str, list[int]] = {}
    for bus, number in re.findall(r"NVRM: Xid \(PCI:([0-9a-fA-F:.]+)[^)]*\): (\d+)", kernel_log):
        found.setdefault(short_bus_id(bus), []).append(int(number))
    return {bus: tuple(numbers) for bus, numbers in found.items()}


def short_bus_id(bus_id: str) -> str:
    """`00000000:3B:00.0` of NVML and `0000:3b:00` of the kernel as the same text."""
    return bus_id.lower().partition(".")[0][-10:]


SERVICES: Final[Mapping[str, tuple[str, str]]] = {
    # program -> what it is, how to stop it
    "nv-hostengine": ("NVIDIA DCGM", "systemctl stop nvidia-dcgm"),
    "dcgm-exporter": ("the DCGM exporter", "docker stop its container"),
    "nvidia-persistenced": ("the persistence daemon", "systemctl stop nvidia-persistenced"),
    "nvidia-cuda-mps-server": ("CUDA MPS", "echo quit | nvidia-cuda-mps-control"),
    "nvsm_core": ("NVIDIA System Management", "systemctl stop nvsm"),
    "Xorg": ("a display server", "systemctl isolate multi-user.target"),
    "Xwayland": ("a display server", "systemctl isolate multi-user.target"),
    "gnome-shell": ("a desktop", "systemctl isolate multi-user.target"),
}


def describe_client(client: GpuClient) -> str:
    """`python (process 4711)`, and what a known service is."""
    known = SERVICES.get(client.name)
    return f"{client.name} (process {client.pid}{f', {known[0]}' if known else ''})"


def release_advice(clients: Sequence[GpuClient]) -> str:
    """How to make these let go; LLM Manager never ends what is not its own."""
    commands = [f"`{SERVICES[c.name][1]}`" for c in clients if c.name in SERVICES]
    if commands:
        return f"Stop it yourself: {', '.join(dict.fromkeys(commands))}."
    return "Ask who runs it, or stop it yourself; LLM Manager ends only what is its own."


# =============================================================================
# §5 MIG layouts — pure: every way to cut a card, and the one that serves a wish
# =============================================================================


@cache
def layouts(geometry: MigGeometry) -> Mapping[tuple[str, ...], tuple[frozenset[Slice], ...]]:
    """Every valid layout of a card, by the sorted names of its slices."""
    found: dict[tuple[str, ...], list[frozenset[Slice]]] = {}
    for slices in _grow(geometry, 0, ()):
        found.setdefault(tuple(sorted(name for name, _ in slices)), []).append(frozenset(slices))
    return {names: tuple(several) for names, several in found.items()}


def _grow(
    geometry: MigGeometry, unit: int, before: tuple[Slice, ...]
) -> Iterator[tuple[Slice, ...]]:
    """Each way to go on from one unit of the axis: leave it free, or begin a slice there."""
    if unit >= geometry.memory_units:
        yield before
        return
    yield from _grow(geometry, unit + 1, before)
    for profile in geometry.profiles:
        if unit in profile.starts and _may_join(geometry, profile, before):
            yield from _grow(geometry, unit + profile.size, (*before, (profile.name, unit)))


def _may_join(geometry: MigGeometry, joining: MigProfile, before: Sequence[Slice]) -> bool:
    """Whether a slice may be beside these, whatever their places."""
    others = [geometry.profile(name) for name, _ in before]
    compute = joining.compute_slices + sum(other.compute_slices for other in others)
    same = sum(other.name == joining.name for other in others)
    if compute > geometry.compute_slices or same >= joining.most:
        return False
    return _media_agree([joining.variant, *(other.variant for other in others)])


def _media_agree(variants: Sequence[str]) -> bool:
    """nvml.h: `+me` at most once; `+me.all` takes every media engine, so only `-me` beside it."""
    if "+me.all" in variants:
        return all(v == "-me" for v in variants if v != "+me.all") and variants.count("+me.all") < 2  # noqa: PLR2004
    return variants.count("+me") < 2  # noqa: PLR2004


def is_valid(geometry: MigGeometry, slices: Collection[Slice]) -> bool:
    """Whether the card can be cut exactly so."""
    names = tuple(sorted(name for name, _ in slices))
    return frozenset(slices) in layouts(geometry).get(names, ())


def full_layouts(geometry: MigGeometry) -> list[tuple[str, ...]]:
    """The layouts to offer: plain profiles, nothing left that a plain slice would fit into."""
    plain = [p for p in geometry.profiles if not p.variant]
    offered = [
        names
        for names, several in layouts(geometry).items()
        if all(not geometry.profile(name).variant for name in names)
        and any(not _room(geometry, slices, plain) for slices in several)
    ]
    return sorted(offered, key=lambda names: (len(names), [-_size(geometry, n) for n in names]))


def _size(geometry: MigGeometry, name: str) -> int:
    return geometry.profile(name).usable_mib


def _room(
    geometry: MigGeometry, slices: frozenset[Slice], profiles: Sequence[MigProfile]
) -> list[MigProfile]:
    """Which of the profiles would still fit beside these slices."""
    names = tuple(name for name, _ in slices)
    return [
        profile
        for profile in profiles
        for joined in (layouts(geometry).get(tuple(sorted((*names, profile.name))), ()),)
        if any(slices < layout for layout in joined)
    ]


def choose_layout(
    geometry: MigGeometry,
    wished: Sequence[str],
    *,
    existing: Collection[Slice] = (),
    staying: Collection[Slice] = (),
) -> frozenset[Slice]:
    """A layout of the wished profiles with explicit starts, so that no order matters.

    What is `staying` never moves; of what is `existing` as much stays as can. Among equals the
    one that leaves the largest room for what may come. Refused with the reason and what is near.
    """
    candidates = [
        layout
        for layout in layouts(geometry).get(tuple(sorted(wished)), ())
        if layout >= {*staying}
    ]
    if not candidates:
        raise _unable(geometry, wished, frozenset(staying))

    def worth(layout: frozenset[Slice]) -> tuple[int, int, int, list[int]]:
        room = _room(geometry, layout, geometry.profiles)
        largest = max((profile.size for profile in room), default=0)
        return (
            len(layout & {*existing}),
            largest,
            len(room),
            [-start for _, start in sorted(layout)],
        )

    return max(candidates, key=worth)


def _unable(
    geometry: MigGeometry, wished: Sequence[str], staying: frozenset[Slice]
) -> RefusedError:
    """Why no layout holds the wished slices, and the nearest one that there is."""
    for name in wished:
        geometry.profile(name)
    nearest = _nearest(geometry, wished, staying)
    advice = (
        f"The nearest that fits: {format_profiles(nearest)}." if nearest else "Free some first."
    )
    return RefusedError(
        f"{geometry.card} cannot hold {format_profiles(wished)}: "
        f"{_obstacle(geometry, wished, staying)}.",
        advice=advice,
    )


def _nearest(
    geometry: MigGeometry, wished: Sequence[str], staying: frozenset[Slice]
) -> tuple[str, ...]:
    """The layout that gives up least: no slice larger than wished, then the most memory."""

    def measured(names: Sequence[str]) -> list[tuple[int, int]]:
        profiles = [geometry.profile(name) for name in names]
        return sorted(((p.usable_mib, p.compute_slices) for p in profiles), reverse=True)

    ceiling = measured(wished)
    possible = (
        (measured(names), names)
        for names, several in layouts(geometry).items()
        if len(names) <= len(wished) and any(layout >= staying for layout in several)
    )
    near = [
        (
            sum(memory for memory, _ in sizes),
            sum(g for _, g in sizes),
            -_strangers(names, wished),
            names,
        )
        for sizes, names in possible
        if all(m <= top and g <= most for (m, g), (top, most) in zip(sizes, ceiling, strict=False))
    ]
    return max(near)[-1] if near else ()


def _strangers(names: Sequence[str], wished: Sequence[str]) -> int:
    return (Counter(names) - Counter(wished)).total()


def _obstacle(geometry: MigGeometry, wished: Sequence[str], staying: frozenset[Slice]) -> str:
    profiles = [geometry.profile(name) for name in wished]
    for profile in sorted(profiles, key=lambda profile: profile.name):
        if wished.count(profile.name) > profile.most:
            return f"at most {profile.most} of {profile.name} fit"
    compute = sum(profile.compute_slices for profile in profiles)
    if compute > geometry.compute_slices:
        return f"that is {compute} compute slices, and it has {geometry.compute_slices}"
    if not _media_agree([profile.variant for profile in profiles]):
        return "its media engines go to one slice only"
    units = sum(profile.size for profile in profiles)
    if units > geometry.memory_units:
        return f"that is {units} memory slices, and it has {geometry.memory_units}"
    if tuple(sorted(wished)) in layouts(geometry):
        return f"it would fit if {format_slices(staying)} could move"
    return "their allowed places overlap"


def format_profiles(names: Sequence[str]) -> str:
    """`3g.20gb + 2x 1g.5gb`, the largest first."""
    counted = sorted(Counter(names).items(), key=lambda item: (-int(item[0][0]), item[0]))
    return " + ".join(f"{count}x {name}" if count > 1 else name for name, count in counted)


def format_slices(slices: Collection[Slice]) -> str:
    """`3g.20gb at 0, 1g.5gb at 4`, along the card."""
    return ", ".join(f"{profile} at {start}" for profile, start in along(slices)) or "no slices"


def along(slices: Collection[Slice]) -> list[Slice]:
    """Slices in the order in which they lie on the card."""
    return sorted(slices, key=lambda wanted: (wanted[1], wanted[0]))


def parse_wish(text: str) -> list[str]:
    """Profiles as an operator types them: `3g.20gb, 2x 1g.5gb` or `3g.20gb + 1g.5gb`."""
    names: list[str] = []
    counted = re.sub(r"(?i)(\d)\s*[x\u00d7*]\s*", r"\1x", text)
    for part in filter(None, re.split(r"(?:\s\+\s|[,;\s])+", counted)):
        several = re.fullmatch(r"(\d{1,9})\d*x(.+)", part)
        # More than any card has is refused later, with what is near; a typo must not fill memory.
        names += [several[2]] * min(int(several[1]), 65) if several else [part]
    return names


def parse_needs(text: str) -> dict[str, int]:
    """`chat=15, embed=3.5` in GiB as MiB by model."""
    pairs = [part.split("=") for part in re.split(r"[\s,;]+", text) if part]
    try:
        needs = {name: math.ceil(float(gib) * 1024) for name, gib in pairs}
    except (ValueError, OverflowError):
        needs = {}
    if len(needs) < max(len(pairs), 1) or min(needs.values()) <= 0:
        raise RefusedError(
            f"{text!r} does not say how much memory each model needs.",
            advice="Write it in GiB, each model once: chat=15, embed=3.5",
        )
    return needs


def slices_for_needs(
    geometry: MigGeometry,
    needs: Mapping[str, int],
    *,
    existing: Collection[Slice] = (),
    bound: Mapping[str, Slice] | None = None,
) -> dict[str, Slice]:
    """A slice for each model by the MiB it needs: the least memory, then the most compute.

    `bound` models keep the slices they have. Refused with the models that would fit.
    """
    bound = bound or {}
    free = sorted(set(needs) - set(bound), key=lambda model: (-needs[model], model))
    best: tuple[tuple[int, int], tuple[str, ...]] | None = None
    for names in layouts(geometry):
        score = _serves(geometry, names, [needs[model] for model in free], bound)
        if score is not None and (best is None or score < best[0]):
            best = score, names
    if best is None:
        raise _too_much(geometry, needs, bound, free)
    staying = frozenset(bound.values())
    layout = choose_layout(geometry, best[1], existing=existing, staying=staying)
    rest = sorted(layout - staying, key=lambda s: (-_size(geometry, s[0]), s[1]))
    return {**bound, **dict(zip(free, rest, strict=True))}


def _serves(
    geometry: MigGeometry, names: Sequence[str], needs: Sequence[int], bound: Mapping[str, Slice]
) -> tuple[int, int] | None:
    """What these profiles cost as (memory units, minus compute), if they hold these needs."""
    fixed = frozenset(bound.values())
    rest = Counter(names) - Counter(name for name, _ in fixed)
    if rest.total() != len(needs) or len(names) != len(needs) + len(fixed):
        return None
    profiles = [geometry.profile(name) for name in rest.elements()]
    sizes = sorted((profile.usable_mib for profile in profiles), reverse=True)
    if any(profile.variant for profile in profiles):
        return None
    if any(size < need for size, need in zip(sizes, needs, strict=True)):
        return None
    if not any(layout >= fixed for layout in layouts(geometry)[tuple(sorted(names))]):
        return None
    return sum(p.size for p in profiles), -sum(p.compute_slices for p in profiles)


def _too_much(
    geometry: MigGeometry, needs: Mapping[str, int], bound: Mapping[str, Slice], free: Sequence[str]
) -> RefusedError:
    largest = max(geometry.profiles, key=lambda profile: profile.usable_mib)
    for model in free:
        if needs[model] > largest.usable_mib:
            return RefusedError(
                f"{model} needs {needs[model] / 1024:.1f} GiB, and the largest slice of "
                f"{geometry.card} has {largest.usable_mib / 1024:.1f} GiB.",
                advice="Give it whole GPUs.",
            )
    # The smallest first: as many models as can.
    for count in range(len(free) - 1, 0, -1):
        kept = free[-count:]
        with contextlib.suppress(RefusedError):
            chosen = slices_for_needs(geometry, {m: needs[m] for m in kept}, bound=bound)
            return RefusedError(
                f"{geometry.card} has no layout for {', '.join(free)} together.",
                advice=f"Without {', '.join(free[:-count])} it would be "
                f"{format_profiles([name for name, _ in chosen.values()])}.",
            )
    return RefusedError(
        f"{geometry.card} has no room beside {format_slices(bound.values())}.",
        advice="Move one of them to another GPU first.",
    )


# --- mig-parted's format -----------------------------------------------------

MigWishes = dict[GpuUuid, list[str]]


def parse_mig_parted(text: str, label: str | None, gpus: Sequence[Gpu]) -> MigWishes:
    """The wished profiles per GPU of one configuration in a mig-parted file; [] is MIG off."""
    try:
        loaded = yaml.safe_load(text)
        configs = {
            str(name): list(entries or ()) for name, entries in loaded["mig-configs"].items()
        }
    except (yaml.YAMLError, TypeError, KeyError, ValueError, AttributeError) as error:
        raise RefusedError(
            "That is no mig-parted file: it has no `mig-configs`.",
            advice="See `mig export` for what one looks like.",
        ) from error
    chosen = label or next(iter(configs), "")
    if chosen not in configs or (label is None and len(configs) > 1):
        raise RefusedError(
            f"The file has {', '.join(configs) or 'no configurations'}.",
            advice="Name one of them with --label.",
        )
    wishes: MigWishes = {}
    for entry in configs[chosen]:
        wishes |= _wishes_of(entry, gpus)
    return wishes


def _wishes_of(entry: Json, gpus: Sequence[Gpu]) -> MigWishes:
    try:
        parsed = _MIG_PARTED.validate_python(entry)
    except pydantic.ValidationError as error:
        raise RefusedError(
            f"An entry of that file has {describe_faults(error, entry)}.",
            advice="Correct the file; `mig export` shows the format.",
        ) from None
    filters = parsed.device_filter
    wanted = {filters.upper()} if isinstance(filters, str) else {one.upper() for one in filters}
    meant = [
        gpu
        for gpu in gpus
        if (parsed.devices == "all" or gpu.index in parsed.devices)
        and (not wanted or f"0X{gpu.pci_device}10DE" in wanted)
    ]
    names = [name for name, count in parsed.mig_devices.items() for _ in range(count)]
    if parsed.mig_enabled and not names:
        raise RefusedError(
            "That file enables MIG without any slices, and nothing could run there.",
            advice="List `mig-devices`, or set `mig-enabled: false`.",
        )
    return {gpu.uuid: names if parsed.mig_enabled else [] for gpu in meant}


@pydantic.with_config(pydantic.ConfigDict(extra="forbid"))
@dataclass(frozen=True, kw_only=True, slots=True)
class _MigPartedEntry:
    """One entry of a mig-parted configuration, checked before it is believed."""

    devices: Annotated[Literal["all"] | tuple[int, ...], pydantic.Field(alias="devices")]
    mig_enabled: Annotated[bool, pydantic.Field(alias="mig-enabled")]
    mig_devices: Annotated[
        dict[str, Annotated[int, pydantic.Field(ge=0, le=64)]], pydantic.Field(alias="mig-devices")
    ] = field(default_factory=dict)
    device_filter: Annotated[str | tuple[str, ...], pydantic.Field(alias="device-filter")] = ()


_MIG_PARTED: Final = pydantic.TypeAdapter(_MigPartedEntry)


def render_mig_parted(layouts_of: Mapping[int, Collection[Slice]], label: str) -> str:
    """Layouts by GPU index as mig-parted's YAML; that format knows no starts."""
    entries = [
        {
            "devices": [index],
            "mig-enabled": bool(slices),
            **({"mig-devices": dict(Counter(n for n, _ in sorted(slices)))} if slices else {}),
        }
        for index, slices in sorted(layouts_of.items())
    ]
    return yaml.dump(
        {"version": "v1", "mig-configs": {label: entries}}, Dumper=YAML_DUMPER, sort_keys=False
    )


# =============================================================================
# §6 Placement — pure: who gets which GPU or slice, and whether it is theirs alone
# =============================================================================


def gpus_of(model: Model) -> frozenset[GpuUuid]:
    """The GPUs that a model sits on, in whole or in part."""
    match model.placement:
        case GpuPlacement(gpu_uuids=uuids):
            return frozenset(uuids)
        case MigPlacement(gpu_uuid=gpu_uuid):
            return frozenset({gpu_uuid})
        case _:
            return frozenset()


def gpu_share(model: Model) -> float:
    """How much of each of its GPUs a model takes; without a memory fraction all of it."""
    fraction = (
        model.placement.memory_fraction if isinstance(model.placement, GpuPlacement) else None
    )
    return (fraction or 1.0) * model.replicas


def placement_faults(state: State) -> list[str]:
    """Every GPU or slice that the wished models book twice, and slices that no layout has."""
    cut = {layout.gpu_uuid: {*layout.slices} for layout in state.mig_layouts if layout.slices}
    wished = state.wished_models
    faults = [
        f"{m.name} is bound to the slice {format_slices([s])} of {p.gpu_uuid}, "
        "which is not in that GPU's wished layout"
        for m in wished
        if isinstance(p := m.placement, MigPlacement)
        and (s := (p.profile, p.start)) not in cut.get(p.gpu_uuid, set())
    ]
    faults += [
        f"{m.name} wants the whole of {gpu_uuid}, which is cut into MIG slices"
        for m in wished
        if isinstance(m.placement, GpuPlacement)
        for gpu_uuid in m.placement.gpu_uuids
        if gpu_uuid in cut
    ]
    return [*faults, *_booked_twice(wished)]


def _booked_twice(wished: Sequence[Model]) -> list[str]:
    """A model that names no memory fraction takes its GPU whole."""
    shares: dict[str, list[tuple[str, float]]] = {}
    for m in wished:
        match m.placement:
            case GpuPlacement(gpu_uuids=uuids):
                for gpu_uuid in uuids:
                    shares.setdefault(gpu_uuid, []).append((m.name, gpu_share(m)))
            case MigPlacement(gpu_uuid=gpu_uuid, profile=profile, start=start):
                where = f"{profile} at {start} of {gpu_uuid}"
                shares.setdefault(where, []).append((m.name, gpu_share(m)))
            case _:
                pass
    return [
        f"{' and '.join(name for name, _ in several)} {'book' if len(several) > 1 else 'books'} "
        f"{100 * sum(share for _, share in several):.4g} % of {where}"
        for where, several in sorted(shares.items())
        if sum(share for _, share in several) > 1 + ROUNDING
    ]


def placements(state: State) -> frozenset[tuple[str, Placement, int]]:
    """Who is wished where."""
    return frozenset((m.name, m.placement, m.replicas) for m in state.wished_models)


def check_placements(
    state: State, *, known: Collection[str] = (), hardware: Hardware | None = None
) -> None:
    """Refuse a wish in which a GPU would be booked twice unawares; `known` faults are old."""
    said = "; ".join(fault for fault in placement_faults(state) if fault not in known)
    for gpu in hardware.gpus if hardware else ():
        said = said.replace(gpu.uuid, gpu.title)
    if said:
        raise RefusedError(
            f"{said}.",
            advice="Stop one, place it elsewhere with `model set`, or give each a memory fraction.",
        )


def whole_gpus(hardware: Hardware) -> list[Gpu]:
    """GPUs that are not cut; those where strangers compute come last."""
    return sorted(
        (gpu for gpu in hardware.gpus if not gpu.mig_enabled),
        key=lambda gpu: any(client.computes for client in gpu.clients or ()),
    )


@dataclass(frozen=True, slots=True)
class GpuChoice:
    """GPUs for one model, and why these."""

    gpu_uuids: tuple[GpuUuid, ...]
    reason: str


def choose_gpus(hardware: Hardware, count: int, taken: Collection[GpuUuid] = ()) -> GpuChoice:
    """The best joined GPUs of one kind that nobody has; NVLink before PCIe."""
    free = [gpu for gpu in whole_gpus(hardware) if gpu.uuid not in taken]
    groups = [
        group
        for group in itertools.combinations(free, count)
        if len({(gpu.name, gpu.memory_mib) for gpu in group}) == 1
    ]
    if not groups:
        raise RefusedError(
            f"{count} free GPUs of one kind are not here; free are "
            f"{', '.join(gpu.title for gpu in free) or 'none'}.",
            advice="Stop a model, or name the GPUs yourself.",
        )
    best = min(groups, key=lambda group: _distance(hardware, group))
    return GpuChoice(tuple(gpu.uuid for gpu in best), why_together(hardware, best))


def _distance(hardware: Hardware, group: Sequence[Gpu]) -> list[tuple[int, int]]:
    """The worst pair first: tensor parallelism is as fast as its slowest link."""
    pairs = (frozenset({a.uuid, b.uuid}) for a, b in itertools.combinations(group, 2))
    unknown = (len(LINK_MEANINGS), 0)
    return sorted(
        (hardware.links[pair].rank if pair in hardware.links else unknown for pair in pairs),
        reverse=True,
    )


def why_together(hardware: Hardware, group: Sequence[Gpu]) -> str:
    """How well these GPUs are joined, which is how fast tensor parallelism is."""
    names = " and ".join(gpu.title for gpu in group)
    links = [hardware.links.get(frozenset({a.uuid, b.uuid}))
             for a, b in itertools.combinations(group, 2)]  # fmt: skip
    if not links:
        return f"{names} is free"
    known = [link for link in links if link is not None]
    if len(known) < len(links):
        return f"{names}; how they are joined is unknown"
    worst = max(known, key=lambda link: link.rank)
    return f"{names} are joined by {LINK_MEANINGS[worst.kind]}"


def format_placement(placement: Placement, hardware: Hardware) -> str:
    """Where a model sits, by the GPUs' numbers."""
    match placement:
        case CpuPlacement(kv_cache_mib=mib):
            return f"CPU, {mib} MiB KV cache"
        case GpuPlacement(gpu_uuids=uuids, memory_fraction=fraction):
            share = "" if fraction is None else f"{fraction:.0%} of "
            return share + " and ".join(title_of(hardware, gpu_uuid) for gpu_uuid in uuids)
        case MigPlacement(gpu_uuid=gpu_uuid, profile=profile, start=start):
            return f"{profile} at {start} of {title_of(hardware, gpu_uuid)}"
        case _:
            assert_never(placement)


def title_of(hardware: Hardware, gpu_uuid: str) -> str:
    gpu = hardware.gpu(gpu_uuid)
    return gpu.title if gpu else gpu_uuid[:12]


def device_ids(placement: Placement, hardware: Hardware | None) -> tuple[str, ...]:
    """What Docker is asked for: UUIDs; `ABSENT …` where today's MIG UUID is not known."""
    match placement:
        case GpuPlacement(gpu_uuids=uuids):
            return tuple(uuids)
        case MigPlacement(gpu_uuid=gpu_uuid, profile=profile, start=start):
            gpu = hardware.gpu(gpu_uuid) if hardware else None
            device = gpu.device((profile, start)) if gpu else None
            known = device.uuid if device is not None else None
            return (known or f"{ABSENT} {profile} at {start} of {gpu_uuid}",)
        case CpuPlacement():
            return ()
        case _:
            assert_never(placement)


ABSENT: Final = "absent:"


# =============================================================================
# §7 Memory fit — pure: what a model needs of a GPU, and what its engine reported
# =============================================================================


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What one start of an engine showed, on each of its GPUs; None is unknown, never zero."""

    weights_mib: float | None = None
    kv_cache_mib: float | None = None
    kv_cache_tokens: int | None = None
    context: int | None = None  # the longest request it takes, in tokens
    concurrency: float | None = None  # how many requests of that length at a time
    graphs_mib: float | None = None
    peak_mib: float | None = None  # of the fullest GPU, read from NVML when it was ready
    start_seconds: float | None = None
    taken_at: datetime | None = None


def parse_engine_report(log_text: str) -> Measured:
    """What an engine said of its memory while it started, of vLLM 0.30 and vLLM-Omni 0.30.

    Of several workers the largest weights and the smallest cache count: each has its own GPU.
    """

    def said(pattern: str, unit: float = 1.0) -> list[float]:
        return [float(n.replace(",", "")) * unit for n in re.findall(pattern, log_text)]

    tokens = said(r"KV cache size: ([\d,]+) tokens")
    # The engine's own order: what is asked for, what fits, what it is run with.
    fitted = r"max_model_len: (?:reduced from \d+ to|full model context length)"
    context = said(rf"(?:Using max model len|{fitted}|Maximum concurrency for) ([\d,]+)")
    concurrency = said(r"Maximum concurrency for [\d,]+ tokens per request: ([\d.]+)x")
    # Measured; set on a GPU; set or found on the processor.
    cache = r"(?:Available KV cache memory: |GiB, reserved |(?:Explicitly|Auto) set \()([\d.]+)"
    return Measured(
        weights_mib=max(said(r"Model loading took ([\d.]+) GiB", 1024), default=None),
        kv_cache_mib=min(said(cache, 1024), default=None),
        kv_cache_tokens=int(tokens[-1]) if tokens else None,
        context=int(context[-1]) if context else None,
        concurrency=concurrency[-1] if concurrency else None,
        graphs_mib=max(said(r"finished in \d+ secs, took ([\d.]+) GiB", 1024), default=None),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineLoad:
    """What an engine is at: requests now, and the tokens it has read and made since it started."""

    running: int
    waiting: int
    tokens: int
    cached: float = 0.0  # part of the KV cache in use: a long prompt grows there before any token

    @property
    def progress(self) -> tuple[int, float]:
        """What stands still in an engine that hangs."""
        return self.tokens, self.cached


LOAD_METRICS: Final = (
    "num_requests_running", "num_requests_waiting", "prompt_tokens_total",
    "generation_tokens_total",
)  # fmt: skip


def parse_load(metrics: str) -> EngineLoad | None:
    """From vLLM's `/metrics`, summed over its engines; None where it counts no tokens."""
    found = [
        re.findall(rf"^vllm:{name}\{{.*\}} (\S+)$", metrics, re.MULTILINE) for name in LOAD_METRICS
    ]
    if not all(found):
        return None
    running, waiting, read, made = (int(sum(map(float, figures))) for figures in found)
    used = re.findall(r"^vllm:kv_cache_usage_perc\{.*\} (\S+)$", metrics, re.MULTILINE)
    cached = sum(map(float, used))
    return EngineLoad(running=running, waiting=waiting, tokens=read + made, cached=cached)


def measurement_key(model: Model, image: str, hardware: Hardware | None) -> str:
    """Equal for engines that need the same; which of several equal GPUs or slices plays no part."""
    uuids: tuple[GpuUuid, ...] = ()
    share: float | str | None
    match model.placement:
        case CpuPlacement(kv_cache_mib=share):
            pass
        case GpuPlacement(gpu_uuids=uuids, memory_fraction=share):
            pass
        case MigPlacement(gpu_uuid=gpu_uuid, profile=share):
            uuids = (gpu_uuid,)
        case _:
            assert_never(model.placement)
    gpus = [hardware.gpu(which) if hardware else None for which in uuids]
    kinds = [(gpu.name if gpu else None) or which for gpu, which in zip(gpus, uuids, strict=True)]
    what = [model.type, asdict(model.source), image, kinds, share, model.engine_arguments]
    return sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


# --- what a config.json tells -------------------------------------------------

LayerKind = Literal["full", "sliding", "chunked", "linear", "cross"]
MIB: Final = 1024 * 1024
LARGEST_NUMBER: Final = 2**40  # of a config; what is more is nonsense


@dataclass(frozen=True, kw_only=True, slots=True)
class KvLayers:
    """Layers that cache alike; `values` are numbers per token and KV head.

    A linear layer keeps one state per request instead, of `state_bytes` over all GPUs.
    """

    kind: LayerKind
    count: int
    heads: int = 1
    values: int = 0
    window: int = 0  # tokens that a sliding or chunked layer looks back
    latent: bool = False  # MLA: keys and values in one, which every GPU holds whole
    value_bytes: int | None = None  # where the KV cache's type does not decide it
    state_bytes: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """What decides how much memory a model needs; `unknown` says what its config does not tell."""

    name: str | None = None
    layers: tuple[KvLayers, ...] | None = None  # (): it keeps no KV cache; None: nobody knows
    heads: int | None = None
    hidden_size: int | None = None
    mlp_size: int = 0  # values of one token inside an MLP, over all the experts it visits
    experts: int = 0  # that one token visits
    vocabulary: int | None = None
    context: int | None = None  # the longest request that it was made for, in tokens
    dtype: str | None = None
    kv_dtype: str | None = None  # where the checkpoint is calibrated for one
    quantization: str | None = None
    has_encoder: bool = False  # of pictures or sound
    unknown: tuple[str, ...] = ()


# Where multimodal models keep their language model.
_INNER: Final = ("text_config", "llm_config", "language_config", "thinker_config")
_LAYERS: Final = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers")
_HEADS: Final = ("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads")
_KV_HEADS: Final = ("n_head_kv", "num_kv_heads", "num_key_value_heads", "multi_query_group_num",
                    "num_attention_groups", "kv_n_heads")  # fmt: skip
_HEAD_SIZE: Final = ("head_dim", "hidden_size_per_head", "attention_head_dim", "kv_channels")
_HIDDEN: Final = ("hidden_size", "n_embd", "d_model")
_CONTEXT: Final = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length",
                   "max_target_positions", "max_sequence_length", "max_seq_length",
                   "seq_len")  # fmt: skip
_MLP: Final = ("intermediate_size", "n_inner", "ffn_hidden_size", "d_ff", "decoder_ffn_dim")
_KINDS: Final[Mapping[str, LayerKind]] = {
    "full_attention": "full", "attention": "full", "global": "full", "hybrid": "full",
    "sliding_attention": "sliding", "local": "sliding", "chunked_attention": "chunked",
    "linear_attention": "linear", "mamba": "linear", "mamba2": "linear", "recurrent": "linear",
    "conv": "linear", "m": "linear", "*": "full",
}  # fmt: skip
_ENCODERS: Final = re.compile(r"bert|electra|mpnet|^(new|gte|clip|siglip)", re.IGNORECASE)
# Layers with attention and a state at once, or compressed: said to be unknown, not guessed.
_UNREAD: Final = {"falcon_h1", "zamba2", "minimax_text_01", "deepseek_v4"}
_NO_STRETCH: Final = ("su", "longrope", "llama3", "yarn", "deepseek_yarn",
                      "deepseek_llama_scaling", "default", "mrope")  # fmt: skip
# Sliding layers between full ones, where a config (of before `layer_types`) names no pattern.
_PATTERNS: Final = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6, "cohere2": 4}


def read_architecture(config: object, tokenizer: object = None) -> Architecture:
    """What a Hugging Face config.json tells; never raises, whatever it holds.

    The tokenizer's config may shorten the context.
    """
    outer = config if isinstance(config, dict) else {}
    inner = _language_model(outer)
    dtype = _word(inner, "torch_dtype", "dtype")
    layers = _kv_layers(inner)
    quantized = outer.get("quantization_config") or inner.get("quantization_config")
    experts = _count(inner, "num_experts_per_tok", "num_experts_per_token", "moe_topk") or 0
    found = Architecture(
        name=_first_word(outer.get("architectures")) or _word(outer, "model_type"),
        layers=layers,
        heads=_count(inner, *_HEADS),
        hidden_size=_count(inner, *_HIDDEN),
        mlp_size=max(
            _count(inner, *_MLP) or 0,
            experts * (_count(inner, "moe_intermediate_size", *_MLP) or 0),
        ),
        experts=experts,
        vocabulary=_count(inner, "vocab_size"),
        context=_context(inner, tokenizer if isinstance(tokenizer, dict) else {}),
        dtype=dtype.removeprefix("torch.") if dtype else None,
        kv_dtype=_calibrated(quantized),
        quantization=_quantization(outer) or _quantization(inner),
        has_encoder=any(
            key in outer for key in ("vision_config", "audio_config", "encoder_layers")
        ),
    )
    return replace(found, unknown=_unsaid(found))


def _unsaid(found: Architecture) -> tuple[str, ...]:
    stateless = any(x.kind == "linear" and not x.state_bytes for x in found.layers or ())
    gaps = (
        (found.layers is None, "how its layers keep their KV cache"),
        (stateless, "how large the state of its linear layers is"),
        (found.context is None, "how long a request may be"),
        (found.dtype is None, "the type of its numbers (16 bit are assumed)"),
        (found.hidden_size is None, "how wide its layers are"),
    )
    return tuple(text for missing, text in gaps if missing)


def _language_model(config: Json, depth: int = 3) -> Json:
    """A multimodal model's own values under those of its language model."""
    inner = next((config[key] for key in _INNER if isinstance(config.get(key), dict)), None)
    if inner is None or not depth:
        return config
    said = {key: value for key, value in inner.items() if value is not None}
    rest = {key: value for key, value in config.items() if key not in _INNER}
    return _language_model({**rest, **said}, depth - 1)


def _count(config: Mapping[str, object], *names: str) -> int | None:
    """The first of these that is a sensible number; per-layer lists count by their largest."""
    for name in names:
        value = config.get(name)
        several = value if isinstance(value, list) else [value]
        sensible = [n for n in several if type(n) is int and 0 < n < LARGEST_NUMBER]
        if sensible:
            return max(sensible)
    return None


def _word(config: Mapping[str, object], *names: str) -> str | None:
    return next((v for v in (config.get(name) for name in names) if isinstance(v, str) and v), None)


def _first_word(value: object) -> str | None:
    return value[0] if isinstance(value, list) and value and isinstance(value[0], str) else None


def _quantization(config: Json) -> str | None:
    """How its weights are stored where that is not plainly; "unknown" where nobody says how."""
    settings = config.get("quantization_config") or config.get("compression_config")
    if not isinstance(settings, dict):
        return None
    return _word(settings, "quant_method", "quant_algo") or "unknown"


def _calibrated(quantized: object) -> str | None:
    """The KV cache's type that a quantised checkpoint brings scales for."""
    if not isinstance(quantized, dict):
        return None
    scheme = quantized.get("kv_cache_scheme")
    eight_bit = isinstance(scheme, dict) and scheme.get("num_bits") == 8  # noqa: PLR2004
    return "fp8" if eight_bit or quantized.get("kv_cache_quant_algo") == "FP8" else None


def _context(config: Json, tokenizer: Json) -> int | None:
    """As vLLM (0.30) derives it: the shortest limit there is, stretched where RoPE is scaled."""
    limits = [limit for name in _CONTEXT if (limit := _count(config, name))]
    own = _count(config, "model_max_length")  # Command-R's, which stands above the others
    longest = own or min(limits, default=None)
    of_tokenizer = _count(tokenizer, "model_max_length")
    if longest is not None and of_tokenizer is not None:
        longest = min(longest, of_tokenizer)
    rope = config.get("rope_scaling") or config.get("rope_parameters")
    if longest is None or not isinstance(rope, dict) or "gemma3" in str(config.get("model_type")):
        return longest
    factor = rope.get("factor")
    stretched = (_word(rope, "rope_type", "type") or "default") not in _NO_STRETCH
    if not stretched or not isinstance(factor, int | float) or not 1 <= factor < LARGEST_NUMBER:
        return longest
    return int(longest * factor)


def _kv_layers(config: Json) -> tuple[KvLayers, ...] | None:
    """All layers that keep something of a request; None where the config does not tell."""
    names = _word(config, "model_type"), _first_word(config.get("architectures"))
    if any(_ENCODERS.search(name or "") for name in names):
        return ()
    kinds = _layer_kinds(config)
    if kinds is None or names[0] in _UNREAD or "compress_ratios" in config:
        return None
    shapes = {kind: _layer_shape(config, kind) for kind in dict.fromkeys(kinds)}
    if any(shape is None for shape in shapes.values()):
        return None
    found = [replace(shape, count=kinds.count(kind)) for kind, shape in shapes.items() if shape]
    full = next((layer for layer in found if layer.kind == "full"), None)
    if full is not None and full.latent and _count(config, "index_topk"):
        # DeepSeek-V3.2's indexer: a key of 8 bit for each token, and its scale.
        keys = (_count(config, "index_head_dim") or 128) + 4
        found.append(replace(full, values=keys, latent=False, value_bytes=1))
    if full is not None and config.get("is_encoder_decoder") is True:
        found.append(replace(full, kind="cross"))
    return tuple(found)


def _layer_kinds(config: Json) -> list[LayerKind] | None:
    """What each layer that has a cache of its own does."""
    total = _count(config, *_LAYERS)
    named = config.get("layer_types") or config.get("layers_block_type")
    if isinstance(config.get("hybrid_override_pattern"), str):
        named = [*config["hybrid_override_pattern"].lower()]
    if isinstance(named, list) and named:
        # What is neither attention nor state (MLPs of their own) keeps nothing.
        kinds = [_KINDS[n] for n in named[:total] if isinstance(n, str) and n in _KINDS]
    elif total is None or total > 2**16:
        return None
    else:
        kinds = [_kind_at(config, i) for i in range(total)]
    shared = _count(config, "num_kv_shared_layers") or 0  # the last ones read earlier layers' cache
    return kinds[: max(len(kinds) - shared, 1)] if kinds else None


def _kind_at(config: Json, index: int) -> LayerKind:  # noqa: PLR0911 - one line per family
    """What a layer does where the config has no list of layers."""
    family = _word(config, "model_type") or ""
    kimi = config.get("linear_attn_config")
    if isinstance(kimi, dict) and isinstance(kimi.get("kda_layers"), list):
        return "linear" if index + 1 in kimi["kda_layers"] else "full"
    if isinstance(chosen := config.get("attn_layer_indices"), list):
        return "full" if index in chosen else "linear"
    if every := _count(config, "full_attention_interval"):
        return "full" if (index + 1) % every == 0 else "linear"
    if every := _count(config, "attn_layer_period"):
        return "full" if index % every == (_count(config, "attn_layer_offset") or 0) else "linear"
    if family in {"mamba", "mamba2", "falcon_mamba"}:
        return "linear"
    if family.startswith("llama4") and _count(config, "attention_chunk_size"):
        return "full" if (index + 1) % 4 == 0 else "chunked"
    return _sliding_or_full(config, family, index)


def _sliding_or_full(config: Json, family: str, index: int) -> LayerKind:
    used = config.get("use_sliding_window", not family.startswith("qwen"))
    if not _count(config, "sliding_window") or not used:
        return "full"
    if "use_sliding_window" in config and "max_window_layers" in config:
        return "sliding" if index >= (_count(config, "max_window_layers") or 0) else "full"
    every = _count(config, "sliding_window_pattern") or _PATTERNS.get(family)
    return "full" if every and (index + 1) % every == 0 else "sliding"


def _layer_shape(config: Json, kind: LayerKind) -> KvLayers | None:
    """One layer of a kind; None where its size is not told."""
    if kind == "linear":
        return KvLayers(kind=kind, count=1, state_bytes=_state_bytes(config))
    latent, rope = _count(config, "kv_lora_rank"), _count(config, "qk_rope_head_dim")
    if latent and rope and config.get("model_type") != "minicpm3":
        return KvLayers(kind=kind, count=1, values=latent + rope, latent=True)
    heads, hidden = _count(config, *_HEADS), _count(config, *_HIDDEN)
    size = _count(config, *_HEAD_SIZE) or (hidden // heads if hidden and heads else None)
    of_kv = _kv_heads(config)
    if kind == "full":  # Gemma 4 has other heads there
        size = _count(config, "global_head_dim") or size
        if config.get("attention_k_eq_v") is True:
            of_kv = _count(config, "num_global_key_value_heads") or of_kv
    if not size or not of_kv:
        return None
    look_back = {"sliding": "sliding_window", "chunked": "attention_chunk_size"}.get(kind, "")
    window = _count(config, look_back) or 0
    return KvLayers(kind=kind, count=1, heads=of_kv, values=2 * size, window=window)


def _kv_heads(config: Json) -> int | None:
    """Falcon says by switches whether its attention is multi-query."""
    own = config.get("attn_config")
    nested = _count(own, *_KV_HEADS) if isinstance(own, dict) else None
    if config.get("multi_query") is True and not config.get("new_decoder_architecture"):
        return 1
    return nested or _count(config, *_KV_HEADS) or _count(config, *_HEADS)


def _state_bytes(config: Json) -> int:
    """What a linear layer keeps: a window of its convolution, and its state; 0 is unknown.

    Gated DeltaNet (Qwen3-Next), Kimi's delta attention, Mamba 2 and 1, as vLLM shapes them.
    """

    def read(*names: str) -> int:
        return _count(config, *names) or 0

    wide = 4 if _word(config, "mamba_ssm_dtype", "mamba_ssm_cache_dtype") == "float32" else 2
    kernel = read("linear_conv_kernel_dim", "conv_kernel", "mamba_d_conv", "d_conv") or 4
    kimi = config.get("linear_attn_config")
    if values := read("linear_num_value_heads"):
        keys, size = read("linear_num_key_heads"), read("linear_key_head_dim")
        value_size = read("linear_value_head_dim")
        conv, state = 2 * keys * size + values * value_size, values * value_size * size
    elif isinstance(kimi, dict):
        heads, size = _count(kimi, "num_heads") or 0, _count(kimi, "head_dim") or 0
        conv, state, wide = 3 * heads * size, heads * size * size, 4
    elif heads := read("mamba_num_heads", "mamba_n_heads"):
        inside = heads * read("mamba_head_dim", "mamba_d_head")
        size = read("ssm_state_size", "mamba_d_state", "state_size")
        conv = inside + 2 * (read("mamba_n_groups", "n_groups") or 1) * size
        state = inside * size
    else:
        conv = read(*_HIDDEN) * (read("mamba_expand", "expand") or 2)
        state = conv * read("mamba_d_state", "state_size")
    return 2 * conv * (kernel - 1) + wide * state if state else 0


# --- what the engine is asked for ----------------------------------------------

# Bytes of one number in the KV cache. Types that vLLM packs with scales beside them (int4, turbo)
# are not here: as wide as the model's own then, which is too much rather than too little.
KV_BYTES: Final[Mapping[str, float]] = {
    "float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2, "fp8": 1, "fp8_e4m3": 1,
    "fp8_e5m2": 1, "fp8_inc": 1, "int8": 1, "nvfp4": 0.5625,
}  # fmt: skip
SPARSE_LATENT_BYTES: Final = 656  # per token in vLLM's type fp8_ds_mla
DEFAULT_FRACTION: Final = 0.92  # of a GPU's memory, vLLM's own


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineWish:
    """The engine arguments that decide about memory; None is vLLM's default."""

    context: int | None = None
    context_auto: bool = False  # the longest that fits
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    kv_cache_dtype: str | None = None
    memory_fraction: float | None = None
    dtype: str | None = None
    kv_cache_bytes: int | None = None  # per GPU; the memory fraction says nothing then
    block_size: int | None = None
    pipeline_parallel: int = 1
    cpu_offload_gib: float = 0.0
    enforce_eager: bool = False
    prefix_caching: bool = True
    async_scheduling: bool = True


def _option_name(argument: str) -> str:
    """`--json.key=value` is the option `--json`; vLLM takes `_` for `-`."""
    return re.split(r"[=.]", argument, maxsplit=1)[0].replace("_", "-")


def parse_amount(text: str) -> int | None:
    """vLLM's numbers: 8k is 8,000 and 8K is 8,192; None for what it would refuse."""
    found = re.fullmatch(r"(\d{1,12})(\.\d{1,12})?([kmgtKMGT]?)", text.strip())
    if found is None or (found[2] and not found[3].islower()):
        return None
    power = " kmgt".index(found[3].lower() or " ")
    return int(float(found[1] + (found[2] or "")) * (1024 if found[3].isupper() else 1000) ** power)


def _parse_fraction(text: str) -> float | None:
    with contextlib.suppress(ValueError):
        return number if math.isfinite(number := float(text)) and number > 0 else None
    return None


_VALUED: Final[Mapping[str, tuple[str, Callable[[str], object]]]] = {
    "--max-model-len": ("context", parse_amount),
    "--max-num-seqs": ("max_num_seqs", parse_amount),
    "--max-num-batched-tokens": ("max_num_batched_tokens", parse_amount),
    "--kv-cache-dtype": ("kv_cache_dtype", str.strip),
    "--gpu-memory-utilization": ("memory_fraction", _parse_fraction),
    "--dtype": ("dtype", str.strip),
    "--kv-cache-memory-bytes": ("kv_cache_bytes", parse_amount),
    "--block-size": ("block_size", parse_amount),
    "--pipeline-parallel-size": ("pipeline_parallel", parse_amount),
    "-pp": ("pipeline_parallel", parse_amount),
    "--cpu-offload-gb": ("cpu_offload_gib", _parse_fraction),
}
_SWITCHES: Final = {
    f"--{no}{option}": (name, not no)
    for no in ("", "no-")
    for option, name in (("enforce-eager", "enforce_eager"),
                         ("enable-prefix-caching", "prefix_caching"),
                         ("async-scheduling", "async_scheduling"))
}  # fmt: skip


def engine_wish(arguments: Sequence[str]) -> EngineWish:
    """What a model's engine arguments ask for; the last of a kind counts, as in vLLM.

    What vLLM would refuse is passed over: `check_engine_arguments` and the engine speak of that.
    """
    given: Json = {}
    for argument, after in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        option, _, joined = argument.partition("=")
        option = _option_name(option)
        if option in _SWITCHES:
            name, value = _SWITCHES[option]
            given[name] = value
        elif option in _VALUED:
            name, parse = _VALUED[option]
            text = joined or after
            if name == "context":
                given["context_auto"] = text.strip().lower() in {"auto", "-1"}
            if (parsed := parse(text)) and parsed != "auto":
                given[name] = parsed
    return EngineWish(**given)


# --- the KV cache, as vLLM cuts it ---------------------------------------------

BLOCK_TOKENS: Final = 16  # vLLM's on CUDA
CPU_BLOCK_TOKENS: Final = 128


@dataclass(frozen=True, slots=True)
class KvBlocks:
    """The KV cache of one GPU: the bytes of a block, and how many blocks a request takes."""

    size: int
    per_request: int

    @property
    def request_bytes(self) -> int:
        return self.size * self.per_request

    def concurrency(self, cache_bytes: float) -> float | None:
        """How many requests at a time, as vLLM says at its start; None: it keeps no cache."""
        return cache_bytes // self.size / self.per_request if self.size else None

    def holds(self, cache_bytes: float) -> bool:
        """Whether one request fits; vLLM keeps one block for itself."""
        return not self.size or cache_bytes // self.size > self.per_request


def kv_blocks(
    architecture: Architecture, context: int, wish: EngineWish, tensor_parallel: int = 1,
    block_size: int = BLOCK_TOKENS,
) -> KvBlocks | None:  # fmt: skip
    """How vLLM (0.30) would cut the KV cache for requests of `context` tokens.

    Layers that cache alike form groups of one size, which share one pool of blocks: with 10 full
    and 52 sliding layers, 1 group of full and 6 of sliding ones, each as large as 10 layers.
    None where the architecture does not tell.
    """
    if architecture.layers is None:
        return None
    if not architecture.layers:
        return KvBlocks(0, 0)
    block, state = _block_tokens(architecture, wish, tensor_parallel, block_size)
    buckets: dict[tuple[LayerKind, int], list[tuple[KvLayers, float]]] = {}
    for layer in architecture.layers:
        page = block * _token_bytes(layer, architecture, wish, tensor_parallel) or state
        buckets.setdefault((layer.kind, layer.window), []).append((layer, page))
    if len(buckets) == 1:
        (alike,) = buckets.values()
        size = sum(page * layer.count for layer, page in alike)
        return KvBlocks(math.ceil(size), _request_blocks(alike[0][0], context, block, wish))
    page = max(page for alike in buckets.values() for _, page in alike)
    counts = [sum(layer.count for layer, _ in alike) for alike in buckets.values()]
    group = max(counts) if max(counts) < 1.5 * min(counts) else min(counts)
    taken = 0
    for count, ((layer, own), *_) in zip(counts, buckets.values(), strict=True):
        wider = int(page // own) if own and page % own == 0 else 1  # all blocks are one size
        taken += -(-count // group) * _request_blocks(layer, context, block * wider, wish)
    return KvBlocks(math.ceil(page * group), taken)


def _block_tokens(
    architecture: Architecture, wish: EngineWish, tensor_parallel: int, block_size: int
) -> tuple[int, int]:
    """The tokens of a block, widened until one holds a linear layer's state; and that state."""
    layers = architecture.layers or ()
    block = wish.block_size or block_size
    state = max(-(-layer.state_bytes // tensor_parallel) for layer in layers)
    full = next((layer for layer in layers if layer.kind == "full"), None)
    if not state or full is None:
        return block, state
    align = max(block, 128 if full.latent else BLOCK_TOKENS)
    token = _token_bytes(full, architecture, wish, tensor_parallel)
    return align * math.ceil(state / (align * token)), state


def _token_bytes(
    layer: KvLayers, architecture: Architecture, wish: EngineWish, tensor_parallel: int
) -> float:
    """One token in one layer of one GPU; with more GPUs than KV heads each holds a replica."""
    if layer.latent and wish.kv_cache_dtype == "fp8_ds_mla":
        return SPARSE_LATENT_BYTES
    heads = max(1, layer.heads // tensor_parallel)
    return heads * layer.values * (layer.value_bytes or _kv_value_bytes(architecture, wish))


def _kv_value_bytes(architecture: Architecture, wish: EngineWish) -> float:
    """vLLM turns models of 32 bit into 16 unless it is told not to."""
    computing = KV_BYTES.get(wish.dtype or "", 2)
    return KV_BYTES.get(wish.kv_cache_dtype or architecture.kv_dtype or "", computing)


def _request_blocks(layer: KvLayers, context: int, block: int, wish: EngineWish) -> int:
    """The most blocks that a request holds in one group at any moment."""
    batch = wish.max_num_batched_tokens or 2048
    in_flight = batch * (2 if wish.async_scheduling else 1)  # one batch computes, one is prepared
    match layer.kind:
        case "full":
            return math.ceil(context / block)
        case "sliding":  # a window need not begin where a block does
            return math.ceil(min(layer.window - 1 + in_flight, context) / block) + 1
        case "chunked":
            return math.ceil(min(layer.window + in_flight, context) / block)
        case "linear":  # with prefix caching the state before the last block stays
            return 2 if wish.prefix_caching else 1
        case "cross":  # vLLM reserves a whole batch for what the encoder heard
            return math.ceil(batch / block)
        case _:
            assert_never(layer.kind)


def largest_context(
    architecture: Architecture, cache_bytes: float, layout: Callable[[int], KvBlocks | None]
) -> int | None:
    """The longest request that so large a KV cache of one GPU holds, and 0 for none at all.

    `layout` cuts it for requests of a length. Never more than the model was made for; None where
    its config does not tell.
    """
    if architecture.context is None or architecture.layers is None:
        return None

    def too_long(context: int) -> bool:
        blocks = layout(context)
        return blocks is None or not blocks.holds(cache_bytes)

    return bisect.bisect_left(range(1, architecture.context + 1), x=True, key=too_long)


# --- the sum --------------------------------------------------------------------

Verdict = Literal["roomy", "fits", "tight", "too small"]
# Up to which part of the budget the sum is called so. An estimate may be wrong by a tenth; below
# 60 % a smaller place may do.
ROOMY_UP_TO: Final = 0.60
FITS_UP_TO: Final = 0.90
VISIBLE: Final = 0.985  # of a whole card's memory: what its driver leaves to programs
CONTEXT_MIB: Final = 512  # CUDA's own, cuBLAS and the allocator's rests, on each GPU
PEERS_MIB: Final = 512  # NCCL's and vLLM's buffers for tensor parallelism
# Per layer: logs of vLLM 0.8 to 0.28 say 0.52 GiB of 32, 1.02 of 62, 1.59 of 64 layers.
GRAPH_MIB: Final = 20
LOGIT_BYTES: Final = 14  # in 16 and 32 bit, their probabilities, and as much noise to draw by
ENCODER_MIB: Final = 1024  # pictures or sound while vLLM tries its largest request
CPU_ENGINE_MIB: Final = 1536  # Python, PyTorch and vLLM in the server's memory


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Somewhere a model could run, and the memory of each GPU or slice, or of the server."""

    placement: Placement
    title: str
    memory_mib: int | None = None
    gpu_name: str | None = None
    compute_capability: str | None = None

    @property
    def tensor_parallel(self) -> int:
        return len(self.placement.gpu_uuids) if isinstance(self.placement, GpuPlacement) else 1

    @property
    def block_tokens(self) -> int:
        return CPU_BLOCK_TOKENS if isinstance(self.placement, CpuPlacement) else BLOCK_TOKENS


@dataclass(frozen=True, kw_only=True, slots=True)
class FitPart:
    """One addend, per GPU; `origin` says whether it is known, guessed, or set by somebody."""

    name: Literal["weights", "KV cache", "overhead"]
    mib: float | None
    origin: Literal["known", "estimated", "measured", "set"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """Whether a model would fit a place, as a sum; all in MiB per GPU.

    `obstacles` are what vLLM refuses however much memory there is; `notes` are advice.
    """

    place: Place
    parts: tuple[FitPart, ...]
    budget_mib: float | None
    verdict: Verdict | None  # None: the place's memory is not known
    context: int | None
    requests: int
    largest_context: int | None  # of one request; 0 for none
    concurrency: float | None  # requests of `context` tokens at a time
    obstacles: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def needed_mib(self) -> float:
        return sum(part.mib or 0 for part in self.parts)

    @property
    def starts(self) -> bool:
        """Whether a start is expected to succeed."""
        return self.verdict not in {None, "too small"} and not self.obstacles


def place_of(placement: Placement, hardware: Hardware, memory_mib: int | None = None) -> Place:
    """A placement on this server's hardware; `memory_mib` is the server's own memory."""
    title = format_placement(placement, hardware)
    match placement:
        case CpuPlacement():
            return Place(placement=placement, title=title, memory_mib=memory_mib)
        case GpuPlacement(gpu_uuids=uuids):
            known = [gpu for gpu_uuid in uuids if (gpu := hardware.gpu(gpu_uuid))]
            sizes = [gpu.memory_mib for gpu in known]
            smallest = min((int(size * VISIBLE) for size in sizes if size), default=None)
        case MigPlacement(gpu_uuid=gpu_uuid, profile=profile, start=start):
            known = [gpu] if (gpu := hardware.gpu(gpu_uuid)) else []
            smallest = _slice_mib(known[0], (profile, start)) if known else None
        case _:
            assert_never(placement)
    return Place(
        placement=placement,
        title=title,
        memory_mib=smallest,
        gpu_name=known[0].name if known else None,
        compute_capability=known[0].compute_capability if known else None,
    )


def _slice_mib(gpu: Gpu, wanted: Slice) -> int | None:
    device = gpu.device(wanted)
    if device is not None and device.memory_mib is not None:
        return device.memory_mib
    profiles = gpu.geometry.profiles if gpu.geometry else ()
    return next((p.usable_mib for p in profiles if p.name == wanted[0]), None)


def estimate(
    weights_bytes: int, architecture: Architecture, wish: EngineWish, place: Place, *,
    measured: Measured | None = None, at_once: int = 1,
) -> Fit:  # fmt: skip
    """The sum for so many requests `at_once` in a place, before anything is deployed there.

    `measured` is what an earlier start with these arguments on such a place showed: it takes the
    place of what it knows better.
    """
    seen = measured or Measured()
    wish = _settled(wish, architecture, place)
    weights = _weights_part(weights_bytes, architecture, wish, place, seen)
    overhead = _overhead_part(architecture, wish, place, seen)
    budget, fixed = _budget_mib(wish, place), _fixed_kv_mib(wish, place)
    room = fixed
    if room is None and budget is not None:
        room = max(budget - (weights.mib or 0) - (overhead.mib or 0), 0)
    layout = partial(
        kv_blocks, architecture, wish=wish, tensor_parallel=place.tensor_parallel,
        block_size=place.block_tokens,
    )  # fmt: skip
    longest = None if room is None else largest_context(architecture, room * MIB, layout)
    context = longest if wish.context_auto and longest else wish.context or architecture.context
    blocks = layout(context) if context else None
    needed = None if blocks is None else _kv_mib(blocks, at_once)
    kv = _kv_part(needed, context, at_once, fixed, seen)
    parts = (weights, kv, overhead)
    short = needed is not None and fixed is not None and needed > fixed
    return Fit(
        place=place,
        parts=parts,
        budget_mib=budget,
        verdict="too small" if short else _verdict(parts, budget, known=needed is not None),
        context=context,
        requests=at_once,
        largest_context=longest,
        concurrency=blocks.concurrency(room * MIB) if blocks and room is not None else None,
        obstacles=tuple(_obstacles(architecture, wish, place)),
        notes=tuple(_notes(architecture, wish, place, needed if short else None)),
    )


def _settled(wish: EngineWish, architecture: Architecture, place: Place) -> EngineWish:
    """The wish with vLLM's defaults for this place: larger batches on cards of 70 GiB and more."""
    gib = (place.memory_mib or 0) / 1024
    large = gib >= 70 and "A100" not in (place.gpu_name or "")  # noqa: PLR2004
    seqs = wish.max_num_seqs or (1024 if large else 256)
    batch = 16384 if gib >= 160 else 8192 if large else 2048  # noqa: PLR2004
    on_cpu = isinstance(place.placement, CpuPlacement)
    if on_cpu:
        seqs, batch = wish.max_num_seqs or 128, 2048
    longest = wish.context or architecture.context
    batch = min(batch, seqs * longest) if longest else batch
    batch = wish.max_num_batched_tokens or batch
    return replace(
        wish,
        max_num_seqs=min(seqs, batch),
        max_num_batched_tokens=batch,
        async_scheduling=wish.async_scheduling and not on_cpu,
    )


def _budget_mib(wish: EngineWish, place: Place) -> float | None:
    """What the engine may take of each GPU; of the server all that there is."""
    if place.memory_mib is None or _fixed_kv_mib(wish, place) is not None:
        return place.memory_mib
    given = place.placement.memory_fraction if isinstance(place.placement, GpuPlacement) else None
    return place.memory_mib * min(given or wish.memory_fraction or DEFAULT_FRACTION, 1.0)


def _fixed_kv_mib(wish: EngineWish, place: Place) -> float | None:
    """A KV cache whose size somebody set: vLLM then takes no more, whatever is free."""
    if isinstance(place.placement, CpuPlacement):
        return place.placement.kv_cache_mib
    return None if wish.kv_cache_bytes is None else wish.kv_cache_bytes / MIB


def _weights_part(
    weights_bytes: int, architecture: Architecture, wish: EngineWish, place: Place, seen: Measured
) -> FitPart:
    """Tensor parallelism cuts them evenly; weights of 32 bit are loaded as 16."""
    if seen.weights_mib is not None:
        return FitPart(name="weights", mib=seen.weights_mib, origin="measured")
    halved = architecture.dtype in {"float32", "float"} and architecture.quantization is None
    kept = wish.dtype in {"float32", "float"}
    mib = weights_bytes / MIB / place.tensor_parallel / (2 if halved and not kept else 1)
    return FitPart(name="weights", mib=max(mib - wish.cpu_offload_gib * 1024, 0), origin="known")


def _overhead_part(
    architecture: Architecture, wish: EngineWish, place: Place, seen: Measured
) -> FitPart:
    """Activations, CUDA's context, CUDA graphs, buffers between GPUs, an encoder's largest input.

    An estimate, except where an earlier start left a rest: its peak without weights and KV cache.
    """
    if None not in {seen.peak_mib, seen.weights_mib, seen.kv_cache_mib}:
        rest = (seen.peak_mib or 0) - (seen.weights_mib or 0) - (seen.kv_cache_mib or 0)
        if rest > 0:
            return FitPart(name="overhead", mib=rest, origin="measured")
    activations = activation_mib(architecture, wish, place.tensor_parallel)
    encoder = ENCODER_MIB if architecture.has_encoder else 0
    if isinstance(place.placement, CpuPlacement):
        mib = CPU_ENGINE_MIB + activations
    else:
        layers = sum(layer.count for layer in architecture.layers or ()) or 32
        graphs = seen.graphs_mib if seen.graphs_mib is not None else GRAPH_MIB * layers
        peers = PEERS_MIB if place.tensor_parallel > 1 else 0
        mib = CONTEXT_MIB + activations + encoder + peers + (0 if wish.enforce_eager else graphs)
    return FitPart(name="overhead", mib=mib, origin="estimated")


def activation_mib(architecture: Architecture, wish: EngineWish, tensor_parallel: int = 1) -> float:
    """The most that vLLM's trial run holds at once: a full batch in one layer, or its logits.

    Per token three copies of the hidden state, and the MLP's two halves and their product, in 16
    bit. vLLM's own reports agree to 1 %: Llama-3.1-8B with batches of 20,000 and 29,000 tokens
    (vllm issue 10517), Qwen2-VL-2B with 1,024 to 8,192. The logits are read from its sampler.
    """
    if architecture.hidden_size is None:
        return 1024.0
    hidden = architecture.hidden_size * (3 + architecture.experts)
    token = 2 * (hidden + 3 * architecture.mlp_size / tensor_parallel)
    batch = token * (wish.max_num_batched_tokens or 2048)
    logits = (architecture.vocabulary or 0) * (wish.max_num_seqs or 256) * LOGIT_BYTES
    return max(batch, logits) / MIB


def _kv_mib(blocks: KvBlocks, at_once: int) -> float:
    """vLLM keeps one block for itself."""
    return (blocks.request_bytes * at_once + blocks.size) / MIB


def _kv_part(
    needed: float | None, context: int | None, at_once: int, fixed: float | None,
    seen: Measured,
) -> FitPart:  # fmt: skip
    if fixed is not None:
        return FitPart(name="KV cache", mib=fixed, origin="set")
    if seen.kv_cache_mib and seen.concurrency and seen.context == context:
        per_request = seen.kv_cache_mib / seen.concurrency
        return FitPart(name="KV cache", mib=per_request * at_once, origin="measured")
    return FitPart(name="KV cache", mib=needed, origin="estimated")


def _verdict(parts: Sequence[FitPart], budget: float | None, *, known: bool) -> Verdict | None:
    """What is measured is not wrong by a tenth; what is unknown is never called more than tight."""
    if budget is None:
        return None
    needed = sum(part.mib or 0 for part in parts)
    if needed > budget:
        return "too small"
    sure = all(part.origin != "estimated" for part in parts)
    unknown = not known or any(part.mib is None for part in parts)
    if unknown or (needed > FITS_UP_TO * budget and not sure):
        return "tight"
    return "roomy" if needed <= ROOMY_UP_TO * budget else "fits"


def _obstacles(architecture: Architecture, wish: EngineWish, place: Place) -> Iterator[str]:
    """What vLLM refuses however much memory there is."""
    parallel, heads = place.tensor_parallel, architecture.heads
    if heads and heads % parallel:
        yield f"its {heads} attention heads cannot be shared by {parallel} GPUs"
    for kv_heads in {layer.heads for layer in architecture.layers or () if layer.values}:
        if kv_heads % parallel and parallel % kv_heads:
            yield f"its {kv_heads} KV heads cannot be shared by {parallel} GPUs"
    if wish.pipeline_parallel > 1:
        count = wish.pipeline_parallel * parallel
        yield f"with pipeline parallelism it wants {count} GPUs, and is given {parallel}"
    if wish.context and architecture.context and wish.context > architecture.context:
        yield (f"{wish.context:,} tokens are asked for, and it was made for "
               f"{architecture.context:,}")  # fmt: skip
    if wish.dtype == "bfloat16" and _lacks_bfloat16(place):
        yield f"{place.gpu_name or 'this GPU'} has no bfloat16: use --dtype half"


def _lacks_bfloat16(place: Place) -> bool:
    """GPUs before compute capability 8.0 (Ampere)."""
    major = (place.compute_capability or "").partition(".")[0]
    return major.isdigit() and int(major) < 8  # noqa: PLR2004


def _notes(
    architecture: Architecture, wish: EngineWish, place: Place, short_of: float | None
) -> Iterator[str]:
    if short_of:
        yield f"the KV cache is set too small: these requests need {math.ceil(short_of):,} MiB"
    if wish.dtype is None and architecture.dtype == "bfloat16" and _lacks_bfloat16(place):
        yield f"{place.gpu_name or 'this GPU'} has no bfloat16: add --dtype half"
    if architecture.unknown:
        yield f"its config does not tell {', '.join(architecture.unknown)}"


# --- where it would fit -----------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A place with its sum; whose it is by wish, and whether it would have to be cut first."""

    fit: Fit
    taken_by: tuple[ModelName, ...] = ()
    to_cut: bool = False


def places_that_fit(  # noqa: PLR0913 - the quantities that it depends on
    weights_bytes: int, architecture: Architecture, wish: EngineWish, hardware: Hardware,
    state: State, *, at_once: int = 1, model: str = "",
) -> list[Candidate]:  # fmt: skip
    """Every place where the model would start, the best first: free, sure, there, and no larger
    than needed. `model` is the one to place: it takes nothing from itself.
    """
    others = replace(state, models=tuple(m for m in state.wished_models if m.name != model))
    found = []
    taken = frozenset[GpuUuid]().union(*(gpus_of(m) for m in others.models))
    for placement, to_cut in _possible_places(hardware, taken):
        place = place_of(placement, hardware)
        fit = estimate(weights_bytes, architecture, wish, place, at_once=at_once)
        if fit.starts:
            found.append(Candidate(fit=fit, taken_by=_holders(others, placement), to_cut=to_cut))
    return sorted(_least_cuts(found), key=_worth)


def _worth(candidate: Candidate) -> tuple[bool, bool, bool, int, int]:
    fit, place = candidate.fit, candidate.fit.place
    memory, gpus = place.memory_mib or 0, place.tensor_parallel
    return bool(candidate.taken_by), fit.verdict == "tight", candidate.to_cut, gpus, memory


def _possible_places(
    hardware: Hardware, taken: Collection[GpuUuid]
) -> Iterator[tuple[Placement, bool]]:
    """Whole GPUs, the best joined 2, 4 and 8 of a kind, slices, and slices that could be cut."""
    for gpu in whole_gpus(hardware):
        yield GpuPlacement(gpu_uuids=(gpu.uuid,)), False
    joined: dict[tuple[GpuUuid, ...], None] = {}  # in this order, each once
    for count, busy in itertools.product((2, 4, 8), (taken, ())):
        with contextlib.suppress(RefusedError):
            joined[choose_gpus(hardware, count, busy).gpu_uuids] = None
    for uuids in joined:
        yield GpuPlacement(gpu_uuids=uuids), False
    for gpu in hardware.gpus:
        for profile, start in along(gpu.layout):
            yield MigPlacement(gpu_uuid=gpu.uuid, profile=profile, start=start), False
        for profile, start in _cuttable(gpu):
            yield MigPlacement(gpu_uuid=gpu.uuid, profile=profile, start=start), True


def _cuttable(gpu: Gpu) -> Iterator[Slice]:
    """One slice of each plain profile that fits beside those that the card has."""
    if gpu.geometry is None or gpu.slices is None:
        return
    names = [name for name, _ in gpu.layout]
    plain = [
        profile for profile in gpu.geometry.profiles
        if not profile.variant and profile.compute_slices < gpu.geometry.compute_slices
    ]  # fmt: skip
    for profile in _room(gpu.geometry, gpu.layout, plain):
        with contextlib.suppress(RefusedError):
            layout = choose_layout(gpu.geometry, [*names, profile.name], staying=gpu.layout)
            yield from layout - gpu.layout


def _least_cuts(found: Sequence[Candidate]) -> list[Candidate]:
    """Of the slices that a card could be cut into, the smallest that is not tight will do."""
    kept = [candidate for candidate in found if not candidate.to_cut]
    cuts: dict[GpuUuid, list[Candidate]] = {}
    for candidate in found:
        if candidate.to_cut and isinstance(p := candidate.fit.place.placement, MigPlacement):
            cuts.setdefault(p.gpu_uuid, []).append(candidate)
    return [*kept, *(min(several, key=_worth) for several in cuts.values())]


def _holders(others: State, placement: Placement) -> tuple[ModelName, ...]:
    """The wished models that are in the way: on the same slice, or anywhere on a whole GPU."""
    match placement:
        case GpuPlacement(gpu_uuids=uuids):
            return tuple(m.name for m in others.models if gpus_of(m) & {*uuids})
        case MigPlacement(gpu_uuid=gpu_uuid):
            return tuple(
                m.name for m in others.models
                if m.placement == placement
                or (isinstance(m.placement, GpuPlacement) and gpu_uuid in m.placement.gpu_uuids)
            )  # fmt: skip
        case _:
            return ()


# =============================================================================
# §8 Weights — pure: repositories, what to fetch of them, and what is stored here
# =============================================================================

HubTrouble = Literal[
    "gated", "absent", "token", "revision", "disabled", "unreachable", "rate", "server",
    "broken", "stalled", "disk", "files", "name", "offline",
]  # fmt: skip
# Those that time may mend: a download tries again.
TRANSIENT: Final[frozenset[HubTrouble]] = frozenset(
    {"unreachable", "rate", "server", "broken", "stalled"}
)
KEPT: Final = "what is complete is kept"
HUB_TROUBLES: Final[Mapping[HubTrouble, tuple[str, str]]] = {
    "gated": (
        "{repository} is gated, and this server may not read it.",
        "Open {page}, accept its terms, and set a token with `config token`.",
    ),
    "absent": (
        "{repository} is not on {host}, or is private.",
        "Check its spelling; for a private one set a token that may read it with `config token`.",
    ),
    "token": (
        "{host} refuses this server's Hugging Face token.",
        "Make a new one that may read, then set it with `config token`.",
    ),
    "revision": (
        "{repository} has no revision {revision!r}.",
        "Choose one of its branches or tags, or a commit with all its 40 digits.",
    ),
    "disabled": ("{repository} was disabled by Hugging Face.", "Choose another repository."),
    "unreachable": (
        "{host} cannot be reached{detail}.",
        f"Check this server's network, proxy and HF_ENDPOINT, then try again; {KEPT}.",
    ),
    "rate": (
        "{host} wants fewer requests{detail}.",
        "Wait some minutes, then try again; requests with a token may be more.",
    ),
    "server": ("{host} is in trouble itself{detail}.", f"Try again in some minutes; {KEPT}."),
    "broken": ("The connection to {host} broke off{detail}.", f"Try again; {KEPT}."),
    "stalled": (
        "The download of {repository} stood still{detail}.",
        f"Check this server's network and proxy, then try again; {KEPT}.",
    ),
    "disk": (
        "The disk is too full for {repository}{detail}.",
        "Remove weights that no model uses (`cache list`), then try again.",
    ),
    "files": (
        "The cache of weights cannot be written{detail}.",
        "Check its directory's owner and mode.",
    ),
    "name": ("{repository!r} names no repository.", "Write it like Qwen/Qwen3-8B."),
    "offline": (
        "HF_HUB_OFFLINE is set, and {repository} is not on this server.",
        "Unset it, or copy the weights into this server's cache.",
    ),
}


class HubError(ManagerError):
    """The hub refused, or does not answer; `kind` is for those who must tell one from another."""

    def __init__(self, kind: HubTrouble, wanted: Wanted, detail: str = "") -> None:
        fact, advice = HUB_TROUBLES[kind]
        words = asdict(wanted) | {"host": wanted.host, "page": wanted.page}
        words["detail"] = f" ({detail})" if detail else ""
        super().__init__(fact.format(**words), advice=advice.format(**words))
        self.kind = kind
        self.detail = detail
        self.retry_seconds: float | None = None  # what the hub itself asked for


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What is asked of which hub."""

    endpoint: str
    repository: str
    revision: str = "main"

    @property
    def host(self) -> str:
        return self.endpoint.split("//")[-1].split("/")[0].split("@")[-1]

    @property
    def page(self) -> str:
        """Its address for a browser; an endpoint's own password stays out."""
        return f"{re.sub('//[^/]*@', '//', self.endpoint)}/{self.repository}"


@dataclass(frozen=True, kw_only=True, slots=True)
class RepositoryHit:
    """One result of a search; what the hub did not say is None."""

    repository: str
    downloads: int | None = None
    likes: int | None = None
    updated_at: datetime | None = None
    pipeline_tag: str | None = None
    library: str | None = None
    gated: bool | None = None
    weights_bytes: int | None = None  # its safetensors; other formats are not counted


@dataclass(frozen=True, kw_only=True, slots=True)
class RepositoryFile:
    """A file of a repository; `blob` is its name in the cache, by its content."""

    path: str
    size_bytes: int  # 0 also where a mirror does not say it
    blob: str | None = None

    @property
    def folder(self) -> str:
        return str(PurePosixPath(self.path).parent)

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.path).suffix.lower()


@dataclass(frozen=True, kw_only=True, slots=True)
class RepositoryFacts:
    """A repository at one commit, or a local directory; what nobody said is None."""

    repository: str
    commit: str | None = None
    revision: str | None = None
    private: bool | None = None
    gated: Literal["auto", "manual", False] | None = None
    licence: str | None = None
    updated_at: datetime | None = None
    pipeline_tag: str | None = None
    library: str | None = None
    tags: tuple[str, ...] = ()
    files: tuple[RepositoryFile, ...] = ()
    parameters: Mapping[str, int] = field(default_factory=dict)  # by safetensors' dtype
    config: Json = field(default_factory=dict)
    readable: bool = True  # False: gated or private, and this server's token does not open it

    @property
    def needed(self) -> tuple[RepositoryFile, ...]:
        return files_needed(self.files, guess_type(self))

    @property
    def download_bytes(self) -> int:
        return sum(file.size_bytes for file in self.needed)

    @property
    def weights_bytes(self) -> int:
        return weights_bytes(self.needed)

    @property
    def architectures(self) -> tuple[str, ...]:
        named = self.config.get("architectures")
        return tuple(n for n in named if isinstance(n, str)) if isinstance(named, list) else ()

    @property
    def context(self) -> int | None:
        """The longest request it was made for, in tokens."""
        return read_architecture(self.config).context

    @property
    def quantisation(self) -> str | None:
        return read_architecture(self.config).quantization

    @property
    def runs_own_code(self) -> bool:
        """Whether it works with `--trust-remote-code` only."""
        return "auto_map" in self.config


# Bytes of one parameter as safetensors stores it.
DTYPE_BYTES: Final[Mapping[str, float]] = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2,
    "U16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1, "F4": 0.5,
}  # fmt: skip
PIPELINES: Final[Mapping[str, ModelType]] = {
    "text-generation": "chat", "conversational": "chat",
    "image-text-to-text": "vision", "video-text-to-text": "vision", "any-to-any": "vision",
    "visual-question-answering": "vision", "feature-extraction": "embedding",
    "sentence-similarity": "embedding", "visual-document-retrieval": "embedding",
    "text-ranking": "rerank", "automatic-speech-recognition": "speech-to-text",
    "text-to-speech": "text-to-speech", "text-to-audio": "text-to-speech",
    "text-to-image": "image", "image-to-image": "image",
}  # fmt: skip
_TRANSCRIBERS: Final = re.compile(r"Whisper|Voxtral(?!TTS)|ASR|CohereAsr|GraniteSpeech")
# Encoders of T5's kind are generators that vLLM does not run.
_VISION: Final = re.compile(
    r"(?!T5|MT5|Bart|MBart|Pegasus|M2M|UMT5|BlenderBot|LED).*"
    r"(ForConditionalGeneration|ForVision2Seq|ForImageTextToText|VLModel|VLForCausalLM|VLChatModel)"
)
_EMBEDDERS: Final = re.compile(
    r"\w*([Bb]ert|MPNet|Bge|Electra|Deberta|GteModel|NewModel|NomicModel)\w*"
)


def guess_type(facts: RepositoryFacts) -> ModelType | None:
    """What vLLM would make of it; None where neither files nor tags say it."""
    names = {file.path for file in facts.files}
    architecture = (*facts.architectures, "")[0]
    tagged = PIPELINES.get(facts.pipeline_tag or "")
    if "model_index.json" in names:
        return tagged if facts.pipeline_tag else "image"  # sound and video have pipelines too
    if _TRANSCRIBERS.match(architecture):
        return "speech-to-text"
    if tagged in {"rerank", "text-to-speech", "speech-to-text", "image"}:
        return tagged
    if architecture.endswith("ForSequenceClassification"):
        # A label only is a score; several are a classifier, which is none of our types.
        return "rerank" if _labels(facts.config) == 1 else None
    if "modules.json" in names or "sentence-transformers" in facts.tags:
        return "embedding"
    return tagged or _type_of_architecture(architecture)


def _labels(config: Json) -> int:
    labels = config.get("id2label")
    return len(labels) if isinstance(labels, dict) else _count(config, "num_labels") or 2


def _type_of_architecture(architecture: str) -> ModelType | None:
    if _VISION.fullmatch(architecture):
        return "vision"
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return "chat"
    encoder = architecture.endswith(("Model", "ForMaskedLM"))
    return "embedding" if encoder and _EMBEDDERS.fullmatch(architecture) else None


WEIGHTS: Final = frozenset({
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".ot", ".onnx",
    ".onnx_data", ".tflite", ".mlmodel", ".nemo", ".npz",
})  # fmt: skip
# vLLM loads these formats; the first that a folder has makes the others duplicates.
_LOADED: Final = (".safetensors", ".bin", ".pt", ".pth")
_FOREIGN: Final = WEIGHTS - {*_LOADED}
_COPIES_OF_ANY: Final = frozenset({".h5", ".msgpack", ".ot", ".gguf"})
_FOREIGN_FOLDERS: Final = frozenset({
    "onnx", "openvino", "original", "metal", "coreml", "flax", "tf", "gguf", "tflite", "mlx",
    "tensorrt",
})  # fmt: skip
_PAPERS: Final = frozenset({
    ".md", ".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg", ".pdf", ".mp4", ".ipynb",
})  # fmt: skip
# Small extra layers that vLLM's BGE-M3 reads beside the weights.
_EXTRA_LAYERS: Final = frozenset({"colbert_linear.pt", "sparse_linear.pt"})
_VARIANT: Final = re.compile(r"\.(fp16|bf16|fp32|fp8|non_ema)\b|\.non_ema|[._-]non_ema")
_INDEX: Final = re.compile(r".*(\.safetensors|\.bin|\.h5|\.msgpack)\.index(\.\w+)?\.json")


def files_needed(
    files: Sequence[RepositoryFile], kind: ModelType | None = None
) -> tuple[RepositoryFile, ...]:
    """What an engine loads: one format of the weights, and everything that is not weights.

    Speech models load other formats beside safetensors: of theirs only copies are left out.
    """
    useful = [f for f in files if f.suffix not in _PAPERS and not f.name.startswith(".git")]
    native = [f for f in useful if f.suffix in _LOADED and not _is_foreign(f)]
    if not native:
        return tuple(useful)  # some other format is all there is
    first: dict[str, set[str]] = {}
    for file in native:
        if not _is_variant(file):
            first.setdefault(file.folder, set()).add(file.suffix)
    needed = [f for f in useful if _is_loaded(f, kind) and not _is_copy(f, first, kind)]
    if any(f.path == "model_index.json" for f in files):
        # A pipeline reads its components; checkpoints beside them are for other programs.
        components = {f.folder for f in useful if f.name.endswith("config.json")} - {"."}
        needed = [f for f in needed if not _weights_suffix(f) or f.folder in components]
    return tuple(needed)


def _is_loaded(file: RepositoryFile, kind: ModelType | None) -> bool:
    unread = _FOREIGN if kind != "text-to-speech" else _COPIES_OF_ANY
    return not _is_foreign(file) and _weights_suffix(file) not in unread


def _is_copy(
    file: RepositoryFile, first: Mapping[str, Collection[str]], kind: ModelType | None
) -> bool:
    """Whether its folder has the same weights in the format, or of the kind, that is loaded."""
    suffix, formats = _weights_suffix(file), first.get(file.folder, ())
    if suffix is None or file.name in _EXTRA_LAYERS or not formats:
        return False
    if _is_variant(file):
        return True
    other = suffix != ".safetensors" and ".safetensors" in formats
    return other and (kind != "text-to-speech" or suffix == ".bin")


def _weights_suffix(file: RepositoryFile) -> str | None:
    """The format of a weights file, or of the index of one; None for everything else."""
    index = _INDEX.fullmatch(file.name)
    if index is not None:
        return index[1]
    return file.suffix if file.suffix in WEIGHTS else None


def _is_foreign(file: RepositoryFile) -> bool:
    """For other programs, by its folder or its name."""
    folders = PurePosixPath(file.path).parts[:-1]
    named = file.name.startswith(("openvino_", "flax_", "tf_model"))
    return named or not _FOREIGN_FOLDERS.isdisjoint(folders)


def _is_variant(file: RepositoryFile) -> bool:
    """Mistral's own copy of the weights, or another dtype than the plain one."""
    return file.name.startswith("consolidated") or bool(_VARIANT.search(file.name))


def weights_bytes(files: Sequence[RepositoryFile]) -> int:
    return sum(file.size_bytes for file in files if file.suffix in WEIGHTS)


def is_stored(source: HubSource, weights: Mapping[str, frozenset[str]]) -> bool:
    """Whether an engine could start from what is here; `weights` are whole revisions by name."""
    return (source.revision or "main") in weights.get(source.repository, frozenset())


def missing_files(
    found: Sequence[RepositoryFile],
    listed: Sequence[RepositoryFile] | None,
    shards: Mapping[str, Sequence[str]],
) -> list[str]:
    """What a stored revision lacks; `listed` is the hub's own list of it, where that is known.

    `shards` are the weight files that each index among `found` names, by the index's path.
    """
    here = {file.path for file in found}
    needed = files_needed(found)
    lacking = {file.path for file in files_needed(listed or ()) if file.path not in here}
    for file in needed:
        for shard in shards.get(file.path, ()):
            path = str(PurePosixPath(file.folder) / shard)
            lacking |= set() if path in here else {path}
    suffixes = {file.suffix for file in needed} | {PurePosixPath(p).suffix for p in lacking}
    if not suffixes & WEIGHTS:
        lacking.add("weights")
    return sorted(lacking)


@dataclass(frozen=True, kw_only=True, slots=True)
class FileProgress:
    path: str
    bytes_done: int
    bytes_total: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DownloadProgress:
    """A download at one moment; rate and time left are None until they are known."""

    repository: str
    files: tuple[FileProgress, ...]
    bytes_per_second: float | None = None
    attempt: int = 1
    note: str = ""

    @property
    def bytes_done(self) -> int:
        return sum(file.bytes_done for file in self.files)

    @property
    def bytes_total(self) -> int:
        return sum(file.bytes_total for file in self.files)

    @property
    def files_done(self) -> int:
        return sum(file.bytes_done >= file.bytes_total for file in self.files)

    @property
    def seconds_left(self) -> float | None:
        """None while only small files came, which tell nothing of the line."""
        rate, telling = self.bytes_per_second, min(self.bytes_total // 100, 2**24)
        return (
            (self.bytes_total - self.bytes_done) / rate
            if rate and self.bytes_done > telling
            else None
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class CachedRevision:
    """A commit of a repository on this server's disk; `blobs` are bytes by path in the cache."""

    repository: str
    commit: str
    refs: tuple[str, ...] = ()
    blobs: Mapping[str, int] = field(default_factory=dict)
    files: int = 0
    missing: tuple[str, ...] = ()  # empty: it is whole
    used_at: datetime | None = None

    @property
    def size_bytes(self) -> int:
        return sum(self.blobs.values())

    def is_meant_by(self, repository: str, revision: str | None) -> bool:
        """Whether a branch, tag or commit of a repository, or its default branch, is this here."""
        return self.repository == repository and (revision or "main") in {self.commit, *self.refs}


@dataclass(frozen=True, kw_only=True, slots=True)
class Leftover:
    """A file of the cache that belongs to no revision and that nobody is writing."""

    repository: str
    path: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsCache:
    """All that the cache of this server holds."""

    revisions: tuple[CachedRevision, ...] = ()
    leftovers: tuple[Leftover, ...] = ()
    downloading: frozenset[str] = frozenset()
    free_bytes: int | None = None

    @property
    def size_bytes(self) -> int:
        """On the disk: what several revisions share counts once."""
        blobs = {path: size for revision in self.revisions for path, size in revision.blobs.items()}
        return sum(blobs.values()) + sum(leftover.size_bytes for leftover in self.leftovers)

    def users(self, state: State, revision: CachedRevision) -> tuple[ModelName, ...]:
        """The registered models that load it, or name its repository among their arguments."""
        return tuple(
            model.name
            for model in state.models
            if any(revision.repository in argument for argument in model.engine_arguments)
            or (
                isinstance(model.source, HubSource)
                and revision.is_meant_by(model.source.repository, model.source.revision)
            )
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Removal:
    """What would go of one repository, and what that frees."""

    repository: str
    commits: tuple[str, ...] = ()
    leftovers: tuple[str, ...] = ()
    freed_bytes: int = 0
    shared_bytes: int = 0  # stays: other revisions use it too
    used_by: tuple[ModelName, ...] = ()


def plan_removal(
    cache: WeightsCache,
    state: State,
    repository: str,
    revision: str | None = None,
    *,
    despite_use: bool = False,
) -> Removal:
    """Without a revision all of the repository goes, leftovers too; refused while it is used."""
    chosen = [
        known
        for known in cache.revisions
        if known.repository == repository and revision in {None, known.commit, *known.refs}
    ]
    leftovers = [f for f in cache.leftovers if f.repository == repository and revision is None]
    if not chosen and not leftovers:
        name = f"{repository}@{revision}" if revision else repository
        raise RefusedError(
            f"There is no {name} in the cache.", advice="`cache list` shows what there is."
        )
    if repository in cache.downloading:
        raise RefusedError(
            f"{repository} is being downloaded.", advice="Wait until it is done, or cancel it."
        )
    removal = _removal_of(cache, state, repository, chosen, leftovers)
    if removal.used_by and not despite_use:
        raise RefusedError(
            f"{repository} is used by {', '.join(removal.used_by)}.",
            advice="Remove the model first, or say that its weights shall go all the same.",
        )
    return removal


def orphans(cache: WeightsCache, state: State) -> tuple[Removal, ...]:
    """What no registered model uses, and leftovers, by repository."""
    found = []
    names = {r.repository for r in cache.revisions} | {f.repository for f in cache.leftovers}
    for repository in sorted(names):
        if repository in cache.downloading:
            continue
        unused = [
            known
            for known in cache.revisions
            if known.repository == repository and not cache.users(state, known)
        ]
        leftovers = [f for f in cache.leftovers if f.repository == repository]
        if unused or leftovers:
            found.append(_removal_of(cache, state, repository, unused, leftovers))
    return tuple(found)


def _removal_of(
    cache: WeightsCache,
    state: State,
    repository: str,
    chosen: Sequence[CachedRevision],
    leftovers: Sequence[Leftover],
) -> Removal:
    kept = {blob for known in cache.revisions if known not in chosen for blob in known.blobs}
    blobs = {blob: size for known in chosen for blob, size in known.blobs.items()}
    shared = sum(size for blob, size in blobs.items() if blob in kept)
    return Removal(
        repository=repository,
        commits=tuple(known.commit for known in chosen),
        leftovers=tuple(leftover.path for leftover in leftovers),
        freed_bytes=sum(blobs.values()) - shared + sum(f.size_bytes for f in leftovers),
        shared_bytes=shared,
        used_by=tuple(name for known in chosen for name in cache.users(state, known)),
    )


# =============================================================================
# §9 Routes — pure: public names, who answers for them, and how
# =============================================================================


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """A model as it is served: its name for requests, and the replicas that answer to it."""

    model: ModelName
    served_model_name: str
    type: str
    replicas: tuple[ContainerName, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Deployment:
    """What LiteLLM sends a request to: a replica, or a provider's model."""

    target: str  # the route's member
    deployment_id: str  # unique among all routes
    model: str  # with LiteLLM's name of who serves it before it
    api_base: str | None
    api_key: str  # an environment variable, or a word where no key is needed
    weight: int = 1
    mode: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Pool:
    """A public name as it is served now: its route, and who answers for it."""

    route: Route
    deployments: tuple[Deployment, ...]
    stand_in: str = ""  # the fallback whose deployments these are while no member is served


def engine_url(replica: ContainerName) -> str:
    """Where LiteLLM reaches it, by which its accounts name it."""
    return f"http://{replica}:{ENGINE_PORT}/v1"


# LiteLLM's provider and mode for each kind; its vLLM provider has no speech and no images.
ROUTING: Final[Mapping[str, tuple[str, str]]] = {
    "chat": ("hosted_vllm", "chat"),
    "vision": ("hosted_vllm", "chat"),
    "embedding": ("hosted_vllm", "embedding"),
    "rerank": ("hosted_vllm", "rerank"),
    "speech-to-text": ("hosted_vllm", "audio_transcription"),
    "text-to-speech": ("openai", "audio_speech"),
    "image": ("openai", "image_generation"),
}


def pools(state: State, served: Sequence[ServedModel]) -> tuple[Pool, ...]:
    """Every public name that somebody answers for, by name; fallbacks are such names, too.

    Each model has its own, unless a route stands in its place; so has a provider's model that is
    named as a fallback, because LiteLLM falls back to names alone. A route none of whose members is
    served is served by the first along its fallbacks, and theirs, that is.
    """
    meant = _meanings(state)
    routes = {route.name: _with_names(route, meant) for route in state.routes}
    targets = {t for r in routes.values() for t in (*r.fallbacks, *r.context_fallbacks)}
    routes |= {t: Route(name=t, members=(t,)) for t in targets if t not in meant}
    found = {
        model.served_model_name: Pool(
            route=Route(name=model.served_model_name, members=(model.model,)),
            deployments=_replicas(model.served_model_name, model),
        )
        for model in served
    } | {
        route.name: Pool(route=route, deployments=_members(route, state, served))
        for route in routes.values()
    }
    able = (_with_stand_in(found[name], found) for name in sorted(found))
    return tuple(pool for pool in able if pool.deployments)


def _meanings(state: State) -> dict[str, str]:
    """The public name that is meant by a public name, an alias, or a model's own name."""
    models = {str(model.name): model.served_model_name for model in state.models}
    aliases = {alias: route.name for route in state.routes for alias in route.aliases}
    return models | {name: name for name in public_names(state)} | aliases


def _with_names(route: Route, meant: Mapping[str, str]) -> Route:
    return replace(
        route,
        fallbacks=tuple(meant.get(target, target) for target in route.fallbacks),
        context_fallbacks=tuple(meant.get(target, target) for target in route.context_fallbacks),
    )


def _with_stand_in(pool: Pool, known: Mapping[str, Pool]) -> Pool:
    tried, waiting = {pool.route.name}, [*pool.route.fallbacks]
    while waiting and not pool.deployments:
        name, *waiting = waiting
        if name in tried or name not in known:
            continue
        tried.add(name)
        waiting = [*known[name].route.fallbacks, *waiting]
        deployments = tuple(
            replace(d, deployment_id=pool.route.name + d.deployment_id.removeprefix(name))
            for d in known[name].deployments
        )
        pool = replace(pool, deployments=deployments, stand_in=name)
    return pool


def _members(route: Route, state: State, served: Sequence[ServedModel]) -> tuple[Deployment, ...]:
    members = [_deployments(route.name, target, state, served) for target in route.members]
    # A member's weight is shared by its replicas, in whole numbers.
    common = math.lcm(*(len(member) or 1 for member in members))
    return tuple(
        replace(deployment, weight=weight * common // len(member))
        for member, weight in zip(members, route.weights or (1,) * len(members), strict=True)
        for deployment in member
    )


def _deployments(
    name: str, target: str, state: State, served: Sequence[ServedModel]
) -> tuple[Deployment, ...]:
    provider_name, slash, model = target.partition("/")
    if not slash:
        replicas = (_replicas(name, model) for model in served if model.model == target)
        return tuple(itertools.chain.from_iterable(replicas))
    provider = next((p for p in state.providers if p.name == provider_name), None)
    if provider is None:
        return ()
    return (
        Deployment(
            target=target,
            deployment_id=f"{name}@{target}",
            model=f"{vendor_of(provider, model)}/{model}",
            api_base=api_base(provider),
            api_key=f"os.environ/{key_variable(provider)}" if provider.api_key else "none",
        ),
    )


def _replicas(name: str, model: ServedModel) -> tuple[Deployment, ...]:
    vendor, mode = ROUTING[model.type]
    return tuple(
        Deployment(
            target=model.model,
            deployment_id=f"{name}@{replica}",
            model=f"{vendor}/{model.served_model_name}",
            api_base=engine_url(replica),
            api_key="os.environ/ENGINE_API_KEY",
            mode=mode,
        )
        for replica in model.replicas
    )


def vendor_of(provider: Provider, model: str) -> str:
    """LiteLLM's name of who serves; all that are not clouds speak OpenAI's protocol."""
    if provider.kind == "cloud":
        return provider.vendor or provider.name
    # For `openai/*` LiteLLM lists OpenAI's own models, for its vLLM provider none; but that one
    # has neither speech nor images.
    return "hosted_vllm" if model.endswith("*") else "openai"


def api_base(provider: Provider) -> str | None:
    """Where its OpenAI API begins: `/v1` goes without saying."""
    if provider.base_url is None or provider.kind == "cloud":
        return provider.base_url
    base = provider.base_url.rstrip("/")
    return base if re.search(r"//[^/]+/", base) else f"{base}/v1"


def host_of(url: str) -> str:
    """The host that an address names; empty where it names none, or its port is none."""
    with contextlib.suppress(ValueError):  # what urllib says to a port that is none
        parts = urlsplit(url)
        if parts.port != 0:
            return parts.hostname or ""
    return ""


def reaches_host(provider: Provider) -> bool:
    """Whether it runs on this server, outside of its containers."""
    return host_of(provider.base_url or "") == HOST_NAME


def key_variable(provider: Provider) -> str:
    """The gateway's environment variable that holds its key."""
    return f"PROVIDER_KEY_{provider.name.upper().replace('-', '_')}"


def used_providers(state: State) -> tuple[Provider, ...]:
    """Those that a route names."""
    targets = {t for r in state.routes for t in (*r.members, *r.fallbacks, *r.context_fallbacks)}
    names = {target.partition("/")[0] for target in targets if "/" in target}
    return tuple(provider for provider in state.providers if provider.name in names)


def is_public(name: str, state: State) -> bool:
    """Whether a request may name it: a public name, a pattern, or what a pattern matches."""
    names = public_names(state)
    return name in names or any(
        name.startswith(pattern[:-1]) for pattern in names if pattern.endswith("*")
    )


def check_routes(state: State, *, known: Collection[str] = ()) -> None:
    """Refuse a wish in which a route could not be served; `known` faults are old."""
    if faults := [fault for fault in route_faults(state) if fault not in known]:
        raise RefusedError(f"{'; '.join(faults)}.", advice="Change the route, or what it names.")


def route_faults(state: State) -> list[str]:
    """What routes name and is not there, or cannot answer for one name."""
    meant = _meanings(state)
    return [
        f"The route {route.name} cannot be served: {fault}"
        for route in state.routes
        for fault in _route_faults(route, state, meant)
    ]


def _route_faults(route: Route, state: State, meant: Mapping[str, str]) -> Iterator[str]:
    for target in route.members:
        if _is_absent(target, state):
            yield f"there is no model or provider for {target!r}"
    for target in (*route.fallbacks, *route.context_fallbacks):
        if target not in meant and _is_absent(target, state):
            yield f"nothing is called {target!r} to fall back to"
        if meant.get(target) == route.name:
            yield f"it falls back to itself as {target!r}"
    modes = {ROUTING[model.type][1] for model in state.models if model.name in route.members}
    if len(modes) > 1:
        yield f"its members are of different kinds: {', '.join(sorted(modes))}"
    namesake = next((m.name for m in state.models if m.served_model_name == route.name), None)
    if namesake is not None and namesake not in route.members:
        yield f"it bears the name of the model {namesake}, which is not among its members"


def _is_absent(target: str, state: State) -> bool:
    owner, slash, model = target.partition("/")
    if slash:
        return not model or all(provider.name != owner for provider in state.providers)
    return all(known.name != owner for known in state.models)


# --- what providers have -------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class ProviderHealth:
    """What a provider said when it was asked for its models."""

    provider: str
    verdict: Literal["answers", "fails", "unknown"]
    models: tuple[str, ...] = ()  # sorted; a route names them as `provider/model`
    unusable: int = 0  # models whose ids no route can name
    latency_ms: float | None = None  # of the list
    fault: str = ""
    advice: str = ""


def model_lists(provider: Provider) -> tuple[str, ...]:
    """Where its models may be listed: the first address that is there tells."""
    base = (api_base(provider) or "").rstrip("/")
    tags = (f"{base.removesuffix('/v1')}/api/tags",) if provider.kind == "ollama" else ()
    return (*tags, f"{base}/models") if base else ()


def unlisted(provider: Provider) -> ProviderHealth:
    """What is known of a cloud whose address only LiteLLM knows."""
    return ProviderHealth(
        provider=provider.name,
        verdict="unknown",
        fault="LiteLLM knows its address, so its models cannot be listed from here.",
        advice=f"Name them in routes as {provider.name}/MODEL, as in its own documentation.",
    )


def parse_listed(provider: Provider, url: str, body: bytes, latency_ms: float) -> ProviderHealth:
    """The models in an answer of `/v1/models`, or of Ollama's `/api/tags`."""
    ids = _listed_ids(body)
    if ids is None:
        raise ProviderError(
            f"{url} answers, but not with a list of models.",
            advice="Correct the address: the path before `/models`, most often /v1.",
        )
    usable = sorted(name for name in ids if _is_target(f"{provider.name}/{name}"))
    return ProviderHealth(
        provider=provider.name,
        verdict="answers",
        models=tuple(usable),
        unusable=len(ids) - len(usable),
        latency_ms=latency_ms,
    )


def _listed_ids(body: bytes) -> set[str] | None:
    try:
        answer = json.loads(body)
    except ValueError:  # not JSON, or not UTF-8
        return None
    match answer:
        case {"data": [*entries]} | {"models": [*entries]} if all(
            isinstance(entry, dict) for entry in entries
        ):
            return {str(entry.get("id") or entry.get("name") or "") for entry in entries}
        case _:
            return None


_TARGET: Final = pydantic.TypeAdapter[str](Annotated[str, TARGET_RULE])


def _is_target(text: str) -> bool:
    try:
        _TARGET.validate_python(text)
    except pydantic.ValidationError:
        return False
    return not text.endswith(("*", "/"))


def list_refusal(provider: Provider, url: str, status: int, location: str) -> ProviderError:
    """What another status than 200 means, where models were asked for."""
    match status:
        case 401 | 403:
            said = "refuses the key" if provider.api_key else "asks for a key"
            advice = f"Give the right one: `provider add {provider.name} --ask-key`."
        case 404:
            said, advice = "is not there", "Correct the address: what stands before `/models`."
        case 301 | 302 | 303 | 307 | 308:
            said = f"sends elsewhere, to {host_of(location) or 'another path'}"
            advice = "Give the address that it means, if that is whom you trust with the key."
        case 429:
            said, advice = "is asked too often (429)", "Wait a while."
        case _:
            said, advice = f"answers with {status}", "Look at the provider's own log."
    return ProviderError(f"{url} {said}.", advice=advice)


# How a server of that kind is told to answer others than itself.
LISTENING: Final[Mapping[ProviderKind, str]] = {
    "ollama": "start it with OLLAMA_HOST=0.0.0.0",
    "llama.cpp": "start llama-server with --host 0.0.0.0",
    "lm-studio": "switch on `Serve on Local Network`",
    "exo": "start exo there",
    "openai": "start it, listening on all addresses",
    "cloud": "look whether it has an outage",
}

# What a failed connection says -> fact, advice; {listening}: by kind.
CONNECTION_CAUSES: Final = (
    (
        r"\[Errno -\d\]|name resolution|not known",
        "its name does not resolve",
        "Correct the name, or give the address in numbers.",
    ),
    (
        r"certificate verify failed",
        "its certificate is not trusted",
        "LiteLLM refuses it, too: use one of a known authority, or http:// in your own network.",
    ),
    (r"_alert_", "it has no certificate for that name", "Write the name that it is known by."),
    (r"\bssl\b|tls", "it does not speak TLS there", "Try http://, or another port."),
    (r"refused", "nobody listens there", "Correct the port, or {listening}."),
    (r"unreachable|no route", "there is no way to it", "Correct the address, or the network."),
    (
        r"disconnected|status line|reset by peer",
        "it does not speak HTTP there",
        "Try https://, or another port.",
    ),
)


def connection_fault(provider: Provider, said: str) -> ProviderError:
    """Why a provider cannot be asked at all, from what the connection said."""
    for pattern, fact, advice in CONNECTION_CAUSES:
        if re.search(pattern, said, re.IGNORECASE):
            return ProviderError(
                f"{provider.name} cannot be reached at {provider.base_url}: {fact}.",
                advice=advice.format(listening=LISTENING[provider.kind]),
            )
    return ProviderError(
        f"{provider.name} cannot be reached at {provider.base_url}.",
        advice=f"Correct the address, or {LISTENING[provider.kind]}.",
    )


CircuitState = Literal["active", "degraded", "unavailable", "cool-down"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DeploymentFigures:
    """What LiteLLM has counted of one deployment since it started; reasons are in words."""

    failing: bool = False  # as its last answer was
    successes: int = 0
    failures: Mapping[str, int] = field(default_factory=dict)
    cooldowns: Mapping[str, int] = field(default_factory=dict)
    cache_hits: int = 0  # among the successes


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayFigures:
    """What LiteLLM has counted: by deployment, and fallbacks by (asked for, answered by)."""

    deployments: Mapping[str, DeploymentFigures] = field(default_factory=dict)
    fallbacks: Mapping[tuple[str, str], int] = field(default_factory=dict)


_SAMPLE: Final = re.compile(r"^litellm_(\w+)\{(.*)\} (\S+)$", re.MULTILINE)
_LABEL: Final = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def parse_figures(metrics: str) -> GatewayFigures:
    """From LiteLLM's `/metrics` (1.106 and 1.109), as METRICS orders them."""
    by_id: dict[str, list[tuple[str, Mapping[str, str], float]]] = {}
    fallbacks: Counter[tuple[str, str]] = Counter()
    for name, text, value in _SAMPLE.findall(metrics):
        labels = dict(_LABEL.findall(text))
        if name == "deployment_successful_fallbacks_total":
            fallbacks[labels["requested_model"], labels["fallback_model"]] += int(float(value))
        elif labels.get("model_id"):  # a request that was refused before any is nobody's
            by_id.setdefault(labels["model_id"], []).append((name, labels, float(value)))
    return GatewayFigures(
        deployments={name: _figures(samples) for name, samples in by_id.items()},
        fallbacks=fallbacks,
    )


def _figures(samples: Sequence[tuple[str, Mapping[str, str], float]]) -> DeploymentFigures:
    def by_reason(wanted: str) -> dict[str, int]:
        counted: Counter[str] = Counter()
        for name, labels, value in samples:
            if name == wanted:
                status, kind = labels["exception_status"], labels.get("exception_class", "")
                counted[failure_reason(status, kind)] += int(value)
        return dict(counted)

    found = {name: value for name, _, value in samples}
    return DeploymentFigures(
        # 1 and 2 overwrite each other: a cool-down is told by its counter alone.
        failing=found.get("deployment_state", 0) > 0,
        successes=int(found.get("deployment_success_responses_total", 0)),
        failures=by_reason("deployment_failure_responses_total"),
        cooldowns=by_reason("deployment_cooled_down_total"),
        cache_hits=int(found.get("cache_hits_metric_total", 0)),
    )


_REASONS: Final = {
    "400": "it refuses the request", "401": "it refuses the key", "403": "it forbids the request",
    "404": "it does not know the model", "408": "it does not answer in time",
    "429": "it is asked too much", "500": "it fails, or cannot be reached",
    "502": "it cannot be reached", "503": "it is not available",
    "504": "it does not answer in time",
}  # fmt: skip


def failure_reason(status: str, kind: str = "") -> str:
    """An HTTP status in words; a refused connection is 500 for LiteLLM, as an error inside is."""
    if not status.isdigit():
        return kind.rpartition(".")[2] or "it fails"
    return f"{_REASONS.get(status, 'it fails')} ({status})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Circuit:
    """How a deployment stands with LiteLLM, since when and why."""

    state: CircuitState
    since: datetime | None = None  # None: since before anybody looked
    reason: str = ""  # of its last failure
    failed_at: datetime | None = None
    in_a_row: int = 0  # failures since its last success
    cooling_until: datetime | None = None


@dataclass
class Breakers:
    """What becomes of deployments, by what LiteLLM counts of them every few seconds."""

    gateway: str = ""  # whose counters; another one's begin at nothing
    figures: GatewayFigures | None = None
    circuits: Mapping[str, Circuit] = field(default_factory=dict)

    def feed(
        self, gateway: str, figures: GatewayFigures, cooldowns: Mapping[str, float], now: datetime
    ) -> None:
        """One look; `cooldowns` are seconds by public name."""
        if gateway != self.gateway:
            self.gateway, self.figures, self.circuits = gateway, None, {}
        # At the first look nobody knows when what was counted has happened.
        old = (self.figures or figures).deployments
        self.circuits = {
            key: _next_circuit(
                self.circuits.get(key), old.get(key, DeploymentFigures()), new,
                timedelta(seconds=cooldowns.get(key.partition("@")[0], COOLDOWN_SECONDS)), now,
            )
            for key, new in figures.deployments.items()
        }  # fmt: skip
        self.figures = figures


RECENT: Final = timedelta(minutes=1)
FAILURES_IN_A_ROW: Final = 3  # until who is never put aside counts as unavailable


def _next_circuit(
    before: Circuit | None, old: DeploymentFigures, new: DeploymentFigures,
    cooldown: timedelta, now: datetime,
) -> Circuit:  # fmt: skip
    cooled, failed = _risen(old.cooldowns, new.cooldowns), _risen(old.failures, new.failures)
    known = before or Circuit(state="active", reason=next(iter(new.failures), ""))
    until = now + cooldown if cooled else known.cooling_until
    if until and until <= now and not new.failing:
        until = None
    in_a_row = 0
    if new.failing:
        so_far = 0 if new.successes > old.successes else known.in_a_row
        in_a_row = max(so_far + max(sum(failed.values()), sum(cooled.values())), 1)
    failed_at = now if cooled or failed else known.failed_at
    if until and now < until:
        state: CircuitState = "cool-down"
    elif new.failing:
        state = "unavailable" if until or in_a_row >= FAILURES_IN_A_ROW else "degraded"
    else:
        state = "degraded" if failed_at and now - failed_at < RECENT else "active"
    same = before is not None and before.state == state and not cooled
    since = known.since if same or before is None else now
    reason = next(iter((*cooled, *failed)), known.reason)
    return Circuit(
        state=state, since=since, reason=reason, failed_at=failed_at, in_a_row=in_a_row,
        cooling_until=until,
    )  # fmt: skip


def _risen(old: Mapping[str, int], new: Mapping[str, int]) -> dict[str, int]:
    return {key: rise for key, n in new.items() if (rise := n - old.get(key, 0)) > 0}


@dataclass(frozen=True, kw_only=True, slots=True)
class RouteHealth:
    """How it is with the ways in at one moment."""

    figures: GatewayFigures = field(default_factory=GatewayFigures)
    circuits: Mapping[str, Circuit] = field(default_factory=dict)
    loads: Mapping[ContainerName, EngineLoad | None] = field(default_factory=dict)


# =============================================================================
# §10 Usage — pure: who used how much, and the queries that tell
# =============================================================================

Grouping = Literal["key", "group", "model", "day", "hour"]
USAGE_ROWS: Final = 1000
HOURS_DAYS: Final = 31  # as many days are told by the hour


@dataclass(frozen=True, kw_only=True, slots=True)
class UsageQuery:
    """Which use to add up: whole days of UTC, both ends included, and by what."""

    first: date
    last: date
    by: Grouping = "key"
    limit: int = USAGE_ROWS  # subjects; the total is that of all

    def __post_init__(self) -> None:
        check_days(self.first, self.last, HOURS_DAYS if self.by == "hour" else None)


def check_days(first: date, last: date, most: int | None) -> None:
    """Refuse a range that ends before it begins, or has more days than can be told so finely."""
    if last < first:
        raise InvalidError(f"{last} is before {first}.", advice="Give the earlier day first.")
    if most is not None and (last - first).days >= most:
        raise InvalidError(
            f"That is told for at most {most} days.",
            advice="Choose a shorter range, or add it up by day.",
        )


def parse_usage_query(by: str, first: str, last: str, today: date) -> UsageQuery:
    """As typed: without its ends, the last 30 days, or by the hour the last two."""
    start, end = parse_days(first, last, today, 2 if by == "hour" else 30)
    return UsageQuery(first=start, last=end, by=parse_grouping(by, get_args(Grouping)))


def parse_grouping(by: str, known: Sequence[Any]) -> Any:
    if by not in known:
        raise InvalidError(f"Nothing adds up by {by!r}.", advice=f"Choose from {', '.join(known)}.")
    return by


def parse_days(first: str, last: str, today: date, usual: int) -> tuple[date, date]:
    """The ends of a range as typed; else today, and so many days until the end."""
    end = _parse_day(last) or today
    start = date.fromordinal(max(end.toordinal() - usual + 1, 1))
    return _parse_day(first) or start, end


def _parse_day(text: str) -> date | None:
    try:
        return date.fromisoformat(text) if text else None
    except ValueError as error:
        raise InvalidError(
            f"{text!r} is no day.", advice="Write it as year-month-day: 2026-11-21."
        ) from error


@dataclass(frozen=True, kw_only=True, slots=True)
class UsageRow:
    """What one subject used; cached tokens are among those of the prompts."""

    subject: str  # a key's hash, a group's id, a model, a day, an hour
    name: str
    requests: int
    failures: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    latency_ms: float | None  # the mean of what was answered; None where nothing was timed

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class UsageReport:
    """The use of a range, by subject, and in total also where rows were left out."""

    query: UsageQuery
    total: UsageRow
    rows: tuple[UsageRow, ...]
    left_out: int = 0


@dataclass(frozen=True, slots=True)
class Sql:
    """A statement, and apart from it the values that PostgreSQL puts in."""

    text: str
    values: Mapping[str, object]


# The daily tables are small and outlive the clearing of spend logs, so they tell all that they
# can: whole days. A day's row has the name of the model that answered; that of the route is not
# part of its key (LiteLLM 1.108), so of several routes to one model it names any.
_DAILY: Final = """
    SELECT {subject} AS subject, {sign}api_requests AS requests, {sign}failed_requests AS failures,
           {sign}prompt_tokens AS prompt, {sign}cache_read_input_tokens AS cached,
           {sign}completion_tokens AS completion,
           {sign}total_response_time_ms AS took_ms, {sign}timed_requests AS timed
      FROM "{table}" WHERE date BETWEEN %(first)s AND %(last)s"""
# Hours are known to the spend logs only, whose million rows are too much to read each time.
_HOURLY: Final = """
    SELECT hour AS subject, requests, CASE WHEN failed THEN requests ELSE 0 END AS failures, prompt,
           cached, completion, CASE WHEN failed THEN 0 ELSE took_ms END AS took_ms,
           CASE WHEN failed THEN 0 ELSE timed END AS timed
      FROM llm_manager.hours WHERE hour >= %(first)s::date AND hour < %(last)s::date + 1"""
# First by subject, which PostgreSQL does without sorting a million rows. The empty grouping set is
# the total, whatever the limit leaves out.
_SUMMED: Final = """
WITH used AS ({source}
), subjects AS (
  SELECT subject::text AS subject, sum(requests) AS requests, sum(failures) AS failures,
         sum(prompt) AS prompt, sum(cached) AS cached, sum(completion) AS completion,
         sum(took_ms)::float AS took_ms, sum(timed) AS timed
    FROM used GROUP BY used.subject
), summed AS (
  SELECT coalesce(subject, '') AS subject, grouping(subject) AS is_total,
         coalesce(sum(requests), 0)::bigint AS requests,
         coalesce(sum(failures), 0)::bigint AS failures,
         coalesce(sum(prompt), 0)::bigint AS prompt, coalesce(sum(cached), 0)::bigint AS cached,
         coalesce(sum(completion), 0)::bigint AS completion,
         coalesce(sum(prompt + completion), 0) AS tokens,
         sum(took_ms) / nullif(sum(timed), 0) AS latency_ms, count(*) OVER () - 1 AS subjects
    FROM subjects GROUP BY GROUPING SETS ((subject), ())
   ORDER BY is_total DESC, {order} LIMIT %(limit)s + 1
)
SELECT subject, {name} AS name, requests, failures, prompt, cached, completion, latency_ms, subjects
  FROM summed ORDER BY is_total DESC, {order}"""
_BY_TOKENS, _BY_TIME = "tokens DESC, requests DESC, subject", "subject"
_KEY_NAME: Final = """coalesce(
         (SELECT key_alias FROM "LiteLLM_VerificationToken" WHERE token = subject),
         (SELECT key_alias FROM "LiteLLM_DeletedVerificationToken" WHERE token = subject
           ORDER BY deleted_at DESC LIMIT 1), '')"""
_GROUP_NAME: Final = """coalesce(
         (SELECT team_alias FROM "LiteLLM_TeamTable" WHERE team_id = subject),
         (SELECT team_alias FROM "LiteLLM_DeletedTeamTable" WHERE team_id = subject
           ORDER BY deleted_at DESC LIMIT 1), '')"""


# LiteLLM puts its name of who serves a model before it; our own engines go without.
_MODEL_NAME: Final = "regexp_replace(subject, '^hosted_vllm/', '')"


def usage_sql(query: UsageQuery) -> Sql:
    """Rows for `parse_usage`; its total comes first."""
    everything = partial(_daily, "LiteLLM_DailyUserSpend")
    match query.by:
        case "key":
            source, name = everything("api_key"), _KEY_NAME
        case "group":
            # Each request is in the one table, and if it was a group's then in the other, too.
            groups = partial(_daily, "LiteLLM_DailyTeamSpend")
            parts = everything("''"), groups("''", sign="-"), groups("team_id")
            source, name = "\n    UNION ALL".join(parts), _GROUP_NAME
        case "model":
            source, name = everything("coalesce(model, '')"), _MODEL_NAME
        case "day":
            source, name = everything("date"), "subject"
        case "hour":
            source, name = _HOURLY, "subject"
        case _:
            assert_never(query.by)
    order = _BY_TIME if query.by in {"day", "hour"} else _BY_TOKENS
    return Sql(
        _SUMMED.replace("{source}", source).replace("{name}", name).replace("{order}", order),
        {"first": str(query.first), "last": str(query.last), "limit": query.limit},
    )


def _daily(table: str, subject: str, sign: str = "") -> str:
    return _DAILY.format(table=table, subject=subject, sign=sign)


def parse_usage(query: UsageQuery, rows: Sequence[Sequence[Any]]) -> UsageReport:
    """From what `usage_sql` brings."""
    total, *found = [_usage_row(row, query.by) for row in rows]
    return UsageReport(
        query=query,
        total=replace(total, name="total"),
        # What no group used is there also where it is nothing.
        rows=tuple(row for row in found if row.requests or row.tokens),
        left_out=rows[0][-1] - len(found),
    )


def _usage_row(row: Sequence[Any], by: Grouping) -> UsageRow:
    subject, name, asked, failures, prompt, cached, completion, latency, _ = row
    return UsageRow(
        subject=subject,
        name=name or _nameless(subject, by),
        requests=asked,
        failures=failures,
        prompt_tokens=prompt,
        cached_tokens=cached,
        completion_tokens=completion,
        latency_ms=latency,
    )


MASTER_KEY_ALIAS: Final = "litellm_proxy_master_key"  # as LiteLLM accounts for it


def _nameless(subject: str, by: Grouping) -> str:
    match by:
        case "key" if subject == MASTER_KEY_ALIAS:
            return "the operator, or a key for emergencies"
        case "key":
            return f"{subject[:8]}…" if re.fullmatch(r"[0-9a-f]{64}", subject) else subject
        case "group":
            return subject or "no group"
        case _:
            return "unknown"


# --- keys that need a look ------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """How far a key or a group is from its limits; the busiest minute is that of the last day."""

    kind: Literal["key", "group"]
    name: str
    created_at: datetime
    used_at: datetime | None  # None: never, or not told of a group
    budget: tuple[float, float | None] = (0.0, None)  # used, of how much; None: no limit
    requests_per_minute: tuple[int, int | None] = (0, None)
    tokens_per_minute: tuple[int, int | None] = (0, None)

    @property
    def nearest(self) -> tuple[float, str]:
        """The limit that it is closest to: which part of it is used, and its name."""
        limits = {
            "budget": self.budget,
            "requests per minute": self.requests_per_minute,
            "tokens per minute": self.tokens_per_minute,
        }
        return max((used / most, name) for name, (used, most) in limits.items() if most)

    @property
    def is_limited(self) -> bool:
        return any(
            most for _, most in (self.budget, self.requests_per_minute, self.tokens_per_minute)
        )


CLOSE: Final = 0.8
STANDINGS_SQL: Final = Sql(
    """
WITH minutes AS (
  SELECT api_key, team_id, date_trunc('minute', "startTime") AS minute, count(*) AS requests,
         sum(total_tokens) AS tokens
    FROM "LiteLLM_SpendLogs"
   WHERE "startTime" >= now() AT TIME ZONE 'UTC' - interval '1 day' GROUP BY 1, 2, 3
), of_keys AS (
  SELECT api_key AS subject, max(requests) AS requests, max(tokens) AS tokens
    FROM minutes GROUP BY 1
), of_groups AS (
  SELECT subject, max(requests) AS requests, max(tokens) AS tokens
    FROM (SELECT team_id AS subject, minute, sum(requests) AS requests, sum(tokens) AS tokens
            FROM minutes GROUP BY 1, 2) AS together GROUP BY 1
)
SELECT 'key', coalesce(key_alias, ''), created_at, last_active, spend, max_budget,
       coalesce(requests, 0)::bigint, rpm_limit, coalesce(tokens, 0)::bigint, tpm_limit
  FROM "LiteLLM_VerificationToken" LEFT JOIN of_keys ON token = subject
UNION ALL
SELECT 'group', coalesce(team_alias, ''), created_at, NULL, spend, max_budget,
       coalesce(requests, 0)::bigint, rpm_limit, coalesce(tokens, 0)::bigint, tpm_limit
  FROM "LiteLLM_TeamTable" LEFT JOIN of_groups ON team_id = subject
 ORDER BY 1, 2""",
    {},
)


def parse_standings(rows: Iterable[Sequence[Any]]) -> list[Standing]:
    """From what `STANDINGS_SQL` brings; LiteLLM's times are UTC without saying so."""
    return [
        Standing(
            kind=kind,
            name=name,
            created_at=created_at.replace(tzinfo=UTC),
            used_at=used_at and used_at.replace(tzinfo=UTC),
            budget=(spend, max_budget),
            requests_per_minute=(busiest, rpm_limit),
            tokens_per_minute=(most_tokens, tpm_limit),
        )
        for (
            kind, name, created_at, used_at, spend, max_budget, busiest, rpm_limit, most_tokens,
            tpm_limit,
        ) in rows
    ]  # fmt: skip


def close_to_limits(standings: Iterable[Standing]) -> list[Standing]:
    """Those that have used most of a limit, the closest first."""
    close = [s for s in standings if s.is_limited and s.nearest[0] >= CLOSE]
    return sorted(close, key=lambda standing: standing.nearest, reverse=True)


def unused_keys(standings: Iterable[Standing], since: datetime) -> list[Standing]:
    """Keys that nobody has used since then, though they were there; never used ones first."""
    unused = [
        s for s in standings if s.kind == "key" and max(s.used_at or since, s.created_at) <= since
    ]
    return sorted(unused, key=lambda s: (s.used_at is not None, s.used_at or s.created_at))


# --- what the engines counted ---------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineTally:
    """The tokens of an engine since it started: by its own count, and in LiteLLM's accounts."""

    engine: ContainerName
    since: datetime
    counted: int
    accounted: int
    broken_off: int  # streams that their clients left
    guessed: int  # what of the accounted is of those

    @property
    def difference(self) -> int:
        return self.counted - self.accounted


# Where a client leaves its stream before the engine tells its count, LiteLLM makes one up with a
# tokenizer of its own, and this comes with it (1.106).
_GUESSED: Final = "metadata #>> '{usage_object,cache_creation_input_tokens}' IS NOT NULL"


def tally_sql(engines: Mapping[ContainerName, datetime]) -> Sql:
    """The tokens in LiteLLM's accounts of each of these engines since its start."""
    # Of the hour in which it started only a part counts.
    text = """
SELECT engine, coalesce(sum(tokens), 0)::bigint,
       coalesce(sum(requests) FILTER (WHERE guessed), 0)::bigint,
       coalesce(sum(tokens) FILTER (WHERE guessed), 0)::bigint
  FROM (SELECT engine, address, start AT TIME ZONE 'UTC' AS start
          FROM unnest(%(engines)s::text[], %(addresses)s::text[], %(starts)s::timestamptz[])
               AS given(engine, address, start)) AS started
  LEFT JOIN LATERAL (
    SELECT requests, prompt + completion AS tokens, guessed FROM llm_manager.hours
     WHERE hour > start AND starts_with(api_base, address) AND NOT failed
    UNION ALL
    SELECT 1, total_tokens, {guessed} FROM "LiteLLM_SpendLogs"
     WHERE "startTime" >= start AND "startTime" < date_trunc('hour', start) + interval '1 hour'
       AND starts_with(api_base, address) AND status IS DISTINCT FROM 'failure'
  ) AS accounted ON true
 GROUP BY engine""".replace("{guessed}", _GUESSED)
    return Sql(
        text,
        {
            "engines": list(engines),
            "addresses": [engine_url(engine) for engine in engines],
            "starts": list(engines.values()),
        },
    )


# --- sums by the hour -----------------------------------------------------------

# In a schema of our own, because LiteLLM's migrations may drop what they do not know in theirs.
_SUMS: Final = ("requests", "prompt", "cached", "completion", "took_ms", "timed")


def _adding(rows: str) -> str:
    """To the sums what these rows are; sorted, so that two gateways never wait in a circle.

    Of cached tokens the metadata has what the provider said, which may be anything. With OFFSET 0
    PostgreSQL sorts figures, and not whole rows with their metadata.
    """
    key = "hour, api_base, failed, guessed"
    return f"""
  INSERT INTO llm_manager.hours AS known
  SELECT {key}, count(*), sum(prompt_tokens),
         sum(CASE WHEN cached ~ '^[0-9]{{1,9}}$' THEN cached::int ELSE 0 END),
         sum(completion_tokens), coalesce(sum(request_duration_ms), 0), count(request_duration_ms)
    FROM (SELECT date_trunc('hour', "startTime") AS hour, coalesce(api_base, '') AS api_base,
                 coalesce(status = 'failure', false) AS failed, {_GUESSED} AS guessed,
                 prompt_tokens, completion_tokens, request_duration_ms,
                 metadata #>> '{{usage_object,prompt_tokens_details,cached_tokens}}' AS cached
            FROM {rows} OFFSET 0) AS told
   GROUP BY {key} ORDER BY {key}
      ON CONFLICT ({key})
         DO UPDATE SET {", ".join(f"{each} = known.{each} + excluded.{each}" for each in _SUMS)};"""  # noqa: S608


_NOT_ADDED: Final = """"LiteLLM_SpendLogs" WHERE "startTime" >= coalesce(
             (SELECT max(known.hour) + interval '1 hour' FROM llm_manager.hours AS known),
             '-infinity')"""
HOURS_KEPT: Final = """SELECT 1 FROM pg_trigger
 WHERE tgrelid = to_regclass('"LiteLLM_SpendLogs"') AND tgname = 'llm_manager_hours'"""
# PostgreSQL adds to them what LiteLLM writes, as it writes it, and what retention deletes stays in.
# When this begins, the hours of which every request is still known are added up anew.
KEEP_HOURS: Final = f"""DO $keep$
BEGIN
  SET LOCAL jit = off;
  LOCK TABLE "LiteLLM_SpendLogs" IN SHARE ROW EXCLUSIVE MODE;
  IF EXISTS ({HOURS_KEPT}) THEN RETURN; END IF;
  CREATE SCHEMA IF NOT EXISTS llm_manager;
  CREATE TABLE IF NOT EXISTS llm_manager.hours (
    hour timestamp, api_base text, failed bool, guessed bool,
    {", ".join(f"{each} bigint NOT NULL" for each in _SUMS)},
    PRIMARY KEY (hour, api_base, failed, guessed));
  DELETE FROM llm_manager.hours WHERE hour > (SELECT min("startTime") FROM "LiteLLM_SpendLogs");
  {_adding(_NOT_ADDED)}
  CREATE OR REPLACE FUNCTION llm_manager.add_hours() RETURNS trigger LANGUAGE plpgsql AS $add$
BEGIN
  {_adding("added")}
  RETURN NULL;
EXCEPTION WHEN OTHERS THEN  -- LiteLLM may change a column, and must not lose its row for that
  RAISE WARNING 'llm_manager.hours: %', SQLERRM;
  RETURN NULL;
END $add$;
  CREATE TRIGGER llm_manager_hours AFTER INSERT ON "LiteLLM_SpendLogs"
    REFERENCING NEW TABLE AS added FOR EACH STATEMENT EXECUTE FUNCTION llm_manager.add_hours();
END $keep$"""  # noqa: S608 - constants alone


# --- statements -----------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class StatementLine:
    """What a group used of a model in a month; cached tokens cost what others of a prompt do."""

    group: str
    model: str
    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    cost: float | None  # None: the model has no price


@dataclass(frozen=True, kw_only=True, slots=True)
class Statement:
    """The use of a month by groups and models, at the prices of today."""

    month: date  # its first day
    currency: str
    lines: tuple[StatementLine, ...]

    @property
    def by_group(self) -> dict[str, list[StatementLine]]:
        groups: dict[str, list[StatementLine]] = {}
        for line in self.lines:
            groups.setdefault(line.group, []).append(line)
        return groups


_STATEMENT: Final = """
SELECT team, {name} AS name, {model} AS model, sum(requests)::bigint, sum(prompt)::bigint,
       sum(cached)::bigint, sum(completion)::bigint
  FROM ({source}) AS used GROUP BY team, subject HAVING sum(requests) > 0
 ORDER BY team = '', name, team, model"""


def parse_month(text: str, today: date) -> date:
    """Its first day; without a text, that of the month before this."""
    last = today.replace(day=1) - timedelta(days=1)
    return (_parse_day(f"{text}-01") if text else None) or last.replace(day=1)


def statement_sql(month: date) -> Sql:
    """Rows for `parse_statement`."""
    model = "coalesce(model, '')"
    source = "\n    UNION ALL".join((
        _daily("LiteLLM_DailyUserSpend", f"'' AS team, {model}"),
        _daily("LiteLLM_DailyTeamSpend", f"'' AS team, {model}", sign="-"),
        _daily("LiteLLM_DailyTeamSpend", f"team_id AS team, {model}"),
    ))  # fmt: skip
    name = _GROUP_NAME.replace("subject", "team")
    last = month.replace(day=calendar.monthrange(month.year, month.month)[1])
    text = _STATEMENT.replace("{name}", name).replace("{source}", source)
    text = text.replace("{model}", _MODEL_NAME)
    return Sql(text, {"first": str(month), "last": str(last)})


def parse_statement(month: date, rows: Iterable[Sequence[Any]], prices: Prices) -> Statement:
    """From what `statement_sql` brings."""
    return Statement(
        month=month,
        currency=prices.currency,
        lines=tuple(
            StatementLine(
                group=name or _nameless(team, "group"),
                model=model or "unknown",
                requests=asked,
                prompt_tokens=prompt,
                cached_tokens=cached,
                completion_tokens=completion,
                cost=prices.cost(model, prompt, completion),
            )
            for team, name, model, asked, prompt, cached, completion in rows
        ),
    )


# --- as a file -------------------------------------------------------------------


def render_csv(headers: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """A table for other programs; what a spreadsheet would run as a formula is text in it."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(headers)
    writer.writerows([[_harmless(cell) for cell in row] for row in rows])
    return file.getvalue()


def _harmless(cell: object) -> object:
    is_formula = isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{cell}" if is_formula else cell


# =============================================================================
# §11 Energy — pure: joules from looks at GPUs, and whose they are
# =============================================================================

# Whole millijoules, as NVML counts: then parts add up to their whole exactly, however it is split.
EnergyMethod = Literal["counter", "power", "unmeasured"]
LONGEST_LOOK_SECONDS: Final = 60.0
PERIODS_BRIDGED: Final = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class EnergyReading:
    """One look at a whole GPU; None is what it did not tell.

    `at` are seconds of a clock that only goes forward, and goes on while the server sleeps.
    """

    at: float
    counter_mj: int | None = None  # since the driver was loaded, or the GPU reset
    power_w: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """What a GPU took between two looks; without millijoules nobody can know."""

    seconds: float
    energy_mj: int | None
    method: EnergyMethod


ShareMethod = Literal["whole GPU", "process utilisation", "MIG activity", "equal split", "idle"]
NOBODY: Final = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class EnergyShare:
    """What one replica, or nobody, took of one GPU between two looks at it.

    The shares of a GPU's interval add up to what was measured. `energy_mj` is None in the one share
    of an interval that nobody measured.
    """

    gpu_uuid: str
    start: float  # seconds since 1970
    seconds: float
    model: str  # NOBODY: the GPU's idle baseline, and what no replica accounts for
    replica: int
    energy_mj: int | None
    method: ShareMethod

    @property
    def measured(self) -> bool:
        """Whether the GPU itself told; else a method divided what it told."""
        return self.energy_mj is not None and self.method in ("whole GPU", "idle")


@dataclass(frozen=True, kw_only=True, slots=True)
class EnergyRates:
    """What a kilowatt-hour was worth while it was taken; kept with each record."""

    price_per_kwh: float | None = None
    currency: str = "EUR"
    co2_grams_per_kwh: float | None = None
    overhead: float = 1.0


def measure(before: EnergyReading, now: EnergyReading, period: float) -> Interval:
    """The energy between two looks that should be a period apart.

    The counter is exact however late a look comes, so a stalled program loses nothing; one that
    went backwards was reset, and says nothing of this interval. Power is integrated by trapezoid,
    over a few periods at most. What is longer was a sleep or a stop: it is left unmeasured.
    """
    seconds = now.at - before.at
    if before.counter_mj is not None and now.counter_mj is not None:
        taken = now.counter_mj - before.counter_mj
        if taken >= 0 and seconds <= max(LONGEST_LOOK_SECONDS, PERIODS_BRIDGED * period):
            return Interval(seconds=seconds, energy_mj=taken, method="counter")
    if before.power_w is not None and now.power_w is not None:
        taken = round(1000 * seconds * (before.power_w + now.power_w) / 2)
        if seconds <= PERIODS_BRIDGED * period:
            return Interval(seconds=seconds, energy_mj=taken, method="power")
    return Interval(seconds=seconds, energy_mj=None, method="unmeasured")


def split_energy(energy_mj: int, weights: Mapping[str, float]) -> dict[str, int]:
    """Parts in proportion, which add up exactly; equal ones where no weight is above nothing."""
    total = math.fsum(weights.values())
    shares = {
        who: energy_mj * (weight / total if total > 0 else 1 / len(weights))
        for who, weight in weights.items()
    }
    parts = {who: math.floor(share) for who, share in shares.items()}
    by_remainder = sorted(parts, key=lambda who: (parts[who] - shares[who], who))
    left = energy_mj - sum(parts.values())
    for who in itertools.islice(itertools.cycle(by_remainder), left):
        parts[who] += 1
    return parts


# --- kept, and added up -----------------------------------------------------------

EnergyGrouping = Literal["day", "hour", "model", "gpu", "key", "group"]
EnergyTable = Literal["samples", "sessions", "models", "keys", "groups"]
KWH_MJ: Final = 3_600_000_000
SHARED_DAYS: Final = 366  # as many days are told by key or group
IDLE: Final = "(idle)"  # the subject of what the GPUs took while nobody's work explains it
NO_REQUESTS: Final = "(no requests) "  # and a model: energy of hours in which no key used it


@dataclass(frozen=True, kw_only=True, slots=True)
class EnergyQuery:
    """Which energy to add up: whole days of UTC, both ends included, and by what."""

    first: date
    last: date
    by: EnergyGrouping = "model"

    def __post_init__(self) -> None:
        most = {"hour": HOURS_DAYS, "key": SHARED_DAYS, "group": SHARED_DAYS}
        check_days(self.first, self.last, most.get(self.by))


def parse_energy_query(by: str, first: str, last: str, today: date) -> EnergyQuery:
    """As typed: without its ends, the last 30 days, or by the hour the last two."""
    start, end = parse_days(first, last, today, 2 if by == "hour" else 30)
    return EnergyQuery(first=start, last=end, by=parse_grouping(by, get_args(EnergyGrouping)))


@dataclass(frozen=True, kw_only=True, slots=True)
class EnergyPart:
    """What a subject took of a model's energy within one hour or day, at one rate."""

    start: int  # seconds since 1970: of the hour, or of the day
    subject: str  # a day, an hour, a model, a GPU's UUID, a key's hash, a group's id
    model: str  # NOBODY: idle
    energy_mj: int
    estimated_mj: int  # how much of it a method divided
    unmeasured_ms: int
    rates: EnergyRates


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenUse:
    """What a subject had a model read and make within one hour or day."""

    start: int
    subject: str
    model: str
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    name: str = ""  # of the subject, where it has another

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class EnergySum:
    """The energy of one subject; money and CO2 are at each record's own rates, with overhead."""

    subject: str
    name: str
    energy_mj: int = 0
    idle_mj: int = 0  # of it, what is nobody's
    estimated_mj: int = 0  # of it, what a method divided: the rest is measured
    unmeasured_seconds: float = 0.0  # of GPUs, whose energy nobody knows and nothing here has
    costs: Mapping[str, float] = field(default_factory=dict)  # by currency
    unpriced_mj: int = 0  # taken while there was no price
    co2_grams: float | None = None
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def kwh(self) -> float:
        return self.energy_mj / KWH_MJ

    @property
    def joules_per_output_token(self) -> float | None:
        return joules_per(self.energy_mj, self.completion_tokens)

    @property
    def joules_per_token(self) -> float | None:
        return joules_per(self.energy_mj, self.prompt_tokens + self.completion_tokens)


def joules_per(energy_mj: int, tokens: int) -> float | None:
    return energy_mj / 1000 / tokens if tokens else None


@dataclass(frozen=True, kw_only=True, slots=True)
class EnergyReport:
    """The energy of a range by subject: the rows add up to the total, to the millijoule."""

    query: EnergyQuery
    total: EnergySum
    rows: tuple[EnergySum, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class EnergySession:
    """One replica from ready to stopped; tokens and requests are by its engine's own count."""

    model: str
    replica: int
    container_id: str
    gpu_uuids: tuple[str, ...]
    start: datetime
    end: datetime | None  # None: it goes on
    energy_mj: int
    estimated_mj: int
    measured_seconds: float  # what the mean is of
    unmeasured_seconds: float
    peak_w: float
    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    costs: Mapping[str, float]
    co2_grams: float | None

    @property
    def kwh(self) -> float:
        return self.energy_mj / KWH_MJ

    @property
    def mean_w(self) -> float | None:
        return self.energy_mj / 1000 / self.measured_seconds if self.measured_seconds else None

    @property
    def joules_per_output_token(self) -> float | None:
        return joules_per(self.energy_mj, self.completion_tokens)

    @property
    def joules_per_token(self) -> float | None:
        return joules_per(self.energy_mj, self.prompt_tokens + self.completion_tokens)

    @property
    def method(self) -> str:
        """Measured, estimated, or how much of it is estimated."""
        if not self.estimated_mj:
            return "measured"
        part = self.estimated_mj / self.energy_mj
        return "estimated" if part == 1 else f"{part:.0%} estimated"


@dataclass(frozen=True, kw_only=True, slots=True)
class CsvStyle:
    """How a table is written: `;` and `,` are what a German spreadsheet reads."""

    separator: str = ","
    decimal: str = "."

    def __post_init__(self) -> None:
        if self.separator not in {",", ";", "\t"} or self.decimal not in {".", ","}:
            raise InvalidError(
                "The separator is a comma, a semicolon or a tab; the decimal mark a point or "
                "a comma.",
                advice="For a German spreadsheet: `;` and `,`.",
            )
        if self.separator == self.decimal:
            raise InvalidError(
                "The separator and the decimal mark are the same.",
                advice="With a decimal comma, choose `;`.",
            )


# =============================================================================
# §12 Benchmark — pure: loads to offer, and what engines made of them
# =============================================================================


# =============================================================================
# §13 Config generation — pure: containers, LiteLLM's YAML, the Caddyfile
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
    role: Literal["engine", "gateway", "edge", "database", "cache"]
    image: str
    network: str
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    environment: Mapping[str, str | pydantic.SecretStr] = field(default_factory=dict)
    mounts: tuple[Mount, ...] = ()
    ports: tuple[PublishedPort, ...] = ()
    extra_hosts: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    devices: tuple[str, ...] = ()  # UUIDs of GPUs or of one MIG device
    shm_mib: int = 64
    healthcheck: str | None = None
    restart: Literal["no", "unless-stopped"] = "unless-stopped"
    drop_capabilities: bool = False
    stop_seconds: int = 30
    content_hash: str = ""  # of files it reads only at start
    start_seconds: float = 60.0
    measurement_key: str = ""  # of an engine: where its memory and time are noted
    readiness: Readiness

    @property
    def hash(self) -> SpecHash:
        """Changes exactly when the container must be replaced.

        What has its default is left out: a later version's new field replaces nobody's containers.
        """
        ignored = {"start_seconds", "readiness", "stop_seconds", "measurement_key"}
        canonical = {
            f.name: value
            for f in fields(self)
            if f.name not in ignored and (value := getattr(self, f.name)) not in (f.default, (), {})
        }
        text = json.dumps(canonical, sort_keys=True, default=_canonical)
        return SpecHash(sha256(text.encode()).hexdigest()[:16])


def _canonical(value: object) -> object:
    return reveal(value) if isinstance(value, pydantic.SecretStr) else asdict(value)  # type: ignore[call-overload]


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """Where on this host an installation keeps what containers mount."""

    generated: str
    hugging_face_home: str
    compile_caches: str
    recipes: Recipes = field(default_factory=dict)


CADDYFILE: Final = "caddy/Caddyfile"
CERTIFICATE: Final = "caddy/certificate.pem"
Slot = Literal["a", "b"]
SLOTS: Final[tuple[Slot, Slot]] = ("a", "b")


def network_name(state: State) -> str:
    return f"{state.name_prefix}llm-network"


def volume_names(state: State) -> tuple[str, ...]:
    return tuple(f"{state.name_prefix}llm-{role}-data" for role in ("postgres", "caddy"))


def database_name(state: State) -> ContainerName:
    return ContainerName(f"{state.name_prefix}llm-postgres")


def cache_name(state: State) -> ContainerName:
    return ContainerName(f"{state.name_prefix}llm-redis")


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


# --- recipes -----------------------------------------------------------------

# In recipes/ too, but nothing is built from them.
NOT_BUILT: Final = frozenset({"vllm", "mig", "failures"})

EngineRole = Literal["vllm", "vllm_cpu", "vllm_omni"]
# Every text ends up in a Dockerfile: a line break, an option or a continued line would change it.
RequirementText = Annotated[
    str, _checked(r"[A-Za-z0-9][ -~]*", "a requirement like soxr==1.1.0, in one line", longest=255)
]
SystemPackage = Annotated[
    str,
    _checked(r"[a-z0-9][a-z0-9.+-]+(=[\w.+:~-]+)?", "a Debian package like ffmpeg", longest=128),
]
Command = Annotated[
    str,
    _checked(
        r"[^\s\x00-\x1f\x7f\\-]([^\x00-\x1f\x7f]*[^\s\x00-\x1f\x7f\\])?",
        "one line that begins with no dash and ends with no backslash",
        longest=4096,
    ),
]
VariableName = Annotated[
    str, _checked(r"[A-Za-z_][A-Za-z0-9_]*", "the name of a variable", longest=128)
]
VariableText = Annotated[str, _checked(r"[^\x00-\x1f\x7f]*", "text in one line", longest=4096)]


@_strict
@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How an engine image is built on this server, and what it serves; named after its file."""

    name: Name
    why: str
    types: Annotated[tuple[ModelType, ...], pydantic.Field(min_length=1)]
    base: Annotated[Mapping[Device, EngineRole], pydantic.Field(min_length=1)]
    packages: tuple[RequirementText, ...] = ()
    system_packages: tuple[SystemPackage, ...] = ()
    environment: Mapping[VariableName, VariableText] = field(default_factory=dict)
    run: tuple[Command, ...] = ()
    options: str = ""  # what its engine takes beside its base's options


Recipes = Mapping[str, Recipe | RefusedError]
NO_RECIPES: Final[Recipes] = {}


def parse_recipes(texts: Mapping[str, str]) -> dict[str, Recipe | RefusedError]:
    """Recipes by the names of their files; one that is broken is the refusal to use it."""
    return {n: _parse_recipe(n, text) for n, text in sorted(texts.items()) if n not in NOT_BUILT}


def _parse_recipe(name: str, text: str) -> Recipe | RefusedError:
    try:
        raw = yaml.load(text, YAML_LOADER)  # noqa: S506 - it is the safe one
        given = {**raw, "name": name} if isinstance(raw, dict) else {"name": name}
        return _parsed(Recipe, given, f"The recipe {name} cannot be used")
    except RefusedError as error:
        return error
    except yaml.YAMLError as error:
        said = " ".join(str(error).split())
        return RefusedError(f"The recipe {name} is not YAML: {said}.", advice="Correct the file.")


def find_recipe(recipes: Recipes, name: str) -> Recipe:
    """The recipe of that name, or why it cannot be used."""
    match recipes.get(name):
        case Recipe() as recipe:
            return recipe
        case RefusedError() as refusal:
            raise refusal
        case _:
            raise UnknownError(
                f"There is no recipe called {name!r}.",
                advice=f"There are: {', '.join(recipes) or 'none'}.",
            )


def recipe_base(recipe: Recipe, device: Device, images: Images) -> str:
    """The pinned image that a recipe builds on, for a device."""
    if device not in recipe.base:
        raise RefusedError(
            f"The recipe {recipe.name} has no image for the {device.upper()}.",
            advice=f"Place the model on the {' or '.join(recipe.base).upper()}.",
        )
    return str(getattr(images, recipe.base[device]))


# pip where Python has it, else uv, else the pip that Python brings along: vLLM's images differ.
# The classic builder keeps the values of build arguments in the image's history, except proxies':
# so the address of a package index, which may hold a password, comes in as the one nobody uses.
INSTALL_PACKAGES: Final = r"""RUN \
  index="$FTP_PROXY"; unset FTP_PROXY; \
  if [ -n "$index" ]; then export PIP_INDEX_URL="$index" UV_DEFAULT_INDEX="$index"; fi; \
  export PIP_NO_INPUT=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 UV_NO_CACHE=1; \
  export PIP_BREAK_SYSTEM_PACKAGES=1 PIP_ROOT_USER_ACTION=ignore UV_BREAK_SYSTEM_PACKAGES=1; \
  export UV_SYSTEM_CERTS=1 UV_NATIVE_TLS=1; \
  has_pip() { python3 -m pip --version >/dev/null 2>&1; }; \
  has_pip || command -v uv >/dev/null || python3 -m ensurepip || exit 1; \
  pip_install() { if has_pip; then python3 -m pip install "$@"; \
  else uv pip install --python "$(command -v python3)" "$@"; fi; }; \
  pip_install """
INSTALL_SYSTEM_PACKAGES: Final = (
    "RUN apt-get update && apt-get install --yes --no-install-recommends {} "
    "&& rm -rf /var/lib/apt/lists/*"
)


def render_dockerfile(recipe: Recipe, base_image: str) -> str:
    """How the image is made; equal text is an equal image."""
    lines = [f"FROM {base_image}"]
    lines += [f"ENV {n}={_docker_quoted(v)}" for n, v in sorted(recipe.environment.items())]
    if recipe.system_packages:
        lines.append(INSTALL_SYSTEM_PACKAGES.format(" ".join(recipe.system_packages)))
    if recipe.packages:
        lines.append(INSTALL_PACKAGES + shlex.join(recipe.packages))
    lines += [f"RUN {command}" for command in recipe.run]
    return GENERATED_BANNER + "\n".join(lines) + "\n"


def _docker_quoted(text: str) -> str:
    return '"' + re.sub(r'(["\\$])', r"\\\1", text) + '"'


def recipe_image(recipe: Recipe, base_image: str) -> str:
    """The image's name, by its content: what is built once is never built again."""
    digest = sha256(render_dockerfile(recipe, base_image).encode()).hexdigest()
    return f"{OWNER}/{recipe.name}:{digest[:12]}"


def device_of(model: Model) -> Device:
    return "cpu" if isinstance(model.placement, CpuPlacement) else "gpu"


def with_recipe_pinned(state: State, model: Model, recipes: Recipes) -> State:
    """A recipe that a model is the first to use is pinned as its file is today."""
    device = device_of(model)
    if model.recipe is None or model.image is not None or state.recipe_image(model.recipe, device):
        return state
    recipe = find_recipe(recipes, model.recipe)
    image = recipe_image(recipe, recipe_base(recipe, device, state.images))
    return state.with_recipe_image(RecipeImage(recipe=recipe.name, device=device, image=image))


# --- engines -----------------------------------------------------------------

EngineOptions = Mapping[str, frozenset[str]]  # image -> what its command line takes

# What the manager sets itself, and what would let prompts into a log.
RESERVED_OPTIONS: Final = frozenset({
    "--host", "--port", "--uds", "--model", "--served-model-name", "--api-key", "--config",
    "--revision", "--root-path", "--tensor-parallel-size", "-tp", "--ssl-keyfile",
    "--ssl-certfile", "--headless", "--grpc", "--runner", "--omni",
    "--enable-log-requests", "--enable-log-outputs", "--otlp-traces-endpoint",
})  # fmt: skip


PARALLEL_OPTIONS: Final = frozenset({
    "--pipeline-parallel-size", "-pp", "--data-parallel-size", "-dp",
    "--decode-context-parallel-size", "-dcp", "--prefill-context-parallel-size", "-pcp",
})  # fmt: skip


def parse_engine_options(text: str) -> dict[str, frozenset[str]]:
    """The options of `recipes/vllm.yaml` by image; switches get their `--no-` form too."""
    found: dict[str, frozenset[str]] = {}
    listed: frozenset[str] = frozenset()
    for engine in yaml.load(text, YAML_LOADER)["engines"]:  # noqa: S506 - the safe one, in C
        listed |= frozenset(engine["options"].split())  # each takes what those before it take
        negated = frozenset(f"--no-{name[2:]}" for name in listed if name.startswith("--"))
        found |= dict.fromkeys(engine["images"], listed | negated)
    return found


def engine_options(
    model: Model, state: State, options: EngineOptions, recipes: Recipes
) -> frozenset[str] | None:
    """What a model's engine takes on its command line; None where nobody listed it."""
    recipe = recipes.get(model.recipe) if model.recipe and not model.image else None
    if not isinstance(recipe, Recipe):
        return options.get(engine_image(model, state))
    known = options.get(recipe_base(recipe, device_of(model), state.images))
    return None if known is None else known | {*recipe.options.split()}


def check_engine_arguments(
    model: Model, state: State, options: EngineOptions, recipes: Recipes = NO_RECIPES
) -> None:
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
    known = engine_options(model, state, options, recipes)
    for option in (_option_name(a) for a in arguments if re.match(r"--?[A-Za-z]", a)):
        if option in _reserved_options(model):
            raise RefusedError(
                f"The engine argument {option} is set by LLM Manager itself.",
                advice="Leave it out.",
            )
        if isinstance(model.placement, MigPlacement) and option in PARALLEL_OPTIONS:
            raise RefusedError(
                f"{option} needs several GPUs that reach each other's memory; a MIG slice is one.",
                advice="Place the model on whole GPUs.",
            )
        if known is not None and option not in known:
            offered = sorted(known - _reserved_options(model))
            near = difflib.get_close_matches(option, offered, n=1)
            raise RefusedError(
                f"The engine argument {option} is unknown to {engine_image(model, state)}.",
                advice=f"Did you mean {near[0]}?" if near else "Leave it out, or correct it.",
            )


def _reserved_options(model: Model) -> frozenset[str]:
    match model.placement:
        case CpuPlacement():
            return RESERVED_OPTIONS | {"--kv-cache-memory-bytes"}
        case GpuPlacement(memory_fraction=float()):
            return RESERVED_OPTIONS | {"--gpu-memory-utilization"}
        case _:
            return RESERVED_OPTIONS


def parse_model(
    raw: Json, state: State, options: EngineOptions, recipes: Recipes = NO_RECIPES
) -> Model:
    """A model from what the operator typed; every fault at once, and nothing registered."""
    filled = {"served_model_name": raw.get("name"), **raw}
    model = _parsed(Model, filled, "This model cannot be registered")
    check_model(model, state, options, recipes)
    return model


def parse_source(raw: Json) -> HubSource | LocalSource:
    kind: type[HubSource | LocalSource] = LocalSource if raw["kind"] == "local" else HubSource
    return _parsed(kind, raw, "That names no weights")


def named_source(text: str, revision: str | None) -> HubSource | LocalSource:
    """A directory of this server by its absolute path, else a repository of the hub."""
    raw: Json = {"kind": "hub", "repository": text, "revision": revision}
    return parse_source({"kind": "local", "path": text} if text.startswith("/") else raw)


def parse_edge(raw: Json) -> Edge:
    return _parsed(Edge, raw, "These HTTPS settings cannot be used")


def parse_housekeeping(raw: Json) -> Housekeeping:
    return _parsed(Housekeeping, raw, "The database cannot be kept so")


def parse_direct_key(raw: Json) -> DirectKey:
    return _parsed(DirectKey, raw, "This direct key cannot be used")


def parse_admin_token(raw: Json) -> AdminToken:
    return _parsed(AdminToken, raw, "This admin token cannot be used")


def parse_route(raw: Json) -> Route:
    return _parsed(Route, raw, "This route cannot be used")


def parse_provider(raw: Json) -> Provider:
    """A provider from what the operator typed: reachable from inside the gateway's container."""
    provider = _parsed(Provider, raw, "This provider cannot be used")
    if provider.base_url is not None:
        check_provider_url(provider.base_url)
    elif provider.kind != "cloud":
        raise RefusedError(
            f"A provider of the kind {provider.kind} needs its address.",
            advice="Give one like http://10.0.0.7:11434.",
        )
    if provider.vendor is not None and provider.kind != "cloud":
        raise RefusedError(
            f"A provider of the kind {provider.kind} has no vendor.",
            advice="Leave it out, or give the kind cloud.",
        )
    return provider


def check_provider_url(url: str) -> None:
    """Refuse an address that the gateway's container could not use, or that holds a secret."""
    host = host_of(url)
    if "@" in url:
        raise RefusedError(
            "The provider's address holds a password, which would be shown.",
            advice="Leave it out; a key is given on its own.",
        )
    if not host or {"?", "#"} & {*url}:
        raise RefusedError(
            f"{url} is no server's address.", advice="Give one like http://10.0.0.7:11434/v1."
        )
    if re.fullmatch(r"localhost|127\.[\d.]+|0\.0\.0\.0|::1?", host):
        raise RefusedError(
            f"{url} means the gateway's own container, not this server.",
            advice=f"Write {HOST_NAME}, and let the server there listen on all addresses.",
        )


def parse_images(raw: Json) -> Images:
    return _parsed(Images, raw, "That image cannot be pinned")


T = TypeVar("T")


# A validator takes a hundred times as long to make as to use.
_adapter: Final[Callable[[Any], pydantic.TypeAdapter[Any]]] = cache(pydantic.TypeAdapter)


def _parsed(kind: type[T], raw: Json, fact: str) -> T:
    try:
        return cast("T", _adapter(kind).validate_python(raw))
    except pydantic.ValidationError as error:
        raise InvalidError(
            f"{fact}: {describe_faults(error, raw)}.", advice="Correct that and try again."
        ) from None


def check_model(
    model: Model, state: State, options: EngineOptions, recipes: Recipes = NO_RECIPES
) -> None:
    """What an engine would refuse minutes later is refused now."""
    if isinstance(model.placement, GpuPlacement) and any(
        gpu_uuid.startswith("MIG-") for gpu_uuid in model.placement.gpu_uuids
    ):
        raise RefusedError(
            "A MIG device was named among GPUs by its UUID, which changes when it is made anew; "
            "and tensor parallelism needs GPUs that reach each other's memory, as slices cannot.",
            advice="Place the model on one slice by GPU, profile and start.",
        )
    unserved = (
        (model.host != "local", f"reach the host {model.host!r}", "Leave the host at `local`."),
        (_crowded(model), "run several replicas on a GPU or slice whose memory they do not share",
         "Give the placement a memory fraction below 0.5, or run one replica."),
    )  # fmt: skip
    for unable, what, advice in unserved:
        if unable:
            raise RefusedError(f"This version cannot {what} yet.", advice=advice)
    if model.recipe is not None:
        check_recipe(find_recipe(recipes, model.recipe), model, state.images)
    check_engine_arguments(model, state, options, recipes)


def check_recipe(recipe: Recipe, model: Model, images: Images) -> None:
    """Whether a recipe serves that type of model, on its device."""
    recipe_base(recipe, device_of(model), images)
    if model.type not in recipe.types:
        raise RefusedError(
            f"The recipe {recipe.name} does not serve {model.type} models.",
            advice=f"It serves {', '.join(recipe.types)}.",
        )


def _crowded(model: Model) -> bool:
    return model.replicas > 1 and bool(gpus_of(model)) and gpu_share(model) > 1 + ROUNDING


def split_arguments(text: str) -> list[str]:
    """Engine arguments as a shell would split them."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise RefusedError(
            f"The engine arguments cannot be read: {error}.", advice="Close the quotation."
        ) from error


def default_placement(hardware: Hardware, models: Sequence[Model]) -> CpuPlacement | GpuPlacement:
    """The first whole GPU that no model has, else the first whole one; the CPU without any."""
    taken = {gpu_uuid for model in models for gpu_uuid in gpus_of(model)}
    whole = [gpu.uuid for gpu in whole_gpus(hardware)]
    if hardware.gpus and not whole:
        raise RefusedError(
            "Every GPU of this server is cut into MIG slices.",
            advice="Name a slice (`--mig 3g.20gb`), or place the model on the processor.",
        )
    chosen = ([gpu_uuid for gpu_uuid in whole if gpu_uuid not in taken] or whole)[:1]
    return GpuPlacement(gpu_uuids=tuple(chosen)) if chosen else CpuPlacement()


def engine_image(model: Model, state: State) -> str:
    """The first that applies: the model's own, its recipe's, vLLM-Omni's, vLLM's for its device."""
    if model.image is not None:
        return model.image
    pinned = state.recipe_image(model.recipe, device_of(model)) if model.recipe else None
    if pinned is not None:
        return pinned
    images = state.images
    if model.type in OMNI_TYPES:
        return images.vllm_omni
    return images.vllm_cpu if isinstance(model.placement, CpuPlacement) else images.vllm


MODEL_MOUNT: Final = "/model"
CACHE_MOUNT: Final = "/root/.cache/huggingface/hub"
COMPILED_MOUNT: Final = "/compiled"


def render_engines(
    state: State, model: Model, site: Site, hardware: Hardware | None = None
) -> tuple[ContainerSpec, ...]:
    """The engine containers of one model, one per replica."""
    devices = device_ids(model.placement, hardware)
    image = engine_image(model, state)
    return tuple(
        ContainerSpec(
            name=name,
            role="engine",
            image=image,
            network=network_name(state),
            # Official images differ in entrypoint (vLLM-Omni's has none): always name both.
            entrypoint=("vllm",),
            command=engine_command(model),
            environment=engine_environment(state, model),
            mounts=(_weights_mount(model, site), compile_cache(image, site)),
            labels={
                LABEL_MODEL_NAME: model.name,
                LABEL_MODEL_TYPE: model.type,
                LABEL_SERVED_NAME: model.served_model_name,
            },
            devices=devices,
            # vLLM refuses Docker's 64 MiB; tensor parallelism shares tensors through it.
            shm_mib=8192 if devices else 1024,
            # Docker would start it before MIG slices exist, and vLLM exits 0 when it dies.
            restart="no",
            start_seconds=ENGINE_START_SECONDS,
            measurement_key=measurement_key(model, image, hardware),
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
        *(("--omni",) if model.type in OMNI_TYPES else ()),
        *_placement_arguments(model),
        *(("--runner", "pooling") if model.type in {"embedding", "rerank"} else ()),
        # Without it nobody is told how much of a prompt was cached.
        *(("--enable-prompt-tokens-details",) if model.type in {"chat", "vision"} else ()),
        *model.engine_arguments,
    )


def format_command(model: Model) -> str:
    """What is run in its container, as a shell would be told; an option and its value a line."""
    words = shlex.join(("vllm", *engine_command(model)))
    return re.sub(r" (?=--[a-z])", " \\\n  ", words)


def _placement_arguments(model: Model) -> tuple[str, ...]:
    match model.placement:
        case CpuPlacement() if model.type in OMNI_TYPES:
            return ()  # its stages size their caches themselves
        case CpuPlacement(kv_cache_mib=mib):
            return ("--kv-cache-memory-bytes", str(mib * 1024 * 1024))
        case GpuPlacement(gpu_uuids=gpus, memory_fraction=fraction):
            parallel = ("--tensor-parallel-size", str(len(gpus))) if len(gpus) > 1 else ()
            budget = () if fraction is None else ("--gpu-memory-utilization", str(fraction))
            return (*parallel, *budget)
        case MigPlacement():
            return ()
        case _:
            assert_never(model.placement)


def engine_environment(state: State, model: Model) -> dict[str, str | pydantic.SecretStr]:
    """No telemetry, and no way to the hub: weights are here before an engine starts."""
    environment: dict[str, str | pydantic.SecretStr] = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1",
        # Any local user reaches the bridge: without a key they would get round keys and limits.
        "VLLM_API_KEY": state.secrets.engine_key,
        **COMPILE_CACHES,
    }
    if isinstance(model.placement, CpuPlacement):
        # vLLM (0.30) pins every engine of a server to the same first cores: on 2 of them a second
        # engine needed over 200 s to start beside a busy one, and 57 s without the pins.
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    return environment


# Where an engine and its libraries keep what they compiled, so that a later start need not.
COMPILE_CACHES: Final[Mapping[str, str]] = {
    "VLLM_CACHE_ROOT": f"{COMPILED_MOUNT}/vllm",
    "TRITON_CACHE_DIR": f"{COMPILED_MOUNT}/triton",
    "TORCHINDUCTOR_CACHE_DIR": f"{COMPILED_MOUNT}/inductor",
    "CUDA_CACHE_PATH": f"{COMPILED_MOUNT}/cuda",
    "FLASHINFER_WORKSPACE_BASE": COMPILED_MOUNT,
}


def compile_cache(image: str, site: Site) -> Mount:
    """One directory for each image: what one version compiled is wrong for another."""
    source = f"{site.compile_caches}/{compile_folder(image)}"
    return Mount(source=source, target=COMPILED_MOUNT, read_only=False)


def compile_folder(image: str) -> str:
    return sha256(image.encode()).hexdigest()[:12]


def _weights_mount(model: Model, site: Site) -> Mount:
    if isinstance(model.source, LocalSource):
        return Mount(source=model.source.path, target=MODEL_MOUNT)
    # All of it: what a snapshot holds are links into other folders of the cache.
    return Mount(source=f"{site.hugging_face_home}/hub", target=CACHE_MOUNT)


# A 28 by 28 white PNG: the smallest image that patch-based vision models take.
_WHITE_PNG: Final = (
    "iVBORw0KGgoAAAANSUhEUgAAABwAAAAcCAIAAAD9b0jDAAAAIklEQVR42mP4TwPAMGroqKGjho4aOmroqKGjho4a"
    "OjIMBQDyYCdYB5gw6gAAAABJRU5ErkJggg=="
)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRequest:
    """One request to an engine; with `audio` its fields go as a form beside that file."""

    path: str
    fields: Json
    audio: bytes | None = None


def readiness_request(
    model_type: ModelType, served_model_name: str, text: str = "yes"
) -> EngineRequest:
    """The smallest real request of a kind; `text` is what it asks about, where it has words."""
    path, fields = _smallest_request(model_type, text)
    audio = _half_a_second_of_silence() if model_type == "speech-to-text" else None
    return EngineRequest(path=path, fields={"model": served_model_name, **fields}, audio=audio)


def _smallest_request(model_type: ModelType, words: str) -> tuple[str, Json]:
    picture: Json = {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{_WHITE_PNG}"},
    }
    text: Json = {"type": "text", "text": words}
    chat, generate = "/v1/chat/completions", {"max_tokens": 1, "temperature": 0}
    # An image's sides must suit every latent space; one step proves weights and scheduler.
    image = {"prompt": words, "size": "256x256", "num_inference_steps": 1}
    requests_of: Mapping[ModelType, tuple[str, Json]] = {
        "chat": (chat, generate | {"messages": [{"role": "user", "content": words}]}),
        "vision": (chat, generate | {"messages": [{"role": "user", "content": [text, picture]}]}),
        "embedding": ("/v1/embeddings", {"input": words}),
        "rerank": ("/v1/rerank", {"query": words, "documents": [words, "no"]}),
        "speech-to-text": ("/v1/audio/transcriptions", {"temperature": "0"}),
        "text-to-speech": ("/v1/audio/speech", {"input": words}),
        "image": ("/v1/images/generations", image),
    }
    return requests_of[model_type]


def _half_a_second_of_silence() -> bytes:
    """A WAV file: 16 bit, one channel, at the 16 kHz that speech models hear."""
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(16_000)
        sound.writeframes(bytes(16_000))
    return file.getvalue()


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
class Dump:
    """A dump of LiteLLM's database on this server's disk; nobody named the automatic ones."""

    file: str
    size_bytes: int
    taken_at: datetime

    @property
    def automatic(self) -> bool:
        return AUTOMATIC_DUMP.fullmatch(self.file) is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class DatabaseSize:
    """What LiteLLM's database takes, and what is free where it lies."""

    database_bytes: int
    spend_log_bytes: int
    spend_log_rows: int | None  # PostgreSQL's estimate; None before its first count
    oldest_row_at: datetime | None
    free_bytes: int


AUTOMATIC_DUMP: Final = re.compile(r"litellm-\d{8}T\d{6}Z\.dump")


def automatic_dump(moment: datetime | None) -> str:
    """The file of a dump that nobody named; of a moment that nobody knows, the first of all."""
    return f"litellm-{moment or datetime(1970, 1, 1, tzinfo=UTC):%Y%m%dT%H%M%SZ}.dump"


def named_dump(name: str) -> str:
    """The file of a dump that the operator names; never one that makes way for newer ones."""
    file = name if name.endswith(".dump") else f"{name}.dump"
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,99}", file) or AUTOMATIC_DUMP.fullmatch(file):
        raise RefusedError(
            f"{name!r} cannot be the name of a dump.",
            advice="Use up to 95 letters, digits and . _ -, like `before-summer`.",
        )
    return file


def stale_dumps(dumps: Iterable[Dump], kept: int, spare: str = "") -> list[Dump]:
    """The automatic dumps beyond the newest; `spare` is being restored, and stays."""
    automatic = [dump for dump in dumps if dump.automatic]
    by_age = sorted(automatic, key=lambda dump: dump.file, reverse=True)
    return [dump for dump in by_age[kept:] if dump.file != spare]


def uses_cache(state: State) -> bool:
    """Whether any route keeps answers."""
    return any(route.cache_seconds for route in state.routes)


def cache_password(state: State) -> pydantic.SecretStr:
    """Made from the salt key, so that no state needs another secret."""
    salt = state.secrets.salt_key.get_secret_value()
    return pydantic.SecretStr(sha256(f"cache {salt}".encode()).hexdigest())


def reader_password(state: State) -> pydantic.SecretStr:
    """Of the role that reads usage; made from the salt key as well."""
    salt = state.secrets.salt_key.get_secret_value()
    return pydantic.SecretStr(sha256(f"usage {salt}".encode()).hexdigest())


def cache_url(state: State) -> pydantic.SecretStr:
    """Not called REDIS_URL in the gateway: LiteLLM would take more from that than its cache."""
    password = cache_password(state).get_secret_value()
    return pydantic.SecretStr(f"redis://:{password}@{cache_name(state)}:6379/0")


CACHE_MIB: Final = 256


def render_cache(state: State) -> ContainerSpec:
    """Redis with the answers that routes keep: in memory alone, gone with the container."""
    settings = (
        'requirepass $REDIS_PASSWORD', 'save ""', "appendonly no",
        f"maxmemory {CACHE_MIB}mb", "maxmemory-policy allkeys-lru",
    )  # fmt: skip
    # Read from its standard input: a password among the arguments would be in every `ps`.
    script = f"printf '%s\\n' {' '.join(map(_shell_quoted, settings))} | exec redis-server -"
    return ContainerSpec(
        name=cache_name(state),
        role="cache",
        image=state.images.redis,
        network=network_name(state),
        entrypoint=("sh", "-c"),
        command=(script,),
        environment={"REDIS_PASSWORD": cache_password(state)},
        healthcheck='REDISCLI_AUTH="$REDIS_PASSWORD" redis-cli ping | grep -q PONG',
        drop_capabilities=True,
        start_seconds=60.0,
        readiness=DockerHealthy(),
    )


def _shell_quoted(text: str) -> str:
    """In double quotes, where the shell still puts in its variables."""
    return '"' + text.replace('"', '\\"') + '"'


def served_models(state: State, models: Sequence[Model]) -> tuple[ServedModel, ...]:
    """The models as they are once everything wished of them runs."""
    return tuple(
        ServedModel(
            model=model.name,
            served_model_name=model.served_model_name,
            type=model.type,
            replicas=replica_names(state, model),
        )
        for model in models
    )


def hollow_names(state: State) -> list[str]:
    """Routes and models that nobody is wished to answer."""
    answered = {pool.route.name for pool in pools(state, served_models(state, state.wished_models))}
    return sorted({*public_names(state)} - answered - {a for r in state.routes for a in r.aliases})


def render_gateway(
    state: State, slot: Slot, served: Sequence[ServedModel], site: Site
) -> ContainerSpec:
    """LiteLLM in one of its two slots; a changed configuration is a new container."""
    database = database_name(state)
    password = state.secrets.database_password.get_secret_value()
    config = render_litellm_config(state, served)
    return ContainerSpec(
        name=gateway_name(state, slot),
        role="gateway",
        image=state.images.litellm,
        network=network_name(state),
        command=(
            *("--config", GATEWAY_CONFIG, "--log_config", GATEWAY_CONFIG),
            *("--port", str(GATEWAY_PORT)),
        ),
        environment={
            "LITELLM_MASTER_KEY": state.secrets.master_key,
            "LITELLM_SALT_KEY": state.secrets.salt_key,
            "ENGINE_API_KEY": state.secrets.engine_key,
            **{key_variable(p): p.api_key for p in used_providers(state) if p.api_key},
            **({"CACHE_URL": cache_url(state)} if uses_cache(state) else {}),
            "DATABASE_URL": pydantic.SecretStr(
                f"postgresql://litellm:{password}@{database}:5432/litellm"
            ),
            "LITELLM_MODE": "PRODUCTION",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "LITELLM_OFFLINE_MODE": "true",
            "DISABLE_ADMIN_UI": "True",
            "NO_DOCS": "True",
            "NO_REDOC": "True",
            # Requests in flight when it is stopped; uvicorn cancels what is left then.
            "GRACEFUL_SHUTDOWN_TIMEOUT": str(DRAIN_SECONDS - 10),
            # Between tries: by default a dead member costs seconds before the next one is asked.
            "INITIAL_RETRY_DELAY": "0.1",
            "MAX_RETRY_DELAY": "0.5",
            "JITTER": "0.1",
            # With the default transport a killed engine makes one request hang its whole timeout.
            "DISABLE_AIOHTTP_TRANSPORT": "True",
        },
        mounts=(Mount(source=f"{site.generated}/litellm-{slot}", target="/etc/litellm"),),
        extra_hosts={HOST_NAME: "host-gateway"}
        if any(map(reaches_host, used_providers(state)))
        else {},
        stop_seconds=DRAIN_SECONDS,
        content_hash=sha256(config.encode()).hexdigest()[:16],
        start_seconds=GATEWAY_START_SECONDS,
        readiness=GatewayServes(
            # Patterns are not listed.
            model_names=tuple(
                name for pool in pools(state, served) if not (name := pool.route.name).endswith("*")
            ),
            master_key=state.secrets.master_key,
        ),
    )


GATEWAY_CONFIG: Final = "/etc/litellm/config.yaml"


# LiteLLM's errors, and the tracebacks with them, quote what engines say of a request's wrong
# fields; its access log has paths and queries. So its log says where, and not what. As a
# formatter of Python's `dictConfig` a `str` will do, by its `format`.
_LOG_LINES: Final[Mapping[str, str]] = {
    "LiteLLM Proxy": "{0.levelname} {0.name} {0.filename}:{0.lineno}",
    "uvicorn.access": "{0.levelname} {0.name} {0.args[1]} {0.args[4]}",
}
# logger: whose lines it writes, and its level, without which uvicorn (under LiteLLM 1.108) writes
# no access log at all.
_LOGGERS: Final[Mapping[str, tuple[str, str]]] = {
    "LiteLLM Proxy": ("LiteLLM Proxy", "WARNING"),
    "LiteLLM Router": ("LiteLLM Proxy", "WARNING"),
    "LiteLLM": ("LiteLLM Proxy", "WARNING"),
    "uvicorn.access": ("uvicorn.access", "INFO"),
}
_WORDLESS_LOGS: Final[Json] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {
        name: {"()": "builtins.str", "object": line} for name, line in _LOG_LINES.items()
    },
    "handlers": {
        name: {"class": "logging.StreamHandler", "formatter": name, "stream": "ext://sys.stderr"}
        for name in _LOG_LINES
    },
    "loggers": {
        name: {"handlers": [handler], "level": level, "propagate": False}
        for name, (handler, level) in _LOGGERS.items()
    },
}


def render_litellm_config(state: State, served: Sequence[ServedModel]) -> str:
    """LiteLLM's `config.yaml`: one entry per replica; no secret, no content logging."""
    routed = pools(state, served)
    config = {
        "model_list": [entry for pool in routed for entry in _entries(pool)],
        "router_settings": _router_settings(routed),
        "litellm_settings": {
            "turn_off_message_logging": True,
            "redact_messages_in_exceptions": True,
            # Without it a client's "no-log" removes its accounting row.
            "global_disable_no_log_param": True,
            "disable_end_user_cost_tracking": True,
            "disable_add_user_agent_to_request_tags": True,
            "drop_params": True,
            "request_timeout": TIMEOUT_SECONDS,
            "telemetry": False,
            "callbacks": ["prometheus"],
            "prometheus_metrics_config": [
                {"group": metrics[0], "metrics": list(metrics), "include_labels": list(labels)}
                for metrics, labels in METRICS
            ],
            **_cache_settings(state),
        },
        "general_settings": {
            "master_key": "os.environ/LITELLM_MASTER_KEY",
            "store_prompts_in_spend_logs": False,
            # Since 1.108 a chain serves only keys that name its targets, too; it is the operator's.
            "enforce_fallback_model_access": False,
            "disable_requester_ip_address_logging": True,
            # What an error says may quote the request; that there was one, is counted.
            "spend_logs_metadata_fields": {
                "exclude": ["spend_logs_metadata", "user_agent", "error_information"]
            },
            **_retention(state.housekeeping),
        },
        **_WORDLESS_LOGS,
    }
    return GENERATED_BANNER + yaml.dump(config, Dumper=YAML_DUMPER, sort_keys=False)


def _retention(housekeeping: Housekeeping) -> Json:
    """Rows of single requests are pruned; LiteLLM's sums by day are other tables, and stay.

    By the clock, because an interval begins anew with every gateway and may never end. A run
    deletes at most 500 batches of 1000 rows within five minutes, and the next one goes on (1.108).
    """
    days = housekeeping.retention_days
    if days is None:
        return {}
    return {
        "maximum_spend_logs_retention_period": f"{days}d",
        "maximum_spend_logs_cleanup_cron": PRUNING_TIMES,
    }


PRUNING_TIMES: Final = "17 * * * *"

# What the console shows of routes, with no label that says whose request it was. LiteLLM starts
# without its metrics, and says so in its log only, where a label does not belong to a metric.
METRICS: Final[tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]] = (
    (("litellm_deployment_state",), ("model_id",)),
    # This one is lost when it does not keep all of its labels (1.109).
    (("litellm_deployment_cooled_down",),
     ("litellm_model_name", "model_id", "api_base", "api_provider", "exception_status")),
    (("litellm_deployment_failure_responses",),
     ("model_id", "exception_status", "exception_class")),
    (("litellm_deployment_success_responses",), ("model_id",)),
    (("litellm_deployment_successful_fallbacks", "litellm_deployment_failed_fallbacks"),
     ("requested_model", "fallback_model")),
    (("litellm_cache_hits_metric",), ("model_id",)),
)  # fmt: skip
# LiteLLM has no true round robin; its plain shuffle heeds weights.
STRATEGY_NAMES: Final[Mapping[Strategy, str]] = {
    "least-busy": "least-busy",
    "latency": "latency-based-routing",
    "usage": "usage-based-routing-v2",
    "shuffle": "simple-shuffle",
    "weighted": "simple-shuffle",
    "in-order": "least-busy",  # among those of the same order
}


def _router_settings(routed: Sequence[Pool]) -> Json:
    return {
        "routing_strategy": STRATEGY_NAMES["least-busy"],
        # A group of its own name gives a pool its strategy, and adds no name to the list.
        "routing_groups": [
            {
                "group_name": r.name,
                "models": [r.name],
                "routing_strategy": STRATEGY_NAMES[r.strategy],
            }
            for r in (pool.route for pool in routed)
            if STRATEGY_NAMES[r.strategy] != STRATEGY_NAMES["least-busy"]
        ],
        "model_group_alias": {a: pool.route.name for pool in routed for a in pool.route.aliases},
        "fallbacks": _chains(routed, lambda route: route.fallbacks),
        "context_window_fallbacks": _chains(routed, lambda route: route.context_fallbacks),
        # A client's own mistake is told to the client, and not tried on everybody in the chain.
        "fallback_on_unsupported_params": False,
        "allowed_fails": FAILURES_ALLOWED,
        "num_retries": RETRIES,
        "cooldown_time": COOLDOWN_SECONDS,
        "timeout": TIMEOUT_SECONDS,
    }


def _chains(routed: Sequence[Pool], of: Callable[[Route], Sequence[str]]) -> list[Json]:
    """A chain for each name and alias: LiteLLM does not look through an alias for it."""
    names = {pool.route.name for pool in routed}
    return [
        {name: chain}
        for pool in routed
        for name in (pool.route.name, *pool.route.aliases)
        if (chain := [target for target in of(pool.route) if target in names])
    ]


def _entries(pool: Pool) -> list[Json]:
    return [
        {
            "model_name": pool.route.name,
            "litellm_params": _given(_parameters(pool, deployment)),
            "model_info": _given(
                {"id": deployment.deployment_id, "mode": deployment.mode, **_breaker(pool)}
            ),
        }
        for deployment in pool.deployments
    ]


def _is_alone(pool: Pool) -> bool:
    """Whether nobody else could answer: left out for a while, its next caller would be refused."""
    return len(pool.deployments) == 1 and not pool.route.fallbacks


def _parameters(pool: Pool, deployment: Deployment) -> Json:
    route = pool.route
    order = {target: place for place, target in enumerate(route.members, 1)}
    timeout, retries, kept = route.timeout_seconds, route.retries, route.cache_seconds
    return {
        "model": deployment.model,
        "api_base": deployment.api_base,
        "api_key": deployment.api_key,
        "timeout": timeout if timeout != TIMEOUT_SECONDS else None,
        "num_retries": retries if retries != RETRIES else None,
        "max_parallel_requests": route.parallel,
        "cooldown_time": 0 if _is_alone(pool) else None,
        **(dict.fromkeys(TOKEN_PRICES, TOKEN_PRICE) if deployment.api_base else {}),
        "cache": {"use-cache": True, "ttl": kept} if kept else None,
        "weight": deployment.weight if route.strategy == "weighted" else None,
        "order": order.get(deployment.target, 1) if route.strategy == "in-order" else None,
    }


# A budget counts millions of tokens; of a vendor's own models LiteLLM knows the price.
TOKEN_PRICES: Final = ("input_cost_per_token", "output_cost_per_token")
TOKEN_PRICE: Final = 1e-6


def _breaker(pool: Pool) -> Json:
    allowed, cooldown = pool.route.failures_allowed, pool.route.cooldown_seconds
    if _is_alone(pool) or (allowed, cooldown) == (FAILURES_ALLOWED, COOLDOWN_SECONDS):
        return {}
    return {"allowed_fails": allowed, "cooldown_time": cooldown}


def _given(settings: Json) -> Json:
    return {name: value for name, value in settings.items() if value is not None}


def _cache_settings(state: State) -> Json:
    """Off unless a route asks for it: what is kept are answers, in memory, for a while."""
    if not uses_cache(state):
        return {}
    return {
        "cache": True,
        "cache_params": {
            "type": "redis",
            # As an address: with host and port, redis-py's own retries hold up every request for
            # seconds once Redis is gone (LiteLLM 1.109).
            "url": "os.environ/CACHE_URL",
            "socket_timeout": 0.5,
            "socket_connect_timeout": 0.5,
            "mode": "default_off",
            "namespace": "llm",
        },
    }


CERTIFICATE_MOUNT: Final = "/etc/caddy/certificate.pem"


def render_edge(state: State, site: Site) -> ContainerSpec:
    """Caddy: the only container with published ports."""
    edge = state.edge
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


# What of an engine's own API passes the edge, under /v1; all else it has is nobody's.
_GENERATING: Final = ("chat/completions", "completions", "responses")
ENGINE_PATHS: Final[Mapping[str, tuple[str, ...]]] = {
    "chat": _GENERATING,
    "vision": _GENERATING,
    "embedding": ("embeddings",),
    "rerank": ("rerank", "score"),
    "speech-to-text": ("audio/transcriptions", "audio/translations"),
    "text-to-speech": ("audio/speech", "audio/voices"),
    "image": ("images/generations", "images/edits"),
}
# Of LiteLLM's: its others manage, keep what was said (files, threads, stored responses), or tell
# where models run (model/info).
GATEWAY_PATHS: Final = (
    *_GENERATING, "messages", "embeddings", "rerank", "audio/transcriptions", "audio/speech",
    "images/generations", "images/edits",
)  # fmt: skip
READ_PATHS: Final = ("models", "audio/voices")  # with GET; all others with POST


def render_caddyfile(
    state: State, slot: Slot, served: Sequence[ServedModel], certificate: str = ""
) -> str:
    """The whole edge: HTTPS in front of one gateway slot and the engines, and 404 for all else.

    Its health path answers `ok SLOT HASH`, so that a look tells what Caddy has really loaded.
    It holds the direct keys and the engines' key: show it through `mask_secrets` only.
    """
    text = "\n".join(_caddyfile_lines(state, slot, served, certificate)) + "\n"
    return GENERATED_BANNER + text.replace(_HASH_MARK, sha256(text.encode()).hexdigest()[:12])


_HASH_MARK: Final = "CADDYFILE-HASH"


def caddyfile_hash(text: str) -> str:
    """The hash that a rendered Caddyfile carries."""
    found = re.search(r"ok [ab] ([0-9a-f]{12})", text)
    return found[1] if found else ""


def _caddyfile_lines(
    state: State, slot: Slot, served: Sequence[ServedModel], certificate: str
) -> list[str]:
    edge = state.edge
    health = _block(f"handle {HEALTH_PATH}", f'respond "ok {slot} {_HASH_MARK}" 200')
    https = "" if edge.https_port == 443 else f":{edge.https_port}"  # noqa: PLR2004 - HTTPS
    routes = [
        *_crooked_lines(state),
        *health,
        *_grafana_lines(state),
        *_method_lines(),
        *_gateway_lines(state, slot),
        *(line for model in _by_name(served) for line in _engine_lines(state, model)),
        *_block("handle", "error 404"),
    ]
    return [
        *_global_lines(edge),
        *_ANSWERS,
        *(_engine_snippet(state) if served else ()),
        *_block(
            "http://",
            "import answers",
            *health,
            *_block("handle", f"redir https://{{host}}{https}{{uri}} 308"),
        ),
        # Without it Caddy answers other hosts' names with an empty 200.
        *_block("https://", "import answers", "respond 404"),
        *_block(
            " ".join(f"https://{name}" for name in edge.hostnames),
            *_tls_lines(edge.tls, certificate),
            "import answers",
            *_STREAMS_END,
            *_ERRORS,
            *_block("request_body", f"max_size {edge.max_request_mib}MiB"),
            *_block("route", *routes),
        ),
    ]


def _block(head: str, *lines: str) -> list[str]:
    return [f"{head} {{".lstrip(), *(f"\t{line}" for line in lines), "}"]


def _global_lines(edge: Edge) -> list[str]:
    return _block(
        "",
        "persist_config off",
        "skip_install_trust",
        "auto_https disable_redirects",
        f"default_sni {_quote(edge.hostnames[0])}",
        f"grace_period {DRAIN_SECONDS}s",
        *_acme_options(edge.tls),
        # An error's entry would hold the client's address and its headers, keys among them.
        *_block("log", *_block("format filter", "wrap json", "request delete")),
        # HTTP/3 is UDP, which is not published, and would be announced to every client.
        *_block("servers", "protocols h1 h2", *_block("timeouts", "read_header 10s")),
    )


_ANSWERS: Final = _block(
    "(answers)",
    *_block(
        "header",
        "Strict-Transport-Security max-age=31536000",
        "X-Content-Type-Options nosniff",
        "X-Frame-Options DENY",
        "Referrer-Policy no-referrer",
        "-Server",
        "-Via",
    ),
    # LiteLLM says "busy" without saying until when.
    *_block("header", *_block("match", "status 429 503", "header !Retry-After"), "Retry-After 5"),
)
# A reload closes HTTP/1.1 connections as their answers end. A stream's headers are out by then,
# and its client would send the next request into that: it is told beforehand.
_STREAMS_END: Final = (
    "@http1 protocol http/1.1",
    *_block(
        "header @http1",
        *_block("match", "header Content-Type text/event-stream*"),
        "Connection close",
    ),
)
# What went wrong, as OpenAI's clients expect to read it.
_ERRORS: Final = _block(
    "handle_errors",
    "import answers",
    "header Content-Type application/json",
    'respond `{"error": {"message": "{err.status_text}", "type": "invalid_request_error",'
    ' "param": null, "code": "{err.status_code}"}}`',
)


def _crooked_lines(state: State) -> list[str]:
    """Caddy cleans a path for matching only and forwards it raw: /key/../v1/x would arrive.

    After this a path that matches letter by letter is the very path that is forwarded.
    """
    crooked = "expression `{uri}.matches('^[^?]*(//|/[.]|%)')`"
    apart = ["not path /grafana/*"] if state.monitoring else []  # its own paths have %2F and such
    return [*_block("@crooked", crooked, *apart), *_block("handle @crooked", "error 400")]


def _grafana_lines(state: State) -> list[str]:
    if not state.monitoring:
        return []
    return _block("handle /grafana/*", f"reverse_proxy {state.name_prefix}llm-grafana:3000")


def _method_lines() -> list[str]:
    reads = f"path_regexp /v1/({'|'.join(READ_PATHS)})(/.*)?$"
    return [
        *_block(
            "@wrong-method",
            *_block("not", "method GET", reads),
            *_block("not", "method POST", *_block("not", reads)),
        ),
        *_block("handle @wrong-method", "error 404"),
    ]


def _gateway_lines(state: State, slot: Slot) -> list[str]:
    """The way to LiteLLM, which checks the client's key, or is shown its own in an emergency."""
    paths = "|".join(("models(/[A-Za-z0-9._:/-]+)?", *GATEWAY_PATHS))
    master = _quote(f"Bearer {state.secrets.master_key.get_secret_value()}")
    proxy = f"reverse_proxy {gateway_name(state, slot)}:{GATEWAY_PORT}"
    emergency = _matching(key for key in state.direct_keys if key.emergency)
    instead = (
        f"@emergency {emergency}",
        *_block(
            "handle @emergency",
            *_UNASKED,
            *_block(proxy, f"header_up Authorization {master}", *_TO_GATEWAY),
        ),
    )
    return [
        f"@gateway path_regexp ^/v1/({paths})$",
        *_block(
            "handle @gateway",
            *(instead if emergency else ()),
            *_block("handle", *_UNASKED, *_block(proxy, *_TO_GATEWAY)),
        ),
    ]


def _matching(keys: Iterable[DirectKey]) -> str:
    """A matcher of requests that bear one of these; nothing without any.

    `vars` compares the whole header: no wildcard, no case, no second header beside the first.
    """
    bearers = sorted(f'"Bearer {key.secret.get_secret_value()}"' for key in keys)
    return f"vars {{header.Authorization}} {' '.join(bearers)}" if bearers else ""


# Nothing here takes a query, and uvicorn would log it.
_UNASKED: Final = ("rewrite {path}?",)

# uvicorn closes an idle connection after 5 s; reusing it later would be a 502.
_UVICORN: Final = _block("transport http", "dial_timeout 1s", "keepalive 4s")
_TO_GATEWAY: Final = (
    "header_up -Cookie",
    # Its switches, as for redaction, are the operator's; labels would be stored.
    *(f"header_up -{name}" for name in ("Litellm-*", "X-Litellm-*", "User-Agent")),
    *(
        f"header_down -{name}"
        for name in ("X-Litellm-Model-Api-Base", "X-Litellm-Model-Name", "X-Litellm-Version",
                     "X-Litellm-Key-Spend", "X-Litellm-Response-Cost*", "Llm_provider-*")
    ),
    *_UVICORN,
)  # fmt: skip


def _engine_snippet(state: State) -> list[str]:
    """How engines are reached: the client's key and cookies stay behind, the engine's own goes.

    A failed dial is tried again, on another replica if there is one; nothing else is.
    """
    key = state.secrets.engine_key.get_secret_value()
    return _block(
        "(engine)",
        "lb_policy least_conn",
        "lb_try_duration 3s",
        "lb_try_interval 100ms",
        # Three: a client whose body is too long counts as one, too (Caddy 2.11).
        "max_fails 3",
        "fail_duration 2s",
        f"header_up Authorization {_quote(f'Bearer {key}')}",
        *(f"header_up -{name}" for name in ("Cookie", "X-Api-Key", "Api-Key")),
        *_UVICORN,
    )


def _by_name(served: Sequence[ServedModel]) -> list[ServedModel]:
    """One entry for each model: while its public name changes it is served under both."""
    merged: dict[str, ServedModel] = {}
    for model in sorted(served, key=lambda model: model.model):
        first = merged.setdefault(model.model, model)
        if first is not model and first.type == model.type:
            merged[model.model] = replace(first, replicas=(*first.replicas, *model.replicas))
    return list(merged.values())


def _engine_lines(state: State, model: ServedModel) -> list[str]:
    """The ways to a model's engines past the gateway; the open one is there only while it is on.

    They bear the engine's key, never the master key: with that a body's `model` or `fallbacks`
    would reach other models.
    """
    opened = any(known.name == model.model and state.edge.opens(known) for known in state.models)
    direct = _matching(key for key in state.direct_keys if key.opens(model.model))
    anybody = "header_regexp Authorization ^Bearer\\s+\\S+$"
    return [
        *_way_lines("models", model, direct),
        *(_way_lines("open", model, anybody) if opened else ()),
    ]


def _way_lines(way: str, model: ServedModel, admits: str) -> list[str]:
    """One prefix; where `admits` names no matcher, nobody is admitted."""
    name, prefix = f"{way}-{model.model}", f"/{way}/{model.model}"
    engines = " ".join(f"{replica}:{ENGINE_PORT}" for replica in model.replicas)
    paths = "|".join(("models", *ENGINE_PATHS[model.type]))
    proxy = _block(f"reverse_proxy {engines}", "import engine")
    admitted = [
        f"@key {admits}",
        *_block("handle @key", *_UNASKED, f"uri strip_prefix {prefix}", *proxy),
    ]
    return [
        f"@{name} path_regexp ^{prefix}/v1/({paths})$",
        *_block(
            f"handle @{name}",
            *(admitted if admits else ()),
            *_block("handle", "header WWW-Authenticate Bearer", "error 401"),
        ),
    ]


def _acme_options(tls: InternalTls | OwnCertificate | AcmeTls) -> list[str]:
    if not isinstance(tls, AcmeTls):
        return []
    directory = [f"\tacme_ca {_quote(tls.directory_url)}"] if tls.directory_url else []
    return [f"\temail {_quote(tls.email)}", *directory]


def _tls_lines(tls: InternalTls | OwnCertificate | AcmeTls, certificate: str) -> list[str]:
    match tls:
        case InternalTls():
            return ["tls internal"]
        case OwnCertificate():
            # Caddy does not watch it: with its hash a renewed one is another Caddyfile.
            mark = sha256(certificate.encode()).hexdigest()[:12]
            return [f"tls {CERTIFICATE_MOUNT} {CERTIFICATE_MOUNT}  # {mark}"]
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
# §14 Monitoring — pure: scrape targets, dashboards and alerts
# =============================================================================


# =============================================================================
# §15 Steps — pure: what is observed, and all that can be done about it
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
    container_id: str = ""
    devices: tuple[str, ...] = ()  # what Docker was asked for
    devices_seen: frozenset[str] | None = None  # what is visible inside; None: could not be asked


@dataclass(frozen=True, kw_only=True, slots=True)
class ObservedImage:
    """An image of this server, whoever's it is; `used_by` names containers, stopped ones too."""

    image_id: str
    tags: tuple[str, ...]
    digests: tuple[str, ...]  # as repository@sha256:…, of what came from a registry
    size_bytes: int
    created_at: datetime
    layers: tuple[str, ...]
    labels: Mapping[str, str]
    used_by: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.tags, *self.digests)


@dataclass(frozen=True, slots=True)
class GpuRef:
    """A GPU by what never changes, and by what the operator calls it."""

    uuid: GpuUuid
    title: str

    def __str__(self) -> str:
        return self.title


@dataclass(frozen=True, slots=True)
class LoadedCaddyfile:
    """What the running Caddy says it serves: more than the file on the disk can tell."""

    slot: Slot
    config_hash: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Certificate:
    """The operator's own, as its files were read: chain and key in one text, or what is wrong."""

    pem: str = field(default="", repr=False)
    fault: str = ""
    expires_at: datetime | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Observed:
    """One look at the world; only what carries our labels is in it."""

    containers: Mapping[ContainerName, ObservedContainer] = field(default_factory=dict)
    images: frozenset[str] = frozenset()
    networks: frozenset[str] = frozenset()
    volumes: frozenset[str] = frozenset()
    files: Mapping[str, str] = field(default_factory=dict, repr=False)  # keys are among them
    certificate: Certificate | None = None  # None: none of the operator's own is wished
    edge: LoadedCaddyfile | None = None
    taken_at: datetime | None = None
    hardware: Hardware | None = None  # None: not looked at
    foreign_devices: Mapping[str, frozenset[str]] = field(default_factory=dict)  # by container
    weights: Mapping[str, frozenset[str]] = field(default_factory=dict)  # whole revisions here
    start_seconds: Mapping[str, float] = field(default_factory=dict)  # last time, by container


@dataclass(frozen=True, slots=True)
class Refuse:
    """What cannot be done, in the place where it would have been; applying raises it."""

    fact: str
    advice: str


@dataclass(frozen=True, slots=True)
class CheckClients:
    """Nobody but these containers of ours computes on the slices, or on the GPU where None."""

    gpu: GpuRef
    slices: frozenset[Slice] | None
    ours: frozenset[str]
    cause: str


@dataclass(frozen=True, slots=True)
class SetMigMode:
    gpu: GpuRef
    enabled: bool
    cause: str


@dataclass(frozen=True, slots=True)
class DestroySlice:
    gpu: GpuRef
    slice: Slice
    cause: str


@dataclass(frozen=True, slots=True)
class CreateSlice:
    gpu: GpuRef
    slice: Slice
    cause: str


@dataclass(frozen=True, slots=True)
class VerifyLayout:
    """Read back what the driver really has; what it answered before is not believed."""

    gpu: GpuRef
    slices: frozenset[Slice]
    cause: str


@dataclass(frozen=True, slots=True)
class RefreshCdi:
    """Have the toolkit list today's devices where Docker injects them by that list."""

    cause: str


@dataclass(frozen=True, slots=True)
class PullImage:
    image: str
    cause: str


@dataclass(frozen=True, slots=True)
class BuildImage:
    """Build a recipe's image from this text, if it is not there; nothing runs on it before."""

    recipe: str
    image: str
    dockerfile: str
    cause: str


@dataclass(frozen=True, slots=True)
class DownloadWeights:
    source: HubSource
    model_type: ModelType
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
    """A generated file, by its path under `generated/`; `before` is None where it is new.

    Its difference is shown from `serving`, the file that does its work until now, where there is
    one: the two slots of the gateway write in turns.
    """

    path: str
    text: str = field(repr=False)
    before: str | None = field(repr=False)
    cause: str
    serving: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class LoadCaddyfile:
    """Have Caddy check the text, write it, and reload Caddy where it runs."""

    spec: ContainerSpec
    text: str = field(repr=False)
    before: str | None = field(repr=False)
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
class Drain:
    """Let an engine that no new request reaches finish what it is at."""

    name: ContainerName
    cause: str


@dataclass(frozen=True, slots=True)
class TurnAway:
    """The same, once the gateway routes to the model's other replicas; undone, it is ready again.

    A stage is applied up to here before the gateway is turned: see `by_turns`.
    """

    spec: ContainerSpec
    cause: str


@dataclass(frozen=True, slots=True)
class DumpDatabase:
    """Dump LiteLLM's database; older automatic dumps make way, but for `spare`.

    Where it `guards` a migration, undoing it returns to the dump if tables have changed since.
    """

    server: ContainerName
    file: str
    kept: int
    cause: str
    guards: bool = False
    spare: str = ""


@dataclass(frozen=True, slots=True)
class LoadDump:
    """Load a dump into a database beside the one that serves; a broken one is refused."""

    server: ContainerName
    path: str
    cause: str


@dataclass(frozen=True, slots=True)
class TurnToLoaded:
    """Give the loaded database the name of the one that serves, which is kept under another."""

    server: ContainerName
    cause: str


@dataclass(frozen=True, slots=True)
class DropFormer:
    server: ContainerName
    cause: str


@dataclass(frozen=True, slots=True)
class WithholdContents:
    """Let LiteLLM's database refuse what requests said, before any request reaches LiteLLM."""

    server: ContainerName
    cause: str


@dataclass(frozen=True, slots=True)
class Discard:
    """Stop and remove a container, for good; its volumes stay."""

    name: ContainerName
    stop_seconds: int
    cause: str


Step = (
    Refuse
    | CheckClients
    | SetMigMode
    | DestroySlice
    | CreateSlice
    | VerifyLayout
    | RefreshCdi
    | PullImage
    | BuildImage
    | DownloadWeights
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
    | Drain
    | TurnAway
    | DumpDatabase
    | LoadDump
    | TurnToLoaded
    | DropFormer
    | WithholdContents
    | Discard
)


def describe(step: Step) -> str:  # noqa: C901, PLR0911, PLR0912, PLR0915 - one line per kind of step
    """One line for the log, the preview and the tests."""
    match step:
        case Refuse(fact, advice):
            return f"cannot be done: {fact} {advice}"
        case CheckClients(gpu, _, _, cause):
            return f"check that nobody else uses {gpu}: {cause}"
        case SetMigMode(gpu, enabled, cause):
            return f"turn {'on' if enabled else 'off'} MIG of {gpu}: {cause}"
        case DestroySlice(gpu, (profile, start), cause):
            return f"remove the slice {profile} at {start} of {gpu}: {cause}"
        case CreateSlice(gpu, (profile, start), cause):
            return f"create the slice {profile} at {start} of {gpu}: {cause}"
        case VerifyLayout(gpu, slices, cause):
            return f"read back that {gpu} has {format_slices(slices)}: {cause}"
        case RefreshCdi(cause):
            return f"refresh the CDI specification: {cause}"
        case PullImage(image, cause):
            return f"pull image {image}: {cause}"
        case BuildImage(recipe, image, _, cause):
            return f"build image {image} from the recipe {recipe}: {cause}"
        case DownloadWeights(source, _, cause):
            return f"download {format_source(source)}: {cause}"
        case CreateNetwork(name, cause):
            return f"create network {name}: {cause}"
        case CreateVolume(name, cause):
            return f"create volume {name}: {cause}"
        case WriteFile(path, _, _, cause, _):
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
        case Drain(name, cause):
            return f"let {name} finish its requests: {cause}"
        case TurnAway(spec, cause):
            return f"turn the gateway away from {spec.name} and let it finish its requests: {cause}"
        case DumpDatabase(_, file, _, cause):
            return f"dump the database into backups/{file}: {cause}"
        case LoadDump(_, path, cause):
            return f"load {path} into a database of its own: {cause}"
        case TurnToLoaded(_, cause):
            return f"put the loaded database in the place of LiteLLM's: {cause}"
        case DropFormer(_, cause):
            return f"drop the database from before: {cause}"
        case WithholdContents(_, cause):
            return f"let the database refuse what requests said: {cause}"
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

    layouts: tuple[Stage, ...] = ()
    devices: Stage
    foundation: Stage
    database: Stage
    cache: Stage
    models: tuple[Stage, ...]
    endpoint: Stage
    retirement: Stage
    interrupted: tuple[ModelName, ...] = ()
    start_seconds: Mapping[str, float] = field(default_factory=dict)  # of models, last time

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Those that have something to do."""
        before = (*self.layouts, self.devices, self.foundation, self.database, self.cache)
        every = (*before, *self.models, self.endpoint, self.retirement)
        return tuple(stage for stage in every if stage.steps)

    def raise_refusal(self) -> None:
        """Raise the first thing that cannot be done, before anything is touched for the rest."""
        for stage in self.stages:
            for step in stage.steps:
                if isinstance(step, Refuse):
                    raise RefusedError(step.fact, advice=step.advice)

    def __bool__(self) -> bool:
        return bool(self.stages)

    def __str__(self) -> str:
        lines = [
            line
            for stage in self.stages
            for line in (f"{stage.title}:", *(f"  {describe(step)}" for step in stage.steps))
        ]
        if self.interrupted:
            names = ", ".join(self._with_duration(name) for name in self.interrupted)
            lines.append(f"Interrupted until its new container is ready, or for good: {names}.")
        return "\n".join(lines)

    def _with_duration(self, name: ModelName) -> str:
        seconds = self.start_seconds.get(name)
        return name if seconds is None else f"{name} (its last start took {seconds:.0f} s)"

    def diff(self) -> str:
        """What changes in the generated files, with hashes in the place of keys."""
        steps = [step for stage in self.stages for step in stage.steps]
        return "".join(
            _unified(path, before, text)
            for path, before, text in (
                (step.path, step.serving or step.before, step.text)
                if isinstance(step, WriteFile)
                else (CADDYFILE, step.before, step.text)
                for step in steps
                if isinstance(step, WriteFile | LoadCaddyfile)
            )
        )


def _unified(path: str, before: str | None, after: str) -> str:
    old, new = (mask_secrets(text).splitlines(keepends=True) for text in (before or "", after))
    return "".join(difflib.unified_diff(old, new, f"generated/{path}", f"generated/{path} (new)"))


def aside(name: ContainerName) -> ContainerName:
    return ContainerName(name + ASIDE)


# =============================================================================
# §16 Planning — pure: desired + observed -> Plan
# =============================================================================


@dataclass(frozen=True, kw_only=True, slots=True)
class Scope:
    """How far a change reaches: these models, and all that is on these GPUs; None, None: all."""

    models: frozenset[ModelName] | None = None
    gpus: frozenset[GpuUuid] | None = None

    def has(self, model: Model) -> bool:
        if self.models is None and self.gpus is None:
            return True
        return model.name in (self.models or ()) or bool(
            gpus_of(model) & (self.gpus or frozenset())
        )

    def names(self, state: State) -> frozenset[str] | None:
        """Whose containers may be touched, models that are gone included; None is everybody's."""
        if self.models is None and self.gpus is None:
            return None
        known = frozenset(model.name for model in state.models if self.has(model))
        return known | (self.models or frozenset())


EVERYTHING: Final = Scope()


def plan_state(  # noqa: PLR0913 - what is, what is wished, and how far to go
    state: State,
    observed: Observed,
    site: Site,
    *,
    scope: Scope = EVERYTHING,
    restart: ModelName | None = None,
    despite_driver: bool = False,
    recut: bool = True,
    gentle: bool = False,
    dump: str = "",
) -> Plan:
    """Compare what is wished with what is; decide everything, do nothing.

    `scope` leaves every other model as it is, `restart` replaces a model that needs no change,
    `despite_driver` makes GPU containers although the driver waits for a reboot, `gentle` leaves
    engines that serve as they are, even where something else is wished of them, `dump` is the
    path of one that the database returns to. The endpoint's
    stage assumes that the models' stages succeed; `plan_endpoint` after they ran says what is
    true then. Slices that a layout's stage will make have no UUID yet: plan again after it,
    with `recut` off: what could not be cut then refuses those that need it, and nobody else.
    """
    in_scope = [model for model in state.wished_models if scope.has(model)]
    stages = [
        _plan_model(
            state, m, observed, site, "a restart was asked for" * (m.name == restart), gentle=gentle
        )
        for m in in_scope
    ]
    layouts_first = (
        plan_layouts(state, observed, _gpus_to_cut(scope, in_scope, stages, observed))
        if recut
        else ()
    )
    if not despite_driver:
        stages = [_held_back(stage, observed) for stage in stages]
        layouts_first = tuple(_held_back(stage, observed) for stage in layouts_first)
    coming = frozenset[str]().union(
        *(cut.resources for cut in layouts_first if not isinstance(cut.steps[0], Refuse))
    )
    stages = [
        stage if stage.resources <= coming else _refused_by_layout(stage, m, observed.hardware)
        for stage, m in zip(stages, in_scope, strict=True)
    ]
    endpoint, kept = plan_endpoint(state, observed, site, assumed=tuple(in_scope))
    retirement = plan_retirement(state, observed, kept, scope.names(state))
    return Plan(
        layouts=layouts_first,
        devices=_plan_devices(state, observed, bool(layouts_first)),
        foundation=_plan_foundation(state, observed),
        database=_plan_database(state, observed, site, dump),
        cache=_plan_cache(state, observed),
        models=tuple(stages),
        endpoint=endpoint,
        retirement=retirement,
        interrupted=_interrupted((*layouts_first, *stages, endpoint, retirement), observed),
        start_seconds=last_starts(state, observed),
    )


def last_starts(state: State, observed: Observed) -> dict[str, float]:
    """How long each model's slowest replica took to become ready, where that is known."""
    return {
        model.name: max(known)
        for model in state.models
        if (known := [observed.start_seconds[name] for name in replica_names(state, model)
                      if name in observed.start_seconds])
    }  # fmt: skip


def _gpus_to_cut(
    scope: Scope, models: Sequence[Model], stages: Sequence[Stage], observed: Observed
) -> frozenset[GpuUuid] | None:
    """Whose layouts a change touches: of models, only where one has no place without a cut."""
    if scope.gpus is not None or scope.models is None:
        return scope.gpus
    waiting = [
        gpus_of(model)
        for model, stage in zip(models, stages, strict=True)
        if _refused_by_layout(stage, model, observed.hardware) is not stage
    ]
    return frozenset[GpuUuid]().union(*waiting)


def _held_back(stage: Stage, observed: Observed) -> Stage:
    """Between a driver's upgrade and its reboot no GPU is cut, and no container made for one."""
    hardware = observed.hardware
    touching = (StartContainer, BringBack, StopContainer, DestroySlice, CreateSlice, SetMigMode)
    makes = any(
        isinstance(step, touching) or (isinstance(step, CreateContainer) and step.spec.devices)
        for step in stage.steps
    )
    if hardware is None or not hardware.reboot_pending or "cpu" in stage.resources or not makes:
        return stage
    refuse = Refuse(
        f"The NVIDIA driver was upgraded to {hardware.library_version} while "
        f"{hardware.kernel_version} is loaded, so no new container would reach its GPU.",
        "Reboot; what runs goes on until then. `apply --despite-driver` tries all the same.",
    )
    return replace(stage, steps=(refuse,))


def _refused_by_layout(stage: Stage, model: Model, hardware: Hardware | None) -> Stage:
    """Nothing is stopped for a container whose slice is not there, or whose GPU is cut."""
    made = [step.spec for step in stage.steps if isinstance(step, CreateContainer)]
    cut = [gpu.title for gpu in hardware.gpus if gpu.mig_enabled and gpu.uuid in gpus_of(model)] \
        if hardware else []  # fmt: skip
    refuse: Refuse | None = None
    if any(device.startswith(ABSENT) for spec in made for device in spec.devices):
        refuse = Refuse(
            f"{model.name} is bound to "
            f"{format_placement(model.placement, hardware or Hardware())}, which is not there.",
            "Cut the GPU so that it has that slice, or place the model elsewhere.",
        )
    elif made and cut and isinstance(model.placement, GpuPlacement):
        refuse = Refuse(
            f"{model.name} wants {' and '.join(cut)} whole, and MIG is on there.",
            "Make it whole with `mig apply GPU off`, or place the model elsewhere.",
        )
    return replace(stage, steps=(refuse,)) if refuse else stage


def plan_layouts(
    state: State, observed: Observed, gpus: frozenset[GpuUuid] | None
) -> tuple[Stage, ...]:
    """The GPUs that are not cut as wished, one stage each."""
    if observed.hardware is None:
        return ()
    stages = (
        _plan_layout(wish, observed, observed.hardware)
        for wish in state.mig_layouts
        if gpus is None or wish.gpu_uuid in gpus
    )
    return tuple(stage for stage in stages if stage.steps)


def _plan_devices(state: State, observed: Observed, recut: bool) -> Stage:
    """The toolkit's list of devices, where Docker may go by it; NVIDIA's service forgets slices."""
    hardware = observed.hardware or Hardware()
    ours = {device.uuid for gpu in hardware.gpus if state.layout_of(gpu.uuid)
            for device in gpu.slices or ()}  # fmt: skip
    due = hardware.uses_cdi and (recut or bool(ours & hardware.cdi_missing))
    steps = (RefreshCdi("it does not list today's slices"),) if due else ()
    return Stage(title="CDI specification", steps=steps)


def _plan_layout(wish: MigLayout, observed: Observed, hardware: Hardware) -> Stage:
    gpu = hardware.gpu(wish.gpu_uuid)
    title = f"MIG layout of {gpu.title if gpu else wish.gpu_uuid}"
    impossible = _layout_obstacle(wish, gpu, hardware)
    steps = (impossible,) if impossible else _cut(wish, gpu, observed) if gpu else ()
    return Stage(title=title, steps=steps, resources=frozenset({wish.gpu_uuid}))


def _layout_obstacle(wish: MigLayout, gpu: Gpu | None, hardware: Hardware) -> Refuse | None:
    if hardware.fault is not None:
        return Refuse(hardware.fault.fact, hardware.fault.advice)
    if gpu is None:
        lost = " ".join(hardware.lost)
        return Refuse(
            f"{wish.gpu_uuid}, which has a wished layout, is not in this server. {lost}".strip(),
            "Look at `nvidia-smi`; if it is gone for good: `mig forget`.",
        )
    if gpu.slices is None:
        return Refuse(f"The driver does not show the slices of {gpu.title}.", "Run this as root.")
    if gpu.mig_enabled is None:
        return None if not wish.slices else Refuse(
            f"{gpu.title} ({gpu.name}) cannot be cut into MIG slices.", "Use it whole."
        )  # fmt: skip
    if gpu.geometry is not None and not is_valid(gpu.geometry, wish.slices):
        return Refuse(
            f"{gpu.title} cannot hold {format_slices(wish.slices)}.",
            "`mig layouts` lists what it can.",
        )
    return None


def _cut(wish: MigLayout, gpu: Gpu, observed: Observed) -> tuple[Step, ...]:
    """From the slices there are to those wished; who is in the way comes first."""
    there = gpu.slices or ()
    whole = {device.slice for device in there if device.uuid is not None}
    wanted, enable = {*wish.slices}, bool(wish.slices)
    turn, pending = gpu.mig_enabled != enable, gpu.mig_pending not in {None, enable}
    if gpu.mig_enabled is None or (not pending and gpu.is_cut_as(wanted)):
        return ()
    going = {d.slice for d in there if turn or d.slice not in wanted}
    # A slice without a whole compute instance was left by somebody half-way: it is filled.
    making = wanted - (whole - going)
    touched = None if turn else frozenset(going | (making & gpu.layout))
    ref = GpuRef(gpu.uuid, gpu.title)
    foreign = foreign_clients(gpu, our_ids(observed), touched)
    if foreign:
        who = ", ".join(map(describe_client, foreign))
        return (Refuse(f"{who} uses {gpu.title}.", release_advice(foreign)),)
    holders = _foreign_holders(gpu, going, observed, whole_gpu=turn)
    if holders:
        return (
            Refuse(
                f"The container {' and '.join(holders)} was given what would go of {gpu.title}.",
                "Ask whose it is, or stop it yourself; LLM Manager ends only what is its own.",
            ),
        )
    cause = f"{gpu.title} changes its MIG mode" if turn else "its slice goes"
    mode = "it will be cut" if enable else "it is wished whole"
    if not turn:
        mode = "the other mode waits for a reset"
    check = CheckClients(ref, touched, our_ids(observed), "slices in use cannot be changed")
    return (
        *((check,) if touched is None or touched else ()),
        *(StopContainer(c.name, 30, cause) for c in _users(gpu, going, observed, whole_gpu=turn)),
        *(DestroySlice(ref, s, "not in the wished layout") for s in along(going)),
        *((SetMigMode(ref, enable, mode),) if turn or pending else ()),
        *(CreateSlice(ref, s, "wished") for s in along(making)),
        VerifyLayout(ref, frozenset(wanted), "the driver's word alone is not believed"),
    )


def our_ids(observed: Observed) -> frozenset[str]:
    return frozenset(c.container_id for c in observed.containers.values() if c.container_id)


def foreign_clients(
    gpu: Gpu, ours: Collection[str], slices: Collection[Slice] | None
) -> list[GpuClient]:
    """Who else computes on these slices, or on the whole GPU where None."""
    return [
        client
        for client in gpu.clients or ()
        if client.computes
        and client.container_id not in ours
        and (slices is None or client.slice is None or client.slice in slices)
    ]


def _users(
    gpu: Gpu, going: Collection[Slice], observed: Observed, *, whole_gpu: bool
) -> list[ObservedContainer]:
    """Our running containers on the slices that go, or anywhere on the GPU."""
    uuids = _uuids_of(gpu, going, whole_gpu=whole_gpu)
    return [
        seen
        for _, seen in sorted(observed.containers.items())
        if seen.running and uuids & {*seen.devices}
    ]


def _foreign_holders(
    gpu: Gpu, going: Collection[Slice], observed: Observed, *, whole_gpu: bool
) -> list[str]:
    """Others' containers that hold what goes, idle ones too: NVML lists only who computes."""
    uuids = _uuids_of(gpu, going, whole_gpu=whole_gpu)
    return sorted(name for name, given in observed.foreign_devices.items() if uuids & given)


def _uuids_of(gpu: Gpu, going: Collection[Slice], *, whole_gpu: bool) -> set[str]:
    slices = {d.uuid for d in gpu.slices or () if d.slice in going and d.uuid is not None}
    return slices | ({str(gpu.uuid)} if whole_gpu else set())


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


def _plan_database(state: State, observed: Observed, site: Site, dump: str) -> Stage:
    wanted = render_database(state)
    steps: tuple[Step, ...] = ()
    if state.endpoint == "running":
        steps = plan_container(wanted, observed).whole
        steps = (*_dump_before(wanted, steps, state, observed), *steps)
        steps += _return_to(dump, state, observed, site) if dump else ()
    elif dump:
        steps = (Refuse("PostgreSQL is wished stopped.", "Deploy a model or set a route first."),)
    return Stage(title="database", steps=steps)


def _dump_before(
    wanted: ContainerSpec, steps: Sequence[Step], state: State, observed: Observed
) -> tuple[Step, ...]:
    """Before another PostgreSQL works on its files; a broken one is changed without."""
    seen = observed.containers.get(wanted.name)
    replaced = any(isinstance(step, SetAside) for step in steps)
    if seen is None or not replaced or seen.image == wanted.image:
        return ()
    if seen.exit_code or _hangs(wanted, seen, observed.taken_at):
        return ()
    start = () if seen.running else (StartContainer(wanted.name, "it is dumped first"),)
    wait = () if seen.ready else (WaitReady(wanted, "it is dumped first"),)
    cause = f"PostgreSQL changes from {seen.image} to {wanted.image}"
    return (*start, *wait, _dump(state, observed, cause))


def _dump(
    state: State, observed: Observed, cause: str, *, guards: bool = False, spare: str = ""
) -> DumpDatabase:
    # A change may take two, and the first is then the way back from the second.
    file, kept = automatic_dump(observed.taken_at), max(2, state.housekeeping.dumps_kept)
    return DumpDatabase(database_name(state), file, kept, cause, guards=guards, spare=spare)


def _return_to(path: str, state: State, observed: Observed, site: Site) -> tuple[Step, ...]:
    """The database as in a dump.

    It is loaded beside the one that serves, so that a broken dump stops nothing; the names change
    in one transaction of PostgreSQL, and back in another. A dump loaded over what is there would
    leave tables that a newer LiteLLM made, and its next migration would stumble over them.
    """
    server, serving = database_name(state), serving_slot(observed)
    seen = {slot: observed.containers.get(gateway_name(state, slot)) for slot in SLOTS}
    running = [slot for slot, gateway in seen.items() if gateway and gateway.running]
    again: tuple[Step, ...] = ()
    if serving in running:
        # What it lists is not the database's matter, and may be about to change.
        any_names = GatewayServes(model_names=(), master_key=state.secrets.master_key)
        spec = replace(render_gateway(state, serving, (), site), readiness=any_names)
        again = (
            Pause(SLOT_PAUSE_SECONDS, "the same slot starts again"),
            StartContainer(spec.name, "its database is back"),
            WaitReady(spec, "it starts"),
        )
    return (
        LoadDump(server, path, "it is read whole before anything is stopped"),
        *(StopContainer(gateway_name(state, slot), RESTORE_STOP_SECONDS, "it uses the database")
          for slot in running),
        _dump(state, observed, "what is there now", spare=PurePosixPath(path).name),
        TurnToLoaded(server, "asked for"),
        *again,
        DropFormer(server, "it is in the dump"),
    )  # fmt: skip


RESTORE_STOP_SECONDS: Final = 30  # for requests in flight


def _plan_cache(state: State, observed: Observed) -> Stage:
    wished = state.endpoint == "running" and uses_cache(state)
    steps = plan_container(render_cache(state), observed).whole if wished else ()
    return Stage(title="cache", steps=steps)


def _plan_model(
    state: State, model: Model, observed: Observed, site: Site, restart_cause: str, *, gentle: bool
) -> Stage:
    resources = frozenset[str](gpus_of(model)) or frozenset({"cpu"})
    specs = render_engines(state, model, site, observed.hardware)
    replacements = [
        plan_container(_as_it_runs(spec, model, observed), observed, restart_cause, gentle=gentle)
        for spec in specs
    ]
    in_turn = [
        (TurnAway(spec, "its other replicas serve meanwhile"), *replacement.whole)
        for spec, replacement in zip(specs, replacements, strict=True)
        if len(specs) > 1 and _leaves_service(replacement, observed)
    ]
    at_once = [r for r in replacements if len(specs) == 1 or not _leaves_service(r, observed)]
    # What cannot be undone comes last: a later replica may fail, and then all come back.
    steps = [
        *(step for turn in in_turn for step in turn if isinstance(step, PullImage)),
        *(step for replacement in at_once for step in replacement.steps),
        *(step for replacement in at_once for step in replacement.farewell),
        *(step for turn in in_turn for step in turn if not isinstance(step, PullImage)),
    ]
    steps = [*_download_if_absent(model, steps, observed), *steps]
    built = _built_first(tuple(steps), state, model, observed, site.recipes)
    return Stage(title=model_stage_title(model), steps=built, resources=frozenset(resources))


def _leaves_service(replacement: Replacement, observed: Observed) -> bool:
    """Whether it sets a replica aside that requests reach."""
    away = [observed.containers[s.name] for s in replacement.steps if isinstance(s, SetAside)]
    return any(seen.running and seen.ready for seen in away)


def by_turns(stage: Stage) -> tuple[Stage, ...]:
    """A model's stage in parts: what is done at once, then each replica that waits for its turn."""
    cuts = [n for n, step in enumerate(stage.steps) if isinstance(step, TurnAway)]
    bounds = itertools.pairwise((0, *cuts, len(stage.steps)))
    return tuple(replace(stage, steps=stage.steps[begin:end]) for begin, end in bounds)


def model_stage_title(model: Model) -> str:
    return f"model {model.name}"


def fetches(stage: Stage) -> tuple[Step, ...]:
    """What of a model's stage may take hours and touches nothing that runs."""
    if any(isinstance(step, Refuse) for step in stage.steps):
        return ()
    kinds = DownloadWeights | PullImage | BuildImage
    return tuple(step for step in stage.steps if isinstance(step, kinds))


def _built_first(
    steps: tuple[Step, ...], state: State, model: Model, observed: Observed, recipes: Recipes
) -> tuple[Step, ...]:
    """A recipe's image is in no registry: it is built, before anything is set aside for it."""
    if model.recipe is None or model.image is not None:
        return steps
    advice = f"Run `image build {model.recipe}{' --cpu' * (device_of(model) == 'cpu')}`."
    pinned = state.recipe_image(model.recipe, device_of(model))
    if pinned is None:
        return (Refuse(f"No image is pinned for the recipe {model.recipe}.", advice),)
    others = tuple(s for s in steps if not (isinstance(s, PullImage) and s.image == pinned))
    if others == steps:
        return steps
    try:
        recipe = find_recipe(recipes, model.recipe)
        *pulls, build = plan_build(recipe, device_of(model), state, observed, "not on this server")
    except RefusedError as error:
        return (Refuse(error.fact, error.advice),)
    if build.image != pinned:
        fact = f"{pinned} is not on this server, and its recipe has changed since it was pinned."
        return (Refuse(fact, advice),)
    return (*pulls, build, *others)


def plan_build(
    recipe: Recipe, device: Device, state: State, observed: Observed, cause: str
) -> tuple[PullImage | BuildImage, ...]:
    """How a recipe's image comes to be; the last step makes it."""
    base = recipe_base(recipe, device, state.images)
    image, text = recipe_image(recipe, base), render_dockerfile(recipe, base)
    pull = (PullImage(base, "the recipe builds on it"),) if base not in observed.images else ()
    return (*pull, BuildImage(recipe.name, image, text, cause))


def _download_if_absent(
    model: Model, steps: Sequence[Step], observed: Observed
) -> tuple[Step, ...]:
    """Before anything is stopped for it: engines have no access to the hub themselves."""
    source = model.source
    starts = any(isinstance(step, CreateContainer | StartContainer | BringBack) for step in steps)
    if isinstance(source, LocalSource) or not starts or is_stored(source, observed.weights):
        return ()
    return (DownloadWeights(source, model.type, "not on this server"),)


def _as_it_runs(spec: ContainerSpec, model: Model, observed: Observed) -> ContainerSpec:
    """While nobody can tell today's MIG UUIDs, a container keeps the one it was made with."""
    hardware, seen = observed.hardware, observed.containers.get(spec.name)
    gpus = [hardware.gpu(gpu_uuid) if hardware else None for gpu_uuid in gpus_of(model)]
    blind = any(gpu is None or gpu.slices is None for gpu in gpus)
    unknown = any(device.startswith(ABSENT) for device in spec.devices)
    return replace(spec, devices=seen.devices) if blind and unknown and seen else spec


@dataclass(frozen=True, slots=True)
class Replacement:
    """What puts one container in place, and what may go once all of its stage succeeded."""

    steps: tuple[Step, ...]
    farewell: tuple[Step, ...] = ()

    @property
    def whole(self) -> tuple[Step, ...]:
        return (*self.steps, *self.farewell)


def plan_container(
    wanted: ContainerSpec, observed: Observed, restart_cause: str = "", *, gentle: bool = False
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
    changed = _what_changed(wanted, seen) if seen.spec_hash != wanted.hash else restart_cause
    stays = gentle and seen.running and seen.ready
    stale = (
        (changed if not stays else "")
        or _sees_other_devices(wanted, seen)
        or _hangs(wanted, seen, observed.taken_at)
    )
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


def _what_changed(wanted: ContainerSpec, seen: ObservedContainer) -> str:
    if wanted.devices == seen.devices or not (wanted.devices and seen.devices):
        return "its settings changed"
    return "it was made for another GPU or slice"


def _sees_other_devices(wanted: ContainerSpec, seen: ObservedContainer) -> str:
    """A `systemctl daemon-reload` takes the GPU from containers that the toolkit's hook gave it."""
    if not seen.running or not wanted.devices or seen.devices_seen is None:
        return ""
    if seen.devices_seen == {*wanted.devices}:
        return ""
    return "it sees other GPUs than its own" if seen.devices_seen else "it lost its GPU"


def _hangs(wanted: ContainerSpec, seen: ObservedContainer, now: datetime | None) -> str:
    if not seen.running or seen.ready or seen.started_at is None or now is None:
        return ""
    late = (now - seen.started_at).total_seconds() > wanted.start_seconds
    return "it runs, but has not answered for longer than it may take to start" if late else ""


def _pull_if_absent(wanted: ContainerSpec, observed: Observed) -> tuple[Step, ...]:
    """A step of its own, before anything is stopped for it."""
    if wanted.image in observed.images:
        return ()
    return (PullImage(wanted.image, "not on this server"),)


def _create(wanted: ContainerSpec, cause: str) -> list[Step]:
    return [CreateContainer(wanted, cause), WaitReady(wanted, "it starts")]


def plan_endpoint(
    state: State, observed: Observed, site: Site, *, assumed: Sequence[Model] = (),
    away: Collection[str] = (),
) -> tuple[Stage, frozenset[ContainerName]]:  # fmt: skip
    """Gateway and edge for what is routable, and the containers of both that stay.

    Routable: `assumed`, or running and either ready or routed already. A busy engine that
    misses one health check must not lose its route. What is `away` is left to other replicas.
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
            else _serving_now(state, model, observed, routed, away)
        )
    ]
    if refused := _refuse_certificate(state, observed):
        staying = {edge_name(state), *(gateway_name(state, slot) for slot in SLOTS)}
        return Stage(title="endpoint", steps=refused), frozenset(staying)
    slot, gateway_steps = _plan_gateway(state, served, observed, site)
    started = any(not isinstance(step, WriteFile) for step in gateway_steps)
    withhold: tuple[Step, ...] = ()
    if started or serving_slot(observed) != slot:
        # LiteLLM has made its tables now, and Caddy does not know it yet.
        withhold = (WithholdContents(database_name(state), "no prompt is ever stored"),)
    steps = (*gateway_steps, *withhold, *_plan_edge(state, slot, served, observed, site))
    kept = frozenset({gateway_name(state, slot), edge_name(state)})
    return Stage(title="endpoint", steps=steps), kept


def serving(state: State, observed: Observed) -> list[ServedModel]:
    """The wished models as their replicas serve them now."""
    routed = routed_replicas(state, observed)
    return [
        served
        for model in state.wished_models
        for served in _serving_now(state, model, observed, routed)
    ]


def _serving_now(
    state: State, model: Model, observed: Observed, routed: frozenset[str],
    away: Collection[str] = (),
) -> list[ServedModel]:  # fmt: skip
    """A model as its replicas serve it, which a saved but unapplied wish must not change."""
    seen = [observed.containers.get(name) for name in replica_names(state, model)]
    able = [c for c in seen if c and c.running and (c.ready or c.name in routed)]
    able = [c for c in able if c.name not in away] or able
    by_name: dict[str, list[ObservedContainer]] = {}
    for container in able:
        name = container.served_model_name or model.served_model_name
        by_name.setdefault(name, []).append(container)
    return [
        ServedModel(
            model=model.name,
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
    return frozenset(
        re.findall(rf"^    api_base: http://([\w-]+):{ENGINE_PORT}/v1$", text, re.MULTILINE)
    )


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
    text = render_litellm_config(state, served)
    serving = serving_slot(observed)
    wanted = {slot: render_gateway(state, slot, served, site) for slot in SLOTS}
    slot = _right_slot(wanted, observed, serving)
    write = _write(f"litellm-{slot}/config.yaml", text, observed, "what is routed changed",
                   serving=f"litellm-{serving}/config.yaml")  # fmt: skip
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
    dump = _dump_before_migration(wanted[slot], state, observed)
    return slot, [*pull, *dump, *clear, *write, *_create(wanted[slot], cause)]


def _dump_before_migration(
    wanted: ContainerSpec, state: State, observed: Observed
) -> tuple[Step, ...]:
    """Another LiteLLM changes its tables when it starts, while the one before still serves."""
    seen = (observed.containers.get(gateway_name(state, slot)) for slot in SLOTS)
    others = sorted({c.image for c in seen if c is not None and c.image != wanted.image})
    if not others:
        return ()
    cause = f"LiteLLM changes from {' and '.join(others)} to {wanted.image}"
    return (_dump(state, observed, cause, guards=True),)


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


def _plan_edge(
    state: State, slot: Slot, served: Sequence[ServedModel], observed: Observed, site: Site
) -> list[Step]:
    pem = certificate_to_serve(state, observed)
    wanted, text = render_edge(state, site), render_caddyfile(state, slot, served, pem)
    seen = observed.containers.get(wanted.name)
    before = observed.files.get(CADDYFILE)
    steps = list(plan_container(wanted, observed).whole)
    file = _write(CERTIFICATE, pem, observed, "the certificate changed")
    first, last = (file, []) if pem else ([], file if CERTIFICATE in observed.files else [])
    if seen is not None and seen.running and seen.spec_hash == wanted.hash:
        if observed.edge == LoadedCaddyfile(slot, caddyfile_hash(text)):
            return [*first, *steps, *last]
        return [*first, _load(wanted, text, before, reload=True), *steps, *last]
    if before == text:
        return [*first, *steps, *last]
    pulls = [step for step in steps if isinstance(step, PullImage)]
    others = [step for step in steps if not isinstance(step, PullImage)]
    return [*pulls, *first, _load(wanted, text, before, reload=False), *others, *last]


def certificate_to_serve(state: State, observed: Observed) -> str:
    """The operator's own; while that cannot be used, what was served before goes on."""
    if not isinstance(state.edge.tls, OwnCertificate):
        return ""
    seen = observed.certificate
    return seen.pem if seen and not seen.fault else observed.files.get(CERTIFICATE, "")


def renewed_certificate(state: State, observed: Observed) -> str:
    """A sound certificate that is newer than the one served; empty where there is none."""
    served = observed.files.get(CERTIFICATE)
    wanted = certificate_to_serve(state, observed)
    due = state.endpoint == "running" and observed.edge is not None and served
    return wanted if due and wanted != served else ""


def _refuse_certificate(state: State, observed: Observed) -> tuple[Refuse, ...]:
    if not isinstance(state.edge.tls, OwnCertificate) or certificate_to_serve(state, observed):
        return ()
    fault = observed.certificate.fault if observed.certificate else "The certificate was not read."
    return (Refuse(fault, CERTIFICATE_ADVICE),)


CERTIFICATE_ADVICE: Final = "Correct its files, or choose another kind: `config set --tls`."


def _load(spec: ContainerSpec, text: str, before: str | None, *, reload: bool) -> LoadCaddyfile:
    cause = "what is served changed"
    return LoadCaddyfile(spec=spec, text=text, before=before, reload=reload, cause=cause)


def _write(
    path: str, text: str, observed: Observed, cause: str, *, serving: str = ""
) -> list[Step]:
    before = observed.files.get(path)
    if before == text:
        return []
    return [WriteFile(path, text, before, cause, observed.files.get(serving))]


def plan_retirement(
    state: State,
    observed: Observed,
    kept: frozenset[ContainerName] | None,
    scope: frozenset[str] | None,
) -> Stage:
    """What nobody wants any more goes last, after no request can reach it.

    `kept` names the gateway and edge that serve; None where turning to them failed, and then
    only engines go: a stopped model must free its GPU even while the endpoint is broken.
    `scope` names the models whose containers may go; None is all.
    """
    wanted = {*(kept or ())}
    if state.endpoint == "running":
        wanted.add(database_name(state))
        wanted |= {cache_name(state)} if uses_cache(state) else set()
    wanted |= {name for m in state.wished_models for name in replica_names(state, m)}
    steps: list[Step] = []
    # Engines after the gateway that routed to them: its last requests are theirs.
    order = sorted(
        observed.containers.items(), key=lambda item: (item[1].role == "engine", item[0])
    )
    for name, seen in order:
        base = ContainerName(name.removesuffix(ASIDE))
        if base in wanted or (kept is None and seen.role != "engine"):
            continue
        if seen.model_name is not None and scope is not None and seen.model_name not in scope:
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
            if seen.role == "engine" and seen.running and kept is not None:
                steps.append(Drain(name, "nothing routes to it any more"))
            steps.append(Discard(name, 30, "no longer wanted"))
    return Stage(title="retirement", steps=tuple(steps))


def _interrupted(stages: Sequence[Stage], observed: Observed) -> tuple[ModelName, ...]:
    """Models some of whose requests fail, or whose last replica goes."""
    steps = [step for stage in stages for step in stage.steps]
    stopped = {s.name for s in steps if isinstance(s, SetAside | StopContainer | Discard)}
    stopped -= {step.spec.name for step in steps if isinstance(step, TurnAway)}
    cut_off = stopped - {step.name for step in steps if isinstance(step, Drain)}
    running = [seen for seen in observed.containers.values() if seen.running]
    # Without the edge nobody is reached.
    unreached = any(seen.role == "edge" and seen.name in stopped for seen in running)
    left = {seen.model_name for seen in running if seen.name not in stopped}
    names = {
        ModelName(seen.model_name)
        for seen in running
        if seen.model_name is not None
        and (unreached or seen.name in cut_off or seen.model_name not in left)
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


# =============================================================================
# §17 Changes — pure: what an operator can ask for
# =============================================================================


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """What the operator asks for: an edit of the state, and how far acting on it reaches."""

    title: str
    edit: Callable[[State], State]
    scope: Scope = EVERYTHING
    restart: ModelName | None = None
    hint: str = ""  # what the operator does next
    whole: bool = False  # a failure anywhere takes all of it back, the wish included
    despite_driver: bool = False
    accounts: bool = False  # ends with a result for every step of a restore
    gentle: bool = False  # engines that serve stay as they are, whatever is wished of them
    dump: str = ""  # the path of one that LiteLLM's database returns to


def deploying(name: str) -> Change:
    def edit(state: State) -> State:
        model = replace(state.model(name), wish="running")
        return replace(state.with_model(model), endpoint="running")

    hint = "Next: a key for a colleague, in the tab Keys."
    return Change(title=f"Deploy {name}", edit=edit, scope=_only(name), hint=hint)


def _only(name: str) -> Scope:
    return Scope(models=frozenset({ModelName(name)}))


def stopping(name: str) -> Change:
    def edit(state: State) -> State:
        return state.with_model(replace(state.model(name), wish="stopped"))

    return Change(title=f"Stop {name}", edit=edit, scope=_only(name))


def restarting(name: str) -> Change:
    def edit(state: State) -> State:
        if state.model(name).wish == "stopped":
            raise RefusedError(f"{name} is stopped.", advice="Deploy it instead.")
        return state

    return Change(title=f"Restart {name}", edit=edit, scope=_only(name), restart=ModelName(name))


def removing(name: str) -> Change:
    def edit(state: State) -> State:
        gone = state.model(name)
        own = (gone.served_model_name, (gone.name,))  # a route that only has its settings
        routes = tuple(r for r in state.routes if (r.name, r.members) != own)
        # A key for this model alone goes with it: without models it would be one for all.
        keys = [
            replace(key, models=tuple(m for m in key.models if m != name))
            for key in state.direct_keys
            if key.models != (name,)
        ]
        models = tuple(m for m in state.models if m is not gone)
        return replace(state, models=models, routes=routes, direct_keys=tuple(keys))

    return Change(title=f"Remove {name}", edit=edit, scope=_only(name))


def registering(model: Model, recipes: Recipes = NO_RECIPES) -> Change:
    def edit(state: State) -> State:
        if any(known.name == model.name for known in state.models):
            raise RefusedError(
                f"There is a model called {model.name} already.",
                advice="Choose another name, or change that one with `model set`.",
            )
        return with_recipe_pinned(state.with_model(model), model, recipes)

    return Change(title=f"Register {model.name}", edit=edit)


def revising(
    name: str, changes: Json, options: EngineOptions, recipes: Recipes = NO_RECIPES
) -> Change:
    """Some settings of a registered model, merged into what it is when the change is made."""

    def edit(state: State) -> State:
        raw = asdict(state.model(name)) | changes
        model = parse_model(raw, state, options, recipes)
        return with_recipe_pinned(state.with_model(model), model, recipes)

    return Change(title=f"Change {name}", edit=edit)


NO_MODELS: Final = Scope(models=frozenset())  # only what stands before the engines


def configuring_edge(changes: Json) -> Change:
    def edit(state: State) -> State:
        return replace(state, edge=parse_edge(asdict(state.edge) | changes))

    return Change(title="Change HTTPS", edit=edit, scope=NO_MODELS)


def renewing_certificate() -> Change:
    """The operator's certificate is another one: serve that."""
    title = "Serve the renewed certificate"
    return Change(title=title, edit=lambda state: state, scope=NO_MODELS)


def exposing(models: Collection[str], edge: Json) -> Change:
    """Which models anybody may reach at `/open`, and the edge's settings about requests."""

    def edit(state: State) -> State:
        marked = tuple(replace(m, open_route=m.name in models) for m in state.models)
        settings = parse_edge(asdict(state.edge) | edge)
        return replace(state, models=marked, edge=settings)

    return Change(title="Change who may come in", edit=edit, scope=NO_MODELS)


def routing(raw: Json) -> Change:
    """A route, new or in the place of its namesake."""
    route = parse_route(raw)
    # No deployment starts the endpoint for what is served elsewhere.
    elsewhere = any("/" in target for target in route.members)

    def edit(state: State) -> State:
        others = [known for known in state.routes if known.name != route.name]
        endpoint = "running" if elsewhere else state.endpoint
        return replace(state, routes=(*others, route), endpoint=endpoint)

    return Change(title=f"Route {route.name}", edit=edit, scope=NO_MODELS)


def unrouting(name: str) -> Change:
    def edit(state: State) -> State:
        kept = tuple(route for route in state.routes if route.name != name)
        if len(kept) == len(state.routes):
            raise UnknownError(f"There is no route called {name!r}.", advice="See `route list`.")
        return replace(state, routes=kept)

    return Change(title=f"Remove the route {name}", edit=edit, scope=NO_MODELS)


def providing(raw: Json) -> Change:
    """A provider, new or in the place of its namesake; without a key it keeps the one it had."""
    provider = parse_provider(raw)

    def edit(state: State) -> State:
        known = next((p for p in state.providers if p.name == provider.name), None)
        kept = known.api_key if known and "api_key" not in raw else provider.api_key
        others = [p for p in state.providers if p.name != provider.name]
        return replace(state, providers=(*others, replace(provider, api_key=kept)))

    return Change(title=f"Provider {provider.name}", edit=edit, scope=NO_MODELS)


def unproviding(name: str) -> Change:
    def edit(state: State) -> State:
        gone = state.provider(name)
        return replace(state, providers=tuple(p for p in state.providers if p is not gone))

    return Change(title=f"Remove the provider {name}", edit=edit, scope=NO_MODELS)


def granting_direct(key: DirectKey) -> Change:
    """A key for `/models`, new or with another secret in the place of its namesake."""
    if not BEARER_RULE.fullmatch(key.secret.get_secret_value()):
        raise RefusedError(
            "A direct key's secret begins with sk- and has 8 or more letters, digits, _ or -.",
            advice="Leave it out, and one is made.",
        )

    if key.emergency and key.models:
        raise RefusedError(
            "A key for emergencies opens every model.", advice="Leave the models out."
        )

    def edit(state: State) -> State:
        for name in key.models:
            state.model(name)
        others = [known for known in state.direct_keys if known.name != key.name]
        return replace(state, direct_keys=(*others, key))

    return Change(title=f"Direct key {key.name}", edit=edit, scope=NO_MODELS)


def pricing(raw: Json, currency: str | None = None) -> Change:
    """The price of a model, new or in the place of what it was; nothing that runs changes."""
    price = _parsed(Price, raw, "This price cannot be used")
    if currency is not None:
        _parsed(Prices, {"currency": currency}, "This currency cannot be used")

    def edit(state: State) -> State:
        others = (known for known in state.prices.models if known.model != price.model)
        prices = Prices(currency=currency or state.prices.currency, models=(*others, price))
        return replace(state, prices=prices)

    return Change(title=f"Price of {price.model}", edit=edit)


def unpricing(model: str) -> Change:
    def edit(state: State) -> State:
        kept = tuple(price for price in state.prices.models if price.model != model)
        if len(kept) == len(state.prices.models):
            raise UnknownError(f"{model!r} has no price.", advice="See `price list`.")
        return replace(state, prices=replace(state.prices, models=kept))

    return Change(title=f"No price of {model}", edit=edit)


def revoking_direct(name: str) -> Change:
    def edit(state: State) -> State:
        kept = tuple(key for key in state.direct_keys if key.name != name)
        if len(kept) == len(state.direct_keys):
            raise UnknownError(f"There is no direct key called {name!r}.", advice="See the list.")
        return replace(state, direct_keys=kept)

    return Change(title=f"Revoke the direct key {name}", edit=edit, scope=NO_MODELS)


def restoring_database(path: str) -> Change:
    """Keys, groups and usage as they were when that dump was taken."""
    title = f"Restore the database from {PurePosixPath(path).name}"
    return Change(title=title, edit=lambda state: state, scope=NO_MODELS, dump=path)


def keeping_house(changes: Json) -> Change:
    """How long LiteLLM's database keeps a row for every request, and how many dumps stay."""

    def edit(state: State) -> State:
        return replace(state, housekeeping=parse_housekeeping(asdict(state.housekeeping) | changes))

    return Change(title="Change what the database keeps", edit=edit, scope=NO_MODELS)


def granting_token(token: AdminToken) -> Change:
    def edit(state: State) -> State:
        if any(known.name == token.name for known in state.admin_tokens):
            raise RefusedError(
                f"There is an admin token called {token.name} already.",
                advice="Choose another name, or revoke that one first.",
            )
        return replace(state, admin_tokens=(*state.admin_tokens, token))

    return Change(title=f"Admin token {token.name}", edit=edit, scope=NO_MODELS)


def revoking_token(name: str) -> Change:
    def edit(state: State) -> State:
        kept = tuple(token for token in state.admin_tokens if token.name != name)
        if len(kept) == len(state.admin_tokens):
            raise UnknownError(
                f"There is no admin token called {name!r}.", advice="See `token list`."
            )
        return replace(state, admin_tokens=kept)

    return Change(title=f"Revoke the admin token {name}", edit=edit, scope=NO_MODELS)


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


def pinning_digest(role: str, state: State, images: Sequence[ObservedImage]) -> Change:
    """Pin exactly the image that is here, whatever its tag comes to mean in the registry."""
    pinned = str(getattr(state.images, role))
    seen = next((image for image in images if pinned in image.names), None)
    # A registry with a port has a colon, too: the tag's is the last one after the last slash.
    repository = re.sub(r"(:[^/:]*|@.*)$", "", pinned)
    digests = [d for d in seen.digests if d.startswith(f"{repository}@")] if seen else []
    if not digests:
        raise RefusedError(
            f"No registry's digest is known here for {pinned}.",
            advice=f"Pull it first: `image pull {role}`; what was built here has none.",
        )
    return pinning_image(role, digests[0])


def pinning_recipe(pin: RecipeImage) -> Change:
    title = f"Pin the {pin.device.upper()} image of the recipe {pin.recipe}"
    return Change(title=title, edit=lambda state: state.with_recipe_image(pin))


def needed_images(state: State) -> list[str]:
    """What the registered models and the endpoint run on and a registry has."""
    engines = [engine_image(m, state) for m in state.models]
    built = {pin.image for pin in state.recipe_images}
    kept = (state.images.redis,) if uses_cache(state) else ()
    parts = (state.images.postgres, state.images.litellm, state.images.caddy, *kept)
    return [image for image in dict.fromkeys((*engines, *parts)) if image not in built]


def unused_images(state: State, images: Sequence[ObservedImage]) -> list[ObservedImage]:
    """What this installation built and nothing needs: no pin, no model, no container, no other tag.

    Whoever builds on our image inherits its labels, so the names decide too; what has none is ours
    only where the last label is missing: a build broke off there.
    """
    pins = {pin.image for pin in state.recipe_images} | {*asdict(state.images).values()}
    wanted = pins | {model.image for model in state.models}
    return [
        image
        for image in images
        if image.labels.get(LABEL_IMAGE_INSTANCE) == state.instance
        and not image.used_by
        and not wanted & {*image.names}
        and all(name.startswith(f"{OWNER}/") for name in image.names)
        and (bool(image.tags) or LABEL_IMAGE_HASH not in image.labels)
    ]


def own_bytes(image: ObservedImage, others: Sequence[ObservedImage]) -> int:
    """What removing an image frees, about: all but the largest other one that it builds on."""
    below = [
        other.size_bytes
        for other in others
        if other.image_id != image.image_id and other.layers == image.layers[: len(other.layers)]
    ]
    return image.size_bytes - max(below, default=0)


def returning_to(number: int, earlier: State) -> Change:
    """An earlier state with today's keys: one that was revoked since must not work again."""

    def edit(today: State) -> State:
        keys = {provider.name: provider.api_key for provider in today.providers}
        providers = (replace(p, api_key=keys.get(p.name, p.api_key)) for p in earlier.providers)
        return replace(
            earlier,
            secrets=today.secrets,
            direct_keys=today.direct_keys,
            admin_tokens=today.admin_tokens,
            providers=tuple(providers),
        )

    return Change(title=f"Roll back to version {number}", edit=edit)


def cutting(
    title: str,
    wished: Mapping[GpuUuid, Collection[Slice]],
    bindings: Mapping[str, Placement] | None = None,
) -> Change:
    """Cut GPUs as wished, with models bound to the new slices; one transaction."""

    def edit(state: State) -> State:
        for name, placement in (bindings or {}).items():
            state = state.with_model(replace(state.model(name), placement=placement))
        kept = [layout for layout in state.mig_layouts if layout.gpu_uuid not in wished]
        new = [MigLayout(gpu_uuid=gpu_uuid, slices=tuple(along(slices)))
               for gpu_uuid, slices in wished.items()]  # fmt: skip
        return replace(state, mig_layouts=(*kept, *new))

    moved = frozenset(ModelName(name) for name in bindings or ())
    scope = Scope(models=moved, gpus=frozenset(wished))
    return Change(title=title, edit=edit, scope=scope, whole=True)


def _cutting_one(
    gpu: Gpu, slices: Collection[Slice], bindings: Mapping[str, Placement] | None = None
) -> Change:
    if gpu.slices is None:
        raise RefusedError(
            f"The driver does not show the slices of {gpu.title}.", advice="Run this as root."
        )
    title = f"Cut {gpu.title} into {format_slices(slices)}" if slices else f"Make {gpu.title} whole"
    return cutting(title, {gpu.uuid: slices}, bindings)


def recutting(state: State, gpu: Gpu, names: Sequence[str]) -> Change:
    """The change to a layout of these profiles; slices in use stay where they are if they can."""
    if not names:
        return _cutting_one(gpu, ())
    geometry = _known_geometry(gpu)
    wish = state.layout_of(gpu.uuid)
    existing = gpu.layout | {*(wish.slices if wish else ())}
    used = bound_slices(state, gpu.uuid)
    staying = [s for s in used.values() if s[0] in names]
    try:
        layout = choose_layout(geometry, names, existing=existing, staying=staying)
    except RefusedError:
        layout = choose_layout(geometry, names, existing=existing)
    return _cutting_one(gpu, layout, _moved(gpu.uuid, used, layout))


def recutting_for(state: State, gpu: Gpu, needs: Mapping[str, int]) -> Change:
    """The change to a slice for each of these models by the MiB it needs."""
    for name in needs:
        state.model(name)
    others = {n: s for n, s in bound_slices(state, gpu.uuid).items() if n not in needs}
    places = slices_for_needs(_known_geometry(gpu), needs, existing=gpu.layout, bound=others)
    bindings = {name: _bound(gpu.uuid, places[name]) for name in needs}
    return _cutting_one(gpu, {*places.values()}, bindings)


def cutting_as_typed(state: State, gpu: Gpu, text: str) -> Change:
    """What an operator wishes for a GPU: profiles, `MODEL=GIB …`, `keep` or `off`."""
    match text.strip().lower():
        case "":
            raise RefusedError(
                f"No slices are wished for {gpu.title}.",
                advice="Name profiles, or models with their GiB, or `keep` or `off`.",
            )
        case "off":
            return recutting(state, gpu, [])
        case "keep":
            return _keeping(gpu)
        case _ if "=" in text:
            return recutting_for(state, gpu, parse_needs(text))
        case _:
            return recutting(state, gpu, parse_wish(text))


def _keeping(gpu: Gpu) -> Change:
    if gpu.slices is None or any(device.uuid is None for device in gpu.slices):
        raise RefusedError(
            f"Slices of {gpu.title} cannot be seen, or are split into compute instances.",
            advice="Run this as root; what others split must be cut anew.",
        )
    if gpu.mig_enabled and not gpu.slices:
        raise RefusedError(
            f"{gpu.title} has no slices to keep.", advice="`off` makes it whole; or name slices."
        )
    return _cutting_one(gpu, gpu.layout)


def importing_layouts(state: State, hardware: Hardware, text: str, label: str | None) -> Change:
    """The layouts of a mig-parted file as one change."""
    wishes = parse_mig_parted(text, label, hardware.gpus)
    gpus = [gpu for gpu_uuid in wishes if (gpu := hardware.gpu(gpu_uuid)) is not None]
    if not gpus:
        raise RefusedError("That file names no GPU of this server.", advice="Check its `devices`.")
    changes = [recutting(state, gpu, wishes[gpu.uuid]) for gpu in gpus]
    moved = (change.scope.models or frozenset() for change in changes)
    return Change(
        title=f"Cut {', '.join(gpu.title for gpu in gpus)} as in the file",
        edit=lambda state: reduce(lambda done, change: change.edit(done), changes, state),
        scope=Scope(
            models=frozenset[ModelName]().union(*moved), gpus=frozenset(gpu.uuid for gpu in gpus)
        ),
        whole=True,
    )


def _known_geometry(gpu: Gpu) -> MigGeometry:
    if gpu.geometry is None:
        raise RefusedError(
            f"{gpu.title} ({gpu.name or UNKNOWN_CARD}) cannot be cut into MIG slices.",
            advice="Use it whole, with a memory fraction for each model.",
        )
    return gpu.geometry


UNKNOWN_CARD: Final = "of unknown name"


def bound_slices(state: State, gpu_uuid: str) -> dict[str, Slice]:
    """The slices of a GPU that wished models are bound to."""
    return {
        model.name: (place.profile, place.start)
        for model in state.wished_models
        if isinstance(place := model.placement, MigPlacement) and place.gpu_uuid == gpu_uuid
    }


def _bound(gpu_uuid: GpuUuid, wanted: Slice) -> MigPlacement:
    return MigPlacement(gpu_uuid=gpu_uuid, profile=wanted[0], start=wanted[1])


def _moved(
    gpu_uuid: GpuUuid, used: Mapping[str, Slice], layout: Collection[Slice]
) -> dict[str, Placement]:
    """Models whose slice goes, on a free one of the same profile where there is one."""
    free = along({*layout} - {*used.values()})
    moved: dict[str, Placement] = {}
    for name, (profile, start) in used.items():
        other = next((s for s in free if s[0] == profile), None)
        if (profile, start) not in layout and other is not None:
            free.remove(other)
            moved[name] = _bound(gpu_uuid, other)
    return moved


def find_slice(state: State, hardware: Hardware, text: str) -> MigPlacement:
    """The slice meant by `3g.20gb` (a free one), or by `GPU:3g.20gb:4`."""
    parts = text.split(":")
    if len(parts) == 3:  # noqa: PLR2004 - GPU, profile, start
        if not parts[2].isdigit():
            raise RefusedError(f"{parts[2]!r} is no start.", advice="Write it as 0:3g.20gb:4.")
        return _bound(hardware.named(parts[0]).uuid, (parts[1], int(parts[2])))
    taken = {
        (model.placement.gpu_uuid, model.placement.profile, model.placement.start)
        for model in state.models
        if isinstance(model.placement, MigPlacement)
    }
    for wish in state.mig_layouts:
        for profile, start in wish.slices:
            if profile == text and (wish.gpu_uuid, profile, start) not in taken:
                return _bound(wish.gpu_uuid, (profile, start))
    raise RefusedError(
        f"No free slice {text!r} is wished on any GPU.",
        advice="`mig show` lists the slices; `mig plan` cuts new ones.",
    )


def forgetting_layout(state: State, hardware: Hardware, text: str) -> Change:
    """Leave a GPU, which may be gone, as it is from now on; nothing on it changes."""
    known = any(wish.gpu_uuid == text for wish in state.mig_layouts)
    gpu_uuid = GpuUuid(text) if known else hardware.named(text).uuid

    def edit(state: State) -> State:
        if state.layout_of(gpu_uuid) is None:
            raise RefusedError(f"{gpu_uuid} has no wished layout.", advice="See `mig show`.")
        rest = tuple(layout for layout in state.mig_layouts if layout.gpu_uuid != gpu_uuid)
        return replace(state, mig_layouts=rest)

    return Change(title="Forget a MIG layout", edit=edit, scope=Scope(gpus=frozenset({gpu_uuid})))


def way_back(before: State, after: State, hardware: Hardware) -> State:
    """What a change of layouts that fails returns to.

    GPUs that nobody wished cut so far return to the slices they have now; MIG that was on without
    any is off then, and nothing could have run in that.
    """
    wished = {layout.gpu_uuid for layout in after.mig_layouts if layout not in before.mig_layouts}
    found = [
        MigLayout(gpu_uuid=gpu.uuid, slices=tuple(along(gpu.layout)))
        for gpu in hardware.gpus
        # Slices that cannot be seen are not no slices: a wish for none would destroy them later.
        if gpu.uuid in wished and gpu.slices is not None and before.layout_of(gpu.uuid) is None
    ]
    return replace(before, mig_layouts=(*before.mig_layouts, *found))


def without_change(now: State, before: State, after: State) -> State:
    """What one change wished taken back; what others wished meanwhile stays."""
    old = {model.name: model for model in before.models}
    new = {model.name: model for model in after.models}
    models = tuple(old.get(m.name, m) if new.get(m.name) == m else m for m in now.models)
    found = replace(now, models=models)
    return replace(found, endpoint=now.endpoint if found.wished_models else before.endpoint)


def applying(*, despite_driver: bool = False) -> Change:
    """Do whatever is planned."""
    return Change(title="Apply the plan", edit=lambda state: state, despite_driver=despite_driver)


def restoring(*, despite_driver: bool = False) -> Change:
    """The same machinery after a reboot: everything wished comes back.

    The service does it whenever it starts, after an upgrade of this program too: nothing that
    serves may be replaced by that.
    """
    return Change(
        title="Restore", edit=lambda state: state, despite_driver=despite_driver, accounts=True,
        gentle=True,
    )  # fmt: skip


def reviving(name: ModelName) -> Change:
    """A model that ended by itself starts again, as it is."""
    return Change(title=f"Start {name} again", edit=lambda state: state, scope=_only(name))


def repairing(names: Collection[ModelName]) -> Change:
    """Containers that lost their GPU get a new one."""
    title = f"Give {', '.join(sorted(names))} its GPU back"
    return Change(title=title, edit=lambda state: state, scope=Scope(models=frozenset(names)))


# =============================================================================
# §18 Keys — pure: what a colleague may, groups, and many keys at once
# =============================================================================

Period = Literal["day", "week", "month"]
# LiteLLM resets at midnight, on Mondays and on the first of a month (1.108, UTC).
PERIODS: Final[Mapping[Period, str]] = {"day": "1d", "week": "7d", "month": "1mo"}
Limit = Annotated[int, pydantic.Field(ge=1, le=2**31 - 1)]
Budget = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]
_printable = _checked(r"[^\x00-\x1f\x7f]*", "printable", longest=100)
_titled = _checked(r"\S([^\x00-\x1f\x7f]*\S)?", "a printable name", longest=100)
_email = _checked(r"([^\s@,;]+@[^\s@,;]+)?", "an e-mail address, or empty", longest=254)


@_strict
@dataclass(frozen=True, kw_only=True, slots=True)
class Allowance:
    """What a key or a group may use; None is no limit, and no models means all of them."""

    models: tuple[str, ...] = ()
    rpm_limit: Limit | None = None
    tpm_limit: Limit | None = None
    # In millions of tokens; of a vendor's model a dollar counts as one, by LiteLLM's price list.
    budget: Budget | None = None
    period: Period | None = None  # after which the budget is whole again; None: never


@_strict
@dataclass(frozen=True, kw_only=True, slots=True)
class KeySettings(Allowance):
    """What the operator grants with a key."""

    alias: Annotated[str, _titled]
    email: Annotated[str, _email] = ""
    group: Annotated[str, _printable] = ""
    note: Annotated[str, _printable] = ""
    expires_at: pydantic.AwareDatetime | None = None
    parallel: Limit | None = None  # requests at a time; LiteLLM has none for a team (1.108)


@_strict
@dataclass(frozen=True, kw_only=True, slots=True)
class Group(Allowance):
    """What the keys of a group may use together."""

    name: Annotated[str, _titled]
    note: Annotated[str, _printable] = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class VirtualKey:
    """A colleague's key as LiteLLM knows it; its secret is known only at creation."""

    key_hash: str
    hint: str
    settings: KeySettings
    blocked: bool = False
    used: float = 0.0  # of its budget, in this period
    resets_at: datetime | None = None
    created_at: datetime | None = None
    last_used_at: datetime | None = None
    replaced_by: str = ""  # the SHA-256 of another secret for it; this one only lives out its grace


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownGroup:
    """A group as LiteLLM knows it."""

    settings: Group
    blocked: bool = False
    used: float = 0.0
    resets_at: datetime | None = None


def parse_key_settings(raw: Json) -> KeySettings:
    return _fitting(_parsed(KeySettings, raw, "This key cannot be made"))


def parse_group(raw: Json) -> Group:
    return _fitting(_parsed(Group, raw, "This group cannot be made"))


AllowanceT = TypeVar("AllowanceT", bound=Allowance)


def _fitting(allowance: AllowanceT) -> AllowanceT:
    if allowance.period and allowance.budget is None:
        raise InvalidError("A period without a budget means nothing.", advice="Give both, or none.")
    return allowance


def check_models(allowance: Allowance, state: State) -> None:
    """Only what is served here can be allowed: a typo would refuse every request."""
    unknown = sorted(name for name in {*allowance.models} if not is_public(name, state))
    if unknown:
        raise RefusedError(
            f"No model is served as {', '.join(unknown)}.",
            advice="Allow names from `route list`, or none to allow all.",
        )


def _allowance_body(allowance: Allowance) -> Json:
    return {
        "models": list(allowance.models),
        "rpm_limit": allowance.rpm_limit,
        "tpm_limit": allowance.tpm_limit,
        "max_budget": allowance.budget,
        "budget_duration": PERIODS[allowance.period] if allowance.period else None,
    }


def key_body(settings: KeySettings, now: datetime) -> Json:
    """The body of `/key/generate`."""
    return _key_body(settings) | {"duration": _duration(settings, now)}


def key_changes(old: KeySettings, new: KeySettings, now: datetime) -> Json:
    """The body of `/key/update`: what is named is set, and a null takes a limit away."""
    before = _key_body(old)
    changed = {name: value for name, value in _key_body(new).items() if before[name] != value}
    is_moved = new.expires_at != old.expires_at
    return changed | ({"duration": _duration(new, now)} if is_moved else {})


def _key_body(settings: KeySettings) -> Json:
    return _allowance_body(settings) | {
        "key_alias": settings.alias,
        "max_parallel_requests": settings.parallel,
        "team_id": settings.group or None,
        "metadata": _metadata(settings),
    }


def _metadata(settings: KeySettings) -> Json:
    return {"email": settings.email, "note": settings.note}


def _duration(settings: KeySettings, now: datetime) -> str | None:
    if settings.expires_at is None:
        return None
    left = math.ceil((settings.expires_at - now).total_seconds())
    if left <= 0:
        raise RefusedError(
            f"The key of {settings.alias} would have ended already.", advice="Give a later date."
        )
    return f"{left}s"


def group_body(group: Group) -> Json:
    """The body of `/team/new` and `/team/update`; a group's name is its id for good."""
    return _allowance_body(group) | {
        "team_id": group.name,
        "team_alias": group.name,
        "metadata": {"note": group.note},
    }


# Those of LiteLLM's own page, which is closed, are nobody's keys.
KEYS_SQL: Final = Sql(
    """SELECT to_jsonb(entry) FROM "LiteLLM_VerificationToken" AS entry
 WHERE team_id IS DISTINCT FROM 'litellm-dashboard'""",
    {},
)
GROUPS_SQL: Final = Sql('SELECT to_jsonb(entry) FROM "LiteLLM_TeamTable" AS entry', {})


def read_key(entry: Json) -> VirtualKey:
    """One row of LiteLLM's table of keys."""
    metadata = entry.get("metadata") or {}
    return VirtualKey(
        key_hash=entry["token"],
        hint=entry.get("key_name") or "",
        settings=KeySettings(
            **_read_allowance(entry),
            parallel=entry.get("max_parallel_requests"),
            alias=entry.get("key_alias") or "",
            email=str(metadata.get("email") or ""),
            group=entry.get("team_id") or "",
            note=str(metadata.get("note") or ""),
            expires_at=parse_moment(entry.get("expires")),
        ),
        blocked=bool(entry.get("blocked")),
        used=entry.get("spend") or 0.0,
        resets_at=parse_moment(entry.get("budget_reset_at")),
        created_at=parse_moment(entry.get("created_at")),
        last_used_at=parse_moment(entry.get("last_active")),
        replaced_by=str(metadata.get("replaced_by") or ""),
    )


def read_group(entry: Json) -> KnownGroup:
    """One row of LiteLLM's table of teams."""
    note = str((entry.get("metadata") or {}).get("note") or "")
    return KnownGroup(
        settings=Group(**_read_allowance(entry), name=entry["team_id"], note=note),
        blocked=bool(entry.get("blocked")),
        used=entry.get("spend") or 0.0,
        resets_at=parse_moment(entry.get("budget_reset_at")),
    )


def _read_allowance(entry: Json) -> Json:
    periods = {litellm: period for period, litellm in PERIODS.items()}
    return {
        "models": tuple(entry.get("models") or ()),
        "rpm_limit": entry.get("rpm_limit"),
        "tpm_limit": entry.get("tpm_limit"),
        "budget": entry.get("max_budget"),
        "period": periods.get(entry.get("budget_duration") or ""),
    }


def parse_moment(text: str | None) -> datetime | None:
    """As LiteLLM and the hub write one, which is UTC also where it does not say so."""
    moment = datetime.fromisoformat(text) if text else None
    return moment and (moment if moment.tzinfo else moment.replace(tzinfo=UTC))


def end_after(days: float | None, now: datetime) -> datetime | None:
    """The end of what is valid for so many days; none for 0 or nothing."""
    try:
        return now + timedelta(days=days) if days else None
    except (OverflowError, ValueError):
        raise RefusedError(
            f"{days:g} days are more than a calendar has.", advice="Give fewer, or 0 for ever."
        ) from None


MOST_GRACE_HOURS: Final = 365 * 24


def parse_grace(hours: float) -> timedelta:
    """How long an old secret works on beside the new one; 0: not at all."""
    if not 0 <= hours <= MOST_GRACE_HOURS:
        raise InvalidError(
            f"An old secret cannot work on for {hours:g} hours.",
            advice=f"Give 0 to {MOST_GRACE_HOURS}: at most a year.",
        )
    return timedelta(hours=hours)


def named_key(keys: Sequence[VirtualKey], name: str) -> VirtualKey:
    """The key of that name, or of that SHA-256."""
    found = [key for key in keys if name in {key.settings.alias, key.key_hash}]
    if not found:
        raise UnknownError(f"There is no key called {name!r}.", advice="See `key list`.")
    return found[0]


def with_former(key: VirtualKey, keys: Sequence[VirtualKey]) -> list[VirtualKey]:
    """A key, and what it has replaced that is still in its grace."""
    found = [key]
    for each in found:
        found += [other for other in keys if other.replaced_by == each.key_hash]
    return found


def retired(key: VirtualKey, until: datetime) -> KeySettings:
    """The settings of a key that another one replaces: its name is free, and its end is set."""
    ends = min(until, key.settings.expires_at or until)
    alias = f"{key.settings.alias[:72]} (until {until:%Y-%m-%d %H:%M:%S})"
    return replace(key.settings, alias=alias, expires_at=ends)


KeyState = Literal["active", "blocked", "expired", "used up"]


def key_state(key: VirtualKey, now: datetime) -> KeyState:
    """Why a key is refused, if it is; its group apart."""
    settings = key.settings
    if key.blocked:
        return "blocked"
    if settings.expires_at is not None and settings.expires_at <= now:
        return "expired"
    return "used up" if is_used_up(settings, key.used, key.resets_at, now) else "active"


def is_used_up(
    allowance: Allowance, used: float, resets_at: datetime | None, now: datetime
) -> bool:
    is_due = resets_at is not None and resets_at <= now
    return allowance.budget is not None and used >= allowance.budget and not is_due


# --- many at once ---


MOST_AT_ONCE: Final = 2000
COLUMNS: Final = ("name", "email", "group")


def parse_people(text: str, template: KeySettings, keys: Sequence[VirtualKey]) -> list[KeySettings]:
    """A key for each row of a CSV with the columns name, email and group; all faults at once.

    The first line names the columns, of which only `name` must be there. Whose name occurs
    twice is told apart by the e-mail address.
    """
    rows = _rows(text)
    names = Counter([name for _, row in rows if (name := row["name"])])
    names.update(key.settings.alias for key in keys)
    wished, faults = [], []
    for line, row in rows:
        alias = row["name"]
        if names[alias] > 1 and row["email"]:
            alias = f"{alias} ({row['email']})"
        made = {"alias": alias, "email": row["email"], "group": row["group"] or template.group}
        try:
            wished.append(parse_key_settings(asdict(template) | made))
        except RefusedError as error:
            faults.append(f"line {line}: {error.fact}")
    taken = {key.settings.alias for key in keys}
    for (line, _), settings in zip(rows, wished, strict=False) if not faults else ():
        if settings.alias in taken:
            faults.append(f"line {line}: there is a key called {settings.alias!r} already")
        taken.add(settings.alias)
    if faults or not wished:
        listed = "; ".join(faults[:SHOWN_FAULTS]) or "it names nobody"
        more = f"; and {len(faults) - SHOWN_FAULTS} more" if len(faults) > SHOWN_FAULTS else ""
        raise RefusedError(
            f"No key was made: {listed}{more}.", advice="Correct the file, and give it again."
        )
    return wished


SHOWN_FAULTS: Final = 20


def _rows(text: str) -> list[tuple[int, dict[str, str]]]:
    """Rows with their line numbers; semicolons and tabs are as good as commas."""
    text = text.removeprefix("\ufeff")
    head = text.partition("\n")[0]
    delimiter = max(",;\t", key=head.count)
    # Universal newlines: a spreadsheet's \r alone is one, too.
    reader = csv.DictReader(io.StringIO(text, newline=None), delimiter=delimiter)
    try:
        reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
        if "name" not in reader.fieldnames or {*reader.fieldnames} - {*COLUMNS}:
            raise RefusedError(
                "The first line does not name the columns.",
                advice=f"It must be {','.join(COLUMNS)}, of which only name is needed.",
            )
        rows = [
            (reader.line_num, {column: (row.get(column) or "").strip() for column in COLUMNS})
            for row in reader
            if any(cell for cell in row.values())
        ]
    except csv.Error as error:
        raise RefusedError(
            f"Line {reader.line_num} is no CSV: {error}.", advice="Save the table as CSV again."
        ) from error
    if len(rows) > MOST_AT_ONCE:
        raise RefusedError(
            f"{len(rows)} rows are more than {MOST_AT_ONCE}.", advice="Split the file."
        )
    return rows


def secrets_csv(made: Sequence[tuple[KeySettings, pydantic.SecretStr]]) -> str:
    """What is handed out, once: name, e-mail, group, key."""
    rows = ((s.alias, s.email, s.group, reveal(secret)) for s, secret in made)
    return render_csv([*COLUMNS, "key"], rows)


# --- why a key does not work ---


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """Whether a key is let in, and each reason why not with what to do."""

    title: str
    faults: tuple[tuple[str, str], ...] = ()  # fact, advice
    limits: tuple[Allowance, ...] = ()  # of the key and its group


def find_key(text: str, keys: Sequence[VirtualKey]) -> VirtualKey | None:
    """By its name, the whole secret, the SHA-256 or its beginning, or the end that lists show."""
    digest = sha256(text.encode()).hexdigest()
    is_beginning = len(text) >= SHORTEST_PREFIX
    ways = (
        [key for key in keys if key.key_hash == digest],
        [key for key in keys if key.settings.alias == text],
        [key for key in keys if is_beginning and key.key_hash.startswith(text)],
        [key for key in keys if key.hint == text],
    )
    return next((found[0] for found in ways if len(found) == 1), None)


SHORTEST_PREFIX: Final = 8


def diagnose(
    text: str, model: str, known: tuple[Sequence[VirtualKey], Sequence[KnownGroup]],
    state: State, served: Sequence[ServedModel], now: datetime,
) -> Diagnosis:  # fmt: skip
    """Why a key works or fails, for one model or, where that is empty, for any."""
    keys, groups = known
    direct = next((k for k in state.direct_keys if reveal(k.secret) == text), None)
    if direct is not None:
        opened = "/models and /v1" if direct.emergency else "/models, and not /v1"
        return Diagnosis(title=f"The direct key {direct.name}: it opens {opened}.")
    key = find_key(text, keys)
    if key is None:
        advice = "Look for missing characters; it may have been revoked. Make a new one."
        return Diagnosis(title="Unknown key", faults=(("No key is like that.", advice),))
    group = next((g for g in groups if g.settings.name == key.settings.group), None)
    faults = [*_key_faults(key, now), *(_group_faults(group, now) if group else ())]
    faults += _model_faults(model, key.settings, group.settings if group else None, state, served)
    return Diagnosis(
        title=f"The key of {key.settings.alias} ({key.hint})",
        faults=tuple(faults),
        limits=(key.settings, group.settings) if group else (key.settings,),
    )


def _key_faults(key: VirtualKey, now: datetime) -> Iterator[tuple[str, str]]:
    match key_state(key, now):
        case "blocked":
            yield "It is blocked: 401.", "Unblock it."
        case "expired":
            yield f"It expired on {key.settings.expires_at:%Y-%m-%d %H:%M} UTC: 401.", "Extend it."
        case "used up":
            yield _used_up_text(key.settings, key.resets_at), "Wait for that, or give it more."
        case _:
            pass


def _group_faults(group: KnownGroup, now: datetime) -> Iterator[tuple[str, str]]:
    name = group.settings.name
    if group.blocked:
        yield f"Its group {name} is blocked: 401.", "Unblock the group."
    if is_used_up(group.settings, group.used, group.resets_at, now):
        text = _used_up_text(group.settings, group.resets_at)
        yield f"Of its group {name}: {text}", "Wait for that, or give the group more."


def _used_up_text(allowance: Allowance, resets_at: datetime | None) -> str:
    again = f"it is whole again on {resets_at:%Y-%m-%d %H:%M} UTC" if resets_at else "it stays so"
    return f"The budget of {budget_text(allowance)} is used up: 422; {again}."


def budget_text(allowance: Allowance) -> str:
    """`5 million tokens per month`; empty without a budget."""
    if allowance.budget is None:
        return ""
    per = f" per {allowance.period}" if allowance.period else ""
    return f"{allowance.budget:g} million tokens{per}"


def _model_faults(
    model: str, key: KeySettings, group: Group | None, state: State, served: Sequence[ServedModel]
) -> Iterator[tuple[str, str]]:
    if state.endpoint == "stopped":
        yield "The endpoint is stopped.", "Deploy a model."
    if not model:
        return
    if not is_public(model, state):
        yield f"Nothing is served as {model}: 400.", "Names are in `route list`."
        return
    for whose, allowance in (("The key", key), ("Its group", group)):
        if allowance and allowance.models and not _is_allowed(model, allowance.models, state):
            names = ", ".join(allowance.models)
            yield f"{whose} allows only {names}: 403.", f"Ask for one of these, or allow {model}."
    answered = [pool.route.name for pool in pools(state, served)]
    if not _is_allowed(model, answered, state):
        yield f"Nobody answers for {model} now.", "Look in Models for what does not run."


def _is_allowed(model: str, allowed: Sequence[str], state: State) -> bool:
    """An alias is as its route, and a pattern allows what it matches."""
    aliases = {alias: route.name for route in state.routes for alias in route.aliases}
    return any(
        name in {model, aliases.get(model)} or (name.endswith("*") and model.startswith(name[:-1]))
        for name in allowed
    )


# =============================================================================
# §19 Proofs — pure: what every way in should answer, and what must be found nowhere
# =============================================================================

Way = Literal["/v1", "/models", "/open", "/grafana", "health", "elsewhere"]
# Bearers by what they are; a direct key goes by its name. LiteLLM's own are made for the proof.
RIGHT, WRONG, REVOKED, NO_KEY = "right key", "wrong key", "revoked key", "no key"


@dataclass(frozen=True, kw_only=True, slots=True)
class EdgeRequest:
    """One request from outside, whose path is sent as it stands, and what should answer it."""

    way: Way
    path: str
    method: str = "GET"
    key: str = NO_KEY
    what: str = ""  # in the operator's words
    fields: Json | None = None  # as JSON, or with `audio` as a form
    audio: bytes | None = None
    content: bytes | None = None  # instead of fields
    headers: Mapping[str, str] = field(default_factory=dict)
    is_label: bool = False  # a canary in what LiteLLM accounts by: user, tags, session
    broken_off: bool = False  # the client leaves after the first bytes
    plain_http: bool = False
    expected: tuple[int, ...] = ()  # none: any answer will do
    by_edge: bool | None = None  # whether Caddy itself should answer


@dataclass(frozen=True, kw_only=True, slots=True)
class EdgeReply:
    """What came back: no status means no answer, and the fault says why."""

    status: int | None = None
    by_edge: bool = True  # Caddy itself, and nobody behind it
    location: str = ""
    call_id: str = ""  # LiteLLM's, which its database knows
    fault: str = ""
    seconds: float = 0.0  # on a connection that was open or not
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_success(self) -> bool:
        return self.status is not None and self.status < HTTPStatus.MULTIPLE_CHOICES


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbedRequest:
    """A request of the prober with its verdict: what is kept and shown."""

    way: str
    method: str
    path: str
    key: str
    expected: tuple[int, ...]
    answered: int | None
    answered_by: str
    right: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeResult:
    """What answered what at one moment; a pattern of names cannot be asked for."""

    taken_at: datetime
    requests: tuple[ProbedRequest, ...]
    untried: tuple[str, ...] = ()

    @property
    def wrong(self) -> tuple[ProbedRequest, ...]:
        return tuple(request for request in self.requests if not request.right)

    @property
    def green(self) -> bool:
        return bool(self.requests) and not self.wrong


def is_edges_own(status: int, text: str) -> bool:
    """Whether an answer is one that only the edge gives: empty, its health, or its own error."""
    own = f'{{"error": {{"message": "{HTTPStatus(status).phrase}", "type": "invalid_request_error",'
    return not text or text.startswith(("ok ", own))


def judge(request: EdgeRequest, reply: EdgeReply) -> ProbedRequest:
    """The verdict on an answer: its status, who gave it, and that it leads nowhere but to HTTPS."""
    by_right_one = request.by_edge in {None, reply.by_edge}
    stays = not request.plain_http or not reply.location or reply.location.startswith("https://")
    return ProbedRequest(
        way="http" if request.plain_http else request.way,
        method=request.method,
        path=request.path,
        key=request.key,
        expected=request.expected,
        answered=reply.status,
        answered_by=reply.fault or ("Caddy" if reply.by_edge else "behind Caddy"),
        right=reply.status in request.expected and by_right_one and stays,
    )


# Each exists on an engine, on LiteLLM or on Caddy, somewhere behind the edge.
FORBIDDEN: Final = (
    "/", "/metrics", "/docs", "/openapi.json", "/health", "/load", "/config/", "/ui", "/ui/",
    "/chat/completions", "/key/list", "/model/info", "/config/yaml", "/mcp", "/mcp/", "/routes",
    "/prompts/list", "/spend/logs", "/user/list", "/health/readiness", "/cache/ping", "/models",
)  # fmt: skip
FORBIDDEN_TO_CHANGE: Final = (
    "/key/generate", "/key/delete", "/config/update", "/model/new", "/prompts/test", "/user/new",
    "/mcp-rest/test/connection", "/invocations", "/sleep", "/collective_rpc",
)  # fmt: skip
# LiteLLM's own below /v1: they show what is behind it, or keep what is sent to them.
FORBIDDEN_BELOW_V1: Final = (
    "model/info", "memory", "mcp/server", "files", "vector_stores", "agents", "traces", "evals",
)  # fmt: skip
CROOKED: Final = (
    "/v1/../key/list", "/v1/%2e%2e/key/list", "/v1/%2E%2E/key/list", "/v1/..%2fkey/list",
    "/v1//../key/list", "//key/list", "/key/../v1/models", "/v1/..%5ckey/list", "/v1//models",
)  # fmt: skip
ENGINES_OWN: Final = (
    "/metrics", "/invocations", "/sleep", "/collective_rpc", "/docs", "/health", "/server_info",
    "/v1/metrics", "/v1/load_lora_adapter",
)  # fmt: skip


def probe_requests(state: State) -> tuple[EdgeRequest, ...]:
    """Every way in with each kind of key, and all that must not be one."""
    by_model = (
        (*_direct_probes(model, state), *_open_probes(model, state)) for model in state.models
    )
    return (
        *_gateway_probes(state),
        *itertools.chain.from_iterable(by_model),
        *_other_probes(state),
    )


def direct_title(key: DirectKey) -> str:
    return f"direct key {key.name}"


def callable_names(state: State) -> dict[str, ModelType]:
    """Every name that a request may ask for, patterns left out, with the kind of its model."""
    kinds = {model.name: model.type for model in state.models}
    return {
        name: kinds.get(ModelName(pool.deployments[0].target), "chat")
        for pool in pools(state, served_models(state, state.wished_models))
        if not pool.route.name.endswith("*")
        for name in (pool.route.name, *pool.route.aliases)
    }


def _gateway_probes(state: State) -> Iterator[EdgeRequest]:
    list_models = EdgeRequest(way="/v1", path="/v1/models")
    calls = [_call("/v1", "", kind, name) for name, kind in callable_names(state).items()]
    for request in (list_models, *calls):
        yield replace(request, key=RIGHT, expected=(200,), by_edge=False)
        for key in (WRONG, NO_KEY, REVOKED):
            yield replace(request, key=key, expected=(401,))
        for direct in state.direct_keys:
            if direct.emergency:
                yield replace(request, key=direct_title(direct), expected=(200,), by_edge=False)
    for direct in state.direct_keys:
        if not direct.emergency:
            yield replace(list_models, key=direct_title(direct), expected=(401,), by_edge=False)


def _call(way: Way, prefix: str, kind: ModelType, name: str, text: str = "yes") -> EdgeRequest:
    """The smallest request of a kind along a way."""
    asked = readiness_request(kind, name, text)
    spoken = {"prompt": text} if asked.audio else {}
    return EdgeRequest(
        way=way, method="POST", path=prefix + asked.path, fields=asked.fields | spoken,
        audio=asked.audio,
    )  # fmt: skip


def _direct_probes(model: Model, state: State) -> Iterator[EdgeRequest]:
    prefix, there = f"/models/{model.name}", model.wish == "running"
    keys = {direct_title(key): key.opens(model.name) for key in state.direct_keys}
    able = [name for name, opens in keys.items() if opens]
    unable = [name for name, opens in keys.items() if not opens]
    request = _call("/models", prefix, model.type, model.served_model_name)
    for key in able if there else able[:1]:
        status, by_edge = (200, False) if there else (404, True)
        yield replace(request, key=key, expected=(status,), by_edge=by_edge)
    # Where no key opens a model there may be no such way at all.
    refused = (401,) if there and able else (401, 404)
    for key in (*unable, RIGHT, WRONG, NO_KEY):
        yield replace(request, key=key, expected=refused, by_edge=True)
    yield from _engine_probes("/models", prefix, (able or [WRONG])[0], refused if not able else ())


def _engine_probes(
    way: Way, prefix: str, key: str, refused: tuple[int, ...] = ()
) -> Iterator[EdgeRequest]:
    for path in ENGINES_OWN:
        yield EdgeRequest(
            way=way, path=prefix + path, key=key, expected=(404, *refused), by_edge=True
        )


def _open_probes(model: Model, state: State) -> Iterator[EdgeRequest]:
    prefix = f"/open/{model.name}"
    is_open = model.wish == "running" and state.edge.opens(model)
    request = _call("/open", prefix, model.type, model.served_model_name)
    yield replace(request, key=WRONG, expected=(200 if is_open else 404,), by_edge=not is_open)
    yield replace(request, expected=(401 if is_open else 404,), by_edge=True)
    yield from _engine_probes("/open", prefix, WRONG)


def _other_probes(state: State) -> Iterator[EdgeRequest]:
    """Health, Grafana, the way from HTTP to HTTPS, and what must not be a way in."""
    health = EdgeRequest(way="health", path=HEALTH_PATH, expected=(200,), by_edge=True)
    yield from (health, replace(health, plain_http=True))
    shown = (200, 301, 302, 307, 308, 401) if state.monitoring else (404,)
    yield EdgeRequest(way="/grafana", path="/grafana/", expected=shown)
    for path in ("/v1/models", "/key/list"):
        yield EdgeRequest(
            way="elsewhere", path=path, plain_http=True, expected=(308,), by_edge=True
        )
    refused = partial(EdgeRequest, way="elsewhere", key=RIGHT, expected=(404,), by_edge=True)
    for path in FORBIDDEN:
        yield refused(path=path)
    for path in FORBIDDEN_TO_CHANGE:
        yield refused(path=path, method="POST", fields={})
    for path in FORBIDDEN_BELOW_V1:
        yield refused(path=f"/v1/{path}", way="/v1")
    for path in CROOKED:
        yield refused(path=path, expected=(400, 404))


# --- privacy -----------------------------------------------------------------

# Where a request's own canary goes; letters and digits survive every encoding but base64.
CANARY: Final = "CANARY"
AROUND: Final = 40  # bytes shown beside a finding


@dataclass(frozen=True, kw_only=True, slots=True)
class SentCanary:
    """A request that carried a canary, and what answered it."""

    what: str
    answered: int | None
    arrived: bool = True  # whether it came as far as the proof needs it


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchedPlace:
    """A place that was read to its end; `control`: whether the mark planted there was found."""

    place: str
    size_bytes: int
    control: bool | None = None  # None: it is stopped, and takes no mark
    fault: str = ""

    @property
    def proves(self) -> bool:
        return not self.fault and self.control is not False and self.size_bytes > 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """A canary or a key where none may be; what may be there after all says why, in `kept`."""

    place: str
    what: str
    excerpt: str  # masked
    kept: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrivacyProof:
    """What was sent, where it was looked for, and where it was found, at one moment."""

    taken_at: datetime
    seconds: float
    images: Mapping[str, str]  # by container
    sent: tuple[SentCanary, ...]
    places: tuple[SearchedPlace, ...]
    findings: tuple[Finding, ...]
    left_out: tuple[str, ...] = ()

    @property
    def leaks(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if not finding.kept)

    @property
    def unproven(self) -> tuple[str, ...]:
        """What the proof could not look at, or not send."""
        return (
            *(place.place for place in self.places if not place.proves),
            *(sent.what for sent in self.sent if not sent.arrived),
        )

    @property
    def green(self) -> bool:
        return bool(self.sent and self.places) and not self.leaks and not self.unproven


def canary_requests(state: State, run: str) -> tuple[EdgeRequest, ...]:
    """Every way in and every error path, each with a canary of its own: `run` and three digits."""
    calls = [*_answered_canaries(state), *_broken_canaries(state)]
    return tuple(_marked(call, f"{run}{n:03d}") for n, call in enumerate(calls))


def _marked(request: EdgeRequest, canary: str) -> EdgeRequest:
    def fill(text: str) -> str:
        return text.replace(CANARY, canary)

    return replace(
        request,
        path=fill(request.path),
        fields=None if request.fields is None else json.loads(fill(json.dumps(request.fields))),
        content=None if request.content is None else fill(request.content.decode()).encode(),
        headers={name: fill(value) for name, value in request.headers.items()},
    )


def _answered_canaries(state: State) -> Iterator[EdgeRequest]:
    """One model of each kind along each way, plain and, where that is possible, streamed."""
    local = {model.served_model_name for model in state.wished_models}
    by_kind = {kind: name for name, kind in callable_names(state).items() if name in local}
    for kind, name in by_kind.items():
        yield from _plain_and_streamed(_call("/v1", "", kind, name, CANARY), kind, RIGHT)
    seen: set[tuple[Way, ModelType]] = set()
    for way, model, key in _side_ways(state):
        if (way, model.type) not in seen:
            seen.add((way, model.type))
            request = _call(way, f"{way}/{model.name}", model.type, model.served_model_name, CANARY)
            yield from _plain_and_streamed(request, model.type, key)


def _side_ways(state: State) -> Iterator[tuple[Way, Model, str]]:
    for model in state.wished_models:
        for key in state.direct_keys:
            if key.opens(model.name):
                yield "/models", model, direct_title(key)
        if state.edge.opens(model):
            yield "/open", model, WRONG


def _plain_and_streamed(request: EdgeRequest, kind: ModelType, key: str) -> Iterator[EdgeRequest]:
    what = f"{kind} at {request.way}"
    whole = replace(request, key=key, what=f"{what}, plain", expected=(200,))
    yield whole
    if kind in {"chat", "vision"}:
        fields = {**(request.fields or {}), "stream": True}
        yield replace(whole, what=f"{what}, streamed", fields=fields)
        longer = fields | {"max_tokens": 200}
        yield replace(whole, what=f"{what}, broken off", fields=longer, broken_off=True)


# What a body can have wrong, or beside its prompt.
_ODD_FIELDS: Final[Mapping[str, Json]] = {
    "a field of the wrong type": {"max_tokens": CANARY, "temperature": CANARY},
    "messages of the wrong type": {"messages": CANARY, "input": {"a": CANARY}},
    "a message of an unknown kind": {"messages": [{"role": "user", "content": [{"type": CANARY}]}]},
    "an unknown model": {"model": "absent-model"},
    "the model's name": {"model": CANARY},
    "an unsupported parameter": {"surprise": CANARY, "response_format": {"type": CANARY}},
    "more tokens than the context": {"max_tokens": 1_000_000_000},
    "the field metadata": {"metadata": {"note": CANARY, "spend_logs_metadata": {"note": CANARY}}},
    "the field litellm_metadata": {"litellm_metadata": {"note": CANARY}},
    "a cache key": {"prompt_cache_key": CANARY},
    "a tool": {"tools": [{"type": "function", "function": {
        "name": CANARY, "description": CANARY, "parameters": {"type": "object", "properties": {}},
    }}]},
}  # fmt: skip
# By these LiteLLM accounts, and has no setting against it (1.109): short words, not prompts.
_LABELS: Final[Mapping[str, Json]] = {
    "user": {"user": CANARY},
    "safety_identifier": {"safety_identifier": CANARY},
    "metadata.user_id": {"metadata": {"user_id": CANARY}},
    "metadata.tags": {"metadata": {"tags": [CANARY]}},
    "tags": {"tags": [CANARY]},
    "litellm_metadata.tags": {"litellm_metadata": {"tags": [CANARY]}},
    "litellm_session_id": {"litellm_session_id": CANARY},
    "litellm_trace_id": {"litellm_trace_id": CANARY},
    "litellm_call_id": {"litellm_call_id": CANARY},
}
_ODD_HEADERS: Final = (
    "User-Agent", "Referer", "Cookie", "X-Request-Id", "X-Forwarded-For", "X-Litellm-Tags",
    "X-Litellm-End-User-Id", "X-Litellm-Session-Id", "X-Litellm-Trace-Id", "X-Litellm-Call-Id",
    "X-Litellm-Customer-Id", "X-Openwebui-User-Id", "Traceparent", "X-Api-Key",
)  # fmt: skip


def first_call(state: State, text: str = "yes") -> EdgeRequest:
    """A smallest request along `/v1`, to a model of this server that chats, if there is one."""
    names = callable_names(state)
    local = {model.served_model_name for model in state.wished_models}
    name = max(names, key=lambda name: (name in local, names[name] in {"chat", "vision"}))
    return replace(_call("/v1", "", names[name], name, text), key=RIGHT)


def _broken_canaries(state: State) -> Iterator[EdgeRequest]:
    """Every way to send a prompt wrongly, to one model."""
    call = first_call(state, CANARY)
    good = call.fields or {}
    name = good["model"]
    for key in (WRONG, NO_KEY, REVOKED):
        yield replace(call, what=f"a prompt with {key}", key=key, expected=(401,))
    for what, odd in _ODD_FIELDS.items():
        yield replace(call, what=what, fields=good | odd)
    for what, label in _LABELS.items():
        yield replace(call, what=f"the label {what}", fields=good | label, is_label=True)
    long = {"messages": [{"role": "user", "content": f"{CANARY} " * 2000}], "input": CANARY * 2000}
    yield replace(call, what="a prompt too long", fields=good | long | {"max_tokens": 10**9})
    for header in _ODD_HEADERS:
        yield replace(call, what=f"the header {header}", headers={header: CANARY})
    note = json.dumps({"note": CANARY})
    yield replace(
        call, what="LiteLLM's own header", headers={"X-Litellm-Spend-Logs-Metadata": note}
    )
    body, kind = json.dumps(good), "Content-Type"
    for what, content, headers in (
        ("a broken body", body[:-2], {kind: "application/json"}),
        ("a list as the body", f"[{body}]", {kind: "application/json"}),
        ("a body of plain text", body, {kind: "text/plain"}),
        ("a body of no type", body, {}),
        ("a form", f"model={name}&prompt={CANARY}", {kind: "application/x-www-form-urlencoded"}),
    ):
        yield replace(call, what=what, fields=None, content=content.encode(), headers=headers)
    yield replace(call, what="the query", path=f"{call.path}?note={CANARY}")
    for path in (
        f"/v1/{CANARY}",
        f"/{CANARY}",
        f"/models/{CANARY}/v1/models",
        f"/open/{CANARY}/v1",
    ):
        yield replace(call, what=f"the path {path}", path=path)
    yield from _other_protocols(call, name)


def _other_protocols(call: EdgeRequest, name: str) -> Iterator[EdgeRequest]:
    """LiteLLM's further APIs for text; which of them a model has is not the question here."""
    turn = [{"role": "user", "content": CANARY}]
    for path, own in (
        ("/v1/completions", {"prompt": CANARY}),
        ("/v1/responses", {"input": CANARY, "instructions": CANARY, "store": True}),
        ("/v1/messages", {"messages": turn, "system": CANARY}),
        ("/v1/moderations", {"input": CANARY}),
        ("/v1/memory", {"key": CANARY, "value": CANARY}),
    ):
        wanted: Json = {"model": name, "max_tokens": 1, **own}
        yield replace(call, what=f"a request to {path}", path=path, fields=wanted)


def sent_canary(request: EdgeRequest, reply: EdgeReply) -> SentCanary:
    """What became of a canary; one without any answer proves nothing."""
    arrived = reply.status is not None and reply.status in (request.expected or (reply.status,))
    return SentCanary(what=request.what, answered=reply.status, arrived=arrived)


KEPT_ANSWERS: Final = "an answer in the response cache, as its route says"
KEPT_LABELS: Final = "a label for accounting, which its client gave the request"


def why_kept(role: str, what: str, labels: Collection[str]) -> str:
    """Why something found in a container of this role may be there; nothing if it may not."""
    if role in {"database", "cache"} and what.removeprefix("canary: ") in labels:
        return KEPT_LABELS
    return KEPT_ANSWERS if role == "cache" and what.startswith("canary") else ""


def base64_forms(text: bytes) -> tuple[bytes, ...]:
    """What base64 makes of a text, wherever in what is encoded it stands."""
    return tuple(base64.b64encode(bytes(n) + text)[n + 1 if n else 0 : -4] for n in range(3))


def wanted_texts(run: str, keys: Mapping[str, str]) -> dict[bytes, str]:
    """What to look for, and what it is; canaries are told apart by the digits behind them."""
    texts = {run.encode(): "canary", **{key.encode(): what for what, key in keys.items()}}
    coded = {form: f"{what}, in base64" for t, what in texts.items() for form in base64_forms(t)}
    return texts | coded


def search(
    chunks: Iterable[bytes], wanted: Mapping[bytes, str], sent: Sequence[str] = ()
) -> tuple[int, dict[str, str]]:
    """Bytes read, and each wanted text that stands there with a masked excerpt of its first place.

    It finds what lies across the border of two chunks. `sent`: what canaries are, by their digits.
    """
    reach = max(map(len, wanted)) + AROUND + 3
    size, before = 0, b""
    found: dict[str, str] = {}
    for chunk in chunks:
        size += len(chunk)
        window = before + chunk
        for text, what in wanted.items():
            if text in window:
                for match in re.finditer(re.escape(text) + rb"(\d{3})?", window):
                    title = _canary_title(what, match[1], sent)
                    found.setdefault(title, _excerpt(window, match, wanted))
        before = window[-reach:]
    return size, found


def _canary_title(what: str, digits: bytes | None, sent: Sequence[str]) -> str:
    number = int(digits) if what == "canary" and digits else len(sent)
    return f"{what}: {sent[number]}" if number < len(sent) else what


def _excerpt(window: bytes, match: re.Match[bytes], wanted: Iterable[bytes]) -> str:
    """What stands around a finding, in which neither it nor another one can be read."""
    far = AROUND + max(map(len, wanted))  # so that none is cut before it is masked
    before, after = window[max(match.start() - far, 0) : match.start()], window[match.end() :][:far]
    return f"{_masked(before, wanted)[-AROUND:]}•••{_masked(after, wanted)[:AROUND]}"


def _masked(shown: bytes, wanted: Iterable[bytes]) -> str:
    for text in wanted:
        shown = shown.replace(text, "•••".encode())
    line = "".join(c if c.isprintable() else " " for c in shown.decode(errors="replace"))
    return re.sub(r"sk-[\w-]{4,}", "sk-…", line)


def may_hold_direct_keys(path: str) -> bool:
    """Of a file below the home: the state, its history, and what Caddy checks keys against."""
    return path == "config.json" or path.startswith(("history/", "generated/caddy/"))


NOT_SEARCHED: Final = (
    "downloaded weights: engines read them and cannot write there",
    "the memory of running processes",
    "what PostgreSQL removed and compressed: of its volume only plain bytes are searched",
    "logs that Docker has rotated away, and providers outside of this server",
)


def changed_paths(changes: Mapping[str, int], mounted: Collection[str]) -> list[str]:
    """What of `docker diff` to read: new directories whole, else files; nothing that is mounted.

    Kinds are Docker's: 0 changed, 1 new, 2 removed.
    """
    paths = sorted(map(PurePosixPath, changes), key=lambda path: path.parts)
    mounts = [PurePosixPath(path) for path in mounted]
    found: list[PurePosixPath] = []
    for path, later in itertools.zip_longest(paths, paths[1:]):
        holds_mount = any(mount.is_relative_to(path) for mount in mounts)
        in_mount = any(path.is_relative_to(mount) for mount in mounts)
        is_read = bool(found) and path.is_relative_to(found[-1])
        opened = later is not None and later.is_relative_to(path) and changes[str(path)] == 0
        if not (holds_mount or in_mount or is_read or opened or changes[str(path)] == 2):  # noqa: PLR2004
            found.append(path)
    return [str(path) for path in found]


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One request along a way in, and how long Caddy takes for an answer of its own."""

    target: str
    reply: EdgeReply
    edge_seconds: float


def trial_targets(state: State) -> list[str]:
    """What can be tried: public names, and models past LiteLLM as `/models/NAME`, `/open/NAME`."""
    models = [model.name for model in state.wished_models]
    opened = [model.name for model in state.wished_models if state.edge.opens(model)]
    return [
        *callable_names(state),
        *(f"/models/{name}" for name in models if _direct_key(state, name)),
        *(f"/open/{name}" for name in opened),
    ]


def trial_request(state: State, target: str, text: str) -> tuple[EdgeRequest, pydantic.SecretStr]:
    """The smallest request to a target of `trial_targets` or of a pattern, and a key for it."""
    for way in ("/models", "/open"):
        if target.startswith(f"{way}/"):
            model = state.model(target.removeprefix(f"{way}/"))
            key = ANY_KEY if way == "/open" else _direct_key(state, model.name)
            if key is None:
                raise RefusedError(
                    f"No direct key opens {model.name}.", advice="Make one in the tab Routes."
                )
            prefix, name = f"{way}/{model.name}", model.served_model_name
            return _call(way, prefix, model.type, name, text or "yes"), key
    kind = callable_names(state).get(target, "chat")
    return _call("/v1", "", kind, target, text or "yes"), state.secrets.master_key


ANY_KEY: Final = pydantic.SecretStr("sk-anybody")


def _direct_key(state: State, name: ModelName) -> pydantic.SecretStr | None:
    return next((key.secret for key in state.direct_keys if key.opens(name)), None)


# =============================================================================
# §20 Views — pure: what the operator reads
# =============================================================================

Phase = Literal["stopped", "pending", "starting", "ready", "failed", "stopping"]


# A task, such as a download or a build, runs beside changes: it wishes and interrupts nothing.
JobKind = Literal["change", "task"]
OFFER_SECONDS: Final = 3600.0  # that secrets wait to be fetched


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
    cancelled: bool = False
    kind: JobKind = "change"
    fetching: frozenset[str] = frozenset()  # titles of the stages that wait for what it fetches
    progress: str = ""  # how far what is under way has come, by its own words
    done_part: float | None = None  # 0 to 1
    offers: bool = False  # secrets that can be fetched once


Channel = Literal["console", "command line", "API", "itself"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Actor:
    """Who changes something, and through what."""

    name: str
    channel: Channel


ITSELF: Final = Actor(name=OWNER, channel="itself")  # a restore, a model that is started again


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditEntry:
    """Who changed what when; one that stays `begun` was killed, or is under way."""

    who: str
    channel: Channel
    what: str
    started_at: datetime
    job: str = ""
    result: Literal["begun", "done", "failed", "cancelled"] = "begun"
    fault: str = ""
    finished_at: datetime | None = None

    def ended(self, error: BaseException | None, now: datetime) -> AuditEntry:
        match error:
            case None:
                return replace(self, result="done", finished_at=now)
            case CancelledError():
                return replace(self, result="cancelled", finished_at=now)
            case ManagerError():
                fault = hide_keys(str(error))
            case _:  # its text may hold anything
                fault = "It broke off unexpectedly. The journal may say why."
        return replace(self, result="failed", fault=fault, finished_at=now)


_AUDIT_ENTRY: Final = pydantic.TypeAdapter(AuditEntry)


def parse_audit(lines: Iterable[bytes]) -> list[AuditEntry]:
    """One entry per change, in the order of their beginnings; a torn line is left out."""
    entries: dict[tuple[datetime, str, str, str], AuditEntry] = {}
    for line in lines:
        with contextlib.suppress(pydantic.ValidationError):
            entry = _AUDIT_ENTRY.validate_json(line)
            entries[entry.started_at, entry.who, entry.what, entry.job] = entry
    return [*entries.values()]


AUDIT_HEADERS: Final = ("When (UTC)", "Who", "Through", "What", "Result", "Took", "Job")


def audit_rows(entries: Sequence[AuditEntry]) -> list[list[str]]:
    """Newest first."""
    return [
        [
            f"{entry.started_at:%Y-%m-%d %H:%M:%S}",
            entry.who,
            entry.channel,
            entry.what,
            ": ".join(filter(None, (entry.result, entry.fault))),
            format_duration((entry.finished_at - entry.started_at).total_seconds())
            if entry.finished_at
            else "",
            entry.job,
        ]
        for entry in reversed(entries)
    ]


def audit_csv(entries: Sequence[AuditEntry]) -> str:
    """Oldest first, times in ISO 8601."""
    plain = (_AUDIT_ENTRY.dump_python(entry, mode="json") for entry in entries)
    return render_csv([f.name for f in fields(AuditEntry)], (each.values() for each in plain))


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """All that a page shows, taken once for every open tab."""

    taken_at: datetime
    state: State | None
    observed: Observed | None
    plan: Plan | None
    hardware: Hardware = field(default_factory=Hardware)
    faults: tuple[ManagerError, ...] = ()
    jobs: tuple[JobView, ...] = ()
    shown_at: datetime | None = None
    fates: Mapping[ModelName, str] = field(
        default_factory=dict
    )  # of models that ended by themselves
    hung: Mapping[ModelName, str] = field(default_factory=dict)  # models that work on nothing
    health: RouteHealth = field(default_factory=RouteHealth)
    database: DatabaseSize | None = None  # None: not looked at yet, or it does not answer
    dumps: tuple[Dump, ...] = ()

    @property
    def seconds_old(self) -> float:
        """How long ago the server was last looked at; much, where something in it hangs."""
        return (self.shown_at - self.taken_at).total_seconds() if self.shown_at else 0.0

    @property
    def state_has_models(self) -> bool:
        return self.state is not None and bool(self.state.models)


def dead_models(state: State, observed: Observed) -> list[ModelName]:
    """Models that are wished and have a container that ended: vLLM exits with 0 when it dies."""
    return [
        model.name
        for model in state.wished_models
        if any(
            seen is not None and not seen.running and seen.exit_code is not None
            for seen in map(observed.containers.get, replica_names(state, model))
        )
    ]


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
    return [
        [
            model.name,
            model.type,
            phase_of(state, model, observed, is_busy(snapshot, model)) if observed else "unknown",
            model.served_model_name,
            format_source(model.source),
            format_placement(model.placement, snapshot.hardware),
            _running_since(state, model, observed, snapshot.taken_at),
        ]
        for model in state.models
    ]


def _running_since(state: State, model: Model, observed: Observed | None, now: datetime) -> str:
    seen = [observed.containers.get(n) for n in replica_names(state, model)] if observed else []
    starts = [c.started_at for c in seen if c is not None and c.running and c.started_at]
    if not starts:
        return ""
    return format_age(now - min(starts))


def format_age(age: timedelta) -> str:
    """Whole minutes from the first on: what changes every second is sent every second."""
    seconds = age.total_seconds()
    return format_duration(seconds - seconds % 60 if seconds >= 60 else seconds)  # noqa: PLR2004


COMPONENT_HEADERS: Final = ("Container", "Part", "State", "Image")
_PARTS: Final = {
    "database": "PostgreSQL: keys and usage",
    "cache": "Redis: kept answers",
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


def direct_urls(state: State, key: DirectKey) -> list[str]:
    """The base URLs that a direct key is good for, of the models registered now."""
    root = base_url(state.edge).removesuffix("/v1")
    names = key.models or tuple(model.name for model in state.models)
    every = [f"{root}/v1"] if key.emergency else []
    return [*every, *(f"{root}/models/{name}/v1" for name in names)]


def hand_out_direct(state: State, key: DirectKey) -> str:
    """All that a colleague needs; the only text that ever shows the secret."""
    urls = "\n           ".join(direct_urls(state, key) or ["none yet: no model is registered"])
    return f"API key:   {key.secret.get_secret_value()}\nBase URLs: {urls}"


DIRECT_HEADERS: Final = ("Name", "Models", "Key")


def direct_rows(state: State) -> list[list[str]]:
    """The direct keys, by name; of each key its end, by which its owner knows it."""
    return [
        [
            key.name,
            "all, and /v1 in an emergency" if key.emergency else ", ".join(key.models) or "all",
            f"…{key.secret.get_secret_value()[-4:]}",
        ]
        for key in sorted(state.direct_keys, key=lambda key: key.name)
    ]


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
    if snapshot.seconds_old > OLD_SECONDS:
        age = format_duration(snapshot.seconds_old)
        found.append(Attention(f"This page shows the server of {age} ago: it hangs.", "System"))
    found += [Attention(text, "Hardware") for text in hardware_matters(snapshot.hardware)]
    state, observed = snapshot.state, snapshot.observed
    if state is None or observed is None:
        return found
    failed = [
        m for m in state.models
        if phase_of(state, m, observed, is_busy(snapshot, m)) == "failed"
    ]  # fmt: skip
    unknown = "should run and does not. Read its log, then deploy it again."
    found += [
        Attention(snapshot.fates.get(m.name, f"{m.name} {unknown}"), "Models") for m in failed
    ]
    found += [Attention(text, "Models") for text in snapshot.hung.values()]
    found += [Attention(text, "Routes") for text in hollow_routes(state)]
    found += [Attention(t, "System") for t in certificate_matters(observed, snapshot.taken_at)]
    if running_job(snapshot) is None and is_database_down(state, observed):
        found.insert(0, Attention(DATABASE_DOWN, "System"))
    found += [Attention(text, "System") for text in database_matters(snapshot.database)]
    fetching = any(job.fetching for job in snapshot.jobs)
    if snapshot.plan and running_job(snapshot) is None and not fetching:
        count = sum(len(stage.steps) for stage in snapshot.plan.stages)
        found.append(
            Attention(
                f"{count} step{'s' * (count > 1)} away from what is wished. "
                "Review and apply the plan.",
                "System",
            )
        )
    return found


OLD_SECONDS: Final = 30.0


def hollow_routes(state: State) -> list[str]:
    """Routes that nobody is wished to answer, while the endpoint is up."""
    if state.endpoint == "stopped":
        return []
    hollow = hollow_names(state)
    return [
        f"Nobody answers for the route {route.name}: none of its members is to run. "
        "Deploy one, or remove the route."
        for route in state.routes if route.name in hollow
    ]  # fmt: skip


def certificate_matters(observed: Observed, now: datetime) -> list[str]:
    """What is wrong with the operator's own certificate, or will be within two weeks."""
    seen = observed.certificate
    if seen is None:
        return []
    if seen.fault:
        served = " The one before is still served." if observed.files.get(CERTIFICATE) else ""
        return [f"{seen.fault}{served} {CERTIFICATE_ADVICE}"]
    left = (seen.expires_at - now).days if seen.expires_at else math.inf
    return [f"The certificate expires in {left} days. Renew it."] if left < CERTIFICATE_DAYS else []


CERTIFICATE_DAYS: Final = 14


def is_database_down(state: State, observed: Observed) -> bool:
    """Whether PostgreSQL is there, should run, and does not answer."""
    seen = observed.containers.get(database_name(state))
    return seen is not None and state.endpoint == "running" and seen.ready is not True


DATABASE_DOWN: Final = (
    "PostgreSQL is down. Keys that were used within the last minute still work, then all are "
    "refused with 503; direct keys work on. Look at its log, and apply the plan."
)


def database_matters(size: DatabaseSize | None) -> list[str]:
    """Whether the disk may soon have no room for a second one, which restoring a dump needs."""
    if size is None or size.database_bytes <= size.free_bytes * LARGEST_PART_OF_FREE:
        return []
    taken, free = format_size(size.database_bytes), format_size(size.free_bytes)
    advice = "Make room, or keep requests for fewer days: `database set --retention`."
    return [f"The database takes {taken}, and {free} are free beside it. {advice}"]


LARGEST_PART_OF_FREE: Final = 0.5


def database_text(snapshot: Snapshot) -> str:
    """Its size, and what is kept of it, in two lines for the console and the terminal."""
    size, state = snapshot.database, snapshot.state
    if size is None or state is None:
        return "PostgreSQL has not been asked for its size yet, or does not answer."
    rows = "" if size.spend_log_rows is None else f", about {size.spend_log_rows:,} rows"
    since = f", since {size.oldest_row_at:%Y-%m-%d %H:%M}" if size.oldest_row_at else ""
    keep = state.housekeeping
    days = f"{keep.retention_days} days" if keep.retention_days else "ever"
    return (
        f"The database takes {format_size(size.database_bytes)}; "
        f"{format_size(size.free_bytes)} are free.\n"
        f"Of it single requests: {format_size(size.spend_log_bytes)}{rows}{since}; kept for {days}."
    )


def dump_rows(dumps: Sequence[Dump]) -> list[list[str]]:
    return [
        [
            dump.file,
            format_size(dump.size_bytes),
            f"{dump.taken_at:%Y-%m-%d %H:%M:%S} UTC",
            "makes way" if dump.automatic else "stays",
        ]
        for dump in dumps
    ]


DUMP_HEADERS: Final = ("Dump", "Size", "Taken", "For newer ones it")


def hardware_matters(hardware: Hardware) -> list[str]:
    """What is wrong with the GPUs of a server that has some."""
    found = [str(hardware.fault)] if hardware.fault else []
    if hardware.reboot_pending:
        found.append(
            f"Reboot pending: the NVIDIA driver was upgraded to {hardware.library_version}. "
            "No container that needs a GPU is made anew until then."
        )
    return [*found, *hardware.lost]


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
    phases = [phase_of(state, m, observed, is_busy(snapshot, m)) for m in state.models]
    ready = f"{phases.count('ready')} of {len(phases)} models ready"
    if state.endpoint == "stopped":
        return f"{ready}; the endpoint starts with the first deployment."
    edge = observed.containers.get(edge_name(state))
    answers = "answers" if edge is not None and edge.ready else "does not answer"
    return f"{ready}; {base_url(state.edge)} {answers}."


def last_error_line(log_text: str) -> str | None:
    """The engine's own cause: vLLM's last lines only point upwards to it."""
    pattern = re.compile(r"(?:\b\w*(?:Error|Exception)\b: .+|vllm: error: .+|error: .+)$")
    said = (line.strip() for line in log_text.splitlines() if "WARNING " not in line)
    lines = [m[0] for line in said if (m := pattern.search(line))]
    pointers = (
        "Engine core initialization failed", "WorkerProc initialization failed",
        "EngineCore encountered an issue",
    )  # fmt: skip
    causes = [line for line in lines if not any(pointer in line for pointer in pointers)]
    return causes[-1][:400] if causes else None


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownFailure:
    """How an engine says that it cannot start, what that means, and the one thing to do."""

    name: str
    pattern: str
    fact: str
    advice: str


def parse_failures(text: str) -> tuple[KnownFailure, ...]:
    """The catalogue of `recipes/failures.yaml`, precise entries before general ones."""
    return tuple(KnownFailure(**entry) for entry in yaml.load(text, YAML_LOADER)["failures"])  # noqa: S506


def explain(log_text: str, failures: Sequence[KnownFailure]) -> tuple[str, str] | None:
    """Fact and advice for the first known failure that a log shows, with its own figures."""
    for known in failures:
        found = re.search(known.pattern, log_text)
        if found:
            figures = ("", *((part or "")[:200] for part in found.groups()))
            return known.fact.format(*figures), known.advice.format(*figures)
    return None


def search_log(log_text: str, wanted: str) -> str:
    """The lines that have this text, in whatever case, with their numbers."""
    found = [
        f"{number}: {line}"
        for number, line in enumerate(log_text.splitlines(), 1)
        if wanted.casefold() in line.casefold()
    ]
    return "\n".join(found) or f"No line has {wanted!r}."


KILLED: Final = 137  # 128 and signal 9


def cause_of_end(
    log_text: str, exit_code: int | None, failures: Sequence[KnownFailure]
) -> tuple[str, str]:
    """Half a sentence of fact, and advice: a known failure, else the engine's own last error."""
    known = explain(log_text, failures)
    if known is not None:
        return known
    reason = last_error_line(log_text)
    # Where only the process behind vLLM's server is killed, the server ends with 0.
    if exit_code == KILLED or (reason is None and "engine core exited unexpectedly" in log_text):
        return (
            "it was killed, as the kernel does when the server's memory is full",
            "Give it less memory, or stop another model on the processor.",
        )
    return (reason or "it gave no reason").rstrip(
        "."
    ), "Mend that, then deploy again; its whole log is kept."


# Where a start stands and what an engine says then, the last step first: lines of vLLM 0.30 on
# GPUs and on the processor, and of vLLM-Omni 0.30.
_PHASES: Final = {
    phase: re.compile("|".join(texts))
    for phase, texts in {
        "ready soon": (
            "Application startup", "Available routes are", "Route: /", "Supported tasks: ",
            "Starting vLLM (?:API )?server", r"init engine \(", "Orchestrator ready",
        ),
        "capturing graphs ({0} of {1})": (r"Capturing CUDA graphs[^:]*:.*? (\d+)/(\d+) \[",),
        "warming up": (
            "(?:Model loading|Loading weights) took", "Warming up", "dummy run to warm up",
            "torch.compile t(?:ook|akes)", "Available KV cache memory", "KV cache size: ",
            "Graph capturing finished",
        ),
        "compiling": (
            "Dynamo bytecode transform", "Compiling a graph", "Cache the graph of",
            r"compiled graph\(s\)", "for vLLM's torch.compile", "AOT compil",
        ),
        "loading weights ({1} of {2} {0})": (
            r"Loading .*?(shards|components)[^:]*:.*? (\d+)/(\d+) \[",
        ),
        "loading weights": ("Starting to load model", "Loading (?:weights|safetensors|Diffusers)"),
        "starting": (
            "non-default args", "Resolved architecture", "Initializing (?:a V1 LLM engine|with)",
        ),
    }.items()
}  # fmt: skip


def start_phase(log_text: str) -> str | None:
    """How far an engine's start has come by its last telling line; None: nothing is recognised."""
    for line in reversed(re.split(r"[\r\n]+", log_text)):
        for phase, pattern in _PHASES.items():
            if found := pattern.search(line):
                return phase.format(*found.groups())
    return None


def starting_line(log_text: str, elapsed: float, last_time: float | None) -> str:
    """Where a start stands and when it will be done, by how many seconds it took the last time."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", log_text) if line.strip()]
    where = start_phase(log_text) or (lines or ["it has said nothing yet"])[-1][:120]
    when = ""
    if last_time is not None and elapsed < last_time:
        when = f", ready in about {format_duration(last_time - elapsed)}"
    elif last_time is not None:
        when = f", longer than last time ({format_duration(last_time)})"
    return f"  {format_duration(elapsed)}: {where}{when}"


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


@dataclass
class BuildLog:
    """Docker's build stream: every line, those worth showing, and why it failed."""

    lines: list[str] = field(default_factory=list)
    rest: str = ""
    shown_at: float = -math.inf

    def add(self, text: str, now: float) -> list[str]:
        """The lines to show now: every step, and of its output one every few seconds."""
        *whole, self.rest = (self.rest + re.sub(r"\x1b\[[0-9;]*m", "", text)).split("\n")
        shown: list[str] = []
        for line in filter(None, map(str.rstrip, whole)):
            self.lines.append(line)
            is_step = line.startswith("Step ")
            if is_step or (now - self.shown_at >= BUILD_LINE_SECONDS and _is_output(line)):
                self.shown_at = now
                shown.append(f"  {' '.join(_step_of(line)) if is_step else line[:120]}")
        return shown

    def fault(self, recipe: str) -> ContainerFailedError | None:
        """Why a command of the recipe failed; None where it was not one."""
        text = "\n".join(self.lines)
        failed = re.search(r"returned a non-zero code: (\d+)$", text)
        begun = [n for n, line in enumerate(self.lines) if line.startswith("Step ")]
        if failed is None or not begun:
            return None
        number, command = _step_of(self.lines[begun[-1]])
        said = [line for line in self.lines[begun[-1] + 1 : -1] if _is_output(line)]
        errors = [line for line in said if re.search("error|fatal", line, re.IGNORECASE)]
        reason = "".join(f": {line.strip()[:300].rstrip('.')}" for line in (errors or said)[-1:])
        advice = next(
            (advice for pattern, advice in BUILD_CAUSES if re.search(pattern, "\n".join(said))),
            f"Mend the recipe, then build it again; logs/build-{recipe}.log has all of it.",
        )
        return ContainerFailedError(
            f"The recipe {recipe} could not be built: {number} `{command}` "
            f"ended with status {failed[1]}{reason}.",
            advice=advice,
        )


BUILD_LINE_SECONDS: Final = 2.0
BUILD_CAUSES: Final = (
    (
        r"CERTIFICATE_VERIFY_FAILED|UnknownIssuer",
        "Set PIP_INDEX_URL to a mirror whose certificate the base image trusts.",
    ),
    # Without a network pip ends with "No matching distribution", too.
    (
        r"name resolution|Failed to establish a new connection|timed out|error sending request",
        "Check this server's network; set PIP_INDEX_URL or HTTPS_PROXY for LLM Manager if need be.",
    ),
    (
        r"No matching distribution|Could not find a version|No solution found",
        "Correct the package's name or version in the recipe.",
    ),
    (r"Unable to locate package|no installation candidate", "Correct that system package's name."),
)


def _step_of(line: str) -> tuple[str, str]:
    """`Step 3/5 : RUN a;   b` as its number and what it is about: b."""
    number, _, command = line.partition(" : ")
    return number.lower(), re.split(r";\s{2,}", command)[-1][:100]


def _is_output(line: str) -> bool:
    """Whether a program of the image said it, and not the builder."""
    return not line.startswith((" ---> ", "Removing intermediate container "))


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


KEY_HEADERS: Final = (
    "For", "Key", "Group", "Models", "State", "Limits", "Used", "Expires", "Last used", "Created",
)  # fmt: skip


def key_rows(keys: Sequence[VirtualKey], now: datetime) -> list[list[str]]:
    """One row per key."""
    return [
        [
            key.settings.alias,
            key.hint,
            key.settings.group,
            ", ".join(key.settings.models) or "all",
            key_state(key, now),
            limits_text(key.settings),
            used_text(key.settings, key.used),
            format_day(key.settings.expires_at) or "never",
            format_day(key.last_used_at) or "never",
            format_day(key.created_at),
        ]
        for key in keys
    ]


def key_facts(key: VirtualKey, now: datetime) -> Json:
    """What `key list --json` prints of each: its settings beside what is known of it."""
    known = {name: value for name, value in asdict(key).items() if name != "settings"}
    return asdict(key.settings) | known | {"state": key_state(key, now)}


def limits_text(allowance: Allowance) -> str:
    parallel = allowance.parallel if isinstance(allowance, KeySettings) else None
    limits = (
        (allowance.rpm_limit, "requests/min"), (allowance.tpm_limit, "tokens/min"),
        (parallel, "at a time"),
    )  # fmt: skip
    return ", ".join(f"{limit} {unit}" for limit, unit in limits if limit) or NO_LIMITS


NO_LIMITS: Final = "none"


def used_text(allowance: Allowance, used: float) -> str:
    """Of a budget, in millions of tokens."""
    budget = budget_text(allowance)
    told = f"{used:,.0f}" if used >= 100 else f"{used:.3g}"  # noqa: PLR2004 - three digits
    if 0 < used < 0.01:  # noqa: PLR2004 - which reads better as tokens
        return f"{used * 1e6:,.0f} tokens{f' of {budget}' if budget else ''}"
    return f"{told} of {budget}" if budget else f"{told} million tokens"


GROUP_HEADERS: Final = ("Group", "Keys", "Models", "State", "Limits", "Used", "Resets")


def group_rows(
    groups: Sequence[KnownGroup], keys: Sequence[VirtualKey], now: datetime
) -> list[list[str]]:
    """One row per group."""
    counted = Counter(key.settings.group for key in keys)
    return [
        [
            group.settings.name,
            str(counted[group.settings.name]),
            ", ".join(group.settings.models) or "all",
            group_state(group, now),
            limits_text(group.settings),
            used_text(group.settings, group.used),
            format_day(group.resets_at),
        ]
        for group in groups
    ]


def group_state(group: KnownGroup, now: datetime) -> str:
    if group.blocked:
        return "blocked"
    used_up = is_used_up(group.settings, group.used, group.resets_at, now)
    return "used up" if used_up else "active"


DIAGNOSIS_HEADERS: Final = ("What is wrong", "What to do")


def diagnosis_text(diagnosis: Diagnosis) -> str:
    """One sentence, and a line per fault."""
    if not diagnosis.faults:
        told = map(limits_text, diagnosis.limits)
        limits = [text for text in told if text != NO_LIMITS]
        beyond = f" Beyond {', or of its group '.join(limits)}: 429." if limits else ""
        return f"{diagnosis.title}: nothing speaks against it.{beyond}"
    return "\n".join(
        [f"{diagnosis.title}:", *(f"- {fact} {advice}" for fact, advice in diagnosis.faults)]
    )


def format_day(moment: datetime | None) -> str:
    return f"{moment:%Y-%m-%d}" if moment else ""


def hand_out(state: State, settings: KeySettings, secret: str) -> str:
    """All that a colleague needs, ready to paste; the only text that ever shows the secret."""
    names = (*settings.models, *public_names(state), "MODEL")
    model, url = names[0].replace("*", "MODEL"), base_url(state.edge)
    own = "  # trust the server's certificate first" if state.edge.tls.kind == "internal" else ""
    return (
        f"API key:   {secret}\nBase URL:  {url}\n\n{curl_example(state.edge, model, secret)}\n\n"
        f"export OPENAI_BASE_URL={url}\nexport OPENAI_API_KEY={secret}\n\n"
        f"from openai import OpenAI{own}\n"
        f'client = OpenAI(base_url="{url}", api_key="{secret}")\n'
        f'asked = [{{"role": "user", "content": "Hello"}}]\n'
        f'print(client.chat.completions.create(model="{model}", messages=asked))'
    )


def status_facts(snapshot: Snapshot) -> Json:
    """What `status --json` prints: rows keyed by their headers, and what needs attention."""
    return {
        "summary": summary_line(snapshot),
        "models": keyed(MODEL_HEADERS, model_rows(snapshot)),
        "containers": keyed(COMPONENT_HEADERS, component_rows(snapshot)),
        "attention": [matter.text for matter in attention(snapshot)],
    }


def keyed(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[Json]:
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


def plain_lines(text: str) -> str:
    """The same of several lines, of which those of a list stay one."""
    return "\n".join(
        f"- {plain(line[2:])}" if line.startswith("- ") else plain(line)
        for line in text.splitlines()
    )


def code_block(text: str) -> str:
    """Text in a Markdown fence that it cannot close."""
    return "~~~~~~\n" + text.replace("~~~~~~", "") + "\n~~~~~~"


@dataclass(frozen=True, kw_only=True, slots=True)
class StageFacts:
    """What is done in one stage, step by step."""

    stage: str
    steps: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanFacts:
    """A plan for programs; without stages there is nothing to do."""

    title: str
    stages: tuple[StageFacts, ...]
    interrupted: tuple[str, ...]  # models that do not answer for a while, or for good
    diff: str  # of generated files


def plan_facts(title: str, plan: Plan) -> PlanFacts:
    stages = (
        StageFacts(stage=stage.title, steps=tuple(map(describe, stage.steps)))
        for stage in plan.stages
    )
    return PlanFacts(
        title=title, stages=tuple(stages), interrupted=plan.interrupted, diff=plan.diff()
    )


API_STYLE: Final = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; }
:root { color-scheme: light dark; } pre { overflow: auto; padding: 8px; background: #8882; }
summary { cursor: pointer; } summary code { font-weight: 600; }
"""


def render_api_page(document: Json) -> str:
    """An OpenAPI document as one plain page, which asks nobody for anything."""
    schemas = document["components"]["schemas"]
    parts = [
        _folded(f"{method.upper()} {path}", operation["description"], operation)
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    ] + [_folded(name, schema.get("description", ""), schema) for name, schema in schemas.items()]
    title = html.escape(document["info"]["title"])
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{API_STYLE}</style><h1>{title}</h1>"
        f"<p>{html.escape(document['info']['description'])}</p>{''.join(parts)}</html>"
    )


def _folded(name: str, text: str, details: Json) -> str:
    shown = html.escape(json.dumps(details, indent=2))
    return (
        f"<details><summary><code>{html.escape(name)}</code> {html.escape(text)}</summary>"
        f"<pre>{shown}</pre></details>"
    )


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


def token_choices(snapshot: Snapshot) -> Json:
    tokens = snapshot.state.admin_tokens if snapshot.state else ()
    return {"choices": [token.name for token in tokens]}


def served_choices(snapshot: Snapshot) -> Json:
    return {"choices": public_names(snapshot.state) if snapshot.state else []}


def revoke_question(alias: str) -> str:
    return (
        f"**Revoke the key of {plain(alias)}?** Its requests are refused from then on; "
        "what it used stays accounted for."
    )


GroupVerb = Literal["block", "extend", "revoke"]


def group_question(
    verb: GroupVerb, name: str, keys: Sequence[VirtualKey], until: datetime | None, now: datetime
) -> str:
    """What would happen to the keys of a group, before it does."""
    named, many = plain(name), f"{len(keys)} key{'s' * (len(keys) != 1)}"
    match verb:
        case "block":
            return (
                f"**Block the group {named} with its {many}?** Their requests are refused until it "
                "is unblocked."
            )
        case "extend":
            ends = [key.settings.expires_at for key in keys]
            sooner = sum(end is not None and (until is None or end < until) for end in ends)
            later = sum(until is not None and (end is None or end > until) for end in ends)
            expired = sum(key_state(key, now) == "expired" for key in keys)
            return (
                f"**Let the {many} of {named} end: {format_day(until) or 'never'}?** Now {sooner} "
                f"end sooner, {expired} of them have expired and work again, and {later} end later."
            )
        case "revoke":
            return (
                f"**Revoke the group {named} with its {many}?** Their requests are refused from "
                "then on; what they used stays accounted for."
            )
        case _:
            assert_never(verb)


def running_job(snapshot: Snapshot) -> JobView | None:
    """The change that is under way; tasks beside it do not count."""
    going = (job for job in snapshot.jobs if job.finished_at is None and job.kind == "change")
    return next(going, None)


def is_busy(snapshot: Snapshot, model: Model) -> bool:
    """Whether a model may be down because a change is under way, or fetches what it needs."""
    title = model_stage_title(model)
    fetching = any(title in job.fetching for job in snapshot.jobs)
    return fetching or running_job(snapshot) is not None


def shown_job(snapshot: Snapshot) -> JobView | None:
    """The change that is under way, else the newest job."""
    return running_job(snapshot) or next(iter(snapshot.jobs), None)


def job_group(snapshot: Snapshot) -> Json:
    return {"visible": bool(snapshot.jobs)}


def job_title(snapshot: Snapshot) -> str:
    """The shown job, how it stands, and what comes next."""
    job = shown_job(snapshot)
    if job is None:
        return ""
    if job.finished_at is None:
        elapsed = format_duration((snapshot.taken_at - job.started_at).total_seconds())
        far = f" · {plain(job.progress)}" if job.progress else ""
        return f"**{plain(job.title)}** · running for {elapsed}{far}"
    took = format_duration((job.finished_at - job.started_at).total_seconds())
    if job.fault:
        how = "cancelled" if job.cancelled else "failed"
        return f"**{plain(job.title)}** · {how} after {took}: {plain(job.fault)}"
    return f"**{plain(job.title)}** · done in {took}. {job.hint}"


def job_log(snapshot: Snapshot) -> Json:
    """The shown job's lines, while they matter: it runs, or it failed."""
    job = shown_job(snapshot)
    if job is None:
        return {"visible": False}
    matters = job.finished_at is None or job.fault is not None
    return {"value": "\n".join(job.lines), "visible": matters}


def offering_job(snapshot: Snapshot) -> JobView | None:
    """The newest job of which nobody fetched the secrets yet."""
    return next((job for job in snapshot.jobs if job.offers), None)


def offer_group(snapshot: Snapshot) -> Json:
    return {"visible": offering_job(snapshot) is not None}


def offer_text(snapshot: Snapshot) -> str:
    job = offering_job(snapshot)
    if job is None or job.finished_at is None:
        return ""
    until = job.finished_at + timedelta(seconds=OFFER_SECONDS)
    return (
        f"**{job.lines[-1]}** Their secrets are told once. They wait in memory alone, until "
        f"{until:%H:%M} UTC or until this program ends."
    )


def job_cancel(snapshot: Snapshot) -> Json:
    job = shown_job(snapshot)
    return {"visible": job is not None and job.finished_at is None}


ORIGINS: Final = ("Hugging Face hub", "a directory of this server")


def registration(  # noqa: PLR0913, PLR0917 - one argument per field of the form
    name: str | None, kind: str, origin: str, source: str | None, arguments: str | None,
    served: str | None, revision: str | None, image: str | None,
    kv_cache_mib: float | None, replicas: float | None, gpus: Sequence[str] | None = None,
    mig_slice: str | None = None, memory_fraction: float | None = None,
    recipe: str | None = None,
) -> Json:  # fmt: skip
    """The form's fields in the shape of a stored model; what is not there is left to defaults.

    Gradio (6.31) sends None for a text field in an accordion that was never opened.
    """
    place = typed(source)
    hub = {"kind": "hub", "repository": place, "revision": typed(revision) or None}
    chosen = _chosen_placement(kv_cache_mib, gpus or (), mig_slice, memory_fraction)
    return {
        "name": typed(name),
        "type": kind,
        "source": hub if origin == ORIGINS[0] else {"kind": "local", "path": place},
        "served_model_name": typed(served) or typed(name),
        "engine_arguments": split_arguments(typed(arguments)),
        "image": typed(image) or None,
        "recipe": recipe or None,
        "replicas": replicas or 1,
    } | ({"placement": chosen} if chosen else {})


PROCESSOR: Final = "cpu"


def _chosen_placement(
    kv_cache_mib: float | None, gpus: Sequence[str], mig_slice: str | None, share: float | None
) -> Json | None:
    """None where nothing was chosen, and the program is to choose."""
    if mig_slice:
        gpu_uuid, profile, start = mig_slice.rsplit(":", 2)
        return {"kind": "mig", "gpu_uuid": gpu_uuid, "profile": profile, "start": int(start)}
    if PROCESSOR in gpus:
        return {"kind": "cpu"} | ({"kv_cache_mib": kv_cache_mib} if kv_cache_mib else {})
    return {"kind": "gpu", "gpu_uuids": [*gpus], "memory_fraction": share or None} if gpus else None


def typed(text: str | None) -> str:
    """What a text field holds, without the spaces around it."""
    return (text or "").strip()


WHOLE_LIMITS: Final = ("rpm_limit", "tpm_limit", "parallel")


def allowance_fields(held: Json) -> Json:
    """What the fields of an allowance hold as settings; 0 or empty is no limit."""
    return {
        **{name: int(held[name] or 0) or None for name in WHOLE_LIMITS if name in held},
        "models": tuple(held["models"] or ()),
        "budget": float(held["budget"] or 0) or None,
        "period": held["period"] or None,
    }


def key_fields(held: Json, now: datetime) -> Json:
    """The same of a whole key's."""
    return {
        **allowance_fields(held),
        **{name: typed(held.get(name)) for name in ("alias", "email", "group", "note")},
        "expires_at": end_after(int(held["days"] or 0), now),
    }


def form_of_key(settings: KeySettings, now: datetime, names: Sequence[str]) -> list[Any]:
    """A key's settings as the form's fields, in their order."""
    left = settings.expires_at - now if settings.expires_at else timedelta()
    empty: Json = {"models": [], "period": "", "group": None} | dict.fromkeys(WHOLE_LIMITS, 0)
    shown = {name: value for name, value in asdict(settings).items() if value}
    held = empty | {"budget": 0, "email": "", "note": ""} | shown
    held["days"] = math.ceil(left / timedelta(days=1))
    return [held[name] for name in names]


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
# §21 Hardware views — pure: GPUs, slices and restores as the operator sees them
# =============================================================================


def restore_rows(
    state: State, observed: Observed, faults: Mapping[str, ManagerError]
) -> list[list[str]]:
    """What a restore reached, judged by looking: a row per step of design §5, and per model."""
    hardware = observed.hardware or Hardware()
    database, edge = [database_name(state)], [edge_name(state)]
    slot = serving_slot(observed)
    gateway = [gateway_name(state, slot)] if slot else []
    turning = faults.get("endpoint")
    rows = [_layout_row(wish, hardware, faults) for wish in state.mig_layouts]
    rows = rows or [["1 MIG layout", "none wished"]]
    if state.endpoint == "running":
        rows.append(["2 PostgreSQL", _reached(database, observed, faults.get("database"))])
    rows += [
        [
            f"3 {model.name}",
            _reached(replica_names(state, model), observed, faults.get(f"model {model.name}")),
        ]
        for model in state.wished_models
    ]
    if state.endpoint == "running":
        rows.append(["4 LiteLLM", _reached(gateway, observed, turning)])
        rows.append(["5 Caddy", _reached(edge, observed, turning)])
    return [*rows, ["6 monitoring", "on" if state.monitoring else "off"]]


def _layout_row(
    wish: MigLayout, hardware: Hardware, faults: Mapping[str, ManagerError]
) -> list[str]:
    gpu = hardware.gpu(wish.gpu_uuid)
    title = gpu.title if gpu else wish.gpu_uuid
    if gpu is not None and gpu.is_cut_as(wish.slices):
        return [f"1 MIG layout of {title}", f"as wished: {format_slices(wish.slices)}"]
    fault = faults.get(f"MIG layout of {title}")
    return [f"1 MIG layout of {title}", f"failed: {fault}" if fault else "not as wished"]


def _reached(names: Sequence[ContainerName], observed: Observed, fault: ManagerError | None) -> str:
    found = [observed.containers.get(name) for name in names]
    if found and all(seen is not None and seen.ready for seen in found):
        known = [observed.start_seconds[name] for name in names if name in observed.start_seconds]
        return "ready" + (f" (its last start took {format_duration(max(known))})" if known else "")
    return f"failed: {fault}" if fault else "not ready"


REBOOT_HEADERS: Final = ("Step", "What comes back", "Took last time")


def reboot_rows(state: State, observed: Observed) -> list[list[str]]:
    """What a reboot would be followed by, in order, and how long each took the last time."""
    hardware = observed.hardware or Hardware()
    rows = [
        ["1 MIG layout", f"{title_of(hardware, wish.gpu_uuid)}: {format_slices(wish.slices)}", ""]
        for wish in state.mig_layouts
    ]
    running = state.endpoint == "running"
    if running:
        rows.append(["2 PostgreSQL", "keys and usage", _took([database_name(state)], observed)])
    rows += [
        [
            f"3 {model.name}",
            format_placement(model.placement, hardware),
            _took(replica_names(state, model), observed),
        ]
        for model in state.wished_models
    ]
    if running:
        gateways = [gateway_name(state, slot) for slot in SLOTS]
        rows.append(["4 LiteLLM", base_url(state.edge), _took(gateways, observed)])
        rows.append(["5 Caddy", base_url(state.edge), _took([edge_name(state)], observed)])
    return rows


def _took(names: Sequence[ContainerName], observed: Observed) -> str:
    known = [observed.start_seconds[name] for name in names if name in observed.start_seconds]
    return format_duration(max(known)) if known else "unknown"


def reboot_warnings(
    state: State, observed: Observed, enabled: Mapping[str, bool | None]
) -> list[str]:
    """Why not everything that runs now would come back; empty when it is safe to reboot."""
    hardware = observed.hardware or Hardware()
    found = [
        f"{unit} does not start at boot. {advice}"
        for unit, advice in BOOT_UNITS.items()
        if enabled.get(unit) is False
    ]
    found += [
        f"{gpu.title} is cut, and no layout is wished for it: its slices would be gone. "
        f"Keep them with `mig apply {gpu.index} keep`."
        for gpu in hardware.gpus
        if gpu.slices and state.layout_of(gpu.uuid) is None
    ]
    found += [
        f"{gpu.title} has {format_slices(gpu.layout)}; a reboot would bring what is wished: "
        f"{format_slices(wish.slices)}."
        for gpu in hardware.gpus
        if (wish := state.layout_of(gpu.uuid)) and not gpu.is_cut_as(wish.slices)
    ]
    found += [
        f"{model.name} is not ready now, so nobody knows whether it would be then."
        for model in state.wished_models
        if phase_of(state, model, observed, busy=False) != "ready"
    ]
    found += [str(hardware.fault)] if hardware.fault and state.mig_layouts else []
    found += hardware.lost
    found += [
        f"{wish.gpu_uuid} has a wished layout, and is not in this server."
        for wish in state.mig_layouts
        if hardware.gpu(wish.gpu_uuid) is None
    ]
    if hardware.mig_manager and state.mig_layouts:
        found.append(
            "nvidia-mig-manager cuts GPUs at boot by its own file, by default to nothing. "
            "Run `systemctl disable --now nvidia-mig-manager`."
        )
    return found


BOOT_UNITS: Final[Mapping[str, str]] = {"llm-manager.service": "Run `llm_manager.py install`."}


def reboot_text(state: State, observed: Observed, enabled: Mapping[str, bool | None]) -> str:
    """The verdict in one line, then every doubt."""
    warnings = reboot_warnings(state, observed, enabled)
    if warnings:
        return "Not everything would come back:\n" + "\n".join(f"- {line}" for line in warnings)
    if not any(enabled.values()):
        return "Everything would come back, if LLM Manager starts at boot (no systemd here)."
    return "Safe to reboot: everything that is wished comes back."


GPU_HEADERS: Final = ("GPU", "Name", "Memory", "Load", "Heat", "Power", "MIG", "On it")
UNKNOWN: Final = "unknown"


def gpu_rows(state: State | None, hardware: Hardware) -> list[list[str]]:
    """One row per GPU; what the driver does not tell is called unknown."""
    return [
        [
            gpu.title,
            gpu.name or UNKNOWN,
            memory_text(gpu),
            _known(gpu.utilisation_percent, "%"),
            _known(gpu.temperature_c, "°C"),
            power_text(gpu),
            mig_text(gpu),
            ", ".join(m.name for m in state.models if gpu.uuid in gpus_of(m)) if state else "",
        ]
        for gpu in hardware.gpus
    ]


def _known(value: float | None, unit: str) -> str:
    return UNKNOWN if value is None else f"{value:.0f} {unit}"


def memory_text(gpu: Gpu) -> str:
    if gpu.memory_mib is None:
        return UNKNOWN
    used = "" if gpu.memory_used_mib is None else f"{gpu.memory_used_mib / 1024:.1f} of "
    return f"{used}{gpu.memory_mib / 1024:.1f} GiB"


def power_text(gpu: Gpu) -> str:
    limit = "" if gpu.power_limit_w is None else f" of {gpu.power_limit_w:.0f} W"
    return UNKNOWN if gpu.power_w is None else f"{gpu.power_w:.0f} W{limit}"


def mig_text(gpu: Gpu) -> str:
    """Whether it is cut, and how."""
    if gpu.mig_enabled is None:
        return "cannot be cut"
    waiting = "" if gpu.mig_pending in {None, gpu.mig_enabled} else ", a reset is pending"
    if not gpu.mig_enabled:
        return f"off{waiting}"
    if gpu.slices is None:
        return f"on, slices not visible{waiting}"
    return format_slices(gpu.layout) + waiting


def topology_rows(hardware: Hardware) -> list[list[str]]:
    """The matrix of links, as `nvidia-smi topo -m` names them."""
    return [
        [one.title, *(_joined(hardware, one, other) for other in hardware.gpus)]
        for one in hardware.gpus
    ]


def _joined(hardware: Hardware, one: Gpu, other: Gpu) -> str:
    if one is other:
        return "X"
    return str(hardware.links.get(frozenset({one.uuid, other.uuid}), UNKNOWN))


def topology_headers(hardware: Hardware) -> list[str]:
    return ["", *(gpu.title for gpu in hardware.gpus)]


SLICE_HEADERS: Final = ("GPU", "Slice", "Memory", "Wished", "Now", "Model")


def slice_rows(state: State, hardware: Hardware) -> list[list[str]]:
    """Every slice that there is or that is wished, along each card."""
    rows: list[list[str]] = []
    for gpu in hardware.gpus:
        wish = state.layout_of(gpu.uuid)
        wished = {*wish.slices} if wish else set()
        for profile, start in along(gpu.layout | wished):
            device = gpu.device((profile, start))
            on_it = [m.name for m in state.models if is_on(m, gpu, (profile, start))]
            rows.append([
                gpu.title,
                f"{profile} at {start}",
                slice_memory(gpu, profile),
                "yes" if (profile, start) in wished else "no",
                (device.uuid or "incomplete") if device
                else "missing" if gpu.slices is not None else "not visible",
                ", ".join(on_it),
            ])  # fmt: skip
    return rows


def is_on(model: Model, gpu: Gpu, wanted: Slice) -> bool:
    """Whether a model is bound to this slice of this GPU."""
    place = model.placement
    return isinstance(place, MigPlacement) and (place.gpu_uuid, place.profile, place.start) == (
        gpu.uuid, *wanted,
    )  # fmt: skip


def slice_memory(gpu: Gpu, profile: str) -> str:
    known = (
        [p.memory_mib for p in gpu.geometry.profiles if p.name == profile] if gpu.geometry else []
    )
    return f"{known[0] / 1024:.1f} GiB" if known and known[0] is not None else UNKNOWN


def hardware_facts(state: State, hardware: Hardware) -> Json:
    """What `gpu list --json` prints: measured values as numbers, null where unknown."""
    hidden = {"geometry", "clients"}
    return {
        "driver_version": hardware.driver_version,
        "cuda_version": hardware.cuda_version,
        "kernel_version": hardware.kernel_version,
        "library_version": hardware.library_version,
        "reboot_pending": hardware.reboot_pending,
        "fault": str(hardware.fault) if hardware.fault else None,
        "lost": list(hardware.lost),
        "gpus": [
            {
                **{key: value for key, value in asdict(gpu).items() if key not in hidden},
                "clients": [asdict(client) for client in gpu.clients or ()],
                "models": [m.name for m in state.models if gpu.uuid in gpus_of(m)],
            }
            for gpu in hardware.gpus
        ],
        "links": [
            {"gpus": sorted(pair), "kind": link.kind, "lanes": link.lanes}
            for pair, link in hardware.links.items()
        ],
    }


def driver_text(hardware: Hardware) -> str:
    """What the driver is, or why there is nothing to see."""
    lines = [str(hardware.fault)] if hardware.fault else []
    if hardware.reboot_pending:
        lines.append(
            f"**Reboot pending:** the driver was upgraded to {hardware.library_version}, and "
            f"{hardware.kernel_version} is loaded. What runs goes on; no container that needs a "
            "GPU is made anew until then."
        )
    lines += hardware.lost
    if hardware.gpus:
        cuda = f", CUDA {hardware.cuda_version}" if hardware.cuda_version else ""
        lines.append(f"NVIDIA driver {hardware.driver_version or UNKNOWN}{cuda}.")
    elif not lines:
        lines.append("No NVIDIA GPU is in this server; models run on the processor.")
    if hardware.mig_manager:
        lines.append(
            "nvidia-mig-manager is enabled: it cuts GPUs at boot by its own file, by default to "
            "nothing. Disable it, or leave the cutting to it."
        )
    return "\n\n".join(lines)


# --- the picture of a card ---------------------------------------------------


Look = Literal["ready", "busy", "failed", "empty", "free"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """One part of a card: from where to where, in parts of the whole, and what sits there."""

    start: float
    size: float
    title: str
    text: str
    look: Look


_LOOKS: Final[Mapping[Phase, Look]] = {
    "ready": "ready", "starting": "busy", "pending": "busy", "stopping": "busy",
    "failed": "failed", "stopped": "empty",
}  # fmt: skip


def card_blocks(gpu: Gpu, state: State, observed: Observed | None) -> list[Block]:
    """A card from its first memory slice to its last; a whole GPU by its models' fractions."""
    if gpu.mig_enabled and gpu.geometry is not None:
        return _slice_blocks(gpu, gpu.geometry, state, observed)
    blocks: list[Block] = []
    here = 0.0
    mine = [
        m for m in state.models if isinstance(m.placement, GpuPlacement) and gpu.uuid in gpus_of(m)
    ]
    for model in sorted(mine, key=lambda m: m.wish):  # running before stopped
        share = min(gpu_share(model), 1.0)
        if here + share <= 1 + ROUNDING:
            blocks.append(_model_block(here, share, f"{share:.0%}", [model], state, observed))
            here += share
    if here < 1 - ROUNDING:
        blocks.append(Block(start=here, size=1 - here, title="free", text="", look="free"))
    return blocks


def _slice_blocks(
    gpu: Gpu, geometry: MigGeometry, state: State, observed: Observed | None
) -> list[Block]:
    whole, blocks = geometry.memory_units, []
    here = 0
    for device in gpu.slices or ():
        size = geometry.profile(device.profile).size
        if device.start > here:
            blocks.append(_gap(here, device.start, whole))
        models = [m for m in state.models if is_on(m, gpu, device.slice)]
        start, part = device.start / whole, size / whole
        blocks.append(_model_block(start, part, device.profile, models, state, observed))
        here = device.start + size
    return [*blocks, *([_gap(here, whole, whole)] if here < whole else [])]


def _gap(start: int, end: int, whole: int) -> Block:
    return Block(
        start=start / whole, size=(end - start) / whole, title="not cut", text="", look="free"
    )


def _model_block(
    start: float, size: float, title: str, models: Sequence[Model], state: State,
    observed: Observed | None,
) -> Block:  # fmt: skip
    running = [m for m in models if m.wish == "running"] or list(models)
    if not running:
        return Block(start=start, size=size, title=title, text="empty", look="empty")
    if observed is None:
        names = ", ".join(m.name for m in running)
        look: Look = "busy" if running[0].wish == "running" else "empty"
        return Block(start=start, size=size, title=title, text=names, look=look)
    phases = [phase_of(state, m, observed, busy=False) for m in running]
    text = ", ".join(f"{m.name}: {phase}" for m, phase in zip(running, phases, strict=True))
    return Block(start=start, size=size, title=title, text=text, look=_LOOKS[phases[0]])


def card_html(gpu: Gpu, blocks: Sequence[Block], note: str = "") -> str:
    """A card as a picture; every text in it is escaped."""
    parts = "".join(
        f'<div class="slice {block.look}" style="left:{block.start:.2%};width:{block.size:.2%}" '
        f'title="{html.escape(f"{block.title} {block.text}".strip(), quote=True)}">'
        f"<b>{html.escape(block.title)}</b><span>{html.escape(block.text)}</span></div>"
        for block in blocks
    )
    facts = " · ".join(
        (memory_text(gpu), f"load {_known(gpu.utilisation_percent, '%')}",
         _known(gpu.temperature_c, "°C"), power_text(gpu))
    )  # fmt: skip
    head = f"<b>{html.escape(gpu.title)}</b> {html.escape(gpu.name or UNKNOWN)}"
    foot = f'<div class="card-foot">{html.escape(note)}</div>' if note else ""
    return (
        f'<div class="gpu-card" role="img" aria-label="{html.escape(gpu.title, quote=True)}">'
        f'<div class="card-head"><span>{head}</span><span>{html.escape(facts)}</span></div>'
        f'<div class="card-bar">{parts}</div>{foot}</div>'
    )


def cards_html(snapshot: Snapshot) -> str:
    """Every GPU with what sits on it; nothing where there is none."""
    state, observed = snapshot.state, snapshot.observed
    if state is None:
        return ""
    return "".join(
        card_html(gpu, card_blocks(gpu, state, observed), card_note(gpu, state, observed))
        for gpu in snapshot.hardware.gpus
    )


def card_note(gpu: Gpu, state: State, observed: Observed | None) -> str:
    """What the picture does not show: drift from the wish, foreign clients, trouble."""
    wish = state.layout_of(gpu.uuid)
    notes = []
    if wish is not None and not gpu.is_cut_as(wish.slices):
        notes.append(f"wished: {format_slices(wish.slices)}")
    if gpu.slices and wish is None:
        notes.append("cut by somebody else; its slices do not survive a reboot")
    foreign = foreign_clients(gpu, our_ids(observed), None) if observed else []
    if foreign:
        notes.append(f"also here: {', '.join(map(describe_client, foreign))}")
    daemons = [client for client in gpu.clients or () if not client.computes]
    if daemons:
        notes.append(f"held open by {', '.join(map(describe_client, daemons))}")
    if gpu.xids:
        notes.append(f"driver errors: {', '.join(f'Xid {n}' for n in dict.fromkeys(gpu.xids))}")
    return "; ".join(notes)


def planned_card(change: Change, state: State, hardware: Hardware) -> str:
    """The cards as they would be after a change of layouts."""
    after = change.edit(state)
    pictures = []
    for gpu in hardware.gpus:
        wish = after.layout_of(gpu.uuid)
        if change.scope.gpus is not None and gpu.uuid in change.scope.gpus and wish is not None:
            slices = tuple(MigDevice(profile=p, start=s, uuid=None) for p, s in wish.slices)
            cut = replace(gpu, mig_enabled=bool(slices), slices=slices)
            pictures.append(card_html(cut, card_blocks(cut, after, None), "after the change"))
    return "".join(pictures)


def driver_view(snapshot: Snapshot) -> str:
    return driver_text(snapshot.hardware)


def topology_text(snapshot: Snapshot) -> str:
    """The matrix of links as a Markdown table, and what its words mean."""
    hardware = snapshot.hardware
    if len(hardware.gpus) < 2:  # noqa: PLR2004
        return "There is one GPU at most."
    lines = [topology_headers(hardware), ["---"] * (len(hardware.gpus) + 1)]
    body = [f"| {' | '.join(row)} |" for row in [*lines, *topology_rows(hardware)]]
    meanings = "; ".join(f"{kind}: {text}" for kind, text in LINK_MEANINGS.items())
    return (
        "\n".join(body)
        + f"\n\nNV*n*: n NVLinks; {meanings}. A cut GPU reaches others by PCIe alone."
    )


def gpu_choices(snapshot: Snapshot) -> Json:
    """The GPUs that can be cut, as a dropdown takes them."""
    cuttable = [gpu for gpu in snapshot.hardware.gpus if gpu.geometry is not None]
    return {"choices": [(short_title(gpu), gpu.uuid) for gpu in cuttable]}


def placement_note(model: Model, hardware: Hardware) -> str:
    """For several GPUs: how they are joined."""
    group = [gpu for gpu in hardware.gpus if gpu.uuid in gpus_of(model)]
    return f"; {why_together(hardware, group)}" if len(group) > 1 else ""


def short_title(gpu: Gpu) -> str:
    return f"{gpu.title} {(gpu.name or UNKNOWN).removeprefix('NVIDIA ')}"


def layout_choices(gpu: Gpu | None) -> list[str]:
    """Every full layout of a card in the words that the planner takes."""
    if gpu is None or gpu.geometry is None:
        return []
    full = [format_profiles(names).replace(" + ", ", ") for names in full_layouts(gpu.geometry)]
    return ["keep", *full, "off"]


def slice_choices(snapshot: Snapshot) -> Json:
    """The wished slices that no model is bound to."""
    state, hardware = snapshot.state, snapshot.hardware
    if state is None:
        return {"choices": []}
    return {
        "choices": [
            (f"{gpu.title}: {profile} at {start} ({slice_memory(gpu, profile)})",
             f"{gpu.uuid}:{profile}:{start}")
            for gpu in hardware.gpus
            if (wish := state.layout_of(gpu.uuid))
            for profile, start in wish.slices
            if not any(is_on(model, gpu, (profile, start)) for model in state.models)
        ]
    }  # fmt: skip


# =============================================================================
# §22 Library views — pure: weights, fit and images as the operator sees them
# =============================================================================

IMAGE_HEADERS: Final = ("Part", "Image", "On this server", "Size", "Digest", "Used by")


def image_rows(
    state: State, recipes: Recipes, images: Sequence[ObservedImage] | None
) -> list[list[str]]:
    """Every pinned image by its role, then those of every recipe; None: Docker does not answer."""
    rows = [
        _image_row(role, image, "not pulled", images)
        for role, image in asdict(state.images).items()
    ]
    for name in sorted({*recipes, *(pin.recipe for pin in state.recipe_images)}):
        recipe = recipes.get(name)
        if isinstance(recipe, Recipe):
            rows += [_recipe_row(recipe, device, state, images) for device in recipe.base]
        else:
            rows += _rows_without_recipe(name, state, images)
    return rows


def _rows_without_recipe(
    name: str, state: State, images: Sequence[ObservedImage] | None
) -> list[list[str]]:
    """What still serves a recipe whose file is gone or broken."""
    said = f"cannot be built: `image build {name}` says why"
    pins = [pin for pin in state.recipe_images if pin.recipe == name]
    rows = [
        _image_row(f"recipe {name} ({p.device.upper()})", p.image, "not built", images)
        for p in pins
    ]
    for row in rows:
        row[2] += f"; {said}"
    return rows or [[f"recipe {name}", "", said, "", "", ""]]


def _image_row(
    part: str, image: str, absent: str, images: Sequence[ObservedImage] | None
) -> list[str]:
    seen = next((seen for seen in images or () if image in seen.names), None)
    if seen is None:
        return [part, image, "unknown" if images is None else absent, "", "", ""]
    digest = next((d.partition("@")[2][:19] for d in seen.digests), "")
    return [part, image, "here", format_size(seen.size_bytes), digest, ", ".join(seen.used_by)]


def _recipe_row(
    recipe: Recipe, device: Device, state: State, images: Sequence[ObservedImage] | None
) -> list[str]:
    today = recipe_image(recipe, recipe_base(recipe, device, state.images))
    pinned = state.recipe_image(recipe.name, device) or today
    part = f"recipe {recipe.name} ({device.upper()})"
    row = _image_row(part, pinned, "not built", images)
    row[2] += "; the recipe has changed since: build it" * (pinned != today)
    return row


UNUSED_HEADERS: Final = ("Image", "Recipe", "Made", "Frees about")


def unused_rows(
    unused: Sequence[ObservedImage], images: Sequence[ObservedImage]
) -> list[list[str]]:
    """What pruning would remove of `images`."""
    return [
        [
            ", ".join(image.tags) or f"a broken-off build ({image.image_id[:19]})",
            image.labels.get(LABEL_IMAGE_RECIPE, ""),
            f"{image.created_at:%Y-%m-%d %H:%M}",
            format_size(own_bytes(image, images)),
        ]
        for image in unused
    ]


def format_count(count: float | None) -> str:
    """Three digits at most: 950, 12.3 K, 8.03 B; in words where nobody knows."""
    if count is None:
        return UNKNOWN
    units = ["", " K", " M", " B"]
    while count >= 999.5 and len(units) > 1:  # noqa: PLR2004
        count /= 1000
        del units[0]
    return f"{round(count) if count >= 100 else f'{count:.3g}'}{units[0]}"  # noqa: PLR2004


def _size_if_known(size: float | None) -> str:
    return UNKNOWN if size is None else format_size(size)


HIT_HEADERS: Final = ("Repository", "Type", "Downloads", "Likes", "Weights", "Updated", "Access")


def hit_rows(hits: Sequence[RepositoryHit]) -> list[list[str]]:
    """Search results, in the order of the hub."""
    return [
        [
            hit.repository,
            PIPELINES.get(hit.pipeline_tag or "") or hit.pipeline_tag or UNKNOWN,
            format_count(hit.downloads),
            format_count(hit.likes),
            _size_if_known(hit.weights_bytes),
            format_day(hit.updated_at) or UNKNOWN,
            UNKNOWN if hit.gated is None else "gated" if hit.gated else "open",
        ]
        for hit in hits
    ]


def facts_rows(facts: RepositoryFacts) -> list[list[str]]:
    """A repository before its download: what it is, what it costs, what stands in the way."""
    parameters = sum(facts.parameters.values())
    dtypes = ", ".join(f"{format_count(n)} {dtype}" for dtype, n in facts.parameters.items())
    rows = [
        ["Commit", facts.commit or "a local directory"],
        ["Type", guess_type(facts) or "unknown: choose it"],
        ["Architecture", ", ".join(facts.architectures) or UNKNOWN],
        ["Parameters", f"{format_count(parameters)} ({dtypes})" if parameters else UNKNOWN],
        ["Quantisation", facts.quantisation or "none"],
        ["Longest context", f"{facts.context:,} tokens" if facts.context else UNKNOWN],
        ["Weights", format_size(facts.weights_bytes)],
        ["Download", f"{format_size(facts.download_bytes)}: {len(facts.needed)} of its files"],
        ["Licence", facts.licence or UNKNOWN],
        ["Updated", format_day(facts.updated_at) or UNKNOWN],
        ["Access", _access_text(facts)],
    ]  # fmt: skip
    if facts.runs_own_code:
        rows.append(["Own code", "it needs --trust-remote-code: read its code first"])
    return rows


def _access_text(facts: RepositoryFacts) -> str:
    if facts.gated:
        how = "by hand" if facts.gated == "manual" else "at once"
        access = f"gated: accept its terms on its page; access is given {how}"
    else:
        access = {None: UNKNOWN, True: "private", False: "open"}[facts.private]
    return access if facts.readable else f"{access}; this server's token does not open it"


CACHE_HEADERS: Final = ("Repository", "Revision", "Size", "State", "Used by", "Last read")


def cache_rows(cache: WeightsCache, state: State) -> list[list[str]]:
    """A row per stored revision, and one per repository with leftovers."""
    rows = [
        [
            known.repository,
            ", ".join([*known.refs, known.commit[:8]]),
            format_size(known.size_bytes),
            _stored_text(cache, known),
            ", ".join(cache.users(state, known)) or "no model",
            format_day(known.used_at) or UNKNOWN,
        ]
        for known in cache.revisions
    ]
    leftovers: Counter[str] = Counter()
    for leftover in cache.leftovers:
        leftovers[leftover.repository] += leftover.size_bytes
    return rows + [
        [repository, "leftovers", format_size(size), "of broken-off downloads", "no model", UNKNOWN]
        for repository, size in leftovers.items()
    ]


def _stored_text(cache: WeightsCache, known: CachedRevision) -> str:
    if known.repository in cache.downloading:
        return "downloading"
    if not known.missing:
        return "whole"
    more = f" and {len(known.missing) - 1} more" if len(known.missing) > 1 else ""
    return f"lacks {known.missing[0]}{more}"


def cache_summary(cache: WeightsCache) -> str:
    count = len({known.repository for known in cache.revisions})
    free = f"; {format_size(cache.free_bytes)} free" if cache.free_bytes is not None else ""
    return f"{count} repositor{'y' if count == 1 else 'ies'}, {format_size(cache.size_bytes)}{free}"


def removal_text(removal: Removal) -> str:
    """What goes, what that frees, and what would miss it."""
    what = [f"revision {commit[:8]}" for commit in removal.commits]
    what += [f"{len(removal.leftovers)} leftovers"] if removal.leftovers else []
    text = f"{removal.repository}: {', '.join(what)}; frees {format_size(removal.freed_bytes)}"
    if removal.shared_bytes:
        text += f" ({format_size(removal.shared_bytes)} stay for its other revisions)"
    return text + (f"; used by {', '.join(removal.used_by)}" if removal.used_by else "")


def format_progress(progress: DownloadProgress) -> str:
    """One line: how far, how fast, how long still."""
    if not progress.files:
        return f"{progress.repository}: {progress.note or 'looking at its files'}"
    done, total = progress.bytes_done, progress.bytes_total
    parts = [f"{format_size(done)} of {format_size(total)} ({done / total if total else 1:.0%})"]
    if progress.bytes_per_second is not None and done < total:
        parts.append(f"{format_size(progress.bytes_per_second)}/s")
    if progress.seconds_left is not None and done < total:
        parts.append(f"{format_duration(progress.seconds_left)} left")
    parts.append(f"{progress.files_done} of {len(progress.files)} files")
    parts += [f"attempt {progress.attempt}"] if progress.attempt > 1 else []
    text = f"{progress.repository}: {', '.join(parts)}"
    return f"{text}. {progress.note}" if progress.note else text


PLACE_HEADERS: Final = (
    "Place", "Verdict", "Needed", "Budget", "Longest request", "Requests at a time", "State",
)  # fmt: skip
_MEANINGS: Final[Mapping[Verdict, str]] = {
    "roomy": "roomy: a smaller place may do",
    "fits": "fits",
    "tight": "tight: an estimate's error could decide",
    "too small": "too small",
}


def fit_lines(fit: Fit) -> list[str]:
    """The sum as an operator reads it in a terminal."""
    rows = [
        *((str(part.name), _mib_text(part.mib), _part_note(fit, part)) for part in fit.parts),
        ("together", _mib_text(fit.needed_mib), _budget_note(fit)),
    ]
    size = max(len(amount) for _, amount, _ in rows)
    lines = [f"{name:<9} {amount:>{size}}  {note}".rstrip() for name, amount, note in rows]
    lines.insert(len(fit.parts), " " * 10 + "-" * size)
    return [f"{fit.place.title}: {verdict_text(fit)}", *lines, *_reach_lines(fit), *_said(fit)]


def verdict_text(fit: Fit) -> str:
    if fit.obstacles:
        return "vLLM would refuse it"
    return _MEANINGS[fit.verdict] if fit.verdict else "its memory is not known"


def _said(fit: Fit) -> list[str]:
    return [f"{text[:1].upper()}{text[1:]}." for text in (*fit.obstacles, *fit.notes)]


def _mib_text(mib: float | None) -> str:
    return UNKNOWN if mib is None else format_size(mib * MIB)


def _part_note(fit: Fit, part: FitPart) -> str:
    """Where a figure comes from; for the KV cache what it is enough for."""
    if part.name != "KV cache" or part.origin == "set" or fit.context is None:
        return part.origin
    several = "1 request" if fit.requests == 1 else f"{fit.requests} requests"
    return f"{part.origin}, for {several} of {fit.context:,} tokens"


def _budget_note(fit: Fit) -> str:
    share = _share_note(fit)
    return f"of {_mib_text(fit.budget_mib)}, which is {share}" if share else ""


def _share_note(fit: Fit) -> str:
    """How much of the place's memory the engine may take."""
    if fit.budget_mib is None or fit.place.memory_mib is None:
        return ""
    each = " on each GPU" if fit.place.tensor_parallel > 1 else ""
    return f"{fit.budget_mib / fit.place.memory_mib:.0%} of its memory{each}"


def _reach_lines(fit: Fit) -> list[str]:
    """How far the room for the KV cache reaches."""
    lines = []
    if fit.largest_context == 0:
        lines.append("Not even one token fits beside its weights.")
    elif fit.largest_context is not None:
        option = f" (--max-model-len {fit.largest_context})" if fit.verdict == "too small" else ""
        lines.append(f"Longest request that fits: {fit.largest_context:,} tokens{option}.")
    if fit.concurrency is not None and fit.context is not None and fit.starts:
        lines.append(
            f"Room for {fit.concurrency:.1f} requests of {fit.context:,} tokens at a time."
        )
    return lines


def free_gpus(candidates: Sequence[Candidate]) -> list[str]:
    """The whole GPUs to propose for a model: the best place that nobody has."""
    for candidate in candidates:
        place = candidate.fit.place.placement
        if isinstance(place, GpuPlacement) and not candidate.taken_by:
            return [*place.gpu_uuids]
    return []


def fit_html(fit: Fit) -> str:
    """The sum as a bar, as long as the place's memory or as what is needed; texts are escaped."""
    whole = max(fit.needed_mib, fit.place.memory_mib or 0, 1.0)
    parts = [(part.name, part.mib or 0, _part_note(fit, part)) for part in fit.parts]
    free = max(whole - fit.needed_mib, 0.0)
    bars = "".join(
        f'<div class="{_css_name(name)}" style="width:{mib / whole:.2%}"></div>'
        for name, mib, _ in (*parts, ("free", free, ""))
    )
    mark = "" if fit.budget_mib is None else (
        f'<i class="fit-budget" style="left:{min(fit.budget_mib / whole, 1):.2%}"></i>'
    )  # fmt: skip
    legend = "".join(
        f'<li class="{_css_name(name)}"><b>{name}</b> {html.escape(_mib_text(mib))} '
        f"<span>{html.escape(note)}</span></li>"
        for name, mib, note in (
            *parts, ("free", free, ""), ("budget", fit.budget_mib, _share_note(fit)),
        )
    )  # fmt: skip
    said = html.escape(" ".join([*_reach_lines(fit), *_said(fit)]))
    title, verdict = html.escape(fit.place.title), html.escape(verdict_text(fit), quote=True)
    return (
        f'<div class="fit-card"><div class="fit-head"><b>{title}</b><span>{verdict}</span></div>'
        f'<div class="fit-bar" role="img" aria-label="{verdict}">'
        f'{bars}{mark}</div><ul class="fit-legend">{legend}</ul><div>{said}</div></div>'
    )


def _css_name(part: str) -> str:
    return f"fit-{part.lower().replace(' ', '-')}"


# Four tones that differ in lightness too, so that they are told apart in grey, light and dark.
FIT_STYLE: Final = """
.fit-card { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 10px 14px;
  margin-bottom: 10px; background: var(--background-fill-primary); color: var(--body-text-color); }
.fit-head { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 4px 24px;
  margin-bottom: 8px; }
.fit-bar { position: relative; display: flex; height: 28px; border-radius: 4px; overflow: hidden; }
.fit-bar .fit-budget { position: absolute; top: 0; bottom: 0; width: 0; margin-left: -2px;
  border-left: 3px dashed var(--body-text-color); }
.fit-legend { display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 8px 0; padding: 0;
  list-style: none; }
.fit-legend li { background: none; border-left: 12px solid; padding-left: 6px; margin: 0; }
.fit-legend span { color: var(--body-text-color-subdued); }
.fit-bar .fit-weights { background: #1e40af; } .fit-legend .fit-weights { border-color: #1e40af; }
.fit-bar .fit-kv-cache { background: #0d9488; } .fit-legend .fit-kv-cache { border-color: #0d9488; }
.fit-bar .fit-overhead { background: #d97706; } .fit-legend .fit-overhead { border-color: #d97706; }
.fit-bar .fit-free { background: var(--border-color-primary); }
.fit-legend .fit-free { border-color: var(--border-color-primary); }
.fit-legend .fit-budget { border-left: 3px dashed var(--body-text-color); }
"""


def place_rows(candidates: Sequence[Candidate]) -> list[list[str]]:
    """Where a model would fit, the best first."""
    return [
        [
            fit.place.title,
            fit.verdict or UNKNOWN,
            _mib_text(fit.needed_mib),
            _mib_text(fit.budget_mib),
            UNKNOWN if fit.largest_context is None else f"{fit.largest_context:,}",
            UNKNOWN if fit.concurrency is None else f"{fit.concurrency:.1f}",
            _place_state(candidate),
        ]
        for candidate in candidates
        for fit in (candidate.fit,)
    ]


def _place_state(candidate: Candidate) -> str:
    taken = f"taken by {', '.join(candidate.taken_by)}" if candidate.taken_by else "free"
    return f"{taken}, to be cut" if candidate.to_cut else taken


def facts_line(facts: RepositoryFacts) -> str:
    """A repository in one line, under the form that registers it."""
    parameters = sum(facts.parameters.values())
    parts = [
        guess_type(facts) or "of unknown type",
        f"{format_count(parameters)} parameters" if parameters else "",
        f"{facts.context:,} tokens" if facts.context else "",
        format_size(facts.weights_bytes),
        facts.licence or "",
        _access_text(facts) if facts.gated or not facts.readable else "",
        "needs --trust-remote-code" if facts.runs_own_code else "",
    ]
    return f"**{plain(facts.repository)}**: {plain(' · '.join(filter(None, parts)))}"


def suggest_name(source: str) -> str:
    """A model's name from its repository or directory: `Qwen/Qwen3-8B` gives `qwen3-8b`."""
    last = PurePosixPath(source.strip()).name.lower()
    return re.sub(r"[^a-z0-9]+", "-", last).strip("-")[:32].rstrip("-")


ANY_TYPE: Final = "any type"


def tasks_html(snapshot: Snapshot) -> str:
    """Every download and build that is under way, with a bar where it knows how far it is."""
    return "".join(_task_html(job, snapshot) for job in running_tasks(snapshot))


def running_tasks(snapshot: Snapshot) -> list[JobView]:
    return [job for job in snapshot.jobs if job.kind == "task" and job.finished_at is None]


def _task_html(job: JobView, snapshot: Snapshot) -> str:
    elapsed = format_age(snapshot.taken_at - job.started_at)
    far = html.escape(job.progress or (job.lines[-1].strip() if job.lines else ""))
    part = job.done_part or 0.0
    return (
        f'<div class="fit-card"><div class="fit-head"><b>{html.escape(job.title)}</b>'
        f"<span>{elapsed}</span></div>"
        f'<div class="task-bar" role="progressbar" aria-valuenow="{part:.0%}">'
        f'<div style="width:{part:.1%}"></div></div><div>{far}</div></div>'
    )


def task_choices(snapshot: Snapshot) -> Json:
    running = running_tasks(snapshot)
    choices = [(job.title, job.id) for job in running]
    return {"choices": choices, "visible": bool(running)} | (
        {"value": choices[0][1]} if len(choices) == 1 else {}
    )


def task_cancel(snapshot: Snapshot) -> Json:
    return {"visible": bool(running_tasks(snapshot))}


# =============================================================================
# §23 Route views — pure: the ways in as the operator sees them
# =============================================================================

PROBE_HEADERS: Final = ("Verdict", "Way", "Request", "Key", "Should", "Answered", "By")
PRIVACY_HEADERS: Final = ("Place", "Read", "Can find", "Found")


def probe_headline(result: ProbeResult | None) -> str:
    """One sentence with the date: all as it should be, or how much is not and what first."""
    if result is None:
        return "The routes have never been tried from outside."
    when, count = f"{result.taken_at:%Y-%m-%d %H:%M} UTC", len(result.requests)
    if result.green:
        untried = (
            f" Patterns cannot be tried: {', '.join(result.untried)}." if result.untried else ""
        )
        return f"Green, {when}: all {count} requests were answered as they should be.{untried}"
    first = result.wrong[0] if result.wrong else None
    worst = f", such as {first.method} {first.path} with {first.key}" if first else ""
    return f"RED, {when}: {len(result.wrong)} of {count} requests were answered wrongly{worst}."


def probe_rows(result: ProbeResult) -> list[list[str]]:
    """What answered what, against what should; what is wrong first."""
    return [
        [
            "ok" if request.right else "WRONG",
            request.way,
            f"{request.method} {request.path}",
            request.key,
            " or ".join(map(str, request.expected)),
            str(request.answered or UNKNOWN),
            request.answered_by,
        ]
        for request in sorted(result.requests, key=lambda request: request.right)
    ]


def privacy_headline(proof: PrivacyProof | None) -> str:
    """One sentence with the date: found nowhere, or where and what first."""
    if proof is None:
        return "Privacy has never been proven here."
    when = f"{proof.taken_at:%Y-%m-%d %H:%M} UTC"
    read = format_size(sum(place.size_bytes for place in proof.places))
    if proof.green:
        kept = sorted({finding.kept for finding in proof.findings})
        return (
            f"Green, {when}: of {len(proof.sent)} marked requests nothing was found in "
            f"{len(proof.places)} places ({read})"
            + (f", apart from {' and '.join(kept)}." if kept else ".")
        )
    if proof.leaks:
        first = proof.leaks[0]
        count = len({(leak.place, leak.what) for leak in proof.leaks})
        return f"RED, {when}: {count} leaks, such as {first.what} in {first.place}."
    return f"RED, {when}: nothing is proven of {', '.join(proof.unproven) or 'anything'}."


def privacy_rows(proof: PrivacyProof) -> list[list[str]]:
    """Every place with what was found there; files of the home only where something was."""
    rows = [
        [
            place.place,
            format_size(place.size_bytes),
            place.fault or {True: "yes", False: "NO", None: "stopped"}[place.control],
            found_text([f for f in proof.findings if f.place == place.place]),
        ]
        for place in proof.places
    ]
    known = {place.place for place in proof.places}
    return rows + [
        [f.place, "", "", found_text([f])] for f in proof.findings if f.place not in known
    ]


def found_text(findings: Sequence[Finding]) -> str:
    """Leaks by what they are; what may be there by how much of it, and why."""
    kept = Counter(finding.kept for finding in findings if finding.kept)
    texts = [finding.what for finding in findings if not finding.kept]
    return "; ".join([*texts, *(f"{n} times {why}" for why, n in kept.items())]) or "nothing"


def privacy_text(proof: PrivacyProof) -> str:
    """What else belongs to the proof: every finding's excerpt, and what it did not look at."""
    lines = [f"{f.what} in {f.place}: {f.excerpt}" for f in proof.leaks]
    lines += [f"Not sent as needed: {s.what} ({s.answered})" for s in proof.sent if not s.arrived]
    return "\n".join([*lines, *(f"Not searched: {text}." for text in proof.left_out)])


PROVIDER_HEADERS: Final = ("Provider", "Kind", "Address", "Key", "Health", "Models")


def provider_rows(
    providers: Sequence[Provider], found: Sequence[ProviderHealth]
) -> list[list[str]]:
    """One row for each that was looked at; a key only as whether there is one."""
    known = {provider.name: provider for provider in providers}
    return [
        [
            provider.name,
            provider.kind,
            provider.base_url or f"LiteLLM's {vendor_of(provider, '')}",
            "set" if provider.api_key else "",
            health_text(health),
            models_text(health),
        ]
        for health in found
        if (provider := known.get(health.provider))
    ]


def health_text(health: ProviderHealth) -> str:
    if health.latency_ms is not None:
        return f"answers in {health.latency_ms:.0f} ms"
    return f"{health.fault} {health.advice}"


def models_text(health: ProviderHealth) -> str:
    left_out = f", and {health.unusable} that no route can name" if health.unusable else ""
    return f"{len(health.models)}{left_out}" if health.verdict == "answers" else ""


POOL_HEADERS: Final = (
    "Public name", "Members", "Strategy", "Aliases", "Fallbacks", "For long prompts", "Served by",
)  # fmt: skip


def public_routes(state: State) -> list[Route]:
    """The route of every public name, by name; a model's own among them."""
    own = {m.served_model_name: Route(name=m.served_model_name, members=(m.name,))
           for m in state.models}  # fmt: skip
    routes = own | {route.name: route for route in state.routes}
    return [route for _, route in sorted(routes.items())]


def pool_facts(state: State, served: Sequence[ServedModel] | None) -> list[Json]:
    """Every public name, and who serves it now; None: nobody knows."""
    now = {pool.route.name: pool for pool in pools(state, served or ())}
    return [
        asdict(route)
        | {
            "served_by": [*dict.fromkeys(d.target for d in pool.deployments)] if pool else [],
            "stand_in": pool.stand_in if pool else "",
        }
        | ({"served_by": None, "stand_in": None} if served is None else {})
        for route in public_routes(state)
        for pool in (now.get(route.name),)
    ]


def pool_rows(state: State, served: Sequence[ServedModel] | None) -> list[list[str]]:
    return [
        [
            route.name,
            _members_text(route),
            route.strategy,
            ", ".join(route.aliases),
            ", ".join(route.fallbacks),
            ", ".join(route.context_fallbacks),
            _served_text(facts),
        ]
        for route, facts in zip(public_routes(state), pool_facts(state, served), strict=True)
    ]


def _members_text(route: Route) -> str:
    if not route.weights:
        return ", ".join(route.members)
    pairs = zip(route.members, route.weights, strict=True)
    return ", ".join(f"{target} ({weight})" for target, weight in pairs)


def _served_text(facts: Json) -> str:
    if facts["served_by"] is None:
        return "unknown: Docker does not answer"
    if facts["stand_in"]:
        return f"{facts['stand_in']} stands in"
    return ", ".join(facts["served_by"]) or "nobody"


LegState = CircuitState | Literal["stopped", "untried"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Leg:
    """Who answers for a public name, and how it is with it."""

    title: str
    state: LegState
    since: datetime | None = None
    reason: str = ""
    load: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lane:
    """One public name of a way in, how its requests are spread, and the legs that they end in."""

    name: str
    notes: tuple[str, ...] = ()
    legs: tuple[Leg, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class WayIn:
    """One way in: who comes, at which address, what stands there, and its names."""

    clients: str
    address: str
    verdict: str
    is_open: bool
    lanes: tuple[Lane, ...]


def ways_in(snapshot: Snapshot) -> tuple[WayIn, ...]:
    """Every way in as it is now; nothing where the state cannot be read."""
    state, observed = snapshot.state, snapshot.observed or Observed()
    if state is None:
        return ()
    edge = observed.containers.get(edge_name(state))
    who = "Caddy" if snapshot.observed else "Docker"
    closed = "" if edge and edge.ready else f"{who} does not answer"
    root = base_url(state.edge).removesuffix("/v1")
    keys = ", ".join(key.name for key in state.direct_keys)
    opened = [model for model in state.models if model.open_route]
    switch = "" if state.edge.open_routes else "closed by the kill switch"
    gateway = _gateway_fault(state, observed)
    return (
        WayIn(
            clients="whoever has a virtual key",
            address=f"{root}/v1",
            verdict=closed or gateway or f"LiteLLM answers, in slot {_slot(observed)}",
            is_open=not closed and not gateway,
            lanes=_gateway_lanes(state, snapshot),
        ),
        WayIn(
            clients=f"whoever has a direct key: {keys}"
            if keys
            else "nobody: no direct key is made",
            address=f"{root}/models/{{name}}/v1",
            verdict=closed or "straight to the engine with the fewest requests",
            is_open=not closed and bool(keys),
            lanes=_engine_lanes(state.models, state, snapshot),
        ),
        WayIn(
            clients="anybody, with any key",
            address=f"{root}/open/{{name}}/v1",
            verdict=closed or switch or "open" if opened else "no model is open",
            is_open=not closed and not switch and bool(opened),
            lanes=_engine_lanes(opened, state, snapshot),
        ),
    )


def _slot(observed: Observed) -> str:
    return observed.edge.slot if observed.edge else "?"


def _gateway_fault(state: State, observed: Observed) -> str:
    seen = [observed.containers.get(gateway_name(state, slot)) for slot in SLOTS]
    return "" if any(c and c.ready for c in seen) else "LiteLLM does not answer"


def _engine_lanes(models: Sequence[Model], state: State, snapshot: Snapshot) -> tuple[Lane, ...]:
    return tuple(
        Lane(
            name=model.name,
            legs=tuple(_engine_leg(model, name, snapshot) for name in replica_names(state, model)),
        )
        for model in models
    )


def _gateway_lanes(state: State, snapshot: Snapshot) -> tuple[Lane, ...]:
    """The names as they are routed; who is stopped is shown, although LiteLLM does not know him."""
    now = {p.route.name: p for p in pools(state, served_models(state, state.wished_models))}
    return tuple(
        _gateway_lane(pool, now.get(pool.route.name, pool), snapshot)
        for pool in pools(state, served_models(state, state.models))
    )


def _gateway_lane(pool: Pool, now: Pool, snapshot: Snapshot) -> Lane:
    """A route none of whose members is wished has the legs of whoever stands in for it."""
    legs = (now if now.stand_in else pool).deployments
    stand_in = (f"none of its members is wished: {now.stand_in} stands in",) if now.stand_in else ()
    return Lane(
        name=pool.route.name,
        notes=(*stand_in, *_route_notes(pool, snapshot.health.figures)),
        legs=tuple(_leg(deployment, snapshot) for deployment in legs),
    )


def _route_notes(pool: Pool, figures: GatewayFigures) -> Iterator[str]:
    route = pool.route
    if route.aliases:
        yield f"also {', '.join(route.aliases)}"
    if len(pool.deployments) > 1:
        weights = f" {':'.join(map(str, route.weights))}" if route.weights else ""
        yield f"{STRATEGY_WORDS[route.strategy]}{weights}"
    for said, names in (("then", route.fallbacks), ("if too long", route.context_fallbacks)):
        if names:
            yield f"{said}: {', '.join(names)}"
    asked = {route.name, *route.aliases}
    if taken := sum(n for (name, _), n in figures.fallbacks.items() if name in asked):
        yield f"fell back {taken:,} time{'s' * (taken > 1)}"
    yield from _limit_notes(pool, figures)


def _limit_notes(pool: Pool, figures: GatewayFigures) -> Iterator[str]:
    route, usual = pool.route, Route(name=pool.route.name, members=pool.route.members)
    if route.parallel:
        yield f"{route.parallel} at a time each"
    if route.cache_seconds:
        yield _cache_note(pool, figures)
    if route.timeout_seconds != usual.timeout_seconds:
        yield f"timeout {format_duration(route.timeout_seconds)}"


STRATEGY_WORDS: Final[Mapping[Strategy, str]] = {
    "least-busy": "least busy", "latency": "fastest", "usage": "least used", "shuffle": "shuffled",
    "weighted": "weighted", "in-order": "in order",
}  # fmt: skip


def _cache_note(pool: Pool, figures: GatewayFigures) -> str:
    known = [f for d in pool.deployments if (f := figures.deployments.get(d.deployment_id))]
    hits, answers = sum(f.cache_hits for f in known), sum(f.successes for f in known)
    rate = f", {hits / answers:.0%} of {answers:,} answers from it" if answers else ""
    return f"cache {format_duration(pool.route.cache_seconds or 0)}{rate}"


def _leg(deployment: Deployment, snapshot: Snapshot) -> Leg:
    """A member of a pool: an engine's container first, then what LiteLLM thinks of it."""
    state, key = snapshot.state, deployment.deployment_id
    model = next((m for m in state.models if m.name == deployment.target), None) if state else None
    circuit = snapshot.health.circuits.get(key)
    figures = snapshot.health.figures.deployments.get(key, DeploymentFigures())
    happened = {"answer": figures.successes, "failure": sum(figures.failures.values())}
    counted = [f"{n:,} {what}{'s' * (n > 1)}" for what, n in happened.items() if n]
    leg = Leg(title=deployment.target, state="untried")
    if model is not None:
        leg = _engine_leg(model, ContainerName(key.partition("@")[2]), snapshot)
    if circuit is not None and leg.state in {"active", "untried"}:
        leg = _as_circuit(leg, circuit, snapshot.taken_at)
    return replace(leg, load=" · ".join(filter(None, (leg.load, *counted))))


def _as_circuit(leg: Leg, circuit: Circuit, now: datetime) -> Leg:
    reason = circuit.reason if circuit.state != "active" else ""
    if circuit.state == "cool-down" and circuit.cooling_until:
        left = format_duration((circuit.cooling_until - now).total_seconds())
        reason = f"{reason}; left out for {left} more"
    elif circuit.state == "unavailable":
        reason = f"{reason}; the next request tries it again"
    since = circuit.since or (leg.since if circuit.state == "active" else None)
    return replace(leg, state=circuit.state, since=since, reason=reason)


def _engine_leg(model: Model, name: ContainerName, snapshot: Snapshot) -> Leg:
    """A replica by its container alone."""
    seen = snapshot.observed.containers.get(name) if snapshot.observed else None
    prefix = f"{snapshot.state.name_prefix if snapshot.state else ''}llm-model-"
    leg = Leg(title=name.removeprefix(prefix), state="unavailable")
    if snapshot.observed is None:
        return replace(leg, state="untried", reason="Docker does not answer")
    if seen is None or not seen.running:
        if model.wish == "stopped":
            return replace(leg, state="stopped")
        gone = f"its container {format_container(seen)}" if seen else "its container is not there"
        return replace(leg, reason=gone)
    load = snapshot.health.loads.get(name)
    leg = replace(
        leg, since=seen.started_at,
        load=_load_text(load) if load else "",
    )  # fmt: skip
    if model.name in snapshot.hung:
        return replace(leg, reason="it has requests and makes no token")
    return replace(leg, state="active") if seen.ready else replace(leg, reason="it is not ready")


def _load_text(load: EngineLoad) -> str:
    busy = load.running or load.waiting
    return f"{load.running} running, {load.waiting} waiting" if busy else "idle"


ROUTE_HEADERS: Final = (
    "Way in", "Public name", "Spread", "Answered by", "State", "Since", "Load", "Why",
)  # fmt: skip


def route_rows(snapshot: Snapshot) -> list[list[str]]:
    """One row per leg of every way in."""
    return [
        [
            way.address.rpartition("//")[2].partition("/")[2], lane.name, "; ".join(lane.notes),
            leg.title, leg.state, _since_text(leg, snapshot), leg.load, leg.reason,
        ]
        for way in ways_in(snapshot)
        for lane in way.lanes
        for leg in lane.legs
    ]  # fmt: skip


def _since_text(leg: Leg, snapshot: Snapshot) -> str:
    return format_age(snapshot.taken_at - leg.since) if leg.since else ""


HOP_HEADERS: Final = ("Hop", "Time", "What")


def hop_rows(trial: Trial) -> list[list[str]]:
    """Where the time of a trial went: what is neither Caddy's nor the engine's is LiteLLM's."""
    reply, headers = trial.reply, trial.reply.headers
    total, edge = reply.seconds * 1000, min(trial.edge_seconds, reply.seconds) * 1000
    rows = [["Caddy", _ms(edge), "what an answer of its own takes, on an open connection"]]
    member = re.sub(r"^[^@]*@(([a-z0-9]+-)?llm-model-)?", "", headers.get("x-litellm-model-id", ""))
    if "x-litellm-response-duration-ms" in headers:
        whole, own = (_figure(headers, f"x-litellm-{what}-duration-ms")
                      for what in ("response", "overhead"))  # fmt: skip
        answered = max(whole - own, 0.0)
        cached = "x-litellm-cache-key" in headers
        rows.append(["LiteLLM", _ms(total - edge - answered), _tries(headers)])
        rows.append([member or "member", _ms(answered), "not asked: LiteLLM's cache" * cached])
    elif reply.call_id:
        rows.append(["LiteLLM", _ms(total - edge), "and whomever it asked: nobody answered"])
    elif reply.is_success or not reply.by_edge:
        rows.append(["engine", _ms(total - edge), ""])
    return [*rows, ["all of it", _ms(total), reply_text(reply)]]


def _ms(milliseconds: float) -> str:
    return f"{max(milliseconds, 0.0):.1f} ms"


def _figure(headers: Mapping[str, str], name: str) -> float:
    found = re.fullmatch(r"\d+(\.\d+)?", headers.get(name, ""))
    return float(found[0]) if found else 0.0


def _tries(headers: Mapping[str, str]) -> str:
    """Whom it asked in vain before; their time is the member's."""
    found = [
        f"{count} {what}"
        for what in ("retries", "fallbacks")
        if (count := headers.get(f"x-litellm-attempted-{what}", "0")) != "0"
    ]
    return f"after {' and '.join(found)}" if found else ""


def reply_text(reply: EdgeReply) -> str:
    """How an answer went, in words."""
    if reply.status is None:
        return reply.fault
    whose = " by Caddy" if reply.by_edge and not reply.is_success else ""
    return f"{reply.status} {HTTPStatus(reply.status).phrase}{whose}"


GLYPHS: Final[Mapping[LegState, str]] = {
    "active": "●", "degraded": "◐", "unavailable": "✕", "cool-down": "◔", "stopped": "○",
    "untried": "◌",
}  # fmt: skip


def ways_html(snapshot: Snapshot) -> str:
    """The picture of the ways in; every text in it is escaped."""
    ways = "".join(_way_html(way, snapshot) for way in ways_in(snapshot))
    heads = "".join(f"<span>{head}</span>" for head in ("Client", "Way in", "Name", "Answered by"))
    return f'<div class="ways"><div class="way-heads">{heads}</div>{ways}</div>' if ways else ""


def _way_html(way: WayIn, snapshot: Snapshot) -> str:
    look: LegState = "active" if way.is_open else "stopped"
    crowded = len(way.lanes) > CROWDED
    drawn = (replace(lane, legs=_merged(lane.legs)) if crowded else lane for lane in way.lanes)
    lanes = "".join(_lane_html(lane, snapshot) for lane in drawn)
    return (
        f'<section class="way" aria-label="{html.escape(way.address, quote=True)}">'
        f"<div>{html.escape(way.clients)}</div>"
        f"<div><code>{html.escape(way.address).replace('/', '/<wbr>')}</code>"
        f'<span class="{look}">{GLYPHS[look]} {html.escape(way.verdict)}</span></div>'
        f'<div class="lanes">{lanes or "no names yet"}</div></section>'
    )


CROWDED: Final = 12  # names


def _merged(legs: Sequence[Leg]) -> tuple[Leg, ...]:
    """Legs that need no words side by side; an engine's load is on the direct way, too."""
    quiet: dict[LegState, list[str]] = {}
    for leg in legs:
        if not leg.reason:
            quiet.setdefault(leg.state, []).append(leg.title)
    together = (Leg(title=", ".join(titles), state=state) for state, titles in quiet.items())
    return (*together, *(leg for leg in legs if leg.reason))


def _lane_html(lane: Lane, snapshot: Snapshot) -> str:
    notes = f"<small>{html.escape(' · '.join(lane.notes))}</small>" if lane.notes else ""
    legs = "".join(_leg_html(leg, snapshot) for leg in lane.legs)
    name = html.escape(lane.name)
    return f'<div class="lane"><div><b>{name}</b>{notes}</div><ul>{legs}</ul></div>'


def _leg_html(leg: Leg, snapshot: Snapshot) -> str:
    since = _since_text(leg, snapshot)
    facts = " · ".join(filter(None, (leg.load, f"for {since}" if since else "")))
    why = f"<em>{html.escape(leg.reason)}</em>" if leg.reason else ""
    return (
        f'<li><span class="word {leg.state}">{GLYPHS[leg.state]} {leg.state}</span>'
        f"<b>{html.escape(leg.title)}</b><span>{html.escape(facts)}</span>{why}</li>"
    )


ROUTE_LIMITS: Final = (
    ("timeout_seconds", "Timeout (s)", ""), ("retries", "Retries", ""),
    ("failures_allowed", "Failures allowed", "of a member, within its cool-down"),
    ("cooldown_seconds", "Cool-down (s)", "0: none is left out"),
    ("parallel", "At a time", "for each replica; 0: no limit"),
    ("cache_seconds", "Keep answers (s)", "in Redis; 0: not at all"),
)  # fmt: skip


def route_settings(  # noqa: PLR0913, PLR0917 - one argument per field of the form
    name: str | None, members: Sequence[str] | None, aliases: str | None, strategy: str,
    weights: str | None, fallbacks: Sequence[str] | None, context: Sequence[str] | None,
    *limits: float | None,
) -> Json:  # fmt: skip
    """The route form's fields in the shape of a stored route; 0 or nothing is no limit."""
    kept = {key: limit for (key, *_), limit in zip(ROUTE_LIMITS, limits, strict=True)}
    given = {
        key: limit
        for key, limit in kept.items()
        if limit is not None and (limit or key not in {"parallel", "cache_seconds"})
    }
    return {
        "name": typed(name),
        "members": [*(members or ())],
        "aliases": split_names(aliases),
        "strategy": strategy,
        "weights": split_names(weights),
        "fallbacks": [*(fallbacks or ())],
        "context_fallbacks": [*(context or ())],
        **given,
    }


def split_names(text: str | None) -> list[str]:
    """What was typed with commas or spaces between."""
    return [word for word in re.split(r"[,\s]+", text or "") if word]


USUAL_LIMITS: Final = tuple(
    getattr(Route(name="usual", members=("usual",)), key) or 0 for key, *_ in ROUTE_LIMITS
)


def route_fields(route: Route) -> tuple[Any, ...]:
    """A route in the order of the form's fields, after its name."""
    return (
        list(route.members), ", ".join(route.aliases), route.strategy,
        ", ".join(map(str, route.weights)), list(route.fallbacks), list(route.context_fallbacks),
        *(getattr(route, key) or 0 for key, *_ in ROUTE_LIMITS),
    )  # fmt: skip


def provider_settings(
    name: str | None, kind: str, url: str | None, vendor: str | None, key: str | None
) -> Json:
    """The provider form's fields; without a key there is none in it, and the old one stays."""
    secret = {"api_key": typed(key)} if typed(key) else {}
    address = {"base_url": typed(url) or None, "vendor": typed(vendor) or None}
    return {"name": typed(name), "kind": kind, **address, **secret}


def known_providers(snapshot: Snapshot) -> list[list[str]]:
    """The providers before anybody looked at them."""
    providers = snapshot.state.providers if snapshot.state else ()
    return provider_rows(
        providers,
        [
            ProviderHealth(provider=p.name, verdict="unknown", fault="Not asked yet.")
            for p in providers
        ],
    )


def found_models(found: Sequence[ProviderHealth]) -> str:
    """What providers have, a line each, as routes name it."""
    return "\n".join(f"{health.provider}/{model}" for health in found for model in health.models)


def route_choices(snapshot: Snapshot) -> Json:
    """Public names that a route may stand for: those made, and models' own."""
    state = snapshot.state
    names = [route.name for route in state.routes] if state else []
    own = [model.served_model_name for model in state.models] if state else []
    return {"choices": [*dict.fromkeys([*names, *own])]}


def member_choices(snapshot: Snapshot) -> Json:
    """Models by their names, and what routes already ask of providers."""
    state = snapshot.state
    if state is None:
        return {"choices": []}
    asked = [t for r in state.routes for t in (*r.members, *r.fallbacks) if "/" in t]
    return {"choices": [*dict.fromkeys([*(m.name for m in state.models), *asked])]}


def public_choices(snapshot: Snapshot) -> Json:
    return {"choices": [*callable_names(snapshot.state)] if snapshot.state else []}


def provider_choices(snapshot: Snapshot) -> Json:
    return {"choices": [p.name for p in snapshot.state.providers] if snapshot.state else []}


def direct_choices(snapshot: Snapshot) -> Json:
    return {"choices": [key.name for key in snapshot.state.direct_keys] if snapshot.state else []}


def model_names(snapshot: Snapshot) -> Json:
    return {"choices": [model.name for model in snapshot.state.models] if snapshot.state else []}


def trial_choices(snapshot: Snapshot) -> Json:
    return {"choices": trial_targets(snapshot.state) if snapshot.state else []}


def proofs_done(snapshot: Snapshot) -> str:
    """Changes whenever a proof ends."""
    return " ".join(
        job.id for job in snapshot.jobs if job.title in {PROBING, PROVING} and job.finished_at
    )


PROBING: Final = "Try every route"
PROVING: Final = "Prove privacy"


def open_models(snapshot: Snapshot) -> Json:
    """The models as choices, and those chosen that anybody may reach."""
    state = snapshot.state
    opened = [model.name for model in state.models if model.open_route] if state else []
    return {**model_names(snapshot), "value": opened}


ROUTE_STYLE: Final = """
.ways { color: var(--body-text-color); font-size: 14px; line-height: 1.45; }
.way, .way-heads { display: grid; grid-template-columns: 125px 210px minmax(0, 1fr); gap: 0 30px;
  padding: 8px 14px; }
.way { border: 1px solid var(--border-color-primary); border-radius: 8px; margin-bottom: 10px;
  background: var(--background-fill-primary); }
.way-heads { grid-template-columns: 125px 210px minmax(0, 3fr) minmax(0, 8fr); padding-bottom: 4px;
  font-weight: 600; }
.way > div { position: relative; padding-top: 4px; }
.way > div + div::before, .lane > ul::before { content: "→"; position: absolute; left: -24px; }
.way code { display: block; background: none; border: none; padding: 0; font-size: 13px;
  overflow-wrap: anywhere; color: inherit; }
.lane { display: grid; grid-template-columns: minmax(0, 3fr) minmax(0, 8fr); gap: 0 30px;
  padding: 4px 0; border-top: 1px solid var(--border-color-primary); }
.lane:first-child { border-top: none; padding-top: 0; }
.lane b { overflow-wrap: anywhere; }
.lane small { display: block; font-size: 12px; opacity: 0.8; }
.lane ul { position: relative; list-style: none; margin: 0; padding: 0; display: grid;
  grid-template-columns: 7.5em fit-content(45%) minmax(0, 1fr); gap: 0 12px; }
.lane li { display: contents; }
.lane li span:last-of-type { font-size: 13px; opacity: 0.8; }
.lane li em { grid-column: 2 / -1; font-size: 13px; }
.ways .active { color: #15803d; } .ways .degraded, .ways .cool-down { color: #b45309; }
.ways .unavailable { color: #b91c1c; }
.dark .ways .active { color: #4ade80; } .dark .ways .unavailable { color: #f87171; }
.dark .ways .degraded { color: #fbbf24; } .dark .ways .cool-down { color: #fbbf24; }
@media (max-width: 900px) {
  .way { grid-template-columns: minmax(0, 1fr); } .way-heads { display: none; }
  .way > div + div::before { content: ""; }
  .lanes { border-top: 1px solid var(--border-color-primary); margin-top: 6px; }
  .lane ul { grid-template-columns: 7.5em minmax(0, 1fr); }
  .lane li > :not(.word) { grid-column: 2; }
}
"""


# =============================================================================
# §24 Usage views — pure: use as the operator sees it
# =============================================================================

USAGE_HEADERS: Final = (
    "Requests", "Failures", "Prompt tokens", "Of these cached", "Completion tokens",
    "Mean latency (ms)",
)  # fmt: skip
MOST_BARS: Final = 30
BAR_COLUMNS: Final = ("name", "tokens of", "tokens")  # of `usage_bars`


def usage_headers(query: UsageQuery) -> list[str]:
    """Those of `usage_rows`."""
    return [f"{query.by.capitalize()}{' (UTC)' if query.by == 'hour' else ''}", *USAGE_HEADERS]


def usage_rows(report: UsageReport) -> list[list[str | int | None]]:
    """One row per subject, and the total at the end; figures, which a table can sort."""
    return [
        [
            row.name[:-3] if report.query.by == "hour" and row.subject else row.name,
            *(row.requests, row.failures),
            *(row.prompt_tokens, row.cached_tokens, row.completion_tokens),
            None if row.latency_ms is None else round(row.latency_ms),
        ]
        for row in (*report.rows, report.total)
    ]


def format_figure(cell: str | int | None) -> str:
    """With its thousands set apart, as a reader wants it."""
    return f"{cell:,}" if isinstance(cell, int) else cell or ""


def usage_headline(report: UsageReport) -> str:
    """What was used in all, in one sentence; and how much of the list is not shown."""
    query, total = report.query, report.total
    if not total.requests:
        return f"Nothing was used from {query.first} to {query.last}."
    failed = f", {total.failures:,} of them failed" if total.failures else ""
    left_out = f" {report.left_out:,} more are in the total only." if report.left_out else ""
    return (
        f"From {query.first} to {query.last}: {total.requests:,} requests{failed}; "
        f"{total.prompt_tokens:,} tokens read, {total.completion_tokens:,} made.{left_out}"
    )


def usage_csv(report: UsageReport) -> str:
    """Every row with plain figures, for other programs; no total, which would be added up."""
    names = [f.name for f in fields(UsageRow)]
    return render_csv(
        [report.query.by, *names[2:]],
        ([row.name, *(getattr(row, name) for name in names[2:])] for row in report.rows),
    )


def usage_bars(report: UsageReport) -> list[tuple[str, str, int]]:
    """For a plot: subject, kind of token, how many; of a long list the largest."""
    kinds = {"prompt": "prompt_tokens", "completion": "completion_tokens"}
    timed = report.query.by in {"day", "hour"}
    shown = report.rows if timed else report.rows[:MOST_BARS]
    return [(row.name, kind, getattr(row, name)) for row in shown for kind, name in kinds.items()]


STANDING_HEADERS: Final = ("What", "Name", "Why it is here")


def standing_rows(standings: Sequence[Standing], now: datetime) -> list[list[str]]:
    """Who is close to a limit, and then the keys that nobody uses."""
    close = [
        [s.kind, s.name, f"{s.nearest[0]:.0%} of its {s.nearest[1]}"]
        for s in close_to_limits(standings)
    ]
    unused = [
        [s.kind, s.name, f"not used since {format_day(s.used_at)}" if s.used_at
         else f"never used since it was made on {format_day(s.created_at)}"]
        for s in unused_keys(standings, now - timedelta(days=UNUSED_DAYS))
    ]  # fmt: skip
    return close + unused


UNUSED_DAYS: Final = 30
TALLY_HEADERS: Final = (
    "Engine", "Since (UTC)", "Tokens it counted", "Accounted for", "Streams broken off",
    "Difference",
)  # fmt: skip
TALLY_TEXT: Final = (
    "Each whole answer is in both, to the token. What differs came past the gateway (direct and "
    "open routes, and the requests by which this program sees that an engine is ready), was one "
    "of several answers to one prompt, which the engine reads for each, or is of the last 15 "
    "seconds, which LiteLLM has yet to write. Of a stream that its client breaks off the engine "
    "tells nothing: LiteLLM accounts for what it passed on, by a count of its own."
)


def tally_rows(tallies: Sequence[EngineTally]) -> list[list[str]]:
    """One row per engine that counts tokens."""
    return [
        [tally.engine, f"{tally.since:%Y-%m-%d %H:%M}", f"{tally.counted:,}",
         f"{tally.accounted:,}", f"{tally.broken_off:,}, at {tally.guessed:,} tokens",
         f"{tally.difference:+,}"]
        for tally in tallies
    ]  # fmt: skip


STATEMENT_HEADERS: Final = (
    "Group", "Model", "Requests", "Prompt tokens", "Of these cached", "Completion tokens", "Cost",
)  # fmt: skip


def statement_rows(statement: Statement) -> list[list[str]]:
    """A line per group and model, and the sum of each group."""
    rows = []
    for group, lines in statement.by_group.items():
        rows += [[group, line.model, *_amounts([line], statement.currency)] for line in lines]
        rows.append([group, "in all", *_amounts(lines, statement.currency)])
    return rows


def _amounts(lines: Sequence[StatementLine], currency: str) -> list[str]:
    names = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens")
    costs = [line.cost for line in lines if line.cost is not None]
    unpriced = " and what has no price" if costs and len(costs) < len(lines) else ""
    return [
        *(f"{sum(getattr(line, name) for line in lines):,}" for name in names),
        f"{sum(costs):,.2f} {currency}{unpriced}" if costs else "",
    ]


def statement_csv(statement: Statement) -> str:
    """Every line with plain figures."""
    names = [f.name for f in fields(StatementLine)]
    headers = ["month", *names[:-1], f"cost_{statement.currency.lower()}"]
    return render_csv(
        headers,
        ([f"{statement.month:%Y-%m}", *(getattr(line, n) for n in names)]
         for line in statement.lines),
    )  # fmt: skip


def statement_page(statement: Statement) -> str:
    """A page to print: each group begins on a sheet of its own."""
    heads = "".join(f"<th>{head}</th>" for head in STATEMENT_HEADERS[1:])
    parts = []
    for group in statement.by_group:
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
            for owner, *cells in statement_rows(statement)
            if owner == group
        )
        parts.append(
            f"<section><h1>{html.escape(group)}</h1><p>Use of language models in "
            f"{statement.month:%B %Y} (UTC)</p><table><tr>{heads}</tr>{body}</table></section>"
        )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f"<title>Statements {statement.month:%Y-%m}</title><style>{STATEMENT_STYLE}</style>"
        f"<body>{''.join(parts) or 'Nothing was used.'}</body></html>\n"
    )


STATEMENT_STYLE: Final = """
body { font: 11pt system-ui, sans-serif; margin: 2cm; }
section { break-after: page; } table { border-collapse: collapse; width: 100%; }
th, td { border-bottom: 1px solid #999; padding: 4px 8px; text-align: right; }
th:first-child, td:first-child { text-align: left; } tr:last-child { font-weight: 600; }
"""


def usage_html(report: UsageReport) -> str:
    """The headline, with the file of all rows."""
    query = report.query
    name = f"usage-by-{query.by}-{query.first}-{query.last}.csv"
    return f"<p>{html.escape(usage_headline(report))}</p>{download_link(name, usage_csv(report))}"


def download_link(name: str, text: str) -> str:
    """An HTML link that is the file itself: nothing of it lies on the disk of this server."""
    content = base64.b64encode(text.encode()).decode()
    kind = "text/html" if name.endswith(".html") else "text/csv"
    return f'<a download="{name}" href="data:{kind};base64,{content}">Download {name}</a>'


# =============================================================================
# §25 Energy views — pure: energy and benchmarks as the operator sees them
# =============================================================================

ENERGY_HEADERS: Final = (
    "kWh", "Of these idle", "Of these estimated", "Unmeasured (h)", "Cost", "CO₂ (kg)", "Requests",
    "J per output token", "J per token",
)  # fmt: skip


def energy_headers(query: EnergyQuery) -> list[str]:
    """Those of `energy_rows`."""
    return [f"{'GPU' if query.by == 'gpu' else query.by.capitalize()}", *ENERGY_HEADERS]


def energy_rows(report: EnergyReport) -> list[list[str]]:
    """One row per subject, and the total at the end."""
    return [[row.name, *_energy_cells(row)] for row in (*report.rows, report.total)]


def _energy_cells(row: EnergySum) -> list[str]:
    return [
        format_kwh(row.energy_mj), format_kwh(row.idle_mj), format_kwh(row.estimated_mj),
        f"{row.unmeasured_seconds / 3600:.2f}" if row.unmeasured_seconds else "",
        format_costs(row.costs) + " and what had no price" * bool(row.costs and row.unpriced_mj),
        "" if row.co2_grams is None else f"{row.co2_grams / 1000:,.3f}",
        f"{row.requests:,}" if row.requests else "",
        format_per_token(row.joules_per_output_token), format_per_token(row.joules_per_token),
    ]  # fmt: skip


def format_kwh(energy_mj: int) -> str:
    return f"{energy_mj / KWH_MJ:,.4f}"


def format_costs(costs: Mapping[str, float]) -> str:
    return " + ".join(f"{amount:,.2f} {currency}" for currency, amount in sorted(costs.items()))


def format_per_token(joules: float | None) -> str:
    return "" if joules is None else f"{joules:,.3g}"


def energy_headline(report: EnergyReport) -> str:
    """What was taken in all, in one sentence."""
    query, total = report.query, report.total
    if not total.energy_mj and not total.unmeasured_seconds:
        return f"No energy was recorded from {query.first} to {query.last}."
    return (
        f"From {query.first} to {query.last}: {format_kwh(total.energy_mj)} kWh, of these "
        f"{format_kwh(total.idle_mj)} idle; {total.unmeasured_seconds / 3600:.2f} hours of GPUs "
        "were not measured."
    )


STACK_COLUMNS: Final = ("day", "model", "kWh")  # of `energy_stack`


def energy_stack(parts: Iterable[EnergyPart]) -> list[tuple[str, str, float]]:
    """For a plot of the parts by day: each day's energy by model, the idle part among them."""
    sums: Counter[tuple[str, str]] = Counter()
    for part in parts:
        sums[part.subject, part.model or IDLE] += part.energy_mj
    return [(*key, energy_mj / KWH_MJ) for key, energy_mj in sums.items()]


PER_TOKEN_COLUMNS: Final = (" ", "model", "J per output token")  # of `tokens_by_model`


def tokens_by_model(report: EnergyReport) -> list[tuple[str, str, float]]:
    """For a plot of a report by model: those that made tokens, the thirstiest first."""
    told = [(row.name, row.joules_per_output_token) for row in report.rows]
    known = [(name, joules) for name, joules in told if joules is not None]
    known.sort(key=lambda each: -each[1])
    return [(name, name, joules) for name, joules in known[:MOST_BARS]]


def live_energy_html(seen: Snapshot, live: LiveEnergy) -> str:
    """A line for each GPU: its watts now and lately, and the models' part of all of them."""
    if live.trouble:
        return f'<p class="watts-trouble">{html.escape(live.trouble)}</p>'
    gpus = {gpu.uuid: f"GPU {gpu.index} {gpu.name}" for gpu in seen.hardware.gpus}
    lines = [
        f"<tr><th>{html.escape(gpus.get(uuid, uuid))}</th><td>{_watts_text(watts)}</td>"
        f"<td>{watts_svg(live.past.get(uuid, ()))}</td></tr>"
        for uuid, watts in live.gpu_watts.items()
    ]
    if not lines:
        return "<p>No GPU is looked at: there is none, or the manager's service has just begun.</p>"
    takers = sorted(live.model_watts.items(), key=lambda each: (each[0] == NOBODY, -each[1]))
    shares = ", ".join(f"{html.escape(who or IDLE)} {watts:,.0f} W" for who, watts in takers)
    return f'<table class="watts">{"".join(lines)}</table><p>Now: {shares or "nothing known"}.</p>'


def _watts_text(watts: float | None) -> str:
    return "not measured" if watts is None else f"{watts:,.0f} W"


def watts_svg(past: Sequence[float | None]) -> str:
    """A line from the oldest watts to the newest, over zero; broken where nobody measured."""
    most = max((watts for watts in past if watts), default=0) or 1
    points = [
        None if watts is None else f"{at:g} {30 - 28 * watts / most:.1f}"
        for at, watts in enumerate(past)
    ]
    runs = [
        list(run) for known, run in itertools.groupby(points, lambda each: each is not None)
        if known
    ]  # fmt: skip
    path = " ".join("M" + " L".join(map(str, run)) for run in runs)
    label = f"up to {most:,.0f} W in this time"
    return (
        f'<svg viewBox="0 0 {max(len(past) - 1, 1)} 32" preserveAspectRatio="none" role="img" '
        f'aria-label="{label}"><title>{label}</title><path d="{path}"/></svg>'
    )


WATTS_STYLE: Final = """
.watts { border-collapse: collapse; width: 100%; color: var(--body-text-color); }
.watts th { text-align: left; font-weight: 600; white-space: nowrap; padding: 4px 24px 4px 0; }
.watts td { white-space: nowrap; padding: 4px 24px 4px 0; text-align: right; }
.watts td:last-child { width: 100%; padding-right: 0; }
.watts svg { display: block; width: 100%; height: 32px; background: var(--background-fill-secondary); }
.watts path { fill: none; stroke: var(--color-accent); stroke-width: 1.5;
  vector-effect: non-scaling-stroke; }
.watts-trouble { color: var(--body-text-color); border-left: 4px solid #b45309; padding-left: 10px; }
"""


ENERGY_FILES: Final = "/energy"  # the console's path of energy as CSV
CSV_STYLES: Final = {
    "programs and English spreadsheets (, and .)": CsvStyle(),
    "German spreadsheets (; and ,)": CsvStyle(separator=";", decimal=","),
}
FILE_TEXTS: Final[Mapping[EnergyTable, str]] = {
    "samples": "every look at every GPU, of the days for which looks are kept",
    "sessions": "each replica from ready to stopped",
    "models": "each model's energy by day, the idle part on its own line",
    "keys": "each key's share by day, by its tokens",
    "groups": "each group's share by day, by its tokens",
}


def energy_files_html(first: date, last: date, style: str) -> str:
    """A link for each table; the file is written while it is fetched, whatever its length."""
    asked = html.escape(urlencode({"first": first, "last": last, "style": style}))
    links = (
        f'<li><a download href="{ENERGY_FILES}/{what}.csv?{asked}">{what}.csv</a>: {text}</li>'
        for what, text in FILE_TEXTS.items()
    )
    return f"<p>From {first} to {last}:</p><ul>{''.join(links)}</ul>"


SESSION_HEADERS: Final = (
    "Model", "Replica", "From (UTC)", "To (UTC)", "kWh", "Mean (W)", "Peak (W)", "Tokens in",
    "Tokens out", "Requests", "J per output token", "J per token", "Cost", "CO₂ (kg)", "Method",
)  # fmt: skip


def session_rows(sessions: Sequence[EnergySession]) -> list[list[str]]:
    """One row per session."""
    return [
        [
            s.model, str(s.replica), f"{s.start:%Y-%m-%d %H:%M}",
            f"{s.end:%Y-%m-%d %H:%M}" if s.end else "still on", format_kwh(s.energy_mj),
            "" if s.mean_w is None else f"{s.mean_w:,.0f}", f"{s.peak_w:,.0f}",
            f"{s.prompt_tokens:,}", f"{s.completion_tokens:,}", f"{s.requests:,}",
            format_per_token(s.joules_per_output_token), format_per_token(s.joules_per_token),
            format_costs(s.costs), "" if s.co2_grams is None else f"{s.co2_grams / 1000:,.3f}",
            s.method,
        ]
        for s in sessions
    ]  # fmt: skip


# =============================================================================
# §26 Home — effects: time, and the state and files on the disk
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

    def __init__(self, home: Path, actor: Actor = ITSELF) -> None:
        self.home = home
        self.audit = AuditTrail(home, actor)
        self.config_path = home / "config.json"
        self.generated = home / "generated"
        self._noting = threading.Lock()

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
        """An earlier state as it was saved, its secrets included; see `returning_to`."""
        path = self.home / "history" / f"{number:06d}" / "config.json"
        if not path.exists():
            known = self.versions()
            raise UnknownError(
                f"There is no version {number}.",
                advice=f"There are {known[0]} to {known[-1]}." if known else "There is none yet.",
            )
        with file_errors("read the history"):
            return parse_state(path.read_text())

    @contextlib.contextmanager
    def lock(self, title: str) -> Iterator[None]:
        """Hold the one change of this installation; a second one is told what runs."""
        release = self.acquire(title)
        try:
            yield
        finally:
            release()

    def acquire(self, title: str, *, kind: JobKind = "change") -> Callable[[], None]:
        """Take the lock and return its release; the kernel frees it if this process dies.

        All changes share one lock; a task has one of its own, by its title.
        """
        name = "lock" if kind == "change" else f"lock-{sha256(title.encode()).hexdigest()[:12]}"
        with file_errors("lock its home"):
            handle = take_lock(self.home / name)
            if handle is None:
                holder = (self.home / name).read_text().strip() or title
                raise BusyError(
                    f"{'Another change' if kind == 'change' else 'This'} is under way: {holder}.",
                    advice="Wait until it is done, or cancel it.",
                )
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

    def make_folder(self, path: str) -> None:
        """A directory that a container will write to; Docker mounts none that is not there."""
        with file_errors(f"make {path}"):
            Path(path).mkdir(mode=0o700, parents=True, exist_ok=True)

    def compiled(self) -> dict[str, int]:
        """What engines compiled, in bytes by folder; see `compile_folder`."""
        with file_errors("look at what was compiled"):
            return {
                folder.name: sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
                for folder in sorted((self.home / "compiled").glob("*"))
            }

    def drop_compiled(self, folder: str) -> None:
        with file_errors("remove what was compiled"):
            shutil.rmtree(self.home / "compiled" / folder)

    def keep_log(self, name: ContainerName, text: str) -> None:
        """The log of a replica's last run, which survives its container, beside that before it."""
        with file_errors("keep a log"):
            if not text.startswith(self.kept_log(name)):  # of another run: this one did not grow
                self._log_path(name).replace(self._log_path(name, previous=True))
            write_atomic(self._log_path(name), text)

    def kept_log(self, name: ContainerName, *, previous: bool = False) -> str:
        path = self._log_path(name, previous=previous)
        with file_errors("read a log"):  # as bytes: progress bars have carriage returns
            return path.read_bytes().decode(errors="replace") if path.exists() else ""

    def _log_path(self, name: ContainerName, *, previous: bool = False) -> Path:
        return self.home / "logs" / f"{name}{'.previous' * previous}.log"

    def read_starts(self) -> dict[str, float]:
        """Seconds until ready at each container's last start; what cannot be read is unknown."""
        try:
            found = json.loads((self.home / "starts.json").read_text())
            return {str(name): float(seconds) for name, seconds in found.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def note_start(self, name: ContainerName, seconds: float) -> None:
        """Remember how long a container took to become ready."""
        with self._noting, file_errors("note a start"):
            starts = self.read_starts() | {name: round(seconds, 1)}
            write_atomic(self.home / "starts.json", json.dumps(starts, indent=2, sort_keys=True))

    def read_measured(self) -> dict[str, Measured]:
        """What engines showed, by measurement key; what cannot be read is unknown."""
        try:
            return _MEASURED.validate_json((self.home / "measured.json").read_bytes())
        except (OSError, ValueError):
            return {}

    def note_measured(self, key: str, measured: Measured) -> None:
        """Remember what the last start of an engine showed; the newest 500 are kept."""
        with self._noting, file_errors("note a measurement"):
            others = [(k, known) for k, known in self.read_measured().items() if k != key]
            newest = dict([*others, (key, measured)][-MOST_MEASURED:])
            text = _MEASURED.dump_json(newest, indent=2, exclude_none=True).decode()
            write_atomic(self.home / "measured.json", text)


class ProofFiles:
    """Dated results as JSON in a directory of their own: the newest 20 of each kind."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def keep(self, kind: str, taken_at: datetime, text: str) -> None:
        with file_errors("keep a result"):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomic(self._folder / f"{kind}-{taken_at:%Y%m%dT%H%M%S}.json", text)
            for old in self._of(kind)[:-MOST_PROOFS]:
                old.unlink(missing_ok=True)

    def newest(self, kind: str) -> str | None:
        with file_errors("read a result"):
            return next((path.read_text() for path in self._of(kind)[::-1]), None)

    def _of(self, kind: str) -> list[Path]:
        return sorted(self._folder.glob(f"{kind}-*.json"))


FULL_AUDIT_BYTES: Final = 64 * 1024**2


class AuditTrail:
    """Who changed what when, in `audit.jsonl`, which only grows; a full one makes way for the next.

    A change has a line when it begins and one when it ends: a kill in between hides nothing. What
    cannot be written is logged instead: the audit must not stop what frees a full disk. Full files
    are named by when they were, as `audit-20261121-183000.jsonl`, and kept for ever.
    """

    def __init__(self, home: Path, actor: Actor, full_bytes: int = FULL_AUDIT_BYTES) -> None:
        self._path = home / "audit.jsonl"
        self._full_bytes = full_bytes
        self._actor = contextvars.ContextVar("actor", default=actor)

    @contextlib.contextmanager
    def acting_as(self, actor: Actor) -> Iterator[None]:
        """What begins in this block, and the jobs that it starts, are this one's doing."""
        before = self._actor.set(actor)
        try:
            yield
        finally:
            self._actor.reset(before)

    @contextlib.contextmanager
    def noting(self, what: str) -> Iterator[None]:
        """Surround one change, whose title holds no secret."""
        end = self.begin(what)
        try:
            yield
        except BaseException as error:
            end(error)
            raise
        end(None)

    @contextlib.contextmanager
    def noting_refusal(self, what: str) -> Iterator[None]:
        """Surround what comes before a change, which then has its own note."""
        try:
            yield
        except ManagerError as error:
            self.begin(what)(error)
            raise

    def begin(self, what: str, job: str = "") -> Callable[[BaseException | None], None]:
        """Note that a change begins; what it returns is to be called with how it ended."""
        actor, now = self._actor.get(), utc_now()
        entry = AuditEntry(
            who=actor.name, channel=actor.channel, what=hide_keys(what), job=job, started_at=now
        )
        self._append(entry)
        return lambda error: self._append(entry.ended(error, utc_now()))

    def entries(self, since: datetime | None = None) -> list[AuditEntry]:
        """Oldest first, from all files that may hold some."""
        first = f"{since:{AUDIT_FILE}}" if since else ""
        with file_errors("read the audit"):
            # This one first: what is set aside meanwhile is then read twice, and told once.
            lines = self._lines(self._path)
            older = [self._lines(path) for path in self._full() if path.name >= first]
        found = parse_audit(itertools.chain(*older, lines))
        return [entry for entry in found if not since or entry.started_at >= since]

    def newest(self, count: int) -> list[AuditEntry]:
        """The last ones, oldest first, out of no more than the ends of the files."""
        with file_errors("read the audit"):
            lines = self._lines(self._path, AUDIT_TAIL_BYTES)
            for path in reversed(self._full()):
                if len(lines) > 2 * count:
                    break
                lines = self._lines(path, AUDIT_TAIL_BYTES) + lines
        return parse_audit(lines)[-count:]

    def _full(self) -> list[Path]:
        return sorted(self._path.parent.glob(f"audit-{'[0-9]' * 8}-{'[0-9]' * 6}.jsonl"))

    def _lines(self, path: Path, last_bytes: int | None = None) -> list[bytes]:
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            if last_bytes is not None:
                file.seek(max(file.seek(0, os.SEEK_END) - last_bytes, 0))
            return file.read().splitlines()
        return []

    def _opened(self) -> IO[bytes]:
        """The file to add to, for whoever has the lock."""
        self._set_aside()
        return open(self._path, "a+b", opener=private_opener)

    def _set_aside(self) -> None:
        """A full file makes way for a new one."""
        if not self._path.is_file() or self._path.stat().st_size < self._full_bytes:
            return
        moment = utc_now()
        for newest in self._full()[-1:]:  # of this second, or the clock was set back
            named = datetime.strptime(newest.name, AUDIT_FILE).replace(tzinfo=UTC)
            moment = max(moment, named + timedelta(seconds=1))
        self._path.rename(self._path.with_name(f"{moment:{AUDIT_FILE}}"))
        sync_folder(self._path.parent)

    def _append(self, entry: AuditEntry) -> None:
        line = _AUDIT_ENTRY.dump_json(entry, exclude_defaults=True) + b"\n"
        lock = self._path.with_suffix(".lock")
        try:
            with (
                take_lock(lock, wait=True) or contextlib.nullcontext(),  # others add lines too
                self._opened() as file,
            ):
                end = file.seek(0, os.SEEK_END)
                file.seek(max(end - 1, 0))
                torn = file.read() not in {b"", b"\n"}
                file.write(b"\n" * torn + line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            log.error("the audit cannot be written (%s): %s", error.strerror, line.decode())  # noqa: TRY400 - no traceback helps


AUDIT_FILE: Final = "audit-%Y%m%d-%H%M%S.jsonl"
AUDIT_TAIL_BYTES: Final = 1024**2
MOST_PROOFS: Final = 20
_MEASURED: Final = pydantic.TypeAdapter(dict[str, Measured])
MOST_MEASURED: Final = 500


def read_recipes(*folders: Path) -> dict[str, str]:
    """Recipe files by name; a later folder's take the place of an earlier one's."""
    with file_errors("read the recipes"):
        return {
            path.stem: path.read_text(errors="replace")
            for folder in folders
            for path in sorted(folder.glob("*.yaml"))
        }


def read_chunks(path: Path) -> Iterator[bytes]:
    """A file's bytes; none of one that is gone."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


CHUNK_BYTES: Final = 1 << 20


def take_lock(path: Path, *, wait: bool = False) -> IO[str] | None:
    """The file, locked until it is closed or this process dies; None: another one holds it."""
    handle = open(path, "r+", encoding="utf-8", opener=_creating_opener)  # noqa: SIM115
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        handle.close()
        return None
    except OSError:  # a file system without locks
        handle.close()
        raise
    return handle


def _creating_opener(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT, 0o600)


def private_opener(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def write_atomic(path: Path, text: str) -> None:
    """All or nothing, 0600, on the disk when it returns."""
    working = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(working, "w", encoding="utf-8", opener=private_opener) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        working.replace(path)
    finally:
        working.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Put on the disk what was renamed in it."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


HOME_ADVICE: Final = "Check the owner and mode of LLM Manager's home directory."
PLACE_ADVICE: Final = "Check that it is there, and its owner and mode."


@contextlib.contextmanager
def file_errors(action: str, advice: str = HOME_ADVICE) -> Iterator[None]:
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
            f"LLM Manager could not {action}: {error.strerror or error}{where}.", advice=advice
        ) from error


def read_certificate(edge: Edge) -> Certificate | None:
    """The operator's own as it is now, links followed; what it serves is exactly what was tested.

    Tested is all that a client would: that key and chain belong together, the dates, and each of
    the edge's names. None where another kind is wished.
    """
    tls = edge.tls
    if not isinstance(tls, OwnCertificate):
        return None
    try:
        chain = _pem_blocks(tls.certificate_path, "CERTIFICATE")
        pem = chain + _pem_blocks(tls.key_path, "[A-Z ]*PRIVATE KEY")
        expires_at = min(_handshake(chain, pem, name) for name in edge.hostnames)
    except ssl.SSLCertVerificationError as error:
        reason = error.verify_message.rstrip(".")
    except ssl.SSLError as error:
        reason = f"its key cannot be used with it ({error.reason or 'unreadable'})"
    except OSError as error:
        reason = f"{error.strerror or error} ({error.filename})"
    except ValueError as error:
        reason = str(error)
    else:
        return Certificate(pem=pem, expires_at=expires_at)
    return Certificate(fault=f"The certificate {tls.certificate_path} cannot be used: {reason}.")


def _pem_blocks(path: str, kind: str) -> str:
    text = Path(path).read_text(errors="replace")
    blocks = re.findall(rf"-----BEGIN {kind}-----.*?-----END {kind}-----", text, re.DOTALL)
    if not blocks:
        what = "certificate" if kind == "CERTIFICATE" else "private key"
        raise ValueError(f"{path} holds no {what} in PEM")
    return "\n".join(blocks) + "\n"


def _handshake(chain: str, pem: str, name: str) -> datetime:
    """Serve and visit it within this process; when it expires, or SSLError."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with memory_file(pem) as path:
        server.load_cert_chain(path, password="")  # never ask at the terminal
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # Trust in the certificate itself: whether clients trust its issuer is known to them alone.
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    client.load_verify_locations(cadata=chain)
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        server.wrap_bio(there, back, server_side=True),
        client.wrap_bio(back, there, server_hostname=name),
    ]
    for end in reversed(ends * 3):
        with contextlib.suppress(ssl.SSLWantReadError):
            end.do_handshake()
    shown = ends[1].getpeercert() or {}
    return datetime.fromtimestamp(ssl.cert_time_to_seconds(str(shown["notAfter"])), UTC)


@contextlib.contextmanager
def memory_file(text: str) -> Iterator[str]:
    """A path to a file that is on no disk, for what takes secrets by path only."""
    descriptor = os.memfd_create("secret")
    try:
        os.write(descriptor, text.encode())
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


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


def server_memory_mib() -> int:
    """All of this server's memory, what others use included."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // MIB


def free_bytes(path: Path) -> int:
    return shutil.disk_usage(path).free


# =============================================================================
# §27 Containers — effects: Docker
# =============================================================================


Report = Callable[[str], None]


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
    def logs(self, name: ContainerName, tail: int, *, last_run: bool = False) -> str: ...
    def follow(self, name: ContainerName) -> Iterator[str]: ...
    def visible_devices(self, seen: ObservedContainer) -> frozenset[str] | None: ...
    def foreign_devices(self) -> dict[str, frozenset[str]]: ...
    def host_address(self) -> str: ...
    @property
    def contents(self) -> Contents: ...


class Contents(Protocol):
    """What our containers hold, byte by byte."""

    def log(self, name: ContainerName) -> Iterator[bytes]: ...
    def volumes(self, name: ContainerName) -> tuple[str, ...]: ...
    def changed(self, name: ContainerName) -> list[str]: ...
    def archive(self, name: ContainerName, path: str) -> Iterator[bytes]: ...
    def output(self, name: ContainerName, command: Sequence[str]) -> Iterator[bytes]: ...
    def put(self, name: ContainerName, source: Path, target: str) -> None: ...


class DockerContainers:
    """Containers through the Docker SDK."""

    def __init__(self, base_url: str, instance: str) -> None:
        self._base_url = base_url
        self._instance = instance
        self._client: docker.DockerClient | None = None
        self._labels = {LABEL_OWNER: OWNER, LABEL_INSTANCE: instance}
        self._devices = DockerDevices(self._connected, self._labels)
        self.contents: Contents = DockerContents(self._connected, self._ours)
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
                # The certificate, where there is one: it is written before it is checked.
                mounts=[_docker_mount(m) for m in spec.mounts if f"{m.target}/cert" in text],
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
                f"Caddy rejects the generated Caddyfile: {_last_line(mask_secrets(said))}.",
                advice="What ran before still runs. Correct the HTTPS settings.",
            )

    def reload_caddyfile(self, name: ContainerName) -> None:
        command = ["caddy", "reload", "--config", "/etc/caddy/Caddyfile", "--adapter", "caddyfile"]
        with docker_errors(f"reload {name}"):
            result = self._ours(name).exec_run(command)
        if result.exit_code:
            said = result.output.decode() if isinstance(result.output, bytes) else ""
            raise ContainerFailedError(
                f"Caddy did not load its new configuration: {_last_line(mask_secrets(said))}.",
                advice="What ran before still runs.",
            )

    def logs(self, name: ContainerName, tail: int, *, last_run: bool = False) -> str:
        """The end of its log; with `last_run` only what it said since it was last started."""
        with docker_errors(f"read the log of {name}"):
            container = self._ours(name)
            started = parse_docker_time(container.attrs["State"]["StartedAt"]).timestamp()
            # Docker notes a start a moment after the first line can be there.
            since = max(started - 0.5, 1.0) if last_run else None
            said = container.logs(tail=tail, stream=False, since=since)
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

    def visible_devices(self, seen: ObservedContainer) -> frozenset[str] | None:
        return self._devices.visible(seen)

    def foreign_devices(self) -> dict[str, frozenset[str]]:
        return self._devices.given_to_others()

    def host_address(self) -> str:
        """Where containers reach this server: what Docker makes of `host-gateway`."""
        with docker_errors("look at its default bridge"):
            bridge = self._connected().api.inspect_network("bridge")
            return str(bridge["IPAM"]["Config"][0]["Gateway"])


class DockerDevices:
    """Which GPUs and slices containers were given, and which are really visible in ours."""

    def __init__(
        self, client: Callable[[], docker.DockerClient], labels: Mapping[str, str]
    ) -> None:
        self._client = client
        self._labels = labels
        self._visible: dict[Sighting, tuple[float, frozenset[str] | None]] = {}
        self._asking: dict[Sighting, concurrent.futures.Future[frozenset[str] | None]] = {}
        self._requested: dict[str, tuple[str, frozenset[str]]] = {}

    def visible(self, seen: ObservedContainer) -> frozenset[str] | None:
        """The GPUs or MIG devices that are visible inside, at most a minute old.

        Asked by the `nvidia-smi` that the container toolkit puts there; None where it is not, or
        does not answer: on a sick GPU it hangs, and the SDK's exec knows no timeout.
        """
        key = seen.container_id, seen.started_at
        asked, known = self._visible.get(key, (-math.inf, None))
        if time.monotonic() - asked <= VISIBLE_SECONDS:
            return known
        if key not in self._asking:  # one question at a time: a hanging one is not asked again
            answer = self._asking[key] = concurrent.futures.Future()
            ask = partial(self._ask_inside, seen.name, answer)
            threading.Thread(target=ask, name=f"look into {seen.name}", daemon=True).start()
        try:
            known = self._asking[key].result(timeout=SIGHT_SECONDS)
        except concurrent.futures.TimeoutError:
            return None
        self._asking.pop(key, None)
        self._visible[key] = time.monotonic(), known
        return known

    def _ask_inside(
        self, name: ContainerName, answer: concurrent.futures.Future[frozenset[str] | None]
    ) -> None:
        seen: frozenset[str] | None = None
        with contextlib.suppress(ManagerError), docker_errors(f"ask {name} for its GPU"):
            run = self._client().containers.get(name).exec_run(["nvidia-smi", "-L"])
            said = run.output.decode(errors="replace") if isinstance(run.output, bytes) else ""
            if run.exit_code == 0 or "Failed to initialize NVML: Unknown Error" in said:
                seen = parse_visible_devices(said)
        answer.set_result(seen)

    def given_to_others(self) -> dict[str, frozenset[str]]:
        """Running containers that are not ours, and the GPUs or slices they were given by UUID."""
        with docker_errors("look at other containers"):
            client = self._client()
            found: dict[str, frozenset[str]] = {}
            for listed in client.api.containers():
                mine = all(listed["Labels"].get(k) == v for k, v in self._labels.items())
                name, devices = self._requested.get(listed["Id"]) or self._request_of(listed["Id"])
                if devices and not mine:
                    found[name] = devices
        return found

    def _request_of(self, container_id: str) -> tuple[str, frozenset[str]]:
        """A container's name and devices, which never change; nothing where it is gone."""
        try:
            attributes = self._client().api.inspect_container(container_id)
        except docker.errors.NotFound:
            return "", frozenset()
        requested = attributes["Name"].removeprefix("/"), frozenset(_requested_devices(attributes))
        self._requested[container_id] = requested
        return requested


class DockerContents:
    """Logs, volumes and files of our containers, and what commands in them print."""

    def __init__(
        self, client: Callable[[], docker.DockerClient], ours: Callable[[str], Container]
    ) -> None:
        self._client = client
        self._ours = ours

    def log(self, name: ContainerName) -> Iterator[bytes]:
        """All that Docker kept of it."""
        with docker_errors(f"read the log of {name}"):
            yield bytes(self._ours(name).logs(stream=False))

    def volumes(self, name: ContainerName) -> tuple[str, ...]:
        """Where its volumes are mounted; directories of this host are not among them."""
        return tuple(m["Destination"] for m in self._mounts(name) if m["Type"] == "volume")

    def _mounts(self, name: ContainerName) -> list[Json]:
        with docker_errors(f"look at {name}"):
            return list(self._ours(name).attrs["Mounts"])

    def changed(self, name: ContainerName) -> list[str]:
        """What it wrote outside of all mounts; see `changed_paths`."""
        mounted = [mount["Destination"] for mount in self._mounts(name)]
        with docker_errors(f"look into {name}"):
            changes = self._ours(name).diff() or []
        return changed_paths({str(c["Path"]): int(c["Kind"]) for c in changes}, mounted)

    def archive(self, name: ContainerName, path: str) -> Iterator[bytes]:
        """A file or directory as an uncompressed tar; nothing where it is gone, or a socket."""
        try:
            with docker_errors(f"read {path} of {name}"):
                yield from self._ours(name).get_archive(path)[0]
        except ContainerFailedError as error:
            if not re.search("Could not find the file|sockets not supported", str(error)):
                raise

    def output(self, name: ContainerName, command: Sequence[str]) -> Iterator[bytes]:
        """What a command prints, as root in a container; one that fails is an error."""
        with docker_errors(f"run {command[0]} in {name}"):
            api = self._client().api
            run, said = api.exec_create(self._ours(name).id, [*command], user="0")["Id"], b""
            for printed, complaint in api.exec_start(run, stream=True, demux=True):
                said = (said + (complaint or b""))[-4000:]
                if printed:
                    yield printed
            # A moment after its last word it may count as running still, and has no status yet.
            status, tries = None, 50
            while status is None and tries:
                status, tries = api.exec_inspect(run)["ExitCode"], tries - 1
                time.sleep(0.1 if status is None else 0)
        if status != 0:
            text = said.decode(errors="replace")
            # PostgreSQL's programs go on after the error: with a hint, or the place in the query.
            error = re.search(r"\berror: *(.+)", text, re.IGNORECASE)
            reason = error[1] if error else _last_line(text)
            raise ContainerFailedError(
                f"{command[0]} ended with status {status} in {name}: {reason}.",
                advice="Look at its log, then try again.",
            )

    def put(self, name: ContainerName, source: Path, target: str) -> None:
        """Copy a file of this server into a container, readable by root alone."""
        path = PurePosixPath(target)
        with file_errors(f"read {source}"):
            archive = _tar_of(source, path.name)
            with docker_errors(f"write {target} in {name}"):
                self._ours(name).put_archive(str(path.parent), archive)


def read_from_tar(chunks: Iterable[bytes]) -> bytes:
    """The content of an archive's only file."""
    with tarfile.open(fileobj=io.BytesIO(b"".join(chunks))) as archive:
        file = archive.extractfile(archive.getmembers()[0])
        return file.read() if file else b""


Sighting = tuple[str, datetime | None]  # one start of one container
SIGHT_SECONDS: Final = 5.0
VISIBLE_SECONDS: Final = 60.0


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
        container_id=attributes["Id"],
        devices=_requested_devices(attributes),
    )


def _requested_devices(attributes: Json) -> tuple[str, ...]:
    return tuple(
        device
        for request in attributes["HostConfig"].get("DeviceRequests") or ()
        for device in request.get("DeviceIDs") or ()
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
        "extra_hosts": dict(spec.extra_hosts),
        "init": True,
        "log_config": docker.types.LogConfig(
            type="json-file", config={"max-size": "50m", "max-file": "3"}
        ),
    }  # fmt: skip
    if spec.entrypoint:
        arguments["entrypoint"] = list(spec.entrypoint)
    if spec.devices:
        # Never CUDA_VISIBLE_DEVICES=MIG-…: the container is to see its own device and no other.
        arguments["device_requests"] = [
            docker.types.DeviceRequest(device_ids=list(spec.devices), capabilities=[["gpu"]])
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


def _tar_of(source: Path, name: str) -> Iterator[bytes]:
    """The same of a file that may be larger than the memory."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = source.stat().st_size, 0o600
    yield entry.tobuf(tarfile.GNU_FORMAT)
    yield from read_chunks(source)
    yield bytes(-entry.size % tarfile.BLOCKSIZE + 2 * tarfile.BLOCKSIZE)


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
        r"could not select device driver|unknown or invalid runtime name: nvidia",
        "the NVIDIA container toolkit is not set up",
        "Install nvidia-container-toolkit: `nvidia-ctk runtime configure`; then restart Docker.",
    ),
    (
        r"unknown device|unresolvable CDI devices",
        "its GPU or MIG slice is not there, or not known to the container toolkit",
        "Look at `mig show`; then `systemctl restart nvidia-cdi-refresh`, and apply the plan.",
    ),
    (
        r"no CDI specification directories",
        "CDI is switched off in Docker",
        "Remove `cdi: false` from /etc/docker/daemon.json and restart Docker.",
    ),
    (
        r"driver/library version mismatch|driver (not loaded|rpc error)|failed to process request",
        "the NVIDIA driver is not loaded, or was upgraded without a reboot",
        "Reboot, then look at `nvidia-smi`.",
    ),
    (
        r"unsatisfied condition: cuda",
        "the NVIDIA driver is too old for this image",
        "Update the driver, or pin an older image.",
    ),
    (
        r"lstat /dev/nvidia",
        "the GPU's device files are not there yet",
        "Run `nvidia-smi` once, and enable nvidia-persistenced.",
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


# =============================================================================
# §28 Images — effects: pulled, built from recipes, pruned
# =============================================================================


class LocalImages(Protocol):
    """What the manager needs of this server's images beside pulling them."""

    def build(
        self,
        image: str,
        dockerfile: str,
        labels: Mapping[str, str],
        report: Report,
        check: Callable[[], None],
    ) -> None: ...
    def observe(self) -> tuple[ObservedImage, ...]: ...
    def remove(self, image: ObservedImage) -> None: ...


class DockerImages:
    """Images through the Docker SDK; `build_arguments` reach every build, and no image."""

    def __init__(self, base_url: str, instance: str, build_arguments: Mapping[str, str]) -> None:
        self._base_url = base_url
        self._instance = instance
        self._build_arguments = build_arguments
        self._building = threading.Lock()
        self._client: docker.DockerClient | None = None

    def _connected(self) -> docker.DockerClient:
        if self._client is None:
            self._client = docker.DockerClient(base_url=self._base_url, timeout=120)
        return self._client

    def build(
        self,
        image: str,
        dockerfile: str,
        labels: Mapping[str, str],
        report: Report,
        check: Callable[[], None],
    ) -> None:
        """Build and tag; an image that is here is left alone, and a failed build tags nothing.

        `report` gets the builder's text as it comes. What `check` raises stops the build.
        """
        while not self._building.acquire(timeout=CANCEL_SECONDS):
            check()
        try:
            with docker_errors(f"build {image}"):
                if not self._connected().api.images(image):
                    self._build(image, dockerfile, labels, report, check)
        finally:
            self._building.release()

    def _build(
        self,
        image: str,
        dockerfile: str,
        labels: Mapping[str, str],
        report: Report,
        check: Callable[[], None],
    ) -> None:
        # Near the top, so that what a broken-off build leaves is known as ours.
        own = f"\\1\nLABEL {LABEL_IMAGE_INSTANCE}={self._instance}"
        text = re.sub(r"^(FROM .*)$", own, dockerfile, count=1, flags=re.MULTILINE)
        client = docker.DockerClient(base_url=self._base_url, timeout=SILENT_SECONDS)
        answers: list[requests.Response] = []
        client.api.hooks["response"].append(lambda answer, **_: answers.append(answer))
        with contextlib.closing(client):
            events = client.api.build(
                fileobj=io.BytesIO(text.encode()), tag=image, labels={**labels}, rm=True,
                forcerm=True, decode=True, buildargs={**self._build_arguments},
            )  # fmt: skip
            stream = docker.types.CancellableStream(events, answers[-1])
            built = False
            with closed_by(check, stream):
                for event in stream:
                    if "error" in event:
                        report(f"{event['error']}\n")
                        raise docker.errors.APIError(event["error"], explanation=event["error"])
                    report(event.get("stream", ""))
                    built = built or "ID" in event.get("aux", {})
        if not built:  # the SDK takes a torn connection for the end of the stream
            raise docker.errors.APIError("", explanation="the builder ended without an image")

    def observe(self) -> tuple[ObservedImage, ...]:
        """All images of this server, newest first."""
        with docker_errors("look at its images"):
            api = self._connected().api
            users: dict[str, list[str]] = {}
            for container in api.containers(all=True):
                # One that is being removed has no name any more.
                name = (container["Names"] or [container["Id"][:12]])[0].removeprefix("/")
                users.setdefault(container["ImageID"], []).append(name)
            found: list[ObservedImage] = []
            for listed in api.images():
                with contextlib.suppress(docker.errors.ImageNotFound):  # it went meanwhile
                    attributes = api.inspect_image(  # type: ignore[no-untyped-call]
                        listed["Id"]
                    )
                    found.append(_observed_image(attributes, users.get(listed["Id"], ())))
        return tuple(found)

    def remove(self, image: ObservedImage) -> None:
        """Remove what this installation built; Docker itself refuses what a container uses."""
        title = ", ".join(image.tags) or image.image_id
        with docker_errors(f"remove {title}"):
            client = self._connected()
            labels = client.images.get(image.image_id).labels
            if labels.get(LABEL_IMAGE_INSTANCE) != self._instance:
                raise ContainerFailedError(
                    f"The image {title} was not built by this installation.",
                    advice="Remove it yourself; LLM Manager does not touch it.",
                )
            for name in image.tags or (image.image_id,):
                client.images.remove(name)


CANCEL_SECONDS: Final = 0.3
SILENT_SECONDS: Final = 24 * 3600  # compiling a package may say nothing for hours


@contextlib.contextmanager
def closed_by(
    check: Callable[[], None], stream: docker.types.CancellableStream[Json]
) -> Iterator[None]:
    """Close a stream that another thread waits for as soon as `check` raises; raise that then."""
    over = threading.Event()
    cancelled: list[CancelledError] = []

    def watch() -> None:
        while not over.wait(CANCEL_SECONDS):
            try:
                check()
            except CancelledError as error:
                cancelled.append(error)
                stream.close()
                return

    watching = threading.Thread(target=watch, name="cancel a build", daemon=True)
    watching.start()
    try:
        yield
    finally:
        over.set()
        watching.join()
        if cancelled:
            raise cancelled[0]


def _observed_image(attributes: Json, users: Sequence[str]) -> ObservedImage:
    return ObservedImage(
        image_id=attributes["Id"],
        tags=tuple(attributes["RepoTags"] or ()),
        digests=tuple(attributes["RepoDigests"] or ()),
        size_bytes=attributes["Size"],
        created_at=parse_docker_time(attributes["Created"]),
        layers=tuple(attributes["RootFS"].get("Layers") or ()),
        labels=(attributes["Config"] or {}).get("Labels") or {},
        used_by=tuple(sorted(users)),
    )


def build_arguments(environment: Mapping[str, str]) -> dict[str, str]:
    """What builds need to reach the network as this server does; see INSTALL_PACKAGES."""
    names = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")
    index = environment.get("PIP_INDEX_URL") or environment.get("UV_DEFAULT_INDEX") or ""
    # Named even when empty: the SDK would fill in the Docker CLI's own.
    return {n: environment[n] for n in names if n in environment} | {"FTP_PROXY": index}


# =============================================================================
# §29 Requests — effects: HTTP to containers on the bridge, LiteLLM's management API
# =============================================================================


class Probes(Protocol):
    """Questions to containers, by their address on the bridge."""

    def fill(self, observed: Observed) -> Observed: ...
    def is_ready(self, spec: ContainerSpec, seen: ObservedContainer) -> bool: ...
    def load(self, seen: ObservedContainer) -> EngineLoad | None: ...
    def figures(
        self, seen: ObservedContainer, key: pydantic.SecretStr
    ) -> GatewayFigures | None: ...
    def answers(self, seen: ObservedContainer, wanted: EngineAnswers, seconds: float) -> bool: ...


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
            case "database" | "cache":
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

    def load(self, seen: ObservedContainer) -> EngineLoad | None:
        """What an engine is at; None where it does not say."""
        answer = self._ok(seen, ENGINE_PORT, "/metrics")
        return parse_load(answer.text) if answer is not None else None

    def figures(self, seen: ObservedContainer, key: pydantic.SecretStr) -> GatewayFigures | None:
        """What LiteLLM has counted; None where it does not say."""
        try:
            answer = self._client.get(
                f"http://{seen.address}:{GATEWAY_PORT}/metrics",
                headers={"Authorization": f"Bearer {key.get_secret_value()}"},
                follow_redirects=True,  # 1.106 sends to /metrics/
            )
            return parse_figures(answer.raise_for_status().text)
        except httpx.HTTPError:
            return None

    def answers(self, seen: ObservedContainer, wanted: EngineAnswers, seconds: float) -> bool:
        """Whether an engine answers the smallest request of its kind within that time."""
        try:
            return self._smallest_request(seen, wanted, seconds).is_success
        except httpx.HTTPError:
            return False

    def _smallest_request(
        self, seen: ObservedContainer, wanted: EngineAnswers, seconds: float
    ) -> httpx.Response:
        asked = readiness_request(wanted.model_type, wanted.served_model_name)
        return self._client.post(
            f"http://{seen.address}:{ENGINE_PORT}{asked.path}",
            headers={"Authorization": f"Bearer {wanted.engine_key.get_secret_value()}"},
            timeout=seconds,
            **_body(asked.fields, asked.audio),
        )

    def _engine_answers(self, seen: ObservedContainer, wanted: EngineAnswers) -> bool:
        try:
            answer = self._smallest_request(seen, wanted, 300)  # the first may compile kernels
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


def _body(asked: Json | None, audio: bytes | None) -> Json:
    """Fields as httpx takes them: as JSON, or beside a sound as a form."""
    if audio is not None:
        return {"data": asked, "files": {"file": ("silence.wav", audio)}}
    return {"json": asked}


class EdgeClient:
    """Requests as anybody outside sends them, to the published ports of this server.

    It trusts what the endpoint's certificate needs: Caddy's own root, the operator's own chain,
    or the authorities of this system.
    """

    def __init__(self, edge: Edge, caddy_root: str) -> None:
        self._edge = edge
        address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(edge.address, edge.address)  # noqa: S104
        self._address = f"[{address}]" if ":" in address else address
        self._client = httpx.Client(
            verify=_trust(edge.tls, caddy_root), timeout=120, trust_env=False
        )

    def send(self, request: EdgeRequest, bearer: pydantic.SecretStr | None) -> EdgeReply:
        """Its answer, or why there is none; the path is sent as it stands."""
        edge, name = self._edge, self._edge.hostnames[0]
        scheme, port = (
            ("http", edge.http_port) if request.plain_http else ("https", edge.https_port)
        )
        key = {"Authorization": f"Bearer {bearer.get_secret_value()}"} if bearer else {}
        body = _body(request.fields, request.audio) if request.content is None else {}
        began = time.monotonic()
        try:
            with self._client.stream(
                request.method,
                f"{scheme}://{self._address}:{port}/",
                headers={"Host": f"{name}:{port}", **key, **request.headers},
                extensions={"sni_hostname": name, "target": request.path.encode()},
                content=request.content,
                **body,
            ) as answer:
                if request.broken_off:
                    said = next(answer.iter_raw(), b"").decode(errors="replace")
                else:
                    said = answer.read().decode(errors="replace")
        except httpx.HTTPError as error:
            return EdgeReply(fault=f"no answer: {error}", seconds=time.monotonic() - began)
        return EdgeReply(
            status=answer.status_code,
            by_edge=is_edges_own(answer.status_code, said),
            location=answer.headers.get("location", ""),
            call_id=answer.headers.get("x-litellm-call-id", ""),
            seconds=time.monotonic() - began,
            headers=dict(answer.headers),
        )


CADDY_ROOT: Final = "/data/caddy/pki/authorities/local/root.crt"


def _trust(tls: InternalTls | OwnCertificate | AcmeTls, caddy_root: str) -> ssl.SSLContext:
    match tls:
        case InternalTls():
            return ssl.create_default_context(cadata=caddy_root)
        case OwnCertificate(certificate_path=path):
            trust = ssl.create_default_context()
            with file_errors("read the certificate", PLACE_ADVICE):
                trust.load_verify_locations(cafile=path)
            trust.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # its issuer may be known to nobody
            return trust
        case AcmeTls():
            return ssl.create_default_context()
        case _:
            assert_never(tls)


class ProviderApi(Protocol):
    """Questions to providers, at their own addresses."""

    def look(self, provider: Provider, host_address: str | None) -> ProviderHealth: ...


class HttpProviders:
    """Providers over HTTP, asked from this server and not from the gateway's container.

    No redirect is followed: the key is for the address that the operator gave.
    """

    CONNECT_SECONDS, READ_SECONDS = 3.0, 10.0
    MOST_BYTES = 8 * 1024**2

    def look(self, provider: Provider, host_address: str | None) -> ProviderHealth:
        """Its models; `host_address` is that of this server where the provider runs on it.

        Raises ProviderError.
        """
        timeout = httpx.Timeout(self.READ_SECONDS, connect=self.CONNECT_SECONDS)
        url, status, location, body, latency_ms = "", 0, "", b"", 0.0
        with provider_errors(provider), httpx.Client(timeout=timeout, trust_env=False) as client:
            for url in model_lists(provider):
                request = _list_request(client, provider, url, host_address)
                started = time.monotonic()
                answer = client.send(request, stream=True)
                body = self._read(answer, url)
                latency_ms = (time.monotonic() - started) * 1000
                status, location = answer.status_code, answer.headers.get("Location", "")
                if status != httpx.codes.NOT_FOUND:
                    break
        if status != httpx.codes.OK:
            raise list_refusal(provider, url, status, location)
        return parse_listed(provider, url, body, latency_ms)

    def _read(self, answer: httpx.Response, url: str) -> bytes:
        body, deadline = b"", time.monotonic() + self.READ_SECONDS
        with contextlib.closing(answer):
            for chunk in answer.iter_bytes():
                body += chunk
                if time.monotonic() > deadline:  # httpx's limit is for each chunk
                    raise httpx.ReadTimeout("the whole answer", request=answer.request)
                if len(body) > self.MOST_BYTES:
                    raise ProviderError(
                        f"{url} answers with more than {format_size(self.MOST_BYTES)}.",
                        advice="That is no list of models: correct the address.",
                    )
        return body


def _list_request(
    client: httpx.Client, provider: Provider, url: str, host_address: str | None
) -> httpx.Request:
    target = httpx.URL(url)
    headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
    headers["Host"] = target.netloc.decode()
    name = target.host
    if provider.api_key is not None:
        headers["Authorization"] = f"Bearer {provider.api_key.get_secret_value()}"
    if host_address is not None:
        target = target.copy_with(host=host_address)
    return client.build_request("GET", target, headers=headers, extensions={"sni_hostname": name})


@contextlib.contextmanager
def provider_errors(provider: Provider) -> Iterator[None]:
    """Turn every failure of a connection into one sentence; none of it repeats the key."""
    try:
        yield
    except httpx.TimeoutException as error:
        connecting = isinstance(error, httpx.ConnectTimeout)
        raise ProviderError(
            f"{provider.name} does not answer at {provider.base_url} in time.",
            advice="Correct the address, or open it in the firewall."
            if connecting
            else "It accepted the connection: look at its own log and load.",
        ) from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise connection_fault(provider, str(error)) from error


class LiteLlmApi:
    """LiteLLM's management API, by its container's address and with the master key.

    What is listed comes out of its tables: LiteLLM itself needs a second for a thousand keys.
    """

    def __init__(
        self,
        address: str,
        master_key: pydantic.SecretStr,
        rows: Callable[[Sql], Sequence[Sequence[Any]]],
    ) -> None:
        self._rows = rows
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

    def update_key(self, key_hash: str, request: Json) -> None:
        """What is named is set, and a null takes it away."""
        self._call("POST", "/key/update", json=request | {"key": key_hash})

    def list_keys(self) -> list[VirtualKey]:
        """Every key, by name."""
        found = [read_key(entry) for (entry,) in self._rows(KEYS_SQL)]
        return sorted(found, key=lambda key: key.settings.alias)

    def delete_keys(self, hashes: Sequence[str]) -> None:
        """All of them, or none."""
        self._call("POST", "/key/delete", json={"keys": [*hashes]})

    def block_key(self, key_hash: str, *, blocked: bool) -> None:
        self._call("POST", "/key/block" if blocked else "/key/unblock", json={"key": key_hash})

    def list_groups(self) -> list[KnownGroup]:
        """Every team, by name."""
        found = [read_group(entry) for (entry,) in self._rows(GROUPS_SQL)]
        return sorted(found, key=lambda group: group.settings.name)

    def create_group(self, request: Json) -> None:
        self._call("POST", "/team/new", json=request)

    def update_group(self, request: Json) -> None:
        self._call("POST", "/team/update", json=request)

    def block_group(self, name: str, *, blocked: bool) -> None:
        self._call("POST", "/team/block" if blocked else "/team/unblock", json={"team_id": name})

    def delete_group(self, name: str) -> None:
        """Its keys go with it."""
        self._call("POST", "/team/delete", json={"team_ids": [name]})

    def _call(self, method: str, path: str, **options: Any) -> Any:
        try:
            answer = self._client.request(method, path, **options)
        except httpx.HTTPError as error:
            raise GatewayError(
                "LiteLLM does not answer.",
                advice="Look at the Overview; apply the plan if it is stopped.",
            ) from error
        if answer.is_success:
            return answer.json()
        raise GatewayError(
            f"LiteLLM refuses that: {_gateway_reason(answer)}.",
            advice="Correct it, or look at LiteLLM's log.",
        )


def _gateway_reason(answer: httpx.Response) -> str:
    try:
        fault = answer.json()
        detail = fault.get("error") or fault.get("detail") or fault
        text = detail.get("message", detail) if isinstance(detail, dict) else detail
        return hide_keys(str(text))[:300].rstrip(".")
    except ValueError:
        return f"status {answer.status_code}"


# =============================================================================
# §30 Database — effects: PostgreSQL
# =============================================================================

PSQL: Final = ("psql", "-U", "litellm", "-d", "litellm")


class Database(Protocol):
    """LiteLLM's database, in PostgreSQL's container: dumped, put back and measured."""

    def dumps(self) -> list[Dump]: ...
    def find(self, name: str) -> Path: ...
    def drop_dump(self, dump: Dump) -> None: ...
    def dump(self, server: ContainerName, file: str, tell: Callable[[int], None]) -> int: ...
    def is_as_in(self, server: ContainerName, path: Path) -> bool: ...
    def load(self, server: ContainerName, path: Path) -> None: ...
    def turn(self, server: ContainerName) -> None: ...
    def turn_back(self, server: ContainerName) -> None: ...
    def drop_loaded(self, server: ContainerName) -> None: ...
    def drop_former(self, server: ContainerName) -> None: ...
    def withhold_contents(self, server: ContainerName) -> None: ...
    def size(self, server: ContainerName) -> DatabaseSize: ...


class PostgresPrograms:
    """The same by PostgreSQL's own programs, which are as old or new as the server is."""

    def __init__(self, contents: Contents, folder: Path) -> None:
        self._contents = contents
        self._folder = folder

    def dumps(self) -> list[Dump]:
        """Newest first."""
        dumps: list[Dump] = []
        with file_errors("look at the dumps"):
            for path in self._folder.glob("*.dump"):
                with contextlib.suppress(FileNotFoundError):  # it has just made way
                    facts = path.stat()
                    moment = datetime.fromtimestamp(facts.st_mtime, UTC)
                    dumps.append(Dump(file=path.name, size_bytes=facts.st_size, taken_at=moment))
        return sorted(dumps, key=lambda dump: dump.taken_at, reverse=True)

    def find(self, name: str) -> Path:
        """The dump of that name, with or without its ending, or at that absolute path."""
        with file_errors("look for that dump", PLACE_ADVICE):
            for path in (self._folder / name, self._folder / f"{name}.dump"):
                if path.is_file():
                    return path
        known = ", ".join(dump.file for dump in self.dumps()[:5]) or "none yet"
        raise UnknownError(f"There is no dump {name!r}.", advice=f"The newest: {known}.")

    def drop_dump(self, dump: Dump) -> None:
        with file_errors("remove an old dump"):
            (self._folder / dump.file).unlink(missing_ok=True)

    def dump(self, server: ContainerName, file: str, tell: Callable[[int], None]) -> int:
        """A new dump, which counts once it was read back whole; its bytes.

        `tell` hears how many there are so far, and may raise: then nothing is left of it.
        """
        target, working = self._folder / file, self._folder / f".{file}.part"
        with self._alone(), file_errors(f"write {file}"):
            if target.exists() and not AUTOMATIC_DUMP.fullmatch(file):
                raise RefusedError(f"There is a dump {file} already.", advice="Name it otherwise.")
            try:
                with open(working, "wb", opener=private_opener) as out:
                    for chunk in self._run(server, *PG_DUMP):
                        out.write(chunk)
                        tell(out.tell())
                    size = out.tell()
                    os.fsync(out.fileno())
                with self._inside(server, working) as inside:
                    self._finish(server, "pg_restore", "--file=/dev/null", inside)
                working.rename(target)
                sync_folder(self._folder)
            finally:
                working.unlink(missing_ok=True)
        return size

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One at a time: in the folder, and at the one path within the container."""
        with file_errors("open the folder of dumps"):
            self._folder.mkdir(mode=0o700, exist_ok=True)
            lock = take_lock(self._folder / ".lock", wait=True)
            for left in self._folder.glob(".*.part"):  # by a manager that was killed
                left.unlink()
        try:
            yield
        finally:
            if lock is not None:
                lock.close()

    @contextlib.contextmanager
    def _inside(self, server: ContainerName, path: Path) -> Iterator[str]:
        """The file as PostgreSQL's container sees it, while it is needed."""
        try:
            self._contents.put(server, path, DUMP_INSIDE)
            yield DUMP_INSIDE
        finally:
            with contextlib.suppress(ManagerError):
                self._finish(server, "rm", "-f", DUMP_INSIDE)

    def _run(self, server: ContainerName, *command: str) -> Iterator[bytes]:
        return self._contents.output(server, command)

    def _finish(self, server: ContainerName, *command: str) -> str:
        return b"".join(self._run(server, *command)).decode(errors="replace").strip()

    def _sql(self, server: ContainerName, *statements: str) -> str:
        """Each text is a transaction; as the administrator, past LiteLLM's database."""
        given = [word for text in statements for word in ("-c", text)]
        return self._finish(server, *ADMINISTRATOR, *given)

    def load(self, server: ContainerName, path: Path) -> None:
        """Make a database from a dump, or refuse that one; LiteLLM's own is not touched."""
        with self._alone(), self._inside(server, path) as inside:
            self.drop_former(server)  # left by a manager that was killed
            self.drop_loaded(server)
            self._sql(server, f"CREATE DATABASE {LOADED} TEMPLATE template0")
            try:
                self._finish(server, *PG_RESTORE, inside)
            except ContainerGoneError:
                raise
            except ContainerFailedError as error:
                reason = error.fact.partition(f" in {server}: ")[2] or error.fact
                raise RefusedError(
                    f"{path.name} cannot be restored: {reason}", advice="Take another dump."
                ) from error
            self.withhold_contents(server, LOADED)

    def turn(self, server: ContainerName) -> None:
        """The loaded database becomes LiteLLM's, which is kept; all of it or nothing."""
        self._rename(server, ("litellm", FORMER), (LOADED, "litellm"))

    def turn_back(self, server: ContainerName) -> None:
        """The database from before is LiteLLM's again, where it was turned away."""
        if self._sql(server, f"SELECT 1 FROM pg_database WHERE datname = '{FORMER}'"):  # noqa: S608
            self._rename(server, ("litellm", LOADED), (FORMER, "litellm"))

    def _rename(self, server: ContainerName, *names: tuple[str, str]) -> None:
        """In one transaction, with all who are connected cut off; some may be quick to return."""
        rename = "; ".join(f"ALTER DATABASE {old} RENAME TO {new}" for old, new in names)
        for left in reversed(range(RENAME_TRIES)):
            try:
                self._sql(server, CUT_OFF, rename)
            except ContainerFailedError:
                if not left:
                    raise
            else:
                return

    def drop_loaded(self, server: ContainerName) -> None:
        self._sql(server, f"DROP DATABASE IF EXISTS {LOADED} WITH (FORCE)")

    def drop_former(self, server: ContainerName) -> None:
        self._sql(server, f"DROP DATABASE IF EXISTS {FORMER} WITH (FORCE)")

    def withhold_contents(self, server: ContainerName, database: str = "litellm") -> None:
        """From now on LiteLLM's tables keep no name of a tool, and no refused stranger."""
        self._finish(server, *ADMINISTRATOR, "-d", database, "-c", WITHHOLDING)

    def is_as_in(self, server: ContainerName, path: Path) -> bool:
        """Whether the tables are still those of a dump, whatever rows they have now."""
        with self._alone(), self._inside(server, path) as inside:
            then = self._finish(server, "pg_restore", *SCHEMA_ALONE, "--file=-", inside)
        now = self._finish(server, "pg_dump", *PSQL[1:], *SCHEMA_ALONE)
        return _statements(then) == _statements(now)

    def size(self, server: ContainerName) -> DatabaseSize:
        found = self._finish(server, *PSQL, "-tAF,", "-c", SIZES).split(",")
        disk = self._finish(server, "df", "-Pk", "/var/lib/postgresql/data").splitlines()[-1]
        database, logs, rows, oldest = found
        return DatabaseSize(
            database_bytes=int(database),
            spend_log_bytes=int(logs),
            spend_log_rows=int(rows) if int(rows) >= 0 else None,
            oldest_row_at=datetime.fromtimestamp(float(oldest), UTC) if oldest else None,
            free_bytes=int(disk.split()[3]) * 1024,
        )


def _statements(sql: str) -> list[str]:
    """Without comments and what differs each time: since 2025 a `\\restrict` with a random word."""
    return [line for line in sql.splitlines() if line and not line.startswith(("--", "\\"))]


LOADED: Final = "litellm_loaded"
FORMER: Final = "litellm_former"
DUMP_INSIDE: Final = "/tmp/llm-manager.dump"  # noqa: S108 - its container is ours alone
PG_DUMP: Final = ("pg_dump", *PSQL[1:], "--format=custom")
# Owners and grants are this server's: the roles of the one that was dumped may not be here.
PG_RESTORE: Final = (
    *("pg_restore", "-U", "litellm", "-d", LOADED),
    *("--no-owner", "--no-acl", "--exit-on-error"),
)
SCHEMA_ALONE: Final = ("--schema-only", "--no-owner", "--no-acl")
ADMINISTRATOR: Final = ("psql", "-U", "litellm", "-d", "postgres", "-qtA", "-v", "ON_ERROR_STOP=1")
CUT_OFF: Final = (
    "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
    "WHERE datname IN ('litellm', 'litellm_loaded', 'litellm_former')"
)
# LiteLLM has no setting against either (1.108): the names of tools that a request offers or an
# answer calls go into three tables, which nothing here reads; and each refused request of a
# stranger leaves rows. No trigger has a WHEN: PostgreSQL would refuse LiteLLM's own migrations of a
# column that is named there. Prisma wants the day's row back, else LiteLLM logs errors.
WITHHOLDING: Final = """
CREATE OR REPLACE FUNCTION public.llm_manager_no_row() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  RETURN NULL;
END $$;
CREATE OR REPLACE FUNCTION public.llm_manager_no_tool() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF TG_WHEN = 'BEFORE' THEN
    NEW.tool_name := '';
    RETURN NEW;
  END IF;
  DELETE FROM public."LiteLLM_DailyToolSpend";
  RETURN NULL;
END $$;
CREATE OR REPLACE FUNCTION public.llm_manager_no_stranger() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
  failed bool;
BEGIN
  IF TG_TABLE_NAME = 'LiteLLM_SpendLogs' THEN
    failed := NEW.status = 'failure';
  ELSE
    failed := NEW.successful_requests = 0;
  END IF;
  IF failed AND NEW.api_key <> '{master}'
     AND NOT EXISTS (SELECT FROM public."LiteLLM_VerificationToken" WHERE token = NEW.api_key)
     AND NOT EXISTS (SELECT FROM public."LiteLLM_DeletedVerificationToken"
                      WHERE token = NEW.api_key) THEN
    RETURN NULL;
  END IF;
  RETURN NEW;
EXCEPTION WHEN OTHERS THEN  -- LiteLLM may change a column, and must not lose its row for that
  RETURN NEW;
END $$;
DO $$
DECLARE
  wanted record;
BEGIN
  FOR wanted IN SELECT * FROM (VALUES
    ('LiteLLM_ToolTable', 'BEFORE', 'ROW EXECUTE FUNCTION public.llm_manager_no_row()'),
    ('LiteLLM_SpendLogToolIndex', 'BEFORE', 'ROW EXECUTE FUNCTION public.llm_manager_no_row()'),
    ('LiteLLM_DailyToolSpend', 'BEFORE', 'ROW EXECUTE FUNCTION public.llm_manager_no_tool()'),
    ('LiteLLM_DailyToolSpend', 'AFTER', 'STATEMENT EXECUTE FUNCTION public.llm_manager_no_tool()'),
    ('LiteLLM_SpendLogs', 'BEFORE', 'ROW EXECUTE FUNCTION public.llm_manager_no_stranger()'),
    ('LiteLLM_DailyUserSpend', 'BEFORE', 'ROW EXECUTE FUNCTION public.llm_manager_no_stranger()')
  ) AS triggers (place, moment, what) LOOP
    IF to_regclass(format('public.%I', wanted.place)) IS NOT NULL THEN
      IF wanted.place LIKE '%Tool%' THEN
        EXECUTE format('DELETE FROM public.%I', wanted.place);
      END IF;
      EXECUTE format('CREATE OR REPLACE TRIGGER %I %s INSERT ON public.%I FOR EACH %s',
                     'llm_manager_' || lower(wanted.moment), wanted.moment, wanted.place,
                     wanted.what);
    END IF;
  END LOOP;
END $$;
""".replace("{master}", MASTER_KEY_ALIAS)
RENAME_TRIES: Final = 5  # PostgreSQL itself waits 5 s for others to leave
SIZES: Final = """SELECT pg_database_size(current_database()), pg_total_relation_size(oid),
reltuples::bigint, (SELECT extract(epoch FROM min("startTime")) FROM "LiteLLM_SpendLogs")
FROM pg_class WHERE oid = '"LiteLLM_SpendLogs"'::regclass"""


DATABASE_PORT: Final = 5432
DATABASE_OWNER: Final = "litellm"
READER: Final = "llm_manager_reader"
READER_SECONDS: Final = 10
# Of LiteLLM's hundred tables those that tell of use; none that holds a secret.
READER_TABLES: Final = (
    "LiteLLM_SpendLogs", "LiteLLM_DailyUserSpend", "LiteLLM_DailyTeamSpend",
    "LiteLLM_VerificationToken", "LiteLLM_DeletedVerificationToken",
    "LiteLLM_TeamTable", "LiteLLM_DeletedTeamTable",
)  # fmt: skip


class UsageTables:
    """LiteLLM's tables of use, read as a role that can do nothing else."""

    MOST_ROWS = 20_000

    def __init__(self, address: str, owner: pydantic.SecretStr, reader: pydantic.SecretStr) -> None:
        self._address = address
        self._passwords = {DATABASE_OWNER: owner, READER: reader}

    def rows(self, query: Sql) -> list[tuple[Any, ...]]:
        """What a SELECT without a limit of its own brings. Raises DatabaseError."""
        with database_errors():
            try:
                return self._read(query)
            except psycopg.errors.QueryCanceled:
                raise
            except (psycopg.OperationalError, psycopg.errors.InsufficientPrivilege):
                self._prepare()  # before its first use, or where LiteLLM made a table anew
            return self._read(query)

    def _read(self, query: Sql) -> list[tuple[Any, ...]]:
        text = f"{query.text}\nLIMIT {self.MOST_ROWS + 1}"
        with self._connected(READER) as connection:
            if connection.execute(HOURS_KEPT.encode()).fetchone() is None:
                raise psycopg.errors.InsufficientPrivilege("no sums by the hour")
            found = connection.execute(text.encode(), query.values).fetchall()
        if len(found) > self.MOST_ROWS:
            raise DatabaseError(
                f"That is more than {self.MOST_ROWS:,} rows.", advice="Choose a shorter range."
            )
        return found

    def _prepare(self) -> None:
        """The reader, and the sums by the hour."""
        with self._connected(DATABASE_OWNER) as connection:
            # Two at once would fail with "tuple concurrently updated".
            connection.execute("SELECT pg_advisory_xact_lock(hashtext(%s))", [READER])
            known = connection.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", [READER])
            if known.fetchone() is None:
                connection.execute(f"CREATE ROLE {READER} LOGIN".encode())
            # libpq sends it hashed, so that PostgreSQL's log never has it.
            password = self._passwords[READER].get_secret_value()
            connection.pgconn.change_password(READER.encode(), password.encode())
            connection.execute(KEEP_HOURS.encode())
            tables = ", ".join(f'"{table}"' for table in READER_TABLES)
            for statement in (
                f"ALTER ROLE {READER} SET default_transaction_read_only = on",
                f"ALTER ROLE {READER} SET statement_timeout = '{READER_SECONDS}s'",
                f"ALTER ROLE {READER} SET work_mem = '32MB'",  # for bitmaps of a million rows
                f"ALTER ROLE {READER} SET jit = off",
                f"GRANT USAGE ON SCHEMA llm_manager TO {READER}",
                f"GRANT SELECT ON {tables}, llm_manager.hours TO {READER}",
            ):
                connection.execute(statement.encode())

    def _connected(self, role: str) -> psycopg.Connection[tuple[Any, ...]]:
        return psycopg.connect(
            host=self._address,
            port=DATABASE_PORT,
            dbname="litellm",
            user=role,
            password=self._passwords[role].get_secret_value(),
            connect_timeout=5,
            sslmode="disable",  # it does not leave this server
            application_name=OWNER,
        )


@contextlib.contextmanager
def database_errors() -> Iterator[None]:
    """Turn every failure of PostgreSQL into one sentence; none of it repeats a password."""
    try:
        yield
    except psycopg.errors.QueryCanceled as error:
        raise DatabaseError(
            f"PostgreSQL did not have the answer within {READER_SECONDS} s.",
            advice="Choose a shorter range, or try again when the server has less to do.",
        ) from error
    except psycopg.OperationalError as error:
        raise DatabaseError(
            "PostgreSQL does not answer.",
            advice="Keys that were used lately go on working; look at its log, and run `apply`.",
        ) from error
    except (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedColumn) as error:
        raise DatabaseError(
            "LiteLLM's tables are not there as this program knows them.",
            advice="Wait until LiteLLM has started once; else pin the image that `image list` had.",
        ) from error
    except psycopg.Error as error:
        reason = (error.diag.message_primary or str(error)).splitlines()[0]
        raise DatabaseError(
            f"PostgreSQL refuses that: {reason}.", advice="Look at its log."
        ) from error


# =============================================================================
# §31 Energy records — effects: SQLite
# =============================================================================


# =============================================================================
# §32 Hub — effects: Hugging Face, downloads, and the cache on the disk
# =============================================================================

LOOK_SECONDS: Final = 10.0  # one request to the hub; a download has its own watchdog
POLL_SECONDS: Final = 0.25
WRITTEN_BYTES: Final = 256 * 1024  # of a file at a time
STALL_SECONDS: Final = 60.0
RETRY_SECONDS: Final = 2.0  # before the second attempt; doubles with each
LONGEST_RETRY_SECONDS: Final = 300.0
ATTEMPTS: Final = 5
STALLS: Final = 3
RATE_SECONDS: Final = 10.0
# Beside weights a server needs room for logs, images and its database.
DISK_MARGIN_BYTES: Final = 2**30
LARGEST_WITHOUT_XET: Final = 50 * 10**9  # huggingface_hub (2.4) refuses larger files over HTTP
WORKERS: Final = 4  # files at a time: a cancel loses the parts of so many
COMMIT: Final = re.compile(r"[0-9a-f]{40}")
FETCH_WEIGHTS: Final = "fetch-weights"  # the hidden command; see Transfer
# What a transfer may know of our environment: how to reach the network, no more.
PASSED_ON: Final = (
    "PATH", "LANG", "TMPDIR", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy",
    "https_proxy", "all_proxy", "no_proxy", "SSL_CERT_FILE", "SSL_CERT_DIR", "HF_ENDPOINT",
    "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "HOME", "LD_LIBRARY_PATH",
)  # fmt: skip


def find_endpoint() -> str:
    """`$HF_ENDPOINT`, such as a company's mirror, else the public hub."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


@contextlib.contextmanager
def hub_errors(wanted: Wanted, token: str | None) -> Iterator[None]:
    """Everything that `huggingface_hub` raises, as one of our kinds of trouble."""
    try:
        yield
    except (httpx2.HTTPError, OSError, ValueError, RuntimeError) as error:
        raise _trouble_of(error, wanted, token) from error


def _trouble_of(error: BaseException, wanted: Wanted, token: str | None) -> HubError:
    """The first cause that says something: the outer ones only say that nothing was found."""
    link: BaseException | None = error
    while link is not None:
        kind = _kind_of(link, token)
        if kind is not None:
            found = HubError(kind, wanted, _detail_of(link, kind))
            found.retry_seconds = _asked_for(link)
            return found
        link = link.__cause__ or link.__context__
    return HubError("broken", wanted, _short(error))


def _kind_of(error: BaseException, token: str | None) -> HubTrouble | None:
    errors = huggingface_hub.errors
    # A gated repository is one that is not found, to huggingface_hub: the order counts.
    known: tuple[tuple[type[BaseException], HubTrouble], ...] = (
        (errors.GatedRepoError, "gated"),
        (errors.RevisionNotFoundError, "revision"),
        (errors.RepositoryNotFoundError, "absent"),
        (errors.DisabledRepoError, "disabled"),
        (errors.OfflineModeIsEnabled, "offline"),
        (errors.HFValidationError, "name"),
        (httpx2.RemoteProtocolError, "broken"),
        (httpx2.ReadError, "broken"),
    )
    for category, kind in known:
        if isinstance(error, category):
            return kind
    if isinstance(error, errors.HfHubHTTPError):
        return _kind_of_status(error.response.status_code, token)
    if getattr(error, "errno", None) in DISK_FULL or "No space left" in str(error):
        return "disk"
    if isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.EROFS:
        return "files"
    reasons = (httpx2.HTTPError, ConnectionError, TimeoutError)
    return "unreachable" if isinstance(error, reasons) else None


DISK_FULL: Final = (errno.ENOSPC, errno.EDQUOT)


def _kind_of_status(status: int, token: str | None) -> HubTrouble:
    # To somebody without a token, a private repository and none look the same.
    refused: HubTrouble = "token" if token else "absent"
    codes = httpx2.codes
    known: dict[int, HubTrouble] = {
        codes.UNAUTHORIZED: refused, codes.FORBIDDEN: refused, codes.NOT_FOUND: "absent",
        codes.TOO_MANY_REQUESTS: "rate",
    }  # fmt: skip
    return known.get(status, "server")


def _detail_of(error: BaseException, kind: HubTrouble) -> str:
    response = getattr(error, "response", None)
    if response is not None:
        return f"status {response.status_code}" if kind in {"server", "rate"} else ""
    return _short(error) if kind in {"unreachable", "broken", "files"} else ""


def _short(error: BaseException) -> str:
    """One line without addresses' queries: a signed address opens what it names."""
    words = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r"\?\S+|hf_\w+|(?<=//)[^/@\s]+(?=@)", "…", words)[:200].rstrip(".")


def _asked_for(error: BaseException) -> float | None:
    """Seconds until the hub wants to hear from us again, if it said so."""
    response = getattr(error, "response", None)
    if response is None:
        return None
    for header, pattern in (("Retry-After", r"(\d+)"), ("RateLimit", r".*;t=(\d+).*")):
        found = re.fullmatch(pattern, response.headers.get(header, ""))
        if found:
            return float(found[1])
    return None


def inspect_directory(path: Path) -> RepositoryFacts:
    """What a directory of weights says of itself; exact, from its safetensors' headers."""
    with file_errors(f"read {path}", PLACE_ADVICE):
        files, broken = _files_under(path)
        if not files or broken:
            what = f"{path}/{broken[0]} leads nowhere." if broken else f"{path} holds no files."
            raise RefusedError(what, advice="Name a directory with config.json and weights.")
        parameters: Counter[str] = Counter()
        for file in files_needed(files):
            if file.suffix == ".safetensors":
                parameters += _parameters_of(path / file.path)
        config = _read_json(path / "config.json")
        changed = max((path / file.path).stat().st_mtime for file in files)
    return RepositoryFacts(
        repository=str(path),
        updated_at=datetime.fromtimestamp(changed, UTC),
        files=files,
        parameters=dict(parameters),
        config=config,
    )


def refuse_links_out(path: Path) -> None:
    """A container sees the directory alone: what its links mean elsewhere is not there."""
    with file_errors(f"look into {path}", PLACE_ADVICE):
        home = path.resolve()
        astray = [
            link.name for link in path.rglob("*")
            if link.is_symlink() and not link.resolve().is_relative_to(home)
        ]  # fmt: skip
    if astray:
        raise RefusedError(
            f"{path} holds links that lead out of it, such as {astray[0]}.",
            advice="Register the repository by its name, or copy the directory with `cp -rL`.",
        )


def _parameters_of(path: Path) -> Counter[str]:
    """Parameters by dtype from a safetensors header; refused where the file is not whole."""
    found: Counter[str] = Counter()
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(min(length, size)))
            header.pop("__metadata__", None)
            for tensor in header.values():
                found[tensor["dtype"]] += math.prod(tensor["shape"])
            end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        except (ValueError, LookupError, TypeError, AttributeError):
            end = -1
    if end < 0 or 8 + length + end != size:
        raise RefusedError(f"{path} is not whole.", advice="Copy or download it again.")
    return found


def _files_under(directory: Path) -> tuple[tuple[RepositoryFile, ...], tuple[str, ...]]:
    """Its files, and the links among them that lead nowhere; no linked directory is entered."""
    files: list[RepositoryFile] = []
    broken: list[str] = []
    for parent, _, names in os.walk(directory):
        for name in names:
            path = Path(parent, name)
            relative = path.relative_to(directory).as_posix()
            try:
                files.append(RepositoryFile(path=relative, size_bytes=path.stat().st_size))
            except OSError:  # a link to nothing, or to itself
                broken.append(relative)
    return tuple(sorted(files, key=lambda file: file.path)), tuple(sorted(broken))


def _stamp(folder: Path) -> tuple[int, ...]:
    """Changes whenever files of a cached repository come, go, or mean something else."""
    watched = (folder / "blobs", folder / "trees", folder / "snapshots", folder / "refs")
    paths = [*watched, *(folder / "snapshots").glob("*"), *(folder / "refs").rglob("*")]
    return tuple(path.stat().st_mtime_ns if path.exists() else 0 for path in sorted(paths))


def _texts(found: object, *, values: bool = False) -> list[str]:
    """Texts in a list, or an object's keys or values; a damaged file may hold anything."""
    several = found.values() if values and isinstance(found, dict) else found
    return (
        [each for each in several if isinstance(each, str)]
        if isinstance(several, Collection) and not isinstance(several, str)
        else []
    )


def _read_json(path: Path) -> Json:
    """Its object; empty where there is none, or no JSON."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class Claims:
    """Who downloads what into one cache, and how many bytes are still to come: all processes'."""

    def __init__(self, home: Path, free: Callable[[Path], int], margin_bytes: int) -> None:
        self._hub = home / "hub"  # often a link to another disk
        self._directory = home / ".llm-manager"
        self._free = free
        self._margin_bytes = margin_bytes

    @contextlib.contextmanager
    def claim(self, repository: str) -> Iterator[IO[str]]:
        """Be the only one, of all processes, that changes this repository here."""
        path = self._directory / folder_name(repository)
        with self._counting():
            handle = take_lock(path)
        if handle is None:
            raise BusyError(
                f"{repository} is being downloaded or removed already.",
                advice="Wait until that is done, or cancel it.",
            )
        try:
            yield handle
        finally:
            with self._counting(), handle:
                path.unlink(missing_ok=True)

    def reserve(self, claim: IO[str], wanted: Wanted, needed_bytes: int) -> None:
        """Set room aside that no other download may count on; refused where there is too little."""
        with self._counting():
            self.still_to_come(claim, 0)
            others = sum(self.held(counted=True).values())
            free = self._free(self._hub)
            if needed_bytes + others + self._margin_bytes > free:
                raise HubError(
                    "disk", wanted,
                    f"{format_size(needed_bytes)} to come, {format_size(free)} free, "
                    f"{format_size(others)} of that for other downloads",
                )  # fmt: skip
            self.still_to_come(claim, needed_bytes)

    @staticmethod
    def still_to_come(claim: IO[str], needed_bytes: int) -> None:
        os.pwrite(claim.fileno(), b"%020d" % needed_bytes, 0)

    @contextlib.contextmanager
    def _counting(self) -> Iterator[None]:
        """One process at a time looks at claims, or a look would pass for a claim."""
        with file_errors("reserve room for weights", PLACE_ADVICE):
            self._hub.mkdir(exist_ok=True)  # its home may be a disk that is not mounted
            self._directory.mkdir(mode=0o700, exist_ok=True)
            mutex = take_lock(self._directory / "mutex", wait=True)
        with mutex or contextlib.nullcontext():
            yield

    def held(self, *, counted: bool = False) -> dict[str, int]:
        """Bytes still to come of every repository that somebody downloads or removes."""
        if not self._directory.is_dir():
            return {}
        with contextlib.nullcontext() if counted else self._counting():
            found = {}
            for path in self._directory.glob("models--*"):
                handle = take_lock(path)
                if handle is None:
                    found[_repository_of(path)] = int(path.read_text() or 0)
                else:
                    handle.close()
            return found


class HubCache:
    """The Hugging Face cache below a home like HF_HOME; needs neither network nor their library.

    `huggingface_hub`'s own scan leaves out a repository with one broken link: an operator must
    see exactly that one.
    """

    def __init__(
        self,
        home: Path,
        *,
        free: Callable[[Path], int] = free_bytes,
        margin_bytes: int = DISK_MARGIN_BYTES,
    ) -> None:
        self.home = home
        self.hub = home / "hub"
        self.claims = Claims(home, free, margin_bytes)
        self._free = free
        self._whole: dict[str, tuple[tuple[int, ...], frozenset[str]]] = {}  # by folder

    def folder(self, repository: str) -> Path:
        """Where the repository is kept; always a direct child of the cache."""
        return self.hub / folder_name(repository)

    def commit(self, repository: str, revision: str | None = None) -> str | None:
        """What a branch or tag meant when it was downloaded last; a commit is itself."""
        if revision and COMMIT.fullmatch(revision):
            return revision
        try:
            path = self.folder(repository) / "refs" / (revision or "main")
            text = path.read_text(errors="replace").strip()
        except OSError:
            return None
        return text if COMMIT.fullmatch(text) else None

    def present(self, repository: str, revision: str | None = None) -> bool:
        """Whether an engine could start from it offline; a look of milliseconds."""
        commit = self.commit(repository, revision)
        try:
            return commit is not None and not self._missing(self.folder(repository), commit)
        except OSError:
            return False

    def stored(self) -> dict[str, frozenset[str]]:
        """Every whole revision by repository: its commit, and the names that mean it.

        Cheap enough for every look at the server: a folder is read again only when it changed.
        """
        found: dict[str, frozenset[str]] = {}
        for folder in self._folders():
            with contextlib.suppress(OSError):  # it changes, or is somebody else's
                stamp = _stamp(folder)
                if self._whole.get(folder.name, ((), frozenset()))[0] != stamp:
                    self._whole[folder.name] = stamp, self._whole_revisions(folder)
                found[_repository_of(folder)] = self._whole[folder.name][1]
        return found

    def _whole_revisions(self, folder: Path) -> frozenset[str]:
        whole = {commit for commit in _commits(folder) if not self._missing(folder, commit)}
        named = {ref for ref, commit in _refs(folder).items() if commit in whole}
        return frozenset(whole | named)

    def inspect(self, repository: str, revision: str | None = None) -> RepositoryFacts | None:
        """What the cache knows of it, where it is present."""
        commit = self.commit(repository, revision)
        if commit is None or not self.present(repository, commit):
            return None
        facts = inspect_directory(self.folder(repository) / "snapshots" / commit)
        return replace(facts, repository=repository, commit=commit, revision=revision)

    def _missing(self, folder: Path, commit: str) -> tuple[str, ...]:
        snapshot = folder / "snapshots" / commit
        files, broken = _files_under(snapshot)
        shards = {
            file.path: tuple(
                {*_texts(_read_json(snapshot / file.path).get("weight_map"), values=True)}
            )
            for file in files
            if file.name.endswith(".index.json")
        }
        listed = _texts(_read_json(folder / "trees" / f"{commit}.json").get("files"))
        tree = [RepositoryFile(path=path, size_bytes=0) for path in listed] or None
        return tuple(dict.fromkeys((*broken, *missing_files(files, tree, shards))))

    def read(self) -> WeightsCache:
        """All there is; what is being written at the moment is no leftover."""
        revisions: list[CachedRevision] = []
        leftovers: list[Leftover] = []
        with file_errors("read the cache of weights", PLACE_ADVICE):
            for folder in self._folders():
                known = self._revisions(folder)
                revisions += known
                leftovers += self._leftovers(folder, {b for r in known for b in r.blobs})
            free = self._free(self.hub) if self.hub.exists() else None
            downloading = frozenset(self.claims.held())
        return WeightsCache(
            revisions=tuple(revisions),
            leftovers=tuple(f for f in leftovers if f.repository not in downloading),
            downloading=downloading,
            free_bytes=free,
        )

    def _folders(self) -> list[Path]:
        found = sorted(self.hub.glob("models--*")) if self.hub.is_dir() else []
        return [folder for folder in found if folder.is_dir() and not folder.is_symlink()]

    def _revisions(self, folder: Path) -> list[CachedRevision]:
        refs = _refs(folder)
        return [
            self._revision(folder, commit, tuple(ref for ref in refs if refs[ref] == commit))
            for commit in _commits(folder)
        ]

    def _revision(self, folder: Path, commit: str, refs: tuple[str, ...]) -> CachedRevision:
        snapshot = folder / "snapshots" / commit
        files, _ = _files_under(snapshot)
        blobs: dict[str, int] = {}
        used = 0.0
        for file in files:
            path = snapshot / file.path
            # One link only is followed: a blob may itself be a link to a shared one.
            target = path.parent / path.readlink() if path.is_symlink() else path
            blob = Path(os.path.normpath(target))
            if blob.is_relative_to(self.hub):
                blobs[str(blob.relative_to(self.hub))] = file.size_bytes
                used = max(used, blob.stat().st_atime)
        return CachedRevision(
            repository=_repository_of(folder),
            commit=commit,
            refs=refs,
            blobs=blobs,
            files=len(files),
            missing=self._missing(folder, commit),
            used_at=datetime.fromtimestamp(used, UTC) if used else None,
        )

    def _leftovers(self, folder: Path, used: Collection[str]) -> list[Leftover]:
        blobs = folder / "blobs"
        found = []
        for path in sorted(blobs.iterdir()) if blobs.is_dir() else []:
            name = str(path.relative_to(self.hub))
            if name not in used and not self._is_being_written(path):
                size = path.stat().st_size if path.exists() else 0
                found.append(
                    Leftover(repository=_repository_of(folder), path=name, size_bytes=size)
                )
        return found

    def _is_being_written(self, blob: Path) -> bool:
        """`huggingface_hub` holds a lock per blob as long as it writes it."""
        locks = self.hub / ".locks" / blob.parent.parent.name
        lock = locks / f"{blob.name.split('.')[0]}.lock"
        if not lock.exists():
            return False
        try:
            handle = take_lock(lock)
        except PermissionError:
            return True  # another user's
        if handle is not None:
            handle.close()
        return handle is None

    def remove(self, removal: Removal) -> None:
        """Take away what was planned and nothing else; refused while it is being downloaded."""
        folder = self.folder(removal.repository)
        with self.claims.claim(removal.repository), file_errors("remove weights", PLACE_ADVICE):
            if folder.is_symlink() or not folder.is_dir():
                return
            known = self._revisions(folder)
            gone = [r for r in known if r.commit in removal.commits]
            kept = {blob for r in known if r not in gone for blob in r.blobs}
            for revision in gone:
                _forget_revision(folder, revision)
            blobs = {b for r in gone for b in r.blobs} | {*removal.leftovers}
            for path in sorted(self.hub / blob for blob in blobs - kept):
                if path.parent == folder / "blobs" and not self._is_being_written(path):
                    self._remove_blob(path)
            if not self._revisions(folder) and not any((folder / "blobs").glob("*")):
                shutil.rmtree(folder)
                shutil.rmtree(self.hub / ".locks" / folder.name, ignore_errors=True)

    def _remove_blob(self, path: Path) -> None:
        """A blob that other repositories share goes with its last link."""
        shared, target = path.is_symlink(), path.resolve()
        path.unlink(missing_ok=True)
        if not shared or not target.is_relative_to(self.hub.resolve() / "blobs"):
            return
        links = (link for folder in self._folders() for link in (folder / "blobs").glob("*"))
        if not any(link.is_symlink() and link.resolve() == target for link in links):
            target.unlink(missing_ok=True)
            target.with_name(f"{target.name}.refs").unlink(missing_ok=True)

    def sweep(self, repository: str) -> None:
        """Remove what broken-off transfers left: no later one goes on from a part of a file."""
        folder = self.folder(repository)
        with file_errors("clear up after a download", PLACE_ADVICE):
            for path in (folder / "blobs").glob("*.incomplete"):
                if not self._is_being_written(path):
                    path.unlink(missing_ok=True)


def _commits(folder: Path) -> list[str]:
    """The revisions of a cached repository that have a directory of their own."""
    return [
        path.name
        for path in sorted((folder / "snapshots").glob("*"))
        if COMMIT.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
    ]


def _refs(folder: Path) -> dict[str, str]:
    """The commit that each branch or tag meant when it was downloaded; damaged ones mean none."""
    return {
        path.relative_to(folder / "refs").as_posix(): path.read_text(errors="replace").strip()
        for path in sorted((folder / "refs").rglob("*"))
        if path.is_file()
    }


def folder_name(repository: str) -> str:
    return f"models--{repository.replace('/', '--')}"


def _repository_of(folder: Path) -> str:
    return folder.name.removeprefix("models--").replace("--", "/")


def _forget_revision(folder: Path, revision: CachedRevision) -> None:
    for ref in revision.refs:
        (folder / "refs" / ref).unlink(missing_ok=True)
    shutil.rmtree(folder / "snapshots" / revision.commit)  # removes links, follows none
    (folder / "trees" / f"{revision.commit}.json").unlink(missing_ok=True)
    shutil.rmtree(folder / ".no_exist" / revision.commit, ignore_errors=True)


class HuggingFace:
    """The hub, at `$HF_ENDPOINT` and with `$HF_HUB_OFFLINE` as they are at each call."""

    def __init__(
        self,
        cache: HubCache,
        token: Callable[[], pydantic.SecretStr | None],
        *,
        stall_seconds: float = STALL_SECONDS,
        retry_seconds: float = RETRY_SECONDS,
    ) -> None:
        self.cache = cache
        self.stall_seconds = stall_seconds
        self.retry_seconds = retry_seconds
        self._token = token

    def token(self) -> str | None:
        """The stored one, else the environment's; the only place where it is plain text."""
        stored = self._token()
        return stored.get_secret_value() if stored else os.environ.get("HF_TOKEN") or None

    def search(
        self, text: str, *, kind: ModelType | None = None, limit: int = 20
    ) -> tuple[RepositoryHit, ...]:
        """The most downloaded repositories whose names hold the text."""
        wanted = Wanted(endpoint=find_endpoint(), repository=text or "the search")
        if is_offline():
            raise HubError("offline", wanted)
        query = {
            "search": text, "sort": "downloads", "limit": limit,
            "expand[]": ("downloads", "likes", "lastModified", "pipeline_tag", "library_name",
                         "gated", "safetensors"),
        }  # fmt: skip
        tags = [{"pipeline_tag": tag} for tag, type_ in PIPELINES.items() if type_ == kind]
        answers = [self._get("/api/models", wanted, **query, **tag) for tag in tags or [{}]]
        with understood(wanted):
            hits = [_hit(found) for answer in answers for found in answer]
        return tuple(sorted(hits, key=lambda hit: -(hit.downloads or 0))[:limit])

    def inspect(self, repository: str, revision: str | None = None) -> RepositoryFacts:
        """All that is worth knowing before a download; offline, what the cache knows."""
        wanted = self._wanted(repository, revision)
        if is_offline():
            cached = self.cache.inspect(repository, revision)
            if cached is None:
                raise HubError("offline", wanted)
            return cached
        found = self._ask(wanted, revision, blobs="true")
        with understood(wanted):
            facts = _facts(found, repository, revision)
        if not any(file.path == "config.json" for file in facts.files):
            return facts
        try:
            config = self._get(f"/{repository}/resolve/{facts.commit}/config.json", wanted)
        except HubError as error:
            if error.kind not in {"gated", "token", "absent"}:
                raise
            return replace(facts, readable=False)
        return replace(facts, config=config if isinstance(config, dict) else {})

    def resolve(self, repository: str, revision: str | None = None) -> str:
        """The commit that a branch or tag means now; offline, at the last download."""
        wanted = self._wanted(repository, revision)
        if is_offline():
            known = self.cache.commit(repository, revision)
            if known is None:
                raise HubError("offline", wanted)
            return known
        return str(self._ask(wanted, revision)["sha"])

    def download(
        self,
        repository: str,
        revision: str | None = None,
        *,
        kind: ModelType | None = None,
        on_progress: Callable[[DownloadProgress], None],
        check: Callable[[], None],
    ) -> str:
        """Fetch what an engine needs and return its commit; `check` raises to cancel.

        It goes on where an earlier one ended, by whole files: of a file that was broken off,
        `huggingface_hub` (2.4) begins anew. Sizes are checked, contents only by its transport.
        """
        wanted = self._wanted(repository, revision)
        if is_offline():
            commit = self.cache.commit(repository, revision)
            if commit is None or not self.cache.present(repository, commit):
                raise HubError("offline", wanted)
            return commit
        if COMMIT.fullmatch(revision or "") and self.cache.present(repository, revision):
            return revision or ""
        with self.cache.claims.claim(repository) as claim:
            try:
                return Download(self, wanted, revision, kind, claim).run(on_progress, check)
            finally:
                with contextlib.suppress(ManagerError):  # it must not hide what went wrong
                    self.cache.sweep(repository)

    @staticmethod
    def _wanted(repository: str, revision: str | None) -> Wanted:
        wanted = Wanted(
            endpoint=find_endpoint(), repository=repository, revision=revision or "main"
        )
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", repository) or (
            "--" in repository or ".." in repository
        ):
            raise HubError("name", wanted)
        if ".." in wanted.revision:  # it becomes a path in the cache
            raise HubError("revision", wanted)
        return wanted

    def _ask(self, wanted: Wanted, revision: str | None, **parameters: str) -> Json:
        at = f"/revision/{quote(revision, safe='')}" if revision else ""
        found = self._get(f"/api/models/{wanted.repository}{at}", wanted, **parameters)
        if isinstance(found, dict) and COMMIT.fullmatch(str(found.get("sha"))):
            return found
        raise HubError("server", wanted, "its answer names no commit")

    def _get(self, path: str, wanted: Wanted, **parameters: Any) -> Any:
        token = self.token()
        with hub_errors(wanted, token):
            session = huggingface_hub.get_session()
            hub_utils: Any = huggingface_hub.utils  # public, though not typed so
            answer = session.get(
                f"{wanted.endpoint}{path}",
                params=parameters,
                # Not theirs: making those asks the hub for a list of agents, to report ours.
                headers={"User-Agent": OWNER}
                | ({"Authorization": f"Bearer {token}"} if token else {}),
                timeout=LOOK_SECONDS,
            )
            hub_utils.hf_raise_for_status(answer)
            try:
                return answer.json()
            except ValueError as error:
                raise HubError("server", wanted, "its answer is no JSON") from error


@contextlib.contextmanager
def understood(wanted: Wanted) -> Iterator[None]:
    """A mirror may answer anything."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise HubError("server", wanted, "its answer is not understood") from error


def _hit(found: Json) -> RepositoryHit:
    stored = (found.get("safetensors") or {}).get("parameters") or {}
    size = sum(count * DTYPE_BYTES.get(dtype, 1) for dtype, count in stored.items())
    gated = found.get("gated")
    return RepositoryHit(
        repository=found["id"],
        downloads=found.get("downloads"),
        likes=found.get("likes"),
        updated_at=parse_moment(found.get("lastModified")),
        pipeline_tag=found.get("pipeline_tag"),
        library=found.get("library_name"),
        gated=None if gated is None else bool(gated),
        weights_bytes=int(size) or None,
    )


def _facts(found: Json, repository: str, revision: str | None) -> RepositoryFacts:
    licence = (found.get("cardData") or {}).get("license")
    return RepositoryFacts(
        repository=repository,
        commit=found["sha"],
        revision=revision,
        private=found.get("private"),
        gated=found.get("gated"),
        licence=str(licence) if licence else None,
        updated_at=parse_moment(found.get("lastModified")),
        pipeline_tag=found.get("pipeline_tag"),
        library=found.get("library_name"),
        tags=tuple(found.get("tags") or ()),
        files=tuple(
            RepositoryFile(
                path=sibling["rfilename"],
                size_bytes=sibling.get("size") or 0,
                blob=(sibling.get("lfs") or {}).get("sha256") or sibling.get("blobId"),
            )
            for sibling in found.get("siblings") or ()
        ),
        parameters=(found.get("safetensors") or {}).get("parameters") or {},
        config=found.get("config") or {},
    )


def _bytes_by_blob(blobs: Path) -> dict[str, int]:
    """What is on the disk of each, complete or not."""
    sizes: dict[str, int] = {}
    with contextlib.suppress(FileNotFoundError):  # also of a file renamed while we look
        for entry in os.scandir(blobs):
            seen = entry.stat()
            # A file that was given its length before its bytes is mostly hole.
            part = entry.name.endswith(".incomplete")
            size = min(seen.st_size, seen.st_blocks * 512) if part else seen.st_size
            name = entry.name.split(".")[0]
            sizes[name] = max(size, sizes.get(name, 0))
    return sizes


class Download:
    """One download from the first look to the last byte, in as many attempts as it takes."""

    def __init__(
        self,
        hub: HuggingFace,
        wanted: Wanted,
        revision: str | None,
        kind: ModelType | None,
        claim: IO[str],
    ) -> None:
        self._hub, self._claims = hub, hub.cache.claims
        self._folder = hub.cache.folder(wanted.repository)
        self._wanted, self._revision, self._kind = wanted, revision, kind
        self._claim = claim
        self._files: tuple[RepositoryFile, ...] = ()
        self._commit = "-"
        self._attempts = 1
        self._xet = True
        self._samples: deque[tuple[float, int]] = deque()

    def run(
        self, on_progress: Callable[[DownloadProgress], None], check: Callable[[], None]
    ) -> str:
        """Try until it is here; give up when nothing gets done several times in a row."""

        def look(note: str = "") -> int:
            check()
            sizes = _bytes_by_blob(self._folder / "blobs")
            on_progress(self._progress(sizes, note))
            return sum(sizes.values())

        tries = stalls = 0
        while True:
            before = self._complete()
            try:
                return self._attempt(look)
            except HubError as error:
                if error.kind not in TRANSIENT:
                    raise
                if self._complete() > before:
                    tries = stalls = 0
                tries, stalls = tries + 1, stalls + (error.kind == "stalled")
                if tries == ATTEMPTS or stalls == STALLS:
                    raise
                if error.kind == "stalled" and self._fits_http():
                    self._xet = False
                self._pause(tries, error, look)
            self._attempts += 1

    def _fits_http(self) -> bool:
        return all(file.size_bytes <= LARGEST_WITHOUT_XET for file in self._files)

    def _complete(self) -> int:
        """Bytes of whole files, which no later attempt must fetch again."""
        return sum(file.size_bytes for file in self._files if self._has(file))

    def _has(self, file: RepositoryFile) -> bool:
        """By its content's name; or by path, where a mirror has names of its own."""
        blob = self._folder / "blobs" / (file.blob or "-")
        return blob.exists() or (self._folder / "snapshots" / self._commit / file.path).exists()

    def _attempt(self, look: Callable[[], int]) -> str:
        facts = self._inspect(look)
        self._commit = str(facts.commit)
        self._files = files_needed(facts.files, self._kind or guess_type(facts))
        if not any(file.suffix in WEIGHTS for file in self._files):
            raise RefusedError(
                f"{self._wanted.repository} holds no weights.", advice="Choose another repository."
            )
        needed = sum(file.size_bytes for file in self._files) - self._complete()
        self._claims.reserve(self._claim, self._wanted, needed)
        self._samples.clear()
        request = {
            "wanted": asdict(self._wanted) | {"revision": facts.commit},
            "token": self._hub.token(),
            "cache": str(self._folder.parent),
            "files": [file.path for file in self._files],
        }
        with Transfer(request, self._folder.parent.parent, xet=self._xet) as transfer:
            self._follow(transfer, look)
            fault = transfer.fault(self._wanted)
        if fault is not None:
            raise fault
        with file_errors("finish a download"):
            missing = self._settle(facts)
        if missing:
            raise HubError("broken", self._wanted, f"{missing[0]} is missing")
        look()
        return self._commit

    def _inspect(self, look: Callable[[], int]) -> RepositoryFacts:
        """A hub that answers nothing must not hold up a cancel."""
        pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="hub-look")
        asked = pool.submit(self._hub.inspect, self._wanted.repository, self._revision)
        pool.shutdown(wait=False)
        while not asked.done():
            look()
            concurrent.futures.wait([asked], POLL_SECONDS)
        return asked.result()

    def _settle(self, facts: RepositoryFacts) -> list[str]:
        """What is still missing; where nothing is, the branch points at what was fetched."""
        folder, commit = self._folder, self._commit
        snapshot = folder / "snapshots" / commit
        missing = [
            file.path
            for file in self._files
            if not (path := snapshot / file.path).exists()
            or path.stat().st_size != (file.size_bytes or path.stat().st_size)
        ]
        if missing:
            return missing
        if len(self._files) < len(facts.files):
            # With the whole list in reach, an offline engine would ask for the files left out.
            (folder / "trees" / f"{commit}.json").unlink(missing_ok=True)
        if not COMMIT.fullmatch(self._wanted.revision):
            ref = folder / "refs" / self._wanted.revision
            ref.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(ref, commit)
            ref.chmod(0o644)  # engines need not run as our user
        return []

    def _follow(self, transfer: Transfer, look: Callable[[], int]) -> None:
        """Watch until it ends; a transfer that stands still is an error."""
        seen, moved_at = -1, time.monotonic()
        while transfer.is_running():
            done = look()
            now = time.monotonic()
            if done != seen:
                seen, moved_at = done, now
            elif now - moved_at > self._hub.stall_seconds:
                words = f"for {format_duration(now - moved_at)}; {transfer.last_words()}"
                raise HubError("stalled", self._wanted, words.removesuffix("; "))

    def _progress(self, sizes: Mapping[str, int], note: str) -> DownloadProgress:
        progress = DownloadProgress(
            repository=self._wanted.repository,
            files=tuple(
                FileProgress(
                    path=file.path,
                    bytes_done=file.size_bytes
                    if self._has(file)
                    else min(sizes.get(file.blob or "", 0), file.size_bytes),
                    bytes_total=file.size_bytes,
                )
                for file in self._files
            ),
            attempt=self._attempts,
            note=note,
        )
        if self._files:
            self._claims.still_to_come(self._claim, progress.bytes_total - progress.bytes_done)
        now, samples = time.monotonic(), self._samples
        samples.append((now, progress.bytes_done))
        while now - samples[0][0] > RATE_SECONDS:
            samples.popleft()
        seconds, fetched = now - samples[0][0], progress.bytes_done - samples[0][1]
        if note or seconds < 1 or fetched < 0:
            return progress
        return replace(progress, bytes_per_second=fetched / seconds)

    def _pause(self, tries: int, error: HubError, look: Callable[[str], int]) -> None:
        """Wait as long as the hub asked for, else longer each time."""
        wait = error.retry_seconds or self._hub.retry_seconds * 2 ** (tries - 1)
        until = time.monotonic() + min(wait, LONGEST_RETRY_SECONDS)
        note = f"{error.fact} Trying again"
        note += "" if self._xet else " without Xet"
        while (left := until - time.monotonic()) > 0:
            look(f"{note} in {format_duration(left + 1)}.")
            time.sleep(min(POLL_SECONDS, left))


class Transfer:
    """One run of our own hidden command that calls `snapshot_download`.

    A process of its own can be killed, restarted without Xet, and cannot leave threads behind.
    It ends when this one does, however that ends: the pipe to it closes.
    """

    def __init__(self, request: Json, home: Path, *, xet: bool) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        self._process = subprocess.Popen(  # noqa: S603 - our own program
            [sys.executable, str(PROGRAM), FETCH_WEIGHTS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            start_new_session=True,  # Ctrl-C is for us to answer
            env=environment
            | {
                "HF_HOME": str(home),
                "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                # A store shared by repositories would make sizes and removals ambiguous.
                "HF_HUB_DISABLE_SHARED_BLOBS": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "HF_HUB_DISABLE_UPDATE_CHECK": "1",
                "HF_HUB_DISABLE_XET": "0" if xet else "1",
            },
        )
        with contextlib.suppress(BrokenPipeError):  # it died: its status says so
            self._pipe.write(json.dumps(request).encode() + b"\n")
            self._pipe.flush()

    @property
    def _pipe(self) -> IO[bytes]:
        assert self._process.stdin is not None  # noqa: S101 - for the type checker
        return self._process.stdin

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._said):
            with contextlib.suppress(BrokenPipeError):
                stream.close() if stream else None

    def is_running(self) -> bool:
        """Wait a moment for its end."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(POLL_SECONDS)
        return self._process.returncode is None

    def fault(self, wanted: Wanted) -> HubError | None:
        """Why it ended early; None where it did all."""
        said = self._process.stdout.read() if self._process.stdout else b""
        if self._process.returncode == 0:
            return None
        try:
            told = json.loads(said)
        except ValueError:
            return HubError("broken", wanted, self.last_words() or "its process was ended")
        error = HubError(told["kind"], wanted, told["detail"])
        error.retry_seconds = told["retry_seconds"]
        return error

    def last_words(self) -> str:
        # Not read(): the place in the file is shared with the process that writes it.
        handle = self._said.fileno()
        said = os.pread(handle, 4096, max(os.fstat(handle).st_size - 4096, 0))
        lines = said.decode(errors="replace").split("\n")
        line = next((line for line in reversed(lines) if line.strip()), "")
        return _short(ValueError(line)) if line else ""


def fetch_weights() -> HubError | None:
    """The other end of Transfer: do what standard input asks for; end when it closes."""
    request = json.loads(sys.stdin.readline())

    def end_with_parent() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    wanted = Wanted(**request["wanted"])
    # Its 10 MiB (2.4) stand still for a minute on a slow line, which would look like a stall.
    constants: Any = import_module("huggingface_hub.constants")
    constants.DOWNLOAD_CHUNK_SIZE = WRITTEN_BYTES
    try:
        with hub_errors(wanted, request["token"]):
            huggingface_hub.snapshot_download(
                wanted.repository,
                revision=wanted.revision,
                cache_dir=request["cache"],
                endpoint=wanted.endpoint,
                token=request["token"] or False,
                max_workers=WORKERS,
                allow_patterns=[glob.escape(path) for path in request["files"]],
            )
    except HubError as error:
        return error
    return None


# =============================================================================
# §33 Drivers — effects: NVML, and what the system knows about GPUs
# =============================================================================


class GpuDriver(Protocol):
    """What the manager needs from the NVIDIA driver; every answer is a value."""

    def read(self, *, fresh: bool = False) -> Hardware: ...
    def set_mig_mode(self, gpu: GpuUuid, *, enabled: bool) -> None: ...
    def create_slice(self, gpu: GpuUuid, wanted: Slice) -> None: ...
    def destroy_slice(self, gpu: GpuUuid, wanted: Slice) -> None: ...
    def refresh_cdi(self) -> None: ...


HARDWARE_SECONDS: Final = 5.0
ARCHITECTURES: Final = {
    2: "Kepler", 3: "Maxwell", 4: "Pascal", 5: "Volta", 6: "Turing", 7: "Ampere", 8: "Ada",
    9: "Hopper", 10: "Blackwell",
}  # fmt: skip
ANCESTORS: Final[Mapping[int, LinkKind]] = {
    0: "board", 10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"
}  # fmt: skip
MOST_PROFILES: Final = 64  # NVML knows 18; the end of the list is an error we wait for
MOST_LINKS: Final = 36
NO_INSTANCE: Final = 0xFFFFFFFF
MODE_ATTEMPTS: Final = 3


class NvmlGpus:
    """GPUs through NVML.

    The library is open only while it is asked: an open one is a client of every GPU, and would
    itself keep an Ampere card from the reset that its MIG mode needs.
    """

    def __init__(
        self, geometries: Mapping[str, MigGeometry], system: GpuSystem, *, pause: float = 1.0
    ) -> None:
        self._tables = geometries
        self._system = system
        self._pause = pause  # seconds before a mode is tried once more
        self._geometries: dict[tuple[str, bool], MigGeometry] = {}
        self._lock = threading.RLock()
        self._linked: tuple[Any, Mapping[frozenset[GpuUuid], Link]] = ((), {})
        self._latest: Hardware | None = None
        self._taken = 0.0

    def read(self, *, fresh: bool = False) -> Hardware:
        """What there is now, at most some seconds old unless it must be fresh; never raises."""
        with self._lock:
            now = time.monotonic()
            if fresh or self._latest is None or now - self._taken > HARDWARE_SECONDS:
                self._latest, self._taken = self._look(), now
            return self._latest

    def _look(self) -> Hardware:
        system = self._system
        hardware = Hardware(
            kernel_version=system.kernel_version(),
            library_version=system.library_version(),
            uses_cdi=bool(system.cdi_text()),
        )
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            return replace(hardware, fault=_why_no_driver(error, self._system))
        try:
            return self._fill(hardware)
        except pynvml.NVMLError as error:
            return replace(hardware, fault=_nvml_fault("be read", error))
        finally:
            pynvml.nvmlShutdown()

    def _fill(self, hardware: Hardware) -> Hardware:
        holders, xids = self._system.holders(), self._system.xids()
        gpus: list[Gpu] = []
        lost: list[str] = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            try:
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                gpus.append(self._gpu(handle, index, holders, xids))
            except pynvml.NVMLError as error:
                lost.append(f"GPU {index} does not answer: {error}.")
        slices = [device.uuid for gpu in gpus for device in gpu.slices or () if device.uuid]
        return replace(
            hardware,
            gpus=tuple(gpus),
            links=self._links_of(gpus),
            mig_manager=self._system.enabled("nvidia-mig-manager.service") is True,
            cdi_missing=self._system.cdi_missing(slices),
            lost=tuple(lost),
            driver_version=_text(_ask(pynvml.nvmlSystemGetDriverVersion)),
            cuda_version=_cuda_version(_ask(pynvml.nvmlSystemGetCudaDriverVersion_v2)),
        )

    def _links_of(self, gpus: Sequence[Gpu]) -> Mapping[frozenset[GpuUuid], Link]:
        """Asked once for each set of whole and cut GPUs: a thousand calls on eight of them."""
        key = tuple((gpu.uuid, gpu.mig_enabled) for gpu in gpus)
        if key != self._linked[0]:
            self._linked = key, _links(gpus)
        return self._linked[1]

    def _gpu(
        self, handle: Any, index: int, holders: Mapping[int, Sequence[int]],
        xids: Mapping[str, tuple[int, ...]] | None,
    ) -> Gpu:  # fmt: skip
        uuid = GpuUuid(_text(pynvml.nvmlDeviceGetUUID(handle)) or "")
        memory = _ask(pynvml.nvmlDeviceGetMemoryInfo, handle)
        pci = _ask(pynvml.nvmlDeviceGetPciInfo, handle)
        bus = _text(pci.busId) if pci else None
        gpu = Gpu(
            uuid=uuid,
            index=index,
            name=_text(_ask(pynvml.nvmlDeviceGetName, handle)),
            memory_mib=_mib(memory.total) if memory else None,
            memory_used_mib=_mib(memory.used) if memory else None,
            pci_bus_id=bus,
            pci_device=f"{pci.pciDeviceId >> 16:04X}" if pci else None,
            numa_node=self._system.numa_node(bus) if bus else None,
            xids=None if xids is None or bus is None else xids.get(short_bus_id(bus), ()),
            **_measures(handle),
            **_traits(handle),
        )
        with_mig = self._with_mig(handle, gpu)
        minor = _ask(pynvml.nvmlDeviceGetMinorNumber, handle)
        return replace(
            with_mig, clients=_clients(handle, with_mig, holders.get(minor, ()), self._system)
        )

    def _with_mig(self, handle: Any, gpu: Gpu) -> Gpu:
        mode = _ask(pynvml.nvmlDeviceGetMigMode, handle)
        if mode is None:
            return gpu
        geometry = self._geometry(handle, gpu, with_names=bool(mode[0]))
        return replace(
            gpu,
            mig_enabled=bool(mode[0]),
            mig_pending=bool(mode[1]),
            geometry=geometry,
            slices=_slices(handle, geometry) if mode[0] else (),
        )

    def _geometry(self, handle: Any, gpu: Gpu, *, with_names: bool) -> MigGeometry | None:
        """As the driver tells it, with names while MIG is on; else the card's table."""
        key = gpu.uuid, with_names
        if key not in self._geometries:
            told = _told_geometry(
                handle, gpu, table_geometry(self._tables, gpu.pci_device, gpu.name)
            )
            if told is None:
                return table_geometry(self._tables, gpu.pci_device, gpu.name)
            self._geometries[key] = told
        return self._geometries[key]

    @contextlib.contextmanager
    def _changing(self, gpu: GpuUuid, action: str) -> Iterator[Any]:
        """The handle of a GPU to change; what was read before is forgotten."""
        with self._lock, nvml_errors(action, lambda: self._in_the_way(gpu)):
            pynvml.nvmlInit()
            try:
                yield pynvml.nvmlDeviceGetHandleByUUID(gpu)
            finally:
                self._latest = None
                pynvml.nvmlShutdown()

    def _in_the_way(self, uuid: GpuUuid) -> tuple[GpuClient, ...]:
        gpu = self.read(fresh=True).gpu(uuid)
        return gpu.clients or () if gpu else ()

    def set_mig_mode(self, gpu: GpuUuid, *, enabled: bool) -> None:
        """Turn MIG on or off; what counts is the mode that is read back.

        Tried some times: whoever only looks at a GPU, as another LLM Manager or `nvidia-smi`
        does, is in the way for a moment.
        """
        action = f"turn MIG {'on' if enabled else 'off'}"
        now: Gpu | None = None
        for attempt in range(MODE_ATTEMPTS):
            if attempt:
                time.sleep(self._pause)
            with self._changing(gpu, action) as handle:
                said = pynvml.nvmlDeviceSetMigMode(handle, int(enabled))
            now = self.read(fresh=True).gpu(gpu)  # a new handle: the driver may have rebound it
            if now is not None and now.mig_enabled == now.mig_pending == enabled:
                return
            if said == pynvml.NVML_ERROR_RESET_REQUIRED:
                raise HardwareError(
                    f"The driver could not {action}: the GPU must be reset first.",
                    advice="Reboot this server (inside a virtual machine: that one).",
                )
        raise _in_use(action, now.clients or () if now else ())

    def create_slice(self, gpu: GpuUuid, wanted: Slice) -> None:
        """A GPU instance at its explicit start, and one compute instance that takes all of it.

        One that is there, empty or split, is filled.
        """
        profile, start = self._profile(gpu, wanted[0]), wanted[1]
        with self._changing(gpu, f"create {profile.name} at {start}") as handle:
            place = pynvml.c_nvmlGpuInstancePlacement_t(start=start, size=profile.size)
            left = _instance_at(handle, profile, start)
            for compute in _compute_instances(left) if left is not None else ():
                pynvml.nvmlComputeInstanceDestroy(compute)
            instance = left or pynvml.nvmlDeviceCreateGpuInstanceWithPlacement(
                handle, profile.driver_id, ctypes.byref(place)
            )
            try:
                _fill_instance(instance, profile)
            except pynvml.NVMLError:
                if left is None:
                    pynvml.nvmlGpuInstanceDestroy(instance)
                raise

    def destroy_slice(self, gpu: GpuUuid, wanted: Slice) -> None:
        """Its compute instances, then itself; one that is not there is no fault."""
        profile, start = self._profile(gpu, wanted[0]), wanted[1]
        with self._changing(gpu, f"remove {profile.name} at {start}") as handle:
            instance = _instance_at(handle, profile, start)
            if instance is not None:
                for compute in _compute_instances(instance):
                    pynvml.nvmlComputeInstanceDestroy(compute)
                pynvml.nvmlGpuInstanceDestroy(instance)

    def _profile(self, uuid: GpuUuid, name: str) -> MigProfile:
        gpu = self.read().gpu(uuid)
        if gpu is None or gpu.geometry is None:
            raise HardwareError("How this GPU can be cut is unknown.", advice="Update the driver.")
        return gpu.geometry.profile(name)

    def refresh_cdi(self) -> None:
        """Rewrite the toolkit's list of devices; each of today's slices must be in it then."""
        for command in CDI_COMMANDS:
            run_tool(command)
            if not self.read(fresh=True).cdi_missing:
                return
        raise HardwareError(
            "The container toolkit's list of devices still lacks a slice.",
            advice="Run `systemctl restart nvidia-cdi-refresh`, and read its journal.",
        )


def _why_no_driver(error: Any, system: GpuSystem) -> ManagerError | None:
    """No fault where there is neither driver nor GPU: models run on the processor."""
    absent = {pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED}
    if error.value not in absent:
        return _nvml_fault("be opened", error)
    if not system.has_nvidia_gpu():
        return None
    return ManagerError(
        "This server has an NVIDIA GPU, and its driver is not installed or not loaded.",
        advice="Install the driver, then look at `nvidia-smi`.",
    )


def _ask(question: Callable[..., Any], *arguments: Any) -> Any:
    """The answer, or None where this GPU or driver has none; a lost GPU is no answer either."""
    try:
        return question(*arguments)
    except pynvml.NVMLError as error:
        if error.value in {pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_RESET_REQUIRED}:
            raise
        return None


def _clients(
    handle: Any, gpu: Gpu, holders: Sequence[int], system: GpuSystem
) -> tuple[GpuClient, ...]:
    """Who computes on the GPU, and who else has it open."""
    computing: dict[int, Slice | None] = {}
    by_instance = _instances(handle, gpu.geometry) if gpu.slices and gpu.geometry else {}
    for asked in (handle, *_mig_handles(handle).values()):
        for process in _processes(asked):
            instance = getattr(process, "gpuInstanceId", NO_INSTANCE)
            computing[process.pid] = by_instance.get(instance) or computing.get(process.pid)
    return tuple(
        replace(client, slice=computing.get(pid), computes=pid in computing)
        for pid in sorted({*holders, *computing})
        if (client := system.client(pid)) is not None
        and (pid in computing or not client.is_manager)
    )


def _processes(handle: Any) -> list[Any]:
    """Who computes or draws on a device.

    By versioned names: where a driver lacks one, pynvml's others raise what is no NVMLError.
    """
    found: list[Any] = []
    for kind in ("Compute", "Graphics"):
        for version in ("_v3", "_v2"):
            listed = _ask(getattr(pynvml, f"nvmlDeviceGet{kind}RunningProcesses{version}"), handle)
            if listed is not None:
                found += listed
                break
    return found


def _text(value: str | bytes | None) -> str | None:
    """NVML's bindings answer str or bytes, depending on the function."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _mib(size: int) -> int:
    return int(size) // 1024**2


def _watts(milliwatts: int | None) -> float | None:
    return None if milliwatts is None else milliwatts / 1000


def _cuda_version(number: int | None) -> str | None:
    return None if number is None else f"{number // 1000}.{number % 1000 // 10}"


def _measures(handle: Any) -> Json:
    """What changes from one look to the next."""
    rates = _ask(pynvml.nvmlDeviceGetUtilizationRates, handle)
    energy = _ask(pynvml.nvmlDeviceGetTotalEnergyConsumption, handle)
    return {
        "temperature_c": _ask(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU),
        "utilisation_percent": rates.gpu if rates else None,
        "power_w": _watts(_ask(pynvml.nvmlDeviceGetPowerUsage, handle)),
        "energy_j": _watts(energy),  # mJ to J
        "ecc_uncorrected": _ask(
            pynvml.nvmlDeviceGetTotalEccErrors, handle,
            pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC,
        ),
    }  # fmt: skip


def _traits(handle: Any) -> Json:
    """What the GPU is, and how it is set."""
    capability = _ask(pynvml.nvmlDeviceGetCudaComputeCapability, handle)
    ecc = _ask(pynvml.nvmlDeviceGetEccMode, handle)
    limits = _ask(pynvml.nvmlDeviceGetPowerManagementLimitConstraints, handle)
    persistence = _ask(pynvml.nvmlDeviceGetPersistenceMode, handle)
    return {
        "architecture": ARCHITECTURES.get(_ask(pynvml.nvmlDeviceGetArchitecture, handle)),
        "compute_capability": ".".join(map(str, capability)) if capability else None,
        "power_limit_w": _watts(_ask(pynvml.nvmlDeviceGetEnforcedPowerLimit, handle)),
        "power_range_w": (limits[0] / 1000, limits[1] / 1000) if limits else None,
        "ecc_enabled": bool(ecc[0]) if ecc else None,
        "persistence": None if persistence is None else bool(persistence),
    }


def _links(gpus: Sequence[Gpu]) -> dict[frozenset[GpuUuid], Link]:
    """How each pair is joined; MIG takes peer access away, so a cut GPU has PCIe alone."""
    handles = {gpu.uuid: pynvml.nvmlDeviceGetHandleByUUID(gpu.uuid) for gpu in gpus}
    found: dict[frozenset[GpuUuid], Link] = {}
    for one, other in itertools.combinations(gpus, 2):
        link: Link | None = None
        if not one.mig_enabled and not other.mig_enabled:
            link = _nvlink(handles[one.uuid], handles[other.uuid], other.pci_bus_id)
        if link is None:
            ancestor = _ask(
                pynvml.nvmlDeviceGetTopologyCommonAncestor, handles[one.uuid], handles[other.uuid]
            )
            link = Link(ANCESTORS[ancestor]) if ancestor in ANCESTORS else None
        if link is not None:
            found[frozenset({one.uuid, other.uuid})] = link
    return found


def _nvlink(one: Any, other: Any, bus_of_other: str | None) -> Link | None:
    # The index as a number: pynvml 13.615 defines NVML_P2P_CAPS_INDEX_READ as a tuple.
    nvlink = 2
    if _ask(pynvml.nvmlDeviceGetP2PStatus, one, other, nvlink) != pynvml.NVML_P2P_STATUS_OK:
        return None
    direct = switched = 0
    for lane in range(MOST_LINKS):
        if _ask(pynvml.nvmlDeviceGetNvLinkState, one, lane) != 1:
            continue
        if (
            _ask(pynvml.nvmlDeviceGetNvLinkRemoteDeviceType, one, lane)
            == pynvml.NVML_NVLINK_DEVICE_TYPE_SWITCH
        ):
            switched += 1
            continue
        remote = _ask(pynvml.nvmlDeviceGetNvLinkRemotePciInfo, one, lane)
        bus = _text(remote.busId) if remote else None
        direct += bus is not None and short_bus_id(bus) == short_bus_id(bus_of_other or "")
    return Link("NVSwitch", switched) if switched else Link("NVLink", direct)


def _told_geometry(handle: Any, gpu: Gpu, table: MigGeometry | None) -> MigGeometry | None:
    """The profiles and places that the driver lists; it does so while MIG is off, too."""
    named = {profile.driver_id: profile.name for profile in table.profiles} if table else {}
    profiles: list[MigProfile] = []
    for number in range(MOST_PROFILES):
        try:
            info = _profile_info(handle, number)
        except pynvml.NVMLError_InvalidArgument:
            break
        places = _places(handle, info.id) if info is not None else []
        if info is None or not places:
            continue
        name = (_text(getattr(info, "name", b"")) or "").removeprefix("MIG ")
        variant = PROFILE_VARIANTS.get(number, "")
        made = profile_name(info.sliceCount, info.memorySizeMB, gpu.memory_mib or 0, variant) \
            if gpu.memory_mib else ""  # fmt: skip
        profiles.append(
            MigProfile(
                name=name or named.get(info.id) or made,
                driver_id=info.id,
                most=info.instanceCount,
                memory_mib=info.memorySizeMB,
                multiprocessors=info.multiprocessorCount,
                size=places[0].size,
                starts=tuple(sorted(place.start for place in places)),
            )
        )
    if not profiles or not all(re.match(r"\d+g\.\d+gb", profile.name) for profile in profiles):
        return None
    return MigGeometry(
        card=gpu.name or (table.card if table else "this card"),
        compute_slices=max(profile.compute_slices for profile in profiles),
        memory_units=max(max(p.starts) + p.size for p in profiles),
        profiles=tuple(profiles),
    )


def _profile_info(handle: Any, number: int) -> Any:
    """With its name where the driver tells it; drivers tell that only while MIG is on."""
    named = _ask_profile(handle, number, 2)
    return named if named is not None else _ask_profile(handle, number, 1)


def _ask_profile(handle: Any, number: int, version: int) -> Any:
    try:
        return pynvml.nvmlDeviceGetGpuInstanceProfileInfo(handle, number, version)
    except pynvml.NVMLError_InvalidArgument:
        raise
    except pynvml.NVMLError:
        return None


def _places(handle: Any, driver_id: int) -> list[Any]:
    count = ctypes.c_uint()
    ask = pynvml.nvmlDeviceGetGpuInstancePossiblePlacements
    if _ask(ask, handle, driver_id, None, ctypes.byref(count)) is None or not count.value:
        return []
    places = (pynvml.c_nvmlGpuInstancePlacement_t * count.value)()
    return (
        list(places)[: count.value]
        if _ask(ask, handle, driver_id, places, ctypes.byref(count)) is not None
        else []
    )


def _gpu_instances(handle: Any, profile: MigProfile) -> list[Any]:
    """The GPU instances of one profile; raises where the caller may not see them."""
    found = (pynvml.c_nvmlGpuInstance_t * profile.most)()
    count = ctypes.c_uint(profile.most)
    pynvml.nvmlDeviceGetGpuInstances(handle, profile.driver_id, found, ctypes.byref(count))
    return list(found)[: count.value]


def _instance_at(handle: Any, profile: MigProfile, start: int) -> Any:
    for instance in _gpu_instances(handle, profile):
        if pynvml.nvmlGpuInstanceGetInfo(instance).placement.start == start:
            return instance
    return None


def _compute_instances(instance: Any) -> list[Any]:
    found: list[Any] = []
    for number in range(pynvml.NVML_COMPUTE_INSTANCE_PROFILE_COUNT):
        info = _compute_profile(instance, number)
        if info is not None:
            several = (pynvml.c_nvmlComputeInstance_t * info.instanceCount)()
            count = ctypes.c_uint(info.instanceCount)
            pynvml.nvmlGpuInstanceGetComputeInstances(
                instance, info.id, several, ctypes.byref(count)
            )
            found += list(several)[: count.value]
    return found


def _compute_profile(instance: Any, number: int) -> Any:
    ask = pynvml.nvmlGpuInstanceGetComputeInstanceProfileInfo
    named = _ask(ask, instance, number, 0, 2)
    return named if named is not None else _ask(ask, instance, number, 0, 1)


def _fill_instance(instance: Any, profile: MigProfile) -> None:
    """The compute instance that takes the whole slice."""
    for number in range(pynvml.NVML_COMPUTE_INSTANCE_PROFILE_COUNT):
        info = _compute_profile(instance, number)
        if info is not None and info.sliceCount == profile.compute_slices:
            pynvml.nvmlGpuInstanceCreateComputeInstance(instance, info.id)
            return
    raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)


def _instances(handle: Any, geometry: MigGeometry) -> dict[int, Slice]:
    """GPU instance id -> what it is; raises where the caller may not see them."""
    found: dict[int, Slice] = {}
    for profile in geometry.profiles:
        try:
            several = _gpu_instances(handle, profile)
        except pynvml.NVMLError_NoPermission:
            raise
        except pynvml.NVMLError:  # an older driver lacks a profile of the table
            continue
        for instance in several:
            info = pynvml.nvmlGpuInstanceGetInfo(instance)
            found[info.id] = (profile.name, info.placement.start)
    return found


def _mig_handles(handle: Any) -> dict[int, Any]:
    """GPU instance id -> the MIG device that is all of it; their indices have holes.

    An instance that somebody split into several compute instances has none.
    """
    found: dict[int, Any] = {}
    for index in range(_ask(pynvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0):
        device = _ask(pynvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, index)
        if device is not None:
            parts = _ask(pynvml.nvmlDeviceGetAttributes_v2, device)
            if parts is None or parts.computeInstanceSliceCount == parts.gpuInstanceSliceCount:
                found[pynvml.nvmlDeviceGetGpuInstanceId(device)] = device
    return found


def _slices(handle: Any, geometry: MigGeometry | None) -> tuple[MigDevice, ...] | None:
    """Today's slices along the card; None where nobody may see them, or tell what they are."""
    try:
        instances = _instances(handle, geometry) if geometry else None
    except pynvml.NVMLError_NoPermission:
        instances = None
    if instances is None:
        return None
    devices = _mig_handles(handle)
    found = []
    for instance, (name, start) in instances.items():
        device = devices.get(instance)
        memory = _ask(pynvml.nvmlDeviceGetMemoryInfo, device) if device is not None else None
        found.append(
            MigDevice(
                profile=name,
                start=start,
                uuid=_text(_ask(pynvml.nvmlDeviceGetUUID, device)) if device is not None else None,
                memory_mib=_mib(memory.total) if memory else None,
            )
        )
    return tuple(sorted(found, key=lambda device: device.start))


@contextlib.contextmanager
def nvml_errors(action: str, clients: Callable[[], Sequence[GpuClient]]) -> Iterator[None]:
    """Turn NVML's errors into one sentence of fact and one of advice."""
    try:
        yield
    except pynvml.NVMLError as error:
        if error.value == pynvml.NVML_ERROR_IN_USE:
            raise _in_use(action, clients()) from error
        raise _nvml_fault(action, error) from error


def _in_use(action: str, clients: Sequence[GpuClient]) -> HardwareError:
    if not clients:
        return HardwareError(
            f"The driver could not {action}: somebody who does not show uses the GPU.",
            advice="Look for monitors (DCGM, nvsm), a display server, and containers that have it.",
        )
    who = ", ".join(map(describe_client, clients))
    return HardwareError(
        f"The driver could not {action}: {who} uses the GPU.", advice=release_advice(clients)
    )


def _nvml_fault(action: str, error: Any) -> HardwareError:
    causes = {
        pynvml.NVML_ERROR_NO_PERMISSION: ("this needs root", "Run LLM Manager as root."),
        pynvml.NVML_ERROR_GPU_IS_LOST: ("the GPU is lost", "Reboot; look at its seat and power."),
        pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: (
            "its files are newer than the loaded kernel module", "Reboot to finish the upgrade.",
        ),
        pynvml.NVML_ERROR_FUNCTION_NOT_FOUND: ("it is too old for that", "Update the driver."),
        pynvml.NVML_ERROR_INSUFFICIENT_RESOURCES: (
            "there is no room for it", "Look at `mig show`: somebody else may have cut this GPU.",
        ),
    }  # fmt: skip
    fact, advice = causes.get(
        error.value, (str(error), "Look at `nvidia-smi` and the kernel's log.")
    )
    return HardwareError(f"The NVIDIA driver could not {action}: {fact}.", advice=advice)


class GpuSystem:
    """What the kernel, systemd and the container toolkit know about GPUs."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._xids: tuple[float, dict[str, tuple[int, ...]] | None] = (-math.inf, None)
        self._enabled: dict[str, tuple[float, bool | None]] = {}

    def read_text(self, path: str | Path) -> str | None:
        try:
            return (self._root / str(path).lstrip("/")).read_text(errors="replace")
        except OSError:
            return None

    def kernel_version(self) -> str | None:
        """Of the module that is loaded now."""
        text = self.read_text("sys/module/nvidia/version")
        return text.strip() if text else None

    def library_version(self) -> str | None:
        """Of the library on the disk: a process that runs for weeks has the old one open."""
        loaded = re.search(r"(/\S*)/libnvidia-ml\.so", self.read_text("proc/self/maps") or "")
        own = [loaded[1].lstrip("/")] if loaded else []
        folders = (*own, f"usr/lib/{platform.machine()}-linux-gnu", "usr/lib64", "usr/lib")
        for folder in folders:
            library = self._root / folder / "libnvidia-ml.so.1"
            found = re.search(r"\.so\.(\d+\.\d[\d.]*)$", str(library.resolve()))
            if found and library.exists():
                return found[1]
        return None

    def has_nvidia_gpu(self) -> bool:
        """Whether the PCI bus shows one, driver or not."""
        return any(
            (self.read_text(device.relative_to(self._root) / "vendor") or "").strip() == "0x10de"
            and (self.read_text(device.relative_to(self._root) / "class") or "").startswith("0x03")
            for device in self._root.glob("sys/bus/pci/devices/*")
        )

    def numa_node(self, bus_id: str) -> int | None:
        """Of the PCI slot: NVML tells it only where the GPU's memory is a node of its own."""
        text = self.read_text(f"sys/bus/pci/devices/{bus_id.lower()[-12:]}/numa_node") or "-1"
        return int(text) if int(text) >= 0 else None

    def holders(self) -> dict[int, list[int]]:
        """GPU minor number -> processes that have its device open; as root, all of them."""
        found: dict[int, set[int]] = {}
        proc = str(self._root / "proc")
        for pid in filter(str.isdigit, os.listdir(proc)):  # noqa: PTH208 - a third of Path's time
            with contextlib.suppress(OSError):
                for handle in os.listdir(f"{proc}/{pid}/fd"):  # noqa: PTH208
                    with contextlib.suppress(OSError):
                        target = os.readlink(f"{proc}/{pid}/fd/{handle}")  # noqa: PTH115
                        minor = target.removeprefix("/dev/nvidia")
                        if minor != target and minor.isdigit():
                            found.setdefault(int(minor), set()).add(int(pid))
        return {minor: sorted(pids) for minor, pids in found.items()}

    def client(self, pid: int) -> GpuClient | None:
        """A process by its program; None for one that is gone, and for this one."""
        command = self.read_text(f"proc/{pid}/cmdline")
        if command is None or pid == os.getpid():
            return None
        words = command.split("\0")
        name = PurePath(words[0].split(" ")[0].rstrip(":")).name
        name = name or (self.read_text(f"proc/{pid}/comm") or "").strip() or "a process"
        inside = re.search(r"\b[0-9a-f]{64}\b", self.read_text(f"proc/{pid}/cgroup") or "")
        return GpuClient(
            pid=pid,
            # Any user chooses it: no line break, no escape sequence for root's terminal.
            name=re.sub(r"[^\w.:+@ -]", "?", name)[:60],
            container_id=inside[0] if inside else None,
            is_manager=any(PurePath(word).name == PROGRAM.name for word in words),
        )

    def xids(self) -> dict[str, tuple[int, ...]] | None:
        """The driver's errors since boot by PCI bus id; None where the kernel's log is closed."""
        now = time.monotonic()
        if now - self._xids[0] > SLOW_SECONDS:
            text = kernel_log(self._root / "dev/kmsg")
            self._xids = now, None if text is None else parse_xids(text)
        return self._xids[1]

    def enabled(self, unit: str) -> bool | None:
        """Whether systemd starts it at boot; None where there is no systemd."""
        asked, known = self._enabled.get(unit, (-math.inf, None))
        if time.monotonic() - asked > SLOW_SECONDS:
            known = self._ask_systemd(unit)
            self._enabled[unit] = time.monotonic(), known
        return known

    def _ask_systemd(self, unit: str) -> bool | None:
        if not (self._root / "run/systemd/system").is_dir():
            return None
        answer = run_tool(["systemctl", "is-enabled", unit], seconds=5)
        return None if answer is None else answer.stdout.strip() in {"enabled", "enabled-runtime"}

    def cdi_text(self) -> str:
        """The specifications of NVIDIA's GPUs; others, such as for managing them, do not count."""
        texts = [
            self.read_text(path.relative_to(self._root)) or ""
            for folder in ("var/run/cdi", "etc/cdi")
            for path in sorted((self._root / folder).glob("*"))
        ]
        return "".join(t for t in texts if re.search(r'(?m)"?\bkind"?: "?nvidia\.com/gpu"?,?$', t))

    def cdi_missing(self, uuids: Sequence[str]) -> frozenset[str]:
        """Which of these devices a list that goes by UUID lacks; one that goes by index has all."""
        text = self.cdi_text()
        if not re.search(r"\b(GPU|MIG)-[0-9a-f]{8}-", text):
            return frozenset()
        return frozenset(uuid for uuid in uuids if uuid not in text)


# By the toolkit's own service; else by its tool, at the place that the service would write.
CDI_COMMANDS: Final = (
    ("systemctl", "restart", "nvidia-cdi-refresh.service"),
    ("nvidia-ctk", "cdi", "generate", "--output=/var/run/cdi/nvidia.yaml"),
)
SLOW_SECONDS: Final = 60.0


def run_tool(
    command: Sequence[str], *, seconds: float = 120
) -> subprocess.CompletedProcess[str] | None:
    """What a system's tool answers; None where it is not here or hangs."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(  # noqa: S603 - fixed words
            command, capture_output=True, text=True, timeout=seconds, check=False
        )
    return None


def kernel_log(device: Path) -> str | None:
    """All that the kernel still remembers saying; None where this user may not read it."""
    lines: list[bytes] = []
    try:
        handle = os.open(device, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        while True:
            with contextlib.suppress(BrokenPipeError):  # a record was overwritten meanwhile
                lines.append(os.read(handle, 8192))
                if not lines[-1]:
                    break
    except BlockingIOError:
        pass  # the end of what there is
    except OSError:
        return None
    finally:
        os.close(handle)
    return b"".join(lines).decode(errors="replace")


# =============================================================================
# §34 Orchestration — effects: Plan -> world, undo, jobs
# =============================================================================


class Files(Protocol):
    """What applying needs from the home directory."""

    def read_generated(self) -> dict[str, str]: ...
    def write_generated(self, path: str, text: str | None) -> None: ...
    def keep_log(self, name: ContainerName, text: str) -> None: ...
    def read_starts(self) -> dict[str, float]: ...
    def note_start(self, name: ContainerName, seconds: float) -> None: ...
    def make_folder(self, path: str) -> None: ...
    def read_measured(self) -> dict[str, Measured]: ...
    def note_measured(self, key: str, measured: Measured) -> None: ...


class Shelf(Protocol):
    """The cache of weights on this server's disk; see `HubCache`."""

    def commit(self, repository: str, revision: str | None = None) -> str | None: ...
    def inspect(self, repository: str, revision: str | None = None) -> RepositoryFacts | None: ...
    def read(self) -> WeightsCache: ...
    def remove(self, removal: Removal) -> None: ...
    def stored(self) -> Mapping[str, frozenset[str]]: ...


class Hub(Protocol):
    """Where weights come from, and where they are kept; see `HuggingFace`."""

    @property
    def cache(self) -> Shelf: ...
    def search(self, text: str, *, kind: ModelType | None = None) -> Sequence[RepositoryHit]: ...
    def inspect(self, repository: str, revision: str | None = None) -> RepositoryFacts: ...
    def resolve(self, repository: str, revision: str | None = None) -> str: ...
    def download(
        self, repository: str, revision: str | None = None, *, kind: ModelType | None = None,
        on_progress: Callable[[DownloadProgress], None], check: Callable[[], None],
    ) -> str: ...  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tools:
    """The doors that applying goes through."""

    containers: Containers
    probes: Probes
    files: Files
    clock: Clock
    gpus: GpuDriver
    weights: Hub
    images: LocalImages
    database: Database
    failures: tuple[KnownFailure, ...] = ()  # what engines say when they cannot start
    providers: ProviderApi = field(default_factory=HttpProviders)


class Control:
    """How a running job tells of itself, and hears that it should stop."""

    def __init__(self, report: Report, kind: JobKind = "change") -> None:
        self.report = report
        self.progress = ""
        self.done_part: float | None = None
        self._kind = kind
        self.faults: dict[str, ManagerError] = {}  # of stages, by their titles
        self._cancelled = threading.Event()
        self._offer: tuple[pydantic.SecretStr, float] | None = None
        self._taking = threading.Lock()

    def offer(self, text: pydantic.SecretStr, seconds: float = OFFER_SECONDS) -> None:
        """What can be taken once until so many seconds are over; it is in memory alone."""
        self._offer = text, time.monotonic() + seconds

    @property
    def offers(self) -> bool:
        """Whether something is there to be taken; what nobody took in time is forgotten here."""
        with self._taking:
            if self._offer and time.monotonic() >= self._offer[1]:
                self._offer = None
            return self._offer is not None

    def take(self) -> pydantic.SecretStr | None:
        """What was offered; None from then on."""
        with self._taking:
            offer, self._offer = self._offer, None
        return offer[0] if offer and time.monotonic() < offer[1] else None

    def cancel(self) -> None:
        self._cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()

    def check(self) -> None:
        """Raise where the operator has cancelled; called only where undoing is safe."""
        if self._cancelled.is_set() and self._kind == "task":
            raise CancelledError("It was cancelled.", advice="Start it again when you like.")
        if self._cancelled.is_set():
            raise CancelledError(
                "The change was cancelled, and its wish withdrawn.",
                advice="What it had finished before is in the plan, to be taken back.",
            )


def observe(tools: Tools, edge: Edge | None = None) -> Observed:
    """One whole look at the world; of certificates, at the one that this edge names."""
    found, hardware = tools.containers.observe(), tools.gpus.read()
    with_gpu = [c for c in found.containers.values() if c.running and c.devices]
    with concurrent.futures.ThreadPoolExecutor(max_workers=len(with_gpu) or 1) as pool:
        sights = list(pool.map(tools.containers.visible_devices, with_gpu))
    looked = {c.name: replace(c, devices_seen=s) for c, s in zip(with_gpu, sights, strict=True)}
    seen = replace(
        found,
        containers={**found.containers, **looked},
        files=tools.files.read_generated(),
        certificate=read_certificate(edge) if edge else None,
        taken_at=tools.clock.utc_now(),
        hardware=hardware,
        # Only where slices can go: each container is looked at once in its life.
        foreign_devices=tools.containers.foreign_devices()
        if any(gpu.mig_enabled is not None for gpu in hardware.gpus)
        else {},
        start_seconds=tools.files.read_starts(),
        weights=tools.weights.cache.stored(),
    )
    return tools.probes.fill(seen)


def converge(
    state: State, site: Site, tools: Tools, control: Control, change: Change | None = None,
    *, skip: Collection[str] = (),
) -> None:  # fmt: skip
    """Make the world as wished; what fails is undone alone, reported, and raised at the end.

    `skip` names stages of models that are left as they are.
    """
    reach = change or applying()

    def planned(observed: Observed, *, recut: bool) -> Plan:
        return plan_state(
            state, observed, site, scope=reach.scope, restart=reach.restart,
            despite_driver=reach.despite_driver, recut=recut, gentle=reach.gentle,
            dump=reach.dump,
        )  # fmt: skip

    first = observe(tools, state.edge)
    _keep_last_words(first, tools)
    plan = planned(first, recut=True)
    if reach.whole:
        plan.raise_refusal()
    faults = _side_by_side(plan.layouts, tools, control)
    if faults and reach.whole:
        _raise_all(faults)
    if plan.layouts:
        plan = _without_consequences(
            planned(observe(tools, state.edge), recut=False), plan.layouts, control
        )
    faults += _attempt([plan.devices], tools, control)
    apply_stage(plan.foundation, tools, control)
    database = _attempt([plan.database], tools, control)
    faults += _attempt([plan.cache], tools, control)  # without it LiteLLM goes on, uncached
    models = [by_turns(stage) for stage in plan.models if stage.title not in skip]
    faults += database + _side_by_side([at_once for at_once, *_ in models], tools, control)
    names = reach.scope.names(state)
    if not database:
        turn = partial(_turn_endpoint, state, site, tools, names)
        faults += _in_turn([part for _, *parts in models for part in parts], turn, tools, control)
        faults += turn(control)
    else:  # what is wished stopped must stop all the same
        faults += _attempt(
            [plan_retirement(state, observe(tools, state.edge), None, names)], tools, control
        )
    _raise_all(_counting(faults, state, first, control) if reach.whole else faults)


def _without_consequences(plan: Plan, layouts_first: Sequence[Stage], control: Control) -> Plan:
    """Only now have slices UUIDs; who has none because a cut failed need not say so as well."""
    failed = [layout for layout in layouts_first if layout.title in control.faults]
    uncut = frozenset[str]().union(*(layout.resources for layout in failed))
    models = tuple(
        model
        for model in plan.models
        if not (model.resources & uncut and any(isinstance(step, Refuse) for step in model.steps))
    )
    return replace(plan, models=models)


def _counting(
    faults: Sequence[ManagerError], state: State, before: Observed, control: Control
) -> list[ManagerError]:
    """A model that did not serve before the change is no reason to take the change back."""
    excused = [
        control.faults.get(model_stage_title(model))
        for model in state.wished_models
        if phase_of(state, model, before, busy=False) != "ready"
    ]
    return [fault for fault in faults if fault not in excused]


def _side_by_side(stages: Sequence[Stage], tools: Tools, control: Control) -> list[ManagerError]:
    """Stages that share nothing at the same time, the others one after another."""
    with concurrent.futures.ThreadPoolExecutor(max_workers=len(stages) or 1) as pool:
        attempts = list(pool.map(lambda lane: _attempt(lane, tools, control), lanes(stages)))
    return [fault for faults in attempts for fault in faults]


def _in_turn(
    parts: Sequence[Stage], turn: Callable[..., list[ManagerError]], tools: Tools, control: Control
) -> list[ManagerError]:
    """Replace replicas that serve, one after another, each when the gateway has turned from it."""
    faults: list[ManagerError] = []
    for part in parts:
        if part.title in control.faults:
            continue  # its model goes on with the replicas that it has
        away = [step.spec.name for step in part.steps if isinstance(step, TurnAway)]
        not_turned = turn(control, away=away)
        try:
            faults += not_turned or _attempt([part], tools, control)
        except CancelledError:
            turn(Control(control.report))  # what came back is routed again
            raise
        if not_turned:
            break
    return faults


def _turn_endpoint(
    state: State, site: Site, tools: Tools, names: frozenset[str] | None, control: Control,
    *, away: Collection[str] = (),
) -> list[ManagerError]:  # fmt: skip
    """Route what is ready now, then retire what nobody wants any more."""
    endpoint, kept = plan_endpoint(state, observe(tools, state.edge), site, away=away)
    faults = _attempt([endpoint], tools, control)
    turned = kept if not faults else None
    retirement = plan_retirement(state, observe(tools, state.edge), turned, names)
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
            control.faults[stage.title] = error
            faults.append(error)
    return faults


def _raise_all(faults: Sequence[ManagerError]) -> None:
    match faults:
        case []:
            return
        case [fault]:
            raise fault
        case _:
            facts = " ".join(dict.fromkeys(fault.fact for fault in faults))
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
    except Exception as error:
        if isinstance(error, NotBegunError):
            attempted.pop()
        # A Discard is the point of no return: what it made way for is ready, and stays.
        if not (attempted and isinstance(attempted[-1], Discard)):
            stuck = False
            for step in reversed(attempted):
                # What could not be taken back goes on with the files that it reads.
                if not (stuck and isinstance(step, WriteFile)):
                    stuck |= not undo_step(step, tools, control.report)
        raise


def apply_step(  # noqa: C901, PLR0912, PLR0915 - one line per kind of step
    step: Step, tools: Tools, control: Control
) -> None:
    """One step, one call."""
    containers = tools.containers
    match step:
        case Refuse(fact, advice):
            raise RefusedError(fact, advice=advice)
        case CheckClients(gpu, slices, ours, _):
            _check_clients(gpu, slices, ours, tools)
        case SetMigMode(gpu, enabled, _):
            tools.gpus.set_mig_mode(gpu.uuid, enabled=enabled)
        case DestroySlice(gpu, wanted, _):
            tools.gpus.destroy_slice(gpu.uuid, wanted)
        case CreateSlice(gpu, wanted, _):
            _refuse_if_made(gpu, wanted, tools)
            tools.gpus.create_slice(gpu.uuid, wanted)
        case VerifyLayout(gpu, slices, _):
            _verify_layout(gpu, slices, tools)
        case RefreshCdi():
            try:
                tools.gpus.refresh_cdi()
            except HardwareError as error:  # Docker may not go by it: a container's start will tell
                control.report(f"  {error}")
        case PullImage(image, _):
            _pull(image, containers, control)
        case BuildImage():
            _build(step, tools, control)
        case DownloadWeights(source, model_type, _):
            download(source, model_type, tools, control)
        case CreateNetwork(name, _):
            containers.create_network(name)
        case CreateVolume(name, _):
            containers.create_volume(name)
        case WriteFile(path, text, _, _, _):
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
            for mount in spec.mounts:
                if mount.target == COMPILED_MOUNT:
                    tools.files.make_folder(mount.source)
            containers.create(spec)
        case StartContainer(name, _):
            containers.start(name)
        case StopContainer(name, seconds, _):
            containers.stop(name, seconds)
        case WaitReady(spec, _):
            wait_until_ready(spec, tools, control)
        case Pause(seconds, _):
            tools.clock.sleep(seconds)
        case Drain(name, _):
            _drain(name, tools, control)
        case TurnAway(spec, _):
            _drain(spec.name, tools, control)
        case DumpDatabase(server, file, kept, _, _, spare):
            dump_database(server, file, kept, tools, control, spare=spare)
        case LoadDump(server, dump, _):
            tools.database.load(server, Path(dump))
        case TurnToLoaded(server, _):
            tools.database.turn(server)
        case DropFormer(server, _):
            _drop_former(server, tools, control)
        case WithholdContents(server, _):
            tools.database.withhold_contents(server)
        case Discard(name, seconds, _):
            containers.remove(name, seconds)
        case _:
            assert_never(step)


def dump_database(
    server: ContainerName, file: str, kept: int, tools: Tools, control: Control, *, spare: str = ""
) -> None:
    """Dump, tell how far it is, and let older automatic dumps make way."""

    def tell(size: int) -> None:
        control.progress = f"{format_size(size)} written"
        control.check()

    try:
        size = tools.database.dump(server, file, tell)
    finally:
        control.progress = ""
    control.report(f"  {format_size(size)}, whole; the way back: `database restore {file}`")
    for old in stale_dumps(tools.database.dumps(), kept, spare):
        tools.database.drop_dump(old)
        control.report(f"  {old.file} made way")


def _drop_former(server: ContainerName, tools: Tools, control: Control) -> None:
    try:
        tools.database.drop_former(server)
    except ContainerFailedError as error:  # it only takes room: the next restore drops it
        control.report(f"  {error}")


def _return_to_dump(step: DumpDatabase, tools: Tools, report: Report) -> bool:
    """After a broken migration, while the gateway from before serves; False: nothing has changed.

    LiteLLM's rows about requests since the dump are lost with it.
    """
    if not step.guards or all(dump.file != step.file for dump in tools.database.dumps()):
        return False
    path = tools.database.find(step.file)
    if tools.database.is_as_in(step.server, path):
        return False
    report(f"The tables have changed: the database returns to {step.file}.")
    try:
        tools.database.load(step.server, path)
        tools.database.turn(step.server)
        tools.database.drop_former(step.server)
    except ManagerError as error:
        advice = f"Return by hand: `database restore {step.file}`."
        raise ManagerError(error.fact, advice=advice) from error
    return True


def _drain(name: ContainerName, tools: Tools, control: Control) -> None:
    """Until an engine is idle, or its time is up; one that does not tell counts as idle."""
    until = tools.clock.monotonic() + DRAIN_SECONDS
    while tools.clock.monotonic() < until:
        control.check()
        seen = tools.containers.look(name)
        load = tools.probes.load(seen) if seen is not None and seen.running else None
        if load is None or not load.running + load.waiting:
            return
        tools.clock.sleep(0.5)


def _check_clients(
    gpu: GpuRef, slices: frozenset[Slice] | None, ours: frozenset[str], tools: Tools
) -> None:
    now = tools.gpus.read(fresh=True).gpu(gpu.uuid)
    foreign = foreign_clients(now, ours, slices) if now else []
    if foreign:
        who = ", ".join(map(describe_client, foreign))
        raise RefusedError(f"{who} uses {gpu}.", advice=release_advice(foreign))


def _refuse_if_made(gpu: GpuRef, wanted: Slice, tools: Tools) -> None:
    """Somebody else's slice must not be taken for ours, and removed when the change is undone."""
    now = tools.gpus.read(fresh=True).gpu(gpu.uuid)
    there = now.device(wanted) if now is not None else None
    if there is not None and there.uuid is not None:
        raise NotBegunError(
            f"Somebody else made the slice {format_slices([wanted])} of {gpu} meanwhile.",
            advice="Look at `mig show`, then plan again.",
        )


def _verify_layout(gpu: GpuRef, slices: frozenset[Slice], tools: Tools) -> None:
    now = tools.gpus.read(fresh=True).gpu(gpu.uuid)
    if now is None:
        raise HardwareError(f"{gpu} is gone after its change.", advice="Reboot this server.")
    empty = [device.slice for device in now.slices or () if device.uuid is None]
    if now.layout == slices and empty:
        raise HardwareError(
            f"{gpu}: {format_slices(empty)} has no whole compute instance.",
            advice="Look at the kernel's log; somebody else may cut it too.",
        )
    if not now.is_cut_as(slices):
        raise HardwareError(
            f"{gpu} has {format_slices(now.layout)} now, and not {format_slices(slices)}.",
            advice="Look at `mig show` and at the kernel's log; somebody else may cut it too.",
        )


def undo_step(step: Step, tools: Tools, report: Report) -> bool:
    """Take back one attempted step; trouble is reported, and False, instead of being raised."""
    try:
        if _undo(step, tools, report):
            report(f"undone: {describe(step)}")
    except ManagerError as error:
        report(f"could not undo {describe(step)}: {error}")
        return False
    return True


def _undo(  # noqa: C901, PLR0912, PLR0915 - one line per kind of step
    step: Step, tools: Tools, report: Report
) -> bool:
    """Whether there was anything to take back."""
    containers = tools.containers
    match step:
        case SetMigMode(gpu, enabled, _):
            tools.gpus.set_mig_mode(gpu.uuid, enabled=not enabled)
        case DestroySlice(gpu, wanted, _):
            _bring_slice_back(gpu, wanted, tools)
        case CreateSlice(gpu, wanted, _):
            tools.gpus.destroy_slice(gpu.uuid, wanted)
        case WriteFile(path, _, before, _, _):
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
        case TurnAway(spec, _):  # only what is ready is routed again
            wait_until_ready(spec, tools, Control(report))
        case DumpDatabase():
            return _return_to_dump(step, tools, report)
        case LoadDump(server, _, _):
            tools.database.drop_loaded(server)
        case TurnToLoaded(server, _):
            tools.database.turn_back(server)
        case _:
            return False  # done for good, harmless to keep, or nothing was changed
    return True


def _bring_slice_back(gpu: GpuRef, wanted: Slice, tools: Tools) -> None:
    now = tools.gpus.read(fresh=True).gpu(gpu.uuid)
    there = now.device(wanted) if now is not None else None
    if there is None or there.uuid is None:
        tools.gpus.create_slice(gpu.uuid, wanted)


def _undo_set_aside(name: ContainerName, containers: Containers) -> None:
    if containers.look(aside(name)) is not None:
        containers.bring_back(name)
    else:  # it failed before the rename
        containers.start(name)


def download(source: HubSource, kind: ModelType | None, tools: Tools, control: Control) -> str:
    """Fetch weights and tell how far it is: always as progress, and now and then as a line."""
    said, attempt = -math.inf, 1

    def on_progress(seen: DownloadProgress) -> None:
        nonlocal said, attempt
        control.progress = format_progress(seen)
        control.done_part = seen.bytes_done / seen.bytes_total if seen.bytes_total else None
        now = tools.clock.monotonic()
        if now - said >= STARTING_LINE_SECONDS or seen.attempt != attempt:
            said, attempt = now, seen.attempt
            control.report(f"  {control.progress}")

    def fetch() -> str:
        return tools.weights.download(
            source.repository, source.revision, kind=kind,
            on_progress=on_progress, check=control.check,
        )  # fmt: skip

    try:
        return when_free(fetch, tools, control)
    finally:
        control.progress, control.done_part = "", None


def when_free(work: Callable[[], T], tools: Tools, control: Control) -> T:
    """Do it when whoever has it now is done: another model, or another process."""
    told = False
    while True:
        try:
            return work()
        except BusyError as error:
            if not told:
                control.report(f"  {error.fact} This waits for it.")
            told = True
            control.check()
            tools.clock.sleep(0.5)


def _pull(image: str, containers: Containers, control: Control) -> None:
    progress = PullProgress(image)

    def on_event(event: Json) -> None:
        control.check()
        line = progress.line(event)
        if line is not None:
            control.report(line)

    containers.pull(image, on_event)


def _build(step: BuildImage, tools: Tools, control: Control) -> None:
    """Its whole log is kept, however it ends."""
    progress = BuildLog()

    def on_text(text: str) -> None:
        for line in progress.add(text, tools.clock.monotonic()):
            control.report(line)

    labels = {LABEL_IMAGE_RECIPE: step.recipe, LABEL_IMAGE_HASH: step.image.rpartition(":")[2]}
    try:
        tools.images.build(step.image, step.dockerfile, labels, on_text, control.check)
    except ContainerFailedError as error:
        raise (progress.fault(step.recipe) or error) from error.__cause__
    finally:
        if progress.lines:
            with contextlib.suppress(ManagerError):
                name = ContainerName(f"build-{step.recipe}")
                tools.files.keep_log(name, "\n".join(progress.lines) + "\n")


def wait_until_ready(spec: ContainerSpec, tools: Tools, control: Control) -> None:
    """Until it answered a real request; keeps the start log whatever happens."""
    started = told = tools.clock.monotonic()
    last_time = tools.files.read_starts().get(spec.name)
    try:
        while True:
            control.check()
            seen = tools.containers.look(spec.name)
            now = tools.clock.monotonic()
            if seen is None or not seen.running:
                raise _start_failure(spec, seen, tools)
            if tools.probes.is_ready(spec, seen):
                _check_sight(spec, seen, tools)
                took = tools.clock.monotonic() - started  # the first request included
                control.report(f"  {spec.name} is ready after {format_duration(took)}")
                with contextlib.suppress(ManagerError):  # a full disk is no reason to fail
                    _note_start(spec, seen, took, tools)
                return
            if now - started > spec.start_seconds:
                raise ContainerFailedError(
                    f"{spec.name} was not ready after {format_duration(now - started)}.",
                    advice="Its kept log says how far it came.",
                )
            if now - told >= STARTING_LINE_SECONDS:
                told = now
                said = tools.containers.logs(spec.name, 200, last_run=True)
                control.report(starting_line(said, now - started, last_time))
            tools.clock.sleep(0.2)
    finally:
        if spec.role == "engine":
            _keep_log(spec.name, tools)


def _note_start(spec: ContainerSpec, seen: ObservedContainer, seconds: float, tools: Tools) -> None:
    """Remember what a start showed, if it was seen from its beginning."""
    now = tools.clock.utc_now()
    if seen.started_at is None or (now - seen.started_at).total_seconds() > seconds + 10:
        return
    tools.files.note_start(spec.name, seconds)
    if spec.measurement_key:
        report = parse_engine_report(tools.containers.logs(spec.name, KEPT_LINES, last_run=True))
        measured = replace(
            report, peak_mib=_peak_mib(seen, tools), start_seconds=round(seconds, 1), taken_at=now
        )
        tools.files.note_measured(spec.measurement_key, measured)


def _peak_mib(seen: ObservedContainer, tools: Tools) -> float | None:
    """What its fullest GPU holds now; None on slices, and where somebody else computes as well."""
    hardware = tools.gpus.read(fresh=True) if seen.devices else Hardware()
    used: list[int] = []
    for gpu in map(hardware.gpu, seen.devices):
        if gpu is None or gpu.memory_used_mib is None or gpu.clients is None:
            return None
        if any(c.container_id != seen.container_id for c in gpu.clients if c.computes):
            return None
        used.append(gpu.memory_used_mib)
    return max(used, default=None)


def _check_sight(spec: ContainerSpec, seen: ObservedContainer, tools: Tools) -> None:
    """An engine that sees another device than its own would disturb whoever has that one."""
    visible = tools.containers.visible_devices(seen) if spec.devices else None
    if visible is not None and visible != {*spec.devices}:
        raise ContainerFailedError(
            f"{spec.name} sees {', '.join(sorted(visible)) or 'no GPU'} "
            f"instead of {', '.join(spec.devices)}.",
            advice="Check the container toolkit: `nvidia-ctk cdi list`, `docker info`.",
        )


STARTING_LINE_SECONDS: Final = 10.0


def _keep_log(name: ContainerName, tools: Tools) -> None:
    with contextlib.suppress(ManagerError):
        tools.files.keep_log(name, tools.containers.logs(name, KEPT_LINES, last_run=True))


def _keep_last_words(observed: Observed, tools: Tools) -> None:
    """What engines said before they ended by themselves, while their containers are there."""
    for seen in observed.containers.values():
        if seen.role == "engine" and not (seen.running or seen.name.endswith(ASIDE)):
            _keep_log(seen.name, tools)


def _start_failure(
    spec: ContainerSpec, seen: ObservedContainer | None, tools: Tools
) -> ContainerFailedError:
    if seen is None:
        return ContainerFailedError(
            f"{spec.name} disappeared while it started.", advice="Apply the plan again."
        )
    status = "" if seen.exit_code is None else f" with status {seen.exit_code}"
    reason, advice = why_ended(seen, tools)
    return ContainerFailedError(
        f"{spec.name} ended{status} before it was ready: {reason}.", advice=advice
    )


def why_ended(seen: ObservedContainer, tools: Tools) -> tuple[str, str]:
    """Half a sentence of fact, and advice, about a container that ended, from its last run."""
    said = tools.containers.logs(seen.name, KEPT_LINES, last_run=True)
    return cause_of_end(said, seen.exit_code, tools.failures)


KEPT_LINES: Final = 5000


@dataclass(eq=False)
class Job:
    """One change or task in its own thread; its log outlives every browser tab."""

    title: str
    hint: str = ""
    kind: JobKind = "change"
    fetching: frozenset[str] = frozenset()
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:8])
    started_at: datetime = field(default_factory=utc_now)
    finished_at: datetime | None = None
    lines: list[str] = field(default_factory=list)
    fault: ManagerError | None = None
    _changed: threading.Condition = field(default_factory=threading.Condition)
    control: Control = field(init=False)

    def __post_init__(self) -> None:
        self.control = Control(self.report, self.kind)

    def report(self, line: str) -> None:
        log.info("%s: %s", self.title, line)
        with self._changed:
            self.lines.append(line)
            self._changed.notify_all()

    def cancel(self) -> None:
        """Undo what is under way at the next safe point; a finished job stays as it is."""
        self.control.cancel()

    def run(self, work: Callable[[Control], None], *, at_end: Callable[[], None]) -> Job:
        # What a job changes on its way is the doing of whoever started it.
        run = partial(contextvars.copy_context().run, self._run, work, at_end)
        threading.Thread(target=run, name=self.title, daemon=True).start()
        return self

    def _run(self, work: Callable[[Control], None], at_end: Callable[[], None]) -> None:
        try:
            work(self.control)
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

    def wait(self, seconds: float) -> bool:
        """Whether it ends within that time."""
        with self._changed:
            return self._changed.wait_for(lambda: self.finished_at is not None, seconds)

    def view(self) -> JobView:
        with self._changed:
            return JobView(
                id=self.id,
                title=self.title,
                started_at=self.started_at,
                finished_at=self.finished_at,
                lines=tuple(self.lines),
                fault=str(self.fault) if self.fault else None,
                cancelled=isinstance(self.fault, CancelledError),
                hint=self.hint,
                kind="task" if self.fetching else self.kind,
                fetching=self.fetching,
                progress=self.control.progress,
                done_part=self.control.done_part,
                offers=self.control.offers,
            )


# =============================================================================
# §35 Manager — effects: the use cases; all that console and command line may call
# =============================================================================


def gpu_checks(state: State, hardware: Hardware) -> list[Check]:
    """The driver, every GPU, and whatever would undo a layout behind the operator's back."""
    checks = [_driver_check(hardware), *(_gpu_check(gpu) for gpu in hardware.gpus)]
    checks += [
        Check(name="GPU", ok=False, text=text, advice="Reboot; look at the kernel's log.")
        for text in hardware.lost
    ]
    if hardware.mig_manager:
        checks.append(
            Check(
                name="nvidia-mig-manager",
                ok=not state.mig_layouts,
                text="cuts GPUs at boot by its own file; its default switches MIG off",
                advice="Run: systemctl disable --now nvidia-mig-manager",
            )
        )
    return checks


def _driver_check(hardware: Hardware) -> Check:
    if hardware.fault is not None:
        return Check(
            name="driver", ok=False, text=hardware.fault.fact, advice=hardware.fault.advice
        )
    if hardware.reboot_pending:
        return Check(
            name="driver",
            ok=False,
            text=f"{hardware.library_version} is installed, {hardware.kernel_version} is loaded",
            advice="Reboot to finish the upgrade; no new container reaches a GPU before.",
        )
    return Check(
        name="driver", ok=True, text=hardware.driver_version or "none; models run on the CPU"
    )


# Of memory, bus, NVLink and firmware: NVIDIA's list of Xid errors.
HARDWARE_XIDS: Final = frozenset({
    48, 54, 61, 62, 63, 64, 74, 79, 92, 94, 95, 109, 110, 119, 120, 121, 136, 140, 143, 144, 145,
})  # fmt: skip


def _gpu_check(gpu: Gpu) -> Check:
    # Others, such as 13, 31 or 43, are faults of a program that used the GPU.
    troubles = [f"Xid {n}" for n in dict.fromkeys(gpu.xids or ()) if n in HARDWARE_XIDS]
    if gpu.ecc_uncorrected:
        troubles.append(f"{gpu.ecc_uncorrected} uncorrected memory errors since boot")
    if gpu.mig_enabled is not None and gpu.mig_pending != gpu.mig_enabled:
        troubles.append("its MIG mode waits for a reset")
    if gpu.persistence is False:
        return Check(
            name=gpu.title,
            ok=False,
            text=", ".join([*troubles, "persistence is off: every look wakes the card up"]),
            advice="Run: systemctl enable --now nvidia-persistenced",
        )
    return Check(
        name=gpu.title,
        ok=not troubles,
        text=", ".join(troubles) or gpu.name or gpu.uuid,
        advice="Look up the number in NVIDIA's Xid list; a reboot resets the GPU.",
    )


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


def new_bearer() -> pydantic.SecretStr:
    """A fresh secret of the shape that every client of OpenAI's takes.

    A virtual key that is made with one can be taken back although LiteLLM's answer was lost.
    """
    return pydantic.SecretStr(f"sk-{secrets.token_urlsafe(32)}")


def hash_of(secret: pydantic.SecretStr) -> str:
    """By which LiteLLM knows a virtual key."""
    return sha256(reveal(secret).encode()).hexdigest()


def new_direct_key(name: str, models: Sequence[str] = (), *, emergency: bool = False) -> DirectKey:
    """A key with a fresh secret, not granted yet; see `granting_direct`."""
    wished = {"name": name, "models": list(models), "emergency": emergency}
    return parse_direct_key(wished | {"secret": reveal(new_bearer())})


def new_admin_token(name: str) -> tuple[AdminToken, pydantic.SecretStr]:
    """A token with its fresh secret, not granted yet; see `granting_token`."""
    secret = f"admin-{secrets.token_urlsafe(32)}"
    token = parse_admin_token({"name": name, "sha256": sha256(secret.encode()).hexdigest()})
    return token, pydantic.SecretStr(secret)


class Keys:
    """The virtual keys of colleagues and their groups, which live in LiteLLM's database."""

    def __init__(self, store: StateStore, tools: Tools, start_task: StartTask) -> None:
        self._store = store
        self._tools = tools
        self._start_task = start_task
        self._noting = store.audit.noting
        self._refusal = store.audit.noting_refusal

    def all(self) -> list[VirtualKey]:
        return self._api().list_keys()

    def with_groups(self) -> tuple[list[VirtualKey], list[KnownGroup]]:
        """All of both, by name."""
        api = self._api()
        return api.list_keys(), api.list_groups()

    def create(self, settings: KeySettings) -> pydantic.SecretStr:
        """A new virtual key; this is the only time its secret is seen."""
        with self._noting(f"Create the key {settings.alias}"):
            self._check_models([settings])
            api = self._api()
            _check_groups([settings], api)
            if any(key.settings.alias == settings.alias for key in api.list_keys()):
                raise RefusedError(
                    f"There is a key called {settings.alias!r} already.",
                    advice="Choose another name, or revoke that one first.",
                )
            return api.create_key(key_body(settings, utc_now()))

    def create_many(self, text: str, shared: Json) -> Job:
        """A key for each row of a CSV, see `parse_people`, with these settings: all, or none.

        The job offers the secrets as another CSV, see `JobKeeper.fetch`.
        """
        with self._refusal(MAKING_KEYS):
            template = parse_key_settings(shared | {"alias": "of the list"})
            api = self._api()
            wished = parse_people(text, template, api.list_keys())
            self._check_models(wished)
            _check_groups(wished, api)

        def work(control: Control) -> None:
            with self._noting(f"Create the keys {', '.join(s.alias for s in wished)}"):
                control.offer(_create_all(wished, self._api, self._tools.clock, control))

        hint = "The secrets are told once, under Keys, within an hour."
        return self._start_task(MAKING_KEYS, work, hint)

    def edit(self, name: str, changes: Json) -> KeySettings:
        """The settings that are named change; a request under way is not touched."""
        api, key, *_ = self._found("Change the key", name)
        with self._refusal(f"Change the key {key.settings.alias}"):
            wished = parse_key_settings(asdict(key.settings) | changes)
            self._check_models([wished])
            _check_groups([wished], api)
            body = key_changes(key.settings, wished, utc_now())
        if body:
            with self._noting(f"Change the key {key.settings.alias}: {', '.join(body)}"):
                api.update_key(key.key_hash, body)
        return wished

    def rotate(self, name: str, grace: timedelta) -> tuple[KeySettings, pydantic.SecretStr]:
        """Another secret for the same key; the old one works until the grace is over.

        What was used of the budget is used for both, as far as it was until now.
        """
        api, key, *_ = self._found("Another secret for the key", name)
        now = utc_now()
        with self._noting(f"Another secret for the key {key.settings.alias}"):
            match key_state(key, now):
                case "expired":
                    raise RefusedError(f"The key of {name} has expired.", advice="Extend it first.")
                case "blocked":
                    raise RefusedError(f"The key of {name} is blocked.", advice="Unblock it first.")
                case _:
                    pass
            old = retired(key, now + max(grace, timedelta(seconds=1)))
            secret = new_bearer()
            new_hash = hash_of(secret)
            marked = key_changes(key.settings, old, now)
            marked["metadata"] = _metadata(key.settings) | {"replaced_by": new_hash}
            try:
                api.update_key(key.key_hash, marked)
                made = key_body(key.settings, now) | {"spend": key.used, "key": reveal(secret)}
                api.create_key(made)
            except BaseException:
                _take_rotation_back(key, old, new_hash, self._api, self._tools.clock)
                raise
            if not grace:
                with contextlib.suppress(GatewayError):  # it has ended in any case
                    api.delete_keys([key.key_hash])
        return key.settings, secret

    def block(self, name: str, *, blocked: bool = True) -> None:
        """Refuse its requests until it is unblocked."""
        doing = f"{'Block' if blocked else 'Unblock'} the key"
        api, *keys = self._found(doing, name)
        with self._noting(f"{doing} {keys[0].settings.alias}"):
            for key in keys:
                api.block_key(key.key_hash, blocked=blocked)

    def revoke(self, name: str) -> None:
        """It stops working, as do its former secrets; what it used stays accounted for."""
        api, *keys = self._found("Revoke the key", name)
        with self._noting(f"Revoke the key {keys[0].settings.alias}"):
            api.delete_keys([key.key_hash for key in keys])

    def why(self, text: str, model: str) -> Diagnosis:
        """Why a key works or fails; the text is a secret, a name, or a part of either."""
        state = self._store.load()
        known = self.with_groups()
        served = serving(state, observe(self._tools, state.edge))
        return diagnose(text, model, known, state, served, utc_now())

    def groups(self) -> list[KnownGroup]:
        return self._api().list_groups()

    def set_group(self, changes: Json) -> Group:
        """A new group, or what is named of a known one."""
        with self._refusal(f"Set the group {changes['name']}"):
            api = self._api()
            known = {group.settings.name: group.settings for group in api.list_groups()}
            old = known.get(changes["name"])
            wished = parse_group((asdict(old) if old else {}) | changes)
            check_models(wished, self._store.load())
        with self._noting(f"{'Change' if old else 'Create'} the group {wished.name}"):
            (api.update_group if old else api.create_group)(group_body(wished))
        return wished

    def block_group(self, name: str, *, blocked: bool = True) -> None:
        """Refuse the requests of all its keys until it is unblocked."""
        with self._noting(f"{'Block' if blocked else 'Unblock'} the group {name}"):
            api = self._api()
            _known_group(name, api)
            api.block_group(name, blocked=blocked)

    def extend_group(self, name: str, until: datetime | None) -> int:
        """All its keys end then, or never; how many those are."""
        with self._noting(f"Let the keys of {name} end: {until or 'never'}"):
            api = self._api()
            now, keys = utc_now(), [key for key in _keys_of(name, api) if not key.replaced_by]
            wished = [replace(key.settings, expires_at=until) for key in keys]
            bodies = [key_changes(k.settings, w, now) for k, w in zip(keys, wished, strict=True)]
            for key, body in zip(keys, bodies, strict=True):
                if body:
                    api.update_key(key.key_hash, body)
        return len(keys)

    def revoke_group(self, name: str) -> int:
        """All its keys stop working, and the group is gone; how many they were."""
        with self._refusal(f"Revoke the group {name}"):
            api = self._api()
            keys = _keys_of(name, api)
        with self._noting(f"Revoke the group {name} and its {len(keys)} keys"):
            if keys:
                api.delete_keys([key.key_hash for key in keys])
            api.delete_group(name)
        return len(keys)

    def _found(
        self, doing: str, name: str
    ) -> tuple[LiteLlmApi, VirtualKey, *tuple[VirtualKey, ...]]:
        """What a change of a key begins with: that key, and what it replaced."""
        with self._refusal(f"{doing} {name}"):
            api = self._api()
            known = api.list_keys()
            key, *former = with_former(named_key(known, name), known)
            return api, key, *former

    def _check_models(self, wished: Sequence[KeySettings]) -> None:
        state = self._store.load()
        for settings in {settings.models: settings for settings in wished}.values():
            check_models(settings, state)

    def _api(self) -> LiteLlmApi:
        return self.gateway(self._store.load())

    def gateway(self, state: State) -> LiteLlmApi:
        """The management API of the slot that serves; refused where none does."""
        observed = observe(self._tools)
        if is_database_down(state, observed):
            raise DatabaseError(
                "PostgreSQL is down, and keys and usage live in it.",
                advice="Read its log with `docker logs`, then run `apply`.",
            )
        for slot in [observed.edge.slot] if observed.edge else SLOTS:
            seen = observed.containers.get(gateway_name(state, slot))
            if seen is None or seen.address is None:
                continue
            # One that Caddy serves may be too busy to say that it is ready.
            if seen.ready or (seen.running and observed.edge):
                return LiteLlmApi(
                    seen.address,
                    state.secrets.master_key,
                    lambda query: usage_tables(state, observed.containers).rows(query),
                )
        raise GatewayError(
            "The endpoint is not running, and keys live in its database.",
            advice="Deploy a model, or run `apply`, first.",
        )


MAKING_KEYS: Final = "Create keys from a list"


def _create_all(
    wished: Sequence[KeySettings], gateway: Callable[[], LiteLlmApi], clock: Clock, control: Control
) -> pydantic.SecretStr:
    """All of these keys, as a CSV with their secrets; or none of them."""
    made: list[tuple[KeySettings, pydantic.SecretStr]] = []
    try:
        api = gateway()
        for settings in wished:
            control.check()
            control.progress = f"{len(made)} of {len(wished)} keys"
            control.done_part = len(made) / len(wished)
            made.append((settings, secret := new_bearer()))
            api.create_key(key_body(settings, utc_now()) | {"key": reveal(secret)})
        control.check()
    except BaseException as error:
        if made:
            control.report(f"Taking {len(made)} keys back.")
            _take_back(made, gateway, clock)
        if isinstance(error, GatewayError):
            raise GatewayError(f"No key was made: {error.fact}", advice=error.advice) from error
        raise
    control.report(f"{len(made)} keys are made.")
    return pydantic.SecretStr(secrets_csv(made))


def _take_back(
    made: Sequence[tuple[KeySettings, pydantic.SecretStr]],
    gateway: Callable[[], LiteLlmApi],
    clock: Clock,
) -> None:
    """LiteLLM is given two minutes to be back; raises GatewayError with whose keys may stay."""
    hashes = {hash_of(secret) for _, secret in made}
    fault = _last_fault(lambda: _delete_known(gateway(), hashes), TAKE_BACK_PAUSES, clock)
    if fault is not None:
        raise GatewayError(
            "Of a list that broke off, these keys may be there, and their secrets are known to "
            f"nobody: {', '.join(settings.alias for settings, _ in made)}.",
            advice="Revoke them when LiteLLM answers again.",
        ) from fault


def _take_rotation_back(
    key: VirtualKey, old: KeySettings, new_hash: str,
    gateway: Callable[[], LiteLlmApi], clock: Clock,
) -> None:  # fmt: skip
    """The key as it was, however far its replacement came; raises GatewayError if it is not."""
    back = key_changes(old, key.settings, utc_now()) | {"metadata": _metadata(key.settings)}

    def attempt() -> None:
        api = gateway()
        _delete_known(api, {new_hash})
        api.update_key(key.key_hash, back)

    fault = _last_fault(attempt, TAKE_BACK_PAUSES[:3], clock)
    if fault is not None:
        raise GatewayError(
            f"The key of {key.settings.alias} may end at {old.expires_at:%Y-%m-%d %H:%M} UTC, and "
            "nobody has another secret for it.",
            advice="Look at `key list` when LiteLLM answers again; revoke it, and make a new one.",
        ) from fault


def _last_fault(
    attempt: Callable[[], None], pauses: Sequence[float], clock: Clock
) -> ManagerError | None:
    """None as soon as an attempt succeeds; they come after these seconds each."""
    fault: ManagerError | None = None
    for seconds in pauses:
        clock.sleep(seconds)
        try:
            attempt()
        except ManagerError as error:
            fault = error
        else:
            return None
    return fault


def _delete_known(api: LiteLlmApi, hashes: Collection[str]) -> None:
    """Those of them that are there, which LiteLLM wants to be all."""
    there = [key.key_hash for key in api.list_keys() if key.key_hash in hashes]
    if there:
        api.delete_keys(there)


TAKE_BACK_PAUSES: Final = (0, 2, 8, 20, 30, 60)  # seconds


def _known_group(name: str, api: LiteLlmApi) -> KnownGroup:
    found = [group for group in api.list_groups() if group.settings.name == name]
    if not found:
        raise UnknownError(
            f"There is no group called {name!r}.", advice="Make it first, or see `group list`."
        )
    return found[0]


def _check_groups(wished: Sequence[KeySettings], api: LiteLlmApi) -> None:
    for group in sorted({settings.group for settings in wished if settings.group}):
        _known_group(group, api)


def _keys_of(group: str, api: LiteLlmApi) -> list[VirtualKey]:
    _known_group(group, api)
    return [key for key in api.list_keys() if key.settings.group == group]


class Providers:
    """What providers have, asked anew each time; nothing of it is kept."""

    def __init__(self, store: StateStore, tools: Tools) -> None:
        self._store = store
        self._tools = tools

    def look(self, name: str) -> ProviderHealth:
        """The health of one; what is wrong with it is in the answer."""
        return self._look(self._store.load().provider(name))

    def all(self) -> list[ProviderHealth]:
        """The health of every provider by name, asked side by side."""
        known = sorted(self._store.load().providers, key=lambda provider: provider.name)
        with concurrent.futures.ThreadPoolExecutor(max_workers=min(len(known), 16) or 1) as pool:
            return list(pool.map(self._look, known))

    def _look(self, provider: Provider) -> ProviderHealth:
        if not model_lists(provider):
            return unlisted(provider)
        try:
            here = self._tools.containers.host_address() if reaches_host(provider) else None
            return self._tools.providers.look(provider, here)
        except ManagerError as error:
            return ProviderHealth(
                provider=provider.name, verdict="fails", fault=error.fact, advice=error.advice
            )


StartTask = Callable[[str, Callable[[Control], None], str], Job]


class ImageLibrary:
    """The images of this installation: pulled, built from recipes, pinned and pruned."""

    def __init__(
        self,
        store: StateStore,
        tools: Tools,
        recipes: Callable[[], Recipes],
        start_task: StartTask,
        save: Callable[[Change], State],
    ) -> None:
        self.recipes = recipes  # as their files are now
        self._store = store
        self._tools = tools
        self._start_task = start_task
        self._save = save

    def rows(self) -> list[list[str]]:
        """What `image list` shows; without Docker, what is pinned all the same."""
        images: tuple[ObservedImage, ...] | None = None
        with contextlib.suppress(DockerAbsentError):
            images = self._tools.images.observe()
        return image_rows(self._store.load(), self.recipes(), images)

    def build_recipe(self, name: str, device: Device) -> Job:
        """Build a recipe's image and pin it; a failed build leaves the pin as it is.

        Models on the image of before go on with it until their next plan is applied.
        """
        recipe, state = find_recipe(self.recipes(), name), self._store.load()
        observed = self._tools.containers.observe()
        steps = plan_build(recipe, device, state, observed, "asked for")
        image = recipe_image(recipe, recipe_base(recipe, device, state.images))
        pin = RecipeImage(recipe=name, device=device, image=image)

        def work(control: Control) -> None:
            if image in observed.images:
                control.report(f"{image} is here already: the recipe has not changed.")
            else:
                apply_stage(Stage(title=name, steps=steps), self._tools, control)
            # A build of minutes is not thrown away because a change is just under way.
            when_free(lambda: self._save(pinning_recipe(pin)), self._tools, control)

        return self._start_task(f"Build {name}", work, "Next: `plan`, for the models that use it.")

    def pull(self, role: str | None = None) -> Job:
        """Pull the image of a role, or all that registered models and the endpoint need."""
        state = self._store.load()
        wanted = [str(getattr(state.images, role))] if role else needed_images(state)
        here = self._tools.containers.observe().images

        def work(control: Control) -> None:
            for image in wanted:
                if image in here:
                    control.report(f"{image} is here already.")
                    continue
                pull = (PullImage(image, "asked for"),)
                apply_stage(Stage(title=image, steps=pull), self._tools, control)

        return self._start_task(f"Pull the {role} image" if role else "Pull images", work, "")

    def pinning_digest(self, role: str) -> Change:
        """The change to exactly the image that is here; see `pinning_digest`."""
        return pinning_digest(role, self._store.load(), self._tools.images.observe())

    def unused_rows(self) -> list[list[str]]:
        """What `prune` would remove."""
        images = self._tools.images.observe()
        rows = unused_rows(unused_images(self._store.load(), images), images)
        return rows + [
            [f"compiled/{folder}", "", "", format_size(size)]
            for folder, size in self._unused_compiled().items()
        ]

    def _unused_compiled(self) -> dict[str, int]:
        """What was compiled in images that neither a model nor a container has any more."""
        state = self._store.load()
        wanted = {engine_image(model, state) for model in state.models}
        there = {seen.image for seen in self._tools.containers.observe().containers.values()}
        kept = {compile_folder(image) for image in wanted | there}
        return {name: size for name, size in self._store.compiled().items() if name not in kept}

    def prune(self) -> Job:
        """Remove what this installation built or compiled and nothing needs any more."""

        def work(control: Control) -> None:
            images = self._tools.images.observe()
            unused = unused_images(self._store.load(), images)
            for image, row in zip(unused, unused_rows(unused, images), strict=True):
                control.check()
                try:
                    self._tools.images.remove(image)
                except ContainerFailedError as error:  # it came into use meanwhile
                    control.report(f"kept {row[0]}: {error}")
                else:
                    control.report(f"removed {row[0]}: {row[-1]}")
            compiled = self._unused_compiled()
            for folder in compiled:
                self._store.drop_compiled(folder)
            freed = sum(own_bytes(image, images) for image in unused) + sum(compiled.values())
            control.report(f"{len(unused)} images removed, about {format_size(freed)} freed.")

        return self._start_task("Prune images", work, "")


class Proofs:
    """The route prober and the privacy proof, as jobs; their dated results are kept."""

    def __init__(self, store: StateStore, tools: Tools, keys: Keys, start_task: StartTask) -> None:
        self._store = store
        self._tools = tools
        self._keys = keys
        self._start_task = start_task
        self._files = ProofFiles(store.home / "proofs")

    def last_probe(self) -> ProbeResult | None:
        """The newest result; None before the first."""
        text = self._files.newest("probe")
        return None if text is None else _PROBE.validate_json(text)

    def last_privacy(self) -> PrivacyProof | None:
        text = self._files.newest("privacy")
        return None if text is None else _PRIVACY.validate_json(text)

    def probe(self) -> Job:
        """Try every way in; refused where the endpoint does not run."""
        state = self._store.load()
        gateway, client = self._keys.gateway(state), self.client(state)

        def work(control: Control) -> None:
            calls = probe_requests(state)
            with bearers(state, gateway, client) as keys:
                replies = [*_sent(calls, keys, client, control, self._tools.clock)]
            result = ProbeResult(
                taken_at=self._tools.clock.utc_now(),
                requests=tuple(map(judge, calls, replies)),
                untried=tuple(r.name for r in state.routes if r.name.endswith("*")),
            )
            self._files.keep("probe", result.taken_at, _PROBE.dump_json(result, indent=2).decode())
            control.report(probe_headline(result))

        return self._start_task(PROBING, work, "")

    def privacy(self) -> Job:
        """Send canaries along every way, and look for them everywhere; takes a minute or two."""
        state = self._store.load()
        gateway, client = self._keys.gateway(state), self.client(state)
        if not callable_names(state):
            raise RefusedError("No model is served.", advice="Deploy one, then prove it again.")
        return self._start_task(
            PROVING, lambda control: self._prove(state, gateway, client, control), ""
        )

    def _prove(
        self, state: State, gateway: LiteLlmApi, client: EdgeClient, control: Control
    ) -> None:
        began, run = self._tools.clock.monotonic(), secrets.token_hex(12)
        calls = canary_requests(state, run)
        with bearers(state, gateway, client) as keys:
            *replies, last = _sent(
                [*calls, first_call(state)], keys, client, control, self._tools.clock
            )
            control.report(f"{len(calls)} requests sent; LiteLLM writes their rows.")
            self._await_row(state, last.call_id, control)
        looking = PrivacySearch(
            self._tools.containers.contents, control, calls,
            wanted_texts(run, {what: reveal(key) for what, key in keys.items()}),
        )  # fmt: skip
        observed = self._tools.containers.observe()
        for seen in observed.containers.values():
            looking.container(seen, last.call_id)
        looking.home(self._store.home, state)
        control.progress = ""
        proof = PrivacyProof(
            taken_at=self._tools.clock.utc_now(),
            seconds=round(self._tools.clock.monotonic() - began, 1),
            images={seen.name: seen.image for seen in observed.containers.values()},
            sent=tuple(map(sent_canary, calls, replies)),
            places=tuple(looking.places),
            findings=tuple(looking.findings),
            left_out=NOT_SEARCHED,
        )
        self._files.keep("privacy", proof.taken_at, _PRIVACY.dump_json(proof, indent=2).decode())
        control.report(privacy_headline(proof))

    def client(self, state: State) -> EdgeClient:
        """Whoever speaks to the endpoint from outside."""
        root = ""
        if isinstance(state.edge.tls, InternalTls):
            archive = self._tools.containers.contents.archive(edge_name(state), CADDY_ROOT)
            root = read_from_tar(archive).decode()
        return EdgeClient(state.edge, root)

    def _await_row(self, state: State, call_id: str, control: Control) -> None:
        """Until the accounting of a request is in the database, and with it of those before."""
        if not re.fullmatch(r"[0-9a-f-]+", call_id):
            raise GatewayError(
                "The last request of the proof was not answered.", advice="Run `probe` first."
            )
        query = (
            'SELECT count(*) FROM "LiteLLM_SpendLogs" WHERE "startTime" > now() - interval '  # noqa: S608
            f"'1 hour' AND metadata::text LIKE '%{call_id}%'"
        )
        command = [*PSQL, "-tAc", query]
        until = self._tools.clock.monotonic() + ROW_SECONDS
        while self._tools.clock.monotonic() < until:
            control.check()
            said = self._tools.containers.contents.output(database_name(state), command)
            if b"".join(said).strip() != b"0":
                return
            self._tools.clock.sleep(1)
        raise GatewayError(
            f"LiteLLM wrote no accounting within {ROW_SECONDS:.0f} s, so nothing can be proven.",
            advice="Look at its log and at PostgreSQL's.",
        )


_PROBE: Final = pydantic.TypeAdapter(ProbeResult)
_PRIVACY: Final = pydantic.TypeAdapter(PrivacyProof)
ROW_SECONDS: Final = 120.0
PROOF_KEY_MINUTES: Final = 30


@contextlib.contextmanager
def bearers(
    state: State, gateway: LiteLlmApi, client: EdgeClient
) -> Iterator[dict[str, pydantic.SecretStr]]:
    """Every kind of key by its title; LiteLLM's own expire soon, and are revoked in any case."""
    wrong = pydantic.SecretStr(f"sk-{secrets.token_urlsafe(24)}")
    keys = {WRONG: wrong, **{direct_title(key): key.secret for key in state.direct_keys}}
    with _temporary_key(gateway) as right:
        with _temporary_key(gateway) as revoked:
            # Known to LiteLLM's cache, from which a revocation must take it.
            client.send(EdgeRequest(way="/v1", path="/v1/models"), revoked)
        yield {**keys, RIGHT: right, REVOKED: revoked}


@contextlib.contextmanager
def _temporary_key(gateway: LiteLlmApi) -> Iterator[pydantic.SecretStr]:
    key = gateway.create_key({
        "key_alias": f"proof {secrets.token_hex(4)}",
        "duration": f"{PROOF_KEY_MINUTES}m",
        "max_parallel_requests": 8,
    })  # fmt: skip
    try:
        yield key
    finally:
        gateway.delete_keys([hash_of(key)])


def _sent(
    calls: Sequence[EdgeRequest], keys: Mapping[str, pydantic.SecretStr],
    client: EdgeClient, control: Control, clock: Clock,
) -> Iterator[EdgeReply]:  # fmt: skip
    """The answers one by one; where LiteLLM has set all replicas aside it is waited for."""
    for number, request in enumerate(calls):
        control.progress = f"{number} of {len(calls)} requests"
        control.done_part = number / len(calls)
        control.check()
        reply = client.send(request, keys.get(request.key))
        for _ in range(MOST_TRIES):
            if reply.status != COOLING_STATUS:
                break
            clock.sleep(COOLING_SECONDS)
            reply = client.send(request, keys.get(request.key))
        yield reply
    control.progress, control.done_part = "", None


# Together longer than a route's usual cool-down, which a single broken request can cause.
COOLING_STATUS, MOST_TRIES, COOLING_SECONDS = 429, 8, 2.0


class PrivacySearch:
    """Looks for canaries and keys, place by place, where a mark of its own must be found too."""

    def __init__(
        self, contents: Contents, control: Control,
        calls: Sequence[EdgeRequest], wanted: Mapping[bytes, str],
    ) -> None:  # fmt: skip
        self._contents = contents
        self._control = control
        self._sent = [call.what for call in calls]
        self._labels = {call.what for call in calls if call.is_label}
        self._wanted = wanted
        self._mark = f"privacy proof {secrets.token_hex(8)}"
        self.places: list[SearchedPlace] = []
        self.findings: list[Finding] = []

    def container(self, seen: ObservedContainer, call_id: str) -> None:
        """Its log, its volumes, what it wrote elsewhere, and what its database has."""
        name, contents = seen.name, self._contents
        look = partial(self._look, role=seen.role, mark=self._mark if seen.running else None)
        volumes = contents.volumes(name)
        with self._planted(name, ("/", *volumes)) if seen.running else contextlib.nullcontext():
            look(f"{name}: log", contents.log(name))
            for volume in volumes:
                look(f"{name}: volume {volume}", contents.archive(name, volume))
            written = (contents.archive(name, path) for path in contents.changed(name))
            look(f"{name}: written files", itertools.chain.from_iterable(written))
        if seen.role == "database" and seen.running:
            dump = contents.output(name, ["pg_dump", *PSQL[1:]])
            look(f"{name}: every row", dump, mark=call_id)
        if seen.role == "cache" and seen.running:
            stored = contents.output(name, ["sh", "-c", EVERY_REDIS_VALUE, self._mark])
            look(f"{name}: every value", stored)

    @contextlib.contextmanager
    def _planted(self, name: ContainerName, folders: Sequence[str]) -> Iterator[None]:
        """The mark in its log, which it stays in, and as a file in these directories."""
        files = [f"{folder.rstrip('/')}/.privacy-proof" for folder in folders]
        write = 'echo "$0" > /proc/1/fd/1; for file in "$@"; do echo "$0" > "$file"; done'
        [*self._contents.output(name, ["sh", "-c", write, self._mark, *files])]
        try:
            yield
        finally:
            [*self._contents.output(name, ["rm", "-f", *files])]

    def _look(self, place: str, chunks: Iterable[bytes], *, role: str, mark: str | None) -> None:
        self._control.check()
        self._control.progress = place
        wanted = {**self._wanted, **({mark.encode(): "mark"} if mark else {})}
        try:
            size, found = search(chunks, wanted, self._sent)
        except ManagerError as error:
            self.places.append(SearchedPlace(place=place, size_bytes=0, fault=error.fact))
            return
        control = found.pop("mark", None) is not None if mark else None
        self.places.append(SearchedPlace(place=place, size_bytes=size, control=control))
        self._note(place, found, role)

    def _note(
        self, place: str, found: Mapping[str, str], role: str, excused: Collection[str] = ()
    ) -> None:
        self.findings += [
            Finding(
                place=place, what=what, excerpt=excerpt, kept=why_kept(role, what, self._labels)
            )
            for what, excerpt in found.items()
            if what not in excused
        ]

    def home(self, home: Path, state: State) -> None:
        """Every file of the home but the weights; what must know direct keys may hold them."""
        weights = Path(state.hugging_face_home or home / "huggingface")
        direct = {direct_title(key) for key in state.direct_keys}
        wanted = {**self._wanted, self._mark.encode(): "mark"}
        size, control, planted = 0, False, home / "proofs" / ".privacy-proof"
        with file_errors("search its home"):
            planted.parent.mkdir(mode=0o700, exist_ok=True)
            planted.write_text(self._mark)
            for path in sorted(home.rglob("*")):
                if path.is_symlink() or not path.is_file() or path.is_relative_to(weights):
                    continue
                self._control.check()
                name = str(path.relative_to(home))
                read, found = search(read_chunks(path), wanted, self._sent)
                size += read
                control |= found.pop("mark", None) is not None
                excused = direct if may_hold_direct_keys(name) else ()
                self._note(f"home: {name}", found, "home", excused)
            planted.unlink()
        self.places.append(SearchedPlace(place="home", size_bytes=size, control=control))


# Keys and, of each type that LiteLLM uses, values.
EVERY_REDIS_VALUE: Final = """export REDISCLI_AUTH="$REDIS_PASSWORD"
redis-cli set privacy-proof "$0" EX 60
redis-cli --scan | while read -r key; do
  echo "$key"
  case "$(redis-cli type "$key")" in
    string) redis-cli get "$key" ;; hash) redis-cli hgetall "$key" ;;
    list) redis-cli lrange "$key" 0 -1 ;; set) redis-cli smembers "$key" ;;
    zset) redis-cli zrange "$key" 0 -1 ;;
  esac
done"""
WHOLE_LOG: Final = 1_000_000  # lines


class Logs:
    """What a model's engines said, in this run and in the one before."""

    def __init__(self, store: StateStore, tools: Tools) -> None:
        self._store = store
        self._tools = tools

    def of(self, name: str, *, search: str = "", tail: int = 2000, previous: bool = False) -> str:
        """The container's where there is one, else what was kept of it.

        With `search` only the lines that have this text, with their numbers; `previous`: of the
        run before, which is a failed start where the container from before it is back.
        """
        state = self._store.load()
        names = replica_names(state, state.model(name))
        read = self._previous_log if previous else self._replica_log
        said = "\n".join(read(replica, tail) for replica in names)
        return search_log(said, search) if search else said

    def _replica_log(self, replica: ContainerName, tail: int) -> str:
        if self._tools.containers.look(replica) is not None:
            return self._tools.containers.logs(replica, tail)
        return "\n".join(self._store.kept_log(replica).splitlines()[-tail:])

    def _previous_log(self, replica: ContainerName, tail: int) -> str:
        kept = self._store.kept_log(replica)
        if kept in self._replica_log(replica, WHOLE_LOG):
            kept = self._store.kept_log(replica, previous=True)
        return "\n".join(kept.splitlines()[-tail:])

    def why_ended(self, name: str) -> str:
        """A sentence of fact and one of advice, about a model that has a container that ended."""
        state = self._store.load()
        for replica in replica_names(state, state.model(name)):
            seen = self._tools.containers.look(replica)
            if seen is not None and not seen.running:
                fact, advice = why_ended(seen, self._tools)
                return f"{fact}. {advice}"
        return "its container is gone. Deploy it again."

    def follow(self, name: str) -> Iterator[str]:
        state = self._store.load()
        return self._tools.containers.follow(replica_names(state, state.model(name))[0])


class WeightsLibrary:
    """What the hub has, what is on this server, and whether it fits where it shall run."""

    def __init__(
        self,
        store: StateStore,
        tools: Tools,
        start_task: StartTask,
        hardware: Callable[[], Hardware],
    ) -> None:
        self._store = store
        self._tools = tools
        self._start_task = start_task
        self._hardware = hardware
        self._known: dict[HubSource | LocalSource, RepositoryFacts] = {}

    def search(self, text: str, kind: ModelType | None = None) -> Sequence[RepositoryHit]:
        """The most downloaded repositories whose names hold the text."""
        return self._tools.weights.search(text, kind=kind)

    def look(self, source: HubSource | LocalSource) -> RepositoryFacts:
        """What a repository or directory holds, asked anew; remembered for the fit."""
        if isinstance(source, LocalSource):
            facts = inspect_directory(Path(source.path))
        else:
            facts = self._tools.weights.inspect(source.repository, source.revision)
        self._known[source] = facts
        return facts

    def facts(self, source: HubSource | LocalSource) -> RepositoryFacts | None:
        """The same without asking the hub; None where nothing is known here."""
        if source not in self._known:
            with contextlib.suppress(ManagerError):
                if isinstance(source, LocalSource):
                    return self.look(source)
                known = self._tools.weights.cache.inspect(source.repository, source.revision)
                if known is not None:
                    self._known[source] = known
        return self._known.get(source)

    def pinned(self, source: HubSource | LocalSource) -> HubSource | LocalSource:
        """The source at the commit that it means now; as it is where the hub cannot be asked."""
        if isinstance(source, LocalSource) or COMMIT.fullmatch(source.revision or ""):
            return source
        hub = self._tools.weights
        try:
            commit: str | None = hub.resolve(source.repository, source.revision)
        except HubError as error:
            commit = hub.cache.commit(source.repository, source.revision)
            if commit is None and error.kind not in {*TRANSIENT, "offline", "gated", "token"}:
                raise  # a name that the hub does not know is best said now
        pinned = replace(source, revision=commit) if commit else source
        if source in self._known:  # it was looked at before it was registered
            self._known.setdefault(pinned, self._known[source])
        return pinned

    def download(self, source: HubSource, kind: ModelType | None = None) -> Job:
        """Fetch weights beside whatever else runs; what is here already is not fetched again."""

        def work(control: Control) -> None:
            commit = download(source, kind, self._tools, control)
            control.report(f"{source.repository}@{commit} is on this server.")

        return self._start_task(f"Download {format_source(source)}", work, "")

    def cache(self) -> WeightsCache:
        return self._tools.weights.cache.read()

    def removal(
        self, repository: str, revision: str | None = None, *, despite_use: bool = False
    ) -> Removal:
        """What removing would take away; refused while a registered model uses it."""
        state = self._store.load()
        return plan_removal(self.cache(), state, repository, revision, despite_use=despite_use)

    def orphans(self) -> tuple[Removal, ...]:
        """What no registered model uses; refused where others may keep theirs as well."""
        state = self._store.load()
        if state.hugging_face_home is not None:
            raise RefusedError(
                f"{state.hugging_face_home} may hold what others downloaded.",
                advice="Remove repositories one by one, with `cache remove`.",
            )
        return orphans(self.cache(), state)

    def remove(self, removal: Removal) -> None:
        with self._store.audit.noting(f"Remove weights of {removal.repository}"):
            self._tools.weights.cache.remove(removal)

    def fit(self, model: Model, at_once: int = 1) -> Fit | None:
        """Whether a model fits where it is placed; None where its weights are not known here."""
        facts = self.facts(model.source)
        if facts is None:
            return None
        hardware = self._hardware()
        place = place_of(model.placement, hardware, server_memory_mib())
        return estimate(
            facts.weights_bytes, read_architecture(facts.config),
            engine_wish(model.engine_arguments), place,
            measured=self.measured(model), at_once=at_once,
        )  # fmt: skip

    def places(self, model: Model, at_once: int = 1) -> list[Candidate]:
        """Where on this server it would fit, the best first."""
        facts = self.facts(model.source)
        if facts is None:
            return []
        return places_that_fit(
            facts.weights_bytes, read_architecture(facts.config),
            engine_wish(model.engine_arguments), self._hardware(), self._store.load(),
            at_once=at_once, model=model.name,
        )  # fmt: skip

    def measured(self, model: Model) -> Measured | None:
        """What the last start of such an engine on such a place showed; None: there was none."""
        image = engine_image(model, self._store.load())
        return self._store.read_measured().get(measurement_key(model, image, self._hardware()))


class DatabaseCare:
    """LiteLLM's database on the disk: its size, its dumps, and the way back to one."""

    def __init__(self, store: StateStore, tools: Tools, start_task: StartTask) -> None:
        self._store = store
        self._tools = tools
        self._start_task = start_task

    def size(self) -> DatabaseSize:
        return self._tools.database.size(database_name(self._store.load()))

    def dumps(self) -> list[Dump]:
        """Newest first."""
        return self._tools.database.dumps()

    def dump(self, name: str = "") -> Job:
        """A dump beside whatever else runs; without a name one that makes way for newer ones."""
        state = self._store.load()
        file = named_dump(name) if name else automatic_dump(self._tools.clock.utc_now())
        server, kept = database_name(state), state.housekeeping.dumps_kept
        work = partial(dump_database, server, file, kept, self._tools)
        return self._start_task("Dump the database", work, f"It is in backups/{file}.")

    def restoring(self, name: str) -> Change:
        """The change back to a dump, by its name or absolute path."""
        return restoring_database(str(self._tools.database.find(name)))


class Traffic:
    """How requests fare: as LiteLLM counts them, and one of the operator's own."""

    def __init__(self, store: StateStore, tools: Tools, proofs: Proofs) -> None:
        self._store = store
        self._tools = tools
        self._proofs = proofs

    def feed(self, breakers: Breakers, observed: Observed) -> None:
        """What the gateway that serves has counted until now; nothing where it does not say."""
        state = self._store.load()
        name = gateway_name(state, observed.edge.slot) if observed.edge else None
        seen = observed.containers.get(name) if name else None
        figures = self._tools.probes.figures(seen, state.secrets.master_key) if seen else None
        if seen and figures:
            cooldowns = {route.name: route.cooldown_seconds for route in state.routes}
            breakers.feed(f"{seen.name} {seen.started_at}", figures, cooldowns, utc_now())

    def look(self, observed: Observed) -> RouteHealth:
        """How it is by one look, without what was before it."""
        breakers = Breakers()
        self.feed(breakers, observed)
        engines = [c for c in observed.containers.values() if c.role == "engine" and c.running]
        return RouteHealth(
            figures=breakers.figures or GatewayFigures(),
            circuits=breakers.circuits,
            loads={engine.name: self._tools.probes.load(engine) for engine in engines},
        )

    def try_out(self, target: str, text: str = "") -> Trial:
        """One smallest request through the published port; nothing of it is kept or logged."""
        state = self._store.load()
        request, key = trial_request(state, target, text)
        client = self._proofs.client(state)
        at_edge = EdgeRequest(way="health", path=HEALTH_PATH)
        client.send(at_edge, None)  # opens the connection
        edge_seconds = client.send(at_edge, None).seconds
        return Trial(target=target, reply=client.send(request, key), edge_seconds=edge_seconds)


class Usage:
    """What was used, as LiteLLM's tables in PostgreSQL tell it."""

    def __init__(self, store: StateStore, tools: Tools) -> None:
        self._store = store
        self._tools = tools

    def report(self, query: UsageQuery) -> UsageReport:
        """The use of a range, added up by PostgreSQL. Raises DatabaseError."""
        return parse_usage(query, self._tables().rows(usage_sql(query)))

    def statement(self, month: date, group: str = "") -> Statement:
        """A month's use at the prices of today; without a name, of all groups."""
        rows = self._tables().rows(statement_sql(month))
        found = parse_statement(month, rows, self._store.load().prices)
        if group and group not in found.by_group:
            raise RefusedError(
                f"A group called {group!r} used nothing in {month:%Y-%m}.",
                advice=f"Groups that did: {', '.join(found.by_group) or 'none'}.",
            )
        lines = tuple(line for line in found.lines if group in {"", line.group})
        return replace(found, lines=lines)

    def standings(self) -> list[Standing]:
        """Every key and group with its limits, and how near it is to them. Raises DatabaseError."""
        return parse_standings(self._tables().rows(STANDINGS_SQL))

    def tallies(self) -> list[EngineTally]:
        """What each running engine counted since it started, beside what LiteLLM accounts for."""
        seen = self._tools.containers.observe().containers.values()
        engines = [c for c in seen if c.role == "engine" and c.running and c.started_at]
        loads = {engine: load for engine in engines if (load := self._tools.probes.load(engine))}
        if not loads:
            return []
        starts = {engine.name: engine.started_at for engine in loads if engine.started_at}
        counted = {engine.name: load.tokens for engine, load in loads.items()}
        return [
            EngineTally(
                engine=name, since=starts[name], counted=counted[name], accounted=accounted,
                broken_off=broken_off, guessed=guessed,
            )
            for name, accounted, broken_off, guessed in self._tables().rows(tally_sql(starts))
        ]  # fmt: skip

    def _tables(self) -> UsageTables:
        return usage_tables(self._store.load(), self._tools.containers.observe().containers)


class Energy:
    """What GPUs took, and whose it was, out of energy.sqlite and LiteLLM's tables of use."""

    def report(self, query: EnergyQuery) -> EnergyReport:
        """The energy of a range by its grouping. Raises EnergyRecordsError, DatabaseError."""
        raise NotImplementedError

    def parts(self, query: EnergyQuery) -> list[EnergyPart]:
        """By day or hour and model (for stacked bars), or by GPU and model."""
        raise NotImplementedError

    def sessions(self, first: date, last: date) -> list[EnergySession]:
        """Those that were on in these days, newest first."""
        raise NotImplementedError

    def export(
        self, what: EnergyTable, first: date, last: date, style: CsvStyle
    ) -> Iterator[bytes]:
        """A CSV in pieces, however long it is; README says what its columns are."""
        raise NotImplementedError


def usage_tables(
    state: State, containers: Mapping[ContainerName, ObservedContainer]
) -> UsageTables:
    """Those of the database that runs. Raises DatabaseError."""
    seen = containers.get(database_name(state))
    if seen is None or not seen.running or seen.address is None:
        raise DatabaseError("PostgreSQL is down.", advice="Deploy a model, or run `apply`, first.")
    return UsageTables(seen.address, state.secrets.database_password, reader_password(state))


class JobKeeper:
    """The jobs of this process, which outlive pages, and what they offer in the end."""

    def __init__(self, store: StateStore) -> None:
        self._store = store
        self._jobs: list[Job] = []
        self._keeping = threading.Lock()

    @property
    def audit(self) -> AuditTrail:
        return self._store.audit

    def jobs(self) -> list[JobView]:
        """Newest first."""
        return [job.view() for job in reversed(list(self._jobs))]

    def job(self, job_id: str) -> JobView:
        return self._job(job_id).view()

    def _job(self, job_id: str) -> Job:
        for job in list(self._jobs):
            if job.id == job_id:
                return job
        raise UnknownError(
            f"There is no job {job_id!r}.", advice="The newest 50 of this start are known."
        )

    def cancel_job(self, job_id: str) -> None:
        for job in list(self._jobs):
            if job.id == job_id and job.finished_at is None:
                with self.audit.noting(f"Cancel: {job.title}"):
                    job.cancel()

    def break_off(self, title: str, seconds: float) -> None:
        """Cancel what runs under that title, and wait so long until it is undone."""
        for job in list(self._jobs):
            if job.title == title:
                self.cancel_job(job.id)
                job.wait(seconds)

    def fetch(self, job_id: str) -> pydantic.SecretStr:
        """The secrets that a job made, this once; they are in no file and in no log."""
        job = self._job(job_id)
        with self.audit.noting(f"Fetch the secrets of: {job.title}"):
            found = job.control.take()
            if found is None:
                raise RefusedError(
                    f"{job.title}: there are no secrets to be fetched.",
                    advice="They are told once, within an hour. Of a lost one make another.",
                )
        return found

    def _keep(self, job: Job) -> None:
        """The last 50 that are done, and all that run or offer something."""
        with self._keeping:
            ended = [each for each in self._jobs if each.finished_at and not each.control.offers]
            done = ended[:-50]
            self._jobs = [known for known in self._jobs if known not in done] + [job]

    def start_task(self, title: str, work: Callable[[Control], None], hint: str = "") -> Job:
        """Work beside the changes, as a job; refused while one of the same title runs."""
        release = self._store.acquire(title, kind="task")
        job = Job(title, hint, "task")
        end = self.audit.begin(title, job.id)
        self._keep(job)

        def at_end() -> None:
            end(job.fault)
            release()

        return job.run(work, at_end=at_end)


class ChangeRunner(JobKeeper):
    """How a change is planned, saved and made so: one at a time, as jobs that outlive pages."""

    def __init__(
        self, store: StateStore, tools: Tools, site: Site, recipes: Callable[[], Recipes]
    ) -> None:
        super().__init__(store)
        self._tools = tools
        self._paths = site
        self._recipes = recipes

    @property
    def _site(self) -> Site:
        return replace(self._paths, recipes=self._recipes())

    @property
    def home(self) -> Path:
        return self._store.home

    def state(self) -> State:
        return self._store.load()

    def hardware(self, *, fresh: bool = False) -> Hardware:
        """The GPUs as they are; where nothing can be seen, its `fault` says why."""
        return self._tools.gpus.read(fresh=fresh)

    def observe(self, state: State | None = None) -> Observed:
        """The world now, seen with the eyes of this state, or of the stored one."""
        return observe(self._tools, (state or self._store.load()).edge)

    def plan(self, change: Change) -> Plan:
        """What the change would do; nothing is saved."""
        return self._planned(change, self._edited(change, self._store.load()))

    def _planned(self, change: Change, state: State) -> Plan:
        return plan_state(
            state, self.observe(state), self._site, scope=change.scope, restart=change.restart,
            despite_driver=change.despite_driver, gentle=change.gentle, dump=change.dump,
        )  # fmt: skip

    def _edited(self, change: Change, before: State) -> State:
        """What would be wished then; a wish that books a GPU twice is refused."""
        after = change.edit(before)
        check_state(after)
        if (after.edge.tls, after.edge.hostnames) != (before.edge.tls, before.edge.hostnames):
            seen = read_certificate(after.edge)
            if seen is not None and seen.fault:
                raise RefusedError(seen.fault, advice=CERTIFICATE_ADVICE)
        check_routes(after, known=route_faults(before))
        # A hand-written double booking must be mendable step by step: taking away is allowed.
        if placements(after) - placements(before) or after.mig_layouts != before.mig_layouts:
            check_placements(after, known=placement_faults(before), hardware=self.hardware())
        return after

    def save(self, change: Change) -> State:
        """Write the wish down without acting on it."""
        with self._store.lock(change.title), self.audit.noting(change.title):
            return self._saved(change)

    def _saved(self, change: Change) -> State:
        before = self._store.load()
        after = self._edited(change, before)
        if after != before:
            self._store.save(after)
        return after

    def start(self, change: Change) -> Job:
        """Save the wish and make it so, as a job; refused at once while another change runs.

        What takes hours to fetch comes first, and other changes are made meanwhile.
        """
        held = contextlib.ExitStack()
        held.callback(self._store.acquire(change.title))
        job = Job(change.title, change.hint)
        end = self.audit.begin(change.title, job.id)
        try:
            before = self._store.load()
            after = self._saved(change)
            absent = self._absent(change, before, after)
        except BaseException as error:
            end(error)
            held.close()
            raise
        self._keep(job)

        def work(control: Control) -> None:
            if absent:
                self._fetch_then_work(change, before, after, absent, job, held)
            else:
                self._work(change, before, after, control)

        def at_end() -> None:
            end(job.fault)
            held.close()

        return job.run(work, at_end=at_end)

    def _absent(self, change: Change, before: State, after: State) -> dict[str, tuple[Step, ...]]:
        """What is to be fetched, by stage; a change that is one transaction fetches on its way."""
        if change.whole or before.mig_layouts != after.mig_layouts:
            return {}
        with contextlib.suppress(ManagerError):  # the job itself will meet it, and say it
            models = self._planned(change, after).models
            return {stage.title: fetches(stage) for stage in models if fetches(stage)}
        return {}

    def _fetch_then_work(
        self, change: Change, before: State, after: State,
        absent: Mapping[str, tuple[Step, ...]], job: Job, held: contextlib.ExitStack,
    ) -> None:  # fmt: skip
        control = job.control
        if change.scope == EVERYTHING:  # nobody else waits for that
            with contextlib.suppress(ManagerError):  # it is tried again, and told, in the end
                converge(after, self._site, self._tools, control, change, skip=absent)
        held.close()
        job.fetching = frozenset(absent)
        try:
            for title, steps in absent.items():
                _attempt([Stage(title=title, steps=steps)], self._tools, control)
        finally:
            take = partial(self._store.acquire, change.title)
            held.callback(when_free(take, self._tools, Control(control.report)))
            job.fetching = frozenset()
            now = self._store.load()
            former = without_change(now, before, after)
            if control.is_cancelled:
                self._save_changed(former)
        missing = {title: fault for title, fault in control.faults.items() if title in absent}
        try:
            self._work(change, former, now, control, skip=missing)
        except ManagerError as error:
            _raise_all(
                [*missing.values(), error] if not isinstance(error, CancelledError) else [error]
            )
        _raise_all([*missing.values()])

    def _work(
        self, change: Change, before: State, after: State, control: Control,
        skip: Collection[str] = (),
    ) -> None:  # fmt: skip
        former = way_back(before, after, self.hardware(fresh=True))
        # Whoever changes a layout, by a cut or by rolling back, gets all of it or nothing.
        whole = change.whole or after.mig_layouts != before.mig_layouts
        try:
            converge(
                after, self._site, self._tools, control, replace(change, whole=whole), skip=skip
            )
        except ManagerError as error:
            if isinstance(error, CancelledError) or whole:
                self._withdraw(replace(change, whole=whole), before, former, control)
            raise
        finally:
            if change.accounts:
                self._account(after, control)

    def _withdraw(self, change: Change, before: State, former: State, control: Control) -> None:
        """Take the wish back; where the change is whole, the world as well."""
        self._save_changed(former)  # a kill from here on heals back, and not half-way forward
        if not change.whole:
            return
        control.report("Taking all of it back: the layout and the containers from before.")
        # Not cancellable: half-way back is nowhere.
        again = Control(control.report)
        try:
            converge(former, self._site, self._tools, again, replace(change, whole=False))
        except ManagerError as error:
            control.report(f"Not all of it could be taken back: {error}")
        else:
            self._save_changed(before)

    def _save_changed(self, state: State) -> None:
        if self._store.load() != state:
            self._store.save(state)

    def _account(self, state: State, control: Control) -> None:
        for row in restore_rows(state, self.observe(), control.faults):
            control.report(": ".join(row))


class Manager(ChangeRunner):
    """The use cases of one installation: all that console and command line may call."""

    def __init__(
        self,
        store: StateStore,
        tools: Tools,
        site: Site,
        *,
        engine_options: EngineOptions,
        recipes: Callable[[], Recipes] = dict,
        enabled: Callable[[str], bool | None] = lambda _: None,
    ) -> None:
        super().__init__(store, tools, site, recipes)
        self._enabled = enabled
        self._options = engine_options
        self.keys = Keys(store, tools, self.start_task)
        self.providers = Providers(store, tools)
        self.logs = Logs(store, tools)
        self.images = ImageLibrary(store, tools, recipes, self.start_task, self.save)
        self.weights = WeightsLibrary(store, tools, self.start_task, self.hardware)
        self.proofs = Proofs(store, tools, self.keys, self.start_task)
        self.traffic = Traffic(store, tools, self.proofs)
        self.database = DatabaseCare(store, tools, self.start_task)
        self.usage = Usage(store, tools)
        self.energy = Energy()

    def cutting(self, gpu: str, wish: str) -> Change:
        """The change of one GPU to what was typed; see `cutting_as_typed`."""
        found = self.hardware(fresh=True).named(gpu)
        return cutting_as_typed(self._store.load(), found, wish)

    def boot_units(self) -> dict[str, bool | None]:
        """Which of the services that a restore needs start at boot; None: cannot be told."""
        return {unit: self._enabled(unit) for unit in BOOT_UNITS}

    def register(self, raw: Json) -> Model:
        """A new model from what the operator typed; its place and commit are chosen if not said."""
        model = self.draft(raw)
        if isinstance(model.source, LocalSource):
            refuse_links_out(Path(model.source.path))
        model = replace(model, source=self.weights.pinned(model.source))
        self.save(registering(model, self.images.recipes()))
        return model

    def draft(self, raw: Json) -> Model:
        """The model that registering would make; nothing is saved."""
        state = self._store.load()
        if "placement" not in raw:
            hardware = self.hardware()
            if hardware.fault is not None:  # not silently onto the processor of a GPU server
                raise hardware.fault
            raw = raw | {"placement": asdict(default_placement(hardware, state.models))}
        return parse_model(raw, state, self._options, self.images.recipes())

    def sketch(self, raw: Json) -> Model:
        """A draft that needs no place: where none can be chosen, the processor stands for it."""
        try:
            return self.draft(raw)
        except (RefusedError, HardwareError):
            return self.draft(raw | {"placement": asdict(CpuPlacement())})

    def revise(self, name: str, changes: Json) -> Model:
        """A registered model with some settings changed; it takes effect with the next plan."""
        return self.save(self.revising(name, changes)).model(name)

    def revising(self, name: str, changes: Json) -> Change:
        """The change to these settings of a registered model, its commit chosen if not said."""
        if "source" in changes:
            source = self.weights.pinned(parse_source(changes["source"]))
            changes = changes | {"source": asdict(source)}
        return revising(name, changes, self._options, self.images.recipes())

    def returning(self, number: int | None) -> Change:
        """The change back to an earlier version; without a number, the one before this."""
        versions = self._store.versions()
        wanted = number if number is not None else (versions or [0])[-1]
        return returning_to(wanted, self._store.version(wanted))

    def loads(self, engines: Sequence[ObservedContainer]) -> dict[ContainerName, EngineLoad | None]:
        """What each of these engines is at, asked side by side; None where one does not say."""
        with concurrent.futures.ThreadPoolExecutor(max_workers=len(engines) or 1) as pool:
            loads = list(pool.map(self._tools.probes.load, engines))
        return {engine.name: load for engine, load in zip(engines, loads, strict=True)}

    def answers(self, engine: ObservedContainer, seconds: float) -> bool:
        """Whether an engine answers the smallest request of its kind; a model that went may."""
        state = self._store.load()
        try:
            model = state.model(engine.model_name or "")
            wanted = EngineAnswers(
                model_type=model.type,
                served_model_name=engine.served_model_name or model.served_model_name,
                engine_key=state.secrets.engine_key,
            )
            return self._tools.probes.answers(engine, wanted, seconds)
        except RefusedError:
            return True

    def snapshot(self) -> Snapshot:
        """Everything a page shows; what cannot be read is a fault in it, not an exception."""
        state, observed, plan, dumps = None, None, None, list[Dump]()
        faults: list[ManagerError] = []
        try:
            dumps = self.database.dumps()
            state = self._store.load()
            observed = self.observe(state)
            plan = plan_state(state, observed, self._site)
        except ManagerError as error:
            faults.append(error)
        return Snapshot(
            taken_at=utc_now(),
            state=state,
            observed=observed,
            plan=plan,
            hardware=self.hardware(),
            faults=tuple(faults),
            jobs=tuple(self.jobs()),
            dumps=tuple(dumps),
        )

    def doctor(self) -> list[Check]:
        """Everything this program needs from its server, each with a verdict."""
        state = self._store.load()
        try:
            docker_checks = container_checks(state, self.observe())
        except ManagerError as error:
            docker_checks = [Check(name="Docker", ok=False, text=error.fact, advice=error.advice)]
        return [
            *docker_checks,
            disk_check(self.home),
            *self._database_checks(),
            *gpu_checks(state, self.hardware(fresh=True)),
        ]

    def _database_checks(self) -> list[Check]:
        """Whether the database has room; nothing of one that cannot be asked."""
        try:
            size = self.database.size()
        except ManagerError:  # of its container there is a check already
            return []
        text = f"{format_size(size.database_bytes)}, {format_size(size.free_bytes)} free"
        advice = "Keep requests for fewer days: `database set --retention`."
        ok = not database_matters(size)
        return [Check(name="database", ok=ok, text=text, advice=advice)]


@dataclass
class Revivals:
    """When a model that ended is started again: soon, then later and later, then no more."""

    pauses: Sequence[float] = (2.0, 15.0, 60.0, 300.0)  # seconds after each end within an hour
    ends: dict[ModelName, list[datetime]] = field(default_factory=dict)
    waiting: dict[ModelName, datetime | None] = field(default_factory=dict)  # None: given up

    def due(self, dead: Sequence[ModelName], now: datetime) -> list[ModelName]:
        """Which of these to start now; whoever is not among them has come back."""
        self.waiting = {name: moment for name, moment in self.waiting.items() if name in dead}
        for name in dead:
            if name not in self.waiting:
                recent = [end for end in self.ends.get(name, ()) if now - end < timedelta(hours=1)]
                self.ends[name] = [*recent, now]
                several = len(recent)
                later = several < len(self.pauses)
                self.waiting[name] = (
                    now + timedelta(seconds=self.pauses[several]) if later else None
                )
        return [n for n in dead if (moment := self.waiting[n]) is not None and now >= moment]

    def fate(self, name: ModelName, why: str) -> str:
        """What the operator reads about a model that ended."""
        moment = self.waiting[name]
        if moment is not None:
            return f"{name} ended: {why} It is started again at {moment:%H:%M:%S} UTC."
        times = len(self.ends[name])
        return f"{name} ended {times} times within an hour and stays down: {why}"


@dataclass
class Stalls:
    """Which engines have work and make no token: suspected, tried with a request, then hung."""

    pause: float = 5.0  # seconds between two looks
    seconds: float = 60.0  # without a token, until an engine is suspected
    patience: float = 30.0  # seconds for the request that tries it
    still: dict[ContainerName, tuple[tuple[int, float], datetime]] = field(
        default_factory=dict
    )  # progress, since
    hung: frozenset[ContainerName] = frozenset()

    def suspects(
        self, loads: Mapping[ContainerName, EngineLoad | None], now: datetime
    ) -> list[ContainerName]:
        """Whom to try now; who is idle, gone or makes tokens is not hung any more."""
        before, self.still = self.still, {}
        for name, load in loads.items():
            known = before.get(name)
            if known and (load is None or (load.running and load.progress == known[0])):
                self.still[name] = known
            elif load is not None and load.running:
                self.still[name] = (load.progress, now)
        self.hung &= {name for name in self.still if self.still[name] == before.get(name)}
        limit = now - timedelta(seconds=self.seconds)
        return [n for n, (_, at) in self.still.items() if at <= limit and n not in self.hung]

    def tried(self, name: ContainerName, *, answered: bool) -> None:
        """What came of a suspicion; one that answered is looked at afresh."""
        if answered:
            del self.still[name]
        else:
            self.hung |= {name}

    def report(self, engine: ObservedContainer, load: EngineLoad | None, now: datetime) -> str:
        """What the operator reads about a hung engine."""
        work = f"{load.running} request{'s' * (load.running > 1)}" if load else "requests"
        return (
            f"{engine.model_name} has {work} running and has made no token for "
            f"{format_age(now - self.still[engine.name][1])}, and does not answer a request of one "
            "token. Restart it; its log may say why."
        )


class Pulse:
    """A thread of its own that looks whether engines with work make tokens.

    A hung engine answers late or never, and no page may wait for it.
    """

    def __init__(self, manager: Manager, latest: Callable[[], Snapshot], stalls: Stalls) -> None:
        self._manager = manager
        self._latest = latest
        self._stalls = stalls
        self._felt: Snapshot | None = None
        self.hung: Mapping[ModelName, str] = {}
        self.loads: Mapping[ContainerName, EngineLoad | None] = {}
        threading.Thread(target=self._run, name="pulse", daemon=True).start()

    def _run(self) -> None:
        while True:
            time.sleep(self._stalls.pause)
            try:
                self._feel()
            except Exception:  # boundary: one look must not end all of them
                log.exception("no pulse could be felt")

    def _feel(self) -> None:
        if (snapshot := self._latest()) is self._felt:  # the watch itself stands still
            return
        self._felt, observed = snapshot, snapshot.observed
        seen = observed.containers.values() if observed else ()
        engines = {c.name: c for c in seen if c.role == "engine" and c.running and c.model_name}
        self.loads = loads = self._manager.loads([*engines.values()])
        suspects = [engines[name] for name in self._stalls.suspects(loads, utc_now())]
        with concurrent.futures.ThreadPoolExecutor(max_workers=len(suspects) or 1) as pool:
            tries = [pool.submit(self._manager.answers, e, self._stalls.patience) for e in suspects]
        for engine, tried in zip(suspects, tries, strict=True):
            self._stalls.tried(engine.name, answered=tried.result())
        self.hung = {
            ModelName(engines[name].model_name or ""): self._stalls.report(
                engines[name], loads[name], utc_now()
            )
            for name in sorted(self._stalls.hung)
        }


class Meter:
    """A thread of its own that follows LiteLLM's counters: a hung engine must not hold it up."""

    def __init__(self, manager: Manager, latest: Callable[[], Snapshot], pause: float) -> None:
        self._manager = manager
        self._latest = latest
        self._pause = pause
        self.breakers = Breakers()
        threading.Thread(target=self._run, name="meter", daemon=True).start()

    def _run(self) -> None:
        while True:
            time.sleep(self._pause)
            try:
                if (observed := self._latest().observed) is not None:
                    self._manager.traffic.feed(self.breakers, observed)
            except Exception:  # boundary: one look must not end all of them
                log.exception("LiteLLM's counters could not be read")


class Gauge:
    """A thread of its own that now and then asks the database for its size."""

    def __init__(self, manager: Manager, latest: Callable[[], Snapshot]) -> None:
        self._manager = manager
        self._latest = latest
        self.size: DatabaseSize | None = None
        threading.Thread(target=self._run, name="gauge", daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                self.size = self._look()
            except Exception:  # boundary: one look must not end all of them
                log.exception("the database could not be measured")
            time.sleep(GAUGE_SECONDS if self.size else GAUGE_SECONDS / 10)

    def _look(self) -> DatabaseSize | None:
        state, observed = self._latest().state, self._latest().observed
        seen = observed.containers.get(database_name(state)) if state and observed else None
        if seen is not None and seen.ready:
            with contextlib.suppress(ManagerError):  # before its first start it has no tables
                return self._manager.database.size()
        return None


GAUGE_SECONDS: Final = 300.0


class Watch:
    """One thread that takes the snapshot which every open tab reads."""

    def __init__(
        self,
        manager: Manager,
        seconds: float = 2.0,
        revivals: Revivals | None = None,
        stalls: Stalls | None = None,
    ) -> None:
        self._manager = manager
        self._seconds = seconds
        self._revivals = revivals or Revivals()
        self._causes: dict[ModelName, str] = {}  # of models that are down: read once per end
        self._fates: dict[ModelName, str] = {}
        self._latest = manager.snapshot()
        self._repaired: set[ModelName] = set()
        self._renewed = ""  # the certificate that was last tried
        self._pulse = Pulse(manager, lambda: self._latest, stalls or Stalls())
        self._meter = Meter(manager, lambda: self._latest, seconds)
        self._gauge = Gauge(manager, lambda: self._latest)
        watching = manager.audit.acting_as(ITSELF)(self._run)
        threading.Thread(target=watching, name="watch", daemon=True).start()

    def latest(self) -> Snapshot:
        """The last look at the world, with the jobs as they are now."""
        jobs = tuple(self._manager.jobs())
        return replace(
            self._latest,
            jobs=jobs,
            shown_at=utc_now(),
            fates={**self._fates},
            hung=self._pulse.hung,
            database=self._gauge.size,
            health=RouteHealth(
                figures=self._meter.breakers.figures or GatewayFigures(),
                circuits=self._meter.breakers.circuits,
                loads=self._pulse.loads,
            ),
        )

    def _run(self) -> None:
        while True:
            time.sleep(self._seconds)
            try:
                before, self._latest = self._latest, self._manager.snapshot()
                absent = any(isinstance(fault, DockerAbsentError) for fault in before.faults)
                if absent and self._latest.observed is not None:
                    self._restore()
                self._repair()
                self._renew()
                self._revive()
            except Exception:  # boundary: a bug in one look must not freeze every page for ever
                log.exception("snapshot failed")

    def _restore(self) -> None:
        """Docker is back: it starts no engine by itself, and nobody may be looking."""
        state = self._latest.state
        if state is not None and state.wishes_anything and self._latest.plan:
            with contextlib.suppress(BusyError):
                self._manager.start(restoring())

    def _repair(self) -> None:
        """Replace containers that lost their GPU; one that loses it again is the operator's."""
        state, observed = self._latest.state, self._latest.observed
        if state is None or observed is None:
            return
        blind = {ModelName(c.model_name) for c in observed.containers.values()
                 if c.devices_seen == frozenset() and c.model_name}  # fmt: skip
        due = (blind & {model.name for model in state.wished_models}) - self._repaired
        if due:
            with contextlib.suppress(ManagerError):  # busy: the next look finds it again
                self._manager.start(repairing(due))
                self._repaired |= due

    def _renew(self) -> None:
        """Serve a renewed certificate; one that Caddy will not have is the operator's."""
        state, observed = self._latest.state, self._latest.observed
        if state is None or observed is None:
            return
        due = renewed_certificate(state, observed)
        if due and due != self._renewed:
            with contextlib.suppress(ManagerError):  # busy: the next look finds it again
                self._manager.start(renewing_certificate())
                self._renewed = due

    def _revive(self) -> None:
        """Start again what died in service; Docker must not, because slices come first."""
        snapshot = self.latest()
        state, observed = snapshot.state, snapshot.observed
        if state is None or observed is None or running_job(snapshot) is not None:
            return
        dead = dead_models(state, observed)
        due = self._revivals.due(dead, snapshot.taken_at)
        self._causes = {
            name: self._causes.get(name) or self._manager.logs.why_ended(name) for name in dead
        }
        self._fates = {name: self._revivals.fate(name, why) for name, why in self._causes.items()}
        for name in due[:1]:  # one change at a time; the next look has the next one
            with contextlib.suppress(ManagerError):
                self._manager.start(reviving(name))
                del self._revivals.waiting[name], self._causes[name]


# =============================================================================
# §36 Programs — effects: the REST API, and who may use it
# =============================================================================

API: Final = "/api/v1"
API_PAGE: Final = f"{API}/docs"  # for people, so behind the console's cookie
ABOUT_API: Final = (
    "What the console and the command line do, for programs: the same plans, the same errors. "
    "Every request shows an admin token, made in the console's System tab or by "
    "`llm_manager.py token create NAME`, as "
    f"`Authorization: Bearer admin-…`. POST {API}/plan says what a change would do; "
    f"POST {API}/jobs does it. "
    "Keys, groups, prices and the like change at once. What is a table comes as CSV where "
    f"`Accept` or `?format=csv` asks for it. The document for tools: {API}/openapi.json."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Why a request was not done: one sentence of fact, one of advice."""

    fact: str
    advice: str


@_strict
@dataclass(frozen=True, kw_only=True, slots=True)
class NamedChange:
    """A change that needs only a name."""

    change: Literal[
        "deploy", "stop", "restart", "remove-model", "remove-route", "remove-provider",
        "revoke-direct-key",
    ]  # fmt: skip
    name: str


NAMED_CHANGES: Final[Mapping[str, Callable[[str], Change]]] = {
    "deploy": deploying, "stop": stopping, "restart": restarting, "remove-model": removing,
    "remove-route": unrouting, "remove-provider": unproviding,
    "revoke-direct-key": revoking_direct,
}  # fmt: skip


@_strict
@dataclass(frozen=True, kw_only=True, slots=True)
class Apply:
    """Do whatever is planned."""

    change: Literal["apply"]


@_strict
@dataclass(frozen=True, kw_only=True, slots=True)
class RollBack:
    """Return to an earlier version of the state."""

    change: Literal["roll-back"]
    version: Annotated[int, pydantic.Field(ge=1, le=999_999)]


class UsualSettings(TypedDict, total=False):
    """What is not named stays as it is, or as it usually is."""

    served_model_name: Annotated[str, SERVED_NAME_RULE]
    engine_arguments: tuple[str, ...]
    image: ImageRef | None
    recipe: Name | None
    replicas: Annotated[int, pydantic.Field(ge=1, le=16)]
    placement: Placement
    open_route: bool


@_strict
class ModelSettings(UsualSettings, total=False):
    """Settings of a model that change."""

    type: ModelType
    source: Source


@_strict
class NewModel(UsualSettings):
    """A model to register; without a placement, one is chosen."""

    name: Name
    type: ModelType
    source: Source


@_strict
@dataclass(frozen=True, kw_only=True, slots=True)
class SetModel:
    """Change some settings of a model."""

    change: Literal["set-model"]
    name: str
    settings: ModelSettings


@_strict
@dataclass(frozen=True, kw_only=True, slots=True)
class SetRoute:
    """A route, new or in the place of its namesake."""

    change: Literal["set-route"]
    route: Route


@_strict
@dataclass(frozen=True, kw_only=True, slots=True)
class SetProvider:
    """A provider, new or in the place of its namesake; without a key it keeps the one it has."""

    change: Literal["set-provider"]
    provider: Provider


@_strict
@dataclass(frozen=True, kw_only=True, slots=True)
class CutGpu:
    """Cut a GPU into slices: `3g.20gb 2x1g.5gb`, `MODEL=GIB …`, `keep` or `off`."""

    change: Literal["cut"]
    gpu: str
    wish: str


DumpName = Annotated[str, _checked(r"[A-Za-z0-9][\w.-]*", "the name of a dump", longest=100)]


@_strict
@dataclass(frozen=True, kw_only=True, slots=True)
class RestoreDatabase:
    """Return to a dump of the database; all or nothing."""

    change: Literal["restore-database"]
    dump: DumpName


AnyChange = Annotated[
    NamedChange | Apply | RollBack | SetModel | SetRoute | SetProvider | CutGpu | RestoreDatabase,
    pydantic.Discriminator("change"),
]


def wished_change(manager: Manager, body: AnyChange) -> Change:  # noqa: C901, PLR0911 - one per kind
    """The same change that console and command line would make."""
    match body:
        case NamedChange(change=change, name=name):
            return NAMED_CHANGES[change](name)
        case Apply():
            return applying()
        case RollBack(version=version):
            return manager.returning(version)
        case SetModel(name=name, settings=settings):
            return manager.revising(name, as_typed(settings))
        case SetRoute(route=route):
            return routing(asdict(route))
        case SetProvider(provider=provider):
            raw = asdict(provider)
            return providing({k: v for k, v in raw.items() if k != "api_key" or v is not None})
        case CutGpu(gpu=gpu, wish=wish):
            return manager.cutting(gpu, wish)
        case RestoreDatabase(dump=dump):
            return manager.database.restoring(dump)
        case _:
            assert_never(body)


class AllowanceChanges(TypedDict, total=False):
    """What is not named stays as it is, and a null takes a limit away."""

    models: tuple[str, ...]
    rpm_limit: Limit | None
    tpm_limit: Limit | None
    budget: Budget | None
    period: Period | None


@_strict
class GroupChanges(AllowanceChanges, total=False):
    """A new group, or what changes of a known one."""

    name: Required[Annotated[str, _titled]]
    note: Annotated[str, _printable]


class SharedSettings(AllowanceChanges, total=False):
    group: Annotated[str, _printable]
    note: Annotated[str, _printable]
    expires_at: pydantic.AwareDatetime | None
    parallel: Limit | None


@_strict
class KeyChanges(SharedSettings, total=False):
    """What changes of a key; a null takes a limit away, or its end."""

    alias: Annotated[str, _titled]
    email: Annotated[str, _email]


@_strict
class KeyList(SharedSettings, total=False):
    """A key for each row of a CSV with the columns name, email and group, and what all may use."""

    csv: Required[Annotated[str, pydantic.Field(max_length=1_000_000)]]


@_strict
@dataclass(frozen=True, kw_only=True, slots=True)
class Rotation:
    """How long the old secret of a key works on beside the new one."""

    grace_hours: Annotated[float, pydantic.Field(ge=0, le=MOST_GRACE_HOURS)] = 24


@_strict
@dataclass(frozen=True, kw_only=True, slots=True)
class KeyQuestion:
    """A key, or its name or a part of either, and for which model it is asked; empty: for any."""

    key: str
    model: str = ""


@_strict
@dataclass(frozen=True, kw_only=True, slots=True)
class Extension:
    """When all keys of a group end; null: never."""

    until: pydantic.AwareDatetime | None


@_strict
@dataclass(frozen=True, kw_only=True, slots=True)
class NewDirectKey:
    """A key past the gateway, new or with another secret; no models means all of them."""

    name: Name
    models: tuple[Name, ...] = ()
    emergency: bool = False  # opens `/v1` too, and needs no PostgreSQL


@_strict
class NewPrice(TypedDict, total=False):
    """Of a million tokens; the currency is that of all prices."""

    prompt: Required[PriceOfMillion]
    completion: Required[PriceOfMillion]
    currency: Annotated[str, pydantic.Field(pattern="^[A-Z]{3}$")]


@_strict
@dataclass(frozen=True, kw_only=True, slots=True)
class NewDump:
    """A dump to take; one without a name makes way for newer ones."""

    name: DumpName | None = None


@_strict
class HousekeepingChanges(TypedDict, total=False):
    """What is not named stays as it is; a retention of null is for ever."""

    retention_days: Annotated[int, pydantic.Field(ge=1, le=3650)] | None
    dumps_kept: Annotated[int, pydantic.Field(ge=1, le=1000)]


def as_typed(settings: Mapping[str, object]) -> Json:
    typed: Json = pydantic.TypeAdapter(Any).dump_python(settings)
    return typed


def to_the_letter(kind: Any) -> pydantic.WrapValidator:
    """A body is taken by JSON's own types: no text for a number, and what is unknown is refused."""
    adapter: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(kind)

    def check(raw: Any, _: object) -> Any:
        if isinstance(raw, bytes):
            raise InvalidError(
                "The body is not called JSON.", advice="Send Content-Type: application/json."
            )
        try:
            return adapter.validate_json(json.dumps(raw), strict=True)
        except pydantic.ValidationError as error:
            raise InvalidError(
                f"This request cannot be used: {describe_faults(error, raw)}.",
                advice=f"See {API}/openapi.json.",
            ) from None  # the original repeats the input

    return pydantic.WrapValidator(check)


ChangeBody = Annotated[AnyChange, to_the_letter(AnyChange)]
ModelBody = Annotated[NewModel, to_the_letter(NewModel)]
KeyBody = Annotated[KeySettings, to_the_letter(KeySettings)]
KeyChangesBody = Annotated[KeyChanges, to_the_letter(KeyChanges)]
KeyListBody = Annotated[KeyList, to_the_letter(KeyList)]
KeyQuestionBody = Annotated[KeyQuestion, to_the_letter(KeyQuestion)]
RotationBody = Annotated[Rotation, to_the_letter(Rotation)]
GroupBody = Annotated[GroupChanges, to_the_letter(GroupChanges)]
ExtensionBody = Annotated[Extension, to_the_letter(Extension)]
DirectKeyBody = Annotated[NewDirectKey, to_the_letter(NewDirectKey)]
PriceBody = Annotated[NewPrice, to_the_letter(NewPrice)]
DumpBody = Annotated[NewDump, to_the_letter(NewDump)]
HousekeepingBody = Annotated[HousekeepingChanges, to_the_letter(HousekeepingChanges)]
DayText = Annotated[str, pydantic.Field(pattern=r"^\d{4}-\d\d-\d\d$")]
MonthText = Annotated[str, pydantic.Field(pattern=r"^\d{4}-\d\d$")]


@dataclass(frozen=True, kw_only=True, slots=True)
class NewKey:
    """A key that was made; this is the only time its secret is told."""

    alias: str
    key: str
    hand_out: str


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyVerdict:
    """What key it is, and each reason why it does not work."""

    title: str
    faults: list[Problem]


@dataclass(frozen=True, kw_only=True, slots=True)
class NewDirect:
    """A direct key that was made; this is the only time its secret is told.

    It opens something when the job has ended.
    """

    name: str
    key: str
    base_urls: list[str]
    job: JobView


@dataclass(frozen=True, kw_only=True, slots=True)
class DatabaseFacts:
    """What LiteLLM's database takes, and keeps."""

    size: DatabaseSize
    keeps: Housekeeping


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyCount:
    """How many keys it was done to."""

    keys: int


def csv_answer(text: str) -> fastapi.Response:
    return fastapi.responses.Response(text, media_type="text/csv")


CSV_TOO: Final[dict[int | str, Json]] = {
    200: {"content": {"text/csv": {"schema": {"type": "string"}}}}
}


def wants_csv(
    request: fastapi.Request,
    form: Annotated[Literal["json", "csv"] | None, fastapi.Query(alias="format")] = None,
) -> bool:
    """As the parameter says, else as the Accept header does."""
    return form == "csv" or (form is None and "text/csv" in request.headers.get("accept", ""))


class TokenGate:
    """ASGI gate of the API: nothing is answered, nor a body read, without an admin token."""

    def __init__(self, app: Any, manager: Manager) -> None:
        self._app = app
        self._manager = manager

    async def __call__(self, scope: Json, receive: Any, send: Any) -> None:
        scheme, _, shown = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        digest = sha256(shown if scheme.lower() == b"bearer" else b"").hexdigest()
        try:
            token = await fastapi.concurrency.run_in_threadpool(self._token, digest)
        except ManagerError as error:
            answer = problem(error)
        else:
            if token is not None:
                with self._manager.audit.acting_as(Actor(name=token.name, channel="API")):
                    await self._app(scope, receive, send)
                return
            answer = fastapi.responses.JSONResponse(
                asdict(NO_TOKEN), status_code=401, headers={"www-authenticate": "Bearer"}
            )
        await answer(scope, receive, send)

    def _token(self, digest: str) -> AdminToken | None:
        known = self._manager.state().admin_tokens
        return next((t for t in known if hmac.compare_digest(t.sha256, digest)), None)


NO_TOKEN: Final = Problem(
    fact="This request shows no admin token that is known here.",
    advice="Make one with `llm_manager.py token create NAME`; send it as a bearer.",
)


def problem(error: ManagerError) -> fastapi.Response:
    match error:
        case UnknownError():
            status = HTTPStatus.NOT_FOUND
        case InvalidError():
            status = HTTPStatus.UNPROCESSABLE_ENTITY
        case RefusedError() | BusyError():
            status = HTTPStatus.CONFLICT
        case _:  # Docker, the gateway, the hub or the disk
            status = HTTPStatus.SERVICE_UNAVAILABLE
    told = Problem(fact=error.fact, advice=error.advice)
    return fastapi.responses.JSONResponse(asdict(told), status_code=status)


def refuse_unknown_parameters(request: fastapi.Request) -> None:
    """A range with a misspelt end would be another one."""
    path = request.app.openapi()["paths"][request.scope["route"].path_format]
    parameters = path[request.method.lower()].get("parameters", ())
    known = {each["name"] for each in parameters if each["in"] == "query"}
    if unknown := {*request.query_params} - known:
        raise InvalidError(
            f"There is no parameter {', '.join(sorted(unknown))} here.",
            advice=f"See {API}/openapi.json.",
        )


def build_api(manager: Manager, watch: Watch) -> fastapi.FastAPI:
    """The API without its gate."""
    faults: dict[int | str, Json] = {
        code: {"model": Problem} for code in (400, 401, 404, 405, 409, 422, 503)
    }
    app = fastapi.FastAPI(
        title="LLM Manager", version="1", description=ABOUT_API, responses=faults,
        openapi_url=f"{API}/openapi.json", docs_url=None, redoc_url=None,
        # The gate judges; this only writes down that there is one.
        dependencies=[
            fastapi.Depends(fastapi.security.HTTPBearer(auto_error=False)),
            fastapi.Depends(refuse_unknown_parameters),
        ],
    )  # fmt: skip

    @app.exception_handler(ManagerError)
    def on_fault(_: fastapi.Request, error: ManagerError) -> fastapi.Response:
        return problem(error)

    @app.exception_handler(fastapi.exceptions.RequestValidationError)
    def on_nonsense(
        _: fastapi.Request, error: fastapi.exceptions.RequestValidationError
    ) -> fastapi.Response:
        faults = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        fact = f"This request cannot be used: {'; '.join(faults)}."
        return problem(InvalidError(fact, advice=f"See {API}/openapi.json."))

    def on_astray(_: fastapi.Request, error: Any) -> fastapi.Response:
        told = Problem(fact=f"{error.detail}.", advice=f"See {API}/openapi.json.")
        return fastapi.responses.JSONResponse(asdict(told), error.status_code, error.headers)

    for code in (400, 404, 405):
        app.add_exception_handler(code, on_astray)
    add_looks(app, manager, watch)
    add_changes(app, manager)
    add_jobs(app, manager)
    add_keys(app, manager)
    add_key_actions(app, manager)
    add_groups(app, manager)
    add_direct_keys(app, manager)
    add_usage(app, manager)
    add_database(app, manager)
    return app


def add_looks(app: fastapi.FastAPI, manager: Manager, watch: Watch) -> None:
    """What there is."""

    @app.get(f"{API}/status")
    def read_status() -> Json:
        """Models and containers as they are, and what needs attention."""
        return status_facts(watch.latest())

    @app.get(f"{API}/models")
    def list_models() -> tuple[Model, ...]:
        """Every registered model, as it is wished."""
        return manager.state().models

    @app.get(f"{API}/models/{{name}}")
    def read_model(name: str) -> Model:
        """One registered model."""
        return manager.state().model(name)

    @app.get(f"{API}/routes")
    def list_routes() -> list[Json]:
        """Every public name, and who answers for it now; null where nobody can tell."""
        state, served = manager.state(), None
        with contextlib.suppress(DockerAbsentError):
            served = serving(state, manager.observe(state))
        return pool_facts(state, served)

    @app.get(f"{API}/audit", response_model=list[AuditEntry], responses=CSV_TOO)
    def read_audit(
        as_csv: Annotated[bool, fastapi.Depends(wants_csv)], since: DayText | None = None
    ) -> Any:
        """Who changed what when, oldest first: all from a day on, in UTC, or the newest 1,000."""
        audit = manager.audit
        found = audit.entries(parse_day(since)) if since else audit.newest(1000)
        return csv_answer(audit_csv(found)) if as_csv else found


def parse_day(text: str) -> datetime:
    """The beginning of a day in UTC."""
    try:
        return datetime.fromisoformat(text).replace(tzinfo=UTC)
    except ValueError:
        raise InvalidError(f"{text!r} is no day.", advice="Write it like 2026-03-31.") from None


def add_changes(app: fastapi.FastAPI, manager: Manager) -> None:
    """What would be done."""

    @app.get(f"{API}/plan")
    def read_plan() -> PlanFacts:
        """What is left to do for what is wished."""
        return make_plan(Apply(change="apply"))

    @app.post(f"{API}/plan")
    def make_plan(body: ChangeBody) -> PlanFacts:
        """What a change would do; nothing is saved."""
        change = wished_change(manager, body)
        return plan_facts(change.title, manager.plan(change))

    @app.post(f"{API}/models", status_code=201)
    def register_model(body: ModelBody) -> Model:
        """Register a model, stopped."""
        return manager.register(as_typed(body))


def under_way(job: Job, response: fastapi.Response) -> JobView:
    """A job that was started, and where it is looked at."""
    response.headers["location"] = f"{API}/jobs/{job.id}"
    return job.view()


def add_jobs(app: fastapi.FastAPI, manager: Manager) -> None:
    """Changes and tasks under way."""

    @app.get(f"{API}/jobs")
    def list_jobs() -> list[JobView]:
        """What runs, and what ended lately; newest first."""
        return manager.jobs()

    @app.post(f"{API}/jobs", status_code=202)
    def start_job(body: ChangeBody, response: fastapi.Response) -> JobView:
        """Make a change; the job tells how far it is, and how it ended."""
        return under_way(manager.start(wished_change(manager, body)), response)

    @app.get(f"{API}/jobs/{{job_id}}")
    def read_job(job_id: str) -> JobView:
        """One job, with all that it said."""
        return manager.job(job_id)

    @app.delete(f"{API}/jobs/{{job_id}}", status_code=202)
    def cancel_job(job_id: str) -> JobView:
        """Take a job back at its next safe point; one that has ended stays as it is."""
        manager.cancel_job(job_id)
        return manager.job(job_id)

    @app.post(f"{API}/jobs/{{job_id}}/secrets", response_model=None, responses=CSV_TOO)
    def fetch_secrets(job_id: str) -> fastapi.Response:
        """The secrets of a job that `offers` some: told once, within an hour, as CSV."""
        return csv_answer(reveal(manager.fetch(job_id)))


def add_keys(app: fastapi.FastAPI, manager: Manager) -> None:
    """Virtual keys."""

    def told(settings: KeySettings, secret: pydantic.SecretStr) -> NewKey:
        shown = hand_out(manager.state(), settings, reveal(secret))
        return NewKey(alias=settings.alias, key=reveal(secret), hand_out=shown)

    @app.get(f"{API}/keys")
    def list_keys() -> list[VirtualKey]:
        """The keys of colleagues, without their secrets."""
        return manager.keys.all()

    @app.post(f"{API}/keys", status_code=201)
    def create_key(body: KeyBody) -> NewKey:
        """Make a key; its secret is told this once."""
        settings = parse_key_settings(asdict(body))
        return told(settings, manager.keys.create(settings))

    @app.post(f"{API}/keys/import", status_code=202)
    def create_many(body: KeyListBody, response: fastapi.Response) -> JobView:
        """Make a key for each row of a CSV, or none; the job offers the secrets."""
        raw = as_typed(body)
        return under_way(manager.keys.create_many(raw.pop("csv"), raw), response)

    @app.post(f"{API}/keys/why")
    def diagnose_key(body: KeyQuestionBody) -> KeyVerdict:
        """Why a key works or fails."""
        found = manager.keys.why(body.key, body.model)
        faults = [Problem(fact=fact, advice=advice) for fact, advice in found.faults]
        return KeyVerdict(title=found.title, faults=faults)

    @app.post(f"{API}/keys/{{name:path}}/rotate", status_code=201)
    def rotate_key(name: str, body: RotationBody) -> NewKey:
        """Another secret for the same key, told this once; the old one ends after the grace."""
        return told(*manager.keys.rotate(name, parse_grace(body.grace_hours)))


def add_key_actions(app: fastapi.FastAPI, manager: Manager) -> None:
    """What is done to a key by its name or its hash."""

    @app.patch(f"{API}/keys/{{name:path}}")
    def edit_key(name: str, body: KeyChangesBody) -> KeySettings:
        """Change what is named of a key; requests under way are not touched."""
        return manager.keys.edit(name, as_typed(body))

    @app.post(f"{API}/keys/{{name:path}}/block", status_code=204)
    def block_key(name: str) -> None:
        """Refuse its requests until it is unblocked."""
        manager.keys.block(name)

    @app.post(f"{API}/keys/{{name:path}}/unblock", status_code=204)
    def unblock_key(name: str) -> None:
        """Take its requests again."""
        manager.keys.block(name, blocked=False)

    @app.delete(f"{API}/keys/{{name:path}}", status_code=204)
    def revoke_key(name: str) -> None:
        """Revoke the key of that name, or of that hash."""
        manager.keys.revoke(name)


def add_groups(app: fastapi.FastAPI, manager: Manager) -> None:
    """Groups, and all keys of one at once."""

    @app.get(f"{API}/groups")
    def list_groups() -> list[KnownGroup]:
        """The groups, and what they used of their budgets."""
        return manager.keys.groups()

    @app.post(f"{API}/groups")
    def set_group(body: GroupBody) -> Group:
        """Make a group, or change what is named of a known one."""
        return manager.keys.set_group(as_typed(body))

    @app.post(f"{API}/groups/{{name:path}}/extend")
    def extend_group(name: str, body: ExtensionBody) -> KeyCount:
        """Let all its keys end then."""
        return KeyCount(keys=manager.keys.extend_group(name, body.until))

    @app.post(f"{API}/groups/{{name:path}}/block", status_code=204)
    def block_group(name: str) -> None:
        """Refuse the requests of all its keys until it is unblocked."""
        manager.keys.block_group(name)

    @app.post(f"{API}/groups/{{name:path}}/unblock", status_code=204)
    def unblock_group(name: str) -> None:
        """Take the requests of its keys again."""
        manager.keys.block_group(name, blocked=False)

    @app.delete(f"{API}/groups/{{name:path}}")
    def revoke_group(name: str) -> KeyCount:
        """Revoke all its keys; the group is gone, and what they used stays accounted for."""
        return KeyCount(keys=manager.keys.revoke_group(name))


def add_direct_keys(app: fastapi.FastAPI, manager: Manager) -> None:
    """Keys past the gateway; revoking one is a change."""

    @app.get(f"{API}/direct-keys")
    def list_direct_keys() -> list[Json]:
        """The direct keys, each with the end of its secret."""
        return keyed(DIRECT_HEADERS, direct_rows(manager.state()))

    @app.post(f"{API}/direct-keys", status_code=202)
    def create_direct_key(body: DirectKeyBody, response: fastapi.Response) -> NewDirect:
        """Make a direct key; its secret is told this once, and opens something after the job."""
        key = new_direct_key(body.name, body.models, emergency=body.emergency)
        job = under_way(manager.start(granting_direct(key)), response)
        urls = direct_urls(manager.state(), key)
        return NewDirect(name=key.name, key=reveal(key.secret), base_urls=urls, job=job)


def add_usage(app: fastapi.FastAPI, manager: Manager) -> None:
    """Who used how much, and what it costs."""

    @app.get(f"{API}/usage", response_model=UsageReport, responses=CSV_TOO)
    def read_usage(
        as_csv: Annotated[bool, fastapi.Depends(wants_csv)],
        by: Grouping = "key",
        first: Annotated[DayText | None, fastapi.Query(alias="from")] = None,
        last: Annotated[DayText | None, fastapi.Query(alias="to")] = None,
    ) -> Any:
        """The use of a range of days in UTC, both included; else of the last 30."""
        query = parse_usage_query(by, first or "", last or "", utc_now().date())
        report = manager.usage.report(query)
        return csv_answer(usage_csv(report)) if as_csv else report

    @app.get(f"{API}/usage/attention")
    def read_attention() -> list[Json]:
        """Who is close to a limit, and the keys that nobody uses."""
        return keyed(STANDING_HEADERS, standing_rows(manager.usage.standings(), utc_now()))

    @app.get(f"{API}/usage/engines")
    def read_tallies() -> list[EngineTally]:
        """What the engines counted, beside what is accounted for."""
        return manager.usage.tallies()

    @app.get(f"{API}/statement", response_model=Statement, responses=CSV_TOO)
    def read_statement(
        as_csv: Annotated[bool, fastapi.Depends(wants_csv)],
        month: MonthText | None = None,
        group: str = "",
    ) -> Any:
        """A month's use by groups and models, at the prices of now; else of the last month."""
        first = parse_month(month or "", utc_now().date())
        statement = manager.usage.statement(first, group)
        return csv_answer(statement_csv(statement)) if as_csv else statement

    @app.get(f"{API}/prices")
    def list_prices() -> Prices:
        """What a million tokens cost, on statements alone."""
        return manager.state().prices

    @app.put(f"{API}/prices/{{model:path}}")
    def set_price(model: str, body: PriceBody) -> Prices:
        """The price of a model, or with * of all others."""
        raw = as_typed(body) | {"model": model}
        return manager.save(pricing(raw, raw.pop("currency", None))).prices

    @app.delete(f"{API}/prices/{{model:path}}")
    def remove_price(model: str) -> Prices:
        """No price any more for that model."""
        return manager.save(unpricing(model)).prices


def add_database(app: fastapi.FastAPI, manager: Manager) -> None:
    """LiteLLM's database; the way back to a dump is a change."""

    @app.get(f"{API}/database")
    def read_database() -> DatabaseFacts:
        """Its size, and what it keeps for how long."""
        return DatabaseFacts(size=manager.database.size(), keeps=manager.state().housekeeping)

    @app.patch(f"{API}/database")
    def keep_house(body: HousekeepingBody) -> Housekeeping:
        """Change what it keeps; the next plan makes it so."""
        return manager.save(keeping_house(as_typed(body))).housekeeping

    @app.get(f"{API}/database/dumps")
    def list_dumps() -> list[Dump]:
        """Its dumps, newest first."""
        return manager.database.dumps()

    @app.post(f"{API}/database/dumps", status_code=202)
    def take_dump(body: DumpBody, response: fastapi.Response) -> JobView:
        """Take a dump, read back whole before it counts."""
        return under_way(manager.database.dump(body.name or ""), response)


# =============================================================================
# §37 Terminal — effects: a live view for an SSH session
# =============================================================================


# =============================================================================
# §38 Console — effects: one builder per tab, and who may open it
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
    (6.31), so every request is judged here, before Gradio sees it. What is below the API's path
    never comes to the console, and no cookie counts there: programs show tokens at their own gate.
    """

    def __init__(self, app: Any, programs: Any, key: pydantic.SecretStr, instance: str) -> None:
        self._app = app
        self._programs = programs
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
        elif scope["path"].startswith(f"{API}/") and scope["path"] != API_PAGE:
            answer = self._programs
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


def table(
    headers: Sequence[str],
    widths: Sequence[str] | None = None,
    *,
    label: str = "",
    visible: bool = True,
    search: bool = False,
) -> Any:
    return gr.Dataframe(
        headers=list(headers), interactive=False, wrap=True, buttons=[], type="array",
        column_widths=list(widths) if widths else None, label=label, show_label=bool(label),
        visible=visible, show_search="filter" if search else "none",
    )  # fmt: skip


def build_overview_tab(desk: Desk) -> None:
    """Is all well, and if not, what to do."""
    with gr.Tab("Overview"):
        live(desk, gr.Markdown(), overview_text)
        live(desk, gr.HTML(), cards_html)
        gr.Markdown("### Models")
        live(desk, table(MODEL_HEADERS), model_rows)
        gr.Markdown("### Containers")
        live(desk, table(COMPONENT_HEADERS), component_rows)


@dataclass(frozen=True, slots=True)
class PlanCard:
    """The place where a change is shown before it is done."""

    group: gr.Group
    picture: gr.HTML
    text: gr.Markdown
    pending: gr.State
    confirmed: Any  # the event: what was planned is under way

    @property
    def outputs(self) -> list[Any]:
        return [self.group, self.picture, self.text, self.pending]


def build_plan_card(desk: Desk, changes: Mapping[str, Callable[[Any], Change]]) -> PlanCard:
    """A hidden card that shows a plan and asks; `pending` holds (verb, subject)."""

    def on_confirm(pending: tuple[str, Any]) -> tuple[Any, None]:
        with shown_to_operator():
            verb, subject = pending
            desk.manager.start(changes[verb](subject))
            return gr.update(visible=False), None

    with gr.Group(visible=False, elem_classes="plan-card") as group:
        picture = gr.HTML(visible=False)
        text = gr.Markdown(padding=True)
        with gr.Row():
            confirm = gr.Button("Do it", variant="primary")
            leave = gr.Button("Not now")
    pending = gr.State(None)
    confirmed = confirm.click(
        on_confirm, pending, [group, pending], concurrency_id="change", **PRIVATE
    )
    leave.click(lambda: (gr.update(visible=False), None), None, [group, pending], **PRIVATE)
    return PlanCard(group, picture, text, pending, confirmed)


def wire_plan(
    desk: Desk, button: gr.Button, subject: Any, card: PlanCard, verb: str,
    change: Callable[[str], Change],
) -> None:  # fmt: skip
    """A button that opens the card with the plan of its change."""

    def on_click(chosen: str | None) -> tuple[Any, ...]:
        with shown_to_operator():
            if not chosen:
                raise RefusedError("Nothing is chosen yet.", advice="Choose one first.")
            return planned(desk, verb, chosen, change(chosen))

    button.click(on_click, subject, card.outputs, **PRIVATE)


def planned(desk: Desk, verb: str, subject: Any, wished: Change) -> tuple[Any, ...]:
    """What opens the card: the fit of what would be deployed, the plan, and how to confirm it."""
    text = plan_markdown(wished.title, desk.manager.plan(wished))
    fit = None
    if verb == "deploy":
        fit = desk.manager.weights.fit(desk.manager.state().model(subject))
    if fit and fit.verdict and not fit.starts:
        text = f"⚠️ It will probably not start there. **Do it** tries it all the same.\n\n{text}"
    shown = gr.HTML(fit_html(fit) if fit else "", visible=fit is not None)
    return gr.update(visible=True), shown, text, (verb, subject)


def build_question(
    label: str, act: Callable[[Any], str], said: gr.Markdown | None = None
) -> tuple[list[Any], gr.Markdown]:
    """A hidden card that asks before something goes for good; (group, text, pending) open it."""

    def on_confirm(pending: Any) -> tuple[Any, str]:
        with shown_to_operator():
            return gr.update(visible=False), act(pending)

    with gr.Group(visible=False, elem_classes="plan-card") as group:
        text = gr.Markdown(padding=True)
        with gr.Row():
            confirm = gr.Button(label, variant="stop")
            leave = gr.Button("Not now")
    pending, said = gr.State(None), said or gr.Markdown()
    confirm.click(on_confirm, pending, [group, said], **PRIVATE)
    leave.click(lambda: gr.update(visible=False), None, group, **PRIVATE)
    return [group, text, pending], said


def deletion_question(lines: Sequence[str], pending: Any) -> tuple[Any, ...]:
    """What opens the card before this is deleted."""
    text = "**This would be deleted:**\n" + code_block("\n".join(lines))
    return gr.update(visible=True), text, pending


MODEL_VERBS: Final[Mapping[str, tuple[str, Literal["primary", "secondary", "stop"]]]] = {
    "deploy": ("Deploy", "primary"),
    "stop": ("Stop", "secondary"),
    "restart": ("Restart", "secondary"),
    "remove": ("Remove", "stop"),
}


def build_models_tab(desk: Desk) -> ModelForm:
    """The registered models, what can be done with one, its log, and a form for a new one."""
    changes = {"deploy": deploying, "stop": stopping, "restart": restarting, "remove": removing}

    with gr.Tab("Models", id="models"):
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
        form = build_registration_form(desk, chosen, card)
        build_log_view(desk, chosen)
    rows.select(first_cell, None, chosen, **PRIVATE)
    for verb, button in buttons.items():
        wire_plan(desk, button, chosen, card, verb, changes[verb])
    return form


@dataclass(frozen=True, slots=True)
class ModelForm:
    """The fields that describe a new model, in the order of `registration`, and its fold."""

    fold: gr.Accordion
    inputs: list[Any]
    at_once: gr.Number
    facts: gr.Markdown
    fit: gr.HTML
    command: gr.Code
    gpus: gr.CheckboxGroup  # of the inputs, too

    @property
    def known(self) -> list[Any]:
        """What the library fills in: name, type, origin, source, revision."""
        name, kind, origin, source, _, _, revision, *_ = self.inputs
        return [name, kind, origin, source, revision]


def build_registration_form(desk: Desk, chosen: gr.Dropdown, card: PlanCard) -> ModelForm:
    """Register a model: the fields that matter first, the rest folded away."""

    def on_register(*values: Any) -> tuple[Any, str]:
        with shown_to_operator():
            model = desk.manager.register(registration(*values))
            names = [known.name for known in desk.manager.state().models]
            joined = placement_note(model, desk.manager.hardware())
            return (
                gr.Dropdown(choices=names, value=model.name),
                f"Registered **{model.name}**{joined}. **Deploy**, above, starts it.",
            )

    def on_registered(name: str | None) -> tuple[Any, ...]:
        with shown_to_operator():
            return planned(desk, "deploy", typed(name), deploying(typed(name)))

    form = build_model_form(desk)
    with form.fold:
        with gr.Row():
            both = gr.Button("Register and deploy", variant="primary", scale=0, min_width=200)
            register = gr.Button("Register", scale=0, min_width=130)
        said = gr.Markdown()
    register.click(on_register, form.inputs, [chosen, said], **PRIVATE)
    added = both.click(on_register, form.inputs, [chosen, said], **PRIVATE)
    added.success(on_registered, form.inputs[0], card.outputs, **PRIVATE)
    wire_fit(desk, form)
    return form


def build_model_form(desk: Desk) -> ModelForm:
    """The fields, and below them whether the model would fit."""
    recipes = desk.manager.images.recipes()
    with gr.Accordion("Register a model", open=not desk.watch.latest().state_has_models) as fold:
        with gr.Row():
            name = gr.Textbox(
                label="Name", placeholder="chat", info="lower-case letters, digits, -"
            )
            kind = gr.Dropdown(list(MODEL_TYPES), value="chat", label="Type")
            origin = gr.Radio(list(ORIGINS), value=ORIGINS[0], label="Weights come from")
        source = gr.Textbox(
            label="Repository or directory", placeholder="Qwen/Qwen3-8B",
            info="the tab Library finds one; Enter looks at it",
        )  # fmt: skip
        facts = gr.Markdown()
        arguments = gr.Textbox(
            label="Engine arguments", lines=2, placeholder="--max-model-len 8192"
        )
        with gr.Accordion("More settings", open=False), gr.Row():
            served = gr.Textbox(label="Served as", info="what clients ask for; empty: the name")
            revision = gr.Textbox(label="Revision", info="empty: today's commit, from then on")
            image = gr.Textbox(label="Engine image", info="empty: the pinned vLLM image")
            recipe = gr.Dropdown(["", *recipes], value="", label="Recipe", info="empty: none")
            kv_cache = gr.Number(4096, label="KV cache on the CPU (MiB)", precision=0, minimum=16)
            replicas = gr.Number(1, label="Replicas", precision=0, minimum=1, maximum=16)
            at_once = gr.Number(
                1, label="Requests at a time", precision=0, minimum=1, info="for the sum below"
            )
        placement = build_placement_fields(desk)
        fit = gr.HTML()
        command = gr.Code(label="What will be run", language="shell", visible=False)
    inputs = [
        name, kind, origin, source, arguments, served, revision, image, kv_cache, replicas,
        *placement, recipe,
    ]  # fmt: skip
    return ModelForm(fold, inputs, at_once, facts, fit, command, gpus=placement[0])


def wire_fit(desk: Desk, form: ModelForm) -> None:
    """The sum follows what is typed; the hub is asked only when a source is entered."""
    _, kind, origin, source, arguments, _, revision, *_ = form.inputs
    every = [*form.inputs, form.at_once]

    on_typed = partial(preview, desk.manager)
    seen = [form.fit, form.command]

    def on_source(*values: Any) -> tuple[Any, ...]:
        if not typed(values[3]):
            return gr.skip(), "", *on_typed(*values)
        try:
            with shown_to_operator():
                wanted = registration(*values[:-1])["source"]
                facts = desk.manager.weights.look(parse_source(wanted))
        except gr.Error as error:
            return gr.skip(), f"⚠️ {error.message}", *on_typed(*values)
        return guess_type(facts) or gr.skip(), facts_line(facts), *on_typed(*values)

    for entered in (source.submit, source.blur, revision.submit, origin.input):
        entered(on_source, every, [kind, form.facts, *seen], **QUIET)
    # Not `input`: Gradio (6.31) fires that for keys, and neither for a paste nor for Backspace.
    for changed in (arguments.change, *(choice.change for choice in form.inputs[8:]), kind.input):
        changed(on_typed, every, seen, trigger_mode="always_last", **QUIET)
    form.at_once.change(on_typed, every, seen, trigger_mode="always_last", **QUIET)


def preview(manager: Manager, *values: Any) -> tuple[str, Any]:
    """The sum and the command of what the form describes now; nothing while it is half-typed."""
    with contextlib.suppress(ManagerError):
        *described, at_once = values
        raw = registration(*described)
        names = {key: raw[key] or "draft" for key in ("name", "served_model_name")}
        model = manager.draft(raw | names)
        fit = manager.weights.fit(model, int(at_once or 1))
        return fit_html(fit) if fit else "", gr.update(value=format_command(model), visible=True)
    return "", gr.update(visible=False)


def build_placement_fields(desk: Desk) -> tuple[gr.CheckboxGroup, gr.Dropdown, gr.Number]:
    """Whole GPUs, or a slice, or a share; hidden where there is no GPU."""
    found = desk.manager.hardware().gpus
    with gr.Row(visible=bool(found)):
        gpus = gr.CheckboxGroup(
            [*((short_title(gpu), gpu.uuid) for gpu in found), ("the processor", PROCESSOR)],
            value=[] if found else [PROCESSOR], label="Whole GPUs",
            info="none: a free one; several: tensor parallelism",
        )  # fmt: skip
        mig_slice = gr.Dropdown(
            label="or a MIG slice", info="free slices; cut more in the tab Hardware"
        )
        live(desk, mig_slice, slice_choices)
        fraction = gr.Number(
            0, label="Share of the GPU's memory", minimum=0, maximum=1, step=0.05,
            info="0: all of it; needed where several models share a GPU",
        )  # fmt: skip
    return gpus, mig_slice, fraction


def build_log_view(desk: Desk, chosen: gr.Dropdown) -> None:
    """The chosen model's log, live while it is followed; what was kept of it when it is gone."""

    def on_show(name: str | None, wanted: str | None, which: str) -> str:
        with shown_to_operator():
            previous = which == RUNS[1]
            return (
                desk.manager.logs.of(name, search=typed(wanted), previous=previous) if name else ""
            )

    def on_tick(name: str | None, wanted: str | None, which: str) -> Any:
        with contextlib.suppress(gr.Error):  # it was told when the log was opened
            return on_show(name, wanted, which)
        return gr.skip()

    with gr.Accordion("Log", open=False):
        with gr.Row(elem_classes="actions"):
            wanted = gr.Textbox(label="Only lines with", placeholder="error", scale=2)
            which = gr.Radio(list(RUNS), value=RUNS[0], label="Of", scale=2)
            follow = gr.Checkbox(label="Follow", scale=0, min_width=110)
            show = gr.Button("Show the log", scale=0, min_width=130)
        text = gr.Textbox(
            show_label=False, lines=16, max_lines=16, interactive=False, autoscroll=True,
            buttons=["copy"], placeholder="Choose a model above, then show its log.",
            elem_classes="log",
        )  # fmt: skip
    inputs = [chosen, wanted, which]
    timer = gr.Timer(REFRESH_SECONDS, active=False)
    follow.change(lambda on: gr.Timer(active=on), follow, timer, **QUIET)
    timer.tick(on_tick, inputs, text, **QUIET)
    for asked in (show.click, wanted.submit):
        asked(on_show, inputs, text, **PRIVATE)
    # Its own autoscroll (6.31) stays at the top when a page shows a log for the first time.
    text.change(None, js=SCROLL_LOG, **QUIET)


SCROLL_LOG: Final = (
    "() => document.querySelectorAll('.log textarea').forEach(t => t.scrollTop = t.scrollHeight)"
)
RUNS: Final = ("this run", "the run before")


def build_library_tab(desk: Desk, tabs: gr.Tabs, form: ModelForm) -> None:
    """Weights on the hub and on this server, and the images that engines run in."""
    with gr.Tab("Library", id="library") as tab:
        build_search(desk, tabs, form)
        live(desk, gr.HTML(), tasks_html)
        build_task_cancel(desk)
        build_cache_view(desk, tab)
        build_image_view(desk, tab)


def build_search(desk: Desk, tabs: gr.Tabs, form: ModelForm) -> None:
    """Find a repository; then look at it, download it or make it a model."""

    def on_search(text: str | None, kind: str) -> tuple[list[list[str]], str]:
        with shown_to_operator():
            wanted = next((known for known in MODEL_TYPES if known == kind), None)
            hits = desk.manager.weights.search(typed(text), wanted)
            return hit_rows(hits), "" if hits else "Nothing on the hub has that in its name."

    with gr.Row(elem_classes="actions"):
        text = gr.Textbox(label="Search the Hugging Face hub", placeholder="qwen3 8b", scale=3)
        kind = gr.Dropdown([ANY_TYPE, *MODEL_TYPES], value=ANY_TYPE, label="Type", scale=1)
        search = gr.Button("Search", variant="primary", scale=0, min_width=110)
    said = gr.Markdown()
    hits = table(HIT_HEADERS)
    for asked in (search.click, text.submit):
        asked(on_search, [text, kind], [hits, said], **PRIVATE)
    build_choice(desk, hits, tabs, form)


def build_choice(desk: Desk, hits: gr.Dataframe, tabs: gr.Tabs, form: ModelForm) -> None:
    """One repository or directory, and what can be done with it."""

    def on_look(name: str | None, revision: str | None) -> tuple[Any, Any]:
        with shown_to_operator():
            facts, places = look_at(desk.manager, name, revision)
            return gr.update(value=facts_rows(facts), visible=True), gr.update(
                value=place_rows(places), visible=bool(places)
            )

    def on_download(name: str | None, revision: str | None) -> None:
        with shown_to_operator():
            start_download(desk.manager, name, revision)

    def on_add(name: str | None, revision: str | None) -> tuple[Any, ...]:
        with shown_to_operator():
            return gr.Tabs(selected="models"), *form_of(desk.manager, name, revision)

    with gr.Row(elem_classes="actions"):
        name = gr.Textbox(
            label="Repository, or directory of this server", placeholder="Qwen/Qwen3-8B", scale=3,
            info="click a row above, or type it",
        )  # fmt: skip
        revision = gr.Textbox(label="Revision", info="empty: the newest", scale=1)
        look = gr.Button("Look at it", scale=0, min_width=110)
        fetch = gr.Button("Download", scale=0, min_width=110)
        add = gr.Button("Add as a model", variant="primary", scale=0, min_width=150)
    facts = table(("What", "Found"), ("20%", "80%"), visible=False)
    best = "Where it would fit, the best first"
    places = table(PLACE_HEADERS, label=best, visible=False)
    asked, seen = [name, revision], [facts, places]
    hits.select(first_cell, None, name, **PRIVATE).then(on_look, asked, seen, **PRIVATE)
    for wanted in (look.click, name.submit):
        wanted(on_look, asked, seen, **PRIVATE)
    fetch.click(on_download, asked, None, **PRIVATE)
    outputs = [tabs, form.fold, form.facts, form.gpus, *form.known]
    filled = add.click(on_add, asked, outputs, **PRIVATE)
    described = [*form.inputs, form.at_once]
    filled.success(partial(preview, desk.manager), described, [form.fit, form.command], **QUIET)


def form_of(manager: Manager, name: str | None, revision: str | None) -> tuple[Any, ...]:
    """The registration form, opened and filled in with what was found: fold, facts, GPUs, …"""
    place = typed(name)
    facts, places = look_at(manager, place, revision)
    origin = ORIGINS[1] if place.startswith("/") else ORIGINS[0]
    kind = guess_type(facts) or gr.skip()
    known = (suggest_name(place), kind, origin, place, typed(revision))
    return gr.Accordion(open=True), facts_line(facts), free_gpus(places) or gr.skip(), *known


def start_download(manager: Manager, name: str | None, revision: str | None) -> None:
    source = named_source(typed(name), typed(revision) or None)
    if isinstance(source, LocalSource):
        raise RefusedError("A directory needs no download.", advice="Add it as a model.")
    known = manager.weights.facts(source)
    manager.weights.download(source, guess_type(known) if known else None)


def look_at(
    manager: Manager, name: str | None, revision: str | None
) -> tuple[RepositoryFacts, list[Candidate]]:
    """What is there, and the places of this server where it would fit."""
    source = named_source(typed(name), typed(revision) or None)
    facts = manager.weights.look(source)
    raw = {"name": "draft", "type": guess_type(facts) or "chat", "source": asdict(source)}
    return facts, manager.weights.places(manager.sketch(raw))


def first_cell(event: gr.SelectData) -> str:
    """What a row of a table is about."""
    return str(event.row_value[0])


def build_task_cancel(desk: Desk) -> None:
    """Downloads and builds go on beside changes; each can be called off."""
    with gr.Row(elem_classes="actions"):
        task = live(desk, gr.Dropdown(label="Under way", visible=False, scale=3), task_choices)
        cancel = gr.Button("Cancel it", visible=False, scale=0, min_width=110)
        live(desk, cancel, task_cancel)
    cancel.click(lambda task_id: desk.manager.cancel_job(task_id or ""), task, None, **PRIVATE)


def build_cache_view(desk: Desk, tab: gr.Tab) -> None:
    """What is stored, who uses it, and a way to make room that is shown first."""
    weights = desk.manager.weights

    def on_list() -> tuple[str, list[list[str]]]:
        with shown_to_operator():
            cache = weights.cache()
            return cache_summary(cache), cache_rows(cache, desk.manager.state())

    def on_remove(repository: str | None) -> tuple[Any, ...]:
        with shown_to_operator():
            if not typed(repository):
                raise RefusedError("Nothing is chosen yet.", advice="Click a row first.")
            return removal_question([weights.removal(typed(repository))])

    def on_prune() -> tuple[Any, ...]:
        with shown_to_operator():
            return removal_question(weights.orphans())

    def delete(removals: Sequence[Removal]) -> str:
        for removal in removals:
            weights.remove(removal)
        return f"Deleted: {format_size(sum(removal.freed_bytes for removal in removals))}."

    with gr.Accordion("On this server", open=True):
        summary = gr.Markdown()
        rows = table(CACHE_HEADERS)
        with gr.Row(elem_classes="actions"):
            chosen = gr.Textbox(label="Stored repository", info="click a row above", scale=3)
            remove = gr.Button("Delete", variant="stop", scale=0, min_width=110)
            prune = gr.Button("Delete all that is unused", scale=0, min_width=240)
            fresh = gr.Button("Refresh", scale=0, min_width=110)
        question, said = build_question("Delete for good", delete)
    rows.select(first_cell, None, chosen, **PRIVATE)
    remove.click(on_remove, chosen, question, **PRIVATE)
    prune.click(on_prune, None, question, **PRIVATE)
    for changed in (tab.select, fresh.click, said.change):
        changed(on_list, None, [summary, rows], **QUIET)


def removal_question(removals: Sequence[Removal]) -> tuple[Any, ...]:
    """What opens the card that asks before weights go."""
    if not removals:
        raise RefusedError("Every stored repository is in use.", advice="Remove a model first.")
    return deletion_question([*map(removal_text, removals)], removals)


def build_image_view(desk: Desk, tab: gr.Tab) -> None:
    """The images, pinned, and those that recipes build here."""
    images = desk.manager.images

    def on_build(name: str | None, device: Device) -> None:
        with shown_to_operator():
            if not name:
                raise RefusedError("No recipe is chosen yet.", advice="Choose one first.")
            images.build_recipe(name, device)

    def on_pull(role: str | None) -> None:
        with shown_to_operator():
            images.pull(role or None)

    with gr.Accordion("Engine images", open=False):
        rows = table(IMAGE_HEADERS, ("14%", "28%", "14%", "10%", "12%", "22%"))
        with gr.Row(elem_classes="actions"):
            recipe = gr.Dropdown([*images.recipes()], label="Recipe", value=None, scale=2)
            device = gr.Radio(["gpu", "cpu"], value="gpu", label="For", scale=1)
            build = gr.Button("Build", scale=0, min_width=110)
        with gr.Row(elem_classes="actions"):
            parts = [f.name for f in fields(Images)]
            role = gr.Dropdown(parts, label="Part", value=None, info="none: all that is needed")
            pull = gr.Button("Pull", scale=0, min_width=110)
            pin = gr.Button("Pin its digest", scale=0, min_width=140)
        card = build_plan_card(desk, {"pin": images.pinning_digest})
        pruned = build_image_pruning(desk)
    build.click(on_build, [recipe, device], None, **PRIVATE)
    pull.click(on_pull, role, None, **PRIVATE)
    wire_plan(desk, pin, role, card, "pin", images.pinning_digest)
    for changed in (tab.select, pruned.change):
        changed(images.rows, None, rows, **QUIET)


def build_image_pruning(desk: Desk) -> gr.Markdown:
    """A button that shows what would go before it goes; the Markdown says that it does."""
    images = desk.manager.images

    def on_prune() -> tuple[Any, ...]:
        with shown_to_operator():
            unused = [" · ".join(row) for row in images.unused_rows()]
            if not unused:
                raise RefusedError("No image is unused.", advice="There is nothing to do.")
            return deletion_question(unused, None)

    def delete(_: None) -> str:
        return f"{images.prune().title}: see the progress above."

    with gr.Row():
        prune = gr.Button("Delete unused images", variant="stop", scale=0, min_width=200)
    question, said = build_question("Delete for good", delete)
    prune.click(on_prune, None, question, **PRIVATE)
    return said


def build_hardware_tab(desk: Desk) -> None:
    """The GPUs as pictures, how to cut them, how they are joined, and what a reboot would do."""
    with gr.Tab("Hardware"):
        live(desk, gr.Markdown(), driver_view)
        live(desk, gr.HTML(), cards_html)
        build_mig_planner(desk)
        with gr.Accordion("How the GPUs are joined", open=False):
            live(desk, gr.Markdown(), topology_text)
        build_reboot_view(desk)


def build_mig_planner(desk: Desk) -> None:
    """Choose slices, see the card as it would be and the plan, then do it."""

    def change(subject: str) -> Change:
        gpu, _, wish = subject.partition("|")
        return desk.manager.cutting(gpu, wish)

    def on_gpu(uuid: str | None) -> Any:
        gpu = desk.manager.hardware().gpu(uuid) if uuid else None
        return gr.Dropdown(choices=layout_choices(gpu))

    def on_plan(uuid: str | None, wish: str | None) -> tuple[Any, ...]:
        with shown_to_operator():
            if not uuid:
                raise RefusedError("No GPU is chosen yet.", advice="Choose one first.")
            subject = f"{uuid}|{wish or ''}"
            wished = change(subject)
            text = plan_markdown(wished.title, desk.manager.plan(wished))
            picture = planned_card(wished, desk.manager.state(), desk.manager.hardware())
            return gr.update(visible=True), gr.HTML(picture, visible=True), text, ("cut", subject)

    with gr.Accordion("Cut a GPU into MIG slices", open=False):
        with gr.Row(elem_classes="actions"):
            gpu = live(desk, gr.Dropdown(label="GPU", scale=1, min_width=240), gpu_choices)
            wish = gr.Dropdown(
                label="Slices", allow_custom_value=True, scale=3, min_width=320,
                info="choose, or type 3g.20gb, 2x 1g.5gb, or GiB by model: chat=15, embed=4",
            )  # fmt: skip
            plan = gr.Button("Plan", variant="primary", scale=0, min_width=110)
        card = build_plan_card(desk, {"cut": change})
    gpu.change(on_gpu, gpu, wish, **PRIVATE)
    plan.click(on_plan, [gpu, wish], card.outputs, **PRIVATE)


def build_reboot_view(desk: Desk) -> None:
    """What would come back after a reboot, in which order, and how long it took last time."""

    def on_check() -> tuple[str, list[list[str]]]:
        with shown_to_operator():
            state, observed = desk.manager.state(), desk.manager.observe()
            text = reboot_text(state, observed, desk.manager.boot_units())
            return text, reboot_rows(state, observed)

    with gr.Accordion("Safe to reboot?", open=False):
        check = gr.Button("Look")
        verdict = gr.Markdown()
        rows = table(REBOOT_HEADERS)
    check.click(on_check, None, [verdict, rows], **PRIVATE)


def build_routes_tab(desk: Desk) -> None:
    """The ways in as a picture, what can be changed about them, and one request along them."""
    with gr.Tab("Routes", id="routes") as tab:
        live(desk, gr.HTML(), ways_html)
        build_try_out(desk)
        build_route_form(desk)
        build_provider_form(desk)
        build_direct_keys(desk)
        build_edge_switches(desk)
        build_proofs_view(desk, tab)


def plan_of(
    desk: Desk, verb: str, change: Callable[[Any], Change], described: Callable[..., Any]
) -> Callable[..., tuple[Any, ...]]:
    """A handler that opens a card with the plan of what a form describes; the form stays."""

    def on_plan(*values: Any) -> tuple[Any, ...]:
        with shown_to_operator():
            subject = described(*values)
            return planned(desk, verb, subject, change(subject))

    return on_plan


def build_route_form(desk: Desk) -> None:
    """A public name: who answers for it, and what happens when they cannot."""

    def on_name(name: str | None) -> Any:
        known = next((r for r in desk.manager.state().routes if r.name == typed(name)), None)
        return route_fields(known) if known else tuple(gr.skip() for _ in fields_below)

    with gr.Accordion("Change a route, or make one", open=False):
        with gr.Row():
            name = gr.Dropdown(
                label="Public name", allow_custom_value=True, value=None,
                info="choose one, or type a new one; lab/* is a pattern",
            )  # fmt: skip
            live(desk, name, route_choices)
            members = many(desk, "Members", "models, or provider/model", member_choices)
            aliases = gr.Textbox(label="Also called", placeholder="gpt-4o, default")
        with gr.Row():
            strategy = gr.Dropdown([*STRATEGIES], value=STRATEGIES[0], label="Who of them answers")
            weights = gr.Textbox(label="Weights", info="weighted: one for each", placeholder="3, 1")
            fallbacks = many(desk, "Fallbacks", "in this order, where all fail", public_choices)
            context = many(desk, "If a prompt is too long", "in this order", public_choices)
        with gr.Accordion("Limits", open=False), gr.Row():
            limits = [
                gr.Number(usual, label=label, info=info, precision=0, minimum=0, min_width=130)
                for usual, (_, label, info) in zip(USUAL_LIMITS, ROUTE_LIMITS, strict=True)
            ]
        with gr.Row(elem_classes="actions"):
            plan = gr.Button("Plan the route", variant="primary", scale=0, min_width=150)
            remove = gr.Button("Remove the route", variant="stop", scale=0, min_width=200)
        card = build_plan_card(desk, {"route": routing, "unroute": unrouting})
    fields_below = [members, aliases, strategy, weights, fallbacks, context, *limits]
    name.input(on_name, name, fields_below, **QUIET)
    on_plan = plan_of(desk, "route", routing, route_settings)
    plan.click(on_plan, [name, *fields_below], card.outputs, **PRIVATE)
    wire_plan(desk, remove, name, card, "unroute", unrouting)


def many(desk: Desk, label: str, info: str, view: View) -> gr.Dropdown:
    """Several of what there is, in the order of choosing, or what is typed."""
    several = gr.Dropdown(label=label, info=info, multiselect=True, allow_custom_value=True)
    live(desk, several, view)
    return several


def build_provider_form(desk: Desk) -> None:
    """Servers of models that run elsewhere, and what they have."""

    def on_look() -> tuple[Any, ...]:
        with shown_to_operator():
            found = desk.manager.providers.all()
            rows = provider_rows(desk.manager.state().providers, found)
            return rows, gr.update(value=found_models(found), visible=True)

    with gr.Accordion("Providers", open=False):
        rows = live(desk, table(PROVIDER_HEADERS), known_providers)
        look = gr.Button("Look at them", scale=0, min_width=150)
        models = gr.Textbox(
            label="Their models, as routes name them", lines=2, max_lines=10, interactive=False,
            visible=False, elem_classes="log",
        )  # fmt: skip
        with gr.Row():
            name = gr.Dropdown(
                label="Name", allow_custom_value=True, value=None, info="or a new one"
            )
            live(desk, name, provider_choices)
            kind = gr.Dropdown([*PROVIDER_KINDS], value=PROVIDER_KINDS[0], label="Kind")
            url = gr.Textbox(label="Address", placeholder="http://10.0.0.7:11434")
            vendor = gr.Textbox(label="Vendor", info="a cloud's name in LiteLLM")
            key = gr.Textbox(label="Key", type="password", info="empty: the one it has")
        with gr.Row(elem_classes="actions"):
            plan = gr.Button("Plan the provider", variant="primary", scale=0, min_width=190)
            remove = gr.Button("Remove the provider", variant="stop", scale=0, min_width=220)
        card = build_plan_card(desk, {"provide": providing, "unprovide": unproviding})
    look.click(on_look, None, [rows, models], **PRIVATE)
    on_plan = plan_of(desk, "provide", providing, provider_settings)
    plan.click(on_plan, [name, kind, url, vendor, key], card.outputs, **PRIVATE)
    wire_plan(desk, remove, name, card, "unprovide", unproviding)


def build_direct_keys(desk: Desk) -> None:
    """Keys for /models: planned, shown once, revoked."""

    def on_plan(name: str | None, models: Sequence[str] | None, emergency: bool) -> tuple[Any, ...]:
        with shown_to_operator():
            key = new_direct_key(typed(name), models or (), emergency=emergency)
            return *planned(desk, "grant", key, granting_direct(key)), key

    def on_granted(key: DirectKey | None) -> tuple[Any, None]:
        text = hand_out_direct(desk.manager.state(), key) if key else ""
        return gr.update(value=text, visible=key is not None), None

    with gr.Accordion("Direct keys, past LiteLLM", open=False):
        live(
            desk, table(DIRECT_HEADERS), lambda seen: direct_rows(seen.state) if seen.state else []
        )
        with gr.Row(elem_classes="actions"):
            name = gr.Dropdown(label="For whom", allow_custom_value=True, value=None, scale=2)
            live(desk, name, direct_choices)
            models = many(desk, "Models", "none: all of them", model_names)
            emergency = gr.Checkbox(
                label="For emergencies", info="opens /v1 too, while PostgreSQL is down"
            )
            plan = gr.Button("Plan the key", variant="primary", scale=0, min_width=130)
            revoke = gr.Button("Revoke", variant="stop", scale=0, min_width=110)
        card = build_plan_card(desk, {"grant": granting_direct, "revoke": revoking_direct})
        secret = gr.Textbox(
            label="Hand this over now: it is shown only once", lines=4, interactive=False,
            buttons=["copy"], visible=False, elem_id="new-direct-key", elem_classes="log",
        )  # fmt: skip
    fresh = gr.State(None)
    plan.click(on_plan, [name, models, emergency], [*card.outputs, fresh], **PRIVATE)
    card.confirmed.success(on_granted, fresh, [secret, fresh], **PRIVATE)
    wire_plan(desk, revoke, name, card, "revoke", revoking_direct)


def build_edge_switches(desk: Desk) -> None:
    """Who comes in without a key of his own, and how large a request may be."""

    def change(subject: tuple[Sequence[str], Json]) -> Change:
        return exposing(*subject)

    def closing(_: str) -> Change:
        return replace(configuring_edge({"open_routes": False}), title="Close every open route")

    def described(models: Sequence[str] | None, opened: bool, mib: float | None) -> Any:
        return models or (), {"open_routes": opened, "max_request_mib": mib or 1}

    with gr.Accordion("Open routes, and the size of requests", open=False):
        with gr.Row():
            models = gr.CheckboxGroup(label="Models that anybody may reach")
            live(desk, models, open_models)
            opened = gr.Checkbox(label="Open routes exist", info="off closes all of them at once")
            live(desk, opened, lambda seen: bool(seen.state and seen.state.edge.open_routes))
            mib = gr.Number(label="Largest request (MiB)", precision=0, minimum=1)
            live(desk, mib, lambda seen: seen.state and seen.state.edge.max_request_mib)
        with gr.Row(elem_classes="actions"):
            plan = gr.Button("Plan these settings", variant="primary", scale=0, min_width=200)
            kill = gr.Button("Close every open route", variant="stop", scale=0, min_width=250)
        changes: Json = {"expose": change, "close": closing}
        card = build_plan_card(desk, changes)
    on_plan = plan_of(desk, "expose", change, described)
    plan.click(on_plan, [models, opened, mib], card.outputs, **PRIVATE)
    wire_plan(desk, kill, gr.State("now"), card, "close", closing)


def build_try_out(desk: Desk) -> None:
    """One request along a way, and where its time went; nothing of it is kept."""

    def on_try(target: str | None, text: str | None) -> list[list[str]]:
        with shown_to_operator():
            if not typed(target):
                raise RefusedError("Nothing is chosen yet.", advice="Choose what to try first.")
            return hop_rows(desk.manager.traffic.try_out(typed(target), typed(text)))

    with gr.Accordion("Try one request", open=False):
        with gr.Row(elem_classes="actions"):
            target = gr.Dropdown(
                label="Ask for", allow_custom_value=True, value=None, scale=2,
                info="a public name, or past LiteLLM",
            )  # fmt: skip
            live(desk, target, trial_choices)
            text = gr.Textbox(label="Prompt", placeholder="yes", info="or none", scale=3)
            ask = gr.Button("Try it", variant="primary", scale=0, min_width=110)
        rows = table(HOP_HEADERS, ("25%", "15%", "60%"))
    ask.click(on_try, [target, text], rows, concurrency_limit=None, **PRIVATE)


def build_proofs_view(desk: Desk, tab: gr.Tab) -> None:
    """That every way in answers as it should, and that nothing said is kept: proven and dated."""
    proofs = desk.manager.proofs

    def on_show() -> tuple[Any, ...]:
        with shown_to_operator():
            probe, privacy = proofs.last_probe(), proofs.last_privacy()
            return (
                probe_headline(probe), probe_rows(probe) if probe else [],
                privacy_headline(privacy), privacy_rows(privacy) if privacy else [],
            )  # fmt: skip

    def on_start(start: Callable[[], Job]) -> None:
        with shown_to_operator():
            start()

    with gr.Accordion("Proofs", open=False):
        with gr.Row(elem_classes="actions"):
            probe = gr.Button("Probe every route", scale=0, min_width=170)
            prove = gr.Button("Prove privacy", scale=0, min_width=140)
        shown = []
        for headers in (PROBE_HEADERS, PRIVACY_HEADERS):
            shown += [gr.Markdown(), table(headers)]
        done = live(desk, gr.Textbox(visible="hidden"), proofs_done)
    probe.click(partial(on_start, proofs.probe), None, None, **PRIVATE)
    prove.click(partial(on_start, proofs.privacy), None, None, **PRIVATE)
    for changed in (tab.select, done.change):
        changed(on_show, None, shown, **QUIET)


def build_keys_tab(desk: Desk) -> None:
    """A key per colleague and their groups: made, shown once, changed, revoked."""

    def on_list() -> tuple[Any, ...]:
        # Opening a tab must not shout: without an endpoint there simply are no keys yet.
        listed: tuple[list[VirtualKey], list[KnownGroup]] = [], []
        with contextlib.suppress(ManagerError):
            listed = desk.manager.keys.with_groups()
        keys, groups = listed
        now, names = utc_now(), [group.settings.name for group in groups]
        return (
            key_rows(keys, now), gr.Dropdown(choices=[key.settings.alias for key in keys]),
            group_rows(groups, keys, now), *[gr.Dropdown(choices=names)] * 3,
        )  # fmt: skip

    with gr.Tab("Keys") as tab:
        live(desk, gr.Markdown(), endpoint_text)
        rows = table(KEY_HEADERS, search=True)
        said = gr.Markdown()
        secret = gr.Textbox(
            label="Hand this over now: it is shown only once", elem_id="new-key", lines=14,
            interactive=False, buttons=["copy"], visible=False,
        )  # fmt: skip
        build_offer(desk, secret, said)
        chosen = gr.Dropdown(label="Key", value=None, info="of whom the buttons are")
        build_key_actions(desk, chosen, secret, said)
        belongs = build_key_form(desk, chosen, secret, said)
        with gr.Accordion("Groups", open=False):
            group_table = table(GROUP_HEADERS)
            group = build_group_actions(desk, said)
            build_group_form(desk, said)
        all_of = build_many_keys(desk, said)
        build_key_doctor(desk)
        build_usage_view(desk)
    shown = [rows, chosen, group_table, belongs, group, all_of]
    for changed in (tab.select, said.change):
        changed(on_list, None, shown, **QUIET)


def build_usage_view(desk: Desk) -> None:
    """Who used how much: any range, added up by what the operator likes, and as a file."""

    def on_show(by: str, first: str | None, last: str | None) -> tuple[Any, ...]:
        with shown_to_operator():
            try:
                query = parse_usage_query(by, first or "", last or "", utc_now().date())
                report = desk.manager.usage.report(query)
            except ManagerError as error:  # opening it must not shout
                return html.escape(str(error)), gr.update(visible=False), gr.update(value=[])
            bars = pd.DataFrame(usage_bars(report), columns=list(BAR_COLUMNS))
            used = pd.DataFrame(usage_rows(report), columns=usage_headers(query), dtype=object)
            return (
                usage_html(report),
                # With another title or order beside it Gradio (6.31) goes on drawing the old bars.
                gr.update(value=bars, visible=not bars.empty),
                gr.update(headers=[*used], value=used.style.format(format_figure)),
            )

    with gr.Accordion("Usage", open=False) as view:
        with gr.Row(elem_classes="actions"):
            by = gr.Dropdown(list(get_args(Grouping)), value="key", label="Added up by")
            first = gr.DateTime(include_time=False, type="string", label="From (UTC)")
            last = gr.DateTime(include_time=False, type="string", label="To, included")
            show = gr.Button("Show", variant="primary", scale=0, min_width=110)
        said = gr.HTML()
        x, color, y = BAR_COLUMNS
        plot = gr.BarPlot(
            x=x, y=y, color=color, x_title=" ", x_label_angle=-35, height=280, visible=False
        )
        rows = table(["Key", *USAGE_HEADERS])
        build_usage_checks(desk)
        build_statement_view(desk)
    for asked in (show.click, by.change, view.expand):
        asked(on_show, [by, first, last], [said, plot, rows], **QUIET)


def build_usage_checks(desk: Desk) -> None:
    """What to look at: keys close to a limit or unused, and what no key accounts for."""
    usage = desk.manager.usage

    def on_attention() -> tuple[Any, Any]:
        with shown_to_operator():
            found = standing_rows(usage.standings(), utc_now())
            return gr.update(headers=list(STANDING_HEADERS), value=found, visible=True), ""

    def on_engines() -> tuple[Any, Any]:
        with shown_to_operator():
            found = tally_rows(usage.tallies())
            return gr.update(headers=list(TALLY_HEADERS), value=found, visible=True), TALLY_TEXT

    with gr.Row(elem_classes="actions"):
        attention = gr.Button("Close to a limit, or unused", scale=0, min_width=270)
        engines = gr.Button("Compare with the engines", scale=0, min_width=250)
    rows, said = table(STANDING_HEADERS, visible=False), gr.Markdown()
    attention.click(on_attention, None, [rows, said], **PRIVATE)
    engines.click(on_engines, None, [rows, said], **PRIVATE)


def build_statement_view(desk: Desk) -> None:
    """A month's use by groups, as a table, as a file, and as a page to print."""

    def on_state(month: str) -> tuple[Any, Any]:
        with shown_to_operator():
            first = parse_month(month.strip(), utc_now().date())
            statement = desk.manager.usage.statement(first)
            name = f"statement-{first:%Y-%m}"
            links = [
                download_link(f"{name}.csv", statement_csv(statement)),
                download_link(f"{name}.html", statement_page(statement)),
            ]
            return gr.update(value=statement_rows(statement), visible=True), " · ".join(links)

    with gr.Row(elem_classes="actions"):
        month = gr.Textbox(label="Statement of the month", placeholder="empty: the last one")
        make = gr.Button("Make statements", scale=0, min_width=180)
    rows, links = table(STATEMENT_HEADERS, visible=False), gr.HTML()
    make.click(on_state, month, [rows, links], **PRIVATE)


def done_at(text: str) -> str:
    """What was done and when: that it changes tells the tables to look again."""
    return f"{plain(text)} ({utc_now():%H:%M:%S} UTC)"


def chosen_one(name: str | None) -> str:
    if not name:
        raise RefusedError("Nothing is chosen yet.", advice="Choose one first.")
    return name


def build_key_actions(
    desk: Desk, chosen: gr.Dropdown, secret: gr.Textbox, said: gr.Markdown
) -> None:
    """What can be done to one key with a click."""
    keys = desk.manager.keys

    def on_block(blocked: bool, alias: str | None) -> str:
        with shown_to_operator():
            keys.block(chosen_one(alias), blocked=blocked)
            return done_at(f"{'Blocked' if blocked else 'Unblocked'} the key of {alias}.")

    def on_rotate(alias: str | None, hours: float | None) -> tuple[Any, str]:
        with shown_to_operator():
            settings, made = keys.rotate(chosen_one(alias), parse_grace(hours or 0))
            how = f"works for {hours:g} hours more" if hours else "does not work any more"
            said = done_at(f"{alias} has another secret; the old one {how}.")
            return _shown_once(desk, settings, made), said

    def on_revoke(alias: str | None) -> tuple[Any, ...]:
        with shown_to_operator():
            return gr.update(visible=True), revoke_question(chosen_one(alias)), alias

    def revoke_it(alias: str) -> str:
        keys.revoke(alias)
        return done_at(f"Revoked the key of {alias}.")

    with gr.Row(elem_classes="actions"):
        block = gr.Button("Block", scale=0, min_width=110)
        unblock = gr.Button("Unblock", scale=0, min_width=110)
        revoke = gr.Button("Revoke", variant="stop", scale=0, min_width=110)
        hours = gr.Number(24, label="Old secret works for (hours)", precision=0, minimum=0)
        rotate = gr.Button("Another secret", scale=0, min_width=160)
    question, _ = build_question("Revoke it", revoke_it, said)
    block.click(partial(on_block, True), chosen, said, **PRIVATE)
    unblock.click(partial(on_block, False), chosen, said, **PRIVATE)
    rotate.click(on_rotate, [chosen, hours], [secret, said], **PRIVATE)
    revoke.click(on_revoke, chosen, question, **PRIVATE)


def _shown_once(desk: Desk, settings: KeySettings, secret: pydantic.SecretStr) -> Any:
    return gr.update(value=hand_out(desk.manager.state(), settings, reveal(secret)), visible=True)


def build_allowance(desk: Desk) -> dict[str, Any]:
    """Fields of what a key or a group may use, by the names of their settings."""
    models = gr.Dropdown(label="Models", multiselect=True, info="none: all of them")
    live(desk, models, served_choices)
    with gr.Row():
        periods = [("never", ""), *((f"every {period}", period) for period in PERIODS)]
        return {
            "models": models,
            "rpm_limit": gr.Number(0, label="Requests per minute", precision=0, info="0: any"),
            "tpm_limit": gr.Number(0, label="Tokens per minute", precision=0, info="0: any"),
            "budget": gr.Number(0, label="Budget (million tokens)", info="0: none"),
            "period": gr.Dropdown(periods, value="", label="Whole again", info="the budget"),
        }


def build_key_fields(desk: Desk) -> dict[str, Any]:
    """Fields of a key, by the names of its settings."""
    with gr.Row():
        who = {
            "alias": gr.Textbox(label="For whom", placeholder="Ada Lovelace"),
            "email": gr.Textbox(label="E-mail"),
            "group": gr.Dropdown(label="Group", value=None, info="or none"),
        }
    more = build_allowance(desk)
    with gr.Row():
        return who | more | {
            "parallel": gr.Number(0, label="Requests at a time", precision=0, info="0: any"),
            "days": gr.Number(0, label="Valid for (days)", precision=0, info="0: for ever"),
            "note": gr.Textbox(label="Note"),
        }  # fmt: skip


def build_key_form(desk: Desk, chosen: gr.Dropdown, secret: gr.Textbox, said: gr.Markdown) -> Any:
    """Make a key, or change the chosen one; the field of its group."""
    keys = desk.manager.keys

    def settings_of(values: Sequence[Any]) -> Json:
        return key_fields(dict(zip(form, values, strict=True)), utc_now())

    def on_create(*values: Any) -> tuple[Any, ...]:
        with shown_to_operator():
            settings = parse_key_settings(settings_of(values))
            made = keys.create(settings)
            said = done_at(f"Made a key for {settings.alias}.")
            return _shown_once(desk, settings, made), said, ""

    def on_load(alias: str | None) -> list[Any]:
        with shown_to_operator():
            key = named_key(keys.all(), chosen_one(alias))
            return form_of_key(key.settings, utc_now(), tuple(form))

    def on_save(alias: str | None, *values: Any) -> str:
        with shown_to_operator():
            settings = keys.edit(chosen_one(alias), settings_of(values))
            return done_at(f"Saved the key of {settings.alias}.")

    with gr.Accordion("Create or change a key", open=True):
        form = build_key_fields(desk)
        with gr.Row(elem_classes="actions"):
            create = gr.Button("Create key", variant="primary", scale=0, min_width=150)
            load = gr.Button("Fill in from the chosen key", scale=0, min_width=270)
            save = gr.Button("Save to the chosen key", scale=0, min_width=220)
    inputs = [*form.values()]
    create.click(on_create, inputs, [secret, said, form["alias"]], **PRIVATE)
    load.click(on_load, chosen, inputs, **PRIVATE)
    save.click(on_save, [chosen, *inputs], said, **PRIVATE)
    return form["group"]


def act_on_group(keys: Keys, pending: tuple[GroupVerb, str, datetime | None]) -> str:
    """Do what was asked and confirmed; what was done, in a sentence."""
    verb, group, until = pending
    match verb:
        case "block":
            keys.block_group(group)
            return done_at(f"Blocked the group {group}.")
        case "extend":
            count = keys.extend_group(group, until)
            return done_at(f"{count} keys of {group} end: {format_day(until) or 'never'}.")
        case "revoke":
            return done_at(f"Revoked {keys.revoke_group(group)} keys of {group}.")
        case _:
            assert_never(verb)


def build_group_actions(desk: Desk, said: gr.Markdown) -> gr.Dropdown:
    """What is done to all keys of a group at once."""
    keys = desk.manager.keys

    def on_ask(verb: GroupVerb, name: str | None, days: float | None) -> tuple[Any, ...]:
        with shown_to_operator():
            group, now = chosen_one(name), utc_now()
            until = end_after(days, now) if verb == "extend" else None
            theirs = [k for k in keys.all() if k.settings.group == group and not k.replaced_by]
            question = group_question(verb, group, theirs, until, now)
            return gr.update(visible=True), question, (verb, group, until)

    def on_unblock(name: str | None) -> str:
        with shown_to_operator():
            keys.block_group(chosen_one(name), blocked=False)
            return done_at(f"Unblocked the group {name}.")

    with gr.Row(elem_classes="actions"):
        chosen = gr.Dropdown(label="Group", value=None, scale=2)
        block = gr.Button("Block all", scale=0, min_width=110)
        unblock = gr.Button("Unblock all", scale=0, min_width=120)
        days = gr.Number(30, label="Valid for (days)", precision=0, info="0: for ever")
        extend = gr.Button("Extend all", scale=0, min_width=120)
        revoke = gr.Button("Revoke all", variant="stop", scale=0, min_width=120)
    question, _ = build_question("Do it", partial(act_on_group, keys), said)
    asking: tuple[tuple[gr.Button, GroupVerb], ...] = (
        (block, "block"), (extend, "extend"), (revoke, "revoke"),
    )  # fmt: skip
    for button, verb in asking:
        button.click(partial(on_ask, verb), [chosen, days], question, **PRIVATE)
    unblock.click(on_unblock, chosen, said, **PRIVATE)
    return chosen


def build_group_form(desk: Desk, said: gr.Markdown) -> None:
    """A new group, or another allowance for one."""

    def on_save(name: str | None, *values: Any) -> str:
        with shown_to_operator():
            settings = allowance_fields(dict(zip(form, values, strict=True)))
            group = desk.manager.keys.set_group({"name": typed(name)} | settings)
            return done_at(f"Saved the group {group.name}.")

    name = gr.Textbox(label="New group, or the name of one", placeholder="Course ML 2027")
    form = build_allowance(desk)
    save = gr.Button("Save the group", variant="primary", scale=0, min_width=150)
    save.click(on_save, [name, *form.values()], said, **PRIVATE)


def build_offer(desk: Desk, secret: gr.Textbox, said: gr.Markdown) -> None:
    """The secrets of a list, for whoever takes them first."""

    def on_fetch() -> tuple[Any, str, str]:
        with shown_to_operator():
            job = offering_job(desk.watch.latest())
            text = reveal(desk.manager.fetch(job.id if job else ""))
            link = download_link("keys.csv", text)
            return gr.update(value=text, visible=True), link, done_at("Fetched the secrets.")

    with live(desk, gr.Group(visible=False, elem_classes="plan-card"), offer_group):
        live(desk, gr.Markdown(padding=True), offer_text)
        with gr.Row():
            fetch = gr.Button("Fetch the secrets", variant="primary", scale=0, min_width=190)
    link = gr.HTML()
    fetch.click(on_fetch, None, [secret, link, said], **PRIVATE)


def build_many_keys(desk: Desk, said: gr.Markdown) -> gr.Dropdown:
    """A key for each line of a list; the field of their group."""

    def on_make(text: str | None, *values: Any) -> str:
        with shown_to_operator():
            shared = key_fields(dict(zip(form, values, strict=True)), utc_now())
            desk.manager.keys.create_many(text or "", shared)
            return done_at("The keys are being made.")

    with gr.Accordion("Many at once", open=False):
        people = gr.Textbox(
            label="CSV", lines=5, placeholder="name,email,group\nAda Lovelace,ada@example.org,",
            info="its first line names the columns, of which only name is needed",
        )  # fmt: skip
        with gr.Row():
            group = gr.Dropdown(label="Group", value=None, info="of who has none in the list")
            days = gr.Number(180, label="Valid for (days)", precision=0, info="0: for ever")
        form = {"group": group, "days": days, **build_allowance(desk)}
        make = gr.Button("Create these keys", variant="primary", scale=0, min_width=170)
    make.click(on_make, [people, *form.values()], said, **PRIVATE)
    return group


def build_key_doctor(desk: Desk) -> None:
    """Why a key works or fails; what is pasted is kept nowhere."""

    def on_ask(text: str | None, model: str | None) -> str:
        with shown_to_operator():
            return plain_lines(diagnosis_text(desk.manager.keys.why(typed(text), typed(model))))

    with gr.Accordion("Why does a key not work?", open=False):
        with gr.Row(elem_classes="actions"):
            pasted = gr.Textbox(label="Key, or whose it is", type="password", scale=2)
            model = gr.Dropdown(label="Asked for", allow_custom_value=True, value=None)
            live(desk, model, served_choices)
            ask = gr.Button("Look", variant="primary", scale=0, min_width=110)
        found = gr.Markdown()
    ask.click(on_ask, [pasted, model], found, **PRIVATE)


def build_energy_tab(desk: Desk) -> None:
    """What GPUs take now, what any range took and whose it was, as files too, and its price."""
    with gr.Tab("Energy") as tab:
        live(desk, gr.HTML(), lambda seen: live_energy_html(seen, desk.manager.energy.now()))
        with gr.Row(elem_classes="actions"):
            by = gr.Dropdown(list(get_args(EnergyGrouping)), value="model", label="Added up by")
            first = gr.DateTime(include_time=False, type="string", label="From (UTC)")
            last = gr.DateTime(include_time=False, type="string", label="To, included")
            show = gr.Button("Show", variant="primary", scale=0, min_width=110)
        said = gr.Markdown()
        with gr.Row():
            stack = energy_plot(*STACK_COLUMNS)
            per_token = energy_plot(*PER_TOKEN_COLUMNS)
        rows = table(["Model", *ENERGY_HEADERS])
        with gr.Accordion("Sessions: each replica from ready to stopped", open=False):
            sessions = table(SESSION_HEADERS)
        with gr.Accordion("Files", open=False):
            style = gr.Radio(list(CSV_STYLES), value=next(iter(CSV_STYLES)), label="Written for")
            files = gr.HTML()
        build_energy_settings(desk)
    asked = [by, first, last]
    for event in (show.click, by.change, tab.select):
        event(_energy_shower(desk), asked, [said, stack, per_token, rows, sessions], **QUIET)
        event(on_energy_files, [*asked, style], files, **QUIET)
    style.change(on_energy_files, [*asked, style], files, **QUIET)


def energy_plot(x: str, color: str, y: str) -> Any:
    """Bars that are hidden until there is something to draw."""
    return gr.BarPlot(
        x=x, y=y, color=color, x_title=" ", x_label_angle=-35, height=280, visible=False
    )


def _energy_shower(desk: Desk) -> Callable[..., tuple[Any, ...]]:
    def on_show(by: str, first: str | None, last: str | None) -> tuple[Any, ...]:
        with shown_to_operator():
            energy = desk.manager.energy
            try:
                query = parse_energy_query(by, first or "", last or "", utc_now().date())
                report = energy.report(query)
                by_day = energy.parts(replace(query, by="day"))
                used = session_rows(energy.sessions(query.first, query.last))
                per_token = tokens_by_model(energy.report(replace(query, by="model")))
            except ManagerError as error:  # opening the tab must not shout
                hidden = gr.update(visible=False)
                return plain(str(error)), hidden, hidden, gr.update(value=[]), []
            return (
                energy_headline(report),
                drawn(STACK_COLUMNS, energy_stack(by_day)),
                drawn(PER_TOKEN_COLUMNS, per_token),
                gr.update(headers=energy_headers(query), value=energy_rows(report)),
                used,
            )

    return on_show


def drawn(columns: Sequence[str], bars: Sequence[Sequence[Any]]) -> Any:
    """An update of a plot; with another title or order Gradio (6.31) goes on drawing the old."""
    return gr.update(value=pd.DataFrame(bars, columns=list(columns)), visible=bool(bars))


def on_energy_files(by: str, first: str | None, last: str | None, style: str) -> str:
    with shown_to_operator():
        query = parse_energy_query(by, first or "", last or "", utc_now().date())
        return energy_files_html(query.first, query.last, style)


def build_energy_settings(desk: Desk) -> None:
    """How often GPUs are looked at, and what a kilowatt-hour is worth; kept with each record."""

    def on_save(period: float, price: float | None, co2: float | None, overhead: float) -> str:
        with shown_to_operator():
            given = {
                "period_seconds": period, "price_per_kwh": price, "co2_grams_per_kwh": co2,
                "overhead": overhead,
            }  # fmt: skip
            desk.manager.save(setting_energy(given))
            return done_at("Saved, for what is recorded from now on.")

    def stored(label: str, info: str, view: Callable[[EnergySettings], Any]) -> Any:
        field = gr.Number(label=label, info=info)
        return live(desk, field, lambda seen: seen.state and view(seen.state.energy))

    with gr.Accordion("Price, CO₂ and how often GPUs are looked at", open=False):
        with gr.Row():
            fields = [
                stored("A look every (s)", "0.1 to 60", lambda kept: kept.period_seconds),
                stored("Price of a kWh", "empty: unknown", lambda kept: kept.price_per_kwh),
                stored("CO₂ of a kWh (g)", "empty: unknown", lambda kept: kept.co2_grams_per_kwh),
                stored("Overhead (PUE)", "of the room, 1 is none", lambda kept: kept.overhead),
            ]
        save = gr.Button("Save")
        said = gr.Markdown()
    save.click(on_save, fields, said, **PRIVATE)


def build_system_tab(desk: Desk) -> None:
    """The plan, the server's health, the endpoint's settings, the way back."""
    with gr.Tab("System") as tab:
        gr.Markdown("### What is planned")
        live(desk, gr.Markdown(), pending_plan_text)
        apply_button = gr.Button("Apply the plan", variant="primary")
        live(desk, apply_button, plan_button)
        changes = {"apply": lambda _: applying(), "roll back": _returning(desk)}
        card = build_plan_card(desk, changes)
        wire_plan(desk, apply_button, gr.State("now"), card, "apply", changes["apply"])
        build_doctor_view(desk)
        build_endpoint_form(desk)
        changes["restore the database"] = desk.manager.database.restoring
        build_database_view(desk, card, changes["restore the database"])
        build_audit_view(desk, tab)
        build_token_view(desk)
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


def build_database_view(desk: Desk, card: PlanCard, restoring: Callable[[str], Change]) -> None:
    """Its size and its dumps; a new one, and the way back to one."""

    def on_dump(name: str) -> None:
        with shown_to_operator():
            desk.manager.database.dump(name.strip())

    with gr.Accordion("Database", open=False):
        live(desk, gr.Markdown(), database_text)
        live(desk, table(DUMP_HEADERS), lambda seen: dump_rows(seen.dumps))
        with gr.Row(elem_classes="actions"):
            name = gr.Textbox(label="Dump", placeholder="before-summer", scale=3,
                              info="a name for a new one, or the one to return to")  # fmt: skip
            take = gr.Button("Dump now", scale=0, min_width=120)
            back = gr.Button("Restore", variant="stop", scale=0, min_width=110)
    take.click(on_dump, name, None, **PRIVATE)
    wire_plan(desk, back, name, card, "restore the database", restoring)


def build_audit_view(desk: Desk, tab: gr.Tab) -> None:
    """The newest changes, and all of them as a file."""
    with gr.Accordion("Who changed what", open=False):
        rows = table(AUDIT_HEADERS)
        with gr.Row(elem_classes="actions"):
            gr.Button("Export all as CSV", link=AUDIT_CSV_PATH, size="sm", scale=0, min_width=200)
    tab.select(lambda: audit_rows(desk.manager.audit.newest(50)), None, rows, **QUIET)


AUDIT_CSV_PATH: Final = "/audit.csv"


def build_token_view(desk: Desk) -> None:
    """What opens the REST API to programs: made, told once, revoked."""

    def on_create(name: str | None) -> tuple[Any, str, str]:
        with shown_to_operator():
            token, secret = new_admin_token(typed(name))
            desk.manager.save(granting_token(token))
            shown = gr.update(value=reveal(secret), visible=True)
            return shown, done_at(f"Made a token for {token.name}."), ""

    def on_revoke(name: str | None) -> tuple[Any, ...]:
        with shown_to_operator():
            text = f"**Revoke the token of {plain(chosen_one(name))}?** It opens nothing from then."
            return gr.update(visible=True), text, name

    def revoke_it(name: str) -> str:
        desk.manager.save(revoking_token(name))
        return done_at(f"Revoked the token of {name}.")

    with gr.Accordion("Programs", open=False):
        gr.Markdown("An admin token opens to a program all that this console can do.")
        with gr.Row(elem_classes="actions"):
            name = gr.Textbox(label="New token for", placeholder="ci", info="the audit names it")
            create = gr.Button("Create token", variant="primary", scale=0, min_width=130)
            chosen = gr.Dropdown(label="Token", value=None, info="that is there")
            live(desk, chosen, token_choices)
            revoke = gr.Button("Revoke", variant="stop", scale=0, min_width=110)
            gr.Button("The API for programs", link=API_PAGE, size="sm", scale=0, min_width=200)
        secret = gr.Textbox(
            label="Hand this over now: it is shown only once", elem_id="new-token",
            interactive=False, buttons=["copy"], visible=False,
        )  # fmt: skip
        question, said = build_question("Revoke it", revoke_it)
    create.click(on_create, name, [secret, said, name], **PRIVATE)
    revoke.click(on_revoke, chosen, question, **PRIVATE)


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
        job = shown_job(desk.watch.latest())
        if job is not None:
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
.gradio-container table td, .gradio-container table th, .gradio-container [role="gridcell"] *
  { font-family: var(--font) !important; }
.plan-card { border: 2px solid var(--color-accent) !important; }
button.lg { align-self: flex-start; flex-grow: 0 !important; min-width: 130px; }
.actions { align-items: end; }
.actions button { max-height: 42px; }
.actions button.lg { align-self: flex-end; }
.actions button, button.lg { white-space: nowrap; }
.plan-card .row { padding: 12px; }
.plan-card pre { max-height: 32em; overflow: auto; white-space: pre-wrap; }
#job textarea, #new-key textarea, .log textarea { font-family: var(--font-mono); font-size: 12px; }
footer { display: none !important; }
.gpu-card { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 10px 14px;
  margin-bottom: 10px; background: var(--background-fill-primary); }
.card-head { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 4px 24px;
  margin-bottom: 8px; color: var(--body-text-color); }
.card-bar { position: relative; height: 56px; border-radius: 4px; overflow: hidden;
  background: repeating-linear-gradient(45deg, transparent 0 6px,
    var(--border-color-primary) 6px 7px); }
.card-bar .slice { position: absolute; top: 0; bottom: 0; box-sizing: border-box; padding: 6px 8px;
  overflow: hidden; white-space: nowrap; border: 2px solid var(--background-fill-primary);
  border-radius: 6px; font-size: 13px; line-height: 1.5; }
.card-bar .slice b, .card-bar .slice span { display: block; overflow: hidden;
  text-overflow: ellipsis; }
.card-bar .ready { background: #166534; color: #fff; } .card-bar .ready * { color: #fff; }
.card-bar .busy { background: #1d4ed8; } .card-bar .busy * { color: #fff; }
.card-bar .failed { background: #b91c1c; } .card-bar .failed * { color: #fff; }
.card-bar .empty { background: var(--background-fill-secondary);
  border-color: var(--border-color-primary); }
.card-bar .free { border: none; opacity: 0.75; }
.task-bar { height: 10px; border-radius: 5px; overflow: hidden; margin-bottom: 6px;
  background: var(--border-color-primary); }
.task-bar div { height: 100%; background: var(--color-accent); }
.card-foot { margin-top: 6px; font-size: 13px; color: var(--body-text-color-subdued); }
"""
# Fonts of the operator's own machine: the console must not ask the internet for any.
FONTS: Final = ("system-ui", "sans-serif")
MONOSPACE_FONTS: Final = ("ui-monospace", "monospace")


# Gradio never finishes a page of which a component's file did not arrive, as happens in Chromium
# whenever a network interface comes or goes: it says "Loading..." for good. Vite tells of it.
RELOAD: Final = """<script>
addEventListener("vite:preloadError", () => {
  const tried = Number(sessionStorage.getItem("reloads"));
  sessionStorage.setItem("reloads", tried + 1);
  if (tried < 5) setTimeout(() => location.reload(), 500 * tried);
}, {once: true});
setTimeout(() => sessionStorage.removeItem("reloads"), 30000);
</script>"""


def build_console(manager: Manager, watch: Watch) -> gr.Blocks:
    """The whole page."""
    app = gr.Blocks(title="LLM Manager", analytics_enabled=False, fill_width=True)
    with app:
        desk = Desk(manager, watch)
        gr.Markdown("# LLM Manager")
        live(desk, gr.Markdown(), summary_line)
        build_job_panel(desk)
        with gr.Tabs() as tabs:
            build_overview_tab(desk)
            form = build_models_tab(desk)
            build_library_tab(desk, tabs, form)
            build_hardware_tab(desk)
            build_routes_tab(desk)
            build_keys_tab(desk)
            build_energy_tab(desk)
            build_system_tab(desk)
        wire_live(desk, app)
    return app


def build_app(manager: Manager, watch: Watch) -> Guard:
    """The console behind its guard, ready for uvicorn."""
    state = manager.state()
    app = fastapi.FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    programs = build_api(manager, watch)
    guard = Guard(app, TokenGate(programs, manager), state.secrets.console_key, state.instance)

    @app.get(AUDIT_CSV_PATH)
    def export_audit() -> fastapi.Response:
        named = {"content-disposition": 'attachment; filename="audit.csv"'}
        text = audit_csv(manager.audit.entries())
        return fastapi.Response(text, media_type="text/csv", headers=named)

    @app.get(f"{ENERGY_FILES}/{{what}}.csv")
    def export_energy(
        what: EnergyTable, first: date, last: date, style: str = ""
    ) -> fastapi.Response:
        pieces = manager.energy.export(what, first, last, CSV_STYLES.get(style, CsvStyle()))
        try:
            begin = next(pieces, b"")  # here it is refused, if it is
        except ManagerError as error:
            return _plain(409, str(error))
        named = {"content-disposition": f'attachment; filename="{what}-{first}-{last}.csv"'}
        whole = itertools.chain((begin,), pieces)
        return fastapi.responses.StreamingResponse(whole, media_type="text/csv", headers=named)

    @app.get(API_PAGE)
    def show_api() -> fastapi.Response:
        return fastapi.responses.HTMLResponse(render_api_page(programs.openapi()))

    def operator(request: fastapi.Request) -> str | None:
        return "operator" if guard.admits(request.headers.get("cookie", "")) else None

    gr.mount_gradio_app(
        app,
        build_console(manager, watch),
        path="/",
        auth_dependency=operator,
        app_kwargs={"openapi_url": None, "docs_url": None, "redoc_url": None},
        css=STYLE + FIT_STYLE + ROUTE_STYLE + WATTS_STYLE,
        head=RELOAD,
        theme=gr.themes.Default(primary_hue="blue", font=FONTS, font_mono=MONOSPACE_FONTS),
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        show_error=False,
        ssr_mode=False,
    )
    return guard


# =============================================================================
# §39 Main — effects: arguments, wiring, systemd
# =============================================================================

DONE, FAILED, WRONG_USAGE, TO_DO = range(4)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; exit status as in the README."""
    if argv is None and sys.argv[1:] == [FETCH_WEIGHTS]:
        return command_fetch_weights()
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


def command_fetch_weights() -> int:
    """Not for operators: what a download runs in a process of its own."""
    error = fetch_weights()
    if error is None:
        return DONE
    out_json({"kind": error.kind, "detail": error.detail, "retry_seconds": error.retry_seconds})
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
    apply = add("apply", _changes(_applying), "do what is planned")
    restore = add("restore", command_restore, "bring everything back after a reboot")
    restore.add_argument("--plan", action="store_true", help="what a reboot would bring back")
    for sub in (apply, restore):
        sub.add_argument(
            "--despite-driver", action="store_true",
            help="make GPU containers although the driver waits for a reboot",
        )  # fmt: skip
    add("doctor", command_doctor, "check everything this needs from its server")
    for name, command, text in (
        ("probe", command_probe, "try every route from outside, with each kind of key"),
        ("privacy", command_privacy, "send marked requests, and look for them everywhere"),
    ):
        add(name, command, text).add_argument(
            "--last", action="store_true", help="show the last result only"
        )
    rollback = add(
        "rollback", _changes(lambda m, a: m.returning(a.number)), "return to an earlier state"
    )
    rollback.add_argument("number", type=int, nargs="?", help="from history/; default: the last")
    rollback.add_argument("--plan", action="store_true", help="show the plan only")
    add_model_commands(commands, add)
    add_weights_commands(commands, add)
    for add_group in (add_gpu_commands, add_key_commands, add_direct_commands):
        add_group(commands)
    add_usage_commands(commands, add)
    add_route_commands(commands, add)
    add_system_commands(commands, add)
    return parser


def _applying(_: Manager, arguments: argparse.Namespace) -> Change:
    return applying(despite_driver=arguments.despite_driver)


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
    logs.add_argument("--search", default="", help="only the lines that have this text")
    logs.add_argument("--previous", action="store_true", help="of the run or failed start before")
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
    fit = group.add_parser("fit", help="whether it fits its place, and where else it would")
    fit.set_defaults(command=command_model_fit)
    fit.add_argument("name")
    fit.add_argument("--at-once", type=positive, default=1, help="requests at a time")
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
    sub.add_argument("--recipe", help="whose image is built here; empty for none")
    sub.add_argument("--replicas", type=int)
    sub.add_argument(
        "--open-route", choices=YES_OR_NO, help="any key at /open/NAME, while those are open"
    )
    sub.add_argument("--gpu", action="append", metavar="GPU", help="index or UUID; repeatable")
    sub.add_argument("--gpus", type=int, metavar="N", help="so many free GPUs, the best joined")
    sub.add_argument("--mig", metavar="SLICE", help="3g.20gb, or GPU:3g.20gb:START")
    sub.add_argument("--memory-fraction", type=float, help="of each GPU, at most 1")
    sub.add_argument("--cpu-kv-cache", type=int, metavar="MIB", help="place it on the CPU")
    sub.add_argument("--json", action="store_true")


YES_OR_NO: Final = ("yes", "no")


def yes(choice: str | None) -> bool | None:
    return None if choice is None else choice == "yes"


def positive(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def add_weights_commands(commands: Any, add: Callable[..., Any]) -> None:
    """`search`, `inspect`, `pull`, `cache …`."""
    search = add("search", command_search, "find models on the Hugging Face hub")
    search.add_argument("text")
    search.add_argument("--type", choices=MODEL_TYPES)
    look = add(
        "inspect", command_inspect, "what a repository or directory holds, and where it fits"
    )
    pull = add("pull", command_pull, "download weights")
    for sub in (look, pull):
        sub.add_argument("repository", help="like Qwen/Qwen3-8B")
        sub.add_argument("--revision", help="branch, tag or commit")
        sub.add_argument("--type", choices=MODEL_TYPES, help="default: guessed")
    look.add_argument("--arguments", default="", help='for the engine: "--max-model-len 8192"')
    look.add_argument("--at-once", type=positive, default=1, help="requests at a time")
    cache = commands.add_parser("cache", help="the weights on this server").add_subparsers(
        required=True, metavar="COMMAND"
    )
    listing = cache.add_parser("list", help="what is stored, and which models use it")
    listing.set_defaults(command=command_cache_list)
    listing.add_argument("--json", action="store_true")
    remove = cache.add_parser("remove", help="delete weights that no model uses")
    remove.set_defaults(command=command_cache_remove)
    remove.add_argument("repository")
    remove.add_argument("--revision", help="default: all of them")
    remove.add_argument("--despite-use", action="store_true", help="models that use it fail then")
    prune = cache.add_parser("prune", help="delete all that no registered model uses")
    prune.set_defaults(command=command_cache_prune)
    for sub in (remove, prune):
        sub.add_argument("--plan", action="store_true", help="show what would go")


def add_gpu_commands(commands: Any) -> None:
    """`gpu …` and `mig …`."""
    group = commands.add_parser("gpu", help="the GPUs of this server").add_subparsers(
        required=True, metavar="COMMAND"
    )
    for verb, command in (("list", command_gpu_list), ("topology", command_gpu_topology)):
        sub = group.add_parser(verb)
        sub.set_defaults(command=command)
        sub.add_argument("--json", action="store_true")
    mig = commands.add_parser("mig", help="cut GPUs into slices").add_subparsers(
        required=True, metavar="COMMAND"
    )
    show = mig.add_parser("show", help="slices as they are and as they are wished")
    show.set_defaults(command=command_mig_show)
    show.add_argument("--json", action="store_true")
    choices = mig.add_parser("layouts", help="every way to cut a GPU")
    choices.set_defaults(command=command_mig_layouts)
    choices.add_argument("gpu", help="index or UUID")
    for verb, text in (("plan", "what a cut would do"), ("apply", "cut a GPU; all or nothing")):
        sub = mig.add_parser(verb, help=text)
        sub.set_defaults(command=_changes(lambda m, a: m.cutting(a.gpu, " ".join(a.wish))))
        sub.add_argument("gpu", help="index or UUID")
        sub.add_argument("wish", nargs="+", help="3g.20gb 2x1g.5gb | MODEL=GIB … | keep | off")
        sub.set_defaults(plan=verb == "plan")
    _add_layout_files(mig)


def _add_layout_files(mig: Any) -> None:
    forget = mig.add_parser("forget", help="leave a GPU as it is from now on")
    forget.set_defaults(
        command=_changes(lambda m, a: forgetting_layout(m.state(), m.hardware(), a.gpu))
    )
    forget.add_argument("gpu", help="index or UUID")
    taking = mig.add_parser("import", help="the layouts of a mig-parted file")
    taking.set_defaults(command=_changes(_importing))
    taking.add_argument("file", type=Path)
    taking.add_argument("--label", help="which of its configurations")
    taking.add_argument("--plan", action="store_true", help="show the plan only")
    export = mig.add_parser("export", help="the wished layouts in mig-parted's format")
    export.set_defaults(command=command_mig_export)
    export.add_argument("--label", default="llm-manager")


def _importing(manager: Manager, arguments: argparse.Namespace) -> Change:
    with file_errors(f"read {arguments.file}"):
        text = arguments.file.read_text(errors="replace")
    return importing_layouts(manager.state(), manager.hardware(), text, arguments.label)


def add_key_commands(commands: Any) -> None:
    """`key …` and `group …`."""
    verbs = commands.add_parser("key", help="virtual keys for colleagues").add_subparsers(
        required=True, metavar="COMMAND"
    )
    for verb, command in (("create", command_key_create), ("set", command_key_set)):
        sub = verbs.add_parser(verb)
        sub.set_defaults(command=command)
        sub.add_argument("name")
        _add_key_options(sub)
        sub.add_argument("--json", action="store_true")
    many = verbs.add_parser("import", help="a key per line of a CSV: name,email,group")
    many.set_defaults(command=command_key_import)
    many.add_argument("file", type=Path)
    _add_key_options(many)
    listing = verbs.add_parser("list")
    listing.set_defaults(command=command_key_list)
    listing.add_argument("--json", action="store_true")
    rotate = verbs.add_parser("rotate", help="another secret for the same key")
    rotate.set_defaults(command=command_key_rotate)
    rotate.add_argument("name")
    rotate.add_argument("--grace-hours", type=float, default=24.0, help="the old one works on")
    rotate.add_argument("--json", action="store_true")
    why = verbs.add_parser("why", help="why a key works or fails")
    why.set_defaults(command=command_key_why)
    why.add_argument("name", nargs="?", help="whose it is; else its secret is asked for")
    why.add_argument("--model", default="")
    _add_blocking(verbs, command_key_verb)
    _add_group_commands(commands)


def _add_blocking(verbs: Any, command: Callable[[argparse.Namespace], int]) -> None:
    for verb, done in (("block", "Blocked"), ("unblock", "Unblocked"), ("revoke", "Revoked")):
        sub = verbs.add_parser(verb)
        sub.set_defaults(command=command, verb=verb, done=done)
        sub.add_argument("name")


def _add_key_options(parser: Any) -> None:
    parser.add_argument("--email")
    parser.add_argument("--group", help="its name; '' for none")
    parser.add_argument("--note")
    parser.add_argument("--days", type=int, help="valid for; 0: for ever")
    _add_allowance_options(parser)
    parser.add_argument("--parallel", type=int, help="requests at a time; 0: any number")


def _add_allowance_options(parser: Any) -> None:
    parser.add_argument(
        "--model", dest="models", action="append", help="a public name; repeat; '' for all"
    )
    parser.add_argument("--rpm", dest="rpm_limit", type=int, help="requests a minute; 0: any")
    parser.add_argument("--tpm", dest="tpm_limit", type=int, help="tokens a minute; 0: any")
    parser.add_argument("--budget", type=float, metavar="MILLION", help="tokens; 0: no budget")
    parser.add_argument("--period", choices=[*PERIODS, ""], help="after which it is whole again")


def _add_group_commands(commands: Any) -> None:
    verbs = commands.add_parser("group", help="keys that share limits").add_subparsers(
        required=True, metavar="COMMAND"
    )
    change = verbs.add_parser("set", help="make one, or change it")
    change.set_defaults(command=command_group_set)
    change.add_argument("name")
    change.add_argument("--note")
    _add_allowance_options(change)
    listing = verbs.add_parser("list")
    listing.set_defaults(command=command_group_list)
    listing.add_argument("--json", action="store_true")
    extend = verbs.add_parser("extend", help="another end for all its keys")
    extend.set_defaults(command=command_group_extend)
    extend.add_argument("name")
    extend.add_argument("--days", type=int, required=True, help="from now; 0: for ever")
    _add_blocking(verbs, command_group_verb)


def add_token_commands(commands: Any) -> None:
    """`token …`."""
    group = commands.add_parser("token", help="admin tokens, for programs that use the API")
    verbs = group.add_subparsers(required=True, metavar="COMMAND")
    for verb, command in (
        ("create", command_token_create),
        ("list", command_token_list),
        ("revoke", command_token_revoke),
    ):
        sub = verbs.add_parser(verb)
        sub.set_defaults(command=command)
        if verb != "list":
            sub.add_argument("name", help="the program's; the audit shows it")
        if verb != "revoke":
            sub.add_argument("--json", action="store_true")


def add_usage_commands(commands: Any, add: Callable[..., Any]) -> None:
    """`usage`, `statement`, `price …`."""
    usage = add("usage", command_usage, "requests and tokens, out of LiteLLM's database")
    usage.add_argument("--by", choices=get_args(Grouping), default="key")
    usage.add_argument("--from", dest="first", metavar="DAY", default="", help="such as 2026-11-21")
    usage.add_argument("--to", dest="last", metavar="DAY", default="", help="included; else today")
    other = usage.add_mutually_exclusive_group()
    other.add_argument("--attention", action="store_true", help="close to a limit, or unused")
    other.add_argument("--engines", action="store_true", help="beside what the engines counted")
    other.add_argument("--csv", action="store_true", help="every row, for other programs")
    statement = add("statement", command_statement, "a month's use by groups, at your prices")
    statement.add_argument(
        "--month", default="", metavar="MONTH", help="2026-10; default: the last"
    )
    statement.add_argument("--group", default="", help="this one only")
    shown = statement.add_mutually_exclusive_group()
    shown.add_argument("--csv", action="store_true", help="every line, for other programs")
    shown.add_argument("--html", action="store_true", help="a page to print")
    price = commands.add_parser("price", help="of a million tokens, on statements alone")
    verbs = price.add_subparsers(required=True, metavar="COMMAND")
    named = verbs.add_parser("set")
    named.set_defaults(command=command_price_set)
    named.add_argument("model", help="as in `usage --by model`, or * for all others")
    named.add_argument("--prompt", type=float, required=True)
    named.add_argument("--completion", type=float, required=True)
    named.add_argument("--currency", help="of all prices: three letters")
    removed = verbs.add_parser("remove")
    removed.set_defaults(command=command_price_remove)
    removed.add_argument("model")
    listed = verbs.add_parser("list")
    listed.set_defaults(command=command_price_list)
    listed.add_argument("--json", action="store_true")


def add_direct_commands(commands: Any) -> None:
    """`direct …`."""
    group = commands.add_parser("direct", help="keys past the gateway, straight to engines")
    verbs = group.add_subparsers(required=True, metavar="COMMAND")
    create = verbs.add_parser("create", help="a new key, or another one in its namesake's place")
    create.set_defaults(command=command_direct_create)
    create.add_argument("name")
    create.add_argument("--model", action="append", default=[], help="repeat; none: all of them")
    create.add_argument(
        "--emergency", action="store_true", help="opens /v1 too, and needs no PostgreSQL"
    )
    listing = verbs.add_parser("list")
    listing.set_defaults(command=command_direct_list)
    for sub in (create, listing):
        sub.add_argument("--json", action="store_true")
    _add_named_change(verbs.add_parser("revoke"), revoking_direct)


def _add_looks(add: Callable[..., Any]) -> None:
    add("routes", command_routes, "every way in, who answers there, and how it is with them")
    trial = add("try", command_try, "send one smallest request, and show where its time went")
    trial.add_argument("target", help="a public name, or /models/NAME, or /open/NAME")
    trial.add_argument("--prompt", default="", help="what it asks; nothing of it is kept")


def add_route_commands(commands: Any, add: Callable[..., Any]) -> None:
    """`routes`, `try`, `provider …` and `route …`."""
    _add_looks(add)
    group = commands.add_parser("provider", help="servers of models elsewhere").add_subparsers(
        required=True, metavar="COMMAND"
    )
    # Not even a key that is given by mistake, as `--key sk-…`, may pass for a file's name.
    provider = group.add_parser("add", help="a new one, or a known one anew", allow_abbrev=False)
    provider.set_defaults(command=command_provider_add)
    provider.add_argument("name")
    provider.add_argument("--kind", required=True, choices=PROVIDER_KINDS)
    provider.add_argument("--url", help=f"like http://10.0.0.7:11434; this server: {HOST_NAME}")
    provider.add_argument("--vendor", help="LiteLLM's name of a cloud; default: the name")
    key = provider.add_mutually_exclusive_group()
    key.add_argument("--ask-key", action="store_true", help="from the keyboard or standard input")
    key.add_argument("--key-file", type=Path, help="an empty one forgets the key")
    listing = group.add_parser("list", help="the providers, asked for their health")
    listing.set_defaults(command=command_provider_list)
    models = group.add_parser("models", help="what it has, as routes name it")
    models.set_defaults(command=command_provider_models)
    models.add_argument("name")
    for sub in (listing, models):
        sub.add_argument("--json", action="store_true")
    _add_named_change(group.add_parser("remove"), unproviding)
    routes = commands.add_parser("route", help="public names, and who answers").add_subparsers(
        required=True, metavar="COMMAND"
    )
    change = routes.add_parser("set", help="make or change a route; what is not named stays")
    change.set_defaults(command=command_route_set)
    change.add_argument("name", help="a new public name, a model's own, or a pattern like lab/*")
    _add_route_options(change)
    every = routes.add_parser("list", help="every public name, and who answers for it")
    every.set_defaults(command=command_route_list)
    every.add_argument("--json", action="store_true")
    _add_named_change(routes.add_parser("remove"), unrouting)


def _add_route_options(sub: argparse.ArgumentParser) -> None:
    for option, field_name, text in (
        ("--member", "members", "a model's name, or PROVIDER/MODEL"),
        ("--alias", "aliases", "another name for the same"),
        ("--fallback", "fallbacks", "tried where all members fail"),
        ("--context-fallback", "context_fallbacks", "where a prompt is too long"),
    ):
        sub.add_argument(
            option, dest=field_name, action="append", metavar="NAME",
            help=f"{text}; repeatable, '' for none",
        )  # fmt: skip
    sub.add_argument(
        "--weight", dest="weights", action="append", type=positive, metavar="N",
        help="of each member, in their order; sets the strategy",
    )  # fmt: skip
    sub.add_argument("--strategy", choices=STRATEGIES)
    for option, field_name, metavar, text in (
        ("--timeout", "timeout_seconds", "SECONDS", "for a whole answer"),
        ("--retries", "retries", "N", "before the fallbacks"),
        ("--failures", "failures_allowed", "N", "of one member, before it rests"),
        ("--cooldown", "cooldown_seconds", "SECONDS", "that it rests"),
    ):
        sub.add_argument(option, dest=field_name, type=int, metavar=metavar, help=text)
    for option, field_name, metavar, text in (
        ("--parallel", "parallel", "N", "requests at a time for each replica, or off"),
        ("--cache", "cache_seconds", "SECONDS", "that answers are kept, or off"),
    ):
        sub.add_argument(option, dest=field_name, type=number_or_off, metavar=metavar, help=text)


OFF: Final = 0


def number_or_off(text: str) -> int:
    return OFF if text == "off" else positive(text)


def add_database_commands(commands: Any) -> None:
    """`database …`."""
    group = commands.add_parser("database", help="keys and usage on the disk").add_subparsers(
        required=True, metavar="COMMAND"
    )
    show = group.add_parser("show", help="its size, and how long requests are kept")
    show.set_defaults(command=command_database_show)
    listing = group.add_parser("list", help="its dumps, newest first")
    listing.set_defaults(command=command_database_list)
    for sub in (show, listing):
        sub.add_argument("--json", action="store_true")
    dump = group.add_parser("dump", help="a new dump, read back whole before it counts")
    dump.set_defaults(command=command_database_dump)
    dump.add_argument("file", nargs="?", default="", help="a name of your own; it never makes way")
    back = group.add_parser("restore", help="return to a dump; all or nothing")
    back.set_defaults(command=_changes(lambda m, a: m.database.restoring(a.file)))
    back.add_argument("file", help="from `database list`, or an absolute path")
    back.add_argument("--plan", action="store_true", help="show the plan only")
    keep = group.add_parser("set", help="what is kept, and for how long")
    keep.set_defaults(command=command_database_set)
    keep.add_argument(
        "--retention", type=number_or_off, metavar="DAYS", help="of single requests, or off"
    )
    keep.add_argument("--dumps", type=positive, metavar="N", help="automatic ones that are kept")


def add_system_commands(commands: Any, add: Callable[..., Any]) -> None:
    """`config …`, `database …`, `image …`, `install`."""
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
    edge.add_argument("--open-routes", choices=YES_OR_NO, help="no closes all of them at once")
    edge.add_argument("--max-request-mib", type=positive, metavar="MIB", help="larger ones: 413")
    token = config.add_parser("token", help="the Hugging Face token, from standard input")
    token.set_defaults(command=command_config_token)
    add_database_commands(commands)
    add_image_commands(commands)
    add_token_commands(commands)
    audit = add("audit", command_audit, "who changed what when, by console, command line or API")
    audit.add_argument("--csv", action="store_true", help="print it as CSV")
    audit.add_argument("--since", metavar="DATE", help="like 2026-03-31, in UTC")
    install = add("install", command_install, "install and start the systemd service")
    install.add_argument("--root", type=Path, default=Path("/"), help="for packagers")
    install.add_argument("--no-start", action="store_true")


def add_image_commands(commands: Any) -> None:
    """`image …`."""
    image = commands.add_parser("image", help="the images, pulled and built").add_subparsers(
        required=True, metavar="COMMAND"
    )

    def add(verb: str, command: Callable[[argparse.Namespace], int], text: str) -> Any:
        sub = image.add_parser(verb, help=text, description=text)
        sub.set_defaults(command=command)
        return sub

    listing = add("list", command_image_list, "what is pinned, and what of it is here")
    listing.add_argument("--json", action="store_true")
    build = add("build", command_image_build, "build and pin the image of a recipe")
    build.add_argument("recipe")
    build.add_argument("--cpu", action="store_true", help="its image for the processor")
    roles = [f.name for f in fields(Images)]
    change = add("set", command_image_set, "pin another image")
    change.add_argument("role", choices=roles)
    change.add_argument("image")
    pull = add("pull", command_image_pull, "pull now; without a role, all that is needed")
    pull.add_argument("role", choices=roles, nargs="?")
    pin = add("pin", command_image_pin, "pin exactly what is here, by its digest")
    pin.add_argument("role", choices=roles)
    prune = add("prune", command_image_prune, "remove what was built here and nothing needs")
    for sub in (pin, prune):
        sub.add_argument("--plan", action="store_true", help="show the plan only")


def operating_system_user() -> Actor:
    """Whoever logged in, also behind `sudo`; only root is believed that it was called by that."""
    user = os.getuid()
    behind = os.environ.get("SUDO_USER") if user == 0 else None
    try:
        name = behind or pwd.getpwuid(user).pw_name
    except KeyError:  # a container may run as anybody
        name = f"uid {user}"
    return Actor(name=name, channel="command line")


def open_manager(actor: Actor | None = None) -> Manager:
    """The installation of this environment, wired up for whoever runs this program."""
    store = StateStore(find_home(), actor or operating_system_user())
    state = store.ensure(fixed_names=store.home == SYSTEM_HOME)
    cache = Path(state.hugging_face_home or store.home / "huggingface")
    # A named one may be a disk that is not mounted yet, and must not come to be on another.
    if state.hugging_face_home is None or cache.is_dir():
        with file_errors("make the weights' directory"):
            (cache / "hub").mkdir(parents=True, exist_ok=True)
    docker_url = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
    recipes = PROGRAM.parent / "recipes"
    system = GpuSystem()
    gpus = NvmlGpus(parse_geometries((recipes / "mig.yaml").read_text()), system)
    containers = DockerContainers(docker_url, state.instance)
    failures = parse_failures((recipes / "failures.yaml").read_text())
    images = DockerImages(docker_url, state.instance, build_arguments(os.environ))
    weights = HuggingFace(HubCache(cache), lambda: store.load().secrets.hugging_face_token)
    database = PostgresPrograms(containers.contents, store.home / "backups")
    tools = Tools(
        containers, HttpProbes(), store, SystemClock(), gpus, weights, images, database, failures
    )
    return Manager(
        store,
        tools,
        Site(
            generated=str(store.generated),
            hugging_face_home=str(cache),
            compile_caches=str(store.home / "compiled"),
        ),
        engine_options=parse_engine_options((recipes / "vllm.yaml").read_text()),
        recipes=lambda: parse_recipes(read_recipes(recipes, store.home / "recipes")),
        enabled=system.enabled,
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


def follow(job: Job, *, quiet: bool = False) -> int:
    """Print a job's lines; Ctrl-C cancels it, and waits until it is undone."""
    shown = 0
    say = (lambda _: None) if quiet else out
    while True:
        try:
            for line in itertools.islice(job.follow(), shown, None):
                shown += 1
                say(line)
        except KeyboardInterrupt:
            job.cancel()
            _say("Cancelling; what was begun is being undone ...")
        else:
            say(f"Done in {format_duration((utc_now() - job.started_at).total_seconds())}.")
            return DONE


def command_serve(arguments: argparse.Namespace) -> int:
    """Restore, then serve the console until told to stop."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    logging.getLogger("llm_manager").setLevel(logging.INFO)
    manager = open_manager(Actor(name="console", channel="console"))
    listener = listen(arguments.port)
    state = manager.state()
    if state.wishes_anything:
        try:
            with manager.audit.acting_as(ITSELF):
                manager.start(restoring())
        except BusyError as error:
            _say(str(error))
    app = build_app(manager, Watch(manager))
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3)
    if sys.stdout.isatty():  # the journal must not hold the token
        out(f"LLM Manager: {console_url(state, arguments.port)}")
    else:
        out(f"LLM Manager listens on {CONSOLE_HOST}:{arguments.port}; `url` prints its address.")
    # uvicorn ends by raising again what ended it; there is something to do after that.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listener])
    # A job may wait an hour for an engine; systemd must not. The next plan heals it, but no plan
    # knows of keys whose secrets nobody was told.
    manager.break_off(MAKING_KEYS, BREAK_OFF_SECONDS)
    logging.shutdown()
    os._exit(DONE)


BREAK_OFF_SECONDS: Final = 20.0  # less than systemd waits


def listen(port: int) -> socket.socket:
    """The console's socket, on loopback only; taken is said before anything else starts."""
    # Only on a socket that is called TCP does asyncio send at once; else an answer waits 40 ms.
    listener = socket.socket(proto=socket.IPPROTO_TCP)
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


def command_routes(arguments: argparse.Namespace) -> int:
    """The picture of the ways in, as a table."""
    manager = open_manager()
    snapshot = manager.snapshot()
    if snapshot.observed is not None:
        snapshot = replace(snapshot, health=manager.traffic.look(snapshot.observed))
    if arguments.json:
        out_json(keyed(ROUTE_HEADERS, route_rows(snapshot)))
        return FAILED if snapshot.faults else DONE
    for way in ways_in(snapshot):
        out(f"{way.address}: {way.clients}; {way.verdict}")
    out_table(ROUTE_HEADERS, route_rows(snapshot))
    return FAILED if snapshot.faults else DONE


def command_try(arguments: argparse.Namespace) -> int:
    trial = open_manager().traffic.try_out(arguments.target, arguments.prompt)
    if arguments.json:
        out_json(keyed(HOP_HEADERS, hop_rows(trial)))
    else:
        out_table(HOP_HEADERS, hop_rows(trial))
    return DONE if trial.reply.is_success else FAILED


def command_plan(arguments: argparse.Namespace) -> int:
    plan = open_manager().plan(applying())
    if arguments.json:
        out_json([asdict(stage) for stage in plan_facts("", plan).stages])
    else:
        out(str(plan) or "Nothing to do.")
        if plan.diff():
            out(plan.diff())
    return TO_DO if plan else DONE


def command_restore(arguments: argparse.Namespace) -> int:
    """Bring everything back, or say what would come back."""
    manager = open_manager()
    if not arguments.plan:
        return follow(manager.start(restoring(despite_driver=arguments.despite_driver)))
    state, observed = manager.state(), manager.observe()
    out_table(REBOOT_HEADERS, reboot_rows(state, observed))
    enabled = manager.boot_units()
    out(reboot_text(state, observed, enabled))
    return TO_DO if reboot_warnings(state, observed, enabled) else DONE


def command_search(arguments: argparse.Namespace) -> int:
    hits = open_manager().weights.search(arguments.text, arguments.type)
    if arguments.json:
        out_json([asdict(hit) for hit in hits])
    else:
        out_table(HIT_HEADERS, hit_rows(hits))
        out("" if hits else "Nothing has that in its name.")
    return DONE


def command_inspect(arguments: argparse.Namespace) -> int:
    """The facts, then whether it would fit the place that it would get, and where else."""
    manager = open_manager()
    source = named_source(arguments.repository, arguments.revision)
    facts = manager.weights.look(source)
    if arguments.json:
        out_json(asdict(facts))
        return DONE
    out_table(("", ""), facts_rows(facts))
    kind = arguments.type or guess_type(facts) or "chat"
    given = {"name": "draft", "type": kind, "source": asdict(source)}
    words = split_arguments(arguments.arguments)
    model = manager.sketch(given | {"engine_arguments": words})
    out_fit(manager, model, arguments.at_once)
    return DONE


def out_fit(manager: Manager, model: Model, at_once: int) -> None:
    """The sum for where a model is placed, then every place where it would fit."""
    fit = manager.weights.fit(model, at_once)
    if fit is None:
        raise RefusedError(
            f"The weights of {model.name} are not on this server, so nothing is known of them.",
            advice=f"Look at the hub: `inspect {format_source(model.source).partition('@')[0]}`.",
        )
    for line in fit_lines(fit):
        out(line)
    out_table(PLACE_HEADERS, place_rows(manager.weights.places(model, at_once)))


def command_model_fit(arguments: argparse.Namespace) -> int:
    manager = open_manager()
    out_fit(manager, manager.state().model(arguments.name), arguments.at_once)
    return DONE


def command_pull(arguments: argparse.Namespace) -> int:
    source = named_source(arguments.repository, arguments.revision)
    if isinstance(source, LocalSource):
        raise RefusedError("A directory of this server needs no download.", advice="Register it.")
    return follow(open_manager().weights.download(source, arguments.type))


def command_cache_list(arguments: argparse.Namespace) -> int:
    manager = open_manager()
    cache = manager.weights.cache()
    rows = cache_rows(cache, manager.state())
    if arguments.json:
        out_json(keyed(CACHE_HEADERS, rows))
    else:
        out(cache_summary(cache))
        out_table(CACHE_HEADERS, rows)
    return DONE


def command_cache_remove(arguments: argparse.Namespace) -> int:
    weights = open_manager().weights
    use = arguments.despite_use
    removal = weights.removal(arguments.repository, arguments.revision, despite_use=use)
    return _remove([removal], weights, plan=arguments.plan)


def command_cache_prune(arguments: argparse.Namespace) -> int:
    weights = open_manager().weights
    return _remove(weights.orphans(), weights, plan=arguments.plan)


def _remove(removals: Sequence[Removal], weights: WeightsLibrary, *, plan: bool) -> int:
    for removal in removals:
        out(removal_text(removal))
        if not plan:
            weights.remove(removal)
    out("" if removals else "Nothing to do.")
    return TO_DO if plan and removals else DONE


def command_gpu_list(arguments: argparse.Namespace) -> int:
    manager = open_manager()
    state, hardware = manager.state(), manager.hardware()
    if arguments.json:
        out_json(hardware_facts(state, hardware))
    else:
        out(driver_text(hardware).replace("**", ""))
        out_table(GPU_HEADERS, gpu_rows(state, hardware))
    return FAILED if hardware.fault or hardware.lost else DONE


def command_gpu_topology(arguments: argparse.Namespace) -> int:
    manager = open_manager()
    hardware = manager.hardware()
    if arguments.json:
        out_json(hardware_facts(manager.state(), hardware)["links"])
    else:
        out_table(topology_headers(hardware), topology_rows(hardware))
    return DONE


def command_mig_show(arguments: argparse.Namespace) -> int:
    manager = open_manager()
    state, hardware = manager.state(), manager.hardware()
    rows = slice_rows(state, hardware)
    if arguments.json:
        out_json(keyed(SLICE_HEADERS, rows))
        return DONE
    for gpu in hardware.gpus:
        out(f"{gpu.title} ({gpu.name or UNKNOWN}): MIG {mig_text(gpu)}")
    if not hardware.gpus:
        out(driver_text(hardware))
    out_table(SLICE_HEADERS, rows)
    return DONE


def command_mig_layouts(arguments: argparse.Namespace) -> int:
    gpu = open_manager().hardware().named(arguments.gpu)
    for line in layout_choices(gpu):
        out(line)
    return DONE


def command_mig_export(arguments: argparse.Namespace) -> int:
    manager = open_manager()
    state, hardware = manager.state(), manager.hardware()
    wished = {gpu.index: wish.slices for gpu in hardware.gpus
              if (wish := state.layout_of(gpu.uuid))}  # fmt: skip
    if not wished:
        raise RefusedError("No layout is wished.", advice="Cut a GPU first: `mig plan`.")
    out(render_mig_parted(wished, arguments.label))
    return DONE


def command_doctor(arguments: argparse.Namespace) -> int:
    checks = open_manager().doctor()
    if arguments.json:
        out_json([asdict(check) for check in checks])
    else:
        out_table(("Check", "Verdict", "Found", "Advice"), check_rows(checks))
    return DONE if all(check.ok for check in checks) else TO_DO


def command_audit(arguments: argparse.Namespace) -> int:
    since = parse_day(arguments.since) if arguments.since else None
    entries = open_manager().audit.entries(since)
    if arguments.csv:
        out(audit_csv(entries).rstrip())
    elif arguments.json:
        out_json([asdict(entry) for entry in entries])
    else:
        out_table(AUDIT_HEADERS, audit_rows(entries))
    return DONE


def command_probe(arguments: argparse.Namespace) -> int:
    proofs = open_manager().proofs
    if not arguments.last:
        follow(proofs.probe(), quiet=arguments.json)
    result = proofs.last_probe()
    if arguments.json:
        out_json(None if result is None else {"green": result.green, **asdict(result)})
    else:
        out_table(PROBE_HEADERS, probe_rows(result) if result else [])
        out(probe_headline(result))
    return DONE if result is not None and result.green else TO_DO


def command_privacy(arguments: argparse.Namespace) -> int:
    proofs = open_manager().proofs
    if not arguments.last:
        follow(proofs.privacy(), quiet=arguments.json)
    proof = proofs.last_privacy()
    if arguments.json:
        out_json(None if proof is None else {"green": proof.green, **asdict(proof)})
    else:
        out_table(PRIVACY_HEADERS, privacy_rows(proof) if proof else [])
        out(privacy_text(proof) if proof else "")
        out(privacy_headline(proof))
    return DONE if proof is not None and proof.green else TO_DO


def command_logs(arguments: argparse.Namespace) -> int:
    manager = open_manager()
    if not arguments.follow:
        tail = WHOLE_LOG if arguments.search else 2000
        said = manager.logs.of(
            arguments.name, search=arguments.search, tail=tail, previous=arguments.previous
        )
        out(said)
        return DONE
    with contextlib.suppress(KeyboardInterrupt):
        for line in manager.logs.follow(arguments.name):
            if arguments.search.casefold() in line.casefold():
                out(line)
    return DONE


def command_model_add(arguments: argparse.Namespace) -> int:
    manager = open_manager()
    given = model_options(arguments) | placement_option(manager, arguments)
    model = manager.register(given | {"name": arguments.name})
    where = format_placement(model.placement, manager.hardware())
    out(f"Registered {model.name} on {where}. Next: llm_manager.py deploy {model.name}")
    if isinstance(model.source, HubSource) and model.source.revision is None:
        out("The hub could not be asked for a commit: the model follows the branch `main`.")
    return DONE


def command_model_set(arguments: argparse.Namespace) -> int:
    manager = open_manager()
    given = model_options(arguments) | placement_option(manager, arguments)
    model = manager.revise(arguments.name, given)
    out(f"Saved {model.name}. Next: llm_manager.py plan")
    return DONE


def model_options(arguments: argparse.Namespace) -> Json:
    """What was given on the command line, in the shape of a stored model; without its place."""
    given: Json = {
        "type": arguments.type,
        "served_model_name": arguments.served_as,
        "engine_arguments": None
        if arguments.arguments is None
        else split_arguments(arguments.arguments),
        "image": arguments.image,
        "recipe": arguments.recipe,
        "replicas": arguments.replicas,
        "open_route": yes(arguments.open_route),
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
    named = {key: value for key, value in given.items() if value is not None}
    return named | ({"recipe": None} if arguments.recipe == "" else {})


def placement_option(manager: Manager, arguments: argparse.Namespace) -> Json:
    """Where the model goes, in the one way that was given; says why where it chose."""
    given = [
        option
        for option, value in (
            ("--gpu", arguments.gpu), ("--gpus", arguments.gpus), ("--mig", arguments.mig),
            ("--cpu-kv-cache", arguments.cpu_kv_cache),
        )
        if value
    ]  # fmt: skip
    if len(given) > 1:
        raise RefusedError(
            f"{' and '.join(given)} place one model twice.", advice="Give one of them."
        )
    if arguments.cpu_kv_cache:
        return {"placement": {"kind": "cpu", "kv_cache_mib": arguments.cpu_kv_cache}}
    if arguments.mig:
        return {"placement": asdict(find_slice(manager.state(), manager.hardware(), arguments.mig))}
    uuids = [manager.hardware().named(text).uuid for text in arguments.gpu or ()]
    if arguments.gpus:
        taken = {uuid for model in manager.state().models for uuid in gpus_of(model)}
        choice = choose_gpus(manager.hardware(), arguments.gpus, taken)
        out(f"Chosen: {choice.reason}.")
        uuids = list(choice.gpu_uuids)
    if not uuids:
        return {}
    fraction = arguments.memory_fraction
    return {"placement": {"kind": "gpu", "gpu_uuids": uuids, "memory_fraction": fraction}}


def command_model_list(arguments: argparse.Namespace) -> int:
    snapshot = open_manager().snapshot()
    if arguments.json:
        out_json(status_facts(snapshot)["models"])
    else:
        out_table(MODEL_HEADERS, model_rows(snapshot))
    return DONE


def command_model_show(arguments: argparse.Namespace) -> int:
    manager = open_manager()
    model = manager.state().model(arguments.name)
    out_json(asdict(model) | {"command": ["vllm", *engine_command(model)]})
    return DONE


def _given_settings(arguments: argparse.Namespace) -> Json:
    """What was named of a key or a group; 0 and '' take it away."""
    names = ("email", "group", "note", *WHOLE_LIMITS, "budget", "period", "models", "days")
    given = {n: v for n in names if (v := getattr(arguments, n, None)) is not None}
    settings: Json = {n: v if n in TEXTS else v or None for n, v in given.items()}
    if "models" in given:
        settings["models"] = tuple(name for name in given["models"] if name)
    if "days" in settings:
        settings["expires_at"] = end_after(settings.pop("days"), utc_now())
    return settings


TEXTS: Final = ("email", "group", "note")


def command_key_create(arguments: argparse.Namespace) -> int:
    settings = parse_key_settings({"alias": arguments.name} | _given_settings(arguments))
    manager = open_manager()
    return _hand_over(arguments, manager.state(), settings, manager.keys.create(settings))


def command_key_rotate(arguments: argparse.Namespace) -> int:
    manager = open_manager()
    grace = parse_grace(arguments.grace_hours)
    return _hand_over(arguments, manager.state(), *manager.keys.rotate(arguments.name, grace))


def _hand_over(
    arguments: argparse.Namespace, state: State, settings: KeySettings, secret: pydantic.SecretStr
) -> int:
    if arguments.json:
        out_json({"name": settings.alias, "key": reveal(secret)})
    else:
        out(hand_out(state, settings, reveal(secret)))
    return DONE


def command_key_set(arguments: argparse.Namespace) -> int:
    settings = open_manager().keys.edit(arguments.name, _given_settings(arguments))
    if arguments.json:
        out_json(asdict(settings))
    else:
        out(f"Saved {settings.alias}.")
    return DONE


def command_key_import(arguments: argparse.Namespace) -> int:
    with file_errors(f"read {arguments.file}"):
        text = arguments.file.read_text(errors="replace")
    manager = open_manager()
    job = manager.keys.create_many(text, _given_settings(arguments))
    follow(job, quiet=True)
    out(reveal(manager.fetch(job.id)).rstrip())
    return DONE


def command_key_list(arguments: argparse.Namespace) -> int:
    keys = open_manager().keys.all()
    if arguments.json:
        out_json([key_facts(key, utc_now()) for key in keys])
    else:
        out_table(KEY_HEADERS, key_rows(keys, utc_now()))
    return DONE


def command_key_why(arguments: argparse.Namespace) -> int:
    text = arguments.name or secret_line("Key: ")
    diagnosis = open_manager().keys.why(text, arguments.model)
    out(diagnosis_text(diagnosis))
    return TO_DO if diagnosis.faults else DONE


def command_key_verb(arguments: argparse.Namespace) -> int:
    keys = open_manager().keys
    if arguments.verb == "revoke":
        keys.revoke(arguments.name)
    else:
        keys.block(arguments.name, blocked=arguments.verb == "block")
    out(f"{arguments.done} {arguments.name}.")
    return DONE


def command_group_set(arguments: argparse.Namespace) -> int:
    group = open_manager().keys.set_group({"name": arguments.name} | _given_settings(arguments))
    out(f"Saved {group.name}.")
    return DONE


def command_group_list(arguments: argparse.Namespace) -> int:
    keys = open_manager().keys
    groups = keys.groups()
    if arguments.json:
        out_json([asdict(group) for group in groups])
    else:
        out_table(GROUP_HEADERS, group_rows(groups, keys.all(), utc_now()))
    return DONE


def command_group_extend(arguments: argparse.Namespace) -> int:
    until = end_after(arguments.days, utc_now())
    count = open_manager().keys.extend_group(arguments.name, until)
    out(f"{count} keys of {arguments.name} end now: {format_day(until) or 'never'}.")
    return DONE


def command_group_verb(arguments: argparse.Namespace) -> int:
    keys, count = open_manager().keys, ""
    if arguments.verb == "revoke":
        count = f" and its {keys.revoke_group(arguments.name)} keys"
    else:
        keys.block_group(arguments.name, blocked=arguments.verb == "block")
    out(f"{arguments.done} {arguments.name}{count}.")
    return DONE


def command_usage(arguments: argparse.Namespace) -> int:
    query = parse_usage_query(arguments.by, arguments.first, arguments.last, utc_now().date())
    usage = open_manager().usage
    headers: Sequence[str]
    if arguments.attention:
        headers, rows = STANDING_HEADERS, standing_rows(usage.standings(), utc_now())
        facts, said = keyed(headers, rows), "" if rows else "Nothing needs attention."
    elif arguments.engines:
        headers, rows = TALLY_HEADERS, tally_rows(usage.tallies())
        facts, said = keyed(headers, rows), TALLY_TEXT if rows else "No engine counts tokens now."
    else:
        report = usage.report(query)
        headers = usage_headers(query)
        rows = [[format_figure(cell) for cell in row] for row in usage_rows(report)]
        facts, said = [asdict(row) for row in (*report.rows, report.total)], usage_headline(report)
        if arguments.csv:
            out(usage_csv(report).removesuffix("\n"))
            return DONE
    if arguments.json:
        out_json(facts)
    else:
        out_table(headers, rows)
        out(said)
    return DONE


def command_statement(arguments: argparse.Namespace) -> int:
    month = parse_month(arguments.month, utc_now().date())
    statement = open_manager().usage.statement(month, arguments.group)
    if arguments.csv:
        out(statement_csv(statement).removesuffix("\n"))
    elif arguments.html:
        out(statement_page(statement).removesuffix("\n"))
    elif arguments.json:
        out_json(asdict(statement))
    else:
        out_table(STATEMENT_HEADERS, statement_rows(statement))
        out("" if statement.lines else f"Nothing was used in {month:%Y-%m}.")
    return DONE


def command_price_set(arguments: argparse.Namespace) -> int:
    raw = {name: getattr(arguments, name) for name in ("model", "prompt", "completion")}
    open_manager().save(pricing(raw, arguments.currency))
    return DONE


def command_price_remove(arguments: argparse.Namespace) -> int:
    open_manager().save(unpricing(arguments.model))
    return DONE


def command_price_list(arguments: argparse.Namespace) -> int:
    prices = open_manager().state().prices
    if arguments.json:
        out_json(asdict(prices))
    else:
        out_table(
            ("Model", f"Prompt, {prices.currency} for a million tokens", "Completion"),
            [
                [price.model, f"{price.prompt:g}", f"{price.completion:g}"]
                for price in prices.models
            ],
        )
    return DONE


def command_direct_create(arguments: argparse.Namespace) -> int:
    manager = open_manager()
    key = new_direct_key(arguments.name, arguments.model, emergency=arguments.emergency)
    job = manager.start(granting_direct(key))
    # Shown first: it is saved, and where loading it fails now, the next `apply` will.
    if not arguments.json:
        out(hand_out_direct(manager.state(), key))
        return follow(job)
    urls = direct_urls(manager.state(), key)
    out_json({"name": key.name, "key": key.secret.get_secret_value(), "base_urls": urls})
    deque(job.follow(), maxlen=0)
    return DONE


def command_direct_list(arguments: argparse.Namespace) -> int:
    rows = direct_rows(open_manager().state())
    if arguments.json:
        out_json(keyed(DIRECT_HEADERS, rows))
    else:
        out_table(DIRECT_HEADERS, rows)
    return DONE


def command_token_create(arguments: argparse.Namespace) -> int:
    token, secret = new_admin_token(arguments.name)
    open_manager().save(granting_token(token))
    if arguments.json:
        out_json({"name": token.name, "token": secret.get_secret_value()})
    else:
        out(f"{secret.get_secret_value()}\nIt is shown only once. The API's page: {API}/docs")
    return DONE


def command_token_list(arguments: argparse.Namespace) -> int:
    names = [token.name for token in open_manager().state().admin_tokens]
    if arguments.json:
        out_json([{"name": name} for name in names])
    else:
        out_table(("Name",), [[name] for name in names])
    return DONE


def command_token_revoke(arguments: argparse.Namespace) -> int:
    open_manager().save(revoking_token(arguments.name))
    out(f"Revoked {arguments.name}.")
    return DONE


def command_provider_add(arguments: argparse.Namespace) -> int:
    given: Json = {
        "name": arguments.name,
        "kind": arguments.kind,
        "base_url": arguments.url,
        "vendor": arguments.vendor,
    }
    if arguments.ask_key or arguments.key_file:
        given["api_key"] = typed_key(arguments.key_file) or None
    manager = open_manager()
    manager.save(providing(given))
    out(f"Saved. Next: llm_manager.py route set NAME --member {arguments.name}/MODEL")
    return DONE


def typed_key(file: Path | None) -> str:
    """Never an argument: those are visible to every user of the server."""
    if file is None:
        return secret_line("Key: ")
    with file_errors(f"read {file}"):
        return file.read_text(errors="replace").strip()


def command_provider_list(arguments: argparse.Namespace) -> int:
    manager = open_manager()
    known, found = manager.state().providers, manager.providers.all()
    if arguments.json:
        shown = {
            p.name: {"kind": p.kind, "base_url": p.base_url, "vendor": p.vendor} for p in known
        }
        out_json([shown[health.provider] | asdict(health) for health in found])
    else:
        out_table(PROVIDER_HEADERS, provider_rows(known, found))
    return FAILED if any(health.verdict == "fails" for health in found) else DONE


def command_provider_models(arguments: argparse.Namespace) -> int:
    health = open_manager().providers.look(arguments.name)
    if health.verdict != "answers":
        raise ProviderError(health.fault, advice=health.advice)
    if arguments.json:
        out_json(asdict(health))
        return DONE
    for model in health.models:
        out(f"{arguments.name}/{model}")
    if health.unusable:
        out(f"{health.unusable} more have names that no route can use.")
    return DONE


def command_route_set(arguments: argparse.Namespace) -> int:
    manager = open_manager()
    known = next((r for r in manager.state().routes if r.name == arguments.name), None)
    raw = (asdict(known) if known else {}) | route_options(arguments) | {"name": arguments.name}
    manager.save(routing(raw))
    out("Saved. Next: llm_manager.py plan")
    return DONE


def route_options(arguments: argparse.Namespace) -> Json:
    """What was given of a route, in the shape of a stored one."""
    names = {f.name for f in fields(Route)} - {"name"}
    given = {k: v for k, v in vars(arguments).items() if k in names and v is not None}
    for name, value in given.items():
        if isinstance(value, list):
            given[name] = tuple(entry for entry in value if entry)
        elif name in {"parallel", "cache_seconds"} and value == OFF:
            given[name] = None
    if "weights" in given:
        return {"strategy": "weighted"} | given
    unweighted = given.get("strategy", "weighted") != "weighted"
    return given | ({"weights": ()} if unweighted else {})


def command_route_list(arguments: argparse.Namespace) -> int:
    manager = open_manager()
    state, served = manager.state(), None
    with contextlib.suppress(DockerAbsentError):
        served = serving(state, manager.observe())
    if arguments.json:
        out_json(pool_facts(state, served))
    else:
        out_table(POOL_HEADERS, pool_rows(state, served))
    return DONE


def command_database_show(arguments: argparse.Namespace) -> int:
    manager = open_manager()
    size = manager.database.size()
    if arguments.json:
        out_json(asdict(size) | asdict(manager.state().housekeeping))
    else:
        out(database_text(replace(manager.snapshot(), database=size)))
    return DONE


def command_database_list(arguments: argparse.Namespace) -> int:
    dumps = open_manager().database.dumps()
    if arguments.json:
        out_json([asdict(dump) | {"automatic": dump.automatic} for dump in dumps])
    else:
        out_table(DUMP_HEADERS, dump_rows(dumps))
    return DONE


def command_database_dump(arguments: argparse.Namespace) -> int:
    return follow(open_manager().database.dump(arguments.file))


def command_database_set(arguments: argparse.Namespace) -> int:
    given = {"retention_days": arguments.retention, "dumps_kept": arguments.dumps}
    changes = {key: value or None for key, value in given.items() if value is not None}
    open_manager().save(keeping_house(changes))
    out("Saved. Next: llm_manager.py plan")
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
        "open_routes": yes(arguments.open_routes),
        "max_request_mib": arguments.max_request_mib,
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
    token = secret_line("Hugging Face token: ")
    open_manager().save(setting_hub_token(token))
    out("Saved." if token else "Removed the token: nothing was typed.")
    return DONE


def secret_line(question: str) -> str:
    """What is typed without being shown, or the first line of standard input."""
    return (getpass(question) if sys.stdin.isatty() else sys.stdin.readline()).strip()


def command_image_list(arguments: argparse.Namespace) -> int:
    rows = open_manager().images.rows()
    if arguments.json:
        out_json(keyed(IMAGE_HEADERS, rows))
    else:
        out_table(IMAGE_HEADERS, rows)
    return DONE


def command_image_build(arguments: argparse.Namespace) -> int:
    device: Device = "cpu" if arguments.cpu else "gpu"
    done = follow(open_manager().images.build_recipe(arguments.recipe, device))
    out("Pinned. Models that use it are replaced by the next `apply`; see `plan`.")
    return done


def command_image_pull(arguments: argparse.Namespace) -> int:
    return follow(open_manager().images.pull(arguments.role))


def command_image_pin(arguments: argparse.Namespace) -> int:
    manager = open_manager()
    change = manager.images.pinning_digest(arguments.role)
    plan = manager.plan(change)
    out(str(plan) or "Nothing to do but to write the digest down.")
    if arguments.plan:
        return TO_DO if plan else DONE
    manager.save(change)
    out("Saved. Next: llm_manager.py apply")
    return DONE


def command_image_prune(arguments: argparse.Namespace) -> int:
    images = open_manager().images
    if not arguments.plan:
        return follow(images.prune())
    rows = images.unused_rows()
    out_table(UNUSED_HEADERS, rows)
    out("" if rows else "Nothing to do.")
    return TO_DO if rows else DONE


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
