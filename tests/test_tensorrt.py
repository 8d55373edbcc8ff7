"""The TensorRT backend over a fake TensorRT and an emulated GPU: all but TensorRT's own kernels is the real thing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from fake_tensorrt import FakeTensorRt, fake_plan, put_bytes, put_plan
from host_gpu import HostGpu, host_gpu, view
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from test_refit import table

from engine.backends.base import DeviceArray, DeviceNetwork
from engine.backends.ort import OrtBackend
from engine.backends.tensorrt import SHAPES_KEPT, TensorRtBackend, TensorRtNetwork
from engine.bundle import Bundle, FileRecord
from engine.errors import (
    BackendError,
    BundleError,
    DeviceMemoryError,
    LatentrtError,
    NetworkError,
    PlanError,
    UntrustedPlanError,
)
from engine.plans import REFITTABLE, STRIPPED, VERSION_COMPATIBLE, PlanStore, Profile, Range
from engine.spec import GraphSpec, TensorSpec

WIDE: dict[str, Range] = {"batch": (1, 2, 4), "height": (2, 4, 8), "width": (2, 4, 8)}
SQUARE: dict[str, Range] = {"batch": (2, 2, 2), "height": (4, 4, 4), "width": (4, 4, 4)}
BIG: dict[str, Range] = {"batch": (1, 1, 8), "height": (16, 16, 16), "width": (16, 16, 16)}
SHAPE = ("batch", 4, "height", "width")
WEIGHTS = "unet/weights.safetensors"
PLANES = torch.tensor([1.0, -2.0, 0.5, 3.0]).reshape(1, 4, 1, 1)
SHIFT = torch.tensor([0.25, 1.0, -1.0, 8.0]).reshape(1, 4, 1, 1)


def write_unet(path: Path, dtype: str, planes: torch.Tensor, shift: torch.Tensor) -> GraphSpec:
    """out = planes * sample + shift * timestep."""
    kind = {"float16": TensorProto.FLOAT16, "float32": TensorProto.FLOAT}[dtype]
    nodes = [
        helper.make_node("Mul", ["sample", "planes"], ["scaled"]),
        helper.make_node("Unsqueeze", ["timestep", "axes"], ["time"]),
        helper.make_node("Cast", ["time"], ["typed"], to=kind),
        helper.make_node("Mul", ["typed", "shift"], ["moved"]),
        helper.make_node("Add", ["scaled", "moved"], ["out"]),
    ]
    weights = {"planes": planes.float().numpy().astype(dtype), "shift": shift.float().numpy().astype(dtype)}
    graph = helper.make_graph(
        nodes,
        "unet",
        [
            helper.make_tensor_value_info("sample", kind, SHAPE),
            helper.make_tensor_value_info("timestep", TensorProto.FLOAT, ["batch"]),
        ],
        [helper.make_tensor_value_info("out", kind, SHAPE)],
        [
            *(numpy_helper.from_array(value, name) for name, value in weights.items()),
            numpy_helper.from_array(np.array([1, 2, 3]), "axes"),
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    inputs = (TensorSpec("sample", dtype, SHAPE), TensorSpec("timestep", "float32", ("batch",)))
    return GraphSpec(f"unet/{path.name}", 18, len(nodes), inputs, (TensorSpec("out", dtype, SHAPE),))


def write_text_encoder(path: Path) -> GraphSpec:
    """text_states = a table's rows at input_ids."""
    rows = numpy_helper.from_array(np.arange(40, dtype=np.float32).reshape(8, 5), "rows")
    graph = helper.make_graph(
        [helper.make_node("Gather", ["rows", "input_ids"], ["text_states"])],
        "text_encoder",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", 3])],
        [helper.make_tensor_value_info("text_states", TensorProto.FLOAT, ["batch", 3, 5])],
        [rows],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    ids, states = TensorSpec("input_ids", "int64", ("batch", 3)), TensorSpec("text_states", "float32", ("batch", 3, 5))
    return GraphSpec(f"text_encoder/{path.name}", 18, 1, (ids,), (states,))


def record(path: Path) -> FileRecord:
    data = path.read_bytes()
    return FileRecord(hashlib.sha256(data).hexdigest(), len(data))


def make_bundle(root: Path, planes: torch.Tensor = PLANES, shift: torch.Tensor = SHIFT) -> Bundle:
    """A bundle of two small networks. The UNet's weights, which its graph has too, also lie in a safetensors."""
    for folder in ("unet", "text_encoder"):
        (root / folder).mkdir(parents=True)
    save_file({"planes": planes, "shift": shift}, root / WEIGHTS)
    graphs = {
        "unet": write_unet(root / "unet" / "model.onnx", "float32", PLANES, SHIFT),
        "text_encoder": write_text_encoder(root / "text_encoder" / "model.onnx"),
    }
    half = {"unet": write_unet(root / "unet" / "model.fp16.onnx", "float16", PLANES, SHIFT)}
    spec = replace(Bundle.open(check_hashes=False).spec, graphs=graphs, half=half)
    names = [path.relative_to(root).as_posix() for path in sorted(root.rglob("*")) if path.is_file()]
    return Bundle(root, spec, {name: record(root / name) for name in names})


@pytest.fixture(autouse=True)
def secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTRT_SEAL", str(tmp_path / "secret" / "seal.key"))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle")


