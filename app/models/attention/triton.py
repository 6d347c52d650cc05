"""Attention by Triton's kernels on GPUs: keys and values are read where they lie, by work items.

Shapes: T packed tokens, H query heads, Hk kv heads, D key width, Dv value width, W items, P partial results.
"""

import logging
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from app.models.attention.agreement import TOLERANCE, error_of
from app.models.attention.backend import Context
from app.models.attention.cascade import ALWAYS, NEVER, CascadeCosts
from app.models.attention.cascade_timing import default_costs, device_seconds, measured_fixed
from app.models.attention.item_layouts import StaticItems, TritonLayout, layout_of, static_items
from app.models.attention.work_items import ItemPlanner
from app.models.cuda.blocks import (
    Blocks,
    constants,
    merge_constants,
    queries_per_tile,
    row_blocks,
    tile_blocks,
)
from app.models.weights import in_one_line
from app.prompt import LayerGeometry

# For each multiprocessor: a step that has fewer is split further. Three at least run at once, and keep 48 KB
# or more on their way (app/models/cuda/resources.py).
_PROGRAMS = 3

_logger = logging.getLogger(__name__)


class TritonBackend:
    """One kernel for rows, chunks, encoders and cross-attention, and one that merges partial results."""

    def __init__(
        self,
        geometry: LayerGeometry,
        dtype: torch.dtype,
        device: torch.device,
        costs: CascadeCosts | None = None,  # None: those of this device
    ) -> None:
        from app.models.cuda import attention  # here: only a server with a GPU imports Triton

        rows, tiles = row_blocks(geometry, dtype), tile_blocks(geometry, dtype)
        self._attend_rows = _Attend(attention.attend, geometry, rows, is_row=True)
        self._attend_tiles = _Attend(attention.attend, geometry, tiles, is_row=False)
        self._merge: Any = attention.merge
        self._merge_constants = merge_constants(geometry)
        self._value_dim = geometry.value_dim
        self._window = geometry.window or 0
        self._device = device
        self.planner = ItemPlanner(
            geometry,
            queries_per_tile(geometry, dtype),
            num_programs=_PROGRAMS * _num_processors(device),
            costs=costs or _costs(geometry, dtype, device),
        )

    @staticmethod
    def supports(geometry: LayerGeometry, dtype: torch.dtype, device: torch.device) -> bool:
        """Return whether the kernels agree with torch on this device for this geometry."""
        return device.type == "cuda" and _agrees(geometry, dtype, device)

    def plan(self, contexts: Sequence[Context]) -> TritonLayout:
        """Lay out a step as work items."""
        return layout_of(self.planner.plan(contexts), self._device)

    def static_layouts(self, num_rows: Sequence[int], max_slots: int) -> list[StaticItems]:
        """Return a layout for each of these numbers of rows, in memory that stays where it is."""
        return static_items(self.planner, num_rows, max_slots, self._device)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pools: tuple[Tensor, Tensor],
        layout: TritonLayout,
        *,
        scaling: float,
        softcap: float | None,
        sinks: Tensor | None,
        position_bias: Tensor | None,
    ) -> Tensor:
        """Return attention `[T, H, Dv]`; the shapes are those of `AttentionBackend.forward`."""
        if query.stride(2) != 1:
            query = query.contiguous()
        keys, values = (pool.contiguous() for pool in pools)  # an encoder's may be parts of one projection
        heads, num_tokens = query.shape[:2]
        output = query.new_empty(num_tokens, heads, self._value_dim)
        # Each in memory of its own: at an address that isn't a multiple of 16 Triton compiles another kernel.
        partials = [
            query.new_empty(layout.num_partials, heads, width, dtype=torch.float32)
            for width in (self._value_dim, 1, 1)
        ]
        given = (
            *(layout.query_rows, layout.slots, layout.partial_begin),
            *(sinks, position_bias, *query.stride()[:2]),
            0 if position_bias is None else position_bias.shape[1] // 2,
            *(float(scaling), float(softcap or 0.0), self._window),
        )
        with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
            self._attend_rows(layout.row_items, query, keys, values, output, *partials, *given)
            self._attend_tiles(layout.tile_items, query, keys, values, output, *partials, *given)
            if layout.num_merged:
                self._merge[(layout.num_merged * heads,)](
                    *partials, layout.partial_begin, sinks, output, **self._merge_constants
                )
        return output


class _Attend:
    """The attention kernel, compiled for one layer's geometry and one kind of items."""

    def __init__(self, kernel: Any, geometry: LayerGeometry, blocks: Blocks, *, is_row: bool) -> None:
        self._kernel = kernel
        self._num_kv_heads = geometry.num_kv_heads
        self._constants = constants(geometry, blocks, is_row=is_row)
        self._options = {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages}

    def __call__(self, items: Tensor, *given: Any) -> None:
        """Compute `items [W, 8]`, if there are any; all else goes to the kernel as it is."""
        if items.shape[0]:
            grid = (items.shape[0] * self._num_kv_heads,)
            self._kernel[grid](items, *given, **self._constants, **self._options)


@cache
def _agrees(geometry: LayerGeometry, dtype: torch.dtype, device: torch.device) -> bool:
    """Compare the kernels with torch's attention, once for a geometry. Log why torch's serves instead."""
    try:
        error = error_of(partial(TritonBackend, costs=ALWAYS), geometry, dtype, device)
        if error <= TOLERANCE[dtype]:
            return True
        reason = f"the kernels differ from it by {error:.1e}; up to {TOLERANCE[dtype]:.0e} is rounding"
    except Exception as failure:  # of a compiler or a driver: whatever it is, torch serves
        reason = in_one_line(failure)
    _logger.warning("attention over %s runs in torch, which is slower: %s", geometry, reason)
    return False


@cache
def _costs(geometry: LayerGeometry, dtype: torch.dtype, device: torch.device) -> CascadeCosts:
    """Return what sharing slots costs, measured on a GPU once for a geometry."""
    costs = default_costs(geometry, dtype)
    if device.type != "cuda":
        return costs
    make = partial(TritonBackend, geometry, dtype, device)
    alone, sharing = make(NEVER), make(costs._replace(fixed=0.0))
    if not sharing.planner.may_share:
        return NEVER
    try:
        fixed = measured_fixed(geometry, dtype, device, alone, sharing, sharing.planner.gain, device_seconds)
    except Exception as failure:  # the costs are a choice of speed only
        _logger.warning("what shared prefixes cost was not measured: %s", in_one_line(failure))
        return costs
    _logger.info("rows share prefixes where that saves more than %.0f keys", fixed)
    return costs._replace(fixed=fixed)


def _num_processors(device: torch.device) -> int:
    """Return a GPU's multiprocessors; those of an H100 where there is none, for tests."""
    if device.type != "cuda":
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
