"""Optimized graphs in the cache: the same numbers, whole or absent, and never a reason to fail."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from latentrt.bundle.bundle import EMBEDDED, Bundle, FileRecord
from latentrt.bundle.spec import DENOISER
from latentrt.engine import Engine
from latentrt.golden import TOLERANCE, worst_error
from latentrt.runtime import open_backend, optimized
from latentrt.runtime.onnxruntime import OrtBackend
from tests.support.models.texts import states, told

LANES = 3
SAVED, READ, PLAIN = "saved", "read", "plain"
Made = list[tuple[Path, str]]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of graphs in an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "latentrt" / "graphs"


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.open(EMBEDDED.with_name("pixels"))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    """Return a list to which each session that is made adds its path, and SAVED, READ or PLAIN."""
    made: Made = []
    session = OrtBackend.session

    def noted(
        self: OrtBackend, path: Path, opset: int, *, optimize: bool = True, save_to: Path | None = None, **more: Any
    ) -> Any:
        result = session(self, path, opset, optimize=optimize, save_to=save_to, **more)
        made.append((path, SAVED if save_to else PLAIN if optimize else READ))
        return result

    monkeypatch.setattr(OrtBackend, "session", noted)
    return made


def load(bundle: Bundle, network: str = "unet", *, cache: bool = True, precision: str = "fp32") -> Any:
    return OrtBackend(threads=1, cache=cache, precision=precision).load(bundle, network)


def feeds(network: Any, lanes: int = LANES) -> dict[str, np.ndarray]:
    random = np.random.default_rng(7)
    found: dict[str, np.ndarray] = {}
    texts = any(tensor.name.startswith("text.") for tensor in network.graph.inputs)
    known = told(Bundle.open(check_hashes=False), lanes, random) if texts else {}
    for tensor in network.graph.inputs:
        shape = [lanes, *(16 if isinstance(side, str) else side for side in tensor.shape[1:])]
        if tensor.dtype.startswith("int"):
            found[tensor.name] = random.integers(0, 300, shape).astype(tensor.dtype)
        elif tensor.name == "encoder_hidden_states":
            found[tensor.name] = states(shape, random).astype(tensor.dtype)
        elif tensor.name in known:
            found[tensor.name] = known[tensor.name].astype(tensor.dtype)
        else:
            found[tensor.name] = random.standard_normal(shape).astype(tensor.dtype)
    return found


def output(network: Any) -> np.ndarray:
    return np.asarray(network(feeds(network))["out"])


def entry(cache: Path) -> Path:
    (one,) = cache.iterdir()
    return one


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", ["emoji", "pixels"])
def test_numbers_are_those_of_the_graph_itself_and_of_a_lane_alone(cache: Path, name: str, precision: str) -> None:
    bundle = Bundle.open(EMBEDDED.with_name(name))
    for network in bundle.spec.networks:
        plain = load(bundle, network, cache=False, precision=precision)
        written, read = (load(bundle, network, precision=precision) for _ in range(2))
        fed = feeds(plain)
        outputs = [one(fed) for one in (plain, written, read)]
        for output in outputs[1:]:
            for tensor in plain.graph.outputs:
                np.testing.assert_array_equal(output[tensor.name], outputs[0][tensor.name])
        for lane in range(LANES if bundle.spec.networks[network].role == DENOISER and precision == "fp32" else 0):
            alone = read({tensor: values[lane : lane + 1] for tensor, values in fed.items()})
            for tensor in plain.graph.outputs:
                np.testing.assert_array_equal(alone[tensor.name][0], outputs[0][tensor.name][lane])
    assert len(list(cache.iterdir())) == len(bundle.spec.networks)


def test_golden_runs_and_pictures_are_the_same_to_the_bit(cache: Path, made: Made) -> None:
    pictures, errors = [], []
    for cached in (False, True, True):
        with Engine.load(threads=1, cache=cached) as engine:
            errors.append(worst_error(engine))
            pictures.append(np.asarray(engine("a red apple", steps=2, seed=7)[0]))
    np.testing.assert_array_equal(pictures[1], pictures[0])
    np.testing.assert_array_equal(pictures[2], pictures[0])
    assert errors[0] == errors[1] == errors[2] <= TOLERANCE
    assert [how for _, how in made] == 4 * [PLAIN] + 4 * [SAVED, READ] + 4 * [READ]
    assert all(cache in path.parents for path, how in made if how == READ)


def test_only_checked_bundles_are_saved_and_all_with_hashes_are_read(cache: Path, bundle: Bundle, made: Made) -> None:
    unchecked = Bundle.open(bundle.root, check_hashes=False)
    load(unchecked)
    assert not cache.exists()
    load(bundle)
    load(unchecked)
    load(Bundle(bundle.root, bundle.spec, {}, checked=True))  # of no manifest
    assert [how for _, how in made] == [PLAIN, SAVED, READ, READ, PLAIN]
    assert open_backend("onnxruntime").cache is False  # type: ignore[attr-defined]


def test_other_weights_builds_and_cpus_are_other_entries(
    cache: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = bundle.spec.graph("unet", "fp32")

    def folder(files: dict[str, FileRecord] | None = None, build: str = "1") -> Path:
        changed = Bundle(bundle.root, bundle.spec, {**bundle.files, **(files or {})}, checked=True)
        return optimized.SavedGraph(changed, graph, build).folder

    (weights,) = (name for name in bundle.files if name.endswith(".safetensors"))
    other = {
        folder(),
        folder({weights: FileRecord("0" * 64, 1)}),
        folder({graph.path: FileRecord("0" * 64, 1)}),
        folder(build="2"),
    }
    monkeypatch.setattr(optimized, "_cpu", lambda: "another")
    assert len(other | {folder()}) == 5
    assert folder() == folder({"README.md": FileRecord("0" * 64, 1)})


def test_the_cpu_is_told_by_its_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    assert optimized._cpu() == optimized._cpu() != ""
    monkeypatch.setattr("builtins.open", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError()))
    assert optimized._cpu()


def cut(folder: Path) -> None:
    os.truncate(folder / optimized.WEIGHTS, (folder / optimized.WEIGHTS).stat().st_size // 2)


def rewrite_weights(folder: Path) -> None:
    path = folder / optimized.WEIGHTS
    path.write_bytes(bytes(path.stat().st_size))
    os.utime(path, (1e9, 1e9))  # as if written at another time than it was


def rewrite_graph(folder: Path) -> None:
    data = bytearray((folder / optimized.GRAPH).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / optimized.GRAPH).write_bytes(data)


def rewrite_record(folder: Path) -> None:
    (folder / optimized.RECORD).write_text("{")


def lose_weights(folder: Path) -> None:
    (folder / optimized.WEIGHTS).unlink()


@pytest.mark.parametrize("damage", [cut, rewrite_weights, rewrite_graph, rewrite_record, lose_weights])
def test_a_damaged_entry_is_made_again(cache: Path, bundle: Bundle, made: Made, damage: Callable[[Path], None]) -> None:
    wanted = output(load(bundle))  # the session is gone by then: it maps the file
    damage(entry(cache))
    np.testing.assert_array_equal(output(load(bundle)), wanted)
    assert [how for _, how in made] == [SAVED, READ, SAVED, READ]


def test_an_entry_that_onnxruntime_refuses_is_made_again(cache: Path, bundle: Bundle, made: Made) -> None:
    load(bundle)
    folder = entry(cache)
    (folder / optimized.GRAPH).write_bytes(b"no graph")
    (folder / optimized.RECORD).write_text(json.dumps(optimized._described(folder)))
    load(bundle)
    load(bundle)
    assert [how for _, how in made] == [SAVED, READ, PLAIN, SAVED, READ]


@pytest.mark.parametrize("where", ["graphs", "entry", "weights"])
def test_nothing_is_read_or_removed_that_others_may_have_written(
    cache: Path, bundle: Bundle, made: Made, where: str
) -> None:
    load(bundle)
    folder = entry(cache)
    {"graphs": cache, "entry": folder, "weights": folder / optimized.WEIGHTS}[where].chmod(0o770)
    load(bundle)
    assert [how for _, how in made] == [SAVED, READ, PLAIN]
    assert entry(cache) == folder


def test_a_cache_that_cannot_be_written_is_none(cache: Path, bundle: Bundle, made: Made) -> None:
    cache.parent.parent.joinpath("latentrt").write_text("no folder")
    load(bundle)
    assert made == [(bundle.path("unet/model.onnx"), PLAIN)]


def test_a_disk_that_becomes_full_leaves_nothing(cache: Path) -> None:
    code = "from latentrt import Engine; print(Engine.load('pixels', threads=1)(steps=1))"
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))  # noqa: E731
    subprocess.run([sys.executable, "-c", code], check=True, preexec_fn=limit, stdout=subprocess.PIPE)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("lacking", ["disk", "bound"])
def test_nothing_is_written_without_room(
    cache: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, lacking: str
) -> None:
    if lacking == "disk":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    else:
        monkeypatch.setattr(optimized, "MOST_BYTES", 2**20)
    load(bundle)
    assert not list(cache.glob("*"))


def test_two_at_once_are_harmless(cache: Path, bundle: Bundle, made: Made) -> None:
    networks: list[Any] = []
    threads = [threading.Thread(target=lambda: networks.append(load(bundle))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(*map(output, networks))
    load(bundle)
    assert made[-1][1] == READ
    assert not entry(cache).suffix


def test_the_entries_unused_for_longest_are_removed(
    cache: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    emoji = Bundle.open(EMBEDDED)
    load(emoji, "vae_decoder")
    first = entry(cache)
    load(emoji, "text_encoder")
    (second,) = set(cache.iterdir()) - {first}
    for folder, age in ((first, 200), (second, 100)):
        os.utime(folder / optimized.RECORD, times=2 * (time.time() - age,))
    abandoned, fresh = cache / ".a.part", cache / ".b.part"
    for folder, age in ((abandoned, 2 * optimized.ABANDONED), (fresh, 0.0)):
        folder.mkdir()
        (cache / "note").touch()
        os.utime(folder, times=2 * (time.time() - age,))
    load(emoji, "vae_decoder")  # now the second is the older one
    sizes = [sum(file.stat().st_size for file in folder.iterdir()) for folder in (first, second)]
    monkeypatch.setattr(optimized, "MOST_BYTES", sum(sizes) + 1000)  # room for all but the third
    load(bundle)
    assert first.exists()
    assert not second.exists()
    assert not abandoned.exists()
    assert fresh.exists()
    assert len([folder for folder in cache.iterdir() if folder.is_dir()]) == 3
