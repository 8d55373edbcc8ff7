"""Faults of a whole server, each repeatedly, as its clients see them: one answer each, and others go on."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serving.clients import DRAW, EDIT, Answer, ask, metrics
from benchmarks.serving.process import COMMAND, Process, running
from latentrt.bundle.bundle import EMBEDDED
from latentrt.serve import server
from tests.support.serve.fake_engine import HANGS, NAN, PATIENCE, RAISES
from tests.support.serve.fake_server import fake
from tests.support.serve.traffic import FORM, are_right, counted, form, rough, together, until_idle, wanted, within

TIMES = 3
COMPANY = 4


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
    with running("--lanes", "16", "--hang-timeout", "3", command=fake()) as one:
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
    """How many clients see their connection break; none may wait without end."""
    body = {"prompt": "a", "num_inference_steps": 999, "size": "512x512"}
    asked = [asyncio.ensure_future(ask(one.url, DRAW, body)) for _ in range(COMPANY)]
    while not (await metrics(one.url))["latentrt_num_images_running"]:
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
        [COMMAND[0], "-c", script, *command[1:]], capture_output=True, text=True, check=False, timeout=PATIENCE
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
            assert process.wait(PATIENCE) in (0, 120)  # 120 is Python's own: standard error could not be flushed
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
