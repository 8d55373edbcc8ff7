"""The device that several services share: which of them calls a network now."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field


class Turnstile:
    """A lock that threads get in the order in which they came, so that none waits for more than one turn of each."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._line: deque[object] = deque()  # the first has the turn

    def __enter__(self) -> None:
        ticket = object()
        with self._changed:
            self._line.append(ticket)
            self._changed.wait_for(lambda: self._line[0] is ticket)

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._line.popleft()
            self._changed.notify_all()


@dataclass(frozen=True, slots=True)
class Device:
    """Turns of the services of one process: together they take no more memory than one of them alone may.

    Attributes:
        steps: of the denoiser, and of self-checks.
        stages: of all beside it: preparing and decoding.
    """

    steps: Turnstile = field(default_factory=Turnstile)
    stages: Turnstile = field(default_factory=Turnstile)
