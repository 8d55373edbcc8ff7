"""Files from clients become arrays, or are refused; pictures become files."""

from __future__ import annotations

import base64
from functools import partial
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from latentrt.bundle.spec import LatentSpec
from latentrt.images.picture import Picture
from latentrt.serve.http.errors import Problem
from latentrt.serve.http.images import File, Files, alpha_mask, decode, encode, from_base64, shape_of, white_mask
from tests.support.serve.fakes import png

MOST = 10**6
LATENTS = LatentSpec(channels=4, factor=8, scale=1.0, shift=0.0, height=16, width=16)


def files(image: bytes, mask: bytes | None = None, to_mask: Any = alpha_mask) -> Files:
    found = {"image": File("image", partial(BytesIO, image))}
    return found if mask is None else {**found, "mask": File("mask", partial(BytesIO, mask), to_mask)}


def run(files: Files, size: tuple[int, int] = (8, 8)) -> Any:
    pictures = decode(files, size, LATENTS, MOST)
    return pictures["image"], pictures.get("mask")


def shape(image: bytes) -> tuple[int, int]:
    return shape_of(files(image)["image"], MOST)


def file(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@settings(deadline=None, max_examples=60)
@given(
    st.binary(max_size=200), st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"RIFF\x24\0\0\0WEBP"])
)
def test_no_bytes_are_a_fault(data: bytes, magic: bytes) -> None:
    for ask in (lambda: shape(magic + data), lambda: run(files(magic + data))):
        with pytest.raises(Problem) as caught:
            ask()
        assert caught.value.code == "image_decode_failed"


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(["PNG", "JPEG", "WEBP"]), st.integers(0, 10**6), st.integers(0, 255))
def test_a_damaged_picture_is_drawn_or_refused(kind: str, where: int, value: int) -> None:
    data = bytearray(file(Image.effect_noise((24, 24), 60).convert("RGB"), kind))
    data[where % len(data)] = value
    try:
        pixels, _ = run(files(bytes(data)))
    except Problem as problem:
        code = problem.code
    else:
        code = "drawn" if pixels.shape == (8, 8, 3) else "bent"
    assert code in ("drawn", "image_decode_failed")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_any_mode_becomes_rgb(mode: str) -> None:
    pixels, mask = run(files(file(Image.new(mode, (16, 16)))))
    assert (pixels.shape, pixels.dtype, mask) == ((8, 8, 3), np.uint8, None)


@pytest.mark.parametrize(("value", "level"), [(0, 0), (300, 1), (32768, 128), (65535, 255)])
def test_sixteen_bits_are_scaled(value: int, level: int) -> None:
    data = file(Image.new("I;16", (16, 16), value))
    pixels, area = run(files(data, data, white_mask))
    _, inverted = run(files(data, data, partial(white_mask, inverted=True)))
    assert (pixels == level).all()
    assert (area == (255 if level >= 128 else 0)).all()
    assert (inverted == 255 - area).all()


def test_a_transparent_value_of_sixteen_bits() -> None:
    values = np.repeat(np.uint16([700, 300]), 4)[None].repeat(8, axis=0)
    clear = file(Image.fromarray(values), transparency=300)
    pixels, area = run(files(clear, clear))
    assert pixels[2].tolist() == [[3] * 3] * 4 + [[255] * 3] * 4
    assert area[2].tolist() == [0] * 4 + [255] * 4


def test_cmyk_jpegs_too() -> None:
    assert run(files(file(Image.new("CMYK", (16, 16)), "JPEG")))[0].shape == (8, 8, 3)


def test_what_is_transparent_becomes_white() -> None:
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    palette = Image.new("P", (8, 8), 3)
    palette.putpalette([0, 0, 0] * 4)
    for data in (file(image), file(palette, transparency=3)):
        assert (run(files(data))[0] == 255).all()


