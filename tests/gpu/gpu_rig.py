"""The subject of the tests of this folder: a backend, its GPU, and the embedded model with plans."""

from __future__ import annotations

from typing import Any, NamedTuple

from latentrt import Engine
from latentrt.bundle.bundle import EMBEDDED
from latentrt.errors import BackendError
from tests.gpu.kinds import EMULATED

LANES = 4
BUILD_LIMIT = 1800.0


class Scale(NamedTuple):
    """The size of the tests: pixels of a picture's side, steps, and pictures in which memory may not grow."""

    pixels: int
    steps: int
    many: int


SCALE = Scale(32, 3, 10) if EMULATED else Scale(128, 20, 1000)


class GpuRig:
    """One backend with the embedded model, and engines over it; `gpu` is its device.

    Attributes:
        kind: (backend, precision).
        bundle: the embedded model; its plans lie in the cache of these tests.
    """

    def __init__(self, hardware: Any, kind: tuple[str, str]) -> None:
        self.hardware, self.kind, self.bundle = hardware, kind, EMBEDDED
        self.backend: Any = hardware.open_backend(*kind)
        self.gpu: Any = self.backend.gpu
        self.half = kind[1] == "fp16"

    @property
    def built(self) -> bool:
        """Whether it runs plans."""
        return self.kind[0] != "onnxruntime"

    def check_gpu(self) -> None:
        """Refuse a GPU that the library has no kernels for.

        Raises:
            BackendError: there is nothing to test.
        """
        known = self.backend.library.compute_capabilities if self.kind[0] == "tensorrt-rtx" else ()
        capability = "{}.{}".format(*self.gpu.compute_capability)
        if known and capability not in known:
            raise BackendError(
                f"{self.kind[0]} does not know compute capability {capability}",
                needed=f"one of {', '.join(known)}",
                fix="use tensorrt on that GPU",
            )

    def build(self, *options: str, networks: tuple[str, ...] = ()) -> None:
        """Build plans for `LANES` lanes at the tests' size."""
        if self.built:
            size = (SCALE.pixels, SCALE.pixels)
            self.hardware.build_plans(self.bundle, networks, self.kind[0], LANES, size, BUILD_LIMIT, options)

    def engine(self, **options: Any) -> Engine:
        """Return an engine with `LANES` lanes."""
        return Engine.load(self.bundle, backend=self.backend, **{"lanes": LANES, "check_hashes": False, **options})
