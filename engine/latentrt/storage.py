"""Files of our own: where caches lie, and how a file is written."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path


def cache_folder(*parts: str) -> Path:
    """Return a folder below `latentrt` in the user's cache: $XDG_CACHE_HOME, or ~/.cache. It need not exist."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return Path(root if os.path.isabs(root) else Path.home() / ".cache", "latentrt", *parts)


def write_atomic(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write a whole file or none: a reader sees the old one or the new one, and a full disk leaves the old one.

    Folders that are missing are made.

    Args:
        path: the file.
        data: its bytes.
        mode: permissions of a new file, before the process' umask.

    Raises:
        OSError: it cannot be written; nothing is left beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}.part")
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def is_ours(path: Path) -> bool:
    """Return whether this user owns a file or folder and nobody else may write to it. Raise OSError as `stat`."""
    status = path.stat()
    return status.st_uid == os.getuid() and not stat.S_IMODE(status.st_mode) & 0o022
