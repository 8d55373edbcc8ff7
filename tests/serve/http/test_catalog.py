"""Names, sizes and solvers; from what a client wrote to a Request."""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt.bundle.bundle import EMBEDDED, Bundle, write_manifest
from latentrt.engine import Engine
from latentrt.errors import NotServedError, PlanError, RequestError, ScheduleError
from latentrt.request import Request
from latentrt.runtime.tensorrt.record import Profile
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.solvers import EDM_SOLVERS, SOLVERS
from latentrt.serve.core.pipeline import check
from latentrt.serve.core.rules.budget import Budget, Footprint
from latentrt.serve.http.catalog import Catalog, _solver_names
from latentrt.serve.http.errors import Problem
from latentrt.serve.http.sizes import LEAST_LATENTS, Sizes, most_pixels
from latentrt.serve.process.config import Settings
from tests.support.serve.fake_engine import SHAPE
from tests.support.serve.fakes import catalog_of

CATALOG = catalog_of()
PLAIN: dict[str, Any] = {
    **dict.fromkeys(("negative_prompt", "n", "steps", "guidance", "scheduler", "seed", "class_label")),
    "size": (128, 128),
}


def test_sizes() -> None:
    for own in (None, "", "auto", "128x128"):
        assert CATALOG.sizes.of(own) == (128, 128)
    assert CATALOG.sizes.of("1536x1024") == (1536, 1024)
    assert CATALOG.sizes.of("96") == (96, 96)


@given(st.integers(0, 5000), st.integers(0, 5000))
def test_a_size_is_taken_just_if_it_is_within_the_limits(width: int, height: int) -> None:
    good = all(64 <= side <= 2048 and side % 8 == 0 for side in (width, height)) and width * height <= 1536 * 1024
    if good:
        assert CATALOG.sizes.of(f"{width}x{height}") == (width, height)
    else:
        with pytest.raises(Problem) as caught:
            CATALOG.sizes.of(f"{width}x{height}")
        assert (caught.value.code, caught.value.status, caught.value.param) == ("unsupported_size", 400, "size")


def test_a_size_beyond_the_memory_is_refused_with_the_largest_that_fits() -> None:
    """A lane of 512 x 512 may take half of the memory here: all of it, with as many latents."""
    budget = Budget(16, SHAPE, 2000, {(4, 64, 64): Footprint(1000, 0)})
    sizes = catalog_of(budget=budget).sizes
    assert sizes.most_pixels == 512 * 512
    assert sizes.of("1024x256") == (1024, 256)
    with pytest.raises(Problem, match="at most 262144 pixels, as 624x416") as refused:
        sizes.of("1536x1024")
    assert (refused.value.code, refused.value.status, refused.value.param) == ("beyond_memory", 400, "size")
    assert sizes.sides(624, 416) == (624, 416)
    with pytest.raises(Problem) as never:
        sizes.of("2048x2048")  # which no memory would help
    assert never.value.code == "unsupported_size"
    assert catalog_of(budget=Budget(16, SHAPE, 1, budget.measured)).sizes.of("auto") == (128, 128)


def test_a_second_stage_beyond_the_memory_is_refused_with_the_largest_that_fits() -> None:
    catalog = catalog_of(budget=Budget(16, SHAPE, 2000, {(4, 64, 64): Footprint(1000, 0)}))
    asked = {**PLAIN, "size": (320, 256)}
    with pytest.raises(Problem, match=r"makes 640x512.* as 568x456.* at most 1\.78") as refused:
        catalog.request("an owl", **asked, hires_scale=2.0)
    assert (refused.value.code, refused.value.param) == ("beyond_memory", "hires_scale")
    assert catalog.final_size(catalog.request("an owl", **asked, hires_scale=1.78)) == (568, 448)


