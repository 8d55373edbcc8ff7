"""The model as clients see it: its names, sizes and solvers; from a client's values to a Request."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

from latentrt.errors import PlanError, RequestError
from latentrt.model.model import Model
from latentrt.request import MAX_SEED, Request
from latentrt.runtime.tensorrt.record import Profile
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.solvers import ALIASES, solvers_of
from latentrt.sampling.table import Table, tabulate
from latentrt.serve.http.errors import Problem
from latentrt.serve.process.config import Settings
from latentrt.values import did_you_mean, parse_size

MOST_STEPS = 150  # where neither the settings nor the model's default say more
LEAST_LATENTS = 8  # a side; below it a UNet's deepest level would have less than one
SUGGESTED = ((256, 256), (512, 512), (768, 768), (1024, 1024), (1024, 1536), (1536, 1024))
Size = tuple[int, int]  # width and height in pixels


class Catalog:
    """The model as clients see it.

    Args:
        model: what the engine draws with.
        profiles: the sizes of latents ("height", "width") that plans draw; None: all.
        settings: what this server allows.
        refiner: the name of the engine's refiner, if it has one.

    Raises:
        RequestError: the settings list a size, name a solver or have a default that cannot be.
        NotServedError: the model's own solver is not served, and the settings name no other.
        PlanError: no plans draw any size.
    """

    def __init__(
        self, model: Model, profiles: Sequence[Profile] | None, settings: Settings, *, refiner: str | None = None
    ) -> None:
        self._model, self.settings = model, settings
        self.name = settings.model_name or model.spec.id
        self.names = (self.name, *(alias for alias in settings.aliases if alias != self.name))
        self.prompted = model.text is not None
        self.class_labels, self.classes = "class_label" in model.fields, model.spec.classes
        self.edits = settings.edits and model.edits
        self.needs_mask, self.needs_picture, self.refiner = model.reads_masks, model.shows_picture, refiner
        self.latents = model.spec.latents
        self._least = -(-LEAST_LATENTS // self.latents.multiple) * self.latents.step
        self._plans = None if profiles is None else [self._ends(profile) for profile in profiles]
        self.own = self._own()
        self.sizes = tuple(map(self._listed, settings.sizes)) or self._planned()
        self.solvers = _solver_names(model.schedule)
        solver = self.solver(settings.scheduler) if settings.scheduler else None
        self.defaults = model.filled(Request(steps=settings.steps, guidance=settings.guidance, solver=solver))
        tabulate(self.defaults.solver, model.schedule, 1)  # a server that cannot draw by default says so at its start
        self.max_steps = self._max_steps(self.defaults.steps or 1)
        make = partial(tabulate, schedule=model.schedule, keeps_steps=model.spec.keeps_steps)
        self._work = lru_cache(maxsize=4096)(partial(_work, make))

    # ---- Names

    def check_model(self, name: str | None) -> None:
        """Refuse a name that is none of the model's; no name at all is allowed too.

        Raises:
            Problem: 404 model_not_found.
        """
        if name and name not in self.names:
            raise unknown("model", name, self.names, status=404, code="model_not_found")

    def solver(self, name: str | None) -> str | None:
        """Return the engine's name of a solver or diffusers class; None is the default one, or the model's own.

        Raises:
            Problem: 400 invalid_value.
        """
        if not name:
            return self.defaults.solver
        if name not in self.solvers:
            raise unknown("scheduler", name, self.solvers)
        return self.solvers[name]

    # ---- Requests

    def request(
        self,
        prompt: str | None,
        *,
        negative_prompt: str | None,
        n: int | None,
        size: Size,
        steps: int | None,
        guidance: float | None,
        scheduler: str | None,
        seed: int | None,
        class_label: int | None,
        options: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> Request:
        """Return the engine's request, with the defaults of this server and within its limits.

        `more` are other fields of the request, by its own names; None is not set.

        Raises:
            Problem: a value is missing or beyond a limit; `param` is its name in the OpenAI API.
            RequestError: the model does not read a value.
        """
        limits = self.settings
        count = n or 1
        steps = steps or self.defaults.steps or 1
        if not self.prompted:  # clients send empty texts
            prompt = prompt or None
        elif prompt is None:
            raise Problem("prompt is missing", needed="what to draw", param="prompt")
        if "negative_prompt" not in self._model.fields:
            negative_prompt = negative_prompt or None
        self._check_class(class_label)
        _at_most("n", count, limits.most_pictures)
        _at_most("num_inference_steps", steps, self.max_steps)
        for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
            _at_most(name, len(text or ""), limits.max_prompt, " characters")
        _at_most("seed", 0 if seed is None else seed, MAX_SEED - count + 1)
        request = Request(
            prompt=prompt,
            negative_prompt=negative_prompt,
            steps=steps,
            solver=self.solver(scheduler),
            seed=random.randrange(2**32 - count) if seed is None else seed,
            guidance=self.defaults.guidance if guidance is None else guidance,
            width=size[0],
            height=size[1],
            count=count,
            class_label=class_label,
            options=options or {},
            **{name: value for name, value in more.items() if value is not None},
        )
        self._check_stages(request)
        return self._model.filled(request)

    def _check_stages(self, request: Request) -> None:
        if request.handoff is not None and self.refiner is None:
            raise Problem("there is a handoff and no refiner", needed="a server that has one", param="handoff")
        if request.hires_scale is not None:
            _at_most("hires_steps", request.hires_steps or 1, self.max_steps)
            width, height = self.final_size(request)
            if not self._drawn(width, height):
                found = f"hires_scale is {request.hires_scale:g}, which makes {width}x{height}"
                raise Problem(found, needed=f"{self._needed()}, enlarged", param="hires_scale")

    def final_size(self, request: Request) -> Size:
        """Return width and height of a request's pictures."""
        height, width = self.latents.enlarged(request.height, request.width, request.hires_scale or 1.0)
        return width, height

    def _check_class(self, label: int | None) -> None:
        """Refuse a missing or too large one here: the engine would do so only when the request's turn has come."""
        if self.class_labels and label is None:
            needed = "the number of a class" if self.classes is None else f"a class from 0 to {self.classes - 1}"
            raise Problem("class_label is missing", needed=needed, param="class_label")
        if self.class_labels and self.classes is not None:
            _at_most("class_label", label or 0, self.classes - 1)

    def _max_steps(self, default: int) -> int:
        most = self.settings.max_steps or max(MOST_STEPS, default)
        if default > most:
            found, fix = f"a picture takes {default} steps where no number is given", "set steps, or max_steps"
            raise RequestError(found, needed=f"at most max_steps: {most}", fix=fix)
        return most

    def strength(self, asked: float | None, default: float) -> float | None:
        """Return the strength of an edit: the client's or the default, where the model's edits have one."""
        return asked or (None if self.needs_picture else default)

    def lanes(self, request: Request) -> int:
        """Return the most lanes that each of a request's pictures takes."""
        return self._model.guidance(request).lanes

    def work(self, request: Request) -> tuple[int, str]:
        """Return how many network calls each of a request's pictures takes, and the solver that makes them.

        Raises:
            Problem: the solver does not take so many steps, or not these options.
        """
        strength = 1.0 if request.strength is None else request.strength
        try:
            return self._work(request.solver, request.steps or 1, strength, tuple(sorted(request.options.items())))
        except RequestError as error:
            param = "num_inference_steps" if strength == 1 else "strength"
            raise Problem(error.found, needed=error.needed, fix=error.fix, param=param) from error

    # ---- Sizes

    def size(self, text: str | None) -> Size:
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
        if not self._drawn(width, height):
            raise self._unsupported(f"{width}x{height}")
        return width, height

    def fitting(self, width: int, height: int) -> Size:
        """Return the size in which a client's own picture is edited: its shape, with the model's number of pixels."""
        if self.sizes:
            return min(self.sizes, key=partial(_unlike, (width, height)))
        scale = math.sqrt(self.own[0] * self.own[1] / (width * height))
        least, step = self._least, self.latents.step
        most = self.settings.max_side // step * step
        fitted = [min(most, max(least, round(side * scale / step) * step)) for side in (width, height)]
        sides = fitted[0], fitted[1]
        return sides if self._served(*sides) else self._nearest(sides)

    def _drawn(self, width: int, height: int) -> bool:
        if self.sizes:
            return (width, height) in self.sizes
        return (width, height) == self.own or (self._allowed(width, height) and self._served(width, height))

    def _allowed(self, width: int, height: int) -> bool:
        """Return whether the settings allow a size."""
        least, step = self._least, self.latents.step
        sides = all(least <= side <= self.settings.max_side and side % step == 0 for side in (width, height))
        return sides and width * height <= self.settings.max_pixels

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
        height, width = self.latents.pixels_of(None, None)
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
        return [(width * self.latents.factor, height * self.latents.factor) for width, height in sides]

    def _ranges(self) -> str:
        """Return the sizes that plans draw as text: "256x256 to 512x768; or ..."."""
        return "; or ".join(f"{_text(low)} to {_text(high)}" for low, _, high in self._plans or ())

    def _listed(self, text: str) -> Size:
        """Return a size of the settings."""
        width, height = parse_size(text, "sizes")
        step = self.latents.step
        if width % step or height % step:
            needed = f"WIDTHxHEIGHT in multiples of {step}"
            raise RequestError(f"sizes has {text!r}", needed, fix="change sizes in the settings")
        if not self._served(width, height):
            fix = f"latentrt build BUNDLE --size {text}, or change sizes in the settings"
            raise RequestError(f"sizes has {text}", needed=f"one that a plan serves: {self._ranges()}", fix=fix)
        return width, height

    def _unsupported(self, found: str) -> Problem:
        fix = "take one of these, or auto"
        return Problem(f"size {found!r} is not supported", self._needed(), fix, param="size", code="unsupported_size")

    def _needed(self) -> str:
        if self.sizes:
            return ", ".join(map(_text, self.sizes))
        good = [self.own, *(size for size in SUGGESTED if self._drawn(*size) and size != self.own)]
        planned = "" if self._plans is None else f" within {self._ranges()},"
        return (
            f"{', '.join(map(_text, good))}, or any sides{planned} that are multiples of {self.latents.step} from"
            f" {self._least} to {self.settings.max_side} with at most"
            f" {self.settings.max_pixels} pixels in all"
        )


