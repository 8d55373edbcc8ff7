"""What a bundle is: ModelSpec, read from `manifest.json`.

Plain frozen data, checked where it is made; nothing here opens a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from latentrt.errors import BundleError, RequestError
from latentrt.values import is_number, is_text, is_whole

SCHEMA = 1
FAMILIES = ("sd", "sdxl")
DTYPES = ("float16", "float32", "float64", "int32", "int64", "uint8", "bool")
EXPORT = "export the checkpoint again: latentrt export CHECKPOINT BUNDLE"


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

    def shape_of(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """The latents' (channels, height, width) of a picture's size in pixels; None is the model's own.

        Raises:
            RequestError: a side is not a multiple of the factor.
        """
        sides = []
        for name, pixels, own in (("height", height, self.height), ("width", width, self.width)):
            side, rest = (own, 0) if pixels is None else divmod(pixels, self.factor)
            if rest:
                lower = max(side, 1) * self.factor
                fix = f"take {lower} or {lower + self.factor}"
                raise RequestError(f"{name} is {pixels}", needed=f"a multiple of {self.factor}", fix=fix)
            sides.append(side)
        return self.channels, sides[0], sides[1]

    def pixels_of(self, height: int | None, width: int | None) -> tuple[int, int]:
        """A picture's (height, width) in pixels; None is the model's own. Raises RequestError as `shape_of`."""
        _, rows, columns = self.shape_of(height, width)
        return rows * self.factor, columns * self.factor


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
class Islands:
    """The nodes that a network's half graph keeps in float32, and the largest number measured anywhere in the network.

    float16 ends at 65504. What only holds the times (the sinusoidal embedding) is float32 always and not listed.
    """

    largest: float
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Everything the engine must know about a model before it loads a weight.

    `text_encoders` and `tokenizers` are folder names of the bundle, in the order in which the UNet's text states
    are concatenated (one for SD 1 and 2, two for SDXL). `graphs` maps a network's name ("text_encoder",
    "text_encoder_2", "unet", "vae_decoder", "vae_encoder") to its graph. `half` has the same networks in float16 with
    `islands` of float32, `cuda` the half graphs as ONNX Runtime's CUDA provider runs them; bundles of before have none
    of the three.
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
    half: Mapping[str, GraphSpec] = field(default_factory=dict)
    islands: Mapping[str, Islands] = field(default_factory=dict)
    cuda: Mapping[str, GraphSpec] = field(default_factory=dict)

    def graph(self, network: str, precision: str) -> GraphSpec:
        """A network's graph in "fp32" or "fp16".

        Raises:
            BundleError: the bundle has none.
        """
        graphs = {"fp32": self.graphs, "fp16": self.half}.get(precision)
        if graphs is None or network not in graphs:
            raise BundleError(
                f"{self.id} has no {network} in {precision}", needed="one of its own: fp32 or fp16", fix=EXPORT
            )
        return graphs[network]

    def cuda_graph(self, network: str) -> GraphSpec:
        """A network's float16 graph for ONNX Runtime's CUDA provider.

        Raises:
            BundleError: the bundle has none.
        """
        if network not in self.cuda:
            raise BundleError(
                f"{self.id} has no {network} for ONNX Runtime's CUDA provider",
                needed="a graph of its own (model.cuda.onnx)",
                fix=EXPORT,
            )
        return self.cuda[network]

    def to_dict(self) -> dict[str, Any]:
        """The manifest's "model" part, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelSpec:
        """Read the manifest's "model" part.

        Raises:
            BundleError: a field is missing, unknown or of the wrong kind or out of range; each by its name.
        """
        try:
            fields = dict(data)
            graphs, half, cuda = (
                {name: _graph(graph) for name, graph in part.items()}
                for part in (fields.pop("graphs"), fields.pop("half", {}), fields.pop("cuda", {}))
            )
            islands = {name: Islands(i["largest"], tuple(i["nodes"])) for name, i in fields.pop("islands", {}).items()}
            latents = LatentSpec(**fields.pop("latents"))
            golden = tuple(
                Golden(**{**g, "first": tuple(float(v) for v in g["first"])}) for g in fields.pop("golden", ())
            )
            tokenizers, encoders = (_texts(name, fields.pop(name)) for name in ("tokenizers", "text_encoders"))
            spec = cls(
                **fields,
                latents=latents,
                tokenizers=tokenizers,
                text_encoders=encoders,
                graphs=graphs,
                golden=golden,
                half=half,
                islands=islands,
                cuda=cuda,
            )
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise BundleError(
                f"manifest.json has a model part that cannot be read ({error!r})",
                needed=f"the fields of manifest schema {SCHEMA}",
                fix=EXPORT,
            ) from error
        _check(spec)
        return spec


