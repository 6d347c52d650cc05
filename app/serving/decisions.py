"""Decisions: questions about one input, and how probable the model finds each of their options."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from app.errors import InvalidRequest
from app.prompt import TaskVersion
from app.request import RequestTimings
from app.serving.generation_request import GenerationRequest
from app.text.message import Message

MAX_LABELS = 4096  # options of all questions of a call
Value = str | bool  # true and "true" are two values


class QuestionKind(StrEnum):
    """What an answer is read as."""

    PREDICATE = "predicate"  # whether a statement holds
    CHOICE = "choice"  # one of some values
    SCORE = "score"  # a place on ordered levels


@dataclass(frozen=True, slots=True)
class Option:
    """What the model may say."""

    value: Value
    description: str | None = None


PREDICATE = (Option(True), Option(False))


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question about the input."""

    number: int  # in its request
    kind: QuestionKind
    instructions: str
    options: tuple[Option, ...]
    name: str | None = None

    @property
    def options_field(self) -> str:
        """Return the field that the options came in."""
        return {QuestionKind.CHOICE: "choices", QuestionKind.SCORE: "levels"}.get(self.kind, "type")

    def refused(self, why: str, field: str) -> InvalidRequest:
        """Return the error of one of its fields."""
        place = f"questions.{self.number}.{field}"
        return InvalidRequest(f"{place}: {why}.", param=place)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionRequest:
    """Questions about one input. `asked` has all else: the task, the user, the deadline."""

    asked: GenerationRequest
    messages: tuple[Message, ...]
    questions: tuple[Question, ...]

    @property
    def num_labels(self) -> int:
        """Return how many labels are scored."""
        return sum(len(question.options) for question in self.questions)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The answer to one question."""

    question: Question
    probabilities: Sequence[float] | None  # of its options, which sum to 1; None: the model gives no answer
    label_mass: float = 0.0  # the probability that the model says any of the labels, before calibration

    @property
    def best(self) -> int:
        """Return the number of the most probable option."""
        found = self.probabilities or ()
        return max(range(len(found)), key=found.__getitem__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decisions:
    """The answers to all questions of a request."""

    verdicts: tuple[Verdict, ...]
    version: TaskVersion | None  # None: the base model
    prompt_tokens: int  # of all questions, each with the whole input
    shared_tokens: int  # of those, what was computed for one question and read by the others
    label_tokens: int
    timings: RequestTimings
