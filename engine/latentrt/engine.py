"""Engine: the public API. A bundle in, pictures out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from latentrt.bundle.bundle import EMBEDDED, Bundle
from latentrt.bundle.manifest import ModelSpec
from latentrt.cuda.base import Gpu
from latentrt.errors import RequestError
from latentrt.images.image import from_uint8, to_pil, to_uint8
from latentrt.model.conditioning import Conditioner, Text
from latentrt.model.edit import Edit, on, prepared
from latentrt.model.networks import VAE, TextEncoder, UNet
from latentrt.model.tokenizer import Tokenizer
from latentrt.request import Request, facts_of, request_from
from latentrt.run.denoiser import Denoiser
from latentrt.run.host import HostLanes
from latentrt.run.job import Job
from latentrt.runtime import open_backend
from latentrt.runtime.base import Backend, Network
from latentrt.runtime.lazy import LazyNetwork
from latentrt.runtime.tensorrt.record import Profile, drawn_by
from latentrt.sampling.guidance import Guidance
from latentrt.sampling.noise import TorchCudaNoise, noise_source
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.table import tabulate

if TYPE_CHECKING:
    from PIL.Image import Image

    from latentrt.images.picture import Picture
    from latentrt.model.edit import Source
    from latentrt.run.device import DeviceLanes
    from latentrt.run.program import OneLaunch

Float32 = NDArray[np.float32]
OnTick = Callable[[Job], None]
LANES = 16  # on a CPU


class Engine:
    """A loaded model that makes pictures. Make one with `Engine.load`; use it in a `with` block or close it.

    An engine serves one thread at a time.

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
    ) -> None:
        self.bundle = bundle
        self.spec: ModelSpec = bundle.spec
        self.backend = backend
        self.schedule = Schedule.from_config(bundle.json(self.spec.schedule))
        encoders = self.spec.text_encoders
        tokenizers = [Tokenizer.open(bundle.path(name)) for name in self.spec.tokenizers]
        self._resident = resident = resident or backend.gpu is not None
        self._networks = {name: self._lazy(name) for name in (*encoders, "unet", "vae_decoder", "vae_encoder")}
        if resident:
            self._open()
        self.text_encoder = TextEncoder(list(zip(tokenizers, (self._networks[n] for n in encoders), strict=True)))
        self._conditioner = Conditioner(self.spec, self.text_encoder)
        self.unet = UNet(self._networks["unet"])
        self.vae = VAE(self._networks["vae_decoder"], self._networks["vae_encoder"], self.spec.latents)
        self._lanes: HostLanes | DeviceLanes
        self._one_launch: OneLaunch | None = None
        self._own_gpu: Gpu | None = None  # opened by `load`, closed with the engine
        if backend.gpu is None:
            self._lanes = HostLanes(self.unet, lanes or LANES)
        else:
            self._on_device(lanes, backend.captures if capture is None else capture)
        self.denoiser = Denoiser(self._lanes)

    def _on_device(self, lanes: int | None, capture: bool) -> None:
        """Keep latents on the device; its networks read and write device memory (`DeviceNetwork`)."""
        from latentrt.run.device import DeviceLanes
        from latentrt.run.program import OneLaunch

        loaded = self._open()
        encoders = [loaded[name] for name in self.spec.text_encoders]
        count = lanes or loaded["unet"].best_lanes
        self._lanes = DeviceLanes(loaded["unet"], count, capture=capture)
        self._one_launch = OneLaunch(
            encoders, loaded["unet"], loaded["vae_decoder"], self.spec.latents, count, capture=capture
        )

    def network(self, name: str) -> Network:
        """One of the model's networks by its name in the manifest ("unet", ...), loaded now where it was not."""
        return self._networks[name].open()

    @property
    def resident(self) -> bool:
        """Whether all networks stay loaded."""
        return self._resident

    @property
    def profiles(self) -> tuple[Profile, ...] | None:
        """The latents' sizes ("height", "width") that TensorRT's plans draw; None without plans: all sizes."""
        unet, decoder = (getattr(self._networks[name].open(), "profiles", None) for name in ("unet", "vae_decoder"))
        return None if unet is None or decoder is None else drawn_by(unet, decoder, self.denoiser.lanes)

    def _open(self) -> dict[str, Any]:
        """Load what every picture needs; the VAE's encoder is loaded when a picture is given."""
        return {name: network.open() for name, network in self._networks.items() if name != "vae_encoder"}

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
        check_hashes: bool = True,
    ) -> Engine:
        """Open a bundle and load its networks.

        Args:
            bundle: a folder made by `latentrt export`; by default the embedded model.
            backend: "onnxruntime"; "tensorrt", "tensorrt-rtx" or "tensorrt-lean" with the plans of `latentrt build`; or
                a Backend of your own.
            device: "cpu", "cuda", or "cuda:1" for the second GPU; None is the CPU for onnxruntime and "cuda" for the
                others. Nothing else is tried if it is not there.
            threads: CPU threads of one network call; None for all physical cores.
            precision: "fp32" or "fp16" graphs; None is fp32 on a CPU and fp16 on a GPU.
            lanes: the most lanes of one UNet call; a picture with guidance takes two. On a GPU every call has exactly
                so many. None is 16 on a CPU; on a GPU what the plan was built for, or 2.
            resident: keep all networks loaded. False loads each when it is needed and drops it when the next one is
                (text encoders, UNet, VAE): the least memory, for a process that makes one batch on a CPU.
            capture: on a GPU, launch ticks and whole pictures as CUDA graphs; False queues their calls one by one. None
                is True for TensorRT and False for onnxruntime, which does not support it on all versions.
            plans: a folder of TensorRT plans that you trust; None is the bundle's place in your cache.
            check_hashes: compare every file's SHA-256 with the manifest (sizes are always compared).

        Raises:
            BundleError: the bundle is missing, damaged or unsafe.
            BackendError, MissingDependencyError: the backend or device cannot be used here.
            PlanError: there is no plan for this device, bundle and precision; the message names the command.
        """
        opened = Bundle.open(bundle, check_hashes=check_hashes)
        if not isinstance(backend, str):
            return cls(opened, backend, lanes=lanes, resident=resident, capture=capture)
        own = open_backend(backend, device, threads, precision=precision, plans=plans)
        try:
            engine = cls(opened, own, lanes=lanes, resident=resident, capture=capture)
        except BaseException:
            if own.gpu is not None:
                own.gpu.close()
            raise
        engine._own_gpu = own.gpu
        return engine

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the networks' memory back."""
        for owner in (self._one_launch, self._lanes):
            if owner is not None:
                owner.close()
        for network in self._networks.values():
            network.close()
        if self._own_gpu is not None:
            self._own_gpu.close()
            self._own_gpu = None

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        image: Source | None = None,
        mask: Source | None = None,
        on_tick: OnTick | None = None,
        **settings: Any,
    ) -> list[Picture]:
        """Make pictures, from noise or from a given picture.

        Args:
            prompt: what to draw; several prompts share one batch.
            image, mask: a picture to start from and what of it to repaint; see `edit`. `strength` says how far.
            on_tick: called after every row of every picture with its Job (progress, previews); an exception raised
                in it ends the run.
            settings: fields of `Request` (negative_prompt, steps, solver, seed, guidance, height, width, count, ...);
                anything else goes to `tabulate` (eta, use_karras_sigmas, timestep_spacing, ...).

        Returns:
            `count` PIL images for each prompt, RGB; `image.save("x.png")` writes their settings too.

        Raises:
            RequestError: a setting is out of range.
            UnknownSolverError, ScheduleError: the solver or one of its options is unknown or does not fit.
            NetworkError: a network returned numbers that are not finite.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if self._one_launch is not None and on_tick is None:
            return self._draw(self._one_launch, prompts, settings, image, mask)
        jobs = self.requests(prompts, settings, image, mask)
        self.run(jobs, on_tick)
        return [self.picture(job) for job in jobs]

    def edit(
        self, image: Source, mask: Source | None = None, *, height: int | None = None, width: int | None = None
    ) -> Edit:
        """Encode a picture, for `jobs` to start from.

        Args:
            image: a PIL image, or pixels (height, width, 3) uint8. What is transparent becomes white.
            mask: of the picture's own size, white where to repaint; None repaints all.
            height, width: of the pictures to make; the given one is resized to that as diffusers resizes (Lanczos).
                None is its own, rounded down to a multiple of the latents' factor.

        Raises:
            RequestError: a size, mode or mask that cannot be used.
            BundleError, PlanError: the bundle has no VAE encoder that can be used here.
        """
        pixels, repaint = prepared(image, mask, height, width, self.spec.latents)
        encoded = self.vae.encode(from_uint8(pixels[None])[0])
        self._drop("vae_encoder")
        return Edit.of(encoded, pixels, repaint)

    def _draw(
        self,
        one_launch: OneLaunch,
        prompts: Iterable[str],
        settings: Mapping[str, Any],
        image: Source | None,
        mask: Source | None,
    ) -> list[Picture]:
        """Make pictures on a GPU, each batch of them in one launch."""
        from latentrt.images.picture import Picture

        jobs: list[Job] = []
        texts: list[Text] = []
        asked, edit = self._asked(prompts, settings, image, mask)
        for request in asked:
            request = on(request, edit)
            made = self._drafts(request, len(jobs), edit)
            jobs += made
            texts += [self._conditioner.text(request)] * len(made)
        return [Picture.of(pixels, job.tag) for pixels, job in zip(one_launch.draw(jobs, texts), jobs, strict=True)]

    def requests(
        self,
        prompts: Iterable[str],
        settings: Mapping[str, Any],
        image: Source | None = None,
        mask: Source | None = None,
    ) -> list[Job]:
        """The jobs of several prompts, all else as in `__call__`; seeds count up over all of them."""
        jobs: list[Job] = []
        asked, edit = self._asked(prompts, settings, image, mask)
        for request in asked:
            jobs += self.jobs(request, first=len(jobs), edit=edit)
        return jobs

    def _asked(
        self, prompts: Iterable[str], settings: Mapping[str, Any], image: Source | None, mask: Source | None
    ) -> tuple[list[Request], Edit | None]:
        """What a call asks for, checked before the picture is encoded, and the picture."""
        asked = [request_from(prompt, settings) for prompt in prompts]
        pictures = {name: one for name, one in (("image", image), ("mask", mask)) if one is not None}
        return asked, self._given(pictures, settings.get("height"), settings.get("width"))

    def _given(self, pictures: Mapping[str, Source], height: int | None, width: int | None) -> Edit | None:
        if "image" in pictures:
            return self.edit(pictures["image"], pictures.get("mask"), height=height, width=width)
        if "mask" in pictures:
            raise RequestError(
                "there is a mask and no picture", needed="the one it belongs to", fix="pass it: image=, --image"
            )
        return None

    def jobs(self, request: Request, *, first: int = 0, edit: Edit | None = None) -> list[Job]:
        """The jobs of a request, not yet admitted; picture i has seed `request.seed + first + i`."""
        if request.pictures and edit is None:
            edit = self._given(request.pictures, request.height, request.width)
        request = on(request, edit)
        jobs = self._drafts(request, first, edit)
        cond, uncond = self._conditioner.encode(request)
        for job in jobs:
            job.cond, job.uncond = cond, uncond
        return jobs

    def _drafts(self, request: Request, first: int, edit: Edit | None = None) -> list[Job]:
        """The jobs of a request without their conditionings."""
        shape = self.spec.latents.shape_of(request.height, request.width)
        size = self.spec.latents.pixels_of(request.height, request.width)
        strength = 1.0 if request.strength is None else request.strength
        table = tabulate(request.solver, self.schedule, request.steps, strength=strength, **request.options)
        guidance = Guidance(request.guidance, request.guidance_rescale, request.guidance_interval)
        jobs = []
        for index in range(first, first + request.count):
            seed = request.seed + index
            noise = noise_source(request.noise, seed)
            tag = facts_of(request, table.solver, seed, index, size, self.spec.id)
            kept, start = None, 0.0
            if edit is not None:
                latents, kept = edit.begin(table, noise, strength)
                tag |= edit.facts
            elif self.backend.gpu is not None and isinstance(noise, TorchCudaNoise):
                latents, start = np.zeros(shape, np.float32), table.start
            else:
                latents = noise.normal(shape) * np.float32(table.start)
            jobs.append(Job(table, latents, {}, {}, noise, guidance, kept, start, tag=tag))
        return jobs

    def run(self, jobs: Iterable[Job], on_tick: OnTick | None = None) -> None:
        """Denoise jobs to their end, as many at once as there are lanes.

        `on_tick` is called after every row of each of these jobs. It may cancel one with `engine.denoiser.retire(job)`,
        or end the run by raising.

        Raises:
            NetworkError: a job's latents are no longer finite; the other jobs of this run are given up too.
        """
        waiting = list(jobs)
        mine = set(waiting)
        self._drop(*self.spec.text_encoders)
        try:
            while waiting or any(job in mine for job in self.denoiser.jobs):
                while waiting and (self.denoiser.fits(waiting[0]) or not self.denoiser.jobs):
                    self.denoiser.admit(waiting.pop(0))
                for job in self.denoiser.tick():
                    if job in mine:
                        if on_tick is not None:
                            on_tick(job)
                        if job.error is not None:
                            raise job.error
        finally:
            for job in mine:
                self.denoiser.retire(job)

    def picture(self, job: Job) -> Picture:
        """The picture of a job's latents; it knows its settings."""
        self._drop("unet")
        from latentrt.images.picture import Picture

        return Picture.of(self._pixels(job.latents), job.tag)

    def decode(self, latents: Float32) -> Image:
        """Latents (channels, height, width) to a PIL image."""
        return to_pil(self._pixels(latents)[None])[0]

    def _pixels(self, latents: Float32) -> NDArray[np.uint8]:
        pixels: NDArray[np.uint8] = to_uint8(self.vae.decode(latents[None]))[0]
        return pixels

    def _lazy(self, name: str) -> LazyNetwork:
        return LazyNetwork(lambda: self.backend.load(self.bundle, name))

    def _drop(self, *names: str) -> None:
        """Without residents, drop networks whose turn is over."""
        if not self._resident:
            for name in names:
                self._networks[name].drop()
