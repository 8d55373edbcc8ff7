"""How long a tick takes by the lanes it has, and what pictures take of memory, as `latentrt bench --save` measured it.

A server refines the times by every tick. The file is with the bundle, `curves/<key>.json`; where that cannot be
written, in the user's cache. The key is a hash of the bundle, the machine and the backend, so that one folder may serve
several machines. It is not in the manifest: what a machine measures does not belong to a model.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from latentrt.bundle.bundle import MANIFEST, sha256_of
from latentrt.engine import Engine
from latentrt.errors import BundleError, OutputError
from latentrt.runtime.machine.cores import usable_cores
from latentrt.serve.core.measured.footprint import LARGE, measured
from latentrt.serve.core.pipeline import GUIDED, Shape
from latentrt.serve.core.rules.budget import Footprint
from latentrt.storage import cache_folder, write_atomic
from latentrt.values import is_number, is_whole

SCHEMA = 1
PAYS = 0.9  # the part of the best throughput that is enough
NEWS = 0.1  # the weight of a server's newest tick
FIX = "measure again: latentrt bench BUNDLE --save"


@dataclass(slots=True)
class Curve:
    """Seconds by latent shape (channels, height, width).

    Attributes:
        ticks: seconds of a tick, by its lanes.
        decode: seconds of one picture's VAE decoding.
        memory: bytes that pictures take.
    """

    ticks: dict[Shape, dict[int, float]] = field(default_factory=dict)
    decode: dict[Shape, float] = field(default_factory=dict)
    memory: dict[Shape, Footprint] = field(default_factory=dict)

    def seconds(self, shape: Shape, lanes: int) -> float | None:
        """Return the seconds of a tick: interpolated between measured points, in proportion to the lanes beyond them.

        A shape that was never measured counts by its pixels beside the nearest one; None where nothing was measured.
        """
        known = _nearest(self.ticks, shape)
        if known is None:
            return None
        points = self.ticks[known]
        measured = sorted(points)
        seconds = float(np.interp(lanes, measured, [points[each] for each in measured]))
        return seconds * max(1.0, lanes / measured[-1]) * math.prod(shape) / math.prod(known)

    def decoding(self, shape: Shape) -> float:
        """Return the seconds of a picture's decoding; 0 where none was measured."""
        known = _nearest(self.decode, shape)
        return 0.0 if known is None else self.decode[known] * math.prod(shape) / math.prod(known)

    def cap(self, shape: Shape, most: int) -> int:
        """Return the most lanes of this shape that a tick should have, from 2 to `most`.

        They are the fewest that give nine tenths of the best measured throughput: with more, all pictures in the batch
        would take longer for little. A shape that was never measured fills the device earlier or later, by its pixels.
        Where nothing was measured, all lanes are used.
        """
        known = _nearest(self.ticks, shape)
        if known is None:
            return most
        speeds = {lanes: lanes / seconds for lanes, seconds in self.ticks[known].items()}
        enough = min(lanes for lanes, speed in speeds.items() if speed >= PAYS * max(speeds.values()))
        scaled = int(enough * math.prod(known) / math.prod(shape))
        return max(min(GUIDED, most), min(most, scaled))

    def learn(self, shape: Shape, lanes: int, seconds: float) -> None:
        """Learn from a tick of a running server, with a weight of a tenth."""
        points = self.ticks.setdefault(shape, {})
        points[lanes] = points.get(lanes, seconds) * (1 - NEWS) + seconds * NEWS


def _nearest(known: Mapping[Shape, Any], shape: Shape) -> Shape | None:
    """Return the known shape that is nearest in size."""
    size = math.prod(shape)
    return min(known, key=lambda other: abs(math.log(math.prod(other) / size)), default=None)


def of_bench(engine: Engine, results: Mapping[str, Any]) -> Curve:
    """Return the curve in what `command.bench.measure` returned: of pictures of the model's own size, with guidance
    where there is any; and what larger pictures take of memory.

    Where every call has all lanes there is one point.
    """
    shape, each = engine.spec.latents.shape_of(None, None), engine.model.most_lanes
    ticks = {each * row["batch"]: row["step_ms"][1] / 1000 for row in results["batches"]}
    if engine.backend.facts.fixed_lanes:
        ticks = {engine.denoiser.lanes: min(ticks.values())}
    decode = min(row["decode_ms"] for row in results["batches"]) / 1000
    return Curve({shape: ticks}, {shape: decode}, measured(engine, LARGE))


