"""Tables: the contents of rows, how they are applied, and which requests and solvers are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from latentrt.errors import RequestError, ScheduleError, UnknownSolverError
from latentrt.sampling.rows import SLOTS
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.solvers import ALIASES, SOLVERS
from latentrt.sampling.table import COLUMNS, Row, Table, advance, blend, noised, preview, tabulate
from tests.support.sampling.scheduler_configs import BASES, SD15, SDXL

Float64 = NDArray[np.float64]
SCHEDULE = Schedule.from_config(SD15)
TWICE = {"heun", "dpm2", "dpm2-ancestral", "dpmpp-2s-ancestral"}
# The memories that a solver may need at once, by its history.
MEMORIES = {"ddim": 1, "euler": 1, "heun": 2, "dpm2-ancestral": 2, "dpmpp-2s-ancestral": 2, "lms": 4, "pndm": 4} | {
    "dpmpp-2m": 2,
    "dpmpp-3m-sde": 3,
    "unipc": 3,
    "unipc-3": 4,
}
SEEDED = settings(deadline=None, max_examples=60)
names, steps_from_1 = st.sampled_from(sorted(SOLVERS)), st.integers(1, 40)


def table_of(name: str, steps: int = 8, **options: Any) -> Table:
    return tabulate(name, SCHEDULE, steps, **options)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 50])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_row_for_every_network_call(name: str, steps: int) -> None:
    table = table_of(name, steps)
    rows = 2 * steps - 1 if name in TWICE else steps + 1 if name == "pndm" and steps > 1 else steps
    assert len(table) == len(table.rows) == len(table.timesteps) == rows
    assert table.array.shape == (rows, len(COLUMNS))
    assert table.array.dtype == np.float64
    assert np.isfinite(table.array).all()
    assert (table.solver, table.steps) == (name, steps)


@given(names, steps_from_1)
@SEEDED
def test_known_levels_are_those_of_the_run(name: str, steps: int) -> None:
    """Down to none, each as noisy as the network's input there, except between two calls of a step."""
    table = table_of(name, steps)
    assert table.known.shape == (len(table) + 1, 2)
    np.testing.assert_array_equal(table.known[-1], [1, 0])
    shared = SOLVERS[name].calls
    for row, (alpha, sigma) in list(zip(table.rows, table.known, strict=False))[::shared]:
        assert row.c_in == pytest.approx(1 / np.hypot(alpha, sigma), rel=1e-12)


@given(st.integers(0, 2**32 - 1), st.integers(0, 8))
@SEEDED
def test_what_is_kept_is_blended_in(seed: int, row: int) -> None:
    """To the bit: the repainted part is unchanged, the kept part is the picture with its level's noise."""
    draw = np.random.default_rng(seed).standard_normal((4, 3, 5), dtype=np.float32)
    x, clean, noise, mask = draw[0], draw[1], draw[2], (draw[3] > 0).astype(np.float32)
    level = table_of("euler", 8).known[row]
    blended, known = blend(level, x, mask, clean, noise), noised(level, clean, noise)
    assert blended.dtype == known.dtype == np.float32
    np.testing.assert_array_equal(blended, np.where(mask == 1, x, known))
    np.testing.assert_allclose(known, level[0] * clean + level[1] * noise.astype(np.float64), rtol=1e-5, atol=1e-5)


@given(names, steps_from_1)
@SEEDED
def test_rows_are_the_array_by_name(name: str, steps: int) -> None:
    table = table_of(name, steps)
    for row, values in zip(table.rows, table.array, strict=True):
        flat = [*row[:8], *row.b, *row[9:]]
        np.testing.assert_array_equal(flat, values)
        assert isinstance(row.slot, int)


@given(names, steps_from_1)
@SEEDED
def test_no_memory_is_read_before_it_is_written(name: str, steps: int) -> None:
    written: set[int] = set()
    for row in table_of(name, steps).rows:
        written.add(row.slot)
        assert 0 <= row.slot < SLOTS
        assert {k for k, weight in enumerate(row.b) if weight} <= written


@pytest.mark.parametrize(("name", "memories"), MEMORIES.items())
def test_memories_needed(name: str, memories: int) -> None:
    assert len({row.slot for row in table_of(name, 20).rows}) <= memories


@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler", "euler-ancestral", "tcd", "lcm"])
def test_solvers_without_history_read_no_memory(name: str) -> None:
    """The memory that a row itself writes is put into the weights of x and out."""
    assert not any(any(row.b) for row in table_of(name, 20).rows)


