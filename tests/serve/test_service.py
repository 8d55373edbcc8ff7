"""The service: who shares a step, what is refused, and that company changes no bit of a picture."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from conftest import Serve, eventually
from fake_engine import SHAPE, SMALL, Fakes, fake_engine, order, recorded, wait

from engine import Engine
from engine.denoiser import Denoiser
from engine.errors import BackendError, RequestError, UnknownSolverError
from engine.lanes import HostLanes
from engine.serve.curve import Curve
from engine.serve.service import Service
from engine.serve.ticket import (
    Cancelled,
    Cut,
    DeadlineUnreachable,
    Draining,
    Event,
    Failed,
    Order,
    Picture,
    Preview,
    Progress,
    QueueFull,
    QueueTimeout,
    RunTimeout,
    Started,
    Ticket,
)
from engine.spec import Request


def submit(service: Service, wanted: Order) -> Ticket:
    request = wanted.request
    return service.reserve(request.count, rows=request.steps, deadline=wanted.deadline).submit(wanted)


@pytest.fixture(scope="module")
def embedded() -> Iterator[Engine]:
    """The embedded model, on one thread: others may have the cores."""
    with Engine.load(threads=1, check_hashes=False) as engine:
        yield engine


async def events(ticket: Ticket) -> list[Event]:
    return [event async for event in ticket]


# ---- Orders and events


def test_an_order_tells_its_story(serve: Serve) -> None:
    told = wait(events(submit(serve(), order(count=2, steps=3))))
    assert isinstance(told[0], Started)
    for index in (0, 1):
        own = [event for event in told[1:] if event.index == index]  # type: ignore[union-attr]
        assert own[:-1] == [Progress(index, row, 3) for row in (1, 2, 3)]
        assert isinstance(own[-1], Picture)
        assert own[-1].image.info["latentrt"]["seed"] == index


@pytest.mark.filterwarnings("ignore::engine.errors.PromptTruncatedWarning")
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


# ---- Load is bounded


def test_places_are_counted_and_given_back(serve: Serve, fakes: Fakes) -> None:
    service = serve(queue=3)
    place = service.reserve(2, rows=4, deadline=None)
    with pytest.raises(QueueFull, match="1 of 3 places") as refused:
        service.reserve(2, rows=4, deadline=None)
    assert refused.value.retry_after is not None
    assert refused.value.retry_after >= 1
    place.release()
    place.release()
    with service.reserve(3, rows=4, deadline=None):
        assert service._desk.queue.free == 0
    assert service._desk.queue.free == 3
    with pytest.raises(QueueFull) as hopeless:
        service.reserve(4, rows=4, deadline=None)
    assert hopeless.value.retry_after is None
    with pytest.raises(RequestError, match="at most 0"):
        place.submit(order())
    with pytest.raises(RequestError, match="at most 1"):
        service.reserve(1, rows=4, deadline=None).submit(order(count=2))
    assert service._desk.idle


def test_a_burst_is_refused_by_exactly_its_excess(serve: Serve, fakes: Fakes) -> None:
    service = serve(queue=64)
    fakes.encoding.clear()  # nobody leaves the queue meanwhile
    tickets, refused = [], 0
    for seed in range(500):
        try:
            tickets.append(submit(service, order(seed=seed, steps=1)))
        except QueueFull:
            refused += 1
    assert (len(tickets), refused) == (64, 436)
    fakes.encoding.set()
    for ticket in tickets:
        wait(ticket.pictures())
    assert (service.waiting, service.running, service._desk.idle) == (0, 0, True)


def test_a_full_service_says_so_of_any_request_as_of_one_picture(serve: Serve, fakes: Fakes) -> None:
    service = serve(queue=2, curve=Curve({SHAPE: {2: 1.0, 4: 2.0}}))
    fakes.encoding.clear()
    assert service.full() is service.full(1) is None
    assert "0 of 2 places" in str(service.full(2))
    with service.reserve(1, rows=4, deadline=None):
        assert service.full() is None
        ticket = submit(service, order())
        full = service.full()
        with pytest.raises(QueueFull) as refused:
            service.reserve(1, rows=4, deadline=None)
        assert full is not None
        assert (str(full), full.retry_after) == (str(refused.value), refused.value.retry_after)
        assert service.full() is full  # for a moment
        service.drain()
        assert service.full() is None  # something else is to be said
    ticket.cancel()
    assert service.full() is None


def test_what_cannot_be_in_time_is_refused_by_the_curve(serve: Serve, fakes: Fakes) -> None:
    """A tick takes a second here, so ten rows take ten, and behind as many, twenty."""
    service = serve(curve=Curve({SHAPE: {2: 1.0, 4: 2.0}}))
    fakes.hold()
    now = time.monotonic()
    service.reserve(1, rows=10, deadline=now + 11).release()
    with pytest.raises(DeadlineUnreachable, match=r"done in 10\.0 s") as never:
        service.reserve(1, rows=10, deadline=now + 9)
    assert never.value.retry_after is None
    running = submit(service, order(steps=10))
    fakes.wait_for(1)
    with pytest.raises(DeadlineUnreachable, match=r"done in 20\.0 s") as later:
        service.reserve(1, rows=10, deadline=now + 15)
    assert later.value.retry_after == pytest.approx(5, abs=1)
    running.cancel()


def test_who_waits_too_long_fails_and_leaves_its_place(serve: Serve, fakes: Fakes) -> None:
    service = serve(queue_timeout=0.05)
    fakes.encoding.clear()
    ticket = submit(service, order())
    with pytest.raises(QueueTimeout):
        wait(ticket.pictures())
    assert service._desk.idle


@pytest.mark.parametrize("late", [{"run_timeout": 0.05}, {"deadline": 0.3}], ids=str)
def test_who_runs_too_long_fails_and_leaves_its_lanes(serve: Serve, fakes: Fakes, late: dict[str, float]) -> None:
    service = serve(**{name: value for name, value in late.items() if name != "deadline"})
    fakes.hold()
    ticket = submit(service, order(deadline=time.monotonic() + late["deadline"] if "deadline" in late else None))
    fakes.wait_for(1)
    with pytest.raises(RunTimeout):
        wait(ticket.pictures())
    fakes.allow(None)
    eventually(lambda: not service._engine.denoiser.jobs)
    assert fakes.steps == 1
    assert service.ready


def test_lanes_of_a_cancelled_order_are_free_within_two_ticks(serve: Serve, fakes: Fakes) -> None:
    service = serve()
    fakes.hold()
    leaving = submit(service, order(steps=50, count=4))
    fakes.wait_for(1)
    staying = submit(service, order(steps=3))
    eventually(lambda: not service._desk.queue.unprepared(1, 8))
    fakes.on_step = lambda step: leaving.cancel() if step == 5 else None
    fakes.allow(None)
    assert isinstance(wait(events(leaving))[-1], Failed)
    wait(staying.pictures())
    assert fakes.lanes == [8] * 5 + [2] * 3


def test_cancelling_what_waits_frees_its_places_at_once(serve: Serve, fakes: Fakes) -> None:
    service = serve(queue=2)
    fakes.encoding.clear()
    ticket = submit(service, order(count=2))
    ticket.cancel()
    ticket.cancel()
    service.reserve(2, rows=1, deadline=None).release()
    for cancelled in (ticket, submit_and_cancel(service)):
        with pytest.raises(Cancelled):
            wait(cancelled.pictures())


def submit_and_cancel(service: Service) -> Ticket:
    ticket = submit(service, order())
    ticket.cancel()
    return ticket


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
    latents = np.random.default_rng(side).standard_normal((5, 4, side // 8, side // 4), np.float32)
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


# ---- The same picture, alone or shared


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
    )


class Schedule:
    """Orders that come and are given up at ticks drawn by dice; steps call `turn` from the engine's thread."""

    def __init__(self, dice: random.Random, service: Service, orders: int, most_steps: int) -> None:
        self.dice, self.service = dice, service
        self.to_come = [(dice.randint(0, 12), draw_request(dice, most_steps)) for _ in range(orders)]
        self.to_cancel: list[tuple[int, Ticket]] = []
        self.tickets: list[Ticket] = []

    def turn(self, step: int) -> None:
        for at, request in [due for due in self.to_come if due[0] <= step]:
            self.to_come.remove((at, request))
            self.come(request, step)
        for at, ticket in [due for due in self.to_cancel if due[0] <= step]:
            self.to_cancel.remove((at, ticket))
            ticket.cancel()

    def come(self, request: Request, step: int) -> None:
        ticket = submit(self.service, Order(request))
        self.tickets.append(ticket)
        if self.dice.random() < 0.25:
            self.to_cancel.append((step + self.dice.randint(0, 4), ticket))

    def finish(self) -> list[list[Event]]:
        """Wait for all; where the service idles before an order's tick, the order comes then."""
        while self.to_come:
            eventually(lambda: not self.to_come or not (self.service.running or self.service.waiting))
            if self.to_come:
                self.turn(min(at for at, _ in self.to_come))
        return [wait(events(ticket)) for ticket in self.tickets]


