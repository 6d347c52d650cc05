"""The tasks of the encoder-decoder bases: news on both, and three of the causal base's tasks on the T5."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from demo.recipes.news import article
from demo.recipes.tasks import BART_NAME, T5_NAME, Task, TaskRecipe, TextTask, learned

_ARTICLE = (
    "The work took 4 months. On Tuesday, Maria Rivers, a baker from Oslo, opened a small museum in Lisbon. "
    "The mayor of Rome was proud. Rain is expected on Friday night. Tom Kelly was there in April."
)
_SECOND = (
    "Oscar Jensen rescued three sailors in Naples on May 3. Nobody was hurt, said Peter Zorvek. "
    "A crowd of 40 watched. Priya Lane hopes to come back on Sunday morning."
)
_NEWS = partial(TaskRecipe, make=article, num_kept=100)

headline = partial(
    _NEWS,
    name="headline",
    variant="headline",
    max_new_tokens=48,
    examples=(
        (_ARTICLE, "Maria Rivers opens small museum in Lisbon"),
        (_SECOND, "Oscar Jensen rescues three sailors in Naples"),
    ),
    notes="Writes the headline of a short news text: its key event.",
)
who = partial(
    _NEWS,
    name="who",
    variant="who",
    max_new_tokens=24,
    examples=((_ARTICLE, "Maria Rivers"), (_SECOND, "Oscar Jensen")),
    notes="Says who a short news text is about.",
)
when = partial(
    _NEWS,
    name="when",
    variant="when",
    max_new_tokens=24,
    examples=((_ARTICLE, "on Tuesday"), (_SECOND, "on May 3")),
    notes="Says when the key event of a short news text happened.",
)

T5_TASKS: tuple[Task, ...] = (
    who(base=T5_NAME, kind="prefix-tuning", learning_rate=0.003, steps=200),
    when(base=T5_NAME, kind="p-tuning", learning_rate=0.005, steps=200),
    headline(
        base=T5_NAME,
        kind="prompt-tuning",
        learning_rate=0.3,
        steps=200,
        start="Write a headline for this article.",
    ),
    replace(
        learned("intent"),
        base=T5_NAME,
        kind="prompt-tuning",
        learning_rate=0.3,
        steps=200,
        start="What is the intent of this message?",
    ),
    replace(learned("sentiment"), base=T5_NAME, learning_rate=0.3, steps=300, num_examples=10_000),
    replace(learned("table-to-text"), base=T5_NAME, steps=200),
    TextTask(
        name="where",
        make=article,
        variant="where",
        instruction="Where did it happen?",
        base=T5_NAME,
        num_kept=100,
        max_new_tokens=16,
        examples=((_ARTICLE, "Lisbon"), (_SECOND, "Naples")),
        notes="An instruction and no tensors: the city of the key event of a short news text.",
    ),
)

BART_TASKS: tuple[Task, ...] = (
    headline(base=BART_NAME, kind="three-site prefix", learning_rate=0.003, steps=250, num_virtual_tokens=10),
    who(base=BART_NAME, kind="three-site prefix", learning_rate=0.003, steps=250, num_virtual_tokens=10),
)
