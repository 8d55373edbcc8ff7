"""Add-ons' graphs, and the UNet's with residuals, against torch; what is none that can be exported."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from diffusers import ControlNetModel, T2IAdapter, UNet2DConditionModel

from latentrt.bundle.bundle import EMBEDDED, Bundle
from latentrt.errors import ExportError
from latentrt.model.control import controlled
from latentrt.runtime.base import call
from latentrt.runtime.onnxruntime import OrtBackend
from latentrt.runtime.signature import shape_of
from latentrt_export.checkpoint.source import open_checkpoint
from latentrt_export.graphs.half import emulate
from latentrt_export.graphs.parts.control import adapted_skips
from latentrt_export.graphs.ranges import open_session
from latentrt_export.graphs.to_onnx import quiet
from latentrt_export.variants import add_control
from latentrt_export.verify.checks import relative_l2
from latentrt_export.verify.networks import HALF_BOUND, NETWORK_BOUND, half_check
from tests.export.graphs.fused.test_passes import distance
from tests.export.graphs.test_lower import _feeds
from tests.support.gpu.cuda_kernels import without_kernel
from tests.support.ort.contrib import interpret

Arrays = dict[str, Any]
SCALE, FACTORS = np.float32([0.5, 2.0]), np.float32([[1] * 5, [0.1, 0.2, 0.3, 0.6, 1]])


def feeds_of(size: tuple[int, int], *, xl: bool) -> tuple[Arrays, np.ndarray]:
    """Return the inputs of both networks at a size of the latents, and a hint of twice that."""
    draw = np.random.default_rng(0)
    made = {
        "sample": draw.standard_normal((2, 4, *size), np.float32),
        "timestep": np.float32([7, 900.5]),
        "encoder_hidden_states": draw.standard_normal((2, 77, 80 if xl else 32), np.float32),
    }
    if xl:
        made |= {
            "text_embeds": draw.standard_normal((2, 24), np.float32),
            "time_ids": np.float32([[16, 8, 0, 0, 16, 8]] * 2),
        }
    return made, draw.uniform(0, 1, (2, 3, 2 * size[0], 2 * size[1])).astype(np.float32)


@pytest.mark.parametrize("name", ["sd", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_graphs_compute_what_torch_does(exported: Callable[[str], tuple[Path, Path]], name: str) -> None:
    """The ControlNet twice, as a chain; then the UNet, with features of T2I-Adapters too."""
    source, base = exported(name)
    net, add_on = exported(f"control-{name}-1")
    with quiet():
        control, unet = ControlNetModel.from_pretrained(net), UNet2DConditionModel.from_pretrained(source / "unet")
        unet.num_upsamplers = 62  # else no odd size
    backend, bundles = (
        OrtBackend(threads=1),
        {
            add_on: Bundle.open(add_on),
            base: controlled(Bundle.open(base), [Bundle.open(exported("adapter-colour")[1]).spec]),
        },
    )
    networks = {each: backend.load(bundle, each) for bundle in bundles.values() for each in bundle.spec.networks}
    runs = []
    for size in ((8, 12), (7, 5)):
        feeds, picture = feeds_of(size, xl=name == "sdxl")
        known = {**feeds, "picture": picture, "scale": SCALE, "factors": FACTORS}
        for each in ("hint", "controlnet_text"):
            known |= call(networks[each], known)
        names = [tensor.name for tensor in networks["controlnet"].graph.outputs]
        sizes = {"batch": 2, "height": size[0], "width": size[1]}
        before = [tensor for tensor in networks["controlnet"].graph.inputs if tensor.name.endswith(".before")]
        known |= {tensor.name: np.zeros(shape_of(tensor, sizes), np.float32) for tensor in before}
        once = call(networks["controlnet"], known)
        runs.append({**known, **once})
        known |= {f"{one}.before": once[one] for one in names}
        twice = call(networks["controlnet"], known)
        told = {key: torch.from_numpy(array) for key, array in feeds.items()}
        states = told["sample"], told["timestep"], told["encoder_hidden_states"]
        with torch.no_grad():
            down, middle = control(
                *states,
                torch.from_numpy(picture),
                added_cond_kwargs=told if name == "sdxl" else None,
                return_dict=False,
            )
            weights = torch.from_numpy(SCALE[:, None] * FACTORS)[..., None, None, None]
            own = [one * weights[:, index] for index, one in enumerate((*down, middle))]
            both = [one + one for one in own]
            draw = np.random.default_rng(1)
            added = [one for one in networks["unet"].graph.inputs if one.name.startswith("adapter_")]
            features = {one.name: draw.standard_normal(shape_of(one, sizes), np.float32) for one in added}
            expected = unet(
                *states,
                added_cond_kwargs=told if name == "sdxl" else None,
                down_block_additional_residuals=both[:-1],
                mid_block_additional_residual=both[-1],
                down_intrablock_additional_residuals=list(map(torch.from_numpy, features.values())),
            ).sample
        for residual, theirs, total in zip(names, own, both, strict=True):
            assert relative_l2(once[residual], theirs.numpy()) < NETWORK_BOUND
            assert relative_l2(twice[residual], total.numpy()) < NETWORK_BOUND
        for each in ("unet_text", "unet"):
            twice |= call(networks[each], {**feeds, **features, **twice})
        assert relative_l2(twice["out"], expected.numpy()) < NETWORK_BOUND
    half = bundles[add_on].spec.networks["controlnet"].graph("fp16")
    check = half_check(add_on / half.path, half, "controlnet", runs)
    assert check.value is not None
    assert check.value < HALF_BOUND


def test_residuals_of_a_bundle_that_exists_need_its_graphs_alone(tmp_path: Path) -> None:
    """Those of the embedded model, in float32 and float16."""
    (tmp_path / "unet").mkdir()
    for path in (EMBEDDED / "unet").iterdir():
        (tmp_path / "unet" / path.name).hardlink_to(path)
    spec = add_control(tmp_path, Bundle.open(check_hashes=False).spec).networks["unet"]
    controlled = [name for name in spec.variants if name.endswith("+control")]
    assert controlled == ["fp32+control", "fp16+control", "fp16-ort-cuda+control"]
    residuals, features = (spec.variants[f"fp32+{kind}"].inputs for kind in ("control", "adapter"))
    assert [tensor.name for tensor in residuals] == [*(f"residual_{index}" for index in range(6)), "residual_mid"]
    assert features[:7] == residuals
    assert [tensor.name for tensor in features[7:]] == [f"adapter_{index}" for index in range(4)]
    assert residuals[4].shape == ("batch", 96, "((height+3)//4)", "((width+3)//4)")
    assert {tensor.dtype for tensor in spec.graph("fp16+control").inputs[-7:]} == {"float16"}


@pytest.mark.parametrize("add_on", ["control-{}-1", "adapter-colour"])
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_graphs_for_cuda(exported: Callable[[str], tuple[Path, Path]], name: str, add_on: str) -> None:
    """The UNet with residuals: a kernel for every node, as many fused nodes as the plain one, the half graph's numbers.

    And add-ons give residuals in the dtype in which they and the UNet read them, and read scales in float32.
    """
    base = exported(name)[1]
    added = Bundle.open(exported(add_on.format(name))[1])
    unet = controlled(Bundle.open(base), [added.spec]).spec.networks["unet"]
    half, graph = (unet.graph(variant) for variant in ("fp16", "fp16-ort-cuda"))
    paths = graph.path, Bundle.open(base).spec.graphs("fp16-ort-cuda")["unet"].path
    model, plain = (ir.load(base / path) for path in paths)
    assert without_kernel(model) == set()
    kinds, before = (Counter(node.op_type for node in one.graph) for one in (model, plain))
    for together in (("GroupNorm", "SkipGroupNorm"), ("NhwcConv", "MatMul"), ("MultiHeadAttention",)):
        assert sum(kinds[kind] for kind in together) == sum(before[kind] for kind in together), together
    fused = kinds["SkipGroupNorm"] - before["SkipGroupNorm"]
    assert fused > 0 if added.spec.kind == "t2i_adapter" else fused == 0  # features are added in front of norms
    feeds = _feeds(half)
    source = ir.load(base / half.path)
    emulate(source)
    expected = open_session(source, (base / half.path).parent).run(None, feeds)
    assert distance(interpret(model, (base / graph.path).parent, feeds), expected) < 5e-3
    for own in added.spec.graphs("fp16-ort-cuda").values():
        assert without_kernel(ir.load(added.root / own.path)) == set(), own.path
    body = added.spec.networks[added.spec.named("control")[0]].graph("fp16-ort-cuda")
    given = {tensor.name: tensor.dtype for tensor in body.outputs}
    dtypes = {tensor.name: tensor.dtype for tensor in (*body.inputs, *graph.inputs)}
    assert {name: dtypes[f"{name}.before"] for name in given} == given
    assert {name: dtypes[name] for name in given} == given
    assert dtypes["scale"] == "float32"


@pytest.mark.parametrize(
    ("config", "skips"),
    [
        ({"down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), "layers_per_block": 2}, (2, 5, 8, 11)),
        ({"down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2, "layers_per_block": 2}, (3, 5, 8)),
        ({"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "layers_per_block": [1, 3]}, (2, 5)),
        ({"down_block_types": ("DownBlock2D", "AttnDownBlock2D")}, ()),
    ],
    ids=["SD 1 and 2", "SDXL", "a number for each block", "no text"],
)
def test_where_features_are_added(config: dict[str, Any], skips: tuple[int, ...]) -> None:
    assert adapted_skips(config) == skips


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "light"])
def test_features_are_those_of_torch(exported: Callable[[str], tuple[Path, Path]], name: str) -> None:
    """At sides that do not halve evenly too."""
    source, add_on = exported(f"adapter-{name}")
    picture = np.random.default_rng(0).uniform(0, 1, (2, 3, 20, 28)).astype(np.float32)
    with torch.no_grad():
        expected = T2IAdapter.from_pretrained(source)(torch.from_numpy(picture))
    found = call(OrtBackend(threads=1).load(Bundle.open(add_on), "t2i_adapter"), {"picture": picture})
    for index, theirs in enumerate(expected):
        assert relative_l2(found[f"hint_{index}"], theirs.numpy()) < NETWORK_BOUND


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "T2IAdapter", "adapter_type": "style_adapter"}, "adapter_type 'style_adapter'"),
        ({"_class_name": "T2IAdapter", "in_channels": 4}, "in_channels 4. Needed: 3, or 1 of grey"),
        ({"_class_name": "T2IAdapter", "channels": 320}, "channels 320"),
        ({"_class_name": "SparseControlNetModel"}, "'SparseControlNetModel'. Needed: ControlNetModel or "),
        ({"_class_name": "ControlNetUnionModel", "num_control_type": 0}, "num_control_type 0"),
        ({"_class_name": "ControlNetUnionModel", "controlnet_conditioning_channel_order": "bgr"}, "order 'bgr'"),
        ({"conditioning_channels": 4}, "conditioning_channels 4. Needed: conditioning_channels 3"),
        ({"class_embed_type": "timestep"}, "class_embed_type 'timestep'"),
        ({"controlnet_conditioning_channel_order": "grb"}, "order 'grb'"),
        ({"conditioning_embedding_out_channels": 5}, "conditioning_embedding_out_channels 5"),
        ({"addition_embed_type": "text"}, "addition_embed_type 'text'"),
    ],
)
def test_other_control_networks_are_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "ControlNetModel", **config}))
    with pytest.raises(ExportError, match=message):
        open_checkpoint(tmp_path)
