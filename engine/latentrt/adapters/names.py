"""The names that LoRA files have for a model's modules: a dictionary, made from the names of the model's own weights.

| file | UNet | text encoders |
| --- | --- | --- |
| kohya | lora_unet_ and a flattened name, of diffusers' layout or LDM's | lora_te_, lora_te1_, lora_te2_, flattened |
| diffusers | unet.NAME | text_encoder.NAME, text_encoder_2.NAME |
| diffusers of 2023 | ....attn1.processor.to_q_lora, with and without `unet.` | ....self_attn.to_q_lora |
| peft | base_model.model.NAME | base_model.model.NAME |
| ComfyUI | diffusion_model.NAME, of LDM's layout | |

A name is flattened by writing "_" for ".". The way back is not unique, so that names are looked up here and never
rewritten.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

UNET, TEXT, TEXT_2 = "unet", "text_encoder", "text_encoder_2"
PEFT = "base_model.model."
TEXT_MODEL = "text_model."
FLAT = {UNET: ("lora_unet_",), TEXT: ("lora_te_", "lora_te1_"), TEXT_2: ("lora_te2_",)}
# LDM's names of what lies within a resnet, and of modules that stand alone.
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ALONE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embed.cond_proj",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
MIDDLE = {"resnets.0": "middle_block.0", "attentions.0": "middle_block.1", "resnets.1": "middle_block.2"}
OLD_UNET = {"to_q": "to_q_lora", "to_k": "to_k_lora", "to_v": "to_v_lora", "to_out.0": "to_out_lora"}
OLD_TEXT = {"q_proj": "to_q_lora", "k_proj": "to_k_lora", "v_proj": "to_v_lora", "out_proj": "to_out_lora"}
_ATTENTION = re.compile(r"(.*\.attn[12])\.(to_q|to_k|to_v|to_out\.0)")
_SELF = re.compile(r"(.*\.self_attn)\.(q_proj|k_proj|v_proj|out_proj)")
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_PART = re.compile(r"mid_block\.((?:resnets|attentions)\.\d+)\.(.+)")


class Module(NamedTuple):
    """A module of a model: its network, and what the names of its weights begin with in the network's safetensors."""

    network: str
    name: str


Names = Mapping[str, Module]


def dictionary(weights: Mapping[str, Iterable[str]]) -> dict[str, Module]:
    """Return the module for each name that a file may have for it.

    Args:
        weights: the names of the tensors of each network ("unet", "text_encoder", "text_encoder_2").
    """
    names: dict[str, Module] = {}
    modules = {network: _modules(own) for network, own in weights.items()}
    if UNET in modules:
        ldm = ldm_names(modules[UNET])
        for name in modules[UNET]:
            names |= dict.fromkeys(_of_unet(name, ldm.get(name)), Module(UNET, name))
    texts = [network for network in modules if network != UNET]
    for network in texts:
        for name in modules[network]:
            for each in _of_text(network, name, alone=len(texts) == 1):
                names.setdefault(each, Module(network, name))
    return names


def ldm_names(modules: Collection[str]) -> dict[str, str]:
    """Return LDM's name of each of a UNet's modules, given by diffusers' names; some have none."""
    layers = sum(re.fullmatch(r"down_blocks\.0\.resnets\.\d+\.conv1", name) is not None for name in modules)
    found = {name: _ldm_name(name, modules, layers) for name in modules}
    return {name: ldm for name, ldm in found.items() if ldm is not None}


def _ldm_name(name: str, modules: Collection[str], layers: int) -> str | None:
    """Return LDM's name of a module of a UNet with so many resnets in each block on the way down."""
    if name in ALONE:
        return ALONE[name]
    if middle := _PART.fullmatch(name):
        place, rest = middle.groups()
        return f"{MIDDLE[place]}.{RESNET.get(rest, rest)}" if place in MIDDLE else None
    if (block := _BLOCK.fullmatch(name)) is None:
        return None
    way, number, kind, layer, rest = block.groups()
    first = int(number) * (layers + 1)
    if kind == "downsamplers":
        return f"input_blocks.{first + layers + 1}.0.op"
    if kind == "upsamplers":
        place = 2 if f"up_blocks.{number}.attentions.0.proj_in" in modules else 1
        return f"output_blocks.{first + layers}.{place}.{rest}"
    home = f"input_blocks.{first + int(layer) + 1}" if way == "down" else f"output_blocks.{first + int(layer)}"
    return f"{home}.0.{RESNET.get(rest, rest)}" if kind == "resnets" else f"{home}.1.{rest}"


def _modules(weights: Iterable[str]) -> dict[str, None]:
    """Return the modules of these weights, in their order."""
    return dict.fromkeys(name.rpartition(".")[0] for name in weights if name.endswith((".weight", ".bias")))


def _of_unet(name: str, ldm: str | None) -> Iterator[str]:
    for layout in (name, *([ldm] if ldm else [])):
        yield from (prefix + layout.replace(".", "_") for prefix in FLAT[UNET])
        yield from (prefix + layout for prefix in ("", "unet.", PEFT, f"{PEFT}unet.", f"unet.{PEFT}"))
        yield f"diffusion_model.{layout}"
    if found := _ATTENTION.fullmatch(name):
        old = f"{found[1]}.processor.{OLD_UNET[found[2]]}"
        yield from (old, f"unet.{old}")


def _of_text(network: str, name: str, *, alone: bool) -> Iterator[str]:
    """Yield the names of a text encoder's module; those without its own name only where it is the only one."""
    plain = name.removeprefix(TEXT_MODEL)
    layouts = [plain, TEXT_MODEL + plain]
    if found := _SELF.fullmatch(plain):
        layouts += [f"{TEXT_MODEL}{found[1]}.{OLD_TEXT[found[2]]}"]
    for layout in layouts:
        yield from (prefix + layout.replace(".", "_") for prefix in FLAT[network])
        yield from (prefix + layout for prefix in (f"{network}.", f"{PEFT}{network}.", f"{network}.{PEFT}"))
        if alone:
            yield from (layout, PEFT + layout)
