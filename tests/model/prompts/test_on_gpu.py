"""Prompts on an emulated GPU: what one launch cannot draw from token ids alone is drawn row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from latentrt import Engine
from latentrt.runtime.onnxruntime import OrtBackend
from latentrt_export.verify.checks import psnr
from tests.support.gpu.host_gpu import HostGpu

Exported = Callable[[str], tuple[Path, Path]]
PSNR_BOUND = 60.0  # dB
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "a1111 without weights": {"prompt_syntax": "a1111"},
    "a1111": {"prompt": "a (cat:1.4)", "prompt_syntax": "a1111"},
    "a1111, negative": {"negative_prompt": "(a dog:0.5)", "prompt_syntax": "a1111"},
    "compel": {"prompt": "a cat++ and a dog-", "prompt_syntax": "compel"},
    "clip skip": {"clip_skip": 1},
    "embedding": {"prompt": "a <toy>"},
}
AT_ONCE = ("plain", "a1111 without weights")


@pytest.fixture
def gpu() -> Iterator[HostGpu]:
    gpu = HostGpu()
    yield gpu
    assert gpu.in_use == 0
    gpu.close()


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_pictures_are_those_of_the_cpu(exported: Exported, tmp_path: Path, gpu: HostGpu, name: str) -> None:
    _, bundle = exported(name)
    generator = torch.Generator().manual_seed(0)
    own = {"clip_l": torch.randn(2, 32, generator=generator), "clip_g": torch.randn(2, 48, generator=generator)}
    path = tmp_path / "toy.safetensors"
    save_file(own if name == "sdxl" else {"emb_params": own["clip_l"]}, path)
    loading: dict[str, Any] = {"check_hashes": False, "embeddings": {"<toy>": path}}
    with (
        Engine.load(bundle, backend=OrtBackend(threads=1, gpu=gpu), capture=True, **loading) as there,
        Engine.load(bundle, threads=1, **loading) as here,
    ):
        for case, asked in CASES.items():
            asked = {"prompt": "a cat", "steps": 2, "guidance": 4.0, **asked}
            before = len(gpu.host.calls)
            (ours,) = there(**asked)
            at_once = gpu.host.calls[before:].count("cuGraphLaunch") == 1
            (theirs,) = here(**asked)
            assert psnr(np.asarray(ours), np.asarray(theirs)) >= PSNR_BOUND, case
            assert at_once == (case in AT_ONCE), case
            assert ours.info == theirs.info
