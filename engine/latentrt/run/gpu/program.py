"""The whole picture in one launch: text encoders, every row, VAE and pixels as one CUDA graph of a fixed shape.

What differs between pictures (token ids, LoRAs, tables, first latents, noise) is copied to the device before the
launch, and the pixels are copied back after it; between them nothing waits for the host. A graph is captured once for
each kind of shapes, number of rows and kind of guidance; any solver, prompt, seed and guidance scale runs in it. Models
without text encoders, or without a VAE, leave these out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from latentrt.bundle.spec import CONDITIONER, DECODER, LORA, TEXT_ENCODER
from latentrt.cuda import kernels
from latentrt.cuda.array import DeviceArray
from latentrt.cuda.kernels import PROGRESS
from latentrt.errors import NetworkError, RequestError
from latentrt.model.given import Given
from latentrt.model.model import Model
from latentrt.model.predictor import inputs_of
from latentrt.model.prompts.encoder import IDS, MASK, POOLED, STATES, text_input
from latentrt.request import Request
from latentrt.run.gpu.arena import Arena, Depth, check_fresh
from latentrt.run.job import Job, Shapes
from latentrt.run.parts import LaneInputs
from latentrt.run.pool import Pool
from latentrt.runtime.base import Bound, DeviceNetwork
from latentrt.runtime.signature import shape_of, sizes_of
from latentrt.sampling.noise import TorchCudaNoise
from latentrt.sampling.table import Table

Pixels = NDArray[np.uint8]
KEPT = 4  # kinds of pictures whose memory and graphs are kept
TEXT_INPUTS = ("encoder_hidden_states", "text_embeds")


class Kind(NamedTuple):
    """What pictures must have in common to be drawn on the same memory."""

    shapes: Shapes
    lanes: int
    noises: int


class Course(NamedTuple):
    """What they must have in common besides to be drawn by the same graph."""

    pictures: int
    rows: tuple[Depth, ...]
    rescaled: bool
    zeros: bool


class Program:
    """Draws pictures, as many at a time as there are lanes for.

    Args:
        model: its networks are on a GPU.
        lanes: of every call of the predictor.
        capture: False queues the same work call by call: for comparison, and where a library cannot be captured.
    """

    def __init__(self, model: Model, lanes: int, *, capture: bool = True) -> None:
        self._model, self._lanes, self._capture = model, lanes, capture
        self._canvases: Pool[Kind, _Canvas] = Pool(KEPT)

    def draws(self, asked: Sequence[Request], given: Given | None) -> bool:
        """Return whether one graph draws these requests' pictures: none in several stages, or decoded in tiles."""
        stages = any(one.hires_scale is not None or one.handoff is not None for one in asked)
        return not stages and not self._in_tiles(asked, given) and all(map(self._model.draws_at_once, asked))

    def _in_tiles(self, asked: Sequence[Request], given: Given | None) -> bool:
        if self._model.tiles is None or not asked:
            return False
        size = (asked[0].height, asked[0].width) if given is None else given.size
        return self._model.tiles.cut(*self._model.spec.latents.shape_of(*size)[1:])

    def draw(self, jobs: Sequence[Job]) -> list[Pixels]:
        """Run jobs of one request to their end; return the pictures, each (height, width, channels).

        Instead of the text encoders' outputs, the jobs' inputs have token ids by the encoders' names.

        Raises:
            NetworkError: latents or pixels are not finite.
            DeviceMemoryError: the device has too little memory for such pictures.
            RequestError: a picture needs more lanes than there are.
        """
        for job in jobs:
            check_fresh(job)
        noises = sum(row.c != 0 for row in jobs[0].table.rows)
        on_device = isinstance(jobs[0].noise, TorchCudaNoise)
        kind = Kind(jobs[0].shapes, jobs[0].most_lanes, 0 if on_device else noises)
        canvas = self._canvases(kind, lambda: self._canvas(kind))
        pixels: list[Pixels] = []
        for first in range(0, len(jobs), canvas.count):
            pixels += canvas.draw(jobs[first : first + canvas.count])
        return pixels

    def _canvas(self, kind: Kind) -> _Canvas:
        if self._lanes < kind.lanes:
            raise RequestError(f"the engine has {self._lanes} lanes", needed=f"one loaded with lanes={kind.lanes}")
        return _Canvas(self._model, kind, self._lanes, self._capture)

    def close(self) -> None:
        """Free the memory."""
        self._canvases.close()


