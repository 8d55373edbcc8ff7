"""Lanes: where jobs are moved by a row, numpy arrays on a CPU (`host.py`) and device memory on a GPU (`device.py`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from latentrt.model.model import Model
from latentrt.run.host import HostLanes
from latentrt.run.job import Job
from latentrt.runtime.base import Backend

if TYPE_CHECKING:
    from latentrt.run.program import Program

ON_A_CPU = 16  # lanes, where nobody says how many


class Lanes(Protocol):
    """The lanes of a predictor's batch, and the arithmetic between its calls.

    A job's latents must not depend on who shares its batch.

    Attributes:
        count: the most lanes of one call.
        resumable: whether a job that was retired can be admitted again and go on.
    """

    count: int
    resumable: bool

    def admit(self, job: Job) -> None:
        """Make room for a job; there are lanes enough."""

    def retire(self, job: Job) -> None:
        """Give an admitted job's room back."""

    def advance(self, jobs: list[Job]) -> None:
        """Move each of these jobs by one row: admitted, not done, of the same `shapes`."""

    def close(self) -> None:
        """Give all memory back."""


def open_lanes(
    model: Model, backend: Backend, count: int | None = None, capture: bool | None = None
) -> tuple[Lanes, Program | None]:
    """Return the lanes of a model where its networks are, and on a GPU the program that draws whole pictures.

    Args:
        model: what moves the jobs.
        backend: what runs its networks.
        count: lanes; None is 16 on a CPU, and on a GPU as many as the denoiser's plan was built for.
        capture: whether work on a GPU is launched as CUDA graphs; None is where the backend supports it.
    """
    if backend.gpu is None:
        return HostLanes(model.predictor, count or ON_A_CPU), None
    from latentrt.run.program import on_device

    return on_device(model, count, capture=backend.facts.captures if capture is None else capture)
