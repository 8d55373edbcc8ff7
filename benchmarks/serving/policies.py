"""Three ways to serve the same arrivals by the same Service, and a fourth: over HTTP.

Who batches by request keeps a line of its own before the Service, as long as the Service's queue, and submits the next
pictures when all of the last batch are done. It may mix steps, solvers and guidance in a batch, which only an engine
that batches by step can do: batches of one kind alone, as pipelines make them, would be smaller still.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from benchmarks.serving.clients import DRAW, Client
from benchmarks.serving.traffic import Arrival, Outcome
from engine.serve.service import Service
from engine.serve.ticket import Order, QueueFull
from engine.spec import Request

QUEUE = 32
BY_STEP, BY_REQUEST, ALONE, HTTP = "by step", "by request", "one at a time", "by step, over HTTP"

Serve = Callable[[Arrival], Awaitable[bool]]


async def replay(policy: str, load: float, traffic: Sequence[Arrival], serve: Serve) -> Outcome:
    """Let them arrive in real time; `serve` returns when a picture is there, False where it was refused."""
    latencies: dict[int, float] = {}
    start = time.perf_counter()

    async def one(number: int, arrival: Arrival) -> None:
        if await serve(arrival):
            latencies[number] = time.perf_counter() - start - arrival.at

    async with asyncio.TaskGroup() as group:
        for number, arrival in enumerate(traffic):
            await asyncio.sleep(start + arrival.at - time.perf_counter())
            group.create_task(one(number, arrival))
    seconds = time.perf_counter() - start
    served = [latencies[number] for number in sorted(latencies)]
    return Outcome(policy, load, len(traffic), len(traffic) - len(served), seconds, served)


async def submitted(service: Service, arrival: Arrival) -> bool:
    """A picture of the Service, as soon as it has lanes for it."""
    request = Request(
        prompt=arrival.prompt,
        seed=arrival.seed,
        steps=arrival.steps,
        solver=arrival.solver,
        guidance=arrival.guidance,
    )
    try:
        ticket = service.reserve(1, rows=arrival.steps, deadline=None).submit(Order(request))
    except QueueFull:
        return False
    await ticket.pictures()
    return True


class InBatches:
    """A batch is closed when it starts, and the next one starts when all of it is done.

    Args:
        most: pictures of a batch.
    """

    def __init__(self, service: Service, most: int) -> None:
        self._service, self._most = service, most
        self._line: deque[tuple[Arrival, asyncio.Future[bool]]] = deque()
        self._work: asyncio.Task[None] | None = None

    async def __call__(self, arrival: Arrival) -> bool:
        """Stand in the line, if it is not full."""
        if len(self._line) >= QUEUE:
            return False
        done = asyncio.get_running_loop().create_future()
        self._line.append((arrival, done))
        if self._work is None or self._work.done():
            self._work = asyncio.create_task(self._run())
        return bool(await done)

    async def _run(self) -> None:
        while self._line:
            batch = [self._line.popleft() for _ in range(min(self._most, len(self._line)))]
            made = await asyncio.gather(*[submitted(self._service, arrival) for arrival, _ in batch])
            for (_, done), one in zip(batch, made, strict=True):
                done.set_result(one)


class OverHttp:
    """Kept connections to a server process; a new one where all are busy."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._idle: list[Client] = []

    async def __call__(self, arrival: Arrival) -> bool:
        """A picture as PNG in base64, in JSON."""
        client = self._idle.pop() if self._idle else await Client.connect(self._url)
        answer = await client.ask(DRAW, arrival.body)
        self._idle.append(client)
        if answer.status not in (200, 429):
            raise RuntimeError(f"the server answered {answer.status}: {answer.body[:200]!r}")
        return answer.status == 200

    async def close(self) -> None:
        """Hang up."""
        with suppress(IndexError):
            while True:
                await self._idle.pop().leave()
