"""GPU.md and its plots, from every gpu-PRESET.json in a folder; without one, a page of what would be measured."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.config import SIDES
from benchmarks.gpu.report import lease
from benchmarks.gpu.report.figures import NOT_MEASURED, Figures, Goal, batches_of, figures_of, goals, why_missing
from benchmarks.gpu.variants import VARIANTS
from benchmarks.markdown import number, spread, table
from benchmarks.measures import Spread

PAGE = "GPU.md"
HEAD = """# Full-size models on a GPU

latentrt beside diffusers: the same weights (random ones in the true configuration, so nothing is downloaded), prompts,
seeds, steps, solver and guidance, in one run.

    python -m benchmarks gpu --preset sd15        # or sd21, sdxl; --help tells the rest

measures this machine's GPU and writes this page. Each side is a process of its own. It has a round as soon as it is
open; the other rounds go through the sides in turn, except for torch.compile, which takes minutes to open and comes
last. A side that cannot run is recorded with the reason; the others go on.

    python -m benchmarks gpu --lease --minutes 14

is for a GPU that is lent for minutes: jobs in order of worth (kernels, variants of the graph, pictures by the fastest,
diffusers, torch.compile, batches, drift, other presets, TensorRT), one after the other. The next lease goes on where
this one ended.
"""
HOW = """## How to read it

- Figures are medians, with the least and the greatest sample in brackets, after one picture that warmed up.
- *ms an image* is the wall clock's, from prompts to pixels on the host, divided by the batch; *by events* the same
  between two CUDA events.
- *it/s*: one it is a step of one guided picture, which is two lanes of the UNet. All of the picture's time counts, not
  only the loop's.
- *UNet*, *text* and *VAE* are milliseconds of one call for the whole batch, the network alone: ours bound to memory
  of its own and launched as the side launches it, diffusers' within whole pictures; by events.
- *outside* is the whole batch's time less text + steps × UNet + VAE; *ratio* the whole by that sum.
- *GPU* is the most memory that the process ever took while it opened and drew its first pictures, by the fall of what
  the driver calls free; *host* its peak resident set.
- *of peak*: the operations of the UNet's products and convolutions a second, by the largest rate that a float16 matrix
  product reached on that GPU.
- *same picture* is the PSNR to the first side's. Random weights amplify rounding: it is not a measure of quality.
- *first* is the time from the start of a process to its first pictures, of that batch; compiled kernels and plans of
  before are used where they are there.
