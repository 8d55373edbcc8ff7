"""The changes of LoRAs that are measured."""

import pytest

from benchmarks.cpu.lora_switch import measure
from latentrt.bundle.bundle import EMBEDDED


@pytest.mark.slow
def test_every_change_is_made() -> None:
    assert measure(EMBEDDED, threads=1, repeats=0) == {}  # the first round is left out
