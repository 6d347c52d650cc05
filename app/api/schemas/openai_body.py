"""What bodies of OpenAI's routes share: unknown fields are refused, unsupported ones taken if neutral."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from app.api.schemas.client_defaults import without_client_defaults
from app.api.schemas.generate import Reference, User, VoteBody
from app.api.schemas.neutral import Neutral
from app.api.schemas.parameters import OTHER_NAMES, ParametersBody, with_parameters
from app.api.schemas.response_format import Format, StructuredOutputs
from app.request import MIN_TEMPERATURE
from app.serving.parameters import Stop, Stops
from app.serving.structured_output.constraints import Constraint
from app.validation import StrictModel, wrong

MAX_BIASES = 300

LogitBias = Annotated[
    dict[Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=MAX_BIASES),
]

INSTEAD_OF_TOOLS = (
    "leave it out. For arguments as JSON, send their schema as response_format "
    '{"type": "json_schema", "json_schema": {"name": ..., "schema": ...}}; to /v1/responses, as text.format'
)


def uncallable(given: list[Any] | None, info: ValidationInfo) -> list[Any] | None:
    """Check that the tools, or functions, of a body are none or must not be called."""
    choice = info.data.get("tool_choice" if info.field_name == "tools" else "function_call")
    if given and choice != "none":
        raise wrong(f"is not supported; {INSTEAD_OF_TOOLS}")
    return given


class ReasoningBody(StrictModel, ABC):
    """Parameters of reasoning in an object of their own."""

    @abstractmethod
    def parameters(self) -> dict[str, Any]:
        """Return generation parameters by our names."""


@with_parameters(
    lambda each: each.openai,
    temperature={"ge": 0, "description": "Divides the logits before sampling; 0 is greedy decoding"},
)
class OpenAiBody(ParametersBody):
    """The fields that all of them have."""

    _client_defaults: ClassVar[Mapping[str, tuple[Any, ...]]]
    _format_field: ClassVar[str]

    model: Reference = Field(
        description="Name of the base model, or a task: task, task@alias, task@3 or task@sha256:<digest>"
    )
    stop: Stop | Stops | None = Field(
        None, description="Texts that end the answer; they aren't part of it. Default: none"
    )
    logit_bias: LogitBias | None = Field(
        None, description="Added to the logits of tokens, by token id; -100 excludes a token"
    )
    user: User | None = None
    stream: bool | None = Field(None, description="Answer with server-sent events. Default: false")
    metadata: dict[str, str] | None = Field(None, description="Accepted and ignored")

    # Beyond the OpenAI API, as in vLLM and others.
    structured_outputs: StructuredOutputs | None = None
    vote: VoteBody | None = Field(
        None, description="Sample several answers; the most frequent one wins. Default: as the task says"
    )

    # Tools are not supported; they are accepted where tool_choice says that none may be called.
    tool_choice: Annotated[Any, Neutral("none", "auto", instead=INSTEAD_OF_TOOLS)] = None
    tools: list[dict[str, Any]] | None = None
    parallel_tool_calls: bool | None = None
    _uncallable_tools = field_validator("tools")(uncallable)

    @model_validator(mode="before")
    @classmethod
    def _without_client_defaults(cls, data: Any) -> Any:
        return without_client_defaults(data, cls._client_defaults, {**cls.model_fields, **OTHER_NAMES})

    @model_validator(mode="after")
    def _one_constraint(self) -> Self:
        formatted = self.format is not None and self.format.type != "text"
        if formatted and self.structured_outputs is not None:
            raise ValueError(
                f"{self._format_field} and structured_outputs both say what the answer is; send one"
            )
        return self

    @model_validator(mode="after")
    def _one_reasoning(self) -> Self:
        given = self._reasoning()
        if given and (twice := sorted(given.keys() & self.given().keys())):
            raise ValueError(f"reasoning says the same as {twice[0]}; send one of them")
        return self

    def constraint(self) -> Constraint | None:
        """Return what the answer must match."""
        if self.structured_outputs is not None:
            return self.structured_outputs.constraint()
        return None if self.format is None else self.format.constraint(self._format_field)

    def bias(self) -> tuple[tuple[int, float], ...]:
        """Return pairs of a token id and the number to add to its logit."""
        return tuple((int(id_), bias) for id_, bias in (self.logit_bias or {}).items())

    @property
    @abstractmethod
    def format(self) -> Format | None:
        """What the answer must match."""

    @property
    @abstractmethod
    def thinking(self) -> ReasoningBody | None:
        """How long a task with reasoning may think, in an object of its own."""

    @property
    @abstractmethod
    def limit(self) -> int | None:
        """How many tokens may be generated."""

    @property
    @abstractmethod
    def num_top(self) -> int | None:
        """How many of the most probable tokens to report."""

    @property
    def scores_prompt(self) -> bool:
        """Whether to report log-probabilities of the prompt."""
        return False

    @property
    def num_answers(self) -> int:
        """How many answers each prompt gets."""
        return 1

    @property
    def num_candidates(self) -> int | None:
        """How many answers to choose from; None: all that are generated are returned."""
        return None

    def generation(self) -> dict[str, Any]:
        """Return the generation parameters that are set, by our names."""
        given = self.given() | self._reasoning()
        if "temperature" in given:
            given["do_sample"] = given["temperature"] >= MIN_TEMPERATURE
            if not given["do_sample"]:
                del given["temperature"]
        ours = {
            "max_new_tokens": self.limit,
            "stop": (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()) or None,
            "top_n_tokens": self.num_top,
            "decoder_input_details": self.scores_prompt or None,
        }
        return given | {name: value for name, value in ours.items() if value is not None}

    def _reasoning(self) -> dict[str, Any]:
        return {} if self.thinking is None else self.thinking.parameters()
