"""Filters of a draw that look at all that is left: top-h, typical-p, the epsilon and the eta cutoff.

Each is what `transformers` has under the name (Potraitis et al. 2025; Meister et al. 2022; Hewitt et al.
2022). Shapes: N rows, V tokens of the vocabulary or C candidates.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from app.request import SamplingParams

_TOP_H_TOKENS = 100  # as many as transformers looks at
_NEAREST = 1024


def column(values: Sequence[float], like: Tensor) -> Tensor:
    """One value a row, `[N, 1]`, in the dtype of `like` and where it is."""
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def top_h(values: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Sorted scores `[N, C]` of which only the first stay, whose share of the entropy is at most `top_h`."""
    if not any(each.top_h for each in params):
        return values
    share = column([each.top_h for each in params], values)
    weights = values[:, :_TOP_H_TOKENS].softmax(dim=-1)
    terms = torch.special.entr(weights)
    keep = terms.cumsum(dim=-1) <= share * terms.sum(dim=-1, keepdim=True)
    count = keep.sum(dim=-1, keepdim=True).clamp(min=1).masked_fill(share == 0, values.shape[1])
    return values.masked_fill(torch.arange(values.shape[1], device=values.device) >= count, float("-inf"))


def shaped(weights: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Weights `[N, V or C]` after typical-p, the epsilon, and the eta cutoff; each row has some left."""
    for shape in (_typical, _epsilon, _eta):
        probabilities = weights / weights.sum(dim=-1, keepdim=True)
        weights = weights * shape(probabilities, params)
    return weights


def _entropy(probabilities: Tensor) -> Tensor:
    entropy: Tensor = torch.special.entr(probabilities).sum(dim=-1, keepdim=True)
    return entropy


def _typical(probabilities: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Which tokens carry about as much information as is to be expected, up to a mass of `typical_p`."""
    mass = column([each.typical_p for each in params], probabilities)
    distance = (-probabilities.log() - _entropy(probabilities)).abs()
    farthest = _farthest(distance, probabilities, mass, min(_NEAREST, distance.shape[1]))
    return (distance <= farthest) | (mass >= 1)


def _farthest(distance: Tensor, probabilities: Tensor, mass: Tensor, count: int) -> Tensor:
    """Which distance `[N, 1]` the nearest tokens reach together with their mass.

    Few tokens have it in most rows; only where the nearest `count` lack it, all are sorted.
    """
    nearest, order = distance.topk(count, largest=False)
    is_short = probabilities.gather(1, order).cumsum(dim=-1) < mass
    last = is_short.sum(dim=-1, keepdim=True)
    farthest = nearest.gather(1, last.clamp(max=count - 1))
    unknown = ((last == count) & (mass < 1)).squeeze(1)
    if count < distance.shape[1] and unknown.any():
        every = distance.shape[1]
        farthest[unknown] = _farthest(distance[unknown], probabilities[unknown], mass[unknown], every)
    return farthest


def _epsilon(probabilities: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    return _at_least(probabilities, column([each.epsilon_cutoff for each in params], probabilities))


def _eta(probabilities: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    epsilon = column([each.eta_cutoff for each in params], probabilities)
    return _at_least(probabilities, epsilon.minimum(epsilon.sqrt() * (-_entropy(probabilities)).exp()))


def _at_least(probabilities: Tensor, least: Tensor) -> Tensor:
    """Which tokens are so probable; the most probable one always is."""
    return (probabilities >= least) | (probabilities == probabilities.amax(dim=-1, keepdim=True))
