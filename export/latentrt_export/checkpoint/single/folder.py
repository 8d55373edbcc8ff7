"""From a single file to a diffusers folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from latentrt.bundle.tensors import Tensors, open_tensors
from latentrt.errors import ExportError
from latentrt_export.checkpoint.configs import weights_path, write_configs
from latentrt_export.checkpoint.presets.configs import Preset
from latentrt_export.checkpoint.single.choices import Choices
from latentrt_export.checkpoint.single.family import (
    EMA,
    FAMILIES,
    INPAINTING,
    INSTRUCTED,
    UNET,
    Family,
    check_unet,
    family_of,
)
from latentrt_export.checkpoint.single.leftovers import Part, leftovers
from latentrt_export.checkpoint.single.pieces import Config, Network, prefixed, size, without
from latentrt_export.checkpoint.single.prediction import EPSILON, Prediction, decide, probe
from latentrt_export.checkpoint.single.schedule import EDM, ZERO_SNR, schedule_of
from latentrt_export.checkpoint.single.text import harmless, text_config, text_pieces
from latentrt_export.checkpoint.single.unet import unet_config, unet_pieces
from latentrt_export.checkpoint.single.vae import IGNORED_OF_VAE, PREFIXES, prefix_of
from latentrt_export.checkpoint.single.vae_file import other_vae, own_vae
from latentrt_export.checkpoint.single.write import check_weights, write_weights


@dataclass(frozen=True, slots=True)
class Single:
    """A single file that is understood.

    Attributes:
        tensors: the file.
        family, rule: what it is, and why.
        networks, sources: its networks, and the file that each comes from.
        notes: more lines to show.
    """

    tensors: Tensors
    family: Family
    rule: str
    networks: Mapping[str, Network]
    sources: Mapping[str, Tensors]
    notes: tuple[str, ...] = ()

    @property
    def channels(self) -> int:
        """The channels that its UNet reads."""
        return int(self.networks["unet"].config["in_channels"])

    @property
    def inpaints(self) -> bool:
        """Whether its UNet reads a masked picture too."""
        return self.channels == INPAINTING

    @property
    def is_distilled(self) -> bool:
        """Whether its UNet reads the guidance scale (LCM)."""
        return "time_cond_proj_dim" in self.networks["unet"].config

    @property
    def kind(self) -> str:
        """What to call it, beside the family's name."""
        kind = {INPAINTING: " inpainting", INSTRUCTED: " pix2pix"}.get(self.channels, "")
        return f"{kind} LCM" if self.is_distilled else kind

    @property
    def is_sd2(self) -> bool:
        """Whether it is of the family with two kinds of models under the same names: 512-base and 768-v."""
        return self.family is FAMILIES["sd2"]


def make_folder(file: Path, folder: Path, choices: Choices) -> tuple[str, ...]:
    """Write a diffusers checkpoint with the weights of a single file, in its dtypes, tensor by tensor.

    Args:
        file: a .safetensors file of a whole model in LDM's names.
        folder: where the checkpoint goes; made if missing.
        choices: what the user decides.

    Returns:
        What the file is and by which rules, as lines to show.

    Raises:
        ExportError: it is damaged, or no such model, or lacks weights; nothing was written then.
        UnsafeWeightsError: it is a pickle.
        OSError: the folder cannot be written.
    """
    tensors = open_tensors(file)
    single = understand(tensors, choices)
    prediction = decide(tensors, choices.prediction_type, sd2=single.is_sd2, inpaints=single.inpaints)
    for name, network in single.networks.items():
        write_weights(weights_path(folder, name, network.kind), single.sources[name], network.pieces)
    write_configs(_model(single, prediction.kind if prediction else EPSILON), folder)
    if prediction is None:
        prediction = probe(folder / "unet")
        write_configs(_model(single, prediction.kind), folder)
    what = _told(single, prediction, choices)
    (folder / "README.md").write_text(_card(tensors, what), encoding="utf-8")
    return (what, *single.notes)


def understand(tensors: Tensors, choices: Choices) -> Single:
    """Return what a single file is, by its header: every weight of every network has its place.

    Raises:
        ExportError: it is no such model, or lacks weights, or has others.
    """
    family, rule = family_of(tensors.shapes, choices.model)
    single = _single(tensors, family, rule, choices)
    check_weights(single.sources, single.networks)
    placed = [piece.source for network in single.networks.values() for piece in network.pieces]
    return replace(single, notes=leftovers(tensors.entries, placed, _parts(single, choices), family.name))


def _single(tensors: Tensors, family: Family, rule: str, choices: Choices) -> Single:
    shapes = tensors.shapes
    networks, sources = {}, dict.fromkeys(family.preset.networks, tensors)
    for name, text in family.texts.items():
        config = {**family.preset.networks[name][1], **text_config(text, shapes)}
        networks[name] = Network(text.kind, config, text_pieces(text, config, shapes))
    networks["unet"] = _unet(tensors, family, networks, ema=choices.ema)
    base = family.preset.networks["vae"][1]
    if choices.vae:
        sources["vae"] = open_tensors(Path(choices.vae))
        like = own_vae(tensors, base).config if prefix_of(shapes) is not None else None
        networks["vae"] = other_vae(sources["vae"], base, like)
    else:
        networks["vae"] = own_vae(tensors, base)
    return Single(tensors, family, rule, networks, sources)


