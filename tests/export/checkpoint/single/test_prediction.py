"""What a single file's UNet predicts: each rule, which of two comes first, and what the schedule becomes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import EDMEulerScheduler

from latentrt.errors import ExportError
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.table import tabulate
from latentrt_export.checkpoint.single.choices import Choices
from latentrt_export.checkpoint.source import Checkpoint, checkpoint_of
from tests.export.checkpoint.single.conftest import Make
from tests.support.models.single_file import Tensors, write_single

EMPTY = torch.zeros(0)
HEADER, COMFY = "modelspec.prediction_type", "modelspec.predict_key"


def opened(
    made: Make,
    folder: Path,
    family: str,
    more: Tensors,
    metadata: dict[str, str] | None = None,
    chosen: str | None = None,
    channels: int = 4,
) -> Checkpoint:
    _, tensors, _ = made(family, channels)
    file = write_single(folder / "model.safetensors", tensors | more, metadata=metadata)
    with checkpoint_of(file, choices=Choices(prediction_type=chosen)) as checkpoint:
        return checkpoint


@pytest.mark.parametrize(
    ("family", "more", "metadata", "chosen", "kind", "rule"),
    [
        ("sd1", {}, {}, None, "epsilon", "as its family does"),
        ("xl", {}, {}, None, "epsilon", "as its family does"),
        ("sd1", {}, {}, "v_prediction", "v_prediction", "by --prediction-type"),
        ("sd2", {}, {HEADER: "epsilon"}, "v_prediction", "v_prediction", "by --prediction-type"),
        ("sd1", {}, {HEADER: "v"}, None, "v_prediction", "by modelspec.prediction_type in its header"),
        ("xl", {}, {COMFY: "v"}, None, "v_prediction", "by modelspec.predict_key in its header"),
        ("sd2", {}, {HEADER: "epsilon"}, None, "epsilon", "by modelspec.prediction_type in its header"),
        ("xl", {"v_pred": EMPTY}, {}, None, "v_prediction", "by its key v_pred"),
        ("xl", {"v_pred": EMPTY}, {}, "epsilon", "epsilon", "by --prediction-type"),
        ("sd2", {"global_step": torch.tensor(875_000)}, {}, None, "epsilon", "by its global_step 875000"),
    ],
)
def test_rules(
    made: Make,
    tmp_path: Path,
    family: str,
    more: Tensors,
    metadata: dict[str, str],
    chosen: str | None,
    kind: str,
    rule: str,
) -> None:
    checkpoint = opened(made, tmp_path, family, more, metadata, chosen)
    assert checkpoint.scheduler["prediction_type"] == kind
    assert f", {kind} {rule}" in checkpoint.notes[0]
    assert Schedule.from_config(checkpoint.scheduler).prediction == kind


@pytest.mark.parametrize(("bias", "kind", "size"), [(-2.0, "v_prediction", 96), (0.5, "epsilon", 64)])
def test_the_probe_runs_the_unet(made: Make, tmp_path: Path, bias: float, kind: str, size: int) -> None:
    """A UNet that gives `bias` everywhere: velocity at t = 999 is about minus the image, noise about the input."""
    out = {"weight": torch.zeros(4, 64, 3, 3), "bias": torch.full((4,), bias)}
    more = {f"model.diffusion_model.out.2.{name}": tensor for name, tensor in out.items()}
    checkpoint = opened(made, tmp_path, "sd2", more)
    assert checkpoint.scheduler["prediction_type"] == kind
    assert f"{kind} by the probe ({bias - 0.5:.2g})" in checkpoint.notes[0]
    assert checkpoint.configs["unet"]["sample_size"] == size
    assert checkpoint.configs["vae"]["sample_size"] == 8 * size


def test_sd2s_inpainting_predicts_noise(made: Make, tmp_path: Path) -> None:
    checkpoint = opened(made, tmp_path, "sd2", {}, channels=9)
    assert checkpoint.scheduler["prediction_type"] == "epsilon"
    assert checkpoint.pipeline == "StableDiffusionInpaintPipeline"


@pytest.mark.parametrize(("family", "solver"), [("sd1", "DDIMScheduler"), ("xl", "EulerDiscreteScheduler")])
def test_zero_terminal_snr(made: Make, tmp_path: Path, family: str, solver: str) -> None:
    scheduler = opened(made, tmp_path, family, {"v_pred": EMPTY, "ztsnr": EMPTY}).scheduler
    wanted = {"_class_name": solver, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    assert {key: scheduler[key] for key in wanted} == wanted
    assert Schedule.from_config(scheduler).prediction == "v_prediction"


def test_edm_models_have_sigmas(made: Make, tmp_path: Path) -> None:
    """As stabilityai/cosxl, which diffusers' users draw with EDMEulerScheduler."""
    sigmas = {"edm_vpred.sigma_max": torch.tensor(100.0), "edm_vpred.sigma_min": torch.tensor(0.002)}
    checkpoint = opened(made, tmp_path, "xl", sigmas)
    own = {"sigma_min": 0.002, "sigma_max": 100.0, "sigma_data": 1.0, "sigma_schedule": "exponential"}
    scheduler = EDMEulerScheduler(**own, prediction_type="v_prediction")
    config = {key: value for key, value in checkpoint.scheduler.items() if key != "_class_name"}
    assert checkpoint.scheduler["_class_name"] == "EDMEulerScheduler"
    assert {key: scheduler.config[key] for key in config} == config
    assert "v_prediction by its key edm_vpred.sigma_max" in checkpoint.notes[0]
    assert len(tabulate(None, Schedule.from_config(checkpoint.scheduler), 4).rows) == 4
    with pytest.raises(ExportError, match=r"edm_vpred\.sigma_max None.*above 0"):
        opened(made, tmp_path, "xl", {"edm_vpred.sigma_max": torch.zeros(2)})


@pytest.mark.parametrize(
    ("more", "metadata", "words"),
    [
        ({"v_pred": EMPTY}, {HEADER: "epsilon"}, r"epsilon by modelspec\.prediction_type.*but v_prediction by its key"),
        ({}, {HEADER: "flow"}, r"prediction_type 'flow' in its header.*pass --prediction-type"),
    ],
)
def test_what_is_unclear_is_asked_for(
    made: Make, tmp_path: Path, more: Tensors, metadata: dict[str, str], words: str
) -> None:
    with pytest.raises(ExportError, match=words):
        opened(made, tmp_path, "xl", more, metadata)
