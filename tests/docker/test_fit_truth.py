"""The KV cache as a real engine cuts it is the KV cache as it was foretold."""

from __future__ import annotations

import json
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest
from installation import ENGINE

import llm_manager as lm

pytestmark = pytest.mark.docker
# Two full layers and twelve sliding ones: seven groups of two that share one pool of blocks.
MIXED = {
    "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "num_hidden_layers": 14,
    "sliding_window": 512, "sliding_window_pattern": 6, "query_pre_attn_scalar": 32,
    "rope_local_base_freq": 10000.0, "hidden_activation": "gelu_pytorch_tanh",
}  # fmt: skip
ARGUMENTS = ["--max-model-len", "4K", "--max-num-batched-tokens", "512", "--enforce-eager"]
CACHE_MIB = 64


@pytest.fixture
def model(tiny_models: Path, tmp_path: Path) -> Path:
    """The tiny chat model's tokenizer, and a config of layers that cache in two ways."""
    folder = tmp_path / "mixed"
    shutil.copytree(
        tiny_models / "tiny-chat", folder, ignore=shutil.ignore_patterns("*.safetensors")
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | MIXED))
    return folder


@pytest.fixture
def said(docker_client: docker.DockerClient, model: Path) -> Iterator[Iterator[str]]:
    """What an engine prints while it starts with random weights."""
    container = docker_client.containers.run(
        ENGINE,
        entrypoint=["vllm"],
        command=["serve", lm.MODEL_MOUNT, "--load-format", "dummy", *ARGUMENTS,
                 "--kv-cache-memory-bytes", f"{CACHE_MIB}M"],
        name=f"fit-truth-{secrets.token_hex(4)}",
        environment={"HF_HUB_OFFLINE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        volumes={str(model): {"bind": lm.MODEL_MOUNT, "mode": "ro"}},
        shm_size="256m",
        mem_limit="4g",
        detach=True,
    )  # fmt: skip
    try:
        yield (line.decode(errors="replace") for line in container.logs(stream=True, follow=True))
    finally:
        container.remove(force=True, v=True)


def test_a_real_engine_has_room_for_as_many_requests_as_was_foretold(
    model: Path, said: Iterator[str]
) -> None:
    fit = lm.estimate(
        0,
        lm.read_architecture(json.loads((model / "config.json").read_text())),
        lm.engine_wish(ARGUMENTS),
        lm.place_of(lm.CpuPlacement(kv_cache_mib=CACHE_MIB), lm.Hardware(), memory_mib=4096),
    )
    found = (re.search(r"Maximum concurrency for ([\d,]+) tokens.*: ([\d.]+)x", x) for x in said)
    line = next(filter(None, found), None)
    assert line is not None, "the engine ended before it said anything of its KV cache"
    assert line[1] == f"{fit.context:,}"
    assert float(line[2]) == pytest.approx(fit.concurrency, abs=0.005)
