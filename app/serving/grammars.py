"""Grammars for the engine, by llguidance: compiled once, followed by many rows.

What a grammar may cost is bounded: its compilation by fuel and size, each step by fuel and items, and
its memory by lexer states (1 to 2 KB each). What exceeds a bound fails alone.
"""

import re
import threading
from collections import OrderedDict

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.hf import from_tokenizer
from transformers import PreTrainedTokenizerFast

from app.engine.constraints import PackedMask, TokenConstraint
from app.errors import ConstraintFailed, InvalidRequest
from app.serving.constraints import Constraint, grammar_of

MAX_REMEMBERED = 64  # compiled grammars, as far as their texts don't exceed:
MAX_REMEMBERED_CHARS = 524_288  # compiled, the worst of them take 0.4 KB a character
_MAX_REASON_CHARS = 300

LIMITS = LLParserLimits(
    initial_lexer_fuel=300_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_items_in_row=2_000,
    max_lexer_states=20_000,
    max_grammar_size=50_000,
    verbose_errors=False,
)


class Grammars:
    """The engine's GrammarSource. Used from many threads."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, *, eos_ids: frozenset[int], vocab_size: int
    ) -> None:
        """`vocab_size` is the model's, which may exceed the tokenizer's: such ids never come.

        A tokenizer that can't be followed byte by byte, or a base without an end, makes no error here:
        constrained requests are then refused, with the reason.
        """
        self._tokenizer, self._why_not = _byte_tokenizer(tokenizer, eos_ids, vocab_size)
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, constraint: Constraint) -> str:
        """The text of a grammar that rows can follow; takes milliseconds, so not on an event loop.

        Raises:
            InvalidRequest: it is malformed, uses what llguidance doesn't know, matches nothing, or is
                too large; says which.
        """
        if self._tokenizer is None:
            raise InvalidRequest(
                f"This base model can't be constrained: {self._why_not}.", param=constraint.param
            )
        grammar = grammar_of(constraint)
        if self._remembered(grammar) is None:
            matcher, reason = self._compile(grammar)
            if reason:
                raise InvalidRequest(f"{constraint.param} can't be used: {reason}.", param=constraint.param)
            self._remember(grammar, matcher)
        return grammar

    def start(self, grammar: str) -> TokenConstraint:
        """A row at the beginning of a grammar. Raises ConstraintFailed where it can't be compiled."""
        matcher = self._remembered(grammar)
        if matcher is None:
            matcher, reason = self._compile(grammar)
            if reason:
                raise ConstraintFailed(reason)
            self._remember(grammar, matcher)
        return _Row(matcher.deep_copy())

    def _compile(self, grammar: str) -> tuple[LLMatcher, str]:
        """A matcher at the beginning, and why it can't be used, if it can't."""
        assert self._tokenizer is not None
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=LIMITS)
        if not matcher.is_error():
            matcher.compute_bitmask()  # some limits only show here
        return matcher, _in_plain_words(matcher.get_error())

    def _remembered(self, grammar: str) -> LLMatcher | None:
        with self._lock:
            matcher = self._compiled.get(grammar)
            if matcher is not None:
                self._compiled.move_to_end(grammar)
            return matcher

    def _remember(self, grammar: str, matcher: LLMatcher) -> None:
        with self._lock:
            self._compiled[grammar] = matcher
            while len(self._compiled) > 1 and self._is_full():
                self._compiled.popitem(last=False)

    def _is_full(self) -> bool:
        size = sum(map(len, self._compiled))
        return len(self._compiled) > MAX_REMEMBERED or size > MAX_REMEMBERED_CHARS


class _Row:
    """A TokenConstraint over a matcher of its own."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def mask(self) -> PackedMask:
        packed = np.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=np.uint32)
        self._check()
        return packed

    def accept(self, token_id: int) -> None:
        self._matcher.consume_token(token_id)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ConstraintFailed(_in_plain_words(self._matcher.get_error()))


def _byte_tokenizer(
    tokenizer: PreTrainedTokenizerFast, eos_ids: frozenset[int], vocab_size: int
) -> tuple[LLTokenizer | None, str]:
    """The tokenizer as llguidance sees it, or why there is none."""
    if not eos_ids:
        return None, "it has no token that ends an answer"
    try:
        return from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=sorted(eos_ids)), ""
    except ValueError:  # the message tells of Rust's own structures
        return None, "what its tokens stand for can't be told byte by byte (its tokenizer is of a rare kind)"


def _in_plain_words(reason: str) -> str:
    """Llguidance's own words, without its pictures of the source."""
    inner = re.search(r"^error: (.+)$", reason, re.MULTILINE)
    text = inner[1] if inner else reason.split("\n")[0]
    if text.startswith("NoExtension"):
        return "no text matches it"
    text = re.sub(r"^(at )?\d+\(\d+\): ", "", text).strip().rstrip(".")
    return text if len(text) <= _MAX_REASON_CHARS else f"{text[:_MAX_REASON_CHARS]} ..."
