"""`latentrt build` as a user types it, with TensorRT-RTX ahead of time."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from latentrt.bundle.bundle import EMBEDDED, Bundle
from latentrt.command import main as cli
from latentrt.runtime.tensorrt.plans import PlanStore
from latentrt.runtime.tensorrt.record import PlanRecord
from latentrt_export.plans.plan_builder import Order

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has wheels for Linux on x86-64, and Windows")
Run = Callable[..., tuple[int, str, str]]
NETWORKS = ["text_encoder", "unet_text", "unet", "unet_shallow", "vae_decoder", "vae_encoder"]
AHEAD = ("build", "--library", "tensorrt-rtx", "--compute-capability", "8.9", "--plans", "plans")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run `latentrt ...` in this process, in an empty folder; return (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["latentrt", *arguments])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        captured = capsys.readouterr()
        return int(exit.value.code or 0), captured.out, captured.err

    return run


def told(run: Run, *arguments: str) -> dict[str, Any]:
    """Return what a call prints as JSON; it must print nothing else."""
    code, out, _ = run(*arguments, "--json")
    assert code == 0, out
    answer: dict[str, Any] = json.loads(out)
    return answer


def refused(run: Run, *arguments: str) -> str:
    """Return the error text of a call that must fail and write nothing."""
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert not list(Path().iterdir())
    for part in ("error: ", "needed: "):
        assert part in err
    return err


def test_a_dry_run_estimates_and_builds_nothing(run: Run) -> None:
    answer = told(run, *AHEAD, "--dry-run", "--lanes", "2:8:16")
    assert answer["plans"] == []
    assert [each["network"] for each in answer["estimates"]] == NETWORKS
    assert (answer["library"], answer["compute_capability"], answer["gpu"]) == ("tensorrt-rtx", "8.9", "")
    code, out, _ = run(*AHEAD, "--dry-run")
    assert code == 0
    assert "batch 2, height 16, width 16" in out
    assert not list(Path().iterdir())


def test_what_goes_with_a_model_is_built_with_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The UNet that reads a ControlNet's residuals and takes LoRAs, and the ControlNet; one command for all."""
    monkeypatch.setattr("latentrt_export.plans.to_tensorrt.build_in_child", stand_in)
    chosen = ("--controlnet", "grey=emoji-grey", "--lora-rank", "8", "--lanes", "4")
    answer = told(run, *AHEAD, *chosen)
    keys = {plan["key"]["network"]: plan["key"] for plan in answer["plans"]}
    assert list(keys) == [*NETWORKS, "hint", "controlnet"]
    files = {record.sha256: name for name, record in Bundle.open().files.items()}
    assert files[keys["unet"]["graph"]] == "unet/model.fp16.control.lora.onnx"
    assert keys["unet"]["profiles"][0]["ranges"]["rank"] == [8, 8, 8]
    assert keys["controlnet"]["profiles"][0]["ranges"]["batch"] == keys["unet"]["profiles"][0]["ranges"]["batch"]
    plain = told(run, *AHEAD, "--network", "unet")["plans"][0]["key"]
    assert files[plain["graph"]] == "unet/model.fp16.onnx"
    out = run("build", "--plans", "plans", "--list")[1]
    assert "unet/model.fp16.control.lora.onnx" in out
    out = run(*AHEAD, *chosen, "--network", "controlnet")[1]
    assert "controlnet of emoji-grey" in out
    assert "built before" in out
    assert run(*AHEAD, *chosen, "--network", "hint", "--network", "unet", "--check")[0] == 0


def stand_in(order: Order, known: float | None, progress: Any) -> PlanRecord:
    """Put a few bytes in the place of a plan."""
    record = PlanRecord(order.key, hashlib.sha256(b"plan").hexdigest(), 4)
    PlanStore(order.bundle, order.plans).put(record, b"plan")
    return record


def test_build_list_and_remove(run: Run) -> None:
    code, out, err = run(*AHEAD, "--network", "text_encoder", "--network", "vae_encoder")
    assert code == 0
    assert "text_encoder" in err  # its bar
    assert "Internal" not in out + err
    code, out, _ = run(*AHEAD, "--network", "text_encoder")
    assert "built before" in out
    listed = told(run, "build", "--plans", "plans", "--list")["plans"]
    assert [plan["key"]["network"] for plan in listed] == ["text_encoder", "vae_encoder"]
    code, out, _ = run("build", "--plans", "plans", "--list")
    assert listed[0]["name"] in out
    assert [
        plan["name"] for plan in told(run, "build", "--plans", "plans", "--remove", listed[0]["name"])["plans"]
    ] == [listed[1]["name"]]
    assert sorted(path.suffix for path in Path("plans").iterdir()) == [".json", ".plan"]
    code, _, err = run("build", "--plans", "plans", "--remove", listed[0]["name"])
    assert code == 2
    assert "--plans plans --list" in err


