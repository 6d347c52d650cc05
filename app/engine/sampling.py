"""From logits to tokens: greedy, or drawn so that a seed means the same in any company.

Shapes: N rows, V vocabulary. One uniform a row comes from a counter-based hash of (seed, sample
index, position in the request) and is put through the row's inverse CDF. Which way a row takes
depends on its own parameters only, never on its neighbours'.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from app.engine.plan import SampledToken, SamplingInput
from app.request import SamplingParams

# Up to this many candidates come from a partial selection; more from a full sort.
_MAX_PARTIAL_TOP_K = 1024
_MASK = 0xFFFFFFFFFFFFFFFF


def choose_tokens(logits: Tensor, inputs: Sequence[SamplingInput]) -> tuple[SampledToken, ...]:
    """The next token of every row of `logits [N, V]` (float32).

    Reported log-probabilities are the model's own, before any adjustment. A row with NaN or
    positive infinity is reported as not finite; others are unaffected.
    """
    normaliser = logits.logsumexp(dim=-1)  # [N]
    adjusted = _apply_penalties(logits, inputs)
    chosen = adjusted.argmax(dim=-1)
    finite = normaliser.isfinite()
    for rows in _sampled_rows(inputs):
        # A row without finite logits has no distribution to draw from; zeros keep the call alive.
        drawn = adjusted[rows].masked_fill(~finite[rows, None], 0.0)
        chosen[rows] = _draw(drawn, [inputs[row] for row in rows])
    logprobs = logits.gather(1, chosen[:, None]).squeeze(1) - normaliser
    columns = zip(chosen.tolist(), logprobs.tolist(), finite.tolist(), strict=True)
    return tuple(SampledToken(token, logprob, is_finite) for token, logprob, is_finite in columns)


def uniform(seed: int, sample_index: int, position: int) -> float:
    """A number in [0, 1) that depends on these three only (splitmix64, Steele et al. 2014)."""
    state = _mix(seed & _MASK)
    state = _mix((state ^ sample_index) & _MASK)
    state = _mix((state ^ position) & _MASK)
    return float((state >> 11) * 2.0**-53)


def _mix(state: int) -> int:
    state = (state + 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)


def _has_penalty(params: SamplingParams) -> bool:
    return (params.repetition_penalty, params.frequency_penalty, params.presence_penalty) != (1.0, 0.0, 0.0)


def _apply_penalties(logits: Tensor, inputs: Sequence[SamplingInput]) -> Tensor:
    rows = [row for row, given in enumerate(inputs) if _has_penalty(given.params)]
    if not rows:
        return logits
    adjusted = logits.clone()
    for row in rows:
        _penalise(adjusted[row], inputs[row])
    return adjusted


def _penalise(row: Tensor, given: SamplingInput) -> None:
    """In place. Repetition as in transformers (CTRL, Keskar et al. 2019); the others as OpenAI's."""
    params = given.params
    seen = torch.tensor(sorted({*given.prompt_ids, *given.generated}), device=row.device)
    scores = row[seen]
    penalty = params.repetition_penalty
    row[seen] = torch.where(scores < 0, scores * penalty, scores / penalty)
    if given.generated:
        ids, counts = np.unique(np.array(given.generated), return_counts=True)
        toll = params.frequency_penalty * counts + params.presence_penalty
        row[torch.from_numpy(ids).to(row.device)] -= torch.from_numpy(toll).to(row)


def _sampled_rows(inputs: Sequence[SamplingInput]) -> list[list[int]]:
    """Sampled rows by the way they take: plain, partial selection, full sort."""
    ways: tuple[list[int], list[int], list[int]] = ([], [], [])
    for row, given in enumerate(inputs):
        if given.params.do_sample:
            ways[_way(given.params)].append(row)
    return [rows for rows in ways if rows]


def _way(params: SamplingParams) -> int:
    if 0 < params.top_k <= _MAX_PARTIAL_TOP_K:
        return 1
    return 2 if params.top_k or params.top_p < 1 or params.min_p > 0 else 0


def _draw(logits: Tensor, inputs: Sequence[SamplingInput]) -> Tensor:
    """Draw one token id a row; all rows take the same way."""
    way = _way(inputs[0].params)
    column = [given.params for given in inputs]
    temperatures = _vector([params.temperature for params in column], logits)
    scores = (logits - logits.amax(dim=-1, keepdim=True)) / temperatures
    if way == 0:
        probabilities, order = scores.softmax(dim=-1).double(), None
    else:
        candidates = scores.shape[-1] if way == 2 else min(_MAX_PARTIAL_TOP_K, scores.shape[-1])
        kept, order = _sorted_candidates(scores, candidates)
        probabilities = _filter(kept, column)
    uniforms = _vector(
        [uniform(given.params.seed, given.params.sample_index, given.position) for given in inputs],
        probabilities,
    )
    picked = _inverse_cdf(probabilities, uniforms)
    return (picked if order is None else order.gather(1, picked)).squeeze(1)


def _vector(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _sorted_candidates(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    if count < scores.shape[-1]:
        values, order = scores.topk(count, dim=-1)
        return values, order
    values, order = scores.sort(dim=-1, descending=True, stable=True)
    return values, order


def _filter(scores: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Probabilities `[N, C]` of sorted candidates after top-k, then top-p, then min-p."""
    rank = torch.arange(scores.shape[-1], device=scores.device)
    top_k = _vector([each.top_k or scores.shape[-1] for each in params], scores)
    weights = scores.masked_fill(rank >= top_k, float("-inf")).softmax(dim=-1).double()
    top_p = _vector([each.top_p for each in params], weights)
    min_p = _vector([each.min_p for each in params], weights)
    before = weights.cumsum(dim=-1) - weights
    # The most probable token always stays, whatever rounding makes of the rest.
    keep = ((before < top_p) & (weights >= min_p * weights[:, :1])) | (rank == 0)
    return weights * keep


def _inverse_cdf(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The first index whose cumulated weight exceeds `uniforms [N, 1]` of the total: `[N, 1]`."""
    cumulated = probabilities.cumsum(dim=-1)
    target = uniforms * cumulated[:, -1:]
    last = (probabilities > 0).long().cumsum(dim=-1).argmax(dim=-1, keepdim=True)
    return torch.searchsorted(cumulated, target, right=True).minimum(last)
