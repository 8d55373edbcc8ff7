"""Plans by TensorRT-RTX, which builds them ahead of time, without a GPU: every graph, several kinds of GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from latentrt.bundle.bundle import EMBEDDED, Bundle
from latentrt.errors import BackendError, DeviceMemoryError, PlanError
from latentrt.runtime.tensorrt.library import Library, open_library
from latentrt.runtime.tensorrt.plans import PlanStore
from latentrt.runtime.tensorrt.record import REFITTABLE, STRIPPED
from latentrt_export.plans import building
from latentrt_export.plans.capability import capability, refused
from latentrt_export.plans.plan_graph import load_graph, serialized, weights_of
from latentrt_export.plans.plan_shapes import profiles_of, shapes_of
from latentrt_export.plans.to_tensorrt import Built, build_plans, estimates_of, open_target, orders_of
from latentrt_export.plans.wanted import bundles_of, networks_of
from latentrt_export.to_bundle import export_bundle

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has wheels for Linux on x86-64, and Windows")

STATIC: dict[str, str] = {}
FIXED = shapes_of(Bundle.open(EMBEDDED, check_hashes=False).spec, STATIC)
RANGES = {"lanes": "2:2:8", "pictures": "1:1:4", "size": "64:128:256"}
SHAPES = {"static": STATIC, "ranges": RANGES}
NETWORKS = ("text_encoder", "unet_text", "unet", "unet_shallow", "vae_decoder", "vae_encoder")
BUNDLES = ("emoji", "sd15-small")
CAPABILITIES = ("8.0", "8.9", "12.0")
Build = Callable[..., list[Built]]


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """Return the embedded model, and one of Stable Diffusion 1.5's shape with few channels."""
    root = tmp_path_factory.mktemp("bundles")

    def bundle(name: str) -> Bundle:
        if name == "emoji":
            return Bundle.open(EMBEDDED)
        if not (root / name).exists():
            from latentrt_export.checkpoint.presets.make import make_checkpoint

            make_checkpoint(name, root / "checkpoint")
            export_bundle(root / "checkpoint", root / name)
        return Bundle.open(root / name)

    return bundle


@pytest.fixture(scope="session")
def build(bundles: Callable[[str], Bundle], tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Build a bundle's plans, once in a session."""
    folders = {name: tmp_path_factory.mktemp(name) for name in BUNDLES}

    def build(name: str, compute_capability: str, asked: dict[str, str], networks: tuple[str, ...] = NETWORKS) -> Any:
        bundle, (library, gpu) = bundles(name), open_target("tensorrt-rtx", "cuda", compute_capability)
        shapes = shapes_of(bundle.spec, asked)
        orders = orders_of(bundle, library, gpu, shapes, networks=networks, plans=folders[name])
        return build_plans(orders, estimates_of(library, orders))

    return build


@pytest.fixture(scope="session")
def rtx() -> Library:
    return open_library("tensorrt-rtx")


@pytest.mark.parametrize(
    ("name", "compute_capability", "shapes"),
    [
        ("emoji", "8.9", "static"),
        pytest.param("emoji", "12.0", "ranges", marks=pytest.mark.slow),
        pytest.param("sd15-small", "8.9", "static", marks=pytest.mark.slow),
    ],
)
def test_every_graph_becomes_a_plan(build: Build, name: str, compute_capability: str, shapes: str) -> None:
    """Both models for several kinds of GPU; the slow tests have all combinations."""
    check(build(name, compute_capability, SHAPES[shapes]), compute_capability)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("controlnets", "loras", "shapes"),
    [(("grey=emoji-grey",), False, "static"), (("grey=emoji-grey",), False, "ranges"), ((), True, "static")],
    ids=["control", "control, ranges", "lora"],
)
def test_graphs_for_add_ons_become_plans(
    tmp_path: Path, controlnets: tuple[str, ...], loras: bool, shapes: str
) -> None:
    """The UNet that reads residuals with a ControlNet's networks; those that take LoRAs, 140 inputs of the UNet's."""
    library, gpu = open_target("tensorrt-rtx", "cuda", "8.9")
    bundles = bundles_of(EMBEDDED, controlnets, loras=loras)
    asked = shapes_of(bundles[0].spec, {**SHAPES[shapes], "rank": "16"})
    changed = ("unet", "unet_text", "text_encoder") if loras else ("unet", "hint", "controlnet")
    orders = [
        order
        for one, own in networks_of(bundles, changed)
        for order in orders_of(one, library, gpu, asked, networks=own, plans=tmp_path / "plans")
    ]
    built = build_plans(orders, estimates_of(library, orders))
    assert {each.record.key.network for each in built} == set(changed)
    for each in built:
        made, estimated = each.record.made, each.record.made["estimate"]
        assert each.path.stat().st_size == each.record.bytes
        assert made["weights"] == pytest.approx(estimated["weights"], rel=0.02, abs=1e6)
        scratch = 2**23  # which small ones may have once more
        assert made["activations"] == pytest.approx(estimated["activations"], rel=0.6, abs=scratch)


