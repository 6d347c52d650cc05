"""Plain attention over prefixes and one sequence's own tokens: the reference for prefixes at every site.

No cache of transformers holds keys and values before an encoder's tokens, or positions that don't count
them. Nothing of the packed path is used here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from app.sites import Site

PREFIXED = "promptplex_prefixed"


def register_prefixed() -> None:
    """Make the implementation known to transformers."""
    AttentionInterface.register(PREFIXED, prefixed_attention)
    AttentionMaskInterface.register(PREFIXED, lambda *_, **__: None)


def prefixed_attention(
    module: nn.Module,
    query: Tensor,  # [1, H, n, D]
    key: Tensor,  # [1, H, n, D]
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    prefixes: Mapping[Site, Sequence[tuple[Tensor, Tensor]]],
    **_: Any,
) -> tuple[Tensor, None]:
    """Return `[1, n, H, Dv]`; every query sees all of a prefix."""
    site, layer = module.packed_layer  # type: ignore[misc]  # see packed.py
    if site in prefixes:
        before = prefixes[site][layer]
        key, value = (torch.cat(pair, dim=2) for pair in zip(before, (key, value), strict=True))
    scores = query @ key.transpose(2, 3) * scaling
    if site is Site.DECODER_SELF:
        own = query.shape[2]
        later = torch.ones(own, own, dtype=torch.bool, device=query.device).triu(1)
        scores[..., -own:].masked_fill_(later, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2), None
