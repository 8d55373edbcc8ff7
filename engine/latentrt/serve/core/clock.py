"""The thread that looks at the clock: timeouts and deadlines, and whether the engine hangs."""

from __future__ import annotations

import time

from latentrt.serve.core.desk import Desk


class Clock:
    """Fails what is over time.

    Args:
        hang: seconds after which a step, a stage or a self-check that has not returned is taken to hang.
    """

    def __init__(self, desk: Desk, hang: float) -> None:
        self._desk, self._hang = desk, hang

    def run(self) -> None:
        """Look whenever a limit passes, and four times in `hang`, until the desk is closed."""
        with self._desk.changed:
            while not self._desk.closed:
                now = time.monotonic()
                self._desk.expire(now)
                self._desk.find_hung(now, self._hang)
                limits = [part.limit - now for part in (*self._desk.queue.waiting, *self._desk.running)]
                self._desk.changed.wait(max(0.0, min([self._hang / 4, *limits])))
