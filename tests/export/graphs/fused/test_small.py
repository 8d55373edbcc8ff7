"""Single patterns: what is fused, what a kernel would refuse, what others read too; and the operators in numpy."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper, parser

from latentrt_export.graphs.cuda_graph import for_cuda
from latentrt_export.graphs.fused import rules
from latentrt_export.graphs.ranges import open_session
from tests.export.graphs.fused.test_passes import at_run_time, distance
from tests.support.gpu.cuda_kernels import without_kernel
from tests.support.ort import contrib

Arrays = dict[str, np.ndarray[Any, Any]]
SIZES = {"b": 2, "h": 6, "w": 5, "t": 7}


def graph(signature: str, body: str, weights: dict[str, tuple[int, ...]], fixed: Arrays | None = None) -> ir.Model:
    """Return a model of that body, with random weights and, as export writes them, the shapes of all values."""
    text = f'<ir_version: 10, opset_import: ["": 23]> g {signature} {{ {body} }}'
    model = parser.parse_model(text)
    draw = np.random.default_rng(1)
    arrays = {name: (0.3 * draw.standard_normal(shape)).astype(np.float32) for name, shape in weights.items()}
    for name, array in (arrays | (fixed or {})).items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True))


def changed(model: ir.Model) -> tuple[dict[str, int], Counter[str]]:
    """Rewrite a model, check that its numbers stay, and return what was found and the nodes of a run."""
    draw = np.random.default_rng(2)
    feeds: Arrays = {}
    for value in model.graph.inputs:
        shape = [SIZES[side.value] if isinstance(side, ir.SymbolicDim) else side for side in value.shape]
        feeds[value.name] = draw.standard_normal(shape).astype(np.float32)
    names = [value.name for value in model.graph.outputs]
    expected = open_session(model, Path()).run(None, feeds)
    found = for_cuda(model)
    assert [value.name for value in model.graph.outputs] == names
    assert distance(contrib.interpret(model, Path(), feeds), expected) < 2e-6
    assert without_kernel(model) == set()
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return {name: count for name, count in found.items() if count}, at_run_time(model)


def norm(channels: int, groups: int, silu: bool, axes: int = 4) -> ir.Model:
    sides = "h,w" if axes == 4 else "t"
    body = """
        s = Shape(x) f = Reshape(x, to) n = InstanceNormalization<epsilon = 0.0002>(f, ones, zeros) r = Reshape(n, s)
        m = Mul(r, gamma)
    """
    end = "a = Add(m, beta) i = Sigmoid(a) y = Mul(a, i)" if silu else "y = Add(m, beta)"
    fixed: Arrays = {
        "to": np.array([0, groups, -1]),
        "ones": np.ones(groups, np.float32),
        "zeros": np.zeros(groups, np.float32),
    }
    weights = dict.fromkeys(("gamma", "beta"), (channels, *[1] * (axes - 2)))
    shape = f"[b,{channels},{sides}]"
    return graph(f"(float{shape} x) => (float{shape} y)", body + end, weights, fixed)


@given(groups=st.integers(1, 8), size=st.integers(1, 6), silu=st.booleans(), axes=st.sampled_from([3, 4]))
@settings(max_examples=25, deadline=None)
def test_a_group_norm(groups: int, size: int, silu: bool, axes: int) -> None:
    found, nodes = changed(norm(groups * size, groups, silu, axes))
    if rules.group_norm(groups * size, groups):
        assert found["group_norms"] == 1
        assert set(nodes) <= {"GroupNorm", "Transpose", "Unsqueeze", "Squeeze"}
        assert nodes["Transpose"] == 2
    else:
        assert size % 2
        assert found == ({"quick_gelus": 1} if silu else {})
        assert (nodes["InstanceNormalization"], nodes["Transpose"]) == (1, 0)


@pytest.mark.parametrize(
    ("channels", "groups", "good"),
    [
        (320, 32, True),
        (960, 32, True),
        (64, 8, True),
        (1024, 2, True),
        (1028, 2, False),
        (24, 8, False),
        (33, 32, False),
    ],
)
def test_sizes_of_group_norm(channels: int, groups: int, good: bool) -> None:
    assert rules.group_norm(channels, groups) is good


RESIDUAL = "c = Conv<pads = [1,1,1,1]>(x, weight, bias) {sum} s = Shape(a) f = Reshape(a, to)" + (
    " n = InstanceNormalization(f, ones, zeros) r = Reshape(n, s) m = Mul(r, gamma) y = Add(m, beta)"
)
NORMED: Arrays = {"to": np.array([0, 4, -1]), "ones": np.ones(4, np.float32), "zeros": np.zeros(4, np.float32)}
WEIGHTS = {"weight": (16, 8, 3, 3), "bias": (16,), "gamma": (16, 1, 1), "beta": (16, 1, 1)}
IMAGES = "(float[b,8,6,5] x, float[b,16,6,5] r0, float[b,16] e)"


def test_a_residual_and_a_norm() -> None:
    model = graph(f"{IMAGES} => (float[b,16,6,5] y)", RESIDUAL.format(sum="a = Add(r0, c)"), WEIGHTS, NORMED)
    found, nodes = changed(model)
    assert found == {"group_norms": 1, "channels_last": 3, "skip_group_norms": 1}
    assert nodes == {"Transpose": 3, "NhwcConv": 1, "SkipGroupNorm": 1}
    (conv, fused) = (next(n for n in model.graph if n.op_type == op) for op in ("NhwcConv", "SkipGroupNorm"))
    assert (len(conv.inputs), len(fused.inputs), len(fused.outputs)) == (2, 5, 1)


def test_others_read_the_residual_too() -> None:
    signature = f"{IMAGES} => (float[b,16,6,5] y, float[b,16,6,5] z, float[b,16,6,5] a)"
    model = graph(signature, RESIDUAL.format(sum="a = Add(c, r0)") + " z = Add(a, r0)", WEIGHTS, NORMED)
    found, nodes = changed(model)
    assert found == {"group_norms": 1, "channels_last": 4, "skip_group_norms": 1}
    assert nodes["Add"] == nodes["SkipGroupNorm"] == 1
    assert len(next(n for n in model.graph if n.op_type == "SkipGroupNorm").outputs) == 2


def test_a_time_embedding_and_a_norm() -> None:
    body = RESIDUAL.format(sum="u = Unsqueeze(e, sides) a = Add(c, u)")
    model = graph(f"{IMAGES} => (float[b,16,6,5] y)", body, WEIGHTS, NORMED | {"sides": np.array([2, 3])})
    found, nodes = changed(model)
    assert found["skip_group_norms"] == 1
    assert nodes == {"Transpose": 2, "NhwcConv": 1, "SkipGroupNorm": 1}
    assert next(n for n in model.graph if n.op_type == "SkipGroupNorm").inputs[3].name == "e"


def test_two_convolutions_and_a_norm() -> None:
    """A block's residual is a convolution too: their biases are added when the graph is loaded."""
    body = RESIDUAL.format(sum="d = Conv(x, small, other) a = Add(d, c)")
    more = {"small": (16, 8, 1, 1), "other": (16,)}
    found, nodes = changed(graph(f"{IMAGES} => (float[b,16,6,5] y)", body, WEIGHTS | more, NORMED))
    assert found == {"group_norms": 1, "channels_last": 4, "skip_group_norms": 1, "pointwise_products": 1}
    assert nodes == {"Transpose": 2, "NhwcConv": 1, "MatMul": 1, "SkipGroupNorm": 1}


