"""compel's syntax against the library: what it parses, and the states that it makes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compel import Compel, ReturnedEmbeddingsType
from compel.prompt_parser import Blend
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt import Engine
from latentrt.errors import PromptTruncatedWarning, RequestError
from latentrt.model.prompts.compel_syntax import Composed, Fragment, parse
from latentrt.model.text import Text
from latentrt_export.graphs.to_onnx import quiet
from latentrt_export.verify.checks import psnr
from tests.model.prompts.pipes import SETTINGS, drawn, pipeline

Exported = Callable[[str], tuple[Path, Path]]
BOUND = 2e-6  # of the states, relative to the largest
PSNR_BOUND = 60.0  # dB
PROMPTS = [
    "",
    "a cat, and a dog",
    "hello! world!!",
    "a cat++ and a dog",
    "a (red cat)1.3,b",
    '"a cat"0.5 dog',
    "a cat- on (a dog)0.7 c",
    "a (nested (deep cat)1.2 more)1.5",
    "x-y cat-- \\(paren\\)++",
    "(cat)+ (dog)-",
    "a ()0.5 b",
    'a "unclosed cat++',
    'a "cat. dog, owl"- x',
    "a.b++ c-d e+ cat +",
    "(cat)1.3.5 (a (b)c)2 d-3 (e)-4 cat++dog (cat)++dog",
    "(a, = b) c++",
    "(cat)0 dog",
    '("a cat", "a dog++").blend(1, 0.8)',
    '("a cat", "dog", owl).blend(1, -0.5, 2, no_normalize)',
    '("a cat-", "a dog").and()',
    '("a cat", "a = dog").and(1, 0.5)',
    pytest.param("a cat " * 60 + "dog++", id="a cat... dog++"),
    pytest.param("a cat " * 24 + "dog- " * 9 + "a- " * 30, id="a cat... dog- a-"),
    pytest.param("(" + "a cat " * 40 + ")0.8 dog", id="(a cat...)0.8"),
]


class Oracle:
    """compel with a pipeline's encoders, its settings those of its documentation, prompts truncated as by default."""

    def __init__(self, pipe: Any) -> None:
        kind = ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED
        second = getattr(pipe, "text_encoder_2", None)
        if second is None:
            self._each = [Compel(pipe.tokenizer, pipe.text_encoder)]
        else:
            self._each = [
                Compel(pipe.tokenizer, pipe.text_encoder, returned_embeddings_type=kind),
                Compel(pipe.tokenizer_2, second, returned_embeddings_type=kind),
            ]

    def __call__(self, prompt: str) -> np.ndarray[Any, Any]:
        with quiet(), torch.no_grad():
            return torch.cat([each.build_conditioning_tensor(prompt)[0] for each in self._each], dim=-1).numpy()

    def pooled(self, prompt: str) -> np.ndarray[Any, Any]:
        with quiet(), torch.no_grad():
            pooled = self._each[-1].conditioning_provider.get_pooled_embeddings([prompt])[0]
        return np.asarray(pooled.numpy())


@pytest.fixture(scope="module", params=["sd", pytest.param("sdxl", marks=pytest.mark.slow)])
def both(request: pytest.FixtureRequest, exported: Exported) -> Any:
    """Yield a text conditioner of ours, for prompts of any length, and compel."""
    _, bundle = exported(request.param)
    with Engine.load(bundle, threads=1, check_hashes=False) as engine:
        text = engine.model.text
        assert text is not None
        yield Text(text.encoders), Oracle(pipeline(bundle, request.param))


@pytest.mark.filterwarnings("ignore::latentrt.errors.PromptTruncatedWarning")
@pytest.mark.parametrize("prompt", PROMPTS)
def test_states_are_those_of_the_library(both: tuple[Text, Oracle], prompt: str) -> None:
    text, oracle = both
    ours, theirs = text.encode(prompt, "compel"), oracle(prompt)
    assert ours["encoder_hidden_states"].shape == theirs.shape
    assert np.abs(ours["encoder_hidden_states"] - theirs).max() <= BOUND * np.abs(theirs).max()
    if "text_embeds" in ours:
        np.testing.assert_allclose(ours["text_embeds"], oracle.pooled(prompt), atol=1e-5)


