"""Graphs as TensorRT's parser gets them: weights of the right type under their names, known sizes, older opsets."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from latentrt.bundle.bundle import Bundle
from latentrt.errors import PlanError
from latentrt_export.plans.plan_graph import load_graph, serialized, weights_of
from latentrt_export.plans.plan_shapes import profiles_of, shapes_of

EMOJI = Bundle.open(check_hashes=False)
FIXED = shapes_of(EMOJI.spec, {})


def test_weights_are_retyped_and_keep_their_names(tmp_path: Path) -> None:
    """Stored in float16, wanted in float32: the Casts are gone, the numbers and names are the same."""
    graph = EMOJI.spec.graphs()["text_encoder"]
    model = load_graph(EMOJI, graph, profiles_of(EMOJI.spec, "text_encoder", FIXED), 23)
    table = weights_of(model, graph)
    assert {(weight.stored, weight.dtype) for weight in table.values()} == {("F16", "float32")}
    before = {name: model.graph.initializers[name].const_value.numpy().copy() for name in table}  # type: ignore[union-attr]
    data, path = serialized(model, EMOJI.path(graph.path), tmp_path)
    path.write_bytes(data)
    (tmp_path / "model.safetensors").unlink()  # all of its weights were retyped; onnx refuses links
    written = ir.load(path)
    assert not [node for node in written.graph if node.op_type == "Cast" and node.inputs[0].is_initializer()]  # type: ignore[union-attr]
    for name, values in before.items():
        value = written.graph.initializers[name].const_value
        assert value is not None
        assert value.dtype == ir.DataType.FLOAT
        np.testing.assert_array_equal(value.numpy(), values.astype(np.float32))
        stored = EMOJI.path(table[name].file).read_bytes()[table[name].offset :][: table[name].bytes]
        assert stored == values.tobytes()


def test_half_graphs_are_read_where_they_lie(tmp_path: Path) -> None:
    graph = EMOJI.spec.graphs("fp16")["unet"]
    model = load_graph(EMOJI, graph, profiles_of(EMOJI.spec, "unet", FIXED), 23)
    wanted = {name: weight.dtype for name, weight in weights_of(model, graph).items()}
    assert set(wanted.values()) <= {"float16", "float32"}
    islands = [name for name, dtype in wanted.items() if dtype == "float32"]
    _, path = serialized(model, EMOJI.path(graph.path), tmp_path)
    assert (path.parent == tmp_path) == bool(islands)


def test_only_dimensions_with_one_size_are_fixed() -> None:
    asked, channels = shapes_of(EMOJI.spec, {}, ["lanes=2", "lanes=4"]), str(EMOJI.spec.latents.channels)
    graph = EMOJI.spec.graphs()["unet"]
    model = load_graph(EMOJI, graph, profiles_of(EMOJI.spec, "unet", asked), 18)
    sample, timestep, *told = (list(map(str, value.shape or ())) for value in model.graph.inputs)
    assert (sample, timestep) == (["batch", channels, "16", "16"], ["batch"])
    assert {tuple(each[:2]) for each in told} == {("batch", "77")}
    assert model.opset_imports[""] == 18


def test_a_damaged_graph_is_named(tmp_path: Path) -> None:
    root = shutil.copytree(EMOJI.root, tmp_path / "bundle", ignore=shutil.ignore_patterns("plans"))
    bundle = Bundle.open(root, check_hashes=False)
    graph = bundle.spec.graphs()["vae_decoder"]
    bundle.path(graph.path).write_bytes(b"\xff" * 100)
    with pytest.raises(PlanError, match=r"decoder\.onnx cannot be read"):
        load_graph(bundle, graph, profiles_of(bundle.spec, "vae_decoder", FIXED), 23)


def test_no_room_for_retyped_weights(tmp_path: Path) -> None:
    graph = EMOJI.spec.graphs()["vae_decoder"]
    model = load_graph(EMOJI, graph, profiles_of(EMOJI.spec, "vae_decoder", FIXED), 23)
    with pytest.raises(PlanError, match="cannot be written"):
        serialized(model, EMOJI.path(graph.path), tmp_path / "missing")
