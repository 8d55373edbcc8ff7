"""Drawing: the networks that an engine has loaded. Requests in, jobs, and pictures out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.spec import CONDITIONER, CONTROL, DENOISER, ENCODER, HINT, SHALLOW, TEXT_ENCODER
from latentrt.images.pixels import to_picture, to_pil, to_uint8
from latentrt.model.conditioners.adapters import Adapters
from latentrt.model.conditioners.ip_adapter import NO_IP_ADAPTERS
from latentrt.model.control import NO_CONTROLS
from latentrt.model.given import Given
from latentrt.model.model import Model
from latentrt.model.prompts.embeddings import files_of
from latentrt.model.vae.codec import decode_each
from latentrt.model.vae.other_vae import OWN, VaeOptions
from latentrt.request import Request, request_from
from latentrt.run.denoiser import Denoiser, OnTick
from latentrt.run.job import Job
from latentrt.run.lanes import open_lanes
from latentrt.run.make import check_current, make_jobs
from latentrt.run.stages import refiner_of
from latentrt.runtime.base import Backend

if TYPE_CHECKING:
    from PIL.Image import Image

    from latentrt.images.given import Source
    from latentrt.images.inpaint import Overlay
    from latentrt.images.picture import Picture


class Drawing:
    """A model's loaded networks and lanes, and what draws with them. `Engine` is the public one.

    Args:
        owned: close the backend's GPU with the networks.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        *,
        lanes: int | None = None,
        resident: bool = True,
        capture: bool | None = None,
        refiner: Bundle | None = None,
        vae: VaeOptions = OWN,
        adapters: Adapters | None = None,
        controls: Mapping[str, Bundle] = NO_CONTROLS,
        ip_adapters: Mapping[str, Bundle] = NO_IP_ADAPTERS,
        embeddings: Mapping[str, str | Path] | Iterable[str | Path] = (),
        owned: bool = False,
    ) -> None:
        self.bundle, self.backend = bundle, backend
        resident = resident or backend.gpu is not None
        with ExitStack() as opened:
            if owned and backend.gpu is not None:
                opened.callback(backend.gpu.close)
            add_ons: dict[str, Any] = {"adapters": adapters, "controls": controls, "ip_adapters": ip_adapters}
            made = Model(bundle, backend, resident=resident, vae=vae, **add_ons)
            self.model = opened.enter_context(closing(made))
            self.refiner = None
            if refiner is not None:
                self.refiner = refiner_of(self.model, refiner, backend, resident=resident)
                opened.callback(self.refiner.close)
            self._lanes, self._program = open_lanes(self.model, backend, lanes, capture, self.refiner)
            self._learn(embeddings)
            self._opened = opened.pop_all()
        self.spec, self.schedule = self.model.spec, self.model.schedule
        self.denoiser = Denoiser(self._lanes)
        self.served = False  # whether a `Service` has it

    def _learn(self, embeddings: Mapping[str, str | Path] | Iterable[str | Path]) -> None:
        files = files_of(embeddings)
        for model in self._models if files else ():
            model.learn(files)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the networks' memory."""
        self._free()
        self._opened.close()

    def _free(self) -> None:
        """Free the memory of lanes, which on a GPU is bound to networks; pictures that come take it again."""
        if self._program is not None:
            self._program.close()
        self._lanes.close()

    def draw(
        self,
        prompts: Iterable[str | None],
        settings: Mapping[str, Any],
        pictures: Mapping[str, Source],
        on_tick: OnTick | None = None,
    ) -> list[Picture]:
        """Return the pictures of several prompts, in one launch where one draws them; see `Engine.__call__`."""
        asked, given = self._asked(prompts, settings, pictures)
        program = self._program
        if program is not None and (on_tick is not None or not program.draws(asked, given)):
            program = None
        jobs = self._jobs_of(asked, given, tokens=program is not None)
        if program is None:
            self.run(jobs, on_tick)
            return list(self.pictures(jobs))
        return [_picture(pixels, job) for pixels, job in zip(program.draw(jobs), jobs, strict=True)]

    def requests(
        self,
        prompts: Iterable[str | None],
        settings: Mapping[str, Any],
        pictures: Mapping[str, Source] | None = None,
    ) -> list[Job]:
        """Return the jobs of several prompts, all else as in `Engine.__call__`; seeds count up over all of them."""
        return self._jobs_of(*self._asked(prompts, settings, pictures or {}))

    def _asked(
        self, prompts: Iterable[str | None], settings: Mapping[str, Any], pictures: Mapping[str, Source]
    ) -> tuple[list[Request], Given | None]:
        asked = [request_from(prompt, settings) for prompt in prompts]  # checked before a picture is encoded
        return asked, self.model.given(pictures, asked[0]) if asked else None

    def _jobs_of(self, asked: Sequence[Request], given: Given | None, *, tokens: bool = False) -> list[Job]:
        jobs: list[Job] = []
        for request in asked:
            jobs += self.jobs(request, first=len(jobs), given=given, tokens=tokens)
        self._end_of(ENCODER, HINT)
        return jobs

    def jobs(self, request: Request, *, first: int = 0, given: Given | None = None, tokens: bool = False) -> list[Job]:
        """Return the jobs of a request, not yet admitted; see `make_jobs`."""
        gpu = self.backend.gpu is not None
        return make_jobs(
            *(self.model, request, given), first=first, draws_on_device=gpu, tokens=tokens, refiner=self.refiner
        )

    def run(self, jobs: Iterable[Job], on_tick: OnTick | None = None) -> None:
        """Denoise jobs to their end; see `Denoiser.run`."""
        waiting = list(jobs)
        check_current(self.model, waiting)
        self._end_of(TEXT_ENCODER, CONDITIONER)
        self.denoiser.run(waiting, on_tick)

    def picture(self, job: Job) -> Picture:
        """Return the picture of a job's latents; it carries its settings."""
        return next(self.pictures([job]))

    def pictures(self, jobs: Sequence[Job]) -> Iterator[Picture]:
        """Yield the pictures of several jobs; small ones are decoded at the same time (`decode_each`)."""
        self._end_of(DENOISER, SHALLOW, CONTROL)
        decoded = decode_each(self.model.codec, [job.latents for job in jobs], self.backend.facts.cores)
        yield from (_picture(to_uint8(one[None])[0], job) for one, job in zip(decoded, jobs, strict=True))

    def decode(self, latents: NDArray[np.float32], overlay: Overlay | None = None) -> Image:
        """Return latents (channels, height, width) as a PIL image, under an overlay if there is one."""
        pixels = to_uint8(self.model.codec.decode(latents[None]))[0]
        return to_pil(pixels if overlay is None else overlay.on(pixels))

    @property
    def refiner_name(self) -> str | None:
        """The refiner's model id; None where there is none."""
        return None if self.refiner is None else self.refiner.spec.id

    @property
    def _models(self) -> list[Model]:
        return [self.model, *([] if self.refiner is None else [self.refiner])]

    def _end_of(self, *roles: str) -> None:
        for model in self._models:
            model.end_of(*roles)

    def preview(self, latents: NDArray[np.float32]) -> Image:
        """Return latents (channels, height, width) as a PIL image that the decoder of previews made."""
        return to_pil(to_uint8(self.model.preview.decode(latents[None]))[0])


def _picture(pixels: NDArray[np.uint8], job: Job) -> Picture:
    return to_picture(pixels if job.overlay is None else job.overlay.on(pixels), job.tag)
