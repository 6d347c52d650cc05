"""A record that is deleted is missed by the next process that opens the store, whichever it was."""

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from app.errors import CorruptData
from app.prompt import VersionDraft
from app.serving.store_maintenance import StoreMaintenance
from app.store.disk import Disk
from app.store.files import TEMPORARY_PREFIX, DurableFiles
from app.store.prompt_store import PromptStore, open_store
from app.store.scrub import scrub
from tests.store.builders import soft
from tests.store.faulty_disks import CrashedError, crashing_disk


@pytest.fixture
def filled(root: Path) -> PromptStore:
    """Three versions and three releases; version 3 was uploaded for no alias."""
    store = open_store(root)
    for number in (1, 2, 3):
        store.publish("t", VersionDraft(prompt=soft(seed=number), notes=str(number)))
    store.move_alias("t", "live", 1)
    store.move_alias("t", "live", 2)
    store.move_alias("t", "canary", 1)
    return store


def remove(*records: str) -> Callable[[Path], None]:
    def harm(task: Path) -> None:
        for record in records:
            path = task / record
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return harm


LOSSES = {
    "the newest release": remove("releases/3.json"),
    "the newest two releases": remove("releases/3.json", "releases/2.json"),
    "a release in the middle": remove("releases/2.json"),
    "the newest version": remove("versions/3.json"),
    "the newest version and release": remove("versions/3.json", "releases/3.json"),
    "a version and all that was released since": remove(
        "versions/3.json", "versions/2.json", "releases/3.json", "releases/2.json"
    ),
    "all releases": remove("releases/1.json", "releases/2.json", "releases/3.json"),
    "the folder of releases": remove("releases"),
    "the folder of versions": remove("versions"),
    "both folders": remove("releases", "versions"),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_stranger_misses_what_was_deleted(loss: str, root: Path, filled: PromptStore) -> None:
    before = filled.history("t")
    LOSSES[loss](root / "tasks" / "t")
    stranger = open_store(root)
    assert stranger.list_tasks() == ["t"]
    with pytest.raises(CorruptData, match=r"lost|missing|removed"):
        stranger.resolve("t")
    with pytest.raises(CorruptData):
        stranger.move_alias("t", "live", 1)
    with pytest.raises(CorruptData):
        stranger.publish("t", VersionDraft(prompt=None, template="{x}"))
    assert [finding.healed for finding in scrub(open_store(root))] == [False]
    assert [finding.healed for finding in scrub(filled)] == [True], "a replica that knows it mends it"
    assert open_store(root).history("t") == before


def test_the_loss_can_be_accepted(root: Path, filled: PromptStore) -> None:
    (root / "tasks" / "t" / "releases" / "3.json").unlink()
    for mark in (root / "tasks" / "t" / "heads").glob("release-3-*"):
        mark.unlink()
    store = open_store(root)
    assert store.history("t").aliases == {"live": 2}
    store.move_alias("t", "live", 3)
    assert open_store(root).resolve("t").version == 3


def test_a_store_of_before_is_marked_by_the_first_server(root: Path, filled: PromptStore) -> None:
    shutil.rmtree(root / "tasks" / "t" / "heads")
    StoreMaintenance(open_store(root), lambda digest: b"").round()
    (root / "tasks" / "t" / "releases" / "3.json").unlink()
    with pytest.raises(CorruptData, match="lost its release 3"):
        open_store(root).history("t")


def test_a_crash_at_any_point_looks_like_no_loss(root: Path) -> None:
    """Whichever call is the last one: what is there can be read, and the same upload goes on from it."""
    for at in range(1, 200):
        store = root / str(at)
        try:
            publish(PromptStore(DurableFiles(store, crashing_disk(at))))
        except CrashedError:
            assert list(scrub(open_store(store))) == []
            publish(open_store(store))
            (store / "tasks" / "t" / "releases" / "1.json").unlink()
            with pytest.raises(CorruptData, match="lost its release 1"):
                open_store(store).history("t")
        else:
            return
    pytest.fail("it never ran to its end")


def publish(store: PromptStore) -> None:
    version, _ = store.publish("t", VersionDraft(prompt=soft(), notes="one"))
    store.move_alias("t", "live", version.version)


class NoMarks(Disk):
    """A disk that fills up just before each mark."""

    def create(self, name: str, directory: int) -> int:
        if not name.startswith(TEMPORARY_PREFIX):
            raise OSError(errno.ENOSPC, "full")
        return super().create(name, directory)


def test_a_mark_that_cannot_be_made_costs_no_acknowledgement(root: Path) -> None:
    """The release is visible already when its mark comes; the next server makes up for it."""
    publish(PromptStore(DurableFiles(root, NoMarks())))
    store = open_store(root)
    assert store.resolve("t").notes == "one"
    StoreMaintenance(store, lambda digest: b"").round()
    (root / "tasks" / "t" / "releases" / "1.json").unlink()
    assert [finding.healed for finding in scrub(open_store(root))] == [False]
