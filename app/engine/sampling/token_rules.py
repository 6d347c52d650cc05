"""Penalties and rules of one row, in the order of `transformers`: what its ids so far do to its logits.

Shapes: V vocabulary. Everything here works in place, on rows that ask for it.
"""

from collections.abc import Collection, Iterable

import numpy as np
import torch
from torch import Tensor

from app.engine.plan import SamplingInput
from app.engine.sequence import IdArray
from app.request import TokenRules

_NEVER = float("-inf")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd; products and sums wrap around
_ZERO = np.zeros(1, dtype=np.uint64)


def adjust_row(row: Tensor, given: SamplingInput) -> None:
    """Apply what is asked of `row [V]`."""
    rules = given.params.rules
    if rules is not None:
        _bias_sequences(row, rules, given)
        _favour_prompt(row, rules.encoder_repetition_penalty, given)
    if given.params.has_penalty:
        _penalise(row, given)
    if rules is not None:
        _ban(row, _banned(rules, given))
        _force(row, _forced(rules, given))
        _hasten_end(row, rules, given.position)
        _ban(row, _suppressed(rules, given))


def _bias_sequences(row: Tensor, rules: TokenRules, given: SamplingInput) -> None:
    assert given.context is not None
    biases = dict(rules.sequence_bias)
    found = [ids for ids in _completable(biases, given.context) if ids[-1] < len(row)]
    if found:
        last = torch.tensor([ids[-1] for ids in found], device=row.device)
        row.index_add_(0, last, torch.tensor([biases[ids] for ids in found]).to(row))


def _completable(sequences: Collection[tuple[int, ...]], context: IdArray) -> list[tuple[int, ...]]:
    """Sequences of which only the last id is missing."""
    tail = tuple(context[-max(map(len, sequences), default=1) :].tolist())
    return [ids for ids in sequences if tail[len(tail) - len(ids) + 1 :] == ids[:-1]]


def _favour_prompt(row: Tensor, penalty: float, given: SamplingInput) -> None:
    if penalty != 1:
        assert given.prompt_ids is not None
        _scale(row, given.prompt_ids, 1 / penalty)


def _scale(row: Tensor, ids: IdArray, penalty: float) -> None:
    """CTRL's penalty (Keskar et al. 2019), of ids that stand here once each."""
    seen = torch.from_numpy(ids[ids < len(row)]).to(row.device)
    scores = row[seen]
    row[seen] = torch.where(scores < 0, scores * penalty, scores / penalty)


def _penalise(row: Tensor, given: SamplingInput) -> None:
    """Repetition as in transformers; the others as OpenAI's."""
    assert given.prompt_ids is not None
    assert given.generated_ids is not None
    params = given.params
    ids, counts = np.unique(given.generated_ids, return_counts=True)
    _scale(row, np.union1d(given.prompt_ids, ids), params.repetition_penalty)
    toll = params.frequency_penalty * counts + params.presence_penalty
    row[torch.from_numpy(ids).to(row.device)] -= torch.from_numpy(toll).to(row)


def _within(row: Tensor, ids: Iterable[int]) -> list[int]:
    """Ids that have a logit; a base's own lists may hold others."""
    return [id_ for id_ in ids if id_ < len(row)]


def _ban(row: Tensor, ids: Iterable[int]) -> None:
    banned = _within(row, ids)
    if banned:
        row[banned] = _NEVER


def _banned(rules: TokenRules, given: SamplingInput) -> set[int]:
    """By n-grams, bad words, and the least length."""
    assert given.context is not None
    assert given.generated_ids is not None
    prompt = given.context[: len(given.context) - len(given.generated_ids)]
    banned = continuations(given.context, given.context, rules.no_repeat_ngram_size)
    banned |= continuations(prompt, given.context, rules.encoder_no_repeat_ngram_size)
    banned |= {ids[-1] for ids in _completable(rules.bad_words, given.generated_ids)}
    return banned.union(rules.stop_ids if given.position < rules.min_new_tokens else ())


def continuations(text: IdArray, context: IdArray, size: int) -> set[int]:
    """Ids that would complete an n-gram of `size` ids that `text` holds already.

    The work grows with the text alone, however long the n-grams are: stretches are compared by sums.
    """
    length, number = size - 1, len(text) - size + 1
    if length < 0 or number < 1 or len(context) < length:
        return set()
    powers = np.cumprod(np.full(len(text), _FACTOR))
    sums = np.concatenate([_ZERO, np.cumsum(text.astype(np.uint64) * powers)])
    ends = context[len(context) - length :].astype(np.uint64)
    wanted = (ends * powers[:length]).sum(dtype=np.uint64)
    same = (sums[length : length + number] - sums[:number]) * _FACTOR == wanted * powers[:number]
    return set(text[length:][same].tolist())


def _forced(rules: TokenRules, given: SamplingInput) -> tuple[int, ...]:
    assert given.context is not None
    if rules.forced_last and given.position == rules.max_new_tokens - 1:
        return rules.forced_last
    follows_one = len(given.context) == 1
    return (rules.forced_first,) if follows_one and rules.forced_first is not None else ()


def _force(row: Tensor, ids: tuple[int, ...]) -> None:
    forced = _within(row, ids)
    if forced:
        row.fill_(_NEVER)
        row[forced] = 0.0


def _hasten_end(row: Tensor, rules: TokenRules, position: int) -> None:
    """From some token on, the end of an answer grows more probable with each further one."""
    if rules.length_decay is None or position <= rules.length_decay[0]:
        return
    begin, factor = rules.length_decay
    ends = _within(row, rules.eos_ids)
    gain = row[ends].abs() * (factor ** (position - begin) - 1)
    row[ends] += gain.masked_fill(~row[ends].isfinite(), 0.0)


def _suppressed(rules: TokenRules, given: SamplingInput) -> tuple[int, ...]:
    """A forced first token is no beginning yet; the beginning is then the second one."""
    assert given.context is not None
    begin = int(len(given.context) - given.position < 2 and rules.forced_first is not None)
    return rules.suppressed + (rules.suppressed_first if given.position == begin else ())
