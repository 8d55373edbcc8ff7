"""A large bundle is hashed once; every change of a file is noticed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from latentrt.bundle import bundle as module
from latentrt.bundle import checked
from latentrt.bundle.bundle import EMBEDDED, Bundle
from latentrt.errors import HashMismatchError
from latentrt.storage import cache_folder

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of the embedded model that counts as large, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(checked, "LEAST_BYTES", 1)
    shutil.copytree(EMBEDDED, tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return the list of files that are hashed from here on."""
    found: list[Path] = []
    own = module.sha256_of
    monkeypatch.setattr(module, "sha256_of", lambda path: found.append(path) or own(path))
    return found


def test_the_second_time_nothing_is_hashed(copy: Path, hashed: list[Path]) -> None:
    every = len(Bundle.open(copy, cache=True).files)
    assert len(hashed) == every
    assert Bundle.open(copy, cache=True).checked
    assert len(hashed) == every
    Bundle.open(copy)  # the default reads all again
    assert len(hashed) == 2 * every


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def flip_and_hide(path: Path) -> None:
    status = path.stat()
    flip(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def exchange(path: Path) -> None:
    other = path.with_suffix(".new")
    shutil.copy2(path, other)
    flip_and_hide(other)
    other.replace(path)


@pytest.mark.parametrize("change", [flip, flip_and_hide, exchange])
def test_a_changed_file_is_noticed(copy: Path, change: Callable[[Path], None]) -> None:
    Bundle.open(copy, cache=True)
    change(copy / WEIGHTS)
    with pytest.raises(HashMismatchError, match=WEIGHTS):
        Bundle.open(copy, cache=True)


def test_another_manifest_is_checked_again(copy: Path, hashed: list[Path]) -> None:
    opened = Bundle.open(copy, cache=True)
    manifest = copy / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace(opened.files[WEIGHTS].sha256, "0" * 64))
    with pytest.raises(HashMismatchError, match=WEIGHTS):
        Bundle.open(copy, cache=True)


def test_a_note_of_another_user_is_not_believed(copy: Path, hashed: list[Path]) -> None:
    every = len(Bundle.open(copy, cache=True).files)
    (note,) = cache_folder("checked").iterdir()
    note.chmod(0o666)
    Bundle.open(copy, cache=True)
    assert len(hashed) == 2 * every
    note.chmod(0o600)
    note.write_text("{")
    Bundle.open(copy, cache=True)
    assert len(hashed) == 3 * every


def test_a_cache_that_cannot_be_written_is_none(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    assert Bundle.open(copy, cache=True).checked


def test_small_bundles_leave_no_note(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checked, "LEAST_BYTES", 2**28)
    Bundle.open(copy, cache=True)
    assert not cache_folder("checked").exists()
