"""The tokenizer: byte-level BPE in CLIP's files, learnt from the emoji's names and tags."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from captions import COLOURS, COMMON, NUMBERS
from data import load
from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer

ENTRIES = 2048
WORDS = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")  # CLIP's, which it loads by itself
END = "</w>"
START_OF_TEXT, END_OF_TEXT = "<|startoftext|>", "<|endoftext|>"
NAMES_COUNT, COMMON_COUNT = 5, 50  # how often a word of a name, and a common one, counts beside one of a tag


def train(work: Path) -> None:
    """Learn merges, and write the tokenizer into `work`/tokenizer."""
    learnt = Tokenizer(BPE(end_of_word_suffix=END))
    learnt.normalizer = Lowercase()
    words = Split(WORDS, "removed", invert=True)
    learnt.pre_tokenizer = Sequence([words, ByteLevel(add_prefix_space=False, use_regex=False)])
    letters = ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=ENTRIES, end_of_word_suffix=END, initial_alphabet=letters, show_progress=False)
    learnt.train_from_iterator(_texts(work), trainer)
    alphabet = sorted(letters)
    entries = dict.fromkeys([*alphabet, *(letter + END for letter in alphabet)])
    merges = []
    for left, right in json.loads(learnt.to_str())["model"]["merges"]:
        if len(entries) < ENTRIES - 2:
            merges.append((left, right))
            entries[left + right] = None
    vocabulary = {entry: number for number, entry in enumerate([*entries, START_OF_TEXT, END_OF_TEXT])}
    tokenizer = CLIPTokenizer(
        vocab=vocabulary, merges=merges, pad_token=END_OF_TEXT, unk_token=END_OF_TEXT, model_max_length=77
    )
    tokenizer.save_pretrained(work / "tokenizer")
    (work / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    lines = (f"{left} {right}\n" for left, right in merges)
    (work / "tokenizer" / "merges.txt").write_text("#version: 0.2\n" + "".join(lines))
    print(f"{len(vocabulary)} entries, {len(merges)} merges")


def _texts(work: Path) -> Iterator[str]:
    for emoji in load(work).emoji:
        yield from [emoji.name] * NAMES_COUNT
        yield from emoji.tags
    yield from [f"{COMMON} {NUMBERS} {COLOURS}"] * COMMON_COUNT
