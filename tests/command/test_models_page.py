"""The commands of docs/models.md, read from the page, on small checkpoints of the true structure."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline
from numpy.typing import NDArray
from PIL import Image

from latentrt import Engine, read_settings
from latentrt.bundle.bundle import Bundle, write_manifest
from latentrt_export.graphs.to_onnx import quiet
from latentrt_export.verify.checks import psnr
from latentrt_export.verify.reference import Run as Asked
from latentrt_export.verify.reference import Theirs, run_pipeline
from tests.command.conftest import Run

Pixels = NDArray[np.uint8]
Exported = Callable[[str], tuple[Path, Path]]
PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"`latentrt (generate [^`]+)`", PAGE)
KINDS = {  # of the page's bundles, as the fixture `exported` has them
    **{"SD14": "sd", "SD15": "sd", "SD2": "sd2", "SD21": "sd2", "SD15INPAINT": "sd-inpainting", "DEPTH": "depth"},
    **{"SDXL": "sdxl", "REFINER": "refiner", "TURBO": "sdxl", "SDXLINPAINT": "sdxl-inpainting", "X4": "x4", "X2": "x2"},
    **{"LCM": "lcm", "LCMXL": "lcm-sdxl", "PIX2PIX": "pix2pix", "PIX2PIXXL": "pix2pix-sdxl"},
    **{"DDPM": "pixels", "CLASSES": "classes"},
}
SLOW = dict.fromkeys(
    ("lcm-sdxl", "pix2pix-sdxl", "sdxl-inpainting"), pytest.mark.slow
)  # which other tests export if they are slow
SOLVERS = {  # that they have, where it is not pndm
    **dict.fromkeys(("SD2", "SD21", "DEPTH", "X4"), "ddim"),
    **dict.fromkeys(("SDXL", "REFINER", "SDXLINPAINT", "PIX2PIXXL"), "euler"),
    **{"TURBO": "euler-ancestral", "X2": "euler", "LCM": "lcm", "DDPM": "ddpm", "CLASSES": "ddpm"},
}
ENLARGED = {"X4": 4, "X2": 2}
TURBO = {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}
NUMBERS = ("noise-level", "image-guidance", "aesthetic-score", "class-label", "hires-scale", "hires-strength")
BUNDLES, PICTURES = ("bundle", "refiner"), ("image", "mask", "depth")
FEW, PSNR_BOUND = 4, 60.0
SIZE = (24, 16)
y, x = np.mgrid[: SIZE[1], : SIZE[0]]
FILES = {
    "photo.png": np.stack([10 * x, 15 * y, 5 * (x + y)], axis=-1).astype(np.uint8),
    "small.png": np.stack([10 * x, 15 * y, 5 * (x + y)], axis=-1).astype(np.uint8),
    "mask.png": (np.hypot(x - 10, y - 6) < 5).astype(np.uint8) * 255,
    "depth.png": (x * 2000 + y * 40).astype(np.uint16),
}


class Command:
    """A command of the page: its prompt, and its options by name."""

    def __init__(self, line: str) -> None:
        words = shlex.split(line)[1:]
        self.prompt = None if words[0].startswith("-") else words.pop(0)
        names = ["--bundle" if word == "-b" else word for word in words[::2]]
        self.options = dict(zip((name.removeprefix("--") for name in names), words[1::2], strict=True))

    def words(self, bundles: Mapping[str, Path], **changed: str) -> list[str]:
        options = {**self.options, **changed, **{name: str(path) for name, path in bundles.items()}}
        given = [word for name, value in options.items() for word in (f"--{name}", value)]
        return given if self.prompt is None else [self.prompt, *given]


def test_the_page_has_a_command_for_every_bundle() -> None:
    assert {command.options["bundle"] for command in map(Command, COMMANDS)} == set(KINDS)


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=SLOW.get(kind, ())) for kind in dict.fromkeys(KINDS.values())]
)
def test_one_command_of_each_kind_of_checkpoint(run: Run, exported: Exported, tmp_path: Path, kind: str) -> None:
    """The page's first with it, in few steps; all these checkpoints are other tests' too."""
    command = next(each for each in map(Command, COMMANDS) if KINDS[each.options["bundle"]] == kind)
    _draw(run, exported, tmp_path, command, min(FEW, int(command.options["steps"])))


@pytest.mark.slow
@pytest.mark.parametrize("line", COMMANDS)
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_every_command_draws_what_diffusers_draws(run: Run, exported: Exported, tmp_path: Path, line: str) -> None:
    """With all steps; diffusers is called with the settings that the picture carries."""
    command = Command(line)
    bundles, made = _draw(run, exported, tmp_path, command, int(command.options["steps"]))
    if "prompt-syntax" in command.options:
        return  # diffusers reads no weights: tests/model/prompts
    if "negative" not in command.options:
        made.pop("negative_prompt", None)  # none is not an empty one: SDXL has zeros there
    expected = _of_two_pipelines if {"refiner", "hires-scale"} & set(command.options) else _of_one_pipeline
    with Image.open("drawn.png") as picture:
        assert psnr(np.asarray(picture), expected(command, bundles, made)) >= PSNR_BOUND


def _draw(
    run: Run, exported: Exported, folder: Path, command: Command, steps: int
) -> tuple[dict[str, Path], dict[str, Any]]:
    """Run a command; check that its picture has its size and knows what was asked for.

    Returns:
        The command's bundles by option, and the picture's settings.
    """
    bundles = {name: _bundle(exported, folder, command.options[name]) for name in BUNDLES if name in command.options}
    for name, pixels in FILES.items():
        Image.fromarray(pixels).save(folder / name)
    code, out, _ = run("generate", *command.words(bundles, output="drawn.png", steps=str(steps)))
    assert (code, out.split()) == (0, ["drawn.png"])
    with Image.open("drawn.png") as picture:
        assert picture.size == _size(command, bundles["bundle"])
    made = read_settings("drawn.png")
    typed = {"solver": SOLVERS.get(command.options["bundle"], "pndm"), **command.options}
    for name in {"solver", "guidance", "strength", "handoff", "prompt-syntax", *NUMBERS} & set(typed):
        assert str(made[name.replace("-", "_")]).removesuffix(".0") == typed[name]
    assert (made["steps"], made.get("prompt")) == (steps, command.prompt)
    assert {name for name in PICTURES if made.get(name, "").startswith("sha256:")} == set(PICTURES) & set(typed)
    return bundles, made


def _bundle(exported: Exported, folder: Path, name: str) -> Path:
    """Return the small bundle that stands for a name of the page."""
    _, bundle = exported(KINDS[name])
    if name != "TURBO":
        return bundle
    ours = folder / "turbo"
    shutil.copytree(bundle, ours, copy_function=os.link)
    for file, changes in (
        ("scheduler/scheduler_config.json", TURBO),
        ("model_index.json", {"scheduler": ["diffusers", TURBO["_class_name"]]}),
    ):
        config = json.loads((ours / file).read_text(encoding="utf-8"))
        (ours / file).unlink()
        (ours / file).write_text(json.dumps(config | changes), encoding="utf-8")
    opened = Bundle.open(bundle)
    (ours / "manifest.json").unlink()
    write_manifest(ours, opened.spec, opened.files)
    return ours


def _size(command: Command, bundle: Path) -> tuple[int, int]:
    latents = Bundle.open(bundle, check_hashes=False).spec.latents
    width, height = (
        SIZE if "image" in command.options else (latents.width * latents.factor, latents.height * latents.factor)
    )
    scale = ENLARGED.get(command.options["bundle"], float(command.options.get("hires-scale", 1)))
    return int(width * scale), int(height * scale)


def _of_one_pipeline(command: Command, bundles: Mapping[str, Path], made: Mapping[str, Any]) -> Pixels:
    pictures = {name: np.asarray(Image.open(command.options[name])) for name in PICTURES if name in command.options}
    with Engine.load(bundles["bundle"], threads=1, check_hashes=False) as engine:
        xl = "XL" if "text_encoder_2" in engine.spec.networks else ""
        edits = pictures and not engine.model.pictures  # else the checkpoint's own class draws on pictures
        kind = f"StableDiffusion{xl}{'Inpaint' if 'mask' in pictures else 'Img2Img'}Pipeline" if edits else None
        pipe = Theirs(bundles["bundle"], engine).pipeline(command.options.get("solver"), kind)
        return run_pipeline(pipe, Asked([command.prompt], made, pictures))[1][0]


def _of_two_pipelines(command: Command, bundles: Mapping[str, Path], made: Mapping[str, Any]) -> Pixels:
    """Return hires fix, or a base and its refiner, as diffusers' users draw them: latents go from one to the other."""
    asked: dict[str, Any] = {"num_inference_steps": made["steps"], "guidance_scale": made["guidance"]}
    asked["generator"] = torch.Generator().manual_seed(made["seed"])
    with quiet():
        first = DiffusionPipeline.from_pretrained(bundles["bundle"])
        if "refiner" in bundles:
            second = StableDiffusionXLImg2ImgPipeline.from_pretrained(bundles["refiner"], vae=first.vae)
            part = {"denoising_end": made["handoff"]}, {"denoising_start": made["handoff"]}
        else:
            second = StableDiffusionImg2ImgPipeline.from_pipe(first)
            part = {}, {"strength": made["hires_strength"]}
        latents = first(command.prompt, output_type="latent", **asked, **part[0]).images
        if "refiner" not in bundles:
            latents = torch.nn.functional.interpolate(latents, scale_factor=made["hires_scale"], mode="bilinear")
        return np.asarray(second(command.prompt, image=latents, **asked, **part[1]).images[0])
