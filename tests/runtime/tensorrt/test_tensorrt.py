"""The TensorRT backend over a fake TensorRT and an emulated GPU: all but TensorRT's own kernels is real."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt import Engine
from latentrt.bundle.bundle import Bundle
from latentrt.errors import BundleError, NetworkError, PlanError, UntrustedFileError
from latentrt.runtime.base import DeviceNetwork
from latentrt.runtime.onnxruntime import OrtBackend
from latentrt.runtime.tensorrt.backend import SHAPES_KEPT, TensorRtBackend, TensorRtNetwork
from latentrt.runtime.tensorrt.plans import PlanStore
from latentrt.runtime.tensorrt.record import VERSION_COMPATIBLE, Profile, Range
from latentrt_export.plans.plan_shapes import profiles_of, shapes_of
from tests.support.gpu.fakes.fake_plans import put_plan
from tests.support.gpu.fakes.fake_tensorrt import FakeTensorRt
from tests.support.gpu.host_gpu import HostGpu
from tests.support.models import small_bundle, texts
from tests.support.models.small_bundle import BIG, SQUARE, WIDE, expected, feeds, load, rounded_once

bundle, gpu, fake = small_bundle.bundle, small_bundle.gpu, small_bundle.fake
network, arrays = small_bundle.network, small_bundle.arrays


# Calls


def test_a_call_is_what_the_graph_computes(network: TensorRtNetwork, bundle: Bundle) -> None:
    fed = feeds()
    out = network(fed)["out"]
    np.testing.assert_array_equal(out, OrtBackend(threads=1).load(bundle, "unet")(fed)["out"])
    np.testing.assert_array_equal(out, expected(fed))


def test_the_embedded_unet_runs_as_on_onnx_runtime(gpu: HostGpu, fake: FakeTensorRt, tmp_path: Path) -> None:
    bundle = Bundle.open(check_hashes=False)
    ranges: dict[str, Range] = {"batch": (2,) * 3, "height": (16,) * 3, "width": (16,) * 3, "tokens": (77,) * 3}
    put_plan(bundle, "unet", fake, gpu, ranges, folder=tmp_path)
    network = TensorRtBackend(gpu, fake.library, precision="fp32", plans=tmp_path).load(bundle, "unet")
    random = np.random.default_rng(0)
    fed = {
        "sample": random.standard_normal((2, *bundle.spec.latents.shape_of(128, 128)), np.float32),
        "timestep": np.array([999, 1], np.float32),
        **texts.told(bundle, 2, random),
    }
    wanted = OrtBackend(threads=1).load(bundle, "unet")(fed)["out"]
    np.testing.assert_allclose(network(fed)["out"], wanted, atol=1e-6)
    network.close()


def test_half_precision_uses_the_half_graph(bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu) -> None:
    put_plan(bundle, "unet", fake, gpu, WIDE, precision="fp16")
    with pytest.raises(PlanError, match=r"built for graph unet/model.fp16.onnx, precision fp16"):
        load(bundle, fake, gpu)
    network = load(bundle, fake, gpu, precision="fp16")
    for fed in rounded_once("float16"):
        out = network(fed)["out"]
        assert out.dtype == np.float16
        np.testing.assert_array_equal(out, expected(fed))
    network.close()


def test_a_network_that_the_bundle_lacks_is_named(bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu) -> None:
    with pytest.raises(BundleError, match=r"has the text_encoder in fp32\. Needed: it in fp16"):
        load(bundle, fake, gpu, "text_encoder", "fp16")


def test_repeated_calls_allocate_nothing(network: TensorRtNetwork, gpu: HostGpu) -> None:
    first = network(feeds())
    gpu.host.calls.clear()
    for seed in range(3):
        np.testing.assert_array_equal(network(feeds(seed=seed))["out"], expected(feeds(seed=seed)))
    assert "cuMemAlloc" not in gpu.host.calls
    np.testing.assert_array_equal(first["out"], expected(feeds()))


def test_memory_is_kept_for_the_last_shapes_alone(network: TensorRtNetwork, gpu: HostGpu, fake: FakeTensorRt) -> None:
    for side in (2, 3, 4, 5, 6, 7):
        network(feeds(side=side))
    assert len(network._calls) == SHAPES_KEPT
    made = len(fake.contexts)
    network(feeds(side=7))
    network(feeds(side=4))
    assert len(fake.contexts) == made
    network(feeds(side=2))
    assert len(fake.contexts) == made + 1


@pytest.mark.parametrize(
    "change",
    [
        lambda fed: fed.pop("timestep"),
        lambda fed: fed.update(more=fed["sample"]),
        lambda fed: fed.update(sample=fed["sample"].astype(np.float16)),
        lambda fed: fed.update(sample=fed["sample"][:, :3]),
        lambda fed: fed.update(timestep=fed["timestep"][:1]),
    ],
)
def test_feeds_that_do_not_fit_are_refused(network: TensorRtNetwork, change: Any) -> None:
    fed = feeds()
    change(fed)
    with pytest.raises(NetworkError, match=r"unet/model\.onnx was fed"):
        network(fed)


def test_it_is_a_device_network(network: TensorRtNetwork, gpu: HostGpu, bundle: Bundle) -> None:
    assert isinstance(network, DeviceNetwork)
    assert network.best_lanes == 2
    assert network.gpu is gpu
    assert network.graph == bundle.spec.graphs()["unet"]


@pytest.mark.parametrize(("precision", "levels"), [("fp32", 0), ("fp16", 1)])
def test_the_whole_engine_draws_with_plans(gpu: HostGpu, tmp_path: Path, precision: str, levels: int) -> None:
    """Text, UNet and VAE bound, warmed up, captured and launched; `levels` of 255 is how far pictures may differ."""
    embedded, fake = Bundle.open(check_hashes=False), FakeTensorRt()
    latent: dict[str, Range] = {"height": (16, 16, 16), "width": (16, 16, 16)}
    ranges: dict[str, dict[str, Range]] = {
        "unet": {"batch": (2, 2, 2), "tokens": (77, 77, 77), **latent},
        "vae_decoder": {"batch": (1, 1, 1), **latent},
    }
    for network, profile in ranges.items():
        put_plan(embedded, network, fake, gpu, profile, folder=tmp_path, precision=precision)
    for network in ("text_encoder", "unet_text"):
        own = [profile.ranges for profile in profiles_of(embedded.spec, network, shapes_of(embedded.spec, {}))]
        put_plan(embedded, network, fake, gpu, *own, folder=tmp_path, precision=precision)
    backend = TensorRtBackend(gpu, fake.library, precision=precision, plans=tmp_path)
    pictures = []
    for options in ({"backend": backend}, {"threads": 1}):
        with Engine.load(check_hashes=False, **options) as engine:
            assert engine.model.profiles(2) == ((Profile(latent),) if "backend" in options else None)
            launched = [engine("a red apple", steps=4, seed=seed)[0] for seed in (1, 2)]
            ticked = engine(["a red apple", "an owl"], steps=4, seed=1, on_tick=lambda job: None)  # a prompt at a time
            pictures.append([np.asarray(picture).astype(int) for picture in (*launched, *ticked)])
    assert np.abs(np.subtract(*pictures)).max() <= levels
    assert fake.deserialized == 4
    encoded = {context._shapes["input_ids"][0] for context in fake.contexts if "input_ids" in context._shapes}
    assert encoded == {1, 2}


# Trust


@pytest.mark.parametrize("victim", ["*.plan", "*.json"])
@pytest.mark.parametrize("mode", [0o664, 0o646])
def test_nothing_that_others_may_have_written_is_deserialized(
    bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu, victim: str, mode: int
) -> None:
    put_plan(bundle, "unet", fake, gpu, WIDE)
    (path,) = PlanStore(bundle).folder.glob(victim)
    path.chmod(mode)
    with pytest.raises(UntrustedFileError, match=rf"{path.name} has mode {mode:o}.*chmod go-w {path}"):
        load(bundle, fake, gpu)
    assert fake.deserialized == 0
    path.chmod(0o644)
    load(bundle, fake, gpu).close()


@pytest.mark.parametrize("victim", ["*.plan", "*.json"])
def test_nothing_damaged_is_deserialized(bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu, victim: str) -> None:
    put_plan(bundle, "unet", fake, gpu, WIDE)
    (path,) = PlanStore(bundle).folder.glob(victim)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(PlanError, match=r"latentrt build \S+, which builds it again"):
        load(bundle, fake, gpu)
    assert fake.deserialized == 0


def test_a_plan_in_the_bundle_is_not_used(bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu) -> None:
    put_plan(bundle, "unet", fake, gpu, WIDE)
    PlanStore(bundle).folder.rename(bundle.root / "plans")
    with pytest.raises(PlanError, match=rf"those in {bundle.root}/plans are not used, .*latentrt build {bundle.root}"):
        load(bundle, fake, gpu)
    with pytest.raises(PlanError, match=rf"lies in the bundle {bundle.root}.*another folder"):
        TensorRtBackend(gpu, fake.library, precision="fp32", plans=bundle.root / "plans").load(bundle, "unet")
    assert fake.deserialized == 0


def test_a_plan_that_is_damaged_after_its_record_was_read_is_noticed(
    bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu
) -> None:
    for ranges in (SQUARE, BIG):
        put_plan(bundle, "unet", fake, gpu, ranges)
    network = load(bundle, fake, gpu)
    for path in PlanStore(bundle).folder.glob("*.plan"):
        path.write_bytes(b"damaged")
    with pytest.raises(PlanError, match="7 bytes that are not the ones that were built"):
        network(feeds(2, 4))
    assert fake.deserialized == 0
    network.close()


# Flavours


def test_lean_runs_version_compatible_plans(bundle: Bundle, gpu: HostGpu) -> None:
    built, lean = FakeTensorRt(), FakeTensorRt("tensorrt-lean")
    put_plan(bundle, "unet", built, gpu, WIDE)
    with pytest.raises(PlanError, match=r"built for library tensorrt\. Needed: library tensorrt-lean"):
        load(bundle, lean, gpu)
    put_plan(bundle, "unet", built, gpu, WIDE, options=(VERSION_COMPATIBLE,))
    network = load(bundle, lean, gpu)
    np.testing.assert_array_equal(network(feeds())["out"], expected(feeds()))
    network.close()


def test_rtx_compiles_for_the_shapes_at_once(bundle: Bundle, gpu: HostGpu) -> None:
    fake = FakeTensorRt("tensorrt-rtx")
    put_plan(bundle, "unet", fake, gpu, WIDE)
    backend = TensorRtBackend(gpu, fake.library, precision="fp32")
    assert (backend.name, backend.device, backend.precision) == ("tensorrt-rtx", "cuda", "fp32")
    network = backend.load(bundle, "unet")
    np.testing.assert_array_equal(network(feeds())["out"], expected(feeds()))
    network.close()


@pytest.mark.parametrize("first", [(2, 4), (1, 2)])
def test_which_plan_serves_does_not_depend_on_earlier_calls(
    bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu, first: tuple[int, int]
) -> None:
    """Plans differ in their last bits; a picture may not."""
    put_plan(bundle, "unet", fake, gpu, WIDE)
    put_plan(bundle, "unet", fake, gpu, SQUARE)
    network = load(bundle, fake, gpu)
    network(feeds(*first))
    network(feeds(2, 4))
    used = [context for context in fake.contexts if context._shapes["sample"] == (2, 4, 4, 4)]
    assert [context._engine._plan["profiles"][0]["height"] for context in used] == [[4, 4, 4]]
    network.close()
