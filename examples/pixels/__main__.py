"""`python examples/pixels STAGE...`: a small pixel model, from pictures to a diffusers checkpoint. See README.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from warnings import filterwarnings

sys.path.append(str(Path(__file__).parents[1] / "shared"))

from data import CACHE

STAGES = ("data", "train", "sample", "pack", "check", "card")
SOLVERS = ("ddpm", "ddim", "dpmpp-2m")
SEED = 0


def main() -> None:
    """Run stages in turn."""
    filterwarnings("ignore", category=FutureWarning)
    parser = argparse.ArgumentParser(prog="python examples/pixels", description=__doc__)
    parser.add_argument("stages", nargs="+", choices=STAGES, metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--minutes", type=float, default=55.0, help="of training, with earlier calls [%(default)s]")
    parser.add_argument("--solver", choices=SOLVERS, default="ddim", help="of `sample` [%(default)s]")
    parser.add_argument("--steps", type=int, default=30, help="of `sample` [%(default)s]")
    parser.add_argument("--work", type=Path, default=CACHE / "pixels", help="folder [%(default)s]")
    parser.add_argument("--pictures", type=Path, default=CACHE / "emoji", help="of all emoji [%(default)s]")
    parser.add_argument("--threads", type=int, help="of torch, on a CPU")
    asked = parser.parse_args()
    if asked.threads:
        import torch

        torch.set_num_threads(asked.threads)
    for stage in asked.stages:
        _run(stage, asked)


def _run(stage: str, asked: argparse.Namespace) -> None:
    """Run one stage; its libraries are imported only now."""
    match stage:
        case "data":
            import pictures

            pictures.collect(asked.work, asked.pictures)
        case "train":
            import denoiser
            import torch

            torch.manual_seed(SEED)  # of the weights that training begins with
            denoiser.train(asked.work, asked.minutes)
        case "sample" | "check":
            import samples

            if stage == "check":
                samples.check(asked.work)
            else:
                samples.sample(asked.work, asked.solver, asked.steps)
        case _:
            import checkpoint

            (checkpoint.pack if stage == "pack" else checkpoint.card)(asked.work)


if __name__ == "__main__":
    main()
