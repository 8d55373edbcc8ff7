"""The service: a scheduler and the threads that work for it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from latentrt.engine import Engine
from latentrt.errors import BackendError
from latentrt.model.vae.codec import nothing
from latentrt.serve.core import pipeline
from latentrt.serve.core.device import Device
from latentrt.serve.core.errors import as_fault
from latentrt.serve.core.measured.curve import Curve
from latentrt.serve.core.observer import Observer
from latentrt.serve.core.queue import Limits
from latentrt.serve.core.rules.budget import Budget
from latentrt.serve.core.scheduler import Scheduler
from latentrt.serve.core.worker import SideWorker, Worker


class Service:
    """Serves an engine to many requests; use it in a `with` block or close it.

    Args:
        engine: resident, and used by nothing else from now on; it is not closed here.
        limits, curve, budget, observer, on_hang: as of `Scheduler`.
        device: that other services have too; None: this one has it alone.

    Raises:
        BackendError: the engine drops its networks after use.
    """

    def __init__(
        self,
        engine: Engine,
        limits: Limits = Limits(),  # noqa: B008 - it is immutable
        *,
        curve: Curve | None = None,
        budget: Budget | None = None,
        observer: Observer | None = None,
        on_hang: Callable[[], None] = lambda: None,
        device: Device | None = None,
    ) -> None:
        if not engine.model.resident:
            fix = "load it with resident=True"
            raise BackendError("the engine drops its networks", needed="a resident one", fix=fix)
        engine.served = True
        self._engine = engine
        facts, shape = engine.backend.facts, engine.spec.latents.shape_of(None, None)
        budget = budget or Budget(engine.denoiser.lanes, shape, fixed=facts.fixed_lanes)
        engine.denoiser.limit_calls(budget.lanes_of_call)
        self.scheduler = Scheduler(
            *(engine.denoiser.lanes, shape, facts, limits, curve or Curve(), observer or Observer(), on_hang),
            budget=budget,
            pauses=engine.denoiser.resumable,
        )
        device = device or Device()
        side = SideWorker(self.scheduler, engine, device)
        pipeline.divide(engine, side.between)
        worker = Worker(self.scheduler, engine, device, side if facts.one_stream else None)
        runs: dict[str, Callable[[], None]] = {"engine": worker.run, "clock": self.scheduler.run_clock}
        if not facts.one_stream:
            runs["side"] = side.run
        self._threads = [
            threading.Thread(target=self._survive, args=(run,), name=f"latentrt-{name}", daemon=True)
            for name, run in runs.items()
        ]
        for thread in self._threads:
            thread.start()

    def _survive(self, run: Callable[[], None]) -> None:
        """Run a thread's function until it returns. An error in it is a bug of ours, and fails all requests."""
        while True:
            try:
                return run()
            except Exception as error:
                logging.getLogger(__name__).exception("%s raised", threading.current_thread().name)
                self.scheduler.suspect(as_fault(error))
                self.scheduler.fail_all(as_fault(error))

    def close(self, timeout: float = 10.0) -> None:
        """End the threads after the tick that runs; what is left fails. Threads that hang are left behind."""
        self.scheduler.close()
        end = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        self._engine.served = any(thread.is_alive() for thread in self._threads)
        if not self._engine.served:
            pipeline.divide(self._engine, nothing)

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
