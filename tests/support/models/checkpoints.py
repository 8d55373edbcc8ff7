"""Small random diffusers checkpoints, made on the spot: each has the structure of a real family and a fixed seed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = ("a n", "o n", "c a", "ca t</w>", "d o", "do g</w>")
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
Options = Mapping[str, Any]
AS_IT_IS: Options = {}
VERSION: Options = {"_diffusers_version": "0.42.1"}


def tiny_sd(
    folder: Path,
    *,
    unet: Options = AS_IT_IS,
    vae: Options = AS_IT_IS,
    text: Options = AS_IT_IS,
    scheduler: Options = AS_IT_IS,
    index: Options = AS_IT_IS,
    dtype: torch.dtype = torch.float32,
    pad: str = END,
    **save: Any,
) -> Path:
    """Write one like SD 1.5: float32, ε-prediction, PNDM, a tokenizer of vocab.json and merges.txt only.

    Args:
        folder: where it goes; it is also returned.
        unet, vae, text, scheduler, index: entries of the configs (and of model_index.json) to change.
        dtype: of the weights on disk.
        pad: the tokenizer's padding token.
        save: to the networks' save_pretrained (variant, max_shard_size).
    """
    size = write_tokenizer(folder / "tokenizer", pad)
    torch.manual_seed(0)
    networks: dict[str, nn.Module] = {
        "text_encoder": CLIPTextModel(text_config(size, **text)),
        "unet": UNet2DConditionModel(**(UNET | unet)),
        "vae": AutoencoderKL(**(VAE | vae)),
    }
    _save(folder, networks, dtype, save)
    pndm = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1}
    _json(folder / "scheduler" / "scheduler_config.json", pndm | BETAS | {"clip_sample": False} | scheduler)
    parts = {
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", (pndm | scheduler)["_class_name"]],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
    }
    _json(folder / "model_index.json", {"_class_name": "StableDiffusionPipeline"} | VERSION | parts | index)
    return folder


def tiny_sd2(
    folder: Path, *, unet: Options = AS_IT_IS, vae: Options = AS_IT_IS, index: Options = AS_IT_IS, **save: Any
) -> Path:
    """Write one like SD 2: float16 on disk, v-prediction, gelu text encoder, linear projections, head counts per block.

    `save` goes to the networks' save_pretrained (variant, max_shard_size).
    """
    return tiny_sd(
        folder,
        unet={"use_linear_projection": True, "attention_head_dim": [2, 4], **unet},
        vae=vae,
        index=index,
        text={"hidden_act": "gelu"},
        scheduler={"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
        dtype=torch.float16,
        pad="!",
        **save,
    )


def tiny_depth(folder: Path) -> Path:
    """Write one like SD 2's depth model: a UNet that reads a depth map too; the estimator of such maps is left out."""
    return tiny_sd2(
        folder,
        unet={"in_channels": 5},
        index={
            "_class_name": "StableDiffusionDepth2ImgPipeline",
            "depth_estimator": ["transformers", "DPTForDepthEstimation"],
            "feature_extractor": ["transformers", "DPTImageProcessor"],
            "safety_checker": [None, None],
        },
    )


def tiny_x4(folder: Path) -> Path:
    """Write one like the x4 upscaler: a UNet that reads a noisy picture and its noise level, a VAE of factor 4."""
    low = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
    _json(folder / "low_res_scheduler" / "scheduler_config.json", {"_class_name": "DDPMScheduler", **low})
    tiny_sd2(
        folder,
        unet={"in_channels": 7, "num_class_embeds": 1000, "only_cross_attention": [True, False]},
        index={
            "_class_name": "StableDiffusionUpscalePipeline",
            "low_res_scheduler": ["diffusers", "DDPMScheduler"],
            "max_noise_level": 350,
        },
        vae={
            "down_block_types": ["DownEncoderBlock2D"] * 3,
            "up_block_types": ["UpDecoderBlock2D"] * 3,
            "block_out_channels": (8, 16, 16),
            "scaling_factor": 0.08333,
        },
    )
    return folder


def tiny_x2(folder: Path) -> Path:
    """Write one like the latent upscaler: k-diffusion's blocks, a condition with the pooled text, clean latents out."""
    return tiny_sd(
        folder,
        unet={
            "in_channels": 8,
            "out_channels": 5,
            "block_out_channels": (32, 64, 64),  # the last as wide as the time: that block attends to itself
            "down_block_types": ("KDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D"),
            "mid_block_type": None,
            "up_block_types": ("KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KUpBlock2D"),
            "layers_per_block": 1,
            "attention_head_dim": 8,
            "act_fn": "gelu",
            "norm_num_groups": None,
            "conv_in_kernel": 1,
            "conv_out_kernel": 1,
            "cross_attention_norm": "layer_norm",
            "resnet_time_scale_shift": "scale_shift",
            "time_cond_proj_dim": 128 + 32,
            "time_embedding_dim": 64,
            "time_embedding_type": "fourier",
            "timestep_post_act": "gelu",
            "use_linear_projection": True,
        },
        scheduler={"_class_name": "EulerDiscreteScheduler", "prediction_type": "sample"},
        index={
            "_class_name": "StableDiffusionLatentUpscalePipeline",
            **{key: [None, None] for key in ("safety_checker", "feature_extractor")},
        },
    )


