"""ControlNets, T2I-Adapters and LoRAs measured against diffusers, and that those that differ are caught."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from latentrt.bundle.bundle import Bundle, write_manifest
from latentrt.command import main as cli
from latentrt.errors import AdapterError, ExportError, RequestError
from latentrt_export.checkpoint.single.choices import Choices
from latentrt_export.cli import run_verify
from latentrt_export.merge_bundle import merge_bundle
from latentrt_export.verify.add_ons import verify_add_on
from latentrt_export.verify.checks import Check
from latentrt_export.verify.verify import verify
from tests.support.models.controlnets import POOLS, UNION
from tests.support.models.loras import EVERYWHERE, PRODUCTS, write_lora

Exported = Callable[[str], tuple[Path, Path]]


def measured(checks: list[Check]) -> dict[str, float]:
    """Return the figures by what they are of; all of them within their bounds."""
    assert [check for check in checks if not check.passed] == []
    assert all(check.value is not None for check in checks)
    return {f"{check.depth} {check.what} {check.measure}": float(check.value or 0) for check in checks}


@pytest.mark.parametrize(
    ("base", "add_on", "images"),
    [
        ("sd", "control-sd-1", 5),
        pytest.param("sdxl", f"control-sdxl-{POOLS}", 5, marks=pytest.mark.slow),
        ("sd-inpainting", "control-sd-1", 1),
        ("sdxl", f"control-sdxl-{UNION}", 4),  # diffusers' pipelines of Unions have no guess mode that works
        ("sd", "adapter-colour", 1),
        ("sdxl", "adapter-grey", 1),
    ],
)
def test_add_ons_equal_diffusers(exported: Exported, base: str, add_on: str, images: int) -> None:
    """With what their bundles hold, and with the checkpoint."""
    exported("sd")  # of which the ControlNets of the inpainting model are made
    model, bundle = exported(base)[1], exported(add_on)[1]
    found = measured(list(verify_add_on(str(bundle), model, steps=3)))
    networks = {what: value for what, value in found.items() if what.startswith("network")}
    assert all(value < (3e-3 if "in float16" in what else 4e-6) for what, value in networks.items())
    pictures = [value for what, value in found.items() if "PSNR" in what]
    assert len(pictures) == images
    assert min(pictures) > 60


def test_one_that_differs_exits_with_1(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, (source, add_on) = exported("sd")[1], exported("control-sd-1")
    bundle = shutil.copytree(add_on, tmp_path / "bundle")
    weights = bundle / "controlnet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["controlnet_mid_block.weight"] *= 2
    save_file(tensors, weights, metadata={"format": "pt"})
    opened = Bundle.open(bundle, check_hashes=False)
    write_manifest(bundle, opened.spec, opened.files)
    arguments = ["verify", str(bundle), "--base", str(base), "--against", str(source), "--steps", "2", "--json"]
    monkeypatch.setattr(sys, "argv", ["latentrt", *arguments])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    report = json.loads(capsys.readouterr().out)
    assert (exit.value.code, report["passed"]) == (1, False)
    failed = {(check["depth"], check["what"]) for check in report["checks"] if check["passed"] is False}
    assert ("network", "controlnet: residual_mid") in failed
    assert {what for depth, what in failed if depth == "network"} == {"controlnet: residual_mid"}


@pytest.mark.parametrize("family", ["sd", pytest.param("sd2", marks=pytest.mark.slow)])
def test_loras(exported: Exported, tmp_path: Path, family: str) -> None:
    """Weights in float32, and in float16, to which merged ones are rounded on both sides."""
    (checkpoint, plain), bundle = exported(family), tmp_path / "bundle"
    merge_bundle(plain, bundle, (), adapters=True)
    lora = write_lora(tmp_path / "lora.safetensors", checkpoint, "diffusers", PRODUCTS, ranks=(70,))
    found = measured(list(verify_add_on(f"{lora}:0.6:0.9", bundle, steps=3)))
    assert min(value for what, value in found.items() if "PSNR, dB" in what) > 60
    assert len([what for what in found if "lora.safetensors:0.6:0.9 with each request" in what]) == 1


def test_loras_that_one_side_does_not_take(exported: Exported, tmp_path: Path) -> None:
    """They are not measured, and the note says why: convolutions by request; differences of weights in diffusers."""
    checkpoint, bundle = exported("sd")
    lora = write_lora(tmp_path / "lora.safetensors", checkpoint, "kohya", EVERYWHERE)
    *merged, by_request = verify_add_on(str(lora), bundle, steps=1)
    assert measured(merged)
    assert (by_request.passed, by_request.note) == (None, "the networks of sd take no LoRAs of each request")
    save_file({"lora_unet_conv_in.diff_b": np.ones(16, np.float32)}, tmp_path / "diff.safetensors")
    (merged_one, _) = verify_add_on(str(tmp_path / "diff.safetensors"), bundle, steps=1)
    assert merged_one.passed is None
    assert "diffusers does not fuse it" in merged_one.note


def test_what_cannot_be_measured(exported: Exported, tmp_path: Path) -> None:
    base, add_on = exported("sd")[1], exported("control-sd-1")[1]
    with pytest.raises(ExportError, match=r"is a ControlNet.*--base BUNDLE"):
        next(verify(add_on, add_on))
    with pytest.raises(ExportError, match=r"with --base, is of the kind model.*leave out --base"):
        next(verify_add_on(str(base), base))
    with pytest.raises(ExportError, match=r"is of the kind ip_adapter.*T2I-Adapter, or a LoRA"):
        next(verify_add_on(str(exported("ip-sd-base")[1]), base))
    with pytest.raises(RequestError, match="sdxl has"):
        next(verify_add_on(str(add_on), exported("sdxl")[1]))
    with pytest.raises(ExportError, match="adapter-colour has t2i_adapter"):
        next(verify_add_on(str(add_on), base, against=exported("adapter-colour")[0]))
    with pytest.raises(ExportError, match="--against for the LoRA"):
        next(verify_add_on("a.safetensors", base, against=base))
    lora = write_lora(tmp_path / "lora.safetensors", exported("sdxl")[0], "ldm")
    with pytest.raises(AdapterError, match="made for texts of 80 numbers"):
        next(verify_add_on(str(lora), base))
    with pytest.raises(ExportError, match="--ema with --base"):
        run_verify(add_on, None, base=base, steps=1, choices=Choices(ema=True), as_json=True)
