"""From the calls of a traced solver to rows of numbers, and the memories that they share."""

from __future__ import annotations

from latentrt.errors import TraceError
from latentrt.sampling.trace import Call, x0_from

SLOTS = 4
FIX = "use another solver"


def rows_of(calls: list[Call], prediction: str) -> list[list[float]]:
    """Return the rows of a run, the columns in the order of `table.COLUMNS`.

    Args:
        calls: of the network, from `trace`.
        prediction: the schedule's prediction_type.

    Raises:
        TraceError: a row needs more than it can hold.
    """
    slots = _allocate(calls)
    noises: set[int] = set()
    rows = []
    for k, call in enumerate(calls):
        a, o = _own(call, k)
        weights, c = [0.0] * SLOTS, 0.0
        for (kind, index), value in call.leaves.terms.items():
            if kind == "m" and (index < k or call.clip):
                weights[slots[index]] = value
            elif kind == "noise":
                if c or index in noises:
                    raise TraceError(
                        f"row {k} needs two noises or an earlier one", needed="one new noise a row", fix=FIX
                    )
                noises.add(index)
                c = value
            elif index != k:
                raise TraceError(
                    f"row {k} uses {kind} of row {index}", needed="this row's own", fix="let the solver remember it"
                )
        here = call.here
        remembers = [call.p, call.q, call.clip, float(slots[k])]
        rows.append([here.timestep, here.c_in, *remembers, a, o, *weights, c, *x0_from(prediction, here)])
    return rows


def _own(call: Call, k: int) -> tuple[float, float]:
    """Return the weights of this row's x and out. The memory it writes is made of both; unless clipped it is put in
    here, where large terms that cancel do so in float64.
    """
    a, o = call.leaves[("x", k)], call.leaves[("out", k)]
    if call.clip:
        return a, o
    remembered = call.leaves[("m", k)]
    return a + remembered * call.p, o + remembered * call.q


def _allocate(calls: list[Call]) -> list[int]:
    """Return a memory slot for every call's quantity, free again after the last row that reads it."""
    last_use = list(range(len(calls)))
    for k, call in enumerate(calls):
        for kind, index in call.leaves.terms:
            if kind == "m":
                last_use[index] = k
    slots: list[int] = []
    busy_until = [-1] * SLOTS
    for k, end in enumerate(last_use):
        slot = next((slot for slot in range(SLOTS) if busy_until[slot] < k), None)
        if slot is None:
            raise TraceError(f"row {k} needs more than {SLOTS} memories", needed=f"at most {SLOTS}", fix=FIX)
        busy_until[slot] = end
        slots.append(slot)
    return slots
