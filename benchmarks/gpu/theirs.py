"""diffusers' sides, as a user would write them: float16 pipelines, eager or compiled; and the matrix units' peak."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils._pytree import tree_flatten, tree_unflatten

from benchmarks.gpu.config import FOLDER, SIDES, Config
from latentrt.bundle.bundle import Bundle
from latentrt.sampling.solvers import SOLVERS

REPEATED = ("BasicTransformerBlock", "ResnetBlock2D")  # the VAE has the second alone


class Clock:
    """Times queued work on torch's device: by CUDA events, or by the wall clock where it is a CPU."""

    def __init__(self, device: str) -> None:
        self._cuda = torch.device(device).type == "cuda"

    def mark(self) -> Any:
        """Return a point in the queue."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start: Any, end: Any) -> float:
        """Wait for the end; return the time between."""
        if not self._cuda:
            return 1000 * float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end))

    def wait(self) -> None:
        """Wait for everything that was queued."""
        if self._cuda:
            torch.cuda.synchronize()


class Timed:
    """A function whose calls are timed while `spans` is a list."""

    def __init__(self, function: Callable[..., Any], clock: Clock) -> None:
        self._function, self._clock = function, clock
        self.spans: list[tuple[Any, Any]] | None = None

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if self.spans is None:
            return self._function(*arguments, **named)
        start = self._clock.mark()
        result = self._function(*arguments, **named)
        self.spans.append((start, self._clock.mark()))
        return result

    def take(self) -> float:
        """Return milliseconds of all calls since timing began, and start timing anew."""
        total = sum(self._clock.milliseconds(*span) for span in self.spans or ())
        self.spans = []
        return total


class Recorded:
    """A function whose calls are recorded as a CUDA graph, one for each kind of arguments; results are overwritten."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._graphs: dict[tuple[Any, ...], tuple[Any, list[Any], Any]] = {}

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        given, tree = tree_flatten((arguments, named))
        kind = tuple((each.shape, each.dtype) if torch.is_tensor(each) else each for each in given)
        if kind not in self._graphs:
            self._graphs[kind] = self._record(given, tree)
        graph, own, result = self._graphs[kind]
        for mine, theirs in zip(own, given, strict=True):
            if torch.is_tensor(mine):
                mine.copy_(theirs)
        graph.replay()
        return result

    def _record(self, given: list[Any], tree: Any) -> tuple[Any, list[Any], Any]:
        own = [each.to("cuda", copy=True) if torch.is_tensor(each) else each for each in given]
        arguments, named = tree_unflatten(own, tree)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # what is compiled or chosen in first calls cannot be recorded
                self._function(*arguments, **named)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = self._function(*arguments, **named)
        return graph, own, result


