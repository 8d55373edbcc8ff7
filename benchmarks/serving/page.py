"""From serving.json and serving-soak.json to SERVING.md and its plots."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.markdown import number, spread, table
from benchmarks.measures import Spread
from benchmarks.serving import policies, refusals, soak
from benchmarks.serving.beside import page as beside
from benchmarks.serving.policies import ALONE, BY_REQUEST, BY_STEP, HTTP
from benchmarks.serving.traffic import QUANTILES, Outcome, in_common, loads_of, select

SAMPLES, SOAK = "serving.json", "serving-soak.json"
NOT_MEASURED = "not measured"
PARTS = {"emoji": "The embedded model", "fake": "A network whose call costs the same for one lane and for all"}
HEAD = f"""# Serving

Who batches by step lets a picture join the running batch between any two network calls. What does that give to those
who wait? `make bench-serving` wrote this page from [{SAMPLES}]({SAMPLES}).

Measured: one `Service` in one process, and the same Poisson arrivals for all. A request wants one picture (two thirds
of them), two or four, of 10 to 30 steps, by one of four solvers; a third are without guidance. Load is the pictures
offered over what the engine can draw batched by step, both a second. Latency runs from a request's arrival to its
last picture; what is refused, because {policies.QUEUE} pictures wait already, has none and is counted apart. Figures
are medians over rounds, with the least and the greatest round in brackets; a round is one seed of arrivals, and within
it the ways to serve take turns. A round has ten to forty requests: its p99 is its slowest one.
"""
RATIOS = """How many times better by step is than the others, round by round: above 1 its latency is shorter, its
throughput higher. Bold where every round says so; what is not bold is no difference."""


@dataclass(frozen=True)
class Part:
    """The measurements with one engine."""

    name: str
    data: Mapping[str, Any]

    @cached_property
    def outcomes(self) -> list[Outcome]:
        """Of all ways, loads and rounds."""
        return [Outcome(**outcome) for outcome in self.data["outcomes"]]

    @property
    def curve(self) -> dict[int, float]:
        """Seconds of a call by its lanes."""
        return {int(lanes): seconds for lanes, seconds in self.data["curve"].items()}

    @property
    def plot(self) -> str:
        """Name of the plot's file."""
        return f"serving-{self.name}.png"


def write(folder: Path) -> None:
    """Write the page and its plots from the samples in a folder; no page where there is a soak only."""
    from benchmarks.serving import plots

    found, soaked = _read(folder / SAMPLES), _read(folder / SOAK)
    if soaked is not None:
        plots.soak(soaked["samples"], soak.TITLES, folder / "serving-soak.png")
    if found is not None:
        for part in _parts(found):
            plots.traffic(part.outcomes, folder / part.plot)
        (folder / "SERVING.md").write_text(render(found, soaked))


def _read(path: Path) -> Any:
    """Read a JSON file; return None where it was not measured."""
    return json.loads(path.read_text()) if path.is_file() else None


def render(found: Mapping[str, Any], soaked: Mapping[str, Any] | None) -> str:
    """Return the page as Markdown."""
    parts = _parts(found)
    how = inspect.getdoc(policies) or ""
    blocks = [
        HEAD,
        how.partition("\n\n")[2],
        _machine(found, parts),
        *(block for part in parts for block in _section(part)),
        "## What sharing a call gives",
        _sharing(parts),
        "## HTTP",
        _http(parts[0], found["config"]["emoji"]["http_load"]),
        "## Refusals",
        _refusals(found["refusals"]),
        "## A modest client",
        beside.section(found["beside"]) if "beside" in found else f"{NOT_MEASURED.capitalize()}.",
        "## Soak",
        _soak(soaked),
    ]
    return "\n\n".join(block.strip() for block in blocks) + "\n"


def _parts(found: Mapping[str, Any]) -> list[Part]:
    return [Part(name, found[name]) for name in PARTS]


def _machine(found: Mapping[str, Any], parts: Sequence[Part]) -> str:
    machine, config = found["machine"], found["config"]
    others = Spread.of([one.others for part in parts for one in part.outcomes if one.others is not None])
    return (
        f"Machine: {machine['cpu']}, {machine['cores']} cores, Python {machine['python']}; {found['date']}; "
        f"{len(config['seeds'])} rounds. Other processes used {number(others.median)} cores in the median run, "
        f"{number(others.high)} in the worst."
    )


# ---- Traffic


def _section(part: Part) -> list[str]:
    data, top = part.data, max(part.curve)
    about = (
        f"The engine draws {number(data['capacity'])} pictures a second in a crowd; its measured curve allows "
        f"{data['cap']} of {top} lanes a call, so batches by request have {data['cap'] // 2} pictures. A picture with "
        "guidance takes two lanes."
    )
    plot = f"![p95 latency and throughput by load]({part.plot})"
    return [f"## {PARTS[part.name]}", about, plot, _table(part), RATIOS, _ratios(part)]


def _table(part: Part) -> str:
    rows = []
    for load in loads_of(part.outcomes):
        for side in (BY_STEP, BY_REQUEST, ALONE):
            found = list(select(part.outcomes, side, load).values())
            rows.append([f"{load:g}", side, *(_over(found, value) for value in _columns().values())])
    return table(("load", "batched", *_columns()), rows)


def _columns() -> dict[str, Callable[[Outcome], float]]:
    latencies = {f"{name} s": lambda one, name=name: one.latency(name) for name in QUANTILES}
    return {"pictures/s": lambda one: one.rate, **latencies, "refused %": lambda one: one.refusals}


def _over(found: Sequence[Outcome], value: Callable[[Outcome], float]) -> str:
    return spread(Spread.of([value(one) for one in found])) if found else NOT_MEASURED


