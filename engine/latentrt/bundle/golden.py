"""Golden: a run whose latents are known."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Golden:
    """A run whose latents are known: the cheapest test that a bundle still gives the results it gave when exported."""

    prompt: str
    negative_prompt: str
    solver: str
    steps: int
    seed: int
    guidance: float
    mean: float
    std: float
    first: tuple[float, ...]
