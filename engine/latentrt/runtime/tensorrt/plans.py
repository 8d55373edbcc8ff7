"""Plans: serialized TensorRT engines in a bundle's plan cache, keyed, sealed and verified.

A plan is native code for one device. So it lies under a key of everything it depends on, its record is sealed with a
secret of the machine (or fleet) that built it, and its bytes are compared with the record before anyone may load them.
A plan that came with a download is none of ours: it is refused, whatever hash stands beside it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.spec import GraphSpec
from latentrt.errors import PlanError, UntrustedPlanError
from latentrt.runtime.tensorrt.record import PlanKey, PlanRecord, Profile, Weight
from latentrt.runtime.tensorrt.seal import SEAL_VARIABLE, canonical, check_secret, is_sealed, seal

SCHEMA = 1
FOLDER = "plans"


class PlanStore:
    """A folder of plans and their records.

    Args:
        bundle: whose plans these are.
        folder: where they lie; the bundle's own `plans/` by default.
    """

    def __init__(self, bundle: Bundle, folder: str | Path | None = None) -> None:
        self.bundle = bundle
        self.folder = Path(folder) if folder is not None else bundle.path(FOLDER)

    def find(self, wanted: PlanKey, sizes: Mapping[str, int]) -> PlanRecord:
        """The record of the plan that serves `wanted` best with these sizes of its symbolic dimensions (none: any).

        Raises:
            PlanError: there is none; the nearest one's differences, or the ranges that there are, are named.
            UntrustedPlanError: a record of this network is damaged or was not sealed here.
        """
        return self.choose(self.fitting(wanted), sizes)

    def choose(self, records: Sequence[PlanRecord], sizes: Mapping[str, int]) -> PlanRecord:
        """Of plans of a network, that which serves these sizes best: among the same plans, always the same one.

        Raises:
            PlanError: none does; the ranges that there are are named.
        """
        covering = [record for record in records if record.profile(sizes) >= 0]
        if not covering:
            raise self._no_profile(records, sizes)
        return min(covering, key=lambda record: record.key.profiles[record.profile(sizes)].slack(sizes))

    def fitting(self, wanted: PlanKey) -> list[PlanRecord]:
        """The records of all plans that serve `wanted`, whatever their profiles; those with the fewest options first.

        Raises:
            PlanError: there is none; the nearest one's differences are named.
            UntrustedPlanError: a record of this network is damaged or was not sealed here.
        """
        records = list(self.records(wanted.network))
        fitting = [record for record in records if not record.key.mismatches(wanted)]
        if fitting:
            return sorted(fitting, key=lambda record: len(record.key.options))
        if not records:
            raise self._error(f"{self.folder} holds no plan of the {wanted.network}", "a plan built on this device")
        nearest = min((record.key.mismatches(wanted) for record in records), key=len)
        found = ", ".join(f"{what} {_short(mine)}" for what, mine, _ in nearest)
        needed = ", ".join(f"{what} {_short(theirs)}" for what, _, theirs in nearest)
        raise self._error(f"the nearest plan of the {wanted.network} was built for {found}", needed)

    def records(self, network: str) -> Iterator[PlanRecord]:
        """The records of a network's plans, each one's seal checked.

        Raises:
            UntrustedPlanError: a record is damaged or was not sealed here.
        """
        for path in self._paths(network):
            yield self._record(path)

    def survey(self) -> tuple[list[PlanRecord], dict[str, PlanError]]:
        """The plans that are there: the records of those that may be loaded, and why the others may not, by name.

        Raises:
            UntrustedPlanError: the secret cannot be used, so nothing is known of any.
        """
        check_secret()
        records, refused = [], dict[str, PlanError]()
        for path in (path for network in self.bundle.spec.networks for path in self._paths(network)):
            try:
                records.append(self._record(path))
            except PlanError as error:
                refused[path.stem] = error
        return records, refused

    def current(self, record: PlanRecord) -> PlanRecord:
        """The record of a plan's key as it is now: the plan may have been built again since it was found.

        Raises:
            UntrustedPlanError: it is gone, damaged, or was not sealed here.
        """
        return self._record(self.folder / f"{record.name}.json")

    def read(self, record: PlanRecord) -> bytes:
        """A plan's bytes, exactly those that were built.

        Raises:
            UntrustedPlanError: the file is missing, or its bytes are others.
        """
        path = self.path(record)
        try:
            plan = path.read_bytes()
        except OSError as error:
            raise self._untrusted(path, f"cannot be read ({error})", "the plan of its record", record.name) from error
        if len(plan) != record.bytes or hashlib.sha256(plan).hexdigest() != record.sha256:
            found = f"has {len(plan)} bytes that are not the built ones"
            raise self._untrusted(path, found, f"SHA-256 {record.sha256}", record.name)
        return plan

    def path(self, record: PlanRecord) -> Path:
        """Where a record's plan lies. A name of its contents' own lets a new plan lie beside the old one of its key."""
        return self.folder / f"{record.name}-{record.sha256[:16]}.plan"

    def put(self, record: PlanRecord, plan: bytes) -> Path:
        """Write a plan and its sealed record; a plan of the same key is replaced at once or not at all.

        Raises:
            PlanError: it cannot be written, or its network's name leads out of the folder.
            UntrustedPlanError: the secret that seals it is not private.
        """
        path = self.path(record)
        if path.parent != self.folder:  # manifests are not ours either
            raise PlanError(
                f"a network is called {record.key.network!r}", needed="a name without slashes", fix="export it again"
            )
        try:
            sealed = {**_to_dict(record), "seal": seal(_to_dict(record), make=True)}
            self.folder.mkdir(parents=True, exist_ok=True)
            with _gone_unless_done(path):
                _replace(path, plan)
                _replace(self.folder / f"{record.name}.json", json.dumps(sealed, indent=1).encode())
            for old in set(self._files(record.name)) - {path}:
                old.unlink(missing_ok=True)
        except OSError as error:
            raise PlanError(
                f"{path} cannot be written ({error})",
                needed=f"a folder that can be written to, with {len(plan) / 1e6:.0f} MB free",
                fix="make room, or choose another folder: latentrt build BUNDLE --plans FOLDER",
            ) from error
        return path

    def remove(self, name: str) -> None:
        """Remove a plan, whoever built it: its record first, so that no record is ever without its plan.

        Args:
            name: its record's file without suffix; nothing that stands in the record is believed.

        Raises:
            PlanError: there is none of that name, or it cannot be removed.
        """
        paths = (path for network in self.bundle.spec.networks for path in self._paths(network))
        path = next((path for path in paths if path.stem == name), None)
        if path is None:
            raise PlanError(
                f"{self.folder} has no plan {name!r}",
                needed="the name of one that is there",
                fix=f"{self.command} --list",
            )
        try:
            for file in (path, *self._files(name)):
                file.unlink(missing_ok=True)
        except OSError as error:
            raise PlanError(
                f"{name} cannot be removed ({error})", needed="a file that may be", fix="remove it by hand"
            ) from error

    def sweep(self) -> None:
        """Remove what a build that was killed has left half-written; for whoever alone builds in the folder."""
        for kind in ("plan", "json"):
            for part in self.folder.glob(f"*.{kind}.*.part"):
                part.unlink(missing_ok=True)

    @property
    def command(self) -> str:
        """What to type to build into this folder."""
        own = self.folder == self.bundle.path(FOLDER)
        return f"latentrt build {self.bundle.root}" + ("" if own else f" --plans {self.folder}")

    def _paths(self, network: str) -> list[Path]:
        """The files in the folder that are named as a network's records are; text_encoder-... is none of
        text_encoder_2's.
        """
        named = [(path, *path.stem.rpartition("-")) for path in sorted(self.folder.glob("*.json"))]
        return [path for path, before, _, digest in named if before == network and digest.isalnum()]

    def _files(self, name: str) -> list[Path]:
        """The plans of a record, by its name."""
        return [path for path in self.folder.glob("*.plan") if path.stem.rpartition("-")[0] == name]

    def _record(self, path: Path) -> PlanRecord:
        try:
            data = json.loads(path.read_bytes())
            given = data.pop("seal")
            genuine = is_sealed(data, given)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._untrusted(path, f"cannot be read ({error!r})", "the record of a plan") from error
        if not genuine:
            raise self._untrusted(
                path,
                "was not sealed with this machine's secret: the plan was built elsewhere, or changed",
                f"a plan built here, or its secret ({SEAL_VARIABLE}); plans are native code",
            )
        record = _from_dict(data)
        if record.name != path.stem:
            raise self._untrusted(path, f"is the record of {record.name}", "a record under its own name")
        return record

    def _no_profile(self, records: Sequence[PlanRecord], sizes: Mapping[str, int]) -> PlanError:
        profiles = "; or ".join(str(profile) for record in records for profile in record.key.profiles)
        asked = ", ".join(f"{name} {size}" for name, size in sizes.items())
        return self._error(f"the {records[0].key.network} was asked for {asked}", profiles)

    def _error(self, found: str, needed: str) -> PlanError:
        return PlanError(found, needed=needed, fix=f"{self.command} (see --lanes, --size, --precision)")

    def _untrusted(self, path: Path, found: str, needed: str, name: str = "") -> UntrustedPlanError:
        fix = f"{self.command} --remove {name or path.stem}; then build"
        return UntrustedPlanError(f"{path} {found}", needed=needed, fix=fix)


def weights_digest(bundle: Bundle, graph: GraphSpec) -> str:
    """SHA-256 over the names and hashes of the safetensors beside a graph: the weights it can read."""
    folder = graph.path.rpartition("/")[0]
    lines = [
        f"{name} {record.sha256}\n"
        for name, record in sorted(bundle.files.items())
        if name.endswith(".safetensors") and name.rpartition("/")[0] == folder
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _to_dict(record: PlanRecord) -> dict[str, Any]:
    """As JSON will give it back."""
    data: dict[str, Any] = json.loads(canonical({"schema": SCHEMA, **asdict(record)}))
    return data


def _from_dict(data: Mapping[str, Any]) -> PlanRecord:
    """A record whose seal was good: its fields are those that were written here."""
    if data["schema"] != SCHEMA:
        raise PlanError(
            f"a plan's record has schema {data['schema']!r}", needed=f"schema {SCHEMA}", fix="build the plan again"
        )
    key = {f.name: data["key"][f.name] for f in fields(PlanKey)}
    key["profiles"] = tuple(
        Profile({name: (low, best, high) for name, (low, best, high) in profile["ranges"].items()})
        for profile in key["profiles"]
    )
    key["options"] = tuple(key["options"])
    refit = {name: Weight(**weight) for name, weight in data["refit"].items()}
    return PlanRecord(PlanKey(**key), data["sha256"], data["bytes"], refit, data["made"])


def _replace(path: Path, data: bytes) -> None:
    """Write beside, then rename: a reader sees the old file or the new one, and a full disk leaves the old one."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _gone_unless_done(path: Path) -> Iterator[None]:
    """Where what follows fails, remove a file that was not there before: a plan without a record is of no use."""
    before = path.exists()
    try:
        yield
    except BaseException:
        if not before:
            path.unlink(missing_ok=True)
        raise


def _short(value: str) -> str:
    """A hash is told apart by its beginning."""
    return value[:12] if len(value) == 64 else value
