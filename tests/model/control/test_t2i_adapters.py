"""T2I-Adapters against diffusers' pipelines, in one batch with ControlNets, on a GPU, and what is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import MultiAdapter, T2IAdapter
from PIL import Image

from latentrt import Control, Engine
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.spec import NetworkSpec
from latentrt.errors import BundleError, RequestError
from latentrt.run.job import Job
from latentrt.runtime.onnxruntime import OrtBackend
from latentrt_export.checkpoint.source import open_checkpoint
from latentrt_export.graphs.to_onnx import quiet
from latentrt_export.merge_bundle import merge_bundle
from latentrt_export.verify.checks import difference, psnr
from latentrt_export.verify.images import run_engine
from latentrt_export.verify.reference import Run, Theirs, plain_folder, run_pipeline
from tests.support.gpu.host_gpu import host_gpu
from tests.support.models.loras import PRODUCTS, write_lora

Exported = Callable[[str], tuple[Path, Path]]
Given = Mapping[str, Mapping[str, Any]]
PROMPTS = ["a cat", "a dog"]
LATENTS_BOUND, PSNR_BOUND = 1e-5, 60.0
y, x = np.mgrid[:20, :28] / 28
HINTS = {  # of another size than the run
    "colour": Image.fromarray((np.stack([x, y, x * y], axis=-1) * 255).astype(np.uint8)),
    "grey": Image.fromarray(((np.hypot(x - 0.5, y - 0.3) * 20 % 2) < 1).astype(np.uint8) * np.uint8(255)),
}
HINTS |= {"full": HINTS["colour"], "light": HINTS["colour"], "edges": HINTS["grey"]}
PICTURE = np.asarray(HINTS["colour"])[::-1]
MASK = (np.hypot(x - 0.4, y - 0.3) < 0.2).astype(np.uint8) * 255
SETTINGS: Mapping[str, Any] = {"seed": 7, "steps": 5, "width": 24, "height": 16, "negative_prompt": "a"}
TWO: Given = {"colour": {"scale": 0.7}, "grey": {"scale": 1.3}}
CASES: Mapping[str, tuple[str, Given, Mapping[str, Any]]] = {
    "sd, one": ("sd", {"colour": {"scale": 0.8}}, {"solver": None, "guidance": 3.0}),
    "sd, two": ("sd", TWO, {"solver": "heun", "guidance": 1.0}),
    "sdxl, part": ("sdxl", {"grey": {"end": 0.6}}, {"solver": "euler", "guidance": 3.0}),
}
LEVELS = ("levels", {"full": {"scale": 0.7}, "light": {"scale": 1.3}}, {"solver": "ddim", "guidance": 3.0})


@pytest.fixture(scope="module")
def opened(exported: Exported) -> Iterator[Callable[[str], Engine]]:
    """Return a function that loads a checkpoint with its adapters, once; "sd" with a ControlNet between them too."""
    engines: dict[str, Engine] = {}
    names = {"sd": ("colour", "edges", "grey"), "sdxl": ("colour", "grey"), "levels": ("full", "light")}

    def make(name: str) -> Engine:
        if name not in engines:
            bundle = exported(name)[1]
            add_ons = {one: add_on(exported, one) for one in names[name]}
            engines[name] = Engine.load(bundle, threads=1, check_hashes=False, control=add_ons)
        return engines[name]

    yield make
    for engine in engines.values():
        engine.close()


def add_on(exported: Exported, name: str) -> Path:
    return exported("control-sd-1" if name == "edges" else f"adapter-{name}")[1]


def asked(given: Given) -> dict[str, Any]:
    return {name: {"image": HINTS[name], **own} for name, own in given.items()}


def run_theirs(
    exported: Exported, engine: Engine, name: str, given: Given, settings: Mapping[str, Any], lora: Path | None = None
) -> Any:
    """Return the latents after every row and the pixels of diffusers' adapter pipeline, with 0.6 of a LoRA fused."""
    with plain_folder(open_checkpoint(exported(name)[0])) as folder, quiet():
        adapters = [T2IAdapter.from_pretrained(exported(f"adapter-{one}")[0]) for one in given]
        kind = f"StableDiffusion{'XL' if name == 'sdxl' else ''}AdapterPipeline"
        adapter = MultiAdapter(adapters) if len(adapters) > 1 else adapters[0]
        sides = Theirs(folder, engine)
        if lora is not None:  # the adapter pipeline loads none: its networks are those of the plain one
            plain = sides.pipeline(settings["solver"])
            plain.load_lora_weights(lora.parent, weight_name=lora.name)
            plain.fuse_lora(lora_scale=0.6)
        pipe = sides.pipeline(settings["solver"], kind, adapter=adapter)
    scales, pictures = [own.get("scale", 1.0) for own in given.values()], [[HINTS[one]] * len(PROMPTS) for one in given]
    told: dict[str, Any] = {"adapter_conditioning_scale": scales, "image": pictures}
    told = {key: value if len(given) > 1 else value[0] for key, value in told.items()}
    if name == "sdxl":
        told["adapter_conditioning_factor"] = next(iter(given.values())).get("end", 1.0)

    return run_pipeline(pipe, Run(PROMPTS, {**SETTINGS, **settings}, {}), told)


