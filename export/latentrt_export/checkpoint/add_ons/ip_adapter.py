"""An IP-Adapter in a single file, as its authors publish them, and the image encoder in a folder of its own.

image_proj.*                      makes tokens of what the image encoder gives
ip_adapter.N.to_k_ip, .to_v_ip    keys and values of these tokens for a cross attention of the UNet: N is 1, 3, 5, ...
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from latentrt.bundle.tensors import open_tensors
from latentrt.errors import ExportError
from latentrt_export.checkpoint.files import AGAIN, read_json
from latentrt_export.checkpoint.lone_vae import CONFIG
from latentrt_export.checkpoint.served import unsupported
from latentrt_export.checkpoint.weights import choose_weights

Shapes = Mapping[str, tuple[int, ...]]
PART, ENCODER = "ip_adapter", "image_encoder"
FILE = f"{PART}/model.safetensors"  # in a bundle
BASE_TOKENS, HEAD = 4, 64  # of the base kind; the size of a resampler's heads: no file says them
PROJECTION, LAYER = "image_proj.", re.compile(r"ip_adapter\.(\d+)\.to_[kv]_ip\.weight")
ENCODERS = {
    "hidden_size": 768,
    "projection_dim": 512,
    "image_size": 224,
    "patch_size": 32,
}  # transformers' own defaults
KINDS = BASE, PLUS, FULL = ("base", "plus", "full")  # what makes tokens: a linear layer, a resampler, two layers
OWN = {"proj.weight": BASE, "latents": PLUS, "proj.3.weight": FULL}  # by a weight that only one kind has


class IpAdapter(NamedTuple):
    """What the shapes in a file say.

    Attributes:
        kind: one of KINDS.
        width: of what it reads of the image encoder.
        tokens: how many it makes of a picture; 0: as many as the encoder has states.
        cross: their width: that of the UNet's texts.
        channels: of each cross attention.
        hidden, depth, heads: of a resampler: its width, layers, and heads of each.
    """

    kind: str
    width: int
    tokens: int
    cross: int
    channels: tuple[int, ...]
    hidden: int = 0
    depth: int = 0
    heads: int = 0

    @property
    def reads_states(self) -> bool:
        """Whether it reads the states before the encoder's last layer, and not the picture's embedding."""
        return self.kind != BASE


def is_ip_adapter(path: Path) -> bool:
    """Return whether a file is an IP-Adapter, of any kind."""
    return path.suffix == ".safetensors" and any(LAYER.fullmatch(name) for name in open_tensors(path).entries)


def read_ip_adapter(path: Path) -> IpAdapter:
    """Read what the shapes in a file say.

    Raises:
        ExportError: it is of a kind that the engine cannot serve, or weights are missing, of other shapes, or too many.
    """
    shapes = open_tensors(path).shapes
    kind = next((kind for name, kind in OWN.items() if f"{PROJECTION}{name}" in shapes), None)
    if kind is None:
        raise unsupported(f"{path.name}, an IP-Adapter of another kind, such as FaceID", f"one of {', '.join(KINDS)}")
    try:
        own = _plus(shapes) if kind == PLUS else _base(shapes) if kind == BASE else _full(shapes)
    except (KeyError, IndexError, ValueError) as error:
        raise ExportError(
            f"{path} lacks weights, or has others ({error})", needed="the weights of an IP-Adapter", fix=AGAIN
        ) from error
    needed = _needed(own)
    for name in sorted({*shapes, *needed}):
        if shapes.get(name) != needed.get(name):
            found, wanted = (
                "no such weight" if one is None else str(list(one)) for one in (shapes.get(name), needed.get(name))
            )
            raise ExportError(f"{path} has {name}: {found}", needed=wanted, fix=AGAIN)
    return own


def ip_adapter_files(
    path: Path, encoder: str | Path | None
) -> tuple[dict[str, Mapping[str, Any]], dict[str, Path], tuple[str, ...]]:
    """Return configs of an IP-Adapter and its image encoder, files by their names in a bundle, what to tell the user.

    Args:
        path: the file.
        encoder: the folder of its image encoder; None: "image_encoder" beside the file.

    Raises:
        ExportError: as of `read_ip_adapter`; or the image encoder is missing, broken or another one.
        UnsafeWeightsError: the image encoder's weights are pickled.
    """
    own, folder = read_ip_adapter(path), Path(encoder) if encoder else path.parent / ENCODER
    if not (folder / CONFIG).is_file():
        raise ExportError(
            f"there is no image encoder in {folder}",
            needed="the folder of the one that the IP-Adapter was trained with: config.json and safetensors",
            fix="pass it: --image-encoder FOLDER (h94/IP-Adapter has models/image_encoder for SD 1 and every vit-h)",
        )
    config = {**ENCODERS, **read_json(folder / CONFIG)}
    if config.get("model_type", "clip_vision_model") != "clip_vision_model":
        raise unsupported(f"an image encoder of the type {config['model_type']!r}", "'clip_vision_model'")
    size = "hidden_size" if own.reads_states else "projection_dim"
    if config[size] != own.width:
        raise ExportError(
            f"the image encoder in {folder} has {size} {config[size]}, and {path.name} reads {own.width}",
            needed="the image encoder that it was trained with",
            fix="h94/IP-Adapter: models/image_encoder for SD 1 and every vit-h, sdxl_models/image_encoder for the rest",
        )
    weights = choose_weights({ENCODER: folder}, None)[ENCODER]
    files = {f"{ENCODER}/{name}": place for name, place in weights.files.items()}
    files |= {f"{ENCODER}/{CONFIG}": folder / CONFIG, FILE: path}
    return {PART: own._asdict(), ENCODER: config}, files, (weights.note,) if weights.note else ()


def numbers(count: int) -> range:
    """Return the numbers that files have for so many cross attentions."""
    return range(1, 2 * count, 2)


def _base(shapes: Shapes) -> IpAdapter:
    (cross,), width = shapes[f"{PROJECTION}norm.weight"], shapes[f"{PROJECTION}proj.weight"][-1]
    return IpAdapter(BASE, width, BASE_TOKENS, cross, _channels(shapes))


def _full(shapes: Shapes) -> IpAdapter:
    cross, width = shapes[f"{PROJECTION}proj.2.weight"]
    return IpAdapter(FULL, width, 0, cross, _channels(shapes))


def _plus(shapes: Shapes) -> IpAdapter:
    _, tokens, hidden = shapes[f"{PROJECTION}latents"]
    width, (cross,) = shapes[f"{PROJECTION}proj_in.weight"][-1], shapes[f"{PROJECTION}norm_out.weight"]
    heads = shapes[f"{PROJECTION}layers.0.0.to_q.weight"][0] // HEAD
    depth = len([name for name in shapes if name.endswith(".0.to_q.weight")])
    return IpAdapter(PLUS, width, tokens, cross, _channels(shapes), hidden, depth, heads)


def _channels(shapes: Shapes) -> tuple[int, ...]:
    count = len([name for name in shapes if LAYER.fullmatch(name)]) // 2
    return tuple(shapes[f"ip_adapter.{number}.to_k_ip.weight"][0] for number in numbers(count))


def _needed(own: IpAdapter) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all weights of a kind."""
    hidden, cross, inner = own.hidden, own.cross, own.heads * HEAD
    needed = {
        f"ip_adapter.{number}.to_{kind}_ip.weight": (channels, cross)
        for number, channels in zip(numbers(len(own.channels)), own.channels, strict=True)
        for kind in "kv"
    }
    if own.kind == BASE:
        wide = own.tokens * cross
        base = {"proj.weight": (wide, own.width), "proj.bias": (wide,), "norm.weight": (cross,), "norm.bias": (cross,)}
        return needed | {f"{PROJECTION}{name}": shape for name, shape in base.items()}
    if own.kind == FULL:
        layers = {0: (own.width, own.width), 2: (cross, own.width), 3: (cross,)}
        weights = {f"{PROJECTION}proj.{number}.weight": shape for number, shape in layers.items()}
        return needed | weights | {f"{PROJECTION}proj.{number}.bias": shape[:1] for number, shape in layers.items()}
    plus: dict[str, tuple[int, ...]] = {
        "latents": (1, own.tokens, hidden),
        "proj_in.weight": (hidden, own.width),
        "proj_in.bias": (hidden,),
        "proj_out.weight": (cross, hidden),
        "proj_out.bias": (cross,),
        "norm_out.weight": (cross,),
        "norm_out.bias": (cross,),
    }
    for layer in range(own.depth):
        first, second = f"layers.{layer}.0", f"layers.{layer}.1"
        plus |= {
            f"{norm}.{kind}": (hidden,)
            for norm in (f"{first}.norm1", f"{first}.norm2", f"{second}.0")
            for kind in ("weight", "bias")
        }
        plus |= {
            f"{first}.to_q.weight": (inner, hidden),
            f"{first}.to_kv.weight": (2 * inner, hidden),
            f"{first}.to_out.weight": (hidden, inner),
            f"{second}.1.weight": (4 * hidden, hidden),
            f"{second}.3.weight": (hidden, 4 * hidden),
        }
    return needed | {f"{PROJECTION}{name}": shape for name, shape in plus.items()}
