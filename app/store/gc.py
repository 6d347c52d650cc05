"""Removing what crashes and refused uploads leave behind: unfinished files, and blobs nobody refers to.

Only what is older than a grace period, since an upload that runs now has not referred to its blob
yet. A blob is set aside before it is removed, and comes back where a manifest that appeared
meanwhile refers to it; whoever publishes an old blob again makes it young first, and afterwards looks
whether it is still there.
"""

import re
from dataclasses import dataclass

from app.errors import CorruptData
from app.store.blobs import FOLDER, blob_name
from app.store.files import QUARANTINE, Name
from app.store.prompt_store import PromptStore
from app.store.references import is_task_id

GRACE_SECONDS = 7 * 86_400.0
_ASIDE = re.compile(rf"{FOLDER}-([0-9a-f]{{64}})\.safetensors\.[0-9a-f]+")


@dataclass(frozen=True, slots=True)
class Swept:
    """What was removed."""

    leftovers: int  # unfinished files
    blobs: int


def sweep(store: PromptStore, *, older_than: float = GRACE_SECONDS) -> Swept:
    """Remove debris older than so many seconds.

    Raises CorruptData where a task can't be read (nothing is known of what it refers to then), and
    StoreFull where nothing can be removed.
    """
    _bring_back(store, _referenced(store))  # what a sweep that was killed had set aside
    leftovers = sum(_remove_leftovers(store, folder, older_than) for folder in _folders(store))
    referenced = _referenced(store)
    asides: list[Name] = []
    for digest in store.blobs.digests():
        age = store.files.age(blob_name(digest))
        if digest not in referenced and age is not None and age > older_than:
            aside = store.files.set_aside(blob_name(digest))
            asides += [] if aside is None else [aside]
    kept = _bring_back(store, _referenced(store)) if asides else set()
    removed = {aside for aside in asides if aside not in kept} | _spare_copies(store, older_than)
    for aside in removed:
        store.files.remove(aside)
    return Swept(leftovers, len(removed))


def _folders(store: PromptStore) -> list[Name]:
    ids = filter(is_task_id, store.files.names(("tasks",)))  # also of what never became a task
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
    """Good blobs in the quarantine that nobody misses; damaged ones are evidence, and stay."""
    referenced = _referenced(store)
    return {
        (QUARANTINE, entry)
        for entry in store.files.names((QUARANTINE,))
        if (match := _ASIDE.fullmatch(entry)) is not None
        and (match[1] not in referenced or store.blobs.exists(match[1]))
        and (store.files.age((QUARANTINE, entry)) or 0.0) > older_than
        and store.blobs.read_good((QUARANTINE, entry), match[1]) is not None
    }


def _bring_back(store: PromptStore, referenced: set[str]) -> set[Name]:
    """Good blobs that lie in the quarantine although a manifest refers to them and the store lacks them."""
    kept: set[Name] = set()
    for entry in store.files.names((QUARANTINE,)):
        match = _ASIDE.fullmatch(entry)
        if match is None or match[1] not in referenced or store.blobs.exists(match[1]):
            continue
        if (data := store.blobs.read_good((QUARANTINE, entry), match[1])) is not None:
            store.blobs.put(match[1], data)
            kept.add((QUARANTINE, entry))
    return kept
