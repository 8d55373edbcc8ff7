"""The CPU stream is compared with torch itself; the CUDA stream with published numbers of real GPUs."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt.errors import RequestError
from latentrt.sampling.noise import CUDA_DEVICES, TorchCpuNoise, TorchCudaNoise, noise_source, philox4x32_10

# Measured over 2**24 numbers: 4.8e-7 with AVX2; 2.4e-6 where torch takes its scalar path (ARM, old x86).
CPU_BOUND = 1e-6 if torch.backends.cpu.get_cpu_capability() in {"AVX2", "AVX512"} else 3e-6
SEEDS = [0, 1, 42, 2**31, 2**32 - 1, 2**32, 2**32 + 42, 2**63, 2**64 - 1, -1, -(2**63)]


def torch_generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_as_torch(ours: TorchCpuNoise, theirs: torch.Generator, shape: tuple[int, ...]) -> None:
    found = ours.normal(shape)
    wanted = torch.randn(shape, generator=theirs, dtype=torch.float32).numpy()
    assert found.dtype == np.float32
    assert found.shape == shape
    np.testing.assert_allclose(found, wanted, rtol=0, atol=CPU_BOUND)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", [(1000,), (1, 4, 16, 16), (4, 64, 64), (2, 3, 5), (3, 5), ()])
def test_cpu_noise_is_torchs(seed: int, shape: tuple[int, ...]) -> None:
    assert_as_torch(TorchCpuNoise(seed), torch_generator(seed), shape)


@pytest.mark.parametrize("numel", range(41))
def test_cpu_tails_are_torchs(numel: int) -> None:
    assert_as_torch(TorchCpuNoise(7), torch_generator(7), (numel,))


@given(
    seed=st.integers(-(2**63), 2**64 - 1),
    sizes=st.lists(st.one_of(st.integers(0, 40), st.sampled_from([1000, 1024])), max_size=8),
)
@settings(deadline=None, max_examples=100)
def test_cpu_stream_goes_on_as_torchs_does(seed: int, sizes: list[int]) -> None:
    """Odd small draws leave half a pair behind, which the next small draw takes even after large ones."""
    ours, theirs = TorchCpuNoise(seed), torch_generator(seed)
    for size in sizes:
        assert_as_torch(ours, theirs, (size,))


def test_cpu_noise_is_normal() -> None:
    noise = TorchCpuNoise(3).normal((2**18,))
    assert abs(float(noise.mean())) < 4 / 2**9
    assert abs(float(noise.std()) - 1) < 4 / 2**9


RANDOM123_KNOWN_ANSWERS = [  # counter, key, words: Random123 1.14, tests/kat_vectors, "philox4x32 10"
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), RANDOM123_KNOWN_ANSWERS)
def test_philox_known_answers(counter: list[int], key: list[int], words: list[int]) -> None:
    arrays = [np.array([word], np.uint64) for word in counter]
    found = philox4x32_10(arrays, key[0] | key[1] << 32)
    assert [int(word[0]) for word in found] == words


def test_cuda_published_small_draws() -> None:
    """Printed by torch on GPUs: pytorch#79496 (seed 10), and three draws in a row (seed 0)."""
    np.testing.assert_allclose(noise_source("torch-cuda:t4", 10).normal((3,)), [-0.1029, 1.6810, -0.2708], atol=6e-5)
    noise = noise_source("torch-cuda:t4", 0)
    first, second, third = noise.normal((8, 10)), noise.normal((10,)), noise.normal((8, 10))
    np.testing.assert_allclose(first[0, :5], [-0.9247, -0.4253, -2.6438, 0.1452, -0.1209], atol=6e-5)
    np.testing.assert_allclose(first[7, 6:], [0.3805, -0.0436, 0.3597, -0.5043], atol=6e-5)
    np.testing.assert_allclose(second[:4], [0.1808, -0.5523, 0.9238, -0.7350], atol=6e-5)
    np.testing.assert_allclose(third[0, :4], [2.5441, -0.7163, -0.4934, 0.1267], atol=6e-5)
    np.testing.assert_allclose(third[7, 6:], [0.8580, 0.7625, -1.2587, -0.8183], atol=6e-5)


PUBLISHED_LARGE_DRAWS = [  # device, seed, numel, (index, value)s, where
    ("rtx-a6000", 43, 3 * 128 * 128, {0: 1.9983, 16384: 0.8704, 32768: 2.1127}, "pytorch#62467"),
    ("h100", 1, 49 * 12 * 112 * 144, {0: -0.2963, -3: -0.6970, -2: -0.7780, -1: 0.3267}, "pytorch#143086"),
    ("a100", 1, 49 * 12 * 112 * 144, {0: -0.2963, -3: 0.1549, -2: -0.6797, -1: -0.1656}, "pytorch#143086"),
    # Printed there as 5 + sqrt(5)·x.
    ("rtx-a4000", 14, 100_000, {0: -0.9512, 99_901: -1.2475, -1: -0.3307}, "pytorch#97097"),
]


