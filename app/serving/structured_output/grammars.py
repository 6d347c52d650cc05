"""Grammars for the engine, by llguidance: compiled once, followed by many rows.

What a grammar may cost is bounded: its compilation by fuel and size, each step by fuel and items, and
its memory by lexer states (1 to 2 KB each). What exceeds a bound fails alone.
"""

import logging
import re

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.hf import from_tokenizer
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from app.caching import SingleFlightCache
from app.engine.sampling.token_masks import PackedMask, TokenConstraint
from app.errors import ConstraintFailed, InvalidRequest
from app.serving.structured_output.constraints import Constraint, grammar_of

MAX_REMEMBERED = 16  # compiled grammars; the worst of them take 10 MB, before rows add lexer states
_NUM_TRIED = 4  # tokens that are followed before a grammar is accepted
_MAX_REASON_CHARS = 300

# Of the first fuel, a literal takes 2 a byte, a repetition 4 a round. What a grammar may take of it decides
# what each of its masks costs: at most a few milliseconds.
LIMITS = LLParserLimits(
    initial_lexer_fuel=120_000,
    step_lexer_fuel=100_000,
    step_max_items=50_000,
    max_items_in_row=2_000,
    max_lexer_states=20_000,
    max_grammar_size=50_000,
    verbose_errors=False,
)

_log = logging.getLogger("promptplex")


class Grammars:
    """The engine's GrammarSource. Used from many threads."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, *, eos_ids: frozenset[int], vocab_size: int
    ) -> None:
        """`vocab_size` is the model's. Ids that only it or only the tokenizer has never come.

        A tokenizer that can't be followed byte by byte, or a base without an end, makes no error here:
        constrained requests are then refused, with the reason.
        """
        self._tokenizer, self._why_not = _byte_tokenizer(tokenizer, eos_ids, vocab_size)
        if self._tokenizer is None:
            _log.warning("constrained output is off: of this base model, %s", self._why_not)
        self._lengths = _lengths(self._tokenizer, eos_ids, vocab_size)
        self._known = _known(self._tokenizer, vocab_size)
        self._compiled: SingleFlightCache[str, LLMatcher] = SingleFlightCache(MAX_REMEMBERED)

    def compile(self, constraint: Constraint, *, goes_on: bool = False) -> str:
        """Return the text of a grammar that rows can follow. Takes milliseconds, so not on an event loop.

        `goes_on`: it holds what follows other text of the answer, after white space if there is any.

        Raise InvalidRequest, which says why: it is malformed, uses what llguidance doesn't know, matches
        nothing, or is too large.
        """
        if self._tokenizer is None:
            raise InvalidRequest(
                f"This base model can't be constrained: {self._why_not}.", param=constraint.param
            )
        grammar = grammar_of(constraint, goes_on=goes_on)
        try:
            self._matcher(grammar)
        except ConstraintFailed as error:
            raise InvalidRequest(
                f"{constraint.param} can't be used: {error.message}.", param=constraint.param
            ) from None
        return grammar

    def start(self, grammar: str) -> TokenConstraint:
        """Return a row at the beginning of a grammar. Raise ConstraintFailed where it can't be compiled."""
        return _Row(self, grammar, self._matcher(grammar))

    def known_ids(self, mask: PackedMask) -> PackedMask:
        """Return a mask without ids that only the tokenizer has. Raise ConstraintFailed: none is left."""
        if self._known is None:
            return mask
        mask = mask & self._known
        if not mask.any():
            raise ConstraintFailed("no token of the base model goes on from here")
        return mask

    def fresh(self, grammar: str, spoiled: LLMatcher) -> LLMatcher:
        """Return a new matcher in place of one with a lexer that is used up. Raise ConstraintFailed."""
        self._compiled.forget(grammar, spoiled)
        return self._compile(grammar)

    def _matcher(self, grammar: str) -> LLMatcher:
        """Return the grammar's matcher at its beginning; rows take copies."""
        return self._compiled.get(grammar, lambda: self._compile(grammar))

    def _compile(self, grammar: str) -> LLMatcher:
        """Compile, and try a few tokens, long ones and short ones: some limits show only then."""
        assert self._tokenizer is not None
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=LIMITS)
        _check(matcher)
        for lengths in (self._lengths, -self._lengths):
            _try(matcher.deep_copy(), lengths)
        return matcher


