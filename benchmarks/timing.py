"""Take samples: sides in turn, child processes with their memory, and a description of the machine."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

PACKAGES = ("numpy", "onnxruntime", "torch", "diffusers", "transformers")


class Sample(NamedTuple):
    """One timed call."""

    seconds: float
    result: Any


def paired(sides: Mapping[str, Callable[[int], Any]], repeats: int, warmup: int = 1) -> dict[str, list[Sample]]:
    """Time the sides in turn, ABABAB, so that the machine's other load meets all of them.

    Args:
        sides: by name, a function of the round's number (the same for every side, another one every round).
        repeats: rounds that are kept.
        warmup: rounds before these, not timed.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in sides}
    for round_ in range(warmup + repeats):
        for name, function in sides.items():
            sample = timed(function, round_)
            if round_ >= warmup:
                samples[name].append(sample)
    return samples


def timed(function: Callable[..., Any], *arguments: Any) -> Sample:
    """Call once, and return the time and the result."""
    start = time.perf_counter()
    result = function(*arguments)
    return Sample(time.perf_counter() - start, result)


class Child(NamedTuple):
    """A process that ran to its end: wall seconds, peak resident memory (the kernel's count), and what it printed."""

    seconds: float
    peak_kib: int
    output: str

    @property
    def mebibytes(self) -> float:
        """The peak in MiB.

        Raises:
            RuntimeError: it may not be the child's own: a new process inherits the peak of the one that starts it, so
                only a small process can measure a small child.
        """
        if self.peak_kib <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss:
            raise RuntimeError("this process is larger than its child; run this question in a process of its own")
        return self.peak_kib / 1024


def run_child(command: Sequence[str | Path], **env: str) -> Child:
    """Run a command with more environment (Linux).

    Raises:
        RuntimeError: the command failed.
    """
    with tempfile.TemporaryFile("w+") as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **env})
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    if process.returncode:
        raise RuntimeError(f"{command[0]} exited with {process.returncode}:\n{text}")
    return Child(seconds, usage.ru_maxrss, text)


def machine(packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Return what the numbers depend on, without anything that identifies the machine or its user."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {package: found for package in packages if (found := _version(package))},
        "load_before": round(os.getloadavg()[0], 2),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or "unknown"
