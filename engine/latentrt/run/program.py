"""The whole picture in one launch: text encoders, every row, VAE and pixels as one CUDA graph of a fixed shape.

What differs between pictures (token ids, tables, first latents, noise) is copied to the device before the launch, and
the pixels are copied back after it; between them nothing waits for the host. A graph is captured once for each latent
shape, number of rows and kind of guidance; any solver, prompt, seed and guidance scale runs in it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from latentrt.bundle.manifest import LatentSpec
from latentrt.cuda import kernels
from latentrt.cuda.base import DeviceArray, Graph
from latentrt.cuda.kernels import PROGRESS
from latentrt.errors import DeviceMemoryError, NetworkError, RequestError
from latentrt.model.conditioning import Text
from latentrt.run.device import Arena, check_fresh
from latentrt.run.job import Job
from latentrt.runtime.base import Bound, DeviceNetwork
from latentrt.sampling.noise import TorchCudaNoise

Ids = NDArray[np.int64]
Pixels = NDArray[np.uint8]
KEPT = 4  # kinds of pictures whose memory and graphs are kept
GRAPHS_KEPT = 8  # of each kind


class Kind(NamedTuple):
    """What pictures must share to be drawn on the same memory."""

    shape: tuple[int, ...]
    guided: bool
    noises: int


class Course(NamedTuple):
    """What they must share besides to be drawn by the same graph."""

    pictures: int
    rows: int
    rescaled: bool
    zeros: bool


class OneLaunch:
    """Draws pictures, as many at a time as there are lanes for.

    Args:
        encoders: the text encoders, in the order in which their states are concatenated.
        unet, decoder: the other networks, on the same device.
        latents: scale and shift.
        lanes: of every UNet call.
        capture: False queues the same work call by call: for comparison, and where a library cannot be captured.
    """

    def __init__(
        self,
        encoders: Sequence[DeviceNetwork],
        unet: DeviceNetwork,
        decoder: DeviceNetwork,
        latents: LatentSpec,
        lanes: int,
        *,
        capture: bool = True,
    ) -> None:
        self._networks = tuple(encoders), unet, decoder
        self._latents, self._lanes, self._capture = latents, lanes, capture
        self._canvases: OrderedDict[Kind, _Canvas] = OrderedDict()

    def draw(self, jobs: Sequence[Job], texts: Sequence[Text]) -> list[Pixels]:
        """Run jobs of one request to their end, each (height, width, 3).

        The jobs' tables, latents, noises and guidance are read, their conditionings are not: the texts are.

        Raises:
            NetworkError: latents or pixels are not finite.
            DeviceMemoryError: the device has no room for such pictures.
            RequestError: a picture needs more lanes than there are.
        """
        for job in jobs:
            check_fresh(job)
        noises = sum(row.c != 0 for row in jobs[0].table.rows)
        on_device = isinstance(jobs[0].noise, TorchCudaNoise)
        kind = Kind(jobs[0].latents.shape, jobs[0].most_lanes == 2, 0 if on_device else noises)
        canvas = self._canvas(kind)
        pixels: list[Pixels] = []
        for first in range(0, len(jobs), canvas.count):
            chosen = slice(first, first + canvas.count)
            pixels += canvas.draw(jobs[chosen], texts[chosen])
        return pixels

    def _canvas(self, kind: Kind) -> _Canvas:
        """The memory for a kind of pictures; the one that was used least recently makes place."""
        if kind not in self._canvases:
            while len(self._canvases) >= KEPT:
                self._canvases.popitem(last=False)[1].close()
            try:
                self._canvases[kind] = self._new(kind)
            except DeviceMemoryError:
                if not self._canvases:
                    raise
                self.close()
                self._canvases[kind] = self._new(kind)
        self._canvases.move_to_end(kind)
        return self._canvases[kind]

    def _new(self, kind: Kind) -> _Canvas:
        needed = 2 if kind.guided else 1
        if self._lanes < needed:
            raise RequestError(
                f"the engine has {self._lanes} lanes", needed=f"{needed}", fix=f"load it with lanes={needed}"
            )
        return _Canvas(self._networks, self._latents, kind, self._lanes, self._capture)

    def close(self) -> None:
        """Give the memory back."""
        while self._canvases:
            self._canvases.popitem()[1].close()


class _Canvas:
    """Device memory for one kind of pictures, the networks bound to it, and its graphs by course."""

    def __init__(
        self,
        networks: tuple[tuple[DeviceNetwork, ...], DeviceNetwork, DeviceNetwork],
        latents: LatentSpec,
        kind: Kind,
        lanes: int,
        capture: bool,
    ) -> None:
        encoders, unet, decoder = networks
        self.count = lanes // (2 if kind.guided else 1)
        self._latents, self._kind, self._capture = latents, kind, capture
        self._gpu = unet.gpu
        self._arena = Arena(unet, kind.shape, lanes, slots=self.count, noises=max(1, kind.noises))
        self._bounds: list[Bound] = []
        self._graphs: OrderedDict[Course, Graph] = OrderedDict()
        try:
            self._bind_text(encoders, lanes)
            self._bind_decoder(decoder)
        except BaseException:
            self.close()
            raise

    def _bind_text(self, encoders: Sequence[DeviceNetwork], lanes: int) -> None:
        """Bind encoders to the UNet's own inputs; where there are two, their states are copied side by side."""
        zeros, conditioning = self._arena.zeros, self._arena.conditioning
        self._ids: list[DeviceArray] = []
        self._states: list[DeviceArray] = []
        for encoder in encoders:
            (ids,) = encoder.graph.inputs
            outputs = {tensor.name: tensor for tensor in encoder.graph.outputs}
            self._ids.append(zeros((lanes, *ids.shape[1:]), ids.dtype))  # type: ignore[arg-type]
            states = outputs["text_states"]
            alone = conditioning["encoder_hidden_states"]
            if len(encoders) > 1:
                alone = zeros((lanes, *states.shape[1:]), states.dtype)  # type: ignore[arg-type]
            self._states.append(alone)
            arrays = {ids.name: self._ids[-1], "text_states": alone}
            if "text_embeds" in outputs:
                arrays["text_embeds"] = conditioning["text_embeds"]
            self._bounds.append(encoder.bind(arrays))

    def _bind_decoder(self, decoder: DeviceNetwork) -> None:
        channels, height, width = self._kind.shape
        pixels = height * self._latents.factor, width * self._latents.factor
        zeros = self._arena.zeros
        self._vae_latents = zeros((1, channels, height, width), decoder.graph.inputs[0].dtype)
        self._image = zeros((1, 3, *pixels), decoder.graph.outputs[0].dtype)
        self._decoder = decoder.bind({"latents": self._vae_latents, "image": self._image})
        self._bounds.append(self._decoder)
        self._result = zeros((self.count * (PROGRESS.itemsize + 4 + pixels[0] * pixels[1] * 3),), np.uint8)
        base = self._result.pointer
        self._progress = DeviceArray(base, (self.count,), PROGRESS)
        self._bad = DeviceArray(base + self._progress.bytes, (self.count,), np.dtype(np.int32))
        start = base + self._progress.bytes + self._bad.bytes
        self._pixels = DeviceArray(start, (self.count, *pixels, 3), np.dtype(np.uint8))

    def draw(self, jobs: Sequence[Job], texts: Sequence[Text]) -> list[Pixels]:
        """Run up to `count` jobs; slots beyond them stay idle."""
        course = Course(len(jobs), len(jobs[0].table), jobs[0].guidance.rescale > 0, texts[0].uncond is None)
        if self._arena.make_room_for(jobs):
            self._close_graphs()
        for slot, (job, text) in enumerate(zip(jobs, texts, strict=True)):
            self._place(slot, job, text)
        for slot in range(len(jobs), self.count):
            self._arena.empty(slot)
        if self._capture:
            self._graph(course).launch()
        else:
            self._enqueue(course)
        return self._fetch(jobs)

    def _graph(self, course: Course) -> Graph:
        """The graph of a course; the one that was launched least recently makes place, and all do for memory."""
        if course not in self._graphs:
            while len(self._graphs) >= GRAPHS_KEPT:
                self._graphs.popitem(last=False)[1].close()
            try:
                self._graphs[course] = self._captured(course)
            except DeviceMemoryError:  # a graph has device memory too, the more the longer it is
                if not self._graphs:
                    raise
                self._close_graphs()
                self._graphs[course] = self._captured(course)
        self._graphs.move_to_end(course)
        return self._graphs[course]

    def _captured(self, course: Course) -> Graph:
        """A new graph. Every network is called once outside it: what a library sets up for new shapes is then done."""
        self._arena.call_network()
        for bound in self._bounds:
            bound.enqueue()
        with self._gpu.capture() as graph:
            self._enqueue(course)
        return graph

    def _place(self, slot: int, job: Job, text: Text) -> None:
        lanes = [slot, self.count + slot] if self._kind.guided else [slot]
        sides = [text.uncond, text.cond] if self._kind.guided else [text.cond]
        for lane, side in zip(lanes, sides, strict=True):
            for array, ids in zip(self._ids, side or (), strict=side is not None):
                self._gpu.upload(ids.astype(array.dtype)[None], array.part(lane))
            if text.time_ids is not None:
                target = self._arena.conditioning["time_ids"]
                self._gpu.upload(text.time_ids.astype(target.dtype)[None], target.part(lane))
        self._arena.place(slot, job, lanes)
        if self._kind.noises:
            for index in range(self._kind.noises):
                self._arena.add_noise(slot, index, job.noise.normal(job.latents.shape))

    def _enqueue(self, course: Course) -> None:
        """The way of an image, on the device."""
        self._encode(zeros=course.zeros)
        self._arena.begin()
        for _ in range(course.rows):
            self._arena.row(rescaled=course.rescaled)
        self._decode(course.pictures)
        self._gpu.copy(self._arena.state.progress, self._progress)

    def _encode(self, *, zeros: bool) -> None:
        for bound in self._bounds[: len(self._ids)]:
            bound.enqueue()
        conditioning = self._arena.conditioning
        if len(self._states) > 1:
            column, target = 0, _as_rows(conditioning["encoder_hidden_states"])
            for states in map(_as_rows, self._states):
                self._gpu.copy_columns(states, target, column)
                column += states.shape[1]
        if zeros and self._kind.guided:
            for name in ("encoder_hidden_states", "text_embeds"):
                if name in conditioning:
                    self._gpu.fill_zero(conditioning[name].part(0, self.count))

    def _decode(self, pictures: int) -> None:
        gpu, latents = self._gpu, self._latents
        gpu.fill_zero(self._bad)
        for slot in range(pictures):
            kernels.to_latents(gpu, self._arena.state.x.part(slot), self._vae_latents, latents.scale, latents.shift)
            self._decoder.enqueue()
            kernels.to_pixels(gpu, self._image, self._pixels.part(slot), self._bad.part(slot))

    def _fetch(self, jobs: Sequence[Job]) -> list[Pixels]:
        """One copy back: what became of the rows, of the pixels, and the pixels."""
        data = self._gpu.download(self._result)
        marks, ends = self._progress.bytes, self._progress.bytes + self._bad.bytes
        progress = data[:marks].view(PROGRESS)
        bad = data[marks:ends].view(np.int32)
        pixels = data[ends:].reshape(self._pixels.shape)
        for slot, job in enumerate(jobs):
            job.row = len(job.table)
            if progress["bad"][slot]:
                job.fail(int(progress["bad"][slot]))
                assert job.error is not None
                raise job.error
            if bad[slot]:
                raise NetworkError(
                    "the VAE's pixels are not finite",
                    needed="finite numbers; in half precision large activations overflow",
                    fix="export the checkpoint again, which measures where float32 is needed, or take --precision fp32",
                )
        return [np.array(picture) for picture in pixels[: len(jobs)]]

    def _close_graphs(self) -> None:
        while self._graphs:
            self._graphs.popitem()[1].close()

    def close(self) -> None:
        """Give the memory back."""
        self._close_graphs()
        for bound in self._bounds:
            bound.close()
        self._arena.close()


def _as_rows(array: DeviceArray) -> DeviceArray:
    """(lanes, tokens, dim) as (lanes * tokens, dim)."""
    return array.reshape(array.shape[0] * array.shape[1], array.shape[2])
