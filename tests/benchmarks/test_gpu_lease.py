"""A lease of a GPU: the order of its jobs, their limits, what a killed one leaves, and its page."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from benchmarks.gpu import command, hardware
from benchmarks.gpu import run as benchmark
from benchmarks.gpu.child import Deadline, NotMeasuredError
from benchmarks.gpu.config import Config
from benchmarks.gpu.lease import run as lease
from benchmarks.gpu.lease.jobs import PICTURES, VARIANT, Job, jobs_of
from benchmarks.gpu.report import figures
from benchmarks.gpu.variants import TOLERANCE, VARIANTS
from benchmarks.report import write
from latentrt.bundle.bundle import EMBEDDED
from tests.support.gpu import emulated

KERNELS = emulated.kernel_times(lambda: None)
NAMES = [job.name for job in jobs_of("sd15", alone=True)]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Return the settings of a small lease; its bundle is a copy, since a variant of the graphs is added."""
    shutil.copytree(EMBEDDED, tmp_path / "bundle")
    return Config(
        "sd15-small", tmp_path / "bundle", steps=2, size=(32, 32), hardware="tests.support.gpu.emulated", minutes=14
    )


class Clock:
    """The time, which passes only where a child is asked."""

    now = 1000.0


class FakeChild:
    """A child of any job: every request takes ten seconds. `asked` has what was asked, `faults` what goes wrong."""

    asked: ClassVar[list[str]] = []
    faults: ClassVar[dict[str, BaseException]] = {}
    speeds: ClassVar[dict[str, float]] = {}
    open_ones: ClassVar[int] = 0
    age = 1.0

    def __init__(self, worker: str, config: Config | None = None, name: str = "") -> None:
        FakeChild.open_ones += 1
        assert FakeChild.open_ones == 1  # one on the GPU at a time
        self._config, self._name = config, name or worker.rpartition(":")[2]

    def ask(self, limit: float, method: str, *arguments: Any) -> Any:
        assert self._config is not None
        what = ":".join(filter(None, (self._name, self._config.variant, method)))
        self.asked.append(what)
        took = self.speeds.get(what, 10.0)
        Clock.now += min(took, limit)
        if what in self.faults:
            raise self.faults[what]
        if took > limit:
            raise NotMeasuredError(f"it took longer than {limit:.0f} s")
        return self._answer(method, *arguments)

    def _answer(self, method: str, *arguments: Any) -> Any:
        assert self._config is not None
        speed = 5.0 if self._config.variant == "fused" else 10.0
        relative = {"unet": 3e-2 if self._config.variant == "sdpa-1" else 1e-3, "vae_decoder": 1e-3}
        alone = {"text": [1.0], "unet": [speed], "vae": [9.0]}
        measured = {"alone_ms": alone} if relative["unet"] < TOLERANCE else {}
        answers = {
            "draw": (0.1, 100.0, [np.zeros((4, 4, 3), np.uint8)]),
            "alone": alone,
            "measure": {"relative": relative, "open_seconds": 3.0, **measured},
            "kernels": {name: [calls / 3, time / 3] for name, (calls, time) in KERNELS.items()},
            "drift": [1e-3, 2e-3],
        }
        if self._name == "LoraSide":
            return {"0": [4.0], "16": [5.0]}
        if method == "write":
            arguments[0].touch()
        return answers.get(method, 0)

    def close(self) -> None:
        FakeChild.open_ones -= 1


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeChild]:
    """Put the fake children and their clock in place."""
    monkeypatch.setattr(benchmark, "Child", FakeChild)
    monkeypatch.setattr("benchmarks.gpu.child.time.monotonic", lambda: Clock.now)
    for each in (FakeChild.asked, FakeChild.faults, FakeChild.speeds):
        each.clear()
    FakeChild.open_ones = 0
    return FakeChild


def read(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / "gpu-sd15-small.json").read_text())
    return data


def test_the_order_is_that_of_worth() -> None:
    first = 1 + len(VARIANTS)
    assert NAMES[:first] == ["profile plain", *(f"variant {name}" for name in VARIANTS)]
    rest = ["ort, batch 1", "profile of the best", "diffusers, batch 1", "compile-regional, batch 1"]
    assert NAMES[first : first + 4] == rest
    assert NAMES[-3:] == ["compile, batch 1", "trt, batch 1, level 1", "trt, batch 1"]
    every = list(jobs_of("sd15"))
    assert [job.name for job in every if job.preset == "sdxl"] == ["ort, batch 1", "diffusers, batch 1"]
    assert len({(job.preset, job.name) for job in every}) == len(every)
    assert max(job.limit for job in every) <= 480