def _text(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def _unlike(one: Size, other: Size) -> float:
    """Return how much the shapes of two sizes differ; 0 where they are the same."""
    return abs(math.log(one[0] / one[1] * other[1] / other[0]))


def _work(
    make: Callable[..., Table], solver: str | None, steps: int, strength: float, options: tuple[tuple[str, Any], ...]
) -> tuple[int, str]:
    table = make(solver, steps=steps, strength=strength, **dict(options))
    return len(table), table.solver


def _solver_names(schedule: Schedule) -> dict[str, str]:
    """Return every name that clients may give a solver, with the engine's: a diffusers class stands for its first
    solver, but the bundle's own class for the one that its settings choose.
    """
    known = solvers_of(schedule)
    names = {name: name for name in known}
    names |= {alias: name for alias, name in ALIASES.items() if name in known}
    for name, solver in known.items():
        names.setdefault(solver.scheduler, name)
    names[schedule.scheduler] = schedule.scheduler
    return names


def unknown(
    param: str, name: str, names: Collection[str], *, status: int = 400, code: str = "invalid_value"
) -> Problem:
    """Return the refusal of a name that is none of these."""
    found, needed = f"there is no {param} {name[:100]!r}", f"one of {', '.join(names)}"
    fix = did_you_mean(name[:100], names, f"take one of these, or leave {param} out")
    return Problem(found, needed, fix, param=param, status=status, code=code)


def _at_most(name: str, value: int, most: int, unit: str = "") -> None:
    if value > most:
        raise Problem(f"{name} is {value}{unit}", needed=f"at most {most}", fix=f"take a smaller {name}", param=name)
