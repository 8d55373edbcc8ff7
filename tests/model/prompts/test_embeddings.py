"""Textual inversion: files of every layout, against diffusers' pipelines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from latentrt import Engine
from latentrt.errors import RequestError
from latentrt.model.prompts.embeddings import embeddings_of, read_embedding
from latentrt_export.verify.checks import psnr
from tests.model.prompts.pipes import SETTINGS, drawn, pipeline

Exported = Callable[[str], tuple[Path, Path]]
PSNR_BOUND = 60.0  # dB
PROMPTS = ("a <toy> cat", "<toy>, a cat and <TOY>")


def vectors(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


LAYOUTS: dict[str, Callable[[torch.Tensor], dict[str, torch.Tensor]]] = {
    "<toy>": lambda own: {"<toy>": own},
    "<toy> alone": lambda own: {"<toy>": own[0]},
    "emb_params": lambda own: {"emb_params": own},
    "string_to_param": lambda own: {"string_to_param.*": own, "string_to_token.*": torch.tensor(265)},
    "half": lambda own: {"emb_params": own.half()},
    "bfloat16": lambda own: {"emb_params": own.bfloat16()},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read(tmp_path: Path, layout: str) -> None:
    own = vectors(1, 32) if layout == "<toy> alone" else vectors(3, 32)
    path = tmp_path / "toy.safetensors"
    save_file(LAYOUTS[layout](own), path)
    found = read_embedding(path)
    assert found.token == ("<toy>" if "<toy>" in layout else None)
    exact = {"half": own.half().float(), "bfloat16": own.bfloat16().float()}.get(layout, own)
    np.testing.assert_array_equal(found.vectors[""], exact.numpy())
    assert embeddings_of([str(path)]) == {found.token or "toy": path}
    assert embeddings_of([f"mine={path}"]) == {"mine": path}


@pytest.mark.parametrize("count", [1, 3])
def test_it_draws_what_the_pipeline_draws(exported: Exported, tmp_path: Path, count: int) -> None:
    _, bundle = exported("sd")
    path, pipe = tmp_path / "toy.safetensors", pipeline(bundle, "sd")
    save_file({"<toy>": vectors(count, 32)}, path)
    pipe.load_textual_inversion(str(path.parent), weight_name=path.name)
    with (
        Engine.load(bundle, threads=1, check_hashes=False, embeddings=[path]) as taught,
        Engine.load(bundle, threads=1, check_hashes=False) as engine,
    ):
        for prompt in PROMPTS:
            (ours,) = engine(prompt, embeddings={"<toy>": path}, **SETTINGS)
            assert psnr(np.asarray(ours), drawn(pipe, prompt)) >= PSNR_BOUND
            assert ours.info["latentrt"]["embeddings"] == {"<toy>": "toy.safetensors"}
            np.testing.assert_array_equal(np.asarray(taught(prompt, **SETTINGS)[0]), np.asarray(ours))
            assert psnr(np.asarray(engine(prompt, **SETTINGS)[0]), np.asarray(ours)) < PSNR_BOUND


@pytest.mark.parametrize("name", ["sdxl", "sdxl-old"])
def test_sdxl_reads_a_vector_for_each_encoder(exported: Exported, tmp_path: Path, name: str) -> None:
    """SDXL's own second encoder, of an older config, pools at the highest id: that of the last vector."""
    _, bundle = exported(name)
    path, pipe = tmp_path / "toy.safetensors", pipeline(bundle, "sdxl")
    own = {"clip_l": vectors(2, 32), "clip_g": vectors(2, 48, seed=1)}
    save_file(own, path)
    pipe.load_textual_inversion(own["clip_l"], token="<toy>", text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer)
    second = {"text_encoder": pipe.text_encoder_2, "tokenizer": pipe.tokenizer_2}
    pipe.load_textual_inversion(own["clip_g"], token="<toy>", **second)
    with Engine.load(bundle, threads=1, check_hashes=False) as engine:
        for prompt in PROMPTS:
            (ours,) = engine(prompt, embeddings={"<toy>": path}, **SETTINGS)
            assert psnr(np.asarray(ours), drawn(pipe, prompt)) >= PSNR_BOUND


@pytest.mark.parametrize(
    ("name", "tensors", "message"),
    [
        ("sd", {"emb_params": vectors(1, 48)}, "vectors of 48 numbers. Needed: 32"),
        (
            "sd",
            {"clip_l": vectors(1, 32), "clip_g": vectors(1, 48)},
            "'clip_g', 'clip_l'. Needed: one made for this model",
        ),
        ("sdxl", {"emb_params": vectors(1, 32)}, "one tensor. Needed: 'clip_l'"),
        ("sdxl", {"clip_l": vectors(1, 32), "clip_g": vectors(2, 48)}, "as many vectors for each encoder"),
        ("sd", {"a": vectors(1, 32), "b": vectors(1, 32)}, "has the tensors a, b"),
        ("sd", {"emb_params": torch.zeros(1, 2, 32)}, "has vectors"),
        ("sd", {"emb_params": torch.zeros(0, 32)}, "has 0 vectors"),
        ("sd", {"emb_params": torch.full((1, 32), torch.nan)}, "of finite numbers"),
    ],
    ids=["width", "of SDXL", "of SD", "two counts", "two tokens", "three axes", "none", "NaN"],
)
def test_what_does_not_fit_is_refused(
    exported: Exported, tmp_path: Path, name: str, tensors: dict[str, torch.Tensor], message: str
) -> None:
    path = tmp_path / "toy.safetensors"
    save_file(tensors, path)
    with (
        Engine.load(exported(name)[1], threads=1, check_hashes=False) as engine,
        pytest.raises(RequestError, match=message),
    ):
        engine("a <toy>", embeddings={"<toy>": path}, steps=1)


def test_what_is_no_file_of_vectors_is_refused(exported: Exported, tmp_path: Path) -> None:
    good, broken, pickled = (tmp_path / name for name in ("toy.safetensors", "broken.safetensors", "toy.pt"))
    save_file({"emb_params": vectors(1, 32)}, good)
    broken.write_bytes(good.read_bytes()[:60])
    pickled.write_bytes(b"")
    cases: list[tuple[Any, str]] = [
        ({"<toy>": broken}, "is no safetensors file"),
        ({"<toy>": pickled}, "a .safetensors file"),
        ({"<toy>": tmp_path / "none.safetensors"}, "cannot be read"),
        ({"ca": good}, "the tokenizer has such a token"),
        ({"": good}, "embeddings is"),
        ([good], "embeddings is"),
    ]
    bundle = exported("sd")[1]
    with Engine.load(bundle, threads=1, check_hashes=False) as engine:
        for files, message in cases:
            with pytest.raises(RequestError, match=message):
                engine("a <toy>", embeddings=files, steps=1)
        assert len(engine("a toy", embeddings={"toy": good}, steps=1)) == 1
    with pytest.raises(RequestError, match="both 'toy'"):
        embeddings_of([str(good), f"toy={broken}"])
    with pytest.raises(RequestError, match="is no safetensors file"):
        Engine.load(bundle, threads=1, check_hashes=False, embeddings={"<toy>": broken})
