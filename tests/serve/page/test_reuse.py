"""Pictures that are used again: their settings with the maps that they followed, and themselves as maps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver import Chrome

from tests.serve.page.conftest import Told, guided_by
from tests.serve.page.test_drawing import STEPS, TILE
from tests.support.serve.browser import Visitor
from tests.support.serve.fakes import FakeScheduler, live, png


@pytest.fixture
def guided(chrome: Chrome, scheduler: FakeScheduler) -> Iterator[Visitor]:
    """The page of a server with a ControlNet and a T2I-Adapter."""
    app = guided_by(scheduler, "edges", "sketch")
    app.add_middleware(Told, control_kinds={"edges": "controlnet", "sketch": "t2i_adapter"})
    with live(app) as url:
        visitor = Visitor(chrome, url)
        yield visitor.visit()
        assert visitor.complaints() == []


def test_settings_are_used_again_with_their_maps(guided: Visitor, scheduler: FakeScheduler, tmp_path: Path) -> None:
    """After a reload too; what others follow meanwhile is taken out."""
    for name, colour in (("one", (9, 90, 200)), ("other", (1, 2, 3))):
        (tmp_path / f"{name}.png").write_bytes(png(64, 48, colour=colour))
    guided.click("Follow a picture")
    guided.one("[name='control.edges.image']").send_keys(str(tmp_path / "one.png"))
    guided.one("[name='control.edges.scale']").clear()
    guided.one("[name='control.edges.scale']").send_keys("0.7")
    guided.one("[name='control.edges.guess']").click()
    guided.draw("a fox", num_inference_steps=STEPS, seed=3)
    guided.count(1, TILE)
    guided.visit()
    guided.click("Follow a picture")
    guided.one("[name='control.sketch.image']").send_keys(str(tmp_path / "other.png"))
    guided.one(TILE).click()
    guided.reads("edges, scale 0.7, 0 to 1, guess mode", "#detail-facts")
    guided.click("Reuse settings", "#detail")
    guided.until(lambda: guided.focused == "Prompt")
    guided.draw("a fox")
    guided.count(2, TILE)
    for handle in scheduler.submitted:
        (name,) = handle.request.control
        unit = handle.request.control[name]
        assert (name, unit.scale, unit.start, unit.end, unit.guess) == ("edges", 0.7, 0.0, 1.0, True)
        assert (unit.image.size, unit.image.getpixel((0, 0))[:3]) == ((64, 48), (9, 90, 200))


def test_a_picture_is_followed(guided: Visitor, scheduler: FakeScheduler) -> None:
    guided.draw("a fox", num_inference_steps=STEPS, seed=7)
    guided.count(1, TILE)[0].click()
    guided.click("Follow it: sketch", "#detail")
    guided.until(lambda: guided.focused == "Scale")
    assert guided.nameless() == []
    guided.draw("an owl")
    guided.count(2, TILE)
    (unit,) = scheduler.submitted[1].request.control.values()
    assert (unit.image.size, unit.image.getpixel((0, 0))[:3]) == ((128, 128), (7, 7, 7))


def test_each_kind_has_its_settings(chrome: Chrome, scheduler: FakeScheduler, tmp_path: Path) -> None:
    """A T2I-Adapter has no guess mode; a ControlNet Union is told what kind of map it follows."""
    (tmp_path / "map.png").write_bytes(png(64, 64))
    kinds = {"edges": "controlnet", "sketch": "t2i_adapter", "any": "controlnet_union"}
    app = guided_by(scheduler, *kinds)
    app.add_middleware(Told, control_kinds=kinds)
    with live(app) as url:
        page = Visitor(chrome, url).visit()
        page.click("Follow a picture")
        field = "[name='control.{}.{}']".format
        for name in kinds:
            page.one(field(name, "image")).send_keys(str(tmp_path / "map.png"))
        shown = {
            kind: [name for name in kinds if page.one(field(name, kind)).is_displayed()] for kind in ("guess", "type")
        }
        assert shown == {"guess": ["edges", "any"], "type": ["any"]}
        page.draw("a fox", num_inference_steps=STEPS)
        assert page.run("return document.querySelector('input:invalid').name") == "control.any.type"
        page.run(
            "window.bodies = []; const ask = fetch; window.fetch = (...all) => (bodies.push(all[1]?.body), ask(...all))"
        )
        page.one(field("any", "type")).send_keys("canny")
        page.expected = ["400"]
        page.draw("a fox")
        (body,) = page.until(lambda: page.run("return bodies.filter((one) => typeof one === 'string')"))
        sent = json.loads(body)["control"]
        assert {name: sorted(set(unit) - {"image", "scale", "start", "end"}) for name, unit in sent.items()} == {
            "edges": ["guess"],
            "sketch": ["guess"],
            "any": ["guess", "type"],
        }
        assert sent["any"]["type"] == "canny"
        assert page.complaints() == []
