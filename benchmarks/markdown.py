"""Tables and numbers in the reports' format."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.measures import Spread


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def spread(found: Spread) -> str:
    """Return the median, with the ends in brackets."""
    return f"{number(found.median)} ({number(found.low)} to {number(found.high)})"


def number(value: float) -> str:
    """Return three significant digits, never in powers of ten."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
