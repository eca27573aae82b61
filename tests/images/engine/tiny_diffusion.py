"""Make a tiny Stable Diffusion pipeline with random weights (5 MB): tiny_diffusion.py OUT"""

import json
import pathlib
import sys

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

out = pathlib.Path(sys.argv[1])
torch.manual_seed(0)
unet = UNet2DConditionModel(
    block_out_channels=(32, 64),
    layers_per_block=1,
    sample_size=16,
    in_channels=4,
    out_channels=4,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=32,
    norm_num_groups=8,
)
# four blocks: latents are 1/8 of the picture, which keeps the engine's 512x512 warm-up cheap
vae = AutoencoderKL(
    block_out_channels=[16, 16, 16, 32],
    in_channels=3,
    out_channels=3,
    down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4,
    latent_channels=4,
    norm_num_groups=8,
    layers_per_block=1,
)
a = sorted(ByteLevel.alphabet())
vocab = {c: i for i, c in enumerate(a)}
for c in a:
    vocab[c + "</w>"] = len(vocab)
for s in ("<|startoftext|>", "<|endoftext|>"):
    vocab[s] = len(vocab)
tdir = out / "tokenizer"
tdir.mkdir(parents=True, exist_ok=True)
(tdir / "vocab.json").write_text(json.dumps(vocab))
(tdir / "merges.txt").write_text("#version: 0.2\n")
tok = CLIPTokenizer.from_pretrained(str(tdir), model_max_length=77)
text = CLIPTextModel(
    CLIPTextConfig(
        hidden_size=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        vocab_size=len(vocab),
        bos_token_id=vocab["<|startoftext|>"],
        eos_token_id=vocab["<|endoftext|>"],
        pad_token_id=vocab["<|endoftext|>"],
        projection_dim=32,
    )
)
p = StableDiffusionPipeline(
    vae=vae,
    text_encoder=text,
    tokenizer=tok,
    unet=unet,
    scheduler=PNDMScheduler(skip_prk_steps=True),
    safety_checker=None,
    feature_extractor=None,
    image_encoder=None,
    requires_safety_checker=False,
)
p.save_pretrained(str(out))
print(p("hi", num_inference_steps=2, height=32, width=32).images[0].size)