"""
COLUMNS = (
    *("side", "ms an image", "by events", "it/s", "UNet, ms", "text, ms", "VAE, ms", "outside, ms", "ratio"),
    *("GPU, MiB", "host, MiB", "of peak", "same picture, dB"),
)
PREPARING = ("side", "batch", "build, s", "plans, MB", "first, s")


def write(folder: Path) -> None:
    """Write GPU.md, and plots for each preset."""
    files = sorted(folder.glob("gpu-*.json"))
    presets = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    for data in presets:
        from benchmarks.gpu.report.plots import draw

        draw(data, folder)
    (folder / PAGE).write_text(render(presets), encoding="utf-8")


def render(presets: Sequence[Mapping[str, Any]]) -> str:
    """Return the page as Markdown."""
    if not presets:
        return "\n".join(
            [HEAD, "**Nothing has been measured yet**: the project has had no GPU so far.\n", _empty(), HOW]
        )
    return "\n".join([HEAD, *map(_preset, presets), HOW])


def _empty() -> str:
    rows = [[side.title, *[NOT_MEASURED] * 3] for side in SIDES.values()]
    return "\n".join(
        [
            _goals(goals(None)),
            table(("side", "ms an image", "it/s", "GPU, MiB"), rows),
        ]
    )


def _preset(data: Mapping[str, Any]) -> str:
    name = data["preset"]
    blocks = [
        f"## {name}, {'x'.join(map(str, data['size']))}, {data['steps']} steps",
        _runs(data),
        _goals(goals(data)),
        *(_batch(data, batch) for batch in batches_of(data)),
        f"![{name}: milliseconds an image by batch](gpu-{name}-latency.png)",
        f"![{name}: it/s by side](gpu-{name}-rate.png)",
        "### Variants of ONNX Runtime's graphs and options",
        lease.variants(data),
        *_part("### Where the time of a UNet call goes", lease.profiles(data, goals(data))),
        *_part("### LoRAs of each lane, one guided picture", lease.loras(data)),
        "### Before the first picture",
        table(PREPARING, _preparing(data)) if _preparing(data) else f"{NOT_MEASURED}\n",
        "### Drift",
        _drift(data),
        *_part("### Jobs of the leases", lease.jobs(data)),
    ]
    return "\n\n".join(block.strip() for block in blocks) + "\n"


def _part(title: str, text: str) -> tuple[str, ...]:
    """Return a part with its title; nothing where it is empty."""
    return (title, text) if text else ()


def _runs(data: Mapping[str, Any]) -> str:
    lines = []
    for key, run in data["runs"].items():
        gpu, machine, config = run["gpu"], run["machine"], run["config"]
        device = (
            f"{gpu['name']} (SM {gpu['compute_capability']}, {gpu['memory_gib']} GiB, CUDA {gpu['cuda']})"
            if "name" in gpu
            else f"a GPU that is not known ({gpu['missing']})"
        )
        peak = run["peak"]
        matrix = f"{peak['tflops']:.0f} TFLOP/s" if "tflops" in peak else f"{NOT_MEASURED} ({peak['missing']})"
        versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
        macs = run["macs"].get("unet")
        host = f"{machine['cpu']}, {machine['cores']} cores, Python {machine['python']}, {versions}"
        turns = "one side after the other" if config["alone"] else "sides in turn"
        lines.append(
            f"- {run['date']}: {device}; {host}. {config['repeats']} rounds of {config['solver']}, "
            f"guidance {config['guidance']:g}, {turns}{_compiled(data, key)}. Matrix peak: {matrix}."
            + (f" UNet: {macs / 1e9:.1f} GMAC a lane, {4 * macs / 1e12:.3g} TFLOP an it." if macs else "")
        )
    return "\n".join(lines)


def _compiled(data: Mapping[str, Any], key: str) -> str:
    """Return how a run compiled, if it did."""
    compiled = [name for name, side in SIDES.items() if side.compiled]
    records = [record for name in compiled for record in data["sides"].get(name, {}).values()]
    if any(record["run"] == key and "missing" not in record for record in records):
        return f", torch.compile's mode {data['runs'][key]['config']['compile_mode']}"
    return ""


def _goals(found: Sequence[Goal]) -> str:
    said = {True: "reached", False: "**missed**", None: NOT_MEASURED}
    rows = [(goal.text, goal.measured, said[goal.reached]) for goal in found]
    return table(("to reach (batch 1, if no other is named)", "measured", ""), rows)


def _batch(data: Mapping[str, Any], batch: int) -> str:
    rows, reasons, fewer = [], dict[str, list[str]](), list[str]()
    for side, about in SIDES.items():
        found = figures_of(data, side, batch)
        if found is None:
            reasons.setdefault(why_missing(data, side, batch), []).append(about.title)
        elif found.rounds < found.run["config"]["repeats"]:
            fewer.append(f"{about.title} ({found.rounds})")
        rows.append([about.title, *(_cells(found) if found else [NOT_MEASURED, *[""] * (len(COLUMNS) - 2)])])
    why = "".join(f"\nNot measured: {'; '.join(sides)}. {reason}\n" for reason, sides in reasons.items())
    why += f"\nStopped after fewer rounds: {', '.join(fewer)}.\n" if fewer else ""
    return f"### Batch {batch}\n\n{table(COLUMNS, rows)}{why}{_chosen(data, batch)}"


def _chosen(data: Mapping[str, Any], batch: int) -> str:
    """Return which sides ran with more than what a user gets."""
    lines = []
    for side, about in SIDES.items():
        record = data["sides"].get(side, {}).get(str(batch), {})
        if "variant" in record:
            lines.append(f"\n{about.title}: {VARIANTS[record['variant']].title}.\n")
        if "level" in record:
            lines.append(f"\n{about.title}: plans of optimization level {record['level']}.\n")
    return "".join(lines)


def _cells(found: Figures) -> list[str]:
    record, share = found.record, found.share
    return [
        *map(spread, (found.image_ms, found.device_ms, found.iterations)),
        *(spread(Spread.of(record["alone_ms"][part])) for part in ("unet", "text", "vae")),
        number(found.outside_ms),
        f"{found.ratio:.3f}",
        number(record["device_bytes"] / 2**20) if "device_bytes" in record else NOT_MEASURED,
        number(record["host_bytes"] / 2**20),
        f"{100 * share:.1f} %" if share is not None else NOT_MEASURED,
        number(record["psnr_db"]) if "psnr_db" in record else "",
    ]


def _preparing(data: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for side, about in SIDES.items():
        for batch in batches_of(data):
            found = figures_of(data, side, batch)
            if found and (found.record.get("plans") or "cold_seconds" in found.record):
                rows.append([about.title, str(batch), *_preparation(found.record)])
    return rows


def _preparation(record: Mapping[str, Any]) -> tuple[str, str, str]:
    plans = record.get("plans") or ()
    times = [plan["seconds"] for plan in plans if plan["seconds"] is not None]
    return (
        number(sum(times)) if times else "",
        number(sum(plan["bytes"] for plan in plans) / 1e6) if plans else "",
        number(record["cold_seconds"]) if "cold_seconds" in record else "",
    )


def _drift(data: Mapping[str, Any]) -> str:
    if not data["drift"]:
        return f"{NOT_MEASURED}\n"
    rows = []
    for steps, kinds in sorted(data["drift"].items(), key=lambda item: int(item[0])):
        for kind, part in kinds.items():
            cells = (
                _drift_cells(part["relative"]) if "relative" in part else [f"{NOT_MEASURED}: {part['missing']}", "", ""]
            )
            rows.append([steps, kind, *cells])
    text = (
        "The norm of the difference between latents in float16 and diffusers' in float32, relative to the norm of "
        "these; same seed and prompt; weights are random."
    )
    plot = f"![{data['preset']}: drift by step](gpu-{data['preset']}-drift.png)"
    return "\n\n".join([text, table(("steps", "float16", "first step", "half way", "last step"), rows).strip(), plot])


def _drift_cells(relative: Sequence[float]) -> Iterable[str]:
    return (f"{relative[index]:.2e}" for index in (0, len(relative) // 2, -1))
