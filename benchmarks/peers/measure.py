"""The run: all sides are prepared, then started in turn, then kept loaded and asked in turn.

Samples are written at once. A peer that fails is recorded with the reason and left out from there on. An error of our
own ends the run.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.cases import Task, psnr, task
from benchmarks.gpu.child import NotMeasuredError
from benchmarks.measures import OURS
from benchmarks.peers.config import LOADED, SCRIPTS, STARTS, THIS, Config, Model, Peer, requirements
from benchmarks.peers.environments import Environments
from benchmarks.peers.models import Folders, offline
from benchmarks.peers.process import Drawn, PeerProcess
from benchmarks.peers.results import BATCH, COLD, COLD_PEAK, ONE, READY, WARM_PEAK, Record, Results
from benchmarks.timing import machine, run_child
from latentrt.bundle.bundle import Bundle
from latentrt.sampling.noise import noise_source

GROWTH = 1.25  # of a large model's process that draws a batch, over one that drew a picture


@dataclass(eq=False)
class Side:
    """What is needed to start a side's process."""

    name: str
    command: list[str]
    settings: dict[str, Any]
    batches: bool = True


class Start(NamedTuple):
    """A process from its start to its end: seconds until the model was loaded, until it had ended; its peak in MiB."""

    ready: float
    seconds: float
    mebibytes: float


def run(config: Config, folder: Path) -> Results:
    """Measure all models with all peers; `folder`/peers.json grows as the run goes on."""
    about = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": machine(("numpy", "onnxruntime")),
        "threads": config.threads,
        "titles": config.titles(),
        "differs": {name: peer.differs for name, peer in config.peers.items()},
    }
    results = Results.begin(folder, about)
    environments = Environments(config.folder / "environments", requirements())
    for model in config.models:
        with tempfile.TemporaryDirectory() as scratch:
            ModelRun(config, model, results, environments, Path(scratch)).run()
    return results


