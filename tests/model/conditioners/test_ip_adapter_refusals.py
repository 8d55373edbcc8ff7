"""IP-Adapters that cannot be used: of other kinds, for other models, backends or precisions, or with other tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from latentrt import Engine
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.spec import INT8_ORT_CPU, TensorSpec
from latentrt.errors import BackendError, BundleError, ExportError, RequestError
from latentrt.runtime.onnxruntime import OrtBackend
from latentrt.runtime.variants import VARIANTS
from latentrt_export.plans.wanted import bundles_of
from latentrt_export.verify.add_ons import verify_add_on
from latentrt_export.verify.verify import verify
from tests.support.gpu.host_gpu import host_gpu

Exported = Callable[[str], tuple[Path, Path]]


def test_what_cannot_be_loaded(exported: Exported) -> None:
    bundle, add_on, control = (exported(name)[1] for name in ("sd", "ip-sd-base", "control-sd-1"))
    with pytest.raises(RequestError, match="loaded as the ip_adapter 'it', is none"):
        Engine.load(bundle, ip_adapter={"it": control})
    with pytest.raises(RequestError, match="loaded as the control 'it', is none"):
        Engine.load(bundle, control={"it": add_on})
    with pytest.raises(RequestError, match=r"is for 4 cross attentions of 32 channels, .*Needed: .*as sdxl has"):
        Engine.load(exported("sdxl")[1], ip_adapter={"it": add_on})
    with pytest.raises(BundleError, match=r"it is an IP-Adapter.*beside one: --ip-adapter-model"):
        Engine.load(add_on)
    with pytest.raises(ExportError, match=r"is an IP-Adapter.*an add-on of another kind"):
        next(verify(add_on, add_on))
    with pytest.raises(ExportError, match="is of the kind ip_adapter"):
        next(verify_add_on(str(add_on), bundle))
    with pytest.raises(BundleError, match=r"is an IP-Adapter.*run on a CPU"):
        bundles_of(add_on)
    with pytest.raises(BundleError, match=r"looks at no pictures.*latentrt export"):
        Engine.load("pixels", ip_adapter={"it": add_on})
    with (
        host_gpu() as gpu,
        pytest.raises(BackendError, match=r"IP-Adapters \(it\) with onnxruntime on .*Needed: a CPU"),
    ):
        Engine.load(bundle, backend=OrtBackend(threads=1, gpu=gpu), ip_adapter={"it": add_on})


def test_graphs_in_other_precisions_are_not_sought(exported: Exported) -> None:
    """A model that has fp16 looks at pictures in fp32 alone; one with int8 reads ControlNets in the others alone."""
    bundle, add_on, control = (exported(name)[1] for name in ("sd", "ip-sd-base", "control-sd-1"))
    with pytest.raises(BackendError, match=r"sd in fp16, with add-ons.*graphs in fp32.*--precision fp32"):
        Engine.load(bundle, precision="fp16", resident=False, ip_adapter={"it": add_on})
    spec = Bundle.open(bundle, check_hashes=False).spec
    unet = spec.networks["unet"]
    unet = replace(unet, variants={**unet.variants, INT8_ORT_CPU: unet.variants["fp32"]})
    with_int8 = Bundle(bundle, replace(spec, networks={**spec.networks, "unet": unet}), {})
    backend = OrtBackend(threads=1)
    backend.precision, backend.variants = "int8", VARIANTS["cpu", "int8"]
    with pytest.raises(BackendError, match=r"sd in int8, with add-ons.*graphs in fp32.*--precision fp32"):
        Engine(with_int8, backend, resident=False, controls={"edges": Bundle.open(control)})


def test_texts_of_another_width(exported: Exported) -> None:
    """As those of Stable Diffusion 1 and 2, whose attentions are alike."""
    bundle, add_on = (Bundle.open(exported(name)[1], check_hashes=False) for name in ("sd", "ip-sd-base"))
    own = bundle.spec.networks["unet_text"]
    inputs = tuple(replace(one, shape=(*one.shape[:2], 1024)) for one in own.inputs)
    networks = {**bundle.spec.networks, "unet_text": replace(own, inputs=inputs)}
    other = replace(bundle, spec=replace(bundle.spec, networks=networks))
    with pytest.raises(RequestError, match=r"channels, with texts of \d+\. Needed: .* with texts of 1024, as sd has"):
        Engine(other, OrtBackend(threads=1), resident=False, ip_adapters={"it": add_on})


@pytest.mark.parametrize(
    ("tensor", "change"),
    [
        ("pixel_values", {"shape": ("batch", 3, "height", "width")}),
        ("image_embeds", {"name": "other"}),
        ("keys.0", {"name": "other"}),
        ("keys.0", {"shape": ("batch", "tokens", 32)}),
        ("values.3", {"shape": ("batch", 5, 32)}),
        ("values.3", {"shape": ()}),
    ],
)
def test_add_ons_with_other_tensors(exported: Exported, tensor: str, change: dict[str, Any]) -> None:
    """What a manifest says is not believed: each is refused before a network is loaded."""
    bundle, add_on = (Bundle.open(exported(name)[1], check_hashes=False) for name in ("sd", "ip-sd-base"))

    def changed(tensors: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        return tuple(replace(one, **change) if one.name == tensor else one for one in tensors)

    networks = {
        name: replace(one, inputs=changed(one.inputs), outputs=changed(one.outputs))
        for name, one in add_on.spec.networks.items()
    }
    other = replace(add_on, spec=replace(add_on.spec, networks=networks))
    with pytest.raises(BundleError, match="other networks than an IP-Adapter"):
        Engine(bundle, OrtBackend(threads=1), ip_adapters={"it": other})


@pytest.mark.parametrize("change", [{"name": "image_keys.elsewhere"}, {"shape": ("batch", "adapters", 4, 32)}])
def test_denoisers_with_other_inputs(exported: Exported, change: dict[str, Any]) -> None:
    bundle, add_on = (Bundle.open(exported(name)[1], check_hashes=False) for name in ("sd", "ip-sd-base"))
    unet = bundle.spec.networks["unet"]
    first, *rest = unet.variants["fp32+ip_adapter"].inputs
    known = replace(unet.variants["fp32+ip_adapter"], inputs=(replace(first, **change), *rest))
    network = replace(unet, variants={**unet.variants, "fp32+ip_adapter": known})
    other = replace(bundle, spec=replace(bundle.spec, networks={**bundle.spec.networks, "unet": network}))
    with pytest.raises(BundleError, match=r"has the input image_keys.*Needed: a place"):
        Engine(other, OrtBackend(threads=1), ip_adapters={"it": add_on})