def save(curve: Curve, engine: Engine) -> Path:
    """Write a curve where `load` finds it: with the bundle, or in the user's cache where the bundle is read-only.

    Raises:
        OutputError: neither can be written.
    """
    text = json.dumps({"schema": SCHEMA, **_about(engine), **_to_dict(curve)}, indent=1) + "\n"
    first, last = paths(engine)
    with suppress(OSError):
        write_atomic(first, text.encode())
        return first
    try:
        write_atomic(last, text.encode())
    except OSError as error:
        raise OutputError(
            f"{last} cannot be written ({error.strerror or error})",
            needed="a bundle or a cache folder that can be written to",
            fix="make room, or point XDG_CACHE_HOME elsewhere",
        ) from error
    return last


def load(engine: Engine) -> Curve | None:
    """Return the curve that was saved for this bundle, machine and backend; None where there is none.

    Raises:
        BundleError: there is one and it cannot be read.
    """
    for path in paths(engine):
        try:
            return _from_dict(json.loads(path.read_bytes()))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BundleError(
                f"{path} cannot be read ({error!r})", needed=f"a curve of schema {SCHEMA}", fix=FIX
            ) from error
    return None


def paths(engine: Engine) -> tuple[Path, Path]:
    """Return where the curve of an engine may be: with the bundle, and in the user's cache."""
    about = _about(engine)
    key = json.dumps(about, sort_keys=True) + sha256_of(engine.bundle.root / MANIFEST)
    name = f"{about['backend']}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    return engine.bundle.root / "curves" / name, cache_folder("curves") / name


def _about(engine: Engine) -> dict[str, Any]:
    """Return what a curve holds for."""
    backend, model = engine.backend, engine.bundle.base.spec.id  # LoRAs change no time
    device = backend.device if backend.gpu is None else backend.gpu.name
    return {
        **{"model": model, "backend": backend.name, "device": device, "precision": backend.precision},
        "machine": _machine(),
    }


def _machine() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {usable_cores()} cores"


def _to_dict(curve: Curve) -> dict[str, Any]:
    ticks = [
        {"shape": list(shape), "lanes": lanes, "seconds": seconds}
        for shape, points in curve.ticks.items()
        for lanes, seconds in sorted(points.items())
    ]
    decode = [{"shape": list(shape), "seconds": seconds} for shape, seconds in curve.decode.items()]
    memory = [{"shape": list(shape), **each._asdict()} for shape, each in curve.memory.items()]
    return {"ticks": ticks, "decode": decode, "memory": memory}


def _from_dict(data: dict[str, Any]) -> Curve:
    if data["schema"] != SCHEMA:
        raise ValueError(f"schema {data['schema']!r}")
    curve = Curve()
    for point in data["ticks"]:
        curve.ticks.setdefault(_shape(point), {})[point["lanes"]] = point["seconds"]
    for point in data["decode"]:
        curve.decode[_shape(point)] = point["seconds"]
    for point in data.get("memory", ()):  # curves of older versions have none
        lane, decode = (point[name] for name in Footprint._fields)
        if not all(is_whole(each) and each >= 0 for each in (lane, decode)):
            raise ValueError(f"{point} where whole numbers should be")
        curve.memory[_shape({**point, "seconds": 1})] = Footprint(lane, decode)
    return curve


def _shape(point: dict[str, Any]) -> Shape:
    """Return the shape of a point whose numbers are all as they should be."""
    channels, height, width = point["shape"]
    wholes = [channels, height, width, point.get("lanes", 1)]
    if not all(is_whole(one) and one > 0 for one in wholes) or not is_number(point["seconds"]) or point["seconds"] <= 0:
        raise ValueError(f"{point} where numbers above 0 should be")
    return channels, height, width
