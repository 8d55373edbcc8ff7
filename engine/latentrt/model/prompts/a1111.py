"""Prompts in the syntax of AUTOMATIC1111's web UI: weights in parentheses, chunks of 75 tokens, BREAK.

    (word)  weighs 1.1, and more in more parentheses      [word]  weighs 1 / 1.1
    (word:1.3)  weighs 1.3                                \\(  is a parenthesis
    BREAK  begins a new chunk                            <lora:name:0.8>  adds a LoRA (`extra_networks.py`)

Source: modules/prompt_parser.py, sd_hijack_clip.py and sd_emphasis.py of stable-diffusion-webui 1.10, whose rules these
are down to their quirks: a BREAK in parentheses is a word, an unclosed parenthesis ends with the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple

import numpy as np

from latentrt.errors import RequestError
from latentrt.model.prompts.extra_networks import TAG, without_loras
from latentrt.model.prompts.reading import Float32, Reading, Row, first
from latentrt.model.prompts.tokenizer import GIVEN, Tokenizer, check_text

SIGNS = re.compile(
    r"(?<!\\)\([^()]*:\s*+[+-]?[.\d]++\s*+\)"  # (red:1.3)
    r"|(?<!\\)\(\([^()]+\)\)"  # ((red))
    r"|\bBREAK\b"
)
MORE, LESS = 1.1, 1 / 1.1
BREAK = ("BREAK", -1.0)
COMMA_REACH = 20  # tokens: what follows a comma that near to the end of a chunk moves to the next one
MOST_CHUNKS, MOST_WEIGHT, DEEPEST = 32, 1000.0, 100
_PARTS = re.compile(
    r"\\[\\()\[\]]|\\"  # an escaped character, or a lone backslash
    r"|[(\[\])]"
    r"|:\s*+([+-]?[.\d]++)\s*+\)"  # a weight, and the parenthesis that it closes
    r"|[^\\()\[\]:]+|:"
)
_BREAKS = re.compile(r"\bBREAK\b")
_AND = re.compile(r"\bAND\b")
_BRACKETS = re.compile(r"\\.|[\[\]|]|:\s*+[+-]?[.\d]++\s*+(?=\])")


class Piece(NamedTuple):
    """A part of a prompt that is tokenized by itself, and its weight; BREAK begins a new chunk."""

    text: str
    weight: float


class Chunk(NamedTuple):
    """As many tokens as a text encoder reads between its start and its end, at most, and their weights."""

    ids: list[int]
    weights: list[float]


def read(prompt: str, tokenizer: Tokenizer) -> Reading:
    """Return the reading of a prompt: a row for each chunk, whose states are weighed and joined along the tokens.

    Raises:
        RequestError: it is no text, has a weight that is no number, is too long, or has what is not offered here.
    """
    check_text(prompt)
    prompt = without_loras(prompt)
    _check(prompt)
    pieces = [(_units(tokenizer, piece), piece) for piece in pieces_of(prompt)]
    if too_large := [piece.weight for _, piece in pieces if not abs(piece.weight) <= MOST_WEIGHT]:
        raise RequestError(f"the prompt has the weight {too_large[0]:g}", needed=f"at most {MOST_WEIGHT:g}")
    chunks = chunks_of(pieces, tokenizer.room, tokenizer.comma)
    if len(chunks) > MOST_CHUNKS:
        raise RequestError(f"the prompt takes {len(chunks)} chunks", needed=f"at most {MOST_CHUNKS}", fix="shorten it")
    rows = tuple(Row(tokenizer.padded(chunk.ids)) for chunk in chunks)
    weights = np.ones((len(rows), tokenizer.length), np.float32)
    for own, chunk in zip(weights, chunks, strict=True):
        own[1 : 1 + len(chunk.weights)] = chunk.weights
    alone = len(rows) == 1 and bool((weights == 1).all())
    return Reading(rows, weights, first if alone else partial(_weighed, weights), weights.size, rows[0])


def pieces_of(prompt: str) -> list[Piece]:
    """Return the pieces of a prompt. Raise RequestError where a weight is no number, as in (word:1.2.3)."""
    found: list[Piece] = []
    open_at: dict[str, list[int]] = {"(": [], "[": []}

    def weigh(start: int, factor: float) -> None:
        found[start:] = [Piece(piece.text, piece.weight * factor) for piece in found[start:]]

    for match in _PARTS.finditer(prompt):
        part, number = match[0], match[1]
        if part.startswith("\\"):
            found.append(Piece(part[1:], 1.0))
        elif part in open_at:
            open_at[part].append(len(found))
            if len(open_at[part]) > DEEPEST:
                raise RequestError(f"the prompt has over {DEEPEST} open {part!r}", needed="fewer, one in another")
        elif number is not None and open_at["("]:
            weigh(open_at["("].pop(), _number(number))
        elif part == ")" and open_at["("]:
            weigh(open_at["("].pop(), MORE)
        elif part == "]" and open_at["["]:
            weigh(open_at["["].pop(), LESS)
        else:
            first, *others = _BREAKS.split(part)
            found.append(Piece(first.rstrip() if others else first, 1.0))
            for left, text in enumerate(others, start=1 - len(others)):
                found += [Piece(*BREAK), Piece(text.strip() if left else text.lstrip(), 1.0)]
    for bracket, factor in (("(", MORE), ("[", LESS)):
        for start in open_at[bracket]:
            weigh(start, factor)
    joined = groupby(found or [Piece("", 1.0)], key=lambda piece: piece.weight)
    return [Piece("".join(piece.text for piece in same), weight) for weight, same in joined]


def chunks_of(pieces: Iterable[tuple[Sequence[tuple[int, ...]], Piece]], room: int, comma: int | None) -> list[Chunk]:
    """Return a prompt's chunks, each of `room` tokens at most, without start and end; one at least.

    Args:
        pieces: with their tokens; those in a tuple are the vectors of one embedding, which stay together.
        room: tokens of a chunk (75).
        comma: the token id of "," at a word's end.
    """
    chunks: list[list[tuple[int, float]]] = [[]]
    for units, piece in pieces:
        if piece == BREAK:
            chunks.append([])
            continue
        for unit in units:
            chunk = chunks[-1]
            if len(chunk) == room:
                chunks.append([] if unit == (comma,) else _after_comma(chunk, comma))
            if len(chunks[-1]) + len(unit) > room:
                chunks.append([])
            chunks[-1] += [(token, piece.weight) for token in unit]
    if len(chunks) > 1 and not chunks[-1]:
        chunks.pop()
    return [Chunk([token for token, _ in one], [weight for _, weight in one]) for one in chunks]


def _after_comma(chunk: list[tuple[int, float]], comma: int | None) -> list[tuple[int, float]]:
    """Take what follows the last comma of a full chunk away from it, if the comma is near enough to its end."""
    after = next((i for i, (token, _) in enumerate(reversed(chunk)) if token == comma), None)
    if after is None or after >= COMMA_REACH:
        return []
    moved = chunk[len(chunk) - after :]
    del chunk[len(chunk) - after :]
    return moved


def _units(tokenizer: Tokenizer, piece: Piece) -> list[tuple[int, ...]]:
    """Return a piece's tokens; those of one embedding in a tuple."""
    units: list[tuple[int, ...]] = []
    for token in tokenizer.tokens(piece.text, literally=True):
        if token >= GIVEN and token not in tokenizer.firsts and units:
            units[-1] += (token,)
        else:
            units.append((token,))
    return units