def test_tokens_that_end_in_an_image() -> None:
    """A projection of tokens (SD 2, SDXL) is reshaped to the image that it is added to: its bias goes along."""
    body = """
        m = MatMul(z, square) n = Add(m, bias) v = Reshape(n, image) p = Transpose<perm = [0, 3, 1, 2]>(v)
        c = Conv<pads = [1,1,1,1]>(x, weight, other) k = Conv<pads = [1,1,1,1]>(c, third) a = Add(p, c)
        s = Shape(a) f = Reshape(a, to) i = InstanceNormalization(f, ones, zeros) r = Reshape(i, s)
        g = Mul(r, gamma) y = Add(g, beta)
    """
    weights = WEIGHTS | {"square": (16, 16), "other": (16,), "third": (4, 16, 3, 3)}
    signature = "(float[b,8,6,5] x, float[b,30,16] z) => (float[b,16,6,5] y, float[b,4,6,5] k)"
    model = graph(signature, body, weights, NORMED | {"image": np.array([0, 6, 5, 16])})
    found, nodes = changed(model)
    assert (found["skip_group_norms"], nodes["Add"], nodes["MatMul"]) == (1, 0, 1)


def test_a_bias_that_others_need_stays() -> None:
    """The convolution's result is an output too, with its bias."""
    signature = f"{IMAGES} => (float[b,16,6,5] y, float[b,16,6,5] c)"
    model = graph(signature, RESIDUAL.format(sum="a = Add(c, r0)"), WEIGHTS, NORMED)
    found, _ = changed(model)
    assert found["skip_group_norms"] == 1
    assert len(next(n for n in model.graph if n.op_type == "NhwcConv").inputs) == 3


