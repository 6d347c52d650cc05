"""Garbage collection: unfinished files that crashes leave behind, and blobs that no version refers to.

Only what is older than a grace period goes, since an upload that runs now has not referred to its blob
yet. A blob is quarantined before it is removed, and comes back where a manifest that appeared
meanwhile refers to it. A publisher of an old blob touches it first, and looks afterwards whether it is still
there.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from app.errors import CorruptData
from app.store.blobs import FOLDER, blob_name
from app.store.files import QUARANTINE, Name
from app.store.prompt_store import PromptStore
from app.store.references import is_task_id

GRACE_SECONDS = 7 * 86_400.0
_QUARANTINED = re.compile(rf"{FOLDER}-([0-9a-f]{{64}})\.safetensors\.[0-9a-f]+")


@dataclass(frozen=True, slots=True)
class Collected:
    """How much was removed."""

    leftovers: int  # unfinished files
    blobs: int


def collect_garbage(store: PromptStore, *, older_than: float = GRACE_SECONDS) -> Collected:
    """Remove garbage older than so many seconds.

    Raise CorruptData where a task can't be read (its references aren't known then), and
    StoreFull where nothing can be removed.
    """
    _bring_back(store, _referenced(store))  # blobs that a collector quarantined before it was killed
    leftovers = sum(_remove_leftovers(store, folder, older_than) for folder in _folders(store))
    referenced = _referenced(store)
    quarantined: set[Name] = set()
    for digest in store.blobs.digests():
        age = store.files.age(blob_name(digest))
        if digest not in referenced and age is not None and age > older_than:
            name = store.files.quarantine(blob_name(digest))
            quarantined |= set() if name is None else {name}
    kept = _bring_back(store, _referenced(store)) if quarantined else set()
    removed = (quarantined - kept) | _spare_copies(store, older_than)
    for name in removed:
        store.files.remove(name)
    return Collected(leftovers, len(removed))


def _folders(store: PromptStore) -> list[Name]:
    ids = filter(is_task_id, store.files.names(("tasks",)))  # also of folders that never became tasks
    tasks = [("tasks", task_id, kind) for task_id in ids for kind in ("versions", "releases")]
    return [(FOLDER,), (QUARANTINE,), *tasks]


def _remove_leftovers(store: PromptStore, folder: Name, older_than: float) -> int:
    try:
        return store.files.remove_leftovers(folder, older_than)
    except CorruptData:  # no folder, though it has the name of one
        return 0


def _referenced(store: PromptStore) -> set[str]:
    histories = (store.histories.refresh(task_id) for task_id in store.list_tasks())
    return {
        version.prompt_digest
        for history in histories
        for version in history.versions
        if version.prompt_digest is not None
    }


def _spare_copies(store: PromptStore, older_than: float) -> set[Name]:
    """Return good blobs in the quarantine that the store doesn't need; damaged ones stay, as evidence."""
    referenced = _referenced(store)
    return {
        name
        for name, digest in _quarantined(store)
        if (digest not in referenced or store.blobs.exists(digest))
        and (store.files.age(name) or 0.0) > older_than
        and store.blobs.read_good(name, digest) is not None
    }


def _bring_back(store: PromptStore, referenced: set[str]) -> set[Name]:
    """Put back quarantined good blobs that a manifest refers to and the store lacks; return them."""
    kept: set[Name] = set()
    for name, digest in _quarantined(store):
        if digest not in referenced or store.blobs.exists(digest):
            continue
        if (data := store.blobs.read_good(name, digest)) is not None:
            store.blobs.put(digest, data)
            kept.add(name)
    return kept


def _quarantined(store: PromptStore) -> Iterator[tuple[Name, str]]:
    """Yield names and digests of the blobs in the quarantine."""
    for entry in store.files.names((QUARANTINE,)):
        if (match := _QUARANTINED.fullmatch(entry)) is not None:
            yield (QUARANTINE, entry), match[1]
