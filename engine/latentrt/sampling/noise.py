"""Gaussian noise equal to torch's, in numpy, so that a seed makes the picture it makes in diffusers.

torch has two generators. On the CPU it is the Mersenne Twister and depends on nothing but the seed. On CUDA
it is Philox, and which number lands in which element depends on how many threads the device runs at once:
tensors larger than one wave of threads differ between GPU models. So the device is a parameter here.

Sources: torch 2.13 (`ATen/native/cpu/DistributionTemplates.h`, `ATen/native/cuda/DistributionTemplates.h`,
`ATen/core/DistributionsHelper.h`); Matsumoto & Nishimura 1998 (MT19937); Salmon et al. 2011 (Philox);
cuRAND's device API (`curand_init`, `curand_normal4`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from latentrt.errors import RequestError
from latentrt.values import did_you_mean

Float32 = NDArray[np.float32]
Words = NDArray[np.uint64]  # 32-bit words, held in 64 bits so that products do not overflow

# name: (multiprocessors, threads per multiprocessor) of the whole device; a MIG slice has fewer.
# "h100" is the SXM board; NVIDIA's PCIe board has fewer multiprocessors.
CUDA_DEVICES = {
    "t4": (40, 1024),
    "rtx-a4000": (48, 1536),
    "rtx-a6000": (84, 1536),
    "a10g": (80, 1536),
    "a100": (108, 2048),
    "l4": (58, 1536),
    "l40s": (142, 1536),
    "rtx-4090": (128, 1536),
    "h100-pcie": (114, 2048),
    "h100": (132, 2048),
    "h200": (132, 2048),
}

_LOW_32_BITS = np.uint64(0xFFFF_FFFF)
_32 = np.uint64(32)
_TWO_PI = np.float32(2 * math.pi)


class NoiseSource(Protocol):
    """A stream of standard normal numbers: each call continues where the last one stopped."""

    def normal(self, shape: Sequence[int]) -> Float32:
        """Return the next `prod(shape)` numbers of the stream, as an array of that shape."""
        ...


def noise_source(kind: str, seed: int) -> NoiseSource:
    """Return the noise that torch makes for a seed.

    Args:
        kind: "torch-cpu", or "torch-cuda:<device>" with a device of `CUDA_DEVICES`.
        seed: as for `torch.Generator.manual_seed`, -2**63 <= seed < 2**64.

    Raises:
        RequestError: no such kind, or the seed is out of range.
    """
    if kind == "torch-cpu":
        return TorchCpuNoise(seed)
    prefix, _, device = kind.partition(":")
    if prefix == "torch-cuda" and device in CUDA_DEVICES:
        return TorchCudaNoise(seed, *CUDA_DEVICES[device])
    known = ["torch-cpu", *(f"torch-cuda:{name}" for name in CUDA_DEVICES)]
    raise RequestError(
        f"noise kind {kind!r}", needed=f"one of {', '.join(known)}", fix=did_you_mean(kind, known, "use torch-cpu")
    )


class TorchCpuNoise:
    """`torch.randn(shape, generator=torch.Generator().manual_seed(seed))`, float32, within 1e-6.

    The random bits are torch's exactly. The last bits of the result depend on torch's own build: the bound
    holds for x86 with AVX2. Elsewhere (ARM) torch rounds the angle differently and is up to 2.4e-6 away.

    Args:
        seed: as for `torch.Generator.manual_seed`.
    """

    def __init__(self, seed: int) -> None:
        self._words = np.random.MT19937(0)
        # torch seeds as the authors did in 1998, from the low 32 bits; numpy's default is another.
        np.random.RandomState(self._words).seed(_unsigned(seed) & 0xFFFF_FFFF)
        # The unused half of the last scalar pair outlives the call, as in torch.
        self._second: float | None = None

    def normal(self, shape: Sequence[int]) -> Float32:
        """See `NoiseSource.normal`. From 16 elements on torch takes another path, with other numbers."""
        numel = math.prod(shape)
        if numel < 16:
            return np.array([self._one() for _ in range(numel)], np.float32).reshape(shape)
        uniforms = self._uniforms(numel)
        whole = numel - numel % 16
        normals = np.empty(numel, np.float32)
        normals[:whole] = _blocks_of_16(uniforms[:whole])
        if whole < numel:  # torch redoes the last 16 rather than handle a shorter block
            normals[-16:] = _blocks_of_16(self._uniforms(16))
        return normals.reshape(shape)

    def _uniforms(self, count: int) -> Float32:
        """Return the next `count` numbers of [0, 1), a multiple of 2**-24 each."""
        words = self._words.random_raw(count)
        return (words & 0xFF_FFFF).astype(np.float32) * np.float32(2**-24)

    def _one(self) -> float:
        """Return one number by the scalar path: float64, two numbers at a time, of which the second is kept."""
        if self._second is not None:
            value, self._second = self._second, None
            return value
        angle = 2 * math.pi * self._uniform53()
        radius = math.sqrt(-2 * math.log1p(-self._uniform53()))
        self._second = radius * math.sin(angle)
        return radius * math.cos(angle)

    def _uniform53(self) -> float:
        high, low = (int(word) for word in self._words.random_raw(2))
        return float(((high << 32 | low) & (2**53 - 1)) * 2.0**-53)


class TorchCudaNoise:
    """`torch.randn(shape, device="cuda", generator=...)`, float32, on a device of the given size.

    torch launches blocks of 256 threads, at most as many as the device holds at once. Every thread has a
    Philox stream of its own and draws four normals at a time, which it stores one whole grid apart.

    The random bits are torch's exactly; the GPU's fast sine and cosine differ from these in the last bits.

    Args:
        seed: as for `torch.Generator.manual_seed`.
        multiprocessors: `torch.cuda.get_device_properties(0).multi_processor_count`.
        threads_per_multiprocessor: `...max_threads_per_multi_processor`.
    """

    def __init__(self, seed: int, multiprocessors: int, threads_per_multiprocessor: int) -> None:
        self.seed = _unsigned(seed)
        self.draws = 0  # how often each thread has drawn so far: torch's philox offset / 4
        self._max_blocks = multiprocessors * (threads_per_multiprocessor // 256)
        if self._max_blocks < 1:
            raise RequestError(
                f"a device of {multiprocessors} multiprocessors with {threads_per_multiprocessor} threads",
                needed="at least 1 multiprocessor with at least 256 threads",
                fix="read both from torch.cuda.get_device_properties",
            )

    def threads(self, numel: int) -> int:
        """Return the number of threads that torch launches for a tensor of `numel` numbers."""
        return 256 * min(self._max_blocks, -(-numel // 256))

    def skip(self, numel: int, times: int = 1) -> None:
        """Leave out noises of so many numbers: they were drawn elsewhere."""
        self.draws += times * -(-numel // (4 * self.threads(numel)))

    def normal(self, shape: Sequence[int]) -> Float32:
        """See `NoiseSource.normal`.

        Raises:
            RequestError: more than 2 GiB at once, which torch splits into several launches.
        """
        numel = math.prod(shape)
        if 4 * numel >= 2**31:
            raise RequestError(f"a noise of {numel} numbers", needed="less than 2**29")
        if numel == 0:
            return np.empty(shape, np.float32)
        first = self.draws
        self.skip(numel)
        draw = np.arange(first, self.draws, dtype=np.uint64)[:, None]
        thread = np.arange(self.threads(numel), dtype=np.uint64)
        words = philox4x32_10((draw & _LOW_32_BITS, draw >> _32, thread, thread >> _32), self.seed)
        pairs = [*_curand_pair(*words[:2]), *_curand_pair(*words[2:])]
        return np.stack(pairs, axis=1).reshape(-1)[:numel].reshape(shape)


def philox4x32_10(counter: Sequence[Words], key: int) -> tuple[Words, Words, Words, Words]:
    """Apply Philox4x32 with ten rounds (Salmon et al. 2011) to many counters and one key.

    Args:
        counter: four arrays of 32-bit words that broadcast against each other, lowest word first.
        key: 64 bits.

    Returns:
        Four arrays of 32-bit words, of the counters' common shape.
    """
    c0, c1, c2, c3 = counter
    key0, key1 = np.uint64(key) & _LOW_32_BITS, np.uint64(key) >> _32
    for _ in range(10):
        left, right = c0 * np.uint64(0xD251_1F53), c2 * np.uint64(0xCD9E_8D57)
        c0, c1 = (right >> _32) ^ c1 ^ key0, right & _LOW_32_BITS
        c2, c3 = (left >> _32) ^ c3 ^ key1, left & _LOW_32_BITS
        key0 = (key0 + np.uint64(0x9E37_79B9)) & _LOW_32_BITS
        key1 = (key1 + np.uint64(0xBB67_AE85)) & _LOW_32_BITS
    return c0, c1, c2, c3


def _curand_pair(first: Words, second: Words) -> tuple[Float32, Float32]:
    """Return two normals from two words, sine first; words are rounded to float32 before scaling, as on the GPU."""
    uniform = (first.astype(np.float32).astype(np.float64) + 0.5) * 2.0**-32
    angle = (second.astype(np.float32).astype(np.float64) + 0.5) * (float(_TWO_PI) * 2.0**-32)
    cosine, sine = _polar(uniform.astype(np.float32), angle.astype(np.float32))
    return sine, cosine


def _blocks_of_16(uniforms: Float32) -> Float32:
    """Apply Box-Muller in torch's layout: 8 radii, then 8 angles, become 8 cosines, then 8 sines."""
    pairs = uniforms.reshape(-1, 2, 8)
    return np.stack(_polar(1 - pairs[:, 0], _TWO_PI * pairs[:, 1]), axis=1).reshape(-1)


def _polar(uniform: Float32, angle: Float32) -> tuple[Float32, Float32]:
    """Apply Box-Muller: (radius·cos, radius·sin). Functions are rounded from float64: the same on every CPU."""
    radius = np.sqrt(-2 * np.log(uniform, dtype=np.float64).astype(np.float32))
    return (
        radius * np.cos(angle, dtype=np.float64).astype(np.float32),
        radius * np.sin(angle, dtype=np.float64).astype(np.float32),
    )


def _unsigned(seed: int) -> int:
    """Return the 64-bit seed as torch takes it: negative seeds wrap around."""
    if isinstance(seed, int | np.integer) and -(2**63) <= seed < 2**64:
        return int(seed) % 2**64
    raise RequestError(f"seed {seed!r}", needed="a whole number, -2**63 <= seed < 2**64", fix="choose such a seed")