def test_layouts_meet_in_the_middle() -> None:
    """Concat, Resize, Pad and a Split between convolutions follow; a Softmax over the channels does not."""
    body = """
        c = Conv<pads = [1,1,1,1], strides = [2,2]>(x, weight, bias) d = Concat<axis = 1>(c, c)
        u = Resize<mode = "nearest">(d, , scales) p = Pad(u, pads) k, l = Split<axis = 1, num_outputs = 2>(p)
        v = Conv<dilations = [2,2]>(k, second) o = Sigmoid(v) y = Softmax<axis = 1>(o) z = Mul(l, half)
    """
    fixed: Arrays = {
        "scales": np.array([1, 1, 2, 3], np.float32),
        "pads": np.array([0, 0, 0, 0, 0, 0, 1, 2]),
        "half": np.array(0.5, np.float32),
    }
    weights = {"weight": (16, 8, 3, 3), "bias": (16,), "second": (4, 16, 3, 3)}
    model = graph("(float[b,8,h,w] x) => (float[b,4,i,j] y, float[b,16,k,l] z)", body, weights, fixed)
    found, nodes = changed(model)
    assert found == {"channels_last": 8}
    assert nodes["Transpose"] == 3


BIASED = "m = MatMul(x, weight) n = Add(m, bias) "


@pytest.mark.parametrize(("size", "fits"), [(320, True), (640, True), (1280, True), (512, False)])
def test_bias_and_residual_of_tokens(size: int, fits: bool) -> None:
    signature = f"(float[b,t,8] x, float[b,t,{size}] s) => (float[b,t,{size}] y)"
    found, nodes = changed(graph(signature, BIASED + "y = Add(s, n)", {"weight": (8, size), "bias": (size,)}))
    assert found == ({"bias_adds": 1} if fits else {})
    assert nodes == ({"MatMul": 1, "BiasAdd": 1} if fits else {"MatMul": 1, "Add": 2})


