"""Other engines beside ours: fakes of them, environments, the arithmetic of the goal, and the page."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.gpu.child import NotMeasuredError
from benchmarks.measures import OURS, Spread
from benchmarks.peers import command, measure, page
from benchmarks.peers.config import MODELS, PEERS, SCRIPTS, Config, Peer, requirements
from benchmarks.peers.environments import Environments, last_words
from benchmarks.peers.measure import groups
from benchmarks.peers.models import Folders, with_older_names
from benchmarks.peers.process import PeerProcess
from benchmarks.peers.results import BATCH, COLD, FILE, ONE, READY, UNITS, Record, Results, verdict
from benchmarks.timing import run_child
from latentrt.bundle.bundle import EMBEDDED

FAKE = f"""
import sys
sys.path.insert(0, {str(SCRIPTS)!r})
from protocol import serve
import numpy as np

def load(settings):
    print("a line that no answer is mixed with")
    if settings["options"].get("refuses"):
        raise ValueError("this model is not known: /some/folder/unet")
    if settings["options"].get("dies"):
        raise SystemExit(3)
    def draw(task):
        assert np.load(task["latents"]).shape[0] == len(task["prompts"]) == len(task["seeds"])
        if settings["options"].get("fails") and len(task["prompts"]) > 1:
            raise SystemExit(4)
        return [np.zeros((*task["size"], 3), np.uint8) for _ in task["prompts"]]
    return draw

serve(load)
"""


@pytest.fixture
def script(tmp_path: Path) -> str:
    """Return the path of a peer's script that draws black pictures."""
    path = tmp_path / "fake.py"
    path.write_text(FAKE, encoding="utf-8")
    return str(path)


def fake(script: str, environment: str = "here", **options: Any) -> Peer:
    return Peer("a fake", environment, script, ("numpy",), "It draws nothing.", options)


def test_peers_are_measured_in_turn_and_failures_are_rows(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peers = {
        "black": fake(script),
        "single": replace(fake(script), batches=False, same_noise=False),
        "fails": fake(script, fails=True),
        "refuses": fake(script, refuses=True),
        "dies": fake(script, dies=True),
        "absent": fake(script, "absent"),
    }
    monkeypatch.setattr(Environments, "python", python)
    monkeypatch.setattr(measure, "run_child", child)
    model = replace(MODELS["emoji"], steps=1, rounds=1, batch=2)
    config = Config((model,), peers, threads=1, folder=tmp_path / "peers")
    measure.run(config, tmp_path)
    results = Results.read(tmp_path)
    records = results.records["emoji"]
    assert set(records["black"].samples) == set(UNITS)
    assert all(value > 0 for row in records["black"].samples.values() for side in row.values() for value in side)
    assert set(records["single"].samples) == {COLD, READY, ONE, "peak memory, cold start"}
    assert records["single"].missing == ""
    assert records["black"].psnr_db is not None
    assert records["single"].psnr_db is None
    assert records["fails"].missing.startswith(f"{BATCH}: the process ended with 4")
    assert records["fails"].samples.keys() == records["single"].samples.keys()
    assert records["refuses"].missing == "ValueError: this model is not known: unet"
    assert "ended with 3" in records["dies"].missing
    assert records["absent"].missing == "no such package"
    page.write(tmp_path)
    text = (tmp_path / page.PAGE).read_text(encoding="utf-8")
    assert all(record.missing in text for record in records.values())
    assert str(tmp_path) not in text + results.path.read_text(encoding="utf-8")
    assert (tmp_path / page.plot_of("emoji")).stat().st_size > 1000

    measure.run(replace(config, peers={"black": fake(script)}, parts=("loaded",)), tmp_path)
    again, first = Results.read(tmp_path).records["emoji"]["black"].samples, records["black"].samples
    assert again[COLD] == first[COLD], "samples of a part that is left out are kept"
    assert again[ONE] != first[ONE]


def python(self: Environments, name: str) -> list[str]:
    if name == "absent":
        cannot_install()
    return [sys.executable, "-s"]


def child(words: Sequence[str | Path]) -> SimpleNamespace:
    """Run it, without its memory: this process is larger."""
    return SimpleNamespace(seconds=run_child(words).seconds, mebibytes=100.0)


def cannot_install(*_: object) -> None:
    raise NotMeasuredError("no such package")


def test_a_process_that_does_not_answer_is_ended(tmp_path: Path) -> None:
    path = tmp_path / "sleeps.py"
    path.write_text("import time; time.sleep(60)", encoding="utf-8")
    process = PeerProcess([sys.executable, str(path)], {})
    with pytest.raises(NotMeasuredError, match="longer than 0 s"):
        process.load({}, 0.1)
    assert process.close() < 30


def test_an_environment_is_made_once_and_again_for_other_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, ...]] = []

    def make(self: Environments, folder: Path, python: Path, requirements: tuple[str, ...]) -> None:
        folder.mkdir(exist_ok=True)
        made.append(requirements)

    monkeypatch.setattr(Environments, "_make", make)
    for wanted in (("a==1",), ("a==1",), ("a==2",)):
        assert Environments(tmp_path, {"x": wanted}).python("x")[0] == str(tmp_path / "x" / "bin" / "python")
    assert made == [("a==1",), ("a==2",)]