class ModelRun:
    """The run of one model.

    Args:
        config: of all models.
        model: to measure.
        results: to write to.
        environments: of the peers.
        scratch: a folder for latents and pictures.
    """

    def __init__(
        self, config: Config, model: Model, results: Results, environments: Environments, scratch: Path
    ) -> None:
        self._config, self._model, self._results, self._scratch = config, model, results, scratch
        self._environments, self._folders = environments, Folders(config, model, environments)
        self._records = {name: self._kept(name) for name in config.peers}
        results.models[model.name] = model.to_dict()
        results.records[model.name] = self._records

    def run(self) -> None:
        """Measure the starts of all, then what they do when they are loaded."""
        print(f"{self._model.title}:", flush=True)
        bundle = self._folders.bundle()
        latents = Bundle.open(bundle, check_hashes=False).spec.latents
        self._shape = latents.shape_of(self._model.size[1], self._model.size[0])
        ours, peers = self._side(OURS, THIS, [sys.executable], bundle), list(self._prepared())
        if STARTS in self._config.parts:
            peers = self._starts(ours, peers)
        if LOADED in self._config.parts:
            needs = {side: self._need(side) for side in peers}
            for group in groups(max((self._need(side, OURS) for side in peers), default=0), needs, available()):
                self._warm(ours, group)

    def _kept(self, name: str) -> Record:
        """Return a peer's record with the samples of an earlier run for the parts that are left out of this one."""
        before = self._results.records.get(self._model.name, {}).get(name, Record())
        rows = {STARTS: (COLD, READY, COLD_PEAK), LOADED: (ONE, BATCH, WARM_PEAK)}
        kept = [row for part in rows if part not in self._config.parts for row in rows[part] if row in before.samples]
        return Record({row: before.samples[row] for row in kept}, versions=before.versions)

    def _need(self, side: Side, of: str | None = None) -> float:
        """Return what a side, or ours beside it, needs in MiB to draw a batch; all there is where it is not known."""
        known = self._records[side.name].samples.get(COLD_PEAK)
        return GROWTH * max(known[of or side.name]) if known else available()

    def _prepared(self) -> list[Side]:
        """Return the peers that have an environment and a model to load."""
        sides = []
        for name, peer in self._config.peers.items():
            try:
                python = self._environments.python(peer.environment)
                sides.append(self._side(name, peer, python, self._folders.peer(name, peer)))
            except NotMeasuredError as error:
                self._miss(name, error)
        return sides

    def _side(self, name: str, peer: Peer, python: Sequence[str], folder: Path) -> Side:
        model = self._model
        settings = {
            "model": str(folder),
            "cache": str(self._folders.cache(name)),
            "threads": self._config.threads,
            "batch": model.batch,
            "scheduler": model.scheduler,
            "options": dict(peer.options),
            "packages": peer.packages,
            "first": self._task(0, 1, steps=1),
        }
        return Side(name, [*python, str(SCRIPTS / peer.script)], settings, peer.batches)

    def _miss(self, name: str, error: NotMeasuredError, where: str = "") -> None:
        self._records[name].missing = f"{where}{error}"
        print(f"  {name}: {where}{error}", flush=True)
        self._results.write()

    def _starts(self, ours: Side, sides: Sequence[Side]) -> list[Side]:
        """Start every side in turn; return those that could. The round before the first fills caches."""
        alive = list(sides)
        for round_ in range(1 + self._model.rounds):
            limit = self._config.limit if round_ else self._config.first_limit
            first = self._start_ours(ours, round_)
            for side in list(alive):
                try:
                    found = self._start(side, round_, limit)
                except NotMeasuredError as error:
                    self._miss(side.name, error)
                    alive.remove(side)
                    continue
                if round_:
                    record = self._records[side.name]
                    record.add(COLD, first.seconds, found.seconds, side.name)
                    record.add(READY, first.ready, found.ready, side.name)
                    record.add(COLD_PEAK, first.mebibytes, found.mebibytes, side.name)
            self._results.write()
            print(f"  start {round_}: {OURS} {first.seconds:.2f} s", flush=True)
        return alive

    def _start_ours(self, ours: Side, round_: int) -> Start:
        """Start the command, as a user types it, and then the engine, which says when it is loaded."""
        asked, model = self._task(round_, 1), self._model
        command = [sys.executable, "-m", "latentrt", "generate", *asked["prompts"], "--bundle", ours.settings["model"]]
        named = {name: asked[name] for name in ("steps", "solver", "guidance")}
        named |= {"seed": asked["seeds"][0], "size": "{}x{}".format(*model.size), "threads": self._config.threads}
        named["output"] = self._scratch / "latentrt.png"
        done = run_child([*command, *(f"--{name}={value}" for name, value in named.items())])
        process = self._open(ours)
        try:
            process.load(ours.settings, self._config.first_limit)
            return Start(process.age, done.seconds, done.mebibytes)
        finally:
            process.close()

    def _start(self, side: Side, round_: int, limit: float) -> Start:
        process = self._open(side)
        try:
            self._records[side.name].versions = process.load(side.settings, limit)
            ready = process.age
            drawn = process.draw(self._task(round_, 1), limit, self._scratch / side.name)
        except NotMeasuredError:
            process.close()
            raise
        return Start(ready, process.close(), drawn.mebibytes)

    def _open(self, side: Side) -> PeerProcess:
        return PeerProcess(side.command, offline() | {"OMP_NUM_THREADS": str(self._config.threads)})

    def _warm(self, ours: Side, group: Sequence[Side]) -> None:
        """Load a group of sides and ask them in turn. The round before the first one has a single step."""
        processes = {side.name: self._open(side) for side in (ours, *group)}
        try:
            self._load([ours, *group], processes)
            for row, size in ((ONE, 1), (BATCH, self._model.batch)):
                if size > 1:
                    self._keep_to([side for side in group if side.batches], processes)
                for round_ in range(1 + self._model.rounds):
                    self._ask(row, round_, size, processes)
                    self._results.write()
        finally:
            for process in processes.values():
                process.close()

    def _load(self, sides: Sequence[Side], processes: dict[str, PeerProcess]) -> None:
        for side in sides:
            try:
                versions = processes[side.name].load(side.settings, self._config.first_limit)
                if side.name != OURS:
                    self._records[side.name].versions = versions
            except NotMeasuredError as error:
                self._drop(side.name, processes, error)

    def _keep_to(self, sides: Sequence[Side], processes: dict[str, PeerProcess]) -> None:
        """Close the processes of all peers but these."""
        kept = {OURS, *(side.name for side in sides)}
        for name in [name for name in processes if name not in kept]:
            processes.pop(name).close()

    def _ask(self, row: str, round_: int, size: int, processes: dict[str, PeerProcess]) -> None:
        """Ask all for the same pictures, and compare the first ones that are not thrown away."""
        if len(processes) == 1:
            return
        asked = self._task(round_, size, steps=None if round_ else 1)
        compared = row == ONE and round_ == 1
        drawn: dict[str, Drawn] = {}
        for name, process in list(processes.items()):
            try:
                limit = self._config.first_limit if name == OURS or not round_ else self._config.limit
                drawn[name] = process.draw(asked, limit, self._scratch / name if compared else None)
            except NotMeasuredError as error:
                self._drop(name, processes, error, f"{row}: ")
        said = ", ".join(f"{name} {each.seconds:.2f}" for name, each in drawn.items())
        print(f"  {row} {round_}: {said}", flush=True)
        if not round_:
            return
        first = drawn.pop(OURS)
        for name, each in drawn.items():
            record = self._records[name]
            record.add(row, first.seconds, each.seconds, name)
            if row == BATCH:
                record.add(WARM_PEAK, first.mebibytes, each.mebibytes, name)
            if compared and self._config.peers[name].same_noise:
                record.psnr_db = self._agreement(name)

    def _drop(self, name: str, processes: dict[str, PeerProcess], error: NotMeasuredError, where: str = "") -> None:
        if name == OURS:
            raise error
        self._miss(name, error, where)
        processes.pop(name).close()

    def _agreement(self, name: str) -> float:
        from PIL import Image

        with Image.open(self._scratch / f"{OURS}-0.png") as a, Image.open(self._scratch / f"{name}-0.png") as b:
            return psnr([a.convert("RGB")], [b.convert("RGB")])

    def _task(self, round_: int, size: int, steps: int | None = None) -> dict[str, Any]:
        """Return a round's pictures, other ones every round, with their first latents in a file."""
        found: Task = task(self._model, round_, size)  # type: ignore[arg-type]  # it reads what both kinds have
        path = self._scratch / f"latents-{round_}-{size}.npy"
        if not path.is_file():
            noise = [noise_source("torch-cpu", seed).normal(self._shape) for seed in found.seeds]
            np.save(path, np.stack(noise))
        return {**asdict(found), "steps": steps or found.steps, "size": self._model.size, "latents": str(path)}


def groups(ours: float, needs: Mapping[Any, float], room: float) -> list[list[Any]]:
    """Return groups of sides that fit beside ours; one that fits nowhere is alone.

    Args:
        ours: what we need, in any unit.
        needs: what each other side needs.
        room: what there is for all that are loaded at once.
    """
    found: list[list[Any]] = []
    left = 0.0
    for side, need in needs.items():
        if not found or need > left:
            found.append([])
            left = room - ours
        found[-1].append(side)
        left -= need
    return found


def available() -> float:
    """Return the MiB that processes could have without swapping (Linux)."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) / 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") / 2**20
