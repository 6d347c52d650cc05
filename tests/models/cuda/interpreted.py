"""Steps for the kernels, laid out by hand, and what Triton's interpreter needs to run them."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from app.models.attention.backend import Context
from app.models.attention.triton import TritonLayout
from app.models.attention.work_items import NUM_COLUMNS
from app.models.cuda.blocks import queries_per_tile
from app.prompt import LayerGeometry

CPU = torch.device("cpu")


def hand_made_layout(
    contexts: Sequence[Context],
    geometry: LayerGeometry,
    dtype: torch.dtype,
    *,
    splits: Sequence[int] = (1,),  # parts of each context's keys, in turn
    num_empty: int = 0,  # unused items at the end
    device: torch.device = CPU,
) -> TritonLayout:
    """Cut contexts into tiles of queries and parts of keys."""
    rows: list[list[int]] = []
    tiles: list[list[int]] = []
    counts: list[int] = []
    slots_begin = token = 0
    for number, context in enumerate(contexts):
        parts = min(splits[number % len(splits)], len(context.slots))
        edges = np.linspace(0, len(context.slots), parts + 1).astype(int)
        size = queries_per_tile(geometry, dtype) if context.num_tokens > 1 else 1
        for begin in range(0, context.num_tokens, size):
            num_queries = min(size, context.num_tokens - begin)
            first_query = len(context.slots) - context.num_tokens + begin
            for part, (key_begin, key_end) in enumerate(pairwise(edges)):
                item = [token + begin, num_queries, slots_begin, key_begin, key_end, first_query, part, 0]
                (rows if context.num_tokens == 1 else tiles).append(item)
        counts += [parts] * context.num_tokens
        slots_begin += len(context.slots)
        token += context.num_tokens
    empty = [[0] * NUM_COLUMNS] * num_empty
    return TritonLayout(
        int32(np.arange(token), device),
        int32(np.concatenate([context.slots for context in contexts]), device),
        *(int32(np.array(items + empty).reshape(-1, NUM_COLUMNS), device) for items in (rows, tiles)),
        int32(np.cumsum([0, *counts]), device),
        *((sum(counts), token) if max(counts) > 1 else (0, 0)),
    )


def int32(values: Any, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int32)).to(device)
