"""The command, run in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from latentrt.command import main as cli

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run `latentrt ...` in this process, in an empty folder; return (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["latentrt", *arguments])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        captured = capsys.readouterr()
        return int(exit.value.code or 0), captured.out, captured.err

    return run


def refused(run: Run, *arguments: str) -> str:
    """Return the error text of a call that must fail and write nothing."""
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert not list(Path().iterdir())
    for part in ("error: ", "needed: "):
        assert part in err
    return err
