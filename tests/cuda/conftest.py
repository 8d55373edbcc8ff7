"""The emulated GPU of these tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.gpu.host_gpu import HostGpu, host_gpu


@pytest.fixture
def gpu() -> Iterator[HostGpu]:
    """Yield an emulated GPU; fail where memory was not freed."""
    with host_gpu() as gpu:
        yield gpu