@pytest.mark.parametrize(
    "case",
    [
        *(pytest.param(CASES[name], id=name) for name in CASES),
        pytest.param(LEVELS, id="levels", marks=pytest.mark.slow),
    ],
)
def test_pictures_are_those_of_the_pipelines(
    opened: Callable[[str], Engine], exported: Exported, case: tuple[str, Given, Mapping[str, Any]]
) -> None:
    name, given, settings = case
    run = Run(PROMPTS, {**SETTINGS, **settings, "control": asked(given)}, {})
    ours, pictures = run_engine(opened(name), run)
    theirs, expected = run_theirs(exported, opened(name), name, given, settings)
    assert max(difference(a, b) for a, b in zip(ours, theirs, strict=True)) < LATENTS_BOUND
    assert psnr(pictures, expected) > PSNR_BOUND
    without, _ = run_engine(opened(name), run._replace(settings={**SETTINGS, **settings}))
    assert difference(without[-1], ours[-1]) > 1e-2  # they do something


@pytest.mark.parametrize("kind", ["Img2Img", "Inpaint"])
def test_on_a_given_picture(opened: Callable[[str], Engine], exported: Exported, kind: str) -> None:
    """diffusers has no such pipeline with adapters: its plain one, whose UNet is given the features all the same."""
    pictures = {"image": PICTURE} | ({"mask": MASK} if kind == "Inpaint" else {})
    settings = {**SETTINGS, "solver": "ddim", "guidance": 3.0, "strength": 0.6, "width": 28, "height": 20}
    engine = opened("sd")
    run = Run(PROMPTS, {**settings, "control": asked({"colour": {"scale": 0.8}})}, pictures)
    ours, drawn = run_engine(engine, run)
    with plain_folder(open_checkpoint(exported("sd")[0])) as folder, quiet():
        pipe = Theirs(folder, engine).pipeline("ddim", f"StableDiffusion{kind}Pipeline")
        features = features_of(T2IAdapter.from_pretrained(exported("adapter-colour")[0]), 0.8)
        theirs, expected = run_pipeline(with_features(pipe, features), run)
    if kind == "Img2Img":
        assert max(difference(a, b) for a, b in zip(ours, theirs, strict=True)) < LATENTS_BOUND
    assert psnr(drawn, expected) > PSNR_BOUND
    plain, _ = run_engine(engine, run._replace(settings=settings))
    assert difference(plain[-1], ours[-1]) > 1e-2


def features_of(adapter: T2IAdapter, scale: float) -> list[torch.Tensor]:
    """Return an adapter's features of HINTS["colour"]."""
    picture = torch.from_numpy(np.asarray(HINTS["colour"]).transpose(2, 0, 1)[None].astype(np.float32) / 255)
    with torch.no_grad():
        return [scale * one for one in adapter(picture)]


def with_features(pipe: Any, features: list[torch.Tensor]) -> Any:
    """Return a pipeline whose UNet adds an adapter's features on every lane."""
    forward = pipe.unet.forward

    def adding(sample: torch.Tensor, *given: Any, **named: Any) -> Any:
        own = [one.expand(len(sample), -1, -1, -1).clone() for one in features]
        return forward(sample, *given, **named, down_intrablock_additional_residuals=own)

    pipe.unet.forward = adding
    return pipe


def test_with_loras(exported: Exported, tmp_path: Path) -> None:
    """Merged as in diffusers, fused into the networks of its adapter pipeline; with a request as merged."""
    source, plain = exported("sd")
    lora = write_lora(tmp_path / "lora.safetensors", source, "kohya", PRODUCTS)
    bundle = tmp_path / "bundle"
    merge_bundle(plain, bundle, (), adapters=True)
    load = functools.partial(Engine.load, bundle, threads=1, check_hashes=False, cache=False)
    control = {"colour": add_on(exported, "colour")}
    settings: dict[str, Any] = {"solver": "ddim", "guidance": 3.0}
    run = Run(PROMPTS, {**SETTINGS, **settings, "control": asked({"colour": {}})}, {})
    with load(control=control, lora=f"{lora}:0.6") as engine:
        _, merged = run_engine(engine, run)
        _, expected = run_theirs(exported, engine, "sd", {"colour": {}}, settings, lora)
    assert psnr(merged, expected) > PSNR_BOUND
    with load(control=control, adapters={"style": lora}) as engine:
        _, named = run_engine(engine, run._replace(settings={**run.settings, "lora": {"style": 0.6}}))
        _, without = run_engine(engine, run)
    assert psnr(named, merged) > PSNR_BOUND
    assert psnr(without, merged) < 40


