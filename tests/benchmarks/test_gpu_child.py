"""Children of the GPU benchmark, the limits of a run, and counted multiplications."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.child import Child, Deadline, Meter, NotMeasuredError
from benchmarks.gpu.macs import macs
from latentrt.bundle.bundle import EMBEDDED

SD15 = {  # stable-diffusion-v1-5's UNet
    **{"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "attention_head_dim": 8},
    **{"sample_size": 64, "layers_per_block": 2},
}


def flops(network: Any, *shapes: tuple[int, ...]) -> int:
    """Return torch's count for one call of a network without weights."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        sample, states = (torch.empty(shape) for shape in shapes)
        network(sample, torch.empty(shapes[0][0]), states)
    return counter.get_total_flops()


def test_macs_are_those_that_torch_counts() -> None:
    config = json.loads((EMBEDDED / "unet" / "config.json").read_text())
    with torch.device("meta"):
        emoji, sd15 = UNet2DConditionModel.from_config(config), UNet2DConditionModel(**SD15)
    paths = [EMBEDDED / "unet" / name for name in ("text.onnx", "model.onnx")]
    for batch, height, width in ((1, 16, 16), (3, 8, 12)):
        theirs = flops(emoji, (batch, config["in_channels"], height, width), (batch, 77, config["cross_attention_dim"]))
        sizes = {"batch": batch, "height": height, "width": width, "tokens": 77}
        assert 2 * sum(macs(path, sizes) for path in paths) == theirs
    assert flops(sd15, (1, 4, 64, 64), (1, 77, 768)) == 2 * 401_636_720_640


@pytest.mark.parametrize(
    ("method", "arguments", "limit", "reason"),
    [
        ("add", ("text",), 3600, "TypeError: unsupported operand"),
        ("die", (), 3600, "exit code 3: CUDA error: an illegal memory access"),
        ("sleep", (), 0.5, "longer than"),
    ],
)
def test_a_child_that_fails_says_why(method: str, arguments: tuple[Any, ...], limit: float, reason: str) -> None:
    child = Child("tests.support.gpu.child_worker:Worker", 2)
    assert child.ask(3600, "add", 3) == 5
    with pytest.raises(NotMeasuredError, match=reason):
        child.ask(limit, method, *arguments)
    child.close()


def test_the_limit_of_one_request_ends_with_the_run() -> None:
    assert Deadline(None).left(7) == 7
    assert Deadline(60).left(7) == 7
    assert Deadline(0.1).left(7) <= 6
    with pytest.raises(NotMeasuredError, match=r"Out of time \(--minutes 0\)"):
        Deadline(0).left(7)


def test_memory_is_what_a_process_took_while_others_slept() -> None:
    free, seen = 1000, threading.Semaphore(0)

    def look() -> int:
        seen.release()
        return free

    def until_seen() -> None:
        """Wait for a reading that began after the last change."""
        while seen.acquire(blocking=False):
            pass
        seen.acquire()
        seen.acquire()

    meter = Meter(look)
    with meter.watch("a") as first:
        free = 600
        until_seen()
        free = 700  # 300 stay
    with meter.watch("b") as second:
        free = 650
    with meter.watch("a") as again:
        free = 450
        until_seen()
        free = 600
    assert (first, second, again) == ([400], [50], [500])
