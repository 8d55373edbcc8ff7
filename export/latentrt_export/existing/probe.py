"""Run a graph that others made: to see the shapes of what it computes, and whether it computes the same as theirs.

Exporters write few shapes into a graph, and passes need them. Two small runs show them all: a side that both runs
explain as one number, or as a multiple of batch, height and width, is that; another stays unknown.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from latentrt.bundle.spec import TensorSpec
from latentrt.errors import ExportError, LatentrtError
from latentrt.runtime.signature import shape_of
from latentrt_export.checkpoint.onnx_folder import EXPORT_AGAIN
from latentrt_export.existing.contract import Contract
from latentrt_export.graphs.ranges import open_session

Arrays = Mapping[str, NDArray[Any]]
Sizes = Mapping[str, int]
SUFFIX = ".shape"
# Sides are products of these; in the two runs of `sizes_of_runs` each grows by a factor of its own.
PRODUCTS = (
    *((), ("batch",), ("height",), ("width",), ("tokens",)),
    *(("height", "width"), ("batch", "height", "width"), ("batch", "tokens")),
)
TOKENS = 77
IDS = 256  # token ids below it; every vocabulary has them
BOUNDS = {"float16": 3e-2, "float32": 1e-4}  # relative L2, by what theirs computes in


def sizes_of_runs(multiple: int) -> tuple[Sizes, Sizes]:
    """Return batch, height, width and tokens of the two runs, for sides that are multiples of a number."""
    first = {"batch": 2, "height": multiple, "width": 3 * multiple, "tokens": TOKENS}
    return first, {"batch": 5, "height": 2 * multiple, "width": multiple, "tokens": 3 * TOKENS}


def make_feeds(specs: Sequence[TensorSpec], sizes: Sizes) -> dict[str, NDArray[Any]]:
    """Return inputs: tokens, times, sizes, and normal numbers for all others; the same for the same arguments."""
    draw = np.random.default_rng(0)
    feeds: dict[str, NDArray[Any]] = {}
    for spec in specs:
        shape = shape_of(spec, sizes)
        if spec.name == "input_ids":
            feeds[spec.name] = draw.integers(0, IDS, shape)
        elif spec.name == "timestep":
            feeds[spec.name] = np.linspace(981.0, 501.0, shape[0], dtype=np.float32)
        elif spec.name == "time_ids":
            feeds[spec.name] = draw.integers(0, 1024, shape).astype(np.float32)
        else:
            feeds[spec.name] = draw.standard_normal(shape, np.float32)
    return feeds


def set_shapes(model: ir.Model, contract: Contract, folder: Path, multiple: int, name: str) -> None:
    """Give every value of a graph the shape that two runs show, in place; None where they leave a side open.

    Args:
        model: that fulfils the contract.
        contract: of the graph.
        folder: where its weights lie.
        multiple: of the sides of the network's input.
        name: of the network, for messages.

    Raises:
        ExportError: it does not run at both sizes.
    """
    probed = model.clone()
    values = [value for node in probed.graph for value in node.outputs if value.name]
    names = [str(value.name) for value in values]
    for value in values:
        node = ir.node("Shape", [value])
        probed.graph.append(node)
        result = node.outputs[0]
        result.name, result.dtype, result.shape = f"{value.name}{SUFFIX}", ir.DataType.INT64, ir.Shape([None])
        probed.graph.outputs.append(result)
    runs = sizes_of_runs(multiple)
    with failing(name, runs):
        session = open_session(probed, folder)
        wanted = [f"{value}{SUFFIX}" for value in names]
        found = [session.run(wanted, make_feeds(contract.specs(), sizes)) for sizes in runs]
    del session
    shapes = dict(zip(names, zip(*found, strict=True), strict=True))
    for value in (value for node in model.graph for value in node.outputs):
        if value.name in shapes and value.name not in contract.outputs:
            value.shape = _shape(shapes[value.name], runs)


def _shape(found: Sequence[NDArray[np.int64]], runs: Sequence[Sizes]) -> ir.Shape | None:
    if len({len(shape) for shape in found}) > 1:
        return None
    sides = [side_of([int(side) for side in sides], runs) for sides in zip(*found, strict=True)]
    return None if None in sides else ir.Shape(sides)


def side_of(found: Sequence[int], runs: Sequence[Sizes]) -> int | str | None:
    """Return the side that has these sizes in the runs, in terms of batch, height and width."""
    for names in PRODUCTS:
        ratios = {Fraction(side, _product(names, sizes)) for side, sizes in zip(found, runs, strict=True)}
        if len(ratios) == 1:
            (ratio,) = ratios
            if not names:
                return found[0]
            product = "*".join([*([str(ratio.numerator)] if ratio.numerator > 1 else []), *names])
            return f"{product}//{ratio.denominator}" if ratio.denominator > 1 else product
    return None


def _product(names: Sequence[str], sizes: Sizes) -> int:
    return int(np.prod([sizes[name] for name in names], dtype=np.int64))


@contextmanager
def failing(name: str, runs: Sequence[Sizes]) -> Iterator[None]:
    """Turn what ONNX Runtime raises into an ExportError that names the network and the sizes of the runs."""
    try:
        yield
    except Exception as error:  # onnxruntime's errors share no base class
        if isinstance(error, LatentrtError):
            raise
        raise ExportError(
            f"{name}/model.onnx does not run with {', then '.join(str(dict(run)) for run in runs)} ({error})",
            needed="a graph that takes every batch, height and width",
            fix=EXPORT_AGAIN,
        ) from error


def check_same(model: ir.Model, contract: Contract, path: Path, folder: Path, multiple: int) -> None:
    """Compare a graph with the one it was made from: each lane of a batch with theirs, called for it alone.

    Args:
        model: that fulfils the contract.
        contract: of the graph.
        path: theirs.
        folder: where the weights of `model` lie.
        multiple: of the sides of the network's input.

    Raises:
        ExportError: they differ, or one does not run.
    """
    name, sizes = path.parent.name, {"batch": 2, "height": 2 * multiple, "width": multiple, "tokens": 2 * TOKENS}
    feeds, outputs = make_feeds(contract.specs(), sizes), list(contract.outputs)
    with failing(name, [sizes]):
        session = open_session(model, folder)
        ours = session.run(outputs, feeds)
        del session
    raw = ir.load(path)
    made = {str(value.name): value for node in raw.graph for value in node.outputs}
    raw.graph.outputs[:] = [made[contract.outputs[output]] for output in outputs]
    kinds = {str(value.name): value for value in raw.graph.inputs}
    half = any(value.dtype == ir.DataType.FLOAT16 for value in raw.graph.initializers.values())
    bound = BOUNDS["float16" if half else "float32"]
    with failing(name, [{**sizes, "batch": 1}]):
        session = open_session(raw, path.parent)
        for lane in range(sizes["batch"]):
            alone = _their_feeds(contract, kinds, {key: array[lane : lane + 1] for key, array in feeds.items()})
            for output, batch, own in zip(outputs, ours, session.run(None, alone), strict=True):
                _check_close(f"{name}/model.onnx: {output}", batch[lane], own[0], bound)


def _their_feeds(contract: Contract, kinds: Mapping[str, ir.Value], feeds: Arrays) -> dict[str, NDArray[Any]]:
    """Return inputs of one lane as their graph takes them."""
    theirs: dict[str, NDArray[Any]] = {}
    for own, name in contract.inputs.items():
        theirs[name] = np.concatenate([theirs[name], feeds[own]], axis=1) if name in theirs else feeds[own]
    for name, array in theirs.items():
        shape, kind = kinds[name].shape, kinds[name].dtype
        one = array.reshape(()) if shape is not None and len(shape) == 0 else array
        theirs[name] = one if kind is None else one.astype(kind.numpy())
    return theirs


def _check_close(what: str, ours: NDArray[Any], theirs: NDArray[Any], bound: float) -> None:
    if ours.shape != theirs.shape:
        raise ExportError(f"{what} has the shape {theirs.shape}", needed=f"{ours.shape}", fix=EXPORT_AGAIN)
    exact = theirs.astype(np.float64)
    error = float(np.linalg.norm(ours - exact)) / max(float(np.linalg.norm(exact)), 1e-30)
    if not error <= bound:
        raise ExportError(
            f"{what} differs by {error:.1e} (relative L2) when its inputs are named and shaped as the engine's",
            needed=f"at most {bound:.0e}",
            fix="export the checkpoint itself, and report this folder",
        )
