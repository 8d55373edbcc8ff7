"""How many cores this process may use: its affinity, physical cores, and the CPU quota of its control groups."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

SYSTEM = Path("/")


def usable_cores(system: Path = SYSTEM, cpus: Collection[int] | None = None) -> int:
    """Return the number of threads that compute without waiting for each other's core: 1 or more.

    It is the least of the physical cores that the process may be scheduled on, two hyperthreads being one, and of the
    CPU quota, rounded. A container's quota is no fewer CPUs but a part of their time: threads beyond it are stopped.

    Args:
        system: the root of the file system; /proc and /sys are read below it.
        cpus: numbers of the CPUs of the process' affinity; None asks the system.
    """
    if cpus is None:
        cpus = _affinity()
    cores = len({_core(system, cpu) for cpu in cpus})
    quota = min(_quotas(system), default=float(cores))
    return max(1, min(cores, int(quota + 0.5)))


def multiplies_bytes(system: Path = SYSTEM) -> bool:
    """Return whether ONNX Runtime's products of 8-bit numbers are exact on this CPU; True where that is not known.

    On x86 without VNNI it adds two products in 16 bits, where they overflow: its quantizer offers weights of 7 bits for
    such CPUs (https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html).
    """
    with suppress(OSError), (system / "proc/cpuinfo").open(encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("flags"):  # of x86; Arm has "Features"
                return "vnni" in line
    return True


def _affinity() -> Collection[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return range(os.cpu_count() or 1)  # macOS


def _core(system: Path, cpu: int) -> str:
    """Return what a CPU's hyperthreads have in common; the CPU itself where the system does not say."""
    topology = system / f"sys/devices/system/cpu/cpu{cpu}/topology"
    for name in ("core_cpus_list", "thread_siblings_list"):  # the newer and the older name
        with suppress(OSError):
            return (topology / name).read_text(encoding="ascii").strip()
    return str(cpu)


def _quotas(system: Path) -> Iterator[float]:
    """Yield the CPU quotas, in CPUs, of the process' control groups and of those above them."""
    for folder, version in _groups(system):
        with suppress(OSError, ValueError):
            if version == 2:
                quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
            else:
                names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
                quota, period = ((folder / name).read_text(encoding="ascii").strip() for name in names)
            if quota not in ("max", "-1") and int(period) > 0:
                yield int(quota) / int(period)


def _groups(system: Path) -> Iterator[tuple[Path, int]]:
    """Yield the folders of the process' CPU control groups, of each up to the top that is mounted, and the version."""
    try:
        lines = (system / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        own = [line.split(":", 2)[1:] for line in lines]
        mounts = [_mount(line) for line in (system / "proc/self/mountinfo").read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):  # no Linux, or another's idea of it
        return
    for controllers, path in own:
        for kind, options, root, point in mounts:
            version = 1 if controllers else 2
            if kind != ("cgroup" if controllers else "cgroup2"):
                continue
            if controllers and not ("cpu" in controllers.split(",") and "cpu" in options):
                continue
            top = system / point.lstrip("/")
            inside = PurePosixPath(path)
            # A container sees its own group as the root of the mount; a path beyond that is none of its own.
            below = inside.relative_to(root) if inside.is_relative_to(root) else PurePosixPath()
            parts = [] if ".." in below.parts else below.parts
            for depth in range(len(parts), -1, -1):
                yield top.joinpath(*parts[:depth]), version


def _mount(line: str) -> tuple[str, list[str], str, str]:
    """Return a mount's kind, options of its file system, root and mount point from a line of mountinfo."""
    before, _, after = line.partition(" - ")
    kind, _, options = ([*after.split(" "), "", ""])[:3]
    root, point = before.split(" ")[3:5]
    return kind, options.split(","), _plain(root), _plain(point)


def _plain(path: str) -> str:
    """Return a path of mountinfo, where spaces and the like are octal numbers."""
    return path.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
