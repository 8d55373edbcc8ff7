"""Whole builds, and their faults, by a stand-in for TensorRT that writes its inputs down."""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from latentrt.bundle.bundle import Bundle, write_manifest
from latentrt.errors import BackendError, BundleError, DeviceMemoryError, PlanError, UntrustedFileError
from latentrt.runtime.tensorrt.library import Library, open_library
from latentrt.runtime.tensorrt.plans import PlanStore
from latentrt.runtime.tensorrt.record import LEVEL, REFITTABLE, STRIPPED, VERSION_COMPATIBLE
from latentrt_export.plans import build_process, timing_cache, to_tensorrt
from latentrt_export.plans.plan_builder import Order
from latentrt_export.plans.plan_shapes import shapes_of
from latentrt_export.plans.to_tensorrt import build_plans, estimates_of, orders_of
from tests.support.gpu.fakes import fake_builder

EMOJI = Bundle.open(check_hashes=False)
FIXED = shapes_of(EMOJI.spec, {})
GPU: Any = SimpleNamespace(
    name="NVIDIA Fake", driver="13.0", compute_capability=(9, 0), ordinal=0, memory=lambda: (2**40, 2**41)
)


@pytest.fixture(autouse=True)
def _private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


FAKE = Library("tensorrt", fake_builder, fake_builder.__version__, (11, 4, 0, 106))
Fake = Callable[..., Library]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    """Put the stand-in in TensorRT's place, here and in the processes that build."""
    folder = tmp_path / "site"
    folder.mkdir()
    shutil.copy(fake_builder.__file__, folder / "tensorrt.py")
    monkeypatch.syspath_prepend(folder)

    def make(version: str = "11.4.0.106", fault: str = "") -> Library:
        monkeypatch.setenv("FAKE_TENSORRT_VERSION", version)
        monkeypatch.setenv("FAKE_TENSORRT_FAULT", fault)
        sys.modules.pop("tensorrt", None)
        return open_library("tensorrt")

    yield make
    sys.modules.pop("tensorrt", None)


def copy_of_emoji(tmp_path: Path) -> Bundle:
    root = shutil.copytree(EMOJI.root, tmp_path / "bundle", ignore=shutil.ignore_patterns("plans"))
    return Bundle.open(root, check_hashes=False)


def plain_orders(library: Library = FAKE, plans: Path | None = None, **how: Any) -> list[Order]:
    """Return orders in float32 for a GPU that the children need not open."""
    orders = orders_of(EMOJI, library, GPU, FIXED, **{"precision": "fp32", **how}, plans=plans)
    return [replace(order, device="") for order in orders]


def built_plans(library: Library, plans: Path, **how: Any) -> list[dict[str, Any]]:
    """Build, and return the builder's inputs."""
    orders = plain_orders(library, plans, **how)
    built = build_plans(orders, estimates_of(library, orders))
    return [json.loads(PlanStore(EMOJI, plans).read(each.record)) for each in built]


def test_the_stand_in_has_the_names_of_the_real_thing() -> None:
    real = pytest.importorskip("tensorrt_rtx")
    own = {"layers", "weights", "marked", "inputs", "opset", "told", "data", "shapes", "OTHER"}
    for name, mine in vars(fake_builder).items():
        if isinstance(mine, type) and mine.__module__ == fake_builder.__name__:
            public = {member for member in vars(mine) if not member.startswith("_")} - own
            assert {member for member in public if not hasattr(getattr(real, name), member)} == set(), name


def test_a_build_puts_every_plan_in_its_place(fake: Fake, tmp_path: Path) -> None:
    library, told = fake(), list[tuple[str, float]]()
    orders = plain_orders(library, tmp_path / "plans", workspace=2**30)
    assert {order.key.gpu for order in orders} == {"NVIDIA Fake"}
    assert {order.key.driver for order in orders} == {"13.0"}
    estimates = estimates_of(library, orders)
    built = build_plans(orders, estimates, progress=lambda n, phase, share, left: told.append((n, share)))
    store = PlanStore(EMOJI, tmp_path / "plans")
    assert [each.record.key.network for each in built] == list(EMOJI.spec.graphs())
    assert {name for name, _ in told} == set(EMOJI.spec.graphs())
    for order, each in zip(orders, built, strict=True):
        assert store.fitting(replace(order.key, profiles=())) == [each.record]
        assert each.record.key == order.key
        assert each.seconds > 0
        assert each.record.made["activations"] == 4096
        assert each.record.made["host"] > 2**20
        assert each.record.made["estimate"]["network"] == order.key.network
    unet = json.loads(store.read(next(each.record for each in built if each.record.key.network == "unet")))
    assert unet["flags"] == []  # TF32 is off
    assert unet["limits"] == {"WORKSPACE": 2**30, "TACTIC_DRAM": 2**30}
    assert unet["inputs"]["sample"] == [2, *EMOJI.spec.latents.shape_of(128, 128)]
    assert unet["profiles"][0]["timestep"] == [[2], [2], [2]]
    assert unet["opset"] == 23
    assert unet["decomposable"]
    assert all(unet["decomposable"])
    again = build_plans(orders, estimates)
    assert [each.seconds for each in again] == [0.0] * len(orders)
    assert estimates_of(library, orders)[0].seconds == built[0].record.made["seconds"]


