"""Classifier-free guidance: how the outputs of a picture's lanes become one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Guidance:
    """How strongly, and in which part of the run, the prompt is followed, and the picture that it is about.

    Attributes:
        scale: Ho and Salimans 2022's guidance scale as diffusers counts it; 1 or less means no guidance and one lane.
        rescale: how far the guided output's standard deviation is pulled back to the conditional one's, 0 to 1
            (Lin et al. 2023, section 3.4).
        interval: fractions (start, end) of the rows between which guidance acts (Kynkäänniemi et al. 2024).
        image: the scale of the picture's own guidance, with a third lane (Brooks et al. 2023); None: there is none.
    """

    scale: float = 1.0
    rescale: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)
    image: float | None = None

    @property
    def lanes(self) -> int:
        """The lanes of a row in which guidance acts."""
        if self.scale <= 1:
            return 1
        return 2 if self.image is None else 3

    def acts(self, row: int, rows: int) -> bool:
        """Return whether this row of a run of `rows` rows takes all lanes; others take one."""
        start, end = self.interval
        return self.lanes > 1 and start * rows <= row < end * rows

    def combine(self, uncond: Float32, *others: Float32) -> Float32:
        """Return the guided output from the outputs of all lanes, one picture each, any shape, float32.

        Args:
            uncond: without the prompt, and with three lanes without the picture.
            others: with prompt and all; with three lanes before it that with the picture alone.
        """
        cond = others[-1]
        if self.image is None:
            guided = uncond + self.scale * (cond - uncond)
        else:
            image, _ = others
            guided = uncond + self.scale * (cond - image) + self.image * (image - uncond)
        if self.rescale:
            matched = guided * (np.std(cond, ddof=1) / np.std(guided, ddof=1))
            guided = self.rescale * matched + (1 - self.rescale) * guided
        return guided
