"""The sampler in torch's operations: the reference, for every device and every kind of row.

From logits to tokens, greedy or drawn, or to a beam's candidates. Shapes: N rows, V vocabulary, n rows of N,
k candidates.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from app.engine.sampling.batch import SamplingBatch
from app.engine.sampling.inputs import Candidate, SampledToken, SamplingInput
from app.engine.sampling.logits_processors import processed
from app.engine.sampling.token_masks import PackedMask
from app.errors import ConstraintFailed

Top = tuple[tuple[int, float], ...]


def sample(
    logits: Tensor, inputs: Sequence[SamplingInput], masks: Mapping[int, PackedMask]
) -> tuple[SampledToken, ...]:
    """Do what `sampler.sample` describes."""
    batch = SamplingBatch.of(inputs, logits.device)
    normaliser = logits.logsumexp(dim=-1)  # [N]
    top = _top(logits, normaliser, [given.num_top for given in batch.inputs])
    finite = normaliser.isfinite()
    with processed(logits, normaliser, batch.inputs, masks):
        chosen, is_stuck = _choose(logits, batch, finite)
        best = _best(logits, [given.num_candidates for given in batch.inputs])
    candidates = _candidates(best, logits, normaliser)
    logprobs = logits.gather(1, chosen[:, None]).squeeze(1) - normaliser
    columns = torch.stack([chosen, logprobs.double(), finite, is_stuck])
    return tuple(
        SampledToken(
            int(token_id),
            logprob,
            bool(is_finite),
            top[row],
            _nothing_left() if stuck else None,
            batch.inputs[row].is_constrained and row not in masks,
            candidates.get(row, ()) if candidates else (),
        )
        for row, (token_id, logprob, is_finite, stuck) in enumerate(columns.T.tolist())  # one transfer
    )


def _choose(logits: Tensor, batch: SamplingBatch, finite: Tensor) -> tuple[Tensor, Tensor]:
    """Return the token of each row, and whether none may come, both `[N]`."""
    chosen = logits.argmax(dim=-1)
    is_stuck = logits.gather(1, chosen[:, None]).squeeze(1) == float("-inf")
    hopeless = is_stuck | ~finite
    for draw, rows, parameters in batch.drawn:
        # A hopeless row has no distribution to draw from; zeros keep the call alive.
        choices = logits[rows].masked_fill_(hopeless[rows, None], 0.0)
        chosen[rows] = draw(choices, parameters)
    return chosen, is_stuck


def _top(logits: Tensor, normaliser: Tensor, counts: Sequence[int]) -> list[Top]:
    """Return the most probable tokens of each row, as many as it wants."""
    top: list[Top] = [()] * len(counts)
    for count, rows in _rows_by_count(counts):
        index = rows if len(rows) < len(counts) else slice(None)  # a view, where all want as many
        found = most_probable(logits[index] - normaliser[index, None], count)
        for row, each in zip(rows, found, strict=True):
            top[row] = each
    return top


def _rows_by_count(counts: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Return the rows that want equally many tokens: which of tied ones a selection takes depends on that."""
    if not any(counts):
        return []
    wanted = set(counts) - {0}
    return [(count, [row for row, each in enumerate(counts) if each == count]) for count in wanted]


_Best = list[tuple[list[int], Tensor, Tensor]]  # rows, their best scores `[n, k]`, and the tokens' ids


def _best(scores: Tensor, counts: Sequence[int]) -> _Best:
    """Select the best tokens of each row of `scores [N, V]`, as many as it wants."""
    width = scores.shape[1]
    return [(rows, *scores[rows].topk(min(count, width))) for count, rows in _rows_by_count(counts)]


def _candidates(best: _Best, logits: Tensor, normaliser: Tensor) -> dict[int, tuple[Candidate, ...]]:
    """Return what was selected, by row, apart from what may not come."""
    found = {}
    for rows, scores, ids in best:
        logprobs = logits[rows].gather(1, ids) - normaliser[rows, None]
        columns = torch.stack([ids, scores.double(), logprobs.double()], dim=-1).tolist()
        for row, triples in zip(rows, columns, strict=True):
            found[row] = tuple(
                Candidate(int(id_), score, logprob)
                for id_, score, logprob in triples
                if score > float("-inf")
            )
    return found


def most_probable(logprobs: Tensor, count: int) -> list[Top]:
    """Return the tokens of each row of `logprobs [N, V]` that are most probable, and how much they are."""
    values, ids = logprobs.topk(min(count, logprobs.shape[1]))
    return [tuple(zip(*row, strict=True)) for row in zip(ids.tolist(), values.tolist(), strict=True)]


def _nothing_left() -> ConstraintFailed:
    return ConstraintFailed(
        "no token may come next: the grammar, logit_bias, or a rule such as bad_words or min_new_tokens "
        "leaves only tokens that are banned, or that the model can't produce; loosen one of them"
    )
