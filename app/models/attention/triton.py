"""Attention by Triton's kernels on GPUs: keys and values are read where they lie, by work items.

Shapes: T packed tokens, H query heads, Hk kv heads, D key width, Dv value width, W items, P partial results.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from app.models.attention.backend import Context
from app.models.cuda.blocks import Blocks, power_of_two, row_blocks, tile_blocks
from app.prompt import LayerGeometry


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
    num_partials: int  # partial results at most, which there is room for; 0: nothing is merged


class TritonBackend:
    """One kernel for rows, chunks, encoders and cross-attention, and one that merges partial results."""

    def __init__(self, geometry: LayerGeometry, dtype: torch.dtype, device: torch.device) -> None:
        from app.models.cuda import attention  # here: only a server with a GPU imports Triton

        self._attend: Any = attention.attend
        self._merge: Any = attention.merge
        self._geometry = geometry
        self._device = device
        self._row_blocks = row_blocks(geometry, dtype)
        self._tile_blocks = tile_blocks(geometry, dtype)

    @staticmethod
    def supports(geometry: LayerGeometry, dtype: torch.dtype, device: torch.device) -> bool:
        """Return whether the kernels agree with torch on this device for this geometry."""
        return False

    def plan(self, contexts: Sequence[Context]) -> TritonLayout:
        """Lay out a step as work items."""
        raise NotImplementedError

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
        geometry = self._geometry
        heads, num_tokens = query.shape[:2]
        output = query.new_empty(num_tokens, heads, geometry.value_dim)
        sums = query.new_empty(2, layout.num_partials, heads, dtype=torch.float32)
        partials = query.new_empty(layout.num_partials, heads, geometry.value_dim, dtype=torch.float32)

        def attend(items: Tensor, blocks: Blocks, *, is_masked: bool) -> None:
            self._attend[(items.shape[0] * geometry.num_kv_heads,)](
                query,
                *pools,
                output,
                partials,
                sums[0],
                sums[1],
                layout.query_rows,
                layout.slots,
                items,
                layout.partial_begin,
                sinks,
                position_bias,
                *query.stride()[:2],
                position_bias.shape[1] // 2 if position_bias is not None else 0,
                scaling,
                softcap or 0.0,
                geometry.window or 0,
                NUM_KV_HEADS=geometry.num_kv_heads,
                GROUP=geometry.queries_per_kv,
                KEY_DIM=geometry.key_dim,
                VALUE_DIM=geometry.value_dim,
                IS_CAUSAL=is_masked and geometry.is_causal,
                HAS_WINDOW=geometry.window is not None,
                HAS_SOFTCAP=softcap is not None,
                HAS_SINKS=sinks is not None,
                HAS_BIAS=position_bias is not None,
                BLOCK_M=blocks.rows,
                BLOCK_N=blocks.keys,
                BLOCK_D=max(16, power_of_two(geometry.key_dim)),
                BLOCK_DV=max(16, power_of_two(geometry.value_dim)),
                num_warps=blocks.num_warps,
                num_stages=blocks.num_stages,
            )

        if layout.row_items.shape[0]:
            attend(layout.row_items, self._row_blocks, is_masked=False)
        if layout.tile_items.shape[0]:
            attend(layout.tile_items, self._tile_blocks, is_masked=True)
        if layout.num_partials:
            self._merge[(num_tokens * heads,)](
                partials,
                sums[0],
                sums[1],
                layout.partial_begin,
                sinks,
                output,
                NUM_HEADS=heads,
                VALUE_DIM=geometry.value_dim,
                HAS_SINKS=sinks is not None,
                BLOCK_P=16,
                BLOCK_DV=power_of_two(geometry.value_dim),
            )
        return output
