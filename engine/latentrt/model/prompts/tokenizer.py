"""From a prompt to the token ids that CLIP's text encoder reads.

CLIP reads 77 ids: a start token, at most 75 of the prompt, an end token, padding. Checkpoints pad in two
ways: SD 1 with the end token; SD 2 and SDXL's second encoder with "!" (id 0). That makes "!" a special token
there, so that one in a prompt becomes padding in its middle; diffusers does so, and so does this.

The rules all CLIP tokenizers share (Radford et al. 2021, `simple_tokenizer.py`): Unicode NFC, white space
collapsed, lower case, split into words, then byte pair encoding of each word, the last piece with "</w>".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import count, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from latentrt.bundle.bundle import read_json
from latentrt.errors import BundleError, OutputError, RequestError

if TYPE_CHECKING:
    import tokenizers

LENGTH = 77
GIVEN = 2**20  # ids from here on stand for vectors of textual inversion; no vocabulary is as large
_START, _END = "<|startoftext|>", "<|endoftext|>"
_DEFAULTS = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": _END}
_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"  # kept whole
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # a word, one digit, a run of signs
)


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """A prompt as a text encoder reads it.

    ids: int64 (77,).
    dropped: the end of the prompt that did not fit, "" if all did. Where the cut falls inside a character of
    several tokens (an emoji), that character counts as dropped.
    """

    ids: NDArray[np.int64]
    dropped: str


class Tokenizer:
    """CLIP's tokenizer as a checkpoint configures it; gives the ids of transformers' CLIPTokenizer.

    Attributes:
        start, end, pad: ids of the tokens around a prompt.
        length: of what the text encoder reads, start and end included.
        firsts: ids of the first vectors of embeddings.

    Args:
        core: the byte pair encoder.
        start, end, pad, length: the attributes.
        own: how many ids the checkpoint's own tokens have; later ones are those of `with_vectors`.
    """

    firsts: frozenset[int] = frozenset()

    def __init__(
        self, core: tokenizers.Tokenizer, start: int, end: int, pad: int, length: int, own: int | None = None
    ) -> None:
        self._core = core
        self.start, self.end, self.pad, self.length = start, end, pad, length
        self._own = core.get_vocab_size() if own is None else own
        self._vectors = _vectors({token.content for token in core.get_added_tokens_decoder().values()})

    @classmethod
    def open(cls, folder: Path) -> Tokenizer:
        """Read a checkpoint's tokenizer folder: tokenizer.json, or else vocab.json and merges.txt.

        Raises:
            BundleError: a file is missing or cannot be read, or a special token is not in the vocabulary.
        """
        source = folder / "tokenizer.json"
        try:
            config = _configuration(folder)
            core = _read_core(source) if source.is_file() else _build_core(folder, config)
            _add_special_tokens(core, config, folder)
            start, end, pad = (_id(core, config[f"{name}_token"], folder) for name in ("bos", "eos", "pad"))
            return cls(core, start, end, pad, _length(config))
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # fields of another kind
            raise _unreadable(folder / "tokenizer_config.json", error) from error

    @property
    def room(self) -> int:
        """The most tokens of a prompt that fit between start and end."""
        return self.length - 2

    @property
    def comma(self) -> int | None:
        """The id of a comma at a word's end; None in a vocabulary without one."""
        number: int | None = self._core.token_to_id(",</w>")
        return number

    def encode(self, text: str) -> Encoded:
        """Return the ids of one prompt.

        Raises:
            RequestError: the prompt is no text, or holds half a surrogate pair (bytes that were not UTF-8).
        """
        text, encoding = self._encoding(self._core, text)
        return Encoded(self.padded(self._ids(encoding)[: self.room]), _beyond(text, encoding, self.room))

    def beyond(self, text: str, room: int) -> str:
        """Return the end of a text that is left after so many of its tokens. Raise as `encode`."""
        return _beyond(*self._encoding(self._core, text), room)

    def padded(self, ids: list[int]) -> NDArray[np.int64]:
        """Return ids (length,) with start, end and padding around at most `room` of a prompt."""
        used = [self.start, *ids, self.end]
        return np.array(used + [self.pad] * (self.length - len(used)), np.int64)

    def tokens(self, text: str, *, literally: bool = False) -> list[int]:
        """Return all ids of a text, without start, end and padding. Raise as `encode`.

        `literally` takes a "!" for a word where it is the padding token too.
        """
        core = self._without_specials if literally and self.pad != self.end else self._core
        return self._ids(self._encoding(core, text)[1])

    def with_vectors(self, counts: Mapping[str, int]) -> Tokenizer:
        """Return a tokenizer that also knows these tokens, each of so many vectors: ids from GIVEN on, in order.

        As in diffusers, "<toy>" of three vectors is "<toy>", "<toy>_1" and "<toy>_2".

        Raises:
            RequestError: the vocabulary has one of these tokens.
        """
        from tokenizers import Tokenizer as Core

        core = Core.from_str(self._core.to_str())
        for token, vectors in counts.items():
            for name in (token, *(f"{token}_{i}" for i in range(1, vectors))):
                if core.token_to_id(name) is not None:
                    raise RequestError(
                        f"the embedding is named {name!r}, and the tokenizer has such a token",
                        needed="a name of its own",
                        fix="give it another one: NAME=FILE",
                    )
                core.add_tokens([name])
        made = Tokenizer(core, self.start, self.end, self.pad, self.length, self._own)
        made.firsts = frozenset(GIVEN + sum(list(counts.values())[:i]) for i in range(len(counts)))
        return made

    def _encoding(self, core: tokenizers.Tokenizer, text: str) -> tuple[str, tokenizers.Encoding]:
        """Return a text with all vectors of its textual inversions, and its encoding."""
        check_text(text)
        encoding = core.encode(text, add_special_tokens=False)
        if several := sorted(self._vectors.keys() & set(encoding.tokens)):
            for token in several:
                text = text.replace(token, self._vectors[token])
            encoding = core.encode(text, add_special_tokens=False)
        return text, encoding

    def _ids(self, encoding: tokenizers.Encoding) -> list[int]:
        return [number if number < self._own else GIVEN + number - self._own for number in encoding.ids]

    @cached_property
    def _without_specials(self) -> tokenizers.Tokenizer:
        from tokenizers import Tokenizer as Core

        core = Core.from_str(self._core.to_str())
        core.encode_special_tokens = True
        return core

    def write_json(self, path: Path) -> None:
        """Write tokenizer.json: vocabulary, merges and rules in one file, which `open` prefers.

        Raises:
            OutputError: the file cannot be written.
        """
        try:
            path.write_text(self._core.to_str(), encoding="utf-8")
        except OSError as error:
            raise OutputError(f"{path} cannot be written ({error.strerror})", needed="a writable folder") from error


