"""ControlNets and T2I-Adapters: networks that give residuals, which a UNet adds to what it computes.

Each is a bundle of its own, loaded beside a model. Its picture, the hint, is embedded once; every row calls it before
the denoiser, where it acts. A ControlNet's rows read the latents and the text; a T2I-Adapter's only scale what the
picture gave. Sources: Zhang, Rao, Agrawala 2023, https://arxiv.org/abs/2302.05543; Mou et al. 2023,
https://arxiv.org/abs/2302.08453. Lanes, scales and rows are those of diffusers' pipelines.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from latentrt.adapters.kept import Kept
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.spec import (
    ADAPTER,
    ADD_ONS,
    CONDITIONER,
    CONTROL,
    CONTROLLED,
    CONTROLNET_UNION,
    CONTROLNETS,
    FEATURED,
    HINT,
    RESIDUAL,
    T2I_ADAPTER,
    ModelSpec,
    TensorSpec,
)
from latentrt.errors import EXPORT, BundleError, RequestError
from latentrt.guides import Control
from latentrt.model.hoisted import Hoisted
from latentrt.model.inputs import Inputs, Sides
from latentrt.model.networks import AddOn
from latentrt.model.predictor import OWN, inputs_of
from latentrt.request import Request
from latentrt.runtime.base import Backend, DeviceNetwork, call
from latentrt.values import named

Float32 = NDArray[np.float32]
SCALE, FACTORS, PICTURE, BEFORE = "scale", "factors", "picture", ".before"
TYPE = "control_type"  # of a Union: one of so many numbers is 1
TYPES = ("openpose", "depth", "scribble", "canny", "normal", "segment", "tile", "repaint")  # of those for SDXL
ALIKE = {"hed": "scribble", "lineart": "canny", "mlsd": "canny"}  # maps of the same type
NO_CONTROLS: Mapping[str, Bundle] = {}
KEPT = 4  # embedded hints of each ControlNet


@dataclass(frozen=True, slots=True, eq=False)
class Applied:
    """A ControlNet or T2I-Adapter on one picture.

    Attributes:
        net: the one that acts.
        sides: what it reads besides the rows' own, for each lane of a row with guidance; None for lanes on which it
            does not act.
        scales: how strongly it acts in each row, (rows,) float32; 0: it is not run.
        facts: its settings, for the pictures made with it.
    """

    net: ControlNet
    sides: tuple[Inputs | None, ...]
    scales: Float32
    facts: Mapping[str, Any]


class ControlNet(AddOn):
    """A ControlNet's networks, or a T2I-Adapter's, on a backend. Any thread may call it.

    Attributes:
        number: its place among the engine's; residuals are added in this order.

    Args:
        name: that requests have for it.
        number: as above.
        bundle: its own.
        backend: runs the networks.
    """

    def __init__(self, name: str, number: int, bundle: Bundle, backend: Backend) -> None:
        super().__init__(name, bundle, backend)
        self.number = number
        (hint,), (body,) = self.spec.named(HINT), self.spec.named(CONTROL)
        self._hint, self._body = self.networks[hint], self.networks[body]
        self._hoisted = Hoisted(self.networks, self.spec, body)
        self._residuals = [tensor.name for tensor in self.spec.networks[body].outputs]
        self._read = _read(self.spec)
        self._hints = Kept[tuple[str, tuple[int, ...]], Inputs](KEPT)

    @property
    def channels(self) -> int:
        """Of the pictures that it follows."""
        return int(self.spec.networks[self.spec.named(HINT)[0]].inputs[0].shape[1])

    def type_of(self, control: Control) -> int:
        """Return the number of a control's type, of a ControlNet Union. Raise RequestError."""
        count, asked = self._types, control.type
        names = TYPES[:count]
        number = names.index(name) if (name := ALIKE.get(str(asked), asked)) in names else asked
        if not isinstance(number, int) or not 0 <= number < count:
            found = f"the control {self.name!r}, a ControlNet Union, has the type {asked!r}"
            raise RequestError(found, needed=f"one of {', '.join(names)}, or a number below {count}")
        return number

    @property
    def _types(self) -> int:
        """How many kinds of maps a ControlNet Union reads."""
        inputs = self.spec.networks[self.spec.named(CONTROL)[0]].inputs
        return next(int(tensor.shape[1]) for tensor in inputs if tensor.name == TYPE)

    def applied(self, control: Control, pixels: Float32, sides: Sides, lanes: int, rows: int) -> Applied:
        """Return the ControlNet or T2I-Adapter on one picture.

        Args:
            control: its settings.
            pixels: its hint, as of `prepared_hint`.
            sides: all inputs that the model's conditioners filled.
            lanes: of a row with guidance.
            rows: of the run.

        Raises:
            RequestError: the picture cannot be used, or a T2I-Adapter takes none of this size.
        """
        self._check_size((pixels.shape[1], pixels.shape[2]))
        digest = f"sha256:{hashlib.sha256(pixels.tobytes()).hexdigest()}"
        count = len(self._residuals)
        pooled = self.spec.conditional_only
        factors = np.logspace(-1, 0, count) if control.guess and not pooled else np.ones(count)
        own = {**self._embedded(pixels, digest), FACTORS: factors.astype(np.float32)}
        if self.spec.kind == CONTROLNET_UNION:
            own[TYPE] = np.eye(self._types, dtype=np.float32)[self.type_of(control)]
        told = [
            self._hoisted(Sides.same({name: side[name] for name in self._read})).cond for side in sides.lanes(lanes)
        ]
        conditional = control.guess or pooled
        inputs = [None if conditional and side is not told[-1] else {**side, **own} for side in told]
        facts = {name: getattr(control, name) for name in ("scale", "start", "end", "guess")} | {"image": digest}
        facts |= {} if control.type is None else {"type": control.type}
        return Applied(self, tuple(inputs), _scales(control, rows), {self.name: facts})

    def _check_size(self, size: tuple[int, int]) -> None:
        step = self.spec.latents.step
        if any(side % step for side in size):
            raise RequestError(
                f"the picture is {size[1]}x{size[0]}, and {self.spec.id}, the control {self.name!r}, reads none such",
                needed=f"sides that are multiples of {step}",
                fix=f"take {' and '.join(f'{max(side // step, 1) * step}' for side in size[::-1])}",
            )

    def _embedded(self, pixels: Float32, digest: str) -> Inputs:
        def made() -> Inputs:
            return {name: array[0] for name, array in call(self._hint, {PICTURE: pixels[None]}).items()}

        return self._hints((digest, pixels.shape), made)

    def __call__(
        self, sample: Float32, timestep: Float32, inputs: Inputs, scale: Float32, before: Mapping[str, Float32]
    ) -> dict[str, Float32]:
        """Return residuals with its own added; those of other names are left out.

        Args:
            sample: (lanes, channels, height, width), already scaled by c_in.
            timestep: (lanes,).
            inputs: those of `Applied.sides`, each with a leading lane axis.
            scale: (lanes,).
            before: the residuals of earlier ones, by name.
        """
        given = {f"{name}{BEFORE}": array for name, array in before.items()}
        made = call(self._body, {"sample": sample, "timestep": timestep, **inputs, SCALE: scale, **given})
        return {name: made[name] for name in self._residuals}

    @property
    def body(self) -> DeviceNetwork:
        """The network that rows call, on a GPU."""
        return cast(DeviceNetwork, self._body.open())


