"""LoRAs of each request: different ones in one batch, each picture the one that it is alone, and as merged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file, save_file

from latentrt import Engine
from latentrt.adapters.kept import Kept
from latentrt.command.main import latentrt
from latentrt.errors import AdapterError, BackendError, RequestError
from latentrt.model.prompts.extra_networks import loras_in
from latentrt_export.verify.checks import psnr
from tests.adapters.conftest import LAYOUTS

Exported = Callable[[str], tuple[Path, Path]]
Library = Callable[[str], Path]
SETTINGS = {"steps": 4, "guidance": 5.0, "seed": 7, "height": 32, "width": 32, "negative_prompt": "a dog"}
BOUNDS = {"sd": 60, "sd2": 45, "sdxl": 60}  # SD 2's weights are float16, to which merged ones are rounded


@pytest.fixture(scope="module")
def engine(taking: Exported, library: Library) -> Iterator[Engine]:
    with Engine.load(taking("sd")[1], threads=1, cache=False, adapters=library("sd"), adapter_rank=9) as engine:
        yield engine


def drawn(engine: Engine, prompt: str = "a cat", **settings: Any) -> NDArray[np.uint8]:
    return np.asarray(engine(prompt, **SETTINGS | settings)[0])


@pytest.mark.parametrize("family", LAYOUTS)
def test_as_merged(taking: Exported, library: Library, family: str) -> None:
    (_, bundle), folder = taking(family), library(family)
    with Engine.load(bundle, threads=1, cache=False, adapters=folder, adapter_rank=9) as engine:
        ours, both = drawn(engine, lora={"a": (0.6, 0.9)}), drawn(engine, lora={"b": -0.5, "a": 0.4})
        plain, zero = drawn(engine), drawn(engine, lora={"a": 0})
    merged = {"a": {folder / "a.safetensors": (0.6, 0.9)}}
    merged["both"] = {folder / "b.safetensors": -0.5, folder / "a.safetensors": 0.4}
    for picture, lora in zip((ours, both), merged.values(), strict=True):
        with Engine.load(bundle, threads=1, cache=False, lora=lora) as engine:
            assert psnr(picture, drawn(engine)) > BOUNDS[family]
        assert psnr(picture, plain) < 40
    with Engine.load(bundle, threads=1, cache=False) as engine:
        np.testing.assert_array_equal(plain, drawn(engine))
    np.testing.assert_array_equal(zero, plain)


def test_mixed_at_random_under_load(engine: Engine) -> None:
    """Jobs come and go at random ticks, with none, one or several LoRAs; each is to the bit the one made alone."""
    rng = np.random.default_rng(11)
    asked: list[tuple[str, dict[str, Any]]] = []
    for number in range(14):
        names = [name for name in ("a", "b") if rng.random() < 0.55]
        lora = {name: tuple(rng.uniform(-1, 1, 2).round(2).tolist()) for name in rng.permutation(names).tolist()}
        guidance = float(rng.choice([1.0, 4.0]))
        own = {"steps": int(rng.integers(2, 6)), "seed": number, "guidance": guidance, "lora": lora}
        asked.append((str(rng.choice(["a cat", "a dog in a hat"])), SETTINGS | own))
    waiting = [engine.requests([prompt], settings)[0] for prompt, settings in asked]
    jobs, most, denoiser = list(waiting), 0, engine.denoiser
    while waiting or denoiser.jobs:
        while waiting and denoiser.fits(waiting[0]) and rng.random() < 0.5:
            denoiser.admit(waiting.pop(0))
        denoiser.tick()
        most = max(most, len(denoiser.jobs))
    assert most >= 5
    assert len({job.shapes for job in jobs}) == 1  # so that they shared calls
    for job, (prompt, settings) in zip(jobs, asked, strict=True):
        (alone,) = engine.requests([prompt], settings)
        engine.run([alone])
        np.testing.assert_array_equal(job.latents, alone.latents)
    assert len({job.latents.tobytes() for job in jobs}) == len(jobs)


def test_pictures_say_their_loras(engine: Engine) -> None:
    (picture,) = engine("a cat", lora={"b": 0.5}, **SETTINGS)
    told = picture.info["latentrt"]
    assert told["lora"] == {"b": [0.5, 0.5]}
    assert told["lora_hashes"]["b"].startswith("sha256:")
    again = drawn(engine, **{key: told[key] for key in ("lora", "seed", "steps")})
    np.testing.assert_array_equal(np.asarray(picture), again)


def test_tags_of_the_web_ui(engine: Engine) -> None:
    by_name = drawn(engine, "a cat on a mat", lora={"a": (0.5, 0.25)}, prompt_syntax="a1111")
    tagged = drawn(engine, "a cat<lora:a:0.25:0.5> on a mat", prompt_syntax="a1111")
    np.testing.assert_array_equal(tagged, by_name)
    assert loras_in("<lora:a>x<lyco:b:-0.5><lora:c:te=0.1:unet=2>") == {"a": (1, 1), "b": (-0.5, -0.5), "c": (2, 0.1)}
    for prompt, found in (
        ("<lora:a:x>", "<lora:a:x>"),
        ("<lora:a:1:1:8>", "<lora:a:1:1:8>"),
        ("<lora::1>", "<lora::1>"),
        ("<lora:a><lora:a>", "two tags"),
        ("<lora:none:1>", "no LoRA 'none'"),
        ("<lora:../a:1>", "no LoRA '../a'"),
        ("<hypernet:a:1>", "<hypernet:a:1>"),
    ):
        with pytest.raises(RequestError, match=found.replace("?", ".")):
            engine(prompt, prompt_syntax="a1111")
    with pytest.raises(RequestError, match="negative prompt has the LoRA 'a'"):
        engine("a cat", negative_prompt="<lora:a>", prompt_syntax="a1111")
    with pytest.raises(RequestError, match="in the prompt and in lora"):
        engine("<lora:a>", lora={"a": 1}, prompt_syntax="a1111")


def test_what_is_refused(taking: Exported, exported: Exported, library: Library, engine: Engine) -> None:
    folder = library("sd")
    with pytest.raises(AdapterError, match=r"'convs' cannot be one of a request: it changes .*merge it"):
        drawn(engine, lora={"convs": 1})
    with pytest.raises(AdapterError, match=r"a, wide have rank 1[13] in .*at most 9 .*adapter_rank=1[13]"):
        drawn(engine, lora={"a": 1, "wide": 1})
    with pytest.raises(AdapterError, match=r"there is no LoRA 'bb'.*did you mean b"):
        drawn(engine, lora={"bb": 1})
    with pytest.raises(RequestError, match="cache_interval is 2 and there is a LoRA"):
        drawn(engine, lora={"a": 1}, cache_interval=2)
    for lora, found in (
        ({"a": "x"}, "strength of the LoRA 'a' is 'x'"),
        ({"a": (1, 2, 3)}, "(1, 2, 3)"),
        (["a"], "lora is"),
    ):
        with pytest.raises(RequestError, match=found):
            drawn(engine, lora=lora)
    bundle = exported("sd")[1]
    with pytest.raises(AdapterError, match=r"take no LoRAs of each request.*--adapters"):
        Engine.load(bundle, adapters=folder, threads=1)
    with pytest.raises(BackendError, match="LoRAs of each request with openvino"):
        Engine.load(taking("sd")[1], adapters=folder, backend="openvino", threads=1)
    with pytest.raises(AdapterError, match="there is no folder"):
        Engine.load(bundle, adapters=folder / "none", threads=1)
    with pytest.raises(AdapterError, match="adapter_rank is 0"):
        Engine.load(bundle, adapters=folder, adapter_rank=0, threads=1)
    with Engine.load(bundle, threads=1, cache=False) as plain:
        for prompt, settings in (("a cat", {"lora": {"a": 1}}), ("<lora:a:1>", {"prompt_syntax": "a1111"})):
            with pytest.raises(AdapterError, match=r"LoRA 'a', and the engine was loaded without any.*--lora-dir"):
                plain(prompt, **settings)


def test_files_come_and_go_and_are_dropped(taking: Exported, library: Library, tmp_path: Path) -> None:
    folder = tmp_path / "loras"
    folder.mkdir()
    source = library("sd")
    (folder / "outside.safetensors").symlink_to(source / "a.safetensors")
    with Engine.load(taking("sd")[1], threads=1, cache=False, adapters=folder, adapter_rank=9) as engine:
        mixed = engine.model.adapters
        assert mixed is not None
        assert not mixed.library.files
        with pytest.raises(AdapterError, match="no LoRA 'outside'"):  # a link that leads out of the folder
            drawn(engine, lora={"outside": 1})
        tensors = load_file(source / "a.safetensors")
        save_file(tensors, folder / "one.safetensors")
        before = drawn(engine, lora={"one": 0.5})
        save_file({key: np.asarray(array * 2) for key, array in tensors.items()}, folder / "one.safetensors")
        assert psnr(drawn(engine, lora={"one": 0.5}), before) < 60
        save_file(
            {key: np.asarray(array * np.float32(np.nan)) for key, array in tensors.items()}, folder / "one.safetensors"
        )
        with pytest.raises(AdapterError, match="not finite"):
            drawn(engine, lora={"one": 0.5})


def test_beside_a_merged_one(engine: Engine, library: Library) -> None:
    before, folder = drawn(engine, lora={"a": 0.5}), library("sd")
    engine.set_lora({folder / "b.safetensors": 1.0})
    both = drawn(engine, lora={"a": 0.5})
    engine.set_lora({folder / "b.safetensors": 1.0, folder / "a.safetensors": 0.5})
    assert psnr(both, drawn(engine)) > 60
    assert psnr(both, before) < 40
    engine.set_lora()
    np.testing.assert_array_equal(drawn(engine, lora={"a": 0.5}), before)


def test_what_was_used_longest_ago_is_dropped() -> None:
    made: list[str] = []
    kept = Kept[str, bytes](10, len)

    def get(key: str, size: int) -> bytes:
        return kept(key, lambda: made.append(key) or bytes(size))  # type: ignore[func-returns-value]

    for key, size in (("a", 4), ("b", 4), ("a", 4), ("c", 5), ("a", 4), ("b", 4), ("d", 99), ("d", 99), ("a", 4)):
        assert len(get(key, size)) == size
    assert made == ["a", "b", "c", "b", "d", "a"]
    counted = Kept[str, bytes](2)
    for key in ("a", "b", "a", "c", "b"):
        counted(key, lambda key=key: made.append(key) or b"")  # type: ignore[misc, func-returns-value]
    assert made[6:] == ["a", "b", "c", "b"]


def test_with_a_controlnet(taking: Exported, exported: Exported, library: Library) -> None:
    """Jobs with a LoRA, a ControlNet, both and none in one batch; each is to the bit the one made alone."""
    loading = {"threads": 1, "cache": False, "control": {"edges": exported("control-sd-1")[1]}}
    edges, (_, bundle), folder = np.eye(32, dtype=np.uint8) * 255, taking("sd"), library("sd")
    asked = [{}, {"lora": {"a": 0.5}}, {"control": {"edges": edges}}]
    asked.append({"lora": {"a": 0.5, "b": 0.2}, "control": {"edges": edges}})
    with Engine.load(bundle, adapters=folder, adapter_rank=9, **loading) as engine:
        jobs = [engine.requests(["a cat"], SETTINGS | own)[0] for own in asked]
        engine.run(jobs)
        pictures = [np.asarray(picture) for picture in engine.pictures(jobs)]
        for picture, own in zip(pictures, asked, strict=True):
            np.testing.assert_array_equal(picture, drawn(engine, **own))
    merged = {folder / "a.safetensors": 0.5, folder / "b.safetensors": 0.2}
    with Engine.load(bundle, lora=merged, **loading) as engine:
        assert psnr(pictures[3], drawn(engine, control={"edges": edges})) > 60
    assert min(psnr(pictures[3], picture) for picture in pictures[:3]) < 40


def test_the_commands(exported: Exported, library: Library, tmp_path: Path) -> None:
    run = CliRunner().invoke
    assert run(latentrt, ["export", str(exported("sd")[1]), str(tmp_path / "taking"), "--adapters"]).exit_code == 0
    base = ["generate", "a cat", "-b", str(tmp_path / "taking"), "-s", "2", "--size", "32x32", "-o"]
    named = [*base, str(tmp_path / "named.png"), "--lora-dir", str(library("sd")), "--lora-name", "a:0.5:0.2"]
    tagged = [*base, str(tmp_path / "tagged.png"), "--lora-dir", str(library("sd")), "--prompt-syntax", "a1111"]
    tagged[1] += "<lora:a:0.2:0.5>"
    pictures = []
    for arguments in (named, tagged):
        done = run(latentrt, arguments)
        assert done.exit_code == 0, done.output
        pictures.append(np.asarray(Image.open(arguments[arguments.index("-o") + 1])))
    np.testing.assert_array_equal(pictures[0], pictures[1])
    with Engine.load(tmp_path / "taking", threads=1, lora=f"{library('sd') / 'a.safetensors'}:0.5:0.2") as engine:
        assert psnr(pictures[0], np.asarray(engine("a cat", steps=2, height=32, width=32)[0])) > 60
    alone = [*base, str(tmp_path / "alone.png"), "--lora-name", "a"]
    for wrong, found in ((alone, "without --lora-dir"), ([*named, "--lora-name", "a"], "each LoRA")):
        with pytest.raises(RequestError, match=found):
            run(latentrt, wrong, catch_exceptions=False)
