"""Lanes on a GPU: latents, memories, tables and row indices live in device memory, and a tick is one CUDA graph.

The host only says who sits where. A row is the network's call and one kernel (`backends/advance.cu`), which also moves
the row index on and writes the network's next input: nothing waits for the host between rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.cuda import kernels
from latentrt.cuda.base import DeviceArray, Graph
from latentrt.cuda.kernels import BLEND, PREVIEW, PROGRESS, ROW_COLUMNS, SLOT, State
from latentrt.errors import DeviceMemoryError, RequestError
from latentrt.model.networks import Conditioning
from latentrt.run.job import Job
from latentrt.runtime.base import DeviceNetwork
from latentrt.sampling.noise import TorchCudaNoise
from latentrt.sampling.table import COLUMNS, SLOTS, Kept, Table

MAX_ROWS = 2000  # of a table: Heun over a schedule of 1000 timesteps has 1999
ROOMS_KEPT = 4  # latent shapes whose memory is kept where nobody needs it
TICKS_AHEAD = 2  # how far the host may run ahead of the device


class Arena:
    """Device memory for `lanes` lanes of one latent shape, with the UNet bound to it.

    Args:
        unet: the network; every call has exactly `lanes` lanes, so that a lane's results never depend on how many jobs
            there are.
        shape: of one job's latents, (channels, height, width).
        slots: how many jobs there may be.
        noises: how many noises of the host's a job may have waiting.

    Raises:
        DeviceMemoryError: there is not enough memory; nothing is kept.
        NetworkError, PlanError: the network does not take this shape.
    """

    def __init__(
        self, unet: DeviceNetwork, shape: Sequence[int], lanes: int, *, slots: int | None = None, noises: int = 1
    ) -> None:
        self.gpu, self.shape, self.lanes = unet.gpu, tuple(shape), lanes
        self.slots = lanes if slots is None else slots
        self._owned: list[DeviceArray] = []
        inputs = {tensor.name: tensor for tensor in unet.graph.inputs}
        (out,) = unet.graph.outputs
        try:
            sample = self.zeros((lanes, *shape), inputs["sample"].dtype)
            timestep = self.zeros((lanes,), inputs["timestep"].dtype)
            self.conditioning = {
                name: self.zeros((lanes, *tensor.shape[1:]), tensor.dtype)  # type: ignore[arg-type]
                for name, tensor in inputs.items()
                if name not in ("sample", "timestep")
            }
            self.state = State(
                sample=sample,
                timestep=timestep,
                out=self.zeros((lanes, *shape), out.dtype),
                x=self.zeros((self.slots, *shape), np.float32),
                memory=self.zeros((self.slots, SLOTS, *shape), np.float32),
                table=self.zeros((self.slots, MAX_ROWS, len(ROW_COLUMNS)), np.float32),
                slots=self.zeros((self.slots,), SLOT),
                progress=self.zeros((self.slots,), PROGRESS),
                preview=self.zeros((self.slots, *shape), np.float32),
                noise=self.zeros((self.slots, noises, *shape), np.float32),
                deviation=self.zeros((self.slots, 2), np.float32),
            )
            named = {"sample": sample, "timestep": timestep, "out": self.state.out, **self.conditioning}
            self._bound = unet.bind(named)
        except BaseException:
            self._free()
            raise

    def zeros(self, shape: Sequence[int], dtype: Any) -> DeviceArray:
        """Memory that is freed with the arena."""
        array = self.gpu.zeros(shape, dtype)
        self._owned.append(array)
        return array

    def make_room_for(self, jobs: Sequence[Job]) -> bool:
        """Take memory for what jobs keep of given pictures, where there is none yet and a job keeps something.

        Returns:
            Whether there is more now, so that graphs captured before know too little.

        Raises:
            DeviceMemoryError: there is not enough memory; nothing has changed.
        """
        if self.state.mask is not None or all(job.kept is None for job in jobs):
            return False
        held = self.zeros((3, self.slots, *self.shape), np.float32)
        mask, known, noise = (held.part(k).reshape(self.slots, *self.shape) for k in range(3))
        self.state = replace(self.state, mask=mask, known=known, known_noise=noise)
        return True

    def place(self, slot: int, job: Job, lanes: Sequence[int]) -> None:
        """Queue the copies that put a job with its latents into a slot; its conditioning is placed by `condition`."""
        table = rows_of(job.table)
        self.gpu.upload(table, self._rows(slot, len(table)))
        self.gpu.upload(job.latents.astype(np.float32, copy=False)[None], self.state.x.part(slot))
        self.gpu.upload(np.zeros(1, PROGRESS), self.state.progress.part(slot))
        if job.kept is not None:
            self._place_kept(slot, job.kept)
        self.seat(slot, job, lanes)

    def _place_kept(self, slot: int, kept: Kept) -> None:
        targets = self.state.mask, self.state.known, self.state.known_noise
        for array, target in zip((kept.mask, kept.clean, kept.noise), targets, strict=True):
            assert target is not None, "make_room_for comes first"
            self.gpu.upload(array[None], target.part(slot))

    def seat(self, slot: int, job: Job, lanes: Sequence[int]) -> None:
        """Queue the copy of what the kernel must know of a job: its lanes (uncond, cond), guidance, noise and flags."""
        self.gpu.upload(slot_of(job, lanes), self.state.slots.part(slot))

    def condition(self, lane: int, conditioning: Conditioning) -> None:
        """Queue the copies of one lane's conditioning."""
        for name, array in self.conditioning.items():
            self.gpu.upload(conditioning[name].astype(array.dtype)[None], array.part(lane))

    def empty(self, slot: int) -> None:
        """Queue the copy that leaves a slot idle."""
        self.gpu.upload(np.zeros(1, SLOT), self.state.slots.part(slot))

    def add_noise(self, slot: int, index: int, noise: NDArray[np.float32]) -> None:
        """Queue the copy of the noise for the `index`th row of a job that adds one."""
        assert self.state.noise is not None
        ring = self.state.noise.part(slot).reshape(*self.state.noise.shape[1:])
        self.gpu.upload(noise[None], ring.part(index % ring.shape[0]))

    def begin(self, first: int = 0, count: int | None = None) -> None:
        """Queue the first input of newly placed jobs."""
        kernels.begin(self.gpu, self.state, first, count)

    def call_network(self) -> None:
        """Queue a call of the network on whatever its input is."""
        self._bound.enqueue()

    def row(self, *, rescaled: bool) -> None:
        """Queue one row of every job: a call of the network, then the kernel."""
        self.call_network()
        if rescaled:
            kernels.deviations(self.gpu, self.state)
        kernels.advance(self.gpu, self.state)

    def _rows(self, slot: int, rows: int) -> DeviceArray:
        array = self.state.table.part(slot)
        return DeviceArray(array.pointer, (rows, len(ROW_COLUMNS)), array.dtype)

    def close(self) -> None:
        """Give the memory back."""
        self._bound.close()
        self._free()

    def _free(self) -> None:
        while self._owned:
            self.gpu.free(self._owned.pop())


