"""What is served: the model's names, the sizes it draws, its solvers; from what a client wrote to a Request."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

from latentrt.bundle.spec import ModelSpec
from latentrt.errors import PlanError, RequestError
from latentrt.request import MAX_SEED, Request
from latentrt.runtime.tensorrt.record import Profile
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.solvers import ALIASES, SOLVERS
from latentrt.sampling.table import tabulate
from latentrt.serve.http.problems import Problem
from latentrt.serve.process.config import Settings

ENCODER = "vae_encoder"  # the network that edits need
LEAST_LATENTS = 8  # a side; below it a UNet's deepest level would have less than one
SUGGESTED = ("256x256", "512x512", "768x768", "1024x1024", "1024x1536", "1536x1024")


class Catalog:
    """The model as clients see it.

    Args:
        spec, schedule: of the bundle.
        settings: what this server allows.
        profiles: the latents' sizes that can be drawn (`Engine.profiles`); None: all.

    Raises:
        RequestError: the settings list a size, or name a solver, that cannot be.
    """

    def __init__(
        self, spec: ModelSpec, schedule: Schedule, settings: Settings, profiles: Sequence[Profile] | None = None
    ) -> None:
        self.spec = spec
        self.settings = settings
        self.name = settings.model_name or spec.id
        self.names = (self.name, *(alias for alias in settings.aliases if alias != self.name))
        self.edits = settings.edits and ENCODER in spec.graphs
        self.factor = spec.latents.factor
        self._profiles = profiles
        self.own = self._own()
        self.sizes = tuple(self._listed(size) for size in settings.sizes) or self._planned()
        self._solvers = _solver_names(schedule)
        self._default: str | None = None
        self._default = self.solver(settings.scheduler)

        @lru_cache(maxsize=4096)
        def work(
            solver: str | None, steps: int, strength: float, options: tuple[tuple[str, Any], ...]
        ) -> tuple[int, str]:
            table = tabulate(solver, schedule, steps, strength=strength, **dict(options))
            return len(table), table.solver

        self._work = work

    def model(self, name: str | None) -> str:
        """The model's own name for one of its names; none stands for it too.

        Raises:
            Problem: 404 model_not_found.
        """
        if name and name not in self.names:
            raise Problem(
                f"there is no model {name[:100]!r}",
                needed=f"one of {', '.join(self.names)}",
                fix="take one of these, or leave model out",
                param="model",
                status=404,
                code="model_not_found",
            )
        return self.name

    def size(self, text: str | None) -> tuple[int, int]:
        """Width and height of "512x512"; None, "" and "auto" are the model's own.

        Raises:
            Problem: 400 unsupported_size, with those that are there.
        """
        if text in (None, "", "auto"):
            return self.own
        width, _, height = str(text).partition("x")
        if not all(side.isascii() and side.isdecimal() and len(side) < 6 for side in (width, height)):
            raise self._unsupported(str(text)[:40], "size")
        return self.sides(int(width), int(height))

    def sides(self, width: int, height: int, *, param: str = "size") -> tuple[int, int]:
        """The same, for two numbers."""
        if not self._drawn(width, height):
            raise self._unsupported(f"{width}x{height}", param)
        return width, height

    def fitting(self, width: int, height: int) -> tuple[int, int]:
        """The size in which a client's own picture is edited: its shape, with the model's own number of pixels."""
        if self.sizes:
            return min(self.sizes, key=partial(_unlike, (width, height)))
        scale = math.sqrt(self.own[0] * self.own[1] / (width * height))
        least, step = LEAST_LATENTS * self.factor, self.factor
        most = self.settings.max_side // step * step
        fitted = [min(most, max(least, round(side * scale / step) * step)) for side in (width, height)]
        sides = fitted[0], fitted[1]
        return sides if self._served(*sides) else self._nearest(sides)

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(channels, height, width) of the latents of a picture of this width and height."""
        return self.spec.latents.channels, size[1] // self.factor, size[0] // self.factor

    def solver(self, name: str | None) -> str | None:
        """The engine's name of a solver or diffusers class; None is the default one.

        Raises:
            Problem: 400 invalid_value.
        """
        if not name:
            return self._default
        if name not in self._solvers:
            raise Problem(
                f"there is no scheduler {name[:100]!r}",
                needed=f"one of {', '.join(self._solvers)}",
                fix="take one of these, or leave scheduler out",
                param="scheduler",
            )
        return self._solvers[name]

    @property
    def solver_names(self) -> tuple[str, ...]:
        """Every name that `solver` takes."""
        return tuple(self._solvers)

    def work(self, request: Request) -> tuple[int, str]:
        """How many network calls each of its pictures takes, and the name of the solver that makes them.

        Raises:
            Problem: the solver does not take so many steps, or not these options.
        """
        strength = 1.0 if request.strength is None else request.strength
        try:
            return self._work(request.solver, request.steps, strength, tuple(sorted(request.options.items())))
        except RequestError as error:
            param = "num_inference_steps" if strength == 1 else "strength"
            raise Problem(error.found, needed=error.needed, fix=error.fix, param=param) from error

    def request(
        self,
        prompt: str,
        *,
        negative_prompt: str | None,
        n: int | None,
        size: tuple[int, int],
        steps: int | None,
        guidance: float | None,
        scheduler: str | None,
        seed: int | None,
        strength: float | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Request:
        """What the engine is asked, with the defaults of this server and within its limits.

        Raises:
            Problem: what goes beyond a limit, by the name it has in the OpenAI API.
        """
        limits = self.settings
        count = n or 1
        steps = steps or limits.steps
        _at_most("n", count, limits.most_pictures)
        _at_most("num_inference_steps", steps, limits.max_steps)
        for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt or "")):
            _at_most(name, len(text), limits.max_prompt, "characters")
        _at_most("seed", 0 if seed is None else seed, MAX_SEED - count + 1)
        return Request(
            prompt=prompt,
            negative_prompt=negative_prompt,
            steps=steps,
            solver=self.solver(scheduler),
            seed=random.randrange(2**32 - count) if seed is None else seed,
            guidance=limits.guidance if guidance is None else guidance,
            width=size[0],
            height=size[1],
            count=count,
            strength=strength,
            options=options or {},
        )

    def _drawn(self, width: int, height: int) -> bool:
        if self.sizes:
            return (width, height) in self.sizes
        return (width, height) == self.own or (self._allowed(width, height) and self._served(width, height))

    def _nearest(self, size: tuple[int, int]) -> tuple[int, int]:
        """Of the sizes that plans draw and the settings allow, one that is much like this in shape."""
        clipped = [self._clipped(size, profile) for profile in self._profiles or ()]
        return min((one for one in clipped if self._allowed(*one)), key=partial(_unlike, size), default=self.own)

    def _clipped(self, size: tuple[int, int], profile: Profile) -> tuple[int, int]:
        ranges = (profile.ranges[side] for side in ("width", "height"))
        sides = [
            min(max(s, low * self.factor), high * self.factor) for s, (low, _, high) in zip(size, ranges, strict=True)
        ]
        return sides[0], sides[1]

    def _allowed(self, width: int, height: int) -> bool:
        """By the settings."""
        least, step = LEAST_LATENTS * self.factor, self.factor
        sides = all(least <= side <= self.settings.max_side and side % step == 0 for side in (width, height))
        return sides and width * height <= self.settings.max_pixels

    def _served(self, width: int, height: int) -> bool:
        """By the plans."""
        latents = {"height": height // self.factor, "width": width // self.factor}
        return self._profiles is None or any(profile.covers(latents) for profile in self._profiles)

    def _own(self) -> tuple[int, int]:
        """The model's own size; where no plan draws it, the one that the first plan draws best."""
        latents = self.spec.latents
        own = latents.width * self.factor, latents.height * self.factor
        if self._served(*own):
            return own
        if not self._profiles:
            raise PlanError(
                "no size is served by the plans of both UNet and VAE",
                needed="one",
                fix="build them: latentrt build BUNDLE",
            )
        return self._best(self._profiles[0])

    def _planned(self) -> tuple[tuple[int, int], ...]:
        """The sizes there are, where every plan is for one size alone; none where some are for ranges."""
        profiles = self._profiles or ()
        if any(low != high for profile in profiles for low, _, high in profile.ranges.values()):
            return ()
        sizes = dict.fromkeys([self.own, *map(self._best, profiles)] if profiles else [])
        return tuple(size for size in sizes if size == self.own or self._allowed(*size))

    def _best(self, profile: Profile) -> tuple[int, int]:
        return profile.ranges["width"][1] * self.factor, profile.ranges["height"][1] * self.factor

    def _unsupported(self, found: str, param: str) -> Problem:
        fix = "take one of these, or auto" if param == "size" else "take one of these"
        return Problem(
            f"size {found!r} is not supported", needed=self._needed(), fix=fix, param=param, code="unsupported_size"
        )

    def _needed(self) -> str:
        if self.sizes:
            return ", ".join(f"{width}x{height}" for width, height in self.sizes)
        own = f"{self.own[0]}x{self.own[1]}"
        good = [size for size in SUGGESTED if self._drawn(*map(int, size.split("x"))) and size != own]
        planned = "" if self._profiles is None else f" within {'; or '.join(map(self._range, self._profiles))},"
        return (
            f"{', '.join((own, *good))}, or any sides{planned} that are multiples of {self.factor} from"
            f" {LEAST_LATENTS * self.factor} to {self.settings.max_side} with at most"
            f" {self.settings.max_pixels} pixels in all"
        )

    def _range(self, profile: Profile) -> str:
        """The pictures of a profile: "256x256 to 512x768"."""
        least, most = (
            "x".join(str(profile.ranges[side][which] * self.factor) for side in ("width", "height")) for which in (0, 2)
        )
        return f"{least} to {most}"

    def _listed(self, text: str) -> tuple[int, int]:
        width, _, height = text.partition("x")
        good = all(side.isascii() and side.isdecimal() and len(side) < 6 for side in (width, height))
        if not good or any(int(side) < 1 or int(side) % self.factor for side in (width, height)):
            raise RequestError(
                f"sizes has {text!r}",
                needed=f"WIDTHxHEIGHT in multiples of {self.factor}",
                fix="change sizes in the settings",
            )
        if not self._served(int(width), int(height)):
            raise RequestError(
                f"sizes has {text}",
                needed=f"one that a plan serves: {'; or '.join(map(self._range, self._profiles or ()))}",
                fix=f"latentrt build BUNDLE --size {text}, or change sizes in the settings",
            )
        return int(width), int(height)


def _unlike(one: tuple[int, int], other: tuple[int, int]) -> float:
    """How much the shapes of two sizes differ; 0 where they are the same."""
    return abs(math.log(one[0] / one[1] * other[1] / other[0]))


def _solver_names(schedule: Schedule) -> dict[str, str | None]:
    """Every name that a client may give a solver; a class has the first solver that is of it, the bundle's own None."""
    names: dict[str, str | None] = {name: name for name in SOLVERS}
    names |= ALIASES
    for name, solver in SOLVERS.items():
        names.setdefault(solver.scheduler, name)
    names[schedule.scheduler] = None
    return names


def _at_most(name: str, value: int, most: int, unit: str = "") -> None:
    if value > most:
        what = f"{value} {unit}".strip()
        raise Problem(f"{name} is {what}", needed=f"at most {most}", fix=f"take a smaller {name}", param=name)
