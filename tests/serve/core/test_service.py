"""The service: orders and their events, who shares a step, what goes on beside the ticks, and the end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from latentrt import Engine
from latentrt.errors import BackendError, RequestError, UnknownSolverError
from latentrt.request import Request
from latentrt.serve.core.curve import Curve
from latentrt.serve.core.service import Service
from latentrt.serve.core.ticket import Cut, Draining, Order, Picture, Preview, Progress, QueueFull, Started
from tests.serve.conftest import Serve, eventually
from tests.support.serve.fake_engine import (
    SHAPE,
    SMALL,
    Fakes,
    events,
    fake_engine,
    order,
    submit,
    submit_and_cancel,
    wait,
)

# ---- Orders and events


def test_an_order_tells_its_story(serve: Serve) -> None:
    told = wait(events(submit(serve(), order(count=2, steps=3))))
    assert isinstance(told[0], Started)
    for index in (0, 1):
        own = [event for event in told[1:] if event.index == index]  # type: ignore[union-attr]
        assert own[:-1] == [Progress(index, row, 3) for row in (1, 2, 3)]
        assert isinstance(own[-1], Picture)
        assert own[-1].image.info["latentrt"]["seed"] == index


@pytest.mark.filterwarnings("ignore::latentrt.errors.PromptTruncatedWarning")
def test_what_the_model_does_not_read_is_told_before_anything_else(serve: Serve) -> None:
    """Of the negative prompt only where there is one lane for it."""
    service, long = serve(), "an owl and a cat " * 30
    told = wait(events(submit(service, order(long, negative_prompt=long))))
    assert [event.field for event in told if isinstance(event, Cut)] == ["prompt", "negative_prompt"]
    assert isinstance(told[0], Cut)
    assert long.endswith(told[0].dropped)
    told = wait(events(submit(service, order(negative_prompt=long, guidance=1.0))))
    assert isinstance(told[0], Started)


def test_pictures_come_in_their_order(serve: Serve) -> None:
    made = wait(submit(serve(), order(count=3, seed=5, steps=2)).pictures())
    assert [picture.info["latentrt"]["seed"] for picture in made] == [5, 6, 7]
    assert made[0].size == (128, 128)


def test_many_loops_and_threads_may_listen(serve: Serve) -> None:
    """A ticket wakes whoever listens, in the loop that runs then."""
    service = serve()
    ticket = submit(service, order(steps=2))
    first = wait(anext(ticket))
    rest = wait(events(ticket))
    assert isinstance(first, Started)
    assert isinstance(rest[-1], Picture)
    assert wait(events(ticket)) == []


def test_a_bad_request_fails_alone_and_is_no_fault(serve: Serve) -> None:
    service = serve()
    bad, good = submit(service, order(solver="nonsense")), submit(service, order())
    with pytest.raises(UnknownSolverError, match="nonsense"):
        wait(bad.pictures())
    assert len(wait(good.pictures())) == 1
    assert service.ready


def test_an_order_that_no_lanes_can_hold_is_refused(serve: Serve, fakes: Fakes) -> None:
    with fake_engine(fakes, lanes=1) as small:
        service = serve(small)
        with pytest.raises(RequestError, match="takes 2 lanes"):
            wait(submit(service, order()).pictures())
        assert len(wait(submit(service, order(guidance=1.0)).pictures())) == 1


def test_an_engine_that_drops_its_networks_is_refused() -> None:
    with Engine.load(resident=False, check_hashes=False) as lean, pytest.raises(BackendError, match="resident"):
        Service(lean)


# ---- Who shares a step


def test_orders_share_steps(serve: Serve, fakes: Fakes) -> None:
    """Guided and unguided pictures with other steps and solvers; who is done leaves the rest alone."""
    service = serve()
    fakes.hold()
    first = submit(service, order(steps=2, guidance=1.0))
    fakes.wait_for(1)
    others = [submit(service, order(steps=3)), submit(service, order(steps=4, solver="heun", count=2))]
    eventually(lambda: not service._desk.queue.unprepared(1, 8))
    fakes.allow(None)
    for ticket in (first, *others):
        wait(ticket.pictures())
    assert fakes.lanes == [1, 1 + 2 + 4, 2 + 4, 2 + 4, *[4] * 4]


def test_no_step_has_more_lanes_than_pay(serve: Serve, fakes: Fakes) -> None:
    """Doubling two lanes costs twice the time here: two are the cap, and each size has its own."""
    service = serve(curve=Curve({SHAPE: {2: 1.0, 4: 2.0}, SMALL: {2: 1.0, 4: 1.0, 8: 2.0}}))
    large = [submit(service, order(steps=2)) for _ in range(3)]
    small = [submit(service, order(steps=2, height=64, width=64)) for _ in range(3)]
    for ticket in (*large, *small):
        wait(ticket.pictures())
    assert max(fakes.lanes) == 4
    assert len(fakes.lanes) >= 2 * 3 + 2 * 2


def started_in_order(service: Service, fakes: Fakes, *orders: Order) -> list[int]:
    """Submit orders while the only lanes are taken; the numbers of the orders as they come to run."""
    fakes.hold()
    first = submit(service, order(steps=1))
    fakes.wait_for(1)
    tickets = [submit(service, one) for one in orders]
    eventually(lambda: not service._desk.queue.unprepared(1, 4))
    begun: list[int] = []
    fakes.on_step = lambda step: begun.extend(i for i, ticket in enumerate(tickets) if ticket.begun and i not in begun)
    fakes.allow(None)
    for ticket in (first, *tickets):
        wait(ticket.pictures())
    return [*begun, *({*range(len(tickets))} - set(begun))]


def test_the_earliest_deadline_is_first_and_others_as_they_came(fakes: Fakes, serve: Serve) -> None:
    with fake_engine(fakes, lanes=2) as engine:
        service = serve(engine)
        now = time.monotonic()
        orders = [order(deadline=deadline) for deadline in (None, now + 3000, now + 20, None, now + 15)]
        assert started_in_order(service, fakes, *orders) == [4, 2, 0, 1, 3]


def test_a_picture_of_two_lanes_is_not_passed_by_those_of_one(fakes: Fakes, serve: Serve) -> None:
    with fake_engine(fakes, lanes=2) as engine:
        service = serve(engine)
        fakes.hold()
        single = submit(service, order(steps=3, guidance=1.0))
        fakes.wait_for(1)
        wide, *narrow = [submit(service, order(steps=1, guidance=scale)) for scale in (3.0, 1.0, 1.0)]
        eventually(lambda: not service._desk.queue.unprepared(1, 4))
        fakes.allow(None)
        for ticket in (single, wide, *narrow):
            wait(ticket.pictures())
        assert fakes.lanes == [1, 1, 1, 2, 2]


# ---- Beside the ticks


def test_previews_come_evenly_and_end_in_the_picture(serve: Serve) -> None:
    told = wait(events(submit(serve(), order(steps=8, previews=3, count=1))))
    previews = [event for event in told if isinstance(event, Preview)]
    assert [preview.number for preview in previews] == sorted({preview.number for preview in previews})
    assert {preview.number for preview in previews} <= {0, 1, 2}
    assert all(preview.image.size == (128, 128) for preview in previews)
    assert isinstance(told[-1], Picture)


def test_a_vae_that_lags_stalls_no_tick_and_previews_do_not_pile_up(serve: Serve, fakes: Fakes) -> None:
    service = serve()
    fakes.hold()
    ticket = submit(service, order(steps=12, previews=8))
    fakes.wait_for(1)
    fakes.decoding.clear()
    fakes.allow(3)
    eventually(lambda: fakes.decoded)  # the first preview hangs in the VAE
    fakes.allow(None)
    eventually(lambda: service._desk.denoised)
    assert fakes.steps == 12
    fakes.decoding.set()
    told = wait(events(ticket))
    assert len([event for event in told if isinstance(event, Preview)]) == 1
    assert isinstance(told[-1], Picture)


def test_a_text_encoder_that_lags_stalls_no_tick(serve: Serve, fakes: Fakes) -> None:
    service = serve()
    fakes.hold()
    running = submit(service, order(steps=5))
    fakes.wait_for(1)
    fakes.encoding.clear()
    encoded = len(fakes.texts)
    waiting = submit(service, order("a prompt that was never seen"))
    eventually(lambda: len(fakes.texts) > encoded)  # it hangs in the text encoder
    fakes.allow(None)
    eventually(lambda: service._desk.denoised)
    assert (fakes.steps, waiting.begun) == (5, False)
    fakes.encoding.set()
    for ticket in (running, waiting):
        wait(ticket.pictures())


def test_pictures_that_wait_are_decoded_together_and_lanes_do_not_run_ahead(serve: Serve, fakes: Fakes) -> None:
    """With a VAE that hangs, as many pictures are denoised as lanes can make in a tick or two, not all."""
    service = serve()
    fakes.hold()
    tickets = [submit(service, order(steps=1, guidance=1.0, seed=seed)) for seed in range(40)]
    eventually(lambda: not service._desk.queue.unprepared(1, 16))
    fakes.decoding.clear()
    fakes.allow(None)
    eventually(lambda: len(service._desk.denoised) >= 8)
    assert service.running <= 4 + 8 + 8  # in the VAE, denoised, in lanes
    fakes.decoding.set()
    for ticket in tickets:
        wait(ticket.pictures())
    assert max(fakes.decoded) == 4
    assert sum(fakes.decoded) == 40


def test_prompts_that_wait_are_encoded_together(serve: Serve, fakes: Fakes) -> None:
    """The first order finds the encoder idle; of the others' texts each is encoded once, all in one call."""
    service = serve()
    fakes.encoding.clear()
    tickets = [submit(service, order(f"number {number}", negative_prompt="blue")) for number in (0, 1, 2, 3, 3)]
    eventually(lambda: fakes.texts)
    fakes.encoding.set()
    for ticket in tickets:
        wait(ticket.pictures())
    assert sum(fakes.texts) == 5
    assert max(fakes.texts) >= 3


