"""ControlNets as single files, in LDM's names and diffusers': against diffusers' from_single_file, and refusals."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.tensors import open_tensors
from latentrt.errors import ExportError, UnsafeWeightsError
from latentrt_export.checkpoint.single.choices import Choices
from latentrt_export.checkpoint.single.controlnet.file import understand
from latentrt_export.checkpoint.source import checkpoint_of
from latentrt_export.graphs.to_onnx import quiet
from latentrt_export.to_bundle import export_bundle
from tests.export.checkpoint.single.test_refusals import damage
from tests.support.models.control_files import Tensors, controlnet_of, ldm_tensors
from tests.support.models.single_file import write_single

SMALL = {"down_block_types": ["DownBlock2D"] * 3, "mid_block_type": "UNetMidBlock2D"}
MID = {"transformer_layers_per_block": 1}


def opened(file: Path, choices: Choices | None = None) -> tuple[ControlNetModel, tuple[str, ...]]:
    """Return the ControlNet that a file is understood to be, and what is told of it."""
    with checkpoint_of(file, choices=choices or Choices()) as checkpoint, quiet():
        folder = next(iter(checkpoint.files.values())).parent
        return ControlNetModel.from_pretrained(folder), checkpoint.notes


def check_equal(ours: ControlNetModel, theirs: ControlNetModel) -> None:
    """Check that both have the same weights, to the bit, and give the same residuals."""
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.state_dict().items())
    torch.manual_seed(0)
    sample, texts = torch.randn(1, 4, 16, 16), torch.randn(1, 7, theirs.config["cross_attention_dim"])
    picture = torch.rand(1, 3, 128, 128)
    added = {"text_embeds": torch.randn(1, 1280), "time_ids": torch.rand(1, 6)}
    with torch.no_grad():
        sides = [each(sample, 7, texts, picture, added_cond_kwargs=added, return_dict=False) for each in (ours, theirs)]
    for own, other in zip(*[(*down, middle) for down, middle in sides], strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["ldm", "ldm without a prefix", "diffusers"])
@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_as_diffusers_reads_them(tmp_path: Path, family: str, layout: str) -> None:
    """With the config in a folder, as people give it to from_single_file where there is no network."""
    network = controlnet_of(family, tmp_path / "config")
    prefix = "control_model." if layout == "ldm" else ""
    tensors = network.state_dict() if layout == "diffusers" else ldm_tensors(network, prefix)
    file = write_single(tmp_path / "canny.safetensors", tensors)
    with quiet():
        theirs = ControlNetModel.from_single_file(str(file), config=str(tmp_path / "config"), local_files_only=True)
    ours, (told, *rest) = opened(file)
    check_equal(ours, theirs)
    assert told.startswith("ControlNet of Stable Diffusion in " + ("diffusers" if layout == "diffusers" else "LDM"))
    assert rest == []


@pytest.mark.parametrize("changes", [{}, MID, SMALL], ids=["large", "mid", "small"])
@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
def test_xl(tmp_path: Path, layout: str, changes: dict[str, Any]) -> None:
    """diffusers' from_single_file knows no names of LDM's for XL's label embedding: the folder is what it should be."""
    network = controlnet_of("xl", tmp_path / "config", **changes)
    tensors = ldm_tensors(network) if layout == "ldm" else network.state_dict()
    ours, (told, *_) = opened(write_single(tmp_path / "canny.safetensors", tensors))
    check_equal(ours, network)
    assert told.startswith("ControlNet of Stable Diffusion XL")


def test_out_of_a_whole_model(tmp_path: Path, fast: pytest.MonkeyPatch) -> None:
    """The ControlNet alone becomes a bundle, and what was left out is told."""
    tensors = ldm_tensors(controlnet_of("sd1", tmp_path / "config"))
    tensors |= {"model.diffusion_model.out.2.bias": torch.zeros(4), "global_step": torch.zeros(())}
    file = write_single(tmp_path / "control_sd15_canny.safetensors", tensors)
    summary = export_bundle(file, tmp_path / "bundle", choices=Choices(model="sd1"))
    assert summary.notes == (
        "ControlNet of Stable Diffusion in LDM's names (by --model)",
        "left out, of no network: model.diffusion_model.out.2.bias",
    )
    bundle = Bundle.open(tmp_path / "bundle")
    assert (bundle.spec.id, bundle.spec.kind) == (file.name, "controlnet")
    assert bundle.spec.made["command"] == "latentrt export control_sd15_canny.safetensors --model=sd1"
    ControlNetModel.from_pretrained(tmp_path / "bundle" / "controlnet")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"difference": torch.zeros(0)}, "differences from a base's weights.*get the whole"),
        ({"lora_controlnet": torch.zeros(0)}, "a Control-LoRA"),
        ({"task_embedding": torch.zeros(1)}, "a ControlNet Union.*its whole folder"),
        ({"control_model.zero_convs.0.0.bias": None}, r"the controlnet lacks control_model\.zero_convs\.0\.0\.bias"),
        ({"control_model.input_hint_block.0.weight": None}, r"has no input_hint_block\.0\.weight"),
        ({"control_model.input_hint_block.2.weight": None}, r"has no input_hint_block\.2\.weight"),
        ({"control_model.zero_convs.3.0.bias": torch.zeros(3)}, r"zero_convs\.3\.0\.bias has the shape \[3\]"),
        ({"control_model.zero_convs.9.0.bias": torch.zeros(3)}, r"have no place in a ControlNet: .*zero_convs\.9"),
        ({"control_model.label_emb.0.0.weight": torch.zeros(4, 9)}, "label embedding of 9 channels.*2816"),
    ],
)
def test_refused(sd1: Tensors, tmp_path: Path, change: dict[str, torch.Tensor | None], words: str) -> None:
    tensors = {name: tensor for name, tensor in (sd1 | change).items() if tensor is not None}
    with pytest.raises(ExportError, match=words):
        opened(write_single(tmp_path / "canny.safetensors", tensors))


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    """Return a small ControlNet's tensors in LDM's names."""
    return ldm_tensors(controlnet_of("sd1", tmp_path_factory.mktemp("controlnet")))


def test_no_damage_to_names_and_shapes_is_a_fault(sd1: Tensors, tmp_path: Path) -> None:
    """Tensors that are gone, renamed or reshaped, alone and in groups: understood or refused, never a traceback."""
    chance, refusals = random.Random(7), 0
    tensors = open_tensors(write_single(tmp_path / "canny.safetensors", sd1))
    for _ in range(200):
        entries = dict(tensors.entries)
        for name in chance.sample(list(entries), chance.choice((1, 1, 2, 10))):
            damage(entries, name, chance)
        try:
            understand(replace(tensors, entries=entries), Choices())
        except ExportError:
            refusals += 1
    assert refusals > 100


def test_options_and_pickles(sd1: Tensors, tmp_path: Path) -> None:
    file = write_single(tmp_path / "canny.safetensors", sd1)
    for choices in (Choices(ema=True), Choices(vae="vae.safetensors"), Choices(adapters=True)):
        with pytest.raises(ExportError, match=r"--(ema|vae|adapters) with a ControlNet.*leave out"):
            opened(file, choices)
    torch.save(sd1, tmp_path / "canny.pth")
    with pytest.raises(UnsafeWeightsError, match="pickled weights"):
        opened(tmp_path / "canny.pth")
