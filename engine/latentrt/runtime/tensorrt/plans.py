"""Plans: serialized TensorRT engines in a folder, each beside a record of what it depends on.

A plan is native code, and is trusted by its place: a folder that only this user or root can write to. That proves
nothing of a bundle's folder, which this user may have downloaded with everything in it. So plans lie in the user's
cache, or in a folder that the operator names and vouches for, and none is read from a bundle, even if it is named.
The SHA-256 in a record detects damage, such as a copy that was cut short. It does not prove where a plan comes from.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from latentrt.bundle.bundle import Bundle, read_manifest
from latentrt.bundle.spec import ADAPTER, ADD_ONS, LORA, RESIDUAL, GraphSpec
from latentrt.errors import BundleError, LatentrtError, PlanError, UntrustedFileError
from latentrt.runtime.tensorrt.record import PlanKey, PlanRecord
from latentrt.storage import cache_folder, check_trusted, read_trusted, write_atomic

IN_BUNDLE = "plans"  # where earlier versions kept them
READABLE = 0o644  # the user who builds is not always the one who serves


class PlanStore:
    """A folder of plans and their records.

    Args:
        bundle: the bundle that the plans are for.
        folder: where they lie; None is the bundle's own place in the user's cache.
        graph: whose plans are wanted: errors then say what builds these.

    Raises:
        PlanError: the folder lies in a bundle.
    """

    def __init__(self, bundle: Bundle, folder: str | Path | None = None, graph: GraphSpec | None = None) -> None:
        self.bundle, self._graph, own = bundle, graph, _cached(bundle)
        self.folder = own if folder is None else Path(folder)
        self._named = self.folder != own
        if around := _bundle_around(self.folder):
            raise PlanError(
                f"the plans' folder {self.folder} lies in the bundle {around}",
                needed="a folder outside: bundles are downloaded, and plans are native code",
                fix=f"{_command(bundle)}, without --plans or with another folder",
            )

    def fitting(self, wanted: PlanKey) -> list[PlanRecord]:
        """Return the records of all plans that serve `wanted`, with any profiles, in order of preference.

        Raises:
            PlanError: there is none; the nearest one's differences are named.
            UntrustedFileError: another user may have written to the folder, or to the record that is needed.
        """
        records, refused = self.survey(wanted.network)
        if fitting := [record for record in records if not record.key.mismatches(wanted)]:
            return sorted(fitting, key=lambda record: record.key.preference)
        if refused:
            raise next(iter(refused.values()))
        if not records:
            raise self._error(
                f"{self.folder} holds no plan of the {wanted.network}{self._not_loaded()}",
                "a plan that was built for this device",
            )
        nearest = min((record.key.mismatches(wanted) for record in records), key=len)
        found = ", ".join(f"{what} {self.named(mine)}" for what, mine, _ in nearest)
        needed = ", ".join(f"{what} {self.named(theirs)}" for what, _, theirs in nearest)
        raise self._error(f"the nearest plan of the {wanted.network} was built for {found}", needed)

    def choose(self, records: Sequence[PlanRecord], sizes: Mapping[str, int]) -> PlanRecord:
        """Return the plan that serves these sizes best; the choice depends only on the plans and sizes.

        Raises:
            PlanError: none does; the message has the ranges that they serve.
        """
        covering = [record for record in records if record.profile(sizes) >= 0]
        if not covering:
            asked = ", ".join(f"{name} {size}" for name, size in sizes.items())
            profiles = "; or ".join(str(profile) for record in records for profile in record.key.profiles)
            raise self._error(f"the {records[0].key.network} was asked for {asked}", profiles)
        return min(covering, key=lambda record: record.key.profiles[record.profile(sizes)].slack(sizes))

    def survey(self, network: str | None = None) -> tuple[list[PlanRecord], dict[str, LatentrtError]]:
        """Return the records in the folder, of one network or all, and by name why others are refused.

        Raises:
            UntrustedFileError: another user may have written to the folder.
            PlanError: it cannot be read.
        """
        records, refused = [], dict[str, LatentrtError]()
        for name in self._names():
            if network in (None, name.rpartition("-")[0]):
                try:
                    records.append(self.record(name))
                except (PlanError, UntrustedFileError) as error:
                    refused[name] = error
        return records, refused

    def record(self, name: str) -> PlanRecord:
        """Read the record of that name.

        Raises:
            UntrustedFileError: another user may have written to it, or to the folder.
            PlanError: there is none, or it is damaged.
        """
        path = self.folder / f"{name}.json"
        try:
            record = PlanRecord.from_json(self._bytes(path).decode())
        except ValueError as error:
            raise self._damaged(path, f"cannot be read ({error})", "the record of a plan") from error
        if record.name != name:
            raise self._damaged(path, f"is the record of {record.name}", "a record under its own name")
        return record

    def read(self, record: PlanRecord) -> bytes:
        """Return a plan's bytes.

        Raises:
            UntrustedFileError: another user may have written to the file, or to the folder.
            PlanError: there is no such file, or it is damaged.
        """
        path = self.path(record)
        plan = self._bytes(path)
        if len(plan) != record.bytes or hashlib.sha256(plan).hexdigest() != record.sha256:
            found = f"has {len(plan)} bytes that are not the ones that were built"
            raise self._damaged(path, found, f"{record.bytes} bytes with SHA-256 {record.sha256}")
        return plan

    def path(self, record: PlanRecord) -> Path:
        """Return the path of a record's plan. A hash in its name lets a new plan lie beside the old one of its key."""
        return self.folder / f"{record.name}-{record.sha256[:16]}.plan"

    def put(self, record: PlanRecord, plan: bytes | memoryview) -> Path:
        """Write a plan and its record; a plan of the same key is replaced whole or not at all.

        Raises:
            PlanError: it cannot be written.
        """
        path = self.path(record)
        try:
            try:
                write_atomic(path, plan, READABLE)
                write_atomic(self.folder / f"{record.name}.json", record.to_json().encode(), READABLE)
            finally:  # the record in the folder now names the plan in use: the new one, or still the old one
                self._remove_plans_but(record.name)
        except OSError as error:
            raise PlanError(
                f"{path} cannot be written ({error})",
                needed=f"a folder that can be written to, with {len(plan) / 1e6:.0f} MB free",
                fix=f"make room, or choose another folder: {_command(self.bundle)} --plans FOLDER",
            ) from error
        return path

    def remove(self, name: str) -> None:
        """Remove a plan by its record's name: the record first, so that no record is ever without its plan.

        Raises:
            PlanError: there is none of that name, or it cannot be removed.
            UntrustedFileError: another user may have written to the folder.
        """
        if name not in self._names():
            raise PlanError(
                f"{self.folder} has no plan {name!r}",
                needed="the name of one that it has",
                fix=f"{_command(self.bundle)}{self._folder_told} --list",
            )
        try:
            for file in (self.folder / f"{name}.json", *self._plans(name)):
                file.unlink(missing_ok=True)
        except OSError as error:
            raise PlanError(f"{name} cannot be removed ({error})", needed="permission to remove it") from error

    @property
    def command(self) -> str:
        """The command that builds into this folder."""
        if self.bundle.spec.kind in ADD_ONS:  # which are built for a model
            return f"latentrt build MODEL --controlnet NAME={shlex.quote(str(self.bundle.root))}{self._folder_told}"
        return _command(self.bundle) + "".join(_options(self._graph)) + self._folder_told

    @property
    def _folder_told(self) -> str:
        return f" --plans {shlex.quote(str(self.folder))}" if self._named else ""

    def named(self, value: str) -> str:
        """Return the name of the bundle's file with this hash, or a hash's beginning; what is none stays as it is."""
        names = {record.sha256: name for name, record in self.bundle.files.items()}
        return names.get(value) or (value[:12] if len(value) == 64 else value)

    def _names(self) -> list[str]:
        """Return the names of the records in the folder: none where there is no folder."""
        try:
            check_trusted(self.folder)
            files = sorted(os.listdir(self.folder))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise PlanError(f"{self.folder} cannot be read ({error})", needed="a folder of plans") from error
        return [match[1] for file in files if (match := re.fullmatch(r"(.+-[0-9a-f]{16})\.json", file))]

    def _bytes(self, path: Path) -> bytes:
        try:
            return read_trusted(path)
        except OSError as error:
            raise self._damaged(path, f"cannot be read ({error})", "a plan and its record") from error

    def _plans(self, name: str) -> list[Path]:
        """Return the plans that belong to a record's name."""
        return [path for path in self.folder.glob("*.plan") if path.stem.rpartition("-")[0] == name]

    def _remove_plans_but(self, name: str) -> None:
        """Remove the plans that belong to a record's name, except the one that the record names."""
        kept = None
        with suppress(PlanError, UntrustedFileError):
            kept = self.path(self.record(name))
        for path in self._plans(name):
            if path != kept:
                path.unlink(missing_ok=True)

    def _not_loaded(self) -> str:
        """Return a note where plans lie in the bundle, as those of earlier versions do; else an empty text."""
        folder = self.bundle.root / IN_BUNDLE
        if not any(folder.glob("*.plan")):
            return ""
        return f"; those in {folder} are not used, since no native code is loaded from a bundle"

    def _error(self, found: str, needed: str) -> PlanError:
        return PlanError(found, needed=needed, fix=f"{self.command} (see --lanes, --size, --precision)")

    def _damaged(self, path: Path, found: str, needed: str) -> PlanError:
        return PlanError(f"{path} {found}", needed=needed, fix=f"{self.command}, which builds it again")