def test_limits_follow_the_settings_or_the_model() -> None:
    latents = CATALOG.latents
    assert [most_pixels(latents, Settings(), times) for times in (1, 2, 4)] == [1536 * 1024, 1536 * 1024, 2048**2]
    large = replace(latents, height=300, width=300)
    assert most_pixels(large, Settings(), 1) == 2400**2
    assert Sizes(large, None, Settings(), enlarges=1).most_side == 2400
    assert most_pixels(latents, Settings(max_pixels=9), 4) == 9


@given(st.text(max_size=60))
def test_no_text_is_a_fault(text: str) -> None:
    with suppress(Problem):
        assert CATALOG.sizes.sides(*CATALOG.sizes.of(text))


@settings(deadline=None)
@given(st.integers(1, 20_000), st.integers(1, 20_000))
def test_what_fits_is_drawn(width: int, height: int) -> None:
    fitted = CATALOG.sizes.fitting(width, height)
    assert all(side % 8 == 0 and side >= 8 * LEAST_LATENTS for side in fitted)
    assert CATALOG.sizes.sides(*fitted) == fitted
    if width == height:
        assert fitted == CATALOG.sizes.own


def test_sizes_may_be_listed() -> None:
    catalog = catalog_of(sizes=("256x128", "128x256"))
    assert catalog.sizes.of("256x128") == (256, 128)
    assert (catalog.sizes.fitting(1000, 10), catalog.sizes.fitting(10, 1000)) == ((256, 128), (128, 256))
    with pytest.raises(Problem, match="256x128, 128x256") as caught:
        catalog.sizes.of("512x512")
    assert "multiples" not in str(caught.value)
    for bad in ("100x128", "100", "0x128", "axb"):
        with pytest.raises(RequestError, match="sizes"):
            catalog_of(sizes=(bad,))


def square(low: int, best: int, high: int) -> Profile:
    """Of latents; pixels are eight times as many."""
    return Profile({"height": (low, best, high), "width": (low, best, high)})


def test_plans_for_one_size_each_are_the_sizes_there_are() -> None:
    wide = Profile({"height": (8, 8, 8), "width": (16, 16, 16)})
    catalog = catalog_of(profiles=(wide, square(16, 16, 16), square(512, 512, 512)))
    assert (catalog.sizes.own, catalog.sizes.listed) == ((128, 128), ((128, 128), (128, 64)))
    assert catalog.sizes.fitting(1000, 300) == (128, 64)
    with pytest.raises(Problem, match="Needed: 128x128, 128x64"):
        catalog.sizes.of("64x64")


def test_without_a_plan_for_the_models_own_size_another_is_the_usual_one() -> None:
    catalog = catalog_of(profiles=(square(32, 64, 96),))
    assert catalog.sizes.of("auto") == (512, 512)
    with pytest.raises(PlanError, match="no size is served"):
        catalog_of(profiles=())


def test_plans_for_ranges_bound_the_sizes() -> None:
    catalog = catalog_of(profiles=(square(12, 16, 32), square(64, 64, 64)), max_pixels=300 * 300)
    assert (catalog.sizes.own, catalog.sizes.listed) == ((128, 128), ())
    assert [catalog.sizes.of(size) for size in ("96x256", "256x256")] == [(96, 256), (256, 256)]
    for size in ("88x128", "264x128", "512x512"):
        with pytest.raises(Problem, match="any sides within 96x96 to 256x256; or 512x512 to 512x512,") as caught:
            catalog.sizes.of(size)
        assert "Needed: 128x128, 256x256, or" in str(caught.value)
    assert catalog.sizes.fitting(1000, 900) == (136, 120)
    assert catalog.sizes.fitting(9000, 1000) == (256, 96)


def test_a_listed_size_needs_a_plan() -> None:
    assert catalog_of(sizes=("96x128",), profiles=(square(12, 16, 32),)).sizes.listed == ((96, 128),)
    with pytest.raises(RequestError, match="sizes has 512x512") as caught:
        catalog_of(sizes=("512x512",), profiles=(square(12, 16, 32),))
    assert "latentrt build BUNDLE --size 512x512" in caught.value.fix


