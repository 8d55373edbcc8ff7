"""Textual inversion: files of vectors that stand for words of a prompt (.safetensors).

| keys of the file | made by | its token |
| --- | --- | --- |
| "<token>" alone | diffusers | the key |
| "emb_params" | A1111's web UI and kohya's scripts | the file's name |
| "string_to_param.*" | the oldest files, without pickle | the file's name |
| "clip_l" and "clip_g" | for SDXL | the file's name |

A file of n vectors takes n tokens of a prompt.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from latentrt.errors import RequestError

Float32 = NDArray[np.float32]
Files = Mapping[str, Path]  # by token
KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}  # of files for several encoders
MOST_VECTORS, MOST_BYTES = 75, 64 * 2**20
_ONE, _OLD = "emb_params", "string_to_param"
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_NEEDED = 'one tensor, named by its token or "emb_params", or "clip_l" and "clip_g"'


class Embedding(NamedTuple):
    """A file's vectors: (n, dim) float32 by key, "" for a file of one tensor; and the token that it names, if any."""

    vectors: Mapping[str, Float32]
    token: str | None

    def of(self, encoder: str, encoders: int, width: int, token: str) -> Float32:
        """Return the vectors for one of a model's text encoders.

        Args:
            encoder: its name in the manifest.
            encoders: how many the model has.
            width: of its vectors.
            token: for messages.

        Raises:
            RequestError: they were made for another family, or have another width.
        """
        alone = encoders == 1 and encoder == "text_encoder"
        key = "" if alone else KEYS.get(encoder, encoder)
        if key not in self.vectors:
            found = ", ".join(map(repr, self.vectors)).replace("''", "one tensor")
            raise RequestError(
                f"the embedding {token!r} has {found}", needed="one made for this model" if alone else f"{key!r}, too"
            )
        vectors = self.vectors[key]
        if vectors.shape[1] != width:
            raise RequestError(
                f"the embedding {token!r} has vectors of {vectors.shape[1]} numbers",
                needed=f"{width}, which the {encoder} reads",
                fix="take one that was made for this family of models",
            )
        return vectors


def files_of(given: Mapping[str, str | Path] | Iterable[str | Path]) -> dict[str, Path]:
    """Return the files by their tokens: those given, or else the files' own.

    Raises:
        RequestError: a file cannot be read; two have one token.
    """
    if isinstance(given, Mapping):
        return {token: Path(path) for token, path in given.items()}
    files: dict[str, Path] = {}
    for path in map(Path, [given] if isinstance(given, (str, os.PathLike)) else given):
        token = read_embedding(path).token or path.stem
        if token in files:
            raise RequestError(f"{files[token]} and {path} are both {token!r}", needed="a name for each: NAME=FILE")
        files[token] = path
    return files


def embeddings_of(typed: Iterable[str]) -> dict[str, Path]:
    """Return the files of a command line by their tokens, each given as FILE or NAME=FILE. Raise as `files_of`."""
    files: dict[str, Path] = {}
    for text in typed:
        name, equals, path = text.partition("=")
        own = {name: Path(path)} if equals and name and not Path(text).exists() else files_of([text])
        if taken := files.keys() & own.keys():
            token = taken.pop()
            raise RequestError(f"{files[token]} and {own[token]} are both {token!r}", needed="another NAME=FILE")
        files |= own
    return files


def read_embedding(path: Path) -> Embedding:
    """Read a file.

    Raises:
        RequestError: it cannot be read, is no safetensors, or has none of the known layouts.
    """
    if path.suffix != ".safetensors":
        raise RequestError(f"the embedding is {path}", needed="a .safetensors file; others can run code")
    tensors = _read(path)
    old = {name: array for name, array in tensors.items() if name.startswith(_OLD)}
    token = None
    if set(tensors) & set(KEYS.values()):
        chosen = {name: array for name, array in tensors.items() if name in KEYS.values()}
    elif _ONE in tensors:
        chosen = {"": tensors[_ONE]}
    elif len(old) == 1:
        chosen = {"": next(iter(old.values()))}
    elif len(tensors) == 1:
        ((token, array),) = tensors.items()
        chosen = {"": array}
    else:
        raise RequestError(f"{path} has the tensors {', '.join(sorted(tensors)) or 'none'}", needed=_NEEDED)
    return Embedding(_checked(path, chosen), token)


def _checked(path: Path, tensors: Mapping[str, Float32]) -> dict[str, Float32]:
    vectors = {name: array.reshape(-1, array.shape[-1]) for name, array in tensors.items() if 1 <= array.ndim <= 2}
    if len(vectors) < len(tensors) or len({len(array) for array in vectors.values()}) > 1:
        shapes = ", ".join(f"{name or 'vectors'} {array.shape}" for name, array in tensors.items())
        raise RequestError(f"{path} has {shapes}", needed="as many vectors for each encoder, (vectors, numbers)")
    for array in vectors.values():
        if not 1 <= len(array) <= MOST_VECTORS or not np.isfinite(array).all():
            raise RequestError(f"{path} has {len(array)} vectors", needed=f"1 to {MOST_VECTORS}, of finite numbers")
    return vectors


def _read(path: Path) -> dict[str, Float32]:
    """Return a safetensors file's floating-point tensors. https://github.com/huggingface/safetensors#format"""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise RequestError(f"{path} has {path.stat().st_size} bytes", needed=f"an embedding: at most {MOST_BYTES}")
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        return {
            name: _tensor(entry, data[8 + length :])
            for name, entry in header.items()
            if name != "__metadata__" and entry["dtype"] in _DTYPES
        }
    except OSError as error:
        raise RequestError(f"{path} cannot be read ({error.strerror})", needed="an embedding") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise RequestError(f"{path} is no safetensors file ({error})", needed="one, whole") from error


def _tensor(entry: Mapping[str, Any], data: bytes) -> Float32:
    start, end = entry["data_offsets"]
    if not 0 <= start <= end <= len(data):
        raise ValueError("it ends too soon")
    array = np.frombuffer(data[start:end], _DTYPES[entry["dtype"]]).reshape(entry["shape"])
    if entry["dtype"] == "BF16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)
