"""A lease: the jobs that are left, one after the other, until the time is over."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.gpu.child import Deadline, Meter, NotMeasuredError, reason
from benchmarks.gpu.config import Config
from benchmarks.gpu.lease.bundles import add_graphs
from benchmarks.gpu.lease.jobs import DRIFT, LORAS, PICTURES, PROFILE, VARIANT, Job, jobs_of
from benchmarks.gpu.results import Results
from benchmarks.gpu.run import (
    FAILURES,
    Runner,
    about_run,
    bundle_of,
    measure_batch,
    measure_drift,
    meter_of,
    need_gpu,
    say,
    started,
    with_bundle,
)
from benchmarks.gpu.variants import TOLERANCE
from latentrt.errors import LatentrtError

INTERRUPTED = "The lease ended while it ran."
UNPACK, REFERENCE = 180.0, 120.0  # seconds
WORTH = 0.3  # a job begins only where so much of its limit is left
NETWORKS = "benchmarks.gpu.lease.networks"


def run(config: Config, folder: Path, packed: Path | None = None) -> list[Results]:
    """Do the jobs that are left; return the results of the presets that were measured.

    A job is left over where it was not done on this model of GPU, or measured another variant than the best one. Jobs
    that failed before come last.

    Args:
        config: its preset is measured first; with a `bundle`, which gets one more variant of its graphs, alone.
        folder: of the results.
        packed: a folder with bundles without weights (see `bundles`), used where a preset's bundle is missing.

    Raises:
        LatentrtError: there is no GPU, or the results are of another size or of other steps.
    """
    need_gpu(config)
    lease = Lease(config, folder, packed)
    try:
        for job in by_failures(list(jobs_of(config.preset, alone=config.bundle is not None)), folder):
            lease.do(job)
    finally:
        lease.close()
    return lease.results


def by_failures(jobs: Sequence[Job], folder: Path) -> list[Job]:
    """Return the jobs in their order, those that failed in earlier leases after the others."""
    known: dict[str, Any] = {}
    for preset in {job.preset for job in jobs}:
        path = folder / f"gpu-{preset}.json"
        known[preset] = json.loads(path.read_text(encoding="utf-8")).get("jobs", {}) if path.is_file() else {}
    return sorted(jobs, key=lambda job: known[job.preset].get(job.name, {}).get("failures", 0))


class Lease:
    """The state of a lease: its time, its GPU, and the presets that were opened."""

    def __init__(self, config: Config, folder: Path, packed: Path | None) -> None:
        self._config, self._folder, self._packed = config, folder, packed
        self._deadline = Deadline(config.minutes)
        try:
            self._gpu = str(config.open_hardware().describe()["name"])
        except LatentrtError:  # diffusers has libraries of its own
            self._gpu = ""
        self._first = self._new(config.preset)
        self._presets: dict[str, Preset | str] = {config.preset: self._first}

    def do(self, job: Job) -> None:
        """Do a job unless it is done, and record how it ended."""
        short = self._deadline.seconds < job.limit * WORTH
        preset = self._deadline.reason if short and job.preset not in self._presets else self._open(job.preset)
        if isinstance(preset, str):
            self._leave_out(job, preset)
            return
        best = self._first.best(self._gpu) if job.uses_best else ""
        if preset.done(job, best, self._gpu):
            return
        if short:
            preset.note(job, self._deadline.reason)
            return
        say(f"{job.preset}, {job.name}, at most {job.limit:.0f} s")
        before, start = preset.failures(job), time.monotonic()
        state: dict[str, Any] = {"variant": best} if job.uses_best else {}
        preset.results.put_job(job.name, {**state, "missing": INTERRUPTED, "failures": before + 1})
        own = self._deadline.within(job.limit)
        try:
            if job.kind == VARIANT:
                preset.need_reference()
                own = self._deadline.within(job.limit)
            preset.work(job, best, own)
            state["failures"] = 0
        except FAILURES as error:
            state["missing"] = own.reason if own.over else reason(error)
            state["failures"] = before + (not self._deadline.over)
        state["seconds"] = time.monotonic() - start
        preset.results.put_job(job.name, state)
        say(f"  {state.get('missing', 'done')} ({state['seconds']:.0f} s)")

    @property
    def results(self) -> list[Results]:
        """The results of the presets that were opened."""
        return [preset.results for preset in self._presets.values() if isinstance(preset, Preset)]

    def close(self) -> None:
        """Remove what was made for this lease alone."""
        for preset in self._presets.values():
            if isinstance(preset, Preset):
                preset.close()

    def _leave_out(self, job: Job, why: str) -> None:
        """Record, with the first preset, why a job of another one has no results of its own."""
        say(f"{job.preset}, {job.name}: not measured: {why}")
        self._first.results.put_job(f"{job.preset}: {job.name}", {"missing": why})

    def _open(self, name: str) -> Preset | str:
        """Return a preset, or why it cannot be opened. Only the first one is worth an export while a GPU waits."""
        if name not in self._presets:
            packed = self._packed is not None and (self._packed / name).is_dir()
            try:
                if not packed and not (bundle_of(name) / "manifest.json").is_file():
                    raise NotMeasuredError("its bundle is neither here nor in --packed")
                self._presets[name] = self._new(name)
                self._first.results.forget(f"{name}: ")
            except FAILURES as error:
                self._presets[name] = reason(error)
        return self._presets[name]

    def _new(self, name: str) -> Preset:
        config = replace(self._config, preset=name, alone=True)
        return Preset(config, self._folder, self._packed, self._deadline)


class Preset:
    """One preset's bundle, results and jobs."""

    def __init__(self, config: Config, folder: Path, packed: Path | None, deadline: Deadline) -> None:
        deadline.left(0)
        if packed is not None and config.bundle is None:
            _unpack(config.preset, packed / config.preset, deadline)
        self.config = with_bundle(config, deadline)
        assert self.config.bundle is not None
        add_graphs(self.config.bundle)
        hardware = self.config.open_hardware()
        self.results = Results.open(folder, self.config)
        self.results.keeps_figures = True
        self.results.begin(about_run(self.config, hardware, deadline))
        self._deadline = deadline
        self._meter: Meter | None = meter_of(hardware)
        self._first: dict[int, tuple[str, list[Any]]] = {}
        self._files = tempfile.TemporaryDirectory(prefix="latentrt-")
        self._reference, self._no_reference = Path(self._files.name) / "reference.npz", ""

    def close(self) -> None:
        """Remove the reference."""
        self._files.cleanup()

    def done(self, job: Job, best: str, gpu: str) -> bool:
        """Return whether there is nothing to do: it was done on this model of GPU, for the variant that is best."""
        if job.kind == PROFILE:
            profile = self.results.data.get("profiles", {}).get(job.what or best)
            return profile is not None and self._ran_on(profile, gpu)
        state = self.results.data.get("jobs", {}).get(job.name)
        if state is None or "missing" in state or (job.uses_best and state["variant"] != best):
            return False
        return self._ran_on(state, gpu)

    def failures(self, job: Job) -> int:
        """Return how often it failed by itself, not because a lease ended."""
        return int(self.results.data.get("jobs", {}).get(job.name, {}).get("failures", 0))

    def note(self, job: Job, why: str) -> None:
        """Record why a job was not begun, unless it was begun before."""
        if job.name not in self.results.data.get("jobs", {}):
            self.results.put_job(job.name, {"missing": why, "failures": 0})

    def best(self, gpu: str) -> str:
        """Return the variant with which the networks of a picture are fastest; empty where none was measured."""
        records = self.results.data.get("variants", {}).items()
        measured = [name for name, each in records if "missing" not in each and self._ran_on(each, gpu)]
        return min(measured, key=self._picture_ms, default="")

    def need_reference(self) -> None:
        """Make the outputs that variants are compared with, once in a lease.

        Raises:
            NotMeasuredError: they cannot be made.
        """
        if not self._no_reference and not self._reference.exists():
            try:
                with started(f"{NETWORKS}:Reference", self.config) as child:
                    child.ask(self._deadline.left(REFERENCE), "write", self._reference)
            except NotMeasuredError as error:
                self._no_reference = f"there is no float32 reference: {error}"
        if self._no_reference:
            raise NotMeasuredError(self._no_reference)

    def work(self, job: Job, best: str, deadline: Deadline) -> None:
        """Do a job.

        Raises:
            NotMeasuredError: it failed, or the deadline is over.
        """
        config = replace(self.config, variant=best, level=job.level)
        if job.kind == PROFILE:
            self._profile(replace(config, variant=job.what or best), deadline)
        elif job.kind == VARIANT:
            self._variant(replace(config, variant=job.what, repeats=3, calls=20), deadline)
        elif job.kind == PICTURES:
            self._pictures(replace(config, batches=(job.count,), repeats=3), job, deadline)
        elif job.kind == LORAS:
            self._loras(replace(config, repeats=3, calls=20), deadline)
        elif job.kind == DRIFT:
            self._drift(replace(config, drift=(job.count,), sides=("diffusers", "ort")), job.count, deadline)

    def _profile(self, config: Config, deadline: Deadline) -> None:
        if not config.variant:
            raise NotMeasuredError("no variant was measured yet")
        with started(f"{NETWORKS}:VariantSide", config) as child:
            kernels = child.ask(deadline.left(config.limit), "kernels")
        self.results.put_in("profiles", config.variant, {"kernels": kernels})

    def _variant(self, config: Config, deadline: Deadline) -> None:
        with started(f"{NETWORKS}:VariantSide", config) as child:
            found = child.ask(deadline.left(config.limit), "measure", self._reference)
        if "alone_ms" not in found:
            errors = ", ".join(f"{name} {error:.1e}" for name, error in found["relative"].items())
            found["missing"] = f"the relative error is over {TOLERANCE:g} ({errors})"
        self.results.put_in("variants", config.variant, found)
        if "missing" in found:
            raise NotMeasuredError(found["missing"])

    def _loras(self, config: Config, deadline: Deadline) -> None:
        with started(f"{NETWORKS}:LoraSide", config) as child:
            found = child.ask(deadline.left(config.limit), "measure")
        for rank, times in found.items():
            self.results.put_in("loras", rank, {"unet_ms": times})

    def _pictures(self, config: Config, job: Job, deadline: Deadline) -> None:
        runner = Runner(job.what, config, self._meter, deadline)
        try:
            measure_batch(job.count, [runner], config, self.results, self._first)
        finally:
            runner.close()
        if "missing" in runner.record:
            raise NotMeasuredError(runner.record["missing"])

    def _drift(self, config: Config, steps: int, deadline: Deadline) -> None:
        measure_drift(config, self.results, deadline)
        found = self.results.data["drift"][str(steps)]
        if missing := [f"{kind}: {part['missing']}" for kind, part in found.items() if "missing" in part]:
            raise NotMeasuredError("; ".join(missing))

    def _ran_on(self, record: dict[str, Any], gpu: str) -> bool:
        return bool(self.results.data["runs"][record["run"]]["gpu"].get("name", "") == gpu)

    def _picture_ms(self, name: str) -> float:
        alone = {part: median(times) for part, times in self.results.data["variants"][name]["alone_ms"].items()}
        return float(alone["text"] + self.config.steps * alone["unet"] + alone["vae"])


def _unpack(preset: str, packed: Path, deadline: Deadline) -> None:
    root = bundle_of(preset)
    if not root.exists() and packed.is_dir():
        say(f"making the weights of {preset}")
        with started("benchmarks.gpu.lease.bundles:Unpacker") as child:
            child.ask(deadline.left(UNPACK), "unpack", preset, packed, root)
