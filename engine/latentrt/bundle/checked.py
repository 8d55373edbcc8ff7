"""Bundles whose hashes were checked before, noted in the user's cache, so that gigabytes are not read at every start.

A note has each file's device, inode, size, and times of its content and of its inode. The system sets the last one at
every change, and no program can set it: a file with the same note is the one that was hashed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from latentrt.errors import UntrustedFileError
from latentrt.storage import cache_folder, check_trusted, read_trusted, write_atomic

LEAST_BYTES = 2**28  # of a bundle; a smaller one is hashed within a moment
States = Mapping[str, list[int]]


def states_of(paths: Mapping[str, Path]) -> States:
    """Return what a note has of each file. Take it before the files are hashed."""
    return {name: _state(path.stat()) for name, path in paths.items()}


def was_checked(root: Path, states: States, sha256s: Mapping[str, str]) -> bool:
    """Return whether there is a note of just these files with just these hashes, which no other user can have made."""
    place = _place(root)
    if sum(state[2] for state in states.values()) < LEAST_BYTES or not os.path.exists(place):
        return False
    with suppress(OSError, ValueError, UntrustedFileError):
        return bool(json.loads(read_trusted(place)) == _note(states, sha256s))
    return False


def remember(root: Path, states: States, sha256s: Mapping[str, str]) -> None:
    """Note that files had these hashes; nothing where the cache cannot be written."""
    place = _place(root)
    if sum(state[2] for state in states.values()) < LEAST_BYTES:
        return
    with suppress(OSError, UntrustedFileError):
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_trusted(place.parent)
        write_atomic(place, json.dumps(_note(states, sha256s)).encode(), 0o600)


def _place(root: Path) -> Path:
    return cache_folder("checked") / f"{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()}.json"


def _note(states: States, sha256s: Mapping[str, str]) -> dict[str, list[int | str]]:
    return {name: [*state, sha256s[name]] for name, state in states.items()}


def _state(status: os.stat_result) -> list[int]:
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
