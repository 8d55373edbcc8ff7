"""Half graphs: typed float16 everywhere but on islands, with weights in place, and the purpose of the islands."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from latentrt.bundle.bundle import EMBEDDED, Bundle
from latentrt_export.graphs.half import HALF, LARGEST, SINGLE, TIME_INPUTS, emulate, half_path, timing, to_half
from latentrt_export.graphs.ranges import MARGIN, open_session
from latentrt_export.graphs.weights import read_header

Exported = Callable[[str], tuple[Path, Path]]
BUNDLES = ("sd", "sd2", "sdxl", "emoji", "trained-pixels")
HALF_WEIGHTS = ("sd2", "emoji", "trained-pixels")
TIMES = {"sdxl": 18, "trained-pixels": 10}  # nodes of the sinusoids; in others 8


@pytest.mark.parametrize("name", BUNDLES)
def test_half_graphs_of_a_bundle(exported: Exported, name: str) -> None:
    """Each network has one, valid, with the engine's names, all float16 but for what holds the times."""
    _, root = exported(name)
    spec = Bundle.open(root).spec
    assert spec.graphs("fp16").keys() == spec.graphs().keys()
    for network, graph in spec.graphs("fp16").items():
        assert graph.path == half_path(spec.graphs()[network].path)
        onnx.checker.check_model(root / graph.path, full_check=True)
        tensors = (*graph.inputs, *graph.outputs)
        plain = (*spec.graphs()[network].inputs, *spec.graphs()[network].outputs)
        assert [(t.name, t.shape) for t in tensors] == [(t.name, t.shape) for t in plain]
        for half, single in zip(tensors, plain, strict=True):
            kept = single.dtype == "int64" or half.name in TIME_INPUTS
            assert half.dtype == (single.dtype if kept else "float16")
        model = ir.load(root / graph.path)
        exact = {node for node in model.graph if any(value.dtype == SINGLE for value in node.outputs)}
        assert exact >= {node for node in timing(model.graph) if node.op_type != "Cast"}
        assert all(node.op_type != "Cast" for node in exact)
        assert len(exact) == (TIMES.get(name, 8) if network in ("unet", "unet_shallow") else 0)
        islands = spec.networks[network].variants["fp16"].islands
        assert islands is not None
        assert islands.nodes == ()
        assert 1 < islands.largest < LARGEST / MARGIN


@pytest.mark.parametrize("name", BUNDLES)
def test_weights_stay_where_they_are(exported: Exported, name: str) -> None:
    """The same bytes as the float32 graph reads: without a Cast where they are float16, through one where not."""
    _, root = exported(name)
    spec = Bundle.open(root).spec
    for network, graph in spec.graphs("fp16").items():
        model, single = ir.load(root / graph.path), ir.load(root / spec.graphs()[network].path)
        pointers = _pointers(model)
        assert pointers == _pointers(single)
        casts = {node.inputs[0].name for node in model.graph if node.op_type == "Cast" and node.inputs[0] is not None}
        assert casts & pointers.keys() == (set() if name in HALF_WEIGHTS else pointers.keys())


def _pointers(model: ir.Model) -> dict[str, tuple[Any, ...]]:
    tensors = {str(v.name): v.const_value for v in model.graph.initializers.values()}
    return {n: (t.location, t.offset, t.length) for n, t in tensors.items() if isinstance(t, ir.ExternalTensor)}


def test_torch_is_not_needed() -> None:
    graphs = ", ".join(f"latentrt_export.graphs.{name}" for name in ("half", "lower", "ranges"))
    code = f"import sys, {graphs}; print({{'torch', 'onnxscript'}} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


