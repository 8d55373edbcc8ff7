"""What the engine does for pictures beside the ticks. Everything of the service that calls an Engine by more than its
denoiser is here: before the ticks orders become jobs, after them latents become pictures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engine.errors import LatentrtError, RequestError, ScheduleError
from engine.golden import TOLERANCE, worst_error
from engine.image import to_uint8
from engine.job import Job
from engine.pipeline import Engine
from engine.serve.curve import GUIDED, Shape
from engine.serve.ticket import EngineFault, Order
from engine.spec import Request

if TYPE_CHECKING:
    from PIL.Image import Image

    from engine.picture import Picture


def shape_of(engine: Engine, request: Request) -> Shape:
    """The latent shape that a request asks for; whether the model takes it is found out when its jobs are made."""
    spec = engine.spec.latents
    sides = ((request.height, spec.height), (request.width, spec.width))
    height, width = (own if pixels is None else max(1, pixels // spec.factor) for pixels, own in sides)
    return spec.channels, height, width


def lanes_of(request: Request) -> int:
    """The lanes that each picture of a request takes."""
    return GUIDED if request.guidance > 1 else 1


def prepare(engine: Engine, orders: Sequence[Order]) -> list[list[Job] | Exception]:
    """The jobs of each order, or what was wrong with it: prompts are encoded, noise is drawn, tables are made."""
    return [_jobs(engine, order) for order in orders]


def _jobs(engine: Engine, order: Order) -> list[Job] | Exception:
    try:
        if order.image is not None or order.mask is not None:
            raise RequestError("an order with a picture to begin on", "an order without", "leave image and mask out")
        return engine.jobs(order.request)
    except Exception as error:
        return error


def draw(engine: Engine, jobs: Sequence[Job]) -> list[Picture]:
    """The pictures of jobs with latents of one shape, in one call of the VAE.

    Raises:
        NetworkError: one of them is not finite; nobody knows which.
    """
    from engine.picture import Picture

    pixels = to_uint8(engine.vae.decode(np.stack([job.latents for job in jobs])))
    return [Picture.of(one, job.tag) for one, job in zip(pixels, jobs, strict=True)]


def sketch(engine: Engine, latents: NDArray[np.float32]) -> Image:
    """The picture of a job's predicted clean latents."""
    return engine.decode(latents)


def check(engine: Engine) -> None:
    """Prove that the engine works. Nothing else may run on it meanwhile.

    Where the networks are float32 on a CPU the bundle's golden runs are repeated and compared. On a GPU plans may take
    one size only, and half precision differs by more than golden runs allow: there a picture of the model's own size
    is made in one step, and has to be finite.

    Raises:
        EngineFault: other numbers came out.
        LatentrtError: whatever the engine raises.
    """
    if engine.spec.golden and engine.backend.gpu is None and engine.backend.precision == "fp32":
        error = worst_error(engine)
        if math.isnan(error) or error > TOLERANCE:
            raise EngineFault(
                f"golden runs differ by {error:.1e} of their size", f"at most {TOLERANCE:g}", "latentrt verify BUNDLE"
            )
    jobs = engine.requests([""], {"steps": 1})
    engine.run(jobs)
    draw(engine, jobs)


def as_error(error: Exception) -> LatentrtError:
    """What clients are told of something that was raised."""
    if isinstance(error, LatentrtError):
        return error
    fault = EngineFault(f"the engine raised {error!r}", "none of its errors", "report it with the server's log")
    fault.__cause__ = error
    return fault


def is_fault(error: Exception) -> bool:
    """Whether an error says something of the engine, and not only of what was asked of it."""
    return not isinstance(error, RequestError | ScheduleError)
