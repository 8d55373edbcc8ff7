"""Graphs that take LoRAs as inputs: to the bit the plain ones with zeros, and each lane as it is alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.spec import LORA, GraphSpec
from latentrt.errors import ExportError
from latentrt.model.conditioners.adapters import adapted
from latentrt.model.control import controlled
from latentrt.runtime.base import Network
from latentrt.runtime.onnxruntime import OrtBackend
from latentrt.runtime.signature import shape_of
from latentrt_export.checkpoint.single.choices import Choices
from latentrt_export.merge_bundle import merge_bundle
from latentrt_export.to_bundle import export_bundle
from latentrt_export.variants import add_adapters

Exported = Callable[[str], tuple[Path, Path]]
SIZES = {"batch": 3, "height": 16, "width": 8, "tokens": 77, "rank": 5}
FIRST = {"out", "text_states", "text.0"}  # outputs
FAMILIES = {  # the modules that each network takes
    "sd": {"text_encoder": 12, "unet_text": 8, "unet": 40},
    "sd2": {"text_encoder": 12, "unet_text": 8, "unet": 40},
    "sdxl": {"text_encoder": 6, "text_encoder_2": 12, "unet_text": 16, "unet": 72},
}


def feeds_of(graph: GraphSpec, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Return random arrays for a graph's inputs, LoRAs among them."""
    rng = np.random.default_rng(seed)
    feeds: dict[str, NDArray[Any]] = {}
    for tensor in graph.inputs:
        shape = shape_of(tensor, SIZES)
        if tensor.dtype == "int64":
            feeds[tensor.name] = rng.integers(0, 2, shape)
        elif tensor.name == "timestep":
            feeds[tensor.name] = rng.uniform(0, 999, shape).astype(tensor.dtype)
        else:
            feeds[tensor.name] = (rng.standard_normal(shape) * 0.5).astype(tensor.dtype)
    return feeds


def without(feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {name: np.zeros_like(array) if name.startswith(LORA) else array for name, array in feeds.items()}


def check(plain: Network, ours: Network) -> int:
    """Compare a network that takes LoRAs with its plain one; return how many modules it adapts."""
    feeds = feeds_of(ours.graph)
    own = {tensor.name for tensor in plain.graph.inputs}
    expected = plain({key: array for key, array in feeds.items() if key in own})
    found, changed = ours(without(feeds)), ours(feeds)
    alone = ours({key: array[1:2] for key, array in feeds.items()})
    for key, array in expected.items():
        np.testing.assert_array_equal(found[key], array, err_msg=f"{ours.graph.path} {key}")
        np.testing.assert_array_equal(alone[key][0], changed[key][1], err_msg=f"{ours.graph.path} {key}")
    assert all(not np.allclose(changed[key], expected[key], atol=1e-3) for key in FIRST & set(expected))
    return sum(key.startswith(LORA) for key in feeds) // 2


@pytest.mark.parametrize("family", FAMILIES)
def test_zeros_are_exact_and_lanes_are_alone(taking: Exported, family: str) -> None:
    bundle = Bundle.open(taking(family)[1])
    taken: dict[str, int] = {}
    for precision, residuals in (("fp32", False), ("fp32", True), ("fp16", False)):
        backend = OrtBackend(threads=1, precision=precision)
        plain, ours = (controlled(one, []) if residuals else one for one in (bundle, adapted(bundle)))
        for name in FAMILIES[family] if precision == "fp32" and not residuals else ("unet",):
            taken[name] = check(backend.load(plain, name), backend.load(ours, name))
    assert taken == FAMILIES[family]


def test_the_bundle_is_whole_and_can_be_read(taking: Exported, exported: Exported, tmp_path: Path) -> None:
    spec, plain = Bundle.open(taking("sd")[1]).spec, Bundle.open(exported("sd")[1]).spec
    assert spec.golden == plain.golden
    unet = spec.networks["unet"]
    assert unet.inputs == plain.networks["unet"].inputs
    assert {"fp32", "fp16", "fp32+control"} <= set(unet.adapted().variants)
    assert {"fp16-ort-cuda", "fp16-ort-cuda+control", "fp16-ort-cuda+adapter"} <= set(unet.adapted().variants)
    for variant in ("fp16-ort-cuda", "fp16-ort-cuda+adapter"):
        onnx.checker.check_model(taking("sd")[1] / unet.adapted().variants[variant].path, full_check=True)
    assert len(unet.adapted().inputs) == len(unet.inputs) + 80
    name = "lora.up_blocks.0.attentions.1.proj_out"
    shapes = {tensor.name: tensor.shape for tensor in unet.adapted().inputs}
    assert shapes[f"{name}.down"] == ("batch", 32, "rank")
    assert shapes[f"{name}.up"] == ("batch", "rank", 32)
    assert plain.networks["unet"].adapted() is plain.networks["unet"]
    with pytest.raises(ExportError, match="no products with weights in files"):
        add_adapters(exported("tiny-vae")[1], Bundle.open(exported("taesd")[1]).spec)
    control, net = exported("control-sd-1")
    with pytest.raises(ExportError, match=r"--adapters for .*, which has hint, controlnet.*a model with a UNet"):
        export_bundle(control, tmp_path / "net", choices=Choices(adapters=True))
    with pytest.raises(ExportError, match=r"LoRAs for .*, which has no UNet"):
        merge_bundle(net, tmp_path / "net", (), adapters=True)
    again = merge_bundle(taking("sd")[1], tmp_path / "again", (), adapters=True)
    assert again.notes == ("takes LoRAs with each request",)
    assert Bundle.open(tmp_path / "again").spec == spec
