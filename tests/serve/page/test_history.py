"""Pictures that the page keeps: across a reload, within a bound, favourites, compared, saved as an archive."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from zipfile import ZipFile

from selenium.webdriver import Keys

from tests.serve.page.test_drawing import STEPS, TILE
from tests.support.serve.browser import Visitor


def test_the_history_survives_a_reload(page: Visitor) -> None:
    page.draw("a fox", num_inference_steps=STEPS, seed=1, n=3)
    page.count(3, TILE)
    page.visit()
    names = [tile.accessible_name for tile in page.count(3, TILE)]
    assert sorted(names) == ["a fox, seed 1", "a fox, seed 2", "a fox, seed 3"]
    assert page.one("[name=prompt]").get_attribute("value") == "a fox"
    page.until(
        lambda: page.run("return [...document.querySelectorAll('.tile img')].every((image) => image.naturalWidth)")
    )
    page.one(TILE).click()
    assert page.one("#detail-title").text == "a fox"
    download = page.one("#detail-download").get_attribute("download")
    assert download == f"{names[0].replace(', seed ', '-').replace(' ', '-')}.png"
    page.press(Keys.ARROW_RIGHT)
    page.until(lambda: page.one("#detail-download").get_attribute("download") != download)
    page.click("Copy settings", "#detail")
    page.reads("Settings copied", "#detail-say")
    page.click("Delete", "#detail")
    page.count(2, TILE)
    page.press(Keys.ESCAPE)
    page.click("Delete all")
    page.click("Keep", "#clear-dialog")
    page.count(2, TILE)
    page.click("Delete all")
    page.click("Delete all", "#clear-dialog")
    page.reads("Nothing drawn yet")
    page.visit()
    page.reads("Nothing drawn yet")
    assert page.all(TILE) == []


def test_the_history_is_bounded(page: Visitor) -> None:
    page.draw("first", num_inference_steps=1)
    page.count(1, TILE)
    fill = """return import("/static/kept/history.js").then(async ({ History }) => {
        const history = await History.open();
        const [record] = await history.all();
        for (let k = 1; k <= 205; k++) await history.put({ ...record, id: String(k), made: record.made + k });
    });"""
    page.run(fill)
    page.visit()
    page.count(206, TILE)
    page.draw("last", num_inference_steps=1)
    page.count(200, TILE)
    assert page.one(TILE).text == "last"
    page.visit()
    page.count(200, TILE)


def test_favourites_stay_pictures_are_compared_and_saved(flat: Visitor, tmp_path: Path) -> None:
    flat.draw("a fox", num_inference_steps=STEPS, seed=1, n=3)
    flat.count(3, TILE)
    flat.run("document.querySelector(\".tile[aria-label$='seed 2']\").click()")
    flat.click("Favourite", "#detail")
    flat.click("Compare", "#detail")
    flat.press(Keys.ARROW_RIGHT)
    flat.until(lambda: flat.one("#detail-other").is_displayed())
    assert flat.one("#detail-other").accessible_name == "Beside it: a fox, seed 2, favourite"
    flat.click("Zoom", "#detail")
    assert flat.one("#detail-image").rect["width"] > 1000
    flat.press(Keys.ESCAPE)
    flat.press(Keys.ESCAPE)
    behaviour = {"behavior": "allow", "downloadPath": str(tmp_path)}
    flat.chrome.execute_cdp_cmd("Browser.setDownloadBehavior", behaviour)
    flat.click("Download all")
    flat.until(lambda: (tmp_path / "latentrt.zip").exists())
    with ZipFile(tmp_path / "latentrt.zip") as archive:
        assert archive.testzip() is None
        names = sorted(name.partition("-")[2] for name in archive.namelist())
        assert names == ["a-fox-1.png", "a-fox-2.png", "a-fox-3.png"]
        assert archive.read(archive.namelist()[0]).startswith(b"\x89PNG")
        assert archive.infolist()[0].date_time[:3] == datetime.now().timetuple()[:3]
    flat.visit()
    flat.count(3, TILE)
    flat.click("Favourites")
    shown = [tile.accessible_name for tile in flat.all(TILE) if tile.is_displayed()]
    assert shown == ["a fox, seed 2, favourite"]
