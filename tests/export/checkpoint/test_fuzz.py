"""Every JSON of a checkpoint, damaged at random: an export works, or is refused at once by an error of ours."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from latentrt.bundle.spec import FP32, TEXT_ENCODER, NetworkSpec, Variant
from latentrt.errors import LatentrtError
from latentrt_export import to_bundle
from latentrt_export.checkpoint.source import Checkpoint, open_checkpoint, tokenizer_of
from latentrt_export.graphs.to_onnx import quiet
from latentrt_export.graphs.wrap import load_network
from latentrt_export.to_bundle import NetworkSummary, export_bundle
from tests.support.models.checkpoints import END, START, tiny_sd, tiny_sdxl
from tests.support.models.pixels import tiny_pixels

VALUES: tuple[Any, ...] = (
    *(None, True, False, "", "text", "7", -1, 0, 1, 2, 3, 64, 0.5, -0.5, 1e400, float("nan"), 10**6, 10**30),
    *([], {}, [None], [1, 2], ["a", 1], [[1], [2]], {"a": 1}, {"content": 5}, ["diffusers", "AutoencoderKL"]),
)
CONTENTS = (b"", b"[]", b"5", b"null", b'"text"', b"{", b"{}", b"\xff\xfe{}", b"\xef\xbb\xbf{}", b"[" * 100_000)
SLOWEST = 2.0  # seconds, of opening a small checkpoint


def write(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


def places(data: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container in JSON with each of its keys or indexes."""
    for key in list(data) if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ():
        yield data, key
        yield from places(data[key])


def damaged(text: bytes, random: Random) -> bytes:
    """Return a JSON file with some values replaced or left out, or another content altogether."""
    if random.random() < 0.02:
        return random.choice(CONTENTS)
    data = copy.deepcopy(json.loads(text))
    for _ in range(random.choice((1, 1, 1, 2, 5))):
        container, key = random.choice(list(places(data)) or [({}, "a")])
        if random.random() < 0.2 and isinstance(container, dict):
            container.pop(key, None)
        else:
            container[key] = copy.deepcopy(random.choice(VALUES))
    return json.dumps(data).encode()


def make(kind: str, folder: Path) -> Path:
    with quiet():
        if kind == "pixels":
            return tiny_pixels(folder, unet={"num_class_embeds": 5})
        if kind == "xl":
            return tiny_sdxl(folder)
        tiny_sd(folder, max_shard_size="60KB")
    tokenizer = folder / "tokenizer"
    words = len(json.loads((tokenizer / "vocab.json").read_text()))
    token = {"content": START, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    write(tokenizer / "special_tokens_map.json", {"bos_token": token, "eos_token": END, "unk_token": END})
    write(tokenizer / "added_tokens.json", {"<toy>": words})
    return folder


class Fuzzed:
    """A checkpoint whose JSON files are damaged one at a time."""

    def __init__(self, folder: Path, names: str = "*.json") -> None:
        self.folder = folder
        self.files = {path: path.read_bytes() for path in sorted(folder.rglob(names))}

    def cases(self, count: int, seed: int) -> Iterator[tuple[Path, bytes]]:
        """Yield the file that is damaged, and its content, while it is."""
        random = Random(seed)
        for _ in range(count):
            path = random.choice(list(self.files))
            content = damaged(self.files[path], random)
            path.write_bytes(content)
            yield path, content
            path.write_bytes(self.files[path])


def check_opening(fuzzed: Fuzzed, count: int, seed: int) -> dict[str, int]:
    """Open damaged checkpoints; return how many opened and how many were refused."""
    ends = {"opened": 0, "refused": 0}
    for path, content in fuzzed.cases(count, seed):
        start = time.perf_counter()
        try:
            open_checkpoint(fuzzed.folder)
            ends["opened"] += 1
        except LatentrtError:
            ends["refused"] += 1
        except Exception as error:
            pytest.fail(f"{path} with {content[:2000]!r}: {type(error).__name__}: {error}")
        assert time.perf_counter() - start < SLOWEST, f"{path} with {content[:2000]!r}"
    return ends


@pytest.mark.parametrize("kind", ["sd", "xl", "pixels"])
def test_opening_works_or_is_refused(tmp_path: Path, kind: str) -> None:
    ends = check_opening(Fuzzed(make(kind, tmp_path / kind)), 200, seed=1)
    assert min(ends.values()) > 20, ends


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd", "xl", "pixels"])
def test_opening_works_or_is_refused_thousands_of_times(tmp_path: Path, kind: str) -> None:
    check_opening(Fuzzed(make(kind, tmp_path / kind)), 2000, seed=2)


def loaded(checkpoint: Checkpoint, root: Path, name: str) -> tuple[dict[str, NetworkSpec], NetworkSummary]:
    """Load a network where an export would trace it too."""
    with quiet():
        load_network(root, name)
    path = to_bundle.GRAPHS[name]
    (root / path).write_bytes(b"graph")
    role, variants = to_bundle.ROLES.get(name, TEXT_ENCODER), {FP32: Variant(path, 23, 1)}
    return {name: NetworkSpec(role, (), (), variants, tokenizer_of(name) or None)}, NetworkSummary(0.0, 1, 5, 0, 0)


def check_exporting(fuzzed: Fuzzed, target: Path, count: int, seed: int) -> dict[str, int]:
    """Export damaged checkpoints; what passes the checks before the first network has to load to the last one."""
    ends = {"exported": 0, "refused": 0}
    for path, content in fuzzed.cases(count, seed):
        begun: list[str] = []
        try:
            export_bundle(
                fuzzed.folder,
                target,
                overwrite=True,
                progress=lambda part, done, total, begun=begun: begun.append(part),
            )
            ends["exported"] += 1
        except LatentrtError as error:
            ends["refused"] += 1
            if begun:
                pytest.fail(f"{begun}: {error}; {path} with {content[:2000]!r}")
        except Exception as error:
            pytest.fail(f"{path} with {content[:2000]!r}: {type(error).__name__}: {error}")
    return ends


@pytest.mark.parametrize("kind", ["sd", "xl", "pixels"])
def test_what_passes_the_checks_loads(tmp_path: Path, fast: pytest.MonkeyPatch, kind: str) -> None:
    fast.setattr(to_bundle, "_export_network", loaded)
    fuzzed = Fuzzed(make(kind, tmp_path / kind), "*config.json")
    ends = check_exporting(fuzzed, tmp_path / "bundle", 40, seed=3)
    assert min(ends.values()) > 4, ends


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd", "xl", "pixels"])
def test_what_passes_the_checks_loads_hundreds_of_times(tmp_path: Path, fast: pytest.MonkeyPatch, kind: str) -> None:
    fast.setattr(to_bundle, "_export_network", loaded)
    check_exporting(Fuzzed(make(kind, tmp_path / kind), "*config.json"), tmp_path / "bundle", 250, seed=4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd", "xl", "pixels"])
def test_whole_exports_work_or_are_refused(tmp_path: Path, kind: str) -> None:
    from latentrt_export.golden import golden_runs

    begun: set[str] = set()
    for path, content in Fuzzed(make(kind, tmp_path / kind)).cases(300, seed=5):

        def progress(part: str, done: int, total: int, case: str = str((path, content))) -> None:
            begun.add(case)

        try:
            export_bundle(tmp_path / kind, tmp_path / "bundle", overwrite=True, golden=golden_runs, progress=progress)
        except LatentrtError:
            continue
        except Exception as error:
            pytest.fail(f"{path} with {content[:2000]!r}: {type(error).__name__}: {error}")
        if len(begun) == 4:
            return
