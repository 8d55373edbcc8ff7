"""Parity of the embedded model with diffusers at all three depths, and that a bundle that differs is caught."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from engine import Engine, cli
from engine.bundle import EMBEDDED, Bundle, write_manifest
from export.verify import Check, image_checks, network_checks, psnr, step_checks

PROMPTS = (
    *("a red apple", "a cat face", "an emoji of a robot", "owl", "a pizza", "a dragon", "a butterfly"),
    "a prompt the model has never seen, with many words",
)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.load(check_hashes=False) as engine:
        yield engine


def test_networks(engine: Engine) -> None:
    checks = list(network_checks(engine, EMBEDDED))
    assert {check.what.split(":")[0] for check in checks} == set(engine.spec.graphs)
    assert [check for check in checks if not check.value < 1e-5] == []


def test_steps(engine: Engine) -> None:
    checks = list(step_checks(engine.schedule, 20))
    assert len(checks) >= 16
    assert [check for check in checks if not check.passed] == []


@pytest.mark.parametrize("solver", [None, "dpmpp-2m", "euler-ancestral", "unipc"])
def test_image(engine: Engine, solver: str | None) -> None:
    """Eight prompts in one batch, guided and not, with a negative prompt: latents at every step, pixels."""
    checks = list(image_checks(engine, EMBEDDED, 12, prompts=PROMPTS, solvers=[solver], negative="blurry"))
    assert len(checks) == 4
    for check in checks:
        assert check.passed, check
        assert check.value >= 70 if check.at_least else check.value <= 1e-5, check


def test_psnr() -> None:
    black, grey = np.zeros((2, 4, 4, 3), np.uint8), np.full((2, 4, 4, 3), 1, np.uint8)
    assert psnr(black, black) == float("inf")
    assert psnr(black, grey) == pytest.approx(20 * np.log10(255))


def test_nan_never_passes() -> None:
    assert not Check("network", "unet", "relative L2", float("nan"), 1.0).passed
    assert not Check("image", "x", "PSNR", float("nan"), 50.0, at_least=True).passed


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
    failed = {(check["depth"], check["what"]) for check in report["checks"] if not check["passed"]}
    assert ("network", "vae_decoder: image") in failed
    assert {depth for depth, _ in failed} == {"network", "image"}
    assert not any(what.startswith("unet") for _, what in failed)
