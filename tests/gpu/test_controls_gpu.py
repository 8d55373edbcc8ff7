"""ControlNets on a GPU: pictures of the CPU with the same ones, in any company."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from latentrt import Engine
from tests.gpu.gpu_rig import SCALE, GpuRig
from tests.gpu.test_pictures_gpu import psnr

pytestmark = pytest.mark.gpu
Draw = Callable[..., NDArray[np.uint8]]
ADD_ON = {"grey": "emoji-grey"}
y, x = np.mgrid[: SCALE.pixels, : SCALE.pixels] / SCALE.pixels
DISC = Image.fromarray((np.hypot(x - 0.5, y - 0.4) < 0.3).astype(np.uint8) * np.uint8(180))
CONTROLS: tuple[dict[str, Any], ...] = (
    {},
    {"grey": DISC},
    {"grey": {"image": DISC, "scale": 0.5, "start": 0.4}},
    {"grey": {"image": DISC, "guess": True}},
)


@pytest.fixture(scope="module")
def controlled(rig: GpuRig) -> GpuRig:
    """Return the same backend, with plans of the ControlNet and of the UNet that reads what it gives."""
    rig.build(*(f"controlnet={name}={bundle}" for name, bundle in ADD_ON.items()))
    return rig


def test_pictures_with_a_control_are_those_of_the_cpu(controlled: GpuRig, draw: Draw) -> None:
    def drawn(engine: Engine) -> list[NDArray[np.uint8]]:
        return [draw(engine, seed=7, guidance=2.5, control=control) for control in CONTROLS]

    with controlled.engine(control=ADD_ON) as engine:
        ours = drawn(engine)
    with Engine.load(control=ADD_ON, check_hashes=False) as here:
        wanted = drawn(here)
    for one, other in zip(ours, wanted, strict=True):
        assert psnr(one, other) > (35 if controlled.half else 50)
    assert psnr(wanted[0], wanted[1]) < 30


def test_company_changes_no_bit(controlled: GpuRig) -> None:
    """Jobs without and with a ControlNet, each alone and all in one batch."""

    def jobs(engine: Engine) -> list[Any]:
        common = {"width": SCALE.pixels, "height": SCALE.pixels, "steps": SCALE.steps, "guidance": 2.5}
        asked = [{**common, "seed": seed, "control": control} for seed, control in enumerate(CONTROLS)]
        return [job for one in asked for job in engine.requests(["a red apple"], one)]

    with controlled.engine(control=ADD_ON) as engine:
        alone, together = jobs(engine), jobs(engine)
        for job in alone:
            engine.run([job])
        engine.run(together)
        for one, other in zip(alone, together, strict=True):
            np.testing.assert_array_equal(one.latents, other.latents)
