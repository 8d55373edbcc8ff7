"""Deserialized plans and their contexts, over a fake TensorRT and an emulated GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from latentrt.bundle.bundle import Bundle, FileRecord
from latentrt.bundle.spec import TensorSpec
from latentrt.cuda.array import DeviceArray
from latentrt.errors import BackendError, DeviceMemoryError, NetworkError, PlanError
from latentrt.runtime.tensorrt.backend import TensorRtBackend, TensorRtNetwork
from latentrt.runtime.tensorrt.plans import PlanStore
from latentrt.runtime.tensorrt.record import Profile
from tests.support.gpu.fakes.fake_plans import fake_plan, put_bytes, put_plan
from tests.support.gpu.fakes.fake_tensorrt import FakeTensorRt
from tests.support.gpu.host_gpu import HostGpu, host_gpu, view
from tests.support.models import small_bundle
from tests.support.models.small_bundle import BIG, SHAPE, SQUARE, WIDE, Arrays, expected, feeds, load

bundle, gpu, fake = small_bundle.bundle, small_bundle.gpu, small_bundle.fake
network, arrays = small_bundle.network, small_bundle.arrays


# Binding


def test_what_is_bound_computes_in_place(network: TensorRtNetwork, gpu: HostGpu, arrays: Arrays) -> None:
    named = arrays()
    bound = network.bind(named)
    for seed in range(2):
        fed = feeds(seed=seed)
        for name, value in fed.items():
            gpu.upload(value, named[name])
        bound.enqueue()
        np.testing.assert_array_equal(gpu.download(named["out"]), expected(fed))


def test_what_is_bound_can_be_captured(network: TensorRtNetwork, gpu: HostGpu, arrays: Arrays) -> None:
    """Two calls in a row, the second on the first one's result."""
    named, more = arrays(), arrays()
    bounds = [network.bind(named), network.bind({**more, "sample": named["out"]})]
    with gpu.capture() as graph:
        for bound in bounds:
            bound.enqueue()
    for seed in range(2):
        fed = feeds(seed=seed)
        for name, value in fed.items():
            gpu.upload(value, named[name])
        gpu.upload(fed["timestep"], more["timestep"])
        graph.launch()
        between = {**fed, "sample": expected(fed)}
        np.testing.assert_array_equal(gpu.download(more["out"]), expected(between))
    graph.close()


def test_binding_warms_up_and_leaves_the_inputs(
    network: TensorRtNetwork, gpu: HostGpu, arrays: Arrays, fake: FakeTensorRt
) -> None:
    named, fed = arrays(), feeds()
    for name, value in fed.items():
        gpu.upload(value, named[name])
    before = gpu.in_use
    bound = network.bind(named)
    assert fake.contexts[-1].calls == 1
    assert not view(named["out"]).any()  # of zeros
    for name, value in fed.items():
        np.testing.assert_array_equal(view(named[name]), value)
    bound.close()
    assert gpu.in_use == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda gpu, a: a.pop("out"), "arrays"),
        (lambda gpu, a: a.update(sample=a["sample"].reshape(2, 8, 4, 2)), r"sample of float32 \(2, 8, 4, 2\)"),
        (lambda gpu, a: a.update(out=a["out"].part(0)), r"out of float32 \(1, 4, 4, 4\)"),
        (lambda gpu, a: a.update(sample=replace(a["sample"], dtype=np.dtype(np.float16))), "sample of float16"),
        (
            lambda gpu, a: a.update(sample=DeviceArray(a["sample"].pointer + 64, (2, 4, 4, 4), np.dtype("f4"))),
            r"sample at address 0x\w+40\. Needed: an address that is a multiple of 256",
        ),
    ],
)
def test_arrays_that_do_not_fit_are_refused(
    network: TensorRtNetwork, gpu: HostGpu, arrays: Arrays, fake: FakeTensorRt, change: Any, words: str
) -> None:
    named = arrays()
    change(gpu, named)
    with pytest.raises(NetworkError, match=words):
        network.bind(named)
    assert not fake.contexts


