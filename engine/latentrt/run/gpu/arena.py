"""Device memory for jobs of the same shapes (latents, memories, tables, row indices), with the predictor bound to it.

The host only assigns jobs to slots and lanes. A row is the predictor's call and one kernel (`cuda/advance.cu`), which
also increments the row index and writes the predictor's next input: nothing waits for the host between rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import replace
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.cuda import kernels
from latentrt.cuda.array import DeviceArray
from latentrt.cuda.gpu import Graph
from latentrt.cuda.kernels import BLEND, PREVIEW, PROGRESS, ROW_COLUMNS, SLOT, State
from latentrt.errors import RequestError
from latentrt.model.predictor import DEEP, OWN, Predictor
from latentrt.run.job import Job, Shapes
from latentrt.run.parts import LaneInputs, Parts, parts_of
from latentrt.run.pool import Pool
from latentrt.runtime.base import Bound
from latentrt.runtime.signature import shape_of, sizes_of
from latentrt.sampling.noise import TorchCudaNoise
from latentrt.sampling.rows import SLOTS
from latentrt.sampling.table import COLUMNS, Kept, Table

MAX_ROWS = 2000  # of a table: Heun over a schedule of 1000 timesteps has 1999
GRAPHS_KEPT = 8  # captured graphs of an arena
ALIGNED = 64  # float32 numbers in 256 bytes, of which addresses of inputs are multiples


class Depth(Enum):
    """How a row calls the predictor: in full, in full for rows that use its deep features again, or with those."""

    FULL, KEPT, SHALLOW = range(3)

    @classmethod
    def of(cls, jobs: Sequence[Job]) -> Depth:
        """Return the depth of the next row of jobs that are moved together."""
        if jobs[0].shallow:
            return cls.SHALLOW
        return cls.KEPT if any(job.table.shallow for job in jobs) else cls.FULL


class Arena:
    """Memory for `lanes` lanes.

    Args:
        predictor: every call has exactly `lanes` lanes, so that a lane's results never depend on how many jobs there
            are.
        shapes: of the jobs. Inputs that they do not have are computed by other networks, in the signature's own shape.
        lanes: of a call.
        slots: the most jobs.
        noises: the most noises of the host's that a job may have waiting.
        capture: whether work is captured once as a CUDA graph and launched as a whole, or queued call by call.
        sizes: of symbolic dimensions that the jobs' inputs do not tell.

    Raises:
        DeviceMemoryError: there is not enough memory; nothing is kept.
        NetworkError, PlanError: the predictor does not take these shapes.
    """

    def __init__(
        self,
        predictor: Predictor,
        shapes: Shapes,
        lanes: int,
        *,
        slots: int | None = None,
        noises: int = 1,
        capture: bool = True,
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        self.gpu, self.shapes, self.lanes = predictor.gpu, shapes, lanes
        self.parts = parts_of(lanes, len(shapes.sides))
        self._sizes = dict(sizes or {})
        self.slots = lanes if slots is None else slots
        self._capture = capture
        self._owned: list[DeviceArray] = []
        self._graphs: Pool[Hashable, Graph] = Pool(GRAPHS_KEPT)
        self._predictor = predictor
        self._shallow: Bound | None = None
        try:
            self._make(predictor, noises)
        except BaseException:
            self._free()
            raise

    def _make(self, predictor: Predictor, noises: int) -> None:
        inputs, latents, slots = predictor.inputs, self.shapes.latents, self.slots
        sizes = sizes_of(list(inputs.values()), {"sample": (self.lanes, *latents)})
        scalars = self.shapes.scalars
        stride = -(-self.lanes // ALIGNED) * ALIGNED
        named = {name: self.zeros(shape_of(inputs[name], sizes), inputs[name].dtype) for name in OWN if name in inputs}
        tensors = {name: tensor for name, tensor in inputs.items() if name not in (*OWN, *scalars)}
        own = [dict(side) for side in self.shapes.sides]
        known = list(inputs.values())
        self._lanes = LaneInputs(self.gpu, self.zeros, tensors, known, self.parts, own, latents, self._sizes)
        self.state = State(
            sample=named["sample"],
            timestep=named.get("timestep") or self.zeros((self.lanes,), np.float32),  # which not every denoiser reads
            out=self.zeros((self.lanes, *latents), predictor.output.dtype),
            x=self.zeros((slots, *latents), np.float32),
            memory=self.zeros((slots, SLOTS, *latents), np.float32),
            table=self.zeros((slots, MAX_ROWS, len(ROW_COLUMNS)), np.float32),
            slots=self.zeros((slots,), SLOT),
            progress=self.zeros((slots,), PROGRESS),
            preview=self.zeros((slots, *latents), np.float32),
            noise=self.zeros((slots, noises, *latents), np.float32),
            deviation=self.zeros((slots, 2), np.float32),
            scalars=self.zeros((len(scalars), stride), np.float32) if scalars else None,
            scalar_rows=self.zeros((slots, MAX_ROWS, len(scalars)), np.float32) if scalars else None,
        )
        for index, name in enumerate(scalars):
            assert self.state.scalars is not None
            named[name] = DeviceArray(self.state.scalars.part(index).pointer, (self.lanes,), np.dtype(np.float32))
        if predictor.caches:
            deep = predictor.deep
            named[DEEP] = self.zeros(shape_of(deep, sizes), deep.dtype)
        self._named: Mapping[str, DeviceArray] = {**named, "out": self.state.out}
        self._bound = self._bind(lambda arrays: predictor.bind(arrays, self.zeros), self._named, {"out", DEEP})

    def _bind(
        self, bind: Callable[[Mapping[str, DeviceArray]], Bound], named: Mapping[str, DeviceArray], given: set[str]
    ) -> Bound:
        """Bind all lanes, or each part of them; `given` are the names of what is computed."""
        if len(self.parts) == 1:
            return bind({**named, **self._lanes.arrays[0]})
        return Parts(self.gpu, bind, self.zeros, self.parts, self._lanes.arrays, named, given)

    @property
    def inputs(self) -> Mapping[str, DeviceArray]:
        """The predictor's inputs besides what the rows fill, where all lanes have the same shapes."""
        (own,) = self._lanes.arrays
        return own

    def zeros(self, shape: Sequence[int], dtype: Any) -> DeviceArray:
        """Return memory that is freed with the arena."""
        array = self.gpu.zeros(shape, dtype)
        self._owned.append(array)
        return array

    # ---- Slots and lanes

    def make_room_for(self, jobs: Sequence[Job]) -> None:
        """Allocate memory for what jobs keep of given pictures, and of their full rows, where a job is the first to.

        Raises:
            DeviceMemoryError: there is not enough memory; nothing has changed.
        """
        if self._shallow is None and any(job.table.shallow for job in jobs):
            self._make_shallow()
        if self.state.mask is not None or all(job.kept is None for job in jobs):
            return
        shape = self.slots, *self.shapes.latents
        held = self.zeros((3, *shape), np.float32)
        mask, known, noise = (held.part(k).reshape(*shape) for k in range(3))
        self.state = replace(self.state, mask=mask, known=known, known_noise=noise)
        self.close_graphs()  # they were captured without it

    def _make_shallow(self) -> None:
        deep = self._named[DEEP]
        self._kept = self.zeros(deep.shape, deep.dtype)
        turn = self.zeros((self.slots,), np.int32)
        self._shallow = self._bind(self._predictor.bind_shallow, {**self._named, DEEP: self._kept}, {"out"})
        self._turn = np.zeros(self.slots, np.int32)
        self.state = replace(self.state, turn=turn)
        self.take_turns(range(self.slots))
        self.close_graphs()  # they were captured without it

    def take_turns(self, slots: Collection[int]) -> None:
        """Queue the copy that lets only these slots advance; without shallow rows all do, which is the same."""
        if self.state.turn is None:
            return
        turn = np.isin(np.arange(self.slots), list(slots)).astype(np.int32)
        if not np.array_equal(turn, self._turn):
            self.gpu.upload(turn, self.state.turn)
            self._turn = turn

    def place(self, slot: int, job: Job, lanes: Sequence[int]) -> None:
        """Queue the copies that put a job with its latents into a slot; its inputs are placed by `fill`."""
        rows = len(job.table)
        self._upload_rows(self.state.table, slot, rows_of(job.table))
        if self.state.scalar_rows is not None:
            columns = [job.table.scalars[name] for name in self.shapes.scalars]
            self._upload_rows(self.state.scalar_rows, slot, np.stack(columns, axis=1).astype(np.float32)[:rows])
        self.gpu.upload(job.latents.astype(np.float32, copy=False)[None], self.state.x.part(slot))
        self.gpu.upload(np.zeros(1, PROGRESS), self.state.progress.part(slot))
        if job.kept is not None:
            self._place_kept(slot, job.kept)
        self.seat(slot, job, lanes)

    def _upload_rows(self, target: DeviceArray, slot: int, rows: NDArray[np.float32]) -> None:
        part = target.part(slot)
        self.gpu.upload(rows, DeviceArray(part.pointer, rows.shape, part.dtype))

    def _place_kept(self, slot: int, kept: Kept) -> None:
        targets = self.state.mask, self.state.known, self.state.known_noise
        for array, target in zip((kept.mask, kept.clean, kept.noise), targets, strict=True):
            assert target is not None, "make_room_for comes first"
            self.gpu.upload(array[None], target.part(slot))

    def seat(self, slot: int, job: Job, lanes: Sequence[int]) -> None:
        """Queue the copy of a job's slot for the kernel: its lanes (uncond, cond), guidance, noise and flags."""
        self.gpu.upload(slot_of(job, lanes), self.state.slots.part(slot))

    def fill(self, lane: int, inputs: Mapping[str, NDArray[Any]]) -> None:
        """Queue the copies of one lane's inputs; see `LaneInputs.fill`."""
        self._lanes.fill(lane, inputs)

    def clear(self, lane: int) -> None:
        """Queue zeros for what was copied to a lane that is no longer a job's."""
        self._lanes.clear(lane)

    def empty(self, slot: int) -> None:
        """Queue the copy that makes a slot idle."""
        self.gpu.upload(np.zeros(1, SLOT), self.state.slots.part(slot))

    def add_noise(self, slot: int, index: int, noise: NDArray[np.float32]) -> None:
        """Queue the copy of the noise for the `index`th row of a job that adds one."""
        assert self.state.noise is not None
        ring = self.state.noise.part(slot).reshape(*self.state.noise.shape[1:])
        self.gpu.upload(noise[None], ring.part(index % ring.shape[0]))

    # ---- Work

    def begin(self, first: int = 0, count: int | None = None) -> None:
        """Queue the first input of newly placed jobs."""
        kernels.begin(self.gpu, self.state, first, count)

    def call_network(self, depth: Depth = Depth.FULL) -> None:
        """Queue a call of the predictor on its current input."""
        bound = self._shallow if depth is Depth.SHALLOW else self._bound
        assert bound is not None, "make_room_for comes first"
        bound.enqueue()

    def row(self, *, rescaled: bool, depth: Depth = Depth.FULL) -> None:
        """Queue one row of every job whose turn it is: a call of the predictor, then the kernel."""
        self.call_network(depth)
        if depth is Depth.KEPT:
            kernels.keep(self.gpu, self.state, self._kept, self._named[DEEP])
        if rescaled:
            kernels.deviations(self.gpu, self.state)
        kernels.advance(self.gpu, self.state)

    def launch(self, key: Hashable, work: Callable[[], None], warm_up: Callable[[], None]) -> None:
        """Queue work as one launch, of a graph that is captured at the first use of its key.

        Args:
            key: the same for the same work.
            work: queues it.
            warm_up: queues every library's calls once, outside the capture, so that what they set up for new shapes is
                done.
        """
        if not self._capture:
            work()
            return
        self._graphs(key, lambda: self._captured(work, warm_up)).launch()

    def _captured(self, work: Callable[[], None], warm_up: Callable[[], None]) -> Graph:
        warm_up()
        with self.gpu.capture() as graph:
            work()
        return graph

    def close_graphs(self) -> None:
        """Close the captured graphs, before anything that they use is closed."""
        self._graphs.close()

    def close(self) -> None:
        """Free the memory."""
        self.close_graphs()
        self._bound.close()
        if self._shallow is not None:
            self._shallow.close()
        self._free()

    def _free(self) -> None:
        while self._owned:
            self.gpu.free(self._owned.pop())