def _weighed(weights: Float32, states: Float32) -> Float32:
    """Return states (rows, 77, dim) times weights (rows, 77), joined; each row's mean stays as it was."""
    rows = []
    for own, state in zip(weights, states, strict=True):
        if (own != 1).any():
            weighed = state * own[:, None]
            state = weighed * np.float32(state.mean(dtype=np.float64) / weighed.mean(dtype=np.float64))
        rows.append(state)
    return np.concatenate(rows)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise RequestError(f"the prompt has the weight {text}", needed="a number, as in (red:1.3)") from error


def _check(prompt: str) -> None:
    """Refuse what the web UI reads and this does not, rather than draw it as letters."""
    if found := TAG.search(prompt):
        raise RequestError(f"the prompt has {found[0]}", needed="one without <...:...>", fix=f"leave {found[0]} out")
    if _AND.search(prompt):
        raise RequestError("the prompt has AND", needed="one prompt", fix="write it in small letters, or take a comma")
    opened: list[str] = []  # what makes a bracket more than a weight
    for match in _BRACKETS.finditer(prompt):
        part = match[0]
        if part == "[":
            opened.append("")
        elif part == "]" and opened and (sign := opened.pop()):
            raise RequestError(
                f"the prompt changes with the steps: there is {sign!r} in square brackets",
                needed="the same prompt for all steps",
                fix="[word] weighs less; write \\\\[ for a bracket, (word:0.8) for a weight",
            )
        elif part[0] in "|:" and opened:
            opened[-1] = part.strip()
