"""Everything that the server asks of an Engine beside its denoiser, and nothing else: what the model is, requests to
jobs before the ticks, latents to pictures after them, and the self-check.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from latentrt.bundle.bundle import MANIFEST, sha256_of
from latentrt.bundle.manifest import LatentSpec
from latentrt.engine import Engine
from latentrt.errors import BackendError, BundleError, DeviceMemoryError, PlanError, RequestError, ScheduleError
from latentrt.golden import SIDE, TOLERANCE, worst_error
from latentrt.model.edit import MASKED_STRENGTH, MODES, STRENGTH, prepared
from latentrt.request import Request
from latentrt.run.job import Job
from latentrt.runtime.tensorrt.record import Profile
from latentrt.sampling.schedule import Schedule
from latentrt.serve.core.errors import EngineFault

if TYPE_CHECKING:
    from PIL.Image import Image

    from latentrt.images.picture import Picture

Shape = tuple[int, int, int]  # of a picture's latents: channels, height, width

GUIDED = 2  # lanes of a picture with guidance
IMAGE_MODES = MODES  # of PIL images that can be edited
ENCODER = "vae_encoder"  # the network that edits need


# ---- What the model is


class Model(NamedTuple):
    """What requests are checked against.

    Attributes:
        edits: whether pictures can begin on a given one.
        profiles: the sizes of latents ("height", "width") that plans draw; None: all.
    """

    name: str
    latents: LatentSpec
    schedule: Schedule
    edits: bool
    profiles: Sequence[Profile] | None


class Facts(NamedTuple):
    """How the engine's device works.

    Attributes:
        one_stream: encoding and decoding happen between two ticks, by the same thread.
        fixed_lanes: every call computes all lanes, idle ones too.
        exact: golden runs can be compared.
        resumable: jobs may leave the denoiser and go on later.
    """

    one_stream: bool
    fixed_lanes: bool
    exact: bool
    resumable: bool


def model(engine: Engine) -> Model:
    """Return what the engine draws with."""
    spec = engine.spec
    return Model(spec.id, spec.latents, engine.schedule, ENCODER in spec.graphs, engine.profiles)


def facts(engine: Engine) -> Facts:
    """Return how the engine's device works."""
    on_gpu = engine.backend.gpu is not None
    exact = not on_gpu and engine.backend.precision == "fp32"
    return Facts(one_stream=on_gpu, fixed_lanes=on_gpu, exact=exact, resumable=not on_gpu)


def check_resident(engine: Engine) -> None:
    """Refuse an engine that cannot be served.

    Raises:
        BackendError: it drops its networks after use.
    """
    if not engine.resident:
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


def lanes_of(request: Request) -> int:
    """Return the lanes that each picture of a request takes."""
    return GUIDED if request.guidance > 1 else 1


def load_encoder(engine: Engine) -> None:
    """Load the network that edits need: what is loaded later stalls others.

    Raises:
        PlanError: there is no plan for it.
    """
    try:
        engine.network(ENCODER)
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
    return {"image": pixels} if repaint is None else {"image": pixels, "mask": repaint.astype(np.uint8) * np.uint8(255)}


def prepare(engine: Engine, request: Request) -> tuple[list[Job], dict[str, str]]:
    """Return a request's jobs, and the end of each text that the model does not read, by the text's field.

    Raises:
        LatentrtError: what was wrong with the request.
    """
    jobs = engine.jobs(request)
    texts = {"prompt": request.prompt, "negative_prompt": request.negative_prompt or ""}
    if lanes_of(request) < GUIDED:
        del texts["negative_prompt"]
    dropped = {name: engine.text_encoder.dropped(text) for name, text in texts.items()}
    return jobs, {name: text for name, text in dropped.items() if text}


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
    known = facts(engine)
    if engine.spec.golden and known.exact and engine.denoiser.lanes >= GUIDED:
        error = worst_error(engine)
        if math.isnan(error) or error > TOLERANCE:
            raise EngineFault(
                f"golden runs differ by {error:.1e} of their size",
                needed=f"at most {TOLERANCE:g}",
                fix="latentrt verify BUNDLE",
            )
    latents = engine.spec.latents
    sides = {name: min(getattr(latents, name), SIDE) * latents.factor for name in ("height", "width")}
    jobs = engine.jobs(Request(prompt="", steps=1, guidance=1.0, **({} if known.fixed_lanes else sides)))
    engine.run(jobs)
    engine.picture(jobs[0])


def is_fault(error: Exception) -> bool:
    """Return whether an error says something of the engine, and not only of what was asked of it: another size, an
    encoder that the bundle does not have, more memory than there is.
    """
    return not isinstance(error, RequestError | ScheduleError | BundleError | PlanError | DeviceMemoryError)
