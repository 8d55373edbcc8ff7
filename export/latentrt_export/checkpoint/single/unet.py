"""UNets in LDM's names: the diffusers config from the shapes, and the place of every weight."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from latentrt.errors import ExportError
from latentrt_export.checkpoint.single.pieces import Config, Piece, Shapes, both, count, heads_of, size

UNET = "UNet"
CROSS_DOWN, CROSS_UP, DOWN, UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D", "DownBlock2D", "UpBlock2D"
CROSS_MIDDLE = "UNetMidBlock2DCrossAttn"
GUIDANCE = "time_embed.cond_proj.weight"  # of LCM and TCD distilled UNets
LAYER_0, TO_K = ".transformer_blocks.0", ".attn2.to_k.weight"
Rows = list[list[int]]  # transformer layers after each resnet of each block


def unet_config(shapes: Shapes, heads: int | None) -> Config:
    """Return what of a UNet2DConditionModel's config its shapes show.

    Args:
        shapes: by LDM's names ("input_blocks.0.0.weight", ...).
        heads: attention heads of every block; None: one for each 64 channels.

    Raises:
        ExportError: a weight is missing from which the config is read.
    """
    levels = levels_of(shapes)
    layers = len(levels[0])
    channels = [size(shapes, f"input_blocks.{level[0]}.0.out_layers.3.weight", 0, UNET) for level in levels]
    down = [[_depth(shapes, f"input_blocks.{i}.1") for i in level] for level in levels]
    outputs = range(len(levels) * (layers + 1))
    up = [[_depth(shapes, f"output_blocks.{i + j}.1") for j in range(layers + 1)] for i in outputs[:: layers + 1]]
    attention = min((name for name in shapes if name.endswith(TO_K)), default=f"input_blocks.1.1{LAYER_0}{TO_K}")
    linear = f"{attention.partition('.transformer_blocks.')[0]}.proj_in.weight"
    config: Config = {
        "in_channels": size(shapes, "input_blocks.0.0.weight", 1, UNET),
        "out_channels": size(shapes, "out.2.weight", 0, UNET),
        "block_out_channels": channels,
        "layers_per_block": layers,
        "down_block_types": [CROSS_DOWN if any(row) else DOWN for row in down],
        "up_block_types": [CROSS_UP if any(row) else UP for row in up],
        "attention_head_dim": heads or [heads_of(width, UNET) for width in channels],
        "cross_attention_dim": size(shapes, attention, 1, UNET),
        "use_linear_projection": len(shapes.get(linear, ())) == 2,
        **depths_of(down, up, _depth(shapes, "middle_block.1")),
    }
    if not _depth(shapes, "middle_block.1"):
        config["mid_block_type"] = "UNetMidBlock2D" if "middle_block.0.in_layers.2.weight" in shapes else None
    if GUIDANCE in shapes:
        config["time_cond_proj_dim"] = size(shapes, GUIDANCE, 1, UNET)
    if "label_emb.0.0.weight" in shapes:
        config["projection_class_embeddings_input_dim"] = size(shapes, "label_emb.0.0.weight", 1, UNET)
    return config


def unet_pieces(config: Config) -> list[Piece]:
    """Return every weight of a UNet with this config, as LDM names it and as diffusers does."""
    channels = config["block_out_channels"]
    times = 4 * channels[0]
    pieces = [
        *both("time_embed.0", "time_embedding.linear_1", times, channels[0]),
        *both("time_embed.2", "time_embedding.linear_2", times, times),
        *both("input_blocks.0.0", "conv_in", channels[0], config["in_channels"], 3, 3),
        *both("out.0", "conv_norm_out", channels[0]),
        *both("out.2", "conv_out", config["out_channels"], channels[0], 3, 3),
    ]
    if width := config.get("time_cond_proj_dim"):
        pieces.append(Piece(GUIDANCE, "time_embedding.cond_proj.weight", (channels[0], width)))
    if width := config.get("projection_class_embeddings_input_dim"):
        pieces += both("label_emb.0.0", "add_embedding.linear_1", times, width)
        pieces += both("label_emb.0.2", "add_embedding.linear_2", times, times)
    down, up = _rows(config)
    skips: list[int] = []
    pieces += down_pieces(config, down, skips)
    pieces += middle_pieces(config)
    return [*pieces, *_up(config, up, times, skips)]


def levels_of(shapes: Shapes) -> list[list[int]]:
    """Return the numbers of the input blocks with a resnet, by resolution: as many for each."""
    levels: list[list[int]] = [[]]
    for i in itertools.count(1):
        if f"input_blocks.{i}.0.op.weight" in shapes:
            levels.append([])
        elif f"input_blocks.{i}.0.in_layers.2.weight" in shapes:
            levels[-1].append(i)
        else:
            break
    levels = [level for level in levels if level] or [[1]]
    if len({len(level) for level in levels}) > 1:
        found = ", ".join(str(len(level)) for level in levels)
        raise ExportError(f"the UNet has {found} resnets in its blocks down", needed="as many in each")
    return levels


def _depth(shapes: Shapes, block: str) -> int:
    return count(shapes, f"{block}.transformer_blocks")


def depths_of(down: Rows, up: Rows, middle: int) -> Config:
    """Return how many transformer layers follow each resnet, as the config says it; `up` is empty without that way.

    Published models have as many throughout a block, and as many up as down; distilled ones may not (SSD-1B).
    """
    blocks = [row[0] for row in down]
    if down != _alike(blocks, down) or (up and up != _alike(blocks[::-1], up)):
        ways = {"transformer_layers_per_block": down, "reverse_transformer_layers_per_block": up}
        return {key: [row if len(set(row)) > 1 else row[0] or 1 for row in rows] for key, rows in ways.items()}
    blocks[-1] = blocks[-1] or middle  # the middle's, in a config
    used = {depth for depth in (*blocks, middle) if depth}
    if len(used) < 2:
        return {"transformer_layers_per_block": max(used, default=1)}
    return {"transformer_layers_per_block": [depth or 1 for depth in blocks]}


def _alike(blocks: list[int], rows: Rows) -> Rows:
    return [[depth] * len(row) for depth, row in zip(blocks, rows, strict=True)]


def _rows(config: Config) -> tuple[Rows, Rows]:
    """Return the transformer layers after each resnet, on both ways; nothing for blocks without attention."""
    depth, layers = config["transformer_layers_per_block"], config["layers_per_block"]
    down = depth if isinstance(depth, list) else [depth] * len(config["down_block_types"])
    up = config.get("reverse_transformer_layers_per_block", down[::-1])
    return spread(down, config["down_block_types"], layers), spread(up, config["up_block_types"], layers + 1)


def spread(depths: list[int | list[int]], kinds: list[str], layers: int) -> Rows:
    rows = [depth if isinstance(depth, list) else [depth] * layers for depth in depths]
    return [row if kind in (CROSS_DOWN, CROSS_UP) else [] for row, kind in zip(rows, kinds, strict=True)]


def down_pieces(config: Config, rows: Rows, skips: list[int]) -> Iterator[Piece]:
    """Yield the weights on the way down.

    Args:
        config: of the network.
        rows: transformer layers after each resnet of each block; nothing for blocks without attention.
        skips: the channels of what the way up will read beside its own are appended.
    """
    channels = config["block_out_channels"]
    here, i, times = channels[0], 1, 4 * channels[0]
    skips.append(here)
    for level, (width, row) in enumerate(zip(channels, rows, strict=True)):
        block = f"down_blocks.{level}"
        for layer in range(config["layers_per_block"]):
            yield from _resnet(f"input_blocks.{i}.0", f"{block}.resnets.{layer}", here, width, times)
            if row:
                yield from _transformer(f"input_blocks.{i}.1", f"{block}.attentions.{layer}", width, row[layer], config)
            here, i = width, i + 1
            skips.append(width)
        if level < len(channels) - 1:
            yield from both(f"input_blocks.{i}.0.op", f"{block}.downsamplers.0.conv", width, width, 3, 3)
            i += 1
            skips.append(width)


def middle_pieces(config: Config) -> Iterator[Piece]:
    """Yield the weights of the middle."""
    width, kind = config["block_out_channels"][-1], config.get("mid_block_type", CROSS_MIDDLE)
    times = 4 * config["block_out_channels"][0]
    if kind:
        yield from _resnet("middle_block.0", "mid_block.resnets.0", width, width, times)
    if kind == CROSS_MIDDLE:
        depth = config["transformer_layers_per_block"]
        depth = depth[-1] if isinstance(depth, list) else depth
        depth = depth[0] if isinstance(depth, list) else depth
        yield from _transformer("middle_block.1", "mid_block.attentions.0", width, depth, config)
        yield from _resnet("middle_block.2", "mid_block.resnets.1", width, width, times)


def _up(config: Config, rows: Rows, times: int, skips: list[int]) -> Iterator[Piece]:
    channels = config["block_out_channels"][::-1]
    here, i = channels[0], 0
    for level, (width, row) in enumerate(zip(channels, rows, strict=True)):
        block = f"up_blocks.{level}"
        for layer in range(config["layers_per_block"] + 1):
            yield from _resnet(f"output_blocks.{i}.0", f"{block}.resnets.{layer}", here + skips.pop(), width, times)
            if row:
                yield from _transformer(
                    f"output_blocks.{i}.1", f"{block}.attentions.{layer}", width, row[layer], config
                )
            here, i = width, i + 1
        if level < len(channels) - 1:
            place = f"output_blocks.{i - 1}.{2 if row else 1}.conv"
            yield from both(place, f"{block}.upsamplers.0.conv", width, width, 3, 3)


def _resnet(source: str, name: str, wide: int, width: int, times: int) -> Iterator[Piece]:
    yield from both(f"{source}.in_layers.0", f"{name}.norm1", wide)
    yield from both(f"{source}.in_layers.2", f"{name}.conv1", width, wide, 3, 3)
    yield from both(f"{source}.emb_layers.1", f"{name}.time_emb_proj", width, times)
    yield from both(f"{source}.out_layers.0", f"{name}.norm2", width)
    yield from both(f"{source}.out_layers.3", f"{name}.conv2", width, width, 3, 3)
    if wide != width:
        yield from both(f"{source}.skip_connection", f"{name}.conv_shortcut", width, wide, 1, 1)


def _transformer(source: str, name: str, width: int, depth: int, config: Config) -> Iterator[Piece]:
    """Yield a transformer of so many layers; its inner names are the same on both sides."""
    ends = (width, width) if config["use_linear_projection"] else (width, width, 1, 1)
    yield from both(f"{source}.norm", f"{name}.norm", width)
    yield from both(f"{source}.proj_in", f"{name}.proj_in", *ends)
    yield from both(f"{source}.proj_out", f"{name}.proj_out", *ends)
    for layer in range(depth):
        for inner, shape in _layer(width, config["cross_attention_dim"]).items():
            part = f"transformer_blocks.{layer}.{inner}"
            yield Piece(f"{source}.{part}", f"{name}.{part}", shape)


def _layer(width: int, text: int) -> dict[str, tuple[int, ...]]:
    """Return the weights of one transformer layer: attention to itself, to the text, and a gated MLP."""
    shapes: dict[str, tuple[int, ...]] = {}
    for attention, keys in (("attn1", width), ("attn2", text)):
        shapes[f"{attention}.to_q.weight"] = (width, width)
        shapes[f"{attention}.to_k.weight"] = shapes[f"{attention}.to_v.weight"] = (width, keys)
        shapes[f"{attention}.to_out.0.weight"] = (width, width)
        shapes[f"{attention}.to_out.0.bias"] = (width,)
    for norm in ("norm1", "norm2", "norm3"):
        shapes[f"{norm}.weight"] = shapes[f"{norm}.bias"] = (width,)
    shapes["ff.net.0.proj.weight"], shapes["ff.net.0.proj.bias"] = (8 * width, width), (8 * width,)
    shapes["ff.net.2.weight"], shapes["ff.net.2.bias"] = (width, 4 * width), (width,)
    return shapes