def check_fresh(job: Job) -> None:
    """Refuse a job that cannot begin on a device.

    Raises:
        RequestError: the job has begun elsewhere, or has too many rows.
    """
    if job.row:
        raise RequestError(f"the job has run {job.row} rows", needed="a job that waits for its first row")
    if len(job.table) > MAX_ROWS:
        raise RequestError(f"the table has {len(job.table)} rows", needed=f"{MAX_ROWS} at most", fix="take fewer steps")


def rows_of(table: Table) -> NDArray[np.float32]:
    """Return a table as the kernel reads it, (rows, 17), with the weights of a kept picture after each row."""
    array = np.empty((len(table), len(ROW_COLUMNS)), np.float32)
    array[:, : len(COLUMNS)], array[:, len(COLUMNS) :] = table.array, table.known[1:]
    return array


def slot_of(job: Job, lanes: Sequence[int]) -> NDArray[Any]:
    """Return a job's slot as the kernel reads it; its lanes are (cond,), (uncond, cond) or (uncond, image, cond)."""
    rows, guidance = len(job.table), job.guidance
    guided = [row for row in range(rows) if guidance.acts(row, rows)] or [0, -1]
    slot = np.zeros(1, SLOT)
    slot["rows"], slot["scale"], slot["rescale"] = rows, guidance.scale, guidance.rescale
    slot["lane_cond"], slot["lane_uncond"] = lanes[-1], lanes[0] if len(lanes) > 1 else -1
    slot["lane_image"], slot["image_scale"] = lanes[1] if len(lanes) == 3 else -1, guidance.image or 0
    slot["guided_from"], slot["guided_to"] = guided[0], guided[-1] + 1
    slot["flags"] = (PREVIEW if job.wants_preview else 0) | (BLEND if job.kept is not None else 0)
    if isinstance(job.noise, TorchCudaNoise):
        slot["seed"], slot["draws"] = job.noise.seed, job.noise.draws
        slot["threads"], slot["start"] = job.noise.threads(job.latents.size), job.start
    return slot
