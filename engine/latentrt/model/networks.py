"""A model's networks, and those of add-ons: loaded when they are needed, a model's again with other weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.spec import INT8, INT8_ORT_CPU, ModelSpec
from latentrt.errors import BackendError
from latentrt.model.vae.other_vae import VaeOptions
from latentrt.runtime.base import Backend, Network
from latentrt.runtime.lazy import LazyNetwork
from latentrt.runtime.replaced import check_replaces, same_weights


class Networks(Mapping[str, LazyNetwork]):
    """The networks of a bundle by name, those of the VAE from another bundle where there is one.

    Attributes:
        bundle: which they are loaded from.

    Args:
        bundle: opened.
        backend: loads them.
        vae: may have another VAE.

    Raises:
        BackendError: the bundle has weights in memory, and the backend takes none.
    """

    def __init__(self, bundle: Bundle, backend: Backend, vae: VaeOptions) -> None:
        if bundle.replaced:
            check_replaces(backend)
        self.bundle, self._backend, self._vae = bundle, backend, vae
        self._networks = {name: LazyNetwork(partial(self._load, name)) for name in vae.spec(bundle.spec).networks}

    def __getitem__(self, name: str) -> LazyNetwork:
        return self._networks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._networks)

    def __len__(self) -> int:
        return len(self._networks)

    def take(self, bundle: Bundle) -> None:
        """Use the weights that a bundle of the same files has in memory (`Bundle.replaced`), or its files'.

        ONNX Runtime takes no weights in a session that exists: it has turned, joined and packed them by then. So each
        network of which some weights change is loaded again; both are in memory until all are loaded, and the old ones
        stay where one fails.

        Raises:
            BackendError, PlanError, DeviceMemoryError: as of `Backend.load`.
        """
        fresh: dict[str, Network] = {}
        with ExitStack() as opened:
            for name, network in self._networks.items():
                if network.loaded and self._changes(name, bundle):
                    fresh[name] = self._backend.load(bundle, name)
                    opened.callback(fresh[name].close)
            opened.pop_all()
        self.bundle = bundle
        for name, made in fresh.items():
            self._networks[name].replace(made)

    def _changes(self, name: str, bundle: Bundle) -> bool:
        """Return whether a network has other weights in a bundle of the same files."""
        if self._home(name) is not self.bundle:
            return False
        return not same_weights(self.bundle, bundle, bundle.spec.graph(name, *self._backend.variants))

    def _home(self, name: str) -> Bundle:
        return self._vae.home(self.bundle, self._vae.spec(self.bundle.spec).networks[name].role)

    def _load(self, name: str) -> Network:
        return self._backend.load(self._home(name), name)


class AddOn:
    """The networks of an add-on, each loaded when it is needed.

    Attributes:
        name: that requests have for it.
        spec: of its bundle.
        networks: by their names in it.
    """

    def __init__(self, name: str, bundle: Bundle, backend: Backend) -> None:
        self.name, self.spec = name, bundle.spec
        self.networks = {each: LazyNetwork(partial(backend.load, bundle, each)) for each in self.spec.networks}

    def open(self) -> None:
        """Load all networks. Raise as `Backend.load`."""
        for network in self.networks.values():
            network.open()

    def end_of(self, *roles: str) -> None:
        """Drop the networks of roles."""
        for role in roles:
            for name in self.spec.named(role):
                self.networks[name].drop()

    def close(self) -> None:
        """Free the networks' memory."""
        for network in self.networks.values():
            network.close()


def check_precision(own: ModelSpec, read: ModelSpec, backend: Backend) -> None:
    """Refuse a precision in which a backend runs a model, and not with what is loaded beside it.

    Args:
        own: the model.
        read: the same, with the denoiser that reads what add-ons give.
        backend: runs the networks.

    Raises:
        BackendError: there is no such denoiser in its precision.
    """
    variants = {INT8_ORT_CPU} if backend.precision == INT8 else set(backend.variants)
    before, now = (spec.networks[spec.denoiser].variants for spec in (own, read))
    if variants & set(before) and not variants & set(now):
        has = ", ".join(name for name in now if "+" not in name)
        raise BackendError(
            f"{own.id} in {backend.precision}, with add-ons beside it for which it has graphs in {has}",
            needed="a precision of these graphs",
            fix="take precision='fp32' (--precision fp32), or leave the add-ons out",
        )
