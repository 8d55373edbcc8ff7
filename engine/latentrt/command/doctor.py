"""Find out what this machine can run, and what to install for the rest."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from latentrt.cuda.driver import DRIVERS
from latentrt.errors import LatentrtError, MissingDependencyError, UntrustedFileError
from latentrt.runtime.machine.cores import usable_cores
from latentrt.runtime.onnxruntime import load_onnxruntime
from latentrt.runtime.tensorrt.library import LIBRARIES, open_library
from latentrt.storage import cache_folder, check_trusted

EXPORT_PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "safetensors",
    "huggingface_hub",
)
BUILD_PACKAGES = ("onnx", "onnx-ir")
CACHES = ("checked", "graphs", "kernels", "plans")  # folders in the user's cache


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing checked: whether it works, and what to type if it does not."""

    what: str
    good: bool
    found: str
    fix: str = ""
    vital: bool = False  # nothing can be drawn without it

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)


def examine() -> list[Finding]:
    """Look at the machine, the libraries and the embedded bundle. Nothing is changed."""
    return [
        *(_machine(), _cache(), _bundle(), _onnxruntime(), _export(), _gpu(), _cuda_provider(), _cuda()),
        *(_tensorrt(name) for name in LIBRARIES),
        _build(),
    ]


def _machine() -> Finding:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, {memory:.0f} GiB"
    threads = f"a call has {usable_cores()} threads"
    return Finding("machine", True, f"{machine}, {threads}, Python {platform.python_version()}")


def _cache() -> Finding:
    """Say how large the caches are, and which of them another user may have written to."""
    what = "the cache"
    try:
        sizes = ", ".join(f"{name} {_bytes(name) / 1e6:,.0f} MB" for name in CACHES)
        for name in CACHES:
            with suppress(FileNotFoundError):
                check_trusted(cache_folder(name))
    except UntrustedFileError as error:
        return Finding(what, False, f"{error.found}, and is not used", error.fix)
    except OSError as error:
        return Finding(what, False, f"it cannot be read ({error})", "point XDG_CACHE_HOME to a folder of your own")
    return Finding(what, True, f"{cache_folder()}: {sizes}")


def empty(caches: Iterable[str]) -> int:
    """Remove what some of CACHES hold; return how many bytes they held. Processes that use them may go on."""
    freed = 0
    for name in caches:
        before = _bytes(name)
        for path in _entries(name):
            with suppress(OSError):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        freed += before - _bytes(name)
    return freed


def _entries(name: str) -> list[Path]:
    with suppress(OSError):
        return list(cache_folder(name).iterdir())
    return []


def _bytes(name: str) -> int:
    return sum(
        path.lstat().st_size
        for entry in _entries(name)
        if not entry.is_symlink()
        for path in (entry, *entry.rglob("*"))
        if path.is_file()
    )


def _bundle() -> Finding:
    what, fix = "the embedded model", "pip install --force-reinstall latentrt"
    try:
        from latentrt.engine import Engine
        from latentrt.golden import TOLERANCE, worst_error

        with Engine.load(cache=False) as engine:
            error = worst_error(engine)
    except LatentrtError as trouble:
        return Finding(what, False, trouble.found, fix, vital=True)
    found = f"hashes match, latents within {error:.0e} of the export's"
    return Finding(what, error <= TOLERANCE, found, fix, vital=True)


def _onnxruntime() -> Finding:
    what = "pictures on the CPU (onnxruntime)"
    try:
        library = load_onnxruntime()
    except MissingDependencyError as error:
        return Finding(what, False, error.found, error.fix, vital=True)
    return Finding(what, True, f"onnxruntime {library.__version__}", vital=True)


def _export() -> Finding:
    return _packages("export and verify", EXPORT_PACKAGES, "pip install 'latentrt[export]'")


def _packages(what: str, packages: Sequence[str], fix: str) -> Finding:
    """Look for packages that are all needed together."""
    found, missing = [], []
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            missing.append(package)
    return Finding(what, not missing, f"missing {', '.join(missing)}" if missing else ", ".join(found), fix)


def _build() -> Finding:
    return _packages("plans from bundles (build)", BUILD_PACKAGES, "pip install 'latentrt[build]'")


def _cuda() -> Finding:
    """Open the device as the engine does, kernels included; NVRTC may be a wheel's or a toolkit's."""
    what = "one launch an image (CUDA)"
    try:
        from latentrt.cuda.gpu import Gpu

        gpu = Gpu()
    except LatentrtError as trouble:
        return Finding(what, False, trouble.found, trouble.fix)
    found = "{}, compute capability {}.{}, CUDA {}".format(gpu.name, *gpu.compute_capability, gpu.driver)
    gpu.close()
    return Finding(what, True, f"{found}; the kernels are loaded")


def _tensorrt(name: str) -> Finding:
    """Import a TensorRT and start it, but only on a driver that works."""
    what = f"pictures by plans ({name})"
    try:
        library = open_library(name)
        if lacking := _driver():
            return Finding(what, False, f"{name} {library.version}, but {lacking}", f"install {DRIVERS}")
        logger = library.logger()  # it must outlive the runtime
        library.runtime(logger)
    except LatentrtError as trouble:
        return Finding(what, False, trouble.found, trouble.fix)
    return Finding(what, True, f"{name} {library.version}")


def _driver() -> str:
    """Return why CUDA's driver cannot be used; empty if it can. Needs neither a Python package nor TensorRT."""
    try:
        status = ctypes.CDLL("libcuda.so.1").cuInit(0)
    except OSError as error:
        return f"there is no CUDA driver ({error})"
    return f"the CUDA driver finds no GPU (cuInit says {status})" if status else ""


def _gpu() -> Finding:
    what, fix = "NVIDIA GPU", "a machine with an NVIDIA GPU and its driver"
    lacking = _driver() or ("" if shutil.which("nvidia-smi") else "there is no nvidia-smi")
    if lacking:
        return Finding(what, False, lacking, fix)
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding(what, False, f"nvidia-smi does not answer ({error})", fix)
    good = answer.returncode == 0 and bool(answer.stdout.strip())
    return Finding(
        what,
        good,
        (answer.stdout if good else answer.stderr or answer.stdout).strip() or "nvidia-smi is silent",
        fix,
    )


def _cuda_provider() -> Finding:
    """Draw with networks on CUDA: a provider that is compiled in may still not find its libraries."""
    what, fix = "pictures on CUDA (onnxruntime-gpu)", "pip uninstall onnxruntime && pip install onnxruntime-gpu"
    try:
        from latentrt.engine import Engine

        with Engine.load(device="cuda", check_hashes=False) as engine:
            engine("", steps=1)
    except LatentrtError as trouble:
        return Finding(what, False, trouble.found, fix if "has only" in trouble.found else trouble.fix)
    return Finding(what, True, "a picture was drawn")
