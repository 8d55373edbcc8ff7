"""Which graph of a network ONNX Runtime runs, by device and precision."""

from __future__ import annotations

from collections.abc import Sequence

from latentrt.bundle.spec import (
    DENOISER,
    FP16,
    FP16_ORT_CUDA,
    FP32,
    FP32_ORT_CPU,
    INT8,
    INT8_ORT_CPU,
    GraphSpec,
    ModelSpec,
)
from latentrt.errors import BackendError, BundleError
from latentrt.runtime.machine.cores import multiplies_bytes

VARIANTS = {
    ("cpu", FP32): (FP32_ORT_CPU, FP32),
    ("cpu", FP16): (FP16,),
    ("cpu", INT8): (INT8_ORT_CPU, FP32_ORT_CPU, FP32),  # a denoiser must have the first, and no other network does
    ("cuda", FP16): (FP16_ORT_CUDA,),
}


def check_int8() -> None:
    """Refuse a CPU whose products of 8-bit numbers overflow. Raise BackendError."""
    if not multiplies_bytes():
        needed, fix = "AVX-512 VNNI or AVX-VNNI, for products of 8 bits that do not overflow", "take --precision fp32"
        raise BackendError("int8 on a CPU without VNNI", needed=needed, fix=fix)


def graph_of(spec: ModelSpec, network: str, variants: Sequence[str], precision: str) -> GraphSpec:
    """Return the first of these variants that a network of a bundle has, for a precision.

    Raises:
        BundleError: it has none.
    """
    known = spec.networks[network].variants if network in spec.named(DENOISER) else (INT8_ORT_CPU,)
    if precision == INT8 and INT8_ORT_CPU not in known:
        needed = "one that was exported with it"
        raise BundleError(f"{spec.id} has no graph in int8", needed=needed, fix="latentrt export --int8 SOURCE TARGET")
    return spec.graph(network, *variants)