def run_schedule(engine: Engine, dice: random.Random, orders: int, most_steps: int, on_step: Any) -> int:
    """Run one; every picture, and the latents of every job that came to its end, are those of the same made alone."""
    lanes = dice.randint(2, 8)
    engine.denoiser = Denoiser(HostLanes(engine.unet, lanes))
    curve = Curve({SHAPE: {1: 1.0, dice.randint(2, 8): 1.01}})
    with Service(engine, curve=curve) as service:
        service.self_check()
        made = recorded(engine)
        schedule = Schedule(dice, service, orders, most_steps)
        on_step(schedule.turn)
        stories = schedule.finish()
        on_step(lambda step: None)
        assert (service.running, service.waiting) == (0, 0)
    del engine.jobs  # the recording one
    pictures = [event.image for story in stories for event in story if isinstance(event, Picture)]
    wanted = sum(ticket.order.request.count for ticket in schedule.tickets)
    cancelled = [event for story in stories for event in story if isinstance(event, Failed)]
    assert all(isinstance(event.error, Cancelled) for event in cancelled)
    assert len(pictures) == wanted or cancelled
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
    (job,) = engine.jobs(Request(**own, guidance_interval=tuple(tag["guidance_interval"])))
    denoiser = Denoiser(HostLanes(engine.unet, 2))
    denoiser.admit(job)
    while denoiser.jobs:
        denoiser.tick()
    return job.latents, engine.picture(job)


@pytest.mark.parametrize("tens", range(20))
def test_joining_and_leaving_changes_no_bit(engine: Engine, fakes: Fakes, tens: int) -> None:
    """Two hundred schedules: lanes, cap, solvers, sizes, steps, guidance, and when orders come and are given up."""

    def on_step(turn: Callable[[int], None]) -> None:
        start = fakes.steps
        fakes.on_step = lambda step: turn(step - start)

    made = sum(run_schedule(engine, random.Random(10 * tens + one), 5, 6, on_step) for one in range(10))
    assert made > 40


def test_joining_and_leaving_changes_no_bit_of_real_networks(embedded: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with the embedded model: ONNX Runtime treats lanes and pictures of a batch alone."""
    network, turns = embedded.unet, [lambda step: None]
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

    monkeypatch.setattr(embedded, "unet", unet)
    assert sum(run_schedule(embedded, random.Random(seed), 3, 3, on_step) for seed in range(3)) > 5
