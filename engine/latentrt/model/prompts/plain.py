"""Prompts without syntax, as diffusers' pipelines read them: every character counts, what does not fit is dropped."""

from __future__ import annotations

import numpy as np

from latentrt.model.prompts.reading import Reading, Row, first
from latentrt.model.prompts.tokenizer import Tokenizer


def read(prompt: str, tokenizer: Tokenizer) -> Reading:
    """Return the reading of a prompt. Raise RequestError where it is no text."""
    encoded = tokenizer.encode(prompt)
    row = Row(encoded.ids)
    return Reading((row,), np.ones((1, tokenizer.length), np.float32), first, tokenizer.length, row, encoded.dropped)
