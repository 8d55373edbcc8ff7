"""The serving benchmark's own arithmetic: arrivals, percentiles, ratios, growth, and its page's text on gaps."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from benchmarks.serving import measure, page, plots, refusals, soak
from benchmarks.serving.measure import Config, Part
from benchmarks.serving.policies import ALONE, BY_REQUEST, BY_STEP, HTTP, InBatches, replay
from benchmarks.serving.traffic import COUNTS, Arrival, Outcome, arrivals, crowd, quantile, select

SEEDS = (1, 2, 3)
times = st.lists(st.floats(0.001, 100), min_size=1, max_size=60)


# ---- Arrivals and percentiles


@given(values=times, part=st.floats(0, 1))
def test_a_quantile_is_the_smallest_value_that_so_many_do_not_exceed(values: list[float], part: float) -> None:
    reached = [v for v in values if sum(other <= v for other in values) >= part * len(values) - 1e-9]
    assert quantile(values, part) == min(reached)


def test_quantiles_of_a_hundred() -> None:
    values = list(range(1, 101))
    random.Random(0).shuffle(values)
    assert [quantile(values, part) for part in (0.5, 0.95, 0.99, 0.07, 1.0)] == [50, 95, 99, 7, 100]


@given(seed=st.integers(0, 99), rate=st.floats(1, 20))
def test_a_seed_gives_the_same_requests_at_any_rate(seed: int, rate: float) -> None:
    slow, fast = arrivals(rate, 10, seed), arrivals(2 * rate, 10, seed)
    assert len(slow) < len(fast)
    for one, other in zip(slow, fast, strict=False):
        assert one._replace(at=0.0) == other._replace(at=0.0)
    assert slow == arrivals(rate, 10, seed)


@given(seed=st.integers(0, 99), rate=st.floats(1, 20), seconds=st.floats(1, 10))
def test_a_round_offers_what_its_load_says(seed: int, rate: float, seconds: float) -> None:
    traffic = arrivals(rate, seconds, seed)
    pictures = sum(one.pictures for one in traffic)
    assert 0 <= pictures - rate * seconds < max(COUNTS)
    assert [one.at for one in traffic] == sorted(one.at for one in traffic)
    assert traffic[0].at == 0
    assert all(one.at < pictures / rate for one in traffic)


def test_arrivals_are_a_poisson_process_of_that_many_pictures_a_second() -> None:
    traffic = arrivals(rate=9.0, seconds=3000.0, seed=5)
    gaps = [b.at - a.at for a, b in itertools.pairwise(traffic)]
    assert sum(one.pictures for one in traffic) / traffic[-1].at == pytest.approx(9.0, rel=0.001)
    assert fmean(gaps) == pytest.approx(fmean(COUNTS) / 9, rel=4 / len(gaps) ** 0.5)
    assert stats.kstest(gaps, "expon", args=(0, fmean(gaps))).pvalue > 0.01
    assert {one.steps for one in traffic} == set(range(10, 31))


def test_a_crowd_comes_at_once_one_picture_each() -> None:
    some = crowd(32, 1)
    assert [(one.at, one.pictures) for one in some] == [(0.0, 1)] * 32
    assert len({one.prompt for one in some}) == 32


# ---- Ways to serve


def wanted(*counts: int) -> list[Arrival]:
    return [Arrival(0.0, f"number {n}", n, count, 10, "ddim", 1.0) for n, count in enumerate(counts)]


def test_batches_are_closed_when_they_start_and_hold_whole_requests() -> None:
    batches: list[list[int]] = [[]]

    async def draw(arrival: Arrival) -> bool:
        batches[-1].append(arrival.seed)
        await asyncio.sleep(0)
        return True

    async def go() -> list[bool]:
        serve = InBatches(lambda arrival: draw(arrival), most=4, places=10)
        tasks = [asyncio.create_task(serve(one)) for one in wanted(1, 2, 2, 1, 4, 1)]
        while not all(task.done() for task in tasks):
            if batches[-1]:
                batches.append([])
            await asyncio.sleep(0)
        return [task.result() for task in tasks]

    served = asyncio.run(go())
    assert [batch for batch in batches if batch] == [[0, 1], [2, 3], [4]]
    assert served == [True, True, True, True, True, False]  # ten places: the last one finds them taken


def test_a_replay_counts_requests_and_pictures_and_keeps_their_order() -> None:
    traffic = [one._replace(at=0.01 * n) for n, one in enumerate(wanted(1, 4, 2, 1))]

    async def serve(arrival: Arrival) -> bool:
        await asyncio.sleep(0.05 if arrival.seed == 0 else 0.0)
        return arrival.seed != 1

    outcome = asyncio.run(replay(BY_STEP, 0.5, 7, traffic, serve))
    assert (outcome.arrived, outcome.refused, outcome.pictures, len(outcome.latencies)) == (4, 1, 4, 3)
    assert outcome.latencies[0] == max(outcome.latencies) >= 0.05
    assert outcome.rate == 4 / outcome.seconds
    assert outcome.refusals == 25
    assert (outcome.others, outcome.ticks) == (None, 0)


def test_every_way_to_serve_meets_the_same_traffic_and_they_take_turns() -> None:
    part = Part((0.5, 1.0), 1.0, 1.0, 8)
    plan = measure._plan(part, SEEDS)
    for load, sides in ((0.5, {BY_STEP, BY_REQUEST, ALONE}), (1.0, {BY_STEP, BY_REQUEST, ALONE, HTTP})):
        for seed in SEEDS:
            assert {side for at, number, side in plan if (at, number) == (load, seed)} == sides
    firsts = [next(side for at, number, side in plan if (at, number) == (0.5, seed)) for seed in SEEDS]
    assert firsts == [BY_STEP, ALONE, BY_STEP]


# ---- What the page says


def outcome(policy: str, load: float, seed: int, latencies: list[float], **more: Any) -> Outcome:
    counts = (len(latencies), 0, len(latencies), 2.0)
    calls = {"others": 0.1, "ticks": 10, "lanes": 40, "busy": 0.5}
    return Outcome(policy, load, seed, *counts, latencies, **{**calls, **more})


def test_ratios_are_taken_seed_by_seed() -> None:
    ours = {seed: outcome(BY_STEP, 1.0, seed, [1.0 * seed]) for seed in (1, 2, 3)}
    theirs = {seed: outcome(ALONE, 1.0, seed, [seed * (1.0 + seed)]) for seed in (1, 2, 9)}
    p50, _, _, throughput = page.ratios(ours, theirs)  # 2 and 3 times; seed 9 has no partner
    assert p50 == "**2.50×** (2.00 to 3.00)"
    assert throughput == "1.00× (1.00 to 1.00)"
    assert page.ratios(ours, {}) == ["not measured"] * 4


@pytest.mark.parametrize(("factors", "bold"), [((1.1, 1.2), True), ((0.8, 0.9), True), ((0.9, 1.5), False)])
def test_only_what_all_rounds_say_is_bold(factors: tuple[float, ...], bold: bool) -> None:
    ours = {seed: outcome(BY_STEP, 1.0, seed, [1.0]) for seed in range(2)}
    theirs = {seed: outcome(ALONE, 1.0, seed, [factor]) for seed, factor in enumerate(factors)}
    assert page.ratios(ours, theirs)[0].startswith("**") == bold


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """Return the results of a run, as JSON has them; one at a time was tried at the lower load only."""
    sides = {0.5: (BY_STEP, BY_REQUEST, ALONE, HTTP), 1.0: (BY_STEP, BY_REQUEST)}
    outcomes = [
        outcome(side, load, seed, [load * (1 + number + seed / 10)] * 4).to_dict()
        for load in sides
        for seed in SEEDS
        for number, side in enumerate(sides[load])
    ]
    part = {"curve": {2: 0.006, 8: 0.018}, "decode": 0.008, "cap": 8, "capacity": 9.5, "outcomes": outcomes}
    config = Config(seeds=SEEDS, emoji=replace(Config().emoji, http_load=0.5))
    data = {
        "date": "2026-01-01",
        "machine": {"cpu": "a cpu", "cores": 2, "python": "3.11"},
        "config": asdict(config),
        "emoji": {**part, "singles": {BY_STEP: [0.1, 0.3, 0.1], HTTP: [0.12, 0.32, 0.1]}},
        "fake": {**part, "singles": {}},
        "refusals": [
            {"clients": 9, "requests": 70, "client_seconds": [[0.05], [0.07]], "server_seconds": [[0.001], [0.002]]}
        ],
    }
    loaded: dict[str, Any] = json.loads(json.dumps(data))
    return loaded


def row(text: str, *begin: str) -> list[str]:
    """Return the cells of the first row that begins so."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {' | '.join(begin)} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][len(begin) :]


