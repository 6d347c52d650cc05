"""What is asked of the generation service and what it answers."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from app.prompt import TaskVersion
from app.request import FinishReason, RequestTimings
from app.serving.parameters import Layer
from app.serving.structured_output.constraints import Constraint
from app.text.chat import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One request in words: a task, its inputs, how to generate."""

    inputs: str | Mapping[str, str] = ""
    token_ids: tuple[int, ...] | None = None  # instead of inputs: the model sees just these
    messages: tuple[Message, ...] | None = None  # instead of inputs: a chat
    sample_index: int = 0  # which of `n` answers to one request; hashed with the seed
    shares_prompt: bool = False  # others with the same words run beside it: keys and values are computed once
    request_id: str = ""
    task: str | None = None  # a task reference (`task`, `task@alias`, `task@3`); None: the base model
    user: str | None = None
    parameters: Layer = field(default_factory=dict)
    fallbacks: Layer = field(default_factory=dict)  # below the task's own
    constraint: Constraint | None = None  # what the answer must be
    logit_bias: tuple[tuple[int, float], ...] = ()  # (id, what is added to its logit)
    deadline: float | None = None  # time.monotonic() seconds
    tenant: str = ""

    @property
    def size(self) -> int:
        """Characters of its words; a token id counts as four."""
        if self.token_ids is not None:
            return 4 * len(self.token_ids)
        if self.messages is not None:
            return sum(len(message.content) for message in self.messages)
        texts = [self.inputs] if isinstance(self.inputs, str) else self.inputs.values()
        return sum(map(len, texts))


@dataclass(frozen=True, slots=True)
class OutputToken:
    """One generated token. Its text is what it completes, so it may be empty."""

    id: int
    text: str
    logprob: float  # NaN: it is the first one, which nothing stands before
    special: bool
    top: tuple["OutputToken", ...] = ()  # the most probable tokens in its place


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationResult:
    """A finished generation."""

    text: str  # generated, without stop string and special tokens
    prompt_text: str  # the rendered text that the model saw
    return_full_text: bool
    version: TaskVersion | None  # pinned at admission; None: the base model
    finish: FinishReason
    tokens: tuple[OutputToken, ...]
    prompt_tokens: int  # of the rendered text, BOS included
    virtual_tokens: int
    seed: int
    timings: RequestTimings
    prompt_scores: tuple[OutputToken, ...] = ()  # the prompt's tokens, where they were asked for

    @property
    def generated_text(self) -> str:
        """What the caller gets: with the prompt's text before it if that was asked for."""
        return self.prompt_text + self.text if self.return_full_text else self.text


@dataclass(frozen=True, slots=True, kw_only=True)
class TextDelta:
    """One step's news. `text` may be shown at once: no stop string can begin in it."""

    text: str
    token: OutputToken | None = None
    prompt_scores: tuple[OutputToken, ...] = ()  # on the first one, where they were asked for
    result: GenerationResult | None = None  # on the last one


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How one request ended that a task or the base was found for, or that was late, for statistics."""

    task: str  # "" is the base model
    version: int  # 0 is the base model
    reason: str  # a FinishReason, or "cancelled", "constraint", "deadline", "error"
    prompt_tokens: int
    generated_tokens: int  # or of all labels that were scored
    seconds: float  # from its arrival here to the end
    timings: RequestTimings | None
    tenant: str = ""  # the party that asked
    is_trial: bool = False  # an example of an upload: charged, but no request of its task
