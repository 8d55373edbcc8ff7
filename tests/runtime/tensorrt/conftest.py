"""Plans of these tests lie in a cache of each test's own, or in a folder that the test names."""

from __future__ import annotations

from pathlib import Path

import pytest

from latentrt.bundle.bundle import Bundle
from latentrt.runtime.tensorrt.plans import PlanStore


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the user's cache folder; plans lie below `latentrt/plans`."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def store(tmp_path: Path) -> PlanStore:
    """Return an empty folder for plans of the embedded model."""
    return PlanStore(Bundle.open(check_hashes=False), tmp_path / "plans")
