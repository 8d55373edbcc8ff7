"""Seals: proof that a record was made on this machine, or on one of a fleet that shares its secret."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from latentrt.errors import UntrustedPlanError

SEAL_VARIABLE = "LATENTRT_SEAL"


def seal(data: Mapping[str, Any], *, make: bool = False) -> str:
    """HMAC-SHA256 of data as JSON, in hexadecimal; with `make`, the secret is made where there is none.

    Raises:
        UntrustedPlanError: the secret cannot be read, or others can read it.
    """
    return hmac.new(_secret(make=make), canonical(data), hashlib.sha256).hexdigest()


def is_sealed(data: Mapping[str, Any], given: str) -> bool:
    """Whether a seal is this machine's; where there is no secret, none is.

    Raises:
        UntrustedPlanError: the secret cannot be read, or others can read it.
        TypeError: the seal is no text that a seal could be.
    """
    return secret_path().exists() and hmac.compare_digest(given, seal(data))


def check_secret() -> None:
    """Refuse a secret that cannot be used; where there is none, nothing was sealed here yet.

    Raises:
        UntrustedPlanError: the secret cannot be read, or others can read it.
    """
    if secret_path().exists():
        _secret(make=False)


def canonical(data: Any) -> bytes:
    """JSON that is the same for the same data."""
    return json.dumps(data, sort_keys=True, separators=(",", ":")).encode()


def secret_path() -> Path:
    """The file of the machine's secret; LATENTRT_SEAL names another one, which a fleet of like devices may share."""
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return Path(os.environ.get(SEAL_VARIABLE) or state / "latentrt" / "seal.key")


def _secret(*, make: bool) -> bytes:
    """The secret that seals records; made where it is wanted for writing and is not there."""
    path = secret_path()
    if make and not path.exists():
        _make(path)
    try:
        mode, secret = path.stat().st_mode, path.read_bytes()
    except OSError as error:
        raise UntrustedPlanError(
            f"the secret that seals plans cannot be read ({error})",
            needed=f"the file that `latentrt build` makes, or another one named by {SEAL_VARIABLE}",
            fix="delete the plans that came from elsewhere, then build here: latentrt build BUNDLE",
        ) from error
    if mode & 0o077 or len(secret) < 16:
        raise UntrustedPlanError(
            f"{path} has mode {mode & 0o777:o} and {len(secret)} bytes",
            needed="16 bytes or more that only its owner can read",
            fix=f"chmod 600 {path}; or delete it and build again",
        )
    return secret


def _make(path: Path) -> None:
    """Make the secret, whole or not at all; where another build was faster, its secret stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(32))
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(part, path)
    finally:
        part.unlink(missing_ok=True)