@given(st.sets(st.integers(0, 87)))
@settings(max_examples=8, deadline=None)
def test_any_island_is_valid_and_close(chosen: set[int]) -> None:
    path = EMBEDDED / "text_encoder" / "model.onnx"
    single, model = ir.load(path), ir.load(path)
    computing = [node.name for node in single.graph if not str(node.name).endswith(".cast")]
    islands = [computing[index] for index in chosen]
    to_half(model, islands)
    for node in model.graph:
        if node.name in islands:
            assert HALF not in {value.dtype for value in node.outputs}
    results = []
    for each in (single, model):
        dtypes = {str(value.name): value.dtype.numpy() for value in each.graph.inputs if value.dtype is not None}
        feeds = {"input_ids": np.arange(77)[None], "attention_mask": np.ones((1, 77), dtypes["attention_mask"])}
        feeds["vectors"] = np.zeros((1, 77, 192), dtypes["vectors"])
        results.append(open_session(each, path.parent).run(None, feeds))
    for expected, ours in zip(*results, strict=True):
        assert np.linalg.norm(ours - expected) < 1.5e-3 * np.linalg.norm(expected)


# --- small graphs -----------------------------------------------------------------------------------------------------

Node = tuple[str, list[str], str]


def _model(nodes: list[Node], constants: dict[str, np.ndarray[Any, Any]], out: str) -> ir.Model:
    """Return a float32 graph from x (1, 4) to `out`."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in ("x", out))
    graph = helper.make_graph(
        [helper.make_node(op, inputs, [output], name=f"n_{output}") for op, inputs, output in nodes],
        "graph",
        [x],
        [y],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opset = [helper.make_opsetid("", 23)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opset, ir_version=10))


def _run(model: ir.Model, x: float, folder: Path = Path()) -> np.ndarray[Any, Any]:
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return open_session(model, folder).run(None, {"x": np.full((1, 4), x, np.float16)})[0].astype(np.float32)


def _precise(model: ir.Model) -> list[str]:
    return [n.op_type for n in model.graph if n.op_type != "Cast" and any(v.dtype == SINGLE for v in n.outputs)]


SQUARE: list[Node] = [
    ("Mul", ["x", "x"], "square"),
    ("Neg", ["square"], "negative"),
    ("Mul", ["negative", "small"], "scaled"),
    ("Add", ["scaled", "x"], "y"),
]
SMALL = {"small": np.array(1 / 400, np.float32)}


@pytest.mark.parametrize(
    ("islands", "result", "casts"),
    [((), -np.inf, 0), (("n_square", "negative", "n_scaled"), 75.0, 2), (("n_negative",), -np.inf, 2)],
    ids=["none", "by node and by output", "one of two"],
)
def test_islands_have_casts_at_their_borders_only(islands: Collection[str], result: float, casts: int) -> None:
    """x² of 300 is beyond float16; x enters the island twice and by one Cast."""
    model = _model(SQUARE, SMALL, "y")
    to_half(model, islands)
    assert sum(node.op_type == "Cast" for node in model.graph) == casts
    assert model.graph.outputs[0].dtype == HALF
    emulate(model)
    np.testing.assert_allclose(_run(model, 300), result, rtol=1e-3)


def test_an_island_at_the_output() -> None:
    model = _model([("Mul", ["x", "x"], "square"), ("Mul", ["square", "small"], "y")], SMALL, "y")
    to_half(model, ["n_square", "n_y"])
    assert [value.name for value in model.graph.outputs] == ["y"]
    np.testing.assert_allclose(_run(model, 300), 225, rtol=1e-3)


def test_onnx_runtime_alone_would_not_see_it() -> None:
    """The reason for `emulate`: between nodes without float16 kernels, ONNX Runtime's CPU provider does not round."""
    model = _model(SQUARE, SMALL, "y")
    to_half(model)
    np.testing.assert_allclose(_run(model, 300), 75, rtol=1e-3)


@pytest.mark.parametrize(
    ("value", "precise"), [(1e5, True), (-70000.0, True), (1e-12, True), (np.inf, False), (0.0, False), (1e-7, False)]
)
def test_numbers_that_float16_cannot_hold_stay(value: float, precise: bool) -> None:
    constants = {"c": np.array(value, np.float32), "d": np.array(1e-5, np.float32)}
    model = _model([("Add", ["x", "c"], "sum"), ("Mul", ["sum", "d"], "y")], constants, "y")
    to_half(model)
    assert _precise(model) == (["Add", "Mul"] if precise else [])


