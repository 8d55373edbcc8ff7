"""ONNX Runtime's graphs and options that a lease measures against each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from latentrt.bundle.spec import FP16_ORT_CUDA

PLAIN = "fp16-ort-cuda-plain"  # `benchmarks.gpu.lease.bundles` adds it to the benchmark's bundle
TOLERANCE = 1e-2  # of the relative error to torch in float32: above it a variant has no figure


class Variant(NamedTuple):
    """A graph, by the name of its variant in a bundle, and options of the CUDA provider over latentrt's own."""

    title: str
    graph: str = PLAIN
    options: Mapping[str, str] = {}


NHWC = {"prefer_nhwc": "1"}  # adds copies to the CPU, so that it may not be captured: docs/cuda-graphs.md
BIAS = {"fuse_conv_bias": "1", "use_tf32": "1"}  # without TF32 the bias is not fused
VARIANTS: Mapping[str, Variant] = {
    "plain": Variant("plain graph"),
    "exhaustive": Variant("plain, convolutions tried out", options={"cudnn_conv_algo_search": "EXHAUSTIVE"}),
    "nhwc": Variant("plain, prefer_nhwc", options=NHWC),
    "sdpa-8": Variant("plain, sdpa_kernel 8 (cuDNN)", options={"sdpa_kernel": "8"}),
    "sdpa-1": Variant("plain, sdpa_kernel 1 (flash)", options={"sdpa_kernel": "1"}),
    "fused": Variant("rewritten graph", FP16_ORT_CUDA),
    "fused-bias": Variant("rewritten, fuse_conv_bias", FP16_ORT_CUDA, BIAS),
}