def jobs_of(engine: Engine) -> list[Job]:
    """Return jobs with adapters, a ControlNet, both and neither."""
    chosen: tuple[dict[str, Any], ...] = (
        {},
        asked({"colour": {}}),
        asked({"grey": {"start": 0.5}, "edges": {"end": 0.5}, "colour": {"scale": 0.5}}),
        asked({"edges": {}}),
        asked({"edges": {"guess": True}, "grey": {}}),
    )
    settings = {**SETTINGS, "steps": 4, "solver": "ddim", "guidance": 3.0}
    return [engine.requests(["a cat"], {**settings, "seed": 7, "control": control})[0] for control in chosen]


def test_a_picture_does_not_depend_on_its_company(opened: Callable[[str], Engine]) -> None:
    """Jobs with adapters, a ControlNet, both and neither share calls; all of them act, on a GPU alike."""
    engine = opened("sd")
    alone, together = jobs_of(engine), jobs_of(engine)
    for job in alone:
        engine.run([job])
    engine.run(together)
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_array_equal(a.latents, b.latents)
    for index, job in enumerate(alone):
        assert all(difference(job.latents, other.latents) > 1e-2 for other in alone[:index])


def test_on_a_gpu(opened: Callable[[str], Engine], exported: Exported) -> None:
    """On the emulated one: what the host computes."""
    engine = opened("sd")
    expected = jobs_of(engine)
    engine.run(expected)
    add_ons = {name: add_on(exported, name) for name in ("colour", "edges", "grey")}
    with (
        host_gpu() as gpu,
        Engine.load(exported("sd")[1], backend=OrtBackend(threads=1, gpu=gpu), control=add_ons, lanes=4) as there,
    ):
        ours = jobs_of(there)
        there.run(ours)
    for a, b in zip(ours, expected, strict=True):
        assert difference(a.latents, b.latents) < LATENTS_BOUND


def test_a_picture_has_a_size_that_the_adapter_reads(opened: Callable[[str], Engine]) -> None:
    engine = opened("sd")
    picture = HINTS["colour"].resize((26, 18))
    (job,) = engine.requests(["a cat"], {"steps": 1, "control": {"colour": picture}})
    assert job.latents.shape == (4, 8, 12)  # 24 x 16
    with pytest.raises(RequestError, match=r"is 26x18, and adapter-colour.*multiples of 4.*take 24 and 16"):
        engine("a cat", steps=1, width=26, height=18, control={"colour": picture})
    with pytest.raises(RequestError, match=r"is 38x26, and adapter-colour"):
        engine("a cat", steps=2, width=24, height=16, hires_scale=1.65, control={"colour": picture})


def test_what_a_request_cannot_ask(opened: Callable[[str], Engine]) -> None:
    floats = np.zeros((16, 24, 3), np.float32)
    for control, message in (
        ({"colour": Control(HINTS["colour"], guess=True)}, "guess is set for the T2I-Adapter 'colour'"),
        ({"grey": floats}, "is of floats, for a T2I-Adapter that reads grey"),
    ):
        with pytest.raises(RequestError, match=message):
            opened("sd")("a cat", steps=2, width=24, height=16, control=control)


def test_what_cannot_be_loaded(exported: Exported) -> None:
    """A base of an earlier version; an adapter alone; one whose features are for other blocks."""
    base, adapter = Bundle.open(exported("sd")[1]), Bundle.open(add_on(exported, "colour"))
    load = functools.partial(Engine, backend=OrtBackend(threads=1))
    unet = base.spec.networks["unet"]
    variants = {name: one for name, one in unet.variants.items() if not name.endswith("+adapter")}
    old = with_network(base, "unet", replace(unet, variants=variants))
    with pytest.raises(BundleError, match=r"sd reads no features of T2I-Adapters.*export the checkpoint again"):
        load(old, controls={"colour": adapter})
    load(old, controls={"edges": Bundle.open(add_on(exported, "edges"))}).close()
    with pytest.raises(BundleError, match="it is a T2I-Adapter"):
        load(adapter)
    body = adapter.spec.networks["t2i_adapter_scaled"]
    outputs = tuple(replace(one, shape=("batch", 8, *one.shape[2:])) for one in body.outputs)
    wrong = with_network(adapter, "t2i_adapter_scaled", replace(body, outputs=outputs))
    with pytest.raises(RequestError, match=r"the T2I-Adapter adapter-colour has residuals \(2 and 3\): adapter_0"):
        load(base, controls={"colour": wrong})


def with_network(bundle: Bundle, name: str, network: NetworkSpec) -> Bundle:
    return replace(bundle, spec=replace(bundle.spec, networks={**bundle.spec.networks, name: network}))
