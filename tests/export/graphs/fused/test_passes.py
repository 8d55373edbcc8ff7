"""Each pass on whole networks: the same numbers, and counts by type. The fused operators are interpreted in numpy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from latentrt.bundle.bundle import Bundle
from latentrt_export.graphs.cuda_graph import CONTRIB, for_cuda
from latentrt_export.graphs.fused import PASSES
from latentrt_export.graphs.half import constants, emulate, to_half
from latentrt_export.graphs.ranges import open_session
from tests.export.graphs.test_lower import Arrays, _feeds
from tests.support.gpu.cuda_kernels import without_kernel
from tests.support.ort.contrib import interpret

Exported = Callable[[str], tuple[Path, Path]]
BUNDLES = ("sd", "sdxl", "wide", "emoji", "trained-pixels")
# What the passes find, in the order of PASSES. The small checkpoints have sizes that BiasSplitGelu and BiasAdd refuse.
FOUND = {
    ("sd", "text_encoder"): (0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 2),
    ("sd", "unet"): (21, 79, 15, 8, 4, 0, 0, 0, 10, 4, 2),
    ("sd", "vae_decoder"): (14, 43, 5, 0, 0, 0, 0, 0, 1, 1, 0),
    ("sd", "vae_encoder"): (10, 33, 3, 0, 0, 0, 0, 0, 1, 1, 0),
    ("sdxl", "text_encoder"): (0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1),
    ("sdxl", "text_encoder_2"): (0, 0, 0, 4, 0, 0, 2, 0, 0, 0, 0),
    ("sdxl", "unet"): (21, 71, 15, 20, 4, 0, 0, 0, 4, 8, 3),
    ("sdxl", "vae_decoder"): (14, 43, 5, 0, 0, 0, 0, 0, 1, 1, 0),
    ("sdxl", "vae_encoder"): (10, 33, 3, 0, 0, 0, 0, 0, 1, 1, 0),
    ("wide", "unet"): (21, 78, 15, 8, 4, 4, 0, 9, 12, 4, 2),
    ("emoji", "text_encoder"): (0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 3),
    ("emoji", "unet"): (30, 117, 21, 14, 7, 0, 0, 0, 16, 7, 2),
    ("emoji", "vae_decoder"): (18, 65, 6, 0, 0, 0, 0, 0, 2, 1, 4),
    ("emoji", "vae_encoder"): (12, 47, 3, 0, 0, 0, 0, 0, 1, 1, 2),
    ("trained-pixels", "unet"): (28, 148, 14, 0, 0, 0, 0, 0, 1, 7, 10),
}
CASES = list(FOUND)
# Norms with an odd number of channels in a group, 3, 5 or 7: the kernel refuses them.
REFUSED_NORMS = {("emoji", "vae_decoder"): 4, ("emoji", "vae_encoder"): 2, ("trained-pixels", "unet"): 8}


def load(root: Path, path: str) -> ir.Model:
    model = ir.load(root / path)
    for_cuda(model, ())
    return model


def distance(ours: list[Any], theirs: list[Any]) -> float:
    """Return the largest relative L2 of all outputs."""
    pairs = [(a.astype(np.float64), b.astype(np.float64)) for a, b in zip(ours, theirs, strict=True)]
    return float(np.max([np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs]))


def at_run_time(model: ir.Model) -> Counter[str]:
    """Count the nodes that a runtime does not compute from weights when it loads the graph."""
    fixed = constants(model.graph)
    return Counter(node.op_type for node in model.graph if not fixed.issuperset(node.outputs))


LONG = (("sdxl", "text_encoder"), ("wide", "unet"))  # minutes on a busy machine
EVERY = [pytest.param(case, marks=pytest.mark.slow if case in LONG else (), id="-".join(case)) for case in CASES]


@pytest.mark.parametrize("case", EVERY)
def test_each_pass_keeps_the_numbers(exported: Exported, case: tuple[str, str]) -> None:
    """In float32, to its last bits, against ONNX Runtime before the passes."""
    _, root = exported(case[0])
    graph = Bundle.open(root).spec.graphs()[case[1]]
    feeds, folder = _feeds(graph), (root / graph.path).parent
    model = load(root, graph.path)
    expected = open_session(model, folder).run(None, feeds)
    found = []
    for run in PASSES:
        found.append(run(model))
        if found[-1]:
            assert distance(interpret(model, folder, feeds), expected) < 3e-6, run.__name__
    assert tuple(found) == FOUND[case]
    assert [run(model) for run in PASSES] == [0] * len(PASSES), "nothing is left to find"


@pytest.mark.parametrize("case", EVERY)
def test_half_graphs(exported: Exported, case: tuple[str, str]) -> None:
    """As near to float32 as the graphs before; no weight is copied, and every node has a kernel."""
    _, root = exported(case[0])
    spec = Bundle.open(root).spec
    single, half = (spec.graphs(*names)[case[1]] for names in ((), ("fp16",)))
    folder = (root / half.path).parent
    feeds = _feeds(half)
    wide = {tensor.name: feeds[tensor.name].astype(tensor.dtype) for tensor in single.inputs}
    expected = open_session(ir.load(root / single.path), folder).run(None, wide)
    before, after = load(root, half.path), load(root, half.path)
    weights, inline = _weights(before), _inline(before)
    found = for_cuda(after)
    assert tuple(found.values()) == FOUND[case]
    assert without_kernel(after) == set()
    assert (_weights(after), _types(after)) == (weights, _types(before))
    assert _inline(after) < inline + 4096
    assert _folded(after)
    ours = distance(interpret(after, folder, feeds), expected)
    emulate(before)
    assert ours < 1.25 * distance(open_session(before, folder).run(None, feeds), expected)


@pytest.mark.parametrize("case", EVERY)
def test_counts_by_type(exported: Exported, case: tuple[str, str]) -> None:
    _, root = exported(case[0])
    path = Bundle.open(root).spec.graphs("fp16")[case[1]].path
    old, model = at_run_time(load(root, path)), load(root, path)
    found, new = for_cuda(model), at_run_time(model)
    refused = REFUSED_NORMS.get(case, 0)
    assert old["InstanceNormalization"] == found["group_norms"] + refused
    assert new["InstanceNormalization"] == refused
    assert new["GroupNorm"] + new["SkipGroupNorm"] == found["group_norms"]
    assert new["SkipGroupNorm"] == found["skip_group_norms"]
    assert new["SkipLayerNormalization"] == found["skip_layer_norms"] + found["layer_norm_biases"]
    assert new["LayerNormalization"] == old["LayerNormalization"] - new["SkipLayerNormalization"]
    assert new["NhwcConv"] == old["Conv"] - found["pointwise_products"]
    assert new["Conv"] == new["Sigmoid"] == 0
    assert new["Gelu"] == old["Gelu"] - found["bias_split_gelus"] - found["bias_gelus"]
    expected = old["MatMul"] + found["pointwise_products"] - 2 * found["packed_products"]
    assert new["MatMul"] == expected
    if not case[1].startswith("text"):  # each image in and out, and around each norm that the kernel refuses
        images = [v for v in (*model.graph.inputs, *model.graph.outputs) if len(v.shape) == 4]
        assert new["Transpose"] == len(images) + 2 * refused
    assert model.opset_imports == {"": 21, CONTRIB: 1}


def _types(model: ir.Model) -> list[tuple[str, Any]]:
    return [(value.name, value.dtype) for value in (*model.graph.inputs, *model.graph.outputs)]


def _weights(model: ir.Model) -> set[tuple[Any, ...]]:
    tensors = [value.const_value for value in model.graph.initializers.values()]
    return {(t.location, t.offset, t.length) for t in tensors if isinstance(t, ir.ExternalTensor)}


def _inline(model: ir.Model) -> int:
    """Return the bytes of the numbers in the graph itself."""
    tensors = [value.const_value for value in model.graph.initializers.values()]
    return sum(t.nbytes for t in tensors if not isinstance(t, ir.ExternalTensor))


def _folded(model: ir.Model) -> bool:
    """Return whether ONNX Runtime's CPU provider, which folds constants, has kernels for all that prepares weights."""
    fixed = constants(model.graph)
    nodes = [node for node in model.graph if fixed.issuperset(node.outputs)]
    any_type = {"Cast", "Concat", "Gather", "Reshape", "Transpose"}
    return all(n.op_type in any_type or (n.op_type, n.outputs[0].dtype) == ("Add", ir.DataType.FLOAT) for n in nodes)


def test_islands_stay_in_float32(exported: Exported) -> None:
    """Nodes that float16 would not hold are not swallowed; the interpreter checks every node's type."""
    _, root = exported("emoji")
    graph = Bundle.open(root).spec.graphs()["unet"]
    single = ir.load(root / graph.path)
    kinds = ("Add", "InstanceNormalization", "LayerNormalization", "Gelu", "Conv", "Sigmoid", "MatMul", "Mul")
    islands = [node.name for kind in kinds for node in [n for n in single.graph if n.op_type == kind][3::5]]
    models = [ir.load(root / graph.path) for _ in range(2)]
    for model, passes in zip(models, (PASSES, ()), strict=True):
        to_half(model, islands)
        for_cuda(model, passes)
    fused, plain = models
    kept = {n.name for n in plain.graph if n.name in islands and n.outputs[0].dtype == ir.DataType.FLOAT}
    assert len(kept) > 60
    feeds: Arrays = {value.name: _feeds(graph)[value.name].astype(value.dtype.numpy()) for value in fused.graph.inputs}
    folder = (root / graph.path).parent
    emulate(plain)
    assert distance(interpret(fused, folder, feeds), open_session(plain, folder).run(None, feeds)) < 2.5e-3
    assert without_kernel(fused) == set()
