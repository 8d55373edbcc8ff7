"""What does step caching give, and what does it cost? `python -m benchmarks.cpu.step_caching` prints the table.

The same pictures with every interval, in turn, round by round. Time is that of the denoising loop. Loss is against
interval 1: of the last latents, relative L2, and of the pixels, PSNR, the median over all pictures.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from benchmarks.cases import PROMPTS, psnr
from benchmarks.measures import Spread
from benchmarks.timing import paired
from latentrt.bundle.bundle import EMBEDDED
from latentrt.engine import Engine

INTERVALS = (1, 2, 3, 5)


def main() -> None:
    """Print one row for each interval."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=EMBEDDED)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", type=int, help="of a side in pixels [the model's own]")
    parser.add_argument("--pictures", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    side = {} if args.size is None else {"width": args.size, "height": args.size}
    with Engine.load(args.bundle, threads=args.threads, check_hashes=False) as engine:

        def run(interval: int, round_: int) -> NDArray[np.float32]:
            prompts = [PROMPTS[(round_ * args.pictures + index) % len(PROMPTS)] for index in range(args.pictures)]
            settings = {"steps": args.steps, "seed": round_, "cache_interval": interval, "solver": "dpmpp-2m", **side}
            jobs = engine.requests(prompts, settings)
            engine.run(jobs)
            return np.stack([job.latents for job in jobs])

        samples = paired({str(interval): partial(run, interval) for interval in INTERVALS}, args.repeats)
        print("| interval | time, of that of interval 1 | loss of latents | PSNR |\n| ---: | --- | ---: | ---: |")
        for interval in INTERVALS:
            rounds = list(zip(samples[str(interval)], samples["1"], strict=True))
            time = Spread.of([ours.seconds / whole.seconds for ours, whole in rounds])
            pairs = [(a, b) for ours, whole in rounds for a, b in zip(ours.result, whole.result, strict=True)]
            loss = median(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)
            decibels = median(psnr([engine.decode(a)], [engine.decode(b)]) for a, b in pairs)
            what = f"{loss:.3f} | {decibels:.1f} dB" if interval > 1 else "0 | "
            print(f"| {interval} | {time.median:.2f} ({time.low:.2f} to {time.high:.2f}) | {what} |", flush=True)


if __name__ == "__main__":
    main()
