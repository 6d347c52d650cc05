"""Draws: a row's uniform number, put through the inverse CDF of what its parameters leave.

Each takes `logits [n, V]`, which it overwrites, and gives token ids `[n]`. Shapes: n rows, V vocabulary, C
candidates, parameters `[n, 1]`.
"""

import torch
from torch import Tensor
from torch.nn import functional

from app.engine.sampling.filters import filtered, log_sum_exp, shaped, suffices
from app.engine.sampling.parameters import Parameters

# Candidates that a partial selection looks at; where they don't suffice, the row is sorted whole.
_NUM_CANDIDATES = 1024
_CDF_BLOCK = 512  # tokens that a plain draw cumulates at once


def draw_plain(logits: Tensor, parameters: Parameters) -> Tensor:
    """Draw from the whole vocabulary, in two levels: first a block of tokens, then one within it."""
    probabilities = _scores(logits, parameters).softmax(dim=-1)
    padded = functional.pad(probabilities, (0, -probabilities.shape[1] % _CDF_BLOCK))
    blocks = padded.view(padded.shape[0], -1, _CDF_BLOCK)  # [n, V / block, block]
    block, rest = _inverse_cdf(blocks.sum(dim=-1, dtype=torch.float64), parameters.uniform)
    within = blocks.gather(1, block[:, :, None].expand(-1, -1, _CDF_BLOCK)).squeeze(1).double()
    token, _ = _inverse_cdf(within, rest)
    return (block * _CDF_BLOCK + token).squeeze(1)


def draw_filtered(logits: Tensor, parameters: Parameters) -> Tensor:
    """Draw from what top-h, top-k, top-p and min-p leave, and of that, what the other filters leave."""
    scores = _scores(logits, parameters)
    total = log_sum_exp(scores)
    draw = draw_from_candidates if scores.device.type == "cpu" else draw_from_whole_rows
    return draw(scores, total, parameters)


def draw_from_candidates(scores: Tensor, total: Tensor, parameters: Parameters) -> Tensor:
    """Draw from the best candidates of `scores [n, V]` where they suffice, else from the whole row."""
    values, order = scores.topk(min(_NUM_CANDIDATES, scores.shape[1]), dim=-1)
    tokens = _draw_sorted(values, order, total, parameters)
    if values.shape[1] < scores.shape[1]:
        rest = (~suffices(values, total, parameters)).nonzero().squeeze(1)
        if len(rest):
            tokens[rest] = draw_from_whole_rows(scores[rest], total[rest], parameters.take(rest))
    return tokens


def draw_from_whole_rows(scores: Tensor, total: Tensor, parameters: Parameters) -> Tensor:
    """Draw from `scores [n, V]`, sorted whole.

    On a GPU all rows are: to look whether candidates suffice would wait for the device, and of tied scores
    its `topk` takes others in other company.
    """
    values, order = scores.sort(dim=-1, descending=True, stable=True)
    return _draw_sorted(values, order, total, parameters)


def _draw_sorted(values: Tensor, order: Tensor, total: Tensor, parameters: Parameters) -> Tensor:
    """Draw from sorted scores `values [n, C]` of the tokens `order [n, C]`."""
    weights = shaped(filtered(values, total, parameters), parameters)
    picked, _ = _inverse_cdf(weights, parameters.uniform)
    return order.gather(1, picked).squeeze(1)


def draw_shaped(logits: Tensor, parameters: Parameters) -> Tensor:
    """Draw from what the filters that look at a whole row leave, in the vocabulary's order."""
    weights = shaped(_scores(logits, parameters).double().softmax(dim=-1), parameters)
    picked, _ = _inverse_cdf(weights, parameters.uniform)
    return picked.squeeze(1)


def _scores(logits: Tensor, parameters: Parameters) -> Tensor:
    """Overwrite the logits, for their memory."""
    return logits.sub_(logits.amax(dim=-1, keepdim=True)).div_(parameters.temperature.to(logits))


def _inverse_cdf(weights: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first index `[n, 1]` at which the cumulated share of `weights [n, C]` exceeds `target`.

    `target [n, 1]` is a share of the row's total. Also return which share of the picked weight was
    left over, for a second draw within it.
    """
    cumulated = weights.cumsum(dim=-1)
    sought = target * cumulated[:, -1:]
    positive = (weights > 0).to(torch.uint8)
    last = weights.shape[1] - 1 - positive.flip(-1).argmax(dim=-1, keepdim=True)
    index = torch.searchsorted(cumulated, sought, right=True).minimum(last)
    picked = weights.gather(1, index)
    left_over = (sought - (cumulated.gather(1, index) - picked)) / picked
    return index, left_over.clamp(0.0, 1.0)
