"""Tickets: what is told and not heard stays bounded."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from latentrt.serve.core.ticket import Event, Preview, Progress, Ticket
from tests.support.serve.fake_engine import order, wait

SKETCH: Any = None


def heard(told: list[Event]) -> list[Event]:
    """What who listens only afterwards hears."""
    ticket = Ticket(order(), lambda ticket: None)
    for event in told:
        ticket.tell(event)
    ticket.tell(Progress(0, 9, 9), last=True)

    async def listen() -> list[Event]:
        return [event async for event in ticket]

    return wait(listen())[:-1]


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=60))
def test_of_each_picture_the_newest_preview_waits_and_everything_else(numbers: list[tuple[int, bool]]) -> None:
    told: list[Event] = [
        Preview(index, row, SKETCH) if preview else Progress(index, row, 60)
        for row, (index, preview) in enumerate(numbers)
    ]
    newest = {event.index: event for event in told if isinstance(event, Preview)}
    assert heard(told) == [event for event in told if isinstance(event, Progress) or event in newest.values()]