def as_ours(prompt: str) -> Composed | None:
    """Return what compel parses, in the form of ours; None where it raises."""
    try:
        found = Compel.parse_prompt_string(prompt)
    except Exception:
        return None
    blend = found.prompts[0] if found.prompts else None
    if isinstance(blend, Blend):
        prompts, weights, joined, normalized = blend.prompts, blend.weights, False, blend.normalize_weights
    else:
        prompts, weights, joined, normalized = found.prompts, found.weights, True, True
    fragments = [[Fragment(one.text, one.weight) for one in each.children] for each in prompts]
    return Composed(fragments or [[Fragment("", 1.0)]], list(weights) or [1.0], joined, normalized)


SYNTAX = st.lists(
    st.sampled_from([*'()"+-.,=\\ ', *"ab1", "++", "--", ")1.3", ')"', " (", '"a b"', ").blend(", ").and(", "1,2)"]),
    max_size=14,
)


@pytest.mark.slow
@settings(max_examples=1500, deadline=None)
@given(SYNTAX)
def test_parses_what_the_library_parses(parts: list[str]) -> None:
    check_parse("".join(parts))


@settings(max_examples=60, deadline=None)
@given(SYNTAX)
def test_parses_a_few_as_the_library_does(parts: list[str]) -> None:
    check_parse("".join(parts))


def check_parse(prompt: str) -> None:
    """Compare a parse. Where the library raises, ours may refuse or take the prompt as words."""
    theirs = as_ours(prompt)
    try:
        ours = parse(prompt)
    except RequestError:
        assert theirs is None or ".and(" in prompt, prompt  # what follows .and() is ignored by the library
        return
    if theirs is not None:
        assert ours.joined == theirs.joined, prompt
        assert ours.normalized == theirs.normalized, prompt
        assert np.allclose(ours.weights, theirs.weights), prompt
        for one, other in zip(ours.prompts, theirs.prompts, strict=True):
            assert [fragment.text for fragment in one] == [fragment.text for fragment in other], prompt
            assert np.allclose([fragment.weight for fragment in one], [fragment.weight for fragment in other]), prompt


@pytest.mark.parametrize("name", ["sd", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_pictures_are_those_of_the_library_and_the_pipeline(exported: Exported, name: str) -> None:
    _, bundle = exported(name)
    pipe, prompt, negative = pipeline(bundle, name), "a cat++ and (a dog)0.6", "dog-"
    oracle = Oracle(pipe)
    embeds = {
        "prompt_embeds": torch.from_numpy(oracle(prompt))[None],
        "negative_prompt_embeds": torch.from_numpy(oracle(negative))[None],
    }
    if name == "sdxl":
        embeds["pooled_prompt_embeds"] = torch.from_numpy(oracle.pooled(prompt))[None]
        embeds["negative_pooled_prompt_embeds"] = torch.from_numpy(oracle.pooled(negative))[None]
    theirs = drawn(pipe, None, **{"negative_prompt": None, **embeds})
    asked = {**SETTINGS, "negative_prompt": negative}
    with Engine.load(bundle, threads=1, check_hashes=False) as engine:
        (ours,) = engine(prompt, prompt_syntax="compel", **asked)
    assert psnr(np.asarray(ours), theirs) >= PSNR_BOUND
    assert ours.info["latentrt"]["prompt_syntax"] == "compel"


def test_what_is_dropped_is_told(both: tuple[Text, Oracle]) -> None:
    with pytest.warns(PromptTruncatedWarning, match="does not read: 'dog b c'"):
        both[0].encode("(" + "a " * 74 + ")1.1 x (dog b)0.9 c", "compel")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a cat.swap(dog)", "has '.swap"),
        ("a withLora(x, 1)", "has 'withLora"),
        ('("a", "b").blend(1, 1) c', "follows .blend"),
        ('("a", "b").blend(1)', "1 weights for 2 prompts"),
        ('("a", "b").and(x, 1)', "no numbers"),
        ('("a", "b").blend(1, -1)', "sum up to 0"),
        ("(a)1e9 (b)99999", "weight 99999"),
        ("(a " * 60, "nested over 50 deep"),
        ("a-- b- " * 40, "over 64 parts"),
    ],
)
def test_what_cannot_be_read_is_refused(both: tuple[Text, Oracle], prompt: str, message: str) -> None:
    with pytest.raises(RequestError, match=message.replace("(", r"\(")):
        both[0].encode(prompt, "compel")
