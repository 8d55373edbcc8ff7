"""`latentrt build`: its options; `build_cli` of the export side does the work. Needs the extra `build` and no torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from latentrt.bundle.bundle import EMBEDDED

FOLDER = click.Path(path_type=Path)


@click.command()
@click.argument("bundle", type=FOLDER, default=EMBEDDED, required=False)
@click.option("--network", "networks", multiple=True, help="Build this one alone; repeatable  [default: all]")
@click.option("--lanes", help="Lanes of the UNet, as 2 or 2:8:16 (least:best:most); a picture takes two  [default: 2]")
@click.option("--pictures", help="Pictures that the VAE decodes at once  [default: 1]")
@click.option("--size", help="WIDTHxHEIGHT, or least:best:most of them  [default: the model's own]")
@click.option("--tokens", help="Tokens of a text, as 77, or 77:77:231 for up to three chunks  [default: one chunk]")
@click.option(
    "--controlnet",
    "controlnets",
    multiple=True,
    metavar="NAME=BUNDLE",
    help="ControlNet or T2I-Adapter to build for as well, with the UNet that reads what it gives; repeatable.",
)
@click.option(
    "--lora-rank",
    metavar="RANK",
    help="Build the networks that take LoRAs of each request, of so many ranks together: the engine's --lora-rank.",
)
@click.option(
    "--profile",
    "profiles",
    multiple=True,
    help='Shapes of one of several profiles, as "lanes=2,size=512x512"; what it leaves out is as above. Repeatable.',
)
@click.option("--precision", type=click.Choice(["fp16", "fp32"]), default="fp16", show_default=True)
@click.option("--library", default="tensorrt", show_default=True, help="tensorrt or tensorrt-rtx.")
@click.option("--device", default="cuda", show_default=True, help="cuda, or cuda:1 for the second GPU.")
@click.option("--compute-capability", help="Build ahead of time for other GPUs, as 8.9 (tensorrt-rtx alone).")
@click.option(
    "--workspace", type=click.FloatRange(min=0, min_open=True), help="Most GiB of memory that a tactic may take."
)
@click.option(
    "--strip", is_flag=True, help="Leave the weights out; they are read from the bundle when a plan is loaded."
)
@click.option("--refittable", is_flag=True, help="Let weights be replaced in a loaded plan; slower.")
@click.option("--version-compatible", is_flag=True, help="For the lean runtime of the same version too; slower.")
@click.option(
    "--optimization-level",
    type=click.IntRange(0, 5),
    metavar="N",
    help="How long TensorRT looks for fast kernels, 0 to 5 (tensorrt alone)  [default: TensorRT's own, 3]",
)
@click.option("--plans", type=FOLDER, help="Folder for the plans, outside of bundles  [default: in your cache]")
@click.option("--rebuild", is_flag=True, help="Also build plans that exist already.")
@click.option("--ignore-estimate", is_flag=True, help="Build even where memory or disk seem too small.")
@click.option("--dry-run", is_flag=True, help="Show the estimate, and build nothing.")
@click.option("--check", is_flag=True, help="List the nodes that the parser refuses; exit code 1 if there are any.")
@click.option("--list", "list_plans", is_flag=True, help="List the plans in the folder.")
@click.option("--remove", metavar="PLAN", multiple=True, help="Remove a plan, by its name in --list; repeatable.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def build(bundle: Path, **asked: Any) -> None:
    """Build TensorRT plans from BUNDLE for this machine's GPU.

    Plans are native code: they lie in your own cache folder, or in --plans. Existing plans are left alone, so a
    build that was stopped continues. Needs the extra `build`.
    """
    from latentrt_export.plans.build_cli import run_build

    sys.exit(run_build(bundle, **asked))
