"""What every row would compute alike, computed once a picture: keys and values of the text, for cross attention.

Export takes it out of the denoiser (`latentrt_export.graphs.parts.hoist`); the manifest gives these networks the role
"conditioner". They read inputs that conditioners fill, and give inputs of the denoiser.
"""

from __future__ import annotations

from collections.abc import Mapping
from threading import Lock

from latentrt.bundle.spec import CONDITIONER, ModelSpec
from latentrt.model.inputs import Inputs, Sides
from latentrt.model.predictor import inputs_of
from latentrt.runtime.base import Network, call

KEPT = 4  # results: the prompts of one picture, and of another thread's


class Hoisted:
    """Computes inputs of the denoiser from others. Any thread may call it.

    Args:
        networks: by name, in the order of their calls.
        spec: of the model, for what they read.
        reader: the name of the network that reads what they give.
    """

    def __init__(self, networks: Mapping[str, Network], spec: ModelSpec, reader: str) -> None:
        self._networks = [networks[name] for name in spec.named(CONDITIONER)]
        self._sources = inputs_of([spec.networks[name] for name in spec.named(CONDITIONER)])
        self._read = {tensor.name for tensor in spec.networks[reader].inputs}
        self._known: list[tuple[Inputs, Inputs]] = []  # the least recently used first
        self._lock = Lock()

    def __call__(self, sides: Sides) -> Sides:
        """Return all sides as the denoiser reads them. Sides of the same arrays give the same arrays."""
        if not self._networks:
            return sides
        image = None if sides.image is None else self._with(sides.image)
        return Sides(self._with(sides.uncond), self._with(sides.cond), image)

    def forget(self) -> None:
        """Compute all anew from now on: the networks have other weights."""
        with self._lock:
            self._known = []

    def _with(self, inputs: Inputs) -> Inputs:
        own = {name: inputs[name] for name in self._sources}
        with self._lock:
            found = next((pair for pair in self._known if _same(pair[0], own)), None)
        pair = found or (own, self._run(own))
        with self._lock:
            self._known = [*(each for each in self._known if each is not found), pair][-KEPT:]
        return {name: array for name, array in {**inputs, **pair[1]}.items() if name in self._read}

    def _run(self, inputs: Inputs) -> Inputs:
        lanes = {name: array[None] for name, array in inputs.items()}
        for network in self._networks:
            lanes |= call(network, lanes)
        return {name: array[0] for name, array in lanes.items() if name not in inputs}


def _same(a: Inputs, b: Inputs) -> bool:
    """Return whether both are the same arrays, by identity: `Text` gives the same ones for the same prompt."""
    return all(array is b[name] for name, array in a.items())
