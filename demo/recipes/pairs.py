"""The corpus of the encoder-decoders: sources and targets, 78% tasks and 22% plain text.

A task is ``instruction\\ninput\\n`` -> ``output``. In a third of them the source is the bare input, and the
decoder reads the instruction, before its start token. A prefix at the decoder's self-attention stands at
that place, so a base that has seen this can be steered from there.
Plain pairs make "no prompt" mean "go on": 30% fill a gap in prose, 45% follow a bare input with prose, 25%
follow it with inputs of its kind.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from demo.recipes import prose
from demo.recipes.corpus import PLAIN_SHARE, Source, ask, choose
from demo.recipes.news import article
from demo.recipes.records import restaurant
from demo.recipes.reviews import review
from demo.recipes.splits import Split, draw
from demo.recipes.utterances import utterance

GAP = "___"
LEADING_SHARE = 1 / 3
# What the demo's tasks ask, and little else. Half are reviews: a label teaches little about a review's words,
# and at a third of the tasks the sentiment of many words was unknown when all else had been learned.
PAIR_SOURCES: tuple[Source, ...] = (
    Source(article, 30, {"headline": 3, "who": 2, "when": 2, "lead": 1, "where": 1}),
    Source(review, 60, {"sentiment": 6, "quality": 1, "liked": 1}),
    Source(utterance, 8, {"intent": 1}),
    Source(restaurant, 20, {"describe": 12, "advert": 2, "record_name": 2, "record_food": 1}),
)


@dataclass(frozen=True, slots=True)
class Pair:
    """``source`` is encoded; the decoder reads ``leading``, then writes ``target``."""

    source: str
    target: str
    leading: str = ""
    plain: bool = False


def task_pair(rng: random.Random) -> Pair:
    """An input and its answer, with the instruction on one side or the other."""
    instruction, text, answer = ask(rng, choose(rng, PAIR_SOURCES))
    if rng.random() < LEADING_SHARE:
        return Pair(f"{text}\n", answer, leading=f"{instruction}\n")
    return Pair(f"{instruction}\n{text}\n", answer)


def plain_pair(rng: random.Random) -> Pair:
    """Prose with a gap and what is missing, or a bare input and what follows it."""
    roll = rng.random()
    if roll < 0.30:
        return _gap(rng, prose.paragraph(rng, 2, 5))
    source = choose(rng, PAIR_SOURCES)
    text = draw(rng, source.make, Split.PRETRAIN).text
    if roll < 0.75:
        return Pair(f"{text}\n", prose.paragraph(rng, 1, 2), plain=True)
    return Pair(f"{text}\n", draw(rng, source.make, Split.PRETRAIN).text, plain=True)


def _gap(rng: random.Random, text: str) -> Pair:
    words = text.split()
    start = rng.randrange(len(words) - 1)
    end = min(len(words), start + rng.randint(1, 6))
    return Pair(" ".join([*words[:start], GAP, *words[end:]]) + "\n", " ".join(words[start:end]), plain=True)


def pairs(count: int, seed: int) -> Iterator[Pair]:
    """The corpus; the same seed gives the same pairs."""
    rng = random.Random(seed)
    for _ in range(count):
        yield plain_pair(rng) if rng.random() < PLAIN_SHARE else task_pair(rng)
