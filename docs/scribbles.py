"""Drawings of a few lines each, black on white, for the ControlNet that follows lines."""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image, ImageDraw

SIDE, WIDTH = 128, 3  # pixels
Draw = ImageDraw.ImageDraw


def scribble(thing: str) -> Image.Image:
    """Return a drawing of one of THINGS, (SIDE, SIDE) pixels."""
    image = Image.new("L", (SIDE, SIDE), 255)
    THINGS[thing](ImageDraw.Draw(image))
    return image


def _arc(draw: Draw, box: tuple[int, int, int, int], start: float, end: float) -> None:
    draw.arc(box, start, end, fill=0, width=WIDTH)


def _line(draw: Draw, *points: int) -> None:
    draw.line(points, fill=0, width=WIDTH)


def _apple(draw: Draw) -> None:
    _arc(draw, (28, 46, 76, 108), 75, 320)
    _arc(draw, (54, 46, 102, 108), 220, 105)
    _line(draw, 65, 52, 66, 36, 74, 26)
    _arc(draw, (66, 26, 86, 38), 0, 360)


def _fish(draw: Draw) -> None:
    _arc(draw, (20, 46, 92, 86), 0, 360)
    _line(draw, 90, 66, 112, 46, 112, 86, 90, 66)
    _arc(draw, (32, 58, 38, 64), 0, 360)
    _arc(draw, (22, 48, 50, 84), 300, 60)


def _umbrella(draw: Draw) -> None:
    _arc(draw, (22, 24, 106, 108), 180, 360)
    for left in (22, 50, 78):
        _arc(draw, (left, 58, left + 28, 74), 180, 360)
    _line(draw, 64, 62, 64, 106)
    _arc(draw, (50, 98, 64, 114), 0, 180)


def _house(draw: Draw) -> None:
    _line(draw, 24, 66, 64, 28, 104, 66, 24, 66)
    _line(draw, 32, 66, 32, 106, 96, 106, 96, 66)
    _line(draw, 56, 106, 56, 82, 72, 82, 72, 106)


def _mushroom(draw: Draw) -> None:
    _arc(draw, (24, 28, 104, 104), 180, 360)
    _line(draw, 24, 66, 104, 66)
    _line(draw, 52, 66, 48, 108, 80, 108, 76, 66)


THINGS: dict[str, Callable[[Draw], None]] = {
    "apple": _apple,
    "fish": _fish,
    "umbrella": _umbrella,
    "house": _house,
    "mushroom": _mushroom,
}
