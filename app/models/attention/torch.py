"""Attention by torch, on every device and in every dtype: the reference for other backends.

Rows of one token are attended to in padded buckets of like length, chunks one by one. Shapes: H query
heads, Hk kv heads, R rows of one token, n tokens of a chunk, C context slots, D key width, Dv value width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from app.models.attention.backend import Context
from app.models.attention.kv_cache import PADDING_SLOT, Slots
from app.models.attention.position_bias import ChunkDistances, RowDistances
from app.models.transfer import tensor_to_device, to_device
from app.prompt import LayerGeometry

# Contexts up to 2 * _SHORT slots share a bucket; beyond that a bucket spans a factor of two.
_SHORT = 128
# Attention scores that are held at once where they are computed by hand (float32: 64 MiB).
_MAX_SCORES = 1 << 24


@dataclass(frozen=True, slots=True)
class RowBucket:
    """Neighbouring rows of one token with contexts of about equal length.

    Rows of all lengths in one padded batch would let a single long row cost as if all were long.
    """

    tokens: slice  # of the packed row
    slots: Tensor  # [R, C], padded with the padding slot
    mask: Tensor | None  # [R, 1, 1, C], additive; None: no padding
    distances: RowDistances | None = None  # where scores get a position bias


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk's place in the packed row and what it attends to."""

    tokens: slice
    slots: Tensor | None  # [1, C]; None: the chunk sees itself only, nothing to gather
    mask: Tensor | None  # [n, C] bool, True: attend; None: plain causal, or everything
    distances: ChunkDistances | None = None  # where scores get a position bias; they hide what a mask would


@dataclass(frozen=True, slots=True)
class TorchLayout:
    """A step's contexts: rows first."""

    rows: tuple[RowBucket, ...]
    chunks: tuple[Chunk, ...]


class TorchBackend:
    """Softmax attention: fused where torch has it, by hand for soft caps and sinks."""

    def __init__(self, geometry: LayerGeometry, dtype: torch.dtype, device: torch.device) -> None:
        self._num_kv_heads = geometry.num_kv_heads
        self._window = geometry.window
        self._is_causal = geometry.is_causal
        self._has_position_bias = geometry.has_position_bias
        self._is_fused = geometry.softcap is None and not geometry.has_sinks
        assert self._is_fused or not self._has_position_bias, "refused when geometry was recorded"
        self._dtype = dtype
        self._device = device

    @staticmethod
    def supports(geometry: LayerGeometry, dtype: torch.dtype, device: torch.device) -> bool:
        """Return True: torch attends on every device."""
        return True

    def plan(self, contexts: Sequence[Context]) -> TorchLayout:
        """Pad rows in buckets, and lay out masks of chunks."""
        first = [context.slots for context in takewhile(lambda each: each.num_tokens == 1, contexts)]
        rows = tuple(self._buckets(first))
        return TorchLayout(rows, tuple(self._chunks(contexts[len(first) :], len(first))))

    def _buckets(self, contexts: Sequence[Slots]) -> Iterator[RowBucket]:
        begin = 0
        for _, same in groupby(contexts, key=lambda slots: max(len(slots) - 1, _SHORT).bit_length()):
            bucket = list(same)
            yield RowBucket(slice(begin, begin + len(bucket)), *self._pad(bucket))
            begin += len(bucket)

    def _pad(self, contexts: Sequence[Slots]) -> tuple[Tensor, Tensor | None, RowDistances | None]:
        lengths = np.array([len(slots) for slots in contexts])
        padded = np.full((len(contexts), lengths.max()), PADDING_SLOT, dtype=np.int64)
        for row, slots in zip(padded, contexts, strict=True):
            row[: len(slots)] = slots
        mask = None
        hidden = np.arange(padded.shape[1]) >= lengths[:, None]
        if hidden.any():
            mask = torch.zeros(padded.shape, dtype=self._dtype)
            mask.masked_fill_(torch.from_numpy(hidden), float("-inf"))
            mask = tensor_to_device(mask[:, None, None, :], self._device)
        distances = None
        if self._has_position_bias:
            distances = RowDistances.of(to_device(lengths, self._device), padded.shape[1])
        return to_device(padded, self._device), mask, distances

    def _chunks(self, contexts: Sequence[Context], begin: int) -> Iterator[Chunk]:
        for num_tokens, slots, has_own, _ in contexts:
            tokens = slice(begin, begin + num_tokens)
            sees_itself = has_own and num_tokens == len(slots)
            gathered = None if sees_itself else to_device(slots, self._device).unsqueeze(0)
            if self._has_position_bias:
                yield Chunk(tokens, gathered, None, self._distances(num_tokens, len(slots)))
            else:
                is_plain = sees_itself and (self._window is None or num_tokens <= self._window)
                is_seen = not self._is_causal or (is_plain and self._is_fused)
                yield Chunk(tokens, gathered, None if is_seen else self._mask(num_tokens, len(slots)))
            begin = tokens.stop

    def _distances(self, num_tokens: int, context: int) -> ChunkDistances:
        return ChunkDistances.of(
            num_tokens, context, is_causal=self._is_causal, window=self._window, device=self._device
        )

    def _mask(self, num_tokens: int, context: int) -> Tensor:
        """Return which of `context` slots each of the last `num_tokens` sees, `[n, C]`."""
        keys = torch.arange(context, device=self._device)
        queries = torch.arange(context - num_tokens, context, device=self._device)[:, None]
        mask = keys <= queries
        if self._window is not None:
            mask &= keys > queries - self._window
        return mask

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pools: tuple[Tensor, Tensor],
        layout: TorchLayout,
        *,
        scaling: float,
        softcap: float | None,
        sinks: Tensor | None,
        position_bias: Tensor | None,
    ) -> Tensor:
        """Return attention `[T, H, Dv]`; the shapes are those of `AttentionBackend.forward`."""
        kernel = _Kernel(scaling, softcap, sinks, is_causal=self._is_causal)
        outputs = []
        for bucket in layout.rows:
            rows = query[:, bucket.tokens].transpose(0, 1).unsqueeze(2)  # [R, H, 1, D]
            keys, values = (self._gather(pool, bucket.slots) for pool in pools)
            outputs.append(kernel(rows, keys, values, self._row_mask(bucket, position_bias)).squeeze(2))
        for chunk in layout.chunks:
            if chunk.slots is None:
                keys, values = key[None, :, chunk.tokens], value[None, :, chunk.tokens]
            else:
                keys, values = (self._gather(pool, chunk.slots) for pool in pools)
            queries = query[None, :, chunk.tokens]
            if chunk.distances is None:
                attended = kernel(queries, keys, values, chunk.mask)  # [1, H, n, Dv]
            else:
                assert position_bias is not None
                blocks = chunk.distances.blocks(position_bias)
                parts = [kernel(queries[:, :, block], keys, values, mask) for block, mask in blocks]
                attended = torch.cat(parts, dim=2)
            outputs.append(attended[0].transpose(0, 1))
        return torch.cat(outputs)

    def _row_mask(self, bucket: RowBucket, position_bias: Tensor | None) -> Tensor | None:
        if bucket.distances is None:
            return bucket.mask
        assert position_bias is not None
        biases = bucket.distances.biases(position_bias)
        return biases if bucket.mask is None else biases + bucket.mask

    def _gather(self, pool: Tensor, slots: Tensor) -> Tensor:
        """Return the numbers at `slots [B, C]` as `[B, Hk, C, D]`.

        A slot's row is contiguous, so a gather is one `embedding` call (on CPUs many times faster than
        advanced indexing).
        """
        rows = functional.embedding(slots, pool)
        return rows.view(*slots.shape, self._num_kv_heads, -1).transpose(1, 2)


