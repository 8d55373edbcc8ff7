"""Give a graph that others made the inputs and outputs of ours: names, types, shapes.

The names on our side are the contract between a bundle's graphs and the engine (`latentrt_export.graphs.wrap`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as common

from latentrt.bundle.spec import TensorSpec
from latentrt.errors import ExportError
from latentrt_export.checkpoint.onnx_folder import EXPORT_AGAIN
from latentrt_export.checkpoint.source import Checkpoint
from latentrt_export.describe import latents_of, tokens_of
from latentrt_export.existing.timestep import per_lane

FLOAT, INT = ir.DataType.FLOAT, ir.DataType.INT64
Shape = tuple[int | str, ...]
CROSS = "cross_attention_dim"


@dataclass(frozen=True, slots=True)
class Contract:
    """A network's tensors on both sides.

    Attributes:
        inputs: ours by name, with the names of theirs; "sample" and "beside" are one in theirs, along the channels.
        outputs: ours by name, with the names of theirs.
        shapes: of our tensors.
    """

    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    shapes: Mapping[str, Shape]

    def whole(self) -> dict[str, Shape]:
        """Return the shapes of their inputs, by their names."""
        shapes: dict[str, Shape] = {}
        for own, theirs in self.inputs.items():
            batch, *sides = self.shapes[own]
            if theirs in shapes:  # "beside" after "sample"
                sides[0] = int(sides[0]) + int(shapes[theirs][1])
            shapes[theirs] = (batch, *sides)
        return shapes

    def specs(self) -> tuple[TensorSpec, ...]:
        """Return our inputs."""
        kinds = {"input_ids": "int64"}
        return tuple(TensorSpec(name, kinds.get(name, "float32"), self.shapes[name]) for name in self.inputs)


def contract_of(model: ir.Model, checkpoint: Checkpoint, name: str) -> Contract:
    """Return a network's contract.

    Args:
        model: the graph as its makers wrote it.
        checkpoint: the folder that it belongs to.
        name: of the network.

    Raises:
        ExportError: an input or output is missing, is not known, or has a fixed batch, height or width.
    """
    graph = Named(model.graph, f"{name}/model.onnx")
    contract = _CONTRACTS.get(name, _text_encoder)(graph, checkpoint, name)
    unknown = sorted(set(graph.inputs) - set(contract.inputs.values()))
    if unknown:
        raise ExportError(f"{graph.path} has the input {unknown[0]!r}", needed=", ".join(contract.inputs.values()))
    for theirs, shape in contract.whole().items():
        graph.check_free(theirs, shape)
    return contract


class Named:
    """The inputs and outputs of a graph, by name. `path` is for messages."""

    def __init__(self, graph: ir.Graph, path: str) -> None:
        self.path = path
        self.inputs = {str(value.name): value for value in graph.inputs}
        self.outputs = {str(value.name): value for value in graph.outputs}

    def input(self, *names: str) -> str:
        """Return the first of these names that is an input. Raise ExportError where none is."""
        return self._first(self.inputs, names, "input")

    def output(self, *names: str) -> str:
        """Return the first of these names that is an output. Raise ExportError where none is."""
        return self._first(self.outputs, names, "output")

    def check_free(self, name: str, wanted: Shape) -> None:
        """Refuse an input whose batch, height or width is fixed. Raise ExportError."""
        shape = self.inputs[name].shape
        if shape is None or len(shape) != len(wanted):
            return
        for side, own in zip(shape, wanted, strict=True):
            if isinstance(side, int) and isinstance(own, str):
                found = f"{self.path} has {name} of {list(map(str, shape))}: its {own} is fixed"
                raise ExportError(found, needed="batch, height and width free", fix=EXPORT_AGAIN)
            if isinstance(side, int) and isinstance(own, int) and side != own:
                found = f"{self.path} has {name} of {list(map(str, shape))}"
                raise ExportError(found, needed=f"{own} in the place of {side}, as config.json says")

    def _first(self, named: Mapping[str, ir.Value], names: Sequence[str], what: str) -> str:
        for name in names:
            if name in named:
                return name
        found = f"{self.path} has the {what}s {', '.join(named)}"
        raise ExportError(found, needed=f"the {what} {' or '.join(names)}", fix=EXPORT_AGAIN)


def _text_encoder(graph: Named, checkpoint: Checkpoint, name: str) -> Contract:
    config, tokens = checkpoint.configs[name], tokens_of(checkpoint)
    states = "last_hidden_state"
    if len(checkpoint.text_encoders) > 1:
        states = f"hidden_states.{_layers(graph, config) - 1}"
        if states not in graph.outputs:
            found = f"{graph.path} has the outputs {', '.join(graph.outputs)}"
            raise ExportError(found, needed=f"{states}, which SDXL's UNet reads", fix=EXPORT_AGAIN)
    outputs = {"text_states": graph.output(states)}
    shapes: dict[str, Shape] = {"input_ids": ("batch", tokens)}
    shapes["text_states"] = ("batch", tokens, _last(graph.outputs[states], config, "hidden_size", graph))
    if name == "text_encoder_2":
        outputs["text_embeds"] = graph.output("text_embeds")
        shapes["text_embeds"] = ("batch", _last(graph.outputs["text_embeds"], config, "projection_dim", graph))
    return Contract({"input_ids": graph.input("input_ids")}, outputs, shapes)


def _layers(graph: Named, config: Mapping[str, Any]) -> int:
    """Return a text encoder's layers. Its hidden states are one more: that of the embedding is the first."""
    given = [name.removeprefix("hidden_states.") for name in graph.outputs if name.startswith("hidden_states.")]
    layers = config.get("num_hidden_layers", max((int(n) for n in given if n.isdecimal()), default=0))
    return int(layers)


