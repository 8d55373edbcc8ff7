"""Weights of plans: read from safetensors bit for bit, and set in an engine."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from engine.backends.refit import STORED, StoredWeights, as_wanted
from engine.bundle import Bundle
from engine.errors import PlanError, UnsafePathError
from engine.plans import Weight

NAMES = {torch.float16: "F16", torch.float32: "F32", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64"}


def table(path: Path, dtype: str) -> dict[str, Weight]:
    """Where a safetensors file has its tensors."""
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
