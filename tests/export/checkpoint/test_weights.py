"""Which weight files are used: every name that libraries have written, variants, and files that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.numpy import load_file, save_file
from transformers import CLIPTextModel

from latentrt.errors import ExportError
from latentrt_export.checkpoint.source import open_checkpoint
from latentrt_export.graphs.to_onnx import quiet
from latentrt_export.graphs.wrap import load_network
from latentrt_export.verify.reference import plain_folder

PT = {"format": "pt"}
LIBRARIES: dict[str, Any] = {"text_encoder": CLIPTextModel, "unet": UNet2DConditionModel}
STEMS = {"text_encoder": "model", "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
# Index, shard, variant, and the networks whose library loads it: all forms that diffusers and transformers have
# written, and the one of huggingface_hub's save_torch_model.
NAMES = [
    ("{}.safetensors.index.json", "{}-0000{}-of-00002.safetensors", None, ("text_encoder", "unet")),
    ("{}.safetensors.index.fp16.json", "{}.fp16-0000{}-of-00002.safetensors", "fp16", ("text_encoder", "unet")),
    ("{}.safetensors.fp16.index.json", "{}-0000{}-of-00002.fp16.safetensors", "fp16", ("unet",)),
    ("{}.fp16.safetensors.index.json", "{}.fp16-0000{}-of-00002.safetensors", "fp16", ()),
]


def weights_of(folder: Path) -> Path:
    return folder / f"{STEMS[folder.name]}.safetensors"


def split(folder: Path, index: str, shard: str) -> dict[str, np.ndarray]:
    """Put a network's file into two shards of these names; return its tensors."""
    path, stem = weights_of(folder), STEMS[folder.name]
    tensors = load_file(path)
    path.unlink()
    places = {name: shard.format(stem, 1 + i % 2) for i, name in enumerate(tensors)}
    for file in set(places.values()):
        save_file({name: tensors[name] for name, place in places.items() if place == file}, folder / file, PT)
    (folder / index.format(stem)).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return tensors


@pytest.mark.parametrize("part", ["text_encoder", "unet"])
@pytest.mark.parametrize(("index", "shard", "variant", "loaded_by"), NAMES)
def test_every_index_name_opens(
    checkpoint: Path, part: str, index: str, shard: str, variant: str | None, loaded_by: tuple[str, ...]
) -> None:
    tensors = split(checkpoint / part, index, shard)
    opened = open_checkpoint(checkpoint, variant=variant)
    stem = STEMS[part]
    assert opened.files[f"{part}/{stem}.safetensors.index.json"].name == index.format(stem)
    assert {f"{part}/{shard.format(stem, i)}" for i in (1, 2)} <= set(opened.files)
    with plain_folder(opened) as folder, quiet():
        state = load_network(folder, part).module.state_dict()
        for name in tensors:
            np.testing.assert_array_equal(state[f"model.{name}"].numpy(), tensors[name])
        if part in loaded_by:
            theirs = LIBRARIES[part].from_pretrained(checkpoint / part, variant=variant, use_safetensors=True)
            assert all(torch.equal(tensor, state[f"model.{name}"]) for name, tensor in theirs.state_dict().items())


def as_variant(path: Path, name: str, scale: float) -> None:
    """Write another variant of a file beside it, its numbers scaled so that one can tell which was loaded."""
    scaled = {key: tensor * np.float32(scale) for key, tensor in load_file(path).items()}
    save_file(scaled, path.with_suffix(f".{name}.safetensors"), PT)


def used(checkpoint: Path, variant: str | None = None) -> dict[str, str]:
    files = open_checkpoint(checkpoint, variant=variant).files
    return {path.parent.name: path.name for name, path in files.items() if name.endswith(".safetensors")}


