"""One call of a network, spread over cores: the numbers are those of a call of each entry alone."""

from __future__ import annotations

import _thread
import gc
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.spec import GraphSpec, TensorSpec
from latentrt.errors import NetworkError
from latentrt.model.prompts import encoder
from latentrt.runtime import spread
from latentrt.runtime.onnxruntime import OrtBackend, OrtNetwork
from latentrt.runtime.signature import shape_of, symbols

Feeds = dict[str, NDArray[Any]]
THREADS = (1, 2, 3, 5)  # also more than there are cores


@pytest.fixture(scope="module")
def networks() -> Iterator[dict[tuple[str, int], OrtNetwork]]:
    """The embedded model's networks by name and threads."""
    bundle = Bundle.open(check_hashes=False)
    made = {
        (name, threads): OrtBackend(threads=threads, spin=False).load(bundle, name)
        for name in ("unet", "vae_decoder", "text_encoder")
        for threads in THREADS
    }
    yield made
    for network in made.values():
        network.close()


def feeds_of(graph: GraphSpec, entries: int, side: int, seed: int) -> Feeds:
    """Return random inputs of a network."""
    rng = np.random.default_rng(seed)
    sizes = dict.fromkeys(symbols(graph.inputs), side) | {"batch": entries}
    shapes = {tensor.name: shape_of(tensor, sizes) for tensor in graph.inputs}
    feeds: Feeds = {
        tensor.name: rng.integers(0, 100, shapes[tensor.name])
        if tensor.dtype == "int64"
        else rng.standard_normal(shapes[tensor.name], np.float32)
        for tensor in graph.inputs
    }
    return feeds | {"timestep": rng.uniform(0, 999, entries).astype(np.float32)} if "timestep" in feeds else feeds


def one_by_one(network: OrtNetwork, feeds: Feeds) -> Feeds:
    entries = len(next(iter(feeds.values())))
    alone = [network({name: array[i : i + 1] for name, array in feeds.items()}) for i in range(entries)]
    return {name: np.concatenate([each[name] for each in alone]) for name in alone[0]}


@settings(max_examples=12, deadline=None)
@given(
    name=st.sampled_from(["unet", "unet", "vae_decoder", "text_encoder"]),
    entries=st.integers(1, 7),
    side=st.sampled_from([4, 8]),
    seed=st.integers(0, 99),
)
def test_an_entry_has_the_same_bits_in_any_company_and_on_any_number_of_threads(
    networks: dict[tuple[str, int], OrtNetwork], name: str, entries: int, side: int, seed: int
) -> None:
    feeds = feeds_of(networks[name, 1].graph, entries, side, seed)
    wanted = one_by_one(networks[name, 1], feeds)
    for threads in THREADS:
        found = networks[name, threads](feeds)
        for output, array in wanted.items():
            np.testing.assert_array_equal(found[output], array, f"{output} on {threads} threads")


