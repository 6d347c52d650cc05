"""From files to a Dataset: one file that is split by hash, or files that are called train, dev and test."""

import hashlib
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Protocol

from app.errors import InvalidRequest
from app.training.checks import check_labels, disjoint, warnings_of
from app.training.data_files import READERS, DataFile, Row, name_of, refused
from app.training.examples import Dataset, Example, Form
from app.training.forms import FormReader
from app.training.near_duplicates import near_duplicate_warnings
from app.training.saved_datasets import is_saved_dataset, saved_splits
from app.training.splits import Splits, by_input, split_by_hash

MIN_INPUTS = 10  # different ones, of which some are held out
MAX_SHARE = 0.5
_SPLIT_NAMES = {
    "train": "train",
    "dev": "dev",
    "validation": "dev",
    "valid": "dev",
    "val": "dev",
    "test": "test",
}


def read_dataset(
    paths: Path | Sequence[Path],
    *,
    split_seed: int = 0,
    dev_share: float | None = None,
    test_share: float | None = None,
) -> Dataset:
    """Read one task's data: a file, files called train, dev and test, their directory, or a saved dataset.

    Shares are those of one file, or of train where there is no dev or test; None: by size. `split_seed` is of
    the split alone: with another one, other lines are held out.

    Raise InvalidRequest, which names the file, the line and the field that is wrong.
    """
    _check_share("dev", dev_share)
    _check_share("test", test_share)
    sources = _sources([paths] if isinstance(paths, Path) else paths)
    reader = FormReader()
    read = {split: _examples(reader, source) for split, source in sources.items()}
    given, moved = disjoint(Splits(read["train"], read.get("dev", ()), read.get("test", ())))
    if "dev" in read and not given.dev:
        raise refused(sources["dev"].name, "all its inputs are held out in test too; expected other ones")
    cut = split_by_hash(
        _enough(given, sources["train"].name, moved),
        split_seed=split_seed,
        dev_share=0 if "dev" in read else dev_share,
        test_share=0 if "test" in read else test_share,
        by_label=reader.form is Form.LABEL or bool(reader.choices),
    )
    splits = Splits(cut.train, given.dev or cut.dev, given.test or cut.test)
    choices = check_labels(splits) if reader.form is Form.LABEL else reader.choices or ()
    return Dataset(
        train=splits.train,
        dev=splits.dev,
        test=splits.test,
        digest=_digest(sources.values()),
        form=reader.form or Form.INPUTS,
        choices=choices,
        warnings=(*moved, *warnings_of(splits, choices), *near_duplicate_warnings(splits)),
    )


def read_examples(path: Path) -> list[Example]:
    """Read all lines of one file; none is split off. Raise InvalidRequest, as `read_dataset` does."""
    reader, file = FormReader(), DataFile.at(path)
    return list(_examples(reader, file))


def _examples(reader: FormReader, source: "Source") -> tuple[Example, ...]:
    """Return all examples of a source, which an error closes at once."""
    with closing(source.rows()) as rows:
        return tuple(reader.example(source.name, row) for row in rows)


def read_tasks(
    tasks: Mapping[str, Path | Sequence[Path]],
    *,
    split_seed: int = 0,
    dev_share: float | None = None,
    test_share: float | None = None,
) -> dict[str, Dataset]:
    """Read each task's data by name. Raise InvalidRequest, which also names the task of several ones."""
    found = {}
    for name, paths in tasks.items():
        try:
            found[name] = read_dataset(
                paths, split_seed=split_seed, dev_share=dev_share, test_share=test_share
            )
        except InvalidRequest as error:
            if len(tasks) == 1:
                raise
            raise refused(name, error.message) from None
    return found


def named_paths(arguments: Sequence[str]) -> dict[str, Path] | None:
    """Return the paths of NAME=PATH by name; None: these are plain paths.

    Raise InvalidRequest: some have a name and some don't, or a name stands twice.
    """
    parts = [_named(argument) for argument in arguments]
    names = [name for name, _ in parts]
    if not any(names):
        return None
    if not all(names):
        raise refused(
            parts[names.index("")][1], "it has no name, but others have; write NAME=PATH for each task"
        )
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise refused(twice, "two tasks have this name; expected a NAME=PATH for each task")
    return {name: Path(path) for name, path in parts}


def _named(argument: str) -> tuple[str, str]:
    name, equals, path = argument.partition("=")
    return ("", argument) if not equals or Path(argument).exists() else (name, path)


def _check_share(name: str, share: float | None) -> None:
    if share is not None and not 0 <= share <= MAX_SHARE:
        raise InvalidRequest(f"the share of {name} must be from 0 to {MAX_SHARE}", param=f"{name}_share")


def _enough(given: Splits, name: str, moved: Sequence[str]) -> Mapping[str, Sequence[Example]]:
    """Return train's examples by input. Raise InvalidRequest: they are too few."""
    groups = by_input(given.train)
    if len(groups) < MIN_INPUTS:
        raise refused(
            name,
            f"it holds {len(groups)} different inputs to train on; expected at least {MIN_INPUTS}, and a few "
            f"hundred for a good prompt{'; '.join(['', *moved])}",
        )
    return groups


class Source(Protocol):
    """Rows of one split, and the hash of the bytes that they come from, once they were read."""

    @property
    def name(self) -> str:
        """Return how messages call it."""
        ...

    @property
    def sha256(self) -> str:
        """Return the hash in hex."""
        ...

    def rows(self) -> Generator[Row, None, None]:
        """Yield the records. Raise InvalidRequest."""
        ...


def _sources(paths: Sequence[Path]) -> Mapping[str, Source]:
    """Return the source of each split; one file alone is train's."""
    if len(paths) != 1:
        return _by_split([(path.stem, DataFile.at(path)) for path in paths], "the files")
    [path] = paths
    where = name_of(path)
    if is_saved_dataset(path):
        return _by_split(list(saved_splits(path).items()), where)
    if not path.is_dir():
        return {"train": DataFile.at(path)}
    files = sorted(each for each in path.iterdir() if each.suffix.lower() in READERS)
    if not files:
        kinds = ", ".join(READERS)
        raise refused(where, f"the directory holds no {kinds} file; expected train, and perhaps dev and test")
    return _by_split([(each.stem, DataFile.at(each)) for each in files], where)


def _by_split(named: Sequence[tuple[str, Source]], where: str) -> dict[str, Source]:
    found: dict[str, Source] = {}
    for name, source in named:
        split = _SPLIT_NAMES.get(name.lower())
        if split is None:
            raise refused(
                where, f"{source.name} is called neither train, dev (validation, valid, val) nor test"
            )
        if split in found:
            raise refused(where, f"{found[split].name} and {source.name} are both {split}; leave one out")
        found[split] = source
    if "train" not in found:
        raise refused(where, "nothing in it is called train")
    return {split: found[split] for split in ("train", "dev", "test") if split in found}


def _digest(sources: Collection[Source]) -> str:
    if len(sources) == 1:
        return next(iter(sources)).sha256
    listed = sorted(f"{source.sha256}  {source.name}\n" for source in sources)
    return hashlib.sha256("".join(listed).encode()).hexdigest()
