"""`python -m benchmarks QUESTION... | all | report`: measure, keep the samples, write the report.

`python -m benchmarks gpu` measures full-size models on a GPU, `python -m benchmarks peers` other engines; both have
options of their own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.cases import QUICK, Config
from benchmarks.measures import rounded
from benchmarks.timing import machine

QUESTIONS = ("cold_start", "one_image", "throughput", "host_time", "shared_batch", "cores")
REPORT = "report"
GPU, PEERS = "gpu", "peers"
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Run several questions one after the other, each in a process of its own: none warms up or grows for another."""
    if sys.argv[1:2] == [GPU]:
        from benchmarks.gpu.command import main as measure_on_gpu

        sys.exit(measure_on_gpu(sys.argv[2:]))
    if sys.argv[1:2] == [PEERS]:
        from benchmarks.peers.command import main as measure_peers

        measure_peers(sys.argv[2:])
        return
    arguments = _parser().parse_args()
    names = [n for name in arguments.names for n in ((*QUESTIONS, REPORT) if name == "all" else (name,))]
    if len(names) > 1:
        options = [word for word in sys.argv[1:] if word not in arguments.names]
        for name in names:
            subprocess.run([sys.executable, "-m", "benchmarks", name, *options], check=True)
    elif names == [REPORT]:
        from benchmarks.report import write

        write(arguments.results)
    else:
        answer(names[0], _config(arguments), arguments.results)


def answer(name: str, config: Config, results: Path) -> None:
    """Measure one question and replace its samples in `results`/cpu.json."""
    about = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "machine": machine(), "config": config.to_dict()}
    print(f"{name} ...", flush=True)
    result = import_module(f"benchmarks.cpu.{name}").measure(config)
    store(results / "cpu.json", name, {**about, **result.to_dict()})


def store(path: Path, name: str, part: dict[str, Any]) -> None:
    """Replace one question's part of the file."""
    parts = json.loads(path.read_text()) if path.is_file() else {}
    parts[name] = part
    path.parent.mkdir(parents=True, exist_ok=True)
    ordered = {question: parts[question] for question in QUESTIONS if question in parts}
    path.write_text(json.dumps(rounded(ordered), indent=1, ensure_ascii=False) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="+", choices=[*QUESTIONS, "all", REPORT], metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="a smoke run: two steps, one round; says nothing")
    parser.add_argument("--threads", type=int, help="threads of both sides [all cores]")
    parser.add_argument("--repeats", type=int, help="rounds that are kept [5]")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of cpu.json and the report")
    return parser


def _config(arguments: argparse.Namespace) -> Config:
    chosen = {key: getattr(arguments, key) for key in ("threads", "repeats") if getattr(arguments, key)}
    return replace(QUICK if arguments.quick else Config(), **chosen)


if __name__ == "__main__":
    main()
