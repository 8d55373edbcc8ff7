"""A bundle of an ONNX folder draws what diffusers draws, and what a bundle of the checkpoint draws."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from latentrt import Engine
from latentrt.bundle.bundle import Bundle
from latentrt_export.existing.probe import make_feeds
from latentrt_export.graphs.ranges import open_session
from latentrt_export.graphs.to_onnx import quiet
from latentrt_export.verify.checks import difference, psnr, relative_l2
from latentrt_export.verify.verify import verify
from tests.export.existing.conftest import Make
from tests.support.gpu.cuda_kernels import without_kernel
from tests.support.ort.contrib import interpret

Exported = Callable[[str], tuple[Path, Path]]
PROMPTS = ["a red apple", "a cat"]
SIDES = {"plain": 64}  # pixels; the others' own is 16
QUICK = ("sd", "plain", "sdxl", "half")


def drawn(bundle: Path, side: int = 16, **settings: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return latents and pixels of both prompts."""
    settings = {"steps": 3, "guidance": 3.0, "negative_prompt": "blurry", "seed": 7, **settings}
    with Engine.load(bundle, cache=False) as engine:
        jobs = engine.requests(PROMPTS, {**settings, "height": side, "width": side})
        engine.run(jobs)
        return np.stack([job.latents for job in jobs]), np.stack([np.asarray(engine.picture(job)) for job in jobs])


def drawn_by_diffusers(checkpoint: Path, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the same of the checkpoint's pipeline, as a user would load and call it."""
    with quiet():
        absent = {} if (checkpoint / "text_encoder_2").is_dir() else {"safety_checker": None, "feature_extractor": None}
        pipe = diffusers.DiffusionPipeline.from_pretrained(checkpoint, torch_dtype=torch.float32, **absent)
        pipe.set_progress_bar_config(disable=True)
        latents = pipe(
            PROMPTS,
            negative_prompt=["blurry"] * 2,
            num_inference_steps=3,
            guidance_scale=3.0,
            height=side,
            width=side,
            generator=[torch.Generator().manual_seed(7 + i) for i in range(2)],
            output_type="latent",
        ).images
        with torch.no_grad():
            decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
        images = pipe.image_processor.postprocess(decoded, output_type="pil")
    return latents.numpy(), np.stack([np.asarray(image) for image in images])


@pytest.mark.parametrize("name", ["sd", *(pytest.param(name, marks=pytest.mark.slow) for name in QUICK[1:])])
def test_pictures_are_those_of_the_pipeline(made: Make, name: str) -> None:
    side = SIDES.get(name, 16)
    ours, pictures = drawn(made(name).bundle, side)
    theirs, expected = drawn_by_diffusers(made(name).checkpoint, side)
    assert difference(ours, theirs) < 1e-5  # measured 2e-7 to 2e-6
    assert psnr(pictures, expected) > 60


def test_pictures_are_those_of_the_checkpoint_s_bundle(made: Make, exported: Exported) -> None:
    """Both checkpoints have the same seed."""
    (ours, pictures), (theirs, expected) = drawn(made("sd").bundle), drawn(exported("sd")[1])
    assert difference(ours, theirs) < 1e-5
    assert psnr(pictures, expected) > 60


def test_lanes_have_timesteps_of_their_own(made: Make) -> None:
    """Pictures that are at different steps share batches: to the bit what each gives alone."""
    settings = [{"steps": 3, "solver": "euler"}, {"steps": 4, "solver": "dpmpp-2m"}]
    with Engine.load(made("sd").bundle, cache=False) as engine:
        together = [engine.requests([PROMPTS[0]], {"seed": 7, **own})[0] for own in settings]
        engine.run(together)
        for job, own in zip(together, settings, strict=True):
            (alone,) = engine.requests([PROMPTS[0]], {"seed": 7, **own})
            engine.run([alone])
            np.testing.assert_array_equal(job.latents, alone.latents)


@pytest.mark.slow
def test_timesteps_may_be_fractions(made: Make) -> None:
    """The graph of 2023 takes whole numbers; its bundle does not."""
    bundles = [made(name).bundle for name in ("old-sd", "sd")]
    for one, other in zip(*(drawn(bundle, solver="euler", steps=7) for bundle in bundles), strict=True):
        assert difference(one.astype(float), other.astype(float)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd", "old-sd", "sd2", "sdxl", "inpainting"])
def test_every_network_and_picture_is_diffusers_own(made: Make, name: str) -> None:
    """Networks at two sizes, whole pictures of four solvers, and a batch against its own jobs to the bit.

    Not a graph that was traced in float16: it has rounded constants (1.702 of CLIP's activation), 4e-5 of the states.
    """
    checkpoint, _, bundle = made(name)
    checks = list(verify(bundle, checkpoint, steps=2))
    assert {check.depth for check in checks} >= {"network", "image", "batch"}
    assert [check for check in checks if check.passed is False] == []


@pytest.mark.parametrize("name", ["sd", "plain", *(pytest.param(name, marks=pytest.mark.slow) for name in QUICK[2:])])
def test_graphs_are_in_the_forms_of_export_s_own(made: Make, name: str) -> None:
    """What hoisting, step caching, and the CUDA and CPU graphs need is found; every node has a CUDA kernel."""
    root = made(name).bundle
    spec = Bundle.open(root).spec
    assert {"unet_text", "unet_shallow"} <= set(spec.networks)
    for network, own in spec.networks.items():
        assert set(own.variants) >= {"fp32", "fp16", "fp16-ort-cuda"}, network
        onnx.checker.check_model(root / own.variants["fp32"].path, full_check=True)
        assert without_kernel(ir.load(root / own.variants["fp16-ort-cuda"].path)) == set(), network
    unet = ir.load(root / spec.networks["unet"].variants["fp32"].path)
    kinds = [node.op_type for node in unet.graph]
    assert kinds.count("Attention") > 0
    assert "Softmax" not in kinds
    if name != "plain":
        text = ir.load(root / spec.networks["text_encoder"].variants["fp32"].path)
        assert {"Expand", "ConstantOfShape", "Softmax", "Range"}.isdisjoint(node.op_type for node in text.graph)


@pytest.mark.parametrize("network", ["text_encoder", "unet", "vae_decoder"])
def test_cuda_graphs_give_the_numbers_of_float32(made: Make, network: str) -> None:
    """The fused operators are interpreted in numpy, as they round on a GPU."""
    root = made("sd").bundle
    spec = Bundle.open(root).spec
    graphs = [spec.networks[network].graph(variant) for variant in ("fp32", "fp16-ort-cuda")]
    feeds = make_feeds(graphs[0].inputs, {"batch": 2, "height": 8, "width": 4, "tokens": 77})
    models = [ir.load(root / graph.path) for graph in graphs]
    folder = (root / graphs[0].path).parent
    exact = open_session(models[0], folder).run(None, feeds)
    narrow = {tensor.name: feeds[tensor.name].astype(tensor.dtype) for tensor in graphs[1].inputs}
    for ours, theirs in zip(interpret(models[1], folder, narrow), exact, strict=True):
        assert relative_l2(ours.astype(np.float32), theirs) < 5e-3