class DiffusersSide:
    """A pipeline on the bundle's own folder; compiled, its UNet and VAE are tuned for each batch."""

    def __init__(self, config: Config, name: str) -> None:
        self._config, self._hardware = config, config.open_hardware()
        self._device = self._hardware.DEVICE
        _need_device(self._device)
        self._clock = Clock(self._device)
        self._pipe = open_pipeline(config, self._device, self._hardware.HALF)
        if SIDES[name].compiled:
            self._compile(regional=SIDES[name].regional)
        encoders = [
            getattr(self._pipe, each)
            for each in Bundle.open(config.bundle, check_hashes=False).spec.named("text_encoder")
        ]
        self._parts = {"text": [self._watch(each) for each in encoders], "unet": [self._watch(self._pipe.unet)]}
        self._pipe.vae.decode = Timed(self._pipe.vae.decode, self._clock)
        self._parts["vae"] = [self._pipe.vae.decode]
        self._batch = 0

    def _compile(self, *, regional: bool) -> None:
        """Compile as diffusers' own pages recommend: whole networks, or their repeated blocks, which is quicker."""
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(FOLDER / "inductor"))
        pipe, how = self._pipe, self._hardware.compile_options(self._config.compile_mode)
        for network in (pipe.unet, pipe.vae):
            network.to(memory_format=torch.channels_last)
        if regional:
            self._compile_blocks()
            return
        pipe.unet = torch.compile(pipe.unet, dynamic=False, **how)
        pipe.vae.decode = torch.compile(pipe.vae.decode, dynamic=False, **how)

    def _compile_blocks(self) -> None:
        """Compile every repeated block once; on a GPU the UNet's calls are then one CUDA graph, as ours are."""
        torch._dynamo.config.recompile_limit = 64  # a block is compiled for each of its shapes
        unet, vae = self._pipe.unet, self._pipe.vae
        unet.fuse_qkv_projections()
        for network, blocks in ((unet, REPEATED), (vae, REPEATED[1:])):
            network._repeated_blocks = list(blocks)
            network.compile_repeated_blocks(dynamic=False, **self._hardware.regional_options())
        if self._device == "cuda":
            unet.forward = Recorded(unet.forward)

    def _watch(self, network: Any) -> Timed:
        network.forward = Timed(network.forward, self._clock)
        timed: Timed = network.forward
        return timed

    def open(self, batch: int) -> None:
        """Load nothing; a compiled side compiles in its first pictures."""
        self._batch = batch
        if self._device == "cuda":
            torch.cuda.empty_cache()

    def draw(self, round_: int) -> tuple[float, float, list[NDArray[np.uint8]]]:
        """See `EngineSide.draw`."""
        task = self._config.task(round_, self._batch)
        self._clock.wait()
        first, start = self._clock.mark(), time.perf_counter()
        made = draw(self._pipe, self._config, task.prompts, task.seeds)
        seconds = time.perf_counter() - start
        return seconds, self._clock.milliseconds(first, self._clock.mark()), [np.asarray(each) for each in made.images]

    def alone(self) -> dict[str, list[float]]:
        """See `EngineSide.alone`; within whole pictures here: the device's time from a call's start to its end."""
        samples: dict[str, list[float]] = {part: [] for part in self._parts}
        for round_ in range(1 + min(3, self._config.repeats)):
            for timed in (each for part in self._parts.values() for each in part):
                timed.spans = []
            self.draw(round_)
            for part, each in self._parts.items():
                total = sum(timed.take() for timed in each)
                samples[part].append(total / self._config.steps if part == "unet" else total)
        for timed in (each for part in self._parts.values() for each in part):
            timed.spans = None
        return {part: times[1:] for part, times in samples.items()}

    def close(self) -> None:
        """Do nothing: the process ends next."""


class Peak:
    """The measured peak of the matrix units."""

    def __init__(self, config: Config) -> None:
        self._hardware = config.open_hardware()
        _need_device(self._hardware.DEVICE)

    def tflops(self) -> float:
        """Return the best of five times: float16 products of two square matrices, in 10**12 operations a second."""
        device, dtype = self._hardware.DEVICE, getattr(torch, self._hardware.HALF)
        side, calls = self._hardware.PRODUCT
        clock, a, b = Clock(device), *(torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        times = []
        for _ in range(6):
            start = clock.mark()
            for _ in range(calls):
                a @ b
            times.append(clock.milliseconds(start, clock.mark()) / calls)
        return 2 * side**3 / min(times[1:]) / 1e9

    def close(self) -> None:
        """Do nothing."""


def open_pipeline(config: Config, device: str, dtype: str) -> Any:
    """Return the pipeline of the bundle's folder, quiet and never on the network."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", DIFFUSERS_VERBOSITY="error")
    import diffusers
    from diffusers.utils.logging import disable_progress_bar

    disable_progress_bar()
    assert config.bundle is not None
    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(
        Path(config.bundle), torch_dtype=getattr(torch, dtype), local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    solver = SOLVERS[config.solver]
    scheduler: Any = getattr(diffusers, solver.scheduler)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **solver.settings)
    return pipe.to(device)


def draw(pipe: Any, config: Config, prompts: Any, seeds: Any, steps: int | None = None, **more: Any) -> Any:
    """Return the pipeline's answer. Noise is made on the CPU in float32, latentrt's default: by itself the pipeline
    would draw it in its own precision, which gives other numbers, and so another picture.
    """
    assert config.size is not None
    width, height = config.size
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    shape = (1, pipe.unet.config.in_channels, height // pipe.vae_scale_factor, width // pipe.vae_scale_factor)
    noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
    return pipe(
        list(prompts),
        num_inference_steps=steps or config.steps,
        guidance_scale=config.guidance,
        width=width,
        height=height,
        latents=noise.to(pipe.unet.dtype),
        generator=generators,
        **more,
    )


def _need_device(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"this torch ({torch.__version__}) has no CUDA device")
