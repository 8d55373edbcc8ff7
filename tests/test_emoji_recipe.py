"""The recipe of the embedded model: runs that are bounded, stopped and taken up again; and, slowly, all its stages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from engine import Engine

RECIPE = Path(__file__).parents[1] / "examples" / "emoji"
NAMES = ["red apple", "owl", "cat face", "umbrella", "green book", "ice", "a-b's 3rd", "ünïcode", "red car", "bus"]
ON_PNG = {"solver": "ddim", "steps": 2, "seed": 0}


@pytest.fixture(autouse=True)
def recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(RECIPE))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the stage `data` would leave, of ten made-up emoji."""
    folder = tmp_path_factory.mktemp("emoji")
    pictures = np.zeros((len(NAMES), 128, 128, 4), np.uint8)
    for number, picture in enumerate(pictures):
        picture[10 * number : 10 * number + 30, 20:90, number % 3] = 200
        picture[10 * number : 10 * number + 30, 20:90, 3] = 255
    np.save(folder / "pictures.npy", pictures)
    entries = [{"name": name, "tags": ["thing", "emoji"], "group": 3, "subgroup": 0} for name in NAMES]
    (folder / "emoji.json").write_text(json.dumps(entries))
    return folder


class Clock:
    """Each look at it takes a second."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 1
        return self.now


def run_of(folder: Path, module: nn.Module, minutes: float, monkeypatch: pytest.MonkeyPatch) -> Any:
    import training

    monkeypatch.setattr(training, "time", Clock())
    monkeypatch.setattr(training, "SAVED_EVERY", 5)
    return training.Run(folder, {"net": module}, minutes=minutes, rate=0.05, average=0.9)


def learn(run: Any, module: nn.Module, until: int = 10**6) -> list[float]:
    """Towards the identity; the losses."""
    losses = []
    for step in run:
        x = torch.randn(16, 4)
        loss = (module(x) - x).square().mean()
        run.learn(loss)
        losses.append(loss.item())
        if step + 1 == until:
            break
    return losses


def test_a_run_learns_until_its_minutes_are_spent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Linear(4, 4)
    run = run_of(tmp_path, module, 5, monkeypatch)
    losses = learn(run, module)
    assert len(losses) == run.step == 300
    assert np.mean(losses[-20:]) < 0.05 * np.mean(losses[:20])
    assert (tmp_path / "log.csv").read_text().startswith("seconds,step,loss")


def test_a_stopped_run_goes_on_where_it_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Linear(4, 4)
    first = run_of(tmp_path, module, 1, monkeypatch)
    learn(first, module, until=40)
    other = nn.Linear(4, 4)
    second = run_of(tmp_path, other, 1, monkeypatch)
    assert 30 < second.step < 40
    learn(second, other)
    assert second.step == 60
    third = run_of(tmp_path, nn.Linear(4, 4), 1, monkeypatch)
    assert learn(third, other) == []


def test_averaged_weights_are_lent_and_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Linear(4, 4)
    run = run_of(tmp_path, module, 1, monkeypatch)
    learn(run, module)
    own = module.weight.detach().clone()
    with run.averaged():
        assert not module.training
        assert not torch.equal(module.weight, own)
    assert module.training
    assert torch.equal(module.weight, own)


def test_the_tokenizer_is_clips_and_spells_everything(work: Path) -> None:
    import tokenizer
    from text import ids_of, tokenizer_of

    tokenizer.train(work)
    made = tokenizer_of(work)
    ids = ids_of(made, ["An UMBRELLA", "ünïcode 的 \x7f"])
    assert tuple(ids.shape) == (2, 77)
    assert made.convert_ids_to_tokens(ids[0, :4].tolist()) == [
        "<|startoftext|>",
        "an</w>",
        "umbrella</w>",
        "<|endoftext|>",
    ]
    assert made.decode(ids[1], skip_special_tokens=True).strip() == "ünïcode 的 \x7f"
    assert made.eos_token_id == len(made) - 1 == made.pad_token_id


def test_captions_name_their_emoji() -> None:
    from random import Random

    from captions import caption, named
    from data import Emoji

    assert named("an emoji of a ", "owl") == "an emoji of an owl"
    assert named("the ", "owl") == "the owl"
    emoji = Emoji("owl", ("bird",), 3, 0)
    made = {caption(emoji, Random(seed)) for seed in range(200)}
    assert all("owl" in text for text in made)
    assert {"owl", "an owl", "owl, bird"} <= made


@pytest.mark.slow
def test_every_stage_runs_and_the_bundle_draws(work: Path) -> None:
    stages = ["tokenizer", "vae", "decoder", "text", "unet", "pack", "check", "card"]
    command = [sys.executable, str(RECIPE), *stages, "--minutes", "0.05", "--work", str(work)]
    subprocess.run(command, check=True, timeout=900)
    found = json.loads((work / "found.json").read_text())
    assert found["captions"] == len(NAMES)
    assert (work / "sheet.png").is_file()
    assert f"{found['found']} (" in (work / "bundle" / "README.md").read_text()
    with Engine.load(work / "bundle") as engine:
        assert engine("owl", **ON_PNG)[0].size == (128, 128)
