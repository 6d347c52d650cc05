"""The file: replaced whole, never by two at once."""

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from app.keys.entries import KeyFileError
from app.keys.key import Key, Scope, hash_of, new_key_text
from app.keys.key_file import change_keys, read_keys


def key(name: str) -> Key:
    return Key(name=name, sha256=hash_of(new_key_text()), scopes=frozenset({Scope.GENERATE}))


def test_a_new_file_is_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    change_keys(path, lambda keys: [*keys, key("a")])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [each.name for each in read_keys(path)] == ["a"]
    assert os.listdir(tmp_path) == ["keys.json"]


def test_who_could_read_the_file_still_can(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    change_keys(path, lambda keys: [key("a")])
    path.chmod(0o666)  # nobody else should write it, though
    change_keys(path, lambda keys: [*keys, key("b")])
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    path = tmp_path / "link.json"
    path.symlink_to(tmp_path / "keys.json")
    change_keys(path, lambda keys: [*keys, key("a")])
    assert path.is_symlink()
    assert len(read_keys(tmp_path / "keys.json")) == 1


def test_a_change_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    change_keys(path, lambda keys: [key("a")])
    before = path.read_bytes()
    with pytest.raises(ZeroDivisionError):
        change_keys(path, lambda keys: [1 / 0])  # type: ignore[list-item]
    path.write_bytes(before[:-5])
    with pytest.raises(KeyFileError, match=r"keys\.json can't be used"):
        change_keys(path, lambda keys: [])
    assert path.read_bytes() == before[:-5]
    assert os.listdir(tmp_path) == ["keys.json"]


ADD_MANY = """
import sys
from pathlib import Path
from app.keys.key import Key, Scope, hash_of, new_key_text
from app.keys.key_file import change_keys
for number in range(25):
    key = Key(name=f"{sys.argv[2]}-{number}", sha256=hash_of(new_key_text()), scopes=frozenset({Scope.ADMIN}))
    change_keys(Path(sys.argv[1]), lambda keys: [*keys, key])
"""


def test_nothing_is_lost_between_processes_and_readers_see_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    change_keys(path, lambda keys: [])
    writers = [
        subprocess.Popen([sys.executable, "-c", ADD_MANY, str(path), name]) for name in ("a", "b", "c")
    ]
    counts = [0]
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            counts.append(len(read_keys(path)))  # raises where a file isn't whole

    reader = threading.Thread(target=read)
    reader.start()
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    done.set()
    reader.join()
    assert len(read_keys(path)) == 75
    assert counts == sorted(counts)
