"""One picture for each question: bars of medians with whiskers to the least and the greatest sample."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

from benchmarks.measures import OURS, Measure, Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUES, ORANGES = ("#1f6fb4", "#6fa8d6", "#b5d1e8"), ("#e8862e", "#f3bd8a")


def draw(result: Result, path: Path) -> None:
    """Write the plot of a question's measures as PNG: a panel for each unit, a group of bars for each measure."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    panels = [list(group) for _, group in groupby(result.measures, key=lambda measure: measure.unit)]
    colours = colours_of(list(result.measures[0].samples))
    widths = [1 + len(panel) for panel in panels]
    size = (max(8.0, 0.3 * len(colours) * sum(map(len, panels))), 3.4)
    figure, axes = plt.subplots(1, len(panels), figsize=size, width_ratios=widths, squeeze=False, layout="constrained")
    for panel, ax in zip(panels, axes[0], strict=True):
        _bars(ax, panel, colours)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=8)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


def colours_of(sides: Sequence[str]) -> dict[str, str]:
    """Return the same colours everywhere: ours blue, diffusers orange."""
    blues, oranges = iter(BLUES), iter(ORANGES)
    return {side: next(blues if side.startswith(OURS) else oranges) for side in sides}


def _bars(ax: Axes, panel: Sequence[Measure], colours: dict[str, str]) -> None:
    width = 0.8 / len(colours)
    for number, (side, colour) in enumerate(colours.items()):
        spreads = [measure.spread(side) for measure in panel]
        medians = [spread.median for spread in spreads]
        whiskers = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
        places = [group + (number - (len(colours) - 1) / 2) * width for group in range(len(panel))]
        bars = ax.bar(places, medians, width, yerr=whiskers, label=side, color=colour, ecolor="#444444", capsize=2)
        ax.bar_label(bars, fmt=lambda value: f"{value:.3g}" if value < 100 else f"{value:.0f}", fontsize=7, padding=2)
    names = [fill(measure.name, max(8, 60 // len(panel)), break_long_words=False) for measure in panel]
    ax.set_xticks(range(len(panel)), names, fontsize=8)
    ax.set_title(f"{panel[0].unit} ({panel[0].better} is better)", fontsize=9)
    ax.tick_params(axis="y", labelsize=8)
    ax.margins(y=0.15)
    tallest = max(measure.spread(side).median for side in colours for measure in panel)
    ax.set_ylim(top=min(ax.get_ylim()[1], 2 * tallest))  # a whisker may leave the picture: the table has its end
    ax.spines[["top", "right"]].set_visible(False)
