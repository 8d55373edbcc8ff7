"""What the UNet of a single file predicts, noise or velocity: stated rules; the first that applies decides."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from latentrt.bundle.tensors import Tensors
from latentrt.errors import ExportError
from latentrt_export.checkpoint.single.choices import PREDICTIONS
from latentrt_export.checkpoint.single.schedule import EDM, scalar

EPSILON, V = PREDICTIONS
HEADERS = ("modelspec.prediction_type", "modelspec.predict_key")  # sd-scripts', ComfyUI's
WORDS = {"epsilon": EPSILON, "eps": EPSILON, "v": V, "v_prediction": V, "v-prediction": V, "velocity": V}
BASE_STEP = 875_000  # global_step of Stable Diffusion 2's 512-base-ema


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a UNet predicts (`kind`: "epsilon" or "v_prediction") and the rule that says so."""

    kind: str
    rule: str


def decide(tensors: Tensors, chosen: str | None, *, sd2: bool, inpaints: bool) -> Prediction | None:
    """Return what the UNet predicts; None if only the probe can tell.

    Args:
        tensors: the file.
        chosen: the user's word.
        sd2: whether it is Stable Diffusion 2, whose two kinds have the same weights' names.
        inpaints: whether its UNet has nine channels.

    Raises:
        ExportError: the header has an unknown word, or the header and the marker keys disagree.
    """
    if chosen:
        return Prediction(chosen, "by --prediction-type")
    said = [*_header(tensors), *_markers(tensors)]
    if len({one.kind for one in said}) > 1:
        found = " but ".join(f"{one.kind} {one.rule}" for one in said)
        raise ExportError(f"{tensors.path} has {found}", needed="one prediction type", fix="pass --prediction-type")
    if said:
        return said[0]
    if not sd2:
        return Prediction(EPSILON, "as its family does")
    if inpaints:
        return Prediction(EPSILON, "as Stable Diffusion 2's inpainting does")
    if scalar(tensors, "global_step") == BASE_STEP:
        return Prediction(EPSILON, f"by its global_step {BASE_STEP}")
    return None


def probe(unet: Path) -> Prediction:
    """Run a UNet of Stable Diffusion 2 once and see what it predicts, as AUTOMATIC1111's WebUI does.

    Latents and text are 0.5 everywhere, t is 999, where an input is nearly all noise. A UNet that predicts noise gives
    about its input back; one that predicts velocity gives far less.
    Source: modules/sd_models_config.py, is_using_v_parameterization_for_sd2.

    Args:
        unet: a diffusers folder of the UNet.

    Raises:
        ExportError: it computes numbers that are not finite.
    """
    import torch
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel.from_pretrained(unet, dtype=torch.float32, local_files_only=True)
    side = 2 ** (len(model.config.block_out_channels) - 1)
    latents = torch.full((1, model.config.in_channels, side, side), 0.5)
    text = torch.full((1, 2, model.config.cross_attention_dim), 0.5)
    with torch.no_grad():
        mean = float((model(latents, 999, text).sample - latents).mean())
    if not np.isfinite(mean):
        raise ExportError("the UNet computes numbers that are not finite", needed="a sound file")
    return Prediction(V if mean < -1 else EPSILON, f"by the probe ({mean:.2g})")


def _header(tensors: Tensors) -> Iterator[Prediction]:
    for key in HEADERS:
        if key in tensors.metadata:
            word = tensors.metadata[key].strip().lower()
            if word not in WORDS:
                raise ExportError(
                    f"{tensors.path} has {key} {word!r} in its header",
                    needed=f"one of {', '.join(WORDS)}",
                    fix="pass --prediction-type",
                )
            yield Prediction(WORDS[word], f"by {key} in its header")


def _markers(tensors: Tensors) -> Iterator[Prediction]:
    for key in ("v_pred", EDM):
        if key in tensors.entries:
            yield Prediction(V, f"by its key {key}")
