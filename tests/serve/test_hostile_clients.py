"""Hostile clients of a whole server: slow ones, crowds of uploads, and files that burst when they are decoded."""

from __future__ import annotations

import asyncio
import json
import socket
import time
import zlib
from contextlib import AsyncExitStack, suppress

import pytest

from benchmarks.serving.clients import DRAW, EDIT, Answer, Client, ask, metrics
from benchmarks.serving.process import Process, running
from tests.support.serve.fake_engine import PATIENCE
from tests.support.serve.fake_server import fake
from tests.support.serve.fakes import png
from tests.support.serve.traffic import FORM, are_right, form, rough, together, until_idle, wanted, within

# ---- Slow clients


def test_bodies_that_dribble_are_given_up_and_hold_nobody_up() -> None:
    async def go(url: str) -> tuple[list[int], list[Answer]]:
        dribbling = [asyncio.ensure_future(_dribble(url)) for _ in range(40)]
        answers = [await ask(url, DRAW, wanted(1)) for _ in range(5)]
        return await asyncio.gather(*dribbling), answers

    with running("--body-timeout", "3", command=fake()) as one:
        files = one.descriptors
        statuses, answers = within(PATIENCE, lambda: go(one.url))
        assert statuses == [408] * 40
        are_right([wanted(1)] * 5, answers)
        while one.descriptors > files:
            time.sleep(0.01)
        assert one.stop() == 0


async def _dribble(url: str) -> int:
    async with await Client.connect(url) as client:
        client.writer.write(
            f"POST {EDIT} HTTP/1.1\r\nHost: [::1]\r\nContent-Type: {FORM}\r\nContent-Length: 999\r\n\r\n--x".encode()
        )
        reading = asyncio.ensure_future(client.head())
        while not reading.done():
            client.writer.write(b"-")
            await asyncio.sleep(0.05)
        status, headers = await reading
        assert headers["connection"] == "close"
        return status


def test_a_head_without_end_is_not_kept() -> None:
    async def go(url: str) -> int:
        async with await Client.connect(url) as client:
            client.writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\nA: ")
            reading = asyncio.ensure_future(client.head())
            sent = 0
            while not reading.done():
                client.writer.write(b"x" * 2**12)
                sent += 2**12
                await asyncio.sleep(0.001)
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                assert (await reading)[0] == 400
            return sent

    with running(command=fake()) as one:
        assert within(PATIENCE, lambda: go(one.url)) < 2**20
        assert one.stop() == 0


def test_a_stream_that_nobody_reads_is_given_up_and_takes_no_lanes() -> None:
    """It is drawn, since that is what was ordered; then it holds what could not be sent until it is hung up on."""
    body = {
        "prompt": "an owl",
        "n": 2,
        "size": "768x768",
        "num_inference_steps": 2,
        "stream": True,
        "partial_images": 1,
    }

    async def go(one: Process) -> Answer:
        async with await deaf(one.url) as reader:
            reader.send(DRAW, body)
            await until_idle_but(one.url, 1)
            answer = await ask(one.url, DRAW, wanted(1))
            await until_idle(one.url)
            return answer

    with running("--lanes", "16", "--stall-timeout", "2", command=fake(0, "rough")) as one:
        before = one.peak
        assert within(PATIENCE, lambda: go(one)).status == 200
        assert one.peak - before < 100, one.peak
        assert one.stop() == 0
    gone = [line for line in one.requests() if line["outcome"] == "client_gone"]
    assert len(gone) == 1


def test_a_stream_that_is_read_a_byte_at_a_time_is_given_up_with_its_lanes() -> None:
    """TCP sees a client that reads; the picture would take minutes more."""
    body = {"prompt": "an owl", "size": "1024x1024", "num_inference_steps": 999, "stream": True, "partial_images": 3}

    async def go(one: Process) -> None:
        async with await deaf(one.url) as reader:
            reader.send(DRAW, body)
            await until_busy(one.url)
            while (await metrics(one.url))["latentrt_num_images_running"]:
                await reader.reader.read(1)
                await asyncio.sleep(0.05)
            await until_idle(one.url)

    with running("--lanes", "2", "--max-steps", "999", "--stall-timeout", "1", command=fake(0.01, "rough")) as one:
        within(PATIENCE, lambda: go(one))
        assert one.stop() == 0
    (line,) = one.requests()
    assert (line["outcome"], line["done"]) == ("client_gone", 0)


