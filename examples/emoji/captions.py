"""What people may call an emoji: its name, with or without an article, with a few of its tags."""

from __future__ import annotations

from random import Random

from data import Emoji

BEFORE = ("", "", "", "", "a ", "a ", "the ", "an emoji of a ", "a picture of a ", "a 3d emoji of a ")
TAGGED = 0.25  # the part of the captions that name tags as well
MOST_TAGS = 2
COMMON = "a an the of with and in on white background emoji picture photo 3d icon cute small big drawing cartoon image"
NUMBERS = "two three"
COLOURS = "red green blue yellow orange purple pink black brown"


def caption(emoji: Emoji, random: Random) -> str:
    """One of the ways to ask for an emoji."""
    text = named(random.choice(BEFORE), emoji.name)
    if emoji.tags and random.random() < TAGGED:
        text += ", " + ", ".join(random.sample(emoji.tags, min(len(emoji.tags), random.randint(1, MOST_TAGS))))
    return text


def named(before: str, name: str) -> str:
    """ "a " and "owl" make "an owl"."""
    return (before[:-2] + "an " if before.endswith("a ") and name[0] in "aeiou" else before) + name
