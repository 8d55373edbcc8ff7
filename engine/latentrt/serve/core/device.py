"""The device that several services share: which of them calls a network now."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


class Turnstile:
    """A lock that threads get in the order in which they came, so that none waits for more than one turn of each.

    A thread that has it may take it again.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._line: deque[int] = deque()  # threads; the first has the turn
        self._depth = 0  # how often it has it

    def __enter__(self) -> None:
        own = threading.get_ident()
        with self._changed:
            if not self._line or self._line[0] != own:
                self._line.append(own)
                self._changed.wait_for(lambda: self._line[0] == own)
            self._depth += 1

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Let others have the turn that a thread has, if any wait; it has it again at the end."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._depth -= 1
            if not self._depth:
                self._line.popleft()
                self._changed.notify_all()


@dataclass(frozen=True, slots=True)
class Device:
    """Turns of the services of one process: together they take no more memory than one of them alone may.

    Who needs both takes that of the stages first.

    Attributes:
        steps: of the denoiser, and of self-checks.
        stages: of all beside it: preparing and decoding.
    """

    steps: Turnstile = field(default_factory=Turnstile)
    stages: Turnstile = field(default_factory=Turnstile)
