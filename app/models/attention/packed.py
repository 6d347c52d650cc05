"""The attention function that transformers models call: it hands packed tokens to a backend.

Shapes: T packed tokens (S in an encoder), H query heads, Hk kv heads, D key width, Dv value width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

from app.models.attention.kv_cache import KVCache, Layer
from app.models.attention.metadata import GroupMetadata, StepMetadata
from app.sites import Site

IMPLEMENTATION = "promptplex"


def register() -> None:
    """Make the implementation known to transformers, without a mask: for one it would look at positions."""
    AttentionInterface.register(IMPLEMENTATION, packed_attention)


def place_layer(module: nn.Module, layer: Layer) -> None:
    """Note which layer of which site a module is; the attention function gets the module alone."""
    module.packed_layer = layer  # type: ignore[assignment]  # a plain attribute, which is copied with the module


def packed_attention(
    module: nn.Module,
    query: Tensor,  # [1, H, T, D]
    key: Tensor,  # [1, Hk, T, D]; in cross-attention of the step's new sources, if there are any
    value: Tensor,  # [1, Hk, T, Dv]
    attention_mask: Tensor | None,
    *,
    scaling: float,
    metadata: StepMetadata,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Write the step's keys and values, then attend per sequence. Return `[1, T, H, Dv]`.

    All writes come before all reads, so a sequence may build on a prefix of the same step.
    """
    assert attention_mask is None, "masks come with the step"
    layer: Layer = module.packed_layer  # type: ignore[assignment]  # see `place_layer`
    cache = metadata.cache
    group = metadata.groups[cache.group_of_layer[layer]]
    keys, values = key[0], value[0]
    if group.write_slots is not None:
        cache.write(layer, group.write_slots, keys.transpose(0, 1), values.transpose(0, 1))
    is_encoder = layer[0] is Site.ENCODER_SELF
    attended = group.backend.forward(
        query[0],
        keys,
        values,
        _pools_of_step(cache, layer, group, keys, values) if is_encoder else cache.pools(layer),
        group.layout,
        scaling=scaling,
        softcap=softcap,
        sinks=s_aux,
        position_bias=position_bias,
    )
    return attended.unsqueeze(0), None


def _pools_of_step(
    cache: KVCache, layer: Layer, group: GroupMetadata, keys: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what an encoder's rows see, which no later step reads: rows of prefixes, then their own."""
    own_keys, own_values = (rows.transpose(0, 1).flatten(1) for rows in (keys, values))  # [S, Hk * D]
    if group.prefix_slots is None:
        return own_keys, own_values
    prefix_keys, prefix_values = (
        functional.embedding(group.prefix_slots, pool) for pool in cache.pools(layer)
    )
    return torch.cat([prefix_keys, own_keys]), torch.cat([prefix_values, own_values])
