"""From a ControlNet as a single file to a diffusers folder."""

from __future__ import annotations

import re
from pathlib import Path

from latentrt.bundle.tensors import Tensors
from latentrt.errors import ExportError
from latentrt_export.checkpoint.configs import write_json
from latentrt_export.checkpoint.lone_control import KIND, PART
from latentrt_export.checkpoint.lone_vae import CONFIG
from latentrt_export.checkpoint.single.choices import Choices
from latentrt_export.checkpoint.single.controlnet.network import FIRST, control_config, control_pieces
from latentrt_export.checkpoint.single.leftovers import Part, leftovers
from latentrt_export.checkpoint.single.pieces import Config, Network, Shapes, prefixed, without
from latentrt_export.checkpoint.single.write import check_weights, write_weights

PREFIX = "control_model."
ONE = rf"^(?:{re.escape(PREFIX)})?(?:input_hint_block|zero_convs|controlnet_cond_embedding|controlnet_down_blocks)\."
NEEDED = "a ControlNet's own weights"
OTHERS = (  # kinds of ControlNets that are refused by name: what, names of tensors, what to do
    ("a ControlNet as differences from a base's weights", r"^difference$", "get the whole ControlNet"),
    ("a Control-LoRA", r"^lora_controlnet$|\.(?:down|up)$", "get the whole ControlNet"),
    (
        "a ControlNet Union",
        r"^(?:task_embedding$|control_add_embedding\.|transformer_layes\.)",
        "export its whole folder",
    ),
    ("a ControlNet of a video model", r"\.(?:motion_modules|time_stack)\.", ""),
)
SD2, SD1 = 1024, 768  # numbers of the texts that they read


def is_controlnet(shapes: Shapes) -> bool:
    """Return whether a file is a ControlNet, or a whole model that has one."""
    return any(re.search(ONE, name) for name in shapes)


def make_controlnet(tensors: Tensors, folder: Path, choices: Choices) -> tuple[str, ...]:
    """Write a diffusers folder with the ControlNet of a single file, in its dtypes, tensor by tensor.

    Args:
        tensors: a file of which `is_controlnet` is true, in LDM's names, with "control_model." or without, or
            diffusers'.
        folder: where it goes; made if missing.
        choices: what the user decides.

    Returns:
        What the file is and by which rules, as lines to show.

    Raises:
        ExportError: as of `understand`; nothing was written then.
        OSError: the folder cannot be written.
    """
    network, notes = understand(tensors, choices)
    write_weights(folder / "diffusion_pytorch_model.safetensors", tensors, network.pieces)
    write_json(folder / CONFIG, {"_class_name": KIND, **network.config})
    return notes


def understand(tensors: Tensors, choices: Choices) -> tuple[Network, tuple[str, ...]]:
    """Return the ControlNet of a file by its header, every weight in its place, and lines to show.

    Raises:
        ExportError: it is another kind of ControlNet, lacks weights or has others; or an option is for models.
    """
    _check_choices(choices)
    for what, pattern, fix in OTHERS:
        if any(re.search(pattern, name) for name in tensors.shapes):
            raise ExportError(f"the single file is {what}", needed=NEEDED, fix=fix)
    prefix = PREFIX if any(name.startswith(PREFIX) for name in tensors.shapes) else ""
    shapes = without(prefix, tensors.shapes)
    config = control_config(shapes, choices.model)
    network = Network(KIND, config, prefixed(prefix, control_pieces(config, shapes)))
    check_weights({PART: tensors}, {PART: network})
    placed = [piece.source for piece in network.pieces]
    left = leftovers(tensors.entries, placed, [Part(prefix)], "a ControlNet")
    return network, (_told(config, FIRST in shapes, choices), *left)


def _check_choices(choices: Choices) -> None:
    """Refuse options that a ControlNet does not have. Raise ExportError."""
    own = f"--model={choices.model}"
    given = [option for option in choices.options if option != own]
    if given:
        option = given[0].partition("=")[0]
        raise ExportError(f"{option} with a ControlNet", needed="a model", fix=f"leave out {option}")


def _told(config: Config, diffusers: bool, choices: Choices) -> str:
    """Return what the ControlNet is for, by the texts that it reads."""
    width = config.get("cross_attention_dim")
    by_text = {SD1: "Stable Diffusion 1", SD2: "Stable Diffusion 2"}
    xl = "addition_embed_type" in config
    family = "Stable Diffusion XL" if xl else by_text.get(width or 0, "Stable Diffusion")
    rule = "by --model" if choices.model else f"cross-attention width {width}" if width else "without attention"
    return f"ControlNet of {family} in {'diffusers' if diffusers else 'LDM'}'s names ({rule})"
