"""What the terminal shows while work goes on: bars, previews, tables."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from latentrt.command.output import Previews
    from latentrt.engine import Engine
    from latentrt.run.job import Job


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
    engine: Engine, jobs: list[Job], previews: list[Previews], on_tick: Callable[[Job], None]
) -> Callable[[Job], None]:
    """Write the current latents and the predicted picture of the rows that `previews` names for each job."""
    where = {id(job): paths for job, paths in zip(jobs, previews, strict=True) if paths}
    for job in jobs:
        job.wants_preview = id(job) in where

    def tick(job: Job) -> None:
        from latentrt.images.image import save

        on_tick(job)
        paths = where.get(id(job), {}).get(job.row)
        if paths is not None and job.preview is not None:
            for path, latents in zip(paths, (job.view, job.preview), strict=True):
                save(engine.decode(latents), path, settings=job.tag)

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
