"""Parity of the embedded model with diffusers at every depth, and that a bundle that differs is caught."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from latentrt import Engine
from latentrt.bundle.bundle import EMBEDDED, Bundle, write_manifest
from latentrt.command import main as cli
from latentrt.errors import ExportError, UnsafeWeightsError
from latentrt_export.checkpoint.single.choices import AS_THEY_ARE
from latentrt_export.cli import run_verify
from latentrt_export.verify import verify as module
from latentrt_export.verify.checks import Check, psnr
from latentrt_export.verify.images import batch_check, image_checks
from latentrt_export.verify.networks import network_checks
from latentrt_export.verify.reference import Theirs
from latentrt_export.verify.verify import verify

PROMPTS = (
    *("a red apple", "a cat face", "an emoji of a robot", "owl", "a pizza", "a dragon", "a butterfly"),
    "a prompt the model has never seen, with many words",
)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.load(check_hashes=False) as engine:
        yield engine


@pytest.fixture(scope="module")
def theirs(engine: Engine) -> Theirs:
    return Theirs(EMBEDDED, engine)


def test_networks(engine: Engine) -> None:
    every = list(network_checks(engine, EMBEDDED))
    checks, half = ([c for c in every if ("in float16" in c.what) == narrow] for narrow in (False, True))
    assert [check.what for check in half] == [f"{name} in float16" for name in engine.spec.graphs("fp16")]
    assert {check.what.split(":")[0] for check in checks} == {*engine.spec.graphs()} - {"unet_text"}  # with the UNet
    assert {check.measure.split(",")[0] for check in checks} == {"relative L2", "max abs"}
    assert [check for check in checks if check.value is None or not check.value < 1e-5] == []
    assert [check for check in half if check.value is None or not check.value < 1.5e-3] == []


def test_batch(engine: Engine) -> None:
    check = batch_check(engine)
    assert (check.depth, check.value, check.passed) == ("batch", 0.0, True)


@pytest.mark.parametrize("name", ["sd2", "sdxl", "tiny-vae"])
def test_families(exported: Callable[[str], tuple[Path, Path]], name: str) -> None:
    """Checkpoints as they are on the hub: a variant in shards only; two text encoders; AutoencoderTiny as VAE."""
    source, bundle = exported(name)
    checks = list(verify(bundle, source, steps=4))
    assert {check.depth for check in checks} == {"network", "step", "image", "batch"}
    assert [check for check in checks if check.passed is False] == []
    values = [(check.what, check.value) for check in checks if check.depth == "network" and check.value is not None]
    assert [(what, value) for what, value in values if value > (3e-3 if "in float16" in what else 4e-6)] == []


@pytest.mark.parametrize(
    "solver", [None, *(pytest.param(name, marks=pytest.mark.slow) for name in ("euler-ancestral", "dpmpp-2m", "unipc"))]
)
def test_image(engine: Engine, theirs: Theirs, solver: str | None) -> None:
    """Eight prompts in one batch, guided and not, with a negative prompt: latents at every step, pixels."""
    checks = list(image_checks(engine, theirs, 12, prompts=PROMPTS, solvers=[solver], negative="blurry"))
    assert len(checks) == 4
    for check in checks:
        assert check.passed, check
        assert check.value is not None
        assert check.value >= 70 if check.at_least else check.value <= 1e-5, check


def test_the_image_depth_says_what_is_not_served(engine: Engine, theirs: Theirs) -> None:
    checks = list(image_checks(engine, theirs, 60, prompts=PROMPTS[:1], solvers=["lcm"], guidances=[1.0]))
    assert [(check.depth, check.passed) for check in checks] == [("image", None)]
    assert "original_inference_steps" in checks[0].note


def test_psnr() -> None:
    black, grey = np.zeros((2, 4, 4, 3), np.uint8), np.full((2, 4, 4, 3), 1, np.uint8)
    assert psnr(black, black) == float("inf")
    assert psnr(black, grey) == pytest.approx(20 * np.log10(255))


def test_nan_never_passes() -> None:
    assert not Check("network", "unet", "relative L2", float("nan"), 1.0).passed
    assert not Check("image", "x", "PSNR", float("nan"), 50.0, at_least=True).passed
    assert Check("network", "unet", "relative L2", float("nan"), 1.0).to_dict()["value"] == "nan"


@pytest.mark.parametrize("as_json", [True, False])
def test_the_table_shows_what_is_not_served(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    """And notes, each once."""
    checks = [
        *(Check("step", name, "not served", None, 1.0, note="60 steps of 50") for name in ("lcm", "tcd")),
        Check("step", "ddim", "worst", 0.5, 1.0, note="coarse"),
    ]
    monkeypatch.setattr(module, "verify", lambda *_, **__: iter(checks))
    assert run_verify(EMBEDDED, "owner/name", steps=2, choices=AS_THEY_ARE, as_json=as_json) == 0
    out = capsys.readouterr().out
    if as_json:
        report = json.loads(out)
        assert report["passed"]
        assert [check["passed"] for check in report["checks"]] == [None, None, True]
    else:
        lines = out.splitlines()
        assert "not measured" in lines[1]
        assert lines[-3:] == [
            "lcm, tcd: 60 steps of 50",
            "ddim: coarse",
            "1 of 1 within their bounds, 2 not measured",
        ]


def test_what_is_no_checkpoint_is_no_failed_measurement(
    tmp_path: Path, exported: Callable[[str], tuple[Path, Path]]
) -> None:
    with pytest.raises(ExportError, match="no folder"):
        next(verify(EMBEDDED, tmp_path / "nothing"))
    with pytest.raises(ExportError, match=r"no model_index\.json"):
        next(verify(EMBEDDED, tmp_path))
    with pytest.raises(ExportError, match="sdxl has the networks"):
        next(verify(EMBEDDED, exported("sdxl")[0]))
    with pytest.raises(ExportError, match="exported from"):
        list(verify(EMBEDDED, exported("sd")[0], steps=2))


def test_pickles_are_refused(checkpoint: Path) -> None:
    (checkpoint / "unet" / "diffusion_pytorch_model.safetensors").rename(
        checkpoint / "unet" / "diffusion_pytorch_model.bin"
    )
    with pytest.raises(UnsafeWeightsError, match="pickled"):
        next(verify(EMBEDDED, checkpoint))


def test_a_bundle_that_differs_exits_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One weight of the decoder is doubled: its network and the pictures are beyond their bounds, the rest within."""
    bundle = shutil.copytree(EMBEDDED, tmp_path / "bundle")
    weights = bundle / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["decoder.conv_in.weight"] *= 2
    save_file(tensors, weights, metadata={"format": "pt"})
    opened = Bundle.open(bundle, check_hashes=False)
    write_manifest(bundle, opened.spec, opened.files)

    arguments = ["latentrt", "verify", str(bundle), "--against", str(EMBEDDED), "--steps", "2", "--json"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as exit:
        cli.main()
    report = json.loads(capsys.readouterr().out)
    assert exit.value.code == 1
    assert not report["passed"]
    failed = {(check["depth"], check["what"]) for check in report["checks"] if check["passed"] is False}
    assert ("network", "vae_decoder: image") in failed
    assert {depth for depth, _ in failed} == {"network", "image"}
    assert not any(what.startswith("unet") for _, what in failed)
