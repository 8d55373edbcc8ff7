"""From cpu.json to README.md and its plots: tables, goals reached or missed, and attempts at the missed ones.

GPU.md is made by `benchmarks.gpu.report.page`, PEERS.md by `benchmarks.peers.page`.
"""

from __future__ import annotations

import inspect
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.markdown import number, spread, table
from benchmarks.measures import Goal, Measure, Result

NOTES = Path(__file__).with_name("notes.toml")
HEAD = """# Benchmarks

latentrt beside diffusers: the same model (the embedded one), threads, steps, solver and seeds, in one run, in turn.
`python -m benchmarks all` (or `make bench`) wrote this page from [cpu.json](cpu.json), which keeps every sample.
Figures are medians, with the least and the greatest sample in brackets. How many times better
latentrt is stands in bold, the median of ratios taken round by round. [PEERS.md](PEERS.md) is beside other engines,
[SERVING.md](SERVING.md) compares ways of batching, [GPU.md](GPU.md) is for full-size models on a GPU.
"""
NOT_MEASURED = """## Not measured

- GPU: no figure here was taken on one; [GPU.md](GPU.md) is that page.
- Full-size models: the embedded model draws 128 x 128 pixels. Where a call of its UNet takes milliseconds, one of
  Stable Diffusion 1.5 takes seconds, and whatever surrounds the call counts for less; [PEERS.md](PEERS.md) has both.
"""


@dataclass(frozen=True)
class Answer:
    """One question with its measurements, and the note on attempts, if there is one."""

    name: str
    part: Mapping[str, Any]
    note: str | None

    @cached_property
    def question(self) -> ModuleType:
        """The module of the question."""
        return import_module(f"benchmarks.cpu.{self.name}")

    @cached_property
    def result(self) -> Result:
        """The samples."""
        return Result.from_dict(self.part)

    @cached_property
    def goals(self) -> Sequence[Goal]:
        """The goals."""
        goals: Sequence[Goal] = self.question.goals(self.result)
        return goals

    @property
    def plot(self) -> str:
        """Name of the plot's file."""
        return f"{self.name.replace('_', '-')}.png"


def write(folder: Path) -> None:
    """Write README.md and a plot for each question from `folder`/cpu.json; GPU.md, PEERS.md and plots from theirs."""
    from benchmarks.gpu.report import page as gpu_page
    from benchmarks.peers import page as peers_page
    from benchmarks.plots import draw

    gpu_page.write(folder)
    peers_page.write(folder)
    if not (folder / "cpu.json").is_file():
        return
    notes = tomllib.loads(NOTES.read_text())
    parts = json.loads((folder / "cpu.json").read_text())
    answers = [Answer(name, part, notes.get(name)) for name, part in parts.items()]
    for answer in answers:
        draw(answer.result, folder / answer.plot)
    (folder / "README.md").write_text(render(answers))


def render(answers: Sequence[Answer]) -> str:
    """Return the page as Markdown."""
    sections = [_section(answer) for answer in answers]
    return "\n".join([HEAD, _machine(answers[0].part["machine"]), _goals(answers), *sections, NOT_MEASURED])


def _machine(machine: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"Machine: {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['system']}; "
        f"Python {machine['python']}, {versions}.\n"
    )


def _goals(answers: Sequence[Answer]) -> str:
    rows = [
        (answer.question.TITLE, goal.text, goal.measured, "yes" if goal.reached else "**no**")
        for answer in answers
        for goal in answer.goals
    ]
    return table(("question", "to reach", "measured", "reached?"), rows)


def _section(answer: Answer) -> str:
    title, config, machine = answer.question.TITLE, answer.part["config"], answer.part["machine"]
    how = (
        f"{answer.part['date']}: {config['repeats']} rounds, {config['threads']} threads, {config['steps']} steps of "
        f"{config['solver']}, guidance {config['guidance']:g}; load average before it {machine['load_before']:.1f}."
    )
    facts = [f"- {key.replace('_', ' ')}: {_fact(value)}" for key, value in answer.result.facts.items()]
    blocks = [
        f"## {title}",
        inspect.getdoc(answer.question),
        how,
        _measures(answer.result.measures),
        f"![{title}: latentrt and diffusers]({answer.plot})",
        "\n".join(facts),
        _tried(answer),
    ]
    return "\n\n".join(block.strip() for block in blocks if block) + "\n"


def _tried(answer: Answer) -> str:
    missed = "; ".join(goal.text for goal in answer.goals if not goal.reached)
    if missed:
        return f"Not reached: {missed}.\n\n{answer.note or 'What was tried is not written down yet.'}"
    return answer.note or ""


def _measures(measures: Sequence[Measure]) -> str:
    """Return the table; in bold after another side's figures how many times better the first side is."""
    first, *others = measures[0].samples
    rows = []
    for measure in measures:
        cells = [f"{spread(measure.spread(o))}, **{number(measure.ratio(o).median)}×**" for o in others]
        rows.append([measure.name, measure.unit, spread(measure.spread(first)), *cells])
    return table(("", "unit", first, *others), rows)


def _fact(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
