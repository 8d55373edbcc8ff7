"""What docs/deploy.md and examples/serve promise: files that are read, metrics that exist, a client that draws."""

from __future__ import annotations

import asyncio
import configparser
import json
import re
import runpy
import shutil
import subprocess
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.serving.process import running
from latentrt.serve.process.config import load_settings
from latentrt.serve.process.metrics import Metrics

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "serve"
PAGE = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.read(EXAMPLES / "latentrt.service", encoding="utf-8")
    return parser


def test_the_client_draws_with_previews(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running("--threads", "1") as server:
        monkeypatch.setenv("LATENTRT_URL", f"{server.url}/v1")
        monkeypatch.chdir(tmp_path)
        runpy.run_path(str(EXAMPLES / "client.py"))
    names = ["apple-0.png", "apple-1.png", "apple.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert {Image.open(BytesIO((tmp_path / name).read_bytes())).size for name in names} == {(128, 128)}


def test_the_times_of_unit_and_proxy_fit_the_settings() -> None:
    settings = load_settings({}, EXAMPLES / "latentrt.toml")
    assert int(unit()["Service"]["TimeoutStopSec"]) >= settings.drain_timeout + 10
    proxy = (EXAMPLES / "nginx.conf").read_text(encoding="utf-8")
    patience = re.search(r"proxy_read_timeout (\d+)s", proxy)
    assert patience is not None
    assert int(patience[1]) > load_settings({}).queue_timeout + load_settings({}).run_timeout
    body = re.search(r"client_max_body_size (\d+)m", proxy)
    assert body is not None
    assert int(body[1]) << 20 == settings.max_body


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_reads_the_unit(tmp_path: Path) -> None:
    text = (EXAMPLES / "latentrt.service").read_text(encoding="utf-8")
    path = tmp_path / "latentrt.service"
    path.write_text(text.replace("/opt/latentrt/bin/latentrt", "/bin/true"), encoding="utf-8")
    result = subprocess.run(["systemd-analyze", "verify", str(path)], capture_output=True, text=True)
    assert (result.returncode, "latentrt.service" in result.stderr) == (0, False), result.stderr


QUERIES = [PAGE, *((EXAMPLES / name).read_text(encoding="utf-8") for name in ("alerts.yml", "dashboard.json"))]


@pytest.mark.parametrize("text", QUERIES, ids=["page", "alerts", "dashboard"])
def test_queries_ask_for_metrics_that_exist(text: str) -> None:
    metrics = Metrics("emoji")
    made = ("num_images_running", "num_images_waiting", "ready", "model_loaded")
    for name in (*made, "background_results", "background_results_bytes"):  # with the application
        metrics.gauge(name, name, lambda: 0.0)
    metrics.gpu_memory(lambda: (1, 2))
    told = set(re.findall(r"latentrt_\w+", asyncio.run(metrics.text()).decode()))
    asked = set(re.findall(r"latentrt_\w+", text.replace("latentrt_export", "")))
    assert asked
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in asked} <= told


def test_the_dashboard_is_one() -> None:
    """As Grafana's model of a dashboard has it: panels with queries, that do not lie on each other."""
    board = json.loads((EXAMPLES / "dashboard.json").read_text(encoding="utf-8"))
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
    assert len(set(places)) == len(places)
    assert all(target["expr"] for panel in board["panels"] for target in panel["targets"])
    assert len({panel["id"] for panel in board["panels"]}) == len(places)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool: apt-get install prometheus")
def test_promtool_likes_names_and_rules(tmp_path: Path) -> None:
    metrics = Metrics("emoji")
    metrics.gauge("ready", "1 if requests are taken.", lambda: 1.0)
    metrics.ended_request("/v1/images/generations", "ok", 200, 1.0)
    metrics.faulted(True)
    metrics.ended_job("completed", 1.0)
    metrics.forgot("expired")
    metrics.sent("delivered")
    metrics.gauge("background_results_bytes", "Bytes of their pictures.", lambda: 1.0)
    metrics.of("other").loaded(1.0)
    metrics.drew(2, "512x512", "key-1a2b3c4d")
    metrics.gpu_memory(lambda: (1, 2))
    text = asyncio.run(metrics.text())
    checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")
    board = json.loads((EXAMPLES / "dashboard.json").read_text(encoding="utf-8"))
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    rules = [{"record": f"a{number}", "expr": query} for number, query in enumerate(asked)]
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "all", "rules": rules}]}), encoding="utf-8")
    for path in (tmp_path / "rules.yml", EXAMPLES / "alerts.yml"):
        checked = subprocess.run(["promtool", "check", "rules", str(path)], capture_output=True)
        assert checked.returncode == 0, checked.stderr


def test_every_file_of_the_examples_is_named_on_the_page() -> None:
    assert {path.name for path in EXAMPLES.iterdir() if path.name not in PAGE} == set()
    assert {name for name in re.findall(r"examples/serve/([\w.]+)", PAGE) if not (EXAMPLES / name).is_file()} == set()


def test_every_setting_that_the_page_names_is_one() -> None:
    names = set(re.findall(r"LATENTRT_([A-Z_]+)", PAGE)) - {"KEYS"}
    flags = set(re.findall(r"latentrt serve[^\n`#]*", PAGE))
    known = set(load_settings({}).model_dump()) | {"config", "print_config"}
    assert {name.lower() for name in names} <= known
    assert {flag.replace("-", "_") for line in flags for flag in re.findall(r"--([a-z-]+)", line)} <= known
