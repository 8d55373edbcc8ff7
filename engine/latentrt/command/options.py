"""Options and kinds of values that verbs of the command share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from latentrt.bundle.bundle import EMBEDDED
from latentrt.request import FILLS, HIRES_STRENGTH, RESIZES

Verb = Callable[..., None]
FOLDER = click.Path(path_type=Path)
AT_LEAST_ONE = click.IntRange(min=1)
argument_bundle = click.argument("bundle", type=FOLDER, default=EMBEDDED, required=False)
option_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")


LOADING = ("cache", "spin", "threads", "plans", "precision", "device", "backend")  # options of `runs_networks`


def runs_networks(verb: Verb) -> Verb:
    """Add the options of verbs that run networks; their names are those of `Engine.load`."""
    for option in (
        click.option(
            "--cache/--no-cache",
            default=True,
            show_default=True,
            help="Keep graphs that are optimized for this CPU in your cache, for quicker loading.",
        ),
        click.option(
            "--spin/--no-spin",
            default=True,
            show_default=True,
            help="CPU threads wait for each other by spinning: quicker, but not where others use the cores.",
        ),
        click.option(
            "--threads",
            type=AT_LEAST_ONE,
            help="CPU threads of a network call  [default: the cores that it may use]",
        ),
        click.option("--plans", type=FOLDER, help="Folder of TensorRT plans that you trust  [default: in your cache]"),
        click.option(
            "--precision",
            type=click.Choice(["fp32", "fp16", "int8"]),
            help="Of the graphs  [default: fp16 for TensorRT and cuda, fp32 for others]",
        ),
        click.option(
            "--device",
            help="cpu, cuda or cuda:1; cpu, gpu or npu of openvino  [default: cpu; cuda for TensorRT]",
        ),
        click.option(
            "--backend",
            default="onnxruntime",
            show_default=True,
            help="onnxruntime or openvino; tensorrt, tensorrt-rtx or tensorrt-lean run what `latentrt build` made.",
        ),
    ):
        verb = option(verb)
    return verb


VAES = ("tile", "preview_vae", "vae")  # options of `decodes_pictures`


def decodes_pictures(verb: Verb) -> Verb:
    """Add the options of how pictures are decoded; their names are those of `Engine.load`."""
    for option in (
        click.option(
            "--tile",
            type=AT_LEAST_ONE,
            help="Decode and encode pictures with a longer side in overlapping tiles of so many pixels: less memory.",
        ),
        click.option("--preview-vae", type=FOLDER, help="Bundle whose decoder makes the previews."),
        click.option("--vae", type=FOLDER, help="Bundle whose VAE takes the place of the model's."),
    ):
        verb = option(verb)
    return verb


def shows_pictures(verb: Verb) -> Verb:
    """Add the options of IP-Adapters."""
    for option in (
        click.option(
            "--ip-adapter",
            multiple=True,
            metavar="NAME=PICTURE[:SCALE]",
            help="Picture that an --ip-adapter-model shows the model, and how strongly; repeatable.",
        ),
        click.option(
            "--ip-adapter-model", multiple=True, metavar="NAME=BUNDLE", help="IP-Adapter, by a name; repeatable."
        ),
    ):
        verb = option(verb)
    return verb


ADAPTERS = ("lora_rank", "lora_dir", "lora_name")  # options of `names_loras`


def names_loras(verb: Verb) -> Verb:
    """Add the options of LoRAs that pictures name."""
    for option in (
        click.option(
            "--lora-rank", type=AT_LEAST_ONE, help="Largest rank of a picture's LoRAs together  [default: 64]"
        ),
        click.option("--lora-dir", type=FOLDER, help="Folder of LoRAs that --lora-name, and prompts, may name."),
        click.option(
            "--lora-name",
            multiple=True,
            metavar="NAME[:STRENGTH[:TEXT]]",
            help="LoRA of --lora-dir, and how much of it: 0.8, or 0.8:0.5 of the UNet and of the text encoders; "
            "repeatable.",
        ),
    ):
        verb = option(verb)
    return verb


def controls_pictures(verb: Verb) -> Verb:
    """Add the options of ControlNets and T2I-Adapters."""
    for option in (
        click.option(
            "--guess", is_flag=True, help="Every --control acts on the lane with the prompt alone: guess mode."
        ),
        click.option(
            "--control",
            multiple=True,
            metavar="NAME[@TYPE]=PICTURE[:SCALE[:START:END]]",
            help="Picture that a --controlnet follows, how strongly, and in which part of the run; repeatable. TYPE is "
            "of a ControlNet Union: union@canny, or its number.",
        ),
        click.option(
            "--controlnet",
            multiple=True,
            metavar="NAME=BUNDLE",
            help="ControlNet or T2I-Adapter, by a name; repeatable.",
        ),
    ):
        verb = option(verb)
    return verb


def edits_pictures(verb: Verb) -> Verb:
    """Add the options of a verb that may begin on an existing picture."""
    for option in (
        click.option("--mask-fill", type=click.Choice(FILLS), default="original", help="What the run begins on there."),
        click.option("--mask-crop", type=int, help="Draw the mask's surroundings alone, padded by so many pixels."),
        click.option("--mask-blur", type=float, default=0.0, help="How soft its edge is, in pixels."),
        click.option(
            "--resize",
            type=click.Choice(RESIZES),
            default="stretch",
            help="How the --image is brought to the --size; crop and fill keep its proportions.",
        ),
        click.option("--mask", type=FOLDER, help="What of it to repaint: white; as large as the picture."),
        click.option(
            "--strength",
            type=float,
            help="How much of the run is made on it, above 0 to 1  [default: 0.8; 1 with a --mask]",
        ),
        click.option("--depth", type=FOLDER, help="Its depth map, of models that draw by depth: grey, near is white."),
        click.option("--image", type=FOLDER, help="Picture to begin on, or to enlarge."),
        click.option(
            "--noise-level",
            type=int,
            help="Noise that a model that enlarges pictures adds to them first  [default: 20]",
        ),
        click.option(
            "--negative-aesthetic-score", type=float, help="The score to keep away from, for the same  [default: 2.5]"
        ),
        click.option(
            "--aesthetic-score", type=float, help="How good a picture SDXL's refiner is told to draw  [default: 6]"
        ),
    ):
        verb = option(verb)
    return verb


def runs_in_stages(verb: Verb) -> Verb:
    """Add the options of runs that go on in another size, or with another model."""
    for option in (
        click.option(
            "--hires-strength",
            type=click.FloatRange(0, 1, min_open=True),
            default=HIRES_STRENGTH,
            show_default=True,
            help="How much of the second run is made.",
        ),
        click.option("--hires-steps", type=AT_LEAST_ONE, help="Steps of the second run  [default: as of the first]"),
        click.option("--hires-scale", type=float, help="Enlarge the latents by this, 2 say, and draw on (hires fix)."),
        click.option("--handoff", type=float, help="Part of the run after which it takes over  [default: 0.8]"),
        click.option("--refiner", type=FOLDER, help="Bundle of a model that draws the last part of the run."),
    ):
        verb = option(verb)
    return verb


LORAS = ("allow_unmatched", "lora")  # options of `takes_loras`


def takes_loras(verb: Verb) -> Verb:
    """Add the options of LoRAs that are merged; their names are those of `Engine.load`."""
    for option in (
        click.option("--allow-unmatched", is_flag=True, help="Leave out keys of LoRAs that have no place."),
        click.option(
            "--lora",
            multiple=True,
            metavar="FILE[:STRENGTH[:TEXT]]",
            help="LoRA to merge, and how much of it: 0.8, or 0.8:0.5 of the UNet and of the text encoders; repeatable.",
        ),
    ):
        verb = option(verb)
    return verb


def options_single(verb: Verb) -> Verb:
    """Add what a user decides about a checkpoint; the names are those of `latentrt_export`'s `Choices`."""
    for option in (
        click.option("--vae", type=FOLDER, help="Folder or file of the VAE to take instead of the checkpoint's."),
        click.option("--ema", is_flag=True, help="Take a single file's averaged weights."),
        click.option(
            "--prediction-type", help="What a single file's UNet predicts: epsilon or v_prediction  [default: by rules]"
        ),
        click.option(
            "--model", help="What a single file is: sd1, sd2, xl or xl-refiner  [default: by its text encoders]"
        ),
    ):
        verb = option(verb)
    return takes_loras(verb)
