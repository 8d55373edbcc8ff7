"""A sampling run as data: one row for every network call.

    memory[slot] = clip(p·x + q·out)
    x            = a·x + o·out + Σₖ bₖ·memory[k] + c·noise
    next input   = c_in·x                          (of the next row)
    preview x₀   = u·x + v·out

A run that keeps a part of a given picture ends every row with

    x            = mask·x + (1 - mask)·(known[0]·picture + known[1]·noise)

`tabulate` makes the table by tracing the solver; `advance` applies one row to arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from latentrt.errors import LatentrtError, RequestError, ScheduleError, UnknownSolverError
from latentrt.sampling.rows import SLOTS, rows_of
from latentrt.sampling.schedule import Float64, Schedule
from latentrt.sampling.solvers import ALIASES, EVERY_SOLVER, SOLVERS, Solver
from latentrt.sampling.spacing import CLEAN, DISTILLED_PART, Grid
from latentrt.sampling.trace import trace
from latentrt.values import did_you_mean, is_number

Float32 = NDArray[np.float32]
COLUMNS = (
    *("timestep", "c_in", "p", "q", "clip", "slot", "a", "o"),
    *(f"b{k}" for k in range(SLOTS)),
    *("c", "u", "v"),
)


class Row(NamedTuple):
    """Everything one network call needs to know; see the module's equations.

    `timestep` is the network's input and `c_in` the factor of x before the call. `clip` is the largest magnitude that
    a memory may have, 0 for no bound. `slot` is the memory that is written, `b` weighs the four memories. All are
    numbers without units; x is in units of the latents' standard deviation.
    """

    timestep: float
    c_in: float
    p: float
    q: float
    clip: float
    slot: int
    a: float
    o: float
    b: tuple[float, ...]
    c: float
    u: float
    v: float


@dataclass(frozen=True)
class Table:
    """The rows of a whole run, or of the rest of one that begins on a given picture.

    `array` has shape (rows, len(COLUMNS)) and dtype float64; kernels read it as float32. `start` is what standard
    normal noise is multiplied by to become the first latents. A row is a network call, not a step: Heun at N steps has
    2N - 1 rows. `sigmas`, (rows,) float64, is the noise in what the network gets, relative to the signal. `known`,
    (rows + 1, 2) float64, has the weights of clean latents and of noise that make latents of the level before the first
    row, and after each row (`noised`). `scalars` are further columns by name, (rows,) float64: inputs of the network
    that are one number for each lane, as the timestep is. `shallow` says of each row whether it uses the network's deep
    features of an earlier row again; empty where none does.
    """

    solver: str
    steps: int
    start: float
    array: NDArray[np.float64]
    sigmas: NDArray[np.float64]
    known: NDArray[np.float64]
    scalars: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    shallow: tuple[bool, ...] = ()

    def __len__(self) -> int:
        return len(self.array)

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The rows as `Row`s, in the order of the run."""
        return tuple(_row(*values) for values in self.array.tolist())

    @property
    def timesteps(self) -> NDArray[np.float64]:
        """The network's timestep at each row, shape (rows,)."""
        return self.array[:, 0]


def _row(
    timestep: float, c_in: float, p: float, q: float, clip: float, slot: float, a: float, o: float, *rest: float
) -> Row:
    return Row(timestep, c_in, p, q, clip, int(slot), a, o, rest[:SLOTS], *rest[SLOTS:])


@dataclass(frozen=True, slots=True)
class Kept:
    """The part of a given picture that a job keeps: see `blend`.

    All three have the latents' shape, float32: `mask` is 1 where the picture is repainted and 0 elsewhere, `clean` are
    its latents, `noise` brings them to any level.
    """

    mask: Float32
    clean: Float32
    noise: Float32