@pytest.fixture
def gpu() -> Iterator[HostGpu]:
    """Fails where memory was not given back."""
    with host_gpu() as opened:
        yield opened


@pytest.fixture
def fake(gpu: HostGpu) -> FakeTensorRt:
    return FakeTensorRt()


def load(bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu, network: str = "unet", precision: str = "fp32") -> Any:
    return TensorRtBackend(gpu, fake.library, precision=precision).load(bundle, network)


@pytest.fixture
def network(bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu) -> Iterator[TensorRtNetwork]:
    put_plan(bundle, "unet", fake, gpu, WIDE)
    network = load(bundle, fake, gpu)
    yield network
    network.close()


def feeds(batch: int = 2, side: int = 4, seed: int = 0, dtype: str = "float32") -> dict[str, NDArray[Any]]:
    random = np.random.default_rng(seed)
    sample = random.standard_normal((batch, 4, side, side)).astype(dtype)
    return {"sample": sample, "timestep": random.uniform(0, 1000, batch).astype(np.float32)}


def rounded_once(dtype: str) -> list[dict[str, NDArray[Any]]]:
    """Feeds whose result has one rounding: ONNX Runtime computes half precision in float32 on a CPU."""
    fed = feeds(dtype=dtype)
    return [{**fed, name: np.zeros_like(fed[name])} for name in fed]


def expected(
    fed: Mapping[str, NDArray[Any]], planes: torch.Tensor = PLANES, shift: torch.Tensor = SHIFT
) -> NDArray[Any]:
    dtype = fed["sample"].dtype
    p, s = planes.float().numpy().astype(dtype), shift.float().numpy().astype(dtype)
    result: NDArray[Any] = p * fed["sample"] + fed["timestep"].astype(dtype).reshape(-1, 1, 1, 1) * s
    return result


class Arrays:
    """Device memory for a network's tensors, given back at the end."""

    def __init__(self, gpu: HostGpu) -> None:
        self.gpu = gpu
        self.made: list[DeviceArray] = []

    def __call__(self, batch: int = 2, side: int = 4, dtype: str = "float32") -> dict[str, DeviceArray]:
        named = {
            "sample": self.gpu.zeros((batch, 4, side, side), dtype),
            "timestep": self.gpu.zeros((batch,), np.float32),
            "out": self.gpu.zeros((batch, 4, side, side), dtype),
        }
        self.made += named.values()
        return named


@pytest.fixture
def arrays(gpu: HostGpu) -> Iterator[Arrays]:
    arrays = Arrays(gpu)
    yield arrays
    for array in arrays.made:
        gpu.free(array)


# Calls


def test_a_call_is_what_the_graph_computes(network: TensorRtNetwork, bundle: Bundle) -> None:
    fed = feeds()
    out = network(fed)["out"]
    np.testing.assert_array_equal(out, OrtBackend(threads=1).load(bundle, "unet")(fed)["out"])
    np.testing.assert_array_equal(out, expected(fed))


def test_the_embedded_unet_runs_as_on_onnx_runtime(gpu: HostGpu, fake: FakeTensorRt, tmp_path: Path) -> None:
    bundle = Bundle.open(check_hashes=False)
    put_plan(bundle, "unet", fake, gpu, {"batch": (2,) * 3, "height": (16,) * 3, "width": (16,) * 3}, folder=tmp_path)
    network = TensorRtBackend(gpu, fake.library, precision="fp32", plans=tmp_path).load(bundle, "unet")
    random = np.random.default_rng(0)
    fed = {
        "sample": random.standard_normal((2, 4, 16, 16), np.float32),
        "timestep": np.array([999, 1], np.float32),
        "encoder_hidden_states": random.standard_normal((2, 77, 192), np.float32),
    }
    wanted = OrtBackend(threads=1).load(bundle, "unet")(fed)["out"]
    np.testing.assert_allclose(network(fed)["out"], wanted, atol=1e-6)
    network.close()