def test_an_environment_that_fails_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[None] = []

    def make(*_: object) -> None:
        tries.append(None)
        cannot_install()

    monkeypatch.setattr(Environments, "_make", make)
    environments = Environments(tmp_path, {"x": ("a==1",)})
    for _ in range(2):
        with pytest.raises(NotMeasuredError, match="no such package"):
            environments.python("x")
    assert len(tries) == 1


def test_reasons_name_no_folder_and_no_address() -> None:
    said = last_words(
        "WARNING: old\nLooking at https://host/simple/x\nERROR: no x in /home/me/x.whl from https://host/x"
    )
    assert said == "ERROR: no x in x.whl from "


def test_older_names_change_names_alone(tmp_path: Path) -> None:
    with_older_names(EMBEDDED, tmp_path / "older")
    path = Path("text_encoder", "model.safetensors")
    old, new = (read(folder / path) for folder in (EMBEDDED, tmp_path / "older"))
    assert {name.removeprefix("text_model."): value for name, value in new.items()} == old
    assert all(name.startswith("text_model.") for name in new)
    unet = tmp_path / "older" / "unet" / "diffusion_pytorch_model.safetensors"
    assert unet.resolve() == (EMBEDDED / "unet" / unet.name).resolve()


def read(path: Path) -> dict[str, bytes]:
    """Return a safetensors file's bytes by name."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    body = data[8 + length :]
    return {name: body[slice(*entry["data_offsets"])] for name, entry in header.items()}


def test_a_folder_is_made_again_when_what_it_depends_on_changes(tmp_path: Path) -> None:
    folders = Folders(Config(folder=tmp_path), MODELS["sd15"], Environments(tmp_path, {}))
    made: list[str] = []
    for stamp in ("a", "a", "b"):
        folders._made("x", stamp, lambda folder, stamp=stamp: (folder.mkdir(), made.append(stamp)))
    assert made == ["a", "b"]


def test_groups_fit_into_memory_beside_ours() -> None:
    needs = {"a": 4.0, "b": 5.0, "c": 5.0, "d": 30.0, "e": 1.0}
    assert groups(4, needs, 15) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert groups(4, {}, 15) == []


def test_the_verdict_is_the_closest_peer_s() -> None:
    near, far = Record({ONE: {OURS: [1, 2], "near": [1.1, 2.4]}}), Record({ONE: {OURS: [1, 1], "far": [3, 5]}})
    found = verdict({"near": near, "far": far, "missing": Record()}, ONE)
    assert found == ("near", Spread(pytest.approx(1.15), pytest.approx(1.1), pytest.approx(1.2)), False)
    found = verdict({"far": far}, ONE)
    assert found is not None
    assert found.reached
    assert verdict({"missing": Record()}, ONE) is None


def test_the_page_says_what_was_missed(tmp_path: Path) -> None:
    machine = {"cpu": "x", "cores": 2, "memory_gib": 24, "system": "Linux", "python": "3.11", "load_before": 0.0}
    about = {"date": "2026-01-01", "threads": 2, "machine": {**machine, "versions": {"numpy": "2"}}}
    about |= {"titles": Config().titles(), "differs": {name: peer.differs for name, peer in PEERS.items()}}
    slower = Record({ONE: {OURS: [2.0, 2.0], "diffusers": [1.0, 1.5]}}, versions={"diffusers": "1"}, psnr_db=90.0)
    records = {"emoji": {"diffusers": slower, "sdcpp": Record(missing="it does not know the structure")}}
    results = Results(tmp_path / "peers.json", about, {"emoji": MODELS["emoji"].to_dict()}, records)
    text = page.render(results)
    assert "**no** (0.62 to diffusers)" in text
    assert "First by 1.2 in 0 of 6 rows." in text
    assert "| one image | s | 2 (2 to 2) | 1.25 (1 to 1.5), **0.625×** |" in text
    assert "| stable-diffusion.cpp | – | – |" in text
    assert "Not measured: it does not know the structure." in text
    assert "90.0 dB" in text


@pytest.mark.parametrize(("change", "kept"), [({}, ["emoji"]), ({"threads": 4}, []), ({"cpu": "y"}, [])], ids=str)
def test_models_that_are_not_run_again_stay(tmp_path: Path, change: dict[str, Any], kept: list[str]) -> None:
    machine = {"cpu": "x", "cores": 2, "load_before": 0.0}
    about = {"machine": machine, "threads": 2, "titles": {"sdcpp": "sd.cpp"}, "differs": {}}
    record = Record({ONE: {OURS: [2.0], "sdcpp": [1.0]}})
    Results(tmp_path / FILE, about, {"emoji": {}}, {"emoji": {"sdcpp": record}}).write()
    now = {**about, "machine": {**machine, "load_before": 1.0}, "titles": {"diffusers": "diffusers"}}
    if "cpu" in change:
        now["machine"] = {**machine, **change}
    else:
        now |= change
    results = Results.begin(tmp_path, now)
    assert list(results.models) == list(results.records) == kept
    assert results.about["titles"] == {**({"sdcpp": "sd.cpp"} if kept else {}), "diffusers": "diffusers"}


def test_the_page_is_there_before_anything_is_measured(tmp_path: Path) -> None:
    page.write(tmp_path)
    assert page.NOT_YET in (tmp_path / page.PAGE).read_text(encoding="utf-8")


def test_options_reach_the_config(tmp_path: Path) -> None:
    words = ["--models", "sd15", "--peers", "diffusers,sdcpp", "--size", "512", "--steps", "3", "--rounds", "1"]
    config = command._config(command._parser().parse_args([*words, "--threads", "1", "--envs", str(tmp_path)]))
    (model,) = config.models
    assert (model.name, model.size, model.steps, model.rounds) == ("sd15", (512, 512), 3, 1)
    assert (list(config.peers), config.threads, config.folder) == (["diffusers", "sdcpp"], 1, tmp_path)
    with pytest.raises(SystemExit):
        command._parser().parse_args(["--peers", "someone"])


def test_every_peer_has_its_script_and_its_environment() -> None:
    environments = requirements()
    for peer in PEERS.values():
        assert (SCRIPTS / peer.script).is_file()
        assert peer.environment in environments
        if peer.conversion:
            assert (SCRIPTS / peer.conversion[0]).is_file()
            assert peer.conversion[1] in environments
    assert all("==" in requirement for wanted in environments.values() for requirement in wanted)
