"""A server in a process of its own: its URL, its log, its end, and what the kernel reports of it (Linux)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COMMAND = (sys.executable, "-c", "from latentrt.command.serve import serve; serve()")
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Process:
    """`latentrt serve` on a free port with these flags, or another command that takes them."""

    def __init__(self, *flags: str, command: Sequence[str] = COMMAND) -> None:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("LATENTRT_")}
        self.process = subprocess.Popen(
            [*command, "--port", "0", "--log-format", "json", *flags],
            stderr=subprocess.PIPE,
            text=True,
            env=inherited,
        )
        self.log: list[dict[str, Any]] = []
        self.unreadable: list[str] = []
        self._url = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for line in lines:
                try:
                    self.log.append(json.loads(line))
                except ValueError:
                    self.unreadable.append(line)

    @property
    def url(self) -> str:
        while not self._url:
            self._url = next((str(line["url"]) for line in list(self.log) if line["event"] == "serving"), "")
            assert self._url or self.process.poll() is None, (self.log, self.unreadable)
            time.sleep(0.01)
        return self._url

    def wait_ready(self) -> None:
        while not self.answers("/health/ready"):
            assert self.process.poll() is None, (self.log, self.unreadable)
            time.sleep(0.02)

    def answers(self, path: str) -> bool:
        """Return whether a GET is answered with success."""
        try:
            with _DIRECT.open(f"{self.url}{path}", timeout=10) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def requests(self) -> list[dict[str, Any]]:
        """Return its log's lines of requests for pictures."""
        return [line for line in list(self.log) if line["event"] == "request" and line["method"] == "POST"]

    @property
    def memory(self) -> float:
        """Resident MiB."""
        return self._status("VmRSS") / 1024

    @property
    def peak(self) -> float:
        """The most MiB that were ever resident."""
        return self._status("VmHWM") / 1024

    @property
    def descriptors(self) -> int:
        """Open files and sockets."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    @property
    def threads(self) -> int:
        """Threads of all kinds, the networks' own among them."""
        return self._status("Threads")

    def _status(self, name: str) -> int:
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))

    def stop(self) -> int:
        """Drain it; return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.end()

    def end(self) -> int:
        code = self.process.wait(timeout=900)  # more than any busy machine needs
        self._reader.join()
        return code


@contextmanager
def running(*flags: str, command: Sequence[str] = COMMAND) -> Iterator[Process]:
    """Yield a server that is ready."""
    process = Process(*flags, command=command)
    try:
        process.wait_ready()
        yield process
    finally:
        process.process.kill()
        process.end()
