"""The append-only store: what was acknowledged stays, what was tampered with is never served."""

import errno
import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from app.errors import Conflict, CorruptData, InvalidRequest, NotFound, StoreFull
from app.prompt import Prompt, PromptKind, VersionDraft
from app.store.manifests import seal
from app.store.prompt_store import PromptStore, open_store
from tests.store.builders import prefix, soft, tree

SOFT, OTHER = soft(seed=1), prefix(seed=2)


def draft(prompt: Prompt | None = SOFT, **changes: Any) -> VersionDraft:
    return VersionDraft(prompt=prompt, **changes)


def publish_live(store: PromptStore, task: str, *templates: str) -> None:
    for template in templates:
        version, _ = store.publish(task, draft(template=template))
        store.move_alias(task, "live", version.version)


def live(store: PromptStore, task: str = "t") -> int:
    return store.resolve(task).version


def test_publish_and_read_back(root: Path, store: PromptStore) -> None:
    full = VersionDraft(
        prompt=OTHER,
        template="Q: {q}\u2028é",
        defaults={"max_new_tokens": 5, "temperature": 0.7, "stop": ["\n"]},
        choices=("yes", {"value": "no", "text": " no"}),
        examples=({"inputs": "a", "expected": "b"},),
        notes="first",
        base={"name": "base", "revision": None},
        provenance={"uploader": "me"},
    )
    version, created = store.publish("t", full)
    assert created
    assert (version.version, version.kind, version.num_virtual_tokens) == (1, PromptKind.PREFIX, 3)
    assert version.prompt_digest == OTHER.digest
    assert version.geometry == {"layers": {"0": [2, 4, 4], "1": [2, 4, 4]}, "num_virtual_tokens": 3}
    assert version.choices == full.choices
    assert version.defaults == full.defaults
    assert version.examples == full.examples
    assert (version.template, version.notes, version.base) == (full.template, full.notes, full.base)
    assert version.provenance["uploader"] == "me"
    assert "published_at" in version.provenance
    assert store.read_blob(OTHER.digest) == OTHER.data
    assert open_store(root).history("t").versions == (version,)
    assert sorted(tree(root)) == [
        f"blobs/{OTHER.digest}.safetensors",
        f"tasks/t/heads/version-1-{version.digest}",
        "tasks/t/versions/1.json",
    ]


def test_text_only(store: PromptStore) -> None:
    version, _ = store.publish("t", draft(None, template="{x}"))
    assert (version.kind, version.prompt_digest, version.num_virtual_tokens) == (PromptKind.TEXT, None, 0)


def test_the_same_upload_is_the_same_version(root: Path, store: PromptStore) -> None:
    first, _ = store.publish("t", draft(notes="n", provenance={"uploader": "a"}))
    second, created = open_store(root).publish("t", draft(notes="n", provenance={"uploader": "b"}))
    assert (second, created) == (first, False)
    for changed in (
        draft(OTHER, notes="n"),
        draft(notes="other"),
        draft(notes="n", template="{x}"),
        draft(notes="n", defaults={"top_k": 1}),
        draft(notes="n", defaults={"top_k": True}),
        draft(notes="n", choices=("a",)),
        draft(notes="n", examples=({"inputs": "a"},)),
        draft(notes="n", base={"name": "b"}),
    ):
        assert store.publish("t", changed)[1]
    assert [version.version for version in store.history("t").versions] == list(range(1, 10))
    assert store.publish("other", draft(notes="n"))[1], "another task is another version"


@pytest.mark.parametrize(
    "changes",
    [
        {"defaults": {"a": float("nan")}},
        {"defaults": {1: 2}},
        {"defaults": {"a": object()}},
        {"defaults": {"a": 2**80}},
        {"notes": "\ud800"},
        {"notes": "x" * (1 << 20)},
        {"provenance": {"a": b""}},
    ],
)
def test_settings_must_be_json(changes: dict[str, Any], root: Path, store: PromptStore) -> None:
    with pytest.raises(InvalidRequest):
        store.publish("t", draft(**changes))
    assert not root.exists()


