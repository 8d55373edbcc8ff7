"""`python fake_server.py SECONDS [FLAGS]`: `latentrt serve` as it is, over fake networks that take so long a call.

The prompts of `fake_engine` pull its strings: a step that raises, one that hangs, latents that turn NaN.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from fake_engine import Fakes, fake_engine

from engine.pipeline import Engine
from engine.serve import server
from engine.serve.config import Settings
from engine.serve_verb import serve

STEP = 0.01


def fake(seconds: float = STEP) -> tuple[str, ...]:
    """The command of such a server."""
    return sys.executable, __file__, str(seconds)


def main() -> None:
    """Everything but the engine is the server's own."""
    seconds, sys.argv[1:2] = float(sys.argv[1]), []

    @contextmanager
    def loaded(settings: Settings) -> Iterator[Engine]:
        with fake_engine(Fakes(), lanes=settings.lanes or 8, seconds=seconds) as engine:
            yield engine

    server.loaded = loaded
    serve()


if __name__ == "__main__":
    main()