def test_the_page_has_medians_and_spreads_and_says_what_was_not_measured(found: dict[str, Any]) -> None:
    text = page.render(found, None)
    assert row(text, "0.5", "by step")[:2] == ["2 (2 to 2)", "0.6 (0.55 to 0.65)"]
    assert row(text, "1", "by step")[1] == "1.2 (1.1 to 1.3)"
    assert row(text, "1", "one at a time") == ["not measured"] * 5
    ratio = row(text.partition("load | beside")[2], "0.5", "by request")[0]
    assert ratio == "**1.83×** (1.77 to 1.91)"
    assert "pairs of one each: 20 (0 to 20) ms" in text
    assert row(text, "9", "70") == ["1.5 (1 to 2)", "1.5 (1 to 2)", "60 (50 to 70)", "60 (50 to 70)"]
    assert row(text, "the embedded model", "8") == ["18", "2.25", "1.33×"]
    assert row(text, "the embedded model", "by step") == ["4 (4 to 4)", "12.5 (12.5 to 12.5)", "25 (25 to 25)"]
    assert text.partition("## Soak")[2].strip().startswith("Not measured.")


def test_the_page_tells_of_a_modest_client(found: dict[str, Any]) -> None:
    assert "## A modest client\n\nNot measured." in page.render(found, None)
    part = {"date": "2026-01-01", "load": 1.5, "alone": [[1.0, 2.0], [1.0, 3.0]], "beside": [[2.0, 8.0], [3.0, 6.0]]}
    text = page.render({**found, "beside": {"greedy": part}}, None)
    words = "three clients with sixty pictures each"
    assert row(text, words, "2 × 2", "p50") == ["1 (1 to 1)", "2.5 (2 to 3)", "2.5 (2 to 3)"]
    assert row(text, words, "2 × 2", "p95") == ["2.5 (2 to 3)", "7 (6 to 8)", "3 (2 to 4)"]
    assert "load average before it 1.5" in text


