"""From what was trained to what is shipped: a bundle of each ControlNet, a folder of each LoRA, with their cards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from looks import LOOKS

from latentrt_export.to_bundle import export_bundle

CARDS = Path(__file__).parent


def pack(work: Path, name: str) -> None:
    """Write `work`/shipped/emoji-NAME."""
    target = shipped(work, name)
    if name in LOOKS:
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(work / f"{target.name}.safetensors", target)
    else:
        export_bundle(str(work / target.name), target, overwrite=True)
    print(f"{target}: {_bytes(target) / 1e6:.2f} MB")


def card(work: Path, name: str) -> None:
    """Write its card, with what `judge` found."""
    target, found = shipped(work, name), json.loads((work / name / "found.json").read_text())
    figures: dict[str, Any] = {"kilobytes": round(_bytes(target, "*.safetensors") / 1e3)}
    for case, value in found.items():
        if isinstance(value, dict):
            figures |= {f"{case}_{key}": one for key, one in value.items()}
        figures[case] = value
    (target / "README.md").write_text((CARDS / f"CARD-{name}.md").read_text().format(**figures))


def shipped(work: Path, name: str) -> Path:
    """The folder that an add-on is written to: a bundle of a ControlNet, a folder with a LoRA's file."""
    return work / "shipped" / f"emoji-{name}"


def _bytes(folder: Path, names: str = "*") -> int:
    return sum(path.stat().st_size for path in folder.rglob(names) if path.is_file())