def test_only_a_clipped_quantity_stays_a_memory_of_its_own_row() -> None:
    plain, clipped = table_of("ddim").rows, table_of("ddim", clip_sample=True, clip_sample_range=1.5).rows
    assert all(row.clip == 0 and not any(row.b) for row in plain)
    assert all(row.clip == 1.5 and row.b[row.slot] for row in clipped)


@given(names, steps_from_1, st.integers(0, 2**32 - 1))
@SEEDED
def test_rows_are_linear(name: str, steps: int, seed: int) -> None:
    """Advancing a sum is the sum of advances, the memories' too."""
    rng, table = np.random.default_rng(seed), table_of(name, steps)
    row = table.rows[rng.integers(len(table))]
    first, second = (rng.standard_normal((3 + SLOTS, 6)) for _ in range(2))
    both = first + second
    ours = [advance(row, v[0], v[1], v[3:], v[2]) for v in (first, second, both)]
    np.testing.assert_allclose(ours[0] + ours[1], ours[2], rtol=1e-12, atol=1e-12 * np.abs(ours[2]).max())
    np.testing.assert_allclose(first[3:] + second[3:], both[3:], rtol=1e-12, atol=1e-9)


FLOAT32 = 5e-6  # relative; the worst of 3000 runs was 1.6e-6, dpmpp-3m-sde


@given(names, steps_from_1, st.integers(0, 2**32 - 1))
@SEEDED
def test_float32_rows_stay_near_float64_rows(name: str, steps: int, seed: int) -> None:
    rng, table = np.random.default_rng(seed), table_of(name, steps)
    exact = rng.standard_normal(64) * table.start
    x, gain = exact.astype(np.float32), rng.standard_normal(64)
    memory, memory32 = np.zeros((SLOTS, 64)), np.zeros((SLOTS, 64), np.float32)
    for index, row in enumerate(table.rows):
        out = gain * np.tanh(row.c_in * exact) + index / len(table)
        noise = rng.standard_normal(64)
        exact = advance(row, exact, out, memory, noise)
        x = advance(row, x, out.astype(np.float32), memory32, noise.astype(np.float32))
        assert x.dtype == np.float32
        assert np.abs(x - exact).max() <= FLOAT32 * np.abs(exact).max()


def test_advance_changes_nothing_but_its_own_memory() -> None:
    row = table_of("dpmpp-2m").rows[3]
    x, out = np.ones((2, 3), np.float32), np.full((2, 3), 2, np.float32)
    memory = np.arange(SLOTS * 6, dtype=np.float32).reshape(SLOTS, 2, 3)
    before = memory.copy()
    after = advance(row, x, out, memory)
    assert after is not x
    assert after.dtype == np.float32
    assert (x == 1).all()
    assert (out == 2).all()
    changed = [slot for slot in range(SLOTS) if (memory[slot] != before[slot]).any()]
    assert changed == [row.slot]
    np.testing.assert_allclose(memory[row.slot], row.p * x + row.q * out, rtol=1e-6)


def test_clip_bounds_the_memory() -> None:
    row = Row(0, 1, 0, 1, 0.5, 2, 0, 0, (0, 0, 1, 0), 0, 0, 0)
    memory = np.zeros((SLOTS, 3), np.float32)
    after = advance(row, np.zeros(3, np.float32), np.array([-2, 0.25, 2], np.float32), memory)
    np.testing.assert_array_equal(after, [-0.5, 0.25, 0.5])


def test_noise_must_be_given_where_a_row_adds_it() -> None:
    row = table_of("euler-ancestral").rows[0]
    with pytest.raises(RequestError, match="adds noise"):
        advance(row, np.zeros(3, np.float32), np.zeros(3, np.float32), np.zeros((SLOTS, 3), np.float32))


@given(names, st.integers(1, 30))
@SEEDED
def test_noise_is_drawn_only_where_it_counts(name: str, steps: int) -> None:
    """A run that ends without noise adds none at its end, even where diffusers draws some and multiplies it by 0."""
    rows = table_of(name, steps).rows
    stochastic = {"ddpm", "lcm", "tcd", "euler-ancestral", "dpm2-ancestral", "dpmpp-2s-ancestral"}
    noisy = [index for index, row in enumerate(rows) if row.c]
    expected = name in stochastic or "sde" in name
    ends_in_noise = name == "ddpm"  # given a steps_offset of 1, as here, its last timestep is 1, not 0
    assert bool(noisy) == (expected and (steps > 1 or ends_in_noise))
    assert (len(rows) - 1 in noisy) == ends_in_noise


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_preview_is_the_clean_picture_predicted(prediction: str) -> None:
    """x = alpha * x0 + sigma * epsilon, and the network right: then the preview is x0 at every row."""
    rng = np.random.default_rng(0)
    x0, epsilon = rng.standard_normal((2, 16))
    settings_ = SCHEDULE.settings("DDIMScheduler", prediction_type=prediction)
    table = table_of("ddim", 10, prediction_type=prediction)
    for row in table.rows:
        alpha_cumprod = SCHEDULE.alphas_cumprod(settings_)[int(row.timestep)]
        alpha, sigma = np.sqrt(alpha_cumprod), np.sqrt(1 - alpha_cumprod)
        out = {"epsilon": epsilon, "sample": x0, "v_prediction": alpha * epsilon - sigma * x0}[prediction]
        np.testing.assert_allclose(preview(row, alpha * x0 + sigma * epsilon, out), x0, atol=1e-12)


