"""Whatever is sent, the answer is an error of the client's own, in its API's shape; schemathesis is in test_openapi."""

from __future__ import annotations

import asyncio
import gc
import json
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.serving.clients import DRAW, EDIT
from tests.support.serve.fakes import FakeScheduler, app_of, png

APP = app_of(FakeScheduler(), max_pixels=128 * 128, max_side=128, max_body=2_000_000)
SD = ("/sdapi/v1/txt2img", "/sdapi/v1/img2img")
few = settings(max_examples=60, deadline=None)


def answered(path: str, body: bytes, kind: str) -> int:
    """The status; what is no success has the API's shape."""

    async def go() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(APP), base_url="http://localhost") as client:
            return await client.post(path, content=body, headers={"content-type": kind})

    answer = asyncio.run(go())
    if answer.status_code >= 400 and path in SD:
        assert set(answer.json()) == {"error", "detail", "errors", "body", "param", "code"}
    elif answer.status_code >= 400:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert answer.status_code < 500, answer.text
    return answer.status_code


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = (
    "model",
    "n",
    "size",
    "seed",
    "num_inference_steps",
    "guidance_scale",
    "scheduler",
    "stream",
    "timeout",
    "background",
)


@few
@given(path=st.sampled_from((DRAW, *SD)), body=st.binary(max_size=200))
def test_bytes_as_json(path: str, body: bytes) -> None:
    assert answered(path, body, "application/json") in (200, 400, 422)


@few
@given(
    path=st.sampled_from((DRAW, *SD)),
    fields=st.dictionaries(st.sampled_from((*FIELDS, "init_images", "mask", "steps", "width")), anything, max_size=4),
    prompt=anything,
)
def test_fields_of_any_kind(path: str, fields: dict[str, Any], prompt: Any) -> None:
    body = json.dumps({**fields, "prompt": prompt}).encode()
    assert answered(path, body, "application/json") in (200, 202, 400, 404, 413, 422)


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (DRAW, {"user": "\ud800"}),
        (DRAW, {"safety_identifier": "\ud800", "stream": True}),
        (DRAW, {"scheduler": "\ud800"}),
        (DRAW, {"control": {"\ud800": {"image": "\ud800"}}}),
        (SD[0], {"hr_upscaler": "\ud800"}),
        (SD[0], {"alwayson_scripts": {"\ud800": {"\ud800": ["\ud800"]}}}),
        (SD[0], {"override_settings": {"\ud800": "\ud800"}}),
    ],
)
def test_half_a_surrogate_pair_can_be_repeated(path: str, fields: dict[str, Any]) -> None:
    """JSON's escapes may say one, and no answer can be sent with it."""
    assert answered(path, json.dumps({"prompt": "a", **fields}).encode(), "application/json") in (200, 400, 422)


PICTURE = png(64, 64)
parts = st.lists(
    st.tuples(
        st.sampled_from(("image", "image[]", "mask", "prompt", "n", "size", "seed", "strength", "other", "")),
        st.sampled_from(("", "a.png", "../../etc/passwd", '"', "a\0b")),
        st.sampled_from(
            (PICTURE, PICTURE[:50], b"", b"an owl", b"1", b"-1", b"\xff\xfe", b"64x64", b"0.5", b"\r\n--x")
        ),
    ),
    max_size=6,
)


@few
@given(parts=parts, end=st.sampled_from((b"--x--\r\n", b"--x--", b"--x", b"")), line=st.sampled_from((b"\r\n", b"\n")))
def test_forms_with_missing_duplicate_and_broken_parts(
    parts: list[tuple[str, str, bytes]], end: bytes, line: bytes
) -> None:
    body = b""
    for name, file, content in parts:
        named = f'; filename="{file}"' if file else ""
        head = f'Content-Disposition: form-data; name="{name}"{named}'.encode()
        body += b"--x" + line + head + line + line + content + line
    assert answered(EDIT, body + end, "multipart/form-data; boundary=x") in (200, 400, 413)


def test_a_form_that_breaks_off_leaves_no_file() -> None:
    """One of more than a MiB is on the disk until it is closed."""
    head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    assert answered(EDIT, head + bytes(2**20 + 1), "multipart/form-data; boundary=x") == 400
    gc.collect()  # what is left open warns, and warnings are errors


@few
@given(flips=st.lists(st.tuples(st.integers(0, len(PICTURE) - 1), st.integers(0, 255)), min_size=1, max_size=5))
def test_damaged_pictures(flips: list[tuple[int, int]]) -> None:
    damaged = bytearray(PICTURE)
    for place, value in flips:
        damaged[place] = value
    head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    prompt = b'\r\n--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nan owl\r\n--x--\r\n'
    assert answered(EDIT, head + bytes(damaged) + prompt, "multipart/form-data; boundary=x") in (200, 400)


@pytest.mark.parametrize("count", [100, 2000])
def test_a_form_of_very_many_parts_is_refused(count: int) -> None:
    part = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n'
    assert answered(EDIT, part * count + b"--x--\r\n", "multipart/form-data; boundary=x") == 400
