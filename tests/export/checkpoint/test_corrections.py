"""What pipelines change of a checkpoint's settings, against the pipelines of diffusers as a user makes them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest

from latentrt import Engine
from latentrt.bundle.bundle import Bundle, write_manifest
from latentrt.command.main import latentrt
from latentrt.errors import NotServedError
from latentrt.golden import measure
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.settings import DEFAULTS
from latentrt_export.checkpoint.corrections import SCHEDULE, UNET, corrections_of, drawn_by
from latentrt_export.checkpoint.source import open_checkpoint
from latentrt_export.graphs.to_onnx import quiet
from latentrt_export.to_bundle import export_bundle
from latentrt_export.verify.checks import psnr
from latentrt_export.verify.images import run_engine
from latentrt_export.verify.reference import Run, plain_folder, run_pipeline
from latentrt_export.verify.steps import step_checks
from latentrt_export.verify.verify import verify
from tests.support.models.checkpoints import BETAS

PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionXLPipeline",
    "LatentConsistencyModelPipeline",
)
CONFIGS: Mapping[str, dict[str, Any]] = {
    "of 2022": {"clip_sample": True, "steps_offset": 0, "skip_prk_steps": False},
    "as they should be": {"clip_sample": False, "steps_offset": 1, "skip_prk_steps": True},
    "nothing said": {},
}
XL_NETWORKS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


def name_scheduler(checkpoint: Path, config: Mapping[str, Any]) -> None:
    """Write a checkpoint's schedule, and its class where diffusers looks for it."""
    (checkpoint / SCHEDULE).write_text(json.dumps(config))
    index = json.loads((checkpoint / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", config["_class_name"]]
    (checkpoint / "model_index.json").write_text(json.dumps(index))


def loaded(pipeline: str, config: Mapping[str, Any], unet: Any = None) -> Any:
    """Return a pipeline without networks, made as `from_pretrained` makes it."""
    kind, scheduler = getattr(diffusers, pipeline), getattr(diffusers, config["_class_name"]).from_config(dict(config))
    if "XL" in pipeline:
        return kind(**dict.fromkeys(XL_NETWORKS), unet=unet, scheduler=scheduler)
    return kind(None, None, None, unet, scheduler, None, None, requires_safety_checker=False)


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("scheduler", DEFAULTS)
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_settings_are_those_of_the_pipelines_scheduler(pipeline: str, scheduler: str, case: str) -> None:
    """Its own; and of every other class, those of one made from it."""
    config = {"_class_name": scheduler, **BETAS, **CONFIGS[case]}
    changes = {each.key: each.value for each in corrections_of(pipeline, config, {}) if each.file == SCHEDULE}
    schedule = Schedule.from_config(config, changes)
    with quiet():
        own = loaded(pipeline, config).scheduler.config
    for name in {scheduler, "DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"}:
        defaults = DEFAULTS[name]
        with quiet():
            theirs = own if name == scheduler else getattr(diffusers, name).from_config(own).config
        try:
            ours = schedule.settings(name)
        except NotServedError:
            assert not theirs["skip_prk_steps"]
            continue
        assert {key: theirs[key] for key in defaults if key in theirs} == {
            key: ours[key] for key in ours if key in theirs
        }


@pytest.mark.parametrize(("version", "size"), [("0.6.0", 32), ("0.8.1", 16), ("0.9.0", 32), ("0.8.0", 64), (None, 32)])
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_sizes_of_old_unets(pipeline: str, version: str | None, size: int) -> None:
    with quiet():
        unet = diffusers.UNet2DConditionModel(
            sample_size=size, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
        )
        if version is not None:
            unet.register_to_config(_diffusers_version=version)
        theirs = loaded(pipeline, {"_class_name": "DDIMScheduler", "clip_sample": False, "steps_offset": 1}, unet)
    config = {"sample_size": size, **({"_diffusers_version": version} if version else {})}
    changes = {each.key: each.value for each in corrections_of(pipeline, {}, config) if each.file == UNET}
    assert {**config, **changes}["sample_size"] == theirs.unet.config.sample_size


def test_every_class_is_drawn_with_one_that_begins_with_a_prompt() -> None:
    assert drawn_by("StableDiffusionImg2ImgPipeline", masked=False) == "StableDiffusionPipeline"
    assert drawn_by("StableDiffusionXLInpaintPipeline", masked=False) == "StableDiffusionXLPipeline"
    assert drawn_by("StableDiffusionPipeline", masked=True) == "StableDiffusionInpaintPipeline"
    assert drawn_by("LatentConsistencyModelImg2ImgPipeline") == "LatentConsistencyModelPipeline"
    pix2pix = "StableDiffusionXLInstructPix2PixPipeline"
    assert drawn_by(pix2pix, masked=False) == pix2pix
    for own in ("DDPMPipeline", "StableDiffusionDepth2ImgPipeline", "StableDiffusionUpscalePipeline"):
        assert drawn_by(own) == own
    assert drawn_by("StableDiffusionXLPipeline", scored=True) == "StableDiffusionXLImg2ImgPipeline"


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a checkpoint whose schedule clips samples, and its bundle."""
    from tests.support.models.checkpoints import tiny_sd

    root = tmp_path_factory.mktemp("old")
    with quiet():
        source = tiny_sd(root / "checkpoint")
    name_scheduler(source, {"_class_name": "DDIMScheduler", **BETAS, "clip_sample": True, "of_another_tool": 1})
    unet = json.loads((source / UNET).read_text())
    (source / UNET).write_text(json.dumps({**unet, "_diffusers_version": "0.6.0"}))
    summary = export_bundle(source, root / "bundle")
    assert [note.split(";")[0].split(",")[0] for note in summary.notes] == [
        "scheduler/scheduler_config.json: of_another_tool is ignored",
        "scheduler/scheduler_config.json: steps_offset is 0",
        "scheduler/scheduler_config.json: clip_sample is True",
        f"unet/config.json: sample_size is {unet['sample_size']}",
    ]
    return source, root / "bundle"


@pytest.mark.slow
@pytest.mark.parametrize("solver", [None, "ddpm", "dpmpp-2m"])
def test_a_checkpoint_that_clips_is_drawn_as_its_pipeline_draws(old: tuple[Path, Path], solver: str | None) -> None:
    source, bundle = old
    prompts = ("a cat", "a dog")
    with Engine.load(bundle, threads=1) as engine:
        assert engine.spec.latents.height == 64
        assert {each.key: (each.found, each.value) for each in engine.spec.corrections} == {
            "steps_offset": (0, 1),
            "clip_sample": (True, False),
            "sample_size": (engine.bundle.json(UNET)["sample_size"], 64),
        }
        settings = {"steps": 5, "seed": 7, "solver": solver, "guidance": 3.0, "negative_prompt": "a"}
        run = Run(prompts, {**settings, "height": 16, "width": 24}, {})
        _, ours = run_engine(engine, run)
    with quiet(), plain_folder(open_checkpoint(source)) as folder:
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
        pipe.set_progress_bar_config(disable=True)
        if solver is not None:
            kind = {"ddpm": diffusers.DDPMScheduler, "dpmpp-2m": diffusers.DPMSolverMultistepScheduler}[solver]
            pipe.scheduler = kind.from_config(pipe.scheduler.config)
    _, theirs = run_pipeline(pipe, run)
    assert psnr(ours, theirs) > 60


@pytest.mark.slow
def test_verify_compares_with_the_pipeline_as_it_is_loaded(old: tuple[Path, Path]) -> None:
    """A bundle that does not correct the schedule fails; a scheduler made from the file would hide it."""
    source, bundle = old
    manifest = json.loads((bundle / "manifest.json").read_text())
    wrong = [each for each in manifest["model"]["corrections"] if each["key"] != "clip_sample"]
    raw = {**manifest, "model": {**manifest["model"], "corrections": wrong, "golden": []}}
    (bundle / "manifest.json").write_text(json.dumps(raw))
    try:
        failed = [check for check in verify(bundle, source, steps=2) if check.passed is False]
    finally:
        (bundle / "manifest.json").write_text(json.dumps(manifest))
    assert {(check.depth, check.what.split(",")[0]) for check in failed} >= {
        ("step", "ddim"),
        ("image", "DDIMScheduler"),
    }


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "DEISMultistepScheduler", "solver_order": 2, "solver_type": "logrho"},
        {"_class_name": "DPMSolverSinglestepScheduler", "algorithm_type": "dpmsolver++"},
        {"_class_name": "SASolverScheduler"},
        {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
        {"_class_name": "DDIMScheduler", "thresholding": True, "clip_sample": False},
        {"_class_name": "PNDMScheduler", "skip_prk_steps": False},
    ],
)
def test_a_schedule_that_is_not_served_serves_other_solvers(
    tmp_path: Path, exported: Callable[[str], tuple[Path, Path]], config: dict[str, Any]
) -> None:
    source, bundle = (shutil.copytree(each, tmp_path / each.name) for each in exported("sd"))
    config = {**BETAS, "steps_offset": 1, **config}
    for folder in (source, bundle):
        name_scheduler(folder, config)
    spec = Bundle.open(exported("sd")[1], check_hashes=False).spec
    write_manifest(bundle, spec, Bundle.open(exported("sd")[1], check_hashes=False).files)
    with Engine.load(bundle, threads=1) as engine:
        with pytest.raises(NotServedError, match=r"Needed: (another solver|one of|\w+ = )"):
            engine("a cat", steps=2)
        assert measure(engine)[0].solver == "euler"
        settings = {"steps": 4, "seed": 7, "solver": "euler", "guidance": 3.0, "negative_prompt": "a"}
        run = Run(("a cat", "a dog"), {**settings, "height": 16, "width": 24}, {})
        _, ours = run_engine(engine, run)
    with quiet(), plain_folder(open_checkpoint(source)) as folder:
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    _, theirs = run_pipeline(pipe, run)
    assert psnr(ours, np.asarray(theirs)) > 60


def test_the_class_in_the_index_wins(
    checkpoint: Path, fast: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """diffusers takes the scheduler's class from model_index.json, and only its settings from its own file."""
    name_scheduler(checkpoint, {"_class_name": "EulerDiscreteScheduler"})
    config = {"_class_name": "DEISMultistepScheduler", **BETAS, "steps_offset": 1}
    (checkpoint / SCHEDULE).write_text(json.dumps(config))
    export_bundle(checkpoint, tmp_path / "bundle")
    spec = Bundle.open(tmp_path / "bundle").spec
    (correction,) = spec.corrections
    named = ("DEISMultistepScheduler", "EulerDiscreteScheduler")
    assert (correction.key, correction.found, correction.value) == ("_class_name", *named)
    latentrt(["inspect", str(tmp_path / "bundle")], standalone_mode=False)
    assert f"\n{correction}\n" in capsys.readouterr().out
    schedule = Schedule.from_config(config, spec.corrected(SCHEDULE))
    with quiet(), plain_folder(open_checkpoint(checkpoint)) as folder:
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    assert type(pipe.scheduler).__name__ == schedule.scheduler
    assert [check for check in step_checks(schedule, 4, pipe.scheduler) if check.passed is False] == []