def tiny_sdxl(folder: Path, *, unet: Options = AS_IT_IS, second: Options = AS_IT_IS, index: Options = AS_IT_IS) -> Path:
    """Write one like SDXL: two text encoders, the second with a projection; sizes and pooled text as conditions.

    `unet`, `second` (the second text encoder) and `index` are as in `tiny_sd`.
    """
    size = write_tokenizer(folder / "tokenizer", END)
    write_tokenizer(folder / "tokenizer_2", "!")
    torch.manual_seed(0)
    networks = {
        "text_encoder": CLIPTextModel(text_config(size)),
        **_xl_networks(size, {"cross_attention_dim": 32 + 48, **unet}, second, sizes=6),
    }
    return _write_xl(folder, networks, {"_class_name": "StableDiffusionXLPipeline", **index})


def tiny_refiner(folder: Path) -> Path:
    """Write one like SDXL's refiner: the second text encoder alone, an aesthetic score as the last of five sizes."""
    size = write_tokenizer(folder / "tokenizer_2", "!")
    torch.manual_seed(0)
    networks = _xl_networks(size, {"cross_attention_dim": 48}, AS_IT_IS, sizes=5)
    index = {
        "_class_name": "StableDiffusionXLImg2ImgPipeline",
        "text_encoder": [None, None],
        "tokenizer": [None, None],
        "requires_aesthetics_score": True,
        "force_zeros_for_empty_prompt": False,
    }
    return _write_xl(folder, networks, index)


def _xl_networks(vocabulary: int, unet: Options, text: Options, sizes: int) -> dict[str, nn.Module]:
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": sizes * 8 + 24,
        "use_linear_projection": True,
        "transformer_layers_per_block": [1, 2],
    }
    second = {"hidden_size": 48, "intermediate_size": 96, "hidden_act": "gelu", "projection_dim": 24, **text}
    return {
        "text_encoder_2": CLIPTextModelWithProjection(text_config(vocabulary, **second)),
        "unet": UNet2DConditionModel(**(UNET | added | unet)),
        "vae": AutoencoderKL(**(VAE | {"scaling_factor": 0.13025})),
    }


def _write_xl(folder: Path, networks: dict[str, nn.Module], index: Options) -> Path:
    _save(folder, networks, torch.float32, {})
    euler = {"_class_name": "EulerDiscreteScheduler", "steps_offset": 1, "timestep_spacing": "leading"}
    _json(folder / "scheduler" / "scheduler_config.json", euler | BETAS)
    parts = {
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "force_zeros_for_empty_prompt": True,
    }
    _json(folder / "model_index.json", {**VERSION, **parts, **index})
    return folder


def tiny_vae(folder: Path, **config: Any) -> Path:
    """Write an AutoencoderTiny of random weights; without a config it has TAESD's structure. Return its folder."""
    torch.manual_seed(1)
    network = AutoencoderTiny(**config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    network.save_pretrained(folder, safe_serialization=True)
    return folder


def with_tiny_vae(folder: Path) -> Path:
    """Put an AutoencoderTiny with half as wide latents as pixels into the VAE's place of a checkpoint; return it."""
    shutil.rmtree(folder / "vae")
    tiny_vae(folder / "vae", **TINY_VAE)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    _json(folder / "model_index.json", index | {"vae": ["diffusers", "AutoencoderTiny"]})
    return folder


UNET: Options = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
VAE: Options = {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "sample_size": 16,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}


TINY_VAE: Options = {
    "encoder_block_out_channels": (16, 16),
    "decoder_block_out_channels": (16, 16),
    "num_encoder_blocks": (1, 2),
    "num_decoder_blocks": (2, 1),
}


def text_config(vocabulary: int, **changes: Any) -> CLIPTextConfig:
    """Return a small CLIP text encoder's config for a tokenizer of that many entries."""
    config = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "projection_dim": 32,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
    }
    return CLIPTextConfig(**(config | changes))


def write_tokenizer(folder: Path, pad: str) -> int:
    """Write vocab.json, merges.txt and tokenizer_config.json as older checkpoints have them; return the entries."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(ByteLevel.alphabet())
    merged = [merge.replace(" ", "") for merge in MERGES]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *merged, START, END]
    _json(folder / "vocab.json", {word: i for i, word in enumerate(words)})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]) + "\n", encoding="utf-8")
    tokens = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    rules = {"model_max_length": 77, "do_lower_case": True, "tokenizer_class": "CLIPTokenizer"}
    _json(folder / "tokenizer_config.json", tokens | rules)
    return len(words)


def rename_as_of_old(folder: Path) -> None:
    """Give the weights of an SD checkpoint the names they have on the hub: those of the diffusers of 2022."""
    _rename(folder / "text_encoder" / "model.safetensors", lambda name: f"text_model.{name}")
    rename_attentions(folder / "vae" / "diffusion_pytorch_model.safetensors")


def rename_attentions(path: Path) -> None:
    """Give the attentions of a VAE or a UNet of pixels their names of 2022."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(name: str) -> str:
        found = re.fullmatch(r"(.*\.attentions\.\d+)\.(.+)\.(weight|bias)", name)
        return f"{found[1]}.{old.get(found[2], found[2])}.{found[3]}" if found else name

    _rename(path, rename)


def _rename(path: Path, rename: Callable[[str], str]) -> None:
    save_file({rename(name): tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})


def _save(folder: Path, networks: Mapping[str, nn.Module], dtype: torch.dtype, options: Options) -> None:
    """Save with every parameter moved a little: norms start as ones and zeros, which would look alike."""
    for name, network in networks.items():
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        nn.Module.to(network, dtype).save_pretrained(folder / name, safe_serialization=True, **options)


def _json(path: Path, data: Options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(data), indent=2) + "\n", encoding="utf-8")
