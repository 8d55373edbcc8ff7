"""Ray Serve: two replicas on this machine are one server. Slow; needs the extra `ray`, which `test` does not have."""

from __future__ import annotations

import base64
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from click.testing import CliRunner
from PIL import Image

from benchmarks.serving.process import Process, running
from latentrt import Engine
from latentrt.command.serve import serve
from latentrt.errors import BackendError, MissingDependencyError, RequestError
from latentrt.serve import ray_scaling
from latentrt.serve.process.config import Settings, load_settings

EXAMPLE = Path(__file__).parents[3] / "examples" / "serve" / "ray.yaml"
KEY = "a-key"
HEADERS = {"authorization": f"Bearer {KEY}"}
LONG = {"prompt": "an owl", "num_inference_steps": 60, "size": "256x256"}
PATIENCE = 900

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'latentrt[ray]'")
by_ray = pytest.mark.usefixtures("quiet_ray")


@pytest.fixture
def quiet_ray() -> None:
    """Ray's modules, without what they warn of while they are imported."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import latentrt.serve.ray_app  # noqa: F401


# ---- Settings and parts, without a cluster


@pytest.mark.parametrize(("given", "bounds"), [("1", (1, 1)), (3, (3, 3)), ("1:4", (1, 4))])
def test_replicas_are_a_number_or_a_range(given: Any, bounds: tuple[int, int]) -> None:
    settings = load_settings({"ray": True, "replicas": given})
    assert (settings.fewest_replicas, settings.most_replicas) == bounds


@pytest.mark.parametrize("text", ["0", "", "4:1", "1:2:3", "-1", "two"])
def test_other_replicas_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match="replicas"):
        load_settings({"ray": True, "replicas": text})


def test_one_process_has_no_replicas() -> None:
    with pytest.raises(RequestError, match="needs ray"):
        load_settings({"replicas": "2"})


def test_without_ray_the_command_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "latentrt.serve.ray_app", raising=False)
    result = CliRunner().invoke(serve, ["--ray"])
    assert isinstance(result.exception, MissingDependencyError)
    assert "latentrt[ray]" in result.exception.fix


@needs_ray
@by_ray
def test_ray_neither_batches_nor_queues_without_bound() -> None:
    from latentrt.serve import ray_app

    settings = Settings(ray=True, replicas="1:4", queue=10, lanes=8, threads=2, drain_timeout=7)
    config = ray_app.application(settings)._bound_deployment._deployment_config
    assert config.max_ongoing_requests == 10 + 8 + ray_app.BESIDE
    assert config.max_queued_requests == 10 * ray_app.BEFORE
    assert config.backpressure_config.status_code == 429
    assert config.graceful_shutdown_timeout_s == 7
    scaling = config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.policy.policy_kwargs) == (1, 4, {"seats": 4})


@needs_ray
@by_ray
@pytest.mark.parametrize(
    ("settings", "needs"),
    [
        ({"threads": 2}, {"num_cpus": 2}),
        ({"device": "cuda"}, {"num_gpus": 1, "num_cpus": 1}),
        ({"backend": "tensorrt"}, {"num_gpus": 1, "num_cpus": 1}),
        ({"backend": "openvino", "threads": 2}, {"num_cpus": 2}),
    ],
)
def test_a_replica_has_a_gpu_of_its_own_or_its_threads(settings: dict[str, Any], needs: dict[str, int]) -> None:
    from latentrt.serve import ray_app

    deployment = ray_app.application(Settings(**settings))._bound_deployment
    assert deployment.ray_actor_options == needs


@needs_ray
@by_ray
def test_a_gpu_by_number_is_refused() -> None:
    from latentrt.serve import ray_app

    with pytest.raises(BackendError, match="cuda:1"):
        ray_app.app({"device": "cuda:1"})


@needs_ray
@by_ray
def test_a_configuration_file_has_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from latentrt.serve import ray_app

    (tmp_path / "a.toml").write_text("queue = 5\nlanes = 4\nmax_steps = 60\n")
    monkeypatch.setenv("LATENTRT_LANES", "6")
    made = ray_app.app({"config": str(tmp_path / "a.toml"), "max_steps": 50})
    assert made._bound_deployment._deployment_config.max_ongoing_requests == 5 + 6 + ray_app.BESIDE
    with pytest.raises(RequestError, match="max_stepps"):
        ray_app.app({"max_stepps": 50})


@needs_ray
@by_ray
def test_metrics_of_replicas_are_one_text() -> None:
    from latentrt.serve import ray_app
    from latentrt.serve.process.metrics import Metrics

    replicas = []
    for number, name in enumerate("ab"):
        metrics = Metrics("emoji")
        for _ in range(number + 1):
            metrics.ended("done", 1.0)
        replicas.append((name, list(metrics.registry.collect())))
    lines = ray_app.merged(replicas).decode().splitlines()
    assert lines.count("# TYPE latentrt_images_total counter") == 1
    images = [line for line in lines if line.startswith("latentrt_images_total{")]
    assert images == [
        f'latentrt_images_total{{model_name="emoji",outcome="done",replica="{name}"}} {count}.0'
        for name, count in (("a", 1), ("b", 2))
    ]


# ---- Two replicas


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    if find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install 'latentrt[ray]'")
    config = tmp_path_factory.mktemp("ray") / "latentrt.toml"
    config.write_text(f'replicas = "2"\nthreads = 1\nkeys = ["{KEY}"]\n', encoding="utf-8")
    with running("--ray", "--config", str(config)) as process:
        yield process


def ask(process: Process, **body: Any) -> httpx.Response:
    url = f"{process.url}/v1/images/generations"
    return httpx.post(url, json={"prompt": "an owl", **body}, headers=HEADERS, timeout=PATIENCE, trust_env=False)


def told(process: Process, name: str) -> dict[str, float]:
    """A metric's values by replica."""
    lines = httpx.get(f"{process.url}/metrics", timeout=PATIENCE, trust_env=False).text.splitlines()
    found = [line for line in lines if line.startswith(f"latentrt_{name}{{")]
    return {line.split('replica="')[1].split('"')[0]: float(line.split()[-1]) for line in found}


