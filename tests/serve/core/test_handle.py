"""Handles: what is told and not heard stays bounded, and what a client may read."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentrt.serve.core.errors import Cancelled
from latentrt.serve.core.handle import Event, Finished, Handle, Preview, Slot, Stage
from tests.support.serve.fake_engine import handle_of, wait

IMAGE: Any = None


def handle_with(slots: int) -> Handle:
    handle = handle_of(count=slots)
    handle.slots = [Slot(handle, index, 0.0) for index in range(slots)]
    return handle


def heard(handle: Handle, count: int) -> list[Event]:
    """What a client hears that listens only now."""

    async def listen() -> list[Event]:
        return [await anext(handle) for _ in range(count)]

    return wait(listen())


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=60))
def test_of_each_picture_the_newest_preview_waits_and_everything_else(numbers: list[tuple[int, bool]]) -> None:
    handle = handle_with(4)
    told: list[Event] = [
        Preview(index, row, IMAGE) if preview else Finished(index, IMAGE)
        for row, (index, preview) in enumerate(numbers)
    ]
    for event in told:
        handle.tell(event)
    newest = {event.index: event for event in told if isinstance(event, Preview)}
    kept = [event for event in told if isinstance(event, Finished) or event is newest[event.index]]
    assert all(one is other for one, other in zip(heard(handle, len(kept)), kept, strict=True))


def test_the_last_picture_is_the_last_event() -> None:
    handle = handle_with(2)
    for slot in handle.slots:
        slot.stage = Stage.OVER
        handle.tell(Finished(slot.index, IMAGE))
    assert len(wait(handle.pictures())) == 2


def test_what_was_told_is_heard_before_the_failure() -> None:
    handle = handle_with(2)
    handle.tell(Finished(0, IMAGE))
    handle.fail(Cancelled("a", needed="b"))
    assert heard(handle, 1) == [Finished(0, IMAGE)]
    with pytest.raises(Cancelled):
        heard(handle, 1)


def test_a_client_that_stops_waiting_takes_no_other_along() -> None:
    async def go() -> Event:
        handle = handle_with(1)
        leaving, staying = (asyncio.ensure_future(anext(handle)) for _ in range(2))
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        handle.tell(Preview(0, 0, IMAGE))
        return await staying

    assert wait(go()) == Preview(0, 0, IMAGE)


@given(rows=st.integers(1, 60), previews=st.integers(0, 8))
def test_previews_are_evenly_spread(rows: int, previews: int) -> None:
    """None after the last row, one a row at most, and their numbers in order."""
    handle = handle_of(steps=rows, previews=previews)
    numbers = [handle.preview_at(row) for row in range(1, rows)]
    found = [number for number in numbers if number is not None]
    assert found == sorted(set(found))
    assert handle.preview_at(0) is handle.preview_at(rows) is None
    if previews < rows:
        assert len(found) == previews
