"""Sends webhooks: signed, with bounded retries, each by a task of its own, so that a slow receiver holds nobody.

Source: the Standard Webhooks specification, 1.0, for headers, payload, retries and the meaning of statuses.
"""

from __future__ import annotations

import asyncio
import json
import random
import secrets
import ssl
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from latentrt import __version__
from latentrt.serve.process.logs import logger
from latentrt.serve.process.webhooks.hosts import Hosts, Target
from latentrt.serve.process.webhooks.signature import signed

ATTEMPT = 10.0  # seconds for the name, the connection and the answer's first line
DELAYS = (5.0, 30.0, 120.0, 240.0)  # seconds before each further attempt, and up to a fifth more
MOST, PART = 512, 4  # messages under way; one client may have one in so many of them
AT_ONCE = 2  # connections to one host
_REST, _MOST_READ = 1.0, 2**16  # seconds and bytes of an answer's rest
_GONE = 410  # the receiver wants no more
_HTTP = b"HTTP/1."


class Webhooks:
    """Sends messages from the event loop's thread.

    Args:
        hosts: where they may go.
        secrets: that sign them.
        lasting: seconds after which a message is given up.
        told: hears "delivered", "failed" or "dropped" of each.
        delays: before each further attempt.

    Attributes:
        tasks: one for each message under way, with its owner.
    """

    def __init__(
        self,
        hosts: Hosts,
        secrets: Sequence[bytes],
        *,
        lasting: float,
        told: Callable[[str], None],
        delays: Sequence[float] = DELAYS,
    ) -> None:
        self.hosts, self._secrets, self._told = hosts, secrets, told
        self._lasting, self._delays = lasting, delays
        self._tls = ssl.create_default_context() if hosts.has_https else None
        self._places: defaultdict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(AT_ONCE))
        self._ending = asyncio.Event()
        self.tasks: dict[asyncio.Task[None], str] = {}

    def send(self, owner: str, target: Target, kind: str, data: Mapping[str, Any]) -> None:
        """Send a message; drop it where too many are under way.

        Args:
            owner: whose it is.
            target: as `Hosts.target` returned it.
            kind: as "image.job.completed".
            data: JSON.
        """
        own = sum(each == owner for each in self.tasks.values())
        if len(self.tasks) >= MOST or own >= MOST // PART:
            logger().warning("a webhook was dropped", host=target.authority, under_way=len(self.tasks), own=own)
            return self._told("dropped")
        message = {"type": kind, "timestamp": datetime.now(UTC).isoformat(), "data": data}
        body = json.dumps(message, separators=(",", ":")).encode()
        task = asyncio.get_running_loop().create_task(self._deliver(target, body))
        self.tasks[task] = owner
        task.add_done_callback(self.tasks.pop)

    async def finish(self, seconds: float) -> None:
        """Try what is left once more, now; give up what has not arrived after so many seconds."""
        self._ending.set()
        if self.tasks:
            _, left = await asyncio.wait(self.tasks, timeout=max(0.0, seconds))
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    async def _deliver(self, target: Target, body: bytes) -> None:
        id, end = f"msg_{secrets.token_hex(16)}", time.monotonic() + self._lasting
        outcome, why = "failed", ""
        try:
            for delay in (0.0, *self._delays):
                await self._pause(delay * random.uniform(1, 1.2))
                async with self._places[target.authority]:
                    if time.monotonic() > end:
                        break
                    last = self._ending.is_set()
                    why = await self._attempt(target, id, body)
                if not why:
                    outcome = "delivered"
                if last or why in ("", str(_GONE)):
                    break
        finally:
            self._told(outcome)
            if outcome == "failed":
                logger().warning("a webhook was not delivered", id=id, host=target.authority, why=why or "no time")

    async def _pause(self, seconds: float) -> None:
        """Wait, or until the server ends."""
        if seconds:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._ending.wait()

    async def _attempt(self, target: Target, id: str, body: bytes) -> str:
        """Return what came instead of a success, the status or an error; nothing where the message has arrived."""
        headers = {
            "host": target.authority,
            "user-agent": f"latentrt/{__version__}",
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
            **signed(id, int(time.time()), body, self._secrets),
        }
        lines = [f"POST {target.path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        try:
            async with asyncio.timeout(ATTEMPT):
                status = await self._exchange(target, "\r\n".join(lines).encode() + body)
        except (OSError, EOFError, ValueError) as error:  # TLS errors and timeouts are OSErrors
            return str(error) or type(error).__name__
        return "" if 200 <= status < 300 else str(status)

    async def _exchange(self, target: Target, message: bytes) -> int:
        """Return the status of the answer; no redirect is followed.

        The rest is read, a little of it and for a moment, so that receivers see no connection that breaks off.

        Raises:
            OSError, EOFError, ValueError: there is no connection, or no answer of HTTP.
        """
        tls = self._tls if target.scheme == "https" else None
        name = target.host if tls else None
        reader, writer = await self._connected(target, tls, name)
        try:
            writer.write(message)
            await writer.drain()
            line = await reader.readuntil(b"\n")
            if not line.startswith(_HTTP):
                raise ValueError("the answer is not HTTP")
            with suppress(EOFError, OSError):
                async with asyncio.timeout(_REST):
                    await reader.readexactly(_MOST_READ)
            return int(line.split(maxsplit=2)[1])
        except (IndexError, asyncio.LimitOverrunError) as error:
            raise ValueError("the answer has no status") from error
        finally:
            writer.transport.abort()

    async def _connected(
        self, target: Target, tls: ssl.SSLContext | None, name: str | None
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect to the first address that answers, of those that were checked."""
        *others, last = await self.hosts.addresses(target)
        for address in others:
            with suppress(OSError):
                return await asyncio.open_connection(address, target.port, ssl=tls, server_hostname=name)
        return await asyncio.open_connection(last, target.port, ssl=tls, server_hostname=name)
