"""The data of a run on disk, under names of our own: clients' names of files go nowhere."""

import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import BinaryIO

from app.errors import InvalidRequest

PARTS = ("data", "train", "dev", "test")
_SNIFFED_BYTES = 65_536
_BOM = b"\xef\xbb\xbf"


def check_parts(names: Collection[str]) -> None:
    """Raise InvalidRequest unless there is `data` alone, or `train` with or without the others."""
    if ("data" in names) == ("train" in names) or ("data" in names and len(names) > 1):
        raise InvalidRequest(
            "Send the examples as the part data, which is split here, or as train with dev, test or both.",
            param="data",
        )


def write_data(directory: Path, parts: Mapping[str, BinaryIO]) -> None:
    """Copy the parts into files. Raise OSError."""
    for name, source in parts.items():
        source.seek(0)
        suffix = _suffix(source.read(_SNIFFED_BYTES))
        source.seek(0)
        with open(directory / f"{name}{suffix}", "xb") as file:
            shutil.copyfileobj(source, file, 1 << 20)


def data_paths(directory: Path) -> list[Path]:
    """Return the files of a run."""
    return [directory / name for name in sorted(os.listdir(directory))]


def _suffix(begin: bytes) -> str:
    """Return how the name of a file of such bytes ends: JSON lines, or a table with commas or tabs."""
    text = begin.removeprefix(_BOM).lstrip()
    if text[:1] in (b"{", b"["):
        return ".jsonl"
    header = text.split(b"\n", 1)[0]
    return ".tsv" if b"\t" in header and b"," not in header else ".csv"