def test_a_picture_is_turned_as_its_exif_says() -> None:
    image = Image.new("RGB", (16, 8), "red")
    image.paste("blue", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    for kind in ("JPEG", "PNG", "WEBP"):
        data = file(image, kind, exif=exif)
        assert shape(data) == (8, 16)
        pixels, _ = run(files(data), (8, 16))
        assert pixels[2, 4, 2] > 200 > 50 > pixels[2, 4, 0]  # blue is on top now


@pytest.mark.parametrize(("kind", "bytes_each"), [("PNG", 1 / 400), ("WEBP", 1 / 400)])
def test_a_bomb_is_refused_by_its_header(kind: str, bytes_each: float) -> None:
    bomb = png(1001, 1000, kind=kind)
    assert len(bomb) < 1001 * 1000 * bytes_each * 2
    for ask in (lambda: shape(bomb), lambda: run(files(bomb))):
        with pytest.raises(Problem, match="1001x1000 pixels, more than 1000000"):
            ask()


def test_a_header_that_promises_too_much_is_refused() -> None:
    data = bytearray(png(16, 16))
    data[16:24] = (100_000).to_bytes(4, "big") * 2
    for ask in (lambda: shape(bytes(data)), lambda: run(files(bytes(data)))):
        with pytest.raises(Problem, match="cannot be decoded"):
            ask()


def test_masks_by_alpha() -> None:
    mask = Image.new("RGBA", (8, 8), (0, 0, 0, 255))
    mask.paste((9, 9, 9, 0), (0, 0, 4, 8))
    _, area = run(files(png(8, 8), file(mask)))
    assert area.shape == (8, 8)
    assert (area[:, :4] == 255).all()
    assert (area[:, 4:] == 0).all()


def test_masks_must_have_alpha_and_the_pictures_size() -> None:
    for mask, text in ((png(8, 8), "no alpha"), (png(9, 8, "RGBA"), "9x8")):
        with pytest.raises(Problem, match=text) as caught:
            run(files(png(8, 8), mask))
        assert caught.value.param == "mask"


def test_masks_by_white() -> None:
    mask = file(Image.linear_gradient("L").resize((8, 8)))
    _, area = run(files(png(8, 8), mask, white_mask))
    _, inverted = run(files(png(8, 8), mask, partial(white_mask, inverted=True)))
    assert (area[0] == 0).all()
    assert (area[-1] == 255).all()
    assert (inverted[[0, -1]] == 255 - area[[0, -1]]).all()
    opaque = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    opaque.paste((0, 0, 0, 255), (0, 0, 8, 4))
    _, by_alpha = run(files(png(8, 8), file(opaque), white_mask))
    assert (by_alpha == np.repeat([255, 0], 4).astype(np.uint8)[:, None]).all()


@pytest.mark.parametrize("text", ["http://a/b.png", "https://a", "file:///etc/passwd", "ftp://a"])
def test_urls_are_never_read(text: str) -> None:
    with pytest.raises(Problem, match="is a URL"):
        from_base64(text, "image", 100)


def test_base64() -> None:
    text = base64.b64encode(b"hello").decode()
    assert from_base64(text, "image", 5) == from_base64(f"data:image/png;base64,{text}", "image", 5) == b"hello"
    with pytest.raises(Problem) as caught:
        from_base64("A" * 100, "image", 50)
    assert (caught.value.status, caught.value.code) == (413, "image_too_large")
    for bad in ("*", "abc", "aGVsbG8=é"):
        with pytest.raises(Problem, match="no base64"):
            from_base64(bad, "image", 100)


def test_pictures_take_their_settings_along_in_every_format() -> None:
    picture = Picture.of(np.zeros((8, 8, 3), np.uint8), {"prompt": "a", "seed": 1})
    for kind in ("png", "jpeg", "webp"):
        image = Image.open(BytesIO(base64.b64decode(encode(picture, kind))))
        assert image.format == kind.upper()
        assert "latentrt" in image.info or image.getexif()[0x010E]


def test_quality_matters() -> None:
    noise = Picture.of(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8), {})
    for kind in ("jpeg", "webp"):
        small, large = (len(encode(noise, kind, quality)) for quality in (5, 95))
        assert small < large / 2
    assert len({encode(noise, "png", quality) for quality in (None, 100)}) == 1
