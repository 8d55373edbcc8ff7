"""Pixels as arrays, pictures as files, and what a picture remembers of how it was made.

A picture says three things about itself: all its settings as JSON, so that `read_settings` gives back exactly
what made it; the same in the prose that other tools read; and IPTC's digital source type, which tells
machines that a model made it.

| format    | settings (JSON, ASCII) | prose              | digital source type |
| --------- | ---------------------- | ------------------ | ------------------- |
| PNG       | text chunk "latentrt"  | chunk "parameters" | XMP                 |
| JPEG, WebP| EXIF ImageDescription  | EXIF UserComment   | XMP                 |

PIL writes none of this by itself. The engine's pictures do (`picture.Picture`); `save` here does it for any PIL
image, whole or not at all.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from latentrt.errors import NetworkError, OutputError, RequestError
from latentrt.storage import write_atomic

if TYPE_CHECKING:
    from PIL.Image import Exif, Image
    from PIL.ImageFont import FreeTypeFont, ImageFont

Settings = Mapping[str, object]

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
INFO_KEY = "latentrt"  # where a PIL image carries its settings: image.info[INFO_KEY]

_LOSSY = {"quality": 95, "subsampling": 0}  # 4:4:4, since saturated edges show chroma subsampling first
_GAP = 4
_SLUG_BYTES = 100
_EXIF_IFD, _USER_COMMENT, _IMAGE_DESCRIPTION, _SOFTWARE = 0x8769, 0x9286, 0x010E, 0x0131
_XMP = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/"
 xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" xmp:CreatorTool="latentrt"
 Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"/>
</rdf:RDF></x:xmpmeta>
<?xpacket end="w"?>"""


