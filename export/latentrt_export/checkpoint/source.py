"""Open a diffusers checkpoint: find its files, choose its weights, refuse what the engine cannot serve.

Nothing is loaded here, and nothing of a checkpoint is executed: JSON is read, safetensors are named.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from latentrt.bundle.bundle import PICKLES
from latentrt.errors import ExportError, MissingDependencyError, UnsafeWeightsError

FAMILIES = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionImg2ImgPipeline": "sd",
    "StableDiffusionInpaintPipeline": "sd",
    "LatentConsistencyModelPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
}
CLASSES = {
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
}
TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
SCHEDULE = "scheduler/scheduler_config.json"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_WEIGHTS = ("text_encoder*/*.safetensors", "unet/*.safetensors", "vae/*.safetensors")
HUB_PATTERNS = ("*.json", "*.txt", "README.md", "LICENSE*", *HUB_WEIGHTS)
HUB_VARIANTS = ("*.fp16.*", "*.fp16-*", "*.bf16.*", "*.bf16-*", "*.non_ema.*", "*.non_ema-*")
PRESET = "preset:"
FOLDER_OR_ID = "pass a folder that has a model_index.json, or the id of one on the hub"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that can be exported.

    `files` maps each file's place in a bundle to where it is now: configs, tokenizers and weights (safetensors, chosen
    variants under their plain names). `configs` are the networks' config.json, `index` is model_index.json.
    """

    root: Path
    id: str
    revision: str | None
    license: str | None
    family: str
    index: Mapping[str, Any]
    configs: Mapping[str, Mapping[str, Any]]
    tokenizers: tuple[str, ...]
    text_encoders: tuple[str, ...]
    files: Mapping[str, Path]


@contextmanager
def checkpoint_of(source: str | Path, revision: str | None = None, variant: str | None = None) -> Iterator[Checkpoint]:
    """`open_checkpoint`, and for "preset:NAME" a checkpoint with random weights, made for the time of the `with`."""
    name = str(source)
    if not name.startswith(PRESET):
        yield open_checkpoint(source, revision, variant)
        return
    from latentrt_export.checkpoint.presets import make_checkpoint

    with tempfile.TemporaryDirectory(prefix="latentrt-") as folder:
        yield replace(open_checkpoint(make_checkpoint(name.removeprefix(PRESET), Path(folder))), id=name)


def open_checkpoint(source: str | Path, revision: str | None = None, variant: str | None = None) -> Checkpoint:
    """Open a local diffusers folder, or a hub id through huggingface_hub (which then keeps it in its cache).

    Args:
        source: a folder, or "owner/name".
        revision: branch, tag or commit of a hub id.
        variant: which weights to use where there are several ("fp16"); None: the plain ones, or the only ones.

    Raises:
        ExportError: it is no diffusers checkpoint, or one that the engine cannot serve; the message names what is.
        UnsafeWeightsError: a network has pickled weights only.
    """
    root, name, commit = _locate(source, revision, variant)
    index = read_json(root / "model_index.json")
    family = _family(index)
    suffixes = ("", "_2") if family == "sdxl" else ("",)
    tokenizers = tuple(f"tokenizer{s}" for s in suffixes)
    encoders = tuple(f"text_encoder{s}" for s in suffixes)
    for part in (*tokenizers, *encoders, "unet", "vae"):
        _check_class(index, part)
    configs = {part: read_json(root / part / "config.json") for part in (*encoders, "unet", "vae")}
    _check_networks(configs, family)
    files = _texts(root) | {SCHEDULE: root / SCHEDULE}
    for part in tokenizers:
        files |= {f"{part}/{f}": root / part / f for f in TOKENIZER_FILES if (root / part / f).is_file()}
    for part in configs:
        files |= {f"{part}/{f}": path for f, path in _weights(root / part, variant).items()}
        files[f"{part}/config.json"] = root / part / "config.json"
    read_json(root / SCHEDULE)
    return Checkpoint(root, name, commit, _license(root), family, index, configs, tokenizers, encoders, files)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint, or an ExportError that names the file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(
            f"{path} cannot be read ({error})", needed="a JSON file", fix="download the checkpoint again"
        ) from error
    if not isinstance(data, dict):
        raise ExportError(f"{path} holds no JSON object", needed="a JSON object", fix="download the checkpoint again")
    return data


