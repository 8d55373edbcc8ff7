"""The folder that each side loads: the checkpoint, our bundle of it, and what peers make of it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import latentrt_export
from benchmarks.peers.config import SCRIPTS, Config, Model, Peer
from benchmarks.peers.environments import STAMP, Environments, execute

PREFIX = "text_model."  # of the text encoder's weights, as transformers 4 named them
CONVERTING = 3600.0  # seconds
MAKE = """
import sys
from pathlib import Path
from latentrt_export.checkpoint.presets.make import make_checkpoint
make_checkpoint(sys.argv[1], Path(sys.argv[2]))
"""


class Folders:
    """The folders of one model. Those that do not exist are made.

    Args:
        config: of the run.
        model: whose folders.
        environments: that convert.
    """

    def __init__(self, config: Config, model: Model, environments: Environments) -> None:
        self._model, self._environments = model, environments
        self._folder = config.folder / "models" / model.name
        self._cache = config.folder / "cache"

    def checkpoint(self) -> Path:
        """Return the diffusers folder that everything is made of."""
        if self._model.bundle is not None:
            return self._model.bundle
        return self._made("checkpoint", "", self._make_checkpoint)

    def bundle(self) -> Path:
        """Return our bundle; it is exported again when the exporter's code has changed."""
        if self._model.bundle is not None:
            return self._model.bundle
        return self._made("bundle", sources(Path(latentrt_export.__file__).parent), self._export)

    def peer(self, name: str, peer: Peer) -> Path:
        """Return the folder that a peer loads.

        Raises:
            NotMeasuredError: the peer's exporter cannot be installed or fails.
        """
        if peer.conversion is None:
            return self._older_names() if peer.older_names else self.checkpoint()
        script, environment = peer.conversion
        python = self._environments.python(environment)
        stamp = Path(python[0]).parents[1].joinpath(STAMP).read_text(encoding="utf-8")
        source = self._older_names() if peer.older_names else self.checkpoint()
        text = (SCRIPTS / script).read_text(encoding="utf-8")

        def convert(folder: Path) -> None:
            execute([*python, str(SCRIPTS / script), str(source), str(folder)], CONVERTING, offline())

        return self._made(name, f"{stamp}{text}{hash_of(self.checkpoint())}", convert)

    def cache(self, name: str) -> Path:
        """Return the folder in which a peer keeps compiled code."""
        folder = self._cache / f"{self._model.name}-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _older_names(self) -> Path:
        source = self.checkpoint()
        return self._made("older-names", f"{source} {hash_of(source)}", lambda folder: with_older_names(source, folder))

    def _made(self, name: str, stamp: str, make: Callable[[Path], None]) -> Path:
        """Return a folder that was made with this stamp; make it otherwise."""
        folder, note = self._folder / name, self._folder / f"{name}.stamp"
        if not folder.is_dir() or not note.is_file() or note.read_text(encoding="utf-8") != stamp:
            print(f"making {self._model.name}/{name} ...", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            note.unlink(missing_ok=True)
            folder.parent.mkdir(parents=True, exist_ok=True)
            make(folder)
            note.write_text(stamp, encoding="utf-8")
        return folder

    def _make_checkpoint(self, folder: Path) -> None:
        execute([sys.executable, "-c", MAKE, self._model.name, str(folder)], CONVERTING)

    def _export(self, folder: Path) -> None:
        execute([sys.executable, "-m", "latentrt", "export", str(self.checkpoint()), str(folder)], CONVERTING)


def with_older_names(source: Path, folder: Path) -> None:
    """Write a checkpoint whose text encoder's weights have transformers 4's names; all else are links to `source`."""
    for path in files_of(source):
        target = folder / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.parent.name == "text_encoder" and path.suffix == ".safetensors":
            rename(path, target)
        else:
            target.symlink_to(path)


def rename(source: Path, target: Path) -> None:
    """Copy a safetensors file, with PREFIX before the names that lack it. The numbers stay where they are."""
    with source.open("rb") as old, target.open("wb") as new:
        (length,) = struct.unpack("<Q", old.read(8))
        names = json.loads(old.read(length))
        kept = ("__metadata__", PREFIX)
        header = json.dumps({k if k.startswith(kept) else PREFIX + k: v for k, v in names.items()}).encode()
        header += b" " * (-len(header) % 8)
        new.write(struct.pack("<Q", len(header)) + header)
        shutil.copyfileobj(old, new, 1 << 20)


def files_of(checkpoint: Path) -> list[Path]:
    """Return the files that diffusers reads; in a bundle there are others too."""
    inner = [path for path in checkpoint.glob("*/*") if path.is_file() and path.suffix != ".onnx"]
    return [checkpoint / "model_index.json", *sorted(inner)]


def hash_of(folder: Path) -> str:
    """Return a hash of a checkpoint: the names, sizes and first megabytes of its files."""
    found = hashlib.sha256()
    for path in files_of(folder):
        size = path.stat().st_size
        found.update(f"{path.relative_to(folder)} {size}\n".encode())
        with path.open("rb") as file:
            found.update(file.read(1 << 20))
    return found.hexdigest()


def sources(folder: Path) -> str:
    """Return a hash of a package's source files."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()


def offline() -> dict[str, str]:
    """Return an environment in which no hub is asked."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
