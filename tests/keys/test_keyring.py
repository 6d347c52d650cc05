"""The keys that are valid: as the file says now."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from app.errors import RateLimited
from app.keys.entries import KeyFileError
from app.keys.key import Key, Scope, hash_of, new_key_text
from app.keys.key_file import change_keys
from app.keys.keyring import Keyring


def added(path: Path, name: str, **fields: int) -> str:
    text = new_key_text()
    key = Key(name=name, sha256=hash_of(text), scopes=frozenset({Scope.GENERATE}), **fields)
    change_keys(path, lambda keys: [*keys, key])
    return text


def names(ring: Keyring, *texts: str) -> list[str | None]:
    found = [ring.find(text) for text in texts]
    return [key and key.name for key in found]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def test_changes_count_at_once(path: Path) -> None:
    first = added(path, "first")
    ring = Keyring(path)
    second = added(path, "second")
    assert names(ring, first, second, new_key_text(), "", hash_of(first)) == [
        "first",
        "second",
        None,
        None,
        None,
    ]
    change_keys(path, lambda keys: keys[1:])
    assert names(ring, first, second) == [None, "second"]
    assert len(ring) == 1


def test_without_a_file_no_key_is_valid(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = added(path, "a")
    ring = Keyring(path)
    data = path.read_bytes()
    path.unlink()
    assert names(ring, text, text) == [None, None]
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "no key is valid" in caplog.text
    path.write_bytes(data)
    assert names(ring, text) == ["a"]


def test_a_file_that_is_gone_for_a_moment_forgives_nothing(path: Path) -> None:
    text = added(path, "a", requests_per_minute=1, tokens_per_minute=10)
    ring = Keyring(path, lambda: 0.0)
    key = ring.find(text)
    assert key is not None
    ring.take(key, needs_tokens=True)
    data = path.read_bytes()
    path.unlink()
    assert ring.find(text) is None
    assert len(ring) == 0
    ring.charge("a", 10)  # of an answer that was under way
    path.write_bytes(data)
    key = ring.find(text)
    assert key is not None
    with pytest.raises(RateLimited, match="1 requests"):
        ring.take(key, needs_tokens=False)
    with pytest.raises(RateLimited, match=r"requests|tokens"):
        ring.take(replace(key, requests_per_minute=None), needs_tokens=True)


def test_a_malformed_file_leaves_the_keys_and_is_told_of_once(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = added(path, "a")
    ring = Keyring(path)
    data = path.read_bytes()
    for broken in (b"{", b'{"format": 3, "keys": []}'):
        path.write_bytes(broken)
        assert names(ring, text, text, text) == ["a"] * 3
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 2
    assert all("keys stay as they were" in record.getMessage() for record in errors)
    path.write_bytes(data.replace(b'"a"', b'"renamed"'))
    assert names(ring, text) == ["renamed"]


@contextmanager
def as_nobody() -> Iterator[None]:
    """Without the rights of root, which may read everything."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_an_unreadable_file_is_tried_again(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = added(path, "a")
    ring = Keyring(path)
    added(path, "b")
    path.chmod(0)
    with as_nobody():
        assert names(ring, text, text) == ["a", "a"]
    assert caplog.text.count("can't be read") == 1
    change_keys_as_owner(path)
    assert names(ring, text) == [None]


def change_keys_as_owner(path: Path) -> None:
    path.chmod(0o600)
    change_keys(path, lambda keys: keys[1:])


def test_a_directory_in_its_place_is_tried_again(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = added(path, "a")
    ring = Keyring(path)
    data = path.read_bytes()
    path.unlink()
    path.mkdir()
    assert names(ring, text, text) == ["a", "a"]
    assert caplog.text.count("can't be read") == 1
    path.rmdir()
    path.write_bytes(data.replace(b'"a"', b'"z"'))
    assert names(ring, text) == ["z"]


def test_a_server_does_not_start_without_its_keys(path: Path) -> None:
    with pytest.raises(KeyFileError, match=r"no key file .*promptplex keys add"):
        Keyring(path)
    path.mkdir()
    with pytest.raises(KeyFileError, match="can't be read"):
        Keyring(path)
    path.rmdir()
    path.write_text("{}")
    with pytest.raises(KeyFileError, match="can't be used"):
        Keyring(path)


def test_what_was_used_outlives_a_change_of_the_file(path: Path) -> None:
    text = added(path, "a", requests_per_minute=1)
    ring = Keyring(path, lambda: 0.0)
    key = ring.find(text)
    assert key is not None
    ring.take(key, needs_tokens=False)
    added(path, "b")
    key = ring.find(text)
    assert key is not None
    with pytest.raises(RateLimited):
        ring.take(key, needs_tokens=False)
    ring.charge("nobody", 5)
