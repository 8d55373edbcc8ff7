"""How many cores this process may use: its affinity, physical cores, and the CPU quota of its control groups."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

from latentrt.runtime.machine.cgroups import SYSTEM, control_groups


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
    for folder, version in control_groups(system, "cpu"):
        with suppress(OSError, ValueError):
            if version == 2:
                quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
            else:
                names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
                quota, period = ((folder / name).read_text(encoding="ascii").strip() for name in names)
            if quota not in ("max", "-1") and int(period) > 0:
                yield int(quota) / int(period)
