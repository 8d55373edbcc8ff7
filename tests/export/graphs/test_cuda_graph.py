"""CUDA graphs: the same numbers as their half graphs, and a CUDA kernel for every node, checked without a GPU.

Here without the passes of `latentrt_export.graphs.fused`, which have tests of their own.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from latentrt.bundle.bundle import EMBEDDED, Bundle
from latentrt.errors import ExportError
from latentrt_export.graphs.cuda_graph import cuda_path, cuda_variants, for_cuda
from latentrt_export.graphs.half import emulate, to_half
from latentrt_export.graphs.ranges import open_session
from tests.export.graphs.test_lower import Arrays, _feeds
from tests.support.gpu.cuda_kernels import without_kernel

Exported = Callable[[str], tuple[Path, Path]]
BUNDLES = ("sd", "sd2", "sdxl", "emoji", "trained-pixels")


@pytest.mark.parametrize("name", BUNDLES)
def test_every_node_has_a_kernel(exported: Exported, name: str) -> None:
    """As ONNX Runtime 1.31.1 looks for one. The half graphs, of opset 23, are the defect that this would have shown."""
    _, root = exported(name)
    spec = Bundle.open(root).spec
    for network, graph in spec.graphs("fp16-ort-cuda").items():
        assert without_kernel(ir.load(root / graph.path)) == set(), network
        missing = without_kernel(ir.load(root / spec.graphs("fp16")[network].path))
        if network == "text_encoder_2":
            assert missing == {"ArgMax 13 int32"}
        else:
            assert missing == (
                set() if network in ("text_encoder", "unet_text") else {"InstanceNormalization 22 float16"}
            )


@pytest.mark.parametrize("name", BUNDLES)
def test_cuda_graphs_of_a_bundle(exported: Exported, name: str) -> None:
    """Each network has one, valid, with the half graph's signature and weights; what is not masked stays fused."""
    _, root = exported(name)
    spec = Bundle.open(root).spec
    assert spec.graphs("fp16-ort-cuda").keys() == spec.graphs().keys()
    for network, graph in spec.graphs("fp16-ort-cuda").items():
        half = spec.graphs("fp16")[network]
        assert (graph.path, graph.opset) == (cuda_path(spec.graphs()[network].path), 21)
        assert (graph.inputs, graph.outputs) == (half.inputs, half.outputs)
        onnx.checker.check_model(root / graph.path, full_check=True)
        ours, theirs = (ir.load(root / path) for path in (graph.path, half.path))
        assert _weights(ours) == _weights(theirs)
        (old, new) = (Counter(node.op_type for node in model.graph) for model in (theirs, ours))
        assert old["Attention"] > 0 or network in ("unet_text", "unet_shallow")
        assert new["Attention"] == 0
        assert new["MultiHeadAttention"] == (0 if network.startswith("text") else old["Attention"])


def _weights(model: ir.Model) -> set[tuple[Any, ...]]:
    tensors = [value.const_value for value in model.graph.initializers.values()]
    return {(t.location, t.offset, t.length) for t in tensors if isinstance(t, ir.ExternalTensor)}


@pytest.mark.parametrize("name", BUNDLES)
def test_numbers_stay(exported: Exported, name: str) -> None:
    """In float32 to the last bits; in float16, rounded after every node, within what its roundings differ.

    Of the plain graphs: ONNX Runtime's CPU provider has no kernels for the fused operators.
    """
    _, root = exported(name)
    spec = Bundle.open(root).spec
    for network, graph in spec.graphs().items():
        single, exact = ir.load(root / graph.path), ir.load(root / graph.path)
        for_cuda(exact, ())
        assert _difference(exact, single, root / graph.path, _feeds(graph)) < 2e-6, network
        half, ours = (ir.load(root / spec.graphs("fp16")[network].path) for _ in range(2))
        for_cuda(ours, ())
        for model in (half, ours):
            emulate(model)
        assert _difference(ours, half, root / graph.path, _feeds(spec.graphs("fp16")[network])) < 1.5e-3, network


