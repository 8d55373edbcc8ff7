"""`python -m benchmarks.serving [all | beside | refusals | soak | report]`: ways to serve under the same traffic.

The machine should be quiet. `all` takes nine minutes and writes serving.json, `refusals` measures that part of it
again, `beside` the part that `all` leaves as it is: a modest client beside others (ten minutes). `soak` takes as long
as its option says and writes serving-soak.json; each writes SERVING.md and its plots anew, and `report` only does that.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.measures import rounded
from benchmarks.serving import page, refusals, soak
from benchmarks.serving.beside import measure as beside
from benchmarks.serving.measure import QUICK, Config, measure
from benchmarks.timing import machine

RESULTS = Path(__file__).parents[1] / "results"


def main() -> None:
    """Measure, keep every sample, write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("what", nargs="?", choices=["all", "beside", "refusals", "soak", "report"], default="all")
    parser.add_argument("--quick", action="store_true", help="a smoke run of seconds; says nothing")
    parser.add_argument("--minutes", type=float, default=5.0, help="of the soak [5]")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the samples and the page")
    arguments = parser.parse_args()
    arguments.results.mkdir(parents=True, exist_ok=True)
    if arguments.what == "all":
        config = QUICK if arguments.quick else Config()
        kept = _read(arguments.results / page.SAMPLES, beside.PART)
        _keep(arguments.results / page.SAMPLES, lambda: {**kept, **measure(config)})
    elif arguments.what == beside.PART:
        _put(arguments.results, beside.PART, beside.measure(beside.QUICK if arguments.quick else beside.Config()))
    elif arguments.what == "refusals":
        config = QUICK if arguments.quick else Config()
        _put(arguments.results, "refusals", refusals.measure(config.burst, config.crowds, config.bursts))
    elif arguments.what == "soak":
        _keep(arguments.results / page.SOAK, lambda: soak.measure(arguments.minutes))
    page.write(arguments.results)


def _read(path: Path, part: str) -> dict[str, Any]:
    """Return a part of the samples that `all` does not measure, if it is there."""
    found = json.loads(path.read_text()) if path.is_file() else {}
    return {part: found[part]} if part in found else {}


def _put(folder: Path, part: str, samples: Any) -> None:
    """Put a part that was measured again in its place."""
    path = folder / page.SAMPLES
    path.write_text(json.dumps(json.loads(path.read_text()) | rounded({part: samples})) + "\n")


def _keep(path: Path, samples: Callable[[], Mapping[str, Any]]) -> None:
    about = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "machine": machine(("numpy", "onnxruntime", "uvicorn"))}
    path.write_text(json.dumps(rounded({**about, **samples()})) + "\n")


if __name__ == "__main__":
    main()
