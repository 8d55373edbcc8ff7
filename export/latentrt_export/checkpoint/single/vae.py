"""AutoencoderKL in LDM's names or diffusers': the config from the shapes, and the place of every weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from latentrt_export.checkpoint.single.pieces import Config, Piece, Shapes, both, count, size

VAE = "VAE"
PREFIXES = ("first_stage_model.", "vae.", "")
IGNORED_OF_VAE = ("loss.", "model_ema.")
OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}  # attention, in diffusers of 2022
LDM = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "group_norm": "norm"}


def prefix_of(shapes: Shapes) -> str | None:
    """Return what a file has before the names of a VAE; None if it has no VAE."""
    return next((prefix for prefix in PREFIXES if f"{prefix}decoder.conv_in.weight" in shapes), None)


def vae_config(shapes: Shapes) -> Config:
    """Return what of an AutoencoderKL's config its shapes show.

    Args:
        shapes: by LDM's names ("decoder.up.0.block.0.norm1.weight", ...) or diffusers'.

    Raises:
        ExportError: a weight is missing from which the config is read.
    """
    down, block = ("down_blocks", "resnets") if _is_diffusers(shapes) else ("down", "block")
    blocks = range(max(1, count(shapes, f"encoder.{down}")))
    return {
        "in_channels": size(shapes, "encoder.conv_in.weight", 1, VAE),
        "out_channels": size(shapes, "decoder.conv_out.weight", 0, VAE),
        "latent_channels": size(shapes, "decoder.conv_in.weight", 1, VAE),
        "block_out_channels": [size(shapes, f"encoder.{down}.{i}.{block}.0.conv2.weight", 0, VAE) for i in blocks],
        "layers_per_block": count(shapes, f"encoder.{down}.0.{block}"),
        "down_block_types": ["DownEncoderBlock2D"] * len(blocks),
        "up_block_types": ["UpDecoderBlock2D"] * len(blocks),
    }


def vae_pieces(config: Config, shapes: Shapes) -> list[Piece]:
    """Return every weight of a VAE with this config, as the file names it and as diffusers does."""
    pieces = list(_pieces(config))
    if not _is_diffusers(shapes):
        return pieces
    return [Piece(_old(piece.name, shapes), piece.name, piece.shape) for piece in pieces]


def _is_diffusers(shapes: Shapes) -> bool:
    return any(name.startswith("encoder.down_blocks.") for name in shapes)


def _old(name: str, shapes: Shapes) -> str:
    """Return the name that the file has of a weight of diffusers', which may be that of 2022."""
    if name in shapes or ".attentions.0." not in name:
        return name
    before, _, after = name.partition(".attentions.0.")
    part, _, kind = after.rpartition(".")
    return f"{before}.attentions.0.{OLD.get(part, part)}.{kind}"


def _pieces(config: Config) -> Iterator[Piece]:
    channels, layers, latents = config["block_out_channels"], config["layers_per_block"], config["latent_channels"]
    last = len(channels) - 1
    yield from both("encoder.conv_in", "encoder.conv_in", channels[0], config["in_channels"], 3, 3)
    here = channels[0]
    for level, width in enumerate(channels):
        source, name = f"encoder.down.{level}", f"encoder.down_blocks.{level}"
        for layer in range(layers):
            yield from _resnet(f"{source}.block.{layer}", f"{name}.resnets.{layer}", here, width)
            here = width
        if level < last:
            yield from both(f"{source}.downsample.conv", f"{name}.downsamplers.0.conv", width, width, 3, 3)
    yield from _middle("encoder", here)
    yield from _end("encoder", here, 2 * latents)
    yield from both("quant_conv", "quant_conv", 2 * latents, 2 * latents, 1, 1)
    yield from both("post_quant_conv", "post_quant_conv", latents, latents, 1, 1)
    yield from both("decoder.conv_in", "decoder.conv_in", here, latents, 3, 3)
    yield from _middle("decoder", here)
    for level, width in enumerate(reversed(channels)):
        source, name = f"decoder.up.{last - level}", f"decoder.up_blocks.{level}"
        for layer in range(layers + 1):
            yield from _resnet(f"{source}.block.{layer}", f"{name}.resnets.{layer}", here, width)
            here = width
        if level < last:
            yield from both(f"{source}.upsample.conv", f"{name}.upsamplers.0.conv", width, width, 3, 3)
    yield from _end("decoder", here, config["out_channels"])


def _middle(half: str, width: int) -> Iterator[Piece]:
    yield from _resnet(f"{half}.mid.block_1", f"{half}.mid_block.resnets.0", width, width)
    shapes: Mapping[str, tuple[int, ...]] = dict.fromkeys(OLD, (width, width)) | {"group_norm": (width,)}
    for name, shape in shapes.items():
        yield from both(f"{half}.mid.attn_1.{LDM[name]}", f"{half}.mid_block.attentions.0.{name}", *shape)
    yield from _resnet(f"{half}.mid.block_2", f"{half}.mid_block.resnets.1", width, width)


def _end(half: str, width: int, channels: int) -> Iterator[Piece]:
    yield from both(f"{half}.norm_out", f"{half}.conv_norm_out", width)
    yield from both(f"{half}.conv_out", f"{half}.conv_out", channels, width, 3, 3)


def _resnet(source: str, name: str, wide: int, width: int) -> Iterator[Piece]:
    yield from both(f"{source}.norm1", f"{name}.norm1", wide)
    yield from both(f"{source}.conv1", f"{name}.conv1", width, wide, 3, 3)
    yield from both(f"{source}.norm2", f"{name}.norm2", width)
    yield from both(f"{source}.conv2", f"{name}.conv2", width, width, 3, 3)
    if wide != width:
        yield from both(f"{source}.nin_shortcut", f"{name}.conv_shortcut", width, wide, 1, 1)
