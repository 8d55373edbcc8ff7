"""Image-to-image and inpainting: whole pictures against diffusers' pipelines, and refusals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from latentrt import Engine
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.spec import LatentSpec
from latentrt.errors import BundleError, NetworkError, RequestError, ScheduleError
from latentrt.images.given import open_picture, prepared
from latentrt.request import Request
from latentrt.run.job import Job
from latentrt.runtime.fake import FakeBackend
from latentrt_export.checkpoint.source import open_checkpoint
from latentrt_export.graphs.to_onnx import quiet
from latentrt_export.verify.checks import psnr
from latentrt_export.verify.reference import Theirs, plain_folder

LATENTS_BOUND = 1e-5  # of every row, relative to the largest latent; 2.8e-6 was measured
PSNR_BOUND = 70.0  # dB; 84 was measured
PROMPTS = ["a cat", "a dog"]
SEED = 7
PIPELINES = {
    (False, False): "StableDiffusionImg2ImgPipeline",
    (False, True): "StableDiffusionInpaintPipeline",
    (True, False): "StableDiffusionXLImg2ImgPipeline",
    (True, True): "StableDiffusionXLInpaintPipeline",
}
LATENTS = LatentSpec(4, 8, 1.0, 0.0, 16, 16)
Exported = Callable[[str], tuple[Path, Path]]


def picture(width: int = 133, height: int = 131) -> Image.Image:
    """Return colours that change slowly, with an edge; sides that are no multiple of anything."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    channels = np.stack([0.5 + 0.5 * np.sin(7 * x), y, np.where(x + y > 0.9, 0.8, 0.1)], axis=-1)
    return Image.fromarray((channels * 255).astype(np.uint8))


def mask_for(image: Image.Image) -> Image.Image:
    """Return a soft-edged spot."""
    y, x = np.mgrid[: image.height, : image.width]
    far = np.hypot(x / image.width - 0.4, y / image.height - 0.6)
    return Image.fromarray((np.clip(2 - 5 * far, 0, 1) * 255).astype(np.uint8))


