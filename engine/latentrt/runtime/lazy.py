"""A network that is loaded when it is first called, and again after it was dropped."""

from __future__ import annotations

from collections.abc import Callable
from threading import RLock
from typing import Any

from numpy.typing import NDArray

from latentrt.bundle.spec import GraphSpec
from latentrt.errors import BackendError
from latentrt.runtime.base import Network
from latentrt.runtime.signature import Arrays


class LazyNetwork:
    """Stands in for a network until its first use. Several threads may use it first; it is loaded once.

    Args:
        load: makes the network; called once, and once more after each `drop`.
    """

    def __init__(self, load: Callable[[], Network]) -> None:
        self._load = load
        self._network: Network | None = None
        self._closed = False
        self._lock = RLock()

    def open(self) -> Network:
        """Load the network now.

        Raises:
            BackendError: it was closed.
        """
        with self._lock:
            if self._closed:
                raise BackendError("the network was closed", needed="an open engine", fix="Engine.load(...) again")
            if self._network is None:
                self._network = self._load()
            return self._network

    @property
    def graph(self) -> GraphSpec:
        """The network's signature."""
        return self.open().graph

    def __call__(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """Run the network; load it first if needed."""
        return self.open()(feeds)

    @property
    def loaded(self) -> bool:
        """Whether it is loaded."""
        return self._network is not None

    def replace(self, network: Network) -> None:
        """Take a network that was loaded already in the place of the present one, which is closed."""
        with self._lock:
            self.drop()
            self._network = network

    def drop(self) -> None:
        """Free the network's memory; a later call loads it again."""
        with self._lock:
            if self._network is not None:
                self._network.close()
                self._network = None

    def close(self) -> None:
        """Free the network's memory for good."""
        self.drop()
        self._closed = True


def opened(network: Network) -> Network:
    """Return what a network stands for: itself, or what it loads."""
    return network.open() if isinstance(network, LazyNetwork) else network