def _last(value: ir.Value, config: Mapping[str, Any], key: str, graph: Named) -> int:
    """Return the last dimension of an input or output; where the graph leaves it open, the config's."""
    shape = value.shape
    side = shape[-1] if shape is not None and len(shape) else None
    width = side if isinstance(side, int) else config.get(key)
    if not isinstance(width, int):
        raise ExportError(f"{graph.path} has {value.name} of unknown width", needed=f"{key} in its config.json")
    return width


def _tokens(states: ir.Value, checkpoint: Checkpoint) -> int | str:
    """Return the length of a text: its name where the graph leaves it open."""
    fixed = states.shape is not None and isinstance(states.shape[1], int)
    return tokens_of(checkpoint) if fixed else "tokens"


def _unet(graph: Named, checkpoint: Checkpoint, name: str) -> Contract:
    unet, channels = checkpoint.configs["unet"], latents_of(checkpoint).channels
    beside = int(unet.get("in_channels", 4)) - channels
    sample = graph.input("sample")
    inputs = {"sample": sample, "timestep": graph.input("timestep")}
    inputs["encoder_hidden_states"] = states = graph.input("encoder_hidden_states")
    shapes: dict[str, Shape] = {"sample": ("batch", channels, "height", "width"), "timestep": ("batch",)}
    shapes["encoder_hidden_states"] = (
        *("batch", _tokens(graph.inputs[states], checkpoint)),
        _last(graph.inputs[states], unet, CROSS, graph),
    )
    if len(checkpoint.text_encoders) > 1:
        inputs |= {"text_embeds": graph.input("text_embeds"), "time_ids": graph.input("time_ids")}
        embeds = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
        shapes |= {"text_embeds": ("batch", embeds), "time_ids": ("batch", 6)}
    if dim := unet.get("time_cond_proj_dim"):
        inputs["timestep_cond"] = graph.input("timestep_cond")
        shapes["timestep_cond"] = ("batch", dim)
    if beside:
        inputs["beside"] = sample
        shapes |= {"beside": ("batch", beside, "height", "width")}
    shapes["out"] = ("batch", channels, "height", "width")
    return Contract(inputs, {"out": graph.output("out_sample", *graph.outputs)}, shapes)


def _vae_decoder(graph: Named, checkpoint: Checkpoint, name: str) -> Contract:
    latents = latents_of(checkpoint)
    shapes: dict[str, Shape] = {"latents": ("batch", latents.channels, "height", "width")}
    shapes["image"] = ("batch", 3, f"{latents.factor}*height", f"{latents.factor}*width")
    inputs = {"latents": graph.input("latent_sample", *graph.inputs)}
    return Contract(inputs, {"image": graph.output("sample", *graph.outputs)}, shapes)


