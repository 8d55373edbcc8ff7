"""The bundles of a lease: the plain graph beside the rewritten one, and packs for a machine without network.

A pack is a preset's bundle without its weights. Those are random and are made again where it is unpacked, to the same
bytes: all hashes of the manifest are checked there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path, PurePosixPath

from benchmarks.gpu.variants import PLAIN
from latentrt.bundle.bundle import MANIFEST, Bundle, read_manifest, sha256_of
from latentrt.bundle.manifest import SCHEMA
from latentrt.bundle.spec import FP16, FP32
from latentrt.storage import write_atomic

SIDECAR = ".extra.safetensors"  # constants of a graph, which no checkpoint has


def add_plain(root: Path) -> None:
    """Add the plain graph for ONNX Runtime on CUDA to every network of a bundle, as a variant of the manifest."""
    import onnx_ir as ir

    from latentrt_export.graphs.cuda_graph import for_cuda

    spec, files = Bundle.open(root, check_hashes=False).spec, read_manifest(root)["files"]
    networks = dict(spec.networks)
    for name, network in networks.items():
        if FP16 not in network.variants or PLAIN in network.variants:
            continue
        half = network.variants[FP16]
        path = str(PurePosixPath(network.variants[FP32].path).with_suffix(".plain.onnx"))
        model = ir.load(root / half.path)
        for_cuda(model, fused=False)
        ir.save(model, root / path)
        plain = replace(half, path=path, opset=model.opset_imports[""], nodes=len(model.graph), islands=None)
        networks[name] = replace(network, variants={**network.variants, PLAIN: plain})
        files[path] = {"sha256": sha256_of(root / path), "bytes": (root / path).stat().st_size}
    if networks != spec.networks:
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
        from latentrt_export.checkpoint.presets import make_checkpoint

        part = root.with_name(f"{root.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        make_checkpoint(preset, part)
        shutil.copytree(packed, part, dirs_exist_ok=True)
        Bundle.open(part)
        part.rename(root)

    def close(self) -> None:
        """Do nothing: the process ends next."""
