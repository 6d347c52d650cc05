"""Memory in huge pages is memory like any other, and is in huge pages where the system gives them."""

import re
from pathlib import Path

import pytest
import torch

from app.models.cpu.huge_pages import empty_in_huge_pages

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.parametrize("count", [0, 1, 1_000_003, 9_000_001])
def test_numbers_can_be_written_and_read(count: int) -> None:
    memory = empty_in_huge_pages(count, torch.int16)
    assert memory.shape == (count,)
    assert torch.equal(memory.fill_(7), torch.full((count,), 7, dtype=torch.int16))


def test_large_memory_is_marked_for_huge_pages() -> None:
    if not SETTING.is_file() or "[never]" in SETTING.read_text():
        pytest.skip("this system has no transparent huge pages")
    memory = empty_in_huge_pages(16 << 20, torch.int16)
    areas = Path("/proc/self/smaps").read_text()
    middle = memory.data_ptr() + memory.nbytes // 2
    for area in re.finditer(r"^([0-9a-f]+)-([0-9a-f]+) .*?VmFlags: (.*?)$", areas, re.MULTILINE | re.DOTALL):
        if int(area[1], 16) <= middle < int(area[2], 16):
            assert "hg" in area[3].split()
            return
    pytest.fail("the memory lies in no area of this process")
