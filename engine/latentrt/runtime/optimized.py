"""Graphs that ONNX Runtime has optimized for this CPU, kept in the user's cache.

Most of the time in which a session is made, ONNX Runtime widens half-precision weights and rearranges them for the
CPU's vectors. An entry of the cache is a folder with the result. Its name is a hash of all that decides it, so that an
entry is never out of date. It is written under another name and renamed: it is whole or absent, also where two
processes write it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from latentrt.bundle.bundle import Bundle, sha256_of
from latentrt.bundle.spec import GraphSpec
from latentrt.errors import BackendError, UntrustedFileError
from latentrt.storage import cache_folder, check_trusted, read_trusted

GRAPH, WEIGHTS, RECORD = "graph.onnx", "weights.bin", "record.json"
MOST_BYTES = 20 * 2**30  # of all entries together
FORMAT = 1  # a part of the hash: other options that change the graph need another number
ABANDONED = 3600.0  # seconds after which a folder that nobody renamed is removed


class MakeSession(Protocol):
    """Makes a session of a graph; with `save_to` only to write the optimized graph, and its weights beside it."""

    def __call__(self, path: Path, *, optimize: bool = True, save_to: Path | None = None) -> Any: ...


class SavedGraph:
    """The place of one graph in the cache.

    Args:
        bundle: opened from a manifest. It is written to the cache only if its hashes were checked.
        graph: of the bundle.
        build: of ONNX Runtime.
    """

    def __init__(self, bundle: Bundle, graph: GraphSpec, build: str) -> None:
        beside = "".join(graph.path.rpartition("/")[:2])  # ONNX Runtime reads weights from no other folder
        files = {name: record for name, record in sorted(bundle.files.items()) if name.startswith(beside)}
        hashes = [(name, record.sha256) for name, record in files.items()]
        key = hashlib.sha256(repr((FORMAT, graph.path, hashes, build, _cpu())).encode()).hexdigest()
        self.cache = cache_folder("graphs")
        self.folder = self.cache / key
        self._most_bytes = 2 * sum(record.bytes for record in files.values())  # half precision becomes float32
        self._checked = bundle.checked and graph.path in files

    def session(self, path: Path, make: MakeSession) -> Any:
        """Return a session of the saved graph; it is saved first where it is not yet. Without one, of that at `path`.

        Raises:
            BackendError: the graph at `path` cannot be loaded.
        """
        if saved := self.find() or self._save(path, make):
            try:
                return make(saved, optimize=False)
            except BackendError:  # damage that the record does not show
                shutil.rmtree(self.folder, ignore_errors=True)
        return make(path)

    def find(self) -> Path | None:
        """Return the path of the saved graph if no other user may have written to it. Remove a damaged one."""
        if not os.path.exists(self.folder):  # Path.exists raises where a folder above cannot be entered
            return None
        try:
            check_trusted(self.cache)
            record = json.loads(read_trusted(self.folder / RECORD))
            if record == _described(self.folder):
                with suppress(OSError):
                    os.utime(self.folder / RECORD)  # its last use
                return self.folder / GRAPH
        except UntrustedFileError:
            return None
        except (OSError, ValueError):
            pass
        shutil.rmtree(self.folder, ignore_errors=True)
        return None

    def _save(self, path: Path, make: MakeSession) -> Path | None:
        """Save the graph if that is possible. Return its path."""
        if not self._checked or self._most_bytes > MOST_BYTES or os.path.exists(self.folder):
            return None
        with suppress(BackendError, UntrustedFileError, OSError):
            self.cache.mkdir(mode=0o700, parents=True, exist_ok=True)
            check_trusted(self.cache)
            if shutil.disk_usage(self.cache).free < self._most_bytes:
                return None
            part = Path(tempfile.mkdtemp(prefix=f".{self.folder.name}.", suffix=".part", dir=self.cache))
            try:
                make(path, save_to=part / GRAPH)
                _complete(part)
                part.rename(self.folder)
                _remove_oldest(self.cache)
            finally:
                shutil.rmtree(part, ignore_errors=True)
        return self.find()


def _complete(folder: Path) -> None:
    """Put what ONNX Runtime wrote on the disk, and a record beside it."""
    (folder / WEIGHTS).touch()  # a small graph has none
    for name in (GRAPH, WEIGHTS):
        with (folder / name).open("rb") as file:
            os.fchmod(file.fileno(), 0o600)
            os.fsync(file.fileno())  # the record is of the weights' size and time: they must not be lost behind it
    (folder / RECORD).touch(0o600)
    (folder / RECORD).write_text(json.dumps(_described(folder)), encoding="utf-8")


def _described(folder: Path) -> dict[str, Any]:
    """Return the record of an entry: the graph's hash; of the weights, which are gigabytes, only size and time."""
    check_trusted(folder / GRAPH)
    status = (folder / WEIGHTS).stat()
    check_trusted(folder / WEIGHTS, status)
    return {GRAPH: sha256_of(folder / GRAPH), WEIGHTS: [status.st_size, int(status.st_mtime)]}


def _remove_oldest(cache: Path) -> None:
    """Remove the entries that were not used for longest while all take more than MOST_BYTES, and abandoned folders."""
    total, entries = 0, [(_last_use(folder), folder) for folder in cache.iterdir() if folder.is_dir()]
    for used, folder in sorted(entries, reverse=True):
        total += sum(file.stat().st_size for file in folder.iterdir())
        if used < time.time() - ABANDONED if folder.suffix == ".part" else total > MOST_BYTES:
            shutil.rmtree(folder, ignore_errors=True)


def _last_use(folder: Path) -> float:
    record = folder / RECORD
    return (record if record.exists() else folder).stat().st_mtime


def _cpu() -> str:
    """Return what decides which kernels and layouts of weights ONNX Runtime chooses: the instructions of the CPU."""
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith(("flags", "Features")):  # of x86, of Arm
                return f"{platform.machine()} {' '.join(sorted(line.split()))}"
    return f"{platform.machine()} {platform.processor()}"
