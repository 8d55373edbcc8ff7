"""Settings: where they come from, in which order, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from latentrt.command.serve import serve
from latentrt.errors import LatentrtError, RequestError
from latentrt.serve.process.config import Settings, load_settings

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"LATENTRT_{name.upper()}", raising=False)


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "serve.toml"
    path.write_text('port = 1\nqueue = 2\nmax_n = 3\naliases = ["a", "b"]\nkeys = ["k"]\n')
    return path


def test_flags_before_variables_before_the_file(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTRT_PORT", "10")
    monkeypatch.setenv("LATENTRT_QUEUE", "20")
    settings = load_settings({"port": "100"}, toml)
    assert (settings.port, settings.queue, settings.max_n, settings.heartbeat) == (100, 20, 3, 10)
    assert settings.aliases == ("a", "b")


def test_a_variable_may_name_the_file(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTRT_CONFIG", str(toml))
    assert load_settings({}).queue == 2


def test_lists_in_variables_have_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTRT_ALIASES", "one, two,")
    monkeypatch.setenv("LATENTRT_KEYS", "k1,k2")
    settings = load_settings({"sizes": "512x512"})
    assert (settings.aliases, settings.sizes) == (("one", "two"), ("512x512",))
    assert settings.secrets() == (b"k1", b"k2")


def test_lists_in_flags_have_commas_or_come_one_by_one() -> None:
    flags = ["--cors-origin", "https://a.example", "--cors-origin", "http://b.example:8080,*", "--sizes", "64x64,8x8"]
    shown = json.loads(CliRunner().invoke(serve, [*flags, "--print-config"]).output)
    assert shown["cors_origin"] == ["https://a.example", "http://b.example:8080", "*"]
    assert shown["sizes"] == ["64x64", "8x8"]


def test_keys_come_from_a_file_too(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# of the team\nfirst\n\n  second  \n")
    assert load_settings({"keys_file": str(path)}).secrets() == (b"first", b"second")
    for bad in (tmp_path / "none", tmp_path):
        with pytest.raises(RequestError, match="cannot be read"):
            load_settings({"keys_file": str(bad)}).secrets()
    path.write_text("# nothing\n")
    with pytest.raises(RequestError, match="has no key"):
        load_settings({"keys_file": str(path)}).secrets()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"port": "70000"}, "port"),
        ({"port": "x"}, "port"),
        ({"queue": "0"}, "queue"),
        ({"drain_timeout": "nan"}, "drain_timeout"),
        ({"log_format": "xml"}, "log_format"),
        ({"steps": "0"}, "steps"),
        ({"nothing": "1"}, "nothing"),
        ({"cors_origin": "a.example"}, "cors_origin"),
        ({"cors_origin": "https://a.example/page"}, "cors_origin"),
        ({"webhook_host": "ftp://a.example"}, "webhook_host"),
        ({"webhook_host": "a.example/path", "webhook_secret": SECRET}, "webhook_host"),
        ({"webhook_host": "a.example:99999", "webhook_secret": SECRET}, "Port out of range"),
        ({"webhook_host": "a.example"}, "webhook_host needs webhook_secret"),
        ({"webhook_secret": "whsec_c2hvcnQ="}, "base64 of 24 to 64"),
        ({"webhook_host": "a.example", "webhook_secret": SECRET, "ray": True, "replicas": "2"}, "needs one replica"),
    ],
)
def test_bad_values_are_named(flags: dict[str, Any], named: str) -> None:
    with pytest.raises(RequestError, match=named) as caught:
        load_settings(flags)
    assert "whsec_c" not in str(caught.value)


def test_bad_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    with pytest.raises(RequestError, match="there is no file"):
        load_settings({}, path)
    path.write_text("port = ")
    with pytest.raises(RequestError, match="cannot be read"):
        load_settings({}, path)
    path.write_text("prot = 1")
    with pytest.raises(RequestError, match="prot"):
        load_settings({}, path)


def test_no_more_pictures_than_the_queue_holds() -> None:
    assert load_settings({"queue": "4"}).most_pictures == 4
    assert load_settings({}).most_pictures == 10


# ---- The verb


def test_help_lists_every_setting_but_secrets() -> None:
    text = CliRunner().invoke(serve, ["--help"]).output
    for name in Settings.model_fields:
        flagless = ("keys", "webhook_secret", "models")
        assert (f"--{name.replace('_', '-')} " in text) == (name not in flagless), name
    for section in ("Network:", "Model:", "Load:", "Limits:", "Defaults:", "Logs:"):
        assert section in text
    assert "[default: 127.0.0.1]" in " ".join(text.split())


def test_the_settings_that_hold_are_printed_without_keys(toml: Path) -> None:
    answer = CliRunner().invoke(serve, ["--config", str(toml), "--port", "5", "--log-prompts", "--print-config"])
    shown = json.loads(answer.output)
    assert set(shown) == set(Settings.model_fields)
    assert (shown["port"], shown["queue"], shown["log_prompts"]) == (5, 2, True)
    assert shown["keys"] == ["**********"]


def test_bad_flags_are_the_commands_own_errors() -> None:
    answer = CliRunner().invoke(serve, ["--max-n", "many", "--print-config"])
    assert isinstance(answer.exception, LatentrtError)
    assert "--max-n" in answer.exception.fix


def test_without_the_extra_the_command_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['pydantic_settings'] = None\n"
        "from latentrt.command.serve import serve\n"
        "assert not {'pydantic', 'fastapi', 'uvicorn'} & set(sys.modules)\n"
        "try: serve(['--port', '1'], standalone_mode=False)\n"
        "except Exception as error: print(type(error).__name__, error.fix)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "MissingDependencyError pip install 'latentrt[serve]'"
