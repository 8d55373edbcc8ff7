"""Files that are no whole model: refused by the name of what they are, before anything is written."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from latentrt.bundle.tensors import Entry, open_tensors
from latentrt.errors import ExportError, UnsafeWeightsError
from latentrt_export.checkpoint.single.choices import Choices
from latentrt_export.checkpoint.single.folder import make_folder, understand
from latentrt_export.checkpoint.source import checkpoint_of
from tests.export.checkpoint.single.conftest import Make
from tests.support.models.single_file import Tensors, write_single

ONE = torch.zeros(1)
UNET, VAE, CLIP = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model."


def refused(file: Path, words: str, choices: Choices | None = None) -> None:
    """Check that a file is refused and that nothing was written."""
    target = file.parent / "made"
    with pytest.raises(ExportError, match=words):
        make_folder(file, target, choices or Choices())
    assert not target.exists()


@pytest.mark.parametrize(
    ("data", "kind", "words"),
    [
        (b"", ExportError, "is empty.*download the file again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", ExportError, "Git LFS.*git lfs pull"),
        (b"\n<!DOCTYPE html><html></html>" + b" " * 80, ExportError, "is a web page"),
        (b"PK\x03\x04" + b"\0" * 80, UnsafeWeightsError, "pickled weights"),
        (b"\x80\x02}q\0" + b"\0" * 80, UnsafeWeightsError, "pickled weights"),
        (b"GGUF" + b"\xff" * 80, ExportError, "has no safetensors header"),
        ((1000).to_bytes(8, "little") + b"{", ExportError, "is cut: its header has 1,000 bytes"),
        ((4).to_bytes(8, "little") + b"{{{{", ExportError, "no JSON"),
        ((4).to_bytes(8, "little") + b"[1] ", ExportError, "no JSON object"),
    ],
)
def test_damaged_files(tmp_path: Path, data: bytes, kind: type[Exception], words: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(kind, match=words), checkpoint_of(path):
        pass


@pytest.mark.parametrize(
    "entry",
    [
        1,
        {},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]},
        {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 2, 4]},
        {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]},
        {"dtype": None, "shape": [True], "data_offsets": [0, 4]},
    ],
)
def test_damaged_headers(tmp_path: Path, entry: object) -> None:
    data = json.dumps({"a": entry}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(data).to_bytes(8, "little") + data + b"\0" * 8)
    refused(path, "has a damaged header at 'a'")


@pytest.mark.parametrize("kept", [0.3, 0.9, 0.9999])
def test_cut_files(made: Make, tmp_path: Path, kept: float) -> None:
    data = made("sd1").file.read_bytes()
    path = tmp_path / "model.safetensors"
    path.write_bytes(data[: int(kept * len(data))])
    refused(path, "is cut: its header tells of")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"], "a LoRA"),
        (["unet.down_blocks.0.attentions.0.proj_in.lora_A.weight"], "a LoRA"),
        (["lora_unet_mid_block_attentions_0_proj_in.hada_w1_a"], "a LoRA"),
        (["emb_params"], "a textual inversion"),
        (["clip_l", "clip_g"], "a textual inversion"),
        (["adapter.body.0.resnets.0.block1.weight"], "a T2I-Adapter"),
        (["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"], "an IP-Adapter"),
        (["down_blocks.0.motion_modules.0.temporal_transformer.norm.weight"], "a motion module"),
        ([f"{UNET}joint_blocks.0.context_block.attn.qkv.weight"], "Stable Diffusion 3"),
        (["double_blocks.0.img_attn.norm.key_norm.scale"], "Flux"),
        ([f"{UNET}double_blocks.0.img_attn.norm.key_norm.scale"], "Flux"),
        (["transformer_blocks.0.img_mod.1.weight"], "Qwen-Image"),
        (["blocks.0.modulation", "head.modulation"], "Wan"),
        (["effnet_mapper.0.weight"], "Stable Cascade"),
        (["edm_mean", "edm_std", f"{UNET}input_blocks.0.0.weight"], "Playground 2.5"),
        (["conditioner.embedders.0.open_clip.model.ln_final.weight"], "Stable Video Diffusion"),
        (["embedder.model.visual.class_embedding"], "unCLIP"),
        (["depth_model.model.scratch.layer1_rn.weight"], "Stable Diffusion 2 depth"),
        (["down_blocks.0.resnets.0.norm1.weight"], "diffusers' names.*export its whole folder"),
        ([f"{VAE}decoder.conv_in.weight"], "a VAE.*give it with --vae"),
        (["decoder.conv_in.weight"], "a VAE"),
        (["decoder.1.weight"], "a VAE"),
        (["input_blocks.0.0.weight"], "a UNet without its text encoders"),
        ([f"{UNET}input_blocks.0.0.weight", f"{VAE}decoder.conv_in.weight"], "a UNet without its text encoders"),
        (["model_ema.diffusion_modelinput_blocks00weight"], "averaged .EMA. weights only"),
        (["text_model.encoder.layers.0.layer_norm1.weight"], "a text encoder"),
        ([f"{UNET}x_blocks.0.weight", f"{VAE}decoder.conv_in.weight"], "2 tensors that no known model has"),
        (["body.0.rdb1.conv1.weight"], r"1 tensors that no known model has \(body\.0"),
        ([], "0 tensors that no known model has"),
    ],
)
def test_other_files_are_named(tmp_path: Path, names: list[str], words: str) -> None:
    refused(write_single(tmp_path / "model.safetensors", dict.fromkeys(names, ONE)), words)


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("sd2", {f"{UNET}input_blocks.0.0.weight": (64, 8, 3, 3)}, "Stable Diffusion 2 with.*8 channels .pix2pix"),
        ("sd2", {f"{UNET}input_blocks.0.0.weight": (64, 7, 3, 3)}, "the x4 upscaler"),
        ("sd2", {f"{UNET}input_blocks.0.0.weight": (64, 5, 3, 3)}, "depth"),
        ("xl-refiner", {f"{UNET}input_blocks.0.0.weight": (64, 9, 3, 3)}, "refiner with a UNet of 9 channels"),
        ("sd2", {f"{UNET}label_emb.0.0.weight": (256, 1024)}, "a label embedding .unCLIP"),
        ("xl", {f"{UNET}label_emb.0.0.weight": None}, "no label embedding"),
        ("sd1", {f"{UNET}out.2.weight": None}, r"the UNet has no out\.2\.weight"),
        ("sd1", {f"{UNET}out.2.bias": None}, r"the unet lacks model\.diffusion_model\.out\.2\.bias \(1 of"),
        ("sd1", {f"{UNET}out.2.bias": (5,)}, r"out\.2\.bias has the shape \[5\].*\[4\]"),
        ("sd1", {f"{UNET}out.2.weight": ()}, r"out\.2\.weight has the shape \[\]"),
        ("sd1", {f"{UNET}input_blocks.0.0.weight": None}, r"the UNet has no input_blocks\.0\.0\.weight"),
        (
            "sd1",
            {f"{UNET}input_blocks.1.0.in_layers.2.weight": None},
            r"the unet lacks .*input_blocks\.1\.0\.in_layers",
        ),
        ("sd1", {f"{UNET}middle_block.1.proj_in.weight": None}, r"the unet lacks .*middle_block\.1\.proj_in\.weight"),
        (
            "sd1",
            {f"{UNET}output_blocks.9.0.in_layers.0.weight": (1,)},
            r"1 tensors of the networks have no place.*blocks\.9",
        ),
        ("sd1", {f"{UNET}time_embed.cond_proj.weight": (1,)}, r"time_embed\.cond_proj\.weight has the shape \[1\]"),
        ("sd1", {f"{UNET}time_embed.cond_proj.weight": (9, 40)}, r"cond_proj\.weight has the shape \[9, 40\]"),
        ("sd1", {f"{UNET}time_embed.cond_proj.bias": (40,)}, r"have no place in Stable Diffusion 1: .*cond_proj"),
        ("sd1", {f"{VAE}quant_conv.weight": None}, r"the vae lacks first_stage_model\.quant_conv\.weight"),
        ("sd1", {f"{VAE}encoder.conv_in.weight": None}, r"the VAE has no encoder\.conv_in\.weight"),
        ("sd1", {f"{CLIP}final_layer_norm.bias": None}, r"the text_encoder lacks .*final_layer_norm\.bias"),
        ("sd1", {f"{CLIP}embeddings.token_embedding.weight": (100, 64)}, "knows 100 tokens.*49408"),
        ("sd1", {f"{CLIP}embeddings.token_embedding.weight": (49408, 63)}, "63 channels.*multiple of 64"),
        ("xl", {"conditioner.embedders.1.model.text_projection": (128, 63)}, "label embedding of 160 channels"),
        ("xl", {"conditioner.embedders.1.model.text_projection": None}, "has no text_projection"),
        ("sd2", {"cond_stage_model.model.token_embedding.weight": (49408, 128)}, "reads text of 64 channels.*128"),
    ],
)
def test_models_of_another_structure(
    made: Make, tmp_path: Path, family: str, change: Mapping[str, tuple[int, ...] | None], words: str
) -> None:
    _, tensors, _ = made(family)
    changed: Tensors = dict(tensors)
    for name, shape in change.items():
        if shape is None:
            del changed[name]
        else:
            changed[name] = torch.zeros(shape)
    refused(write_single(tmp_path / "model.safetensors", changed), words, Choices(prediction_type="epsilon"))


@pytest.mark.parametrize(
    ("shape", "factor", "words"),
    [
        ((64, 8, 3, 3), "", r"a VAE with latent_channels 8.*latents as of the checkpoint's, 4"),
        ((64, 4, 3, 3), "much", "has scaling_factor 'much' in its header"),
        ((64, 4, 3, 3), "-1", "has scaling_factor '-1' in its header"),
    ],
)
def test_vaes_that_do_not_fit(made: Make, tmp_path: Path, shape: tuple[int, ...], factor: str, words: str) -> None:
    file, tensors, _ = made("sd1")
    other = tensors | {f"{VAE}decoder.conv_in.weight": torch.zeros(shape)}
    vae = write_single(tmp_path / "vae.safetensors", other, metadata={"scaling_factor": factor})
    refused(file, words, Choices(vae=vae))


def test_a_lora_is_no_vae(made: Make, tmp_path: Path) -> None:
    lora = write_single(tmp_path / "lora.safetensors", {"a.lora_down.weight": ONE})
    refused(made("sd1").file, r"lora\.safetensors has no VAE", Choices(vae=lora))


@pytest.mark.parametrize("family", ["sd1", "sd2", "xl", "xl-refiner"])
def test_no_damage_to_names_and_shapes_is_a_fault(made: Make, family: str) -> None:
    """Tensors that are gone, renamed or reshaped, alone and in groups: understood or refused, never a traceback."""
    chance, tensors = random.Random(7), open_tensors(made(family).file)
    refusals = 0
    for _ in range(60):
        entries = dict(tensors.entries)
        for name in chance.sample(list(entries), chance.choice((1, 1, 2, 10))):
            damage(entries, name, chance)
        try:
            understand(replace(tensors, entries=entries), Choices(ema=chance.random() < 0.1))
        except ExportError:
            refusals += 1
    assert refusals > 30


def damage(entries: dict[str, Entry], name: str, chance: random.Random) -> None:
    """Change one tensor, or all whose names begin alike."""
    if name not in entries:
        return
    entry = entries[name]
    if chance.random() < 0.3:
        beginning = name.rsplit(".", chance.randrange(1, 5))[0]
        for other in [other for other in entries if other.startswith(beginning)]:
            del entries[other]
    elif chance.random() < 0.5:
        shape = tuple(chance.choice((0, 1, 3, 64)) for _ in range(chance.randrange(5)))
        entries[name] = replace(entry, shape=shape)
    else:
        entries[name.replace(chance.choice("0123"), chance.choice("4567"), 1)] = entries.pop(name)


def test_dtypes_that_no_graph_reads(made: Make, tmp_path: Path) -> None:
    _, tensors, _ = made("sd1")
    name = f"{UNET}out.2.bias"
    file = write_single(tmp_path / "model.safetensors", tensors | {name: torch.zeros(4, dtype=torch.int64)})
    refused(file, r"out\.2\.bias is I64.*F16, BF16, F32")


def test_unknown_tensors_of_no_network_are_told(made: Make, tmp_path: Path) -> None:
    _, tensors, _ = made("sd1")
    more = {f"embedding_manager.{i}": ONE for i in range(7)}
    file = write_single(tmp_path / "model.safetensors", tensors | more)
    told = make_folder(file, tmp_path / "made", Choices())[1]
    assert told.startswith("left out, of no network: embedding_manager.0, embedding_manager.1")
    assert told.endswith("and 2 more")


def test_the_users_word_on_the_model_counts(made: Make, tmp_path: Path) -> None:
    """Also where it is wrong: weights of that model are missing then, or have another size."""
    file = made("xl").file
    refused(file, r"text encoder cond_stage_model\.transformer has no embeddings", Choices(model="sd1"))
    told = make_folder(file, tmp_path / "made", Choices(model="xl"))[0]
    assert told.startswith("Stable Diffusion XL (by --model;")


@pytest.mark.parametrize(
    ("choices", "words"),
    [({"model": "sd3"}, "no model 'sd3'.*sd1, sd2, xl"), ({"prediction_type": "v"}, "no prediction type 'v'.*epsilon")],
)
def test_unknown_words(choices: dict[str, str], words: str) -> None:
    with pytest.raises(ExportError, match=words):
        Choices(**choices)


def test_options_of_single_files_do_not_fit_folders(made: Make, checkpoint: Path) -> None:
    for choices in (Choices(model="sd1"), Choices(ema=True), Choices(prediction_type="epsilon")):
        with (
            pytest.raises(ExportError, match=r"needed|Needed: a single \.safetensors"),
            checkpoint_of(checkpoint, choices=choices),
        ):
            pass
    file = made("sd1").file
    with pytest.raises(ExportError, match="a revision or variant of the file"), checkpoint_of(file, variant="fp16"):
        pass


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="there is no file"), checkpoint_of("models/no.safetensors"):
        pass
    with pytest.raises(ExportError, match=r"no\.safetensors cannot be read \(No such file"):
        make_folder(tmp_path / "no.safetensors", tmp_path / "made", Choices())