class _Row:
    """A TokenConstraint over a copy of a matcher.

    Copies share their lexer, states and bounds included. Where others have used it up, the row goes on
    with one of its own.
    """

    def __init__(self, grammars: Grammars, grammar: str, origin: LLMatcher) -> None:
        self._grammars = grammars
        self._grammar = grammar
        self._origin: LLMatcher | None = origin  # None: the matcher is the row's own
        self._matcher = origin.deep_copy()
        self._tokens: list[int] = []

    def mask(self) -> PackedMask:
        packed = _mask(self._matcher)
        if self._matcher.is_error():
            self._take_own_matcher()
            packed = _mask(self._matcher)
            _check(self._matcher)
        return self._grammars.known_ids(packed)

    def accept(self, token_id: int) -> None:
        self._tokens.append(token_id)
        self._matcher.consume_token(token_id)
        if self._matcher.is_error():
            self._take_own_matcher()

    def _take_own_matcher(self) -> None:
        if self._origin is not None:
            self._matcher = self._grammars.fresh(self._grammar, self._origin)
            self._origin = None
            self._matcher.consume_tokens(self._tokens)
        _check(self._matcher)


def _mask(matcher: LLMatcher) -> PackedMask:
    return np.frombuffer(bytearray(matcher.compute_bitmask()), dtype=np.uint32)


def _check(matcher: LLMatcher) -> None:
    if matcher.is_error():
        raise ConstraintFailed(_in_plain_words(matcher.get_error()))


def _try(matcher: LLMatcher, preference: NDArray[np.int64]) -> None:
    """Follow the most preferred of the tokens that may come; those that end an answer have 0."""
    for _ in range(_NUM_TRIED):
        mask = _mask(matcher)
        _check(matcher)
        allowed = np.unpackbits(mask.view(np.uint8), bitorder="little", count=len(preference)).view(np.bool_)
        ids = np.flatnonzero(allowed & (preference != 0))
        if not len(ids):
            break
        matcher.consume_token(int(ids[preference[ids].argmax()]))
        _check(matcher)


def _byte_tokenizer(
    tokenizer: PreTrainedTokenizerFast, eos_ids: frozenset[int], vocab_size: int
) -> tuple[LLTokenizer | None, str]:
    """Return the tokenizer as llguidance sees it, or why there is none."""
    if not eos_ids:
        return None, "it has no token that ends an answer"
    ends = sorted(id_ for id_ in eos_ids if id_ < vocab_size)
    if not ends:
        return None, f"its end-of-sequence id {max(eos_ids)} is beyond its vocabulary of {vocab_size} tokens"
    size = max(vocab_size, 1 + max(tokenizer.get_vocab().values()))
    try:
        return from_tokenizer(tokenizer, n_vocab=size, eos_token=ends), ""
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # Rust's panics too, which are no Exceptions; messages name its own structures
        return None, "its tokens can't be read byte by byte (its tokenizer is of a rare kind)"


def _known(tokenizer: LLTokenizer | None, vocab_size: int) -> PackedMask | None:
    """Return a mask of all ids that the model has; None: it has all of the tokenizer's."""
    if tokenizer is None or tokenizer.vocab_size <= vocab_size:
        return None
    bits = np.arange(-(-tokenizer.vocab_size // 32) * 32) < vocab_size
    return np.packbits(bits, bitorder="little").view(np.uint32)


def _lengths(tokenizer: LLTokenizer | None, eos_ids: frozenset[int], vocab_size: int) -> NDArray[np.int64]:
    """Return the bytes of each token of the model; 0 for those that end an answer."""
    if tokenizer is None:
        return np.zeros(0, dtype=np.int64)
    lengths = [len(tokenizer.decode_bytes([id_])) for id_ in range(vocab_size)]
    return np.array([0 if id_ in eos_ids else size for id_, size in enumerate(lengths)], dtype=np.int64)


def _in_plain_words(reason: str) -> str:
    """Return llguidance's own words, without its excerpts of the source."""
    inner = re.search(r"^error: (.+)$", reason, re.MULTILINE)
    text = inner[1] if inner else reason.split("\n")[0]
    if text.startswith("NoExtension"):
        return "no text matches it"
    text = re.sub(r"^(at )?\d+\(\d+\): ", "", text).strip().rstrip(".")
    if re.match("(lexer|parser) (error|too complex)", text, re.IGNORECASE):
        text = f"the grammar is too complex to follow; simplify it, or give it tighter bounds ({text})"
    return text if len(text) <= _MAX_REASON_CHARS else f"{text[:_MAX_REASON_CHARS]} ..."
