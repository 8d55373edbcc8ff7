"""How much memory this process may still take, how much a piece of work takes, and how freed memory goes back."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from latentrt.bundle.spec import ENCODER, ModelSpec
from latentrt.runtime.machine.cgroups import SYSTEM, control_groups

NAMES = {  # of the limit and the use, and of the page cache that the system takes back before it kills
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def free_memory(system: Path = SYSTEM) -> int | None:
    """Return the bytes that this process may still take: the least that the system and its control groups have left.

    Args:
        system: the root of the file system; /proc and /sys are read below it.

    Returns:
        None where the system does not say.
    """
    left = list(_left(system))
    with suppress(OSError, KeyError):
        left.append(_kilobytes(system / "proc/meminfo", "MemAvailable:"))
    return max(0, min(left)) if left else None


def _left(system: Path) -> Iterator[int]:
    """Yield what the process' control groups, and those above them, have left."""
    for folder, version in control_groups(system, "memory"):
        limit, used, cache = NAMES[version]
        with suppress(OSError, ValueError, KeyError):
            most, now = (int((folder / name).read_text(encoding="ascii")) for name in (limit, used))
            yield most - now + _numbers(folder / "memory.stat")[cache]


def _numbers(path: Path) -> dict[str, int]:
    """Return the numbers of a file of lines "name number ..."."""
    lines = (line.split() for line in path.read_text(encoding="utf-8").splitlines())
    return {line[0]: int(line[1]) for line in lines if len(line) > 1 and line[1].isdecimal()}


def _kilobytes(path: Path, name: str) -> int:
    return 1024 * _numbers(path)[name]


class Peak:
    """What a piece of work took: `bytes` is the most resident memory in it over that before; None where the system does
    not tell.
    """

    bytes: int | None = None


@contextmanager
def watched_peak() -> Iterator[Peak]:
    """Measure the memory that this process takes in the block, in all of its threads; Linux alone tells it."""
    peak, before = Peak(), None
    give_back()  # what was freed before would be taken again, and not be seen
    with suppress(OSError, KeyError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the highest so far
        before = _kilobytes(Path("/proc/self/status"), "VmRSS:")
    yield peak
    if before is not None:
        peak.bytes = max(0, _kilobytes(Path("/proc/self/status"), "VmHWM:") - before)


def resident_memory() -> int | None:
    """Return the bytes that this process holds; None where the system does not tell."""
    with suppress(OSError, KeyError):
        return _kilobytes(Path("/proc/self/status"), "VmRSS:")
    return None


def usual_area(spec: ModelSpec, network: str) -> int:
    """Return height times width of a network's inputs for a picture of the model's own size; more is a large call."""
    factor = spec.latents.factor if spec.networks[network].role == ENCODER else 1
    return spec.latents.height * spec.latents.width * factor**2


def give_back() -> None:
    """Return to the system what was freed and glibc holds on to; elsewhere do nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def return_freed_pages() -> None:
    """Have glibc return blocks of 64 KiB and more to the system when they are freed; it holds for the whole process.

    While a session is made, ONNX Runtime frees about as much as it keeps (half-precision weights that it has widened,
    weights that it has repacked); glibc would hold on to it, a sixth of the embedded model's peak memory. The price is
    page faults for every large temporary array.
    """
    mmap_threshold = -3  # M_MMAP_THRESHOLD of mallopt(3)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(mmap_threshold, 64 * 1024)
