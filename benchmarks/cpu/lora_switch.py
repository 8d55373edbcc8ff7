"""How long does a running engine take to change its LoRAs? `python -m benchmarks.cpu.lora_switch` prints what
docs/lora.md has.

The two LoRAs have random weights, of rank 8: one of the UNet's and the text encoders' attention, as trainers make them,
and one of the keys and values of the text alone. Changes take turns, so that the machine's other load meets all of
them; the CPU's seconds are those of all threads.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import quantiles
from typing import NamedTuple

import numpy as np

from latentrt.bundle.bundle import EMBEDDED, Bundle
from latentrt.bundle.tensors import header_of, open_tensors
from latentrt.engine import Engine

RANK = 8
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
TEXT = ("attn2.to_k", "attn2.to_v")
NETWORKS = ("unet", "text_encoder", "text_encoder_2")


class Change(NamedTuple):
    """One change: seconds by the clock and of the CPU."""

    wall: float
    cpu: float


def main() -> None:
    """Print a row for each change."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?", default=EMBEDDED)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    print("| change | median, s | quartiles | fastest, slowest | CPU, median, s |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, changes in measure(args.bundle, args.threads, args.repeats).items():
        walls = [change.wall for change in changes]
        low, middle, high = quantiles(walls, method="inclusive")
        cpu = quantiles([change.cpu for change in changes], method="inclusive")[1]
        print(f"| {name} | {middle:.2f} | {low:.2f}, {high:.2f} | {min(walls):.2f}, {max(walls):.2f} | {cpu:.2f} |")


def measure(bundle: Path, threads: int | None, repeats: int) -> dict[str, list[Change]]:
    """Return the changes of each kind; the first round, which fills caches, is left out."""
    found: dict[str, list[Change]] = {}
    with tempfile.TemporaryDirectory() as folder, Engine.load(bundle, threads=threads, check_hashes=False) as engine:
        attention, text = (
            write_lora(Path(folder) / f"{name}.safetensors", bundle, ends)
            for name, ends in (("attention", ATTENTION), ("text", TEXT))
        )
        changes: dict[str, Callable[[], None]] = {
            "base to A (attention)": lambda: engine.set_lora(attention),
            "A to another strength": lambda: engine.set_lora(f"{attention}:0.5"),
            "A to B (keys and values of the text)": lambda: engine.set_lora(text),
            "B to the base": lambda: engine.set_lora(),
            "base to B": lambda: engine.set_lora(text),
            "B to A": lambda: engine.set_lora(attention),
            "A to the base": lambda: engine.set_lora(),
            "a new engine with A": lambda: Engine.load(
                bundle, threads=threads, check_hashes=False, lora=attention
            ).close(),
        }
        for turn in range(1 + repeats):
            for name, change in changes.items():
                wall, cpu = time.perf_counter(), time.process_time()
                change()
                if turn:
                    times = Change(time.perf_counter() - wall, time.process_time() - cpu)
                    found.setdefault(name, []).append(times)
    return found


def write_lora(path: Path, bundle: Path, ends: tuple[str, ...]) -> Path:
    """Write a LoRA of a bundle's modules with these ends."""
    random, arrays = np.random.default_rng(0), dict[str, np.ndarray]()
    for module, (rows, columns) in _modules(bundle, ends):
        arrays[f"{module}.lora_A.weight"] = random.standard_normal((RANK, columns), np.float32) / 8
        arrays[f"{module}.lora_B.weight"] = random.standard_normal((rows, RANK), np.float32) / 64
    header = header_of({name: ("F32", array.shape) for name, array in arrays.items()})
    path.write_bytes(header + b"".join(array.tobytes() for array in arrays.values()))
    return path


def _modules(root: Path, ends: tuple[str, ...]) -> Iterator[tuple[str, tuple[int, int]]]:
    opened = Bundle.open(root, check_hashes=False)
    for file in opened.files:
        network = file.partition("/")[0]
        if file.endswith(".safetensors") and network in NETWORKS:
            for name, shape in open_tensors(opened.path(file)).shapes.items():
                if name.endswith(tuple(f"{end}.weight" for end in ends)) and len(shape) == 2:
                    yield f"{network}.{name.removesuffix('.weight')}", (shape[0], shape[1])


if __name__ == "__main__":
    main()