def _unet(tensors: Tensors, family: Family, texts: Mapping[str, Network], *, ema: bool) -> Network:
    shapes = tensors.shapes
    own = without(UNET, shapes)
    check_unet(family, size(own, "input_blocks.0.0.weight", 1, "UNet"), shapes)
    config = {**family.preset.networks["unet"][1], **unet_config(own, family.heads)}
    width = sum(text.config["hidden_size"] for text in texts.values())
    if config["cross_attention_dim"] != width:
        found = f"a UNet that reads text of {config['cross_attention_dim']} channels"
        raise ExportError(f"{family.name} with {found}", needed=f"{width}, as its text encoders give")
    if "text_encoder_2" in texts:
        config["addition_time_embed_dim"] = _time_width(config, texts["text_encoder_2"].config, family)
    pieces = unet_pieces(config)
    if not ema:
        return Network("UNet2DConditionModel", config, prefixed(UNET, pieces))
    if not any(name.startswith(_ema("")) for name in shapes):
        raise ExportError(f"{tensors.path} has no {EMA} weights", needed="averaged weights", fix="leave out --ema")
    averaged = [replace(piece, source=_ema(piece.source)) for piece in pieces]
    return Network("UNet2DConditionModel", config, averaged)


def _ema(name: str) -> str:
    """Return what LDM's trainer calls the average of a UNet's weight: the name without dots."""
    return EMA + f"diffusion_model.{name}".replace(".", "")


def _time_width(unet: Config, text: Config, family: Family) -> int:
    """Return how many channels each of SDXL's sizes has in the UNet's label embedding, beside the pooled text."""
    numbers = 5 if family.preset.index.get("requires_aesthetics_score") else 6
    width: int
    width, rest = divmod(unet["projection_class_embeddings_input_dim"] - text["projection_dim"], numbers)
    if rest or width <= 0:
        found = f"a label embedding of {unet['projection_class_embeddings_input_dim']} channels"
        raise ExportError(f"{family.name} with {found}", needed=f"{text['projection_dim']} and {numbers} equal parts")
    return width


def _model(single: Single, prediction: str) -> Preset:
    """Return all of the checkpoint but its weights."""
    preset = single.family.preset
    base = single.is_sd2 and prediction == EPSILON
    sizes = {"unet": {"sample_size": 64}, "vae": {"sample_size": 512}} if base else {}
    networks = {name: (n.kind, {**n.config, **sizes.get(name, {})}) for name, n in single.networks.items()}
    pipeline = single.family.others.get(single.channels, preset.pipeline)
    own = {"_class_name": "LCMScheduler"} if single.is_distilled else {}
    scheduler = schedule_of(single.tensors, {**preset.scheduler, **own}, prediction)
    if single.is_distilled and pipeline == "StableDiffusionPipeline":
        pipeline = "LatentConsistencyModelPipeline"
    edits_scaled = single.channels == INSTRUCTED and EDM in single.tensors.entries
    index = {**preset.index, **({"is_cosxl_edit": True} if edits_scaled else {})}
    return replace(preset, pipeline=pipeline, networks=networks, scheduler=scheduler, index=index)


def _parts(single: Single, choices: Choices) -> list[Part]:
    """Return the file's networks; an averaged UNet or another VAE takes the place of the file's own, all of it."""
    shapes = single.tensors.shapes
    parts = [Part(UNET, [""] if choices.ema else [])]
    parts.append(Part(prefix_of(shapes) or PREFIXES[0], [""] if choices.vae else IGNORED_OF_VAE))
    for name, text in single.family.texts.items():
        parts.append(Part(text.prefix, harmless(text, single.networks[name].config)))
    return parts


def _told(single: Single, prediction: Prediction, choices: Choices) -> str:
    width = single.networks["unet"].config["cross_attention_dim"]
    name = f"{single.family.name}{single.kind} ({single.rule}; cross-attention width {width})"
    parts = [name, f"{prediction.kind} {prediction.rule}"]
    parts += [f"zero terminal SNR by its key {ZERO_SNR}"] if ZERO_SNR in single.tensors.entries else []
    parts += ["averaged weights (EMA)"] if choices.ema else []
    parts += [choices.vae_note] if choices.vae else []
    return ", ".join(parts)


def _card(tensors: Tensors, what: str) -> str:
    """Return a model card that says where the weights are from, with the licence that the file's header names."""
    license = " ".join(tensors.metadata.get("modelspec.license", "").split())
    front = f"---\nlicense: {license}\n---\n" if license else ""
    return f"{front}Made by latentrt from the single file {tensors.path.name}: {what}.\n"
