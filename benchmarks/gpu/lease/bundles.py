"""The bundles of a lease: the plain graph beside the rewritten one, and packs for a machine without network.

A pack is a preset's bundle without its weights. Those are random and are made again where it is unpacked, to the same
bytes: all hashes of the manifest are checked there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.gpu.variants import PLAIN
from latentrt.bundle.bundle import MANIFEST, Bundle, read_manifest, sha256_of
from latentrt.bundle.manifest import SCHEMA
from latentrt.bundle.spec import FP16_ORT_CUDA
from latentrt.storage import write_atomic

SIDECAR = ".extra.safetensors"  # constants of a graph, which no checkpoint has


def add_plain(root: Path) -> None:
    """Add the plain graph for ONNX Runtime on CUDA to every network of a bundle, as a variant of the manifest."""
    from latentrt_export.graphs.cuda_graph import cuda_variants

    spec, files = Bundle.open(root, check_hashes=False).spec, read_manifest(root)["files"]
    if all(PLAIN in network.variants for network in spec.networks.values()):
        return
    networks = {}
    for name, network in cuda_variants(root, spec).networks.items():
        plain, known = network.variants[FP16_ORT_CUDA], spec.networks[name]
        networks[name] = replace(known, variants={**known.variants, PLAIN: plain})
        files[plain.path] = {"sha256": sha256_of(root / plain.path), "bytes": (root / plain.path).stat().st_size}
    manifest = {"schema": SCHEMA, "model": asdict(replace(spec, networks=networks)), "files": files}
    write_atomic(root / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False).encode() + b"\n", 0o644)


def pack(bundles: Sequence[Path], folder: Path) -> dict[str, int]:
    """Copy bundles without their weights into `folder`; return the bytes of each."""
    sizes = {}
    for root in bundles:
        add_plain(root)
        shutil.copytree(root, folder / root.name, ignore=_weights, dirs_exist_ok=True)
        sizes[root.name] = sum(path.stat().st_size for path in (folder / root.name).rglob("*") if path.is_file())
    return sizes


def _weights(_: str, names: list[str]) -> list[str]:
    return [name for name in names if name.endswith(".safetensors") and not name.endswith(SIDECAR)]


class Unpacker:
    """Makes a bundle of a pack, in a process of its own."""

    def unpack(self, preset: str, packed: Path, root: Path) -> None:
        """Make a preset's weights, and put the packed files beside them.

        Raises:
            HashMismatchError: the weights are not those that the pack was made with.
        """
        from latentrt_export.checkpoint.presets.make import make_checkpoint

        part = root.with_name(f"{root.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        make_checkpoint(preset, part)
        shutil.copytree(packed, part, dirs_exist_ok=True)
        Bundle.open(part)
        part.rename(root)

    def close(self) -> None:
        """Do nothing: the process ends next."""
