"""Rows for the tests of sampling: what a sequence with these parameters and ids asks of a step."""

from collections.abc import Mapping, Sequence

import torch

from app.engine.sampling.inputs import SampledToken, SamplingInput
from app.engine.sampling.sampler import sample
from app.engine.sampling.state import SamplingState
from app.engine.sampling.token_masks import PackedMask
from app.request import SamplingParams


def row(
    params: SamplingParams,
    position: int | None = None,
    prompt: Sequence[int] = (),
    generated: Sequence[int] = (),
    **settings: bool,
) -> SamplingInput:
    """The input of the token after `generated`; `position` is given where ids don't matter."""
    state = SamplingState(params, prompt)
    for token_id in generated:
        state.accept(token_id)
    return state.input(len(generated) if position is None else position, **settings)


def chosen(
    logits: torch.Tensor, inputs: Sequence[SamplingInput], masks: Mapping[int, PackedMask] | None = None
) -> tuple[SampledToken, ...]:
    """One step's tokens."""
    return sample(logits, inputs, masks or {}).tokens()
