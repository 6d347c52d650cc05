"""Plain attention over prefixes and tokens, batched and differentiable: for training and the probe.

No cache of transformers holds keys and values before an encoder's tokens, or positions that don't count
them. Nothing of the packed path is used here. B sequences of n tokens (k keys), p slots of a prefix, H heads,
Hk of keys and values, D and Dv their widths.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from app.sites import Site

PREFIXED = "promptplex_prefixed"
Prefixes = Mapping[Site, Sequence[tuple[Tensor, Tensor]]]  # per layer, [1, Hk, p, D] and [1, Hk, p, Dv]
Seen = dict[tuple[Site, int], tuple[Tensor, Tensor]]  # keys and values [B, Hk, k, D] of each layer


def register_prefixed() -> None:
    """Make the implementation known to transformers."""
    AttentionInterface.register(PREFIXED, prefixed_attention)
    AttentionMaskInterface.register(PREFIXED, sdpa_mask)


def prefixed_attention(
    module: nn.Module,
    query: Tensor,  # [B, H, n, D]
    key: Tensor,  # [B, Hk, k, D]
    value: Tensor,
    attention_mask: Tensor | None,  # [B, 1, n, k] bool: the keys that are seen; None: all, or those before
    *,
    prefixes: Prefixes | None = None,
    seen: Seen | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return `[B, n, H, Dv]`; every query sees all of a prefix. `seen` gets what it sees without one."""
    site, layer = module.packed_layer  # type: ignore[misc]  # see packed.py
    if seen is not None:
        seen[site, layer] = key, value
    if prefixes and site in prefixes:
        before = [side.expand(len(key), -1, -1, -1) for side in prefixes[site][layer]]
        own = key.shape[2]
        key, value = (torch.cat(pair, dim=2) for pair in zip(before, (key, value), strict=True))
        if attention_mask is None and site is Site.DECODER_SELF:
            attention_mask = torch.ones(1, 1, own, own, dtype=torch.bool, device=key.device).tril()
        attention_mask, position_bias = (
            each if each is None else functional.pad(each, (key.shape[2] - own, 0), value=fill)
            for each, fill in ((attention_mask, True), (position_bias, 0.0))
        )
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, position_bias=position_bias, **kwargs
    )
