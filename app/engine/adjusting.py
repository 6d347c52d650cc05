"""What a request does to its row's logits before a token is chosen: bias, penalties, a grammar's mask.

Shapes: N rows, V vocabulary. Rows that ask for nothing stay as they are.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from app.engine.constraints import PackedMask
from app.engine.plan import SamplingInput
from app.errors import ConstraintFailed, PromptplexError
from app.request import BAN, SamplingParams

_NEVER = float("-inf")


def adjust(logits: Tensor, inputs: Sequence[SamplingInput]) -> tuple[Tensor, dict[int, PromptplexError]]:
    """Logits `[N, V]` to choose from, and the rows of which nothing may be chosen, each with why.

    Such a row's adjusted logits mean nothing. The logits themselves are left alone.
    """
    rows = [row for row, given in enumerate(inputs) if _asks(given)]
    failures: dict[int, PromptplexError] = {}
    if not rows:
        return logits, failures
    adjusted = logits.clone()
    for row in rows:
        try:
            _adjust(adjusted[row], inputs[row])
        except PromptplexError as error:
            failures[row] = error
    return adjusted, failures


def _asks(given: SamplingInput) -> bool:
    return given.params.has_penalty or bool(given.params.logit_bias) or given.constraint is not None


def _adjust(row: Tensor, given: SamplingInput) -> None:
    """In place. Raises ConstraintFailed where no token is left, or the grammar can't go on."""
    if given.params.logit_bias:
        _bias(row, given.params)
    if given.params.has_penalty:
        _penalise(row, given)
    if given.constraint is not None:
        _mask(row, given.constraint.mask())
    may_be_empty = given.constraint is not None or bool(given.params.logit_bias)
    if may_be_empty and row.amax() == _NEVER:
        raise ConstraintFailed(
            "no token may come next: the grammar or logit_bias leaves only tokens that are banned, or that "
            "the model can't produce; loosen one of them"
        )


def _bias(row: Tensor, params: SamplingParams) -> None:
    ids, values = zip(*params.logit_bias, strict=True)
    bias = torch.tensor([_NEVER if value <= BAN else value for value in values])
    row[torch.tensor(ids, device=row.device)] += bias.to(row)


def _penalise(row: Tensor, given: SamplingInput) -> None:
    """Repetition as in transformers (CTRL, Keskar et al. 2019); the others as OpenAI's."""
    assert given.prompt_ids is not None
    assert given.generated_ids is not None
    params = given.params
    ids, counts = np.unique(given.generated_ids, return_counts=True)
    seen = torch.from_numpy(np.union1d(given.prompt_ids, ids)).to(row.device)
    scores, penalty = row[seen], params.repetition_penalty
    row[seen] = torch.where(scores < 0, scores * penalty, scores / penalty)
    toll = params.frequency_penalty * counts + params.presence_penalty
    row[torch.from_numpy(ids).to(row.device)] -= torch.from_numpy(toll).to(row)


def _mask(row: Tensor, packed: PackedMask) -> None:
    """Ids that the mask doesn't reach can't come either."""
    words = torch.from_numpy(packed.view(np.int32)).to(row.device)
    bits = words[:, None] >> torch.arange(32, dtype=torch.int32, device=row.device) & 1
    allowed = bits.flatten()[: row.shape[0]].bool()
    row[: allowed.shape[0]].masked_fill_(~allowed, _NEVER)
    row[allowed.shape[0] :] = _NEVER
