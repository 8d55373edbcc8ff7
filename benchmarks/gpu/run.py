"""The run: bundle, plans, then every batch through the sides in turn, each result kept as soon as it is there."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cases import psnr
from benchmarks.gpu.child import Child, Meter, NotMeasuredError, reason
from benchmarks.gpu.config import FOLDER, SIDES, Config
from benchmarks.gpu.results import Results
from benchmarks.timing import machine
from engine.bundle import Bundle
from engine.errors import LatentrtError

PACKAGES = (
    *("torch", "diffusers", "transformers", "numpy", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu13"),
    *("cuda-bindings", "nvidia-cuda-nvrtc"),
)
FAILURES = (NotMeasuredError, LatentrtError, RuntimeError, OSError)


def run(config: Config, folder: Path) -> Results:
    """Measure, and write `folder`/gpu-PRESET.json as it grows; figures of other sides and batches stay in it.

    Raises:
        LatentrtError: the bundle that was named cannot be opened, or the file has figures of another size or of other
            steps.
        RuntimeError: the preset cannot be exported.
    """
    config = _with_bundle(config)
    hardware = config.open_hardware()
    results = Results.open(folder, config)
    results.begin(_about(config, hardware))
    meter = _meter(hardware)
    for names in [(name,) for name in config.sides] if config.alone else [config.sides]:
        runners = [Runner(name, config, meter) for name in names]
        try:
            for batch in config.batches:
                _measure(batch, runners, config, results)
        finally:
            for runner in runners:
                runner.close()
    if config.drift:
        _drift(config, results)
    return results


def _with_bundle(config: Config) -> Config:
    """The config with its bundle, exported where it is not there yet, and the size of the pictures."""
    bundle = config.bundle
    if bundle is None:
        bundle = FOLDER / config.preset
        if not (bundle / "manifest.json").is_file():
            from benchmarks.gpu.hardware import latentrt

            say(f"exporting preset:{config.preset} into {bundle}")
            latentrt("export", f"preset:{config.preset}", str(bundle), limit=config.limit)
    latents = Bundle.open(bundle, check_hashes=False).spec.latents
    own = latents.width * latents.factor, latents.height * latents.factor
    return replace(config, bundle=bundle, size=config.size or own)


def _about(config: Config, hardware: Any) -> dict[str, Any]:
    """What the figures of this run depend on."""
    try:
        gpu = hardware.describe()
    except LatentrtError as error:
        gpu = {"missing": reason(error)}
    with _child("benchmarks.gpu.theirs:Peak", config) as child:
        try:
            peak = {"tflops": child.ask(config.limit, "tflops")}
        except NotMeasuredError as error:
            peak = {"missing": reason(error)}
    say(f"GPU: {gpu}; matrix peak: {peak}")
    about = {"machine": machine(PACKAGES), "gpu": gpu, "peak": peak, "config": config.to_dict(), "macs": _macs(config)}
    return {"date": f"{datetime.now(UTC):%Y-%m-%d}", **about}


def _macs(config: Config) -> dict[str, int]:
    """Multiply-accumulates of the networks, for a batch of one."""
    if importlib.util.find_spec("onnx") is None:
        return {}
    from benchmarks.gpu.macs import macs

    assert config.bundle is not None
    assert config.size is not None
    spec = Bundle.open(config.bundle, check_hashes=False).spec
    height, width = config.size[1] // spec.latents.factor, config.size[0] // spec.latents.factor
    sizes = {"batch": 1, "height": height, "width": width}
    names = (*spec.text_encoders, "unet", "vae_decoder")
    return {name: macs(config.bundle / spec.graphs[name].path, sizes) for name in names}


def _meter(hardware: Any) -> Meter | None:
    """None where the driver cannot be asked: then nobody's memory is measured."""
    try:
        return Meter(hardware.free_memory())
    except LatentrtError:
        return None


def _measure(batch: int, runners: Sequence[Runner], config: Config, results: Results) -> None:
    """One batch: open all sides and draw once, then rounds in turn, then the networks alone."""
    say(f"batch {batch}")
    for runner in runners:
        runner.begin(batch)
    for round_ in range(1, config.repeats + 1):
        for runner in runners:
            runner.draw(round_)
    for runner in runners:
        runner.alone()
    _compare([runner for runner in runners if runner.pictures])
    for runner in runners:
        results.put(runner.name, batch, runner.record)
        say(f"  {runner.name}: {_summary(runner.record)}")


