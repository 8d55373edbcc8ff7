"""`python -m tests.gpu`: its output and exit code, with small tests in the place of those that need a GPU."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parent
TESTS = """
import os, time
import pytest

pytestmark = pytest.mark.gpu

def test_passes():
    pass

def test_fails():
    assert False

def test_dies():
    os.abort()

def test_hangs():
    time.sleep(3600)

def test_misses():
    pytest.skip("no library. To fix it: pip install it")
"""


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """Return tests/gpu/__main__.py over a small file of tests."""
    spec = importlib.util.spec_from_file_location("gpu_runner", FOLDER / "__main__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_runner", module)
    spec.loader.exec_module(module)
    (tmp_path / "test_small.py").write_text(TESTS)
    return module


def run(runner: ModuleType, folder: Path, *chosen: str, **options: bool) -> tuple[int, list[str]]:
    """Run a step for each choice of tests; return the status and the lines."""
    steps = [runner.Step(choice, (str(folder / "test_small.py"), "-k", choice), **options) for choice in chosen]
    outcomes = [runner.run(step, folder, 5.0 if step.name == "hangs" else 3600.0) for step in steps]
    return runner.status(outcomes), [str(outcome) for outcome in outcomes]


def test_each_step_has_a_process_and_a_line(runner: ModuleType, tmp_path: Path) -> None:
    code, lines = run(runner, tmp_path, "passes or misses", "dies", "fails", "hangs")
    assert code == 1
    assert lines == [
        "passes or misses: 1 passed, 1 skipped (no library. To fix it: pip install it)",
        "dies: ended: by SIGABRT, see above",
        "fails: 1 failed",
        "hangs: ended: out of time",
    ]


def test_networks_must_run(runner: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = run(runner, tmp_path, "misses")
    assert (code, lines) == (1, ["misses: not run: no library. To fix it: pip install it"])
    assert "no network ran" in capsys.readouterr().err
    assert run(runner, tmp_path, "passes")[0] == 0


def test_what_no_library_promises_does_not_count(runner: ModuleType, tmp_path: Path) -> None:
    code, lines = run(runner, tmp_path, "dies", counts=False, network=False)
    assert (code, lines) == (0, ["dies: ended: by SIGABRT, see above (does not count)"])


def test_every_test_is_in_one_step(runner: ModuleType) -> None:
    names = [step.name for step in runner.steps()]
    assert names == ["kernels", "onnxruntime-fp16", "tensorrt-fp16", "tensorrt-rtx-fp16", "onnxruntime-fp16, captured"]


def test_time_for_the_whole_may_end(runner: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main(["--minutes", "0", "--results", str(tmp_path), "tensorrt-fp16"]) == 1
    assert "tensorrt-fp16: ended: out of time" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        runner.main(["cuda"])


@pytest.mark.parametrize(
    ("name", "capability", "refused"),
    [
        ("tensorrt-rtx", (9, 0), True),
        ("tensorrt-rtx", (8, 9), False),
        ("tensorrt", (9, 0), False),
    ],
)
def test_a_gpu_that_a_library_does_not_know_is_refused(
    runner: ModuleType, name: str, capability: tuple[int, int], refused: bool
) -> None:
    from types import SimpleNamespace

    from latentrt.errors import BackendError
    from tests.gpu.gpu_rig import GpuRig

    library = SimpleNamespace(compute_capabilities=("7.5", "8.9") if name == "tensorrt-rtx" else ())
    backend = SimpleNamespace(gpu=SimpleNamespace(compute_capability=capability), library=library)
    rig = GpuRig(SimpleNamespace(open_backend=lambda *_: backend), (name, "fp16"))
    if refused:
        with pytest.raises(BackendError, match=r"compute capability 9\.0"):
            rig.check_gpu()
    else:
        rig.check_gpu()
