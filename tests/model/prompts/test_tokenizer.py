"""Token ids against transformers' CLIPTokenizer, for every way in which checkpoints write their tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers.loaders import TextualInversionLoaderMixin
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from latentrt.bundle.bundle import EMBEDDED
from latentrt.errors import BundleError, OutputError, RequestError
from latentrt.model.prompts.tokenizer import Tokenizer

EMOJI = EMBEDDED / "tokenizer"
START, END = "<|startoftext|>", "<|endoftext|>"
START_ID, END_ID = 2046, 2047

TEXTS = [
    "",
    " ",
    " \t\r\n\u3000 ",
    "an apple",
    "A Dog   and\n\tTHE cat",
    "it's don't you're I've I'm he'll she'd 'S 'T IT'S rock'n'roll",
    "hello! world!",
    "!",
    "!!! ...???  --> (a:1.2) [b] {c} \\ / | ~ ^ _ # $ % & * @",
    "0123456789 3.14 1,000 ² ½ Ⅷ ४२",
    "é e\u0301 É ﬁ İstanbul ß ẞ \u017f Å",
    "日本語 русский हिन्दी العربية ไทย 한국어",
    "🍎 👩‍👩‍👧 🇫🇷 ❤️ \U000e0041",
    "x\0y\x01\x7f\u200b\ufeff\ufffd",
    f"{END} hi <|ENDOFTEXT|> {START}{START} a{END}b <|endoftext |>",
    "<cat-toy> <CAT-TOY> a<cat-toy>b",
    "apple " * 100,
    "🍎" * 80,
    "a" * 500,
    "supercalifragilisticexpialidocious " * 30,
    f"pear {END} " * 40,
]


def token(content: str, normalized: bool, **more: object) -> dict[str, Any]:
    return {
        "content": content,
        "lstrip": False,
        "normalized": normalized,
        "rstrip": False,
        "single_word": False,
        **more,
    }


NAMED_OBJECTS = {
    "bos_token": token(START, True),
    "eos_token": token(END, True),
    "unk_token": token(END, True),
}
NAMED_TYPED = {name: {"__type": "AddedToken", **value} for name, value in NAMED_OBJECTS.items()}
NAMED_TEXTS = {"bos_token": START, "eos_token": END, "unk_token": END}
LENGTH = {"model_max_length": 77}
CHECKPOINTS: dict[str, dict[str, dict[str, Any]]] = {  # the small files, as well-known checkpoints have them
    "sd1": {
        "tokenizer_config.json": {**NAMED_TYPED, **LENGTH, "pad_token": END},
        "special_tokens_map.json": {**NAMED_OBJECTS, "pad_token": END},
    },
    "sd2": {
        "tokenizer_config.json": {**NAMED_TYPED, **LENGTH, "pad_token": END},
        "special_tokens_map.json": {**NAMED_OBJECTS, "pad_token": "!"},
    },
    "sdxl-second": {
        "tokenizer_config.json": {
            **NAMED_TEXTS,
            **LENGTH,
            "pad_token": "!",
            "added_tokens_decoder": {
                "0": token("!", False, special=True),
                str(START_ID): token(START, True, special=False),  # so in the published files
                str(END_ID): token(END, False, special=False),
            },
        },
    },
    "only-length": {"tokenizer_config.json": LENGTH},
    "textual-inversion-old": {
        "tokenizer_config.json": {**NAMED_TEXTS, **LENGTH, "pad_token": "!"},
        "added_tokens.json": {"<cat-toy>": 2048, "<b>": 2049},
    },
    "textual-inversion": {
        "tokenizer_config.json": {
            **LENGTH,
            "added_tokens_decoder": {
                str(START_ID): token(START, True, special=True),
                str(END_ID): token(END, False, special=True),
                "2048": token("<cat-toy>", True, special=False),
            },
        },
    },
}


def write_checkpoint(folder: Path, name: str, *, with_json: bool) -> Path:
    """Write a tokenizer folder with the embedded model's vocabulary and the small files of another checkpoint."""
    folder.mkdir(parents=True)
    for file in ("vocab.json", "merges.txt", *(["tokenizer.json"] if with_json else [])):
        shutil.copy(EMOJI / file, folder)
    for file, content in CHECKPOINTS[name].items():
        (folder / file).write_text(json.dumps(content), encoding="utf-8")
    return folder


