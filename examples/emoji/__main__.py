"""`python examples/emoji STAGE...`: the recipe of the embedded model, from pictures to a bundle. See README.md."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path
from warnings import filterwarnings

sys.path.append(str(Path(__file__).parents[1] / "shared"))

from data import CACHE

SEED = 0
STAGES = ("data", "combine", "tokenizer", "vae", "text", "unet", "pack", "check", "card")
MINUTES = {
    "cpu": {"vae": 120.0, "text": 6.0, "unet": 120.0},  # two cores
    "cuda": {"vae": 2.0, "text": 0.4, "unet": 4.0},  # an H100
}


def main() -> None:
    """Run stages in turn."""
    filterwarnings("ignore", category=FutureWarning)
    parser = argparse.ArgumentParser(prog="python examples/emoji", description=__doc__)
    parser.add_argument("stages", nargs="+", choices=STAGES, metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--minutes", type=float, help=f"of training, with those of earlier calls {MINUTES}")
    parser.add_argument("--work", type=Path, default=CACHE / "emoji", help="folder [%(default)s]")
    parser.add_argument("--bundle", type=Path, help="what `check` checks [the one that `pack` made]")
    parser.add_argument("--threads", type=int, help="of torch, on a CPU")
    asked = parser.parse_args()
    if asked.threads:
        import torch

        torch.set_num_threads(asked.threads)
    for stage in asked.stages:
        _run(stage, asked.work, asked.minutes, asked.bundle or asked.work / "bundle")


def _run(stage: str, work: Path, minutes: float | None, bundle: Path) -> None:
    """One stage; its libraries are imported only now."""
    match stage:
        case "data":
            import data

            data.collect(work)
        case "combine":
            import combine

            combine.combine(work)
        case "tokenizer":
            import tokenizer

            tokenizer.train(work)
        case "pack" | "card":
            import pack

            (pack.pack if stage == "pack" else pack.card)(work)
        case "check":
            import check

            check.check(work, bundle)
        case _:
            import torch

            torch.manual_seed(SEED)  # of the weights that training begins with
            usual = MINUTES["cuda" if torch.cuda.is_available() else "cpu"][stage]
            import_module(stage).train(work, usual if minutes is None else minutes)


if __name__ == "__main__":
    main()
