"""Graphs of opset 18 against the graphs of opset 23 that they were made from, in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.spec import GraphSpec
from latentrt.errors import ExportError
from latentrt.runtime.signature import shape_of
from latentrt_export.graphs.lower import lower
from latentrt_export.graphs.ranges import open_session
from tests.support.models import texts

Arrays = dict[str, np.ndarray[Any, Any]]
FLOATS = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bool": TensorProto.BOOL}


def _feeds(graph: GraphSpec) -> Arrays:
    draw = np.random.default_rng(0)
    sizes = {"batch": 2, "height": 13, "width": 10, "tokens": 77}
    if graph.inputs[0].name == "image":
        sizes |= {"height": 48, "width": 32}
    if not any(tensor.name.startswith("text.") for tensor in graph.inputs):
        sizes |= {"height": 16, "width": 24}  # a pixel model's sides must halve evenly
    feeds: Arrays = {}
    for tensor in graph.inputs:
        shape = shape_of(tensor, sizes)
        if tensor.name == "attention_mask":
            feeds[tensor.name] = np.broadcast_to(np.arange(shape[1]) % 9 != 5, shape).astype(np.int64)
        elif tensor.dtype == "int64":
            feeds[tensor.name] = draw.integers(0, 400, shape)
        elif tensor.name == "encoder_hidden_states":
            feeds[tensor.name] = texts.states(shape, draw).astype(tensor.dtype)
        else:
            feeds[tensor.name] = draw.standard_normal(shape).astype(tensor.dtype)
    return feeds


@pytest.mark.parametrize("name", ["sd", "sd2", "sdxl", "emoji", "trained-pixels"])
def test_graphs_of_a_bundle(exported: Callable[[str], tuple[Path, Path]], tmp_path: Path, name: str) -> None:
    """float32 graphs give the same to the last bits, half graphs within float16's rounding."""
    _, root = exported(name)
    spec = Bundle.open(root).spec
    for graph, bound in [(g, 1e-6) for g in spec.graphs().values()] + [
        (g, 1.5e-3) for g in spec.graphs("fp16").values()
    ]:
        path = root / graph.path
        model = ir.load(path)
        lower(model)
        assert (model.opset_imports, model.ir_version) == ({"": 18}, 8)
        assert not {"Attention", "Gelu"} & {node.op_type for node in model.graph}
        for tensor in tmp_path.iterdir():
            tensor.unlink()
        for file in path.parent.glob("*.safetensors"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
        ir.save(model, tmp_path / "model.onnx")
        onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
        feeds = _feeds(graph)
        theirs = open_session(ir.load(path), path.parent).run(None, feeds)
        for tensor, ours, expected in zip(
            graph.outputs, open_session(model, path.parent).run(None, feeds), theirs, strict=True
        ):
            assert ours.dtype == np.dtype(tensor.dtype)
            error = np.linalg.norm((ours - expected).astype(np.float64)) / np.linalg.norm(expected.astype(np.float64))
            assert error <= bound, (graph.path, error)


def _model(op: str, inputs: dict[str, tuple[str, list[int] | None]], dtype: str, **attributes: Any) -> ir.Model:
    values = [helper.make_tensor_value_info(name, FLOATS[kind], shape) for name, (kind, shape) in inputs.items()]
    node = helper.make_node(op, list(inputs), ["y"], name="node", **attributes)
    graph = helper.make_graph([node], "graph", values, [helper.make_tensor_value_info("y", FLOATS[dtype], None)])
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10))


