"""Keys and values land at their slots, bit by bit, from tensors as transformers lays them out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from app.models.attention.row_writer import RowWriter, copy_rows, row_writer, stores_as_torch
from app.models.cuda.kv_write import write_rows
from app.prompt import LayerGeometry

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PLAIN = LayerGeometry(2, 16, 16)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    num_tokens=st.integers(1, 9),
    num_kv_heads=st.sampled_from([1, 2, 3, 12]),
    widths=st.sampled_from([(16, 16), (12, 12), (80, 80), (24, 16), (96, 112), (192, 128)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    is_transposed=st.booleans(),
)
def test_rows_are_stored_as_torch_stores_them(
    num_tokens: int, num_kv_heads: int, widths: tuple[int, int], dtype: torch.dtype, is_transposed: bool
) -> None:
    slots = torch.randperm(20, device=DEVICE)[:num_tokens]
    stored = []
    rows = [
        torch.randn(num_kv_heads, num_tokens, width, device=DEVICE).to(dtype).transpose(0, 1)
        for width in widths
    ]
    if not is_transposed:
        rows = [each.contiguous() for each in rows]
    for write in (copy_rows, write_rows):
        pools = [torch.zeros(20, num_kv_heads * width, dtype=dtype, device=DEVICE) for width in widths]
        write((pools[0], pools[1]), slots, rows[0], rows[1])
        stored.append(pools)
    assert all(torch.equal(theirs, ours) for theirs, ours in zip(*stored, strict=True))


def without_values(pools: tuple[torch.Tensor, ...], *given: torch.Tensor) -> None:
    copy_rows((pools[0], pools[1].clone()), *given)


@pytest.mark.parametrize(("write", "agrees"), [(write_rows, True), (without_values, False)])
def test_a_writer_is_compared_with_torch_before_it_serves(write: RowWriter, agrees: bool) -> None:
    assert stores_as_torch(write, PLAIN, torch.float32, DEVICE) is agrees


def test_torch_writes_on_a_cpu() -> None:
    assert row_writer(PLAIN, torch.float32, torch.device("cpu")) is copy_rows


def test_a_kernel_that_fails_leaves_it_to_torch(caplog: pytest.LogCaptureFixture) -> None:
    """Without a GPU, the device itself is what fails."""
    if torch.cuda.is_available():
        pytest.skip("the kernel works here")
    assert row_writer(PLAIN, torch.float32, torch.device("cuda")) is copy_rows
    assert "written by torch" in caplog.text
