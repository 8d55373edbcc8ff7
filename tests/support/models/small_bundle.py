"""A small bundle with an emulated GPU and a fake TensorRT, and the fixtures that the TensorRT backend's tests share."""

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
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file

from latentrt.bundle.bundle import Bundle, FileRecord, write_manifest
from latentrt.bundle.spec import DENOISER, FP16, FP32, TEXT_ENCODER, NetworkSpec, TensorSpec, Variant
from latentrt.cuda.array import DeviceArray
from latentrt.runtime.tensorrt.backend import TensorRtBackend, TensorRtNetwork
from latentrt.runtime.tensorrt.record import Range
from tests.support.gpu.fakes.fake_plans import put_plan
from tests.support.gpu.fakes.fake_tensorrt import FakeTensorRt
from tests.support.gpu.host_gpu import HostGpu, host_gpu

WIDE: dict[str, Range] = {"batch": (1, 2, 4), "height": (2, 4, 8), "width": (2, 4, 8)}
SQUARE: dict[str, Range] = {"batch": (2, 2, 2), "height": (4, 4, 4), "width": (4, 4, 4)}
BIG: dict[str, Range] = {"batch": (1, 1, 8), "height": (16, 16, 16), "width": (16, 16, 16)}
SHAPE = ("batch", 4, "height", "width")
WEIGHTS = "unet/weights.safetensors"
PLANES = torch.tensor([1.0, -2.0, 0.5, 3.0]).reshape(1, 4, 1, 1)
SHIFT = torch.tensor([0.25, 1.0, -1.0, 8.0]).reshape(1, 4, 1, 1)


def write_unet(path: Path, dtype: str, planes: torch.Tensor, shift: torch.Tensor) -> Variant:
    """Write out = planes * sample + shift * timestep."""
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
    return Variant(f"unet/{path.name}", 18, len(nodes), {"sample": dtype, "out": dtype})


def write_text_encoder(path: Path) -> NetworkSpec:
    """Write text_states = a table's rows at input_ids."""
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
    variant = Variant(f"text_encoder/{path.name}", 18, 1)
    return NetworkSpec(TEXT_ENCODER, (ids,), (states,), {FP32: variant}, "tokenizer")


def record(path: Path) -> FileRecord:
    data = path.read_bytes()
    return FileRecord(hashlib.sha256(data).hexdigest(), len(data))


def make_bundle(root: Path, planes: torch.Tensor = PLANES, shift: torch.Tensor = SHIFT) -> Bundle:
    """Write a bundle of two small networks. The UNet's weights, which its graph has too, also lie in a safetensors."""
    for folder in ("unet", "text_encoder"):
        (root / folder).mkdir(parents=True)
    save_file({"planes": planes, "shift": shift}, root / WEIGHTS)
    variants = {
        FP32: write_unet(root / "unet" / "model.onnx", "float32", PLANES, SHIFT),
        FP16: write_unet(root / "unet" / "model.fp16.onnx", "float16", PLANES, SHIFT),
    }
    inputs = (TensorSpec("sample", "float32", SHAPE), TensorSpec("timestep", "float32", ("batch",)))
    networks = {
        "unet": NetworkSpec(DENOISER, inputs, (TensorSpec("out", "float32", SHAPE),), variants),
        "text_encoder": write_text_encoder(root / "text_encoder" / "model.onnx"),
    }
    spec = replace(Bundle.open(check_hashes=False).spec, networks=networks)
    names = [path.relative_to(root).as_posix() for path in sorted(root.rglob("*")) if path.is_file()]
    write_manifest(root, spec, names)  # it would not open: this spec's tokenizer is not in the folder
    return Bundle(root, spec, {name: record(root / name) for name in names})


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle")


@pytest.fixture
def gpu() -> Iterator[HostGpu]:
    """Yield an emulated GPU; fail where memory was not freed."""
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
    """Return feeds whose result has one rounding: ONNX Runtime computes half precision in float32 on a CPU."""
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
    """Device memory for a network's tensors, freed at the end."""

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
