"""From a user's settings to the profiles of every network."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentrt.adapters.mixed import RANK
from latentrt.bundle.bundle import EMBEDDED, Bundle
from latentrt.errors import PlanError, RequestError
from latentrt.runtime.tensorrt.record import PlanKey, PlanRecord
from latentrt_export.plans.plan_shapes import profiles_of, shapes_of
from latentrt_export.plans.wanted import bundles_of

EMOJI = Bundle.open(check_hashes=False)
FIXED = shapes_of(EMOJI.spec, {})


def test_the_models_own_size_is_what_plans_serve_unasked() -> None:
    found = {name: "; ".join(map(str, profiles_of(EMOJI.spec, name, FIXED))) for name in EMOJI.spec.graphs()}
    assert found == {
        "text_encoder": "batch 1; batch 2",  # a prompt, and a picture in one launch
        "unet_text": "batch 1, tokens 77; batch 2, tokens 77",
        "unet": "batch 2, height 16, width 16, tokens 77",
        "unet_shallow": "batch 2, height 16, width 16",
        "vae_decoder": "batch 1, height 16, width 16",
        "vae_encoder": "batch 1, height 128, width 128",  # it reads pixels
    }


def test_plans_of_longer_texts_are_asked_for() -> None:
    (own,) = profiles_of(EMOJI.spec, "unet", shapes_of(EMOJI.spec, {"tokens": "77:77:231"}))
    assert own.ranges["tokens"] == (77, 77, 231)


def test_several_profiles_fill_in_what_they_leave_out() -> None:
    asked = shapes_of(
        EMOJI.spec, {"size": "64x128"}, ["lanes=2", "lanes=2:8:16, size=64:128:256", "lanes=2,pictures=4"]
    )
    unet, chunk = profiles_of(EMOJI.spec, "unet", asked), {"tokens": (77, 77, 77)}
    assert [dict(profile.ranges) for profile in unet] == [  # the third is the first again, to the UNet
        {"batch": (2, 2, 2), "height": (16, 16, 16), "width": (8, 8, 8), **chunk},
        {"batch": (2, 8, 16), "height": (8, 16, 32), "width": (8, 16, 32), **chunk},
    ]
    assert [p.ranges["batch"] for p in profiles_of(EMOJI.spec, "vae_decoder", asked)] == [
        (1, 1, 1),
        (1, 1, 1),
        (4, 4, 4),
    ]
    assert [p.ranges["batch"] for p in profiles_of(EMOJI.spec, "text_encoder", asked)] == [
        (1, 1, 1),
        (2, 2, 2),
        (2, 8, 16),
    ]


@pytest.mark.parametrize("lanes", ["1", "4", "1:1:8", "1:4:8", "2:4:8"])
def test_texts_are_encoded_alone_or_for_all_lanes(lanes: str) -> None:
    """Each at the shape that its plan was tuned for."""
    profiles = profiles_of(EMOJI.spec, "text_encoder", shapes_of(EMOJI.spec, {"lanes": lanes}))
    (unet,) = profiles_of(EMOJI.spec, "unet", shapes_of(EMOJI.spec, {"lanes": lanes}))
    record = PlanRecord(PlanKey(*[""] * 9, profiles=profiles), "", 0)
    assert len(profiles) == (1 if lanes == "1" else 2)
    for batch in (1, unet.ranges["batch"][1]):
        assert profiles[record.profile({"batch": batch})].ranges["batch"][1] == batch
    assert profiles[record.profile({"batch": 1})].slack({"batch": 1}) == 0


@pytest.mark.parametrize(
    ("settings", "profiles", "words"),
    [
        ({"size": "510"}, [], "510 pixels.*multiple of 8"),
        ({"size": "64x100"}, [], "100 pixels"),
        ({"size": "0"}, [], "size has '0'"),
        ({"size": "x64"}, [], "size has ''"),
        ({"lanes": "2:4"}, [], "least:best:most"),
        ({"lanes": "4:2:8"}, [], "rising order"),
        ({"lanes": "-2"}, [], "lanes has '-2'"),
        ({"lanes": "²"}, [], "lanes has"),
        ({"lanes": "99999"}, [], "1 to 65536"),
        ({}, ["lanes=2,steps=3"], "'steps'"),
        ({}, ["lanes=2,rank=8"], "'rank'"),
        ({"rank": "0"}, [], "rank has '0'"),
        ({}, ["lanes"], "settings, each once"),
        ({}, ["lanes=2,lanes=4"], "settings, each once"),
        ({}, ["size=:64:128"], "size has ''"),
    ],
)
def test_shapes_that_cannot_be_are_refused(settings: dict[str, str], profiles: list[str], words: str) -> None:
    with pytest.raises((RequestError, PlanError), match=words):
        shapes_of(EMOJI.spec, settings, profiles)


@given(st.lists(st.integers(1, 64), min_size=3, max_size=3), st.lists(st.integers(1, 8000), min_size=3, max_size=3))
def test_profiles_cover_exactly_what_was_asked(lanes: list[int], eighths: list[int]) -> None:
    lanes.sort()
    eighths.sort()
    text = ":".join(map(str, lanes)), ":".join(f"{8 * n}x{8 * n}" for n in eighths)
    (profile,) = profiles_of(EMOJI.spec, "unet", shapes_of(EMOJI.spec, {"lanes": text[0], "size": text[1]}))
    assert profile.ranges["batch"] == tuple(lanes)
    assert profile.ranges["height"] == profile.ranges["width"] == tuple(eighths)


def test_add_ons_have_the_shapes_of_their_model() -> None:
    """Their own manifest says neither lanes nor tokens. What they follow is pixels, one picture at a time."""
    model, add_on = bundles_of(EMBEDDED, ["grey=emoji-grey"])
    asked = shapes_of(model.spec, {"lanes": "2:4:8", "size": "120x64"})
    (hint,), (body,) = (profiles_of(add_on.spec, name, asked) for name in ("hint", "controlnet"))
    assert str(hint) == "batch 1, height 64, width 120"
    assert str(body) == "batch 2 to 8 (best 4), height 8, width 15"
    (unet,) = profiles_of(model.spec, "unet", asked)
    residuals = {tensor.name: tensor for tensor in model.spec.networks["unet"].inputs if "residual" in tensor.name}
    assert unet.shapes(residuals["residual_2"]) == ((2, 64, 4, 8), (4, 64, 4, 8), (8, 64, 4, 8))
    assert unet.shapes(residuals["residual_mid"])[0] == (2, 160, 2, 4)
    divides = replace(add_on.spec, latents=replace(add_on.spec.latents, multiple=2))  # as T2I-Adapters of SDXL
    with pytest.raises(PlanError, match=r"size has 120 pixels.*multiples of 16, as emoji-grey reads"):
        profiles_of(divides, "hint", asked)


def test_networks_that_take_loras_have_the_engines_rank() -> None:
    (model,) = bundles_of(EMBEDDED, loras=True)
    for settings, rank in (({}, RANK), ({"rank": "8"}, 8)):
        asked = shapes_of(model.spec, settings)
        for name in ("unet", "unet_text", "text_encoder"):
            assert {one.ranges["rank"] for one in profiles_of(model.spec, name, asked)} == {(rank,) * 3}
    assert "rank" not in profiles_of(EMOJI.spec, "unet", FIXED)[0].ranges


def test_a_dimension_nobody_knows_is_refused() -> None:
    unet = EMOJI.spec.networks["unet"]
    odd = replace(unet, inputs=(replace(unet.inputs[0], shape=("frames", 4, "height", "width")), *unet.inputs[1:]))
    with pytest.raises(PlanError, match="dimensions frames"):
        profiles_of(replace(EMOJI.spec, networks={**EMOJI.spec.networks, "unet": odd}), "unet", FIXED)
