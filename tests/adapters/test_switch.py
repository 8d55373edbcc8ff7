"""LoRAs changed on a running engine: what networks then read, by hash, and what they draw, by the bit."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import CLIPTextModel

from latentrt import Engine
from latentrt.adapters.given import loras_of
from latentrt.adapters.memory import with_loras
from latentrt.bundle.bundle import EMBEDDED, Bundle
from latentrt.bundle.initializers import initializers
from latentrt.bundle.spec import FP32, FP32_ORT_CPU
from latentrt.errors import AdapterError, BackendError, PlanError, RequestError
from latentrt.golden import worst_error
from latentrt.images.metadata import read_settings
from latentrt.runtime.base import Network
from latentrt.runtime.fake import FakeBackend
from latentrt.runtime.onnxruntime import OrtBackend
from latentrt.runtime.replaced import replaced_in
from latentrt.serve.core.service import Service
from latentrt_export.graphs.to_onnx import quiet
from latentrt_export.verify.checks import psnr
from tests.support.gpu.emulated import build_plans, open_backend
from tests.support.gpu.host_gpu import host_gpu

SETTINGS = {"steps": 2, "seed": 7, "height": 32, "width": 32}
HIRES = {"hires_scale": 1.5}
KINDS = {"text": ["q_proj", "fc1"], "hoisted": ["attn2.to_k", "attn2.to_v"], "unet": ["to_q", "conv1", "proj_in"]}
READ_BY = {"text": ["text_encoder"], "hoisted": ["unet_text"], "unet": ["unet", "unet_shallow"]}


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return LoRAs for the embedded model that peft made, by what they change."""
    folder = tmp_path_factory.mktemp("loras")
    return {kind: _by_peft(folder, kind, modules) for kind, modules in KINDS.items()}


def _by_peft(folder: Path, kind: str, modules: list[str]) -> Path:
    torch.manual_seed(len(kind))
    config = LoraConfig(r=3, lora_alpha=2, init_lora_weights=False, target_modules=modules)
    network: Any = CLIPTextModel if kind == "text" else UNet2DConditionModel
    with quiet():
        model = network.from_pretrained(
            EMBEDDED / ("text_encoder" if kind == "text" else "unet"), torch_dtype=torch.float32
        )
        model.add_adapter(config)
    for weight in (weights := get_peft_model_state_dict(model)).values():
        weight.mul_(0.5)
    layers = {"text_encoder_lora_layers" if kind == "text" else "unet_lora_layers": weights}
    StableDiffusionPipeline.save_lora_weights(folder, weight_name=f"{kind}.safetensors", **layers)
    return folder / f"{kind}.safetensors"