class DeviceLanes:
    """The lanes of a UNet on a GPU (`latentrt.run.host.Lanes`).

    A job's `latents` are those it was admitted with until it is done, or after every row where it wants previews; only
    then the host waits for the device. A job that is retired before it is done cannot go on.

    Args:
        unet: the network.
        count: lanes of every call; idle ones are computed too, and ignored.
        capture: whether a tick is captured once as a CUDA graph and launched as a whole, or queued call by call.
    """

    def __init__(self, unet: DeviceNetwork, count: int, *, capture: bool = True) -> None:
        self.count = count
        self._unet, self._capture = unet, capture
        self._rooms: dict[tuple[int, ...], _Room] = {}

    def admit(self, job: Job) -> None:
        """Copy the job to the device.

        Raises:
            RequestError: it has begun elsewhere, or has too many rows.
            DeviceMemoryError: there is no room for its latent shape.
        """
        check_fresh(job)
        self._room(job.latents.shape).admit(job)

    def retire(self, job: Job) -> None:
        """Leave its slot idle."""
        self._rooms[job.latents.shape].retire(job)

    def advance(self, jobs: list[Job]) -> None:
        """Queue one row of all jobs of this shape; wait only for those that are done or want previews."""
        self._rooms[jobs[0].latents.shape].advance(jobs)

    def close(self) -> None:
        """Give the memory back."""
        for shape in list(self._rooms):
            self._rooms.pop(shape).close()

    def _room(self, shape: tuple[int, ...]) -> _Room:
        """The room of a shape; rooms that nobody uses make place, one for each beyond ROOMS_KEPT and all for memory."""
        if shape not in self._rooms:
            idle = [other for other, room in self._rooms.items() if not room.places]
            for other in idle[: max(0, len(self._rooms) - ROOMS_KEPT + 1)]:
                self._rooms.pop(other).close()
                idle.remove(other)
            try:
                self._rooms[shape] = _Room(self._unet, shape, self.count, self._capture)
            except DeviceMemoryError:
                if not idle:
                    raise
                for other in idle:
                    self._rooms.pop(other).close()
                return self._room(shape)
        return self._rooms[shape]


