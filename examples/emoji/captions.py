"""What people may call an emoji: its name, with or without an article, with a few of its tags; or a tag alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from random import Random

from data import Emoji

BEFORE = ("", "", "", "", "a ", "a ", "the ", "an emoji of a ", "a picture of a ", "a 3d emoji of a ")
TAGGED = 0.25  # the part of the captions that name tags as well
MOST_TAGS = 2
ALONE = 0.15  # the part that is nothing but a tag, which no more than SHARED emoji have: "puppy", "kitten"
SHARED = 3
COMMON = "a an the of with and in on white background emoji picture photo 3d icon cute small big drawing cartoon image"
NUMBERS = "two three"
COLOURS = "red green blue yellow orange purple pink black brown"


def caption(emoji: Emoji, alone: Sequence[str], random: Random) -> str:
    """One of the ways to ask for an emoji; `alone` are tags that may stand for it."""
    if alone and random.random() < ALONE:
        return named(random.choice(BEFORE), random.choice(alone))
    text = named(random.choice(BEFORE), emoji.name)
    if emoji.tags and random.random() < TAGGED:
        text += ", " + ", ".join(random.sample(emoji.tags, min(len(emoji.tags), random.randint(1, MOST_TAGS))))
    return text


def named(before: str, name: str) -> str:
    """ "a " and "owl" make "an owl"."""
    return (before[:-2] + "an " if before.endswith("a ") and name[0] in "aeiou" else before) + name


def telling(emoji: Sequence[Emoji]) -> list[list[str]]:
    """For each emoji the tags that few share and that are nobody's name."""
    counts, names = Counter(tag for each in emoji for tag in each.tags), {each.name for each in emoji}
    return [[tag for tag in each.tags if counts[tag] <= SHARED and tag not in names] for each in emoji]
