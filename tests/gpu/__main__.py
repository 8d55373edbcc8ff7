"""`python -m tests.gpu`: each kind of backend in a process of its own, then the outcome of each.

A library that aborts ends its own process only. The status is 0 where every test that ran has passed, and networks ran.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from tests.gpu.kinds import KINDS

ROOT = Path(__file__).parents[2]
PYTEST = (sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider")
OUT_OF_TIME = "out of time"


class Step(NamedTuple):
    """Tests that share a process. `network`: it runs networks; `counts`: its failure fails the whole run."""

    name: str
    words: tuple[str, ...]
    network: bool = True
    counts: bool = True


def steps() -> Iterator[Step]:
    """Yield the kernels, each kind of backend, and last what a library may not support: captured ONNX Runtime."""
    yield Step("kernels", ("tests/gpu/test_cuda_gpu.py",), network=False)
    runtimes = ["-".join(kind) for kind in KINDS if kind[0] == "onnxruntime"]
    for name in map("-".join, KINDS):
        yield Step(name, ("tests/gpu", "-k", f"{name} and not captured" if name in runtimes else name))
    for name in runtimes:
        yield Step(f"{name}, captured", ("tests/gpu", "-k", f"{name} and captured"), network=False, counts=False)


@dataclass(frozen=True)
class Outcome:
    """The outcome of a step; `reason` says why tests were skipped, or how the process ended."""

    step: Step
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    reason: str = ""
    died: bool = False

    @property
    def good(self) -> bool:
        """Whether nothing went wrong; a step whose tests were all skipped is good."""
        return not self.failed and not self.died

    def __str__(self) -> str:
        counts = {"passed": self.passed, "failed": self.failed, "skipped": self.skipped}
        found = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        if self.died:
            found = f"ended: {self.reason}"
        elif not self.passed + self.failed:
            found = f"not run: {self.reason}"
        elif self.reason:
            found += f" ({self.reason})"
        return f"{self.step.name}: {found}{'' if self.good or self.step.counts else ' (does not count)'}"


def run(step: Step, folder: Path, seconds: float | None) -> Outcome:
    """Run a step for so many seconds at most; its JUnit report is left in the folder."""
    report = folder / f"tests-{step.name.replace(', ', '-')}.xml"
    report.unlink(missing_ok=True)
    if seconds is not None and seconds <= 0:
        return Outcome(step, reason=OUT_OF_TIME, died=True)
    # A group of its own: processes that the tests have started, such as builds, end with them.
    process = subprocess.Popen([*PYTEST, *step.words, f"--junitxml={report}"], cwd=ROOT, start_new_session=True)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return Outcome(step, reason=OUT_OF_TIME, died=True)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if not report.is_file():
        how = signal.Signals(-code).name if code < 0 else f"status {code}"
        return Outcome(step, reason=f"by {how}, see above", died=True)
    return outcome(step, report, code)


def outcome(step: Step, report: Path, code: int) -> Outcome:
    """Read a JUnit report."""
    suites = list(ElementTree.parse(report).iter("testsuite"))
    total, failed, skipped = (
        sum(int(suite.get(what, 0)) for suite in suites for what in names)
        for names in (("tests",), ("failures", "errors"), ("skipped",))
    )
    said = dict.fromkeys(skip.get("message", "") for suite in suites for skip in suite.iter("skipped"))
    died = code not in (0, 1, 5)  # 5: no test was chosen
    reason = f"pytest's status was {code}" if died or not total else "; ".join(said)
    return Outcome(step, total - failed - skipped, failed, skipped, reason, died)


def main(words: Sequence[str] | None = None, all_steps: Sequence[Step] | None = None) -> int:
    """Run the steps that were named, or all, and print a line for each."""
    chosen = list(steps()) if all_steps is None else list(all_steps)
    names = [step.name for step in chosen]
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {'; '.join(names)} [all]")
    parser.add_argument("--minutes", type=float, help="for everything; tests left out then are reported")
    parser.add_argument("--results", type=Path, help="folder of the JUnit reports [none is kept]")
    arguments = parser.parse_args(words)
    unknown = sorted(set(arguments.steps) - set(names))
    if unknown:
        parser.error(f"no step {', '.join(unknown)}; there are {'; '.join(names)}")
    end = time.monotonic() + 60 * arguments.minutes if arguments.minutes is not None else None
    with tempfile.TemporaryDirectory() as scratch:
        folder = (arguments.results or Path(scratch)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        found = [
            run(step, folder, None if end is None else end - time.monotonic())
            for step in chosen
            if not arguments.steps or step.name in arguments.steps
        ]
    print("\n" + "\n".join(map(str, found)), flush=True)
    return status(found)


def status(found: Sequence[Outcome]) -> int:
    """Return 0, or 1 after printing the faults to standard error."""
    networks = [each for each in found if each.step.network]
    if networks and not any(each.passed for each in networks):
        print("error: no network ran; see above what is missing for one kind of backend at least", file=sys.stderr)
        return 1
    return int(any(not each.good for each in found if each.step.counts))


if __name__ == "__main__":
    sys.exit(main())