def _difference(ours: ir.Model, theirs: ir.Model, path: Path, feeds: Arrays) -> float:
    """Return the largest relative L2 of all outputs."""
    both = [open_session(model, path.parent).run(None, feeds) for model in (ours, theirs)]
    errors = []
    for a, b in zip(*both, strict=True):
        assert a.dtype == b.dtype
        errors.append(np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b.astype(np.float64)))
    return float(np.max(errors))


def test_islands_stay() -> None:
    """An Attention that float16 would not hold is a MultiHeadAttention in float32, with the same Casts around it."""
    model = ir.load(EMBEDDED / "vae" / "decoder.onnx")
    (attention,) = (node for node in model.graph if node.op_type == "Attention")
    to_half(model, [attention.name])
    casts = Counter(node.op_type for node in model.graph)["Cast"]
    for_cuda(model, ())
    (fused,) = (node for node in model.graph if node.op_type == "MultiHeadAttention")
    assert {value.dtype for value in (*fused.inputs, *fused.outputs)} == {ir.DataType.FLOAT}
    assert Counter(node.op_type for node in model.graph)["Cast"] == casts > 0
    assert without_kernel(model) == set()


def test_another_variant_for_a_comparison(exported: Exported, tmp_path: Path) -> None:
    """The plain graphs stand beside the bundle's own, under names of their own; the manifest is not touched."""
    root = Path(shutil.copytree(exported("sd")[1], tmp_path / "bundle"))
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    spec = Bundle.open(root).spec
    plain = cuda_variants(root, spec)
    new = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    names = {"text_encoder/model", "unet/model", "unet/text", "unet/shallow", "vae/decoder", "vae/encoder"}
    assert new - {path.relative_to(root).as_posix() for path in before} == {f"{n}.cuda-plain.onnx" for n in names}
    assert {path: path.read_bytes() for path in before} == before
    bundle = Bundle(root, plain, {})
    for network, graph in bundle.spec.graphs("fp16-ort-cuda").items():
        model = ir.load(bundle.path(graph.path))
        assert (graph.nodes, graph.opset) == (len(model.graph), 21)
        assert {node.op_type for node in model.graph if node.domain} <= {"MultiHeadAttention"}
        theirs = spec.graphs("fp16-ort-cuda")[network]
        assert (graph.inputs, graph.outputs) == (theirs.inputs, theirs.outputs)
    assert Bundle.open(root).spec == spec


# --- small graphs -----------------------------------------------------------------------------------------------------


def _model(op: str, inputs: dict[str, tuple[int, list[int]]], out: int, **attributes: Any) -> ir.Model:
    values = [helper.make_tensor_value_info(name, *kind) for name, kind in inputs.items()]
    node = helper.make_node(op, list(inputs), ["y"], name="node", **attributes)
    graph = helper.make_graph([node], "graph", values, [helper.make_tensor_value_info("y", out, None)])
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10))


def _both(model: ir.Model, feeds: Arrays) -> tuple[Any, Any]:
    (expected,) = open_session(model, Path()).run(None, feeds)
    for_cuda(model)
    assert without_kernel(model) == set()
    (ours,) = open_session(model, Path()).run(None, feeds)
    assert ours.dtype == expected.dtype
    return ours, expected


