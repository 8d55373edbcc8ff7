"""IP-Adapters against diffusers' pipelines, in one batch with jobs that have others or none, and what is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import numpy as np
import pytest
from diffusers import ControlNetModel
from PIL import Image

from latentrt import Engine, ImagePrompt
from latentrt.errors import RequestError
from latentrt.model.predictor import Predictor
from latentrt.run.job import Job
from latentrt_export.checkpoint.source import open_checkpoint
from latentrt_export.graphs.to_onnx import quiet
from latentrt_export.merge_bundle import merge_bundle
from latentrt_export.verify.checks import difference, psnr
from latentrt_export.verify.images import run_engine
from latentrt_export.verify.reference import Run, Theirs, plain_folder, run_pipeline
from tests.support.models.loras import write_lora

Exported = Callable[[str], tuple[Path, Path]]
Given = Mapping[str, Mapping[str, Any]]
PROMPTS = ["a cat", "a dog"]
LATENTS_BOUND, PSNR_BOUND = 1e-5, 60.0
y, x = np.mgrid[:40, :60] / 60
PICTURES = {
    "base": Image.fromarray((np.stack([x, y, x * y], axis=-1) * 255).astype(np.uint8)),
    "plus": Image.fromarray((np.stack([y, 1 - x, x], axis=-1) * 255).astype(np.uint8)).crop((0, 0, 25, 40)),
}
PICTURES["full"] = PICTURES["plus"]
KINDS = {"sd": ("base", "plus", "full"), "sdxl": ("plus",)}
PICTURE = np.asarray(PICTURES["base"].resize((24, 16)))
MASK = (np.hypot(*np.mgrid[-8:8, -12:12]) < 6).astype(np.uint8) * 255
SETTINGS: Mapping[str, Any] = {"seed": 7, "steps": 4, "width": 24, "height": 16, "negative_prompt": "a"}
TEXT, EDIT, INPAINT, CONTROL = "", "Img2Img", "Inpaint", "ControlNet"  # of the pipelines' names
BLOCKS = {"down": {"block_1": [0.6]}, "up": {"block_0": [0.0, 1.5]}, "mid": 0.3}
TWO: Given = {"base": {"scale": 0.5}, "plus": {"scale": {"up": 0.9}}}
XL_BLOCKS = {"up": {"block_0": [0.0, 1.0]}}


class Case(NamedTuple):
    """A run of both sides: the pipeline, the settings of each IP-Adapter by name, and of the request."""

    kind: str
    given: Given
    settings: Mapping[str, Any]


CASES = {
    "base": Case(TEXT, {"base": {"scale": 0.7}}, {"solver": "dpmpp-2m", "guidance": 3.0}),
    "base, one lane": Case(TEXT, {"base": {}}, {"solver": "heun", "guidance": 1.0, "width": 40}),
    "plus": Case(TEXT, {"plus": {"scale": 0.8}}, {"solver": "ddim", "guidance": 3.0}),
    "blocks": Case(TEXT, {"plus": {"scale": BLOCKS}}, {"solver": "ddim", "guidance": 3.0}),
    "full": Case(TEXT, {"full": {"scale": 0.6}}, {"solver": "ddim", "guidance": 3.0}),
    "both, image": Case(EDIT, TWO, {"solver": "ddim", "guidance": 3.0, "strength": 0.6}),
    "mask": Case(INPAINT, {"base": {}}, {"solver": "ddim", "guidance": 3.0, "strength": 0.8}),
    "control": Case(CONTROL, {"plus": {"scale": 0.6}}, {"solver": "ddim", "guidance": 3.0}),
}
XL_CASES = {
    "blocks": Case(TEXT, {"plus": {"scale": XL_BLOCKS}}, {"solver": "euler", "guidance": 3.0}),
    "image": Case(EDIT, {"plus": {"scale": 0.7}}, {"solver": "ddim", "guidance": 3.0, "strength": 0.6}),
}


class Both(NamedTuple):
    """An engine with two IP-Adapters, the same in diffusers, and where the files of the adapters lie."""

    engine: Engine
    theirs: Theirs
    files: Mapping[str, Path]
    control: Path

    def run(self, case: Case) -> tuple[list[Any], Any]:
        """Return our latents after every row, and the pixels."""
        own = {name: {"image": PICTURES[name], **own} for name, own in case.given.items()}
        control = {"control": {"edges": PICTURE}} if case.kind == CONTROL else {}
        return run_engine(
            self.engine, Run(PROMPTS, {**SETTINGS, **case.settings, "ip_adapter": own, **control}, _given(case))
        )

    def run_theirs(self, case: Case) -> tuple[list[Any], Any]:
        """Return theirs."""
        loaded = self.theirs.pipeline(case.settings["solver"])
        xl = "XL" if hasattr(loaded, "text_encoder_2") else ""
        kind = getattr(diffusers, f"StableDiffusion{xl}{case.kind}Pipeline")
        with quiet():
            net = {"controlnet": ControlNetModel.from_pretrained(self.control)} if case.kind == CONTROL else {}
            pipe = kind.from_pipe(loaded, **net)
            files = [self.files[name] for name in case.given]
            folders: list[Any] = [str(file.parent) for file in files]
            pipe.load_ip_adapter(folders, subfolder=[""] * len(files), weight_name=[file.name for file in files])
        pipe.set_ip_adapter_scale([own.get("scale", 1.0) for own in case.given.values()])
        pipe.scheduler = loaded.scheduler
        pipe.set_progress_bar_config(disable=True)
        told: dict[str, Any] = {"ip_adapter_image": [PICTURES[name] for name in case.given]}
        told |= {"image": Image.fromarray(PICTURE)} if case.kind == CONTROL else {}

        @functools.wraps(type(pipe).__call__)
        def call(self: Any, **given: Any) -> Any:
            return pipe(**given | told)

        one = type("Told", (), {"__call__": call, "scheduler": pipe.scheduler})()
        try:
            return run_pipeline(one, Run(PROMPTS, {**SETTINGS, **case.settings}, _given(case)))
        finally:
            pipe.unload_ip_adapter()


def _given(case: Case) -> dict[str, Any]:
    return {EDIT: {"image": PICTURE}, INPAINT: {"image": PICTURE, "mask": MASK}}.get(case.kind, {})


@pytest.fixture(scope="module")
def both(exported: Exported) -> Iterator[Callable[[str], Both]]:
    """Return a function that opens both sides of a checkpoint, once; "sd" with a ControlNet too."""
    opened: dict[str, tuple[Both, Any]] = {}

    def make(name: str) -> Both:
        if name not in opened:
            source, bundle = exported(name)
            pairs = {kind: exported(f"ip-{name}-{kind}") for kind in KINDS[name]}
            add_ons: dict[str, Any] = {"ip_adapter": {kind: pair[1] for kind, pair in pairs.items()}}
            net, control = exported("control-sd-1")
            add_ons |= {"control": {"edges": control}} if name == "sd" else {}
            engine = Engine.load(bundle, threads=1, check_hashes=False, **add_ons)
            plain = plain_folder(open_checkpoint(source))
            files = {kind: pair[0] for kind, pair in pairs.items()}
            opened[name] = Both(engine, Theirs(plain.__enter__(), engine), files, net), plain
        return opened[name][0]

    yield make
    for one, plain in opened.values():
        one.engine.close()
        plain.__exit__(None, None, None)


@pytest.mark.parametrize(
    ("name", "case"),
    [
        *(pytest.param("sd", case, id=f"sd {name}") for name, case in CASES.items()),
        *(pytest.param("sdxl", case, id=f"sdxl {name}") for name, case in XL_CASES.items()),
    ],
)
@pytest.mark.filterwarnings("ignore:.*requires torchvision")
def test_pictures_are_those_of_the_pipelines(both: Callable[[str], Both], name: str, case: Case) -> None:
    sides = both(name)
    ours, pictures = sides.run(case)
    theirs, expected = sides.run_theirs(case)
    # diffusers rounds the keys of several adapters to the dtype of the first one's file.
    bound = LATENTS_BOUND if len(case.given) == 1 else 1e-4
    if case.kind != INPAINT:  # there the pipeline puts back what is kept after the scheduler's step
        assert max(difference(a, b) for a, b in zip(ours, theirs, strict=True)) < bound
    assert psnr(pictures, expected) > PSNR_BOUND
    without, _ = sides.run(case._replace(given={}))
    assert difference(without[-1], ours[-1]) > 1e-2  # they do something


def jobs_of(engine: Engine) -> list[Job]:
    """Return jobs with IP-Adapters and without, some of them with a ControlNet."""
    asked: tuple[dict[str, Any], ...] = (
        {},
        {"ip_adapter": {"base": PICTURES["base"]}},
        {"ip_adapter": {"plus": ImagePrompt(PICTURE, scale=0.5), "base": {"image": PICTURE}}},
        {"ip_adapter": {"plus": PICTURES["plus"]}, "control": {"edges": PICTURE}, "guidance": 1.0},
    )
    common = {**SETTINGS, "steps": 2, "solver": "ddim", "guidance": 3.0}
    return [engine.requests(["a cat"], {**common, "seed": seed, **one})[0] for seed, one in enumerate(asked)]


def test_a_picture_does_not_depend_on_its_company(
    both: Callable[[str], Both], exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All jobs share the UNet's calls; one without a picture is to the bit that of an engine without adapters."""
    engine = both("sd").engine
    alone = jobs_of(engine)
    for job in alone:
        engine.run([job])
    calls: list[int] = []
    call = Predictor.__call__

    def counting(self: Any, sample: Any, *rest: Any) -> Any:
        calls.append(len(sample))
        return call(self, sample, *rest)

    monkeypatch.setattr(Predictor, "__call__", counting)
    together = jobs_of(engine)
    engine.run(together)
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_array_equal(a.latents, b.latents)
    assert calls == [7, 7]
    with Engine.load(exported("sd")[1], threads=1, check_hashes=False) as bare:
        (plain,) = bare.requests(["a cat"], {**SETTINGS, "steps": 2, "solver": "ddim", "seed": 0, "guidance": 3.0})
        bare.run([plain])
    np.testing.assert_array_equal(plain.latents, alone[0].latents)


