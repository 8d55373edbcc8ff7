"""Output in the terminal during work: bars, previews, tables."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from latentrt.run.job import Job


@contextmanager
def progress(jobs: list[Job], *, quiet: bool) -> Iterator[Callable[[Job], None]]:
    """Show a bar over all rows of all jobs, on standard error."""
    if quiet:
        yield lambda job: None
        return
    import click

    with click.progressbar(length=sum(job.rows for job in jobs), label="drawing", file=sys.stderr) as bar:
        yield lambda job: bar.update(1)


def table_of(*columns: str) -> Table:
    from rich.table import Table

    return Table(*columns, box=None, pad_edge=False)


def show(table: Table) -> None:
    from rich.console import Console

    Console().print(table)
