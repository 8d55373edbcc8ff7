"""Pictures with LoRAs merged, at export and in memory, against diffusers' with the LoRA fused."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from diffusers import DiffusionPipeline
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from latentrt import Engine
from latentrt.adapters.given import loras_of
from latentrt.bundle.bundle import EMBEDDED, Bundle
from latentrt.bundle.initializers import initializers
from latentrt.errors import AdapterError, AdapterWarning, BackendError, ExportError
from latentrt.golden import worst_error
from latentrt.runtime.onnxruntime import OrtBackend
from latentrt_export.checkpoint.single.choices import Choices
from latentrt_export.graphs.to_onnx import quiet
from latentrt_export.merge_bundle import merge_bundle
from latentrt_export.to_bundle import export_bundle
from latentrt_export.verify.checks import psnr
from latentrt_export.verify.verify import verify
from tests.support.gpu.host_gpu import host_gpu
from tests.support.models.loras import EVERYWHERE, modules_of, write_lora

Exported = Callable[[str], tuple[Path, Path]]
SETTINGS = {"steps": 4, "guidance": 5.0, "seed": 7, "height": 32, "width": 32}
LAYOUTS = {"sd": "kohya", "sd2": "diffusers", "sdxl": "ldm"}
BOUNDS = {"sd": 60, "sd2": 45, "sdxl": 60}  # SD 2's weights are float16: theirs are not rounded after merging


def drawn(bundle: Path, **loading: Any) -> NDArray[np.uint8]:
    with Engine.load(bundle, threads=1, cache=False, **loading) as engine:
        return np.asarray(engine("a cat", negative_prompt="a dog", **SETTINGS)[0])


def theirs(checkpoint: Path, lora: Path, strength: float) -> NDArray[np.uint8]:
    variant = {"variant": "fp16"} if checkpoint.name == "sd2" else {}
    absent = {} if checkpoint.name == "sdxl" else {"safety_checker": None, "feature_extractor": None}
    with quiet():
        pipe = DiffusionPipeline.from_pretrained(
            checkpoint, use_safetensors=True, torch_dtype=torch.float32, **absent, **variant
        )
        pipe.load_lora_weights(lora.parent, weight_name=lora.name)
        pipe.fuse_lora(lora_scale=strength)
        return picture_of(pipe)


def picture_of(pipe: DiffusionPipeline) -> NDArray[np.uint8]:
    pipe.set_progress_bar_config(disable=True)
    seeded = {"generator": torch.Generator().manual_seed(7), "height": 32, "width": 32}
    settings = {"num_inference_steps": 4, "guidance_scale": 5.0, **seeded}
    return np.asarray(pipe("a cat", negative_prompt="a dog", **settings).images[0])


@pytest.mark.parametrize("family", LAYOUTS)
def test_in_memory(exported: Exported, tmp_path: Path, family: str) -> None:
    checkpoint, bundle = exported(family)
    lora = write_lora(tmp_path / "lora.safetensors", checkpoint, LAYOUTS[family], EVERYWHERE)
    ours = drawn(bundle, lora=f"{lora}:0.6")
    assert psnr(ours, theirs(checkpoint, lora, 0.6)) > BOUNDS[family]
    assert psnr(ours, drawn(bundle)) < 40
    np.testing.assert_array_equal(drawn(bundle), drawn(bundle, lora={lora: 0.0}))
    half = drawn(bundle, lora={lora: 0.6}, precision="fp16")
    assert psnr(half, ours) > 35


@pytest.mark.parametrize("family", LAYOUTS)
def test_every_weight_that_a_lora_may_change_is_read_from_its_file(exported: Exported, family: str) -> None:
    checkpoint, root = exported(family)
    bundle = Bundle.open(root, check_hashes=False)
    unread = ("encoder.layers.1.", "final_layer_norm")  # SDXL reads the states before the last layer
    wanted = {
        (network, f"{module}.weight")
        for network, module in modules_of(checkpoint)
        if (family, network) != ("sdxl", "text_encoder") or not module.removeprefix("text_model.").startswith(unread)
    }
    for variant in ("fp32", "fp16", "fp16-ort-cuda"):
        paths = [root / graph.path for graph in bundle.spec.graphs(variant).values()]
        read = {(path.parent.name, each.name) for path in paths for each in initializers(path) if each.file}
        assert wanted <= read, variant
    cpu = {each.name for path in root.glob("unet/*.cpu.onnx") for each in initializers(path) if each.file is None}
    assert not any(name.startswith("model.") for name in cpu)


def test_initializers_are_those_that_onnx_reads(exported: Exported) -> None:
    path = exported("sd")[1] / "unet" / "model.fp16.onnx"
    graph = onnx.load(path, load_external_data=False).graph
    theirs = [
        (each.name, tuple(each.dims), each.data_type, {entry.key: entry.value for entry in each.external_data})
        for each in graph.initializer
    ]
    ours = initializers(path)
    assert [tuple(each[:3]) for each in ours] == [each[:3] for each in theirs]
    assert [each.file for each in ours] == [each[3].get("location") for each in theirs]
    assert [each.offset for each in ours] == [int(each[3].get("offset", 0)) for each in theirs]


def test_at_export(exported: Exported, tmp_path: Path) -> None:
    checkpoint, bundle = exported("sd")
    lora = write_lora(tmp_path / "lora.safetensors", checkpoint, "kohya", EVERYWHERE)
    choices = Choices(lora=[f"{lora}:0.6:0.9"])
    summary = export_bundle(checkpoint, tmp_path / "merged", choices=choices)
    assert "LoRA lora.safetensors:0.6:0.9 merged" in summary.notes
    assert str(tmp_path) not in (tmp_path / "merged" / "manifest.json").read_text()
    assert Bundle.open(tmp_path / "merged").spec.made["command"].endswith("--lora=lora.safetensors:0.6:0.9")
    ours = drawn(tmp_path / "merged")
    assert psnr(ours, drawn(bundle, lora=f"{lora}:0.6:0.9")) > 60
    with quiet():
        pipe = DiffusionPipeline.from_pretrained(tmp_path / "merged")  # diffusers opens the bundle, merged
        assert psnr(ours, picture_of(pipe)) > 60


def test_what_is_refused_in_memory(exported: Exported, tmp_path: Path) -> None:
    checkpoint, bundle = exported("sd")
    lora = write_lora(tmp_path / "lora.safetensors", checkpoint, "kohya")
    with pytest.raises(BackendError, match=r"LoRAs in memory with openvino.*latentrt export"):
        Engine.load(bundle, lora=lora, backend="openvino", threads=1)
    with pytest.raises(AdapterError, match="allow_unmatched without a LoRA"):
        Engine.load(bundle, allow_unmatched=True)
    wrong = write_lora(tmp_path / "wrong.safetensors", exported("sdxl")[0], "ldm")
    with pytest.raises(AdapterError, match=r"made for texts of 80 numbers"):
        Engine.load(bundle, lora=wrong)
    tensors = load_file(lora) | {"lora_unet_nothing.alpha": torch.ones(())}
    save_file(tensors, lora)
    with pytest.warns(AdapterWarning, match="1 keys have no place: lora_unet_nothing.alpha"):
        engine = Engine.load(bundle, lora=lora, allow_unmatched=True, threads=1)
    with engine:
        assert (engine.spec.id, engine.spec.golden) == ("sd+lora.safetensors:1", ())


def test_into_a_bundle_without_torch(exported: Exported, tmp_path: Path) -> None:
    checkpoint, bundle = exported("sd")
    lora = write_lora(tmp_path / "lora.safetensors", checkpoint, "kohya", EVERYWHERE)
    blocked = "import sys; sys.modules |= {'torch': None, 'diffusers': None}"
    command = f"{blocked}; from latentrt.command.main import main; main()"
    arguments = ["export", str(bundle), str(tmp_path / "merged"), "--lora", f"{lora}:0.6", "--json"]
    done = subprocess.run([sys.executable, "-c", command, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["notes"] == ["LoRA lora.safetensors:0.6 merged"]
    base, merged = Bundle.open(bundle), Bundle.open(tmp_path / "merged")
    own = {name for name, record in merged.files.items() if base.files.get(name) != record}
    assert {name for name in own if not name.endswith(".onnx")} == {
        "text_encoder/with_lora.safetensors",
        "unet/with_lora.safetensors",
    }
    assert not {name for name in own if name.startswith("vae/")}
    for precision in ("fp32", "fp16"):
        together = drawn(bundle, lora={lora: 0.6}, precision=precision)
        np.testing.assert_array_equal(drawn(merged.root, precision=precision), together)
    with Engine.load(merged.root, threads=1, cache=False) as engine:
        assert worst_error(engine) < 1e-6
    twice = drawn(merged.root, lora={lora: -0.6})  # the changed weights are what a second LoRA is merged into
    assert psnr(twice, drawn(bundle)) > 60


def test_verified(exported: Exported, tmp_path: Path) -> None:
    checkpoint, bundle = exported("sd")
    lora = write_lora(tmp_path / "lora.safetensors", checkpoint, "kohya", EVERYWHERE)
    merged = tmp_path / "merged"
    merge_bundle(bundle, merged, loras_of(f"{lora}:0.6:0.9"))
    with pytest.raises(ExportError, match=r"has LoRAs merged.*--against CHECKPOINT --lora FILE"):
        next(verify(merged, merged))
    for loras, passed in (([f"{lora}:0.6:0.9"], True), ([f"{lora}:0.6"], False)):
        checks = verify(merged, checkpoint, steps=1, choices=Choices(lora=loras))
        changed = itertools.takewhile(lambda check: not check.what.startswith("vae"), checks)
        assert all(check.passed for check in changed) is passed


def test_on_the_emulated_gpu(tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora.safetensors", EMBEDDED, "kohya")
    settings = {"steps": 3, "seed": 7}
    with Engine.load(lora={lora: 0.2}, threads=1, cache=False) as engine:
        (expected,) = engine("a red apple", **settings)
    with host_gpu() as gpu, Engine.load(lora={lora: 0.2}, backend=OrtBackend(threads=1, gpu=gpu)) as engine:
        (picture,) = engine("a red apple", **settings)
    assert psnr(np.asarray(picture), np.asarray(expected)) > 60
    with Engine.load(threads=1, cache=False) as engine:
        (plain,) = engine("a red apple", **settings)
    assert psnr(np.asarray(plain), np.asarray(expected)) < 40
