"""A timestep for each lane, in the forms that exporters write; and sides of shapes from two runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from latentrt.errors import ExportError
from latentrt_export.existing.probe import side_of, sizes_of_runs
from latentrt_export.existing.timestep import per_lane

FLOAT, INT, DOUBLE = TensorProto.FLOAT, TensorProto.INT64, TensorProto.DOUBLE
Node = tuple[str, list[str], str, dict[str, Any]]
NUMBERS = {"zero": [0], "one": [1], "all": [-1], "column": [-1, 1], "three": [3]}
END: list[Node] = [("Cast", ["column_"], "float", {"to": FLOAT}), ("Mul", ["float", "frequencies"], "out", {})]


def graph_of(kind: int, shape: Sequence[Any], nodes: Sequence[Node]) -> ir.Model:
    """Return frequencies · timestep, (batch, 4), by way of some nodes."""
    constants = [numpy_helper.from_array(np.array(value, np.int64), name) for name, value in NUMBERS.items()]
    constants.append(numpy_helper.from_array(np.array([1.0, 0.5, 0.25, 2.0], np.float32), "frequencies"))
    constants.append(numpy_helper.from_array(np.array(2.0, np.float32), "two"))
    graph = helper.make_graph(
        [helper.make_node(op, inputs, [output], **options) for op, inputs, output, options in nodes],
        "times",
        [helper.make_tensor_value_info("timestep", kind, shape), helper.make_tensor_value_info("sample", FLOAT, ["b"])],
        [helper.make_tensor_value_info("out", FLOAT, None)],
        constants,
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10))
    common.ShapeInferencePass(data_prop=False)(model)
    return model


SCALAR: list[Node] = [
    ("Unsqueeze", ["timestep", "zero"], "vector", {}),
    ("Shape", ["sample"], "size", {}),
    ("Expand", ["vector", "size"], "lanes", {}),
    ("Unsqueeze", ["lanes", "one"], "column_", {}),
]
FORMS: dict[str, tuple[int, list[Any], list[Node]]] = {
    "a number, expanded": (FLOAT, [], [*SCALAR, *END]),
    "a whole number, expanded": (INT, [], [*SCALAR, *END]),
    "a double, cast first": (
        DOUBLE,
        [],
        [
            ("Cast", ["timestep"], "cast", {"to": FLOAT}),
            ("Unsqueeze", ["cast", "zero"], "vector", {}),
            *SCALAR[1:],
            *END,
        ],
    ),
    "whole numbers in a vector": (
        INT,
        ["steps"],
        [*SCALAR[1:2], ("Expand", ["timestep", "size"], "lanes", {}), SCALAR[3], *END],
    ),
    "a vector of one": (FLOAT, [1], [("Unsqueeze", ["timestep", "one"], "column_", {}), *END]),
    "by reshapes": (
        FLOAT,
        [],
        [("Reshape", ["timestep", "all"], "vector", {}), ("Reshape", ["vector", "column"], "column_", {}), *END],
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_lane_has_its_own(name: str) -> None:
    model = graph_of(*FORMS[name])
    old = model.graph.inputs[0]
    new = ir.Value(name="times", shape=ir.Shape(["batch"]), type=ir.TensorType(ir.DataType.FLOAT))
    per_lane(model.graph, old, new)
    model.graph.inputs[0] = new
    common.RemoveUnusedNodesPass()(model)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    times = np.array([981.0, 500.25, 0.5], np.float32)
    feeds = {"times": times, "sample": np.zeros(3, np.float32)}
    (out,) = session.run(None, {each.name: feeds[each.name] for each in session.get_inputs()})
    np.testing.assert_array_equal(out, times[:, None] * np.float32([1.0, 0.5, 0.25, 2.0]))


@pytest.mark.parametrize(
    ("kind", "shape", "nodes", "words"),
    [
        (FLOAT, [], [("Mul", ["timestep", "frequencies"], "out", {})], "that Mul reads as one number"),
        (FLOAT, ["b", 1], [("Mul", ["timestep", "frequencies"], "out", {})], "of 2 axes"),
        (
            FLOAT,
            ["b"],
            [("Unsqueeze", ["timestep", "zero"], "row", {}), ("Mul", ["row", "two"], "out", {})],
            "Unsqueeze",
        ),
        (FLOAT, ["b"], [("Squeeze", ["timestep", "zero"], "one_", {}), ("Mul", ["one_", "two"], "out", {})], "Squeeze"),
    ],
)
def test_others_are_refused(kind: int, shape: list[Any], nodes: list[Node], words: str) -> None:
    model = graph_of(kind, shape, nodes)
    new = ir.Value(name="times", shape=ir.Shape(["batch"]), type=ir.TensorType(ir.DataType.FLOAT))
    with pytest.raises(ExportError, match=words):
        per_lane(model.graph, model.graph.inputs[0], new)


SIDES: dict[str | int, Callable[[int, int, int, int], int]] = {
    77: lambda b, h, w, t: 77,
    "batch": lambda b, h, w, t: b,
    "8*batch": lambda b, h, w, t: 8 * b,
    "height//8": lambda b, h, w, t: h // 8,
    "8*width": lambda b, h, w, t: 8 * w,
    "height*width//16": lambda b, h, w, t: h * w // 16,
    "tokens": lambda b, h, w, t: t,
    "3*height*width//2": lambda b, h, w, t: 3 * h * w // 2,
}


@pytest.mark.parametrize("side", SIDES)
def test_sides_from_two_runs(side: str | int) -> None:
    runs = sizes_of_runs(8)
    assert side_of([SIDES[side](*run.values()) for run in runs], runs) == side


def test_a_side_of_another_form_stays_open() -> None:
    runs = sizes_of_runs(8)
    assert side_of([run["height"] + 1 for run in runs], runs) is None
