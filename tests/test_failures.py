"""The catalogue of failures: an engine's own words become one fact and one thing to do."""
# ruff: noqa: E501 - lines of engines are quoted as they are

from __future__ import annotations

import re

import pytest

import llm_manager as lm

CATALOGUE = lm.parse_failures((lm.PROGRAM.parent / "recipes" / "failures.yaml").read_text())
# The last line of most failed starts of vLLM; the cause stands somewhere above it.
POINTER = (
    "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}"
)

# Lines of real starts of vLLM 0.30 and 0.32, or of its source where no CPU can provoke them.
SAID = {
    "context longer than the KV cache": "ValueError: To serve at least one request with the model's "
    "max seq len (4096), (0.13 GiB KV cache is needed, which is larger than the available KV cache "
    "memory (0.06 GiB). Based on the available memory, the estimated maximum model length is 1920.",
    "no room for a KV cache": "ValueError: No available memory for the cache blocks. Try increasing",
    "memory taken by others": "ValueError: Free memory on device cuda:0 (10.2/79.3 GiB) on startup is "
    "less than desired GPU memory utilization (0.92, 72.9 GiB).",
    "processor memory taken by others": "ValueError: Available memory on node 0 (3.1/23.5 GiB) on "
    "startup is less than desired CPU memory utilization (0.92, 21.6 GiB).",
    "out of memory while warming up": "RuntimeError: CUDA out of memory occurred when warming up "
    "sampler with 1024 dummy requests. Please try lowering",
    "out of memory": "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB.",
    "context longer than the model's": "User-specified max_model_len (9000) is greater than the "
    "derived max_model_len (max_position_embeddings=2048 or model_max_length=None in model's config",
    "unsupported architecture": "Model architectures ['FooForCausalLM'] are not supported for now.",
    "unknown model type": "The checkpoint has model type `foo9` but Transformers does not recognize "
    "this architecture.",
    "custom code": "The repository /model contains custom code which must be executed to correctly",
    "access not granted": "403 Client Error. You are trying to access a gated repo. Access to model "
    "a/b is restricted and you are not in the authorized list.",
    "gated repository": "401 Client Error. You are trying to access a gated repo. Make sure to have",
    "bad token": "Invalid credentials in Authorization header",
    "no such repository": "OSError: a/bc is not a local folder and is not a valid model identifier",
    "weights not on this server": "huggingface_hub.errors.LocalEntryNotFoundError: Cannot find an "
    "appropriate cached snapshot folder for the specified revision on the local disk and outgoing "
    "traffic has been disabled. To enable repo look-ups and downloads online, pass",
    "hub not reachable": "OSError: We couldn't connect to 'https://huggingface.co' to load the files",
    "path not mounted": "HFValidationError: Repo id must be in the form 'repo_name' or 'ns/name'",
    "no model there": "Invalid repository ID or local directory specified: '/model'.",
    "tokenizer missing": "ValueError: Couldn't instantiate the backend tokenizer from one of:",
    "weights missing": "RuntimeError: Cannot find any model weights with `/model`",
    "broken download": "SafetensorError: Error while deserializing header: incomplete metadata, file "
    "not fully covered",
    "weights of another model": "RuntimeError: The size of tensor a (256) must match the size of",
    "unknown quantisation": "ValueError: Unknown quantization method: zzz4. Must be one of ['awq'",
    "argument unknown": "vllm: error: unrecognized arguments: --frobnicate",
    "argument's value": "vllm: error: argument --dtype: invalid choice: 'bfloat17' (choose from",
    "tool call parser": "KeyError: 'invalid tool call parser: nope (chose from { hermes,mistral })'",
    "reasoning parser": "KeyError: \"Reasoning parser 'nope' not found. Available parsers: deepseek\"",
    "heads and GPUs": "ValueError: Total number of attention heads (4) must be divisible by tensor "
    "parallel size (3).",
    "not a generating model": "ValueError: Embedding models do not support --runner generate",
    "adapter missing": "ValueError: Loading lora a failed: No adapter found for /adapters/a",
    "audio batch": "ValueError: max_tokens_per_mm_item (1500) is larger than max_num_batched_tokens "
    "(896) for",
    "bfloat16": "ValueError: Bfloat16 is only supported on GPUs with compute capability of at least "
    "8.0. Your Tesla T4 GPU has compute capability 7.5.",
    "shared memory": "RuntimeError: Insufficient space in /dev/shm for shared-memory allocation: 160 "
    "MiB required, 64 MiB free.",
    "address in use": "OSError: [Errno 98] Address already in use",
    "several GPUs do not talk": "RuntimeError: NCCL error: unhandled system error",
    "driver too old": "RuntimeError: The NVIDIA driver on your system is too old (found version 12020)",
    "driver and image do not fit": "RuntimeError: Unexpected error from cudaGetDeviceCount(). Did you "
    "run some cuda functions before calling NumCudaDevices() that might have already set an error? "
    "Error 803: system has unsupported display driver / cuda driver combination",
    "NVSwitch not set up": "RuntimeError: Unexpected error from cudaGetDeviceCount(). Did you run some "
    "cuda functions before calling NumCudaDevices() that might have already set an error? Error 802: "
    "system not yet initialized",
    "card not known to the image": "torch.AcceleratorError: CUDA error: no kernel image is available "
    "for execution on the device",
    "no GPU inside": "RuntimeError: Failed to infer device type, please set the environment variable",
}  # fmt: skip