def test_pictures_of_one_request_share_what_they_look_at(both: Callable[[str], Both]) -> None:
    jobs = both("sd").engine.requests(PROMPTS, {"count": 2, "steps": 1, "ip_adapter": {"base": PICTURE}})
    name = next(name for name in jobs[0].cond if name.startswith("image_keys."))
    assert len({id(job.cond[name]) for job in jobs}) == len({id(job.uncond[name]) for job in jobs}) == 1


def test_openvino_draws_the_same(both: Callable[[str], Both], exported: Exported) -> None:
    pytest.importorskip("openvino")
    asked: dict[str, Any] = {**SETTINGS, "steps": 2, "ip_adapter": PICTURES}
    add_ons = {kind: exported(f"ip-sd-{kind}")[1] for kind in PICTURES}
    options: dict[str, Any] = {"backend": "openvino", "device": "cpu", "threads": 1, "check_hashes": False}
    with Engine.load(exported("sd")[1], ip_adapter=add_ons, **options) as engine:
        ours, expected = (np.asarray(one("a cat", **asked)[0]) for one in (engine, both("sd").engine))
    assert psnr(ours, expected) > PSNR_BOUND


def test_it_goes_with_loras(exported: Exported, tmp_path: Path) -> None:
    """Of each request, and merged in memory while the engine runs: the same picture."""
    source, bundle = exported("sd")
    add_on, lora = exported("ip-sd-base")[1], write_lora(tmp_path / "style.safetensors", source, "kohya")
    merge_bundle(bundle, tmp_path / "bundle", (), adapters=True)
    asked: dict[str, Any] = {**SETTINGS, "steps": 2, "ip_adapter": {"base": PICTURE}}
    options: dict[str, Any] = {"threads": 1, "check_hashes": False, "ip_adapter": {"base": add_on}}
    with Engine.load(tmp_path / "bundle", adapters={"style": lora}, **options) as engine:
        mixed = np.asarray(engine("a cat", lora={"style": 0.6}, **asked)[0])
    with Engine.load(bundle, **options) as engine:
        plain = np.asarray(engine("a cat", **asked)[0])
        engine.set_lora(f"{lora}:0.6")
        merged = np.asarray(engine("a cat", **asked)[0])
    assert psnr(mixed, merged) > PSNR_BOUND
    assert psnr(plain, merged) < 45