@given(
    heads=st.integers(1, 4),
    size=st.integers(1, 9),
    lengths=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    scale=st.sampled_from([None, 0.25, 1.7]),
)
@settings(max_examples=30, deadline=None)
def test_attention_without_a_mask(heads: int, size: int, lengths: tuple[int, int], scale: float | None) -> None:
    shapes = {name: [2, length, heads * size] for name, length in zip("qkv", (*lengths, lengths[1]), strict=True)}
    draw = np.random.default_rng(size)
    feeds = {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    inputs = {name: (TensorProto.FLOAT, shape) for name, shape in shapes.items()}
    scaled = {} if scale is None else {"scale": scale}
    model = _model("Attention", inputs, TensorProto.FLOAT, q_num_heads=heads, kv_num_heads=heads, **scaled)
    ours, expected = _both(model, feeds)
    assert [(node.domain, node.op_type) for node in model.graph] == [("com.microsoft", "MultiHeadAttention")]
    np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("attributes", "shape", "mask"),
    [
        ({"q_num_heads": 2, "kv_num_heads": 2, "softmax_precision": 1}, [1, 5, 8], False),
        ({"q_num_heads": 2, "kv_num_heads": 2}, [1, 5, 8], True),
        ({}, [1, 2, 5, 4], False),
    ],
    ids=["softmax in a precision of its own", "mask", "four axes"],
)
def test_other_attention_is_taken_apart(attributes: dict[str, int], shape: list[int], mask: bool) -> None:
    inputs = dict.fromkeys("qkv", (TensorProto.FLOAT, shape)) | ({"m": (TensorProto.FLOAT, [5, 5])} if mask else {})
    feeds = {
        n: np.random.default_rng(i).standard_normal(s).astype(np.float32)
        for i, (n, (_, s)) in enumerate(inputs.items())
    }
    model = _model("Attention", inputs, TensorProto.FLOAT, **attributes)
    ours, expected = _both(model, feeds)
    assert "Softmax" in {node.op_type for node in model.graph}
    np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=2e-6)


def test_causal_attention_is_taken_apart() -> None:
    inputs = dict.fromkeys("qkv", (TensorProto.FLOAT, [1, 5, 8]))
    model = _model("Attention", inputs, TensorProto.FLOAT, q_num_heads=2, kv_num_heads=2, is_causal=1)
    for_cuda(model)
    assert "MultiHeadAttention" not in {node.op_type for node in model.graph}


def test_what_export_never_writes_is_refused() -> None:
    inputs = dict.fromkeys("qkv", (TensorProto.FLOAT, [1, 4, 8]))
    model = _model("Attention", inputs, TensorProto.FLOAT, q_num_heads=2, kv_num_heads=2, softcap=3.0)
    with pytest.raises(ExportError, match="Attention 'node'"):
        for_cuda(model)


@given(
    rows=st.lists(st.lists(st.integers(-3, 49_407), min_size=7, max_size=7), min_size=1, max_size=4),
    dtype=st.sampled_from([TensorProto.INT32, TensorProto.INT64]),
    keepdims=st.booleans(),
    axis=st.sampled_from([-1, 1]),
)
@settings(max_examples=40, deadline=None)
def test_the_first_of_the_largest(rows: list[list[int]], dtype: int, keepdims: bool, axis: int) -> None:
    numbers = np.array(rows, helper.tensor_dtype_to_np_dtype(dtype))
    numbers[:, 5] = numbers[:, 2]  # two may be the largest
    model = _model("ArgMax", {"x": (dtype, [len(rows), 7])}, TensorProto.INT64, axis=axis, keepdims=int(keepdims))
    np.testing.assert_array_equal(*_both(model, {"x": numbers}))


def test_a_kernel_without_an_end_serves_one_version() -> None:
    """Version 6 is registered, not 22: this is why norms ran on the CPU. A graph of opset 21 is as it should be."""
    for opset, missing in (
        (21, set()),
        (22, {"InstanceNormalization 22 float32"}),
        (23, {"InstanceNormalization 22 float32"}),
    ):
        x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2, 4]) for name in "xy")
        ones = numpy_helper.from_array(np.ones(2, np.float32), "ones")
        node = helper.make_node("InstanceNormalization", ["x", "ones", "ones"], ["y"])
        graph = helper.make_graph([node], "graph", [x], [y], [ones])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
        assert without_kernel(ir.from_proto(model)) == missing
