"""The syntax of compel: a prompt as weighted fragments, of one prompt or of several that are blended or joined.

    word++  weighs 1.1 · 1.1, word- weighs 0.9      (some words)1.3, "some words"1.3  weigh 1.3
    ("one", "two").blend(1, 0.8)  is a mean          ("one", "two").and()  is one after the other

Source: compel 2.5.1, compel/prompt_parser.py, whose grammar this follows rule by rule; where that one raises, this
refuses. What stands in no rule is text, up to the next space.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from latentrt.errors import RequestError

PLUS, MINUS = 1.1, 0.9
DEEPEST = 50  # parentheses in parentheses
_SYMBOLS = r"()\",.+\-="
_ESCAPED = rf"\\[{_SYMBOLS}]"
_SIGN = rf"[-+](?![\s{_SYMBOLS}]|\Z)"
_WORD = re.compile(rf"(?:{_ESCAPED}|{_SIGN}|[^\s{_SYMBOLS}])+")
_FREE = re.compile(r"\S+")
_SPACE = re.compile(r"\s*")
_SIGNS = re.compile(r"\++|-+")
_NUMBER = re.compile(r"\d+\.\d*|\.\d+|\d+")
_QUOTED = re.compile(r'"((?:\\"|[^"\n\r])*)"')
_OPERATOR = re.compile(r"\)\s*\.(blend|and|add)\s*\(\s*([^()]*)\)\s*")
_NOT_OFFERED = re.compile(r"\.\s*(?:swap|attend)\s*\(|\b(?:use|with)Lora\s*\(")


class Fragment(NamedTuple):
    """A part of a prompt that is tokenized by itself, and its weight."""

    text: str
    weight: float


Prompt = list[Fragment]


class Composed(NamedTuple):
    """Prompts and their weights.

    Attributes:
        prompts, weights: of each.
        joined: whether their states follow each other; else they are blended.
        normalized: whether a blend's weights are divided by their sum.
    """

    prompts: list[Prompt]
    weights: list[float]
    joined: bool = True
    normalized: bool = True


def parse(text: str) -> Composed:
    """Return a prompt's fragments. Raise RequestError where compel cannot read it, or this does not offer it."""
    if found := _NOT_OFFERED.search(text):
        raise RequestError(
            f"the prompt has {found[0]!r}", needed="weights, .blend() and .and()", fix=f"leave {found[0]!r} out"
        )
    text = re.sub(r",(\S)", r", \1", text)
    parser = _Parser(text)
    return parser.composed() or Composed([_fused(parser.prompt()) or [Fragment("", 1.0)]], [1.0])


