"""The sampler in torch's operations: the reference, for every device and every kind of row.

From logits to tokens, greedy or drawn, or to a beam's candidates. The work has two parts: all up to numbers
that stay on the device, and on the host, once the device is done, the tokens. Shapes: N rows, V vocabulary,
n rows of N, k candidates.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from app.engine.sampling.batch import SamplingBatch
from app.engine.sampling.filters import log_sum_exp
from app.engine.sampling.inputs import Candidate, Sampled, SampledToken, SamplingInput
from app.engine.sampling.logits_processors import processed
from app.engine.sampling.token_masks import PackedMask
from app.errors import ConstraintFailed
from app.models.transfer import from_device, to_device

Top = tuple[tuple[int, float], ...]


def sample(
    logits: Tensor, inputs: Sequence[SamplingInput], masks: Mapping[int, PackedMask]
) -> tuple[SampledToken, ...]:
    """Do what `sampler.sample` describes, and wait for it."""
    return launch(logits, inputs, masks).tokens()


def launch(logits: Tensor, inputs: Sequence[SamplingInput], masks: Mapping[int, PackedMask]) -> Sampled:
    """Do what `sampler.sample` describes with `logits [N, V]` (float32)."""
    batch = SamplingBatch.of(inputs, logits.device)
    normaliser = log_sum_exp(logits).squeeze(1)  # [N]
    wanted = _by_count([given.num_top for given in inputs])
    top = [_most_probable(logits, normaliser, rows, count) for rows, count in wanted]
    with processed(logits, normaliser, inputs, masks):
        ids, is_stuck = _choose(logits, batch, normaliser.isfinite())
        beams = _by_count([given.num_candidates for given in inputs])
        best = [_best(logits, rows, count) for rows, count in beams]
    candidates = [_with_logprobs(each, logits, normaliser) for each in best]
    numbers = _numbers(logits, normaliser, ids, is_stuck)
    late = [given.is_constrained and row not in masks for row, given in enumerate(inputs)]
    copied = from_device([numbers, *top, *candidates])

    def tokens() -> tuple[SampledToken, ...]:
        numbers, *selected = copied()
        top_of = _top_by_row(wanted, selected[: len(wanted)])
        candidates_of = _candidates_by_row(beams, selected[len(wanted) :])
        return tuple(
            _token(each, top_of.get(row, ()), late[row], candidates_of.get(row, ()))
            for row, each in enumerate(numbers.tolist())
        )

    return Sampled(ids, tokens)


class Choice(NamedTuple):
    """The most probable token of each of N rows, on the device."""

    ids: Tensor  # [N] int64
    numbers: Tensor  # [N, 4] float64, for `sampled`


def greedy(logits: Tensor) -> Choice:
    """Choose for `logits [N, V]` (floating point), by operations of fixed shapes alone: a graph."""
    logits = logits.float()
    normaliser = log_sum_exp(logits).squeeze(1)
    ids, is_stuck = _most_likely(logits)
    return Choice(ids, _numbers(logits, normaliser, ids, is_stuck))


def sampled(choice: Choice, count: int) -> Sampled:
    """Return the first `count` rows of a choice, as `launch` would for rows that are `is_bare_greedy`."""
    copied = from_device([choice.numbers[:count]])
    return Sampled(choice.ids[:count], lambda: tuple(_token(each) for each in copied()[0].tolist()))


def _choose(logits: Tensor, batch: SamplingBatch, finite: Tensor) -> tuple[Tensor, Tensor]:
    """Return the token of each row, and whether none may come, both `[N]`."""
    chosen, is_stuck = _most_likely(logits)
    hopeless = is_stuck | ~finite
    for draw, rows, parameters in batch.drawn:
        # A hopeless row has no distribution to draw from; zeros keep the call alive.
        choices = logits[rows].masked_fill_(hopeless[rows, None], 0.0)
        chosen[rows] = draw(choices, parameters)
    return chosen, is_stuck


def _most_likely(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the best token of each row, and whether it may not come either, both `[N]`."""
    ids = logits.argmax(dim=-1)
    return ids, logits.gather(1, ids[:, None]).squeeze(1) == float("-inf")