def test_every_entry_has_its_engines_words_here() -> None:
    assert {*SAID} == {known.name for known in CATALOGUE}


@pytest.mark.parametrize("name", SAID)
def test_the_words_of_an_engine_are_recognised_wherever_they_stand(name: str) -> None:
    (meant,) = [known for known in CATALOGUE if known.name == name]
    log = f"INFO 11-21 starting\n(EngineCore pid=39) ERROR {SAID[name]}\nTraceback\n{POINTER}\n"
    fact, advice = lm.explain(log, CATALOGUE) or ("", "")
    figures = ("", *(part or "" for part in (re.search(meant.pattern, log) or [""]).groups()))  # type: ignore[union-attr]
    assert (fact, advice) == (meant.fact.format(*figures), meant.advice.format(*figures))


@pytest.mark.parametrize("known", CATALOGUE, ids=lambda known: known.name)
def test_a_fact_is_half_a_sentence_and_an_advice_a_whole_one(known: lm.KnownFailure) -> None:
    assert known.fact[0].islower() or known.fact.startswith("{")
    assert not known.fact.endswith(".")
    assert known.advice[0].isupper()
    assert known.advice.endswith(".")


def test_the_figures_of_the_engine_are_in_the_advice() -> None:
    fact, advice = lm.explain(SAID["context longer than the KV cache"], CATALOGUE) or ("", "")
    assert fact == "its KV cache has no room for one request of 4096 tokens"
    assert advice == "Add the engine argument --max-model-len 1920, or give it more memory."


def test_a_log_without_a_known_failure_is_not_explained() -> None:
    assert lm.explain(f"ValueError: something else\n{POINTER}", CATALOGUE) is None


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("hub not reachable", "An error happened while trying to locate the file on the Hub and we cannot"),
        ("weights not on this server", "OfflineModeIsEnabled: Cannot reach https://x/y: offline mode is enabled."),
        ("shared memory", "RuntimeError: Insufficient space in /dev/shm: 160 MiB required, 64 MiB free."),
        # NCCL's own warning stands above the error that PyTorch makes of it.
        ("shared memory", "Error while creating shared memory segment /dev/shm/nccl-Ewjreo (size 330)\nNCCL error"),
        ("several GPUs do not talk", "torch.distributed.DistBackendError: NCCL error in: NCCLUtils.hpp:268"),
        ("several GPUs do not talk", "ncclRemoteError: A call failed possibly due to a network error"),
        ("driver and image do not fit", "Error 804: forward compatibility was attempted on non supported HW"),
    ],
)  # fmt: skip
def test_other_words_for_the_same(name: str, line: str) -> None:
    (meant,) = [known for known in CATALOGUE if known.name == name]
    assert lm.explain(f"{line}\n{POINTER}\n", CATALOGUE) == (meant.fact, meant.advice)


def test_an_end_without_a_known_cause_is_told_in_the_engines_own_words() -> None:
    fact, advice = lm.cause_of_end(f"ValueError: something else.\n{POINTER}", 1, CATALOGUE)
    assert fact == "ValueError: something else"
    assert advice == "Mend that, then deploy again; its whole log is kept."
    assert lm.cause_of_end("", 0, CATALOGUE)[0] == "it gave no reason"


def test_being_killed_is_a_cause_only_where_the_log_has_no_better_one() -> None:
    assert lm.cause_of_end("", 137, CATALOGUE)[0].startswith("it was killed, as the kernel does")
    fact, _ = lm.cause_of_end(SAID["out of memory"], 137, CATALOGUE)
    assert fact == "its GPU's memory is too small for it"


# What vLLM 0.30 says when the process behind its server is killed, and then ends with 0.
ENDED_IN_SERVICE = """\
(Worker pid=40) WARNING 11-21 10:56:01 [utils.py:561] Failed to create oneDNN linear, fallback to torch linear. Exception: could not create a primitive descriptor
(APIServer pid=1) INFO:     Application startup complete.
(APIServer pid=1) WARNING 11-21 10:56:19 [core_client.py:791] [shutdown] MPClient: engine core exited unexpectedly; starting cleanup
(APIServer pid=1) ERROR 11-21 10:56:19 [async_llm.py:843] AsyncLLM output_handler failed.
(APIServer pid=1) ERROR 11-21 10:56:19 [async_llm.py:843] vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue. See stack trace (above) for the root cause.
(APIServer pid=1) INFO:     Finished server process [1]
"""


def test_an_engine_whose_process_is_killed_in_service_is_not_said_to_have_failed_otherwise() -> (
    None
):
    assert lm.cause_of_end(ENDED_IN_SERVICE, 0, CATALOGUE)[0].startswith("it was killed, as the")
    real = f"(EngineCore pid=28) ERROR RuntimeError: a fault in a kernel.\n{ENDED_IN_SERVICE}"
    assert lm.cause_of_end(real, 0, CATALOGUE)[0] == "RuntimeError: a fault in a kernel"
