"""Pages of other origins: which of them may use the server from a browser.

Sources: the Fetch standard (Origin, CORS), W3C's Fetch Metadata (Sec-Fetch-Site).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from latentrt.serve.http.errors import Problem
from latentrt.serve.process.config import Settings

LOOPBACK = ("127.0.0.1", "::1", "localhost")
READING = ("GET", "HEAD", "OPTIONS")  # change nothing, and browsers keep their answers from other origins' pages


def cross_origin(origins: Sequence[str]) -> list[Middleware]:
    """Return the middleware that lets pages of these origins use the server from a browser; none without origins.

    It is outside the guard: a browser's preflight request has no key, and refusals must be readable too.
    """
    told = ("x-request-id", "retry-after", "x-should-retry")
    options: dict[str, Any] = {
        "allow_methods": ("GET", "POST", "DELETE"),
        "allow_headers": ("*",),
        "expose_headers": told,
    }
    return [Middleware(CORSMiddleware, allow_origins=origins, **options)] if origins else []


def foreign(method: str, headers: Headers, settings: Settings) -> Problem | None:
    """Return why a server without keys does not take a request that a browser sent for another origin's page.

    With keys there is no need: a browser adds none to such a page's request.
    """
    return _wrong_host(headers, settings) or _wrong_origin(method, headers, settings.cors_origin)


def _wrong_host(headers: Headers, settings: Settings) -> Problem | None:
    """Refuse names that the operator does not know: a page's own name may be made to lead to this address."""
    if settings.host not in LOOPBACK and not settings.allowed_host:
        return None
    host = _name(f"//{headers.get('host', 'localhost')}")  # browsers always send one
    if "*" in settings.allowed_host or _is_local(host) or host in map(str.lower, settings.allowed_host):
        return None
    needed, fix = "localhost, an address, or a name of --allowed-host", f"start the server with --allowed-host {host}"
    return Problem(f"the request is for the host {host[:100]!r}", needed, fix, status=403, code="host_not_allowed")


def _wrong_origin(method: str, headers: Headers, allowed: Collection[str]) -> Problem | None:
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    if method in READING or "*" in allowed or origin in allowed:
        return None
    own = site in ("same-origin", "none") if site else origin is None or _is_same(origin, headers.get("host", ""))
    if own:
        return None
    found = f"the request is from a page of {origin[:100] if origin else 'another origin'}"
    needed, fix = "a page of this server, or a key", "start the server with --cors-origin, or with keys"
    return Problem(found, needed, fix, status=403, code="origin_not_allowed")


def _is_same(origin: str, host: str) -> bool:
    """Return whether an origin is the host that was asked. A proxy may speak TLS for it: the scheme does not count."""
    return origin.lower() in (f"http://{host.lower()}", f"https://{host.lower()}")


def _name(url: str) -> str:
    try:
        return (urlsplit(url).hostname or "").rstrip(".")
    except ValueError:
        return ""


def _is_local(host: str) -> bool:
    """Return whether no other page can have this name: it leads to this machine, or is no name but an address."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
