"""Clip skip against diffusers' pipelines, and as A1111's web UI applies it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import CLIPTextModel

from latentrt import Engine, Request
from latentrt.errors import RequestError
from latentrt_export.verify.checks import psnr
from tests.model.prompts.pipes import SETTINGS, drawn, pipeline

Exported = Callable[[str], tuple[Path, Path]]
PSNR_BOUND = 60.0  # dB


@pytest.mark.parametrize(("name", "skips"), [("sd", (1, 2)), ("sd2", (1, 2)), ("sdxl", (1,))])
def test_it_draws_what_the_pipeline_draws(
    exported: Exported, monkeypatch: pytest.MonkeyPatch, name: str, skips: tuple[int, ...]
) -> None:
    """diffusers 0.42 asks a text encoder for its `text_model`, which transformers 5.23 has merged into it."""
    _, bundle = exported(name)
    pipe = pipeline(bundle, name)
    if not hasattr(CLIPTextModel, "text_model"):
        monkeypatch.setattr(CLIPTextModel, "text_model", property(lambda self: self), raising=False)
    with Engine.load(bundle, threads=1, check_hashes=False) as engine:
        (plain,) = engine("a cat", **SETTINGS)
        (none,) = engine("a cat", clip_skip=0, **SETTINGS)
        np.testing.assert_array_equal(np.asarray(plain), np.asarray(none))
        assert "clip_skip" not in none.info["latentrt"]
        for skip in skips:
            (ours,) = engine("a cat", clip_skip=skip, **SETTINGS)
            assert psnr(np.asarray(ours), drawn(pipe, "a cat", clip_skip=skip)) >= PSNR_BOUND
            assert ours.info["latentrt"]["clip_skip"] == skip
            assert psnr(np.asarray(ours), np.asarray(plain)) < PSNR_BOUND
        with pytest.raises(RequestError, match=f"clip_skip is {skips[-1] + 1}. Needed: at most {skips[-1]}"):
            engine("a cat", clip_skip=skips[-1] + 1, **SETTINGS)


@pytest.mark.parametrize(("name", "acts"), [("sd", True), ("sd2", False), ("sdxl", False)])
def test_in_a1111_it_is_for_both_prompts_of_clip_l_alone(exported: Exported, name: str, acts: bool) -> None:
    _, bundle = exported(name)
    asked = Request(prompt="a cat", negative_prompt="a dog", guidance=4.0, prompt_syntax="a1111", clip_skip=1)
    with Engine.load(bundle, threads=1, check_hashes=False) as engine:
        text, skip = engine.model.text, int(acts)
        assert text is not None
        (job,) = engine.jobs(replace(asked, steps=1))
        sides = text(asked, None, job.noise)
        for side, prompt in ((sides.cond, "a cat"), (sides.uncond, "a dog")):
            known = text.encode(prompt, skip=skip)
            assert side.keys() == known.keys()
            for key, array in known.items():
                np.testing.assert_array_equal(side[key], array)
