"""ControlNets against diffusers' pipelines, in one batch with jobs that have others or none, and what is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image

from latentrt import Control, Engine
from latentrt.adapters.given import loras_of
from latentrt.bundle.bundle import EMBEDDED
from latentrt.errors import BundleError, RequestError
from latentrt.images.hints import masked
from latentrt.model.control import ControlNet
from latentrt.model.predictor import Predictor
from latentrt.run.job import Job
from latentrt.runtime.onnxruntime import OrtBackend
from latentrt_export.checkpoint.source import open_checkpoint
from latentrt_export.graphs.to_onnx import quiet
from latentrt_export.merge_bundle import merge_bundle
from latentrt_export.verify.checks import difference, psnr
from latentrt_export.verify.images import run_engine
from latentrt_export.verify.reference import Run, Theirs, plain_folder, run_pipeline
from tests.support.gpu.host_gpu import host_gpu
from tests.support.models.controlnets import POOLS, SMALL
from tests.support.models.loras import write_lora

Exported = Callable[[str], tuple[Path, Path]]
PROMPTS = ["a cat", "a dog"]
LATENTS_BOUND, PSNR_BOUND = 1e-5, 60.0
y, x = np.mgrid[:16, :24] / 24
PICTURE = (np.stack([x, y, x * y], axis=-1) * 255).astype(np.uint8)
MASK = (np.hypot(x - 0.4, y - 0.3) < 0.2).astype(np.uint8) * 255
EDGES = np.repeat(((np.hypot(x - 0.5, y - 0.3) * 20 % 2) < 1)[..., None], 3, axis=-1).astype(np.uint8) * 255
GREY = (np.stack([y, x * y, 1 - x], axis=-1) * 255).astype(np.uint8)
MASKED = masked(Image.fromarray(PICTURE), Image.fromarray(MASK))
HINTS = {"edges": EDGES, "grey": GREY}
SETTINGS: Mapping[str, Any] = {"seed": 7, "steps": 5, "width": 24, "height": 16, "negative_prompt": "a"}
TEXT, EDIT, INPAINT = "", "Img2Img", "Inpaint"  # of the pipelines' names


class Case(NamedTuple):
    """A run of both sides: the pipeline, the settings of each ControlNet by name, and of the request."""

    kind: str
    controls: Mapping[str, Mapping[str, Any]]
    settings: Mapping[str, Any]


SCALED = {"edges": {"scale": 0.7}}
PARTS = {"edges": {"scale": 1.5, "end": 0.6}, "grey": {"scale": 0.5, "start": 0.3}}
GUESSED = {"edges": {"guess": True}, "grey": {"guess": True, "scale": 0.8}}
CASES = {
    "text": Case(TEXT, SCALED, {"solver": None, "guidance": 3.0}),
    "parts": Case(TEXT, PARTS, {"solver": "heun", "guidance": 3.0}),
    "odd size": Case(TEXT, SCALED, {"solver": "euler", "guidance": 1.0, "width": 26, "height": 18}),
    "masked": Case(TEXT, {"edges": {"image": MASKED}}, {"solver": "ddim", "guidance": 3.0}),
    "guess": Case(TEXT, GUESSED, {"solver": "dpmpp-2m", "guidance": 3.0}),
    "guess, one lane": Case(TEXT, GUESSED, {"solver": "ddim", "guidance": 1.0}),
    "image": Case(EDIT, PARTS, {"solver": "dpmpp-2m", "guidance": 3.0, "strength": 0.6}),
    "mask": Case(INPAINT, PARTS, {"solver": "ddim", "guidance": 3.0, "strength": 0.8}),
}
XL_CASES = {name: CASES[name] for name in ("text", "guess", "image", "mask")}


class Both(NamedTuple):
    """An engine with two ControlNets, and the same in diffusers."""

    engine: Engine
    theirs: Theirs
    nets: Mapping[str, ControlNetModel]

    def run(self, case: Case) -> tuple[list[Any], Any]:
        """Return our latents after every row, and the pixels."""
        controls = {name: {"image": HINTS[name], **own} for name, own in case.controls.items()}
        return run_engine(self.engine, Run(PROMPTS, {**SETTINGS, **case.settings, "control": controls}, _given(case)))

    def run_theirs(self, case: Case) -> tuple[list[Any], Any]:
        """Return theirs."""
        nets = [self.nets[name] for name in case.controls]
        xl = "XL" if hasattr(self.theirs.pipeline(), "text_encoder_2") else ""
        kind = f"StableDiffusion{xl}ControlNet{case.kind}Pipeline"
        with quiet():
            net = nets if len(nets) > 1 else nets[0]
            pipe = self.theirs.pipeline(case.settings["solver"], kind, controlnet=net)
        return run_pipeline(pipe, Run(PROMPTS, {**SETTINGS, **case.settings}, _given(case)), _told(case))


def _given(case: Case) -> dict[str, Any]:
    return {TEXT: {}, EDIT: {"image": PICTURE}, INPAINT: {"image": PICTURE, "mask": MASK}}[case.kind]


def _told(case: Case) -> dict[str, Any]:
    """Return the arguments of the ControlNets."""
    own = list(case.controls.values())
    told = {
        "controlnet_conditioning_scale": [one.get("scale", 1.0) for one in own],
        "control_guidance_start": [one.get("start", 0.0) for one in own],
        "control_guidance_end": [one.get("end", 1.0) for one in own],
        "image" if case.kind == TEXT else "control_image": [
            _map(one.get("image", HINTS[name])) for name, one in case.controls.items()
        ],
    }
    told = {name: value if len(own) > 1 else value[0] for name, value in told.items()}
    return {**told, "guess_mode": own[0].get("guess", False)}


def _map(image: np.ndarray[Any, Any]) -> Any:
    """Return a map as diffusers' users give it: a picture, or a tensor where it has numbers below 0."""
    return torch.from_numpy(image.transpose(2, 0, 1)[None]) if image.dtype == np.float32 else Image.fromarray(image)


