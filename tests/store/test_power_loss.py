"""When the power fails, what was not synced may be lost, in every combination: old state or new.

The model: a directory's entries change when the directory is synced; before that, each change since the
last sync may have reached the disk or not, independently of the others. A file's bytes are on disk when the
file is synced; before that it may be empty, half written, or whole.
"""

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from app.errors import NotFound, PromptplexError
from app.prompt import VersionDraft
from app.store.files import DurableFiles
from app.store.prompt_store import PromptStore, open_store
from tests.store.builders import soft
from tests.store.faulty_disks import Call, RecordingDisk

OLD, NEW = soft(seed=1), soft(seed=2)


@dataclass
class Directory:
    entries: dict[str, int] = field(default_factory=dict)
    pending: list[tuple[str, int | None]] = field(default_factory=list)  # None: removed


@dataclass
class File:
    durable: bytes | None = b""
    written: bytes = b""


@dataclass
class Machine:
    """What is on the disk for certain, and what is only under way."""

    root: int
    directories: dict[int, Directory] = field(default_factory=dict)
    files: dict[int, File] = field(default_factory=dict)

    def do(self, call: Call) -> None:
        match call.name:
            case "mkdir":
                self.directories[call.target] = Directory()
                self.directories[call.inode].pending.append((call.entry, call.target))
            case "create":
                self.files[call.target] = File()
                self.directories[call.inode].pending.append((call.entry, call.target))
            case "link":
                self.directories[call.inode].pending.append((call.entry, call.target))
            case "unlink":
                self.directories[call.inode].pending.append((call.entry, None))
            case "write":
                file = self.files[call.inode]
                file.written += call.data
                file.durable = None
            case "sync" if call.inode in self.directories:
                directory = self.directories[call.inode]
                for entry, target in directory.pending:
                    _apply(directory.entries, entry, target)
                directory.pending = []
            case "sync" if call.inode in self.files:
                self.files[call.inode].durable = self.files[call.inode].written

    def outcomes(self) -> Iterator[dict[Path, bytes | None]]:
        """Every tree that the disk may show after a power failure now; None is a directory."""
        uncertain = [
            (inode, index) for inode, each in self.directories.items() for index in range(len(each.pending))
        ]
        unsynced = [inode for inode, file in self.files.items() if file.durable is None]
        for kept in itertools.product((False, True), repeat=len(uncertain)):
            chosen = {where for where, keep in zip(uncertain, kept, strict=True) if keep}
            for amounts in itertools.product((0.0, 0.5, 1.0), repeat=len(unsynced)):
                lengths = dict(zip(unsynced, amounts, strict=True))
                yield dict(self._tree(self.root, Path(), chosen, lengths))

    def _tree(
        self, inode: int, path: Path, chosen: set[tuple[int, int]], lengths: dict[int, float]
    ) -> Iterator[tuple[Path, bytes | None]]:
        directory = self.directories[inode]
        entries = dict(directory.entries)
        for index, (entry, target) in enumerate(directory.pending):
            if (inode, index) in chosen:
                _apply(entries, entry, target)
        for entry, target in entries.items():
            if target in self.directories:
                yield path / entry, None
                yield from self._tree(target, path / entry, chosen, lengths)
            else:
                file = self.files[target]
                whole = file.written if file.durable is None else file.durable
                yield path / entry, whole[: int(len(whole) * lengths.get(target, 1.0))]


def _apply(entries: dict[str, int], entry: str, target: int | None) -> None:
    if target is None:
        entries.pop(entry, None)
    else:
        entries[entry] = target


def _snapshot(root: Path) -> Machine:
    """A disk on which everything that is there is durable."""
    machine = Machine(root.stat().st_ino)
    for path in [root, *root.rglob("*")]:
        inode = path.stat().st_ino
        if path.is_dir():
            entries = {child.name: child.stat().st_ino for child in path.iterdir()}
            machine.directories[inode] = Directory(entries)
        else:
            machine.files[inode] = File(path.read_bytes(), path.read_bytes())
    return machine


def _materialize(tree: dict[Path, bytes | None], root: Path) -> None:
    root.mkdir()
    for path, data in sorted(tree.items()):
        if data is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(data)


def _publish(store: PromptStore, prompt_seed: int) -> None:
    prompt = soft(seed=prompt_seed)
    version, _ = store.publish("t", VersionDraft(prompt=prompt, notes=str(prompt_seed)))
    store.move_alias("t", "live", version.version)


def _live(store: PromptStore) -> str:
    """What is served; every version that is visible must be whole."""
    try:
        history = store.history("t")
    except NotFound:
        return "none"
    for version in history.versions:
        assert version.prompt_digest is not None
        store.read_blob(version.prompt_digest)
    try:
        return store.resolve("t").notes
    except NotFound:
        return "none"


@pytest.mark.parametrize("first", [True, False], ids=["a new task", "a second version"])
def test_old_state_or_new_state(first: bool, tmp_path: Path) -> None:
    root = tmp_path / "store"
    root.mkdir()
    if not first:
        _publish(open_store(root), 1)
    machine = _snapshot(root)
    before = "none" if first else "1"
    disk = RecordingDisk()
    _publish(PromptStore(DurableFiles(root, disk)), 2)
    assert [call.name for call in disk.calls].count("sync") >= 6
    seen: list[str] = []
    number = itertools.count()
    for call in disk.calls:
        machine.do(call)
        for tree in machine.outcomes():
            copy = tmp_path / str(next(number))
            _materialize(tree, copy)
            try:
                state = _live(open_store(copy))
            except PromptplexError as error:
                raise AssertionError(f"after {call.name}: {sorted(map(str, tree))}") from error
            assert state in (before, "2")
            seen.append(state)
            _publish(open_store(copy), 3)  # the next start goes on from there
            assert _live(open_store(copy)) == "3"
    assert set(seen) == {before, "2"}
    assert len(seen) > 50
    # What was acknowledged is there whatever is lost.
    assert {_live_of(tree, tmp_path / f"end-{index}") for index, tree in enumerate(machine.outcomes())} == {
        "2"
    }


def _live_of(tree: dict[Path, bytes | None], root: Path) -> str:
    _materialize(tree, root)
    return _live(open_store(root))


def test_the_model_notices_a_missing_sync(tmp_path: Path) -> None:
    """The same with a disk that forgets to sync files: torn versions must show, or the model is blind."""

    class Careless(RecordingDisk):
        def sync(self, descriptor: int) -> None:
            if os.path.isdir(f"/proc/self/fd/{descriptor}"):
                super().sync(descriptor)

    root = tmp_path / "store"
    root.mkdir()
    machine = _snapshot(root)
    disk = Careless()
    _publish(PromptStore(DurableFiles(root, disk)), 2)
    for call in disk.calls:
        machine.do(call)
    trees = [(tree, tmp_path / str(index)) for index, tree in enumerate(machine.outcomes())]
    assert any(_is_broken(tree, copy) for tree, copy in trees)


def _is_broken(tree: dict[Path, bytes | None], root: Path) -> bool:
    try:
        _live_of(tree, root)
    except PromptplexError:
        return True
    return False
