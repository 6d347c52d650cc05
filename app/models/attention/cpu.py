"""Attention by the compiled kernels for bf16 on CPUs: keys and values are read where they lie."""

from collections.abc import Iterable, Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from app.models.attention.backend import Context
from app.models.cpu.attention_kernel import PackedContexts, attention_for
from app.prompt import LayerGeometry


class CPUBackend:
    """Rows and chunks alike in one call of the kernel, without padding."""

    def __init__(self, geometry: LayerGeometry, dtype: torch.dtype, device: torch.device) -> None:
        attend = attention_for(dtype, device)
        assert attend is not None, "supported only where there is a kernel"
        self._attend = attend
        self._num_kv_heads = geometry.num_kv_heads
        self._window = geometry.window
        self._is_causal = geometry.is_causal

    @staticmethod
    def supports(geometry: LayerGeometry, dtype: torch.dtype, device: torch.device) -> bool:
        """Return whether the kernel was built and takes these heads and widths, without caps and sinks."""
        attend = attention_for(dtype, device)
        if attend is None or geometry.softcap is not None or geometry.has_sinks:
            return False
        if not geometry.is_causal and geometry.window is not None:
            return False
        return attend.takes(geometry.queries_per_kv, geometry.key_dim, geometry.value_dim)

    def plan(self, contexts: Sequence[Context]) -> PackedContexts:
        """Put the contexts' slots in a row; neighbours that read the same source share a pass over it."""
        if not contexts[0].has_own:
            contexts = _joined(contexts)
        slots = [context.slots for context in contexts]
        return PackedContexts(
            torch.from_numpy(np.concatenate(slots)),
            _begins(map(len, slots)),
            _begins(context.num_tokens for context in contexts),
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pools: tuple[Tensor, Tensor],
        layout: PackedContexts,
        *,
        scaling: float,
        softcap: float | None,
        sinks: Tensor | None,
        position_bias: Tensor | None,
    ) -> Tensor:
        """Return attention `[T, H, Dv]`; the shapes are those of `AttentionBackend.forward`."""
        if query.stride(2) != 1:
            query = query.contiguous()
        return self._attend(
            query,
            *pools,
            layout,
            num_kv_heads=self._num_kv_heads,
            window=self._window,
            scaling=scaling,
            is_causal=self._is_causal,
            position_bias=None if position_bias is None else position_bias.float(),
        )


def _joined(contexts: Sequence[Context]) -> list[Context]:
    """Join neighbours in cross-attention that see the same slots: beams, samples and labels of a request."""
    joined: list[Context] = []
    for context in contexts:
        last = joined[-1] if joined else None
        if last is None or not np.array_equal(last.slots, context.slots):
            joined.append(context)
        else:
            joined[-1] = last._replace(num_tokens=last.num_tokens + context.num_tokens)
    return joined


def _begins(lengths: Iterable[int]) -> Tensor:
    """Return where each of consecutive parts begins, and where the last one ends."""
    return torch.from_numpy(np.array([*accumulate(lengths, initial=0)]))
