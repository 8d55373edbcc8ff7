"""CPU graphs: the numbers of the float32 graphs, lanes that do not touch each other, and where they are written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from latentrt.bundle.bundle import EMBEDDED, Bundle
from latentrt.bundle.spec import FP16, FP16_ORT_CUDA, FP32, FP32_ORT_CPU
from latentrt.engine import Engine
from latentrt.runtime.onnxruntime import OrtBackend
from latentrt.runtime.signature import shape_of
from latentrt_export import variants
from latentrt_export.graphs import cpu_graph
from latentrt_export.graphs.cpu_graph import cpu_path, for_cpu
from latentrt_export.graphs.ranges import open_session
from latentrt_export.verify.networks import network_checks, plain_check
from tests.export.graphs.test_lower import _feeds

Exported = Callable[[str], tuple[Path, Path]]
LARGE = {"height": 512, "width": 512}  # latents: more than enough tokens at every level
BUNDLES = ("sd", "sd2", "sdxl", "emoji")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Return the embedded model with a CPU graph, which it is too small to have been exported with."""
    root = tmp_path_factory.mktemp("cpu") / "bundle"
    shutil.copytree(EMBEDDED, root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_graph, "FEWEST_TOKENS", 1)
        return Bundle(root, variants.add_cpu(root, Bundle.open(root).spec), {})


@pytest.mark.parametrize(
    "name", ["sd", "emoji", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sd2", "sdxl"))]
)
def test_self_attention_changes_and_nothing_else(exported: Exported, tmp_path: Path, name: str) -> None:
    _, root = exported(name)
    graph = Bundle.open(root).spec.graphs()["unet"]
    before, after = ir.load(root / graph.path), ir.load(root / graph.path)
    changed = for_cpu(after, LARGE)
    assert after.opset_imports == {**before.opset_imports, "com.microsoft": 1}
    pairs = list(zip(before.graph, after.graph, strict=True))
    ours = [(a, b) for a, b in pairs if b.op_type == "MultiHeadAttention"]
    assert len(ours) == changed > 0
    assert {a.op_type for a, _ in ours} == {"Attention"}
    assert all(a.inputs[0].shape[1] == a.inputs[1].shape[1] for a, _ in ours)
    others = [(a, b) for a, b in pairs if b.op_type != "MultiHeadAttention"]
    assert all((a.op_type, a.name, a.attributes.keys()) == (b.op_type, b.name, b.attributes.keys()) for a, b in others)
    kept = [b for _, b in others if b.op_type == "Attention"]
    assert len(kept) == changed  # as many look at the prompt
    assert all(str(node.inputs[1].shape[1]) == "tokens" for node in kept)
    for file in (root / "unet").glob("*.safetensors"):
        shutil.copyfile(file, tmp_path / file.name)
    ir.save(after, tmp_path / "model.onnx")
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)


@pytest.mark.parametrize("name", BUNDLES)
def test_numbers_stay(exported: Exported, name: str) -> None:
    _, root = exported(name)
    graph = Bundle.open(root).spec.graphs()["unet"]
    path, feeds = root / graph.path, _feeds(graph)
    model = ir.load(path)
    expected = open_session(model, path.parent).run(None, feeds)[0]
    for_cpu(model, LARGE)
    ours = open_session(model, path.parent).run(None, feeds)[0]
    assert not np.array_equal(ours, expected)  # other kernels have run
    assert np.linalg.norm(ours - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_lane_alone_equals_the_lane_in_company(written: Bundle, threads: int) -> None:
    """To the bit, where the scores are computed in several blocks: 256 queries of 4 heads, and 48 in a block."""
    network, draw = OrtBackend(threads=threads).load(written, "unet"), np.random.default_rng(0)
    sizes = {"batch": 3, "height": 32, "width": 32, "tokens": 77}
    feeds = {t.name: draw.standard_normal(shape_of(t, sizes), np.float32) for t in network.graph.inputs}
    together = network(feeds)["out"]
    one_thread = OrtBackend(threads=1).load(written, "unet")(feeds)["out"]
    np.testing.assert_array_equal(together, one_thread)
    for lane in range(3):
        alone = network({name: array[lane : lane + 1] for name, array in feeds.items()})["out"]
        np.testing.assert_array_equal(together[lane], alone[0])


def test_onnxruntime_on_the_cpu_prefers_it(written: Bundle) -> None:
    assert OrtBackend().load(written, "unet").graph.path == "unet/model.cpu.onnx" == cpu_path("unet/model.onnx")
    assert OrtBackend().load(written, "vae_decoder").graph.path == "vae/decoder.onnx"
    assert OrtBackend(precision=FP16).load(written, "unet").graph.path == "unet/model.fp16.onnx"


def test_only_a_denoiser_of_many_tokens_gets_one(written: Bundle) -> None:
    unet = written.spec.networks["unet"]
    assert {name for name in unet.variants if "+" not in name} == {FP32, FP32_ORT_CPU, FP16, FP16_ORT_CUDA}
    assert unet.graph(FP32_ORT_CPU).inputs == unet.inputs
    assert all(FP32_ORT_CPU not in one.variants for name, one in written.spec.networks.items() if name != "unet")
    for name in ("emoji", "pixels"):  # 64 tokens at most, at their own size
        plain = Bundle.open(EMBEDDED.parent / name, check_hashes=False)
        assert variants.add_cpu(plain.root, plain.spec) is plain.spec


def test_verify_compares_it_with_the_plain_graph(written: Bundle) -> None:
    graph = written.spec.networks["unet"].graph(FP32)
    feeds = _feeds(graph)
    ours = OrtBackend().load(written, "unet")(feeds)
    assert not plain_check(
        written.path(graph.path), graph, "unet", [{**feeds, **ours, "out": ours["out"] * 1.001}]
    ).passed
    with Engine(written, OrtBackend()) as engine:
        checks = {check.what: check for check in network_checks(engine, EMBEDDED)}
    assert checks["unet in fp32"].passed
    assert checks["unet: out"].passed
    assert "vae_decoder in fp32" not in checks


@pytest.mark.parametrize(
    ("queries", "keys", "mask", "changed"),
    [
        ("height*width", "height*width", False, 1),  # 512
        ("((height - 1)//2 + 1)*width", "((height - 1)//2 + 1)*width", False, 0),  # 256
        ("height*width", 77, False, 0),
        ("height*width", "tokens", False, 0),
        ("tokens", "tokens", False, 0),
        ("Max(height, width)*height", "Max(height, width)*height", False, 0),
        (1024, 1024, False, 0),
        ("height*width", "height*width", True, 0),
    ],
)
def test_which_attention_changes(queries: int | str, keys: int | str, mask: bool, changed: int) -> None:
    shapes = {"q": ["batch", queries, 32], "k": ["batch", keys, 32], "v": ["batch", keys, 32]}
    shapes |= {"mask": ["batch", 4, queries, keys]} if mask else {}
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, shapes["q"])
    node = helper.make_node("Attention", list(shapes), ["y"], q_num_heads=4, kv_num_heads=4)
    graph = helper.make_graph([node], "graph", inputs, [output])
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10))
    assert for_cpu(model, {"height": 32, "width": 16}) == changed
