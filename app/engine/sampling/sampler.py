"""From logits to tokens: greedy, or drawn so that a seed means the same in any company.

Shapes: N rows, V vocabulary. One uniform a row comes from a counter-based hash of (seed, sample
index, position in the request) and is put through the row's inverse CDF. Which way a row takes
depends on its own parameters only, never on its neighbours'.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from app.engine.plan import SampledToken, SamplingInput
from app.engine.sampling.filters import column, shaped, top_h
from app.engine.sampling.logits_processors import adjust
from app.request import SamplingParams, TokenScore

# Candidates that a partial selection looks at; where they don't suffice, the row is sorted whole.
_NUM_CANDIDATES = 1024
_CDF_BLOCK = 512  # tokens that a plain draw cumulates at once
_MASK = 0xFFFFFFFFFFFFFFFF


def choose_tokens(logits: Tensor, inputs: Sequence[SamplingInput]) -> tuple[SampledToken, ...]:
    """The next token of every row of `logits [N, V]` (float32).

    Reported log-probabilities are the model's own, before any adjustment. A row with NaN or
    positive infinity is reported as not finite, one in which no token may come has an error, one of
    which isn't known in time what may come is late; others are unaffected.
    """
    normaliser = logits.logsumexp(dim=-1)  # [N]
    adjusted = adjust(logits, inputs)
    chosen = logits.argmax(dim=-1)
    if adjusted.rows:
        chosen[list(adjusted.rows)] = adjusted.logits.argmax(dim=-1)
    finite = normaliser.isfinite()
    hopeless = ~finite
    hopeless[list(adjusted.failures)] = True
    for draw, rows in _sampled_rows(inputs):
        # A hopeless row has no distribution to draw from; zeros keep the call alive.
        drawn = adjusted.choice_of(logits, rows).masked_fill(hopeless[rows, None], 0.0)
        chosen[rows] = draw(drawn, [inputs[row] for row in rows])
    logprobs = logits.gather(1, chosen[:, None]).squeeze(1) - normaliser
    top = [
        _most_probable(logits[row] - normaliser[row], given.num_top) if given.num_top else ()
        for row, given in enumerate(inputs)
    ]
    columns = zip(chosen.tolist(), logprobs.tolist(), finite.tolist(), top, strict=True)
    return tuple(
        SampledToken(*column, adjusted.failures.get(row), row in adjusted.late)
        for row, column in enumerate(columns)
    )


def score_tokens(logits: Tensor, token_ids: Sequence[int], num_top: int) -> tuple[TokenScore, ...]:
    """How probable each of `token_ids` (N) is under its row of `logits [N, V]`; NaN where the row has NaN."""
    logprobs = logits.log_softmax(dim=-1)
    ids = torch.tensor(token_ids, device=logits.device)
    own = logprobs.gather(1, ids[:, None]).squeeze(1).tolist()
    return tuple(
        TokenScore(id_, logprob, _most_probable(row, num_top) if num_top else ())
        for id_, logprob, row in zip(token_ids, own, logprobs, strict=True)
    )


def _most_probable(logprobs: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    values, ids = logprobs.topk(min(count, logprobs.shape[0]))
    return tuple(zip(ids.tolist(), values.tolist(), strict=True))


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


Draw = Callable[[Tensor, Sequence[SamplingInput]], Tensor]


def _sampled_rows(inputs: Sequence[SamplingInput]) -> list[tuple[Draw, list[int]]]:
    """Sampled rows by the way they are drawn."""
    ways: dict[Draw, list[int]] = {}
    for row, given in enumerate(inputs):
        if given.params.do_sample:
            ways.setdefault(_way_of(given.params), []).append(row)
    return list(ways.items())


def _way_of(params: SamplingParams) -> Draw:
    if params.has_filter:
        return _draw_filtered
    return _draw_shaped if params.has_shape else _draw_plain


def _scores(logits: Tensor, inputs: Sequence[SamplingInput]) -> Tensor:
    temperatures = column([given.params.temperature for given in inputs], logits)
    return (logits - logits.amax(dim=-1, keepdim=True)) / temperatures


def _uniforms(inputs: Sequence[SamplingInput], device: torch.device) -> Tensor:
    """One number in [0, 1) a row: `[N, 1]`, float64."""
    drawn = [uniform(given.params.seed, given.params.sample_index, given.position) for given in inputs]
    return torch.tensor(drawn, dtype=torch.float64, device=device)[:, None]


def _draw_plain(logits: Tensor, inputs: Sequence[SamplingInput]) -> Tensor:
    """Draw from the whole vocabulary, in two levels: first a block of tokens, then one within it."""
    probabilities = _scores(logits, inputs).softmax(dim=-1)
    padded = functional.pad(probabilities, (0, -probabilities.shape[1] % _CDF_BLOCK))
    blocks = padded.view(padded.shape[0], -1, _CDF_BLOCK)  # [N, V / block, block]
    sums = blocks.sum(dim=-1, dtype=torch.float64)
    block, rest = _inverse_cdf(sums, _uniforms(inputs, logits.device))
    within = blocks.gather(1, block[:, :, None].expand(-1, -1, _CDF_BLOCK)).squeeze(1).double()
    token, _ = _inverse_cdf(within, rest)
    return (block * _CDF_BLOCK + token).squeeze(1)


def _draw_filtered(logits: Tensor, inputs: Sequence[SamplingInput]) -> Tensor:
    """Draw from what top-h, top-k, top-p and min-p leave, always a row's most probable tokens; and of that,
    what the filters leave that look at all of it.
    """
    scores = _scores(logits, inputs)
    total = scores.logsumexp(dim=-1, keepdim=True)
    values, order = scores.topk(min(_NUM_CANDIDATES, scores.shape[1]), dim=-1)
    chosen = torch.empty(len(inputs), dtype=torch.long, device=logits.device)
    enough = _suffices(values, total, inputs, scores.shape[1])
    partial = [row for row, is_enough in enumerate(enough) if is_enough]
    if partial:
        chosen[partial] = _draw_sorted(values[partial], order[partial], total[partial], inputs, partial)
    whole = [row for row, is_enough in enumerate(enough) if not is_enough]
    if whole:
        values, order = scores[whole].sort(dim=-1, descending=True, stable=True)
        chosen[whole] = _draw_sorted(values, order, total[whole], inputs, whole)
    return chosen


def _draw_shaped(logits: Tensor, inputs: Sequence[SamplingInput]) -> Tensor:
    """Draw from what the filters that look at a whole row leave, in the vocabulary's order."""
    weights = _scores(logits, inputs).double().softmax(dim=-1)
    weights = shaped(weights, [given.params for given in inputs])
    picked, _ = _inverse_cdf(weights, _uniforms(inputs, logits.device))
    return picked.squeeze(1)


