"""What it costs to publish a prompt beyond validating it: ``python -m benchmarks.publishing``.

A publication is `PromptStore.publish` and `PromptStore.move_alias` of a prompt that is read and validated
already: what an upload's caller waits for before the answer, but for import, validation and the trial run.
It is measured on new tasks and on one task that gets version after version.

Beside each publication stands the disk's own floor, on the same file system at the same time: files of
the same sizes, each created, written and synced, and the same number of directory syncs. What has to be
synced is not assumed: one publication of each kind is watched.
"""

import argparse
import json
import os
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import psutil

from app.prompt import Prompt, VersionDraft
from app.store.prompt_store import PromptStore, open_store
from benchmarks.registered_tasks import publish_task, soft_prompt
from benchmarks.spread import Spread
from benchmarks.tails import percentile

BAR_MILLISECONDS = 10.0  # the median stays below it: single digits
_BF16_BYTES = 2
_WARM_UPS = 3  # publications of each kind before anything is watched or timed


@dataclass(frozen=True, slots=True)
class Sync:
    """One fsync: of a file with so many bytes, or of a directory (None)."""

    file_bytes: int | None


class Publisher:
    """Publishes one new random prompt after the other, on new tasks or on an existing one."""

    def __init__(self, store: PromptStore, shape: tuple[int, int]) -> None:
        self._store = store
        self._shape = shape  # [p, d]
        self._numbers = count()

    def prepare(self, *, fresh: bool) -> Callable[[], object]:
        """All but the publication itself: random bytes, the canonical file, its hash."""
        name = f"fresh-{next(self._numbers)}" if fresh else "existing"
        draft = VersionDraft(prompt=self._random_prompt())
        return lambda: publish_task(self._store, name, draft)

    def _random_prompt(self) -> Prompt:
        p, d = self._shape
        return soft_prompt(self._shape, os.urandom(p * d * _BF16_BYTES))


class Floor:
    """The least that a disk takes for given syncs: plain files side by side in one directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._numbers = count()

    def replay(self, syncs: Sequence[Sync]) -> None:
        """The same syncs in the same order; a directory is synced when a file has come into it."""
        directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for sync in syncs:
                if sync.file_bytes is None:
                    os.fsync(directory)
                else:
                    self._write(bytes(sync.file_bytes), directory)
        finally:
            os.close(directory)

    def _write(self, data: bytes, directory: int) -> None:
        name = f"{next(self._numbers)}.bin"
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644, dir_fd=directory)
        try:
            os.write(file, data)
            os.fsync(file)
        finally:
            os.close(file)


@contextmanager
def watched_syncs() -> Iterator[list[Sync]]:
    """Every fsync of this process within the block, in order."""
    seen: list[Sync] = []
    fsync = os.fsync

    def watch(descriptor: int) -> None:
        status = os.fstat(descriptor)
        seen.append(Sync(None if stat.S_ISDIR(status.st_mode) else status.st_size))
        fsync(descriptor)

    os.fsync = watch  # type: ignore[assignment]  # counts, and passes on
    try:
        yield seen
    finally:
        os.fsync = fsync


def syncs_of(publisher: Publisher, *, fresh: bool) -> list[Sync]:
    """Of one publication, when those of first times (the store's own directories) are over."""
    for _ in range(_WARM_UPS):
        publisher.prepare(fresh=fresh)()
    publication = publisher.prepare(fresh=fresh)
    with watched_syncs() as syncs:
        publication()
    return syncs


def measure_kind(publisher: Publisher, floor: Floor, times: int, *, fresh: bool) -> dict[str, Any]:
    """Publications and floors in pairs, each next to the other; within pairs the order alternates."""
    syncs = syncs_of(publisher, fresh=fresh)
    taken: dict[str, list[float]] = {"publication": [], "floor": []}
    for number in range(times):
        work: dict[str, Callable[[], object]] = {
            "publication": publisher.prepare(fresh=fresh),
            "floor": lambda: floor.replay(syncs),
        }
        for name in sorted(work, reverse=bool(number % 2)):
            taken[name].append(milliseconds(work[name]))
    ratios = [mine / bare for mine, bare in zip(taken["publication"], taken["floor"], strict=True)]
    return {
        "milliseconds": {name: summary(values) for name, values in taken.items()},
        "ratio_to_floor": Spread.of(ratios).as_json(2),
        "file_syncs": sum(sync.file_bytes is not None for sync in syncs),
        "directory_syncs": sum(sync.file_bytes is None for sync in syncs),
        "file_bytes": sum(sync.file_bytes or 0 for sync in syncs),
        "reached": Spread.of(taken["publication"]).median < BAR_MILLISECONDS,
    }


def milliseconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    began = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - began)


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles and the 95th percentile."""
    return {**Spread.of(values).as_json(2), "p95": round(percentile(values, 95), 2)}


def file_system(path: Path) -> str:
    """The type of the file system that holds it: on `tmpfs`, syncing is free and figures mean little."""
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    return next((mounts[parent] for parent in (path, *path.parents) if parent in mounts), "unknown")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everything in a new directory below the chosen one, which goes afterwards."""
    shape = (options.virtual_tokens, options.hidden_size)
    with tempfile.TemporaryDirectory(dir=options.store_dir, prefix="publishing-") as name:
        folder = Path(name).resolve()
        (folder / "floor").mkdir()
        publisher, floor = Publisher(open_store(folder / "store"), shape), Floor(folder / "floor")
        report: dict[str, Any] = {
            "prompt_bytes": shape[0] * shape[1] * _BF16_BYTES,
            "times": options.times,
            "file_system": file_system(folder),
            "bar_milliseconds": BAR_MILLISECONDS,
        }
        for kind in ("fresh", "existing"):
            print(f"{options.times} publications, {kind} task", file=sys.stderr, flush=True)
            report[kind] = measure_kind(publisher, floor, options.times, fresh=kind == "fresh")
    return report


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [
        f"{report['prompt_bytes'] / 1000:.0f} kB prompts on {report['file_system']}, "
        f"{report['times']} times each; bar: a median below {report['bar_milliseconds']:.0f} ms\n",
        "| task | ms | quartiles | p95 | floor ms | ratio | syncs | bar |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind in ("fresh", "existing"):
        each = report[kind]
        mine, bare = each["milliseconds"]["publication"], each["milliseconds"]["floor"]
        low, high = mine["quartiles"]
        lines.append(
            f"| {kind} | {mine['median']} | {low} to {high} | {mine['p95']} | {bare['median']} | "
            f"{each['ratio_to_floor']['median']} | {each['file_syncs']} files, {each['directory_syncs']} "
            f"directories | {'reached' if each['reached'] else 'not reached'} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the options, measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.publishing", description=__doc__)
    parser.add_argument("--store-dir", type=Path, help="a directory on the disk in question; default: TMPDIR")
    parser.add_argument("--times", type=int, default=100, help="publications of each kind")
    parser.add_argument("--virtual-tokens", type=int, default=100)
    parser.add_argument(
        "--hidden-size", type=int, default=1024, help="with 100 virtual tokens 205 kB in bf16"
    )
    parser.add_argument("--out", type=Path, default=Path("build/bench/publishing.json"))
    options = parser.parse_args(arguments)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = run(options)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(table(report))
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
