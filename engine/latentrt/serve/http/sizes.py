"""The sizes that a server draws: those of the model, its plans and the settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from latentrt.bundle.spec import LatentSpec
from latentrt.errors import PlanError, RequestError
from latentrt.images.given import enlarged_size
from latentrt.runtime.tensorrt.record import Profile
from latentrt.serve.core.rules.budget import Budget
from latentrt.serve.http.errors import Problem
from latentrt.serve.process.config import Settings
from latentrt.values import parse_size

LEAST_LATENTS = 8  # a side; below it a UNet's deepest level would have less than one
SUGGESTED = ((256, 256), (512, 512), (768, 768), (1024, 1024), (1024, 1536), (1536, 1024))
MOST_SIDE, MOST_PIXELS, GIVEN = 2048, 1536 * 1024, 512  # where settings say no more; GIVEN is a side that is enlarged
Size = tuple[int, int]  # width and height in pixels


def most_pixels(latents: LatentSpec, settings: Settings, enlarges: int) -> int:
    """Return the most pixels of a picture: what the settings allow, or the model's own size and task ask for."""
    own = math.prod(latents.pixels_of(None, None))
    return settings.max_pixels or max(MOST_PIXELS, own, (GIVEN * enlarges) ** 2 if enlarges > 1 else 0)


