"""Classifier-free guidance: how the outputs of the unconditional and the conditional lane become one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Guidance:
    """How strongly, and in which part of the run, the prompt is followed.

    Attributes:
        scale: Ho and Salimans 2022's guidance scale as diffusers counts it; 1 or less means no guidance and one lane.
        rescale: how far the guided output's standard deviation is pulled back to the conditional one's, 0 to 1
            (Lin et al. 2023, section 3.4).
        interval: fractions (start, end) of the rows between which guidance acts (Kynkäänniemi et al. 2024).
    """

    scale: float = 1.0
    rescale: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)

    def acts(self, row: int, rows: int) -> bool:
        """Return whether this row of a run of `rows` rows takes two lanes."""
        start, end = self.interval
        return self.scale > 1 and start * rows <= row < end * rows

    def combine(self, uncond: Float32, cond: Float32) -> Float32:
        """Return the guided output from the two lanes' outputs, one picture each, any shape, float32."""
        guided = uncond + self.scale * (cond - uncond)
        if self.rescale:
            matched = guided * (np.std(cond, ddof=1) / np.std(guided, ddof=1))
            guided = self.rescale * matched + (1 - self.rescale) * guided
        return guided