def test_an_epsilon_still_keeps_a_root_from_zero() -> None:
    nodes: list[Node] = [
        ("Mul", ["x", "x"], "s"),
        ("Add", ["s", "c"], "a"),
        ("Sqrt", ["a"], "r"),
        ("Div", ["x", "r"], "y"),
    ]
    model = _model(nodes, {"c": np.array(1e-12, np.float32)}, "y")
    to_half(model)
    emulate(model)
    np.testing.assert_array_equal(_run(model, 1.0), 1.0)
    np.testing.assert_array_equal(_run(model, 0.0), 0.0)


@pytest.mark.parametrize(("largest", "precise"), [(6e4, False), (7e4, True)])
def test_large_weights_of_a_file_are_read_as_they_are(tmp_path: Path, largest: float, precise: bool) -> None:
    """Behind a Transpose, as every linear layer has its weights: neither it nor the product may round them."""
    weight = np.diag(np.array([1.0, 1.0, 1.0, largest], np.float32))
    save_file({"weight": weight}, tmp_path / "w.safetensors")
    (stored,) = read_header(tmp_path / "w.safetensors")
    model = _model([("Transpose", ["weight"], "t"), ("MatMul", ["x", "t"], "z"), ("Mul", ["z", "c"], "y")], {
        "weight": weight, "c": np.array(0.125, np.float32)}, "y")  # fmt: skip
    model.graph.initializers["weight"].const_value = ir.ExternalTensor(
        "w.safetensors", stored.offset, stored.length, SINGLE, shape=ir.Shape((4, 4)), name="weight", base_dir=tmp_path
    )
    to_half(model)
    assert _precise(model) == (["Transpose", "MatMul"] if precise else [])
    session = open_session(model, tmp_path)
    (y,) = session.run(None, {"x": np.ones((1, 4), np.float16)})
    np.testing.assert_allclose(y[0].astype(np.float32), [0.125, 0.125, 0.125, largest / 8], rtol=1e-3)


def test_bfloat16_weights_are_cast_once(tmp_path: Path) -> None:
    """As export writes them: behind a Cast to float32, which becomes one to float16."""
    weight = (2 * np.eye(4)).astype(ml_dtypes.bfloat16)
    (tmp_path / "w").write_bytes(weight.tobytes())
    model = _model([("Cast", ["weight"], "w"), ("MatMul", ["x", "w"], "y")], {"weight": weight}, "y")
    model.graph[0].attributes["to"] = ir.AttrInt64("to", int(SINGLE))
    model.graph.initializers["weight"].const_value = ir.ExternalTensor(
        "w", 0, 32, ir.DataType.BFLOAT16, shape=ir.Shape((4, 4)), name="weight", base_dir=tmp_path
    )
    to_half(model)
    assert [(n.op_type, n.outputs[0].dtype) for n in model.graph] == [("Cast", HALF), ("MatMul", HALF)]
    session = open_session(model, tmp_path)
    np.testing.assert_array_equal(session.run(None, {"x": np.full((1, 4), 3, np.float16)})[0], 6)


def test_whole_numbers_become_floats_in_float32() -> None:
    """4097 is no float16 number: an island around the Cast gets it unchanged."""
    constants = {"i": np.array([4097], np.int64), "c": np.array(0.25, np.float32)}
    nodes: list[Node] = [("Cast", ["i"], "f"), ("Mul", ["f", "c"], "q"), ("Mul", ["x", "q"], "y")]
    model = _model(nodes, constants, "y")
    model.graph[0].attributes["to"] = ir.AttrInt64("to", int(SINGLE))
    to_half(model)
    assert _precise(model) == []
    assert model.graph[0].outputs[0].dtype == SINGLE
    assert _run(model, 1.0)[0, 0] == 1024
