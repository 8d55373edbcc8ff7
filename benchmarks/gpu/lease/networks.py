"""Networks by themselves, in processes of their own: variants of a graph, their kernels, and torch in float32."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.gpu.config import SIDES, Config
from benchmarks.gpu.ours import EngineSide, random_input, sizes_of
from benchmarks.gpu.variants import TOLERANCE
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.spec import DECODER, DENOISER, FP32, ModelSpec
from latentrt.runtime.signature import shape_of

LANES = {DENOISER: 2, DECODER: 1}  # of one guided picture
CALLS = 3  # that a profile is the mean of
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
        relative = {name: _distance(self._outputs(name, lanes), reference, name) for name, lanes in _names(self.spec)}
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

    def _outputs(self, name: str, lanes: int) -> dict[str, NDArray[Any]]:
        """Return a network's outputs for `random_input`s."""
        network: Any = self.engine.model.networks[name].open()
        arrays = self._arrays(network, lanes)
        bound = network.bind(arrays)
        try:
            bound.enqueue()
            return {tensor.name: network.gpu.download(arrays[tensor.name]) for tensor in network.graph.outputs}
        finally:
            bound.close()
            for array in arrays.values():
                network.gpu.free(array)


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
        for name, lanes in _names(spec):
            graph, sizes = spec.graph(name, FP32), sizes_of(spec, self._config, lanes)
            inputs = [random_input(each, shape_of(each, sizes)).astype(each.dtype) for each in graph.inputs]
            module = load_network(root, name).module.to(device)
            with torch.no_grad():
                outputs = module(*(torch.from_numpy(each).to(device) for each in inputs))
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            pairs = zip(graph.outputs, outputs, strict=True)
            found |= {f"{name}.{tensor.name}": output.cpu().numpy() for tensor, output in pairs}
        np.savez(path, **found)

    def close(self) -> None:
        """Do nothing: the process ends next."""


def _names(spec: ModelSpec) -> list[tuple[str, int]]:
    return [(name, lanes) for role, lanes in LANES.items() for name in spec.named(role)]


def _distance(outputs: dict[str, NDArray[Any]], reference: Path, name: str) -> float:
    """Return the largest norm of a difference, relative to the norm of the reference."""
    with np.load(reference) as known:
        pairs = [
            (array.astype(np.float64), known[f"{name}.{key}"].astype(np.float64)) for key, array in outputs.items()
        ]
    return max(float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)) for ours, theirs in pairs)
