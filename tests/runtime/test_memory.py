"""How much memory there is and was taken, and that calls larger than usual give theirs back."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from latentrt.bundle.bundle import Bundle
from latentrt.runtime.machine.memory import free_memory, watched_peak
from latentrt.runtime.onnxruntime import OrtBackend
from tests.runtime.test_cores import ROOT_FS, V1_MEMORY, V2, write

MEMINFO = {"proc/meminfo": "MemTotal:  2000 kB\nMemAvailable:  1000 kB\nHugePages_Total:  0"}
GROUP2 = {
    "proc/self/cgroup": "0::/a",
    "proc/self/mountinfo": f"{ROOT_FS}\n{V2.format(root='/', point='/sys/fs/cgroup')}",
    "sys/fs/cgroup/memory.max": "max",
    "sys/fs/cgroup/a/memory.max": "500000",
    "sys/fs/cgroup/a/memory.current": "300000",
    "sys/fs/cgroup/a/memory.stat": "anon 200000\ninactive_file 50000",
}
GROUP1 = {
    "proc/self/cgroup": "9:memory:/b",
    "proc/self/mountinfo": f"{ROOT_FS}\n{V1_MEMORY}",
    "sys/fs/cgroup/memory/b/memory.limit_in_bytes": "400000",
    "sys/fs/cgroup/memory/b/memory.usage_in_bytes": "300000",
    "sys/fs/cgroup/memory/b/memory.stat": "cache 10\ntotal_inactive_file 20000",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": "300000",
    "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 0",
}


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, None),
        (MEMINFO, 1_024_000),
        (MEMINFO | GROUP2, 250_000),
        (MEMINFO | GROUP1, 120_000),
        (MEMINFO | GROUP2 | {"sys/fs/cgroup/a/memory.max": "max"}, 1_024_000),
        (MEMINFO | GROUP2 | {"sys/fs/cgroup/a/memory.current": "900000"}, 0),
    ],
    ids=str,
)
def test_the_least_that_system_and_groups_have_left(tmp_path: Path, files: dict[str, str], free: int | None) -> None:
    assert free_memory(write(tmp_path, files)) == free


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells it")
def test_a_peak_is_measured_and_a_large_call_keeps_none_of_it() -> None:
    """A decode of 512 x 512 takes about 150 MiB, 16 times the area of the model's own pictures."""
    decoder = OrtBackend(threads=1).load(Bundle.open(check_hashes=False), "vae_decoder")
    decoder({"latents": np.zeros((1, 4, 16, 16), np.float32)})
    with watched_peak() as whole:
        image = decoder({"latents": np.zeros((1, 4, 64, 64), np.float32)})["image"]
        del image
        with watched_peak() as after:
            pass
    assert after.bytes is not None
    assert after.bytes < 2**20
    with watched_peak() as large:
        decoder({"latents": np.zeros((1, 4, 64, 64), np.float32)})
    assert large.bytes is not None
    assert large.bytes > 100 * 2**20  # taken again: it had been given back
    assert whole.bytes is not None
