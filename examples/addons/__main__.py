"""`python examples/addons STAGE...`: LoRAs and ControlNets for the embedded model. See README.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from warnings import filterwarnings

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("emoji", "shared")]

from data import CACHE

SEED = 0
LOOKS, HINTS = ("mosaic", "ink", "flat"), ("grey", "edges")
STAGES = ("looks", *LOOKS, *HINTS, "pack", "check", "card")
MINUTES = {"mosaic": 11.0, "ink": 8.0, "flat": 30.0, "grey": 25.0, "edges": 30.0}  # beside other work on two cores


def main() -> None:
    """Run stages in turn."""
    filterwarnings("ignore", category=FutureWarning)
    parser = argparse.ArgumentParser(prog="python examples/addons", description=__doc__)
    parser.add_argument("stages", nargs="+", choices=STAGES, metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--minutes", type=float, help=f"of training, with those of earlier calls {MINUTES}")
    parser.add_argument("--only", choices=(*LOOKS, *HINTS), help="of `pack`, `check` and `card` [all]")
    parser.add_argument("--work", type=Path, default=CACHE / "emoji", help="folder [%(default)s]")
    parser.add_argument("--threads", type=int, help="of torch, on a CPU")
    asked = parser.parse_args()
    if asked.threads:
        import torch

        torch.set_num_threads(asked.threads)
    for stage in asked.stages:
        _run(stage, asked.work, asked.minutes, [asked.only] if asked.only else [*LOOKS, *HINTS])


def _run(stage: str, work: Path, minutes: float | None, names: list[str]) -> None:
    """One stage; its libraries are imported only now."""
    match stage:
        case "looks":
            import looks

            looks.collect(work)
        case "pack" | "card":
            import ship

            for name in names:
                (ship.pack if stage == "pack" else ship.card)(work, name)
        case "check":
            import judge
            import ship

            for name in names:
                (judge.look if name in LOOKS else judge.control)(work, name, ship.shipped(work, name))
        case _:
            import torch

            torch.manual_seed(SEED)  # of the weights that training begins with
            import control
            import lora

            train = lora.train if stage in LOOKS else control.train
            train(work, stage, MINUTES[stage] if minutes is None else minutes)


if __name__ == "__main__":
    main()
