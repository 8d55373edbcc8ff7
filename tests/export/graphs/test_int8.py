"""8-bit graphs: what is computed so, lanes that do not touch each other, what pictures lose, where there is none."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from latentrt.adapters.given import loras_of
from latentrt.bundle.bundle import EMBEDDED, Bundle
from latentrt.bundle.initializers import initializers
from latentrt.bundle.spec import FP32, INT8, INT8_ORT_CPU
from latentrt.engine import Engine
from latentrt.errors import BackendError, BundleError, ExportError
from latentrt.runtime import open_backend
from latentrt.runtime.machine.cores import multiplies_bytes
from latentrt.runtime.onnxruntime import OrtBackend
from latentrt.runtime.signature import shape_of
from latentrt_export import int8
from latentrt_export.graphs.int8 import products, to_int8, watched
from latentrt_export.graphs.ranges import open_session
from latentrt_export.merge_bundle import merge_bundle
from latentrt_export.to_bundle import export_bundle, finish
from latentrt_export.verify.checks import psnr
from tests.export.graphs.fused.test_small import graph
from tests.export.graphs.test_lower import Arrays
from tests.support.models.loras import write_lora

pytestmark = pytest.mark.skipif(not multiplies_bytes(), reason="a CPU without VNNI")
PRODUCTS = {"QLinearConv": 40, "MatMulIntegerToFloat": 56}  # of the embedded UNet


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Return the embedded model with an 8-bit graph."""
    root = tmp_path_factory.mktemp("int8") / "bundle"
    shutil.copytree(EMBEDDED, root, ignore=shutil.ignore_patterns("manifest.json"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8, "PROMPTS", int8.PROMPTS[1:3])
        spec, note = int8.add_int8(root, Bundle.open(EMBEDDED).spec)
    assert "latents of 2 pictures differ" in note
    finish(root, spec, None)
    return Bundle.open(root)


def test_which_products(written: Bundle, tmp_path: Path) -> None:
    """All but the ends, the ways around blocks, and the time embedding; ONNX Runtime has 8-bit kernels for each."""
    plain = ir.load(EMBEDDED / "unet" / "model.onnx")
    chosen = set(products(plain))
    weights = [n.inputs[1] for n in plain.graph if n.op_type == "Conv" and n not in chosen]
    names = [str((w.producer().inputs[0] if w.producer() else w).name) for w in weights]
    assert len(names) == 10
    assert all(".conv_shortcut." in name or name in ("conv_in.weight", "conv_out.weight") for name in names)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 3
    onnxruntime.InferenceSession(written.root / "unet" / "model.int8.onnx", options)
    found = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert {kind: found[kind] for kind in PRODUCTS} == PRODUCTS
    assert len(chosen) == sum(PRODUCTS.values())
    assert found["Gemm"] == Counter(node.op_type for node in plain.graph)["Gemm"]


def test_weights_stay_in_the_checkpoint(written: Bundle) -> None:
    models = [ir.load(written.root / "unet" / name) for name in ("model.onnx", "model.int8.onnx")]
    kept = [[v.const_value for v in model.graph.initializers.values()] for model in models]
    places = [{(t.location, t.offset) for t in each if isinstance(t, ir.ExternalTensor)} for each in kept]
    assert places[0] == places[1]
    inline = [sum(t.nbytes for t in each if not isinstance(t, ir.ExternalTensor)) for each in kept]
    assert inline[1] < inline[0] + 16_384
    ours, plain = (written.spec.networks["unet"].graph(variant) for variant in (INT8_ORT_CPU, FP32))
    assert (ours.inputs, ours.outputs) == (plain.inputs, plain.outputs)


def test_a_lane_is_the_same_in_any_company(written: Bundle) -> None:
    """To the bit, beside a lane of numbers beyond the measured range too: ranges are the graph's, not the call's."""
    network, draw = OrtBackend(threads=2, precision=INT8).load(written, "unet"), np.random.default_rng(0)
    sizes = {"batch": 3, "height": 16, "width": 16, "tokens": 77}
    feeds = {t.name: draw.standard_normal(shape_of(t, sizes), np.float32) for t in network.graph.inputs}
    feeds["sample"][2] *= 9
    together = network(feeds)["out"]
    for lane in range(3):
        alone = network({name: array[lane : lane + 1] for name, array in feeds.items()})["out"]
        np.testing.assert_array_equal(together[lane], alone[0])


@pytest.mark.slow
def test_what_a_picture_loses(written: Bundle, tmp_path: Path) -> None:
    """As little with a LoRA: scales are of the weights that the graph is loaded with."""
    lora = write_lora(tmp_path / "lora.safetensors", EMBEDDED, "kohya")
    pictures = []
    for root, precision in ((written.root, INT8), (EMBEDDED, FP32)):
        for loras in ({}, {lora: 0.8}):
            with Engine.load(root, precision=precision, lora=loras, check_hashes=False, cache=False) as engine:
                pictures.append(np.stack(engine("a red apple", steps=6, seed=7)))
    ours, ours_with, plain, plain_with = pictures
    assert 30 < psnr(ours, plain) < 50
    assert psnr(ours_with, plain_with) > psnr(ours_with, plain) + 6


@pytest.mark.parametrize("kernel", [1, 3])
def test_each_rounding(kernel: int) -> None:
    """The graph's numbers are those of its definition in numpy: every operand rounded, the sum in full."""
    draw = np.random.default_rng(0)
    shapes = {"first": (4, 3, 3, 3), "w": (5, 4, kernel, kernel), "last": (3, 5, 3, 3)}
    weights: Arrays = {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    weights["w"][1] = 0  # a channel without a scale
    body = f"""
        c = Conv<pads = [1,1,1,1]>(x, first) d = Conv<pads = {[kernel // 2] * 4}>(c, w)
        y = Conv<pads = [1,1,1,1]>(d, last)
    """
    model = graph("(float[b,3,6,6] x) => (float[b,3,6,6] y)", body, {}, weights)
    assert watched(model) == ("c", "d")
    ranges = {"c": (-9.0, 6.0), "d": (-4.0, 30.0)}
    x = draw.standard_normal((2, 3, 6, 6)).astype(np.float32)
    (before,) = _run(model, x, "c")
    assert to_int8(model, ranges) == 1
    c, d = _run(model, x, "c.rounded", "d.rounded")
    np.testing.assert_allclose(c, _rounded(before, *ranges["c"]), atol=1e-4)
    largest = np.abs(weights["w"]).max((1, 2, 3), keepdims=True) / 127
    whole = np.rint(weights["w"] / np.maximum(largest, 1e-30)) * largest
    wide = np.pad(c, ((0, 0), (0, 0), *[(kernel // 2, kernel // 2)] * 2))
    windows = np.lib.stride_tricks.sliding_window_view(wide, (kernel, kernel), (2, 3))
    expected = _rounded(np.einsum("bchwij,ocij->bohw", windows, whole), *ranges["d"])
    assert np.quantile(np.abs(d - expected), 0.98) < 1e-3  # a sum halfway between two steps may go either way
    assert np.abs(d - expected).max() < 1.01 * 34 / 255


def _rounded(x: np.ndarray, low: float, high: float) -> np.ndarray:
    step = (high - low) / 255
    zero = round(-low / step)
    return (np.clip(np.rint(x / step) + zero, 0, 255) - zero) * step


def _run(model: ir.Model, x: np.ndarray, *names: str) -> list[np.ndarray]:
    values = {value.name: value for node in model.graph for value in node.outputs}
    own = list(model.graph.outputs)
    model.graph.outputs.extend(values[name] for name in names if values[name] not in own)
    found: list[np.ndarray] = open_session(model, Path()).run(list(names), {"x": x})
    del model.graph.outputs[len(own) :]
    return found


def test_where_there_is_none(written: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BundleError, match=r"no graph in int8.*latentrt export --int8"):
        OrtBackend(precision=INT8).load(Bundle.open(EMBEDDED), "unet")
    assert OrtBackend(precision=INT8).load(written, "vae_decoder").graph.path == "vae/decoder.onnx"
    for name in ("openvino", "tensorrt"):
        with pytest.raises(BackendError, match=f"'int8' for {name}"):
            open_backend(name, precision=INT8)
    monkeypatch.setattr("latentrt.runtime.variants.multiplies_bytes", lambda: False)
    with pytest.raises(BackendError, match="CPU without VNNI"):
        OrtBackend(precision=INT8)


@pytest.mark.slow
def test_a_bundle_that_a_lora_is_merged_into(written: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets a graph of its new weights."""
    monkeypatch.setattr(int8, "PROMPTS", int8.PROMPTS[1:2])
    lora = write_lora(tmp_path / "lora.safetensors", EMBEDDED, "kohya")
    merged = merge_bundle(written.root, tmp_path / "merged", loras_of({lora: 0.5}))
    assert merged.notes[-1].startswith("int8: latents of 1 pictures differ")
    graphs = [tmp_path / "merged" / "unet" / name for name in ("model.onnx", "model.int8.onnx")]
    read = [{(each.file, each.offset) for each in initializers(graph) if each.file} for graph in graphs]
    assert read[0] == read[1]
    assert "with_lora.safetensors" in {file for file, _ in read[1]}


def test_a_vae_alone_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"--int8 for .*, which has vae_decoder"):
        export_bundle(EMBEDDED / "vae", tmp_path / "bundle", int8=True)
    assert not list(tmp_path.iterdir())
