"""Estimates before a build. test_rtx.py compares them with real builds."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from latentrt.bundle.bundle import Bundle
from latentrt.errors import DeviceMemoryError, PlanError
from latentrt.runtime.tensorrt.record import STRIPPED, PlanKey, Profile
from latentrt_export.plans import plan_memory
from latentrt_export.plans.plan_graph import load_graph, weights_of
from latentrt_export.plans.plan_memory import Estimate, check_room, estimate, peak_activations
from latentrt_export.plans.plan_shapes import profiles_of, shapes_of

EMOJI = Bundle.open(check_hashes=False)


def key_of(network: str) -> PlanKey:
    profiles = profiles_of(EMOJI.spec, network, shapes_of(EMOJI.spec, {}))
    return PlanKey(network, "", "", "fp32", "tensorrt", "11.4", "", "9.0", "", (), profiles)


def estimate_of(key: PlanKey) -> Estimate:
    graph = EMOJI.spec.graph(key.network, "fp32")
    model = load_graph(EMOJI, graph, key.profiles, 23)
    return estimate(key, ir.to_proto(model), weights_of(model, graph).values())


def chain(sides: int | str) -> onnx.ModelProto:
    """Return x → Relu → a → Exp → b; a + b → y, four bytes an item."""
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Exp", ["a"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [sides, 10]) for name in "xy")
    return helper.make_model(helper.make_graph(nodes, "chain", [x], [y]), opset_imports=[helper.make_opsetid("", 18)])


def test_peak_of_activations_is_what_is_alive_at_once() -> None:
    profile = Profile({"n": (1, 2, 100)})
    assert peak_activations(chain("n"), profile) == 4 * 100 * 10 * 4  # x, a, b and y at the last node
    assert peak_activations(chain(3), profile) == 4 * 3 * 10 * 4


@pytest.mark.parametrize("network", EMOJI.spec.graphs())
def test_estimates_count_weights_exactly(network: str) -> None:
    key, graph = key_of(network), EMOJI.spec.graph(network, "fp32")
    each = estimate_of(key)
    weights = weights_of(load_graph(EMOJI, graph, key.profiles, 23), graph).values()
    assert each.weights == sum(2 * weight.bytes for weight in weights)  # stored in float16
    assert each.plan > each.weights
    assert each.device > each.weights + each.activations
    assert estimate_of(replace(key, options=(STRIPPED,))).plan == each.plan - each.weights


def test_what_does_not_fit_is_refused_before_it_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    each = estimate_of(key_of("unet"))
    check_room([each], tmp_path, each.device)
    with pytest.raises(DeviceMemoryError, match=r"the GPU has 0\.0 GiB free.*to build the unet \(weights 0\.03"):
        check_room([each], tmp_path, each.device - 1)
    check_room([each], tmp_path, each.device + each.host, "8.7")
    with pytest.raises(DeviceMemoryError, match="the GPU has"):  # a Jetson's GPU and host share theirs
        check_room([each], tmp_path, each.device + each.host - 1, "8.7")
    monkeypatch.setattr(plan_memory, "host_free", lambda: each.host - 1)
    with pytest.raises(DeviceMemoryError, match="this machine has"):
        check_room([each], tmp_path, None)
    monkeypatch.setattr(plan_memory, "host_free", lambda: None)
    check_room([each], tmp_path, None)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=each.plan - 1))
    with pytest.raises(PlanError, match=r"MB free.*for plans"):
        check_room([each], tmp_path, None)


def test_free_memory_of_this_machine_is_known() -> None:
    free = plan_memory.host_free()
    assert free is not None
    assert 2**24 < free < 2**50
