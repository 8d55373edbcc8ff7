"""`latentrt generate`: pictures from prompts."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from latentrt.bundle.bundle import EMBEDDED, embedded
from latentrt.command.controls import controls_of, image_prompts_of
from latentrt.command.options import (
    ADAPTERS,
    AT_LEAST_ONE,
    FOLDER,
    LOADING,
    LORAS,
    VAES,
    controls_pictures,
    decodes_pictures,
    edits_pictures,
    names_loras,
    option_json,
    runs_in_stages,
    runs_networks,
    shows_pictures,
    takes_loras,
)
from latentrt.command.terminal import progress
from latentrt.command.watch import KINDS, Asked, Watch
from latentrt.errors import RequestError
from latentrt.model.control import controlnets_of
from latentrt.request import HANDOFF, PICTURES, SYNTAXES
from latentrt.values import parse_size

if TYPE_CHECKING:
    from PIL.Image import Image

    from latentrt.engine import Engine
    from latentrt.run.job import Job


SETTINGS = (
    *("steps", "solver", "seed", "guidance", "image_guidance", "count", "strength", "class_label", "cache_interval"),
    *("hires_scale", "hires_steps", "hires_strength", "handoff"),
    *("mask_blur", "mask_crop", "mask_fill", "resize"),
    *("noise_level", "aesthetic_score", "negative_aesthetic_score"),
    *("prompt_syntax", "clip_skip"),
)


@click.command()
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@click.option("--bundle", "-b", type=FOLDER, default=EMBEDDED, help=f"Bundle, or one of {', '.join(embedded())}.")
@click.option("--negative", "-n", help="What to keep out.")
@click.option(
    "--prompt-syntax",
    type=click.Choice(SYNTAXES),
    default=SYNTAXES[0],
    show_default=True,
    help="How prompts are read: as typed, or with the weights of A1111's web UI or of compel.",
)
@click.option("--clip-skip", type=click.IntRange(min=0), help="Layers of the text encoder to leave out at the end.")
@click.option(
    "--embedding",
    multiple=True,
    metavar="[NAME=]FILE",
    help="Textual inversion, a .safetensors file, and the word for it in prompts; repeatable.",
)
@click.option("--class-label", type=click.IntRange(min=0), help="Class, of models that were trained with classes.")
@click.option("--steps", "-s", type=int, help="Solver steps  [default: the model's own]")
@click.option("--solver", help="`latentrt solvers` lists them  [default: the bundle's own]")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the first picture; the next count up.")
@click.option("--guidance", "-g", type=float, help="Guidance scale; 1 for none  [default: the model's own]")
@click.option(
    "--image-guidance", type=float, help="How closely to stay to --image, of models that edit as told  [default: 1.5]"
)
@click.option("--size", help="WIDTHxHEIGHT in pixels  [default: the model's own, or that of --image]")
@click.option("--count", "-c", type=int, default=1, show_default=True, help="Pictures for each prompt.")
@click.option(
    "--output",
    "-o",
    help="File pattern; fields: {prompt} {seed} {index} {solver} {steps} and other settings  "
    "[default: {prompt}-{seed}; {model}-{seed} without a prompt]",
)
@click.option("--format", "-f", help="png, jpg or webp  [default: the pattern's suffix, or png]")
@click.option("--grid", type=FOLDER, help="Also write all pictures as one contact sheet.")
@click.option(
    "--preview-every",
    type=click.IntRange(min=0),
    default=0,
    help="Every N rows write the current and the predicted picture; with --grid, of all pictures too.",
)
@click.option(
    "--animate", type=FOLDER, help="Also write the denoising of all pictures as a GIF, WebP or PNG animation."
)
@click.option(
    "--animate-of",
    type=click.Choice([*KINDS, "both"]),
    default="both",
    show_default=True,
    help="What it shows: the current picture, the predicted one, or both side by side.",
)
@click.option(
    "--cache-interval",
    type=AT_LEAST_ONE,
    default=1,
    help="Compute only every Nth row in full, the others from its deep features: faster, and another picture.",
)
@click.option("--option", multiple=True, help="Any other setting, as eta=0.5 or use_karras_sigmas=true; repeatable.")
@click.option(
    "--lanes",
    type=AT_LEAST_ONE,
    help="Most lanes of a call; guidance takes two a picture  [default: 16; on a GPU the plan's]",
)
@edits_pictures
@controls_pictures
@shows_pictures
@names_loras
@runs_in_stages
@takes_loras
@decodes_pictures
@runs_networks
@option_json
def generate(prompts: tuple[str, ...], bundle: Path, lanes: int | None, as_json: bool, **asked: Any) -> None:
    """Draw pictures from prompts, from noise or from a given picture."""
    from latentrt.command.output import check_animation, check_folder, check_grid, with_suffix
    from latentrt.engine import Engine
    from latentrt.images.given import open_picture
    from latentrt.runtime.machine.memory import return_freed_pages

    loading = {name: asked.pop(name) for name in (*LOADING, *VAES, *LORAS, "refiner")}
    loading["control"] = controlnets_of(asked["controlnet"])
    loading["ip_adapter"] = controlnets_of(asked["ip_adapter_model"], "--ip-adapter-model")
    own, loading_loras = loras_of_options(*(asked.pop(name) for name in ADAPTERS))
    loading |= loading_loras
    if loading["refiner"] is not None and asked["handoff"] is None:
        asked["handoff"] = HANDOFF
    pattern = with_suffix(asked["output"] or ("{prompt}-{seed}" if prompts else "{model}-{seed}"), asked["format"])
    check_folder(pattern)
    check_grid(asked["grid"])
    check_animation(asked["animate"])
    if loading["preview_vae"] and not asked["preview_every"] and not asked["animate"]:
        raise RequestError("--preview-vae without previews", needed="--preview-every or --animate")
    settings = settings_of(asked) | {"lora": own}
    pictures = {name: open_picture(asked[name], deep=name == "depth") for name in PICTURES if asked[name]}
    return_freed_pages()
    with Engine.load(bundle, lanes=lanes, resident=False, **loading) as engine:
        jobs = engine.requests(prompts or (None,), settings, pictures)
        for option in ("negative", "negative_aesthetic_score"):
            if asked[option] and jobs[0].guidance.lanes == 1:
                name = option.replace("_", "-")
                print(f"note: --{name} has no effect with a --guidance of 1 or less", file=sys.stderr)
        kinds = KINDS if asked["animate_of"] == "both" else (asked["animate_of"],)
        paths, watch = _draw(
            engine, jobs, pattern, asked["grid"], Asked(asked["preview_every"], asked["animate"], kinds), quiet=as_json
        )
    _tell(jobs, paths, asked["grid"], asked["animate"], watch.files, as_json=as_json)


def loras_of_options(
    rank: int | None, folder: Path | None, names: Sequence[str]
) -> tuple[dict[str, tuple[float, float]], dict[str, Any]]:
    """Return the LoRAs of every picture by name, with their strengths, and how the engine is loaded.

    Raises:
        RequestError: one stands twice, or its strength is no number; or there is no folder.
    """
    from latentrt.adapters.given import parsed

    if folder is None:
        if rank is not None or names:
            option = "--lora-name" if names else "--lora-rank"
            raise RequestError(f"{option} without --lora-dir", needed="a folder of LoRAs")
        return {}, {}
    given = [parsed(text) for text in names]
    strengths = {str(lora.path): (lora.unet, lora.text) for lora in given}
    if len(strengths) < len(given):
        raise RequestError(f"--lora-name is {' and '.join(names)}", needed="each LoRA once")
    return strengths, {"adapters": folder} | ({} if rank is None else {"adapter_rank": rank})


def settings_of(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a request, by the names that `Request` has for them."""
    width, height = (None, None) if asked["size"] is None else parse_size(asked["size"], "--size")
    own = {name: asked[name] for name in SETTINGS}
    own |= {"negative_prompt": asked["negative"], "width": width, "height": height}
    if asked["embedding"]:
        from latentrt.model.prompts.embeddings import embeddings_of

        own["embeddings"] = embeddings_of(asked["embedding"])
    if asked["guess"] and not asked["control"]:
        raise RequestError("--guess without a --control", needed="one or more")
    own["control"] = controls_of(asked["control"], guess=asked["guess"])
    own["ip_adapter"] = image_prompts_of(asked["ip_adapter"])
    return own | options_of(asked["option"])


