"""The attention function that transformers models call: packed tokens over resident K/V.

Shapes: B batch, T packed tokens, H query heads, Hk kv heads, Q = H / Hk query heads per kv head,
R rows of one token, n tokens of a chunk, C context slots, D head width (Dv of values).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from app.models.attention.kv_cache import KVCache
from app.models.attention.metadata import AttentionStep, ChunkContext, RowBucket

IMPLEMENTATION = "promptplex"

# Attention scores that are held at once where they are computed by hand (float32: 64 MiB).
_MAX_SCORES = 1 << 24


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
    if cache.kernels is not None and softcap is None and s_aux is None and _suits(cache, query, key, value):
        keys, values = cache.pools(layer)
        attended = cache.kernels.attention(
            query[0],
            keys,
            values,
            group.contexts,
            num_kv_heads=key.shape[1],
            window=group.window,
            scaling=scaling,
        )
        return attended.unsqueeze(0), None
    kernel = _Kernel(scaling, softcap, s_aux)
    outputs = [_attend_rows(kernel, step, bucket, layer, query) for bucket in group.rows]
    outputs += [_attend_chunk(kernel, step, chunk, layer, query, key, value) for chunk in group.chunks]
    return torch.cat(outputs).unsqueeze(0), None


def _suits(cache: KVCache, query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether our own kernel takes these shapes."""
    assert cache.kernels is not None
    sizes = (query.shape[1], key.shape[1], query.shape[3], value.shape[3])
    return query.stride(3) == 1 and cache.kernels.can_attend(*sizes)


def _attend_rows(
    kernel: "_Kernel", step: AttentionStep, bucket: RowBucket, layer: int, query: Tensor
) -> Tensor:
    keys, values = step.cache.read(layer, bucket.slots)  # [R, Hk, C, D]
    rows = query[0, :, bucket.begin : bucket.end].transpose(0, 1).unsqueeze(2)  # [R, H, 1, D]
    return kernel(rows, keys, values, bucket.mask).squeeze(2)


def _attend_chunk(
    kernel: "_Kernel",
    step: AttentionStep,
    chunk: ChunkContext,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
) -> Tensor:
    tokens = slice(chunk.begin, chunk.end)
    if chunk.slots is None:
        keys, values = key[:, :, tokens], value[:, :, tokens]
    else:
        keys, values = (tensor.unsqueeze(0) for tensor in step.cache.read(layer, chunk.slots))
    attended = kernel(query[:, :, tokens], keys, values, chunk.mask)  # [1, H, n, Dv]
    return attended[0].transpose(0, 1)


class _Kernel:
    """Softmax attention of one layer: fused where it can be, by hand for soft caps and sinks."""

    def __init__(self, scaling: float, softcap: float | None, sinks: Tensor | None) -> None:
        self._scaling = scaling
        self._softcap = softcap
        self._sinks = sinks  # [H]

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """`query [B, H, n, D]`, `keys [B, Hk, C, D]`, `values [B, Hk, C, Dv]` -> `[B, H, n, Dv]`.

        `mask` broadcasts to `[B, 1, n, C]`, additive or bool; None means causal for n > 1, and for
        n = 1 that everything is seen.
        """
        if self._softcap is not None or self._sinks is not None:
            blocks = self._query_blocks(query, keys)
            return torch.cat([self._by_hand(query, keys, values, mask, block) for block in blocks], dim=2)
        is_row = query.shape[2] == 1
        if is_row:  # query heads fold into the query axis, so K/V are read once per kv head
            query = query.view(query.shape[0], keys.shape[1], -1, query.shape[3])
        attended = functional.scaled_dot_product_attention(
            query,
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None and not is_row,
            scale=self._scaling,
            enable_gqa=query.shape[1] != keys.shape[1],
        )
        return attended.reshape(attended.shape[0], -1, 1, attended.shape[3]) if is_row else attended

    @staticmethod
    def _query_blocks(query: Tensor, keys: Tensor) -> Iterator[slice]:
        """Cut the queries so that a block's scores stay small, however long the context is."""
        per_query = query.shape[0] * query.shape[1] * keys.shape[2]
        size = max(1, _MAX_SCORES // per_query)
        for begin in range(0, query.shape[2], size):
            yield slice(begin, min(begin + size, query.shape[2]))

    def _by_hand(
        self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, block: slice
    ) -> Tensor:
        batch, heads, _, width = query.shape
        kv_heads, context = keys.shape[1:3]
        count = block.stop - block.start
        folded = query[:, :, block].reshape(batch, kv_heads, -1, width)  # [B, Hk, Q * n, D]
        scores = (folded @ keys.transpose(-1, -2)).float() * self._scaling
        scores = scores.view(batch, heads, count, context)
        if self._softcap is not None:
            scores = torch.tanh(scores / self._softcap) * self._softcap
        visible = _block_of(mask, query.shape[2], context, block, scores.device)
        if visible is not None:
            is_bool = visible.dtype == torch.bool
            scores = scores.masked_fill(~visible, float("-inf")) if is_bool else scores + visible
        weights = self._softmax(scores).to(values.dtype)
        attended = weights.view(batch, kv_heads, -1, context) @ values
        return attended.view(batch, heads, count, -1)

    def _softmax(self, scores: Tensor) -> Tensor:
        if self._sinks is None:
            return scores.softmax(dim=-1)
        # A sink is one more key that takes weight and gives nothing (gpt-oss).
        sinks = self._sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        return torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1]


def _block_of(
    mask: Tensor | None, num_queries: int, context: int, block: slice, device: torch.device
) -> Tensor | None:
    """A block's rows of the mask; where there is none, of the causal one."""
    if num_queries == 1:
        return mask
    if mask is not None:
        return mask[block]
    queries = torch.arange(block.start, block.stop, device=device)[:, None]
    return torch.arange(context, device=device) <= queries
