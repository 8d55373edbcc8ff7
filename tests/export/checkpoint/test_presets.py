"""Presets: as large as the published models, the same bytes each time, and whole checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import CLIPTokenizer

from latentrt.bundle.bundle import sha256_of
from latentrt.errors import ExportError
from latentrt.model.prompts.tokenizer import Tokenizer
from latentrt_export.checkpoint.preset_configs import PRESETS
from latentrt_export.checkpoint.presets import CLASSES, make_checkpoint
from latentrt_export.checkpoint.source import checkpoint_of, open_checkpoint
from latentrt_export.graphs.to_onnx import quiet

# Parameters as counted in the published weights.
PARAMETERS = {
    "sd15": {"text_encoder": 123_060_480, "unet": 859_520_964, "vae": 83_653_863},
    "sd21": {"text_encoder": 340_387_840, "unet": 865_910_724, "vae": 83_653_863},
    "sdxl": {
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
        "unet": 2_567_463_684,
        "vae": 83_653_863,
    },
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("sd15-small", tmp_path_factory.mktemp("presets") / "small")


@pytest.mark.parametrize(("preset", "network"), [(p, n) for p, sizes in PARAMETERS.items() for n in sizes])
def test_presets_have_the_published_models_shapes(preset: str, network: str) -> None:
    kind, config = PRESETS[preset].networks[network]
    with torch.device("meta"), quiet():
        module = CLASSES[kind](config)
    assert sum(p.numel() for p in module.parameters()) == PARAMETERS[preset][network]


def test_a_checkpoint_is_one_that_can_be_exported(small: Path) -> None:
    opened = open_checkpoint(small)
    assert (opened.pipeline, opened.license) == ("StableDiffusionPipeline", "none (random weights)")
    assert {name for name in opened.files if name.endswith(".safetensors")} == {
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }
    assert "random weights" in (small / "README.md").read_text()


def test_the_same_seed_gives_the_same_bytes(small: Path, tmp_path: Path) -> None:
    again, other = (make_checkpoint("sd15-small", tmp_path / str(seed), seed=seed) for seed in (0, 1))
    for path in sorted(p for p in small.rglob("*") if p.is_file()):
        same = sha256_of(path) == sha256_of(again / path.relative_to(small))
        assert same, path
        assert (sha256_of(path) == sha256_of(other / path.relative_to(small))) == (path.suffix != ".safetensors")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_weights_keep_activations_sane(tmp_path: Path, dtype: str) -> None:
    """Matrices and kernels by fan-in, norms about 1; float16 is float32 rounded."""
    folder = make_checkpoint("sd15-small", tmp_path, dtype)
    for name, array in load_file(folder / "unet" / "diffusion_pytorch_model.safetensors").items():
        assert array.dtype == dtype
        if array.ndim > 1 and array.size > 1000:
            assert array.std() * math.sqrt(math.prod(array.shape[1:])) == pytest.approx(1, abs=0.06), name
            assert len(np.unique(array.reshape(len(array), -1), axis=0)) == len(array)
        elif array.ndim == 1:
            assert array.mean(dtype=np.float32) == pytest.approx(float(name.endswith("weight")), abs=0.05), name


def test_the_tokenizer_is_clips(small: Path) -> None:
    """49,408 entries, known ids; ours and transformers' give the same."""
    vocabulary = json.loads((small / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    assert sorted(vocabulary.values()) == list(range(49_408))
    assert vocabulary["<|endoftext|>"] == 49_407
    ours = Tokenizer.open(small / "tokenizer")
    with quiet():
        theirs = CLIPTokenizer.from_pretrained(small / "tokenizer")
    for prompt in ("A photo of an astronaut, 4k!", "", "naïve café 日本", "aaaa bbbb"):
        ids = theirs(prompt, padding="max_length", max_length=77, truncation=True).input_ids
        assert ours.encode(prompt).ids.tolist() == ids
    assert ours.encode("a photo of a cat").ids[:7].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert vocabulary["jekyll</w>"] == 49_405


def test_sdxls_second_tokenizer_pads_with_an_exclamation_mark() -> None:
    assert dict(PRESETS["sdxl"].tokenizers) == {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}


def test_a_preset_is_a_source_of_its_own() -> None:
    with checkpoint_of("preset:sd15-small") as checkpoint:
        root = checkpoint.root
        assert (checkpoint.id, checkpoint.license) == ("preset:sd15-small", "none (random weights)")
        assert root.is_dir()
    assert not root.exists()


def test_an_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(ExportError, match="sd15, sd15-small, sd21, sdxl"), checkpoint_of("preset:sd3"):
        pass
