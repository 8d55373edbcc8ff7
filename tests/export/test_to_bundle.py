"""The bundle as a folder, and how it is put in its place."""

from __future__ import annotations

import errno
import fcntl
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.golden import Golden
from latentrt.errors import OutputError
from latentrt.model.prompts.tokenizer import Tokenizer
from latentrt_export import to_bundle
from latentrt_export.checkpoint.source import open_checkpoint
from latentrt_export.graphs.to_onnx import quiet
from latentrt_export.to_bundle import export_bundle

Arrays = dict[str, np.ndarray]


def test_diffusers_opens_the_bundle_and_makes_the_same_latents(
    exported: Callable[[str], tuple[Path, Path]],
) -> None:
    source, bundle = exported("sd")
    latents = []
    for folder, absent in ((source, {"safety_checker": None, "feature_extractor": None}), (bundle, {})):
        with quiet():
            pipe = StableDiffusionPipeline.from_pretrained(folder, use_safetensors=True, **absent)
            pipe.set_progress_bar_config(disable=True)
            generator = torch.Generator().manual_seed(1)
            latents.append(pipe("a cat", num_inference_steps=2, generator=generator, output_type="latent").images)
    assert torch.isfinite(latents[0]).all()
    torch.testing.assert_close(latents[0], latents[1], rtol=0, atol=0)


def test_the_manifest_says_what_the_model_is(exported: Callable[[str], tuple[Path, Path]]) -> None:
    sd, sd2, sdxl = (Bundle.open(exported(name)[1]).spec for name in ("sd", "sd2", "sdxl"))
    assert (sd.id, sd.zero_negative, sdxl.zero_negative) == ("sd", False, True)
    assert {name: network.role for name, network in sd.networks.items()} == {
        "text_encoder": "text_encoder",
        "unet_text": "conditioner",
        "unet": "denoiser",
        "unet_shallow": "shallow",
        "vae_decoder": "decoder",
        "vae_encoder": "encoder",
    }
    tokenizers = {name: sdxl.networks[name].tokenizer for name in sdxl.named("text_encoder")}
    assert tokenizers == {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
    assert (sd.latents.channels, sd.latents.factor, sd.latents.height, sd.latents.width) == (4, 2, 8, 8)
    assert (sd.latents.scale, sd.latents.shift, sdxl.latents.scale) == (0.18215, 0.0, 0.13025)
    assert sd2.schedule == "scheduler/scheduler_config.json"
    assert sd.made["command"] == "latentrt export sd"
    assert {"torch", "diffusers", "transformers"} <= set(sd.made["versions"])
    text = (exported("sd")[1] / "manifest.json").read_text()
    assert str(exported("sd")[1].parent) not in text


def test_a_variant_gets_its_plain_name(exported: Callable[[str], tuple[Path, Path]]) -> None:
    files = Bundle.open(exported("sd2")[1]).files
    assert "text_encoder/model.safetensors" in files
    assert "unet/diffusion_pytorch_model.safetensors.index.json" in files
    assert sum(name.startswith("unet/") and name.endswith(".safetensors") for name in files) == 3


def test_tokenizer_json_is_written_where_only_its_parts_are(exported: Callable[[str], tuple[Path, Path]]) -> None:
    source, bundle = exported("sd")
    assert not (source / "tokenizer" / "tokenizer.json").exists()
    prompt = "A cat on a dog"
    both = [Tokenizer.open(folder / "tokenizer").encode(prompt).ids for folder in (source, bundle)]
    np.testing.assert_array_equal(*both)


@pytest.mark.parametrize("network", ["text_encoder", "unet", "vae_decoder"])
def test_exporting_again_gives_the_same_bytes_and_prints_nothing(
    exported: Callable[[str], tuple[Path, Path]], tmp_path: Path, capfd: pytest.CaptureFixture[str], network: str
) -> None:
    source, bundle = exported("sd")
    again = shutil.copytree(bundle, tmp_path / "again", ignore=shutil.ignore_patterns("*.onnx", "manifest.json"))
    capfd.readouterr()
    specs, summary = to_bundle._export_network(open_checkpoint(source), again, network)
    assert capfd.readouterr() == ("", "")
    size = 0
    for name, spec in specs.items():
        path, known = spec.variants["fp32"].path, Bundle.open(bundle).spec.networks[name]
        assert (again / path).read_bytes() == (bundle / path).read_bytes()
        assert spec == replace(known, variants={"fp32": known.variants["fp32"]})
        size += (bundle / path).stat().st_size
    assert summary.graph_bytes == size
    assert summary.sidecar_bytes == 0


def _contents(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_progress_and_summary(checkpoint: Path, tmp_path: Path, fast: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, int, int]] = []
    summary = export_bundle(checkpoint, tmp_path / "one", progress=lambda *args: told.append(args))
    parts = ["copy", "text_encoder", "unet", "vae_decoder", "vae_encoder", "half precision", "manifest"]
    assert told == [(part, done, 7) for done, part in enumerate(parts)]
    assert list(summary.networks) == parts[1:-2]
    assert summary.total_bytes == sum(len(data) for data in _contents(tmp_path / "one").values())
    export_bundle(checkpoint, tmp_path / "two")
    assert _contents(tmp_path / "one") == _contents(tmp_path / "two")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("bad"), OSError(errno.ENOSPC, "disk full")])
