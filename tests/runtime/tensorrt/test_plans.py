"""The plans in a folder: which one is found, and the error where none is."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest

from latentrt.bundle.bundle import Bundle, FileRecord
from latentrt.errors import PlanError
from latentrt.runtime.tensorrt.plans import PlanStore, weights_digest
from latentrt.runtime.tensorrt.record import REFITTABLE, STRIPPED, PlanKey, Profile, Weight
from tests.support.gpu.fakes.plan_records import KEY, PLAN, SIZES, SMALL, SQUARE, find, record


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.open(check_hashes=False)


# Where plans lie


def test_plans_lie_in_the_users_cache(bundle: Bundle, cache: Path) -> None:
    store = PlanStore(bundle)
    assert store.folder.parent == cache / "latentrt" / "plans"
    assert store.folder.name.startswith(f"{bundle.spec.id}-")
    assert store.command == f"latentrt build {bundle.root}"
    assert PlanStore(bundle, store.folder).command == store.command
    assert PlanStore(bundle, "my plans").command == f"latentrt build {bundle.root} --plans 'my plans'"


def test_an_id_is_no_path(bundle: Bundle, cache: Path) -> None:
    odd = replace(bundle, spec=replace(bundle.spec, id="../some one/émoji"))
    folder = PlanStore(odd).folder
    assert folder.parent == cache / "latentrt" / "plans"
    assert folder.name.startswith("..-some-one-moji-")


def test_the_place_depends_on_the_graphs_alone(bundle: Bundle) -> None:
    """A refittable plan serves the same graphs with other weights."""

    def place(name: str) -> Path:
        return PlanStore(replace(bundle, files={**bundle.files, name: FileRecord("0" * 64, 1)})).folder

    own = PlanStore(bundle).folder
    assert place("unet/diffusion_pytorch_model.safetensors") == own
    assert place("unet/model.onnx") != own


# Which one is found


def test_what_was_put_is_found_and_read(store: PlanStore) -> None:
    made = {"seconds": 12.5, "flags": ["REFIT"]}
    refit = {"w": Weight("unet/x.safetensors", 8, 32, "F16", "float16")}
    put = record(refit=refit, made=made)
    path = store.put(put, PLAN)
    found = find(store)
    assert found == put
    assert store.read(found) == PLAN
    assert path == store.path(found)
    assert path.is_file()


def test_records_of_earlier_versions_are_read(store: PlanStore) -> None:
    """They have a seal as well, which is ignored: the user who moves them out of the bundle vouches for them."""
    store.put(record(), PLAN)
    path = store.folder / f"{record().name}.json"
    path.write_text(path.read_text().replace('"schema": 1', '"seal": "00", "schema": 1'))
    assert find(store) == record()


@pytest.mark.parametrize("name", [f.name for f in fields(PlanKey) if f.name not in ("options", "profiles")])
def test_every_field_of_a_key_counts(store: PlanStore, name: str) -> None:
    store.put(record(), PLAN)
    with pytest.raises(PlanError) as caught:
        store.fitting(replace(KEY, **{name: "other"}))
    if name == "network":
        assert "no plan of the other" in caught.value.found
    else:
        value = getattr(KEY, name)
        short = value[:12] if len(value) == 64 else value
        assert caught.value.found == f"the nearest plan of the unet was built for {name} {short}"
        assert caught.value.needed == f"{name} other"
    assert "latentrt build" in caught.value.fix


def test_nearest_plan_is_the_one_that_is_named(store: PlanStore) -> None:
    store.put(record(replace(KEY, gpu="NVIDIA A100", compute_capability="8.0")), PLAN)
    store.put(record(replace(KEY, driver="570")), PLAN)
    with pytest.raises(PlanError) as caught:
        store.fitting(KEY)
    assert caught.value.found == "the nearest plan of the unet was built for driver 570"
    assert caught.value.needed == "driver 13.0"


def test_no_folder_is_no_plan(store: PlanStore) -> None:
    with pytest.raises(PlanError, match=r"holds no plan of the unet\..*latentrt build"):
        store.fitting(KEY)
    assert store.survey() == ([], {})


def test_networks_whose_names_begin_alike_are_apart(store: PlanStore) -> None:
    store.put(record(replace(KEY, network="text_encoder_2")), PLAN)
    store.put(record(replace(KEY, network="vae-decoder")), PLAN)
    assert [len(store.survey(name)[0]) for name in ("text_encoder", "vae", "text_encoder_2")] == [0, 0, 1]
    assert len(store.survey()[0]) == 2


def test_a_plan_built_ahead_of_time_runs_on_every_gpu_of_its_capability(store: PlanStore) -> None:
    store.put(record(replace(KEY, library="tensorrt-rtx", gpu="", driver="")), PLAN)
    wanted = replace(KEY, library="tensorrt-rtx")
    assert store.fitting(replace(wanted, gpu="another", driver="13.2"))
    with pytest.raises(PlanError, match=r"compute_capability 9\.0\. Needed: compute_capability 8\.9"):
        store.fitting(replace(wanted, compute_capability="8.9"))


def test_plans_with_fewer_options_come_first(store: PlanStore) -> None:
    for options in ((STRIPPED, REFITTABLE), (), (STRIPPED,)):
        store.put(record(replace(KEY, options=options)), PLAN)
    assert [r.key.options for r in store.fitting(KEY)] == [(), (STRIPPED,), (STRIPPED, REFITTABLE)]


# Profiles


def test_the_plan_whose_profile_has_the_sizes_is_found(store: PlanStore) -> None:
    store.put(record(replace(KEY, profiles=(SMALL,))), PLAN)
    store.put(record(replace(KEY, profiles=(SQUARE,))), PLAN)
    assert find(store).key.profiles == (SQUARE,)
    assert find(store, KEY, {"batch": 1, "height": 32, "width": 32}).key.profiles == (SMALL,)


def test_the_plan_that_was_tuned_for_the_sizes_is_preferred(store: PlanStore) -> None:
    exact = Profile({name: (size,) * 3 for name, size in SIZES.items()})
    for profiles in ((SQUARE,), (exact,), (SQUARE, exact)):
        store.put(record(replace(KEY, profiles=profiles)), PLAN)
    found = find(store)
    assert found.key.profiles[found.profile(SIZES)] == exact
    assert SQUARE.slack(SIZES) > exact.slack(SIZES) == 0
    assert record(replace(KEY, profiles=(SQUARE, exact))).profile(SIZES) == 1
    for wider in ({**SIZES, "batch": 3}, {**SIZES, "height": 80}):
        found = find(store, KEY, wider)
        assert found.key.profiles[found.profile(wider)] == SQUARE


def test_shapes_outside_are_answered_with_all_ranges(store: PlanStore) -> None:
    store.put(record(replace(KEY, profiles=(SMALL, SQUARE))), PLAN)
    with pytest.raises(PlanError) as caught:
        find(store, KEY, {"batch": 9, "height": 64, "width": 64})
    assert caught.value.found == "the unet was asked for batch 9, height 64, width 64"
    assert caught.value.needed == (
        "batch 1, height 32, width 32; or batch 2 to 8 (best 2), height 64 to 96 (best 64), width 64 to 96 (best 64)"
    )


# Weights


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
