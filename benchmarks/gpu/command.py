"""`python -m benchmarks gpu`: its command line."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.gpu.child import NotMeasuredError
from benchmarks.gpu.config import FOLDER, SIDES, Config
from benchmarks.gpu.lease.bundles import pack
from benchmarks.gpu.lease.jobs import OTHERS
from benchmarks.gpu.lease.run import run as run_lease
from benchmarks.gpu.results import Results
from benchmarks.gpu.run import bundle_of, export, run
from latentrt.errors import LatentrtError, RequestError

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
COMPILE_MODES = ("max-autotune", "reduce-overhead", "default")
PACKING = 3600.0  # seconds that an export may take, on a machine without a GPU
OWN = ("quick", "results", "lease", "pack", "packed")  # of the command, not of a measurement
PRESETS = ("sd15", "sd21", "sdxl", "sd15-small")


def main(words: Sequence[str]) -> int:
    """Measure and write the report; return 1 where there is nothing to measure with."""
    arguments = _parser().parse_args(words)
    folder = (arguments.results or (FOLDER / "quick" if arguments.quick else RESULTS)).absolute()
    try:
        if arguments.pack:
            _pack(arguments.preset or Config().preset, arguments.pack)
            return 0
        found = _measure(arguments, folder)
    except (LatentrtError, NotMeasuredError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for results in found:
        print(results.path)
    report = [sys.executable, "-m", "benchmarks", "report", "--results", str(folder)]
    if subprocess.run(report, cwd=ROOT, check=False).returncode:  # it needs matplotlib, which a GPU's machine may lack
        print("the page was not written; elsewhere: python -m benchmarks report", file=sys.stderr)
    return 0 if any(any(results.measured()) for results in found) else 1


def _measure(arguments: argparse.Namespace, folder: Path) -> list[Results]:
    config = config_of(arguments)
    if not arguments.lease:
        return [run(config, folder)]
    if config.bundle is not None:
        raise RequestError("--lease was given with --bundle", needed="a preset: graphs are added to its bundle")
    return run_lease(config, folder, arguments.packed)


def _pack(preset: str, folder: Path) -> None:
    """Write the bundles of a lease without their weights; what is missing is exported first. No GPU is needed."""
    presets = (preset, *OTHERS.get(preset, ()))
    for each in presets:
        if not (bundle_of(each) / "manifest.json").is_file():
            export(each, PACKING)
    for name, size in pack([bundle_of(each) for each in presets], folder).items():
        print(f"{folder / name}: {size / 1e6:.1f} MB")


def config_of(arguments: argparse.Namespace) -> Config:
    """Return the config of the arguments; missing ones have the default, or a smoke run's value."""
    config = Config(batches=(1,), steps=2, repeats=1, calls=2, drift=(2,)) if arguments.quick else Config()
    asked = {key: value for key, value in vars(arguments).items() if key not in OWN}
    return replace(config, **{key: value for key, value in asked.items() if value is not None})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gpu",
        description="Measure full-size models on this machine's first GPU, side by side. Figures of other sides and "
        "batches of a preset are kept, so a long run may be split into several.",
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="true configuration, random weights [sd15]")
    add("--bundle", type=Path, help="take this bundle's networks; --preset then only names the results")
    add("--batches", type=_numbers, help="pictures at once [1,2,4,8,16]")
    add("--sides", type=_sides, help=f"[{','.join(SIDES)}]")
    add("--steps", type=int, help="[50]")
    add("--size", type=_size, help="WIDTHxHEIGHT in pixels [the model's own]")
    add("--repeats", type=int, help="rounds that are kept [5]")
    add("--drift", type=_numbers, help="steps of the runs whose latents are compared; 0 for none [20,50]")
    add("--library", choices=("tensorrt", "tensorrt-rtx"), help="[tensorrt]")
    add("--compile-mode", choices=COMPILE_MODES, help="of torch.compile [max-autotune]")
    add("--alone", action="store_true", default=None, help="one side after the other: a GPU has room for one only")
    add("--limit", type=float, help="seconds that opening a side for a batch may take [480]")
    add("--minutes", type=float, help="for all of it; the rest is then recorded as not measured [no bound]")
    add("--lease", action="store_true", help="do the jobs of benchmarks/gpu/lease that are left, in order of worth")
    add("--packed", type=Path, help="of --lease: folder that --pack wrote; presets need no export then")
    add("--pack", type=Path, metavar="FOLDER", help="write the bundles of a lease there, without weights, and stop")
    add("--quick", action="store_true", help="a smoke run: two steps, one round; says nothing")
    add(
        "--results", type=Path, help="folder of the JSON and the report [benchmarks/results; of a smoke run, the cache]"
    )
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if int(part))


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    return int(width), int(height or width)


def _sides(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = sorted(set(names) - set(SIDES))
    if unknown:
        raise argparse.ArgumentTypeError(f"no side {', '.join(unknown)}; there are {', '.join(SIDES)}")
    return names
