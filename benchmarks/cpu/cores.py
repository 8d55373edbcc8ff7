"""How are the cores of a CPU shared by the entries of a batch?

Measured: the embedded model's networks alone, the same session and the same arrays, in turn. *latentrt*: each thread
computes its own entries, as the engine does where there are as many as threads. *Shared*: all threads share every
operator of one call, as ONNX Runtime does by itself; they wait for each other by spinning, or, in another session,
sleep. The results are compared to the bit. Beside busy processes, one for each core, calls of lanes are taken again.
Prompts are measured alone: the engine encodes them one by one.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.cases import Config
from benchmarks.measures import OURS, Goal, Measure, Result
from benchmarks.timing import paired
from latentrt.bundle.bundle import Bundle
from latentrt.model.predictor import OWN
from latentrt.model.prompts.encoder import feeds_of
from latentrt.runtime.onnxruntime import OrtBackend, OrtNetwork
from latentrt.runtime.signature import shape_of

TITLE = "Cores"
SLEEPING, SHARED, SHARED_SLEEPING = f"{OURS}, no spin", "shared", "shared, no spin"
BUSY = "beside busy processes"
UNET, DECODER, TEXT = "unet", "vae_decoder", "text_encoder"
Feeds = dict[str, NDArray[Any]]


class Case(NamedTuple):
    """A call of a network: how many entries, and the side of the latents where it is not the model's own."""

    network: str
    entries: int
    side: int | None = None

    @property
    def name(self) -> str:
        """Its name in the report."""
        what = {UNET: "lanes", DECODER: "pictures decoded", TEXT: "prompts"}[self.network]
        return f"{self.entries} {what}" + (f" of {self.side} x {self.side}" if self.side else "")


def cases(threads: int) -> list[Case]:
    """Return the cases for so many threads, of which each has an entry at least."""
    lanes = [Case(UNET, entries) for entries in dict.fromkeys((threads, threads + 1, 2 * threads, 8 * threads))]
    return [*lanes, Case(UNET, threads, 64), Case(DECODER, threads), Case(TEXT, threads)]


def measure(config: Config) -> Result:
    """Measure all cases alone, and the calls of lanes beside busy processes too."""
    threads = max(2, config.threads)
    bundle = Bundle.open(config.bundle)
    networks = {name: _sides(bundle, name, threads) for name in (UNET, DECODER, TEXT)}
    calls = {case: _calls(networks[case.network], _feeds(bundle, case)) for case in cases(threads)}
    measures, same = [], True
    for case, sides in calls.items():
        result, equal = _race(sides, config, case.name)
        measures.append(result)
        same = same and equal
    with _busy_processes(threads):
        for case in (Case(UNET, threads), Case(UNET, 8 * threads)):
            measures.append(_race(calls[case], config, f"{case.name} {BUSY}")[0])
    return Result(measures, {"the same bits": same})


def goals(result: Result) -> list[Goal]:
    """Return what the rule of `latentrt.runtime.spread` rests on."""
    lanes = [one for one in result.measures if "lanes" in one.name]
    found = []
    for where, measures in (
        ("on cores that are free", [one for one in lanes if BUSY not in one.name]),
        (BUSY, [one for one in lanes if BUSY in one.name]),
    ):
        ratios = [one.ratio(SHARED).median for one in measures]
        text = f"{median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})"
        found.append(Goal(f"lanes apart are no slower than shared ones {where}", text, median(ratios) >= 1))
    return found


def _sides(bundle: Bundle, name: str, threads: int) -> dict[str, OrtNetwork]:
    """Return the networks of the four sides: two sessions, each called in both ways."""
    sides = {}
    for spin, spread, shared in ((True, OURS, SHARED), (False, SLEEPING, SHARED_SLEEPING)):
        backend = OrtBackend(threads=threads, spin=spin)
        graph = bundle.spec.graph(name, *backend.variants)
        session = backend.session(bundle.path(graph.path), graph.opset)
        sides |= {spread: OrtNetwork(session, graph, threads), shared: OrtNetwork(session, graph)}
    return {name: sides[name] for name in (OURS, SLEEPING, SHARED, SHARED_SLEEPING)}


def _feeds(bundle: Bundle, case: Case) -> Feeds:
    rng, count, spec = np.random.default_rng(0), case.entries, bundle.spec.latents
    if case.network == TEXT:
        return feeds_of(bundle.spec.networks[TEXT].inputs, rng.integers(0, 100, (count, 77)))
    shape = (count, spec.channels, case.side or spec.height, case.side or spec.width)
    latents = rng.standard_normal(shape, np.float32)
    if case.network == DECODER:
        return {"latents": latents}
    others = (tensor for tensor in bundle.spec.networks[UNET].inputs if tensor.name not in OWN)
    sizes = {"batch": count, "tokens": bundle.spec.tokens}
    told = {each.name: rng.standard_normal(shape_of(each, sizes), np.float32) for each in others}
    return {"sample": latents, "timestep": np.full(count, 500, np.float32), **told}


def _calls(sides: Mapping[str, OrtNetwork], feeds: Feeds) -> dict[str, Callable[[int], Any]]:
    return {side: lambda _, network=network: network(feeds) for side, network in sides.items()}


def _race(sides: Mapping[str, Callable[[int], Any]], config: Config, name: str) -> tuple[Measure, bool]:
    """Return the times of a case, and whether all sides gave the same bits."""
    runs = paired(sides, 4 * config.repeats, 2 * config.warmup)
    first = runs[OURS][0].result
    same = all(
        np.array_equal(first[out], run.result[out]) for samples in runs.values() for run in samples for out in first
    )
    samples = {side: [1000 * sample.seconds for sample in taken] for side, taken in runs.items()}
    return Measure(name, "ms", samples), same


@contextmanager
def _busy_processes(count: int) -> Iterator[None]:
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()
