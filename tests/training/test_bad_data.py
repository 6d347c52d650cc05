"""What is wrong with a data file is said in one line: the file, the line, the field, what was expected."""

import re
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.errors import InvalidRequest
from app.training.data_files import MAX_LINE_BYTES
from app.training.readers import read_dataset
from tests.training.bad_data import BAD, GOOD, HUGE, write


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


_GOOD = {
    ".jsonl": "\n".join(GOOD).encode(),
    ".csv": b"text,label\n" + b"".join(b'"a %d, ""b""\n c",yes\nd %d,no\n' % (n, n) for n in range(12)),
    ".tsv": b"name\tfood\toutput\n" + b"".join(b"Door %d\tThai\tgood %d\n" % (n, n) for n in range(20)),
}
_PIECES = st.sampled_from(
    [b"\0", b"\r", b"\n", b'"', b",", b"\t", b"{", b"[", b"\xff", b"\xef\xbb\xbf", b"null", b"9"]
)


@pytest.mark.parametrize("kind", _GOOD)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_of_any_kind_is_read_or_refused(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    good = _GOOD[kind]
    place = data.draw(st.integers(0, len(good)))
    left_out = data.draw(st.integers(0, 3) | st.just(len(good)))
    path = tmp_path / f"x{kind}"
    path.write_bytes(good[:place] + data.draw(_PIECES | st.binary(max_size=4)) + good[place + left_out :])
    said = ""
    try:
        read_dataset(path)
    except InvalidRequest as error:
        said = str(error)
    assert not said or (said.startswith(path.name) and "\n" not in said)


def test_an_odd_name_of_a_file_does_not_break_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a\nb\udcff.jsonl"
    path.write_text("{}\n")
    with pytest.raises(InvalidRequest, match=r"^a\?b\?\.jsonl, line 1: it has no fields"):
        read_dataset(path)
