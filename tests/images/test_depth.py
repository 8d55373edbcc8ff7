"""Pictures of more than 8 bits a channel, from PIL, from arrays and from files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentrt.bundle.spec import LatentSpec
from latentrt.errors import RequestError
from latentrt.images.depth import scaled
from latentrt.images.given import open_picture, prepared

LATENTS = LatentSpec(4, 8, 1.0, 0.0, 16, 16)
LEVELS = {0: 0, 300: 1, 32768: 128, 65535: 255}  # of 16 bits, and of 8


def flat(value: float, mode: str) -> Image.Image:
    return Image.new(mode, (16, 16), value)


def grey_of(image: Any) -> list[int]:
    """Return the colour of a flat picture's run."""
    pixels, _ = prepared(image, None, None, None, LATENTS)
    (colour,) = np.unique(pixels.reshape(-1, 3), axis=0)
    return colour.tolist()


def repainted(mask: Any) -> bool:
    _, repaint = prepared(flat(0, "L"), mask, None, None, LATENTS)
    assert repaint is not None
    (every,) = np.unique(repaint)
    return bool(every)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L", "I;16N"])
@pytest.mark.parametrize(("value", "level"), LEVELS.items())
def test_modes_of_16_bits_are_scaled(mode: str, value: int, level: int) -> None:
    values = np.full((16, 16), value, {"I;16B": ">u2", "I;16N": "=u2"}.get(mode, "<u2"))
    image = Image.frombytes(mode, (16, 16), values.tobytes())
    assert grey_of(image) == [level] * 3
    assert repainted(image) == (level >= 128)


@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
@pytest.mark.parametrize(("value", "level"), LEVELS.items())
def test_arrays_of_16_bits_are_scaled(dtype: str, value: int, level: int) -> None:
    assert grey_of(np.full((16, 16, 3), value, dtype)) == [level] * 3
    assert repainted(np.full((16, 16), value, dtype)) == (level >= 128)


def test_every_value_is_rounded() -> None:
    values = np.arange(65536)
    np.testing.assert_array_equal(scaled(values), (values * 255 + 32767) // 65535)
    np.testing.assert_array_equal(scaled(np.arange(4096), 4095), (np.arange(4096) * 255 + 2047) // 4095)


@pytest.mark.parametrize(("value", "level"), [(0, 0), (300, 1), (32768, 128), (65535, 255)])
def test_the_mode_i_has_16_bits(value: int, level: int) -> None:
    assert grey_of(flat(value, "I")) == [level] * 3


@pytest.mark.parametrize(("value", "level"), [(0.0, 0), (0.004, 1), (0.5, 128), (1.0, 255)])
def test_the_mode_f_ends_at_1(value: float, level: int) -> None:
    assert grey_of(flat(value, "F")) == [level] * 3


@pytest.mark.parametrize(
    ("mode", "value", "words"),
    [
        ("I", 1, "values from 1 to 1, which may be of 8 bits or of 16"),
        ("I", 255, "values from 255 to 255, which may be of 8 bits or of 16"),
        ("I", -1, "values from -1 to -1.*Needed: 0 to 65535"),
        ("I", 65536, "values from 65536 to 65536.*Needed: 0 to 65535"),
        ("F", 1.5, "values from 1.5 to 1.5.*Needed: 0 to 1"),
        ("F", -0.5, "values from -0.5"),
        ("F", float("nan"), "values from nan"),
    ],
)
@pytest.mark.parametrize("name", ["image", "mask"])
def test_values_without_a_clear_range_are_refused(mode: str, value: float, words: str, name: str) -> None:
    pictures = {"image": flat(0, "L"), "mask": flat(0, "L"), name: flat(value, mode)}
    with pytest.raises(RequestError, match=f"the {name} has the mode {mode} with {words}"):
        prepared(pictures["image"], pictures["mask"], None, None, LATENTS)


@pytest.mark.parametrize(("value", "level"), LEVELS.items())
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_files_of_16_bits(tmp_path: Path, suffix: str, value: int, level: int) -> None:
    path = tmp_path / f"grey.{suffix}"
    flat(value, "I;16").save(path)
    with Image.open(path) as opened:
        assert opened.mode == "I;16"
        assert grey_of(opened) == [level] * 3
    assert grey_of(open_picture(path)) == [level] * 3


def test_a_transparent_value_of_16_bits_is_white(tmp_path: Path) -> None:
    values = np.repeat(np.uint16([700, 300]), 8)[None].repeat(16, axis=0)
    Image.fromarray(values).save(tmp_path / "clear.png", transparency=300)
    with Image.open(tmp_path / "clear.png") as opened:
        for picture in (open_picture(tmp_path / "clear.png"), opened):
            pixels, _ = prepared(picture, None, None, None, LATENTS)
            assert pixels[8, 2].tolist() == [3, 3, 3]
            assert pixels[8, 13].tolist() == [255, 255, 255]


def test_a_tiff_of_12_bits_is_white_at_4095(tmp_path: Path) -> None:
    path = tmp_path / "grey.tif"
    path.write_bytes(tiff_of_12_bits(value=4095))
    assert grey_of(open_picture(path)) == [255] * 3
    with Image.open(path) as opened:
        assert grey_of(opened) == [255] * 3
    path.write_bytes(tiff_of_12_bits(value=16))
    assert grey_of(open_picture(path)) == [1] * 3


def tiff_of_12_bits(value: int) -> bytes:
    """Return a TIFF file of 16 x 16 equal values, two of them in three bytes; PIL reads such files and writes none."""
    pair = bytes([value >> 4, (value & 15) << 4 | value >> 8, value & 255])
    data = pair * 128
    tags = {256: 16, 257: 16, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 16, 279: len(data)}
    entries = b"".join(
        tag.to_bytes(2, "little") + b"\4\0\1\0\0\0" + number.to_bytes(4, "little") for tag, number in tags.items()
    )
    directory = len(tags).to_bytes(2, "little") + entries + b"\0\0\0\0"
    return b"II*\0" + (8 + len(data)).to_bytes(4, "little") + data + directory


def test_a_turned_file_of_16_bits_is_turned(tmp_path: Path) -> None:
    image = Image.new("I;16", (32, 16), 65535)
    image.paste(0, (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image.save(tmp_path / "turned.png", exif=exif)
    upright = open_picture(tmp_path / "turned.png")
    assert (upright.getpixel((0, 0)), upright.getpixel((31, 0))) == (255, 0)
