"""An engine of fake networks that a test controls: steps that wait, raise, hang or turn numbers into NaN."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from latentrt.bundle.bundle import EMBEDDED, Bundle
from latentrt.engine import Engine
from latentrt.model.prompts.tokenizer import Tokenizer
from latentrt.request import Request
from latentrt.run.job import Job
from latentrt.runtime.fake import FakeBackend
from latentrt.runtime.signature import shape_of
from latentrt.serve.core.handle import Event, Handle
from latentrt.serve.core.service import Service

Arrays = Mapping[str, NDArray[Any]]
T = TypeVar("T")
PATIENCE = 900.0  # seconds after which a test that waits has failed: more than any busy machine needs
SPEC = Bundle.open(EMBEDDED, check_hashes=False).spec
SHAPE = SPEC.latents.shape_of(None, None)
SMALL = SPEC.latents.shape_of(64, 64)
RAISES, NAN, HANGS = "boom", "cloud", "sleep"  # prompts that make the network do so


class Fakes:
    """The networks' functions. `steps` counts the UNet's calls, `lanes` has their batch sizes.

    Attributes:
        on_step: called with the number of each call before it is made, by the engine's thread.
        wakes: the event that a step with the prompt HANGS waits for.
        decoding, encoding: the events that the VAE and the text encoder wait for; set unless a test clears them.
        broken: networks that raise: "unet", "vae", "text".
    """

    def __init__(self) -> None:
        self.lanes: list[int] = []
        self.texts: list[int] = []
        self.decoded: list[int] = []
        self.on_step: Callable[[int], None] = lambda step: None
        self.wakes = threading.Event()
        self.decoding, self.encoding = threading.Event(), threading.Event()
        self.decoding.set()
        self.encoding.set()
        self.nan_pictures = 0  # so many of the next pictures come out of the VAE as NaN
        self.broken: set[str] = set()
        self._changed = threading.Condition()
        self._allowed: int | None = None
        tokenizer = Tokenizer.open(EMBEDDED / "tokenizer")
        self._moods = {prompt: _states(tokenizer.encode(prompt).ids[1]) for prompt in (RAISES, NAN, HANGS)}

    @property
    def steps(self) -> int:
        return len(self.lanes)

    def hold(self) -> None:
        """Make steps wait until they are allowed."""
        with self._changed:
            self._allowed = self.steps

    def allow(self, steps: int | None) -> None:
        """Allow so many more steps, or all."""
        with self._changed:
            self._allowed = None if steps is None else (self._allowed or 0) + steps
            self._changed.notify_all()

    def wait_for(self, steps: int) -> None:
        """Wait until so many steps have begun in all."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.steps >= steps, PATIENCE)

    def text(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        ids = feeds["input_ids"]
        self.texts.append(len(ids))
        assert self.encoding.wait(PATIENCE)
        if "text" in self.broken:
            raise RuntimeError("the text encoder is broken")
        return {"text_states": _states(ids)}

    def unet_text(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """Give the states as the first keys and values, and zeros as all others."""
        graph = SPEC.networks["unet_text"]
        sizes = dict(zip(("batch", "tokens"), feeds["encoder_hidden_states"].shape, strict=False))
        found = {each.name: np.zeros(shape_of(each, sizes), np.float32) for each in graph.outputs}
        halves = np.split(feeds["encoder_hidden_states"], 2, axis=2)
        return {**found, **dict(zip(("text.0", "text.1"), halves, strict=True))}

    def unet(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        sample, states = feeds["sample"], np.concatenate([feeds["text.0"], feeds["text.1"]], axis=2)
        with self._changed:
            self.lanes.append(len(sample))
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._allowed is None or self.steps <= self._allowed, PATIENCE)
        self.on_step(self.steps)
        if "unet" in self.broken:
            raise RuntimeError("the UNet is broken")
        moods = [self._mood(lane) for lane in states]
        if RAISES in moods:
            raise RuntimeError("boom")
        if HANGS in moods:
            assert self.wakes.wait(PATIENCE)
        pull = states.mean(axis=(1, 2))[:, None, None, None]
        out = np.tanh(sample) * np.float32(0.7) + pull + (feeds["timestep"] / 1000)[:, None, None, None]
        out[[mood == NAN for mood in moods]] = np.nan
        return {"out": out}

    def vae(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        latents = feeds["latents"]
        self.decoded.append(len(latents))
        assert self.decoding.wait(PATIENCE)
        if "vae" in self.broken:
            raise RuntimeError("the VAE is broken")
        image = np.tanh(latents[:, :3]).repeat(8, axis=2).repeat(8, axis=3)
        image[: self.nan_pictures] = np.nan
        self.nan_pictures = 0
        return {"image": image}

    def _mood(self, states: NDArray[np.float32]) -> str:
        for prompt, word in self._moods.items():
            if np.array_equal(states[1], word):
                return prompt
        return ""


def _states(ids: NDArray[Any]) -> NDArray[np.float32]:
    """Return numbers for token ids, (..., 192)."""
    return np.sin(ids[..., None] * np.arange(1, 193)).astype(np.float32)


def fake_engine(fakes: Fakes, *, lanes: int = 8, seconds: float = 0.0) -> Engine:
    """Return an engine over the embedded model's files, but none of its graphs."""
    bundle = Bundle.open(EMBEDDED, check_hashes=False)
    bundle = replace(bundle, spec=replace(bundle.spec, golden=()))
    graphs = bundle.spec.graphs()
    functions = {
        "text_encoder": fakes.text,
        "unet_text": fakes.unet_text,
        "unet": fakes.unet,
        "vae_decoder": fakes.vae,
    }
    backend = FakeBackend({graphs[name].path: function for name, function in functions.items()}, seconds)
    return Engine(bundle, backend, lanes=lanes)


def recorded(engine: Engine) -> list[Job]:
    """Return a list that gets every job that the engine makes from now on."""
    made: list[Job] = []
    jobs = engine.jobs

    def recording(*arguments: Any, **named: Any) -> list[Job]:
        new = jobs(*arguments, **named)
        made.extend(new)
        return new

    engine.jobs = recording  # type: ignore[method-assign]
    return made


def handle_of(
    prompt: str = "an owl", *, previews: int = 0, deadline: float = math.inf, id: str = "", **settings: Any
) -> Handle:
    """A request with these settings."""
    defaults = {"steps": 4, "guidance": SPEC.defaults.guidance}
    request = Request(prompt=prompt, **{**defaults, **settings})
    shape = SPEC.latents.shape_of(request.height, request.width)
    return Handle(request, shape, request.steps, previews, deadline, id)


def submit(service: Service, wanted: Handle) -> Handle:
    """Have its pictures made, without end: nothing has to be released."""
    service.scheduler.reserve(wanted)
    service.scheduler.submit(wanted)
    return wanted


def wait(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in an event loop of its own; return its result."""

    async def bounded() -> T:
        async with asyncio.timeout(PATIENCE):
            return await coroutine

    return asyncio.run(bounded())


async def events(wanted: Handle) -> list[Event]:
    """All that its client hears until it is over."""
    return [event async for event in wanted]
