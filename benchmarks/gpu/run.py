"""The run: bundle, plans, then every batch through the sides in turn; each result is written at once."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cases import psnr
from benchmarks.gpu.child import Child, Deadline, Meter, NotMeasuredError, reason
from benchmarks.gpu.config import FOLDER, SIDES, Config
from benchmarks.gpu.results import Results
from benchmarks.timing import machine
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.spec import CONDITIONER, DECODER, DENOISER, TEXT_ENCODER
from latentrt.errors import LatentrtError, MissingDependencyError

PACKAGES = (
    *("torch", "diffusers", "transformers", "numpy", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu13"),
    *("cuda-bindings", "nvidia-cuda-nvrtc"),
)
DRAWING = (TEXT_ENCODER, CONDITIONER, DENOISER, DECODER)  # roles of the networks that draw from a prompt
FAILURES = (NotMeasuredError, LatentrtError, RuntimeError, OSError)


def run(config: Config, folder: Path) -> Results:
    """Measure, and write `folder`/gpu-PRESET.json as it grows; figures of other sides and batches stay in it.

    Raises:
        LatentrtError: the bundle that was named cannot be opened, the file has figures of another size or of other
            steps, or there is neither the preset's bundle nor a GPU to export it for.
        RuntimeError: the preset cannot be exported.
    """
    deadline = Deadline(config.minutes)
    config = with_bundle(config, deadline)
    hardware = config.open_hardware()
    results = Results.open(folder, config)
    results.begin(about_run(config, hardware, deadline))
    meter, first = meter_of(hardware), dict[int, tuple[str, list[Any]]]()
    for names in _groups(config):
        runners = [Runner(name, config, meter, deadline) for name in names]
        try:
            for batch in config.batches:
                measure_batch(batch, runners, config, results, first)
        finally:
            for runner in runners:
                runner.close()
    if config.drift:
        measure_drift(config, results, deadline)
    return results


def _groups(config: Config) -> list[tuple[str, ...]]:
    """Return groups of sides that are open at once. Compiled ones, which take minutes to open, come last."""
    if config.alone:
        return [(name,) for name in config.sides]
    compiled = tuple(name for name in config.sides if SIDES[name].compiled)
    others = tuple(name for name in config.sides if name not in compiled)
    return [group for group in (others, compiled) if group]


def with_bundle(config: Config, deadline: Deadline) -> Config:
    """Return the config with its bundle, exported if missing, and the size of the pictures."""
    bundle = config.bundle
    if bundle is None:
        bundle = bundle_of(config.preset)
        if not (bundle / "manifest.json").is_file():
            need_gpu(config)
            export(config.preset, deadline.left(config.limit))
    latents = Bundle.open(bundle, check_hashes=False).spec.latents
    own = latents.width * latents.factor, latents.height * latents.factor
    return replace(config, bundle=bundle, size=config.size or own)


def bundle_of(preset: str) -> Path:
    """Return where a preset's bundle lies."""
    return FOLDER / preset


def export(preset: str, limit: float) -> None:
    """Export a preset.

    Raises:
        RuntimeError: it cannot be exported, or not in `limit` seconds.
    """
    from benchmarks.gpu.hardware import latentrt

    say(f"exporting preset:{preset} into {bundle_of(preset)}")
    latentrt("export", f"preset:{preset}", str(bundle_of(preset)), limit=limit)


def need_gpu(config: Config) -> None:
    """Refuse a machine on which no side can run, before minutes are spent on a preset.

    Raises:
        BackendError: there is no GPU, or its driver is too old.
    """
    with suppress(MissingDependencyError):  # of ours: diffusers has libraries of its own
        config.open_hardware().describe()


def about_run(config: Config, hardware: Any, deadline: Deadline) -> dict[str, Any]:
    """Return what the figures of this run depend on."""
    try:
        gpu = hardware.describe()
    except LatentrtError as error:
        gpu = {"missing": reason(error)}
    with started("benchmarks.gpu.theirs:Peak", config) as child:
        try:
            peak = {"tflops": child.ask(deadline.left(config.limit), "tflops")}
        except NotMeasuredError as error:
            peak = {"missing": reason(error)}
    say(f"GPU: {gpu}; matrix peak: {peak}")
    about = {"machine": machine(PACKAGES), "gpu": gpu, "peak": peak, "config": config.to_dict(), "macs": _macs(config)}
    return {"date": f"{datetime.now(UTC):%Y-%m-%d}", **about}


def _macs(config: Config) -> dict[str, int]:
    """Return the multiply-accumulates of the networks, for a batch of one."""
    if importlib.util.find_spec("onnx") is None:
        return {}
    from benchmarks.gpu.macs import macs

    assert config.bundle is not None
    assert config.size is not None
    spec = Bundle.open(config.bundle, check_hashes=False).spec
    height, width = config.size[1] // spec.latents.factor, config.size[0] // spec.latents.factor
    sizes = {"batch": 1, "height": height, "width": width, "tokens": spec.tokens}
    names = [name for role in DRAWING for name in spec.named(role)]
    return {name: macs(config.bundle / spec.graphs()[name].path, sizes) for name in names}


def meter_of(hardware: Any) -> Meter | None:
    """Return a meter; None where the driver cannot be asked: then no memory is measured."""
    try:
        return Meter(hardware.free_memory())
    except LatentrtError:
        return None


