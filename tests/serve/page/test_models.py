"""Several models in one server: the page offers each, and what it can."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from selenium.webdriver import Chrome, Keys

from tests.serve.page.conftest import Told
from tests.serve.page.test_drawing import TILE
from tests.support.serve.browser import Visitor
from tests.support.serve.fakes import FakeScheduler, app_of, live

MODELS = ["one", "two", "broken"]


@pytest.fixture
def several(chrome: Chrome, scheduler: FakeScheduler) -> Iterator[Visitor]:
    app = app_of(scheduler, model_name="one", aliases=("two",))
    two = {"defaults": {"steps": 7, "guidance": 2.0, "image_guidance": None, "scheduler": "ddim"}, "edits": False}
    app.add_middleware(Told, models=MODELS, of={"two": two})
    with live(app) as url:
        visitor = Visitor(chrome, url)
        yield visitor.visit()
        assert visitor.complaints() == []


def value(page: Visitor, name: str) -> str:
    return str(page.one(f"[name={name}]").get_attribute("value"))


def choose(page: Visitor, name: str) -> None:
    next(one for one in page.all("[name=model] option") if one.text == name).click()


def test_each_is_offered_with_what_it_can(several: Visitor, scheduler: FakeScheduler) -> None:
    assert [one.text for one in several.all("[name=model] option")] == MODELS
    assert (several.one("#model-name").text, value(several, "num_inference_steps")) == ("one", "20")
    assert several.one("#source").is_displayed()
    several.set(guidance_scale=5)
    choose(several, "two")
    several.reads("two", "#model-name")
    assert (value(several, "num_inference_steps"), value(several, "guidance_scale")) == ("7", "5")  # as was typed
    assert not several.one("#source").is_displayed()
    several.draw("a fox")
    several.count(1, TILE)
    assert scheduler.submitted[0].request.steps == 7
    choose(several, "one")
    several.reads("one", "#model-name")
    several.one(TILE).click()
    several.reads("two", "#detail-facts")
    several.click("Reuse settings", "#detail")
    several.until(lambda: several.focused == "Prompt")
    assert (several.one("#model-name").text, value(several, "model")) == ("two", "two")
    several.visit()
    several.reads("two", "#model-name")


def test_one_that_cannot_be_had_is_told(several: Visitor) -> None:
    several.expected = ["503"]
    choose(several, "broken")
    several.reads("broken cannot be had", "#model-say")
    assert (value(several, "model"), several.one("#model-name").text) == ("one", "one")
    several.press(Keys.ESCAPE)


def test_a_single_one_is_no_choice(flat: Visitor) -> None:
    assert not flat.one("[name=model]").is_displayed()
