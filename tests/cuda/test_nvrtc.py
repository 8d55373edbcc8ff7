"""The kernels' compilation for every GPU, and the cache of their code."""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from latentrt.cuda import nvrtc as module
from latentrt.cuda.kernels import KERNELS
from latentrt.cuda.nvrtc import cubin
from latentrt.errors import BackendError, MissingDependencyError

SMS = (75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121)


@pytest.mark.parametrize("sm", SMS)
def test_compiles_without_spills(sm: int) -> None:
    real = pytest.importorskip("cuda.bindings.nvrtc")
    if sm not in real.nvrtcGetSupportedArchs()[1]:
        pytest.skip("this NVRTC does not know the GPU")
    options = (f"--gpu-architecture=sm_{sm}", *module.OPTIONS, "--ptxas-options=-v")
    code, log = module.compiled(module.whole_source(), options)
    assert code.startswith(b"\x7fELF")
    used = dict(re.findall(r"Compiling entry function '(\w+)'.*?Used (\d+) registers", log, re.DOTALL))
    assert set(used) == set(KERNELS)
    assert max(map(int, used.values())) <= 64
    assert set(re.findall(r"(\d+) bytes (?:stack frame|spill)", log)) == {"0"}


class FakeNvrtc:
    """NVRTC's answers without a compiler; `compiles` counts."""

    class nvrtcResult:  # noqa: N801
        NVRTC_SUCCESS = 0

    def __init__(self, architectures: tuple[int, ...] = SMS, status: int = 0) -> None:
        self.architectures, self.status = list(architectures), status
        self.compiles = 0
        self.options: list[bytes] = []
        self.programs = 0

    def nvrtcVersion(self) -> tuple[int, ...]:  # noqa: N802
        return 0, 13, 0

    def nvrtcGetSupportedArchs(self) -> tuple[int, list[int]]:  # noqa: N802
        return 0, self.architectures

    def nvrtcCreateProgram(self, *_: Any) -> tuple[int, str]:  # noqa: N802
        self.programs += 1
        return 0, "program"

    def nvrtcCompileProgram(self, _: str, count: int, options: list[bytes]) -> tuple[int]:  # noqa: N802
        assert count == len(options)
        self.compiles, self.options = self.compiles + 1, options
        return (self.status,)

    def nvrtcGetProgramLogSize(self, _: str) -> tuple[int, int]:  # noqa: N802
        return 0, 1

    def nvrtcGetProgramLog(self, _: str, log: bytes) -> tuple[int]:  # noqa: N802
        return (0,)

    def nvrtcGetCUBINSize(self, _: str) -> tuple[int, int]:  # noqa: N802
        return 0, 12

    def nvrtcGetCUBIN(self, _: str, code: bytes) -> tuple[int]:  # noqa: N802
        return (0,)

    def nvrtcDestroyProgram(self, _: str) -> tuple[int]:  # noqa: N802
        self.programs -= 1
        return (0,)


@pytest.fixture
def nvrtc(monkeypatch: pytest.MonkeyPatch) -> FakeNvrtc:
    fake = FakeNvrtc()
    monkeypatch.setattr(module, "_compiler", lambda: fake)
    return fake


def test_code_is_compiled_once_and_kept_for_the_user_alone(nvrtc: FakeNvrtc, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "kernels"
    first = cubin((9, 0), folder)
    assert cubin((9, 0), folder) == first == bytes(12)
    assert nvrtc.compiles == 1
    assert nvrtc.programs == 0
    assert b"--gpu-architecture=sm_90" in nvrtc.options
    (file,) = folder.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700
    assert file.read_bytes() == hashlib.sha256(first).digest() + first
    cubin((8, 9), folder)
    assert nvrtc.compiles == 2


@pytest.mark.parametrize("harm", ["damaged", "cut", "writable by others", "another source"])
def test_code_that_is_damaged_untrusted_or_old_is_compiled_again(
    nvrtc: FakeNvrtc, tmp_path: Path, harm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cubin((9, 0), tmp_path)
    (file,) = tmp_path.iterdir()
    data = file.read_bytes()
    if harm == "writable by others":
        file.chmod(0o666)
    elif harm == "another source":
        other = tmp_path / "other.cu"
        other.write_text("// changed")
        monkeypatch.setattr(module, "SOURCES", (other,))
    else:
        file.write_bytes(data[:-1] + b"!" if harm == "damaged" else data[:40])
    assert cubin((9, 0), tmp_path) == bytes(12)
    assert nvrtc.compiles == 2
    cubin((9, 0), tmp_path)
    assert nvrtc.compiles == 2


def test_a_folder_that_others_can_write_to_is_not_read(nvrtc: FakeNvrtc, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    for compiles in (1, 2):
        assert cubin((9, 0), tmp_path) == bytes(12)
        assert nvrtc.compiles == compiles


def test_a_cache_that_cannot_be_written_is_done_without(nvrtc: FakeNvrtc, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert cubin((9, 0), blocked / "kernels") == bytes(12)
    assert nvrtc.compiles == 1


def test_code_is_kept_in_the_users_cache(nvrtc: FakeNvrtc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cubin((9, 0))
    assert len(list((tmp_path / "latentrt" / "kernels").iterdir())) == 1


@pytest.mark.parametrize(
    ("capability", "sm"), [((7, 5), 75), ((8, 7), 87), ((8, 8), 87), ((9, 0), 90), ((12, 1), 121), ((12, 5), 121)]
)
def test_the_newest_code_that_a_device_runs(
    nvrtc: FakeNvrtc, tmp_path: Path, capability: tuple[int, int], sm: int
) -> None:
    cubin(capability, tmp_path)
    assert f"--gpu-architecture=sm_{sm}".encode() in nvrtc.options


@pytest.mark.parametrize("capability", [(7, 0), (6, 1), (13, 0)])
def test_devices_that_nvrtc_does_not_know(nvrtc: FakeNvrtc, tmp_path: Path, capability: tuple[int, int]) -> None:
    with pytest.raises(BackendError, match=rf"compute capability {capability[0]}\.{capability[1]}"):
        cubin(capability, tmp_path)


def test_a_compiler_that_fails(nvrtc: FakeNvrtc, tmp_path: Path) -> None:
    nvrtc.status = 6
    with pytest.raises(BackendError, match="does not compile"):
        cubin((9, 0), tmp_path)
    assert nvrtc.programs == 0
    assert list(tmp_path.iterdir()) == []


def test_nvrtc_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    module._compiler.cache_clear()
    with pytest.raises(MissingDependencyError, match=re.escape("pip install 'latentrt[cuda]'")):
        cubin((9, 0))
