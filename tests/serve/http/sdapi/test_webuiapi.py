"""webuiapi, A1111's usual client, in every call that is served."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import webuiapi
from PIL import Image

from latentrt.images.resize import resized
from tests.model.test_edit import mask_for, picture
from tests.serve.conftest import eventually
from tests.support.serve.fakes import FakeScheduler, app_of, live

SIZE = {"width": 64, "height": 64}
IMAGE = picture(96, 80)
MASK = mask_for(IMAGE)


@pytest.fixture
def api(url: str) -> Iterator[webuiapi.WebUIApi]:
    with_client = webuiapi.WebUIApi(baseurl=f"{url}/sdapi/v1")
    yield with_client
    with_client.session.close()


def asked(scheduler: FakeScheduler) -> Any:
    return scheduler.submitted[-1].request


def test_txt2img(api: webuiapi.WebUIApi, scheduler: FakeScheduler) -> None:
    made = api.txt2img(prompt="a (cat:1.2)", negative_prompt="dog", seed=7, batch_size=2, steps=3, **SIZE)
    request = asked(scheduler)
    assert [image.size for image in made.images] == [(64, 64)] * 2
    assert (request.solver, request.options, request.guidance) == ("euler-ancestral", {}, 7.0)
    assert (request.prompt_syntax, request.clip_skip, request.seed_delta) == ("a1111", None, 0)
    assert made.info["all_seeds"] == [7, 8]
    assert made.parameters["prompt"] == "a (cat:1.2)"


def test_what_a_sampler_takes_is_taken(api: webuiapi.WebUIApi, scheduler: FakeScheduler) -> None:
    """webuiapi always sends an eta of 1, which is DDIM's own of 0 no more."""
    for name, more, solver, options in (
        ("DDIM", {}, "ddim", {"eta": 1.0}),
        ("DDIM", {"eta": None, "override_settings": {"eta_ddim": 0.4}}, "ddim", {"eta": 0.4}),
        ("Euler a", {"eta": 0.3, "s_noise": 1.01}, "euler-ancestral", {"eta": 0.3, "s_noise": 1.01}),
        ("DPM2 a", {"override_settings": {"s_noise": "1.1"}, "s_noise": None, "scheduler": "uniform"}, None, None),
        ("DPM++ 2M SDE Exponential", {}, "dpmpp-2m-sde", {"use_exponential_sigmas": True}),
        ("dpmpp-3m karras", {}, "dpmpp-3m", {"use_karras_sigmas": True}),
        ("k_dpmpp_2m", {"s_noise": 1.1}, "dpmpp-2m", {"use_karras_sigmas": True}),
        ("euler", {"eta": 0.2}, "euler", {}),
    ):
        api.txt2img(prompt="a", sampler_name=name, **SIZE, **more)
        request = asked(scheduler)
        if solver is None:
            assert (request.solver, request.options) == ("dpm2-ancestral", {"s_noise": 1.1})
        else:
            assert (request.solver, request.options) == (solver, options)


def test_overridden_options(api: webuiapi.WebUIApi, scheduler: FakeScheduler) -> None:
    options = {"CLIP_stop_at_last_layers": "2", "eta_noise_seed_delta": 31337, "samples_format": "jpg"}
    made = api.txt2img(prompt="a", override_settings=options, **SIZE)
    assert (asked(scheduler).clip_skip, asked(scheduler).seed_delta, made.image.format) == (1, 31337, "JPEG")
    with pytest.raises(RuntimeError, match=r"400.*token_merging_ratio is set"):
        api.txt2img(prompt="a", override_settings={"token_merging_ratio": 0.5})
    api.txt2img(prompt="a", override_settings={"token_merging_ratio": "0", "return_mask": 0, "grid_format": "x"})


def test_img2img(api: webuiapi.WebUIApi, scheduler: FakeScheduler) -> None:
    """It always sends inpaint_full_res: true, which needs no mask."""
    made = api.img2img(images=[IMAGE], prompt="a", denoising_strength=0.5, **SIZE)
    request = asked(scheduler)
    assert made.image.size == (64, 64)
    assert (request.strength, request.masked, "mask" in request.pictures) == (0.5, False, False)


