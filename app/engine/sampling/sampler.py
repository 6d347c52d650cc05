"""The sampler: from logits to tokens, in native code where this machine has it.

Shapes: N rows, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from app.engine.sampling import torch_sampler
from app.engine.sampling.inputs import Sampled, SampledToken, SamplingInput
from app.engine.sampling.native_sampler import NativeSampler, native_sampler_for
from app.engine.sampling.token_masks import PackedMask
from app.models.transfer import from_device, to_device
from app.request import TokenScore


def sample(logits: Tensor, inputs: Sequence[SamplingInput], masks: Mapping[int, PackedMask]) -> Sampled:
    """Choose the next token of every row of `logits [N, V]` (floating point), which stay as they are.

    `masks` are those of constrained rows, by row; one that lacks its mask is reported as late. Reported
    log-probabilities are the model's own, before any change. A row with NaN or positive infinity is reported
    as not finite, and one in which no token may come has an error; others are unaffected.
    """
    native = native_sampler_for(logits)
    if native is None:
        return torch_sampler.launch(logits.float(), inputs, masks)
    tokens = _sample_natively(native, logits, inputs, masks)
    ids = torch.tensor([token.token_id for token in tokens], device=logits.device)
    return Sampled(ids, lambda: tokens)


def _sample_natively(
    native: NativeSampler,
    logits: Tensor,
    inputs: Sequence[SamplingInput],
    masks: Mapping[int, PackedMask],
) -> tuple[SampledToken, ...]:
    tokens = native.sample(logits, inputs, masks)
    rest = [row for row, token in enumerate(tokens) if token is None]
    if rest:
        given = {place: masks[row] for place, row in enumerate(rest) if row in masks}
        left = torch_sampler.sample(logits[rest].float(), [inputs[row] for row in rest], given)
        for row, token in zip(rest, left, strict=True):
            tokens[row] = token
    return tuple(token for token in tokens if token is not None)


def score_tokens(
    logits: Tensor, token_ids: Sequence[int], num_top: int
) -> Callable[[], tuple[TokenScore, ...]]:
    """Find how probable each of `token_ids` (N) is under its row of `logits [N, V]`.

    The returned function waits for the device. NaN where the row has NaN.
    """
    logprobs = logits.float().log_softmax(dim=-1)
    ids = to_device(np.array(token_ids), logits.device)
    own = logprobs.gather(1, ids[:, None]).squeeze(1)
    copied = from_device([own, torch_sampler.most_probable(logprobs, num_top)])

    def scores() -> tuple[TokenScore, ...]:
        own, top = copied()
        return tuple(map(TokenScore, token_ids, own.tolist(), torch_sampler.top_of(top)))

    return scores
