"""From a preset's samples to the figures that are reported, and the goals that they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any

from benchmarks.gpu.config import SIDES
from benchmarks.measures import Spread

BEST_OF_OURS = ("trt", "ort", "ort-loop")  # the first of them that was measured is compared with diffusers
COMPILED = tuple(side for side, about in SIDES.items() if about.compiled)
GOAL = {"preset": "sd15", "size": [512, 512], "steps": 50}  # what the absolute goals are for
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Figures:
    """One side at one batch size. One it is one step of one guided picture: two lanes of the UNet."""

    record: Mapping[str, Any]
    batch: int
    steps: int
    run: Mapping[str, Any]

    @cached_property
    def alone(self) -> dict[str, float]:
        """Milliseconds of the networks for the batch: one call each."""
        return {part: median(times) for part, times in self.record["alone_ms"].items()}

    @property
    def rounds(self) -> int:
        """The number of rounds kept."""
        return len(self.record["seconds"])

    @property
    def image_ms(self) -> Spread:
        """Milliseconds a picture, from prompts to pixels, by the wall clock."""
        return Spread.of([1000 * seconds / self.batch for seconds in self.record["seconds"]])

    @property
    def device_ms(self) -> Spread:
        """The same by CUDA events."""
        return Spread.of([each / self.batch for each in self.record["device_ms"]])

    @property
    def iterations(self) -> Spread:
        """It/s: steps of pictures a second, counting all of a picture's time, not only the loop's."""
        return Spread.of([self.batch * self.steps / seconds for seconds in self.record["seconds"]])

    @property
    def networks_ms(self) -> float:
        """The time of the batch if there were only networks."""
        return self.alone["text"] + self.steps * self.alone["unet"] + self.alone["vae"]

    @property
    def outside_ms(self) -> float:
        """The rest, by the wall clock."""
        return self.batch * self.image_ms.median - self.networks_ms

    @property
    def ratio(self) -> float:
        """The whole by the networks."""
        return self.batch * self.image_ms.median / self.networks_ms

    @property
    def share(self) -> float | None:
        """The part of the measured matrix peak that the UNet reaches."""
        peak, macs = self.run["peak"].get("tflops"), self.run["macs"].get("unet")
        if not peak or not macs:
            return None
        return float(2 * macs * 2 * self.batch / (self.alone["unet"] / 1000) / 1e12 / peak)


@dataclass(frozen=True)
class Goal:
    """A goal; `reached` is None where it was not measured."""

    text: str
    measured: str
    reached: bool | None


def figures_of(data: Mapping[str, Any], side: str, batch: int) -> Figures | None:
    """Return a side's figures; None where they were not measured."""
    record = data["sides"].get(side, {}).get(str(batch))
    if record is None or "missing" in record:
        return None
    return Figures(record, batch, data["steps"], data["runs"][record["run"]])


def why_missing(data: Mapping[str, Any], side: str, batch: int) -> str:
    """Return the reason, in one line."""
    record = data["sides"].get(side, {}).get(str(batch))
    return "It was not requested." if record is None else str(record["missing"])


def batches_of(data: Mapping[str, Any]) -> list[int]:
    """Return the batches that any side was to draw."""
    return sorted({int(batch) for part in data["sides"].values() for batch in part})


def goals(data: Mapping[str, Any] | None) -> Sequence[Goal]:
    """Return the goals of a preset's file; None has none."""
    ours, found = _ours(data)
    eager = data and figures_of(data, "diffusers", 1)
    compiled = min(_measured(data, COMPILED, 1), key=lambda f: f.image_ms.median, default=None)
    who = f", by {SIDES[ours].title}"
    result = [
        _goal(
            f"whole image at most 1.02 times its networks' time{who}", found, lambda f: f.ratio, 1.02, "times", False
        ),
        _times(f"at least 3.5 times faster than diffusers, eager{who}", found, eager, 3.5),
        _times(f"at least 1.1 times faster than diffusers, torch.compile{who}", found, compiled, 1.1),
    ]
    if data is None or all(data[key] == value for key, value in GOAL.items()):
        trt = data and figures_of(data, "trt", 1)
        ort = data and figures_of(data, "ort", 1)
        most = max(_measured(data, BEST_OF_OURS, 16), key=lambda f: f.iterations.median, default=None)
        result += [
            _goal("at least 200 it/s with TensorRT", trt, *_rate(200)),
            _goal("at least 110 it/s with ONNX Runtime, one launch", ort, *_rate(110)),
            _goal("batch 16: at least 170 it/s, by the fastest of ours", most, *_rate(170)),
        ]
    return result


def _rate(least: float) -> tuple[Callable[[Figures], float], float, str, bool]:
    """Return the rest of a goal for it/s."""
    return lambda found: found.iterations.median, least, "it/s", True


def _measured(data: Mapping[str, Any] | None, sides: Iterable[str], batch: int) -> list[Figures]:
    return [found for side in sides if data and (found := figures_of(data, side, batch))]


def _ours(data: Mapping[str, Any] | None) -> tuple[str, Figures | None]:
    for side in BEST_OF_OURS:
        found = data and figures_of(data, side, 1)
        if found:
            return side, found
    return BEST_OF_OURS[0], None


def _goal(text: str, found: Any, value: Any, bound: float, unit: str, more: bool) -> Goal:
    if not found:
        return Goal(text, NOT_MEASURED, None)
    number = value(found)
    return Goal(text, f"{number:.4g} {unit}", number >= bound if more else number <= bound)


def _times(text: str, ours: Figures | None, theirs: Any, bound: float) -> Goal:
    if not ours or not theirs:
        return Goal(text, NOT_MEASURED, None)
    ratio = theirs.image_ms.median / ours.image_ms.median
    same = "" if ours.record["run"] == theirs.record["run"] else " (in different runs)"
    return Goal(text, f"{ratio:.3g} times{same}", ratio >= bound)