def test_an_interrupted_export_leaves_the_old_bundle(
    checkpoint: Path, tmp_path: Path, fast: pytest.MonkeyPatch, error: BaseException
) -> None:
    export_bundle(checkpoint, tmp_path / "bundle")
    before = _contents(tmp_path)

    def interrupt(part: str, done: int, total: int) -> None:
        if part == "vae_decoder":
            raise error

    expected = OutputError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        export_bundle(checkpoint, tmp_path / "bundle", overwrite=True, progress=interrupt)
    assert _contents(tmp_path) == before
    Bundle.open(tmp_path / "bundle")


def test_the_next_export_repairs_what_a_killed_one_left(
    checkpoint: Path, tmp_path: Path, fast: pytest.MonkeyPatch
) -> None:
    bundle = tmp_path / "bundle"
    export_bundle(checkpoint, bundle)
    half = tmp_path / ".bundle.latentrt-new"
    half.mkdir()
    (half / "half").write_bytes(b"written")
    bundle.rename(tmp_path / ".bundle.latentrt-old")  # killed between the two renames
    with pytest.raises(OutputError, match="overwrite"):
        export_bundle(checkpoint, bundle)
    Bundle.open(bundle)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "checkpoint"]


def test_what_is_no_bundle_is_never_replaced(checkpoint: Path, tmp_path: Path, fast: pytest.MonkeyPatch) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "letter.txt").write_text("dear")
    for target in (tmp_path / "notes", tmp_path, tmp_path / "notes" / "letter.txt"):
        with pytest.raises(OutputError, match="not a bundle"):
            export_bundle(checkpoint, target, overwrite=True)
    assert (tmp_path / "notes" / "letter.txt").read_text() == "dear"


@pytest.mark.parametrize(
    "manifest", [{"manifest_version": 3, "name": "an extension"}, {"schema": 1, "files": []}, [], "cut short"]
)
def test_a_manifest_of_others_makes_no_bundle(
    checkpoint: Path, tmp_path: Path, fast: pytest.MonkeyPatch, manifest: Any
) -> None:
    extension = tmp_path / "extension"
    extension.mkdir()
    for folder in (extension, checkpoint):
        (folder / "manifest.json").write_text(json.dumps(manifest)[: 9 if manifest == "cut short" else None])
    before = _contents(tmp_path)
    with pytest.raises(OutputError, match="not a bundle"):
        export_bundle(checkpoint, extension, overwrite=True)
    with pytest.raises(OutputError, match=r"manifest\.json is not latentrt's"):
        export_bundle(checkpoint, checkpoint, overwrite=True)
    assert _contents(tmp_path) == before


def test_two_exports_to_one_place_do_not_meet(checkpoint: Path, tmp_path: Path, fast: pytest.MonkeyPatch) -> None:
    bundle, refused = tmp_path / "bundle", []

    def meanwhile(part: str, done: int, total: int) -> None:
        if part == "unet":
            with pytest.raises(OutputError, match="another export is writing to") as error:
                export_bundle(checkpoint, bundle, overwrite=True)
            refused.append(error.value)

    export_bundle(checkpoint, bundle, progress=meanwhile)
    assert len(refused) == 1
    Bundle.open(bundle)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "checkpoint"]


def test_a_lock_is_its_holders_not_its_files(checkpoint: Path, tmp_path: Path, fast: pytest.MonkeyPatch) -> None:
    lock = tmp_path / ".bundle.latentrt-lock"
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another export"):
            export_bundle(checkpoint, tmp_path / "bundle")
        assert lock.exists()
    export_bundle(checkpoint, tmp_path / "bundle")  # the file was left by a killed process
    assert not lock.exists()


def test_graphs_can_be_added_to_the_checkpoint_itself(
    checkpoint: Path, tmp_path: Path, fast: pytest.MonkeyPatch
) -> None:
    (checkpoint / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(OutputError, match="checkpoint itself"):
        export_bundle(checkpoint, checkpoint)
    export_bundle(checkpoint, checkpoint, overwrite=True)
    assert "unet/diffusion_pytorch_model.bin" not in Bundle.open(checkpoint).files
    assert (checkpoint / "unet" / "diffusion_pytorch_model.bin").read_bytes() == b"pickle"
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_a_full_disk_is_seen_before_anything_is_written(
    checkpoint: Path, tmp_path: Path, fast: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=3_000_000)
    fast.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match=r"3 MB free.*Needed: 35 MB"):
        export_bundle(checkpoint, tmp_path / "bundle")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_golden_runs_are_measured_on_the_finished_bundle(
    checkpoint: Path, tmp_path: Path, fast: pytest.MonkeyPatch
) -> None:
    run = Golden("a cat", "", "ddim", 4, 0, 1.0, 0.5, 1.0, (0.25, -1.0))
    seen = []

    def measure(root: Path, spec: Any) -> tuple[Golden, ...]:
        seen.append(Bundle.open(root).spec == spec)
        return (run,)

    export_bundle(checkpoint, tmp_path / "bundle", golden=measure)
    assert seen == [True]
    assert Bundle.open(tmp_path / "bundle").spec.golden == (run,)
