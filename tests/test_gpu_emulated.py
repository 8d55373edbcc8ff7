"""The tests of tests/gpu are themselves tested here: on the emulated device, with a fake TensorRT, small."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ONLY_HARDWARE = "tests/gpu/test_cuda_gpu.py"  # its arithmetic is tested by test_kernels and test_cuda


def test_the_gpu_tests_pass_on_the_emulated_device() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "tests/gpu",
        f"--ignore={ONLY_HARDWARE}",
        "-p",
        "no:cacheprovider",
    ]
    environment = {**os.environ, "LATENTRT_EMULATED_GPU": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "-ra"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    skipped = re.findall(r"^SKIPPED.*", done.stdout, re.MULTILINE)
    assert all("only plans are refitted" in line for line in skipped), skipped
