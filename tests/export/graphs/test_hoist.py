"""What is taken out of a UNet to be computed once a picture, against the graph before it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from latentrt.bundle.bundle import Bundle
from latentrt.runtime.onnxruntime import OrtBackend
from latentrt_export.graphs import passes
from latentrt_export.graphs.parts.hoist import hoist
from latentrt_export.graphs.ranges import open_session
from latentrt_export.graphs.to_onnx import quiet, trace
from latentrt_export.graphs.wrap import load_network

Exported = Callable[[str], tuple[Path, Path]]


def whole(root: Path) -> ir.Model:
    with quiet():
        model = trace(load_network(root, "unet", tokens=77))
    passes.clean(model)
    return model


@pytest.mark.parametrize("name", ["sd", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_the_numbers_are_the_same_to_the_bit(exported: Exported, name: str) -> None:
    _, root = exported(name)
    model = whole(root)
    before = open_session(model, root)
    nodes = len(model.graph)
    text = hoist(model, ["encoder_hidden_states"])
    assert text is not None
    attentions = [node for node in model.graph if node.op_type == "Attention"]
    assert len(text.graph.outputs) == len(attentions)  # half of them attend to the text, each with keys and values
    assert len(model.graph) + len(text.graph) <= nodes + sum(node.op_type == "Transpose" for node in text.graph)
    assert "encoder_hidden_states" not in {value.name for value in model.graph.inputs}
    draw = np.random.default_rng(0)
    feeds = {
        value.name: draw.standard_normal(
            [size if isinstance(size, int) else 2 + 6 * (i > 0) for i, size in sides]
        ).astype(np.float32)
        for value in before.get_inputs()
        for sides in [list(enumerate(value.shape))]
    }
    (wanted,) = before.run(["out"], feeds)
    once = open_session(text, root)
    states = {"encoder_hidden_states": feeds.pop("encoder_hidden_states")}
    told = dict(zip((value.name for value in once.get_outputs()), once.run(None, states), strict=True))
    (ours,) = open_session(model, root).run(["out"], {**feeds, **told})
    np.testing.assert_array_equal(ours, wanted)
    for lane in range(2):  # a picture's alone
        alone = once.run(None, {name: array[lane : lane + 1] for name, array in states.items()})
        for array, together in zip(alone, told.values(), strict=True):
            np.testing.assert_array_equal(array[0], together[lane])


def test_nothing_is_taken_out_where_nothing_depends_on_these_inputs_alone(exported: Exported) -> None:
    model = ir.load(exported("pixels")[1] / "unet" / "model.onnx")
    assert hoist(model, ["encoder_hidden_states"]) is None


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_bundle_has_both(exported: Exported, precision: str) -> None:
    bundle = Bundle.open(exported("sdxl")[1], check_hashes=False)
    backend = OrtBackend(threads=1, precision=precision)
    text, unet = (backend.load(bundle, name).graph for name in ("unet_text", "unet"))
    outputs = {tensor.name: tensor.dtype for tensor in text.outputs}
    assert outputs.items() <= {tensor.name: tensor.dtype for tensor in unet.inputs}.items()
    assert {*outputs.values()} == {"float32" if precision == "fp32" else "float16"}