def write_tiny(folder: Path, **config: object) -> Path:
    """Write the smallest CLIP vocabulary: all bytes, alone and at a word's end, and a few merges."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = list(json.loads((EMOJI / "vocab.json").read_text(encoding="utf-8")))[:256]
    merges = ["a p", "l e</w>", "ap p", "app le</w>", "c a", "ca t</w>"]
    pieces = [
        *letters,
        *(f"{letter}</w>" for letter in letters),
        *(m.replace(" ", "") for m in merges),
        START,
        END,
    ]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 77, **config}), encoding="utf-8")
    return folder


def reference_ids(reference: CLIPTokenizer, text: str, length: int = 77) -> list[int]:
    ids = reference(text, padding="max_length", truncation=True, max_length=length).input_ids
    return list(map(int, ids))


@pytest.fixture(scope="module")
def emoji() -> Tokenizer:
    return Tokenizer.open(EMOJI)


@pytest.fixture(scope="module")
def emoji_reference() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(EMOJI)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_transformers(emoji: Tokenizer, emoji_reference: CLIPTokenizer, text: str) -> None:
    ids = emoji.encode(text).ids
    assert ids.dtype == np.int64
    assert ids.shape == (77,)
    assert ids.tolist() == reference_ids(emoji_reference, text)


@given(st.lists(st.one_of(st.text(), st.sampled_from([*TEXTS, END, START.upper(), "'ll", "  "]))).map("".join))
@settings(deadline=None, max_examples=300)
def test_ids_of_any_text_are_those_of_transformers(emoji: Tokenizer, emoji_reference: CLIPTokenizer, text: str) -> None:
    assert emoji.encode(text).ids.tolist() == reference_ids(emoji_reference, text)


@pytest.mark.parametrize("with_json", [False, True])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_checkpoints_files_are_read_as_transformers_does(tmp_path: Path, name: str, with_json: bool) -> None:
    folder = write_checkpoint(tmp_path / name, name, with_json=with_json)
    ours, reference = Tokenizer.open(folder), CLIPTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert ours.encode(text).ids.tolist() == reference_ids(reference, text), text


def test_padding_with_an_exclamation_mark_also_takes_it_from_the_prompt(tmp_path: Path) -> None:
    """Golden ids: SD 1 and SD 2 must differ here, or the test above compares nothing."""
    first, second = (
        Tokenizer.open(write_checkpoint(tmp_path / name, name, with_json=False)).encode("apple!").ids.tolist()
        for name in ("sd1", "sd2")
    )
    assert first[-1] == END_ID
    assert second[-1] == second[2] == 0
    assert first[1] == second[1]
    assert first[2] not in {0, END_ID}


def test_tiny_vocabulary(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path)
    ours, reference = Tokenizer.open(folder), CLIPTokenizer.from_pretrained(folder)
    assert ours.encode("Apple cat").ids[:4].tolist() == [518, 515, 517, 519]
    for text in TEXTS:
        assert ours.encode(text).ids.tolist() == reference_ids(reference, text), text


def test_without_a_configuration_clips_own_rules_hold(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path)
    wanted = Tokenizer.open(folder).encode("a cat").ids
    (folder / "tokenizer_config.json").unlink()
    np.testing.assert_array_equal(Tokenizer.open(folder).encode("a cat").ids, wanted)


@pytest.mark.parametrize("length", [3, 8, 248])
def test_other_lengths(tmp_path: Path, length: int) -> None:
    folder = write_tiny(tmp_path, model_max_length=length)
    ours, reference = Tokenizer.open(folder), CLIPTokenizer.from_pretrained(folder)
    assert ours.encode("cat " * 20).ids.tolist() == reference_ids(reference, "cat " * 20, length)


def test_unknown_length_is_clips(tmp_path: Path) -> None:
    assert Tokenizer.open(write_tiny(tmp_path, model_max_length=int(1e30), pad_token=None)).encode("a").ids.size == 77


# What did not fit


def test_dropped_is_the_end_of_the_prompt_as_typed(tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(write_tiny(tmp_path, model_max_length=5))
    assert tokenizer.encode("Cat APPLE cat").dropped == ""
    assert tokenizer.encode("Cat  APPLE\tcat  Apple, CAT").dropped == "Apple, CAT"
    assert tokenizer.encode("cat cat catx").dropped == "tx"
    assert tokenizer.encode("cat cat 🍎 cat").dropped == "🍎 cat"  # the cut is inside the apple's four bytes


@given(text=st.text(min_size=30, max_size=300))
@settings(deadline=None, max_examples=200)
def test_something_is_dropped_exactly_when_there_are_more_than_75_tokens(
    emoji: Tokenizer, emoji_reference: CLIPTokenizer, text: str
) -> None:
    dropped = emoji.encode(text).dropped
    assert text.endswith(dropped)
    assert (dropped != "") == (len(emoji_reference(text, verbose=False).input_ids) > 77)


def test_a_prompt_of_exactly_75_tokens_fits(emoji: Tokenizer) -> None:
    assert emoji.encode("apple " * 75).dropped == ""
    assert emoji.encode("apple " * 76).dropped == "apple "


# Files


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_written_json_is_the_same_tokenizer(tmp_path: Path, name: str) -> None:
    folder = write_checkpoint(tmp_path / "old", name, with_json=False)
    tokenizer = Tokenizer.open(folder)
    new = tmp_path / "new"
    new.mkdir()
    tokenizer.write_json(new / "tokenizer.json")
    for file in CHECKPOINTS[name]:
        shutil.copy(folder / file, new)
    again, reference = Tokenizer.open(new), CLIPTokenizer.from_pretrained(new)
    for text in TEXTS:
        wanted = tokenizer.encode(text).ids.tolist()
        assert again.encode(text).ids.tolist() == wanted
        assert reference_ids(reference, text) == wanted


def test_a_json_that_cannot_be_written(tmp_path: Path, emoji: Tokenizer) -> None:
    with pytest.raises(OutputError, match=r"tokenizer\.json cannot be written"):
        emoji.write_json(tmp_path / "missing" / "tokenizer.json")


def test_truncation_and_padding_in_the_json_do_not_matter(tmp_path: Path, emoji: Tokenizer) -> None:
    from tokenizers import Tokenizer as Core

    core = Core.from_file(str(EMOJI / "tokenizer.json"))
    core.enable_truncation(10)
    core.enable_padding(length=20)
    core.save(str(tmp_path / "tokenizer.json"))
    shutil.copy(EMOJI / "tokenizer_config.json", tmp_path)
    for text in TEXTS:
        np.testing.assert_array_equal(Tokenizer.open(tmp_path).encode(text).ids, emoji.encode(text).ids)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_missing_files_are_named(tmp_path: Path, name: str) -> None:
    (write_tiny(tmp_path) / name).unlink()
    with pytest.raises(BundleError, match=rf"neither tokenizer\.json nor {name}"):
        Tokenizer.open(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b""),
        ("tokenizer.json", b'{"version": "1.0"}'),
        ("tokenizer_config.json", b'{"pad_token": '),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b"\xff\xfe"),
        ("tokenizer_config.json", b'{"model_max_length": "77"}'),
        ("tokenizer_config.json", b'{"model_max_length": 2}'),
        ("tokenizer_config.json", b'{"pad_token": {"text": "!"}}'),
        ("tokenizer_config.json", b'{"pad_token": 7}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": ["a"]}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"first": "a"}}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"9000": "<new>"}}'),
        ("special_tokens_map.json", b"{"),
        ("added_tokens.json", b'"text"'),
        ("vocab.json", b'{"a": "b"}'),
        ("vocab.json", b"\x00"),
        ("merges.txt", b"#version: 0.2\nq z\n"),
        ("merges.txt", b"#version: 0.2\nnospace\n"),
    ],
)
def test_corrupt_files_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    (write_tiny(tmp_path) / name).write_bytes(content)
    with pytest.raises(BundleError) as caught:
        Tokenizer.open(tmp_path)
    assert name in caught.value.found


@pytest.mark.parametrize("name", ["bos_token", "eos_token", "unk_token", "pad_token"])
def test_special_tokens_must_be_in_the_vocabulary(tmp_path: Path, name: str) -> None:
    with pytest.raises(BundleError, match="<missing>"):
        Tokenizer.open(write_tiny(tmp_path, **{name: "<missing>"}))


# Prompts that are none


@pytest.mark.parametrize("text", [b"bytes", None, 7, ["a"]])
def test_only_text_is_a_prompt(emoji: Tokenizer, text: object) -> None:
    with pytest.raises(RequestError, match="a prompt of type"):
        emoji.encode(text)  # type: ignore[arg-type]


def test_bytes_that_were_not_utf8_are_shown_with_their_place(emoji: Tokenizer) -> None:
    typed = b"an \xff apple".decode("utf-8", "surrogateescape")  # as Python decodes a command line
    with pytest.raises(RequestError, match=r"'\\udcff', at character 3"):
        emoji.encode(typed)


@pytest.mark.parametrize(
    "prompt", ["a <toy> on a <hat>, <toy>", "<toy>_1 only", "a<toy>b <TOY>", "<|endoftext|> <cap>"]
)
def test_a_textual_inversion_of_several_vectors_stands_for_all_of_them(tmp_path: Path, prompt: str) -> None:
    """As diffusers' pipelines replace it in the prompt before they tokenize it."""
    reference = CLIPTokenizer.from_pretrained(EMOJI)
    reference.add_tokens(["<toy>", "<toy>_1", "<toy>_2", "<hat>", "<cap>", "<cap>_2"])
    reference.save_pretrained(tmp_path)
    converted = TextualInversionLoaderMixin().maybe_convert_prompt(prompt, reference)
    ids = reference(converted, padding="max_length", max_length=77, truncation=True).input_ids
    assert Tokenizer.open(tmp_path).encode(prompt).ids.tolist() == ids
    assert ids.count(reference.convert_tokens_to_ids("<toy>_2")) == prompt.count("<toy>") - prompt.count("<toy>_1")
