"""Jobs on a device beside the same jobs in numpy, compared row by row; on the emulated device and on real ones."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.cuda import kernels
from latentrt.cuda.gpu import Gpu
from latentrt.cuda.kernels import BLEND, PREVIEW, PROGRESS, ROW_COLUMNS, SLOT, State
from latentrt.sampling.guidance import Guidance
from latentrt.sampling.noise import NoiseSource, TorchCpuNoise, TorchCudaNoise
from latentrt.sampling.rows import SLOTS
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.table import COLUMNS, Table, advance, preview, tabulate
from tests.support.sampling.scheduler_configs import SD15

Float32 = NDArray[np.float32]
SHAPE = (4, 6, 7)  # 168 numbers: more than a block, and not a whole number of them
ROWS, NOISES, LANES, JOBS = 40, 3, 8, 5
SCHEDULE = Schedule.from_config(SD15)


def table_of(solver: str, steps: int = 5, **options: Any) -> Table:
    return tabulate(solver, SCHEDULE, steps, **options)


def network(sample: NDArray[Any], timestep: Float32, prompt: Float32) -> NDArray[Any]:
    """Return a function of all the network's inputs; the result has the sample's dtype."""
    shaken = np.float32(0.7) * sample.astype(np.float32) + prompt * np.cos(timestep).astype(np.float32)
    return shaken.astype(sample.dtype)


@dataclass(eq=False)
class Job:
    """A job as numpy runs it, a row at a time: the reference for its slot on the device."""

    table: Table
    guidance: Guidance = field(default_factory=Guidance)
    noise: NoiseSource = field(default_factory=lambda: TorchCpuNoise(1))
    seed: int = 0
    flags: int = 0
    shape: tuple[int, ...] = SHAPE
    lanes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        draw = np.random.default_rng(self.seed).standard_normal((6, *self.shape), dtype=np.float32)
        self.x = draw[0] * np.float32(self.table.start)
        self.prompts = draw[[1, 2] if self.guidance.image is None else [1, 5, 2]]
        self.known, self.known_noise = draw[3], draw[4]
        self.mask = (draw[4] > 0.3).astype(np.float32)
        self.blend = np.linspace([0.1, 0.9], [1, 0], len(self.table), dtype=np.float32)
        self.memory = np.full((SLOTS, *self.shape), np.nan, np.float32)
        self.preview = np.full(self.shape, np.nan, np.float32)
        self.row = self.noises = 0

    @property
    def done(self) -> bool:
        return self.row >= len(self.table)

    def sample(self, dtype: Any) -> NDArray[Any]:
        return (self.table.rows[self.row].c_in * self.x).astype(dtype)

    def step(self, dtype: Any) -> None:
        row, sample = self.table.rows[self.row], self.sample(dtype)
        timestep = np.float32(row.timestep)
        outs = [network(sample, timestep, prompt).astype(np.float32) for prompt in self.prompts]
        acts = len(self.lanes) > 1 and self.guidance.acts(self.row, len(self.table))
        out = self.guidance.combine(*outs) if acts else outs[-1]
        if self.flags & PREVIEW:
            self.preview = preview(row, self.x, out)
        noise = self.noise.normal(self.shape) if row.c else None
        self.x = advance(row, self.x, out, self.memory, noise)
        if self.flags & BLEND:
            known, known_noise = self.blend[self.row]
            self.x = self.mask * self.x + (1 - self.mask) * (known * self.known + known_noise * self.known_noise)
        self.row += 1


class Rig:
    """Device state for JOBS slots and LANES lanes, with the network on the host; names of arrays are State's."""

    def __init__(self, gpu: Gpu, dtype: Any = np.float32, shape: tuple[int, ...] = SHAPE) -> None:
        self.gpu, self.dtype = gpu, np.dtype(dtype)
        shapes = {
            **dict.fromkeys(("x", "preview", "mask", "known", "known_noise"), (JOBS, *shape)),
            **{"memory": (JOBS, SLOTS, *shape), "noise": (JOBS, NOISES, *shape), "deviation": (JOBS, 2)},
            **{"table": (JOBS, ROWS, len(ROW_COLUMNS)), "timestep": (LANES,)},
        }
        self.state = State(
            **{name: gpu.zeros(shape, np.float32) for name, shape in shapes.items()},
            **{name: gpu.zeros((LANES, *shape), dtype) for name in ("sample", "out")},
            slots=gpu.zeros((JOBS,), SLOT),
            progress=gpu.zeros((JOBS,), PROGRESS),
        )
        for name in ("memory", "preview"):  # memory that was never written may have any value
            for slot in range(JOBS):
                self.put(name, slot, np.full_like(self[name][slot], np.nan))
        self.jobs: dict[int, Job] = {}
        self.prompts = np.zeros((LANES, *shape), np.float32)

    def admit(self, slot: int, job: Job, lanes: tuple[int, ...] = (0, 1)) -> None:
        self.jobs[slot] = job
        table = np.full((ROWS, len(ROW_COLUMNS)), np.nan, np.float32)
        table[: len(job.table), : len(COLUMNS)] = job.table.array
        table[: len(job.table), len(COLUMNS) :] = job.blend
        self.put("table", slot, table)
        for name in ("x", "mask", "known", "known_noise"):
            self.put(name, slot, getattr(job, name))
        self.put("progress", slot, np.zeros((), PROGRESS))
        self.seat(slot, lanes)

    def seat(self, slot: int, lanes: tuple[int, ...], start: float = 0) -> None:
        job = self.jobs[slot]
        job.lanes = lanes
        self.prompts[list(lanes)] = job.prompts[-len(lanes) :]
        acting = [row for row in range(len(job.table)) if job.guidance.acts(row, len(job.table))] or [0, -1]
        record = np.zeros((), SLOT)
        record["rows"], record["flags"], record["start"] = len(job.table), job.flags, start
        record["lane_uncond"], record["lane_cond"] = lanes[0] if len(lanes) > 1 else -1, lanes[-1]
        record["lane_image"], record["image_scale"] = lanes[1] if len(lanes) == 3 else -1, job.guidance.image or 0
        record["guided_from"], record["guided_to"] = acting[0], acting[-1] + 1
        record["scale"], record["rescale"] = job.guidance.scale, job.guidance.rescale
        if isinstance(job.noise, TorchCudaNoise):
            record["seed"], record["draws"] = job.noise.seed, job.noise.draws
            record["threads"] = job.noise.threads(job.x.size)
        self.put("slots", slot, record)

    def tick(self) -> None:
        """Give the host's noise to those rows that add some, then run one row."""
        for slot, job in self.jobs.items():
            if not job.done and job.table.rows[job.row].c and isinstance(job.noise, TorchCpuNoise):
                noises = self["noise"][slot]
                noises[job.noises % NOISES] = _ahead(job)
                self.put("noise", slot, noises)
                job.noises += 1
        self.queue()

    def queue(self) -> None:
        self.gpu.call(self.call_network)
        kernels.deviations(self.gpu, self.state)
        kernels.advance(self.gpu, self.state)

    def call_network(self) -> None:
        timestep = self["timestep"].reshape(LANES, 1, 1, 1)
        self.gpu.upload(network(self["sample"], timestep, self.prompts), self.state.out)

    def __getitem__(self, name: str) -> NDArray[Any]:
        """Return a copy of an array."""
        return self.gpu.download(getattr(self.state, name))

    def put(self, name: str, index: int, value: Any) -> None:
        """Write one slot or lane of an array."""
        part = getattr(self.state, name).part(index)
        self.gpu.upload(np.full(part.shape, value, part.dtype), part)

    def close(self) -> None:
        for each in fields(self.state):
            if (array := getattr(self.state, each.name)) is not None:
                self.gpu.free(array)