class Recording(OrtBackend):
    """Keeps what each network that it loaded last reads: a hash of every weight. It fails at the network `fails`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(threads=1, **options)
        self.read: dict[str, dict[str, str]] = {}
        self.fails = ""

    def load(self, bundle: Bundle, network: str) -> Any:
        if network == self.fails:
            raise BackendError(f"no memory for {network}", needed="more")
        self.read[network] = hashes(bundle, network)
        return super().load(bundle, network)


def hashes(bundle: Bundle, network: str) -> dict[str, str]:
    """Return a hash of every weight that a network reads."""
    graph = bundle.spec.graph(network, FP32_ORT_CPU, FP32)
    memory = {name: weight.array.tobytes() for name, weight in replaced_in(bundle, graph).items()}
    return {
        each.name: hashlib.sha256(memory.get(each.name) or _stored(bundle, graph.path, each)).hexdigest()
        for each in initializers(bundle.path(graph.path))
        if each.file is not None
    }


def _stored(bundle: Bundle, graph: str, each: Any) -> bytes:
    path = bundle.path(graph).parent / each.file
    sizes = {1: 4, 10: 2, 16: 2, 7: 8}
    with path.open("rb") as file:
        file.seek(each.offset)
        return file.read(int(np.prod(each.shape, dtype=np.int64)) * sizes[each.dtype])


def drawn(engine: Engine, **settings: Any) -> NDArray[np.uint8]:
    return np.asarray(engine("a red apple", **{**SETTINGS, **settings})[0])


@pytest.mark.parametrize("switches", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_random_switches_and_back(loras: dict[str, Path], switches: int) -> None:
    draw, backend, bundle = random.Random(11), Recording(), Bundle.open(check_hashes=False)
    with Engine.load(backend=backend) as engine:
        plain, read = drawn(engine), dict(backend.read)
        for _ in range(switches):
            chosen = draw.sample(sorted(loras), draw.randint(0, 3))
            asked = {loras[kind]: (draw.uniform(-1, 1), draw.uniform(0.1, 1)) for kind in chosen}
            engine.set_lora(asked)
            merged = with_loras(bundle, loras_of(asked))
            assert backend.read == {name: hashes(merged, name) for name in read}
            assert (engine.spec, engine.lora) == (merged.spec, merged.merged)
        engine.set_lora(None)
        assert backend.read == read
        assert (engine.spec, engine.bundle.replaced, engine.lora) == (bundle.spec, {}, ())
        np.testing.assert_array_equal(drawn(engine), plain)
        assert worst_error(engine) == 0


def test_only_networks_whose_weights_change_are_loaded_again(loras: dict[str, Path]) -> None:
    with Engine.load(threads=1) as engine:
        drawn(engine, cache_interval=2)  # the shallow network too

        def sessions() -> dict[str, Network]:
            return {name: one.open() for name, one in engine.model.networks.items() if one.loaded}

        plain = drawn(engine)
        for kind, path in loras.items():
            before = sessions()
            engine.set_lora([f"{path}:0.7"])
            assert [name for name, one in sessions().items() if one is not before[name]] == READ_BY[kind]
            assert psnr(drawn(engine), plain) < 50
            before = sessions()
            engine.set_lora([f"{path}:0.7"])  # the same again
            assert sessions() == before
            engine.set_lora()
        np.testing.assert_array_equal(drawn(engine), plain)


def test_the_cache_of_graphs_has_no_merged_ones(
    loras: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def entries() -> set[Path]:
        return {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}

    with Engine.load(threads=1) as engine:
        plain, before = drawn(engine), entries()
        assert any(path.suffix == ".onnx" for path in before)
        for path in loras.values():
            engine.set_lora(path)
            drawn(engine)
        engine.set_lora()
        np.testing.assert_array_equal(drawn(engine), plain)
    assert entries() == before
    with Engine.load(threads=1) as engine:
        np.testing.assert_array_equal(drawn(engine), plain)


def test_networks_that_are_dropped_after_use(loras: dict[str, Path]) -> None:
    with Engine.load(threads=1, resident=False) as engine:
        plain = drawn(engine)
        engine.set_lora(loras.values())
        merged = drawn(engine)
        engine.set_lora()
        np.testing.assert_array_equal(drawn(engine), plain)
    with Engine.load(threads=1, lora=loras.values()) as engine:
        np.testing.assert_array_equal(drawn(engine), merged)


def test_what_fails_changes_nothing(loras: dict[str, Path], tmp_path: Path) -> None:
    backend = Recording()
    with Engine.load(backend=backend, lora=loras["text"]) as engine:
        merged = drawn(engine)
        sessions = {name: one.open() for name, one in engine.model.networks.items()}

        def check() -> None:
            assert {name: one.open() for name, one in engine.model.networks.items()} == sessions
            assert engine.spec.id == "emoji+text.safetensors:1"
            np.testing.assert_array_equal(drawn(engine), merged)

        backend.fails = "unet_shallow"  # after the others
        with pytest.raises(BackendError, match="no memory for unet_shallow"):
            engine.set_lora(loras.values())
        check()
        save_file({"lora_unet_nothing.alpha": torch.ones(())}, tmp_path / "other.safetensors")
        for refused, words in ((tmp_path / "other.safetensors", "without a place"), (tmp_path / "gone", "gone")):
            with pytest.raises(AdapterError, match=words):
                engine.set_lora([loras["unet"], refused])
        check()


def test_pictures_in_progress_are_not_mixed(loras: dict[str, Path]) -> None:
    with Engine.load(threads=1) as engine:
        (before,) = engine.requests(["a red apple"], SETTINGS)
        (admitted,) = engine.requests(["a red apple"], SETTINGS)
        engine.denoiser.admit(admitted)
        with pytest.raises(RequestError, match=r"1 pictures are being drawn"):
            engine.set_lora(loras.values())
        engine.denoiser.retire(admitted)
        engine.set_lora(loras.values())
        with pytest.raises(RequestError, match=r"a job was made before the LoRAs were changed.*engine\.requests"):
            engine.run([before])
        with Service(engine), pytest.raises(RequestError, match=r"a server has the engine.*latentrt serve --lora FILE"):
            engine.set_lora()
        engine.set_lora()
    with Engine(Bundle.open(check_hashes=False), FakeBackend()) as engine:
        with pytest.raises(BackendError, match=r"LoRAs in memory with fake.*latentrt export"):
            engine.set_lora(loras.values())
        engine.set_lora(None)


def test_pictures_say_what_was_merged(loras: dict[str, Path], tmp_path: Path) -> None:
    with Engine.load(threads=1, resident=False) as engine:
        engine.set_lora({loras["text"]: 0.5, loras["unet"]: (0.25, 1.0)})
        (picture,) = engine("a red apple", **SETTINGS)
    picture.save(tmp_path / "merged.png")
    settings = read_settings(tmp_path / "merged.png")
    assert settings["merged_loras"] == ["text.safetensors:0.5", "unet.safetensors:0.25:1"]
    assert settings["model"] == "emoji+text.safetensors:0.5+unet.safetensors:0.25:1"


def test_on_the_emulated_gpu(loras: dict[str, Path]) -> None:
    with host_gpu() as gpu, Engine.load(backend=OrtBackend(threads=1, gpu=gpu)) as engine:
        plain, steps = drawn(engine), drawn(engine, **HIRES)
        expected = {}
        for kind, settings in (("hoisted", HIRES), ("text", {})):  # row by row, at once
            engine.set_lora(loras[kind])
            expected[kind] = drawn(engine, **settings)
        engine.set_lora()
        np.testing.assert_array_equal(drawn(engine), plain)
        np.testing.assert_array_equal(drawn(engine, **HIRES), steps)
    for kind, picture in expected.items():
        with Engine.load(threads=1, lora=loras[kind], resident=False) as engine:
            assert psnr(picture, drawn(engine, **(HIRES if kind == "hoisted" else {}))) > 60


def test_on_plans(loras: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans that take other weights are found where others are preferred, and these come back."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    backend: Any = open_backend("tensorrt")
    names = list(Bundle.open(check_hashes=False).spec.networks)

    def build(networks: list[str], *options: str) -> None:
        build_plans(EMBEDDED, networks, "tensorrt", 2, (32, 32), 60.0, options)

    build(names)
    with Engine.load(backend=backend, lanes=2) as engine:
        plain = drawn(engine)
        with pytest.raises(PlanError, match=r"takes no weights but its own.*latentrt build .* --refittable"):
            engine.set_lora(loras["text"])
        np.testing.assert_array_equal(drawn(engine), plain)
        build(["text_encoder", "unet_text"], "refittable")
        engine.set_lora([loras["text"], loras["hoisted"]])
        merged = drawn(engine)
        engine.set_lora()
        np.testing.assert_array_equal(drawn(engine), plain)
    assert backend.gpu.in_use == 0
    with Engine.load(threads=1, lora=[loras["text"], loras["hoisted"]], precision="fp16", resident=False) as engine:
        assert psnr(merged, drawn(engine)) > 45
