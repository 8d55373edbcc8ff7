"""ControlNets in LDM's names or diffusers': the config from the shapes, and the place of every weight."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from latentrt.errors import ExportError
from latentrt_export.checkpoint.single.pieces import Config, Piece, Shapes, both, count, heads_of, size
from latentrt_export.checkpoint.single.unet import (
    CROSS_DOWN,
    CROSS_MIDDLE,
    DOWN,
    depths_of,
    down_pieces,
    levels_of,
    middle_pieces,
    spread,
)

CONTROLNET = "ControlNet"
HEADS = 8  # of every block of Stable Diffusion 1; others have one for each 64 channels
SIZES, LABELS = 256, 2816  # channels of each of SDXL's six sizes, and of these with the pooled text
FIRST = "controlnet_cond_embedding.conv_in.weight"  # a name of diffusers'


class Block(NamedTuple):
    """The names of a resnet's last weight, and of the transformer after it."""

    resnet: str
    attention: str


class Names(NamedTuple):
    """The names of one layout from which a config is read, without ".weight"."""

    conv: str
    hint: str
    middle: str
    labels: str
    blocks: list[list[Block]]


def control_config(shapes: Shapes, model: str | None) -> Config:
    """Return a ControlNetModel's config by its shapes.

    Args:
        shapes: by LDM's names ("input_hint_block.0.weight", ...), without a prefix, or diffusers'.
        model: the user's word, "sd1", "sd2" or "xl"; None: linear projections are of SD 2 or XL.

    Raises:
        ExportError: a weight is missing from which the config is read, or has another shape.
    """
    names = _names(shapes)
    channels = [size(shapes, level[0].resnet, 0, CONTROLNET) for level in names.blocks]
    rows = [[_depth(shapes, block.attention) for block in level] for level in names.blocks]
    if any(len(set(row)) > 1 for row in rows):
        raise ExportError(f"the ControlNet has transformers of {rows} layers", needed="as many throughout each block")
    middle = _depth(shapes, names.middle)
    attends = [block.attention for level in names.blocks for block in level if _depth(shapes, block.attention)]
    attends += [names.middle] if middle else []
    linear = bool(attends) and len(shapes.get(f"{attends[0]}.proj_in.weight", ())) == 2
    heads = model == "sd1" if model else not linear
    config: Config = {
        "in_channels": size(shapes, f"{names.conv}.weight", 1, CONTROLNET),
        "conditioning_channels": size(shapes, f"{names.hint}.weight", 1, CONTROLNET),
        "conditioning_embedding_out_channels": _hints(shapes),
        "block_out_channels": channels,
        "layers_per_block": len(rows[0]),
        "down_block_types": [CROSS_DOWN if any(row) else DOWN for row in rows],
        "mid_block_type": CROSS_MIDDLE if middle else "UNetMidBlock2D",
        "attention_head_dim": HEADS if heads or not attends else [heads_of(width, CONTROLNET) for width in channels],
        "use_linear_projection": linear,
        **depths_of(rows, [], middle),
    }
    if attends:
        text = f"{attends[0]}.transformer_blocks.0.attn2.to_k.weight"
        config["cross_attention_dim"] = size(shapes, text, 1, CONTROLNET)
    if f"{names.labels}.weight" in shapes:
        config |= _labels(size(shapes, f"{names.labels}.weight", 1, CONTROLNET))
    return config


def control_pieces(config: Config, shapes: Shapes) -> list[Piece]:
    """Return every weight of a ControlNet with this config, as the file names it and as diffusers does."""
    pieces = list(_pieces(config))
    if FIRST in shapes:
        return [Piece(piece.name, piece.name, piece.shape) for piece in pieces]
    return pieces


