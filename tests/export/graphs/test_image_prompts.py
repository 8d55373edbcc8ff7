"""The UNet's graph that looks at pictures: as the plain one without any, to the bit, and each adapter apart."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from latentrt.bundle.bundle import EMBEDDED, Bundle
from latentrt.bundle.spec import IMAGE_VALUES, PROMPTED, GraphSpec
from latentrt.runtime.base import Network, call
from latentrt.runtime.onnxruntime import OrtBackend
from latentrt.runtime.signature import shape_of
from latentrt_export import variants
from latentrt_export.graphs import cpu_graph
from latentrt_export.verify.checks import relative_l2

SIZES = {"batch": 2, "height": 8, "width": 12, "tokens": 77, "adapters": 2, "image_tokens": 4}
Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Return the embedded model with graphs that look at pictures, beside a CPU graph for which it is too small."""
    root = tmp_path_factory.mktemp("looking")
    (root / "unet").mkdir()
    for path in (EMBEDDED / "unet").iterdir():
        (root / "unet" / path.name).hardlink_to(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_graph, "FEWEST_TOKENS", 1)
        spec = variants.add_cpu(root, Bundle.open(check_hashes=False).spec)
    return Bundle(root, variants.add_image_prompts(root, variants.add_control(root, spec)), {})


def test_every_graph_for_a_cpu_has_one(written: Bundle) -> None:
    unet = written.spec.networks["unet"]
    names = [name for name in unet.variants if name.endswith(PROMPTED)]
    kinds = ("fp32", "fp32-ort-cpu")
    assert set(names) == {f"{kind}{more}{PROMPTED}" for kind in kinds for more in ("", "+control", "+adapter")}
    places = [tensor.name for tensor in unet.variants[f"fp32{PROMPTED}"].inputs]
    sides = [name.partition(".")[2].partition("_")[0] for name in places]
    assert sides == sorted(sides, key=["down", "up", "mid"].index)  # as files of IP-Adapters count
    assert len(places) == len(written.spec.networks["unet_text"].outputs)
    assert variants.add_image_prompts(written.root, written.spec) == written.spec  # nothing twice


def feeds_of(graph: GraphSpec) -> Arrays:
    draw = np.random.default_rng(0)
    return {each.name: draw.standard_normal(shape_of(each, SIZES), np.float32) for each in graph.inputs}


@pytest.mark.parametrize("kind", ["fp32", "fp32-ort-cpu", "fp32+control", "fp32-ort-cpu+control"])
def test_pictures_without_values_change_no_bit(written: Bundle, kind: str) -> None:
    unet = written.spec.networks["unet"]
    feeds = feeds_of(unet.graph(f"{kind}{PROMPTED}"))
    run = {name: opened(written, name) for name in (kind, f"{kind}{PROMPTED}")}
    without = {name: array * (not name.startswith(IMAGE_VALUES)) for name, array in feeds.items()}
    own = {each.name: feeds[each.name] for each in unet.graph(kind).inputs}
    plain = call(run[kind], own)["out"]
    np.testing.assert_array_equal(call(run[f"{kind}{PROMPTED}"], without)["out"], plain)
    looking = call(run[f"{kind}{PROMPTED}"], feeds)["out"]
    assert relative_l2(looking, plain) > 0.05
    # The order of adapters, and a repetition of all of an adapter's tokens, are nothing.
    image = {name for name in feeds if name.startswith("image_")}
    turned = {name: np.tile(array[:, ::-1], (1, 1, 3, 1)) if name in image else array for name, array in feeds.items()}
    assert relative_l2(call(run[f"{kind}{PROMPTED}"], turned)["out"], looking) < 1e-5


def opened(bundle: Bundle, variant: str) -> Network:
    """Return the UNet of one variant."""
    unet = bundle.spec.networks["unet"]
    own = {"fp32": replace(unet.variants[variant], inputs=())}
    network = replace(unet, inputs=unet.graph(variant).inputs, variants=own)
    spec = replace(bundle.spec, networks={**bundle.spec.networks, "unet": network})
    return OrtBackend(threads=1, cache=False).load(replace(bundle, spec=spec), "unet")
