"""A bundle's networks on a backend, assembled by what they declare."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.spec import CONDITIONER, CONTROL, DECODER, DENOISER, ENCODER, ROLES, SHALLOW
from latentrt.errors import RequestError
from latentrt.images.depth_map import depth_of
from latentrt.images.given import inpainted, prepared, prepared_hint, prepared_low
from latentrt.model import settings
from latentrt.model.chained import Chained, Chains
from latentrt.model.conditioners.adapters import Adapters, adapted, check_ranks, with_adapters
from latentrt.model.conditioners.beside import Repainted
from latentrt.model.conditioners.guidance_embedding import GuidanceEmbedding
from latentrt.model.conditioners.ip_adapter import NO_IP_ADAPTERS, looking, open_ip_adapters, prompted
from latentrt.model.conditioners.registry import Parts, conditioners_of
from latentrt.model.control import NO_CONTROLS, Applied, controlled, open_controls
from latentrt.model.given import Given, check_resize, check_uses
from latentrt.model.hoisted import Hoisted
from latentrt.model.inputs import Sides
from latentrt.model.networks import AddOn, Networks, check_precision
from latentrt.model.predictor import Predictor, inputs_of
from latentrt.model.text import Text
from latentrt.model.vae.codec import Codec, Vae, codec_of
from latentrt.model.vae.other_vae import OWN, VaeOptions
from latentrt.request import Request
from latentrt.runtime.base import Backend
from latentrt.runtime.lazy import LazyNetwork
from latentrt.runtime.tensorrt.record import Profile, drawn_by
from latentrt.sampling.guidance import Guidance
from latentrt.sampling.noise import NoiseSource
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.table import Table

if TYPE_CHECKING:
    from latentrt.images.given import Source


class Model:
    """A model's text encoders, denoiser and codec, each where the bundle has it.

    Attributes:
        spec: the model as the manifest describes it.
        schedule: the noise that it was trained with.
        networks: by name, each loaded when it is needed.
        codec, preview: pixels to what is denoised and back; the codec that decodes previews.
        tiles: how larger latents are cut for the codec; None: they are not.
        predictor, hoisted: the networks that a row calls, and those that compute some of their inputs once a picture.
        conditioners: fill their inputs and the predictor's others.
        adapters, controls, ip_adapters: what requests may have: LoRAs, ControlNets, IP-Adapters.

    Args:
        bundle: opened.
        backend: runs the networks.
        resident: keep networks loaded; False drops each after use (`end_of`).
        vae: another VAE, a decoder of previews, tiles.
        adapters, controls, ip_adapters: LoRAs, and ControlNets and IP-Adapters by name, that requests may have.

    Raises:
        BundleError: the bundle has no denoiser, or no conditioner fills one of its inputs.
        RequestError, BackendError: a VAE, tiles, or one of these do not fit the model, or the backend.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        *,
        resident: bool = True,
        vae: VaeOptions = OWN,
        adapters: Adapters | None = None,
        controls: Mapping[str, Bundle] = NO_CONTROLS,
        ip_adapters: Mapping[str, Bundle] = NO_IP_ADAPTERS,
    ) -> None:
        bundle, self.adapters = with_adapters(bundle, adapters, backend)
        plain, bundle = bundle.spec, prompted(bundle, backend, ip_adapters)
        bundle = controlled(bundle, [one.spec for one in controls.values()])
        check_precision(plain, bundle.spec, backend)
        denoiser, schedule = bundle.spec.denoiser, str(bundle.spec.schedule)
        self.spec, self.resident, self._vae = vae.spec(bundle.spec), resident, vae
        self.schedule = Schedule.from_config(bundle.json(schedule), self.spec.corrected(schedule))
        self.networks = Networks(bundle, backend, vae)
        inputs = inputs_of([self.spec.networks[name] for name in (*self.spec.named(CONDITIONER), denoiser)])
        self.ip_adapters = open_ip_adapters(ip_adapters, self.spec, inputs, backend)
        self.controls = open_controls(controls, self.spec, backend)
        self._add_ons: tuple[AddOn, ...] = (*self.controls, *self.ip_adapters)
        self.tiles = vae.tiles(self.spec)
        self.codec = codec_of(self.spec, self.networks, self.tiles)
        self.preview, self._preview_decoder = self._previews(backend)
        if resident:
            self._load()
        if self.adapters is not None:
            check_ranks(self.networks.values(), self.adapters.rank)
        without_depth = next((self.networks[name] for name in self.spec.named(SHALLOW)), None)
        self.predictor = Predictor([self.networks[denoiser]], without_depth)
        self.hoisted = Hoisted(self.networks, self.spec, denoiser)
        parts = Parts(bundle, self.networks, self.codec, inputs, self.adapters, self.ip_adapters)
        self.conditioners = conditioners_of(parts)
        for one in self.controls if backend.gpu is not None else ():
            one.open()
        self._chains = None if backend.gpu is None else Chains(self.networks[denoiser], self.controls)

    def take(self, bundle: Bundle) -> None:
        """Use the weights of a bundle of the same files, as `Networks.take`; nothing changes where that fails."""
        bundle = bundle if self.adapters is None else adapted(bundle)
        bundle = looking(bundle) if self.ip_adapters else bundle
        bundle = controlled(bundle, [one.spec for one in self.controls])
        self.networks.take(bundle)
        self.spec = self._vae.spec(bundle.spec)
        self.hoisted.forget()
        if self.text is not None:
            self.text.forget()

    def _load(self) -> None:
        """Load what every picture needs; the others are loaded with the first picture that needs them."""
        for role in ROLES:
            for name in self.spec.named(role) if role not in (ENCODER, SHALLOW) else ():
                self.networks[name].open()
        if self._preview_decoder is not None:
            self._preview_decoder.open()

    def _previews(self, backend: Backend) -> tuple[Codec, LazyNetwork | None]:
        """Return the codec of previews, and its network where that is another one than the model's."""
        bundle = self._vae.preview
        if bundle is None:
            return self.codec, None
        decoder = LazyNetwork(partial(backend.load, bundle, bundle.spec.named(DECODER)[0]))
        return Vae(decoder, None, bundle.spec.latents, self.tiles), decoder

    @property
    def text(self) -> Text | None:
        """The conditioner that reads prompts; None where the model reads none."""
        return next((one for one in self.conditioners if isinstance(one, Text)), None)

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of CONDITIONED that the model reads."""
        return tuple(field for one in self.conditioners for field in one.fields)

    @property
    def pictures(self) -> tuple[str, ...]:
        """The pictures that the model's pipeline draws from; see `Conditioner`."""
        return tuple(name for one in self.conditioners for name in one.pictures)

    @property
    def reads(self) -> tuple[str, ...]:
        """The pictures that a request may bring."""
        return self.pictures if self.shows_picture else tuple(dict.fromkeys((*self.pictures, "image", "mask")))

    @property
    def reads_masks(self) -> bool:
        """Whether the denoiser itself reads the mask; otherwise what is kept is put back after every row."""
        return any(isinstance(one, Repainted) for one in self.conditioners)

    @property
    def shows_picture(self) -> bool:
        """Whether the denoiser reads the given picture itself; see `Conditioner`."""
        return any(one.shows_picture for one in self.conditioners)

    @property
    def enlarges(self) -> int:
        """How many times as large the given picture is drawn; see `Conditioner`."""
        return max((one.enlarges for one in self.conditioners), default=1)

    @property
    def encodes(self) -> bool:
        """Whether given pictures are encoded; some upscalers read their pixels."""
        return self.enlarges == 1 or any(one.encodes for one in self.conditioners)

    @property
    def most_lanes(self) -> int:
        """The most lanes that a picture of this model takes."""
        if self.text is None or self.embeds_guidance:
            return 1
        return 3 if "image_guidance" in self.fields else 2

    @property
    def embeds_guidance(self) -> bool:
        """Whether the denoiser reads the guidance scale itself: its pictures take one lane at any scale."""
        return any(isinstance(one, GuidanceEmbedding) for one in self.conditioners)

    @property
    def edits(self) -> bool:
        """Whether runs may begin on a given picture: there is an encoder, or none is needed."""
        return not self.encodes or bool(self.spec.named(ENCODER)) or not self.spec.named(DECODER)

    def filled(self, request: Request, others: Collection[str] = ()) -> Request:
        """Return the request with the model's own defaults for what it does not set.

        `others` are the fields that a second model reads.

        Raises:
            RequestError: it sets a field that the model does not read, or to a value that it cannot use.
        """
        return settings.filled(self, request, others)

    def guidance(self, request: Request) -> Guidance:
        """Return how the lanes of a request's pictures are combined; its defaults are filled in."""
        if self.embeds_guidance:
            return Guidance()
        image = request.image_guidance if "image_guidance" in self.fields else None  # it may be another model's
        return Guidance(request.guidance or 1.0, request.guidance_rescale, request.guidance_interval, image)

    def learn(self, files: Mapping[str, Path]) -> None:
        """Take embeddings for all later prompts, by their tokens. Raise RequestError where they do not fit."""
        if self.text is None:
            raise RequestError(f"{self.spec.id} reads no prompt", needed="no embeddings")
        self.text.learn(files)

    def draws_at_once(self, request: Request) -> bool:
        """Return whether a device can draw the whole of a request's pictures in one launch, from token ids."""
        if request.control:
            return False
        return self.text is None or self.text.draws_at_once(self.filled(request))

    def given(self, pictures: Mapping[str, Source], request: Request) -> Given | None:
        """Encode pictures for a request, which need not be its own; None where there are none.

        Raises:
            RequestError: a kind, size or mask that cannot be used; a mask without its picture, settings of a mask
                without one.
            BundleError, PlanError: there is no encoder that can be used here.
        """
        latents, height, width = self.spec.latents, request.height, request.width
        own = () if self.shows_picture else ("image", "mask")
        check_uses(pictures, (*self.pictures, *own), self.spec.id)
        if request.masked and "mask" not in pictures:
            found = "there are settings of a mask (mask_blur, mask_crop, mask_fill, mask_keeps), and no mask"
            raise RequestError(found, needed="a mask", fix="pass it: mask=, --mask; or leave them out")
        check_resize(request, pictures, self.enlarges)
        if "image" not in pictures:
            return None
        if (times := self.enlarges) > 1:
            low = prepared_low(pictures["image"], height, width, latents, times)
            return Given.small(low, times, self.codec if self.encodes else None)
        depth = depth_of(pictures["depth"]) if "depth" in pictures else None
        if request.masked:
            pixels, mask, overlay = inpainted(pictures["image"], pictures["mask"], request, latents)
            return replace(Given.of(pixels, mask, self.codec, depth), overlay=overlay, fill=request.mask_fill)
        pixels, repaint = prepared(pictures["image"], pictures.get("mask"), height, width, latents, request.resize)
        return Given.of(pixels, repaint, self.codec, depth)

    def drawn_first(self, request: Request, given: Given | None, noise: NoiseSource) -> Sides:
        """Return the inputs of one picture whose noise comes before that of its first latents; see `Conditioner`."""
        sides = Sides.same({})
        for one in self.conditioners:
            sides = sides.and_(one(request, given, noise)) if one.draws_first else sides
        return sides

    def hints(self, request: Request, given: Given | None) -> dict[str, NDArray[np.float32]]:
        """Return what a request's ControlNets follow, by their names, at the request's size; see `prepared_hint`."""
        size, overlay = self.spec.latents.pixels_of(request.height, request.width), given.overlay if given else None
        asked = [(one, request.control[one.name]) for one in self.controls if one.name in request.control]
        return {one.name: prepared_hint(own.image, *size, overlay, channels=one.channels) for one, own in asked}

    def applied(
        self, request: Request, hints: Mapping[str, NDArray[np.float32]], told: Sides, rows: int
    ) -> tuple[Applied, ...]:
        """Return the ControlNets of a request on one picture, which conditioners `told` so much; of so many rows."""
        lanes, asked = self.guidance(request).lanes, [one for one in self.controls if one.name in hints]
        return tuple(one.applied(request.control[one.name], hints[one.name], told, lanes, rows) for one in asked)

    def chained(self, controls: tuple[Applied, ...], sides: Sides, table: Table) -> Chained:
        """Return what rows call and read with these ControlNets: on a GPU they are a part of the predictor."""
        if self._chains is None or not controls:
            return Chained(None, sides, table, controls)
        return self._chains(controls, sides, table)

    def conditions(
        self,
        request: Request,
        given: Given | None,
        noise: NoiseSource,
        first: Sides | None = None,
        *,
        tokens: bool = False,
    ) -> Sides:
        """Return all inputs that conditioners fill for one picture, before `hoisted`; see `Conditioner`.

        Args:
            request, given, noise: of the picture.
            first: those of `drawn_first`; None where there are none.
            tokens: leave texts as the ids that the text encoders read: see `Text.tokens`.
        """
        sides = first or Sides.same({})
        for one in self.conditioners:
            if tokens and isinstance(one, Text):
                sides = sides.and_(one.tokens(request))
            elif not one.draws_first:
                sides = sides.and_(one(request, given, noise))
        return sides

    def scalars(self, request: Request, table: Table) -> dict[str, NDArray[np.float64]]:
        """Return the columns that conditioners add to a table. Raise ScheduleError as they do."""
        return {name: column for one in self.conditioners for name, column in one.scalars(request, table).items()}

    def profiles(self, lanes: int) -> tuple[Profile, ...] | None:
        """Return the latents' sizes ("height", "width") that TensorRT's plans draw; None without plans: all sizes."""
        called = [(self.networks[name], lanes) for name in self.spec.named(DENOISER)]
        called += [(self.networks[name], 1) for name in self.spec.named(DECODER)]
        called += [(one.networks[name], lanes) for one in self.controls for name in one.spec.named(CONTROL)]
        served = [(getattr(network.open(), "profiles", ()), batch) for network, batch in called]
        return drawn_by(served) if all(profiles for profiles, _ in served) else None

    def check_tiles(self, height: int, width: int) -> None:
        """Raise PlanError where TensorRT's plans do not decode the tiles of latents of this size."""
        if self.tiles is None or not self.resident or not self.tiles.cut(height, width):
            return
        decoders = [self.networks[name] for name in self.spec.named(DECODER)]
        for network in (*decoders, self._preview_decoder):
            self.tiles.check_plans(height, width, getattr(network and network.open(), "profiles", None) or ())

    def cut_into_tiles(self, pixels: int) -> None:
        """Cut larger pictures into tiles of so many pixels from now on, as `VaeOptions.tile` does."""
        self._vae = replace(self._vae, tile=pixels)
        self.tiles = self._vae.tiles(self.spec)
        for codec in (self.codec, self.preview):
            if isinstance(codec, Vae):
                codec.tiles = self.tiles

    def facts(self, height: int, width: int) -> dict[str, Any]:
        """Return what pictures of latents of this size carry of how they were made, where it is not the usual."""
        other, tiles, merged = self._vae.other, self.tiles, self.networks.bundle.merged
        facts: dict[str, Any] = {} if other is None else {"vae": other.spec.id}
        facts |= {"merged_loras": list(merged)} if merged else {}
        return facts | ({"tile": self._vae.tile} if tiles is not None and tiles.cut(height, width) else {})

    def end_of(self, *roles: str) -> None:
        """Drop the networks of roles that are no longer needed, unless they are resident."""
        if not self.resident:
            for name in (name for role in roles for name in self.spec.named(role)):
                self.networks[name].drop()
            for one in self._add_ons:
                one.end_of(*roles)

    def close(self) -> None:
        """Free the networks' memory."""
        for network in (*self.networks.values(), *([self._preview_decoder] if self._preview_decoder else [])):
            network.close()
        for one in self._add_ons:
            one.close()
