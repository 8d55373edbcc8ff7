"""The kernels of `advance.cu` from Python: the structures they share with the host, and their launches.

A *slot* is a job's place in device memory, a *lane* one place of the network's batch. For latents of n numbers:

| array                    | shape              | dtype       | what                                                 |
| ------------------------ | ------------------ | ----------- | ---------------------------------------------------- |
| sample, out              | (lanes, n)         | float16, 32 | the network's input and output                       |
| timestep                 | (lanes,)           | float32     | the network's input                                  |
| x, memory                | (slots, [4,] n)    | float32     | latents; what the solver remembers                   |
| preview                  | (slots, n)         | float32     | written where PREVIEW is set                         |
| table                    | (slots, rows, 17)  | float32     | ROW_COLUMNS                                          |
| noise                    | (slots, noises, n) | float32     | of the rows that add noise where `threads` is 0      |
| mask, known, known_noise | (slots, n)         | float32     | read where BLEND is set                              |
| deviation                | (slots, 2)         | float32     | scratch of guidance rescale                          |
| slots                    | (slots,)           | SLOT        | written by the host, again where lanes move          |
| progress                 | (slots,)           | PROGRESS    | counted by the device; zeros for a new job           |
| scalars                  | (inputs, stride)   | float32     | other inputs of the network, a number for each lane  |
| scalar_rows              | (slots, rows, inputs) | float32  | their values by row                                  |
| turn                     | (slots,)           | int32       | 0: the slot waits; without the array all advance     |

The host's noise is read in a circle: the k-th that a job adds is at k modulo `noises`.
Any shape with as many numbers does: sample may be (lanes, 4, 64, 64).
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from latentrt.cuda.array import DeviceArray
from latentrt.sampling.table import COLUMNS

if TYPE_CHECKING:
    from latentrt.cuda.gpu import Gpu

PREVIEW, BLEND = 1, 2
ROW_COLUMNS = (*COLUMNS, "known", "known_noise")
SLOT = np.dtype(
    [
        *(("seed", np.uint64), ("draws", np.uint64), ("threads", np.uint32), ("flags", np.uint32)),
        *((name, np.int32) for name in ("rows", "lane_cond", "lane_uncond", "lane_image")),
        *((name, np.int32) for name in ("guided_from", "guided_to")),
        *((name, np.float32) for name in ("scale", "rescale", "image_scale", "start")),
    ]
)
PROGRESS = np.dtype([("row", np.int32), ("noises", np.int32), ("bad", np.int32), ("arrived", np.uint32)])

_THREADS = 128
_REDUCING_THREADS = 256  # THREADS of advance.cu
_SUFFIXES = {"float16": "half", "float32": "float"}
KERNELS = (
    *(
        f"{name}_{suffix}"
        for name in ("advance", "begin", "keep", "deviations", "to_latents", "to_pixels")
        for suffix in _SUFFIXES.values()
    ),
    "normal",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """The arrays of all jobs and lanes of one latent shape, in the order of advance.cu; see the module.

    Those that no job uses may be None.
    """

    sample: DeviceArray
    timestep: DeviceArray
    out: DeviceArray
    x: DeviceArray
    memory: DeviceArray
    preview: DeviceArray | None = None
    table: DeviceArray
    noise: DeviceArray | None = None
    mask: DeviceArray | None = None
    known: DeviceArray | None = None
    known_noise: DeviceArray | None = None
    deviation: DeviceArray | None = None
    slots: DeviceArray
    progress: DeviceArray
    scalars: DeviceArray | None = None
    scalar_rows: DeviceArray | None = None
    turn: DeviceArray | None = None

    @property
    def n(self) -> int:
        """Numbers of one job's latents."""
        return math.prod(self.x.shape[1:])

    @property
    def count(self) -> int:
        """The number of slots."""
        return self.x.shape[0]


_POINTERS = tuple(field.name for field in fields(State))


