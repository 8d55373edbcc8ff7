"""JSON and other texts of a checkpoint, read with care."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from latentrt.bundle.tensors import LFS
from latentrt.errors import BundleError, ExportError, ScheduleError
from latentrt.model.prompts.tokenizer import Tokenizer
from latentrt.sampling.schedule import Schedule

AGAIN = "download the checkpoint again"
TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object of a checkpoint. Raise an ExportError that names the file where it holds none."""
    try:
        content = path.read_bytes()
        check_pointer(path, content)
        data = json.loads(content.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"{path} cannot be read ({error})", needed="a JSON file", fix=AGAIN) from error
    if not isinstance(data, dict):
        raise ExportError(f"{path} holds no JSON object", needed="a JSON object", fix=AGAIN)
    return data


def check_pointer(path: Path, content: bytes) -> None:
    """Raise an ExportError where a file's content is a Git LFS pointer, which stands for a file that is elsewhere."""
    if content.startswith(LFS):
        raise ExportError(
            f"{path} is a Git LFS pointer, not the file itself", needed="the file", fix="git lfs pull, in its folder"
        )


def texts_of(root: Path) -> dict[str, Path]:
    """Return licence, model card and small data files at the top of a checkpoint: they are copied with the weights."""
    kept = [p for p in sorted(root.iterdir()) if p.is_file() and _is_text(p)]
    return {p.name: p for p in kept}


def _is_text(path: Path) -> bool:
    generated = path.name in ("manifest.json", "model_index.json")
    return not generated and (path.suffix in (".md", ".txt", ".json") or path.name.startswith(("LICENSE", "NOTICE")))


def license_of(root: Path) -> str | None:
    """Return the licence in the model card's front matter."""
    card = root / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    named = re.search(r"^license:\s*['\"]?([^'\"\n]+)", front[1], re.MULTILINE) if front else None
    return named[1].strip() if named else None


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """Return the files of a tokenizer by name. Raise an ExportError where they make none."""
    files = {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}
    try:
        for path in files.values():
            with path.open("rb") as file:
                check_pointer(path, file.read(len(LFS)))
        Tokenizer.open(folder)
    except BundleError as error:
        raise ExportError(error.found, needed=error.needed, fix=AGAIN) from error
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        OSError,
        TypeError,
        ValueError,
    ) as error:  # values of any kind
        raise ExportError(f"{folder} cannot be read ({error})", needed="a CLIP tokenizer's files", fix=AGAIN) from error
    return files


def read_schedule(path: Path, named: str | None) -> dict[str, Any]:
    """Return scheduler_config.json. Raise an ExportError where a value is of another kind than it should be.

    `named` is the scheduler's class in model_index.json.
    """
    config = read_json(path)
    try:
        Schedule.from_config(config, {} if named is None else {"_class_name": named})
    except ScheduleError as error:
        raise ExportError(f"{path}: {error.found}", needed=error.needed, fix=error.fix) from error
    return config
