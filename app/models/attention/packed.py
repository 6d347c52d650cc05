"""The attention function that transformers models call: it hands packed tokens to a backend.

Shapes: T packed tokens, H query heads, Hk kv heads, D key width, Dv value width.
"""

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from app.models.attention.metadata import StepMetadata
from app.sites import Site

IMPLEMENTATION = "promptplex"


def register() -> None:
    """Make the implementation known to transformers. Masks are ours, so its mask is none."""
    AttentionInterface.register(IMPLEMENTATION, packed_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, lambda *_, **__: None)


def packed_attention(
    module: nn.Module,
    query: Tensor,  # [1, H, T, D]
    key: Tensor,  # [1, Hk, T, D]
    value: Tensor,  # [1, Hk, T, Dv]
    attention_mask: Tensor | None,
    *,
    scaling: float,
    metadata: StepMetadata,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Write the step's keys and values, then attend per sequence. Return `[1, T, H, Dv]`.

    All writes come before all reads, so a sequence may build on a prefix of the same step.
    """
    assert attention_mask is None, "masks come with the step"
    layer = Site.DECODER_SELF, int(module.layer_idx)  # type: ignore[arg-type]  # set by transformers
    cache = metadata.cache
    group = metadata.groups[cache.group_of_layer[layer]]
    keys, values = key[0], value[0]
    cache.write(layer, group.write_slots, keys.transpose(0, 1), values.transpose(0, 1))
    attended = group.backend.forward(
        query[0],
        keys,
        values,
        cache.pools(layer),
        group.layout,
        scaling=scaling,
        softcap=softcap,
        sinks=s_aux,
    )
    return attended.unsqueeze(0), None
