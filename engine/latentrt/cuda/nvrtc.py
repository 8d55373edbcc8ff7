"""Compile `advance.cu` to native code by NVRTC, and keep that code on the disk.

NVRTC needs no GPU and no toolkit. It takes half a second.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from latentrt.errors import BackendError, MissingDependencyError, UntrustedFileError
from latentrt.storage import cache_folder, read_trusted, write_atomic

SOURCES = tuple(Path(__file__).with_name(name) for name in ("noise.cu", "advance.cu"))  # compiled as one
OPTIONS = ("--std=c++17", "--fmad=false")  # without contraction a row has the same bits as in numpy


def cubin(compute_capability: tuple[int, int], folder: Path | None = None) -> bytes:
    """Return the kernels as native code, compiled on the first call and then read from the disk.

    Args:
        compute_capability: of the device, as (9, 0).
        folder: where they are kept; None is `kernels` in the user's cache. Where it cannot be written, or another user
            may have written to it, the kernels are compiled at each call.

    Raises:
        MissingDependencyError: no NVRTC.
        BackendError: NVRTC cannot compile for the device.
    """
    nvrtc = _compiler()
    version = _checked(nvrtc, nvrtc.nvrtcVersion())
    options = (f"--gpu-architecture=sm_{_architecture(nvrtc, version, compute_capability)}", *OPTIONS)
    source = whole_source()
    key = hashlib.sha256(repr((source, options, version)).encode()).hexdigest()
    path = (folder or cache_folder("kernels")) / f"{key}.cubin"
    with suppress(OSError, UntrustedFileError):
        data = read_trusted(path)
        digest, code = data[:32], data[32:]
        if digest == hashlib.sha256(code).digest():  # not damaged
            return code
    code, _ = compiled(source, options)
    with suppress(OSError):
        write_atomic(path, hashlib.sha256(code).digest() + code, 0o600)
    return code


def whole_source() -> bytes:
    """Return the text of all kernels."""
    return b"\n".join(path.read_bytes() for path in SOURCES)


def compiled(source: bytes, options: Sequence[str]) -> tuple[bytes, str]:
    """Compile by NVRTC; return the cubin and the compiler's log.

    Raises:
        MissingDependencyError: no NVRTC.
        BackendError: the source does not compile.
    """
    nvrtc = _compiler()
    program = _checked(nvrtc, nvrtc.nvrtcCreateProgram(source, SOURCES[-1].name.encode(), 0, [], []))
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
    """Return what an NVRTC function returned besides its status: nothing, one value or a tuple."""
    status, *values = answer
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise BackendError(f"NVRTC says {status}", needed="NVRTC 12 or 13", fix="pip install -U 'latentrt[cuda]'")
    return values[0] if len(values) == 1 else tuple(values)


def _architecture(nvrtc: Any, version: tuple[int, int], compute_capability: tuple[int, int]) -> int:
    """Return the newest architecture that NVRTC knows and the device runs: its own, or an older one of its family."""
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
