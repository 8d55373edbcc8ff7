"""A network whose call takes 10 ms, for one lane and for all of them, as a GPU's nearly does.

`python -m benchmarks.serving.fake [FLAGS]` is `latentrt serve` over it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from latentrt.bundle.bundle import EMBEDDED, Bundle
from latentrt.command.serve import serve
from latentrt.engine import Engine
from latentrt.runtime.fake import FakeBackend, zeros
from latentrt.runtime.signature import Arrays
from latentrt.serve import server
from latentrt.serve.process.config import Settings

CALL = 0.01  # seconds
COMMAND = (sys.executable, "-m", "benchmarks.serving.fake")


def fake_engine(lanes: int) -> Engine:
    """Return an engine of the embedded model's shapes that draws nothing; only its UNet takes time, and no core."""
    bundle = Bundle.open(EMBEDDED, check_hashes=False)
    bundle = replace(bundle, spec=replace(bundle.spec, golden=()))
    graph = bundle.spec.graphs()["unet"]
    nothing = zeros(graph)

    def unet(feeds: Arrays) -> dict[str, NDArray[Any]]:
        time.sleep(CALL)
        return nothing(feeds)

    return Engine(bundle, FakeBackend({graph.path: unet}), lanes=lanes)


@contextmanager
def _loaded(settings: Settings) -> Iterator[Engine]:
    with fake_engine(settings.lanes or 8) as engine:
        yield engine


if __name__ == "__main__":
    server.loaded = _loaded
    serve()
