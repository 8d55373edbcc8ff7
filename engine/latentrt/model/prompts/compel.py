"""Prompts in the syntax of compel: weights relative to the empty prompt, blends, several prompts one after the other.

A weight w moves a token's state away from the empty prompt's: empty + w · (state - empty). One below 1 also blends
with the prompt in which the encoder does not attend to that fragment, by tan((1 - w) · π/2). What does not fit into
77 tokens is dropped.

Source: compel 2.5.1, compel/embeddings_provider.py and compel.py, with `truncate_long_prompts=True` as by default.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from latentrt.errors import RequestError
from latentrt.model.prompts.compel_syntax import Composed, Prompt, parse
from latentrt.model.prompts.reading import Float32, Ids, Reading, Row, first
from latentrt.model.prompts.tokenizer import Tokenizer, check_text

SIGNS = re.compile(
    r"(?<=[\w)\"'])(?:\+\++|--+)(?=[\s,.)\"]|\Z)"  # word++
    r"|(?<!\\)\)(?:\d|\.\d)"  # (some words)1.3
    r"|\)\s*\.(?:blend|and)\("
)
LEAST = 1e-5  # the least weight: its tangent would be infinite
MOST_WEIGHT, MOST_ROWS = 1000.0, 64


class Term(NamedTuple):
    """One of the states that are summed: a row by its index, with the weights of its tokens, times a factor."""

    row: int
    weights: Float32
    factor: float


class Part(NamedTuple):
    """77 tokens of the result: a sum of terms, moved away from the empty prompt."""

    terms: list[Term]
    weight: float


class _Rows:
    """Rows of a reading, each once."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def index(self, row: Row) -> int:
        """Return a row's index; add it, if it is new."""
        for index, known in enumerate(self.rows):
            if np.array_equal(known.ids, row.ids) and np.array_equal(_mask(known), _mask(row)):
                return index
        if len(self.rows) == MOST_ROWS:
            raise RequestError(f"the prompt has over {MOST_ROWS} parts to encode", needed="fewer weights below 1")
        self.rows.append(row)
        return len(self.rows) - 1


def read(prompt: str, tokenizer: Tokenizer) -> Reading:
    """Return the reading of a prompt.

    The pooled state is that of the prompt as it was typed, signs included: compel takes it so.

    Raises:
        RequestError: it is no text, compel could not read it, or it has what is not offered here.
    """
    check_text(prompt)
    composed, rows = parse(prompt), _Rows()
    _check_weights(composed)
    terms = [_terms(fragments, tokenizer, rows) for fragments in composed.prompts]
    parts = _parts(composed, terms)
    plain = all(part.weight == 1 and all((term.weights == 1).all() for term in part.terms) for part in parts)
    empty = 0 if plain else rows.index(Row(tokenizer.padded([])))
    combine = first if plain and len(parts) == len(rows.rows) == 1 else partial(_combined, parts, empty)
    typed = Row(tokenizer.encode(prompt).ids)
    pooled = next((row for row in rows.rows if row.mask is None and np.array_equal(row.ids, typed.ids)), typed)
    weights = np.ones((len(rows.rows), tokenizer.length), np.float32)
    for term in (term for part in parts for term in part.terms):
        weights[term.row] = term.weights
    dropped = " ".join(filter(None, (_dropped(fragments, tokenizer) for fragments in composed.prompts)))
    return Reading(tuple(rows.rows), weights, combine, len(parts) * tokenizer.length, pooled, dropped)


def _check_weights(composed: Composed) -> None:
    weights = [*composed.weights, *(fragment.weight for prompt in composed.prompts for fragment in prompt)]
    if too_large := [weight for weight in weights if not abs(weight) <= MOST_WEIGHT]:
        raise RequestError(f"the prompt has the weight {too_large[0]:g}", needed=f"at most {MOST_WEIGHT:g}")
    if not composed.joined and composed.normalized and abs(sum(composed.weights)) < LEAST:
        raise RequestError("the weights of .blend() sum up to 0", needed="another sum, or no_normalize behind them")


def _terms(fragments: Prompt, tokenizer: Tokenizer, rows: _Rows) -> list[Term]:
    """Return what is summed for one prompt: its states, and for each weight below 1 those without that fragment."""
    ids: list[int] = []
    weights, spans = np.ones(tokenizer.length, np.float32), list[tuple[int, int, float]]()
    for text, weight in fragments:
        own = tokenizer.tokens(text)[: tokenizer.room]
        start, end = 1 + len(ids), 1 + len(ids) + len(own)
        weights[start : min(end, tokenizer.length - 1)] = weight
        if weight < 1 and own and start < tokenizer.length - 1:
            spans.append((start, end if end < tokenizer.length else tokenizer.length, weight))
        ids += own
    row = tokenizer.padded(ids[: tokenizer.room])
    found = [(rows.index(Row(row)), 1.0)]
    for start, end, weight in spans:
        mask = np.ones(tokenizer.length, np.int64)
        mask[start:end] = 0
        found.append((rows.index(Row(row, mask)), math.tan((1 - max(weight, LEAST)) * math.pi / 2)))
    total = sum(factor for _, factor in found)
    return [Term(index, weights, factor / total) for index, factor in found]


def _parts(composed: Composed, terms: list[list[Term]]) -> list[Part]:
    """Return the parts of the result: one for each prompt that is joined, one for a blend."""
    if composed.joined:
        return [Part(own, weight) for own, weight in zip(terms, composed.weights, strict=True)]
    total = sum(composed.weights) if composed.normalized else 1.0
    factors = [weight / total for weight in composed.weights]
    blended = [
        term._replace(factor=term.factor * factor) for own, factor in zip(terms, factors, strict=True) for term in own
    ]
    return [Part(blended, 1.0)]


def _combined(parts: Sequence[Part], empty: int, states: Float32) -> Float32:
    """Return the prompt's states of the rows' (rows, 77, dim)."""
    nothing, joined = states[empty], []
    for part in parts:
        total = np.zeros_like(nothing)
        for term in part.terms:
            weights, own = term.weights[:, None], states[term.row]
            total += np.float32(term.factor) * np.where(weights == 1, own, nothing + (own - nothing) * weights)
        joined.append(total if part.weight == 1 else nothing + (total - nothing) * np.float32(part.weight))
    return np.concatenate(joined)


def _dropped(fragments: Prompt, tokenizer: Tokenizer) -> str:
    room, dropped = tokenizer.room, list[str]()
    for text, _ in fragments:
        count = len(tokenizer.tokens(text))
        if count > room:
            dropped.append(tokenizer.beyond(text, room))
        room = max(0, room - count)
    return " ".join(dropped)


def _mask(row: Row) -> Ids:
    return np.ones_like(row.ids) if row.mask is None else row.mask
