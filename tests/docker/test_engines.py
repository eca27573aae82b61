"""Every kind of model answers through the edge; one that cannot start harms no other."""

from __future__ import annotations

import base64
import io
import json
import math
import shutil
import struct
import time
import wave
import zlib
from pathlib import Path

import httpx
import pytest
from installation import CHEAP, Install, Installation, free_ports

import llm_manager as lm

pytestmark = pytest.mark.docker
# name: type; each is one of the tiny models
KINDS = {
    "embed": "embedding", "rerank": "rerank", "vision": "vision", "whisper": "speech-to-text",
    "speech": "text-to-speech", "image": "image",
}  # fmt: skip
MORE = {
    "vision": "--max-model-len 512",
    # Its encoder takes 1,500 tokens at once, and few requests make the batch smaller than that.
    "whisper": "--max-num-seqs 2 --max-num-batched-tokens 2048",
    "speech": "--diffusion-load-format diffusers",
    "image": "--diffusion-load-format diffusers",
}


@pytest.fixture(scope="module")
def served(install_for_module: Install, tiny_models: Path) -> Installation:
    """An installation that serves one model of every kind but chat, brought up by two `apply`."""
    here = install_for_module()
    manager = here.manager()
    for several in (("embed", "rerank", "vision"), ("whisper", "speech", "image")):
        for name in several:
            here.add(name, tiny_models / f"tiny-{name}", KINDS[name], more=MORE.get(name, ""))
            manager.save(lm.deploying(name))
        with here.step(f"{', '.join(several)} in one apply"):
            here.cli("apply")
    assert here.cli("plan") == "Nothing to do.\n"
    return here


@pytest.fixture(scope="module")
def colleague(served: Installation) -> httpx.Client:
    return served.http(served.create_key("Ada"))