def test_references(store: PromptStore) -> None:
    publish_live(store, "t", "a", "b", "c")
    store.move_alias("t", "canary", 1)
    digest = store.history("t").versions[1].digest
    found = {
        reference: store.resolve(reference).version
        for reference in ("t", "t@live", "t@canary", "t@1", "t@3", f"t@sha256:{digest}")
    }
    assert list(found.values()) == [3, 3, 1, 1, 3, 2]
    for missing in ("u", "u@1", "t@4", "t@nope", "t@sha256:" + "0" * 64):
        with pytest.raises(NotFound):
            store.resolve(missing)
    for malformed in (
        "t@",
        "t@0",
        "t@-1",
        "t@03",
        "t@sha256:abc",
        "t@LIVE",
        "t@a@b",
        "@live",
        "t@none",
        "t@a/b",
    ):
        with pytest.raises(InvalidRequest):
            store.resolve(malformed)


def test_a_version_without_release_is_found_by_number_only(root: Path, store: PromptStore) -> None:
    store.publish("t", draft())
    with pytest.raises(NotFound, match="no alias 'live'; it has: none"):
        store.resolve("t")
    other = open_store(root)
    assert other.resolve("t@1").version == 1
    version, _ = store.publish("t", draft(notes="2"))
    assert other.resolve("t@2") == version
    assert other.resolve(f"t@sha256:{version.digest}") == version


def test_another_process_is_seen_at_once(root: Path, store: PromptStore) -> None:
    other = open_store(root)
    publish_live(store, "t", "a")
    for number, template in enumerate("bcdef", start=2):
        assert live(other) == number - 1
        publish_live(store, "t", template)
        assert live(other) == number
    store.rollback("t")
    assert live(other) == 5


def test_rollback_walks_back(store: PromptStore) -> None:
    publish_live(store, "t", "a", "b", "c")
    store.move_alias("t", "canary", 1)
    assert store.rollback("t").aliases == {"live": 2, "canary": 1}
    assert live(store) == 2
    store.rollback("t", who="me", why="worse")
    assert live(store) == 1
    release = store.history("t").releases[-1]
    assert (release.number, release.action, release.who, release.why) == (6, "rollback", "me", "worse")
    with pytest.raises(Conflict, match="no earlier version"):
        store.rollback("t")
    store.move_alias("t", "live", 3)
    store.move_alias("t", "live", 2)
    assert [store.rollback("t").aliases["live"] for _ in range(2)] == [3, 1]
    with pytest.raises(Conflict):
        store.rollback("t", "canary")
    with pytest.raises(NotFound, match="it has: canary, live"):
        store.rollback("t", "nope")


def test_compare_and_set(store: PromptStore) -> None:
    publish_live(store, "t", "a", "b")
    with pytest.raises(Conflict, match="last release is 2"):
        store.move_alias("t", "live", 1, expected_release=1)
    assert store.move_alias("t", "live", 1, expected_release=2).number == 3
    assert store.move_alias("t", "live", 1).number == 3, "it means that already"
    store.publish("u", draft())
    assert store.move_alias("u", "live", 1, expected_release=0).number == 1
    with pytest.raises(NotFound, match="no version 9"):
        store.move_alias("t", "live", 9)
    with pytest.raises(NotFound):
        store.move_alias("none-such", "live", 1)
    for alias in ("", "none", "7", "A", "a/b", "../x", "x" * 65):
        with pytest.raises(InvalidRequest):
            store.move_alias("t", alias, 1)


def test_releases_are_chained(root: Path, store: PromptStore) -> None:
    publish_live(store, "t", "a", "b")
    first, second = open_store(root).history("t").releases
    assert first.previous_digest is None
    assert second.previous_digest == first.digest
    assert second.manifest_digests == {2: store.resolve("t@2").digest}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def rewrite(path: Path, **changes: Any) -> None:
    """A careful forger: canonical JSON again, with the right checksum."""
    fields = json.loads(path.read_bytes()) | changes
    del fields["checksum"]
    path.write_bytes(seal(fields))


