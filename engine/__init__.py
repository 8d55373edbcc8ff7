"""latentrt's engine: Stable Diffusion without torch.

Names are imported when they are first used, so that `import engine` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from engine.bundle import Bundle
    from engine.denoiser import Denoiser
    from engine.errors import LatentrtError
    from engine.guidance import Guidance
    from engine.image import grid, read_settings, save
    from engine.job import Job
    from engine.lanes import HostLanes
    from engine.noise import noise_source
    from engine.pipeline import Engine
    from engine.request import Request
    from engine.schedule import Schedule
    from engine.solvers import SOLVERS
    from engine.table import Row, Table, advance, preview, tabulate

_HOME = {
    "Bundle": "bundle",
    "Denoiser": "denoiser",
    "Engine": "pipeline",
    "Guidance": "guidance",
    "HostLanes": "lanes",
    "Job": "job",
    "LatentrtError": "errors",
    "Request": "request",
    "Row": "table",
    "SOLVERS": "solvers",
    "Schedule": "schedule",
    "Table": "table",
    "advance": "table",
    "grid": "image",
    "noise_source": "noise",
    "preview": "table",
    "read_settings": "image",
    "save": "image",
    "tabulate": "table",
}

__all__ = [
    "SOLVERS",
    "Bundle",
    "Denoiser",
    "Engine",
    "Guidance",
    "HostLanes",
    "Job",
    "LatentrtError",
    "Request",
    "Row",
    "Schedule",
    "Table",
    "advance",
    "grid",
    "noise_source",
    "preview",
    "read_settings",
    "save",
    "tabulate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    value = getattr(import_module(f"engine.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
