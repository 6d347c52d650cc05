"""Requests to the engine and its answers: plain, picklable data, token ids only."""

import hashlib
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any, Literal, NamedTuple


class FinishReason(StrEnum):
    """Why an answer ended: the first three in the words that TGI's clients know, the others of programs."""

    EOS = "eos_token"
    LENGTH = "length"
    STOP = "stop_sequence"
    NO_ANSWER = "no_answer"  # the model ended without the marker of an answer
    LOOP = "loop"  # a step of a chain repeats an earlier one
    MAX_STEPS = "max_steps"  # a chain took all its steps without an answer


class ProgramKind(StrEnum):
    """What a request does with the model."""

    COMPLETE = "complete"
    BEST_OF = "best_of"
    SEARCH = "search"
    CLASSIFY = "classify"
    REASONING = "reasoning"
    CHAIN = "chain"
    VOTE = "vote"
    ENSEMBLE = "ensemble"
    DECISIONS = "decisions"


EarlyStopping = bool | Literal["never"]

MAX_BEAMS = 16
MIN_TEMPERATURE = 0.001  # smaller ones would underflow in float32; this one is greedy already
BAN = -100.0  # a bias that rules its token out, whatever the temperature


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRules:
    """What few requests ask for: which tokens may come where, each rule as `transformers` defines it.

    Rules see the ids of the prompt's text, resident ones included, and the generated ones; learned tokens
    have no ids. `bad_words` see the generated ones only, as in vLLM.
    """

    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()  # (ids, added to the last one's logit)
    bad_words: tuple[tuple[int, ...], ...] = ()  # the last id never follows the others
    encoder_repetition_penalty: float = 1.0  # above 1: tokens of the prompt become more probable
    no_repeat_ngram_size: int = 0  # no so many ids occur twice in a row; 0: off
    encoder_no_repeat_ngram_size: int = 0  # none that occur in the prompt; 0: off
    min_new_tokens: int = 0  # none of `stop_ids` before so many tokens
    stop_ids: tuple[int, ...] = ()
    eos_ids: tuple[int, ...] = ()
    forced_first: int | None = None  # after a prompt of one token
    forced_last: tuple[int, ...] = ()  # one of them is the token number `max_new_tokens`
    max_new_tokens: int = 0
    length_decay: tuple[int, float] | None = None  # (from which token on, factor): EOS grows more probable
    suppressed: tuple[int, ...] = ()
    suppressed_first: tuple[int, ...] = ()


