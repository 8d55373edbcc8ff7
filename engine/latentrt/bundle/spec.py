"""The contents of a bundle as frozen data: networks with their signatures and graphs, latents, defaults, known runs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple

from latentrt.bundle.golden import Golden
from latentrt.errors import BundleError, RequestError

ROLES = ("text_encoder", "conditioner", "denoiser", "shallow", "decoder", "encoder", "hint", "control")
TEXT_ENCODER, CONDITIONER, DENOISER, SHALLOW, DECODER, ENCODER, HINT, CONTROL = ROLES
KINDS = ("model", "controlnet", "controlnet_union", "t2i_adapter", "ip_adapter")  # of bundles; a VAE alone is a "model"
MODEL, CONTROLNET, CONTROLNET_UNION, T2I_ADAPTER, IP_ADAPTER = KINDS
CONTROLNETS = (CONTROLNET, CONTROLNET_UNION)
_NAMES = ("ControlNet", "ControlNet Union", "T2I-Adapter", "IP-Adapter")  # as people have them
ADD_ONS = dict(zip(KINDS[1:], _NAMES, strict=True))
FP32, FP32_ORT_CPU = "fp32", "fp32-ort-cpu"  # variants that export writes; all but the first are optional
FP16, FP16_ORT_CUDA = "fp16", "fp16-ort-cuda"
ADAPTED = "+lora"  # ends the names of variants that take LoRAs of each lane too
LORA = "lora."  # begins the names of these inputs: lora.MODULE.down (in, rank) and lora.MODULE.up (rank, out)
CONTROLLED = "+control"  # ends the names of the denoiser's variants that read residuals of ControlNets too
FEATURED = "+adapter"  # and of those that read features of T2I-Adapters as well
RESIDUAL = "residual_"  # begins the names of these: residual_0, residual_1, ..., residual_mid
ADAPTER = "adapter_"  # and of a T2I-Adapter's: adapter_0, adapter_1, ...
PROMPTED = "+ip_adapter"  # and of those that read keys and values of image prompts, of each of the above too
IMAGE_KEYS, IMAGE_VALUES = "image_keys.", "image_values."  # begin the names of these: image_keys.PLACE
TAKEN = {ADAPTED: (LORA,), PROMPTED: (IMAGE_KEYS, IMAGE_VALUES)}
INT8, INT8_ORT_CPU = "int8", "int8-ort-cpu"  # a precision, and the graph that a denoiser has for it


class Dimension(NamedTuple):
    """(factor * name + added) // divisor."""

    name: str
    factor: int = 1
    divisor: int = 1
    added: int = 0

    def of(self, size: int) -> int:
        """Return the dimension where the name has this size."""
        return (self.factor * size + self.added) // self.divisor