TAMPERING: dict[str, Callable[[Path], Any]] = {
    "flipped bit in a manifest": lambda task: flip(task / "versions/1.json"),
    "flipped bit in a release": lambda task: flip(task / "releases/2.json"),
    "manifest changed": lambda task: rewrite(task / "versions/2.json", template="evil"),
    "release changed": lambda task: rewrite(task / "releases/1.json", who="somebody else"),
    "alias changed": lambda task: rewrite(task / "releases/1.json", aliases={"live": 2}),
    "manifest of another number": lambda task: (task / "versions/2.json").write_bytes(
        (task / "versions/1.json").read_bytes()
    ),
    "version removed": lambda task: (task / "versions/1.json").unlink(),
    "last version removed": lambda task: (task / "versions/3.json").unlink(),
    "release removed": lambda task: (task / "releases/2.json").unlink(),
    "empty release": lambda task: (task / "releases/3.json").write_bytes(b""),
    "future format": lambda task: rewrite(task / "releases/3.json", format="promptplex.release/9"),
    "link in place of a release": lambda task: relink(task / "releases/3.json"),
    "link in place of a directory": lambda task: relink(task / "versions"),
    "link in place of the task": lambda task: relink(task),
    "directory in place of a version": lambda task: (task / "versions/4.json").mkdir(),
    "fifo in place of a release": lambda task: os.mkfifo(task / "releases/4.json"),
}


def relink(path: Path) -> None:
    """Move it away and leave a symbolic link to it."""
    away = path.parent / "Away"
    path.rename(away)
    path.symlink_to(away)


@pytest.mark.parametrize("name", TAMPERING)
def test_tampering_is_found_and_stays_with_its_task(name: str, root: Path, store: PromptStore) -> None:
    publish_live(store, "bad", "a", "b", "c")
    publish_live(store, "good", "a")
    TAMPERING[name](root / "tasks" / "bad")
    fresh = open_store(root)
    assert fresh.list_tasks() == ["bad", "good"]
    with pytest.raises(CorruptData) as caught:
        fresh.resolve("bad")
    assert str(root) not in caught.value.message
    assert live(fresh, "good") == 1


@pytest.mark.parametrize("how", ["flip", "truncate", "remove", "link"])
def test_damaged_blobs_are_never_served(how: str, root: Path, store: PromptStore) -> None:
    store.publish("t", draft())
    path = root / "blobs" / f"{SOFT.digest}.safetensors"
    if how == "flip":
        flip(path)
    elif how == "truncate":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.rename(root / "away")
        if how == "link":
            path.symlink_to(root / "away")
    with pytest.raises(CorruptData):
        store.read_blob(SOFT.digest)
    assert not store.publish("t", draft())[1]
    assert store.read_blob(SOFT.digest) == SOFT.data, "the same upload heals it"


def test_blob_digests_are_no_paths(store: PromptStore) -> None:
    for digest in ("../../x", "", "A" * 64, "0" * 63):
        with pytest.raises(InvalidRequest):
            store.read_blob(digest)


def test_debris_and_strangers_are_ignored(root: Path, store: PromptStore) -> None:
    publish_live(store, "t", "a")
    for directory in ("tasks", "tasks/t/versions", "tasks/t/releases", "blobs"):
        for name in (".tmp-1-abc", "README", "Capital", "01.json", "x.json"):
            (root / directory / name).write_bytes(b"debris")
    (root / "tasks" / "empty" / "versions").mkdir(parents=True)
    fresh = open_store(root)
    assert fresh.list_tasks() == ["t"]
    assert live(fresh) == 1
    publish_live(fresh, "t", "b")
    assert live(store) == 2


