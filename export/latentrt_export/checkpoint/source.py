"""Open a diffusers checkpoint: find its files, choose its weights, refuse what the engine cannot serve.

Nothing is loaded here, and nothing of a checkpoint is executed: JSON is read, safetensors are named.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from latentrt.bundle.bundle import PICKLES
from latentrt.errors import ExportError, MissingDependencyError, UnsafeWeightsError
from latentrt_export.checkpoint.served import check_networks, unsupported

TEXT, TEXT_2, UNET, VAE = "text_encoder", "text_encoder_2", "unet", "vae"
SD, XL, PIXELS = (TEXT, UNET, VAE), (TEXT, TEXT_2, UNET, VAE), (UNET,)
PIPELINES = {  # the networks of each
    "StableDiffusionPipeline": SD,
    "StableDiffusionImg2ImgPipeline": SD,
    "StableDiffusionInpaintPipeline": SD,
    "LatentConsistencyModelPipeline": SD,
    "StableDiffusionXLPipeline": XL,
    "StableDiffusionXLImg2ImgPipeline": XL,
    "StableDiffusionXLInpaintPipeline": XL,
    "DDPMPipeline": PIXELS,
    "DDIMPipeline": PIXELS,
}
CLASSES = {
    TEXT: ("CLIPTextModel",),
    TEXT_2: ("CLIPTextModelWithProjection",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
    VAE: ("AutoencoderKL",),
}
UNETS = {SD: "UNet2DConditionModel", XL: "UNet2DConditionModel", PIXELS: "UNet2DModel"}
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
HUB_WEIGHTS = ("text_encoder*/*.safetensors", "unet/*.safetensors", "vae/*.safetensors", "*.safetensors")
HUB_PATTERNS = ("*.json", "*.txt", "README.md", "LICENSE*", *HUB_WEIGHTS)
HUB_VARIANTS = ("*.fp16.*", "*.fp16-*", "*.bf16.*", "*.bf16-*", "*.non_ema.*", "*.non_ema-*")
PRESET = "preset:"
FOLDER_OR_ID = "pass a folder that has a model_index.json, or the id of one on the hub"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that can be exported.

    Attributes:
        root: its folder.
        id, revision, license: where known.
        index: model_index.json, with the pipeline's class and a class for each part.
        configs: config.json of each network that it has: "text_encoder", "text_encoder_2", "unet", "vae".
        scheduler: scheduler_config.json.
        files: where each file of a bundle is now: configs, tokenizers and weights (safetensors, chosen variants under
            their plain names).
        graphs: ONNX graphs that exist already, by network; empty where networks are traced.
        notes: what of it is left out, for the summary.
    """

    root: Path
    id: str
    revision: str | None
    license: str | None
    index: Mapping[str, Any]
    configs: Mapping[str, Mapping[str, Any]]
    scheduler: Mapping[str, Any]
    files: Mapping[str, Path]
    graphs: Mapping[str, Path] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def pipeline(self) -> str:
        """The diffusers class of its pipeline."""
        return str(self.index["_class_name"])

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """The text encoders, in the order in which their states are concatenated."""
        return tuple(name for name in (TEXT, TEXT_2) if name in self.configs)


