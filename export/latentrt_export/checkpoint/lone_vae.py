"""A VAE in a folder of its own, as diffusers saves one: config.json and safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentrt.errors import ExportError
from latentrt_export.checkpoint.files import read_json
from latentrt_export.checkpoint.served import VAES, check_vae, vae_factor
from latentrt_export.checkpoint.weights import choose_weights

Config = Mapping[str, Any]
CONFIG = "config.json"


def is_vae(folder: Path) -> bool:
    """Return whether a folder holds a VAE and nothing else that can be exported."""
    others = ("model_index.json", "scheduler_config.json")
    if any((folder / name).is_file() for name in others) or not (folder / CONFIG).is_file():
        return False
    return read_json(folder / CONFIG).get("_class_name") in VAES


def vae_folder(folder: Path, variant: str | None = None) -> tuple[Config, dict[str, Path], tuple[str, ...]]:
    """Return a VAE's config, its files by the names that a checkpoint's VAE has, and what a user should know.

    Raises:
        ExportError: it is no VAE, or one that the engine cannot serve, or its weights are broken or missing.
        UnsafeWeightsError: its weights are pickled.
    """
    if not (folder / CONFIG).is_file():
        raise ExportError(f"{folder} has no {CONFIG}", needed=f"the folder of an {' or '.join(VAES)}")
    config = read_json(folder / CONFIG)
    check_vae(config)
    weights = choose_weights({"vae": folder}, variant)["vae"]
    files = {f"vae/{name}": path for name, path in weights.files.items()}
    return config, {**files, f"vae/{CONFIG}": folder / CONFIG}, (weights.note,) if weights.note else ()


def fitting(folder: Path, own: Config | None) -> dict[str, Path]:
    """Return the files of a VAE that takes the place of a checkpoint's own.

    Args:
        folder: of the other VAE.
        own: the config of the checkpoint's; None: it has none.

    Raises:
        ExportError, UnsafeWeightsError: as of `vae_folder`; or its latents are others.
    """
    if own is None:
        raise ExportError("--vae with a model that has no VAE", needed="one in the checkpoint", fix="leave out --vae")
    config, files, _ = vae_folder(folder)
    found, needed = ((one.get("latent_channels", 4), vae_factor(one)) for one in (config, own))
    if found != needed:
        raise ExportError(
            f"{folder} has a VAE of {found[0]} latent channels, {found[1]} pixels a side",
            needed=f"latents as of the checkpoint's, {needed[0]} channels, {needed[1]} pixels a side",
        )
    return files
