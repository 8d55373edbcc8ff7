"""Weights of plans: read from safetensors bit for bit, set in an engine, replaced and restored."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import save_file

from latentrt.bundle.bundle import Bundle
from latentrt.errors import BackendError, LatentrtError, PlanError, UnsafePathError
from latentrt.runtime.tensorrt.record import REFITTABLE, STRIPPED, Weight
from latentrt.runtime.tensorrt.refit import STORED, StoredWeights, as_wanted
from tests.support.gpu.fakes.fake_plans import put_plan
from tests.support.gpu.fakes.fake_tensorrt import FakeTensorRt
from tests.support.gpu.host_gpu import HostGpu
from tests.support.models import small_bundle
from tests.support.models.small_bundle import (
    BIG,
    PLANES,
    SHIFT,
    SQUARE,
    WEIGHTS,
    WIDE,
    Arrays,
    expected,
    feeds,
    load,
    make_bundle,
    record,
    rounded_once,
)

bundle, gpu, fake = small_bundle.bundle, small_bundle.gpu, small_bundle.fake
network, arrays = small_bundle.network, small_bundle.arrays


def table(path: Path, dtype: str) -> dict[str, Weight]:
    """Return where a safetensors file has its tensors."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    return {
        name: Weight(path.name, 8 + length + entry["data_offsets"][0], math.prod(entry["shape"]) * size, stored, dtype)
        for name, entry in header.items()
        for stored in [entry["dtype"]]
        for size in [2 if stored == "BF16" else np.dtype(STORED[stored]).itemsize]
    }


def weights_in(folder: Path, tensors: dict[str, torch.Tensor], dtype: str) -> StoredWeights:
    save_file(tensors, folder / "w.safetensors")
    return StoredWeights(Bundle(folder, None, {}), table(folder / "w.safetensors", dtype))  # type: ignore[arg-type]


@pytest.mark.parametrize("stored", [torch.float16, torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("wanted", ["float16", "float32"])
def test_weights_are_torchs_bit_for_bit(tmp_path: Path, stored: torch.dtype, wanted: str) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(7, 3, generator=generator).to(stored) for name in ("a", "b", "c")}
    weights = weights_in(tmp_path, tensors, wanted)
    for name, tensor in tensors.items():
        found = weights(name)
        expected = tensor.to(getattr(torch, wanted)).numpy().ravel()
        assert found.dtype == np.dtype(wanted)
        assert found.flags.c_contiguous
        assert found.flags.aligned
        assert found.tobytes() == expected.tobytes()


def test_weights_that_are_stored_as_wanted_are_not_copied(tmp_path: Path) -> None:
    weights = weights_in(tmp_path, {"a": torch.ones(4), "b": torch.zeros(4)}, "float32")
    assert isinstance(weights("a").base, np.memmap | np.ndarray)
    assert not weights("a").flags.owndata
    assert not weights("a").flags.writeable
    assert np.shares_memory(weights("a"), weights("a"))


def test_weights_at_odd_offsets_are_aligned(tmp_path: Path) -> None:
    values = np.arange(5, dtype=np.float32)
    (tmp_path / "w").write_bytes(b"x" + values.tobytes())
    weights = StoredWeights(Bundle(tmp_path, None, {}), {"a": Weight("w", 1, 20, "F32", "float32")})  # type: ignore[arg-type]
    assert weights("a").flags.aligned
    np.testing.assert_array_equal(weights("a"), values)


def test_weights_that_half_precision_cannot_hold_are_named(tmp_path: Path) -> None:
    weights = weights_in(tmp_path, {"big": torch.tensor([1.0, -70000.0]), "tiny": torch.tensor([1e-9])}, "float16")
    with pytest.raises(PlanError, match=r"the weight big has values up to 70000.*values that float16 holds"):
        weights("big")
    assert weights("tiny") == 0  # as torch has it


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (Weight("w", 0, 24, "F32", "float32"), r"w ends before the weight a.*24 bytes at 0"),
        (Weight("w", 30, 4, "F32", "float32"), "w ends before the weight a"),
        (Weight("gone", 0, 4, "F32", "float32"), r"gone cannot be read.*latentrt build"),
        (Weight("w", 0, 4, "F8_E4M3", "float32"), "stored as F8_E4M3"),
    ],
)
def test_weights_that_are_not_there_are_named(tmp_path: Path, weight: Weight, words: str) -> None:
    (tmp_path / "w").write_bytes(bytes(20))
    with pytest.raises(PlanError, match=words):
        StoredWeights(Bundle(tmp_path, None, {}), {"a": weight})("a")  # type: ignore[arg-type]


def test_weights_without_a_place_are_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="nothing says where the weight b lies"):
        StoredWeights(Bundle(tmp_path, None, {}), {})("b")  # type: ignore[arg-type]


