"""Requests to the generation service, and its results."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from app.prompt import TaskVersion
from app.request import FinishReason, RequestTimings
from app.serving.parameters import Layer
from app.serving.structured_output.constraints import Constraint
from app.text.message import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassificationRequest:
    """Which labels, and how they are compared. `choices` None: the task's own."""

    choices: tuple[Any, ...] | None
    score_eos: bool = True  # whether an answer that goes on counts as another one
    length_normalized: bool = False  # compare means, not sums, of log-probabilities

    @property
    def num_known(self) -> int:
        """Return how many labels there are as far as the request shows; the manifest may have its own."""
        return len(self.choices or ()) or 1


@dataclass(frozen=True, slots=True, kw_only=True)
class VoteRequest:
    """How many samples a request has voted on; 1: none, whatever its task says."""

    num_ballots: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One request in text: a task, its inputs, how to generate."""

    inputs: str | Mapping[str, str] = ""
    token_ids: tuple[int, ...] | None = None  # instead of inputs: the model sees just these
    messages: tuple[Message, ...] | None = None  # instead of inputs: a chat
    num_samples: int = 1  # answers to these inputs
    best_of: int | None = None  # draw so many, and answer with the most probable `num_samples` of them
    is_stream: bool = False  # whether answers are wanted a token at a time
    classification: ClassificationRequest | None = None  # score labels instead of generating
    vote: VoteRequest | None = None  # None: the task's own, if it has one
    steps: tuple[str, ...] = ()  # of a chain so far, each with its end
    chain: TaskVersion | None = None  # that this is a step of, and that renders it
    require: Callable[[str], None] | None = None  # raises Forbidden for a task that isn't the caller's
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
        """Return the characters of its inputs, and of a chain's steps; a token id counts as four."""
        if self.token_ids is not None:
            return 4 * len(self.token_ids)
        if self.messages is not None:
            return sum(message.size for message in self.messages) + sum(map(len, self.steps))
        texts = [self.inputs] if isinstance(self.inputs, str) else self.inputs.values()
        return sum(map(len, (*texts, *self.steps)))

    @property
    def num_sequences(self) -> int:
        """Return how many sequences it runs at once, as far as the request alone shows."""
        if self.classification is not None:
            return self.classification.num_known
        return self.num_drawn

    @property
    def num_drawn(self) -> int:
        """Return how many answers to one prompt it generates, not all of which may be answered with."""
        if self.vote is not None and self.vote.num_ballots > 1:
            return 1 if self.steps else self.vote.num_ballots  # each ballot's later steps are its own
        return self.best_of or self.num_samples

    @property
    def only_scores(self) -> bool:
        """Return whether nothing is generated."""
        return self.classification is not None or self.parameters.get("max_new_tokens") == 0


class OutputToken(NamedTuple):
    """One generated token. Its text is what it completes, so it may be empty."""

    id: int
    text: str
    logprob: float  # NaN: it is the first one, which nothing stands before
    special: bool
    top: tuple["OutputToken", ...] = ()  # the most probable tokens in its place


@dataclass(frozen=True, slots=True, kw_only=True)
class Classification:
    """The labels' probabilities, which sum to 1, in the order in which they were given."""

    probabilities: tuple[tuple[str, float], ...]
    label_mass: float  # the probability that the model says any of the labels, before calibration

    @property
    def confidence(self) -> float:
        """Return the best label's probability."""
        return max(probability for _, probability in self.probabilities)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reasoning:
    """What came before an answer, which is no part of it; with include_reasoning false only its length."""

    text: str  # up to the answer's marker
    steps: tuple[str, ...]  # without their ends
    num_tokens: int  # generated up to the answer, marker included
    is_shown: bool = True  # False: the request doesn't want it, so that text and steps are empty


@dataclass(frozen=True, slots=True, kw_only=True)
class Ballot:
    """One answer of a vote; an empty one abstains."""

    result: "GenerationResult"
    index: int = 0  # of its sample, or of its version among the ensemble's
    weight: int = 1

    @property
    def answer(self) -> str:
        """Return what is counted: the answer's words."""
        return " ".join(self.result.text.split())


@dataclass(frozen=True, slots=True, kw_only=True)
class Vote:
    """What came of several answers to one request."""

    share: float  # of all weight, abstentions included, for the winner
    ballots: tuple[Ballot, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationResult:
    """A finished answer."""

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
    score: float | None = None  # of beam search
    prompt_scores: tuple[OutputToken, ...] = ()  # the prompt's tokens, if the request wants them
    classification: Classification | None = (
        None  # then the text is the best label's value, the tokens its own
    )
    reasoning: Reasoning | None = None  # of a task with reasoning or a chain; then the text is the answer
    vote: Vote | None = None  # then all else is the winner's

    @property
    def generated_text(self) -> str:
        """Return the text for the client: the prompt's text comes first if the request wants it."""
        return self.prompt_text + self.text if self.return_full_text else self.text

    @property
    def answer_tokens(self) -> tuple[OutputToken, ...]:
        """Return the tokens behind the steps."""
        return self.tokens if self.reasoning is None else self.tokens[self.reasoning.num_tokens :]

    @property
    def parts(self) -> tuple["GenerationResult", ...]:
        """Return the answers that it was made of: those of a vote, else itself alone."""
        if self.vote is None:
            return (self,)
        return tuple(part for ballot in self.vote.ballots for part in ballot.result.parts)

    @property
    def versions(self) -> tuple[TaskVersion, ...]:
        """Return all versions that answered, each once; of the base model none."""
        found = (part.version for part in self.parts)
        return tuple({each.digest: each for each in found if each is not None}.values())

    @property
    def num_read(self) -> int:
        """Return the tokens of its prompt; where several versions voted, of each one's."""
        prompts = {part.version and part.version.digest: part.prompt_tokens for part in self.parts}
        return sum(prompts.values())

    @property
    def num_generated(self) -> int:
        """Return all tokens that it took."""
        return sum(len(part.tokens) for part in self.parts)

    @property
    def num_reasoning(self) -> int | None:
        """Return how many of them came before answers; None: its task has no reasoning."""
        counts = [part.reasoning.num_tokens for part in self.parts if part.reasoning is not None]
        return sum(counts) if counts else None


class TextDelta(NamedTuple):
    """What one step added. `text` may be shown at once: no stop string can begin in it.

    The texts of an answer's deltas are the result's text joined, those with `is_reasoning` its reasoning's.
    """

    text: str
    token: OutputToken | None = None
    prompt_scores: tuple[OutputToken, ...] = ()  # on the first one, if the request wants them
    result: GenerationResult | None = None  # on the last one
    is_reasoning: bool = False  # the text comes before the answer
    step: str | None = None  # that ended with this delta, without its end
    ballot: Ballot | None = None  # of a vote, as it comes in
