"""`python -m benchmarks peers`: the run, its page and its plots."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.peers.config import FOLDER, MODELS, PARTS, PEERS, Config
from latentrt.values import parse_size

RESULTS = Path(__file__).parents[1] / "results"


def main(arguments: Sequence[str]) -> None:
    """Measure what the arguments ask for, and write peers.json, PEERS.md and a plot for each model."""
    from benchmarks.peers import page
    from benchmarks.peers.measure import run

    asked = _parser().parse_args(arguments)
    run(_config(asked), asked.results)
    page.write(asked.results)


def _config(asked: argparse.Namespace) -> Config:
    own = {name: getattr(asked, name) for name in ("steps", "rounds", "batch", "size") if getattr(asked, name)}
    models = tuple(replace(MODELS[name], **own) for name in asked.models)
    chosen = {name: getattr(asked, name) for name in ("threads", "limit") if getattr(asked, name)}
    return replace(
        Config(models=models, peers={name: PEERS[name] for name in asked.peers}, folder=asked.envs, parts=asked.parts),
        **chosen,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks peers", description=__doc__)
    add = parser.add_argument
    add("--models", type=_among(MODELS), default=tuple(MODELS), metavar="NAMES", help=f"of {','.join(MODELS)} [all]")
    add("--peers", type=_among(PEERS), default=tuple(PEERS), metavar="NAMES", help=f"of {','.join(PEERS)} [all]")
    kept = f"of {','.join(PARTS)}; others are kept from the last run [all]"
    add("--parts", type=_among(PARTS), default=PARTS, help=kept)
    add("--size", type=_size, help="of the pictures, in pixels, as in 256 or 512x512 [128 for emoji, 256 for sd15]")
    add("--steps", type=int, help="of the solver [20 for emoji, 2 for sd15]")
    add("--rounds", type=int, help="that are kept [5 for emoji, 2 for sd15]")
    add("--batch", type=int, help="pictures of a batch [8]")
    add("--threads", type=int, help="of every side [all cores]")
    add("--limit", type=float, help="seconds that a peer may take for one thing [300]")
    add("--envs", type=Path, default=FOLDER, metavar="FOLDER", help="of environments and models [in the user's cache]")
    add("--results", type=Path, default=RESULTS, help="folder of peers.json and the page")
    return parser


def _among(known: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    def names(text: str) -> tuple[str, ...]:
        found = tuple(text.split(","))
        unknown = sorted(set(found) - set(known))
        if unknown:
            raise argparse.ArgumentTypeError(f"no {', '.join(unknown)}; there are {', '.join(known)}")
        return found

    return names


def _size(text: str) -> tuple[int, int]:
    return parse_size(text, "--size")
