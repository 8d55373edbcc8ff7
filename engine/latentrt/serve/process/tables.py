"""Values of settings that stand for several: lists in text, and what each of several models has for itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from latentrt.errors import RequestError
from latentrt.values import named

SECTIONS = "Model", "Defaults"  # of the settings that a model may have for itself


def split(value: object) -> object:
    """Split text with commas into a list: environment variables have lists so, and options that are given twice."""
    texts = value if isinstance(value, list | tuple) else [value]
    parts = [part.strip() for text in texts if isinstance(text, str) for part in text.split(",")]
    return [part for part in parts if part] if all(isinstance(text, str) for text in texts) else value


def tables_of(value: object) -> object:
    """Return each model's own settings by its name: of tables, of bundles by name, or of texts NAME=BUNDLE.

    Raises:
        ValueError: a text has another form, or a name is given twice.
    """
    if isinstance(value, Mapping):
        return {name: {"bundle": own} if isinstance(own, str) else own for name, own in value.items()}
    texts = split(value)
    if not isinstance(texts, list):
        return value
    try:
        return {name: {"bundle": bundle} for name, bundle in named(texts, "model", "NAME=BUNDLE").items()}
    except RequestError as error:
        raise ValueError(f"{error.found}; needed: {error.needed}") from error


def check_table(name: str, own: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    """Refuse a model's table with settings that only a server has, or without a bundle.

    Args:
        name: of the model.
        own: its table.
        fields: of the settings, with what is said of each.

    Raises:
        ValueError: it has such a setting.
    """
    if not own.get("bundle"):
        raise ValueError(f"{name} has no bundle")
    known = [key for key, about in fields.items() if about["section"] in SECTIONS and key != "model_name"]
    for key in own:
        if key not in known:
            raise ValueError(f"{name} has {key!r}, and a model's own settings are {', '.join(known)}")