@contextmanager
def checkpoint_of(source: str | Path, revision: str | None = None, variant: str | None = None) -> Iterator[Checkpoint]:
    """Yield `open_checkpoint`'s result; for "preset:NAME", a checkpoint with random weights, temporary."""
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
        ExportError: it is no diffusers checkpoint, or one that the engine cannot serve; the message lists those it can.
        UnsafeWeightsError: a network has pickled weights only.
    """
    root, name, commit = _locate(source, revision, variant)
    index = _index(root)
    parts = _parts(index)
    for part in (*parts, *map(tokenizer_of, parts)):
        _check_class(index, part)
    homes = {part: _home(root, part) for part in parts}
    configs = {part: read_json(home / "config.json") for part, home in homes.items()}
    check_networks(configs, UNETS[parts])
    schedule = root / SCHEDULE if (root / SCHEDULE).is_file() else root / "scheduler_config.json"
    files = {name: path for name, path in _texts(root).items() if path not in _flat(root, homes)}
    files[SCHEDULE] = schedule
    for part, home in homes.items():
        files |= {f"{part}/{f}": path for f, path in _weights(home, part, variant).items()}
        files[f"{part}/config.json"] = home / "config.json"
        tokenizer = tokenizer_of(part)
        here = {f: root / tokenizer / f for f in TOKENIZER_FILES} if tokenizer else {}
        files |= {f"{tokenizer}/{f}": path for f, path in here.items() if path.is_file()}
    return Checkpoint(root, name, commit, license_of(root), index, configs, read_json(schedule), files)


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
    return root / part if (root / part).is_dir() else root


def _flat(root: Path, homes: Mapping[str, Path]) -> list[Path]:
    """Return the files at the top that belong to a network or the scheduler."""
    return [root / name for name in ("config.json", "scheduler_config.json")] if root in homes.values() else []


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object of a checkpoint. Raise an ExportError that names the file where it holds none."""
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
    """Return the checkpoint's folder, its id, and its commit where it comes from the hub."""
    path = Path(source)
    if path.is_dir():
        flat = (path / "config.json").is_file() and (path / "scheduler_config.json").is_file()
        if not flat and not (path / "model_index.json").is_file():
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
            needed="this package, to download",
            fix="pip install 'latentrt[export]'",
        ) from error

    def download(ignored: Sequence[str]) -> Path:
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=[*HUB_PATTERNS], ignore_patterns=[*ignored])
        )

    try:
        root = download(() if variant else HUB_VARIANTS)
        if not _has_weights(root):
            root = download(())  # it has variants only
    except (OSError, ValueError) as error:  # every error of huggingface_hub is one or the other
        raise ExportError(
            f"{repository} is no folder here and cannot be downloaded ({error})",
            needed="a local diffusers folder, or the hub",
            fix="check the id, the revision and the network; for a gated model: hf auth login",
        ) from error
    return root


def _has_weights(root: Path) -> bool:
    """Return whether every network of a checkpoint has safetensors of some kind."""
    return all(any(_home(root, part).glob("*.safetensors")) for part in _parts(_index(root)))


def _parts(index: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the networks of the checkpoint's pipeline."""
    kind = index.get("_class_name")
    if kind not in PIPELINES:
        raise ExportError(f"model_index.json names the pipeline {kind!r}", needed=f"one of {', '.join(PIPELINES)}")
    if index.get("requires_aesthetics_score"):
        raise unsupported("an SDXL refiner (requires_aesthetics_score)", "an SDXL base model")
    return PIPELINES[kind]


def _check_class(index: Mapping[str, Any], part: str) -> None:
    entry = index.get(part) or [None, None]
    if part in CLASSES and entry[1] not in CLASSES[part]:
        raise unsupported(f"{part} {entry[1]!r} in model_index.json", " or ".join(CLASSES[part]))


def _texts(root: Path) -> dict[str, Path]:
    """Return licence, model card and small data files at the top of a checkpoint: they are copied with the weights."""
    kept = [p for p in sorted(root.iterdir()) if p.is_file() and _is_text(p)]
    return {p.name: p for p in kept}


def _is_text(path: Path) -> bool:
    generated = path.name in ("manifest.json", "model_index.json")
    return not generated and (path.suffix in (".md", ".txt", ".json") or path.name.startswith(("LICENSE", "NOTICE")))


def _weights(folder: Path, part: str, variant: str | None) -> dict[str, Path]:
    """Return the safetensors to use of a network, by name in the bundle: one file, or an index and its shards."""
    stem = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
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
    """Return single files and shard indexes by variant ("" is the plain one); a single file wins."""
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


def license_of(root: Path) -> str | None:
    """Return the licence in the model card's front matter."""
    card = root / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    named = re.search(r"^license:\s*['\"]?([^'\"\n]+)", front[1], re.MULTILINE) if front else None
    return named[1].strip() if named else None
