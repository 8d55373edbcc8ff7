"""Lanes of the two kinds of machines: numpy arrays on a CPU (`host.py`), device memory on a GPU (`device.py`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from latentrt.model.model import Model
from latentrt.run.host import HostLanes
from latentrt.run.job import Job
from latentrt.runtime.base import Backend

if TYPE_CHECKING:
    from latentrt.run.gpu.program import Program

ON_A_CPU = 16  # lanes, unless the caller says how many


class Lanes(Protocol):
    """The lanes of a predictor's batch, and the arithmetic between its calls.

    A job's latents must not depend on the other jobs in its batch.

    Attributes:
        count: the most lanes of one call.
        resumable: whether a job that was retired can be admitted again and go on.
    """

    count: int
    resumable: bool

    def admit(self, job: Job) -> None:
        """Make room for a job; there are enough free lanes."""

    def retire(self, job: Job) -> None:
        """Free an admitted job's room."""

    def advance(self, jobs: list[Job]) -> None:
        """Move each of these jobs by one row: admitted, not done, of the same `shapes`, all `shallow` or none."""

    def close(self) -> None:
        """Free all memory."""


def open_lanes(
    model: Model,
    backend: Backend,
    count: int | None = None,
    capture: bool | None = None,
    refiner: Model | None = None,
) -> tuple[Lanes, Program | None]:
    """Return a model's lanes on the device of its networks, and on a GPU the program that draws whole pictures.

    Args:
        model: its networks move the jobs.
        backend: runs the networks.
        count: lanes; None is 16 on a CPU, and on a GPU as many as the denoiser's plan was built for, or one picture
            takes.
        refiner: takes over pictures of the model.
        capture: whether work on a GPU is launched as CUDA graphs; None for the backend's own choice.

    Raises:
        DeviceMemoryError: the LoRAs of so many lanes do not fit on the GPU.
    """
    if backend.gpu is None:
        return HostLanes(model.predictor, count or ON_A_CPU), None
    from latentrt.run.gpu.device import DeviceLanes
    from latentrt.run.gpu.program import Program
    from latentrt.run.parts import check_room

    each = max(one.most_lanes for one in (model, refiner) if one is not None)
    lanes = count or max(model.predictor.best_lanes, each)
    if model.adapters is not None:
        check_room(backend.gpu, model.predictor.inputs.values(), {"batch": lanes, "rank": model.adapters.rank})
    capture = backend.facts.captures if capture is None else capture
    return DeviceLanes(model.predictor, lanes, capture=capture), Program(model, lanes, capture=capture)
