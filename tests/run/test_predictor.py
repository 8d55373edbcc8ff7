"""The networks of a row, and inputs that are one number a row; the same on the host and on a device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from latentrt.bundle.spec import GraphSpec, TensorSpec
from latentrt.errors import NetworkError
from latentrt.model.predictor import Predictor
from latentrt.run.denoiser import Denoiser
from latentrt.run.gpu.device import DeviceLanes
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
SCALES = TensorSpec("first_scale", "float32", ("batch",)), TensorSpec("second_scale", "float32", ("batch",))
RESIDUAL, OUT = TensorSpec("residual", "float32", LATENTS), TensorSpec("out", "float32", LATENTS)


def network(path: Path, gpu: HostGpu, inputs: tuple[TensorSpec, ...], output: TensorSpec, *nodes: onnx.NodeProto):
    """Return a network on the device, of these nodes."""
    values = [
        [helper.make_tensor_value_info(t.name, TensorProto.FLOAT, t.shape) for t in tensors]
        for tensors in (inputs, (output,))
    ]
    shape = onnx.numpy_helper.from_array(np.array([-1, 1, 1, 1], np.int64), "lanes")
    graph = helper.make_graph(list(nodes), path.stem, *values, [shape])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    session = OrtBackend(threads=1, gpu=gpu).session(path, 21)
    return OrtDeviceNetwork(session, GraphSpec(path.name, 21, len(nodes), inputs, (output,)), gpu, "cpu")


@pytest.fixture(scope="module")
def gpu() -> Iterator[HostGpu]:
    gpu = HostGpu()
    yield gpu
    assert gpu.in_use == 0
    gpu.close()


@pytest.fixture(scope="module")
def predictor(gpu: HostGpu, tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    """Return two networks whose scaled residuals add up, as ControlNets do, and a denoiser that reads the sum."""
    folder = tmp_path_factory.mktemp("networks")
    make = helper.make_node

    def control(scale: TensorSpec, given: tuple[TensorSpec, ...], output: TensorSpec):
        last = output.name if not given else "own"
        nodes = [
            make("Reshape", [scale.name, "lanes"], ["scale"]),
            make("AveragePool", ["hint"], ["small"], kernel_shape=[2, 2], strides=[2, 2]),
            make("Mul", ["sample", "small"], ["product"]),
            make("Mul", ["product", "scale"], [last]),
        ]
        nodes += [make("Add", ["own", one.name], [output.name]) for one in given]
        path = folder / f"{scale.name}.onnx"
        return network(path, gpu, (SAMPLE, TIMESTEP, HINT, scale, *given), output, *nodes)

    first = replace(RESIDUAL, name="first_residual")
    denoiser = network(
        folder / "denoiser.onnx",
        gpu,
        (SAMPLE, TIMESTEP, RESIDUAL),
        OUT,
        make("Tanh", ["sample"], ["bounded"]),
        make("Reshape", ["timestep", "lanes"], ["t"]),
        make("Cos", ["t"], ["wave"]),
        make("Add", ["bounded", "residual"], ["sum"]),
        make("Add", ["sum", "wave"], ["out"]),
    )
    return Predictor([control(SCALES[0], (), first), control(SCALES[1], (first,), RESIDUAL), denoiser])


def job(seed: int, solver: str = "dpmpp-2m", scale: float = 3.0) -> Job:
    table = tabulate(solver, Schedule.from_config(SD15), 5)
    noise = noise_source("torch-cpu", seed)
    latents = noise.normal(SHAPE) * np.float32(table.start)
    ramp = np.linspace(0, 1, len(table))
    table = replace(table, scalars={"first_scale": ramp, "second_scale": 0.5 - ramp / 2})
    uncond, cond = ({"hint": noise.normal((SHAPE[0], 12, 8))} for _ in range(2))
    return Job(table, latents, uncond, cond, noise, Guidance(scale))


def test_what_no_network_gives_is_an_input_of_the_whole(predictor: Predictor) -> None:
    assert list(predictor.inputs) == ["sample", "timestep", "hint", "first_scale", "second_scale"]
    assert predictor.output == OUT


def test_networks_are_called_in_turn(predictor: Predictor) -> None:
    draw = np.random.default_rng(0)
    sample, hint = draw.standard_normal((3, *SHAPE), np.float32), draw.standard_normal((3, 2, 12, 8), np.float32)
    timestep, first, second = (draw.uniform(0, 1, 3).astype(np.float32) for _ in range(3))
    small = hint.reshape(3, 2, 6, 2, 4, 2).mean(axis=(3, 5))
    expected = np.tanh(sample) + sample * small * (first + second)[:, None, None, None]
    expected += np.cos(timestep)[:, None, None, None]
    ours = predictor(sample, timestep, {"hint": hint, "first_scale": first, "second_scale": second})
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    with pytest.raises(NetworkError, match="hint of float32"):
        predictor(sample, timestep, {"hint": hint[:, :, :9], "first_scale": first, "second_scale": second})


@pytest.mark.parametrize("capture", [True, False], ids=["captured", "queued"])
@pytest.mark.parametrize("solver", ["dpmpp-2m", "heun", "euler-ancestral"])
def test_a_device_does_as_the_host(predictor: Predictor, solver: str, capture: bool) -> None:
    there, here = ([job(seed, solver, scale) for seed, scale in ((1, 3.0), (2, 1.0))] for _ in range(2))
    lanes = DeviceLanes(predictor, 4, capture=capture)
    Denoiser(lanes).run(there)
    lanes.close()
    Denoiser(HostLanes(predictor)).run(here)
    for ours, theirs in zip(there, here, strict=True):
        np.testing.assert_allclose(ours.latents, theirs.latents, atol=1e-4 * np.abs(theirs.latents).max())


def test_jobs_share_a_call_where_all_their_inputs_have_the_same_shapes(predictor: Predictor) -> None:
    """A job with one input less does not share their call."""
    calls: list[tuple[int, ...]] = []

    def counting(sample: np.ndarray, timestep: np.ndarray, inputs: dict[str, np.ndarray]) -> np.ndarray:
        calls.append((len(sample), len(inputs)))
        return sample

    together = [job(1), job(2, "ddim"), job(3, scale=1.0)]
    bare = job(4)
    alone = Job(replace(bare.table, scalars={}), bare.latents, bare.uncond, bare.cond, bare.noise, Guidance(1.0))
    denoiser = Denoiser(HostLanes(counting))
    for one in (*together, alone):
        denoiser.admit(one)
    denoiser.tick()
    assert sorted(calls) == [(1, 1), (5, 3)]
