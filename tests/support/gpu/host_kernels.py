"""The real `advance.cu` compiled as C++ for this CPU, once a session; host_cuda.h says how blocks and barriers run."""

from __future__ import annotations

import atexit
import ctypes
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from latentrt.cuda.kernels import KERNELS
from latentrt.cuda.nvrtc import SOURCES

ENTRY = (
    'extern "C" host::Launch* bind_{name}(void** parameters, unsigned x, unsigned y, unsigned threads)'
    " {{ return host::bind({name}, parameters, x, y, threads); }}\n"
)
# -ffp-contract=off is NVRTC's --fmad=false.
OPTIONS = ("-std=c++20", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")


def compile_host(extra: str = "") -> ctypes.CDLL:
    """Compile advance.cu for this CPU, with an entry for each kernel and some more C++."""
    folder = Path(tempfile.mkdtemp(prefix="latentrt-host-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    shim = Path(__file__).with_name("host_cuda.h")
    entries = "".join(ENTRY.format(name=name) for name in KERNELS)
    (folder / "host.cpp").write_text("".join(f'#include "{path}"\n' for path in (shim, *SOURCES)) + entries + extra)
    subprocess.run(["g++", *OPTIONS, "-o", str(folder / "host.so"), str(folder / "host.cpp")], check=True)
    return ctypes.CDLL(str(folder / "host.so"))


@cache
def host_library() -> ctypes.CDLL:
    """Return the kernels, with the types of their entries."""
    library = compile_host()
    for name in KERNELS:
        entry = getattr(library, f"bind_{name}")
        entry.restype = ctypes.c_void_p
        entry.argtypes = [ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_uint]
    library.run_launch.restype = ctypes.c_bool
    library.run_launch.argtypes = library.free_launch.argtypes = [ctypes.c_void_p]
    return library


class Launch:
    """A kernel with a copy of its arguments, to be run once or again and again."""

    def __init__(self, bind: Any, parameters: int, x: int, y: int, threads: int) -> None:
        self._name, self._library = bind.__name__, host_library()
        self._launch = bind(parameters, x, y, threads)

    def __call__(self) -> None:
        assert self._library.run_launch(self._launch), f"{self._name}: a barrier that not all threads reach"

    def __del__(self) -> None:
        self._library.free_launch(self._launch)
