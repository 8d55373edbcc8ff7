"""LoRAs of each request with TensorRT, on the emulated device: plans of one rank take any LoRAs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from latentrt import Engine
from latentrt.errors import PlanError
from tests.adapters.test_mixed import SETTINGS, drawn
from tests.adapters.test_on_gpu import ASKED, jobs_of, run
from tests.support.gpu.emulated import open_backend
from tests.support.gpu.fakes.fake_plans import put_plans

Exported = Callable[[str], tuple[Path, Path]]
Library = Callable[[str], Path]
RANK = 9
EDGES = np.eye(32, dtype=np.uint8) * 255


class Planned(NamedTuple):
    """A model's bundle, how engines load it, and a backend with its plans."""

    bundle: Path
    loading: dict[str, Any]
    backend: Any


def build(planned: Planned, rank: int, *options: str, lanes: int = 4) -> None:
    """Put plans for LoRAs of a rank, and for a ControlNet."""
    controls = [f"controlnet={name}={folder}" for name, folder in planned.loading["control"].items()]
    more = (f"lora-rank={rank}", *controls, *options)
    backend, shapes = planned.backend, {"lanes": str(lanes), "size": "32"}
    put_plans(
        planned.bundle,
        backend.library.module,
        backend.gpu,
        shapes,
        options=more,
        precision=backend.precision,
        plans=backend.plans,
    )


@pytest.fixture
def planned(taking: Exported, exported: Exported, library: Library, tmp_path: Path) -> Iterator[Planned]:
    bundle, folder = taking("sd")[1], library("sd")
    loading: dict[str, Any] = {"control": {"edges": exported("control-sd-1")[1]}, "adapters": folder}
    backend = open_backend("tensorrt", "fp32", plans=tmp_path / "plans")
    yield Planned(bundle, {**loading, "check_hashes": False}, backend)
    assert backend.gpu is not None
    backend.gpu.close()


def test_as_on_the_host_alone_and_in_company(planned: Planned) -> None:
    """Jobs with no LoRA, one and two, and with a ControlNet beside."""
    build(planned, RANK)

    def jobs(engine: Engine) -> list[Any]:
        plain = jobs_of(engine)
        both = engine.requests(["a cat"], SETTINGS | {"steps": 3, "lora": ASKED[1], "control": {"edges": EDGES}})
        return [*plain, *both]

    with Engine.load(planned.bundle, threads=1, cache=False, adapter_rank=RANK, **planned.loading) as here:
        expected = run(here, jobs(here))
    with Engine.load(planned.bundle, backend=planned.backend, adapter_rank=RANK, **planned.loading) as there:
        asked = jobs(there)
        together = run(there, asked)
        alone = [run(there, [job])[0] for job in jobs(there)]
        by_rows = np.asarray(there.picture(asked[1]))
        np.testing.assert_array_equal(drawn(there, lora=ASKED[1], steps=3, seed=1), by_rows)  # in one launch
    for number, (a, b, c) in enumerate(zip(together, alone, expected, strict=True)):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(a, c, atol=1e-4)
        assert all(np.abs(a - other).max() > 0.01 for other in together[:number])


def test_plans_that_do_not_fit_are_refused_when_the_engine_is_loaded(planned: Planned) -> None:
    def refused(rank: int) -> str:
        with pytest.raises(PlanError) as caught:
            Engine.load(planned.bundle, backend=planned.backend, adapter_rank=rank, **planned.loading)
        return str(caught.value)

    told = refused(RANK)
    assert "holds no plan of the text_encoder" in told
    assert f"latentrt build {planned.bundle} --lora-rank RANK --plans" in told
    build(planned, 4)
    told = refused(RANK)
    assert "the plans of text_encoder/model.lora.onnx take LoRAs of rank 4. Needed: 9" in told
    assert "latentrt build BUNDLE --lora-rank 9; or take adapter_rank=4" in told
    build(planned, RANK)  # which lies beside the other
    with Engine.load(planned.bundle, backend=planned.backend, adapter_rank=RANK, **planned.loading) as engine:
        engine("a cat", **SETTINGS | {"steps": 1, "lora": ASKED[1]})
