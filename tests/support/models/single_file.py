"""Small random models of every family as diffusers folders, and the single files that trainers of LDM would have saved.

The names are made from diffusers' by rules of their own, not by the export's tables.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from latentrt_export.checkpoint.configs import write_json, write_tokenizer
from latentrt_export.checkpoint.presets.configs import PRESETS

Tensors = dict[str, Tensor]
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
LAYERS = 1  # resnets of each block
CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [32, 64],
    "layers_per_block": LAYERS,
    "latent_channels": 4,
}
UNET: Mapping[str, Mapping[str, Any]] = {
    "sd1": {
        "block_out_channels": [32, 64],
        "down_block_types": [CROSS_DOWN, "DownBlock2D"],
        "up_block_types": ["UpBlock2D", CROSS_UP],
        "attention_head_dim": 8,
        "cross_attention_dim": 64,
        "sample_size": 64,
    },
    "sd2": {
        "block_out_channels": [64, 128],
        "down_block_types": [CROSS_DOWN, "DownBlock2D"],
        "up_block_types": ["UpBlock2D", CROSS_UP],
        "attention_head_dim": [1, 2],
        "cross_attention_dim": 64,
        "use_linear_projection": True,
        "sample_size": 96,
    },
    "xl": {
        "block_out_channels": [64, 64, 128],
        "down_block_types": ["DownBlock2D", CROSS_DOWN, CROSS_DOWN],
        "up_block_types": [CROSS_UP, CROSS_UP, "UpBlock2D"],
        "attention_head_dim": [1, 1, 2],
        "cross_attention_dim": 64 + 128,
        "transformer_layers_per_block": [1, 1, 2],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 16,
        "projection_class_embeddings_input_dim": 6 * 16 + 64,
        "sample_size": 128,
    },
}
UNET = {
    **UNET,
    "xl-refiner": {**UNET["xl"], "cross_attention_dim": 128, "projection_class_embeddings_input_dim": 5 * 16 + 64},
}
DISTILLED: Mapping[str, Mapping[str, Any]] = {
    "sd1": {"mid_block_type": None},  # as segmind/tiny-sd
    "xl": {  # as segmind/SSD-1B
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": [1, 1, 2],
        "reverse_transformer_layers_per_block": [[3, 2], [1, 2], 1],
    },
}
TEXTS = {  # name: width, layers, activation, whether it has OpenCLIP's names
    "sd1": {"text_encoder": (64, 2, "quick_gelu", "")},
    "sd2": {"text_encoder": (64, 2, "gelu", "cond_stage_model.model.")},
    "xl": {
        "text_encoder": (64, 2, "quick_gelu", ""),
        "text_encoder_2": (128, 3, "gelu", "conditioner.embedders.1.model."),
    },
    "xl-refiner": {"text_encoder_2": (128, 3, "gelu", "conditioner.embedders.0.model.")},
}
CLIP = {"sd1": "cond_stage_model.transformer.text_model.", "xl": "conditioner.embedders.0.transformer.text_model."}
PRESET = {"sd1": "sd15", "sd2": "sd21", "xl": "sdxl", "xl-refiner": "sdxl"}
PIPELINES = {"sd1": "StableDiffusion", "sd2": "StableDiffusion", "xl": "StableDiffusionXL"}
TASKS = {9: "Inpaint", 8: "InstructPix2Pix"}  # by the UNet's channels
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_NAMES = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embed.cond_proj",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks",
    "layer_norm": "ln_",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def networks_of(
    family: str, *, channels: int = 4, distilled: bool = False, guidance: int | None = None
) -> dict[str, nn.Module]:
    """Return a family's small networks with random weights.

    Args:
        family: sd1, sd2, xl or xl-refiner.
        channels: that the UNet reads; nine for inpainting, eight for pix2pix.
        guidance: numbers of the guidance embedding that it reads (LCM).
        distilled: leave layers out of the UNet as distilled models do.
    """
    torch.manual_seed(0)
    networks: dict[str, nn.Module] = {}
    for name, (width, layers, activation, _) in TEXTS[family].items():
        config = CLIPTextConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            hidden_act=activation,
            projection_dim=64,
            vocab_size=49_408,
            bos_token_id=0,
            eos_token_id=2,
            pad_token_id=1,
        )
        networks[name] = (CLIPTextModelWithProjection if name.endswith("2") else CLIPTextModel)(config)
    scale = {"scaling_factor": 0.13025} if family.startswith("xl") else {}
    changes = DISTILLED[family] if distilled else {}
    networks["unet"] = UNet2DConditionModel(
        **{**UNET[family], **changes}, in_channels=channels, layers_per_block=LAYERS, time_cond_proj_dim=guidance
    )
    networks["vae"] = AutoencoderKL(**VAE, **scale)
    for network in networks.values():
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return networks


def write_reference(family: str, folder: Path, networks: Mapping[str, nn.Module], **scheduler: Any) -> Path:
    """Write the same model as a diffusers folder, as people pass it to from_single_file's `config`."""
    preset = PRESETS[PRESET[family]]
    channels = networks["unet"].config["in_channels"]
    index: dict[str, Any] = {
        "_class_name": PIPELINES.get(family, "StableDiffusionXLImg2Img") + "Pipeline",
        **preset.index,
    }
    if channels in TASKS:
        index["_class_name"] = f"{PIPELINES[family]}{TASKS[channels]}Pipeline"
    elif family == "sd1" and networks["unet"].config["time_cond_proj_dim"]:
        index["_class_name"] = "LatentConsistencyModelPipeline"
    for name, network in networks.items():
        network.save_pretrained(folder / name)
        index[name] = ["transformers" if name.startswith("text") else "diffusers", type(network).__name__]
        if name.startswith("text"):
            tokenizer = name.replace("text_encoder", "tokenizer")
            write_tokenizer(folder / tokenizer, preset.tokenizers[tokenizer])
            index[tokenizer] = ["transformers", "CLIPTokenizer"]
    config = {**preset.scheduler, **scheduler}
    index["scheduler"] = ["diffusers", config["_class_name"]]
    if family == "xl-refiner":
        index |= {"text_encoder": [None, None], "tokenizer": [None, None], "requires_aesthetics_score": True}
        index["force_zeros_for_empty_prompt"] = False
    write_json(folder / "scheduler" / "scheduler_config.json", config)
    write_json(folder / "model_index.json", index)
    return folder