def test_half_precision_uses_the_half_graph(bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu) -> None:
    put_plan(bundle, "unet", fake, gpu, WIDE, precision="fp16")
    with pytest.raises(PlanError, match=r"built for graph \w{12}, precision fp16"):
        load(bundle, fake, gpu)
    network = load(bundle, fake, gpu, precision="fp16")
    for fed in rounded_once("float16"):
        out = network(fed)["out"]
        assert out.dtype == np.float16
        np.testing.assert_array_equal(out, expected(fed))
    network.close()


def test_a_network_that_the_bundle_lacks_is_named(bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu) -> None:
    with pytest.raises(BundleError, match="no text_encoder in fp16"):
        load(bundle, fake, gpu, "text_encoder", "fp16")


def test_repeated_calls_allocate_nothing(network: TensorRtNetwork, gpu: HostGpu) -> None:
    first = network(feeds())
    gpu.host.calls.clear()
    for seed in range(3):
        np.testing.assert_array_equal(network(feeds(seed=seed))["out"], expected(feeds(seed=seed)))
    assert "cuMemAlloc" not in gpu.host.calls
    np.testing.assert_array_equal(first["out"], expected(feeds()))


def test_memory_is_kept_for_the_last_shapes_alone(network: TensorRtNetwork, gpu: HostGpu, fake: FakeTensorRt) -> None:
    for side in (2, 3, 4, 5, 6, 7):
        network(feeds(side=side))
    assert len(network._calls) == SHAPES_KEPT
    made = len(fake.contexts)
    network(feeds(side=7))
    network(feeds(side=4))
    assert len(fake.contexts) == made
    network(feeds(side=2))
    assert len(fake.contexts) == made + 1


@pytest.mark.parametrize(
    "change",
    [
        lambda fed: fed.pop("timestep"),
        lambda fed: fed.update(more=fed["sample"]),
        lambda fed: fed.update(sample=fed["sample"].astype(np.float16)),
        lambda fed: fed.update(sample=fed["sample"][:, :3]),
        lambda fed: fed.update(timestep=fed["timestep"][:1]),
    ],
)
def test_feeds_that_do_not_fit_are_refused(network: TensorRtNetwork, change: Any) -> None:
    fed = feeds()
    change(fed)
    with pytest.raises(NetworkError, match=r"unet/model\.onnx was fed"):
        network(fed)


def test_it_is_a_device_network(network: TensorRtNetwork, gpu: HostGpu, bundle: Bundle) -> None:
    assert isinstance(network, DeviceNetwork)
    assert network.best_lanes == 2
    assert network.gpu is gpu
    assert network.graph == bundle.spec.graphs["unet"]


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


# Trust


@pytest.mark.parametrize("victim", ["*.plan", "*.json"])
def test_nothing_unverified_is_deserialized(bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu, victim: str) -> None:
    put_plan(bundle, "unet", fake, gpu, WIDE)
    (path,) = (bundle.root / "plans").glob(victim)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UntrustedPlanError, match=r"delete it, then: latentrt build"):
        load(bundle, fake, gpu)
    assert fake.deserialized == 0


