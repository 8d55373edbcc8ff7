"""Plans are written whole or not at all, and removed by name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from latentrt.errors import PlanError
from latentrt.runtime.tensorrt.plans import PlanStore
from tests.support.gpu.fakes.plan_records import KEY, PLAN, find, record


def files(store: PlanStore) -> list[str]:
    return sorted(path.suffix for path in store.folder.iterdir())


# Writing


def full_disk(monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    """Let fsync fail for files of a kind, as a full disk does."""
    real = os.fsync

    def fsync(handle: int) -> None:
        if suffix in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("suffix", [".plan", ".json"])
def test_a_full_disk_leaves_the_old_plan(store: PlanStore, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    store.put(record(), PLAN)
    full_disk(monkeypatch, suffix)
    with pytest.raises(PlanError, match=r"cannot be written.*No space left.*make room, or choose another folder"):
        store.put(record(plan=PLAN[::-1]), PLAN[::-1])
    assert store.read(find(store)) == PLAN
    assert files(store) == [".json", ".plan"]


@pytest.mark.parametrize("suffix", [".plan", ".json"])
def test_a_full_disk_leaves_no_half_plan(store: PlanStore, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    full_disk(monkeypatch, suffix)
    with pytest.raises(PlanError):
        store.put(record(), PLAN)
    assert files(store) == []


@pytest.mark.parametrize("step", [0, 1])
def test_an_interruption_leaves_the_old_plan(store: PlanStore, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    store.put(record(), PLAN)
    real, done = Path.replace, []

    def interrupted(path: Path, target: Path) -> Path:
        if len(done) == step:
            raise KeyboardInterrupt
        done.append(target)
        return real(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.put(record(plan=PLAN[::-1]), PLAN[::-1])
    assert store.read(find(store)) == PLAN
    assert files(store) == [".json", ".plan"]
    store.put(record(plan=PLAN[::-1]), PLAN[::-1])
    assert store.read(find(store)) == PLAN[::-1]
    assert files(store) == [".json", ".plan"]


def test_the_same_plan_once_more_stays_where_it_is(store: PlanStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put(record(), PLAN)
    full_disk(monkeypatch, ".json")
    with pytest.raises(PlanError):
        store.put(record(made={"seconds": 3}), PLAN)
    assert store.read(find(store)) == PLAN


def test_a_folder_that_cannot_be_made_is_named(store: PlanStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PlanError, match=r"cannot be written.*--plans FOLDER"):
        PlanStore(store.bundle, tmp_path / "file" / "plans").put(record(), PLAN)


def test_a_folder_that_cannot_be_read_is_named(store: PlanStore) -> None:
    store.folder.write_text("a file")
    with pytest.raises(PlanError, match=r"plans cannot be read \(.*Not a directory"):
        store.fitting(KEY)


def test_the_record_of_a_name_is_that_of_the_last_build(store: PlanStore) -> None:
    first, second = record(), record(plan=PLAN[::-1])
    store.put(first, PLAN)
    store.put(second, PLAN[::-1])
    assert first.name == second.name
    assert store.record(first.name) == second
    store.remove(second.name)
    with pytest.raises(PlanError, match="cannot be read"):
        store.record(first.name)


# Removing


def test_what_cannot_be_loaded_is_removed_by_its_name_alone(store: PlanStore) -> None:
    store.put(record(), PLAN)
    kept = set(store.folder.iterdir())
    names = [f"unet-{digit * 16}" for digit in "0123"]
    texts = ["", '{"schema": 1, "key": {"network": "../../x"}, "sha256": "../../../x"}', "[]", "junk"]
    for name, text in zip(names, texts, strict=True):
        (store.folder / f"{name}.json").write_text(text)
        (store.folder / f"{name}-{'a' * 16}.plan").write_bytes(b"a plan")
    (outside := store.folder.parent / "x.plan").write_bytes(b"mine")
    link = store.folder / f"unet-{'4' * 16}.json"
    link.symlink_to(outside)
    for name in (*names, link.stem):
        store.remove(name)
    assert set(store.folder.iterdir()) == kept
    assert outside.read_bytes() == b"mine"


@pytest.mark.parametrize(
    "name", ["", "*", "unet-*", "unet-00", "../plans/unet-00", "notes", "unet-0000.json", "/etc/x-0"]
)
def test_only_names_of_records_are_removed(store: PlanStore, name: str) -> None:
    store.put(record(), PLAN)
    (store.folder / "notes.json").write_text("none of ours")
    (store.folder / "notes-0.plan").write_text("nor this")
    before = set(store.folder.iterdir())
    with pytest.raises(PlanError, match=r"has no plan .*--list"):
        store.remove(name)
    assert set(store.folder.iterdir()) == before


def test_what_cannot_be_removed_is_named(store: PlanStore) -> None:
    (store.folder / f"unet-{'0' * 16}.json").mkdir(parents=True)
    with pytest.raises(PlanError, match="unet-0000000000000000 cannot be removed"):
        store.remove(f"unet-{'0' * 16}")
