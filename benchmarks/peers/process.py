"""A peer in a process of its own, asked one JSON object a line (`scripts/protocol.py` answers)."""

from __future__ import annotations

import json
import select
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu.child import GRACE, NotMeasuredError
from benchmarks.peers.environments import last_words

MEBI = 2**20


class Drawn(NamedTuple):
    """Seconds from prompts to pictures, and the most MiB that the process ever had."""

    seconds: float
    mebibytes: float


class PeerProcess:
    """A script that was started with a Python.

    Args:
        command: Python and the script.
        env: the process' environment.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        self._log = tempfile.NamedTemporaryFile("w+", prefix="latentrt-", suffix=".log", errors="replace")  # noqa: SIM115
        self._started = time.perf_counter()
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, bufsize=0, env=env
        )

    @property
    def age(self) -> float:
        """Seconds since it was started."""
        return time.perf_counter() - self._started

    def load(self, settings: Mapping[str, Any], limit: float) -> dict[str, str]:
        """Load the model; return versions of packages.

        Raises:
            NotMeasuredError: it failed, the process died, or it took longer than `limit` seconds.
        """
        versions: dict[str, str] = self._ask({"do": "load", "settings": settings}, limit)["versions"]
        return versions

    def draw(self, task: Mapping[str, Any], limit: float, save: Path | None = None) -> Drawn:
        """Draw a task's pictures; `save` is the stem of files for them, which are written after the time was taken.

        Raises:
            NotMeasuredError: as in `load`, or there are not as many pictures as were asked for.
        """
        answer = self._ask({"do": "draw", "task": task, "save": save and str(save)}, limit)
        if answer["pictures"] != len(task["seeds"]):
            raise NotMeasuredError(f"it drew {answer['pictures']} pictures, not {len(task['seeds'])}")
        return Drawn(answer["seconds"], answer["peak"] / MEBI)

    def close(self) -> float:
        """Let it end, or end it; return the seconds since it was started."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        seconds = self.age
        self._process.stdout.close()
        self._log.close()
        return seconds

    def _ask(self, request: Mapping[str, Any], limit: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
        except BrokenPipeError:
            raise NotMeasuredError(self._death()) from None
        ready, _, _ = select.select([self._process.stdout], [], [], limit)
        if not ready:
            self._process.kill()
            raise NotMeasuredError(f"it took longer than {limit:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise NotMeasuredError(self._death())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise NotMeasuredError(last_words(answer["error"]))
        return answer

    def _death(self) -> str:
        try:
            code = self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._log.seek(0)
        return f"the process ended with {code}: {last_words(self._log.read())}"
