"""Opening a checkpoint: which folders are one, which are not, and which the engine cannot serve."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from latentrt.bundle.bundle import Bundle
from latentrt.errors import ExportError, UnsafeWeightsError
from latentrt_export.checkpoint.source import checkpoint_of, open_checkpoint
from latentrt_export.graphs.to_onnx import quiet
from latentrt_export.graphs.wrap import load_network
from latentrt_export.to_bundle import export_bundle


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> str:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("no/such/folder", "there is no folder no/such/folder"),
        ("owner/model", "cannot be downloaded"),
        (".", "has no model_index.json"),
    ],
)
def test_what_is_no_checkpoint(source: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ExportError, match=words):
        open_checkpoint(source)


def test_pickles_are_refused(tmp_path: Path) -> None:
    for name in ("model.ckpt", "model.pt"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(UnsafeWeightsError, match="pickle"), checkpoint_of(tmp_path / name):
            pass


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("model_index.json", {"_class_name": "FluxPipeline"}, "'FluxPipeline'.*StableDiffusionXLPipeline"),
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "text_encoder_2"),
        ("model_index.json", {"vae": ["diffusers", "AutoencoderTiny"]}, "AutoencoderTiny"),
        ("model_index.json", {"_class_name": ["pipeline", "Mine"]}, r"the pipeline \['pipeline', 'Mine'\]"),
        ("model_index.json", {"_class_name": 5}, "the pipeline 5"),
        ("model_index.json", {"unet": "UNet2DConditionModel"}, "unet 'UNet2DConditionModel' in model_index"),
        ("model_index.json", {"unet": ["diffusers", "UNetMotionModel"]}, "UNetMotionModel"),
        ("model_index.json", {"tokenizer": 7}, "tokenizer 7 in model_index"),
        ("model_index.json", {"text_encoder": {"a": 1}}, "text_encoder {'a': 1} in model_index"),
        ("unet/config.json", {"in_channels": "four"}, "unet/config.json has in_channels 'four'"),
        ("unet/config.json", {"sample_size": [8, 8, 8]}, r"sample_size \[8, 8, 8\]"),
        ("unet/config.json", {"layers_per_block": 10**9}, "layers_per_block 1000000000.*up to 100,"),
        ("unet/config.json", {"cross_attention_dim": [32, 32]}, "cross_attention_dim"),
        ("unet/config.json", {"quantization_config": {"quant_method": "bitsandbytes"}}, "quantized weights"),
        ("vae/config.json", {"scaling_factor": "0.18"}, "vae/config.json has scaling_factor '0.18'"),
        ("vae/config.json", {"block_out_channels": []}, "block_out_channels"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": "long"}, "tokenizer_config.json"),
        ("tokenizer/tokenizer_config.json", {"pad_token": 5}, "tokenizer_config.json"),
        ("scheduler/scheduler_config.json", {"beta_start": "small"}, "scheduler_config.json: .*beta_start"),
        ("model_index.json", {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}, "class is 'FlowMatch"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": [1]}, "num_train_timesteps"),
        ("unet/config.json", {"in_channels": 8}, "in_channels 8 in a StableDiffusionPipeline.*9 for inpainting"),
        ("unet/config.json", {"in_channels": 5}, "in_channels 5.*9 for inpainting"),
        (
            "model_index.json",
            {"_class_name": "StableDiffusionInstructPix2PixPipeline"},
            "in_channels 4.*in_channels 8 in a StableDiffusionInstructPix2PixPipeline",
        ),
        ("unet/config.json", {"out_channels": 8}, "learned variance"),
        ("unet/config.json", {"time_cond_proj_dim": 2}, "time_cond_proj_dim 2.*from 4"),
        ("unet/config.json", {"time_cond_proj_dim": "wide"}, "time_cond_proj_dim 'wide'"),
        ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type 'timestep'"),
        ("unet/config.json", {"num_class_embeds": 10}, "num_class_embeds 10"),
        ("unet/config.json", {"encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim_type"),
        ("unet/config.json", {"addition_embed_type": "text"}, "addition_embed_type 'text'"),
        ("unet/config.json", {"attention_type": "gated"}, "attention_type 'gated'"),
        ("text_encoder/config.json", {"use_attention_mask": True}, "use_attention_mask"),
        ("vae/config.json", {"latents_mean": [0.0]}, "latents_mean"),
    ],
)
def test_what_the_engine_cannot_serve_is_refused_by_name(
    checkpoint: Path, file: str, change: dict[str, Any], words: str
) -> None:
    path = checkpoint / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ExportError, match=words):
        open_checkpoint(checkpoint)


def test_broken_and_missing_files_are_named(checkpoint: Path) -> None:
    (checkpoint / "vae" / "config.json").write_text("[1]")
    with pytest.raises(ExportError, match=r"vae/config\.json holds no JSON object"):
        open_checkpoint(checkpoint)
    (checkpoint / "unet" / "config.json").write_text("{")
    with pytest.raises(ExportError, match=r"unet/config\.json cannot be read"):
        open_checkpoint(checkpoint)


def test_a_missing_weight_is_named_and_never_made_up(checkpoint: Path) -> None:
    path = checkpoint / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["decoder.conv_in.weight"]
    save_file(tensors, path)
    with pytest.raises(ExportError, match=r"vae has no weights for decoder\.conv_in\.weight"), quiet():
        load_network(checkpoint, "vae_decoder")


def test_weights_that_cannot_be_read_leave_nothing_behind(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "text_encoder" / "model.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(ExportError, match=r"text_encoder/model\.safetensors has no safetensors header"):
        export_bundle(checkpoint, tmp_path / "bundle")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_a_hub_id_is_downloaded_without_pickles_and_copied_out_of_the_cache(
    checkpoint: Path, tmp_path: Path, fast: pytest.MonkeyPatch
) -> None:
    """The hub's cache holds links: blobs under their hashes, names that point to them."""
    snapshot = tmp_path / "cache" / "snapshots" / "0123abcd"
    for path in [p for p in checkpoint.rglob("*") if p.is_file()]:
        link = snapshot / path.relative_to(checkpoint)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    (snapshot / "README.md").write_text("---\ntags: [x]\nlicense: openrail++\n---\n# A model\n")
    asked: list[dict[str, Any]] = []

    def download(repository: str, **options: Any) -> str:
        asked.append({"repository": repository} | options)
        return str(snapshot)

    fast.setattr("huggingface_hub.snapshot_download", download)
    export_bundle("owner/model", tmp_path / "bundle", revision="main")
    spec = Bundle.open(tmp_path / "bundle").spec
    assert (spec.id, spec.revision, spec.license) == ("owner/model", "0123abcd", "openrail++")
    assert not [p for p in (tmp_path / "bundle").rglob("*") if p.is_symlink()]
    assert [(a["repository"], a["revision"]) for a in asked] == [("owner/model", "main")]
    endings = {pattern.rpartition("*")[2].rpartition(".")[2] for pattern in asked[0]["allow_patterns"]}
    assert endings <= {"json", "txt", "md", "safetensors", ""}
    assert "*.fp16.*" in asked[0]["ignore_patterns"]


def test_a_hub_repository_of_variants_only_is_asked_again(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ignored: list[list[str]] = []

    def download(repository: str, **options: Any) -> str:
        ignored.append(options["ignore_patterns"])
        for path in checkpoint.rglob("diffusion_pytorch_model.safetensors"):
            path.rename(path.with_suffix(".fp16.safetensors") if options["ignore_patterns"] else path)
        if not options["ignore_patterns"]:
            return str(checkpoint)
        shutil.copytree(checkpoint, tmp_path / "part", ignore=shutil.ignore_patterns("*.fp16.*"))
        return str(tmp_path / "part")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    files = open_checkpoint("owner/model").files
    assert files["unet/diffusion_pytorch_model.safetensors"].name == "diffusion_pytorch_model.fp16.safetensors"
    assert [bool(patterns) for patterns in ignored] == [True, False]
