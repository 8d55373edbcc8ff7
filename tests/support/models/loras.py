"""LoRA files with random weights for a checkpoint, in the layouts that people train and save them in."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentrt.adapters.names import ldm_names

Tensors = dict[str, Tensor]
PARTS = {"unet": "diffusion_pytorch_model", "text_encoder": "model", "text_encoder_2": "model"}
ATTENTION = ("attn1.to_q", "attn1.to_v", "attn2.to_k", "attn2.to_v", "attn2.to_out.0", "self_attn.q_proj")
LINEAR = (*ATTENTION, "ff.net.0.proj", "proj_in", "self_attn.out_proj", "mlp.fc1")
PRODUCTS = (*LINEAR, "ff.net.2", "proj_out", "mlp.fc2")  # what networks with LoRAs as inputs take
CONVOLUTIONS = ("conv1", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv")
EVERYWHERE = (*LINEAR, *CONVOLUTIONS, "conv_in", "conv_out")
OLD = {"to_q": "to_q_lora", "to_k": "to_k_lora", "to_v": "to_v_lora", "to_out.0": "to_out_lora"}
OLD_TEXT = {"q_proj": "to_q_lora", "out_proj": "to_out_lora"}
KOHYA, PEFT = ("lora_down", "lora_up"), ("lora_A", "lora_B")
DOWN_UP = {"kohya": KOHYA, "ldm": KOHYA, "diffusers": PEFT, "peft": PEFT, "old": ("down", "up")}
Key = Callable[[str, str], str]  # the network and a module's name to the module's name in a file


def modules_of(checkpoint: Path, ends: Iterable[str] = ()) -> dict[tuple[str, str], torch.Size]:
    """Return the shapes of a checkpoint's weights by network and module: of modules with these ends, or of all."""
    found = {}
    for network, stem in PARTS.items():
        for path in sorted((checkpoint / network).glob(f"{stem}*.safetensors")):
            for name, weight in load_file(path).items():
                module = name.removesuffix(".weight")
                if module != name and f".{module}".endswith(tuple(f".{end}" for end in ends) or module):
                    found[network, module] = weight.shape
    return found


def key_of(layout: str, checkpoint: Path) -> Key:
    """Return what names modules in a layout: "kohya", "ldm" (kohya's of SDXL), "diffusers", "old", or "peft"."""
    ldm = ldm_names([name for network, name in modules_of(checkpoint) if network == "unet"])
    several = (checkpoint / "text_encoder_2").is_dir()
    flat = {"unet": "lora_unet_", "text_encoder": "lora_te1_" if several else "lora_te_", "text_encoder_2": "lora_te2_"}

    def key(network: str, name: str) -> str:
        if network != "unet":
            name = "text_model." + name.removeprefix("text_model.")
        elif layout == "ldm":
            name = ldm[name]
        if layout in ("kohya", "ldm"):
            return flat[network] + name.replace(".", "_")
        if layout == "old":
            name = _old(network, name)
        return f"base_model.model.{name}" if layout == "peft" else f"{network}.{name}"

    return key


def _old(network: str, name: str) -> str:
    for new, old in (OLD if network == "unet" else OLD_TEXT).items():
        if name.endswith(f".{new}"):
            home = name.removesuffix(new)
            return f"{home}processor.{old}" if network == "unet" else home + old
    return name


def low_rank(shape: torch.Size, rank: int) -> tuple[Tensor, Tensor]:
    """Return (down, up) for a weight: of a convolution the one has its kernel, the other is 1 x 1."""
    out, inside, *kernel = shape
    down, up = torch.randn(rank, inside, *kernel) / inside**0.5, torch.randn(out, rank, *[1] * len(kernel))
    return down, 0.3 * up


def write_lora(
    path: Path,
    checkpoint: Path,
    layout: str,
    ends: Iterable[str] = LINEAR,
    *,
    ranks: tuple[int, ...] = (2, 4),
    alphas: tuple[float, ...] | None = (3.0,),
    metadata: Mapping[str, object] | None = None,
) -> Path:
    """Write one with a low-rank product for each of these modules, the ranks and alphas taken in turn."""
    torch.manual_seed(3)
    key, down_up = key_of(layout, checkpoint), DOWN_UP[layout]
    tensors: Tensors = {}
    for index, ((network, name), shape) in enumerate(modules_of(checkpoint, ends).items()):
        stem = key(network, name)
        for part, tensor in zip(down_up, low_rank(shape, ranks[index % len(ranks)]), strict=True):
            tensors[f"{stem}.{part}.weight"] = tensor
        if alphas is not None and layout in ("kohya", "ldm"):
            tensors[f"{stem}.alpha"] = torch.tensor(alphas[index % len(alphas)])
    header = {"format": "pt"} | ({"lora_adapter_metadata": json.dumps(metadata)} if metadata else {})
    save_file(tensors, path, header)
    return path


def without_alphas(path: Path) -> Path:
    """Write kohya's file beside it with the alphas multiplied into its weights.

    diffusers 0.42 leaves out the alphas of attention and of text encoders that are not the most frequent one.
    """
    tensors = load_file(path)
    for key in [key for key in tensors if key.endswith(".alpha")]:
        stem = key.removesuffix(".alpha")
        tensors[f"{stem}.lora_up.weight"] *= tensors.pop(key) / len(tensors[f"{stem}.lora_down.weight"])
    other = path.with_stem(f"{path.stem}-without-alphas")
    save_file(tensors, other, {"format": "pt"})
    return other
