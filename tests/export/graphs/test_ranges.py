"""The measurement before a half graph is written, on a VAE that float16 cannot hold in the middle."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.manifest import model_from
from latentrt.bundle.spec import Islands, ModelSpec
from latentrt.errors import ExportError
from latentrt_export import variants
from latentrt_export.graphs import ranges
from latentrt_export.graphs.half import LARGEST, emulate, to_half
from latentrt_export.graphs.ranges import MARGIN, measure_networks, measure_ranges, open_session, overflowing
from latentrt_export.graphs.weights import read_header

Exported = Callable[[str], tuple[Path, Path]]
LOUD = "decoder.mid_block.resnets.0.conv2.weight"
QUIET = "decoder.conv_norm_out"


@pytest.fixture
def loud(exported: Exported, tmp_path: Path) -> Path:
    """Return a bundle whose VAE decoder has numbers beyond float16 on its residual stream, until the last norm."""
    bundle = shutil.copytree(exported("sd")[1], tmp_path / "loud")
    path = bundle / "vae" / "diffusion_pytorch_model.safetensors"
    (stored,) = (tensor for tensor in read_header(path) if tensor.name == LOUD)
    weights = np.memmap(path, np.float32, "r+", stored.offset, (stored.length // 4,))
    weights *= 60_000 / float(np.abs(weights).max())
    weights.flush()
    return bundle


def _latents(seed: int, *shape: int) -> dict[str, np.ndarray]:
    return {"latents": np.random.default_rng(seed).standard_normal(shape, np.float32)}


def test_islands_keep_a_loud_vae_right(loud: Path) -> None:
    """Without them the half graph is not finite; with them it is as close to float32 as that of a quiet VAE."""
    path = loud / "vae" / "decoder.onnx"
    found = measure_ranges(path, [_latents(0, 1, 4, 8, 8)])
    islands = overflowing(ir.load(path), found)
    assert max(found.values()) > 2 * LARGEST
    assert 30 < len(islands) < 120
    feeds = _latents(1, 2, 4, 13, 10)
    (expected,) = open_session(ir.load(path), path.parent).run(None, feeds)
    narrow = {name: array.astype(np.float16) for name, array in feeds.items()}
    results = []
    for nodes in ((), islands):
        model = ir.load(path)
        to_half(model, nodes)
        emulate(model)
        results.append(open_session(model, path.parent).run(None, narrow)[0].astype(np.float32))
    assert not np.isfinite(results[0]).all()
    assert np.linalg.norm(results[1] - expected) < 3e-3 * np.linalg.norm(expected)


def test_the_bundle_says_so(loud: Path) -> None:
    """Export writes the measured islands into the half graph and the manifest's part, and into no other network."""
    spec = Bundle.open(loud, check_hashes=False).spec
    bare = {name: replace(one, variants={"fp32": one.variants["fp32"]}) for name, one in spec.networks.items()}
    again = variants.add_half(loud, replace(spec, networks=bare))
    assert again.graphs("fp16").keys() == spec.graphs("fp16").keys()
    islands = _islands(again)
    assert islands["vae_decoder"].largest > LARGEST
    assert [name for name, one in islands.items() if one.nodes] == ["vae_decoder"]
    path = loud / again.graphs("fp16")["vae_decoder"].path
    assert {node.name for node in ir.load(path).graph} >= set(islands["vae_decoder"].nodes)
    onnx.checker.check_model(path, full_check=True)
    assert _islands(model_from(again.to_dict())) == islands


def _islands(spec: ModelSpec) -> dict[str, Islands]:
    found = {name: network.variants["fp16"].islands for name, network in spec.networks.items()}
    return {name: islands for name, islands in found.items() if islands is not None}


def test_a_network_that_is_not_finite_is_refused(loud: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "measure_networks", lambda root, spec: {"unet": {"a": 1.0, "b": float("nan")}})
    with pytest.raises(ExportError, match="the unet computes numbers that are not finite"):
        variants.add_half(loud, Bundle.open(loud, check_hashes=False).spec)


def test_ranges_are_the_values(exported: Exported) -> None:
    """Every float tensor that is computed from the inputs, weights and times aside; more runs only add."""
    path = exported("sd")[1] / "unet" / "model.onnx"
    told = {value.name: value.shape[2] for value in ir.load(path).graph.inputs if value.name.startswith("text.")}
    draw = np.random.default_rng(0)
    feeds = [
        {
            "sample": scale * draw.standard_normal((2, 4, 8, 8), np.float32),
            "timestep": np.array([999, 0], np.float32),
            **{name: draw.standard_normal((2, 77, width), np.float32) for name, width in told.items()},
        }
        for scale in (1.0, 3.0)
    ]
    first, both = measure_ranges(path, feeds[:1]), measure_ranges(path, feeds)
    outs = [np.abs(open_session(ir.load(path), path.parent).run(None, feed)[0]).max() for feed in feeds]
    assert first["out"] == pytest.approx(outs[0], rel=1e-5)
    assert both["out"] == pytest.approx(max(outs), rel=1e-5)
    assert both.keys() == first.keys()
    assert all(both[name] >= first[name] for name in first)
    assert max(both.values()) < 100  # of the times, up to 999, nothing is measured
    heads = [node for node in ir.load(path).graph if node.op_type == "Attention"]
    assert {f"{node.outputs[0].name}.scores" for node in heads} <= both.keys()


@pytest.mark.parametrize("largest", [LARGEST / MARGIN * 1.01, float("nan"), float("inf")])
def test_nodes_on_both_sides_of_a_large_value_are_named(exported: Exported, largest: float) -> None:
    model = ir.load(exported("sd")[1] / "unet" / "model.onnx")
    (attention, *_) = (node for node in model.graph if node.op_type == "Attention")
    inside, out = f"{attention.outputs[0].name}.scores", attention.outputs[0].name
    assert overflowing(model, {inside: largest}) == (attention.name,)
    readers = tuple(node.name for node in attention.outputs[0].consumers())
    assert overflowing(model, {str(out): largest}) == (attention.name, *readers)
    assert overflowing(model, {str(out): LARGEST / MARGIN}) == ()


def test_every_network_is_measured(exported: Exported) -> None:
    root = exported("sdxl")[1]
    spec = Bundle.open(root).spec
    found = measure_networks(root, spec)
    assert found.keys() == spec.graphs().keys()
    assert {name: Islands(float(f"{max(r.values()):.3g}")) for name, r in found.items()} == _islands(spec)


def test_full_size_models_are_measured_small(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "SIDE", 4)
    root = exported("sd")[1]
    seen: list[tuple[int, ...]] = []
    call = ranges.Gauge.__call__

    def note(self: ranges.Gauge, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        seen.extend(array.shape for name, array in feeds.items() if name == "sample")
        return call(self, feeds)

    monkeypatch.setattr(ranges.Gauge, "__call__", note)
    measure_networks(root, Bundle.open(root).spec)
    assert set(seen) == {(2, 4, 4, 4)}
