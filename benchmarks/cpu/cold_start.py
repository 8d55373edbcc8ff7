"""How long does it take from typing a command to a picture on disk, and how much memory?

Measured: two fresh processes in turn, each given the same prompt, seed, steps, solver and threads and timed until it
has ended. Ours is `latentrt generate` as a user types it (which checks the model's hashes); theirs is
`diffusers_script.py`, the shortest natural one, offline and without a progress bar. Memory is the kernel's own count of
the process' peak resident set. Files are in the page cache and Python's bytecode is compiled. Importing is timed in
processes of its own: the package's name alone (both packages are lazy), then the class that one works with.
"""

from __future__ import annotations

import json
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.cases import Config, psnr, task
from benchmarks.measures import OURS, THEIRS, Goal, Measure, Result, at_least, at_most
from benchmarks.timing import Child, paired, run_child

TITLE = "Cold start"
START, MEMORY = "process start to PNG on disk", "peak memory"
PACKAGE, CLASS = "import the package", "import its class as well"
IMPORT = """
import json, sys, time
start = time.perf_counter()
import {package}
package = time.perf_counter()
from {package} import {name}
end = time.perf_counter()
print(json.dumps([1000 * (package - start), 1000 * (end - start), "torch" in sys.modules]))
"""


def measure(config: Config) -> Result:
    """Measure one picture from a fresh process, and imports, by both."""
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder, "ours.png"), Path(folder, "theirs.png")
        runs = paired(
            {OURS: lambda _: _generate(config, ours), THEIRS: lambda _: _script(config, theirs)},
            config.repeats,
            config.warmup,
        )
        agreement = _compare(ours, theirs)
    children: dict[str, list[Child]] = {side: [sample.result for sample in runs[side]] for side in runs}
    imports = paired(
        {
            OURS: lambda _: _import("latentrt", "Engine"),
            THEIRS: lambda _: _import("diffusers", "StableDiffusionPipeline"),
        },
        config.repeats,
        config.warmup,
    )
    answers: dict[str, list[Any]] = {side: [sample.result for sample in imports[side]] for side in imports}
    measures = [
        Measure(START, "s", {side: [child.seconds for child in children[side]] for side in children}),
        Measure(MEMORY, "MiB", {side: [child.mebibytes for child in children[side]] for side in children}),
        Measure(PACKAGE, "ms", {side: [answer[0] for answer in answers[side]] for side in answers}),
        Measure(CLASS, "ms", {side: [answer[1] for answer in answers[side]] for side in answers}),
    ]
    return Result(measures, {"psnr_db": agreement, "torch_imported": any(answer[2] for answer in answers[OURS])})


def goals(result: Result) -> list[Goal]:
    """Return the charter's goals."""
    torch_there = result.facts["torch_imported"]
    return [
        at_most("`import latentrt` under 150 ms", result[PACKAGE], 150),
        Goal("no torch in `sys.modules` after it", "torch is there" if torch_there else "none", not torch_there),
        at_least("cold start at least 8 times faster than diffusers", result[START], 8),
        at_least("peak memory at least 4 times smaller than diffusers", result[MEMORY], 4),
    ]


def _generate(config: Config, target: Path) -> Child:
    one = task(config)
    command: list[str | Path] = [
        Path(sysconfig.get_path("scripts"), "latentrt"),
        "generate",
        *one.prompts,
        "--bundle",
        config.bundle,
    ]
    return run_child([*command, *_flags(config), "--output", target])


def _script(config: Config, target: Path) -> Child:
    command: list[str | Path] = [sys.executable, Path(__file__).with_name("diffusers_script.py"), config.bundle, target]
    return run_child(
        [*command, *task(config).prompts, str(config.steps), str(config.seed), str(config.guidance)],
        HF_HUB_OFFLINE="1",
        OMP_NUM_THREADS=str(config.threads),
    )


def _flags(config: Config) -> list[str]:
    named = {"steps": config.steps, "seed": config.seed, "solver": config.solver, "guidance": config.guidance}
    return [f"--{name}={value}" for name, value in {**named, "threads": config.threads}.items()]


def _import(package: str, name: str) -> list[Any]:
    """Return milliseconds to the package, milliseconds to the class, whether torch is there."""
    child = run_child([sys.executable, "-c", IMPORT.format(package=package, name=name)])
    answer: list[Any] = json.loads(child.output.splitlines()[-1])
    return answer


def _compare(ours: Path, theirs: Path) -> float:
    from PIL import Image

    with Image.open(ours) as a, Image.open(theirs) as b:
        return psnr([a], [b])
