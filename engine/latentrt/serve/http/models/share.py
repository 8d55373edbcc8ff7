"""What several models may take of the memory: all that are loaded, and the calls of whichever runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from latentrt.bundle.bundle import Bundle
from latentrt.errors import RequestError
from latentrt.model.control import controlnets_of
from latentrt.runtime.machine.memory import free_memory
from latentrt.serve.process.config import MIB, Settings
from latentrt.serve.process.logs import logger

PART = 0.5  # of the free memory that models may take, and of the rest that calls may take


@dataclass(frozen=True, slots=True)
class Share:
    """Bytes; None: no bound is known.

    Attributes:
        room: that the models which are loaded may take together; None with one model too, which has what it takes.
        calls: that network calls may take; they take turns, so it is the same for every model. None with one model:
            then it depends on what is free once that is loaded.
    """

    room: int | None = None
    calls: int | None = None

    @classmethod
    def of(cls, settings: Settings, each: Sequence[Settings]) -> Share:
        """Return what the models of a server may take; call it before any is loaded.

        Args:
            settings: of the server.
            each: of its models.

        Raises:
            RequestError: a model is larger than the room.
            BundleError: one of them is missing or damaged.
        """
        calls = None if settings.memory is None else settings.memory * MIB
        if len(each) == 1:
            return cls(None, calls)
        free = free_memory()
        room = None if free is None else int(free * PART)
        if settings.model_memory is not None:
            room = settings.model_memory * MIB
        if calls is None and free is not None:
            calls = int(max(0, free - (room or 0)) * PART)
        _check(settings, each, room)
        told = {"room_mib": None if room is None else room // MIB, "calls_mib": None if calls is None else calls // MIB}
        logger().info("models", names=[one.model_name for one in each], **told)
        return cls(room, calls)


def _check(settings: Settings, each: Sequence[Settings], room: int | None) -> None:
    """Refuse a model that is larger than the room, or all of them where they are to be loaded at the start."""
    sizes = {str(one.model_name): bytes_of(one) for one in each}
    if settings.preload:
        sizes["all models, which are to be preloaded"] = sum(sizes.values())
    for name, size in sizes.items():
        if room is not None and size > room:
            found, fix = f"the files of {name} have {size // MIB} MiB", "--model-memory MIB, or a server of its own"
            raise RequestError(found, needed=f"at most {room // MIB}, the memory of all models", fix=fix)


def guess_of(settings: Settings) -> int:
    """Return about how many bytes a model takes that was never loaded: twice its files, where half-precision weights
    are widened.
    """
    return bytes_of(settings) * (2 if settings.precision in (None, "fp32") else 1)


def bytes_of(settings: Settings) -> int:
    """Return the bytes of the bundles of a model and its add-ons. Raise BundleError where one cannot be read."""
    controls = controlnets_of(settings.controlnet).values()
    prompts = controlnets_of(settings.ip_adapter_model, "--ip-adapter-model").values()
    beside = (settings.refiner, settings.vae, settings.preview_vae, *controls, *prompts)
    return sum(map(_bytes, (settings.bundle, *(path for path in beside if path is not None))))


def _bytes(path: Path) -> int:
    return sum(one.bytes for one in Bundle.open(path, check_hashes=False).files.values())
