"""Rules about tokens, each as `transformers` defines it: from a sequence's ids to edits of the logits."""

import math
from collections.abc import Collection, Iterable

import numpy as np

from app.engine.sampling.inputs import NO_IDS, IdArray, LogitsEdits
from app.engine.sampling.token_history import TokenHistory
from app.request import TokenRules

_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd; products and sums wrap around
_ZERO = np.zeros(1, dtype=np.uint64)


class RowRules:
    """The rules of one sequence, prepared once."""

    def __init__(self, rules: TokenRules) -> None:
        self._rules = rules
        self._biases = dict(rules.sequence_bias)
        self._biased = _Sequences(self._biases)
        self._bad_words = _Sequences(rules.bad_words)
        self._stops, self._ends = _array(rules.stop_ids), _array(rules.eos_ids)
        self._suppressed = _array(rules.suppressed)
        self._suppressed_first = _array(rules.suppressed + rules.suppressed_first)

    def add_to(self, edits: LogitsEdits, history: TokenHistory) -> LogitsEdits:
        """Return `edits` with what the rules ask for after `history`."""
        rules, position = self._rules, len(history.generated)
        biased = self._biased.completable(history.ids)
        end_gain = _end_gain(rules, position)
        return edits._replace(
            completing_ids=_array([ids[-1] for ids in biased]),
            completing_bias=np.array([self._biases[ids] for ids in biased], dtype=np.float64),
            prompt_ids=history.input_ids if rules.encoder_repetition_penalty != 1 else NO_IDS,
            encoder_repetition_penalty=rules.encoder_repetition_penalty,
            banned_ids=self._banned(history),
            forced_ids=_forced(rules, history),
            end_ids=self._ends if end_gain else NO_IDS,
            end_gain=end_gain,
            suppressed_ids=self._suppressed_first if self._begins(history) else self._suppressed,
        )

    def _banned(self, history: TokenHistory) -> IdArray:
        """Return ids banned by n-grams, bad words, and the least length."""
        rules = self._rules
        bad = [ids[-1] for ids in self._bad_words.completable(history.generated)]
        return np.concatenate(
            [
                continuations(history.ids, history.ids, rules.no_repeat_ngram_size),
                continuations(history.inputs, history.ids, rules.encoder_no_repeat_ngram_size),
                _array(bad),
                self._stops if len(history.generated) < rules.min_new_tokens else NO_IDS,
            ]
        )

    def _begins(self, history: TokenHistory) -> bool:
        """Return whether the next token is the first that isn't forced."""
        is_forced = self._rules.forced_first is not None and len(history.prompt) < 2
        return len(history.generated) == is_forced


class _Sequences:
    """Sequences of ids, found by all their ids but the last."""

    def __init__(self, sequences: Iterable[tuple[int, ...]]) -> None:
        self._by_start: dict[tuple[int, ...], list[tuple[int, tuple[int, ...]]]] = {}
        for rank, ids in enumerate(sequences):
            self._by_start.setdefault(ids[:-1], []).append((rank, ids))
        self._lengths = {len(start) for start in self._by_start}

    def completable(self, context: IdArray) -> list[tuple[int, ...]]:
        """Return, in their order, the sequences of which only the last id is missing after `context`."""
        lengths = [length for length in self._lengths if length <= len(context)]
        starts = [tuple(context[len(context) - length :].tolist()) for length in lengths]
        return [ids for _, ids in sorted(each for start in starts for each in self._by_start.get(start, ()))]


def continuations(text: IdArray, context: IdArray, size: int) -> IdArray:
    """Return the ids that would complete an n-gram of `size` ids that `text` holds already.

    The work grows with the text alone, however long the n-grams are: stretches are compared by sums.
    """
    length, number = size - 1, len(text) - size + 1
    if length < 0 or number < 1 or len(context) < length:
        return NO_IDS
    powers = np.cumprod(np.full(len(text), _FACTOR))
    sums = np.concatenate([_ZERO, np.cumsum(text.astype(np.uint64) * powers)])
    ends = context[len(context) - length :].astype(np.uint64)
    wanted = (ends * powers[:length]).sum(dtype=np.uint64)
    same = (sums[length : length + number] - sums[:number]) * _FACTOR == wanted * powers[:number]
    found: IdArray = text[length:][same]
    return found


def _forced(rules: TokenRules, history: TokenHistory) -> IdArray:
    if rules.forced_last and len(history.generated) == rules.max_new_tokens - 1:
        return _array(rules.forced_last)
    follows_one = len(history.ids) == 1
    return _array([rules.forced_first]) if follows_one and rules.forced_first is not None else NO_IDS


def _end_gain(rules: TokenRules, position: int) -> float:
    """Return the gain of the end's logits, which grows with each token from some token on."""
    if rules.length_decay is None or position <= rules.length_decay[0]:
        return 0.0
    begin, factor = rules.length_decay
    try:
        return float(factor ** (position - begin) - 1)
    except OverflowError:
        return math.inf


def _array(ids: Collection[int]) -> IdArray:
    return np.array(ids, dtype=np.int64)
