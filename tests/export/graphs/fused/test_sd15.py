"""What the passes leave of Stable Diffusion 1.5's structure with random weights: figures of docs/cuda-graphs.md."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx_ir as ir
import pytest

from latentrt_export.graphs.cuda_graph import for_cuda
from tests.export.graphs.fused.test_passes import at_run_time
from tests.support.gpu.cuda_kernels import without_kernel

VIEWS = {"Reshape", "Shape", "Squeeze", "Unsqueeze", "Gather"}  # no kernel on the GPU: views, and arithmetic on shapes
UNET = {
    "BiasAdd": 31,
    "BiasSplitGelu": 16,
    "Concat": 14,
    "Gemm": 24,
    "GroupNorm": 16,
    "MatMul": 174,
    "MultiHeadAttention": 32,
    "NhwcConv": 52,
    "QuickGelu": 2,
    "Resize": 3,
    "SkipGroupNorm": 45,
    "SkipLayerNormalization": 48,
    "Slice": 2,
    "Split": 16,
    "Transpose": 2,
}
DECODER = {
    "Add": 5,
    "GroupNorm": 19,
    "MatMul": 4,
    "MultiHeadAttention": 1,
    "NhwcConv": 34,
    "Resize": 3,
    "SkipGroupNorm": 11,
    "Split": 1,
    "Transpose": 2,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "before", "after", "kinds"), [("unet", 914, 481, UNET), ("vae_decoder", 215, 80, DECODER)]
)
def test_computing_nodes(tmp_path: Path, network: str, before: int, after: int, kinds: dict[str, int]) -> None:
    from latentrt_export.checkpoint.presets.make import make_checkpoint
    from latentrt_export.graphs import passes
    from latentrt_export.graphs.half import to_half
    from latentrt_export.graphs.to_onnx import quiet, trace
    from latentrt_export.graphs.weights import share_weights
    from latentrt_export.graphs.wrap import load_network

    with quiet():
        root = make_checkpoint("sd15", tmp_path)
        model = trace(load_network(root, network, tokens=77))
    passes.clean(model)
    folder = root / ("vae" if network.startswith("vae") else network)
    share_weights(model, [folder / "diffusion_pytorch_model.safetensors"], folder / "extra.safetensors")
    path = folder / "half.onnx"
    to_half(model)
    ir.save(model, path)
    for options, nodes in (((), before), (None, after)):
        model = ir.load(path)
        for_cuda(model) if options is None else for_cuda(model, options)
        found = computing(model)
        assert found.total() == nodes
        assert without_kernel(model) == set()
    assert {kind: found[kind] for kind in kinds} == kinds
    assert found["InstanceNormalization"] == found["Conv"] == found["Sigmoid"] == found["Gelu"] == 0


def computing(model: ir.Model) -> Counter[str]:
    """Count the nodes that compute on the GPU."""
    whole = {value.producer() for node in model.graph for value in node.outputs if value.dtype == ir.DataType.INT64}
    names = at_run_time(model)
    on_host = Counter(node.op_type for node in whole if node is not None and node.op_type not in VIEWS)
    return Counter({kind: names[kind] - on_host[kind] for kind in names if kind not in VIEWS})