def test_what_a_picture_carries(both: Callable[[str], Both]) -> None:
    """And that the enlarged run looks at it too."""
    engine = both("sd").engine
    asked: dict[str, Any] = {**SETTINGS, "steps": 2, "hires_scale": 1.5}
    with_it = engine("a cat", **asked, ip_adapter={"base": {"image": PICTURE, "scale": {"up": 1}}})[0]
    without = engine("a cat", **asked)[0]
    assert psnr(np.asarray(with_it), np.asarray(without)) < 50
    facts = with_it.info["latentrt"]["ip_adapter"]["base"]
    assert facts["scale"] == {"up": 1}
    assert facts["image"].startswith("sha256:")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"other": PICTURE}, "an ip_adapter 'other', and sd is loaded with base, plus, full"),
        (PICTURE, r"ip_adapter is a ndarray.*by the names of IP-Adapters"),
        ({"base": {"scale": 0.5}}, "an ip_adapter has 'scale'. Needed: image, and others of image, scale"),
        ({"base": "a.png"}, "the image prompt is str"),
        ({"base": ImagePrompt(PICTURE, {"down": {"block_0": 1}})}, r"the block 'block_0' of 'down'.*block_1"),
        ({"base": ImagePrompt(PICTURE, {"up": {"block_0": [1, 1, 1]}})}, r"3 numbers for up.block_0.*1 or 2"),
        ({"base": ImagePrompt(PICTURE, {"middle": 1})}, "names 'middle'"),
    ],
)
def test_what_a_request_cannot_ask(both: Callable[[str], Both], asked: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        both("sd").engine("a cat", ip_adapter=asked)


def test_settings_that_are_not_ours(both: Callable[[str], Both]) -> None:
    with pytest.raises(RequestError, match="cache_interval is 2 and there is an ip_adapter"):
        both("sd").engine("a cat", ip_adapter={"base": PICTURE}, cache_interval=2)
    with pytest.raises(RequestError, match=r"ip_adapter_image.*ip_adapter"):
        both("sd").engine("a cat", ip_adapter_image=PICTURE)
    with pytest.raises(RequestError, match="an ip_adapter's scale is -1"):
        ImagePrompt(PICTURE, {"up": [0.5, -1]})
