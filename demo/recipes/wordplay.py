"""Small operations on words and phrases: they teach copying, and are something for text-only tasks to ask."""

from __future__ import annotations

import random

from demo.recipes import lexicon
from demo.recipes.names import invented_word, known_place_name
from demo.recipes.splits import Example


def word_list(rng: random.Random) -> Example:
    """``apple, river, stone``; answers: ``first``, ``last``, ``count``, ``repeat``, ``joined``."""
    words = [_word(rng) for _ in range(rng.randint(2, 6))]
    text = ", ".join(words)
    answers = {
        "first": words[0],
        "last": words[-1],
        "count": str(len(words)),
        "repeat": text,
        "joined": ", ".join(words[:-1]) + f" and {words[-1]}",
    }
    return Example("words", text, text, answers)


def pair(rng: random.Random) -> Example:
    """``salt and pepper``; answers: ``swapped``, ``repeat``, ``first``, ``last``."""
    one, two = _word(rng), _word(rng)
    text = f"{one} and {two}"
    return Example(
        "words", text, text, {"swapped": f"{two} and {one}", "repeat": text, "first": one, "last": two}
    )


def title(rng: random.Random) -> Example:
    """A title; answers: ``quoted``, ``repeat``, ``polite``."""
    text = known_place_name(rng) if rng.random() < 0.5 else f"{invented_word(rng)} of {invented_word(rng)}"
    return Example("title", text, text, {"quoted": f'"{text}"', "repeat": text, "polite": f"Hello, {text}!"})


def _word(rng: random.Random) -> str:
    return invented_word(rng).lower() if rng.random() < 0.3 else rng.choice(lexicon.COMMON_NOUNS)
