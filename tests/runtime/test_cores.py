"""How many cores a process may use: by its affinity, physical cores and quotas of control groups, in a made tree."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from latentrt.runtime.machine.cores import multiplies_bytes, usable_cores
from latentrt.runtime.onnxruntime import OrtBackend

V2 = "30 23 0:26 {root} {point} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1 = "31 30 0:27 {root} {point} rw - cgroup cgroup rw,cpu,cpuacct"
V1_MEMORY = "32 30 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
ROOT_FS = "23 1 8:1 / / rw - ext4 /dev/root rw"


def write(system: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = system / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    return system


def v2(quotas: Mapping[str, str], group: str = "/", root: str = "/", point: str = "/sys/fs/cgroup") -> dict[str, str]:
    """Return the files of a system with version 2; `quotas` is cpu.max by folder below the mount point."""
    files = {f"{point.lstrip('/')}/{folder}/cpu.max": text for folder, text in quotas.items()}
    return {
        "proc/self/cgroup": f"0::{group}",
        "proc/self/mountinfo": f"{ROOT_FS}\n{V2.format(root=root, point=point.replace(' ', chr(92) + '040'))}",
        **files,
    }


def v1(quotas: Mapping[str, tuple[int, int]], group: str = "/", root: str = "/") -> dict[str, str]:
    """Return the files of a system with version 1, beside an empty version 2, as systemd's hybrid layout has it."""
    point = "/sys/fs/cgroup/cpu,cpuacct"
    mounts = [
        ROOT_FS,
        V1_MEMORY,
        V1.format(root=root, point=point),
        V2.format(root="/", point="/sys/fs/cgroup/unified"),
    ]
    files = {"proc/self/mountinfo": "\n".join(mounts)}
    files["proc/self/cgroup"] = f"9:memory:/elsewhere\n4:cpu,cpuacct:{group}\n1:name=systemd:{group}\n0::{group}"
    for folder, (quota, period) in quotas.items():
        files[f"{point.lstrip('/')}/{folder}/cpu.cfs_quota_us"] = str(quota)
        files[f"{point.lstrip('/')}/{folder}/cpu.cfs_period_us"] = str(period)
    return files


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),  # no Linux
        ({"proc/self/cgroup": "0::/", "proc/self/mountinfo": "nonsense"}, 8),
        (v2({}), 8),  # the root of the machine has no cpu.max
        (v2({".": "max 100000"}), 8),
        (v2({".": "400000 100000"}), 4),
        (v2({".": "150000 100000"}), 2),
        (v2({".": "140000 100000"}), 1),
        (v2({".": "20000 100000"}), 1),
        (v2({".": "3200000 100000"}), 8),
        (v2({"a/b": "max 100000", "a": "200000 100000", ".": "max 100000"}, "/a/b"), 2),  # of a group above
        (v2({"a/b": "300000 50000", "a": "700000 100000"}, "/a/b"), 6),
        (v2({"a/b": "100000 100000"}, "/a"), 8),  # of a group below: not ours
        (v2({".": "200000 100000"}, "/", "/docker/1"), 2),  # with a namespace of control groups
        (v2({".": "200000 100000"}, "/docker/1", "/docker/1"), 2),  # without
        (v2({"x": "300000 100000", ".": "max 100000"}, "/docker/1/x", "/docker/1"), 3),
        (v2({".": "200000 100000"}, "/../other"), 2),  # outside the namespace
        (v2({".": "200000 100000"}, point="/mnt/my groups"), 2),
        (v2({".": "nonsense"}), 8),
        (v2({".": "100000 0"}), 8),
        (v1({".": (-1, 100_000)}), 8),
        (v1({".": (300_000, 100_000)}), 3),
        (v1({"s/t": (-1, 100_000), "s": (250_000, 50_000), ".": (-1, 100_000)}, "/s/t"), 5),
        (v1({".": (200_000, 100_000)}, "/docker/1", "/docker/1"), 2),
    ],
)
def test_a_quota_bounds_the_cores(tmp_path: Path, files: Mapping[str, str], cores: int) -> None:
    assert usable_cores(write(tmp_path, files), range(8)) == cores


def test_hyperthreads_are_one_core(tmp_path: Path) -> None:
    topology = "sys/devices/system/cpu/cpu{}/topology/{}"
    pairs = {topology.format(cpu, "core_cpus_list"): f"{cpu % 4},{cpu % 4 + 4}" for cpu in range(8)}
    system = write(tmp_path, pairs)
    assert usable_cores(system, range(8)) == 4
    assert usable_cores(system, [0, 4]) == 1
    assert usable_cores(system, [0, 1, 4]) == 2
    older = {topology.format(cpu, "thread_siblings_list"): f"{cpu // 2 * 2}-{cpu // 2 * 2 + 1}" for cpu in range(8)}
    assert usable_cores(write(tmp_path / "older", older), range(6)) == 3


def test_an_affinity_bounds_the_cores_of_this_machine() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert usable_cores() == 1
        assert OrtBackend().threads == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert 1 <= usable_cores() <= len(allowed)
    assert OrtBackend(threads=3).threads == 3


@pytest.mark.parametrize(
    ("line", "exact"),
    [("flags\t: avx2 avx512_vnni", True), ("flags\t: avx2 fma", False), ("Features\t: asimddp", True), (None, True)],
)
def test_products_of_bytes(tmp_path: Path, line: str | None, exact: bool) -> None:
    if line is not None:
        (tmp_path / "proc").mkdir()
        (tmp_path / "proc" / "cpuinfo").write_text(f"processor\t: 0\n{line}\n", encoding="utf-8")
    assert multiplies_bytes(tmp_path) is exact
