"""`latentrt bench`, and which verbs' threads spin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from latentrt.runtime import onnxruntime
from latentrt.serve.core.measured import curve
from tests.command.conftest import Run, refused


def test_bench_reports_each_batch(run: Run) -> None:
    code, out, _ = run("bench", "--steps", "2", "--batches", "1,2", "--repeats", "1", "--json")
    results = json.loads(out)
    assert code == 0
    assert [row["batch"] for row in results["batches"]] == [1, 2]
    assert all(0 <= row["host_percent"] <= 100 for row in results["batches"])
    code, out, _ = run("bench", "--steps", "1", "--batches", "1", "--repeats", "1")
    assert "images/s" in out
    for batches in ("1,x", "0", "", "1,,2"):
        assert "--batches" in refused(run, "bench", "--batches", batches)


@pytest.mark.parametrize(
    ("arguments", "spins"),
    [
        (["generate", "a cat", "--steps", "1", "--size", "32x32"], True),
        (["generate", "a cat", "--steps", "1", "--size", "32x32", "--no-spin"], False),
        (["bench"], True),
        (["bench", "--save"], False),  # as the server
        (["bench", "--save", "--spin"], True),
    ],
)
def test_threads_spin_unless_the_server_is_measured(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], spins: bool
) -> None:
    made: list[bool] = []
    backend = onnxruntime.OrtBackend

    def recording(*positional: Any, spin: bool, **named: Any) -> onnxruntime.OrtBackend:
        made.append(spin)
        return backend(*positional, spin=spin, **named)

    monkeypatch.setattr(onnxruntime, "OrtBackend", recording)
    monkeypatch.setattr(curve, "save", lambda *_: tmp_path)
    monkeypatch.setattr(curve, "LARGE", (8,))
    few = ["--steps", "1", "--batches", "1", "--repeats", "1"] if arguments[0] == "bench" else []
    assert run(*arguments, *few)[0] == 0
    assert made == [spins]
