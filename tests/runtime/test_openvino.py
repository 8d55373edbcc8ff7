"""OpenVINO's CPU: ONNX Runtime's numbers, lanes that do not touch each other, refusals."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.spec import FP16, FP32, GraphSpec, ModelSpec, NetworkSpec, Variant
from latentrt.engine import Engine
from latentrt.errors import BackendError, BundleError, MissingDependencyError, NetworkError
from latentrt.golden import TOLERANCE, worst_error
from latentrt.model.prompts.encoder import feeds_of
from latentrt.runtime import open_backend
from latentrt.runtime.base import Facts
from latentrt.runtime.onnxruntime import OrtBackend
from latentrt.runtime.signature import shape_of

NETWORKS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")


def test_it_is_named_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    known = "openvino_telemetry" in sys.modules  # by another test's library
    with pytest.raises(MissingDependencyError, match=r"latentrt\[openvino\]"):
        open_backend("openvino")
    assert ("openvino_telemetry" in sys.modules) == known


class TestInstalled:
    """What needs the library."""

    @pytest.fixture(autouse=True)
    def _library(self) -> None:
        pytest.importorskip("openvino")

    @pytest.mark.parametrize("network", NETWORKS)
    def test_numbers_are_onnxruntimes(self, network: str) -> None:
        bundle = Bundle.open(check_hashes=False)
        feeds = _feeds(bundle.spec.graphs()[network], 2)
        ours, theirs = (b.load(bundle, network)(feeds) for b in (open_backend("openvino"), OrtBackend()))
        assert ours.keys() == theirs.keys()
        for name, array in ours.items():
            assert array.dtype == theirs[name].dtype
            assert np.linalg.norm(array - theirs[name]) <= 3e-5 * np.linalg.norm(theirs[name])

    @pytest.mark.parametrize("threads", [1, 2])
    @pytest.mark.parametrize("network", NETWORKS)
    def test_a_lane_alone_equals_the_lane_in_company(self, network: str, threads: int) -> None:
        """To the bit; calls from a second thread, with a request of its own, too."""
        bundle = Bundle.open(check_hashes=False)
        loaded = open_backend("openvino", threads=threads).load(bundle, network)
        feeds = _feeds(loaded.graph, 3)
        name = loaded.graph.outputs[0].name
        together = loaded(feeds)[name]
        alone: dict[int, np.ndarray[Any, Any]] = {}

        def call(lane: int) -> None:
            alone[lane] = loaded({key: array[lane : lane + 1] for key, array in feeds.items()})[name]

        second = threading.Thread(target=call, args=(1,))
        second.start()
        call(0)
        second.join()
        call(2)
        for lane, array in alone.items():
            np.testing.assert_array_equal(together[lane], array[0])
        loaded.close()

    def test_golden_runs(self) -> None:
        with Engine.load(backend="openvino", check_hashes=False) as engine:
            assert engine.backend.facts == Facts(exact=True)
            assert worst_error(engine) <= TOLERANCE

    def test_half_graphs_are_computed_in_float32(self) -> None:
        bundle = Bundle.open(check_hashes=False)
        backend = open_backend("openvino", precision="fp16")
        assert not backend.facts.exact
        network = backend.load(bundle, "unet")
        feeds = _feeds(bundle.spec.graphs()["unet"], 2)
        expected = OrtBackend().load(bundle, "unet")(feeds)["out"]
        ours = network({t.name: feeds[t.name].astype(t.dtype) for t in network.graph.inputs})["out"]
        assert ours.dtype == np.float16
        assert np.linalg.norm(ours - expected) <= 5e-3 * np.linalg.norm(expected)

    def test_a_device_that_is_not_there_is_an_error(self) -> None:
        with pytest.raises(BackendError, match=r"has the devices cpu.*cuda"):
            open_backend("openvino", "cuda")
        with pytest.raises(BackendError, match="threads is 0"):
            open_backend("openvino", threads=0)

    def test_an_operator_that_it_does_not_know_is_named(self, tmp_path: Path) -> None:
        from onnx import TensorProto, helper, save

        x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch"]) for name in "xy")
        graph = helper.make_graph([helper.make_node("Strange", ["x"], ["y"], domain="some.where")], "graph", [x], [y])
        imports = [helper.make_opsetid("", 23), helper.make_opsetid("some.where", 1)]
        save(helper.make_model(graph, opset_imports=imports, ir_version=10), tmp_path / "model.onnx")
        spec = Bundle.open(check_hashes=False).spec
        network = NetworkSpec("denoiser", (), (), {FP32: Variant("model.onnx", 23, 1)})
        own = ModelSpec(spec.id, None, None, spec.latents, spec.schedule, {"unet": network})
        with pytest.raises(BackendError, match="Strange"):
            open_backend("openvino").load(Bundle(tmp_path, own, {}), "unet")
        with pytest.raises(BundleError, match=FP16):
            open_backend("openvino", precision=FP16).load(Bundle(tmp_path, own, {}), "unet")

    def test_feeds_are_checked(self) -> None:
        network = open_backend("openvino").load(Bundle.open(check_hashes=False), "text_encoder")
        with pytest.raises(NetworkError, match="float32"):
            network(feeds_of(network.graph.inputs, np.zeros((1, 77), np.float32)))

    def test_nothing_is_reported_to_anybody(self, tmp_path: Path) -> None:
        """Importing openvino with openvino_telemetry would make an id of the machine and report the import."""
        code = "from latentrt.runtime import open_backend; open_backend('openvino'); import sys;"
        code += "assert not [name for name in sys.modules if name.startswith('openvino_telemetry')]"
        environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)}
        subprocess.run([sys.executable, "-c", code], check=True, env=environment)
        assert list(tmp_path.rglob("*")) == []


def _feeds(graph: GraphSpec, lanes: int) -> dict[str, np.ndarray[Any, Any]]:
    """Return inputs with odd sides; token ids where the graph reads whole numbers."""
    draw = np.random.default_rng(0)
    scale = 8 if "image" in {tensor.name for tensor in graph.inputs} else 1
    sizes = {"batch": lanes, "height": 13 * scale, "width": 10 * scale, "tokens": 77}
    shapes = {tensor.name: (shape_of(tensor, sizes), np.dtype(tensor.dtype)) for tensor in graph.inputs}
    return {
        name: draw.integers(0, 400, shape) if dtype.kind == "i" else draw.standard_normal(shape, np.float32)
        for name, (shape, dtype) in shapes.items()
    }