def test_a_variant_is_taken_where_it_exists_as_diffusers_does(checkpoint: Path) -> None:
    as_variant(weights_of(checkpoint / "unet"), "fp16", 0.5)
    opened = open_checkpoint(checkpoint, variant="fp16")
    assert used(checkpoint, "fp16") == {
        "text_encoder": "model.safetensors",
        "unet": "diffusion_pytorch_model.fp16.safetensors",
        "vae": "diffusion_pytorch_model.safetensors",
    }
    assert opened.notes == (
        "text_encoder: no fp16 weights, taking the plain ones",
        "vae: no fp16 weights, taking the plain ones",
    )
    absent = {"safety_checker": None, "feature_extractor": None}
    with quiet(), plain_folder(opened) as folder:
        theirs = StableDiffusionPipeline.from_pretrained(checkpoint, variant="fp16", use_safetensors=True, **absent)
        for part, network in (("unet", "unet"), ("vae", "vae_decoder"), ("text_encoder", "text_encoder")):
            ours = load_network(folder, network).module.state_dict()
            state = getattr(theirs, part).state_dict()
            assert all(torch.equal(tensor, ours[f"model.{name}"]) for name, tensor in state.items())


def test_the_plain_weights_are_the_default_and_nothing_is_said(checkpoint: Path) -> None:
    for part in STEMS:
        as_variant(weights_of(checkpoint / part), "fp16", 1)
    assert set(used(checkpoint).values()) == {"model.safetensors", "diffusion_pytorch_model.safetensors"}
    assert open_checkpoint(checkpoint).notes == open_checkpoint(checkpoint, variant="fp16").notes == ()


def test_the_only_weights_are_taken_and_said(checkpoint: Path) -> None:
    path = weights_of(checkpoint / "vae")
    path.rename(path.with_suffix(".non_ema.safetensors"))
    assert used(checkpoint)["vae"] == "diffusion_pytorch_model.non_ema.safetensors"
    assert open_checkpoint(checkpoint).notes == ("vae: no plain weights, taking the non_ema ones",)


def test_a_variant_that_no_network_has_is_refused_with_those_that_exist(checkpoint: Path) -> None:
    as_variant(weights_of(checkpoint / "unet"), "fp16", 1)
    with pytest.raises(ExportError, match=r"no network has bf16 weights\. Needed: one of plain, fp16"):
        open_checkpoint(checkpoint, variant="bf16")


def test_several_variants_and_no_plain_one_need_a_choice(checkpoint: Path) -> None:
    path = weights_of(checkpoint / "unet")
    for name in ("fp16", "bf16"):
        as_variant(path, name, 1)
    path.unlink()
    with pytest.raises(ExportError, match=r"unet has the weights bf16, fp16 and no plain ones.*--variant bf16"):
        open_checkpoint(checkpoint)
    assert used(checkpoint, "fp16")["unet"] == "diffusion_pytorch_model.fp16.safetensors"


def test_one_file_or_shards_beside_it_is_each_librarys_choice(checkpoint: Path) -> None:
    """diffusers takes the shards, transformers the file."""
    for part in ("text_encoder", "unet"):
        path = weights_of(checkpoint / part)
        whole = path.read_bytes()
        split(checkpoint / part, "{}.safetensors.index.json", "{}-0000{}-of-00002.safetensors")
        path.write_bytes(whole)
        as_variant(path, "other", 2)
        path.with_suffix(".other.safetensors").replace(path)
        with quiet():
            theirs = LIBRARIES[part].from_pretrained(checkpoint / part, use_safetensors=True).state_dict()
        with plain_folder(open_checkpoint(checkpoint)) as folder, quiet():
            ours = load_network(folder, part).module.state_dict()
        assert all(torch.equal(tensor, ours[f"model.{name}"]) for name, tensor in theirs.items())


def test_the_command_prints_and_returns_what_was_chosen(
    checkpoint: Path, tmp_path: Path, fast: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from latentrt_export.checkpoint.single.choices import AS_THEY_ARE
    from latentrt_export.cli import run_export

    fast.setattr("latentrt_export.golden.golden_runs", lambda root, spec: ())
    as_variant(weights_of(checkpoint / "unet"), "fp16", 1)
    options: dict[str, Any] = {"revision": None, "variant": "fp16", "choices": AS_THEY_ARE, "overwrite": True}
    run_export(str(checkpoint), tmp_path / "bundle", **options, as_json=False)
    assert "vae: no fp16 weights, taking the plain ones" in capsys.readouterr().out
    run_export(str(checkpoint), tmp_path / "bundle", **options, as_json=True)
    assert "vae: no fp16 weights, taking the plain ones" in json.loads(capsys.readouterr().out)["notes"]