def _locate(source: str | Path, revision: str | None, variant: str | None) -> tuple[Path, str, str | None]:
    """The checkpoint's folder, its id, and its commit where it comes from the hub."""
    path = Path(source)
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise ExportError(
                f"{path} has no model_index.json", needed="a diffusers checkpoint folder", fix=FOLDER_OR_ID
            )
        return path, path.resolve().name, None
    if path.is_file():
        raise _single_file(path)
    if not HUB_ID.fullmatch(str(source)):
        raise ExportError(f"there is no folder {source}", needed="a diffusers checkpoint", fix=FOLDER_OR_ID)
    root = _download(str(source), revision, variant)
    return root, str(source), root.name if root.parent.name == "snapshots" else revision


def _single_file(path: Path) -> ExportError | UnsafeWeightsError:
    convert = (
        'python -c "from diffusers import StableDiffusionPipeline as P; '
        f"P.from_single_file('{path}').save_pretrained('FOLDER')\", then export FOLDER"
    )
    if path.suffix in PICKLES:
        return UnsafeWeightsError(
            f"{path} holds pickled weights", needed="safetensors; pickles can run code", fix=FOLDER_OR_ID
        )
    return ExportError(f"{path} is a single file", needed="a diffusers checkpoint folder", fix=convert)


