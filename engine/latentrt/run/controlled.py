"""The residuals of ControlNets for the next rows of jobs on the host."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from latentrt.model.control import ControlNet
from latentrt.model.inputs import Inputs
from latentrt.run.job import Job

Float32 = NDArray[np.float32]
Stack = Callable[[Hashable, list[Inputs]], dict[str, NDArray[Any]]]


class Lane(NamedTuple):
    """A lane on which a ControlNet acts: its place in the call, what it reads, how strongly it acts."""

    place: int
    inputs: Inputs
    scale: float


def acts(jobs: Sequence[Job]) -> bool:
    """Return whether any ControlNet acts in the next row of any of these jobs."""
    return any(one.scales[job.row] for job in jobs for one in job.controls)


def add_residuals(
    jobs: Sequence[Job],
    counts: Sequence[int],
    sample: Float32,
    timestep: Float32,
    residuals: dict[str, Float32],
    stack: Stack,
) -> None:
    """Add the residuals of all ControlNets that act in the next rows of jobs, in place.

    A ControlNet is called for the lanes on which it acts alone. They are added in the engine's order, so that a job's
    sums do not depend on the others'.

    Args:
        jobs: that are moved together.
        counts: the lanes of each.
        sample, timestep: what the denoiser reads, of all lanes.
        residuals: zeros for all lanes, by name.
        stack: stacks the inputs of lanes, by a key of the call.
    """
    for number, (net, lanes) in enumerate(_calls(jobs, counts)):
        places = [lane.place for lane in lanes]
        inputs = stack((net.name, number), [lane.inputs for lane in lanes])
        scale = np.array([lane.scale for lane in lanes], np.float32)
        before = {name: array[places] for name, array in residuals.items()}
        for name, total in net(sample[places], timestep[places], inputs, scale, before).items():
            residuals[name][places] = total


def _calls(jobs: Sequence[Job], counts: Sequence[int]) -> list[tuple[ControlNet, list[Lane]]]:
    """Return the lanes of each ControlNet, together whose inputs have the same shapes."""
    found: dict[tuple[int, Hashable], tuple[ControlNet, list[Lane]]] = {}
    first = 0
    for job, count in zip(jobs, counts, strict=True):
        for one in job.controls:
            scale = float(one.scales[job.row])
            for place, inputs in enumerate(one.sides[-count:], first):
                if scale and inputs is not None:
                    key = one.net.number, tuple((name, array.shape) for name, array in inputs.items())
                    found.setdefault(key, (one.net, []))[1].append(Lane(place, inputs, scale))
        first += count
    return [found[key] for key in sorted(found, key=lambda key: key[0])]
