"""Engine: the public API. A bundle in, pictures out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from latentrt.adapters.given import Loras, loras_of
from latentrt.adapters.memory import with_loras
from latentrt.adapters.mixed import RANK
from latentrt.bundle.bundle import EMBEDDED, Bundle
from latentrt.bundle.spec import CONDITIONER, CONTROL, DENOISER, ENCODER, HINT, SHALLOW, TEXT_ENCODER
from latentrt.cuda.gpu import Gpu
from latentrt.errors import RequestError
from latentrt.images.pixels import to_picture, to_pil, to_uint8
from latentrt.model.codec import decode_each
from latentrt.model.conditioners.adapters import Adapters
from latentrt.model.conditioners.ip_adapter import NO_IP_ADAPTERS
from latentrt.model.control import NO_CONTROLS
from latentrt.model.given import Given
from latentrt.model.model import Model
from latentrt.model.other_vae import OWN, VaeOptions
from latentrt.model.prompts.embeddings import files_of
from latentrt.request import Request, request_from
from latentrt.run.denoiser import Denoiser, OnTick
from latentrt.run.job import Job
from latentrt.run.lanes import open_lanes
from latentrt.run.make import check_current, make_jobs
from latentrt.run.stages import refiner_of
from latentrt.runtime import open_backend
from latentrt.runtime.base import Backend
from latentrt.runtime.replaced import check_replaces
from latentrt.values import plain

if TYPE_CHECKING:
    from PIL.Image import Image

    from latentrt.images.given import Source
    from latentrt.images.inpaint import Overlay
    from latentrt.images.picture import Picture


class Engine:
    """A loaded model that makes pictures. Make one with `Engine.load`; use it in a `with` block or close it.

    One thread at a time may use an engine. But while one denoises (`run`, or the `denoiser` itself), another may make
    `jobs` and decode, unless networks share a stream (`backend.facts.one_stream`) or are dropped (`resident=False`).

    >>> with Engine.load() as sd:
    ...     images = sd("a red apple", steps=20, solver="dpmpp-2m", seed=7, guidance=3.0)
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
    ) -> None:
        self.bundle, self.backend = bundle, backend
        resident = resident or backend.gpu is not None
        with ExitStack() as opened:
            add_ons: dict[str, Any] = {"adapters": adapters, "controls": controls, "ip_adapters": ip_adapters}
            made = Model(bundle, backend, resident=resident, vae=vae, **add_ons)
            self.model = opened.enter_context(closing(made))
            self.refiner = None
            if refiner is not None:
                self.refiner = refiner_of(self.model, refiner, backend, resident=resident)
                opened.callback(self.refiner.close)
            self._lanes, self._program = open_lanes(self.model, backend, lanes, capture, self.refiner)
            opened.pop_all()
        self.spec, self.schedule = self.model.spec, self.model.schedule
        self.denoiser = Denoiser(self._lanes)
        self.served = False  # whether a `Service` has it
        self._own_gpu: Gpu | None = None  # opened by `load`, closed with the engine

    @classmethod
    def load(
        cls,
        bundle: str | Path = EMBEDDED,
        *,
        backend: str | Backend = "onnxruntime",
        device: str | None = None,
        threads: int | None = None,
        precision: str | None = None,
        lanes: int | None = None,
        resident: bool = True,
        capture: bool | None = None,
        plans: str | Path | None = None,
        embeddings: Mapping[str, str | Path] | Iterable[str | Path] = (),
        cache: bool = True,
        spin: bool = True,
        check_hashes: bool = True,
        refiner: str | Path | None = None,
        vae: str | Path | None = None,
        preview_vae: str | Path | None = None,
        tile: int | None = None,
        control: Mapping[str, str | Path] | None = None,
        ip_adapter: Mapping[str, str | Path] | None = None,
        lora: Loras = (),
        allow_unmatched: bool = False,
        adapters: Mapping[str, str | Path] | str | Path | None = None,
        adapter_rank: int = RANK,
    ) -> Engine:
        """Open a bundle and load its networks.

        Args:
            bundle: a folder made by `latentrt export`, or the name of an embedded model ("emoji", "pixels").
            backend: "onnxruntime", "openvino"; "tensorrt", "tensorrt-rtx", "tensorrt-lean" (see `latentrt build`); or
                your Backend.
            device: "cpu", "cuda" or "cuda:1"; None is "cpu" for onnxruntime and "cuda" for the others.
            threads, spin: of a network call on the CPU; see `OrtBackend`.
            precision: "fp32", "fp16" or "int8" graphs; None is fp32 on a CPU and fp16 on a GPU.
            lanes: the most of a call; guidance takes two a picture. None: 16 on a CPU, a plan's own, or a picture's.
            resident: keep all networks loaded; False drops each after use: the least memory, on a CPU.
            capture: on a GPU, launch ticks and whole pictures as CUDA graphs, not call by call. None: only TensorRT's.
            plans: a folder of TensorRT plans that you trust; None is the bundle's place in your cache.
            embeddings: files of textual inversion (.safetensors) for all prompts, by the words that stand for them, or
                a list of files: see docs/prompts.md. A call's own `embeddings` come on top.
            cache: keep in your cache, for quicker loading, graphs that onnxruntime has optimized, and what was hashed.
            check_hashes: compare every file's SHA-256 with the manifest (sizes are always compared).
            refiner: the bundle of a model that takes over at a request's `handoff`.
            vae, preview_vae: bundles whose VAE takes the place of the model's own, and whose decoder makes previews.
            control, ip_adapter: bundles of ControlNets and T2I-Adapters, and of IP-Adapters, by the names that calls
                have for them.
            tile: decode and encode pictures with a longer side in tiles of so many pixels; None: at once.
            lora: LoRAs that are merged into the model's weights in memory, each "FILE", "FILE:0.8" or, of the UNet and
                of the text encoders, "FILE:0.8:0.5"; or strengths by file. Not with OpenVINO. See `set_lora`.
            allow_unmatched: leave out keys of a LoRA that have no place in the model; else they are an error.
            adapters, adapter_rank: LoRAs that calls may name (`lora={"name": 0.8}`), files by name or their folder, and
                the largest rank of those of one picture together. See docs/lora.md.

        Raises:
            BundleError: a bundle is missing, damaged or unsafe.
            RequestError: a VAE, the tiles or a ControlNet do not fit the model; an AdapterError, a LoRA does not.
            BackendError, MissingDependencyError: the backend or device cannot be used here.
            PlanError: there is no plan for this device, bundle and precision; the message names the command.
        """
        opened = partial(Bundle.open, check_hashes=check_hashes, cache=cache)
        second = None if refiner is None else opened(refiner)
        vaes = VaeOptions.open(vae, preview_vae, tile, check_hashes=check_hashes, cache=cache)
        controls, shown = (
            {name: opened(folder) for name, folder in (given or {}).items()} for given in (control, ip_adapter)
        )
        first, loras = opened(bundle), loras_of(lora, allow_unmatched=allow_unmatched)
        first = with_loras(first, loras, allow_unmatched=allow_unmatched)
        make = partial(cls, first, lanes=lanes, resident=resident, capture=capture, controls=controls)
        make = partial(make, ip_adapters=shown, refiner=second, vae=vaes, adapters=Adapters.of(adapters, adapter_rank))
        if isinstance(backend, str):
            own = open_backend(backend, device, threads, precision=precision, plans=plans, cache=cache, spin=spin)
        else:
            own = backend
        try:
            engine = make(own)
        except BaseException:
            if own.gpu is not None and own is not backend:
                own.gpu.close()
            raise
        engine._own_gpu = own.gpu if own is not backend else None
        try:
            engine._learn(embeddings)
        except BaseException:
            engine.close()
            raise
        return engine

    def _learn(self, embeddings: Mapping[str, str | Path] | Iterable[str | Path]) -> None:
        files = files_of(embeddings)
        for model in self._models if files else ():
            model.learn(files)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the networks' memory."""
        self._free()
        for model in self._models:
            model.close()
        if self._own_gpu is not None:
            self._own_gpu.close()
            self._own_gpu = None

    def set_lora(self, lora: Loras | None = None, *, allow_unmatched: bool = False) -> None:
        """Merge these LoRAs, and no others, into the model's weights in memory; None: the bundle's own weights.

        Networks whose weights change are loaded again; if that fails, the engine stays as it was. Jobs that were made
        before cannot be run any more.

        Args:
            lora, allow_unmatched: as of `load`.

        Raises:
            AdapterError: a LoRA does not fit.
            BackendError, PlanError, DeviceMemoryError: the backend takes no other weights, or has no room.
            RequestError: pictures are being drawn, or a server has the engine.
        """
        loras = loras_of(lora or (), allow_unmatched=allow_unmatched)
        if self.served:
            raise RequestError("a server has the engine", needed="one of your own", fix="latentrt serve --lora FILE")
        self.denoiser.check_idle()
        if loras:
            check_replaces(self.backend)
        bundle = with_loras(self.bundle, loras, allow_unmatched=allow_unmatched)
        self._free()
        self.model.take(bundle)
        self.bundle, self.spec = bundle, self.model.spec

    @property
    def lora(self) -> tuple[str, ...]:
        """The LoRAs that are merged: "style.safetensors:0.8"."""
        return self.bundle.merged

    def _free(self) -> None:
        """Free the memory of lanes, which on a GPU is bound to networks; pictures that come take it again."""
        if self._program is not None:
            self._program.close()
        self._lanes.close()

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        image: Source | None = None,
        mask: Source | None = None,
        depth: Source | None = None,
        on_tick: OnTick | None = None,
        **settings: Any,
    ) -> list[Picture]:
        """Make pictures, from noise or from a given picture.

        Args:
            prompt: what to draw; several prompts share one batch. None for models that read no prompt.
            image, mask: a picture to start from and what of it to repaint, white; PIL images, or uint8 or uint16
                arrays. Without a height and width the pictures have its size. `strength` says how far to leave it,
                `mask_blur`, `mask_crop` and `mask_fill` how the mask is used. Upscalers draw it larger.
            depth: its depth map, grey, near is white, for models that draw by depth.
            on_tick: called after every row of every picture with its Job; an exception raised in it ends the run.
            settings: fields of `Request` (negative_prompt, steps, seed, guidance, height, width, count, control,
                ...); anything else goes to `tabulate` (eta, use_karras_sigmas, timestep_spacing, ...).

        Returns:
            `count` PIL images for each prompt; `image.save("x.png")` writes their settings too.

        Raises:
            RequestError, UnknownSolverError, ScheduleError: a setting, the solver or one of its options does not fit.
            NetworkError: a network returned numbers that are not finite.
        """
        prompts = _several(prompt)
        pictures = {name: one for name, one in (("image", image), ("mask", mask), ("depth", depth)) if one is not None}
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
        """Return the jobs of several prompts, all else as in `__call__`; seeds count up over all of them."""
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


def _several(prompt: object) -> list[Any]:
    """Return the prompts of a call as a list; what each of them is, a Request checks."""
    prompt = plain(prompt)
    if prompt is None or isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, Iterable) or isinstance(prompt, (bytes, Mapping)):
        raise RequestError(f"the prompt is {prompt!r}", needed="text, or a list of texts", fix='pass "a red apple"')
    return list(prompt)