def test_a_whole_lease(config: Config, fake: type[FakeChild], tmp_path: Path) -> None:
    (results,) = lease.run(replace(config, minutes=None), tmp_path)
    data = read(tmp_path)
    states = {name: state.get("missing", "done") for name, state in data["jobs"].items()}
    assert list(states) == NAMES
    assert states.pop("variant sdpa-1") == "the relative error is over 0.01 (unet 3.0e-02, vae_decoder 1.0e-03)"
    assert set(states.values()) == {"done"}
    assert "alone_ms" not in data["variants"]["sdpa-1"]
    assert {part["1"].get("variant") for side, part in data["sides"].items() if side == "ort"} == {"fused"}
    assert data["sides"]["ort"]["16"]["variant"] == "fused"
    assert data["jobs"]["profile of the best"]["variant"] == "fused"
    assert set(data["profiles"]) == {"plain", "fused"}
    assert set(data["drift"]) == {"20", "50"}
    assert data["loras"]["16"]["unet_ms"] == [5.0]
    assert "Drift:fused:drift" in fake.asked
    assert results.measured() == ["ort", "diffusers", "compile-regional", "compile", "trt"]
    fake.asked.clear()
    lease.run(config, tmp_path)  # nothing is left but what failed
    assert fake.asked == ["Peak:tflops", "Reference:write", "VariantSide:sdpa-1:measure"]