def test_inpainting(api: webuiapi.WebUIApi, scheduler: FakeScheduler) -> None:
    api.img2img(images=[IMAGE], mask_image=MASK, prompt="a", **SIZE)
    usual = asked(scheduler)
    assert (usual.mask_blur, usual.mask_crop, usual.mask_fill, usual.mask_keeps) == (4, 0, "fill", True)
    np.testing.assert_array_equal(np.asarray(usual.pictures["image"]), np.asarray(IMAGE))
    np.testing.assert_array_equal(np.asarray(usual.pictures["mask"]), np.asarray(MASK))
    more = {"mask_blur": 0, "inpainting_fill": 2, "inpaint_full_res": 0, "inpainting_mask_invert": 1}
    api.img2img(images=[IMAGE], mask_image=MASK, inpaint_full_res_padding="32", prompt="a", **SIZE, **more)
    other = asked(scheduler)
    assert (other.mask_blur, other.mask_crop, other.mask_fill, other.mask_keeps) == (0, None, "noise", True)
    np.testing.assert_array_equal(np.asarray(other.pictures["mask"]), 255 - np.asarray(MASK))
    with pytest.raises(RuntimeError, match=r"422.*inpainting_fill"):
        api.img2img(images=[IMAGE], mask_image=MASK, inpainting_fill=4)


def test_variations(api: webuiapi.WebUIApi, scheduler: FakeScheduler) -> None:
    api.txt2img(prompt="a", seed=3, subseed=9, subseed_strength=0, **SIZE)
    assert asked(scheduler).subseed_strength == 0
    made = api.txt2img(prompt="a", seed=3, subseed=9, subseed_strength="0.25", **SIZE)
    assert (asked(scheduler).subseed, asked(scheduler).subseed_strength, made.info["subseed_strength"]) == (
        9,
        0.25,
        0.25,
    )
    with pytest.raises(RuntimeError, match=r"400.*seed_resize_from_h is set"):
        api.txt2img(prompt="a", seed_resize_from_h=64, seed_resize_from_w=64, **SIZE)


def test_resize_modes(api: webuiapi.WebUIApi, scheduler: FakeScheduler) -> None:
    for mode, way in enumerate(("stretch", "crop", "fill")):
        api.img2img(images=[IMAGE], prompt="a", resize_mode=mode, width=96, height=64)
        request = asked(scheduler)
        assert request.resize == way
        np.testing.assert_array_equal(request.pictures["image"], np.asarray(resized(IMAGE, (96, 64), way)))
    api.img2img(images=[IMAGE], mask_image=MASK, prompt="a", resize_mode=1, inpaint_full_res=False, **SIZE)
    assert (asked(scheduler).resize, asked(scheduler).mask_crop) == ("crop", None)
    api.img2img(images=[IMAGE], mask_image=MASK, prompt="a", resize_mode=1, **SIZE)  # the whole size is filled then
    assert (asked(scheduler).resize, asked(scheduler).mask_crop) == ("stretch", 0)
    with pytest.raises(RuntimeError, match=r"400.*resize_mode is 3"):
        api.img2img(images=[IMAGE], prompt="a", resize_mode=3, **SIZE)


def test_hires_fix(api: webuiapi.WebUIApi, scheduler: FakeScheduler) -> None:
    more = {"hr_upscaler": webuiapi.HiResUpscaler.Latent, "hr_scale": "1.5", "hr_second_pass_steps": "2"}
    api.txt2img(prompt="a", enable_hr=1, denoising_strength="0.4", **more, **SIZE)
    request = asked(scheduler)
    assert (request.hires_scale, request.hires_steps, request.hires_strength) == (1.5, 2, 0.4)
    api.txt2img(prompt="a", hr_prompt="b", hr_resize_x=8, **SIZE)  # of a second part that is not made
    with pytest.raises(RuntimeError, match="could not find upscaler"):
        api.txt2img(prompt="a", enable_hr=True, hr_upscaler=webuiapi.HiResUpscaler.ESRGAN_4x)


