"""How each kind of LoRA changes a weight, in float32.

    LoRA, LoCon   ΔW = alpha/r · up · down, or up · mid · down        https://arxiv.org/abs/2106.09685
    LoHa          ΔW = alpha/r · (w1_a · w1_b) ⊙ (w2_a · w2_b)        https://arxiv.org/abs/2108.06098
    LoKr          ΔW = alpha/r · w1 ⊗ w2, each a matrix or a product  https://arxiv.org/abs/2309.14859
    diff          ΔW itself
    DoRA          W' = m · (W + ΔW) / ‖W + ΔW‖                        https://arxiv.org/abs/2402.09353

A module that is a convolution in the model may be a matrix in the file, and the other way round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from latentrt.adapters.files import Group
from latentrt.bundle.tensors import Tensors
from latentrt.errors import AdapterError

Float32 = NDArray[np.float32]
Shape = tuple[int, ...]
KINDS = {  # the parts that a kind has: all of the first, any of the second
    "LoRA": ({"down", "up"}, {"mid", "up_bias"}),
    "LoHa": ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}, {"hada_t1", "hada_t2"}),
    "diff": (set[str](), {"diff"}),
    "LoKr": (set[str](), {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"}),
}
ALWAYS = {"alpha", "dora_scale", "magnitude", "diff_b"}


@dataclass(frozen=True, slots=True)
class Change:
    """How a file changes one module.

    Attributes:
        tensors: the file.
        group: what it has for the module.
        kind: one of KINDS.
    """

    tensors: Tensors
    group: Group
    kind: str

    @property
    def has_weight(self) -> bool:
        """Whether it changes the weight; a difference of the bias may stand alone."""
        return self.kind != "diff" or "diff" in self.group.keys

    @property
    def has_bias(self) -> bool:
        """Whether it changes the bias."""
        return bool({"up_bias", "diff_b"} & set(self.group.keys))

    @property
    def rows_and_columns(self) -> tuple[int, int]:
        """The size of its ΔW as a matrix.

        Raises:
            AdapterError: its parts do not fit each other.
        """
        shapes = {part: self.tensors.entries[key].shape for part, key in self.group.keys.items()}
        try:
            return _SIZES[self.kind](shapes)
        except (IndexError, KeyError, ValueError) as error:
            sizes = ", ".join(f"{part} {'x'.join(map(str, shape))}" for part, shape in shapes.items())
            found = f"{self.tensors.path} has {sizes} for {self.group.module.name}"
            raise AdapterError(found, needed=f"the parts of a {self.kind}, of one rank") from error

    def factors(self) -> tuple[Float32, Float32] | None:
        """Return (down, up) with ΔW = up · down, (rank, in) and (out, rank); None where it is no such product alone."""
        if self.kind != "LoRA" or set(self.group.keys) - {"down", "up", "alpha"}:
            return None
        down = _matrix(self._part("down"))
        return down, self._scale(down.shape[0]) * _matrix(self._part("up"))

    def weight(self, weight: Float32, strength: float) -> Float32:
        """Return a weight with this added, so much of it.

        At a strength other than 1, peft's DoRA scales ΔW before it is normed, and others go that part of the way from
        W to W', as A1111 and ComfyUI do.
        """
        delta = self._delta().reshape(weight.shape)
        factor = np.float32(strength)
        if "magnitude" in self.group.keys:
            return _normed(weight + factor * delta, self._part("magnitude").reshape(-1, *[1] * (weight.ndim - 1)))
        if "dora_scale" in self.group.keys:
            return weight + factor * (_normed(weight + delta, self._magnitude(weight.ndim)) - weight)
        return weight + factor * delta

    def bias(self, bias: Float32, strength: float) -> Float32:
        """Return a bias with this added, so much of it."""
        if "diff_b" in self.group.keys:
            return bias + np.float32(strength) * self._part("diff_b").reshape(bias.shape)
        factor = np.float32(strength * self._scale(self._part("down").shape[0]))
        return bias + factor * self._part("up_bias").reshape(bias.shape)

    def _magnitude(self, axes: int) -> Float32:
        """Return LyCORIS' magnitudes: (out, 1, ...), or (1, in, ...) of older files."""
        scale = self._part("dora_scale")
        own = scale.shape[:2] if scale.ndim > 1 else (-1, 1)
        return scale.reshape(*own, *[1] * (axes - 2))

    def _delta(self) -> Float32:
        return {"LoRA": self._lora, "LoHa": self._loha, "LoKr": self._lokr, "diff": self._diff}[self.kind]()

    def _lora(self) -> Float32:
        up, down = _matrix(self._part("up")), self._part("down")
        scale = self._scale(down.shape[0])
        if "mid" in self.group.keys:
            mid = self._part("mid")
            return scale * _tucker(mid, up.T, _matrix(down))
        return scale * (up @ _matrix(down))

    def _loha(self) -> Float32:
        first, second = (self._factor(f"hada_w{i}", f"hada_t{i}") for i in (1, 2))
        return self._scale(self._part("hada_w1_b").shape[0]) * (first * second)

    def _lokr(self) -> Float32:
        ranks = [self._part(f"lokr_w{i}_b").shape[0] for i in (2, 1) if f"lokr_w{i}_b" in self.group.keys]
        first, second = (self._factor(f"lokr_w{i}", f"lokr_t{i}") for i in (1, 2))
        scale = self._scale(ranks[0]) if ranks else np.float32(1)
        return scale * np.kron(_matrix(first), _matrix(second))

    def _diff(self) -> Float32:
        return self._part("diff")

    def _factor(self, name: str, core: str) -> Float32:
        """Return a factor of LoHa or LoKr: whole, or a product, or with a core for the positions of a convolution."""
        if name in self.group.keys:
            return self._part(name)
        a, b = self._part(f"{name}_a"), self._part(f"{name}_b")
        return _tucker(self._part(core), a, b) if core in self.group.keys else a @ _matrix(b)

    def _part(self, part: str) -> Float32:
        return self.tensors.floats(self.group.keys[part])

    def _scale(self, rank: int) -> np.float32:
        """Return alpha/r, or alpha/√r; 1 where there is no alpha, or a zero."""
        alpha, rooted = self.group.alpha, self.group.rooted
        if "alpha" in self.group.keys:
            alpha, rooted = float(self._part("alpha").reshape(-1)[0]), False
        return np.float32(alpha / (math.sqrt(rank) if rooted else rank)) if alpha else np.float32(1)


