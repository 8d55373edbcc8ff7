"""The GPU benchmark runs from end to end on stand-ins, and reports what was not measured."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from benchmarks.gpu import command
from benchmarks.gpu import run as benchmark
from benchmarks.gpu.child import Deadline, NotMeasuredError
from benchmarks.gpu.config import SIDES, Config
from benchmarks.gpu.report import figures, page
from benchmarks.gpu.results import Results
from benchmarks.report import write
from latentrt.bundle.bundle import EMBEDDED
from latentrt.errors import BackendError, RequestError

CHEAP = ("diffusers", "ort-ticks", "ort", "trt-loop", "compile")  # all code of all sides


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yield the embedded model, with a cache of these tests' own for its plans."""
    folder = tmp_path_factory.mktemp("gpu")
    shutil.copytree(EMBEDDED, folder / "bundle")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
        yield folder / "bundle"


def small(bundle: Path, **options: Any) -> Config:
    chosen = {"batches": (1,), "steps": 2, "size": (32, 32), "repeats": 1, "calls": 1, "drift": (2,), "limit": 3600.0}
    return Config(bundle=bundle, **{**chosen, "hardware": "tests.support.gpu.emulated", **options})


@pytest.mark.slow
def test_the_whole_benchmark_runs(bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    results = benchmark.run(small(bundle, sides=CHEAP), tmp_path)
    assert set(results.measured()) == set(CHEAP), capfd.readouterr().out
    data = json.loads((tmp_path / "gpu-sd15.json").read_text())
    for side in CHEAP:
        found = figures.figures_of(data, side, 1)
        assert found is not None
        assert found.image_ms.median > 0
        assert found.device_ms.median > 0
        assert found.iterations.median == pytest.approx(2000 / found.image_ms.median)
        assert set(found.alone) == {"text", "unet", "vae"}
        assert min(found.alone.values()) > 0
        assert found.share is not None
        assert found.record["host_bytes"] > 1e8
        assert found.record["cold_seconds"] > found.record["first_seconds"] > 0
        assert side == "diffusers" or found.record["psnr_db"] > 40
    assert [plan["network"] for plan in data["sides"]["trt-loop"]["1"]["plans"]] == [
        "text_encoder",
        "unet_text",
        "unet",
        "vae_decoder",
    ]
    drift = {kind: part["relative"] for kind, part in data["drift"]["2"].items()}
    assert drift["diffusers"] == [0, 0]  # the stand-in's half precision is float32
    assert all(1e-5 < error < 5e-3 for kind in ("onnxruntime", "tensorrt") for error in drift[kind])
    assert str(tmp_path) not in json.dumps(data)
    assert str(bundle) not in json.dumps(data)
    write(tmp_path)
    text = (tmp_path / "GPU.md").read_text()
    missing = "ONNX Runtime, plain loop; TensorRT, one launch; diffusers, torch.compile, regional"
    assert f"Not measured: {missing}. It was not requested." in text
    assert text.count("| ONNX Runtime, one launch |") == 2  # its figures, and the time to its first picture
    for plot in ("latency", "rate", "drift"):
        assert f"gpu-sd15-{plot}.png" in text
        assert (tmp_path / f"gpu-sd15-{plot}.png").stat().st_size > 1000


def test_what_cannot_run_is_recorded_and_the_others_go_on(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the real hardware, which is missing here, or lacks this library."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    config = small(bundle, sides=("compile", "ort", "trt"), hardware="benchmarks.gpu.hardware", alone=True)
    results = benchmark.run(config, tmp_path)
    assert results.measured() == []
    reasons = {side: part["1"]["missing"] for side, part in results.data["sides"].items()}
    assert set(reasons) == {"compile", "ort", "trt"}
    assert "CUDA" in reasons["compile"]
    assert "CUDA" in reasons["ort"]
    assert "Needed: " in reasons["trt"]
    write(tmp_path)
    text = (tmp_path / "GPU.md").read_text()
    assert "missed" not in text
    assert all(reason in text for reason in reasons.values())


def test_figures_of_other_sides_and_batches_are_kept(tmp_path: Path) -> None:
    for side, batch in (("ort", 1), ("ort", 2), ("trt", 1)):
        results = Results.open(tmp_path, Config(size=(64, 64)))
        results.begin({"about": side})
        results.put(side, batch, {"seconds": [1.0]})
    data = Results.open(tmp_path, Config(size=(64, 64))).data
    assert {side: list(part) for side, part in data["sides"].items()} == {"ort": ["1", "2"], "trt": ["1"]}
    assert data["sides"]["ort"]["1"]["run"] in data["runs"]
    with pytest.raises(RequestError, match="another --results"):
        Results.open(tmp_path, Config(size=(32, 32)))


def test_a_page_without_figures_says_what_would_be_measured(tmp_path: Path) -> None:
    write(tmp_path)
    text = (tmp_path / "GPU.md").read_text()
    assert "python -m benchmarks gpu --preset sd15" in text
    assert text.count("not measured") == 3 * len(SIDES) + 2 * 6
    assert "| reached |" not in text


def made_up(seconds: float, unet: float, run: str = "a") -> dict[str, Any]:
    alone = {"text": [1.0], "unet": [unet], "vae": [9.0]}
    return {"run": run, "seconds": [seconds], "device_ms": [1000 * seconds], "alone_ms": alone, "host_bytes": 2**30}


def data_of(**sides: dict[str, Any]) -> dict[str, Any]:
    about = {"peak": {"tflops": 800.0}, "macs": {"unet": 401_600_000_000}}
    parts = {side.replace("_", "-"): {"1": record} for side, record in sides.items()}
    runs = {"a": about, "b": about}
    return {"preset": "sd15", "size": [512, 512], "steps": 50, "runs": runs, "sides": parts, "drift": {}}


def test_goals_are_held_against_the_best_of_ours() -> None:
    data = data_of(diffusers=made_up(2.0, 30.0), trt=made_up(0.2142, 4.0), ort=made_up(0.6, 11.0))
    data["sides"]["ort"]["16"] = made_up(5.0, 90.0)
    ratio, eager, compiled, rate, ort, sixteen = figures.goals(data)
    assert (ratio.measured, ratio.reached) == ("1.02 times", True)
    assert (eager.measured, eager.reached) == ("9.34 times", True)
    assert compiled.reached is None
    assert (rate.measured, rate.reached) == ("233.4 it/s", True)
    assert (ort.measured, ort.reached) == ("83.33 it/s", False)
    assert (sixteen.measured, sixteen.reached) == ("160 it/s", False)
    data["sides"] |= {side: {"1": made_up(took, 5.0)} for side, took in (("compile", 0.3), ("compile-regional", 0.24))}
    compiled = figures.goals(data)[2]
    assert (compiled.measured, compiled.reached) == ("1.12 times", True)  # over the faster one
    without = data_of(diffusers=made_up(2.0, 30.0, "b"), ort=made_up(0.8, 11.0))
    ratio, eager, *_ = figures.goals(without)
    assert "ONNX Runtime" in ratio.text
    assert (eager.measured, eager.reached) == ("2.5 times (in different runs)", False)


def test_the_share_of_the_peak_is_of_two_lanes() -> None:
    found = figures.figures_of(data_of(trt=made_up(0.2, 4.0)), "trt", 1)
    assert found is not None
    assert found.share == pytest.approx(1.6064 / 0.004 / 800)
    assert found.outside_ms == pytest.approx(200 - 1 - 9 - 50 * 4)
    assert found.iterations.median == 250


class Fragile:
    """A child of each side: the second round of `ort` fails, `trt` never opens; calls are recorded."""

    asked: ClassVar[list[tuple[str, str]]] = []
    age = 1.0

    def __init__(self, worker: str, config: Config, name: str = "") -> None:
        self.name, self.rounds = name, 0

    def ask(self, limit: float, method: str, *arguments: Any) -> Any:
        self.asked.append((self.name, method))
        self.rounds += method == "draw"
        if (self.name, method) == ("trt", "open") or (self.name == "ort" and self.rounds == 3):
            raise NotMeasuredError("CUDA out of memory")
        picture = np.zeros((4, 4, 3), np.uint8)
        answers = {"draw": (0.1, 100.0, [picture]), "alone": {"text": [1.0], "unet": [1.0], "vae": [1.0]}}
        return answers.get(method, 0)

    def close(self) -> None:
        self.asked.append((self.name, "close"))


def test_a_side_that_fails_on_the_way_is_not_asked_again_in_its_batch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bundle: Path
) -> None:
    monkeypatch.setattr(benchmark, "Child", Fragile)
    config = small(bundle, repeats=3)
    results = Results.open(tmp_path, config)
    results.begin({})
    runners = [benchmark.Runner(name, config, None, Deadline(None)) for name in ("diffusers", "ort", "trt")]
    Fragile.asked.clear()
    first: dict[int, Any] = {}
    for batch in (1, 2):
        benchmark.measure_batch(batch, runners, config, results, first)
    parts = {side: [part[batch] for batch in ("1", "2")] for side, part in results.data["sides"].items()}
    for side in ("ort", "trt"):
        assert [{"run", "missing"}] * 2 == [set(record) for record in parts[side]]
    assert [record["seconds"] for record in parts["diffusers"]] == [[0.1] * 3] * 2
    asked = [method for side, method in Fragile.asked if side == "ort"]
    assert asked == ["open", "draw", "host_peak", "draw", "alone", "draw", "close"] * 2  # a new process for each batch
    assert Fragile.asked.count(("diffusers", "close")) == 0


def test_a_side_has_figures_before_the_next_one_opens(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bundle: Path
) -> None:
    """So a run that is killed loses only the work in progress."""

    class Killing(Fragile):
        def ask(self, limit: float, method: str, *arguments: Any) -> Any:
            if self.name == "compile":
                raise KeyboardInterrupt
            return super().ask(limit, method, *arguments)

    monkeypatch.setattr(benchmark, "Child", Killing)
    config = small(bundle, repeats=3, batches=(1, 2), sides=("compile", "diffusers", "ort-loop"))
    monkeypatch.setattr(benchmark, "about_run", lambda *_: {"config": {"repeats": 3}, "peak": {}, "macs": {}})
    with pytest.raises(KeyboardInterrupt):
        benchmark.run(config, tmp_path)
    data = json.loads((tmp_path / "gpu-sd15.json").read_text())
    for side in ("diffusers", "ort-loop"):
        assert [data["sides"][side][batch]["seconds"] for batch in ("1", "2")] == [[0.1] * 3] * 2
    assert "compile" not in data["sides"]
    assert not list(tmp_path.glob("*.part"))


def test_what_there_was_no_time_for_is_recorded_and_replaces_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bundle: Path
) -> None:
    now = 1000.0

    class Slow(Fragile):
        def ask(self, limit: float, method: str, *arguments: Any) -> Any:
            nonlocal now
            assert 0 < limit <= 60
            now += 10
            return super().ask(limit, method, *arguments)

    monkeypatch.setattr(benchmark, "Child", Slow)
    monkeypatch.setattr("benchmarks.gpu.child.time.monotonic", lambda: now)
    monkeypatch.setattr(benchmark, "about_run", lambda *_: {"config": {"repeats": 5}, "peak": {}, "macs": {}})
    before = Results.open(tmp_path, small(bundle))
    before.begin({"config": {"repeats": 5}, "peak": {}, "macs": {}})
    before.put("ort-loop", 1, made_up(3.0, 1.0, before.run))
    # open, first picture, peak, a round, alone: 50 s; the second round ends with the minute
    results = benchmark.run(small(bundle, repeats=5, sides=("diffusers", "trt-loop", "ort-loop"), minutes=1), tmp_path)
    sides = results.data["sides"]
    assert sides["diffusers"]["1"]["seconds"] == [0.1]  # a figure, though time ended in the next side
    assert sides["trt-loop"]["1"]["missing"] == "Out of time (--minutes 1)"
    assert sides["ort-loop"]["1"]["seconds"] == [3.0]
    assert results.data["drift"]["2"]["diffusers"]["missing"] == "Out of time (--minutes 1)"
    assert figures.figures_of(results.data, "diffusers", 1) is not None
    assert "Stopped after fewer rounds: diffusers, eager (1), " in page._batch(results.data, 1)


