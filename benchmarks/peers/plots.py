"""A model's plot: by row, how many times better we are than each peer."""

from __future__ import annotations

from pathlib import Path

from benchmarks.measures import OURS
from benchmarks.peers.config import GOAL
from benchmarks.peers.results import UNITS, Results

COLOURS = ("#e8862e", "#c0504d", "#4f9d69", "#6fa8d6", "#8064a2")


def draw(results: Results, model: str, path: Path) -> None:
    """Write the plot as PNG; ratios are on a logarithmic scale, with a line where the goal is."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    records, titles = results.records[model], results.about["titles"]
    shown = [peer for peer, record in records.items() if record.samples]
    if not shown:
        return
    figure, ax = plt.subplots(figsize=(8, 3.4), layout="constrained")
    width = 0.8 / len(shown)
    for index, (peer, colour) in enumerate(zip(shown, COLOURS, strict=False)):
        ratios = {place: ratio for place, row in enumerate(UNITS) if (ratio := records[peer].ratio(row))}
        places = [place + (index - (len(shown) - 1) / 2) * width for place in ratios]
        medians = [ratio.median for ratio in ratios.values()]
        whiskers = [[r.median - r.low for r in ratios.values()], [r.high - r.median for r in ratios.values()]]
        bars = ax.bar(
            places, medians, width, yerr=whiskers, label=titles[peer], color=colour, ecolor="#444444", capsize=2
        )
        ax.bar_label(bars, fmt="{:.2g}", fontsize=6, padding=2)
    ax.axhline(1, color="#444444", linewidth=0.8)
    ax.axhline(GOAL, color="#444444", linewidth=0.8, linestyle="dotted")
    ax.set_yscale("log")
    ax.set_xticks(range(len(UNITS)), [row.replace(", ", ",\n") for row in UNITS], fontsize=8)
    ax.set_title(f"a peer's figure over that of {OURS} (dotted: the goal, {GOAL})", fontsize=9)
    ax.tick_params(axis="y", labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(shown), frameon=False, fontsize=8)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)
