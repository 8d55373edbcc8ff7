"""Contact sheets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from latentrt.errors import RequestError

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont, ImageFont

_GAP = 4


def grid(images: Sequence[Image], columns: int | None = None, captions: Sequence[str] = ()) -> Image:
    """Return a contact sheet, row by row, with white gaps of 4 px; each caption is cut to its tile's width.

    Args:
        images: pictures of one size.
        columns: tiles per row; as near to a square as possible if None.
        captions: drawn under the tiles, one for each picture, or none at all.

    Raises:
        RequestError: no pictures, different sizes, another number of captions, no column.
    """
    from PIL import Image, ImageDraw, ImageFont

    columns = math.ceil(math.sqrt(len(images))) if columns is None else columns
    _check_grid(images, columns, captions)
    width, height = images[0].size
    font = ImageFont.load_default(max(10, width // 12))
    strip = math.ceil(font.getbbox("Agjy|")[3]) if captions else 0
    rows = -(-len(images) // columns)
    size = (columns * (width + _GAP) - _GAP, rows * (height + strip + _GAP) - _GAP)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for index, image in enumerate(images):
        left, top = index % columns * (width + _GAP), index // columns * (height + strip + _GAP)
        sheet.paste(image, (left, top))
        if captions:
            draw.text((left, top + height), _fitting(captions[index], font, width), "black", font)
    return sheet


def _check_grid(images: Sequence[Image], columns: int, captions: Sequence[str]) -> None:
    sizes = sorted({image.size for image in images})
    if len(sizes) != 1:
        raise RequestError(
            f"a grid of pictures of sizes {sizes}", needed="pictures of one size", fix="resize them first"
        )
    if columns < 1:
        raise RequestError(f"a grid of {columns} columns", needed="at least one", fix="pass another number of columns")
    if captions and len(captions) != len(images):
        raise RequestError(
            f"{len(captions)} captions for {len(images)} pictures", needed="one for each", fix="pass as many captions"
        )


def _fitting(text: str, font: ImageFont | FreeTypeFont, width: int) -> str:
    """Return the text on one line, or as much of it as fits the width, with dots."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."