def test_a_killed_lease_goes_on_where_it_ended(config: Config, fake: type[FakeChild], tmp_path: Path) -> None:
    fake.faults["VariantSide:nhwc:measure"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        lease.run(config, tmp_path)
    data = read(tmp_path)
    assert list(data["jobs"]) == NAMES[:4]
    assert list(data["variants"]) == ["plain", "exhaustive"]
    assert data["jobs"]["variant nhwc"]["missing"] == lease.INTERRUPTED
    fake.faults.clear()
    fake.asked.clear()
    FakeChild.open_ones = 0
    lease.run(replace(config, minutes=None), tmp_path)
    asked = [what for what in fake.asked if what.endswith("measure")]
    assert asked[0] == "VariantSide:sdpa-8:measure"
    assert asked[-1] == "VariantSide:nhwc:measure"  # it may have been what killed the lease
    assert not any("missing" in state for name, state in read(tmp_path)["jobs"].items() if name != "variant sdpa-1")
    assert not list(tmp_path.glob("*.part"))


def test_limits_of_jobs_and_of_the_lease(config: Config, fake: type[FakeChild], tmp_path: Path) -> None:
    fake.speeds |= {"VariantSide:nhwc:measure": 3600.0, "ort:fused:open": 80.0}
    start = Clock.now
    lease.run(replace(config, minutes=8), tmp_path)
    assert Clock.now - start <= 8 * 60
    data = read(tmp_path)
    assert data["jobs"]["variant nhwc"]["missing"] == "it took longer than 60 s"
    assert data["jobs"]["variant nhwc"]["failures"] == 1
    ended = data["jobs"]["trt, batch 1"]
    assert (ended["missing"], ended["failures"]) == ("Out of time (--minutes 8)", 0)
    lease.run(replace(config, minutes=60), tmp_path)
    assert "missing" not in read(tmp_path)["jobs"]["trt, batch 1"]


def test_tensorrt_is_built_at_the_level_of_the_job(
    config: Config, fake: type[FakeChild], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed: list[tuple[str, ...]] = []

    def latentrt(*words: str, limit: float) -> str:
        typed.append(words)
        return '{"plans": []}'

    monkeypatch.setattr(hardware, "latentrt", latentrt)
    monkeypatch.setattr(emulated, "build_plans", hardware.build_plans)
    held = lease.Lease(config, tmp_path, None)
    held.do(Job("sd15-small", PICTURES, 300, "trt", level=1))
    held.do(Job("sd15-small", PICTURES, 300, "trt"))
    held.close()
    assert ["--optimization-level=1" in words for words in typed] == [True, False]
    assert set(read(tmp_path)["jobs"]) == {"trt, batch 1, level 1", "trt, batch 1"}


def test_figures_stay_where_a_job_fails_later(config: Config, fake: type[FakeChild], tmp_path: Path) -> None:
    only = [Job("sd15-small", PICTURES, 60, "diffusers"), Job("sd15-small", VARIANT, 60, "plain")]
    held = lease.Lease(config, tmp_path, None)
    for job in only:
        held.do(job)
    fake.faults |= {"diffusers:open": NotMeasuredError("broken")}
    held._gpu = "another GPU"
    for job in only:
        held.do(job)
    held.close()
    data = read(tmp_path)
    assert "seconds" in data["sides"]["diffusers"]["1"]
    assert data["jobs"]["diffusers, batch 1"]["missing"] == "broken"
    assert fake.asked.count("VariantSide:plain:measure") == 2  # it was measured on the other GPU


def test_without_a_reference_no_variant_has_a_figure(config: Config, fake: type[FakeChild], tmp_path: Path) -> None:
    fake.faults |= {"Reference:write": NotMeasuredError("no memory")}
    lease.run(config, tmp_path)
    data = read(tmp_path)
    assert "variants" not in data
    assert fake.asked.count("Reference:write") == 1
    assert data["jobs"]["variant fused"]["missing"] == "there is no float32 reference: no memory"
    assert data["jobs"]["profile of the best"]["missing"] == "no variant was measured yet"
    assert "variant" not in data["sides"]["ort"]["1"]  # what a user gets


def test_a_preset_that_cannot_be_opened_is_left_out(
    config: Config, fake: type[FakeChild], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [Job(preset, PICTURES, 60, "ort") for preset in ("sdxl", "sd21")]
    jobs.append(Job("sd15-small", PICTURES, 60, "diffusers"))
    (tmp_path / "pack" / "sdxl").mkdir(parents=True)
    monkeypatch.setattr(benchmark, "FOLDER", tmp_path / "cache")

    def broken(config: Config, deadline: Deadline) -> Config:
        if config.preset == "sdxl":
            raise RuntimeError("no room")
        return config

    monkeypatch.setattr(lease, "with_bundle", broken)
    monkeypatch.setattr(lease, "_unpack", lambda *_: None)
    held = lease.Lease(config, tmp_path, tmp_path / "pack")
    held._config = replace(config, bundle=None)  # or all presets would have the same one
    for job in jobs:
        held.do(job)
    held.close()
    states = read(tmp_path)["jobs"]
    assert list(states) == ["sdxl: ort, batch 1", "sd21: ort, batch 1", "diffusers, batch 1"]
    assert states["sd21: ort, batch 1"]["missing"] == "its bundle is neither here nor in --packed"
    assert states["sdxl: ort, batch 1"]["missing"] == "no room"
    assert not (tmp_path / "gpu-sdxl.json").exists()


def test_a_page_of_a_lease(config: Config, fake: type[FakeChild], tmp_path: Path) -> None:
    lease.run(config, tmp_path)
    write(tmp_path)
    text = (tmp_path / "GPU.md").read_text()
    assert "| rewritten graph | 5 (5 to 5) | 9 (9 to 9) | 1.0e-03, 1.0e-03 | 3 |" in text
    assert "| plain, sdpa_kernel 1 (flash) | not measured |  | 3.0e-02, 1.0e-03 |  |" in text
    assert "Not measured: plain, sdpa_kernel 1 (flash). the relative error is over 0.01" in text
    assert "**missed**" in text
    named = "convolutions 4 ms (60 %), matrix products 2 ms (30 %), other light kernels 0.667 ms (10 %)"
    assert f"**rewritten graph**: 15 kernels take 6.67 ms, by their names {named}. The longest:" in text
    assert "| `a_light / kernel` | 10 | 0.667 | 10.0 % |" in text
    assert "| ort, batch 16 | done | " in text
    assert "| 16 | 5 (5 to 5) | 1.25 |" in text
    assert "ONNX Runtime, one launch: rewritten graph." in text
    assert "profiles" in read(tmp_path)


def test_a_page_without_a_lease_says_so(tmp_path: Path) -> None:
    shutil.copy(command.RESULTS / "gpu-sd15.json", tmp_path)
    data = json.loads((tmp_path / "gpu-sd15.json").read_text())
    for kind in ("variants", "profiles", "jobs"):
        data.pop(kind, None)
    (tmp_path / "gpu-sd15.json").write_text(json.dumps(data))
    write(tmp_path)
    text = (tmp_path / "GPU.md").read_text()
    assert text.count("| not measured |  |  |  |\n") == len(VARIANTS)
    assert "A goal is missed; which kernels hold the time was not measured yet." in text
    assert any(goal.reached is False for goal in figures.goals(data))


@pytest.mark.slow
def test_real_children_on_an_emulated_gpu(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each kind of job as it is on a GPU, but for CUDA's graphs and kernels."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kept = ("profile plain", "variant plain", "variant fused", "ort, batch 1", "compile-regional, batch 1")
    kept += ("loras by rank",)
    every = {job.name: job for job in jobs_of("sd15-small", alone=True)}
    jobs = [replace(every[name], limit=900.0) for name in kept]
    monkeypatch.setattr(lease, "jobs_of", lambda *_, **__: jobs)
    lease.run(replace(config, minutes=None, limit=3600.0), tmp_path)
    data, said = read(tmp_path), capfd.readouterr().out
    missing = {name: state["missing"] for name, state in data["jobs"].items() if "missing" in state}
    assert not missing, said
    record = data["variants"]["plain"]
    assert all(1e-6 < error < TOLERANCE for error in record["relative"].values())
    assert all(len(times) == 3 for times in record["alone_ms"].values())
    assert data["profiles"]["plain"]["kernels"]["nvjet_hsh_gemm"] == [3, 2]
    assert data["sides"]["ort"]["1"]["variant"] in ("plain", "fused")
    assert data["sides"]["compile-regional"]["1"]["psnr_db"] > 40
    assert {rank: len(record["unet_ms"]) for rank, record in data["loras"].items()} == {"0": 3, "16": 3, "64": 3}


# --- the command ------------------------------------------------------------------------------------------------------


def test_what_is_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given: list[Any] = []

    def run_lease(*asked: Any) -> list[Any]:
        given.extend(asked)
        return []

    monkeypatch.setattr(command, "run_lease", run_lease)
    words = ["--lease", "--minutes", "14", "--results", str(tmp_path), "--packed", "pack"]
    assert command.main(words) == 1  # nothing was measured
    assert given == [Config(minutes=14), tmp_path, Path("pack")]
    assert command.main(["--lease", "--bundle", "mine"]) == 1
    assert "a preset" in capsys.readouterr().err
