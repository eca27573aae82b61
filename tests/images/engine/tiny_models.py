#!/usr/bin/env python3
"""Make tiny models that a real engine serves, with no download and no torch (1 to 4 MB each).

    python tiny_models.py OUT_DIR [chat vision embed rerank whisper]

The chat model is not random noise: its layers add nothing to the residual stream (o_proj and down_proj
are zero), its embeddings are random +-1 vectors, and the lm_head row of token n is the embedding of the
token that must come before n. So it is a Markov chain over tokens, run by a real Llama graph: the reply
is a fixed sentence, then the end token. The last token of the prompt picks the chain, so that the chat
template chooses between a plain answer, a tool call and an answer with reasoning:

    plain                            Hello from a tiny model.
    with tools                       get_weather({"city": "Paris"})    (parser hermes)
    enable_thinking in the template  <think> ... </think> Yes, indeed! (parser qwen3)
    transcription                    " This is a tiny transcript."
"""

import itertools
import json
import pathlib
import sys

import numpy as np
from safetensors.numpy import save_file
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

BYTES = 256  # the tokens of single bytes come first
HID, LAYERS, HEADS, KV, HD, FF = 128, 2, 4, 2, 32, 256
# every token here has two or more characters: single characters are the byte tokens
PLAIN = ["Hello", " from", " a", " tiny", " model.", "<|im_end|>"]
THINK = ["<think>", "\nIt", " is", " short.\n", "</think>", "\n\nYes,", " indeed!", "<|im_end|>"]
TOOL = [
    "<tool_call>",
    '\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n',
    "</tool_call>",
    "<|im_end|>",
]
STARTS = {"<|plain|>": PLAIN, "<|think|>": THINK, "<|tool|>": TOOL}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|plain|>", "<|think|>", "<|tool|>"]

TEMPLATE = """{%- for m in messages -%}
<|im_start|>{{ m.role }}
{%- if m.content is string %}
{{ m.content }}{% elif m.content %}{% for c in m.content %}{{ c.text if c.type == 'text' else '<image>' }}{% endfor %}{% endif %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% if tools %}<|tool|>{% elif enable_thinking %}<|think|>{% else %}<|plain|>{% endif %}{%- endif -%}"""