def test_errors_have_its_fields_and_words(api: webuiapi.WebUIApi) -> None:
    def refused(**wanted: Any) -> tuple[int, dict[str, Any]]:
        with pytest.raises(RuntimeError) as caught:
            api.txt2img(**{"prompt": "a", **SIZE, **wanted})
        status, text = caught.value.args
        return status, json.loads(text)

    status, error = refused(sampler_name="magic")
    assert (status, error["param"], error["error"], error["body"]) == (400, "sampler_name", "HTTPException", "")
    assert error["detail"].startswith("Sampler not found: there is no sampler_name 'magic'")
    assert error["errors"] == error["detail"]
    status, error = refused(steps="many")
    assert (status, error["detail"][0]["loc"]) == (422, ["body", "steps"])
    for wanted, words in (
        ({"steps": 1000}, "steps is 1000. Needed: at most 150. To fix it: take a smaller steps"),
        ({"batch_size": 20}, "batch_size is 20"),
        ({"override_settings": {"sd_model_checkpoint": "x"}}, "Model not found: there is no model 'x'"),
        ({"enable_hr": True, "hr_scale": 8, "width": 512, "height": 512}, "hr_scale is 8"),
        ({"script_name": "x/y/z plot"}, "Script not found"),
    ):
        assert words in refused(**wanted)[1]["errors"]


def test_options(api: webuiapi.WebUIApi) -> None:
    options = api.get_options()
    assert options["sd_model_checkpoint"] == api.util_get_current_model() == "emoji"
    assert api.set_options(options) is None
    assert api.set_options({"samples_save": False, "CLIP_stop_at_last_layers": "1"}) is None
    api.util_set_model("emo")
    for name, value, words in (
        ("CLIP_stop_at_last_layers", 2, "CLIP_stop_at_last_layers is 2, and options are not kept here"),
        ("eta_noise_seed_delta", 31337, "send it with each request, in override_settings"),
        ("sd_vae", "other.pt", "sd_vae is set"),
        ("sd_model_checkpoint", "other", "Model not found"),
    ):
        assert words in api.set_options({name: value})["errors"]


def test_lists(api: webuiapi.WebUIApi) -> None:
    assert {"Euler a", "dpmpp-3m"} <= set(api.util_get_sampler_names())
    assert "karras" in api.util_get_scheduler_names()
    assert api.util_get_model_names() == ["emoji"]
    assert [one["name"] for one in api.get_upscalers()] == ["None", "Lanczos", "Nearest"]
    assert api.get_latent_upscale_modes() == [{"name": "Latent"}]
    empty = (
        *(api.get_sd_vae, api.get_loras, api.get_hypernetworks, api.get_face_restorers, api.get_realesrgan_models),
        api.get_prompt_styles,
    )
    assert [ask() for ask in empty] == [[]] * len(empty)
    assert api.get_scripts() == {"txt2img": [], "img2img": []}
    assert api.get_cmd_flags() == {}
    assert api.get_embeddings() == {"loaded": {}, "skipped": {}}
    ram = api.get_memory()["ram"]
    assert 2**20 < ram["used"] < ram["total"] == ram["used"] + ram["free"]
    assert api.refresh_checkpoints() is None
    assert api.custom_post("sdapi/v1/reload-checkpoint").json == {}
    with pytest.raises(RuntimeError, match="has one model, which stays loaded"):
        api.custom_post("sdapi/v1/unload-checkpoint")
    api.util_wait_for_ready()


def test_png_info(api: webuiapi.WebUIApi) -> None:
    made = api.txt2img(prompt='a "cat", an owl\nand a fox', seed=5, steps=3, **SIZE)
    told = api.png_info(made.image)
    assert told.info == made.info["infotexts"][0]
    assert told.parameters["Prompt"] == 'a "cat", an owl\nand a fox'
    assert [told.parameters[name] for name in ("Steps", "Seed", "Size-1", "Size-2")] == ["3", "5", "64", "64"]
    assert json.loads(told.json["items"]["latentrt"])["seed"] == 5
    assert api.png_info(Image.new("RGB", (8, 8))).info == ""


@pytest.mark.parametrize("way", ["interrupt", "skip"])
def test_interrupt_and_skip_return_what_is_there(api: webuiapi.WebUIApi, scheduler: FakeScheduler, way: str) -> None:
    scheduler.hold = asyncio.Event()
    other = webuiapi.WebUIApi(baseurl=api.baseurl)
    with ThreadPoolExecutor() as pool:
        drawing = pool.submit(api.txt2img, prompt="a", batch_size=2, **SIZE)
        eventually(lambda: drawing.done() or [one.row for one in scheduler.handles] == [1])
        progress = other.get_progress()
        assert (progress["state"]["job_count"], progress["state"]["sampling_step"]) == (2, 1)
        assert getattr(other, way)() == ({} if way == "interrupt" else None)
        assert len(drawing.result().images) == 2
    other.session.close()


