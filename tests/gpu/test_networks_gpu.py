"""Each network on the GPU against the same one in float32: torch's where it is installed, else ONNX Runtime's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from latentrt.bundle.bundle import Bundle
from latentrt.model.predictor import inputs_of
from latentrt.model.prompts.tokenizer import Tokenizer
from latentrt.runtime.base import Backend, call
from latentrt.runtime.onnxruntime import OrtBackend
from latentrt.runtime.signature import shape_of
from tests.gpu.gpu_rig import LANES, SCALE, GpuRig
from tests.support.models import texts

pytestmark = pytest.mark.gpu
Arrays = dict[str, NDArray[Any]]
FLOAT_BOUND, HALF_BOUND = 1e-4, 5e-3  # relative L2; sums are taken in another order, and rounded to half precision
NETWORKS = {"unet": ("unet_text", "unet")}  # what torch has as one; all others are by themselves


def feeds_of(bundle: Bundle, *parts: str) -> Arrays:
    """Return prompts' tokens, or random numbers, as float32 graphs take them; as many as the plans serve."""
    spec, random = bundle.spec, np.random.default_rng(0)
    prompts = ["a red apple", "", "a cat face", "an owl"][: 1 if parts[-1].startswith("vae") else LANES]
    if parts[-1] == "text_encoder":
        tokenizer = Tokenizer.open(bundle.path(str(spec.networks["text_encoder"].tokenizer)))
        return {"input_ids": np.stack([tokenizer.encode(prompt).ids for prompt in prompts])}
    side = SCALE.pixels // (1 if parts[-1] == "vae_encoder" else spec.latents.factor)
    sizes = {"batch": len(prompts), "height": side, "width": side}
    feeds = {}
    for name, tensor in inputs_of([spec.networks[part] for part in parts]).items():
        shape = shape_of(tensor, sizes)
        is_text = name == "encoder_hidden_states"
        feeds[name] = texts.states(shape, random) if is_text else random.standard_normal(shape, np.float32)
    return feeds | ({"timestep": np.array([999, 500, 20, 0], np.float32)} if parts[-1] == "unet" else {})


def called(backend: Backend, bundle: Bundle, parts: Sequence[str], feeds: Arrays) -> Arrays:
    """Return what networks give that are called in turn."""
    known = dict(feeds)
    for part in parts:
        network = backend.load(bundle, part)
        known |= call(network, known)
        network.close()
    return known


def reference(bundle: Bundle, parts: Sequence[str], feeds: Arrays) -> Arrays:
    """Return the float32 network's outputs, on the CPU."""
    outputs = [tensor.name for tensor in bundle.spec.graphs()[parts[-1]].outputs]
    try:
        import torch

        from latentrt_export.graphs.wrap import load_network
    except ImportError:
        known = called(OrtBackend(), bundle, parts, feeds)
        return {output: known[output] for output in outputs}
    module = load_network(bundle.root, parts[-1]).module
    with torch.inference_mode():
        made = module(**{name: torch.from_numpy(array) for name, array in feeds.items()})
    tensors = made if isinstance(made, tuple) else (made,)
    return {output: tensor.numpy() for output, tensor in zip(outputs, tensors, strict=False)}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", ["text_encoder", "unet", "vae_decoder", "vae_encoder"])
def test_a_network_is_torchs(rig: GpuRig, name: str) -> None:
    bundle, parts = Bundle.open(rig.bundle, check_hashes=False), NETWORKS.get(name, (name,))
    feeds = feeds_of(bundle, *parts)
    theirs = reference(bundle, parts, feeds)
    ours, again = (called(rig.backend, bundle, parts, feeds) for _ in range(2))
    for output, wanted in theirs.items():
        error = float(np.linalg.norm(ours[output] - wanted) / np.linalg.norm(wanted))
        assert error < (HALF_BOUND if rig.half else FLOAT_BOUND), output
        np.testing.assert_array_equal(ours[output], again[output])


@pytest.fixture
def refittable(rig: GpuRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[GpuRig]:
    """Yield the same backend, with a plan of the UNet that takes other weights and no plan that does not."""
    if not rig.built:
        pytest.skip("only plans are refitted")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = GpuRig(rig.hardware, rig.kind)
    with closing(made.gpu):
        made.build("refittable", networks=("unet",))
        yield made


def test_refit_with_other_weights_and_return_to_base(refittable: GpuRig) -> None:
    bundle = Bundle.open(refittable.bundle, check_hashes=False)
    feeds = feeds_of(bundle, "unet")
    network: Any = refittable.backend.load(bundle, "unet")
    run: Callable[[], NDArray[Any]] = lambda: call(network, feeds)["out"]  # noqa: E731
    base = run()
    weights = {"conv_out.weight": 0.5 * stored(bundle, "conv_out.weight")}
    network.refit(weights)
    other = run()
    network.refit({})
    back = run()
    network.close()
    assert np.linalg.norm(other - base) > 0.1 * np.linalg.norm(base)
    np.testing.assert_array_equal(back, base)


def stored(bundle: Bundle, name: str) -> NDArray[Any]:
    """Return a weight of the UNet, float32."""
    import json

    path = bundle.root / "unet" / "diffusion_pytorch_model.safetensors"
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    about = json.loads(data[8:start])[name]
    first, last = about["data_offsets"]
    dtype = {"F16": np.float16, "F32": np.float32}[about["dtype"]]
    return np.frombuffer(data[start + first : start + last], dtype).astype(np.float32).reshape(about["shape"])