def test_every_solver_and_class_has_a_name_and_works() -> None:
    for name in CATALOG.solvers:
        rows, solver = CATALOG.work(Request(prompt="", steps=12, solver=CATALOG.solver(name)))
        assert rows >= 12
        assert solver
    assert {*SOLVERS, "euler-a", "EulerDiscreteScheduler"} <= set(CATALOG.solvers)
    assert CATALOG.solver("DPMSolverMultistepScheduler") == "dpmpp-2m"
    assert CATALOG.work(Request(prompt="", steps=5, solver="heun")) == (9, "heun")


def test_the_default_solver_can_be_set() -> None:
    assert catalog_of(scheduler="euler-a").solver(None) == "euler-ancestral"
    assert CATALOG.solver(None) is None
    with pytest.raises(Problem, match="magic"):
        catalog_of(scheduler="magic")


def test_defaults_and_limits_of_a_request() -> None:
    catalog = catalog_of(steps=7, guidance=1.5, max_n=2, max_steps=9, max_prompt=5, queue=4)
    request = catalog.request("a", **PLAIN)
    assert (request.steps, request.guidance, request.count, request.width, request.height) == (7, 1.5, 1, 128, 128)
    assert 0 <= request.seed < 2**32
    for change, param in (
        ({"n": 3}, "n"),
        ({"steps": 10}, "num_inference_steps"),
        ({"negative_prompt": "abcdef"}, "negative_prompt"),
        ({"seed": 2**64}, "seed"),
    ):
        with pytest.raises(Problem) as caught:
            catalog.request("a", **{**PLAIN, **change})
        assert caught.value.param == param
    with pytest.raises(Problem, match="6 characters"):
        catalog.request("abcdef", **PLAIN)


def test_the_models_own_defaults_hold_where_the_settings_say_nothing() -> None:
    own = CATALOG.defaults
    assert (own.steps, own.guidance, own.solver, CATALOG.max_steps) == (20, 3.0, None, 150)
    assert catalog_of(steps=200).max_steps == 200
    with pytest.raises(RequestError, match="20 steps where no number is given") as caught:
        catalog_of(max_steps=10)
    assert "max_steps: 10" in caught.value.needed


def test_a_zero_guidance_is_not_a_missing_one() -> None:
    assert CATALOG.request("a", **{**PLAIN, "guidance": 0.0, "seed": 0}).guidance == 0.0


def test_what_a_solver_cannot_do_is_said_before_it_runs() -> None:
    with pytest.raises(Problem) as caught:
        CATALOG.work(Request(prompt="", steps=1001))
    assert caught.value.param == "num_inference_steps"
    with pytest.raises(ScheduleError):
        CATALOG.work(Request(prompt="", steps=5, options={"nothing": 1}))


def test_names() -> None:
    catalog: Catalog = catalog_of(model_name="mine", aliases=("other", "mine"))
    assert catalog.names == ("mine", "other")


def test_an_edm_model_offers_its_own_solvers() -> None:
    names = _solver_names(Schedule.from_config({"_class_name": "EDMEulerScheduler"}))
    assert set(names) == {*EDM_SOLVERS, *(solver.scheduler for solver in EDM_SOLVERS.values())}


def test_a_schedule_that_is_not_served_needs_a_default_solver(tmp_path: Path) -> None:
    bundle = shutil.copytree(EMBEDDED, tmp_path / "bundle")
    schedule = bundle / "scheduler" / "scheduler_config.json"
    schedule.write_text(schedule.read_text().replace("DDIMScheduler", "DEISMultistepScheduler"))
    opened = Bundle.open(EMBEDDED, check_hashes=False)
    write_manifest(bundle, opened.spec, opened.files)
    with Engine.load(bundle, threads=1) as engine:
        with pytest.raises(NotServedError, match=r"DEISMultistepScheduler is not served.*latentrt serve --scheduler"):
            catalog_of(engine.model)
        assert catalog_of(engine.model, scheduler="euler").defaults.solver == "euler"
        check(engine)
