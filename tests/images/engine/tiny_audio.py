"""Make a tiny Stable Audio pipeline with random weights (0.2 MB): tiny_audio.py OUT

vLLM-Omni answers /v1/audio/speech and /v1/audio/generate with it.
"""

import pathlib
import sys

import torch
from diffusers import (
    AutoencoderOobleck,
    EDMDPMSolverMultistepScheduler,
    StableAudioDiTModel,
    StableAudioPipeline,
)
from diffusers.pipelines.stable_audio.modeling_stable_audio import StableAudioProjectionModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

out = pathlib.Path(sys.argv[1])
torch.manual_seed(0)
a = sorted(pre_tokenizers.ByteLevel.alphabet())
v = {"<pad>": 0, "</s>": 1, "<unk>": 2}
for c in a:
    v[c] = len(v)
t = Tokenizer(models.BPE(vocab=v, merges=[], unk_token="<unk>"))
t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
t.decoder = decoders.ByteLevel()
t.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
tok = PreTrainedTokenizerFast(
    tokenizer_object=t, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=32
)
te = T5EncoderModel(
    T5Config(
        vocab_size=len(v),
        d_model=32,
        d_kv=8,
        d_ff=37,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
)
SR = 8000
vae = AutoencoderOobleck(
    encoder_hidden_size=6,
    downsampling_ratios=[4, 8],
    decoder_channels=3,
    decoder_input_channels=3,
    audio_channels=2,
    channel_multiples=[2, 4],
    sampling_rate=SR,
)
dit = StableAudioDiTModel(
    sample_size=SR // 32,
    in_channels=3,
    num_layers=2,
    attention_head_dim=4,
    num_attention_heads=2,
    num_key_value_attention_heads=2,
    out_channels=3,
    cross_attention_dim=4,
    time_proj_dim=8,
    global_states_input_dim=8,
    cross_attention_input_dim=4,
)
proj = StableAudioProjectionModel(
    text_encoder_dim=32, conditioning_dim=4, min_value=0, max_value=32
)
p = StableAudioPipeline(
    vae=vae,
    text_encoder=te,
    projection_model=proj,
    tokenizer=tok,
    transformer=dit,
    scheduler=EDMDPMSolverMultistepScheduler(
        solver_order=2, prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential"
    ),
)
p.save_pretrained(str(out))
print(p("hi", num_inference_steps=2, audio_end_in_s=0.5).audios[0].shape)