def tabulate(
    solver: str | None,
    schedule: Schedule,
    steps: int,
    *,
    strength: float = 1.0,
    keeps_steps: bool = False,
    denoising_start: float = 0.0,
    denoising_end: float = 1.0,
    **options: Any,
) -> Table:
    """Return the table of a solver over a schedule.

    Args:
        solver: a name of `EVERY_SOLVER`; None, or the class itself, for the one that the schedule's config names.
        schedule: from `Schedule.from_config`.
        steps: how many steps, 1 or more; the table has a row for each network call.
        strength: how much of the run is made, above 0 to 1: its last int(steps * strength) steps, as diffusers counts.
        keeps_steps: whether lcm makes all steps at any strength, on the lower part of the distilled timesteps, as
            LatentConsistencyModelImg2ImgPipeline does.
        denoising_start, denoising_end: the part of the schedule that is run, from 0, noise, to 1, clean latents: what
            another model did before, or does afterwards, on the same steps. With a start, the strength does not count.
        options: the solver's own arguments (`eta`, `order`) and any setting of its diffusers class
            (`use_karras_sigmas=True`, `timestep_spacing="trailing"`, ...), which overrule the config.

    Returns:
        Table, its `array` float64 of shape (rows, 15).

    Raises:
        UnknownSolverError: no such solver.
        RequestError: steps < 1 or more than the schedule has; a strength out of range, or one that leaves no step.
        ScheduleError: an option that the solver does not have, settings that have no finite table, or a solver that
            cannot begin midway.

    Source:
        each solver's paper, named in `latentrt.sampling.solvers`; parity with diffusers 0.42 holds to 1e-5 in float32.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise RequestError(f"steps is {steps!r}", needed="a whole number of 1 or more")
    name, chosen = _find(solver, schedule)
    respaced = keeps_steps and chosen.scheduler == "LCMScheduler"
    if denoising_start:
        first = _first_below(_cutoff(schedule, denoising_start), tabulate(solver, schedule, steps, **options), chosen)
        _check_midway(name, chosen, first)
    else:
        first = _first(name, chosen, steps, strength, respaced=respaced)
    arguments = {**chosen.arguments, **{key: value for key, value in options.items() if key in chosen.arguments}}
    wanted = {key: value for key, value in options.items() if key not in chosen.arguments}
    _check_arguments(name, arguments)
    settings = schedule.settings(chosen.scheduler, **{**chosen.settings, **wanted})
    settings |= {DISTILLED_PART: strength} if respaced else {}
    try:
        grid = chosen.grid(schedule, settings, steps).since(first)
        array, sigmas = _array(chosen, grid, arguments)
    except LatentrtError:
        raise
    except (ArithmeticError, ValueError) as error:
        if not _is_arithmetic(error):
            raise
        raise ScheduleError(
            f"{name} at {steps} steps has no finite coefficients: two levels coincide, or one holds no signal",
            needed="distinct levels, and v_prediction or sample prediction where the signal is zero",
            fix="take fewer steps, or another timestep_spacing, final_sigmas_type or sigmas",
        ) from error
    table = Table(name, steps, grid.start, array, sigmas, _known(grid, len(array), chosen.calls))
    return table if denoising_end == 1 else _above(_cutoff(schedule, denoising_end), table)


def _cutoff(schedule: Schedule, part: float) -> int:
    """Return the training timestep at which a part of the schedule ends, as diffusers' SDXL pipelines count."""
    if not is_number(part) or not 0 < part < 1:
        raise RequestError(f"a part of the denoising is {part!r}", needed="a number between 0 and 1")
    trained = int(schedule.config.get("num_train_timesteps", 1000))
    return round(trained - part * trained)


