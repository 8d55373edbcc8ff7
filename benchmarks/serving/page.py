"""From serving.json to SERVING.md and its plots."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.markdown import number, table
from benchmarks.serving import measure, policies
from benchmarks.serving.policies import ALONE, BY_REQUEST, BY_STEP, HTTP
from benchmarks.serving.traffic import Outcome

COLOURS = {BY_STEP: "#1f6fb4", BY_REQUEST: "#e8862e", ALONE: "#8a8a8a"}
HEAD = """# Serving

Who batches by step lets a picture join the running batch between any two network calls. What does that give to those
who wait? `python -m benchmarks.serving` (or `make bench-serving`) wrote this page from [serving.json](serving.json).

Measured: the embedded model in one `Service` in one process, real networks, and the same Poisson arrivals of one
picture each for all: 10 to 30 steps, four solvers, a third without guidance. Load is what is offered over what the
engine can draw, batched by step. Latency runs from a picture's arrival to its pixels; what is refused, because {queue}
wait already, has none and is counted apart. p99 of some hundred pictures is one of the worst two: see where it
differs much, not where it differs little.
"""


def write(folder: Path) -> None:
    """From `folder`/serving.json the page and its plots."""
    found = json.loads((folder / "serving.json").read_text())
    outcomes = [Outcome(**outcome) for outcome in found["outcomes"]]
    _draw(outcomes, folder)
    (folder / "SERVING.md").write_text(render(found, outcomes))


def render(found: Mapping[str, Any], outcomes: Sequence[Outcome]) -> str:
    """The page as Markdown."""
    machine = found["machine"]
    about = (
        f"Machine: {machine['cpu']}, {machine['cores']} cores, Python {machine['python']}; {found['date']}, load "
        f"average before it {machine['load_before']:.1f}; {found['config']['seconds']:g} s of arrivals. The engine "
        f"draws {number(found['capacity'])} pictures a second; its measured curve allows {found['batch_cap_lanes']} of "
        f"{2 * found['config']['pictures']} lanes a call."
    )
    how = inspect.getdoc(policies) or ""
    blocks = [
        HEAD.format(queue=policies.QUEUE),
        how.partition("\n\n")[2],
        about,
        "![Latency by load](serving-latency.png)",
        "![Throughput by load](serving-throughput.png)",
        _table(outcomes),
        "## Where it wins, and where it does not",
        "\n".join(f"- {line}" for line in _verdicts(outcomes)),
        "## HTTP",
        _http(found, outcomes),
        "## Refusals",
        _refusals(found["refusals"]),
    ]
    return "\n\n".join(block.strip() for block in blocks) + "\n"


def _table(outcomes: Sequence[Outcome]) -> str:
    rows = [
        [
            f"{one.load:g}",
            one.policy,
            number(one.rate),
            *map(number, one.quantiles),
            f"{one.refused} of {one.arrived}",
        ]
        for one in outcomes
        if one.policy != HTTP
    ]
    return table(("load", "batched", "pictures/s", "p50 s", "p95 s", "p99 s", "refused"), rows)


def _verdicts(outcomes: Sequence[Outcome]) -> list[str]:
    """By step beside each of the others at every load, in words that hold whatever came out."""
    by_load: dict[float, dict[str, Outcome]] = {}
    for outcome in outcomes:
        by_load.setdefault(outcome.load, {})[outcome.policy] = outcome
    return [
        f"load {load:g}, beside {other}: " + "; ".join(_ratios(some[BY_STEP], some[other]))
        for load, some in by_load.items()
        for other in (BY_REQUEST, ALONE)
    ]


def _ratios(ours: Outcome, other: Outcome) -> list[str]:
    pairs = zip(("p50", "p95", "p99"), other.quantiles, ours.quantiles, strict=True)
    words = [f"{name} {_times(theirs / own, 'shorter', 'longer')}" for name, theirs, own in pairs]
    words.append(f"throughput {_times(ours.rate / other.rate, 'higher', 'lower')}")
    if ours.refused or other.refused:
        words.append(f"{ours.refused} refused instead of {other.refused}")
    return words


def _times(ratio: float, good: str, bad: str) -> str:
    """Nothing below a tenth is said to be a difference."""
    if max(ratio, 1 / ratio) < 1.1:
        return "the same"
    return f"**{ratio:.2g}× {good}**" if ratio > 1 else f"{1 / ratio:.2g}× {bad}"


def _http(found: Mapping[str, Any], outcomes: Sequence[Outcome]) -> str:
    over = next(one for one in outcomes if one.policy == HTTP)
    within = next(one for one in outcomes if (one.policy, one.load) == (BY_STEP, over.load))
    rows = [
        [name, number(one.rate), *map(number, one.quantiles)]
        for name, one in (("in one process", within), ("over HTTP", over))
    ]
    return (
        f"The same arrivals at load {over.load:g} in a server of its own, over kept connections (clients take their "
        "part of the same cores). Alone, a picture of ten steps takes "
        f"{number(measure.overhead(dict(found)))} ms longer over HTTP: parsing, PNG, base64, JSON.\n\n"
        + table(("", "pictures/s", "p50 s", "p95 s", "p99 s"), rows)
    )


def _refusals(refusals: Sequence[dict[str, Any]]) -> str:
    rows = [[str(one["clients"]), str(one["requests"]), *map(number, measure.summary(one))] for one in refusals]
    text = (
        "All lanes and the queue are full, and more come: how long a 429 takes, within the server (its log's "
        "`seconds`, from the first look at a request to its last byte) and for clients in a process of their own. One "
        "core answers one after the other, so of those who come in the same instant the last one waits for all others."
    )
    head = ("clients at once", "refused", "server p50 ms", "server p99 ms", "client p50 ms", "client p99 ms")
    return f"{text}\n\n{table(head, rows)}"


# ---- Plots


def _draw(outcomes: Sequence[Outcome], folder: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(9, 3.2), sharey=True, layout="constrained")
    for place, (ax, name) in enumerate(zip(axes, ("p50", "p95", "p99"), strict=True)):
        _lines(ax, outcomes, lambda one, place=place: one.quantiles[place])
        ax.set_title(f"{name} latency, s", fontsize=9)
        ax.set_yscale("log")
    _finish(figure, axes[0], folder / "serving-latency.png")
    figure, axes = plt.subplots(1, 2, figsize=(7, 3.2), layout="constrained")
    _lines(axes[0], outcomes, lambda one: one.rate)
    axes[0].set_title("pictures a second", fontsize=9)
    _lines(axes[1], outcomes, lambda one: 100 * one.refused / max(1, one.arrived))
    axes[1].set_title("refused, % of pictures", fontsize=9)
    _finish(figure, axes[0], folder / "serving-throughput.png")
    plt.close("all")


def _lines(ax: Any, outcomes: Sequence[Outcome], value: Callable[[Outcome], float]) -> None:
    for policy, colour in COLOURS.items():
        points = [(one.load, value(one)) for one in outcomes if one.policy == policy]
        ax.plot(*zip(*points, strict=True), "o-", label=policy, color=colour, markersize=4)
    ax.set_xlabel("load", fontsize=8)
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)


def _finish(figure: Any, first: Any, path: Path) -> None:
    handles, labels = first.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=8)
    figure.savefig(path, dpi=100, metadata={"Software": None})