def _beyond(text: str, encoding: tokenizers.Encoding, room: int) -> str:
    return text[encoding.offsets[room][0] :] if len(encoding.ids) > room else ""


def _vectors(added: set[str]) -> dict[str, str]:
    """Return what stands for each textual inversion of several vectors: "<toy>" for "<toy> <toy>_1 <toy>_2".

    diffusers' pipelines replace the text so before it is tokenized (TextualInversionLoaderMixin.maybe_convert_prompt).
    """
    found = {}
    for token in added:
        numbered = takewhile(added.__contains__, (f"{token}_{i}" for i in count(1)))
        text = " ".join([token, *numbered])
        if text != token:
            found[token] = text
    return found


def _configuration(folder: Path) -> dict[str, Any]:
    """Return tokenizer_config.json over the defaults; where it describes no added tokens, the older files do."""
    config = _DEFAULTS | _read_object(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        config |= _read_object(folder / "special_tokens_map.json")
        config["added_tokens_decoder"] = {
            number: token for token, number in _read_object(folder / "added_tokens.json").items()
        }
    return config


def _read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, without nulls; {} if there is no such file."""
    data = read_json(path) if path.exists() else {}
    return {key: value for key, value in data.items() if value is not None}


def _read_core(path: Path) -> tokenizers.Tokenizer:
    import tokenizers

    try:
        core = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library knows no narrower class
        raise _unreadable(path, error) from error
    core.no_truncation()
    core.no_padding()
    return core


def _build_core(folder: Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
    """Return the same tokenizer from vocab.json and merges.txt."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    for path in (vocabulary, merges):
        if not path.is_file():
            raise BundleError(
                f"{folder} has neither tokenizer.json nor {path.name}",
                needed="tokenizer.json, or vocab.json and merges.txt",
            )
    unknown = _content(config["unk_token"])
    try:
        model = models.BPE.from_file(
            str(vocabulary), str(merges), unk_token=unknown, end_of_word_suffix="</w>", fuse_unk=False
        )
    except Exception as error:  # the library knows no narrower class
        raise _unreadable(vocabulary, f"with {merges.name}: {error}") from error
    core = Tokenizer(model)
    core.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    # `encode` adds start and end itself; this is for other readers of the file that `write_json` writes.
    end, start = ((_content(config[name]), _id(core, config[name], folder)) for name in ("eos_token", "bos_token"))
    core.post_processor = processors.RobertaProcessing(end, start, trim_offsets=False, add_prefix_space=False)
    return core


def _add_special_tokens(core: tokenizers.Tokenizer, config: dict[str, Any], folder: Path) -> None:
    """Make the configured tokens match as wholes, wherever they stand in a prompt.

    A token given as text matches the prompt as typed; one given as an object says itself ("normalized") if
    it matches after lower-casing, and SD 1's do.
    """
    named = {_content(config[name]): config[name] for name in _DEFAULTS}
    described = {int(number): token for number, token in config["added_tokens_decoder"].items()}
    for number, token in sorted(described.items()):
        core.add_tokens([_added(token, special=_content(token) in named)])
        if _id(core, token, folder) != number:
            raise ValueError(f"{_content(token)!r} cannot have the id {number}")
    known = {token.content for token in core.get_added_tokens_decoder().values()}
    for content, token in named.items():
        _id(core, token, folder)  # the library would invent an id, and the text encoder has no row for it
        if content not in known:
            core.add_tokens([_added(token, special=True)])


def _added(token: str | dict[str, Any], *, special: bool) -> tokenizers.AddedToken:
    from tokenizers import AddedToken

    flags = token if isinstance(token, dict) else {}
    special = special or flags.get("special", False)
    sides = {side: flags.get(side, False) for side in ("lstrip", "rstrip", "single_word")}
    return AddedToken(_content(token), special=special, normalized=flags.get("normalized", not special), **sides)


def _content(token: str | dict[str, Any]) -> str:
    """Return the text of a special token, which is written as text or as {"content": text, ...}."""
    return token if isinstance(token, str) else str(token["content"])


def _id(core: tokenizers.Tokenizer, token: str | dict[str, Any], folder: Path) -> int:
    number = core.token_to_id(_content(token))
    if number is None:
        raise BundleError(
            f"{folder} names the special token {_content(token)!r}, which its vocabulary lacks",
            needed="special tokens with an id",
        )
    return number


def _length(config: dict[str, Any]) -> int:
    """Return the number of ids per prompt. transformers writes 1e30 where it is unknown: then CLIP's own."""
    length = config.get("model_max_length", LENGTH)
    if not isinstance(length, int) or length < 3:
        raise ValueError(f"model_max_length is {length!r}")
    return LENGTH if length > 10**6 else length


def _unreadable(path: Path, why: object) -> BundleError:
    return BundleError(f"{path} cannot be read ({why})", needed="a CLIP tokenizer's file, whole")


def check_text(text: object) -> None:
    """Refuse what is no text, or no Unicode. Raise RequestError."""
    if not isinstance(text, str):
        raise RequestError(f"a prompt of type {type(text).__name__}", needed="text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"a prompt with half a surrogate pair, {text[error.start]!r}, at character {error.start}",
            needed="Unicode text",
            fix="decode the prompt's bytes as UTF-8, or remove that character",
        ) from error
