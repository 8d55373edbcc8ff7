"""gpu-PRESET.json: every sample by side and batch, and the runs that they belong to."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.gpu.child import OUT_OF_TIME
from benchmarks.gpu.config import Config
from benchmarks.measures import rounded
from latentrt.errors import RequestError


@dataclass
class Results:
    """The file's contents: {"preset", "size", "runs": {run: about}, "sides": {side: {batch: record}}, "drift"}.

    A lease adds "variants", "profiles" and "jobs", each {name: record}; a record names its run. With `keeps_figures` a
    reason why something was not measured replaces no figures.
    """

    path: Path
    data: dict[str, Any]
    run: str = ""
    keeps_figures: bool = False

    @classmethod
    def open(cls, folder: Path, config: Config) -> Results:
        """Open a preset's file; without one, return empty results.

        Raises:
            RequestError: its figures are of another size or number of steps.
        """
        path = folder / f"gpu-{config.preset}.json"
        new = {"preset": config.preset, "size": list(config.size or ()), "steps": config.steps}
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        found = {key: data.get(key) for key in new}
        if data and found != new:
            raise RequestError(
                f"{path.name} has figures of {found}", needed=f"{new}", fix="pass another --results, or remove it"
            )
        return cls(path, data or {**new, "runs": {}, "sides": {}, "drift": {}})

    def begin(self, about: dict[str, Any]) -> None:
        """Begin a run; runs that have no figures left are dropped."""
        self.run = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S}"
        self.data["runs"] = {run: part for run, part in self.data["runs"].items() if run in self._used()}
        self.data["runs"][self.run] = about
        self._write()

    def put(self, side: str, batch: int, record: dict[str, Any]) -> None:
        """Replace a side's record of a batch."""
        self._put(self.data["sides"].setdefault(side, {}), str(batch), record)

    def put_drift(self, kind: str, steps: int, found: dict[str, Any]) -> None:
        """Replace the drift of one kind over a number of steps."""
        self._put(self.data["drift"].setdefault(str(steps), {}), kind, found)

    def put_in(self, kind: str, name: str, record: dict[str, Any]) -> None:
        """Replace one of the "variants", "profiles" or "loras" of a lease."""
        self._put(self.data.setdefault(kind, {}), name, record)

    def put_job(self, name: str, record: dict[str, Any]) -> None:
        """Replace the state of a job of a lease."""
        self.data.setdefault("jobs", {})[name] = {"run": self.run, **record}
        self._write()

    def forget(self, prefix: str) -> None:
        """Remove the states of jobs whose names begin so."""
        jobs = self.data.get("jobs", {})
        for name in [name for name in jobs if name.startswith(prefix)]:
            del jobs[name]

    def _put(self, part: dict[str, Any], key: str, record: dict[str, Any]) -> None:
        """Write a record; one whose only reason is missing time replaces none."""
        why = str(record.get("missing", ""))
        kept = self.keeps_figures and key in part and "missing" not in part[key]
        if key not in part or not (why and (kept or why.startswith(OUT_OF_TIME))):
            part[key] = {"run": self.run, **record}
            self._write()

    def _used(self) -> set[str]:
        of_a_lease = (self.data.get(kind, {}) for kind in ("variants", "profiles", "loras", "jobs"))
        parts = (*self.data["sides"].values(), *self.data["drift"].values(), *of_a_lease)
        return {record["run"] for part in parts for record in part.values()}

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(rounded(self.data), indent=1, ensure_ascii=False) + "\n"
        part = self.path.with_suffix(".part")  # a run may be killed at any time
        part.write_text(text, encoding="utf-8")
        part.replace(self.path)

    def measured(self) -> list[str]:
        """Return the sides that have figures."""
        sides = self.data["sides"].items()
        return [side for side, part in sides if any("missing" not in record for record in part.values())]
