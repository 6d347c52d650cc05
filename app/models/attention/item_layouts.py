"""Work items on the device: of one step, or in memory that stays where it is, for graphs."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from app.models.attention.backend import Context
from app.models.attention.work_items import NUM_COLUMNS, Int32, ItemPlanner, WorkItems
from app.models.staging import Part, Staging
from app.models.transfer import to_device

_ALIGNMENT = 4  # numbers: 16 bytes


class TritonLayout(NamedTuple):
    """A step's work items on the device (app/models/attention/work_items.py).

    What is launched follows from the shapes: a layout of a graph has fixed ones, and empty items where a
    step has fewer. Each tensor begins at a multiple of 16 bytes, or Triton compiles a second kernel.
    """

    query_rows: Tensor  # [Q] int32
    slots: Tensor  # [L] int32
    row_items: Tensor  # [W, 8] int32: of one query token each
    tile_items: Tensor  # [W, 8] int32: of up to `queries_per_tile` query tokens
    partial_begin: Tensor  # [T + 1] int32
    num_partials: int  # partial results at most, which there is room for
    num_merged: int  # leading tokens at most that have some; 0: nothing is merged


def layout_of(planned: WorkItems, device: torch.device) -> TritonLayout:
    """Return a step's layout, brought to the device in one copy."""
    arrays = [planned.query_rows, planned.row_items, planned.tile_items, planned.partial_begin]
    begins, end = [], 0
    for array in arrays:
        begins.append(end)
        end += -(-array.size // _ALIGNMENT) * _ALIGNMENT
    packed = np.empty(end + sum(map(len, planned.slots)), np.int32)
    for begin, array in zip(begins, arrays, strict=True):
        packed[begin : begin + array.size] = array.ravel()
    _write_slots(planned, packed[end:])
    sent = to_device(packed, device)
    query_rows, row_items, tile_items, partial_begin = (
        sent[begin : begin + array.size].view(array.shape)
        for begin, array in zip(begins, arrays, strict=True)
    )
    num_partials = int(planned.partial_begin[-1])
    num_merged = int(np.searchsorted(planned.partial_begin, num_partials))
    return TritonLayout(
        query_rows, sent[end:], row_items, tile_items, partial_begin, num_partials, num_merged
    )


class StaticItems:
    """The layout of decode steps of up to so many rows, in memory that others share."""

    def __init__(self, planner: ItemPlanner, num_rows: int, max_slots: int, staging: Staging) -> None:
        self._planner = planner
        self._num_rows, self._max_slots = num_rows, max_slots
        self._staging = staging
        self._capacity = capacity = planner.capacity(num_rows, max_slots)
        partial_begin, query_rows, row_items, tile_items, slots = staging.parts
        self.layout = TritonLayout(
            query_rows[: capacity.query_rows],
            slots,
            row_items[: capacity.row_items],
            tile_items[: capacity.tile_items],
            partial_begin[: num_rows + 1],
            capacity.partials,
            num_rows,
        )

    def fits(self, contexts: Sequence[Context]) -> bool:
        """Return whether `fill` takes these contexts."""
        if len(contexts) > self._num_rows:
            return False
        return sum(len(context.slots) for context in contexts) <= self._max_slots

    def fill(self, contexts: Sequence[Context]) -> None:
        """Lay out a step, each context one token, without waiting for the device. The rest is padding."""
        planned = self._planner.plan(contexts, self._num_rows)
        partial_begin, query_rows, row_items, tile_items, slots = self._staging.fill()
        partial_begin[: self._num_rows + 1] = planned.partial_begin
        query_rows[: len(planned.query_rows)] = planned.query_rows
        _fill_items(row_items[: self._capacity.row_items], planned.row_items)
        _fill_items(tile_items[: self._capacity.tile_items], planned.tile_items)
        self._staging.send(_write_slots(planned, slots))


def static_items(
    planner: ItemPlanner, num_rows: Sequence[int], max_slots: int, device: torch.device
) -> list[StaticItems]:
    """Return a layout for each of these numbers of rows."""
    most = max(num_rows)
    capacity = planner.capacity(most, max_slots)
    shapes = [
        (most + 1,),
        (capacity.query_rows,),
        (capacity.row_items, NUM_COLUMNS),
        (capacity.tile_items, NUM_COLUMNS),
        (max_slots + 1,),  # and that of the padding
    ]
    staging = Staging([Part(shape, np.int32) for shape in shapes], device)
    return [StaticItems(planner, rows, max_slots, staging) for rows in num_rows]


def _fill_items(target: Int32, items: Int32) -> None:
    target[: len(items)] = items
    target[len(items) :] = 0


def _write_slots(planned: WorkItems, target: Int32) -> int:
    """Write the slots to the beginning of `target`; return how many there are."""
    count = sum(map(len, planned.slots))
    np.concatenate(planned.slots, out=target[:count], casting="same_kind")
    return count
