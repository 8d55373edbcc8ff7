"""The grammars of prompts by name, and the syntax that one of them would draw as letters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from latentrt.model.prompts import a1111, compel, plain
from latentrt.model.prompts.extra_networks import KINDS
from latentrt.model.prompts.reading import Grammar

GRAMMARS: Mapping[str, Grammar] = {"plain": plain.read, "a1111": a1111.read, "compel": compel.read}  # request.SYNTAXES
_SIGNS: Mapping[str, re.Pattern[str]] = {"a1111": a1111.SIGNS, "compel": compel.SIGNS}
SHOWN = 60  # characters of a prompt in a message
_NETWORKS = re.compile(r"<(lora|lyco|hypernet):[^<>]+>")


class Foreign(NamedTuple):
    """A part of a prompt that its grammar draws as letters, and the grammar that reads it; None where none does."""

    text: str
    syntax: str | None

    def __str__(self) -> str:
        shown = self.text if len(self.text) <= SHOWN else f"{self.text[:SHOWN]}..."
        told = f"the prompt has {shown!r}, which is drawn as letters"
        if self.syntax is None:
            return f"{told}: leave it out"
        return f'{told}; prompt_syntax="{self.syntax}" (--prompt-syntax {self.syntax}) reads it'


def foreign(prompt: str, syntax: str) -> Foreign | None:
    """Return the first part of a prompt that looks like another grammar's syntax, if there is one."""
    for name, signs in _SIGNS.items():
        if name != syntax and (found := signs.search(prompt)):
            return Foreign(found[0], name)
    networks = _NETWORKS.search(prompt) if syntax != "a1111" else None
    return Foreign(networks[0], "a1111" if networks[1] in KINDS else None) if networks else None
