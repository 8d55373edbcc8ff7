"""Which graphs a build is about: those of a model, chosen by what will be used with it, and those of its add-ons."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.spec import ADD_ONS, IP_ADAPTER
from latentrt.errors import BundleError
from latentrt.model.conditioners.adapters import adapted
from latentrt.model.control import check_fits, controlled, controlnets_of


def bundles_of(folder: Path, controlnets: Sequence[str] = (), *, loras: bool = False) -> list[Bundle]:
    """Return a model's bundle, with the graphs that are wanted in its spec, and those of its add-ons.

    Args:
        folder: of the model's bundle.
        controlnets: ControlNets and T2I-Adapters, "NAME=BUNDLE" as they are loaded. The denoiser is then the one that
            reads what they give.
        loras: whether its networks take LoRAs of each request.

    Raises:
        BundleError: a bundle is missing, damaged or unsafe, is no model, or has no such denoiser.
        AdapterError: its networks take no LoRAs.
        RequestError: a text is no such pair, or an add-on does not fit the model.
    """
    bundle = Bundle.open(folder)
    kind = ADD_ONS.get(bundle.spec.kind)
    if bundle.spec.kind == IP_ADAPTER:
        raise BundleError(f"{bundle.spec.id} is an {kind}", needed="a model: IP-Adapters run on a CPU", fix="")
    if kind is not None:
        needed, fix = "a model, for whose lanes it is built", f"latentrt build MODEL --controlnet NAME={folder}"
        raise BundleError(f"{bundle.spec.id} is a {kind}", needed=needed, fix=fix)
    add_ons = {name: Bundle.open(path) for name, path in controlnets_of(controlnets).items()}
    bundle = adapted(bundle) if loras else bundle
    if add_ons:
        bundle = controlled(bundle, [one.spec for one in add_ons.values()])
        check_fits(add_ons, bundle.spec)
    return [bundle, *{one.root: one for one in add_ons.values()}.values()]


def networks_of(bundles: Sequence[Bundle], names: Sequence[str]) -> list[tuple[Bundle, tuple[str, ...]]]:
    """Return bundles with those of their networks that have these names, where there are some; no names mean all.

    Raises:
        BundleError: no bundle has a network of that name.
    """
    known = list(dict.fromkeys(name for one in bundles for name in one.spec.networks))
    if unknown := [name for name in names if name not in known]:
        raise BundleError(f"{bundles[0].spec.id} has no {unknown[0]}", needed=f"one of {', '.join(known)}")
    pairs = [(one, tuple(name for name in names or known if name in one.spec.networks)) for one in bundles]
    return [(one, own) for one, own in pairs if own]
