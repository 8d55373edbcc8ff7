"""ControlNets and T2I-Adapters with TensorRT, on the emulated device: pictures, company, and plans that lack."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from latentrt import Engine
from latentrt.bundle.bundle import Bundle
from latentrt.errors import PlanError
from latentrt.run.job import Job
from latentrt.runtime.tensorrt.record import Profile
from latentrt_export.verify.checks import difference
from tests.support.gpu.emulated import open_backend
from tests.support.gpu.fakes.fake_plans import put_plans
from tests.support.gpu.fakes.fake_tensorrt import FakeTensorRt
from tests.support.models.loras import write_lora

Exported = Callable[[str], tuple[Path, Path]]
BOUND = 1e-5
y, x = np.mgrid[:16, :24] / 24
MAP = Image.fromarray((np.stack([x, y, x * y], axis=-1) * 255).astype(np.uint8))
SETTINGS: dict[str, Any] = {"steps": 4, "width": 24, "height": 16, "solver": "ddim", "guidance": 3.0}
SHAPES = {"lanes": "4", "size": "16x16:24x16:32x24"}
ADD_ONS = {"edges": "control-sd-1", "grey": "control-sd-2", "sketch": "adapter-colour"}
ASKED: dict[str, dict[str, Any]] = {
    "none": {},
    "one": {"edges": MAP},
    "two, in parts": {"grey": {"image": MAP, "start": 0.5}, "edges": {"image": MAP, "scale": 0.5, "end": 0.5}},
    "an adapter": {"sketch": {"image": MAP, "scale": 0.7}},
    "guessed, and an adapter": {"edges": {"image": MAP, "guess": True}, "sketch": MAP},
}


class Here(NamedTuple):
    """A model with add-ons: on the emulated device with plans, and on the CPU."""

    bundle: Path
    add_ons: dict[str, Path]
    planned: Engine
    plain: Engine


def build(bundle: Path, add_ons: dict[str, Path], folder: Path, backend: Any, *more: str) -> list[Any]:
    """Put plans for a model with add-ons into a folder."""
    options = [*(f"controlnet={name}={path}" for name, path in add_ons.items()), *more]
    fake: FakeTensorRt = backend.library.module
    return put_plans(bundle, fake, backend.gpu, SHAPES, options=options, precision="fp32", plans=folder)


@pytest.fixture(scope="module")
def here(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Here]:
    bundle, add_ons = exported("sd")[1], {name: exported(one)[1] for name, one in ADD_ONS.items()}
    backend = open_backend("tensorrt", "fp32", plans=tmp_path_factory.mktemp("plans"))
    build(bundle, add_ons, backend.plans, backend)
    with (
        Engine.load(bundle, threads=1, check_hashes=False, control=add_ons) as plain,
        Engine.load(bundle, backend=backend, check_hashes=False, control=add_ons) as planned,
    ):
        yield Here(bundle, add_ons, planned, plain)
    assert backend.gpu.in_use == 0


def jobs_of(engine: Engine) -> list[Job]:
    return [
        engine.requests(["a cat"], {**SETTINGS, "seed": seed, "control": control})[0]
        for seed, control in enumerate(ASKED.values())
    ]


def test_pictures_are_those_of_the_cpu_alone_and_in_company(here: Here) -> None:
    """In a batch: jobs without, with one and with two, ControlNets and a T2I-Adapter."""
    alone, together, expected = jobs_of(here.planned), jobs_of(here.planned), jobs_of(here.plain)
    for job in alone:
        here.planned.run([job])
    here.planned.run(together)
    here.plain.run(expected)
    for one, other, wanted in zip(alone, together, expected, strict=True):
        np.testing.assert_array_equal(one.latents, other.latents)
        assert difference(one.latents, wanted.latents) < BOUND
    kinds = [job.latents for job in alone]
    assert min(difference(kinds[0], one) for one in kinds[1:]) > 1e-2  # they do something


def test_a_hint_is_embedded_once(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    (edges, *_) = here.planned.model.controls
    hint, calls = edges._hint.open(), list[int]()
    call = type(hint).__call__

    def counting(self: Any, feeds: Any) -> Any:
        calls.extend([len(feeds["picture"])] if self is hint else [])
        return call(self, feeds)

    monkeypatch.setattr(type(hint), "__call__", counting)
    own = Image.fromarray(np.asarray(MAP)[::-1].copy())
    here.planned("a cat", **SETTINGS, count=3, control={"edges": own})
    assert calls == [1]


def test_sizes_are_those_that_all_serve(here: Here) -> None:
    assert here.planned.model.profiles(4) == (Profile({"height": (8, 8, 12), "width": (8, 12, 16)}),)
    assert here.planned.model.profiles(2) == ()


def test_plans_that_lack_are_named_when_the_engine_is_loaded(here: Here, tmp_path: Path) -> None:
    """Each with the command that builds it: of the denoiser that reads residuals, of an add-on."""
    backend = open_backend("tensorrt", "fp32", plans=tmp_path / "plans")

    def missing() -> str:
        with pytest.raises(PlanError) as caught:
            Engine.load(here.bundle, backend=backend, check_hashes=False, control=here.add_ons)
        return str(caught.value)

    build(here.bundle, {}, backend.plans, backend)
    told = missing()
    assert "the nearest plan of the unet was built for graph unet/model.onnx" in told
    assert "graph unet/model.adapter.onnx" in told
    assert f"latentrt build {here.bundle} --controlnet NAME=BUNDLE --plans {backend.plans} (see" in told
    build(here.bundle, {"sketch": here.add_ons["sketch"]}, backend.plans, backend)
    assert f"latentrt build MODEL --controlnet NAME={here.add_ons['edges']} --plans" in missing()
    backend.gpu.close()


def test_merged_loras_change_the_unet_that_reads_residuals(exported: Exported, here: Here, tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora.safetensors", exported("sd")[0], "kohya")
    backend: Any = open_backend("tensorrt", "fp32", plans=tmp_path / "plans")
    add_ons, asked = {"edges": here.add_ons["edges"]}, {**SETTINGS, "seed": 3, "control": ASKED["one"]}
    build(here.bundle, add_ons, backend.plans, backend, "refittable")

    def latents(engine: Engine) -> Any:
        jobs = engine.requests(["a cat"], asked)
        engine.run(jobs)
        return jobs[0].latents

    with Engine.load(here.bundle, backend=backend, check_hashes=False, control=add_ons) as engine:
        plain = latents(engine)
        engine.set_lora(f"{lora}:0.6")
        merged = latents(engine)
        engine.set_lora()
        np.testing.assert_array_equal(latents(engine), plain)
    with Engine.load(here.bundle, threads=1, check_hashes=False, control=add_ons, lora=f"{lora}:0.6") as engine:
        assert difference(merged, latents(engine)) < BOUND
    assert difference(merged, plain) > 1e-2
    assert backend.gpu.in_use == 0
    backend.gpu.close()


def test_plans_of_several_add_ons_lie_side_by_side(here: Here) -> None:
    """In one folder, ControlNets of one structure too: their graphs are the same file, their weights are not."""
    files = [Bundle.open(here.add_ons[name], check_hashes=False).files for name in ("edges", "grey")]
    assert len({own["controlnet/model.onnx"].sha256 for own in files}) == 1
    networks: list[Any] = [one.networks["controlnet"].open() for one in here.planned.model.controls[:2]]
    keys = [network._fitting[0].key for network in networks]
    assert [len(network._fitting) for network in networks] == [1, 1]
    assert keys[0].graph == keys[1].graph
    assert keys[0].weights != keys[1].weights