@pytest.mark.parametrize("compute_capability", CAPABILITIES)
def test_several_profiles_become_one_plan(
    bundles: Callable[[str], Bundle], tmp_path: Path, compute_capability: str
) -> None:
    bundle, (library, gpu) = bundles("emoji"), open_target("tensorrt-rtx", "cuda", compute_capability)
    shapes = shapes_of(bundle.spec, {}, ["lanes=2,size=128x128", "lanes=4,size=64x64"])
    orders = orders_of(bundle, library, gpu, shapes, networks=["vae_decoder"], plans=tmp_path / "plans")
    (built,) = build_plans(orders, estimates_of(library, orders))
    assert [str(profile) for profile in built.record.key.profiles] == [
        f"batch 1, height {side}, width {side}" for side in (16, 8)
    ]
    assert built.record.profile({"batch": 1, "height": 8, "width": 8}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", BUNDLES)
@pytest.mark.parametrize("compute_capability", CAPABILITIES)
@pytest.mark.parametrize("shapes", SHAPES)
def test_every_graph_becomes_a_plan_for_every_gpu(
    build: Build, name: str, compute_capability: str, shapes: str
) -> None:
    check(build(name, compute_capability, SHAPES[shapes]), compute_capability)


def check(built: list[Built], compute_capability: str) -> None:
    """Check that each plan is keyed for any GPU of its kind, and took about the estimate."""
    assert [each.record.key.network for each in built] == list(NETWORKS)
    for each in built:
        key, made = each.record.key, each.record.made
        estimated = made["estimate"]
        assert (key.gpu, key.driver, key.compute_capability) == ("", "", compute_capability)
        assert key.precision == "fp16"
        assert each.path.stat().st_size == each.record.bytes
        assert made["weights"] == pytest.approx(estimated["weights"], rel=0.02, abs=1e6)  # and padding
        assert 0.4 < made["activations"] / estimated["activations"] < 1.6
        assert 0.6 < each.record.bytes / estimated["plan"] < 1.6
        assert made["host"] < 1.2 * estimated["host"]


def test_what_is_built_is_found_and_not_built_again(build: Build, bundles: Callable[[str], Bundle]) -> None:
    first = build("emoji", "8.9", STATIC)
    assert [each.seconds for each in build("emoji", "8.9", STATIC)] == [0.0] * len(NETWORKS)
    store = PlanStore(bundles("emoji"), first[0].path.parent)
    (record,) = (each.record for each in first if each.record.key.network == "unet")
    fitting = store.fitting(record.key)
    assert store.choose(fitting, {"batch": 2, "height": 16, "width": 16}).sha256 == record.sha256
    with pytest.raises(PlanError, match="batch 2, height 16, width 16"):
        store.choose(fitting, {"batch": 16, "height": 16, "width": 16})


def test_weights_are_known_to_the_network_by_their_names(rtx: Library, tmp_path: Path) -> None:
    """The weights for refitting a stripped plan: RTX itself strips only where there is a GPU."""
    opset, add_ons = building.opset(rtx), bundles_of(EMBEDDED, ["grey=emoji-grey"], loras=True)
    wanted = [*networks_of(bundles_of(EMBEDDED), NETWORKS), *networks_of(add_ons, ("unet", "hint", "controlnet"))]
    for number, (bundle, name) in enumerate((bundle, name) for bundle, own in wanted for name in own):
        graph = bundle.spec.graph(name, "fp16")
        model = load_graph(bundle, graph, profiles_of(bundle.spec, name, FIXED), opset)
        weights = weights_of(model, graph)
        folder = tmp_path / str(number)
        folder.mkdir()
        data, path = serialized(model, bundle.path(graph.path), folder)
        logger = rtx.logger()
        builder = rtx.builder(logger)
        network = building.new_network(rtx, builder)
        parser = building.new_parser(rtx, network, logger)
        assert parser.parse(data, str(path))
        building.mark_refittable(network, weights)
        assert len(weights) >= 14
        with pytest.raises(PlanError, match="no weight nonsense"):
            building.mark_refittable(network, ["nonsense"])


@pytest.mark.parametrize("options", [[STRIPPED], [REFITTABLE]])
def test_weights_are_not_left_out_without_a_gpu(rtx: Library, options: list[str]) -> None:
    bundle = Bundle.open(EMBEDDED)
    _, gpu = open_target("tensorrt-rtx", "cuda", "8.9")
    with pytest.raises(BackendError, match="without a GPU"):
        orders_of(bundle, rtx, gpu, shapes_of(bundle.spec, {}), options=options)


def test_a_level_changes_nothing_in_rtx(rtx: Library, tmp_path: Path) -> None:
    """So `--optimization-level` is refused there: another plan of the same bytes would be built."""
    bundle = Bundle.open(EMBEDDED)
    graph, profiles = bundle.spec.graph("vae_decoder", "fp16"), profiles_of(bundle.spec, "vae_decoder", FIXED)
    model = load_graph(bundle, graph, profiles, building.opset(rtx))
    data, path = serialized(model, bundle.path(graph.path), tmp_path)

    def plan(level: int) -> bytes:
        logger = rtx.logger()
        builder = rtx.builder(logger)
        network = building.new_network(rtx, builder)
        parser = building.new_parser(rtx, network, logger)
        assert parser.parse(data, str(path))
        config = builder.create_builder_config()
        building.configure(rtx, config)
        building.aim(rtx, config, "8.9")
        config.builder_optimization_level = level
        ranges = builder.create_optimization_profile()
        for tensor in graph.inputs:
            ranges.set_shape(tensor.name, *profiles[0].shapes(tensor))
        config.add_optimization_profile(ranges)
        return bytes(builder.build_serialized_network(network, config))

    assert plan(0) == plan(5)


def test_an_interrupt_stops_the_real_builder(bundles: Callable[[str], Bundle], tmp_path: Path) -> None:
    bundle, (library, gpu) = bundles("emoji"), open_target("tensorrt-rtx", "cuda", "8.9")
    orders = orders_of(bundle, library, gpu, shapes_of(bundle.spec, {}), networks=["unet"], plans=tmp_path / "plans")

    def interrupt(network: str, phase: str, share: float, left: float | None) -> None:
        if phase != "starting":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_plans(orders, estimates_of(library, orders), progress=interrupt)
    assert not list((tmp_path / "plans").iterdir())


def test_too_little_memory_is_told_before_the_build(bundles: Callable[[str], Bundle], tmp_path: Path) -> None:
    bundle, (library, gpu) = bundles("emoji"), open_target("tensorrt-rtx", "cuda", "8.9")
    orders = orders_of(bundle, library, gpu, shapes_of(bundle.spec, {}), plans=tmp_path / "plans")
    with pytest.raises(DeviceMemoryError, match="the GPU has"):
        build_plans(orders, estimates_of(library, orders), free=10_000_000)


def odd_graph() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="fine"),
        helper.make_node("Unique", ["a"], ["u"], name="first"),
        helper.make_node("Foo", ["a"], ["y"], name="second", domain="bar"),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (("x", [2]), ("y", [2]))]
    graph = helper.make_graph(nodes, "odd", values[:1], [values[1], helper.make_tensor_value_info("u", 1, [None])])
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("bar", 1)], ir_version=9
    )