def _names(shapes: Shapes) -> Names:
    """Return the names of the file's layout. Raise ExportError where blocks have other numbers of resnets."""
    if FIRST not in shapes:
        levels = levels_of(shapes)
        blocks = [
            [Block(f"input_blocks.{i}.0.out_layers.3.weight", f"input_blocks.{i}.1") for i in one] for one in levels
        ]
        return Names("input_blocks.0.0", "input_hint_block.0", "middle_block.1", "label_emb.0.0", blocks)
    homes = [f"down_blocks.{i}" for i in range(max(1, count(shapes, "down_blocks")))]
    layers = [max(1, count(shapes, f"{home}.resnets")) for home in homes]
    if len(set(layers)) > 1:
        raise ExportError(f"the ControlNet has {layers} resnets in its blocks", needed="as many in each")
    blocks = [
        [Block(f"{home}.resnets.{j}.conv2.weight", f"{home}.attentions.{j}") for j in range(layers[0])]
        for home in homes
    ]
    middle = "mid_block.attentions.0"
    return Names("conv_in", FIRST.removesuffix(".weight"), middle, "add_embedding.linear_1", blocks)


def _depth(shapes: Shapes, attention: str) -> int:
    return count(shapes, f"{attention}.transformer_blocks")


def _hints(shapes: Shapes) -> list[int]:
    """Return the channels of the hint's embedding: of the first convolution, then of each that halves the sides."""
    if FIRST in shapes:
        home = "controlnet_cond_embedding.blocks"
        names = [FIRST, *(f"{home}.{i}.weight" for i in range(count(shapes, home)))]
    else:
        every = (f"input_hint_block.{i}.weight" for i in itertools.count(0, 2))
        names = list(itertools.takewhile(shapes.__contains__, every))[:-1] or ["input_hint_block.2.weight"]
    return [size(shapes, name, 0, CONTROLNET) for name in names[::2]]


def _labels(width: int) -> Config:
    """Return what of SDXL's config its label embedding shows. Raise ExportError where it is another."""
    if width != LABELS:
        raise ExportError(f"the ControlNet has a label embedding of {width} channels", needed=f"{LABELS}, as SDXL's")
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": SIZES,
        "projection_class_embeddings_input_dim": width,
    }


def _pieces(config: Config) -> Iterator[Piece]:
    channels = config["block_out_channels"]
    first, times = channels[0], 4 * channels[0]
    yield from both("time_embed.0", "time_embedding.linear_1", times, first)
    yield from both("time_embed.2", "time_embedding.linear_2", times, times)
    yield from both("input_blocks.0.0", "conv_in", first, config["in_channels"], 3, 3)
    if width := config.get("projection_class_embeddings_input_dim"):
        yield from both("label_emb.0.0", "add_embedding.linear_1", times, width)
        yield from both("label_emb.0.2", "add_embedding.linear_2", times, times)
    yield from _hint_pieces(config)
    depth = config["transformer_layers_per_block"]
    depths = depth if isinstance(depth, list) else [depth] * len(channels)
    skips: list[int] = []
    yield from down_pieces(config, spread(depths, config["down_block_types"], config["layers_per_block"]), skips)
    yield from middle_pieces(config)
    for i, width in enumerate(skips):
        yield from both(f"zero_convs.{i}.0", f"controlnet_down_blocks.{i}", width, width, 1, 1)
    yield from both("middle_block_out.0", "controlnet_mid_block", channels[-1], channels[-1], 1, 1)


def _hint_pieces(config: Config) -> Iterator[Piece]:
    """Yield the hint's embedding: LDM counts the activations between its convolutions, too."""
    widths, home = config["conditioning_embedding_out_channels"], "controlnet_cond_embedding"
    sizes = [(widths[0], config["conditioning_channels"])]
    for here, there in itertools.pairwise(widths):
        sizes += [(here, here), (there, here)]
    names = ["conv_in", *(f"blocks.{i}" for i in range(len(sizes) - 1)), "conv_out"]
    sizes.append((config["block_out_channels"][0], widths[-1]))
    for i, (name, (out, wide)) in enumerate(zip(names, sizes, strict=True)):
        yield from both(f"input_hint_block.{2 * i}", f"{home}.{name}", out, wide, 3, 3)
