"""Fused graphs that take LoRAs of each lane, interpreted: with zeros to the bit the plain ones.

With others they are as near to float32 as the half graphs that take them.

The whole path with these graphs is in tests/adapters/test_on_gpu.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.spec import FP16_ORT_CUDA, LORA, GraphSpec
from latentrt_export.describe import signature
from latentrt_export.graphs.cuda_graph import for_cuda
from latentrt_export.graphs.fused.adapters import read_adapters_fused
from latentrt_export.graphs.half import emulate, to_half
from latentrt_export.graphs.parts.adapters import read_adapters
from latentrt_export.graphs.ranges import open_session
from tests.export.graphs.fused.test_passes import distance
from tests.export.graphs.test_lower import Arrays, _feeds
from tests.support.gpu.cuda_kernels import without_kernel
from tests.support.ort.contrib import interpret

Exported = Callable[[str], tuple[Path, Path]]
RANK = 3
# Networks, and how many modules they adapt. A VAE's LoRAs are merged; its packed products have biases.
CASES = {
    ("sd", "text_encoder"): 12,
    ("sd", "unet_text"): 8,
    ("sd", "unet"): 40,
    ("sdxl", "text_encoder_2"): 12,
    ("sdxl", "unet"): 72,
    ("emoji", "unet"): 70,
    ("emoji", "vae_decoder"): 5,
}
LONG = (("sdxl", "unet"), ("emoji", "vae_decoder"))
EVERY = [pytest.param(case, marks=pytest.mark.slow if case in LONG else (), id="-".join(case)) for case in CASES]


def feeds_of(model: ir.Model) -> Arrays:
    """Return random inputs of a graph; LoRAs change products by as much as these are."""
    tensors = signature(model.graph.inputs)
    feeds = _feeds(GraphSpec("", 0, 0, tuple(t for t in tensors if not t.name.startswith(LORA)), ()))
    random = np.random.default_rng(1)
    for tensor in tensors:
        if tensor.name.startswith(LORA):
            _, wide, out = (RANK if side == "rank" else side for side in tensor.shape)
            feeds[tensor.name] = (random.standard_normal((2, wide, out)) / float(wide) ** 0.5).astype(tensor.dtype)
    return feeds


@pytest.mark.parametrize("case", EVERY)
def test_zeros_are_exact_and_others_are_near(exported: Exported, case: tuple[str, str]) -> None:
    _, root = exported(case[0])
    spec = Bundle.open(root).spec
    paths = [spec.networks[case[1]].variants[name].path for name in ("fp32", "fp16", FP16_ORT_CUDA)]
    single, half, plain, ours = (ir.load(root / path) for path in (*paths, paths[2]))
    folder = (root / paths[0]).parent
    for model, read in ((single, read_adapters), (half, read_adapters)):
        read(model)
    read_adapters_fused(ours)
    assert set(signature(ours.graph.inputs)) == set(signature(half.graph.inputs))
    assert len(ours.graph.inputs) == len(plain.graph.inputs) + 2 * CASES[case]
    assert without_kernel(ours) == set()
    old, new = (Counter(node.op_type for node in model.graph) for model in (plain, ours))
    assert set(new - old) <= {"MatMul", "Add", "Reshape", "Shape"}
    assert not old - new
    feeds = feeds_of(ours)
    without = {name: np.zeros_like(array) if name.startswith(LORA) else array for name, array in feeds.items()}
    own = {name: array for name, array in feeds.items() if not name.startswith(LORA)}
    before = interpret(plain, folder, own)
    for a, b in zip(interpret(ours, folder, without), before, strict=True):
        np.testing.assert_array_equal(a, b)
    session = open_session(single, folder)
    wide = {value.name: value.dtype.numpy() for value in single.graph.inputs}
    expected, still = (
        session.run(None, {name: array.astype(wide[name]) for name, array in each.items()}) for each in (feeds, without)
    )
    changed = interpret(ours, folder, feeds)
    assert distance(changed, still) > 0.1
    emulate(half)
    assert distance(changed, expected) < 1.25 * distance(open_session(half, folder).run(None, feeds), expected)


def test_islands_take_them_in_float32(exported: Exported) -> None:
    """Half-precision inputs are cast where a product stays in float32; the interpreter checks every node's type."""
    _, root = exported("emoji")
    graph = Bundle.open(root).spec.graphs()["text_encoder"]
    single = ir.load(root / graph.path)
    islands = [node.name for node in single.graph if node.op_type == "MatMul"][::3]
    ours = ir.load(root / graph.path)
    to_half(ours, islands)
    for_cuda(ours)
    read_adapters(single)
    read_adapters_fused(ours)
    feeds, folder = feeds_of(ours), (root / graph.path).parent
    assert {array.dtype for name, array in feeds.items() if name.startswith(LORA)} == {np.dtype(np.float16)}
    assert without_kernel(ours) == set()
    wide = {value.name: feeds[value.name].astype(value.dtype.numpy()) for value in single.graph.inputs}
    assert distance(interpret(ours, folder, feeds), open_session(single, folder).run(None, wide)) < 4e-3
