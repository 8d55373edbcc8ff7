"""Where the focus is: kept within what lies over the page, and given back to what opened it."""

from __future__ import annotations

import asyncio
from pathlib import Path

from selenium.webdriver import Keys

from tests.serve.page.test_display import let_go
from tests.serve.page.test_drawing import CARD, STEPS, TILE
from tests.support.serve.browser import Visitor
from tests.support.serve.fakes import FakeScheduler, png


def within(page: Visitor, selector: str) -> bool:
    """Whether the focus is there, or with the browser's own buttons, which follow the last field."""
    script = "const one = document.activeElement; return one === document.body || !!one.closest(arguments[0])"
    return bool(page.run(script, selector))


def test_the_larger_mask_keeps_it(flat: Visitor, scheduler: FakeScheduler, tmp_path: Path) -> None:
    """And Escape there ends no job."""
    (tmp_path / "picture.png").write_bytes(png(96, 96))
    scheduler.hold = asyncio.Event()
    flat.draw("a fox", num_inference_steps=STEPS)
    flat.one("#source-file").send_keys(str(tmp_path / "picture.png"))
    flat.until(lambda: flat.one("#mask-large").is_displayed())
    flat.click("Larger")
    assert flat.focused == "Mask: paint what shall be redrawn"
    stops = set()
    for _ in range(14):
        flat.press(Keys.TAB)
        stops.add(flat.focused)
        assert within(flat, "#source-panel"), flat.focused
    assert {"Undo", "Brush", "Remove picture"} <= stops
    assert flat.nameless() == []
    flat.run("document.activeElement.blur()")
    flat.press(Keys.ESCAPE)
    assert flat.focused == "Larger"
    flat.press(Keys.ENTER)
    flat.click("Remove picture")
    assert flat.run("return document.querySelector('[inert], .large')") is None
    assert flat.focused.startswith("Picture")
    assert "Cancelled" not in flat.one(CARD).text
    let_go(scheduler)
    flat.count(1, TILE)


def test_escape_ends_the_zoom_and_then_closes(flat: Visitor) -> None:
    flat.draw("a fox", num_inference_steps=STEPS, seed=1)
    (tile,) = flat.count(1, TILE)
    flat.run("arguments[0].focus()", tile)
    flat.press(Keys.ENTER)
    flat.click("Compare", "#detail")
    flat.click("Zoom", "#detail")
    for _ in range(14):
        flat.press(Keys.TAB)
        assert within(flat, "#detail"), flat.focused
    flat.press(Keys.ESCAPE)
    assert (flat.one("#detail").is_displayed(), flat.focused) == (True, "Zoom")
    assert flat.one("#detail-zoom").get_attribute("aria-pressed") == "false"
    flat.press(Keys.ESCAPE)
    flat.until(lambda: flat.focused == "a fox, seed 1")
    flat.click("Delete all")
    assert flat.focused == "Keep"
    flat.press(Keys.ESCAPE)
    flat.until(lambda: flat.focused == "Delete all")


def tab_to(page: Visitor, name: str) -> None:
    """Go on by Tab until something of this name has the focus."""
    for _ in range(80):
        if page.focused.startswith(name):
            return
        page.press(Keys.TAB)
    raise AssertionError(f"Tab does not lead to {name}")


def test_from_a_first_picture_to_a_masked_one_by_keyboard(flat: Visitor, scheduler: FakeScheduler) -> None:
    tab_to(flat, "Prompt")
    flat.press("a fox")
    tab_to(flat, "Draw")
    flat.press(Keys.ENTER)
    flat.count(1, TILE)
    tab_to(flat, "a fox, seed")
    flat.press(Keys.ENTER)
    tab_to(flat, "Start from it")
    flat.press(Keys.ENTER)
    flat.until(lambda: flat.one("#source-mask").is_displayed() and flat.focused == "Prompt")
    tab_to(flat, "Mask: paint")
    flat.press(Keys.SPACE)
    flat.reads("Redraws", "#mask-say")
    flat.press(Keys.CONTROL, "z")
    flat.until(lambda: not flat.one("#mask-say").text)
    tab_to(flat, "Larger")
    flat.press(Keys.ENTER)
    assert flat.focused.startswith("Mask: paint")
    flat.press(Keys.SPACE)
    flat.press(Keys.ESCAPE)
    assert flat.focused == "Larger"
    flat.press(Keys.CONTROL, Keys.ENTER)
    flat.count(2, TILE)
    assert set(scheduler.submitted[1].request.pictures) == {"image", "mask"}