@pytest.mark.parametrize("base", BASES)
def test_no_name_means_the_configs_own_solver(base: str) -> None:
    own = tabulate(None, Schedule.from_config(BASES[base]), 7)
    assert own.solver == {"sd15": "pndm", "emoji": "ddim", "sdxl": "euler"}[base]
    np.testing.assert_array_equal(own.array, tabulate(own.solver, Schedule.from_config(BASES[base]), 7).array)


@pytest.mark.parametrize(
    ("settings_", "name"),
    [
        ({"algorithm_type": "dpmsolver++", "solver_order": 2}, "dpmpp-2m"),
        ({"algorithm_type": "dpmsolver++", "solver_order": 3}, "dpmpp-3m"),
        ({"algorithm_type": "sde-dpmsolver++", "solver_order": 2}, "dpmpp-2m-sde"),
        ({"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, "dpmpp-3m-sde"),
        ({"solver_order": 1}, "DPMSolverMultistepScheduler"),  # no name of its own: DDIM, in DPM-Solver's words
    ],
)
def test_no_name_means_the_configs_own_settings(settings_: dict[str, Any], name: str) -> None:
    schedule = Schedule.from_config({**SDXL, "_class_name": "DPMSolverMultistepScheduler", **settings_})
    table = tabulate(None, schedule, 9)
    assert table.solver == name
    np.testing.assert_array_equal(table.array, tabulate(name, schedule, 9, **settings_).array)


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_aliases(alias: str, name: str) -> None:
    assert tabulate(alias, SCHEDULE, 5).solver == name


@pytest.mark.parametrize(
    ("solver", "near"), [("dpm++2m", "dpmpp-2m"), ("eular", "euler"), ("dimm", "ddim"), ("unipc2", "unipc")]
)
def test_an_unknown_solver_is_told_its_neighbours(solver: str, near: str) -> None:
    with pytest.raises(UnknownSolverError, match=rf"no solver '{solver.replace('+', '.')}'.*did you mean .*{near}"):
        tabulate(solver, SCHEDULE, 5)


@pytest.mark.parametrize("steps", [0, -1, True, False, 1.5, "20", None])
def test_steps_that_are_no_number_of_steps(steps: Any) -> None:
    with pytest.raises(RequestError, match="steps is"):
        tabulate("ddim", SCHEDULE, steps)


@pytest.mark.parametrize("name", sorted(set(SOLVERS) - {"lcm", "tcd"}))
def test_more_steps_than_the_model_was_trained_on(name: str) -> None:
    with pytest.raises(RequestError, match="1001 steps"):
        tabulate(name, SCHEDULE, 1001)


@pytest.mark.parametrize("name", ["lcm", "tcd"])
def test_more_steps_than_the_model_was_distilled_on(name: str) -> None:
    with pytest.raises(RequestError, match="51 steps of 50 original_inference_steps"):
        tabulate(name, SCHEDULE, 51)


@pytest.mark.parametrize(
    ("name", "option", "value", "message"),
    [
        ("ddim", "karras", True, "'karras' is not an option of DDIMScheduler"),
        ("euler", "use_karas_sigmas", True, "did you mean use_karras_sigmas"),
        ("euler", "eta", 0.5, "'eta' is not an option"),
        ("ddim", "eta", 1.5, "eta = 1.5"),
        ("ddim", "eta", -0.1, "eta = -0.1"),
        ("tcd", "eta", True, "eta = True"),
        ("tcd", "eta", "0.3", "eta = '0.3'"),
        ("tcd", "eta", float("nan"), "eta = nan"),
        ("lms", "order", 0, "order = 0"),
        ("lms", "order", 5, "order = 5"),
        ("lms", "order", True, "order = True"),
        ("lms", "order", 2.0, "order = 2.0"),
    ],
)
def test_options_that_a_solver_has_not(name: str, option: str, value: Any, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        tabulate(name, SCHEDULE, 5, **{option: value})
