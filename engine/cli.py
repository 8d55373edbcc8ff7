"""The command `latentrt`: one verb a function. What a verb needs is imported when it runs."""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from engine import __version__
from engine.arguments import options_of, size_of, whole_of
from engine.build_verb import build
from engine.bundle import EMBEDDED
from engine.errors import LatentrtError, PromptTruncatedWarning
from engine.terminal import progress, show, table_of, with_previews

if TYPE_CHECKING:
    from engine.job import Job

FOLDER = click.Path(path_type=Path)
argument_bundle = click.argument("bundle", type=FOLDER, default=EMBEDDED, required=False)
option_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")


AT_LEAST_ONE = click.IntRange(min=1)
INTERRUPTED, CRASHED = 130, 70  # 128 + SIGINT; EX_SOFTWARE of BSD's sysexits.h


def runs_networks(verb: Callable[..., None]) -> Callable[..., None]:
    """The options of verbs that run networks; their names are those of `Engine.load`."""
    for option in (
        click.option("--threads", type=AT_LEAST_ONE, help="CPU threads of a network call  [default: all cores]"),
        click.option("--plans", type=FOLDER, help="Folder of TensorRT plans  [default: the bundle's own]"),
        click.option(
            "--precision",
            type=click.Choice(["fp32", "fp16"]),
            help="Of the graphs  [default: fp32 for onnxruntime, fp16 for TensorRT]",
        ),
        click.option("--device", help="cpu, cuda or cuda:1  [default: cpu for onnxruntime, cuda for TensorRT]"),
        click.option(
            "--backend",
            default="onnxruntime",
            show_default=True,
            help="onnxruntime, tensorrt, tensorrt-rtx or tensorrt-lean (the last three run what `latentrt build` made).",
        ),
    ):
        verb = option(verb)
    return verb


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 a check failed, 2 bad input, 130 an interrupt, 70 a fault of latentrt."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", PromptTruncatedWarning)
        warnings.showwarning = _show_warning
        sys.exit(_run())


def _run() -> int:
    as_json = "--json" in sys.argv
    try:
        code = latentrt(prog_name="latentrt", standalone_mode=False)
    except LatentrtError as error:
        if not as_json:
            print(f"error: {error.found}\n  needed: {error.needed}\n  to mend it: {error.mend}", file=sys.stderr)
        return _fail(error, error.parts, as_json, 2)
    except click.ClickException as error:
        if not as_json:
            error.show()
        parts = {"found": error.format_message(), "needed": "a call as --help shows", "mend": "latentrt --help"}
        return _fail(error, parts, as_json, error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception:
        traceback.print_exc()
        return CRASHED
    return code if isinstance(code, int) else 0


def _fail(error: Exception, parts: dict[str, str], as_json: bool, code: int) -> int:
    if as_json:
        print(json.dumps({"error": {"type": type(error).__name__, **parts}}))
    return code


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
@click.option(
    "--preview-every",
    type=click.IntRange(min=0),
    default=0,
    help="Every N rows write the current and the predicted picture.",
)
@click.option("--option", multiple=True, help="Any other setting, as eta=0.5 or use_karras_sigmas=true; repeatable.")
@click.option(
    "--lanes",
    type=AT_LEAST_ONE,
    help="Most lanes of a UNet call; guidance takes two a picture  [default: 16; on a GPU the plan's]",
)
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
    lanes: int | None,
    as_json: bool,
    **loading: Any,
) -> None:
    """Draw pictures from prompts."""
    from engine.backends.ort import return_freed_pages
    from engine.image import grid as contact_sheet
    from engine.image import output_path, save
    from engine.output import check_distinct, check_folder, check_grid, check_writable, preview_paths, with_suffix
    from engine.pipeline import Engine

    width, height = size_of(size)
    pattern = with_suffix(output, format)
    check_folder(pattern)
    check_grid(grid)
    settings = {"negative_prompt": negative, "steps": steps, "solver": solver, "seed": seed, "guidance": guidance}
    settings |= {"width": width, "height": height, "count": count, **options_of(option)}
    if settings["negative_prompt"] and guidance <= 1:
        print("note: --negative has no effect with a --guidance of 1 or less", file=sys.stderr)
    images = []
    return_freed_pages()
    with Engine.load(bundle, lanes=lanes, resident=False, **loading) as engine:
        jobs = engine.requests(prompts, settings)
        paths = {job: output_path(pattern, job.tag) for job in jobs}
        previews = [preview_paths(paths[job], len(job.table), preview_every) for job in jobs]
        shown = [path for rows in previews for pair in rows.values() for path in pair]
        check_distinct([*paths.values(), *shown, *([grid] if grid else [])])
        for path in [*paths.values(), *shown]:
            check_writable(path)
        with progress(jobs, quiet=as_json) as on_tick:
            tick = with_previews(engine, jobs, previews, on_tick)

            def tick_and_save(job: Job) -> None:
                """An interrupt must not lose what is done. The UNet stays loaded as long as a job waits for it."""
                tick(job)
                if job.done and job.error is None:
                    image = engine.picture(job) if jobs[-1].done else engine.decode(job.latents)
                    save(image, paths[job], settings=job.tag)
                    if grid is not None:
                        images.append(image)

            engine.run(jobs, tick_and_save)
    if grid is not None:
        captions = [job.tag["prompt"] for job in jobs]
        save(contact_sheet(images, captions=captions), grid, settings={"prompt": "; ".join(prompts), **settings})
    if as_json:
        pictures = [{**job.tag, "path": str(path)} for job, path in paths.items()]
        made = {"pictures": pictures, "grid": grid and str(grid), "previews": [str(path) for path in shown]}
        print(json.dumps(made, ensure_ascii=False))
    else:
        for path in [*paths.values(), *([grid] if grid else [])]:
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
@click.option("--against", help="Checkpoint (a folder or a hub id)  [default: BUNDLE itself, opened by diffusers]")
@click.option(
    "--steps", type=AT_LEAST_ONE, default=20, show_default=True, help="Solver steps of the step and image depths."
)
@option_json
def verify(bundle: Path, against: str | None, steps: int, as_json: bool) -> None:
    """Measure a bundle against diffusers; exit code 1 beyond a bound.

    Needs the extra `export`.
    """
    from export.cli import run_verify

    sys.exit(run_verify(bundle, against or str(bundle), steps=steps, as_json=as_json))


