"""A repository of the hub: its JSON, texts and safetensors; pickles and code are never downloaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from latentrt.errors import ExportError, MissingDependencyError

WEIGHTS = ("text_encoder*/*.safetensors", "unet/*.safetensors", "vae/*.safetensors", "*.safetensors")
PATTERNS = ("*.json", "*.txt", "README.md", "LICENSE*", *WEIGHTS)
VARIANTS = ("*.fp16.*", "*.fp16-*", "*.bf16.*", "*.bf16-*", "*.non_ema.*", "*.non_ema-*")


def download(repository: str, revision: str | None, variant: str | None, has_weights: Callable[[Path], bool]) -> Path:
    """Fetch a repository into the hub's cache; return its folder.

    Args:
        repository: its id.
        revision: branch, tag or commit.
        variant: of the weights; None: variants are fetched only where the rest is not whole.
        has_weights: says whether a folder is whole.

    Raises:
        MissingDependencyError: huggingface_hub is not installed.
        ExportError: it cannot be downloaded.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingDependencyError(
            f"huggingface_hub cannot be imported ({error})",
            needed="this package, to download",
            fix="pip install 'latentrt[export]'",
        ) from error

    def fetch(ignored: Sequence[str]) -> Path:
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=[*PATTERNS], ignore_patterns=[*ignored])
        )

    try:
        root = fetch(() if variant else VARIANTS)
        if not has_weights(root):
            root = fetch(())  # it has variants only
    except (OSError, ValueError) as error:  # every error of huggingface_hub is one or the other
        raise ExportError(
            f"{repository} is no folder here and cannot be downloaded ({error})",
            needed="a local diffusers folder, or the hub",
            fix="check the id, the revision and the network; for a gated model: hf auth login",
        ) from error
    return root