@pytest.fixture(scope="module")
def both(exported: Exported) -> Iterator[Callable[[str], Both]]:
    """Return a function that opens both sides of a checkpoint, once."""
    opened: dict[str, tuple[Both, Any]] = {}

    def make(name: str) -> Both:
        if name not in opened:
            source, bundle = exported(name)
            pairs = {hint: exported(f"control-{name}-{number}") for number, hint in enumerate(HINTS, start=1)}
            plain = plain_folder(open_checkpoint(source))
            add_ons = {hint: pair[1] for hint, pair in pairs.items()}
            engine = Engine.load(bundle, threads=1, check_hashes=False, control=add_ons)
            with quiet():
                nets = {hint: ControlNetModel.from_pretrained(pair[0]) for hint, pair in pairs.items()}
            opened[name] = Both(engine, Theirs(plain.__enter__(), engine), nets), plain
        return opened[name][0]

    yield make
    for one, plain in opened.values():
        one.engine.close()
        plain.__exit__(None, None, None)


@pytest.mark.parametrize(
    ("name", "case"),
    [
        *(pytest.param("sd", case, id=f"sd {name}") for name, case in CASES.items()),
        *(pytest.param("sdxl", case, id=f"sdxl {name}", marks=pytest.mark.slow) for name, case in XL_CASES.items()),
        pytest.param("sd2", CASES["parts"], id="sd2 parts", marks=pytest.mark.slow),
    ],
)
def test_pictures_are_those_of_the_pipelines(both: Callable[[str], Both], name: str, case: Case) -> None:
    sides = both(name)
    ours, pictures = sides.run(case)
    theirs, expected = sides.run_theirs(case)
    if case.kind != INPAINT:  # there the pipeline puts back what is kept after the scheduler's step
        assert max(difference(a, b) for a, b in zip(ours, theirs, strict=True)) < LATENTS_BOUND
    assert psnr(pictures, expected) > PSNR_BOUND
    without, _ = sides.run(case._replace(controls={}))
    assert difference(without[-1], ours[-1]) > 1e-2  # they do something


@pytest.mark.parametrize(
    ("number", "guess"),
    [pytest.param(POOLS, True, id="pools"), pytest.param(SMALL, False, id="small", marks=pytest.mark.slow)],
)
def test_other_kinds(exported: Exported, number: int, guess: bool) -> None:
    """One that reads BGR, pools, and acts on the prompt's lane alone in any case; and one that reads no text."""
    source, bundle = exported("sd")
    net, add_on = exported(f"control-sd-{number}")
    case = Case(TEXT, {"edges": {"scale": 2.0, "guess": guess}}, {"solver": "ddim", "guidance": 3.0})
    with (
        plain_folder(open_checkpoint(source)) as folder,
        Engine.load(bundle, threads=1, check_hashes=False, control={"edges": add_on}) as engine,
    ):
        sides = Both(engine, Theirs(folder, engine), {"edges": ControlNetModel.from_pretrained(net)})
        ours, _ = sides.run(case)
        plain, _ = sides.run(case._replace(controls={"edges": {"scale": 2.0}}))
        theirs, _ = sides.run_theirs(case)
    assert max(difference(a, b) for a, b in zip(ours, theirs, strict=True)) < LATENTS_BOUND
    np.testing.assert_array_equal(ours[-1], plain[-1])