def _ratios(part: Part) -> str:
    rows = []
    for load in loads_of(part.outcomes):
        ours = select(part.outcomes, BY_STEP, load)
        for other in (BY_REQUEST, ALONE):
            rows.append([f"{load:g}", other, *ratios(ours, select(part.outcomes, other, load))])
    return table(("load", "beside", *QUANTILES, "throughput"), rows)


def ratios(ours: Mapping[int, Outcome], theirs: Mapping[int, Outcome]) -> list[str]:
    """Return how many times better ours is at each percentile of latency and in throughput, over common seeds."""
    pairs = [(ours[seed], theirs[seed]) for seed in in_common(ours, theirs)]
    if not pairs:
        return [NOT_MEASURED] * (len(QUANTILES) + 1)
    better = [[b.latency(name) / a.latency(name) for a, b in pairs] for name in QUANTILES]
    return [_times(Spread.of(some)) for some in (*better, [a.rate / b.rate for a, b in pairs])]


def _times(found: Spread) -> str:
    middle = f"{found.median:.2f}×"
    if not found.low <= 1 <= found.high:
        middle = f"**{middle}**"
    return f"{middle} ({found.low:.2f} to {found.high:.2f})"


def _sharing(parts: Sequence[Part]) -> str:
    """Return the curves, and what follows from each."""
    rows = []
    for part in parts:
        alone = part.curve[min(part.curve)] / min(part.curve)
        for lanes, seconds in part.curve.items():
            each = seconds / lanes
            cells = (number(1000 * seconds), number(1000 * each), f"{alone / each:.2f}×")
            rows.append([PARTS[part.name].lower(), str(lanes), *cells])
    return (
        "Every job that joins a call prolongs it by what its lanes cost. Where a lane costs nearly the same in any "
        "company, all that sharing gives is that nobody waits for a whole batch to end; where company is free, as it "
        "nearly is on a GPU with lanes to spare, it multiplies what the engine draws.\n\n"
        + table(("network", "lanes", "ms a call", "ms a lane", "lanes a second, beside one guided picture"), rows)
        + "\nHow full calls were, and what a lane cost, while traffic ran at the highest load. A lane costs more than "
        "above where other threads of the process encode, decode and answer meanwhile, on the same cores:\n\n"
        + table(("network", "batched", "lanes a call", "ms a lane", "engine busy %"), _calls(parts))
    )


def _calls(parts: Sequence[Part]) -> list[list[str]]:
    rows = []
    for part in parts:
        for side in (BY_STEP, BY_REQUEST, ALONE):
            found = list(select(part.outcomes, side, max(loads_of(part.outcomes))).values())
            cells = [
                _over(found, lambda one: one.lanes / one.ticks),
                _over(found, lambda one: 1000 * one.busy / one.lanes),
                _over(found, lambda one: 100 * one.busy / one.seconds),
            ]
            rows.append([PARTS[part.name].lower(), side, *cells])
    return rows


# ---- The rest


def _http(part: Part, load: float) -> str:
    sides = {name: select(part.outcomes, side, load) for name, side in {"in one process": BY_STEP, HTTP: HTTP}.items()}
    rows = [
        [name, *(_over(list(some.values()), value) for value in _columns().values())] for name, some in sides.items()
    ]
    singles = part.data["singles"]
    added = Spread.of([1000 * (b - a) for a, b in zip(singles[BY_STEP], singles[HTTP], strict=True)])
    return (
        f"The same arrivals at load {load:g} in a server of its own, over kept connections (clients take their part of "
        "the same cores). What HTTP adds to a picture of ten steps that is drawn alone (parsing, PNG, base64, JSON), "
        f"from pairs of one each: {spread(added)} ms.\n\n" + table(("", *_columns()), rows)
    )


def _refusals(found: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for part in found:
        sides = [refusals.percentiles(part, side) for side in ("server", "client")]
        cells = [spread(Spread.of(values)) for side in sides for values in side.values()]
        rows.append([str(part["clients"]), str(part["requests"]), *cells])
    head = ("clients", "requests", "server p50 ms", "server p99 ms", "client p50 ms", "client p99 ms")
    return (
        f"Requests into a queue of {refusals.PLACES} that does not move: how long a 429 takes in the server (its log's "
        "`seconds`, from the head of a request to the answer) and for clients in a process of their own; the "
        "same refusals, of a network of 10 ms a call. One core answers one after the other, so of those who come in "
        "the same instant the last one waits for all others.\n\n" + table(head, rows)
    )


def _soak(found: Mapping[str, Any] | None) -> str:
    if not found:
        return f"{NOT_MEASURED.capitalize()}. `python -m benchmarks.serving soak --minutes 5` measures it."
    answers = ", ".join(f"{count} of {status}" for status, count in found["answers"].items())
    about = (
        f"{found['date']}: `latentrt serve` with the embedded model for {found['minutes']:g} minutes, "
        f"{found['clients']} clients who draw, edit, stream, are refused and leave; answers by status: {answers}. "
        "Growth is a line fitted to the means of half a minute each, after the first fifth of the time. Allocated is "
        "what malloc has given out, networks included; Python's blocks are what its own allocator has; resident is "
        "that and what both keep for later, in pages that were touched once."
    )
    rows = []
    for name, growth in soak.growths(found).items():
        last = found["samples"][name][-1]
        words = ("", NOT_MEASURED) if growth is None else (f"{growth.slope:+.2g} ± {growth.error:.2g}", growth.verdict)
        rows.append([soak.TITLES[name], number(last), number(found["idle"][name]), *words])
    head = ("", "at the end", "two seconds after it", "growth a minute", "verdict")
    return f"{about}\n\n![Soak](serving-soak.png)\n\n{table(head, rows)}"