def _vae_encoder(graph: Named, checkpoint: Checkpoint, name: str) -> Contract:
    latents = latents_of(checkpoint)
    shapes: dict[str, Shape] = {"image": ("batch", 3, "height", "width")}
    sides = (f"(height//{latents.factor})", f"(width//{latents.factor})")
    shapes["moments"] = ("batch", 2 * latents.channels, *sides)
    output = graph.outputs[graph.output("latent_parameters", "latent_sample", *graph.outputs)]
    moments = _moments_of(output, 2 * latents.channels) or output
    return Contract({"image": graph.input("sample", *graph.inputs)}, {"moments": str(moments.name)}, shapes)


def gives_moments(graph: ir.Graph, channels: int) -> bool:
    """Return whether a VAE encoder's mean and log variance of that many channels each can be told."""
    return len(graph.outputs) > 0 and _moments_of(graph.outputs[0], 2 * channels) is not None


def _moments_of(output: ir.Value, channels: int) -> ir.Value | None:
    """Return a VAE encoder's mean and log variance; None where they cannot be told.

    Exports of 2022 draw a sample from them, with random numbers of the runtime. All it depends on is then the result of
    one convolution, the last one, with that many channels.
    """
    nodes = _above(output)
    if not any(node.op_type.startswith("Random") for node in nodes):
        return output
    for node in nodes:
        kernel = node.inputs[1].const_value if node.op_type == "Conv" else None
        if kernel is not None and kernel.shape[0] == channels:
            kept = _above(output, node)
            reads = [value for other in kept for value in other.inputs if value is not None]
            return None if any(value.is_graph_input() for value in reads) else node.outputs[0]
    return None


def _above(output: ir.Value, end: ir.Node | None = None) -> list[ir.Node]:
    """Return the nodes that a value needs, the nearest first, not beyond `end`."""
    found: dict[ir.Node, None] = {}
    waiting = [output]
    while waiting:
        node = waiting.pop(0).producer()
        if node is not None and node is not end and node not in found:
            found[node] = None
            waiting.extend(value for value in node.inputs if value is not None)
    return list(found)


_CONTRACTS: Mapping[str, Callable[[Named, Checkpoint, str], Contract]] = {
    "unet": _unet,
    "vae_decoder": _vae_decoder,
    "vae_encoder": _vae_encoder,
}


def fulfil(model: ir.Model, contract: Contract) -> None:
    """Give a graph the inputs and outputs of a contract, in place; all else keeps its numbers.

    Args:
        model: float32, from `latentrt_export.existing.reading`.
        contract: of the graph.

    Raises:
        ExportError: the timestep cannot be one for each lane.
    """
    graph = model.graph
    theirs = {str(value.name): value for value in graph.inputs}
    made = {str(value.name): value for node in graph for value in node.outputs}
    results = {own: made[name] for own, name in contract.outputs.items()}
    for value in (*graph.inputs, *made.values()):
        if value.name in contract.shapes:
            value.name = f"{value.name}.theirs"
    for value in list(graph.inputs):
        graph.inputs.remove(value)
    ours = {name: _input(name, contract.shapes[name]) for name in contract.inputs}
    graph.inputs.extend(ours.values())
    for name, old in contract.inputs.items():
        if name == "timestep":
            per_lane(graph, theirs[old], ours[name])
        elif name == "sample" and "beside" in ours:
            _replace(graph, theirs[old], ir.node("Concat", [ours["sample"], ours["beside"]], {"axis": 1}, name=old))
        elif name != "beside":
            kind = theirs[old].dtype
            cast = None if kind == ours[name].dtype else ir.node("Cast", [ours[name]], {"to": kind}, name=f"{old}.cast")
            _replace(graph, theirs[old], ours[name] if cast is None else cast)
    graph.outputs[:] = list(results.values())
    for name, value in results.items():
        value.name, value.shape = name, ir.Shape(contract.shapes[name])
    common.RemoveUnusedNodesPass()(model)


def _input(name: str, shape: Shape) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(INT if name == "input_ids" else FLOAT))


def _replace(graph: ir.Graph, old: ir.Value, new: ir.Value | ir.Node) -> None:
    """Put a value in the place of an input; that of a node is inserted first in the graph."""
    if isinstance(new, ir.Node):
        graph.insert_before(graph[0], new)
        result = new.outputs[0]
        result.name, result.dtype = f"{old.name}.whole", old.dtype
        new = result
    ir.convenience.replace_all_uses_with(old, new)
