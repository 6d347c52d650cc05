"""The shapes of answers of `/v1/decisions`; `label_mass` is ours beside OpenAI's fields."""

from typing import Annotated, Literal

from pydantic import Field
from typing_extensions import TypedDict

from app.api.schemas.answers import LabelMass
from app.validation import closed

_Name = Annotated[str | None, Field(description="Name of the question; null: it has none")]
_Confidence = Annotated[float, Field(description="The highest of the probabilities, after calibration")]


@closed
class PredicateAnswer(TypedDict):
    """How probable it is that a statement is true."""

    type: Literal["predicate"]
    name: _Name
    probability: float
    label_mass: LabelMass


@closed
class ValueProbability(TypedDict):
    """A choice and its probability."""

    value: str | bool
    probability: float


@closed
class ChoiceDecision(TypedDict):
    """The most probable choice."""

    type: Literal["choice"]
    name: _Name
    choice: str | bool
    confidence: _Confidence
    probabilities: list[ValueProbability]
    label_mass: LabelMass


@closed
class LevelProbability(TypedDict):
    """A level, its place from 0 on, and its probability."""

    value: int
    label: str
    probability: float


@closed
class ScoreAnswer(TypedDict):
    """The expected level."""

    type: Literal["score"]
    name: _Name
    score: Annotated[float, Field(description="Mean of the levels' values by their probabilities")]
    confidence: _Confidence
    probabilities: list[LevelProbability]
    label_mass: LabelMass


@closed
class RefusalAnswer(TypedDict):
    """No answer: the model gives no label a chance, or its logits are not finite."""

    type: Literal["refusal"]
    name: _Name


DecisionAnswer = PredicateAnswer | ChoiceDecision | ScoreAnswer | RefusalAnswer


@closed
class DecisionInputDetails(TypedDict):
    """Input tokens that were not computed again."""

    cached_tokens: Annotated[
        int, Field(description="Computed for one question and read by the others that begin with them")
    ]
    cache_write_tokens: int


@closed
class DecisionOutputDetails(TypedDict):
    """None of them is reasoning."""

    reasoning_tokens: int


@closed
class DecisionUsage(TypedDict):
    """Counts of tokens."""

    input_tokens: Annotated[int, Field(description="Tokens of all questions, each with the whole input")]
    input_tokens_details: DecisionInputDetails
    output_tokens: Annotated[int, Field(description="Tokens of all labels, which are scored")]
    output_tokens_details: DecisionOutputDetails
    total_tokens: int


@closed
class DecisionList(TypedDict):
    """The answers, in the order of the questions."""

    model: str
    answers: list[DecisionAnswer]
    usage: DecisionUsage
