"""Open a diffusers checkpoint: find its files, choose its weights, refuse what the engine cannot serve.

Nothing is loaded here, and nothing of a checkpoint is executed: JSON is read, safetensors are named.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from latentrt.bundle.bundle import PICKLES
from latentrt.bundle.tensors import open_tensors
from latentrt.errors import ExportError, LatentrtError, OutputError, UnsafeWeightsError
from latentrt_export.checkpoint.add_ons import ip_adapter
from latentrt_export.checkpoint.files import AGAIN, license_of, read_json, read_schedule, texts_of, tokenizer_files
from latentrt_export.checkpoint.hub import download
from latentrt_export.checkpoint.lone_control import add_on_folder, is_add_on
from latentrt_export.checkpoint.lone_vae import fitting, is_vae, vae_folder
from latentrt_export.checkpoint.merged import with_loras
from latentrt_export.checkpoint.served import (
    EXTRA,
    LOW,
    TINY,
    VAES,
    check_networks,
    text_config,
    unsupported,
    vae_class,
)
from latentrt_export.checkpoint.single.choices import AS_THEY_ARE, Choices
from latentrt_export.checkpoint.single.controlnet.file import is_controlnet, make_controlnet
from latentrt_export.checkpoint.single.folder import make_folder
from latentrt_export.checkpoint.single.vae_file import vae_files
from latentrt_export.checkpoint.weights import choose_weights

TEXT, TEXT_2, UNET, VAE = "text_encoder", "text_encoder_2", "unet", "vae"
SD, XL, REFINER, PIXELS = (TEXT, UNET, VAE), (TEXT, TEXT_2, UNET, VAE), (TEXT_2, UNET, VAE), (UNET,)
PIPELINES = {  # the networks of each
    "StableDiffusionPipeline": SD,
    "StableDiffusionImg2ImgPipeline": SD,
    "StableDiffusionInpaintPipeline": SD,
    "LatentConsistencyModelPipeline": SD,
    "LatentConsistencyModelImg2ImgPipeline": SD,
    "StableDiffusionInstructPix2PixPipeline": SD,
    "StableDiffusionXLPipeline": XL,
    "StableDiffusionXLImg2ImgPipeline": XL,
    "StableDiffusionXLInpaintPipeline": XL,
    "StableDiffusionXLInstructPix2PixPipeline": XL,
    "StableDiffusionDepth2ImgPipeline": SD,
    "StableDiffusionUpscalePipeline": SD,
    "StableDiffusionLatentUpscalePipeline": SD,
    "DDPMPipeline": PIXELS,
    "DDIMPipeline": PIXELS,
}
CLASSES = {
    TEXT: ("CLIPTextModel",),
    TEXT_2: ("CLIPTextModelWithProjection",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
    VAE: VAES,
    "low_res_scheduler": ("DDPMScheduler", "DDIMScheduler"),  # whose add_noise keeps the variance
}
UNETS = {**dict.fromkeys((SD, XL, REFINER), "UNet2DConditionModel"), PIXELS: "UNet2DModel"}
SCHEDULE = "scheduler/scheduler_config.json"
LOW_SCHEDULER, LOW_SCHEDULE = "low_res_scheduler", "low_res_scheduler/scheduler_config.json"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PRESET = "preset:"
FOLDER_OR_ID = "pass a folder that has a model_index.json, or the id of one on the hub"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that can be exported.

    Attributes:
        root: its folder.
        id, revision, license: where known.
        index: model_index.json, with the pipeline's class and a class for each part; of a network alone, its class.
        configs: config.json of each network that it has: "text_encoder", "text_encoder_2", "unet", "vae"; "controlnet",
            "t2i_adapter"; "image_encoder" and "ip_adapter".
        scheduler: scheduler_config.json; empty for a VAE or an add-on alone.
        files: where each file of a bundle is now: configs, tokenizers and weights (safetensors, chosen variants under
            their plain names).
        notes: what a user should know of how the checkpoint was opened, one sentence each.
        graphs: ONNX graphs that exist already, by network; empty where networks are traced.
    """

    root: Path
    id: str
    revision: str | None
    license: str | None
    index: Mapping[str, Any]
    configs: Mapping[str, Mapping[str, Any]]
    scheduler: Mapping[str, Any]
    files: Mapping[str, Path]
    notes: tuple[str, ...] = ()
    graphs: Mapping[str, Path] = field(default_factory=dict)

    @property
    def pipeline(self) -> str:
        """The diffusers class of its pipeline."""
        return str(self.index["_class_name"])

    @property
    def scheduler_class(self) -> str | None:
        """The class that model_index.json names for the scheduler; None where it names none."""
        return named_class(self.index.get("scheduler"))

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """The text encoders, in the order in which their states are concatenated."""
        return tuple(name for name in (TEXT, TEXT_2) if name in self.configs)


