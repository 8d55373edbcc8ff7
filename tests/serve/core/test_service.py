"""The service: requests and their events, which share a step, what goes on beside the ticks, and the end."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import pytest

from latentrt import Engine
from latentrt.errors import BackendError, RequestError, UnknownSolverError
from latentrt.serve.core.errors import Draining, QueueFull
from latentrt.serve.core.handle import Finished, Preview, Stage
from latentrt.serve.core.measured.curve import Curve
from latentrt.serve.core.observer import Observer
from latentrt.serve.core.service import Service
from tests.serve.conftest import Serve, all_prepared, at_stage, eventually
from tests.support.serve.fake_engine import (
    SHAPE,
    SMALL,
    Fakes,
    events,
    fake_engine,
    handle_of,
    submit,
    wait,
)

# ---- Requests and events


def test_a_request_tells_its_story(serve: Serve, fakes: Fakes) -> None:
    service = serve()
    fakes.hold()
    handle = submit(service, handle_of(count=2, steps=3))
    fakes.wait_for(1)
    assert (handle.started, handle.row, handle.progress, handle.done) == (None, 0, 0.0, 0)
    fakes.allow(1)
    fakes.wait_for(2)
    assert handle.started is not None
    assert (handle.row, handle.progress, handle.over) == (1, 2 / 6, False)
    fakes.allow(None)
    told = wait(events(handle))
    assert {event.index for event in told if isinstance(event, Finished)} == {0, 1}
    assert all(event.image.info["latentrt"]["seed"] == event.index for event in told)
    assert (handle.row, handle.progress, handle.done, handle.over) == (3, 1.0, 2, True)
    later = submit(service, handle_of())
    assert service.scheduler.handles == (handle, later)
    service.scheduler.release(handle)
    assert service.scheduler.handles == (later,)


@pytest.mark.filterwarnings("ignore::latentrt.errors.PromptTruncatedWarning")
def test_what_the_model_does_not_read_is_told(serve: Serve) -> None:
    """Of the negative prompt only where there is a lane for it."""
    service, long = serve(), "an owl and a cat " * 30
    handle = submit(service, handle_of(long, negative_prompt=long))
    wait(events(handle))
    assert list(handle.cut) == ["prompt", "negative_prompt"]
    assert long.endswith(handle.cut["prompt"])
    assert handle.warnings[0].startswith("prompt is longer than the model reads")
    handle = submit(service, handle_of(negative_prompt=long, guidance=1.0))
    wait(events(handle))
    assert handle.warnings == []


@pytest.mark.filterwarnings("ignore::latentrt.errors.PromptSyntaxWarning")
def test_syntax_that_is_drawn_as_letters_is_told(serve: Serve) -> None:
    handle = submit(serve(), handle_of("a (red:1.3) owl"))
    wait(events(handle))
    (told,) = handle.warnings
    assert told.startswith("the prompt has '(red:1.3)', which is drawn as letters; prompt_syntax=\"a1111\"")


def test_pictures_come_in_their_order(serve: Serve) -> None:
    made = wait(submit(serve(), handle_of(count=3, seed=5, steps=2)).pictures())
    assert [picture.info["latentrt"]["seed"] for picture in made] == [5, 6, 7]
    assert made[0].size == (128, 128)


def test_many_loops_may_listen(serve: Serve) -> None:
    """A handle wakes its client in the loop that runs then."""
    handle = submit(serve(), handle_of(steps=2, count=2))
    first = wait(anext(handle))
    (rest,) = wait(events(handle))
    assert {first.index, rest.index} == {0, 1}
    assert wait(events(handle)) == []


def test_a_bad_request_fails_alone_and_is_no_fault(serve: Serve) -> None:
    service = serve()
    bad, good = submit(service, handle_of(solver="nonsense")), submit(service, handle_of())
    with pytest.raises(UnknownSolverError, match="nonsense"):
        wait(bad.pictures())
    assert len(wait(good.pictures())) == 1
    assert service.scheduler.ready


def test_a_request_that_no_lanes_can_hold_is_refused(serve: Serve, fakes: Fakes) -> None:
    with fake_engine(fakes, lanes=1) as small:
        service = serve(small)
        with pytest.raises(RequestError, match="takes 2 lanes"):
            submit(service, handle_of())
        assert len(wait(submit(service, handle_of(guidance=1.0)).pictures())) == 1


def test_an_engine_that_drops_its_networks_is_refused() -> None:
    with Engine.load(resident=False, check_hashes=False) as lean, pytest.raises(BackendError, match="resident"):
        Service(lean)


# ---- Sharing steps


def test_requests_share_steps(serve: Serve, fakes: Fakes) -> None:
    """Guided and unguided pictures with other steps and solvers; those that are done leave the rest alone."""
    service = serve()
    fakes.hold()
    first = submit(service, handle_of(steps=2, guidance=1.0))
    fakes.wait_for(1)
    others = [submit(service, handle_of(steps=3)), submit(service, handle_of(steps=4, solver="heun", count=2))]
    all_prepared(service)
    fakes.allow(None)
    for handle in (first, *others):
        wait(handle.pictures())
    assert fakes.lanes == [1, 1 + 2 + 4, 2 + 4, 2 + 4, *[4] * 4]


def test_no_step_has_more_lanes_than_pay(serve: Serve, fakes: Fakes) -> None:
    """Doubling two lanes costs twice the time here: two are the cap, and each size has its own."""
    service = serve(curve=Curve({SHAPE: {2: 1.0, 4: 2.0}, SMALL: {2: 1.0, 4: 1.0, 8: 2.0}}))
    fakes.hold()
    large = [submit(service, handle_of(steps=2)) for _ in range(3)]
    small = [submit(service, handle_of(steps=2, height=64, width=64)) for _ in range(3)]
    all_prepared(service)
    fakes.allow(None)
    for handle in (*large, *small):
        wait(handle.pictures())
    assert max(fakes.lanes) == 4
    assert len(fakes.lanes) >= 2 * 3 + 2 * 2


def test_the_earliest_deadline_is_first_and_others_as_they_came(fakes: Fakes, serve: Serve) -> None:
    """A request without a deadline counts as due after half of queue_timeout, here 2000 s."""
    with fake_engine(fakes, lanes=2) as engine:
        service = serve(engine, queue_timeout=4000)
        fakes.hold()
        first, now = submit(service, handle_of(steps=1)), time.monotonic()
        fakes.wait_for(1)
        deadlines = (math.inf, now + 3000, now + 1200, math.inf, now + 1100)
        handles = [submit(service, handle_of(deadline=deadline)) for deadline in deadlines]
        all_prepared(service)
        begun: list[int] = []

        def note(step: int) -> None:
            begun.extend(i for i, one in enumerate(handles) if one.slots[0].stage > Stage.WAITING and i not in begun)

        fakes.on_step = note
        fakes.allow(None)
        for handle in (first, *handles):
            wait(handle.pictures())
        assert begun == [4, 2, 0, 1, 3]


def test_a_picture_of_two_lanes_is_not_passed_by_those_of_one(fakes: Fakes, serve: Serve) -> None:
    with fake_engine(fakes, lanes=2) as engine:
        service = serve(engine)
        fakes.hold()
        single = submit(service, handle_of(steps=3, guidance=1.0))
        fakes.wait_for(1)
        wide, *narrow = [submit(service, handle_of(steps=1, guidance=scale)) for scale in (3.0, 1.0, 1.0)]
        all_prepared(service)
        fakes.allow(None)
        for handle in (single, wide, *narrow):
            wait(handle.pictures())
        assert fakes.lanes == [1, 1, 1, 2, 2]


# ---- Beside the ticks


def test_previews_come_evenly_and_end_in_the_picture(serve: Serve) -> None:
    told = wait(events(submit(serve(), handle_of(steps=8, previews=3, count=1))))
    previews = [event for event in told if isinstance(event, Preview)]
    assert [preview.number for preview in previews] == sorted({preview.number for preview in previews})
    assert {preview.number for preview in previews} <= {0, 1, 2}
    assert all(preview.image.size == (128, 128) for preview in previews)
    assert isinstance(told[-1], Finished)


def test_a_vae_that_lags_stalls_no_tick_and_previews_do_not_pile_up(serve: Serve, fakes: Fakes) -> None:
    service = serve()
    fakes.hold()
    handle = submit(service, handle_of(steps=12, previews=8))
    fakes.wait_for(1)
    fakes.decoding.clear()
    fakes.allow(3)
    eventually(lambda: fakes.decoded)  # the first preview hangs in the VAE
    fakes.allow(None)
    eventually(lambda: at_stage(service, Stage.DENOISED))
    assert fakes.steps == 12
    fakes.decoding.set()
    told = wait(events(handle))
    assert len([event for event in told if isinstance(event, Preview)]) == 1
    assert isinstance(told[-1], Finished)


def test_a_text_encoder_that_lags_stalls_no_tick(serve: Serve, fakes: Fakes) -> None:
    service = serve()
    fakes.hold()
    running = submit(service, handle_of(steps=5))
    fakes.wait_for(1)
    fakes.encoding.clear()
    encoded = len(fakes.texts)
    waiting = submit(service, handle_of("a prompt that was never seen"))
    eventually(lambda: len(fakes.texts) > encoded)  # it hangs in the text encoder
    fakes.allow(None)
    eventually(lambda: at_stage(service, Stage.DENOISED))
    assert (fakes.steps, waiting.started) == (5, None)
    fakes.encoding.set()
    for handle in (running, waiting):
        wait(handle.pictures())


def test_lanes_do_not_run_ahead_of_a_vae_that_lags(serve: Serve, fakes: Fakes) -> None:
    """With a VAE that hangs, as many pictures are denoised as lanes can make in a tick or two, not all."""
    service = serve()
    fakes.hold()
    handles = [submit(service, handle_of(steps=1, guidance=1.0, seed=seed)) for seed in range(24)]
    all_prepared(service)
    fakes.decoding.clear()
    fakes.allow(None)
    eventually(lambda: len(at_stage(service, Stage.DENOISED)) >= 8)
    assert service.scheduler.running <= 1 + 8 + 8  # in the VAE, denoised, in lanes
    fakes.decoding.set()
    for handle in handles:
        wait(handle.pictures())
    assert len(fakes.decoded) == 24


def test_requests_are_prepared_and_pictures_decoded_by_turns(serve: Serve, fakes: Fakes) -> None:
    """A crowd of new prompts holds up no picture that is done."""
    service = serve()
    fakes.hold()
    running = submit(service, handle_of(steps=1, guidance=1.0))
    fakes.wait_for(1)
    encoded = len(fakes.texts)
    fakes.encoding.clear()
    crowd = [submit(service, handle_of(f"number {number}", steps=1, guidance=1.0)) for number in range(5)]
    eventually(lambda: len(fakes.texts) > encoded)  # the first one hangs in the text encoder
    fakes.allow(None)
    eventually(lambda: at_stage(service, Stage.DENOISED))
    fakes.decoding.clear()
    fakes.encoding.set()
    eventually(lambda: fakes.decoded)  # the picture that is done hangs in the VAE
    assert len(fakes.texts) == encoded + 1
    fakes.decoding.set()
    for handle in (running, *crowd):
        wait(handle.pictures())


def test_a_picture_to_begin_on(serve: Serve) -> None:
    """Half of the run is made; a mask alone is refused."""
    service = serve()
    image, mask = np.full((128, 128, 3), 200, np.uint8), np.zeros((128, 128), np.uint8)
    handle = submit(service, handle_of(strength=0.5, pictures={"image": image}))
    assert len(wait(handle.pictures())) == 1
    assert handle.rows == 2
    with pytest.raises(RequestError, match="mask"):
        wait(submit(service, handle_of(pictures={"mask": mask})).pictures())


# ---- The end


def test_what_has_a_place_finishes_and_nothing_new_begins(serve: Serve, fakes: Fakes) -> None:
    service = serve()
    scheduler, late = service.scheduler, handle_of()
    fakes.hold()
    running = submit(service, handle_of())
    scheduler.reserve(late)
    scheduler.drain()
    assert (scheduler.state, scheduler.ready) == ("draining", False)
    with pytest.raises(Draining):
        scheduler.reserve(handle_of())
    scheduler.submit(late)
    fakes.allow(None)
    assert len(wait(running.pictures())) == len(wait(late.pictures())) == 1


def test_closing_fails_what_is_left(serve: Serve, fakes: Fakes, engine: Engine) -> None:
    service = serve()
    fakes.hold()
    running, waiting, reserved = submit(service, handle_of(count=4)), submit(service, handle_of()), handle_of()
    fakes.wait_for(1)
    service.scheduler.reserve(reserved)
    service.scheduler.close()
    fakes.allow(None)
    service.close()
    service.scheduler.submit(reserved)
    for handle in (running, waiting, reserved):
        with pytest.raises(Draining):
            wait(handle.pictures())
    assert not service.scheduler._line.slots
    assert not engine.denoiser.jobs


# ---- What observers hear


class Diary(Observer):
    """Writes down all calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __getattribute__(self, name: str) -> Any:
        if name in vars(Observer) and not name.startswith("_"):
            return lambda *arguments: self.calls.append((name, arguments))
        return super().__getattribute__(name)

    def of(self, name: str) -> list[tuple[Any, ...]]:
        return [arguments for called, arguments in self.calls if called == name]


def test_observers_hear_everything(serve: Serve, fakes: Fakes) -> None:
    diary = Diary()
    service = serve(observer=diary, queue=2)
    diary.calls.clear()
    wait(submit(service, handle_of(count=2, steps=3, previews=1)).pictures())
    assert len(diary.of("begun")) == 1
    fakes.encoding.clear()  # a prompt that was never seen waits for it, and so has no lanes when it is cancelled
    service.scheduler.cancel(submit(service, handle_of("another prompt")))
    with pytest.raises(QueueFull):
        submit(service, handle_of(count=3))
    assert [outcome for outcome, _ in diary.of("ended")] == ["done", "done", "cancelled"]
    assert [(lanes, pictures) for _, lanes, pictures in diary.of("ticked")] == [(4, 2)] * 3
    stages = [stage for (stage, _) in diary.of("staged")]
    assert (stages.count("prepare"), stages.count("decode")) == (1, 2)