def _ahead(job: Job) -> Float32:
    """Return the next noise of the job's source, without drawing it."""
    assert isinstance(job.noise, TorchCpuNoise)
    state = job.noise._words.state
    drawn = job.noise.normal(job.shape)
    job.noise._words.state = state
    return drawn


def run(rig: Rig, rtol: float = 0, begins: int = 1) -> None:
    """Run all rows of all jobs, on the device and in numpy, and compare after each; the first rows after `begin`."""
    while not all(job.done for job in rig.jobs.values()):
        if begins > 0:
            kernels.begin(rig.gpu, rig.state)
            begins -= 1
        for job in rig.jobs.values():
            check_inputs(rig, job, rtol)
        rig.tick()
        for slot, job in rig.jobs.items():
            if not job.done:
                job.step(rig.dtype)
            check_slot(rig, slot, job, rtol)


def check_inputs(rig: Rig, job: Job, rtol: float) -> None:
    for lane in job.lanes if not job.done else ():
        np.testing.assert_allclose(rig["sample"][lane], job.sample(rig.dtype), rtol, rtol)
        assert rig["timestep"][lane] == np.float32(job.table.rows[job.row].timestep)


def check_slot(rig: Rig, slot: int, job: Job, rtol: float) -> None:
    for name in ("x", "memory", "preview"):
        np.testing.assert_allclose(rig[name][slot], getattr(job, name), rtol, rtol, err_msg=name)
    noises = sum(row.c != 0 for row in job.table.rows[: job.row])
    assert rig["progress"][slot].tolist() == (job.row, noises, 0, 0)
