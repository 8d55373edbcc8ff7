"""The keys that clients need one of."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os

from latentrt.errors import RequestError
from latentrt.serve.core.rules.terms import Terms
from latentrt.serve.process.config import Settings
from latentrt.serve.process.logs import logger

_KEY = "key-"
_SECRET = os.urandom(16)  # of this process


class Keys:
    """Keys of the settings and of their file, which can be read again while the server runs; false where none are set.

    Raises:
        RequestError: the file cannot be read.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._keys = settings.clients()

    def __bool__(self) -> bool:
        return bool(self._keys)

    def read_again(self) -> None:
        """Take the keys that the file has now. If it cannot be read, those from before hold."""
        try:
            self._keys = self._settings.clients()
        except RequestError as error:
            logger().error("the keys could not be read again: those from before hold", error=str(error))
        else:
            logger().info("the keys were read again", keys=len(self._keys))

    def owner(self, authorization: str) -> str | None:
        """Return a stable name of the key in an Authorization header; None if it is none of these.

        The time that it takes does not depend on how many bytes match. A1111's clients send Basic: the key may be all
        of it, its password, or "user:password" as a whole.
        """
        scheme, _, text = authorization.partition(" ")
        sent = {"bearer": [text.strip().encode()], "basic": _of_basic(text.strip())}.get(scheme.lower(), [])
        matches = [[hmac.compare_digest(key, one) for one in sent] for key in self._keys]
        found = next((key for key, any_of in zip(self._keys, matches, strict=True) if any(any_of)), None)
        return None if found is None else _name(found)

    def terms(self, owner: str) -> Terms:
        """Return what the client of a key has been promised; `owner` is the key's name."""
        return next((terms for key, terms in self._keys.items() if _name(key) == owner), Terms())


def label_of(owner: str) -> str:
    """Return a name of a client that all may see.

    Of a key it is the first eight digits of its SHA-256, as "key-1a2b3c4d"; of an address a name that only this process
    gives it, since all addresses can be tried out.
    """
    if owner.startswith(_KEY):
        return owner[: len(_KEY) + 8]
    return f"address-{hmac.digest(_SECRET, owner.encode(), 'sha256').hex()[:8]}"


def _name(key: bytes) -> str:
    return f"{_KEY}{hashlib.sha256(key).hexdigest()[:16]}"


def _of_basic(credentials: str) -> list[bytes]:
    try:
        pair = base64.b64decode(credentials, validate=True)
    except ValueError:
        return []
    return [pair, pair.partition(b":")[2]]
