"""What a request does to its row's logits before a token is chosen: bias, penalties, rules, a grammar's mask.

Shapes: N rows, of which R ask for something; V vocabulary. The others stay as they are.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from app.engine.plan import SamplingInput
from app.engine.sampling.token_masks import PackedMask
from app.engine.sampling.token_rules import adjust_row
from app.errors import ConstraintFailed, PromptplexError
from app.request import BAN, SamplingParams

# For all masks of a step together. Whoever shares the step waits as long; whose mask is late, much longer.
MASK_SECONDS = 0.02
_NEVER = float("-inf")


@dataclass(frozen=True, slots=True)
class Adjusted:
    """Logits to choose from, where a row asked for a change."""

    rows: dict[int, int]  # which rows, and where each stands in:
    logits: Tensor  # [R, V]; those of failed and late rows mean nothing
    failures: dict[int, PromptplexError] = field(default_factory=dict)  # nothing may be chosen, and why
    late: set[int] = field(default_factory=set)  # what may be chosen isn't known yet

    def choice_of(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        """A copy of what `rows` choose from: their own `logits [N, V]`, adjusted where they asked for it."""
        taken = logits[rows]
        mine = [place for place, row in enumerate(rows) if row in self.rows]
        if mine:
            taken[mine] = self.logits[[self.rows[rows[place]] for place in mine]]
        return taken


def adjust(logits: Tensor, inputs: Sequence[SamplingInput]) -> Adjusted:
    """What is asked of `logits [N, V]`, which are left alone themselves."""
    asking = [row for row, given in enumerate(inputs) if _asks(given)]
    adjusted = Adjusted({row: place for place, row in enumerate(asking)}, logits[asking])
    if asking:
        asked = [inputs[row] for row in asking]
        _bias(adjusted.logits, [given.params for given in asked])
        for row, given in zip(adjusted.logits, asked, strict=True):
            adjust_row(row, given)
        _constrain(adjusted, inputs)
    return adjusted


def _asks(given: SamplingInput) -> bool:
    params = given.params
    bound = params.rules is not None or given.constraint is not None
    return bound or params.has_penalty or bool(params.logit_bias)


def _may_be_left_with_nothing(given: SamplingInput) -> bool:
    return given.params.rules is not None or bool(given.params.logit_bias)


def _bias(logits: Tensor, asked: Sequence[SamplingParams]) -> None:
    """In place, all rows at once; each names an id only once."""
    biases = [(row, id_, value) for row, params in enumerate(asked) for id_, value in params.logit_bias]
    if biases:
        rows, ids, values = zip(*biases, strict=True)
        bias = torch.tensor([_NEVER if value <= BAN else value for value in values])
        places = torch.tensor([rows, ids], device=logits.device)
        logits[places[0], places[1]] += bias.to(logits)


def _constrain(adjusted: Adjusted, inputs: Sequence[SamplingInput]) -> None:
    """In place; and find the rows that fail, or are late."""
    masks = _masks(adjusted, inputs)
    if masks:
        _mask(adjusted.logits, {adjusted.rows[row]: mask for row, mask in masks.items()})
    limited = [row for row in adjusted.rows if row in masks or _may_be_left_with_nothing(inputs[row])]
    if limited:
        highest = adjusted.logits[[adjusted.rows[row] for row in limited]].amax(dim=-1).tolist()
        for row, value in zip(limited, highest, strict=True):
            if value == _NEVER:
                adjusted.failures[row] = _nothing_left()


def _masks(adjusted: Adjusted, inputs: Sequence[SamplingInput]) -> dict[int, PackedMask]:
    """What each constrained row may say, as far as it is known in time."""
    masks: dict[int, PackedMask] = {}
    end = time.monotonic() + MASK_SECONDS
    for row in adjusted.rows:
        constraint = inputs[row].constraint
        if constraint is None:
            continue
        try:
            mask = constraint.mask(max(0.0, end - time.monotonic()))
        except PromptplexError as error:
            adjusted.failures[row] = error
        else:
            if mask is None:
                adjusted.late.add(row)
            else:
                masks[row] = mask
    return masks


def _nothing_left() -> PromptplexError:
    return ConstraintFailed(
        "no token may come next: the grammar, logit_bias, or a rule such as bad_words or min_new_tokens "
        "leaves only tokens that are banned, or that the model can't produce; loosen one of them"
    )


def _mask(logits: Tensor, masks: Mapping[int, PackedMask]) -> None:
    """In place; unpacked where the logits are. Ids that a mask doesn't reach can't come either."""
    rows = list(masks)
    packed = torch.from_numpy(np.stack(list(masks.values())).view(np.uint8)).to(logits.device)
    bits = torch.arange(8, dtype=torch.uint8, device=logits.device)
    allowed = ((packed[:, :, None] >> bits) & 1).flatten(1).bool()  # [rows, ceil(V / 32) * 32]
    allowed = functional.pad(allowed, (0, logits.shape[1] - allowed.shape[1]))
    logits[rows] = logits[rows].masked_fill(~allowed, _NEVER)