@contextmanager
def checkpoint_of(
    source: str | Path, revision: str | None = None, variant: str | None = None, choices: Choices = AS_THEY_ARE
) -> Iterator[Checkpoint]:
    """Yield the checkpoint of any source; folders are made, and removed, of presets, single files, VAEs and LoRAs.

    Args:
        source: as of `open_checkpoint` (revision, variant: too), "preset:NAME", or a single .safetensors file.
        choices: what the user decides about it.

    Raises:
        ExportError, UnsafeWeightsError, OutputError: as of `open_checkpoint`, `make_folder`; or TMPDIR has no room.
        AdapterError: a LoRA cannot be merged.
    """
    with tempfile.TemporaryDirectory(prefix="latentrt-") as room:
        try:
            checkpoint = _checkpoint(source, revision, variant, choices, Path(room))
            if loras := choices.loras:
                place = Path(room, "merged")
                checkpoint = with_loras(checkpoint, loras, place, allow_unmatched=choices.allow_unmatched)
        except OSError as error:
            if isinstance(error, LatentrtError) or not error.errno:
                raise
            raise OutputError(f"no temporary checkpoint ({error})", needed="room", fix="set TMPDIR") from error
        yield checkpoint


def _checkpoint(
    source: str | Path, revision: str | None, variant: str | None, choices: Choices, room: Path
) -> Checkpoint:
    """Open any source; folders that have to be made go into `room`."""
    name, path = str(source), Path(source)
    if choices.image_encoder and not (path.is_file() and ip_adapter.is_ip_adapter(path)):
        raise ExportError(f"--image-encoder with {source}", needed="an IP-Adapter's .safetensors file")
    if path.is_file() and path.suffix not in PICKLES:
        if revision or variant:
            raise ExportError(f"a revision or variant of the file {path}", needed="a folder, or the id of one")
        if ip_adapter.is_ip_adapter(path):
            return _ip_adapter(path, choices)
        tensors = open_tensors(path)
        if is_controlnet(tensors.shapes):
            notes = make_controlnet(tensors, room, choices)
            return replace(open_checkpoint(room), id=path.name, notes=notes)
        folder = choices.vae if choices.vae and Path(choices.vae).is_dir() else None
        notes = make_folder(path, room, replace(choices, vae=None) if folder else choices)
        single = replace(open_checkpoint(room), id=path.name, notes=notes)
        return _with_vae(single, Path(folder), room, choices.vae_note) if folder else single
    choices.check_folder(name)
    if name.startswith(PRESET):
        from latentrt_export.checkpoint.presets.make import make_checkpoint

        checkpoint = replace(open_checkpoint(make_checkpoint(name.removeprefix(PRESET), room / "preset")), id=name)
    else:
        checkpoint = open_checkpoint(source, revision, variant)
    if not choices.vae:
        return checkpoint
    return _with_vae(checkpoint, Path(choices.vae), room, choices.vae_note)


def _ip_adapter(path: Path, choices: Choices) -> Checkpoint:
    """Open an IP-Adapter's file, and its image encoder. Raise ExportError."""
    if options := replace(choices, image_encoder=None).options:
        option = options[0].partition("=")[0]
        raise ExportError(f"{option} with the IP-Adapter {path.name}", needed="a model", fix=f"leave out {option}")
    configs, files, notes = ip_adapter.ip_adapter_files(path, choices.image_encoder)
    return Checkpoint(path.parent, path.name, None, None, {"_class_name": "IP-Adapter"}, configs, {}, files, notes)