@pytest.mark.parametrize(("kernel", "size", "fits"), [(1, 320, True), (3, 320, True), (1, 64, False)])
def test_bias_and_residual_of_images(kernel: int, size: int, fits: bool) -> None:
    pads = [kernel // 2] * 4
    signature = f"(float[b,8,6,5] x, float[b,{size},6,5] s) => (float[b,{size},6,5] y)"
    body = f"c = Conv<pads = {pads}>(x, weight, bias) y = Add(c, s)"
    found, nodes = changed(graph(signature, body, {"weight": (size, 8, kernel, kernel), "bias": (size,)}))
    assert found.get("bias_adds", 0) == nodes["BiasAdd"] == fits
    assert found.get("pointwise_products", 0) == nodes["MatMul"] == (fits and kernel == 1)
    assert nodes["NhwcConv"] == 1 - nodes["MatMul"]


@pytest.mark.parametrize(("size", "gelu", "fits"), [(2560, "none", True), (512, "none", False), (2560, "tanh", False)])
def test_gates(size: int, gelu: str, fits: bool) -> None:
    body = BIASED + f'l, r = Split<axis = 2, num_outputs = 2>(n) g = Gelu<approximate = "{gelu}">(r) y = Mul(l, g)'
    signature = f"(float[b,t,8] x) => (float[b,t,{size // 2}] y)"
    found, nodes = changed(graph(signature, body, {"weight": (8, size), "bias": (size,)}))
    assert found == ({"bias_split_gelus": 1} if fits else {})
    assert nodes["BiasSplitGelu"] == fits


@pytest.mark.parametrize(("skip", "fits"), [("b,t,16", True), ("1,t,16", False)])
def test_a_residual_and_a_layer_norm(skip: str, fits: bool) -> None:
    """A residual that is broadcast stays: the strict kernel takes no such."""
    body = BIASED + "a = Add(n, s) y = LayerNormalization<axis = -1>(a, gamma, beta) z = Mul(a, a)"
    signature = f"(float[b,t,8] x, float[{skip}] s) => (float[b,t,16] y, float[b,t,16] z)"
    weights = {"weight": (8, 16), "bias": (16,), "gamma": (16,), "beta": (16,)}
    model = graph(signature, body, weights)
    found, nodes = changed(model)
    assert found == ({"skip_layer_norms": 1} if fits else {})
    assert nodes["SkipLayerNormalization"] == fits
    if fits:
        fused = next(n for n in model.graph if n.op_type == "SkipLayerNormalization")
        assert [bool(value.name) for value in fused.outputs] == [True, False, False, True]


IMAGE = "c = Conv(x, small, bias) p = Transpose<perm = [0, 2, 3, 1]>(c) t = Reshape(p, flat)"
LINEAR = "m = MatMul(x, first) t = Add(m, bias)"
BLOCK = """
    n = LayerNormalization<axis = -1, epsilon = 0.01>(t, gamma, beta) o = MatMul(n, square) b = Add(o, other)
    a = Add(b, t) y = LayerNormalization<axis = -1>(a, gamma, beta) z = Mul(a, a)
"""


@pytest.mark.parametrize(
    ("start", "shape", "more", "fits"),
    [(IMAGE, "b,8,6,5", "", True), (LINEAR, "b,30,8", "", True), (LINEAR, "b,30,8", ", float[b,30,16] t", False)],
    ids=["a convolution", "a product", "tokens that are an output too"],
)
def test_the_bias_of_a_transformers_tokens(start: str, shape: str, more: str, fits: bool) -> None:
    signature = f"(float[{shape}] x) => (float[b,30,16] y, float[b,30,16] z{more})"
    fixed: Arrays = {"flat": np.array([0, -1, 16])} if start == IMAGE else {}
    weights = dict.fromkeys(("gamma", "beta", "bias", "other"), (16,)) | {"square": (16, 16)}
    weights |= {"small": (16, 8, 1, 1)} if start == IMAGE else {"first": (8, 16)}
    found, nodes = changed(graph(signature, start + BLOCK, weights, fixed))
    assert (found["skip_layer_norms"], found.get("layer_norm_biases", 0)) == (1, fits)
    assert (nodes["Add"], nodes["NhwcConv"], nodes["MatMul"]) == (not fits, 0, 2)
    assert (nodes["SkipLayerNormalization"], nodes["LayerNormalization"]) == (1 + fits, 1 - fits)


def test_bias_and_gelu() -> None:
    model = graph("(float[b,t,8] x) => (float[b,t,16] y)", BIASED + "y = Gelu(n)", {"weight": (8, 16), "bias": (16,)})
    assert changed(model) == ({"bias_gelus": 1}, {"MatMul": 1, "BiasGelu": 1})


@pytest.mark.parametrize(("alpha", "y", "fits"), [(1.0, "x", True), (1.702, "x", True), (1.702, "s", False)])
def test_quick_gelu(alpha: float, y: str, fits: bool) -> None:
    body = f"s = Mul(x, alpha) i = Sigmoid(s) y = Mul({y}, i)" if alpha != 1 else "i = Sigmoid(x) y = Mul(i, x)"
    found, nodes = changed(
        graph("(float[b,t,8] x) => (float[b,t,8] y)", body, {}, {"alpha": np.array(alpha, np.float32)})
    )
    assert found == {"quick_gelus": 1}
    assert nodes == ({"QuickGelu": 1} if fits else {"Mul": 1, "QuickGelu": 1})


ATTENTION = "y = Attention<q_num_heads = 2, kv_num_heads = 2>({q}, {k}, {v})"
SQUARES = dict.fromkeys(("wq", "wk", "wv"), (8, 8))


@pytest.mark.parametrize("biased", [False, True])
def test_products_of_self_attention(biased: bool) -> None:
    products = " ".join(f"{p} = MatMul(x, w{p})" for p in "qkv")
    sums = " ".join(f"{p}b = Add({p}, b{p})" for p in "qkv") if biased else ""
    names = {p: f"{p}b" if biased else p for p in "qkv"}
    weights = SQUARES | ({f"b{p}": (8,) for p in "qkv"} if biased else {})
    signature = "(float[b,t,8] x) => (float[b,t,8] y)"
    found, nodes = changed(graph(signature, f"{products} {sums} {ATTENTION.format(**names)}", weights))
    assert found == {"packed_products": 1}
    assert nodes == {"MatMul": 1, "Split": 1, "MultiHeadAttention": 1} | ({"Add": 1} if biased else {})


def test_keys_and_values_that_are_inputs() -> None:
    """As they are once they are computed once a picture."""
    signature = "(float[b,t,8] x, float[b,77,8] k, float[b,77,8] v) => (float[b,t,8] y)"
    found, nodes = changed(graph(signature, "q = MatMul(x, wq) " + ATTENTION.format(q="q", k="k", v="v"), SQUARES))
    assert (found, nodes) == ({}, {"MatMul": 1, "MultiHeadAttention": 1})


def test_products_of_two_tensors() -> None:
    signature = "(float[b,t,8] x, float[b,t,8] z) => (float[b,t,8] y)"
    body = "q = MatMul(x, wq) k = MatMul(z, wk) v = MatMul(z, wv) " + ATTENTION.format(q="q", k="k", v="v")
    assert changed(graph(signature, body, SQUARES)) == ({}, {"MatMul": 3, "MultiHeadAttention": 1})


# --- the operators in numpy, against ONNX Runtime ---------------------------------------------------------------------


def by_onnxruntime(op: str, arrays: Arrays, outputs: int = 1, **attributes: Any) -> list[Any]:
    """Run one operator of com.microsoft with ONNX Runtime's CPU kernel."""
    infos = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, a.shape) for name, a in arrays.items()]
    names = [f"o{i}" for i in range(outputs)]
    node = helper.make_node(op, list(arrays), names, domain="com.microsoft", **attributes)
    results = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "g", infos, results), opset_imports=opsets, ir_version=10)
    found: list[Any] = open_session(ir.from_proto(model), Path()).run(None, arrays)
    return found