def test_shapes_that_no_plan_serves_are_answered_with_the_ranges(
    network: TensorRtNetwork, arrays: Arrays, fake: FakeTensorRt
) -> None:
    for use in (lambda: network.bind(arrays(batch=5)), lambda: network(feeds(batch=5))):
        with pytest.raises(PlanError) as caught:
            use()
        assert caught.value.found == "the unet was asked for batch 5, height 4, width 4"
        assert caught.value.needed.startswith("batch 1 to 4 (best 2), height 2 to 8 (best 4)")
    assert not fake.contexts


def test_the_profile_that_has_the_shapes_is_used(
    bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu, arrays: Arrays
) -> None:
    put_plan(bundle, "unet", fake, gpu, SQUARE, BIG)
    network = load(bundle, fake, gpu)
    assert network.best_lanes == 2
    for batch, side, profile in ((2, 4, 0), (1, 16, 1), (8, 16, 1)):
        np.testing.assert_array_equal(network(feeds(batch, side))["out"], expected(feeds(batch, side)))
        assert fake.contexts[-1]._profile == profile
    with pytest.raises(PlanError, match=r"batch 2, height 4, width 4; or batch 1 to 8"):
        network(feeds(1, 4))
    assert fake.deserialized == 1
    network.close()


def test_of_several_plans_only_those_in_use_are_loaded(bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu) -> None:
    put_plan(bundle, "unet", fake, gpu, SQUARE)
    put_plan(bundle, "unet", fake, gpu, BIG)
    network = load(bundle, fake, gpu)
    assert fake.deserialized == 0
    for _ in range(2):
        np.testing.assert_array_equal(network(feeds(1, 16))["out"], expected(feeds(1, 16)))
    assert fake.deserialized == 1
    network(feeds(2, 4))
    assert fake.deserialized == 2
    network.close()


def test_plans_that_are_built_again_meanwhile_are_taken(bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu) -> None:
    """A running server keeps the plans that it has loaded, and finds those that it loads later."""
    put_plan(bundle, "unet", fake, gpu, SQUARE)
    put_plan(bundle, "unet", fake, gpu, BIG)
    network = load(bundle, fake, gpu)
    network(feeds(2, 4))
    for ranges in (SQUARE, BIG):
        put_plan(bundle, "unet", fake, gpu, ranges, memory=128)
    assert len(list(PlanStore(bundle).folder.glob("*.plan"))) == 2
    for batch, side in ((1, 16), (2, 4)):
        np.testing.assert_array_equal(network(feeds(batch, side))["out"], expected(feeds(batch, side)))
    assert fake.deserialized == 2
    assert {context._engine._plan["memory"] for context in fake.contexts} == {64, 128}
    network.close()


# Memory


def test_contexts_share_their_working_memory(network: TensorRtNetwork, gpu: HostGpu, arrays: Arrays) -> None:
    first, second, small = arrays(), arrays(), arrays(side=2)
    bounds = [network.bind(first)]
    one = gpu.in_use
    bounds += [network.bind(second), network.bind(small)]
    assert gpu.in_use == one
    large = arrays(side=8)
    before = gpu.in_use
    bounds.append(network.bind(large))
    piece = bounds[0]._piece
    assert gpu.in_use == before + bounds[-1]._piece.bytes
    assert bounds[1]._piece == bounds[2]._piece == piece
    assert piece is not None
    for bound in bounds[:3]:
        assert bound._piece == piece  # a captured graph may hold its address
        bound.close()
    assert gpu.in_use == before + bounds[-1]._piece.bytes - piece.bytes
    again = network.bind(first)
    assert again._piece == bounds[-1]._piece


