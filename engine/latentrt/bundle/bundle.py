"""A bundle: a folder that the engine runs. Opening one checks its manifest, its paths and its hashes.

A bundle is data: JSON, safetensors and ONNX graphs. Nothing in it is executed, unpickled or followed out of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from numpy.typing import NDArray

from latentrt.bundle.checked import remember, states_of, was_checked
from latentrt.bundle.manifest import SCHEMA, SCHEMAS, model_from
from latentrt.bundle.spec import ModelSpec
from latentrt.errors import EXPORT, BundleError, HashMismatchError, UnsafePathError, UnsafeWeightsError

MANIFEST = "manifest.json"
FOLDER = Path(__file__).parent / "embedded"
EMBEDDED = FOLDER / "emoji"
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What the manifest records of one file."""

    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened bundle. Make one with `Bundle.open(path)`.

    Attributes:
        root, spec, files: its folder, its model, its files.
        checked: whether their hashes were checked.
        replaced: weights that take the places of those in its files, by file and offset, in the stored dtype.
        merged: the LoRAs that these come of: "style.safetensors:0.8".
        plain: the bundle without them, where there are some; see `base`.
    """

    root: Path
    spec: ModelSpec
    files: Mapping[str, FileRecord]
    checked: bool = False
    replaced: Mapping[tuple[str, int], NDArray[Any]] = field(default_factory=dict)
    merged: tuple[str, ...] = ()
    plain: Bundle | None = None

    @classmethod
    def open(cls, root: str | Path = EMBEDDED, *, check_hashes: bool = True, cache: bool = False) -> Bundle:
        """Open and check the bundle at `root`: a folder, or the name of an embedded one.

        `check_hashes=False` still compares every file's size; it saves reading full-size weights twice. With `cache`, a
        large bundle is hashed once: see `latentrt.bundle.checked`.

        Raises:
            BundleError: the folder or its manifest is missing or not readable, or a file that the engine would read
                is not listed in it.
            UnsafePathError: a path of the manifest leaves the folder (links count as leaving).
            UnsafeWeightsError: the manifest lists pickled weights.
            HashMismatchError: a file's size or SHA-256 is not the manifest's.
        """
        root = located(root)
        manifest = read_manifest(root)
        spec = model_from(manifest["model"], manifest["schema"])
        files = _records(manifest["files"])
        bundle = cls(root, spec, files, check_hashes)
        paths = {name: bundle.path(name) for name in files}
        bundle._check_listed(paths)
        bundle._check_sizes(paths)
        if check_hashes:
            bundle._check_hashes(paths, cache=cache)
        return bundle

    @property
    def base(self) -> Bundle:
        """The bundle with the weights of its files."""
        return self if self.plain is None else self.plain

    def path(self, name: str) -> Path:
        """Return the path of one of the bundle's files. It lies inside the folder."""
        pure = PurePosixPath(name)
        if not name or set(name) & set("\\:\0") or pure.is_absolute() or ".." in pure.parts:
            raise UnsafePathError(f"the bundle names the file {name!r}", needed=f"a path inside {self.root}")
        path = self.root.joinpath(*pure.parts)
        if not path.resolve().is_relative_to(self.root.resolve()):
            raise UnsafePathError(
                f"{path} leads out of the bundle, to {path.resolve()}",
                needed=f"a real file inside {self.root}",
                fix="copy the file into the bundle instead of linking it",
            )
        return path

    def json(self, name: str) -> dict[str, Any]:
        """Return one of the bundle's JSON files."""
        return read_json(self.path(name))

    def _check_listed(self, paths: Mapping[str, Path]) -> None:
        """Refuse a bundle that does not list a file to be read: graphs, the files in them, tokenizers, schedules."""
        networks = self.spec.networks.values()
        names = [variant.path for network in networks for variant in network.variants.values()]
        graphs = [paths.get(name) or self.path(name) for name in names]
        tokenizers = (network.tokenizer for network in networks if network.tokenizer is not None)
        schedules = [self.path(name) for name in (self.spec.schedule, self.spec.low_schedule) if name is not None]
        whole = {self.path(name) for name in tokenizers} | {path.parent for path in schedules}
        listed = {*paths.values(), self.root / MANIFEST}
        for path in [*graphs, *schedules]:
            if path not in listed:
                raise _unlisted(path)
        for path in sorted(set(self.root.rglob("*")) - listed):
            if path.is_dir():
                continue
            named = any(path.name.encode() in graph.read_bytes() for graph in graphs if graph.is_file())
            if path.parent in whole or named:
                raise _unlisted(path)

    def _check_sizes(self, paths: Mapping[str, Path]) -> None:
        for name, record in self.files.items():
            path = paths[name]
            if not path.is_file():
                raise BundleError(f"{path} is missing", needed="every file that the manifest lists")
            size = path.stat().st_size
            if size != record.bytes:
                raise HashMismatchError(f"{path} has {size} bytes", needed=f"{record.bytes}, as in the manifest")

    def _check_hashes(self, paths: Mapping[str, Path], *, cache: bool) -> None:
        states, needed = states_of(paths), {name: record.sha256 for name, record in self.files.items()}
        if cache and was_checked(self.root, states, needed):
            return
        with ThreadPoolExecutor(max_workers=4) as pool:  # hashlib releases the interpreter lock
            for (name, path), sha256 in zip(paths.items(), pool.map(sha256_of, paths.values()), strict=True):
                if sha256 != needed[name]:
                    found = f"{path} has SHA-256 {sha256}"
                    raise HashMismatchError(found, needed=f"{needed[name]}, as in the manifest")
        if cache:
            remember(self.root, states, needed)


