"""Weights from a hub to a colleague's answer: found, judged, fetched, served without it, removed.

The hub is a real server on this machine, the program its command line, the engine a real one.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import FakeHub, Repository, a_safetensors, wait_for
from installation import CHEAP, ENGINE, PROGRAM, Install, Installation

import llm_manager as lm

pytestmark = pytest.mark.docker
ANSWER = "Hello from a tiny model."
NAME = "acme/tiny-chat"
WEIGHTS = "model.safetensors"
TOKEN = "hf_a-token-that-nobody-may-see"  # noqa: S105 - of this file's own hub
FACTS = {
    "downloads": 12_345, "pipeline_tag": "text-generation", "cardData": {"license": "mit"},
    "lastModified": "2026-05-01T10:00:00.000Z",
}  # fmt: skip


@contextlib.contextmanager
def a_hub(here: Installation, weights: Path) -> Iterator[FakeHub]:
    """A hub that this installation asks; it keeps the tiny chat model, and a file of no use."""
    files = {path.name: path.read_bytes() for path in weights.iterdir()}
    with FakeHub() as hub:
        here.variables["HF_ENDPOINT"] = hub.url
        hub.add(NAME, {**files, "README.md": "# Tiny"}, **FACTS)
        yield hub


@pytest.fixture(scope="module")
def here(install_for_module: Install) -> Installation:
    return install_for_module()


@pytest.fixture(scope="module")
def weights(tiny_models: Path) -> Path:
    return tiny_models / "tiny-chat"


@pytest.fixture
def hub(here: Installation, weights: Path) -> Iterator[FakeHub]:
    with a_hub(here, weights) as hub:
        yield hub


def stored(here: Installation) -> list[dict[str, str]]:
    found: list[dict[str, str]] = json.loads(here.cli("cache", "list", "--json"))
    return found


def checksums(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir()}


def snapshot(here: Installation, commit: str) -> Path:
    return here.home / "huggingface/hub/models--acme--tiny-chat/snapshots" / commit


def main_of(repository: Repository) -> str:
    """The 40 digits of the commit that its branch `main` means now."""
    return str(repository.refs["main"])


# --- before an engine ------------------------------------------------------------


def test_a_repository_is_found_and_judged_before_it_is_fetched(
    here: Installation, hub: FakeHub, weights: Path
) -> None:
    row = here.cli("search", "tiny").splitlines()[1]
    assert row.split() == [NAME, "chat", "12.3", "K", "unknown", "unknown", "2026-05-01", "open"]
    assert "Nothing has that in its name." in here.cli("search", "gigantic")
    said = here.cli("inspect", NAME)
    size = lm.format_size(sum(path.stat().st_size for path in weights.iterdir()))
    for title, text in {
        "Commit": main_of(hub.repositories[NAME]), "Type": "chat", "Licence": "mit",
        "Architecture": "LlamaForCausalLM", "Longest context": "4,096 tokens",
        "Download": f"{size}: 5 of its files", "Access": "open",
    }.items():  # fmt: skip
        assert re.search(rf"^{title} +{re.escape(text)}$", said, re.MULTILINE), title
    of_weights = lm.format_size((weights / WEIGHTS).stat().st_size)
    assert re.search(rf"^weights +{of_weights} +known$", said, re.MULTILINE), "the fit"
    assert "Longest request that fits: 4,096 tokens." in said
    assert stored(here) == [], "a look fetches nothing"


REFUSALS = {
    "acme/gated": (
        "acme/gated is gated, and this server may not read it. "
        "Open {url}/acme/gated, accept its terms, and set a token with `config token`.\n"
    ),
    "acme/absent": (
        "acme/absent is not on {host}, or is private. "
        "Check its spelling; for a private one set a token that may read it with `config token`.\n"
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_may_not_be_fetched_is_refused_in_plain_words(
    here: Installation, hub: FakeHub, name: str
) -> None:
    hub.add("acme/gated", {WEIGHTS: a_safetensors()}).troubles.gated = True
    ended = here.run("pull", name)
    assert ended.returncode == lm.FAILED
    host = hub.url.removeprefix("http://")
    assert ended.stderr == REFUSALS[name].format(url=hub.url, host=host)
    assert stored(here) == []


def test_a_download_that_broke_off_goes_on_and_what_arrives_is_what_was_sent(
    here: Installation, hub: FakeHub, weights: Path
) -> None:
    repository = hub.repositories[NAME]
    whole = snapshot(here, main_of(repository))
    an_operator_interrupts(here, repository, whole, files=len(checksums(weights)) - 1)
    (row,) = stored(here)
    assert row["state"].startswith(f"lacks {WEIGHTS}")
    asked = hub.count(r"GET .*/tokenizer\.json")
    repository.troubles.break_after = 300_000  # bytes, then the connection is cut, once
    with here.step("a broken-off download goes on"):
        last = here.cli("pull", NAME).splitlines()[-2:]
    assert last[0] == f"{NAME}@{main_of(repository)} is on this server."
    assert last[1].startswith("Done in ")
    assert repository.troubles.break_times == 0, "it was cut"
    assert hub.count(r"GET .*/tokenizer\.json") == asked, "what was whole is not fetched again"
    assert checksums(whole) == checksums(weights), "and nothing more than that"
    (row,) = stored(here)
    assert (row["state"], row["used_by"]) == ("whole", "no model")
    what_nobody_uses_is_pruned(here, main_of(repository))


def an_operator_interrupts(
    here: Installation, repository: Repository, whole: Path, files: int
) -> None:
    """Ctrl-C, once so many files of a slow download are whole."""
    repository.troubles.bytes_per_second = 50_000
    with here.popen("pull", NAME) as pulling:
        wait_for(lambda: whole.exists() and len(list(whole.iterdir())) == files, seconds=60)
        pulling.send_signal(signal.SIGINT)
        _, complained = pulling.communicate(timeout=60)
    assert pulling.returncode == lm.FAILED
    assert complained.endswith("It was cancelled. Start it again when you like.\n")
    assert "Traceback" not in complained
    repository.troubles.bytes_per_second = None


def what_nobody_uses_is_pruned(here: Installation, commit: str) -> None:
    assert f"revision {commit[:8]}" in here.cli("cache", "prune", "--plan", status=lm.TO_DO)
    assert stored(here), "a plan removes nothing"
    here.cli("cache", "prune")
    assert stored(here) == []
    assert not list((here.home / "huggingface/hub").glob("models--*"))


# --- with an engine --------------------------------------------------------------


def test_a_model_from_the_hub_is_served_without_it_until_its_weights_are_removed(
    here: Installation, weights: Path
) -> None:
    an_image_that_would_ask_a_hub(here)
    with a_hub(here, weights) as hub:
        repository = hub.repositories[NAME]
        commit = main_of(repository)
        a_token_is_needed_and_set(here, repository)
        registered_at_its_commit(here, commit)
        newer = repository.commit({**repository.commits[commit], "README.md": "# Tiny, again"})
        downloaded_and_deployed(here, commit)
        assert not snapshot(here, newer).exists(), "the branch moved on; the model did not"
        key = here.create_key("Ada")
        it_answers(here, key)
        the_engine_cannot_ask_a_hub(here)
        here.cli("pull", NAME)
    first = compiled(here)
    assert first, "a start leaves what the next one need not do"
    took(here, "first start, on an empty compile cache")
    with here.step("restart without a hub"):
        here.cli("restart", "tiny")
    it_answers(here, key)
    took(here, "second start, on what the first left")
    assert compiled(here) == first, "vLLM writes a model's properties anew unless it uses them"
    weights_that_are_used_stay(here, commit, newer)
    here.cli("model", "remove", "tiny")
    assert f"revision {commit[:8]}" in here.cli("cache", "prune", "--plan", status=lm.TO_DO)
    here.cli("cache", "remove", NAME)
    assert stored(here) == []
    assert "Nothing to do." in here.cli("cache", "prune", "--plan")


def an_image_that_would_ask_a_hub(here: Installation) -> None:
    """The engine image as the official one is: not offline, and nothing found out before."""
    instance = here.state().instance
    registry = "/opt/venv/lib/python3*/site-packages/vllm/model_executor/models/registry.py"
    kept = 's#Path("/opt/modelinfos")#Path(envs.VLLM_CACHE_ROOT) / "modelinfos"#'
    dockerfile = f"FROM {ENGINE}\nENV HF_HUB_OFFLINE=0\nRUN sed -i '{kept}' {registry}\n"
    image, _ = here.client.images.build(
        fileobj=io.BytesIO(dockerfile.encode()),
        tag=f"llm-manager-online-{instance}:latest",
        labels={lm.LABEL_IMAGE_INSTANCE: instance},  # so that it goes with the installation
        network_mode="none",
        rm=True,
    )
    here.cli("image", "set", "vllm_cpu", image.tags[0])


def a_token_is_needed_and_set(here: Installation, repository: Repository) -> None:
    repository.troubles.token = TOKEN
    refused = here.run("inspect", NAME)
    assert (refused.returncode, "or is private" in refused.stderr) == (lm.FAILED, True)
    typed = subprocess.run(
        [sys.executable, str(PROGRAM), "config", "token"],
        env=here.environment, input=f"{TOKEN}\n", capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert TOKEN not in typed.stdout + typed.stderr


def registered_at_its_commit(here: Installation, commit: str) -> None:
    place = ["--cpu-kv-cache", "64", "--arguments", f"{CHEAP} --max-model-len 512"]
    here.cli("model", "add", "tiny", "--repository", NAME, *place)
    source = json.loads(here.cli("model", "show", "tiny"))["source"]
    assert source == {"kind": "hub", "repository": NAME, "revision": commit}


def downloaded_and_deployed(here: Installation, commit: str) -> None:
    assert stored(here) == []
    plan = here.cli("deploy", "tiny", "--plan", status=lm.TO_DO)
    assert f"download {NAME}@{commit[:12]}: not on this server" in plan
    assert not compiled(here)
    with here.step("download and deploy a model"):
        said = here.cli("deploy", "tiny")
    assert "is ready after" in said
    assert here.cli("plan") == "Nothing to do.\n"


def it_answers(here: Installation, key: str) -> None:
    reply = here.openai(key).chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hello?"}], temperature=0, max_tokens=20
    )
    assert reply.choices[0].message.content == ANSWER


def the_engine_cannot_ask_a_hub(here: Installation) -> None:
    """It needs none, gets no token for one, and cannot change what it was given."""
    engine = here.container("llm-model-tiny-0")
    environment = dict(line.split("=", 1) for line in engine.attrs["Config"]["Env"])
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert not {"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT"} & environment.keys()
    assert TOKEN not in json.dumps(engine.attrs)
    assert not [name for name, text in here.logs().items() if TOKEN in text]
    (cache,) = (m for m in engine.attrs["Mounts"] if m["Destination"] == lm.CACHE_MOUNT)
    assert (cache["Source"], cache["RW"]) == (str(here.home / "huggingface/hub"), False)


def compiled(here: Installation) -> dict[str, tuple[int, int]]:
    """What engines of the pinned image keep for later starts: each file, and its last writing."""
    site = lm.Site(generated="", hugging_face_home="", compile_caches=str(here.home / "compiled"))
    folder = Path(lm.compile_cache(here.state().images.vllm_cpu, site).source)
    found = [(path, path.stat()) for path in folder.rglob("*") if path.is_file()]
    return {str(path): (seen.st_ino, seen.st_mtime_ns) for path, seen in found}


def took(here: Installation, title: str) -> None:
    """List the engine's start time, as the program noted it, among the steps."""
    starts = json.loads((here.home / "starts.json").read_text())
    (name,) = (name for name in starts if name.endswith("llm-model-tiny-0"))
    here.timings.append((title, starts[name]))


def weights_that_are_used_stay(here: Installation, commit: str, newer: str) -> None:
    used_by = {row["revision"]: row["used_by"] for row in stored(here)}
    assert used_by == {commit[:8]: "tiny", f"main, {newer[:8]}": "no model"}
    plan = here.cli("cache", "prune", "--plan", status=lm.TO_DO)
    assert newer[:8] in plan
    assert commit[:8] not in plan, "it is in use"
    refused = here.run("cache", "remove", NAME)
    assert refused.returncode == lm.FAILED
    assert refused.stderr.startswith(f"{NAME} is used by tiny. Remove the model first")
    assert checksums(snapshot(here, commit)), "nothing went"
