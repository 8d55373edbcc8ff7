"""peers.json: every sample, and what follows from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.measures import OURS, Measure, Spread, rounded
from benchmarks.peers.config import GOAL

FILE = "peers.json"
COLD, READY, ONE, BATCH = "cold start", "time to ready", "one image", "batch"
COLD_PEAK, WARM_PEAK = "peak memory, cold start", "peak memory, batch"
UNITS: Mapping[str, str] = {COLD: "s", READY: "s", ONE: "s", BATCH: "s", COLD_PEAK: "MiB", WARM_PEAK: "MiB"}


@dataclass
class Record:
    """What is known of one peer with one model.

    Attributes:
        samples: by row, for each side its samples; sample i of both belongs to round i.
        missing: why there are no (more) figures.
        versions: of the peer's packages.
        psnr_db: of its picture with ours; None where pictures cannot be compared.
    """

    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    missing: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    psnr_db: float | None = None

    def add(self, row: str, ours: float, theirs: float, peer: str) -> None:
        """Keep a round's samples."""
        pair = self.samples.setdefault(row, {OURS: [], peer: []})
        pair[OURS].append(ours)
        pair[peer].append(theirs)

    def measure(self, row: str) -> Measure | None:
        """Return a row's samples; None where there are none."""
        return Measure(row, UNITS[row], self.samples[row]) if row in self.samples else None

    def ratio(self, row: str) -> Spread | None:
        """Return how many times better we are, round by round; None where it was not measured."""
        measure = self.measure(row)
        return measure.ratio(list(measure.samples)[1]) if measure else None

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {"samples": self.samples, "missing": self.missing, "versions": self.versions, "psnr_db": self.psnr_db}


class Verdict(NamedTuple):
    """The goal in one row: the closest peer, our ratio to it, and whether we are first by enough."""

    peer: str
    ratio: Spread
    reached: bool


def verdict(records: Mapping[str, Record], row: str) -> Verdict | None:
    """Return the goal's verdict; None where no peer was measured."""
    ratios = {peer: ratio for peer, record in records.items() if (ratio := record.ratio(row))}
    if not ratios:
        return None
    closest = min(ratios, key=lambda peer: ratios[peer].median)
    return Verdict(closest, ratios[closest], ratios[closest].median >= GOAL)


def _of(about: Mapping[str, Any]) -> dict[str, Any]:
    """Return what figures must have in common to stand on one page."""
    machine = {key: value for key, value in about["machine"].items() if key != "load_before"}
    return {**machine, "threads": about["threads"]}


@dataclass
class Results:
    """Records by model and peer, with what they depend on; written to the file as they grow."""

    path: Path
    about: dict[str, Any]
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    records: dict[str, dict[str, Record]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Results:
        """Read the folder's file."""
        data = json.loads((folder / FILE).read_text(encoding="utf-8"))
        models, records = {}, {}
        for name, part in data["models"].items():
            records[name] = {peer: Record(**record) for peer, record in part.pop("peers").items()}
            models[name] = part
        return cls(folder / FILE, data["about"], models, records)

    @classmethod
    def begin(cls, folder: Path, about: Mapping[str, Any]) -> Results:
        """Return results that keep the models of earlier runs on the same machine, until they run again."""
        if not (folder / FILE).is_file():
            return cls(folder / FILE, dict(about))
        before = cls.read(folder)
        if _of(before.about) != _of(about):
            return cls(folder / FILE, dict(about))
        named = {key: {**before.about[key], **about[key]} for key in ("titles", "differs")}
        return cls(folder / FILE, {**about, **named}, before.models, before.records)

    def write(self) -> None:
        """Replace the file."""
        models = {
            name: {**about, "peers": {peer: record.to_dict() for peer, record in self.records[name].items()}}
            for name, about in self.models.items()
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(rounded({"about": self.about, "models": models}), indent=1, ensure_ascii=False) + "\n"
        part = self.path.with_suffix(".part")  # a run may be killed at any time
        part.write_text(text, encoding="utf-8")
        part.replace(self.path)