def to_uint8(x: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    """Decoder output (N, 3, H, W) in [-1, 1] to pixels (N, H, W, 3), rounded half to even as in diffusers.

    Raises:
        NetworkError: another shape, or a number that is not finite (it would show as a black picture).
    """
    if x.ndim != 4 or x.shape[1] != 3:
        raise NetworkError(f"a decoded array of shape {x.shape}", needed="(N, 3, H, W)", fix="check the VAE decoder")
    bad = np.count_nonzero(~np.isfinite(x))
    if bad:
        raise NetworkError(
            f"{bad} of {x.size} decoded numbers are NaN or infinite",
            needed="finite pixels",
            fix="run the VAE decoder in float32: its activations can overflow float16",
        )
    unit = (x.astype(np.float32, copy=False) * np.float32(0.5) + np.float32(0.5)).clip(0, 1)
    return (unit.transpose(0, 2, 3, 1) * np.float32(255)).round().astype(np.uint8)


def from_uint8(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Pixels (N, H, W, 3) to the VAE encoder's input: float32 (N, 3, H, W) in [-1, 1], as diffusers does.

    Raises:
        RequestError: another shape or dtype.
    """
    if pixels.ndim != 4 or pixels.shape[3] != 3 or pixels.dtype != np.uint8:
        raise RequestError(
            f"pixels of shape {pixels.shape} and dtype {pixels.dtype}",
            needed="uint8 of shape (N, H, W, 3)",
            fix='convert pictures first: np.asarray(image.convert("RGB"))[None]',
        )
    unit = pixels.transpose(0, 3, 1, 2).astype(np.float32, order="C") / np.float32(255)
    return np.float32(2) * unit - np.float32(1)


def to_pil(pixels: NDArray[np.uint8]) -> list[Image]:
    """Pixels (N, H, W, 3) to N PIL images."""
    from PIL import Image

    return [Image.fromarray(picture) for picture in pixels]


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
    """The bytes of the file that `save` writes; same arguments and errors, `suffix` like ".png"."""
    kind = FORMATS.get(suffix.lower())
    if kind is None:
        raise OutputError(
            f"picture format {suffix!r}", needed=f"one of {', '.join(FORMATS)}", fix="name the file with such a suffix"
        )
    buffer = BytesIO()
    try:
        settings = _own_settings(image) if settings is None else settings
        image.save(buffer, kind, **metadata(kind, settings, image.size))
    except (OSError, TypeError, ValueError) as error:
        raise OutputError(
            f"a {image.mode} picture with these settings cannot be {kind} ({error})",
            needed="an RGB picture, settings of JSON values and Unicode text; JPEG holds at most 64 KiB of them",
            fix="correct the settings, or save as .png",
        ) from error
    return buffer.getvalue()


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings that `save` wrote into a picture.

    Raises:
        RequestError: not a picture, or not one of ours.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            text = image.info.get(INFO_KEY) or image.getexif().get(_IMAGE_DESCRIPTION)
        settings = json.loads(text or "")
        if not isinstance(settings, dict):
            raise TypeError("the settings are no JSON object")
    except (OSError, TypeError, ValueError) as error:
        raise RequestError(
            f"{path} has no settings to read ({error})",
            needed="a picture saved by latentrt, with its metadata",
            fix="use the original file: editors and chat services strip metadata",
        ) from error
    return settings


def grid(images: Sequence[Image], columns: int | None = None, captions: Sequence[str] = ()) -> Image:
    """A contact sheet, row by row, with white gaps of 4 px; each caption is cut to its tile's width.

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


def _own_settings(image: Image) -> Settings:
    """What the picture carries: a dict from the engine, or text if PIL read it from a PNG of ours."""
    carried: str | Settings = image.info.get(INFO_KEY, {})
    own: Settings = json.loads(carried) if isinstance(carried, str) else carried
    return own


def metadata(kind: str, settings: Settings, size: tuple[int, int]) -> dict[str, Any]:
    """Keyword arguments for PIL's `save` in a format of FORMATS; without settings only the digital source type."""
    from PIL.PngImagePlugin import PngInfo

    # ASCII with escapes: PNG text and EXIF each have their own idea of Unicode, JSON needs neither.
    texts = (json.dumps(dict(settings), allow_nan=False), prose(settings, size)) if settings else None
    if kind == "PNG":
        info = PngInfo()
        if texts:
            info.add_text("parameters", texts[1])
            info.add_text(INFO_KEY, texts[0])
        info.add_itxt("XML:com.adobe.xmp", _XMP)
        return {"pnginfo": info}
    return {**_LOSSY, "xmp": _XMP.encode(), "exif": _exif(*texts) if texts else b""}


def _exif(description: str, comment: str) -> Exif:
    from PIL import Image

    exif = Image.Exif()
    exif[_IMAGE_DESCRIPTION] = description
    exif[_SOFTWARE] = "latentrt"
    exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = b"UNICODE\0" + comment.encode("utf-16-be")
    return exif


def prose(settings: Settings, size: tuple[int, int]) -> str:
    """The text that AUTOMATIC1111's web UI writes and that galleries read: prompt, negative prompt, facts.

    The format cannot tell a prompt's own line "Negative prompt: ..." from the real one; the JSON can.
    """
    noise = str(settings.get("noise", "")).partition(":")[0]
    facts = {
        "Steps": settings.get("steps"),
        "Sampler": settings.get("solver"),
        "CFG scale": settings.get("guidance"),
        "Seed": settings.get("seed"),
        "Size": f"{size[0]}x{size[1]}",
        "Model": settings.get("model"),
        "Denoising strength": settings.get("strength"),
        "RNG": {"torch-cpu": "CPU", "torch-cuda": "NV"}.get(noise),
    }
    lines = [str(settings.get("prompt", ""))]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    lines.append(", ".join(f"{name}: {_quoted(fact)}" for name, fact in facts.items() if fact is not None))
    return "\n".join(lines)


def _quoted(fact: object) -> str:
    text = str(fact)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(',:\n"') else text


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
    """The text on one line, or as much of it as fits the width, with dots."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."


def _slug(text: str) -> str:
    """Letters, marks and digits of any script; everything else, separators and dots too, becomes a hyphen."""
    kept = (c if unicodedata.category(c)[0] in "LMN" else " " for c in unicodedata.normalize("NFC", text))
    slug = "-".join("".join(kept).split())
    return slug.encode()[:_SLUG_BYTES].decode(errors="ignore").rstrip("-") or "untitled"
