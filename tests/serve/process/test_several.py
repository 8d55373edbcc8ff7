"""Settings of several models: how they are named, and what each has for itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from latentrt.command.serve import serve
from latentrt.errors import RequestError
from latentrt.serve.process.config import Settings, load_settings

TABLES = """
queue = 9
steps = 20

[models]
first = "emoji"

[models.other]
bundle = "/models/sd15"
controlnet = ["edges=/models/canny"]
lora_dir = "/loras"
steps = 30
aliases = ["dall-e-4"]
"""


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"LATENTRT_{name.upper()}", raising=False)


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "serve.toml"
    path.write_text(TABLES)
    return path


def shown(*words: str) -> dict[str, Any]:
    answer = CliRunner().invoke(serve, [*words, "--print-config"])
    if answer.exception is not None:
        raise answer.exception
    found: dict[str, Any] = json.loads(answer.output)
    return found


def test_words_of_the_command_are_bundles(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (shown("/models/a")["bundle"], shown("/models/a")["models"]) == ("/models/a", {})
    named = {"a": {"bundle": "emoji"}, "b": {"bundle": "/models/sd"}}
    assert shown("a=emoji", "b=/models/sd")["models"] == named
    monkeypatch.setenv("LATENTRT_MODELS", "a=emoji, b=/models/sd")
    assert shown()["models"] == named


def test_a_table_has_what_is_a_models_own(toml: Path) -> None:
    first, other = load_settings({}, toml).each()
    assert (first.model_name, str(first.bundle), first.steps, first.queue) == ("first", "emoji", 20, 9)
    assert (other.model_name, str(other.bundle), other.steps, other.queue) == ("other", "/models/sd15", 30, 9)
    assert (other.controlnet, str(other.lora_dir)) == (("edges=/models/canny",), "/loras")
    assert (first.controlnet, first.lora_dir, first.models) == ((), None, {})
    assert ("dall-e-3" in first.aliases, other.aliases) == (True, ("dall-e-4",))
    assert load_settings({}, toml).takes_maps
    assert len(load_settings({"models": "one=emoji"}, toml).each()) == 1  # flags precede the file


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"models": "a=emoji,b"}, "model is 'b'; needed: NAME=BUNDLE"),
        ({"models": "a=emoji,a=pixels"}, "there are two model a"),
        ({"models": {"a": {"steps": 2}}}, "a has no bundle"),
        ({"models": {"a": {"bundle": "emoji", "port": 2}}}, "a has 'port', and a model's own settings are bundle, "),
        ({"models": {"a": {"bundle": "emoji", "steps": 0}}}, "a: steps: Input should be greater than or equal to 1"),
        ({"models": {"a b": "emoji"}}, "models"),
        ({"models": "a=emoji", "bundle": "emoji"}, "bundle and models are both set"),
        ({"models": "a=emoji", "model_name": "b"}, "model_name and models are both set"),
        ({"models": "a=emoji,b=pixels", "ray": True}, "there are 2 models, and a server by Ray has one"),
        ({"models": "a=emoji,b=pixels", "device": "cuda"}, "a is on cuda: several models are served on a CPU"),
        ({"models": "a=emoji,b=pixels", "backend": "tensorrt"}, "a is on tensorrt: several models are"),
        ({"models": {"a": "emoji", "b": {"bundle": "pixels", "device": "cuda:1"}}}, "b is on cuda:1: several"),
        ({"idle_unload": 3, "ray": True}, "idle_unload is for a server without ray"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(RequestError) as caught:
        load_settings(settings)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("/models/a", "/models/b"), "give it a name, as a=/models/a"),
        (("a=emoji", "/models/b"), "/models/b has no name"),
        (("/models/a", "--bundle", "/models/b"), "there are /models/a and --bundle"),
    ],
)
def test_bundles_without_names_are_refused(words: tuple[str, ...], told: str) -> None:
    with pytest.raises(RequestError) as caught:
        shown(*words)
    assert told in str(caught.value)


def test_one_model_may_have_a_name_anywhere() -> None:
    (one,) = load_settings({"models": "a=emoji", "device": "cuda"}).each()
    assert (one.model_name, one.device) == ("a", "cuda")
    (one,) = load_settings({"models": "a=emoji", "ray": True}).each()
    assert (one.model_name, one.ray, one.models) == ("a", True, {})
