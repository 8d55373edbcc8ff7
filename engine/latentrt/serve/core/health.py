"""Whether the engine can be trusted. The scheduler owns this and guards it: nothing here takes a lock."""

from __future__ import annotations

import time

from latentrt.errors import LatentrtError
from latentrt.serve.core.errors import SOON, EngineFault, NotReady, as_fault

USUAL = 64 * 64  # latents: a picture of 512 x 512 pixels, of most models
CHECK_AGAIN = 10.0  # seconds after a self-check that failed


class Health:
    """Faults, self-checks, and calls that hang.

    Args:
        hang: seconds after which a call that has not returned counts as hung; one for a large picture has more.
    """

    def __init__(self, hang: float) -> None:
        self.hang = hang
        self.fault: EngineFault | None = None
        self._check_at: float | None = 0.0  # when the next self-check is due; None where the last one passed
        # What the engine does now: since when, in usual calls. One call may be made within another, the last one.
        self._calls: dict[str, list[tuple[float, float]]] = {}
        self._hung: set[str] = set()

    @property
    def state(self) -> str:
        """Return "starting", "ready" or "failed"."""
        if self.fault is not None:
            return "failed"
        return "ready" if self._check_at is None else "starting"

    @property
    def calling(self) -> bool:
        """Whether a call is under way."""
        return bool(self._calls)

    def until_check(self) -> float | None:
        """Return the seconds until the next self-check; None where none is due. During another call none can be."""
        return None if self._check_at is None or self._calls else max(0.0, self._check_at - time.monotonic())

    def refusal(self) -> NotReady:
        """Return the refusal of requests until a self-check has passed."""
        found = "the server starts" if self.fault is None else f"the engine failed ({self.fault.found})"
        return NotReady(found, needed="a self-check that passes", fix="try again soon", retry_after=SOON)

    def suspect(self, error: LatentrtError) -> None:
        """Stop trusting the engine until a self-check has passed."""
        self.fault = self.fault or as_fault(error)
        self._check_at = 0.0

    def checked(self, error: LatentrtError | None) -> None:
        """Record the outcome of a self-check."""
        if error is None:
            self.fault, self._check_at = None, None
        else:
            self.fault, self._check_at = as_fault(error), time.monotonic() + CHECK_AGAIN

    def begin(self, call: str, area: float = 0) -> None:
        """Record that a call of the engine begins; `area` is that of the latents; infinity: it only waits."""
        self._calls.setdefault(call, []).append((time.monotonic(), max(1.0, area / USUAL)))

    def end(self, call: str) -> bool:
        """Record that a call has returned; return whether a self-check waited for that.

        The one within which it was made, if any, has its whole time again.
        """
        calls = self._calls[call]
        calls.pop()
        if calls:
            calls[-1] = time.monotonic(), calls[-1][1]
        else:
            del self._calls[call]
        self._hung.discard(call)
        return self._check_at is not None

    def found_hung(self, now: float) -> list[EngineFault]:
        """Return a fault for each call that was not yet known to hang."""
        last = {call: calls[-1] for call, calls in self._calls.items()}
        found = {call: now - since for call, (since, size) in last.items() if now - since > self.hang * size}
        new = found.keys() - self._hung
        self._hung |= new
        return [
            EngineFault(
                f"the engine's {call} has not returned for {found[call]:.1f} s",
                needed=f"{self.hang * last[call][1]:g} s",
                fix="ask again",
            )
            for call in sorted(new)
        ]

    def is_lost(self, now: float) -> bool:
        """Return whether a call that hangs has not returned after as long again."""
        return any(now - since > 2 * self.hang * size for *_, (since, size) in self._calls.values())
