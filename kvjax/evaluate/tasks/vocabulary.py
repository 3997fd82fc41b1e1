"""What the tasks are made of: words, names, numbers, noise, sentences of natural text."""

from __future__ import annotations

import re
import string
import uuid

import numpy as np

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_ADJECTIVES = """
able big black blue bold brave brief bright broad brown busy calm cheap clean clear clever cold
cool curious dark deep dry eager early easy empty fair famous fast fine firm flat fresh full
gentle glad good grand gray great green happy hard heavy high honest huge humble kind large late
lazy light little local lonely long loose loud lucky modern narrow neat new noble odd old open
pale plain polite poor proud pure quick quiet rare raw ready red rich ripe rough round royal sad
safe sharp short shy silent simple slim slow small smart smooth soft solid sour steep strange
strong sweet tall tame tender thick thin tiny tired tough vague warm weak wet white wide wild
wise wooden yellow young
"""
_NOUNS = """
apple arm army autumn baby bag ball bank barn basket beach bear bed bell bench bird boat body
bone book bottle box boy branch bread bridge brush bucket button cake camp candle car card
castle cat cave chain chair cheese child church city clock cloud coat coin corn cow crown cup
dance desk dinner doctor dog door dream dress drum duck ear earth egg engine eye face farm
father fence field finger fire fish flag floor flower fork forest fox friend frog fruit garden
gate ghost gift girl glass glove goat gold grape guitar hair hammer hand hat heart hill home
horn horse house ice iron island jar juice key king kitchen kite knife lake lamp leaf leg lemon
letter library lion map market meal milk mirror money moon mother mountain mouse music nail neck
needle nest night nose ocean oven owl page paint palace paper park path pear pen pencil piano
pig pillow plane plate pocket poem pond potato queen rain ring river road robot roof rope rose
salt sand school sea seed sheep ship shirt shoe shop silver sister snake snow soap soldier song
soup spoon spring star station stone storm story street sugar summer table tail teacher tent
ticket tiger tooth tower town toy train tree truck uncle village voice wagon wall watch water
wheel window winter wolf woman wood world yard zebra
"""
ADJECTIVES, NOUNS = tuple(_ADJECTIVES.split()), tuple(_NOUNS.split())
WORDS = ADJECTIVES + NOUNS


def phrases(random: np.random.Generator, count: int) -> list[str]:
    """Distinct pairs adjective-noun."""
    pick = random.choice(len(ADJECTIVES) * len(NOUNS), count, replace=False)
    return [f"{ADJECTIVES[i // len(NOUNS)]}-{NOUNS[i % len(NOUNS)]}" for i in pick]


def words(random: np.random.Generator, count: int) -> list[str]:
    """Distinct words; where there are not enough, pairs adjective-noun follow."""
    single = [WORDS[i] for i in random.permutation(len(WORDS))[:count]]
    return single + phrases(random, count - len(single))


def names(random: np.random.Generator, count: int, letters: int) -> list[str]:
    """Distinct names of `letters` capitals."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(random.choice(list(string.ascii_uppercase), letters))] = None
    return list(found)


def numbers(random: np.random.Generator, count: int, digits: int = 7) -> list[str]:
    """Distinct numbers of that many digits."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[str(random.integers(10 ** (digits - 1), 10**digits))] = None
    return list(found)


def uuids(random: np.random.Generator, count: int) -> list[str]:
    """Universally unique identifiers of version 4."""
    return [str(uuid.UUID(bytes=random.bytes(16), version=4)) for _ in range(count)]


def passage(random: np.random.Generator, text: str, count: int) -> list[str]:
    """Sentences of `count` words in a row of a text, from a random word on; it starts over at its
    end. White space becomes blanks; a sentence ends at ., ! or ? before a blank."""
    all_words = text.split()
    if not all_words:
        raise ValueError("text='': expected natural text to hide things in")
    start = int(random.integers(len(all_words)))
    taken = [all_words[(start + i) % len(all_words)] for i in range(count)]
    return re.split(r"(?<=[.!?]) ", " ".join(taken))