def test_several_threads_may_call_a_spread_network_at_the_same_time(
    networks: dict[tuple[str, int], OrtNetwork],
) -> None:
    network = networks["unet", 3]
    cases = [feeds_of(network.graph, entries, 4, entries) for entries in (2, 3, 4, 5)]
    wanted = [one_by_one(network, feeds)["out"] for feeds in cases]
    found: dict[int, list[NDArray[Any]]] = {}

    def work(number: int) -> None:
        found[number] = [network(cases[number])["out"] for _ in range(5)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, arrays in found.items():
        for array in arrays:
            np.testing.assert_array_equal(array, wanted[number])
    assert len(found) == len(cases)


@pytest.mark.parametrize(
    ("entries", "threads", "parts"),
    [(1, 1, 1), (7, 1, 1), (1, 2, 1), (2, 2, 2), (3, 2, 2), (16, 2, 2), (2, 4, 1), (4, 4, 4), (9, 4, 4)],
)
def test_a_batch_is_spread_where_every_thread_has_an_entry(entries: int, threads: int, parts: int) -> None:
    assert spread.parts_of(entries, threads) == parts


class Session:
    """A session whose calls are threads; it fails for entries that are negative."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.running = 0
        self.lock = threading.Lock()

    def run(self, outputs: list[str], feeds: Feeds, options: Any = None) -> list[NDArray[Any]]:
        with self.lock:
            self.sizes.append(len(feeds["a"]))
            self.running += 1
        try:
            if (feeds["a"] < 0).any():
                raise ValueError("it is negative")
            return [feeds["a"] * 2 for _ in outputs]
        finally:
            with self.lock:
                self.running -= 1

    def run_async(self, outputs: list[str], feeds: Feeds, callback: Any, user_data: None, options: Any) -> None:
        def work() -> None:
            try:
                callback(self.run(outputs, feeds), user_data, "")
            except ValueError as error:
                callback([], user_data, str(error))

        threading.Timer(0.01, work).start()


def test_parts_are_neighbouring_entries_of_nearly_the_same_number() -> None:
    session, a = Session(), np.arange(14.0).reshape(7, 2)
    (found,) = spread.run(session, ["y"], {"a": a}, 3)
    np.testing.assert_array_equal(found, 2 * a)
    assert sorted(session.sizes) == [2, 2, 3]


@pytest.mark.parametrize("entry", [0, 1, 2])
def test_an_error_of_any_part_is_raised_when_no_part_runs(entry: int) -> None:
    session, a = Session(), np.ones(3)
    a[entry] = -1
    with pytest.raises((ValueError, RuntimeError), match="negative"):
        spread.run(session, ["y"], {"a": a}, 3)
    assert len(session.sizes) == 3
    assert session.running == 0


def test_an_interrupt_is_raised_when_no_part_runs() -> None:
    class Interrupted(Session):
        def run_async(self, outputs: list[str], feeds: Feeds, callback: Any, user_data: None, options: Any) -> None:
            def work() -> None:
                with self.lock:
                    self.running += 1
                _thread.interrupt_main()
                time.sleep(0.05)
                with self.lock:
                    self.running -= 1
                callback([feeds["a"]], user_data, "")

            threading.Timer(0.01, work).start()

    session = Interrupted()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs without one
    try:
        with pytest.raises(KeyboardInterrupt):
            spread.run(session, ["y"], {"a": np.ones(3)}, 3)
    finally:
        signal.signal(signal.SIGINT, before)
    assert session.running == 0


def test_onnxruntimes_own_error_of_any_part_names_the_graph(networks: dict[tuple[str, int], OrtNetwork]) -> None:
    """Token -10**6 is none of the vocabulary: a failure in the middle of a call."""
    network = networks["text_encoder", 2]
    good = np.zeros((2, 77), np.int64)

    def feeds(ids: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        return encoder.feeds_of(network.graph.inputs, ids)

    for entry in (0, 1):
        bad = good.copy()
        bad[entry, 5] = -(10**6)
        with pytest.raises(NetworkError, match=r"text_encoder.*failed in ONNX Runtime"):
            network(feeds(bad))
    wanted = one_by_one(network, feeds(good))
    np.testing.assert_array_equal(network(feeds(good))["text_states"], wanted["text_states"])


def test_a_graph_whose_tensors_do_not_all_have_the_batch_is_not_spread() -> None:
    sample = TensorSpec("sample", "float32", ("batch", 4, "height", "width"))
    table = TensorSpec("table", "float32", (3, 4))
    out = TensorSpec("out", "float32", ("batch", 4, "height", "width"))
    scalar = TensorSpec("scale", "float32", ())
    assert spread.batch_of(GraphSpec("a.onnx", 23, 1, (sample,), (out,))) == "batch"
    for odd in (table, scalar):
        assert spread.batch_of(GraphSpec("a.onnx", 23, 1, (sample, odd), (out,))) is None
        assert spread.batch_of(GraphSpec("a.onnx", 23, 1, (sample,), (out, odd))) is None
    assert spread.batch_of(GraphSpec("a.onnx", 23, 1, (table,), (table,))) is None


def test_a_closed_network_leaves_no_thread() -> None:
    def count() -> int:
        gc.collect()
        with open("/proc/self/status", encoding="ascii") as lines:
            return int(next(line for line in lines if line.startswith("Threads:")).split()[1])

    bundle = Bundle.open(check_hashes=False)
    before = count()
    network = OrtBackend(threads=4, spin=False).load(bundle, "text_encoder")
    network(encoder.feeds_of(network.graph.inputs, np.zeros((4, 77), np.int64)))
    assert count() > before
    network.close()
    assert count() == before
