"""How pictures are brought to the size of a run: stretched, or with their proportions kept.

Sources of the definitions: "Just resize", "Crop and resize" and "Resize and fill" of AUTOMATIC1111's web UI, which are
diffusers' `VaeImageProcessor.resize` with "default", "crop" and "fill".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from latentrt.errors import RequestError

if TYPE_CHECKING:
    from PIL.Image import Image

Size = tuple[int, int]  # width, height
MOST = 100  # times as narrow or wide as the run may a picture be whose proportions are kept


def check_proportions(picture: Image, size: Size, name: str = "picture") -> None:
    """Refuse a strip: at another size, with its proportions kept, it would outgrow the memory. Raise RequestError."""
    wide, high = picture.width * size[1], picture.height * size[0]
    if max(wide, high) > MOST * min(wide, high):
        found = f"the {name} is {picture.width}x{picture.height}, and brought to {size[0]}x{size[1]}"
        raise RequestError(found, needed=f"one at most {MOST} times as narrow or wide", fix="crop it")


def resized(picture: Image, size: Size, way: str = "stretch") -> Image:
    """Return a picture at another size; `way` is one of `latentrt.request.RESIZES`.

    Raises:
        RequestError: as of `check_proportions`, where they are kept.
    """
    from PIL import Image

    if way == "crop":
        return covering(picture, size)
    return fitted(picture, size) if way == "fill" else picture.resize(size, Image.Resampling.LANCZOS)


def covering(picture: Image, size: Size) -> Image:
    """Return the middle of a picture at another size, with its proportions kept. Raise as `check_proportions`."""
    from PIL import Image

    check_proportions(picture, size)
    width, height = size
    outer = max(width, picture.width * height // picture.height), max(height, picture.height * width // picture.width)
    left, top = outer[0] // 2 - width // 2, outer[1] // 2 - height // 2
    return picture.resize(outer, Image.Resampling.LANCZOS).crop((left, top, left + width, top + height))


def fitted(picture: Image, size: Size) -> Image:
    """Return a picture at another size, with its proportions kept. What is left at two sides continues its edges.

    Each band is a bicubic resize of the edge alone, a box without area: 9/8 of the outermost pixels less 1/8 of the
    next ones. Raise as `check_proportions`.
    """
    from PIL import Image

    check_proportions(picture, size)
    width, height = size
    inner = min(width, picture.width * height // picture.height), min(height, picture.height * width // picture.width)
    inner = max(inner[0], 1), max(inner[1], 1)
    middle = picture.resize(inner, Image.Resampling.LANCZOS)
    left, top = width // 2 - inner[0] // 2, height // 2 - inner[1] // 2
    whole = Image.new(picture.mode, size)
    whole.paste(middle, (left, top))
    for edge in (0, inner[1]) if top else ():
        band = middle.resize((width, top), Image.Resampling.BICUBIC, (0, edge, width, edge))
        whole.paste(band, (0, edge and top + edge))
    for edge in (0, inner[0]) if left else ():
        band = middle.resize((left, height), Image.Resampling.BICUBIC, (edge, 0, edge, height))
        whole.paste(band, (edge and left + edge, 0))
    return whole
