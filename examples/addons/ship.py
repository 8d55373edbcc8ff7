"""From what was trained to what is shipped: a bundle of each ControlNet, a folder of each LoRA, with their cards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from looks import LOOKS

from latentrt_export.to_bundle import export_bundle

CARDS = Path(__file__).parent
OTHERS_SHOWN = 8
CARD = "README.md"


def pack(work: Path, name: str) -> Path:
    """Write `work`/shipped/emoji-NAME, and return it: with a card, if `judge` has been there."""
    target = shipped(work, name)
    if name in LOOKS:
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(work / f"{target.name}.safetensors", target)
    else:
        export_bundle(str(work / target.name), target, overwrite=True)
    found = work / name / "found.json"
    if found.exists():
        (target / CARD).write_text(card(name, json.loads(found.read_text()), target))
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"{target}: {size / 1e6:.2f} MB")
    return target


def shipped(work: Path, name: str) -> Path:
    """The folder that an add-on is written to."""
    return work / "shipped" / f"emoji-{name}"


def card(name: str, found: dict[str, Any], folder: Path) -> str:
    """The card of an add-on, with what was measured."""
    figures: dict[str, Any] = {"name": name}
    for case, value in found.items():
        figures |= {f"{case}_{key}": one for key, one in value.items()} if isinstance(value, dict) else {case: value}
    figures["kilobytes"] = round(sum(path.stat().st_size for path in folder.glob("**/*.safetensors")) / 1e3)
    return (CARDS / f"CARD-{name}.md").read_text().format(**figures)
