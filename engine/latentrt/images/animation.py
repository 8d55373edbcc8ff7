"""Animations: frames in one file, as GIF, WebP or APNG."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from latentrt.errors import OutputError
from latentrt.storage import write_atomic

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = {".gif": "GIF", ".webp": "WEBP", ".png": "PNG"}
MILLISECONDS, LAST_MILLISECONDS = 80, 2000  # that a frame is shown


def save_animation(frames: Sequence[Image], path: Path) -> Path:
    """Write frames of one size, whole or not at all; the last one is shown longest, then it starts again.

    Raises:
        OutputError: full disk, no permission.
    """
    buffer = BytesIO()
    first, *others = frames
    shown = [MILLISECONDS] * len(others) + [LAST_MILLISECONDS]
    # GIF's palettes are made for each frame; without `disposal` PIL draws only what changed.
    first.save(
        buffer, FORMATS[path.suffix.lower()], save_all=True, append_images=others, duration=shown, loop=0, quality=90
    )
    try:
        write_atomic(path, buffer.getvalue())
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written ({error.strerror or error})", needed=f"room for {len(buffer.getvalue())} bytes"
        ) from error
    return path
