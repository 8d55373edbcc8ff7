"""What do LoRAs with each request cost? `python -m benchmarks.serving.loras` prints the tables of docs/lora.md.

Calls: a denoiser's call with LoRAs against the plain one, in turn, by rank and lanes.

Traffic: pictures that want one of some LoRAs each, at random, and come at random times. "Mixed" is one engine in whose
batches each picture has its own; "merged" is one engine for each LoRA, loaded when the next picture wants another than
the one that is loaded, as is done where a LoRA is merged into the weights: pictures that wait for the same one then go
together. Both draw the same pictures in the same order of arrival. A picture's time is from its arrival to its end.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.cases import PROMPTS
from benchmarks.measures import Spread
from benchmarks.timing import paired
from latentrt.adapters.mixed import DOWN, UP
from latentrt.bundle.bundle import EMBEDDED, Bundle
from latentrt.bundle.spec import CONDITIONER, LORA
from latentrt.bundle.tensors import header_of
from latentrt.engine import Engine
from latentrt.model.conditioners.adapters import adapted
from latentrt.run.job import Job
from latentrt.runtime.base import Network
from latentrt.runtime.onnxruntime import OrtBackend
from latentrt.runtime.signature import shape_of
from latentrt_export.merge_bundle import merge_bundle

LANES, RANKS = (2, 8, 16), (4, 16, 64, 128)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=EMBEDDED)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--loras", type=int, default=10)
    parser.add_argument("--rank", type=int, default=16, help="of the LoRAs of the traffic")
    parser.add_argument("--pictures", type=int, default=40)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--load", type=float, default=0.8, help="pictures that come, of those that a full batch draws")
    args = parser.parse_args()
    with TemporaryDirectory() as root:
        bundle = Path(root) / "bundle"
        merge_bundle(args.bundle, bundle, (), adapters=True)
        calls(bundle, args.threads, args.repeats)
        files = [
            write_lora(bundle, Path(root) / f"lora{number}.safetensors", args.rank, number)
            for number in range(args.loras)
        ]
        traffic(bundle, files, args)


# ---- Calls


def calls(root: Path, threads: int, repeats: int) -> None:
    """Print the time of a denoiser's call with LoRAs, of that of the plain one, by rank and lanes."""
    bundle, backend = Bundle.open(root, check_hashes=False), OrtBackend(threads=threads)
    networks = [backend.load(one, bundle.spec.denoiser) for one in (bundle, adapted(bundle))]
    print("| rank | lanes | a plain call, ms | with LoRAs, of a plain call |\n| ---: | ---: | ---: | --- |")
    for rank in RANKS:
        for lanes in LANES:
            feeds = _feeds(bundle, networks[1], rank, lanes)
            plain = {name: array for name, array in feeds.items() if not name.startswith(LORA)}
            runs = {"plain": partial(_call, networks[0], plain), "lora": partial(_call, networks[1], feeds)}
            samples = paired(runs, repeats)
            pairs = list(zip(samples["lora"], samples["plain"], strict=True))
            ratio = Spread.of([ours.seconds / theirs.seconds for ours, theirs in pairs])
            alone = median(one.seconds for one in samples["plain"]) * 1000
            told = f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
            print(f"| {rank} | {lanes} | {alone:.1f} | {told} |", flush=True)


