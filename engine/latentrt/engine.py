"""Engine: the public API. A bundle in, pictures out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentrt.adapters.given import Loras, loras_of
from latentrt.adapters.memory import with_loras
from latentrt.adapters.mixed import RANK
from latentrt.bundle.bundle import EMBEDDED, Bundle
from latentrt.drawing import Drawing
from latentrt.errors import RequestError
from latentrt.model.conditioners.adapters import Adapters
from latentrt.model.vae.other_vae import VaeOptions
from latentrt.run.denoiser import OnTick
from latentrt.runtime import open_backend
from latentrt.runtime.base import Backend
from latentrt.runtime.replaced import check_replaces
from latentrt.values import plain

if TYPE_CHECKING:
    from latentrt.images.given import Source
    from latentrt.images.picture import Picture


class Engine(Drawing):
    """A loaded model that makes pictures. Make one with `Engine.load`; use it in a `with` block or close it.

    One thread at a time may use an engine. But while one denoises (`run`, or the `denoiser` itself), another may make
    `jobs` and decode, unless networks share a stream (`backend.facts.one_stream`) or are dropped (`resident=False`).

    >>> with Engine.load() as sd:
    ...     images = sd("a red apple", steps=20, solver="dpmpp-2m", seed=7, guidance=3.0)
    """

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
            RequestError: a VAE, the tiles or an add-on do not fit the model; an AdapterError, a LoRA does not.
            BackendError, MissingDependencyError: the backend or device cannot be used here.
            PlanError: there is no plan for this device, bundle and precision; the message names the command.
        """
        opened = partial(Bundle.open, check_hashes=check_hashes, cache=cache)
        second = None if refiner is None else opened(refiner)
        vaes = VaeOptions.open(vae, preview_vae, tile, check_hashes=check_hashes, cache=cache)
        controls, image_prompts = (
            {name: opened(folder) for name, folder in (given or {}).items()} for given in (control, ip_adapter)
        )
        first, loras = opened(bundle), loras_of(lora, allow_unmatched=allow_unmatched)
        first = with_loras(first, loras, allow_unmatched=allow_unmatched)
        library = Adapters.of(adapters, adapter_rank)
        if isinstance(backend, str):
            own = open_backend(backend, device, threads, precision=precision, plans=plans, cache=cache, spin=spin)
        else:
            own = backend
        return cls(
            *(first, own),
            lanes=lanes,
            resident=resident,
            capture=capture,
            refiner=second,
            vae=vaes,
            adapters=library,
            controls=controls,
            ip_adapters=image_prompts,
            embeddings=embeddings,
            owned=own is not backend,
        )

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
        pictures = {name: one for name, one in (("image", image), ("mask", mask), ("depth", depth)) if one is not None}
        return self.draw(_several(prompt), settings, pictures, on_tick)


def _several(prompt: object) -> list[Any]:
    """Return the prompts of a call as a list; what each of them is, a Request checks."""
    prompt = plain(prompt)
    if prompt is None or isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, Iterable) or isinstance(prompt, (bytes, Mapping)):
        raise RequestError(f"the prompt is {prompt!r}", needed="text, or a list of texts", fix='pass "a red apple"')
    return list(prompt)
