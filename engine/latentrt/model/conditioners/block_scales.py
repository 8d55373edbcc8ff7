"""How strongly an IP-Adapter acts in each cross attention, as diffusers' `set_ip_adapter_scale` reads it.

A number is for all. A mapping names blocks, of which the others are 0:

    {"down": {"block_2": [0.0, 1.0]}, "mid": 0.5, "up": {"block_0": [0.0, 1.0, 0.0]}}

A block's list has a number for each of its transformers, or one for all; a number in its place, or in that of "down" or
"up", is for all below.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from latentrt.errors import RequestError

PLACE = re.compile(r"(down|up)_blocks\.(\d+)\.attentions\.(\d+)\..+|mid_block\..+")
SIDES = ("down", "mid", "up")


def scales_of(scale: float | Mapping[str, Any], places: Sequence[str]) -> tuple[float, ...]:
    """Return the scale at each place, such as "down_blocks.1.attentions.0.transformer_blocks.0".

    Raises:
        RequestError: it names a block that is not there, or has another count of numbers than a block.
    """
    if not isinstance(scale, Mapping):
        return (float(scale),) * len(places)
    blocks: dict[str, dict[str, int]] = {side: {} for side in SIDES}
    found = [_block(place) for place in places]
    for side, block, attention in found:
        blocks[side][block] = max(blocks[side].get(block, 0), attention + 1)
    if unknown := [side for side in scale if side not in SIDES]:
        raise RequestError(f"an ip_adapter's scale names {unknown[0]!r}", needed=f"some of {', '.join(SIDES)}")
    numbers = {side: _side(side, scale.get(side, 0.0), own) for side, own in blocks.items()}
    return tuple(numbers[side][block][attention] for side, block, attention in found)


def _block(place: str) -> tuple[str, str, int]:
    """Return the side, the block and the number of the attention of a place."""
    match = PLACE.fullmatch(place)
    assert match is not None, place
    return (match[1], f"block_{match[2]}", int(match[3])) if match[1] else ("mid", "", 0)


def _side(side: str, value: Any, blocks: Mapping[str, int]) -> dict[str, list[float]]:
    """Return the scales of a side's blocks, which have so many attentions."""
    own = value if isinstance(value, Mapping) else dict.fromkeys(blocks, value)
    if unknown := [name for name in own if name not in blocks]:
        raise RequestError(
            f"an ip_adapter's scale names the block {unknown[0]!r} of {side!r}",
            needed=f"one with attention to the text: {', '.join(filter(None, blocks)) or 'there is none'}",
        )
    return {name: _numbers(f"{side}.{name}", own.get(name, 0.0), count) for name, count in blocks.items()}


def _numbers(name: str, value: Any, count: int) -> list[float]:
    given = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(given) not in (1, count):
        raise RequestError(f"an ip_adapter's scale has {len(given)} numbers for {name}", needed=f"1 or {count}")
    return [float(number) for number in given] * (count // len(given))
