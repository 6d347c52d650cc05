"""Bodies of requests.

Unknown fields are refused, so that a mistyped name never silently changes the answer. Fields that
clients send by default are known, and must have their neutral value.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from app.api.schemas.client_defaults import OF_GENERATE, without_client_defaults
from app.api.schemas.parameters import OTHER_NAMES, ParametersBody, with_parameters
from app.api.schemas.response_format import Grammar, ResponseFormat
from app.serving.generation_request import ClassificationRequest, VoteRequest
from app.serving.program_settings import MAX_BALLOTS
from app.serving.publishing.task_settings import Choices
from app.serving.structured_output.constraints import Constraint
from app.store.traffic_split import AliasTarget, EnsembleTarget, SpreadTarget
from app.validation import PLAIN, StrictModel, wrong

MAX_REFERENCE_CHARS = 512
MAX_IDS = 1_000_000
MAX_SAMPLES = 16

Reference = Annotated[str, Field(min_length=1, max_length=MAX_REFERENCE_CHARS)]
User = Annotated[
    str,
    Field(
        max_length=256,
        description="End user; each always gets the same version of a weighted alias",
    ),
]
Why = Annotated[str, Field(max_length=1000, description="Reason, kept in the task's history")]


_TEXT, _FIELDS = "<text>", "<fields>"


def _inputs_tag(value: Any) -> str | None:
    if isinstance(value, str):
        return _TEXT
    return _FIELDS if isinstance(value, dict) else None


class VoteBody(StrictModel):
    """Self-consistency: n samples, of which the most frequent answer wins."""

    n: int = Field(ge=1, le=MAX_BALLOTS, description="Number of ballots; 1 switches the vote of a task off")
    by: Literal["answer"] = Field(
        "answer", description="Compare the answers alone, without the steps before them"
    )

    @model_validator(mode="before")
    @classmethod
    def _is_object(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            raise wrong('must be an object such as {"n": 5}')
        return data

    def request(self) -> VoteRequest:
        """Return how to vote."""
        return VoteRequest(num_ballots=self.n)


# With plain alternatives, an error would be reported for each.
Inputs = Annotated[
    Annotated[str, Tag(_TEXT)] | Annotated[dict[str, str], Tag(_FIELDS)],
    Discriminator(
        _inputs_tag,
        custom_error_type=PLAIN,
        custom_error_message="must be a string, or an object with the template's fields",
    ),
]


@with_parameters()
class Parameters(ParametersBody):
    """How to generate. A field that is absent or null comes from the task, else from the base model."""

    n: int | None = Field(
        None, ge=1, le=MAX_SAMPLES, description="Number of answers; several are in `samples`. Default: 1"
    )
    num_return_sequences: int | None = Field(
        None, ge=1, le=MAX_SAMPLES, description="Another name for n; of beam search, at most num_beams"
    )
    grammar: Grammar | None = Field(None, description="JSON schema or regex that the answer must match")
    response_format: ResponseFormat | None = Field(
        None, description="The same in the form of LoRAX and the OpenAI API"
    )
    choices: Literal[True] | Choices | None = Field(
        None,
        description="Classify instead of generating: the labels to choose from, or true for the task's own",
    )
    score_eos: bool | None = Field(None, description="Include EOS after a label in its score. Default: true")
    length_normalized: bool | None = Field(
        None, description="Compare mean instead of total log-probabilities of labels. Default: false"
    )
    vote: VoteBody | None = Field(
        None, description="Sample several answers; the most frequent one wins. Default: as the task says"
    )
    details: bool | None = Field(None, description="Report tokens and counts. Default: true")
    adapter_id: Reference | None = Field(None, description="Another name for task_id")

    @model_validator(mode="before")
    @classmethod
    def _without_client_defaults(cls, data: Any) -> Any:
        return without_client_defaults(data, OF_GENERATE, {**cls.model_fields, **OTHER_NAMES}, "parameters.")

    def constraint(self) -> Constraint | None:
        """What the answer must be."""
        if self.grammar is not None:
            return self.grammar.constraint("parameters.grammar")
        given = self.response_format
        return None if given is None else given.constraint("parameters.response_format")

    @model_validator(mode="after")
    def _one_n(self) -> Self:
        if None not in (self.n, self.num_return_sequences):
            raise ValueError("num_return_sequences and n mean the same; send one of them")
        return self

    @model_validator(mode="after")
    def _one_constraint(self) -> Self:
        if self.grammar is not None and self.response_format is not None:
            raise ValueError("grammar and response_format both say what the answer is; send one")
        return self

    def classification(self) -> ClassificationRequest | None:
        """Return how to classify; None: generate."""
        if self.choices is None:
            return None
        given = (
            None
            if self.choices is True
            else tuple(each if isinstance(each, str) else each.model_dump() for each in self.choices)
        )
        return ClassificationRequest(
            choices=given,
            score_eos=self.score_eos is not False,
            length_normalized=bool(self.length_normalized),
        )


class GenerateRequest(StrictModel):
    """A task, its inputs, and how to generate."""

    task_id: Reference | None = Field(
        None, description="task, task@alias, task@3 or task@sha256:<digest>. Default: the base model alone"
    )
    inputs: Inputs = Field(description="A text, or an object with exactly the fields of the task's template")
    user: User | None = None
    parameters: Parameters | None = None
    stream: bool | None = Field(
        None, description="Answer with server-sent events, one for each token. Default: false"
    )

    @model_validator(mode="after")
    def _one_name(self) -> Self:
        adapter = self.parameters.adapter_id if self.parameters else None
        if adapter is not None and self.task_id not in (None, adapter):
            raise ValueError("task_id and parameters.adapter_id name different tasks; send one of them")
        return self

    @model_validator(mode="after")
    def _choices_alone(self) -> Self:
        given = self.parameters or Parameters()
        generates = (
            self.is_stream
            or self.num_answers > 1
            or given.given().get("do_sample")
            or given.constraint() is not None
        )
        if given.choices is not None and generates:
            raise ValueError(
                "choices don't go with stream, n, sampling or grammar: labels are scored, not generated"
            )
        if self.is_stream and self.num_answers > 1:
            raise ValueError("a stream has one answer; leave out n, or use /v1/completions")
        return self

    @property
    def is_stream(self) -> bool:
        """Whether the answer comes a token at a time."""
        return bool(self.stream)

    @property
    def num_answers(self) -> int:
        """How many are asked for."""
        given = self.parameters or Parameters()
        return given.n or given.num_return_sequences or 1

    @property
    def reference(self) -> str | None:
        """The task that is asked for, by either name."""
        return self.task_id or (self.parameters.adapter_id if self.parameters else None)


class GenerateStreamRequest(GenerateRequest):
    """A task, its inputs, and how to generate; the answer is a stream."""

    stream: Literal[True] | None = Field(None, description="The answer is always a stream")

    @property
    def is_stream(self) -> bool:
        """Always."""
        return True


class TokenizeRequest(StrictModel):
    """The inputs to tokenize, as for /generate."""

    task_id: Reference | None = None
    inputs: Inputs


class DetokenizeRequest(StrictModel):
    """Token ids of the base model's vocabulary."""

    ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MAX_IDS)]


