"""Reviews: their sentiment, and the aspect they speak about."""

from __future__ import annotations

import random
from collections.abc import Callable

from demo.recipes import lexicon
from demo.recipes.splits import Example

SENTIMENTS = ("positive", "negative")
ASPECTS = tuple(sorted({aspect for _, aspects in lexicon.DOMAINS.values() for aspect in aspects}))


def review(rng: random.Random) -> Example:
    """One to three sentences; answers: ``sentiment``, ``quality`` (good/bad), ``liked`` (yes/no)."""
    good = rng.random() < 0.5
    domain = rng.choice(list(lexicon.DOMAINS))
    sentences = [_opinion(rng, good, domain)]
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        sentences.append(_support(rng, good, domain))
    rng.shuffle(sentences)
    text = _surface(rng, " ".join(sentences))
    return Example("review", text, _key(text), _answers(good))


def aspect_review(rng: random.Random) -> Example:
    """A review about one aspect; its name is the answer ``aspect``."""
    domain = rng.choice(list(lexicon.DOMAINS))
    aspect = rng.choice(list(lexicon.DOMAINS[domain][1]))
    good = rng.random() < 0.5
    sentences = [_aspect_sentence(rng, good, domain, aspect)]
    if rng.random() < 0.4:
        sentences.insert(rng.randint(0, 1), rng.choice(lexicon.FILLERS) + ".")
    text = _surface(rng, " ".join(sentences))
    return Example("review", text, _key(text), {"aspect": aspect, **_answers(good)})


def _answers(good: bool) -> dict[str, str]:
    return {
        "sentiment": SENTIMENTS[0] if good else SENTIMENTS[1],
        "quality": "good" if good else "bad",
        "liked": "yes" if good else "no",
    }


def _key(text: str) -> str:
    return text.lower().rstrip(".!")


def _surface(rng: random.Random, text: str) -> str:
    """Users write with and without capitals, full stops and exclamation marks."""
    if rng.random() < 0.12:
        text = text.lower()
    if rng.random() < 0.15:
        text = text.rstrip(".!")
    elif rng.random() < 0.12:
        text = text.rstrip(".") + "!"
    return text


def _adjective(rng: random.Random, good: bool) -> str:
    word = rng.choice(lexicon.POSITIVE if good else lexicon.NEGATIVE)
    roll = rng.random()
    if roll < 0.3:
        return f"{rng.choice(lexicon.INTENSIFIERS)} {word}"
    return f"{word} and {rng.choice(lexicon.POSITIVE if good else lexicon.NEGATIVE)}" if roll < 0.45 else word


def _article(phrase: str) -> str:
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def _thing(rng: random.Random, domain: str) -> str:
    return rng.choice(lexicon.DOMAINS[domain][0])


def _part(rng: random.Random, domain: str) -> str:
    return rng.choice(rng.choice(list(lexicon.DOMAINS[domain][1].values())))


def _verdict(rng: random.Random, good: bool, domain: str) -> str:
    thing = _thing(rng, domain)
    start = rng.choice(("The", "This", "That", "The whole"))
    verb = rng.choice(("was", "is", "was", "felt"))
    return f"{start} {thing} {verb} {_adjective(rng, good)}"


def _feeling(rng: random.Random, good: bool, domain: str) -> str:
    verb = rng.choice(lexicon.LOVED if good else lexicon.HATED)
    what = _thing(rng, domain) if rng.random() < 0.7 else _part(rng, domain)
    subject = rng.choice(("I", "I", "We", "My family"))
    text = f"{subject} {verb} {rng.choice(('this', 'the', 'the', 'that'))} {what}"
    return (
        text.replace("We am", "We are").replace("My family am", "My family is").replace("We was", "We were")
    )


def _exclaim(rng: random.Random, good: bool, domain: str) -> str:
    return f"What {_article(_adjective(rng, good))} {_thing(rng, domain)}"


def _noun_phrase(rng: random.Random, good: bool, domain: str) -> str:
    phrase = f"{_adjective(rng, good)} {_thing(rng, domain)}"
    phrase = phrase if rng.random() < 0.5 else f"{phrase}, {_adjective(rng, good)} {_part(rng, domain)}"
    return phrase[0].upper() + phrase[1:]


def _pair(rng: random.Random, good: bool, domain: str) -> str:
    first, second = _part(rng, domain), _part(rng, domain)
    return f"The {first} was {_adjective(rng, good)} and the {second} was {_adjective(rng, good)}"


def _one_of(rng: random.Random, good: bool, domain: str) -> str:
    superlative = rng.choice(
        ("best", "nicest", "finest", "greatest") if good else ("worst", "dullest", "saddest", "poorest")
    )
    thing = _thing(rng, domain)
    tail = rng.choice(("I have ever seen", "I know", "in years", "of the year", "in town", "in a long time"))
    return rng.choice(
        (f"This is the {superlative} {thing} {tail}", f"It was the {superlative} {thing} {tail}")
    )


def _negated(rng: random.Random, good: bool, domain: str) -> str:
    """``not good`` is negative, ``never boring`` is positive."""
    word = rng.choice(lexicon.NEGATIVE if good else lexicon.POSITIVE)
    subject = f"The {_thing(rng, domain)}" if rng.random() < 0.5 else f"The {_part(rng, domain)}"
    form = rng.choice(
        ("{s} was not {w}", "{s} was never {w}", "{s} is not {w} at all", "{s} wasn't {w}", "{s} isn't {w}")
    )
    return str(form).format(s=subject, w=word)


def _contrast(rng: random.Random, good: bool, domain: str) -> str:
    """The second half decides."""
    minor, major = _part(rng, domain), _thing(rng, domain)
    weak, strong = _adjective(rng, not good), _adjective(rng, good)
    verb = rng.choice(lexicon.LOVED if good else lexicon.HATED)
    return rng.choice(
        (
            f"The {minor} was {weak}, but overall the {major} was {strong}",
            f"Despite the {weak} {minor}, the {major} was {strong}",
            f"Although the {minor} was {weak}, I {verb} the {major}",
        )
    )


def _ending(rng: random.Random, good: bool, domain: str) -> str:
    return rng.choice(lexicon.GOOD_END if good else lexicon.BAD_END)


_OPINIONS: tuple[tuple[Callable[[random.Random, bool, str], str], int], ...] = (
    (_verdict, 6),
    (_feeling, 5),
    (_exclaim, 2),
    (_noun_phrase, 3),
    (_pair, 4),
    (_one_of, 2),
    (_negated, 4),
    (_contrast, 3),
    (_ending, 3),
)


def _opinion(rng: random.Random, good: bool, domain: str) -> str:
    makers, weights = zip(*_OPINIONS, strict=True)
    chosen: Callable[[random.Random, bool, str], str] = rng.choices(makers, weights)[0]
    return chosen(rng, good, domain) + "."


def _support(rng: random.Random, good: bool, domain: str) -> str:
    if rng.random() < 0.3:
        return rng.choice(lexicon.FILLERS) + "."
    return _opinion(rng, good, domain)


def _aspect_sentence(rng: random.Random, good: bool, domain: str, aspect: str) -> str:
    part = rng.choice(lexicon.DOMAINS[domain][1][aspect])
    thing = _thing(rng, domain)
    verb = rng.choice(lexicon.LOVED if good else lexicon.HATED)
    return rng.choice(
        (
            f"The {part} was {_adjective(rng, good)}.",
            f"The {part} of this {thing} was {_adjective(rng, good)}.",
            f"I {verb} the {part}.",
            f"I {verb} the {part} of the {thing}.",
            f"What {_article(_adjective(rng, good))} {part}!",
        )
    )
