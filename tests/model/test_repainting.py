"""How a mask is used: its region alone as diffusers' padding_mask_crop, soft edges, fills; the noise of rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from latentrt import Engine
from latentrt.errors import RequestError
from latentrt.images.inpaint import blurred, doubled
from latentrt.images.resize import covering
from latentrt.run.job import Job
from latentrt.runtime.onnxruntime import OrtBackend
from latentrt_export.checkpoint.source import open_checkpoint
from latentrt_export.graphs.to_onnx import quiet
from latentrt_export.verify.checks import psnr
from latentrt_export.verify.reference import Theirs, plain_folder
from tests.model.test_edit import mask_for, picture
from tests.support.gpu.host_gpu import HostGpu

Exported = Callable[[str], tuple[Path, Path]]
IMAGE = picture(150, 110)
MASK = mask_for(IMAGE.resize((75, 60))).resize((75, 60))
AREA = Image.new("L", IMAGE.size)
AREA.paste(MASK, (50, 30))
SIZE = {"width": 64, "height": 64}


@pytest.fixture(scope="module")
def engine(exported: Exported) -> Any:
    with Engine.load(exported("emoji")[1], threads=1, check_hashes=False) as engine:
        yield engine


def drawn(engine: Engine, **asked: Any) -> Any:
    settings = {"steps": 3, "seed": 7, "guidance": 3.0, "strength": 0.7, "solver": "dpmpp-2m", **SIZE, **asked}
    return np.asarray(engine("a cat", image=IMAGE, mask=AREA, **settings)[0])


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("blur", [0, 3])
def test_a_region_is_drawn_as_in_diffusers(engine: Engine, exported: Exported, blur: int) -> None:
    with plain_folder(open_checkpoint(exported("emoji")[0])) as folder, quiet():
        pipe = Theirs(folder, engine).pipeline("dpmpp-2m", "StableDiffusionInpaintPipeline")
        mask = blurred(AREA, blur)
        wanted = pipe(
            "a cat",
            image=IMAGE,
            mask_image=mask,
            padding_mask_crop=8,
            num_inference_steps=3,
            guidance_scale=3.0,
            strength=0.7,
            generator=torch.Generator().manual_seed(7),
            **SIZE,
        ).images[0]
    ours = drawn(engine, mask_crop=8, mask_blur=blur)
    assert ours.shape == (110, 150, 3)
    assert psnr(ours, np.asarray(wanted)) >= 60
    outside = np.asarray(mask) == 0
    np.testing.assert_array_equal(ours[outside], np.asarray(IMAGE)[outside])


def test_outside_a_mask_the_pixels_are_the_pictures_own(engine: Engine) -> None:
    plain, soft, kept = (drawn(engine, **more) for more in ({}, {"mask_blur": 4}, {"mask_keeps": True}))
    resized = np.asarray(IMAGE.resize((64, 64), Image.Resampling.LANCZOS))
    edge = doubled(blurred(AREA, 4).resize((64, 64), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(soft[np.asarray(edge) == 0], resized[np.asarray(edge) == 0])
    area = np.asarray(doubled(AREA.resize((64, 64), Image.Resampling.LANCZOS)))
    np.testing.assert_array_equal(kept[area == 0], resized[area == 0])
    np.testing.assert_array_equal(kept[area == 255], plain[area == 255])
    assert (plain[area == 0] != resized[area == 0]).any()


def test_a_run_begins_on_what_fills_the_mask(engine: Engine) -> None:
    def first(fill: str) -> tuple[Job, Any]:
        asked = {"steps": 4, "strength": 0.5, "solver": "ddim", "mask_fill": fill, **SIZE}
        (job,) = engine.requests(["a"], asked, {"image": IMAGE, "mask": AREA})
        assert job.kept is not None
        return job, (job.latents - job.table.known[0][1].astype(np.float32) * job.kept.noise) / job.table.known[0][0]

    (job, original), (_, fill), (_, noise), (_, nothing) = map(first, ("original", "fill", "noise", "nothing"))
    assert job.kept is not None
    inside = job.kept.mask > 0
    np.testing.assert_allclose(original, job.kept.clean, atol=1e-4)
    np.testing.assert_allclose(noise[inside], job.kept.noise[inside], atol=1e-4)
    np.testing.assert_allclose(nothing[inside], 0, atol=1e-4)
    assert np.abs(fill - original)[inside].max() > 0.1
    for one in (noise, nothing):
        np.testing.assert_allclose(one[~inside], fill[~inside], atol=1e-4)
    asked = {"mask_fill": "noise", "mask_blur": 2}
    made = engine("a", image=IMAGE, mask=AREA, steps=2, **SIZE, **asked)[0].info["latentrt"]
    assert {name: made[name] for name in asked} == asked
    assert "mask_crop" not in made


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"mask_blur": 4}, "settings of a mask .* and no mask"),
        ({"mask_fill": "blue", "mask": AREA}, "mask_fill is 'blue'.*original, fill, noise, nothing"),
        ({"resize": "tile"}, "resize is 'tile'.*stretch, crop, fill"),
        ({"resize": "crop", "mask_crop": 0, "mask": AREA}, "resize is crop and mask_crop 0"),
        ({"resize": "fill", "image": None}, "resize is fill, and there is no picture"),
        ({"mask_crop": -1, "mask": AREA}, "mask_crop is -1"),
        ({"mask_crop": 0, "mask": Image.new("L", IMAGE.size)}, "the mask repaints nothing"),
        ({"mask_crop": 0, "mask": Image.new("L", (3, 3))}, "the mask is 3x3"),
    ],
)
def test_what_a_mask_cannot_do_is_said(engine: Engine, asked: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        engine("a", **{"image": IMAGE, "steps": 2, **asked})


@pytest.mark.parametrize("masked", [{}, {"mask": AREA, "mask_keeps": True}])
def test_a_picture_that_keeps_its_proportions(engine: Engine, masked: dict[str, Any]) -> None:
    """It is the run on one that was cropped before."""
    asked = {"steps": 2, "strength": 0.5, "seed": 3, **SIZE}
    cropped = {name: one if name == "mask_keeps" else covering(one, (64, 64)) for name, one in masked.items()}
    (expected,) = engine("a", image=covering(IMAGE, (64, 64)), **cropped, **asked)
    (made,) = engine("a", image=IMAGE, **masked, **asked, resize="crop")
    assert made.tobytes() == expected.tobytes()
    assert made.info["latentrt"]["resize"] == "crop"


def test_rows_may_draw_their_noise_from_another_seed(engine: Engine) -> None:
    """The first latents are the seed's, and the rows' noise begins anew: that of seed + seed_delta."""
    asked = {"steps": 3, "seed": 5, "solver": "euler-ancestral", **SIZE}
    (plain,), (other,) = (engine.requests(["a"], {**asked, "seed_delta": delta}) for delta in (0, 31337))
    np.testing.assert_array_equal(plain.latents, other.latents)
    (known,) = engine.requests(["a"], {**asked, "seed": 5 + 31337})
    np.testing.assert_array_equal(other.noise.normal((4, 8, 8)) * known.table.start, known.latents)
    pictures = [np.asarray(engine("a", **asked, seed_delta=delta)[0]) for delta in (0, 31337)]
    assert (pictures[0] != pictures[1]).any()


@pytest.fixture(scope="module")
def on_gpu(exported: Exported) -> Any:
    gpu = HostGpu()
    backend = OrtBackend(threads=1, gpu=gpu)
    with Engine.load(exported("emoji")[1], backend=backend, lanes=4, check_hashes=False) as engine:
        yield engine
    gpu.close()


@pytest.mark.parametrize("noise", ["torch-cpu", "torch-cuda:h100"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_a_gpu_draws_the_same(engine: Engine, on_gpu: Engine, noise: str, masked: bool) -> None:
    """By single rows and in one launch: what lies over the picture, and the rows' own seed."""
    asked: dict[str, Any] = {"steps": 3, "seed": 5, "solver": "euler-ancestral", "noise": noise, **SIZE}
    asked |= {"eta": 0.8, "s_noise": 1.05, "seed_delta": 31337}
    if masked:
        asked |= {"image": IMAGE, "mask": AREA, "mask_blur": 3, "mask_crop": 8, "mask_fill": "noise", "strength": 0.7}
    (wanted,) = engine("a cat", **asked)
    for more in ({}, {"on_tick": lambda job: None}):
        (ours,) = on_gpu("a cat", **asked, **more)
        assert ours.size == wanted.size
        assert psnr(np.asarray(ours), np.asarray(wanted)) >= 60
