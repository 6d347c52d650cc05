"""What a decode step reads, in memory that stays where it is: row counts share it.

Shapes: R rows of a step, M the most rows, G groups of the decoder's self-attention.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from app.engine.plan import PlanItem
from app.models.attention.backend import GraphBackend, StaticLayout
from app.models.attention.kv_cache import TRASH_SLOT, KVCache, KVGroup
from app.models.attention.metadata import GroupMetadata, StepMetadata, contexts_of
from app.models.backbone import Backbone
from app.models.staging import Part, Staging
from app.prompt import ModelGeometry
from app.sites import Site

# Slots that the rows of a step may see together in a group: 256 rows of 8,000. Beyond that they run eagerly.
_MOST_SLOTS = 1 << 21
_FOLLOWS = -1  # as a token id: the row's token is the one that the last step chose
_WIDTH = 16  # every row of numbers begins where kernels load it fast
_IDS, _POSITIONS, _FOLLOWED, _SLOTS = range(4)  # rows of the numbers; slots of each group from there on


class Followed(NamedTuple):
    """What the last step chose."""

    ids: Tensor  # on the device
    rows: Mapping[int, int]  # where the token of an item is among them, by the item's id


class DecodeInputs:
    """Token ids, positions, slots and layouts of attention; rows beyond a step's own are padding.

    A padding row has token 0 at position 0, sees the padding slot alone, and writes to the trash slot.
    """

    def __init__(self, backbone: Backbone, cache: KVCache, row_counts: Sequence[int]) -> None:
        """`row_counts`: of steps, of which one at a time is filled in. At first all is padding."""
        most, device = max(row_counts), backbone.device
        self._backbone, self._cache, self._row_counts = backbone, cache, row_counts
        self._groups = [
            (number, group)
            for number, group in enumerate(cache.groups)
            if group.site is not Site.ENCODER_SELF
        ]
        self._written = [number for number, group in self._groups if group.site is Site.DECODER_SELF]
        width = -(-most // _WIDTH) * _WIDTH
        self._staging = Staging([Part((_SLOTS + len(self._written), width))], device)
        self._numbers: Tensor = self._staging.parts[0]  # [3 + G, M or more]
        self._padding = np.array([[0], [0], [0], *([TRASH_SLOT] for _ in self._written)])
        self._followed = torch.zeros(most, dtype=torch.int64, device=device)
        self._logit_rows = torch.arange(most, device=device)
        self._layouts: dict[int, list[StaticLayout[Any]]] = {
            number: _graph_backend(backbone, number).static_layouts(
                row_counts, _most_slots(group, backbone.geometry, most)
            )
            for number, group in self._groups
        }
        self._fill_numbers([], None, most)

    def token_ids(self, num_rows: int) -> Tensor:
        """Return the ids `[R]`; a graph may record it."""
        ids = self._numbers[_IDS, :num_rows]
        return torch.where(ids == _FOLLOWS, self._followed[:num_rows], ids)

    def positions(self, num_rows: int) -> Tensor:
        """Return the positions `[R]`, in the memory itself."""
        return self._numbers[_POSITIONS, :num_rows]

    def metadata(self, num_rows: int) -> StepMetadata:
        """Return the metadata of all steps of so many rows: every row has wanted logits."""
        place = self._row_counts.index(num_rows)
        groups = []
        for number in range(len(self._cache.groups)):
            layouts, written = self._layouts.get(number), None
            if number in self._written:
                written = self._numbers[_SLOTS + self._written.index(number), :num_rows]
            layout = None if layouts is None else layouts[place].layout
            groups.append(GroupMetadata(self._backbone.backends[number], layout, written))
        return StepMetadata(self._cache, tuple(groups), self._logit_rows[:num_rows])

    def fill(self, items: Sequence[PlanItem], last: Followed | None, num_rows: int) -> bool:
        """Fill in a step of single tokens, and padding up to `num_rows`; return False where it doesn't fit.

        `last` is there where an item follows.
        """
        kv, place = [item.kv for item in items], self._row_counts.index(num_rows)
        contexts = [
            (self._layouts[number][place], contexts_of(kv, number, group)) for number, group in self._groups
        ]
        if not all(layout.fits(each) for layout, each in contexts):
            return False
        for layout, each in contexts:
            layout.fill(each)
        self._fill_numbers(items, last, num_rows)
        return True

    def _fill_numbers(self, items: Sequence[PlanItem], last: Followed | None, num_rows: int) -> None:
        count = len(items)
        (numbers,) = self._staging.fill()
        numbers[:, count:num_rows] = self._padding
        numbers[_IDS, :count] = [_FOLLOWS if item.follows else item.token_ids[0] for item in items]
        numbers[_POSITIONS, :count] = [item.position for item in items]
        if last is not None:
            numbers[_FOLLOWED, :count] = [last.rows[item.id] if item.follows else 0 for item in items]
        for row, number in enumerate(self._written, _SLOTS):
            numbers[row, :count] = [item.kv.slots[number][-1] for item in items]
        self._staging.send(len(numbers))
        if last is not None:
            rows = self._numbers[_FOLLOWED, :num_rows]
            torch.index_select(last.ids, 0, rows, out=self._followed[:num_rows])


def _graph_backend(backbone: Backbone, number: int) -> GraphBackend[Any]:
    backend = backbone.backends[number]
    assert isinstance(backend, GraphBackend), "checked before"
    return backend


def _most_slots(group: KVGroup, geometry: ModelGeometry, most_rows: int) -> int:
    """Return how many slots the rows of a step may see together."""
    is_cross = group.site is Site.DECODER_CROSS
    length = geometry.max_source_positions if is_cross else geometry.max_positions
    if group.geometry.window is not None:
        length = min(length, group.geometry.window)
    return min(most_rows * length, _MOST_SLOTS)
