"""The command `latentrt`: one verb a function. What a verb needs is imported when it runs."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from engine import __version__
from engine.bundle import EMBEDDED
from engine.errors import LatentrtError, PromptTruncatedWarning, RequestError
from engine.terminal import progress, show, table_of, with_previews

FOLDER = click.Path(path_type=Path)
argument_bundle = click.argument("bundle", type=FOLDER, default=EMBEDDED, required=False)
option_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")


def runs_networks(verb: Callable[..., None]) -> Callable[..., None]:
    """The options of verbs that run networks."""
    for option in (
        click.option("--threads", type=int, help="CPU threads of a network call  [default: all cores]"),
        click.option("--device", default="cpu", show_default=True, help="cpu, or cuda (needs onnxruntime-gpu)."),
        click.option("--backend", default="onnxruntime", show_default=True, help="What runs the networks."),
    ):
        verb = option(verb)
    return verb


def main() -> None:
    """Entry point: errors of ours become a message and exit code 2, an interrupt 130."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", PromptTruncatedWarning)
        warnings.showwarning = _show_warning
        try:
            latentrt()
        except LatentrtError as error:
            if "--json" in sys.argv:
                print(json.dumps({"error": {"type": type(error).__name__, **error.parts}}))
            else:
                print(f"error: {error.found}\n  needed: {error.needed}\n  to mend it: {error.mend}", file=sys.stderr)
            sys.exit(2)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"note: {message}", file=sys.stderr)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, message="%(version)s")
def latentrt() -> None:
    """Stable Diffusion without the research stack: generate, export, verify."""