def single_tensors(family: str, networks: Mapping[str, nn.Module]) -> Tensors:
    """Return the tensors of the single file, with what such files have besides."""
    tensors: Tensors = {"alphas_cumprod": torch.ones(1000), "model_ema.decay": torch.tensor(0.9999)}
    for name, network in networks.items():
        state = {key.removeprefix("text_model."): value for key, value in network.state_dict().items()}
        if name == "unet":
            tensors |= {f"model.diffusion_model.{unet_name(key, state)}": value for key, value in state.items()}
        elif name == "vae":
            tensors |= {f"first_stage_model.{key}": value for key, value in vae_tensors(state).items()}
        elif prefix := TEXTS[family][name][3]:
            tensors |= {prefix + key: value for key, value in open_clip(state, cut=family == "sd2").items()}
        else:
            tensors |= {CLIP[family] + key: value for key, value in state.items()}
            tensors[f"{CLIP[family]}embeddings.position_ids"] = torch.arange(77)[None]
    return tensors


def averaged(tensors: Tensors) -> Tensors:
    """Return another UNet under the names that LDM's trainer gives to averages."""
    unet = {name: tensor for name, tensor in tensors.items() if name.startswith("model.diffusion_model.")}
    return {f"model_ema.{name[6:].replace('.', '')}": tensor + 1 for name, tensor in unet.items()}


