"""A single file's networks are those that diffusers' from_single_file loads, to the bit."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from transformers import CLIPTokenizer

from latentrt.bundle.bundle import Bundle, sha256_of
from latentrt.errors import ExportError
from latentrt_export.checkpoint.single.choices import Choices
from latentrt_export.checkpoint.single.folder import make_folder
from latentrt_export.checkpoint.source import checkpoint_of, open_checkpoint, read_json
from latentrt_export.graphs.to_onnx import quiet
from latentrt_export.to_bundle import export_bundle
from tests.export.checkpoint.single.conftest import Make
from tests.support.models.single_file import averaged, vae_tensors, write_single

NETWORKS = ("text_encoder", "text_encoder_2", "unet", "vae")
KINDS = [
    *(("sd1", 4, False), ("sd1", 9, False), ("sd1", 8, False), ("sd1", 4, True)),
    *(("sd2", 4, False), ("sd2", 9, False)),
    *(("xl", 4, False), ("xl", 9, False), ("xl", 8, False), ("xl", 4, True), ("xl-refiner", 4, False)),
]
V = Choices(prediction_type="v_prediction")


def states(pipe: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Return every weight of a diffusers pipeline."""
    parts = {name: part for name in NETWORKS if (part := getattr(pipe, name, None)) is not None}
    return {name: dict(part.state_dict()) for name, part in parts.items()}


def settings(part: Any) -> dict[str, Any]:
    """Return what counts of a part's config: not its origin, nor what only half precision reads."""
    others = ("sample_size", "upcast_attention", "force_upcast")
    return {key: value for key, value in part.config.items() if not key.startswith("_") and key not in others}


def opened(folder: Path) -> Any:
    with quiet():
        return diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)


def equal(ours: Any, theirs: Any) -> bool:
    """Return whether two pipelines have the same weights, bit for bit and in the same dtypes."""
    ours, theirs = states(ours), states(theirs)
    assert {name: set(part) for name, part in ours.items()} == {name: set(part) for name, part in theirs.items()}
    pairs = [(ours[name][key], theirs[name][key]) for name in ours for key in ours[name]]
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(("family", "channels", "distilled"), KINDS)
def test_weights_and_configs_are_those_of_from_single_file(
    made: Make, tmp_path: Path, family: str, channels: int, distilled: bool
) -> None:
    file, _, folder = made(family, channels, distilled)
    index = read_json(folder / "model_index.json")
    with quiet():
        theirs = getattr(diffusers, index["_class_name"]).from_single_file(
            str(file), config=str(folder), local_files_only=True
        )
    make_folder(file, tmp_path, V if family == "sd2" else Choices())
    ours = opened(tmp_path)
    assert type(ours) is type(theirs)
    assert equal(ours, theirs)
    for name in ("unet", "vae"):
        assert settings(getattr(ours, name)) == settings(getattr(theirs, name))
    for name in (name for name in NETWORKS[:2] if getattr(ours, name, None) is not None):
        mine, other = (getattr(pipe, name).config.to_dict() for pipe in (ours, theirs))
        changed = {key for key in mine if mine[key] != other.get(key)} - {"_name_or_path", "architectures", "dtype"}
        assert changed <= ({"projection_dim"} if name == "text_encoder" else set())
    assert settings(ours.scheduler) == {
        **settings(theirs.scheduler),
        "prediction_type": "v_prediction" if family == "sd2" else "epsilon",
    }


@pytest.mark.parametrize("family", ["sd1", "xl"])
def test_a_distilled_model_is_known_by_its_guidance_embedding(made: Make, tmp_path: Path, family: str) -> None:
    """diffusers reads no such single file; its folder is the oracle."""
    file, _, folder = made(family, guidance=40)
    told = make_folder(file, tmp_path, Choices())
    ours, theirs = opened(tmp_path), opened(folder)
    assert "LCM (by its text encoder" in told[0]
    assert type(ours) is type(theirs)
    assert equal(ours, theirs)
    assert settings(ours.unet) == settings(theirs.unet)
    assert settings(ours.scheduler) == settings(theirs.scheduler)


