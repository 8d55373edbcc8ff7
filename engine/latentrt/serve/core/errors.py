"""The server's own refusals and failures; each has a code, which clients and metrics see."""

# ruff: noqa: N818 - they have the names that clients see

from __future__ import annotations

from typing import ClassVar

from latentrt.errors import LatentrtError

SOON = 1.0  # seconds; the least `retry_after`


class ServiceError(LatentrtError):
    """Base of the server's own refusals and failures.

    Attributes:
        code: the name that clients see.
        retry_after: seconds after which the same request is likely to be taken; None where waiting does not help.
    """

    code: ClassVar[str] = "engine_error"

    def __init__(self, found: str, needed: str, fix: str = "", *, retry_after: float | None = None) -> None:
        super().__init__(found, needed, fix)
        self.retry_after = retry_after


class QueueFull(ServiceError):
    """The queue has fewer free places than the request has pictures."""

    code = "queue_full"


class QuotaExceeded(ServiceError):
    """The request's key has as many pictures waiting and running as it may have."""

    code = "quota_exceeded"


class DeadlineUnreachable(ServiceError):
    """By what was measured, the pictures cannot be done in time."""

    code = "deadline_unreachable"


class NotReady(ServiceError):
    """The server starts, or an engine fault has not been cleared by a self-check."""

    code = "not_ready"


class ModelLoading(ServiceError):
    """The model that the request names was not loaded in time."""

    code = "model_loading"


class ModelFailed(ServiceError):
    """The model that the request names could not be loaded, and is tried again later."""

    code = "model_failed"


class Draining(ServiceError):
    """The server is ending and takes no new requests."""

    code = "draining"


class QueueTimeout(ServiceError):
    """A picture waited too long for its lanes."""

    code = "queue_timeout"


class RunTimeout(ServiceError):
    """A picture took too long once it had lanes."""

    code = "run_timeout"


class Cancelled(ServiceError):
    """The request was cancelled, or its client has left."""

    code = "cancelled"

    @classmethod
    def of(cls, what: str) -> Cancelled:
        """Return the error of a request that was "cancelled", or "interrupted before it began"."""
        return cls(f"the request was {what}", needed="a client that waits", fix="ask again")


class EngineFault(ServiceError):
    """The engine raised an unexpected error, or hung; `__cause__` has what it raised."""


def as_error(error: Exception) -> LatentrtError:
    """Return the error that clients see for something that was raised."""
    return error if isinstance(error, LatentrtError) else as_fault(error)


def as_fault(error: Exception) -> EngineFault:
    """Return it as a fault of the engine."""
    if isinstance(error, EngineFault):
        return error
    if isinstance(error, LatentrtError):
        fault = EngineFault(error.found, needed=error.needed, fix=error.fix)
    else:
        found = f"the engine raised {error!r}"
        fault = EngineFault(found, needed="none of its errors", fix="report it with the server's log")
    fault.__cause__ = error
    return fault