class Pair:
    """Our engine and diffusers' pipelines of one checkpoint."""

    def __init__(self, source: Path, bundle: Path) -> None:
        self.engine = Engine.load(bundle, threads=1, check_hashes=False)
        self.xl = "text_encoder_2" in self.engine.spec.networks
        with plain_folder(open_checkpoint(source)) as folder:
            self._theirs = Theirs(folder, self.engine)

    def ours(self, **asked: Any) -> tuple[list[np.ndarray], np.ndarray]:
        """Return latents after every row, and pixels, of two prompts."""
        pictures = {name: asked.pop(name) for name in ("image", "mask") if name in asked}
        jobs = self.engine.requests(PROMPTS, {"seed": SEED, "negative_prompt": "a", **asked}, pictures)
        rows: list[list[np.ndarray]] = [[] for _ in jobs]
        self.engine.run(jobs, lambda job: rows[jobs.index(job)].append(job.latents))
        pixels = np.stack([np.asarray(self.engine.picture(job)) for job in jobs])
        return [np.stack(row) for row in zip(*rows, strict=True)], pixels

    def theirs(
        self, *, image: Image.Image, mask: Image.Image | None = None, solver: str | None, steps: int, **asked: Any
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """Return diffusers' own, given two pictures: it would encode one of them by the first generator alone."""
        rows: list[np.ndarray] = []

        def keep(pipe: Any, index: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            rows.append(tensors["latents"].numpy().copy())
            return tensors

        more: dict[str, Any] = {"image": [image] * 2}
        if mask is not None:
            factor = self.engine.spec.latents.factor
            size = {name: getattr(image, name) // factor * factor for name in ("height", "width")}
            more |= {"mask_image": [mask] * 2, **size}
        with quiet():
            pipe = self._theirs.pipeline(solver, PIPELINES[self.xl, mask is not None])
            made = pipe(
                PROMPTS,
                negative_prompt=["a"] * 2,
                num_inference_steps=steps,
                guidance_scale=asked["guidance"],
                strength=asked["strength"],
                generator=[torch.Generator().manual_seed(SEED + i) for i in range(2)],
                callback_on_step_end=keep,
                **more,
            )
        return rows, np.stack([np.asarray(each) for each in made.images])


@pytest.fixture(scope="module")
def pair(exported: Exported) -> Iterator[Callable[[str], Pair]]:
    made: dict[str, Pair] = {}
    yield lambda name: made.setdefault(name, Pair(*exported(name))) if name not in made else made[name]
    for each in made.values():
        each.engine.close()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "solver", "strength", "guidance"),
    [
        ("emoji", None, 0.6, 3.0),
        ("emoji", "pndm", 0.7, 3.0),
        ("emoji", "heun", 0.6, 1.0),
        ("emoji", "dpm2", 0.4, 3.0),
        ("emoji", "dpmpp-2m-sde", 0.99, 3.0),
        ("emoji", "euler-ancestral", 1.0, 3.0),
        ("sd", None, 0.8, 3.0),
        ("sd", "unipc", 0.5, 1.0),
        pytest.param("sd2", "dpmpp-2m", 1.0, 5.0, marks=pytest.mark.slow),
        pytest.param("tiny-vae", "euler-ancestral", 0.6, 3.0, marks=pytest.mark.slow),
        ("sdxl", None, 0.5, 3.0),
        ("sdxl", "dpmpp-3m-sde", 0.8, 1.0),
        ("sdxl", "euler", 1.0, 5.0),
    ],
)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_pictures_are_those_of_diffusers(
    pair: Callable[[str], Pair], name: str, solver: str | None, strength: float, guidance: float, masked: bool
) -> None:
    both, image = pair(name), picture() if name == "emoji" else picture(41, 33)
    asked = {"solver": solver, "strength": strength, "guidance": guidance, "steps": 5, "image": image}
    if masked:
        asked["mask"] = mask_for(image)
    rows, pixels = both.ours(**asked)
    expected, wanted = both.theirs(**asked)
    for ours, theirs in zip(rows, expected, strict=True):
        assert np.abs(ours - theirs).max() <= LATENTS_BOUND * np.abs(theirs).max()
    assert psnr(pixels, wanted) >= PSNR_BOUND


@pytest.mark.parametrize("mode", ["RGB", "L", "1"])
@pytest.mark.parametrize("size", [(133, 131), (64, 200), (16, 8)])
def test_masks_and_pictures_are_brought_to_size_as_in_diffusers(size: tuple[int, int], mode: str) -> None:
    image = picture(*size)
    mask = mask_for(image).convert(mode)
    pixels, repaint = prepared(image, mask, 72, 96, LATENTS)
    processor = VaeImageProcessor(do_normalize=False)
    theirs = (processor.preprocess(image, 72, 96)[0].permute(1, 2, 0) * 255).round().to(torch.uint8)
    np.testing.assert_array_equal(pixels, theirs.numpy())
    masks = VaeImageProcessor(do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    assert repaint is not None
    np.testing.assert_array_equal(repaint, masks.preprocess(mask, 72, 96)[0, 0].numpy() == 1)


@pytest.fixture(scope="module")
def fake() -> Iterator[Engine]:
    """Yield the embedded bundle on networks that return zeros."""
    with Engine.load(backend=FakeBackend(), check_hashes=False) as engine:
        yield engine


def test_the_picture_is_as_large_as_the_given_one(fake: Engine) -> None:
    assert fake("a", image=picture(133, 131), steps=2)[0].size == (128, 128)
    assert fake("a", image=picture(100, 41), steps=2, width=64)[0].size == (64, 40)
    assert fake("a", image=np.asarray(picture(64, 48)), steps=2, height=32, width=24)[0].size == (24, 32)


def test_a_picture_says_what_it_began_on(fake: Engine) -> None:
    image = picture()
    plain, given, masked = (
        fake("a", steps=5, **more)[0].info["latentrt"]
        for more in ({}, {"image": image, "strength": 0.4}, {"image": image, "mask": mask_for(image)})
    )
    assert not {"strength", "image", "mask"} & set(plain)
    assert (given["strength"], masked["strength"]) == (0.4, 1.0)
    assert given["image"] == masked["image"]
    assert masked["mask"].startswith("sha256:")


@settings(max_examples=25, deadline=None)
@given(steps=st.integers(1, 30), strength=st.floats(0.02, 1.0), solver=st.sampled_from(["ddim", "heun", "pndm"]))
def test_strength_is_the_part_of_the_run_that_is_made(fake: Engine, steps: int, strength: float, solver: str) -> None:
    asked = {"steps": steps, "strength": strength, "solver": solver}
    left = int(steps * strength)
    if left == 0:
        with pytest.raises(RequestError, match=f"leaves none of {steps} steps"):
            fake.requests(["a"], asked, {"image": picture(16, 16)})
        return
    (job,) = fake.requests(["a"], asked, {"image": picture(16, 16)})
    (whole,) = fake.requests(["a"], {"steps": steps, "solver": solver})
    np.testing.assert_array_equal(job.table.timesteps, whole.table.timesteps[-len(job.table) :])
    assert len(job.table) == {"ddim": left, "heun": 2 * left - 1, "pndm": left + (steps > 1)}[solver]


def test_what_is_black_in_the_mask_ends_as_the_picture_was(fake: Engine) -> None:
    """Exactly: the latents that are kept are the picture's own in the end, with any network."""
    image = picture(64, 64)
    mask = np.zeros((64, 64), bool)
    mask[:, 32:] = True
    (job,) = fake.requests(["a"], {"steps": 4, "solver": "dpmpp-2m-sde"}, {"image": image, "mask": mask})
    assert job.kept is not None
    fake.run([job])
    np.testing.assert_array_equal(job.latents[:, :, :4], job.kept.clean[:, :, :4])
    assert not np.isclose(job.latents[:, :, 4:], job.kept.clean[:, :, 4:]).all()


def test_a_picture_does_not_depend_on_its_company(pair: Callable[[str], Pair]) -> None:
    """Bitwise: a job that keeps a part of a picture, one that begins on it, one from noise."""
    engine, image = pair("emoji").engine, picture(64, 64)

    def made() -> list[Job]:
        return [
            *engine.requests(["a cat"], {"steps": 4, "seed": 1}, {"image": image, "mask": mask_for(image)}),
            *engine.requests(["an owl"], {"steps": 6, "seed": 2, "solver": "dpmpp-2m"}, {"image": image}),
            *engine.requests(["a fox"], {"steps": 3, "seed": 3, "height": 64, "width": 64}),
        ]

    together = made()
    engine.run(together)
    for index, job in enumerate(made()):
        engine.run([job])
        np.testing.assert_array_equal(job.latents, together[index].latents)


def test_the_encoder_is_loaded_when_a_picture_is_given() -> None:
    loaded: list[str] = []

    class Watching(FakeBackend):
        def load(self, bundle: Bundle, network: str) -> Any:
            loaded.append(network)
            return super().load(bundle, network)

    with Engine.load(backend=Watching(), check_hashes=False) as engine:
        assert loaded == ["text_encoder", "unet_text", "unet", "vae_decoder"]
        for _ in range(2):
            engine("a", image=picture(16, 16), steps=2)
        assert loaded[4:] == ["vae_encoder"]
    loaded.clear()
    with Engine.load(backend=Watching(), check_hashes=False, resident=False) as engine:
        engine(["a", "b"], image=picture(16, 16), steps=2)
        assert loaded == ["vae_encoder", "text_encoder", "unet_text", "unet", "vae_decoder"]
        assert engine.model.networks["vae_encoder"]._network is None


def test_a_bundle_without_an_encoder_says_so() -> None:
    bundle = Bundle.open(check_hashes=False)
    networks = {name: network for name, network in bundle.spec.networks.items() if name != "vae_encoder"}
    bundle = replace(bundle, spec=replace(bundle.spec, networks=networks))
    with Engine(bundle, FakeBackend()) as engine, pytest.raises(BundleError, match="no VAE encoder"):
        engine("a", image=picture())


def test_an_encoder_that_returns_nan_is_an_error() -> None:
    channels = Bundle.open(check_hashes=False).spec.latents.channels

    def broken(feeds: Any) -> dict[str, np.ndarray]:
        count, _, height, width = feeds["image"].shape
        return {"moments": np.full((count, 2 * channels, height // 8, width // 8), np.nan, np.float32)}

    backend = FakeBackend({"vae/encoder.onnx": broken})
    with (
        Engine.load(backend=backend, check_hashes=False) as engine,
        pytest.raises(NetworkError, match="VAE encoder"),
    ):
        engine("a", image=picture())


BLACK = Image.new("L", (133, 131))
CLEAR = Image.new("RGBA", (133, 131), (255, 255, 255, 0))


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"mask": BLACK}, "a mask and no picture"),
        ({"strength": 0.5}, "strength is 0.5 and there is no picture"),
        ({"image": picture(), "strength": 1.5}, "strength is 1.5"),
        ({"image": picture(), "strength": 0.0}, "strength is 0.0"),
        ({"image": picture(), "strength": "half"}, "strength is 'half'"),
        ({"image": picture(), "steps": 4, "strength": 0.2}, "leaves none of 4 steps"),
        ({"image": picture(), "width": 100}, "width is 100"),
        ({"image": picture(7, 90)}, "width is 7.*take 8 or 16"),
        ({"image": "apple.png"}, "the image is str"),
        ({"image": np.zeros((8, 8, 3))}, r"the image is float64 \(8, 8, 3\)"),
        ({"image": np.zeros((8, 8), np.uint8)}, r"the image is uint8 \(8, 8\)"),
        ({"image": Image.new("F", (8, 8), 2.0)}, "the image has the mode F"),
        ({"image": Image.new("RGBX", (8, 8))}, "the image has the mode RGBX"),
        ({"image": picture(), "mask": Image.new("I", (133, 131), 1)}, "the mask has the mode I"),
        ({"image": picture(), "mask": np.ones((131, 133))}, "the mask is float64"),
        ({"image": picture(), "mask": BLACK}, "the mask repaints nothing"),
        ({"image": picture(), "mask": CLEAR}, "the mask has transparent pixels"),
        ({"image": picture(), "mask": BLACK.resize((128, 128))}, "the mask is 128x128 and the image 133x131"),
        ({"image": picture(), "init_image": 1}, "'init_image' is not an option"),
    ],
)
def test_what_cannot_be_done_is_said(fake: Engine, asked: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        fake("a", **asked)


def test_a_solver_that_cannot_begin_midway_is_named(fake: Engine) -> None:
    with pytest.raises(ScheduleError, match="lms cannot begin midway"):
        fake("a", image=picture(), solver="lms")
    assert fake("a", image=picture(), solver="lms", strength=1.0, steps=2)


def test_an_edit_serves_the_size_that_it_was_encoded_at(fake: Engine) -> None:
    given = fake.model.given({"image": picture(64, 48)}, Request(prompt="a"))
    latents = fake.jobs(Request(prompt="a", height=48, width=64), given=given)[0].latents
    assert latents.shape == (fake.spec.latents.channels, 6, 8)
    with pytest.raises(RequestError, match="width is 128, and the picture was encoded at 64"):
        fake.jobs(Request(prompt="a", width=128), given=given)


def test_what_is_transparent_is_white() -> None:
    image = Image.new("RGBA", (16, 8), (200, 0, 0, 255))
    image.paste((0, 0, 0, 0), (8, 0, 16, 8))
    for each in (image, image.quantize()):
        pixels, _ = prepared(each, None, None, None, LATENTS)
        assert pixels[4, 2].tolist() == [200, 0, 0]
        assert pixels[4, 13].tolist() == [255, 255, 255]


def test_files_are_turned_as_their_camera_was(tmp_path: Path) -> None:
    upright = picture(32, 16)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right to see it upright
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(open_picture(tmp_path / "turned.png")), np.asarray(upright))
    for name, data in (("text.png", b"no picture"), ("cut.png", (tmp_path / "turned.png").read_bytes()[:200])):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(RequestError, match="cannot be read"):
            open_picture(tmp_path / name)
