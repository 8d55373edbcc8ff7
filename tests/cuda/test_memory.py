"""Device memory: counted, copied, freed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt.errors import BackendError, DeviceMemoryError
from tests.support.gpu.host_gpu import HostGpu, host_gpu


def test_memory_is_counted(gpu: HostGpu) -> None:
    free, total = gpu.memory()
    arrays = [gpu.empty((3, 5), np.float16), gpu.zeros((7,), np.uint8), gpu.empty((0, 4), np.float32)]
    assert [array.bytes for array in arrays] == [30, 7, 0]
    assert (gpu.download(arrays[1]) == 0).all()
    assert gpu.memory() == (free - 38, total)
    for array in arrays:
        gpu.free(array)
    assert gpu.memory() == (free, total)
    with pytest.raises(BackendError, match="not held"):
        gpu.free(arrays[0])


def test_too_little_memory() -> None:
    with host_gpu(memory=3 * 2**20) as gpu:
        held = gpu.empty((2**20,), np.uint8)
        with pytest.raises(DeviceMemoryError, match=r"4\.0 MiB .* 2\.0 MiB of 3\.0 MiB are free"):
            gpu.empty((2**20,), np.float32)
        gpu.free(held)


@given(rows=st.integers(1, 5), width=st.integers(1, 4), wider=st.integers(1, 9), column=st.integers(0, 9))
@settings(deadline=None, max_examples=30)
def test_columns_are_copied_or_refused(rows: int, width: int, wider: int, column: int) -> None:
    part = np.arange(rows * width, dtype=np.int16).reshape(rows, width)
    with host_gpu() as gpu:
        source, target = gpu.empty((rows, width), np.int16), gpu.zeros((rows, wider), np.int16)
        gpu.upload(part, source)
        if column + width <= wider:
            gpu.copy_columns(source, target, column)
            expected = np.zeros((rows, wider), np.int16)
            expected[:, column : column + width] = part
            np.testing.assert_array_equal(gpu.download(target), expected)
        else:
            with pytest.raises(BackendError, match="at column"):
                gpu.copy_columns(source, target, column)
        gpu.free(source)
        gpu.free(target)


def test_copies(gpu: HostGpu) -> None:
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    source, target = gpu.zeros((6, 4), np.float32), gpu.zeros((2, 6, 4), np.float32)
    gpu.upload(array.T, source)  # not dense
    array[:] = 0
    gpu.copy(source, target.part(1))
    np.testing.assert_array_equal(gpu.download(target)[1], np.arange(24).reshape(4, 6).T)
    assert (gpu.download(target)[0] == 0).all()
    gpu.fill_zero(target.part(1))
    assert (gpu.download(target) == 0).all()
    with pytest.raises(BackendError, match="cannot be copied"):
        gpu.copy(target, source)
    for wrong in (np.zeros((6, 4)), np.zeros((6, 5), np.float32)):
        with pytest.raises(BackendError, match="cannot be copied"):
            gpu.upload(wrong, source)
    gpu.free(source)
    gpu.free(target)


@pytest.mark.parametrize("host_pages", [False, True])
def test_devices_that_read_the_hosts_pages_are_waited_for(host_pages: bool) -> None:
    with host_gpu(host_pages=host_pages) as gpu:
        array = gpu.empty((2,), np.float32)
        gpu.host.calls.clear()
        gpu.upload(np.ones(2, np.float32), array)
        assert ("cuStreamSynchronize" in gpu.host.calls) is host_pages
        gpu.free(array)
