"""What a request may have beside its prompt: pictures that ControlNets follow, and that IP-Adapters show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from latentrt.errors import RequestError
from latentrt.values import check_number, is_text, is_whole, plain


@dataclass(frozen=True, slots=True)
class Control:
    """How a ControlNet or T2I-Adapter acts on a picture.

    Attributes:
        image: what it follows: edges, a depth map, ... as it was trained with; a PIL image, or a uint8 or
            uint16 array (height, width, 3) or of grey (height, width). It is brought to the picture's size. Or floats
            (height, width, 3) of that size, such as `latentrt.images.hints.masked` gives.
        scale: how strongly, 0 to 1000; 1 is as trained.
        start, end: the part of the run, as fractions of its rows, in which it acts.
        guess: whether it acts on the lane with the prompt alone, and less on finer details: diffusers' guess mode,
            which T2I-Adapters do not have.
        type: which of the kinds of maps that a ControlNet Union reads the image is: "canny", or its number; None for
            others.

    Raises:
        RequestError: a value is out of range.
    """

    image: Any
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    guess: bool = False
    type: str | int | None = None

    def __post_init__(self) -> None:
        for name in ("scale", "start", "end", "guess", "type"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        check_number("a control's scale", self.scale, 0.0, 1000.0)
        check_number("a control's start", self.start, 0.0, 1.0)
        check_number("a control's end", self.end, self.start, 1.0)
        if not isinstance(self.guess, bool):
            raise RequestError(f"a control's guess is {self.guess!r}", needed="True or False")
        if self.type is not None and not is_text(self.type) and not is_whole(self.type):
            raise RequestError(f"a control's type is {self.type!r}", needed="a name, or a whole number")

    @classmethod
    def of(cls, value: Any) -> Control:
        """Return the Control that a picture alone stands for, or a mapping of its fields. Raise RequestError."""
        return value if isinstance(value, Control) else _of_picture(cls, "a control", value)


@dataclass(frozen=True, slots=True)
class ImagePrompt:
    """How an IP-Adapter acts on a picture.

    Attributes:
        image: what it shows the model; a PIL image, or a uint8 or uint16 array (height, width, 3) or of grey (height,
            width). The middle is taken, and brought to the size that the image encoder reads.
        scale: how strongly, 0 to 1000; 1 is as trained. Or numbers by block: see `model.conditioners.block_scales`.

    Raises:
        RequestError: a scale is no number, or out of range.
    """

    image: Any
    scale: Any = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", _scale(self.scale))

    @classmethod
    def of(cls, value: Any) -> ImagePrompt:
        """Return the ImagePrompt that a picture alone stands for, or a mapping of its fields. Raise RequestError."""
        return value if isinstance(value, ImagePrompt) else _of_picture(cls, "an ip_adapter", value)


def _of_picture(kind: type[Any], name: str, value: Any) -> Any:
    """Return a picture with the settings of a kind, of the picture alone or a mapping; `name` is for errors."""
    fields = kind.__dataclass_fields__
    if isinstance(value, Mapping) and ("image" not in value or not set(value) <= set(fields)):
        needed = f"image, and others of {', '.join(fields)}"
        raise RequestError(f"{name} has {', '.join(map(repr, value))}", needed=needed)
    return kind(**value) if isinstance(value, Mapping) else kind(value)


def _scale(value: Any) -> Any:
    """Return a scale, or scales in mappings and lists, in Python's numbers. Raise RequestError."""
    if isinstance(value, Mapping):
        return {str(name): _scale(own) for name, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [_scale(own) for own in value]
    value = plain(value)
    check_number("an ip_adapter's scale", value, 0.0, 1000.0)
    return value
