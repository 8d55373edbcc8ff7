"""A plan's description: the shapes that it serves, the key of everything it depends on, and its record."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import reduce
from itertools import product
from typing import Any

from latentrt.bundle.spec import TensorSpec, dimension

SCHEMA = 1
STRIPPED, REFITTABLE, VERSION_COMPATIBLE = "stripped", "refittable", "version-compatible"
LEVEL = "optimization-level-"  # an option, with the number behind it
USUAL_LEVEL = 3  # TensorRT's own, where none is asked for
Range = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Profile:
    """The shapes of one optimization profile: ranges (least, best, most) of the names in its dimensions."""

    ranges: Mapping[str, Range]

    def covers(self, sizes: Mapping[str, int]) -> bool:
        """Return whether every size lies in its range."""
        return all(self.ranges[name][0] <= size <= self.ranges[name][2] for name, size in sizes.items())

    def slack(self, sizes: Mapping[str, int]) -> int:
        """Return how far sizes are from the best ones plus how wide the ranges are; at 0 a plan is fastest."""
        ranges = [(self.ranges[name], size) for name, size in sizes.items()]
        return sum(abs(size - best) + most - least for (least, best, most), size in ranges)

    def side(self, side: int | str) -> Range:
        """Return the (least, best, most) of a dimension: a number, a name, or a product of one ("8*height")."""
        if isinstance(side, int):
            return side, side, side
        symbol = dimension(side)
        least, best, most = map(symbol.of, self.ranges[symbol.name])
        return least, best, most

    def shapes(self, tensor: TensorSpec) -> tuple[tuple[int, ...], ...]:
        """Return a tensor's (least, best, most) shapes."""
        return tuple(tuple(self.side(side)[which] for side in tensor.shape) for which in range(3))

    def __str__(self) -> str:
        return ", ".join(
            f"{name} {low}" if low == high else f"{name} {low} to {high} (best {best})"
            for name, (low, best, high) in self.ranges.items()
        )


def drawn_by(networks: Sequence[tuple[Iterable[Profile], int]]) -> tuple[Profile, ...]:
    """Return the latents' sizes ("height", "width") that all networks serve, each once; of each its profiles, and the
    batch that it is called with.
    """
    found: list[Profile] = []
    batches = [batch for _, batch in networks]
    for profiles in product(*(own for own, _ in networks)):
        if all(one.covers({"batch": batch}) for one, batch in zip(profiles, batches, strict=True)):
            shared = {side: reduce(_shared, [one.ranges[side] for one in profiles]) for side in ("height", "width")}
            profile = Profile(shared)
            if all(low <= high for low, _, high in shared.values()) and profile not in found:
                found.append(profile)
    return tuple(found)


def _shared(one: Range, other: Range) -> Range:
    low, high = max(one[0], other[0]), min(one[2], other[2])
    return low, max(low, min(one[1], high)), high


@dataclass(frozen=True, slots=True)
class PlanKey:
    """Everything a plan depends on.

    Attributes:
        graph, weights: SHA-256.
        precision: "fp16" or "fp32".
        library: "tensorrt", "tensorrt-rtx" or "tensorrt-lean"; `version` is its version.
        gpu, driver: empty in a plan of TensorRT-RTX, which compiles kernels where the plan runs.
        options: STRIPPED: its weights were left out and are read from the bundle. REFITTABLE: it takes any weights; one
            that is only stripped takes those that it was built with. VERSION_COMPATIBLE: the lean runtime runs it.
            LEVEL and a number: how hard TensorRT looked for fast kernels.
        profiles: the shapes that it serves; empty in the key of a wanted plan.
    """

    network: str
    graph: str
    weights: str
    precision: str
    library: str
    version: str
    gpu: str
    compute_capability: str
    driver: str
    options: tuple[str, ...] = ()
    profiles: tuple[Profile, ...] = ()

    @property
    def name(self) -> str:
        """The name of its plan's record, without suffix: the network and a hash of the whole key."""
        key = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return f"{self.network}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"

    @property
    def level(self) -> int:
        """How hard TensorRT looked for fast kernels, 0 to 5."""
        asked = [int(option.removeprefix(LEVEL)) for option in self.options if option.startswith(LEVEL)]
        return asked[0] if asked else USUAL_LEVEL

    @property
    def preference(self) -> tuple[int, int]:
        """Sorts plans that serve the same: fewest flags first, since each may cost speed, then the highest level."""
        return sum(not option.startswith(LEVEL) for option in self.options), -self.level

    def mismatches(self, wanted: PlanKey) -> list[tuple[str, str, str]]:
        """Return the differences that keep a plan of this key from serving `wanted`, as (what, found, needed).

        A refittable plan takes its weights from the bundle, so those need not match. A version-compatible one also
        serves the lean runtime of the version that built it; other versions would need host code in the plan.
        """
        found = []
        hardware = ("compute_capability", "gpu", "driver")
        for what in ("network", "graph", "weights", "precision", "library", "version", *hardware):
            mine, theirs = getattr(self, what), getattr(wanted, what)
            if mine != theirs and not self._may_differ(what, mine, theirs):
                found.append((what, mine, theirs))
        return found

    def _may_differ(self, what: str, mine: str, theirs: str) -> bool:
        if what in ("gpu", "driver"):
            return not mine
        if what == "weights":
            return REFITTABLE in self.options
        if what == "library":
            return VERSION_COMPATIBLE in self.options and (mine, theirs) == ("tensorrt", "tensorrt-lean")
        return False


@dataclass(frozen=True, slots=True)
class Weight:
    """Where a refittable weight lies: `bytes` at `offset` of a safetensors file of the bundle.

    `stored` is its dtype there (safetensors' name, "F16"), `dtype` the one that the plan wants (numpy's name).
    """

    file: str
    offset: int
    bytes: int
    stored: str
    dtype: str


@dataclass(frozen=True, slots=True)
class PlanRecord:
    """A plan's key, its size and hash, where a stripped one finds its weights, and how it was made."""

    key: PlanKey
    sha256: str
    bytes: int
    refit: Mapping[str, Weight] = field(default_factory=dict)
    made: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """See `PlanKey.name`."""
        return self.key.name

    def profile(self, sizes: Mapping[str, int]) -> int:
        """Return the index of the profile that serves these sizes of the symbolic dimensions best; -1 if none does."""
        profiles = self.key.profiles
        covering = [index for index, profile in enumerate(profiles) if profile.covers(sizes)]
        return min(covering, key=lambda index: profiles[index].slack(sizes), default=-1)

    def to_json(self) -> str:
        """Return the text of its file."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> PlanRecord:
        """Read the text of a record's file.

        Raises:
            ValueError: it is not a record, or of another schema.
        """
        try:
            data = json.loads(text)
            if data["schema"] != SCHEMA:
                raise ValueError(f"schema {data['schema']!r}, not {SCHEMA}")
            key = {f.name: data["key"][f.name] for f in fields(PlanKey)}
            key["options"] = tuple(key["options"])
            key["profiles"] = tuple(
                Profile({name: (low, best, high) for name, (low, best, high) in profile["ranges"].items()})
                for profile in key["profiles"]
            )
            refit = {name: Weight(**weight) for name, weight in data["refit"].items()}
            made = cls(PlanKey(**key), data["sha256"], data["bytes"], refit, data["made"])
            _ = made.key.level  # a number
            return made
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"not the record of a plan: {error!r}") from error
