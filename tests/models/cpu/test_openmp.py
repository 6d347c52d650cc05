"""Which threads a product has."""

import threading

import pytest
import torch

from app.models.cpu.openmp import loaded_runtime, without_workers


@pytest.mark.skipif(loaded_runtime() is None, reason="torch has another runtime here")
def test_one_thread_works_alone_while_others_have_their_workers() -> None:
    before, elsewhere = torch.get_num_threads(), list[int]()
    with without_workers():
        assert torch.get_num_threads() == 1
        thread = threading.Thread(target=lambda: elsewhere.append(torch.get_num_threads()))
        thread.start()
        thread.join()
    assert [torch.get_num_threads()] == [before] == elsewhere