def test_plans_that_would_not_be_loaded_are_listed_and_removed(run: Run) -> None:
    Path("plans").mkdir(mode=0o755)
    damaged, foreign = f"unet-{'0' * 16}", f"vae_decoder-{'1' * 16}"
    Path(f"plans/{damaged}.json").write_text("junk")
    Path(f"plans/{damaged}-{'a' * 16}.plan").write_bytes(b"native code")
    Path(f"plans/{foreign}.json").write_text("{}")
    Path(f"plans/{foreign}.json").chmod(0o666)
    code, out, _ = run("build", "--plans", "plans", "--list")
    assert code == 0
    assert out.count("not loaded: ") == 2
    assert "has mode 666" in out
    assert [each["name"] for each in told(run, "build", "--plans", "plans", "--list")["refused"]] == [damaged, foreign]
    assert len(told(run, *AHEAD, "--dry-run")["estimates"]) == len(NETWORKS)
    code, _, _ = run(*AHEAD, "--network", "text_encoder")
    assert code == 0
    answer = told(run, "build", "--plans", "plans", "--remove", damaged, "--remove", foreign)
    assert ([plan["key"]["network"] for plan in answer["plans"]], answer["refused"]) == (["text_encoder"], [])


def test_no_plan_is_built_into_a_bundle_or_an_open_folder(run: Run) -> None:
    code, _, err = run(*AHEAD[:-1], str(EMBEDDED / "plans"), "--network", "text_encoder")
    assert code == 2
    assert "lies in the bundle" in err
    assert f"to fix it: latentrt build {EMBEDDED}, without --plans" in err
    Path("plans").mkdir()
    Path("plans").chmod(0o777)
    for arguments in (("--network", "text_encoder"), ("--list",)):
        code, _, err = run(*AHEAD, *arguments)
        assert code == 2
        assert "to fix it: chmod go-w plans, if you trust" in err


def test_plans_are_built_into_the_users_cache(run: Run, tmp_path: Path) -> None:
    answer = told(run, *AHEAD[:-2], "--network", "text_encoder")
    (path,) = (Path(plan["path"]) for plan in answer["plans"])
    assert path.is_relative_to(tmp_path / "cache" / "latentrt" / "plans")
    listed = told(run, "build", "--list")
    assert listed["folder"] == str(path.parent)
    assert [plan["name"] for plan in listed["plans"]] == [plan["name"] for plan in answer["plans"]]
    assert str(path.parent.parent) in run("build", "--list")[1]


def test_check_lists_what_the_parser_refuses(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = run(*AHEAD, "--check")
    assert code == 0
    assert "unet" in out
    monkeypatch.setattr("latentrt_export.plans.capability.load_graph", odd)
    code, out, _ = run(*AHEAD, "--check", "--network", "unet")
    assert code == 1
    assert "Unique first" in out
    answer = json.loads(run(*AHEAD, "--check", "--network", "unet", "--json")[1])
    assert [node["operator"] for node in answer["networks"][0]["refused"]] == ["Unique"]


def odd(*_: Any) -> Any:
    """Return a graph with a node that TensorRT does not know."""
    import onnx_ir as ir
    from onnx import TensorProto, helper

    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None])
    graph = helper.make_graph([helper.make_node("Unique", ["x"], ["y"], name="first")], "odd", [x], [y])
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size", "510"], "510 pixels"),
        (["--lanes", "9:2"], "lanes is '9:2'"),
        (["--profile", "lanes"], "--profile is 'lanes'"),
        (["--network", "refiner"], "refiner"),
        (["--compute-capability", "9.0"], "7.5, 8.0, 8.6, 8.9, 12.0"),
        (["--library", "tensorrt-lean"], "tensorrt_lean cannot be imported"),
        (["--library", "cudnn"], "'cudnn'"),
        (["--library", "tensorrt"], "pip install 'latentrt[tensorrt]'"),
        (["--controlnet", "emoji-grey"], "NAME=BUNDLE"),
        (["--controlnet", "grey=emoji"], "loaded as the control 'grey', is none"),
        (["emoji-grey"], "latentrt build MODEL --controlnet NAME=emoji-grey"),
        (["pixels", "--controlnet", "grey=emoji-grey"], "reads no residuals"),
        (["pixels", "--lora-rank", "8"], "take no LoRAs"),
        (["--lora-rank", "0"], "rank has '0'"),
        (["--strip"], "without a GPU"),
        (["--refittable"], "without a GPU"),
        (["--version-compatible"], "--version-compatible"),
        (["--optimization-level", "5"], "a level changes nothing in RTX"),
    ],
)
def test_what_cannot_be_built_is_refused(run: Run, arguments: list[str], words: str) -> None:
    assert words in refused(run, *AHEAD, *arguments)


def test_without_a_gpu_the_error_names_the_way_out(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from latentrt.cuda import gpu as cuda
    from latentrt.errors import BackendError

    def none(device: str) -> None:
        raise BackendError("there is no driver", needed="one", fix="latentrt doctor")

    monkeypatch.setattr(cuda, "Gpu", none)
    assert "--compute-capability 8.9" in refused(run, "build", "--library", "tensorrt-rtx")


def test_a_folder_that_cannot_be_written_to(run: Run) -> None:
    Path("plans").write_text("a file")
    code, _, err = run(*AHEAD, "--network", "text_encoder")
    assert code == 2
    assert "plans" in err


def test_a_killed_build_goes_on_where_it_ended(run: Run, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "latentrt", *AHEAD, "--network", "text_encoder", "--network", "unet"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as building:
        while not list(Path("plans").glob("text_encoder-*.json")) and building.poll() is None:
            time.sleep(0.05)
        building.send_signal(signal.SIGKILL)
    answer = told(run, *AHEAD, "--network", "text_encoder")
    assert answer["plans"][0]["seconds"] == 0
