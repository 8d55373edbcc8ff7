"""The public API: pictures on a fake backend, and the embedded model against diffusers."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt import Engine, read_settings
from latentrt.errors import (
    BackendError,
    LatentrtError,
    NetworkError,
    PromptTruncatedWarning,
    RequestError,
    ScheduleError,
    UnknownSolverError,
)
from latentrt.golden import worst_error
from latentrt.run.job import Job
from latentrt.runtime.fake import FakeBackend
from latentrt.sampling.solvers import SOLVERS


@pytest.fixture(scope="module")
def sd() -> Iterator[Engine]:
    """Yield the embedded model."""
    with Engine.load(threads=2) as engine:
        yield engine


@pytest.fixture(scope="module")
def fake() -> Iterator[Engine]:
    """Yield the embedded bundle on networks that return zeros."""
    with Engine.load(backend=FakeBackend(), check_hashes=False) as engine:
        yield engine


def latents(engine: Engine, prompts: list[str], **settings: Any) -> list[np.ndarray]:
    jobs = engine.requests(prompts, settings)
    engine.run(jobs)
    return [job.latents for job in jobs]


def test_a_second_thread_may_make_jobs_and_decode_while_one_denoises(sd: Engine) -> None:
    """What `Engine` promises: the first thread's ticks and the second's calls take turns at random."""
    asked = [f"a thing {number}" for number in range(6)]
    settings = {"steps": 8, "solver": "dpmpp-2m", "guidance": 3.0}
    alone = latents(sd, ["an owl"], **settings)[0]
    wanted = [np.asarray(image) for image in sd(asked, **{**settings, "steps": 1})]
    jobs, done = sd.requests(asked, {**settings, "steps": 1}), threading.Event()
    sd.run(jobs)

    def beside() -> list[tuple[np.ndarray, np.ndarray]]:
        found = []
        while not (done.is_set() and found):
            (made,) = sd.requests([f"a new thing {len(found)}"], settings)
            job = jobs[len(found) % len(jobs)]
            found.append((made.latents, np.asarray(sd.picture(job)) - wanted[len(found) % len(jobs)]))
        return found

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(beside)
        try:
            denoised = latents(sd, ["an owl"], **settings)[0]
        finally:
            done.set()
    np.testing.assert_array_equal(denoised, alone)
    assert all((start == other.result()[0][0]).all() and not difference.any() for start, difference in other.result())


def test_a_call_gives_pictures_that_know_how_they_were_made(sd: Engine) -> None:
    images = sd("a red apple", steps=2, solver="dpmpp-2m", seed=7, guidance=3.0, count=2)
    assert [image.size for image in images] == [(128, 128)] * 2
    made = images[1].info["latentrt"]
    assert (made["prompt"], made["seed"], made["solver"], made["steps"]) == ("a red apple", 8, "dpmpp-2m", 2)


def test_the_golden_runs_come_out_as_exported(sd: Engine) -> None:
    assert sd.spec.golden
    assert worst_error(sd) < 1e-4


def test_the_same_seed_is_the_same_picture_and_another_is_not(sd: Engine) -> None:
    first, again, other = (latents(sd, ["a cat"], steps=2, seed=seed)[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_picture_does_not_depend_on_its_company(sd: Engine) -> None:
    """Bitwise, on the CPU: guided and unguided jobs, other prompts, seeds and step counts in one batch."""
    alone = latents(sd, ["a cat"], steps=3, seed=5, solver="dpmpp-2m")[0]
    together = latents(sd, ["an owl", "a pizza", "a cat"], steps=3, seed=3, solver="dpmpp-2m")[2]
    np.testing.assert_array_equal(alone, together)
    company = [
        *sd.requests(["a cat"], {"steps": 3, "seed": 5, "solver": "dpmpp-2m"}),
        *sd.requests(["a dog", "a fox"], {"steps": 5, "solver": "euler-ancestral", "guidance": 1.0}),
    ]
    sd.run(company)
    np.testing.assert_array_equal(alone, company[0].latents)


def test_an_unguided_picture_does_not_depend_on_its_company_either(sd: Engine) -> None:
    """The smallest batch is one lane: linear layers of one row must not take another path than those of many."""
    alone = latents(sd, ["a cat"], steps=2, seed=5, guidance=1.0)[0]
    together = latents(sd, ["an owl", "a cat"], steps=2, seed=4, guidance=1.0)[1]
    np.testing.assert_array_equal(alone, together)


def test_more_pictures_than_lanes_come_out_the_same(sd: Engine) -> None:
    with Engine.load(lanes=4, threads=2, check_hashes=False) as narrow:
        few = latents(narrow, ["a cat"], steps=2, count=5)
    for a, b in zip(few, latents(sd, ["a cat"], steps=2, count=5), strict=True):
        np.testing.assert_array_equal(a, b)


def test_one_network_at_a_time_draws_the_same(sd: Engine) -> None:
    settings = {"steps": 2, "seed": 5}
    with Engine.load(resident=False, threads=2, check_hashes=False) as lean:
        opened: list[str] = []
        for name, network in lean.model.networks.items():
            load = network._load
            network._load = lambda name=name, load=load: (opened.append(name), load())[1]
        first, again = lean("a cat", **settings)[0], lean("a cat", **settings)[0]
    # the prompt is remembered
    assert opened == ["text_encoder", "unet_text", "unet", "vae_decoder", "unet"]
    assert np.array_equal(np.asarray(first), np.asarray(again))
    assert np.array_equal(np.asarray(first), np.asarray(sd("a cat", **settings)[0]))


def test_on_tick_sees_every_row_and_may_stop_the_run(fake: Engine) -> None:
    seen: list[int] = []
    fake("a", steps=3, solver="heun", on_tick=lambda job: seen.append(job.row))
    assert seen == [1, 2, 3, 4, 5]

    def stop(job: Job) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fake("a", steps=3, on_tick=stop)
    assert fake.denoiser.jobs == ()


def test_on_tick_may_cancel_a_job_and_sees_no_others(fake: Engine) -> None:
    other = fake.requests(["other"], {"steps": 9})[0]
    fake.denoiser.admit(other)
    first, second = fake.requests(["a", "b"], {"steps": 4})
    seen: list[Job] = []

    def cancel(job: Job) -> None:
        seen.append(job)
        if job is first and job.row == 2:
            fake.denoiser.retire(job)

    fake.run([first, second], cancel)
    assert (first.row, second.row, other.row) == (2, 4, 4)
    assert set(seen) == {first, second}
    assert fake.denoiser.jobs == (other,)
    fake.denoiser.retire(other)


def test_a_closed_engine_says_so() -> None:
    with Engine.load(backend=FakeBackend(), check_hashes=False) as engine:
        pass
    with pytest.raises(BackendError, match="closed"):
        engine("a", steps=1)


@pytest.mark.parametrize("name", ["apple.png", "apple.jpg", "apple.webp"])
def test_plain_pil_save_keeps_the_settings(fake: Engine, tmp_path: Path, name: str) -> None:
    (image,) = fake("a red apple", steps=1, seed=3)
    image.save(tmp_path / name)
    made = read_settings(tmp_path / name)
    assert (made["prompt"], made["seed"]) == ("a red apple", 3)
    assert b"trainedAlgorithmicMedia" in (tmp_path / name).read_bytes()
    buffer = BytesIO()
    image.save(buffer, "PNG")
    assert b"trainedAlgorithmicMedia" in buffer.getvalue()
    image.save(tmp_path / "apple.bmp")  # a format that carries nothing is left to PIL


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_runs(fake: Engine, solver: str) -> None:
    (image,) = fake("a", steps=6, solver=solver)
    assert image.size == (128, 128)


def test_sizes_follow_the_request(fake: Engine) -> None:
    (image,) = fake("a", steps=1, width=192, height=64)
    assert image.size == (192, 64)
    with pytest.raises(RequestError, match=r"width is 100.*take 96 or 104"):
        fake("a", steps=1, width=100)
    with pytest.raises(RequestError, match="height is 4"):
        fake("a", steps=1, height=4)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"steps": 0}, RequestError, "steps"),
        ({"steps": 1001}, RequestError, "1001 steps"),
        ({"solver": "dpmp-2m"}, UnknownSolverError, "dpmpp-2m"),
        ({"guidance": float("nan")}, RequestError, "guidance"),
        ({"eta": 2.0}, ScheduleError, "eta"),
        ({"etta": 0.5}, RequestError, "etta"),
        ({"noise": "torch-cpuu"}, RequestError, "torch-cpu"),
    ],
)
def test_bad_settings_are_named(fake: Engine, settings: dict[str, Any], error: type[LatentrtError], words: str) -> None:
    with pytest.raises(error, match=words):
        fake("a", **settings)


def test_options_reach_the_table(fake: Engine) -> None:
    (job,) = fake.requests(["a"], {"steps": 4, "solver": "euler", "use_karras_sigmas": True})
    (plain,) = fake.requests(["a"], {"steps": 4, "solver": "euler"})
    assert not np.allclose(job.table.timesteps, plain.table.timesteps)
    assert job.tag["use_karras_sigmas"] is True


def test_a_long_prompt_is_cut_and_the_rest_is_named(fake: Engine) -> None:
    with pytest.warns(PromptTruncatedWarning, match="walrus"):
        fake("cat " * 100 + "walrus", steps=1)


def test_a_network_that_returns_nan_is_no_black_picture() -> None:
    def broken(feeds: Any) -> dict[str, np.ndarray]:
        return {"out": np.full_like(feeds["sample"], np.nan)}

    with (
        Engine.load(backend=FakeBackend({"unet/model.onnx": broken}), check_hashes=False) as engine,
        pytest.raises(NetworkError, match="not finite"),
    ):
        engine("a", steps=2)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**63), count=st.integers(1, 4))
def test_seeds_count_up(fake: Engine, seed: int, count: int) -> None:
    jobs = fake.requests(["a", "b"], {"seed": seed, "count": count, "steps": 1})
    assert [job.tag["seed"] for job in jobs] == list(range(seed, seed + 2 * count))
    assert [job.tag["index"] for job in jobs] == list(range(2 * count))


def test_backends_and_devices_are_never_swapped() -> None:
    with pytest.raises(BackendError, match="tensorflow"):
        Engine.load(backend="tensorflow")
    with pytest.raises(BackendError, match="tpu"):
        Engine.load(device="tpu")
    with pytest.raises(BackendError, match="CUDAExecutionProvider"):
        Engine.load(device="cuda")
    with pytest.raises(BackendError, match="threads"):
        Engine.load(threads=0)


def test_no_warning_is_hidden_from_the_caller(fake: Engine) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fake("a short prompt", steps=1)


def test_numpys_numbers_are_numbers(fake: Engine, tmp_path: Path) -> None:
    asked = {
        "steps": 2,
        "seed": 5,
        "guidance": 3.0,
        "height": 64,
        "width": 72,
        "count": 2,
        "solver": "ddim",
        "eta": 0.5,
    }
    kinds: dict[str, Any] = {"steps": np.int8, "seed": np.int64, "guidance": np.float32, "eta": np.float32}
    numbers = {name: kinds.get(name, np.array)(value) for name, value in asked.items()}
    for ours, plain in zip(fake(np.array(["a"]), **numbers), fake("a", **asked), strict=True):
        assert ours.info["latentrt"] == plain.info["latentrt"]
        ours.save(tmp_path / "a.png")
        assert read_settings(tmp_path / "a.png") == plain.info["latentrt"]


@pytest.mark.parametrize("prompt", [None, [None], ["a", None], np.array(None)])
def test_a_model_that_reads_prompts_needs_one(fake: Engine, prompt: Any) -> None:
    with pytest.raises(RequestError, match=r"there is no prompt\. Needed: what to draw"):
        fake(prompt)


@pytest.mark.parametrize("prompt", [5, b"a", {"a": 1}, 0.5, [5], [b"a"], np.array([1, 2])])
def test_a_prompt_is_text_or_several(fake: Engine, prompt: Any) -> None:
    with pytest.raises(RequestError, match=r"prompt is .*Needed: text"):
        fake(prompt)