class AliasRequest(StrictModel):
    """Where an alias shall point: at one version, at several by weight, or at an ensemble."""

    version: Annotated[int, Field(ge=1)] | None = None
    weights: dict[Annotated[str, Field(pattern=r"^[1-9][0-9]{0,8}$")], int] | None = Field(
        None,
        description='Weights by version, such as {"3": 90, "4": 10}; a user always gets the same version',
    )
    ensemble: bool = Field(
        False, description="With weights: all these versions answer each request, and the majority wins"
    )
    spread_paraphrases: bool = Field(
        False, description="With version: each user always gets the same one of its paraphrases"
    )
    expected_release: int | None = Field(
        None,
        ge=0,
        description="Number of the task's last release, 0 for none; 409 if it isn't. Default: not checked",
    )
    why: Why = ""

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if (self.version is None) == (self.weights is None):
            raise ValueError("send either version or weights")
        if self.ensemble and self.weights is None:
            raise ValueError("ensemble goes with weights, which name the versions that answer together")
        if self.spread_paraphrases and self.version is None:
            raise ValueError("spread_paraphrases goes with version, which has the paraphrases")
        return self

    @property
    def target(self) -> AliasTarget:
        """What the alias shall point at."""
        if self.version is not None:
            return SpreadTarget(self.version) if self.spread_paraphrases else self.version
        weights = {int(version): weight for version, weight in (self.weights or {}).items()}
        return EnsembleTarget(weights) if self.ensemble else weights


class ReasonRequest(StrictModel):
    """A reason for the task's history."""

    why: Why = ""


class RollbackRequest(StrictModel):
    """Which alias to roll back, and why."""

    alias: Annotated[str, Field(min_length=1, max_length=64)] | None = Field(
        None, description="Default: live"
    )
    why: Why = ""