def test_older_versions_get_older_graphs(fake: Fake, tmp_path: Path) -> None:
    (half,) = built_plans(fake("10.3.0.26"), tmp_path / "plans", networks=["unet"], precision="fp16")
    assert half["opset"] == 18
    assert half["decomposable"] == []  # no Attention
    assert half["flags"] == []


def test_stripped_plans_know_where_their_weights_lie(fake: Fake, tmp_path: Path) -> None:
    library = fake()
    (told,) = built_plans(library, tmp_path / "plans", networks=["vae_decoder"], options=[STRIPPED])
    assert told["flags"] == ["STRIP_PLAN", "REFIT_INDIVIDUAL"]
    (record,), _ = PlanStore(EMOJI, tmp_path / "plans").survey("vae_decoder")
    assert set(told["marked"]) == set(record.refit)
    assert {weight.dtype for weight in record.refit.values()} == {"float32"}
    (told,) = built_plans(library, tmp_path / "plans", networks=["vae_decoder"], options=[REFITTABLE])
    assert told["flags"] == ["REFIT_INDIVIDUAL"]
    (told,) = built_plans(library, tmp_path / "plans", networks=["vae_decoder"], options=[VERSION_COMPATIBLE])
    assert told["flags"] == ["VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME"]
    assert len(PlanStore(EMOJI, tmp_path / "plans").survey("vae_decoder")[0]) == 3


def test_plans_of_every_level_lie_side_by_side(fake: Fake, tmp_path: Path) -> None:
    library, plans = fake(), tmp_path / "plans"
    for level in (None, 1, 5):
        options = [] if level is None else [f"{LEVEL}{level}"]
        (told,) = built_plans(library, plans, networks=["vae_decoder"], options=options)
        assert told.get("level") == level
    (order,) = plain_orders(library, plans, networks=["vae_decoder"])
    found = PlanStore(EMOJI, plans).fitting(replace(order.key, profiles=()))
    assert [record.key.level for record in found] == [5, 3, 1]


@pytest.mark.parametrize(
    ("version", "options", "words"),
    [
        ("11.3.0.1", [STRIPPED], r"not 11\.3"),
        ("11.4.0.1", [STRIPPED, VERSION_COMPATIBLE], "lean runtime cannot refit"),
    ],
)
def test_what_a_version_cannot_build_is_refused(fake: Fake, version: str, options: list[str], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        plain_orders(fake(version), options=options)


def test_too_little_memory_is_said_before_the_build(fake: Fake, tmp_path: Path) -> None:
    library = fake()
    orders = plain_orders(library, tmp_path / "plans", networks=["text_encoder"])
    estimates = estimates_of(library, orders)
    with pytest.raises(DeviceMemoryError, match=r"GPU has 0\.0 GiB free.*build the text_encoder.*--ignore-estimate"):
        build_plans(orders, estimates, free=2**20)
    assert not list((tmp_path / "plans").iterdir())
    assert len(build_plans(orders, estimates, free=2**20, ignore_estimate=True)) == 1


def test_an_interrupt_leaves_what_was_built(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_process, "GRACE", 0.5)
    library, plans = fake(), tmp_path / "plans"
    built_plans(library, plans, networks=["text_encoder"])
    before = {path: path.read_bytes() for path in plans.iterdir()}
    library = fake(fault="hang")  # it never asks whether to stop
    orders = plain_orders(library, plans)

    def interrupt(network: str, phase: str, share: float, left: float | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_plans(orders, estimates_of(library, orders), progress=interrupt)
    assert {path: path.read_bytes() for path in plans.iterdir()} == before
    assert not list(Path(os.environ.get("TMPDIR", "/tmp")).glob("latentrt-*/weights.bin"))
    library = fake()
    built = build_plans(orders, estimates_of(library, orders))
    assert [each.seconds == 0 for each in built] == [True, *[False] * (len(orders) - 1)]


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        ("crash", PlanError, "the vae_decoder crashed .SIGSEGV; a library's own words"),
        ("memory", DeviceMemoryError, "cannot build the vae_decoder .*OutOfMemory"),
        ("refuse", PlanError, "cannot read decoder.onnx .no importer for"),
        ("no-gpu", BackendError, "cannot start .*nullptr"),
    ],
)
def test_what_goes_wrong_in_the_builder_is_told(
    fake: Fake, tmp_path: Path, fault: str, kind: type[Exception], words: str
) -> None:
    library = fake(fault=fault)
    with pytest.raises(kind, match=words):
        built_plans(library, tmp_path / "plans", networks=["vae_decoder"])
    assert not list((tmp_path / "plans").iterdir())


def test_two_builds_in_one_folder(fake: Fake, tmp_path: Path) -> None:
    library = fake()
    with to_tensorrt._alone(tmp_path / "plans"), pytest.raises(PlanError, match="another build is working"):
        built_plans(library, tmp_path / "plans", networks=["vae_decoder"])


