"""Structures are the same in Python, on the device and in the emulation, which notices uneven barriers."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from latentrt.cuda import kernels, nvrtc
from latentrt.cuda.kernels import PROGRESS, ROW_COLUMNS, SLOT
from tests.support.gpu.host_kernels import compile_host


def layout_checks(place: str) -> str:
    """Return C++ that compiles only if the structures are those of kernels.py; `place` is a field's offset."""
    names = [name for name, _ in kernels._State._fields_]
    state = np.dtype([(name, np.uint64 if name in kernels._POINTERS else np.int32) for name in names], align=True)
    row = np.dtype([*((name, np.float32) for name in ROW_COLUMNS[:8]), ("b", np.float32, 4)])
    row = np.dtype([*row.descr, *((name, np.float32) for name in ROW_COLUMNS[12:])])
    structures = {"State<half>": state, "State<float>": state, "Slot": SLOT, "Progress": PROGRESS, "Row": row}
    assert state.itemsize == ctypes.sizeof(kernels._State)
    checks = "".join(f'static_assert(sizeof({name}) == {d.itemsize}, "");\n' for name, d in structures.items())
    for name, dtype in structures.items():
        for field, (_, offset, *_) in (dtype.fields or {}).items():
            checks += f'static_assert({place.format(name, field)} == {offset}, "");\n'
    return checks


def test_structures_agree_on_the_host() -> None:
    compile_host(layout_checks("__builtin_offsetof({}, {})"))


def test_structures_agree_on_the_device() -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    checks = layout_checks("__INTADDR__(&(({}*)0)->{})")  # how NVRTC's front end spells offsetof
    nvrtc.compiled(nvrtc.whole_source() + checks.encode(), ("--gpu-architecture=sm_90", "--std=c++17"))


def test_the_emulation_notices_a_barrier_that_not_all_threads_reach() -> None:
    library = compile_host(
        "static void uneven() { if (threadIdx.x == 1) __syncthreads(); }\n"
        'extern "C" bool run_uneven() { return host::Launch{{1, 1}, 2, uneven}.run(); }\n'
    )
    library.run_uneven.restype = ctypes.c_bool
    assert not library.run_uneven()
