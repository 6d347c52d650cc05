"""From files to a Dataset: one file that is split by hash, or files that are called train, dev and test."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from app.errors import InvalidRequest
from app.training.checks import check_labels, disjoint, warnings_of
from app.training.data_files import READERS, DataFile, refused
from app.training.examples import Dataset, Example, Form
from app.training.forms import FormReader
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
    """Read one task's data: a file, a directory of train, dev and test files, or those files.

    Shares are those of one file, or of train where there is no dev or test file; None: by size. `split_seed`
    is of the split alone: with another one, other lines are held out.

    Raise InvalidRequest, which names the file, the line and the field that is wrong.
    """
    _check_share("dev", dev_share)
    _check_share("test", test_share)
    files = _files([paths] if isinstance(paths, Path) else [*paths])
    reader, read, digests = FormReader(), dict[str, tuple[Example, ...]](), dict[str, str]()
    for split, path in files.items():
        file = DataFile.at(path)
        read[split] = tuple(reader.example(file, row) for row in file.rows())
        digests[path.name] = file.digest.hexdigest()
    assert reader.form is not None
    kept, moved = disjoint(Splits(read["train"], read.get("dev", ()), read.get("test", ())))
    groups = by_input(kept.train)
    _check_count(len(groups), files["train"].name)
    splits = split_by_hash(
        groups,
        split_seed=split_seed,
        dev_share=0 if "dev" in files else dev_share,
        test_share=0 if "test" in files else test_share,
        by_label=reader.form is Form.LABEL,
    )
    splits = Splits(splits.train, kept.dev or splits.dev, kept.test or splits.test)
    choices = _choices(reader, splits)
    return Dataset(
        train=splits.train,
        dev=splits.dev,
        test=splits.test,
        digest=_digest(digests),
        form=reader.form,
        choices=choices,
        warnings=(*moved, *warnings_of(splits, choices)),
    )


def read_tasks(
    tasks: Mapping[str, Path],
    *,
    split_seed: int = 0,
    dev_share: float | None = None,
    test_share: float | None = None,
) -> dict[str, Dataset]:
    """Read the data of several tasks by name. Raise InvalidRequest, which also names the task."""
    found = {}
    for name, path in tasks.items():
        try:
            found[name] = read_dataset(
                path, split_seed=split_seed, dev_share=dev_share, test_share=test_share
            )
        except InvalidRequest as error:
            raise refused(name, error.message) from None
    return found


def _check_share(name: str, share: float | None) -> None:
    if share is not None and not 0 <= share <= MAX_SHARE:
        raise InvalidRequest(f"the share of {name} must be from 0 to {MAX_SHARE}", param=f"{name}_share")


def _check_count(count: int, name: str) -> None:
    if count < MIN_INPUTS:
        raise refused(
            name,
            f"it holds {count} different inputs to train on; expected at least {MIN_INPUTS}, and a few "
            "hundred for a good prompt",
        )


def _files(paths: Sequence[Path]) -> dict[str, Path]:
    """Return the file of each split; one file alone is train's."""
    if len(paths) == 1 and paths[0].is_dir():
        return _of_directory(paths[0])
    if len(paths) == 1:
        return {"train": paths[0]}
    return _by_split(paths, "the files")


def _of_directory(directory: Path) -> dict[str, Path]:
    found = sorted(path for path in directory.iterdir() if path.suffix.lower() in READERS)
    if not found:
        raise refused(
            directory.name or str(directory),
            f"the directory holds no {', '.join(READERS)} file; expected train, and perhaps dev and test",
        )
    return _by_split(found, directory.name or str(directory))


def _by_split(paths: Sequence[Path], where: str) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in paths:
        split = _SPLIT_NAMES.get(path.stem.lower())
        if split is None:
            raise refused(
                where, f"{path.name} is called neither train, dev (validation, valid, val) nor test"
            )
        if split in files:
            raise refused(where, f"{files[split].name} and {path.name} are both {split}; leave one out")
        files[split] = path
    if "train" not in files:
        raise refused(where, "there is no file called train")
    return {split: files[split] for split in ("train", "dev", "test") if split in files}


def _digest(digests: Mapping[str, str]) -> str:
    if len(digests) == 1:
        return next(iter(digests.values()))
    listed = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(listed.encode()).hexdigest()


def _choices(reader: FormReader, splits: Splits) -> tuple[str, ...]:
    """Return the labels of the data, in an order that doesn't depend on that of the lines."""
    if reader.form is not Form.LABEL:
        return reader.choices or ()
    return check_labels(splits)
