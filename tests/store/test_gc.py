"""What crashes leave behind goes after a grace period; what anybody refers to never does."""

import os
import time
from pathlib import Path

import pytest

from app.errors import CorruptData
from app.prompt import VersionDraft
from app.store.files import DurableFiles
from app.store.gc import collect_garbage
from app.store.prompt_store import PromptStore, open_store
from tests.store.builders import prefix, soft, tree
from tests.store.faulty_disks import CrashedError, WatchedDisk, crashing_disk

SOFT, OTHER = soft(seed=1), prefix(seed=2)
DAY = 86_400.0


def make_older(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def blob(root: Path, digest: str) -> Path:
    return root / "blobs" / f"{digest}.safetensors"


def test_what_is_young_or_referred_to_stays(root: Path, store: PromptStore) -> None:
    store.publish("t", VersionDraft(prompt=SOFT))
    store.blobs.put(OTHER.digest, OTHER.data)
    make_older(blob(root, SOFT.digest), 30 * DAY)
    assert collect_garbage(store, older_than=DAY).blobs == 0
    make_older(blob(root, OTHER.digest), 2 * DAY)
    before = store.history("t")
    assert collect_garbage(store, older_than=DAY).blobs == 1
    assert not blob(root, OTHER.digest).exists()
    assert store.read_blob(SOFT.digest) == SOFT.data
    assert open_store(root).history("t") == before
    assert list((root / "quarantine").iterdir()) == []


def test_unfinished_files_go(root: Path, store: PromptStore) -> None:
    store.publish("t", VersionDraft(prompt=SOFT))
    for point in range(1, 60):
        try:
            PromptStore(DurableFiles(root, crashing_disk(point))).publish("t", VersionDraft(prompt=OTHER))
        except CrashedError:
            continue
        break
    leftovers = list(root.rglob(".tmp-*"))
    assert leftovers
    assert collect_garbage(store, older_than=DAY).leftovers == 0
    for path in leftovers:
        make_older(path, 2 * DAY)
    assert collect_garbage(store, older_than=DAY).leftovers == len(leftovers)
    assert not list(root.rglob(".tmp-*"))
    assert [version.prompt_digest for version in store.history("t").versions][:1] == [SOFT.digest]


def test_publishing_an_old_blob_again_makes_it_young(root: Path, store: PromptStore) -> None:
    store.blobs.put(SOFT.digest, SOFT.data)
    make_older(blob(root, SOFT.digest), 30 * DAY)
    store.blobs.put(SOFT.digest, SOFT.data)
    assert collect_garbage(store, older_than=DAY).blobs == 0


def test_a_sweep_that_was_killed_is_made_good(root: Path, store: PromptStore) -> None:
    """It had set a blob aside when a manifest that refers to it appeared, and never came back."""
    store.publish("t", VersionDraft(prompt=SOFT))
    store.files.quarantine(("blobs", f"{SOFT.digest}.safetensors"))
    with pytest.raises(CorruptData):
        store.read_blob(SOFT.digest)
    collect_garbage(store, older_than=DAY)
    assert store.read_blob(SOFT.digest) == SOFT.data


def test_nothing_is_swept_where_a_task_cannot_be_read(root: Path, store: PromptStore) -> None:
    store.publish("t", VersionDraft(prompt=SOFT))
    make_older(blob(root, SOFT.digest), 30 * DAY)
    (root / "tasks/t/versions/1.json").write_bytes(b"rot")
    before = tree(root)
    with pytest.raises(CorruptData):
        collect_garbage(open_store(root), older_than=DAY)
    assert tree(root) == before


def test_a_stray_file_among_the_tasks_stops_no_sweep(root: Path, store: PromptStore) -> None:
    store.publish("t", VersionDraft(prompt=SOFT))
    (root / "tasks" / "README").write_text("a note")
    (root / "tasks" / "notes").write_text("another")
    store.blobs.put(OTHER.digest, OTHER.data)
    make_older(blob(root, OTHER.digest), 2 * DAY)
    assert collect_garbage(store, older_than=DAY).blobs == 1


@pytest.mark.parametrize("moment", ["rename", "unlink"])
def test_a_manifest_that_appears_during_a_sweep_keeps_its_blob(
    moment: str, root: Path, store: PromptStore
) -> None:
    """Another process publishes right after the sweeper looked at the references."""
    store.publish("t", VersionDraft(prompt=SOFT))
    store.blobs.put(OTHER.digest, OTHER.data)
    make_older(blob(root, OTHER.digest), 2 * DAY)
    publisher = open_store(root)
    published: list[int] = []

    def publish_meanwhile(point: str) -> None:
        if point == f"before {moment}" and not published:
            published.append(0)
            published[0] = publisher.publish("t", VersionDraft(prompt=OTHER))[0].version

    collect_garbage(PromptStore(DurableFiles(root, WatchedDisk(publish_meanwhile))), older_than=DAY)
    assert published == [2]
    assert open_store(root).read_blob(OTHER.digest) == OTHER.data


def test_what_a_killed_sweep_had_set_aside_for_good_goes_later(root: Path, store: PromptStore) -> None:
    store.publish("t", VersionDraft(prompt=SOFT))
    store.blobs.put(OTHER.digest, OTHER.data)
    aside = store.files.quarantine(("blobs", f"{OTHER.digest}.safetensors"))
    evidence = root / "quarantine" / f"blobs-{SOFT.digest}.safetensors.00"
    evidence.write_bytes(b"rot")
    assert aside is not None
    for path in (root.joinpath(*aside), evidence):
        make_older(path, 2 * DAY)
    assert collect_garbage(store, older_than=DAY).blobs == 1
    assert not root.joinpath(*aside).exists()
    assert evidence.exists()
