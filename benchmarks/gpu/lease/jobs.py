"""The jobs of a lease, in order of worth."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.gpu.variants import VARIANTS

OTHERS = {"sd15": ("sd21", "sdxl")}  # presets that are measured after this one
PROFILE, VARIANT, PICTURES, DRIFT, LORAS = "profile", "variant", "pictures", "drift", "loras"
SIDES_OF_OTHERS = ("ort", "diffusers")


@dataclass(frozen=True, slots=True)
class Job:
    """A piece of work.

    Attributes:
        kind: PROFILE, VARIANT, PICTURES, DRIFT or LORAS.
        limit: in seconds, the start of its process included.
        what: a variant, empty for the best of those that were measured; of PICTURES a side.
        count: of PICTURES the batch, of DRIFT the steps.
        level: of TensorRT's plans; None is TensorRT's own.
    """

    preset: str
    kind: str
    limit: float
    what: str = ""
    count: int = 1
    level: int | None = None

    @property
    def name(self) -> str:
        """The name in the results, for the one preset."""
        if self.kind == DRIFT:
            return f"drift over {self.count} steps"
        if self.kind == PICTURES:
            return f"{self.what}, batch {self.count}" + ("" if self.level is None else f", level {self.level}")
        return f"{self.kind} {self.what or 'of the best'}"

    @property
    def uses_best(self) -> bool:
        """Whether it measures the best variant, so that it is done again when another one is best."""
        return self.kind == DRIFT or self.what in ("", "ort")


def jobs_of(preset: str, *, alone: bool = False) -> Iterator[Job]:
    """Yield the jobs for a preset, and unless it is `alone` for those that are measured after it."""

    def pictures(side: str, limit: float, batch: int = 1, level: int | None = None) -> Job:
        return Job(preset, PICTURES, limit, side, batch, level)

    yield Job(preset, PROFILE, 60, "plain")
    for name in VARIANTS:
        yield Job(preset, VARIANT, 120 if name == "exhaustive" else 60, name)
    yield pictures("ort", 90)
    yield Job(preset, PROFILE, 60)
    yield pictures("diffusers", 120)
    yield pictures("compile-regional", 240)
    for batch in (16, 8, 4):  # there is a goal for the first
        yield pictures("ort", 150, batch)
        yield pictures("diffusers", 180, batch)
    yield Job(preset, LORAS, 180, "by rank")
    for steps in (20, 50):
        yield Job(preset, DRIFT, 150, count=steps)
    for other in () if alone else OTHERS.get(preset, ()):
        for side in SIDES_OF_OTHERS:
            yield Job(other, PICTURES, 240, side)
    yield pictures("compile", 480)
    yield pictures("trt", 300, level=1)  # built within a minute or two, and timed, before the long build begins
    yield pictures("trt", 480)
