"""`latentrt doctor`: its findings here, and its messages for GPUs, drivers and TensorRTs that do not work."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from latentrt.command import doctor
from latentrt.command import main as cli
from latentrt.cuda.driver import Driver
from latentrt.storage import write_atomic
from tests.support.gpu.fakes import fake_tensorrt
from tests.support.gpu.fakes.fake_tensorrt import FakeTensorRt
from tests.support.gpu.host_gpu import HostDriver, HostGpu

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `latentrt doctor ...` in this process; return (exit code, standard output)."""

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["latentrt", "doctor", *arguments])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return int(exit.value.code or 0), capsys.readouterr().out

    return run


def driver(status: int) -> Callable[[str], Any]:
    """Return a stand-in for `ctypes.CDLL` where there is a driver: its cuInit returns a status."""
    return lambda name: SimpleNamespace(cuInit=lambda flags: status)


def test_doctor_finds_what_is_here(run: Run) -> None:
    code, out = run("--json")
    findings: dict[str, dict[str, Any]] = {finding["what"]: finding for finding in json.loads(out)}
    assert code == 0
    assert findings["the embedded model"]["good"]
    assert all(finding["good"] or finding["fix"] for finding in findings.values())
    code, out = run()
    assert "the embedded model" in out


def test_doctor_shows_and_empties_the_cache(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert doctor._cache().found == f"{tmp_path}/latentrt: checked 0 MB, graphs 0 MB, kernels 0 MB, plans 0 MB"
    for name in ("graphs/a/weights.bin", "kernels/a.cubin", "plans/b/c.plan", "curves/d.json"):
        write_atomic(tmp_path / "latentrt" / name, bytes(3_000_000))
    (tmp_path / "latentrt" / "graphs" / "link").symlink_to(tmp_path)
    assert doctor._cache().found.endswith("graphs 3 MB, kernels 3 MB, plans 3 MB")
    assert run("--empty-cache", "graphs", "--empty-cache", "kernels") == (0, "6 MB freed\n")
    assert run("--empty-cache", "graphs", "--json") == (0, '{"freed": 0}\n')
    left = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["c.plan", "d.json"]
    (tmp_path / "latentrt" / "plans").chmod(0o777)
    finding = doctor._cache()
    assert not finding.good
    assert "has mode 777, and is not used" in finding.found
    monkeypatch.setattr(doctor, "check_trusted", lambda path: (_ for _ in ()).throw(PermissionError(str(path))))
    assert "cannot be read" in doctor._cache().found


def test_doctor_fails_where_nothing_can_be_drawn(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    code, out = run("--json")
    findings = {finding["what"]: finding for finding in json.loads(out)}
    assert code == 1
    assert not findings["pictures on the CPU (onnxruntime)"]["good"]


def test_doctor_opens_the_gpu_and_says_what_its_driver_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentrt.cuda.gpu.Gpu", HostGpu)
    assert doctor._cuda().found == "Host GPU, compute capability 9.0, CUDA 13.0; the kernels are loaded"
    monkeypatch.setattr("latentrt.cuda.gpu.Gpu", lambda: Driver(HostDriver(version=11080)))
    finding = doctor._cuda()
    assert not finding.good
    assert "CUDA 11.8" in finding.found
    assert "580" in finding.fix


def test_doctor_starts_tensorrt_and_says_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeTensorRt()
    monkeypatch.setattr(doctor, "open_library", lambda name: fake.library)
    monkeypatch.setattr("ctypes.CDLL", driver(0))
    assert doctor._tensorrt("tensorrt").good

    def failing(logger: Any) -> Any:
        logger.log(fake_tensorrt.Severity.ERROR, "CUDA initialization failure with error: 35")

    fake.Runtime = failing  # type: ignore[method-assign]
    finding = doctor._tensorrt("tensorrt")
    assert not finding.good
    assert "error: 35" in finding.found
    assert "tensorrt-cu12" in finding.fix


def no_driver(name: str) -> Any:
    raise OSError(f"{name}: cannot open shared object file")


@pytest.mark.parametrize(
    ("cdll", "words"), [(no_driver, "no CUDA driver (libcuda.so.1: cannot"), (driver(100), "no GPU (cuInit says 100)")]
)
def test_doctor_starts_no_tensorrt_without_a_driver(
    monkeypatch: pytest.MonkeyPatch, cdll: Callable[[str], Any], words: str
) -> None:
    """8.6 would end the process."""

    def started(logger: Any) -> None:
        raise AssertionError("TensorRT was started")

    fake = FakeTensorRt(version="8.6.1")
    fake.Runtime = started  # type: ignore[method-assign]
    monkeypatch.setattr(doctor, "open_library", lambda name: fake.library)
    monkeypatch.setattr("ctypes.CDLL", cdll)
    finding = doctor._tensorrt("tensorrt")
    assert not finding.good
    assert finding.found.startswith("tensorrt 8.6.1, but ")
    assert words in finding.found
    assert "580" in finding.fix
    assert words in doctor._gpu().found


@pytest.mark.parametrize("trouble", [OSError("no such program"), subprocess.TimeoutExpired("nvidia-smi", 30)])
def test_doctor_outlives_a_driver_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, trouble: Exception) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise trouble

    monkeypatch.setattr("ctypes.CDLL", driver(0))
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr("subprocess.run", fail)
    finding = doctor._gpu()
    assert not finding.good
    assert "does not answer" in finding.found
