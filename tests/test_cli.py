"""The command as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from engine import cli, read_settings

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run `latentrt ...` in this process, in an empty folder; gives (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["latentrt", *arguments])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        captured = capsys.readouterr()
        return int(exit.value.code or 0), captured.out, captured.err

    return run


def refused(run: Run, *arguments: str) -> str:
    """The error text of a call that must fail, leaving nothing behind."""
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert not list(Path().iterdir())
    for part in ("error: ", "needed: ", "to mend it: "):
        assert part in err
    return err


def test_generate_writes_a_picture_that_knows_its_settings(run: Run) -> None:
    code, out, _ = run("generate", "a red apple", "--steps", "2", "--seed", "7", "--solver", "dpmpp-2m")
    assert (code, out.split()) == (0, ["a-red-apple-7.png"])
    made = read_settings("a-red-apple-7.png")
    assert (made["prompt"], made["steps"], made["seed"], made["solver"]) == ("a red apple", 2, 7, "dpmpp-2m")
    with Image.open("a-red-apple-7.png") as image:
        assert image.size == (128, 128)


def test_generate_many_with_a_grid_and_previews(run: Run) -> None:
    arguments = ["generate", "a cat", "an owl", "--steps", "4", "--count", "2", "--preview-every", "2", "-f", "webp"]
    code, out, _ = run(*arguments, "-o", "pictures/{index}", "--grid", "grid.png")
    assert code == 0
    assert out.split() == [f"pictures/{i}.webp" for i in range(4)] + ["grid.png"]
    previews = sorted(path.name for path in Path("pictures").glob("0-*"))
    assert previews == [f"0-{row}-{kind}.webp" for row in ("002", "004") for kind in ("current", "predicted")]
    with Image.open("grid.png") as grid:
        assert grid.width > 2 * 128


def test_generate_speaks_json(run: Run) -> None:
    code, out, err = run("generate", "a cat", "--steps", "1", "--json", "--option", "eta=0.5", "-o", "x.jpg")
    (made,) = json.loads(out)
    assert (code, err) == (0, "")
    assert (made["path"], made["eta"], made["prompt"]) == ("x.jpg", 0.5, "a cat")


def test_a_long_prompt_says_what_was_dropped(run: Run) -> None:
    code, _, err = run("generate", "cat " * 100 + "walrus", "--steps", "1", "-o", "x")
    assert code == 0
    assert "does not read" in err
    assert "walrus" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a", "--solver", "dpmp-2m"], "dpmpp-2m"),
        (["a", "--steps", "0"], "steps is 0"),
        (["a", "--guidance", "nan"], "guidance is nan"),
        (["a", "--guidance", "inf"], "guidance is inf"),
        (["a", "--size", "100x128"], "width is 100"),
        (["a", "--size", "big"], "--size has 'big'"),
        (["a", "--format", "gif"], "--format is 'gif'"),
        (["a", "--option", "eta"], "--option is 'eta'"),
        (["a", "--option", "etta=1"], "'etta' is not an option"),
        (["a", "--count", "2", "-o", "x.png"], "2 pictures would go to x.png"),
        (["a", "-o", "{sead}.png"], "unknown field"),
        (["a", "--bundle", "nowhere"], "no folder nowhere"),
        (["a", "--backend", "magic"], "no backend 'magic'"),
        (["a", "--device", "cuda"], "CUDAExecutionProvider"),
        (["bad \udcff bytes"], "UTF-8"),
    ],
    ids=lambda value: " ".join(value[1:]) if isinstance(value, list) else "",
)
def test_bad_input_is_refused_and_leaves_nothing(run: Run, arguments: list[str], words: str) -> None:
    assert words in refused(run, "generate", *arguments)


def test_errors_as_json(run: Run) -> None:
    code, out, _ = run("generate", "a", "--steps", "0", "--json")
    error = json.loads(out)["error"]
    assert code == 2
    assert error["type"] == "RequestError"
    assert error["found"] == "steps is 0"


def test_a_full_disk_leaves_nothing_half_written(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert "No space left" in refused(run, "generate", "a", "--steps", "1", "-o", "x.png")


def test_inspect_and_solvers(run: Run) -> None:
    code, out, _ = run("inspect")
    assert code == 0
    assert "unet" in out
    assert "DDIMScheduler" in out
    code, out, _ = run("inspect", "--json")
    assert json.loads(out)["model"]["family"] == "sd"
    code, out, _ = run("solvers", "--json")
    assert json.loads(out)["ddim"]["scheduler"] == "DDIMScheduler"
    code, out, _ = run("solvers")
    assert "UniPCMultistepScheduler" in out


def test_bench_reports_each_batch(run: Run) -> None:
    code, out, _ = run("bench", "--steps", "2", "--batches", "1,2", "--repeats", "1", "--json")
    results = json.loads(out)
    assert code == 0
    assert [row["batch"] for row in results["batches"]] == [1, 2]
    assert all(0 <= row["host_percent"] <= 100 for row in results["batches"])
    code, out, _ = run("bench", "--steps", "1", "--batches", "1", "--repeats", "1")
    assert "images/s" in out
    assert "--batches" in refused(run, "bench", "--batches", "1,x")


def test_doctor_finds_what_is_here(run: Run) -> None:
    code, out, _ = run("doctor", "--json")
    findings: dict[str, dict[str, Any]] = {finding["what"]: finding for finding in json.loads(out)}
    assert code == 0
    assert findings["the embedded model"]["good"]
    assert all(finding["good"] or finding["mend"] for finding in findings.values())
    code, out, _ = run("doctor")
    assert "the embedded model" in out


def test_version_and_help() -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "engine.cli", "--version"], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "0.1.0"
