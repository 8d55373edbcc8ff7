"""A large picture is encoded and decoded tile by tile: those that are smaller come between, by what each costs."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from latentrt.engine import Engine
from latentrt.runtime.base import Facts
from latentrt.serve.core.device import Device
from latentrt.serve.core.errors import Cancelled
from latentrt.serve.core.handle import Stage
from latentrt.serve.core.service import Service
from tests.serve.conftest import Serve, at_stage, eventually
from tests.support.serve.fake_engine import PATIENCE, SPEC, Arrays, Fakes, fake_engine, handle_of, submit, wait

TILE = 128  # pixels: the area of four small pictures
LARGE, SMALL = {"width": 288, "height": 288, "steps": 1}, {"width": 64, "height": 64, "steps": 2}
COUNT = 9  # tiles of a large one


class Ordered(Fakes):
    """`order` has a letter for each call: T of a tile's, d of a small picture's decoding, s of a step of those.

    Attributes:
        on_tile: called with the number of each tile before it is made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.order, self.tiles = "", 0
        self.on_tile: Callable[[int], None] = lambda number: None

    def unet(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        self.order += "s" if feeds["sample"].shape[2] == 8 else ""
        return super().unet(feeds)

    def vae(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        self._told(small=feeds["latents"].shape[2:] == (8, 8))
        return super().vae(feeds)

    def encoder(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        self._told(small=False)
        means = feeds["image"][:, :1, ::8, ::8].repeat(4, axis=1)
        return {"moments": np.concatenate([means, np.zeros_like(means)], axis=1)}

    def _told(self, *, small: bool) -> None:
        self.order += "d" if small else "T"
        if not small:
            self.tiles += 1
            self.on_tile(self.tiles)


@pytest.fixture
def fakes() -> Ordered:
    return Ordered()


@pytest.fixture
def engine(fakes: Ordered) -> Iterator[Engine]:
    with fake_engine(fakes) as engine:
        engine.model.cut_into_tiles(TILE)
        path = SPEC.graphs()["vae_encoder"].path
        engine.backend.functions[path] = fakes.encoder  # type: ignore[attr-defined]
        yield engine


def begun(serve: Serve, fakes: Ordered) -> Service:
    """A service whose self-check is over."""
    service = serve()
    fakes.order, fakes.tiles = "", 0
    return service


@pytest.mark.parametrize("work", ["decode", "encode"])
def test_small_pictures_wait_for_one_tile(serve: Serve, fakes: Ordered, work: str) -> None:
    service, came = begun(serve, fakes), threading.Event()
    picture = np.random.default_rng(0).integers(0, 256, (288, 288, 3), np.uint8)
    edits = {"pictures": {"image": picture}, "strength": 1.0} if work == "encode" else {}

    def on_tile(number: int) -> None:
        """The small ones come during the first tile, and are drawn during the second."""
        if number == 1:
            assert came.wait(PATIENCE)
        elif number == 2:
            eventually(lambda: len(at_stage(service, Stage.WAITING, Stage.RUNNING)) == (work == "encode"))

    fakes.on_tile = on_tile
    large = submit(service, handle_of("a cat", **LARGE, **edits))
    eventually(lambda: fakes.tiles == 1)
    small = submit(service, handle_of(guidance=1.0, count=6, **SMALL))
    came.set()
    assert len(wait(small.pictures())) == 6
    (made,) = wait(large.pictures())
    gaps = fakes.order.replace("s", "").split("T")[1:]
    first = [gap.count("d") for gap in gaps[:COUNT]]
    assert sum(first[:3]) == 6  # a request is prepared, then pictures decoded, of a tile's cost in all: 4
    assert max(first) <= 4
    assert made.info["latentrt"]["tile"] == TILE
    assert len(gaps) == COUNT * (2 if edits else 1)
    fakes.on_tile = lambda number: None
    (again,) = wait(submit(service, handle_of("a cat", **LARGE, **edits)).pictures())
    assert again.tobytes() == made.tobytes()


def test_equal_and_larger_pictures_wait_for_its_end(serve: Serve, fakes: Ordered) -> None:
    service, came = begun(serve, fakes), threading.Event()
    fakes.on_tile = lambda number: came.wait(PATIENCE)
    first, second = (submit(service, handle_of("a cat", **LARGE)) for _ in range(2))
    eventually(lambda: fakes.tiles == 1)
    came.set()
    assert len(wait(first.pictures())) == 1
    assert [slot.stage for slot in first.slots] == [Stage.OVER]
    assert len(wait(second.pictures())) == 1
    assert (fakes.order, fakes.tiles) == ("T" * 2 * COUNT, 2 * COUNT)


def test_what_no_client_waits_for_ends_between_two_tiles(serve: Serve, fakes: Ordered) -> None:
    service, came = begun(serve, fakes), threading.Event()
    fakes.on_tile = lambda number: came.wait(PATIENCE)
    gone = submit(service, handle_of("a cat", **LARGE))
    eventually(lambda: fakes.tiles == 1)
    service.scheduler.cancel(gone)
    came.set()
    with pytest.raises(Cancelled):
        wait(gone.pictures())
    assert len(wait(submit(service, handle_of(**SMALL)).pictures())) == 1
    assert (fakes.tiles, service.scheduler.ready) == (1, True)


def test_waiting_for_the_turn_of_another_service_is_no_hang(serve: Serve, engine: Engine, fakes: Ordered) -> None:
    device = Device()
    service, seen = serve(device=device), list[Any]()
    health = service.scheduler._health

    def other() -> None:
        with device.stages:
            seen.append((health.found_hung(math.inf), health.is_lost(math.inf)))

    thread = threading.Thread(target=other)

    def on_tile(number: int) -> None:
        if number == 1:
            thread.start()
            eventually(lambda: len(device.stages._line) == 2)

    fakes.on_tile = on_tile
    fakes.tiles = 0
    assert len(wait(submit(service, handle_of("a cat", **LARGE)).pictures())) == 1
    thread.join()
    assert seen == [([], False)]


def test_on_one_stream_ticks_come_between_tiles(serve: Serve, engine: Engine, fakes: Ordered) -> None:
    engine.backend.facts = Facts(one_stream=True)  # type: ignore[misc]
    service, came = begun(serve, fakes), threading.Event()
    fakes.on_tile = lambda number: came.wait(PATIENCE)
    large = submit(service, handle_of("a cat", **LARGE))
    eventually(lambda: fakes.tiles == 1)
    small = submit(service, handle_of(guidance=1.0, **SMALL))
    came.set()
    assert len(wait(small.pictures())) == 1
    assert len(wait(large.pictures())) == 1
    assert fakes.order == "TTsTsd" + (COUNT - 3) * "T"
