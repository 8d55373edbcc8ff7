"""A LoRA on a base: merged, against what diffusers fuses, and with a request, against what is merged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from latentrt.adapters.given import Lora
from latentrt.adapters.memory import held_by
from latentrt.adapters.merge import merge_of
from latentrt.adapters.mixed import RANK
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.tensors import open_tensors
from latentrt.engine import Engine
from latentrt.errors import AdapterError, RequestError
from latentrt_export.graphs.to_onnx import quiet
from latentrt_export.verify.checks import Array, Check, not_served, psnr
from latentrt_export.verify.images import image_checks, run_engine, run_of
from latentrt_export.verify.reference import PROMPTS, Run, Theirs

Networks = Mapping[str, torch.dtype]
NAME = "lora"
WITH_REQUEST = "with each request"
MERGED_BOUND, HALF_BOUND = 60.0, 45.0  # dB: half is of weights in 16 bits, to which merged ones are rounded
STORED = {"F16": torch.float16, "BF16": torch.bfloat16}


def lora_checks(lora: Lora, base: Bundle, checkpoint: Path, steps: int) -> Iterator[Check]:
    """Measure pictures with a LoRA.

    Args:
        lora: its file, and how strong.
        base: the model's bundle; pictures that name LoRAs need graphs that take them (`--adapters`).
        checkpoint: what diffusers opens of the base, a plain folder.
        steps: of each run.

    Raises:
        AdapterError: the LoRA does not fit the base.
    """
    stored = stored_of(checkpoint)
    with Engine.load(base.root, check_hashes=False, cache=False, lora=[lora]) as engine:
        pipelines = Theirs(checkpoint, engine)
        if why := fuse(pipelines.pipeline(), lora, stored):
            note = f"diffusers does not fuse it ({why})"
            yield Check("image", f"{lora} merged", "not compared", None, MERGED_BOUND, note=note)
        else:
            yield from image_checks(engine, pipelines, steps, solvers=[None], guidances=[3.0])
        run = run_of(engine, PROMPTS, {"steps": steps, "seed": 7, "guidance": 3.0})
        merged = run_engine(engine, run)[1]
    yield named_check(lora, base, run, merged, HALF_BOUND if stored else MERGED_BOUND)


def named_check(lora: Lora, base: Bundle, run: Run, merged: Array, bound: float) -> Check:
    """Compare pictures that name a LoRA with those of the base into which it is merged."""
    what = f"{lora} {WITH_REQUEST}"
    settings = {**run.settings, "lora": {NAME: (lora.unet, lora.text)}}
    try:
        engine = Engine.load(
            base.root,
            check_hashes=False,
            cache=False,
            adapters={NAME: lora.path},
            adapter_rank=max(RANK, rank_of(lora, base)),
        )
        with engine:
            pictures = run_engine(engine, run._replace(settings=settings))[1]
    except (AdapterError, RequestError) as error:
        return not_served("image", what, bound, error)
    return Check("image", what, "PSNR to the merged one, dB", psnr(pictures, merged), bound, at_least=True)


def rank_of(lora: Lora, base: Bundle) -> int:
    """Return the largest rank of a LoRA's products; 0 where it has none."""
    added = merge_of(held_by(base).base, [lora]).added.values()
    return max((len(factors[0]) for ((change, _),) in added if (factors := change.factors())), default=0)


def stored_of(checkpoint: Path) -> Networks:
    """Return the networks of a checkpoint whose weights are stored in 16 bits, with their dtype.

    A network with weights of several dtypes is left out.
    """
    found = {}
    for folder in sorted(path for path in checkpoint.iterdir() if path.name.startswith(("unet", "text_encoder"))):
        files = [open_tensors(path) for path in folder.glob("*.safetensors")]
        dtypes = {entry.dtype for file in files for entry in file.entries.values()}
        if len(dtypes) == 1 and (dtype := STORED.get(dtypes.pop())) is not None:
            found[folder.name] = dtype
    return found


def fuse(pipe: Any, lora: Lora, stored: Networks) -> str:
    """Fuse a LoRA into a diffusers pipeline as its users do; return why that fails, or nothing.

    What is stored in 16 bits is rounded to that afterwards, as a merged bundle stores it.
    """
    file = lora.path / "adapter_model.safetensors" if lora.path.is_dir() else lora.path
    strengths = {"unet": lora.unet, "text_encoder": lora.text, "text_encoder_2": lora.text}
    try:
        with quiet():
            pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name=NAME)
            changed = pipe.get_list_adapters()
            if not changed:
                return "it finds no weights in it"
            pipe.set_adapters(NAME, {name: strengths[name] for name in changed})
            pipe.fuse_lora(components=list(changed))
            pipe.unload_lora_weights()
    except Exception as error:  # torch and its libraries raise anything
        return f"{type(error).__name__}: {error}"
    for name, dtype in stored.items():
        for parameter in getattr(pipe, name).parameters():
            parameter.data = parameter.data.to(dtype).to(torch.float32)
    return ""