@pytest.mark.parametrize("name", ["Lanczos", "Nearest", "None"])
def test_extras(api: webuiapi.WebUIApi, name: str) -> None:
    made = api.extra_single_image(IMAGE, upscaler_1=name, upscaling_resize=2)
    filters = {"Lanczos": Image.Resampling.LANCZOS, "Nearest": Image.Resampling.NEAREST}
    wanted = IMAGE if name == "None" else IMAGE.resize((192, 160), filters[name])
    np.testing.assert_array_equal(np.asarray(made.image), np.asarray(wanted))
    assert made.info == (
        "<p></p>" if name == "None" else f"<p>Postprocess upscale: 192x160, Postprocess upscaler: {name}</p>"
    )


def test_extras_to_a_size_and_in_batches(api: webuiapi.WebUIApi) -> None:
    sides = {"upscaling_resize_w": 100, "upscaling_resize_h": 200}
    cropped = api.extra_single_image(IMAGE, resize_mode=1, upscaler_1="Lanczos", **sides).image
    whole = api.extra_single_image(IMAGE, resize_mode=1, upscaler_1="Lanczos", upscaling_crop=False, **sides).image
    assert (cropped.size, whole.size) == ((100, 200), (240, 200))
    both = {"upscaler_1": "Lanczos", "upscaler_2": "Nearest", "extras_upscaler_2_visibility": 0.5}
    made = api.extra_batch_images([IMAGE, Image.new("RGBA", (16, 16))], name_list=["a", "b"], **both)
    assert [image.size for image in made.images] == [(192, 160), (32, 32)]
    mean = (
        np.asarray(api.extra_single_image(IMAGE, upscaler_1="Lanczos").image, int)
        + np.asarray(api.extra_single_image(IMAGE, upscaler_1="Nearest").image, int)
    ) / 2
    np.testing.assert_allclose(np.asarray(made.images[0]), mean, atol=1)
    for wanted, words in (
        ({"upscaler_1": "ESRGAN_4x"}, "could not find upscaler"),
        ({"gfpgan_visibility": 1}, "gfpgan_visibility is set"),
        ({"upscaling_resize": 16, "upscaler_1": "Lanczos", "image": Image.new("L", (2000, 2000))}, "at most 16777216"),
    ):
        with pytest.raises(RuntimeError, match=words):
            api.extra_single_image(**{"image": IMAGE, **wanted})
    with pytest.raises(RuntimeError, match="at most 16777216"):
        api.extra_batch_images([Image.new("L", (600, 600))] * 2, upscaler_1="Nearest", upscaling_resize=5)


def test_keys_are_its_passwords(scheduler: FakeScheduler) -> None:
    with live(app_of(scheduler, keys=("secret",))) as url:
        mine = webuiapi.WebUIApi(baseurl=f"{url}/sdapi/v1", username="any", password="secret")
        assert len(mine.txt2img(prompt="a", **SIZE).images) == 1
        wrong = webuiapi.WebUIApi(baseurl=f"{url}/sdapi/v1", username="any", password="other")
        with pytest.raises(RuntimeError, match="Incorrect username or password"):
            wrong.txt2img(prompt="a")
        mine.session.close()
        wrong.session.close()


def test_pictures_may_come_in_mimes_lines(api: webuiapi.WebUIApi, scheduler: FakeScheduler) -> None:
    buffer = BytesIO()
    IMAGE.save(buffer, "PNG")
    lines = base64.encodebytes(buffer.getvalue()).decode()
    assert "\n" in lines.strip()
    for text in (lines, f"data:image/png;base64,{lines}", lines.replace("\n", "\r\n")):
        answer = api.session.post(f"{api.baseurl}/img2img", json={"prompt": "a", "init_images": [text], **SIZE})
        assert answer.status_code == 200
        np.testing.assert_array_equal(
            asked(scheduler).pictures["image"], np.asarray(IMAGE.resize((64, 64), Image.Resampling.LANCZOS))
        )
