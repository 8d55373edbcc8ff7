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
from latentrt.bundle.spec import CONDITIONER, DECODER, DENOISER, ENCODER, ROLES, SHALLOW
from latentrt.errors import PlanError, RequestError
from latentrt.images.depth_map import depth_of
from latentrt.images.given import prepared, prepared_low
from latentrt.model.adapters import Adapters, check_request, with_adapters
from latentrt.model.codec import Codec, Identity, Vae
from latentrt.model.conditioners.beside import Repainted
from latentrt.model.conditioners.guidance_embedding import GuidanceEmbedding
from latentrt.model.conditioners.registry import Parts, conditioners_of
from latentrt.model.given import Given
from latentrt.model.hoisted import Hoisted
from latentrt.model.inputs import Sides
from latentrt.model.other_vae import OWN, VaeOptions
from latentrt.model.predictor import Predictor, inputs_of
from latentrt.model.text import Text
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

NAMES = {"image": "picture", "mask": "mask", "depth": "depth map"}  # by their use
CONDITIONED = (  # fields of a request that some models do not read
    "prompt",
    "negative_prompt",
    "class_label",
    "noise_level",
    "image_guidance",
    "clip_skip",
    "aesthetic_score",
    "negative_aesthetic_score",
)
IMAGE_GUIDANCE = 1.5  # of StableDiffusionInstructPix2PixPipeline


