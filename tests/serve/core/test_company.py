"""A picture is the same, drawn alone or in company that comes and goes."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from latentrt import Engine
from latentrt.request import Request
from latentrt.run.denoiser import Denoiser
from latentrt.run.host import HostLanes
from latentrt.serve.core.errors import Cancelled
from latentrt.serve.core.handle import Handle
from latentrt.serve.core.measured.curve import Curve
from latentrt.serve.core.service import Service
from tests.serve.conftest import eventually
from tests.support.serve.fake_engine import SHAPE, SPEC, Fakes, recorded, submit, wait

SOLVERS = ("ddim", "euler-ancestral", "heun", "dpmpp-2m", "dpmpp-2m-sde", "lcm")


def draw_request(dice: random.Random, most_steps: int) -> Request:
    side = dice.choice((None, 64))
    return Request(
        prompt=dice.choice(("an owl", "a red apple", "blue")),
        steps=dice.randint(1, most_steps),
        solver=dice.choice(SOLVERS),
        seed=dice.randint(0, 5),
        guidance=dice.choice((1.0, 3.0, 3.0)),
        guidance_interval=dice.choice(((0.0, 1.0), (0.3, 0.8))),
        count=dice.randint(1, 3),
        height=side,
        width=side,
        **dice.choice(({}, {}, {"hires_scale": 2.0, "hires_steps": 2, "hires_strength": 0.5})),
    )


class Schedule:
    """Requests that come and are given up at ticks drawn by dice; steps call `turn` from the engine's thread."""

    def __init__(self, dice: random.Random, service: Service, requests: int, most_steps: int) -> None:
        self.dice, self.service = dice, service
        self.to_come = [(dice.randint(0, 12), draw_request(dice, most_steps)) for _ in range(requests)]
        self.to_cancel: list[tuple[int, Handle]] = []
        self.handles: list[Handle] = []
        self.cancelled: set[Handle] = set()

    def turn(self, step: int) -> None:
        for at, request in [due for due in self.to_come if due[0] <= step]:
            self.to_come.remove((at, request))
            self.come(request, step)
        for at, handle in [due for due in self.to_cancel if due[0] <= step]:
            self.to_cancel.remove((at, handle))
            self.cancelled.add(handle)
            self.service.scheduler.cancel(handle)

    def come(self, request: Request, step: int) -> None:
        shape = SPEC.latents.shape_of(request.height, request.width)
        handle = submit(self.service, Handle(request, shape, request.steps))
        self.handles.append(handle)
        if self.dice.random() < 0.25:
            self.to_cancel.append((step + self.dice.randint(0, 4), handle))

    def finish(self) -> list[list[Any]]:
        """Wait for all; return the pictures of each. Where the service idles before a request's tick, it comes then."""
        while self.to_come:
            eventually(lambda: not self.to_come or not self.service.scheduler._line.slots)
            if self.to_come:
                self.turn(min(at for at, _ in self.to_come))
        return [wait(_made(handle)) for handle in self.handles]


async def _made(handle: Handle) -> list[Any]:
    """What a request has made, also where it was given up."""
    made = []
    with suppress(Cancelled):
        async for event in handle:
            made.append(event.image)
    return made


def run_schedule(engine: Engine, dice: random.Random, requests: int, most_steps: int, on_step: Any) -> int:
    """Run one; every picture, and the latents of every job that came to its end, are those of the same made alone."""
    lanes = dice.randint(2, 8)
    engine.denoiser = Denoiser(HostLanes(engine.model.predictor, lanes))
    curve = Curve({SHAPE: {1: 1.0, dice.randint(2, 8): 1.01}})
    with Service(engine, curve=curve) as service:
        eventually(lambda: service.scheduler.ready)
        made = recorded(engine)
        schedule = Schedule(dice, service, requests, most_steps)
        on_step(schedule.turn)
        stories = schedule.finish()
        on_step(lambda step: None)
        assert (service.scheduler.running, service.scheduler.waiting) == (0, 0)
    del engine.jobs  # the recording one
    pictures = [picture for story in stories for picture in story]
    for handle, story in zip(schedule.handles, stories, strict=True):
        assert handle.done == len(story)
        assert len(story) == handle.request.count or handle in schedule.cancelled
    expected = {}
    for job in made:
        if job.done:
            key = _key(job.tag)
            if key not in expected:
                expected[key] = _alone(engine, job.tag)
            np.testing.assert_array_equal(job.latents, expected[key][0])
    for picture in pictures:
        np.testing.assert_array_equal(picture, expected[_key(picture.info["latentrt"])][1])
    return len(pictures)


def _key(tag: dict[str, Any]) -> str:
    return str({**tag, "index": 0})


def _alone(engine: Engine, tag: dict[str, Any]) -> tuple[Any, Any]:
    """The latents and the picture that settings stand for, made without company."""
    own = {name: tag[name] for name in ("prompt", "steps", "solver", "seed", "guidance", "height", "width")}
    own |= {name: value for name, value in tag.items() if name.startswith("hires")}
    (job,) = engine.jobs(Request(**own, guidance_interval=tuple(tag["guidance_interval"])))
    denoiser = Denoiser(HostLanes(engine.model.predictor, 2))
    denoiser.admit(job)
    while denoiser.jobs:
        denoiser.tick()
    return job.latents, engine.picture(job)


@pytest.mark.parametrize("tens", range(20))
def test_joining_and_leaving_changes_no_bit(engine: Engine, fakes: Fakes, tens: int) -> None:
    """Two hundred schedules: lanes, cap, solvers, sizes, steps, guidance, and when requests come and are given up."""

    def on_step(turn: Callable[[int], None]) -> None:
        start = fakes.steps
        fakes.on_step = lambda step: turn(step - start)

    made = sum(run_schedule(engine, random.Random(10 * tens + one), 5, 6, on_step) for one in range(10))
    assert made > 40


def test_joining_and_leaving_changes_no_bit_of_real_networks(embedded: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with the embedded model: ONNX Runtime treats lanes and pictures of a batch alone."""
    network, turns = embedded.model.predictor, [lambda step: None]
    steps = 0

    def unet(*arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        turns[-1](steps)
        return network(*arguments)

    def on_step(turn: Callable[[int], None]) -> None:
        nonlocal steps
        steps = 0
        turns.append(turn)

    monkeypatch.setattr(embedded.model, "predictor", unet)
    assert sum(run_schedule(embedded, random.Random(seed), 3, 3, on_step) for seed in range(3)) > 5
