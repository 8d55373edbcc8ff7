"""The command `latentrt`: one verb a function. What a verb needs is imported when it runs."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from engine import __version__
from engine.bundle import EMBEDDED
from engine.errors import LatentrtError, PromptTruncatedWarning, RequestError
from engine.terminal import progress, show, table_of, with_previews

app = typer.Typer(
    name="latentrt",
    help="Stable Diffusion without the research stack: generate, export, verify.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

BundleOption = Annotated[
    Path,
    typer.Option("--bundle", "-b", help="Bundle to run [default: the embedded model].", show_default=False),
]
BundleArgument = Annotated[Path, typer.Argument(help="Bundle [default: the embedded model].", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Backend = Annotated[str, typer.Option(help="Backend that runs the networks: onnxruntime.")]
Device = Annotated[str, typer.Option(help="cpu, or cuda (needs onnxruntime-gpu).")]
Threads = Annotated[
    int | None,
    typer.Option(help="CPU threads of a network call [default: all cores].", show_default=False),
]
Lanes = Annotated[int, typer.Option(help="Most lanes of one UNet call; a picture with guidance takes two.")]


def main() -> None:
    """Entry point: errors of ours become a message and exit code 2, an interrupt 130."""
    with warnings.catch_warnings(record=False):
        warnings.simplefilter("always", PromptTruncatedWarning)
        warnings.showwarning = _show_warning
        try:
            app()
        except LatentrtError as error:
            if "--json" in sys.argv:
                print(json.dumps({"error": {"type": type(error).__name__, **error.parts}}))
            else:
                print(f"error: {error.found}\n  needed: {error.needed}\n  to mend it: {error.mend}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            sys.exit(130)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"note: {message}", file=sys.stderr)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def generate(
    prompts: Annotated[
        list[str], typer.Argument(help="What to draw; several prompts share one batch.", metavar="PROMPT...")
    ],
    bundle: BundleOption = EMBEDDED,
    negative: Annotated[str | None, typer.Option("--negative", "-n", help="What to keep out.")] = None,
    steps: Annotated[int, typer.Option("--steps", "-s", help="Solver steps.")] = 20,
    solver: Annotated[
        str | None, typer.Option(help="Solver [default: the bundle's own]; `latentrt solvers` lists them.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first picture; the next ones count up.")] = 0,
    guidance: Annotated[float, typer.Option("--guidance", "-g", help="Guidance scale; 1 for none.")] = 3.0,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels [default: the model's own].")] = None,
    count: Annotated[int, typer.Option("--count", "-c", help="Pictures for each prompt.")] = 1,
    output: Annotated[
        str,
        typer.Option("--output", "-o", help="File pattern; fields: {prompt} {seed} {index} {solver} {steps}."),
    ] = "{prompt}-{seed}",
    format: Annotated[
        str | None,
        typer.Option("--format", "-f", help="png, jpg or webp [default: the pattern's suffix, or png]."),
    ] = None,
    grid: Annotated[Path | None, typer.Option(help="Also write all pictures as one contact sheet.")] = None,
    preview_every: Annotated[
        int,
        typer.Option(help="Every N rows write the current latents and the predicted picture; 0 for never."),
    ] = 0,
    option: Annotated[
        list[str] | None,
        typer.Option(help="Solver or schedule option, as eta=0.5 or use_karras_sigmas=true; repeatable."),
    ] = None,
    backend: Backend = "onnxruntime",
    device: Device = "cpu",
    threads: Threads = None,
    lanes: Lanes = 16,
    as_json: Json = False,
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
    with Engine.load(bundle, backend=backend, device=device, threads=threads, lanes=lanes) as engine:
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


@app.command()
def solvers(as_json: Json = False) -> None:
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


@app.command()
def export(
    source: Annotated[str, typer.Argument(help="diffusers checkpoint: a folder or a hub id.")],
    target: Annotated[Path, typer.Argument(help="Folder of the new bundle.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    variant: Annotated[str | None, typer.Option(help="Weights variant, such as fp16.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the bundle that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Turn a diffusers checkpoint into a bundle (needs the extra `export`)."""
    from export.cli import run_export

    run_export(source, target, revision=revision, variant=variant, overwrite=overwrite, as_json=as_json)


@app.command()
def verify(
    bundle: BundleArgument = EMBEDDED,
    against: Annotated[
        Path | None,
        typer.Option(help="Checkpoint to compare with [default: the bundle itself, opened by diffusers]."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Solver steps of the step and image depths.")] = 20,
    as_json: Json = False,
) -> None:
    """Measure a bundle against diffusers (needs the extra `export`); exit code 1 beyond a bound."""
    from export.cli import run_verify

    raise typer.Exit(run_verify(bundle, against or bundle, steps=steps, as_json=as_json))


@app.command()
def inspect(bundle: BundleArgument = EMBEDDED, as_json: Json = False) -> None:
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


@app.command()
def bench(
    bundle: BundleArgument = EMBEDDED,
    steps: Annotated[int, typer.Option(help="Steps of each run.")] = 20,
    batches: Annotated[str, typer.Option(help="Pictures at once, comma-separated.")] = "1,2,4,8",
    repeats: Annotated[int, typer.Option(help="Runs of each batch; medians are shown.")] = 5,
    backend: Backend = "onnxruntime",
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
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


@app.command()
def doctor(as_json: Json = False) -> None:
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


def _options(pairs: list[str] | None) -> dict[str, Any]:
    options = {}
    for pair in pairs or []:
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
