"""Manifests of schema 1, as latentrt 0.1 wrote them, brought to schema 2.

Schema 1 knew text encoders, one UNet and one VAE by name. It kept their float32 graphs under "graphs", float16 ones
under "half" (with the nodes left in float32 under "islands") and those for ONNX Runtime on CUDA under "cuda".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from latentrt.bundle.spec import DECODER, DENOISER, ENCODER, FP16, FP16_ORT_CUDA, FP32, TEXT_ENCODER

ROLES = {"unet": DENOISER, "vae_decoder": DECODER, "vae_encoder": ENCODER}
PARTS = {FP32: "graphs", FP16: "half", FP16_ORT_CUDA: "cuda"}
GONE = ("family", "tokenizers", "text_encoders", "islands", *PARTS.values())


def upgraded(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the "model" part of a manifest of schema 1 as schema 2 has it.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: a field is missing or of another kind.
    """
    tokenizers = dict(zip(model["text_encoders"], model["tokenizers"], strict=True))
    order = [*tokenizers, *(name for name in model["graphs"] if name not in tokenizers)]
    networks = {name: _network(model, name, tokenizers.get(name)) for name in order}
    return {**{key: value for key, value in model.items() if key not in GONE}, "networks": networks}


def _network(model: Mapping[str, Any], name: str, tokenizer: str | None) -> dict[str, Any]:
    own = model["graphs"][name]
    variants = {
        variant: _variant(own, model[part][name]) for variant, part in PARTS.items() if name in model.get(part, {})
    }
    if FP16 in variants and name in model.get("islands", {}):
        variants[FP16]["islands"] = model["islands"][name]
    role = TEXT_ENCODER if tokenizer is not None else ROLES[name]
    return {
        "role": role,
        "inputs": own["inputs"],
        "outputs": own["outputs"],
        "variants": variants,
        "tokenizer": tokenizer,
    }


def _variant(own: Mapping[str, Any], graph: Mapping[str, Any]) -> dict[str, Any]:
    pairs = [pair for key in ("inputs", "outputs") for pair in zip(own[key], graph[key], strict=True)]
    dtypes = {mine["name"]: theirs["dtype"] for mine, theirs in pairs if mine["dtype"] != theirs["dtype"]}
    return {"path": graph["path"], "opset": graph["opset"], "nodes": graph["nodes"], "dtypes": dtypes}
