"""Filters: which tokens may be drawn. Each is what `transformers` has under the name.

Shapes: n rows, V tokens of the vocabulary or C candidates, parameters `[n, 1]`. Methods: top-h (Potraitis et
al. 2025), typical-p (Meister et al. 2022), epsilon and eta cutoffs (Hewitt et al. 2022).
"""

import torch
from torch import Tensor

from app.engine.sampling.parameters import Parameters

_TOP_H_TOKENS = 100  # as many as transformers looks at
_NEAREST = 1024
_NEVER = float("-inf")


def log_sum_exp(values: Tensor) -> Tensor:
    """Return the logarithm of each row's summed exponentials, `[n, 1]`, the same alone and in any company.

    A CPU's threads would share a lone row, and round its halves apart.
    """
    rows = values.expand(2, -1) if len(values) == 1 and values.device.type == "cpu" else values
    return rows.logsumexp(dim=-1, keepdim=True)[: len(values)]


def filtered(values: Tensor, total: Tensor, parameters: Parameters) -> Tensor:
    """Return weights `[n, C]` of sorted scores after top-h, then top-k, then top-p, then min-p.

    `total [n, 1]` is the logarithm of the summed exponentials of the whole rows' scores.
    """
    count = values.shape[1]
    values = top_h(values, parameters)
    rank = torch.arange(count, device=values.device)
    top_k = parameters.top_k
    kept = values.masked_fill(rank >= torch.where(top_k > 0, top_k, count), _NEVER)
    is_cut = top_k + parameters.top_h > 0
    normaliser = torch.where(is_cut, log_sum_exp(kept), total)
    weights = (kept - normaliser).exp().double()
    before = weights.cumsum(dim=-1) - weights
    keep = (before < parameters.top_p) & (weights >= parameters.min_p * weights[:, :1])
    # The most probable token always stays, whatever rounding makes of the rest.
    return weights * (keep | (rank == 0))


def suffices(values: Tensor, total: Tensor, parameters: Parameters) -> Tensor:
    """Return whether the sorted candidates `[n, C]` of a row hold all that `filtered` leaves, as `[n]`."""
    count = values.shape[1]
    is_cut = parameters.top_k + parameters.top_h > 0
    mass = (values - total).exp().sum(dim=-1, keepdim=True)
    least = (values[:, -1:] - values[:, :1]).exp()  # relative to the most probable token
    has_all = (mass >= parameters.top_p) | (least < parameters.min_p)
    return torch.where(is_cut, parameters.top_k <= count, has_all).squeeze(1)


def top_h(values: Tensor, parameters: Parameters) -> Tensor:
    """Keep the first of sorted scores `[n, C]`, up to a share of `top_h` of the entropy."""
    if not parameters.has_top_h:
        return values
    share = parameters.top_h.to(values)
    weights = values[:, :_TOP_H_TOKENS].softmax(dim=-1)
    terms = torch.special.entr(weights)
    keep = terms.cumsum(dim=-1) <= share * terms.sum(dim=-1, keepdim=True)
    count = keep.sum(dim=-1, keepdim=True).clamp(min=1).masked_fill(share == 0, values.shape[1])
    return values.masked_fill(torch.arange(values.shape[1], device=values.device) >= count, _NEVER)


def shaped(weights: Tensor, parameters: Parameters) -> Tensor:
    """Return weights `[n, V or C]` (float64) after typical-p, the epsilon, and the eta cutoff.

    Each row has some left.
    """
    if not parameters.has_shape:
        return weights
    for shape in (_typical, _epsilon, _eta):
        weights = weights * shape(weights / weights.sum(dim=-1, keepdim=True), parameters)
    return weights


def _entropy(probabilities: Tensor) -> Tensor:
    entropy: Tensor = torch.special.entr(probabilities).sum(dim=-1, keepdim=True)
    return entropy


def _typical(probabilities: Tensor, parameters: Parameters) -> Tensor:
    """Return which tokens carry about as much information as expected, up to a mass of `typical_p`."""
    mass = parameters.typical_p
    distance = (-probabilities.log() - _entropy(probabilities)).abs()
    every = distance.shape[1]
    # A GPU looks at all: the host would have to wait to learn whether the nearest ones suffice.
    count = min(_NEAREST, every) if distance.device.type == "cpu" else every
    farthest = _farthest(distance, probabilities, mass, count)
    return (distance <= farthest) | (mass >= 1)


def _farthest(distance: Tensor, probabilities: Tensor, mass: Tensor, count: int) -> Tensor:
    """Return the distance `[n, 1]` within which the nearest tokens have their mass.

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


def _epsilon(probabilities: Tensor, parameters: Parameters) -> Tensor:
    return _at_least(probabilities, parameters.epsilon_cutoff)


def _eta(probabilities: Tensor, parameters: Parameters) -> Tensor:
    epsilon = parameters.eta_cutoff
    return _at_least(probabilities, epsilon.minimum(epsilon.sqrt() * (-_entropy(probabilities)).exp()))


def _at_least(probabilities: Tensor, least: Tensor) -> Tensor:
    """Return which tokens are so probable; the most probable one always is."""
    return (probabilities >= least) | (probabilities == probabilities.amax(dim=-1, keepdim=True))
