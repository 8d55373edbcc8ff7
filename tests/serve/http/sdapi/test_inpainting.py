"""webuiapi's pictures of the embedded model are the engine's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import webuiapi

from latentrt import Engine
from latentrt.serve.core.service import Service
from latentrt.serve.http.app import create_app
from tests.model.test_edit import mask_for, picture
from tests.serve.conftest import eventually
from tests.support.serve.fakes import catalog_of, live

SIZE = {"width": 64, "height": 64}
IMAGE = picture(110, 90)
MASK = mask_for(IMAGE).point(lambda value: 255 if value > 200 else 0)
ASKED: dict[str, Any] = {"steps": 2, "seed": 3}


@pytest.fixture(scope="module")
def api(embedded: Engine) -> Iterator[webuiapi.WebUIApi]:
    with Service(embedded) as service:
        eventually(lambda: service.scheduler.ready)
        with live(create_app(service.scheduler, catalog_of(embedded.model))) as url:
            client = webuiapi.WebUIApi(baseurl=f"{url}/sdapi/v1", sampler="DPM++ 2M")
            yield client
            client.session.close()


@pytest.fixture(scope="module")
def alone() -> Iterator[Engine]:
    with Engine.load(threads=1, check_hashes=False) as engine:
        yield engine


@pytest.mark.parametrize(
    ("sent", "settings"),
    [
        ({}, {"mask_blur": 4, "mask_crop": 0, "mask_fill": "fill"}),
        (
            {"inpaint_full_res_padding": 16, "inpainting_fill": 1, "mask_blur": 0},
            {"mask_crop": 16},
        ),
        ({"inpaint_full_res": False, "inpainting_fill": 3}, {"mask_blur": 4, "mask_fill": "nothing"}),
    ],
)
def test_a_part_is_repainted(
    api: webuiapi.WebUIApi, alone: Engine, sent: dict[str, Any], settings: dict[str, Any]
) -> None:
    made = api.img2img(images=[IMAGE], mask_image=MASK, prompt="a cat", cfg_scale=3, **ASKED, **SIZE, **sent)
    (expected,) = alone(
        "a cat",
        image=IMAGE,
        mask=MASK,
        strength=0.75,
        guidance=3.0,
        solver="dpmpp-2m",
        use_karras_sigmas=True,
        prompt_syntax="a1111",
        mask_keeps=True,
        **{**ASKED, **SIZE, **settings},
    )
    np.testing.assert_array_equal(np.asarray(made.image), np.asarray(expected))
    assert made.image.size == ((64, 64) if sent.get("inpaint_full_res") is False else IMAGE.size)
    if sent.get("mask_blur") == 0:
        outside = np.asarray(MASK) == 0
        np.testing.assert_array_equal(np.asarray(made.image)[outside], np.asarray(IMAGE)[outside])


def test_the_noise_of_rows_and_skipped_layers(api: webuiapi.WebUIApi, alone: Engine) -> None:
    options = {"CLIP_stop_at_last_layers": 2, "eta_noise_seed_delta": 31337}
    sent = {"sampler_name": "Euler a", "eta": 0.7, "s_noise": 0.9, "override_settings": options}
    made = api.txt2img(prompt="a cat", cfg_scale=3, **ASKED, **SIZE, **sent)
    own = {"clip_skip": 1, "seed_delta": 31337, "eta": 0.7, "s_noise": 0.9, "prompt_syntax": "a1111"}
    (expected,) = alone("a cat", guidance=3.0, solver="euler-ancestral", **own, **ASKED, **SIZE)
    np.testing.assert_array_equal(np.asarray(made.image), np.asarray(expected))
    assert "Clip skip: 2, Eta: 0.7, ENSD: 31337" in made.info["infotexts"][0]
