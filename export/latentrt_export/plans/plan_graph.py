"""A bundle's graph in the form that TensorRT's parser needs, and the places of a stripped plan's weights.

The bundle is not changed: what has to be written (weights in another type than they are stored in) goes to a folder
that the build throws away.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import onnx_ir as ir

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.spec import GraphSpec
from latentrt.errors import LatentrtError, PlanError
from latentrt.runtime.tensorrt.record import Profile, Weight
from latentrt_export.graphs.lower import lower

STORED = {"FLOAT": "F32", "FLOAT16": "F16", "BFLOAT16": "BF16", "INT64": "I64", "INT32": "I32", "BOOL": "BOOL"}
WIDENED = "weights.bin"  # the weights whose type changed


def load_graph(bundle: Bundle, graph: GraphSpec, profiles: Sequence[Profile], opset: int) -> ir.Model:
    """Return one of the bundle's graphs, in an opset that the parser knows.

    Args:
        bundle: the bundle.
        graph: which of its graphs.
        profiles: the shapes to build for; a dimension that is the same in all of them is fixed.
        opset: the newest that the parser knows.

    Raises:
        PlanError: the graph is damaged.
    """
    path = bundle.path(graph.path)
    try:
        model = ir.load(path)
        lower(model, opset)
        fix_shapes(model, profiles)
    except LatentrtError:
        raise
    except Exception as error:  # protobuf's and onnx_ir's errors share no base class
        raise PlanError(
            f"{path} cannot be read ({type(error).__name__}: {error})",
            needed="an ONNX graph",
            fix="export the checkpoint again",
        ) from error
    return model


def serialized(model: ir.Model, path: Path, folder: Path) -> tuple[bytes, Path]:
    """Return the graph as a parser takes it, and a path in whose folder its weights are found; it need not exist.

    Args:
        model: from `load_graph`; it is changed.
        path: of its file in the bundle.
        folder: an empty one, for weights that are stored in another type than they are used in.

    Raises:
        PlanError: the folder has no room.
    """
    try:
        if _retype_weights(model, folder):
            _link(path.parent, folder)
            path = folder / path.name
        return ir.to_proto(model).SerializeToString(), path
    except OSError as error:
        raise PlanError(
            f"{folder} cannot be written ({error})",
            needed="room for the weights once more",
            fix="make room, or name another TMPDIR",
        ) from error


def fix_shapes(model: ir.Model, profiles: Sequence[Profile]) -> None:
    """Fix the size of those dimensions of inputs that are the same in all profiles: the builder can rely on it."""
    for value in model.graph.inputs:
        sides: list[int | ir.SymbolicDim] = []
        for side in value.shape or ():
            told = side if isinstance(side, int) else str(side.value)
            sizes = {size for profile in profiles for size in profile.side(told)}
            sides.append(sizes.pop() if len(sizes) == 1 else side)
        value.shape = ir.Shape(sides)


def weights_of(model: ir.Model, graph: GraphSpec) -> dict[str, Weight]:
    """Return where each initializer lies in a safetensors of the bundle, with the type that the plan computes with."""
    folder = PurePosixPath(graph.path).parent
    found = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            wanted = _cast_type(value) or tensor.dtype
            place = (str(folder / str(tensor.location)), tensor.offset or 0, tensor.nbytes)
            found[name] = Weight(*place, STORED[tensor.dtype.name], str(wanted.numpy()))
    return found


def _cast_type(value: ir.Value) -> ir.DataType | None:
    """Return the one type that all of a weight's consumers cast it to; None where some use it as it is."""
    types = {
        ir.DataType(node.attributes["to"].as_int()) if node.op_type == "Cast" else None for node in value.consumers()
    }
    return types.pop() if len(types) == 1 and not value.is_graph_output() else None


def _retype_weights(model: ir.Model, folder: Path) -> bool:
    """Do the Casts behind weights now, so that a plan knows weights by their names, in the type that it computes with.

    TensorRT would fold them too, but a refittable plan would do so at every refit, and the builder would hold both
    forms. Return whether there were any.
    """
    waiting = [(value, wanted) for value in model.graph.initializers.values() if (wanted := _cast_type(value))]
    external = [(value, wanted) for value, wanted in waiting if isinstance(value.const_value, ir.ExternalTensor)]
    if not external:
        return False
    with (folder / WIDENED).open("wb") as file:
        for value, wanted in external:
            assert value.const_value is not None
            array, offset = value.const_value.numpy().astype(wanted.numpy()), file.tell()
            file.write(array.tobytes())
            value.const_value = ir.ExternalTensor(
                WIDENED, offset, array.nbytes, wanted, shape=value.shape, name=value.name or "", base_dir=folder
            )
            value.dtype = wanted
            for cast in list(value.consumers()):
                ir.convenience.replace_all_uses_with(cast.outputs[0], value)
                model.graph.remove(cast, safe=True)
    return True


def _link(source: Path, folder: Path) -> None:
    """Let the weights that stay as they are be found beside those that changed."""
    for path in source.glob("*.safetensors"):
        (folder / path.name).symlink_to(path.resolve())
