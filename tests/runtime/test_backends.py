"""Networks: their refusals, and their stand-ins."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from latentrt.bundle.bundle import EMBEDDED, Bundle
from latentrt.bundle.spec import GraphSpec, TensorSpec
from latentrt.errors import BackendError, NetworkError
from latentrt.model.prompts.encoder import feeds_of
from latentrt.runtime import open_backend
from latentrt.runtime.fake import FakeNetwork, zeros
from latentrt.runtime.lazy import LazyNetwork
from latentrt.runtime.onnxruntime import OrtBackend
from latentrt.runtime.signature import check_feeds

GRAPH = GraphSpec(
    "vae/decoder.onnx",
    23,
    1,
    (TensorSpec("a", "float32", ("batch", 4, "height")), TensorSpec("b", "int64", ("batch",))),
    (TensorSpec("y", "float32", ("batch", 3, "8*height")),),
)
A, B = np.zeros((2, 4, 5), np.float32), np.zeros(2, np.int64)


@pytest.mark.parametrize(
    ("feeds", "words"),
    [
        ({"a": A}, "inputs"),
        ({"a": A, "b": B, "c": B}, "inputs"),
        ({"a": A, "x": B}, "inputs"),
        ({"a": A.astype(np.float64), "b": B}, "a of float64"),
        ({"a": A[:, :3], "b": B}, r"\(2, 3, 5\)"),
        ({"a": A[0], "b": B}, r"\(4, 5\)"),
        ({"a": A, "b": np.zeros(3, np.int64)}, r"b of int64 \(3,\)"),
    ],
)
def test_feeds_that_do_not_fit_are_named(feeds: dict[str, np.ndarray], words: str) -> None:
    with pytest.raises(NetworkError, match=words):
        check_feeds(GRAPH, feeds)


def test_the_fake_follows_the_signature() -> None:
    network = FakeNetwork(GRAPH, zeros(GRAPH))
    assert network({"a": A, "b": B})["y"].shape == (2, 3, 40)
    assert network.calls == 1
    doubling = FakeNetwork(GRAPH, lambda feeds: {"y": feeds["a"] * 2})
    np.testing.assert_array_equal(doubling({"a": A + 1, "b": B})["y"], A + 2)


def test_onnxruntime_names_what_it_cannot_load(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    with pytest.raises(BackendError, match=r"cannot load .*broken\.onnx"):
        OrtBackend().session(tmp_path / "broken.onnx", 23)


def test_onnxruntime_results_do_not_depend_on_threads_or_spinning() -> None:
    bundle = Bundle.open(check_hashes=False)
    feeds = feeds_of(bundle.spec.networks["text_encoder"].inputs, np.arange(77, dtype=np.int64)[None])
    results = [
        OrtBackend(threads=threads, spin=spin).load(bundle, "text_encoder")(feeds)["text_states"]
        for threads, spin in ((1, True), (2, True), (2, False))
    ]
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_a_graph_cannot_read_weights_outside_its_folder(tmp_path: Path) -> None:
    """ONNX Runtime itself ensures this; the test fails if that ever changes."""
    graph = Bundle.open(check_hashes=False).spec.graphs()["text_encoder"]
    weights = b"model.safetensors"
    data = (EMBEDDED / graph.path).read_bytes()
    assert data.count(weights) > 1
    escaping = b"../secret.weights"
    assert len(escaping) == len(weights)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "model.onnx").write_bytes(data.replace(weights, escaping))
    (tmp_path / "secret.weights").write_bytes((EMBEDDED / "text_encoder" / "model.safetensors").read_bytes())
    with pytest.raises(BackendError, match="cannot load"):
        OrtBackend().session(tmp_path / "in" / "model.onnx", graph.opset)


def test_a_lazy_network_is_loaded_when_called_and_again_after_it_was_dropped() -> None:
    loads: list[int] = []

    def load() -> FakeNetwork:
        loads.append(1)
        return FakeNetwork(GRAPH, lambda feeds: {"y": feeds["a"]})

    lazy = LazyNetwork(load)
    assert not loads
    lazy({"a": A, "b": B})
    lazy.open()
    assert len(loads) == 1
    lazy.drop()
    lazy.drop()
    lazy({"a": A, "b": B})
    assert len(loads) == 2
    lazy.close()
    with pytest.raises(BackendError, match="closed"):
        lazy({"a": A, "b": B})


def test_backends_by_name() -> None:
    assert open_backend("onnxruntime", threads=1).device == "cpu"
    with pytest.raises(BackendError, match="onnxruntime, openvino, tensorrt"):
        open_backend("cuda")


def test_nothing_is_reported_to_anybody(tmp_path: Path) -> None:
    """onnxruntime 1.31 on Linux would make an id of the machine and a store of events as soon as it is imported."""
    code = "from latentrt import Engine; Engine.load(check_hashes=False).close()"
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert list(tmp_path.rglob("*")) == []


def test_options_of_the_cuda_provider(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms are exact in half precision, nothing uses TF32, and a measurement can say otherwise."""
    given = []

    def session(path: Path, options: object, *, providers: list[tuple[str, dict[str, str]]], **rest: object) -> None:
        given.append(providers[0])
        raise RuntimeError("there is no device")

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    ours = {"use_tf32": "0", "enable_skip_layer_norm_strict_mode": "1", "cudnn_conv_algo_search": "HEURISTIC"}
    wanted = {"use_tf32": "1", "sdpa_kernel": "8"}
    for options in ({}, wanted):
        with pytest.raises(BackendError, match="no device"):
            OrtBackend("cuda", precision="fp16", provider_options=options).session(tmp_path / "model.onnx", 21)
    assert given == [("CUDAExecutionProvider", ours), ("CUDAExecutionProvider", ours | wanted)]