def _feeds(bundle: Bundle, network: Network, rank: int, lanes: int) -> dict[str, np.ndarray]:
    latents, draw = bundle.spec.latents, np.random.default_rng(0)
    sizes = {"batch": lanes, "height": latents.height, "width": latents.width, "rank": rank}
    sizes["tokens"] = bundle.spec.tokens
    shapes = {tensor.name: shape_of(tensor, sizes) for tensor in network.graph.inputs}
    return {name: 0.1 * draw.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def _call(network: Network, feeds: dict[str, np.ndarray], round_: int) -> None:
    network(feeds)


# ---- Traffic


def write_lora(root: Path, path: Path, rank: int, seed: int) -> Path:
    """Write a LoRA with random weights for all modules that a bundle's UNet adapts."""
    spec, draw = Bundle.open(root, check_hashes=False).spec, np.random.default_rng(seed)
    tensors = {}
    for name in (*spec.named(CONDITIONER), spec.denoiser):
        for tensor in spec.networks[name].adapted().inputs:
            module = tensor.name.removeprefix(LORA).removesuffix(DOWN).removesuffix(UP)
            if tensor.name.endswith(DOWN) and tensor.name.startswith(LORA):
                wide = int(tensor.shape[1])
                tensors[f"unet.{module}.lora_A.weight"] = draw.standard_normal((rank, wide), np.float32) / wide**0.5
            elif tensor.name.startswith(LORA):
                out = int(tensor.shape[2])
                tensors[f"unet.{module}.lora_B.weight"] = draw.standard_normal((out, rank), np.float32) * 0.02
    with path.open("wb") as file:
        file.write(header_of({name: ("F32", array.shape) for name, array in tensors.items()}))
        for array in tensors.values():
            file.write(array.astype("<f4").tobytes())
    return path


@dataclass
class Asked:
    """A picture of the traffic: when it comes, its LoRA, prompt and seed; when it was done."""

    comes: float
    lora: int
    prompt: str
    seed: int
    done: float = field(default=0.0)


def traffic(bundle: Path, files: Sequence[Path], args: argparse.Namespace) -> None:
    """Print throughput and times of the same pictures, mixed and merged."""
    with engine(bundle, args, adapters={path.stem: path for path in files}) as mixed:
        rate = args.load * _rate(mixed, files, args)
        print(
            f"\n{args.loras} LoRAs of rank {args.rank}, {args.pictures} pictures of {args.steps} steps, "
            f"{rate:.2f} come in a second\n"
        )
        print("| round | way | pictures a second | median, s | p95, s | loads |")
        print("| ---: | --- | ---: | ---: | ---: | ---: |")
        for round_ in range(args.rounds):
            for way in ("mixed", "merged"):
                asked = arrivals(len(files), rate, args, round_)
                start = time.perf_counter()
                loads = (
                    serve_mixed(mixed, files, asked, args)
                    if way == "mixed"
                    else serve_merged(bundle, files, asked, args)
                )
                seconds = time.perf_counter() - start
                times = sorted(one.done - one.comes for one in asked)
                p95 = times[int(0.95 * (len(times) - 1))]
                cells = f"{len(asked) / seconds:.2f} | {median(times):.1f} | {p95:.1f} | {loads}"
                print(f"| {round_} | {way} | {cells} |", flush=True)


@contextmanager
def engine(bundle: Path, args: argparse.Namespace, **loading: object) -> Iterator[Engine]:
    """Load an engine as the traffic's ways do."""
    with Engine.load(bundle, threads=args.threads, check_hashes=False, adapter_rank=args.rank, **loading) as made:
        yield made


def arrivals(loras: int, rate: float, args: argparse.Namespace, seed: int) -> list[Asked]:
    """Return pictures that come at random times, so many a second on average."""
    draw = np.random.default_rng(seed)
    times = np.cumsum(draw.exponential(1 / rate, args.pictures))
    chosen = draw.integers(0, loras, args.pictures)
    return [
        Asked(float(at), int(lora), PROMPTS[number % len(PROMPTS)], number)
        for number, (at, lora) in enumerate(zip(times, chosen, strict=True))
    ]


def _rate(mixed: Engine, files: Sequence[Path], args: argparse.Namespace) -> float:
    """Return how many pictures a second full batches draw."""
    count = mixed.denoiser.lanes // 2
    jobs = [_job(mixed, files, Asked(0, number % len(files), PROMPTS[0], number), args) for number in range(count)]
    start = time.perf_counter()
    mixed.run(jobs)
    return count / (time.perf_counter() - start)


def _job(made: Engine, files: Sequence[Path], one: Asked, args: argparse.Namespace, *, named: bool = True) -> Job:
    lora = {"lora": {files[one.lora].stem: 0.8}} if named else {}
    settings = {"steps": args.steps, "seed": one.seed, "guidance": 3.0, **lora}
    return made.requests([one.prompt], settings)[0]


def serve_mixed(mixed: Engine, files: Sequence[Path], asked: Sequence[Asked], args: argparse.Namespace) -> int:
    """Draw pictures as they come, each with its LoRA, as many at once as there are lanes; return the loads: none."""
    start, waiting, owners, denoiser = time.perf_counter(), list(asked), dict[Job, Asked](), mixed.denoiser
    while waiting or denoiser.jobs:
        while waiting and waiting[0].comes <= time.perf_counter() - start and denoiser.free >= 2:
            one = waiting.pop(0)
            owners[job := _job(mixed, files, one, args)] = one
            denoiser.admit(job)
        if not denoiser.jobs:
            _wait_for(waiting[0], start)
        for job in denoiser.tick():
            if job.done:
                mixed.picture(job)
                owners[job].done = time.perf_counter() - start
    return 0


def serve_merged(bundle: Path, files: Sequence[Path], asked: Sequence[Asked], args: argparse.Namespace) -> int:
    """Draw pictures by an engine with one LoRA merged, that of the picture that waits longest; return the loads.

    Those that wait for the same one by then are drawn with it.
    """
    start, left, loads = time.perf_counter(), list(asked), 0
    while left:
        _wait_for(left[0], start)
        lora = left[0].lora
        with engine(bundle, args, lora={files[lora]: 0.8}) as made:
            loads += 1
            while left and left[0].lora == lora:
                _wait_for(left[0], start)
                now = time.perf_counter() - start
                ready = [one for one in left if one.lora == lora and one.comes <= now]
                jobs = [_job(made, files, one, args, named=False) for one in ready]
                made.run(jobs)
                for one, job in zip(ready, jobs, strict=True):
                    made.picture(job)
                    one.done = time.perf_counter() - start
                left = [one for one in left if one not in ready]
    return loads


def _wait_for(one: Asked, start: float) -> None:
    time.sleep(max(0.0, one.comes - (time.perf_counter() - start)))


if __name__ == "__main__":
    main()