@cache
def dimension(side: str) -> Dimension:
    """Read a symbolic dimension: "height", "8*height", "(height//8)", "((height+7)//8)". Raise KeyError for others."""
    parts = re.fullmatch(r"(?:(\d+)\*)?\(?(?:\((\w+)\+(\d+)\)|(\w+?))(?://(\d+))?\)?", side)
    if parts is None:
        raise KeyError(side)
    factor, sum_of, added, name, divisor = parts.groups()
    return Dimension(sum_of or name, int(factor or 1), int(divisor or 1), int(added or 0))


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output of a graph. A dimension is a number, a name ("batch") or a product of one ("8*height")."""

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
class Islands:
    """The nodes that a float16 graph keeps in float32, and the largest number measured anywhere in the network.

    float16 ends at 65504. Nodes that hold only the times (the sinusoidal embedding) are always float32 and not listed.
    """

    largest: float
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Variant:
    """One graph of a network.

    Attributes:
        path: the ONNX file in the bundle.
        opset, nodes: of the file.
        dtypes: of the inputs and outputs whose dtype is not the network's own.
        islands: of a float16 graph: what it keeps in float32.
        inputs: that this graph reads after the network's own.
    """

    path: str
    opset: int
    nodes: int
    dtypes: Mapping[str, str] = field(default_factory=dict)
    islands: Islands | None = None
    inputs: tuple[TensorSpec, ...] = ()


@dataclass(frozen=True, slots=True)
class NetworkSpec:
    """A network's role, its inputs and outputs, and its graphs.

    Attributes:
        role: one of ROLES.
        inputs, outputs: the signature of its float32 graph.
        variants: graphs by name: "fp32", "fp32-ort-cpu", "fp16", ... A runtime says which it runs. They may be there
            again with "+lora" or, a denoiser's, "+control", "+adapter", "+ip_adapter": see `adapted`, `controlled`.
        tokenizer: the folder of a text encoder's tokenizer.
    """

    role: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    variants: Mapping[str, Variant]
    tokenizer: str | None = None

    def graph(self, name: str) -> GraphSpec:
        """Return a variant with its whole signature. Raise KeyError where none has that name."""
        variant = self.variants[name]
        inputs, outputs = (
            tuple(TensorSpec(t.name, variant.dtypes.get(t.name, t.dtype), t.shape) for t in tensors)
            for tensors in ((*self.inputs, *variant.inputs), self.outputs)
        )
        return GraphSpec(variant.path, variant.opset, variant.nodes, inputs, outputs)

    def adapted(self, ending: str = ADAPTED) -> NetworkSpec:
        """Return the network of the variants with an ending of TAKEN; itself where it has none."""
        ends = {name: one for name, one in self.variants.items() if name.endswith(ending)}
        if not ends:
            return self
        given = TAKEN[ending]
        taken = tuple(t for t in next(iter(ends.values())).inputs if t.name.startswith(given))
        variants = {
            name.removesuffix(ending): replace(one, inputs=tuple(t for t in one.inputs if not t.name.startswith(given)))
            for name, one in ends.items()
        }
        return replace(self, inputs=(*self.inputs, *taken), variants=variants)

    def controlled(self, ending: str = CONTROLLED) -> NetworkSpec | None:
        """Return the network of the variants with an ending, CONTROLLED or FEATURED; None where it has none."""
        ends = {name: one for name, one in self.variants.items() if name.endswith(ending)}
        if not ends:
            return None
        variants = {name.removesuffix(ending): replace(one, inputs=()) for name, one in ends.items()}
        residuals = next(iter(ends.values())).inputs
        return replace(self, inputs=(*self.inputs, *residuals), variants=variants)


@dataclass(frozen=True, slots=True)
class LatentSpec:
    """Shape and range of what is denoised: a VAE's latents, or pixels.

    Attributes:
        channels: of the latents.
        factor: pixels a side of each latent; 1 for pixel models.
        scale, shift: z = (encoded - shift) * scale.
        height, width: of the latents of the size that the model was trained at.
        multiple: sides of latents are multiples of it.
    """

    channels: int
    factor: int
    scale: float
    shift: float
    height: int
    width: int
    multiple: int = 1

    @property
    def step(self) -> int:
        """The number that sides in pixels are multiples of."""
        return self.factor * self.multiple

    def shape_of(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """Return the latents' (channels, height, width) of a picture's size in pixels; None is the model's own.

        Raises:
            RequestError: a side is not a multiple of `step`.
        """
        sides = []
        for name, pixels, own in (("height", height, self.height), ("width", width, self.width)):
            if pixels is not None and pixels % self.step:
                lower = max(pixels // self.step, 1) * self.step
                fix = f"take {lower} or {lower + self.step}"
                raise RequestError(f"{name} is {pixels}", needed=f"a multiple of {self.step}", fix=fix)
            sides.append(own if pixels is None else pixels // self.factor)
        return self.channels, sides[0], sides[1]

    def pixels_of(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Return a picture's (height, width) in pixels; None is the model's own. Raise RequestError as `shape_of`."""
        _, rows, columns = self.shape_of(height, width)
        return rows * self.factor, columns * self.factor

    def enlarged(self, height: int | None, width: int | None, scale: float) -> tuple[int, int]:
        """Return a picture's (height, width) in pixels, enlarged, down to a multiple of `step`. Raise as `shape_of`."""
        height, width = (int(side * scale) // self.step * self.step for side in self.pixels_of(height, width))
        return height, width


@dataclass(frozen=True, slots=True)
class Defaults:
    """Values for a request that does not set them: steps, guidance scale, solver (None: the schedule's own class)."""

    steps: int = 20
    guidance: float = 3.0
    solver: str | None = None


@dataclass(frozen=True, slots=True)
class Correction:
    """A setting that diffusers' pipeline changes when it is made with the checkpoint; the file keeps the old one.

    Attributes:
        file, key: the setting's place in the bundle.
        found: its value there, or its class's default where it is missing.
        value: what the pipeline makes of it.
        why: who does it, and where.
    """

    file: str
    key: str
    found: Any
    value: Any
    why: str

    def __str__(self) -> str:
        return f"{self.file}: {self.key} is {self.found!r}, and drawn with {self.value!r} ({self.why})"


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Everything the engine needs to know about a model before it loads a weight.

    Attributes:
        id, revision, license: of the checkpoint.
        latents: what is denoised.
        schedule: the path of scheduler_config.json; None where there is no denoiser.
        networks: by name ("text_encoder", "unet", "vae_decoder", ...). One is the denoiser; none in the bundle of a
            VAE alone. Text encoders are in the order in which their states are concatenated. A model without a decoder
            denoises pixels.
        zero_negative: whether the states of a missing negative prompt are zeros.
        scaled_picture: whether a picture that is edited by instruction is shown scaled as latents are (CosXL Edit).
        keeps_steps: whether LCM's runs on a given picture make all steps at any strength; see `tabulate`.
        classes: how many classes a class-conditional model was trained with.
        low_schedule: of a model that enlarges pictures, the path of the scheduler_config.json of the noise that the
            given picture gets.
        max_noise_level: how much of it at most, a timestep.
        defaults: for requests that do not set them.
        corrections: settings that are not used as the bundle's files have them.
        made: how the bundle was made.
        golden: runs whose latents are known.
        kind: one of KINDS: a model, or what is added to one.
        conditional_only: whether a ControlNet acts on the lane with the prompt alone, as diffusers runs those that pool
            their residuals.
    """

    id: str
    revision: str | None
    license: str | None
    latents: LatentSpec
    schedule: str | None
    networks: Mapping[str, NetworkSpec]
    zero_negative: bool = False
    scaled_picture: bool = False
    keeps_steps: bool = False
    classes: int | None = None
    low_schedule: str | None = None
    max_noise_level: int | None = None
    defaults: Defaults = Defaults()
    corrections: tuple[Correction, ...] = ()
    made: Mapping[str, Any] = field(default_factory=dict)
    golden: tuple[Golden, ...] = ()
    kind: str = MODEL
    conditional_only: bool = False

    def named(self, role: str) -> tuple[str, ...]:
        """Return the names of the networks of a role, in their order."""
        return tuple(name for name, network in self.networks.items() if network.role == role)

    @property
    def tokens(self) -> int:
        """The length of a chunk of a prompt: how many tokens the text encoders read; 0 where there are none."""
        return max((int(self.networks[name].inputs[0].shape[1]) for name in self.named(TEXT_ENCODER)), default=0)

    def corrected(self, file: str) -> dict[str, Any]:
        """Return the corrections of a file's settings, by their names."""
        return {each.key: each.value for each in self.corrections if each.file == file}

    @property
    def draws(self) -> bool:
        """Whether it is a model; the bundle of a VAE alone has no denoiser."""
        return bool(self.named(DENOISER))

    @property
    def denoiser(self) -> str:
        """The name of the network that every row calls.

        Raises:
            BundleError: there is none.
        """
        if not self.draws:
            name = ADD_ONS.get(self.kind, "VAE")
            option = {MODEL: "--vae, --preview-vae", IP_ADAPTER: "--ip-adapter-model"}.get(self.kind, "--controlnet")
            found = f"{self.id} has no denoiser: it is {'an' if self.kind == IP_ADAPTER else 'a'} {name}"
            raise BundleError(found, needed="a model", fix=f"pass it beside one: {option}")
        return self.named(DENOISER)[0]

    def graph(self, network: str, *variants: str) -> GraphSpec:
        """Return the first of these variants that a network has.

        Raises:
            BundleError: the bundle has none of them.
        """
        if network not in self.networks:
            raise BundleError(f"{self.id} has no {network}", needed=f"one of {', '.join(self.networks)}")
        known = self.networks[network]
        chosen = next((variant for variant in variants if variant in known.variants), None)
        if chosen is None:
            wanted = " or ".join(variants)
            raise BundleError(f"{self.id} has the {network} in {', '.join(known.variants)}", needed=f"it in {wanted}")
        return known.graph(chosen)

    def graphs(self, variant: str = FP32) -> dict[str, GraphSpec]:
        """Return the graphs of a variant by the names of the networks that have it."""
        return {name: one.graph(variant) for name, one in self.networks.items() if variant in one.variants}

    def to_dict(self) -> dict[str, Any]:
        """Return the manifest's "model" part, ready for JSON."""
        return asdict(self)
