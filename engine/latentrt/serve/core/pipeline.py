"""What the server's core asks of an Engine in more than one call: requests to jobs, and the self-check."""

from __future__ import annotations

import math

from latentrt.bundle.spec import ENCODER
from latentrt.engine import Engine
from latentrt.errors import BundleError, DeviceMemoryError, PlanError, RequestError, ScheduleError
from latentrt.golden import SIDE, TOLERANCE, example, worst_error
from latentrt.model.text import Unread
from latentrt.model.vae.codec import Vae
from latentrt.model.vae.tiles import Between
from latentrt.request import Request
from latentrt.run.job import Job
from latentrt.serve.core.errors import EngineFault

Shape = tuple[int, int, int]  # of a picture's latents: channels, height, width

GUIDED = 2  # lanes of a picture with guidance, of most models


def load_encoder(engine: Engine) -> None:
    """Load the network that edits need, if they need one: what is loaded later stalls others.

    Raises:
        PlanError: there is no plan for it.
    """
    if not engine.model.encodes:
        return
    try:
        for name in engine.spec.named(ENCODER):
            engine.model.networks[name].open()
    except PlanError as error:
        raise PlanError(error.found, needed=error.needed, fix=f"{error.fix}; or serve with --no-edits") from error


def prepare(engine: Engine, request: Request) -> tuple[list[Job], Unread]:
    """Return a request's jobs, and what the model does not read of its texts.

    Raises:
        LatentrtError: what was wrong with the request.
    """
    jobs, text = engine.jobs(request), engine.model.text
    return jobs, Unread({}, {}) if text is None else text.unread(request)


def divide(engine: Engine, between: Between) -> None:
    """Have this called between two tiles of every picture that the engine encodes or decodes from now on."""
    for codec in (engine.model.codec, engine.model.preview):
        if isinstance(codec, Vae):
            codec.between = between


def check(engine: Engine) -> None:
    """Prove that the engine works. Nothing else may run on it meanwhile.

    Golden runs are repeated and compared where they can be; half precision differs by more than they allow. Then a
    picture is made in one step, and has to be finite: a small one on a CPU, which may take minutes for a whole one, and
    one of the model's own size where plans may take no other.

    Raises:
        EngineFault: other numbers came out.
        LatentrtError: whatever the engine raises.
    """
    if engine.spec.golden and engine.backend.facts.exact and engine.denoiser.lanes >= engine.model.most_lanes:
        error = worst_error(engine)
        if math.isnan(error) or error > TOLERANCE:
            raise EngineFault(
                f"golden runs differ by {error:.1e} of their size",
                needed=f"at most {TOLERANCE:g}",
                fix="latentrt verify BUNDLE",
            )
    side = max(engine.spec.latents.height, engine.spec.latents.width) if engine.backend.facts.fixed_lanes else SIDE
    settings, pictures = example(engine.model, side)
    if pictures and not engine.model.shows_picture:
        settings["strength"] = 1.0  # less may leave none of one step
    prompt = None if engine.model.text is None else ""
    (job,) = engine.requests([prompt], {"steps": 1, "guidance": 1.0, **settings}, pictures)
    engine.run([job])
    engine.picture(job)


def is_fault(error: Exception) -> bool:
    """Return whether an error is the engine's fault, and not that of the request: a size without a plan, an encoder
    that the bundle does not have, more memory than there is.
    """
    return not isinstance(error, RequestError | ScheduleError | BundleError | PlanError | DeviceMemoryError)
