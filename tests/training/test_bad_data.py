"""What is wrong with a data file is said in one line: the file, the line, the field, what was expected."""

import re
import time
import tracemalloc
from pathlib import Path

import pytest

from app.errors import InvalidRequest
from app.training.data_files import MAX_LINE_BYTES
from app.training.readers import read_dataset
from tests.training.bad_data import BAD, HUGE, write


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    path, expected = write(case, tmp_path)
    with pytest.raises(InvalidRequest, match=re.escape(expected)) as refused:
        read_dataset(path)
    message = str(refused.value)
    assert "\n" not in message
    assert len(message) < 400
    assert str(tmp_path) not in message
    assert message.startswith(path.name)


@pytest.mark.parametrize("name", HUGE)
def test_a_line_of_100_mb_costs_neither_time_nor_memory(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    HUGE[name](path)
    began = time.process_time()
    tracemalloc.start()
    with pytest.raises(InvalidRequest, match=rf"line 1: it has more than {MAX_LINE_BYTES} bytes"):
        read_dataset(path)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 4 * MAX_LINE_BYTES
    assert time.process_time() - began < 2


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(InvalidRequest, match=r"x\.jsonl: it has 1099511627776 bytes, and at most 268435456"):
        read_dataset(path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"missing\.jsonl: there is no such file"):
        read_dataset(tmp_path / "missing.jsonl")
    with pytest.raises(InvalidRequest, match=r"null: it is no regular file"):
        read_dataset(Path("/dev/null"))
    with pytest.raises(InvalidRequest, match=r"the directory holds no \.jsonl, "):
        read_dataset(tmp_path)
