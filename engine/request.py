"""From what a user passes to a Request, and what a picture says of how it was made."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from engine.errors import RequestError
from engine.settings import KNOWN_KEYS
from engine.solvers import SOLVERS
from engine.spec import Request

# What users of other tools type, and what it is called here.
_OTHER_NAMES = {
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "num_images_per_prompt": "count",
    "schedule": "solver",
    "scheduler": "solver",
    "sampler": "solver",
    "negative": "negative_prompt",
    "init_image": "image",
    "mask_image": "mask",
    "denoising_strength": "strength",
    "prompt": "",
    "options": "",
}


def request_from(prompt: str, settings: Mapping[str, Any]) -> Request:
    """A Request whose settings other than its own fields are the solver's options.

    Raises:
        RequestError: a setting that neither a Request nor any solver has, or a value out of range.
    """
    own = set(Request.__dataclass_fields__) - {"prompt", "options"}
    known = {*own, *KNOWN_KEYS, *(key for solver in SOLVERS.values() for key in solver.arguments)}
    for key in settings:
        if key not in known:
            near = _OTHER_NAMES[key] if key in _OTHER_NAMES else " or ".join(get_close_matches(str(key), known))
            mend = f"did you mean {near}?" if near else "leave it out"
            raise RequestError(f"{key!r} is not an option", "a field of Request or a setting of a solver", mend)
    fields = {key: value for key, value in settings.items() if key in own}
    options = {key: value for key, value in settings.items() if key not in own}
    return Request(prompt=prompt, **fields, options=options)


def facts_of(request: Request, solver: str, seed: int, index: int, size: tuple[int, int], model: str) -> dict[str, Any]:
    """The settings that a picture of (height, width) carries."""
    return {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt or "",
        "steps": request.steps,
        "solver": solver,
        "guidance": request.guidance,
        "guidance_rescale": request.guidance_rescale,
        "guidance_interval": list(request.guidance_interval),
        "noise": request.noise,
        "seed": seed,
        "index": index,
        "width": size[1],
        "height": size[0],
        "model": model,
        **({} if request.strength is None else {"strength": request.strength}),
        **request.options,
    }
