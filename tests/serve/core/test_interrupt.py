"""What an interrupted request gives: the prediction of one more row, of pictures that have begun."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from latentrt import Engine
from latentrt.serve.core.errors import Cancelled
from latentrt.serve.core.handle import Finished, Stage
from tests.serve.conftest import Serve, eventually
from tests.support.serve.fake_engine import Fakes, events, fake_engine, handle_of, submit, wait


@pytest.fixture
def engine(fakes: Fakes) -> Iterator[Engine]:
    """Four lanes, which two pictures take."""
    with fake_engine(fakes, lanes=4) as engine:
        yield engine


def test_pictures_that_run_end_with_what_they_are_to_become(serve: Serve, fakes: Fakes) -> None:
    """The third waits, and does not come; others' pictures go on."""
    service = serve()
    fakes.hold()
    handle = submit(service, handle_of(count=3, steps=9))
    fakes.wait_for(1)
    fakes.allow(1)
    fakes.wait_for(2)
    service.scheduler.stop(handle)
    other = submit(service, handle_of(steps=2))
    fakes.allow(None)
    made = [event for event in wait(events(handle)) if isinstance(event, Finished)]
    assert {event.index for event in made} == {0, 1}
    assert {event.image.info["latentrt"]["stopped_after"] for event in made} <= {2, 3}
    assert (handle.over, handle.done) == (True, 2)
    assert [event.index for event in wait(events(other))] == [0]
    eventually(lambda: service.scheduler.running == 0)


def test_the_picture_is_the_rows_prediction(serve: Serve, fakes: Fakes, engine: Engine) -> None:
    service = serve()
    fakes.hold()
    handle = submit(service, handle_of(steps=5))
    fakes.wait_for(1)
    service.scheduler.stop(handle)
    job = handle.slots[0].job
    fakes.allow(None)
    (made,) = wait(events(handle))
    assert job is not None
    assert job.preview is not None
    np.testing.assert_array_equal(np.asarray(made.image), np.asarray(engine.decode(job.preview)))
    assert (job.moved, made.image.info["latentrt"]["stopped_after"]) == (2, 2)  # the first one had begun


def test_skipping_leaves_those_that_wait(serve: Serve, fakes: Fakes) -> None:
    service = serve()
    fakes.hold()
    handle = submit(service, handle_of(count=3, steps=4))
    fakes.wait_for(1)
    service.scheduler.stop(handle, waiting=False)
    fakes.allow(None)
    facts = [event.image.info["latentrt"] for event in wait(events(handle))]
    assert [fact.get("stopped_after") for fact in facts] == [2, 2, None]


def test_of_what_has_not_begun_nothing_is_there(serve: Serve, fakes: Fakes) -> None:
    service = serve()
    fakes.hold()
    first = submit(service, handle_of(count=2, steps=2))
    fakes.wait_for(1)
    second = submit(service, handle_of(count=2))
    service.scheduler.stop(second)
    with pytest.raises(Cancelled, match="interrupted before it began"):
        wait(events(second))
    fakes.allow(None)
    wait(events(first))
    service.scheduler.stop(first)
    assert {slot.stage for slot in first.slots} == {Stage.OVER}
