"""The attention function that transformers models call: packed tokens over resident K/V.

Shapes: T packed tokens, H query heads, Hk kv heads, Q = H / Hk query heads per kv head, R rows
of one token, C context slots, D head width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from app.models.attention.step import AttentionStep, ChunkContext, GroupStep

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
    step: AttentionStep,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Write the step's keys and values, then attend per sequence. Returns `[1, T, H, Dv]`.

    All writes come before all reads, so a sequence may build on a prefix of the same step.
    """
    assert attention_mask is None, "masks come with the step"
    layer = int(module.layer_idx)  # type: ignore[arg-type]  # an attribute by transformers' convention
    cache = step.cache
    group = step.groups[cache.group_of_layer[layer]]
    cache.write(layer, group.write_slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
    kernel = _Kernel(scaling, softcap, s_aux)
    outputs: list[Tensor] = []
    if step.num_rows:
        outputs.append(_attend_rows(kernel, step, group, layer, query))
    for chunk in group.chunks:
        outputs.append(_attend_chunk(kernel, step, chunk, layer, query, key, value))
    return torch.cat(outputs).unsqueeze(0), None


def _attend_rows(
    kernel: "_Kernel", step: AttentionStep, group: GroupStep, layer: int, query: Tensor
) -> Tensor:
    """Rows of one token: query heads fold into the query axis, so K/V are read once per kv head."""
    keys, values = step.cache.read(layer, group.row_slots)  # [R, Hk, C, D]
    rows = query[0, :, : step.num_rows].transpose(0, 1)  # [R, H, D]
    folded = rows.reshape(step.num_rows, keys.shape[1], -1, rows.shape[-1])  # [R, Hk, Q, D]
    attended = kernel(folded, keys, values, group.row_mask, query_axis_is_heads=True)
    return attended.reshape(step.num_rows, rows.shape[1], -1)


def _attend_chunk(
    kernel: "_Kernel",
    step: AttentionStep,
    chunk: ChunkContext,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
) -> Tensor:
    if chunk.slots is None:
        keys, values = key[:, :, chunk.begin : chunk.end], value[:, :, chunk.begin : chunk.end]
    else:
        keys, values = (tensor.unsqueeze(0) for tensor in step.cache.read(layer, chunk.slots))
    attended = kernel(query[:, :, chunk.begin : chunk.end], keys, values, chunk.mask)  # [1, H, n, Dv]
    return attended[0].transpose(0, 1)


class _Kernel:
    """Softmax attention of one layer: fused where it can be, by hand for soft caps and sinks."""

    def __init__(self, scaling: float, softcap: float | None, sinks: Tensor | None) -> None:
        self._scaling = scaling
        self._softcap = softcap
        self._sinks = sinks  # [H]

    def __call__(
        self,
        query: Tensor,  # [B, H or Hk, n or Q, D]
        keys: Tensor,  # [B, Hk, C, D]
        values: Tensor,  # [B, Hk, C, Dv]
        mask: Tensor | None,
        *,
        query_axis_is_heads: bool = False,
    ) -> Tensor:
        causal = mask is None and not query_axis_is_heads
        if self._softcap is None and self._sinks is None:
            return functional.scaled_dot_product_attention(
                query,
                keys,
                values,
                attn_mask=mask,
                is_causal=causal,
                scale=self._scaling,
                enable_gqa=query.shape[1] != keys.shape[1],
            )
        return self._by_hand(query, keys, values, mask, causal, query_axis_is_heads)

    def _by_hand(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None,
        causal: bool,
        query_axis_is_heads: bool,
    ) -> Tensor:
        repeats = query.shape[1] // keys.shape[1]
        keys, values = (tensor.repeat_interleave(repeats, dim=1) for tensor in (keys, values))
        scores = (query @ keys.transpose(-1, -2)).float() * self._scaling
        if self._softcap is not None:
            scores = torch.tanh(scores / self._softcap) * self._softcap
        if causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        weights = self._softmax(scores, query_axis_is_heads)
        return weights.to(values.dtype) @ values

    def _softmax(self, scores: Tensor, query_axis_is_heads: bool) -> Tensor:
        if self._sinks is None:
            return scores.softmax(dim=-1)
        # A sink is one more key that takes weight and gives nothing (gpt-oss).
        heads, queries = scores.shape[1:3]
        shape = (1, heads, queries, 1) if query_axis_is_heads else (1, heads, 1, 1)
        sinks = self._sinks.float().view(shape).expand(*scores.shape[:-1], 1)
        return torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1]
