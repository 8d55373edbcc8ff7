"""The GPU and the backends that are here. With LATENTRT_EMULATED_GPU=1 they are stand-ins, and everything is small:

so the tests themselves are tested where there is no GPU (tests/gpu/test_emulated.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from importlib import import_module
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from latentrt import Engine
from latentrt.errors import BackendError, MissingDependencyError
from tests.gpu.gpu_rig import SCALE, GpuRig
from tests.gpu.kinds import EMULATED, KINDS


@pytest.fixture(scope="session")
def hardware(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Yield the module that opens things on the GPU, or on the stand-in. Plans lie in a cache of this session's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield import_module("tests.support.gpu.emulated" if EMULATED else "benchmarks.gpu.hardware")


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def rig(hardware: Any, request: pytest.FixtureRequest) -> Iterator[GpuRig]:
    """Yield each installed backend; skip one that is missing, or not for this GPU, with its reason."""
    with _skipping():
        made = GpuRig(hardware, request.param)
    with closing(made.gpu):
        with _skipping():
            made.check_gpu()
        made.build()
        yield made


@contextmanager
def _skipping() -> Iterator[None]:
    try:
        yield
    except (BackendError, MissingDependencyError) as error:
        pytest.skip(str(error))


@pytest.fixture
def draw() -> Callable[..., NDArray[np.uint8]]:
    """Draw with an engine at the tests' size: pixels, (pictures, height, width, 3)."""

    def run(engine: Engine, prompt: str | list[str] = "a red apple", **settings: Any) -> NDArray[np.uint8]:
        common = {"width": SCALE.pixels, "height": SCALE.pixels, "steps": SCALE.steps}
        return np.stack([np.asarray(picture) for picture in engine(prompt, **{**common, **settings})])

    return run