def test_a_plan_that_came_with_the_bundle_is_not_deserialized(
    bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_plan(bundle, "unet", fake, gpu, WIDE)
    monkeypatch.setenv("LATENTRT_SEAL", str(tmp_path / "mine.key"))
    with pytest.raises(UntrustedPlanError):
        load(bundle, fake, gpu)
    put_plan(bundle, "text_encoder", fake, gpu, {"batch": (1, 1, 2)})  # a secret is made
    with pytest.raises(UntrustedPlanError, match="built elsewhere"):
        load(bundle, fake, gpu)
    assert fake.deserialized == 0


def test_a_plan_that_changes_after_loading_its_record_is_noticed(
    bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu
) -> None:
    for ranges in (SQUARE, BIG):
        put_plan(bundle, "unet", fake, gpu, ranges)
    network = load(bundle, fake, gpu)
    for path in (bundle.root / "plans").glob("*.plan"):
        path.write_bytes(b"evil")
    with pytest.raises(UntrustedPlanError):
        network(feeds(2, 4))
    assert fake.deserialized == 0
    network.close()


# Plans that do not fit


def test_no_plan_says_how_to_build_one(bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu) -> None:
    with pytest.raises(PlanError, match=r"holds no plan of the unet.*latentrt build"):
        load(bundle, fake, gpu)


@pytest.mark.parametrize(
    ("version", "words"),
    [("11.3.0.99", r"built for version 11\.3\.0\.99\. Needed: version 11\.4\.0\.106")],
)
def test_another_versions_plan_is_not_tried(
    bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu, version: str, words: str
) -> None:
    put_plan(bundle, "unet", FakeTensorRt(version=version), gpu, WIDE)
    with pytest.raises(PlanError, match=words):
        load(bundle, fake, gpu)
    assert fake.deserialized == 0


def test_what_tensorrt_says_of_a_plan_is_quoted(bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu) -> None:
    graph = bundle.spec.graphs["unet"]
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


@pytest.mark.parametrize("when", ["at once", "later", "captured"])
def test_a_failing_call_is_noticed(
    network: TensorRtNetwork, fake: FakeTensorRt, gpu: HostGpu, arrays: Arrays, when: str
) -> None:
    named = arrays()
    if when == "at once":
        fake.enqueue_fails = True
        before = gpu.in_use
        with pytest.raises(NetworkError, match=r"unet/model\.onnx was not run .*enqueue failed on request"):
            network.bind(named)
        assert gpu.in_use == before
        return
    bound = network.bind(named)
    fake.enqueue_fails = True
    with pytest.raises(NetworkError, match="enqueue failed on request"):
        bound.enqueue()


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
    graph = replace(bundle.spec.graphs["unet"], **change)
    plan = fake_plan(fake, bundle.path("unet/model.onnx"), graph, [Profile(WIDE)])
    put_bytes(bundle, "unet", fake, gpu, plan, [Profile(WIDE)])
    with pytest.raises(PlanError, match=words):
        load(bundle, fake, gpu)


def test_a_plan_of_fixed_shapes_fits(bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu) -> None:
    fixed = (2, 4, 4, 4)
    graph = replace(
        bundle.spec.graphs["unet"],
        inputs=(TensorSpec("sample", "float32", fixed), TensorSpec("timestep", "float32", (2,))),
        outputs=(TensorSpec("out", "float32", fixed),),
    )
    plan = fake_plan(fake, bundle.path("unet/model.onnx"), graph, [Profile(SQUARE)])
    put_bytes(bundle, "unet", fake, gpu, plan, [Profile(SQUARE)])
    network = load(bundle, fake, gpu)
    np.testing.assert_array_equal(network(feeds())["out"], expected(feeds()))
    network.close()


def test_a_plan_of_other_profiles_is_refused(bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu) -> None:
    graph = bundle.spec.graphs["unet"]
    plan = fake_plan(fake, bundle.path(graph.path), graph, [Profile(WIDE)])
    put_bytes(bundle, "unet", fake, gpu, plan, [Profile(WIDE), Profile(BIG)])
    with pytest.raises(PlanError, match=r"has 1 profiles\. Needed: 2 profiles"):
        load(bundle, fake, gpu)


def test_profiles_that_the_plan_does_not_have_are_noticed(bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu) -> None:
    graph = bundle.spec.graphs["unet"]
    plan = fake_plan(fake, bundle.path(graph.path), graph, [Profile(SQUARE)])
    put_bytes(bundle, "unet", fake, gpu, plan, [Profile(WIDE)])
    network = load(bundle, fake, gpu)
    with pytest.raises(NetworkError, match=r"does not take sample of \(1, 4, 4, 4\) .*does not satisfy \[2, 2\]"):
        network(feeds(1))
    network.close()


# Flavours


def test_lean_runs_version_compatible_plans(bundle: Bundle, gpu: HostGpu) -> None:
    built, lean = FakeTensorRt(), FakeTensorRt("tensorrt-lean")
    put_plan(bundle, "unet", built, gpu, WIDE)
    with pytest.raises(PlanError, match=r"built for library tensorrt\. Needed: library tensorrt-lean"):
        load(bundle, lean, gpu)
    put_plan(bundle, "unet", built, gpu, WIDE, options=(VERSION_COMPATIBLE,))
    network = load(bundle, lean, gpu)
    np.testing.assert_array_equal(network(feeds())["out"], expected(feeds()))
    network.close()


def test_rtx_compiles_for_the_shapes_at_once(bundle: Bundle, gpu: HostGpu) -> None:
    fake = FakeTensorRt("tensorrt-rtx")
    put_plan(bundle, "unet", fake, gpu, WIDE)
    backend = TensorRtBackend(gpu, fake.library, precision="fp32")
    assert (backend.name, backend.device, backend.precision) == ("tensorrt-rtx", "cuda", "fp32")
    network = backend.load(bundle, "unet")
    np.testing.assert_array_equal(network(feeds())["out"], expected(feeds()))
    network.close()


def test_8_6_reads_narrow_ids(bundle: Bundle, gpu: HostGpu) -> None:
    old = FakeTensorRt(version="8.6.1")
    put_plan(bundle, "text_encoder", old, gpu, {"batch": (1, 1, 2)})
    network = load(bundle, old, gpu, "text_encoder")
    states = network({"input_ids": np.array([[1, 0, 7]])})["text_states"]
    np.testing.assert_array_equal(states[0, :, 0], [5, 0, 35])
    ids, out = gpu.zeros((1, 3), np.int64), gpu.zeros((1, 3, 5), np.float32)
    with pytest.raises(NetworkError, match="input_ids of int64"):
        network.bind({"input_ids": ids, "text_states": out})
    network.close()
    for array in (ids, out):
        gpu.free(array)


# Refitting


def refit_plan(bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu, *options: str, **more: Any) -> None:
    precision = more.get("precision", "fp32")
    where = {
        name: replace(weight, file=WEIGHTS)
        for name, weight in table(bundle.root / WEIGHTS, {"fp32": "float32", "fp16": "float16"}[precision]).items()
    }
    put_plan(bundle, "unet", fake, gpu, more.pop("ranges", WIDE), options=options, refit=where, **more)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("precision", "dtype"), [("fp32", "float32"), ("fp16", "float16")])
