"""Pictures that are used again: their settings with the pictures that were given, and they themselves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
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


def test_an_edit_is_used_again(flat: Visitor, scheduler: FakeScheduler, tmp_path: Path) -> None:
    """With its picture and mask, after a reload too; a picture that is too large to be kept is told."""
    picture, drawn = tmp_path / "picture.png", Image.new("RGBA", (96, 96), (0, 0, 0, 255))
    picture.write_bytes(png(96, 96, colour=(200, 30, 30)))
    drawn.paste((0, 0, 0, 0), (8, 16, 40, 80))
    drawn.save(tmp_path / "mask.png")
    flat.click("Start from a picture")
    flat.one("#source-file").send_keys(str(picture))
    flat.one("#mask-file").send_keys(str(tmp_path / "mask.png"))
    flat.draw("a fox", num_inference_steps=STEPS, seed=3, strength=0.5)
    flat.count(1, TILE)
    flat.visit()
    flat.count(1, TILE)[0].click()
    flat.click("Reuse settings", "#detail")
    flat.until(lambda: flat.focused == "Prompt")
    flat.reads("Redraws 22 % of the picture.", "#mask-say")
    flat.draw("a fox")
    flat.count(2, TILE)
    first, again = (handle.request for handle in scheduler.submitted)
    assert (again.strength, again.width, again.height) == (0.5, first.width, first.height)
    for name in ("image", "mask"):
        np.testing.assert_array_equal(again.pictures[name], first.pictures[name])
    flat.click("Remove picture")
    flat.draw("a pear")
    flat.count(3, TILE)
    picture.write_bytes(picture.read_bytes() + bytes(4 * 2**20))
    flat.one("#source-file").send_keys(str(picture))
    flat.draw("an owl")
    flat.count(4, TILE)[0].click()
    flat.reads("a picture that is not kept", "#detail-facts")
    flat.click("Reuse settings", "#detail")
    flat.until(lambda: "not the picture to start from" in flat.one("#say").get_attribute("textContent"))
    assert not flat.one("#source-panel").is_displayed()


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


def test_pictures_that_are_shown(chrome: Chrome, scheduler: FakeScheduler, tmp_path: Path) -> None:
    """From noise and in an edit, again after a reload, and a picture of the history itself."""
    (tmp_path / "picture.png").write_bytes(png(64, 48, colour=(9, 90, 200)))
    picture = str(tmp_path / "picture.png")
    with live(guided_by(scheduler, shows=("style", "face"))) as url:
        page = Visitor(chrome, url).visit()
        assert not page.one("#controls").is_displayed()
        page.click("Show a picture")
        assert [one.text for one in page.all("#ip_adapters legend")] == ["style", "face"]
        page.one("[name='ip_adapter.style.image']").send_keys(picture)
        page.one("[name='ip_adapter.style.scale']").clear()
        page.one("[name='ip_adapter.style.scale']").send_keys("0.6")
        shown = [one.get_attribute("name") for one in page.all("#ip_adapters .follows input") if one.is_displayed()]
        assert (shown, page.nameless()) == (["ip_adapter.style.scale"], [])
        page.draw("a fox", num_inference_steps=STEPS, seed=3)
        page.count(1, TILE)
        page.one("#source-file").send_keys(picture)
        page.draw("a cat")
        page.count(2, TILE)
        page.visit()
        page.count(2, TILE)[0].click()
        page.reads("style, scale 0.6", "#detail-facts")
        page.click("Reuse settings", "#detail")
        page.until(lambda: page.focused == "Prompt")
        page.draw("an owl")
        page.count(3, TILE)
        for handle in scheduler.submitted:
            ((name, unit),) = handle.request.ip_adapter.items()
            assert (name, unit.scale, unit.image.size) == ("style", 0.6, (64, 48))
            assert unit.image.getpixel((0, 0))[:3] == (9, 90, 200)
        page.click("Remove", "#ip_adapters")
        page.all(TILE)[2].click()
        page.click("Show it: face", "#detail")
        page.until(lambda: page.focused == "Scale")
        page.draw("a pear")
        page.count(4, TILE)
        ((name, unit),) = scheduler.submitted[3].request.ip_adapter.items()
        assert (name, unit.scale, unit.image.size) == ("face", 1.0, (128, 128))
        assert page.complaints() == []


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
            "sketch": [],
            "any": ["guess", "type"],
        }
        assert sent["any"]["type"] == "canny"
        assert page.complaints() == []
