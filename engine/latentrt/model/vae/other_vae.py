"""Another bundle's VAE in a model's place of its own: for all pictures, or for previews."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.spec import DECODER, ENCODER, ModelSpec
from latentrt.errors import RequestError
from latentrt.model.vae.tiles import Tiles

VAE = (DECODER, ENCODER)  # its roles


@dataclass(frozen=True, slots=True)
class VaeOptions:
    """How a model's pictures are decoded and encoded, where not by its own bundle alone.

    Attributes:
        other: a bundle whose VAE takes the place of the model's own.
        preview: a bundle whose decoder makes the previews.
        tile: the side in pixels of the tiles that larger pictures are cut into; None: they are not.
    """

    other: Bundle | None = None
    preview: Bundle | None = None
    tile: int | None = None

    @classmethod
    def open(
        cls, vae: str | Path | None, preview: str | Path | None, tile: int | None, *, check_hashes: bool, cache: bool
    ) -> VaeOptions:
        """Open the bundles, of a VAE alone or of a whole model. Raise as `Bundle.open`."""
        other, previewing = (
            None if root is None else Bundle.open(root, check_hashes=check_hashes, cache=cache)
            for root in (vae, preview)
        )
        return cls(other, previewing, tile)

    def home(self, own: Bundle, role: str) -> Bundle:
        """Return the bundle that a model's networks of a role come from."""
        return self.other if self.other is not None and role in VAE else own

    def spec(self, own: ModelSpec) -> ModelSpec:
        """Return the model with its VAE. Raise RequestError where a bundle or the tiles do not fit."""
        if self.preview is not None:
            check_fits(own, self.preview.spec)
        return own if self.other is None else with_vae(own, self.other.spec)

    def tiles(self, own: ModelSpec) -> Tiles | None:
        """Return the tiles. Raise RequestError where a model has no VAE, or the side is no multiple."""
        if self.tile is None:
            return None
        if not own.named(DECODER):
            raise RequestError(f"tile is {self.tile}, and {own.id} has no VAE", needed="none: it draws pixels")
        return Tiles.of(self.tile, own.latents.factor)


OWN = VaeOptions()


def with_vae(spec: ModelSpec, other: ModelSpec) -> ModelSpec:
    """Return a model with the decoder, encoder, scale and shift of another bundle.

    Raises:
        RequestError: its latents are of another kind, or one of the two has no VAE.
    """
    check_fits(spec, other)
    networks = {name: network for name, network in spec.networks.items() if network.role not in VAE}
    networks |= {name: network for name, network in other.networks.items() if network.role in VAE}
    latents = replace(spec.latents, scale=other.latents.scale, shift=other.latents.shift)
    return replace(spec, networks=networks, latents=latents)


def check_fits(spec: ModelSpec, other: ModelSpec) -> None:
    """Refuse a bundle whose VAE cannot decode a model's latents. Raise as `with_vae`."""
    if not spec.named(DECODER):
        raise RequestError(f"{spec.id} draws pixels and takes no VAE", needed="a model of latents", fix="leave it out")
    if not other.named(DECODER):
        raise RequestError(f"{other.id} has no VAE", needed="a bundle with a decoder", fix="latentrt export VAE BUNDLE")
    found, needed = ((one.latents.channels, one.latents.factor) for one in (other, spec))
    if found != needed:
        raise RequestError(
            f"the VAE of {other.id} has latents of {found[0]} channels, {found[1]} pixels a side",
            needed=f"{needed[0]} channels, {needed[1]} pixels a side, as {spec.id} draws",
        )
