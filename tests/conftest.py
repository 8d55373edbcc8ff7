"""Checkpoints made on the spot and their bundles, shared by the tests of the export side.

Tests import torch only where they need it: the tests of tests/gpu run without it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from latentrt.bundle.bundle import EMBEDDED
from latentrt.bundle.spec import FP32, TEXT_ENCODER, NetworkSpec, Variant
from tests.support import traces
from tests.support.traces import locked

# Workers share the cores; torch's threads would wait for each other by spinning. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # of the onnxruntime that a test module imports by itself
TRAINED = {"emoji": EMBEDDED, "trained-pixels": EMBEDDED.with_name("pixels")}  # in the package; others are random


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the user's own cache out of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _traces(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Trace networks of the same structure once, in test modules that import the exporter."""
    traces.keep(_shared(tmp_path_factory, "traces"))


def _shared(tmp_path_factory: pytest.TempPathFactory, name: str) -> Path:
    """Return a folder that all workers share."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / name
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Return a function that makes, once each for all workers, a checkpoint and its bundle: (checkpoint, bundle)."""
    root = _shared(tmp_path_factory, "exported")

    def make(name: str) -> tuple[Path, Path]:
        if name in TRAINED:
            return TRAINED[name], TRAINED[name]
        from latentrt_export.graphs.to_onnx import quiet
        from latentrt_export.to_bundle import export_bundle

        traces.keep(_shared(tmp_path_factory, "traces"))
        source, target = root / name, root / f"{name}-bundle"
        source = source / "ip_adapter.safetensors" if name.startswith("ip-") else source
        with locked(root / f"{name}.lock"):
            if not target.exists():
                with quiet():
                    make_checkpoint(name, source)
                export_bundle(source, target)
        return source, target

    return make


def make_checkpoint(name: str, folder: Path) -> None:
    """Write a checkpoint of a kind: "sd", "sd2", "sdxl", "pixels", ...; with "-inpainting", such a one."""
    from tests.support.models import adapters, checkpoints, controlnets, ip_adapters, kinds, pixels

    if name.startswith("control-"):  # of a checkpoint that is there already: control-sd-1
        _, base, number = name.split("-")
        controlnets.tiny_controlnet(folder, folder.with_name(base), int(number))
        return
    if name.startswith("ip-"):  # of a checkpoint that is there already: ip-sd-plus
        _, base, kind = name.split("-")
        ip_adapters.tiny_ip_adapter(folder, folder.parent.with_name(base), kind)
        return
    if name.startswith("adapter-"):
        adapters.tiny_adapter(folder, name.removeprefix("adapter-"))
        return
    kind, inpaints = name.removesuffix("-inpainting"), name.endswith("-inpainting")
    unet = {"in_channels": 9} if inpaints else {}
    pipeline = "StableDiffusionXLInpaintPipeline" if kind == "sdxl" else "StableDiffusionInpaintPipeline"
    index = {"_class_name": pipeline} if inpaints else {}
    if kind == "pixels":
        pixels.tiny_pixels(folder, flat=True)
        checkpoints.rename_attentions(folder / "diffusion_pytorch_model.safetensors")
    elif kind == "classes":
        pixels.tiny_pixels(folder, unet={"num_class_embeds": 5}, scheduler={"beta_schedule": "squaredcos_cap_v2"})
    elif kind == "sd2":
        checkpoints.tiny_sd2(folder, unet=unet, index=index, variant="fp16", max_shard_size="200KB")
    elif kind == "wide":  # channels and features as in SD 1.5's first block, for kernels that take few sizes
        checkpoints.tiny_sd(folder, unet={"block_out_channels": (320, 320), "norm_num_groups": 32})
    elif kind == "levels":  # blocks in the order of SD 1.5's, for T2I-Adapters
        blocks = {"down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")}
        blocks["up_block_types"] = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
        checkpoints.tiny_sd(folder, unet={**blocks, "block_out_channels": (16, 32, 32), "layers_per_block": 2})
    elif kind in ("refiner", "depth", "x4", "x2"):
        getattr(checkpoints, f"tiny_{kind}")(folder)
    elif kind == "tiny-vae":
        checkpoints.with_tiny_vae(checkpoints.tiny_sd(folder))
    elif kind == "taesd":
        checkpoints.tiny_vae(folder)
    elif kind == "sdxl":
        checkpoints.tiny_sdxl(folder, unet=unet, index=index)
    elif name in kinds.MAKERS:
        kinds.MAKERS[name](folder)
    else:
        checkpoints.tiny_sd(folder, unet=unet, index=index)
        checkpoints.rename_as_of_old(folder)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    from latentrt_export.graphs.to_onnx import quiet
    from tests.support.models import checkpoints

    with quiet():
        return checkpoints.tiny_sd(tmp_path / "checkpoint")


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Write a stand-in for each graph instead of tracing it."""
    from latentrt_export import to_bundle
    from latentrt_export.checkpoint.source import tokenizer_of
    from latentrt_export.to_bundle import NetworkSummary

    def stand_in(checkpoint: Any, root: Path, name: str) -> tuple[dict[str, NetworkSpec], NetworkSummary]:
        path, role = to_bundle.GRAPHS[name], to_bundle.ROLES.get(name, TEXT_ENCODER)
        (root / path).write_bytes(b"graph")
        variants = {FP32: Variant(path, 23, 1)}
        spec = NetworkSpec(role, (), (), variants, tokenizer_of(name) or None)
        return {name: spec}, NetworkSummary(0.0, 1, 5, 0, 0)

    monkeypatch.setattr(to_bundle, "_export_network", stand_in)
    for name in ("add_half", "add_cpu", "add_control", "add_image_prompts"):
        monkeypatch.setattr(to_bundle, name, lambda root, spec: spec)
    return monkeypatch
