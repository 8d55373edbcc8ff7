"""Checkpoints with random weights and the true shapes of published models: for benchmarks where no weights can be had.

Speed, memory and the whole way from export to picture are those of the real model; the pictures are noise. The
configurations are in `configs.py`; `sd15-small` is Stable Diffusion 1.5 with a tenth of the channels, for tests.
The tokenizers are CLIP's.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from numpy.typing import NDArray
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from latentrt.bundle.tensors import header_of
from latentrt.errors import ExportError
from latentrt_export.checkpoint.configs import weights_path, write_configs
from latentrt_export.checkpoint.presets.configs import PRESETS, Preset

BLOCK = 4_194_301  # numbers that are drawn once and repeated: a prime, so that no two rows of a weight are the same
DTYPES = {"float16": ("F16", np.float16), "float32": ("F32", np.float32)}
CARD = """---
license: none (random weights)
---
`preset:{name}` of latentrt: the configuration of {model}, random weights, CLIP's tokenizer. For measurements only: its
pictures are noise.
"""
CLASSES: Mapping[str, Callable[[Mapping[str, Any]], nn.Module]] = {
    "UNet2DConditionModel": lambda config: UNet2DConditionModel.from_config(dict(config)),
    "AutoencoderKL": lambda config: AutoencoderKL.from_config(dict(config)),
    "CLIPTextModel": lambda config: CLIPTextModel(CLIPTextConfig(**config)),
    "CLIPTextModelWithProjection": lambda config: CLIPTextModelWithProjection(CLIPTextConfig(**config)),
}


def make_checkpoint(preset: str, folder: Path, dtype: str = "float16", *, seed: int = 0) -> Path:
    """Write a diffusers checkpoint of a preset into a new folder.

    Weights are normal numbers scaled by their fan-in, norms are about one and zero, so that activations keep a sane
    size. The same preset, dtype and seed give the same bytes.

    Args:
        preset: sd15, sd15-small, sd21 or sdxl.
        folder: where it goes; made if missing.
        dtype: of the weights, float16 or float32.
        seed: of the random numbers.

    Returns:
        The folder.

    Raises:
        ExportError: there is no such preset.
    """
    chosen = find(preset)
    write_configs(chosen, folder)
    for name, (kind, config) in chosen.networks.items():
        with torch.device("meta"):  # shapes only
            network = CLASSES[kind](config)
        _write_weights(weights_path(folder, name, kind), network, dtype, seed)
    (folder / "README.md").write_text(CARD.format(name=preset, model=chosen.model), encoding="utf-8")
    return folder


def find(preset: str) -> Preset:
    """Return the preset of this name.

    Raises:
        ExportError: none has this name.
    """
    if preset not in PRESETS:
        raise ExportError(
            f"there is no preset {preset!r}", needed=f"one of {', '.join(PRESETS)}", fix="pass preset:sd15"
        )
    return PRESETS[preset]


def _write_weights(path: Path, network: nn.Module, dtype: str, seed: int) -> None:
    """Write a safetensors file tensor by tensor: never more than one block of numbers is in memory."""
    kind, scalar = DTYPES[dtype]
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    block = np.random.default_rng(seed).standard_normal(BLOCK, np.float32)
    with path.open("wb") as file:
        file.write(header_of({name: (kind, shape) for name, shape in shapes.items()}))
        for name, shape in shapes.items():
            _write_numbers(file.write, name, shape, block, scalar)


def _write_numbers(
    write: Callable[[bytes], Any], name: str, shape: tuple[int, ...], block: NDArray[np.float32], scalar: type[Any]
) -> None:
    """Write one tensor: the block scaled, again and again, from an offset that depends on the name."""
    spread, middle = _distribution(name, shape)
    left = math.prod(shape)
    start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little") % BLOCK
    while left:
        part = block[start : start + left]
        write((part * np.float32(spread) + np.float32(middle)).astype(scalar).tobytes())
        left, start = left - part.size, 0


def _distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Return the standard deviation and mean: matrices, kernels by fan-in; scales of norms near 1, biases near 0."""
    if len(shape) > 1:
        return 1 / math.sqrt(math.prod(shape[1:])), 0.0
    return (0.05, 1.0) if name.endswith(".weight") else (0.02, 0.0)