def _graph(data: Mapping[str, Any]) -> GraphSpec:
    def tensors(key: str) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(t["name"], t["dtype"], tuple(t["shape"])) for t in data[key])

    return GraphSpec(data["path"], data["opset"], data["nodes"], tensors("inputs"), tensors("outputs"))


def _texts(name: str, value: object) -> tuple[str, ...]:
    _need(isinstance(value, (list, tuple)) and value and all(map(is_text, value)), name, value, "a list of names")
    return tuple(value)  # type: ignore[arg-type]


def _check(spec: ModelSpec) -> None:
    """Every field's kind and range, so that nothing that reads a manifest has to doubt it.

    Raises:
        BundleError: the first field that is wrong, by its name.
    """
    _need(spec.family in FAMILIES, "family", spec.family, f"one of {', '.join(FAMILIES)}")
    for name in ("id", "schedule"):
        _need(is_text(getattr(spec, name)), name, getattr(spec, name), "text")
    for name in ("revision", "license"):
        value = getattr(spec, name)
        _need(value is None or isinstance(value, str), name, value, "text or null")
    _need(isinstance(spec.zero_negative, bool), "zero_negative", spec.zero_negative, "true or false")
    _need(isinstance(spec.made, Mapping), "made", spec.made, "an object")
    _check_latents(spec.latents)
    encoders, tokenizers = spec.text_encoders, spec.tokenizers
    _need(len(encoders) == len(tokenizers), "tokenizers", tokenizers, f"as many as text_encoders: {len(encoders)}")
    for name in (*encoders, "unet", "vae_decoder"):
        _need(name in spec.graphs, "graphs", list(spec.graphs), f"a graph {name!r}")
    for name, graph in spec.graphs.items():
        _need(name.isidentifier(), "graphs", name, "networks' names, letters and underscores")
        _check_graph(f"graphs.{name}", graph)
    for part in ("half", "cuda"):
        for name, graph in getattr(spec, part).items():
            _need(name in spec.graphs, part, name, f"one of {', '.join(spec.graphs)}")
            _check_graph(f"{part}.{name}", graph)
    for name, islands in spec.islands.items():
        _need(name in spec.half, "islands", name, f"one of {', '.join(spec.half) or 'no network'}")
        _need(is_number(islands.largest), f"islands.{name}.largest", islands.largest, "a finite number")
        _need(all(map(is_text, islands.nodes)), f"islands.{name}.nodes", islands.nodes, "names of nodes")
    for golden in spec.golden:
        _check_golden(golden)


def _check_latents(latents: LatentSpec) -> None:
    for name in ("channels", "factor", "height", "width"):
        value = getattr(latents, name)
        _need(is_whole(value) and 1 <= value <= 65_536, f"latents.{name}", value, "a whole number from 1 to 65536")
    _need(is_number(latents.scale) and latents.scale != 0, "latents.scale", latents.scale, "a finite number, not 0")
    _need(is_number(latents.shift), "latents.shift", latents.shift, "a finite number")


def _check_graph(where: str, graph: GraphSpec) -> None:
    _need(is_text(graph.path), f"{where}.path", graph.path, "text")
    for name in ("opset", "nodes"):
        value = getattr(graph, name)
        _need(is_whole(value) and value >= 0, f"{where}.{name}", value, "a whole number")
    for tensor in (*graph.inputs, *graph.outputs):
        _need(is_text(tensor.name), f"{where}: a tensor's name", tensor.name, "text")
        where_tensor = f"{where}.{tensor.name}"
        _need(tensor.dtype in DTYPES, f"{where_tensor}.dtype", tensor.dtype, f"one of {', '.join(DTYPES)}")
        sides = all(is_text(side) or (is_whole(side) and int(side) >= 0) for side in tensor.shape)
        _need(sides, f"{where_tensor}.shape", tensor.shape, "whole numbers and names")


def _check_golden(golden: Golden) -> None:
    texts = (golden.prompt, golden.negative_prompt, golden.solver)
    _need(all(isinstance(text, str) for text in texts), "golden's prompts and solver", texts, "text")
    for name in ("steps", "seed"):
        _need(is_whole(getattr(golden, name)), f"golden.{name}", getattr(golden, name), "a whole number")
    numbers = (golden.guidance, golden.mean, golden.std, *golden.first)
    _need(all(map(is_number, numbers)) and golden.std > 0, "golden's numbers", numbers, "finite, with std above 0")


def _need(good: object, field: str, value: object, needed: str) -> None:
    if not good:
        raise BundleError(f"manifest.json has {field} = {value!r}", needed=needed, fix=f"update latentrt, or {EXPORT}")