def parameter(default: Any, description: str, **options: Any) -> Any:
    """Declare a generation parameter, once for all: its neutral value, what it does, and its bounds.

    The options are the fields of `app.serving.parameters.Declaration`, from which the checks of values, the
    fields of request bodies and their documents are derived.
    """
    return field(default=default, metadata={"description": description, **options})


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingChoices:
    """The parameters of sampling that a request, a task or a base model may set."""

    do_sample: bool = parameter(
        False, "Sample; false is greedy decoding, which ignores temperature and filters", openai=False
    )
    temperature: float = parameter(
        1.0,
        "Divides the logits before sampling",
        ge=MIN_TEMPERATURE,
        le=100,
        hint=" (for greedy decoding leave do_sample out)",
        in_base=True,
    )
    top_h: float = parameter(
        0.0, "Keep the most probable tokens up to this share of the entropy", ge=0, le=1, in_base=True
    )
    top_k: int = parameter(
        0,
        "Keep this many of the most probable tokens; -1 is the same as 0, as in vLLM",
        ge=0,
        le=1_000_000,
        same={-1: 0},
        in_base=True,
    )
    top_p: float = parameter(
        1.0, "Keep the most probable tokens that together reach this probability", gt=0, le=1, in_base=True
    )
    min_p: float = parameter(
        0.0, "Keep tokens with at least this fraction of the highest probability", ge=0, le=1, in_base=True
    )
    typical_p: float = parameter(
        1.0,
        "Keep tokens nearest to the expected information, up to this probability",
        gt=0,
        le=1,
        in_base=True,
    )
    epsilon_cutoff: float = parameter(
        0.0, "Keep tokens with at least this probability", ge=0, le=1, in_base=True
    )
    eta_cutoff: float = parameter(
        0.0, "Keep tokens above a cutoff that falls with the entropy (eta sampling)", ge=0, le=1, in_base=True
    )
    repetition_penalty: float = parameter(
        1.0, "Above 1, tokens of prompt and answer become less probable", ge=0.01, le=100, in_base=True
    )
    num_beams: int = parameter(
        1,
        "Beams of beam search, which keeps this many answers at a time; 1 is none. Not with streams, "
        "do_sample or grammars",
        ge=1,
        le=MAX_BEAMS,
        in_base=True,
    )
    length_penalty: float = parameter(
        1.0,
        "Of beam search: an answer's score is its log-probability divided by its tokens to this power",
        ge=-10,
        le=10,
        in_base=True,
    )
    early_stopping: EarlyStopping = parameter(
        False,
        "Of beam search: true ends it with the first num_beams answers, false where a better one is "
        'unlikely, "never" where there can be none',
        must='must be true, false or "never"',
        in_base=True,
    )
    frequency_penalty: float = parameter(
        0.0, "Subtracted from a token's logit for each time that the answer has it", ge=-2, le=2
    )
    presence_penalty: float = parameter(
        0.0, "Subtracted from the logits of tokens of the answer", ge=-2, le=2
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams(SamplingChoices):
    """How the next token is chosen from the logits.

    The order is: bias, repetition, frequency and presence penalties, `rules`, grammar, temperature, top-h,
    top-k, top-p, min-p, typical-p, epsilon and eta cutoffs, as in `transformers`. Penalties see the request's
    own prompt and generated tokens (`repetition_penalty`) or its generated tokens only (the other two), as in
    vLLM.
    """

    seed: int = 0  # the caller draws one where the user gave none, and reports it
    logit_bias: tuple[tuple[int, float], ...] = ()  # (id, what is added to its logit), each id once
    sample_index: int = 0  # which of the `n` samples this is; hashed with the seed
    rules: TokenRules | None = None

    @property
    def has_penalty(self) -> bool:
        """Whether the choice depends on tokens that came before."""
        neutral = (1.0, 0.0, 0.0)
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != neutral

    @property
    def has_filter(self) -> bool:
        """Whether only a row's most probable tokens may be drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0 or self.top_h > 0

    @property
    def has_shape(self) -> bool:
        """Whether what may be drawn depends on the entropy or the probabilities of all that is left."""
        return self.typical_p < 1 or self.epsilon_cutoff > 0 or self.eta_cutoff > 0


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Consecutive slots of a prompt that requests share: a learned prompt, by its digest, or text.

    What is found by reading all ids is kept, for the other requests that have the same object.
    """

    prompt_digest: str | None = None
    num_virtual_tokens: int = 0  # slots that the learned prompt takes in the decoder's self-attention
    num_cross_tokens: int = 0  # slots before the source in cross-attention
    num_encoder_tokens: int = 0  # slots before the source in the encoder's self-attention
    token_ids: tuple[int, ...] = ()  # of text
    is_kept: bool = True  # False: only requests that run together share it; no later one will

    @property
    def num_slots(self) -> int:
        """Slots that it takes."""
        return self.num_virtual_tokens + len(self.token_ids)

    @cached_property
    def id_range(self) -> tuple[int, int]:
        """The lowest and the highest of its ids; 0 and 0 where it has none."""
        return min(self.token_ids, default=0), max(self.token_ids, default=0)

    @cached_property
    def ids_digest(self) -> bytes:
        """A digest of its ids."""
        return hashlib.sha256(array("q", self.token_ids)).digest()


def segments_of(*segments: Segment) -> tuple[Segment, ...]:
    """Return those of `segments` that are not empty."""
    return tuple(each for each in segments if each.prompt_digest is not None or each.num_slots)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What the encoder of an encoder-decoder reads: rows of a learned soft prompt, then token ids.

    Requests with equal sources, ids included, and their kept segments in common share one encoder pass.
    """

    id: str
    token_ids: tuple[int, ...]
    prompt_digest: str | None = None  # of the soft prompt before the ids
    num_virtual_tokens: int = 0  # its rows

    @property
    def num_slots(self) -> int:
        """Slots that it takes in cross-attention."""
        return self.num_virtual_tokens + len(self.token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One frozen request: token ids and digests only, so that the engine can live elsewhere.

    The model sees all `segments`, then `token_ids`, which hold at least one id. Requests whose first
    segments are equal share their keys and values. In an encoder-decoder these are the decoder's, and
    `source` is what its encoder reads; segments that depend on the source are not kept.
    """

    id: str
    token_ids: tuple[int, ...]
    segments: tuple[Segment, ...] = ()  # such as a task's learned prompt, then BOS and its leading text
    source: Source | None = None  # given exactly where the base has an encoder
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_new_tokens: int = 128  # 0: the prompt is only scored
    num_top: int = 0  # most probable tokens to report beside each generated or scored one
    num_scored: int = 0  # of the last so many `token_ids` the log-probabilities are reported
    grammar: str | None = None  # what the answer must match, in the language of the engine's GrammarSource
    stop_ids: frozenset[int] = frozenset()  # EOS and stop ids; the one that stops is reported
    tenant: str = ""  # the key that asks; fair share is by tenant, then by task
    task: str = ""  # for fair share and statistics only, never a cache key
    task_version: int = 0  # for statistics only; 0 is the base model
    deadline: float | None = None  # time.monotonic() seconds
    is_held: bool = False  # its keys and values stay after its end, until they are released or room is needed
    continues: str | None = None  # id of a request that was held: what both read first isn't computed again

    @property
    def is_only_scored(self) -> bool:
        """Whether nothing is wanted of what may follow the last token, so that it needn't be run."""
        return self.max_new_tokens == 0 and self.num_scored > 0 and not self.num_top

    @property
    def num_prefix_slots(self) -> int:
        """Slots of all segments."""
        return sum(segment.num_slots for segment in self.segments)

    @property
    def num_kept_segments(self) -> int:
        """Segments that come before the first that is not kept."""
        return next((i for i, segment in enumerate(self.segments) if not segment.is_kept), len(self.segments))

    @property
    def num_virtual_tokens(self) -> int:
        """Slots of all learned prompts."""
        return sum(segment.num_virtual_tokens for segment in self.segments)

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """All ids of the prompt's text in order, the decoder's beside a source. Learned prompts have none."""
        before: tuple[int, ...] = ()
        for segment in self.segments:
            before += segment.token_ids
        return before + self.token_ids

    @property
    def input_ids(self) -> tuple[int, ...]:
        """The ids that rules about the input see: the source's, or those of the prompt's text."""
        return self.prompt_ids if self.source is None else self.source.token_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTimings:
    """Where a finished request's time went, in seconds."""

    queue: float
    prefill: float
    decode: float

    @classmethod
    def longest(cls, timings: Iterable["RequestTimings"]) -> "RequestTimings":
        """Return the longest time of each kind, of requests that ran together; there is at least one."""
        each = list(timings)
        return cls(
            queue=max(one.queue for one in each),
            prefill=max(one.prefill for one in each),
            decode=max(one.decode for one in each),
        )


class TokenScore(NamedTuple):
    """How probable the model found a token of the prompt or an answer, after all that stands before it."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (id, log-probability) of the `num_top` most probable tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Hypothesis:
    """A finished answer of beam search."""

    tokens: tuple[TokenScore, ...]  # with the one that ends it
    score: float  # the sum of its tokens' processed log-probabilities, after the length penalty
    finish: FinishReason


class TokenDelta(NamedTuple):
    """What one step brought for one request. The last one carries `finish`.

    Beam search has a delta for each token of its beams, all empty but the last, which has the answers.

    `logprob` is the natural log-probability of the token under the model's own distribution,
    before temperature, filters and penalties.
    """

    token_id: int | None = None  # None: the prompt was only scored, or beams were searched
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()  # (id, log-probability) of the `num_top` most probable tokens
    scores: tuple[TokenScore, ...] = ()  # of the prompt; with the first token
    hypotheses: tuple[Hypothesis, ...] = ()  # of beam search, best first
    finish: FinishReason | None = None
    timings: RequestTimings | None = None  # on the last delta

    @property
    def is_last(self) -> bool:
        return self.finish is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a sequence ended, for statistics and quotas; also one that was refused or came too late."""

    task: str  # "" is the base model, or no task was found yet
    version: int  # 0 is the base model
    reason: str  # a FinishReason, or "cancelled", "constraint", "deadline", "error", "refused"
    prompt_tokens: int
    generated_tokens: int  # or of all labels that were scored
    seconds: float  # from its arrival to the end
    timings: RequestTimings | None
    tenant: str = ""  # the key's owner
    is_trial: bool = False  # an example of an upload: charged, but no request of its task
    sample: int = 0  # its number among those of its request
    step: int = 0  # of a chain, from 0 on


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramOutcome:
    """How all that one request did with the model ended, for statistics."""

    kind: ProgramKind
    reason: str  # as of an Outcome
    seconds: float  # from its admission to the end
    chain_steps: tuple[int, ...] = ()  # of each chain
    num_ballots: int = 0
