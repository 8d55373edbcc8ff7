"""How far a build is, told by TensorRT's phases within phases."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from latentrt.runtime.tensorrt.library import Library
from latentrt_export.plans import building

Report = Callable[[str, float], None]  # what TensorRT does, and the share that is done


def watch(library: Library, config: Any, report: Report, cancelled: Callable[[], bool]) -> Any:
    """Have TensorRT tell how far it is, and ask whether to stop; return what must outlive the build."""
    if not building.reports_progress(library):
        return None

    class Monitor(library.module.IProgressMonitor):  # type: ignore[misc,name-defined]
        """Nothing may be raised in here: TensorRT's caller is C++ that takes no exceptions."""

        def __init__(self) -> None:
            library.module.IProgressMonitor.__init__(self)
            self.phases = Phases()

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self.phases.start(name, parent, steps)
            self._tell(name)

        def phase_finish(self, name: str) -> None:
            self.phases.finish(name)

        def step_complete(self, name: str, step: int) -> bool:
            self.phases.step(name)
            return self._tell(name)

        def _tell(self, name: str) -> bool:
            try:
                report(name, self.phases.share)
                return not cancelled()
            except Exception:  # nobody listens any more
                return False

    config.progress_monitor = Monitor()
    return config.progress_monitor


class Phases:
    """Counts how far TensorRT is: it works in phases within phases, each of a number of steps."""

    def __init__(self) -> None:
        self._open: list[list[Any]] = []  # name, steps, steps done: from the outermost in
        self._lock = threading.Lock()
        self._share = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """Note that a phase begins, within another."""
        with self._lock:
            self._open.append([name, max(steps, 1), 0])

    def step(self, name: str) -> None:
        """Note that a phase is a step further."""
        with self._lock:
            for phase in reversed(self._open):
                if phase[0] == name:
                    phase[2] += 1
                    return

    def finish(self, name: str) -> None:
        """Note that a phase ends, sometimes before all of its steps were told."""
        with self._lock:
            for index in reversed(range(len(self._open))):
                if self._open[index][0] == name:
                    del self._open[index:]
                    return

    @property
    def share(self) -> float:
        """The share that is done, 0 to 1; it never falls."""
        with self._lock:
            share = 0.0
            for _, steps, done in reversed(self._open):
                share = min((done + share) / steps, 1.0)
            self._share = max(self._share, share)
            return self._share