@pytest.mark.parametrize(("device", "seed", "numel", "values", "where"), PUBLISHED_LARGE_DRAWS)
def test_cuda_published_large_draws(device: str, seed: int, numel: int, values: dict[int, float], where: str) -> None:
    """More numbers than threads, so that the launch geometry of each GPU decides the order."""
    noise = noise_source(f"torch-cuda:{device}", seed).normal((numel,))
    found = {index: round(float(noise[index]), 4) for index in values}
    assert found == pytest.approx(values, abs=1.01e-4), where


class ScalarThread:
    """One GPU thread with its cuRAND state: `curand_init(seed, thread, offset)` and `curand_normal4`."""

    def __init__(self, seed: int, thread: int, offset: int) -> None:
        self.key = seed
        self.counter = offset // 4 | thread << 64

    def normal4(self) -> Iterator[float]:
        words = [self.counter >> shift & 0xFFFFFFFF for shift in (0, 32, 64, 96)]
        key = [self.key & 0xFFFFFFFF, self.key >> 32]
        for _ in range(10):
            left, right = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57
            words = [
                right >> 32 ^ words[1] ^ key[0],
                right & 0xFFFFFFFF,
                left >> 32 ^ words[3] ^ key[1],
                left & 0xFFFFFFFF,
            ]
            key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
        self.counter += 1
        for first, second in (words[:2], words[2:]):
            uniform = np.float32((float(np.float32(first)) + 0.5) * 2.0**-32)
            angle = np.float32((float(np.float32(second)) + 0.5) * 2.0**-32 * float(np.float32(2 * math.pi)))
            radius = math.sqrt(-2 * math.log(uniform))
            yield radius * math.sin(angle)
            yield radius * math.cos(angle)


class ScalarGpu:
    """torch's launch of `randn`, thread by thread."""

    def __init__(self, seed: int, multiprocessors: int, threads_per_multiprocessor: int) -> None:
        self.seed, self.offset = seed % 2**64, 0
        self.resident_blocks = multiprocessors * (threads_per_multiprocessor // 256)

    def normal(self, numel: int) -> list[float]:
        out = [math.nan] * numel
        grid = min(self.resident_blocks, math.ceil(numel / 256))
        stride = grid * 256
        rounds = (numel - 1) // (stride * 4) + 1
        for thread in range(stride):
            state = ScalarThread(self.seed, thread, self.offset)
            for start in range(thread, rounds * stride * 4, stride * 4):
                for unrolled, value in enumerate(state.normal4()):
                    if start + unrolled * stride < numel:
                        out[start + unrolled * stride] = value
        self.offset += rounds * 4
        return out


@pytest.mark.parametrize("seed", [0, 2**40 + 3, -5])
@pytest.mark.parametrize("device", [(1, 512), (3, 768)])
def test_cuda_noise_is_that_of_a_thread_by_thread_launch(seed: int, device: tuple[int, int]) -> None:
    ours, scalar = TorchCudaNoise(seed, *device), ScalarGpu(seed, *device)
    for numel in (5, 256, 257, 512, 700, 2049, 5000):
        np.testing.assert_allclose(ours.normal((numel,)), scalar.normal(numel), rtol=0, atol=5e-7)


def test_cuda_noise_of_no_elements_takes_nothing_from_the_stream() -> None:
    noise = TorchCudaNoise(0, 1, 1024)
    assert noise.normal((0, 4)).shape == (0, 4)
    assert noise.normal((1,))[0] == pytest.approx(-0.9247, abs=6e-5)


def test_devices_agree_up_to_one_wave_and_not_beyond() -> None:
    def first(device: str, numel: int) -> np.ndarray:
        return noise_source(f"torch-cuda:{device}", 5).normal((numel,))

    wave = 40 * 1024
    np.testing.assert_array_equal(first("t4", wave), first("h200", wave))
    assert not np.array_equal(first("t4", wave + 1), first("h200", wave + 1))


@pytest.mark.parametrize("kind", ["torch-cpu", *(f"torch-cuda:{device}" for device in CUDA_DEVICES)])
def test_every_kind_has_a_source(kind: str) -> None:
    noise = noise_source(kind, 1).normal((2, 3))
    assert noise.shape == (2, 3)
    assert noise.dtype == np.float32
    np.testing.assert_array_equal(noise, noise_source(kind, 1).normal((2, 3)))


@pytest.mark.parametrize(
    ("kind", "near"),
    [
        ("torch_cpu", "torch-cpu"),
        ("torch-cuda:h20", "torch-cuda:h200"),
        ("torch-cuda", "torch-c"),
        ("", "torch-cpu"),
    ],
)
def test_unknown_kind_names_the_near_ones(kind: str, near: str) -> None:
    with pytest.raises(RequestError) as caught:
        noise_source(kind, 0)
    assert near in caught.value.fix


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 1.5, "7", None])
@pytest.mark.parametrize("kind", ["torch-cpu", "torch-cuda:h200"])
def test_seed_out_of_range(kind: str, seed: object) -> None:
    with pytest.raises(RequestError, match="seed"):
        noise_source(kind, seed)  # type: ignore[arg-type]


def test_impossible_device_and_too_large_draw() -> None:
    with pytest.raises(RequestError, match="multiprocessor"):
        TorchCudaNoise(0, 4, 128)
    with pytest.raises(RequestError, match=r"less than 2\*\*29"):
        TorchCudaNoise(0, 4, 1024).normal((2**29,))