def _first_below(cutoff: int, whole: Table, solver: Solver) -> int:
    """Return the step with which the rows below a timestep begin. Raise RequestError where there are none.

    A step of two rows of which one is above is run again: diffusers does that.
    """
    left = int((whole.timesteps < cutoff).sum())
    if not left:
        raise RequestError(f"no row is below timestep {cutoff}", needed="one or more", fix="take more steps")
    points = -(-len(whole) // solver.calls)
    return points - (left // solver.calls + solver.calls - 1)


def _above(cutoff: int, table: Table) -> Table:
    """Return the first rows, those that are not below a timestep. Raise RequestError where there are none."""
    rows = int((table.timesteps >= cutoff).sum())
    if not rows:
        raise RequestError(f"no row is above timestep {cutoff}", needed="one or more", fix="take more steps")
    return replace(table, array=table.array[:rows], sigmas=table.sigmas[:rows], known=table.known[: rows + 1])


def _first(name: str, solver: Solver, steps: int, strength: float, *, respaced: bool) -> int:
    """Return how many steps of the whole run are left out."""
    if not is_number(strength) or not 0 < strength <= 1:
        raise RequestError(f"strength is {strength!r}", needed="a number above 0 and at most 1")
    first = 0 if respaced else steps - int(steps * strength)
    if first == steps:
        raise RequestError(
            f"a strength of {strength:g} leaves none of {steps} steps",
            needed=f"1 / {steps} or more",
            fix="raise strength, or take more steps",
        )
    _check_midway(name, solver, first)
    return first


def _check_midway(name: str, solver: Solver, first: int) -> None:
    if first and solver.only_whole:
        raise ScheduleError(
            f"{name} cannot begin midway ({solver.only_whole})",
            needed="a whole run or another solver",
            fix="take dpmpp-2m",
        )


def _known(grid: Grid, rows: int, calls: int) -> NDArray[np.float64]:
    """Return `Table.known`. All calls of a step share the level that it leads to, as in diffusers: the next point, also
    for those classes whose own target is another.
    """
    levels = [*grid.points, CLEAN]
    ends = (min(row // calls + 1, len(levels) - 1) for row in range(rows))
    return np.array([(levels[end].alpha, levels[end].sigma) for end in (0, *ends)])


def _is_arithmetic(error: Exception) -> bool:
    """Return whether arithmetic failed; `math` raises a plain ValueError where a logarithm or root does not exist."""
    if isinstance(error, (ArithmeticError, np.linalg.LinAlgError)):
        return True
    return str(error).startswith(("math domain error", "expected a positive", "expected a nonnegative"))


def _array(solver: Solver, grid: Grid, arguments: Mapping[str, Any]) -> tuple[Float64, Float64]:
    clip = float(grid.settings["clip_sample_range"]) if grid.settings.get("clip_sample") else 0.0
    calls = trace(solver, grid, clip, arguments)
    array = np.array(rows_of(calls, grid.settings["prediction_type"]))
    if not np.isfinite(array).all():
        raise OverflowError("a coefficient is not finite")
    return array, np.array([call.here.ratio for call in calls])


def advance(row: Row, x: Float32, out: Float32, memory: Float32, noise: Float32 | None = None) -> Float32:
    """Apply one row.

    Args:
        row: the row of this network call.
        x: latents before the call, any shape, float32.
        out: the (guided) network output for input `row.c_in * x`, same shape.
        memory: (4, *x.shape) float32; slot `row.slot` is overwritten. Slots never written are never read.
        noise: standard normal, same shape; needed only where `row.c` is not 0.

    Returns:
        The latents after the step, a new array of x's shape and dtype.

    Raises:
        RequestError: the row adds noise and none was given.
    """
    remembered = row.p * x + row.q * out if row.p else row.q * out
    memory[row.slot] = np.clip(remembered, -row.clip, row.clip) if row.clip else remembered
    result = row.a * x
    if row.o:
        result += row.o * out
    for weight, slot in zip(row.b, memory, strict=True):
        if weight:
            result += weight * slot
    if row.c:
        if noise is None:
            raise RequestError(
                "the row adds noise and none was given", needed="standard normal noise", fix="pass noise="
            )
        result += row.c * noise
    return result


def noised(level: NDArray[np.float64], clean: Float32, noise: Float32) -> Float32:
    """Return clean latents brought to a level, a row of `Table.known`: level[0]·clean + level[1]·noise."""
    alpha, sigma = level.tolist()  # Python's floats keep the arrays float32
    return np.asarray(alpha * clean + sigma * noise)


def blend(level: NDArray[np.float64], x: Float32, mask: Float32, clean: Float32, noise: Float32) -> Float32:
    """Put back the kept part after a row, brought to that row's end: mask·x + (1 - mask)·noised(clean).

    Args:
        level: of `Table.known`, the row's own index plus one.
        x: latents after the row.
        mask: 1 where the picture is repainted, 0 where it is kept, and nothing between: solvers eliminate earlier
            latents as if the row had left x as it is, which holds where the mask is 1 and is overwritten where it is 0.
        clean, noise: the given picture's latents, and the one noise of the whole run.
    """
    return mask * x + (1 - mask) * noised(level, clean, noise)


def preview(row: Row, x: Float32, out: Float32) -> Float32:
    """Return the clean latents that the network predicts at this row: the picture if the run ended here."""
    return row.u * x + row.v * out


def _find(solver: str | None, schedule: Schedule) -> tuple[str, Solver]:
    if solver is None or solver == schedule.scheduler:
        return _configured(schedule)
    name = ALIASES.get(solver, solver)
    if name not in EVERY_SOLVER:
        raise UnknownSolverError(
            f"there is no solver {solver!r}",
            needed=f"one of {', '.join(SOLVERS)}",
            fix=did_you_mean(solver, [*SOLVERS, *ALIASES]),
        )
    return name, EVERY_SOLVER[name]


def _configured(schedule: Schedule) -> tuple[str, Solver]:
    """Return the solver of the config's class: by name if one fixes just its settings, else by the class's name."""
    settings = schedule.settings(schedule.scheduler)
    candidates = {name: s for name, s in EVERY_SOLVER.items() if s.scheduler == schedule.scheduler}
    for name, solver in candidates.items():
        if all(settings[key] == value for key, value in solver.settings.items()):
            return name, solver
    solver = next(iter(candidates.values()))
    return schedule.scheduler, replace(solver, settings={})


def _check_arguments(name: str, arguments: Mapping[str, Any]) -> None:
    for key, most in (("eta", 1), ("s_noise", 10)):
        if not is_number(value := arguments.get(key, 0.0)) or not 0 <= value <= most:
            raise ScheduleError(f"{name} has {key} = {value!r}", needed=f"a number from 0 to {most}")
    order = arguments.get("order", 1)
    if isinstance(order, bool) or not isinstance(order, int) or not 1 <= order <= SLOTS:
        raise ScheduleError(f"{name} has order = {order!r}", needed=f"a whole number from 1 to {SLOTS}")
