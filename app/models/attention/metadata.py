"""What attention needs to know of one step. It travels as an argument of the forward pass.

All tokens of a step are one packed row of T tokens: first R rows of one token each (decoding
sequences), then chunks of several tokens (prefill). Legend: C context length in slots, n tokens
of a chunk, G kv groups.

"Slot index" counts a sequence's own slots from 0 (virtual tokens first), whatever the positions
are that the model sees: windows and causality are about slots (docs/architecture.md).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from app.models.attention.kv_cache import PADDING_SLOT, KVCache, KVGroup
from app.models.cpu.library import PackedContexts

Slots = NDArray[np.int64]

# Contexts up to 2 * _SHORT slots share a bucket; beyond that a bucket spans a factor of two.
_SHORT = 128


@dataclass(frozen=True, slots=True)
class PackedItem:
    """Tokens of one sequence in a step: `num_tokens` new ones after `num_computed` earlier.

    A group's slots are right-aligned: the device slots of the last `len(slots)` slot indices before
    `num_computed + num_tokens`. A window group may leave out what no token of the item can see.
    """

    num_computed: int
    num_tokens: int
    slots: tuple[Slots, ...]  # per group


@dataclass(frozen=True, slots=True)
class RowBucket:
    """Neighbouring rows of one token whose contexts are about equally long.

    Rows of all lengths in one padded batch would let a single long row cost as if all were long.
    """

    begin: int
    end: int
    slots: Tensor  # [rows, C], padded with the padding slot
    mask: Tensor | None  # [rows, 1, 1, C], additive; None: no padding


@dataclass(frozen=True, slots=True)
class ChunkContext:
    """A chunk's place in the packed row and what it attends to."""

    begin: int
    end: int
    slots: Tensor | None  # [C]; None: the chunk sees itself only, nothing to gather
    mask: Tensor | None  # [n, C] bool, True: attend; None: plain causal


class GroupStep:
    """One KV group's view of the step, laid out when the kernel at hand asks for it."""

    def __init__(
        self,
        cache: KVCache,
        group: KVGroup,
        number: int,
        rows: Sequence[PackedItem],
        chunks: Sequence[PackedItem],
    ) -> None:
        self.window = group.geometry.window
        self._cache = cache
        self._number = number
        self._rows = rows
        self._chunks = chunks
        written = [item.slots[number][-item.num_tokens :] for item in (*rows, *chunks)]
        self.write_slots = torch.from_numpy(np.concatenate(written)).to(cache.device)  # [T]

    @cached_property
    def rows(self) -> tuple[RowBucket, ...]:
        """Items of one token, in padded buckets."""
        visible = [_visible(item, self._number, self.window) for item in self._rows]
        return tuple(_bucket_rows(visible, self._cache))

    @cached_property
    def chunks(self) -> tuple[ChunkContext, ...]:
        """Items of several tokens."""
        begin = len(self._rows)
        contexts: list[ChunkContext] = []
        for item in self._chunks:
            contexts.append(_chunk_context(item, self._number, self.window, begin, self._cache.device))
            begin += item.num_tokens
        return tuple(contexts)

    @cached_property
    def contexts(self) -> PackedContexts:
        """All items, without padding."""
        items = (*self._rows, *self._chunks)
        visible = [_visible(item, self._number, self.window) for item in items]
        return PackedContexts(
            torch.from_numpy(np.concatenate(visible)),
            _begins([len(slots) for slots in visible]),
            _begins([item.num_tokens for item in items]),
        )


@dataclass(frozen=True, slots=True)
class AttentionStep:
    """The step's K/V cache and every group's view."""

    cache: KVCache
    groups: tuple[GroupStep, ...]


def build_step(cache: KVCache, items: Sequence[PackedItem]) -> AttentionStep:
    """Lay out a step. Items of one token come first, as they do in the packed row."""
    num_rows = sum(item.num_tokens == 1 for item in items)
    assert all(item.num_tokens == 1 for item in items[:num_rows]), "rows come before chunks"
    groups = tuple(
        GroupStep(cache, group, number, items[:num_rows], items[num_rows:])
        for number, group in enumerate(cache.groups)
    )
    return AttentionStep(cache, groups)


def _begins(lengths: Sequence[int]) -> Tensor:
    """Where each of consecutive parts begins, and where the last one ends."""
    return torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int64))


def _visible(item: PackedItem, group: int, window: int | None) -> Slots:
    """Return the device slots that any of the item's tokens may attend to."""
    count = item.num_computed + item.num_tokens
    if window is not None:
        count = min(count, item.num_tokens - 1 + window)
    slots = item.slots[group]
    assert len(slots) >= count, "a slot that can be seen is missing"
    return slots[len(slots) - count :]


def _bucket_rows(contexts: Sequence[Slots], cache: KVCache) -> Iterator[RowBucket]:
    begin = 0
    for _, same in groupby(contexts, key=lambda slots: max(len(slots) - 1, _SHORT).bit_length()):
        bucket = list(same)
        yield RowBucket(begin, begin + len(bucket), *_pad_rows(bucket, cache))
        begin += len(bucket)


def _pad_rows(contexts: Sequence[Slots], cache: KVCache) -> tuple[Tensor, Tensor | None]:
    longest = max(len(slots) for slots in contexts)
    padded = np.full((len(contexts), longest), PADDING_SLOT, dtype=np.int64)
    for row, slots in zip(padded, contexts, strict=True):
        row[: len(slots)] = slots
    mask = None
    if any(len(slots) != longest for slots in contexts):
        lengths = np.array([len(slots) for slots in contexts])
        hidden = torch.from_numpy(np.arange(longest) >= lengths[:, None])
        mask = torch.zeros(len(contexts), longest, dtype=cache.dtype).masked_fill_(hidden, float("-inf"))
        mask = mask[:, None, None, :].to(cache.device)
    return torch.from_numpy(padded).to(cache.device), mask


def _chunk_context(
    item: PackedItem, group: int, window: int | None, begin: int, device: torch.device
) -> ChunkContext:
    end = begin + item.num_tokens
    if item.num_computed == 0 and (window is None or item.num_tokens <= window):
        return ChunkContext(begin, end, None, None)
    visible = _visible(item, group, window)
    last = item.num_computed + item.num_tokens
    key_index = torch.arange(last - len(visible), last, device=device)
    query_index = torch.arange(item.num_computed, last, device=device)[:, None]
    mask = key_index <= query_index
    if window is not None:
        mask &= key_index > query_index - window
    return ChunkContext(begin, end, torch.from_numpy(visible).to(device), mask)
