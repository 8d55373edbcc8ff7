"""JSON that can be sent, whatever its text repeats of a client's."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import JSONResponse


class Utf8Response(JSONResponse):
    """JSON in which half a surrogate pair is a question mark: JSON's escapes may say one, UTF-8 cannot."""

    def render(self, content: Any) -> bytes:
        """Return JSON as UTF-8. Raise ValueError: a number is not finite."""
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode("utf-8", "replace")