@latentrt.command()
@argument_bundle
@option_json
def inspect(bundle: Path, as_json: bool) -> None:
    """Show what a bundle holds; its hashes are checked on the way."""
    from engine.bundle import Bundle

    opened = Bundle.open(bundle)
    if as_json:
        files = {name: {"sha256": record.sha256, "bytes": record.bytes} for name, record in opened.files.items()}
        print(json.dumps({"model": opened.spec.to_dict(), "files": files}))
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
@click.option("--steps", type=AT_LEAST_ONE, default=20, show_default=True, help="Steps of each run.")
@click.option(
    "--batches", help="Pictures at once, comma-separated  [default: 1,2,4,8; on a GPU as many as its lanes hold]"
)
@click.option(
    "--repeats", type=AT_LEAST_ONE, default=5, show_default=True, help="Runs of each batch; medians are shown."
)
@runs_networks
@option_json
def bench(
    bundle: Path,
    steps: int,
    batches: str | None,
    repeats: int,
    as_json: bool,
    **loading: Any,
) -> None:
    """Time this machine: latency and throughput by batch, and the engine's share outside the networks."""
    from engine.bench import measure
    from engine.pipeline import Engine

    sizes = [whole_of(size, "--batches", least=1) for size in batches.split(",")] if batches is not None else []
    with Engine.load(bundle, lanes=2 * max(sizes) if sizes else None, **loading) as engine:
        fitting = [size for size in (1, 2, 4, 8) if 2 * size <= engine.denoiser.lanes]
        results = measure(engine, sizes or fitting, steps=steps, repeats=repeats)
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
            "" if row["host_percent"] is None else f"{row['host_percent']:.1f}",
            f"{row['decode_ms']:.1f}",
        )
    show(table)


@latentrt.command()
@option_json
def doctor(as_json: bool) -> None:
    """Say what this machine can run, and what to install for the rest; exit code 1 if it cannot draw."""
    from rich.markup import escape

    from engine.doctor import examine

    findings = examine()
    if as_json:
        print(json.dumps([finding.to_dict() for finding in findings]))
    else:
        table = table_of("", "what", "found", "to mend or gain it")
        for finding in findings:
            mark = "[green]yes[/]" if finding.good else "[yellow]no[/]"
            table.add_row(mark, finding.what, escape(finding.found), "" if finding.good else escape(finding.mend))
        show(table)
    sys.exit(any(finding.vital and not finding.good for finding in findings))


latentrt.add_command(build)

if __name__ == "__main__":
    main()
