"""Files: settings that come back, what a format cannot hold, names."""

from __future__ import annotations

import errno
import json
import os
import resource
from io import BytesIO
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

from latentrt.errors import OutputError, RequestError
from latentrt.images.files import encode, output_path, save
from latentrt.images.metadata import read_settings
from latentrt.images.pixels import to_pil

SUFFIXES = [".png", ".jpg", ".jpeg", ".webp"]
SETTINGS = {
    "prompt": "a red apple, 8k\nsecond line",
    "negative_prompt": "blurry: very",
    "steps": 20,
    "solver": "dpm++ 2m",
    "guidance": 3.0,
    "seed": 2**64 - 1,
    "noise": "torch-cpu",
    "model": "emoji, small",
    "options": {"eta": 0.5, "nothing": None, "list": [1, 2]},
}
SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"


def picture(size: tuple[int, int] = (16, 8), color: str = "red") -> Image.Image:
    return Image.new("RGB", size, color)


# Files and their metadata


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_settings_come_back(tmp_path: Path, suffix: str) -> None:
    path = save(picture(), tmp_path / f"apple{suffix}", settings=SETTINGS)
    assert read_settings(path) == SETTINGS


@given(
    prompt=st.text(),
    extra=st.dictionaries(
        st.text(),
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    ),
    suffix=st.sampled_from(SUFFIXES),
)
@hypothesis_settings(deadline=None, max_examples=60)
def test_any_text_comes_back(
    tmp_path_factory: pytest.TempPathFactory, prompt: str, extra: dict[str, object], suffix: str
) -> None:
    wanted = {**extra, "prompt": prompt}
    path = save(picture(), tmp_path_factory.mktemp("any") / f"x{suffix}", settings=wanted)
    assert read_settings(path) == wanted


def test_settings_travel_in_the_picture_and_through_a_png(tmp_path: Path) -> None:
    image = picture()
    image.info["latentrt"] = SETTINGS
    first = save(image, tmp_path / "first.png")
    with Image.open(first) as again:
        second = save(again, tmp_path / "second.webp")
    assert read_settings(second) == SETTINGS


def test_plain_pil_save_works_and_keeps_pixels_only(tmp_path: Path) -> None:
    image = picture()
    image.info["latentrt"] = SETTINGS
    for suffix in SUFFIXES:
        image.save(tmp_path / f"plain{suffix}")
        with pytest.raises(RequestError, match="no settings"):
            read_settings(tmp_path / f"plain{suffix}")


def test_png_is_lossless_and_jpeg_close(tmp_path: Path) -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    image = to_pil(pixels)
    with Image.open(save(image, tmp_path / "x.png")) as read:
        np.testing.assert_array_equal(np.asarray(read), pixels)
    with Image.open(save(image, tmp_path / "x.jpg")) as read:
        assert np.abs(np.asarray(read).astype(int) - pixels).mean() < 4  # measured: 3.2


def prose_of(path: Path) -> str:
    with Image.open(path) as image:
        if image.format == "PNG":
            return str(image.info["parameters"])
        comment = image.getexif().get_ifd(0x8769)[0x9286]
        assert comment[:8] == b"UNICODE\0"
        return comment[8:].decode("utf-16-be")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_prose_is_what_web_ui_readers_parse(tmp_path: Path, suffix: str) -> None:
    path = save(picture((128, 64)), tmp_path / f"x{suffix}", settings={**SETTINGS, "prompt": "ein Äpfelchen 🍎"})
    assert prose_of(path) == (
        "ein Äpfelchen 🍎\n"
        "Negative prompt: blurry: very\n"
        "Steps: 20, Sampler: dpm++ 2m, CFG scale: 3.0, Seed: 18446744073709551615, Size: 128x64, "
        'Model: "emoji, small", RNG: CPU'
    )


def test_prose_leaves_out_what_is_not_known(tmp_path: Path) -> None:
    path = save(picture(), tmp_path / "x.png", settings={"prompt": "a", "noise": "torch-cuda:h200", "seed": 0})
    assert prose_of(path) == "a\nSeed: 0, Size: 16x8, RNG: NV"


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("settings", [None, SETTINGS])
def test_every_picture_says_that_a_model_made_it(
    tmp_path: Path, suffix: str, settings: dict[str, object] | None
) -> None:
    with Image.open(save(picture(), tmp_path / f"x{suffix}", settings=settings)) as image:
        xmp = image.info["xmp"]
    [description] = ElementTree.fromstring(xmp.decode("utf-8-sig")).iter(
        "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description"
    )
    assert description.get("{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType") == SOURCE_TYPE
    assert description.get("{http://ns.adobe.com/xap/1.0/}CreatorTool") == "latentrt"