def test_cosxl_edit_is_known_by_its_channels_and_sigmas(made: Make, tmp_path: Path) -> None:
    _, tensors, _ = made("xl", 8)
    file = write_single(tmp_path / "edit.safetensors", tensors | {"edm_vpred.sigma_max": torch.tensor(120.0)})
    with checkpoint_of(file) as checkpoint:
        assert checkpoint.index["is_cosxl_edit"] is True
        assert (checkpoint.pipeline, checkpoint.scheduler_class) == (
            "StableDiffusionXLInstructPix2PixPipeline",
            "EDMEulerScheduler",
        )


def test_the_order_of_keys_does_not_matter(made: Make, tmp_path: Path) -> None:
    file, tensors, _ = made("xl")
    make_folder(file, tmp_path / "a", Choices())
    for seed in (1, 2):
        order = random.Random(seed).sample(list(tensors), len(tensors))
        make_folder(write_single(tmp_path / file.name, tensors, order=order), tmp_path / "b", Choices())
        for path in [p for p in (tmp_path / "a").rglob("*") if p.is_file()]:
            assert sha256_of(path) == sha256_of(tmp_path / "b" / path.relative_to(tmp_path / "a")), path


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_file_keeps_its_dtypes(made: Make, tmp_path: Path, dtype: torch.dtype) -> None:
    _, tensors, folder = made("sd2")
    half = {name: t.to(dtype) if name.startswith(("model.", "cond")) else t for name, t in tensors.items()}
    file = write_single(tmp_path / "half.safetensors", half)
    make_folder(file, tmp_path / "made", V)
    with quiet():
        theirs = diffusers.StableDiffusionPipeline.from_single_file(
            str(file), config=str(folder), local_files_only=True, torch_dtype=dtype
        )
    from safetensors.torch import load_file

    unet = load_file(tmp_path / "made" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {t.dtype for t in unet.values()} == {dtype}
    assert all(torch.equal(unet[name], tensor) for name, tensor in states(theirs)["unet"].items())
    vae = load_file(tmp_path / "made" / "vae" / "diffusion_pytorch_model.safetensors")
    assert {t.dtype for t in vae.values()} == {torch.float32}


def test_averaged_weights_are_taken_when_asked_for(made: Make, tmp_path: Path) -> None:
    file, tensors, folder = made("sd1")
    both = write_single(tmp_path / "both.safetensors", tensors | averaged(tensors))
    with quiet():
        theirs = diffusers.StableDiffusionPipeline.from_single_file(
            str(both), config=str(folder), local_files_only=True, extract_ema=True
        )
    for choices, expected in ((Choices(ema=True), theirs), (Choices(), opened(folder))):
        make_folder(both, tmp_path / "made", choices)
        assert equal(opened(tmp_path / "made"), expected)
    with pytest.raises(ExportError, match=r"no model_ema\. weights.*leave out --ema"):
        make_folder(file, tmp_path / "none", Choices(ema=True))


@pytest.mark.parametrize("form", ["ldm", "prefixed", "diffusers", "diffusers of 2022", "a whole model"])
def test_another_vae_takes_the_place_of_the_checkpoints(made: Make, tmp_path: Path, form: str) -> None:
    file, tensors, folder = made("sd1")
    other = {name: tensor + 1 for name, tensor in opened(folder).vae.state_dict().items()}
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    forms = {
        "ldm": vae_tensors(other),
        "prefixed": {f"first_stage_model.{name}": tensor for name, tensor in vae_tensors(other).items()},
        "diffusers": other,
        "diffusers of 2022": {_renamed(name, old): tensor for name, tensor in other.items()},
        "a whole model": tensors | {f"first_stage_model.{name}": t for name, t in vae_tensors(other).items()},
    }
    vae = write_single(tmp_path / "other.safetensors", forms[form], metadata={"scaling_factor": "0.5"})
    for source in (file, folder):
        with checkpoint_of(source, choices=Choices(vae=vae)) as checkpoint:
            weights = checkpoint.files["vae/diffusion_pytorch_model.safetensors"]
            loaded = {**_load(weights)}
            assert checkpoint.configs["vae"]["scaling_factor"] == 0.5
            assert read_json(checkpoint.files["vae/config.json"])["scaling_factor"] == 0.5
            assert "VAE of other.safetensors" in checkpoint.notes[0]
        assert loaded.keys() == other.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in other.items())


