"""Read an ONNX graph of a folder that others made: no path leads out of it, and nothing unknown is in the graph."""

from __future__ import annotations

import logging
from pathlib import Path, PurePosixPath

import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript import version_converter

from latentrt.errors import ExportError, UnsafePathError
from latentrt_export.checkpoint.onnx_folder import EXPORT_AGAIN
from latentrt_export.graphs.passes import PREFIX, strip_metadata

OPSET = 23  # as `latentrt_export.graphs.to_onnx` writes
CONTROL = ("If", "Loop", "Scan")
POINTER = b"version https://git-lfs"
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
LARGEST_CONSTANT = 64  # elements: group norms have ones and zeros for each group
FIX = f"export it again, plain, without optimizing or quantizing: {EXPORT_AGAIN}"


def read_graph(path: Path, root: Path) -> ir.Model:
    """Read a graph in the form in which export's passes know graphs.

    It has opset 23, ONNX's own operators only, no functions and no notes; constants are initializers, and the names of
    weights begin with `passes.PREFIX`. Weights outside the file are `ir.ExternalTensor`s: they are not read here.

    Args:
        path: of the graph.
        root: the folder that all it names must lie in.

    Raises:
        ExportError: it is no ONNX graph, is cut, or has control flow or operators that are not ONNX's own.
        UnsafePathError: it names a file outside of `root`.
    """
    model = _load(path)
    _check_files(model, path.parent, root)
    common.InlinePass()(model)
    _check_operators(model, path)
    strip_metadata(model)
    common.RemoveInitializersFromInputsPass()(model)
    _name_weights(model.graph)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    _convert(model, path)
    common.ShapeInferencePass(data_prop=False)(model)  # for the types
    return model


def _load(path: Path) -> ir.Model:
    try:
        with path.open("rb") as file:
            pointer = file.read(len(POINTER)) == POINTER
    except OSError as error:
        raise ExportError(f"{path} cannot be read ({error})", needed="an ONNX graph") from error
    if pointer:
        raise ExportError(f"{path} is a Git LFS pointer", needed="the file itself", fix="git lfs pull")
    try:
        return ir.load(path)
    except Exception as error:  # protobuf's and onnx_ir's errors share no base class
        raise ExportError(
            f"{path} cannot be read ({type(error).__name__})", needed="an ONNX graph", fix="download the folder again"
        ) from error


def external(model: ir.Model) -> list[ir.ExternalTensor]:
    """Return the tensors of a graph whose bytes lie in other files."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    return [tensor for tensor in tensors if isinstance(tensor, ir.ExternalTensor)]


def _check_files(model: ir.Model, folder: Path, root: Path) -> None:
    """Check where the bytes of external tensors lie before any is read. Raise as `read_graph`."""
    inside = root.resolve()
    if inside.parent.name == "snapshots":  # of the hub's cache, whose files are links to its blobs
        inside = inside.parent.parent
    for tensor in external(model):
        pure, path = PurePosixPath(str(tensor.location)), folder / str(tensor.location)
        leads_out = pure.is_absolute() or ".." in pure.parts or "\\" in str(pure)
        if leads_out or not path.resolve().is_relative_to(inside):
            raise UnsafePathError(f"a graph in {folder} names the file {str(pure)!r}", needed=f"a path inside {root}")
        if not path.is_file():
            fix = "download the folder again; for git: git lfs pull"
            raise ExportError(f"{path} is missing", needed="the weights of the graph beside it", fix=fix)
        end = (tensor.offset or 0) + (tensor.length or tensor.nbytes)
        if path.stat().st_size < end or (tensor.length or tensor.nbytes) != tensor.nbytes:
            found = f"{path} has {path.stat().st_size} bytes"
            raise ExportError(found, needed=f"at least {end} for {tensor.name}", fix="download the folder again")


def _check_operators(model: ir.Model, path: Path) -> None:
    for node in model.graph.all_nodes():
        if node.domain not in ("", "ai.onnx") or node.op_type in CONTROL:
            operator = f"{node.domain}.{node.op_type}".removeprefix(".").removeprefix("ai.onnx.")
            raise ExportError(f"{path} has the operator {operator}", needed="ONNX's own, without control flow", fix=FIX)


def _name_weights(graph: ir.Graph) -> None:
    """Begin the names of weights, and no others, with PREFIX: passes tell them from constants by it."""
    for value in list(graph.initializers.values()):
        tensor, name = value.const_value, str(value.name).removeprefix(PREFIX)
        weight = tensor is not None and tensor.dtype in FLOATS and tensor.size > LARGEST_CONSTANT
        new = f"{PREFIX}{name}" if weight else name
        if new not in graph.initializers:
            value.name = new


def _convert(model: ir.Model, path: Path) -> None:
    """Bring a graph to the opset of export's own."""
    found = model.opset_imports.get("", 0)
    if found > OPSET:
        raise ExportError(f"{path} has opset {found}", needed=f"at most {OPSET}", fix="export it again with --opset 18")
    logger = logging.getLogger(version_converter.__name__)
    logger.setLevel(logging.ERROR)  # it tells which of its two converters it takes
    try:
        version_converter.convert_version(model, OPSET, fallback=True)
    except Exception as error:  # the converters' errors share no base class
        raise _unconverted(path, found) from error
    finally:
        logger.setLevel(logging.NOTSET)
    if model.opset_imports.get("") != OPSET:
        raise _unconverted(path, found)


def _unconverted(path: Path, found: int) -> ExportError:
    needed = f"one that can be converted to opset {OPSET}"
    return ExportError(f"{path} has opset {found}", needed=needed, fix="export it again with --opset 18")
