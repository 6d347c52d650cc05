"""Datasets that Hugging Face's package `datasets` saved to disk, read by it where it is installed."""

import hashlib
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from app.training.data_files import Row, counted, name_of, refused

_PACKAGE = "datasets"
_MARKS = ("dataset_dict.json", "state.json")  # of several splits, of one


def is_saved_dataset(path: Path) -> bool:
    """Return whether a directory is one that `save_to_disk` wrote."""
    return any((path / mark).is_file() for mark in _MARKS)


@dataclass(frozen=True, slots=True)
class SavedSplit:
    """The rows of one split; labels are read by the names that its features give them."""

    name: str
    rows_: Any  # datasets.Dataset

    def rows(self) -> Generator[Row, None, None]:
        """Yield the records, counted from 1. Raise InvalidRequest: there are none, or too many."""
        names = {
            column: feature.names
            for column, feature in self.rows_.features.items()
            if hasattr(feature, "names")
        }
        yield from counted(self.name, self._rows(names))

    def _rows(self, names: Mapping[str, list[str]]) -> Iterator[Row]:
        for number, fields in enumerate(self.rows_, 1):
            for column in names.keys() & fields.keys():
                fields[column] = self._label(number, column, names[column], fields[column])
            yield Row({name: value for name, value in fields.items() if value is not None}, number)

    def _label(self, number: int, column: str, names: list[str], value: Any) -> str:
        if not isinstance(value, int) or not 0 <= value < len(names):
            raise refused(f"{self.name}, line {number}", f"{column} is {value}, which is none of its labels")
        return names[value]

    @property
    def sha256(self) -> str:
        """Return the hash of its files."""
        digest = hashlib.sha256()
        for file in self.rows_.cache_files:
            with Path(file["filename"]).open("rb") as opened:
                for chunk in iter(lambda: opened.read(1 << 20), b""):
                    digest.update(chunk)
        return digest.hexdigest()


def saved_splits(path: Path) -> dict[str, SavedSplit]:
    """Return the splits by name; a dataset without splits is train.

    Raise InvalidRequest: the package isn't installed, or can't read the directory.
    """
    where = name_of(path)
    if find_spec(_PACKAGE) is None:
        raise refused(
            where,
            "it was saved by the package datasets, which isn't installed here; install it, or save the rows "
            "as JSON lines (dataset.to_json('train.jsonl'))",
        )
    try:
        loaded = import_module(_PACKAGE).load_from_disk(str(path))
    except Exception as error:  # Arrow raises whatever its files make it raise
        reason = str(error).split("\n")[0][:300] or type(error).__name__
        raise refused(where, f"the package datasets can't read it: {reason}") from None
    splits = loaded if isinstance(loaded, Mapping) else {"train": loaded}
    return {name: SavedSplit(name, rows) for name, rows in splits.items()}
