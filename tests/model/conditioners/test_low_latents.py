"""The latent upscaler against diffusers' pipeline, on the host and on a device."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from PIL import Image

from latentrt import Engine
from latentrt.errors import ExportError, RequestError, ScheduleError
from latentrt.runtime.onnxruntime import OrtBackend
from latentrt.sampling.table import tabulate
from latentrt_export.checkpoint.source import open_checkpoint
from latentrt_export.verify.checks import difference, psnr
from latentrt_export.verify.images import image_checks, run_engine
from latentrt_export.verify.networks import network_checks
from latentrt_export.verify.reference import Run, Theirs, diffusers_scheduler, run_pipeline
from latentrt_export.verify.steps import step_checks
from tests.model.conditioners.conftest import opened
from tests.support.gpu.cuda_kernels import without_kernel
from tests.support.gpu.host_gpu import HostGpu

PROMPTS = ["a cat", "a dog"]
LATENTS_BOUND, PSNR_BOUND = 1e-5, 70.0
Exported = Callable[[str], tuple[Path, Path]]
y, x = np.mgrid[:16, :24] / 24
PICTURE = (np.stack([x, y, x * y], axis=-1) * 255).astype(np.uint8)
ASKED: dict[str, Any] = {"seed": 7, "negative_prompt": "a", "steps": 5}
UNSET: dict[str, Any] = {"solver": None, "width": None, "height": None}
KARRAS = {"use_karras_sigmas": True}
NO_SIGNAL: dict[str, Any] = {"solver": "ddim", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.fixture(scope="module")
def pair(exported: Exported) -> Iterator[tuple[Engine, Path]]:
    with opened(exported, "x2") as both:
        yield both


def test_networks_are_those_of_torch(pair: tuple[Engine, Path]) -> None:
    engine, folder = pair
    assert [check for check in network_checks(engine, folder) if not check.passed] == []
    assert {"sigma", "low_latents", "text_embeds"} <= set(engine.model.predictor.inputs)
    assert not {"timestep", "timestep_cond"} & set(engine.model.predictor.inputs)
    assert (engine.spec.latents.multiple, engine.spec.defaults.steps, engine.spec.defaults.guidance) == (4, 75, 9.0)
    for graph in engine.spec.graphs("fp16-ort-cuda").values():
        assert without_kernel(ir.load(engine.bundle.path(graph.path))) == set()


def test_steps_are_those_of_the_schedulers(pair: tuple[Engine, Path]) -> None:
    """And solvers whose diffusers class takes no predicted latents are refused by name."""
    engine, folder = pair
    checks = list(step_checks(engine.schedule, 5, Theirs(folder, engine).scheduler))
    assert [check for check in checks if check.value is not None and not check.passed] == []
    refused = {check.what for check in checks if check.value is None}
    assert refused == {"pndm", "euler-ancestral", "dpm2", "dpm2-ancestral"}
    with pytest.raises(ScheduleError, match="EulerAncestralDiscreteScheduler has prediction_type = 'sample'"):
        engine("a cat", image=PICTURE, steps=2, solver="euler-ancestral")


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"guidance": 5.0}, {}),
        ({"guidance": 1.0}, KARRAS),
        ({"guidance": 3.0, "solver": "heun"}, {}),
        ({"guidance": 3.0, "solver": "lms"}, {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(24, 16), (33, 23)], ids=str)
def test_pictures_are_those_of_the_pipeline(
    pair: tuple[Engine, Path], settings: dict[str, Any], options: dict[str, Any], size: tuple[int, int]
) -> None:
    """Sides that the UNet does not halve evenly, at which the pipeline fails, are resized to the next smaller ones."""
    engine, folder = pair
    picture = Image.fromarray(PICTURE).resize(size)
    run = Run(PROMPTS, {**ASKED, **UNSET, **settings, **options}, {"image": np.asarray(picture)})
    ours, pictures = run_engine(engine, run)
    own = tuple(side // 4 * 4 for side in size)
    run = run._replace(pictures={"image": np.asarray(picture.resize(own, Image.Resampling.BICUBIC))})
    pipe = Theirs(folder, engine).pipeline(run.settings["solver"])
    pipe.scheduler = diffusers_scheduler(run.settings["solver"], pipe.scheduler, **options)
    theirs, expected = run_pipeline(pipe, run)
    assert pictures.shape[1:3] == (2 * own[1], 2 * own[0])
    assert max(difference(a, b) for a, b in zip(ours, theirs, strict=True)) < LATENTS_BOUND
    assert psnr(pictures, expected) > PSNR_BOUND


def test_verify_compares_what_the_pipeline_draws(pair: tuple[Engine, Path]) -> None:
    engine, folder = pair
    checks = list(image_checks(engine, Theirs(folder, engine), 2, guidances=[3.0]))
    assert len(checks) == 4
    assert all(check.passed for check in checks)


@pytest.mark.parametrize("solver", ["ddim", "dpmpp-2m", "unipc", "dpmpp-2m-sde"])
def test_other_solvers_read_the_same_noise(pair: tuple[Engine, Path], solver: str) -> None:
    """Diffusers' pipeline does not scale their latents: they are compared with Euler's picture, at many steps."""
    engine, _ = pair
    settings = {"image": PICTURE, "seed": 3, "guidance": 1.0}
    euler, other = (np.asarray(engine("a cat", steps=60, solver=name, **settings)[0]) for name in (None, solver))
    few = np.asarray(engine("a cat", steps=1, **settings)[0])
    apart, wrong = (np.abs(one.astype(float) - euler).mean() for one in (other, few))
    assert apart < 1.5 < wrong / 4 if "sde" not in solver else np.isfinite(apart)


def test_a_device_draws_the_same(pair: tuple[Engine, Path]) -> None:
    here, _ = pair
    gpu = HostGpu()
    with Engine.load(here.bundle.root, backend=OrtBackend(threads=1, gpu=gpu), check_hashes=False) as there:
        for more in ({}, {"on_tick": lambda job: None}, {"noise": "torch-cuda:t4"}):
            both = (one("a cat", image=PICTURE, **ASKED, **more)[0] for one in (there, here))
            assert psnr(*map(np.asarray, both)) > 60
    gpu.close()


@pytest.mark.parametrize(
    ("more", "error", "words"),
    [
        ({}, RequestError, "the model enlarges pictures, and there is none.*--image"),
        ({"image": PICTURE, "strength": 0.5}, RequestError, "strength is 0.5, and .* begins on noise"),
        ({"image": PICTURE, "mask": PICTURE[..., 0]}, RequestError, "there is a mask, and .* reads none"),
        ({"image": PICTURE, "guidance": 0.0}, RequestError, 'guidance is 0.*prompt ""'),
        ({"image": PICTURE, "width": 36}, RequestError, "width is 36.*multiple of 8"),
        ({"image": PICTURE[:3]}, RequestError, "height is 6.*multiple of 8"),
        ({"image": PICTURE, "noise_level": 20}, RequestError, "reads no noise_level"),
        ({"image": PICTURE, **NO_SIGNAL}, ScheduleError, "no signal"),
    ],
)
def test_what_it_needs_is_said(
    pair: tuple[Engine, Path], more: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        pair[0]("a cat", steps=1, **more)


def test_the_noise_of_each_row_is_known(pair: tuple[Engine, Path]) -> None:
    """Of a solver that calls the network between two steps too, and of levels of either kind."""
    schedule = pair[0].schedule
    heun, other = (tabulate(name, schedule, 4) for name in ("heun", "ddim"))
    np.testing.assert_allclose(heun.array[:, 1], (heun.sigmas**2 + 1) ** -0.5)
    assert heun.sigmas[1] == heun.sigmas[2] < heun.sigmas[0]
    np.testing.assert_allclose(other.sigmas, (other.known[:, 1] / other.known[:, 0])[:-1])


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, "in_channels 8"),
        ("unet/config.json", {"in_channels": 9}, "in_channels 9.*in_channels 8"),
        ("unet/config.json", {"out_channels": 4}, "out_channels 4.*out_channels 5"),
        ("unet/config.json", {"time_cond_proj_dim": 128}, "time_cond_proj_dim 128.*160"),
        ("unet/config.json", {"time_embedding_type": "positional"}, "time_embedding_type 'positional'.*'fourier'"),
        ("unet/config.json", {"up_block_types": ["KUpBlock2D", "UpBlock2D"]}, "UpBlock2D.*KCrossAttnUpBlock2D"),
    ],
)
def test_other_checkpoints_are_refused(
    exported: Exported, tmp_path: Path, file: str, change: dict[str, Any], words: str
) -> None:
    path = Path(shutil.copytree(exported("x2")[0], tmp_path / "x2")) / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ExportError, match=words):
        open_checkpoint(tmp_path / "x2")
