"""How pictures are answered in the OpenAI Images API: at once, or when a client comes back for them."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from latentrt.images.picture import Picture
from latentrt.serve.http.images import encode, file_of
from latentrt.serve.http.openai.schema import USAGE, OutputFormat, Wanted


@dataclass(frozen=True, slots=True)
class Drawn:
    """A picture's file, and what makes the picture again."""

    seed: int
    file: bytes


@dataclass(frozen=True, slots=True)
class Style:
    """How the pictures of one request are answered.

    Attributes:
        own: what an answer says beside them.
        kind, quality: of their files.
        urls: whether they come as data: URLs too.
    """

    own: Mapping[str, Any]
    kind: OutputFormat
    quality: int | None
    urls: bool

    @classmethod
    def of(cls, wanted: Wanted, size: str) -> Style:
        """Return the one that a request asks for; `size` is that of its pictures."""
        own = {"background": "opaque", "output_format": wanted.kind, "size": size}
        if safety := wanted.safety_identifier or wanted.user:
            own["safety_identifier"] = safety
        # OpenAI's first models answered with URLs by default, and clients of these still expect them.
        urls = (wanted.response_format or ("url" if (wanted.model or "").startswith("dall-e") else "")) == "url"
        return cls(own, wanted.kind, wanted.output_compression, urls)

    def encoded(self, image: Image.Image) -> str:
        """Return a picture's file in base64."""
        return encode(image, self.kind, self.quality)

    def file(self, image: Image.Image) -> bytes:
        """Return a picture's file."""
        return file_of(image, self.kind, self.quality)

    def drawn(self, picture: Picture) -> Drawn:
        """Return what is kept of a finished picture."""
        return Drawn(seed_of(picture), self.file(picture))

    def body(self, pictures: Iterable[tuple[int, str]], warnings: Sequence[str]) -> dict[str, Any]:
        """Return the answer with these seeds and files in base64."""
        data = [
            {"b64_json": file, "seed": seed} | ({"url": f"data:image/{self.kind};base64,{file}"} if self.urls else {})
            for seed, file in pictures
        ]
        more = {"warnings": list(warnings)} if warnings else {}
        return {"created": int(time.time()), "data": data, **self.own, "usage": USAGE, **more}

    def kept(self, drawn: Sequence[Drawn], warnings: Sequence[str]) -> dict[str, Any]:
        """Return the answer with pictures that were kept."""
        return self.body(((one.seed, base64.b64encode(one.file).decode("ascii")) for one in drawn), warnings)


def seed_of(picture: Picture) -> int:
    """Return the seed that makes a picture again, alone."""
    return int(picture.info["latentrt"]["seed"])