def measure_batch(
    batch: int, runners: Sequence[Runner], config: Config, results: Results, first: dict[int, tuple[str, list[Any]]]
) -> None:
    """Measure one batch: open each side, with a round and the networks alone, then the other rounds in turn.

    So each side has figures before the next one is opened, and a killed run loses no more than its round.
    """
    say(f"batch {batch}")
    for runner in runners:
        runner.begin(batch)
        runner.draw(1)
        runner.alone()
        _compare(runner, first.setdefault(batch, (runner.name, runner.pictures)) if runner.pictures else None)
        runner.keep(results)
    for round_ in range(2, config.repeats + 1):
        for runner in runners:
            runner.draw(round_)
            runner.keep(results)
    for runner in runners:
        say(f"  {runner.name}: {_summary(runner.record)}")


def _compare(runner: Runner, first: tuple[str, list[Any]] | None) -> None:
    """Compare its first pictures with those of the first side."""
    if first is not None and first[0] != runner.name:
        runner.record["psnr_to"], pictures = first
        runner.record["psnr_db"] = psnr(runner.pictures, pictures)


def _summary(record: dict[str, Any]) -> str:
    if "missing" in record:
        return f"not measured: {record['missing']}"
    return f"{1000 * float(np.median(record['seconds'])):.1f} ms"


class Runner:
    """One side through all batches. A failure ends its batch, and its process; the next batch begins with a new one.

    Where time runs out, earlier measurements count.
    """

    def __init__(self, name: str, config: Config, meter: Meter | None, deadline: Deadline) -> None:
        self.name, self.record, self.pictures = name, dict[str, Any](), list[Any]()
        self._config, self._meter, self._deadline = config, meter, deadline
        self._child: Child | None = None
        self._batch = 0

    def begin(self, batch: int) -> None:
        """Build what it needs, open it, and draw once."""
        self.record, self.pictures, self._batch = {"seconds": [], "device_ms": []}, [], batch
        with self._failing():
            kind = SIDES[self.name].backend
            if kind == "onnxruntime" and self._config.variant:
                self.record["variant"] = self._config.variant
            if kind == "tensorrt" and self._config.level is not None:
                self.record["level"] = self._config.level
            if kind == "tensorrt":
                self.record["plans"] = _build(self._config, batch, self._deadline)
            self._deadline.left(0)  # or a process would be started for nothing
            fresh = self._child is None
            self._child = self._child or Child(SIDES[self.name].worker, self._config, self.name)
            with self._meter.watch(self.name) if self._meter else nullcontext([]) as most:
                self._ask("open", batch)
                seconds, _, self.pictures = self._ask("draw", 0)
            self.record["first_seconds"] = seconds
            if fresh:
                self.record["cold_seconds"] = self._child.age
            if most:
                self.record["device_bytes"] = most[0]
            self.record["host_bytes"] = self._ask("host_peak")

    def draw(self, round_: int) -> None:
        """Draw one round."""
        if self._child:
            with self._failing():
                seconds, milliseconds, _ = self._ask("draw", round_)
                self.record["seconds"].append(seconds)
                self.record["device_ms"].append(milliseconds)

    def alone(self) -> None:
        """Time the networks by themselves."""
        if self._child:
            with self._failing():
                self.record["alone_ms"] = self._ask("alone")

    def keep(self, results: Results) -> None:
        """Write what was measured."""
        results.put(self.name, self._batch, self.record)

    def _ask(self, method: str, *arguments: Any) -> Any:
        assert self._child is not None
        return self._child.ask(self._deadline.left(self._config.limit), method, *arguments)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except FAILURES as error:
            self.close()
            if not (self._deadline.over and "alone_ms" in self.record):
                why = self._deadline.reason if self._deadline.over else reason(error)
                self.record, self.pictures = {"missing": why}, []

    def close(self) -> None:
        """End its process."""
        if self._child is not None:
            self._child.close()
            self._child = None
        if self._meter is not None:
            self._meter.gone(self.name)


def _build(config: Config, batch: int, deadline: Deadline) -> list[dict[str, Any]]:
    """Build the missing plans for a batch of guided pictures; return all plans.

    Raises:
        NotMeasuredError: there is no time.
        RuntimeError: they cannot be built.
    """
    limit = deadline.left(config.limit)
    assert config.bundle is not None
    spec = Bundle.open(config.bundle, check_hashes=False).spec
    networks = [name for role in DRAWING for name in spec.named(role)]
    build = config.open_hardware().build_plans
    options = [] if config.level is None else [f"optimization-level={config.level}"]
    built: list[dict[str, Any]] = build(config.bundle, networks, config.library, 2 * batch, config.size, limit, options)
    return built


def measure_drift(config: Config, results: Results, deadline: Deadline) -> None:
    """Measure the distance of float16 latents from float32 ones, step by step."""
    kinds = dict.fromkeys(["diffusers", *(config.backend(SIDES[name]) for name in config.sides if SIDES[name].backend)])
    for steps in config.drift:
        with started("benchmarks.gpu.drift:Drift", config) as child:
            for kind in kinds:
                try:
                    if kind == config.library:
                        _build(config, 1, deadline)
                    found = {"relative": child.ask(deadline.left(config.limit), "drift", kind, steps)}
                except FAILURES as error:
                    found = {"missing": deadline.reason if deadline.over else reason(error)}
                say(f"drift over {steps} steps, {kind}: {found.get('missing') or found['relative'][-1]}")
                results.put_drift(kind, steps, found)


@contextmanager
def started(worker: str, *arguments: Any) -> Iterator[Child]:
    child = Child(worker, *arguments)
    try:
        yield child
    finally:
        child.close()


def say(text: str) -> None:
    """Print progress."""
    print(text, flush=True)