class _State(ctypes.Structure):
    """State of advance.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int) for name in ("n", "rows_max", "noises_max", "scalar_count", "scalar_stride")),
    )


def advance(gpu: Gpu, state: State) -> None:
    """Run one row of every job that has rows left: from the network's output to its next input."""
    _launch(gpu, "advance", state.sample, (_blocks(state.n), state.count), _THREADS, _packed(state))


def begin(gpu: Gpu, state: State, first: int = 0, count: int | None = None) -> None:
    """Write the network's input for the next row of jobs `first`...: before their first row, or after lanes moved.

    Where a job's `start` is not 0 and no row has run, its x is made first, from noise of the device's own.
    """
    jobs = state.count - first if count is None else count
    grid = (_blocks(state.n), jobs)
    _launch(gpu, "begin", state.sample, grid, _THREADS, _packed(state), ctypes.c_int(first))


def keep(gpu: Gpu, state: State, kept: DeviceArray, deep: DeviceArray) -> None:
    """Copy deep features (lanes, ...), of the network's dtype, for the jobs that the next `advance` moves."""
    n = math.prod(deep.shape[1:])
    arguments = (_packed(state), _pointer(kept), _pointer(deep), ctypes.c_int(n))
    _launch(gpu, "keep", deep, (_blocks(n), state.count), _THREADS, *arguments)


def deviations(gpu: Gpu, state: State) -> None:
    """Compute the standard deviations that guidance rescale needs; launch it before `advance` where a job has it."""
    _launch(gpu, "deviations", state.sample, (1, state.count), _REDUCING_THREADS, _packed(state))


def to_latents(gpu: Gpu, x: DeviceArray, latents: DeviceArray, scale: float, shift: float) -> None:
    """Write the VAE decoder's input, x / scale + shift, for as many pictures as x (float32) holds."""
    count = math.prod(x.shape)
    numbers = (ctypes.c_int(count), ctypes.c_float(scale), ctypes.c_float(shift))
    _launch(gpu, "to_latents", latents, (_blocks(count), 1), _THREADS, _pointer(latents), _pointer(x), *numbers)


def to_pixels(gpu: Gpu, image: DeviceArray, pixels: DeviceArray, bad: DeviceArray) -> None:
    """Turn pictures (b, channels, height, width) to uint8 (b, height, width, channels), as `to_uint8` rounds.

    `bad`, int32 (b,), becomes 1 for a picture with a number that is not finite, and is left alone for others.
    """
    area = math.prod(image.shape[2:])
    arguments = (_pointer(pixels), _pointer(bad), _pointer(image), ctypes.c_int(area), ctypes.c_int(image.shape[1]))
    _launch(gpu, "to_pixels", image, (_blocks(area), image.shape[0]), _THREADS, *arguments)


def normal(gpu: Gpu, numbers: DeviceArray, seed: int, draws: int, threads: int) -> None:
    """Fill a float32 array as `TorchCudaNoise` does with `threads` threads that drew `draws` times."""
    count = math.prod(numbers.shape)
    counts = (ctypes.c_int(count), ctypes.c_uint(threads), ctypes.c_ulonglong(seed), ctypes.c_ulonglong(draws))
    gpu.launch("normal", (_blocks(count), 1), _THREADS, (_pointer(numbers), *counts))


def _launch(gpu: Gpu, name: str, typed: DeviceArray, grid: tuple[int, int], threads: int, *arguments: Any) -> None:
    """Queue the variant of a kernel for the dtype of an array of the network's."""
    gpu.launch(f"{name}_{_SUFFIXES[typed.dtype.name]}", grid, threads, arguments)


def _blocks(count: int) -> int:
    return -(-count // _THREADS)


def _pointer(array: DeviceArray | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.pointer if array else None)


def _packed(state: State) -> _State:
    pointers = (_pointer(getattr(state, name)) for name in _POINTERS)
    scalars = state.scalars.shape if state.scalars else (0, 0)
    return _State(*pointers, state.n, state.table.shape[1], state.noise.shape[1] if state.noise else 0, *scalars)
