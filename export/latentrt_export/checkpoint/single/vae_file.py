"""A VAE out of a file: a single file's own, or another that takes a checkpoint's VAE's place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentrt.bundle.tensors import Tensors, open_tensors
from latentrt.errors import ExportError
from latentrt_export.checkpoint.configs import weights_path, write_json
from latentrt_export.checkpoint.single.pieces import Config, Network, prefixed, without
from latentrt_export.checkpoint.single.vae import prefix_of, vae_config, vae_pieces
from latentrt_export.checkpoint.single.write import check_weights, write_weights

Settings = Mapping[str, Any]


def vae_files(file: Path, folder: Path, base: Settings | None) -> dict[str, Path]:
    """Write the VAE of a file, which may be a whole model, as diffusers has it.

    Args:
        file: safetensors in LDM's or diffusers' names.
        folder: config and weights go to its vae/.
        base: the config of the VAE in whose place it comes; None: there is none.

    Returns:
        What was written, by the names of a checkpoint's files.

    Raises:
        ExportError: it is damaged, no VAE, or one of other latents; or the model has none.
    """
    if base is None:
        raise ExportError("--vae with a model that has no VAE", needed="one in the checkpoint", fix="leave out --vae")
    tensors = open_tensors(file)
    network = other_vae(tensors, base, base)
    check_weights({"vae": tensors}, {"vae": network})
    weights, config = weights_path(folder, "vae", network.kind), folder / "vae" / "config.json"
    write_weights(weights, tensors, network.pieces)
    write_json(config, network.config)
    return {path.relative_to(folder).as_posix(): path for path in (weights, config)}


def own_vae(tensors: Tensors, base: Settings) -> Network:
    """Return the VAE of a file; what its shapes do not show is as in the config `base`.

    Raises:
        ExportError: it has none.
    """
    prefix = prefix_of(tensors.shapes)
    if prefix is None:
        raise ExportError(f"{tensors.path} has no VAE", needed="one in the file or beside it", fix="pass --vae FILE")
    shapes = without(prefix, tensors.shapes)
    config: Config = {**base, **vae_config(shapes)}
    return Network("AutoencoderKL", config, prefixed(prefix, vae_pieces(config, shapes)))


def other_vae(tensors: Tensors, base: Settings, like: Settings | None) -> Network:
    """Return the VAE of a file that is given for it alone; its header may have a scaling_factor.

    Args:
        tensors: the file.
        base: what its shapes do not show.
        like: the config of a VAE that makes the same latents; None: not known.

    Raises:
        ExportError: it has none, or one of other latents.
    """
    network = own_vae(tensors, base)
    for key in ("latent_channels", "block_out_channels") if like else ():
        if _size(network.config, key) != _size(like or {}, key):
            raise ExportError(
                f"{tensors.path} has a VAE with {key} {network.config[key]}",
                needed=f"latents as of the checkpoint's, {(like or {}).get(key)}",
            )
    if text := tensors.metadata.get("scaling_factor"):
        network.config["scaling_factor"] = _number(tensors, text)
    return network


def _size(config: Settings, key: str) -> int:
    """Return what counts of a VAE's config for its latents: their channels, or how many times they are halved."""
    value = config.get(key, {"latent_channels": 4, "block_out_channels": [64]}[key])
    return len(value) if isinstance(value, (list, tuple)) else int(value)


def _number(tensors: Tensors, text: str) -> float:
    try:
        factor = float(text)
        if not 0 < factor < math.inf:
            raise ValueError
        return factor
    except ValueError as error:
        raise ExportError(
            f"{tensors.path} has scaling_factor {text!r} in its header", needed="a number above 0"
        ) from error
