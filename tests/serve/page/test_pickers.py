"""What the page offers beside settings: ControlNets, LoRAs, seeds, formats, a word about large sizes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from selenium.webdriver import Chrome, Keys

from latentrt.bundle.bundle import Bundle
from latentrt.model.model import Model
from latentrt.runtime.fake import FakeBackend
from tests.serve.page.conftest import guided_by
from tests.serve.page.test_drawing import CARD, STEPS, TILE
from tests.support.serve.browser import Visitor
from tests.support.serve.fakes import FakeScheduler, app_of, live, png


@pytest.fixture
def guided(chrome: Chrome, scheduler: FakeScheduler) -> Iterator[Visitor]:
    """The page of a server with two ControlNets."""
    with live(guided_by(scheduler, "edges", "depth")) as url:
        visitor = Visitor(chrome, url)
        yield visitor.visit()
        assert visitor.complaints() == []


def test_controls_are_sent(guided: Visitor, scheduler: FakeScheduler, tmp_path: Path) -> None:
    """From noise and in an edit; those without a picture are not."""
    (tmp_path / "map.png").write_bytes(png(64, 48, colour=(9, 90, 200)))
    picture = str(tmp_path / "map.png")
    guided.click("Follow a picture")
    assert [one.text for one in guided.all("#controls legend")] == ["edges", "depth"]
    named = "[name='control.edges.{}']".format
    assert not guided.one(named("scale")).is_displayed()
    guided.one(named("image")).send_keys(picture)
    for setting, value in (("scale", "0.7"), ("start", "0.6"), ("end", "0.5")):
        guided.one(named(setting)).clear()
        guided.one(named(setting)).send_keys(value)
    guided.one(named("guess")).click()
    assert guided.nameless() == []
    guided.draw("a fox", num_inference_steps=STEPS)
    assert guided.run("return document.querySelector('input:invalid').name") == "control.edges.end"
    assert guided.all(CARD) == []
    guided.one(named("start")).clear()
    guided.one(named("start")).send_keys("0.1")
    guided.draw("a fox")
    guided.count(1, TILE)
    guided.one("#source-file").send_keys(picture)
    guided.draw("a cat")
    guided.count(2, TILE)
    for handle in scheduler.submitted:
        (edges,) = handle.request.control.values()
        assert (edges.scale, edges.start, edges.end, edges.guess) == (0.7, 0.1, 0.5, True)
        assert (edges.image.size, edges.image.getpixel((0, 0))[:3]) == ((64, 48), (9, 90, 200))
    assert "image" in scheduler.submitted[1].request.pictures
    guided.click("Remove", "#controls")
    guided.draw("a pear")
    guided.count(3, TILE)
    assert not scheduler.submitted[2].request.control


def test_a_server_without_them_offers_none(flat: Visitor) -> None:
    assert not any(flat.one(part).is_displayed() for part in ("#controls", "#ip_adapters"))


def test_loras_are_sent_and_kept(chrome: Chrome, scheduler: FakeScheduler, tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(png(64, 64))
    model = Model(Bundle.open(check_hashes=False), FakeBackend())
    library = SimpleNamespace(files={"flat": "", "pixel-art": ""})
    named: Any = SimpleNamespace(library=library, asked=lambda strengths: ())
    model.adapters = named
    with live(app_of(scheduler, model)) as url:
        page = Visitor(chrome, url).visit()
        page.click("LoRAs")
        strength = page.one("[name='lora.pixel-art']")
        assert strength.accessible_name == "pixel-art"
        strength.send_keys("0.8")
        page.draw("a fox", num_inference_steps=STEPS)
        page.count(1, TILE)
        page.one("#source-file").send_keys(str(tmp_path / "picture.png"))
        page.draw("a cat")
        page.count(2, TILE)
        assert [handle.request.lora for handle in scheduler.submitted] == [{"pixel-art": (0.8, 0.8)}] * 2
        page.click("Defaults")
        assert page.one("[name='lora.pixel-art']").get_attribute("value") == ""
        page.one(TILE).click()
        page.reads("pixel-art, strength 0.8", "#detail-facts")
        page.click("Reuse settings", "#detail")
        assert page.one("[name='lora.pixel-art']").get_attribute("value") == "0.8"
        assert page.complaints() == []


def test_seeds_formats_and_a_word_about_large_sizes(flat: Visitor, scheduler: FakeScheduler) -> None:
    flat.run("document.querySelector('#more').open = true")
    flat.one("[name=output_format] option[value=webp]").click()
    flat.draw("a fox", num_inference_steps=STEPS, seed=7)
    flat.count(1, TILE)[0].click()
    assert flat.one("#detail-download").get_attribute("download") == "a-fox-7.webp"
    flat.press(Keys.ESCAPE)
    seed = flat.one("[name=seed]")
    flat.click("Random")
    assert seed.get_attribute("value") == ""
    flat.click("Same")
    assert seed.get_attribute("value") == "7"
    assert not flat.one("#cost").is_displayed()
    flat.set(hires_scale=2)
    flat.reads("4 times the pixels of the model’s own 128 × 128", "#cost")
    flat.click("Defaults")
    flat.until(lambda: not flat.one("#cost").is_displayed())
