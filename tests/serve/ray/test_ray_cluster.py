"""Servers in one Ray cluster have names and paths of their own, or are refused. Slow; needs the extra `ray`."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import pytest

from benchmarks.serving.process import COMMAND, running
from latentrt.command.serve import RAY
from latentrt.serve.process.config import Settings
from latentrt.serve.server import listening
from tests.serve.ray.test_ray import PATIENCE, eventually, needs_ray


def free_port() -> int:
    with listening(Settings(port=0)) as sock:
        return int(sock.getsockname()[1])


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A cluster of this test's own, with a token, since all interfaces lead to it; RAY_ADDRESS names it."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    address = f"127.0.0.1:{free_port()}"
    head = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus", "4"]
    head += ["--node-ip-address", "127.0.0.1", "--port", address.rpartition(":")[2], "--include-dashboard", "false"]
    with TemporaryDirectory(prefix="ray-") as folder:
        log = (Path(folder) / "log").open("w")
        with (
            log,
            subprocess.Popen([*head, "--temp-dir", folder], env={**os.environ, **RAY}, stdout=log, stderr=log) as ray,
        ):
            try:
                eventually(
                    lambda: "Ray runtime started" in (Path(folder) / "log").read_text() or ray.poll() is not None
                )
                assert ray.poll() is None, (Path(folder) / "log").read_text()
                monkeypatch.setenv("RAY_ADDRESS", address)
                yield address
            finally:
                ray.terminate()  # ends the cluster's processes
                ray.wait(PATIENCE)


def refused(*flags: str) -> str:
    """Return what a server that does not start says."""
    command = [*COMMAND, "--ray", "--threads", "1", "--port", "0", *flags]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert ended.returncode != 0
    return ended.stderr


def drawn(url: str) -> str:
    """Return one picture's file in base64."""
    body = {"prompt": "an owl", "seed": 1, "num_inference_steps": 2}
    answer = httpx.post(f"{url}/v1/images/generations", json=body, timeout=PATIENCE, trust_env=False)
    return str(answer.json()["data"][0]["b64_json"])


@needs_ray
@pytest.mark.slow
def test_a_cluster_with_a_token_says_so(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    assert "asks for a token" in refused()


@needs_ray
@pytest.mark.slow
def test_a_second_one_has_a_name_and_a_path_of_its_own(cluster: str) -> None:
    with running("--ray", "--threads", "1", "--port", str(free_port())) as first:
        picture = drawn(first.url)
        assert "an application 'latentrt' runs in this cluster" in refused()
        assert "takes no application 'other' at /" in refused("--ray-name", "other")
        with running("--ray", "--threads", "1", "--ray-name", "other", "--ray-route", "/draw") as second:
            assert second.url == f"{first.url}/draw"
            assert drawn(second.url) == picture
            described = httpx.get(f"{second.url}/openapi.json", timeout=PATIENCE, trust_env=False).json()
            assert [one["url"] for one in described["servers"]] == ["."]
            page = httpx.get(second.url, timeout=PATIENCE, trust_env=False, follow_redirects=True)
            assert str(page.url) == f"{second.url}/"
            assert second.stop() == 0
        assert not second.answers("/health/ready")
        assert drawn(first.url) == picture
        assert first.stop() == 0
