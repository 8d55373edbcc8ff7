"""The one exception tree of latentrt.

Every error says what was found and what was needed, and what to type or change where that helps.
"""

from __future__ import annotations

EXPORT = "export the checkpoint again: latentrt export CHECKPOINT BUNDLE"


class LatentrtError(Exception):
    """Base of everything latentrt raises on purpose.

    Args:
        found: what was found, with the offending value.
        needed: what would have been right.
        fix: the command or the change that helps, if not the class's `usual_fix`; empty where `needed` says it all.
    """

    usual_fix = ""

    def __init__(self, found: str, needed: str, fix: str | None = None) -> None:
        fix = self.usual_fix if fix is None else fix
        super().__init__(found, needed, fix)
        self.found = found
        self.needed = needed
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.found}. Needed: {self.needed}" + (f". To fix it: {self.fix}" if self.fix else "")

    @property
    def parts(self) -> dict[str, str]:
        """The three parts by name, for machines."""
        return {"found": self.found, "needed": self.needed, "fix": self.fix}


class RequestError(LatentrtError, ValueError):
    """What the caller asked for cannot be done: steps, sizes, guidance, prompts."""


class UnknownSolverError(RequestError):
    """No solver has that name; the nearest names are in the message."""


class AdapterError(RequestError):
    """A LoRA cannot be read, or does not fit the model that it is merged into."""


class ScheduleError(LatentrtError, ValueError):
    """A scheduler class or option that latentrt does not know or that a table cannot express."""


class NotServedError(ScheduleError):
    """A scheduler class or setting that diffusers has and latentrt does not serve; another solver may do."""


class TraceError(LatentrtError):
    """A solver function did something that rows cannot hold (two noises a row, too much history)."""


class BundleError(LatentrtError):
    """A bundle is not there, is not whole, or is not a bundle."""

    usual_fix = EXPORT


class HashMismatchError(BundleError):
    """A file's size or SHA-256 differs from the manifest's."""


class UnsafePathError(BundleError):
    """A path in a bundle leads out of the bundle's folder."""


class UnsafeWeightsError(BundleError):
    """Weights come in a format that can run code (pickle)."""


class BackendError(LatentrtError):
    """A backend or device is unknown, not installed or not usable on this machine."""


class DeviceMemoryError(BackendError):
    """A device has too little memory for what was asked of it."""


class PlanError(LatentrtError):
    """A TensorRT plan is missing, was built for something else, or cannot be built."""


class UntrustedFileError(LatentrtError):
    """A file or folder of native code that another user may have written to."""


class NetworkError(LatentrtError):
    """A network was fed, or returned, arrays that do not fit its signature, or numbers that are not finite."""


class ExportError(LatentrtError):
    """A checkpoint cannot be turned into a bundle."""


class OutputError(LatentrtError, OSError):
    """A picture or bundle cannot be written (disk full, no permission, bad pattern)."""


class MissingDependencyError(LatentrtError, ImportError):
    """A verb needs an optional dependency that is not installed."""


class PromptTruncatedWarning(UserWarning):
    """A prompt was longer than the model reads; the message has the text that was dropped."""


class AdapterWarning(UserWarning):
    """Keys of a LoRA have no place in the model and were left out, as was allowed; the message lists them."""


class PromptSyntaxWarning(UserWarning):
    """A prompt has syntax that its grammar draws as letters; the message names the option that reads it."""
