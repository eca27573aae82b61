"""Weights: what a repository is, what of it an engine needs, and what may go from the cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from builders import NOW, a_model, a_state
from hypothesis import given
from hypothesis import strategies as st

import llm_manager as lm

GIB = 2**30
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def files(*paths: str) -> tuple[lm.RepositoryFile, ...]:
    return tuple(lm.RepositoryFile(path=path, size_bytes=10) for path in paths)


def shards(name: str, count: int, ending: str = "safetensors") -> list[str]:
    return [f"{name}-{n:05d}-of-{count:05d}.{ending}" for n in range(1, count + 1)]


def needed(*paths: str, kind: lm.ModelType | None = None) -> set[str]:
    return {file.path for file in lm.files_needed(files(*paths), kind)}


def facts(*paths: str, **changes: Any) -> lm.RepositoryFacts:
    config = changes.pop("config", {})
    architecture = changes.pop("architecture", None)
    config |= {"architectures": [architecture]} if architecture else {}
    return lm.RepositoryFacts(repository="a/b", files=files(*paths), config=config, **changes)


QWEN = ("config.json", *shards("model", 5), "model.safetensors.index.json", *TOKENIZER)
# Shapes of repositories as they are on the hub: files an engine needs, and those it does not.
SHAPES: dict[str, tuple[list[str], list[str]]] = {
    "Qwen/Qwen3-8B": ([*QWEN, "merges.txt"], ["README.md", ".gitattributes", "LICENSE.md"]),
    "meta-llama/Llama-3.1-8B-Instruct": (
        ["config.json", *shards("model", 4), "model.safetensors.index.json", *TOKENIZER],
        ["original/consolidated.00.pth", "original/params.json", "original/tokenizer.model",
         "USE_POLICY.md"],
    ),
    "mistralai/Mistral-7B-Instruct-v0.3": (
        ["config.json", "params.json", *shards("model", 3), "model.safetensors.index.json",
         "tokenizer.model", "tokenizer.model.v3"],
        ["consolidated.safetensors"],
    ),
    "mistralai/Voxtral-4B-TTS (its own format alone)": (
        ["consolidated.safetensors", "params.json", "tekken.json"], ["README.md"],
    ),
    "openai/gpt-oss-20b": (
        ["config.json", *shards("model", 3), "model.safetensors.index.json", "chat_template.jinja"],
        ["original/model.safetensors", "original/config.json", "metal/model.bin"],
    ),
    "openai/whisper-large-v3": (
        ["config.json", "model.safetensors", "preprocessor_config.json", "vocab.json",],
        ["flax_model.msgpack", "pytorch_model.bin", *shards("model.fp32", 2),
         *shards("pytorch_model.fp32", 2, "bin"), "model.safetensors.index.fp32.json",
         "pytorch_model.bin.index.fp32.json"],
    ),
    "BAAI/bge-m3 (no safetensors)": (
        ["config.json", "pytorch_model.bin", "colbert_linear.pt", "sparse_linear.pt",
         "modules.json", "1_Pooling/config.json", "sentencepiece.bpe.model"],
        ["onnx/model.onnx", "onnx/model.onnx_data", "onnx/config.json", "imgs/others.webp"],
    ),
    "BAAI/bge-m3 with safetensors": (
        ["config.json", "model.safetensors", "colbert_linear.pt", "sparse_linear.pt"],
        ["pytorch_model.bin"],
    ),
    "sentence-transformers/all-MiniLM-L6-v2": (
        ["config.json", "model.safetensors", "modules.json", "1_Pooling/config.json", "vocab.txt"],
        ["pytorch_model.bin", "rust_model.ot", "tf_model.h5", "openvino/openvino_model.bin",
         "openvino/openvino_model.xml", "onnx/model_qint8_avx512.onnx"],
    ),
    "sentence-transformers/LaBSE (a layer without safetensors)": (
        ["model.safetensors", "2_Dense/pytorch_model.bin", "2_Dense/config.json"],
        ["pytorch_model.bin", "flax_model.msgpack"],
    ),
    "stabilityai/stable-diffusion-xl-base-1.0": (
        ["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
         "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
         "text_encoder/config.json", "text_encoder/model.safetensors",
         "scheduler/scheduler_config.json", "tokenizer/vocab.json"],
        ["sd_xl_base_1.0.safetensors", "sd_xl_offset_example-lora_1.0.safetensors",
         "unet/diffusion_pytorch_model.fp16.safetensors", "unet/model.onnx",
         "text_encoder/flax_model.msgpack", "text_encoder/openvino_model.bin",
         "vae/diffusion_pytorch_model.fp16.safetensors", "comparison.png"],
    ),
    "black-forest-labs/FLUX.1-dev": (
        ["model_index.json", "transformer/config.json",
         *shards("transformer/diffusion_pytorch_model", 3),
         "transformer/diffusion_pytorch_model.safetensors.index.json",
         "vae/config.json", "vae/diffusion_pytorch_model.safetensors", "tokenizer_2/spiece.model"],
        ["flux1-dev.safetensors", "ae.safetensors", "dev_grid.jpg"],
    ),
    "stabilityai/stable-diffusion-3.5-large": (
        ["model_index.json", "text_encoder_3/config.json", *shards("text_encoder_3/model", 2),
         "text_encoder_3/model.safetensors.index.json"],
        ["sd3.5_large.safetensors", "text_encoders/clip_g.safetensors",
         "text_encoders/t5xxl_fp8_e4m3fn.safetensors",
         *shards("text_encoder_3/model.fp16", 2),
         "text_encoder_3/model.safetensors.index.fp16.json"],
    ),
    "runwayml/stable-diffusion-v1-5": (
        ["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"],
        ["v1-5-pruned.ckpt", "unet/diffusion_pytorch_model.bin",
         "unet/diffusion_pytorch_model.non_ema.safetensors"],
    ),
    "Qwen/Qwen2.5-7B-Instruct-GGUF (one format, and no other)": (
        ["qwen2.5-7b-instruct-q4_k_m.gguf", "qwen2.5-7b-instruct-q8_0.gguf"], ["README.md"],
    ),
    "an old one with .bin alone": (
        ["config.json", *shards("pytorch_model", 2, "bin"), "pytorch_model.bin.index.json"],
        ["tf_model.h5", "flax_model.msgpack"],
    ),
    "half precision alone": (
        ["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.fp16.safetensors"],
        [],
    ),
    "half precision in safetensors, the plain one in .bin": (
        ["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.bin"],
        ["unet/diffusion_pytorch_model.fp16.safetensors"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_what_an_engine_needs_of_a_repository_is_fetched_and_no_copy(shape: str) -> None:
    wanted, unwanted = SHAPES[shape]
    assert needed(*wanted, *unwanted) == set(wanted)


def test_a_speech_model_keeps_its_other_formats() -> None:
    parts = ("llm.pt", "flow.pt", "campplus.onnx", "speech_tokenizer_v2.onnx", "config.json",
             "llm/model.safetensors", "spk.npz")  # fmt: skip
    assert needed(*parts, "llm/pytorch_model.bin", kind="text-to-speech") == {*parts}
    assert "campplus.onnx" not in needed(*parts, kind="chat")


@given(st.lists(st.sampled_from([p for pair in SHAPES.values() for ps in pair for p in ps])))
def test_no_listing_loses_all_its_weights(paths: list[str]) -> None:
    listed = files(*dict.fromkeys(paths))
    kept = lm.files_needed(listed)
    assert set(kept) <= set(listed)
    assert lm.files_needed(kept) == kept
    loadable = [p for p in paths if p.endswith(".safetensors") and "/" not in p]
    if loadable and "model_index.json" not in paths:
        assert lm.weights_bytes(kept)


def test_weights_are_counted_without_what_is_beside_them() -> None:
    assert lm.weights_bytes(files(*QWEN)) == 5 * 10
    about = facts(*QWEN, "pytorch_model.bin", "README.md")
    assert (about.weights_bytes, about.download_bytes) == (5 * 10, len(QWEN) * 10)


TYPES: list[tuple[lm.ModelType | None, lm.RepositoryFacts]] = [
    ("chat", facts(pipeline_tag="text-generation", architecture="Qwen3ForCausalLM")),
    ("chat", facts(architecture="LlamaForCausalLM")),
    ("chat", facts(architecture="GPT2LMHeadModel")),
    ("vision", facts(pipeline_tag="image-text-to-text")),
    ("vision", facts(architecture="Qwen2_5_VLForConditionalGeneration")),
    ("vision", facts(pipeline_tag="any-to-any", architecture="Gemma3nForConditionalGeneration")),
    ("embedding", facts("modules.json", architecture="Qwen3ForCausalLM")),
    ("embedding", facts("modules.json", pipeline_tag="sentence-similarity")),
    ("embedding", facts(architecture="XLMRobertaModel")),
    ("embedding", facts(architecture="BertForMaskedLM")),
    ("embedding", facts(tags=("sentence-transformers",), architecture="MPNetModel")),
    ("rerank", facts(pipeline_tag="text-ranking", architecture="Qwen3ForCausalLM")),
    ("rerank", facts("modules.json", pipeline_tag="text-ranking")),
    ("rerank", facts(architecture="XLMRobertaForSequenceClassification",
                     config={"id2label": {"0": "LABEL_0"}})),
    (None, facts(pipeline_tag="text-classification", config={"id2label": {"0": "a", "1": "b"}},
                 architecture="BertForSequenceClassification")),
    ("speech-to-text", facts(pipeline_tag="automatic-speech-recognition")),
    ("speech-to-text", facts(architecture="WhisperForConditionalGeneration")),
    ("speech-to-text", facts(pipeline_tag="audio-text-to-text",
                             architecture="VoxtralForConditionalGeneration")),
    ("text-to-speech", facts(pipeline_tag="text-to-speech", architecture="Qwen3TTSModel")),
    ("image", facts("model_index.json", pipeline_tag="text-to-image")),
    ("image", facts("model_index.json")),
    ("text-to-speech", facts("model_index.json", pipeline_tag="text-to-audio")),
    (None, facts("model_index.json", pipeline_tag="text-to-video")),
    (None, facts(architecture="T5ForConditionalGeneration")),
    (None, facts(pipeline_tag="object-detection", architecture="DetrForObjectDetection")),
    (None, facts()),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "about"), TYPES)
def test_the_type_is_guessed_from_architecture_files_and_tags(
    kind: lm.ModelType | None, about: lm.RepositoryFacts
) -> None:
    assert lm.guess_type(about) == kind


def test_a_config_tells_context_quantisation_and_own_code() -> None:
    about = facts(
        config={
            "text_config": {"max_position_embeddings": 131072},
            "quantization_config": {"quant_method": "awq", "bits": 4},
            "auto_map": {"AutoModel": "modeling.Model"},
        }
    )
    assert (about.context, about.quantisation, about.runs_own_code) == (131072, "awq", True)
    assert (facts().context, facts().quantisation, facts().runs_own_code) == (None, None, False)


@pytest.mark.parametrize("kind", lm.HUB_TROUBLES)
def test_every_trouble_is_a_sentence_of_fact_and_one_of_advice(kind: lm.HubTrouble) -> None:
    wanted = lm.Wanted(endpoint="https://user:pass@mirror.example/x", repository="a/b")
    error = lm.HubError(kind, wanted, "why")
    assert error.fact.endswith(".")
    assert error.advice.endswith(".")
    assert "{" not in str(error)
    assert "pass@" not in error.fact


def test_weights_are_whole_only_with_every_shard_of_their_index() -> None:
    index = "model.safetensors.index.json"
    parts = shards("model", 2)
    named = {index: parts}
    assert lm.missing_files(files("config.json", index, *parts), None, named) == []
    assert lm.missing_files(files("config.json", index, parts[0]), None, named) == [parts[1]]
    assert lm.missing_files(files("config.json"), None, {}) == ["weights"]


def test_the_hubs_own_list_counts_where_it_is_known() -> None:
    listed = files("config.json", "model.safetensors", "tokenizer.json", "model.gguf", "README.md")
    here = files("config.json", "model.safetensors")
    assert lm.missing_files(here, listed, {}) == ["tokenizer.json"]
    assert lm.missing_files((*here, *files("tokenizer.json")), listed, {}) == []


def test_an_index_of_another_format_asks_for_nothing() -> None:
    index = "pytorch_model.bin.index.json"
    here = files("config.json", "model.safetensors", index)
    assert lm.missing_files(here, None, {index: ["pytorch_model-1.bin"]}) == []


OLD, NEW = "a" * 40, "b" * 40
SHARED = {"models--acme--chat/blobs/tokenizer": 1 * GIB}


def a_cache() -> lm.WeightsCache:
    """Two revisions of one repository that share a file, leftovers, and another repository."""
    return lm.WeightsCache(
        revisions=(
            lm.CachedRevision(repository="acme/chat", commit=OLD, used_at=NOW,
                              blobs=SHARED | {"models--acme--chat/blobs/old": 4 * GIB}),
            lm.CachedRevision(repository="acme/chat", commit=NEW, refs=("main",), used_at=NOW,
                              blobs=SHARED | {"models--acme--chat/blobs/new": 8 * GIB}),
            lm.CachedRevision(repository="acme/half", commit=OLD, refs=("main",),
                              blobs={"models--acme--half/blobs/part": GIB},
                              missing=("model-2.safetensors", "tokenizer.json")),
        ),
        leftovers=(lm.Leftover(repository="acme/chat", size_bytes=2 * GIB,
                               path="models--acme--chat/blobs/x.1.incomplete"),),
        free_bytes=10 * GIB,
    )  # fmt: skip


def a_user(revision: str | None = None) -> lm.State:
    return a_state(a_model(source=lm.HubSource(repository="acme/chat", revision=revision)))


def test_what_revisions_share_counts_once_and_is_not_freed_by_one_of_them() -> None:
    cache = a_cache()
    assert cache.size_bytes == (1 + 4 + 8 + 1 + 2) * GIB
    removal = lm.plan_removal(cache, a_state(), "acme/chat", OLD)
    assert (removal.freed_bytes, removal.shared_bytes) == (4 * GIB, 1 * GIB)
    assert removal.leftovers == ()
    whole = lm.plan_removal(cache, a_state(), "acme/chat")
    assert whole.commits == (OLD, NEW)
    assert (whole.freed_bytes, whole.shared_bytes) == ((1 + 4 + 8 + 2) * GIB, 0)


def test_weights_of_a_registered_model_stay_unless_said_despite_it() -> None:
    cache, state = a_cache(), a_user()
    with pytest.raises(lm.RefusedError, match="used by chat") as caught:
        lm.plan_removal(cache, state, "acme/chat")
    assert "Remove the model first" in caught.value.advice
    assert lm.plan_removal(cache, state, "acme/chat", despite_use=True).used_by == ("chat",)
    assert lm.plan_removal(cache, state, "acme/chat", OLD).used_by == ()
    pinned = a_user(OLD)
    assert lm.plan_removal(cache, pinned, "acme/chat", NEW).commits == (NEW,)
    with pytest.raises(lm.RefusedError, match="used by chat"):
        lm.plan_removal(cache, pinned, "acme/chat", OLD)


def test_what_is_not_there_or_is_being_downloaded_is_not_removed() -> None:
    cache = a_cache()
    with pytest.raises(lm.RefusedError, match="no acme/none in the cache"):
        lm.plan_removal(cache, a_state(), "acme/none")
    with pytest.raises(lm.RefusedError, match="no acme/chat@v9 in the cache"):
        lm.plan_removal(cache, a_state(), "acme/chat", "v9")
    busy = replace(cache, downloading=frozenset({"acme/chat"}))
    with pytest.raises(lm.RefusedError, match="being downloaded"):
        lm.plan_removal(busy, a_state(), "acme/chat")
    assert [removal.repository for removal in lm.orphans(busy, a_state())] == ["acme/half"]


def test_orphans_are_what_no_registered_model_uses() -> None:
    chat, half = lm.orphans(a_cache(), a_user())
    assert (chat.commits, len(chat.leftovers), chat.freed_bytes) == ((OLD,), 1, (4 + 2) * GIB)
    assert (half.repository, half.freed_bytes, half.used_by) == ("acme/half", GIB, ())


def test_the_cache_is_listed_with_state_and_users() -> None:
    rows = lm.cache_rows(a_cache(), a_user())
    assert [row[:5] for row in rows] == [
        ["acme/chat", "aaaaaaaa", "5.0 GiB", "whole", "no model"],
        ["acme/chat", "main, bbbbbbbb", "9.0 GiB", "whole", "chat"],
        ["acme/half", "main, aaaaaaaa", "1.0 GiB", "lacks model-2.safetensors and 1 more",
         "no model"],
        ["acme/chat", "leftovers", "2.0 GiB", "of broken-off downloads", "no model"],
    ]  # fmt: skip
    assert all(len(row) == len(lm.CACHE_HEADERS) for row in rows)
    assert lm.cache_summary(a_cache()) == "2 repositories, 16.0 GiB; 10.0 GiB free"


def test_a_removal_says_what_goes_and_what_would_miss_it() -> None:
    removal = lm.plan_removal(a_cache(), a_user(OLD), "acme/chat", OLD, despite_use=True)
    assert lm.removal_text(removal) == (
        "acme/chat: revision aaaaaaaa; frees 4.0 GiB (1.0 GiB stay for its other revisions); "
        "used by chat"
    )


def test_a_search_result_says_unknown_for_what_the_hub_did_not_say() -> None:
    hit = lm.RepositoryHit(repository="a/b", downloads=12345, likes=7, gated=True, updated_at=NOW,
                           pipeline_tag="text-generation", weights_bytes=16 * GIB)  # fmt: skip
    full, empty = lm.hit_rows([hit, lm.RepositoryHit(repository="c/d")])
    assert full == ["a/b", "chat", "12.3 K", "7", "16.0 GiB", "2026-03-04", "gated"]
    assert empty == ["c/d", *["unknown"] * 6]


@pytest.mark.parametrize(
    ("gib", "said"),
    [(None, "unknown"), (15, "one GPU"), (57, "one GPU"), (100, "2 GPUs together"),
     (220, "no: too large")],
)  # fmt: skip
def test_a_search_result_says_how_many_of_the_gpus_it_takes(gib: int | None, said: str) -> None:
    gpus = [lm.Gpu(uuid=lm.GpuUuid(f"GPU-{n}"), memory_mib=81559) for n in range(2)]
    size = None if gib is None else gib * GIB
    assert lm.room_text(size, lm.Hardware(gpus=tuple(gpus))) == said
    assert lm.room_text(size, lm.Hardware()) == "the processor"
    hit = lm.RepositoryHit(repository="a/b", weights_bytes=size)
    (row,) = lm.found_rows([hit], lm.Hardware(gpus=tuple(gpus)))
    assert dict(zip(lm.FOUND_HEADERS, row, strict=True))["Fits here, about"] == said


def test_of_many_containers_of_an_image_two_are_named() -> None:
    assert lm.shortened([["vllm", "a, b, c, d"], ["caddy", "e"], ["redis", ""]]) == [
        ["vllm", "a, b and 2 more"], ["caddy", "e"], ["redis", ""],
    ]  # fmt: skip


def test_what_no_model_uses_is_listed_first() -> None:
    rows = lm.stored_rows(a_cache(), a_user())
    assert [row[4] for row in rows] == [*["no model"] * 3, "chat"]


def test_a_repositorys_facts_name_what_stands_in_the_way() -> None:
    about = facts("model.safetensors", gated="manual", readable=False, parameters={"BF16": 8.03e9},
                  config={"auto_map": {}, "max_position_embeddings": 40960})  # fmt: skip
    rows = dict(lm.facts_rows(about))
    assert rows["Parameters"] == "8.03 B (8.03 B BF16)"
    assert rows["Longest context"] == "40,960 tokens"
    assert rows["Type"] == "unknown: choose it"
    assert "accept its terms" in rows["Access"]
    assert "token does not open it" in rows["Access"]
    assert "--trust-remote-code" in rows["Own code"]


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, "unknown"), (0, "0"), (999, "999"), (1000, "1 K"), (12345, "12.3 K"),
     (999_999, "1 M"), (8.03e9, "8.03 B"), (6.7e11, "670 B"), (2.5e12, "2500 B")],
)  # fmt: skip
def test_counts_have_three_digits(count: float | None, text: str) -> None:
    assert lm.format_count(count) == text


def a_progress(done: int, **changes: Any) -> lm.DownloadProgress:
    part = lm.FileProgress(path="model.safetensors", bytes_done=done, bytes_total=4 * GIB)
    small = lm.FileProgress(path="config.json", bytes_done=0, bytes_total=0)
    return lm.DownloadProgress(repository="a/b", files=(small, part), **changes)


def test_progress_is_one_line_with_what_is_known() -> None:
    assert lm.format_progress(a_progress(GIB)) == "a/b: 1.0 GiB of 4.0 GiB (25%), 1 of 2 files"
    assert lm.format_progress(a_progress(GIB, bytes_per_second=2**26, attempt=2, note="Slow.")) == (
        "a/b: 1.0 GiB of 4.0 GiB (25%), 64.0 MiB/s, 48 s left, 1 of 2 files, attempt 2. Slow."
    )
    assert lm.format_progress(a_progress(4 * GIB, bytes_per_second=0.0)) == (
        "a/b: 4.0 GiB of 4.0 GiB (100%), 2 of 2 files"
    )
    nothing = lm.DownloadProgress(repository="a/b", files=())
    assert lm.format_progress(nothing) == "a/b: looking at its files"