def byte_tokenizer(extra_special=(), extra_plain=()):
    """Byte-level tokenizer of 256 byte tokens plus added tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tok = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in extra_special])
    tok.add_tokens([AddedToken(t, special=False, normalized=False) for t in extra_plain])
    return tok


def w(rng, *shape, scale=0.02, dtype=np.float32):
    return (rng.standard_normal(shape) * scale).astype(dtype)


def dump(d, name, obj):
    (d / name).write_text(json.dumps(obj, indent=1, ensure_ascii=False))


def llama_weights(rng, vocab, embed, head, dtype):
    t = {
        "model.embed_tokens.weight": embed,
        "lm_head.weight": head,
        "model.norm.weight": np.ones(HID),
    }
    for i in range(LAYERS):
        p = f"model.layers.{i}."
        t |= {
            p + "input_layernorm.weight": np.ones(HID),
            p + "post_attention_layernorm.weight": np.ones(HID),
            p + "self_attn.q_proj.weight": w(rng, HEADS * HD, HID),
            p + "self_attn.k_proj.weight": w(rng, KV * HD, HID),
            p + "self_attn.v_proj.weight": w(rng, KV * HD, HID),
            p + "self_attn.o_proj.weight": np.zeros((HID, HEADS * HD)),
            p + "mlp.gate_proj.weight": w(rng, FF, HID),
            p + "mlp.up_proj.weight": w(rng, FF, HID),
            p + "mlp.down_proj.weight": np.zeros((HID, FF)),
        }
    return {k: np.ascontiguousarray(v.astype(dtype)) for k, v in t.items()}


def llama_config(vocab, eos, pad):
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": HID,
        "intermediate_size": FF,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV,
        "head_dim": HD,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "bos_token_id": None,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "torch_dtype": "float16",
    }


def scripted(rng, tok, chains):
    vocab = tok.get_vocab_size()
    vocab += -vocab % 64
    embed = rng.choice([-1.0, 1.0], size=(vocab, HID))
    embed[:256] = embed[0]  # all byte tokens look alike, so one rule covers them all
    ids = tok.get_vocab()
    eos = ids["<|im_end|>"]
    nxt = {}
    for start, chain in chains.items():
        prev = ids[start]
        for t in chain:
            assert nxt.get(prev, ids[t]) == ids[t], (start, t)
            nxt[prev] = ids[t]
            prev = ids[t]
    head = np.zeros((vocab, HID))
    for a, b in nxt.items():
        head[b] += embed[a]
    head[ids["Hello"]] += embed[0]  # /v1/completions: after any plain text, say the plain sentence
    return embed, head * 0.5, vocab, eos


def make_chat(out, rng):
    words = []
    for c in STARTS.values():
        words += [t for t in c if t not in SPECIAL and t not in words]
    tok = byte_tokenizer(SPECIAL, words)
    embed, head, vocab, eos = scripted(rng, tok, STARTS)
    ids = tok.get_vocab()
    out.mkdir(parents=True, exist_ok=True)
    tok.save(str(out / "tokenizer.json"))
    dump(
        out,
        "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "bos_token": None,
            "model_max_length": 4096,
            "clean_up_tokenization_spaces": False,
            "chat_template": TEMPLATE,
        },
    )
    dump(out, "config.json", llama_config(vocab, eos, ids["<|endoftext|>"]))
    dump(out, "generation_config.json", {"eos_token_id": eos, "pad_token_id": ids["<|endoftext|>"]})
    save_file(
        llama_weights(rng, vocab, embed, head, np.float16),
        str(out / "model.safetensors"),
        {"format": "pt"},
    )


def make_vision(out, rng):
    """LLaVA: CLIP tower of 2 layers (56x56 pixels, 16 patches) in front of the scripted Llama."""
    words = []
    for c in STARTS.values():
        words += [t for t in c if t not in SPECIAL and t not in words]
    tok = byte_tokenizer([*SPECIAL, "<image>"], words)
    embed, head, vocab, eos = scripted(rng, tok, STARTS)
    ids = tok.get_vocab()
    out.mkdir(parents=True, exist_ok=True)
    tok.save(str(out / "tokenizer.json"))
    dump(
        out,
        "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": "LlavaProcessor",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "bos_token": None,
            "model_max_length": 4096,
            "image_token": "<image>",
            "extra_special_tokens": {"image_token": "<image>"},
            "clean_up_tokenization_spaces": False,
            "chat_template": TEMPLATE,
        },
    )
    (out / "chat_template.jinja").write_text(TEMPLATE)
    px, patch, vh, vl, vf = 56, 14, 64, 2, 128
    dump(
        out,
        "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            "processor_class": "LlavaProcessor",
            "do_resize": True,
            "size": {"shortest_edge": px},
            "do_center_crop": True,
            "crop_size": {"height": px, "width": px},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "do_convert_rgb": True,
            "resample": 3,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        },
    )
    dump(
        out,
        "processor_config.json",
        {
            "processor_class": "LlavaProcessor",
            "patch_size": patch,
            "image_token": "<image>",
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
    )
    text = llama_config(vocab, eos, ids["<|endoftext|>"])
    dump(
        out,
        "config.json",
        {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "image_token_index": ids["<image>"],
            "projector_hidden_act": "gelu",
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "text_config": text,
            "torch_dtype": "float16",
            "tie_word_embeddings": False,
            "eos_token_id": eos,
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": vh,
                "intermediate_size": vf,
                "num_hidden_layers": vl,
                "num_attention_heads": 2,
                "image_size": px,
                "patch_size": patch,
                "projection_dim": vh,
                "hidden_act": "quick_gelu",
                "layer_norm_eps": 1e-5,
            },
        },
    )
    dump(out, "generation_config.json", {"eos_token_id": eos, "pad_token_id": ids["<|endoftext|>"]})
    t = {}
    for k, v in llama_weights(rng, vocab, embed, head, np.float16).items():
        t[k if k.startswith("lm_head") else k.replace("model.", "model.language_model.", 1)] = v
    p = "model.vision_tower.vision_model."
    t |= {
        p + "embeddings.class_embedding": w(rng, vh),
        p + "embeddings.patch_embedding.weight": w(rng, vh, 3, patch, patch),
        p + "embeddings.position_embedding.weight": w(rng, (px // patch) ** 2 + 1, vh),
    }
    for n in ("pre_layrnorm", "post_layernorm"):
        t |= {p + n + ".weight": np.ones(vh), p + n + ".bias": np.zeros(vh)}
    for i in range(vl):
        q = f"{p}encoder.layers.{i}."
        for n in ("layer_norm1", "layer_norm2"):
            t |= {q + n + ".weight": np.ones(vh), q + n + ".bias": np.zeros(vh)}
        for n in ("q_proj", "k_proj", "v_proj", "out_proj"):
            t |= {
                q + f"self_attn.{n}.weight": w(rng, vh, vh),
                q + f"self_attn.{n}.bias": np.zeros(vh),
            }
        t |= {
            q + "mlp.fc1.weight": w(rng, vf, vh),
            q + "mlp.fc1.bias": np.zeros(vf),
            q + "mlp.fc2.weight": w(rng, vh, vf),
            q + "mlp.fc2.bias": np.zeros(vh),
        }
    for n, (o, k) in {"linear_1": (HID, vh), "linear_2": (HID, HID)}.items():
        t |= {
            f"model.multi_modal_projector.{n}.weight": w(rng, o, k),
            f"model.multi_modal_projector.{n}.bias": np.zeros(o),
        }
    save_file(
        {k: np.ascontiguousarray(np.asarray(x).astype(np.float16)) for k, x in t.items()},
        str(out / "model.safetensors"),
        {"format": "pt"},
    )


def bert(out, rng, labels):
    """BERT: labels None is an embedding model (mean pooling), 1 a cross-encoder."""
    out.mkdir(parents=True, exist_ok=True)
    chars = [chr(c) for c in range(33, 127)]
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] + chars + ["##" + c for c in chars]
    v = {t: i for i, t in enumerate(vocab)}
    tok = Tokenizer(models.WordPiece(v, unk_token="[UNK]", max_input_chars_per_word=100))
    tok.normalizer = normalizers.BertNormalizer(lowercase=True)
    tok.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tok.decoder = decoders.WordPiece()
    tok.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tok.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    tok.save(str(out / "tokenizer.json"))
    (out / "vocab.txt").write_text("\n".join(vocab) + "\n")
    dump(
        out,
        "tokenizer_config.json",
        {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": True,
            "model_max_length": 512,
            "pad_token": "[PAD]",
            "unk_token": "[UNK]",
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
            "mask_token": "[MASK]",
        },
    )
    cfg = {
        "architectures": ["BertModel" if labels is None else "BertForSequenceClassification"],
        "model_type": "bert",
        "vocab_size": len(vocab),
        "hidden_size": HID,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": FF,
        "hidden_act": "gelu",
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "pad_token_id": 0,
        "position_embedding_type": "absolute",
        "torch_dtype": "float16",
    }
    if labels:
        cfg |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "num_labels": labels}
    dump(out, "config.json", cfg)
    pre = "" if labels is None else "bert."
    t = {
        pre + "embeddings.word_embeddings.weight": w(rng, len(vocab), HID, scale=1),
        pre + "embeddings.position_embeddings.weight": w(rng, 512, HID),
        pre + "embeddings.token_type_embeddings.weight": w(rng, 2, HID),
        pre + "embeddings.LayerNorm.weight": np.ones(HID, np.float32),
        pre + "embeddings.LayerNorm.bias": np.zeros(HID, np.float32),
    }
    for i in range(LAYERS):
        p = f"{pre}encoder.layer.{i}."
        for n, (o, k) in {
            "attention.self.query": (HID, HID),
            "attention.self.key": (HID, HID),
            "attention.self.value": (HID, HID),
            "attention.output.dense": (HID, HID),
            "intermediate.dense": (FF, HID),
            "output.dense": (HID, FF),
        }.items():
            t[p + n + ".weight"] = w(rng, o, k, scale=0.08)
            t[p + n + ".bias"] = np.zeros(o, np.float32)
        for n in ("attention.output.LayerNorm", "output.LayerNorm"):
            t[p + n + ".weight"] = np.ones(HID, np.float32)
            t[p + n + ".bias"] = np.zeros(HID, np.float32)
    t[pre + "pooler.dense.weight"] = w(rng, HID, HID, scale=0.08)
    t[pre + "pooler.dense.bias"] = np.zeros(HID, np.float32)
    if labels:
        t["classifier.weight"] = w(rng, labels, HID, scale=0.5)
        t["classifier.bias"] = np.zeros(labels, np.float32)
    else:
        dump(
            out,
            "modules.json",
            [
                {
                    "idx": 0,
                    "name": "0",
                    "path": "",
                    "type": "sentence_transformers.models.Transformer",
                },
                {
                    "idx": 1,
                    "name": "1",
                    "path": "1_Pooling",
                    "type": "sentence_transformers.models.Pooling",
                },
                {
                    "idx": 2,
                    "name": "2",
                    "path": "2_Normalize",
                    "type": "sentence_transformers.models.Normalize",
                },
            ],
        )
        (out / "1_Pooling").mkdir(exist_ok=True)
        dump(
            out / "1_Pooling",
            "config.json",
            {
                "word_embedding_dimension": HID,
                "pooling_mode_cls_token": False,
                "pooling_mode_mean_tokens": True,
                "pooling_mode_max_tokens": False,
                "pooling_mode_mean_sqrt_len_tokens": False,
            },
        )
        dump(out, "sentence_bert_config.json", {"max_seq_length": 512, "do_lower_case": False})
    save_file(
        {k: np.ascontiguousarray(x.astype(np.float16)) for k, x in t.items()},
        str(out / "model.safetensors"),
        {"format": "pt"},
    )


def make_embed(out, rng):
    bert(out, rng, None)


def make_rerank(out, rng):
    bert(out, rng, 1)


def make_whisper(out, rng):
    """Whisper: one layer each side, the decoder scripted; the engine expects its 30 s of frames."""
    out.mkdir(parents=True, exist_ok=True)
    d, ff, heads, mel, src, tgt = 128, 128, 4, 80, 1500, 448
    langs = (
        "en zh de es ru ko fr ja pt tr pl ca nl ar sv it id hi fi vi he uk el ms cs ro "
        "da hu ta no th ur hr bg lt la mi ml cy sk te fa lv bn sr az sl kn et mk br eu "
        "is hy ne mn bs kk sq sw gl mr pa si km sn yo so af oc ka be tg sd gu am yi lo "
        "uz fo ht ps tk nn mt sa lb my bo tl mg as tt haw ln ha ba jw su"
    ).split()
    special = (
        ["<|endoftext|>", "<|startoftranscript|>"]
        + [f"<|{x}|>" for x in langs]
        + [
            "<|translate|>",
            "<|transcribe|>",
            "<|startoflm|>",
            "<|startofprev|>",
            "<|nospeech|>",
            "<|notimestamps|>",
        ]
    )
    times = [f"<|{i * 0.02:.2f}|>" for i in range(1501)]
    words = [" This", " is", " a", " tiny", " transcript."]
    tok = byte_tokenizer(special, words)
    tok.add_tokens([AddedToken(t, special=False, normalized=False) for t in times])
    ids = tok.get_vocab()
    vocab = tok.get_vocab_size()
    embed = rng.choice([-1.0, 1.0], size=(vocab, d))
    # Whisper ties lm_head to the decoder's embedding, so head rows cannot hold the chain: the MLP of
    # its last layer does, as the map embed[a] -> embed[b] (of the chain's length in rank).
    chain = ["<|notimestamps|>", *words, "<|endoftext|>"]
    # response_format=verbose_json asks for timestamps
    timed = ["<|transcribe|>", "<|0.00|>", " This"]
    pairs = [(ids[a], ids[b]) for c in (chain, timed) for a, b in itertools.pairwise(c)]
    fc1 = np.zeros((ff, d))
    b1 = np.full(ff, 0.0)
    fc2 = np.zeros((d, ff))
    for j, (a, b) in enumerate(pairs):
        fc1[j] = embed[a] / d * 8  # = 8 when the token is a, ~N(0, 8/sqrt(d)) else
        b1[j] = -5.0
        fc2[:, j] = (embed[b] - embed[a]) * 3
    tok.post_processor = processors.TemplateProcessing(
        single="<|startoftranscript|> <|notimestamps|> $A <|endoftext|>",
        special_tokens=[
            (t, ids[t]) for t in ("<|startoftranscript|>", "<|notimestamps|>", "<|endoftext|>")
        ],
    )
    tok.save(str(out / "tokenizer.json"))
    enc_vocab = {t: i for t, i in ids.items() if i < BYTES}
    dump(out, "vocab.json", enc_vocab)
    (out / "merges.txt").write_text("#version: 0.2\n")
    dump(out, "normalizer.json", {})
    dump(
        out,
        "tokenizer_config.json",
        {
            "tokenizer_class": "WhisperTokenizer",
            "bos_token": "<|endoftext|>",
            "eos_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": 1024,
            "processor_class": "WhisperProcessor",
            "additional_special_tokens": special,
        },
    )
    dump(
        out,
        "preprocessor_config.json",
        {
            "feature_extractor_type": "WhisperFeatureExtractor",
            "processor_class": "WhisperProcessor",
            "feature_size": mel,
            "sampling_rate": 16000,
            "hop_length": 160,
            "chunk_length": 30,
            "n_fft": 400,
            "n_samples": 480000,
            "nb_max_frames": 3000,
            "padding_side": "right",
            "padding_value": 0.0,
            "return_attention_mask": False,
        },
    )
    e = ids["<|endoftext|>"]
    dump(
        out,
        "config.json",
        {
            "architectures": ["WhisperForConditionalGeneration"],
            "model_type": "whisper",
            "vocab_size": vocab,
            "d_model": d,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "num_hidden_layers": 1,
            "encoder_attention_heads": heads,
            "decoder_attention_heads": heads,
            "encoder_ffn_dim": ff,
            "decoder_ffn_dim": ff,
            "num_mel_bins": mel,
            "max_source_positions": src,
            "max_target_positions": tgt,
            "activation_function": "gelu",
            "scale_embedding": False,
            "bos_token_id": e,
            "eos_token_id": e,
            "pad_token_id": e,
            "decoder_start_token_id": ids["<|startoftranscript|>"],
            "is_encoder_decoder": True,
            "use_cache": True,
            "torch_dtype": "float32",
            "tie_word_embeddings": True,
        },
    )
    dump(
        out,
        "generation_config.json",
        {
            "eos_token_id": e,
            "pad_token_id": e,
            "bos_token_id": e,
            "decoder_start_token_id": ids["<|startoftranscript|>"],
            "is_multilingual": True,
            "lang_to_id": {f"<|{x}|>": ids[f"<|{x}|>"] for x in langs},
            "task_to_id": {"translate": ids["<|translate|>"], "transcribe": ids["<|transcribe|>"]},
            "no_timestamps_token_id": ids["<|notimestamps|>"],
            "max_length": 448,
        },
    )
    z = np.zeros
    o = np.ones
    t = {
        "model.encoder.conv1.weight": w(rng, d, mel, 3),
        "model.encoder.conv1.bias": z(d),
        "model.encoder.conv2.weight": w(rng, d, d, 3),
        "model.encoder.conv2.bias": z(d),
        "model.encoder.embed_positions.weight": w(rng, src, d),
        "model.encoder.layer_norm.weight": o(d),
        "model.encoder.layer_norm.bias": z(d),
        "model.decoder.embed_tokens.weight": embed,
        "model.decoder.embed_positions.weight": z((tgt, d)),
        "model.decoder.layer_norm.weight": o(d),
        "model.decoder.layer_norm.bias": z(d),
    }

    def attn(p):
        r = {}
        for n in "qkv":
            r[p + f"{n}_proj.weight"] = w(rng, d, d)
            if n != "k":
                r[p + f"{n}_proj.bias"] = z(d)
        r[p + "out_proj.weight"] = z((d, d))
        r[p + "out_proj.bias"] = z(d)
        return r

    for side in ("encoder", "decoder"):
        p = f"model.{side}.layers.0."
        t |= attn(p + "self_attn.")
        for n in ["self_attn_layer_norm", "final_layer_norm"] + (
            ["encoder_attn_layer_norm"] if side == "decoder" else []
        ):
            t[p + n + ".weight"] = o(d)
            t[p + n + ".bias"] = z(d)
        if side == "decoder":
            t |= attn(p + "encoder_attn.")
        dec = side == "decoder"
        t |= {
            p + "fc1.weight": fc1 if dec else w(rng, ff, d),
            p + "fc1.bias": b1 if dec else z(ff),
            p + "fc2.weight": fc2 if dec else w(rng, d, ff),
            p + "fc2.bias": z(d),
        }
    save_file(
        {k: np.ascontiguousarray(x.astype(np.float32)) for k, x in t.items()},
        str(out / "model.safetensors"),
        {"format": "pt"},
    )


MAKERS = {k[5:]: v for k, v in list(globals().items()) if k.startswith("make_")}
if __name__ == "__main__":
    root = pathlib.Path(sys.argv[1])
    for kind in sys.argv[2:] or MAKERS:
        MAKERS[kind](root / f"tiny-{kind}", np.random.default_rng(7))
        size = sum(f.stat().st_size for f in (root / f"tiny-{kind}").rglob("*") if f.is_file())
        print(f"tiny-{kind}: {size / 1e6:.2f} MB")
