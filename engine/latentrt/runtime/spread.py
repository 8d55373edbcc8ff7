"""One call of an ONNX Runtime session, spread over cores: each computes some entries of the batch.

Threads that share every operator of a call wait for each other hundreds of times in it. Threads that have entries of
their own wait once, at the end, and one that is done earlier helps the others. They are the session's own threads, so
that its weights exist once, and there is no pool of ours to be closed.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import Event
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.bundle.spec import GraphSpec
from latentrt.runtime.signature import Arrays


def batch_of(graph: GraphSpec) -> str | None:
    """Return the symbolic dimension with which all inputs and outputs of a graph begin; None where there is none."""
    first = {tensor.shape[0] if tensor.shape else 1 for tensor in (*graph.inputs, *graph.outputs)}
    name = first.pop()
    return name if isinstance(name, str) and not first else None


def parts_of(entries: int, threads: int) -> int:
    """Return in how many parts a batch is computed at the same time: one for each thread, or all entries together.

    With fewer entries than threads, the threads share the operators of one call.
    """
    return threads if entries >= threads else 1


def run(session: Any, outputs: Sequence[str], feeds: Arrays, parts: int, options: Any = None) -> list[NDArray[Any]]:
    """Run a session and return its outputs; an entry's numbers do not depend on the number of parts.

    Args:
        session: an `onnxruntime.InferenceSession` with at least `parts` threads.
        outputs: their names.
        feeds: the inputs, each with at least `parts` entries.
        parts: how many calls to make at the same time.
        options: `onnxruntime.RunOptions` of every call, if any.

    Raises:
        Exception: whatever ONNX Runtime raises, once no part is running.
    """
    if parts == 1:
        return list(session.run(outputs, dict(feeds), options))
    first, *others = _cut(feeds, parts)
    started: list[_Part] = []
    try:
        for other in others:
            started.append(_Part(session, outputs, other, options))
        results = [session.run(outputs, first, options)]
    finally:
        _wait_for(started)
    results += [part.results for part in started]
    return [np.concatenate(arrays) for arrays in zip(*results, strict=True)]


def _wait_for(parts: Sequence[_Part]) -> None:
    """Wait until no part runs, also when the user interrupts: then the session may be freed."""
    interrupt: KeyboardInterrupt | None = None
    for part in parts:
        while not part.done.is_set():
            try:
                part.done.wait()
            except KeyboardInterrupt as error:
                interrupt = error
    if interrupt is not None:
        raise interrupt


def _cut(feeds: Arrays, parts: int) -> list[dict[str, NDArray[Any]]]:
    """Return the feeds of each part: neighbouring entries, of which the first parts have one more where some must."""
    cuts = {name: np.array_split(array, parts) for name, array in feeds.items()}
    return [{name: pieces[part] for name, pieces in cuts.items()} for part in range(parts)]


class _Part:
    """A call that one of the session's own threads makes. It keeps its feeds until ONNX Runtime has read them."""

    def __init__(self, session: Any, outputs: Sequence[str], feeds: dict[str, NDArray[Any]], options: Any) -> None:
        self.done = Event()
        self._feeds, self._options = feeds, options
        self._results: Sequence[NDArray[Any]] = ()
        self._error = ""
        session.run_async(outputs, feeds, self._finish, None, options)

    def _finish(self, results: Sequence[NDArray[Any]], _: None, error: str) -> None:
        self._results, self._error = results, error
        self.done.set()

    @property
    def results(self) -> Sequence[NDArray[Any]]:
        """The outputs. Raise RuntimeError where the call failed."""
        if self._error:
            raise RuntimeError(self._error)
        return self._results
