"""What a request does to its row's logits before a token is chosen: bias, penalties, a grammar's mask.

Shapes: N rows, V vocabulary. Rows that ask for nothing stay as they are.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from app.engine.constraints import Mask
from app.engine.plan import SamplingInput
from app.errors import ConstraintFailed, PromptplexError
from app.request import BAN, SamplingParams

_NEVER = float("-inf")


def adjust(logits: Tensor, inputs: Sequence[SamplingInput]) -> tuple[Tensor, dict[int, PromptplexError]]:
    """Logits `[N, V]` to choose from, and the rows of which nothing may be chosen, each with why.

    Such a row's adjusted logits mean nothing. The logits themselves are left alone.
    """
    rows = [row for row, given in enumerate(inputs) if _asks(given)]
    if not rows:
        return logits, {}
    adjusted = logits.clone()
    for row in rows:
        if inputs[row].params.logit_bias:
            _bias(adjusted[row], inputs[row].params)
        if inputs[row].params.has_penalty:
            _penalise(adjusted[row], inputs[row])
    masks, failures = _masks(rows, inputs)
    if masks:
        _mask(adjusted, masks)
    limited = [row for row in rows if row in masks or inputs[row].params.logit_bias]
    if limited:
        highest = adjusted[limited].amax(dim=-1).tolist()
        failures |= {
            row: _nothing_left() for row, value in zip(limited, highest, strict=True) if value == _NEVER
        }
    return adjusted, failures


def _asks(given: SamplingInput) -> bool:
    return given.params.has_penalty or bool(given.params.logit_bias) or given.constraint is not None


def _masks(
    rows: Sequence[int], inputs: Sequence[SamplingInput]
) -> tuple[dict[int, Mask], dict[int, PromptplexError]]:
    """What each constrained row may say, waited for; and why those that fail do."""
    masks: dict[int, Mask] = {}
    failures: dict[int, PromptplexError] = {}
    for row in rows:
        constraint = inputs[row].constraint
        try:
            if constraint is not None:
                masks[row] = constraint.mask()
        except PromptplexError as error:
            failures[row] = error
    return masks, failures


def _nothing_left() -> PromptplexError:
    return ConstraintFailed(
        "no token may come next: the grammar or logit_bias leaves only tokens that are banned, or that "
        "the model can't produce; loosen one of them"
    )


def _bias(row: Tensor, params: SamplingParams) -> None:
    """In place."""
    ids, values = zip(*params.logit_bias, strict=True)
    bias = torch.tensor([_NEVER if value <= BAN else value for value in values])
    row[torch.tensor(ids, device=row.device)] += bias.to(row)


def _penalise(row: Tensor, given: SamplingInput) -> None:
    """In place. Repetition as in transformers (CTRL, Keskar et al. 2019); the others as OpenAI's."""
    assert given.prompt_ids is not None
    assert given.generated_ids is not None
    params = given.params
    ids, counts = np.unique(given.generated_ids, return_counts=True)
    seen = torch.from_numpy(np.union1d(given.prompt_ids, ids)).to(row.device)
    scores, penalty = row[seen], params.repetition_penalty
    row[seen] = torch.where(scores < 0, scores * penalty, scores / penalty)
    toll = params.frequency_penalty * counts + params.presence_penalty
    row[torch.from_numpy(ids).to(row.device)] -= torch.from_numpy(toll).to(row)


def _mask(adjusted: Tensor, masks: Mapping[int, Mask]) -> None:
    """In place. Ids that a mask doesn't reach can't come either."""
    rows = list(masks)
    allowed = torch.from_numpy(np.stack(list(masks.values()))).to(adjusted.device)
    allowed = functional.pad(allowed, (0, adjusted.shape[1] - allowed.shape[1]))
    adjusted[rows] = adjusted[rows].masked_fill(~allowed, _NEVER)
