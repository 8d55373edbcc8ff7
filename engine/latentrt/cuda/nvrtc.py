"""`advance.cu` to native code by NVRTC, and that code kept on the disk.

NVRTC needs no GPU and no toolkit: half a second here for a GPU that is elsewhere.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from latentrt.errors import BackendError, MissingDependencyError

SOURCE = Path(__file__).with_name("advance.cu")
OPTIONS = ("--std=c++17", "--fmad=false")  # without contraction a row has the same bits as in numpy


def cubin(compute_capability: tuple[int, int], folder: Path | None = None) -> bytes:
    """The kernels as native code, compiled on the first call and then read from the disk.

    Args:
        compute_capability: of the device, as (9, 0).
        folder: where they are kept, readable for the user alone: they are native code. Default: `latentrt/kernels` in
            $XDG_CACHE_HOME or ~/.cache. One that cannot be written is done without.

    Raises:
        MissingDependencyError: no NVRTC.
        BackendError: NVRTC cannot compile for the device.
    """
    nvrtc = _compiler()
    version = _checked(nvrtc, nvrtc.nvrtcVersion())
    options = (f"--gpu-architecture=sm_{_architecture(nvrtc, version, compute_capability)}", *OPTIONS)
    source = SOURCE.read_bytes()
    key = hashlib.sha256(repr((source, options, version)).encode()).hexdigest()
    path = (folder or _cache_folder()) / f"{key}.cubin"
    code = _read(path)
    if code is None:
        code, _ = compiled(source, options)
        with suppress(OSError):
            _write(path, code)
    return code


def compiled(source: bytes, options: Sequence[str]) -> tuple[bytes, str]:
    """Compile by NVRTC: the cubin, and what the compiler said.

    Raises:
        MissingDependencyError: no NVRTC.
        BackendError: it does not compile.
    """
    nvrtc = _compiler()
    program = _checked(nvrtc, nvrtc.nvrtcCreateProgram(source, SOURCE.name.encode(), 0, [], []))
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        log = _text(nvrtc, program)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise BackendError(
                f"advance.cu does not compile: {log}", needed="NVRTC 12 or 13", fix="pip install -U 'latentrt[cuda]'"
            )
        code = bytes(_checked(nvrtc, nvrtc.nvrtcGetCUBINSize(program)))
        _checked(nvrtc, nvrtc.nvrtcGetCUBIN(program, code))
        return code, log
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _text(nvrtc: Any, program: Any) -> str:
    log = bytes(_checked(nvrtc, nvrtc.nvrtcGetProgramLogSize(program)))
    _checked(nvrtc, nvrtc.nvrtcGetProgramLog(program, log))
    return log.rstrip(b"\0").decode(errors="replace").strip()


@cache
def _compiler() -> Any:
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()  # loads the library itself
    except (ImportError, OSError, RuntimeError) as error:
        raise MissingDependencyError(
            f"NVRTC, CUDA's compiler of kernels, cannot be loaded ({error})",
            needed="cuda-bindings 12.6 or newer and libnvrtc",
            fix="pip install 'latentrt[cuda]'",
        ) from error
    return nvrtc


def _checked(nvrtc: Any, answer: tuple[Any, ...]) -> Any:
    """What an NVRTC function returned besides its status: nothing, one value or a tuple."""
    status, *values = answer
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise BackendError(f"NVRTC says {status}", needed="NVRTC 12 or 13", fix="pip install -U 'latentrt[cuda]'")
    return values[0] if len(values) == 1 else tuple(values)


def _architecture(nvrtc: Any, version: tuple[int, int], compute_capability: tuple[int, int]) -> int:
    """The newest architecture that NVRTC knows and the device runs: its own, or an older one of the same family."""
    own = 10 * compute_capability[0] + compute_capability[1]
    known = _checked(nvrtc, nvrtc.nvrtcGetSupportedArchs())
    usable = [sm for sm in known if own // 10 == sm // 10 and sm <= own]
    if not usable:
        raise BackendError(
            f"the GPU has compute capability {own / 10} and NVRTC {version[0]}.{version[1]} compiles for {known}",
            needed="an NVRTC that knows the GPU",
            fix="pip install -U 'latentrt[cuda]', or for GPUs older than CUDA 13's: nvidia-cuda-nvrtc-cu12",
        )
    return int(max(usable))


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return Path(root if root and os.path.isabs(root) else Path.home() / ".cache") / "latentrt" / "kernels"


def _read(path: Path) -> bytes | None:
    """The code in a file of ours; None where there is none, it is damaged, or somebody else may have written it."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            data = file.read()
    except OSError:
        return None
    digest, code = data[:32], data[32:]
    ours = status.st_uid == os.getuid() and not status.st_mode & 0o022
    return code if ours and digest == hashlib.sha256(code).digest() else None


def _write(path: Path, code: bytes) -> None:
    """Write beside, then rename: a reader sees the whole file or none."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(hashlib.sha256(code).digest() + code)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
