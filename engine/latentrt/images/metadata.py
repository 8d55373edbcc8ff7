"""Metadata in a picture's file that says how it was made.

A file holds three things: all settings as JSON, so that `read_settings` returns exactly what made the picture; the
same in the text format that other tools read; and IPTC's digital source type, which tells machines that a model
made it.

| format    | settings (JSON, ASCII) | prose              | digital source type |
| --------- | ---------------------- | ------------------ | ------------------- |
| PNG       | text chunk "latentrt"  | chunk "parameters" | XMP                 |
| JPEG, WebP| EXIF ImageDescription  | EXIF UserComment   | XMP                 |

PIL writes none of this by itself. The engine's pictures do (`picture.Picture`); `files.save` does it for any PIL image.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentrt.errors import RequestError

if TYPE_CHECKING:
    from PIL.Image import Exif, Image

Settings = Mapping[str, object]

INFO_KEY = "latentrt"  # where a PIL image carries its settings: image.info[INFO_KEY]

_PARTS = re.compile(r'(?:"(?:\\.|[^"\\])*"|[^,"])+')  # between commas that are not quoted
_SIZE = re.compile(r"(\d+)x(\d+)")
_LOSSY = {"quality": 95, "subsampling": 0}  # 4:4:4, since saturated edges show chroma subsampling first
_EXIF_IFD, _USER_COMMENT, _IMAGE_DESCRIPTION, _SOFTWARE = 0x8769, 0x9286, 0x010E, 0x0131
_XMP = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/"
 xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" xmp:CreatorTool="latentrt"
 Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"/>
</rdf:RDF></x:xmpmeta>
<?xpacket end="w"?>"""


def read_settings(path: str | Path) -> dict[str, Any]:
    """Return the settings that `save` wrote into a picture.

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
    except (OSError, TypeError, ValueError, RecursionError) as error:
        raise RequestError(
            f"{path} has no settings to read ({error})",
            needed="a picture saved by latentrt, with its metadata",
            fix="use the original file: editors and chat services strip metadata",
        ) from error
    return settings


def settings_of(image: Image) -> Settings:
    """Return a picture's settings: a dict from the engine, or text if PIL read it from a PNG of latentrt's."""
    carried: str | Settings = image.info.get(INFO_KEY, {})
    own: Settings = json.loads(carried) if isinstance(carried, str) else carried
    return own


def metadata(kind: str, settings: Settings, size: tuple[int, int]) -> dict[str, Any]:
    """Return keyword arguments of PIL's `save` for a format of FORMATS; without settings only the source type."""
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


def texts_of(image: Image) -> dict[str, str]:
    """Return the texts in a picture's file, as PIL opened and loaded it; "parameters" is the prose of `prose`."""
    texts = {str(name): text for name, text in image.info.items() if isinstance(text, str)}
    exif = image.getexif()
    comment = exif.get_ifd(_EXIF_IFD).get(_USER_COMMENT)
    if isinstance(comment, bytes) and comment.startswith(b"UNICODE\0") and "parameters" not in texts:
        texts["parameters"] = comment[8:].decode("utf-16-be", "replace")
    if isinstance(description := exif.get(_IMAGE_DESCRIPTION), str) and INFO_KEY not in texts:
        texts[INFO_KEY] = description
    return texts


def read_prose(text: str) -> dict[str, str]:
    """Return the parts of what `prose` or A1111's web UI wrote, by their names there; a size "64x32" as two numbers."""
    *lines, last = text.strip().split("\n")
    parts = [part.partition(":") for part in _PARTS.findall(last)]
    if len(parts) < 3 or not all(colon for _, colon, _ in parts):
        lines, parts = [*lines, last], []
    starts = (index for index, line in enumerate(lines) if line.startswith("Negative prompt:"))
    end = next(starts, len(lines))
    negative = "\n".join(lines[end:]).removeprefix("Negative prompt:").strip()
    found = {"Prompt": "\n".join(lines[:end]).strip(), "Negative prompt": negative}
    for name, _, quoted in parts:
        value = quoted.strip()
        if size := _SIZE.fullmatch(value):
            found |= {f"{name.strip()}-1": size[1], f"{name.strip()}-2": size[2]}
        else:
            found[name.strip()] = _unquoted(value)
    return found


def _unquoted(text: str) -> str:
    try:
        return str(json.loads(text)) if text.startswith('"') else text
    except ValueError:
        return text


def prose(settings: Settings, size: tuple[int, int]) -> str:
    """Return the text that AUTOMATIC1111's web UI writes and that galleries read: prompt, negative prompt, settings.

    The format cannot tell a prompt's own line "Negative prompt: ..." from the real one; the JSON can.
    """
    noise, skipped = str(settings.get("noise", "")).partition(":")[0], settings.get("clip_skip")
    facts = {
        "Steps": settings.get("steps"),
        "Sampler": settings.get("solver"),
        "CFG scale": settings.get("guidance"),
        "Seed": settings.get("seed"),
        "Size": f"{size[0]}x{size[1]}",
        "Model": settings.get("model"),
        "Denoising strength": settings.get("strength", settings.get("hires_strength")),
        "Clip skip": None if skipped is None else int(str(skipped)) + 1,
        "Eta": settings.get("eta"),
        "Variation seed": settings.get("subseed"),
        "Variation seed strength": settings.get("subseed_strength"),
        "ENSD": settings.get("seed_delta"),
        "Mask blur": settings.get("mask_blur"),
        "Masked area padding": settings.get("mask_crop"),
        "Masked content": settings.get("mask_fill"),
        "Hires upscale": settings.get("hires_scale"),
        "Hires steps": settings.get("hires_steps"),
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
