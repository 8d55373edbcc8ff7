"""The bundles of a lease, packs without weights, and how variants and kernels are opened and counted on a GPU."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import command, hardware
from benchmarks.gpu import run as benchmark
from benchmarks.gpu.child import Deadline
from benchmarks.gpu.lease import bundles
from benchmarks.gpu.lease import run as lease
from benchmarks.gpu.variants import PLAIN, VARIANTS
from latentrt.bundle.bundle import EMBEDDED, Bundle
from latentrt.errors import HashMismatchError
from tests.support.gpu.host_gpu import HostGpu


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Return a copy of the embedded model."""
    return shutil.copytree(EMBEDDED, tmp_path / "bundle")


def test_the_plain_graph_is_one_more_variant(bundle: Path) -> None:
    bundles.add_graphs(bundle)
    opened = Bundle.open(bundle)  # with all hashes
    graph = opened.spec.graph("unet", PLAIN)
    assert graph.path == "unet/model.cuda-plain.onnx"
    assert graph.inputs == opened.spec.graph("unet", "fp16").inputs
    before = (bundle / "manifest.json").stat().st_mtime_ns
    bundles.add_graphs(bundle)
    assert (bundle / "manifest.json").stat().st_mtime_ns == before


def weights_of_emoji(change: bytes = b"") -> Callable[[str, Path], Path]:
    def make(preset: str, folder: Path) -> Path:
        for path in EMBEDDED.rglob("*.safetensors"):
            target = folder / path.relative_to(EMBEDDED)
            target.parent.mkdir(parents=True, exist_ok=True)
            data = path.read_bytes()
            target.write_bytes(data[: len(data) - len(change)] + change)
        return folder

    return make


def test_a_pack_is_a_bundle_without_weights(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = bundles.pack([bundle], tmp_path / "pack")
    others = [path for path in bundle.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    assert sizes["bundle"] <= 1.01 * sum(path.stat().st_size for path in others)
    assert not [path for path in (tmp_path / "pack").rglob("*.safetensors") if ".extra." not in path.name]
    make = "latentrt_export.checkpoint.presets.make.make_checkpoint"
    monkeypatch.setattr(make, weights_of_emoji())
    bundles.Unpacker().unpack("sd15-small", tmp_path / "pack" / "bundle", tmp_path / "made")
    assert Bundle.open(tmp_path / "made").spec == Bundle.open(bundle).spec
    monkeypatch.setattr(make, weights_of_emoji(b"\1\1"))
    with pytest.raises(HashMismatchError):
        bundles.Unpacker().unpack("sd15-small", tmp_path / "pack" / "bundle", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_lease_uses_a_pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Child:
        def __init__(self, worker: str) -> None:
            assert worker == "benchmarks.gpu.lease.bundles:Unpacker"

        def ask(self, limit: float, *what: Any) -> None:
            asked.append(what)

        def close(self) -> None: ...

    monkeypatch.setattr(benchmark, "Child", Child)
    monkeypatch.setattr(benchmark, "FOLDER", tmp_path / "cache")
    packed = tmp_path / "pack" / "sd15"
    packed.mkdir(parents=True)
    lease._unpack("sd15", packed, Deadline(None))
    assert asked == [("unpack", "sd15", packed, tmp_path / "cache" / "sd15")]


def test_a_pack_is_made_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def export(preset: str, limit: float) -> None:
        made.append(preset)
        shutil.copytree(EMBEDDED, tmp_path / "cache" / preset)

    monkeypatch.setattr(benchmark, "FOLDER", tmp_path / "cache")
    monkeypatch.setattr(command, "export", export)
    assert command.main(["--pack", str(tmp_path / "pack")]) == 0
    assert made == ["sd15", "sd21", "sdxl"]
    assert sorted(path.name for path in (tmp_path / "pack").iterdir()) == made


# --- what opens on a GPU ----------------------------------------------------------------------------------------------


def test_a_variant_is_a_graph_and_options(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = HostGpu()
    monkeypatch.setattr(hardware, "Gpu", lambda device: gpu)
    for module in ("benchmarks.gpu.hardware", "latentrt.runtime.onnxruntime"):
        monkeypatch.setattr(f"{module}.check_device", lambda device: None)
    chosen = VARIANTS["exhaustive"]
    opened: Any = hardware.open_backend("onnxruntime", graph=chosen.graph, options=chosen.options)
    assert opened.variants == (PLAIN,)
    settings = opened._settings()
    assert settings["cudnn_conv_algo_search"] == "EXHAUSTIVE"
    assert settings["use_tf32"] == "0"  # as without options
    assert settings["user_compute_stream"] == str(gpu.stream)
    gpu.close()


def test_kernels_are_counted_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    ran = [("gemm", cuda, 1500.0), ("gemm", cuda, 500.0), ("norm", cuda, 250.0), ("cudaLaunchKernel", cpu, 9.0)]

    class Profile:
        def __init__(self, activities: list[Any]) -> None:
            assert activities == [torch.profiler.ProfilerActivity.CUDA]

        def __enter__(self) -> Profile:
            return self

        def __exit__(self, *_: object) -> None: ...

        def events(self) -> list[Any]:
            return [
                SimpleNamespace(name=name, device_type=kind, time_range=SimpleNamespace(elapsed_us=lambda us=us: us))
                for name, kind, us in ran
            ]

    with pytest.raises(RuntimeError, match="no CUDA device"):
        hardware.kernel_times(lambda: None)
    monkeypatch.setattr("torch.profiler.profile", Profile)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("init", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    worked: list[int] = []
    assert hardware.kernel_times(lambda: worked.append(1)) == {"gemm": (2, 2.0), "norm": (1, 0.25)}
    assert worked == [1]
