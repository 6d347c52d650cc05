"""Rows of data files: streamed, bounded, and strict about what isn't text, JSON or CSV.

A line that is too long is refused when as much of it is read, so neither memory nor time depends on its
length. Line ends are LF or CRLF; a byte order mark of UTF-8 is left out.
"""

import csv
import hashlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from app.errors import InvalidRequest
from app.strict_json import JsonError, excerpt, parse_json

MAX_FILE_BYTES = 1 << 28
MAX_LINE_BYTES = 1 << 23
MAX_EXAMPLES = 500_000  # of one file
MAX_COLUMNS = 64
Lines = Iterator[tuple[int, bytes]]  # number and bytes, which are UTF-8, with the line's end
_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_FORMS_OF_FILES = "a .jsonl file (one JSON object a line), a .csv or a .tsv file with a header"


@dataclass(frozen=True, slots=True)
class Row:
    """One record of a file: its fields, and the line on which it begins, from 1."""

    fields: Mapping[str, Any]
    line: int
    is_table: bool = False  # its fields are columns, each a string


def name_of(path: Path) -> str:
    """Return a file's name without folders, fit for a message of one line."""
    return "".join(each if each.isprintable() else "?" for each in path.name or str(path))


def refused(place: str, message: str) -> InvalidRequest:
    """Return the error for what is wrong at a place of the data."""
    return InvalidRequest(f"{place}: {message}", param="data")


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file, read once from its beginning to its end; `digest` grows with what was read."""

    path: Path
    digest: "hashlib._Hash"

    @classmethod
    def at(cls, path: Path) -> "DataFile":
        """Raise InvalidRequest: no regular file, or larger than MAX_FILE_BYTES."""
        if not path.exists():
            raise refused(name_of(path), f"there is no such file; give {_FORMS_OF_FILES}")
        if not path.is_file():
            raise refused(name_of(path), f"it is no regular file; give {_FORMS_OF_FILES}")
        if path.suffix.lower() not in READERS:
            raise refused(name_of(path), _unknown_kind(path))
        if path.stat().st_size > MAX_FILE_BYTES:
            raise refused(
                name_of(path),
                f"it has {path.stat().st_size} bytes, and at most {MAX_FILE_BYTES} are read; take a sample",
            )
        return cls(path, hashlib.sha256())

    @property
    def name(self) -> str:
        """Return its name, without folders."""
        return name_of(self.path)

    @property
    def sha256(self) -> str:
        """Return the hash, in hex, of what was read."""
        return self.digest.hexdigest()

    def rows(self) -> Generator[Row, None, None]:
        """Yield the records. Raise InvalidRequest, which names the first line that isn't one."""
        with self.path.open("rb") as stream:  # here, so that an error closes it at once
            yield from counted(self.name, READERS[self.path.suffix.lower()](self, self._lines(stream)))

    def refused(self, line: int, message: str) -> InvalidRequest:
        """Return the error for what is wrong with a line."""
        return refused(f"{self.name}, line {line}", message)

    def _lines(self, stream: BinaryIO) -> Lines:
        position = 0
        for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE_BYTES + 1), b""), 1):
            self.digest.update(line)
            if len(line) > MAX_LINE_BYTES:
                raise self.refused(
                    number,
                    f"it has more than {MAX_LINE_BYTES} bytes, the most that one example may have; "
                    "is this one record a line?",
                )
            self._check_text(number, line, position)
            position += len(line)
            yield number, line.removeprefix(_BOM) if number == 1 else line

    def _check_text(self, number: int, line: bytes, position: int) -> None:
        if number == 1 and line.startswith(_UTF16):
            raise self.refused(number, "it is UTF-16; save it as UTF-8")
        if b"\0" in line:
            place = position + line.index(b"\0")
            raise self.refused(
                number, f"byte {place} of the file is NUL, so it is UTF-16 or no text; save it as UTF-8"
            )
        try:
            line.decode()
        except UnicodeDecodeError as error:
            raise self.refused(
                number,
                f"it is not UTF-8 at byte {position + error.start} of the file "
                f"(0x{line[error.start]:02x}, byte {error.start} of the line); save it as UTF-8",
            ) from None


