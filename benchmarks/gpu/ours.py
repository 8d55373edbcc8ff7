"""latentrt's sides: an Engine on a GPU, drawing whole pictures, and its networks by themselves."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.gpu.config import SIDES, Config
from latentrt import Engine
from latentrt.bundle.spec import DECODER, DENOISER, LORA, TEXT_ENCODER, ModelSpec, TensorSpec
from latentrt.cuda.array import DeviceArray
from latentrt.runtime.base import Bound, DeviceNetwork
from latentrt.runtime.signature import shape_of

PARTS = {"text": TEXT_ENCODER, "unet": DENOISER, "vae": DECODER}


class EngineSide:
    """One engine, loaded for each batch anew, since every call of its UNet has the same number of lanes."""

    def __init__(self, config: Config, name: str) -> None:
        self._config, self._side = config, SIDES[name]
        self._backend: Any = config.open_backend(config.backend(self._side))
        self._engine: Engine | None = None
        self._batch = 0

    @property
    def engine(self) -> Engine:
        """The loaded engine."""
        assert self._engine is not None
        return self._engine

    def open(self, batch: int, **loading: Any) -> None:
        """Load the engine with lanes for `batch` guided pictures, with more arguments of `Engine.load`."""
        if self._engine is not None:
            self._engine.close()
        self._batch = batch
        bundle = self._config.bundle
        assert bundle is not None
        capture = self._side.capture
        self._engine = Engine.load(bundle, backend=self._backend, lanes=2 * batch, capture=capture, **loading)

    def draw(self, round_: int) -> tuple[float, float, list[NDArray[np.uint8]]]:
        """Draw a round's pictures: return seconds by the wall clock, milliseconds by the device's, and the pixels."""
        task, gpu = self._config.task(round_, self._batch), self._backend.gpu
        ticked = {"on_tick": lambda job: None} if self._side.ticks else {}
        gpu.wait()
        first, start = gpu.mark(), time.perf_counter()
        made = self.engine(task.prompts, seed=task.seeds[0], **self._config.settings, **ticked)
        seconds = time.perf_counter() - start
        return seconds, gpu.milliseconds(first, gpu.mark()), [np.asarray(picture) for picture in made]

    def alone(self) -> dict[str, list[float]]:
        """Return milliseconds of each network for the batch: all texts, one UNet call, all pictures' decoding."""
        found = {}
        for part, role in PARTS.items():
            times = [
                self._time(name, 1 if role == DECODER else 2 * self._batch) for name in self.engine.spec.named(role)
            ]
            calls = self._batch if role == DECODER else 1  # pictures are decoded one by one
            found[part] = [calls * sum(each) for each in zip(*times, strict=True)]
        return found

    def _time(self, name: str, batch: int) -> list[float]:
        """Return milliseconds of a network's call, `repeats` times over the mean of `calls`, by the device's clock."""
        gpu, calls = self._backend.gpu, self._config.calls
        network: Any = self.engine.model.networks[name].open()
        samples = []
        with self._call(network, batch) as call:
            for _ in range(self._config.repeats + 1):
                first = gpu.mark()
                for _ in range(calls):
                    call()
                samples.append(gpu.milliseconds(first, gpu.mark()) / calls)
        return samples[1:]

    @contextmanager
    def _call(self, network: DeviceNetwork, batch: int) -> Iterator[Callable[[], None]]:
        """Yield a network's call as the side queues it: as a graph, or by itself."""
        gpu = network.gpu
        arrays = self._arrays(network, batch)
        bound: Bound | None = None
        graph: Any = None
        try:
            bound = network.bind(arrays)
            if self._side.capture:
                with gpu.capture() as graph:
                    bound.enqueue()
            yield graph.launch if self._side.capture else bound.enqueue
        finally:
            for owner in (graph, bound):
                if owner is not None:
                    owner.close()
            for array in arrays.values():
                gpu.free(array)

    def _arrays(self, network: DeviceNetwork, batch: int) -> dict[str, DeviceArray]:
        """Return inputs of random numbers (a GPU that multiplies zeros draws less power, and is faster) and outputs."""
        sizes, arrays = sizes_of(self.engine.spec, self._config, batch), {}
        if (loras := self.engine.model.adapters) is not None:
            sizes["rank"] = loras.rank
        for tensor in (*network.graph.inputs, *network.graph.outputs):
            shape = shape_of(tensor, sizes)
            arrays[tensor.name] = network.gpu.zeros(shape, tensor.dtype)
            if tensor in network.graph.inputs:
                network.gpu.upload(random_input(tensor, shape).astype(tensor.dtype), arrays[tensor.name])
        return arrays

    def close(self) -> None:
        """Free everything."""
        if self._engine is not None:
            self._engine.close()
        self._backend.gpu.close()


def sizes_of(spec: ModelSpec, config: Config, batch: int) -> dict[str, int]:
    """Return the sizes of a network's symbolic dimensions, for a batch."""
    latents = spec.latents
    width, height = config.size or (latents.width * latents.factor, latents.height * latents.factor)
    sides = {"height": height // latents.factor, "width": width // latents.factor}
    return {"batch": batch, **sides, "tokens": spec.tokens}


def random_input(tensor: TensorSpec, shape: tuple[int, ...]) -> NDArray[Any]:
    """Return numbers for an input, the same for the same name and shape: float16's, or small whole ones."""
    random = np.random.default_rng(zlib.crc32(tensor.name.encode()))
    if tensor.name in ("timestep", "sigma") or "int" in tensor.dtype:
        return random.integers(1, 100, shape)
    scale = 0.25 if tensor.name == "encoder_hidden_states" else 1  # texts that are noise magnify rounding tenfold
    scale = 0.01 if tensor.name.startswith(LORA) else scale  # small changes, as theirs are
    return (scale * random.standard_normal(shape)).astype(np.float16)
