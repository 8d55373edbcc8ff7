"""The model as clients see it: its names and solvers; from a client's values to a Request."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

from latentrt.errors import RequestError
from latentrt.model.given import NAMES
from latentrt.model.model import Model
from latentrt.request import MAX_SEED, Request
from latentrt.runtime.tensorrt.record import Profile
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.solvers import ALIASES, solvers_of
from latentrt.sampling.table import Table, tabulate
from latentrt.serve.core.rules.budget import Budget
from latentrt.serve.http.errors import Problem
from latentrt.serve.http.sizes import Size, Sizes
from latentrt.serve.process.config import Settings
from latentrt.values import did_you_mean

MOST_STEPS = 150  # where neither the settings nor the model's default say more


class Catalog:
    """The model as clients see it.

    Args:
        model: what the engine draws with.
        profiles: the sizes of latents ("height", "width") that plans draw; None: all.
        settings: what this server allows.
        refiner: the name of the engine's refiner, if it has one.
        budget: says which sizes fit into memory; None: all.

    Attributes:
        sizes: those that are drawn.
        fields: those of a request that some models do not read, and this one does.
        pictures: those that every request brings, by their use.
        reads: those that a request may bring.
        controls: its ControlNets' and T2I-Adapters' kinds ("controlnet", ...) by name.
        ip_adapters: the names of its IP-Adapters.
        shows_picture: whether the model reads the given picture beside the latents, so that an edit has no strength.
        enlarges: how many times as large as the given picture the drawn one is.
        own_solver: the engine's name of the usual solver.

    Raises:
        RequestError: the settings list a size, name a solver or have a default that cannot be, or forbid the pictures
            that the model needs.
        NotServedError: the model's own solver is not served, and the settings name no other.
        PlanError: no plans draw any size.
    """

    def __init__(
        self,
        model: Model,
        profiles: Sequence[Profile] | None,
        settings: Settings,
        *,
        refiner: str | None = None,
        budget: Budget | None = None,
    ) -> None:
        self._model: Model | None = model
        self._library, self.settings = None if model.adapters is None else model.adapters.library, settings
        self.name = settings.model_name or model.networks.bundle.base.spec.id
        self.names = (self.name, *(alias for alias in settings.aliases if alias != self.name))
        self.prompted = model.text is not None
        self.fields, self.classes = model.fields, model.spec.classes
        self.edits = settings.edits and model.edits
        self.pictures, self.reads, self.shows_picture = model.pictures, model.reads, model.shows_picture
        self.controls = {one.name: one.spec.kind for one in model.controls}
        self.ip_adapters = tuple(one.name for one in model.ip_adapters)
        self.max_noise_level, self.refiner = model.spec.max_noise_level, refiner
        if self.pictures and not self.edits:
            found, fix = f"edits is off, and {model.spec.id} draws on pictures", "leave --no-edits out"
            raise RequestError(found, needed="edits", fix=fix)
        self.latents = model.spec.latents
        self.enlarges = model.enlarges
        self.sizes = Sizes(self.latents, profiles, settings, enlarges=self.enlarges, budget=budget)
        self.solvers = _solver_names(model.schedule)
        solver = self.solver(settings.scheduler) if settings.scheduler else None
        self.defaults = model.filled(Request(steps=settings.steps, guidance=settings.guidance, solver=solver))
        # A server that cannot draw by default says so at its start.
        self.own_solver = tabulate(self.defaults.solver, model.schedule, 1).solver
        self.max_steps = self._max_steps(self.defaults.steps or 1)
        make = partial(tabulate, schedule=model.schedule, keeps_steps=model.spec.keeps_steps)
        self._work = lru_cache(maxsize=4096)(partial(_work, make))

    # ---- Names

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

    @property
    def loras(self) -> Sequence[str]:
        """The names of the LoRAs that a request may name."""
        return () if self._library is None else tuple(self._library.files)

    def forget(self) -> None:
        """Let the model go, which is closed: it makes no more requests, but what there is to choose from stays."""
        self._model = None

    @property
    def model(self) -> Model:
        """What the engine draws with."""
        assert self._model is not None
        return self._model

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
        if "negative_prompt" not in self.fields:
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
        return self.model.filled(request)

    def _check_stages(self, request: Request) -> None:
        if request.handoff is not None and self.refiner is None:
            raise Problem("there is a handoff and no refiner", needed="a server that has one", param="handoff")
        if request.hires_scale is not None:
            _at_most("hires_steps", request.hires_steps or 1, self.max_steps)
            width, height = self.final_size(request)
            if not self.sizes.draws(width, height):
                found = f"hires_scale is {request.hires_scale:g}, which makes {width}x{height}"
                large = self.sizes.too_large(width, height)
                if large is not None:
                    first = math.prod(self.latents.pixels_of(request.height, request.width))
                    most = math.floor(100 * math.sqrt(self.sizes.most_pixels / first)) / 100
                    found, fix = f"{found}; {large.found}", f"take a hires_scale of at most {most:g}"
                    raise Problem(found, needed=large.needed, fix=fix, param="hires_scale", code=large.code)
                raise Problem(found, needed=f"{self.sizes.needed()}, enlarged", param="hires_scale")

    def final_size(self, request: Request) -> Size:
        """Return width and height of a request's pictures."""
        height, width = self.latents.enlarged(request.height, request.width, request.hires_scale or 1.0)
        return width, height

    def check_pictures(self, names: Collection[str]) -> None:
        """Refuse pictures that the model does not read, and a request without those that it needs.

        Raises:
            Problem: `param` is "image", or the picture's use.
        """
        if names and not self.edits:
            needed = "none: this server edits no pictures"
            raise Problem("there is a picture", needed, fix="leave it out", param="image")
        for name in self.pictures:
            if name not in names:
                needed = f"{' and '.join(f'a {NAMES[one]}' for one in self.pictures)}: the model draws from them"
                fix = "send it to /v1/images/edits, as depth" if name == "depth" else ""
                raise Problem(f"there is no {NAMES[name]}", needed, fix, param=name)
        for name in names:
            if name not in self.reads:
                needed, fix = f"none: {self.name} reads none", "leave it out"
                raise Problem(f"there is a {NAMES[name]}", needed, fix, param=name)

    def _check_class(self, label: int | None) -> None:
        """Refuse a missing or too large one here: the engine would do so only when the request's turn has come."""
        if "class_label" not in self.fields:  # see `Model.filled`
            return
        if label is None:
            needed = "the number of a class" if self.classes is None else f"a class from 0 to {self.classes - 1}"
            raise Problem("class_label is missing", needed=needed, param="class_label")
        if self.classes is not None:
            _at_most("class_label", label, self.classes - 1)

    def _max_steps(self, default: int) -> int:
        most = self.settings.max_steps or max(MOST_STEPS, default)
        if default > most:
            found, fix = f"a picture takes {default} steps where no number is given", "set steps, or max_steps"
            raise RequestError(found, needed=f"at most max_steps: {most}", fix=fix)
        return most

    def lanes(self, request: Request) -> int:
        """Return the most lanes that each of a request's pictures takes."""
        return self.model.guidance(request).lanes

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
