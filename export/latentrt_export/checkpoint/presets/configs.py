"""The configurations of published models, as their checkpoints on the hub have them (defaults left out)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Config = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Preset:
    """One model: its networks by folder (class and config), tokenizers by folder (padding token) and scheduler."""

    model: str
    pipeline: str
    networks: Mapping[str, tuple[str, Config]]
    tokenizers: Mapping[str, str]
    scheduler: Config
    index: Config = field(default_factory=dict)


_DOWN, _UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
_UNET: Config = {
    "act_fn": "silu",
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": [_DOWN, _DOWN, _DOWN, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", _UP, _UP, _UP],
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
}
_VAE: Config = {
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
}
_CLIP_L: Config = {  # openai/clip-vit-large-patch14
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
    "vocab_size": 49408,
}
_OPENCLIP_H: Config = {  # laion/CLIP-ViT-H-14, its last layer left out
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "projection_dim": 512,
}
_OPENCLIP_G: Config = {  # laion/CLIP-ViT-bigG-14
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}
_BETAS: Config = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
_NO_CHECKER: Config = {
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
}
_END = "<|endoftext|>"


def _sd(model: str, unet: Config, vae: Config, text: Config, pad: str, scheduler: Config) -> Preset:
    networks = {
        "text_encoder": ("CLIPTextModel", _CLIP_L | text),
        "unet": ("UNet2DConditionModel", _UNET | unet),
        "vae": ("AutoencoderKL", _VAE | vae),
    }
    return Preset(model, "StableDiffusionPipeline", networks, {"tokenizer": pad}, _BETAS | scheduler, _NO_CHECKER)


_PNDM: Config = {"_class_name": "PNDMScheduler"}
PRESETS: Mapping[str, Preset] = {
    "sd15": _sd(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        {"attention_head_dim": 8, "cross_attention_dim": 768, "sample_size": 64},
        {"sample_size": 512},
        {},
        _END,
        _PNDM,
    ),
    "sd15-small": _sd(
        "stable-diffusion-v1-5/stable-diffusion-v1-5 with fewer channels and layers",
        {
            "attention_head_dim": 8,
            "block_out_channels": [32, 64, 128, 128],
            "cross_attention_dim": 64,
            "layers_per_block": 1,
            "norm_num_groups": 16,
            "sample_size": 64,
        },
        {"block_out_channels": [16, 32, 64, 64], "layers_per_block": 1, "norm_num_groups": 16, "sample_size": 512},
        {
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "projection_dim": 64,
        },
        _END,
        _PNDM,
    ),
    "sd21": _sd(
        "stabilityai/stable-diffusion-2-1",
        {
            "attention_head_dim": [5, 10, 20, 20],
            "cross_attention_dim": 1024,
            "sample_size": 96,
            "upcast_attention": True,
            "use_linear_projection": True,
        },
        {"sample_size": 768},
        _OPENCLIP_H,
        "!",
        {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
    ),
    "sdxl": Preset(
        "stabilityai/stable-diffusion-xl-base-1.0",
        "StableDiffusionXLPipeline",
        {
            "text_encoder": ("CLIPTextModel", _CLIP_L),
            "text_encoder_2": ("CLIPTextModelWithProjection", _CLIP_L | _OPENCLIP_G),
            "unet": (
                "UNet2DConditionModel",
                _UNET
                | {
                    "addition_embed_type": "text_time",
                    "addition_embed_type_num_heads": 64,
                    "addition_time_embed_dim": 256,
                    "attention_head_dim": [5, 10, 20],
                    "block_out_channels": [320, 640, 1280],
                    "cross_attention_dim": 2048,
                    "down_block_types": ["DownBlock2D", _DOWN, _DOWN],
                    "up_block_types": [_UP, _UP, "UpBlock2D"],
                    "projection_class_embeddings_input_dim": 2816,
                    "sample_size": 128,
                    "transformer_layers_per_block": [1, 2, 10],
                    "use_linear_projection": True,
                },
            ),
            "vae": ("AutoencoderKL", _VAE | {"force_upcast": True, "sample_size": 1024, "scaling_factor": 0.13025}),
        },
        {"tokenizer": _END, "tokenizer_2": "!"},
        _BETAS
        | {
            "_class_name": "EulerDiscreteScheduler",
            "interpolation_type": "linear",
            "prediction_type": "epsilon",
            "sample_max_value": 1.0,
            "timestep_spacing": "leading",
            "use_karras_sigmas": False,
        },
        {"force_zeros_for_empty_prompt": True},
    ),
}
