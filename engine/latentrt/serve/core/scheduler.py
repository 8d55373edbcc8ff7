"""The scheduler: which requests wait, which run, and what each thread does next."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from PIL.Image import Image

from latentrt.errors import LatentrtError, RequestError
from latentrt.images.picture import Picture
from latentrt.model.text import Unread
from latentrt.run.job import Float32, Job
from latentrt.runtime.base import Facts
from latentrt.serve.core.errors import Cancelled, Draining, QueueFull, as_fault
from latentrt.serve.core.handle import Finished, Handle, Preview, Slot, Stage, Work
from latentrt.serve.core.health import Health
from latentrt.serve.core.line import Line
from latentrt.serve.core.measured.curve import Curve
from latentrt.serve.core.observer import Observer
from latentrt.serve.core.pipeline import Shape
from latentrt.serve.core.queue import Forecast, Limits, too_late
from latentrt.serve.core.rules.budget import Budget


class Scheduler:
    """A monitor: any thread may call any method, and no code but its own takes its lock or changes its state.

    Args:
        lanes, shape: of the network, and of the model's own latents.
        facts: how the engine's backend works.
        curve: what was measured; an empty one lets every tick have all lanes, and times are learnt.
        observer: is told of everything.
        on_hang: called where a call that hangs has not returned after as long again; a thread cannot be ended.
        budget: of calls; None: the area of all lanes at the model's own size.
        pauses: whether jobs can be retired and go on later.
    """

    def __init__(
        self,
        lanes: int,
        shape: Shape,
        facts: Facts,
        limits: Limits,
        curve: Curve,
        observer: Observer,
        on_hang: Callable[[], None],
        *,
        budget: Budget | None = None,
        pauses: bool = False,
    ) -> None:
        self.lanes, self.facts, self.observer = lanes, facts, observer
        self._on_hang = on_hang
        self._changed = threading.Condition()  # guards all that follows; notified when a thread may have work
        self._handles: dict[Handle, None] = {}  # from their reservation until they are released
        self._decodes_next = False  # requests are prepared and pictures decoded by turns
        budget = budget or Budget(lanes, shape, fixed=facts.fixed_lanes)
        self._forecast = Forecast(limits.queue, budget, curve)
        self._line = Line(lanes, limits, self._forecast, pauses=pauses)
        self._health = Health(limits.hang)
        self._draining = self._closed = False

    # ---- Requests

    def reserve(self, handle: Handle) -> None:
        """Give a request its places in the queue, before anything of it is decoded. `submit` and `release` follow.

        Raises:
            Draining, NotReady: nothing is taken now.
            QueueFull, QuotaExceeded: there are not as many places, or not for this client.
            DeadlineUnreachable: by what was measured, the pictures would be late.
            RequestError: the network has too few lanes.
        """
        with self._changed:
            if self.state == "draining":
                raise Draining("the server is ending", needed="one that runs", fix="send the request to another")
            if not self.ready:
                raise self._health.refusal()
            if handle.lanes > self.lanes:
                found, needed = f"the picture takes {handle.lanes} lanes", f"at most {self.lanes}"
                raise RequestError(found, needed, fix="set guidance_scale to 1")
            self._line.enter(handle, time.monotonic())
            self._handles[handle] = None
            self._changed.notify_all()

    def submit(self, handle: Handle) -> None:
        """Mark a request as complete: everything that its pictures need has come."""
        with self._changed:
            handle.submitted = True
            self._changed.notify_all()

    def cancel(self, handle: Handle) -> None:
        """Cancel a request; its lanes are free within two ticks. Events that it already has can still be read."""
        self.fail(handle, Cancelled.of("cancelled"))

    def stop(self, handle: Handle, *, waiting: bool = True) -> None:
        """End a request with the pictures that have begun; see `Handle.stop`."""
        with self._changed:
            for slot in handle.stop(waiting=waiting):
                self._end(slot, Cancelled.code)

    def release(self, handle: Handle) -> None:
        """Forget a request that no client waits for any more; its pictures that are not done are cancelled."""
        with self._changed:
            self.cancel(handle)
            self._handles.pop(handle, None)

    def fail(self, handle: Handle, error: LatentrtError) -> None:
        """Fail a request with an error, unless it is over: pictures that are done stay so."""
        with self._changed:
            if not handle.over:
                for slot in handle.slots:
                    self._end(slot, str(getattr(error, "code", type(error).__name__)))
                handle.fail(error)

    def fail_all(self, error: LatentrtError) -> None:
        """Fail all requests with an error."""
        with self._changed:
            for handle in self._handles:
                self.fail(handle, error)

    def _end(self, slot: Slot, outcome: str) -> None:
        if slot.stage < Stage.OVER:
            self._line.leave(slot)
            if slot.stage < Stage.DENOISED:
                slot.stepped()
            slot.stage, slot.job, slot.preview = Stage.OVER, None, None
            self.observer.ended(outcome, time.monotonic() - slot.handle.came)
            self._changed.notify_all()

    def full(self, owner: str = "") -> QueueFull | None:
        """Return why a client's picture has no place; None where it has, or no request is taken at all."""
        with self._changed:
            return self._line.full(1, owner) if self.ready else None

    # ---- What the engine's thread does

    def next_turn(self, *, busy: bool) -> list[Slot] | None:
        """Wait until the engine's thread has something to do; return the pictures that get lanes now, None to end it.

        A picture that had lanes and is `Stage.WAITING` again was paused: its job is retired and keeps its place.

        Args:
            busy: it has jobs to move anyway.
        """
        with self._changed:
            while not self._closed:
                joining, paused = self._joining()
                between = self.facts.one_stream and self._side_work() is not None
                if busy or joining or between or self.check_due:
                    self._line.begin(joining, paused, time.monotonic())
                    if joining:
                        self._changed.notify_all()  # the clock looks at limits
                    return joining
                self._changed.wait(self._health.until_check())
            return None

    def _joining(self) -> tuple[list[Slot], Slot | None]:
        """Return none while the engine is not trusted, or while the VAE lags by as many pictures as there are lanes."""
        if self._health.state != "ready" or len(self._line.at(Stage.DENOISED)) >= self.lanes:
            return [], None
        return self._line.next_running()

    @property
    def wanted(self) -> Mapping[str, int]:
        """The lanes of the pictures that wait or run, by client."""
        with self._changed:
            return self._line.wanted

    def ticked(self, slots: Sequence[Slot], lanes: int, seconds: float) -> None:
        """Record a tick of these pictures; a good one of a single shape is a point of the curve."""
        with self._changed:
            shapes = {slot.shape for slot in slots}
            if len(shapes) == 1 and self._health.fault is None:
                self._forecast.curve.learn(shapes.pop(), self.lanes if self.facts.fixed_lanes else lanes, seconds)
            moved = {slot.handle for slot in slots if slot.stage < Stage.OVER}
            for handle in (handle for handle in moved if handle.started is None):
                handle.started = time.monotonic()
                self.observer.begun(handle.queue_seconds)
        self.observer.ticked(seconds, lanes, len(slots))

    def hand_over(self, slot: Slot, preview: tuple[int, Float32] | None = None) -> None:
        """Queue a preview (its number and latents) for the VAE, or the picture itself where there is no preview."""
        with self._changed:
            if slot.stage is Stage.RUNNING:
                slot.preview = preview
                if preview is None:
                    slot.stepped()
                    slot.stage = Stage.DENOISED
                self._changed.notify_all()

    # ---- What is done beside the ticks

    def has_side_work(self, *, wait: bool) -> bool:
        """Return whether there is work for `side_work`; with `wait` once there is, or False after the end."""
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._closed or self._side_work() is not None)
            return not self._closed and self._side_work() is not None

    @contextmanager
    def side_work(self, below: float = math.inf) -> Iterator[Work | None]:
        """Give the next work, of pictures with fewer latents (height times width), and watch it like a call."""
        with ExitStack() as watch:
            with self._changed:
                work = None if self._closed else self._side_work(below)
                self._decodes_next = work is not None and work.slot is None
                if work is not None:
                    self._line.begin_side_work(work)
                    watch.enter_context(self.watched("stage", work.area))
                    self._changed.notify_all()  # lanes may have waited for this
            yield work

    def _side_work(self, below: float = math.inf) -> Work | None:
        """Return nothing while the engine is not trusted: nothing else may use it during a self-check."""
        trusted = self._health.state == "ready"
        return self._line.next_side_work(decodes_first=self._decodes_next, below=below) if trusted else None

    def prepared(self, handle: Handle, jobs: Sequence[Job], unread: Unread) -> None:
        """Take the jobs of a request, and what the model does not read of its texts."""
        with self._changed:
            if not handle.over:
                channels, height, width = jobs[0].largest
                handle.shape, handle.lanes = (channels, height, width), jobs[0].most_lanes
                handle.rows, handle.cut, handle.letters = jobs[0].rows, unread.cut, unread.letters
                for slot, job in zip(handle.slots, jobs, strict=True):
                    slot.job = job
                self._changed.notify_all()

    def show(self, slot: Slot, number: int, image: Image) -> None:
        """Tell a client of a preview."""
        with self._changed:
            if slot.stage < Stage.OVER:
                slot.handle.tell(Preview(slot.index, number, image))

    def finish(self, slot: Slot, picture: Picture) -> None:
        """Tell a client of a picture that is done."""
        with self._changed:
            if slot.stage < Stage.OVER:
                self._end(slot, "done")
                slot.handle.done += 1
                slot.handle.tell(Finished(slot.index, picture))

    # ---- Whether the engine works

    @property
    def check_due(self) -> bool:
        """Whether a self-check must pass before anything begins."""
        return self._health.until_check() == 0

    def suspect(self, error: LatentrtError, *, hung: bool = False) -> None:
        """Let nothing begin until a self-check has passed. Call it before the request at fault fails: a client that is
        told of the fault then finds the server unready.
        """
        with self._changed:
            self._health.suspect(error)
            self.observer.faulted(hung)
            self._changed.notify_all()

    def checked(self, error: LatentrtError | None) -> None:
        """Record the outcome of a self-check; one that failed fails all requests."""
        with self._changed:
            self._health.checked(error)
            if error is not None:
                self.fail_all(as_fault(error))
            self._changed.notify_all()

    @contextmanager
    def watched(self, call: str, area: float = 0) -> Iterator[None]:
        """Watch a call that may hang: a "step", a "stage" or a "self-check", for so many latents; infinity: a wait."""
        with self._changed:
            self._health.begin(call, area)
        try:
            yield
        finally:
            with self._changed:
                if self._health.end(call):
                    self._changed.notify_all()

    def run_clock(self) -> None:
        """Fail pictures that are over their time and find calls that hang, until the scheduler is closed."""
        with self._changed:
            while not self._closed:
                now = time.monotonic()
                for slot in [slot for slot in self._line.slots if slot.limit <= now]:
                    self.fail(slot.handle, too_late(slot, now))
                for fault in self._health.found_hung(now):
                    self.suspect(fault, hung=True)
                    self.fail_all(fault)
                if self._health.is_lost(now):
                    self._on_hang()
                limits = [slot.limit - now for slot in self._line.slots]
                self._changed.wait(max(0.0, min([self._health.hang / 4, *limits])))

    # ---- What others see, and the end

    @property
    def state(self) -> str:
        """Return "starting", "ready", "draining" or "failed"."""
        return "draining" if self._draining or self._closed else self._health.state

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self.state == "ready"

    @property
    def waiting(self) -> int:
        """Pictures without lanes."""
        with self._changed:
            return len(self._line.at(Stage.WAITING))

    @property
    def running(self) -> int:
        """Pictures that have lanes, or had them and are being decoded."""
        with self._changed:
            return len(self._line.slots) - len(self._line.at(Stage.WAITING))

    @property
    def handles(self) -> tuple[Handle, ...]:
        """All requests that clients wait for, oldest first."""
        with self._changed:
            return tuple(self._handles)

    @property
    def calling(self) -> bool:
        """Whether a call is under way: that of a client that left goes on."""
        return self._health.calling

    def drain(self) -> None:
        """Refuse new requests; those that have a place are finished."""
        with self._changed:
            self._draining = True

    def close(self) -> None:
        """End the threads; requests that are left fail."""
        with self._changed:
            self._closed = True
            self.fail_all(Draining("the server was stopped", needed="a server that runs", fix="ask again"))
            self._changed.notify_all()
