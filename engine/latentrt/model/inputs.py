"""Inputs of a denoiser besides latents and timestep. One small conditioner fills each of them.

A denoiser declares its inputs by name in its signature; `conditioners/registry.py` finds who fills which. A conditioner
turns a request into arrays for the lanes without the prompt (uncond) and the lane with it (cond).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from latentrt.model.given import Given
from latentrt.request import Request
from latentrt.sampling.noise import NoiseSource
from latentrt.sampling.table import Table

Inputs = Mapping[str, NDArray[Any]]


class Sides(NamedTuple):
    """Inputs of the denoiser by name, without the lane axis, for the lanes of a guided picture.

    Attributes:
        uncond: without the prompt and, where three lanes run, without the given picture.
        cond: with all.
        image: with the picture and without the prompt, of a third lane; None: as `uncond`.
    """

    uncond: Inputs
    cond: Inputs
    image: Inputs | None = None

    @classmethod
    def same(cls, inputs: Inputs) -> Sides:
        """Return the same inputs for both lanes."""
        return cls(inputs, inputs)

    def and_(self, other: Sides) -> Sides:
        """Return both sides with another conditioner's inputs added."""
        uncond, cond = {**self.uncond, **other.uncond}, {**self.cond, **other.cond}
        if self.image is None and other.image is None:
            return Sides(uncond, cond)
        return Sides(uncond, cond, {**self.lanes(3)[1], **other.lanes(3)[1]})

    def lanes(self, count: int) -> tuple[Inputs, ...]:
        """Return the inputs of 1, 2 or 3 lanes: those with the prompt are the last."""
        image = self.uncond if self.image is None else self.image
        return {1: (self.cond,), 2: (self.uncond, self.cond), 3: (self.uncond, image, self.cond)}[count]


class Conditioner:
    """Fills some of the denoiser's inputs.

    Attributes:
        inputs: names of the inputs that it fills.
        fields: fields of a request that only models with this conditioner read.
        pictures: pictures of a request that its models' pipelines draw from.
        shows_picture: whether it shows the denoiser the given picture itself, so that runs begin on noise.
        enlarges: how many times as large that picture is drawn.
        encodes: whether that picture is encoded, where it is drawn larger.
        draws_first: whether its noise is drawn before that of the first latents.
    """

    inputs: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    pictures: tuple[str, ...] = ()
    shows_picture = False
    enlarges = 1
    encodes = False
    draws_first = False

    def __call__(self, request: Request, given: Given | None, noise: NoiseSource) -> Sides:
        """Return the inputs of one picture.

        Args:
            request: with the model's defaults filled in.
            given: the picture that it begins on, if any.
            noise: the picture's own, after its first latents were drawn, or before (`draws_first`). A conditioner draws
                what its diffusers pipeline draws.

        Raises:
            RequestError: the request lacks what the denoiser needs.
        """
        raise NotImplementedError

    def check_settings(self, request: Request) -> None:
        """Refuse settings that models with this conditioner cannot use.

        Args:
            request: with the model's defaults filled in.

        Raises:
            RequestError: it has one.
        """

    def scalars(self, request: Request, table: Table) -> Mapping[str, NDArray[np.float64]]:
        """Return inputs of one number for each lane that change with the row, (rows,) each: columns of the table.

        Raises:
            ScheduleError: the run has a noise that the denoiser cannot read.
        """
        return {}
