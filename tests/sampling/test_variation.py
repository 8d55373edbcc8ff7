"""Noise between those of two seeds, against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from latentrt import Engine
from latentrt.sampling.noise import TorchCpuNoise
from latentrt.sampling.variation import Variation, between

SHAPE = (4, 8, 12)


@pytest.mark.parametrize("part", [0.1, 0.5, 1.0])
def test_each_column_turns_by_its_own_angle(part: float) -> None:
    one, other = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in (7, 8))
    angle = torch.acos(torch.cosine_similarity(one, other, dim=1))[:, None]
    wanted = (torch.sin((1 - part) * angle) * one + torch.sin(part * angle) * other) / torch.sin(angle)
    found = Variation(TorchCpuNoise(7), TorchCpuNoise(8), part).first(SHAPE)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-5)


def test_noises_that_are_the_same_are_mixed_in_a_line() -> None:
    noise = TorchCpuNoise(7).normal(SHAPE)
    np.testing.assert_allclose(between(noise, noise, 0.3), noise, rtol=1e-6)


def test_variations_of_a_picture_have_its_seed_and_count_their_own() -> None:
    asked = {"steps": 2, "seed": 5, "count": 2, "solver": "euler-ancestral", "width": 64, "height": 64}
    with Engine.load(threads=1, check_hashes=False) as engine:
        varied = engine.requests(["a"], {**asked, "subseed": 40, "subseed_strength": 1.0})
        others = engine.requests(["a"], {**asked, "seed": 40})
        (own, _) = engine.requests(["a"], asked)
        (slight, _) = engine.requests(["a"], {**asked, "subseed": 40, "subseed_strength": 1e-6})
        given = {"image": np.zeros((64, 64, 3), np.uint8)}
        (begun, _), (moved, _) = (
            engine.requests(["a"], {**asked, "strength": 0.5, "subseed_strength": part}, given) for part in (0.0, 0.5)
        )
    for job, other in zip(varied, others, strict=True):
        np.testing.assert_allclose(job.latents, other.latents, atol=1e-4)
    np.testing.assert_allclose(slight.latents, own.latents, atol=1e-3)
    np.testing.assert_array_equal(varied[0].noise.normal(SHAPE), own.noise.normal(SHAPE))  # of rows
    assert [(job.tag["seed"], job.tag["subseed"]) for job in varied] == [(5, 40), (5, 41)]
    assert (own.tag["seed"], "subseed" in own.tag) == (5, False)
    assert np.abs(begun.latents - moved.latents).max() > 0.1
