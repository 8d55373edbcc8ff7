"""ControlNet Unions: a control says which kind of map it follows. tests/export/verify compares with diffusers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from latentrt import Engine
from latentrt.command.controls import controls_of
from latentrt.errors import RequestError
from latentrt.run.job import Job
from latentrt_export.verify.checks import difference
from tests.support.gpu.emulated import open_backend
from tests.support.gpu.fakes.fake_plans import put_plans
from tests.support.models.controlnets import UNION

Exported = Callable[[str], tuple[Path, Path]]
y, x = np.mgrid[:16, :24] / 24
MAP = Image.fromarray(((np.hypot(x - 0.5, y - 0.3) * 20 % 2) < 1).astype(np.uint8) * np.uint8(255)).convert("RGB")
SETTINGS: dict[str, Any] = {"steps": 2, "seed": 7, "guidance": 3.0, "width": 24, "height": 16}
TYPES = ("canny", "lineart", 3, "depth", 5)


@pytest.fixture(scope="module")
def add_ons(exported: Exported) -> dict[str, Path]:
    return exported("sdxl") and {
        "union": exported(f"control-sdxl-{UNION}")[1],
        "edges": exported("control-sdxl-1")[1],
    }


@pytest.fixture(scope="module")
def engine(exported: Exported, add_ons: dict[str, Path]) -> Iterator[Engine]:
    with Engine.load(exported("sdxl")[1], threads=1, check_hashes=False, control=add_ons) as engine:
        yield engine


def jobs_of(engine: Engine) -> list[Job]:
    """Return jobs of the types, without a control, and one with another ControlNet and guess mode."""
    controls: list[dict[str, Any]] = [{"union": {"image": MAP, "type": one}} for one in TYPES]
    controls += [{}, {"edges": MAP, "union": {"image": MAP, "type": 1, "guess": True}}]
    return [engine.requests(["a cat"], {**SETTINGS, "control": one})[0] for one in controls]


def test_each_type_is_its_own(engine: Engine) -> None:
    """In one batch, and to the bit as alone; names of one type draw the same."""
    together, alone = jobs_of(engine), jobs_of(engine)
    engine.run(together)
    for job in alone:
        engine.run([job])
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_array_equal(a.latents, b.latents)
    canny, lineart, three, depth, *others = (job.latents for job in together)
    np.testing.assert_array_equal(canny, lineart)
    np.testing.assert_array_equal(canny, three)
    different = [canny, depth, *others]
    for index, one in enumerate(different):
        assert all(difference(one, other) > 1e-3 for other in different[:index])
    assert together[0].controls[0].facts["union"]["type"] == "canny"


@pytest.mark.parametrize("name", ["onnxruntime", "tensorrt"])
def test_on_a_gpu(engine: Engine, exported: Exported, add_ons: dict[str, Path], tmp_path: Path, name: str) -> None:
    """On the emulated one: what the host computes."""
    expected = jobs_of(engine)[2:]
    engine.run(expected)
    bundle, backend = exported("sdxl")[1], cast(Any, open_backend(name, "fp32", plans=tmp_path / "plans"))
    if name == "tensorrt":
        options = [f"controlnet={key}={path}" for key, path in add_ons.items()]
        shapes, plans = {"lanes": "4", "size": "24x16"}, tmp_path / "plans"
        fake, gpu = backend.library.module, backend.gpu
        put_plans(bundle, fake, gpu, shapes, options=options, precision="fp32", plans=plans)
    with closing(backend.gpu), Engine.load(bundle, backend=backend, control=add_ons, lanes=4) as there:
        ours = jobs_of(there)[2:]
        there.run(ours)
    for a, b in zip(ours, expected, strict=True):
        assert difference(a.latents, b.latents) < 1e-5


def test_with_tensorrt(engine: Engine, exported: Exported, add_ons: dict[str, Path], tmp_path: Path) -> None:
    """On the emulated device, with plans built for it: types are lanes' own there too."""
    bundle, backend = exported("sdxl")[1], open_backend("tensorrt", "fp32", plans=tmp_path)
    shapes, options = {"lanes": "4", "size": "24x16"}, [f"controlnet=union={add_ons['union']}"]
    put_plans(bundle, backend.library.module, backend.gpu, shapes, options=options, precision="fp32", plans=tmp_path)
    expected = jobs_of(engine)[2:4]
    engine.run(expected)
    control = {"union": add_ons["union"]}
    with Engine.load(bundle, backend=backend, check_hashes=False, control=control) as there:
        ours = [
            there.requests(["a cat"], {**SETTINGS, "control": {"union": {"image": MAP, "type": t}}})[0] for t in (3, 1)
        ]
        there.run(ours)
    for a, b in zip(ours, expected, strict=True):
        assert difference(a.latents, b.latents) < 1e-5


@pytest.mark.parametrize(
    ("control", "words"),
    [
        ({"union": MAP}, "a ControlNet Union, has the type None.*openpose, depth, .*segment, or a number below 6"),
        ({"union": {"image": MAP, "type": "edges"}}, "has the type 'edges'"),
        ({"union": {"image": MAP, "type": "tile"}}, "has the type 'tile'"),
        ({"union": {"image": MAP, "type": 6}}, "has the type 6"),
        ({"union": {"image": MAP, "type": -1}}, "has the type -1"),
        ({"union": {"image": MAP, "type": 1.5}}, "a control's type is 1.5"),
        ({"edges": {"image": MAP, "type": "canny"}}, "'edges' has the type 'canny'.*leave type out"),
    ],
)
def test_what_a_request_cannot_ask(engine: Engine, control: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        engine("a cat", control=control, **SETTINGS)


def test_on_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "map.png"
    MAP.save(path)
    found = controls_of([f"union@canny={path}:0.5", f"edges={path}", f"other@3={path}"], guess=False)
    assert {name: one.type for name, one in found.items()} == {"union": "canny", "edges": None, "other": 3}
    assert found["union"].scale == 0.5
    with pytest.raises(RequestError, match="--control has union twice"):
        controls_of([f"union@canny={path}", f"union@depth={path}"], guess=False)