def located(bundle: str | Path) -> Path:
    """Return the folder of a bundle: a path, or the name of an embedded one where no such folder exists."""
    path = Path(bundle)
    known = {manifest.parent.name for manifest in FOLDER.glob(f"*/{MANIFEST}")}
    return FOLDER / path if not path.exists() and str(bundle) in known else path


def located_lora(lora: Path) -> Path:
    """Return a LoRA's file or folder: a path, or the name of an embedded one where no such file exists."""
    known = {
        folder.name: file for folder in FOLDER.iterdir() if (file := folder / f"{folder.name}.safetensors").exists()
    }
    return known.get(str(lora), lora) if not lora.exists() else lora


def embedded() -> tuple[str, ...]:
    """Return the names of the embedded models. Beside them are ControlNets and LoRAs for them."""
    return tuple(sorted(index.parent.name for index in FOLDER.glob("*/model_index.json")))


def _unlisted(path: Path) -> BundleError:
    return BundleError(f"{path} is used but not listed in {MANIFEST}", needed="an entry with its hash")


def write_manifest(root: Path, spec: ModelSpec, names: Iterable[str]) -> None:
    """Hash the named files of `root` and write manifest.json beside them."""
    files = {name: {"sha256": sha256_of(root / name), "bytes": (root / name).stat().st_size} for name in sorted(names)}
    manifest = {"schema": SCHEMA, "model": spec.to_dict(), "files": files}
    (root / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raise a BundleError that names the file where it holds none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BundleError(f"{path} is missing", needed="a JSON file") from error
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path} cannot be read ({error})", needed="a JSON file") from error
    if not isinstance(data, dict):
        raise BundleError(f"{path} holds a {type(data).__name__}", needed="a JSON object")
    return data


def read_manifest(root: Path) -> dict[str, Any]:
    """Return the manifest of the folder `root`. Raise BundleError where it has none of latentrt's."""
    if not root.is_dir():
        raise BundleError(
            f"there is no folder {root}",
            needed="a bundle",
            fix="check the path, or make one: latentrt export CHECKPOINT BUNDLE",
        )
    if not (root / MANIFEST).is_file():
        kind = "a diffusers checkpoint" if (root / "model_index.json").is_file() else "not a bundle"
        raise BundleError(
            f"{root} has no {MANIFEST}: it is {kind}", needed="a bundle", fix=f"make one: latentrt export {root} BUNDLE"
        )
    manifest = read_json(root / MANIFEST)
    schema = manifest.get("schema")
    if schema not in SCHEMAS:
        raise BundleError(
            f"{root / MANIFEST} has schema {schema!r}",
            needed=f"schema {' or '.join(map(str, SCHEMAS))}",
            fix="update latentrt, or " + EXPORT,
        )
    for key in ("model", "files"):
        if not isinstance(manifest.get(key), dict):
            raise BundleError(f"{root / MANIFEST} has no {key!r}", needed=f"the fields of schema {schema}")
    return manifest


def _records(files: Mapping[str, Any]) -> dict[str, FileRecord]:
    records = {}
    for name, record in files.items():
        if name.lower().endswith(PICKLES):
            needed = "weights as .safetensors; pickled files can run code"
            raise UnsafeWeightsError(f"the bundle lists {name}", needed=needed)
        try:
            records[name] = FileRecord(str(record["sha256"]), int(record["bytes"]))
        except (KeyError, TypeError, ValueError) as error:
            found = f"the manifest's entry for {name!r} is {record!r}"
            raise BundleError(found, needed="sha256 and bytes") from error
    return records
