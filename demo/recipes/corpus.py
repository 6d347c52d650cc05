"""The pretraining corpus: 78% task documents, 22% plain text.

A task document is ``instruction\\ninput\\noutput<eos>``. The server sends ``virtual tokens`` + ``input\\n``:
a trained prompt takes the place of the instruction. The plain text makes "no prompt" mean "just continue":
30% of it is prose, 45% a bare task input followed by prose, 25% a list of bare inputs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from demo.recipes import prose
from demo.recipes.arithmetic import expression
from demo.recipes.dates import written_date
from demo.recipes.instructions import phrasings
from demo.recipes.records import person, restaurant
from demo.recipes.reviews import aspect_review, review
from demo.recipes.splits import Example, Split, draw
from demo.recipes.utterances import utterance
from demo.recipes.wordplay import pair, title, word_list

PLAIN_SHARE = 0.22
Maker = Callable[[random.Random], Example]


@dataclass(frozen=True, slots=True)
class Source:
    """One kind of input, its share of the task documents, and how often each of its tasks is asked."""

    make: Maker
    share: float
    variants: dict[str, float]


_FIELDS = {
    f"record_{key}": 1.0 for key in ("name", "food", "area", "price", "type", "near", "rating", "kids")
}
SOURCES: tuple[Source, ...] = (
    Source(review, 20, {"sentiment": 6, "quality": 1, "liked": 1}),
    Source(aspect_review, 3, {"aspect": 4, "sentiment": 1}),
    Source(utterance, 9, {"intent": 1}),
    Source(restaurant, 18, {"describe": 12, "advert": 4, **dict.fromkeys(_FIELDS, 0.4), "record_name": 1.6}),
    Source(person, 3, {"describe": 4, "record_name": 1, "record_job": 1}),
    Source(written_date, 12, {"iso": 6, "us": 2, "dotted": 1.5, "month": 1.5, "year": 1}),
    Source(expression, 27, {"steps": 1}),
    Source(word_list, 5, {"first": 1, "last": 1, "count": 1, "repeat": 1, "joined": 1}),
    Source(pair, 2.5, {"swapped": 2, "repeat": 1, "first": 0.5, "last": 0.5}),
    Source(title, 2.5, {"quoted": 1, "repeat": 1, "polite": 1}),
)


@dataclass(frozen=True, slots=True)
class Document:
    """``context`` is read (small loss weight), ``output`` is what the model must learn to write."""

    context: str
    output: str
    plain: bool = False

    @property
    def text(self) -> str:
        return self.context + self.output


def choose(rng: random.Random, sources: Sequence[Source]) -> Source:
    """One of ``sources``, by their shares."""
    return rng.choices(sources, [source.share for source in sources])[0]


def ask(rng: random.Random, source: Source) -> tuple[str, str, str]:
    """An instruction, an input of the pretraining split, and the answer."""
    example = draw(rng, source.make, Split.PRETRAIN)
    possible = [variant for variant in source.variants if variant in example.answers]
    variant = rng.choices(possible, [source.variants[name] for name in possible])[0]
    return rng.choice(phrasings(variant)), example.text, example.answers[variant]


def task_document(rng: random.Random) -> Document:
    """An instruction and an input, and the answer."""
    instruction, text, answer = ask(rng, choose(rng, SOURCES))
    return Document(f"{instruction}\n{text}\n", answer)


def plain_document(rng: random.Random) -> Document:
    """Prose, a bare input followed by prose, or a list of bare inputs."""
    roll = rng.random()
    if roll < 0.30:
        return Document("", prose.paragraph(rng, 2, 6), plain=True)
    source = choose(rng, SOURCES)
    first = draw(rng, source.make, Split.PRETRAIN).text
    if roll < 0.75:
        return Document("", f"{first}\n{prose.paragraph(rng)}", plain=True)
    others = [draw(rng, source.make, Split.PRETRAIN).text for _ in range(rng.randint(1, 3))]
    return Document("", "\n".join([first, *others]), plain=True)


def documents(count: int, seed: int) -> Iterator[Document]:
    """The corpus; the same seed gives the same documents."""
    rng = random.Random(seed)
    for _ in range(count):
        yield plain_document(rng) if rng.random() < PLAIN_SHARE else task_document(rng)
