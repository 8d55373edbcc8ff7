"""Three ways to serve the same arrivals by the same scheduler, and a fourth: over HTTP.

Batching by request keeps a line of its own before the scheduler, as long as the scheduler's queue, and submits whole
requests, as many as a batch has room for, when all pictures of the last batch are done. It may mix steps, solvers and
guidance in a batch, which only an engine that batches by step can do: batches of one kind alone, as pipelines make
them, would be smaller still. One at a time is a batch of one request; pictures of one request always share calls.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path

from benchmarks.serving.clients import DRAW, Client
from benchmarks.serving.traffic import Arrival, Outcome
from latentrt.request import Request
from latentrt.serve.core.errors import QueueFull
from latentrt.serve.core.handle import Handle
from latentrt.serve.core.observer import Observer
from latentrt.serve.core.pipeline import Shape
from latentrt.serve.core.scheduler import Scheduler

QUEUE = 32
BY_STEP, BY_REQUEST, ALONE, HTTP = "by step", "by request", "one at a time", "by step, over HTTP"

Serve = Callable[[Arrival], Awaitable[bool]]


class Ticks(Observer):
    """Counts network calls, their lanes and their seconds."""

    def __init__(self) -> None:
        self.count, self.lanes, self.busy = 0, 0, 0.0

    def ticked(self, seconds: float, lanes: int, pictures: int) -> None:
        """Count one more call."""
        self.count, self.lanes, self.busy = self.count + 1, self.lanes + lanes, self.busy + seconds

    def take(self) -> tuple[int, int, float]:
        """Return the counts since the last call."""
        taken = (self.count, self.lanes, self.busy)
        self.count, self.lanes, self.busy = 0, 0, 0.0
        return taken


async def replay(
    policy: str, load: float, seed: int, traffic: Sequence[Arrival], serve: Serve, ticks: Ticks | None = None
) -> Outcome:
    """Send the arrivals in real time.

    Args:
        serve: returns when all pictures of a request are drawn, or False where it was refused.
        ticks: counts the calls of an engine in this process; None where it is in another.
    """
    latencies: dict[int, float] = {}
    before, _ = _used(), ticks and ticks.take()
    start = time.perf_counter()

    async def one(number: int, arrival: Arrival) -> None:
        if await serve(arrival):
            latencies[number] = time.perf_counter() - start - arrival.at

    async with asyncio.TaskGroup() as group:
        for number, arrival in enumerate(traffic):
            await asyncio.sleep(start + arrival.at - time.perf_counter())
            group.create_task(one(number, arrival))
    seconds = time.perf_counter() - start
    others = (_used() - before) / seconds
    served = sorted(latencies)
    pictures = sum(traffic[number].pictures for number in served)
    refused = len(traffic) - len(served)
    fate = (len(traffic), refused, pictures, seconds, [latencies[number] for number in served])
    return Outcome(policy, load, seed, *fate, *((max(0.0, others), *ticks.take()) if ticks else ()))


def _used() -> float:
    """Return seconds of CPU that everything but this process has used since the machine started (Linux)."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - time.process_time()


async def submitted(scheduler: Scheduler, shape: Shape, arrival: Arrival) -> bool:
    """The pictures of a request, each as soon as there are lanes for it; `shape` is of their latents."""
    request = Request(
        prompt=arrival.prompt,
        seed=arrival.seed,
        count=arrival.pictures,
        steps=arrival.steps,
        solver=arrival.solver,
        guidance=arrival.guidance,
    )
    handle = Handle(request, shape, arrival.steps)
    try:
        scheduler.reserve(handle)
    except QueueFull:
        return False
    try:
        scheduler.submit(handle)
        await handle.pictures()
    finally:
        scheduler.release(handle)
    return True


class InBatches:
    """A batch is closed when it starts, and the next one starts when all of it is done.

    Args:
        draw: makes the pictures of one request.
        most: pictures of a batch; a single request may have more.
        places: the most pictures that may wait in the queue.
    """

    def __init__(self, draw: Serve, most: int, places: int = QUEUE) -> None:
        self._draw, self._most, self._places = draw, most, places
        self._line: deque[tuple[Arrival, asyncio.Future[bool]]] = deque()
        self._work: asyncio.Task[None] | None = None

    async def __call__(self, arrival: Arrival) -> bool:
        """Wait in the queue, if it is not full."""
        if sum(one.pictures for one, _ in self._line) + arrival.pictures > self._places:
            return False
        done = asyncio.get_running_loop().create_future()
        self._line.append((arrival, done))
        if self._work is None or self._work.done():
            self._work = asyncio.create_task(self._run())
        return bool(await done)

    async def _run(self) -> None:
        while self._line:
            batch = self._next()
            made = await asyncio.gather(*[self._draw(arrival) for arrival, _ in batch])
            for (_, done), one in zip(batch, made, strict=True):
                done.set_result(one)

    def _next(self) -> list[tuple[Arrival, asyncio.Future[bool]]]:
        """Return the oldest request, and those after it as long as they fit."""
        batch = [self._line.popleft()]
        room = self._most - batch[0][0].pictures
        while self._line and self._line[0][0].pictures <= room:
            batch.append(self._line.popleft())
            room -= batch[-1][0].pictures
        return batch


class OverHttp:
    """Kept connections to a server process; a new one where all are busy."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._idle: list[Client] = []

    async def __call__(self, arrival: Arrival) -> bool:
        """Request pictures as PNG in base64, in JSON."""
        self._idle = [client for client in self._idle if not client.reader.at_eof()]  # the server closes idle ones
        client = self._idle.pop() if self._idle else await Client.connect(self._url)
        answer = await client.ask(DRAW, arrival.body)
        self._idle.append(client)
        if answer.status not in (200, 429):
            raise RuntimeError(f"the server answered {answer.status}: {answer.body[:200]!r}")
        return answer.status == 200

    async def close(self) -> None:
        """Close the connections."""
        with suppress(IndexError):
            while True:
                await self._idle.pop().leave()
