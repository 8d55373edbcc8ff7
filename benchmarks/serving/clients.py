"""HTTP/1.1 clients of a server in a process of its own, over raw asyncio streams, fast enough not to affect the timing.

One connection is kept for many requests; everything that a client sees of an answer is in `Answer`.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from contextlib import suppress
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

DRAW = "/v1/images/generations"
EDIT = "/v1/images/edits"


@dataclass(frozen=True, slots=True)
class Answer:
    """A response, and seconds from the first byte sent to the last one received."""

    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The code of an error; empty where it is none."""
        return "" if self.status == 200 else str(self.json()["error"]["code"])

    def pictures(self) -> list[NDArray[np.uint8]]:
        return [np.asarray(Image.open(BytesIO(base64.b64decode(one["b64_json"])))) for one in self.json()["data"]]


@dataclass(slots=True)
class Client:
    """One kept connection."""

    reader: asyncio.StreamReader = field(repr=False)
    writer: asyncio.StreamWriter = field(repr=False)

    @classmethod
    async def connect(cls, url: str, **options: Any) -> Client:
        host, _, port = url.removeprefix("http://").rpartition(":")
        return cls(*await asyncio.open_connection(host, int(port), **options))

    def send(self, path: str, body: bytes | dict[str, Any] | None = None, kind: str = "application/json") -> None:
        """Send a whole request; POST where there is a body."""
        data = json.dumps(body).encode() if isinstance(body, dict) else body or b""
        method = "GET" if body is None else "POST"
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
        self.writer.write(f"{head}Content-Type: {kind}\r\n\r\n".encode() + data)

    async def ask(
        self, path: str, body: bytes | dict[str, Any] | None = None, kind: str = "application/json"
    ) -> Answer:
        """Send a request and return its answer.

        Send a request and return its answer.
            asyncio.IncompleteReadError, ConnectionError: the connection broke.
        """
        start = time.perf_counter()
        self.send(path, body, kind)
        status, headers = await self.head()
        if "content-length" in headers:
            content = await self.reader.readexactly(int(headers["content-length"]))
        else:
            content = await self._chunks()
        return Answer(status, headers, content, time.perf_counter() - start)

    async def head(self) -> tuple[int, dict[str, str]]:
        """Return status and headers of an answer."""
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        pairs = (line.split(": ", 1) for line in lines[1:] if line)
        return int(lines[0].split()[1]), {name.lower(): value for name, value in pairs}

    async def _chunks(self) -> bytes:
        parts = []
        while size := int(await self.reader.readline(), 16):
            parts.append(await self.reader.readexactly(size))
            await self.reader.readexactly(2)
        await self.reader.readexactly(2)
        return b"".join(parts)

    async def leave(self) -> None:
        """Close the connection."""
        self.writer.close()
        with suppress(ConnectionError):
            await self.writer.wait_closed()

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.leave()


async def ask(
    url: str, path: str, body: bytes | dict[str, Any] | None = None, kind: str = "application/json"
) -> Answer:
    """Send one request over a connection of its own, and return its answer."""
    async with await Client.connect(url) as client:
        return await client.ask(path, body, kind)


async def metrics(url: str) -> dict[str, float]:
    """Return the server's metrics, by name and labels but the model's: `latentrt_images_total{outcome="done"}`."""
    found = {}
    for line in (await ask(url, "/metrics")).body.decode().splitlines():
        if not line.startswith("#"):
            name, _, value = line.replace('model_name="emoji",', "").replace('{model_name="emoji"}', "").rpartition(" ")
            found[name] = float(value)
    return found
