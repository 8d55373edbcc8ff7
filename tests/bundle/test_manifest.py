"""Requests are checked where they are made; manifests are read back as they were written."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentrt.bundle.manifest import Golden, GraphSpec, Islands, LatentSpec, ModelSpec, TensorSpec
from latentrt.errors import BundleError, RequestError
from latentrt.request import Request

MODEL = ModelSpec(
    id="tiny",
    revision=None,
    license="mit",
    family="sd",
    latents=LatentSpec(channels=4, factor=8, scale=0.18215, shift=0.0, height=8, width=8),
    tokenizers=("tokenizer",),
    text_encoders=("text_encoder",),
    schedule="scheduler/scheduler_config.json",
    graphs={
        name: GraphSpec(f"{name}.onnx", 23, 10, (TensorSpec("sample", "float32", ("batch", 4, "height", "width")),), ())
        for name in ("text_encoder", "unet", "vae_decoder")
    },
    golden=(Golden("a", "", "ddim", 4, 7, 3.0, 0.1, 1.0, (0.5, 0.25)),),
    half={"unet": GraphSpec("unet.fp16.onnx", 23, 9, (TensorSpec("sample", "float16", ("batch", 4)),), ())},
    islands={"unet": Islands(70_000.0, ("node_add_3",))},
    cuda={"unet": GraphSpec("unet.cuda.onnx", 21, 9, (TensorSpec("sample", "float16", ("batch", 4)),), ())},
)


def test_model_spec_survives_json() -> None:
    assert ModelSpec.from_dict(json.loads(json.dumps(MODEL.to_dict()))) == MODEL


def test_bundles_of_before_have_no_half_graphs() -> None:
    data = MODEL.to_dict()
    del data["half"], data["islands"], data["cuda"]
    spec = ModelSpec.from_dict(data)
    assert (spec.half, spec.islands, spec.cuda) == ({}, {}, {})
    with pytest.raises(BundleError, match="tiny has no unet in fp16"):
        spec.graph("unet", "fp16")
    with pytest.raises(BundleError, match="no unet for ONNX Runtime's CUDA provider") as caught:
        spec.cuda_graph("unet")
    assert "latentrt export" in str(caught.value)
    assert MODEL.graph("unet", "fp16").path == "unet.fp16.onnx"
    assert MODEL.cuda_graph("unet").path == "unet.cuda.onnx"


@pytest.mark.parametrize(
    "change",
    [
        {"family": "flux"},
        {"latents": {"channels": 4}},
        {"graphs": {"unet": {"path": "x"}}},
        {"graphs": []},
        {"surprise": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_manifest_of_another_kind_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match="manifest"):
        ModelSpec.from_dict({**MODEL.to_dict(), **change})


def changed(path: str, value: Any) -> dict[str, Any]:
    """The manifest's model part with one value of its own; `path` is like "latents.factor"."""
    data: dict[str, Any] = json.loads(json.dumps(MODEL.to_dict()))
    *parents, last = path.split(".")
    inner: Any = data
    for key in parents:
        inner = inner[int(key) if key.isdigit() else key]
    inner[last] = value
    return data


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *(("id", value) for value in (None, 3, "")),
        *(("schedule", value) for value in (None, 5, "")),
        ("revision", 1),
        ("license", ["mit"]),
        ("family", []),
        ("zero_negative", "no"),
        ("made", "by hand"),
        ("half", {"vae": MODEL.to_dict()["half"]["unet"]}),
        ("half.unet.path", ""),
        ("cuda", {"vae": MODEL.to_dict()["cuda"]["unet"]}),
        ("cuda.unet.opset", "21"),
        ("half.unet.inputs.0.dtype", "float8"),
        ("islands", {"vae_decoder": {"largest": 1.0, "nodes": []}}),
        *(("islands.unet.largest", value) for value in ("1", None, float("inf"))),
        *(("islands.unet.nodes", value) for value in ([3], [""], None)),
        *(("tokenizers", value) for value in (5, "tokenizer", [], [3], ["a", "b"])),
        *(("text_encoders", value) for value in ("text_encoder", ["text_encoder", "text_encoder"], ["other"])),
        *(("latents.factor", value) for value in (0, -8, "8", 8.0, True, None)),
        *((f"latents.{name}", 0) for name in ("channels", "height", "width")),
        *(("latents.scale", value) for value in (0, 0.0, float("nan"), float("inf"), "1", None, 10**400)),
        ("latents.shift", float("nan")),
        ("graphs", {}),
        *(("graphs.unet.path", value) for value in (5, None, "")),
        ("graphs.unet.opset", "23"),
        *(("graphs.unet.inputs.0.dtype", value) for value in ("zz", None, [])),
        ("graphs.unet.inputs.0.name", 3),
        ("graphs.unet.inputs.0.shape", [-1]),
        ("graphs.unet.inputs.0.shape", [1.5]),
        ("graphs.unet.inputs", 3),
        ("golden.0.std", 0),
        ("golden.0.steps", "4"),
        ("golden.0.prompt", None),
        ("golden.0.first", ["x"]),
    ],
)
def test_a_manifest_of_wrong_values_names_the_field(path: str, value: Any) -> None:
    with pytest.raises(BundleError, match=r"^manifest\.json has .*Needed: .*To fix it: ") as caught:
        ModelSpec.from_dict(changed(path, value))
    if "cannot be read" not in caught.value.found:
        assert path.split(".")[-1] in caught.value.found or path.split(".")[0] in ("golden", "graphs", "text_encoders")


