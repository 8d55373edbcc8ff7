"""latentrt's engine: Stable Diffusion without torch.

Names are imported when they are first used, so that `import latentrt` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from latentrt.bundle.bundle import Bundle as Bundle
    from latentrt.engine import Engine as Engine
    from latentrt.errors import LatentrtError as LatentrtError
    from latentrt.guides import Control as Control
    from latentrt.guides import ImagePrompt as ImagePrompt
    from latentrt.images.files import save as save
    from latentrt.images.metadata import read_settings as read_settings
    from latentrt.images.sheet import grid as grid
    from latentrt.request import Request as Request
    from latentrt.run.denoiser import Denoiser as Denoiser
    from latentrt.run.host import HostLanes as HostLanes
    from latentrt.run.job import Job as Job
    from latentrt.sampling.guidance import Guidance as Guidance
    from latentrt.sampling.noise import noise_source as noise_source
    from latentrt.sampling.schedule import Schedule as Schedule
    from latentrt.sampling.solvers import SOLVERS as SOLVERS
    from latentrt.sampling.table import Row as Row
    from latentrt.sampling.table import Table as Table
    from latentrt.sampling.table import advance as advance
    from latentrt.sampling.table import preview as preview
    from latentrt.sampling.table import tabulate as tabulate

_HOME = {
    "Bundle": "bundle.bundle",
    "Control": "guides",
    "Denoiser": "run.denoiser",
    "Engine": "engine",
    "Guidance": "sampling.guidance",
    "HostLanes": "run.host",
    "ImagePrompt": "guides",
    "Job": "run.job",
    "LatentrtError": "errors",
    "Request": "request",
    "Row": "sampling.table",
    "SOLVERS": "sampling.solvers",
    "Schedule": "sampling.schedule",
    "Table": "sampling.table",
    "advance": "sampling.table",
    "grid": "images.sheet",
    "noise_source": "sampling.noise",
    "preview": "sampling.table",
    "read_settings": "images.metadata",
    "save": "images.files",
    "tabulate": "sampling.table",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'latentrt' has no attribute {name!r}")
    value = getattr(import_module(f"latentrt.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