def test_networks_of_a_backend_share_it_too(bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu) -> None:
    put_plan(bundle, "unet", fake, gpu, WIDE)
    put_plan(bundle, "text_encoder", fake, gpu, {"batch": (1, 1, 2)})
    backend = TensorRtBackend(gpu, fake.library, precision="fp32")
    unet, text = backend.load(bundle, "unet"), backend.load(bundle, "text_encoder")
    unet(feeds())
    states = text({"input_ids": np.array([[1, 0, 7]])})["text_states"]
    np.testing.assert_array_equal(states[0, :, 0], [5, 0, 35])
    assert fake.contexts[0]._memory == fake.contexts[1]._memory
    unet.close()
    np.testing.assert_array_equal(text({"input_ids": np.array([[2, 2, 2]])})["text_states"][0, :, 0], [10, 10, 10])
    text.close()


def test_a_closed_network_has_given_everything_back(network: TensorRtNetwork, gpu: HostGpu, arrays: Arrays) -> None:
    network(feeds())
    bound = network.bind(arrays())
    network.close()
    assert gpu.in_use == sum(array.bytes for array in arrays.made)
    with pytest.raises(BackendError, match="was closed"):
        network.bind(arrays())
    with pytest.raises(BackendError, match="was closed"):
        network(feeds())
    with pytest.raises(NetworkError, match=r"unet/model\.onnx was not run"):
        bound.enqueue()
    bound.close()
    network.close()


def test_too_little_memory_is_said_and_nothing_kept(bundle: Bundle, fake: FakeTensorRt) -> None:
    enough = []
    for memory in range(0, 20_000, 500):
        with host_gpu(memory=memory) as gpu:
            put_plan(bundle, "unet", fake, gpu, WIDE)
            network = load(bundle, fake, gpu)
            try:
                network(feeds())
                enough.append(memory)
            except DeviceMemoryError:
                assert gpu.in_use == 0
            network.close()
    assert enough == list(range(enough[0], 20_000, 500))
    assert enough[0] > 9000  # 8704 for the working memory alone


# Plans that do not fit


def test_no_plan_says_how_to_build_one(bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu) -> None:
    with pytest.raises(PlanError, match=r"holds no plan of the unet.*latentrt build"):
        load(bundle, fake, gpu)


def test_another_versions_plan_is_not_tried(bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu) -> None:
    put_plan(bundle, "unet", FakeTensorRt(version="11.3.0.99"), gpu, WIDE)
    with pytest.raises(PlanError, match=r"built for version 11\.3\.0\.99\. Needed: version 11\.4\.0\.106"):
        load(bundle, fake, gpu)
    assert fake.deserialized == 0


def test_what_tensorrt_says_of_a_plan_is_quoted(bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu) -> None:
    graph = bundle.spec.graphs()["unet"]
    older = fake_plan(FakeTensorRt(version="11.3.0.99"), bundle.path(graph.path), graph, [Profile(WIDE)])
    put_bytes(bundle, "unet", fake, gpu, older, [Profile(WIDE)])
    with pytest.raises(PlanError, match=r"tensorrt 11\.4\.0\.106 cannot load .*Version tag does not match.*11\.3"):
        load(bundle, fake, gpu)
    put_bytes(bundle, "unet", fake, gpu, b"no plan", [Profile(WIDE)])
    with pytest.raises(PlanError, match="Magic tag does not match"):
        load(bundle, fake, gpu)


def test_a_full_device_is_said(bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu) -> None:
    put_plan(bundle, "unet", fake, gpu, WIDE)
    fake.out_of_memory = True
    with pytest.raises(DeviceMemoryError, match=r"out of memory.*MB are free"):
        load(bundle, fake, gpu)


def test_a_failing_call_is_noticed(network: TensorRtNetwork, fake: FakeTensorRt, gpu: HostGpu, arrays: Arrays) -> None:
    named = arrays()
    bound = network.bind(named)
    fake.enqueue_fails = True
    with pytest.raises(NetworkError, match=r"unet/model\.onnx was not run .*enqueue failed on request"):
        bound.enqueue()
    before = gpu.in_use
    with pytest.raises(NetworkError, match="enqueue failed on request"):
        network.bind(named)
    assert gpu.in_use == before