class Model:
    """A model's text encoders, denoiser and codec, each where the bundle has it.

    Attributes:
        spec: the model as the manifest describes it.
        schedule: the noise that it was trained with.
        networks: by name, each loaded when it is needed.
        codec: pixels to what is denoised, and back.
        preview: decodes previews.
        tiles: how larger latents are cut for the codec; None: they are not.
        predictor, hoisted: the networks that a row calls, and those that compute some of their inputs once a picture.
        conditioners: fill their inputs and the predictor's others.
        adapters: the LoRAs that requests may have.

    Args:
        bundle: opened.
        backend: runs the networks.
        resident: keep networks loaded; False drops each after use (`end_of`).
        vae, adapters: another VAE, a decoder of previews, tiles; LoRAs that requests may have.

    Raises:
        BundleError: the bundle has no denoiser, or no conditioner fills one of its inputs.
        RequestError, BackendError: a VAE or tiles do not fit; the networks, or the backend, take no LoRAs.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        *,
        resident: bool = True,
        vae: VaeOptions = OWN,
        adapters: Adapters | None = None,
    ) -> None:
        bundle, self.adapters = with_adapters(bundle, adapters, backend)
        denoiser, schedule = bundle.spec.denoiser, str(bundle.spec.schedule)
        self.spec, self.resident, self._vae = vae.spec(bundle.spec), resident, vae
        self.schedule = Schedule.from_config(bundle.json(schedule), self.spec.corrected(schedule))
        self.networks = {
            name: LazyNetwork(partial(backend.load, vae.home(bundle, network.role), name))
            for name, network in self.spec.networks.items()
        }
        self.tiles = vae.tiles(self.spec)
        self.codec = self._codec()
        self.preview, self._preview_decoder = self._previews(backend)
        if resident:
            self._load()
        called = self.networks[denoiser]
        without_depth = next((self.networks[name] for name in self.spec.named(SHALLOW)), None)
        self.predictor = Predictor([called if backend.gpu is None else called.open()], without_depth)
        once = self.spec.named(CONDITIONER)
        self.hoisted = Hoisted(self.networks, self.spec)
        inputs = inputs_of([self.spec.networks[name] for name in (*once, denoiser)])
        self.conditioners = conditioners_of(Parts(bundle, self.networks, self.codec, inputs, self.adapters))

    def _load(self) -> None:
        """Load what every picture needs; others are loaded with the first picture that needs them."""
        for role in ROLES:
            for name in self.spec.named(role) if role not in (ENCODER, SHALLOW) else ():
                self.networks[name].open()
        if self._preview_decoder is not None:
            self._preview_decoder.open()

    def _codec(self) -> Codec:
        decoder, encoder = (next(iter(self.spec.named(role)), None) for role in (DECODER, ENCODER))
        if decoder is None:
            return Identity()
        encoders = self.networks[encoder] if encoder else None
        return Vae(self.networks[decoder], encoders, self.spec.latents, self.tiles)

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
        for field in CONDITIONED:
            if getattr(request, field) is not None and field not in (*self.fields, *others):
                raise RequestError(f"{self.spec.id} reads no {field}", needed="a request without one")
        if request.cache_interval > 1 and not self.predictor.caches:
            raise RequestError(
                f"cache_interval is {request.cache_interval}, and the bundle of {self.spec.id} has no shallow graph",
                needed="1",
                fix="export the checkpoint again",
            )
        guidance = self.spec.defaults.guidance if request.guidance is None else request.guidance
        if self.text is None:
            if request.guidance is not None and request.guidance > 1:
                raise RequestError(
                    f"guidance is {request.guidance:g}, and {self.spec.id} reads no prompt", needed="guidance 1 or none"
                )
            guidance = 1.0
        steps = self.spec.defaults.steps if request.steps is None else request.steps
        solver = self.spec.defaults.solver if request.solver is None else request.solver
        filled = replace(request, steps=steps, solver=solver, guidance=guidance)
        for one in self.conditioners:
            one.check_settings(filled)
        self._check_text(filled)
        check_request(filled, self.adapters)
        if "image_guidance" in self.fields and request.image_guidance is None and guidance > 1:
            return replace(filled, image_guidance=IMAGE_GUIDANCE)
        return filled

    def guidance(self, request: Request) -> Guidance:
        """Return how the lanes of a request's pictures are combined; its defaults are filled in."""
        if self.embeds_guidance:
            return Guidance()
        image = request.image_guidance if "image_guidance" in self.fields else None  # it may be another model's
        return Guidance(request.guidance or 1.0, request.guidance_rescale, request.guidance_interval, image)

    def _check_text(self, request: Request) -> None:
        """Refuse what asks too much of the text encoders, or of a model without any. Raise RequestError."""
        special = {"prompt_syntax": request.prompt_syntax != "plain", "embeddings": bool(request.embeddings)}
        if self.text is None and any(special.values()):
            name = next(name for name, is_set in special.items() if is_set)
            raise RequestError(f"{self.spec.id} reads no {name}", needed="a request without one")
        if self.text is not None and request.prompt is not None and (any(special.values()) or request.clip_skip):
            self.text.check(request)

    def learn(self, files: Mapping[str, Path]) -> None:
        """Take embeddings for all later prompts, by their tokens. Raise RequestError where they do not fit."""
        if self.text is None:
            raise RequestError(f"{self.spec.id} reads no prompt", needed="no embeddings")
        self.text.learn(files)

    def draws_at_once(self, request: Request) -> bool:
        """Return whether a device can draw the whole of a request's pictures in one launch, from token ids."""
        return self.adapters is None and (self.text is None or self.text.draws_at_once(self.filled(request)))

    def given(self, pictures: Mapping[str, Source], height: int | None, width: int | None) -> Given | None:
        """Encode the pictures of a request; None where it brings none.

        Raises:
            RequestError: a kind, size or mask that cannot be used; a mask without its picture.
            BundleError, PlanError: there is no encoder that can be used here.
        """
        latents = self.spec.latents
        self._check_uses(pictures)
        if "image" not in pictures:
            return None
        if (times := self.enlarges) > 1:
            low = prepared_low(pictures["image"], height, width, latents, times)
            return Given.small(low, times, self.codec if self.encodes else None)
        depth = depth_of(pictures["depth"]) if "depth" in pictures else None
        pixels, repaint = prepared(pictures["image"], pictures.get("mask"), height, width, latents)
        return Given.of(pixels, repaint, self.codec, depth)

    def _check_uses(self, pictures: Mapping[str, Source]) -> None:
        for name in pictures:
            what = NAMES[name]
            if name not in self.reads:
                raise RequestError(f"there is a {what}, and {self.spec.id} reads none", needed="a request without one")
            if "image" not in pictures:
                found, fix = f"there is a {what} and no picture", "pass it: image=, --image"
                raise RequestError(found, needed="the one it belongs to", fix=fix)

    def drawn_first(self, request: Request, given: Given | None, noise: NoiseSource) -> Sides:
        """Return the inputs of one picture whose noise comes before that of its first latents; see `Conditioner`."""
        sides = Sides.same({})
        for one in self.conditioners:
            sides = sides.and_(one(request, given, noise)) if one.draws_first else sides
        return sides

    def inputs(
        self,
        request: Request,
        given: Given | None,
        noise: NoiseSource,
        first: Sides | None = None,
        *,
        tokens: bool = False,
    ) -> Sides:
        """Return all inputs of the predictor for one picture; see `Conditioner`.

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
        return sides if tokens else self.hoisted(sides)

    def scalars(self, request: Request, table: Table) -> dict[str, NDArray[np.float64]]:
        """Return the columns that conditioners add to a table. Raise ScheduleError as they do."""
        return {name: column for one in self.conditioners for name, column in one.scalars(request, table).items()}

    def profiles(self, lanes: int) -> tuple[Profile, ...] | None:
        """Return the latents' sizes ("height", "width") that TensorRT's plans draw; None without plans: all sizes."""
        names = [*self.spec.named(DENOISER), *self.spec.named(DECODER)]
        served = [getattr(self.networks[name].open(), "profiles", None) for name in names]
        return drawn_by([each for each in served if each is not None], lanes) if all(served) else None

    def check_tiles(self, height: int, width: int) -> None:
        """Raise PlanError where TensorRT's plans do not decode the tiles of latents of this size."""
        if self.tiles is None or not self.resident or not self.tiles.cut(height, width):
            return
        decoders = [self.networks[name] for name in self.spec.named(DECODER)]
        for network in (*decoders, self._preview_decoder):
            plans = getattr(network and network.open(), "profiles", None)
            for rows, columns in sorted(self.tiles.sizes(height, width)) if plans else ():
                if not any(plan.covers({"batch": 1, "height": rows, "width": columns}) for plan in plans or ()):
                    size = f"{columns * self.tiles.factor}x{rows * self.tiles.factor}"
                    raise PlanError(
                        f"no plan of the decoder takes a tile of {size} pixels",
                        needed=f"one of {'; or '.join(map(str, plans or ()))} in latents",
                        fix=f"latentrt build BUNDLE --profile size={size}, beside those that it has",
                    )

    def facts(self, height: int, width: int) -> dict[str, Any]:
        """Return what pictures of latents of this size carry of how they were decoded, where it is not the usual."""
        other, tiles = self._vae.other, self.tiles
        facts = {} if other is None else {"vae": other.spec.id}
        return facts | ({"tile": self._vae.tile} if tiles is not None and tiles.cut(height, width) else {})

    def end_of(self, *roles: str) -> None:
        """Drop the networks of roles that are no longer needed, unless they are resident."""
        if not self.resident:
            for name in (name for role in roles for name in self.spec.named(role)):
                self.networks[name].drop()

    def close(self) -> None:
        """Free the networks' memory."""
        for network in (*self.networks.values(), *([self._preview_decoder] if self._preview_decoder else [])):
            network.close()
