"""CLIP's text encoders in the names of transformers (SD 1) or OpenCLIP (SD 2, SDXL's second): config, and places."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from latentrt.errors import ExportError
from latentrt_export.checkpoint.configs import ENTRIES
from latentrt_export.checkpoint.single.pieces import Config, Piece, Shape, Shapes, both, count, heads_of, size, without

LAYERS_H = 23  # of OpenCLIP's ViT-H as SD 2 uses it: all 24 but the last
QKV = ("q_proj", "k_proj", "v_proj")
LAYER = {  # of transformers, OpenCLIP
    "layer_norm1": "ln_1",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


@dataclass(frozen=True, slots=True)
class Text:
    """A text encoder of a single file.

    Attributes:
        prefix: of its names.
        open_clip: whether it has OpenCLIP's names.
        projected: whether it has a projection, for pooled text.
        cut: whether the last layer is left out: SD 2 reads the states before it.
    """

    prefix: str
    open_clip: bool = False
    projected: bool = False
    cut: bool = False

    @property
    def kind(self) -> str:
        """Its class in transformers."""
        return "CLIPTextModelWithProjection" if self.projected else "CLIPTextModel"


def is_there(text: Text, shapes: Shapes) -> bool:
    """Return whether a file has such a text encoder."""
    return bool(_names(text, shapes)[1])


def text_config(text: Text, shapes: Shapes) -> Config:
    """Return what of a CLIPTextConfig the shapes show; heads have 64 channels.

    Args:
        text: which text encoder.
        shapes: of the whole file.

    Raises:
        ExportError: a weight is missing, or the vocabulary is smaller than CLIP's.
    """
    prefix, own = _names(text, shapes)
    positions = "positional_embedding" if text.open_clip else "embeddings.position_embedding.weight"
    tokens = "token_embedding.weight" if text.open_clip else "embeddings.token_embedding.weight"
    layers = "transformer.resblocks" if text.open_clip else "encoder.layers"
    first = f"{layers}.0.mlp.{'c_fc' if text.open_clip else 'fc1'}.weight"
    what = f"text encoder {prefix.rstrip('.')}"
    number, width = count(own, layers), size(own, tokens, 1, what)
    config: Config = {
        "hidden_size": width,
        "intermediate_size": size(own, first, 0, what),
        "max_position_embeddings": size(own, positions, 0, what),
        "num_attention_heads": heads_of(width, what),
        "num_hidden_layers": number - 1 if text.cut and number != LAYERS_H else number,
        "vocab_size": size(own, tokens, 0, what),
    }
    if config["vocab_size"] < ENTRIES:
        raise ExportError(f"the {what} knows {config['vocab_size']} tokens", needed=f"CLIP's {ENTRIES}")
    if text.projected:
        config["projection_dim"] = size(own, "text_projection", 1, what)
    return config


def text_pieces(text: Text, config: Config, shapes: Shapes) -> list[Piece]:
    """Return every weight of a text encoder, by the file's names and by those of the published checkpoints."""
    prefix = _names(text, shapes)[0]
    return list(_open_clip(text, prefix, config) if text.open_clip else _clip(prefix, config))


def harmless(text: Text, config: Config) -> list[str]:
    """Return what a text encoder may have that nothing reads: names, or beginnings that end with a point."""
    names = ["logit_scale", "attn_mask", "embeddings.position_ids", "vision_model."]
    names += [] if text.projected else ["text_projection", "text_projection.weight"]
    names += [f"transformer.resblocks.{config['num_hidden_layers']}."] if text.cut else []
    return [*names, *(f"text_model.{name}" for name in names)]


def _names(text: Text, shapes: Shapes) -> tuple[str, dict[str, Shape]]:
    """Return the prefix that the file has and the encoder's shapes; some files leave "text_model." out."""
    longer = without(text.prefix + "text_model.", shapes)
    return (text.prefix + "text_model.", longer) if longer else (text.prefix, without(text.prefix, shapes))


def _clip(prefix: str, config: Config) -> Iterator[Piece]:
    """Yield the weights of a text encoder that has transformers' names already."""
    width = config["hidden_size"]
    tables = {
        "embeddings.token_embedding.weight": (config["vocab_size"], width),
        "embeddings.position_embedding.weight": (config["max_position_embeddings"], width),
    }
    for name, table in tables.items():
        yield Piece(prefix + name, f"text_model.{name}", table)
    for i in range(config["num_hidden_layers"]):
        layer = f"encoder.layers.{i}"
        stacked = {f"self_attn.{part}": (width, width) for part in QKV}
        for part, shape in (stacked | _rest(config)).items():
            yield from both(f"{prefix}{layer}.{part}", f"text_model.{layer}.{part}", *shape)
    yield from both(f"{prefix}final_layer_norm", "text_model.final_layer_norm", width)


def _rest(config: Config) -> dict[str, Shape]:
    """Return the parts of a layer but queries, keys and values, which OpenCLIP stacks."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    return dict(zip(LAYER, ((width,), (width, width), (width,), (inner, width), (width, inner)), strict=True))


def _open_clip(text: Text, prefix: str, config: Config) -> Iterator[Piece]:
    width, ours = config["hidden_size"], "text_model."
    tokens, positions = (config["vocab_size"], width), (config["max_position_embeddings"], width)
    yield Piece(f"{prefix}token_embedding.weight", f"{ours}embeddings.token_embedding.weight", tokens)
    yield Piece(f"{prefix}positional_embedding", f"{ours}embeddings.position_embedding.weight", positions)
    for i in range(config["num_hidden_layers"]):
        source, layer = f"{prefix}transformer.resblocks.{i}", f"{ours}encoder.layers.{i}"
        for third, part in enumerate(QKV):
            name = f"{layer}.self_attn.{part}"
            yield Piece(f"{source}.attn.in_proj_weight", f"{name}.weight", (width, width), third)
            yield Piece(f"{source}.attn.in_proj_bias", f"{name}.bias", (width,), third)
        for part, shape in _rest(config).items():
            yield from both(f"{source}.{LAYER[part]}", f"{layer}.{part}", *shape)
    yield from both(f"{prefix}ln_final", f"{ours}final_layer_norm", width)
    if text.projected:
        projection = (config["projection_dim"], width)
        yield Piece(f"{prefix}text_projection", "text_projection.weight", projection, transposed=True)