def jobs_of(engine: Engine) -> list[Job]:
    """Return jobs with ControlNets and without, some of them in a part of the run."""
    asked: Sequence[dict[str, Any]] = (
        {},
        {"control": {"edges": Image.fromarray(EDGES)}},
        {"control": {"grey": {"image": GREY, "start": 0.5}, "edges": Control(EDGES, scale=0.5, end=0.5)}},
        {"control": {"edges": Control(GREY, guess=True)}, "solver": "heun"},
        {"control": {"grey": GREY}, "guidance": 1.0},
    )
    return [
        engine.requests(["a cat"], {**SETTINGS, "steps": 4, "solver": "ddim", "seed": seed, "guidance": 3.0, **one})[0]
        for seed, one in enumerate(asked)
    ]


def test_a_picture_does_not_depend_on_its_company(
    both: Callable[[str], Both], exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All jobs share the UNet's calls, and a ControlNet is called for lanes on which it acts alone."""
    engine = both("sd").engine
    alone = jobs_of(engine)
    for job in alone:
        engine.run([job])
    calls: list[tuple[str, int]] = []
    for kind in (Predictor, ControlNet):

        def counting(self: Any, sample: Any, *rest: Any, call: Any = kind.__call__) -> Any:
            calls.append((getattr(self, "name", "unet"), len(sample)))
            return call(self, sample, *rest)

        monkeypatch.setattr(kind, "__call__", counting)
    together = jobs_of(engine)
    engine.run(together)
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_array_equal(a.latents, b.latents)
    first, last = [("edges", 5), ("grey", 1), ("unet", 9)], [("edges", 3), ("grey", 3), ("unet", 9)]
    assert calls[:12] == [*first, *first, *last, *last]
    assert set(calls[12:]) == {("edges", 1), ("unet", 2)}
    with Engine.load(exported("sd")[1], threads=1, check_hashes=False) as bare:
        (plain,) = bare.requests(["a cat"], {**SETTINGS, "steps": 4, "solver": "ddim", "seed": 0, "guidance": 3.0})
        bare.run([plain])
    np.testing.assert_array_equal(plain.latents, alone[0].latents)


def test_a_hint_is_embedded_once(both: Callable[[str], Both]) -> None:
    engine = both("sd").engine
    jobs = engine.requests(PROMPTS, {"count": 2, "steps": 1, "control": {"edges": EDGES}})
    hints = {id(side["hint"]) for job in jobs for one in job.controls for side in one.sides if side is not None}
    assert len(hints) == 1
    assert {job.latents.shape for job in jobs} == {(4, 8, 12)}  # of the hint's size


def test_hires_is_controlled_in_both_runs(both: Callable[[str], Both]) -> None:
    engine = both("sd").engine
    settings = {**SETTINGS, "steps": 2, "hires_scale": 1.5}
    with_it, without = (np.asarray(engine("a cat", **settings, **one)[0]) for one in ({"control": HINTS}, {}))
    assert with_it.shape == (24, 36, 3)
    assert psnr(with_it, without) < 40


def test_in_half_precision_it_is_nearly_the_same(both: Callable[[str], Both], exported: Exported) -> None:
    """And where networks are dropped after their use."""
    here, add_ons = both("sd").engine, {"edges": exported("control-sd-1")[1]}
    asked: dict[str, Any] = {**SETTINGS, "control": {"edges": EDGES}}
    options: dict[str, Any] = {"precision": "fp16", "resident": False, "control": add_ons}
    with Engine.load(exported("sd")[1], threads=1, check_hashes=False, **options) as there:
        ours, theirs = (np.asarray(one("a cat", **asked)[0]) for one in (there, here))
        again = np.asarray(there("a cat", **asked)[0])
    assert psnr(ours, theirs) > 40
    np.testing.assert_array_equal(ours, again)


@pytest.fixture(scope="module")
def on_gpu(exported: Exported) -> Iterator[Engine]:
    """Return an engine with both ControlNets on the emulated GPU."""
    bundle = exported("sd")[1]
    add_ons = {hint: exported(f"control-sd-{number}")[1] for number, hint in enumerate(HINTS, start=1)}
    with (
        host_gpu() as gpu,
        Engine.load(bundle, backend=OrtBackend(threads=1, gpu=gpu), control=add_ons, lanes=2) as engine,
    ):
        yield engine


@pytest.mark.parametrize("name", [*CASES, "none"])
def test_on_a_gpu(both: Callable[[str], Both], on_gpu: Engine, name: str) -> None:
    """On the emulated one: what the host computes, with residuals passed in device memory."""
    case = CASES.get(name, CASES["text"]._replace(controls={}))
    expected, pictures = both("sd").run(case)
    ours, found = both("sd")._replace(engine=on_gpu).run(case)
    assert difference(ours[-1], expected[-1]) < LATENTS_BOUND
    assert psnr(found, pictures) > PSNR_BOUND


def test_on_a_gpu_with_hires(both: Callable[[str], Both], on_gpu: Engine) -> None:
    asked: dict[str, Any] = {**SETTINGS, "steps": 2, "hires_scale": 1.5, "control": HINTS}
    ours, expected = (np.asarray(engine("a cat", **asked)[0]) for engine in (on_gpu, both("sd").engine))
    assert psnr(ours, expected) > PSNR_BOUND


def test_merged_loras_change_the_unet_that_reads_residuals(exported: Exported, tmp_path: Path, on_gpu: Engine) -> None:
    source, bundle = exported("sd")
    add_on = exported("control-sd-1")[1]
    lora = write_lora(tmp_path / "lora.safetensors", source, "kohya")
    merge_bundle(bundle, tmp_path / "merged", loras_of(f"{lora}:0.6"))
    pictures, asked = [], {"control": {"edges": EDGES}, **SETTINGS}
    for base, loras in ((bundle, ()), (bundle, f"{lora}:0.6"), (tmp_path / "merged", ())):
        with Engine.load(base, threads=1, lora=loras, control={"edges": add_on}) as engine:
            pictures.append(np.asarray(engine("a cat", **asked)[0]))
            engine.set_lora(f"{lora}:0.6" if base == bundle and not loras else ())  # changed, or back
            pictures.append(np.asarray(engine("a cat", **asked)[0]))
    plain, changed, in_memory, back, merged, _ = pictures
    np.testing.assert_array_equal(in_memory, merged)
    np.testing.assert_array_equal(changed, merged)
    np.testing.assert_array_equal(back, plain)
    assert psnr(plain, merged) < 40
    before = np.asarray(on_gpu("a cat", **asked)[0])
    on_gpu.set_lora(f"{lora}:0.6")
    assert psnr(np.asarray(on_gpu("a cat", **asked)[0]), merged) > PSNR_BOUND
    on_gpu.set_lora()
    np.testing.assert_array_equal(np.asarray(on_gpu("a cat", **asked)[0]), before)


def test_a_picture_tells_its_controls(both: Callable[[str], Both]) -> None:
    (picture,) = both("sd").engine("a cat", steps=1, control={"edges": {"image": EDGES, "scale": 0.5}})
    told = picture.info["latentrt"]["control"]["edges"]
    assert told.pop("image").startswith("sha256:")
    assert told == {"scale": 0.5, "start": 0.0, "end": 1.0, "guess": False}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"control": {"pose": EDGES}}, "there is a control 'pose', and sd is loaded with edges, grey"),
        ({"control": {"edges": EDGES}, "cache_interval": 2}, "cache_interval is 2 and there is a control"),
        ({"control": {"edges": {"scale": 2.0}}}, "a control has 'scale'"),
        ({"control": {"edges": {"image": EDGES, "weight": 2.0}}}, "a control has 'image', 'weight'"),
        ({"control": {"edges": {"image": EDGES, "start": 0.5, "end": 0.2}}}, "a control's end is 0.2"),
        ({"control": {"edges": {"image": EDGES, "guess": 1}}}, "a control's guess is 1"),
        ({"control": {"edges": "edges.png"}}, "the control picture is str"),
        ({"control": EDGES}, "control is a ndarray"),
    ],
)
def test_what_a_request_cannot_ask(both: Callable[[str], Both], asked: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        both("sd").engine("a cat", steps=2, **asked)


def test_what_cannot_be_loaded(exported: Exported) -> None:
    add_on = exported("sd") and exported("control-sd-1")[1]
    load = functools.partial(Engine.load, threads=1, check_hashes=False)
    with pytest.raises(RequestError, match=r"ControlNet control-sd-1 has the input encoder_hidden_states .*sdxl has"):
        load(exported("sdxl")[1], control={"edges": add_on})
    with pytest.raises(RequestError, match="sd, loaded as the control 'edges', is none"):
        load(exported("sd")[1], control={"edges": exported("sd")[1]})
    with pytest.raises(BundleError, match="reads no residuals"):
        load(EMBEDDED.with_name("pixels"), control={"edges": add_on})
    with pytest.raises(BundleError, match="has no denoiser: it is a ControlNet"):
        load(add_on)
