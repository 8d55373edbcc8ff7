"""Time and memory of one UNet call on the CPU: the plain float32 graph, the CPU graph, and diffusers' UNet.

    latentrt export preset:sd15 BUNDLE
    python -m benchmarks.cpu.attention BUNDLE --size 512 --threads 1

Each side is a process of its own, which calls its UNet when its turn comes (ABCABC), so that the machine's other load
meets all of them, and the peak memory is one side's own: of the calls, without loading. All read the same numbers.
diffusers runs as a user would call it: eager, float32, no gradients. CPU seconds are those of all threads of the side.
On a machine that others use, compare those on one thread.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.spec import CONDITIONER, FP32, FP32_ORT_CPU
from latentrt.model.predictor import inputs_of
from latentrt.runtime.base import call
from latentrt.runtime.machine.memory import return_freed_pages
from latentrt.runtime.onnxruntime import OrtBackend
from latentrt.runtime.signature import shape_of

Arrays = dict[str, np.ndarray[Any, Any]]
DIFFUSERS = "diffusers"
SIDES = (FP32, FP32_ORT_CPU, DIFFUSERS)


class Call(NamedTuple):
    """One call: seconds by the clock and of the CPU, and the output."""

    wall: float
    cpu: float
    output: np.ndarray[Any, Any]


def main() -> None:
    """Print one row for each side; ratios are to the last one, round by round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--size", type=int, default=512, help="side of the picture in pixels")
    parser.add_argument("--lanes", type=int, default=2, help="two are one picture with guidance")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    args = parser.parse_args()
    calls, peaks = measure(args.bundle, args.sides, args.size, args.lanes, args.threads, args.repeats)
    print("| UNet | call, s | ratio | CPU, s | ratio | peak, MiB | relative L2 |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for side in args.sides:
        print(f"| {side} | {' | '.join(cells(calls[side], calls[args.sides[-1]]))} | {peaks[side]:.0f} |", end="")
        print(f" {relative_l2(calls[side][0].output, calls[args.sides[-1]][0].output):.1e} |")


def measure(
    bundle: Path, sides: list[str], size: int, lanes: int, threads: int, repeats: int
) -> tuple[dict[str, list[Call]], dict[str, float]]:
    """Return each side's calls, the first round (which warms up) left out, and its peak memory in MiB."""
    spawn, pipes, processes = multiprocessing.get_context("spawn"), {}, []
    for side in sides:
        pipes[side], theirs = spawn.Pipe()
        processes.append(spawn.Process(target=serve, args=(theirs, bundle, side, size, lanes, threads), daemon=True))
        processes[-1].start()
        theirs.close()
        pipes[side].recv()  # loaded, before the next one loads
    calls: dict[str, list[Call]] = {side: [] for side in sides}
    for round_ in range(1 + repeats):
        for side, pipe in pipes.items():
            pipe.send(True)
            call = pipe.recv()
            if round_:
                calls[side].append(call)
    peaks = {}
    for side, pipe in pipes.items():
        pipe.send(False)
        peaks[side] = pipe.recv()
    for process in processes:
        process.join()
    return calls, peaks


def serve(pipe: Connection, bundle: Path, side: str, size: int, lanes: int, threads: int) -> None:
    """Load one side; call it as often as the pipe says so; send the peak memory."""
    return_freed_pages()  # as the command does
    opened = Bundle.open(bundle, check_hashes=False)
    network, feeds = load(opened, side, threads), examples(opened, size, lanes)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the peak of loading
    pipe.send(side)
    while pipe.recv():
        wall, cpu = time.perf_counter(), time.process_time()
        output = network(feeds)
        pipe.send(Call(time.perf_counter() - wall, time.process_time() - cpu, output))
    pipe.send(peak_mebibytes())


def load(bundle: Bundle, side: str, threads: int) -> Callable[[Arrays], np.ndarray[Any, Any]]:
    """Return a side's UNet as a function of its inputs; ours is told the text at its first call."""
    if side != DIFFUSERS:
        backend = OrtBackend(threads=threads)
        backend.variants = (side, FP32)
        once = [backend.load(bundle, name) for name in bundle.spec.named(CONDITIONER)]
        network, told = backend.load(bundle, bundle.spec.denoiser), Arrays()

        def ours(feeds: Arrays) -> np.ndarray[Any, Any]:
            while once:
                told.update(call(once.pop(), feeds))
            return call(network, {**feeds, **told})["out"]

        return ours
    import torch
    from diffusers import UNet2DConditionModel

    torch.set_num_threads(threads)
    unet = UNet2DConditionModel.from_pretrained(bundle.path("unet"), torch_dtype=torch.float32)

    def theirs(feeds: Arrays) -> np.ndarray[Any, Any]:
        values = {name: torch.from_numpy(array) for name, array in feeds.items()}
        added = {name: values[name] for name in ("text_embeds", "time_ids") if name in values}
        with torch.no_grad():
            states = values["encoder_hidden_states"]
            result = unet(values["sample"], values["timestep"], states, added_cond_kwargs=added, return_dict=False)
        output: np.ndarray[Any, Any] = result[0].numpy()
        return output

    return theirs


def examples(bundle: Bundle, size: int, lanes: int) -> Arrays:
    """Return the UNet's inputs: normal numbers, and a timestep."""
    side, draw = size // bundle.spec.latents.factor, np.random.default_rng(0)
    sizes = {"batch": lanes, "height": side, "width": side, "tokens": bundle.spec.tokens}
    inputs = inputs_of([bundle.spec.networks[name] for name in (*bundle.spec.named(CONDITIONER), bundle.spec.denoiser)])
    feeds = {name: draw.standard_normal(shape_of(tensor, sizes), np.float32) for name, tensor in inputs.items()}
    return feeds | {"timestep": np.full(lanes, 500, np.float32)}


def cells(calls: list[Call], reference: list[Call]) -> list[str]:
    """Return medians with ranges: seconds by the clock, their ratio to the reference, the CPU's, their ratio."""
    texts = []
    for field in ("wall", "cpu"):
        seconds = [getattr(call, field) for call in calls]
        ratios = [mine / getattr(theirs, field) for mine, theirs in zip(seconds, reference, strict=True)]
        texts += [spread(seconds), spread(ratios)]
    return texts


def spread(numbers: list[float]) -> str:
    return f"{median(numbers):.3g} ({min(numbers):.3g} to {max(numbers):.3g})"


def relative_l2(ours: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any]) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def peak_mebibytes() -> float:
    """Return this process' peak resident memory since it loaded, as Linux counts it: mapped files included."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


if __name__ == "__main__":
    main()