def unet_name(name: str, names: Mapping[str, Any], layers: int = LAYERS) -> str:
    """Return LDM's name of a UNet's weight."""
    for ours, theirs in UNET_NAMES.items():
        if name.startswith(f"{ours}."):
            return name.replace(ours, theirs)
    if found := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
        place = 1 if found[1] == "attentions" else 2 * int(found[2])
        return f"middle_block.{place}.{_inner(found[1], found[3])}"
    found = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", name)
    assert found, name
    down, block, kind, layer = found[1] == "down", int(found[2]), found[3], int(found[4])
    if kind == "downsamplers":
        return f"input_blocks.{(block + 1) * (layers + 1)}.0.op.{found[5].removeprefix('conv.')}"
    if kind == "upsamplers":
        attends = any(other.startswith(f"up_blocks.{block}.attentions") for other in names)
        return f"output_blocks.{(block + 1) * (layers + 1) - 1}.{1 + attends}.{found[5]}"
    number = block * (layers + 1) + layer + down
    return f"{'input' if down else 'output'}_blocks.{number}.{int(kind == 'attentions')}.{_inner(kind, found[5])}"


def vae_tensors(state: Tensors) -> Tensors:
    """Return a VAE's weights under LDM's names, its attention as convolutions."""
    last = len(VAE["block_out_channels"]) - 1
    return {vae_name(name, last): _as_convolution(name, tensor) for name, tensor in state.items()}


def vae_name(name: str, last: int) -> str:
    """Return LDM's name of a VAE's weight; `last` is the number of its innermost block."""
    name = re.sub(r"(down|up)_blocks\.(\d+)", lambda found: f"{found[1]}.{_turned(found, last)}", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    name = re.sub(r"(down|up)samplers\.0", r"\1sample", name.replace("resnets", "block"))
    name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("conv_shortcut", "nin_shortcut")
    for ours, theirs in (("group_norm", "norm"), ("to_out.0", "proj_out"), ("to_", ""), ("conv_norm_out", "norm_out")):
        name = name.replace(ours, theirs)
    return name


def open_clip(state: Tensors, *, cut: bool) -> Tensors:
    """Return a text encoder's weights as OpenCLIP has them; where one layer is cut off, with one more."""
    tensors: Tensors = {"logit_scale": torch.tensor(4.6)}
    for name, tensor in state.items():
        if name == "text_projection.weight":
            tensors["text_projection"] = tensor.T.contiguous()
        elif ".self_attn.q_proj." in name:
            stacked = torch.cat([state[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")])
            tensors[_open_clip_name(name).replace("self_attn.q_proj.", "attn.in_proj_")] = stacked
        elif not re.search(r"self_attn\.[kv]_proj", name):
            tensors[_open_clip_name(name)] = tensor
    if cut:
        number = 1 + max(int(found[1]) for name in tensors if (found := re.search(r"resblocks\.(\d+)\.", name)))
        more = {name: tensor for name, tensor in tensors.items() if ".resblocks.0." in name}
        tensors |= {name.replace(".0.", f".{number}.", 1): tensor + 1 for name, tensor in more.items()}
        tensors["text_projection"] = torch.eye(state["final_layer_norm.weight"].numel())
    return tensors


def _inner(kind: str, rest: str) -> str:
    part, _, end = rest.rpartition(".")
    return rest if kind == "attentions" else f"{RESNET[part]}.{end}"


def _turned(found: re.Match[str], last: int) -> int:
    """LDM numbers the blocks up from the outermost, diffusers from the innermost."""
    return last - int(found[2]) if found[1] == "up" else int(found[2])


def _as_convolution(name: str, tensor: Tensor) -> Tensor:
    return tensor[:, :, None, None] if re.search(r"attentions\.0\.to_.*weight", name) else tensor


def _open_clip_name(name: str) -> str:
    for ours, theirs in OPEN_CLIP.items():
        name = name.replace(ours, theirs)
    return name


def write_single(
    path: Path, tensors: Tensors, *, metadata: Mapping[str, str] | None = None, order: Sequence[str] | None = None
) -> Path:
    """Write a safetensors file whose tensors lie in a given order; safetensors itself sorts them."""
    order = order or list(tensors)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": DTYPES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    data = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(data).to_bytes(8, "little") + data)
        for name in order:
            file.write(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return path
