"""The graphs: compared with the networks of diffusers and transformers, and where their weights are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel
from safetensors.numpy import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.spec import ModelSpec, TensorSpec
from latentrt.model.predictor import inputs_of
from latentrt.model.prompts.tokenizer import Tokenizer
from latentrt_export.graphs import passes
from latentrt_export.graphs.to_onnx import quiet, trace
from latentrt_export.graphs.weights import share_weights
from latentrt_export.graphs.wrap import load_network
from tests.support.models import texts

Arrays = dict[str, np.ndarray]
BUNDLES = ("sd", "sd2", "sdxl", "emoji", "trained-pixels")
# (batch, height, width) of the latents; odd sizes need upsamplers that look at the skip connections.
SIZES = ((1, 16, 16), (3, 13, 10))
MULTIPLES = ((1, 32, 32), (3, 24, 16))  # UNet2DModel's upsamplers do not look at them
# Greatest absolute difference to torch in float32; measured 7.0e-6 (the embedded VAE decoder) over all of them.
BOUND = 2e-5


@pytest.mark.parametrize("name", BUNDLES)
def test_graphs_give_what_torch_gives(exported: Callable[[str], tuple[Path, Path]], name: str) -> None:
    _, root = exported(name)
    spec = Bundle.open(root).spec
    for network, graph in spec.graphs().items():
        if network in ("unet_text", "unet_shallow"):  # with the UNet
            continue
        parts = [name for name in ("unet_text",) if network == "unet" and name in spec.networks] + [network]
        inputs = inputs_of([spec.networks[part] for part in parts])
        torch_network = _torch_network(root, network)
        for size in SIZES if spec.latents.multiple == 1 else MULTIPLES:
            feeds = _feeds(root, tuple(inputs.values()), network, size, spec.latents.factor)
            with torch.no_grad():
                wanted = torch_network({k: torch.from_numpy(v) for k, v in feeds.items()})
            got = _run(root, spec, parts, feeds)
            assert {tensor.name for tensor in graph.outputs} - {"deep"} == set(wanted)
            for name, tensor in wanted.items():
                assert got[name].dtype == np.float32
                np.testing.assert_allclose(got[name], tensor.numpy(), rtol=0, atol=BOUND, err_msg=f"{network} {size}")


@pytest.mark.parametrize("name", BUNDLES)
def test_the_shallow_unet_goes_on_from_the_depth_of_the_whole(
    exported: Callable[[str], tuple[Path, Path]], name: str
) -> None:
    """To the bit; and it is small."""
    _, root = exported(name)
    spec = Bundle.open(root).spec
    parts = [name for name in ("unet_text", "unet") if name in spec.networks]
    inputs = tuple(inputs_of([spec.networks[part] for part in parts]).values())
    feeds = _feeds(root, inputs, "unet", (SIZES if spec.latents.multiple == 1 else MULTIPLES)[1], spec.latents.factor)
    known = _run(root, spec, parts, feeds)
    again = _run(root, spec, ["unet_shallow"], {**feeds, **known})
    np.testing.assert_array_equal(again["out"], known["out"])
    other = _run(root, spec, ["unet_shallow"], {**feeds, **known, "timestep": feeds["timestep"] * np.float32(0.5)})
    assert not np.array_equal(other["out"], known["out"])
    graphs = spec.graphs()
    assert graphs["unet_shallow"].nodes < 0.5 * graphs["unet"].nodes


def _run(root: Path, spec: ModelSpec, parts: Sequence[str], feeds: Arrays) -> Arrays:
    """Run graphs in turn; return all that is then known."""
    known = dict(feeds)
    for part in parts:
        session, graph = _session(root / spec.graphs()[part].path), spec.graphs()[part]
        assert [o.name for o in session.get_outputs()] == [tensor.name for tensor in graph.outputs]
        got = session.run(None, {tensor.name: known[tensor.name] for tensor in graph.inputs})
        known |= dict(zip((tensor.name for tensor in graph.outputs), got, strict=True))
    return known


def _session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _torch_network(root: Path, name: str) -> Callable[[Mapping[str, torch.Tensor]], dict[str, Any]]:
    """Return the network as its own library loads and calls it, without `latentrt_export.graphs.wrap`."""
    load = {"dtype": torch.float32, "use_safetensors": True}
    with quiet():
        if name.startswith("text_encoder"):
            kind = CLIPTextModelWithProjection if name.endswith("_2") else CLIPTextModel
            text = kind.from_pretrained(root / name, **load).eval()
            penultimate = (root / "text_encoder_2").is_dir()
            return lambda x: _text_states(text, x["input_ids"], penultimate=penultimate)
        if name == "unet" and not (root / "vae").is_dir():
            pixels = UNet2DModel.from_pretrained(root / "unet", torch_dtype=torch.float32).eval()
            return lambda x: {"out": pixels(x["sample"], x["timestep"]).sample}
        if name == "unet":
            unet = UNet2DConditionModel.from_pretrained(root / "unet", torch_dtype=torch.float32).eval()
            return lambda x: {"out": _noise(unet, x)}
        vae = AutoencoderKL.from_pretrained(root / "vae", torch_dtype=torch.float32).eval()
    if name == "vae_decoder":
        return lambda x: {"image": vae.decode(x["latents"]).sample}
    return lambda x: {"moments": vae.encode(x["image"]).latent_dist.parameters}


def _text_states(model: Any, ids: torch.Tensor, *, penultimate: bool) -> dict[str, torch.Tensor]:
    out = model(ids, output_hidden_states=True)
    if not penultimate:
        return {"text_states": out.last_hidden_state}
    states = {"text_states": out.hidden_states[-2]}
    return states | {"text_embeds": out.text_embeds} if hasattr(out, "text_embeds") else states


def _noise(unet: Any, x: Mapping[str, torch.Tensor]) -> torch.Tensor:
    added = {k: x[k] for k in ("text_embeds", "time_ids") if k in x}
    return unet(x["sample"], x["timestep"], x["encoder_hidden_states"], added_cond_kwargs=added).sample


def _feeds(root: Path, inputs: Sequence[TensorSpec], network: str, size: tuple[int, int, int], factor: int) -> Arrays:
    rng = np.random.default_rng(0)
    if network.startswith("text_encoder"):
        tokenizer = Tokenizer.open(root / network.replace("text_encoder", "tokenizer"))
        prompts = ["a cat on a dog", "", "can " * 90]
        return {"input_ids": np.stack([tokenizer.encode(p).ids for p in prompts[: size[0]]])}
    scale = factor if network == "vae_encoder" else 1
    sizes = {"batch": size[0], "height": size[1] * scale, "width": size[2] * scale}
    shapes = {t.name: [sizes[d] if isinstance(d, str) else d for d in t.shape] for t in inputs}
    ranges, feeds = {"timestep": 999.0, "time_ids": 1024.0}, {}
    for name, shape in shapes.items():
        if name in ranges:
            feeds[name] = rng.uniform(0, ranges[name], shape).astype(np.float32)
        elif name == "encoder_hidden_states":
            feeds[name] = texts.states(shape, rng)
        else:
            feeds[name] = rng.standard_normal(shape, np.float32)
    return feeds


def test_names_and_free_axes_are_the_engines_contract(exported: Callable[[str], tuple[Path, Path]]) -> None:
    spec = Bundle.open(exported("sdxl")[1]).spec
    inputs = {name: {t.name: t.shape for t in graph.inputs} for name, graph in spec.graphs().items()}
    image, deep = ("batch", 4, "height", "width"), spec.networks["unet"].outputs[1].shape
    assert (deep[0], *deep[2:]) == ("batch", "height", "width")
    added = {"text_embeds": ("batch", 24), "time_ids": ("batch", 6)}
    told = {tensor.name: tensor.shape for tensor in spec.networks["unet_text"].outputs}
    assert set(told.values()) == {("batch", 77, 32)}
    last = {tensor.name: told[tensor.name] for tensor in spec.networks["unet_shallow"].inputs if tensor.name in told}
    assert inputs == {
        "text_encoder": {"input_ids": ("batch", 77)},
        "text_encoder_2": {"input_ids": ("batch", 77)},
        "unet_text": {"encoder_hidden_states": ("batch", 77, 80)},
        "unet": {"sample": image, "timestep": ("batch",), **added, **told},
        "unet_shallow": {"sample": image, "timestep": ("batch",), **added, **last, "deep": deep},
        "vae_decoder": {"latents": image},
        "vae_encoder": {"image": ("batch", 3, "height", "width")},
    }
    outputs = {name: [t.name for t in graph.outputs] for name, graph in spec.graphs().items()}
    assert outputs == {
        "text_encoder": ["text_states"],
        "text_encoder_2": ["text_states", "text_embeds"],
        "unet_text": list(told),
        "unet": ["out", "deep"],
        "unet_shallow": ["out"],
        "vae_decoder": ["image"],
        "vae_encoder": ["moments"],
    }
    assert spec.graphs()["unet"].outputs[0].shape == image


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUNDLES)
def test_every_weight_is_read_from_the_safetensors(exported: Callable[[str], tuple[Path, Path]], name: str) -> None:
    """With any names (2022's in sd), files (shards in sd2) and types (half precision in sd2 and emoji)."""
    _, root = exported(name)
    assert not list(root.rglob("*.extra.safetensors"))
    half = name in ("sd2", "emoji", "trained-pixels")
    for network, graph in Bundle.open(root).spec.graphs().items():
        model = onnx.load(root / graph.path, load_external_data=False)
        pointers = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
        inside = [t for t in model.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
        assert max((len(t.raw_data) for t in inside), default=0) <= 77 * 77  # the causal mask
        assert {t.data_type for t in pointers} == {onnx.TensorProto.FLOAT16 if half else onnx.TensorProto.FLOAT}
        least = {"unet_text": len(graph.outputs)}  # or as many as a text encoder of two layers, one of which SDXL uses
        assert len(pointers) >= least.get(network, 18)
        for tensor in pointers:
            location = next(e.value for e in tensor.external_data if e.key == "location")
            assert location.endswith(".safetensors")
            assert "/" not in location


def test_a_weight_that_matches_nothing_goes_to_a_sidecar(
    exported: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    source, bundle = exported("sd")
    weights = tmp_path / "model.safetensors"
    tensors = load_file(source / "text_encoder" / "model.safetensors")
    changed = "text_model.embeddings.token_embedding.weight"
    save_file(tensors | {changed: tensors[changed] + 1}, weights)
    with quiet():
        model = trace(load_network(source, "text_encoder"))
        passes.clean(model)
    shared = share_weights(model, [weights], tmp_path / "model.extra.safetensors")
    ir.save(model, tmp_path / "model.onnx")
    size = tensors[changed].nbytes
    assert list(load_file(tmp_path / "model.extra.safetensors")) == [changed.removeprefix("text_model.")]
    assert size < shared.sidecar < size + 200
    assert shared.shared == sum(t.nbytes for t in tensors.values()) - size
    feeds = {"input_ids": np.arange(77, dtype=np.int64)[None]}
    for array, wanted in zip(
        _session(tmp_path / "model.onnx").run(None, feeds),
        _session(bundle / "text_encoder" / "model.onnx").run(None, feeds),
        strict=True,
    ):
        np.testing.assert_array_equal(array, wanted)
