"""Pictures as files, written whole or not at all, and the names that patterns give them."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING

from latentrt.errors import OutputError
from latentrt.images.metadata import Settings, metadata, settings_of
from latentrt.storage import write_atomic

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_SLUG_BYTES = 100


def save(image: Image, path: str | Path, *, settings: Settings | None = None) -> Path:
    """Write a picture with its metadata, whole or not at all; folders are made as needed.

    Args:
        image: the picture.
        path: where; the suffix chooses the format (`FORMATS`).
        settings: what made it, as JSON values; `image.info["latentrt"]` if None.

    Returns:
        The path.

    Raises:
        OutputError: unknown suffix, settings that JSON or the format cannot hold, full disk, no permission.
    """
    path = Path(path)
    data = encode(image, path.suffix, settings=settings)
    try:
        write_atomic(path, data)
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written ({error.strerror or error})",
            needed=f"a folder that takes {len(data)} bytes",
            fix="free some space or choose another path",
        ) from error
    return path


def encode(image: Image, suffix: str, *, settings: Settings | None = None) -> bytes:
    """Return the bytes of the file that `save` writes; same arguments and errors, `suffix` like ".png"."""
    kind = FORMATS.get(suffix.lower())
    if kind is None:
        raise OutputError(
            f"picture format {suffix!r}", needed=f"one of {', '.join(FORMATS)}", fix="name the file with such a suffix"
        )
    buffer = BytesIO()
    try:
        settings = settings_of(image) if settings is None else settings
        image.save(buffer, kind, **metadata(kind, settings, image.size))
    except (OSError, TypeError, ValueError) as error:
        raise OutputError(
            f"a {image.mode} picture with these settings cannot be {kind} ({error})",
            needed="an RGB picture, settings of JSON values and Unicode text; JPEG holds at most 64 KiB of them",
            fix="correct the settings, or save as .png",
        ) from error
    return buffer.getvalue()


def output_path(pattern: str, values: Mapping[str, object]) -> Path:
    """Fill a pattern such as "out/{seed}-{index:03d}-{prompt}.png".

    Fields are Python's format fields. Numbers are formatted as they are; any other value becomes a slug of
    letters, digits and hyphens, at most 100 bytes long, so that no value can leave the pattern's folder.

    Raises:
        OutputError: malformed pattern, unknown field, or a format that does not suit its value.
    """
    formatter = Formatter()
    parts = []
    try:
        for literal, field, spec, conversion in formatter.parse(pattern):
            parts.append(literal)
            if field is not None:
                value = formatter.convert_field(values[field], conversion)
                parts.append(format(value if isinstance(value, int | float) else _slug(str(value)), spec or ""))
    except KeyError as error:
        raise OutputError(
            f"the pattern {pattern!r} has the unknown field {error}",
            needed=f"fields among {', '.join(values)}",
            fix="change the pattern",
        ) from error
    except ValueError as error:
        raise OutputError(
            f"the pattern {pattern!r} cannot be filled ({error})",
            needed='a pattern such as "out/{seed}-{prompt}.png"',
            fix="change the pattern",
        ) from error
    return Path("".join(parts))


def _slug(text: str) -> str:
    """Return the text with every character but letters, marks and digits of any script replaced by a hyphen."""
    kept = (c if unicodedata.category(c)[0] in "LMN" else " " for c in unicodedata.normalize("NFC", text))
    slug = "-".join("".join(kept).split())
    return slug.encode()[:_SLUG_BYTES].decode(errors="ignore").rstrip("-") or "untitled"
