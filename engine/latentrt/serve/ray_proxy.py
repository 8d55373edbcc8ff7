"""What Ray's HTTP proxies answer by themselves, in the form of the server's own answers: clients then try again.

A proxy answers in plain text: 500 where a replica died, 404 where the application is not there (any more), 429 and 503
where it has too much. `latentrt serve --ray` names `middlewares` to the proxies of a cluster that it starts; in another
one RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH does, on every node, for all applications there. This imports no Ray.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from latentrt.serve.http.errors import Answer

AGAIN = {"retry-after": "1"}
_ANSWERS = {
    404: Answer(503, "draining", "no server is here: it ends or has not begun", None, AGAIN),
    429: Answer(429, "queue_full", "too many requests wait", None, AGAIN),
    500: Answer(503, "not_ready", "the replica that had this request is gone, or failed to answer", None, AGAIN),
    503: Answer(503, "not_ready", "no replica takes requests", None, AGAIN),
}
_OWN = ("/-/healthz", "/-/routes")  # Ray's, for load balancers


def middlewares() -> list[Middleware]:
    """Return what Ray's proxies put around themselves."""
    return [Middleware(InOurForm)]


class InOurForm:
    """Replaces errors in plain text, which only a proxy sends: the application's own are JSON. Where a replica died the
    proxy sends nothing, and its HTTP server would say 500.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _OWN:
            return await self._app(scope, receive, send)
        began = replaced = False

        async def pass_on(message: Message) -> None:
            nonlocal began, replaced
            if message["type"] == "http.response.start":
                began = True
                kind = Headers(raw=list(message.get("headers", []))).get("content-type", "")
                answer = _ANSWERS.get(message["status"]) if kind.startswith("text/plain") else None
                if answer is not None:
                    replaced = True
                    return await answer.response(scope, receive, send)
            if not replaced:
                await send(message)

        await self._app(scope, receive, pass_on)
        if not began:
            await _ANSWERS[500].response(scope, receive, send)


class WithoutPrefix:
    """Hides the prefix below which Ray serves the application, so that all its rules for paths hold.

    The prefix alone leads to the page with a slash behind it: the page's own addresses are relative.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        root = scope.get("root_path", "").rstrip("/")
        if root and scope["type"] == "http" and scope["path"].startswith(root):
            if scope["path"] == root and scope["method"] in ("GET", "HEAD"):
                return await RedirectResponse(f"{root.rpartition('/')[2]}/")(scope, receive, send)
            scope = {**scope, "root_path": "", "path": scope["path"][len(root) :] or "/"}
        await self._app(scope, receive, send)
