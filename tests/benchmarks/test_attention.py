"""The attention benchmark: two sides in processes of their own, on the embedded model."""

from __future__ import annotations

import sys

import pytest

from benchmarks.cpu import attention
from latentrt.bundle.bundle import EMBEDDED


@pytest.mark.slow
def test_sides_run_in_turn_and_agree(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--size", "64", "--repeats", "2", "--sides", "fp32", "diffusers"]
    monkeypatch.setattr(sys, "argv", ["attention", str(EMBEDDED), *options])
    attention.main()
    ours, theirs = capsys.readouterr().out.splitlines()[2:]
    assert (ours.split()[1], theirs.split()[1]) == ("fp32", "diffusers")
    assert float(ours.split()[-2]) < 1e-4
    assert float(theirs.split()[-2]) == 0
