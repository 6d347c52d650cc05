"""The shapes of answers: what the routes return, held by mypy, and what the OpenAPI document says.

They are documentation at run time: the routes send their JSON as it is, and nothing is validated again.
"""

from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from app.serving.task_rows import Example, HistoryRow, PublishedVersion, TaskLine, VersionContent
from app.validation import closed

TgiErrorType = Literal["validation", "overloaded", "generation"]
_Reason = Annotated[str | None, Field(description="Why it can't be served; null: it can")]
_Resident = Annotated[bool, Field(description="Whether the learned prompt is on the device now")]

# -- errors ---------------------------------------------------------------------------------


@closed
class ErrorBody(TypedDict):
    """What went wrong and what to do next."""

    message: str
    type: str
    param: Annotated[str | None, Field(description="Field of the request that is at fault")]
    code: Annotated[str, Field(description="Machine-readable, such as invalid_request or not_found")]


@closed
class ErrorEnvelope(TypedDict):
    """The body of every error."""

    error: ErrorBody
    error_type: NotRequired[
        Annotated[
            TgiErrorType | None,
            Field(description="Error type of text-generation-inference; absent where it has none"),
        ]
    ]


# -- generate -------------------------------------------------------------------------------


@closed
class Token(TypedDict):
    """A generated token."""

    id: int
    text: str
    logprob: Annotated[float, Field(description="Natural logarithm of the model's own probability")]
    special: bool


@closed
class PromptToken(TypedDict):
    """A token of the prompt."""

    id: int
    text: str
    logprob: Annotated[
        float | None, Field(description="null: the first token, or what a decoder begins with")
    ]


@closed
class Probability(TypedDict):
    """A label and its probability."""

    value: str
    probability: float


LabelMass = Annotated[
    float,
    Field(
        description="Probability that the model says any of the labels, before calibration; near 0 it wanted "
        "to say something else"
    ),
]


@closed
class ChoiceAnswer(TypedDict):
    """The most probable label, and the probabilities of all."""

    value: str
    confidence: Annotated[float, Field(description="Probability of `value`")]
    label_mass: LabelMass
    probabilities: list[Probability]


_Finish = Literal["eos_token", "length", "stop_sequence", "no_answer", "loop", "max_steps"]
_PromptTokens = Annotated[
    int, Field(description="Tokens of the rendered prompt; an encoder reads them where there is one")
]
Score = Annotated[
    float,
    Field(
        description="Of beam search: log-probability divided by the number of tokens to the power of "
        "length_penalty; absent without beams"
    ),
]
_VirtualTokens = Annotated[int, Field(description="Positions that the learned prompt takes")]


@closed
class Details(TypedDict):
    """Tokens and counts of an answer."""

    finish_reason: _Finish
    generated_tokens: int
    prompt_tokens: _PromptTokens
    virtual_tokens: _VirtualTokens
    seed: int
    prefill: NotRequired[
        Annotated[list[PromptToken], Field(description="Tokens of the prompt, with decoder_input_details")]
    ]
    tokens: list[Token]
    top_tokens: NotRequired[
        Annotated[list[list[Token]] | None, Field(description="Most probable tokens beside each of `tokens`")]
    ]


@closed
class ReasoningAnswer(TypedDict):
    """What came before the answer of a task with reasoning or a chain."""

    text: Annotated[str, Field(description="As generated; a chain's steps without `step_ends` are lines")]
    steps: Annotated[list[str], Field(description="Its steps, without what they end with")]
    tokens: Annotated[int, Field(description="Number of tokens before the answer, first in `details`")]


_Reasoning = Annotated[ReasoningAnswer | None, Field(description="Absent with include_reasoning false")]


@closed
class BallotAnswer(TypedDict):
    """One of the answers that were voted on."""

    index: Annotated[int, Field(description="Number of its sample, or of its version among the ensemble's")]
    answer: Annotated[str, Field(description="Compared with white space normalised; an empty one abstains")]
    weight: int
    finish_reason: _Finish
    generated_tokens: int
    version: Annotated[int | None, Field(description="Version that answered; null: the base model")]
    reasoning: NotRequired[_Reasoning]
    share: NotRequired[Annotated[float, Field(description="Of a version's own vote: its winner's share")]]


@closed
class VoteAnswer(TypedDict):
    """How the answers to a request were voted on."""

    winner: Annotated[str, Field(description="Answer with the most weight; of equal ones, the earliest")]
    share: Annotated[
        float,
        Field(
            description="The winner's part of all weight, abstentions included. With choices the mean of the "
            "versions' probabilities decides, and this is the share of versions that agree"
        ),
    ]
    ballots: list[BallotAnswer]


_Vote = Annotated[VoteAnswer | None, Field(description="Result of a vote or an ensemble")]


@closed
class Sample(TypedDict):
    """One of `n` answers."""

    generated_text: str
    reasoning: NotRequired[_Reasoning]
    score: NotRequired[Score]
    details: NotRequired[Details | None]


@closed
class GenerateResponse(TypedDict):
    """The answer to a request."""

    generated_text: str
    task_id: Annotated[str | None, Field(description="null: the base model")]
    task_version: int | None
    version_digest: str | None
    reasoning: NotRequired[_Reasoning]
    score: NotRequired[Score]
    details: NotRequired[Details | None]
    choice: NotRequired[Annotated[ChoiceAnswer | None, Field(description="Result of a classification")]]
    vote: NotRequired[_Vote]
    samples: NotRequired[Annotated[list[Sample] | None, Field(description="All answers, if n is above 1")]]