def eventually(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.1)


def in_background(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def pixels(data: str | None) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(base64.b64decode(data or ""))))


@needs_ray
@pytest.mark.slow
def test_both_draw_what_the_engine_draws(two: Process) -> None:
    assert len(told(two, "ready")) == 2
    with Engine.load(threads=1) as sd:
        expected = [sd("an owl", seed=seed, steps=4)[0] for seed in range(4)]
    rounds = 0
    while rounds < 2 or len(told(two, "images_total")) < 2:
        answers = [ask(two, seed=seed, num_inference_steps=4) for seed in range(4)]
        for answer, picture in zip(answers, expected, strict=True):
            np.testing.assert_array_equal(pixels(answer.json()["data"][0]["b64_json"]), picture)
        rounds += 1
    assert sum(told(two, "images_total").values()) == 4 * rounds


@needs_ray
@pytest.mark.slow
def test_streams_forms_keys_and_ids_pass_through(two: Process) -> None:
    buffer = BytesIO()
    Image.new("RGB", (128, 128), "red").save(buffer, "PNG")
    with openai.OpenAI(base_url=f"{two.url}/v1", api_key=KEY, max_retries=0) as client:
        extra = {"seed": 7, "num_inference_steps": 8}
        events = list(client.images.generate(prompt="an owl", stream=True, partial_images=2, extra_body=extra))
        edited = client.images.edit(image=buffer.getvalue(), prompt="an owl", extra_body={**extra, "strength": 0.5})
    kind = "image_generation"
    assert [event.type for event in events] == [f"{kind}.partial_image"] * 2 + [f"{kind}.completed"]
    with Engine.load(threads=1) as sd:
        expected = sd("an owl", seed=7, steps=8, image=np.asarray(Image.open(buffer)), strength=0.5)[0]
    np.testing.assert_array_equal(pixels(edited.data[0].b64_json), expected)

    url = f"{two.url}/v1/models"
    refused = httpx.get(url, trust_env=False)
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    known = httpx.get(url, headers={**HEADERS, "x-request-id": "mine"}, trust_env=False)
    assert known.headers.get_list("x-request-id") == ["mine"]
    assert httpx.get(url, headers=HEADERS, trust_env=False).headers["x-request-id"]


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_lanes(two: Process, stream: bool) -> None:
    with httpx.Client(timeout=2, headers=HEADERS, trust_env=False) as client, pytest.raises(httpx.ReadTimeout):
        client.post(
            f"{two.url}/v1/images/generations", json={**LONG, "size": "512x512", "n": 4, "stream": stream}
        ).read()
    eventually(lambda: not any(told(two, "num_images_running").values()))
    assert not any(told(two, "num_images_waiting").values())