class _Canvas:
    """An arena for one kind of pictures, with the other networks bound to it."""

    def __init__(self, model: Model, kind: Kind, lanes: int, capture: bool) -> None:
        self.count = lanes // kind.lanes
        self._latents, self._kind = model.spec.latents, kind
        noises = max(1, kind.noises)
        self._sizes = {"batch": lanes, "tokens": model.spec.tokens}
        self._arena = Arena(
            model.predictor,
            kind.shapes,
            lanes,
            slots=self.count,
            noises=noises,
            capture=capture,
            sizes=self._sizes,
        )
        self._gpu = self._arena.gpu
        self._states: list[DeviceArray] = []
        self._encoders: list[Bound] = []
        self._hoisted: list[Bound] = []
        self._decoder: Bound | None = None
        try:
            hoisted = [on_device(model, name) for name in model.spec.named(CONDITIONER)]
            encoders = {name: on_device(model, name) for name in model.spec.named(TEXT_ENCODER)}
            self._texts = frozenset(encoders)
            self._told = self._make_told(encoders, hoisted)
            self._bind_hoisted(hoisted)
            for name, encoder in encoders.items():
                self._bind_encoder(name, encoder, alone=len(encoders) == 1)
            self._bind_decoder(next((on_device(model, name) for name in model.spec.named(DECODER)), None))
        except BaseException:
            self.close()
            raise

    def _make_told(self, encoders: Mapping[str, DeviceNetwork], hoisted: Sequence[DeviceNetwork]) -> LaneInputs:
        """Return memory for what lanes bring for these networks: ids by the encoders' names, and LoRAs."""
        read = {tensor.name: tensor for network in hoisted for tensor in network.graph.inputs}
        for name, encoder in encoders.items():
            read |= {text_input(name, tensor.name): tensor for tensor in encoder.graph.inputs}
        names = [name for name in read if LORA in name or name in encoders]
        tensors = {name: replace(read[name], name=name) for name in names}
        parts, latents = [range(self._arena.lanes)], self._kind.shapes.latents
        own = [{name: shape for name, shape in self._kind.shapes.sides[0] if name in names}]
        return LaneInputs(self._gpu, self._arena.zeros, tensors, list(tensors.values()), parts, own, latents, {})

    def _bind_hoisted(self, networks: Sequence[DeviceNetwork]) -> None:
        """Bind what is computed once a picture to the predictor's inputs; what it alone reads gets memory here."""
        self._inputs = {**self._told.arrays[0], **self._arena.inputs}
        for name, tensor in inputs_of([network.graph for network in networks]).items():
            if name not in self._inputs:
                self._inputs[name] = self._arena.zeros(shape_of(tensor, self._sizes), tensor.dtype)
        for network in networks:
            tensors = (*network.graph.inputs, *network.graph.outputs)
            self._hoisted.append(network.bind({tensor.name: self._inputs[tensor.name] for tensor in tensors}))

    def _bind_encoder(self, name: str, encoder: DeviceNetwork, *, alone: bool) -> None:
        """Bind an encoder to the predictor's own inputs; states of several are copied side by side."""
        inputs = self._inputs
        sizes = sizes_of(encoder.graph.inputs, {IDS: inputs[name].shape})
        arrays = {POOLED: inputs[POOLED]} if POOLED in inputs else {}
        arrays |= {STATES: inputs["encoder_hidden_states"]} if alone else {}
        told = {tensor.name: text_input(name, tensor.name) for tensor in encoder.graph.inputs}
        arrays |= {own: inputs[known] for own, known in told.items() if known in self._told.arrays[0]}
        tensors = (*encoder.graph.inputs, *encoder.graph.outputs)
        bound = {t.name: arrays.get(t.name) or self._arena.zeros(shape_of(t, sizes), t.dtype) for t in tensors}
        if MASK in bound:  # the vectors beside it stay zeros, which no id asks for
            self._gpu.upload(np.ones(bound[MASK].shape, bound[MASK].dtype), bound[MASK])
        self._states.append(bound[STATES])
        self._encoders.append(encoder.bind(bound))

    def _bind_decoder(self, decoder: DeviceNetwork | None) -> None:
        """Bind the decoder; the latents of pixel models are pictures as they are."""
        channels, height, width = self._kind.shapes.latents
        size, zeros = (height * self._latents.factor, width * self._latents.factor), self._arena.zeros
        if decoder is not None:
            channels = 3
            self._vae_latents = zeros((1, *self._kind.shapes.latents), decoder.graph.inputs[0].dtype)
            self._image = zeros((1, channels, *size), decoder.graph.outputs[0].dtype)
            self._decoder = decoder.bind({"latents": self._vae_latents, "image": self._image})
        area = size[0] * size[1] * channels
        self._result = zeros((self.count * (PROGRESS.itemsize + 4 + area),), np.uint8)
        base = self._result.pointer
        self._progress = DeviceArray(base, (self.count,), PROGRESS)
        self._bad = DeviceArray(base + self._progress.bytes, (self.count,), np.dtype(np.int32))
        start = base + self._progress.bytes + self._bad.bytes
        self._pixels = DeviceArray(start, (self.count, *size, channels), np.dtype(np.uint8))

    def draw(self, jobs: Sequence[Job]) -> list[Pixels]:
        """Run up to `count` jobs; slots beyond them stay idle."""
        zeros = bool(self._texts) and not self._texts & set(jobs[0].uncond)
        course = Course(len(jobs), _depths(jobs[0].table), jobs[0].guidance.rescale > 0, zeros)
        self._arena.make_room_for(jobs)
        for slot, job in enumerate(jobs):
            self._place(slot, job)
        for slot in range(len(jobs), self.count):
            self._arena.empty(slot)
            for lane in self._lanes_of(slot):
                self._arena.clear(lane)
                self._told.clear(lane)
        self._arena.launch(course, lambda: self._enqueue(course), lambda: self._warm_up(course))
        return self._fetch(jobs)

    def _warm_up(self, course: Course) -> None:
        for depth in set(course.rows):
            self._arena.call_network(depth)
        for bound in self._bounds:
            bound.enqueue()

    def _place(self, slot: int, job: Job) -> None:
        lanes = self._lanes_of(slot)
        for lane, side in zip(lanes, job.sides, strict=True):
            self._told.fill(lane, side)
            self._arena.fill(lane, side)
        self._arena.place(slot, job, lanes)
        for index in range(self._kind.noises):
            self._arena.add_noise(slot, index, job.noise.normal(job.latents.shape))

    def _lanes_of(self, slot: int) -> list[int]:
        return [slot + number * self.count for number in range(self._kind.lanes)]

    def _enqueue(self, course: Course) -> None:
        """Queue the work of whole pictures on the device."""
        self._encode(zeros=course.zeros)
        self._arena.begin()
        for depth in course.rows:
            self._arena.row(rescaled=course.rescaled, depth=depth)
        self._decode(course.pictures)
        self._gpu.copy(self._arena.state.progress, self._progress)

    def _encode(self, *, zeros: bool) -> None:
        for bound in self._encoders:
            bound.enqueue()
        if len(self._states) > 1:
            column, target = 0, _as_rows(self._inputs["encoder_hidden_states"])
            for states in map(_as_rows, self._states):
                self._gpu.copy_columns(states, target, column)
                column += states.shape[1]
        if zeros and self._kind.lanes > 1:
            for name in TEXT_INPUTS:
                if name in self._inputs:
                    self._gpu.fill_zero(self._inputs[name].part(0, (self._kind.lanes - 1) * self.count))
        for bound in self._hoisted:
            bound.enqueue()

    def _decode(self, pictures: int) -> None:
        gpu, latents = self._gpu, self._latents
        gpu.fill_zero(self._bad)
        for slot in range(pictures):
            image = self._arena.state.x.part(slot)
            if self._decoder is not None:
                kernels.to_latents(gpu, image, self._vae_latents, latents.scale, latents.shift)
                self._decoder.enqueue()
                image = self._image
            kernels.to_pixels(gpu, image, self._pixels.part(slot), self._bad.part(slot))

    def _fetch(self, jobs: Sequence[Job]) -> list[Pixels]:
        """Copy back, at once, the rows' progress, the flags of bad pixels, and the pixels; return the pixels."""
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

    @property
    def _bounds(self) -> list[Bound]:
        return [*self._encoders, *self._hoisted, *([self._decoder] if self._decoder is not None else [])]

    def close(self) -> None:
        """Free the memory."""
        self._arena.close_graphs()
        for bound in self._bounds:
            bound.close()
        self._arena.close()


def _depths(table: Table) -> tuple[Depth, ...]:
    if not table.shallow:
        return (Depth.FULL,) * len(table)
    return tuple(Depth.SHALLOW if shallow else Depth.KEPT for shallow in table.shallow)


def _as_rows(array: DeviceArray) -> DeviceArray:
    """Return (lanes, tokens, dim) as (lanes * tokens, dim)."""
    return array.reshape(array.shape[0] * array.shape[1], array.shape[2])


def on_device(model: Model, name: str) -> DeviceNetwork:
    """Return a network of a model whose networks are on a GPU."""
    return cast(DeviceNetwork, model.networks[name].open())
