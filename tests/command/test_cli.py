"""The command as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from latentrt import read_settings
from latentrt.engine import request_from
from latentrt.errors import RequestError
from latentrt.request import Request
from tests.command.conftest import Run, refused


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


def test_generate_with_vaes_and_tiles(run: Run) -> None:
    """Previews by another decoder, here the same one, and tiles; what would be ignored is refused."""
    assert "--preview-vae without previews" in refused(run, "generate", "a", "--preview-vae", "emoji")
    assert "tile is 100" in refused(run, "generate", "a", "--tile", "100")
    vaes = ["--vae", "emoji", "--preview-vae", "emoji", "--tile", "64"]
    code, _, _ = run("generate", "a cat", "--steps", "2", "--preview-every", "2", "-o", "cat.png", *vaes)
    assert code == 0
    made = read_settings("cat.png")
    assert (made["vae"], made["tile"]) == ("emoji", 64)
    with Image.open("cat.png") as image, Image.open("cat-002-current.png") as preview:
        assert image.tobytes() == preview.tobytes()


def test_generate_with_loras(run: Run) -> None:
    assert "gone.safetensors" in refused(run, "generate", "a cat", "--lora", "gone.safetensors:0.5")
    assert "allow_unmatched without a LoRA" in refused(run, "generate", "a cat", "--allow-unmatched")
    shapes = {"unet.conv_out.lora_A.weight": (1, 64, 3, 3), "unet.conv_out.lora_B.weight": (4, 1, 1, 1)}
    save_file({name: np.ones(shape, np.float32) for name, shape in shapes.items()}, "bright.safetensors")
    code, _, _ = run("generate", "a cat", "--steps", "1", "--lora", "bright.safetensors:0.5:1", "-o", "bright.png")
    assert code == 0
    assert read_settings("bright.png")["merged_loras"] == ["bright.safetensors:0.5:1"]


def test_generate_with_weights_clip_skip_and_embeddings(run: Run) -> None:
    save_file({"emb_params": np.ones((2, 192), np.float32)}, "toy.safetensors")
    reading = ["--prompt-syntax", "a1111", "--clip-skip", "1", "--embedding", "<toy>=toy.safetensors"]
    code, _, told = run("generate", "a (cat:1.4) BREAK <toy>", "--steps", "1", "-o", "cat", *reading)
    assert (code, "note:" in told) == (0, False)
    made = read_settings("cat.png")
    assert (made["prompt_syntax"], made["clip_skip"]) == ("a1111", 1)
    assert made["embeddings"] == {"<toy>": "toy.safetensors"}
    code, _, told = run("generate", "a (cat:1.4)", "a (cat:1.5)", "--steps", "1")
    assert code == 0
    assert told.count("--prompt-syntax a1111) reads it") == 1


def test_generate_on_a_picture(run: Run) -> None:
    """A photograph that lies on its side, then a part of the result."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (50, 70), "orange").save("photo.jpg", exif=exif)
    code, out, _ = run("generate", "a cat", "--image", "photo.jpg", "--strength", "0.5", "--steps", "4", "-o", "cat")
    assert (code, out.split()) == (0, ["cat.png"])
    assert read_settings("cat.png")["strength"] == 0.5
    Image.new("L", (64, 48), "white").save("mask.png")
    code, out, _ = run("generate", "a", "--image", "cat.png", "--mask", "mask.png", "--steps", "2", "--json")
    (made,) = json.loads(out)["pictures"]
    assert (made["width"], made["height"], made["strength"]) == (64, 48, 1.0)
    with Image.open(made["path"]) as image:
        assert "Denoising strength: 1.0" in image.info["parameters"]


def test_generate_on_pictures_of_sixteen_bits(run: Run) -> None:
    """The same picture as of the 8 bits that they scale to; what is kept of it stays as dark as it was."""
    mask = Image.new("I;16", (64, 64), 3000)
    mask.paste(65535, (0, 0, 32, 64))
    deep, flat = {"image": Image.new("I;16", (64, 64), 300), "mask": mask}, {"image": Image.new("L", (64, 64), 1)}
    flat["mask"] = Image.new("L", (64, 64), 12)
    flat["mask"].paste(255, (0, 0, 32, 64))
    for name, pictures in (("deep", deep), ("flat", flat)):
        for use, picture in pictures.items():
            picture.save(f"{use}.png")
        run("generate", "a cat", "--image", "image.png", "--mask", "mask.png", "--steps", "2", "-o", name)
    assert read_settings("deep.png") == read_settings("flat.png")
    with Image.open("deep.png") as ours, Image.open("flat.png") as theirs:
        assert ours.tobytes() == theirs.tobytes()