def _download(repository: str, revision: str | None, variant: str | None) -> Path:
    """Fetch JSON, text and safetensors of a hub repository; pickles and code are never downloaded."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingDependencyError(
            f"huggingface_hub cannot be imported ({error})",
            needed="it, to download",
            fix="pip install 'latentrt[export]'",
        ) from error

    def download(ignored: Sequence[str]) -> Path:
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=[*HUB_PATTERNS], ignore_patterns=[*ignored])
        )

    try:
        root = download(() if variant else HUB_VARIANTS)
        if not all(any(root.glob(pattern)) for pattern in HUB_WEIGHTS):
            root = download(())  # it has variants only
    except (OSError, ValueError) as error:  # every error of huggingface_hub is one or the other
        raise ExportError(
            f"{repository} is no folder here and cannot be downloaded ({error})",
            needed="a local diffusers folder, or the hub",
            fix="check the id, the revision and the network; for a gated model: hf auth login",
        ) from error
    return root


def _family(index: Mapping[str, Any]) -> str:
    kind = index.get("_class_name")
    if kind not in FAMILIES:
        raise ExportError(
            f"model_index.json names the pipeline {kind!r}",
            needed=f"one of {', '.join(FAMILIES)}",
            fix="choose another checkpoint",
        )
    if index.get("requires_aesthetics_score"):
        raise _unsupported("an SDXL refiner (requires_aesthetics_score)", "an SDXL base model")
    return FAMILIES[kind]


def _check_class(index: Mapping[str, Any], part: str) -> None:
    entry = index.get(part) or [None, None]
    if entry[1] not in CLASSES[part]:
        raise _unsupported(f"{part} {entry[1]!r} in model_index.json", " or ".join(CLASSES[part]))


def _check_networks(configs: Mapping[str, Mapping[str, Any]], family: str) -> None:
    """Refuse what would need inputs that the engine does not feed."""
    unet, vae = configs["unet"], configs["vae"]
    channels = vae.get("latent_channels", 4)
    inputs, outputs = unet.get("in_channels", 4), unet.get("out_channels", 4)
    if inputs != channels:
        kind = "an inpainting UNet" if inputs == 9 else "a UNet"
        raise _unsupported(f"{kind} with in_channels {inputs}", f"in_channels {channels}, the VAE's latent channels")
    if outputs != channels:
        raise _unsupported(f"a UNet with out_channels {outputs}", f"out_channels {channels} (no learned variance)")
    for key in ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "time_cond_proj_dim"):
        if unet.get(key) is not None:
            raise _unsupported(f"a UNet with {key} {unet[key]!r}", f"{key} null")
    expected = "text_time" if family == "sdxl" else None
    if unet.get("addition_embed_type") != expected:
        raise _unsupported(
            f"a UNet with addition_embed_type {unet.get('addition_embed_type')!r}", f"{expected!r} in this pipeline"
        )
    if unet.get("attention_type", "default") != "default":
        raise _unsupported(f"a UNet with attention_type {unet['attention_type']!r}", "'default'")
    for key in ("latents_mean", "latents_std"):
        if vae.get(key) is not None:
            raise _unsupported(f"a VAE with {key}", f"{key} null (scaling_factor and shift_factor are served)")
    for part, config in configs.items():
        if config.get("use_attention_mask"):
            raise _unsupported(f"a {part} with use_attention_mask", "use_attention_mask false")


def _unsupported(found: str, needed: str) -> ExportError:
    return ExportError(f"the checkpoint has {found}", needed=needed, fix="choose another checkpoint")


def _texts(root: Path) -> dict[str, Path]:
    """Licence, model card and small data files at the top of a checkpoint: they travel with the weights."""
    kept = [p for p in sorted(root.iterdir()) if p.is_file() and _is_text(p)]
    return {p.name: p for p in kept}


def _is_text(path: Path) -> bool:
    generated = path.name in ("manifest.json", "model_index.json")
    return not generated and (path.suffix in (".md", ".txt", ".json") or path.name.startswith(("LICENSE", "NOTICE")))


def _weights(folder: Path, variant: str | None) -> dict[str, Path]:
    """The safetensors of one network to use, by their name in the bundle: one file, or an index and its shards."""
    stem = "model" if folder.name.startswith("text_encoder") else "diffusion_pytorch_model"
    found = _variants(folder, stem)
    if not found:
        raise _no_weights(folder, stem)
    chosen = variant if variant is not None else next(iter(found)) if len(found) == 1 else ""
    if chosen not in found:
        names = ", ".join(sorted(v or "(plain)" for v in found))
        raise ExportError(f"{folder} has the weights {names}", needed=f"variant {chosen or '(plain)'}")
    path = found[chosen]
    if path.suffix == ".safetensors":
        return {f"{stem}.safetensors": path}
    shards = sorted(set(read_json(path)["weight_map"].values()))
    for shard in shards:
        if Path(shard).name != shard or not (folder / shard).is_file() or not shard.endswith(".safetensors"):
            raise ExportError(
                f"{path} names the shard {shard!r}", needed="a safetensors beside it", fix="download it again"
            )
    return {f"{stem}.safetensors.index.json": path} | {shard: folder / shard for shard in shards}


def _variants(folder: Path, stem: str) -> dict[str, Path]:
    """Single files and shard indexes by variant ("" is the plain one); a single file wins."""
    patterns = (rf"{stem}\.safetensors\.index(\.(?P<v>\w+))?\.json", rf"{stem}(\.(?P<v>\w+))?\.safetensors")
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    matches = [m for pattern in patterns for name in names if (m := re.fullmatch(pattern, name))]
    return {m["v"] or "": folder / m.string for m in matches}


def _no_weights(folder: Path, stem: str) -> ExportError | UnsafeWeightsError:
    pickles = [p for p in sorted(folder.glob("*")) if p.suffix in PICKLES]
    if pickles:
        return UnsafeWeightsError(
            f"{pickles[0]} holds pickled weights, and there are no safetensors beside it",
            needed="safetensors; pickles can run code",
            fix="use a revision that has safetensors, or convert it where you trust it: save_pretrained(FOLDER)",
        )
    return ExportError(f"{folder} has no weights", needed=f"{stem}.safetensors", fix="download the checkpoint again")


def _license(root: Path) -> str | None:
    """The licence that the model card's front matter names."""
    card = root / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    named = re.search(r"^license:\s*['\"]?([^'\"\n]+)", front[1], re.MULTILINE) if front else None
    return named[1].strip() if named else None
