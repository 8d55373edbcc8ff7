"""Folders of ONNX graphs made on the spot from small checkpoints, with the names and forms that exporters write.

OPTIMUM and EXTERNAL are as optimum-onnx 0.1.0 writes (opset 18, a timestep for the whole batch, weights in the graphs
or in model.onnx_data), OLD_OPTIMUM as optimum did in 2023 (opset 14, whole timesteps in a vector), and PLAIN as the
script of diffusers did in 2022 (opset 14, int32 token ids, a VAE encoder that draws, weights.pb, no configs).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from latentrt_export.graphs.to_onnx import quiet

Axes = Mapping[str, Mapping[int, str]]
BATCH = {0: "batch_size"}
IMAGE = {0: "batch_size", 2: "height", 3: "width"}
TOKENS = {0: "batch_size", 1: "sequence_length"}


@dataclass(frozen=True)
class Style:
    """How an exporter writes: opset, the timestep, token ids, the encoder's output, and the file of the weights."""

    opset: int = 18
    timestep: Callable[[], Tensor] = lambda: torch.tensor(951.0)
    steps: Mapping[int, str] | None = None
    ids: torch.dtype = torch.int64
    moments: str = "latent_parameters"
    draws: bool = False
    data: str | None = None
    plain: bool = False


OPTIMUM = Style()
EXTERNAL = Style(data="model.onnx_data")
OLD_OPTIMUM = Style(14, lambda: torch.tensor([951]), {0: "steps"}, moments="latent_sample")
PLAIN = Style(
    14, lambda: torch.tensor([951.0, 951.0]), {0: "batch"}, torch.int32, "latent_sample", True, "weights.pb", True
)


class Called(nn.Module):
    """A module whose forward is a function of the model and its inputs."""

    def __init__(self, model: nn.Module, run: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self._run = run

    def forward(self, *inputs: Tensor) -> Any:
        return self._run(self.model, *inputs)


def make_onnx_folder(source: Path, folder: Path, style: Style = OPTIMUM, dtype: torch.dtype = torch.float32) -> Path:
    """Export a diffusers checkpoint as an exporter of that style does; return the folder."""
    folder.mkdir(parents=True)
    index = json.loads((source / "model_index.json").read_text())
    texts = [name for name in ("text_encoder", "text_encoder_2") if (source / name).is_dir()]
    with quiet(), torch.no_grad():
        for name in texts:
            _text_encoder(source, folder, name, style, dtype, hidden=len(texts) > 1)
        _unet(source, folder, style, dtype)
        _vae(source, folder, style, dtype)
    for name in ("scheduler", *(name.replace("text_encoder", "tokenizer") for name in texts)):
        shutil.copytree(source / name, folder / name)
    if style.plain:
        index["_class_name"] = f"Onnx{index['_class_name']}"
    else:
        for name, home in {**dict(zip(texts, texts, strict=True)), "unet": "unet"}.items():
            shutil.copyfile(source / name / "config.json", folder / home / "config.json")
        for home in ("vae_decoder", "vae_encoder"):
            shutil.copyfile(source / "vae" / "config.json", folder / home / "config.json")
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def _text_encoder(source: Path, folder: Path, name: str, style: Style, dtype: torch.dtype, *, hidden: bool) -> None:
    kind = CLIPTextModelWithProjection if name.endswith("2") else CLIPTextModel
    model = kind.from_pretrained(source / name, attn_implementation="eager").to(dtype).eval()
    first = "text_embeds" if name.endswith("2") else "pooler_output"

    def run(model: Any, ids: Tensor) -> tuple[Tensor, ...]:
        out = model(ids, output_hidden_states=hidden)
        return (out.last_hidden_state, out[first], *(out.hidden_states if hidden else ()))

    count = model.config.num_hidden_layers + 1 if hidden else 0
    outputs = ["last_hidden_state", first, *(f"hidden_states.{i}" for i in range(count))]
    ids = torch.arange(2 * 77, dtype=style.ids).reshape(2, 77)
    _export(Called(model, run), folder / name, {"input_ids": (ids, TOKENS)}, outputs, style)


def _unet(source: Path, folder: Path, style: Style, dtype: torch.dtype) -> None:
    model = UNet2DConditionModel.from_pretrained(source / "unet").to(dtype).eval()
    config = model.config
    time = style.timestep()
    inputs: dict[str, tuple[Tensor, Mapping[int, str]]] = {
        "sample": (torch.randn(2, config.in_channels, 8, 8, dtype=dtype), IMAGE),
        "timestep": (time.to(dtype) if time.is_floating_point() else time, style.steps or {}),
        "encoder_hidden_states": (torch.randn(2, 77, config.cross_attention_dim, dtype=dtype), TOKENS),
    }
    if config.addition_embed_type == "text_time":
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["text_embeds"] = (torch.randn(2, width, dtype=dtype), BATCH)
        inputs["time_ids"] = (torch.randn(2, 6, dtype=dtype), BATCH)

    def run(model: Any, sample: Tensor, timestep: Tensor, states: Tensor, *added: Tensor) -> Tensor:
        given = dict(zip(("text_embeds", "time_ids"), added, strict=True)) if added else None
        result: Tensor = model(sample, timestep, states, added_cond_kwargs=given).sample
        return result

    _export(Called(model, run), folder / "unet", inputs, ["out_sample"], style)


def _vae(source: Path, folder: Path, style: Style, dtype: torch.dtype) -> None:
    model = AutoencoderKL.from_pretrained(source / "vae").to(dtype).eval()
    latents = {"latent_sample": (torch.randn(2, model.config.latent_channels, 8, 8, dtype=dtype), IMAGE)}
    _export(Called(model, lambda m, z: m.decode(z).sample), folder / "vae_decoder", latents, ["sample"], style)

    def encode(model: Any, image: Tensor) -> Tensor:
        posterior = model.encode(image).latent_dist
        if not style.draws:
            result: Tensor = posterior.parameters
            return result
        return posterior.mean + posterior.std * torch.randn_like(posterior.mean)

    image = {"sample": (torch.randn(2, 3, 32, 32, dtype=dtype), IMAGE)}
    _export(Called(model, encode), folder / "vae_encoder", image, [style.moments], style)


def _export(
    module: nn.Module,
    folder: Path,
    inputs: Mapping[str, tuple[Tensor, Mapping[int, str]]],
    outputs: Sequence[str],
    style: Style,
) -> None:
    folder.mkdir()
    path = folder / "model.onnx"
    torch.onnx.export(
        module,
        tuple(example for example, _ in inputs.values()),
        path,
        input_names=list(inputs),
        output_names=list(outputs),
        dynamic_axes={name: dict(axes) for name, (_, axes) in inputs.items() if axes},
        opset_version=style.opset,
        dynamo=False,
    )
    if style.data is not None:
        model = onnx.load(path)
        onnx.save(model, path, save_as_external_data=True, location=style.data, size_threshold=64)
