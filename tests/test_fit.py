"""Fit before deploy: the formula against published figures, its laws, and the sum in words."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from builders import GPU_0, GPU_1, a_layout, a_model, a_state, on_gpus, on_slice
from hypothesis import example, given, settings
from hypothesis import strategies as st

import llm_manager as lm

FOLDER = Path(__file__).parent / "fit"
GIB = 1024**3


def load_table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fit_table", FOLDER / "table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TABLE = load_table()
FIGURES = [
    pytest.param(entry, figure, id=f"{number}-{entry['model'].rpartition('/')[2]}")
    for number, (entry, figure) in enumerate(TABLE.figures())
]


def kv_cache_bytes(
    architecture: lm.Architecture, context: int, sequences: int, wish: lm.EngineWish,
    tensor_parallel: int = 1, block_size: int = lm.BLOCK_TOKENS,
) -> int | None:  # fmt: skip
    """The KV cache of so many requests at a time, in bytes on each GPU; None is unknown."""
    blocks = lm.kv_blocks(architecture, context, wish, tensor_parallel, block_size)
    return None if blocks is None else blocks.request_bytes * sequences


def the_architecture(name: str) -> lm.Architecture:
    return lm.read_architecture(json.loads((FOLDER / f"{name}.json").read_text())["config"])


LLAMA = the_architecture("llama-3.1-8b")
LLAMA_BYTES = 16_060_522_496  # of its safetensors
ALL = {path.stem: the_architecture(path.stem) for path in sorted(FOLDER.glob("*.json"))}


# --- the formula against what others measured and published ---------------------------------


@pytest.mark.parametrize(("entry", "figure"), FIGURES)
def test_the_formula_gives_the_published_figure(
    entry: dict[str, Any], figure: dict[str, Any]
) -> None:
    error = TABLE.error_percent(entry, figure)
    assert abs(error) <= figure.get("within", TABLE.WITHIN), TABLE.computed(entry, figure)


def test_every_figure_names_its_source_and_every_kind_of_attention_has_one() -> None:
    assert all(figure["source"] for _, figure in TABLE.figures())
    kinds = {layer.kind for known in ALL.values() for layer in known.layers or ()}
    assert kinds >= {"full", "sliding", "chunked", "linear", "cross"}
    assert any(layer.latent for known in ALL.values() for layer in known.layers or ())
    published = [e for e in TABLE.entries() if not e["model"].startswith("tiny ")]
    assert len(published) >= 14


def test_activations_are_what_vllm_reported_for_several_sizes_of_a_batch() -> None:
    # vllm issue 10517: peak without weights 17.06 - 14.99 and 17.98 - 14.99 GiB.
    for tokens, gib in ((20_000, 2.07), (29_000, 2.99)):
        wish = lm.EngineWish(max_num_batched_tokens=tokens)
        assert lm.activation_mib(LLAMA, wish) / 1024 == pytest.approx(gib, abs=0.02)
    # Qwen2-VL-2B on an RTX 3050 Ti (vLLM 0.28, a public report): what is not KV cache, in MiB.
    reported = {1024: 2610, 2048: 2672, 4096: 2795, 8192: 3041}
    small = lm.Architecture(hidden_size=1536, mlp_size=8960, vocabulary=151936)
    for tokens, mib in reported.items():
        wish = lm.EngineWish(max_num_batched_tokens=tokens, max_num_seqs=1)
        more = lm.activation_mib(small, wish) - lm.activation_mib(
            small, lm.EngineWish(max_num_batched_tokens=1024, max_num_seqs=1)
        )
        assert more == pytest.approx(mib - 2610, abs=1)


# --- reading a config -----------------------------------------------------------------------


def kinds(config: dict[str, Any]) -> dict[str, int]:
    layers = lm.read_architecture(config).layers
    assert layers is not None
    return {layer.kind: layer.count for layer in layers}


SMALL = {
    "model_type": "llama", "num_hidden_layers": 12, "num_attention_heads": 8, "hidden_size": 512,
    "num_key_value_heads": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, {"full": 12}),
        ({"sliding_window": 256}, {"sliding": 12}),
        ({"sliding_window": 256, "use_sliding_window": False}, {"full": 12}),
        ({"model_type": "qwen2", "sliding_window": 256}, {"full": 12}),
        (
            {"sliding_window": 256, "use_sliding_window": True, "max_window_layers": 9},
            {"full": 9, "sliding": 3},
        ),
        ({"model_type": "gemma2", "sliding_window": 256}, {"sliding": 6, "full": 6}),
        ({"sliding_window": 256, "sliding_window_pattern": 4}, {"sliding": 9, "full": 3}),
        ({"model_type": "llama4_text", "attention_chunk_size": 64}, {"chunked": 9, "full": 3}),
        ({"attention_chunk_size": 64}, {"full": 12}),
        ({"full_attention_interval": 3}, {"linear": 8, "full": 4}),
        ({"hybrid_override_pattern": "M-M*-MEM*"}, {"linear": 4, "full": 2}),
        ({"attn_layer_period": 6, "attn_layer_offset": 2}, {"linear": 10, "full": 2}),
        ({"attn_layer_indices": [1, 7]}, {"linear": 10, "full": 2}),
        ({"linear_attn_config": {"kda_layers": [1, 2, 3]}}, {"linear": 3, "full": 9}),
        ({"model_type": "mamba"}, {"linear": 12}),
        (
            {"layer_types": ["sliding_attention", "full_attention"] * 6, "sliding_window": 9,
             "num_kv_shared_layers": 8},
            {"sliding": 2, "full": 2},
        ),
        ({"is_encoder_decoder": True}, {"full": 12, "cross": 12}),
        ({"model_type": "bert"}, {}),
        ({"architectures": ["XLMRobertaForSequenceClassification"]}, {}),
    ],
)  # fmt: skip
def test_the_kinds_of_layers_are_read(more: dict[str, Any], expected: dict[str, int]) -> None:
    assert kinds({**SMALL, **more}) == expected


@pytest.mark.parametrize(
    ("more", "heads"),
    [
        ({}, 2),
        ({"num_key_value_heads": None}, 8),
        ({"num_key_value_heads": None, "multi_query": True}, 1),
        ({"num_key_value_heads": None, "multi_query": True, "new_decoder_architecture": True,
          "num_kv_heads": 4}, 4),
        ({"attn_config": {"kv_n_heads": 4}}, 4),
        ({"num_key_value_heads": None, "multi_query_group_num": 2}, 2),
    ],
)  # fmt: skip
def test_kv_heads_are_read_whatever_they_are_called(more: dict[str, Any], heads: int) -> None:
    layers = lm.read_architecture({**SMALL, **more}).layers
    assert layers is not None
    assert layers[0].heads == heads


@pytest.mark.parametrize(
    ("config", "token_bytes", "context"),
    [
        (  # tiiuae/falcon-7b: multi-query
            {"model_type": "falcon", "hidden_size": 4544, "num_hidden_layers": 32,
             "num_attention_heads": 71, "multi_query": True, "new_decoder_architecture": False},
            32 * 2 * 64 * 2, None,
        ),
        (  # CohereForAI/c4ai-command-r-v01: every head has its own
            {"model_type": "cohere", "hidden_size": 8192, "num_hidden_layers": 40,
             "num_attention_heads": 64, "num_key_value_heads": 64,
             "max_position_embeddings": 8192, "model_max_length": 131072},
            40 * 64 * 2 * 128 * 2, 131072,
        ),
        (  # mistralai/Mixtral-8x7B-v0.1
            {"model_type": "mixtral", "hidden_size": 4096, "num_hidden_layers": 32,
             "num_attention_heads": 32, "num_key_value_heads": 8, "sliding_window": None,
             "max_position_embeddings": 32768, "num_local_experts": 8, "num_experts_per_tok": 2},
            32 * 8 * 2 * 128 * 2, 32768,
        ),
        (  # microsoft/phi-4
            {"model_type": "phi3", "hidden_size": 5120, "num_hidden_layers": 40,
             "num_attention_heads": 40, "num_key_value_heads": 10, "sliding_window": None,
             "max_position_embeddings": 16384, "rope_scaling": None},
            40 * 10 * 2 * 128 * 2, 16384,
        ),
        (  # openai-community/gpt2
            {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024},
            12 * 2 * 768 * 2, 1024,
        ),
    ],
)  # fmt: skip
def test_families_are_read_by_their_own_names(
    config: dict[str, Any], token_bytes: int, context: int | None
) -> None:
    found = lm.read_architecture(config)
    assert kv_cache_bytes(found, 1600, 1, lm.EngineWish()) == 1600 * token_bytes
    assert found.context == context


@pytest.mark.parametrize(
    ("more", "context"),
    [
        ({}, 4096),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 4096),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 16384),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 8192),
        ({"rope_scaling": {"type": "linear", "factor": "much"}}, 4096),
        ({"rope_scaling": {"type": "linear", "factor": float("nan")}}, 4096),
        ({"model_type": "gemma3_text", "rope_scaling": {"type": "linear", "factor": 8.0}}, 4096),
        ({"model_max_length": 131072}, 131072),
        ({"max_position_embeddings": None}, None),
    ],
)
def test_the_longest_context_is_derived_as_vllm_does(
    more: dict[str, Any], context: int | None
) -> None:
    config = {**SMALL, "max_position_embeddings": 4096, **more}
    assert lm.read_architecture(config).context == context


def test_the_tokenizer_may_shorten_the_context_and_its_nonsense_may_not() -> None:
    config = {**SMALL, "max_position_embeddings": 4096}
    assert lm.read_architecture(config, {"model_max_length": 512}).context == 512
    assert lm.read_architecture(config, {"model_max_length": 10**30}).context == 4096


def test_the_language_model_is_found_inside_a_multimodal_one() -> None:
    inner = {**SMALL, "torch_dtype": None}
    deep = {"thinker_config": {"text_config": inner, "vision_config": {}}, "torch_dtype": "float16"}
    assert lm.read_architecture(deep).dtype == "float16"
    assert kinds(deep) == {"full": 12}


def test_deepseeks_indexer_adds_its_keys_to_the_latent_cache() -> None:
    v3 = json.loads((FOLDER / "deepseek-v3.json").read_text())["config"]
    plain = lm.read_architecture(v3)
    sparse = lm.read_architecture({**v3, "index_topk": 2048, "index_head_dim": 128})
    wish = lm.EngineWish()
    more = kv_cache_bytes(sparse, 16, 1, wish) or 0
    assert more - (kv_cache_bytes(plain, 16, 1, wish) or 0) == 16 * 61 * 132
    packed = lm.EngineWish(kv_cache_dtype="fp8_ds_mla")
    assert kv_cache_bytes(plain, 16, 1, packed) == 16 * 61 * 656


def test_a_checkpoint_with_calibrated_scales_keeps_its_cache_in_8_bit() -> None:
    for said in ({"kv_cache_scheme": {"num_bits": 8}}, {"kv_cache_quant_algo": "FP8"}):
        found = lm.read_architecture({**SMALL, "quantization_config": said})
        assert kv_cache_bytes(found, 16, 1, lm.EngineWish()) == 16 * 12 * 2 * 128


def test_what_a_config_does_not_tell_is_said() -> None:
    nothing = lm.read_architecture({})
    assert nothing.layers is None
    assert "how its layers keep their KV cache" in nothing.unknown
    assert kv_cache_bytes(nothing, 16, 1, lm.EngineWish()) is None
    stateless = lm.read_architecture({**SMALL, "full_attention_interval": 3})
    assert "how large the state of its linear layers is" in stateless.unknown
    assert not [text for text in LLAMA.unknown if "type of its numbers" not in text]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["full_attention", "mamba", "qwen3_next", "bert", "yarn", "fp8", "M-*"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)  # fmt: skip
KEYS = [
    "architectures", "model_type", "text_config", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_size", "layer_types", "sliding_window",
    "sliding_window_pattern", "use_sliding_window", "max_window_layers", "kv_lora_rank",
    "qk_rope_head_dim", "rope_scaling", "rope_parameters", "max_position_embeddings",
    "quantization_config", "linear_attn_config", "attn_layer_indices", "attn_config",
    "full_attention_interval", "attn_layer_period", "num_kv_shared_layers", "torch_dtype",
    "linear_num_value_heads", "mamba_d_state", "hybrid_override_pattern", "compress_ratios",
    "is_encoder_decoder", "index_topk", "global_head_dim", "vision_config", "intermediate_size",
]  # fmt: skip


@given(st.dictionaries(st.sampled_from(KEYS), JSON | st.integers(1, 99)) | JSON, JSON)
@example({**SMALL, "num_hidden_layers": 10**12}, None)
@example({**SMALL, "hidden_size": 10**400}, {"model_max_length": 10**400})
def test_reading_never_raises_and_what_it_reads_can_be_computed_with(
    config: Any, tokenizer: Any
) -> None:
    found = lm.read_architecture(config, tokenizer)
    needed = kv_cache_bytes(found, 4096, 2, lm.EngineWish())
    assert needed is None or needed >= 0
    assert lm.fit_lines(lm.estimate(GIB, found, lm.EngineWish(), a_place()))


# --- the engine's arguments -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [("4096", 4096), ("8k", 8000), ("8K", 8192), ("1M", 1048576), ("25.6k", 25600), ("2G", 2**31),
     ("1.5K", None), ("lots", None), ("", None), ("-1", None), ("9" * 99, None)],
)  # fmt: skip
def test_amounts_are_read_as_vllm_reads_them(text: str, number: int | None) -> None:
    assert lm.parse_amount(text) == number


def test_the_arguments_that_decide_about_memory_are_read_in_every_form() -> None:
    wish = lm.engine_wish([
        "--max-model-len", "32K", "--max_num_seqs=16", "--kv-cache-dtype=fp8", "-pp", "2",
        "--gpu_memory_utilization", "0.8", "--enforce-eager", "--cpu-offload-gb", "4",
        "--dtype", "half", "--no-enable-prefix-caching", "--tensor-parallel-size", "8",
    ])  # fmt: skip
    assert wish == lm.EngineWish(
        context=32768, max_num_seqs=16, kv_cache_dtype="fp8", pipeline_parallel=2,
        memory_fraction=0.8, enforce_eager=True, cpu_offload_gib=4.0, dtype="half",
        prefix_caching=False,
    )  # fmt: skip


def test_automatic_is_vllms_default_and_the_last_of_a_kind_counts() -> None:
    assert lm.engine_wish(["--max-model-len", "auto"]).context_auto
    assert lm.engine_wish(["--max-model-len", "-1"]).context is None
    wish = lm.engine_wish(["--kv-cache-dtype", "auto", "--dtype=auto", "--max-model-len=4k"])
    assert wish == lm.EngineWish(context=4000)
    assert lm.engine_wish(["--max-num-seqs", "4", "--max-num-seqs", "8"]).max_num_seqs == 8


@given(
    st.lists(
        st.sampled_from(
            [
                "--max-model-len",
                "--gpu-memory-utilization",
                "-pp",
                "auto",
                "-1",
                "nan",
                "inf",
                "8k",
                "",
                "=",
                "--max-model-len=",
            ]
        )
        | st.text()
    )
)
def test_strange_arguments_are_passed_over(arguments: list[str]) -> None:
    wish = lm.engine_wish(arguments)
    assert wish.context is None or wish.context > 0


# --- laws ---------------------------------------------------------------------------------


some_model = st.sampled_from(sorted(ALL)).map(ALL.__getitem__)
a_context = st.integers(1, 300_000)
a_batch = st.sampled_from([None, 512, 8192])


@given(some_model, a_context, a_context, a_batch, st.booleans())
def test_a_longer_context_never_needs_less(
    model: lm.Architecture, one: int, other: int, batch: int | None, caching: bool
) -> None:
    wish = lm.EngineWish(max_num_batched_tokens=batch, prefix_caching=caching)
    short, long = sorted((one, other))
    less = kv_cache_bytes(model, short, 1, wish)
    more = kv_cache_bytes(model, long, 1, wish)
    assert less is not None
    assert more is not None
    assert less <= more


@given(some_model, a_context, st.sampled_from([1, 2, 4, 8]))
def test_more_gpus_never_need_more_of_each(
    model: lm.Architecture, context: int, parallel: int
) -> None:
    """Up to the last block of each group: smaller blocks are rounded up elsewhere."""
    wish = lm.EngineWish()
    one = lm.kv_blocks(model, context, wish, parallel)
    two = lm.kv_blocks(model, context, wish, 2 * parallel)
    assert one is not None
    assert two is not None
    rounding = two.size * sum(layer.count for layer in model.layers or ())
    assert two.request_bytes <= one.request_bytes + (rounding if has_state(model) else 0)
    fit = [lm.estimate(9 * GIB, model, wish, a_place(gpus=n)) for n in (parallel, 2 * parallel)]
    assert fit[1].parts[0].mib == pytest.approx((fit[0].parts[0].mib or 0) / 2)


def has_state(model: lm.Architecture) -> bool:
    return any(layer.kind == "linear" for layer in model.layers or ())


@given(some_model, st.integers(0, 64 * 1024), a_batch)
def test_the_largest_context_fits_and_one_block_more_does_not(
    model: lm.Architecture, mib: int, batch: int | None
) -> None:
    wish = lm.EngineWish(max_num_batched_tokens=batch)

    def layout(context: int) -> lm.KvBlocks:
        blocks = lm.kv_blocks(model, context, wish)
        assert blocks is not None
        return blocks

    longest = lm.largest_context(model, mib * lm.MIB, layout)
    assert longest is not None
    assert model.context is not None
    room = mib * lm.MIB // layout(1).size - 1  # vLLM keeps one block for itself
    if longest:
        assert layout(longest).per_request <= room
    if longest < model.context:
        assert layout(longest + 1).per_request > room
        assert layout(longest + 1).per_request > layout(max(longest, 1)).per_request or not longest


# --- the sum ------------------------------------------------------------------------------


def a_place(gpus: int = 1, memory_mib: int = 80_000, **changes: Any) -> lm.Place:
    uuids = tuple(lm.GpuUuid(f"GPU-{n}") for n in range(gpus))
    placement = lm.GpuPlacement(gpu_uuids=uuids)
    return lm.Place(placement=placement, title="GPU 0", memory_mib=memory_mib, **changes)


def a_fit(*arguments: str, place: lm.Place | None = None, **changes: Any) -> lm.Fit:
    given: dict[str, Any] = {"weights_bytes": LLAMA_BYTES, "architecture": LLAMA} | changes
    return lm.estimate(wish=lm.engine_wish(arguments), place=place or a_place(), **given)


def part(fit: lm.Fit, name: str) -> lm.FitPart:
    return next(part for part in fit.parts if part.name == name)


def test_the_sum_is_weights_kv_cache_and_overhead_against_the_budget() -> None:
    fit = a_fit("--max-model-len", "32K")
    assert part(fit, "weights").mib == pytest.approx(LLAMA_BYTES / lm.MIB)
    assert part(fit, "KV cache").mib == pytest.approx(4096 + 2)  # and the block vLLM keeps
    assert fit.needed_mib == pytest.approx(sum(p.mib or 0 for p in fit.parts))
    assert fit.budget_mib == pytest.approx(0.92 * 80_000)
    assert fit.verdict == "roomy"
    assert fit.concurrency is not None
    assert 13 < fit.concurrency < 14
    assert fit.largest_context == 131072


@pytest.mark.parametrize(
    ("memory_mib", "verdict"),
    [(40_000, "roomy"), (30_000, "fits"), (24_500, "tight"), (22_000, "too small")],
)
def test_the_verdict_has_four_bands(memory_mib: int, verdict: str) -> None:
    fit = a_fit("--max-model-len", "32K", place=a_place(memory_mib=memory_mib))
    assert fit.verdict == verdict
    assert fit.starts == (verdict != "too small")


def test_where_the_default_context_does_not_fit_the_longest_that_does_is_named() -> None:
    place = a_place(memory_mib=24_000)
    fit = a_fit(place=place)
    assert fit.verdict == "too small"
    assert fit.largest_context is not None
    assert 20_000 < fit.largest_context < 131_072
    again = a_fit("--max-model-len", str(fit.largest_context), place=place)
    assert again.starts
    assert not a_fit("--max-model-len", str(fit.largest_context + 16), place=place).starts
    assert f"(--max-model-len {fit.largest_context})" in "".join(lm.fit_lines(fit))
    automatic = a_fit("--max-model-len", "auto", place=place)
    assert automatic.context == fit.largest_context
    assert automatic.starts


def test_several_requests_need_several_times_the_cache() -> None:
    one, nine = (a_fit("--max-model-len", "8K", at_once=n) for n in (1, 9))
    assert (part(nine, "KV cache").mib or 0) - 2 == pytest.approx(
        9 * ((part(one, "KV cache").mib or 0) - 2)
    )


def test_a_memory_fraction_of_the_placement_is_the_budget() -> None:
    shared = lm.GpuPlacement(gpu_uuids=(GPU_0,), memory_fraction=0.4)
    place = lm.Place(placement=shared, title="GPU 0", memory_mib=80_000)
    assert a_fit(place=place).budget_mib == pytest.approx(32_000)
    assert a_fit("--gpu-memory-utilization", "0.5").budget_mib == pytest.approx(40_000)


def test_a_kv_cache_that_somebody_set_is_taken_as_it_is() -> None:
    fit = a_fit("--kv-cache-memory-bytes", "8G", "--max-model-len", "64K")
    assert part(fit, "KV cache") == lm.FitPart(name="KV cache", mib=8192, origin="set")
    assert fit.verdict == "too small"
    assert any("8,194 MiB" in note for note in fit.notes)
    assert a_fit("--kv-cache-memory-bytes", "9G", "--max-model-len", "64K").starts


def test_on_the_processor_the_servers_memory_counts_and_the_placement_sets_the_cache() -> None:
    placement = lm.CpuPlacement(kv_cache_mib=1024)
    place = lm.place_of(placement, lm.Hardware(), memory_mib=32_000)
    fit = a_fit("--max-model-len", "4096", place=place)
    assert fit.starts
    assert part(fit, "KV cache").origin == "set"
    assert fit.budget_mib == 32_000
    assert a_fit("--max-model-len", "8192", place=place).verdict == "too small"
    little = lm.place_of(placement, lm.Hardware(), memory_mib=16_000)
    assert a_fit("--max-model-len", "4096", place=little).verdict == "too small"
    unknown = lm.place_of(lm.CpuPlacement(kv_cache_mib=20_000), lm.Hardware())
    assert a_fit(place=unknown).verdict is None


def test_weights_of_32_bit_are_loaded_as_16_unless_told_otherwise() -> None:
    wide = replace(LLAMA, dtype="float32")
    loaded, kept = (a_fit(*more, architecture=wide) for more in ((), ("--dtype", "float32")))
    assert (part(kept, "weights").mib or 0) == pytest.approx(2 * (part(loaded, "weights").mib or 0))
    assert (part(kept, "KV cache").mib or 0) == pytest.approx(
        2 * (part(loaded, "KV cache").mib or 0)
    )


def test_what_an_earlier_start_measured_replaces_what_was_guessed() -> None:
    seen = lm.Measured(
        weights_mib=15_000, kv_cache_mib=40_000, context=8192, concurrency=39.0, peak_mib=56_500
    )
    fit = a_fit("--max-model-len", "8192", measured=seen)
    assert [(p.mib, p.origin) for p in fit.parts] == [
        (15_000, "measured"), (pytest.approx(40_000 / 39), "measured"), (1500, "measured"),
    ]  # fmt: skip
    other = a_fit("--max-model-len", "4096", measured=seen)
    assert part(other, "KV cache").origin == "estimated", "it was measured for another length"


def test_what_is_measured_is_never_called_tight() -> None:
    seen = lm.Measured(
        weights_mib=15_000, kv_cache_mib=7_000, context=8192, concurrency=6.8, peak_mib=23_500
    )
    place = a_place(memory_mib=20_500)
    assert a_fit("--max-model-len", "8192", place=place).verdict == "tight"
    assert a_fit("--max-model-len", "8192", place=place, measured=seen).verdict == "fits"


def test_an_unknown_cache_is_never_called_more_than_tight() -> None:
    fit = a_fit(architecture=lm.read_architecture({}), weights_bytes=GIB)
    assert part(fit, "KV cache").mib is None
    assert fit.verdict == "tight"
    assert "how its layers keep their KV cache" in fit.notes[0]


def test_heads_that_cannot_be_shared_are_an_obstacle_however_large_the_gpus() -> None:
    fit = a_fit(place=a_place(gpus=3))
    assert "its 32 attention heads cannot be shared by 3 GPUs" in fit.obstacles
    assert "its 8 KV heads cannot be shared by 3 GPUs" in fit.obstacles
    assert not fit.starts
    assert not a_fit(place=a_place(gpus=8)).obstacles
    assert not a_fit(architecture=ALL["qwen3-235b-a22b"], place=a_place(gpus=8)).obstacles


def test_more_than_the_model_was_made_for_is_an_obstacle() -> None:
    (said,) = a_fit("--max-model-len", "200K").obstacles
    assert said == "204,800 tokens are asked for, and it was made for 131,072"


def test_gpus_without_bfloat16_get_advice() -> None:
    old = a_place(compute_capability="7.5", gpu_name="Tesla T4")
    assert "Tesla T4 has no bfloat16: add --dtype half" in a_fit(place=old).notes
    assert a_fit("--dtype", "bfloat16", place=old).obstacles
    assert not a_fit("--dtype", "half", place=old).notes
    assert not a_fit(place=a_place(compute_capability="8.6")).notes


def test_large_gpus_compute_larger_batches_and_an_a100_does_not() -> None:
    def overhead(**changes: Any) -> float:
        return part(a_fit(place=a_place(**changes)), "overhead").mib or 0

    assert overhead(memory_mib=81_000) > overhead(memory_mib=60_000)
    assert overhead(memory_mib=81_000, gpu_name="NVIDIA A100-SXM4-80GB") == overhead(
        memory_mib=60_000
    )
    eager = a_fit("--enforce-eager")
    assert overhead() - (part(eager, "overhead").mib or 0) == lm.GRAPH_MIB * 32


# --- where it would fit ---------------------------------------------------------------------


def candidates(
    simulated: lm.SimulatedGpus, *arguments: str, state: lm.State | None = None, **changes: Any
) -> list[lm.Candidate]:
    given: dict[str, Any] = {"weights_bytes": LLAMA_BYTES, "architecture": LLAMA} | changes
    return lm.places_that_fit(
        wish=lm.engine_wish(arguments), hardware=simulated.read(), state=state or a_state(), **given
    )


def placements(found: list[lm.Candidate]) -> list[Any]:
    return [candidate.fit.place.placement for candidate in found]


def test_the_smallest_slice_that_a_card_could_be_cut_into_is_offered() -> None:
    simulated = lm.SimulatedGpus([lm.simulated_card("A100 80 GB")])
    gpu = simulated.gpus[0].uuid
    found = candidates(simulated, "--max-model-len", "8K")
    assert placements(found)[0] == lm.GpuPlacement(gpu_uuids=(gpu,))
    (cut,) = [c for c in found if c.to_cut]
    assert isinstance(cut.fit.place.placement, lm.MigPlacement)
    assert cut.fit.place.placement.profile == "3g.40gb"


def test_the_pair_that_nobody_has_is_offered_before_the_best_joined_one() -> None:
    simulated = lm.SimulatedGpus([lm.simulated_card("A100 80 GB")] * 4)
    uuids = [gpu.uuid for gpu in simulated.gpus]
    busy = a_state(*(a_model(f"m{n}", placement=on_gpus(uuids[n])) for n in (0, 1)))
    offered = placements(candidates(simulated, state=busy))
    pairs = [
        {*p.gpu_uuids} for p in offered if isinstance(p, lm.GpuPlacement) and len(p.gpu_uuids) == 2
    ]
    assert pairs[0] == {*uuids[2:]}
    found = candidates(simulated, "--max-model-len", "8K", state=busy)
    assert lm.free_gpus(found) == [uuids[2]], "one is enough, and nobody has it"


def test_a_model_that_is_in_the_way_is_named_and_the_place_comes_last() -> None:
    simulated = lm.SimulatedGpus([lm.simulated_card("A100 80 GB"), lm.simulated_card("A100 80 GB")])
    first, second = (gpu.uuid for gpu in simulated.gpus)
    other = a_model("other", placement=on_gpus(first))
    found = candidates(simulated, state=a_state(other))
    assert placements(found)[0] == lm.GpuPlacement(gpu_uuids=(second,))
    taken = {c.fit.place.placement: c.taken_by for c in found if not c.to_cut}
    assert taken[lm.GpuPlacement(gpu_uuids=(first,))] == ("other",)
    itself = candidates(simulated, state=a_state(other), model="other")
    assert not any(c.taken_by for c in itself)


def test_a_model_too_large_for_one_gpu_is_offered_several() -> None:
    simulated = lm.SimulatedGpus([lm.simulated_card("A100 80 GB")] * 4)
    found = candidates(
        simulated, "--max-model-len", "8K", weights_bytes=141_107_412_992,
        architecture=ALL["llama-3.1-70b"],
    )  # fmt: skip
    four, two = found
    assert (four.fit.place.tensor_parallel, four.fit.verdict) == (4, "roomy")
    assert (two.fit.place.tensor_parallel, two.fit.verdict) == (2, "tight")


def test_existing_slices_are_offered_with_whoever_is_on_them() -> None:
    simulated = lm.SimulatedGpus([lm.simulated_card("A100 80 GB")])
    gpu = simulated.gpus[0].uuid
    simulated.set_mig_mode(gpu, enabled=True)
    for start in (0, 4):
        simulated.create_slice(gpu, ("3g.40gb", start))
    mine = a_model("mine", placement=on_slice("3g.40gb", 0, gpu))
    state = a_state(mine, mig_layouts=(a_layout(("3g.40gb", 0), ("3g.40gb", 4), gpu=gpu),))
    found = candidates(simulated, "--max-model-len", "8K", state=state)
    assert placements(found) == [on_slice("3g.40gb", 4, gpu), on_slice("3g.40gb", 0, gpu)]
    assert [c.taken_by for c in found] == [(), ("mine",)]


def test_nothing_is_offered_where_nothing_fits() -> None:
    assert candidates(lm.SimulatedGpus([])) == []
    assert candidates(lm.SimulatedGpus([lm.simulated_card("A30")]), weights_bytes=400 * GIB) == []


# --- what the operator reads ------------------------------------------------------------------


def test_the_sum_reads_as_a_sum() -> None:
    fit = a_fit("--max-model-len", "32K", place=a_place(memory_mib=30_000))
    assert lm.fit_lines(fit) == [
        "GPU 0: fits",
        "weights   15.0 GiB  known",
        "KV cache   4.0 GiB  estimated, for 1 request of 32,768 tokens",
        "overhead   1.6 GiB  estimated",
        "          --------",
        "together  20.5 GiB  of 27.0 GiB, which is 92% of its memory",
        "Longest request that fits: 85,520 tokens.",
        "Room for 2.6 requests of 32,768 tokens at a time.",
    ]


def test_the_picture_holds_no_foreign_markup_and_all_parts() -> None:
    place = replace(a_place(), title='<script>alert("x")</script>')
    drawn = lm.fit_html(a_fit(place=place))
    assert "<script" not in drawn
    assert all(f'class="{name}"' in drawn for name in ("fit-weights", "fit-kv-cache", "fit-free"))
    assert "71.9 GiB <span>92% of its memory</span>" in drawn
    widths = [float(text.split("%")[0]) for text in drawn.split("width:")[1:]]
    assert sum(widths) == pytest.approx(100, abs=0.05)
    for name in ("fit-weights", "fit-kv-cache", "fit-overhead", "fit-free", "fit-budget"):
        assert f".{name}" in lm.FIT_STYLE


@settings(max_examples=25)
@given(some_model, st.integers(1, 200_000), st.integers(0, 500))
def test_every_sum_can_be_drawn(model: lm.Architecture, memory_mib: int, gib: int) -> None:
    fit = lm.estimate(gib * GIB, model, lm.EngineWish(), a_place(memory_mib=memory_mib))
    assert lm.fit_html(fit).count("<div") == lm.fit_html(fit).count("</div>")
    assert lm.fit_lines(fit)


def test_places_fill_a_table() -> None:
    found = candidates(lm.SimulatedGpus([lm.simulated_card("A100 80 GB")]), "--max-model-len", "8K")
    rows = lm.place_rows(found)
    assert {len(row) for row in rows} == {len(lm.PLACE_HEADERS)}
    assert rows[0][0] == "GPU 0"
    assert rows[0][-1] == "free"
    assert rows[1][-1] == "free, to be cut"
    assert GPU_1 not in str(rows)
