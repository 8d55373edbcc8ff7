"""Jobs on an engine whose lanes are spread over cores: to the bit those whose every lane is a call of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt.engine import Engine
from latentrt.run.denoiser import Denoiser
from latentrt.run.host import Float32, HostLanes, Inputs

THREADS = (1, 2, 3)
SIDE = 32  # pixels


@pytest.fixture(scope="module")
def engines() -> Iterator[dict[int, Engine]]:
    """The embedded model by its threads."""
    made = {n: Engine.load(threads=n, spin=False, check_hashes=False) for n in THREADS}
    yield made
    for engine in made.values():
        engine.close()


def lane_by_lane(engine: Engine) -> Denoiser:
    """Return a denoiser that calls the network once for each lane."""

    def predict(sample: Float32, timestep: Float32, inputs: Inputs) -> Float32:
        def lane(i: int) -> Float32:
            own = {name: array[i : i + 1] for name, array in inputs.items()}
            return engine.model.predictor(sample[i : i + 1], timestep[i : i + 1], own)

        return np.concatenate([lane(i) for i in range(len(sample))])

    return Denoiser(HostLanes(predict))


jobs = st.tuples(
    st.integers(0, 9),  # seed
    st.sampled_from(["ddim", "euler-ancestral", "dpmpp-2m"]),
    st.integers(1, 4),  # steps
    st.sampled_from([1.0, 3.0]),  # guidance
    st.integers(0, 3),  # the tick from which it waits for lanes
)


@settings(max_examples=8, deadline=None)
@given(plan=st.lists(jobs, min_size=1, max_size=5), lanes=st.integers(2, 9))
def test_latents_do_not_depend_on_threads_company_or_how_calls_are_split(
    engines: dict[int, Engine], plan: list[tuple[Any, ...]], lanes: int
) -> None:
    def asked(seed: int, solver: str, steps: int, guidance: float) -> dict[str, Any]:
        own = {"seed": seed, "solver": solver, "steps": steps, "guidance": guidance}
        return own | {"height": SIDE, "width": SIDE}

    wanted = []
    for *rest, _ in plan:
        (job,) = engines[1].requests(["a cat"], asked(*rest))
        lane_by_lane(engines[1]).run([job])
        wanted.append(job.latents)
    for threads, engine in engines.items():
        made = [(arrival, engine.requests(["a cat"], asked(*rest))[0]) for *rest, arrival in plan]
        denoiser, waiting, tick = Denoiser(HostLanes(engine.model.predictor, lanes)), list(made), 0
        while waiting or denoiser.jobs:
            for entry in [entry for entry in waiting if entry[0] <= tick and denoiser.fits(entry[1])]:
                if denoiser.fits(entry[1]):
                    denoiser.admit(entry[1])
                    waiting.remove(entry)
            denoiser.tick()
            tick += 1
        for (_, job), latents in zip(made, wanted, strict=True):
            np.testing.assert_array_equal(job.latents, latents, f"on {threads} threads")


def test_pictures_of_one_call_are_those_of_each_alone(engines: dict[int, Engine]) -> None:
    asked = {"steps": 1, "guidance": 1.0, "height": SIDE, "width": SIDE}
    alone = [np.asarray(engines[1](f"a thing {number}", seed=number, **asked)[0]) for number in range(5)]
    for engine in engines.values():
        for found, wanted in zip(engine([f"a thing {n}" for n in range(5)], **asked), alone, strict=True):
            np.testing.assert_array_equal(np.asarray(found), wanted)