def _both(model: ir.Model, feeds: Arrays) -> tuple[Any, Any]:
    (expected,) = open_session(model, Path()).run(None, feeds)
    lower(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    (ours,) = open_session(model, Path()).run(None, feeds)
    assert ours.dtype == expected.dtype
    return ours, expected


@given(
    flat=st.booleans(),
    heads=st.integers(1, 4),
    size=st.integers(1, 9),
    lengths=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    mask=st.sampled_from([None, "bool", "float32"]),
    causal=st.booleans(),
    scale=st.sampled_from([None, 0.25, 1.7]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_attention(
    flat: bool,
    heads: int,
    size: int,
    lengths: tuple[int, int],
    mask: str | None,
    causal: bool,
    scale: float | None,
    seed: int,
) -> None:
    """Three axes and four, lengths that differ, masks of both kinds, causal, its own scale."""
    draw, (queries, keys) = np.random.default_rng(seed), lengths
    inputs: dict[str, tuple[str, list[int] | None]] = {}
    for name, length in (("q", queries), ("k", keys), ("v", keys)):
        inputs[name] = ("float32", [2, length, heads * size] if flat else [2, heads, length, size])
    attributes: dict[str, Any] = {"is_causal": int(causal)} | ({"scale": scale} if scale else {})
    if flat:
        attributes |= {"q_num_heads": heads, "kv_num_heads": heads}
    feeds = {name: draw.standard_normal(shape).astype(np.float32) for name, (_, shape) in inputs.items()}
    if mask:
        inputs["mask"] = (mask, [queries, keys])
        seen = draw.random((queries, keys)) < 0.7
        seen[:, 0] = True  # a token whose mask is all false has no softmax
        feeds["mask"] = seen if mask == "bool" else draw.standard_normal((queries, keys)).astype(np.float32)
    ours, expected = _both(_model("Attention", inputs, "float32", **attributes), feeds)
    np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=2e-6)


def test_lengths_may_be_free() -> None:
    """Only the number of heads and their size must be known."""
    shape = ["batch", "tokens", 12]
    inputs: Any = dict.fromkeys("qkv", ("float32", shape))
    model = _model("Attention", inputs, "float32", q_num_heads=3, kv_num_heads=3, is_causal=1)
    feeds = {
        name: np.random.default_rng(i).standard_normal((2, 5, 12)).astype(np.float32) for i, name in enumerate("qkv")
    }
    ours, expected = _both(model, feeds)
    np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=2e-6)


def test_scores_that_float16_holds_only_when_scaled() -> None:
    """q·k is 100² · 64 = 640,000; an eighth of it is beyond float16 too, so this scale is smaller."""
    inputs: Any = {name: ("float16", [1, 2, 64]) for name in "qkv"}
    model = _model("Attention", inputs, "float16", q_num_heads=1, kv_num_heads=1, scale=1 / 64)
    feeds = {name: np.full((1, 2, 64), 100, np.float16) for name in "qkv"}
    lower(model)
    np.testing.assert_array_equal(open_session(model, Path()).run(None, feeds)[0], 100)


def test_a_softmax_may_be_more_precise() -> None:
    inputs: Any = {name: ("float16", [1, 4, 8]) for name in "qkv"}
    model = _model("Attention", inputs, "float16", q_num_heads=2, kv_num_heads=2, softmax_precision=TensorProto.FLOAT)
    feeds = {name: np.random.default_rng(0).standard_normal((1, 4, 8)).astype(np.float16) for name in "qkv"}
    ours, expected = _both(model, feeds)
    np.testing.assert_allclose(ours, expected, rtol=2e-3, atol=1e-3)
    (softmax,) = (node for node in model.graph if node.op_type == "Softmax")
    assert softmax.outputs[0].dtype == ir.DataType.FLOAT


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-6), ("float16", 2e-3)])
def test_gelu(approximate: str, dtype: str, bound: float) -> None:
    model = _model("Gelu", {"x": (dtype, [201])}, dtype, approximate=approximate)
    ours, expected = _both(model, {"x": np.linspace(-10, 10, 201).astype(dtype)})
    np.testing.assert_allclose(ours, expected, rtol=bound, atol=bound)


def test_an_opset_between() -> None:
    """Opset 20 knows Gelu but no Attention; a graph's own opset and newer ones change nothing."""
    for opset, left in ((18, set()), (20, {"Gelu"}), (23, {"Gelu", "Attention"}), (24, {"Gelu", "Attention"})):
        nodes = [
            helper.make_node("Gelu", ["x"], ["g"]),
            helper.make_node("Attention", ["g", "g", "g"], ["y"], q_num_heads=1, kv_num_heads=1),
        ]
        x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2, 4]) for name in "xy")
        graph = helper.make_graph(nodes, "graph", [x], [y])
        model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10))
        lower(model, opset)
        assert model.opset_imports[""] == min(opset, 23)
        assert {node.op_type for node in model.graph} & {"Gelu", "Attention"} == left
        onnx.checker.check_model(ir.to_proto(model), full_check=True)


@pytest.mark.parametrize("attributes", [{"softcap": 3.0}, {"kv_num_heads": 1}])
def test_what_export_never_writes_is_refused(attributes: dict[str, Any]) -> None:
    inputs: Any = {name: ("float32", [1, 4, 8 if name == "q" or "softcap" in attributes else 4]) for name in "qkv"}
    model = _model("Attention", inputs, "float32", **({"q_num_heads": 2, "kv_num_heads": 2} | attributes))
    with pytest.raises(ExportError, match="Attention 'node'"):
        lower(model)
