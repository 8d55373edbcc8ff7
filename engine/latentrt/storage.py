"""latentrt's own files: where caches lie, how a file is written, and which files are trusted as native code."""

from __future__ import annotations

import os
import pwd
import re
import secrets
import shlex
import stat
from contextlib import suppress
from pathlib import Path

from latentrt.errors import UntrustedFileError


def cache_folder(*parts: str) -> Path:
    """Return a folder below `latentrt` in the user's cache: $XDG_CACHE_HOME, or ~/.cache. It need not exist."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return Path(root if os.path.isabs(root) else _home() / ".cache", "latentrt", *parts)


def write_atomic(path: Path, data: bytes | memoryview, mode: int = 0o666) -> None:
    """Write a whole file or none: a reader sees the old one or the new one, and a full disk leaves the old one.

    Args:
        path: the file. Folders that are missing are made.
        data: its bytes.
        mode: permissions of a new file, before the process' umask. A new folder has the same, and can be entered by
            those who may read.

    Raises:
        OSError: it cannot be written; nothing is left beside it.
    """
    path.parent.mkdir(mode=mode | (mode & 0o444) >> 2, parents=True, exist_ok=True)
    part = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}.part")
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def remove_parts(folder: Path) -> None:
    """Remove what `write_atomic` left half-written in a folder when its process was killed.

    Nothing else may be writing there.
    """
    for part in folder.glob(".*.part"):
        if re.fullmatch(r"\..*\.[0-9a-f]{16}\.part", part.name):
            part.unlink(missing_ok=True)


def read_trusted(path: Path) -> bytes:
    """Read a file of native code, if it and its folder are trusted: see `check_trusted`.

    Raises:
        UntrustedFileError: another user may have written it.
        OSError: it cannot be read.
    """
    check_trusted(path.parent)
    with path.open("rb") as file:
        check_trusted(path, os.fstat(file.fileno()))
        return file.read()


def check_trusted(path: Path, status: os.stat_result | None = None) -> None:
    """Refuse a file or folder unless it belongs to this user or to root, and no other user may write to it.

    Args:
        path: the file or folder; a link stands for its target.
        status: of the file where it is open already, so that it cannot be exchanged between check and use.

    Raises:
        UntrustedFileError: another user may have written to it.
        OSError: there is no such file or folder.
    """
    status = path.stat() if status is None else status
    mode, word = stat.S_IMODE(status.st_mode), shlex.quote(str(path))
    if status.st_uid not in (os.getuid(), 0):
        found, command = f"belongs to {_name(status.st_uid)}", f"sudo chown -R root {word}"
    elif mode & (stat.S_IWGRP | stat.S_IWOTH):
        found, command = f"has mode {mode:o}", f"chmod go-w {word}"
    else:
        return
    owners = " or ".join(dict.fromkeys((_name(os.getuid()), "root")))
    raise UntrustedFileError(
        f"{path} {found}",
        needed=f"{owners} as its owner, and no other user who may write to it: it holds native code",
        fix=f"{command}, if you trust all who could write to it; else remove it and build again",
    )


def _home() -> Path:
    """Return the user's home; the root folder for a user that the system does not know, as in some containers."""
    try:
        return Path.home()
    except RuntimeError:
        return Path("/")


def _name(user: int) -> str:
    with suppress(KeyError):
        return pwd.getpwuid(user).pw_name
    return f"user {user}"
