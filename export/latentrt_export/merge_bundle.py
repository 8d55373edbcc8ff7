"""LoRAs for a bundle, without torch: merged into it, or taken with each request.

Merged: the bundle's own files stay as they are, changed weights lie in a file beside them.
Graphs read a changed weight from the new file and all others from the base's. Half precision is measured again, since
other weights overflow elsewhere. diffusers would read the base's weights alone, so that the new bundle has no
model_index.json.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

import onnx_ir as ir

from latentrt.adapters.given import Lora
from latentrt.adapters.memory import Place, merge_into
from latentrt.adapters.merge import Merge, Weight
from latentrt.bundle.bundle import MANIFEST, Bundle
from latentrt.bundle.spec import ADAPTED, FP32, INT8_ORT_CPU
from latentrt.bundle.tensors import header_of, open_tensors
from latentrt.errors import BundleError, ExportError
from latentrt_export.int8 import add_int8
from latentrt_export.place import place
from latentrt_export.to_bundle import GRAPH_ROOM, Measure, NetworkSummary, Progress, Summary, finish
from latentrt_export.variants import add_adapters, add_control, add_cpu, add_half, add_image_prompts

STEM = "with_lora"
LEFT_OUT = (MANIFEST, "model_index.json")


def merge_bundle(
    source: Path,
    target: Path,
    loras: Sequence[Lora],
    *,
    allow_unmatched: bool = False,
    adapters: bool = False,
    progress: Progress = lambda part, done, total: None,
    overwrite: bool = False,
    golden: Measure | None = None,
) -> Summary:
    """Merge LoRAs into the bundle `source`, as the bundle `target`.

    Args:
        source: a bundle made from a checkpoint; its hashes are checked.
        target, progress, overwrite, golden: as of `export_bundle`.
        loras, allow_unmatched: as of `merge_into`; or no LoRAs, with `adapters`.
        adapters: whether to write graphs that take LoRAs with each request (`variants.add_adapters`); a bundle that has
            them keeps them.

    Raises:
        AdapterError: as of `merge_into` and `Merge.value`.
        ExportError: the bundle is no model's; or as of `add_adapters`.
        BundleError: the source is damaged.
        OutputError: the target exists, or cannot be written, or has no room.
    """
    bundle = Bundle.open(source)
    if not bundle.spec.draws:
        raise ExportError(f"LoRAs for {bundle.spec.id}, which has no UNet", needed="the bundle of a model")
    merge, places = merge_into(bundle, loras, allow_unmatched=allow_unmatched) if loras else (Merge({}, {}), {})
    networks = bundle.spec.networks
    adapters |= any(name.endswith(ADAPTED) for one in networks.values() for name in one.variants)
    names = [name for name in bundle.files if name not in (LEFT_OUT if loras else (MANIFEST,))]
    size = sum(bundle.files[name].bytes for name in names) + _bytes(merge) + GRAPH_ROOM * len(networks)
    parts = ("copy", "weights", "graphs", "manifest")
    with place(target, source, size, overwrite=overwrite) as root:
        progress(parts[0], 0, len(parts))
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.path(name), root / name)
        progress(parts[1], 1, len(parts))
        summaries = _write_weights(bundle, root, merge, places)
        progress(parts[2], 2, len(parts))
        notes = (*(f"LoRA {lora} merged" for lora in loras), *merge.notes)
        told = (*notes, "takes LoRAs with each request") if adapters else notes
        spec, before = bundle.spec, bundle.spec.made
        command = " ".join(["latentrt export", spec.id, *(f"--lora={lora}" for lora in loras)])
        made = {**before, "command": command, "base": before.get("command"), "notes": list(notes)}
        if loras:
            spec = add_cpu(root, add_half(root, replace(spec, made=made, golden=())))
            spec = add_image_prompts(root, add_control(root, spec))
        if loras and INT8_ORT_CPU in spec.networks[spec.denoiser].variants:
            spec, note = add_int8(root, spec)
            told = (*told, note)
        spec = add_adapters(root, spec) if adapters else spec
        progress(parts[3], 3, len(parts))
        total = finish(root, spec, golden if loras else None)
    return Summary(summaries, total, told)


def _bytes(merge: Merge) -> int:
    entries = (merge.base[weight.network][weight.name].entries[weight.name] for weight in merge.added)
    return sum(entry.length for entry in entries)


def _write_weights(
    bundle: Bundle, root: Path, merge: Merge, places: Mapping[Place, Weight]
) -> dict[str, NetworkSummary]:
    """Write the changed weights of each folder, and let its float32 graphs read them; return what was written."""
    summaries = {}
    for folder in dict.fromkeys(str(PurePosixPath(file).parent) for file, _ in places):
        start = time.perf_counter()
        own = {key: weight for key, weight in places.items() if str(PurePosixPath(key[0]).parent) == folder}
        path = _write(root / folder, merge, list(own.values()))
        graphs = [network.variants[FP32] for network in bundle.spec.networks.values()]
        paths = [root / graph.path for graph in graphs if str(PurePosixPath(graph.path).parent) == folder]
        nodes = sum(_point(each, folder, path, own) for each in paths)
        graph_bytes, written = sum(each.stat().st_size for each in paths), path.stat().st_size
        network = next(iter(own.values())).network
        summaries[network] = NetworkSummary(time.perf_counter() - start, nodes, graph_bytes, 0, written)
    return summaries


def _write(folder: Path, merge: Merge, weights: Sequence[Weight]) -> Path:
    """Write changed weights, one of them in memory at a time, under a name that the folder does not have."""
    others = len(list(folder.glob(f"{STEM}*.safetensors")))
    path = folder / (f"{STEM}_{others + 1}.safetensors" if others else f"{STEM}.safetensors")
    entries = {weight.name: merge.base[weight.network][weight.name].entries[weight.name] for weight in weights}
    with path.open("wb") as file:
        file.write(header_of({name: (entry.dtype, entry.shape) for name, entry in entries.items()}))
        for weight in weights:
            file.write(merge.value(weight).tobytes())
    return path


def _point(graph: Path, folder: str, file: Path, places: Mapping[Place, Weight]) -> int:
    """Let a graph read weights from another file where it has them; return its number of nodes."""
    model, entries = ir.load(graph), open_tensors(file).entries
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        weight = places.get((f"{folder}/{tensor.location}", tensor.offset or 0))
        if weight is not None:
            entry = entries[weight.name]
            if math.prod(tensor.shape) != math.prod(entry.shape):
                raise BundleError(f"{graph} reads {weight.name} in other sizes", needed="those of its file")
            value.const_value = ir.ExternalTensor(
                *(file.name, entry.offset, entry.length, tensor.dtype),
                shape=tensor.shape,
                name=tensor.name,
                base_dir=file.parent,
            )
    ir.save(model, graph)
    return len(model.graph)