def _draw(
    engine: Engine, jobs: list[Job], pattern: str, sheet: Path | None, asked: Asked, *, quiet: bool
) -> tuple[list[Path], Watch]:
    """Run jobs and write each picture as soon as it is done: an interrupt must not lose it."""
    from latentrt.command.output import check_distinct, check_writable
    from latentrt.images.files import output_path, save

    paths = [output_path(pattern, job.tag) for job in jobs]
    watch = Watch(engine, jobs, paths, sheet, asked)
    check_distinct([*paths, *watch.files, *([sheet] if sheet else [])])
    for path in [*paths, *watch.files]:
        check_writable(path)
    where = dict(zip(jobs, paths, strict=True))
    images: dict[Job, Image] = {}
    with progress(jobs, quiet=quiet) as tick:

        def on_tick(job: Job) -> None:
            tick(job)
            watch(job)
            if job.done and job.error is None and job not in images:
                ready = [each for each in jobs if each.done and each.error is None and each not in images]
                # The denoiser stays: other jobs wait for it.
                alone = (engine.decode(each.latents, each.overlay) for each in ready)
                for done, image in zip(ready, engine.pictures(ready) if jobs[-1].done else alone, strict=True):
                    images[done] = image
                    save(image, where[done], settings=done.tag)

        engine.run(jobs, on_tick)
    watch.finish()
    if sheet is not None:
        _save_sheet(jobs, [images[job] for job in jobs], sheet)
    return paths, watch


def _save_sheet(jobs: Sequence[Job], images: Sequence[Image], path: Path) -> None:
    from latentrt.images.files import save
    from latentrt.images.sheet import grid

    captions = [job.tag["prompt"] for job in jobs if "prompt" in job.tag]
    shared = {name: value for name, value in jobs[0].tag.items() if all(job.tag.get(name) == value for job in jobs)}
    prompts = "; ".join(dict.fromkeys(captions))
    save(grid(images, captions=captions), path, settings={**shared, **({"prompt": prompts} if captions else {})})


def _tell(
    jobs: list[Job], paths: list[Path], sheet: Path | None, animation: Path | None, shown: list[Path], *, as_json: bool
) -> None:
    """Print what was written."""
    if as_json:
        pictures = [{**job.tag, "path": str(path)} for job, path in zip(jobs, paths, strict=True)]
        previews = [str(path) for path in shown if path != animation]
        made = {"pictures": pictures, "grid": sheet and str(sheet), "previews": previews}
        print(json.dumps({**made, "animation": animation and str(animation)}, ensure_ascii=False))
    else:
        for path in [*paths, *(path for path in (sheet, animation) if path)]:
            print(path)


def options_of(pairs: tuple[str, ...]) -> dict[str, Any]:
    """Return KEY=VALUE pairs as a dict; a value is JSON where it can be, else text."""
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