class _Kernel:
    """Softmax attention of one layer."""

    def __init__(
        self, scaling: float, softcap: float | None, sinks: Tensor | None, *, is_causal: bool
    ) -> None:
        self._scaling = scaling
        self._is_causal = is_causal
        self._softcap = softcap
        self._sinks = sinks  # [H]

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """Return `[B, H, n, Dv]` for `query [B, H, n, D]`, `keys [B, Hk, C, D]`, `values [B, Hk, C, Dv]`.

        `mask` broadcasts to `[B, H, n, C]`, additive or bool. None means that everything is seen by rows,
        n = 1, and where attention is not causal; else, where caps and sinks always come with a mask, it
        means causal.
        """
        if self._softcap is not None or self._sinks is not None:
            blocks = self._query_blocks(query, keys)
            return torch.cat([self._by_hand(query, keys, values, mask, block) for block in blocks], dim=2)
        is_row = query.shape[2] == 1
        if is_row:  # query heads fold into the query axis, so K/V are read once per kv head
            query = query.view(query.shape[0], keys.shape[1], -1, query.shape[3])
            if mask is not None and mask.shape[1] > 1:
                mask = mask.reshape(query.shape[0], *query.shape[1:3], mask.shape[3])
        attended = functional.scaled_dot_product_attention(
            query,
            keys,
            values,
            attn_mask=mask,
            is_causal=self._is_causal and mask is None and not is_row,
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
        batch, heads, num_queries, width = query.shape
        kv_heads, context = keys.shape[1:3]
        count = block.stop - block.start
        folded = query[:, :, block].reshape(batch, kv_heads, -1, width)  # [B, Hk, Q * n, D]
        scores = (folded @ keys.transpose(-1, -2)).float() * self._scaling
        scores = scores.view(batch, heads, count, context)
        if self._softcap is not None:
            scores = torch.tanh(scores / self._softcap) * self._softcap
        if mask is not None:
            is_chunk = num_queries > 1
            scores = scores.masked_fill(~mask[block], float("-inf")) if is_chunk else scores + mask
        weights = self._softmax(scores).to(values.dtype)
        attended = weights.view(batch, kv_heads, -1, context) @ values
        return attended.view(batch, heads, count, -1)

    def _softmax(self, scores: Tensor) -> Tensor:
        if self._sinks is None:
            return scores.softmax(dim=-1)
        # A sink is one more key that takes weight and gives nothing (gpt-oss).
        sinks = self._sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        return torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1]
