"""What the curve says of orders to come: when they would be done, and when there is room for them."""

from __future__ import annotations

import math
from collections.abc import Collection

from latentrt.serve.core.curve import GUIDED, Curve, Shape
from latentrt.serve.core.queue import Part, begins


class Forecast:
    """The state of the queue at one moment, seen through the curve.

    Seats are counted in pictures with guidance, and rows of other shapes in rows of this one by their pixels: a
    forecast is right to tens of percent.

    Args:
        running, ahead: pictures with lanes, and those that would be served before the ones to come.
        caps: says how many lanes run at once.
        curve: says how long a tick takes.
        shape: of the pictures to come.
        lanes: of the network.
    """

    def __init__(
        self, running: Collection[Part], ahead: Collection[Part], caps: Curve, curve: Curve, shape: Shape, lanes: int
    ) -> None:
        cap = caps.cap(shape, lanes)
        self._seats = max(1, cap // GUIDED)
        self._shape = shape
        self._running, self._ahead = ([self._rows(part) for part in parts] for parts in (running, ahead))
        used = min(cap, sum(part.lanes for part in (*running, *ahead)) + GUIDED)
        self._tick = curve.seconds(shape, used)
        self._decode = curve.decoding(shape)

    def _rows(self, part: Part) -> float:
        return part.rows_left * math.prod(part.shape) / math.prod(self._shape)

    def done(self, pictures: int, rows: int) -> float | None:
        """Seconds until pictures that come now are done; None where nothing was measured."""
        if self._tick is None:
            return None
        starts = begins(self._running, [*self._ahead, *[float(rows)] * pictures], self._seats)
        return (starts[-1] + rows) * self._tick + pictures * self._decode

    def room(self, pictures: int) -> float | None:
        """Seconds until so many of those ahead have begun and left their places; None where nobody knows."""
        starts = begins(self._running, self._ahead, self._seats)
        if self._tick is None or not starts:
            return None
        return starts[min(pictures, len(starts)) - 1] * self._tick
