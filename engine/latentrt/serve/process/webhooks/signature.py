"""Signatures of webhooks.

Source: the Standard Webhooks specification, 1.0 (standardwebhooks.com): symmetric signatures, v1.
"""

from __future__ import annotations

import base64
import hmac
from collections.abc import Sequence

PREFIX = "whsec_"
LEAST, MOST = 24, 64  # bytes of a secret


def secret_of(text: str) -> bytes:
    """Return the bytes of a secret such as "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw".

    Raises:
        ValueError: it is none; the message does not have it.
    """
    needed = f"webhook_secret needs {PREFIX} and the base64 of {LEAST} to {MOST} random bytes"
    try:
        secret = base64.b64decode(text.removeprefix(PREFIX), validate=True)
    except ValueError:
        raise ValueError(needed) from None
    if not text.startswith(PREFIX) or not LEAST <= len(secret) <= MOST:
        raise ValueError(needed)
    return secret


def signed(id: str, timestamp: int, body: bytes, secrets: Sequence[bytes]) -> dict[str, str]:
    """Return the headers of a message.

    Args:
        id: of the message, the same at each attempt.
        timestamp: of the attempt, in Unix seconds.
        body: as it is sent.
        secrets: each of them signs, so that receivers may change from one to another.
    """
    content = f"{id}.{timestamp}.".encode() + body
    signatures = [base64.b64encode(hmac.digest(secret, content, "sha256")).decode("ascii") for secret in secrets]
    return {
        "webhook-id": id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(f"v1,{signature}" for signature in signatures),
    }