def test_encode_gives_the_bytes_that_save_writes(tmp_path: Path) -> None:
    path = save(picture(), tmp_path / "x.png", settings=SETTINGS)
    assert encode(picture(), ".PNG", settings=SETTINGS) == path.read_bytes()


@pytest.mark.parametrize("name", ["x.gif", "x", "x.png.txt"])
def test_unknown_suffix_lists_the_known_ones(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match=r"\.png, \.jpg, \.jpeg, \.webp"):
        save(picture(), tmp_path / name)


@pytest.mark.parametrize(
    ("name", "mode", "settings"),
    [
        ("x.png", "RGB", {"what": object()}),
        ("x.png", "RGB", {"eta": float("nan")}),
        ("x.png", "RGB", {"prompt": "lone \ud800"}),
        ("x.webp", "RGB", {"prompt": "lone \ud800"}),
        ("x.jpg", "RGB", {"prompt": "long" * 20_000}),
        ("x.jpg", "RGBA", {}),
    ],
)
def test_what_a_file_cannot_hold(tmp_path: Path, name: str, mode: str, settings: dict[str, object]) -> None:
    with pytest.raises(OutputError, match="cannot be"):
        save(Image.new(mode, (8, 8)), tmp_path / name, settings=settings)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_picture_and_nothing_else(tmp_path: Path) -> None:
    path = save(picture(color="blue"), tmp_path / "x.png")
    before = path.read_bytes()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # the write stops half-way, as on a full disk
    try:
        with pytest.raises(OutputError, match=os.strerror(errno.EFBIG)):
            save(noise, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot be written"):
        save(picture(), tmp_path / "file" / "x.png")


def test_folders_are_made(tmp_path: Path) -> None:
    assert save(picture(), tmp_path / "a" / "b" / "x.png").exists()


def test_reading_what_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    exif = Image.Exif()
    exif[0x010E] = json.dumps(["a list"])
    picture().save(tmp_path / "list.jpg", exif=exif)
    exif[0x010E] = "[" * 10_000
    picture().save(tmp_path / "deep.jpg", exif=exif)
    for name in ("missing.png", "text.png", "list.jpg", "deep.jpg"):
        with pytest.raises(RequestError, match=name):
            read_settings(tmp_path / name)


# File names


def test_output_path_fills_fields() -> None:
    values = {"seed": 7, "index": 3, "guidance": 7.5, "prompt": "A red apple, on a table!"}
    assert output_path("out/{seed}-{index:03d}-{prompt}.png", values) == Path("out/7-003-A-red-apple-on-a-table.png")
    assert output_path("{prompt:.5}_{guidance}{{x}}.webp", values) == Path("A-red_7.5{x}.webp")


@pytest.mark.parametrize(
    ("prompt", "slug"),
    [
        ("../../etc/passwd", "etc-passwd"),
        ("..", "untitled"),
        ("", "untitled"),
        ("🍎", "untitled"),
        ("C:\\x\0y", "C-x-y"),
        ("苹果 ва́за हिन्दी", "苹果-ва́за-हिन्दी"),
        ("{seed}", "seed"),
        ("\ud800x", "x"),
    ],
)
def test_slugs(prompt: str, slug: str) -> None:
    assert output_path("{prompt}.png", {"prompt": prompt, "seed": 1}) == Path(f"{slug}.png")


@given(prompt=st.text())
@hypothesis_settings(deadline=None)
def test_no_value_leaves_the_folder_or_makes_a_long_name(prompt: str) -> None:
    path = output_path("out/{prompt}/{prompt}.png", {"prompt": prompt})
    assert len(path.parts) == 3
    assert path.parts[0] == "out"
    assert ".." not in path.parts
    assert len(path.name.encode()) <= 104


@pytest.mark.parametrize("pattern", ["{sed}.png", "{}.png", "{seed.real}.png", "{seed[0]}.png"])
def test_unknown_fields_list_the_known_ones(pattern: str) -> None:
    with pytest.raises(OutputError, match="prompt, seed"):
        output_path(pattern, {"prompt": "a", "seed": 1})


@pytest.mark.parametrize("pattern", ["{seed", "{prompt:03d}.png", "{seed!x}.png", "{seed:{prompt}}.png"])
def test_malformed_patterns(pattern: str) -> None:
    with pytest.raises(OutputError, match="pattern"):
        output_path(pattern, {"prompt": "a", "seed": 1})


def test_pixels_survive_a_png_in_memory() -> None:
    with Image.open(BytesIO(encode(picture((3, 2), "navy"), ".png"))) as image:
        assert image.getpixel((2, 1)) == (0, 0, 128)