def _with_vae(checkpoint: Checkpoint, vae: Path, room: Path, note: str) -> Checkpoint:
    """Return a checkpoint with the VAE of another folder or file."""
    if UNET not in checkpoint.configs:
        raise ExportError(f"--vae with {checkpoint.id}, which is no model", needed="a model", fix="leave out --vae")
    own = checkpoint.configs.get(VAE)
    if own is not None and vae_class(own) == TINY and not vae.is_dir():
        found = f"--vae {vae.name} with {checkpoint.id}, whose VAE is an {TINY}"
        raise ExportError(found, needed="a folder: a file does not say how its latents are scaled")
    other = fitting(vae, own) if vae.is_dir() else vae_files(vae, room, own)
    files = {file: path for file, path in checkpoint.files.items() if not file.startswith(f"{VAE}/")}
    config = read_json(other[f"{VAE}/config.json"])
    index = {**checkpoint.index, VAE: ["diffusers", vae_class(config)]}
    configs, notes = {**checkpoint.configs, VAE: config}, (*checkpoint.notes, note)
    return replace(checkpoint, index=index, configs=configs, files=files | other, notes=notes)


def open_checkpoint(source: str | Path, revision: str | None = None, variant: str | None = None) -> Checkpoint:
    """Open a local diffusers folder, of a model or a VAE, or a hub id through huggingface_hub, which caches it.

    Args:
        source: a folder, or "owner/name".
        revision: branch, tag or commit of a hub id.
        variant: which weights to use where there are several ("fp16"). Networks without that variant, and all networks
            where it is None, have their plain ones, or the only ones.

    Raises:
        ExportError: it is no diffusers checkpoint, or one that the engine cannot serve; the message lists those it can.
            Or a file is broken, a part of another kind than it should be, or not there; the message names it.
        UnsafeWeightsError: a network has pickled weights only.
    """
    root, name, commit = _locate(source, revision, variant)
    if _is_alone(root):
        part, config, files, notes = (
            add_on_folder(root, variant) if is_add_on(root) else (VAE, *vae_folder(root, variant))
        )
        texts = {file: path for file, path in texts_of(root).items() if file != "config.json"}
        index = {"_class_name": vae_class(config) if part == VAE else config["_class_name"]}
        return Checkpoint(root, name, commit, license_of(root), index, {part: config}, {}, texts | files, notes)
    index = _index(root)
    parts = _parts(index)
    for part in parts:
        check_class(index, part, (UNETS[parts],) if part == UNET else CLASSES[part])
    homes = {part: _home(root, part) for part in parts}
    configs = {part: _config(home, part) for part, home in homes.items()}
    check_networks(configs, UNETS[parts], index["_class_name"])
    if VAE in configs:
        check_class(index, VAE, (vae_class(configs[VAE]),))
    weights = choose_weights(homes, variant)
    schedule = root / SCHEDULE if (root / SCHEDULE).is_file() else root / "scheduler_config.json"
    files = {name: path for name, path in texts_of(root).items() if path not in _flat(root, homes)}
    files[SCHEDULE] = schedule
    if EXTRA.get(index["_class_name"]) == LOW:
        check_class(index, LOW_SCHEDULER, CLASSES[LOW_SCHEDULER])
        read_schedule(root / LOW_SCHEDULE, named_class(index[LOW_SCHEDULER]))
        files[LOW_SCHEDULE] = root / LOW_SCHEDULE
    for part, home in homes.items():
        files |= {f"{part}/{f}": path for f, path in weights[part].files.items()}
        files[f"{part}/config.json"] = home / "config.json"
        if tokenizer := tokenizer_of(part):
            check_class(index, tokenizer, CLASSES[tokenizer])
            files |= {f"{tokenizer}/{f}": path for f, path in tokenizer_files(root / tokenizer).items()}
    notes = tuple(each.note for each in weights.values() if each.note)
    config = read_schedule(schedule, named_class(index.get("scheduler")))
    return Checkpoint(root, name, commit, license_of(root), index, configs, config, files, notes)


def _is_alone(root: Path) -> bool:
    """Return whether a folder holds one network that is no model by itself."""
    return is_vae(root) or is_add_on(root)


