"""Fixed memory keeps its addresses, takes what is filled in, and leaves alone what was filled in before."""

import numpy as np
import torch

from app.models.staging import Part, Staging

CPU = torch.device("cpu")


def test_parts_stay_where_they_are_and_get_what_was_filled_in() -> None:
    staging = Staging([Part((3,)), Part((2, 5), np.int32), Part((7,), np.int32)], CPU)
    addresses = [part.data_ptr() for part in staging.parts]
    assert not any(part.any() for part in staging.parts)
    for step in range(5):
        ids, items, slots = staging.fill()
        ids[:] = step
        items[:] = np.arange(10).reshape(2, 5) + step
        slots[:4] = [1, 2, 3, step]
        slots[4:] = -1  # beyond what is sent
        staging.send(4)
        assert staging.parts[0].tolist() == [step] * 3
        assert staging.parts[1].tolist() == (np.arange(10).reshape(2, 5) + step).tolist()
        assert staging.parts[2].tolist() == [1, 2, 3, step, 0, 0, 0]
    assert [part.data_ptr() for part in staging.parts] == addresses


def test_a_step_is_filled_in_while_two_earlier_ones_may_still_be_copied() -> None:
    staging = Staging([Part((2,))], CPU)
    filled = [staging.fill()[0] for _ in range(4)]
    assert len({each.ctypes.data for each in filled[:3]}) == 3
    assert filled[3] is filled[0]


def test_parts_begin_where_any_dtype_may() -> None:
    staging = Staging([Part((1,), np.int32), Part((1,)), Part((1,), np.float32)], CPU)
    assert [part.dtype for part in staging.parts] == [torch.int32, torch.int64, torch.float32]
    assert not any(part.data_ptr() % 8 for part in staging.parts)