def test_a_stripped_plan_takes_the_bundles_weights(
    tmp_path: Path, gpu: HostGpu, stored: torch.dtype, precision: str, dtype: str
) -> None:
    fake = FakeTensorRt()
    bundle = make_bundle(tmp_path / "bundle", PLANES.to(stored) / 3, SHIFT.to(stored) / 7)
    refit_plan(bundle, fake, gpu, STRIPPED, precision=precision)
    network = load(bundle, fake, gpu, precision=precision)
    for fed in rounded_once(dtype):
        wanted = expected(fed, PLANES.to(stored) / 3, SHIFT.to(stored) / 7)
        np.testing.assert_array_equal(network(fed)["out"], wanted)
    assert fake.refits == 1
    network.close()


def test_a_plan_with_its_own_weights_is_not_refitted(bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu) -> None:
    refit_plan(bundle, fake, gpu, REFITTABLE)
    load(bundle, fake, gpu).close()
    assert fake.refits == 0


def with_weights(bundle: Bundle, planes: torch.Tensor, shift: torch.Tensor) -> Bundle:
    """The bundle with others."""
    save_file({"planes": planes, "shift": shift}, bundle.root / WEIGHTS)
    return replace(bundle, files={**bundle.files, WEIGHTS: record(bundle.root / WEIGHTS)})


def test_a_refittable_plan_takes_a_bundles_other_weights(bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu) -> None:
    refit_plan(bundle, fake, gpu, REFITTABLE)
    other = with_weights(bundle, PLANES + 1, SHIFT * 2)
    network = load(other, fake, gpu)
    np.testing.assert_array_equal(network(feeds())["out"], expected(feeds(), PLANES + 1, SHIFT * 2))
    network.close()


@pytest.mark.parametrize("options", [(), (STRIPPED,)])
def test_other_plans_are_refused_for_other_weights(
    bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu, options: tuple[str, ...]
) -> None:
    refit_plan(bundle, fake, gpu, *options)
    with pytest.raises(PlanError, match="built for weights"):
        load(with_weights(bundle, PLANES + 1, SHIFT), fake, gpu)
    assert fake.deserialized == 0


def test_missing_weights_are_named(bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu) -> None:
    where = table(bundle.root / WEIGHTS, "float32")
    only = {"planes": replace(where["planes"], file=WEIGHTS)}
    put_plan(bundle, "unet", fake, gpu, WIDE, options=(STRIPPED,), refit=only)
    with pytest.raises(PlanError, match="nothing says where the weight shift lies"):
        load(bundle, fake, gpu)


