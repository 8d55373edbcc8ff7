"""Previews of denoising: chosen rows as files, contact sheets of them, and an animation."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from PIL.Image import Image

    from latentrt.engine import Engine
    from latentrt.run.job import Job

KINDS = ("current", "predicted")  # the latents as they are, and the picture that the network predicts
FRAMES = 60  # of an animation at most


class Asked(NamedTuple):
    """The previews to make: every so many rows as files, and an animation of some kinds."""

    every: int = 0
    animation: Path | None = None
    kinds: Sequence[str] = KINDS


class Watch:
    """Keeps the pictures of chosen rows of all jobs.

    Args:
        engine: decodes them.
        jobs: watched from their first row on.
        paths: of the jobs' pictures; previews lie beside them.
        sheet: of the contact sheet, if there is one; previews of it lie beside it.
        asked: the previews to make.
    """

    def __init__(self, engine: Engine, jobs: Sequence[Job], paths: Sequence[Path], sheet: Path | None, asked: Asked):
        self._engine, self._jobs, self._asked, self._sheet = engine, tuple(jobs), asked, sheet
        self._paths = dict(zip(jobs, paths, strict=True))
        self._animated = _spread(max(job.rows for job in jobs)) if asked.animation else frozenset[int]()
        self._seen: dict[int, dict[Job, tuple[Image, Image]]] = {}
        for job in jobs:
            job.wants_preview = self._wants(job)

    @property
    def files(self) -> list[Path]:
        """Every file that will be written."""
        found = [beside(self._paths[job], row, kind) for job in self._jobs for row in self._rows(job) for kind in KINDS]
        if self._sheet is not None:
            found += [beside(self._sheet, row, kind) for row in self._rows(self._jobs[0]) for kind in KINDS]
        return [*found, *([self._asked.animation] if self._asked.animation else [])]

    def __call__(self, job: Job) -> None:
        """Keep a job's picture after one of its rows."""
        from latentrt.images.files import save

        if job.preview is not None and job.wants_preview:
            images = self._engine.preview(job.view), self._engine.preview(job.preview)
            self._seen.setdefault(job.moved, {})[job] = images
            if job.moved in self._rows(job):
                for kind, image in zip(KINDS, images, strict=True):
                    save(image, beside(self._paths[job], job.moved, kind), settings=job.tag)
        job.wants_preview = self._wants(job)

    def finish(self) -> None:
        """Write the contact sheets and the animation, once all jobs are done."""
        from latentrt.images.animation import save_animation
        from latentrt.images.files import save

        if self._sheet is not None:
            for row in self._rows(self._jobs[0]):
                for kind in KINDS:
                    save(self._grid(row, [kind]), beside(self._sheet, row, kind), settings={})
        if self._asked.animation is not None:
            save_animation(
                [self._grid(row, self._asked.kinds) for row in sorted(self._animated)], self._asked.animation
            )

    def _grid(self, row: int, kinds: Sequence[str]) -> Image:
        """Return all pictures at a row, or at its last row where a run is shorter."""
        from latentrt.images.sheet import grid

        images = [self._at(job, row) for job in self._jobs]
        sheets = [grid([pair[KINDS.index(kind)] for pair in images]) for kind in kinds]
        return sheets[0] if len(sheets) == 1 else grid(sheets, columns=len(sheets))

    def _at(self, job: Job, row: int) -> tuple[Image, Image]:
        rows = [seen for seen in self._seen if seen <= row and job in self._seen[seen]]
        return self._seen[max(rows)][job]

    def _rows(self, job: Job) -> Collection[int]:
        every = self._asked.every
        return range(every, job.rows + 1, every) if every else ()

    def _wants(self, job: Job) -> bool:
        row = job.moved + 1
        return row in self._rows(job) or row in self._animated or (bool(self._animated) and row == job.rows)


def beside(path: Path, row: int, kind: str) -> Path:
    """Return the path of a preview of a row: beside the picture."""
    return path.with_stem(f"{path.stem}-{row:03d}-{kind}")


def _spread(rows: int) -> frozenset[int]:
    """Return at most FRAMES rows, evenly spread, the first and the last among them."""
    count = min(rows, FRAMES)
    return frozenset(1 + index * (rows - 1) // max(1, count - 1) for index in range(count))
