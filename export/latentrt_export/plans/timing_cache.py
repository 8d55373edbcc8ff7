"""Timings of tactics that TensorRT measured, kept for the next build on the same GPU with the same library.

TensorRT checks that a cache is its own device's. The file must be this user's: the builder reads it in native code.
TensorRT-RTX measures nothing while it builds, and has no use for one.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Any

from latentrt.errors import UntrustedFileError
from latentrt.runtime.tensorrt.library import Library
from latentrt.runtime.tensorrt.record import PlanKey
from latentrt.storage import cache_folder, read_trusted, write_atomic


def load(library: Library, config: Any, key: PlanKey) -> Any:
    """Set the builder's config to the cache of its key, or to an empty one, and return the cache; None for RTX."""
    if library.rtx:
        return None
    data = b""
    with suppress(OSError, UntrustedFileError):
        data = read_trusted(path_of(key))
    cache = config.create_timing_cache(data)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def save(cache: Any, key: PlanKey) -> None:
    """Save a cache after a build; do nothing where it cannot be written."""
    if cache is not None:
        with suppress(OSError):
            write_atomic(path_of(key), memoryview(cache.serialize()), 0o600)


def path_of(key: PlanKey) -> Path:
    """Return the cache's file: one for each library, version, GPU and driver."""
    name = hashlib.sha256("\n".join((key.gpu, key.compute_capability, key.driver)).encode()).hexdigest()[:16]
    return cache_folder("timing") / f"{key.library}-{key.version}-{name}.cache"