def weights_digest(bundle: Bundle, graph: GraphSpec) -> str:
    """Return the SHA-256 over the names and hashes of the safetensors beside a graph: the weights that it can read."""
    folder = graph.path.rpartition("/")[0]
    return _digest(bundle, lambda name: name.endswith(".safetensors") and name.rpartition("/")[0] == folder)


def _cached(bundle: Bundle) -> Path:
    """Return a bundle's folder in the user's cache: the model's id, for people, and a hash of the graphs.

    It stays the same where only weights change, since a refittable plan serves those of a merged LoRA as well.
    """
    readable = re.sub(r"[^A-Za-z0-9_.-]+", "-", bundle.spec.id)[:40]
    return cache_folder("plans", f"{readable}-{_digest(bundle, lambda name: name.endswith('.onnx'))[:16]}")


def _digest(bundle: Bundle, counts: Callable[[str], bool]) -> str:
    """Return the SHA-256 over the names and hashes of some of a bundle's files."""
    lines = [f"{name} {record.sha256}\n" for name, record in sorted(bundle.files.items()) if counts(name)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _bundle_around(folder: Path) -> Path | None:
    """Return the bundle that a folder lies in, by its path or by a link's target; None if it lies in none."""
    for path in (Path(os.path.abspath(folder)), folder.resolve()):
        for parent in (path, *path.parents):
            with suppress(BundleError):
                read_manifest(parent)
                return parent
    return None


def _command(bundle: Bundle) -> str:
    return f"latentrt build {shlex.quote(str(bundle.root))}"


def _options(graph: GraphSpec | None) -> Iterator[str]:
    """Yield the options of `latentrt build` that choose this graph of a model's network."""
    read = () if graph is None else tuple(tensor.name for tensor in graph.inputs)
    if any(name.startswith((RESIDUAL, ADAPTER)) for name in read):
        yield " --controlnet NAME=BUNDLE"
    if any(name.startswith(LORA) for name in read):
        yield " --lora-rank RANK"
