"""The progress of a build, from TensorRT's nested phases."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from latentrt.runtime.tensorrt.library import Library

Report = Callable[[str, float], None]  # what TensorRT does, and the share that is done


def watch(library: Library, config: Any, report: Report, cancelled: Callable[[], bool]) -> Any:
    """Have TensorRT report progress, and ask whether to stop; return the object that must outlive the build."""

    class Monitor(library.module.IProgressMonitor):  # type: ignore[misc,name-defined]
        """Raises nothing: TensorRT's caller is C++ that takes no exceptions."""

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
            except Exception:  # the parent no longer listens
                return False

    config.progress_monitor = Monitor()
    return config.progress_monitor


class Phases:
    """Counts TensorRT's progress: it works in nested phases, each of a number of steps."""

    def __init__(self) -> None:
        self._open: list[list[Any]] = []  # name, steps, steps done: from the outermost in
        self._lock = threading.Lock()
        self._share = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """Record the start of a phase within another."""
        with self._lock:
            self._open.append([name, max(steps, 1), 0])

    def step(self, name: str) -> None:
        """Record a step of a phase."""
        with self._lock:
            for phase in reversed(self._open):
                if phase[0] == name:
                    phase[2] += 1
                    return

    def finish(self, name: str) -> None:
        """Record the end of a phase, sometimes before all of its steps were reported."""
        with self._lock:
            for index in reversed(range(len(self._open))):
                if self._open[index][0] == name:
                    del self._open[index:]
                    return

    @property
    def share(self) -> float:
        """The share done, 0 to 1; it never falls."""
        with self._lock:
            share = 0.0
            for _, steps, done in reversed(self._open):
                share = min((done + share) / steps, 1.0)
            self._share = max(self._share, share)
            return self._share