def test_refused_weights_are_named(bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu) -> None:
    where = {n: replace(w, file=WEIGHTS, dtype="float16") for n, w in table(bundle.root / WEIGHTS, "float32").items()}
    put_plan(bundle, "unet", fake, gpu, WIDE, options=(STRIPPED,), refit=where)
    with pytest.raises(PlanError, match=r"TensorRT refuses the weight \w+ \(.*has 4 values of HALF"):
        load(bundle, fake, gpu)


def test_weights_are_replaced_and_come_back(bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu, arrays: Arrays) -> None:
    refit_plan(bundle, fake, gpu, REFITTABLE)
    network = load(bundle, fake, gpu)
    named, fed = arrays(), feeds()
    bound = network.bind(named)
    for name, value in fed.items():
        gpu.upload(value, named[name])

    def out() -> NDArray[Any]:
        bound.enqueue()  # what is bound stays so
        return gpu.download(named["out"])

    planes, shift = PLANES * 1.5, SHIFT - 1
    network.refit({"planes": planes.numpy()})
    np.testing.assert_array_equal(out(), expected(fed, planes))
    network.refit({"shift": shift.numpy()})
    np.testing.assert_array_equal(out(), expected(fed, PLANES, shift))
    network.refit({"shift": shift.numpy(), "planes": planes.numpy().ravel()})
    np.testing.assert_array_equal(out(), expected(fed, planes, shift))
    network.refit({})
    np.testing.assert_array_equal(out(), expected(fed))
    assert network(fed)["out"].tobytes() == expected(fed).tobytes()
    network.close()


def test_weights_that_were_merged_are_given_along(bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu) -> None:
    refit_plan(bundle, fake, gpu, REFITTABLE, merged=[["planes", "shift"]])
    network = load(bundle, fake, gpu)
    network.refit({"planes": PLANES.numpy() * 2})
    np.testing.assert_array_equal(network(feeds())["out"], expected(feeds(), PLANES * 2))
    network.close()


def test_replaced_weights_reach_plans_that_are_loaded_later(bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu) -> None:
    refit_plan(bundle, fake, gpu, REFITTABLE, ranges=SQUARE)
    refit_plan(bundle, fake, gpu, REFITTABLE, ranges=BIG)
    network = load(bundle, fake, gpu)
    network.refit({"planes": PLANES.numpy() * 2})
    for batch, side in ((2, 4), (1, 16)):
        fed = feeds(batch, side)
        np.testing.assert_array_equal(network(fed)["out"], expected(fed, PLANES * 2))
    network.refit({})
    for batch, side in ((2, 4), (1, 16)):
        fed = feeds(batch, side)
        np.testing.assert_array_equal(network(fed)["out"], expected(fed))
    network.close()


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"plains": np.zeros(4, np.float32)}, "unet has no weight plains"),
        ({"planes": np.zeros(5, np.float32)}, r"5 values are given for the weight planes\. Needed: 4 values"),
    ],
)
def test_weights_that_do_not_fit_change_nothing(
    bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu, weights: dict[str, NDArray[Any]], words: str
) -> None:
    refit_plan(bundle, fake, gpu, REFITTABLE)
    network = load(bundle, fake, gpu)
    with pytest.raises(PlanError, match=words):
        network.refit(weights)
    np.testing.assert_array_equal(network(feeds())["out"], expected(feeds()))
    network.close()


@pytest.mark.parametrize("options", [(), (STRIPPED,)])
def test_plans_that_are_not_refittable_say_so(
    bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu, options: tuple[str, ...]
) -> None:
    refit_plan(bundle, fake, gpu, *options)
    network = load(bundle, fake, gpu)
    with pytest.raises(PlanError, match=r"takes no weights but its own.*--refittable"):
        network.refit({"planes": PLANES.numpy()})
    network.close()


def test_a_refit_that_fails_closes_the_network(bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu) -> None:
    refit_plan(bundle, fake, gpu, REFITTABLE, refittable=False)  # TensorRT will refuse
    network = load(bundle, fake, gpu)
    network(feeds())
    with pytest.raises(LatentrtError, match="not refittable"):
        network.refit({"planes": PLANES.numpy()})
    assert gpu.in_use == 0
    with pytest.raises(BackendError, match="was closed"):
        network(feeds())


def test_plans_of_another_bundle_are_another_bundles(bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu) -> None:
    put_plan(bundle, "unet", fake, gpu, WIDE)
    graph = {"unet/model.onnx": FileRecord("0" * 64, 1)}
    with pytest.raises(PlanError, match="built for graph"):
        load(replace(bundle, files={**bundle.files, **graph}), fake, gpu)
    assert len(list(PlanStore(bundle).records("unet"))) == 1