def test_generate_on_a_picture_that_is_not_there(run: Run) -> None:
    for option in ("--image", "--mask"):
        assert "gone.png cannot be read" in refused(run, "generate", "a", option, "gone.png")
    assert "there is no picture" in refused(run, "generate", "a", "--strength", "0.5")


def test_generate_speaks_json(run: Run) -> None:
    code, out, err = run("generate", "a cat", "--steps", "1", "--json", "--option", "eta=0.5", "-o", "x.jpg")
    answer = json.loads(out)
    (made,) = answer["pictures"]
    assert (code, err, answer["grid"], answer["previews"]) == (0, "", None, [])
    assert (made["path"], made["eta"], made["prompt"]) == ("x.jpg", 0.5, "a cat")


def test_json_names_every_file(run: Run) -> None:
    arguments = ["generate", "a cat", "--steps", "2", "--count", "2", "--preview-every", "2", "-o", "p/{index}.png"]
    code, out, _ = run(*arguments, "--grid", "sheets/grid.png", "--json")
    answer = json.loads(out)
    named = [*(made["path"] for made in answer["pictures"]), answer["grid"], *answer["previews"]]
    assert code == 0
    assert sorted(named) == sorted(str(path) for path in Path().rglob("*.png"))
    assert len(named) == 2 + 1 + 4 + 2  # pictures; their sheet; previews of both kinds, and a sheet of each kind


def test_more_pictures_than_lanes(run: Run) -> None:
    code, out, _ = run("generate", "a cat", "--steps", "1", "--count", "5", "--lanes", "4", "--grid", "g.png")
    assert code == 0
    assert out.split() == [*(f"a-cat-{seed}.png" for seed in range(5)), "g.png"]
    assert [read_settings(f"a-cat-{seed}.png")["seed"] for seed in range(5)] == list(range(5))


def test_a_negative_prompt_without_guidance_is_told(run: Run) -> None:
    code, _, err = run("generate", "a", "--negative", "b", "--guidance", "1", "--steps", "1", "--json")
    assert (code, err) == (0, "note: --negative has no effect with a --guidance of 1 or less\n")


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
        (["a", "--backend", "fake"], "onnxruntime"),
        (["bad \udcff bytes"], "UTF-8"),
        (["a", "--size", "²x8"], "--size has '²'"),
        (["a", "-o", "x.gif"], "--output ends in .gif"),
        (["a", "-o", "x.TIFF"], "--output ends in .TIFF"),
        (["a", "--grid", "x.bmp"], "--grid is x.bmp"),
        (["a", "--grid", "x"], "--grid is x"),
        (["a", "-o", "x.png", "--grid", "./x.png"], "would go to x.png"),
        (["a", "-o", "y/../x.png", "--grid", "x.png"], "would go to x.png"),
        (["a", "-o", "x.png", "--preview-every", "1", "--grid", "x-001-current.png"], "would go to x-001-current.png"),
        (["a", "-o", "/dev/null/x.png"], "not a folder"),
        (["a", "-o", "/dev/null/{seed}/x.png"], "not a folder"),
        (["a", "--grid", "/dev/null/x.png"], "not a folder"),
        (["a", "-o", "/proc/x.png"], "cannot be written"),
        (["a", "-o", "x" * 300], "longer than 255 bytes"),
        (["a", "-o", "new/{sead}.png"], "unknown field"),
        (["a", "-o", "new/x.png", "--steps", "0", "--grid", "other/x.png"], "steps is 0"),
        (["a", "--option", "num_inference_steps=5"], "did you mean steps?"),
        (["a", "--option", "scheduler=ddim"], "did you mean solver?"),
        (["a", "--option", "prompt=b"], "'prompt' is not an option"),
        (["a", "--option", "use_karras_sigmas=yes", "--solver", "euler"], "use_karras_sigmas = 'yes'"),
        (["a", "--seed", str(2**64 - 1), "--count", "2"], "last picture's seed"),
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


