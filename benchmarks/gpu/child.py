"""Workers in processes of their own: each has its own memory, and the end of one stops no other."""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import os
import re
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

GRACE = 20.0  # seconds that a child gets to close
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)
OUT_OF_TIME = "Out of time"  # how the reason begins
POLL = 0.005  # seconds between two readings of the free memory


class NotMeasuredError(Exception):
    """A child could not do what it was asked; the message is the reason, in one line."""


class Deadline:
    """The time that a run has; `reason` is recorded for all that did not begin.

    Args:
        minutes: from now on; None for no bound.
    """

    def __init__(self, minutes: float | None) -> None:
        self.reason = f"{OUT_OF_TIME} (--minutes {minutes:g})" if minutes is not None else ""
        self._end = math.inf if minutes is None else time.monotonic() + 60 * minutes

    def within(self, seconds: float) -> Deadline:
        """Return the deadline of a piece of work: so many seconds from now on, or this one where it comes first."""
        sooner, end = Deadline(None), time.monotonic() + seconds
        sooner._end = min(end, self._end)
        sooner.reason = f"it took longer than {seconds:.0f} s" if end < self._end else self.reason
        return sooner

    @property
    def over(self) -> bool:
        """Whether the time is over, so that nothing more may begin."""
        return time.monotonic() >= self._end

    @property
    def seconds(self) -> float:
        """The seconds that are left; infinity where there is no bound."""
        return self._end - time.monotonic()

    def left(self, limit: float) -> float:
        """Return the seconds that a piece of work with its own limit may take.

        Raises:
            NotMeasuredError: no time is left.
        """
        if self.over:
            raise NotMeasuredError(self.reason)
        return min(limit, self.seconds)


class Child:
    """A worker object in a process of its own, called by the names of its methods.

    Args:
        worker: "module:class".
        arguments: for it.
    """

    def __init__(self, worker: str, *arguments: Any) -> None:
        self._started = time.perf_counter()
        self._log = tempfile.NamedTemporaryFile("w+", prefix="latentrt-", suffix=".log", errors="replace")  # noqa: SIM115
        context = multiprocessing.get_context("spawn")  # no daemon: torch.compile has processes of its own
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(worker, arguments, theirs, self._log.name))
        self._process.start()
        theirs.close()

    @property
    def age(self) -> float:
        """Seconds since the process was started."""
        return time.perf_counter() - self._started

    def ask(self, limit: float, method: str, *arguments: Any) -> Any:
        """Call a method and return its result.

        Raises:
            NotMeasuredError: it raised, took longer than `limit` seconds, or the process died.
        """
        try:
            self._ours.send((method, arguments))
            if not self._ours.poll(limit):
                self._process.kill()
                raise NotMeasuredError(f"it took longer than {limit:.0f} s")
            good, answer = self._ours.recv()
        except (EOFError, OSError):
            raise NotMeasuredError(self._death()) from None
        if not good:
            raise NotMeasuredError(answer)
        return answer

    def _death(self) -> str:
        self._process.join(GRACE)
        code = self._process.exitcode
        how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        self._log.seek(0)
        said = " ".join(self._log.read().split()[-60:])
        return f"the process ended with {how}: {said[-400:]}" if said else f"the process ended with {how}"

    def close(self) -> None:
        """Let it free everything, and end it."""
        try:
            self._ours.send(("close", ()))
            self._process.join(GRACE)
        except OSError:
            pass
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self._ours.close()
        self._log.close()


def _serve(worker: str, arguments: tuple[Any, ...], connection: Connection, log: str) -> None:
    """Run in the child: make the worker at the first request, and answer until it is closed or its parent is gone."""
    ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)  # or a stopped benchmark would go on using the GPU
    with open(log, "ab") as file:  # libraries print what they like; the end of it says why a process died
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    module, _, name = worker.partition(":")
    made: Any = None
    while True:
        try:
            method, given = connection.recv()
        except EOFError:
            break
        try:
            if method == "close":
                break
            if method == "host_peak":
                answer: Any = host_peak()
            else:
                made = made or getattr(import_module(module), name)(*arguments)
                answer = getattr(made, method)(*given)
            connection.send((True, answer))
        except Exception as error:  # any error is the reason why there is no figure
            connection.send((False, reason(error)))
    if made is not None:
        made.close()


def reason(error: BaseException) -> str:
    """Return an error in one line, which fits into a table's cell, without this machine's folders."""
    kind = "" if isinstance(error, NotMeasuredError | RuntimeError) else f"{type(error).__name__}: "
    text = " ".join(f"{kind}{error}".split()).replace("|", "/")
    return re.sub(r"(?<![\w:/])(?:/[\w.+~-]+)+/", "", text)[:600]


def host_peak() -> int:
    """Return the most bytes of memory that this process ever had at once (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


class Meter:
    """Measures the GPU memory of each of several processes, of which one works at a time.

    The driver only reports free memory. A process takes as much as that falls while it works, plus what it
    had before. All sides are measured so, with any allocator.

    Args:
        free: returns the free bytes.
    """

    def __init__(self, free: Callable[[], int]) -> None:
        self._free = free
        self._held: dict[str, int] = {}

    @contextmanager
    def watch(self, name: str) -> Iterator[list[int]]:
        """Watch while `name` works; the yielded list then has the most bytes that it had."""
        before = least = self._free()
        done, found = threading.Event(), list[int]()

        def look() -> None:
            nonlocal least
            while not done.wait(POLL):
                least = min(least, self._free())

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield found
        finally:
            done.set()
            thread.join()
            after, held = self._free(), self._held.get(name, 0)
            self._held[name] = held + before - after
            found.append(held + before - min(least, after))

    def gone(self, name: str) -> None:
        """Record that its process has ended."""
        self._held.pop(name, None)