def change_of(tensors: Tensors, group: Group) -> Change:
    """Return how a file changes a module.

    Raises:
        AdapterError: a part is missing, or the parts are of several kinds.
    """
    parts = set(group.keys) - ALWAYS
    for kind, (needed, optional) in KINDS.items():
        if needed <= parts <= needed | optional and (parts or "diff_b" in group.keys):
            return Change(tensors, group, kind)
    raise AdapterError(
        f"{tensors.path} has {', '.join(sorted(group.keys))} for {group.module.name}",
        needed="all parts of a LoRA (down, up), a LoHa, a LoKr or a difference, and of one kind",
    )


def _matrix(array: Float32) -> Float32:
    return array.reshape(array.shape[0], -1)


def _tucker(core: Float32, a: Float32, b: Float32) -> Float32:
    """Return the sum over m and n of core[m, n] a[m] b[n], (out, in, k): core (r, r, ...), a (r, out), b (r, in)."""
    rank = core.shape[0]
    left = a.T @ core.reshape(rank, -1)
    left = left.reshape(a.shape[1], core.shape[1], -1)
    product: Float32 = np.einsum("onk,ni->oik", left, b, optimize=True).astype(np.float32)
    return product


def _normed(weight: Float32, magnitude: Float32) -> Float32:
    """Return a weight whose norms, over all axes but the magnitude's own, are the magnitude."""
    own = 1 if magnitude.shape[0] == 1 and magnitude.shape[1] > 1 else 0
    axes = tuple(axis for axis in range(weight.ndim) if axis != own)
    norm = np.sqrt(np.square(weight).sum(axis=axes, keepdims=True))
    result: Float32 = weight * (magnitude / (norm + np.finfo(np.float32).eps))
    return result


# --- the size of ΔW, from the shapes of the parts ---------------------------------------------------------------------


def _need(fits: bool) -> None:
    if not fits:
        raise ValueError


def _size_of_lora(shapes: Mapping[str, Shape]) -> tuple[int, int]:
    up, down = shapes["up"], shapes["down"]
    _need(math.prod(up[1:]) == down[0])
    if (mid := shapes.get("mid")) is None:
        return up[0], math.prod(down[1:])
    _need(mid[:2] == (down[0], down[0]) and math.prod(down[2:]) == 1)
    return up[0], down[1] * math.prod(mid[2:])


def _size_of_loha(shapes: Mapping[str, Shape]) -> tuple[int, int]:
    first, second = (_size_of_factor(shapes, f"hada_w{i}", f"hada_t{i}") for i in (1, 2))
    _need(first == second)
    return first


def _size_of_lokr(shapes: Mapping[str, Shape]) -> tuple[int, int]:
    first, second = (_size_of_factor(shapes, f"lokr_w{i}", f"lokr_t{i}") for i in (1, 2))
    return first[0] * second[0], first[1] * second[1]


def _size_of_factor(shapes: Mapping[str, Shape], name: str, core: str) -> tuple[int, int]:
    if name in shapes:
        return shapes[name][0], math.prod(shapes[name][1:])
    a, b = shapes[f"{name}_a"], shapes[f"{name}_b"]
    if core in shapes:
        _need(len(a) == len(b) == 2 and shapes[core][:2] == (a[0], b[0]))
        return a[1], b[1] * math.prod(shapes[core][2:])
    _need(len(a) == 2 and a[1] == b[0])
    return a[0], math.prod(b[1:])


def _size_of_diff(shapes: Mapping[str, Shape]) -> tuple[int, int]:
    return shapes["diff"][0], math.prod(shapes["diff"][1:])


_SIZES: Mapping[str, Callable[[Mapping[str, Shape]], tuple[int, int]]] = {
    "LoRA": _size_of_lora,
    "LoHa": _size_of_loha,
    "LoKr": _size_of_lokr,
    "diff": _size_of_diff,
}
