"""`python -m tests.support.serve.fake_server SECONDS LOOK [FLAGS]`: `latentrt serve` as it is, over fake networks.

Each call takes so many seconds.

The prompts of `fake_engine` control it: a step that raises, one that hangs, latents that turn NaN.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.command.serve import serve
from latentrt.engine import Engine
from latentrt.serve import server
from latentrt.serve.process.config import Settings
from tests.support.serve.fake_engine import Arrays, Fakes, fake_engine

STEP = 0.01


def fake(seconds: float = STEP, look: str = "flat") -> tuple[str, ...]:
    """Return the command of such a server; "rough" pictures do not compress, and are megabytes on the wire."""
    return sys.executable, "-m", "tests.support.serve.fake_server", str(seconds), look


class Rough(Fakes):
    """Its pictures are noise."""

    def vae(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        image = super().vae(feeds)["image"]
        return {"image": np.random.default_rng(0).uniform(-1, 1, image.shape).astype(np.float32)}


def main() -> None:
    """Run the server's own code but for the engine."""
    seconds, fakes = float(sys.argv[1]), Rough() if sys.argv[2] == "rough" else Fakes()
    del sys.argv[1:3]

    @contextmanager
    def loaded(settings: Settings) -> Iterator[Engine]:
        with fake_engine(fakes, lanes=settings.lanes or 8, seconds=seconds) as engine:
            yield engine

    server.loaded = loaded
    serve()


if __name__ == "__main__":
    main()
