"""Turn a user's settings (lanes, pictures, pixels) into the profiles of every network's plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from latentrt.adapters.mixed import RANK
from latentrt.bundle.spec import (
    CONDITIONER,
    CONTROL,
    DENOISER,
    ENCODER,
    HINT,
    SHALLOW,
    TEXT_ENCODER,
    LatentSpec,
    ModelSpec,
)
from latentrt.errors import PlanError, RequestError
from latentrt.runtime.signature import symbols
from latentrt.runtime.tensorrt.record import Profile, Range
from latentrt.values import parse_size, parse_whole

SETTINGS = ("lanes", "pictures", "size", "tokens")


@dataclass(frozen=True, slots=True)
class Shapes:
    """The shapes that one profile serves, as (least, best, most): lanes of the UNet, pictures of the VAE, pixels,
    tokens of a text, and the rank of a picture's LoRAs.
    """

    lanes: Range
    pictures: Range
    height: Range
    width: Range
    tokens: Range
    rank: Range


def shapes_of(spec: ModelSpec, settings: Mapping[str, str], profiles: Sequence[str] = ()) -> tuple[Shapes, ...]:
    """Return the shapes of a user's settings.

    Args:
        spec: the model; its own size is the default.
        settings: "lanes", "pictures", "size", "tokens" and "rank" as typed: one value ("2", "512x512"), or
            least:best:most. What is missing is the lanes of one guided picture (mostly two), one picture, the model's
            own size, prompts of one chunk, and the rank that engines have by default: fixed shapes, which make the
            fastest plans.
        profiles: further settings for each of several profiles, as "lanes=2,size=512x512"; the rank is one for all.

    Raises:
        RequestError: a setting is unknown or not a range.
        PlanError: the model has no latents of such a size.
    """
    latents = spec.latents
    sides = latents.height * latents.factor, latents.width * latents.factor
    own = Shapes(*((size,) * 3 for size in (_lanes(spec), 1, *sides, spec.tokens, RANK)))
    base = _with(own, settings, latents, (*SETTINGS, "rank"))
    return tuple(_with(base, _pairs(text), latents, SETTINGS) for text in profiles) or (base,)


def _lanes(spec: ModelSpec) -> int:
    """Return the lanes of a guided picture: one where the denoiser reads the scale, three where it edits pictures."""
    inputs = {tensor.name: tensor for name in spec.named(DENOISER) for tensor in spec.networks[name].inputs}
    if "timestep_cond" in inputs:
        return 1
    return 3 if "beside" in inputs and inputs["beside"].shape[1] == spec.latents.channels else 2


def profiles_of(spec: ModelSpec, network: str, asked: Sequence[Shapes]) -> tuple[Profile, ...]:
    """Return a network's profiles, each once: the ranges of the names in its graph's symbolic dimensions.

    Text encoders and conditioners have two for each of `asked`: one prompt, and as many as the lanes, for a picture in
    one launch. What a ControlNet or T2I-Adapter follows is embedded picture by picture.

    Raises:
        PlanError: its graph has an unknown symbolic dimension, or reads no pictures of these sizes.
    """
    _check_sides(spec, asked)
    names = symbols(spec.networks[network].inputs)
    found: list[Profile] = []
    for ranges in (ranges for shapes in asked for ranges in _ranges(spec, network, shapes)):
        if unknown := sorted(set(names) - set(ranges)):
            raise PlanError(
                f"the {network} has the dimensions {', '.join(unknown)}",
                needed=f"{', '.join(ranges)} alone",
                fix="export it again",
            )
        profile = Profile({name: ranges[name] for name in names})
        if profile not in found:
            found.append(profile)
    return tuple(found)


def _check_sides(spec: ModelSpec, asked: Sequence[Shapes]) -> None:
    step = spec.latents.step
    if odd := [pixels for one in asked for pixels in (*one.height, *one.width) if pixels % step]:
        found, needed = f"size has {odd[0]} pixels", f"multiples of {step}, as {spec.id} reads"
        raise PlanError(found, needed=needed, fix="pass another --size")


def _ranges(spec: ModelSpec, network: str, shapes: Shapes) -> list[dict[str, Range]]:
    role, one = spec.networks[network].role, (1, 1, 1)
    batches = [shapes.lanes if role in (DENOISER, SHALLOW, CONTROL) else shapes.pictures]
    if role in (TEXT_ENCODER, CONDITIONER):
        batches = [one, shapes.lanes]
    elif role == HINT:
        batches = [one]
    factor = 1 if role in (ENCODER, HINT) else spec.latents.factor  # these read pixels, the others latents
    height, width = (_divided(side, factor) for side in (shapes.height, shapes.width))
    common = {"height": height, "width": width, "tokens": shapes.tokens, "rank": shapes.rank}
    return [{"batch": batch, **common} for batch in batches]


def _divided(side: Range, factor: int) -> Range:
    least, best, most = (pixels // factor for pixels in side)
    return least, best, most


def _pairs(text: str) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in text.split(",")]
    if any(not value for _, _, value in pairs) or len({name for name, _, _ in pairs}) < len(pairs):
        raise RequestError(f"--profile is {text!r}", needed="settings, each once, as in lanes=2,size=512x512")
    return {name.strip(): value for name, _, value in pairs}


def _with(shapes: Shapes, settings: Mapping[str, str], latents: LatentSpec, known: Sequence[str]) -> Shapes:
    for name, text in settings.items():
        if name not in known:
            raise RequestError(f"a profile has the setting {name!r}", needed=f"one of {', '.join(known)}")
        parts = text.split(":")
        if len(parts) not in (1, 3):
            raise RequestError(f"{name} is {text!r}", needed="one value, or least:best:most")
        if name == "size":
            sides = [_size(part, latents.factor) for part in parts]
            shapes = replace(
                shapes, height=_range(name, [h for _, h in sides]), width=_range(name, [w for w, _ in sides])
            )
        else:
            shapes = replace(shapes, **{name: _range(name, [parse_whole(part, name) for part in parts])})
    return shapes


def _range(name: str, values: Sequence[int]) -> Range:
    least, best, most = values if len(values) == 3 else 3 * tuple(values)
    if not least <= best <= most:
        raise RequestError(f"{name} is {least}:{best}:{most}", needed="least:best:most in rising order")
    return least, best, most


def _size(text: str, factor: int) -> tuple[int, int]:
    """Return width and height in pixels; one number is both."""
    sides = parse_size(text, "size")
    for pixels in sides:
        if pixels % factor:
            raise PlanError(
                f"size has {pixels} pixels", needed=f"a multiple of {factor}, for latents have a whole size"
            )
    return sides
