"""`latentrt generate`: pictures from prompts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from latentrt.bundle.bundle import EMBEDDED
from latentrt.command.options import AT_LEAST_ONE, FOLDER, edits_pictures, option_json, runs_networks
from latentrt.command.terminal import progress, with_previews
from latentrt.errors import RequestError
from latentrt.values import parse_size

if TYPE_CHECKING:
    from latentrt.run.job import Job


@click.command()
@click.argument("prompts", nargs=-1, required=True, metavar="PROMPT...")
@click.option("--bundle", "-b", type=FOLDER, default=EMBEDDED, help="Bundle to run  [default: the embedded model]")
@click.option("--negative", "-n", help="What to keep out.")
@click.option("--steps", "-s", type=int, default=20, show_default=True, help="Solver steps.")
@click.option("--solver", help="`latentrt solvers` lists them  [default: the bundle's own]")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the first picture; the next count up.")
@click.option("--guidance", "-g", type=float, default=3.0, show_default=True, help="Guidance scale; 1 for none.")
@click.option("--size", help="WIDTHxHEIGHT in pixels  [default: the model's own, or that of --image]")
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
@edits_pictures
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
    image: Path | None,
    strength: float | None,
    mask: Path | None,
    as_json: bool,
    **loading: Any,
) -> None:
    """Draw pictures from prompts, from noise or on a picture that is there already."""
    from latentrt.command.output import (
        check_distinct,
        check_folder,
        check_grid,
        check_writable,
        preview_paths,
        with_suffix,
    )
    from latentrt.engine import Engine
    from latentrt.images.image import grid as contact_sheet
    from latentrt.images.image import output_path, save
    from latentrt.model.edit import open_picture
    from latentrt.runtime.onnxruntime import return_freed_pages

    width, height = (None, None) if size is None else parse_size(size, "--size")
    pattern = with_suffix(output, format)
    check_folder(pattern)
    check_grid(grid)
    settings = {"negative_prompt": negative, "steps": steps, "solver": solver, "seed": seed, "guidance": guidance}
    settings |= {"width": width, "height": height, "count": count, "strength": strength, **options_of(option)}
    given, repaint = (None if path is None else open_picture(path) for path in (image, mask))
    if settings["negative_prompt"] and guidance <= 1:
        print("note: --negative has no effect with a --guidance of 1 or less", file=sys.stderr)
    images = []
    return_freed_pages()
    with Engine.load(bundle, lanes=lanes, resident=False, **loading) as engine:
        jobs = engine.requests(prompts, settings, given, repaint)
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


def options_of(pairs: tuple[str, ...]) -> dict[str, Any]:
    """KEY=VALUE pairs; a value is JSON where it can be, else text."""
    options = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise RequestError(f"--option is {pair!r}", needed="KEY=VALUE, as in eta=0.5")
        try:
            options[key] = json.loads(text)
        except ValueError:
            options[key] = text
    return options
