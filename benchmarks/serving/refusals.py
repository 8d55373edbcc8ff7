"""The time of a refusal: bursts into a full queue, by the server's log and by clients in another process.

`python -m benchmarks.serving.refusals URL REQUESTS CLIENTS` is that process; it prints what its clients saw.
"""

from __future__ import annotations

import asyncio
import json
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

from benchmarks.serving import fake
from benchmarks.serving.clients import DRAW, metrics
from benchmarks.serving.process import Process, running
from benchmarks.serving.traffic import quantile

PLACES = 64  # of the queue
FLAGS = ("--lanes", "2", "--queue", str(PLACES), "--max-steps", "999", "--run-timeout", "900")
EACH = ("--log-level", "debug")  # a line for each refusal, not a count
PARTS = {"p50": 0.5, "p99": 0.99}
FOREVER = 999  # steps: 10 s, longer than any burst


def measure(requests: int, crowds: tuple[int, ...], repeats: int) -> list[dict[str, Any]]:
    """Send bursts of so many requests, by crowds of so many clients in turn; the first round warms up.

    Returns:
        For each crowd {"clients", "requests", "client_seconds", "server_seconds"}: a list for each repeat.
    """
    found: list[dict[str, Any]] = [
        {"clients": clients, "requests": requests, "client_seconds": [], "server_seconds": []} for clients in crowds
    ]
    with running(*FLAGS, *EACH, command=fake.COMMAND) as one:
        for _ in range(repeats + 1):
            for part in found:
                client, server = _burst(one, requests, part["clients"])
                part["client_seconds"].append(client)
                part["server_seconds"].append(server)
    for part in found:
        del part["client_seconds"][0], part["server_seconds"][0]
    return found


def percentiles(part: Mapping[str, Any], side: str) -> dict[str, list[float]]:
    """Return milliseconds of each repeat at p50 and p99, as "client" or "server" saw them."""
    return {name: [1000 * quantile(seconds, at) for seconds in part[f"{side}_seconds"]] for name, at in PARTS.items()}


def _burst(one: Process, requests: int, clients: int) -> tuple[list[float], list[float]]:
    """Return seconds of the same refusals as clients and the server saw them; the server is idle before and after."""
    before = len(_refused_by(one))
    command = [sys.executable, "-m", "benchmarks.serving.refusals", one.url, str(requests), str(clients)]
    seen = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    while len(own := _refused_by(one)[before:]) < len(seen) or not asyncio.run(_idle(one.url)):
        time.sleep(0.01)
    return seen, own


def _refused_by(one: Process) -> list[float]:
    return [float(line["seconds"]) for line in one.requests() if line["status"] == 429]


async def _idle(url: str) -> bool:
    now = await metrics(url)
    return not now["latentrt_num_images_running"] and not now["latentrt_num_images_waiting"]


# ---- The clients' process: bare sockets, so that what is timed is the server


def crowd(url: str, requests: int, clients: int) -> list[float]:
    """Return seconds of each refusal, from the first byte sent to the last one received.

    A picture that takes all lanes keeps the queue from moving. Where the crowd is too small to fill the queue, others
    fill it first; a larger one finds it empty and fills it itself.
    """
    held = [_sent(url, FOREVER)]
    _until(url, "running", 1)
    if clients <= PLACES:
        held += [_sent(url, 1) for _ in range(PLACES)]
        _until(url, "waiting", PLACES)
    crowd, left = [_connected(url) for _ in range(clients)], iter(range(requests - len(held) + 1))
    began: dict[socket.socket, float] = {}
    found: list[float] = []

    def ask(sock: socket.socket) -> None:
        if next(left, None) is not None:
            began[sock] = time.perf_counter()
            sock.sendall(_request(1))

    with selectors.DefaultSelector() as selector:
        for sock in crowd:
            selector.register(sock, selectors.EVENT_READ, sock)
        for sock in crowd:
            ask(sock)
        while len(found) < requests - PLACES:
            for key, _ in selector.select():
                _read_refusal(key.data)
                found.append(time.perf_counter() - began[key.data])
                ask(key.data)
    for sock in (*held, *crowd):
        sock.close()
    return found


def _connected(url: str) -> socket.socket:
    host, _, port = url.removeprefix("http://").rpartition(":")
    return socket.create_connection((host, int(port)))


def _request(steps: int) -> bytes:
    body = json.dumps({"prompt": "an owl", "num_inference_steps": steps}).encode()
    head = f"POST {DRAW} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


def _sent(url: str, steps: int) -> socket.socket:
    """Return a client that waits for a picture."""
    sock = _connected(url)
    sock.sendall(_request(steps))
    return sock


def _read_refusal(sock: socket.socket) -> None:
    answer = b""
    while not answer.endswith(b"}"):  # its body is one object
        answer += (piece := sock.recv(2**16))
        if not piece:
            raise ConnectionError("the server hung up")
    if b" 429 " not in answer[:16]:
        raise RuntimeError(f"the queue was not full: {answer[:80]!r}")


def _until(url: str, which: str, count: int) -> None:
    while asyncio.run(metrics(url))[f"latentrt_num_images_{which}"] < count:
        time.sleep(0.01)


if __name__ == "__main__":
    print(json.dumps(crowd(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
