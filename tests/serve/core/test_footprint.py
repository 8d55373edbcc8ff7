"""What a picture takes of memory, and the budget that follows from it."""

from __future__ import annotations

import sys

import pytest

from latentrt import Engine
from latentrt.bundle.spec import LORA
from latentrt.serve.core.measured.footprint import budget_of, measured
from latentrt.serve.core.rules.budget import Footprint

MIB = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells it")
def test_a_picture_is_measured(embedded: Engine) -> None:
    """32 x 32 latents decoded are 256 x 256 pixels: 64 channels of those in float32 are 16 MiB."""
    ((shape, taken),) = measured(embedded, (32,)).items()
    assert shape == (4, 32, 32)
    assert MIB < taken.lane < 200 * MIB
    assert 16 * MIB < taken.decode < 300 * MIB


def test_what_cannot_be_decoded_at_once_is_decoded_in_tiles(engine: Engine) -> None:
    known = {(4, 64, 64): Footprint(0, 100)}
    assert budget_of(engine, known, 200, 64 * 64).tile is None
    assert engine.model.tiles is None
    budget = budget_of(engine, known, 100, 64 * 64)
    assert budget.tile == 40
    tiles = engine.model.tiles
    assert tiles is not None
    assert (tiles.side, engine.model.facts(64, 64), engine.model.facts(40, 40)) == (40, {"tile": 320}, {})
    assert budget_of(engine, known, 1000, 64 * 64).tile == 40  # what the engine was loaded with holds


def test_without_a_number_it_is_half_of_what_is_free(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentrt.serve.core.measured.footprint.free_memory", lambda: 1000)
    assert budget_of(engine, {}, None, 1).memory == 500
    monkeypatch.setattr("latentrt.serve.core.measured.footprint.free_memory", lambda: None)
    assert budget_of(engine, {}, None, 1).memory is None


def test_loras_of_each_lane_count() -> None:
    """What a picture with a LoRA holds, and what a call stacks of it."""
    with Engine.load(adapters={"ink": "emoji-ink"}, adapter_rank=8, check_hashes=False, threads=1) as engine:
        (job,) = engine.requests(["a cat"], {"steps": 1, "lora": {"ink": 1.0}})
        mixed = engine.model.adapters
        assert mixed is not None
        asked = mixed.asked({"ink": (1.0, 1.0)})
        held = sum(array.nbytes for name in engine.spec.networks for array in mixed.inputs(name, asked).values())
        called = sum(array.nbytes for name, array in job.sides[-1].items() if name.startswith(LORA))
        assert budget_of(engine, {}, None, 1).adapters == held + called > 0
