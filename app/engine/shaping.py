"""Filters of a draw that depend on a whole row: top-h, typical-p, the epsilon and the eta cutoff.

Each is what `transformers` has under the name (Potraitis et al. 2025; Meister et al. 2022; Hewitt et al.
2022), for rows whose tokens stand in order of their probability. Shapes: N rows, V tokens; float64.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from app.request import SamplingParams

_TOP_H_TOKENS = 100  # as many as transformers looks at


def column(values: Sequence[float], like: Tensor) -> Tensor:
    """One value a row, `[N, 1]`, in the dtype of `like` and where it is."""
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def top_h(values: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Scores `[N, V]` of which only the first stay, whose share of the entropy is at most `top_h`."""
    share = column([each.top_h for each in params], values)
    weights = values[:, :_TOP_H_TOKENS].softmax(dim=-1)
    terms = torch.special.entr(weights)
    keep = terms.cumsum(dim=-1) <= share * terms.sum(dim=-1, keepdim=True)
    count = keep.sum(dim=-1, keepdim=True).clamp(min=1).masked_fill(share == 0, values.shape[1])
    return values.masked_fill(torch.arange(values.shape[1], device=values.device) >= count, float("-inf"))


def shaped(weights: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Weights `[N, V]` after typical-p, then the epsilon, then the eta cutoff; each row has some left."""
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
    nearest, order = distance.sort(dim=-1, stable=True)
    cumulated = probabilities.gather(1, order).cumsum(dim=-1)
    last = (cumulated < mass).sum(dim=-1, keepdim=True).clamp(max=distance.shape[1] - 1)
    return (distance <= nearest.gather(1, last)) | (mass >= 1)


def _epsilon(probabilities: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    return _at_least(probabilities, column([each.epsilon_cutoff for each in params], probabilities))


def _eta(probabilities: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    epsilon = column([each.eta_cutoff for each in params], probabilities)
    return _at_least(probabilities, epsilon.minimum(epsilon.sqrt() * (-_entropy(probabilities)).exp()))


def _at_least(probabilities: Tensor, least: Tensor) -> Tensor:
    """Which tokens are so probable; the most probable one always is."""
    return (probabilities >= least) | (probabilities == probabilities.amax(dim=-1, keepdim=True))