class _Room:
    """An arena, who sits where in it, and its tick as a graph."""

    def __init__(self, unet: DeviceNetwork, shape: tuple[int, ...], lanes: int, capture: bool) -> None:
        self._arena = Arena(unet, shape, lanes)
        self._gpu = unet.gpu
        self._capture = capture
        self._graphs: dict[bool, Graph] = {}
        self._marks: deque[Any] = deque()
        self._free_lanes = list(range(lanes))
        self._free_slots = list(range(lanes))
        self.places: dict[Job, tuple[int, list[int]]] = {}
        self._noises: dict[Job, int] = {}
        self._previewed: set[Job] = set()

    def admit(self, job: Job) -> None:
        if self._arena.make_room_for([job]):
            self._close_graphs()
        slot = self._free_slots.pop(0)
        lanes = [self._free_lanes.pop(0) for _ in range(job.most_lanes)]
        self.places[job] = slot, lanes
        self._noises[job] = 0
        for lane, conditioning in zip(lanes, (job.uncond, job.cond)[-len(lanes) :], strict=True):
            self._arena.condition(lane, conditioning)
        self._arena.place(slot, job, lanes)
        if job.wants_preview:
            self._previewed.add(job)
        self._arena.begin(slot, 1)

    def retire(self, job: Job) -> None:
        slot, lanes = self.places.pop(job)
        self._noises.pop(job)
        self._previewed.discard(job)
        self._arena.empty(slot)
        self._free_slots = sorted([*self._free_slots, slot])
        self._free_lanes = sorted([*self._free_lanes, *lanes])

    def advance(self, jobs: list[Job]) -> None:
        for job in jobs:
            self._prepare(job)
        self._tick(rescaled=any(job.guidance.rescale for job in jobs))
        for job in jobs:
            job.row += 1
            if job.done or job.wants_preview:
                self._fetch(job)

    def _prepare(self, job: Job) -> None:
        slot, lanes = self.places[job]
        if job.wants_preview != (job in self._previewed):
            (self._previewed.add if job.wants_preview else self._previewed.remove)(job)
            self._arena.seat(slot, job, lanes)
        if job.table.rows[job.row].c and not isinstance(job.noise, TorchCudaNoise):
            self._arena.add_noise(slot, self._noises[job], job.noise.normal(job.latents.shape))
            self._noises[job] += 1

    def _tick(self, *, rescaled: bool) -> None:
        """The device works on a tick while the host prepares the next, and not further: cancelling stays prompt."""
        while len(self._marks) >= TICKS_AHEAD:
            self._gpu.wait_for(self._marks.popleft())
        if not self._capture:
            self._arena.row(rescaled=rescaled)
        else:
            if rescaled not in self._graphs:
                self._arena.call_network()  # what a library sets up when shapes change is not captured then
                with self._gpu.capture() as graph:
                    self._arena.row(rescaled=rescaled)
                self._graphs[rescaled] = graph
            self._graphs[rescaled].launch()
        self._marks.append(self._gpu.mark())

    def _fetch(self, job: Job) -> None:
        slot, _ = self.places[job]
        state = self._arena.state
        job.latents = self._gpu.download(state.x.part(slot))[0]
        if job.wants_preview:
            assert state.preview is not None
            job.preview = self._gpu.download(state.preview.part(slot))[0]
        bad = int(self._gpu.download(state.progress.part(slot))["bad"][0])
        if bad:
            job.fail(bad)

    def _close_graphs(self) -> None:
        while self._graphs:
            self._graphs.popitem()[1].close()

    def close(self) -> None:
        self._close_graphs()
        self._arena.close()


def check_fresh(job: Job) -> None:
    """Refuse what cannot begin on a device.

    Raises:
        RequestError: the job has begun elsewhere, or has too many rows.
    """
    if job.row:
        raise RequestError(
            f"the job has run {job.row} rows", needed="a job that waits for its first row", fix="make a new job"
        )
    if len(job.table) > MAX_ROWS:
        raise RequestError(f"the table has {len(job.table)} rows", needed=f"{MAX_ROWS} at most", fix="take fewer steps")


def rows_of(table: Table) -> NDArray[np.float32]:
    """A table as the kernel reads it, (rows, 17): with what a picture that is kept has after each row."""
    array = np.empty((len(table), len(ROW_COLUMNS)), np.float32)
    array[:, : len(COLUMNS)], array[:, len(COLUMNS) :] = table.array, table.known[1:]
    return array


def slot_of(job: Job, lanes: Sequence[int]) -> NDArray[Any]:
    """What the kernel must know of a job whose lanes are (uncond, cond) or (cond,)."""
    rows, guidance = len(job.table), job.guidance
    guided = [row for row in range(rows) if guidance.acts(row, rows)] or [0, -1]
    slot = np.zeros(1, SLOT)
    slot["rows"], slot["scale"], slot["rescale"] = rows, guidance.scale, guidance.rescale
    slot["lane_cond"], slot["lane_uncond"] = lanes[-1], lanes[0] if len(lanes) == 2 else -1
    slot["guided_from"], slot["guided_to"] = guided[0], guided[-1] + 1
    slot["flags"] = (PREVIEW if job.wants_preview else 0) | (BLEND if job.kept is not None else 0)
    if isinstance(job.noise, TorchCudaNoise):
        slot["seed"], slot["draws"] = job.noise.seed, job.noise.draws
        slot["threads"], slot["start"] = job.noise.threads(job.latents.size), job.start
    return slot
