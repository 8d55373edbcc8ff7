"""How long does one picture take once the model is loaded?

Measured: both in one warm process, in turn, one picture a round with a new prompt and seed each round, guidance on.
Then the two networks alone, fed the same arrays: one UNet call of two lanes, and one VAE decode. The two pictures of
every round are compared, since a race between different pictures means nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.cases import Config, Ours, Theirs, agreement, race
from benchmarks.measures import OURS, THEIRS, Goal, Measure, Result, at_least
from benchmarks.timing import paired
from latentrt.model.inputs import Sides

TITLE = "One image"
PICTURE, UNET, VAE = "prompt to picture", "one UNet call, two lanes", "one VAE decode"


def measure(config: Config) -> Result:
    """Measure one picture, one UNet call and one decode, by both."""
    ours, theirs = Ours(config), Theirs(config)
    runs = race(ours.draw, theirs.draw, config)
    facts = {"psnr_db": agreement(runs)}
    measures = [Measure(PICTURE, "s", {side: [sample.seconds for sample in runs[side]] for side in runs})]
    for name, (our_call, their_call) in {UNET: _unet(ours, theirs), VAE: _vae(ours, theirs)}.items():
        calls = paired({OURS: our_call, THEIRS: their_call}, 10 * config.repeats, 3 * config.warmup)
        measures.append(Measure(name, "ms", {side: [1000 * s.seconds for s in calls[side]] for side in calls}))
        difference = max(np.abs(a.result - b.result).max() for a, b in zip(*calls.values(), strict=True))
        facts[f"{name}: greatest difference"] = float(difference)
    return Result(measures, facts)


def goals(result: Result) -> list[Goal]:
    """Return the charter's goals."""
    return [
        at_least("one image at least 2 times faster than diffusers", result[PICTURE], 2),
        Goal("the same picture (at least 40 dB)", f"{result.facts['psnr_db']:.1f} dB", result.facts["psnr_db"] >= 40),
    ]


Call = Callable[[int], Any]


def _unet(ours: Ours, theirs: Theirs) -> tuple[Call, Call]:
    import torch

    spec, unet = ours.engine.spec.latents, theirs.pipe.unet
    told = ours.engine.model.text.encode("a red apple")
    inputs = ours.engine.model.hoisted(Sides.same(told)).cond
    sample = np.random.default_rng(0).standard_normal((2, spec.channels, spec.height, spec.width), np.float32)
    timestep, states = np.array([500, 500], np.float32), np.stack([told["encoder_hidden_states"]] * 2)
    tensors = [torch.from_numpy(array) for array in (sample, timestep, states)]
    lanes = {name: np.stack([array] * 2) for name, array in inputs.items()}

    def theirs_call(_: int) -> Any:
        with torch.inference_mode():
            return unet(*tensors, return_dict=False)[0].numpy()

    return lambda _: ours.engine.model.predictor(sample, timestep, lanes), theirs_call


def _vae(ours: Ours, theirs: Theirs) -> tuple[Call, Call]:
    import torch

    spec, vae = ours.engine.spec.latents, theirs.pipe.vae
    latents = np.random.default_rng(0).standard_normal((1, spec.channels, spec.height, spec.width), np.float32)
    scaled = torch.from_numpy(latents / spec.scale + spec.shift)

    def theirs_call(_: int) -> Any:
        with torch.inference_mode():
            return vae.decode(scaled, return_dict=False)[0].numpy()

    return lambda _: ours.engine.model.codec.decode(latents), theirs_call
