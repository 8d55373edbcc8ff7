"""The page on every screen and for every eye, and what it shows of the server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import pytest
from selenium.webdriver import Chrome, Keys

from tests.serve.page.test_drawing import CARD, STEPS, TILE
from tests.support.serve.browser import Visitor
from tests.support.serve.fake_engine import Fakes
from tests.support.serve.fakes import FakeScheduler, app_of, live, post

# Every screen, every eye


def test_a_phone_has_nothing_beyond_its_edge(flat: Visitor, scheduler: FakeScheduler) -> None:
    scheduler.hold = asyncio.Event()
    with flat.width(360):
        flat.draw(f"a {'very ' * 30}{'w' * 80}", num_inference_steps=STEPS, n=3)
        flat.count(3, ".frame img")
        for part in ("Start from a picture", "More"):
            flat.click(part)
        assert flat.run("return document.documentElement.scrollWidth") == 360
        let_go(scheduler)
        flat.count(3, TILE)
        flat.run("document.querySelector('.tile').click()")
        assert flat.run("return document.documentElement.scrollWidth") == 360
        box = flat.one("#detail").rect
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360
        heights = flat.run("return [...document.querySelectorAll('button')].map((one) => one.offsetHeight)")
        assert min(filter(None, heights)) >= 40
        flat.press(Keys.ESCAPE)


def test_a_phones_first_screen_has_the_newest_picture_and_draw(flat: Visitor, scheduler: FakeScheduler) -> None:
    """And so it has while many jobs run."""
    scheduler.hold = asyncio.Event()
    inside = """const box = document.querySelector(arguments[0]).getBoundingClientRect();
        return box.height >= 40 && box.top >= 0 && box.bottom <= innerHeight;"""
    with flat.width(390):
        flat.draw("a fox", num_inference_steps=STEPS, seed=1)
        flat.until(lambda: scheduler.running)
        let_go(scheduler)
        flat.count(1, TILE)
        scheduler.hold = asyncio.Event()
        for _ in range(4):
            flat.draw("an owl", n=3)
        flat.count(12, f"{CARD} .frame img")
        flat.run("document.activeElement.blur(); scrollTo(0, 0)")
        for part in ("#newest img", "[type=submit]", CARD):
            assert flat.run(inside, part), part
        newest = flat.one("#newest")
        assert newest.accessible_name == "Newest: a fox, seed 1"
        newest.click()
        flat.reads("a fox", "#detail-title")
        flat.press(Keys.ESCAPE)
        assert flat.focused == "Newest: a fox, seed 1"
        let_go(scheduler)
        flat.count(0, CARD)
    assert not newest.is_displayed()


def let_go(scheduler: FakeScheduler) -> None:
    """End what holds its rows."""
    assert scheduler.hold is not None
    next(iter(scheduler.tasks.values())).get_loop().call_soon_threadsafe(scheduler.hold.set)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(page: Visitor, scheme: str) -> None:
    page.draw("a fox", num_inference_steps=STEPS)
    page.count(1, TILE)
    page.emulate(prefers_color_scheme=scheme)
    script = """const grey = (text) => {
        const parts = text.match(/[\\d.]+/g).slice(0, 3).map((part) => part / 255);
        const [r, g, b] = parts.map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const behind = (one) => {
        const colour = getComputedStyle(one).backgroundColor;
        return /^rgb\\(/.test(colour) ? colour : behind(one.parentElement);
    };
    return [...document.querySelectorAll("h1, h2, p, label, button, kbd, input, .caption")]
        .filter((one) => one.offsetParent && one.innerText !== "" )
        .map((one) => [grey(getComputedStyle(one).color), grey(behind(one))])
        .map(([ink, paper]) => (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05));"""
    contrasts = page.run(script)
    background = page.run("return getComputedStyle(document.body).backgroundColor")
    page.emulate()
    assert len(contrasts) > 15
    assert min(contrasts) > 4.5
    assert (background == "rgb(23, 25, 22)") == (scheme == "dark")


def test_the_switch_for_dark(flat: Visitor) -> None:
    """It is kept, and twice pressed it follows the system again."""
    background = "return getComputedStyle(document.body).backgroundColor"
    light = flat.run(background)
    flat.click("Dark")
    flat.visit()
    assert flat.run(background) == "rgb(23, 25, 22)"
    flat.click("Light")
    assert flat.run(background) == light
    assert flat.run("return localStorage.getItem('latentrt.theme')") is None


def test_nothing_moves_for_those_who_want_none(page: Visitor, fakes: Fakes) -> None:
    page.emulate(prefers_reduced_motion="reduce")
    fakes.hold()
    page.draw("a fox", num_inference_steps=STEPS)
    page.count(1, CARD)
    assert page.run("return document.getAnimations().length") == 0
    page.emulate()


# The server


def test_a_server_with_keys(chrome: Chrome) -> None:
    scheduler = FakeScheduler()
    with live(app_of(scheduler, keys=("secret",))) as url:
        page = Visitor(chrome, url)
        page.expected = ["401"]
        page.visit("locked")
        page.until(lambda: page.focused == "Key")
        page.press("wrong")
        page.press(Keys.ENTER)
        page.reads("The server refused this key", "#key-say")
        page.one("#key").clear()
        page.one("#key").send_keys("secret", Keys.ENTER)
        page.server_is("ready")
        page.draw("a fox")
        page.count(1, TILE)
        stores = "return [Object.values(sessionStorage), JSON.stringify(localStorage), document.cookie]"
        assert page.run(stores)[0] == ["secret"]
        assert "secret" not in "".join(page.run(stores)[1:])
        page.click("Key")
        page.click("Forget", "#key-dialog")
        page.server_is("locked")
        assert page.run(stores)[0] == []
        assert page.complaints() == []


@pytest.mark.parametrize("state", ["starting", "draining", "failed"])
def test_the_state_of_the_server(chrome: Chrome, state: str) -> None:
    scheduler = FakeScheduler()
    scheduler.forced = state
    with live(app_of(scheduler)) as url:
        page = Visitor(chrome, url).visit(state)
        page.until(lambda: page.one("#notice").text)
        page.expected = ["503"]
        page.draw("a fox")
        page.reads("What to do", CARD)
        scheduler.forced = ""
        page.run("document.dispatchEvent(new Event('visibilitychange'))")
        page.server_is("ready")
        assert not page.one("#notice").is_displayed()
        page.click("Draw again", CARD)
        page.count(1, TILE)
        assert page.complaints() == []


def test_a_server_that_goes_away(chrome: Chrome) -> None:
    scheduler = FakeScheduler(hold=asyncio.Event())
    with live(app_of(scheduler)) as url:
        page = Visitor(chrome, url).visit()
        page.draw("a fox")
        page.until(lambda: scheduler.running)
        page.count(1, f"{CARD} .frame img")
    page.reads("The connection broke", CARD)
    page.server_is("offline")
    page.draw("a cat")
    page.reads("The server does not answer", CARD)
    assert page.nameless() == []


def test_a_hidden_tab_asks_nothing(page: Visitor) -> None:
    page.run(
        """window.asked = [];
        const before = window.fetch;
        window.fetch = (path, ...rest) => (asked.push(path), before(path, ...rest));
        Object.defineProperty(document, "hidden", { value: true, configurable: true });"""
    )
    page.draw("a fox", num_inference_steps=STEPS)
    page.count(1, TILE)
    assert page.run("return asked") == ["v1/images/generations"]
    page.run("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")
    page.until(lambda: "latentrt/queue" in page.run("return asked"))


def test_what_can_be_chosen_is_the_servers(chrome: Chrome) -> None:
    settings = {"sizes": ("64x64", "128x64"), "max_n": 3, "max_steps": 33, "steps": 9, "guidance": 1.5}
    with live(app_of(FakeScheduler(), scheduler="heun", **settings)) as url:
        page = Visitor(chrome, url).visit()
        options = [one.text for one in page.all("[name=size] option")]
        assert options == ["128 × 128", "64 × 64", "128 × 64"]
        for name, most, value in (("n", "3", "1"), ("num_inference_steps", "33", "9"), ("guidance_scale", "", "1.5")):
            field = page.one(f"[name={name}]")
            assert (field.get_attribute("max"), field.get_attribute("value")) == (most, value)
        assert page.one("[name=scheduler] option").text == "heun (default)"
        page.draw("a fox", num_inference_steps=34)
        assert page.run("return document.querySelector('input:invalid').name") == "num_inference_steps"
        assert page.all(CARD) == []


@pytest.fixture
def named(scheduler: FakeScheduler) -> Iterator[str]:
    """Yield the address of a server that has the name page.test too."""
    with live(app_of(scheduler, allowed_host=("page.test",))) as url:
        yield url


def test_from_another_machine_without_tls(chrome: Chrome, named: str) -> None:
    page = Visitor(chrome, named.replace("127.0.0.1", "page.test")).visit()
    assert not page.run("return isSecureContext || 'clipboard' in navigator")
    page.draw("a fox", seed=3, num_inference_steps=STEPS)
    page.count(1, TILE)
    page.visit()
    (tile,) = page.count(1, TILE)
    tile.click()
    page.click("Copy settings", "#detail")
    page.reads("Settings copied", "#detail-say")
    page.click("✕", "#detail")
    page.one("[name=prompt]").clear()
    page.one("[name=prompt]").send_keys(Keys.CONTROL, "v")
    copied = json.loads(page.one("[name=prompt]").get_attribute("value"))
    assert (copied["prompt"], copied["seed"], copied["num_inference_steps"]) == ("a fox", 3, STEPS)
    assert post(f"{named}/v1/images/generations", json=copied).status_code == 200
    assert page.complaints() == []


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_events_arrive_however_they_are_cut(page: Visitor, size: int) -> None:
    text = ': hello\r\n\r\nevent: a\r\ndata: {"x":\r\ndata: "é"}\r\n\r\ndata: 1\n\nevent: b\rdata:2\r\r\n\ndata: cut'
    script = """const [text, size] = arguments;
    const bytes = new TextEncoder().encode(text);
    const stream = new ReadableStream({ start(flow) {
        for (let at = 0; at < bytes.length; at += size) flow.enqueue(bytes.slice(at, at + size));
        flow.close();
    } });
    return import("/static/api.js").then(async ({ events }) => {
        const found = [];
        for await (const { event, data } of events(stream)) found.push([event, data]);
        return found;
    });"""
    assert page.run(script, text, size) == [["a", {"x": "é"}], ["", 1], ["b", 2]]
