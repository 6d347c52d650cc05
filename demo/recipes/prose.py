"""Plain sentences: what the base writes when no prompt tells it what to do."""

from __future__ import annotations

import random

from demo.recipes import lexicon
from demo.recipes.names import known_place_name


def sentence(rng: random.Random) -> str:
    """One sentence of a small grammar."""
    subject = _noun_phrase(rng) if rng.random() < 0.5 else _person(rng)
    verb, thing, place = _verb(rng), _noun_phrase(rng), rng.choice(lexicon.PLACES)
    text = rng.choice(
        (
            f"{subject} {verb} {thing}.",
            f"{subject} {verb} {thing} {place}.",
            f"{rng.choice(lexicon.WHEN)}, {subject} {verb} {thing}.",
            f"there was {_article(_adjective(rng))} {_noun(rng)} {place}.",
            f"{subject} {verb} {thing}, and {_person(rng)} {_verb(rng)} {_noun_phrase(rng)}.",
            f"{_person(rng)} met {_person(rng)} at {known_place_name(rng)}.",
            f"{rng.choice(lexicon.WHEN)}, {_person(rng)} walked to {rng.choice(lexicon.CITIES)}.",
        )
    )
    return text[0].upper() + text[1:]


def paragraph(rng: random.Random, low: int = 1, high: int = 4) -> str:
    """A few sentences in a row."""
    return " ".join(sentence(rng) for _ in range(rng.randint(low, high)))


def _person(rng: random.Random) -> str:
    return rng.choice(lexicon.FIRST_NAMES)


def _verb(rng: random.Random) -> str:
    return rng.choice(lexicon.VERBS_PAST)


def _noun(rng: random.Random) -> str:
    return rng.choice(lexicon.COMMON_NOUNS)


def _adjective(rng: random.Random) -> str:
    return rng.choice(lexicon.PROSE_ADJECTIVES)


def _article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _noun_phrase(rng: random.Random) -> str:
    noun = _noun(rng)
    if rng.random() < 0.5:
        noun = f"{_adjective(rng)} {noun}"
    return f"{rng.choice(('the', 'the', 'his', 'her'))} {noun}" if rng.random() < 0.7 else _article(noun)
