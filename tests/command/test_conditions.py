"""Options that only some models read, as a user types them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from latentrt import Engine, read_settings
from tests.command.conftest import Run, refused

Exported = Callable[[str], tuple[Path, Path]]
y, x = np.mgrid[:16, :24]
PICTURE = np.stack([10 * x, 15 * y, 5 * (x + y)], axis=-1).astype(np.uint8)
DEPTH = (x * 2000 + y * 40).astype(np.uint16)


def test_a_depth_map_keeps_its_sixteen_bits(run: Run, exported: Exported) -> None:
    _, bundle = exported("depth")
    Image.fromarray(PICTURE).save("picture.png")
    Image.fromarray(DEPTH).save("depth.png")
    given = ["--image", "picture.png", "--depth", "depth.png", "--strength", "0.5"]
    code, out, _ = run("generate", "a cat", "-b", str(bundle), *given, "--steps", "4", "-o", "cat.png")
    assert (code, out.split()) == (0, ["cat.png"])
    with Engine.load(bundle, check_hashes=False) as engine:
        (expected,) = engine("a cat", image=PICTURE, depth=DEPTH, strength=0.5, steps=4)
    np.testing.assert_array_equal(np.asarray(Image.open("cat.png")), np.asarray(expected))
    assert read_settings("cat.png")["depth"].startswith("sha256:")


def test_a_picture_is_drawn_four_times_as_large(run: Run, exported: Exported) -> None:
    Image.fromarray(PICTURE).save("picture.png")
    given = ["--image", "picture.png", "--noise-level", "30"]
    code, _, _ = run("generate", "a cat", "-b", str(exported("x4")[1]), *given, "--steps", "2", "-o", "cat.png")
    made = read_settings("cat.png")
    assert (code, made["noise_level"], made["width"], made["height"]) == (0, 30, 96, 64)


def test_a_picture_is_drawn_twice_as_large(run: Run, exported: Exported) -> None:
    _, bundle = exported("x2")
    Image.fromarray(PICTURE).save("picture.png")
    code, _, _ = run(
        "generate", "a cat", "--bundle", str(bundle), "--image", "picture.png", "--steps", "2", "-o", "2.png"
    )
    made = read_settings("2.png")
    assert (code, made["width"], made["height"], made["guidance"]) == (0, 48, 32, 9)
    assert made["image"].startswith("sha256:")


def test_a_refiner_is_given_scores(run: Run, exported: Exported) -> None:
    Image.fromarray(PICTURE).save("picture.png")
    scores = ["--aesthetic-score", "7", "--negative-aesthetic-score", "1"]
    given = ["-b", str(exported("refiner")[1]), "--image", "picture.png", *scores]
    assert run("generate", "a cat", *given, "--steps", "2", "-o", "cat.png")[0] == 0
    made = read_settings("cat.png")
    assert (made["aesthetic_score"], made["negative_aesthetic_score"]) == (7, 1)
    _, _, told = run("generate", "a cat", *given, "--steps", "2", "--guidance", "1")
    assert "--negative-aesthetic-score has no effect with a --guidance of 1 or less" in told


def test_other_models_refuse_them(run: Run) -> None:
    for option in ("--aesthetic-score", "--negative-aesthetic-score", "--noise-level"):
        assert f"reads no {option[2:].replace('-', '_')}" in refused(run, "generate", "a cat", option, "5")


def test_controlnets_follow_pictures(run: Run, exported: Exported) -> None:
    bundle, add_on = exported("sd")[1], exported("control-sd-1")[1]
    Image.fromarray(PICTURE).save("edges.png")
    given = ["-b", str(bundle), "--controlnet", f"edges={add_on}", "--steps", "2"]
    code, out, _ = run("generate", "a cat", *given, "--control", "edges=edges.png:0.8:0:.5", "--guess", "-o", "cat.png")
    assert (code, out.split()) == (0, ["cat.png"])
    with Engine.load(bundle, check_hashes=False, control={"edges": add_on}) as engine:
        told = {"image": PICTURE, "scale": 0.8, "end": 0.5, "guess": True}
        (expected,) = engine("a cat", steps=2, control={"edges": told})
    np.testing.assert_array_equal(np.asarray(Image.open("cat.png")), np.asarray(expected))
    assert read_settings("cat.png")["control"]["edges"]["scale"] == 0.8


def test_what_the_options_of_add_ons_refuse(run: Run) -> None:
    for options, found in (
        (["--controlnet", "edges"], "--controlnet is 'edges'"),
        (["--control", "edges.png"], "--control is 'edges.png'"),
        (["--control", "edges=none.png:0.5"], "none.png cannot be read"),
        (["--control", "a=b", "--control", "a=b"], "there are two --control a"),
        (["--guess"], "--guess without a --control"),
        (["--ip-adapter-model", "style"], "--ip-adapter-model is 'style'"),
        (["--ip-adapter", "style=none.png:0.5"], "none.png cannot be read"),
    ):
        assert found in refused(run, "generate", "a cat", *options)


def test_ip_adapters_show_pictures(run: Run, exported: Exported) -> None:
    bundle, add_on = exported("sd")[1], exported("ip-sd-base")[1]
    Image.fromarray(PICTURE).save("apple.png")
    given = ["-b", str(bundle), "--ip-adapter-model", f"style={add_on}", "--steps", "2"]
    code, out, _ = run("generate", "a cat", *given, "--ip-adapter", "style=apple.png:0.6", "-o", "cat.png")
    assert (code, out.split()) == (0, ["cat.png"])
    with Engine.load(bundle, check_hashes=False, ip_adapter={"style": add_on}) as engine:
        (expected,) = engine("a cat", steps=2, ip_adapter={"style": {"image": PICTURE, "scale": 0.6}})
    np.testing.assert_array_equal(np.asarray(Image.open("cat.png")), np.asarray(expected))
    assert read_settings("cat.png")["ip_adapter"]["style"]["scale"] == 0.6
