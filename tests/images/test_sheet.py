"""Contact sheets: where tiles and captions are."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from latentrt.errors import RequestError
from latentrt.images.sheet import grid

SUFFIXES = [".png", ".jpg", ".jpeg", ".webp"]


def picture(size: tuple[int, int] = (16, 8), color: str = "red") -> Image.Image:
    return Image.new("RGB", size, color)


def test_grid_places_tiles_row_by_row_with_white_gaps() -> None:
    colors = ["red", "lime", "blue"]
    sheet = grid([picture((10, 6), color) for color in colors], columns=2)
    assert sheet.size == (24, 16)
    corners = [sheet.getpixel(place) for place in ((0, 0), (14, 0), (0, 10))]
    assert corners == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    assert {sheet.getpixel((x, 3)) for x in range(10, 14)} == {(255, 255, 255)}
    assert sheet.getpixel((14, 10)) == (255, 255, 255)


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (4, 2), (5, 3), (9, 3), (10, 4)])
def test_grid_is_nearly_square_by_itself(count: int, columns: int) -> None:
    assert grid([picture((10, 10))] * count).width == columns * 14 - 4


def test_captions_stand_under_their_own_tiles() -> None:
    tiles = [picture((64, 64), "red")] * 2
    sheet = np.asarray(grid(tiles, 2, ["a caption much longer than its tile is wide", ""])).astype(int)
    strip = sheet[64:]
    assert strip.shape[0] > 8
    assert strip[:, :64].min() < 64, "black letters under the first tile"
    assert (strip[:, 64:] == 255).all(), "nothing under the gap and the second tile"
    assert (sheet[:64, :64] == [255, 0, 0]).all(), "no letter over the tile"


def test_caption_letters_do_not_reach_into_the_next_row() -> None:
    sheet = np.asarray(grid([picture((48, 48), "white")] * 2, 1, ["(gjpqy|)"] * 2))
    strip = (sheet.shape[0] - 4 - 2 * 48) // 2
    assert (sheet[48 + strip : 48 + strip + 4] == 255).all()


@pytest.mark.parametrize(
    ("images", "columns", "captions"),
    [
        ([], None, []),
        ([picture((8, 8)), picture((8, 9))], None, []),
        ([picture()], 0, []),
        ([picture()], None, ["one", "two"]),
    ],
)
def test_impossible_grids(images: list[Image.Image], columns: int | None, captions: list[str]) -> None:
    with pytest.raises(RequestError):
        grid(images, columns, captions)
