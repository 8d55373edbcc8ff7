"""The plots of SERVING.md: medians over the rounds, in bands from the least to the greatest."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

from benchmarks.measures import Spread
from benchmarks.serving.policies import ALONE, BY_REQUEST, BY_STEP
from benchmarks.serving.traffic import Outcome, loads_of, select

mpl.use("Agg")
from matplotlib import pyplot as plt

COLOURS = {BY_STEP: "#1f6fb4", BY_REQUEST: "#d9771f", ALONE: "#6b6b6b"}
TICKS = [digit * 10.0**power for power in range(-3, 3) for digit in (1, 2, 5)]
GAP = 0.07  # between two labels, of the panel's height


def traffic(outcomes: Sequence[Outcome], path: Path) -> None:
    """Plot p95 latency and throughput by load, a line for each way to serve."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    _panel(left, outcomes, lambda one: one.latency("p95"))
    left.set_yscale("log")
    _plain_seconds(left)
    left.set_title("p95 latency (less is better)", fontsize=9)
    _panel(right, outcomes, lambda one: one.rate)
    right.set_ylim(bottom=0)
    right.set_title("pictures a second (more is better)", fontsize=9)
    for ax in (left, right):
        _labels(ax)
        _plain(ax)
        ax.set_xticks(loads_of(outcomes), [f"{load:g}" for load in loads_of(outcomes)])
        ax.set_xlabel("load: offered / what the engine can draw", fontsize=8)
    _save(figure, path)


def soak(samples: Mapping[str, Sequence[float]], titles: Mapping[str, str], path: Path) -> None:
    """Plot what a process held, by minutes; a panel for each quantity."""
    figure, axes = plt.subplots(1, len(titles), figsize=(9, 2.6), layout="constrained")
    minutes = [second / 60 for second in samples["seconds"]]
    for ax, (name, title) in zip(axes, titles.items(), strict=True):
        ax.plot(minutes, samples[name], color=COLOURS[BY_STEP], linewidth=0.8)
        ax.set_ylim(0, 1.15 * max(samples[name]))
        ax.set_title(title, fontsize=9)
        ax.set_xlabel("minutes", fontsize=8)
        _plain(ax)
    _save(figure, path)


def _panel(ax: Any, outcomes: Sequence[Outcome], value: Callable[[Outcome], float]) -> None:
    for side, colour in COLOURS.items():
        found = {load: select(outcomes, side, load).values() for load in loads_of(outcomes)}
        spreads = {load: Spread.of([value(one) for one in some]) for load, some in found.items() if some}
        if spreads:
            medians, lows, highs = zip(*spreads.values(), strict=True)
            ax.plot(list(spreads), medians, "o-", label=side, color=colour, markersize=4)
            ax.fill_between(list(spreads), lows, highs, color=colour, alpha=0.18, linewidth=0)
            if len(spreads) == 1:
                ax.vlines(list(spreads), lows, highs, color=colour, alpha=0.4, linewidth=4)


def _plain_seconds(ax: Any) -> None:
    """Label ticks in plain seconds: 0.5 s, 1 s, 2 s."""
    low, high = ax.get_ylim()
    ticks = [tick for tick in TICKS if low <= tick <= high]
    ax.set_yticks(ticks, [f"{tick:g} s" for tick in ticks])
    ax.set_yticks([], minor=True)


def _labels(ax: Any) -> None:
    """Write each line's name at its end; where it ends before the others, beside its last point."""
    lines = [(line, *(values[-1] for values in line.get_data())) for line in ax.get_lines()]
    last = max((x for _, x, _ in lines), default=0.0)
    ends = {line: _height(ax, y) for line, x, y in lines if x == last}
    for line, height in apart(ends).items():
        about = {"fontsize": 8, "color": line.get_color(), "va": "center"}
        ax.text(1.02, height, line.get_label(), transform=ax.transAxes, **about)
    for line, x, y in lines:
        if x != last:
            words = f"{line.get_label()}\n(not measured beyond)"
            ax.annotate(words, (x, y), (6, 0), textcoords="offset points", fontsize=8, color=line.get_color())


def _height(ax: Any, value: float) -> float:
    """Return the height of a value, as a part of the panel's height."""
    low, high = ax.get_ylim()
    if ax.get_yscale() == "log":
        low, high, value = math.log(low), math.log(high), math.log(value)
    return float((value - low) / (high - low))


def apart(heights: Mapping[Any, float]) -> dict[Any, float]:
    """Return the same heights, each moved up, from the lowest on, until it is a gap above the one below it."""
    placed: dict[Any, float] = {}
    floor = -math.inf
    for key, height in sorted(heights.items(), key=lambda item: item[1]):
        placed[key] = max(height, floor)
        floor = placed[key] + GAP
    return placed


def _plain(ax: Any) -> None:
    ax.tick_params(labelsize=8)
    ax.grid(axis="y", color="#e6e6e6", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110, facecolor="white", metadata={"Software": None})
    plt.close(figure)
