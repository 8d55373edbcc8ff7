"""The recipe of the embedded model: runs that are bounded, stopped and continued; and, slowly, all its stages."""

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

from latentrt import Engine

RECIPE = Path(__file__).parents[2] / "examples" / "emoji"
NAMES = ["red apple", "owl", "cat face", "umbrella", "green book", "ice", "a-b's 3rd", "ünïcode", "red car", "bus"]
ON_PNG = {"solver": "ddim", "steps": 2, "seed": 0}


@pytest.fixture(autouse=True)
def recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (RECIPE.with_name("shared"), RECIPE):
        monkeypatch.syspath_prepend(str(folder))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the output of the stage `data` for ten made-up emoji."""
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
    """Each reading of it takes a second."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 1
        return self.now


def run_of(folder: Path, module: nn.Module, minutes: float, monkeypatch: pytest.MonkeyPatch) -> Any:
    import training

    monkeypatch.setattr(training, "time", Clock())
    monkeypatch.setattr(training, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(training, "SAVED_EVERY", 5)
    return training.Run(folder, {"net": module}, minutes=minutes, rate=0.05, average=0.9)


def learn(run: Any, module: nn.Module, until: int = 10**6) -> list[float]:
    """Learn the identity; return the losses."""
    seen = []

    def losses(x: torch.Tensor) -> dict[str, torch.Tensor]:
        loss = (module(x) - x).square().mean()
        seen.append(loss.item())
        return {"loss": loss}

    for step in run:
        run.learn(losses, torch.randn(16, 4))
        if step + 1 == until:
            break
    return seen


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


def test_muon_is_torchs() -> None:
    from muon import Muon

    torch.manual_seed(0)
    shapes = [(6, 4), (4, 6), (6, 4), (5, 5)]
    theirs = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    ours = [nn.Parameter(each.detach().clone()) for each in theirs]
    reference = torch.optim.Muon(theirs, lr=0.05, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    muon = Muon([{"params": ours, "lr": torch.tensor(0.05)}], 0.1)
    for _ in range(3):
        for a, b in zip(theirs, ours, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        reference.step()
        muon.step()
    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(b, a, atol=1e-6, rtol=0)  # measured: 1.2e-7


def test_muon_takes_convolutions_as_matrices() -> None:
    from muon import Muon

    torch.manual_seed(0)
    convolution = nn.Parameter(torch.randn(6, 3, 2, 2))
    matrix = nn.Parameter(convolution.detach().flatten(1).clone())
    muon = Muon([{"params": [each], "lr": torch.tensor(0.05)} for each in (convolution, matrix)], 0.0)
    convolution.grad = torch.randn_like(convolution)
    matrix.grad = convolution.grad.flatten(1)
    muon.step()
    torch.testing.assert_close(convolution.detach().flatten(1), matrix.detach())


@pytest.mark.parametrize("side", [40, 128])
def test_no_colour_is_brighter_than_its_alpha_when_resized(side: int) -> None:
    """Or a picture on white has black dots at its edges."""
    from data import on_white, resized
    from PIL import Image

    hard = np.zeros((256, 256, 4), np.uint8)
    hard[64:190, 64:190] = 255
    small = resized(Image.fromarray(hard, "RGBa"), side)
    assert (small[..., :3] <= small[..., 3:]).all()
    assert on_white(small).min() == 255


@pytest.fixture
def combiner() -> Any:
    """Return a combiner of eleven emoji that can be combined in every way: discs, each of a colour."""
    from combine import ANIMALS, THINGS, Combiner
    from data import Data, Emoji

    animals, things = ("cat", "fox", "hen", "cow", "pig"), ("bus", "key", "hat", "pot", "saw", "crown")
    emoji = [Emoji(name, (), ANIMALS, 34) for name in animals] + [Emoji(name, (), THINGS, 66) for name in things]
    y, x = np.mgrid[:128, :128]
    pictures = np.zeros((len(emoji), 128, 128, 4), np.uint8)
    for number, picture in enumerate(pictures):
        inside = np.hypot(x - 64, y - 64) < 40 + 2 * number
        picture[inside] = (*np.roll((220, 60, 40), number), 255)
    return Combiner(Data(emoji, pictures))


def test_combinations_are_different_and_new(combiner: Any) -> None:
    from combine import kind_of

    texts, pictures = combiner.make(40, 0)
    others, _ = combiner.make(40, 1, without=texts)
    assert len({*texts, *others}) == 80
    assert pictures.shape == (40, 128, 128, 3)
    assert {word for text in texts for word in text.split()} >= {"and", "with", "two", "three", "black"}
    assert {kind_of(text) for text in texts} == {"number", "hat", "pair", "colour"}
    again, same = combiner.make(40, 0)
    assert again == texts
    np.testing.assert_array_equal(same, pictures)


def test_when_all_combinations_are_known_there_are_none(combiner: Any) -> None:
    every, _ = combiner.make(10**6, 0)
    texts, pictures = combiner.make(5, 1, without=every)
    assert texts == []
    assert pictures.shape == (0, 128, 128, 3)


def test_a_picture_gets_the_hue_that_is_asked_for(combiner: Any) -> None:
    from combine import HUES, hue_of, recoloured

    picture = combiner._picture(0)
    for colour, hue in HUES.items():
        found = hue_of(recoloured(picture, hue_of(picture), colour))
        assert abs((found - hue + 180) % 360 - 180) < 4
    assert hue_of(recoloured(picture, hue_of(picture), "white")) is None


def test_plurals() -> None:
    from combine import plural

    words = ["owl", "fox", "cherry", "monkey", "bus", "torch", "computer mouse"]
    many = ["owls", "foxes", "cherries", "monkeys", "buses", "torches", "computer mice"]
    assert [plural(word) for word in words] == many


def test_lessons_name_what_their_latents_show(work: Path) -> None:
    from itertools import islice
    from random import Random

    import lessons

    texts = ["blue owl", "two owls"]
    (work / "combined.json").write_text(json.dumps(texts))
    torch.save(torch.zeros(len(NAMES) + 2, 4, 16, 16), work / "latents.pt")
    made = lessons.Lessons(work)
    numbers = list(islice(made.order(0), 400))
    combined = sum(number >= len(NAMES) for number in numbers) / len(numbers)
    assert abs(combined - lessons.COMBINED) < 0.1
    assert {*numbers} == {*range(len(NAMES) + 2)}
    for number, text in enumerate([*NAMES, *texts]):
        assert text in made.caption(number, Random(number))
    assert made.caption(len(NAMES) + 1, Random(3)) == "two owls"


def learnt(folder: Path) -> torch.Tensor:
    """Return the weights after some steps with inputs of two shapes in turn."""
    import training

    torch.manual_seed(1)
    module = nn.Linear(4, 4)
    run = training.Run(folder, {"net": module}, minutes=1, rate=0.05)
    for step in range(20):
        run.learn(lambda x: {"loss": (module(x) - x).square().mean()}, torch.randn(16 + 16 * (step % 2), 4))
    return module.weight.detach().clone()


@pytest.mark.gpu
def test_recorded_steps_are_those_of_plain_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import training

    if not torch.cuda.is_available():
        pytest.skip("torch has no CUDA")
    recorded = learnt(tmp_path / "recorded")
    monkeypatch.setattr(training, "Recorded", lambda function: function)
    torch.testing.assert_close(recorded, learnt(tmp_path / "plain"), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_every_stage_runs_and_the_bundle_draws(work: Path) -> None:
    stages = ["combine", "tokenizer", "vae", "text", "unet", "pack", "check", "card"]
    command = [sys.executable, str(RECIPE), *stages, "--minutes", "0.05", "--work", str(work)]
    subprocess.run(command, check=True)
    found = json.loads((work / "found.json").read_text())
    assert found["captions"] == len(NAMES)
    assert (work / "sheet.png").is_file()
    assert f"{found['found']} (" in (work / "bundle" / "README.md").read_text()
    with Engine.load(work / "bundle") as engine:
        assert engine("owl", **ON_PNG)[0].size == (128, 128)