class StreamDetails(TypedDict):
    """Counts of an answer that was streamed."""

    finish_reason: _Finish
    generated_tokens: int
    input_length: int
    prompt_tokens: int
    virtual_tokens: int
    seed: int
    task_version: int | None
    version_digest: str | None


@closed
class StreamEvent(TypedDict):
    """The data of a server-sent event; the last one has the whole text and the details.

    Where the text of a token belongs to two steps, or to a step and the answer, each part has an event.
    """

    index: Annotated[int, Field(description="Number of the token, from 1 on")]
    token: Token
    reasoning: NotRequired[
        Annotated[bool | None, Field(description="true: the text comes before the answer, else absent")]
    ]
    step: NotRequired[Annotated[str | None, Field(description="A step that ends with this text")]]
    top_tokens: NotRequired[list[Token] | None]
    generated_text: str | None
    details: StreamDetails | None
    ballot: NotRequired[
        Annotated[
            BallotAnswer | None, Field(description="Ballot of a vote that has come in; the text is empty")
        ]
    ]
    vote: NotRequired[_Vote]


# -- tasks ----------------------------------------------------------------------------------


@closed
class TaskRow(TaskLine):
    """A task in the list."""

    servable: bool
    not_servable_because: _Reason
    resident: _Resident
    requests_served: Annotated[int, Field(description="Since the server started")]


@closed
class TaskPage(TypedDict):
    """A page of the list of tasks."""

    tasks: list[TaskRow]
    next: Annotated[str | None, Field(description="`after` for the next page; null: this is the last one")]


@closed
class VersionRecord(VersionContent):
    """A version in full."""

    servable: bool
    not_servable_because: _Reason
    resident: _Resident


@closed
class TaskRecord(HistoryRow):
    """A task in full."""

    versions: list[VersionRecord]
    requests_served: Annotated[int, Field(description="Since the server started")]


@closed
class TriedExample(Example):
    """An example, and what the new version generated for it."""

    generated: str
    matches: Annotated[bool, Field(description="Whether `generated` is `expected`, spaces around it aside")]


@closed
class Published(PublishedVersion):
    """The version of an upload."""

    examples: list[TriedExample]
    warnings: Annotated[
        list[str], Field(description="Parts that the version doesn't use; another base that was trained on")
    ]


# -- tokens ---------------------------------------------------------------------------------


@closed
class TextToken(TypedDict):
    """A token of a text."""

    id: int
    text: str


@closed
class Tokenization(TypedDict):
    """The tokens of a request's prompt; of an encoder-decoder, those that its encoder reads."""

    tokens: list[TextToken]
    prompt_tokens: Annotated[int, Field(description="Length of `tokens`")]
    virtual_tokens: Annotated[int, Field(description="Positions that the learned prompt takes before them")]
    text: Annotated[str, Field(description="The rendered prompt")]


@closed
class Text(TypedDict):
    """The text of token ids."""

    text: str


# -- operations -----------------------------------------------------------------------------


@closed
class Status(TypedDict):
    """The state of the server."""

    status: str


@closed
class Version(TypedDict):
    """The version of the server."""

    version: str


@closed
class Queue(TypedDict):
    """Number of sequences that run, and that wait."""

    running: int
    waiting: int


@closed
class Health(TypedDict):
    """The state of the server; more is known once the base model is loaded."""

    status: Literal["loading", "ready", "draining", "dead"]
    version: str
    progress: NotRequired[Annotated[str | None, Field(description="Current step of loading")]]
    model: NotRequired[Annotated[str | None, Field(description="Name of the base model")]]
    device: NotRequired[str | None]
    store: NotRequired[Literal["up", "down", "damaged"] | None]
    tasks: NotRequired[Annotated[int | None, Field(description="Number of tasks that the key may use")]]
    queue: NotRequired[Queue | None]
    redis: NotRequired[Literal["up", "down", "off"] | None]
    prompt_cache: NotRequired[
        Annotated[dict[str, Any] | None, Field(description="Hits, misses and bytes of each tier")]
    ]


@closed
class Info(TypedDict):
    """The base model, and the limits of requests."""

    version: str
    model_id: str
    model_architecture: str
    model_dtype: str
    model_device: str
    model_fingerprint: Annotated[str, Field(description="Digest of weights, configuration and tokenizer")]
    probe: Annotated[str, Field(description="Report of the check of the model at load")]
    num_layers: Annotated[int, Field(description="Of the decoder")]
    num_encoder_layers: Annotated[int, Field(description="0: the base is a decoder alone")]
    hidden_size: int
    vocab_size: int
    max_total_tokens: Annotated[
        int,
        Field(description="Virtual, prompt and new tokens, at most; of an encoder-decoder, the decoder's"),
    ]
    max_source_tokens: Annotated[
        int | None,
        Field(description="Virtual and prompt tokens that the encoder reads, at most; null: there is none"),
    ]
    decoder_start_token_id: Annotated[
        int | None, Field(description="What a decoder beside an encoder begins with; null: there is none")
    ]
    default_max_new_tokens: int
    generation_defaults: Annotated[
        dict[str, Any],
        Field(description="From the base's generation config; tasks and requests override them"),
    ]
    generation_not_honoured: Annotated[
        list[str], Field(description="Settings of the generation config that are not supported")
    ]
    max_stop_sequences: int
    max_body_bytes: int
    max_text_characters: Annotated[int, Field(description="Of a rendered template or chat")]
    max_upload_bytes: int