def tokenizer_of(part: str) -> str:
    """Return the folder of a text encoder's tokenizer; empty for other networks."""
    return part.replace("text_encoder", "tokenizer") if part.startswith("text_encoder") else ""


def _index(root: Path) -> dict[str, Any]:
    """Return model_index.json; where a UNet lies at the top by itself, as people save pixel models, its equivalent."""
    if (root / "model_index.json").is_file():
        return read_json(root / "model_index.json")
    scheduler = read_json(root / "scheduler_config.json").get("_class_name")
    pipeline = "DDIMPipeline" if scheduler == "DDIMScheduler" else "DDPMPipeline"
    return {"_class_name": pipeline, UNET: ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", scheduler]}


def _home(root: Path, part: str) -> Path:
    """Return where a network lies: in a folder of its name or, where there is none, at the top, as diffusers has it."""
    if not (root / part).is_dir() and not (root / "config.json").is_file():
        raise ExportError(f"{root} has no folder {part}", needed=f"{part}/config.json and weights", fix=AGAIN)
    return root / part if (root / part).is_dir() else root


def _config(home: Path, part: str) -> Mapping[str, Any]:
    config = read_json(home / "config.json")
    return text_config(config) if tokenizer_of(part) else config


def _flat(root: Path, homes: Mapping[str, Path]) -> list[Path]:
    """Return the files at the top that belong to a network or the scheduler."""
    return [root / name for name in ("config.json", "scheduler_config.json")] if root in homes.values() else []


def _locate(source: str | Path, revision: str | None, variant: str | None) -> tuple[Path, str, str | None]:
    """Return the checkpoint's folder, its id, and its commit where it comes from the hub."""
    path = Path(source)
    if path.is_dir():
        flat = (path / "config.json").is_file() and (path / "scheduler_config.json").is_file()
        if not flat and not _is_alone(path) and not (path / "model_index.json").is_file():
            raise ExportError(
                f"{path} has no model_index.json", needed="a diffusers checkpoint folder", fix=FOLDER_OR_ID
            )
        return path, path.resolve().name, None
    if path.is_file():
        raise _single_file(path)
    if path.suffix == ".safetensors":
        raise ExportError(f"there is no file {source}", needed="a single .safetensors file")
    if not HUB_ID.fullmatch(str(source)):
        raise ExportError(f"there is no folder {source}", needed="a diffusers checkpoint", fix=FOLDER_OR_ID)
    root = download(str(source), revision, variant, _has_weights)
    return root, str(source), root.name if root.parent.name == "snapshots" else revision


def _single_file(path: Path) -> ExportError | UnsafeWeightsError:
    if path.suffix in PICKLES:
        needed, fix = "safetensors; pickles can run code", "get the model as .safetensors"
        return UnsafeWeightsError(f"{path} holds pickled weights", needed=needed, fix=fix)
    return ExportError(f"{path} is a file", needed="a diffusers checkpoint folder", fix="use checkpoint_of")


def _has_weights(root: Path) -> bool:
    """Return whether every network of a checkpoint has safetensors of some kind."""
    if _is_alone(root):
        return any(root.glob("*.safetensors"))
    return all(any(_home(root, part).glob("*.safetensors")) for part in _parts(_index(root)))


def _parts(index: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the networks of the checkpoint's pipeline; SDXL's refiner has the second text encoder alone."""
    kind = index.get("_class_name")
    if not isinstance(kind, str) or kind not in PIPELINES:
        raise ExportError(f"model_index.json names the pipeline {kind!r}", needed=f"one of {', '.join(PIPELINES)}")
    parts = PIPELINES[kind]
    return REFINER if parts == XL and index.get(TEXT) == [None, None] else parts


def check_class(index: Mapping[str, Any], part: str, classes: Sequence[str]) -> None:
    """Refuse a part of another class; model_index.json has ["library", "class"] for each."""
    name = named_class(index.get(part))
    if name not in classes:
        raise unsupported(f"{part} {name or index.get(part)!r} in model_index.json", " or ".join(classes))


def named_class(entry: object) -> str | None:
    """Return the class of a part's entry in model_index.json, ["library", "class"]; None where it has another form."""
    return entry[1] if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str) else None
