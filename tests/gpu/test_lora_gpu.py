"""LoRAs on a GPU, merged and of each request: its pictures are those of the CPU with the same ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from latentrt import Engine
from latentrt.bundle.bundle import EMBEDDED
from latentrt.bundle.tensors import header_of, open_tensors
from latentrt.errors import PlanError
from latentrt.run.job import Job
from tests.gpu.gpu_rig import SCALE, GpuRig
from tests.gpu.test_pictures_gpu import psnr

pytestmark = pytest.mark.gpu
Draw = Callable[..., NDArray[np.uint8]]
PARTS = {"unet/diffusion_pytorch_model": "unet", "text_encoder/model": "text_encoder"}
MODULES = ("attn1.to_q", "attn2.to_k", "attn2.to_v", "conv1", "q_proj")
PRODUCTS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "q_proj", "fc1")
RANK = 2


def write_lora(path: Path, modules: tuple[str, ...]) -> Path:
    """Write a random LoRA of modules with these ends, of the text encoder and of the UNet."""
    random, arrays = np.random.default_rng(5), dict[str, NDArray[np.float32]]()
    for file, network in PARTS.items():
        for name, shape in open_tensors(EMBEDDED / f"{file}.safetensors").shapes.items():
            module = name.removesuffix(".weight")
            if module != name and module.endswith(modules):
                down = random.standard_normal((RANK, *shape[1:]), np.float32) / np.sqrt(np.prod(shape[1:]))
                arrays[f"{network}.{module}.lora_A.weight"] = down.astype(np.float32)
                up = 0.3 * random.standard_normal((shape[0], RANK, *[1] * (len(shape) - 2)), np.float32)
                arrays[f"{network}.{module}.lora_B.weight"] = up.astype(np.float32)
    header = header_of({name: ("F32", array.shape) for name, array in arrays.items()})
    path.write_bytes(header + b"".join(array.tobytes() for array in arrays.values()))
    return path


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """Return a LoRA of the text encoder, of the UNet, and of what is computed once a picture."""
    return write_lora(tmp_path / "lora.safetensors", MODULES)


@pytest.fixture
def switchable(rig: GpuRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[GpuRig]:
    """Yield the same backend, with plans that take other weights, and none that do not."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = GpuRig(rig.hardware, rig.kind)
    with closing(made.gpu):
        made.build("refittable")
        yield made


def test_pictures_with_a_lora_and_back(switchable: GpuRig, draw: Draw, lora: Path) -> None:
    def rows(engine: Engine) -> NDArray[np.uint8]:
        return draw(engine, on_tick=lambda job: None)  # row by row, not at once

    with switchable.engine() as engine:
        plain, by_rows = draw(engine), rows(engine)
        for _ in range(2):
            engine.set_lora(f"{lora}:0.5")
            merged = draw(engine), rows(engine)
            engine.set_lora()
            np.testing.assert_array_equal(draw(engine), plain)
            np.testing.assert_array_equal(rows(engine), by_rows)
    with Engine.load(lora=f"{lora}:0.5", check_hashes=False) as here:
        wanted = draw(here)
    for picture in merged:
        assert psnr(picture, wanted) > (35 if switchable.half else 50)
    assert psnr(plain, wanted) < 30


def test_plans_that_keep_their_weights_are_refused(rig: GpuRig, draw: Draw, lora: Path) -> None:
    if not rig.built:
        pytest.skip("only plans are refitted")
    with rig.engine() as engine:
        plain: Any = draw(engine)
        with pytest.raises(PlanError, match=r"takes no weights but its own.*latentrt build .* --refittable"):
            engine.set_lora(lora)
        np.testing.assert_array_equal(draw(engine), plain)
        assert engine.lora == ()


def test_different_ones_in_one_batch(rig: GpuRig, tmp_path: Path) -> None:
    files = {"all": write_lora(tmp_path / "all.safetensors", PRODUCTS)}
    files["keys"] = write_lora(tmp_path / "keys.safetensors", ("attn2.to_k", "attn2.to_v"))
    rig.build(f"lora-rank={2 * RANK}")
    asked: tuple[dict[str, float], ...] = ({}, {"all": 0.2}, {"keys": 0.5, "all": 0.1})
    settings = {"width": SCALE.pixels, "height": SCALE.pixels, "steps": SCALE.steps, "guidance": 1.0, "seed": 3}

    def jobs_of(engine: Engine, loras: tuple[dict[str, float], ...] = asked) -> list[Job]:
        return [engine.requests(["a red apple"], settings | {"lora": lora})[0] for lora in loras]

    with rig.engine(adapters=files, adapter_rank=2 * RANK) as engine:
        together, alone = jobs_of(engine), jobs_of(engine)
        engine.run(together)
        for a, b in zip(together, alone, strict=True):
            engine.run([b])
            np.testing.assert_array_equal(a.latents, b.latents)
        pictures = [np.asarray(picture) for picture in engine.pictures(together)]
    for picture, lora in zip(pictures, asked, strict=True):
        with Engine.load(lora={files[name]: strength for name, strength in lora.items()}, check_hashes=False) as here:
            assert psnr(picture, np.asarray(here("a red apple", **settings)[0])) > (35 if rig.half else 50)
    assert max(psnr(pictures[0], picture) for picture in pictures[1:]) < 30
