"""`latentrt export` and `verify` with a single file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from latentrt_export.graphs.to_onnx import quiet
from tests.command.conftest import Run, refused
from tests.support.models.single_file import Tensors, networks_of, single_tensors, write_single


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    with quiet():
        return single_tensors("sd1", networks_of("sd1"))


def test_a_single_file_is_exported(
    run: Run, fast: pytest.MonkeyPatch, tensors: Tensors, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What it is taken for is printed, and the manifest has it with the options, without folders."""
    fast.setattr("latentrt_export.golden.golden_runs", lambda root, spec: ())
    file = write_single(tmp_path_factory.mktemp("files") / "my.safetensors", tensors)
    vae = write_single(file.with_name("vae.safetensors"), tensors)
    options = ("--prediction-type", "v_prediction", "--vae", str(vae), "--model", "sd1")
    code, out, _ = run("export", str(file), "bundle", *options)
    assert code == 0
    told = (
        "Stable Diffusion 1 (by --model; cross-attention width 64), v_prediction by --prediction-type, VAE of vae.saf"
    )
    assert told in out
    made = json.loads(Path("bundle/manifest.json").read_text())["model"]["made"]
    assert made["command"] == (
        "latentrt export my.safetensors --model=sd1 --prediction-type=v_prediction --vae=vae.safetensors"
    )
    assert made["notes"][0].startswith(told)
    code, out, _ = run("export", str(file), "bundle", "--overwrite", "--json")
    assert (code, json.loads(out)["notes"][0][:18]) == (0, "Stable Diffusion 1")


def test_what_is_refused_is_refused_before_anything_is_written(
    run: Run, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("files")
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "model.ckpt").write_bytes(b"pickle")
    assert "is empty" in refused(run, "export", str(folder / "empty.safetensors"), "out")
    assert "pickled weights" in refused(run, "export", str(folder / "model.ckpt"), "out")
    assert "no model 'sd3'" in refused(run, "export", str(folder / "empty.safetensors"), "out", "--model", "sd3")
    assert "there is no file" in refused(run, "export", "models/no.safetensors", "out")
    for options, message in (
        (("--lora", "a.safetensors:strong"), "the LoRA is 'a.safetensors:strong'"),
        (("--allow-unmatched",), "allow_unmatched without a LoRA"),
    ):
        assert message in refused(run, "export", str(folder), "out", *options)
    assert not Path("out").exists()


def test_verify_passes_the_options_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(
        "latentrt_export.cli.run_verify", lambda bundle, against, **more: seen.append((against, more["choices"])) or 0
    )
    assert run("verify", "bundle", "--against", "a.safetensors", "--ema", "--vae", "v.safetensors")[0] == 0
    ((against, choices),) = seen
    assert (against, choices.ema, str(choices.vae)) == ("a.safetensors", True, "v.safetensors")
