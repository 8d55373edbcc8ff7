"""Everything that the server asks of an Engine beside its denoiser, and nothing else: what the model is, requests to
jobs before the ticks, latents to pictures after them, and the self-check.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from latentrt.bundle.bundle import MANIFEST, sha256_of
from latentrt.bundle.spec import ENCODER, LatentSpec
from latentrt.engine import Engine
from latentrt.errors import BackendError, BundleError, DeviceMemoryError, PlanError, RequestError, ScheduleError
from latentrt.golden import SIDE, TOLERANCE, example, worst_error
from latentrt.images.given import MODES, prepared
from latentrt.model.given import MASKED_STRENGTH, STRENGTH
from latentrt.request import Request
from latentrt.run.job import Job
from latentrt.runtime.base import Facts
from latentrt.runtime.tensorrt.record import Profile
from latentrt.serve.core.errors import EngineFault

if TYPE_CHECKING:
    from PIL.Image import Image

    from latentrt.images.picture import Picture

Shape = tuple[int, int, int]  # of a picture's latents: channels, height, width

GUIDED = 2  # lanes of a picture with guidance
IMAGE_MODES = MODES  # of PIL images that can be edited


# ---- What the model is


def facts(engine: Engine) -> Facts:
    """Return how the engine's backend runs networks."""
    return engine.backend.facts


def profiles(engine: Engine) -> Sequence[Profile] | None:
    """Return the sizes of latents ("height", "width") that plans draw; None: all."""
    return engine.model.profiles(engine.denoiser.lanes)


def check_resident(engine: Engine) -> None:
    """Refuse an engine that cannot be served.

    Raises:
        BackendError: it drops its networks after use.
    """
    if not engine.model.resident:
        fix = "load it with resident=True"
        raise BackendError("the engine drops its networks", needed="a resident one", fix=fix)


def identity(engine: Engine) -> dict[str, str | None]:
    """Return what a measurement of this engine holds for."""
    backend = engine.backend
    device = backend.device if backend.gpu is None else backend.gpu.name
    return {"model": engine.spec.id, "backend": backend.name, "device": device, "precision": backend.precision}


def folder(engine: Engine) -> Path:
    """Return the bundle's folder."""
    return engine.bundle.root


def manifest_hash(engine: Engine) -> str:
    """Return the hash of the bundle's manifest."""
    return sha256_of(engine.bundle.root / MANIFEST)


def own_shape(engine: Engine) -> Shape:
    """Return the latent shape that the model was trained at."""
    return engine.spec.latents.shape_of(None, None)


def most_lanes(engine: Engine) -> int:
    """Return the lanes that a picture of this model may take: without prompts there is no guidance."""
    return 1 if engine.model.text is None else GUIDED


def lanes_of(request: Request) -> int:
    """Return the lanes that each picture of a request takes, its defaults filled in."""
    return GUIDED if (request.guidance or 0) > 1 else 1


def load_encoder(engine: Engine) -> None:
    """Load the network that edits need, if the model has one: what is loaded later stalls others.

    Raises:
        PlanError: there is no plan for it.
    """
    try:
        for name in engine.spec.named(ENCODER):
            engine.model.networks[name].open()
    except PlanError as error:
        raise PlanError(error.found, needed=error.needed, fix=f"{error.fix}; or serve with --no-edits") from error


# ---- Before the ticks


def usual_strength(pictures: Mapping[str, Any]) -> float:
    """Return the strength of a request that names none."""
    return MASKED_STRENGTH if "mask" in pictures else STRENGTH


def fit(pictures: Mapping[str, Image], size: tuple[int, int], latents: LatentSpec) -> dict[str, NDArray[np.uint8]]:
    """Bring a request's pictures to its size (width, height), as the engine would: they wait in the queue.

    Raises:
        RequestError: a mode or size that cannot be used.
    """
    width, height = size
    pixels, repaint = prepared(pictures["image"], pictures.get("mask"), height, width, latents)
    pixels = pixels.repeat(3 // pixels.shape[2], axis=2)  # grey ones too come to the engine in colour
    return {"image": pixels} if repaint is None else {"image": pixels, "mask": repaint.astype(np.uint8) * np.uint8(255)}


def prepare(engine: Engine, request: Request) -> tuple[list[Job], dict[str, str]]:
    """Return a request's jobs, and the end of each text that the model does not read, by the text's field.

    Raises:
        LatentrtError: what was wrong with the request.
    """
    jobs, text = engine.jobs(request), engine.model.text
    if text is None:
        return jobs, {}
    dropped = {name: text.dropped(one) for name, one in text.texts(request).items()}
    return jobs, {name: end for name, end in dropped.items() if end}


# ---- After the ticks


def decode(engine: Engine, job: Job) -> Picture:
    """Return the picture of a job's latents.

    Raises:
        NetworkError: it is not finite.
    """
    return engine.picture(job)


def preview(engine: Engine, latents: NDArray[np.float32]) -> Image:
    """Return the picture of a job's predicted clean latents."""
    return engine.decode(latents)


# ---- Whether it works


def check(engine: Engine) -> None:
    """Prove that the engine works. Nothing else may run on it meanwhile.

    Golden runs are repeated and compared where they can be; half precision differs by more than they allow. Then a
    picture is made in one step, and has to be finite: a small one on a CPU, which may take minutes for a whole one, and
    one of the model's own size where plans may take no other.

    Raises:
        EngineFault: other numbers came out.
        LatentrtError: whatever the engine raises.
    """
    if engine.spec.golden and facts(engine).exact and engine.denoiser.lanes >= most_lanes(engine):
        error = worst_error(engine)
        if math.isnan(error) or error > TOLERANCE:
            raise EngineFault(
                f"golden runs differ by {error:.1e} of their size",
                needed=f"at most {TOLERANCE:g}",
                fix="latentrt verify BUNDLE",
            )
    side = max(engine.spec.latents.height, engine.spec.latents.width) if facts(engine).fixed_lanes else SIDE
    settings, pictures = example(engine.model, side)
    prompt = None if engine.model.text is None else ""
    (job,) = engine.requests([prompt], {"steps": 1, "guidance": 1.0, **settings}, pictures)
    engine.run([job])
    engine.picture(job)


def is_fault(error: Exception) -> bool:
    """Return whether an error says something of the engine, and not only of what was asked of it: another size, an
    encoder that the bundle does not have, more memory than there is.
    """
    return not isinstance(error, RequestError | ScheduleError | BundleError | PlanError | DeviceMemoryError)
