"""What the terminal shows while work goes on: bars, previews, tables."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from engine.denoiser import Job
    from engine.pipeline import Engine


@contextmanager
def progress(jobs: list[Job], *, quiet: bool) -> Iterator[Callable[[Job], None]]:
    """A bar over all rows of all jobs, on standard error."""
    if quiet:
        yield lambda job: None
        return
    import click

    with click.progressbar(length=sum(len(job.table) for job in jobs), label="drawing", file=sys.stderr) as bar:
        yield lambda job: bar.update(1)


def with_previews(
    engine: Engine, jobs: list[Job], paths: list[Path], every: int, on_tick: Callable[[Job], None]
) -> Callable[[Job], None]:
    """Write the current latents and the predicted picture beside the final one, every so many rows."""
    if every < 1:
        return on_tick
    for job in jobs:
        job.wants_preview = True
    where = {id(job): path for job, path in zip(jobs, paths, strict=True)}

    def tick(job: Job) -> None:
        from engine.image import save

        on_tick(job)
        if job.row % every == 0 and job.preview is not None:
            path = where[id(job)]
            for kind, latents in (("current", job.view), ("predicted", job.preview)):
                save(
                    engine.decode(latents),
                    path.with_stem(f"{path.stem}-{job.row:03d}-{kind}"),
                    settings=job.tag,
                )

    return tick


def table_of(*columns: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column)
    return table


def show(table: Table) -> None:
    from rich.console import Console

    Console().print(table)