def test_output_is_checked_before_the_model_is_loaded(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentrt.engine.Engine.load", None)
    for arguments in (["-o", "x.gif"], ["-o", "/dev/null/x.png"], ["--grid", "x.gif"], ["--grid", "/dev/null/x.png"]):
        assert "needed" in refused(run, "generate", "a", *arguments)


def test_nothing_is_drawn_for_a_name_that_is_taken_by_a_folder(run: Run) -> None:
    Path("x.png").mkdir()
    code, _, err = run("generate", "a", "-o", "x.png")
    assert code == 2
    assert "it is a folder" in err


def test_a_full_disk_leaves_nothing_half_written(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert "No space left" in refused(run, "generate", "a", "--steps", "1", "-o", "x.png")


@pytest.mark.parametrize(("trouble", "expected"), [(KeyboardInterrupt(), 130), (RuntimeError("a bug"), 70)])
def test_what_was_drawn_is_kept(
    run: Run, monkeypatch: pytest.MonkeyPatch, trouble: BaseException, expected: int
) -> None:
    from latentrt.images.files import save

    def save_two(image: Image.Image, path: Path, **settings: Any) -> Path:
        if path.name == "2.png":
            raise trouble
        return save(image, path, **settings)

    monkeypatch.setattr("latentrt.images.files.save", save_two)
    arguments = ["--steps", "1", "--count", "4", "--lanes", "2", "-o", "{index}.png"]
    code, out, err = run("generate", "a", *arguments)
    assert (code, out) == (expected, "")
    assert ("interrupted" if expected == 130 else "RuntimeError: a bug") in err
    assert sorted(path.name for path in Path().iterdir()) == ["0.png", "1.png"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "a", "--lanes", "0"],
        ["generate", "a", "--preview-every", "-3"],
        ["generate", "a", "--threads", "0"],
        ["generate", "a", "--nonsense"],
        ["bench", "--repeats", "0"],
        ["bench", "--steps", "0"],
        ["verify", "--steps", "0"],
        ["nonsense"],
    ],
    ids=" ".join,
)
def test_bad_usage(run: Run, arguments: list[str]) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert "Usage: latentrt" in err
    assert "Error: " in err
    code, out, err = run(*arguments, "--json")
    assert (code, err) == (2, "")
    assert json.loads(out)["error"]["found"]


def test_verify_takes_a_hub_id(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("latentrt_export.cli.run_verify", lambda bundle, against, **_: seen.append(against) or 1)
    assert run("verify", "--against", "owner/model")[0] == 1
    assert run("verify", "folder")[0] == 1
    assert seen == ["owner/model", None]


@pytest.mark.parametrize(
    ("error", "named"),
    [(ModuleNotFoundError("gone", name="diffusers"), "diffusers"), (ImportError("libx.so: no such file"), "libx.so")],
)
def test_what_cannot_be_imported_is_named(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: ImportError, named: str
) -> None:
    """Libraries raise ImportError without a module's name, too."""
    true_import = __import__

    def broken(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "diffusers":
            raise error
        return true_import(name, *arguments, **options)

    monkeypatch.setattr("builtins.__import__", broken)
    code, _, err = run("export", "preset:sd15-small", "out")
    assert code == 2
    assert f"cannot import {named}" in err


def test_inspect_and_solvers(run: Run) -> None:
    code, out, _ = run("inspect")
    assert code == 0
    assert "unet" in out
    assert "DDIMScheduler" in out
    code, out, _ = run("inspect", "--json")
    assert json.loads(out)["model"]["networks"]["unet"]["role"] == "denoiser"
    code, out, _ = run("solvers", "--json")
    assert json.loads(out)["ddim"]["scheduler"] == "DDIMScheduler"
    code, out, _ = run("solvers")
    assert "UniPCMultistepScheduler" in out


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("num_inference_steps", "steps"),
        ("guidance_scale", "guidance"),
        ("num_images_per_prompt", "count"),
        ("scheduler", "solver"),
        ("sampler", "solver"),
        ("negative", "negative_prompt"),
        ("etaa", "eta"),
        ("use_karras_sigma", "use_karras_sigmas"),
    ],
)
def test_names_of_other_tools_are_told_ours(typed: str, meant: str) -> None:
    with pytest.raises(RequestError, match=f"'{typed}' is not an option.*did you mean {meant}"):
        request_from("a", {typed: 1})


@pytest.mark.parametrize("name", ["prompt", "options", "schedule", "self", "zzzzz"])
def test_what_is_no_option_is_refused(name: str) -> None:
    with pytest.raises(RequestError, match=f"'{name}' is not an option"):
        request_from("a", {name: 1})


def test_settings_are_the_requests_or_the_solvers() -> None:
    request = request_from("a", {"steps": 3, "eta": 0.5, "use_karras_sigmas": True})
    assert request == Request(prompt="a", steps=3, options={"eta": 0.5, "use_karras_sigmas": True})


def test_version_and_help() -> None:
    answer = subprocess.run([sys.executable, "-m", "latentrt", "--version"], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "0.1.0"
