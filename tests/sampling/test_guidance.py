"""Guidance against its formula and against diffusers' rescaling."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from hypothesis import given
from hypothesis import strategies as st

from latentrt.sampling.guidance import Guidance


def lanes(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed).standard_normal((2, 4, 8, 8), np.float32)
    return draw[0], draw[1]


def test_scale_one_is_the_conditional_output() -> None:
    uncond, cond = lanes()
    np.testing.assert_allclose(Guidance(1.0).combine(uncond, cond), cond, atol=1e-6)


@pytest.mark.parametrize("rescale", [0.3, 0.7, 1.0])
def test_rescale_is_diffusers_own(rescale: float) -> None:
    uncond, cond = (torch.from_numpy(lane) for lane in lanes())
    guided = uncond + 7.5 * (cond - uncond)
    theirs = rescale_noise_cfg(guided[None], cond[None], guidance_rescale=rescale)[0]
    ours = Guidance(7.5, rescale).combine(*lanes())
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=2e-6, atol=2e-6)
    assert ours.dtype == np.float32


def test_three_lanes_are_combined_as_in_diffusers() -> None:
    """pipeline_stable_diffusion_instruct_pix2pix.py has the lanes in the order prompt, picture, neither."""
    (uncond, image), (cond, _) = lanes(), lanes(1)
    theirs = uncond + 7.5 * (cond - image) + 1.5 * (image - uncond)
    np.testing.assert_array_equal(Guidance(7.5, image=1.5).combine(uncond, image, cond), theirs)
    assert [Guidance(scale, image=picture).lanes for scale, picture in ((1, 2), (2, None), (2, 1))] == [1, 2, 3]


@given(rows=st.integers(1, 100), start=st.floats(0, 1), end=st.floats(0, 1))
def test_guidance_acts_in_its_interval_alone(rows: int, start: float, end: float) -> None:
    guidance = Guidance(3.0, interval=(start, end))
    assert [guidance.acts(row, rows) for row in range(rows)] == [
        start * rows <= row < end * rows for row in range(rows)
    ]
    assert not any(Guidance(1.0).acts(row, rows) for row in range(rows))
    assert all(Guidance(3.0).acts(row, rows) for row in range(rows))
