"""What a bundle is (ModelSpec, read from `manifest.json`) and what a user asks for (Request).

Plain frozen data, checked where it is made; nothing here opens a file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from engine.errors import BundleError, RequestError

SCHEMA = 1
FAMILIES = ("sd", "sdxl")
MAX_SEED = 2**64 - 1


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output of a graph; symbolic dimensions are names ("batch"), fixed ones are numbers."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class GraphSpec:
    """One ONNX file of a bundle with its typed signature."""

    path: str
    opset: int
    nodes: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True)
class LatentSpec:
    """Shape and range of the latents. `scale` and `shift` are the VAE's: z = (encoded - shift) * scale."""

    channels: int
    factor: int
    scale: float
    shift: float
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class Golden:
    """A run whose latents are known: the cheapest proof that a bundle still makes what it made when exported."""

    prompt: str
    negative_prompt: str
    solver: str
    steps: int
    seed: int
    guidance: float
    mean: float
    std: float
    first: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Everything the engine must know about a model before it loads a weight.

    `text_encoders` and `tokenizers` are folder names of the bundle, in the order in which the UNet's text states
    are concatenated (one for SD 1 and 2, two for SDXL). `graphs` maps a network's name ("text_encoder",
    "text_encoder_2", "unet", "vae_decoder", "vae_encoder") to its graph.
    """

    id: str
    revision: str | None
    license: str | None
    family: str
    latents: LatentSpec
    tokenizers: tuple[str, ...]
    text_encoders: tuple[str, ...]
    schedule: str
    graphs: Mapping[str, GraphSpec]
    zero_negative: bool = False
    made: Mapping[str, Any] = field(default_factory=dict)
    golden: tuple[Golden, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The manifest's "model" part, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelSpec:
        """Read the manifest's "model" part.

        Raises:
            BundleError: a field is missing, unknown or of the wrong kind.
        """
        try:
            fields = dict(data)
            graphs = {name: _graph(graph) for name, graph in fields.pop("graphs").items()}
            latents = LatentSpec(**fields.pop("latents"))
            golden = tuple(
                Golden(**{**g, "first": tuple(float(v) for v in g["first"])}) for g in fields.pop("golden", ())
            )
            tokenizers, encoders = tuple(fields.pop("tokenizers")), tuple(fields.pop("text_encoders"))
            spec = cls(
                **fields,
                latents=latents,
                tokenizers=tokenizers,
                text_encoders=encoders,
                graphs=graphs,
                golden=golden,
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise BundleError(
                f"manifest.json has a model part that cannot be read ({error!r})",
                f"the fields of manifest schema {SCHEMA}",
                "export the checkpoint again: latentrt export CHECKPOINT BUNDLE",
            ) from error
        if spec.family not in FAMILIES:
            raise BundleError(
                f"manifest.json names the family {spec.family!r}",
                f"one of {', '.join(FAMILIES)}",
                "update latentrt, or export the checkpoint again: latentrt export CHECKPOINT BUNDLE",
            )
        return spec


def _graph(data: Mapping[str, Any]) -> GraphSpec:
    def tensors(key: str) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(t["name"], t["dtype"], tuple(t["shape"])) for t in data[key])

    return GraphSpec(data["path"], data["opset"], data["nodes"], tensors("inputs"), tensors("outputs"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One picture, or `count` of them, as a user asks for it.

    `seed` belongs to the first picture; picture i has seed + i, so a picture never depends on its siblings.
    `guidance` is classifier-free guidance's scale: 1 (or less) runs one lane, above 1 two. `guidance_interval` is the
    part of the run, as fractions of its rows, in which guidance acts. `solver` None means the class that the bundle's
    scheduler_config.json names, `height` and `width` None the size the model was trained at (pixels), `negative_prompt`
    None what it was trained with for no prompt: empty text or, for some, zeros. `noise` names the torch generator whose
    numbers a seed stands for. `options` go to `tabulate`: eta, use_karras_sigmas, timestep_spacing, ...

    Raises:
        RequestError: a value is out of range.
    """

    prompt: str
    negative_prompt: str | None = None
    steps: int = 20
    solver: str | None = None
    seed: int = 0
    guidance: float = 3.0
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    height: int | None = None
    width: int | None = None
    count: int = 1
    noise: str = "torch-cpu"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _whole("steps", self.steps, 1, 10_000)
        _whole("count", self.count, 1, 10_000)
        _whole("seed", self.seed, 0, MAX_SEED)
        for name in ("height", "width"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 1, 65_536)
        _number("guidance", self.guidance, 0.0, 1e6)
        _number("guidance_rescale", self.guidance_rescale, 0.0, 1.0)
        start, end = self.guidance_interval
        _number("guidance_interval's start", start, 0.0, 1.0)
        _number("guidance_interval's end", end, start, 1.0)


def _whole(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"{name} is {value!r}", f"a whole number from {low} to {high}", f"pass another {name}")


def _number(name: str, value: object, low: float, high: float) -> None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not low <= float(value) <= high:  # type: ignore[arg-type]
        raise RequestError(f"{name} is {value!r}", f"a finite number from {low:g} to {high:g}", f"pass another {name}")