class Sizes:
    """The sizes that a server draws, width before height, in pixels.

    Args:
        latents: which sizes the model takes.
        profiles: the sizes of latents ("height", "width") that plans draw; None: all.
        settings: what this server allows.
        enlarges: how many times as large a client's own picture is drawn.
        budget: says which sizes fit into memory; None: all.

    Attributes:
        own: the model's own.
        most_side, most_pixels: of other sizes.
        listed: all, where they can be listed; none where there are ranges.

    Raises:
        RequestError: the settings list a size that cannot be.
        PlanError: no plans draw any size.
    """

    def __init__(
        self,
        latents: LatentSpec,
        profiles: Sequence[Profile] | None,
        settings: Settings,
        *,
        enlarges: int,
        budget: Budget | None = None,
    ) -> None:
        self._latents, self._enlarges = latents, enlarges
        self.most_side = settings.max_side or max(MOST_SIDE, *latents.pixels_of(None, None))
        self._asked = self.most_pixels = most_pixels(latents, settings, enlarges)
        if budget is not None:
            self.most_pixels = budget.largest(self._asked // latents.factor**2) * latents.factor**2
        self._least = -(-LEAST_LATENTS // latents.multiple) * latents.step
        self._plans = None if profiles is None else [self._ends(profile) for profile in profiles]
        self.own = self._own()
        self.listed = tuple(map(self._wanted, settings.sizes)) or self._planned()

    def of(self, text: str | None) -> Size:
        """Return width and height of "512x512"; None, "" and "auto" are the model's own.

        Raises:
            Problem: 400 unsupported_size, with those that are supported.
        """
        if text in (None, "", "auto"):
            return self.own
        try:
            width, height = parse_size(str(text), "size")
        except RequestError as error:
            raise self._unsupported(str(text)[:40]) from error
        return self.sides(width, height)

    def sides(self, width: int, height: int) -> Size:
        """Return the same for two numbers."""
        if not self.draws(width, height):
            raise self.too_large(width, height) or self._unsupported(f"{width}x{height}")
        return width, height

    def too_large(self, width: int, height: int) -> Problem | None:
        """Return the refusal of a size that would be drawn with more memory; None for others."""
        if self.listed or max(width, height) > self.most_side or not self.most_pixels < width * height <= self._asked:
            return None
        scale, step = math.sqrt(self.most_pixels / (width * height)), self._latents.step
        fitting = [max(self._least, int(side * scale) // step * step) for side in (width, height)]
        found = f"a picture of {width}x{height} takes more memory than this server has for one"
        needed = f"at most {self.most_pixels} pixels, as {fitting[0]}x{fitting[1]}"
        return Problem(found, needed, "take a smaller one", param="size", code="beyond_memory")

    def fitting(self, width: int, height: int) -> Size:
        """Return the size in which a client's own picture is edited: its shape, with the model's number of pixels; or
        what it is enlarged to.

        Raises:
            Problem: 400 unsupported_size: it is enlarged to a size that is not drawn.
        """
        if self._enlarges > 1:
            return self._enlarged(width, height)
        if self.listed:
            return min(self.listed, key=partial(_unlike, (width, height)))
        scale = math.sqrt(self.own[0] * self.own[1] / (width * height))
        least, step = self._least, self._latents.step
        most = self.most_side // step * step
        fitted = [min(most, max(least, round(side * scale / step) * step)) for side in (width, height)]
        sides = fitted[0], fitted[1]
        return sides if self._served(*sides) else self._nearest(sides)

    def _enlarged(self, width: int, height: int) -> Size:
        size = enlarged_size(width, height, self._latents, self._enlarges)
        if not self.draws(*size):
            found = f"the picture is {_text((width, height))}, and drawn as {_text(size)}"
            fix = "send another, or name the size: the picture is resized to fit it"
            other = Problem(found, self.needed(), fix, param="size", code="unsupported_size")
            raise self.too_large(*size) or other
        return size

    def draws(self, width: int, height: int) -> bool:
        """Return whether a size is drawn here."""
        if self.listed:
            return (width, height) in self.listed
        return (width, height) == self.own or (self._allowed(width, height) and self._served(width, height))

    def _allowed(self, width: int, height: int) -> bool:
        """Return whether the settings allow a size."""
        least, step = self._least, self._latents.step
        sides = all(least <= side <= self.most_side and side % step == 0 for side in (width, height))
        return sides and width * height <= self.most_pixels

    def _served(self, width: int, height: int) -> bool:
        """Return whether a plan draws a size."""
        return self._plans is None or any(
            low[0] <= width <= high[0] and low[1] <= height <= high[1] for low, _, high in self._plans
        )

    def _nearest(self, size: Size) -> Size:
        """Return the size most like this one in shape, of those that plans draw and the settings allow."""
        clipped = [
            (min(max(size[0], low[0]), high[0]), min(max(size[1], low[1]), high[1]))
            for low, _, high in self._plans or ()
        ]
        return min((one for one in clipped if self._allowed(*one)), key=partial(_unlike, size), default=self.own)

    def _own(self) -> Size:
        """Return the model's own size; where no plan draws it, the one that the first plan draws best."""
        height, width = self._latents.pixels_of(None, None)
        own = width, height
        if self._served(*own):
            return own
        if not self._plans:
            fix = "build them: latentrt build BUNDLE"
            raise PlanError("no size is served by the plans of both UNet and VAE", needed="one", fix=fix)
        return self._plans[0][1]

    def _planned(self) -> tuple[Size, ...]:
        """Return all sizes, where every plan is for one size alone; none where some are for ranges."""
        if self._plans is None or any(low != high for low, _, high in self._plans):
            return ()
        sizes = dict.fromkeys([self.own, *(best for _, best, _ in self._plans)])
        return tuple(size for size in sizes if size == self.own or self._allowed(*size))

    def _ends(self, profile: Profile) -> list[Size]:
        """Return the least, the best and the largest size of a profile in pixels."""
        sides = zip(profile.ranges["width"], profile.ranges["height"], strict=True)
        return [(width * self._latents.factor, height * self._latents.factor) for width, height in sides]

    def _ranges(self) -> str:
        """Return the sizes that plans draw as text: "256x256 to 512x768; or ..."."""
        return "; or ".join(f"{_text(low)} to {_text(high)}" for low, _, high in self._plans or ())

    def _wanted(self, text: str) -> Size:
        """Return a size of the settings."""
        width, height = parse_size(text, "sizes")
        step = self._latents.step
        if width % step or height % step:
            needed = f"WIDTHxHEIGHT in multiples of {step}"
            raise RequestError(f"sizes has {text!r}", needed, fix="change sizes in the settings")
        if not self._served(width, height):
            fix = f"latentrt build BUNDLE --size {text}, or change sizes in the settings"
            raise RequestError(f"sizes has {text}", needed=f"one that a plan serves: {self._ranges()}", fix=fix)
        return width, height

    def _unsupported(self, found: str) -> Problem:
        fix = "take one of these, or auto"
        return Problem(f"size {found!r} is not supported", self.needed(), fix, param="size", code="unsupported_size")

    def needed(self) -> str:
        """Return the sizes that there are, as refusals say it."""
        if self.listed:
            return ", ".join(map(_text, self.listed))
        good = [self.own, *(size for size in SUGGESTED if self.draws(*size) and size != self.own)]
        planned = "" if self._plans is None else f" within {self._ranges()},"
        return (
            f"{', '.join(map(_text, good))}, or any sides{planned} that are multiples of {self._latents.step} from"
            f" {self._least} to {self.most_side} with at most"
            f" {self.most_pixels} pixels in all"
        )


def _text(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def _unlike(one: Size, other: Size) -> float:
    """Return how much the shapes of two sizes differ; 0 where they are the same."""
    return abs(math.log(one[0] / one[1] * other[1] / other[0]))