def test_weights_stay_in_the_bundle(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(8))
    (tmp_path / "bundle").mkdir()
    bundle = Bundle(tmp_path / "bundle", None, {})  # type: ignore[arg-type]
    with pytest.raises(UnsafePathError):
        StoredWeights(bundle, {"a": Weight("../secret", 0, 4, "F32", "float32")})("a")


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.floats(-60000, 60000, width=32), min_size=1, max_size=20))
def test_given_values_are_cast_as_numpy_casts(values: list[float]) -> None:
    array = np.array(values, np.float32)
    weight = Weight("w", 0, 2 * array.size, "BF16", "float16")
    wanted = as_wanted("a", array.reshape(1, -1), weight)
    assert wanted.tobytes() == array.astype(np.float16).tobytes()


def test_given_values_are_copied_and_counted() -> None:
    weight = Weight("w", 0, 8, "F16", "float32")
    given_values = np.zeros((2, 2), np.float32)
    wanted = as_wanted("a", given_values, weight)
    given_values += 1
    assert not wanted.any()
    with pytest.raises(PlanError, match=r"3 values are given for the weight a\. Needed: 4 values"):
        as_wanted("a", np.zeros(3, np.float32), weight)


# Refitting


def refit_plan(bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu, *options: str, **more: Any) -> None:
    precision = more.get("precision", "fp32")
    where = {
        name: replace(weight, file=WEIGHTS)
        for name, weight in table(bundle.root / WEIGHTS, {"fp32": "float32", "fp16": "float16"}[precision]).items()
    }
    put_plan(bundle, "unet", fake, gpu, more.pop("ranges", WIDE), options=options, refit=where, **more)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("precision", "dtype"), [("fp32", "float32"), ("fp16", "float16")])
def test_a_stripped_plan_takes_the_bundles_weights(
    tmp_path: Path, gpu: HostGpu, stored: torch.dtype, precision: str, dtype: str
) -> None:
    fake = FakeTensorRt()
    bundle = make_bundle(tmp_path / "bundle", PLANES.to(stored) / 3, SHIFT.to(stored) / 7)
    refit_plan(bundle, fake, gpu, STRIPPED, precision=precision)
    network = load(bundle, fake, gpu, precision=precision)
    for fed in rounded_once(dtype):
        wanted = expected(fed, PLANES.to(stored) / 3, SHIFT.to(stored) / 7)
        np.testing.assert_array_equal(network(fed)["out"], wanted)
    assert fake.refits == 1
    network.close()


def test_a_plan_with_its_own_weights_is_not_refitted(bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu) -> None:
    refit_plan(bundle, fake, gpu, REFITTABLE)
    load(bundle, fake, gpu).close()
    assert fake.refits == 0


def with_weights(bundle: Bundle, planes: torch.Tensor, shift: torch.Tensor) -> Bundle:
    """Return the bundle with other weights."""
    save_file({"planes": planes, "shift": shift}, bundle.root / WEIGHTS)
    return replace(bundle, files={**bundle.files, WEIGHTS: record(bundle.root / WEIGHTS)})


def test_a_refittable_plan_takes_a_bundles_other_weights(bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu) -> None:
    refit_plan(bundle, fake, gpu, REFITTABLE)
    other = with_weights(bundle, PLANES + 1, SHIFT * 2)
    network = load(other, fake, gpu)
    np.testing.assert_array_equal(network(feeds())["out"], expected(feeds(), PLANES + 1, SHIFT * 2))
    network.close()


@pytest.mark.parametrize("options", [(), (STRIPPED,)])
def test_other_plans_are_refused_for_other_weights(
    bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu, options: tuple[str, ...]
) -> None:
    refit_plan(bundle, fake, gpu, *options)
    with pytest.raises(PlanError, match="built for weights"):
        load(with_weights(bundle, PLANES + 1, SHIFT), fake, gpu)
    assert fake.deserialized == 0


def test_missing_weights_are_named(bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu) -> None:
    where = table(bundle.root / WEIGHTS, "float32")
    only = {"planes": replace(where["planes"], file=WEIGHTS)}
    put_plan(bundle, "unet", fake, gpu, WIDE, options=(STRIPPED,), refit=only)
    with pytest.raises(PlanError, match="nothing says where the weight shift lies"):
        load(bundle, fake, gpu)


def test_refused_weights_are_named(bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu) -> None:
    where = {n: replace(w, file=WEIGHTS, dtype="float16") for n, w in table(bundle.root / WEIGHTS, "float32").items()}
    put_plan(bundle, "unet", fake, gpu, WIDE, options=(STRIPPED,), refit=where)
    with pytest.raises(PlanError, match=r"TensorRT refuses the weight \w+ \(.*has 4 values of HALF"):
        load(bundle, fake, gpu)