@pytest.mark.parametrize("name", ["text_encoder", "unet", "vae_decoder"])
def test_every_network_that_is_run_has_a_graph(name: str) -> None:
    data = MODEL.to_dict()
    data["graphs"] = {key: graph for key, graph in data["graphs"].items() if key != name}
    with pytest.raises(BundleError, match=f"a graph '{name}'"):
        ModelSpec.from_dict(data)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("steps", -3),
        ("steps", 1.5),
        ("steps", True),
        ("count", 0),
        ("seed", -1),
        ("seed", 2**64),
        ("guidance", float("nan")),
        ("guidance", float("inf")),
        ("guidance", -1.0),
        ("guidance", "3"),
        ("guidance_rescale", 1.5),
        ("height", 0),
        ("guidance_interval", (0.5, 0.2)),
        ("guidance_interval", (-0.1, 1.0)),
        ("guidance_interval", 0.5),
        ("guidance_interval", (0.0, 0.5, 1.0)),
        ("guidance_interval", ("a", "b")),
        ("guidance_interval", "01"),
        ("guidance", 10**400),
        ("noise", None),
        ("noise", 3),
        ("solver", 3),
        ("negative_prompt", 3),
        ("options", [1]),
        ("options", {1: 2}),
        *(("options", {key: 1}) for key in ("prompt", "steps", "schedule", "scheduler", "options")),
    ],
)
def test_a_request_out_of_range_names_the_field(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match="option" if name == "options" else name):
        Request(prompt="a", **{name: value})


def test_the_last_seed_is_in_range_too() -> None:
    assert Request(prompt="a", seed=2**64 - 3, count=3).count == 3
    with pytest.raises(RequestError, match="the last picture's seed"):
        Request(prompt="a", seed=2**64 - 3, count=4)


@given(
    steps=st.integers(1, 1000),
    seed=st.integers(0, 2**64 - 1),
    guidance=st.floats(0, 30),
    start=st.floats(0, 0.5),
    end=st.floats(0.5, 1),
)
def test_a_request_in_range_keeps_its_values(steps: int, seed: int, guidance: float, start: float, end: float) -> None:
    request = Request(prompt="a", steps=steps, seed=seed, guidance=guidance, guidance_interval=(start, end))
    assert (request.steps, request.seed, request.guidance) == (steps, seed, guidance)
