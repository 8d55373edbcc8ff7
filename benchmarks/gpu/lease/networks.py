"""Networks by themselves, in processes of their own: variants of a graph, their kernels, and torch in float32."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.gpu.config import SIDES, Config
from benchmarks.gpu.ours import EngineSide, random_input, sizes_of
from benchmarks.gpu.variants import TOLERANCE
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.spec import CONDITIONER, DECODER, DENOISER, ModelSpec
from latentrt.model.predictor import inputs_of
from latentrt.runtime.base import call
from latentrt.runtime.signature import shape_of

LANES = {DENOISER: 2, DECODER: 1}  # of one guided picture
Arrays = dict[str, NDArray[Any]]
CALLS = 3  # that a profile is the mean of
RANKS = (0, 16, 64)  # of LoRAs
NAME = 160  # letters of a kernel's name that are kept


class VariantSide(EngineSide):
    """The networks of one guided picture, by ONNX Runtime with the config's variant."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, "ort")

    def measure(self, reference: Path) -> dict[str, Any]:
        """Return relative errors to the reference's outputs, the seconds until there were any, and where the errors
        are small the milliseconds of the networks.
        """
        start = time.perf_counter()
        self.open(1)
        relative = {parts[-1]: _distance(self._outputs(parts, lanes), reference) for parts, lanes in _parts(self.spec)}
        found = {"relative": relative, "open_seconds": time.perf_counter() - start}
        good = all(error <= TOLERANCE for error in relative.values())  # a NaN is not
        return found | ({"alone_ms": self.alone()} if good else {})

    def kernels(self) -> dict[str, tuple[float, float]]:
        """Return calls and milliseconds of every kernel of one UNet call."""
        self.open(1)
        self._side = SIDES["ort-loop"]  # launched one by one: in a graph not every profiler sees them
        gpu = self._backend.gpu
        (name,) = self.spec.named(DENOISER)
        network: Any = self.engine.model.networks[name].open()
        with self._call(network, LANES[DENOISER]) as call:

            def work() -> None:
                for _ in range(CALLS):
                    call()
                gpu.wait()

            work()
            found = self._config.open_hardware().kernel_times(work)
        merged: dict[str, tuple[float, float]] = {}
        for name, (calls, milliseconds) in found.items():
            before = merged.get(name[:NAME], (0.0, 0.0))
            merged[name[:NAME]] = (before[0] + calls / CALLS, before[1] + milliseconds / CALLS)
        return merged

    @property
    def spec(self) -> ModelSpec:
        """What the bundle declares."""
        return self.engine.spec

    def _outputs(self, parts: Sequence[str], lanes: int) -> Arrays:
        """Return what networks give that are called in turn, for `random_input`s."""
        known = _inputs(self.spec, self._config, parts, lanes)
        for part in parts:
            known |= call(self.engine.model.networks[part], known)
        return known


class LoraSide(EngineSide):
    """The UNet of one guided picture by ONNX Runtime, plain and with LoRAs of each lane."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, "ort")

    def measure(self) -> dict[str, list[float]]:
        """Return milliseconds of a call by the rank that all lanes have; 0 is the plain graph."""
        found = {}
        for rank in RANKS:
            self.open(1, **({"adapters": {}, "adapter_rank": rank} if rank else {}))
            found[str(rank)] = self._time(self.engine.spec.denoiser, LANES[DENOISER])
        return found


class Reference:
    """Torch in float32: the outputs that variants are compared with."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def write(self, path: Path) -> None:
        """Write the outputs of UNet and VAE decoder for `random_input`s into an .npz file."""
        import torch

        from latentrt_export.graphs.wrap import load_network

        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        device, root = self._config.open_hardware().DEVICE, self._config.bundle
        assert root is not None
        spec, found = Bundle.open(root, check_hashes=False).spec, dict[str, NDArray[Any]]()
        for parts, lanes in _parts(spec):
            inputs = _inputs(spec, self._config, parts, lanes)
            module = load_network(root, parts[-1]).module.to(device)
            with torch.no_grad():
                output = module(**{name: torch.from_numpy(each).to(device) for name, each in inputs.items()})
            found[spec.networks[parts[-1]].outputs[0].name] = output.cpu().numpy()
        np.savez(path, **found)

    def close(self) -> None:
        """Do nothing: the process ends next."""


def _parts(spec: ModelSpec) -> list[tuple[list[str], int]]:
    """Return the networks that torch has as one, and the lanes of a call."""
    before = {DENOISER: spec.named(CONDITIONER)}
    return [([*before.get(role, ()), name], lanes) for role, lanes in LANES.items() for name in spec.named(role)]


def _inputs(spec: ModelSpec, config: Config, parts: Sequence[str], lanes: int) -> Arrays:
    sizes, tensors = sizes_of(spec, config, lanes), inputs_of([spec.networks[part] for part in parts])
    return {name: random_input(each, shape_of(each, sizes)).astype(each.dtype) for name, each in tensors.items()}


def _distance(outputs: Arrays, reference: Path) -> float:
    """Return the norm of the difference of the output that the reference has, relative to the norm of that."""
    with np.load(reference) as known:
        (pair,) = (
            (outputs[name].astype(np.float64), known[name].astype(np.float64)) for name in known if name in outputs
        )
    return float(np.linalg.norm(pair[0] - pair[1]) / np.linalg.norm(pair[1]))