RENAMED = TensorSpec("image", "float32", SHAPE)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"outputs": (RENAMED,)}, r"\('image', 'OUTPUT', 'float32', 'DEVICE'\).*Needed.*\('out', 'OUTPUT'"),
        ({"outputs": (replace(RENAMED, name="out", dtype="float16"),)}, r"'float16'.*Needed.*'float32'"),
        ({"outputs": (replace(RENAMED, name="out", shape=("batch", 3, "height", "width")),)}, r"\(-1, 3, -1, -1\)"),
        ({"outputs": (replace(RENAMED, name="out", shape=("batch", 4)),)}, r"out of \(-1, 4\)"),
        ({"inputs": (TensorSpec("sample", "float32", SHAPE),)}, r"Needed: \[\('timestep', 'INPUT'"),
    ],
)
def test_a_plan_of_another_signature_is_refused(
    bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu, change: dict[str, Any], words: str
) -> None:
    graph = replace(bundle.spec.graphs()["unet"], **change)
    plan = fake_plan(fake, bundle.path("unet/model.onnx"), graph, [Profile(WIDE)])
    put_bytes(bundle, "unet", fake, gpu, plan, [Profile(WIDE)])
    with pytest.raises(PlanError, match=words):
        load(bundle, fake, gpu)


def test_a_plan_of_fixed_shapes_fits(bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu) -> None:
    fixed = (2, 4, 4, 4)
    graph = replace(
        bundle.spec.graphs()["unet"],
        inputs=(TensorSpec("sample", "float32", fixed), TensorSpec("timestep", "float32", (2,))),
        outputs=(TensorSpec("out", "float32", fixed),),
    )
    plan = fake_plan(fake, bundle.path("unet/model.onnx"), graph, [Profile(SQUARE)])
    put_bytes(bundle, "unet", fake, gpu, plan, [Profile(SQUARE)])
    network = load(bundle, fake, gpu)
    np.testing.assert_array_equal(network(feeds())["out"], expected(feeds()))
    network.close()


def test_a_plan_of_other_profiles_is_refused(bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu) -> None:
    graph = bundle.spec.graphs()["unet"]
    plan = fake_plan(fake, bundle.path(graph.path), graph, [Profile(WIDE)])
    put_bytes(bundle, "unet", fake, gpu, plan, [Profile(WIDE), Profile(BIG)])
    with pytest.raises(PlanError, match=r"has 1 profiles\. Needed: 2 profiles"):
        load(bundle, fake, gpu)


def test_profiles_that_the_plan_does_not_have_are_noticed(bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu) -> None:
    graph = bundle.spec.graphs()["unet"]
    plan = fake_plan(fake, bundle.path(graph.path), graph, [Profile(SQUARE)])
    put_bytes(bundle, "unet", fake, gpu, plan, [Profile(WIDE)])
    network = load(bundle, fake, gpu)
    with pytest.raises(NetworkError, match=r"does not take sample of \(1, 4, 4, 4\) .*does not satisfy \[2, 2\]"):
        network(feeds(1))
    network.close()


def test_plans_of_another_bundle_are_another_bundles(bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu) -> None:
    folder = PlanStore(bundle).folder
    put_plan(bundle, "unet", fake, gpu, WIDE)
    graph = {"unet/model.onnx": FileRecord("0" * 64, 1)}
    other = replace(bundle, files={**bundle.files, **graph})
    with pytest.raises(PlanError, match="holds no plan of the unet"):
        load(other, fake, gpu)
    with pytest.raises(PlanError, match="built for graph"):
        TensorRtBackend(gpu, fake.library, precision="fp32", plans=folder).load(other, "unet")