def counted(name: str, rows: Iterable[Row]) -> Iterator[Row]:
    """Yield the rows. Raise InvalidRequest: there are none, or more than MAX_EXAMPLES."""
    count = 0
    for row in rows:
        count += 1
        if count > MAX_EXAMPLES:
            raise refused(name, f"at most {MAX_EXAMPLES} examples are read; take a sample")
        yield row
    if not count:
        raise refused(name, f"it holds no examples; expected {_FORMS_OF_FILES}")


def _json_rows(file: DataFile, lines: Lines) -> Iterator[Row]:
    for number, line in lines:
        if not line.strip():
            continue
        try:
            fields = parse_json(line)
        except JsonError as error:
            raise file.refused(number, f"{error}; expected one JSON object a line") from None
        if not isinstance(fields, dict):
            raise file.refused(number, f"expected a JSON object, found {kind_of(fields)}")
        yield Row(fields, number)


def _csv_rows(file: DataFile, lines: Lines) -> Iterator[Row]:
    return _separated(file, lines, ",")


def _tsv_rows(file: DataFile, lines: Lines) -> Iterator[Row]:
    return _separated(file, lines, "\t")


def _separated(file: DataFile, lines: Lines, delimiter: str) -> Iterator[Row]:
    """Yield rows by the names of the first one. A quoted cell may hold line breaks; blank lines are none."""
    reader = csv.reader((line.decode() for _, line in lines), delimiter=delimiter, strict=True)
    header: list[str] = []
    begin = 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise file.refused(begin, f"it is not {_NAMES[delimiter]}: {_reason(error)}") from None
        if cells is None:
            return
        if not header and cells:
            header = _header(file, begin, cells)
        elif cells:
            yield Row(_named(file, begin, header, cells, delimiter), begin, is_table=True)
        begin = reader.line_num + 1


def _reason(error: csv.Error) -> str:
    reason = str(error)
    if "new-line character" in reason:
        return "a line break (CR) stands alone outside of quotes; end lines with LF or CRLF"
    if "unexpected end of data" in reason:
        return "a quote that opens here isn't closed"
    return reason


_NAMES = {",": "CSV", "\t": "tab-separated"}


def _header(file: DataFile, line: int, cells: list[str]) -> list[str]:
    if len(cells) > MAX_COLUMNS:
        raise file.refused(line, f"the header has {len(cells)} columns; expected at most {MAX_COLUMNS}")
    other = next((mark for mark in ",;\t|" if len(cells) == 1 and mark in cells[0]), None)
    if other is not None:
        raise file.refused(line, f"the header has one column; is {other!r} what separates columns here?")
    names = [name.strip() for name in cells]
    if "" in names:
        raise file.refused(line, "a column of the header has no name")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise file.refused(line, f"the header has the column {excerpt(twice)} twice")
    return names


def _named(file: DataFile, line: int, header: list[str], cells: list[str], delimiter: str) -> dict[str, str]:
    if len(cells) != len(header):
        raise file.refused(
            line,
            f"it has {len(cells)} cells, but the header has {len(header)}; put a cell that holds "
            f"{'a comma' if delimiter == ',' else 'a tab'}, a quote or a line break in double quotes",
        )
    return dict(zip(header, cells, strict=True))


READERS: Mapping[str, Callable[[DataFile, Lines], Iterator[Row]]] = {
    ".jsonl": _json_rows,
    ".ndjson": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _tsv_rows,
}


def _unknown_kind(path: Path) -> str:
    kind = path.suffix.lower()
    if kind == ".json":
        return "expected JSON lines: one object a line, in a .jsonl file (`jq -c '.[]'` makes them of a list)"
    if kind in (".gz", ".zip", ".xz", ".bz2", ".zst"):
        return f"it is compressed; unpack it to {_FORMS_OF_FILES}"
    return f"files that end in {excerpt(kind)} aren't read; give {_FORMS_OF_FILES}"


def kind_of(value: Any) -> str:
    """Return what a value of JSON is, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    names = {str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")
