"""The settings that a picture carries."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentrt.request import Request

# Of a picture, where they are set.
_OWN = (
    *("strength", "handoff", "image_guidance", "noise_level", "aesthetic_score", "negative_aesthetic_score"),
    "mask_crop",
)
# The same, where they are not at these values.
_USUAL = {
    "cache_interval": 1,
    "seed_delta": 0,
    "mask_blur": 0,
    "mask_fill": "original",
    "mask_keeps": False,
    "resize": "stretch",
}


def facts_of(request: Request, solver: str, seed: int, index: int, size: tuple[int, int], model: str) -> dict[str, Any]:
    """Return the settings that a picture of (height, width) carries."""
    return {
        **_of_prompt(request),
        "steps": request.steps,
        "solver": solver,
        "noise": request.noise,
        "seed": seed,
        "index": index,
        "width": size[1],
        "height": size[0],
        "model": model,
        **{name: getattr(request, name) for name in _OWN if getattr(request, name) is not None},
        **{name: getattr(request, name) for name, usual in _USUAL.items() if getattr(request, name) != usual},
        **_of_variation(request, index),
        **_of_hires(request),
        **request.options,
    }


def _of_variation(request: Request, index: int) -> dict[str, Any]:
    strength = request.subseed_strength
    return {"subseed": request.subseed + index, "subseed_strength": strength} if strength else {}


def _of_hires(request: Request) -> dict[str, Any]:
    if request.hires_scale is None:
        return {}
    steps = {} if request.hires_steps is None else {"hires_steps": request.hires_steps}
    return {"hires_scale": request.hires_scale, "hires_strength": request.hires_strength, **steps}


def _of_prompt(request: Request) -> dict[str, Any]:
    """Return the settings of a picture that tell how it was conditioned."""
    if request.prompt is None:
        return {} if request.class_label is None else {"class_label": request.class_label}
    return {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt or "",
        "guidance": request.guidance,
        "guidance_rescale": request.guidance_rescale,
        "guidance_interval": list(request.guidance_interval),
        **({} if request.prompt_syntax == "plain" else {"prompt_syntax": request.prompt_syntax}),
        **({"clip_skip": request.clip_skip} if request.clip_skip else {}),
        **({"embeddings": _names(request.embeddings)} if request.embeddings else {}),
    }


def _names(files: Mapping[str, str | Path]) -> dict[str, str]:
    """Return the files' names without their folders, which tell of the machine."""
    return {token: Path(path).name for token, path in files.items()}
