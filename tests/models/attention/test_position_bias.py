"""Biases by distance equal the dense matrices that they stand for, and are never dense for a long source."""

import pytest
import torch
from torch import Tensor

from app.models.attention.position_bias import ChunkDistances, RowDistances

CPU = torch.device("cpu")
TABLE = torch.randn(3, 2 * 4 + 1)


def dense(num_tokens: int, context: int, *, is_causal: bool, window: int | None) -> Tensor:
    """`[H, n, C]`, written out by its definition."""
    expected = torch.full((3, num_tokens, context), float("-inf"))
    for query in range(num_tokens):
        for key in range(context):
            apart = key - (context - num_tokens + query)
            is_hidden = is_causal and (apart > 0 or (window is not None and apart <= -window))
            if not is_hidden:
                expected[:, query, key] = TABLE[:, max(-4, min(4, apart)) + 4]
    return expected


@pytest.mark.parametrize(("num_tokens", "context"), [(1, 1), (9, 9), (3, 11), (1, 12)])
@pytest.mark.parametrize(("is_causal", "window"), [(True, None), (True, 6), (False, None)])
def test_a_chunk_gets_the_biases_of_its_distances(
    num_tokens: int, context: int, is_causal: bool, window: int | None
) -> None:
    distances = ChunkDistances.of(num_tokens, context, is_causal=is_causal, window=window, device=CPU)
    blocks = list(distances.blocks(TABLE))
    found = torch.cat([block[0] for _, block in blocks], dim=1)
    assert torch.equal(found, dense(num_tokens, context, is_causal=is_causal, window=window))


def test_rows_get_the_biases_of_their_own_lengths() -> None:
    found = RowDistances.of(torch.tensor([2, 7, 5]), 7).biases(TABLE)
    for row, length in enumerate((2, 7, 5)):
        expected = dense(1, length, is_causal=True, window=None)
        assert torch.equal(found[row, :, :, :length], expected)


def test_a_long_source_is_never_laid_out_whole() -> None:
    blocks = list(ChunkDistances.of(2000, 2000, is_causal=False, window=None, device=CPU).blocks(TABLE))
    assert sum(queries.stop - queries.start for queries, _ in blocks) == 2000
    assert max(block.numel() for _, block in blocks) <= 1 << 20