def test_what_is_typed() -> None:
    words = ["--preset", "sdxl", "--batches", "1,4", "--size", "768x512", "--sides", "trt,diffusers"]
    words += ["--drift", "0", "--minutes", "9"]
    config = command.config_of(command._parser().parse_args(words))
    assert config == Config("sdxl", batches=(1, 4), size=(768, 512), sides=("trt", "diffusers"), drift=(), minutes=9)
    with pytest.raises(argparse.ArgumentTypeError, match="no side cuda; there are diffusers,"):
        command._sides("trt,cuda")
    quick = command.config_of(command._parser().parse_args(["--quick", "--repeats", "3"]))
    assert (quick.steps, quick.repeats, quick.batches) == (2, 3, (1,))


def test_no_preset_is_exported_where_there_is_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def describe() -> None:
        raise BackendError("there is no driver", needed="one", fix="install it")

    def latentrt(*words: str, limit: float) -> None:
        raise AssertionError(words)

    monkeypatch.setattr(benchmark, "FOLDER", tmp_path / "cache")
    monkeypatch.setattr("benchmarks.gpu.hardware.describe", describe)
    monkeypatch.setattr("benchmarks.gpu.hardware.latentrt", latentrt)
    assert command.main(["--quick", "--results", str(tmp_path / "results")]) == 1
    assert "there is no driver" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_a_bundle_that_is_not_there_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--bundle", str(tmp_path / "none"), "--results", str(tmp_path)]
    assert command.main(words) == 1
    assert "none" in capsys.readouterr().err


def test_the_committed_page_is_the_one_of_the_committed_figures(tmp_path: Path) -> None:
    for path in command.RESULTS.glob("gpu-*.json"):
        shutil.copy(path, tmp_path)
    page.write(tmp_path)
    assert (tmp_path / "GPU.md").read_text() == (command.RESULTS / "GPU.md").read_text()
