"""Plans: what they depend on, who may serve whom, and that nothing but what was built here is ever handed out."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.spec import TensorSpec
from latentrt.errors import PlanError, UnsafePathError, UntrustedPlanError
from latentrt.runtime.tensorrt import plans
from latentrt.runtime.tensorrt.plans import PlanStore, weights_digest
from latentrt.runtime.tensorrt.record import (
    REFITTABLE,
    STRIPPED,
    VERSION_COMPATIBLE,
    PlanKey,
    PlanRecord,
    Profile,
    Weight,
    drawn_by,
)
from latentrt.runtime.tensorrt.seal import secret_path

KEY = PlanKey(
    network="unet",
    graph="a" * 64,
    weights="b" * 64,
    precision="fp16",
    library="tensorrt",
    version="10.13.3.9",
    gpu="NVIDIA H200",
    compute_capability="9.0",
    driver="13.0",
)
SQUARE = Profile({"batch": (2, 2, 8), "height": (64, 64, 96), "width": (64, 64, 96)})
SMALL = Profile({"batch": (1, 1, 1), "height": (32, 32, 32), "width": (32, 32, 32)})
PLAN = bytes(range(256)) * 4
SIZES = {"batch": 2, "height": 64, "width": 64}


@pytest.fixture(autouse=True)
def secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "secret" / "seal.key"
    monkeypatch.setenv("LATENTRT_SEAL", str(path))
    return path


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.open(check_hashes=False)


@pytest.fixture
def store(bundle: Bundle, tmp_path: Path) -> PlanStore:
    return PlanStore(bundle, tmp_path / "plans")


def record(key: PlanKey = KEY, plan: bytes = PLAN, **more: Any) -> PlanRecord:
    key = key if key.profiles else replace(key, profiles=(SQUARE,))
    return PlanRecord(key, hashlib.sha256(plan).hexdigest(), len(plan), **more)


def files(store: PlanStore) -> list[str]:
    return sorted(path.suffix for path in store.folder.iterdir())


# Keys


def test_what_was_put_is_found_and_read(store: PlanStore) -> None:
    made = {"seconds": 12.5, "flags": ["REFIT"]}
    refit = {"w": Weight("unet/x.safetensors", 8, 32, "F16", "float16")}
    put = record(refit=refit, made=made)
    path = store.put(put, PLAN)
    found = store.find(KEY, SIZES)
    assert found == put
    assert store.read(found) == PLAN
    assert path == store.path(found)
    assert path.is_file()


@pytest.mark.parametrize("name", [f.name for f in fields(PlanKey) if f.name not in ("options", "profiles")])
def test_every_field_of_a_key_counts(store: PlanStore, name: str) -> None:
    store.put(record(), PLAN)
    wanted = replace(KEY, **{name: "other"})
    assert wanted.digest != KEY.digest
    with pytest.raises(PlanError) as caught:
        store.find(wanted, SIZES)
    if name == "network":
        assert "no plan of the other" in caught.value.found
    else:
        value = getattr(KEY, name)
        short = value[:12] if len(value) == 64 else value
        assert caught.value.found == f"the nearest plan of the unet was built for {name} {short}"
        assert caught.value.needed == f"{name} other"
    assert "latentrt build" in caught.value.fix


def test_options_and_profiles_are_part_of_a_digest() -> None:
    keys = [KEY, replace(KEY, options=(STRIPPED,)), replace(KEY, profiles=(SQUARE,)), replace(KEY, profiles=(SMALL,))]
    assert len({key.digest for key in keys}) == 4
    reordered = Profile(dict(reversed(SQUARE.ranges.items())))
    assert replace(KEY, profiles=(reordered,)).digest == replace(KEY, profiles=(SQUARE,)).digest


def test_nearest_plan_is_the_one_that_is_named(store: PlanStore) -> None:
    store.put(record(replace(KEY, gpu="NVIDIA A100", compute_capability="8.0")), PLAN)
    store.put(record(replace(KEY, driver="570")), PLAN)
    with pytest.raises(PlanError) as caught:
        store.find(KEY, SIZES)
    assert caught.value.found == "the nearest plan of the unet was built for driver 570"
    assert caught.value.needed == "driver 13.0"


def test_no_folder_is_no_plan(store: PlanStore) -> None:
    with pytest.raises(PlanError, match=r"holds no plan of the unet.*latentrt build"):
        store.find(KEY, SIZES)


def test_networks_whose_names_begin_alike_are_apart(store: PlanStore) -> None:
    store.put(record(replace(KEY, network="text_encoder_2")), PLAN)
    store.put(record(replace(KEY, network="vae-decoder")), PLAN)
    assert not list(store.records("text_encoder"))
    assert not list(store.records("vae"))
    assert len(list(store.records("text_encoder_2"))) == 1


def test_a_plan_built_ahead_of_time_runs_on_every_gpu_of_its_capability(store: PlanStore) -> None:
    store.put(record(replace(KEY, library="tensorrt-rtx", gpu="", driver="")), PLAN)
    wanted = replace(KEY, library="tensorrt-rtx")
    assert store.find(replace(wanted, gpu="another", driver="13.2"), SIZES)
    with pytest.raises(PlanError, match=r"compute_capability 9\.0\. Needed: compute_capability 8\.9"):
        store.find(replace(wanted, compute_capability="8.9"), SIZES)


def test_no_plan_serves_another_version() -> None:
    for options in ((), (VERSION_COMPATIBLE,)):
        found = replace(KEY, version="10.9.0.34", options=options).mismatches(replace(KEY, version="10.13.3.9"))
        assert found == [("version", "10.9.0.34", "10.13.3.9")]


def test_the_lean_runtime_takes_version_compatible_plans_alone() -> None:
    lean = replace(KEY, library="tensorrt-lean")
    assert not replace(KEY, options=(VERSION_COMPATIBLE,)).mismatches(lean)
    assert KEY.mismatches(lean) == [("library", "tensorrt", "tensorrt-lean")]
    rtx = replace(KEY, library="tensorrt-rtx", options=(VERSION_COMPATIBLE,))
    assert rtx.mismatches(lean) == [("library", "tensorrt-rtx", "tensorrt-lean")]
    assert replace(KEY, options=(VERSION_COMPATIBLE,)).mismatches(rtx)


def test_only_a_refittable_plan_serves_other_weights() -> None:
    wanted = replace(KEY, weights="c" * 64)
    assert not replace(KEY, options=(STRIPPED, REFITTABLE)).mismatches(wanted)
    assert not replace(KEY, options=(REFITTABLE,)).mismatches(wanted)
    stripped = replace(KEY, options=(STRIPPED,))  # refitted with other weights, it computes anything
    assert stripped.mismatches(wanted) == [("weights", "b" * 64, "c" * 64)]
    assert replace(KEY, options=(REFITTABLE,)).mismatches(replace(wanted, graph="d" * 64))


def test_plans_with_fewer_options_come_first(store: PlanStore) -> None:
    for options in ((STRIPPED, REFITTABLE), (), (STRIPPED,)):
        store.put(record(replace(KEY, options=options)), PLAN)
    assert [r.key.options for r in store.fitting(KEY)] == [(), (STRIPPED,), (STRIPPED, REFITTABLE)]


# Profiles


def test_the_plan_whose_profile_has_the_sizes_is_found(store: PlanStore) -> None:
    store.put(record(replace(KEY, profiles=(SMALL,))), PLAN)
    store.put(record(replace(KEY, profiles=(SQUARE,))), PLAN)
    assert store.find(KEY, SIZES).key.profiles == (SQUARE,)
    assert store.find(KEY, {"batch": 1, "height": 32, "width": 32}).key.profiles == (SMALL,)


def test_the_plan_that_was_tuned_for_the_sizes_is_preferred(store: PlanStore) -> None:
    exact = Profile({name: (size,) * 3 for name, size in SIZES.items()})
    for profiles in ((SQUARE,), (exact,), (SQUARE, exact)):
        store.put(record(replace(KEY, profiles=profiles)), PLAN)
    found = store.find(KEY, SIZES)
    assert found.key.profiles[found.profile(SIZES)] == exact
    assert SQUARE.slack(SIZES) > exact.slack(SIZES) == 0
    assert record(replace(KEY, profiles=(SQUARE, exact))).profile(SIZES) == 1
    for wider in ({**SIZES, "batch": 3}, {**SIZES, "height": 80}):
        found = store.find(KEY, wider)
        assert found.key.profiles[found.profile(wider)] == SQUARE


def test_shapes_outside_are_answered_with_all_ranges(store: PlanStore) -> None:
    store.put(record(replace(KEY, profiles=(SMALL, SQUARE))), PLAN)
    with pytest.raises(PlanError) as caught:
        store.find(KEY, {"batch": 9, "height": 64, "width": 64})
    assert caught.value.found == "the unet was asked for batch 9, height 64, width 64"
    assert caught.value.needed == (
        "batch 1, height 32, width 32; or batch 2 to 8 (best 2), height 64 to 96 (best 64), width 64 to 96 (best 64)"
    )


def test_what_is_drawn_is_what_unet_and_vae_both_serve() -> None:
    vae = Profile({"batch": (1, 1, 4), "height": (16, 16, 80), "width": (72, 80, 96)})
    assert drawn_by([SQUARE, SMALL], [vae], 2) == (Profile({"height": (64, 64, 80), "width": (72, 72, 96)}),)
    assert drawn_by([SQUARE, SQUARE], [SQUARE, vae], 2) == drawn_by([SQUARE], [vae], 2)  # no VAE of one picture
    assert drawn_by([SQUARE], [SMALL], 2) == ()
    assert drawn_by([SQUARE], [vae], 9) == ()


def test_profiles_give_shapes_and_say_what_they_cover() -> None:
    sample = TensorSpec("sample", "float16", ("batch", 4, "height", "width"))
    assert SQUARE.shapes(sample) == ((2, 4, 64, 64), (2, 4, 64, 64), (8, 4, 96, 96))
    assert SQUARE.covers({"batch": 8})
    assert not SQUARE.covers({"batch": 9})
    both = record(replace(KEY, profiles=(SMALL, SQUARE)))
    assert both.profile(SIZES) == 1
    assert both.profile({}) == 0
    assert both.profile({**SIZES, "height": 97}) == -1


# Trust


def tamper(path: Path, change: Callable[[bytearray], None]) -> None:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


@pytest.mark.parametrize("at", [0, 255, 256, 512, 1023])
def test_any_changed_byte_of_a_plan_is_noticed(store: PlanStore, at: int) -> None:
    put = record()

    def flip(data: bytearray) -> None:
        data[at] ^= 1

    tamper(store.put(put, PLAN), flip)
    with pytest.raises(
        UntrustedPlanError,
        match=r"are not the built ones.*latentrt build \S+ --plans \S+ --remove unet-\w{16}; then build",
    ):
        store.read(put)


@pytest.mark.parametrize("change", [lambda d: d.clear(), lambda d: d.pop(), lambda d: d.append(0)])
def test_a_plan_of_another_size_is_noticed(store: PlanStore, change: Callable[[bytearray], None]) -> None:
    put = record()
    tamper(store.put(put, PLAN), change)
    with pytest.raises(UntrustedPlanError):
        store.read(put)


def test_a_missing_plan_is_named(store: PlanStore) -> None:
    put = record()
    path = store.put(put, PLAN)
    path.unlink()
    with pytest.raises(UntrustedPlanError, match=path.name):
        store.read(put)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_byte_of_a_record_is_noticed(store: PlanStore, data: st.DataObject) -> None:
    refit = {"w": Weight("unet/x.safetensors", 8, 32, "F16", "float16")}
    put = record(refit=refit, made={"seconds": 3})
    path = store.put(put, PLAN).with_name(f"{put.name}.json")
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    value = data.draw(st.integers(0, 255))
    changed = whole[:at] + bytes([value]) + whole[at + 1 :]
    path.write_bytes(changed)
    try:
        same = json.loads(changed) == json.loads(whole)
    except ValueError:
        same = False
    if same:  # white space
        assert list(store.records("unet")) == [put]
    else:
        with pytest.raises(UntrustedPlanError):
            list(store.records("unet"))


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"seal": 3}', '{"seal": "é"}', "[" * 100_000, "\xff"])
def test_what_is_no_record_is_refused(store: PlanStore, text: str) -> None:
    store.put(record(), PLAN)
    (store.folder / f"unet-{'0' * 16}.json").write_text(text, encoding="latin-1")
    with pytest.raises(UntrustedPlanError, match=r"unet-0000.*cannot be read"):
        store.find(KEY, SIZES)


def test_a_record_under_another_name_is_refused(store: PlanStore) -> None:
    put = record()
    path = store.put(put, PLAN).with_name(f"{put.name}.json")
    path.rename(path.with_name(f"unet-{'0' * 16}.json"))
    with pytest.raises(UntrustedPlanError, match=f"is the record of {put.name}"):
        store.find(KEY, SIZES)


def test_swapped_plans_are_refused(store: PlanStore) -> None:
    first, second = record(), record(replace(KEY, driver="570"), PLAN[::-1])
    one, other = store.put(first, PLAN), store.put(second, PLAN[::-1])
    one.write_bytes(PLAN[::-1])
    other.write_bytes(PLAN)
    for put in (first, second):
        with pytest.raises(UntrustedPlanError):
            store.read(put)


def test_another_machines_plans_are_refused(
    store: PlanStore, secret: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put(record(), PLAN)
    foreign = tmp_path / "foreign.key"
    foreign.write_bytes(b"x" * 32)
    foreign.chmod(0o600)
    monkeypatch.setenv("LATENTRT_SEAL", str(foreign))
    with pytest.raises(UntrustedPlanError, match="built elsewhere, or changed"):
        store.find(KEY, SIZES)
    monkeypatch.setenv("LATENTRT_SEAL", str(secret))
    assert store.find(KEY, SIZES)


def test_a_machine_without_a_secret_trusts_no_plan(store: PlanStore, secret: Path) -> None:
    store.put(record(), PLAN)
    secret.unlink()
    with pytest.raises(UntrustedPlanError, match=r"built elsewhere.*its secret \(LATENTRT_SEAL\).*--remove unet-"):
        store.find(KEY, SIZES)
    assert not secret.exists()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o666])
def test_a_secret_that_others_can_read_is_none(store: PlanStore, secret: Path, mode: int) -> None:
    store.put(record(), PLAN)
    secret.chmod(mode)
    for use in (lambda: store.find(KEY, SIZES), lambda: store.put(record(), PLAN)):
        with pytest.raises(UntrustedPlanError, match=f"has mode {mode:o}.*chmod 600"):
            use()


def test_a_short_secret_is_none(store: PlanStore, secret: Path) -> None:
    store.put(record(), PLAN)
    secret.write_bytes(b"short")
    with pytest.raises(UntrustedPlanError, match="5 bytes"):
        store.find(KEY, SIZES)


def test_the_secret_is_private_random_and_kept(store: PlanStore, secret: Path) -> None:
    store.put(record(), PLAN)
    made = secret.read_bytes()
    assert len(made) == 32
    assert secret.stat().st_mode & 0o777 == 0o600
    store.put(record(replace(KEY, driver="570")), PLAN)
    assert secret.read_bytes() == made


def test_the_secret_lies_in_the_users_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LATENTRT_SEAL")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert secret_path() == tmp_path / "latentrt" / "seal.key"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert secret_path() == tmp_path / ".local" / "state" / "latentrt" / "seal.key"


def test_an_older_schema_is_no_plan(store: PlanStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "SCHEMA", 0)
    store.put(record(), PLAN)
    monkeypatch.undo()
    monkeypatch.setenv("LATENTRT_SEAL", str(store.folder.parent / "secret" / "seal.key"))
    with pytest.raises(PlanError, match=r"schema 0.*schema 1.*build the plan again"):
        store.find(KEY, SIZES)


def test_a_bundle_cannot_lead_its_plans_out(bundle: Bundle, tmp_path: Path) -> None:
    root = tmp_path / "bundle"
    root.mkdir()
    (root / "plans").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafePathError):
        PlanStore(Bundle(root, bundle.spec, {}))


def strangers(store: PlanStore) -> dict[str, str]:
    """Records that came with a download, of every kind, and junk; each one's name with its file's text."""
    names = [f"unet-{digit * 16}" for digit in "0123"]
    texts = ["", '{"seal": "00", "key": {"network": "../../x"}, "sha256": "../../../x"}', "[]", '{"seal": 3}']
    for name, text in zip(names, texts, strict=True):
        (store.folder / f"{name}.json").write_text(text)
        (store.folder / f"{name}-{'a' * 16}.plan").write_bytes(b"evil")
    return dict(zip(names, texts, strict=True))


def test_a_survey_tells_ours_from_the_others(store: PlanStore) -> None:
    put = record()
    store.put(put, PLAN)
    names = strangers(store)
    (store.folder / "notes.json").write_text("none of ours")
    records, refused = store.survey()
    assert records == [put]
    assert set(refused) == set(names)
    assert all(isinstance(error, UntrustedPlanError) for error in refused.values())
    for name, error in refused.items():
        assert f"--plans {store.folder} --remove {name}" in error.fix


def test_a_survey_without_a_secret_knows_no_plan(store: PlanStore, secret: Path) -> None:
    store.put(record(), PLAN)
    secret.chmod(0o644)
    with pytest.raises(UntrustedPlanError, match="chmod 600"):  # it is not for the plans to go
        store.survey()
    secret.unlink()
    assert [len(each) for each in store.survey()] == [0, 1]


def test_what_is_not_ours_is_removed_by_its_name_alone(store: PlanStore) -> None:
    store.put(record(), PLAN)
    kept = set(store.folder.iterdir())
    names = strangers(store)
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


def test_a_networks_name_cannot_lead_out(bundle: Bundle, store: PlanStore) -> None:
    with pytest.raises(PlanError, match="without slashes"):
        store.put(record(replace(KEY, network="../unet")), PLAN)
    (store.folder.parent / "unet-00.json").write_text("")
    store.folder.mkdir()
    spec = replace(bundle.spec, graphs={"../unet": bundle.spec.graphs()["unet"]})
    assert PlanStore(replace(bundle, spec=spec), store.folder).survey() == ([], {})


def test_the_current_record_is_that_of_the_last_build(store: PlanStore) -> None:
    first, second = record(), record(plan=PLAN[::-1])
    store.put(first, PLAN)
    store.put(second, PLAN[::-1])
    assert store.current(first) == second
    store.remove(second.name)
    with pytest.raises(UntrustedPlanError, match="cannot be read"):
        store.current(first)


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
    assert store.read(store.find(KEY, SIZES)) == PLAN
    assert files(store) == [".json", ".plan"]


@pytest.mark.parametrize("suffix", [".plan", ".json"])
def test_a_full_disk_leaves_no_half_plan(store: PlanStore, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    full_disk(monkeypatch, suffix)
    with pytest.raises(PlanError):
        store.put(record(), PLAN)
    assert files(store) == []


def test_a_full_disk_leaves_no_half_secret(store: PlanStore, secret: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        full_disk(patch, str(secret.parent))
        with pytest.raises(PlanError, match="No space left"):
            store.put(record(), PLAN)
    assert list(secret.parent.iterdir()) == []
    store.put(record(), PLAN)
    assert list(secret.parent.iterdir()) == [secret]


def test_the_secret_of_a_faster_build_stays(store: PlanStore, secret: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(count: int) -> bytes:
        secret.write_bytes(b"a faster build's secret")
        secret.chmod(0o600)
        return bytes(count)

    monkeypatch.setattr("secrets.token_bytes", slow)
    store.put(record(), PLAN)
    assert secret.read_bytes() == b"a faster build's secret"
    assert store.read(store.find(KEY, SIZES)) == PLAN


def test_what_a_killed_build_left_half_written_is_swept(store: PlanStore) -> None:
    store.put(record(), PLAN)
    whole = set(store.folder.iterdir())
    for path in whole:
        path.with_name(f"{path.name}.123.part").write_bytes(b"half")
    others = store.folder / "film.mkv.part"
    others.write_bytes(b"somebody's download")
    store.sweep()
    assert set(store.folder.iterdir()) == {*whole, others}


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
    assert store.read(store.find(KEY, SIZES)) == PLAN
    store.put(record(plan=PLAN[::-1]), PLAN[::-1])
    assert store.read(store.find(KEY, SIZES)) == PLAN[::-1]
    assert files(store) == [".json", ".plan"]


def test_a_folder_that_cannot_be_made_is_named(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PlanError, match=r"cannot be written.*--plans FOLDER"):
        PlanStore(bundle, tmp_path / "file" / "plans").put(record(), PLAN)


def test_a_secret_that_cannot_be_made_is_named(
    store: PlanStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LATENTRT_SEAL", str(tmp_path / "file" / "seal.key"))
    with pytest.raises(PlanError, match=r"seal\.key|file"):
        store.put(record(), PLAN)


# Records


names = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), max_size=20)
whole = st.integers(0, 2**40)
ranges = st.lists(whole, min_size=3, max_size=3).map(lambda three: tuple(sorted(three)))
weights = st.builds(Weight, file=names, offset=whole, bytes=whole, stored=names, dtype=names)
json_values = st.recursive(
    st.none() | st.booleans() | whole | st.floats(allow_nan=False) | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=5,
)
keys = st.builds(
    PlanKey,
    **dict.fromkeys(("graph", "weights", "precision", "library", "version", "gpu", "driver"), names),
    network=st.sampled_from(["unet", "vae_decoder"]),
    compute_capability=names,
    options=st.lists(st.sampled_from([STRIPPED, REFITTABLE]), unique=True).map(tuple),
    profiles=st.lists(st.builds(Profile, st.dictionaries(names, ranges, max_size=3)), max_size=2).map(tuple),
)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    key=keys,
    refit=st.dictionaries(names, weights, max_size=3),
    made=st.dictionaries(names, json_values, max_size=3),
    plan=st.binary(max_size=64),
)
def test_records_come_back_as_they_were(
    store: PlanStore, key: PlanKey, refit: dict[str, Weight], made: dict[str, Any], plan: bytes
) -> None:
    put = PlanRecord(key, hashlib.sha256(plan).hexdigest(), len(plan), refit, made)
    store.put(put, plan)
    (found,) = [r for r in store.records(key.network) if r.name == put.name]
    assert found == put
    assert found.key.digest == key.digest
    assert store.read(found) == plan
    for path in store.folder.iterdir():
        path.unlink()


def test_weights_are_those_of_the_graphs_folder(bundle: Bundle) -> None:
    graphs = bundle.spec.graphs()
    unet = weights_digest(bundle, graphs["unet"])
    assert unet != weights_digest(bundle, graphs["vae_decoder"])
    assert weights_digest(bundle, graphs["vae_encoder"]) == weights_digest(bundle, graphs["vae_decoder"])
    name = "unet/diffusion_pytorch_model.safetensors"
    changed = {**bundle.files, name: replace(bundle.files[name], sha256="0" * 64)}
    assert weights_digest(replace(bundle, files=changed), graphs["unet"]) != unet
    other = {**bundle.files, "unet/config.json": replace(bundle.files["unet/config.json"], sha256="0" * 64)}
    assert weights_digest(replace(bundle, files=other), graphs["unet"]) == unet
