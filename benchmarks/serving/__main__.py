"""`python -m benchmarks.serving [--quick] [--results FOLDER] [report]`: about six minutes on two quiet cores."""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.measures import rounded
from benchmarks.serving import page
from benchmarks.serving.measure import QUICK, Config, measure
from benchmarks.timing import machine

RESULTS = Path(__file__).parents[1] / "results"


def main() -> None:
    """Measure, keep every sample, write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("only", nargs="?", choices=["report"], help="write the page anew, measure nothing")
    parser.add_argument("--quick", action="store_true", help="a smoke run of seconds; says nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of serving.json and the page")
    arguments = parser.parse_args()
    if arguments.only is None:
        about = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "machine": machine(("numpy", "onnxruntime", "uvicorn"))}
        found = rounded({**about, **measure(QUICK if arguments.quick else Config())})
        arguments.results.mkdir(parents=True, exist_ok=True)
        (arguments.results / "serving.json").write_text(json.dumps(found) + "\n")
    page.write(arguments.results)


if __name__ == "__main__":
    main()
