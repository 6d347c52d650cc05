"""What a forward pass needs to know of its step. It travels as an argument through the model.

All tokens of a step are one packed row of T tokens: first rows of one token each (decoding sequences),
then chunks of several tokens (prefill).

"Slot index" counts a sequence's own slots from 0 (virtual tokens first), whatever the positions
are that the model sees: windows and causality are about slots (docs/architecture.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from app.models.attention.backend import AttentionBackend, Context
from app.models.attention.kv_cache import KVCache, Slots


@dataclass(frozen=True, slots=True)
class PackedItem:
    """Tokens of one sequence in a step: `num_tokens` new ones after `num_computed` earlier.

    A group's slots are right-aligned: the device slots of the last `len(slots)` slot indices before
    `num_computed + num_tokens`. A window group may leave out what no token of the item can see.
    """

    num_computed: int
    num_tokens: int
    slots: tuple[Slots, ...]  # per group of decoder self-attention, then per group of cross-attention


@dataclass(frozen=True, slots=True)
class PackedSource:
    """The whole input of one encoder pass: `num_tokens` rows, which all see each other."""

    num_tokens: int
    cross_slots: tuple[
        Slots, ...
    ]  # per group of cross-attention: where its keys and values go, `[num_tokens]`
    prefix_slots: tuple[Slots, ...] = ()  # per group of encoder self-attention: a resident prefix before it


@dataclass(frozen=True, slots=True)
class GroupMetadata:
    """One KV group's view of the step."""

    backend: AttentionBackend[Any]
    write_slots: Tensor  # [T], where the step's keys and values go
    layout: Any  # what the backend's `plan` returned


@dataclass(frozen=True, slots=True)
class StepMetadata:
    """One step: its K/V cache, every group's view, and the tokens with wanted logits."""

    cache: KVCache
    groups: tuple[GroupMetadata, ...]
    logit_rows: Tensor  # [N], indices into the packed row


def plan_step(
    cache: KVCache,
    backends: Sequence[AttentionBackend[Any]],  # per group
    items: Sequence[PackedItem],
    logit_rows: NDArray[np.int64],  # [N]
) -> StepMetadata:
    """Build all tensors of a step. Items of one token come first, as they do in the packed row."""
    num_rows = sum(item.num_tokens == 1 for item in items)
    assert all(item.num_tokens == 1 for item in items[:num_rows]), "rows come before chunks"
    groups = []
    for number, (group, backend) in enumerate(zip(cache.groups, backends, strict=True)):
        written = np.concatenate([item.slots[number][-item.num_tokens :] for item in items])
        layout = backend.plan([_context(item, number, group.geometry.window) for item in items])
        groups.append(GroupMetadata(backend, torch.from_numpy(written).to(cache.device), layout))
    return StepMetadata(cache, tuple(groups), torch.from_numpy(logit_rows).to(cache.device))


def _context(item: PackedItem, group: int, window: int | None) -> Context:
    """Return the slots that the item's first token may attend to, or any later one."""
    count = item.num_computed + item.num_tokens
    if window is not None:
        count = min(count, item.num_tokens - 1 + window)
    slots = item.slots[group]
    assert len(slots) >= count, "a slot that can be seen is missing"
    return Context(item.num_tokens, slots[len(slots) - count :])
