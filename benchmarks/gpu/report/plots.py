"""The plots of GPU.md."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

from benchmarks.gpu.config import SIDES
from benchmarks.gpu.report.figures import batches_of, figures_of

mpl.use("Agg")
from matplotlib import pyplot as plt

COLOURS = {
    **{"diffusers": "#e8862e", "compile": "#b85c0d", "compile-regional": "#d97b3a"},
    **{"ort-ticks": "#a8d5a2", "ort-loop": "#6fb668", "ort": "#2f8a3a", "trt-loop": "#6fa8d6", "trt": "#1f6fb4"},
}


def draw(data: Mapping[str, Any], folder: Path) -> None:
    """Plot latency by batch, it/s by side, and drift by step; what was not measured is left out."""
    stem = folder / f"gpu-{data['preset']}"
    _latency(data, stem.with_name(f"{stem.name}-latency.png"))
    _rate(data, stem.with_name(f"{stem.name}-rate.png"))
    if data["drift"]:
        _drift(data, stem.with_name(f"{stem.name}-drift.png"))


def _latency(data: Mapping[str, Any], path: Path) -> None:
    figure, ax = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for side, about in SIDES.items():
        points = [(batch, f.image_ms) for batch in batches_of(data) if (f := figures_of(data, side, batch))]
        if points:
            batches, spreads = zip(*points, strict=True)
            medians = [each.median for each in spreads]
            whiskers = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
            ax.errorbar(batches, medians, whiskers, label=about.title, color=COLOURS[side], marker="o", capsize=2)
    ax.set(xscale="log", xlabel="pictures at once", ylabel="ms an image", xticks=batches_of(data))
    ax.set_xticks([], minor=True)
    ax.set_xticklabels(batches_of(data))
    ax.set_ylim(bottom=0)
    _save(figure, ax, path)


def _rate(data: Mapping[str, Any], path: Path) -> None:
    figure, ax = plt.subplots(figsize=(8, 3.6), layout="constrained")
    batches = batches_of(data)
    measured = [side for side in SIDES if any(figures_of(data, side, batch) for batch in batches)]
    width = 0.8 / max(1, len(measured))
    for index, side in enumerate(measured):
        found = [(place, f.iterations) for place, b in enumerate(batches) if (f := figures_of(data, side, b))]
        places, spreads = zip(*found, strict=True)
        shifted = [place + (index - (len(measured) - 1) / 2) * width for place in places]
        heights = [each.median for each in spreads]
        whiskers = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
        bars = ax.bar(shifted, heights, width, label=SIDES[side].title, color=COLOURS[side], yerr=whiskers, capsize=3)
        ax.bar_label(bars, fmt="%.3g", fontsize=7, padding=2)
    ax.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches])
    ax.set_ylabel("it/s (more is better)")
    _save(figure, ax, path)


def _drift(data: Mapping[str, Any], path: Path) -> None:
    parts = sorted(data["drift"].items(), key=lambda item: int(item[0]))
    figure, axes = plt.subplots(1, len(parts), figsize=(8, 3.2), squeeze=False, sharey=True, layout="constrained")
    for (steps, kinds), ax in zip(parts, axes[0], strict=True):
        for kind, part in kinds.items():
            if "relative" in part:
                ax.plot(range(1, len(part["relative"]) + 1), part["relative"], label=kind, marker=".")
        ax.set(title=f"{steps} steps", xlabel="step")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_ylim(bottom=0)
    axes[0][0].set_ylabel("relative difference to float32")
    _save(figure, axes[0][0], path)


def _save(figure: Any, ax: Any, path: Path) -> None:
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)
