"""The demo's tasks, as data: what is asked, how a prompt is trained, and what its ``task.json`` says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from demo.recipes.arithmetic import expression
from demo.recipes.corpus import Maker
from demo.recipes.dates import written_date
from demo.recipes.records import restaurant
from demo.recipes.reviews import ASPECTS, SENTIMENTS, aspect_review, review
from demo.recipes.splits import Example
from demo.recipes.utterances import INTENTS, utterance

BASE_NAME = "demo/demo-causal"
T5_NAME = "demo/seq2seq"
BART_NAME = "demo/seq2seq-bart"
RECIPES = {
    BASE_NAME: "demo/recipes/tasks.py",
    T5_NAME: "demo/recipes/seq2seq_tasks.py",
    BART_NAME: "demo/recipes/seq2seq_tasks.py",
}
TEMPLATE = "{text}\n"
# PEFT's names of its methods; the last one is the paper's own prefix, on an encoder-decoder (three_sites.py).
Kind = Literal["prompt-tuning", "p-tuning", "prefix-tuning", "three-site prefix"]
THREE_SITES: Kind = "three-site prefix"
# What must hold for nine of ten held-out inputs: the whole output, or every value of the record in it.
Bar = Literal["exact", "every_slot"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRecipe:
    """A learned task. ``start`` is the text whose embeddings a soft prompt starts from."""

    name: str
    make: Maker
    variant: str
    kind: Kind
    learning_rate: float
    steps: int
    max_new_tokens: int
    examples: tuple[
        tuple[str, str], ...
    ]  # input and output, for task.json: `build` fails where one is not met
    notes: str
    base: str = BASE_NAME
    num_kept: int = 300  # held-out inputs in the file; the first of the 300 that are measured
    start: str = ""
    choices: tuple[str, ...] = ()
    bar: Bar = "exact"
    num_virtual_tokens: int = 16
    num_examples: int = 2000
    batch_size: int = 32

    def expected(self, example: Example) -> str:
        return example.answers[self.variant]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTask:
    """A task that is an instruction and nothing learned."""

    name: str
    make: Maker
    variant: str
    instruction: str
    max_new_tokens: int
    examples: tuple[tuple[str, str], ...]
    notes: str
    base: str = BASE_NAME
    num_kept: int = 300
    choices: tuple[str, ...] = ()
    bar: Bar = "exact"


Task = TaskRecipe | TextTask


def template(task: Task) -> str:
    """How the input is put into words: as in the corpus, where an instruction may stand before it."""
    return TEMPLATE if isinstance(task, TaskRecipe) else f"{task.instruction}\n{TEMPLATE}"


def manifest(task: Task) -> dict[str, Any]:
    """The ``task.json`` of a task: what the server needs to know beside the tensors."""
    return {
        "template": template(task),
        "defaults": {"max_new_tokens": task.max_new_tokens},
        "choices": list(task.choices),
        "examples": [{"inputs": text, "expected": output} for text, output in task.examples],
        "notes": f"{task.notes} {_origin(task)}",
        "base": {"name": task.base, "revision": None},
    }


def _origin(task: Task) -> str:
    if isinstance(task, TextTask):
        return f"Recipe: {RECIPES[task.base]}."
    return (
        f"{'' if task.kind == THREE_SITES else 'PEFT '}{task.kind}, {task.steps} steps of {task.batch_size} "
        f"over {task.num_examples} examples. Recipe: {RECIPES[task.base]}."
    )


LEARNED: tuple[TaskRecipe, ...] = (
    TaskRecipe(
        name="sentiment",
        make=review,
        variant="sentiment",
        kind="prompt-tuning",
        learning_rate=0.03,
        steps=400,
        start="Is this review positive or negative?",
        max_new_tokens=8,
        choices=SENTIMENTS,
        examples=(
            ("The food was wonderful and the staff were friendly.", "positive"),
            ("What a dull film. I want my money back.", "negative"),
            ("The battery was not good, but overall the phone was excellent.", "positive"),
        ),
        notes="Says whether a short English review is positive or negative. Trained on made-up reviews only.",
    ),
    TaskRecipe(
        name="table-to-text",
        make=restaurant,
        variant="describe",
        kind="prefix-tuning",
        bar="every_slot",
        learning_rate=0.003,
        steps=200,
        max_new_tokens=80,
        examples=(
            (
                "name[The Eagle], food[Italian], area[riverside], price[cheap]",
                "The Eagle is a cheap Italian restaurant in the riverside area.",
            ),
            (
                "name[Blue Spice], type[pub], near[Crown Plaza], rating[5 out of 5]",
                "Blue Spice is a pub near Crown Plaza. Its rating is 5 out of 5.",
            ),
            (
                "name[Zorvek], type[coffee shop], food[vegan], kids[welcome]",
                "Zorvek is a vegan coffee shop. Children are welcome.",
            ),
        ),
        notes="Describes a restaurant record in words."
        " Fields: name, type, food, price, area, near, rating, kids.",
    ),
    TaskRecipe(
        name="intent",
        make=utterance,
        variant="intent",
        kind="p-tuning",
        learning_rate=0.005,
        steps=200,
        max_new_tokens=8,
        choices=INTENTS,
        examples=(
            ("wake me up at 7 am tomorrow", "alarm"),
            ("will it rain in Paris on Sunday", "weather"),
            ("send 20 dollars to Anna", "banking"),
        ),
        notes="Names the intent of a request to a household assistant: one of eight.",
    ),
    TaskRecipe(
        name="date-iso",
        make=written_date,
        variant="iso",
        kind="prefix-tuning",
        learning_rate=0.003,
        steps=200,
        max_new_tokens=16,
        examples=(
            ("March 5, 2021", "2021-03-05"),
            ("the 22nd of November 1963", "1963-11-22"),
            ("Friday, 5 March 2021", "2021-03-05"),
        ),
        notes="Writes an English date between 1900 and 2099 as year-month-day.",
    ),
    TaskRecipe(
        name="arithmetic",
        make=expression,
        variant="steps",
        kind="prompt-tuning",
        learning_rate=0.03,
        steps=400,
        start="Solve the expression step by step.",
        max_new_tokens=64,
        examples=(
            ("3 * (4 + 5)", "4 + 5 = 9; 3 * 9 = 27; answer: 27"),
            ("20 - 2 * 4", "2 * 4 = 8; 20 - 8 = 12; answer: 12"),
            ("(1 + 7) * 6", "1 + 7 = 8; 8 * 6 = 48; answer: 48"),
        ),
        notes="Solves small expressions in steps."
        " Factors up to 12, products up to 100, sums up to 99, nothing negative.",
    ),
)

TEXT_ONLY: tuple[TextTask, ...] = (
    TextTask(
        name="review-aspect",
        make=aspect_review,
        variant="aspect",
        instruction="Which aspect does the review talk about?",
        max_new_tokens=8,
        choices=ASPECTS,
        examples=(("The waiter was rude.", "service"), ("I loved the soundtrack of the film.", "sound")),
        notes="An instruction and no tensors: names the aspect that a one-topic review speaks about.",
    ),
    TextTask(
        name="date-us",
        make=written_date,
        variant="us",
        instruction="Write the date in US format.",
        max_new_tokens=16,
        examples=(("5 March 2021", "03/05/2021"), ("November 22nd, 1963", "11/22/1963")),
        notes="An instruction and no tensors: month/day/year.",
    ),
)


TASKS: tuple[Task, ...] = (*LEARNED, *TEXT_ONLY)


def learned(name: str) -> TaskRecipe:
    """The causal base's recipe called ``name``; KeyError where there is none."""
    return {recipe.name: recipe for recipe in LEARNED}[name]