def test_weights_are_replaced_and_come_back(bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu, arrays: Arrays) -> None:
    refit_plan(bundle, fake, gpu, REFITTABLE)
    network = load(bundle, fake, gpu)
    named, fed = arrays(), feeds()
    bound = network.bind(named)
    for name, value in fed.items():
        gpu.upload(value, named[name])

    def out() -> NDArray[Any]:
        bound.enqueue()  # the binding stays
        return gpu.download(named["out"])

    planes, shift = PLANES * 1.5, SHIFT - 1
    network.refit({"planes": planes.numpy()})
    np.testing.assert_array_equal(out(), expected(fed, planes))
    network.refit({"shift": shift.numpy()})
    np.testing.assert_array_equal(out(), expected(fed, PLANES, shift))
    network.refit({"shift": shift.numpy(), "planes": planes.numpy().ravel()})
    np.testing.assert_array_equal(out(), expected(fed, planes, shift))
    network.refit({})
    np.testing.assert_array_equal(out(), expected(fed))
    assert network(fed)["out"].tobytes() == expected(fed).tobytes()
    network.close()


def test_every_weight_is_sent_although_tensorrt_misses_none(bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu) -> None:
    for ranges in (SQUARE, BIG):
        refit_plan(bundle, fake, gpu, REFITTABLE, ranges=ranges)
    network, sent = load(bundle, fake, gpu), []
    network(feeds(2, 4))
    for weights in ({"planes": PLANES.numpy() * 2}, {"shift": SHIFT.numpy()}, {}):
        network.refit(weights)
        sent.append(fake.sent)
    network.refit({"planes": PLANES.numpy() * 2})
    fake.sent = set()
    network(feeds(1, 16))  # a plan that is loaded now
    assert [*sent, fake.sent] == [{"planes", "shift"}] * 4
    network.close()


def test_weights_that_were_merged_are_given_along(bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu) -> None:
    refit_plan(bundle, fake, gpu, REFITTABLE, merged=[["planes", "shift"]])
    network = load(bundle, fake, gpu)
    network.refit({"planes": PLANES.numpy() * 2})
    np.testing.assert_array_equal(network(feeds())["out"], expected(feeds(), PLANES * 2))
    network.close()


def test_replaced_weights_reach_plans_that_are_loaded_later(bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu) -> None:
    refit_plan(bundle, fake, gpu, REFITTABLE, ranges=SQUARE)
    refit_plan(bundle, fake, gpu, REFITTABLE, ranges=BIG)
    network = load(bundle, fake, gpu)
    network.refit({"planes": PLANES.numpy() * 2})
    for batch, side in ((2, 4), (1, 16)):
        fed = feeds(batch, side)
        np.testing.assert_array_equal(network(fed)["out"], expected(fed, PLANES * 2))
    network.refit({})
    for batch, side in ((2, 4), (1, 16)):
        fed = feeds(batch, side)
        np.testing.assert_array_equal(network(fed)["out"], expected(fed))
    network.close()


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"plains": np.zeros(4, np.float32)}, "unet has no weight plains"),
        ({"planes": np.zeros(5, np.float32)}, r"5 values are given for the weight planes\. Needed: 4 values"),
    ],
)
def test_weights_that_do_not_fit_change_nothing(
    bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu, weights: dict[str, NDArray[Any]], words: str
) -> None:
    refit_plan(bundle, fake, gpu, REFITTABLE)
    network = load(bundle, fake, gpu)
    with pytest.raises(PlanError, match=words):
        network.refit(weights)
    np.testing.assert_array_equal(network(feeds())["out"], expected(feeds()))
    network.close()


@pytest.mark.parametrize("options", [(), (STRIPPED,)])
def test_plans_that_are_not_refittable_say_so(
    bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu, options: tuple[str, ...]
) -> None:
    refit_plan(bundle, fake, gpu, *options)
    network = load(bundle, fake, gpu)
    with pytest.raises(PlanError, match=r"takes no weights but its own.*--refittable"):
        network.refit({"planes": PLANES.numpy()})
    network.close()


def test_a_refit_that_fails_closes_the_network(bundle: Bundle, fake: FakeTensorRt, gpu: HostGpu) -> None:
    refit_plan(bundle, fake, gpu, REFITTABLE, refittable=False)  # TensorRT will refuse
    network = load(bundle, fake, gpu)
    network(feeds())
    with pytest.raises(LatentrtError, match="built to keep its weights"):
        network.refit({"planes": PLANES.numpy()})
    assert gpu.in_use == 0
    with pytest.raises(BackendError, match="was closed"):
        network(feeds())
