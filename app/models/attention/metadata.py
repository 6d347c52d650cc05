"""What a forward pass needs to know of its step. It travels as an argument through the model.

All tokens of a step are one packed row of T tokens: first rows of one token each (decoding sequences),
then chunks of several tokens (prefill). An encoder reads the step's sources as a packed row of S rows.

"Slot index" counts a sequence's own slots from 0 (virtual tokens first), whatever the positions
are that the model sees: windows and causality are about slots (docs/architecture.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from app.models.attention.backend import AttentionBackend, Context, Head
from app.models.attention.kv_cache import PADDING_SLOT, KVCache, KVGroup, Slots
from app.models.transfer import to_device
from app.sites import Site


class PackedItem(NamedTuple):
    """Tokens of one sequence in a step: `num_tokens` new ones after `num_computed` earlier.

    A group's slots are right-aligned: the device slots of the last `len(slots)` slot indices before
    `num_computed + num_tokens`. A window group may leave out what no token of the item can see.
    """

    num_computed: int
    num_tokens: int
    slots: tuple[Slots, ...]  # per group of decoder self-attention, then per group of cross-attention
    heads: tuple[
        Head, ...
    ] = ()  # slots of self-attention that other items begin with too, where all are named


@dataclass(frozen=True, slots=True)
class PackedSource:
    """The whole input of one encoder pass: `num_tokens` rows, which all see each other."""

    num_tokens: int
    # Per group of cross-attention: where its keys and values go, [num_tokens].
    cross_slots: tuple[Slots, ...]
    # Per group of the encoder's self-attention: a resident prefix before it. Empty: there is none.
    prefix_slots: tuple[Slots, ...] = ()


@dataclass(frozen=True, slots=True)
class GroupMetadata:
    """One KV group's view of the step."""

    backend: AttentionBackend[Any]
    layout: Any  # what the backend's `plan` returned; None: no layer of the group runs in this step
    write_slots: Tensor | None  # where keys and values go, those of T tokens or of S rows; None: nowhere
    prefix_slots: Tensor | None = None  # [P], in an encoder: what stands in its pools before the step's rows


@dataclass(frozen=True, slots=True)
class StepMetadata:
    """One step: its K/V cache, every group's view, and the tokens with wanted logits."""

    cache: KVCache
    groups: tuple[GroupMetadata, ...]
    logit_rows: Tensor  # [N], indices into the packed row
    source_positions: Tensor | None = None  # [S]; None: no source is encoded in this step


@dataclass(frozen=True, slots=True)
class _Step:
    """What the views of all groups are made from."""

    items: Sequence[PackedItem]
    sources: Sequence[PackedSource]
    groups: Sequence[KVGroup]
    device: torch.device

    def view(self, number: int, backend: AttentionBackend[Any]) -> GroupMetadata:
        group = self.groups[number]
        if group.site is Site.DECODER_SELF:
            return self._of_tokens(number, backend)
        numbers = [at for at, each in enumerate(self.groups) if each.site is group.site]
        if group.site is Site.DECODER_CROSS:
            return self._of_cross(number, numbers.index(number), backend)
        return self._of_encoder(numbers.index(number), backend)

    def _of_tokens(self, number: int, backend: AttentionBackend[Any]) -> GroupMetadata:
        written = [item.slots[number][-item.num_tokens :] for item in self.items]
        layout = backend.plan(contexts_of(self.items, number, self.groups[number]))
        return GroupMetadata(backend, layout, self._to_device(written))

    def _of_cross(self, number: int, place: int, backend: AttentionBackend[Any]) -> GroupMetadata:
        written = [source.cross_slots[place] for source in self.sources]
        layout = backend.plan(contexts_of(self.items, number, self.groups[number]))
        return GroupMetadata(backend, layout, self._to_device(written) if written else None)

    def _of_encoder(self, place: int, backend: AttentionBackend[Any]) -> GroupMetadata:
        """Lay out sources over pools of the step: rows of prefixes, each once, then the step's own.

        With prefixes, which make rows of one token unequal, the padding slot comes first, as in the cache.
        """
        if not self.sources:
            return GroupMetadata(backend, None, None)
        none = np.empty(0, np.int64)
        prefixes = [source.prefix_slots[place] if source.prefix_slots else none for source in self.sources]
        padding = np.full(int(any(map(len, prefixes))), PADDING_SLOT)
        gathered, places = np.unique(np.concatenate([padding, *prefixes]), return_inverse=True)
        contexts, seen, begin = [], len(padding), len(gathered)
        for source, prefix in zip(self.sources, prefixes, strict=True):
            own = np.arange(begin, begin + source.num_tokens)
            before = places[seen : seen + len(prefix)]
            contexts.append(Context(source.num_tokens, np.concatenate([before, own])))
            seen, begin = seen + len(prefix), begin + source.num_tokens
        prefix_slots = self._to_device([gathered]) if len(gathered) else None
        return GroupMetadata(backend, backend.plan(contexts), None, prefix_slots)

    def _to_device(self, parts: Sequence[Slots]) -> Tensor:
        return to_device(np.concatenate(parts), self.device)


def plan_step(
    cache: KVCache,
    backends: Sequence[AttentionBackend[Any]],  # per group
    items: Sequence[PackedItem],
    logit_rows: NDArray[np.int64],  # [N]
    sources: Sequence[PackedSource] = (),
) -> StepMetadata:
    """Build all tensors of a step. Items of one token come first, as they do in the packed row."""
    counts = [item.num_tokens for item in items]
    assert 1 not in counts[counts.count(1) :], "rows come before chunks"
    step = _Step(items, sources, cache.groups, cache.device)
    positions = None
    if sources:
        positions = to_device(
            np.concatenate([np.arange(source.num_tokens) for source in sources]), cache.device
        )
    return StepMetadata(
        cache,
        tuple([step.view(number, backend) for number, backend in enumerate(backends)]),
        to_device(logit_rows, cache.device),
        positions,
    )


def contexts_of(items: Sequence[PackedItem], number: int, group: KVGroup) -> list[Context]:
    """Return what each item's tokens attend to in a group of the decoder; `number`: the group's own."""
    if group.site is Site.DECODER_CROSS:
        return [Context(item.num_tokens, item.slots[number], has_own=False) for item in items]
    return [_context(item, number, group.geometry.window) for item in items]


def _context(item: PackedItem, group: int, window: int | None) -> Context:
    """Return the slots that the item's first token may attend to, or any later one."""
    count = end = item.num_computed + item.num_tokens
    if window is not None:
        count = min(count, item.num_tokens - 1 + window)
    slots = item.slots[group]
    num_hidden = len(slots) - count
    assert num_hidden >= 0, "a slot that can be seen is missing"
    if num_hidden:
        return Context(item.num_tokens, slots[num_hidden:])
    return Context(item.num_tokens, slots, heads=item.heads if count == end else ())
