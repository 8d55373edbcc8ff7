"""The commands and code in the documentation work: examples, the README's Python, the verbs it names."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_run(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script)])
    runpy.run_path(str(script), run_name="__main__")


def test_the_readmes_first_python_block_runs(tmp_path: Path) -> None:
    block = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    subprocess.run([sys.executable, "-c", block], cwd=tmp_path, check=True)
    assert (tmp_path / "apple.png").is_file()


def test_the_readme_names_real_verbs_and_files() -> None:
    help_text = subprocess.run([sys.executable, "-m", "latentrt", "--help"], capture_output=True, text=True, check=True)
    for verb in set(re.findall(r"(?:^|`)latentrt ([a-z]+)", README, re.MULTILINE)):
        assert re.search(rf"^  {verb} ", help_text.stdout, re.MULTILINE), verb
    for path in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / path).exists(), path
