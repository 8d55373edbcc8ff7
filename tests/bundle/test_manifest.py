"""Manifests are read back as they were written, and refused field by field; those of schema 1 are read too."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt.bundle.bundle import EMBEDDED, Bundle
from latentrt.bundle.golden import Golden
from latentrt.bundle.manifest import model_from
from latentrt.bundle.spec import (
    DECODER,
    DENOISER,
    TEXT_ENCODER,
    Defaults,
    Islands,
    LatentSpec,
    ModelSpec,
    NetworkSpec,
    TensorSpec,
    Variant,
)
from latentrt.engine import Engine
from latentrt.errors import BundleError, RequestError

DATA = Path(__file__).parent / "data"
OLD = DATA / "manifest1.json"  # of the embedded model, as latentrt 0.1 wrote it
SAMPLE = TensorSpec("sample", "float32", ("batch", 4, "height", "width"))
IMAGE = TensorSpec("image", "float32", ("batch", 3, "8*height", "(width//2)"))


def network(role: str, name: str, tokenizer: str | None = None, **variants: Variant) -> NetworkSpec:
    plain = Variant(f"{name}.onnx", 23, 10)
    return NetworkSpec(role, (SAMPLE,), (IMAGE,), {"fp32": plain, **variants}, tokenizer)


RESIDUAL = TensorSpec("residual_mid", "float32", ("batch", 8, "((height+1)//2)", "((width+1)//2)"))
READS = Variant("unet.control.onnx", 23, 12, {}, None, (RESIDUAL,))
HALF = Variant("unet.fp16.onnx", 23, 9, {"sample": "float16"}, Islands(70_000.0, ("node_add_3",)))
MODEL = ModelSpec(
    id="tiny",
    revision=None,
    license="mit",
    latents=LatentSpec(channels=4, factor=8, scale=0.18215, shift=0.0, height=8, width=8),
    schedule="scheduler/scheduler_config.json",
    networks={
        "text_encoder": network(TEXT_ENCODER, "text_encoder", "tokenizer"),
        "unet": network(DENOISER, "unet", fp16=HALF, **{"fp32+control": READS}),
        "vae_decoder": network(DECODER, "vae_decoder"),
    },
    defaults=Defaults(30, 5.0, "ddim"),
    golden=(Golden("a", "", "ddim", 4, 7, 3.0, 0.1, 1.0, (0.5, 0.25)),),
)


def test_a_model_survives_json() -> None:
    assert model_from(json.loads(json.dumps(MODEL.to_dict()))) == MODEL


def test_a_denoiser_that_reads_residuals_is_a_network_too() -> None:
    unet = MODEL.networks["unet"].controlled()
    assert unet is not None
    assert (list(unet.variants), unet.graph("fp32").path) == (["fp32"], "unet.control.onnx")
    assert unet.graph("fp32").inputs == (SAMPLE, RESIDUAL)
    assert MODEL.networks["vae_decoder"].controlled() is None


def test_a_variant_has_the_signature_of_its_network_but_for_its_dtypes() -> None:
    half = MODEL.graph("unet", "fp16")
    assert (half.path, half.opset, half.nodes) == ("unet.fp16.onnx", 23, 9)
    assert half.inputs == (TensorSpec("sample", "float16", SAMPLE.shape),)
    assert half.outputs == (IMAGE,)
    assert MODEL.graph("unet", "fp16-ort-cuda", "fp16") == half
    assert MODEL.graphs("fp16") == {"unet": half}


@pytest.mark.parametrize(("name", "variant"), [("unet", "fp16-ort-cuda"), ("text_encoder", "fp16"), ("vae", "fp32")])
def test_what_there_is_none_of_is_named(name: str, variant: str) -> None:
    with pytest.raises(BundleError, match=f"tiny has (no|the) {name}.*latentrt export"):
        MODEL.graph(name, variant)


def test_sides_are_multiples_of_the_step() -> None:
    latents = LatentSpec(3, 1, 1.0, 0.0, 32, 32, multiple=8)
    assert latents.shape_of(24, None) == (3, 24, 32)
    assert latents.pixels_of(24, None) == (24, 32)
    with pytest.raises(RequestError, match=r"height is 20.*a multiple of 8.*take 16 or 24"):
        latents.shape_of(20, None)


def test_a_vae_alone_has_neither_denoiser_nor_schedule() -> None:
    decoder = {"vae_decoder": MODEL.networks["vae_decoder"]}
    alone = replace(MODEL, schedule=None, networks=decoder, golden=())
    assert model_from(json.loads(json.dumps(alone.to_dict()))) == alone
    assert (MODEL.draws, alone.draws) == (True, False)
    with pytest.raises(BundleError, match="tiny has no denoiser: it is a VAE"):
        _ = alone.denoiser
    for wrong in (replace(MODEL, networks=decoder), replace(MODEL, schedule=None)):
        with pytest.raises(BundleError, match="schedule"):
            model_from(wrong.to_dict())


# ---- Schema 1


def test_schema_1_reads_as_what_it_became() -> None:
    old = json.loads(OLD.read_text(encoding="utf-8"))
    before, now = model_from(old["model"], 1), Bundle.open(check_hashes=False).spec
    assert replace(before, networks={}) == replace(now, networks={})
    assert list(before.networks) == ["text_encoder", "unet", "vae_decoder", "vae_encoder"]
    for name in ("vae_decoder", "vae_encoder"):
        assert before.graph(name, "fp32") == now.graph(name, "fp32")
        assert list(before.networks[name].variants) == list(now.networks[name].variants)
    assert [tensor.name for tensor in before.networks["text_encoder"].inputs] == ["input_ids"]
    reads = {tensor.name for tensor in before.networks["unet"].inputs}
    assert reads == {"sample", "timestep", "encoder_hidden_states"}  # nothing was taken out of it


def test_bundles_of_schema_1_draw_the_same(tmp_path: Path) -> None:
    """With the graphs of then; their half graphs are not kept here."""
    bundle = tmp_path / "bundle"
    shutil.copytree(EMBEDDED, bundle)
    for name in ("unet", "text_encoder"):
        shutil.copy(DATA / f"{name}.onnx", bundle / name / "model.onnx")
    old = json.loads(OLD.read_text(encoding="utf-8"))
    old["model"] = {key: value for key, value in old["model"].items() if key not in ("half", "islands", "cuda")}
    old["files"] = {
        name: about for name, about in old["files"].items() if not name.endswith((".fp16.onnx", ".cuda.onnx"))
    }
    (bundle / "manifest.json").write_text(json.dumps(old))
    settings = {"steps": 2, "width": 64, "height": 64}
    with Engine.load(bundle, threads=1) as old, Engine.load(threads=1, check_hashes=False) as new:
        for one, other in zip(old("a cat", **settings), new("a cat", **settings), strict=True):
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_the_first_ones_had_no_half_graphs() -> None:
    old = json.loads(OLD.read_text(encoding="utf-8"))["model"]
    spec = model_from({key: value for key, value in old.items() if key not in ("half", "islands", "cuda")}, 1)
    assert all(list(one.variants) == ["fp32"] for one in spec.networks.values())


@pytest.mark.parametrize(
    "change", [{"graphs": []}, {"tokenizers": 5}, {"half": {"unet": {}}}, {"surprise": 1}], ids=str
)
def test_a_broken_one_of_schema_1_is_refused(change: dict[str, Any]) -> None:
    old = json.loads(OLD.read_text(encoding="utf-8"))["model"]
    with pytest.raises(BundleError, match="manifest schema 1"):
        model_from({**old, **change}, 1)


# ---- What is refused


@pytest.mark.parametrize(
    "change",
    [{"family": "sd"}, {"latents": {"channels": 4}}, {"networks": {"unet": {"path": "x"}}}, {"networks": []}],
    ids=lambda change: next(iter(change)),
)
def test_a_manifest_of_another_kind_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match="manifest"):
        model_from({**MODEL.to_dict(), **change})


def changed(path: str, value: Any) -> dict[str, Any]:
    """Return the manifest's model part with one other value; `path` is like "latents.factor"."""
    data: dict[str, Any] = json.loads(json.dumps(MODEL.to_dict()))
    *parents, last = path.split(".")
    inner: Any = data
    for key in parents:
        inner = inner[int(key) if key.isdigit() else key]
    inner[last] = value
    return data


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *(("id", value) for value in (None, 3, "")),
        *(("schedule", value) for value in (None, 5, "")),
        ("revision", 1),
        ("license", ["mit"]),
        ("zero_negative", "no"),
        ("keeps_steps", 1),
        ("scaled_picture", None),
        *((name, "ten") for name in ("classes", "max_noise_level")),
        ("low_schedule", 5),
        ("made", "by hand"),
        *(("kind", value) for value in ("lora", None)),
        ("conditional_only", 1),
        *(("latents.factor", value) for value in (0, -8, "8", 8.0, True, None)),
        *((f"latents.{name}", 0) for name in ("channels", "height", "width", "multiple")),
        *(("latents.scale", value) for value in (0, 0.0, float("nan"), float("inf"), "1", None, 10**400)),
        ("latents.shift", float("nan")),
        *(("defaults.steps", value) for value in (0, "20", None)),
        ("defaults.guidance", "3"),
        ("defaults.solver", 3),
        ("networks", {}),
        ("networks.unet.role", "unet"),
        *(("networks.unet.role", role) for role in (DECODER, "control", "hint")),
        ("networks.vae_decoder.role", DENOISER),
        ("networks.text_encoder.tokenizer", None),
        ("networks.unet.tokenizer", "tokenizer"),
        ("networks.unet.variants", {}),
        *(("networks.unet.variants.fp32.path", value) for value in (5, None, "")),
        ("networks.unet.variants.fp32.opset", "23"),
        *(("networks.unet.variants.fp32.inputs", value) for value in (3, [{"name": "a", "dtype": "zz", "shape": [1]}])),
        ("networks.unet.variants.fp16.dtypes", {"sample": "float8"}),
        ("networks.unet.variants.fp16.dtypes", {"other": "float16"}),
        *(("networks.unet.variants.fp16.islands.largest", value) for value in ("1", None, float("inf"))),
        *(("networks.unet.variants.fp16.islands.nodes", value) for value in ([3], [""], None)),
        *(("networks.unet.inputs.0.dtype", value) for value in ("zz", None, [])),
        ("networks.unet.inputs.0.name", 3),
        *(("networks.unet.inputs.0.shape", value) for value in ([-1], [1.5], ["height + 1"], ["8*(4*height)"], [[1]])),
        ("networks.unet.inputs", 3),
        ("golden.0.std", 0),
        ("golden.0.steps", "4"),
        ("golden.0.prompt", None),
        ("golden.0.first", ["x"]),
    ],
)
def test_a_manifest_of_wrong_values_names_the_field(path: str, value: Any) -> None:
    with pytest.raises(BundleError, match=r"^manifest\.json has .*Needed: .*To fix it: ") as caught:
        model_from(changed(path, value))
    if "cannot be read" not in caught.value.found:
        assert path.split(".")[-1] in caught.value.found or path.split(".")[0] in ("golden", "networks")