@pytest.mark.parametrize("count", [2, 5, 8])
def test_prompts_encoded_together_are_those_encoded_alone(embedded: Engine, count: int) -> None:
    """Bitwise, with ONNX Runtime on the CPU."""
    prompts = [f"{'very ' * number}big owl" for number in range(count)]
    with Engine.load(threads=1, check_hashes=False) as other:
        for own, prompt in zip(other.text_encoder.encode_all(prompts), prompts, strict=True):
            for name, states in embedded.text_encoder.encode(prompt).items():
                np.testing.assert_array_equal(own[name], states)


@pytest.mark.parametrize("side", [64, 88, 128])
def test_pictures_decoded_together_are_those_decoded_alone(embedded: Engine, side: int) -> None:
    """Bitwise, with ONNX Runtime on the CPU."""
    latents = np.random.default_rng(side).standard_normal((5, SHAPE[0], side // 8, side // 4), np.float32)
    for own, alone in zip(embedded.vae.decode(latents), latents, strict=True):
        np.testing.assert_array_equal(own, embedded.vae.decode(alone[None])[0])


def test_a_picture_to_begin_on(serve: Serve) -> None:
    """Half of the run is made, and the picture's settings say so; a mask alone is refused."""
    service = serve()
    image = np.full((128, 128, 3), 200, np.uint8)
    wanted = Order(Request(prompt="an owl", steps=4), image=image, strength=0.5)
    told = wait(events(submit(service, wanted)))
    assert [event.row for event in told if isinstance(event, Progress)] == [1, 2]
    assert isinstance(told[-1], Picture)
    with pytest.raises(RequestError, match="mask"):
        wait(submit(service, Order(Request(prompt="an owl"), mask=np.zeros((128, 128), np.uint8))).pictures())


# ---- The end


def test_what_is_accepted_finishes_and_nothing_new_begins(serve: Serve, fakes: Fakes) -> None:
    service = serve()
    fakes.hold()
    running = submit(service, order())
    place = service.reserve(1, rows=4, deadline=None)
    service.drain()
    assert (service.state, service.ready) == ("draining", False)
    with pytest.raises(Draining):
        service.reserve(1, rows=4, deadline=None)
    late = place.submit(order())
    assert wait(service.wait_drained(0.01)) is False

    async def finish() -> bool:
        waiting = asyncio.create_task(service.wait_drained(30))
        await asyncio.sleep(0)
        fakes.allow(None)
        return await waiting

    assert wait(finish()) is True
    assert len(wait(running.pictures())) == len(wait(late.pictures())) == 1


def test_closing_fails_what_is_left(serve: Serve, fakes: Fakes) -> None:
    service = serve()
    fakes.hold()
    running, waiting = submit(service, order(count=4)), submit(service, order())
    fakes.wait_for(1)
    place = service.reserve(1, rows=4, deadline=None)
    fakes.on_step = lambda step: None
    service._desk.close()
    fakes.allow(None)
    service.close()
    for ticket in (running, waiting):
        with pytest.raises(Draining):
            wait(ticket.pictures())
    with pytest.raises(Draining):
        place.submit(order())
    with pytest.raises(Draining):
        service.self_check()
    assert service._desk.idle


# ---- What observers hear


class Diary:
    """Writes down all calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments: self.calls.append((name, arguments))

    def of(self, name: str) -> list[tuple[Any, ...]]:
        return [arguments for called, arguments in self.calls if called == name]


def test_observers_hear_everything(serve: Serve, fakes: Fakes) -> None:
    diary = Diary()
    service = serve(observer=diary, queue=2)
    diary.calls.clear()
    wait(submit(service, order(count=2, steps=3, previews=1)).pictures())
    assert len(diary.of("admitted")) == 2
    fakes.encoding.clear()  # the next one must not run before it is cancelled
    submit_and_cancel(service)
    with pytest.raises(QueueFull):
        service.reserve(3, rows=1, deadline=None)
    assert diary.of("accepted") == [(2,), (1,)]
    assert diary.of("refused") == [("queue_full", 3)]
    assert [outcome for outcome, _ in diary.of("ended")] == ["done", "done", "cancelled"]
    assert [(lanes, pictures) for _, lanes, pictures in diary.of("ticked")] == [(4, 2)] * 3
    stages = [(stage, count) for stage, _, count in diary.of("staged")]
    assert ("prepare", 1) in stages
    assert sum(count for stage, count in stages if stage == "decode") == 2


def test_an_observer_that_raises_harms_nobody(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    class Raising:
        def __getattr__(self, name: str) -> Callable[..., None]:
            def method(*_: Any) -> None:
                raise ValueError("the observer is broken")

            return method

    wait(submit(serve(observer=Raising()), order()).pictures())
    assert "the observer's ticked raised" in caplog.text