def test_the_page_tells_of_a_soak(found: dict[str, Any]) -> None:
    seconds = [float(n) for n in range(1, 301)]
    samples = {
        "seconds": seconds,
        "memory": [200 + n / 60 for n in seconds],
        "allocated": [150 + n % 2 for n in seconds],
        "blocks": [400.0] * 300,
        "descriptors": [30.0 + n % 2 for n in range(300)],
        "threads": [9.0] * 300,
    }
    idle = {"memory": 205, "allocated": 150, "blocks": 400, "descriptors": 20, "threads": 9}
    text = page.render(
        found, {"date": "", "minutes": 5, "clients": 12, "answers": {"200": 4}, "samples": samples, "idle": idle}
    )
    memory = row(text, soak.TITLES["memory"])
    assert memory[2].startswith("+1 ± ")
    assert memory[3] == "grows"
    assert row(text, soak.TITLES["descriptors"])[3] == "no growth that can be told from none"
    assert row(text, soak.TITLES["allocated"])[3] == "no growth that can be told from none"
    assert row(text, soak.TITLES["threads"])[2:] == ["+0 ± 0", "no growth that can be told from none"]


def test_page_and_plots_are_written_from_the_samples(found: dict[str, Any], tmp_path: Path) -> None:
    page.write(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / page.SAMPLES).write_text(json.dumps(found))
    page.write(tmp_path)
    assert (tmp_path / "SERVING.md").read_text() == page.render(found, None)
    for name in page.PARTS:
        assert 5_000 < (tmp_path / f"serving-{name}.png").stat().st_size < 150_000


@given(heights=st.lists(st.floats(0, 1), max_size=5))
def test_labels_keep_their_order_and_do_not_overlap(heights: list[float]) -> None:
    placed = plots.apart(dict(enumerate(heights)))
    ordered = [placed[key] for key in sorted(placed, key=lambda key: heights[key])]
    assert all(high - low >= plots.GAP - 1e-9 for low, high in itertools.pairwise(ordered))
    assert all(placed[key] >= height for key, height in enumerate(heights))


# ---- Refusals and growth


def test_refusals_are_milliseconds_of_each_repeat() -> None:
    part = {"server_seconds": [[0.001, 0.003, 0.002]], "client_seconds": [[0.1] * 98 + [0.2, 0.3], [0.5]]}
    assert refusals.percentiles(part, "server") == {"p50": [2], "p99": [3]}
    assert refusals.percentiles(part, "client") == {"p50": [100, 500], "p99": [200, 500]}


@given(
    points=st.lists(st.tuples(st.floats(0, 10), st.floats(-5, 5)), min_size=3, max_size=20, unique_by=lambda p: p[0])
)
def test_the_line_is_the_one_of_least_squares(points: list[tuple[float, float]]) -> None:
    if max(x for x, _ in points) - min(x for x, _ in points) < 0.1:
        return
    found, oracle = soak.line(points), stats.linregress(*zip(*points, strict=True))
    assert found.slope == pytest.approx(oracle.slope, rel=1e-6, abs=1e-9)
    assert found.error == pytest.approx(oracle.stderr, rel=1e-6, abs=1e-6)


def test_growth_begins_after_the_warm_part() -> None:
    seconds = [float(n) for n in range(1, 301)]
    warm = [min(second, 60.0) for second in seconds]
    grows = soak.growth(seconds, [100 + second / 30 for second in seconds])
    assert soak.growth(seconds, warm) == soak.Growth(0.0, 0.0)
    assert grows is not None
    assert grows.slope == pytest.approx(2.0)
    assert grows.verdict == "grows"
    assert soak.growth(seconds[:20], warm[:20]) is None


def test_noise_is_not_growth() -> None:
    """A level process seems to grow or shrink in some 5 of 100 soaks, by chance."""
    verdicts = []
    for seed in range(100):
        dice = random.Random(seed)
        found = soak.growth([float(n) for n in range(1, 301)], [dice.gauss(200, 3) for _ in range(300)])
        assert found is not None
        verdicts.append(found.verdict)
    assert verdicts.count("no growth that can be told from none") >= 88


def test_select_takes_one_side_at_one_load() -> None:
    some = [outcome(side, load, seed, [1.0]) for side in (BY_STEP, ALONE) for load in (0.5, 1.0) for seed in SEEDS]
    assert sorted(select(some, ALONE, 1.0)) == list(SEEDS)
    assert {one.policy for one in select(some, ALONE, 1.0).values()} == {ALONE}
