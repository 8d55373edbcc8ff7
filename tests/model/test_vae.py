"""Tiles against diffusers' own tiling, another bundle's VAE, and a decoder of previews."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from latentrt import Engine
from latentrt.bundle.bundle import EMBEDDED, Bundle
from latentrt.errors import BundleError, PlanError, RequestError
from latentrt.images.pixels import to_uint8
from latentrt.model.vae.tiles import Tiles
from latentrt.runtime.fake import FakeBackend
from latentrt.runtime.tensorrt.record import Profile
from latentrt_export.graphs.to_onnx import quiet
from latentrt_export.verify.checks import psnr
from latentrt_export.verify.reference import Theirs
from tests.model.test_edit import picture

Exported = Callable[[str], tuple[Path, Path]]
BOUND = 1e-5  # of a number, relative to the largest
NAMES = ["vae_decoder", "vae_encoder"]
TILE = 128  # pixels, of the embedded model's 256


@pytest.fixture(scope="module")
def tiled() -> Iterator[Engine]:
    with Engine.load(threads=1, check_hashes=False, tile=TILE) as engine:
        yield engine


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    """The embedded model's VAE as diffusers tiles it."""
    vae = AutoencoderKL.from_pretrained(EMBEDDED / "vae").eval()
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size = TILE, TILE // 8
    return vae


@pytest.mark.parametrize("size", [(32, 32), (13, 29), (16, 16), (25, 16), (37, 9)])
def test_tiles_are_those_of_diffusers(tiled: Engine, vae: AutoencoderKL, size: tuple[int, int]) -> None:
    """Of sides that end in a narrow tile, in none, and in one that is all overlap."""
    draw, scale = np.random.default_rng(0), tiled.spec.latents.scale
    latents = draw.standard_normal((2, 4, *size), np.float32)
    image = draw.uniform(-1, 1, (3, size[0] * 8, size[1] * 8)).astype(np.float32)
    with torch.no_grad():
        decoded = vae.decode(torch.from_numpy(latents) / scale).sample.numpy()
        moments = vae.encode(torch.from_numpy(image[None])).latent_dist
    encoded = tiled.model.codec.encode(image)
    assert encoded.std is not None
    pairs = [(tiled.model.codec.decode(latents), decoded)]
    pairs += [(encoded.mean, (moments.mean[0] * scale).numpy()), (encoded.std, (moments.std[0] * scale).numpy())]
    for ours, theirs in pairs:
        assert np.abs(ours - theirs).max() <= BOUND * np.abs(theirs).max()


def test_a_tiled_picture_is_that_of_diffusers(tiled: Engine, vae: AutoencoderKL) -> None:
    asked: dict[str, Any] = {"width": 200, "height": 136}
    made = tiled("a red apple", steps=3, solver="ddim", guidance=3.0, seed=5, **asked)
    (small,) = tiled("a red apple", steps=1)
    assert (made[0].info["latentrt"]["tile"], "tile" in small.info["latentrt"]) == (TILE, False)
    with quiet():
        pipe = Theirs(EMBEDDED, tiled).pipeline("ddim")
        pipe.vae = vae
        generator = torch.Generator().manual_seed(5)
        theirs = pipe("a red apple", num_inference_steps=3, guidance_scale=3.0, generator=generator, **asked).images
    assert psnr(*(np.stack([np.asarray(each) for each in images]) for images in (made, theirs))) >= 60


def test_tiles_that_do_not_fit() -> None:
    for tile in (0, 100, "512", 24):
        with pytest.raises(RequestError, match=r"tile is .*a multiple of 32 pixels.*take 512"):
            Tiles.of(tile, 8)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="has no VAE"):
        Engine.load("pixels", check_hashes=False, tile=128)


def test_plans_that_take_no_such_tile_are_named_before_anything_is_drawn() -> None:
    class Planned(FakeBackend):
        def load(self, bundle: Bundle, network: str) -> Any:
            loaded: Any = super().load(bundle, network)
            loaded.profiles = (Profile({"batch": (1, 1, 1), "height": (16, 16, 16), "width": (16, 16, 16)}),)
            return loaded

    with Engine.load(backend=Planned(), check_hashes=False, tile=TILE) as engine:
        with pytest.raises(PlanError, match=r"no plan of the decoder takes a tile of .*--profile size="):
            engine.requests(["a"], {"width": 256, "height": 256})
        assert engine.requests(["a"], {})


def test_another_vae_draws_all_pictures(exported: Exported) -> None:
    """In the place of the model's own: a tiny one, which adds no noise to what it encodes."""
    source, bundle = exported("taesd")
    assert (Bundle.open(bundle).spec.schedule, sorted(Bundle.open(bundle).spec.networks)) == (None, NAMES)
    asked: dict[str, Any] = {"steps": 4, "solver": "ddim", "guidance": 3.0, "seed": 5, "strength": 0.6}
    image = picture(64, 64)
    with Engine.load(threads=1, check_hashes=False, vae=bundle) as engine, quiet():
        made = engine("a red apple", image=image, **asked)
        pipe = Theirs(EMBEDDED, engine).pipeline("ddim", "StableDiffusionImg2ImgPipeline")
        pipe.vae = AutoencoderTiny.from_pretrained(source).eval()
        own = {"num_inference_steps": 4, "guidance_scale": 3.0, "strength": 0.6}
        theirs = pipe("a red apple", image=image, generator=torch.Generator().manual_seed(5), **own).images
    assert made[0].info["latentrt"]["vae"] == "taesd"
    assert psnr(*(np.stack([np.asarray(each) for each in images]) for images in (made, theirs))) >= 60


def test_previews_have_a_decoder_of_their_own(exported: Exported) -> None:
    source, bundle = exported("taesd")
    with (
        Engine.load(threads=1, check_hashes=False, preview_vae=bundle) as engine,
        Engine.load(threads=1, check_hashes=False) as plain,
    ):
        latents = np.random.default_rng(0).standard_normal((4, 16, 12), np.float32)
        np.testing.assert_array_equal(engine.decode(latents), plain.decode(latents))
        np.testing.assert_array_equal(plain.preview(latents), plain.decode(latents))
        with torch.no_grad():
            theirs = AutoencoderTiny.from_pretrained(source).eval().decode(torch.from_numpy(latents[None])).sample
        assert psnr(np.asarray(engine.preview(latents))[None], to_uint8(theirs.numpy())) >= 60


def test_what_is_no_vae_for_a_model_is_refused(exported: Exported) -> None:
    _, taesd = exported("taesd")
    _, narrow = exported("tiny-vae")
    with pytest.raises(BundleError, match=r"taesd has no denoiser: it is a VAE.*--vae"):
        Engine.load(taesd)
    for name in ("vae", "preview_vae"):
        for model, other, words in (
            (EMBEDDED, narrow, r"4 channels, 2 pixels a side.*4 channels, 8 pixels a side"),
            (EMBEDDED, "pixels", "has no VAE"),
            ("pixels", taesd, "draws pixels and takes no VAE"),
        ):
            with pytest.raises(RequestError, match=words):
                Engine.load(model, check_hashes=False, **{name: other})
