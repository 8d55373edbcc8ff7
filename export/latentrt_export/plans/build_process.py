"""A process for each plan: the builder's memory is freed when it ends, and it can be stopped at any time.

An 8 GiB board has no room for what TensorRT keeps after a build; TensorRT-RTX rarely asks whether to stop; and where
native code crashes, or the system kills the process that takes too much memory, an error message says so.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Protocol

from latentrt.errors import LatentrtError, PlanError
from latentrt.runtime.tensorrt.record import PlanRecord
from latentrt.storage import remove_parts
from latentrt_export.plans.plan_builder import Cancelled, Order, build

GRACE = 5.0  # seconds that a build gets to stop by itself
OUTPUT = "output.txt"  # what the library prints in the child


class Progress(Protocol):
    """Called for a network in progress: its name, TensorRT's current phase, the share done, the seconds left."""

    def __call__(self, network: str, phase: str, share: float, left: float | None) -> None: ...


def build_in_child(order: Order, known: float | None, progress: Progress) -> PlanRecord:
    """Build in a process of its own, which ends with this function. No other may build in the order's folder."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    stop = context.Event()
    with tempfile.TemporaryDirectory(prefix="latentrt-") as folder:
        child = context.Process(target=_child, args=(order, Path(folder), theirs, stop), daemon=True)
        _start(child)
        theirs.close()
        try:
            return _listen(order, child, ours, Path(folder), known, progress)
        finally:
            _end(child, stop)
            ours.close()
            remove_parts(order.plans)  # a child that was killed cannot clean up


def _start(child: BaseProcess) -> None:
    """Start the child deaf to Ctrl-C, which a terminal sends to it as well: the parent says when to stop."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        child.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _listen(
    order: Order, child: BaseProcess, ours: Connection, folder: Path, known: float | None, progress: Progress
) -> PlanRecord:
    """Pass progress on until the child sends its record or its error."""
    start, phase, share = time.monotonic(), "starting", 0.0
    while True:
        try:
            message = ours.recv() if ours.poll(0.1) else None
        except EOFError:
            child.join()
            raise _crash(order, child.exitcode, folder) from None
        if isinstance(message, PlanRecord):
            return message
        if isinstance(message, Exception):
            raise message
        if message is not None:
            phase, share = message
        progress(order.label, phase, share, _left(time.monotonic() - start, share, known))


def _left(elapsed: float, share: float, known: float | None) -> float | None:
    """Return the seconds left: by the last build's time while that lasts, then by the share done."""
    if known is not None and elapsed < known:
        return known - elapsed
    return elapsed / share - elapsed if share > 0.02 else None


def _crash(order: Order, code: int | None, folder: Path) -> PlanError:
    said = (folder / OUTPUT).read_text(errors="replace").strip().splitlines()[-3:] if (folder / OUTPUT).exists() else []
    how = f"exit code {code}" if code is None or code >= 0 else signal.Signals(-code).name
    if code == -signal.SIGKILL:
        how += ", as a system does that runs out of memory"
    found = f"the build of the {order.label} crashed ({'; '.join([how, *said])})"
    return PlanError(
        found, needed="a build that ends well", fix="more free memory, fewer lanes, or another version of the library"
    )


def _end(child: BaseProcess, stop: Event) -> None:
    """Have the child stop at TensorRT's next step, or by force where that takes long, as with TensorRT-RTX."""
    stop.set()
    child.join(GRACE)
    if child.is_alive():
        child.kill()
        child.join()


def _child(order: Order, folder: Path, theirs: Connection, stop: Event) -> None:
    """Build a plan, in the process started for it."""
    parent, lock, last = os.getppid(), threading.Lock(), 0.0
    with (folder / OUTPUT).open("wb") as output:  # the library's own prints would spoil the terminal, and JSON
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)

    def report(phase: str, share: float) -> None:
        nonlocal last
        with lock:
            if time.monotonic() > last + 0.1:
                last = time.monotonic()
                theirs.send((phase, share))

    def cancelled() -> bool:
        return stop.is_set() or os.getppid() != parent

    try:
        result: PlanRecord | LatentrtError | None = build(order, folder, report, cancelled)
    except Cancelled:
        result = None
    except LatentrtError as error:
        result = error
    shutil.rmtree(folder, ignore_errors=True)  # a parent that was killed cannot clean up
    if result is not None and os.getppid() == parent:
        with lock:
            theirs.send(result)