def test_a_file_without_a_vae_needs_one(made: Make, tmp_path: Path) -> None:
    _, tensors, _ = made("sd1")
    vae = {name: tensor for name, tensor in tensors.items() if name.startswith("first_stage_model.")}
    bare = write_single(tmp_path / "bare.safetensors", {n: t for n, t in tensors.items() if n not in vae})
    with pytest.raises(ExportError, match=r"has no VAE.*pass --vae FILE"):
        make_folder(bare, tmp_path / "made", Choices())
    make_folder(bare, tmp_path / "made", Choices(vae=write_single(tmp_path / "vae.safetensors", vae)))
    assert open_checkpoint(tmp_path / "made").configs["vae"]["latent_channels"] == 4


@pytest.mark.parametrize(("family", "pads"), [("sd1", [49407]), ("sd2", [0]), ("xl", [49407, 0])])
def test_tokenizers_are_clips(made: Make, family: str, pads: list[int]) -> None:
    """Ids as CLIP's own tokenizer gives them."""
    with checkpoint_of(made(family).file, choices=V if family == "sd2" else Choices()) as checkpoint, quiet():
        folders = [checkpoint.root / name for name in ("tokenizer", "tokenizer_2")][: len(pads)]
        for folder, pad in zip(folders, pads, strict=True):
            ids = CLIPTokenizer.from_pretrained(folder)("a photo of a cat", padding="max_length").input_ids
            assert ids[:8] == [49406, 320, 1125, 539, 320, 2368, 49407, pad]


def test_a_file_is_a_source_of_its_own(made: Make, tmp_path: Path) -> None:
    """It is named by its file, has its header's licence, and leaves nothing behind."""
    _, tensors, _ = made("sd1")
    file = write_single(tmp_path / "my.safetensors", tensors, metadata={"modelspec.license": "openrail"})
    with checkpoint_of(file) as checkpoint:
        root = checkpoint.root
        assert (checkpoint.id, checkpoint.license, checkpoint.revision) == ("my.safetensors", "openrail", None)
        assert checkpoint.notes == (
            "Stable Diffusion 1 (by its text encoder, CLIP; cross-attention width 64), epsilon as its family does",
        )
    assert not root.exists()


def test_a_refiner_is_exported_with_its_one_text_encoder(made: Make, fast: Any, tmp_path: Path) -> None:
    export_bundle(made("xl-refiner").file, tmp_path / "bundle")
    spec = Bundle.open(tmp_path / "bundle").spec
    assert list(spec.networks) == ["text_encoder_2", "unet", "vae_decoder", "vae_encoder"]
    assert not spec.zero_negative


def test_text_encoders_without_text_model_in_their_names(made: Make, tmp_path: Path) -> None:
    file, tensors, _ = made("sd1")
    shorter = {name.replace(".transformer.text_model.", ".transformer."): tensor for name, tensor in tensors.items()}
    make_folder(file, tmp_path / "a", Choices())
    make_folder(write_single(tmp_path / "old.safetensors", shorter), tmp_path / "b", Choices())
    a, b = (_load(tmp_path / name / "text_encoder" / "model.safetensors") for name in "ab")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def _load(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def _renamed(name: str, names: dict[str, str]) -> str:
    part = name.rpartition(".")[0].rpartition("attentions.0.")[2]
    return name.replace(part, names[part]) if part in names else name