def drawn(**shapes: tuple[int, ...]) -> Arrays:
    draw = np.random.default_rng(3)
    return {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def test_numpy_is_onnxruntime() -> None:
    """Where its CPU provider has the operator."""
    tokens, wide = (2, 5, 16), (16,)
    given = drawn(x=tokens, skip=tokens, gamma=wide, beta=wide, bias=wide)
    theirs = by_onnxruntime("SkipLayerNormalization", given, 4, epsilon=1e-4)
    ours = contrib.skip_layer_norm(*given.values(), epsilon=1e-4)
    assert distance([ours[0], ours[3]], [theirs[0], theirs[3]]) < 1e-6
    given = drawn(x=tokens, bias=wide)
    assert distance([contrib.bias_gelu(**given)], by_onnxruntime("BiasGelu", given)) < 1e-6
    given = drawn(x=tokens)
    assert distance([contrib.quick_gelu(**given, alpha=1.5)], by_onnxruntime("QuickGelu", given, alpha=1.5)) < 1e-6
    given = drawn(q=tokens, k=(2, 7, 16), v=(2, 7, 16))
    theirs = by_onnxruntime("MultiHeadAttention", given, num_heads=4, scale=0.3)
    assert distance([contrib.multi_head_attention(**given, num_heads=4, scale=0.3)], theirs) < 1e-6
