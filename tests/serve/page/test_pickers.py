"""What the page sends beside settings: ControlNets with the pictures that they follow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from selenium.webdriver import Chrome

from latentrt.bundle.bundle import Bundle
from latentrt.model.model import Model
from latentrt.runtime.fake import FakeBackend
from tests.serve.page.test_drawing import CARD, STEPS, TILE
from tests.support.serve.browser import Visitor
from tests.support.serve.fakes import FakeScheduler, app_of, live, png


@pytest.fixture
def guided(chrome: Chrome, scheduler: FakeScheduler) -> Iterator[Visitor]:
    """The page of a server with two ControlNets."""
    model = Model(Bundle.open(check_hashes=False), FakeBackend())
    named: Any = [SimpleNamespace(name=name) for name in ("edges", "depth")]
    model.controls = tuple(named)
    with live(app_of(scheduler, model, controlnet=("edges=some/", "depth=other/"))) as url:
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


def test_a_server_without_controlnets_offers_none(flat: Visitor) -> None:
    assert not flat.one("#controls").is_displayed()
