"""A denoiser that reads a picture beside the latents: the same on the host and on a device."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from latentrt.bundle.spec import GraphSpec, TensorSpec
from latentrt.errors import NetworkError
from latentrt.model.predictor import Predictor
from latentrt.run.denoiser import Denoiser
from latentrt.run.device import DeviceLanes
from latentrt.run.host import HostLanes
from latentrt.run.job import Job
from latentrt.runtime.onnxruntime import OrtBackend, OrtDeviceNetwork
from latentrt.sampling.guidance import Guidance
from latentrt.sampling.noise import noise_source
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.table import tabulate
from tests.support.gpu.host_gpu import HostGpu
from tests.support.sampling.scheduler_configs import SD15

SHAPE = (2, 6, 4)
LATENTS = ("batch", 2, "height", "width")
SAMPLE, TIMESTEP = TensorSpec("sample", "float32", LATENTS), TensorSpec("timestep", "float32", ("batch",))
HINT = TensorSpec("hint", "float32", ("batch", 2, "2*height", "2*width"))
OUT = TensorSpec("out", "float32", LATENTS)


@pytest.fixture(scope="module")
def gpu() -> Iterator[HostGpu]:
    gpu = HostGpu()
    yield gpu
    assert gpu.in_use == 0
    gpu.close()


@pytest.fixture(scope="module")
def denoiser(gpu: HostGpu, tmp_path_factory: pytest.TempPathFactory) -> OrtDeviceNetwork:
    """Return tanh(sample) + sample * hint, halved in size, + cos(timestep)."""
    make = helper.make_node
    nodes = [
        make("AveragePool", ["hint"], ["small"], kernel_shape=[2, 2], strides=[2, 2]),
        make("Mul", ["sample", "small"], ["product"]),
        make("Tanh", ["sample"], ["bounded"]),
        make("Reshape", ["timestep", "lanes"], ["t"]),
        make("Cos", ["t"], ["wave"]),
        make("Add", ["bounded", "product"], ["sum"]),
        make("Add", ["sum", "wave"], ["out"]),
    ]
    inputs, path = (SAMPLE, TIMESTEP, HINT), tmp_path_factory.mktemp("network") / "denoiser.onnx"
    values = [
        [helper.make_tensor_value_info(t.name, TensorProto.FLOAT, t.shape) for t in tensors]
        for tensors in (inputs, (OUT,))
    ]
    shape = onnx.numpy_helper.from_array(np.array([-1, 1, 1, 1], np.int64), "lanes")
    graph = helper.make_graph(nodes, path.stem, *values, [shape])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    session = OrtBackend(threads=1, gpu=gpu).session(path, 21)
    return OrtDeviceNetwork(session, GraphSpec(path.name, 21, len(nodes), inputs, (OUT,)), gpu, "cpu")


def job(seed: int, solver: str = "dpmpp-2m", scale: float = 3.0) -> Job:
    table = tabulate(solver, Schedule.from_config(SD15), 5)
    noise = noise_source("torch-cpu", seed)
    latents = noise.normal(SHAPE) * np.float32(table.start)
    uncond, cond = ({"hint": noise.normal((SHAPE[0], 12, 8))} for _ in range(2))
    return Job(table, latents, uncond, cond, noise, Guidance(scale))


def test_the_other_inputs_are_read(denoiser: OrtDeviceNetwork) -> None:
    draw, predictor = np.random.default_rng(0), Predictor(denoiser)
    sample, hint = draw.standard_normal((3, *SHAPE), np.float32), draw.standard_normal((3, 2, 12, 8), np.float32)
    timestep = draw.uniform(0, 1, 3).astype(np.float32)
    small = hint.reshape(3, 2, 6, 2, 4, 2).mean(axis=(3, 5))
    expected = np.tanh(sample) + sample * small + np.cos(timestep)[:, None, None, None]
    np.testing.assert_allclose(predictor(sample, timestep, {"hint": hint}), expected, atol=1e-5)
    with pytest.raises(NetworkError, match="hint of float32"):
        predictor(sample, timestep, {"hint": hint[:, :, :9]})


@pytest.mark.parametrize("capture", [True, False], ids=["captured", "queued"])
@pytest.mark.parametrize("solver", ["dpmpp-2m", "heun", "euler-ancestral"])
def test_a_device_does_as_the_host(denoiser: OrtDeviceNetwork, solver: str, capture: bool) -> None:
    there, here = ([job(seed, solver, scale) for seed, scale in ((1, 3.0), (2, 1.0))] for _ in range(2))
    lanes = DeviceLanes(denoiser, 4, capture=capture)
    Denoiser(lanes).run(there)
    lanes.close()
    Denoiser(HostLanes(Predictor(denoiser))).run(here)
    for ours, theirs in zip(there, here, strict=True):
        np.testing.assert_allclose(ours.latents, theirs.latents, atol=1e-4 * np.abs(theirs.latents).max())


def test_jobs_share_a_call_where_all_their_inputs_have_the_same_shapes() -> None:
    """A job with one input less does not share their call."""
    calls: list[tuple[int, ...]] = []

    def counting(sample: np.ndarray, timestep: np.ndarray, inputs: dict[str, np.ndarray]) -> np.ndarray:
        calls.append((len(sample), len(inputs)))
        return sample

    together = [job(1), job(2, "ddim"), job(3, scale=1.0)]
    bare = job(4)
    alone = Job(bare.table, bare.latents, {}, {}, bare.noise, Guidance(1.0))
    lanes = Denoiser(HostLanes(counting))
    for one in (*together, alone):
        lanes.admit(one)
    lanes.tick()
    assert sorted(calls) == [(1, 0), (5, 1)]
