"""The page at `/`: files of this package as they are, open to all. Its requests need a key, if there are keys."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.staticfiles import StaticFiles
from starlette.responses import Response

PAGE = Path(__file__).parents[1] / "page"
TYPES = {  # the system's own table differs between systems
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Nothing from other servers, nothing inline, in no frame; pictures are made in the page, hence blob:.
POLICY = {
    "default-src": "'none'",
    "connect-src": "'self'",
    "img-src": "'self' blob:",
    "script-src": "'self'",
    "style-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}
HEADERS = {
    "cache-control": "no-cache",  # kept, and revalidated by its ETag: after an upgrade old and new parts are not mixed
    "content-security-policy": "; ".join(f"{name} {sources}" for name, sources in POLICY.items()),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def add_page(app: FastAPI) -> None:
    """Serve the page at `/`, and its parts below `/static`."""
    parts = _Parts(directory=PAGE)

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page(request: Request) -> Response:
        return await parts.get_response("index.html", request.scope)

    app.mount("/static", parts, name="static")


class _Parts(StaticFiles):
    def file_response(self, full_path: str | os.PathLike[str], *about: Any) -> Response:
        """Return a file, or 304 for a client that has it."""
        response = super().file_response(full_path, *about)
        response.headers.update(HEADERS)
        kind = TYPES.get(Path(full_path).suffix)
        if kind is not None and response.status_code != 304:
            response.headers["content-type"] = kind
        return response
