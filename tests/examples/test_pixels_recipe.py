"""The recipe of the pixel model: pictures chosen, a training stopped and continued, a checkpoint that draws."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
FACE, MAMMAL, FRUIT = 0, 34, 42  # subgroups of emojibase: of the second only faces are wanted
STEP = 1 / 60  # minutes, by `Clock`


class Clock:
    """Each reading of it takes a second; from a given one on, the user interrupts."""

    def __init__(self, last: int = 10**6) -> None:
        self.now, self._last = 0, last

    def monotonic(self) -> float:
        self.now += 1
        if self.now > self._last:
            raise KeyboardInterrupt
        return float(self.now)


@pytest.fixture(autouse=True)
def recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the recipe's modules importable, and all their sizes small."""
    for folder in ("shared", "pixels"):
        monkeypatch.syspath_prepend(str(EXAMPLES / folder))
    import denoiser
    import samples
    import training

    monkeypatch.setattr(training, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(training, "time", Clock())
    monkeypatch.setattr(training, "SAVED_EVERY", 2)
    monkeypatch.setattr(training, "SHOWN_EVERY", 2)
    monkeypatch.setattr(denoiser, "device", training.device)
    monkeypatch.setattr(denoiser, "WIDTHS", (16, 16, 16))
    monkeypatch.setattr(denoiser, "BATCH", 4)
    monkeypatch.setattr(samples, "COUNT", 3)
    monkeypatch.setattr(samples, "CHECKED", (("ddpm", 4), ("ddim", 3), ("dpmpp-2m", 3)))


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Write the output of the stage `data`, for four faces and fruit among six emoji."""
    source = tmp_path / "emoji"
    source.mkdir()
    pictures = np.zeros((6, 128, 128, 4), np.uint8)
    for number, picture in enumerate(pictures):
        picture[30:90, 10 * number : 70 + 10 * number] = (200, 40, 20, 255)
    np.save(source / "pictures.npy", pictures)
    named = {"smile": FACE, "horse": MAMMAL, "fox": MAMMAL, "grin": FACE, "cow": MAMMAL, "pear": FRUIT}
    entries = [{"name": name, "tags": [], "group": 0, "subgroup": subgroup} for name, subgroup in named.items()]
    (source / "emoji.json").write_text(json.dumps(entries))
    command("data", "--pictures", source, "--work", tmp_path / "pixels")
    return tmp_path / "pixels"


def command(*arguments: Any) -> None:
    """Run `python examples/pixels ARGUMENTS` in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pixels", *map(str, arguments)])
        patch.setattr(sys, "path", [*sys.path])
        runpy.run_path(str(EXAMPLES / "pixels"), run_name="__main__")


def state(work: Path) -> Any:
    return torch.load(work / "unet" / "state.pt", weights_only=True)


def test_the_pictures_are_small_chosen_and_on_white(work: Path) -> None:
    pixels = np.load(work / "pixels.npy")
    assert pixels.shape == (4, 32, 32, 3)
    assert pixels.dtype == np.uint8
    assert (pixels[:, 0] == 255).all()
    assert pixels[0, 15, 8].tolist() == [200, 40, 20]


def test_a_stopped_training_goes_on_where_it_was_saved(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import training

    monkeypatch.setattr(training, "time", Clock(last=4))
    with pytest.raises(KeyboardInterrupt):
        command("train", "--minutes", 6 * STEP, "--work", work)
    stopped = state(work)
    assert 0 < stopped["step"] < 4
    monkeypatch.setattr(training, "time", Clock())
    command("train", "--minutes", 6 * STEP, "--work", work)
    assert state(work)["step"] == state(work)["seconds"] == 6
    losses = [float(row.split(",")[2]) for row in (work / "unet" / "log.csv").read_text().splitlines()[1:]]
    assert losses
    assert np.isfinite(losses).all()
    weights = (stopped["averaged"], state(work)["averaged"])
    assert any(not torch.equal(before, after) for before, after in zip(*weights, strict=True))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' DPM++
def test_the_checkpoint_is_diffusers_own_in_float16_and_draws(work: Path) -> None:
    import samples
    from diffusers import DDPMPipeline
    from safetensors.torch import load_file

    command("train", "sample", "pack", "check", "card", "--minutes", 4 * STEP, "--steps", 3, "--work", work)
    assert (work / "step-000004-ddim-3.png").is_file()
    assert (work / "ddpm-4.png").is_file()
    target = work / "pixels"
    assert {path.name for path in target.iterdir()} == {"model_index.json", "unet", "scheduler", "README.md"}
    weights = load_file(target / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert "{" not in (target / "README.md").read_text()
    assert str(work) not in "".join(path.read_text() for path in target.rglob("*.json"))
    pipeline = DDPMPipeline.from_pretrained(target, torch_dtype=torch.float32)
    drawn = samples.draw(pipeline, "dpmpp-2m", 3)
    assert drawn.shape == (3, 32, 32, 3)
    assert np.array_equal(drawn, samples.draw(pipeline, "dpmpp-2m", 3))
    assert len({each.tobytes() for each in drawn}) == 3


def test_the_model_is_small_enough_and_its_schedule_ends_in_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    import denoiser

    monkeypatch.undo()  # the recipe's own size
    unet, schedule = denoiser.new(), denoiser.schedule()
    assert unet.num_parameters() <= 1.5e6
    schedule.set_timesteps(30)
    assert schedule.timesteps[0] == 999
    assert schedule.alphas_cumprod[-1] < 1e-6


def test_samples_that_are_pictures_of_the_training_count_as_copies() -> None:
    import samples

    known = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    near = known[2:3] ^ 1
    found = samples.decibels(np.concatenate([near, 255 - known[:1]]), known)
    assert found[0] == pytest.approx(20 * np.log10(255))
    assert found[1] < samples.COPY < found[0]


def test_a_sheet_has_rows_of_eight() -> None:
    import samples

    picture = samples.sheet(np.zeros((9, 32, 32, 3), np.uint8))
    assert picture.size == (samples.SCALE * (4 + 8 * 36), samples.SCALE * (4 + 2 * 36))
