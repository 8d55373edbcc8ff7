"""Plans are trusted by their place: no bundle's folder, and none that others can write to. Damage is found too."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from latentrt.bundle.bundle import Bundle
from latentrt.errors import PlanError, UntrustedFileError
from latentrt.runtime.tensorrt.plans import PlanStore
from latentrt.runtime.tensorrt.record import Weight
from tests.support.gpu.fakes.plan_records import KEY, PLAN, find, record

# Bundles


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """Return a copy of the embedded model, as it might have been downloaded."""
    return Bundle.open(shutil.copytree(Bundle.open(check_hashes=False).root, tmp_path / "bundle"), check_hashes=False)


@pytest.mark.parametrize("folder", ["plans", "unet", ".", "a/../plans", "plans/deep/down", "../bundle/plans"])
def test_no_folder_in_a_bundle_is_taken(bundle: Bundle, folder: str) -> None:
    with pytest.raises(PlanError, match=rf"lies in the bundle {bundle.root}.*a folder outside"):
        PlanStore(bundle, bundle.root / folder)


def test_nor_one_in_another_bundle(bundle: Bundle) -> None:
    with pytest.raises(PlanError, match=f"lies in the bundle {bundle.root}"):
        PlanStore(Bundle.open(check_hashes=False), bundle.root / "plans")


def test_nor_one_that_a_link_leads_to_or_from(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (bundle.root / "plans").symlink_to(tmp_path / "outside")
    (tmp_path / "link").symlink_to(bundle.root / "unet")
    for folder in (bundle.root / "plans", tmp_path / "link"):
        with pytest.raises(PlanError, match="lies in the bundle"):
            PlanStore(bundle, folder)


def test_nor_a_cache_in_a_bundle(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(bundle.root / "cache"))
    with pytest.raises(PlanError, match="lies in the bundle"):
        PlanStore(bundle)


def test_a_folder_beside_a_bundle_is_taken(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"name": "a page\'s, no bundle\'s"}')
    assert PlanStore(bundle, tmp_path / "plans").survey() == ([], {})


def test_plans_that_an_earlier_version_left_in_the_bundle_are_told_of(bundle: Bundle) -> None:
    (bundle.root / "plans").mkdir()
    with pytest.raises(PlanError) as caught:
        PlanStore(bundle).fitting(KEY)
    assert "not used" not in caught.value.found
    (bundle.root / "plans" / "unet-0.plan").write_bytes(PLAN)
    with pytest.raises(PlanError) as caught:
        PlanStore(bundle).fitting(KEY)
    assert f"those in {bundle.root}/plans are not used" in caught.value.found
    assert caught.value.fix.startswith(f"latentrt build {bundle.root} (")


# Owner and mode


def uses(store: PlanStore) -> list[Callable[[], object]]:
    """Return every function that reads from a folder."""
    return [
        *(lambda: store.fitting(KEY), store.survey, lambda: store.record(record().name), lambda: store.read(record())),
        lambda: store.remove(record().name),
    ]


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777, 0o1777])
def test_a_folder_that_others_can_write_to_is_refused(store: PlanStore, mode: int) -> None:
    store.put(record(), PLAN)
    store.folder.chmod(mode)
    for use in uses(store):
        with pytest.raises(UntrustedFileError, match=rf"{store.folder} has mode {mode:o}.*chmod go-w {store.folder}"):
            use()
    store.folder.chmod(0o755)
    assert find(store) == record()


def test_a_folder_of_another_user_is_refused_but_for_roots(store: PlanStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put(record(), PLAN)
    owner = store.folder.stat().st_uid
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    if owner == 0:
        assert find(store) == record()
        os.chown(store.folder, 54321, -1)
    for use in uses(store):
        with pytest.raises(UntrustedFileError, match=rf"{store.folder} belongs to .*chown -R root {store.folder}"):
            use()


@pytest.mark.parametrize("suffix", [".json", ".plan"])
def test_a_file_that_others_can_write_to_is_refused(store: PlanStore, suffix: str) -> None:
    plan = store.put(record(), PLAN)
    path = plan if suffix == ".plan" else store.folder / f"{record().name}.json"
    path.chmod(0o664)
    with pytest.raises(UntrustedFileError, match=rf"{path} has mode 664.*chmod go-w {path}"):
        store.read(find(store))


def test_one_refused_record_does_not_stand_in_the_way_of_another(store: PlanStore) -> None:
    store.put(record(), PLAN)
    other = record(replace(KEY, driver="570"))
    store.put(other, PLAN)
    (store.folder / f"{other.name}.json").chmod(0o666)
    assert find(store) == record()
    records, refused = store.survey()
    assert records == [record()]
    assert isinstance(refused[other.name], UntrustedFileError)


@pytest.mark.parametrize("umask", [0o002, 0o000])
def test_what_is_built_is_trusted_whatever_the_umask(store: PlanStore, umask: int) -> None:
    before = os.umask(umask)
    try:
        store.put(record(), PLAN)
    finally:
        os.umask(before)
    assert store.read(find(store)) == PLAN


# Damage


@pytest.mark.parametrize("at", [0, 255, 256, 512, 1023])
def test_any_changed_byte_of_a_plan_is_noticed(store: PlanStore, at: int) -> None:
    put = record()
    path = store.put(put, PLAN)
    path.write_bytes(PLAN[:at] + bytes([PLAN[at] ^ 1]) + PLAN[at + 1 :])
    with pytest.raises(PlanError, match=r"not the ones that were built.*latentrt build \S+ --plans \S+, which builds"):
        store.read(put)


@pytest.mark.parametrize("plan", [b"", PLAN[:-1], PLAN + b"\0"])
def test_a_plan_of_another_size_is_noticed(store: PlanStore, plan: bytes) -> None:
    put = record()
    store.put(put, PLAN).write_bytes(plan)
    with pytest.raises(PlanError, match=f"has {len(plan)} bytes"):
        store.read(put)


def test_a_missing_plan_is_named(store: PlanStore) -> None:
    put = record()
    path = store.put(put, PLAN)
    path.unlink()
    with pytest.raises(PlanError, match=path.name):
        store.read(put)


def test_swapped_plans_are_noticed(store: PlanStore) -> None:
    first, second = record(), record(replace(KEY, driver="570"), PLAN[::-1])
    one, other = store.put(first, PLAN), store.put(second, PLAN[::-1])
    one.write_bytes(PLAN[::-1])
    other.write_bytes(PLAN)
    for put in (first, second):
        with pytest.raises(PlanError):
            store.read(put)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 2**20), value=st.integers(0, 255))
def test_a_damaged_record_never_leads_to_another_plan(store: PlanStore, at: int, value: int) -> None:
    """Where one of its bytes changes, it is refused, or it is still the record of its key."""
    put = record(refit={"w": Weight("unet/x.safetensors", 8, 32, "F16", "float16")}, made={"seconds": 3})
    path = store.put(put, PLAN).with_name(f"{put.name}.json")
    whole = path.read_bytes()
    at %= len(whole)
    path.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
    records, refused = store.survey("unet")
    assert len(records) + len(refused) == 1
    assert all(found.key == put.key for found in records)


def test_a_record_under_another_name_is_refused(store: PlanStore) -> None:
    put = record()
    path = store.put(put, PLAN).with_name(f"{put.name}.json")
    path.rename(path.with_name(f"unet-{'0' * 16}.json"))
    with pytest.raises(PlanError, match=f"is the record of {put.name}"):
        store.fitting(KEY)


def test_what_is_no_record_is_named(store: PlanStore) -> None:
    store.put(record(replace(KEY, driver="570")), PLAN)
    (store.folder / f"unet-{'0' * 16}.json").write_text("junk")
    with pytest.raises(PlanError, match=r"unet-0000.*cannot be read .*latentrt build .*builds it again"):
        store.fitting(KEY)