def white_png(side: int) -> str:
    """The smallest picture that a vision model takes, as a data URL."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    rows = zlib.compress((b"\0" + b"\xff" * 3 * side) * side)
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + parts).decode()


def test_an_embedding_model_answers_through_the_edge(colleague: httpx.Client) -> None:
    answer = colleague.post("/v1/embeddings", json={"model": "embed", "input": ["a", "b"]})
    assert answer.status_code == 200, answer.text
    vectors = [entry["embedding"] for entry in answer.json()["data"]]
    assert len(vectors) == 2
    assert all(isinstance(number, float) for number in vectors[0])


def test_a_rerank_model_answers_through_the_edge(colleague: httpx.Client) -> None:
    body = {"model": "rerank", "query": "a cat", "documents": ["a dog", "a cat", "a tree"]}
    answer = colleague.post("/v1/rerank", json=body)
    assert answer.status_code == 200, answer.text
    results = answer.json()["results"]
    assert {result["index"] for result in results} == {0, 1, 2}
    assert all(0 <= result["relevance_score"] <= 1 for result in results)


def test_a_vision_model_answers_about_a_picture_through_the_edge(colleague: httpx.Client) -> None:
    content = [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": white_png(56)}},
    ]
    body = {"model": "vision", "messages": [{"role": "user", "content": content}], "max_tokens": 9}
    answer = colleague.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"]


def a_tone(seconds: float) -> bytes:
    """A WAV file that somebody might send to be transcribed."""
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(16_000)
        samples = (
            8000 * math.sin(2 * math.pi * 440 * n / 16_000) for n in range(int(16_000 * seconds))
        )
        sound.writeframes(b"".join(struct.pack("<h", int(sample)) for sample in samples))
    return file.getvalue()


def test_a_speech_to_text_model_transcribes_through_the_edge(colleague: httpx.Client) -> None:
    answer = colleague.post(
        "/v1/audio/transcriptions",
        data={"model": "whisper"},
        files={"file": ("tone.wav", a_tone(1), "audio/wav")},
    )
    assert answer.status_code == 200, answer.text
    assert answer.json()["text"].strip() == "This is a tiny transcript."


def test_a_text_to_speech_model_speaks_through_the_edge(colleague: httpx.Client) -> None:
    body = {"model": "speech", "input": "Hello.", "voice": "default", "response_format": "wav"}
    answer = colleague.post("/v1/audio/speech", json=body)
    assert answer.status_code == 200, answer.text
    with wave.open(io.BytesIO(answer.content)) as sound:
        assert sound.getnframes() > 0


def test_an_image_model_draws_through_the_edge(colleague: httpx.Client) -> None:
    body = {"model": "image", "prompt": "a cat", "size": "64x64", "n": 1}
    answer = colleague.post("/v1/images/generations", json=body)
    assert answer.status_code == 200, answer.text
    (picture,) = answer.json()["data"]
    assert base64.b64decode(picture["b64_json"]).startswith(b"\x89PNG")


# --- engines that cannot start -------------------------------------------------


def refused(here: Installation, name: str) -> str:
    """`deploy` fails with one sentence; its container is gone, and all else runs on."""
    before = {n: c.id for n, c in here.containers().items() if c.status == "running"}
    ended = here.run("deploy", name)
    assert ended.returncode == lm.FAILED
    assert "Traceback" not in ended.stderr
    assert {n: c.id for n, c in here.containers().items()} == before
    return ended.stderr


def test_weights_that_are_missing_are_named_by_the_engines_own_words(
    served: Installation, colleague: httpx.Client, tiny_models: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "without-weights"
    shutil.copytree(
        tiny_models / "tiny-chat", empty, ignore=shutil.ignore_patterns("*.safetensors")
    )
    served.add("hollow", empty)
    with served.step("an engine without weights"):
        said = refused(served, "hollow")
    assert "there are no weights where the model should be. Download it again" in said
    assert "Cannot find any model weights" in served.cli("logs", "hollow"), "its log is kept"
    test_an_embedding_model_answers_through_the_edge(colleague)
    served.cli("model", "remove", "hollow")


def test_an_argument_that_the_engine_refuses_is_named(
    served: Installation, tiny_models: Path
) -> None:
    served.add("picky", tiny_models / "tiny-chat", more="--no-such-option 3")
    with served.step("an engine with an unknown argument"):
        said = refused(served, "picky")
    assert "this engine does not know the argument --no-such-option" in said
    served.cli("model", "set", "picky", "--arguments", f"{CHEAP} --dtype float7")
    with served.step("an engine with a bad value"):
        said = refused(served, "picky")
    assert "the argument --dtype has an invalid choice: 'float7'" in said
    served.cli("model", "remove", "picky")


def forget_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def tear_weights(folder: Path) -> None:
    (weights,) = folder.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1000])


def name_a_strange_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["FooForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))


BROKEN = {
    "bare": (forget_config, "", "there is no config.json where the model should be"),
    "torn": (tear_weights, "", "a file of the weights is incomplete"),
    "strange": (
        name_a_strange_architecture, "", "this engine does not know the architecture 'FooFor",
    ),
    "long": (lambda _: None, "--max-model-len 900000", "900000 tokens are asked for"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_model_that_cannot_start_says_why_in_plain_words(
    served: Installation, tiny_models: Path, tmp_path: Path, name: str
) -> None:
    spoil, arguments, fact = BROKEN[name]
    weights = tmp_path / name
    shutil.copytree(tiny_models / "tiny-chat", weights)
    spoil(weights)
    served.add(name, weights, more=arguments)
    with served.step(f"an engine with a {name} model"):
        assert fact in refused(served, name)
    served.cli("model", "remove", name)


def test_a_model_that_dies_in_service_comes_back_while_the_console_runs(
    served: Installation, colleague: httpx.Client
) -> None:
    def answers() -> bool:
        body = {"model": "embed", "input": "a"}
        return colleague.post("/v1/embeddings", json=body).status_code == 200

    (port,) = free_ports(1)
    with served.popen("serve", "--port", str(port)) as console:
        assert console.stdout is not None
        console.stdout.readline()
        with served.step("a model dies, and comes back by itself"):
            served.container("llm-model-embed-0").kill()
            give_up = time.monotonic() + 240
            while not answers():
                assert time.monotonic() < give_up
                time.sleep(0.5)
        console.terminate()
    # It restored when it began, and may have been ended while an old gateway drained.
    served.cli("apply")
    assert served.cli("plan") == "Nothing to do.\n"


def test_a_directory_that_is_not_there_is_named(served: Installation, tmp_path: Path) -> None:
    served.add("nowhere", tmp_path / "absent")
    assert "a path it mounts is not there" in refused(served, "nowhere")
    served.cli("model", "remove", "nowhere")
