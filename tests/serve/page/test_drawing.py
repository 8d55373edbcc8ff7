"""Drawing with the page in a real browser: by keyboard, jobs, edits."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from selenium.webdriver import Chrome, Keys
from selenium.webdriver.common.action_chains import ActionChains

from latentrt.errors import NetworkError
from latentrt.serve.core.errors import QueueFull
from tests.support.serve.browser import Visitor
from tests.support.serve.fake_engine import Fakes
from tests.support.serve.fakes import FakeScheduler, app_of, get, live, png

CARD, TILE = "#jobs > li", "#history .tile"
STEPS = 4


# By keyboard


def test_by_keyboard_alone(page: Visitor) -> None:
    page.one("body").click()
    stops = []
    for _ in range(15):
        page.press(Keys.TAB)
        stops.append(page.focused)
        if page.focused == "Prompt":
            break
    assert stops == ["Skip to the pictures", "Dark", "Key", "Prompt"]
    page.press("a red apple")
    page.press(Keys.TAB)
    assert page.focused == "Negative prompt"
    page.press("a worm")
    page.press(Keys.CONTROL, Keys.ENTER)
    (tile,) = page.count(1, TILE)
    seed = re.fullmatch(r"a red apple, seed (\d+)", tile.accessible_name)
    assert seed
    page.run("arguments[0].focus()", tile)
    page.press(Keys.ENTER)
    facts = page.one("#detail-facts").text.split("\n")
    for line in ("a worm", "128 × 128", "20", "ddim", "3", seed[1], "emoji"):
        assert line in facts
    page.press(Keys.ESCAPE)
    page.until(lambda: page.focused == tile.accessible_name)
    page.press(Keys.ENTER)
    page.until(lambda: page.one("#detail").is_displayed())
    page.click("Reuse settings", "#detail")
    page.until(lambda: page.focused == "Prompt")
    assert page.one("[name=seed]").get_attribute("value") == seed[1]
    before = page.run("return document.querySelector('.tile img').src")
    page.press(Keys.CONTROL, Keys.ENTER)
    page.count(2, TILE)
    same = """const hash = async (image) => {
        const canvas = new OffscreenCanvas(image.width, image.height);
        canvas.getContext("2d").drawImage(image, 0, 0);
        return [...canvas.getContext("2d").getImageData(0, 0, image.width, image.height).data].join();
    };
    const images = [...document.querySelectorAll(".tile img")];
    return Promise.all(images.map((image) => image.decode())).then(() => Promise.all(images.map(hash)))
        .then(([one, other]) => one === other && one.length > 0);"""
    assert page.run(same)
    assert page.run("return document.querySelectorAll('.tile img')[1].src") == before


@pytest.mark.filterwarnings("ignore::latentrt.errors.PromptTruncatedWarning")
def test_what_the_model_did_not_read_is_told(page: Visitor) -> None:
    page.draw("very " * 100, num_inference_steps=STEPS)
    (tile,) = page.count(1, TILE)
    tile.click()
    page.reads("Note", "#detail-facts")


def test_what_has_the_focus_is_seen(page: Visitor) -> None:
    page.one("body").click()
    for _ in range(8):
        page.press(Keys.TAB)
        style = (
            "const style = getComputedStyle(document.activeElement); return [style.outlineStyle, style.outlineWidth]"
        )
        assert page.run(style) == ["solid", "3px"]


# Jobs


def test_previews_and_steps_of_a_running_job(page: Visitor, fakes: Fakes) -> None:
    fakes.hold()
    page.draw("an owl", n=2, num_inference_steps=40, seed=5)
    page.count(1, CARD)

    def stepped(what: Callable[[], Any]) -> None:
        page.until(lambda: fakes.allow(1) or what())

    def row() -> int:
        told = re.search(r"Step (\d+) of 40, 0 of 2 pictures done", page.one(CARD).text)
        return int(told[1]) if told else 0

    stepped(row)
    first = row()
    stepped(lambda: row() > first)
    page.reads("Yours, 2 pictures: step", "#queue .mine")
    page.reads("2 drawing, 0 waiting", "#load")
    bars = page.run("return [...document.querySelectorAll('progress')].map((bar) => bar.value)")
    assert len(bars) == 2
    assert all(0 < bar < 1 for bar in bars)
    stepped(lambda: len(page.all(f"{CARD} .frame img")) == 2)
    previews = addresses(page)
    assert page.nameless() == []
    assert page.chrome.title == "(1) latentrt"
    stepped(lambda: not set(previews) & set(addresses(page)))
    fakes.allow(None)
    tiles = page.count(2, TILE)
    assert {tile.accessible_name for tile in tiles} == {"an owl, seed 5", "an owl, seed 6"}
    page.count(0, CARD)
    assert page.run("return document.querySelector('#say').textContent") == "an owl: 2 pictures done"
    page.reads("Idle", "#load")
    assert page.chrome.title == "latentrt"


def addresses(page: Visitor) -> list[str]:
    """Of the pictures that are shown."""
    return page.run("return [...document.querySelectorAll('#jobs img')].map((image) => image.src)")


def test_jobs_are_cancelled_by_key_and_by_button_and_drawn_again(page: Visitor, fakes: Fakes) -> None:
    fakes.hold()
    page.draw("an owl", num_inference_steps=STEPS)
    page.draw("a cat")
    page.until(lambda: len(queue(page)) == 2)
    page.press(Keys.ESCAPE)
    page.reads("Cancelled", f"{CARD}:nth-child(1)")
    (left,) = page.until(lambda: len(jobs := queue(page)) == 1 and jobs)
    assert left["pictures"] == 1
    cancel = page.one(f"{CARD}:nth-child(2) button")
    assert cancel.accessible_name == "Cancel an owl"
    cancel.click()
    page.reads("Cancelled", f"{CARD}:nth-child(2)")
    page.until(lambda: page.focused == "Draw again")
    page.until(lambda: queue(page) == [])
    fakes.allow(None)
    page.press(Keys.ENTER)
    (tile,) = page.count(1, TILE)
    assert tile.accessible_name.startswith("an owl")
    page.click("Dismiss", CARD)
    page.count(0, CARD)
    assert page.focused == "Prompt"


def queue(page: Visitor) -> Any:
    return get(f"{page.url}/latentrt/queue").json()["jobs"]


def test_more_jobs_than_a_browser_has_connections(page: Visitor, fakes: Fakes) -> None:
    fakes.hold()
    for prompt in ("one", "two", "three", "four", "five", "six"):
        page.draw(prompt, num_inference_steps=STEPS)
    page.count(6, CARD)
    page.until(lambda: len(queue(page)) == 4)
    assert sum("Waits in this page" in card.text for card in page.all(CARD)) == 2
    page.one(f"{CARD}:first-child button").click()
    page.reads("Cancelled", f"{CARD}:first-child")
    fakes.allow(None)
    tiles = page.count(5, TILE)
    assert {tile.text for tile in tiles} == {"one", "two", "three", "four", "five"}


def test_an_engine_that_fails_says_so(flat: Visitor, scheduler: FakeScheduler) -> None:
    scheduler.fails = NetworkError("a step failed", needed="one that does not", fix="try again")
    flat.draw("a fox")
    flat.reads("a step failed", f"{CARD} [role=alert]")
    scheduler.fails = None
    flat.click("Draw again", CARD)
    flat.count(1, TILE)
    flat.count(0, CARD)


def test_a_full_queue_says_when_there_is_room(flat: Visitor, scheduler: FakeScheduler) -> None:
    scheduler.refuses = QueueFull("no place is free", needed="some", fix="try again later", retry_after=2.5)
    flat.expected = ["429"]
    flat.draw("a fox")
    flat.reads("no place is free", CARD)
    text = flat.one(CARD).text
    for part in ("What happened", "Needed", "some", "What to do", "try again later", "about 3 seconds"):
        assert part in text


# Edits


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "picture.png"
    path.write_bytes(png(96, 96, colour=(200, 30, 30)))
    return str(path)


def test_an_edit_with_a_painted_mask(flat: Visitor, scheduler: FakeScheduler, picture: str) -> None:
    flat.click("Start from a picture")
    flat.one("#source-file").send_keys(picture)
    canvas = flat.one("#source-mask")
    flat.until(lambda: flat.run("return arguments[0].width", canvas) == 96 and canvas.is_displayed())
    assert flat.nameless() == []
    flat.run("arguments[0].scrollIntoView({ block: 'center' })", canvas)
    ActionChains(flat.chrome).move_to_element_with_offset(canvas, -40, 0).click_and_hold().move_by_offset(
        60, 5
    ).release().perform()
    flat.draw("a red apple", strength=0.5, seed=3, num_inference_steps=STEPS)
    flat.count(1, TILE)
    request = scheduler.submitted[0].request
    assert (request.strength, request.seed, request.prompt) == (0.5, 3, "a red apple")
    assert tuple(request.pictures["image"][0, 0]) == (200, 30, 30)
    assert 0.004 < np.mean(request.pictures["mask"] == 255) < 0.5
    flat.one(TILE).click()
    flat.reads("a picture, strength 0.5", "#detail-facts")
    flat.click("Start from it", "#detail")
    flat.draw("a pear")
    flat.count(2, TILE)
    assert list(scheduler.submitted[1].request.pictures) == ["image"]
    flat.click("Remove picture")
    flat.draw("a plum")
    flat.count(3, TILE)
    request = scheduler.submitted[2].request
    assert (request.pictures, request.strength) == ({}, None)


def test_a_mask_by_keyboard_with_eraser_invert_and_undo(flat: Visitor, scheduler: FakeScheduler, picture: str) -> None:
    flat.one("#source-file").send_keys(picture)
    canvas = flat.one("#source-mask")
    flat.until(lambda: flat.run("return arguments[0].width", canvas) == 96 and canvas.is_displayed())
    alpha = "return [...arguments[0].getContext('2d').getImageData(0, 0, 96, 96).data].filter((_, k) => k % 4 === 3)"

    def painted() -> np.ndarray[Any, Any]:
        return np.array(flat.run(alpha, canvas)).reshape(96, 96) >= 128

    flat.run("arguments[0].focus()", canvas)
    flat.run("document.querySelector('#brush').value = 40")
    flat.press(Keys.ARROW_LEFT)
    flat.press(Keys.SPACE)
    dot = painted()
    assert dot[48].any()
    assert not dot[:, 60:].any()
    flat.press("e")
    assert flat.one("#mask-eraser").get_attribute("aria-pressed") == "true"
    flat.press(Keys.SPACE)
    assert not painted().any()
    flat.press(Keys.CONTROL, "z")
    np.testing.assert_array_equal(painted(), dot)
    flat.click("Invert")
    np.testing.assert_array_equal(painted(), ~dot)
    flat.click("Clear mask")
    assert not painted().any()
    flat.click("Undo")
    flat.click("Larger")
    wide = canvas.rect["width"]
    assert canvas.rect["height"] == wide > 500
    flat.press(Keys.ESCAPE)
    assert canvas.rect["width"] < 400
    flat.draw("a red apple", num_inference_steps=STEPS)
    flat.count(1, TILE)
    mask = scheduler.submitted[0].request.pictures["mask"]
    assert abs(np.mean(mask == 255) - np.mean(~dot)) < 0.01


def test_a_mask_from_a_file(flat: Visitor, scheduler: FakeScheduler, picture: str, tmp_path: Path) -> None:
    (tmp_path / "mask.png").write_bytes(png(96, 96, "RGBA", (0, 0, 0, 0)))
    flat.one("#source-file").send_keys(picture)
    flat.one("#mask-file").send_keys(str(tmp_path / "mask.png"))
    flat.draw("a red apple", num_inference_steps=STEPS)
    flat.count(1, TILE)
    assert np.all(scheduler.submitted[0].request.pictures["mask"] == 255)


def test_a_file_that_the_server_would_not_take_is_not_sent(chrome: Chrome, picture: str) -> None:
    scheduler = FakeScheduler()
    with live(app_of(scheduler, max_image_bytes=100)) as url:
        page = Visitor(chrome, url).visit()
        page.one("#source-file").send_keys(picture)
        page.draw("a red apple", num_inference_steps=STEPS)
        assert "this server takes" in page.run("return document.querySelector('input:invalid').validationMessage")
        assert page.all(CARD) == []
        page.click("Remove picture")
        page.draw("a red apple", num_inference_steps=STEPS)
        page.count(1, TILE)


def test_a_server_that_edits_nothing_offers_no_edits(chrome: Chrome) -> None:
    with live(app_of(FakeScheduler(), edits=False)) as url:
        page = Visitor(chrome, url).visit()
        page.draw("a red apple", num_inference_steps=STEPS)
        (tile,) = page.count(1, TILE)
        tile.click()
        assert not page.one("#source").is_displayed()
        assert not page.one("#detail-edit").is_displayed()


def test_a_refused_setting_is_led_to(flat: Visitor, picture: str) -> None:
    flat.expected = ["400"]
    flat.click("Start from a picture")
    flat.one("#source-file").send_keys(picture)
    flat.until(lambda: flat.one("[name=strength]").is_displayed())
    flat.draw("an apple", strength=0.01, num_inference_steps=STEPS)
    flat.reads("What to do", CARD)
    flat.click("Start from a picture")
    flat.click("Go to the setting", CARD)
    assert flat.focused == "Strength (1 keeps nothing)"