@needs_ray
@pytest.mark.slow
def test_a_replica_that_is_killed_is_replaced(two: Process) -> None:
    import psutil

    before = set(told(two, "ready"))
    answers: list[httpx.Response] = []
    drawing = [in_background(lambda: answers.append(ask(two, **LONG, n=2))) for _ in range(4)]
    eventually(lambda: all(told(two, "num_images_running").values()))
    children = psutil.Process(two.process.pid).children(recursive=True)
    replicas = [child for child in children if "ServeReplica:latentrt" in "".join(child.cmdline())]
    assert len(replicas) == 2
    replicas[0].kill()
    for thread in drawing:
        thread.join()
    codes = [answer.status_code for answer in answers]
    assert set(codes) == {200, 503}
    lost = next(answer for answer in answers if answer.status_code == 503)
    assert (lost.json()["error"]["code"], lost.headers["retry-after"]) == ("not_ready", "1")
    assert ask(two, num_inference_steps=2).status_code == 200
    eventually(lambda: len(told(two, "ready")) == 2)
    assert len(before & set(told(two, "ready"))) == 1


@needs_ray
@pytest.mark.slow
def test_a_signal_drains_both(two: Process) -> None:
    answers: list[httpx.Response] = []
    drawing = [in_background(lambda: answers.append(ask(two, **LONG, n=2))) for _ in range(4)]
    eventually(lambda: sum(told(two, "num_images_running").values()) == 8)
    two.process.send_signal(signal.SIGTERM)
    late = ask(two, num_inference_steps=2)
    while late.status_code == 200:
        late = ask(two, num_inference_steps=2)
    assert (late.status_code, late.json()["error"]["code"]) == (503, "draining")
    for thread in drawing:
        thread.join()
    assert [answer.status_code for answer in answers] == [200] * 4
    assert two.end() == 0


# ---- Ray's own command and configuration file


@needs_ray
@pytest.mark.slow
def test_the_example_configuration_scales_with_the_load(tmp_path: Path) -> None:
    import yaml

    from latentrt.serve import server

    config = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))
    (own,) = config["applications"]
    (deployment,) = own["deployments"]
    with server.listening(Settings(port=0)) as sock:
        config["http_options"]["port"] = sock.getsockname()[1]
    own["args"] = {"replicas": "1:2", "threads": 1}
    deployment["ray_actor_options"] = {"num_cpus": 1}
    deployment["autoscaling_config"] = {
        "min_replicas": 1,
        "max_replicas": 2,
        "policy": {"policy_function": ray_scaling.PATH, "policy_kwargs": {"seats": 1}},
        "upscale_delay_s": 1,
        "look_back_period_s": 2,
    }
    path = tmp_path / "ray.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [sys.executable, "-m", "ray.serve.scripts", "run", str(path)]
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{config['http_options']['port']}"
    try:
        eventually(lambda: answers(f"{url}/health/ready"))
        one = Address(url)
        assert len(told(one, "ready")) == 1
        drawing = [in_background(lambda: ask(one, **LONG, n=2)) for _ in range(4)]
        eventually(lambda: len(told(one, "ready")) == 2)
        for thread in drawing:
            thread.join()
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) is not None


class Address:
    """A server that something else has started."""

    def __init__(self, url: str) -> None:
        self.url = url


def answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).is_success
    except httpx.TransportError:
        return False
