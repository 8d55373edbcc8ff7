"""Put a new bundle in its place whole, or not at all.

The bundle is made beside its place, under another name, and put there by renaming: an interrupted export leaves
the old bundle whole. The next export cleans up after one that was killed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from latentrt.bundle.bundle import MANIFEST, read_manifest
from latentrt.errors import BundleError, LatentrtError, OutputError


@contextmanager
def place(target: Path, source: Path, size: int, *, overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder to write a bundle of about `size` bytes to; it becomes `target` if the block succeeds.

    Args:
        target: where the bundle goes. Where it is `source`, files that no bundle lists stay.
        source: the checkpoint's folder.
        size: bytes that will be written.
        overwrite: replace the existing bundle, or add to the checkpoint.

    Raises:
        OutputError: the target exists and may not be replaced, cannot be written, has no room, or another export
            is writing to it.
    """
    target = target.resolve()
    new, old = _new(target), _old(target)
    try:
        with _alone(target):
            _clean_up(target)
            _check(target, source.resolve(), size, overwrite)
            new.mkdir()
            try:
                yield new
                if target == source.resolve():
                    _keep_others(target, new)
                _swap(new, target, old)
            finally:
                shutil.rmtree(new, ignore_errors=True)
    except LatentrtError:
        raise
    except OSError as error:
        raise OutputError(f"{target} cannot be written ({error})", needed="a writable place with room") from error


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Hold the lock file beside `target`; the system releases it when the process is killed."""
    lock = target.with_name(f".{target.name}.latentrt-lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                raise BlockingIOError  # its owner ended, and another export began, since it was opened
        except (BlockingIOError, FileNotFoundError) as error:
            raise OutputError(
                f"another export is writing to {target}",
                needed="one export at a time",
                fix="wait, or choose another target",
            ) from error
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _new(target: Path) -> Path:
    return target.with_name(f".{target.name}.latentrt-new")


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.latentrt-old")


def _clean_up(target: Path) -> None:
    """Clean up after an export that was killed: remove half a new bundle, move back a bundle that was moved aside."""
    new, old = _new(target), _old(target)
    shutil.rmtree(new, ignore_errors=True)
    if old.exists() and not target.exists():
        old.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _check(target: Path, source: Path, size: int, overwrite: bool) -> None:
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        bundle = _is_bundle(target)
        if target != source and not bundle:
            raise OutputError(f"{target} exists and is not a bundle", needed="a new place, or a bundle")
        if not bundle and (target / MANIFEST).exists():
            raise OutputError(f"{target / MANIFEST} is not latentrt's", needed="a checkpoint without one")
        what = "the checkpoint itself" if target == source else "a bundle"
        if not overwrite:
            raise OutputError(
                f"{target} is {what}",
                needed="permission to replace it",
                fix="add --overwrite, or choose another target",
            )
        if target in source.parents:
            raise OutputError(f"{target} holds the checkpoint {source}", needed="a place beside it")
    home = next(parent for parent in target.parents if parent.exists())
    free = shutil.disk_usage(home).free
    if free < size:
        raise OutputError(
            f"{home} has {free / 1e6:.0f} MB free",
            needed=f"{size / 1e6:.0f} MB",
            fix="make room, or choose another target",
        )


def _is_bundle(folder: Path) -> bool:
    """Return whether the folder's manifest is one of latentrt's; many other things have a manifest.json."""
    try:
        read_manifest(folder)
    except BundleError:
        return False
    return True


def _keep_others(target: Path, new: Path) -> None:
    """Carry over a checkpoint's files that belong to no bundle, by links: the old names are removed right after."""
    listed = read_manifest(target)["files"] if _is_bundle(target) else {}
    for path in [p for p in target.rglob("*") if p.is_file()]:
        name = path.relative_to(target)
        if name.as_posix() not in listed and not (new / name).exists():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, new / name, follow_symlinks=False)
            except OSError:  # a file system without links
                shutil.copy2(path, new / name, follow_symlinks=False)


def _swap(new: Path, target: Path, old: Path) -> None:
    """Put `new` in the place of `target`. Between the two renames only `old` exists: `_clean_up` restores it."""
    if target.exists():
        target.rename(old)
    try:
        new.rename(target)
    except BaseException:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
