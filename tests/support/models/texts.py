"""Text states for UNets: a trained one magnifies rounding tenfold and more where its texts are noise."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from latentrt.bundle.bundle import EMBEDDED, Bundle
from latentrt.model.prompts.encoder import feeds_of
from latentrt.model.prompts.tokenizer import Tokenizer
from latentrt.runtime.base import call
from latentrt.runtime.onnxruntime import OrtBackend

PROMPTS = ("a red apple", "", "a cat face", "an owl", "three rockets", "a house")


@cache
def known() -> NDArray[np.float32]:
    """Return the embedded model's text states for `PROMPTS`, (6, 77, 192)."""
    bundle = Bundle.open(EMBEDDED, check_hashes=False)
    tokenizer = Tokenizer.open(bundle.path(str(bundle.spec.networks["text_encoder"].tokenizer)))
    ids = np.stack([tokenizer.encode(prompt).ids for prompt in PROMPTS])
    encoder = OrtBackend(threads=1).load(bundle, "text_encoder")
    return np.asarray(call(encoder, feeds_of(encoder, ids))["text_states"])


def told(bundle: Bundle, lanes: int, random: np.random.Generator) -> dict[str, NDArray[np.float32]]:
    """Return what the embedded model's denoiser reads of some of `known`: their keys and values."""
    network = OrtBackend(threads=1).load(bundle, "unet_text")
    return call(network, {"encoder_hidden_states": random.permutation(known())[:lanes]})


def states(shape: Sequence[int], random: np.random.Generator) -> NDArray[np.float32]:
    """Return some of `known` where they fit the embedded model; else normal numbers, as for random weights."""
    if tuple(shape[1:]) == known().shape[1:]:
        return random.permutation(known())[: shape[0]]
    return random.standard_normal(shape, np.float32)