class _Parser:
    """Reads a text from left to right; each method returns None, and stays where it was, if its rule does not fit."""

    def __init__(self, text: str, depth: int = 0) -> None:
        self._text, self._at, self._depth = text, 0, depth
        if depth > DEEPEST:
            raise RequestError(f"the prompt is nested over {DEEPEST} deep", needed="fewer parentheses and quotes")

    def composed(self) -> Composed | None:
        """Read `("one", "two").blend(...)` or `.and(...)`, which is then the whole prompt."""
        if not self._take("("):
            return None
        prompts: list[Prompt] = []
        while (target := self._target()) is not None:
            prompts.append(_fused(target))
            if not self._take(","):
                break
        self._space()
        found = _OPERATOR.match(self._text, self._at) if prompts else None
        if found is None:
            self._at = 0
            return None
        if found.end() < len(self._text):
            raise RequestError(
                f"{self._text[found.end() :]!r} follows .{found[1]}()", needed=f".{found[1]}() at the prompt's end"
            )
        return _composed(prompts, found[1], found[2])

    def prompt(self) -> Prompt:
        """Read fragments up to the end; what fits no rule is text up to the next space."""
        fragments: Prompt = []
        while not self._ended():
            part = self._grouped()
            part = self._signed_word() if part is None else part
            fragments += [_fragment(self._match(_FREE) or "")] if part is None else part
        return fragments

    def _target(self) -> Prompt | None:
        """Read what can be blended or joined: a text in quotes or parentheses, or a word."""
        self._space()
        part = self._group()
        if part is None and (quoted := self._match(_QUOTED)) is not None:
            return _Parser(quoted[1:-1], self._depth + 1).prompt()
        return self._word() if part is None else part

    def _grouped(self) -> Prompt | None:
        """Read a text in quotes or parentheses, with its signs or its number, if it has any."""
        part = self._group()
        if part is None:
            return None
        signs = self._match(_SIGNS)
        number = self._match(_NUMBER) if signs is None else None
        weight = float(number) if number else _weight(signs)
        return [Fragment(one.text, one.weight * weight) for one in part]

    def _signed_word(self) -> Prompt | None:
        """Read a word and its signs."""
        start, part = self._at, self._word()
        signs = self._match(_SIGNS) if part is not None else None
        if part is None or signs is None:
            self._at = start
            return None
        return [Fragment(part[0].text, _weight(signs))]

    def _group(self) -> Prompt | None:
        part = self._quoted()
        return self._parenthesized() if part is None else part

    def _quoted(self) -> Prompt | None:
        """Read a text in double quotes, if all in it fits the rules."""
        self._space()
        start, quoted = self._at, self._match(_QUOTED)
        if quoted is None:
            return None
        inner = _Parser(quoted[1:-1], self._depth + 1)
        fragments = inner._parts()
        if not inner._ended():
            self._at = start
            return None
        return fragments or [Fragment("", 1.0)]

    def _parenthesized(self) -> Prompt | None:
        """Read a text in parentheses, if all in it fits the rules."""
        self._space()
        start = self._at
        if not self._take("("):
            return None
        self._depth += 1
        if self._depth > DEEPEST:
            raise RequestError(f"the prompt is nested over {DEEPEST} deep", needed="fewer parentheses and quotes")
        fragments = self._parts()
        self._depth -= 1
        if not self._take(")"):
            self._at = start
            return None
        return fragments

    def _parts(self) -> Prompt:
        """Read what may stand in quotes and parentheses, as far as it goes."""
        fragments: Prompt = []
        while not self._ended():
            part = self._grouped()
            for rule in (self._signed_word, self._word, self._punctuation):
                part = rule() if part is None else part
            if part is None:
                break
            fragments += part
        return fragments

    def _word(self) -> Prompt | None:
        self._space()
        word = self._match(_WORD)
        return None if word is None else [_fragment(word)]

    def _punctuation(self) -> Prompt | None:
        return next(([Fragment(sign, 1.0)] for sign in ",." if self._take(sign)), None)

    def _take(self, symbol: str) -> bool:
        self._space()
        found = self._text.startswith(symbol, self._at)
        self._at += found
        return found

    def _match(self, pattern: re.Pattern[str]) -> str | None:
        found = pattern.match(self._text, self._at)
        if found is None:
            return None
        self._at = found.end()
        return found[0]

    def _space(self) -> None:
        self._match(_SPACE)

    def _ended(self) -> bool:
        self._space()
        return self._at == len(self._text)


def _fragment(text: str) -> Fragment:
    """Return a fragment of weight 1, its parentheses and quotes without their backslashes."""
    for symbol in '()"':
        text = text.replace(f"\\{symbol}", symbol)
    return Fragment(text, 1.0)


def _weight(signs: str | None) -> float:
    """Return the weight that signs give; without any it is 1."""
    return 1.0 if signs is None else (PLUS if signs[0] == "+" else MINUS) ** len(signs)


def _fused(fragments: Prompt) -> Prompt:
    """Return fragments; neighbours of the same weight are one, with a space between."""
    fused: Prompt = []
    for one in fragments:
        if fused and fused[-1].weight == one.weight:
            fused[-1] = Fragment(f"{fused[-1].text} {one.text}", one.weight)
        else:
            fused.append(one)
    return fused


def _composed(prompts: list[Prompt], operator: str, text: str) -> Composed:
    options = [each.strip() for each in text.split(",")] if text.strip() else []
    normalized = not (operator == "blend" and options and options[-1] == "no_normalize")
    try:
        weights = [float(each) for each in (options if normalized else options[:-1])] or [1.0] * len(prompts)
    except ValueError as error:
        raise RequestError(f".{operator}({text}) has no numbers", needed=f"as .{operator}(1, 0.5)") from error
    if len(weights) != len(prompts):
        found = f".{operator}() has {len(weights)} weights for {len(prompts)} prompts"
        raise RequestError(found, needed="one for each, or none")
    return Composed(prompts, weights, joined=operator != "blend", normalized=normalized)
