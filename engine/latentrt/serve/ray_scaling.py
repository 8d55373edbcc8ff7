"""How many replicas there should be: by pictures, of which a request may have several, not by requests."""

from __future__ import annotations

from typing import Any

PATH = f"{__name__}:ByPictures"
WAITING, RUNNING = "num_images_waiting", "num_images_running"


class ByPictures:
    """Ray's policy: as many replicas as have seats for all pictures that run or wait; Ray applies bounds and delays.

    Args:
        seats: pictures that a replica should have at once.
    """

    def __init__(self, seats: int) -> None:
        self._seats = seats

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        """Return the number of replicas wanted, and no state; as many as there are until a replica has told."""
        told = context.aggregated_metrics or {}
        if not told.get(WAITING) and not told.get(RUNNING):
            return context.target_num_replicas, {}
        return sum(sum(told.get(name, {}).values()) for name in (WAITING, RUNNING)) / self._seats, {}
