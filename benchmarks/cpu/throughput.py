"""How many images a second, by how many are made at once?

Measured: both in one warm process, in turn: a list of prompts with a seed each, guidance on, prompts to pictures. Both
get the whole list in one call. The pictures are compared.
"""

from __future__ import annotations

from benchmarks.cases import Config, Ours, Theirs, agreement, race
from benchmarks.measures import Goal, Measure, Result

TITLE = "Throughput"


def measure(config: Config) -> Result:
    """Measure images a second for every batch size, by both."""
    ours, theirs = Ours(config, pictures=max(config.batches)), Theirs(config)
    measures, decibels = [], []
    for size in config.batches:
        runs = race(ours.draw, theirs.draw, config, size)
        rates = {side: [size / sample.seconds for sample in runs[side]] for side in runs}
        measures.append(Measure(f"batch {size}", "images/s", rates, better="more"))
        decibels.append(agreement(runs))
    return Result(measures, {"psnr_db": min(decibels)})


def goals(result: Result) -> list[Goal]:
    """Return the one goal: the pictures must be the same. No bound was set."""
    return [
        Goal("the same pictures (at least 40 dB)", f"{result.facts['psnr_db']:.1f} dB", result.facts["psnr_db"] >= 40)
    ]
