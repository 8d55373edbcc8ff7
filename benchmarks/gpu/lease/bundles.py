"""The bundles of a lease: more graphs beside the rewritten ones, and packs for a machine without network.

A pack is a preset's bundle without its weights. Those are random and are made again where it is unpacked, to the same
bytes: all hashes of the manifest are checked there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.gpu.variants import PLAIN
from latentrt.bundle.bundle import MANIFEST, Bundle, read_manifest, sha256_of
from latentrt.bundle.manifest import SCHEMA
from latentrt.bundle.spec import ADAPTED, FP16_ORT_CUDA, ModelSpec, Variant
from latentrt.storage import write_atomic

SIDECAR = ".extra.safetensors"  # constants of a graph, which no checkpoint has


def add_graphs(root: Path) -> None:
    """Add, where they are missing, two kinds of variants to the networks of a bundle, in its manifest too: the plain
    graph for ONNX Runtime on CUDA, and graphs that take LoRAs of each lane.
    """
    from latentrt_export.graphs.cuda_graph import cuda_variants
    from latentrt_export.variants import add_adapters

    before, files = Bundle.open(root, check_hashes=False).spec, read_manifest(root)["files"]
    spec, known = before, {name for network in before.networks.values() for name in network.variants}
    if PLAIN not in known:
        plain = {name: one.variants[FP16_ORT_CUDA] for name, one in cuda_variants(root, spec).networks.items()}
        spec = _with(spec, {name: {PLAIN: variant} for name, variant in plain.items()})
    if not any(name.endswith(ADAPTED) for name in known):
        spec = add_adapters(root, spec)
    if spec == before:
        return
    for path in {one.path for network in spec.networks.values() for one in network.variants.values()} - set(files):
        files[path] = {"sha256": sha256_of(root / path), "bytes": (root / path).stat().st_size}
    manifest = {"schema": SCHEMA, "model": asdict(spec), "files": dict(sorted(files.items()))}
    write_atomic(root / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False).encode() + b"\n", 0o644)


def _with(spec: ModelSpec, variants: Mapping[str, Mapping[str, Variant]]) -> ModelSpec:
    """Return a model with more variants, by network and name."""
    networks = {
        name: replace(one, variants={**one.variants, **variants.get(name, {})}) for name, one in spec.networks.items()
    }
    return replace(spec, networks=networks)


def pack(bundles: Sequence[Path], folder: Path) -> dict[str, int]:
    """Copy bundles without their weights into `folder`; return the bytes of each."""
    sizes = {}
    for root in bundles:
        add_graphs(root)
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
