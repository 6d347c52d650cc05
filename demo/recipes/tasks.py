"""The demo's tasks, as data: what is asked, how a prompt is trained, and what its ``task.json`` says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from demo.recipes.arithmetic import expression
from demo.recipes.corpus import Maker
from demo.recipes.dates import written_date
from demo.recipes.records import restaurant
from demo.recipes.reductions import (
    FOUR,
    FOUR_UNTRAINED,
    THREE_OF_CORPUS,
    THREE_OTHERS,
    nested,
    of_forms,
    rewrites,
)
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
# What must hold for nine of ten held-out inputs, or ``at_least``: the whole answer, or every slot in it.
Bar = Literal["exact", "every_slot"]
AT_LEAST = 0.9
Program = dict[str, Any]  # fields of task.json: reasoning, chain, paraphrases, few_shot
Pairs = list[tuple[str, str]]


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
    at_least: float = AT_LEAST
    num_virtual_tokens: int = 16
    num_examples: int = 2000
    batch_size: int = 32
    program: Program = field(default_factory=dict)
    pairs: Callable[[Example], Pairs] | None = None  # to train on; None: the text and what is expected
    also: dict[str, Maker] = field(default_factory=dict)  # more held-out inputs, by the name of their file
    seed: int = 7

    def expected(self, example: Example) -> str:
        return example.answers[self.variant]

    def trained_on(self, example: Example) -> Pairs:
        """Texts and the outputs that the prompt learns for them."""
        return self.pairs(example) if self.pairs else [(example.text, self.expected(example))]


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
    at_least: float = AT_LEAST
    program: Program = field(default_factory=dict)


Task = TaskRecipe | TextTask


def template(task: Task) -> str:
    """How the input is put into words: as in the corpus, where an instruction may stand before it."""
    return TEMPLATE if isinstance(task, TaskRecipe) else f"{task.instruction}\n{TEMPLATE}"


def leading(task: Task) -> str:
    """The worked examples, as they stand before each input."""
    shots = task.program.get("few_shot", [])
    return "".join(
        f"{template(task).replace('{text}', shot['inputs'])}{shot['output']}\n\n" for shot in shots
    )


def manifest(task: Task) -> dict[str, Any]:
    """The ``task.json`` of a task: what the server needs to know beside the tensors."""
    return {
        "template": template(task),
        "defaults": {"max_new_tokens": task.max_new_tokens},
        "choices": list(task.choices),
        "examples": [{"inputs": text, "expected": output} for text, output in task.examples],
        "notes": f"{task.notes} {_origin(task)}",
        "base": {"name": task.base, "revision": None},
        **task.program,
    }


def read(task: Task, output: str) -> str:
    """The answer in an output: what stands behind the marker, where the task has one."""
    marker = _marker(task)
    return output.partition(marker)[2].strip() if marker else output


def _marker(task: Task) -> str:
    """What stands before an answer; nothing where the output is the answer."""
    chain, reasoning = (task.program.get(name, {}) for name in ("chain", "reasoning"))
    return str(chain.get("done") or reasoning.get("answer_after") or "")


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
        program={
            "reasoning": {
                "answer_after": "answer:",
                "steps_end": ";",
                "effort": {"low": 12, "medium": 24, "high": 48},
            }
        },
        examples=(("3 * (4 + 5)", "27"), ("20 - 2 * 4", "12"), ("(1 + 7) * 6", "48")),
        notes="Solves small expressions in steps."
        " Factors up to 12, products up to 100, sums up to 99, nothing negative.",
    ),
    TaskRecipe(
        name="reduce",
        make=nested,
        variant="steps",
        at_least=0.75,  # forms that the base never saw are part of it
        kind="prefix-tuning",
        learning_rate=0.002,
        steps=3000,
        num_virtual_tokens=32,
        num_examples=16_000,
        pairs=rewrites,
        also={
            "three": of_forms(*THREE_OF_CORPUS),
            "three-new": of_forms(*THREE_OTHERS),
            "four": of_forms(*FOUR),
            "four-new": of_forms(*FOUR_UNTRAINED),
        },
        max_new_tokens=128,
        program={"chain": {"template": "{last}\n", "done": "answer:", "max_steps": 6}},
        examples=(("3 * (4 + 5)", "27"), ("9 + 2 * (3 + 4)", "23"), ("(1 + 7) * 6 - 5", "43")),
        notes="Solves expressions of up to four operations as a chain: each step does what can be done at"
        " once and writes what is left, which is the next step's input.",
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
        name="mood",
        make=review,
        variant="sentiment",
        instruction="Is this review positive or negative?",
        max_new_tokens=8,
        choices=SENTIMENTS,
        program={
            "paraphrases": [
                "What is the sentiment of this review?\n{text}\n",
                "Sentiment:\n{text}\n",
                "Is the text positive or negative?\n{text}\n",
                "Decide whether this review is positive or negative.\n{text}\n",
                "What is the sentiment of this review?\n{options}\n{text}\n",
            ],
            "few_shot": [
                {"inputs": "The soup was cold and the waiter was rude.", "output": "negative"},
                {"inputs": "I loved the music in this film.", "output": "positive"},
            ],
        },
        examples=(
            ("The food was wonderful and the staff were friendly.", "positive"),
            ("What a dull film. I want my money back.", "negative"),
        ),
        notes="An instruction, in six phrasings, with two worked examples, and no tensors. Two of the"
        " phrasings were kept out of pretraining; lists of options and worked examples never were in it.",
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
