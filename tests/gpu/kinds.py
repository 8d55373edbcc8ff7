"""The kinds of backend that are tested: (backend, precision). Its imports cannot fail."""

from __future__ import annotations

import os

EMULATED = os.environ.get("LATENTRT_EMULATED_GPU") == "1"
KINDS = (("onnxruntime", "fp16"), ("tensorrt", "fp16"), ("tensorrt-rtx", "fp16"))  # CUDA's ONNX Runtime: half only
if EMULATED:  # the two flavours of the stand-in are one
    KINDS = (("onnxruntime", "fp32"), *KINDS[:2])
