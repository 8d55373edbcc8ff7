"""The engine's results: PIL images whose own `save` keeps how they were made."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from latentrt.images.files import FORMATS
from latentrt.images.metadata import INFO_KEY, Settings, metadata
from latentrt.images.pixels import to_pil

Target = str | bytes | os.PathLike[str] | os.PathLike[bytes] | IO[bytes]


class Picture(Image.Image):
    """A PIL image that knows its settings (`info["latentrt"]`) and writes them wherever PNG, JPEG or WebP is saved."""

    @classmethod
    def of(cls, pixels: NDArray[np.uint8], settings: Settings) -> Picture:
        """Return a picture of pixels (H, W, channels)."""
        image = to_pil(pixels)
        image.__class__ = cls  # PIL has no public way to make a subclass of pixels
        assert isinstance(image, Picture)
        image.info[INFO_KEY] = settings
        return image

    def save(self, fp: Target, format: str | None = None, **params: Any) -> None:
        """Save as PIL does, with the metadata of `metadata.py`; arguments given here have precedence."""
        kind = format.upper() if format else FORMATS.get(_suffix(fp), "")
        own = metadata(kind, self.info[INFO_KEY], self.size) if kind in FORMATS.values() else {}
        super().save(fp, format, **{**own, **params})


def _suffix(target: Target) -> str:
    return Path(os.fsdecode(target)).suffix.lower() if isinstance(target, str | bytes | os.PathLike) else ""
