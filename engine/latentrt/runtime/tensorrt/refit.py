"""Read a plan's weights from the bundle's safetensors, and set them in a deserialized engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.initializers import initializers
from latentrt.bundle.spec import GraphSpec
from latentrt.errors import PlanError
from latentrt.runtime.tensorrt.library import Library
from latentrt.runtime.tensorrt.record import Weight

Values = Callable[[str], NDArray[Any]]
Place = tuple[str, int]  # a file of a bundle, and an offset in it
STORED = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "I64": "int64",
    "I32": "int32",
    "U8": "uint8",
    "BOOL": "bool",
}


class StoredWeights:
    """A plan's weights by name, in the dtype that it wants; where the file has that dtype, mapped and not copied.

    Args:
        bundle: whose safetensors hold them.
        table: where each lies (`PlanRecord.refit`).
    """

    def __init__(self, bundle: Bundle, table: Mapping[str, Weight]) -> None:
        self._bundle, self._table = bundle, table
        self._files: dict[str, NDArray[np.uint8]] = {}

    def __call__(self, name: str) -> NDArray[Any]:
        """Return a weight, flat.

        Raises:
            PlanError: the bundle does not have it, or its values are too large for the dtype that the plan wants.
        """
        if name not in self._table:
            raise _error(f"nothing says where the weight {name} lies", "a place for each weight in the plan's record")
        weight = self._table[name]
        raw = self._file(weight.file)[weight.offset : weight.offset + weight.bytes]
        if raw.size != weight.bytes:
            raise _error(f"{weight.file} ends before the weight {name}", f"{weight.bytes} bytes at {weight.offset}")
        return _cast(name, _as_stored(name, raw, weight.stored), weight.dtype)

    def _file(self, name: str) -> NDArray[np.uint8]:
        if name not in self._files:
            try:
                self._files[name] = np.memmap(self._bundle.path(name), np.uint8, "r")
            except (OSError, ValueError) as error:
                raise _error(f"{name} cannot be read ({error})", "the bundle's weights") from error
        return self._files[name]


def replaced_places(bundle: Bundle, graph: GraphSpec) -> set[Place]:
    """Return the places of the weights that a graph reads and the bundle has in memory. Raise BundleError as
    `initializers`.
    """
    folder = PurePosixPath(graph.path).parent
    read = initializers(bundle.path(graph.path)) if bundle.replaced else ()
    return {(f"{folder}/{each.file}", each.offset) for each in read if each.file is not None} & set(bundle.replaced)


def replaced_in(bundle: Bundle, places: set[Place], table: Mapping[str, Weight]) -> dict[str, NDArray[Any]]:
    """Return the weights that the bundle has in memory at these places, flat, by a plan's names.

    Raises:
        PlanError: the plan has no name for one of them.
    """
    names = {name: (weight.file, weight.offset) for name, weight in table.items()}
    if unknown := sorted(places - set(names.values())):
        raise _error(f"the plan does not name the weight at {unknown[0][1]} of {unknown[0][0]}", "one that does")
    return {
        name: _as_stored(name, bundle.replaced[place].ravel().view(np.uint8), table[name].stored)
        for name, place in names.items()
        if place in places
    }


def refit(library: Library, logger: Any, engine: Any, names: Iterable[str], value: Values) -> None:
    """Set weights of an engine, with those that TensorRT merged them with. Nothing that uses it may be queued.

    Raises:
        PlanError: a weight is missing or refused. The engine may then have some of the new weights: drop it.
    """
    if not engine.refittable:
        raise _error("the plan was built to keep its weights", "one whose weights can be set")
    refitter = library.module.Refitter(engine, logger)
    held: dict[str, NDArray[Any]] = {}  # TensorRT reads them until it has refitted
    wanted = list(names)
    while wanted:
        for name in wanted:
            held[name] = value(name)
            if not refitter.set_named_weights(name, library.module.Weights(held[name])):
                raise _error(f"TensorRT refuses the weight {name} ({logger.take_errors()})", "a weight of the plan")
        wanted = [name for name in refitter.get_missing_weights() if name not in held]
    if not refitter.refit_cuda_engine():
        missing = ", ".join(refitter.get_missing_weights())
        raise _error(f"TensorRT cannot refit the plan ({logger.take_errors() or missing})", "all of its weights")


def as_wanted(name: str, values: NDArray[Any], weight: Weight) -> NDArray[Any]:
    """Return values for a weight, flat and in its dtype.

    Raises:
        PlanError: there are too many or too few, or they are too large for the dtype.
    """
    count = weight.bytes // (2 if weight.stored == "BF16" else np.dtype(STORED[weight.stored]).itemsize)
    if values.size != count:
        raise _error(f"{values.size} values are given for the weight {name}", f"{count} values")
    return _cast(name, values.flatten(), weight.dtype)  # a copy: the caller may change theirs


def _as_stored(name: str, raw: NDArray[np.uint8], stored: str) -> NDArray[Any]:
    if stored == "BF16":  # the upper half of a float32, which numpy knows
        return (raw.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    if stored not in STORED:
        raise _error(f"the weight {name} is stored as {stored}", f"one of {', '.join(STORED)}, BF16")
    return raw.view(np.dtype(STORED[stored]).newbyteorder("<"))


def _cast(name: str, values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Return values in a dtype, dense and aligned, since TensorRT reads the memory itself."""
    try:
        with np.errstate(over="raise"):
            cast = values.astype(dtype, copy=False)
    except FloatingPointError as error:
        largest = float(np.abs(values).max())
        raise _error(f"the weight {name} has values up to {largest:g}", f"values that {dtype} holds") from error
    return np.require(cast, requirements=["C", "A"])


def _error(found: str, needed: str) -> PlanError:
    return PlanError(found, needed=needed, fix="latentrt build BUNDLE --rebuild")
