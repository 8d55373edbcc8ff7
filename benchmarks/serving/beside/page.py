"""The section of SERVING.md on a modest client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.markdown import spread, table
from benchmarks.measures import Spread
from benchmarks.serving.beside.measure import COMPANIES, FLAGS, STEPS
from benchmarks.serving.traffic import quantile

HEAD = (
    f"A client draws pictures of 128x128 and {STEPS} steps, one after the other, at `latentrt serve` with the embedded "
    f"model (`{' '.join(FLAGS[:2])}`): alone, then beside others, in turn. Figures are seconds, and how many times as "
    "long it takes beside them, each round by itself: the median round, the least and the greatest. "
)


def section(found: Mapping[str, Any]) -> str:
    """Return what was measured as Markdown."""
    loads = "; ".join(
        f"{COMPANIES[name].words}: {part['date']}, load average before it {part['load']:g}"
        for name, part in found.items()
    )
    rows = [
        [COMPANIES[name].words, f"{len(part['alone'])} × {len(part['alone'][0])}", label, *_cells(part, at)]
        for name, part in found.items()
        for label, at in (("p50", 0.5), ("p95", 0.95))
    ]
    head = ("beside", "rounds × pictures", "", "alone, s", "beside, s", "times as long")
    return f"{HEAD}More load than cores is other processes' work. {loads[0].upper()}{loads[1:]}.\n\n{table(head, rows)}"


def _cells(part: Mapping[str, Any], at: float) -> list[str]:
    alone, beside = ([quantile(seconds, at) for seconds in part[side]] for side in ("alone", "beside"))
    return [spread(Spread.of(alone)), spread(Spread.of(beside)), spread(Spread.of(ratios(alone, beside)))]


def ratios(alone: Sequence[float], beside: Sequence[float]) -> list[float]:
    """Return how many times as long each round took."""
    return [theirs / own for own, theirs in zip(alone, beside, strict=True)]
