"""A bundle and its checkpoint, opened."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from latentrt import Engine
from latentrt_export.checkpoint.source import open_checkpoint
from latentrt_export.verify.reference import plain_folder


@contextmanager
def opened(exported: Callable[[str], tuple[Path, Path]], name: str) -> Iterator[tuple[Engine, Path]]:
    """Yield our engine, and the checkpoint as diffusers opens it."""
    source, bundle = exported(name)
    with (
        plain_folder(open_checkpoint(source)) as folder,
        Engine.load(bundle, threads=1, check_hashes=False) as engine,
    ):
        yield engine, folder
