"""A1111's syntax: pieces and chunks by its rules, written down by hand, and states that torch makes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentrt import Engine
from latentrt.errors import RequestError
from latentrt.model.prompts.a1111 import MOST_CHUNKS, pieces_of, read
from latentrt.model.prompts.tokenizer import GIVEN, Tokenizer
from latentrt.model.text import Text
from latentrt_export.verify.checks import psnr
from tests.model.prompts.pipes import SETTINGS, drawn, pipeline

Exported = Callable[[str], tuple[Path, Path]]


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("", [("", 1.0)]),
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("an [idle] word", [("an ", 1.0), ("idle", 1 / 1.1), (" word", 1.0)]),
        ("(unclosed", [("unclosed", 1.1)]),
        ("a (b [c", [("a ", 1.0), ("b ", 1.1), ("c", 1.0)]),
        ("closed) twice]", [("closed) twice]", 1.0)]),
        ("(one)(two)", [("onetwo", 1.1)]),
        (r"\(literal\] \\ \x", [(r"(literal] \ x", 1.0)]),
        (r"(a \(b\):1.5)", [("a (b)", 1.5)]),
        ("(red: 1.3 ) a:b :1.2)", [("red", 1.3), (" a:b :1.2)", 1.0)]),
        ("(x:-.5)(y:+2)(z:0)", [("x", -0.5), ("y", 2.0), ("z", 0.0)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1.0),
                ("house", 1.3 * 1.1 * 1.1),
                (" ", 1.1),
                ("on", 1.0),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.1**4),
                (".", 1.1),
            ],
        ),
        ("a BREAK b BREAKS", [("a", 1.0), ("BREAK", -1.0), ("b BREAKS", 1.0)]),
        ("BREAK BREAK", [("", 1.0), ("BREAK", -1.0), ("", 1.0), ("BREAK", -1.0), ("", 1.0)]),
        ("(a BREAK b:1.5)", [("a", 1.5), ("BREAK", -1.5), ("b", 1.5)]),
    ],
)
def test_pieces(prompt: str, pieces: list[tuple[str, float]]) -> None:
    found = pieces_of(prompt)
    assert [piece.text for piece in found] == [text for text, _ in pieces]
    assert [piece.weight for piece in found] == pytest.approx([weight for _, weight in pieces])


@pytest.fixture(scope="module")
def tokenizers(exported: Exported) -> list[Tokenizer]:
    """Return SDXL's two: the first pads with the end, the second with "!"."""
    return [Tokenizer.open(exported("sdxl")[0] / name) for name in ("tokenizer", "tokenizer_2")]


def row(tokenizer: Tokenizer, *tokens: str) -> list[int]:
    """Return 77 ids of words that are one token each, with padding after the end."""
    ids = [tokenizer.start, *(number for word in tokens for number in tokenizer.tokens(word)), tokenizer.end]
    return ids + [tokenizer.pad] * (77 - len(ids))


# Chunks as lists of words of one token each, derived from the rules: 75 tokens, comma backtrack 20, BREAK.
CHUNKS: dict[str, tuple[str, list[list[str]]]] = {
    "75": ("a " * 75, [["a"] * 75]),
    "76": ("a " * 76, [["a"] * 75, ["a"]]),
    "no comma": ("a " * 160, [["a"] * 75, ["a"] * 75, ["a"] * 10]),
    "comma 20 back": ("a " * 55 + ", " + "b " * 20, [["a"] * 55 + [","], ["b"] * 20]),
    "comma 21 back": ("a " * 54 + ", " + "b " * 21, [["a"] * 54 + [","] + ["b"] * 20, ["b"]]),
    "last comma": ("a " * 60 + ", b b , " + "c " * 12, [["a"] * 60 + [",", "b", "b", ","], ["c"] * 12]),
    "comma is the 75th": ("a " * 74 + ", b", [["a"] * 74 + [","], ["b"]]),
    "comma is the 76th": ("a " * 75 + ", b", [["a"] * 75, [",", "b"]]),
    "break": ("a BREAK b", [["a"], ["b"]]),
    "break at the end": ("a BREAK", [["a"]]),
    "break at the start": ("BREAK a", [[], ["a"]]),
    "two breaks": ("a BREAK BREAK b", [["a"], [], ["b"]]),
    "break forgets commas": ("a , BREAK " + "b " * 76, [["a", ","], ["b"] * 75, ["b"]]),
}


@pytest.mark.parametrize("case", CHUNKS)
def test_chunks(tokenizers: list[Tokenizer], case: str) -> None:
    prompt, words = CHUNKS[case]
    for tokenizer in tokenizers:
        reading = read(prompt, tokenizer)
        assert [each.ids.tolist() for each in reading.rows] == [row(tokenizer, *each) for each in words]
        assert reading.tokens == 77 * len(words)
        assert reading.pooled is reading.rows[0]
        assert reading.plain == (len(words) == 1)
        assert (reading.weights == 1).all()


def test_weights_are_those_of_the_tokens(tokenizers: list[Tokenizer]) -> None:
    reading = read("a (cat dog:1.5) " + "b " * 71 + "[a], BREAK (c:0.5)", tokenizers[0])
    expected = np.ones((3, 77), np.float32)
    expected[0, 2:4], expected[0, 75], expected[2, 1] = 1.5, 1 / 1.1, 0.5
    np.testing.assert_array_equal(reading.weights, expected)


