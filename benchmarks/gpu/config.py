"""The settings of a GPU benchmark, and its sides."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.cases import Task, task
from benchmarks.gpu.variants import VARIANTS
from latentrt.runtime.base import Backend

FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "latentrt" / "benchmarks"


class Side(NamedTuple):
    """A way to draw pictures: a `worker` class for the child process, and its settings.

    `backend` is latentrt's ("tensorrt" stands for the library that was chosen); `capture` says whether CUDA graphs are
    used (not every ONNX Runtime can be captured: such a side may fail), `ticks` whether the host launches row by row,
    `regional` that only repeated blocks are compiled.
    """

    title: str
    worker: str
    backend: str = ""
    capture: bool = True
    ticks: bool = False
    compiled: bool = False
    regional: bool = False


DIFFUSERS, ENGINE = "benchmarks.gpu.theirs:DiffusersSide", "benchmarks.gpu.ours:EngineSide"
SIDES: Mapping[str, Side] = {
    "diffusers": Side("diffusers, eager", DIFFUSERS),
    "ort-ticks": Side("ONNX Runtime, tick by tick", ENGINE, "onnxruntime", capture=False, ticks=True),
    "ort-loop": Side("ONNX Runtime, plain loop", ENGINE, "onnxruntime", capture=False),
    "ort": Side("ONNX Runtime, one launch", ENGINE, "onnxruntime"),
    "trt-loop": Side("TensorRT, plain loop", ENGINE, "tensorrt", capture=False),
    "trt": Side("TensorRT, one launch", ENGINE, "tensorrt"),
    "compile-regional": Side("diffusers, torch.compile, regional", DIFFUSERS, compiled=True, regional=True),
    "compile": Side("diffusers, torch.compile", DIFFUSERS, compiled=True),  # last: it takes longest to open
}


@dataclass(frozen=True, slots=True)
class Config:
    """The settings of a measurement.

    Attributes:
        preset: names the results; with no `bundle` it is exported, with random weights.
        size: width and height in pixels; None is the model's own.
        repeats: rounds that are kept, after the one that warms up.
        calls: of a network alone, in one sample.
        drift: numbers of steps over which latents are compared; empty to leave that out.
        library: the flavour of TensorRT.
        compile_mode: of torch.compile.
        alone: one side after the other, instead of all in turn, where the GPU has no room for all at once.
        limit: seconds that one request to a child may take (opening a compiled side takes longest).
        minutes: for the whole run; what is then left out is recorded as such. None is for no limit.
        variant: of ONNX Runtime's graphs and options, one of VARIANTS; empty is what a user gets.
        level: `--optimization-level` of TensorRT's plans.
        hardware: the module that opens what needs a GPU.
    """

    preset: str = "sd15"
    bundle: Path | None = None
    batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    sides: tuple[str, ...] = tuple(SIDES)
    steps: int = 50
    size: tuple[int, int] | None = None
    repeats: int = 5
    calls: int = 10
    drift: tuple[int, ...] = (20, 50)
    library: str = "tensorrt"
    compile_mode: str = "max-autotune"
    alone: bool = False
    limit: float = 480.0
    minutes: float | None = None
    solver: str = "dpmpp-2m"
    guidance: float = 7.5
    seed: int = 7
    variant: str = ""
    level: int | None = None
    hardware: str = "benchmarks.gpu.hardware"

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that all pictures have in common, as `Engine.__call__` names them."""
        sides = {} if self.size is None else {"width": self.size[0], "height": self.size[1]}
        return {"steps": self.steps, "solver": self.solver, "guidance": self.guidance, **sides}

    def backend(self, side: Side) -> str:
        """Return the name of a side's backend."""
        return self.library if side.backend == "tensorrt" else side.backend

    def task(self, round_: int, batch: int) -> Task:
        """Return a round's pictures, the same for every side."""
        return task(self, round_, batch)  # type: ignore[arg-type]  # it reads what both kinds of Config have

    def open_hardware(self) -> Any:
        """Return the module that opens what needs a GPU."""
        return import_module(self.hardware)

    def open_backend(self, name: str) -> Backend:
        """Open a backend on the GPU, ONNX Runtime's with the graph and the options of the variant."""
        chosen: dict[str, Any] = {}
        if self.variant and name == "onnxruntime":
            chosen = {"graph": VARIANTS[self.variant].graph, "options": VARIANTS[self.variant].options}
        opened: Backend = self.open_hardware().open_backend(name, **chosen)
        return opened

    def to_dict(self) -> dict[str, Any]:
        """Return the settings that figures depend on, for JSON."""
        dropped = ("bundle", "hardware", "sides", "batches", "limit", "minutes", "drift", "variant", "level")
        return {key: value for key, value in asdict(self).items() if key not in dropped}
