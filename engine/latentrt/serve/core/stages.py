"""What the engine does for pictures beside the ticks. Everything of the service that calls an Engine by more than its
denoiser is here: before the ticks orders become jobs, after them latents become pictures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from latentrt.engine import Engine
from latentrt.errors import BundleError, DeviceMemoryError, NetworkError, PlanError, RequestError, ScheduleError
from latentrt.golden import SIDE, TOLERANCE, worst_error
from latentrt.images.pixels import to_uint8
from latentrt.request import Request
from latentrt.run.job import Job
from latentrt.serve.core.curve import GUIDED, Shape
from latentrt.serve.core.ticket import Cut, EngineFault, Order

if TYPE_CHECKING:
    from PIL.Image import Image

    from latentrt.images.picture import Picture


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
    if len(orders) > 1:
        with suppress(Exception):  # who is at fault is found when the orders are taken one by one
            engine.text_encoder.encode_all([text for order in orders for text in _texts(order.request)])
    return [_jobs(engine, order) for order in orders]


def _texts(request: Request) -> list[str]:
    """The texts that a request's jobs need."""
    return [request.prompt, request.negative_prompt or ""] if request.guidance > 1 else [request.prompt]


def cuts(engine: Engine, request: Request) -> list[Cut]:
    """What the model will not read of a request's texts."""
    dropped = zip(("prompt", "negative_prompt"), map(engine.text_encoder.dropped, _texts(request)), strict=False)
    return [Cut(field, text) for field, text in dropped if text]


def _jobs(engine: Engine, order: Order) -> list[Job] | Exception:
    try:
        if order.image is None:
            if order.mask is not None:
                raise RequestError(
                    "there is a mask and no picture", needed="the picture that it belongs to", fix="add the image"
                )
            return engine.jobs(order.request)
        request = replace(order.request, strength=order.strength)
        edit = engine.edit(order.image, order.mask, height=request.height, width=request.width)
        return engine.jobs(request, edit=edit)
    except Exception as error:
        return error


def draw(engine: Engine, jobs: Sequence[Job]) -> list[Picture | NetworkError]:
    """The pictures of jobs with latents of one shape, in one call of the VAE; an error for each that is not finite."""
    images = engine.vae.decode(np.stack([job.latents for job in jobs]))
    return [_picture(image, job) for image, job in zip(images, jobs, strict=True)]


def _picture(image: NDArray[np.float32], job: Job) -> Picture | NetworkError:
    from latentrt.images.picture import Picture

    try:
        return Picture.of(to_uint8(image[None])[0], job.tag)
    except NetworkError as error:
        return error


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
    exact = engine.backend.gpu is None and engine.backend.precision == "fp32"
    if engine.spec.golden and exact and engine.denoiser.lanes >= GUIDED:
        error = worst_error(engine)
        if math.isnan(error) or error > TOLERANCE:
            raise EngineFault(
                f"golden runs differ by {error:.1e} of their size",
                needed=f"at most {TOLERANCE:g}",
                fix="latentrt verify BUNDLE",
            )
    jobs = engine.requests([""], {"steps": 1, "guidance": 1.0, **_check_size(engine)})
    engine.run(jobs)
    for drawn in draw(engine, jobs):
        if isinstance(drawn, NetworkError):
            raise drawn


def _check_size(engine: Engine) -> dict[str, int]:
    """Small on a CPU, which may take minutes for a whole picture; on a GPU the model's own."""
    if engine.backend.gpu is not None:
        return {}
    spec = engine.spec.latents
    return {name: min(getattr(spec, name), SIDE) * spec.factor for name in ("height", "width")}


def is_fault(error: Exception) -> bool:
    """Whether an error says something of the engine, and not only of what was asked of it: another size, an encoder
    that the bundle does not have, more memory than there is.
    """
    return not isinstance(error, RequestError | ScheduleError | BundleError | PlanError | DeviceMemoryError)
