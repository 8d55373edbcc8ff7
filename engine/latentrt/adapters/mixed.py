"""LoRAs of each picture, as inputs of a model's networks: different ones in one batch.

A network whose graph takes LoRAs (`latentrt export --adapters`) has, for each module that it adapts, the inputs
lora.MODULE.down (in, rank) and lora.MODULE.up (rank, out), and adds (x · down) · up to what the module gives. Zeros add
nothing, to the bit. Several LoRAs stand side by side along the rank, which is the same for all pictures of an engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from latentrt.adapters.given import Lora
from latentrt.adapters.kept import Kept
from latentrt.adapters.library import File, Library
from latentrt.adapters.memory import PREFIX, held_by
from latentrt.adapters.merge import merge_of
from latentrt.adapters.names import UNET
from latentrt.bundle.bundle import Bundle, sha256_of
from latentrt.bundle.spec import LORA, TEXT_ENCODER
from latentrt.errors import AdapterError

Float32 = NDArray[np.float32]
Arrays = Mapping[str, NDArray[Any]]
RANK, MOST_BYTES = 64, 2**30
DOWN, UP = ".down", ".up"
MERGE = "merge it: Engine.load(lora=FILE), or latentrt export BUNDLE MERGED --lora FILE"


class Asked(NamedTuple):
    """A LoRA of a request: its name, its file, and how much of it is added to the UNet and to the text encoders."""

    name: str
    file: File
    unet: float
    text: float

    def strength(self, network: str) -> float:
        """Return how much of it is added to a network."""
        return self.unet if network == UNET else self.text


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """A LoRA's products.

    Attributes:
        products: by network ("unet", "text_encoder", ...) and module, (down, up) as `Change.factors` has them.
        sha256: of its file.
    """

    products: Mapping[str, Mapping[str, tuple[Float32, Float32]]]
    sha256: str

    @property
    def bytes(self) -> int:
        """Its size in memory."""
        return sum(a.nbytes + b.nbytes for own in self.products.values() for a, b in own.values())


class Mixed:
    """A model's LoRAs, loaded at their first use. Any thread may call it.

    Args:
        library: the LoRAs by name.
        bundle: of the model, whose networks take LoRAs.
        rank: the largest that the LoRAs of one picture may have together, in any module.
        most_bytes: of LoRAs and of inputs made of them that are kept for later pictures; those used longest ago go.
        half: whether the networks read inputs in half precision.
    """

    def __init__(
        self, library: Library, bundle: Bundle, *, rank: int = RANK, most_bytes: int = MOST_BYTES, half: bool = False
    ) -> None:
        self.library, self.rank, self._bundle = library, rank, bundle
        self._adapters = Kept[File, Adapter](most_bytes // 2, lambda adapter: adapter.bytes)
        self._inputs = Kept[tuple[str, tuple[Asked, ...]], Arrays](most_bytes // 2, _bytes)
        self._zero = np.zeros((), np.float16 if half else np.float32)

    def asked(self, strengths: Mapping[str, tuple[float, float]]) -> tuple[Asked, ...]:
        """Return LoRAs by name with their strengths of the UNet and of the text encoders, in this order.

        Those of strength 0 are left out. Raise AdapterError where one is not there.
        """
        found = (Asked(name, self.library.find(name), *both) for name, both in strengths.items())
        return tuple(one for one in found if one.unet or one.text)

    def inputs(self, network: str, asked: Sequence[Asked]) -> Arrays:
        """Return a network's inputs for one lane; the same arrays for the same LoRAs, as long as they are kept.

        Those of modules that no LoRA changes are one zero, repeated (strides of 0): they take no memory.

        Args:
            network: its name in the bundle.
            asked: the LoRAs.

        Raises:
            AdapterError: a file cannot be read, is for another model, changes more than such inputs can, or the ranks
                are too large.
        """
        home = self._homes[network]
        own = tuple(one for one in asked if one.strength(home))
        return self._inputs((network, own), lambda: self._made(network, home, own))

    def facts(self, asked: Sequence[Asked]) -> dict[str, dict[str, Any]]:
        """Return what pictures carry of their LoRAs: strengths and files' hashes by name; {} where there are none."""
        if not asked:
            return {}
        hashes = {one.name: f"sha256:{self._adapter(one).sha256}" for one in asked}
        return {"lora": {one.name: [one.unet, one.text] for one in asked}, "lora_hashes": hashes}

    @cached_property
    def _homes(self) -> dict[str, str]:
        """The network whose modules in a LoRA file each network has: the UNet's keys of texts are a graph apart."""
        networks = self._bundle.spec.networks
        return {name: name if one.role == TEXT_ENCODER else UNET for name, one in networks.items()}

    @cached_property
    def _modules(self) -> dict[str, dict[str, tuple[int, int]]]:
        """The modules that each network adapts, with their (in, out)."""
        found: dict[str, dict[str, tuple[int, int]]] = {}
        for name, network in self._bundle.spec.networks.items():
            shapes = {tensor.name: tensor.shape for tensor in network.inputs if tensor.name.startswith(LORA)}
            found[name] = {
                key.removeprefix(LORA).removesuffix(DOWN): (int(shape[1]), int(shapes[_up_of(key)][2]))
                for key, shape in shapes.items()
                if key.endswith(DOWN)
            }
        return found

    @property
    def lane_bytes(self) -> int:
        """The most bytes that a lane's LoRAs take: inputs of all networks, and the denoiser's once more in a call."""
        sizes = {name: sum(map(sum, own.values())) for name, own in self._modules.items()}
        numbers = sum(sizes.values()) + sizes[self._bundle.spec.denoiser]
        return numbers * self.rank * np.dtype(np.float32).itemsize

    def _made(self, network: str, home: str, asked: Sequence[Asked]) -> Arrays:
        own = [(self._adapter(one).products.get(home, {}), np.float32(one.strength(home))) for one in asked]
        made: dict[str, NDArray[Any]] = {}
        for module, (wide, out) in self._modules[network].items():
            products = [(*each[module], strength) for each, strength in own if module in each]
            down, up = (np.broadcast_to(self._zero, shape) for shape in ((wide, self.rank), (self.rank, out)))
            if products:
                self._check_rank(asked, module, sum(len(down) for down, _, _ in products))
                down, up = self._side_by_side(down, up, products)
                self._check_finite(asked, module, down, up)
            made |= {f"{LORA}{module}{DOWN}": down, f"{LORA}{module}{UP}": up}
        return made

    @staticmethod
    def _side_by_side(
        down: NDArray[Any], up: NDArray[Any], products: Sequence[tuple[Float32, Float32, np.float32]]
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return copies of zeros (in, rank) and (rank, out) with products in them, one after the other."""
        down, up, at = down.copy(), up.copy(), 0
        with np.errstate(over="ignore"):  # which is checked
            for a, b, strength in products:
                own = slice(at, at + len(a))
                down[:, own], up[own] = balanced(a.T, (strength * b).T)
                at += len(a)
        return down, up

    @staticmethod
    def _check_finite(asked: Sequence[Asked], module: str, *arrays: NDArray[Any]) -> None:
        if not all(np.isfinite(array).all() for array in arrays):
            names, dtype = ", ".join(one.name for one in asked), arrays[0].dtype
            raise AdapterError(f"{names}: numbers in {module} are too large for {dtype}", needed="smaller strengths")

    def _check_rank(self, asked: Sequence[Asked], module: str, rank: int) -> None:
        if rank > self.rank:
            names = ", ".join(one.name for one in asked)
            found = f"{names} {'have' if len(asked) > 1 else 'has'} rank {rank} in {module}"
            fix = f"load the engine with adapter_rank={rank} (--lora-rank {rank})"
            raise AdapterError(found, needed=f"at most {self.rank} for the LoRAs of a picture together", fix=fix)

    def _adapter(self, one: Asked) -> Adapter:
        return self._adapters(one.file, lambda: self._read(one))

    def _read(self, one: Asked) -> Adapter:
        """Read a LoRA, and refuse what cannot be added by inputs."""
        held, adapted = held_by(self._bundle), self._modules
        try:
            merge = merge_of(held.base, [Lora(one.file.path)])
        except AdapterError as error:  # a client is told the name, not where the file lies
            found = error.found.replace(str(one.file.path), f"the LoRA {one.name!r}")
            raise AdapterError(found, needed=error.needed, fix=error.fix) from error
        read = {
            network: {each.name if each.file else each.name.removeprefix(PREFIX) for each in own}
            for network, own in held.read.items()
        }
        products: dict[str, dict[str, tuple[Float32, Float32]]] = {}
        for weight, ((change, _),) in merge.added.items():
            if weight.name not in read[weight.network]:
                continue  # the model does not compute it: the last layer of SDXL's first text encoder
            module = weight.name.removesuffix(".weight")
            taken = any(module in own for name, own in adapted.items() if self._homes[name] == weight.network)
            factors = change.factors() if taken else None
            if factors is None:
                how = f"as a {change.kind} of more than two matrices" if taken else "which no input does"
                raise AdapterError(
                    f"the LoRA {one.name!r} cannot be one of a request: it changes {weight.name}, {how}",
                    needed="products of two matrices, in attention, feed-forward layers and projections",
                    fix=MERGE,
                )
            if not all(np.isfinite(factor).all() for factor in factors):
                found = f"the LoRA {one.name!r} has numbers for {weight.name} that are not finite"
                raise AdapterError(found, needed="finite numbers")
            products.setdefault(weight.network, {})[module] = factors
        return Adapter(products, sha256_of(one.file.path))


def _up_of(name: str) -> str:
    return name.removesuffix(DOWN) + UP


def balanced(down: Float32, up: Float32) -> tuple[Float32, Float32]:
    """Return a product's factors (in, rank) and (rank, out) with numbers of like size in both, for half precision.

    Trained ones may be a thousand times apart, and with a small alpha the smaller ones would be less than float16's
    smallest normal number. For each of the rank one factor is multiplied and the other divided by a power of two, so
    that the product stays to the bit in float32.
    """
    largest = [np.abs(factor).max(axis) for factor, axis in ((down, 0), (up, 1))]
    a, b = (np.frexp(numbers)[1] for numbers in largest)
    shift = np.where((largest[0] > 0) & (largest[1] > 0), (a - b) // 2, 0)
    return np.ldexp(down, -shift), np.ldexp(up, shift[:, None])


def _bytes(arrays: Arrays) -> int:
    return sum(array.nbytes for array in arrays.values() if any(array.strides))
