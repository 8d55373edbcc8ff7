"""The page of models that read no prompt."""

from __future__ import annotations

from dataclasses import replace

import pytest
from selenium.webdriver import Chrome, Keys

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.spec import DENOISER, FP32, Defaults, LatentSpec, NetworkSpec, TensorSpec, Variant
from latentrt.model.model import Model
from latentrt.runtime.fake import FakeBackend
from tests.support.serve.browser import Visitor
from tests.support.serve.fakes import FakeScheduler, app_of, live

FIELDS = ("prompt", "negative_prompt", "guidance_scale", "class_label", "num_inference_steps", "seed")


def shown(page: Visitor) -> list[str]:
    return [name for name in FIELDS if page.one(f"[name={name}]").is_displayed()]


def pixel_model(classes: int | None) -> Model:
    """One without graphs, of pixels."""
    image = ("batch", 3, "height", "width")
    inputs = [TensorSpec("sample", "float32", image), TensorSpec("timestep", "float32", ("batch",))]
    if classes is not None:
        inputs.append(TensorSpec("class_labels", "int64", ("batch",)))
    outputs = (TensorSpec("out", "float32", image),)
    network = NetworkSpec(DENOISER, tuple(inputs), outputs, {FP32: Variant("model.onnx", 23, 1)})
    bundle = Bundle.open(check_hashes=False)
    spec = replace(
        bundle.spec,
        latents=LatentSpec(3, 1, 1.0, 0.0, 16, 16, 4),
        networks={"unet": network},
        defaults=Defaults(1000, 1.0),
        classes=classes,
    )
    return Model(replace(bundle, spec=spec), FakeBackend())


@pytest.mark.parametrize("classes", [None, 5])
def test_only_what_the_model_reads_is_asked_for(chrome: Chrome, scheduler: FakeScheduler, classes: int | None) -> None:
    labels = [] if classes is None else ["class_label"]
    with live(app_of(scheduler, pixel_model(classes))) as url:
        page = Visitor(chrome, url).visit()
        assert shown(page) == [*labels, "num_inference_steps", "seed"]
        page.set(num_inference_steps=4, seed=7, **dict.fromkeys(labels, 3))
        page.press(Keys.CONTROL, Keys.ENTER)
        title = "Class 3" if labels else "Picture"
        page.until(lambda: [tile.accessible_name for tile in page.all("#history .tile")] == [f"{title}, seed 7"])
        request = scheduler.submitted[0].request
        assert (request.prompt, request.steps, request.guidance) == (None, 4, 1.0)
        assert request.class_label == (3 if labels else None)
        page.all("#history .tile")[0].click()
        page.reads(title, "#detail-title")
        page.click("Reuse settings", "#detail")
        page.until(lambda: page.focused == ("Class" if labels else "Pictures"))
        assert page.nameless() == []
        assert page.complaints() == []


def test_a_model_with_prompts_asks_for_no_class(flat: Visitor) -> None:
    assert shown(flat) == [name for name in FIELDS if name != "class_label"]