def _scales(control: Control, rows: int) -> Float32:
    """Return `Applied.scales`: row i acts where i/rows is not before the start, and (i + 1)/rows not after the end."""
    acts = [not (row / rows < control.start or (row + 1) / rows > control.end) for row in range(rows)]
    return np.asarray(acts, np.float32) * np.float32(control.scale)


def controlnets_of(typed: Iterable[str], option: str = "--controlnet") -> dict[str, Path]:
    """Return bundles by the names that requests have for them, of an option's NAME=BUNDLE. Raise RequestError."""
    return {name: Path(text) for name, text in named(typed, option, "NAME=BUNDLE, as in edges=canny/").items()}


def controlled(bundle: Bundle, add_ons: Iterable[ModelSpec]) -> Bundle:
    """Return a model's bundle with the denoiser that adds what add-ons give in the place of its own, if there are any.

    Raises:
        BundleError: it has none.
    """
    spec, kinds = bundle.spec, [one.kind for one in add_ons]
    if not kinds:
        return bundle
    adapted = T2I_ADAPTER in kinds
    network = spec.networks[spec.denoiser].controlled(FEATURED if adapted else CONTROLLED)
    if network is None:
        what = "features of T2I-Adapters" if adapted else "residuals of ControlNets"
        needed = "a bundle of a UNet with text, exported from a checkpoint by this version"
        raise BundleError(f"the denoiser of {spec.id} reads no {what}", needed=needed, fix=EXPORT)
    return replace(bundle, spec=replace(spec, networks={**spec.networks, spec.denoiser: network}))


def open_controls(bundles: Mapping[str, Bundle], model: ModelSpec, backend: Backend) -> tuple[ControlNet, ...]:
    """Return ControlNets and T2I-Adapters beside a model; their networks are loaded when they are needed.

    Args:
        bundles: by the names that requests have for them.
        model: with the denoiser of `controlled`.
        backend: runs the networks.

    Raises:
        RequestError: as of `check_fits`.
    """
    check_fits(bundles, model)
    return tuple(ControlNet(name, number, bundles[name], backend) for number, name in enumerate(bundles))