def test_no_store_yet(root: Path, store: PromptStore) -> None:
    assert store.list_tasks() == []
    with pytest.raises(NotFound, match="There is no task 't'"):
        store.resolve("t")
    with pytest.raises(NotFound):
        store.history("t")
    assert not root.exists()


class Failing:
    """An os function that fails at its nth call."""

    def __init__(self, real: Callable[..., Any], nth: int, number: int) -> None:
        self.real, self.nth, self.number, self.calls = real, nth, number, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == self.nth:
            raise OSError(self.number, os.strerror(self.number))
        return self.real(*args, **kwargs)


@pytest.mark.parametrize("function", ["write", "fsync", "link", "mkdir", "open"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_disk_errors_are_not_acknowledged(
    function: str, number: int, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever call of a publish fails: a typed error, no debris, reading goes on, and a retry works."""
    store = open_store(root)
    publish_live(store, "old", "a")
    messages: list[str] = []
    for nth in range(1, 90):
        task = f"t{nth}"
        failing = Failing(getattr(os, function), nth, number)
        monkeypatch.setattr(os, function, failing)
        try:
            open_store(root).publish(task, draft(soft(seed=nth)))
        except (StoreFull, CorruptData) as error:
            messages.append(error.message)
        finally:
            monkeypatch.undo()
        assert not [name for name in tree(root) if ".tmp-" in name]
        assert live(open_store(root), "old") == 1
        version, _ = store.publish(task, draft(soft(seed=nth)))
        assert store.read_blob(str(version.prompt_digest)) == soft(seed=nth).data
        if failing.calls < nth:
            break
    else:
        pytest.fail("it never ran to its end")
    assert len(messages) >= 2
    assert str(root) not in "".join(messages)


def test_a_read_only_store_is_read(root: Path, store: PromptStore, monkeypatch: pytest.MonkeyPatch) -> None:
    publish_live(store, "t", "a", "b")
    before = tree(root)
    real = os.open

    def read_only_open(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, "read-only")
        return real(path, flags, *args, **kwargs)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EROFS, "read-only")

    monkeypatch.setattr(os, "open", read_only_open)
    for name in ("mkdir", "link", "unlink"):
        monkeypatch.setattr(os, name, refuse)
    shipped = open_store(root)
    assert shipped.list_tasks() == ["t"]
    assert live(shipped) == 2
    assert shipped.read_blob(SOFT.digest) == SOFT.data
    assert shipped.publish("t", draft(template="a"))[0].version == 1
    for write in (
        lambda: shipped.publish("t", draft(notes="new")),
        lambda: shipped.rollback("t"),
        lambda: shipped.publish("u", draft(OTHER)),
    ):
        with pytest.raises(StoreFull, match="read-only"):
            write()
    assert tree(root) == before


def test_threads_publish_and_move_at_once(root: Path, store: PromptStore) -> None:
    barrier = threading.Barrier(6)

    def work(worker: int) -> list[int]:
        barrier.wait()
        numbers = []
        for step in range(5):
            version, created = store.publish("t", draft(notes=f"{worker}-{step}"))
            assert created
            store.move_alias("t", "live", version.version)
            same, created = store.publish("t", draft(notes="shared"))
            assert store.resolve(f"t@{same.version}") == same
            numbers.append(version.version)
        return numbers

    with ThreadPoolExecutor(6) as pool:
        numbers = [number for mine in pool.map(work, range(6)) for number in mine]
    history = open_store(root).history("t")
    assert sorted(numbers) == sorted(set(numbers))
    assert len(history.versions) == 31, "thirty and the one they share"
    assert len(history.releases) == 30
    assert store.history("t") == history


def test_one_winner_per_compare_and_set(store: PromptStore) -> None:
    publish_live(store, "t", "a", "b", "c", "d")
    barrier = threading.Barrier(4)

    def work(worker: int) -> bool:
        barrier.wait()
        try:
            store.move_alias("t", f"alias-{worker}", 1, expected_release=4)
        except Conflict:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(work, range(4))) == 1
    assert len(store.history("t").releases) == 5
