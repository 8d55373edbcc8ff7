"""What a model does not read as its writer may have meant it is told."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from latentrt import Engine
from latentrt.errors import PromptSyntaxWarning, RequestError
from latentrt.model.prompts.registry import GRAMMARS, foreign
from latentrt.model.text import Text
from latentrt.request import SYNTAXES

Exported = Callable[[str], tuple[Path, Path]]


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("a (red:1.3) cat", ("(red:1.3)", "a1111")),
        ("((red)) cat", ("((red))", "a1111")),
        ("a BREAK b", ("BREAK", "a1111")),
        ("a cat++, b", ("++", "compel")),
        ("a cat--", ("--", "compel")),
        ("(a cat)1.3", (")1", "compel")),
        ('("a", "b").blend(1, 2)', (").blend(", "compel")),
        ("a <lora:x:1>", ("<lora:x:1>", "a1111")),
        ("a <hypernet:x:1>", ("<hypernet:x:1>", None)),
        ("a (red) cat: 1.3, [b] - c+ 18+ (3) a-b", None),
        (r"\(red:1.3) <3 <b> daybreak", None),
    ],
)
def test_syntax_that_a_plain_prompt_has(prompt: str, found: tuple[str, str | None] | None) -> None:
    assert foreign(prompt, "plain") == found
    if found is not None and found[1] is not None:
        assert foreign(prompt, found[1]) is None
        assert f"--prompt-syntax {found[1]}" in str(foreign(prompt, "plain"))


def test_it_is_told_once(exported: Exported) -> None:
    with Engine.load(exported("sd")[1], threads=1, check_hashes=False) as engine:
        assert engine.model.text is not None
        text = Text(engine.model.text.encoders)
        with pytest.warns(PromptSyntaxWarning, match=r"--prompt-syntax a1111\) reads it"):
            text.encode("a (red:1.3) cat")
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            text.encode("a (red:1.4) cat")
    assert not told


def test_a_denoiser_of_77_tokens_refuses_more(exported: Exported) -> None:
    with Engine.load(exported("sd")[1], threads=1, check_hashes=False) as engine:
        assert engine.model.text is not None
        older = Text(engine.model.text.encoders, most=77)
        older.encode("a cat", "a1111")
        with pytest.raises(
            RequestError, match=r"takes 154 tokens, and the denoiser .* reads 77.*export the checkpoint"
        ):
            older.encode("a BREAK b", "a1111")


def test_an_older_text_encoder_refuses_what_it_lacks(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "toy.safetensors"
    save_file({"emb_params": np.ones((1, 32), np.float32)}, path)
    with Engine.load(exported("sd")[1], threads=1, check_hashes=False) as engine:
        assert engine.model.text is not None
        (encoder,) = engine.model.text.encoders
        graph = encoder.network.graph
        graph = type(graph)(graph.path, graph.opset, graph.nodes, graph.inputs[:1], graph.outputs[:1])
        monkeypatch.setattr(type(encoder.network), "graph", property(lambda self: graph))
        for asked, message in (
            ({"clip_skip": 1}, "takes no clip_skip"),
            ({"prompt_syntax": "compel"}, "takes no weights below 1"),
            ({"embeddings": {"<toy>": path}}, "takes no embeddings"),
        ):
            with pytest.raises(RequestError, match=message):
                engine("a cat-", steps=1, **asked)


def test_syntaxes_have_grammars() -> None:
    assert tuple(GRAMMARS) == SYNTAXES