def check_request(request: Request, controls: Sequence[ControlNet], model: str) -> None:
    """Refuse a request with a control that is not there, or one that cannot do it. Raise RequestError."""
    kinds = {one.name: one.spec.kind for one in controls}
    if unknown := [name for name in request.control if name not in kinds]:
        raise RequestError(
            f"there is a control {unknown[0]!r}, and {model} is loaded with {', '.join(kinds) or 'none'}",
            needed="a ControlNet or T2I-Adapter of that name",
            fix="load it: control={'NAME': folder}, --controlnet NAME=FOLDER",
        )
    for one in controls:
        if one.spec.kind == CONTROLNET_UNION and one.name in request.control:
            one.type_of(request.control[one.name])
    if typed := [
        name for name, one in request.control.items() if one.type is not None and kinds[name] != CONTROLNET_UNION
    ]:
        found = f"the control {typed[0]!r} has the type {request.control[typed[0]].type!r}"
        raise RequestError(found, needed="a ControlNet Union: others read one kind", fix="leave type out")
    if guessed := [name for name, one in request.control.items() if one.guess and kinds[name] == T2I_ADAPTER]:
        found = f"guess is set for the T2I-Adapter {guessed[0]!r}"
        raise RequestError(found, needed="a ControlNet: an adapter has no guess mode", fix="leave guess out")
    if request.control and request.cache_interval > 1:
        found = f"cache_interval is {request.cache_interval} and there is a control"
        raise RequestError(found, needed="one of them: shallow rows read no residuals", fix="leave cache_interval out")


def check_fits(bundles: Mapping[str, Bundle], model: ModelSpec) -> None:
    """Refuse bundles, by the names that requests have for them, that are no add-ons, or are for other models.

    Args:
        model: with the denoiser of `controlled`.

    Raises:
        RequestError: one does not fit, or the model takes none.
    """
    filled = inputs_of([model.networks[name] for name in (*model.named(CONDITIONER), model.denoiser)])
    if bundles and "beside" in filled and filled["beside"].shape[1] == model.latents.channels:
        found = f"{model.id} edits pictures, and its pictures take three lanes"
        raise RequestError(found, needed="a model of two lanes for ControlNets and T2I-Adapters")
    for name, bundle in bundles.items():
        _check_fits(name, bundle.spec, model, filled)


def _check_fits(name: str, own: ModelSpec, model: ModelSpec, filled: Mapping[str, TensorSpec]) -> None:
    """Refuse a bundle that is no add-on, or whose latents, inputs or residuals are others than the model's."""
    if own.kind not in (*CONTROLNETS, T2I_ADAPTER):
        raise RequestError(
            f"{own.id}, loaded as the control {name!r}, is none",
            needed="the bundle of a ControlNet or T2I-Adapter",
            fix="export one: latentrt export CONTROLNET BUNDLE",
        )
    prefix = RESIDUAL if own.kind in CONTROLNETS else ADAPTER
    body, denoiser = own.networks[own.named(CONTROL)[0]], model.networks[model.denoiser]
    gives, reads = (
        {tensor.name: tensor.shape for tensor in tensors if tensor.name.startswith(prefix)}
        for tensors in (body.outputs, denoiser.inputs)
    )
    hint, inputs = own.networks[own.named(HINT)[0]], {tensor.name for tensor in body.inputs}
    hints = [tensor.name for tensor in hint.outputs]
    expected = {*hints, SCALE, FACTORS, *(f"{key}{BEFORE}" for key in gives)}
    latents, needed = own.latents, model.latents
    pairs: list[tuple[str, Any, Any]] = [("latents of the factor", latents.factor, needed.factor)]
    if own.kind in CONTROLNETS:
        pairs += [("latents of so many channels:", latents.channels, needed.channels), ("hints", hints, [HINT])]
        expected |= {*OWN, *([TYPE] if own.kind == CONTROLNET_UNION else [])}
    pairs += [
        (f"the input {key}", one.shape, filled[key].shape if key in filled else None) for key, one in _read(own).items()
    ]
    pairs += [
        ("a hint network from", [tensor.name for tensor in hint.inputs], [PICTURE]),
        ("inputs without", sorted(expected - inputs), []),
    ]
    # A T2I-Adapter may give less than a UNet has places for, as in diffusers.
    both = gives | reads if own.kind in CONTROLNETS else gives
    pairs += [(f"residuals ({len(gives)} and {len(reads)}): {key}", gives.get(key), reads.get(key)) for key in both]
    for what, found, wanted in pairs:
        if found != wanted:
            raise RequestError(
                f"the {ADD_ONS[own.kind]} {own.id} has {what} {found or 'none'}",
                needed=f"{wanted or 'none'}, as {model.id} has",
                fix=f"take a {ADD_ONS[own.kind]} that was trained for this kind of model",
            )


def _read(spec: ModelSpec) -> dict[str, TensorSpec]:
    """Return what an add-on reads of what a model's conditioners fill."""
    own = {*OWN, SCALE, FACTORS, TYPE, *(tensor.name for tensor in spec.networks[spec.named(HINT)[0]].outputs)}
    read = inputs_of([spec.networks[name] for name in (*spec.named(CONDITIONER), *spec.named(CONTROL))])
    return {name: one for name, one in read.items() if name not in own and not name.endswith(BEFORE)}
