"""The page's files, as they are served; what they do is test_page.py's."""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx
import pytest

from latentrt.serve.http.page import PAGE
from tests.support.serve.fake_engine import PATIENCE
from tests.support.serve.fakes import FakeScheduler, app_of, get, live, post

PARTS = [path for path in PAGE.rglob("*") if path.is_file()]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with live(app_of(FakeScheduler())) as url:
        yield url


def test_every_part_is_open_and_may_load_nothing_from_elsewhere() -> None:
    kinds = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml", ".html": "text/html"}
    with live(app_of(FakeScheduler(), keys=("secret",))) as url, httpx.Client(base_url=url, timeout=PATIENCE) as client:
        static = [(f"/static/{part.relative_to(PAGE).as_posix()}", part) for part in PARTS]
        for path, part in [("/", PAGE / "index.html"), *static]:
            answer = client.get(path)
            again = client.get(path, headers={"if-none-match": answer.headers["etag"]})
            head = client.head(path)
            assert (answer.status_code, answer.content) == (200, part.read_bytes())
            assert answer.headers["content-type"].partition(";")[0] == kinds[part.suffix]
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert (again.status_code, again.content, head.status_code, head.content) == (304, b"", 200, b"")
            for one in (answer, again, head):
                policy = one.headers["content-security-policy"]
                assert "default-src 'none'" in policy
                assert "frame-ancestors 'none'" in policy
                assert "unsafe" not in policy
                assert one.headers["cache-control"] == "no-cache"


def test_there_is_nothing_else_below_static(url: str) -> None:
    for path in ("/static/", "/static/none.js", "/static/kept/", "/static/..%2fapp.py", "/static/%2e%2e/app.py"):
        answer = get(url + path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    assert post(f"{url}/").status_code == 405


def test_the_files_are_small_and_name_no_other_place() -> None:
    texts = {part.name: part.read_text(encoding="utf-8") for part in PARTS}
    # Less than a few pictures; raised from 60,000 for ControlNets, the mask editor, comparing, maps, models
    # and pictures that are shown.
    assert sum(map(len, texts.values())) < 93_000
    assert all(text.count("\n") <= 350 for text in texts.values())
    for text in texts.values():
        assert set(re.findall(r"https?://[^\s\"']+", text)) <= {"http://www.w3.org/2000/svg"}
        assert not re.search(r"innerHTML|\beval\(|new Function|document\.write", text)
    assert not re.search(r"<style|<script(?! type=\"module\" src)| style=| on\w+=", texts["index.html"])