@latentrt.command()
@click.argument("prompts", nargs=-1, required=True, metavar="PROMPT...")
@click.option("--bundle", "-b", type=FOLDER, default=EMBEDDED, help="Bundle to run  [default: the embedded model]")
@click.option("--negative", "-n", help="What to keep out.")
@click.option("--steps", "-s", type=int, default=20, show_default=True, help="Solver steps.")
@click.option("--solver", help="`latentrt solvers` lists them  [default: the bundle's own]")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the first picture; the next count up.")
@click.option("--guidance", "-g", type=float, default=3.0, show_default=True, help="Guidance scale; 1 for none.")
@click.option("--size", help="WIDTHxHEIGHT in pixels  [default: the model's own]")
@click.option("--count", "-c", type=int, default=1, show_default=True, help="Pictures for each prompt.")
@click.option(
    "--output",
    "-o",
    default="{prompt}-{seed}",
    show_default=True,
    help="File pattern; fields: {prompt} {seed} {index} {solver} {steps} and other settings.",
)
@click.option("--format", "-f", help="png, jpg or webp  [default: the pattern's suffix, or png]")
@click.option("--grid", type=FOLDER, help="Also write all pictures as one contact sheet.")
@click.option("--preview-every", type=int, default=0, help="Every N rows write the current and the predicted picture.")
@click.option("--option", multiple=True, help="Any other setting, as eta=0.5 or use_karras_sigmas=true; repeatable.")
@click.option("--lanes", default=16, show_default=True, help="Most lanes of a UNet call; guidance takes two a picture.")
@runs_networks
@option_json
def generate(
    prompts: tuple[str, ...],
    bundle: Path,
    negative: str | None,
    steps: int,
    solver: str | None,
    seed: int,
    guidance: float,
    size: str | None,
    count: int,
    output: str,
    format: str | None,
    grid: Path | None,
    preview_every: int,
    option: tuple[str, ...],
    lanes: int,
    backend: str,
    device: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Draw pictures from prompts."""
    from engine.image import grid as contact_sheet
    from engine.image import output_path, save
    from engine.pipeline import Engine

    width, height = _size(size)
    pattern = _with_suffix(output, format)
    settings = {
        "negative_prompt": negative,
        "steps": steps,
        "solver": solver,
        "seed": seed,
        "guidance": guidance,
    }
    settings |= {"width": width, "height": height, "count": count, **_options(option)}
    with Engine.load(bundle, backend=backend, device=device, threads=threads, lanes=lanes, resident=False) as engine:
        jobs = engine.requests(prompts, settings)
        paths = [output_path(pattern, job.tag) for job in jobs]
        _refuse_same(paths)
        with progress(jobs, quiet=as_json) as on_tick:
            engine.run(jobs, with_previews(engine, jobs, paths, preview_every, on_tick))
        images = [engine.picture(job) for job in jobs]
    for image, path in zip(images, paths, strict=True):
        save(image, path)
    if grid is not None:
        save(
            contact_sheet(images, captions=[job.tag["prompt"] for job in jobs]),
            grid,
            settings={"prompt": "; ".join(prompts), **settings},
        )
    if as_json:
        print(
            json.dumps(
                [{**job.tag, "path": str(path)} for job, path in zip(jobs, paths, strict=True)],
                ensure_ascii=False,
            )
        )
    else:
        for path in [*paths, *([grid] if grid else [])]:
            print(path)


@latentrt.command()
@option_json
def solvers(as_json: bool) -> None:
    """List the solvers."""
    from engine.solvers import SOLVERS

    facts: dict[str, dict[str, Any]] = {
        name: {"scheduler": s.scheduler, "settings": dict(s.settings), "arguments": dict(s.arguments)}
        for name, s in SOLVERS.items()
    }
    if as_json:
        print(json.dumps(facts))
        return
    table = table_of("solver", "diffusers class", "its own arguments")
    for name, fact in facts.items():
        table.add_row(name, fact["scheduler"], ", ".join(f"{k}={v}" for k, v in fact["arguments"].items()))
    show(table)


@latentrt.command()
@click.argument("source")
@click.argument("target", type=FOLDER)
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option("--variant", help="Weights variant, such as fp16.")
@click.option("--overwrite", is_flag=True, help="Replace the bundle that is there.")
@option_json
def export(
    source: str, target: Path, revision: str | None, variant: str | None, overwrite: bool, as_json: bool
) -> None:
    """Turn the diffusers checkpoint SOURCE (a folder or a hub id) into the bundle TARGET.

    Needs the extra `export`.
    """
    from export.cli import run_export

    run_export(source, target, revision=revision, variant=variant, overwrite=overwrite, as_json=as_json)


@latentrt.command()
@argument_bundle
@click.option(
    "--against", type=FOLDER, help="Checkpoint to compare with  [default: BUNDLE itself, opened by diffusers]"
)
@click.option("--steps", default=20, show_default=True, help="Solver steps of the step and image depths.")
@option_json
def verify(bundle: Path, against: Path | None, steps: int, as_json: bool) -> None:
    """Measure a bundle against diffusers; exit code 1 beyond a bound.

    Needs the extra `export`.
    """
    from export.cli import run_verify

    sys.exit(run_verify(bundle, against or bundle, steps=steps, as_json=as_json))


@latentrt.command()
@argument_bundle
@option_json
def inspect(bundle: Path, as_json: bool) -> None:
    """Show what a bundle holds; its hashes are checked on the way."""
    from engine.bundle import Bundle

    opened = Bundle.open(bundle)
    if as_json:
        print(
            json.dumps(
                {
                    "model": opened.spec.to_dict(),
                    "files": {n: {"sha256": r.sha256, "bytes": r.bytes} for n, r in opened.files.items()},
                }
            )
        )
        return
    spec = opened.spec
    size = spec.latents.width * spec.latents.factor, spec.latents.height * spec.latents.factor
    print(f"{spec.id}  ({spec.family}, {size[0]}x{size[1]}, licence {spec.license or 'unknown'})")
    total = sum(record.bytes for record in opened.files.values()) / 1e6
    print(f"{total:.1f} MB in {len(opened.files)} files, hashes match")
    table = table_of("network", "nodes", "opset", "inputs", "outputs")
    for name, graph in spec.graphs.items():
        shapes = [
            ", ".join(f"{t.name} {t.dtype}[{', '.join(map(str, t.shape))}]" for t in ts)
            for ts in (graph.inputs, graph.outputs)
        ]
        table.add_row(name, str(graph.nodes), str(graph.opset), *shapes)
    show(table)
    schedule = opened.json(spec.schedule)
    print(f"schedule: {schedule['_class_name']}, {schedule.get('prediction_type', 'epsilon')}")


@latentrt.command()
@argument_bundle
@click.option("--steps", default=20, show_default=True, help="Steps of each run.")
@click.option("--batches", default="1,2,4,8", show_default=True, help="Pictures at once, comma-separated.")
@click.option("--repeats", default=5, show_default=True, help="Runs of each batch; medians are shown.")
@runs_networks
@option_json
def bench(
    bundle: Path,
    steps: int,
    batches: str,
    repeats: int,
    backend: str,
    device: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Time this machine: latency and throughput by batch, and the engine's share outside the networks."""
    from engine.bench import measure
    from engine.pipeline import Engine

    sizes = [_whole(size, "--batches") for size in batches.split(",")]
    with Engine.load(bundle, backend=backend, device=device, threads=threads, lanes=2 * max(sizes)) as engine:
        results = measure(engine, sizes, steps=steps, repeats=repeats)
    if as_json:
        print(json.dumps(results))
        return
    table = table_of("pictures at once", "ms a step (min, median, max)", "images/s", "host % of a step", "decode ms")
    for row in results["batches"]:
        low, middle, high = row["step_ms"]
        table.add_row(
            str(row["batch"]),
            f"{low:.1f}  {middle:.1f}  {high:.1f}",
            f"{row['images_per_second']:.2f}",
            f"{row['host_percent']:.1f}",
            f"{row['decode_ms']:.1f}",
        )
    show(table)


@latentrt.command()
@option_json
def doctor(as_json: bool) -> None:
    """Say what this machine can run, and what to install for the rest."""
    from engine.doctor import examine

    findings = examine()
    if as_json:
        print(json.dumps([finding.to_dict() for finding in findings]))
        return
    table = table_of("", "what", "found", "to mend or gain it")
    for finding in findings:
        mark = "[green]yes[/]" if finding.good else "[yellow]no[/]"
        table.add_row(mark, finding.what, finding.found, "" if finding.good else finding.mend)
    show(table)


def _size(text: str | None) -> tuple[int | None, int | None]:
    if text is None:
        return None, None
    width, _, height = text.lower().partition("x")
    return _whole(width, "--size"), _whole(height or width, "--size")


def _whole(text: str, name: str) -> int:
    if not text.strip().isdigit():
        raise RequestError(
            f"{name} has {text!r}", "whole numbers, as in --size 512x512 or --batches 1,2,4", f"change {name}"
        )
    return int(text)


def _with_suffix(pattern: str, format: str | None) -> str:
    from engine.image import FORMATS

    if format is not None and f".{format.lower()}" not in FORMATS:
        raise RequestError(f"--format is {format!r}", f"one of {', '.join(s[1:] for s in FORMATS)}", "change --format")
    known = Path(pattern).suffix.lower() in FORMATS
    if format is None:
        return pattern if known else f"{pattern}.png"
    return f"{pattern[: -len(Path(pattern).suffix)] if known else pattern}.{format.lower()}"


def _options(pairs: tuple[str, ...]) -> dict[str, Any]:
    options = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise RequestError(f"--option is {pair!r}", "KEY=VALUE, as in eta=0.5", "change --option")
        try:
            options[key] = json.loads(text)
        except ValueError:
            options[key] = text
    return options


def _refuse_same(paths: list[Path]) -> None:
    twice = {path for path in paths if paths.count(path) > 1}
    if twice:
        raise RequestError(
            f"{len(paths)} pictures would go to {', '.join(map(str, sorted(twice)))}",
            "a name for each",
            "add {seed} or {index} to --output",
        )


if __name__ == "__main__":
    main()
