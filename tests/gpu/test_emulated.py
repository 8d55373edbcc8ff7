"""The tests of tests/gpu are themselves tested here: on the emulated device, with a fake TensorRT, small."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ONLY_HARDWARE = "tests/gpu/test_cuda_gpu.py"  # its arithmetic is tested by test_kernels and test_cuda


COMMAND = (sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu", "-p", "no:cacheprovider", "-ra")
HEAVY = ("torch", "diffusers", "transformers", "onnxscript", "matplotlib")


def run(*words: str, **env: str) -> list[str]:
    """Run the tests on the emulated device; return the lines of those that were skipped."""
    environment = {**os.environ, "LATENTRT_EMULATED_GPU": "1", "OMP_NUM_THREADS": "1", **env}
    done = subprocess.run([*COMMAND, *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    return re.findall(r"^SKIPPED.*", done.stdout, re.MULTILINE)


@pytest.mark.slow
def test_the_gpu_tests_pass_on_the_emulated_device() -> None:
    skipped = run(f"--ignore={ONLY_HARDWARE}")
    assert all("only plans are refitted" in line for line in skipped), skipped


@pytest.mark.slow
def test_the_gpu_tests_need_no_torch(tmp_path: Path) -> None:
    """A GPU's machine may lack all that other tests need; comparisons with diffusers are then skipped."""
    (tmp_path / "blocked.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({HEAVY!r}))\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    skipped = run("-p", "blocked", "-k", "onnxruntime-fp16", PYTHONPATH=path)
    assert all("only plans are refitted" in line or "could not import 'torch'" in line for line in skipped), skipped