@pytest.mark.parametrize("harm", ["plan", "record", "mode"])
def test_a_plan_that_would_not_be_loaded_is_built_again(fake: Fake, tmp_path: Path, harm: str) -> None:
    library, plans = fake(), tmp_path / "plans"
    built_plans(library, plans, networks=["vae_decoder"])
    (path,) = plans.glob("*.json" if harm == "record" else "*.plan")
    if harm == "mode":
        path.chmod(0o666)
    else:
        path.write_bytes(path.read_bytes()[:-1])
    assert built_plans(library, plans, networks=["vae_decoder"])
    assert sorted(path.suffix for path in plans.iterdir()) == [".json", ".plan"]


def test_nothing_is_built_for_a_folder_that_others_can_write_to(fake: Fake, tmp_path: Path) -> None:
    (tmp_path / "plans").mkdir()
    (tmp_path / "plans").chmod(0o777)
    orders = plain_orders(fake(), tmp_path / "plans", networks=["text_encoder"])
    with pytest.raises(UntrustedFileError, match=r"has mode 777.*chmod go-w"):
        build_plans(orders, [])
    assert not list((tmp_path / "plans").iterdir())


def test_plans_lie_in_the_users_cache(fake: Fake, tmp_path: Path) -> None:
    library = fake()
    orders = plain_orders(library, networks=["text_encoder"])
    (built,) = build_plans(orders, estimates_of(library, orders))
    assert built.path.parent == PlanStore(EMOJI).folder
    assert built.path.is_relative_to(tmp_path / "cache" / "latentrt" / "plans")


def test_a_build_sweeps_what_a_killed_one_left(fake: Fake, tmp_path: Path) -> None:
    (tmp_path / "plans").mkdir()
    left = tmp_path / "plans" / ".unet-0-0.plan.0123456789abcdef.part"
    left.write_bytes(b"half")
    built_plans(fake(), tmp_path / "plans", networks=["text_encoder"])
    assert not left.exists()


# --- the timing cache -------------------------------------------------------------------------------------------------


def test_measurements_are_kept_for_the_next_build(fake: Fake, tmp_path: Path) -> None:
    library = fake()
    first, second = built_plans(library, tmp_path / "plans", networks=["text_encoder", "vae_decoder"])
    assert (first["cache"], second["cache"]) == ("", "fake1+")
    (path,) = (tmp_path / "cache" / "latentrt" / "timing").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_bytes() == b"fake2++"
    path.write_bytes(b"another device's")
    (third,) = built_plans(library, tmp_path / "other", networks=["vae_decoder"])
    assert third["cache"] == ""
    path.chmod(0o666)  # any user could have written it
    (fourth,) = built_plans(library, tmp_path / "third", networks=["vae_decoder"])
    assert fourth["cache"] == ""


def test_each_device_and_version_has_its_own_cache() -> None:
    key = plain_orders()[0].key
    others = [replace(key, **{name: "other"}) for name in ("library", "version", "gpu", "compute_capability", "driver")]
    assert len({timing_cache.path_of(each) for each in [key, *others]}) == 6
    assert timing_cache.load(Library("tensorrt-rtx", None, "1.7", (1, 7)), None, key) is None


# --- orders -----------------------------------------------------------------------------------------------------------


def test_time_left_goes_by_the_last_build_while_that_lasts() -> None:
    assert build_process._left(10, 0.5, None) == pytest.approx(10)
    assert build_process._left(10, 0.9, 30) == pytest.approx(20)
    assert build_process._left(40, 0.5, 30) == pytest.approx(40)
    assert build_process._left(1, 0.0, None) is None


def test_without_a_gpu_the_way_out_is_named(fake: Fake) -> None:
    fake()
    with pytest.raises(BackendError, match=r"tensorrt was asked to build for compute capability 8\.9"):
        to_tensorrt.open_target("tensorrt", "cuda", "8.9")


def test_networks_that_are_not_there() -> None:
    with pytest.raises(BundleError, match="no refiner"):
        plain_orders(networks=["refiner"])


def test_an_order_changes_with_everything_it_depends_on(tmp_path: Path) -> None:
    (order,) = plain_orders(networks=["vae_decoder"])
    bundle = copy_of_emoji(tmp_path)
    changed = replace(bundle.spec, id="other")
    write_manifest(bundle.root, changed, bundle.files)
    again = orders_of(Bundle.open(bundle.root), FAKE, GPU, FIXED, precision="fp32")
    assert next(each.key for each in again if each.key.network == "vae_decoder") == order.key
    weights = bundle.path("vae/diffusion_pytorch_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    write_manifest(bundle.root, changed, bundle.files)
    assert orders_of(Bundle.open(bundle.root), FAKE, GPU, FIXED, precision="fp32")[2].key != order.key
    wide = orders_of(EMOJI, FAKE, GPU, shapes_of(EMOJI.spec, {"pictures": "2"}), precision="fp32")[2].key
    assert wide.name != order.key.name
