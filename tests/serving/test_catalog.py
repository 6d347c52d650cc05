"""Listings: as of now, by what they are asked for, and the whole of it remembered."""

from collections.abc import Callable
from pathlib import Path

import pytest

from app.prompt import TaskVersion, VersionDraft
from app.serving import catalog as catalogs
from app.serving.catalog import Catalog
from app.store.prompt_store import PromptStore, open_store
from tests.serving.stack import Stack


def everything(task_id: str) -> bool:
    return True


def even(task_id: str) -> bool:
    return int(task_id[1:]) % 2 == 0


class Cards:
    """Writes a version's task, and counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, version: TaskVersion) -> bytes:
        self.count += 1
        return f"{version.task_id}@{version.version}".encode()


def publish(store: PromptStore, task: str, template: str) -> None:
    version, _ = store.publish(task, VersionDraft(prompt=None, template=template))
    store.move_alias(task, "live", version.version)


@pytest.fixture
def store(tmp_path: Path) -> PromptStore:
    store = open_store(tmp_path / "store")
    for number in range(6):
        publish(store, f"t{number}", "{x}")
    return store


@pytest.fixture
def catalog(stack: Stack, store: PromptStore) -> Catalog:
    return Catalog(store, stack.generation)


def test_pages_of_what_is_shown(catalog: Catalog) -> None:
    def ids(shown: Callable[[str], bool], after: str | None, limit: int) -> tuple[list[str], str | None]:
        rows, following = catalog.page(shown, after, limit)
        return [row.task_id for row in rows], following

    assert ids(everything, None, 4) == (["t0", "t1", "t2", "t3"], "t3")
    assert ids(everything, "t3", 4) == (["t4", "t5"], None)
    assert ids(even, None, 2) == (["t0", "t2"], "t2")
    assert ids(even, "t2", 2) == (["t4"], None)
    assert ids(everything, "zzz", 2) == ([], None)
    assert (catalog.count(everything), catalog.count(even)) == (6, 3)


def test_the_whole_is_remembered_and_shown_by_name(catalog: Catalog) -> None:
    cards = Cards()
    first = catalog.servable(everything, cards)
    assert first == [b"t0@1", b"t1@1", b"t2@1", b"t3@1", b"t4@1", b"t5@1"]
    assert catalog.servable(even, cards) == [b"t0@1", b"t2@1", b"t4@1"]
    assert cards.count == 6


def test_our_changes_are_in_the_whole_at_once(
    catalog: Catalog, store: PromptStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogs, "LISTING_SECONDS", 3600.0)
    cards = Cards()
    catalog.servable(everything, cards)
    for _ in range(2):  # also when nothing was read since
        publish(store, "t3", f"new {_} {{x}}")
    assert catalog.servable(everything, cards)[3] == b"t3@3"
    store.retire("t0")
    publish(store, "t7", "{x}")
    assert catalog.servable(everything, cards) == [b"t1@1", b"t2@1", b"t3@3", b"t4@1", b"t5@1", b"t7@1"]
    assert cards.count == 8, "what didn't change isn't written again"


def test_changes_of_others_are_seen(
    catalog: Catalog, store: PromptStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New tasks at once, moved aliases when the whole is old; rows and counts at once."""
    other = open_store(tmp_path / "store")
    catalog.servable(everything, cards := Cards())
    publish(other, "t8", "{x}")
    publish(other, "t1", "another {x}")
    rows, _ = catalog.page(everything, "t0", 1)
    assert rows[0].live is not None
    assert rows[0].live.version.version == 2
    assert catalog.count(everything) == 7
    assert b"t8@1" in catalog.servable(everything, cards)
    monkeypatch.setattr(catalogs, "LISTING_SECONDS", 0.0)
    publish(other, "t2", "another {x}")
    assert b"t2@2" in catalog.servable(everything, cards)


def test_nobody_looks_again_where_nobody_touched_the_store(
    catalog: Catalog, store: PromptStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogs, "LISTING_SECONDS", 0.0)
    monkeypatch.setattr("app.store.files.TICK_SECONDS", -3600.0)
    catalog.servable(everything, cards := Cards())
    catalog.servable(everything, cards)  # what reading it the first time changed
    with monkeypatch.context() as patch:
        patch.setattr(PromptStore, "alias_versions", lambda *_: pytest.fail("it looked at a task"))
        assert len(catalog.servable(everything, cards)) == 6
    publish(open_store(tmp_path / "store"), "t4", "another {x}")
    assert b"t4@2" in catalog.servable(everything, cards)