def _suffices(values: Tensor, total: Tensor, inputs: Sequence[SamplingInput], vocabulary: int) -> list[bool]:
    """Whether a row's candidates hold all that its filters leave; told from the row alone."""
    count = values.shape[1]
    mass = (values - total).exp().sum(dim=-1).tolist()
    least = (values[:, -1] - values[:, 0]).exp().tolist()  # relative to the most probable token
    return [
        count == vocabulary or _is_within(given.params, count, row_mass, row_least)
        for given, row_mass, row_least in zip(inputs, mass, least, strict=True)
    ]


def _is_within(params: SamplingParams, count: int, mass: float, least: float) -> bool:
    if params.top_k or params.top_h:
        return params.top_k <= count
    return mass >= params.top_p or least < params.min_p


def _draw_sorted(
    values: Tensor, order: Tensor, total: Tensor, inputs: Sequence[SamplingInput], rows: list[int]
) -> Tensor:
    """Draw from sorted scores `values [N, C]` of the tokens `order [N, C]`."""
    given = [inputs[row] for row in rows]
    params = [each.params for each in given]
    weights = _filter(values, total, params)
    if any(each.has_shape for each in params):
        weights = shaped(weights, params)
    picked, _ = _inverse_cdf(weights, _uniforms(given, values.device))
    return order.gather(1, picked).squeeze(1)


def _filter(values: Tensor, total: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Weights `[N, C]` of sorted candidates after top-h, then top-k, then top-p, then min-p."""
    count = values.shape[1]
    values = top_h(values, params)
    rank = torch.arange(count, device=values.device)
    top_k = column([float(each.top_k or count) for each in params], values)
    kept = values.masked_fill(rank >= top_k, float("-inf"))
    is_cut = torch.tensor([each.top_k + each.top_h > 0 for each in params], device=values.device)[:, None]
    normaliser = torch.where(is_cut, kept.logsumexp(dim=-1, keepdim=True), total)
    weights = (kept - normaliser).exp().double()
    top_p = column([each.top_p for each in params], weights)
    min_p = column([each.min_p for each in params], weights)
    before = weights.cumsum(dim=-1) - weights
    # The most probable token always stays, whatever rounding makes of the rest.
    keep = ((before < top_p) & (weights >= min_p * weights[:, :1])) | (rank == 0)
    return weights * keep


def _inverse_cdf(weights: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The first index `[N, 1]` at which the cumulated share of `weights [N, C]` exceeds `target`.

    `target [N, 1]` is a share of the row's total. Also returns which share of the picked weight was
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