async def until_busy(url: str) -> None:
    """Something is drawn."""
    while not (await metrics(url))["latentrt_num_images_running"]:
        await asyncio.sleep(0.02)


async def deaf(url: str) -> Client:
    """A client with hardly any room for what it does not read."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    host, _, port = url.removeprefix("http://").rpartition(":")
    sock.connect((host, int(port)))
    return Client(*await asyncio.open_connection(sock=sock, limit=1024))


async def until_idle_but(url: str, requests: int) -> None:
    """Nothing is drawn any more, and so many requests are not over."""
    while True:
        now = await metrics(url)
        drawing = now["latentrt_num_images_running"] + now["latentrt_num_images_waiting"]
        if not drawing and now["latentrt_num_requests_running"] == requests:
            return
        await asyncio.sleep(0.02)


# ---- Hostile uploads


def bomb(side: int) -> bytes:
    """Nothing, in a few bytes, that becomes three times side² bytes."""
    return png(side, side)


def test_uploads_that_wait_are_not_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """One picture has all lanes, so that all of a crowd's edits wait."""
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")  # as deployed: else each thread keeps what it has freed
    crowd, upload = 32, form(rough(1500))

    async def go(one: Process) -> float:
        async with AsyncExitStack() as stack, await Client.connect(one.url) as long:
            long.send(DRAW, {"prompt": "an owl", "num_inference_steps": 999})
            await until_busy(one.url)
            before = one.memory
            for _ in range(crowd):
                client = await stack.enter_async_context(await Client.connect(one.url))
                client.send(EDIT, upload, FORM)
            while (await metrics(one.url))["latentrt_num_images_waiting"] < crowd:
                await asyncio.sleep(0.02)
            while one.descriptors > files + 1 + crowd:  # until all are decoded, and their temporary files closed
                await asyncio.sleep(0.02)
            more = one.memory - before
        await until_idle(one.url)
        return more

    with running("--lanes", "2", "--max-steps", "999", command=fake()) as one:
        assert within(PATIENCE, lambda: ask(one.url, EDIT, upload, FORM)).status == 200
        files = one.descriptors
        more = within(PATIENCE, lambda: go(one))
        assert more < crowd * len(upload) / 2**20 / 2
        while one.descriptors > files:
            time.sleep(0.01)
        assert one.stop() == 0


@pytest.mark.parametrize(
    ("file", "code"),
    [
        (bomb(9000), "image_decode_failed"),
        (png(40_000, 4500, mode="1"), "image_decode_failed"),
        (png(3000, 3000, kind="GIF", mode="P"), "image_decode_failed"),
        (rough(300)[:-5000], "image_decode_failed"),
        (b"", "image_decode_failed"),
    ],
    ids=["pixels", "wide", "kind", "cut", "empty"],
)
def test_bombs_are_refused_before_they_burst(file: bytes, code: str) -> None:
    with running("--lanes", "16", command=fake()) as one:
        assert within(PATIENCE, lambda: ask(one.url, EDIT, form(png()), FORM)).status == 200
        before = one.peak

        async def throw() -> list[Answer]:
            return list(await asyncio.gather(*[ask(one.url, EDIT, form(file), FORM) for _ in range(20)]))

        answers = within(PATIENCE, throw)
        assert {(answer.status, answer.code) for answer in answers} == {(400, code)}
        assert one.peak - before < 64
        are_right([wanted(1)], together(one, wanted(1)))
        assert one.stop() == 0


def test_what_is_zipped_is_not_unzipped() -> None:
    with running(command=fake()) as one:
        body = zlib.compress(json.dumps({"prompt": "a" * 50_000_000}).encode())

        async def go() -> int:
            head = f"POST {DRAW} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            head += "Content-Encoding: deflate\r\n"
            async with await Client.connect(one.url) as client:
                client.writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                status, _ = await client.head()
                return status

        before = one.peak
        assert within(PATIENCE, go) == 400
        assert one.peak - before < 8
