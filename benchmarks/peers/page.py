"""From peers.json to PEERS.md and its plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.markdown import number, spread, table
from benchmarks.measures import OURS, Spread
from benchmarks.peers.config import GOAL
from benchmarks.peers.results import (
    BATCH,
    COLD,
    COLD_PEAK,
    FILE,
    ONE,
    READY,
    UNITS,
    WARM_PEAK,
    Record,
    Results,
    verdict,
)

PAGE = "PEERS.md"
HEAD = f"""# Beside other engines

latentrt and its peers on a CPU, with the same checkpoint, threads, steps, solver, guidance, size and seeds.
`python -m benchmarks peers` (or `make bench-peers`) makes an environment for each peer, measures, and writes this page.

Figures are medians, with the least and the greatest sample in brackets. In bold is how many times better latentrt is,
the median of ratios taken round by round; below 1 it is worse. The goal is to be first in every row, by {GOAL} at
least.
"""
NOT_YET = "Nothing is measured yet.\n"
HOW = f"""## How it was measured

- *{COLD}*: from the start of a process to its end, which leaves a picture as PNG on disk. Ours is `latentrt generate`,
  a peer's is a script of its few natural lines. A start before the first round fills the caches of those that have one.
- *{READY}*: from the start of a process until its model is loaded and may be asked for pictures. A peer's is the
  process of its cold start; ours is another one, since the command does not say when it has loaded.
- *{ONE}* and *{BATCH}*: from prompts to pictures in a process that is loaded, after a run of one step that is not
  counted. Every round has other prompts and seeds. All get a whole batch in one call.
- *{COLD_PEAK}*: the peak resident set of the process of the cold start, mapped files included, which the kernel
  can drop. *{WARM_PEAK}*: that of the process that drew single pictures and then batches.
- Sides take turns, in every round. As many as fit into memory are loaded at once, always beside ours: so ours has
  samples of its own for each group, and a ratio is taken within it. The column of ours shows all of its samples.
- *Same picture* is the PSNR to ours of the first picture, made from the same first latents. Random weights amplify
  rounding: there it is no measure of quality.
"""


def write(folder: Path) -> None:
    """Write PEERS.md, and a plot for each model; without peers.json, a page that says so."""
    from benchmarks.peers.plots import draw

    if not (folder / FILE).is_file():
        (folder / PAGE).write_text("\n".join([HEAD, NOT_YET, HOW]), encoding="utf-8")
        return
    results = Results.read(folder)
    for name in results.models:
        draw(results, name, folder / plot_of(name))
    (folder / PAGE).write_text(render(results), encoding="utf-8")


def plot_of(model: str) -> str:
    """Return the name of a model's plot."""
    return f"peers-{model}.png"


def render(results: Results) -> str:
    """Return the page as Markdown."""
    machine = results.about["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    measured = (
        f"Every sample is in [{FILE}]({FILE}). Measured {results.about['date']}: {machine['cpu']}, "
        f"{machine['cores']} cores, {machine['memory_gib']} GiB, {machine['system']}; {results.about['threads']} "
        f"threads each; ours has Python {machine['python']}, {versions}; load average before it "
        f"{machine['load_before']:.1f}.\n"
    )
    sections = [_section(results, name) for name in results.models]
    return "\n".join([HEAD, measured, *sections, HOW])


def _section(results: Results, name: str) -> str:
    model, records, titles = results.models[name], results.records[name], results.about["titles"]
    width, height = model["size"]
    how = (
        f"{width} × {height} pixels, {model['steps']} steps of {model['solver']}, guidance {model['guidance']:g}, "
        f"batches of {model['batch']}; {model['rounds']} rounds. {_reached(records)}\n"
    )
    shown = [peer for peer, record in records.items() if record.samples]
    head = ("", "unit", titles[OURS], *(titles[peer] for peer in shown), f"first by {GOAL}?")
    rows = [_row(row, records, shown, titles) for row in UNITS]
    plot = f"![{model['title']}: latentrt and its peers]({plot_of(name)})\n"
    peers = [_peer(peer, record, results.about) for peer, record in records.items()]
    blocks = [f"## {model['title']}\n", how, table(head, rows)]
    return "\n".join([*blocks, *([plot] if shown else []), table(("peer", "versions", "same picture", ""), peers)])


def _reached(records: Mapping[str, Record]) -> str:
    """Return in how many rows the goal is reached, in a sentence."""
    found = [verdict(records, row) for row in UNITS]
    return f"First by {GOAL} in {sum(bool(each and each.reached) for each in found)} of {len(found)} rows."


def _row(row: str, records: Mapping[str, Record], shown: Sequence[str], titles: Mapping[str, str]) -> list[str]:
    measures = {peer: records[peer].measure(row) for peer in shown}
    ours = [sample for measure in measures.values() if measure for sample in measure.samples[OURS]]
    cells = [
        f"{spread(measure.spread(peer))}, **{number(measure.ratio(peer).median)}×**" if measure else "–"
        for peer, measure in measures.items()
    ]
    found = verdict(records, row)
    said = "not measured"
    if found:
        least = f"{found.ratio.median:.2f} to {titles[found.peer]}"
        said = f"yes ({least})" if found.reached else f"**no** ({least})"
    return [row, UNITS[row], spread(Spread.of(ours)) if ours else "–", *cells, said]


def _peer(peer: str, record: Record, about: Mapping[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    same = "not comparable" if record.psnr_db is None else f"{record.psnr_db:.1f} dB"
    notes = [about["differs"][peer], f"Not measured: {record.missing}." if record.missing else ""]
    return [
        about["titles"][peer],
        versions or "–",
        same if record.samples else "–",
        " ".join(filter(None, notes)) or "–",
    ]