def test_an_exclamation_mark_is_a_word_although_it_pads(tokenizers: list[Tokenizer]) -> None:
    """OpenCLIP's own tokenizer, which the web UI uses, knows no padding token; "!!" is "!" and "!</w>" here."""
    first, second = (read("a!! cat", tokenizer).rows[0].ids for tokenizer in tokenizers)
    assert first[1:5].tolist() == second[1:5].tolist()
    assert first[2:4].tolist() == [0, 256]
    assert tokenizers[1].tokens("a!! cat")[1:3] == [0, 0]


def test_vectors_of_one_embedding_stay_together(tokenizers: list[Tokenizer]) -> None:
    taught = tokenizers[0].with_vectors({"<one>": 1, "<two>": 3})
    reading = read("a " * 72 + "<one> <two> b", taught)
    (a,), (b,), given = taught.tokens("a"), taught.tokens("b"), list(range(GIVEN, GIVEN + 4))
    assert reading.rows[0].ids[1:75].tolist() == [*[a] * 72, given[0], taught.end]
    assert reading.rows[1].ids[1:6].tolist() == [*given[1:], b, taught.end]
    assert reading.given


BOUND = 1e-4  # of the states: those of random weights have a mean near 0, whose ratio magnifies rounding
PSNR_BOUND = 60.0  # dB
PROMPTS = [
    "a (cat:1.4) and [a dog]",
    "((a cat)) " + "a dog, " * 40 + "(owl:0.3)",
    "a cat BREAK (a dog:1.7) BREAK b",
]


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_states_are_multiplied_and_their_mean_is_kept(exported: Exported, name: str) -> None:
    _, bundle = exported(name)
    pipe = pipeline(bundle, name)
    with Engine.load(bundle, threads=1, check_hashes=False) as engine:
        assert engine.model.text is not None
        text = Text(engine.model.text.encoders)
        for prompt in PROMPTS:
            ours = text.encode(prompt, "a1111")
            theirs, pooled = by_torch(pipe, prompt, [one.tokenizer for one in text.encoders])
            assert np.abs(ours["encoder_hidden_states"] - theirs).max() <= BOUND * np.abs(theirs).max()
            if name == "sdxl":
                np.testing.assert_allclose(ours["text_embeds"], pooled, atol=1e-5)


@pytest.mark.parametrize("more", ["", " BREAK (b:0.7)"])
def test_pictures_are_those_of_the_pipeline_with_these_states(exported: Exported, more: str) -> None:
    _, bundle = exported("sd")
    pipe, prompt, negative = pipeline(bundle, "sd"), f"a (cat:1.4){more}", f"[a dog]{more}"
    with Engine.load(bundle, threads=1, check_hashes=False) as engine:
        assert engine.model.text is not None
        tokenizers = [engine.model.text.encoders[0].tokenizer]
        (ours,) = engine(prompt, prompt_syntax="a1111", **{**SETTINGS, "negative_prompt": negative})
    embeds = [torch.from_numpy(by_torch(pipe, text, tokenizers)[0])[None] for text in (prompt, negative)]
    theirs = drawn(pipe, None, prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1], negative_prompt=None)
    assert psnr(np.asarray(ours), theirs) >= PSNR_BOUND
    assert ours.info["latentrt"]["prompt_syntax"] == "a1111"


def by_torch(pipe: Any, prompt: str, tokenizers: list[Tokenizer]) -> tuple[np.ndarray[Any, Any], Any]:
    """Encode chunk by chunk with transformers' models, multiply, and restore each chunk's mean, as the web UI does."""
    wholes, pooled = [], None
    for index, tokenizer in enumerate(tokenizers):
        encoder = pipe.text_encoder if index == 0 else pipe.text_encoder_2
        reading, parts = read(prompt, tokenizer), []
        for number, (ids, weights) in enumerate(zip(reading.rows, reading.weights, strict=True)):
            with torch.no_grad():
                out = encoder(torch.from_numpy(ids.ids)[None], output_hidden_states=True)
            z = (out.last_hidden_state if len(tokenizers) == 1 else out.hidden_states[-2])[0]
            weighed = z * torch.from_numpy(weights)[:, None]
            parts.append(weighed * (z.mean() / weighed.mean()))
            if index == 1 and number == 0:
                pooled = out.text_embeds[0].numpy()
        wholes.append(torch.cat(parts))
    return torch.cat(wholes, dim=-1).numpy(), pooled


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a <hypernet:x:1> b", "has <hypernet:x:1>"),
        ("a cat AND a dog", "has AND"),
        ("a [cat:dog:0.5]", r"changes with the steps: there is ':0.5'"),
        ("a [(cat:1.2):5]", r"changes with the steps: there is ':5'"),
        ("a [cat|dog]", r"changes with the steps: there is '\|'"),
        ("(a:1.2.3)", "the weight 1.2.3"),
        ("(a:99999)", "the weight 99999"),
        ("(" * 101, "over 100 open"),
        ("a " * 75 * MOST_CHUNKS + "a", f"takes {MOST_CHUNKS + 1} chunks"),
    ],
)
def test_what_is_not_offered_is_refused(tokenizers: list[Tokenizer], prompt: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read(prompt, tokenizers[0])


@pytest.mark.parametrize("prompt", [r"a \[b|c\]", "a [b:c]", "[a (b:1.2)]", "a | b: c", "sand and <3 [", "<a", "[a:1"])
def test_what_only_looks_alike_is_text(tokenizers: list[Tokenizer], prompt: str) -> None:
    read(prompt, tokenizers[0])
