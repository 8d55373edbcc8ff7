"""What TensorRT measured while it chose tactics, kept for the next build on the same GPU with the same library.

TensorRT checks that a cache is its own device's. The files are private: the builder reads them in native code.
TensorRT-RTX measures nothing while it builds, and has no use for one.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from latentrt.runtime.tensorrt.library import Library
from latentrt.runtime.tensorrt.record import PlanKey


def load(library: Library, config: Any, key: PlanKey) -> Any:
    """Give the builder's config the cache of its key, or an empty one where there is none that fits; None for RTX."""
    if library.rtx:
        return None
    cache = config.create_timing_cache(_read(path_of(key)))
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def save(cache: Any, key: PlanKey) -> None:
    """Keep a cache after a build. One that cannot be written is done without."""
    if cache is None:
        return
    path = path_of(key)
    part = path.with_suffix(f".{os.getpid()}.part")
    with suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        part.unlink(missing_ok=True)
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(memoryview(cache.serialize()))
        part.replace(path)


def path_of(key: PlanKey) -> Path:
    """The cache's file: one for each library, version, GPU and driver."""
    root = os.environ.get("XDG_CACHE_HOME")
    folder = Path(root if root and os.path.isabs(root) else Path.home() / ".cache") / "latentrt" / "timing"
    name = hashlib.sha256("\n".join((key.gpu, key.compute_capability, key.driver)).encode()).hexdigest()[:16]
    return folder / f"{key.library}-{key.version}-{name}.cache"


def _read(path: Path) -> bytes:
    """The file's bytes; none where it is not there or somebody else could have written it."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            return b"" if status.st_uid != os.getuid() or status.st_mode & 0o022 else file.read()
    except OSError:
        return b""
