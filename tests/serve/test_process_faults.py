"""Faults of a whole server, each repeatedly, as its clients see them: one answer each, and nobody else is touched."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.serving.clients import DRAW, EDIT, Answer, Client, ask, metrics
from benchmarks.serving.process import COMMAND, Process, running
from latentrt.bundle.bundle import EMBEDDED
from latentrt.serve import server
from tests.serve.test_load import Body, counted, drawn, until_idle, wanted, within
from tests.support.serve.fake_engine import HANGS, NAN, PATIENCE, RAISES, Fakes, fake_engine
from tests.support.serve.fake_server import fake
from tests.support.serve.fakes import png

TIMES = 3
COMPANY = 4
FORM = "multipart/form-data; boundary=x"


def form(*files: bytes, prompt: str = "an owl", names: tuple[str, ...] = ("image", "mask"), **fields: object) -> bytes:
    """The body of an edit."""
    parts = []
    for name, file in zip(names, files, strict=False):
        head = f'--x\r\nContent-Disposition: form-data; name="{name}"; filename="a.png"\r\n'
        parts.append(head.encode() + b"Content-Type: image/png\r\n\r\n" + file)
    for name, value in {"prompt": prompt, "num_inference_steps": 2, **fields}.items():
        parts.append(f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}'.encode())
    return b"\r\n".join([*parts, b"--x--\r\n"])


def rough(side: int) -> bytes:
    """A PNG that does not shrink."""
    from io import BytesIO

    from PIL import Image

    file = BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def together(one: Process, *bodies: Body) -> list[Answer]:
    async def go() -> list[Answer]:
        return list(await asyncio.gather(*[ask(one.url, DRAW, body) for body in bodies]))

    answers: list[Answer] = within(PATIENCE, go)
    return answers


def are_right(bodies: list[Body], answers: list[Answer]) -> None:
    """Every picture is the one that its seed makes."""
    with fake_engine(Fakes(), lanes=16) as engine:
        for body, answer in zip(bodies, answers, strict=True):
            assert answer.status == 200, answer.body
            for got, expected in zip(answer.pictures(), drawn(engine, body), strict=True):
                np.testing.assert_array_equal(got, np.asarray(expected))


@pytest.mark.parametrize(("mood", "faults"), [(RAISES, TIMES), (NAN, 0)], ids=["raises", "nan"])
def test_a_sick_picture_is_one_500_and_the_rest_go_on(mood: str, faults: int) -> None:
    """The same steps for all, so that the company surely shares them with the sick one."""
    bodies = [{**wanted(seed), "num_inference_steps": 8} for seed in range(COMPANY)]
    with running("--lanes", "16", command=fake()) as one:
        for _ in range(TIMES):
            sick, *answers = together(one, {**wanted(9), "prompt": mood}, *bodies)
            assert (sick.status, sick.code) == (500, "engine_error")
            are_right(bodies, answers)
            one.wait_ready()
        found = within(PATIENCE, lambda: until_idle(one.url))
        assert one.stop() == 0
    assert counted(found, "requests", "outcome") == {"ok": TIMES * COMPANY, "engine_error": TIMES}
    assert counted(found, "engine_faults", "kind").get("raised", 0) == faults


def test_a_step_that_hangs_is_told_to_all_and_ends_the_process() -> None:
    for _ in range(2):
        with running("--lanes", "16", "--hang-timeout", "0.5", command=fake()) as one:
            answers = together(one, {**wanted(9), "prompt": HANGS}, *[wanted(seed) for seed in range(COMPANY)])
            assert {(answer.status, answer.code) for answer in answers} <= {(500, "engine_error"), (200, "")}
            assert answers[0].status == 500
            assert "has not returned" in answers[0].json()["error"]["message"]
            assert one.end() == server.HUNG
        assert one.log[-1]["level"] == "critical"
        assert one.log[-1]["exit_code"] == server.HUNG


def test_a_killed_process_breaks_connections_and_nothing_else(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(EMBEDDED, bundle)
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    for _ in range(TIMES):
        with running("--bundle", str(bundle), "--max-steps", "999") as one:
            assert within(PATIENCE, lambda: ask(one.url, DRAW, wanted(1))).status == 200
            assert within(PATIENCE, lambda: _killed(one)) == COMPANY
            assert one.end() == -signal.SIGKILL
    assert {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()} == before


async def _killed(one: Process) -> int:
    """How many clients see their connection break; none may wait for ever."""
    body = {"prompt": "a", "num_inference_steps": 999, "size": "512x512"}
    asked = [asyncio.ensure_future(ask(one.url, DRAW, body)) for _ in range(COMPANY)]
    while not (await metrics(one.url))["latentrt:num_images_running"]:
        await asyncio.sleep(0.01)
    one.process.kill()
    outcomes = await asyncio.gather(*asked, return_exceptions=True)
    return sum(isinstance(outcome, asyncio.IncompleteReadError | ConnectionError) for outcome in outcomes)


@pytest.mark.parametrize(
    "damage",
    [
        lambda root: (root / "manifest.json").write_text("{"),
        lambda root: _flip(next(root.glob("unet/*.safetensors"))),
        lambda root: os.truncate(next(root.rglob("vae*/*.onnx")), 100),
        lambda root: next(root.glob("unet/*.safetensors")).unlink(),
        lambda root: shutil.rmtree(root),
    ],
    ids=["manifest", "bits", "truncated", "missing", "gone"],
)
def test_a_damaged_bundle_is_refused_at_the_start(tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(EMBEDDED, bundle)
    damage(bundle)
    command = ["latentrt", "serve", "--bundle", str(bundle), "--port", "0"]
    script = "import sys; from latentrt.command.main import main; sys.argv[0] = 'latentrt'; main()"
    ended = subprocess.run(
        [COMMAND[0], "-c", script, *command[1:]], capture_output=True, text=True, check=False, timeout=60
    )
    assert ended.returncode not in (0, 70)
    assert "Traceback" not in ended.stderr
    assert str(bundle) in ended.stderr.replace("\n", "")


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_full_disk_costs_the_upload_that_needs_it_alone() -> None:
    """Uploads beyond a megabyte are kept in a file: no file may have a byte from now on."""
    with running(command=fake()) as one:
        large, small = form(rough(700)), form(rough(64))
        assert within(PATIENCE, lambda: ask(one.url, EDIT, large, FORM)).status == 200
        resource.prlimit(one.process.pid, resource.RLIMIT_FSIZE, (0, 0))
        for _ in range(TIMES):
            refused = within(PATIENCE, lambda: ask(one.url, EDIT, large, FORM))
            assert (refused.status, refused.code) == (503, "insufficient_storage")
            assert within(PATIENCE, lambda: ask(one.url, EDIT, small, FORM)).status == 200
            are_right([wanted(1)], together(one, wanted(1)))
        assert one.answers("/health/ready")
        assert within(PATIENCE, lambda: until_idle(one.url))
        assert one.stop() == 0


def test_a_log_that_cannot_be_written_stops_nothing() -> None:
    with Path("/dev/full").open("w") as full, _free_port() as port:
        process = subprocess.Popen([*COMMAND, "--port", str(port), "--log-format", "json"], stderr=full)
        try:
            url = f"http://127.0.0.1:{port}"
            assert within(PATIENCE, lambda: _first(url)).status == 200
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) in (0, 120)  # 120 is Python's own: standard error could not be flushed
        finally:
            process.kill()
            process.wait()


class _free_port:  # noqa: N801 - used like a function
    """A port that was free a moment ago."""

    def __enter__(self) -> int:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            return int(sock.getsockname()[1])

    def __exit__(self, *_: object) -> None:
        pass


async def _first(url: str) -> Answer:
    """The first answer of a server that starts."""
    while True:
        with suppress(ConnectionError):
            answer = await ask(url, DRAW, wanted(1))
            if answer.status != 503:
                return answer
        await asyncio.sleep(0.05)


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
            f"POST {EDIT} HTTP/1.1\r\nHost: x\r\nContent-Type: {FORM}\r\nContent-Length: 999\r\n\r\n--x".encode()
        )
        reading = asyncio.ensure_future(client.head())
        while not reading.done():
            client.writer.write(b"-")
            await asyncio.sleep(0.05)
        status, headers = await reading
        assert headers["connection"] == "close"
        return status


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
            while (await metrics(one.url))["latentrt:num_images_running"]:
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
    while not (await metrics(url))["latentrt:num_images_running"]:
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
        drawing = now["latentrt:num_images_running"] + now["latentrt:num_images_waiting"]
        if not drawing and now["latentrt:num_requests_running"] == requests:
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
            while (await metrics(one.url))["latentrt:num_images_waiting"] < crowd:
                await asyncio.sleep(0.02)
            more = one.memory - before
        await until_idle(one.url)
        return more

    with running("--lanes", "2", "--max-steps", "999", command=fake()) as one:
        assert within(PATIENCE, lambda: ask(one.url, EDIT, upload, FORM)).status == 200
        files = one.descriptors
        more = within(PATIENCE, lambda: go(one))
        assert more < crowd * len(upload) / 2**20 / 3
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
    import zlib

    with running(command=fake()) as one:
        body = zlib.compress(json.dumps({"prompt": "a" * 50_000_000}).encode())

        async def go() -> int:
            head = f"POST {DRAW} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Encoding: deflate\r\n"
            async with await Client.connect(one.url) as client:
                client.writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                status, _ = await client.head()
                return status

        before = one.peak
        assert within(PATIENCE, go) == 400
        assert one.peak - before < 8
