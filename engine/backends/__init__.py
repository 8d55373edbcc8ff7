"""Ways to run a graph. Backends are imported when they are asked for, so that none is needed by the others."""

from __future__ import annotations

from engine.backends.base import Backend
from engine.errors import BackendError

BACKENDS = ("onnxruntime", "fake")


def open_backend(name: str, device: str = "cpu", threads: int | None = None) -> Backend:
    """The backend of that name on that device.

    Raises:
        BackendError: unknown name or device, or the device cannot be used; nothing else is tried instead.
        MissingDependencyError: the backend's library is not installed.
    """
    if name == "onnxruntime":
        from engine.backends.ort import OrtBackend

        return OrtBackend(device, threads)
    if name == "fake":
        from engine.backends.fake import FakeBackend

        return FakeBackend()
    raise BackendError(f"there is no backend {name!r}", f"one of {', '.join(BACKENDS)}", "pass another backend")
