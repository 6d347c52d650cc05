"""What a key file may hold, and how it says what is wrong."""

import json
from typing import Any

import pytest

from app.keys.entries import KeyFileError, format_keys, parse_keys
from app.keys.key import Key, Scope, hash_of, is_key_text, new_key_text

GOOD: dict[str, Any] = {"name": "web", "sha256": "0" * 64, "scopes": ["generate"]}


def written(*entries: Any) -> bytes:
    return json.dumps({"format": 1, "keys": list(entries)}).encode()


def test_keys_are_256_random_bits() -> None:
    texts = {new_key_text() for _ in range(1000)}
    assert len(texts) == 1000
    assert all(is_key_text(text) and len(text) == 47 for text in texts)
    assert not is_key_text("ppx_short")
    assert not is_key_text(new_key_text() + "\n")


def test_what_is_written_is_read_again() -> None:
    keys = (
        Key(name="web", sha256=hash_of("a"), scopes=frozenset({Scope.GENERATE})),
        Key(
            name="ci@team.example",
            sha256=hash_of("b"),
            scopes=frozenset(Scope) - {Scope.METRICS},
            tasks=("team-a-*", "demo"),
            requests_per_minute=60,
            tokens_per_minute=10_000,
            created="2026-01-31",
        ),
    )
    assert parse_keys(format_keys(keys)) == keys
    assert parse_keys(format_keys(())) == ()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not JSON"),
        (b"[]", "promptplex keys add"),
        (b'{"format": 1}', "promptplex keys add"),
        (b'{"format": 1, "keys": [], "more": 1}', "promptplex keys add"),
        (b'{"format": 2, "keys": []}', "format is not 1"),
        (b'{"format": 1, "keys": {}}', "must be a list"),
        (b'{"format": 1, "keys": [], "keys": []}', "twice"),
        (written("web"), "key 1: it must be an object"),
        (written(GOOD | {"scope": "generate"}), "unknown field 'scope'"),
        (written({"name": "web", "scopes": ["generate"]}), "has no sha256"),
        (written(GOOD | {"name": ""}), "can't be a key's name"),
        (written(GOOD | {"name": "a b"}), "can't be a key's name"),
        (written(GOOD | {"name": "a\n"}), "can't be a key's name"),
        (written(GOOD | {"name": "x" * 65}), "at most 64"),
        (written(GOOD | {"sha256": "ppx_" + "A" * 43}), "not the key itself"),
        (written(GOOD | {"sha256": "A" * 64}), "lower-case hex"),
        (written(GOOD | {"sha256": 5}), "must be text"),
        (written(GOOD | {"scopes": []}), "one or more of generate, upload, admin, metrics"),
        (written(GOOD | {"scopes": "generate"}), "one or more of"),
        (written(GOOD | {"scopes": ["generate", "root"]}), "no scope 'root'"),
        (written(GOOD | {"scopes": [1]}), "no scope '1'"),
        (written(GOOD | {"tasks": []}), "leave it out for all"),
        (written(GOOD | {"tasks": "a-*"}), "leave it out for all"),
        (written(GOOD | {"tasks": ["a", "b c"]}), "no pattern"),
        (written(GOOD | {"tasks": ["a@3"]}), "without version"),
        (written(GOOD | {"scopes": ["generate", "metrics"], "tasks": ["a"]}), "key 1: .*make two keys"),
        (written(GOOD | {"requests_per_minute": 0}), "whole number from 1"),
        (written(GOOD | {"requests_per_minute": True}), "whole number from 1"),
        (written(GOOD | {"tokens_per_minute": 1.5}), "whole number from 1"),
        (written(GOOD, GOOD | {"sha256": "1" * 64}), "two keys have the name web"),
        (written(GOOD, GOOD | {"name": "other"}), "two keys have the sha256"),
    ],
)
def test_what_is_wrong_is_told(data: bytes, says: str) -> None:
    with pytest.raises(KeyFileError, match=says):
        parse_keys(data)


@pytest.mark.parametrize(
    ("patterns", "reached", "not_reached"),
    [
        (None, ["sentiment", "tiny-base"], []),
        (("team-a-*",), ["team-a-x", "team-a-"], ["team-a", "team-b-x", "x-team-a-x", "TEAM-A-X"]),
        (("a", "b?"), ["a", "bc"], ["b", "ab", "a/b"]),
    ],
)
def test_patterns_are_whole_and_mind_the_case(
    patterns: tuple[str, ...] | None, reached: list[str], not_reached: list[str]
) -> None:
    key = Key(name="k", sha256="", scopes=frozenset(), tasks=patterns)
    assert all(key.may_use(name) for name in reached)
    assert not any(key.may_use(name) for name in not_reached)