def _compare(runners: Sequence[Runner]) -> None:
    """How near the pictures of the first round are to those of the first side."""
    for runner in runners[1:]:
        runner.record["psnr_db"] = psnr(runner.pictures, runners[0].pictures)
        runner.record["psnr_to"] = runners[0].name


def _summary(record: dict[str, Any]) -> str:
    if "missing" in record:
        return f"not measured: {record['missing']}"
    return f"{1000 * float(np.median(record['seconds'])):.1f} ms"


class Runner:
    """One side through all batches. A failure ends its batch, and its process; the next batch begins with a new one."""

    def __init__(self, name: str, config: Config, meter: Meter | None) -> None:
        self.name, self.record, self.pictures = name, dict[str, Any](), list[Any]()
        self._config, self._meter = config, meter
        self._child: Child | None = None

    def begin(self, batch: int) -> None:
        """Build what it needs, open it, and draw once."""
        self.record, self.pictures = {"seconds": [], "device_ms": []}, []
        with self._failing():
            if SIDES[self.name].backend == "tensorrt":
                self.record["plans"] = _build(self._config, batch)
            fresh = self._child is None
            self._child = child = self._child or Child(SIDES[self.name].worker, self._config, self.name)
            with self._meter.watch(self.name) if self._meter else nullcontext([]) as most:
                child.ask(self._config.limit, "open", batch)
                seconds, _, self.pictures = child.ask(self._config.limit, "draw", 0)
            self.record["first_seconds"] = seconds
            if fresh:
                self.record["cold_seconds"] = child.age
            if most:
                self.record["device_bytes"] = most[0]
            self.record["host_bytes"] = child.ask(self._config.limit, "host_peak")

    def draw(self, round_: int) -> None:
        """One round."""
        if self._child and "missing" not in self.record:
            with self._failing():
                seconds, milliseconds, _ = self._child.ask(self._config.limit, "draw", round_)
                self.record["seconds"].append(seconds)
                self.record["device_ms"].append(milliseconds)

    def alone(self) -> None:
        """The networks by themselves."""
        if self._child and "missing" not in self.record:
            with self._failing():
                self.record["alone_ms"] = self._child.ask(self._config.limit, "alone")

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except FAILURES as error:
            self.record, self.pictures = {"missing": reason(error)}, []
            self.close()

    def close(self) -> None:
        """End its process."""
        if self._child is not None:
            self._child.close()
            self._child = None
        if self._meter is not None:
            self._meter.gone(self.name)


def _build(config: Config, batch: int) -> list[dict[str, Any]]:
    """The plans for a batch of guided pictures, built where they are missing.

    Raises:
        RuntimeError: they cannot be built.
    """
    assert config.bundle is not None
    spec = Bundle.open(config.bundle, check_hashes=False).spec
    networks = (*spec.text_encoders, "unet", "vae_decoder")
    build = config.open_hardware().build_plans
    built: list[dict[str, Any]] = build(config.bundle, networks, config.library, 2 * batch, config.size, config.limit)
    return built


def _drift(config: Config, results: Results) -> None:
    """How far float16 latents go from float32 ones, step by step."""
    kinds = dict.fromkeys(["diffusers", *(config.backend(SIDES[name]) for name in config.sides if SIDES[name].backend)])
    for steps in config.drift:
        with _child("benchmarks.gpu.drift:Drift", config) as child:
            for kind in kinds:
                try:
                    if kind == config.library:
                        _build(config, 1)
                    found = {"relative": child.ask(config.limit, "drift", kind, steps)}
                except FAILURES as error:
                    found = {"missing": reason(error)}
                say(f"drift over {steps} steps, {kind}: {found.get('missing') or found['relative'][-1]}")
                results.put_drift(kind, steps, found)


@contextmanager
def _child(worker: str, *arguments: Any) -> Iterator[Child]:
    child = Child(worker, *arguments)
    try:
        yield child
    finally:
        child.close()


def say(text: str) -> None:
    """Tell whoever watches."""
    print(text, flush=True)