@pytest.mark.parametrize(
    ("controlnets", "loras", "networks"),
    [
        ((), False, NETWORKS),
        (("grey=emoji-grey",), False, ("unet", "hint", "controlnet")),
        (("grey=emoji-grey",), True, ("unet", "unet_text", "text_encoder")),
    ],
    ids=["plain", "control", "control, lora"],
)
def test_every_node_of_our_graphs_is_supported(
    rtx: Library, controlnets: tuple[str, ...], loras: bool, networks: tuple[str, ...]
) -> None:
    bundles = bundles_of(EMBEDDED, controlnets, loras=loras)
    shapes = shapes_of(bundles[0].spec, {})
    for bundle, own in networks_of(bundles, networks):
        for name in own:
            found = capability(bundle, rtx, name, "fp16", profiles_of(bundle.spec, name, shapes))
            assert found.refused == ()
            assert found.nodes == bundle.spec.graph(name, "fp16").nodes


def test_unsupported_nodes_are_named_as_polygraphy_names_them(rtx: Library, tmp_path: Path) -> None:
    model = odd_graph()
    path = tmp_path / "odd.onnx"
    onnx.save(model, path)
    found = refused(rtx, model.SerializeToString(), path)
    assert [(node.operator, node.node) for node in found] == [("Unique", "first"), ("Foo", "second")]
    assert "Plugin not found" in found[1].why
    answer = subprocess.run(
        [Path(sys.executable).with_name("polygraphy"), "inspect", "capability", str(path), "-o", str(tmp_path / "out")],
        env={**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(f"{node.operator} " in answer.stdout and node.node in answer.stdout for node in found)


BLOCK = "raise ImportError('no research stack here')\n"


def test_a_machine_without_torch_builds(tmp_path: Path) -> None:
    """As a Jetson does: neither the command nor the processes that build need the research stack."""
    for name in ("torch", "diffusers", "transformers", "onnxscript"):
        (tmp_path / f"{name}.py").write_text(BLOCK)
    command = [
        sys.executable,
        "-m",
        "latentrt.command.main",
        "build",
        "--library",
        "tensorrt-rtx",
        "--compute-capability",
        "8.9",
    ]
    command += ["--network", "text_encoder", "--plans", str(tmp_path / "plans"), "--json"]
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    answer = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path}
    )
    assert answer.returncode == 0, answer.stderr
    told = json.loads(answer.stdout)
    assert told["plans"][0]["key"]["network"] == "text_encoder"
    assert Path(told["plans"][0]["path"]).is_file()