def _numbers(logits: Tensor, normaliser: Tensor, ids: Tensor, is_stuck: Tensor) -> Tensor:
    """Return of each row its token, that one's log-probability, and two flags, as `[N, 4]` for `_token`."""
    logprobs = logits.gather(1, ids[:, None]).squeeze(1) - normaliser
    return torch.stack([ids.double(), logprobs.double(), normaliser.isfinite(), is_stuck], dim=-1)


def _token(
    numbers: Sequence[float], top: Top = (), is_late: bool = False, candidates: tuple[Candidate, ...] = ()
) -> SampledToken:
    token_id, logprob, is_finite, is_stuck = numbers
    error = _nothing_left() if is_stuck else None
    return SampledToken(int(token_id), logprob, bool(is_finite), top, error, is_late, candidates)


# -- the most probable tokens, and the candidates of beams ---------------------------------------------

_Rows = list[int]


def _by_count(counts: Sequence[int]) -> list[tuple[_Rows, int]]:
    """Return the rows that want equally many tokens: which of tied ones a selection takes depends on that."""
    if not any(counts):
        return []
    wanted = set(counts) - {0}
    return [([row for row, each in enumerate(counts) if each == count], count) for count in wanted]


def _index(rows: _Rows, logits: Tensor) -> Tensor | slice:
    """Return what takes these rows of `logits [N, V]`; a view, where they are all."""
    return to_device(np.array(rows), logits.device) if len(rows) < len(logits) else slice(None)


def _most_probable(logits: Tensor, normaliser: Tensor, rows: _Rows, count: int) -> Tensor:
    """Return the ids and log-probabilities of the rows' most probable tokens, as `[n, k, 2]`."""
    index = _index(rows, logits)
    return most_probable(logits[index] - normaliser[index, None], count)


def most_probable(logprobs: Tensor, count: int) -> Tensor:
    """Return the ids of the tokens of each row of `logprobs [n, V]` that are most probable, and how much.

    As `[n, k, 2]` (float64), for `top_of`.
    """
    values, ids = logprobs.topk(min(count, logprobs.shape[1]))
    return torch.stack([ids.double(), values.double()], dim=-1)


def top_of(selected: Tensor) -> list[Top]:
    """Return what `most_probable` selected, row by row."""
    return [tuple((int(id_), value) for id_, value in pairs) for pairs in selected.tolist()]


def _top_by_row(wanted: list[tuple[_Rows, int]], selected: Sequence[Tensor]) -> dict[int, Top]:
    found: dict[int, Top] = {}
    for (rows, _), each in zip(wanted, selected, strict=True):
        found.update(zip(rows, top_of(each), strict=True))
    return found


class _Best(NamedTuple):
    """The best tokens of n rows."""

    at: Tensor | slice  # what takes their rows of N
    scores: Tensor  # [n, k]
    ids: Tensor  # [n, k]


def _best(scores: Tensor, rows: _Rows, count: int) -> _Best:
    """Select from `scores [N, V]`, which are processed."""
    index = _index(rows, scores)
    return _Best(index, *scores[index].topk(min(count, scores.shape[1])))


def _with_logprobs(best: _Best, logits: Tensor, normaliser: Tensor) -> Tensor:
    """Return ids, scores, and the model's own log-probabilities, as `[n, k, 3]`."""
    logprobs = logits[best.at].gather(1, best.ids) - normaliser[best.at, None]
    return torch.stack([best.ids.double(), best.scores.double(), logprobs.double()], dim=-1)


def _candidates_by_row(
    beams: list[tuple[_Rows, int]], selected: Sequence[Tensor]
) -> dict[int, tuple[Candidate, ...]]:
    """Return what was selected, apart from what may not come."""
    found = {}
    for (rows, _), each in zip(beams, selected, strict=True):
        for row, triples in zip(rows, each.tolist(), strict=True):
            found[row] = tuple(
                Candidate(int(id_), score, logprob)
                for id_, score, logprob in triples
                if score > float("-inf")
            )
    return found


def _nothing_left() -> ConstraintFailed:
    return ConstraintFailed(
        "no token may come next: the grammar, logit_bias, or a rule such as bad_words or min_new_tokens "
        "leaves only tokens that are banned, or that the model can't produce; loosen one of them"
    )
