"""Compare a bundle's graphs with optimum-onnx's of the same checkpoint: size, load, call, difference to torch.

optimum-onnx needs older libraries than diffusers 0.42 does (docs/export.md tells which), so its folder is made in an
environment of its own:

    optimum-cli export onnx --model engine/latentrt/bundle/embedded/emoji --task text-to-image FOLDER
    python -m benchmarks.cpu.optimum --optimum-folder FOLDER
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

from benchmarks.timing import paired
from latentrt.bundle.bundle import EMBEDDED, Bundle
from latentrt.model.prompts.tokenizer import Tokenizer
from latentrt.runtime.signature import shape_of
from latentrt_export.graphs.to_onnx import quiet
from latentrt_export.graphs.wrap import load_network

THEIR_NAMES = {"sample": "sample", "latents": "latent_sample", "image": "sample"}
PROMPTS = ("a cat", "")
SPLIT = ("unet", "unet_text", "unet_shallow")  # cut otherwise than in optimum: `python -m benchmarks peers` compares


def main() -> None:
    """Print one row per network and exporter: medians of sides that were timed in turn, in both orders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimum-folder", type=Path, required=True)
    parser.add_argument("--bundle", type=Path, default=EMBEDDED)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| network | exporter | nodes | file, KB | load, ms | call, ms (5 % to 95 %) | max abs to torch |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for name, graph in Bundle.open(args.bundle).spec.graphs().items():
        if name in SPLIT:
            continue
        paths = {"latentrt": args.bundle / graph.path, "optimum": args.optimum_folder / name / "model.onnx"}
        for exporter, cells in compare(args.bundle, name, paths, args.threads, args.repeats).items():
            print(f"| {name} | {exporter} | {' | '.join(cells)} |", flush=True)


def compare(bundle: Path, name: str, paths: dict[str, Path], threads: int, repeats: int) -> dict[str, list[str]]:
    """Return the cells of one network's rows, by exporter."""
    with quiet(), torch.no_grad():
        network = load_network(bundle, name)
        inputs = examples(bundle, name)
        wanted = network.module(*map(torch.from_numpy, inputs.values())).numpy()
    sessions = {exporter: load(path, threads) for exporter, path in paths.items()}
    feeds = {"latentrt": inputs, "optimum": in_their_words(inputs)}
    loads = in_both_orders({k: lambda _, p=path: load(p, threads) for k, path in paths.items()}, 7)
    calls = in_both_orders({k: lambda _, k=k: sessions[k].run(None, feeds[k]) for k in paths}, repeats)
    rows = {}
    for k, path in paths.items():
        difference = np.abs(sessions[k].run(None, feeds[k])[0] - wanted).max()
        nodes = len(onnx.load(path, load_external_data=False).graph.node)
        low, *_, high = quantiles(calls[k], n=20)
        spread = f"{median(calls[k]) * 1e3:.2f} ({low * 1e3:.2f} to {high * 1e3:.2f})"
        size = f"{path.stat().st_size / 1e3:.0f}"
        rows[k] = [str(nodes), size, f"{median(loads[k]) * 1e3:.0f}", spread, f"{difference:.1e}"]
    return rows


def in_both_orders(sides: dict[str, Any], repeats: int) -> dict[str, list[float]]:
    """Return seconds of each side, ABAB and then BABA."""
    first, second = paired(sides, repeats), paired(dict(reversed(sides.items())), repeats)
    return {name: [sample.seconds for sample in (*first[name], *second[name])] for name in sides}


def load(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    # By default idle threads spin for a while: those of one side would take the cores of the other.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def examples(bundle: Path, name: str) -> dict[str, np.ndarray]:
    """Return inputs for a batch of two, as one picture with guidance has, at the model's own size."""
    spec, rng = Bundle.open(bundle, check_hashes=False).spec, np.random.default_rng(0)
    if name == "text_encoder":
        tokenizer = Tokenizer.open(bundle / "tokenizer")
        return {"input_ids": np.stack([tokenizer.encode(prompt).ids for prompt in PROMPTS])}
    scale = spec.latents.factor if name == "vae_encoder" else 1
    sizes = {"batch": 2, "height": spec.latents.height * scale, "width": spec.latents.width * scale}
    shapes = {tensor.name: shape_of(tensor, sizes) for tensor in spec.graphs()[name].inputs}
    values = {k: rng.standard_normal(shape, np.float32) for k, shape in shapes.items()}
    return values | ({"timestep": np.full(2, 500, np.float32)} if name == "unet" else {})


def in_their_words(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the inputs under optimum's names; its UNet takes one timestep for the whole batch."""
    values = {THEIR_NAMES.get(name, name): array for name, array in inputs.items()}
    return values | {"timestep": inputs["timestep"][0, ...]} if "timestep" in values else values


if __name__ == "__main__":
    main()
