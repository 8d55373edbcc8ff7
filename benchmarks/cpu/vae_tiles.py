"""What do tiles save, and where do they show? `python -m benchmarks.cpu.vae_tiles BUNDLE` prints what docs/vae.md has.

Each row is a process of its own that decodes, or encodes, one picture: its peak resident memory over that of the loaded
network, and its time. The seam is the difference of a tiled picture from the same one made at once, in numbers of -1..1
(of an encoder: of latents). Latents are normal numbers, or with --prompt those of a picture.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.cpu.attention import peak_mebibytes
from latentrt.bundle.bundle import Bundle
from latentrt.engine import Engine
from latentrt.model.vae.codec import Vae
from latentrt.model.vae.tiles import Tiles
from latentrt.runtime import open_backend

Float32 = NDArray[np.float32]


def main() -> None:
    """Print a row for each size and tile."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--tile", type=int, default=512)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--encode", action="store_true")
    parser.add_argument("--tiled-only", action="store_true", help="where a picture at once needs more than there is")
    parser.add_argument("--prompt", help="decode a picture of it")
    args = parser.parse_args()
    print("| pixels | tile | peak, MiB | seconds | largest difference | RMS |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for size in args.sizes:
        whole: Float32 | None = None
        given = _given(args.bundle, size, args.prompt, encode=args.encode)
        for tile in (args.tile,) if args.tiled_only else (None, args.tile):
            made, peak, seconds = in_process(args.bundle, given, tile, args.threads)
            cells: Sequence[str] = ("", "") if whole is None else seam(made, whole)
            print(f"| {size} | {tile or 'none'} | {peak:.0f} | {seconds:.1f} | {cells[0]} | {cells[1]} |", flush=True)
            whole = made


def _given(bundle: Path, size: int, prompt: str | None, *, encode: bool) -> Float32:
    """Return a picture (channels, height, width) to encode, or latents (1, channels, height, width) to decode."""
    draw, latents = np.random.default_rng(0), Bundle.open(bundle, check_hashes=False).spec.latents
    if encode:
        return draw.uniform(-1, 1, (3, size, size)).astype(np.float32)
    if prompt is None:
        return draw.standard_normal((1, *latents.shape_of(size, size)), np.float32)
    with Engine.load(bundle, check_hashes=False) as engine:
        (job,) = engine.requests([prompt], {"width": size, "height": size, "seed": 7})
        engine.run([job])
        return job.latents[None]


def seam(made: Float32, whole: Float32) -> tuple[str, str]:
    """Return the largest difference and its root mean square, as text."""
    off = np.abs(made - whole)
    return f"{off.max():.2g}", f"{np.sqrt(np.mean(off.astype(np.float64) ** 2)):.2g}"


def in_process(bundle: Path, given: Float32, tile: int | None, threads: int | None) -> tuple[Float32, float, float]:
    """Return what a process of its own made of it, the memory that it took for it in MiB, and the seconds."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_measured, args=(theirs, bundle, given, tile, threads))
    process.start()
    made, peak, seconds = ours.recv()
    process.join()
    return made, peak, seconds


def _measured(pipe: Connection, root: Path, given: Float32, tile: int | None, threads: int | None) -> None:
    bundle, backend = Bundle.open(root, check_hashes=False), open_backend("onnxruntime", None, threads)
    latents, encodes = bundle.spec.latents, given.ndim == 3
    network = backend.load(bundle, "vae_encoder" if encodes else "vae_decoder")
    vae = Vae(network, network if encodes else None, latents, None if tile is None else Tiles.of(tile, latents.factor))
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the peak of loading
    before, start = peak_mebibytes(), time.perf_counter()
    made = vae.encode(given).mean if encodes else vae.decode(given)
    pipe.send((made, peak_mebibytes() - before, time.perf_counter() - start))


if __name__ == "__main__":
    main()
