"""Environments of the peers: one folder each, made once, made again when the requirements change."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.gpu.child import NotMeasuredError, reason

STAMP = "requirements.txt"
MAKING = 3600.0  # seconds; some packages are compiled
ISOLATED = ("-E", "-s")  # no variables of Python's, no packages of the user's


class Environments:
    """Virtual environments in one folder.

    Args:
        folder: where they are made.
        requirements: packages by environment.
    """

    def __init__(self, folder: Path, requirements: Mapping[str, Sequence[str]]) -> None:
        self._folder, self._requirements = folder, requirements
        self._failed: dict[str, str] = {}

    def python(self, name: str) -> list[str]:
        """Return the command of an environment's Python; the environment is made if needed.

        Raises:
            NotMeasuredError: its packages cannot be installed.
        """
        if name in self._failed:
            raise NotMeasuredError(self._failed[name])
        folder = self._folder / name
        python, stamp = folder / "bin" / "python", folder / STAMP
        wanted = "\n".join(self._requirements[name]) + "\n"
        if not stamp.is_file() or stamp.read_text(encoding="utf-8") != wanted:
            try:
                self._make(folder, python, self._requirements[name])
            except NotMeasuredError as error:
                self._failed[name] = str(error)  # another peer's request must not try it again
                raise
            stamp.write_text(wanted, encoding="utf-8")
        return [str(python), *ISOLATED]

    def _make(self, folder: Path, python: Path, requirements: Sequence[str]) -> None:
        print(f"making the environment {folder.name} ...", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        execute([sys.executable, "-m", "venv", str(folder)], MAKING)
        execute([str(python), *ISOLATED, "-m", "pip", "install", "--quiet", *requirements], MAKING)


def execute(command: Sequence[str], limit: float, env: Mapping[str, str] | None = None) -> None:
    """Run a command to its end.

    Raises:
        NotMeasuredError: it fails or takes longer than `limit` seconds.
    """
    name = next(Path(word).name for word in command[1:] if not word.startswith("-"))
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False, env=env)
    except subprocess.TimeoutExpired:
        raise NotMeasuredError(f"{name} took longer than {limit:.0f} s") from None
    if done.returncode:
        raise NotMeasuredError(f"{name} ended with {done.returncode}: {last_words(done.stderr or done.stdout)}")


def last_words(text: str) -> str:
    """Return the end of what a process said, in one line, without folders and addresses."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("WARNING")]
    errors = [line for line in lines if "error" in line.lower()]
    said = reason(RuntimeError(" ".join(errors[-2:] or lines[-2:])))
    return re.sub(r"\w+://\S+", "", said)[-300:]
